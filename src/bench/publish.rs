//! Publishes the load's messages on time: over one WebSocket for each topic, or by `NOTIFY`.
//!
//! Invariant: ticks keep to their schedule whatever the server does, because a load that waits for
//! its server measures nothing. A late tick is sent late, and its lateness is recorded.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use sqlx::PgConnection;
use tokio::{
    task::JoinSet,
    time::{Instant, Interval, interval_at},
};

use super::{arguments::TOPIC_PREFIX, connection::Connection, latency::Latencies, load::Load};
use crate::wire_client::failure::Failure;

/// Publishes every tick from `publishers`, each in a task; afterwards they go on reading in
/// `readers`. Returns the number of messages sent, by topic.
pub(super) async fn by_sockets(
    load: &Arc<Load>,
    publishers: Vec<(usize, Connection)>,
    readers: &mut JoinSet<()>,
) -> Vec<u64> {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for (topic, mut connection) in publishers {
        let load = Arc::clone(load);
        tasks.spawn(async move {
            let mut sent = 0;
            match publish_topic(&load, &mut connection, topic, start, &mut sent).await {
                Ok(()) => (topic, sent, Some(connection)),
                Err(failure) => {
                    load.tally.fail(&failure);
                    (topic, sent, None)
                }
            }
        });
    }
    let mut messages = vec![0; load.topics.len()];
    while let Some(ended) = tasks.join_next().await {
        // The panic has been printed; the messages are missing from the deliveries.
        let Ok((topic, sent, connection)) = ended else { continue };
        messages[topic] = sent;
        if let Some(connection) = connection {
            readers.spawn(connection.view());
        }
    }
    messages
}

/// Publishes the ticks of one topic: the tick of its own number, and every `topics`-th after it.
async fn publish_topic(
    load: &Load,
    connection: &mut Connection,
    topic: usize,
    start: Instant,
    sent: &mut u64,
) -> Result<(), Failure> {
    let mut ticks = ticks(load, start, topic, load.topics.len());
    for _ in (topic as u64..load.ticks).step_by(load.topics.len()) {
        let due = connection.next_tick(&mut ticks).await?;
        load.tally.lateness.record(due.elapsed());
        let mut frames = Vec::new();
        for _ in 0..load.burst {
            let (reference, payload) = (connection.next_ref(), payload(load, topic));
            load.vsn.push_broadcast(&load.topics[topic], reference, &payload, &mut frames);
        }
        connection.write(&frames).await?;
        *sent += load.burst;
    }
    Ok(())
}

/// Notifies every tick on one database connection, each burst in one transaction, and records the
/// time of each statement in `statements`. Returns the number of messages sent, by topic.
///
/// # Errors
/// The database refused a statement or is gone.
pub(super) async fn by_sql(
    load: &Load,
    connection: &mut PgConnection,
    statements: &Latencies,
) -> Result<Vec<u64>, sqlx::Error> {
    let mut messages = vec![0; load.topics.len()];
    let mut ticks = ticks(load, Instant::now(), 0, 1);
    for (_, topic) in (0..load.ticks).zip((0..load.topics.len()).cycle()) {
        let due = ticks.tick().await;
        load.tally.lateness.record(due.elapsed());
        let channel = load.topics[topic].trim_start_matches(TOPIC_PREFIX);
        let payloads: Vec<String> = (0..load.burst).map(|_| payload(load, topic)).collect();
        let begun = Instant::now();
        sqlx::query("SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload")
            .bind(channel)
            .bind(payloads)
            .execute(&mut *connection)
            .await?;
        statements.record(begun.elapsed());
        messages[topic] += load.burst;
    }
    Ok(messages)
}

/// Returns every `step`-th tick of the load, from number `first` on.
fn ticks(load: &Load, start: Instant, first: usize, step: usize) -> Interval {
    let times = |count: usize| load.period * u32::try_from(count).unwrap_or(u32::MAX);
    interval_at(start + times(first), times(step))
}

/// Creates a message's payload, stamped with the present.
fn payload(load: &Load, topic: usize) -> String {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let eid = load.topics[topic].rsplit(['_', ':']).next().unwrap_or_default();
    load.tally.stamps.payload(eid, load.tally.now(), unix, load.payload_bytes)
}
