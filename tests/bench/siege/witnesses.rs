//! Clients that measure what the others notice: newcomers, neighbours in an ordinary room, viewers
//! of events that nobody had open, and old clients that lose their sockets and come back.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    client::{Client, DEADLINE, Event, Identity},
    stage::{EVENTS, LATE, NEIGHBOURS, NEWCOMERS, RETURNING},
    testimony::Testimony,
    viewers::{self, Seat},
};
use crate::support::token;

/// Between two newcomers.
const NEWCOMER: Duration = Duration::from_millis(500);
/// Between two things that a neighbour says.
const SAYING: Duration = Duration::from_secs(1);
/// Between two events that are opened.
const OPENING: Duration = Duration::from_secs(8);
/// Viewers of each such event.
const LATE_VIEWERS: usize = 3;
/// Between two old clients that lose their sockets.
const LOSING: Duration = Duration::from_secs(4);
/// How long an old client waits to be healed: the first round is at 2.5 s, the second at 17.
const HEALING: Duration = Duration::from_secs(30);

/// Newcomers, one after the other: from the connection to the answer of the join.
pub(crate) async fn newcomers(at: SocketAddr, testimony: Arc<Testimony>) {
    let key = Arc::<str>::from(token("anon"));
    let (mut ticks, mut coming) = (steady(NEWCOMER), JoinSet::new());
    for turn in 0_usize.. {
        ticks.tick().await;
        while coming.try_join_next().is_some() {}
        let (key, testimony) = (Arc::clone(&key), Arc::clone(&testimony));
        coming.spawn(async move {
            let begun = Instant::now();
            let identity =
                Identity { from: NEWCOMERS, agent: "a newcomer", token: &key, reads: None };
            let joined = async {
                let mut client = Client::open(at, &identity).await?;
                let topic = format!("cache_invalidate_{}", EVENTS[turn % EVENTS.len()]);
                client.join(&topic, &key).await?;
                Ok::<_, String>(client)
            };
            match joined.await {
                Ok(client) => {
                    testimony.newcomers.record(begun, Ok(()));
                    client.close().await;
                }
                Err(reason) => testimony.newcomers.record(begun, Err(reason)),
            }
        });
    }
}

/// A client that says something in an ordinary room every second, and wants it acknowledged.
pub(crate) async fn neighbour(at: SocketAddr, testimony: Arc<Testimony>) {
    let (key, mut ticks) = (token("anon"), steady(SAYING));
    let identity = Identity { from: NEIGHBOURS, agent: "a neighbour", token: &key, reads: None };
    let mut seated = None;
    for number in 0_u64.. {
        ticks.tick().await;
        let begun = Instant::now();
        let saying = async {
            let mut client = match seated.take() {
                Some(client) => client,
                None => {
                    let mut client = Client::open(at, &identity).await?;
                    client.join("neighbours", &key).await?;
                    client
                }
            };
            let sent = client.broadcast("neighbours", &json!({ "number": number })).await?;
            let answered = timeout(DEADLINE, client.answered(&sent)).await;
            answered.unwrap_or_else(|_| Err("not acknowledged".to_owned()))?;
            seated = Some(client);
            Ok(())
        };
        testimony.neighbours.record(begun, saying.await);
    }
}

/// Opens events that nobody had open, until the siege is over; their viewers, until they are stopped,
/// must be told of every change after their join.
pub(crate) async fn open_late(
    seat: Seat,
    testimony: Arc<Testimony>,
    over: CancellationToken,
    stop: CancellationToken,
) {
    let (mut ticks, mut tasks) = (steady(OPENING), JoinSet::new());
    for number in 0..LATE.len() {
        if over.run_until_cancelled(ticks.tick()).await.is_none() {
            break;
        }
        let events = std::iter::repeat_n(EVENTS.len() + number, LATE_VIEWERS);
        let viewers = viewers::open(&seat, events, &mut tasks, &stop).await;
        testimony.late.lock().extend(viewers);
    }
    while tasks.join_next().await.is_some() {}
}

/// Old clients that lose their sockets, come back, and join only when they are asked to.
pub(crate) async fn returning(at: SocketAddr, testimony: Arc<Testimony>, until: CancellationToken) {
    let key = Arc::<str>::from(token("anon"));
    let (mut ticks, mut away) = (steady(LOSING), JoinSet::new());
    for number in 0_usize.. {
        if until.run_until_cancelled(ticks.tick()).await.is_none() {
            break;
        }
        let (key, testimony) = (Arc::clone(&key), Arc::clone(&testimony));
        away.spawn(async move {
            let agent = format!("an old client {number}");
            let identity = Identity { from: RETURNING, agent: &agent, token: &key, reads: None };
            let topic = format!("cache_invalidate_{}", EVENTS[number % EVENTS.len()]);
            let mut begun = Instant::now();
            let healing = async {
                let mut client = Client::open(at, &identity).await?;
                client.join(&topic, &key).await?;
                // It is gone without a word.
                drop(client);
                let mut client = Client::open(at, &identity).await?;
                begun = Instant::now();
                client.beat().await?;
                loop {
                    if let Event::ChannelEnded { sub_topic } = client.next().await?
                        && sub_topic == topic
                    {
                        return Ok(client);
                    }
                }
            };
            let healed = timeout(HEALING, healing).await;
            let healed = healed.unwrap_or_else(|_| Err("not asked to join again".to_owned()));
            testimony.returned.record(begun, healed.map(drop));
        });
    }
    while away.join_next().await.is_some() {}
}

/// Ticks that are not made up for.
pub(crate) fn steady(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
