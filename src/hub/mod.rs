//! Who is joined to which topic, and the fan-out of a broadcast to them.
//!
//! Invariants: a topic with no subscriber is not in the map; no lock is held while frames are
//! pushed; no two locks are held at once; a broadcast is encoded at most once per serializer. What
//! is absent on purpose: a fan-out that has begun may still reach who has unsubscribed meanwhile.

mod held;
mod metrics;
pub mod outbox;
mod sockets;

use std::{
    array,
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    sync::{Arc, OnceLock, Weak},
};

use parking_lot::Mutex;
use slab::Slab;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message as Frame;

pub(crate) use self::sockets::{NoPermit, Permit, Reliever};
pub use self::{held::OutboxBounds, metrics::BroadcastSource, sockets::Sockets};
use self::{
    metrics::Metrics,
    outbox::{Committed, Kind, Outbox, Replaceable, Since, TopicId},
};
use crate::{
    protocol::{
        serializer::{Broadcast, Serializer},
        topic::{TOPIC_PREFIX, TopicKey},
    },
    telemetry::metrics::Registry,
};

/// Topics are spread over this many locks.
const SHARDS: usize = 64;
/// Pushes between two yields: about 0.4 ms of work, so that a huge topic does not hold a worker.
const PUSHES_PER_YIELD: usize = 1024;

/// All topics of this process.
#[derive(Debug)]
pub struct Hub {
    metrics: Metrics,
    hasher: RandomState,
    shards: [Mutex<HashMap<TopicKey, Arc<Subscribers>>>; SHARDS],
}

/// Copy-on-write: a fan-out walks the list as it was when the fan-out began.
type Subscribers = Slab<Arc<Outbox>>;

/// What a fan-out came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FannedOut {
    /// Subscribers that the topic had, the sender aside.
    pub subscribers: usize,
    /// Outboxes that took a frame.
    pub deliveries: usize,
}

impl std::ops::AddAssign for FannedOut {
    fn add_assign(&mut self, other: Self) {
        self.subscribers += other.subscribers;
        self.deliveries += other.deliveries;
    }
}

/// A place among a topic's subscribers; dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription {
    hub: Arc<Hub>,
    key: TopicKey,
    slot: usize,
    life: Arc<()>,
}

/// One fan-out: what, where to, and to whom of those who listen there.
#[derive(Debug, Clone, Copy)]
pub struct FanOut<'a> {
    /// Where the broadcasts come from, for the metrics.
    pub source: BroadcastSource,
    /// The spelling that comes first, whether it is among the spellings or not.
    pub first: Option<&'a TopicKey>,
    /// The spellings of one topic, in the order in which they follow.
    pub spellings: &'a [TopicKey],
    /// Broadcasts that leave together.
    pub broadcasts: &'a [Broadcast],
    /// When the database committed the first of them, if that is known.
    pub committed: Option<Committed>,
    /// Whom they are for.
    pub to: To<'a>,
    /// What becomes of subscribers that are too slow for them.
    pub too_slow: TooSlow,
}

/// Whom a fan-out is for.
#[derive(Debug, Clone, Copy)]
pub enum To<'a> {
    /// Every subscriber.
    All,
    /// Every subscriber but this one.
    Others(&'a Subscription),
}

/// What becomes of a subscriber that is too slow for a broadcast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooSlow {
    /// It is told instead, by an invalidation, of all that has changed since then.
    IsCaughtUp(Since),
    /// Its channel ends: the topic is an ordinary one.
    LosesChannel,
    /// Its connection ends: the topic has a rule.
    LosesConnection,
}

impl TooSlow {
    fn kind(self, topic: TopicId) -> Kind {
        match self {
            Self::IsCaughtUp(since) => Kind::Replaceable(Replaceable { topic, since }),
            Self::LosesChannel => Kind::Ordinary(topic),
            Self::LosesConnection => Kind::Ruled(topic),
        }
    }
}

impl Hub {
    /// Creates a hub without topics.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            metrics: Metrics::new(registry),
            hasher: RandomState::new(),
            shards: array::from_fn(|_| Mutex::default()),
        }
    }

    /// Pushes broadcasts to the subscribers of all spellings of a topic, and counts what comes of it.
    ///
    /// Each subscriber gets all broadcasts at once, so that they leave in one write. One caller's
    /// broadcasts reach each subscriber in the order of the calls; two callers' may interleave
    /// differently at different subscribers, as they do in Phoenix.
    pub async fn fan_out(&self, fan_out: FanOut<'_>) -> FannedOut {
        let (started, mut result) = (Instant::now(), FannedOut::default());
        let others = fan_out.spellings.iter().filter(|spelling| Some(*spelling) != fan_out.first);
        for topic in fan_out.first.into_iter().chain(others) {
            let except = match fan_out.to {
                To::Others(from) if from.key == *topic => Some(from.slot),
                To::All | To::Others(_) => None,
            };
            result += self.push_all(topic, &fan_out, except).await;
        }
        let FannedOut { subscribers, deliveries } = result;
        let count = fan_out.broadcasts.len();
        self.metrics.count(fan_out.source, count, subscribers, deliveries, started.elapsed());
        result
    }

    /// Shows how many topics there are.
    pub(crate) fn show(&self) {
        self.metrics.show(self.topic_count());
    }

    /// Adds `outbox` to the topic's subscribers.
    #[must_use]
    pub fn subscribe(self: &Arc<Self>, key: TopicKey, outbox: Arc<Outbox>) -> Subscription {
        // The list is copied only while a fan-out still walks the previous one.
        let slot =
            Arc::make_mut(self.shard(&key).lock().entry(key.clone()).or_default()).insert(outbox);
        Subscription { hub: Arc::clone(self), key, slot, life: Arc::default() }
    }

    /// The topic in a few bytes.
    #[must_use]
    pub fn topic_id(&self, key: &TopicKey) -> TopicId {
        TopicId::of_hash(self.hasher.hash_one(key))
    }

    /// Subscribers of the topic.
    #[must_use]
    pub fn subscriber_count(&self, key: &TopicKey) -> usize {
        self.shard(key).lock().get(key).map_or(0, |subscribers| subscribers.len())
    }

    /// Topics with at least one subscriber.
    #[must_use]
    pub fn topic_count(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Pushes broadcasts to the subscribers of one spelling.
    async fn push_all(
        &self,
        key: &TopicKey,
        fan_out: &FanOut<'_>,
        except: Option<usize>,
    ) -> FannedOut {
        let Some(subscribers) = self.shard(key).lock().get(key).map(Arc::clone) else {
            return FannedOut::default();
        };
        let topic = format!("{TOPIC_PREFIX}{}", key.sub_topic);
        let FanOut { broadcasts, committed, too_slow, .. } = *fan_out;
        let frames =
            Encoded { topic: &topic, broadcasts, v1: OnceLock::new(), v2: OnceLock::new() };
        let kind = too_slow.kind(self.topic_id(key));
        let (mut result, mut pushed) = (FannedOut::default(), 0);
        for (slot, outbox) in subscribers.iter() {
            if pushed >= PUSHES_PER_YIELD {
                pushed = 0;
                tokio::task::yield_now().await;
            }
            if except == Some(slot) {
                continue;
            }
            result.subscribers += 1;
            let frames = frames.get(outbox);
            pushed += frames.len();
            // A full outbox closes its own connection; the others must not notice.
            let queued = outbox.push_all(frames.iter().cloned(), committed, kind);
            result.deliveries += queued.unwrap_or(0);
        }
        result
    }

    fn shard(&self, key: &TopicKey) -> &Mutex<HashMap<TopicKey, Arc<Subscribers>>> {
        let hash = self.hasher.hash_one(key);
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        &self.shards[hash as usize % SHARDS]
    }
}

impl Subscription {
    /// What it is subscribed to.
    pub(crate) fn sub_topic(&self) -> &Arc<str> {
        &self.key.sub_topic
    }

    /// Ends with the subscription.
    pub(crate) fn life(&self) -> Weak<()> {
        Arc::downgrade(&self.life)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut topics = self.hub.shard(&self.key).lock();
        let Some(subscribers) = topics.get_mut(&self.key) else {
            return;
        };
        Arc::make_mut(subscribers).remove(self.slot);
        if subscribers.is_empty() {
            topics.remove(&self.key);
        }
    }
}

/// The frames of broadcasts, made for a serializer when its first receiver needs them.
struct Encoded<'a> {
    topic: &'a str,
    broadcasts: &'a [Broadcast],
    v1: OnceLock<Vec<Frame>>,
    v2: OnceLock<Vec<Frame>>,
}

impl Encoded<'_> {
    fn get(&self, outbox: &Outbox) -> &[Frame] {
        let serializer = outbox.serializer();
        let frames = match serializer {
            Serializer::V1 => &self.v1,
            Serializer::V2 => &self.v2,
        };
        frames.get_or_init(|| {
            let encode = |broadcast| serializer.encode_broadcast(self.topic, broadcast);
            let frames = self.broadcasts.iter().filter_map(encode);
            frames.map(|frame| outbox.bounds().hold(frame)).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::{
        hub::outbox::Queued,
        protocol::{message::Json, topic::Privacy},
    };

    fn key(sub_topic: &str) -> TopicKey {
        TopicKey { sub_topic: sub_topic.into(), privacy: Privacy::Public }
    }

    fn outbox() -> Arc<Outbox> {
        Arc::new(Outbox::new(Serializer::V1, &OutboxBounds::new(1 << 20, usize::MAX)))
    }

    async fn publish(
        hub: &Hub,
        topic: &TopicKey,
        broadcasts: &[Broadcast],
        to: To<'_>,
    ) -> FannedOut {
        let (source, first) = (BroadcastSource::Socket, Some(topic));
        let (committed, too_slow) = (None, TooSlow::LosesChannel);
        let fan_out = FanOut { source, first, spellings: &[], broadcasts, committed, to, too_slow };
        hub.fan_out(fan_out).await
    }

    #[tokio::test]
    async fn the_sender_is_skipped_and_the_others_are_served() {
        let hub = Arc::new(Hub::new(&Registry::new()));
        let broadcast = [Broadcast::Envelope(Json::EMPTY)];
        let (a, b) = (outbox(), outbox());
        let from = hub.subscribe(key("room"), Arc::clone(&a));
        let _to = hub.subscribe(key("room"), Arc::clone(&b));
        let fanned_out = publish(&hub, &key("room"), &broadcast, To::Others(&from)).await;
        assert_eq!(fanned_out, FannedOut { subscribers: 1, deliveries: 1 });
        let other = publish(&hub, &key("other"), &broadcast, To::All).await;
        assert_eq!(other, FannedOut::default());
        let mut batch = VecDeque::new();
        b.drain(&mut batch).await.unwrap();
        let text = r#"{"ref":null,"event":"broadcast","payload":{},"topic":"realtime:room"}"#;
        let kind = Kind::Ordinary(hub.topic_id(&key("room")));
        assert_eq!(batch, [Queued { frame: Frame::text(text), kind }]);
    }

    #[tokio::test]
    async fn a_private_topic_is_not_the_public_one_of_its_name() {
        let hub = Arc::new(Hub::new(&Registry::new()));
        let _public = hub.subscribe(key("room"), outbox());
        let private = TopicKey { privacy: Privacy::Private, ..key("room") };
        let fanned_out =
            publish(&hub, &private, &[Broadcast::Envelope(Json::EMPTY)], To::All).await;
        assert_eq!(fanned_out.subscribers, 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn joins_leaves_and_broadcasts_race_and_leave_no_topic_behind() {
        let hub = Arc::new(Hub::new(&Registry::new()));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let hub = Arc::clone(&hub);
            tasks.spawn(async move {
                let broadcast = [Broadcast::Envelope(Json::EMPTY)];
                for _ in 0..2_000 {
                    let joined = hub.subscribe(key("race"), outbox());
                    let fanned_out = publish(&hub, &key("race"), &broadcast, To::All).await;
                    assert!(fanned_out.deliveries >= 1);
                    drop(joined);
                }
            });
        }
        tasks.join_all().await;
        assert_eq!(hub.topic_count(), 0);
    }
}
