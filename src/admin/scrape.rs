//! `GET /metrics`: what is looked at only when somebody asks, and then everything as text.
//!
//! Invariants: all events are walked in pieces, so that other tasks get their turn; what they have
//! counted is taken and shown without a pause, so that an asker who goes away loses nothing.

use std::{
    collections::HashMap,
    time::{Duration, UNIX_EPOCH},
};

use hyper::StatusCode;
use tokio::runtime::Handle;

use super::{
    busiest::Row,
    events::{Overview, look},
    metrics::Metrics,
    shared::Shared,
};
use crate::{
    http::{Response, content},
    telemetry::metrics::count,
};

/// Returns everything that is measured, in Prometheus' text format.
pub(super) async fn scrape(shared: &Shared) -> Response {
    shared.auth.show();
    shared.hub.show();
    shared.sockets.show();
    shared.limits.show();
    if let Some(pool) = &shared.pool {
        shared.metrics.show_pool(pool.size(), pool.num_idle());
    }
    let events = look(shared).await;
    show(shared, &events);
    let text = shared.registry.render();
    content(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}

fn show(shared: &Shared, events: &[Overview]) {
    let metrics = &shared.metrics;
    let (mut live, mut muted, mut never_published, mut pending) = (0, 0, 0, 0);
    let mut rows: HashMap<&str, Row> = HashMap::with_capacity(events.len());
    for event in events {
        live += usize::from(event.is_live);
        muted += usize::from(event.summary.muted_for.is_some());
        never_published += usize::from(event.is_in_vain);
        pending += event.summary.pending;
        let last =
            event.summary.last_notification.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        rows.entry(event.feed.eid()).or_default().add(&Row {
            viewers: event.viewers,
            is_known: last.is_some() || event.summary.is_known,
            last_notification: last.map_or(0.0, |at| at.as_secs_f64()),
            tally: event.feed.take_tally(),
        });
    }
    for (gauge, number) in [
        (&metrics.events_live, live),
        (&metrics.events_muted, muted),
        (&metrics.events_never_published, never_published),
        (&metrics.invalidations_pending, pending),
    ] {
        gauge.set(count(number));
    }
    let mut busiest = shared.busiest.lock();
    busiest.show(metrics, &rows, shared.events_max);
    // One asker at a time, or what has come since would be added twice.
    show_runtime(metrics);
}

/// Shows what the runtime reports of itself.
fn show_runtime(metrics: &Metrics) {
    let runtime = Handle::current().metrics();
    let workers = runtime.num_workers();
    let busy: Duration =
        (0..workers).map(|worker| runtime.worker_total_busy_duration(worker)).sum();
    metrics.show_runtime(workers, runtime.num_alive_tasks(), runtime.global_queue_depth(), busy);
}
