//! What may have been missed: from the history where it can be trusted, else everything.
//!
//! Invariants: a gap ends in exactly one invalidation per event that it touched; the history is
//! read after every LISTEN is active, so that what commits later is notified and what committed
//! earlier is read; where one event cannot be vouched for, its viewers get the complete list.

use std::{collections::HashMap, sync::Arc};

use tokio::time::Instant;

use super::{
    canary::{Good, Look},
    listener::gap_begins,
    listens::Source,
};
use crate::{
    db::{self, Changed, Snapshot},
    invalidation::{CatchUpCause, Endpoints, Feed, Heard},
    server::Services,
};

use sqlx::postgres::PgListener;

/// What the history has to say of an event.
#[derive(Debug, Default)]
struct Missed {
    endpoints: Endpoints,
    is_everything: bool,
}

/// Tells the viewers of the events that an earlier session has listened to what they have missed
/// since `good`. `now` is what had been committed when all LISTENs were active.
///
/// # Errors
/// The session broke. What the server refuses to say costs the complete list, and no more.
pub(super) async fn catch_up(
    services: &Services,
    listener: &mut PgListener,
    cause: CatchUpCause,
    covered: Vec<Arc<Source>>,
    good: Option<&Good>,
    now: &Good,
) -> Result<(), sqlx::Error> {
    let covered = events(covered);
    // On one server transactions are only ever counted up.
    let is_same =
        |good: &&Good| good.identity == now.identity && good.snapshot.xmax() <= now.snapshot.xmax();
    let cause = match good {
        Some(good) if !is_same(&good) => {
            gap_begins(&services.metrics, CatchUpCause::Restored);
            CatchUpCause::Restored
        }
        Some(_) | None => cause,
    };
    let missed = match good.filter(is_same) {
        Some(good) => read(services, listener, &good.snapshot, &covered).await?,
        None => None,
    };
    tell(services, cause, &covered, missed.as_ref());
    Ok(())
}

/// Tells viewers of what triggers could not notify since `since`, as the canary has found out.
///
/// # Errors
/// The session broke.
pub(super) async fn catch_up_failures(
    services: &Services,
    listener: &mut PgListener,
    since: &Snapshot,
    look: &Look,
) -> Result<(), sqlx::Error> {
    let failures = look.failures.as_ref().map(|(_, failures)| &**failures).unwrap_or_default();
    let (kept, lost): (Vec<_>, Vec<_>) = failures.iter().partition(|it| it.is_in_history);
    if !lost.is_empty() {
        gap_begins(&services.metrics, CatchUpCause::TriggerFailure);
    }
    if !kept.is_empty() {
        gap_begins(&services.metrics, CatchUpCause::QueueFull);
    }
    // What has come to exist meanwhile belongs to the complete list, too.
    learn(services, listener, services.listens.covered()).await?;
    let covered = events(services.listens.covered());
    if !lost.is_empty() {
        let is_unknown = lost.iter().any(|it| it.eid.is_none());
        let is_lost = |event: &Feed| {
            is_unknown || lost.iter().any(|it| it.eid.as_deref() == Some(event.eid()))
        };
        let touched: Vec<_> = covered.iter().filter(|(_, event)| is_lost(event)).cloned().collect();
        tell(services, CatchUpCause::TriggerFailure, &touched, None);
    }
    if !kept.is_empty() {
        let missed = read(services, listener, since, &covered).await?;
        tell(services, CatchUpCause::QueueFull, &covered, missed.as_ref());
    }
    Ok(())
}

/// Notes the endpoints that the events of these sources have.
///
/// # Errors
/// The session broke. Where the server refuses to say, what is heard of an event is all that is
/// known of it.
pub(super) async fn learn(
    services: &Services,
    listener: &mut PgListener,
    sources: Vec<Arc<Source>>,
) -> Result<(), sqlx::Error> {
    let events: HashMap<_, _> =
        events(sources).into_iter().map(|(_, event)| (event.eid().to_owned(), event)).collect();
    if events.is_empty() {
        return Ok(());
    }
    let eids: Vec<_> = events.keys().cloned().collect();
    let Some(listed) = readable(services, db::endpoints(listener, &eids).await)? else {
        return Ok(());
    };
    let mut lists: HashMap<String, Endpoints> = HashMap::new();
    for (eid, endpoint) in listed {
        if !endpoint.is_empty() {
            lists.entry(eid).or_default().insert(endpoint.into());
        }
    }
    for (eid, endpoints) in &lists {
        if let Some(event) = events.get(eid) {
            event.learn(endpoints);
        }
    }
    Ok(())
}

/// The sources with an event, with it.
fn events(sources: Vec<Arc<Source>>) -> Vec<(Arc<Source>, Arc<Feed>)> {
    let with_event = |source: Arc<Source>| {
        let event = Arc::clone(source.event.as_ref()?);
        Some((source, event))
    };
    sources.into_iter().filter_map(with_event).collect()
}

/// What the history says, by EID; none if it cannot be read or lacks something.
async fn read(
    services: &Services,
    listener: &mut PgListener,
    since: &Snapshot,
    covered: &[(Arc<Source>, Arc<Feed>)],
) -> Result<Option<HashMap<String, Missed>>, sqlx::Error> {
    if covered.is_empty() {
        return Ok(None);
    }
    let keep = services.config.history.keep;
    let Some(has_holes) = readable(services, db::has_holes(listener, since, keep).await)? else {
        return Ok(None);
    };
    let eids: Vec<_> = covered.iter().map(|(_, event)| event.eid().to_owned()).collect();
    let changed = readable(services, db::changed_since(listener, since, &eids).await)?;
    let Some(changed) = changed.filter(|_| !has_holes) else {
        return Ok(None);
    };
    let mut missed: HashMap<String, Missed> = HashMap::new();
    for Changed { eid, endpoint, is_pointer } in changed {
        let missed = missed.entry(eid).or_default();
        missed.is_everything |= is_pointer;
        missed.endpoints.extend(endpoint.map(Into::into));
    }
    Ok(Some(missed))
}

/// What the server gave; nothing if it refused.
fn readable<T>(
    services: &Services,
    read: Result<T, sqlx::Error>,
) -> Result<Option<T>, sqlx::Error> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error @ (sqlx::Error::Database(_) | sqlx::Error::Protocol(_))) => {
            services.metrics.history_unreadable.inc();
            tracing::warn!(error = &error as &dyn std::error::Error, "the history cannot be read");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// One invalidation for each event that something is known to be missed of; for each of which
/// nothing is known the complete list, the events one after the other.
fn tell(
    services: &Services,
    cause: CatchUpCause,
    covered: &[(Arc<Source>, Arc<Feed>)],
    missed: Option<&HashMap<String, Missed>>,
) {
    if cfg!(feature = "without-catch-up") {
        return;
    }
    let everybody = services.feeds.all();
    let has_heard = |heard: Heard| everybody.iter().any(|it| it.heard() == heard);
    // Where nothing was heard of an event itself, its notifications are taken to be like those of
    // the others.
    let is_like_others = has_heard(Heard::OnlyWithId) && !has_heard(Heard::SomeWithoutId);
    for (source, event) in covered {
        let is_trusted = match event.heard() {
            Heard::OnlyWithId => true,
            Heard::SomeWithoutId => false,
            Heard::Nothing => is_like_others,
        };
        // A joined viewer who was owed a catch-up gets it with this one.
        let is_owed = event.take_owed();
        let now = Instant::now();
        match missed.filter(|_| is_trusted && !is_owed) {
            Some(missed) => match missed.get(event.eid()) {
                Some(Missed { is_everything: true, .. }) => {
                    services.feeds.offer_gap(event, cause, None, now);
                }
                Some(Missed { endpoints, .. }) if !endpoints.is_empty() => {
                    services.feeds.offer_gap(event, cause, Some(endpoints), now);
                }
                Some(_) | None => {}
            },
            None => {
                services.listens.cover_anew(&source.channel);
                let spread = services.config.relay.resync_spread.mul_f64(fastrand::f64());
                services.feeds.offer_gap(event, cause, None, now + spread);
            }
        }
    }
}
