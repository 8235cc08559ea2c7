//! Who is joined to which topic, and the fan-out of a broadcast to them.
//!
//! Invariants: a topic with no subscriber is not in the map; no lock is held while frames are
//! pushed; no two locks are held at once; a broadcast is encoded at most once per serializer. What
//! is absent on purpose: a fan-out that has begun may still reach who has unsubscribed meanwhile.

pub mod outbox;

use std::{
    array,
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    slice,
    sync::{Arc, OnceLock, Weak},
};

use parking_lot::Mutex;
use slab::Slab;
use tokio_tungstenite::tungstenite::Message as Frame;

use self::outbox::{Committed, Outbox, Replaceable, Since, TopicId};
use crate::protocol::{
    serializer::{Broadcast, Serializer},
    topic::{TOPIC_PREFIX, TopicKey},
};

/// Topics are spread over this many locks.
const SHARDS: usize = 64;
/// Pushes between two yields: about 0.4 ms of work, so that a huge topic does not hold a worker.
const PUSHES_PER_YIELD: usize = 1024;

/// All topics of this process.
#[derive(Debug)]
pub struct Hub {
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

/// Whom a fan-out is for, and how.
#[derive(Debug, Clone, Copy)]
enum Push {
    ToAll,
    ToAllBut(usize),
    /// To all, as far as they can keep up.
    Replaceably(Replaceable),
}

/// A place among a topic's subscribers; dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription {
    hub: Arc<Hub>,
    key: TopicKey,
    slot: usize,
    life: Arc<()>,
}

impl Default for Hub {
    fn default() -> Self {
        Self { hasher: RandomState::new(), shards: array::from_fn(|_| Mutex::default()) }
    }
}

impl Hub {
    /// Adds `outbox` to the topic's subscribers.
    #[must_use]
    pub fn subscribe(self: &Arc<Self>, key: TopicKey, outbox: Arc<Outbox>) -> Subscription {
        // The list is copied only while a fan-out still walks the previous one.
        let slot =
            Arc::make_mut(self.shard(&key).lock().entry(key.clone()).or_default()).insert(outbox);
        Subscription { hub: Arc::clone(self), key, slot, life: Arc::default() }
    }

    /// Pushes `broadcasts` to every subscriber of the topic: to each all of them at once, so that
    /// they leave in one write, with when the first of them was committed if that is known.
    pub async fn publish(
        &self,
        key: &TopicKey,
        broadcasts: &[Broadcast],
        committed: Option<Committed>,
    ) -> FannedOut {
        self.fan_out(key, broadcasts, committed, Push::ToAll).await
    }

    /// Pushes a message that an invalidation of all that has changed since then can take the place
    /// of: who is too slow for it is told that instead.
    pub async fn publish_replaceable(
        &self,
        key: &TopicKey,
        broadcast: &Broadcast,
        committed: Option<Committed>,
        since: Since,
    ) -> FannedOut {
        let replaceable = Replaceable { topic: self.topic_id(key), since };
        self.fan_out(key, slice::from_ref(broadcast), committed, Push::Replaceably(replaceable))
            .await
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

    /// One caller's broadcasts reach each subscriber in the order of the calls; two callers'
    /// may interleave differently at different subscribers, as they do in Phoenix.
    async fn fan_out(
        &self,
        key: &TopicKey,
        broadcasts: &[Broadcast],
        committed: Option<Committed>,
        push: Push,
    ) -> FannedOut {
        let Some(subscribers) = self.shard(key).lock().get(key).map(Arc::clone) else {
            return FannedOut::default();
        };
        let topic = format!("{TOPIC_PREFIX}{}", key.sub_topic);
        let frames = Frames { topic: &topic, broadcasts, v1: OnceLock::new(), v2: OnceLock::new() };
        let (except, replaceable) = match push {
            Push::ToAll => (None, None),
            Push::ToAllBut(slot) => (Some(slot), None),
            Push::Replaceably(replaceable) => (None, Some(replaceable)),
        };
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
            let frames = frames.get(outbox.serializer());
            pushed += frames.len();
            // A full outbox closes its own connection; the others must not notice.
            let queued = outbox.push_all(frames.iter().cloned(), committed, replaceable);
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
    /// Pushes `broadcasts` to the topic's other subscribers.
    pub async fn publish_to_others(&self, broadcasts: &[Broadcast]) -> FannedOut {
        self.hub.fan_out(&self.key, broadcasts, None, Push::ToAllBut(self.slot)).await
    }

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
struct Frames<'a> {
    topic: &'a str,
    broadcasts: &'a [Broadcast],
    v1: OnceLock<Vec<Frame>>,
    v2: OnceLock<Vec<Frame>>,
}

impl Frames<'_> {
    fn get(&self, serializer: Serializer) -> &[Frame] {
        let frames = match serializer {
            Serializer::V1 => &self.v1,
            Serializer::V2 => &self.v2,
        };
        frames.get_or_init(|| {
            let encode = |it| serializer.encode_broadcast(self.topic, it);
            self.broadcasts.iter().filter_map(encode).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hub::outbox::{Backlogs, Queued},
        protocol::{message::Json, topic::Privacy},
    };

    fn key(sub_topic: &str) -> TopicKey {
        TopicKey { sub_topic: sub_topic.into(), privacy: Privacy::Public }
    }

    fn outbox() -> Arc<Outbox> {
        Arc::new(Outbox::new(Serializer::V1, &Backlogs::of_at_most(1 << 20)))
    }

    #[tokio::test]
    async fn the_sender_is_skipped_and_the_others_are_served() {
        let hub = Arc::new(Hub::default());
        let broadcast = [Broadcast::Envelope(Json::EMPTY)];
        let (a, b) = (outbox(), outbox());
        let from = hub.subscribe(key("room"), Arc::clone(&a));
        let _to = hub.subscribe(key("room"), Arc::clone(&b));
        let fanned_out = from.publish_to_others(&broadcast).await;
        assert_eq!(fanned_out, FannedOut { subscribers: 1, deliveries: 1 });
        assert_eq!(hub.publish(&key("other"), &broadcast, None).await, FannedOut::default());
        let mut batch = Vec::new();
        b.drain(&mut batch).await.unwrap();
        let text = r#"{"ref":null,"event":"broadcast","payload":{},"topic":"realtime:room"}"#;
        assert_eq!(batch, [Queued { frame: Frame::text(text), replaceable: None }]);
    }

    #[tokio::test]
    async fn a_private_topic_is_not_the_public_one_of_its_name() {
        let hub = Arc::new(Hub::default());
        let _public = hub.subscribe(key("room"), outbox());
        let private = TopicKey { privacy: Privacy::Private, ..key("room") };
        let fanned_out = hub.publish(&private, &[Broadcast::Envelope(Json::EMPTY)], None).await;
        assert_eq!(fanned_out.subscribers, 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn joins_leaves_and_broadcasts_race_and_leave_no_topic_behind() {
        let hub = Arc::new(Hub::default());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let hub = Arc::clone(&hub);
            tasks.spawn(async move {
                let broadcast = [Broadcast::Envelope(Json::EMPTY)];
                for _ in 0..2_000 {
                    let joined = hub.subscribe(key("race"), outbox());
                    assert!(hub.publish(&key("race"), &broadcast, None).await.deliveries >= 1);
                    drop(joined);
                }
            });
        }
        tasks.join_all().await;
        assert_eq!(hub.topic_count(), 0);
    }
}
