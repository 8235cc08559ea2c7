//! Metrics of verifications, key sets and revocations.

use super::{
    algorithm::VerifiedBy,
    error::TokenError,
    jwk::{KeySource, Unusable},
    jwks::JwksFailure,
};
use crate::telemetry::metrics::{
    CounterBy, Gauge, GaugeBy, Histogram, NumberGaugeBy, OkOr, Registry,
};

/// From 5 µs to 10 ms: a verification is computing and waits for nothing.
const COMPUTING_BUCKETS: [f64; 11] = [
    0.000_005, 0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005,
    0.01,
];

/// The metrics of an authenticator.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Verifications, by result.
    pub(super) tokens: CounterBy<OkOr<TokenError>>,
    /// Successful verifications, by key and algorithm.
    pub(super) tokens_accepted: CounterBy<VerifiedBy, 2>,
    /// Duration of one verification.
    pub(super) token_seconds: Histogram,
    /// Revocations in force, at the time of the scrape.
    pub(super) revocations: Gauge,
    /// When a key set was last read, in seconds since 1970.
    pub(super) jwks_read: NumberGaugeBy<KeySource>,
    /// Keys that can be used.
    pub(super) jwks_keys: GaugeBy<KeySource>,
    /// Keys that were left out, counted once for each document.
    pub(super) jwks_keys_unusable: CounterBy<Unusable>,
    /// Failures to read a key set, by source and error.
    pub(super) jwks_failures: CounterBy<JwksFailure, 2>,
}

impl Metrics {
    /// Registers the metrics, all at zero.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            tokens: registry.counter_by(
                "tokens_total",
                ["result"],
                "Token verifications, by result.",
            ),
            tokens_accepted: registry.counter_by(
                "tokens_accepted_total",
                ["key", "algorithm"],
                "Tokens found genuine, by key and algorithm.",
            ),
            token_seconds: registry.histogram(
                "token_seconds",
                "One verification of a token.",
                &COMPUTING_BUCKETS,
            ),
            revocations: registry.gauge("revocations", "Revocations that hold."),
            jwks_read: registry.number_by(
                "jwks_last_success_timestamp_seconds",
                "origin",
                "When the key set was last read, by origin; 0 if never.",
            ),
            jwks_keys: registry.gauge_by(
                "jwks_keys",
                ["origin"],
                "Keys that can be used, by origin.",
            ),
            jwks_keys_unusable: registry.counter_by(
                "jwks_keys_unusable_total",
                ["reason"],
                "Keys of documents that are left out, by reason.",
            ),
            jwks_failures: registry.counter_by(
                "jwks_failures_total",
                ["origin", "kind"],
                "Key sets that could not be had, by origin and kind.",
            ),
        }
    }
}
