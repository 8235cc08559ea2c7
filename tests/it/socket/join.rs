//! Joins: their place in the order of things, their bounds, and whom the rules let read.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tidegate::{
    clock::unix_now,
    hub::{
        BroadcastSource, FanOut, OutboxBounds, To, TooSlow,
        outbox::{Outbox, Queued},
    },
    protocol::{
        message::Json,
        serializer::{Broadcast, Serializer},
        topic::{Privacy, TopicKey},
    },
    secret::Secret,
    server::Gateway,
    socket::Socket,
};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::{Client, caller, client_key},
    server::{TestServer, config, plain_rule},
    token,
};

fn join(reference: &str, topic: &str) -> Value {
    json!([reference, reference, topic, "phx_join", { "config": {} }])
}

/// A join that is refused: its token is none.
fn bad_join(reference: &str, topic: &str) -> Value {
    let payload = json!({ "config": {}, "access_token": "garbage" });
    json!([reference, reference, topic, "phx_join", payload])
}

fn ok(reference: &str, topic: &str) -> Value {
    let ok = json!({ "status": "ok", "response": { "postgres_changes": [] } });
    json!([reference, reference, topic, "phx_reply", ok])
}

fn refused(reference: &str, topic: &str, reason: &str) -> Value {
    let error = json!({ "status": "error", "response": { "reason": reason } });
    json!([reference, reference, topic, "phx_reply", error])
}

fn unmatched(reference: &str, topic: &str) -> Value {
    let error = json!({ "status": "error", "response": { "reason": "unmatched topic" } });
    json!([null, reference, topic, "phx_reply", error])
}

const MALFORMED: &str = "MalformedJWT: The token provided is not a valid JWT";

#[tokio::test]
async fn two_servers_in_one_process_share_nothing() {
    let (one, two) = (TestServer::start(), TestServer::start());
    let mut a = Client::connect(&one, Serializer::V2).await;
    let mut b = Client::connect(&two, Serializer::V2).await;
    a.join_with("room", json!({ "broadcast": { "self": true } })).await;
    b.join_with("room", json!({ "broadcast": { "self": true } })).await;
    a.publish("room", json!({ "from": "a" })).await;
    a.hears("room", json!({ "from": "a" })).await;
    b.publish("room", json!({ "from": "b" })).await;
    b.hears("room", json!({ "from": "b" })).await;
    a.expect_nothing().await;
    for server in [&one, &two] {
        assert_eq!(server.metric("tidegate_connections_accepted_total").await, 1.0);
        assert_eq!(server.metric("tidegate_deliveries_total").await, 1.0);
    }
    a.close().await;
    one.stop().await;
    // The end of one is not the other's.
    b.publish("room", json!({ "from": "b" })).await;
    b.hears("room", json!({ "from": "b" })).await;
    b.close().await;
    two.stop().await;
}

/// The moment between reply and subscription is short: it takes many joins, and a publisher that
/// does nothing else, to hit it. Each join is a fresh socket's, so that no fan-out knows it yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reply_precedes_every_broadcast_however_many_are_sent() {
    let gateway = Gateway::new(config()).unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let mut publishing = JoinSet::new();
    let (hub, over) = (Arc::clone(&gateway.hub), Arc::clone(&is_over));
    publishing.spawn(async move {
        let key = TopicKey { sub_topic: "room".into(), privacy: Privacy::Public };
        let broadcasts = [Broadcast::Envelope(Json::EMPTY)];
        let (source, first, to) = (BroadcastSource::Socket, Some(&key), To::All);
        let fan_out = FanOut {
            source,
            first,
            spellings: &[],
            broadcasts: &broadcasts,
            committed: None,
            to,
            too_slow: TooSlow::LosesChannel,
        };
        let mut deliveries = 0;
        while !over.load(Ordering::Relaxed) {
            deliveries += hub.fan_out(fan_out).await.deliveries;
        }
        deliveries
    });
    let token = gateway.auth.verify_at(&token::of_role("anon"), unix_now()).unwrap();
    let mut early = None;
    for _ in 0..20_000 {
        let outbox = Arc::new(Outbox::new(Serializer::V2, &OutboxBounds::new(1 << 20, usize::MAX)));
        let mut socket = Socket::new(
            Arc::clone(&gateway.socket),
            Arc::clone(&outbox),
            Arc::clone(&token),
            client_key(),
            caller(),
        );
        let frame = Frame::text(join("1", "realtime:room").to_string());
        socket.handle([Serializer::V2.decode(frame).unwrap()]).await;
        let mut batch = VecDeque::new();
        outbox.drain(&mut batch).await.unwrap();
        let first = batch.into_iter().next().map(|queued| queued.frame);
        early = first.filter(|frame| !frame.to_text().unwrap().contains("phx_reply"));
        if early.is_some() {
            break;
        }
    }
    // Before any assertion: the publisher never pauses.
    is_over.store(true, Ordering::Relaxed);
    assert!(publishing.join_all().await[0] > 0, "nobody was published to");
    assert_eq!(early, None, "before the reply");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reply_precedes_every_broadcast_on_the_wire_too() {
    let server = TestServer::start();
    let mut publishers = JoinSet::new();
    for _ in 0..2 {
        let mut publisher = Client::connect(&server, Serializer::V2).await;
        publisher.join_with("room", json!({ "broadcast": { "ack": true } })).await;
        publishers.spawn(async move {
            // Ends when the test aborts it. Its own acknowledgements pace it.
            loop {
                publisher.publish("room", json!({ "n": 1 })).await;
                while publisher.message().await[3] != "phx_reply" {}
            }
        });
    }
    for round in 0..100 {
        let serializer = if round % 2 == 0 { Serializer::V1 } else { Serializer::V2 };
        let mut client = Client::connect(&server, serializer).await;
        client.send(join("1", "realtime:room")).await;
        client.expect(ok("1", "realtime:room")).await;
        client.hears("room", json!({ "n": 1 })).await;
        client.close().await;
    }
    publishers.shutdown().await;
    server.stop().await;
}

#[tokio::test]
async fn the_last_channel_is_joined_and_one_more_is_refused() {
    let mut config = config();
    config.protocol.error_delay = Duration::from_millis(400);
    assert_eq!(config.limits.channels_per_socket_max, 500);
    let server = TestServer::start_with(config);
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join_with("room", json!({ "broadcast": { "self": true } })).await;
    let mut client = Client::connect(&server, Serializer::V2).await;
    for number in 0..1000 {
        client.send(join(&number.to_string(), &format!("realtime:t{number}"))).await;
    }
    for number in 0..500 {
        client.expect(ok(&number.to_string(), &format!("realtime:t{number}"))).await;
    }
    // The refusals wait; nothing else does.
    client.expect_nothing().await;
    other.publish("room", json!({ "n": 1 })).await;
    other.hears("room", json!({ "n": 1 })).await;
    let reason = "ChannelRateLimitReached: Too many channels";
    for number in 500..1000 {
        client.expect(refused(&number.to_string(), &format!("realtime:t{number}"), reason)).await;
    }
    assert_eq!(server.metric("tidegate_channels").await, 501.0);
    let series = "tidegate_joins_total{code=\"ChannelRateLimitReached\",result=\"error\"}";
    assert_eq!(server.metric(series).await, 500.0);
    // The first and the last of them hear; a refused one does not.
    for number in [500, 0, 499] {
        server.publish(&format!("t{number}"), &json!({ "n": number })).await;
    }
    client.hears("t0", json!({ "n": 0 })).await;
    client.hears("t499", json!({ "n": 499 })).await;
    client.close().await;
    other.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_re_join_at_the_limit_takes_no_further_place() {
    let mut config = config();
    config.limits.channels_per_socket_max = 2;
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.join("a").await;
    let old = client.join("b").await;
    let new = client.join("b").await;
    client.expect(json!([old, old, "realtime:b", "phx_close", {}])).await;
    client.send(json!([new, "9", "realtime:b", "phx_leave", {}])).await;
    let left = json!({ "status": "ok", "response": {} });
    client.expect(json!([new, "9", "realtime:b", "phx_reply", left])).await;
    client.expect(json!([new, new, "realtime:b", "phx_close", {}])).await;
    client.join("c").await;
    client.close().await;
    server.stop().await;
}

/// The limit counts joined channels (H-4); a refused join is none, also while its refusal waits.
#[tokio::test]
async fn a_refusal_that_waits_takes_no_channels_place() {
    let mut config = config();
    config.limits.channels_per_socket_max = 2;
    config.protocol.error_delay = Duration::from_millis(300);
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.join("a").await;
    client.send(bad_join("1", "realtime:bad")).await;
    client.send(join("2", "realtime:b")).await;
    client.expect(ok("2", "realtime:b")).await;
    client.expect(refused("1", "realtime:bad", MALFORMED)).await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_refusal_that_waits_holds_up_its_own_topic_and_no_other() {
    let mut config = config();
    config.protocol.error_delay = Duration::from_millis(400);
    let server = TestServer::start_with(config);
    for serializer in [Serializer::V1, Serializer::V2] {
        let mut client = Client::connect(&server, serializer).await;
        client.send(bad_join("1", "realtime:bad")).await;
        client.send(json!(["1", "2", "realtime:bad", "broadcast", {}])).await;
        client.send(join("3", "realtime:bad")).await;
        client.join_with("good", json!({ "broadcast": { "self": true } })).await;
        client.publish("good", json!({ "n": 1 })).await;
        client.hears("good", json!({ "n": 1 })).await;
        client.send(json!([null, "4", "realtime:nowhere", "broadcast", {}])).await;
        client.expect(unmatched("4", "realtime:nowhere")).await;
        client.expect_nothing().await;
        // Then its own topic, in its own order: the join after the refused one is served.
        client.expect(refused("1", "realtime:bad", MALFORMED)).await;
        client.expect(unmatched("2", "realtime:bad")).await;
        client.expect(ok("3", "realtime:bad")).await;
        server.publish("bad", &json!({ "n": 2 })).await;
        client.hears("bad", json!({ "n": 2 })).await;
        client.close().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_hundred_messages_wait_for_a_refusal_and_the_next_is_dropped() {
    let mut config = config();
    config.protocol.error_delay = Duration::from_millis(400);
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.send(bad_join("j", "realtime:full")).await;
    client.send(bad_join("j", "realtime:over")).await;
    for number in 0..101 {
        let reference = number.to_string();
        if number < 100 {
            client.send(json!(["j", reference, "realtime:full", "broadcast", {}])).await;
        }
        client.send(json!(["j", reference, "realtime:over", "broadcast", {}])).await;
    }
    client.expect_nothing().await;
    for topic in ["realtime:full", "realtime:over"] {
        client.expect(refused("j", topic, MALFORMED)).await;
        for number in 0..100 {
            client.expect(unmatched(&number.to_string(), topic)).await;
        }
    }
    client.expect_nothing().await;
    assert_eq!(server.metric("tidegate_dropped_total{reason=\"backlog\"}").await, 1.0);
    client.close().await;
    server.stop().await;
}

/// The delay is a courtesy; as many refusals wait as there may be channels, and no more.
#[tokio::test]
async fn one_refusal_too_many_to_wait_is_sent_at_once() {
    let mut config = config();
    config.limits.channels_per_socket_max = 2;
    config.protocol.error_delay = Duration::from_millis(500);
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.join("a").await;
    client.join("b").await;
    for reference in ["1", "2", "3"] {
        client.send(bad_join(reference, &format!("realtime:bad{reference}"))).await;
    }
    for reference in ["3", "1", "2"] {
        let topic = format!("realtime:bad{reference}");
        // The bound is looked at before the token.
        let reason = "ChannelRateLimitReached: Too many channels";
        client.expect(refused(reference, &topic, reason)).await;
    }
    client.ends().await;
    server.stop().await;
}

const CACHE: &str = "cache_invalidate_AB3028";
/// Of a rule that listens, too, and merges nothing.
const PLAIN: &str = "plain_AB3028";

/// A server whose database does not answer: a join of a topic that is relayed waits for its
/// LISTEN, in vain.
fn without_a_link(no_channel_timeout: Duration) -> TestServer {
    let mut config = config();
    config.database_url = Secret::from("postgres://nobody@127.0.0.1:1/none");
    config.relay.listen_wait = Duration::from_millis(400);
    config.limits.no_channel_timeout = no_channel_timeout;
    config.topic.push(plain_rule());
    TestServer::start_with(config)
}

#[tokio::test]
async fn a_join_that_waits_for_its_listen_holds_up_its_own_topic_and_no_other() {
    let server = without_a_link(Duration::from_secs(600));
    let service = token::of_role("service_role");
    let mut client = Client::with_token(&server, Serializer::V2, &service).await;
    let topic = format!("realtime:{CACHE}");
    let config = json!({ "broadcast": { "ack": true, "self": true } });
    client.send(json!(["1", "1", topic, "phx_join", { "config": config }])).await;
    client.send(json!(["1", "2", topic, "broadcast", { "type": "broadcast", "n": 1 }])).await;
    client.send(json!(["3", "3", topic, "phx_join", { "config": config }])).await;
    client.send(json!(["3", "4", topic, "broadcast", { "type": "broadcast", "n": 2 }])).await;
    client.send(json!(["3", "5", topic, "phx_leave", {}])).await;
    client.join_with("room", json!({ "broadcast": { "self": true } })).await;
    client.publish("room", json!({ "n": 1 })).await;
    client.hears("room", json!({ "n": 1 })).await;
    client.expect_nothing().await;
    // A channel that waits is none that hears.
    server.publish(CACHE, &json!({ "n": 0 })).await;
    let done = json!({ "status": "ok", "response": {} });
    let heard = |n: u64| json!([null, null, topic, "broadcast", { "type": "broadcast", "n": n }]);
    // The catch-up follows its reply before anything else.
    client.expect(ok("1", &topic)).await;
    client.caught_up(CACHE).await;
    client.expect(heard(1)).await;
    client.expect(json!(["1", "2", topic, "phx_reply", done])).await;
    client.expect(ok("3", &topic)).await;
    client.caught_up(CACHE).await;
    for expected in [
        json!(["1", "1", topic, "phx_close", {}]),
        heard(2),
        json!(["3", "4", topic, "phx_reply", done]),
        json!(["3", "5", topic, "phx_reply", done]),
        json!(["3", "3", topic, "phx_close", {}]),
    ] {
        client.expect(expected).await;
    }
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_re_join_that_waits_for_its_listen_neither_misses_nor_repeats_a_broadcast() {
    let server = without_a_link(Duration::from_secs(600));
    let mut client = Client::connect(&server, Serializer::V1).await;
    let old = client.join(PLAIN).await;
    let topic = format!("realtime:{PLAIN}");
    client.send(join("new", &topic)).await;
    client.expect_nothing().await;
    let mut heard = Vec::new();
    for number in 0..5 {
        server.publish(PLAIN, &json!({ "n": number })).await;
    }
    loop {
        let message = client.message().await;
        match message[3].as_str().unwrap() {
            "broadcast" => heard.push(message[4]["payload"]["n"].clone()),
            "phx_reply" => {
                assert_eq!(message, json!([null, "new", topic, "phx_reply", ok("", "")[4]]));
            }
            _ => {
                assert_eq!(message, json!([null, old, topic, "phx_close", {}]));
                break;
            }
        }
    }
    assert_eq!(heard, [0, 1, 2, 3, 4].map(Value::from));
    server.publish(PLAIN, &json!({ "n": 5 })).await;
    client.hears(PLAIN, json!({ "n": 5 })).await;
    client.ends().await;
    server.stop().await;
}

/// Its channels have not all gone: one is about to open.
#[tokio::test]
async fn a_socket_whose_join_waits_is_not_closed_for_having_no_channel() {
    let server = without_a_link(Duration::from_millis(200));
    let mut client = Client::connect(&server, Serializer::V2).await;
    let joined = client.join("room").await;
    client.send(json!([joined, "l", "realtime:room", "phx_leave", {}])).await;
    let done = json!({ "status": "ok", "response": {} });
    client.expect(json!([joined, "l", "realtime:room", "phx_reply", done])).await;
    client.expect(json!([joined, joined, "realtime:room", "phx_close", {}])).await;
    client.join(CACHE).await;
    client.ends().await;
    server.stop().await;
}

/// Production clients re-join a topic on every refresh of their data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_re_join_neither_misses_nor_repeats_a_broadcast() {
    const COUNT: u64 = 1500;
    let server = TestServer::start();
    let mut publisher = Client::connect(&server, Serializer::V2).await;
    publisher.join("room").await;
    let mut clients = JoinSet::new();
    for serializer in [Serializer::V1, Serializer::V2] {
        let mut client = Client::connect(&server, serializer).await;
        let mut joined = client.join("room").await;
        clients.spawn(async move {
            let (mut heard, mut asked, mut closed) = (0, 0, 0);
            while heard < COUNT {
                if heard / 20 > asked {
                    asked += 1;
                    let reference = format!("again{asked}");
                    client.send(join(&reference, "realtime:room")).await;
                }
                let message = client.message().await;
                match message[3].as_str().unwrap() {
                    "broadcast" => {
                        assert_eq!(message[4]["payload"]["n"], heard, "each once, in order");
                        heard += 1;
                    }
                    "phx_reply" => assert_eq!(message[4]["status"], "ok", "{message}"),
                    "phx_close" => {
                        assert_eq!(message[1], joined, "each channel in its turn");
                        closed += 1;
                        joined = format!("again{closed}");
                    }
                    event => panic!("{event}"),
                }
            }
            // The rest of the re-joins' answers.
            while closed < asked {
                let message = client.message().await;
                assert_ne!(message[3], "broadcast", "{message}");
                closed += u64::from(message[3] == "phx_close");
            }
            client.close().await;
            asked
        });
    }
    for number in 0..COUNT {
        publisher.publish("room", json!({ "n": number })).await;
    }
    let re_joins = clients.join_all().await;
    assert!(re_joins.iter().all(|count| *count >= 70), "{re_joins:?}");
    publisher.close().await;
    server.stop().await;
}

/// A join that is refused ends what it would have replaced (C-18).
#[tokio::test]
async fn a_refused_re_join_ends_the_channel_at_once() {
    let mut config = config();
    config.protocol.error_delay = Duration::from_millis(200);
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    let old = client.join("room").await;
    client.send(bad_join("1", "realtime:room")).await;
    client.expect_nothing().await;
    server.publish("room", &json!({ "n": 1 })).await;
    client.expect(refused("1", "realtime:room", MALFORMED)).await;
    client.expect(json!([old, old, "realtime:room", "phx_close", {}])).await;
    client.expect_nothing().await;
    assert_eq!(server.metric("tidegate_topics").await, 0.0);
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn who_joins_during_a_drain_is_told_that_the_server_restarts() {
    let gateway = Gateway::new(config()).unwrap();
    gateway.draining.cancel();
    let outbox = Arc::new(Outbox::new(Serializer::V2, &OutboxBounds::new(1 << 20, usize::MAX)));
    let token = gateway.auth.verify_at(&token::of_role("anon"), unix_now()).unwrap();
    let mut socket = Socket::new(
        Arc::clone(&gateway.socket),
        Arc::clone(&outbox),
        token,
        client_key(),
        caller(),
    );
    let frame = Frame::text(join("1", "realtime:room").to_string());
    socket.handle([Serializer::V2.decode(frame).unwrap()]).await;
    let due = socket.due().await;
    socket.answer(due).await;
    let mut batch = VecDeque::new();
    outbox.drain(&mut batch).await.unwrap();
    let batch = Vec::from(batch);
    let [Queued { frame: Frame::Text(text), .. }] = batch.as_slice() else { panic!("{batch:?}") };
    let reason = "RealtimeRestarting: Realtime is restarting, please standby";
    let expected = refused("1", "realtime:room", reason);
    assert_eq!(serde_json::from_str::<Value>(text).unwrap(), expected);
}

const PERSON: &str = "0b0f7c1e-3a52-4a55-9d3f-0c8a7a5e9a01";
const OTHER: &str = "0b0f7c1e-3a52-4a55-9d3f-0c8a7a5e9a02";
const EVENT: &str = "7d1c1f64-55a8-4f3e-8a38-64d8f9a3b103";

/// Who hears which topic: the join is answered `ok` to all of these, and only those whose claims
/// the rule names are delivered to.
#[tokio::test]
async fn a_rules_topic_is_delivered_to_those_whose_claims_it_names() {
    let server = TestServer::start();
    let authenticated = |mut claims: Value| {
        claims["role"] = "authenticated".into();
        token::with_claims(claims)
    };
    let anon = token::of_role("anon");
    let service = token::of_role("service_role");
    let person = authenticated(json!({ "person_id": PERSON }));
    let nobody = authenticated(json!({ "person_id": null }));
    let producer = authenticated(json!({ "admin_events": { "AB3028": "producer" } }));
    let voting = authenticated(json!({ "admin_events": { "AB3028": "voting", "AB1": "super" } }));
    let unknown = authenticated(json!({ "admin_events": { "AB3028": "viewer" } }));
    let shapes = authenticated(json!({ "admin_events": "AB3028", "person_id": [PERSON] }));
    let offers = |person: &str| format!("event_offers_{EVENT}_{person}");
    let notifications = |person: &str| format!("offer_notifications_{EVENT}_{person}");
    for (topic, token, is_delivered) in [
        (offers(PERSON), &person, true),
        (offers(OTHER), &person, false),
        // The event's id is no person's.
        (format!("event_offers_{PERSON}_{OTHER}"), &person, false),
        (offers(PERSON), &nobody, false),
        (offers(PERSON), &anon, false),
        (offers(PERSON), &shapes, false),
        (offers(OTHER), &service, true),
        (notifications(PERSON), &person, true),
        (notifications(OTHER), &person, false),
        ("admin-auction-AB3028".to_owned(), &producer, true),
        ("admin-voting-AB3028".to_owned(), &producer, true),
        ("admin-auction-AB3029".to_owned(), &producer, false),
        ("admin-auction-AB302".to_owned(), &producer, false),
        ("admin-auction-AB3028".to_owned(), &voting, true),
        ("admin-voting-AB1".to_owned(), &voting, true),
        ("admin-auction-AB3028".to_owned(), &unknown, false),
        ("admin-auction-AB3028".to_owned(), &shapes, false),
        ("admin-auction-AB3028".to_owned(), &anon, false),
        ("cache_invalidate_AB3028".to_owned(), &anon, true),
        ("auction_winner_AB3028".to_owned(), &nobody, true),
    ] {
        let mut client = Client::with_token(&server, Serializer::V1, token).await;
        client.join(&topic).await;
        server.publish(&topic, &json!({ "n": 1 })).await;
        if is_delivered {
            client.hears(&topic, json!({ "n": 1 })).await;
        }
        client.expect_nothing().await;
        client.close().await;
    }
    let joins = |result: &str| format!("tidegate_joins_total{{code=\"\",result=\"{result}\"}}");
    assert_eq!(server.metric(&joins("ok")).await, 9.0);
    assert_eq!(server.metric(&joins("withheld")).await, 11.0);
    server.stop().await;
}
