//! What no well-behaved client does, and what becomes of the others meanwhile: nothing.

use std::time::Duration;

use serde_json::{Value, json};
use strum::VariantArray;
use tidegate::{
    protocol::{message::Malformed, serializer::Serializer},
    server::Config,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::{Client, encode},
    raw::frame,
    server::{DEADLINE, TestServer, config, plain_rule},
    token,
};

/// A server with somebody else on it, who must not notice anything.
struct Beside {
    server: TestServer,
    other: Client,
}

impl Beside {
    async fn start() -> Self {
        Self::start_with(config()).await
    }

    async fn start_with(config: Config) -> Self {
        let server = TestServer::start_with(config);
        let mut other = Client::connect(&server, Serializer::V2).await;
        other.join_with("room", json!({ "broadcast": { "self": true } })).await;
        Self { server, other }
    }

    async fn connect(&self) -> Client {
        Client::connect(&self.server, Serializer::V2).await
    }

    async fn malformed(&self, reason: &str) -> f64 {
        self.server.metric(&format!("tidegate_malformed_total{{reason=\"{reason}\"}}")).await
    }

    async fn closed(&self, reason: &str, code: &str) -> f64 {
        let labels = format!("code=\"{code}\",reason=\"{reason}\"");
        self.server.metric(&format!("tidegate_connections_closed_total{{{labels}}}")).await
    }

    /// Ends the test: the other still sends and hears.
    async fn stop(mut self) {
        self.other.publish("room", json!({ "n": 1 })).await;
        self.other.hears("room", json!({ "n": 1 })).await;
        self.other.close().await;
        self.server.stop().await;
    }
}

/// A kind 3 frame with these lengths of `join_ref`, ref, topic, event and metadata.
fn push(lengths: [u8; 5], encoding: u8, rest: &[u8]) -> Frame {
    Frame::binary([&[3], &lengths[..], &[encoding], rest].concat())
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table, one case a line")]
async fn every_malformed_frame_is_counted_by_its_reason_and_met_with_silence() {
    let beside = Beside::start().await;
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let long = "x".repeat(256);
    let cases = [
        (Serializer::V2, Frame::text("nonsense"), "not_json"),
        (Serializer::V2, Frame::text(""), "not_json"),
        (Serializer::V2, Frame::text("[null,\"1\",\"phoenix\",\"heartbeat\",{}"), "not_json"),
        (Serializer::V2, Frame::text("[null,\"1\",\"phoenix\",\"heartbeat\",{}] x"), "not_json"),
        (Serializer::V2, push([0; 5], 1, b"{"), "not_json"),
        (Serializer::V2, push([0; 5], 1, b""), "not_json"),
        (Serializer::V1, Frame::text("nonsense"), "not_json"),
        (Serializer::V1, Frame::binary(vec![0xff, 0xfe]), "not_json"),
        (Serializer::V2, Frame::text("{}"), "wrong_shape"),
        (Serializer::V2, Frame::text("null"), "wrong_shape"),
        (Serializer::V2, Frame::text("[]"), "wrong_shape"),
        (Serializer::V2, Frame::text("[null,\"1\",\"phoenix\",\"heartbeat\"]"), "wrong_shape"),
        (Serializer::V2, Frame::text("[null,\"1\",7,\"heartbeat\",{}]"), "wrong_shape"),
        (Serializer::V2, Frame::text("[null,{},\"phoenix\",\"heartbeat\",{}]"), "wrong_shape"),
        (
            Serializer::V2,
            Frame::text(format!("[null,\"1\",\"phoenix\",\"heartbeat\",{}]", deep(129))),
            "wrong_shape",
        ),
        (Serializer::V1, Frame::text("[null,\"1\",\"phoenix\",\"heartbeat\",{}]"), "wrong_shape"),
        (
            Serializer::V1,
            Frame::text(r#"{"topic":"phoenix","event":"heartbeat","payload":{}}"#),
            "wrong_shape",
        ),
        (
            Serializer::V1,
            Frame::text(r#"{"topic":"phoenix","event":"heartbeat","ref":"1"}"#),
            "wrong_shape",
        ),
        (
            Serializer::V1,
            Frame::text(r#"{"topic":1,"event":"heartbeat","payload":{},"ref":"1"}"#),
            "wrong_shape",
        ),
        (Serializer::V2, Frame::binary(vec![]), "truncated"),
        (Serializer::V2, Frame::binary(vec![3, 0, 0, 0]), "truncated"),
        (Serializer::V2, push([1, 1, 9, 1, 0], 0, b"12short"), "truncated"),
        (Serializer::V2, Frame::binary(vec![0; 20]), "unknown_kind"),
        (Serializer::V2, Frame::binary(vec![4; 20]), "unknown_kind"),
        (Serializer::V2, Frame::binary(vec![255]), "unknown_kind"),
        (Serializer::V2, push([0, 0, 2, 0, 0], 0, &[0xff, 0xfe]), "not_utf8"),
        (Serializer::V2, push([0, 0, 0, 1, 0], 0, &[0xc3]), "not_utf8"),
        (Serializer::V2, push([0, 0, 0, 0, 2], 0, b"[]"), "metadata"),
        (Serializer::V2, push([0, 0, 0, 0, 1], 0, b"{"), "metadata"),
        (Serializer::V2, Frame::text(format!("[null,\"1\",\"{long}\",\"e\",{{}}]")), "too_long"),
        (Serializer::V2, Frame::text(format!("[null,\"1\",\"t\",\"{long}\",{{}}]")), "too_long"),
        (Serializer::V2, Frame::text(format!("[null,\"{long}\",\"t\",\"e\",{{}}]")), "too_long"),
        (Serializer::V2, Frame::text(format!("[\"{long}\",\"1\",\"t\",\"e\",{{}}]")), "too_long"),
        (
            Serializer::V1,
            Frame::text(format!(r#"{{"topic":"{long}","event":"e","payload":{{}},"ref":"1"}}"#)),
            "too_long",
        ),
    ];
    let mut v1 = Client::connect(&beside.server, Serializer::V1).await;
    let mut v2 = beside.connect().await;
    let mut counts = std::collections::HashMap::new();
    for (serializer, frame, reason) in cases {
        let client = if serializer == Serializer::V1 { &mut v1 } else { &mut v2 };
        let shown = format!("{frame:?}");
        client.send_frame(frame).await;
        client.expect_nothing().await;
        let count = counts.entry(reason).or_insert(0.0);
        *count += 1.0;
        assert_eq!(beside.malformed(reason).await, *count, "{reason}: {shown}");
    }
    for malformed in Malformed::VARIANTS {
        let count = counts.remove(malformed.label()).unwrap_or_default();
        assert!(count > 0.0, "{} has a case", malformed.label());
        assert_eq!(beside.malformed(malformed.label()).await, count, "{}", malformed.label());
    }
    v1.close().await;
    v2.close().await;
    beside.stop().await;
}

/// Every event that a client sends, as V2 writes it, for topics that nobody else has joined.
fn good_messages() -> Vec<Value> {
    let envelope =
        json!({ "type": "broadcast", "event": "e", "payload": { "a": [1.5, "é", null] } });
    let config = json!({ "broadcast": { "self": true, "ack": true }, "presence": { "key": "k" } });
    vec![
        json!([null, "1", "phoenix", "heartbeat", {}]),
        json!(["2", "2", "realtime:changed", "phx_join", { "config": config }]),
        json!(["3", "3", "realtime:changed", "broadcast", envelope]),
        json!(["4", "4", "realtime:changed", "access_token", { "access_token": "a.b.c" }]),
        json!(["5", "5", "realtime:changed", "presence", { "event": "track", "payload": {} }]),
        json!(["6", "6", "realtime:cache_invalidate_AB1", "phx_join", { "config": {} }]),
        json!(["7", "7", "realtime:changed", "phx_leave", {}]),
    ]
}

/// A frame that is changed at one to three places: a byte replaced, taken out, put in or repeated,
/// or the rest cut off.
fn changed(random: &mut fastrand::Rng, mut bytes: Vec<u8>) -> Vec<u8> {
    for _ in 0..random.usize(1..=3) {
        if bytes.is_empty() {
            break;
        }
        let at = random.usize(..bytes.len());
        match random.usize(..20) {
            0 => bytes.truncate(at),
            1..=6 => bytes[at] = random.u8(..),
            // A letter leaves most frames a frame.
            7..=12 => bytes[at] = random.alphanumeric() as u8,
            13..=15 => drop(bytes.remove(at)),
            16..=17 => bytes.insert(at, random.u8(..)),
            _ => bytes.insert(at, bytes[at]),
        }
    }
    bytes
}

/// Reads whatever has arrived until the answer to a heartbeat of this ref.
async fn skip_to_heartbeat(client: &mut Client, reference: &str) {
    client.send(json!([null, reference, "phoenix", "heartbeat", {}])).await;
    loop {
        match client.frame().await {
            Frame::Text(text) if text.contains(reference) => break,
            Frame::Text(_) | Frame::Binary(_) => {}
            frame => panic!("{frame:?}"),
        }
    }
}

/// Good frames are changed a little, so that many pass the decoder and reach what is behind it.
#[tokio::test]
async fn random_frames_are_counted_and_harm_nobody() {
    const ROUNDS: usize = 60;
    let beside = Beside::start().await;
    let mut random = fastrand::Rng::with_seed(11);
    let binary = |encoding: u8, payload: &[u8]| {
        [&[3, 1, 1, 16, 1, 2, encoding], &b"33realtime:changede{}"[..], payload].concat()
    };
    let long = format!(r#"{{"text":"{}"}}"#, "x".repeat(200));
    let binaries = vec![binary(1, long.as_bytes()), binary(0, &[0xff; 200]), binary(1, b"{}")];
    let good_of = |serializer: Serializer| {
        good_messages().into_iter().map(move |message| encode(serializer, &message).into_bytes())
    };
    let joined = good_messages()[1].clone();
    let mut before = 0.0;
    for (serializer, is_text, good) in [
        (Serializer::V1, true, good_of(Serializer::V1).collect::<Vec<_>>()),
        (Serializer::V2, true, good_of(Serializer::V2).collect()),
        (Serializer::V2, false, binaries),
    ] {
        let mut client = Client::connect(&beside.server, serializer).await;
        let mut sent = 0;
        for round in 0..ROUNDS {
            client.send(joined.clone()).await;
            for frame in &good {
                let bytes = changed(&mut random, frame.clone());
                client
                    .send_frame(if is_text {
                        Frame::text(String::from_utf8_lossy(&bytes).into_owned())
                    } else {
                        Frame::binary(bytes)
                    })
                    .await;
                sent += 1;
            }
            // Far from any frame: none of it passes.
            let length = random.usize(..200);
            let bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
            client.send_frame(Frame::text(String::from_utf8_lossy(&bytes).into_owned())).await;
            skip_to_heartbeat(&mut client, &format!("the-end-of-{round}")).await;
        }
        let mut malformed = 0.0;
        for reason in Malformed::VARIANTS {
            malformed += beside.malformed(reason.label()).await;
        }
        let refused = malformed - before - f64::from(u32::try_from(ROUNDS).unwrap());
        before = malformed;
        // Both sides of the decoder are tried.
        let share = refused / f64::from(sent);
        assert!(
            (0.15..0.85).contains(&share),
            "{share} of {sent} refused, {serializer:?} {is_text}"
        );
        client.close().await;
    }
    beside.stop().await;
}

/// The worst payload for a parser that makes a tree of it.
#[tokio::test]
async fn a_join_of_four_megabytes_is_refused_by_name_and_the_socket_goes_on() {
    let beside = Beside::start().await;
    let too_large = "tidegate_dropped_total{reason=\"too_large\"}";
    for (round, serializer) in [Serializer::V1, Serializer::V2].into_iter().enumerate() {
        let mut client = Client::connect(&beside.server, serializer).await;
        let heard = client.join("room").await;
        let payload = |count| {
            let config = json!({ "postgres_changes": vec![json!({}); count] });
            json!({ "config": config, "access_token": "x" })
        };
        let (huge, large) = (payload(1_400_000), payload(22_000));
        client.send(json!(["7", "7", "realtime:other", "phx_join", huge])).await;
        let reason = "InvalidJoinPayload: the payload is larger than 64 KiB";
        let error = json!({ "status": "error", "response": { "reason": reason } });
        client.expect(json!(["7", "7", "realtime:other", "phx_reply", error])).await;
        for event in ["access_token", "presence", "unknown", "phx_leave"] {
            client.send(json!([heard, "8", "realtime:room", event, large])).await;
            let error = json!({ "status": "error", "response": "payload_size_exceeded" });
            client.expect(json!([heard, "8", "realtime:room", "phx_reply", error])).await;
        }
        client.send(json!([heard, null, "realtime:room", "access_token", large])).await;
        client.expect_nothing().await;
        assert_eq!(beside.server.metric(too_large).await, 5.0 * (round as f64 + 1.0));
        beside.server.publish("room", &json!({ "n": 1 })).await;
        client.hears("room", json!({ "n": 1 })).await;
        client.close().await;
    }
    let refused = "tidegate_joins_total{code=\"InvalidJoinPayload\",result=\"error\"}";
    assert_eq!(beside.server.metric(refused).await, 2.0);
    beside.stop().await;
}

#[tokio::test]
async fn fields_of_255_bytes_are_carried_and_deep_payloads_of_128_levels_too() {
    let mut beside = Beside::start().await;
    let mut client = beside.connect().await;
    let sub_topic = "t".repeat(255 - "realtime:".len());
    let long = "r".repeat(255);
    let topic = format!("realtime:{sub_topic}");
    client.send(json!([long, long, topic, "phx_join", { "config": {} }])).await;
    let ok = json!({ "status": "ok", "response": { "postgres_changes": [] } });
    client.expect(json!([long, long, topic, "phx_reply", ok])).await;
    beside.server.publish(&sub_topic, &json!({ "n": 1 })).await;
    client.hears(&sub_topic, json!({ "n": 1 })).await;
    client.send(json!([null, "1", topic, long, {}])).await;
    client.expect_nothing().await;
    assert_eq!(beside.server.metric("tidegate_dropped_total{reason=\"unknown_event\"}").await, 1.0);

    client.join("room").await;
    // The envelope is one level and its payload another.
    let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
    let broadcast = |depth: usize| {
        let payload =
            format!("{{\"type\":\"broadcast\",\"event\":\"e\",\"payload\":{}}}", nested(depth));
        Frame::text(format!("[null,null,\"realtime:room\",\"broadcast\",{payload}]"))
    };
    client.send_frame(broadcast(127)).await;
    let Frame::Text(heard) = beside.other.frame().await else { panic!("text") };
    assert!(heard.contains(&nested(127)), "carried as it came");
    for depth in [128, 100_000] {
        client.send_frame(broadcast(depth)).await;
    }
    client.expect_nothing().await;
    assert_eq!(beside.malformed("wrong_shape").await, 2.0);
    client.close().await;
    beside.stop().await;
}

#[tokio::test]
async fn an_unknown_event_is_dropped_and_counted_and_the_channel_lives() {
    let beside = Beside::start().await;
    let mut client = beside.connect().await;
    let joined = client.join_with("t", json!({ "broadcast": { "self": true } })).await;
    for event in
        ["", "phx_reply", "phx_close", "phx_error", "heartbeat", "PHX_JOIN", "postgres_changes"]
    {
        client.send(json!([joined, "1", "realtime:t", event, {}])).await;
        client.expect_nothing().await;
    }
    client.publish("t", json!({ "n": 1 })).await;
    client.hears("t", json!({ "n": 1 })).await;
    assert_eq!(beside.server.metric("tidegate_dropped_total{reason=\"unknown_event\"}").await, 7.0);
    client.close().await;
    beside.stop().await;
}

#[tokio::test]
async fn what_breaks_the_websocket_protocol_closes_with_its_code() {
    let beside = Beside::start().await;
    let unmasked = b"\x81\x02{}".to_vec();
    let cases = [
        ("unmasked", unmasked, 1002),
        ("a reserved bit", frame(0xc1, b"{}"), 1002),
        ("an unknown opcode", frame(0x83, b"{}"), 1002),
        ("a continuation of nothing", frame(0x80, b"{}"), 1002),
        ("a fragmented ping", frame(0x09, b"{}"), 1002),
        ("a ping of 126 bytes", frame(0x89, &[0; 126]), 1002),
        ("a text within a text", [frame(0x01, b"["), frame(0x81, b"{}")].concat(), 1002),
        ("no UTF-8", frame(0x81, b"[null,\"\xff\"]"), 1007),
        ("half a character at the end", frame(0x81, b"\"\xc3"), 1007),
        ("no UTF-8 in a fragment", frame(0x01, b"\xc0\xaf"), 1007),
    ];
    let count = cases.len();
    for (what, bytes, code) in cases {
        let mut client = beside.connect().await;
        client.stream().write_all(&bytes).await.unwrap();
        assert_eq!(client.closed().await, Some(code), "{what}");
    }
    // A character may be cut by a fragment's end.
    let mut client = beside.connect().await;
    let beat = "[null,\"é\",\"phoenix\",\"heartbeat\",{}]".as_bytes();
    let packet = [frame(0x01, &beat[..8]), frame(0x89, b"now"), frame(0x80, &beat[8..])].concat();
    client.stream().write_all(&packet).await.unwrap();
    let ok = json!({ "status": "ok", "response": {} });
    client.expect(json!([null, "é", "phoenix", "phx_reply", ok])).await;
    client.close().await;
    let protocol = beside.closed("protocol", "1002").await;
    let utf8 = beside.closed("invalid_utf8", "1007").await;
    assert_eq!((protocol, utf8, count), (7.0, 3.0, 10));
    beside.stop().await;
}

/// 90 s unless set otherwise; here as short as a test's patience.
fn impatient() -> Config {
    let mut config = config();
    config.limits.silence_timeout = Duration::from_millis(400);
    config
}

/// The code of the close frame that the server sends on this stream, pongs before it skipped.
async fn close_code(client: &mut Client, ping: bool) -> u16 {
    let stream = client.stream();
    let mut bytes = Vec::new();
    let closing = async {
        loop {
            if ping {
                // The server may have closed meanwhile.
                drop(stream.write_all(&frame(0x89, b"p")).await);
            }
            let mut head = [0; 2];
            stream.read_exact(&mut head).await.expect("a frame");
            bytes.resize(usize::from(head[1]), 0);
            stream.read_exact(&mut bytes).await.expect("its payload");
            match head[0] {
                0x8a => assert_eq!(bytes, b"p", "a ping is answered"),
                0x88 => return u16::from_be_bytes([bytes[0], bytes[1]]),
                other => panic!("{other:#x}"),
            }
        }
    };
    timeout(DEADLINE, closing).await.expect("a close in time")
}

#[tokio::test]
async fn silence_is_closed_with_1000_whatever_else_the_peer_does() {
    let server = TestServer::start_with(impatient());
    // Not a frame; half a head; half a frame; half a message, of whole frames; pings only.
    let half_message = [frame(0x01, b"[null,"), frame(0x00, b"\"1\",")].concat();
    let half_frame = frame(0x81, b"[null,\"1\",\"phoenix\",\"heartbeat\",{}]")[..20].to_vec();
    for bytes in [Vec::new(), vec![0x81], half_frame, half_message] {
        let mut client = Client::connect(&server, Serializer::V2).await;
        client.stream().write_all(&bytes).await.unwrap();
        assert_eq!(close_code(&mut client, false).await, 1000, "{bytes:?}");
    }
    let mut client = Client::connect(&server, Serializer::V2).await;
    assert_eq!(close_code(&mut client, true).await, 1000);
    drop(client);
    let mut client = Client::connect(&server, Serializer::V1).await;
    client.join("room").await;
    assert_eq!(client.closed().await, Some(1000), "a joined one, too");
    let series = "tidegate_connections_closed_total{code=\"1000\",reason=\"silent\"}";
    assert_eq!(server.metric(series).await, 6.0);
    server.stop().await;
}

/// A deaf client's only frames are heartbeats; malformed ones are a sign of life as well.
#[tokio::test]
async fn whoever_sends_data_lives_with_or_without_a_channel() {
    let mut config = impatient();
    config.limits.no_channel_timeout = Duration::from_millis(200);
    let server = TestServer::start_with(config);
    let mut never_joined = Client::connect(&server, Serializer::V1).await;
    let mut joined = Client::connect(&server, Serializer::V2).await;
    joined.join_with("room", json!({ "broadcast": { "self": true } })).await;
    // Two silences, one after the other: more than anybody may be silent.
    for _ in 0..2 {
        let silent = Client::connect(&server, Serializer::V2).await;
        let mut ended = JoinSet::new();
        ended.spawn(silent.closed());
        while ended.try_join_next().is_none() {
            never_joined.expect_nothing().await;
            joined.send_frame(Frame::text("malformed")).await;
            server.publish("room", &json!({ "n": 1 })).await;
            joined.hears("room", json!({ "n": 1 })).await;
        }
    }
    never_joined.expect_nothing().await;
    joined.expect_nothing().await;
    never_joined.close().await;
    joined.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_socket_whose_channels_have_gone_is_closed_and_one_that_re_joins_is_not() {
    let mut config = config();
    config.limits.no_channel_timeout = Duration::from_millis(300);
    config.protocol.error_delay = Duration::from_millis(1);
    let beside = Beside::start_with(config).await;
    let mut back = beside.connect().await;
    let mut gone = beside.connect().await;
    let mut refused = beside.connect().await;
    for client in [&mut back, &mut gone] {
        let joined = client.join("t").await;
        client.send(json!([joined, "l", "realtime:t", "phx_leave", {}])).await;
        let ok = json!({ "status": "ok", "response": {} });
        client.expect(json!([joined, "l", "realtime:t", "phx_reply", ok])).await;
        client.expect(json!([joined, joined, "realtime:t", "phx_close", {}])).await;
    }
    let bad = json!({ "config": {}, "access_token": "garbage" });
    refused.send(json!(["1", "1", "realtime:t", "phx_join", bad])).await;
    assert_eq!(refused.message().await[4]["status"], "error");
    back.join("t").await;
    assert_eq!(gone.closed().await, Some(1000));
    // Who has tried to join and holds nothing is no better.
    assert_eq!(refused.closed().await, Some(1000));
    beside.server.publish("t", &json!({ "n": 1 })).await;
    back.hears("t", json!({ "n": 1 })).await;
    back.close().await;
    assert_eq!(beside.closed("no_channels", "1000").await, 2.0);
    beside.stop().await;
}

/// A client whose system holds only a few bytes for it.
async fn narrow(server: &TestServer) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(server.public).await.unwrap();
    Client::over(server, stream, Serializer::V2, &token::of_role("anon")).await
}

fn large(number: u64) -> Value {
    json!({ "n": number, "x": "x".repeat(16_000) })
}

/// Publishes one after the other, each heard by the other client, until `done`.
async fn flood(beside: &mut Beside, done: impl Fn(&TestServer) -> bool) {
    let flooding = async {
        for number in 0.. {
            beside.other.publish("room", large(number)).await;
            beside.other.hears("room", large(number)).await;
            if done(&beside.server) {
                break;
            }
        }
    };
    timeout(DEADLINE, flooding).await.expect("the slow one is found out");
}

const TOO_SLOW: &str = "tidegate_channels_ended_total{reason=\"too_slow\"}";

#[tokio::test]
async fn who_does_not_read_is_closed_at_the_writes_deadline_and_the_others_hear_everything() {
    let mut config = config();
    // It does not overflow before the deadline.
    config.limits.outbox_bytes_max = 1 << 30;
    config.limits.write_timeout = Duration::from_millis(300);
    let mut beside = Beside::start_with(config).await;
    let mut deaf = narrow(&beside.server).await;
    deaf.join("room").await;
    flood(&mut beside, |server| server.count("tidegate_connections") == 1).await;
    assert_eq!(beside.closed("write_timeout", "none").await, 1.0);
    assert_eq!(beside.server.metric("tidegate_channels").await, 1.0);
    drop(deaf);
    beside.stop().await;
}

/// A topic that has a rule.
const RULED: &str = "plain_AB3028";

/// A client has joined a room and a rule's topic and reads nothing, and more was published to one of
/// the two than may wait for it.
async fn overflowed(sub_topic: &str) -> (Beside, Client) {
    let mut config = config();
    config.topic.push(plain_rule());
    config.limits.outbox_bytes_max = 64 * 1024;
    config.limits.write_timeout = DEADLINE;
    let mut beside = Beside::start_with(config).await;
    let mut slow = narrow(&beside.server).await;
    slow.join("room").await;
    slow.join(RULED).await;
    beside.other.join(RULED).await;
    let overflowing = async {
        for number in 0.. {
            let before = beside.server.count("tidegate_deliveries_total");
            beside.server.publish(sub_topic, &large(number)).await;
            beside.other.hears(sub_topic, large(number)).await;
            // It has overflowed when a message is put into the other's outbox only.
            if beside.server.count("tidegate_deliveries_total") - before == 1 {
                break;
            }
        }
    };
    timeout(DEADLINE, overflowing).await.expect("the slow one is found out");
    (beside, slow)
}

/// What was on its way it gets, without a gap. Returns what comes then.
async fn after_what_was_on_its_way(slow: &mut Client) -> Frame {
    for number in 0.. {
        let frame = slow.frame().await;
        let Frame::Text(text) = &frame else { return frame };
        let message: Value = serde_json::from_str(text).unwrap();
        if message[3] != "broadcast" {
            return frame;
        }
        assert_eq!(message[4]["payload"]["n"], number);
    }
    unreachable!()
}

#[tokio::test]
async fn who_reads_a_rules_topic_too_late_is_closed_as_a_slow_consumer() {
    let (beside, mut slow) = overflowed(RULED).await;
    let Frame::Close(close) = after_what_was_on_its_way(&mut slow).await else { panic!() };
    assert_eq!(close.map(|close| close.code.into()), Some(1008_u16));
    drop(slow);
    beside.server.metric_falls_to("tidegate_connections", 1.0).await;
    assert_eq!(beside.closed("slow_consumer", "1008").await, 1.0);
    beside.stop().await;
}

/// One message to a public room, which anybody may send, closes nobody's socket.
#[tokio::test]
async fn who_reads_an_ordinary_topic_too_late_loses_its_channel_and_keeps_the_socket() {
    let (mut beside, mut slow) = overflowed("room").await;
    beside.server.publish(RULED, &json!({ "sold": true })).await;
    beside.other.hears(RULED, json!({ "sold": true })).await;
    let Frame::Text(text) = after_what_was_on_its_way(&mut slow).await else { panic!() };
    let message: Value = serde_json::from_str(&text).unwrap();
    let text = "Too many messages for a client that reads this slowly";
    assert_eq!((&message[3], &message[4]["message"]), (&json!("system"), &json!(text)));
    // It is asked to come back, and may.
    assert_eq!(slow.message().await[3], "phx_error");
    slow.hears(RULED, json!({ "sold": true })).await;
    assert_eq!(beside.server.metric(TOO_SLOW).await, 1.0);
    slow.join("room").await;
    beside.server.publish("room", &large(0)).await;
    slow.hears("room", large(0)).await;
    beside.other.hears("room", large(0)).await;
    slow.close().await;
    beside.stop().await;
}
