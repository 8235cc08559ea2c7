//! What the room's tests share: a feed whose messages are sent as the task sends them, and viewers
//! that join it.

mod model;

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::{
    catch_up::{CatchUp, ClientHistory, Repeat},
    feed::Feed,
    outgoing::{Outgoing, ToSend},
    payload::Endpoints,
    reason::SendReason,
    window::Notified,
};
use crate::{
    access::{EID, Merge},
    hub::{Hub, OutboxBounds, Subscription, outbox::Outbox},
    protocol::{
        message::{Json, UserBroadcast, UserPayload},
        serializer::{Broadcast, Serializer},
    },
    server::settings::Config,
    telemetry::metrics::Registry,
};

pub(super) const WINDOW: Duration = Duration::from_secs(3);
pub(super) const CARRY: Duration = Duration::from_secs(5);
pub(super) const EVENT: &str = "/live/event/AB3028";
pub(super) const MEDIA: &str = "/live/event/AB3028/media";
pub(super) const ARTISTS: &str = "/live/event/AB3028/artists";

/// The built-in rule's event of AB3028.
pub(super) fn feed() -> Feed {
    feed_with(|_| {})
}

pub(super) fn feed_with(change: impl FnOnce(&mut Merge)) -> Feed {
    let rule = Arc::new(Config::defaults().topic.remove(0));
    let mut merge = rule.merge.clone().unwrap();
    assert_eq!((merge.window, merge.carry), (WINDOW, CARRY));
    change(&mut merge);
    let now = Instant::now();
    Feed::new(&rule, &merge, &[(EID.into(), "AB3028".into())].into(), (now, now))
}

pub(super) fn user(payload: &str) -> Broadcast {
    let payload = UserPayload::Json(Json::parse(payload.to_owned().into()).unwrap());
    let message = UserBroadcast { user_event: "cache_invalidation".into(), payload };
    Broadcast::User { message, metadata: None }
}

pub(super) fn endpoints(texts: &[&str]) -> Endpoints {
    texts.iter().map(|text| Box::from(*text)).collect()
}

impl Feed {
    pub(super) fn take(&self, payload: &str, pid: u32) {
        let notified = Notified { pid, committed: None };
        assert!(self.offer_all(vec![user(payload)], Some(notified)).rest.is_empty());
    }

    /// Offers a message of a database session of its own.
    pub(super) fn tell(&self, texts: &[&str]) {
        self.tell_by(fastrand::u32(1_000..), texts);
    }

    pub(super) fn tell_by(&self, pid: u32, texts: &[&str]) {
        self.take(&json!({ "type": "t", "endpoints": texts, "timestamp": 1.5 }).to_string(), pid);
    }

    /// Sends the next message as the sender does, and returns it if anything waits.
    pub(super) async fn next_sent(&self) -> Option<Out> {
        loop {
            match self.due(false) {
                ToSend::Nothing => return None,
                ToSend::Later => sleep_until(self.next().unwrap()).await,
                ToSend::Send(outgoing) => return Some(Out::new(self, outgoing)),
            }
        }
    }

    pub(super) async fn sends(&self) -> Out {
        self.next_sent().await.expect("something waits")
    }

    pub(super) fn join(
        &self,
        known: ClientHistory,
        since: Option<Instant>,
    ) -> (Viewer, Option<CatchUp>) {
        let viewer = Viewer::new(self);
        let catch_up = viewer.join(self, known, since);
        (viewer, catch_up)
    }
}

/// A client that has subscribed to the first spelling.
pub(super) struct Viewer {
    pub(super) outbox: Arc<Outbox>,
    pub(super) subscription: Subscription,
}

impl Viewer {
    pub(super) fn new(feed: &Feed) -> Self {
        let outbox = Arc::new(Outbox::new(Serializer::V2, &OutboxBounds::new(1 << 20, usize::MAX)));
        let hub = Arc::new(Hub::new(&Registry::new()));
        let subscription = hub.subscribe(feed.topics()[0].clone(), Arc::clone(&outbox));
        Self { outbox, subscription }
    }

    pub(super) fn join(
        &self,
        feed: &Feed,
        known: ClientHistory,
        since: Option<Instant>,
    ) -> Option<CatchUp> {
        feed.catch_up(known, since, &self.outbox, &self.subscription)
    }
}

#[derive(Debug)]
pub(super) struct Out {
    pub(super) at: Instant,
    pub(super) outgoing: Box<Outgoing>,
    pub(super) repeats: Vec<Repeat>,
}

impl Out {
    pub(super) fn new(feed: &Feed, outgoing: Box<Outgoing>) -> Self {
        let repeats = feed.repeats(&outgoing);
        Self { at: Instant::now(), outgoing, repeats }
    }

    pub(super) fn payload(&self) -> Value {
        payload(&self.outgoing.broadcast)
    }

    pub(super) fn endpoints(&self) -> Vec<String> {
        listed(&self.outgoing.broadcast)
    }

    pub(super) fn reason(&self) -> SendReason {
        self.outgoing.delivery.reason
    }
}

pub(super) fn payload(broadcast: &Broadcast) -> Value {
    let Broadcast::User { message, .. } = broadcast else { panic!("{broadcast:?}") };
    let UserPayload::Json(json) = &message.payload else { panic!("{broadcast:?}") };
    serde_json::from_str(json.as_str()).unwrap()
}

pub(super) fn listed(broadcast: &Broadcast) -> Vec<String> {
    serde_json::from_value(payload(broadcast)["endpoints"].clone()).unwrap()
}

/// Returns the timestamp as it is written: clients compare texts, and a float has fewer digits.
pub(super) fn stamp(broadcast: &Broadcast) -> String {
    let Broadcast::User { message, .. } = broadcast else { panic!("{broadcast:?}") };
    let UserPayload::Json(json) = &message.payload else { panic!("{broadcast:?}") };
    let (_, from) = json.as_str().split_once("\"timestamp\":").unwrap();
    from.split([',', '}']).next().unwrap().to_owned()
}

pub(super) fn repeated(out: &Out) -> Vec<(Arc<Outbox>, Vec<String>)> {
    let repeats = out.repeats.iter();
    repeats.map(|repeat| (Arc::clone(&repeat.outbox), listed(&repeat.broadcast))).collect()
}
