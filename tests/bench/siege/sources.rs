//! What there is to tell: bids in the database, and facts over the REST route with the project's
//! `service_role` key.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use tokio_util::sync::CancellationToken;

use super::{
    http::Http,
    ledger::Ledger,
    stage::{EVENTS, LATE, SERVERS, art_code},
    testimony::Testimony,
    witnesses::steady,
};
use crate::support::token;

/// Between two bids, which go to the events in turn: one per second and event.
const BIDS: Duration = Duration::from_millis(1000 / EVENTS.len() as u64);
/// Between two facts, in turn as well.
const FACTS: Duration = Duration::from_millis(100);

/// Bids on another artwork each time, in the events that have viewers.
pub(crate) async fn bid(
    database: String,
    (ledger, testimony): (Arc<Ledger>, Arc<Testimony>),
    stop: CancellationToken,
) {
    let mut writer = PgConnection::connect(&database).await.unwrap();
    let mut ticks = steady(BIDS);
    let hidden = EVENTS.len() + LATE.len();
    for turn in 0_usize.. {
        if stop.run_until_cancelled(ticks.tick()).await.is_none() {
            return;
        }
        let mut events = vec![turn % EVENTS.len()];
        if turn % EVENTS.len() == 0 {
            events.push(hidden);
            let open = testimony.late.lock();
            events.extend(open.iter().filter(|viewer| viewer.has_joined()).map(|open| open.event));
        }
        events.sort_unstable();
        events.dedup();
        for event in events {
            let event = &ledger.events[event];
            let Some(artwork) = event.next_bid(&ledger) else { continue };
            let bid = "insert into bids (art_id, person_id, amount)
                select id, gen_random_uuid(), 250 from art where art_code = $1";
            let bid = sqlx::query(bid).bind(art_code(event.eid, artwork));
            assert_eq!(bid.execute(&mut writer).await.unwrap().rows_affected(), 1);
        }
    }
}

/// Publishes a fact to each event in turn, and counts the answers.
pub(crate) async fn publish(
    at: SocketAddr,
    (ledger, testimony): (Arc<Ledger>, Arc<Testimony>),
    stop: CancellationToken,
) {
    let (mut http, key) = (Http::new(SERVERS, at), token("service_role"));
    let mut ticks = steady(FACTS);
    for turn in 0_usize.. {
        if stop.run_until_cancelled(ticks.tick()).await.is_none() {
            return;
        }
        let event = &ledger.events[turn % EVENTS.len()];
        let Some(fact) = event.next_fact(&ledger) else { continue };
        let message = json!({
            "topic": format!("auction_winner_{}", event.eid), "event": "auction_winner",
            "payload": { "fact": fact, "type": "auction_status_change" },
        });
        let begun = Instant::now();
        let published = accepted(http.publish(&key, &[message]).await);
        if published.is_err() {
            event.refused(fact);
        }
        testimony.facts.record(begun, published);
    }
}

/// Whether a request was answered with 202, or why not.
pub(crate) fn accepted(answer: io::Result<u16>) -> Result<(), String> {
    match answer {
        Ok(202) => Ok(()),
        Ok(status) => Err(format!("answered {status}")),
        Err(error) => Err(error.to_string()),
    }
}
