//! An operator who takes somebody's token back, and how long that somebody goes on reading.
//!
//! With attackers of kind 1 the somebody reads slowly, and has a second socket that keeps frames in
//! flight for the first; otherwise the somebody is like any other.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::json;
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};

use super::{
    client::{Client, DEADLINE, Event, Identity},
    http::Http,
    sources::accepted,
    stage::{ADMIN_TOKEN, EVENTS, SERVERS, attackers},
    testimony::Testimony,
    witnesses::steady,
};
use crate::support::{token, token_with};

/// Between two messages to the admins, and between two looks.
const TICK: Duration = Duration::from_millis(50);
/// How long the somebody reads before the revocation, so that frames are in flight.
const BEFORE: Duration = Duration::from_secs(2);
/// How long the somebody is watched after it. Longer than a revocation may take.
pub(crate) const WATCH: Duration = Duration::from_secs(15);
/// What the slow socket reads, per second.
const READS: u32 = 300_000;
/// What the second socket says each time the first has read it.
const SAID: usize = 4096;
/// Frames in flight for the slow socket.
const IN_FLIGHT: usize = 235;

/// The topic that the somebody may read until the revocation.
fn topic() -> String {
    format!("admin-auction-{}", EVENTS[0])
}

#[derive(Deserialize)]
struct AdminMessage {
    /// Milliseconds since the run began.
    published: Option<u64>,
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Publishes to the admins of an event, each message with its time.
pub(crate) async fn publish(at: SocketAddr, begun: Instant, testimony: Arc<Testimony>) {
    let (mut http, key) = (Http::new(SERVERS, at), token("service_role"));
    let mut ticks = steady(TICK);
    loop {
        ticks.tick().await;
        let payload = json!({ "published": milliseconds(begun) });
        let message = json!({ "topic": topic(), "event": "bid", "payload": payload });
        let asked = Instant::now();
        let published = accepted(http.publish(&key, &[message]).await);
        testimony.admin_messages.record(asked, published);
    }
}

/// Revokes one person's tokens after the other's.
pub(crate) async fn revoke(
    public: SocketAddr,
    admin: SocketAddr,
    begun: Instant,
    is_stubborn: bool,
    testimony: Arc<Testimony>,
) {
    for person in 0_u64.. {
        let sub = format!("00000000-0000-4000-8000-{person:012}");
        let claims = json!({
            "role": "authenticated", "sub": sub, "admin_events": { EVENTS[0]: "producer" },
        });
        let somebody = Somebody {
            public,
            key: token_with(claims),
            room: is_stubborn.then(|| format!("busy-{person}")),
            last: AtomicU64::new(0),
            wanted: Semaphore::new(IN_FLIGHT),
        };
        let (somebody, mut sockets) = (Arc::new(somebody), JoinSet::new());
        sockets.spawn(Arc::clone(&somebody).read());
        sockets.spawn(Arc::clone(&somebody).talk());
        let asked = Instant::now();
        if !somebody.has_read().await {
            testimony.revocations.record(asked, Err("the admin heard nothing".to_owned()));
            continue;
        }
        pass(BEFORE).await;

        let (asked, revoked) = (Instant::now(), milliseconds(begun));
        let body = json!({ "sub": sub }).to_string();
        let header = format!("authorization: Bearer {ADMIN_TOKEN}");
        let answer = Http::new(SERVERS, admin).post("/revoke", &header, body.as_bytes()).await;
        let revocation = accepted(answer);
        let is_made = revocation.is_ok();
        testimony.revocations.record(asked, revocation);
        if is_made {
            pass(WATCH).await;
            let later = somebody.last.load(Ordering::Relaxed).saturating_sub(revoked);
            testimony.read_after.fetch_max(later, Ordering::Relaxed);
            testimony.watched.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Lets time pass.
pub(crate) async fn pass(time: Duration) {
    let (begun, mut ticks) = (Instant::now(), steady(TICK));
    while begun.elapsed() < time {
        ticks.tick().await;
    }
}

/// An admin whose token is taken back.
struct Somebody {
    public: SocketAddr,
    key: String,
    /// The room of the second socket, of one who does not want to go.
    room: Option<String>,
    /// When the last admin message that was read had been published.
    last: AtomicU64,
    /// How many more frames the slow socket wants.
    wanted: Semaphore,
}

impl Somebody {
    async fn has_read(&self) -> bool {
        let reading = async {
            let mut ticks = steady(TICK);
            while self.last.load(Ordering::Relaxed) == 0 {
                ticks.tick().await;
            }
        };
        timeout(DEADLINE, reading).await.is_ok()
    }

    /// Reads whatever comes, and comes back whenever it is thrown out.
    async fn read(self: Arc<Self>) {
        let mut attempts = steady(Duration::from_secs(1));
        loop {
            attempts.tick().await;
            // However it ends: the next attempt follows.
            let _ = self.read_on().await;
        }
    }

    async fn read_on(&self) -> Result<(), String> {
        let reads = self.room.is_some().then_some(READS);
        let identity = Identity { from: attackers(1), agent: "an admin", token: &self.key, reads };
        let mut client = Client::open(self.public, &identity).await?;
        client.push_join(&topic(), &self.key).await?;
        if let Some(room) = &self.room {
            client.push_join(room, &self.key).await?;
        }
        loop {
            match client.next().await? {
                Event::Broadcast { sub_topic, payload } if sub_topic == topic() => {
                    let message = serde_json::from_str::<AdminMessage>(payload.get());
                    if let Ok(AdminMessage { published: Some(published) }) = message {
                        self.last.fetch_max(published.max(1), Ordering::Relaxed);
                    }
                }
                Event::Broadcast { .. } => self.wanted.add_permits(1),
                Event::ChannelEnded { sub_topic } => {
                    client.push_join(&sub_topic, &self.key).await?;
                }
                Event::Reply { .. } | Event::Other => {}
            }
        }
    }

    /// Says something for the slow socket each time that has read something.
    async fn talk(self: Arc<Self>) {
        let mut attempts = steady(Duration::from_secs(1));
        loop {
            attempts.tick().await;
            let Some(room) = &self.room else { return };
            let _ = self.talk_on(room).await;
        }
    }

    async fn talk_on(&self, room: &str) -> Result<(), String> {
        // The second socket is anybody's: nothing is taken back from it.
        let key = token("anon");
        let identity =
            Identity { from: attackers(1), agent: "a second socket", token: &key, reads: None };
        let mut client = Client::open(self.public, &identity).await?;
        client.join(room, &key).await?;
        let said = json!({ "said": "x".repeat(SAID) });
        loop {
            let wanted = tokio::select! {
                wanted = self.wanted.acquire() => wanted,
                event = client.next() => match event? {
                    Event::ChannelEnded { .. } => return Ok(()),
                    _ => continue,
                },
            };
            wanted.map_err(|closed| closed.to_string())?.forget();
            client.broadcast(room, &said).await?;
        }
    }
}
