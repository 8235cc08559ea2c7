//! `GET /metrics`: what is looked at only when somebody asks, and then everything as text.
//!
//! Invariants: all events are walked in pieces, so that others get their turn; what they have
//! counted is taken and shown without a pause, so that an asker who goes away loses nothing.

use std::{
    collections::HashMap,
    time::{Duration, UNIX_EPOCH},
};

use hyper::StatusCode;
use tokio::runtime::Handle;

use super::{
    busiest::Row,
    events::{Seen, look},
};
use crate::{
    http::{Answer, content},
    metrics::Metrics,
    server::Services,
};

/// Everything that is measured, in Prometheus' text format.
pub(super) async fn scrape(services: &Services) -> Answer {
    let metrics = &services.metrics;
    services.verifier.show();
    services.hub.show();
    services.sockets.show();
    services.limits.show();
    if let Some(pool) = &services.pool {
        metrics.show_pool(pool.size(), pool.num_idle());
    }
    let seen = look(services).await;
    show(services, &seen);
    content(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics.render())
}

fn show(services: &Services, seen: &[Seen]) {
    let metrics = &services.metrics;
    let (mut live, mut muted, mut never_published, mut pending) = (0, 0, 0, 0);
    let mut rows: HashMap<&str, Row> = HashMap::with_capacity(seen.len());
    for it in seen {
        live += usize::from(it.is_live);
        muted += usize::from(it.summary.muted_for.is_some());
        never_published += usize::from(it.is_in_vain);
        pending += it.summary.pending;
        let last = it.summary.last_notification.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        rows.entry(it.event.eid()).or_default().add(&Row {
            viewers: it.viewers,
            is_known: last.is_some() || it.summary.is_known,
            last_notification: last.map_or(0.0, |at| at.as_secs_f64()),
            tally: it.event.take_tally(),
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
    let mut busiest = services.busiest.lock();
    busiest.show(metrics, &rows, services.config.metrics.events_max);
    // One asker at a time, or what has come since would be added twice.
    show_runtime(metrics);
}

/// What the runtime says of itself.
fn show_runtime(metrics: &Metrics) {
    let runtime = Handle::current().metrics();
    for (gauge, number) in [
        (&metrics.tokio_workers, runtime.num_workers()),
        (&metrics.tokio_tasks, runtime.num_alive_tasks()),
        (&metrics.tokio_global_queue, runtime.global_queue_depth()),
    ] {
        gauge.set(count(number));
    }
    let busy: Duration =
        (0..runtime.num_workers()).map(|worker| runtime.worker_total_busy_duration(worker)).sum();
    metrics.show_busy(busy);
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
