//! Metrics of queries to the policies.

use strum::VariantNames;

use super::query::{Allowed, PolicyAction, QueryError};
use crate::telemetry::metrics::{CounterBy, HistogramBy, LATENCY_BUCKETS, Label, Named, Registry};

/// What is measured of queries.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Duration of a query, with the wait for a session.
    pub(crate) seconds: HistogramBy<Named<PolicyAction>>,
    /// Queries by action and result.
    pub(crate) queries: CounterBy<QueryResult, 2>,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            seconds: registry.histogram_by(
                "policy_seconds",
                "action",
                "One question to the policies of a private channel, by action.",
                &LATENCY_BUCKETS,
            ),
            queries: registry.counter_by(
                "policy_questions_total",
                ["action", "result"],
                "Questions to the policies of private channels, by action and result.",
            ),
        }
    }
}

/// The labels of a query that has ended: its action, and `allowed`, `denied` or the error's label.
#[derive(Debug)]
pub(crate) struct QueryResult([&'static str; 2]);

impl QueryResult {
    /// Returns the labels of this answer.
    pub(crate) fn new(action: PolicyAction, answer: &Result<Allowed, QueryError>) -> Self {
        let result = match answer {
            Ok(allowed) if allowed.any() => "allowed",
            Ok(_) => "denied",
            Err(error) => error.label(),
        };
        Self([action.label(), result])
    }
}

impl Label<2> for QueryResult {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        PolicyAction::VARIANTS.iter().flat_map(|action| {
            let results = ["allowed", "denied"].iter().chain(QueryError::VARIANTS);
            results.map(|result| [*action, *result])
        })
    }

    fn values(&self) -> [&'static str; 2] {
        self.0
    }
}
