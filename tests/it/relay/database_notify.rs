//! What Postgres notifies reaches the viewers of the event, as it is, and nobody else.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use sqlx::{Connection, Executor};
use tidegate::{
    protocol::{
        message::DEPTH_MAX,
        serializer::Serializer::{self, V1, V2},
    },
    secret::Secret,
    server::Config,
};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::{Client, invalidations, resync},
    postgres::Database,
    proxy::Proxy,
    server::{DEADLINE, TestServer, config_of_long_windows, plain_rule},
    token,
};

/// Payloads that a parser and writer of JSON would change, or choke on.
const PAYLOADS: [&str; 11] = [
    "{}",
    r#"{"type":"vote_cast","event_eid":"AB3028","endpoints":["/live/event/AB3028"],"timestamp":1761234567.123450}"#,
    "{ \"b\" : 1.10 ,\n\t\"a\":\t[ 1 , 2.0,3e2 ] }",
    "  {\"leading\": \"and trailing space\"}\r\n ",
    r#"{"z":1,"a":2,"z":3}"#,
    r#"{"huge":123456789012345678901234567890.000,"e":1E400,"minus":-0}"#,
    r#"{"escapes":"\u00e9\/\"\\\b\f\n\r\t\u0000","\u006bey":"\ud83d\ude00"}"#,
    r#"{"lone":"\ud800"}"#,
    r#"{"plain":"é😀 </script> ' $1 ;"}"#,
    r#"{"meta":{"id":"not ours"},"event":"broadcast","payload":{"payload":null}}"#,
    r#"{"endpoints":null,"type":7}"#,
];

/// Joins wait for their LISTEN as long as may be: these tests prove what comes after. Beside the
/// built-in rules stands one whose notifications are relayed one by one.
fn settings(database: &Database) -> Config {
    let mut config = config_of_long_windows();
    config.database_url = Secret::from(database.url());
    config.relay.listen_wait = Duration::from_millis(1500);
    config.topic.push(plain_rule());
    config
}

async fn start(config: Config) -> TestServer {
    let server = TestServer::start_with(config);
    server.link_is_up().await;
    server
}

/// A broadcast of a user event as it came, payload untouched.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    topic: String,
    user_event: String,
    payload: String,
}

fn told(topic: &str, user_event: &str, payload: &str) -> Told {
    Told { topic: topic.to_owned(), user_event: user_event.to_owned(), payload: payload.to_owned() }
}

fn news(sub_topic: &str, payload: &str) -> Told {
    told(&format!("realtime:{sub_topic}"), "news", payload)
}

fn invalidation(sub_topic: &str, payload: &str) -> Told {
    told(&format!("realtime:{sub_topic}"), "cache_invalidation", payload)
}

/// An object in which values are nested so deep.
fn of_depth(depth: usize) -> String {
    format!(r#"{{"deep":{}{}}}"#, "[".repeat(depth - 1), "]".repeat(depth - 1))
}

/// The next frame, which is a user broadcast: of V1 text, of V2 kind 4.
async fn next(client: &mut Client) -> Told {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Text<'a> {
        topic: &'a str,
        event: &'a str,
        #[serde(borrow)]
        payload: Envelope<'a>,
        #[serde(rename = "ref")]
        reference: Option<&'a str>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Envelope<'a> {
        #[serde(rename = "type")]
        kind: &'a str,
        event: &'a str,
        #[serde(borrow)]
        payload: &'a RawValue,
    }
    match client.frame().await {
        Frame::Text(text) => {
            let Text { topic, event, payload: envelope, reference } =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert_eq!((event, envelope.kind, reference), ("broadcast", "broadcast", None));
            told(topic, envelope.event, &with_space_around(&text, envelope.payload.get()))
        }
        Frame::Binary(bytes) => {
            let [4, topic, event, 0, 1, rest @ ..] = &*bytes else {
                panic!("no kind 4: {bytes:?}")
            };
            let (topic, rest) = rest.split_at(usize::from(*topic));
            let (event, payload) = rest.split_at(usize::from(*event));
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            told(&text(topic), &text(event), &text(payload))
        }
        frame => panic!("no broadcast: {frame:?}"),
    }
}

/// Fails unless the next frame is an invalidation of this event for the client alone: it was just
/// caught up, would forget that over the message before, and so gets both in one.
async fn repeated(client: &mut Client, prefix: &str, eid: &str) {
    let repeat = next(client).await;
    assert_eq!(repeat, invalidation(&format!("{prefix}{eid}"), &repeat.payload));
    assert!(repeat.payload.ends_with(r#","merged":1}"#), "{repeat:?}");
    let has = |endpoint: &String| repeat.payload.contains(&format!("\"{endpoint}\""));
    assert!(resync(eid).iter().all(has), "{repeat:?}");
}

/// The value as it stands in the frame, with the white space before and after it.
fn with_space_around(text: &str, value: &str) -> String {
    let from = value.as_ptr().addr() - text.as_ptr().addr();
    let is_space = |c: char| c.is_ascii_whitespace();
    let before = text[..from].trim_end_matches(is_space).len();
    let after = &text[from + value.len()..];
    let after = from + value.len() + after.len() - after.trim_start_matches(is_space).len();
    text[before..after].to_owned()
}

/// Leaves a topic, and reads what still comes until it is closed.
async fn leave(client: &mut Client, sub_topic: &str, join_ref: &str) -> Vec<Value> {
    let topic = format!("realtime:{sub_topic}");
    client.send(json!([join_ref, "leave", topic, "phx_leave", {}])).await;
    let mut before = Vec::new();
    loop {
        let message = client.message().await;
        match message[3].as_str() {
            Some("phx_close") => return before,
            Some("phx_reply") => assert_eq!(message[4]["status"], "ok"),
            _ => before.push(message),
        }
    }
}

/// The series of a family that are above zero: label values in the order of their names → value.
async fn counted(server: &TestServer, family: &str) -> BTreeMap<String, u64> {
    let (_, text) = TestServer::request(server.admin, "GET /metrics HTTP/1.1", "").await;
    let series = text.lines().filter_map(|line| {
        let (labels, value) = line.strip_prefix(family)?.strip_prefix('{')?.split_once("} ")?;
        let labels: Vec<_> = labels.split('"').skip(1).step_by(2).collect();
        Some((labels.join(" "), value.parse().unwrap()))
    });
    series.filter(|(_, value)| *value > 0).collect()
}

/// Fails unless exactly this many notifications come to have each outcome: `"delivered event"`.
async fn outcomes_become(server: &TestServer, expected: &[(&str, u64)]) {
    let expected: BTreeMap<_, _> = expected.iter().map(|(k, n)| ((*k).to_owned(), *n)).collect();
    let become_so =
        async { while counted(server, "tidegate_notifications_total").await != expected {} };
    let in_time = timeout(DEADLINE, become_so).await;
    let counted = counted(server, "tidegate_notifications_total").await;
    assert!(in_time.is_ok(), "expected {expected:?}\ncounted {counted:?}");
}

#[tokio::test]
async fn a_notification_reaches_both_spellings_in_both_serializers_byte_for_byte() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let spellings = ["plain_AB3028", "plain:AB3028"];
    let mut viewers = Vec::new();
    for serializer in [V1, V2] {
        for topics in [&spellings[..1], &spellings[1..], &spellings[..]] {
            let mut viewer = Client::connect(&server, serializer).await;
            for topic in topics {
                viewer.join(topic).await;
            }
            viewers.push((viewer, topics));
        }
    }
    let longest = format!(r#"{{"longest":"{}"}}"#, "x".repeat(7999 - 14));
    assert_eq!(longest.len(), 7999, "Postgres takes no longer one");
    let deepest = of_depth(DEPTH_MAX);
    for payload in PAYLOADS.into_iter().chain([&*longest, &*deepest]) {
        database.notify("plain_AB3028", payload).await;
        for (viewer, topics) in &mut viewers {
            // Once for each channel, in whichever order.
            let mut received = BTreeSet::new();
            for _ in &**topics {
                let Told { topic, user_event, payload: bytes } = next(viewer).await;
                assert_eq!((&*user_event, &*bytes), ("news", payload));
                received.insert(topic);
            }
            assert_eq!(received, topics.iter().map(|topic| format!("realtime:{topic}")).collect());
        }
    }
    for (mut viewer, _) in viewers {
        viewer.expect_nothing().await;
        viewer.close().await;
    }
    outcomes_become(&server, &[("delivered event", 13)]).await;
    assert_eq!(server.metric("tidegate_deliveries_total").await, 13.0 * 8.0);
    assert_eq!(server.metric("tidegate_broadcasts_total{source=\"database\"}").await, 13.0);
    server.stop().await;
}

/// Microsecond timestamps are the clients' keys. Each message is of an event of its own: only the
/// first of a window is alone.
#[tokio::test]
async fn an_invalidation_that_is_alone_reaches_both_spellings_byte_for_byte() {
    const SPELLINGS: [&str; 2] = ["cache_invalidate_", "cache_invalidate:"];
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let mut viewers = Vec::new();
    for serializer in [V1, V2] {
        for prefix in SPELLINGS {
            viewers.push((Client::connect(&server, serializer).await, prefix));
        }
    }
    let longest = format!(r#"{{"longest":"{}"}}"#, "x".repeat(7999 - 14));
    let deepest = of_depth(DEPTH_MAX);
    let payloads: Vec<_> = PAYLOADS.into_iter().chain([&*longest, &*deepest]).collect();
    for (number, payload) in payloads.iter().enumerate() {
        let eid = format!("AB{number}");
        for (viewer, prefix) in &mut viewers {
            viewer.join(&format!("{prefix}{eid}")).await;
        }
        database.notify(&format!("cache_invalidate_{eid}"), payload).await;
        for (viewer, prefix) in &mut viewers {
            let expected = invalidation(&format!("{prefix}{eid}"), payload);
            assert_eq!(next(viewer).await, expected);
            repeated(viewer, prefix, &eid).await;
        }
    }
    for (viewer, _) in viewers {
        viewer.ends().await;
    }
    outcomes_become(&server, &[("offered event", 13)]).await;
    assert_eq!(server.metric("tidegate_broadcasts_total{source=\"merged\"}").await, 13.0);
    server.stop().await;
}

#[tokio::test]
async fn a_sale_reaches_the_viewers_of_auction_winner() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    for (serializer, eid, other) in [(V1, "AB3028", "AB3029"), (V2, "AB3029", "AB3028")] {
        let mut viewer = Client::connect(&server, serializer).await;
        viewer.join(&format!("auction_winner_{eid}")).await;
        viewer.join(&format!("auction_winner_{other}")).await;
        let cache = format!("cache_invalidate_{eid}");
        viewer.join(&cache).await;
        let payload = r#"{"type": "auction_status_change", "winning_amount": 120.50}"#;
        database.notify(&format!("auction_winner_{eid}"), payload).await;
        let topic = format!("realtime:auction_winner_{eid}");
        assert_eq!(next(&mut viewer).await, told(&topic, "auction_winner", payload));
        database.notify(&cache, "{}").await;
        assert_eq!(next(&mut viewer).await, invalidation(&cache, "{}"));
        viewer.close().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn notifications_arrive_in_the_order_of_their_commits() {
    const CHANNELS: [&str; 3] = ["plain_AB3028", "plain_AB3029", "auction_winner_AB3028"];
    let database = Database::create().await;
    let server = start(settings(&database)).await;
    let mut witness = database.listener(&CHANNELS).await;
    let mut viewers = [Client::connect(&server, V1).await, Client::connect(&server, V2).await];
    for viewer in &mut viewers {
        for topic in CHANNELS {
            viewer.join(topic).await;
        }
    }
    let publish = async |name: &str| {
        let mut session = database.connect().await;
        let mut sent = 0;
        while sent < 50 {
            let mut transaction = session.begin().await.unwrap();
            for _ in 0..=sent % 7 {
                let channel = CHANNELS[fastrand::usize(..3)];
                let notify = sqlx::query("select pg_notify($1, $2)");
                let payload = format!(r#"{{"by":"{name}","nth":{sent}}}"#);
                transaction.execute(notify.bind(channel).bind(payload)).await.unwrap();
                sent += 1;
                if sent == 50 {
                    break;
                }
            }
            transaction.commit().await.unwrap();
        }
    };
    tokio::join!(publish("a"), publish("b"), publish("c"), publish("d"));
    let mut committed = Vec::new();
    while committed.len() < 200 {
        let heard = timeout(DEADLINE, witness.try_recv()).await.unwrap().unwrap().unwrap();
        committed.push((format!("realtime:{}", heard.channel()), heard.payload().to_owned()));
    }
    for mut viewer in viewers {
        for expected in &committed {
            let Told { topic, payload, .. } = next(&mut viewer).await;
            assert_eq!((topic, payload), *expected);
        }
        viewer.expect_nothing().await;
        viewer.close().await;
    }
    server.stop().await;
}

/// NOTIFY channels are case-sensitive only if LISTEN quotes them.
#[tokio::test]
async fn events_whose_eids_differ_by_a_letter_a_case_or_a_hyphen_are_different_events() {
    const EIDS: [&str; 6] = ["AB3028", "AB3029", "ab3028", "AB-3028", "AB30281", "3028"];
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let mut viewers = Vec::new();
    for eid in EIDS {
        let mut viewer = Client::connect(&server, V2).await;
        viewer.join(&format!("plain_{eid}")).await;
        viewers.push(viewer);
    }
    for what in ["first", "marker"] {
        for eid in EIDS {
            let payload = format!(r#"{{"{what}":"{eid}"}}"#);
            database.notify(&format!("plain_{eid}"), &payload).await;
        }
    }
    for (mut viewer, eid) in viewers.into_iter().zip(EIDS) {
        for what in ["first", "marker"] {
            let payload = format!(r#"{{"{what}":"{eid}"}}"#);
            let expected = news(&format!("plain_{eid}"), &payload);
            assert_eq!(next(&mut viewer).await, expected);
        }
        viewer.expect_nothing().await;
        viewer.close().await;
    }
    outcomes_become(&server, &[("delivered event", 12)]).await;

    // Nor do they share a window, or what was told of one.
    let mut viewers = Vec::new();
    for eid in EIDS {
        let mut viewer = Client::connect(&server, V1).await;
        viewer.join(&format!("cache_invalidate_{eid}")).await;
        viewers.push(viewer);
    }
    let of = |eid: &str| format!(r#"{{"endpoints":["{eid}"]}}"#);
    for eid in EIDS {
        database.notify(&format!("cache_invalidate_{eid}"), &of(eid)).await;
    }
    for (viewer, eid) in viewers.iter_mut().zip(EIDS) {
        let expected = invalidation(&format!("cache_invalidate_{eid}"), &of(eid));
        assert_eq!(next(viewer).await, expected);
        let (_, repeat) = viewer.broadcast().await;
        let endpoints = [&[eid.to_owned()], &resync(eid)[..]].concat();
        assert_eq!(repeat["payload"]["endpoints"], json!(endpoints));
    }
    for viewer in viewers {
        viewer.ends().await;
    }
    outcomes_become(&server, &[("delivered event", 12), ("offered event", 6)]).await;
    server.stop().await;
}

#[tokio::test]
async fn what_nobody_has_joined_is_not_even_received() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join("plain_AB3028").await;
    assert_eq!(server.metric("tidegate_relay_listens").await, 1.0);
    for channel in [
        "plain_AB3029",
        "cache_invalidate_AB3028",
        "auction_winner_AB3028",
        "sms_secret",
        "tidegate",
    ] {
        database.notify(channel, "{}").await;
    }
    database.notify("plain_AB3028", r#"{"marker":1}"#).await;
    let marker = news("plain_AB3028", r#"{"marker":1}"#);
    assert_eq!(next(&mut viewer).await, marker);
    outcomes_become(&server, &[("delivered event", 1)]).await;
    viewer.close().await;
    server.stop().await;
}

/// Other NOTIFY channels of the same database carry phone numbers.
#[tokio::test]
async fn no_topic_that_a_client_can_join_opens_a_channel_outside_the_rules() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let token = token::of_role("service_role");
    let mut viewer = Client::with_token(&server, V1, &token).await;
    viewer.join("cache_invalidate_AB3028").await;
    // The other spelling is a topic, and no channel of the database's.
    let other = viewer.join("cache_invalidate:AB3028").await;
    assert_eq!(server.metric("tidegate_relay_listens").await, 1.0);
    database.notify("cache_invalidate:AB3028", r#"{"forged":1}"#).await;
    assert!(leave(&mut viewer, "cache_invalidate:AB3028", &other).await.is_empty());
    // Ordinary topics: joined, and nothing of the database's.
    let outside = ["sms_secret", "global_cache_stats", "*", "cache_invalidat", "pg_notify"];
    for topic in outside {
        viewer.join(topic).await;
    }
    // What looks like an event's topic and is not.
    for topic in [
        "cache_invalidate_AB\"; listen \"sms_secret",
        "cache_invalidate_AB3028\";listen sms_secret;--",
        "cache_invalidate_",
        "cache_invalidate_AB%",
        "cache_invalidate:AB_1",
    ] {
        let topic = format!("realtime:{topic}");
        viewer.send(json!(["9", "9", topic, "phx_join", { "config": {} }])).await;
        let error = json!({ "status": "error", "response": { "reason": "$any" } });
        viewer.expect(json!(["9", "9", topic, "phx_reply", error])).await;
    }
    assert_eq!(server.metric("tidegate_relay_listens").await, 1.0);
    for channel in outside.into_iter().chain(["cache_invalidate_AB", "cache_invalidate_AB_1"]) {
        database.notify(channel, r#"{"phone":"+14165550100"}"#).await;
    }
    database.notify("cache_invalidate_AB3028", r#"{"marker":1}"#).await;
    let marker = invalidation("cache_invalidate_AB3028", r#"{"marker":1}"#);
    assert_eq!(next(&mut viewer).await, marker);
    repeated(&mut viewer, "cache_invalidate_", "AB3028").await;
    viewer.expect_nothing().await;
    // `global_cache_stats` is heard and goes nowhere.
    outcomes_become(&server, &[("noted stats", 1), ("offered event", 1)]).await;
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn every_outcome_is_counted_and_disturbs_no_other() {
    let mut database = Database::create().await;
    let mut settings = settings(&database);
    settings.limits.payload_bytes_max = 300;
    let server = start(settings).await;
    let mut viewer = Client::connect(&server, V1).await;
    let (event, merged) = ("plain_AB3028", "cache_invalidate_AB3028");
    viewer.join(event).await;
    viewer.join(merged).await;
    let gone = viewer.join("plain_AB3029").await;
    assert_eq!(leave(&mut viewer, "plain_AB3029", &gone).await, [Value::Null; 0]);

    for malformed in ["", " ", "{", "{}}", "{'a':1}", r#"{"a":01}"#, "plain text", "NaN"] {
        database.notify(event, malformed).await;
    }
    database.notify(event, &of_depth(DEPTH_MAX + 1)).await;
    for not_object in ["null", "true", "1.10", r#""text""#, "[]", r#"[{"a":1}]"#] {
        database.notify(event, not_object).await;
    }
    let of_length = |length: usize| format!(r#"{{"a":"{}"}}"#, "x".repeat(length - 8));
    database.notify(event, &of_length(301)).await;
    // Counted by its size, whatever is in it.
    database.notify(event, &"x".repeat(301)).await;
    database.notify("plain_AB3029", "{}").await;
    for unfit in ["plain text", "[]", &of_length(301)] {
        database.notify(merged, unfit).await;
    }
    database.notify("global_cache_stats", r#"{"event_eid":"AB3028"}"#).await;
    database.notify("global_cache_stats", "plain text").await;
    database.notify("global_cache_stats", "[]").await;
    database.notify("global_cache_stats", &of_length(301)).await;
    assert_eq!(of_length(300).len(), 300);
    database.notify(event, &of_length(300)).await;

    assert_eq!(next(&mut viewer).await, news(event, &of_length(300)));
    database.notify(merged, &of_length(300)).await;
    assert_eq!(next(&mut viewer).await, invalidation(merged, &of_length(300)));
    repeated(&mut viewer, "cache_invalidate_", "AB3028").await;
    viewer.expect_nothing().await;
    outcomes_become(
        &server,
        &[
            ("delivered event", 1),
            ("malformed event", 10),
            ("malformed stats", 1),
            ("no_viewer event", 1),
            ("not_object event", 7),
            ("not_object stats", 1),
            ("noted stats", 1),
            ("offered event", 1),
            ("oversized event", 3),
            ("oversized stats", 1),
        ],
    )
    .await;
    assert_eq!(counted(&server, "tidegate_relay_reconnects_total").await, BTreeMap::new());
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_listen_ends_when_the_last_viewer_has_been_gone_for_the_linger() {
    let mut database = Database::create().await;
    let mut settings = settings(&database);
    settings.relay.linger = Duration::from_millis(300);
    let server = start(settings).await;
    let (mut one, mut other) =
        (Client::connect(&server, V1).await, Client::connect(&server, V2).await);
    let event = "plain_AB3028";
    let mut joined = BTreeMap::new();
    for topic in [event, "plain_AB3029", "plain_AB3030"] {
        joined.insert(topic, one.join(topic).await);
    }
    let other_joined = other.join(event).await;
    assert_eq!(server.metric("tidegate_relay_listens").await, 3.0);

    // AB3029 goes for good; AB3028 is left by one and held by the other; AB3030 comes back.
    for (topic, join_ref) in &joined {
        leave(&mut one, topic, join_ref).await;
    }
    one.join("plain_AB3030").await;
    listens_become(&server, 2.0).await;
    database.notify("plain_AB3029", "{}").await;
    database.notify(event, r#"{"still":"held"}"#).await;
    database.notify("plain_AB3030", r#"{"came":"back"}"#).await;
    assert_eq!(next(&mut other).await, news(event, r#"{"still":"held"}"#));
    let back = news("plain_AB3030", r#"{"came":"back"}"#);
    assert_eq!(next(&mut one).await, back);
    outcomes_become(&server, &[("delivered event", 2)]).await;

    // The last one leaves, and the event is not received any more.
    leave(&mut other, event, &other_joined).await;
    listens_become(&server, 1.0).await;
    database.notify(event, r#"{"lost":"rightly"}"#).await;
    database.notify("plain_AB3030", "{}").await;
    assert_eq!(next(&mut one).await, news("plain_AB3030", "{}"));
    outcomes_become(&server, &[("delivered event", 3)]).await;

    // Whoever joins then is served as the first one was; so is who closes without leaving.
    other.join(event).await;
    database.notify(event, r#"{"again":1}"#).await;
    assert_eq!(next(&mut other).await, news(event, r#"{"again":1}"#));
    other.close().await;
    listens_become(&server, 1.0).await;
    one.close().await;
    listens_become(&server, 0.0).await;
    server.stop().await;
}

async fn listens_become(server: &TestServer, value: f64) {
    let become_so = async { while server.metric("tidegate_relay_listens").await != value {} };
    let in_time = timeout(DEADLINE, become_so).await;
    assert!(in_time.is_ok(), "{} listens", server.metric("tidegate_relay_listens").await);
}

#[tokio::test]
async fn within_the_linger_an_event_without_viewers_is_received_and_counted() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let mut viewer = Client::connect(&server, V2).await;
    let event = "plain_AB3028";
    for _ in 0..3 {
        let join_ref = viewer.join(event).await;
        leave(&mut viewer, event, &join_ref).await;
    }
    database.notify(event, "{}").await;
    outcomes_become(&server, &[("no_viewer event", 1)]).await;
    viewer.join(event).await;
    database.notify(event, r#"{"back":1}"#).await;
    assert_eq!(next(&mut viewer).await, news(event, r#"{"back":1}"#));
    outcomes_become(&server, &[("delivered event", 1), ("no_viewer event", 1)]).await;
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_notification_that_crosses_the_unlisten_is_counted_and_a_returning_viewer_is_served() {
    let mut database = Database::create().await;
    let mut proxy = Proxy::start("127.0.0.1", database.port()).await;
    let mut settings = settings(&database);
    settings.notify_database_url = Secret::from(&*database.url_at(proxy.address));
    settings.relay.linger = Duration::ZERO;
    let server = start(settings).await;
    let mut viewer = Client::connect(&server, V2).await;
    let (event, other) = ("plain_AB3028", "plain_AB3029");
    viewer.join(other).await;
    let join_ref = viewer.join(event).await;

    proxy.hold_at("UNLISTEN");
    leave(&mut viewer, event, &join_ref).await;
    proxy.has_held().await;
    // Postgres still sends what nobody wants any more.
    database.notify(event, r#"{"crossed":1}"#).await;
    database.notify(other, "{}").await;
    proxy.release();
    assert_eq!(next(&mut viewer).await, news(other, "{}"));
    outcomes_become(&server, &[("delivered event", 1), ("unknown_channel other", 1)]).await;

    let join_ref = viewer.join(event).await;
    proxy.hold_at("UNLISTEN");
    leave(&mut viewer, event, &join_ref).await;
    proxy.has_held().await;
    // Back before Postgres has even heard that everybody had gone.
    let topic = format!("realtime:{event}");
    viewer.send(json!(["7", "7", topic, "phx_join", { "config": {} }])).await;
    viewer.expect_nothing().await;
    proxy.release();
    let ok = json!({ "status": "ok", "response": "$any" });
    viewer.expect(json!(["7", "7", topic, "phx_reply", ok])).await;
    database.notify(event, r#"{"back":1}"#).await;
    assert_eq!(next(&mut viewer).await, news(event, r#"{"back":1}"#));
    assert_eq!(server.metric("tidegate_relay_listens").await, 2.0);
    viewer.close().await;
    server.stop().await;
}

/// Postgres cuts a longer name, and LISTEN on what is left would hear another event.
#[tokio::test]
async fn a_channel_of_63_bytes_is_relayed_and_one_of_64_is_joined_and_counted() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let mut viewer = Client::connect(&server, V2).await;
    let too_long = "tidegate_relay_listens_refused_total{reason=\"too_long\"}";
    for (prefix, event, fits) in
        [("cache_invalidate_", "cache_invalidation", 46), ("auction_winner_", "auction_winner", 48)]
    {
        let refused = server.metric(too_long).await;
        let eid = "E".repeat(fits);
        let channel = format!("{prefix}{eid}");
        assert_eq!(channel.len(), 63);
        viewer.join(&format!("{channel}E")).await;
        assert_eq!(server.metric(too_long).await, refused + 1.0);
        viewer.join(&channel).await;
        assert_eq!(server.metric(too_long).await, refused + 1.0);
        database.notify(&channel, "{}").await;
        let expected = told(&format!("realtime:{channel}"), event, "{}");
        assert_eq!(next(&mut viewer).await, expected);
        if event == "cache_invalidation" {
            repeated(&mut viewer, prefix, &eid).await;
        }
        viewer.expect_nothing().await;
    }
    // 50 characters are an eid, 51 are none.
    viewer.join(&format!("cache_invalidate_{}", "E".repeat(50))).await;
    let topic = format!("realtime:cache_invalidate_{}", "E".repeat(51));
    viewer.send(json!(["9", "9", topic, "phx_join", { "config": {} }])).await;
    let error = json!({ "status": "error", "response": { "reason": "$any" } });
    viewer.expect(json!(["9", "9", topic, "phx_reply", error])).await;
    assert_eq!(server.metric(too_long).await, 3.0);
    assert_eq!(server.metric("tidegate_relay_listens").await, 2.0);
    viewer.close().await;
    server.stop().await;
}

/// An invalidation that is denied must not be merged, either: it would leave with the next one.
#[tokio::test]
async fn only_service_role_writes_to_what_the_database_writes_to() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let mut reader = Client::connect(&server, V1).await;
    let topics = ["cache_invalidate_AB3028", "cache_invalidate:AB3028", "auction_winner_AB3028"];
    for topic in topics {
        reader.join(topic).await;
    }
    let service = token::of_role("service_role");
    for serializer in [V1, V2] {
        for topic in topics {
            let mut writer = Client::with_token(&server, serializer, &service).await;
            let join_ref = writer.join_with(topic, json!({ "broadcast": { "ack": true } })).await;
            let envelope = json!({ "type": "broadcast", "event": "e", "payload": { "n": 1 } });
            let topic = format!("realtime:{topic}");
            writer.send(json!([join_ref, "w", topic, "broadcast", envelope])).await;
            let ok = json!({ "status": "ok", "response": {} });
            writer.expect(json!([join_ref, "w", topic, "phx_reply", ok])).await;
            // One event under two spellings, its own first.
            let other = match &*topic {
                "realtime:cache_invalidate_AB3028" => Some(topics[1]),
                "realtime:cache_invalidate:AB3028" => Some(topics[0]),
                _ => None,
            };
            for spelling in [Some(topic), other.map(|topic| format!("realtime:{topic}"))] {
                let Some(spelling) = spelling else { continue };
                assert_eq!(next(&mut reader).await, told(&spelling, "e", r#"{"n":1}"#));
            }
            writer.ends().await;
        }
    }
    let denied = "tidegate_dropped_total{reason=\"write_denied\"}";
    let mut attempts = 0;
    let admin = json!({ "role": "authenticated", "admin_events": { "AB3028": "super" } });
    for token in
        [token::of_role("anon"), token::of_role("authenticated"), token::with_claims(admin)]
    {
        for (serializer, private) in [(V1, false), (V1, true), (V2, false), (V2, true)] {
            for topic in topics {
                let mut writer = Client::with_token(&server, serializer, &token).await;
                let ack = json!({ "broadcast": { "ack": true, "self": true }, "private": private });
                let join_ref = writer.join_with(topic, ack).await;
                let topic = format!("realtime:{topic}");
                let forged = invalidations(serializer, &join_ref, &topic, "/forged");
                attempts += forged.len() + 1;
                for frame in forged {
                    writer.send_frame(frame).await;
                }
                let envelope = json!({ "type": "broadcast", "event": "e", "payload": {} });
                writer.send(json!([join_ref, "w", topic, "broadcast", envelope])).await;
                // No answer, no acknowledgement.
                writer.ends().await;
            }
        }
    }
    assert_eq!(server.metric(denied).await, f64::from(u32::try_from(attempts).unwrap()));
    let payload = r#"{"type":"t","endpoints":["/true"]}"#;
    database.notify("cache_invalidate_AB3028", payload).await;
    let mut received = [next(&mut reader).await, next(&mut reader).await];
    received.sort_by(|a, b| b.topic.cmp(&a.topic));
    assert_eq!(received, [topics[0], topics[1]].map(|topic| invalidation(topic, payload)));
    // Whoever comes later is told of what was true, and of nothing else.
    let mut late = Client::connect(&server, V2).await;
    late.join_only(topics[0], json!({})).await;
    let endpoints = late.caught_up(topics[0]).await;
    assert!(endpoints.contains(&"/true".to_owned()), "{endpoints:?}");
    assert!(!endpoints.contains(&"/forged".to_owned()), "{endpoints:?}");
    late.close().await;
    reader.close().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_notified_right_after_the_ok_arrives() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    for serializer in [V1, V2] {
        let mut viewer = Client::connect(&server, serializer).await;
        for nth in 0..50 {
            let eid = format!("{}-{nth}", if serializer == V1 { "A" } else { "B" });
            let event = format!("plain_{eid}");
            viewer.join(&event).await;
            database.notify(&event, "{}").await;
            assert_eq!(next(&mut viewer).await, news(&event, "{}"));
            let event = format!("cache_invalidate_{eid}");
            viewer.join(&event).await;
            database.notify(&event, "{}").await;
            assert_eq!(next(&mut viewer).await, invalidation(&event, "{}"));
            repeated(&mut viewer, "cache_invalidate_", &eid).await;
        }
        viewer.close().await;
    }
    server.stop().await;
}

/// Each join races the UNLISTEN of the leave before.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_notified_right_after_the_ok_of_a_rejoin_arrives() {
    let mut database = Database::create().await;
    let mut settings = settings(&database);
    settings.relay.linger = Duration::ZERO;
    let server = start(settings).await;
    let mut viewer = Client::connect(&server, V2).await;
    let event = "plain_AB3028";
    for nth in 0..50 {
        let join_ref = viewer.join(event).await;
        let payload = format!(r#"{{"nth":{nth}}}"#);
        database.notify(event, &payload).await;
        assert_eq!(next(&mut viewer).await, news(event, &payload));
        leave(&mut viewer, event, &join_ref).await;
        if nth % 3 == 0 {
            listens_become(&server, 0.0).await;
        }
    }
    viewer.close().await;
    server.stop().await;
}

/// On several threads: on one, nothing comes between the server's reply and its subscription.
#[tokio::test(flavor = "multi_thread")]
async fn while_notifications_pour_the_ok_comes_first_and_none_after_it_is_missed() {
    let mut database = Database::create().await;
    let server = start(settings(&database)).await;
    let event = "plain_AB3028";
    let begun = Cell::new(0_u64);
    let pour = async {
        loop {
            begun.set(begun.get() + 1);
            database.notify(event, &format!(r#"{{"nth":{}}}"#, begun.get())).await;
        }
    };
    let view = async |serializer: Serializer| {
        for _ in 0..25 {
            let mut viewer = Client::connect(&server, serializer).await;
            // The first thing to arrive is the ok: `join` fails otherwise.
            viewer.join(event).await;
            let joined_at = begun.get();
            let mut expected = None;
            for _ in 0..5 {
                let (_, envelope) = viewer.broadcast().await;
                let nth = envelope["payload"]["nth"].as_u64().unwrap();
                match expected {
                    None => assert!(nth <= joined_at + 1, "{nth} after {joined_at}"),
                    Some(expected) => assert_eq!(nth, expected),
                }
                expected = Some(nth + 1);
            }
            viewer.close().await;
        }
    };
    let started = Instant::now();
    tokio::select! {
        () = pour => {}
        ((), ()) = async { tokio::join!(view(V1), view(V2)) } => {}
    }
    assert!(started.elapsed() < DEADLINE);
    server.stop().await;
}
