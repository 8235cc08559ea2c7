//! What a feed sends, when, and what it tells those who join.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::{Instant, advance, sleep_until};

use super::*;
use crate::{
    hub::{
        Hub,
        outbox::{Committed, Departure, OutboxBounds},
    },
    invalidation::{
        LinkLoss, SendReason,
        catch_up::FRESH,
        journal::{LOG_MAX, SOURCES_MAX, Source},
        known::ENDPOINTS_MAX,
        payload::Stamp,
        window::{SETTLE, SETTLE_MAX, UNION_MAX},
    },
    protocol::{
        message::{Json, UserBroadcast, UserPayload},
        serializer::Serializer,
    },
    server::settings::Config,
    telemetry::metrics::Registry,
};

const WINDOW: Duration = Duration::from_secs(3);
const CARRY: Duration = Duration::from_secs(5);
const EVENT: &str = "/live/event/AB3028";
const MEDIA: &str = "/live/event/AB3028/media";
const ARTISTS: &str = "/live/event/AB3028/artists";

/// The built-in rule's event of AB3028.
fn feed() -> Feed {
    feed_with(|_| {})
}

fn feed_with(change: impl FnOnce(&mut Merge)) -> Feed {
    let rule = Arc::new(Config::defaults().topic.remove(0));
    let mut merge = rule.merge.clone().unwrap();
    assert_eq!((merge.window, merge.carry), (WINDOW, CARRY));
    change(&mut merge);
    Feed::new(&rule, &merge, &[(EID.into(), "AB3028".into())].into(), Instant::now())
}

fn user(payload: &str) -> Broadcast {
    let payload = UserPayload::Json(Json::parse(payload.to_owned().into()).unwrap());
    let message = UserBroadcast { user_event: "cache_invalidation".into(), payload };
    Broadcast::User { message, metadata: None }
}

fn endpoints(texts: &[&str]) -> Endpoints {
    texts.iter().map(|it| Box::from(*it)).collect()
}

impl Feed {
    fn take(&self, payload: &str, pid: u32) {
        let notified = Notified { pid, committed: None };
        let _ = self.offer(self.read(user(payload)).unwrap(), Some(notified));
    }

    /// Offers a message of a database session of its own.
    fn tell(&self, texts: &[&str]) {
        self.tell_by(fastrand::u32(1_000..), texts);
    }

    fn tell_by(&self, pid: u32, texts: &[&str]) {
        self.take(&json!({ "type": "t", "endpoints": texts, "timestamp": 1.5 }).to_string(), pid);
    }

    /// Sends as the one task does that sends; none if nothing waits.
    async fn next_sent(&self) -> Option<Out> {
        loop {
            match self.due(false) {
                Due::Nothing => return None,
                Due::Later => sleep_until(self.next().unwrap()).await,
                Due::Send(outgoing) => return Some(Out::new(self, outgoing)),
            }
        }
    }

    async fn sends(&self) -> Out {
        self.next_sent().await.expect("something waits")
    }

    fn join(&self, known: ClientHistory, since: Option<Instant>) -> (Viewer, Option<CatchUp>) {
        let viewer = Viewer::new(self);
        let catch_up = viewer.join(self, known, since);
        (viewer, catch_up)
    }
}

/// A client that has subscribed to the first spelling.
struct Viewer {
    outbox: Arc<Outbox>,
    subscription: Subscription,
}

impl Viewer {
    fn new(feed: &Feed) -> Self {
        let outbox = Arc::new(Outbox::new(Serializer::V2, &OutboxBounds::new(1 << 20)));
        let hub = Arc::new(Hub::new(&Registry::new()));
        let subscription = hub.subscribe(feed.topics()[0].clone(), Arc::clone(&outbox));
        Self { outbox, subscription }
    }

    fn join(&self, feed: &Feed, known: ClientHistory, since: Option<Instant>) -> Option<CatchUp> {
        feed.catch_up(known, since, &self.outbox, &self.subscription)
    }
}

#[derive(Debug)]
struct Out {
    at: Instant,
    outgoing: Box<Outgoing>,
    repeats: Vec<Repeat>,
}

impl Out {
    fn new(feed: &Feed, outgoing: Box<Outgoing>) -> Self {
        let repeats = feed.repeats(&outgoing);
        Self { at: Instant::now(), outgoing, repeats }
    }

    fn payload(&self) -> Value {
        payload(&self.outgoing.broadcast)
    }

    fn endpoints(&self) -> Vec<String> {
        listed(&self.outgoing.broadcast)
    }

    fn reason(&self) -> SendReason {
        self.outgoing.delivery.reason
    }
}

fn payload(broadcast: &Broadcast) -> Value {
    let Broadcast::User { message, .. } = broadcast else { panic!("{broadcast:?}") };
    let UserPayload::Json(json) = &message.payload else { panic!("{broadcast:?}") };
    serde_json::from_str(json.as_str()).unwrap()
}

fn listed(broadcast: &Broadcast) -> Vec<String> {
    serde_json::from_value(payload(broadcast)["endpoints"].clone()).unwrap()
}

/// As it is written: a client compares texts, and no float tells so many digits apart.
fn stamp(broadcast: &Broadcast) -> String {
    let Broadcast::User { message, .. } = broadcast else { panic!("{broadcast:?}") };
    let UserPayload::Json(json) = &message.payload else { panic!("{broadcast:?}") };
    let (_, from) = json.as_str().split_once("\"timestamp\":").unwrap();
    from.split([',', '}']).next().unwrap().to_owned()
}

#[tokio::test(start_paused = true)]
async fn the_first_message_leaves_once_its_transaction_can_say_no_more() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell(&["/a"]);
    let out = feed.sends().await;
    assert_eq!((out.at - start, out.reason()), (SETTLE, SendReason::Leading));
    assert!(feed.next_sent().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn what_comes_within_the_window_leaves_at_its_end_in_one_message() {
    let feed = feed();
    feed.tell(&["/a"]);
    let first = feed.sends().await;
    advance(CARRY).await;
    feed.tell(&["/b", "/c"]);
    let second = feed.sends().await;
    assert_eq!(second.reason(), SendReason::Leading, "the window is long over");
    for texts in [["/d", "/c"], ["/c", "/e"], ["/f", "/a"]] {
        advance(Duration::from_millis(900)).await;
        feed.tell(&texts);
    }
    let third = feed.sends().await;
    assert_eq!((third.at - second.at, third.reason()), (WINDOW, SendReason::Window));
    // In the order in which they were first seen; then what is carried.
    assert_eq!(third.endpoints(), ["/d", "/c", "/e", "/f", "/a", "/b"]);
    assert_eq!(third.payload()["merged"], 3);
    assert!(first.at < second.at);
    assert!(feed.next_sent().await.is_none());
}

/// One who writes without a pause would else hold the first message back for good.
#[tokio::test(start_paused = true)]
async fn a_transaction_is_waited_for_as_long_as_it_goes_on_and_fifty_milliseconds_at_most() {
    let (feed, start) = (feed(), Instant::now());
    for _ in 0..4 {
        feed.tell_by(1, &["/a"]);
        assert!(matches!(feed.due(false), Due::Later));
        advance(SETTLE - Duration::from_millis(1)).await;
    }
    assert_eq!(feed.sends().await.at - start, Duration::from_millis(37));
    advance(CARRY * 2).await;
    let start = Instant::now();
    let mut sent = None;
    while sent.is_none() {
        feed.tell_by(1, &["/a"]);
        advance(SETTLE - Duration::from_millis(1)).await;
        if let Due::Send(_) = feed.due(false) {
            sent = Some(start.elapsed());
        }
    }
    // The first look after 50 ms.
    assert_eq!(sent, Some(Duration::from_millis(54)));
}

#[tokio::test(start_paused = true)]
async fn another_sessions_message_joins_those_that_wait_and_prolongs_nothing() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell_by(1, &["/a"]);
    advance(SETTLE - Duration::from_millis(1)).await;
    feed.tell_by(2, &["/b"]);
    let out = feed.sends().await;
    assert_eq!(out.at - start, SETTLE);
    assert_eq!(out.endpoints(), ["/a", "/b"]);
}

/// The end of an auction changes 24 artworks in one transaction, in which all messages have the
/// same timestamp: clients take the first of those.
#[tokio::test(start_paused = true)]
async fn what_one_transaction_says_is_one_message_whatever_the_window() {
    let feed = feed();
    for expected in [SendReason::Leading, SendReason::Window] {
        for art in 0..24 {
            feed.tell_by(7, &[EVENT, &format!("/art/{art}")]);
        }
        let out = feed.sends().await;
        assert_eq!((out.reason(), out.endpoints().len()), (expected, 25));
        assert_eq!(out.payload()["merged"], 24);
        assert!(feed.next_sent().await.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_alone_and_clean_passes_byte_for_byte() {
    let feed = feed();
    let envelope =
        r#"{ "event":"cache_invalidation","payload":{"endpoints":["/c"]},"type":"broadcast" }"#;
    for broadcast in [
        user(r#"{ "timestamp":1.50, "endpoints":["/a", "/a"] }"#),
        // Nothing is carried that it does not say itself.
        user(r#"{"endpoints":["/b","/c","/a"],"x":1e2}"#),
        user(r#"{"endpoints":["/c","/a","/b"]}"#),
    ] {
        let _ = feed.offer(feed.read(broadcast.clone()).unwrap(), None);
        assert_eq!(feed.sends().await.outgoing.broadcast, broadcast);
    }
    for broadcast in
        [user(r#"{"no_list":true}"#), Broadcast::Envelope(Json::parse(envelope.into()).unwrap())]
    {
        advance(CARRY * 2).await;
        let _ = feed.offer(feed.read(broadcast.clone()).unwrap(), None);
        assert_eq!(feed.sends().await.outgoing.broadcast, broadcast);
    }
}

/// A `null` in the list throws in clients.
#[tokio::test(start_paused = true)]
async fn a_list_with_something_else_than_texts_is_written_anew() {
    let feed = feed();
    feed.take(r#"{"type":"t","endpoints":["/a",null,7,"/b"],"timestamp":1.5}"#, 1);
    let out = feed.sends().await;
    let payload = out.payload();
    assert_eq!((out.endpoints(), &payload["merged"]), (vec!["/a".into(), "/b".into()], &json!(1)));
    assert_ne!(payload["timestamp"], 1.5);
}

/// Clients forget a message that is followed too soon by another.
#[tokio::test(start_paused = true)]
async fn what_was_just_sent_is_said_again_and_that_is_not_said_again() {
    let feed = feed();
    feed.tell(&["/a"]);
    feed.sends().await;
    feed.tell(&["/b"]);
    let second = feed.sends().await;
    assert_eq!(
        (second.endpoints(), &second.payload()["merged"]),
        (vec!["/b".into(), "/a".into()], &json!(1))
    );
    feed.tell(&["/c"]);
    assert_eq!(feed.sends().await.endpoints(), ["/c", "/b"]);
    feed.tell(&["/d"]);
    assert_eq!(feed.sends().await.endpoints(), ["/d", "/c"]);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_is_carried_for_so_long_and_no_longer() {
    for (late, is_carried) in [(0, true), (1, false)] {
        let feed = feed();
        feed.tell(&["/a"]);
        feed.sends().await;
        advance(CARRY - SETTLE + Duration::from_millis(late)).await;
        feed.tell(&["/b"]);
        let out = feed.sends().await;
        assert_eq!(out.endpoints().contains(&"/a".to_owned()), is_carried);
    }
}

#[tokio::test(start_paused = true)]
async fn a_union_of_two_hundred_is_listed_and_one_more_stands_for_everything() {
    let texts: Vec<_> = (0..=UNION_MAX).map(|number| format!("/{number:03}")).collect();
    for count in [UNION_MAX, UNION_MAX + 1] {
        let feed = feed();
        for text in &texts[..count] {
            feed.tell_by(1, &[text]);
        }
        let out = feed.sends().await;
        let resync = [EVENT, MEDIA, ARTISTS];
        let listed = out.endpoints();
        if count > UNION_MAX {
            let all = resync.into_iter().chain(texts.iter().map(String::as_str));
            assert_eq!(listed, all.collect::<Vec<_>>());
        } else {
            assert_eq!(listed, texts[..count]);
        }
        assert_eq!(out.payload()["merged"], json!(count));
    }
}

#[tokio::test(start_paused = true)]
async fn a_pointer_stands_for_everything_of_the_event() {
    let feed = feed();
    feed.learn(&endpoints(&["/known"]));
    feed.tell(&["/seen"]);
    feed.take(r#"{"type":"t","pointer":true,"id":7}"#, 1);
    feed.tell(&["/late"]);
    let out = feed.sends().await;
    assert_eq!(out.endpoints(), [EVENT, MEDIA, ARTISTS, "/known", "/late", "/seen"]);
    // Alone it is no list that clients could use, and never passes as it came.
    advance(CARRY * 2).await;
    feed.take(r#"{"type":"t","pointer":true,"endpoints":[],"id":8}"#, 1);
    let out = feed.sends().await;
    assert_eq!((out.endpoints().len(), &out.payload()["id"]), (6, &json!(8)));
}

/// Clients drop what has the timestamp of another message.
#[tokio::test(start_paused = true)]
async fn every_message_of_ours_has_a_timestamp_of_its_own() {
    let feed = feed_with(|merge| merge.window = Duration::ZERO);
    // The clock has been set back an hour; and it may stand still between two messages.
    let hour = Stamp(3_600_000_000 + feed.state.lock().stamps.next().0);
    feed.state.lock().stamps.last = hour;
    let mut stamps = vec![hour.to_string()];
    let mut viewers = Vec::new();
    for number in 0..50 {
        let (viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
        stamps.push(stamp(&catch_up.unwrap().broadcast));
        viewers.push(viewer);
        feed.tell_by(1, &[&format!("/{number}")]);
        feed.tell_by(1, &[&format!("/{number}/b")]);
        let out = feed.sends().await;
        stamps.push(stamp(&out.outgoing.broadcast));
        // Those who get this one get no other.
        stamps.push(stamp(&out.repeats.last().unwrap().broadcast));
    }
    let different: BTreeSet<_> = stamps.iter().collect();
    assert_eq!(different.len(), stamps.len());
    assert!(stamps.is_sorted(), "each is later than those before");
}

#[tokio::test(start_paused = true)]
async fn without_a_window_only_what_was_sent_together_is_merged() {
    let feed = feed_with(|merge| merge.window = Duration::ZERO);
    for number in 0..9 {
        let start = Instant::now();
        feed.tell_by(1, &["/a"]);
        feed.tell_by(1, &["/b"]);
        let out = feed.sends().await;
        assert_eq!((out.at - start, out.reason()), (SETTLE, SendReason::Leading), "{number}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_muted_event_is_told_leaves_in_one_message_afterwards() {
    let (feed, start) = (feed(), Instant::now());
    let over = start + Duration::from_secs(600);
    feed.mute(Some(over));
    for second in 0..300 {
        feed.tell(&[&format!("/{}", second % 7)]);
        assert!(matches!(feed.due(false), Due::Later));
        advance(Duration::from_secs(1)).await;
    }
    assert_eq!(feed.summary().muted_for, Some(Duration::from_secs(300)));
    assert_eq!(feed.summary().pending, 300);
    // Who joins meanwhile is told all the same.
    let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast).len(), 7);
    let out = feed.sends().await;
    assert_eq!((out.at, out.endpoints().len()), (over, 7));
    feed.tell(&["/a"]);
    assert_eq!(feed.sends().await.at - over, WINDOW, "the window holds on");
    assert_eq!(feed.summary().muted_for, None);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_muted_no_more_says_at_once_what_waited() {
    let feed = feed();
    feed.mute(Some(Instant::now() + Duration::from_secs(600)));
    feed.tell(&["/a"]);
    advance(Duration::from_secs(60)).await;
    let start = Instant::now();
    assert!(matches!(feed.due(false), Due::Later));
    feed.mute(None);
    let out = feed.sends().await;
    assert_eq!((out.at, out.endpoints()), (start, vec!["/a".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn at_the_servers_end_nothing_waits() {
    for is_muted in [false, true] {
        let feed = feed();
        feed.tell(&["/a"]);
        feed.sends().await;
        feed.tell(&["/b"]);
        if is_muted {
            feed.mute(Some(Instant::now() + Duration::from_secs(600)));
        }
        assert!(matches!(feed.due(false), Due::Later));
        let Due::Send(outgoing) = feed.due(true) else { panic!() };
        assert_eq!(listed(&outgoing.broadcast), ["/b", "/a"]);
        assert!(matches!(feed.due(true), Due::Nothing));
    }
}

#[tokio::test(start_paused = true)]
async fn a_gap_that_is_known_is_told_as_it_is_and_any_other_as_everything() {
    let feed = feed();
    feed.learn(&endpoints(&["/known"]));
    let cause = CatchUpCause::Link(LinkLoss::Silent);
    let start = Instant::now();
    feed.offer_gap(cause, Some(&endpoints(&["/b", "/a"])), start);
    let out = feed.sends().await;
    assert_eq!((out.at - start, out.reason()), (SETTLE, SendReason::Gap));
    let said = out.payload();
    let timestamp = &said["timestamp"];
    let expected = json!({
        "type": "catch_up", "event_eid": "AB3028", "cause": "silent",
        "endpoints": ["/b", "/a"], "timestamp": timestamp,
    });
    assert!(timestamp.is_f64());
    assert_eq!(said, expected);
    assert_eq!((out.outgoing.delivery.cause, out.outgoing.delivery.merged), (Some(cause), 0));

    advance(CARRY * 2).await;
    let earliest = Instant::now() + Duration::from_secs(4);
    feed.offer_gap(CatchUpCause::Start, None, earliest);
    let out = feed.sends().await;
    assert_eq!(out.at, earliest);
    assert_eq!(out.payload()["cause"], "start");
    assert_eq!(out.endpoints(), [EVENT, MEDIA, ARTISTS, "/a", "/b", "/known"]);
}

#[tokio::test(start_paused = true)]
async fn a_gap_and_what_is_told_meanwhile_leave_together_when_the_window_allows() {
    let feed = feed();
    feed.tell(&["/a"]);
    let first = feed.sends().await;
    feed.tell(&["/b"]);
    feed.offer_gap(CatchUpCause::QueueFull, Some(&endpoints(&["/c"])), Instant::now());
    feed.tell(&["/d"]);
    let out = feed.sends().await;
    assert_eq!((out.at - first.at, out.reason()), (WINDOW, SendReason::Gap));
    assert_eq!(out.endpoints(), ["/b", "/c", "/d", "/a"]);
    let said = out.payload();
    // It stands for the newest message.
    assert_eq!((&said["type"], &said["merged"]), (&json!("t"), &json!(2)));
    assert!(feed.next_sent().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_gap_of_which_nothing_is_known_swallows_what_is() {
    let feed = feed();
    feed.tell(&["/a"]);
    feed.offer_gap(CatchUpCause::Start, None, Instant::now());
    feed.offer_gap(CatchUpCause::Start, Some(&endpoints(&["/b"])), Instant::now());
    feed.tell(&["/c"]);
    assert_eq!(feed.sends().await.endpoints(), [EVENT, MEDIA, ARTISTS, "/a", "/b", "/c"]);
}

/// What is known of an event whose changes are a minute, ten seconds and no time ago.
async fn told() -> (Feed, Instant) {
    let (feed, start) = (feed(), Instant::now());
    feed.learn(&endpoints(&["/old", "/never"]));
    for (text, then) in [("/old", 50), ("/young", 10), ("/now", 0)] {
        feed.tell(&[text]);
        feed.sends().await;
        advance(Duration::from_secs(then) - SETTLE.min(Duration::from_secs(then))).await;
    }
    (feed, start)
}

#[tokio::test(start_paused = true)]
async fn who_joins_is_told_what_has_changed_since_it_last_heard_of_the_event() {
    let everything = [EVENT, MEDIA, ARTISTS, "/never", "/now", "/old", "/young"];
    let seconds = |number| Duration::from_secs(number);
    for (known, since, method, expected) in [
        (ClientHistory::Fresh, 60, Coverage::Exact, &["/young", "/now"][..]),
        (ClientHistory::Held, 60, Coverage::Exact, &["/young", "/now"]),
        (ClientHistory::Nothing, 60, Coverage::Complete, &everything),
        // Coverage: to the moment itself, and one millisecond too short.
        (ClientHistory::Fresh, 30, Coverage::Exact, &["/young", "/now"]),
        (ClientHistory::Fresh, 29, Coverage::Complete, &everything),
        (ClientHistory::Held, 29, Coverage::Complete, &everything),
    ] {
        let (feed, start) = told().await;
        let now = Instant::now();
        assert!(now - start >= seconds(60));
        let (_viewer, catch_up) = feed.join(known, Some(now - seconds(since)));
        let CatchUp { broadcast, cause, coverage: by, .. } = catch_up.unwrap();
        assert_eq!(
            (by, listed(&broadcast)),
            (method, expected.iter().map(|it| (*it).to_owned()).collect())
        );
        let said = payload(&broadcast);
        assert_eq!((&said["type"], &said["event_eid"]), (&json!("catch_up"), &json!("AB3028")));
        assert_eq!(said["cause"], cause.label());
    }
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_is_told_what_has_changed_since_then_that_moment_included() {
    let (feed, start) = told().await;
    let join = |since, covered| feed.join(ClientHistory::Since(since), covered).1;
    // `/old` changed at the very start.
    let CatchUp { broadcast, cause, coverage, .. } = join(start, Some(start)).unwrap();
    assert_eq!(listed(&broadcast), ["/old", "/young", "/now"]);
    assert_eq!((cause, coverage), (CatchUpCause::Returned, Coverage::Exact));
    let later = start + Duration::from_nanos(1);
    assert_eq!(listed(&join(later, Some(start)).unwrap().broadcast), ["/young", "/now"]);
    // What was before the coverage is not known, nor what happens without any.
    for covered in [Some(later), None] {
        assert_eq!(join(start, covered).unwrap().coverage, Coverage::Complete);
    }
}

#[tokio::test(start_paused = true)]
async fn who_has_missed_nothing_is_told_nothing() {
    let (feed, start) = told().await;
    advance(FRESH + Duration::from_millis(1)).await;
    for known in
        [ClientHistory::Fresh, ClientHistory::Held, ClientHistory::Since(Instant::now() - FRESH)]
    {
        assert!(feed.join(known, Some(start)).1.is_none(), "{known:?}");
    }
    assert!(feed.join(ClientHistory::Nothing, Some(start)).1.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_change_that_waits_for_its_window_is_told_to_who_joins_meanwhile() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell(&["/a"]);
    feed.sends().await;
    advance(FRESH).await;
    feed.tell(&["/b"]);
    let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/b"]);
    assert_eq!(feed.sends().await.endpoints(), ["/b"]);
}

/// A page that was just loaded, too: its fetch may have been answered by a cache.
#[tokio::test(start_paused = true)]
async fn what_stands_for_everything_has_changed_everything_for_who_joins_afterwards() {
    for is_gap in [true, false] {
        let (feed, start) = (feed(), Instant::now());
        feed.learn(&endpoints(&["/known"]));
        advance(FRESH).await;
        if is_gap {
            feed.offer_gap(CatchUpCause::Operator, None, Instant::now());
        } else {
            feed.take(r#"{"type":"t","pointer":true,"id":7}"#, 1);
        }
        feed.sends().await;
        advance(CARRY * 2).await;
        let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
        let told: BTreeSet<_> = listed(&catch_up.unwrap().broadcast).into_iter().collect();
        let all = [EVENT, MEDIA, ARTISTS, "/known"].map(str::to_owned);
        assert_eq!(told, all.into(), "is_gap: {is_gap}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_that_knows_no_more_endpoints_says_so_to_who_comes_back() {
    let (feed, start) = (feed(), Instant::now());
    let texts: Vec<_> = (0..ENDPOINTS_MAX).map(|number| format!("/{number}")).collect();
    for texts in texts.chunks(100) {
        feed.tell_by(1, &texts.iter().map(String::as_str).collect::<Vec<_>>());
    }
    feed.sends().await;
    advance(FRESH * 2).await;
    feed.tell(&["/one more"]);
    assert!(feed.sends().await.endpoints().contains(&"/one more".to_owned()), "it is sent");
    assert_eq!(feed.summary().endpoints, ENDPOINTS_MAX);
    let forgotten = Instant::now();
    let join = |since| feed.join(ClientHistory::Since(since), Some(start)).1.unwrap().coverage;
    advance(Duration::from_secs(1)).await;
    feed.tell(&["/1"]);
    assert_eq!(join(start), Coverage::Complete);
    assert_eq!(join(forgotten), Coverage::Exact);
}

#[tokio::test(start_paused = true)]
async fn a_message_has_the_moment_of_the_oldest_that_it_stands_for() {
    let feed = feed();
    let start = Instant::now();
    let tell = |committed| {
        let payload = json!({ "endpoints": ["/a"] }).to_string();
        let notified = Notified { pid: 1, committed };
        let _ = feed.offer(feed.read(user(&payload)).unwrap(), Some(notified));
    };
    let ago = |millis| Some(start - Duration::from_millis(millis));
    for committed in [None, ago(20), ago(30), None, ago(10)] {
        tell(committed);
    }
    let out = feed.sends().await.outgoing;
    let moment = |at: Option<Instant>, departure| at.map(|at| Committed { at, departure });
    assert_eq!(out.committed, moment(ago(30), Departure::AtOnce));
    assert_eq!(out.waited, None);
    // The window's end, with what has come meanwhile.
    advance(Duration::from_secs(1)).await;
    tell(ago(5));
    advance(Duration::from_millis(500)).await;
    tell(Some(start));
    let out = feed.sends().await.outgoing;
    assert_eq!(out.committed, moment(ago(5), Departure::Merged));
    assert_eq!(out.waited, Some(WINDOW - Duration::from_secs(1)));
    // Nobody knows when what a gap has hidden was committed.
    feed.offer_gap(CatchUpCause::Start, None, Instant::now());
    assert_eq!(feed.sends().await.outgoing.committed, None);
    feed.offer_gap(CatchUpCause::Start, None, Instant::now() + WINDOW);
    tell(Some(start));
    let out = feed.sends().await.outgoing;
    assert_eq!(out.committed, moment(Some(start), Departure::Merged));
}

fn repeated(out: &Out) -> Vec<(Arc<Outbox>, Vec<String>)> {
    let repeats = out.repeats.iter();
    repeats.map(|it| (Arc::clone(&it.outbox), listed(&it.broadcast))).collect()
}

#[tokio::test(start_paused = true)]
async fn who_was_just_caught_up_is_told_so_once_more_after_the_next_message() {
    let feed = feed();
    feed.learn(&endpoints(&["/known"]));
    let (viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
    assert_eq!(catch_up.unwrap().coverage, Coverage::Complete);
    let (other, _) = feed.join(ClientHistory::Nothing, None);
    // One has gone, and one has left.
    let (gone, _) = feed.join(ClientHistory::Nothing, None);
    drop(gone);
    let (Viewer { outbox: _left, subscription }, _) = feed.join(ClientHistory::Nothing, None);
    drop(subscription);
    advance(Duration::from_secs(1)).await;
    feed.tell(&["/a", "/known"]);
    let out = feed.sends().await;
    // The others get theirs as it came.
    assert_eq!(payload(&out.outgoing.broadcast)["timestamp"], 1.5);
    let repeats = repeated(&out);
    assert_eq!(repeats.len(), 2);
    for (expected, (outbox, texts)) in [&viewer, &other].into_iter().zip(&repeats) {
        assert!(Arc::ptr_eq(outbox, &expected.outbox));
        assert_eq!(texts, &["/a", "/known", EVENT, MEDIA, ARTISTS]);
    }
    assert_eq!(out.repeats[0].sub_topic, feed.topics()[0].sub_topic);
    // Once for each message within the time.
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    let texts = ["/b", "/a", "/known", EVENT, MEDIA, ARTISTS].map(str::to_owned);
    assert_eq!(repeated(&out)[0].1, texts);
    feed.tell(&["/c"]);
    assert!(feed.sends().await.repeats.is_empty());
}

/// The second of two catch-ups makes a client forget the first.
#[tokio::test(start_paused = true)]
async fn who_joins_again_at_once_is_told_what_it_was_told_at_first() {
    let (feed, start) = (feed(), Instant::now());
    feed.learn(&endpoints(&["/known"]));
    advance(FRESH).await;
    let (viewer, catch_up) = feed.join(ClientHistory::Nothing, Some(start));
    let all = listed(&catch_up.unwrap().broadcast);
    assert_eq!(all, [EVENT, MEDIA, ARTISTS, "/known"]);
    feed.tell(&["/a"]);
    let again = || viewer.join(&feed, ClientHistory::Held, Some(start));
    assert_eq!(listed(&again().unwrap().broadcast), [&["/a".into()], &*all].concat());
    // Another client is not it.
    let (_other, catch_up) = feed.join(ClientHistory::Held, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/a"]);
    let out = feed.sends().await;
    assert_eq!(repeated(&out).len(), 1, "of the last alone");
    advance(CARRY * 2).await;
    assert_eq!(listed(&again().unwrap().broadcast), ["/a"]);
}

#[tokio::test(start_paused = true)]
async fn a_catch_up_is_repeated_for_so_long_and_no_longer() {
    for (late, is_repeated) in [(0, true), (1, false)] {
        let feed = feed();
        let (_viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
        assert!(catch_up.is_some());
        advance(CARRY - SETTLE + Duration::from_millis(late)).await;
        feed.tell(&["/a"]);
        assert_eq!(feed.sends().await.repeats.len(), usize::from(is_repeated));
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_says_all_of_a_catch_up_is_not_followed_by_it() {
    let (feed, start) = (feed(), Instant::now());
    advance(FRESH).await;
    feed.tell(&["/a"]);
    let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/a"]);
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    assert_eq!(out.endpoints(), ["/a", "/b"]);
    assert!(out.repeats.is_empty());
}

/// Who joins between two messages would else forget the first when the second comes.
#[tokio::test(start_paused = true)]
async fn a_catch_up_says_what_everybody_was_just_told() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell(&["/a"]);
    feed.sends().await;
    advance(Duration::from_secs(1)).await;
    // It needs nothing from before this moment, but for the carried endpoint.
    feed.learn(&endpoints(&["/b"]));
    let since = Instant::now();
    assert!(feed.join(ClientHistory::Since(since), Some(start)).1.is_none());
    feed.tell(&["/b"]);
    let (_viewer, catch_up) = feed.join(ClientHistory::Since(since), Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/b", "/a"]);
}

#[test]
fn one_notification_that_names_no_row_is_enough_not_to_trust_the_history() {
    let feed = feed();
    assert_eq!(feed.heard(), Heard::Nothing);
    for (has_id, heard) in [
        (true, Heard::OnlyWithId),
        (true, Heard::OnlyWithId),
        (false, Heard::SomeWithoutId),
        (true, Heard::SomeWithoutId),
    ] {
        feed.hear(has_id);
        assert_eq!(feed.heard(), heard);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_remembered_of_messages_is_bounded() {
    let feed = feed();
    for number in 0..LOG_MAX + 5 {
        for _ in 0..SOURCES_MAX + 5 {
            feed.take(&format!(r#"{{"type":"t","id":{number},"endpoints":["/a"]}}"#), 1);
        }
        feed.delivered(feed.sends().await.outgoing.delivery);
    }
    let log = feed.log();
    assert_eq!(log.len(), LOG_MAX);
    assert_eq!((log[0].merged, log[0].sources.len()), (SOURCES_MAX + 5, SOURCES_MAX));
    let newest = i64::try_from(LOG_MAX + 4).unwrap();
    assert_eq!(log[0].sources[0], Source { id: Some(newest), kind: Some("t".into()) });
}

/// Something that happens to an event.
#[derive(Debug, Clone)]
enum Step {
    Told { pid: u32, endpoints: BTreeSet<u8> },
    Pointer,
    Gap { missed: Option<BTreeSet<u8>>, spread: u64 },
    Joined,
}

fn steps() -> impl Strategy<Value = Vec<(u64, Step)>> {
    let endpoints = || prop::collection::btree_set(0_u8..12, 0..4);
    let step = prop_oneof![
        12 => (1_u32..4, endpoints()).prop_map(|(pid, endpoints)| Step::Told { pid, endpoints }),
        1 => Just(Step::Pointer),
        1 => (prop::option::of(endpoints()), 0_u64..5_000)
            .prop_map(|(missed, spread)| Step::Gap { missed, spread }),
        2 => Just(Step::Joined),
    ];
    let pause = prop_oneof![3 => 0_u64..12, 2 => 0_u64..1_500, 1 => 0_u64..9_000];
    prop::collection::vec((pause, step), 1..120)
}

/// What the event must say, kept as simply as possible.
#[derive(Debug, Default)]
struct Model {
    seen: BTreeSet<String>,
    own: BTreeSet<String>,
    is_everything: bool,
    offered: Option<Instant>,
    may_wait_for: Duration,
    sent: Vec<(Instant, BTreeSet<String>)>,
    caught_up: Vec<(Instant, BTreeSet<String>)>,
    stamps: BTreeSet<String>,
}

impl Model {
    fn offer(&mut self, endpoints: &[String], spread: Duration) {
        self.seen.extend(endpoints.iter().cloned());
        self.own.extend(endpoints.iter().cloned());
        self.offered.get_or_insert_with(Instant::now);
        self.may_wait_for = self.may_wait_for.max(WINDOW.max(spread) + SETTLE_MAX);
    }

    fn check(&mut self, out: &Out) {
        let waited = out.at - self.offered.take().expect("only what was offered is sent");
        assert!(waited <= self.may_wait_for, "{waited:?}");
        if let Some((before, _)) = self.sent.last() {
            assert!(out.at - *before >= WINDOW, "{:?}", out.at - *before);
        }
        let mut own = mem::take(&mut self.own);
        if mem::take(&mut self.is_everything) {
            own.extend([EVENT, MEDIA, ARTISTS].map(str::to_owned));
            own.extend(self.seen.iter().cloned());
        }
        let carried = self.sent.iter().filter(|(at, _)| out.at - *at <= CARRY);
        let mut expected = own.clone();
        expected.extend(carried.flat_map(|(_, own)| own.iter().cloned()));
        let said: Vec<_> = out.endpoints();
        let set: BTreeSet<_> = said.iter().cloned().collect();
        assert_eq!(set.len(), said.len(), "each once");
        assert_eq!(set, expected);
        self.caught_up.retain(|(at, _)| out.at - *at <= CARRY);
        let missing = self.caught_up.iter().filter(|(_, it)| !it.is_subset(&set));
        let both: Vec<BTreeSet<_>> =
            missing.map(|(_, it)| it.union(&set).cloned().collect()).collect();
        let repeats = repeated(out).into_iter();
        assert_eq!(both, repeats.map(|(_, texts)| texts.into_iter().collect()).collect::<Vec<_>>());
        self.sent.push((out.at, own));
        self.may_wait_for = Duration::ZERO;
        if payload(&out.outgoing.broadcast)["timestamp"] != 1.5 {
            assert!(self.stamps.insert(stamp(&out.outgoing.broadcast)), "of its own");
        }
    }
}

/// Takes the steps, and sends what is due in between.
async fn play(steps: Vec<(u64, Step)>) {
    let texts =
        |numbers: &BTreeSet<u8>| numbers.iter().map(|it| format!("/{it}")).collect::<Vec<_>>();
    let (feed, mut model) = (feed(), Model::default());
    let mut viewers = Vec::new();
    for (pause, step) in steps {
        let until = Instant::now() + Duration::from_millis(pause);
        while feed.next().is_some_and(|next| next <= until) {
            sleep_until(feed.next().unwrap()).await;
            if let Due::Send(outgoing) = feed.due(false) {
                model.check(&Out::new(&feed, outgoing));
            }
        }
        sleep_until(until).await;
        match step {
            Step::Told { pid, endpoints } => {
                let texts = texts(&endpoints);
                feed.tell_by(pid, &texts.iter().map(String::as_str).collect::<Vec<_>>());
                model.offer(&texts, Duration::ZERO);
            }
            Step::Pointer => {
                feed.take(r#"{"pointer":true,"timestamp":1.0}"#, 9);
                model.is_everything = true;
                model.offer(&[], Duration::ZERO);
            }
            Step::Gap { missed, spread } => {
                let spread = Duration::from_millis(spread);
                let missed = missed.map(|it| texts(&it));
                let list = missed.iter().flatten().map(|it| Box::from(it.as_str())).collect();
                let earliest = Instant::now() + spread;
                feed.offer_gap(CatchUpCause::Start, missed.as_ref().map(|_| &list), earliest);
                model.is_everything |= missed.is_none();
                model.offer(&missed.unwrap_or_default(), spread);
            }
            Step::Joined => {
                let (viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
                let texts = listed(&catch_up.unwrap().broadcast).into_iter().collect();
                model.caught_up.push((Instant::now(), texts));
                viewers.push(viewer);
            }
        }
    }
    while let Some(out) = feed.next_sent().await {
        model.check(&out);
    }
    assert_eq!(model.offered, None, "everything has left");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Never two messages within a window; each says exactly what was offered since the one
    /// before, and what is carried; nothing stays behind.
    #[test]
    fn whatever_happens_every_endpoint_leaves_with_the_next_message(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(play(steps));
    }
}

/// An event whose server has run for ten seconds, and that time.
async fn feed_of_a_running_server() -> (Feed, Instant) {
    let (feed, started) = (feed(), Instant::now());
    advance(Duration::from_secs(10)).await;
    (feed, started)
}

#[tokio::test(start_paused = true)]
async fn what_takes_a_messages_place_reaches_back_to_its_first_change() {
    let (feed, started) = feed_of_a_running_server().await;
    feed.tell(&["/before"]);
    assert_eq!(feed.sends().await.outgoing.since, Some(Since::at(Instant::now(), started)));
    advance(Duration::from_secs(10)).await;
    let first_change = Instant::now();
    feed.mute(Some(first_change + Duration::from_secs(3600)));
    feed.tell(&["/a"]);
    advance(Duration::from_secs(60)).await;
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    assert_eq!(out.endpoints(), ["/a", "/b"]);
    let since = out.outgoing.since.unwrap();
    assert_eq!(since, Since::at(first_change, started));
    advance(Duration::from_secs(60)).await;
    let (viewer, catch_up) = feed.join(ClientHistory::Behind(since), Some(started));
    let CatchUp { broadcast, cause, coverage, since: again, .. } = catch_up.unwrap();
    assert_eq!((cause, coverage), (CatchUpCause::SlowClient, Coverage::Exact));
    assert_eq!((listed(&broadcast), again), (vec!["/a".to_owned(), "/b".to_owned()], since));
    // What was not heard, or is of ever, is told as a whole.
    for (since, covered_since) in [(since, Instant::now()), (Since::EVER, started)] {
        let catch_up =
            viewer.join(&feed, ClientHistory::Behind(since), Some(covered_since)).unwrap();
        assert_eq!((catch_up.coverage, catch_up.since), (Coverage::Complete, Since::EVER));
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_to_who_was_just_caught_up_reaches_back_as_far_as_the_catch_up() {
    let (feed, started) = feed_of_a_running_server().await;
    feed.tell(&["/a"]);
    feed.sends().await;
    let a = Since::at(Instant::now() - SETTLE, started);
    advance(2 * CARRY).await;
    let (_fresh, caught_up) = feed.join(ClientHistory::Fresh, Some(started));
    let (_unknown, complete) = feed.join(ClientHistory::Nothing, None);
    let asked = Instant::now().checked_sub(FRESH).map_or(Since::EVER, |it| Since::at(it, started));
    assert!(asked <= a, "what it is told of has changed since");
    assert_eq!((caught_up.unwrap().since, complete.unwrap().since), (asked, Since::EVER));
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    let repeated: Vec<_> = out.repeats.iter().map(|it| it.since).collect();
    assert_eq!(repeated, [Some(asked), Some(Since::EVER)]);
}

#[tokio::test(start_paused = true)]
async fn nothing_takes_the_place_of_what_could_not_be_told_afterwards() {
    let (feed, started) = feed_of_a_running_server().await;
    // It names nothing.
    feed.tell(&[]);
    assert_eq!(feed.sends().await.outgoing.since, None);
    let texts: Vec<_> = (0..ENDPOINTS_MAX).map(|number| format!("/{number}")).collect();
    for part in texts.chunks(ENDPOINTS_MAX / 4) {
        feed.tell(&part.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let since = feed.sends().await.outgoing.since;
    assert!(since.is_some());
    // It is not remembered.
    advance(CARRY).await;
    feed.tell(&["/one/too/many"]);
    let forgotten = Since::at(Instant::now(), started);
    assert_eq!(feed.sends().await.outgoing.since, None);
    let (_viewer, catch_up) = feed.join(ClientHistory::Behind(forgotten), Some(started));
    assert_eq!(catch_up.unwrap().coverage, Coverage::Complete);
}
