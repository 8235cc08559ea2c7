//! Broadcasts over sockets: order, acknowledgement, size.

use serde_json::{Value, json};
use tidegate::protocol::serializer::Serializer;
use tokio::{io::AsyncWriteExt, task::JoinSet};
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::Client,
    raw::frame,
    server::{TestServer, config, config_of_long_windows},
    token,
};

/// A kind 3 frame with one-byte refs.
fn push(reference: u8, topic: &str, is_json: bool, payload: &[u8]) -> Frame {
    let length = u8::try_from(topic.len()).unwrap();
    let head = [3, 1, 1, length, 1, 0, u8::from(is_json), b'j', reference];
    Frame::binary([&head, topic.as_bytes(), b"e", payload].concat())
}

fn ack(reference: &str) -> Value {
    json!(["$any", reference, "realtime:room", "phx_reply", { "status": "ok", "response": {} }])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_senders_broadcasts_keep_their_order_at_every_receiver() {
    const COUNT: u64 = 1000;
    let server = TestServer::start();
    let mut receivers = JoinSet::new();
    for serializer in [Serializer::V1, Serializer::V2, Serializer::V2] {
        let mut client = Client::connect(&server, serializer).await;
        client.join("room").await;
        receivers.spawn(async move {
            let mut next = [0; 3];
            while next != [COUNT; 3] {
                let (_, envelope) = client.broadcast().await;
                let (sender, number) = (&envelope["payload"]["from"], &envelope["payload"]["n"]);
                let next = &mut next[usize::try_from(sender.as_u64().unwrap()).unwrap()];
                assert_eq!(number, &json!(*next), "of sender {sender}");
                *next += 1;
            }
            client.expect_nothing().await;
            client.close().await;
        });
    }
    let mut senders = JoinSet::new();
    for from in 0..3 {
        let mut client = Client::connect(&server, Serializer::V2).await;
        client.join_with("other", json!({})).await;
        // One writes text, one kind 3 frames, one on V1.
        if from == 2 {
            client.close().await;
            client = Client::connect(&server, Serializer::V1).await;
        }
        client.join_with("room", json!({ "broadcast": { "ack": true } })).await;
        senders.spawn(async move {
            for number in 0..COUNT {
                let payload = json!({ "from": from, "n": number });
                if from == 1 {
                    let payload = payload.to_string();
                    client.send_frame(push(b'x', "realtime:room", true, payload.as_bytes())).await;
                } else {
                    client.publish("room", payload).await;
                }
            }
            // Nothing of one's own comes back; what the others send does.
            let mut acks = 0;
            while acks < COUNT {
                if let Frame::Text(text) = client.frame().await {
                    acks += u64::from(text.contains("phx_reply"));
                }
            }
            client.close().await;
        });
    }
    senders.join_all().await;
    receivers.join_all().await;
    server.stop().await;
}

/// What comes in one packet may be handled together; it is answered as if it were not.
#[tokio::test]
async fn a_packet_of_many_messages_is_answered_in_their_order() {
    let mut config = config();
    config.limits.payload_bytes_max = 200;
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    let room = client.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    let other = client.join_with("other", json!({ "broadcast": { "self": true } })).await;
    let mut listener = Client::connect(&server, Serializer::V1).await;
    listener.join("room").await;
    let text = |message: Value| frame(0x81, message.to_string().as_bytes());
    let broadcast = |reference: &str, topic: &str, payload: Value| {
        let envelope = json!({ "type": "broadcast", "event": "e", "payload": payload });
        text(json!([null, reference, format!("realtime:{topic}"), "broadcast", envelope]))
    };
    let packet = [
        broadcast("1", "room", json!({ "n": 1 })),
        text(json!([null, "2", "realtime:room", "broadcast", []])),
        broadcast("3", "room", json!({ "x": "x".repeat(200) })),
        broadcast("4", "room", json!({ "n": 4 })),
        frame(0x81, b"malformed"),
        broadcast("5", "room", json!({ "n": 5 })),
        broadcast("6", "other", json!({ "n": 6 })),
        text(json!([null, "7", "phoenix", "heartbeat", {}])),
        broadcast("8", "nowhere", json!({})),
        broadcast("9", "nowhere", json!({})),
        broadcast("10", "room", json!({ "n": 10 })),
        text(json!([room, "11", "realtime:room", "phx_leave", {}])),
        broadcast("12", "room", json!({ "n": 12 })),
        text(json!(["13", "13", "realtime:room", "phx_join", { "config": {} }])),
        broadcast("14", "room", json!({ "n": 14 })),
        text(json!([other, "15", "realtime:other", "phx_leave", {}])),
    ];
    client.stream().write_all(&packet.concat()).await.unwrap();
    let ok = json!({ "status": "ok", "response": {} });
    let too_large = json!({ "status": "error", "response": "payload_size_exceeded" });
    let unmatched = json!({ "status": "error", "response": { "reason": "unmatched topic" } });
    let joined = json!({ "status": "ok", "response": { "postgres_changes": [] } });
    let heard = json!({ "type": "broadcast", "event": "e", "payload": { "n": 6 } });
    for expected in [
        json!([room, "1", "realtime:room", "phx_reply", ok]),
        json!([room, "3", "realtime:room", "phx_reply", too_large]),
        json!([room, "4", "realtime:room", "phx_reply", ok]),
        json!([room, "5", "realtime:room", "phx_reply", ok]),
        json!([null, null, "realtime:other", "broadcast", heard]),
        json!([null, "7", "phoenix", "phx_reply", ok]),
        json!([null, "8", "realtime:nowhere", "phx_reply", unmatched]),
        json!([null, "9", "realtime:nowhere", "phx_reply", unmatched]),
        json!([room, "10", "realtime:room", "phx_reply", ok]),
        json!([room, "11", "realtime:room", "phx_reply", ok]),
        json!([room, room, "realtime:room", "phx_close", {}]),
        json!([null, "12", "realtime:room", "phx_reply", unmatched]),
        json!(["13", "13", "realtime:room", "phx_reply", joined]),
        json!([other, "15", "realtime:other", "phx_reply", ok]),
        json!([other, other, "realtime:other", "phx_close", {}]),
    ] {
        client.expect(expected).await;
    }
    for number in [1, 4, 5, 10, 14] {
        listener.hears("room", json!({ "n": number })).await;
    }
    listener.ends().await;
    client.ends().await;
    server.stop().await;
}

/// The broadcasts behind the one that ends their channel have none.
#[tokio::test]
async fn what_comes_with_the_broadcast_that_ends_its_channel_is_answered_and_counted() {
    let mut config = config();
    config.limits.broadcasts_per_second_max = 1;
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    let room = client.join("room").await;
    let envelope = json!({ "type": "broadcast", "event": "e", "payload": {} });
    let broadcast = |n: i32| {
        let push = json!([room, n.to_string(), "realtime:room", "broadcast", envelope]);
        frame(0x81, push.to_string().as_bytes())
    };
    // Far more than a minute's worth, and however many are read at once.
    let packet: Vec<u8> = (1..=200).flat_map(broadcast).collect();
    client.stream().write_all(&packet).await.unwrap();
    client.expect(json!([room, null, "realtime:room", "system", "$any"])).await;
    client.expect(json!([room, room, "realtime:room", "phx_close", {}])).await;
    let unmatched = json!({ "status": "error", "response": { "reason": "unmatched topic" } });
    let first = client.message().await;
    let ended_by: i32 = first[1].as_str().unwrap().parse::<i32>().unwrap() - 1;
    assert!((61..150).contains(&ended_by), "{ended_by}");
    for n in ended_by + 2..=200 {
        client.expect(json!([null, n.to_string(), "realtime:room", "phx_reply", unmatched])).await;
    }
    let dropped = |reason| format!("tidegate_dropped_total{{reason=\"{reason}\"}}");
    assert_eq!(server.count(&dropped("channel_rate")), 1);
    let unanswered = u64::try_from(200 - ended_by).unwrap();
    assert_eq!(server.count(&dropped("unmatched_topic")), unanswered);
    client.ends().await;
    server.stop().await;
}

/// Its own broadcasts come before their acknowledgements, also if several came at once.
#[tokio::test]
async fn of_several_at_once_each_own_broadcast_precedes_its_acknowledgement() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    let config = json!({ "broadcast": { "ack": true, "self": true } });
    client.join_with("room", config).await;
    let mut packet = Vec::new();
    for number in 0..200 {
        let envelope = json!({ "type": "broadcast", "n": number });
        let reference = number.to_string();
        let message = json!([null, reference, "realtime:room", "broadcast", envelope]);
        packet.extend(frame(0x81, message.to_string().as_bytes()));
    }
    client.stream().write_all(&packet).await.unwrap();
    let (mut heard, mut acks) = (0, 0);
    while acks < 200 {
        let message = client.message().await;
        if message[3] == "broadcast" {
            assert_eq!(message[4]["n"], heard);
            heard += 1;
        } else {
            assert_eq!(message[1], acks.to_string());
            acks += 1;
            assert!(heard >= acks, "{message} after {heard} broadcasts");
        }
    }
    client.ends().await;
    server.stop().await;
}

/// It waits for its event's next message, as those of the database do, and says what is true for
/// its sender as well.
#[tokio::test]
async fn an_invalidation_of_a_socket_reaches_everybody_as_it_came_its_sender_too() {
    let server = TestServer::start_with(config_of_long_windows());
    let service = token::of_role("service_role");
    for (serializer, eid) in [(Serializer::V1, "AB3028"), (Serializer::V2, "AB3029")] {
        let topic = format!("cache_invalidate_{eid}");
        let mut sender = Client::with_token(&server, serializer, &service).await;
        let joined = sender.join_with(&topic, json!({ "broadcast": { "ack": true } })).await;
        let mut others = Vec::new();
        for (serializer, separator) in [(Serializer::V1, '_'), (Serializer::V2, ':')] {
            let mut client = Client::connect(&server, serializer).await;
            let topic = format!("cache_invalidate{separator}{eid}");
            client.join(&topic).await;
            others.push((client, topic));
        }
        let payload = json!({ "endpoints": ["/live/event/x"], "timestamp": 1795337027.571 });
        let envelope =
            json!({ "type": "broadcast", "event": "cache_invalidation", "payload": payload });
        let key = format!("realtime:{topic}");
        sender.send(json!([joined, "1", key, "broadcast", envelope])).await;
        let ok = json!({ "status": "ok", "response": {} });
        sender.expect(json!([joined, "1", key, "phx_reply", ok])).await;
        for (mut client, topic) in [vec![(sender, topic)], others].into_iter().flatten() {
            let heard = json!([null, null, format!("realtime:{topic}"), "broadcast", envelope]);
            client.expect(heard).await;
            client.repeated(&topic, payload.clone()).await;
            client.ends().await;
        }
    }
    assert_eq!(server.metric("tidegate_broadcasts_total{source=\"socket\"}").await, 0.0);
    assert_eq!(server.metric("tidegate_broadcasts_total{source=\"merged\"}").await, 2.0);
    server.stop().await;
}

#[tokio::test]
async fn a_burst_within_an_outboxs_bound_reaches_everybody() {
    let server = TestServer::start();
    let mut sender = Client::connect(&server, Serializer::V2).await;
    sender.join("room").await;
    let mut receivers = Vec::new();
    for serializer in [Serializer::V1, Serializer::V2] {
        let mut client = Client::connect(&server, serializer).await;
        client.join("room").await;
        receivers.push(client);
    }
    let large = |number: u64| json!({ "n": number, "x": "x".repeat(16_000) });
    let mut packet = Vec::new();
    // Together just under 1 MiB.
    for number in 0..64 {
        let envelope = json!({ "type": "broadcast", "event": "e", "payload": large(number) });
        let message = json!([null, null, "realtime:room", "broadcast", envelope]);
        packet.extend(frame(0x81, message.to_string().as_bytes()));
    }
    sender.stream().write_all(&packet).await.unwrap();
    for mut client in receivers {
        for number in 0..64 {
            client.hears("room", large(number)).await;
        }
        client.ends().await;
    }
    sender.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_broadcast_that_nobody_hears_is_acknowledged() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    client.send(json!(["r1", "7", "realtime:room", "broadcast", { "type": "broadcast" }])).await;
    client.expect(ack("7")).await;
    assert_eq!(server.metric("tidegate_broadcasts_total{source=\"socket\"}").await, 1.0);
    assert_eq!(server.metric("tidegate_deliveries_total").await, 0.0);
    client.close().await;
    server.stop().await;
}

/// The payload of a text broadcast is its whole envelope; of a kind 3 frame, the user's part.
#[tokio::test]
async fn a_payload_passes_at_its_bound_and_is_dropped_one_byte_past_it() {
    let mut config = config();
    config.limits.payload_bytes_max = 100;
    let server = TestServer::start_with(config);
    let mut asking = Client::connect(&server, Serializer::V2).await;
    asking.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    let mut silent = Client::connect(&server, Serializer::V1).await;
    silent.join("room").await;
    let mut listener = Client::connect(&server, Serializer::V2).await;
    listener.join("room").await;

    let text = |bytes: usize| {
        let empty = json!({ "type": "broadcast", "event": "e", "payload": { "x": "" } });
        let filling = "x".repeat(bytes - empty.to_string().len());
        let payload = json!({ "type": "broadcast", "event": "e", "payload": { "x": filling } });
        assert_eq!(payload.to_string().len(), bytes);
        payload
    };
    let too_large = json!({ "status": "error", "response": "payload_size_exceeded" });
    let refused =
        |reference: &str| json!(["r1", reference, "realtime:room", "phx_reply", too_large]);

    asking.send(json!(["r1", "1", "realtime:room", "broadcast", text(100)])).await;
    asking.expect(ack("1")).await;
    assert_eq!(listener.broadcast().await.1, text(100));
    assert_eq!(silent.broadcast().await.1, text(100));
    asking.send(json!(["r1", "2", "realtime:room", "broadcast", text(101)])).await;
    asking.expect(refused("2")).await;

    silent.send(json!([null, "3", "realtime:room", "broadcast", text(101)])).await;
    silent.send(json!([null, "4", "realtime:room", "broadcast", text(100)])).await;
    silent.expect_nothing().await;
    assert_eq!(listener.broadcast().await.1, text(100));
    assert_eq!(asking.broadcast().await.1, text(100));

    let json_of = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2)).into_bytes();
    for (reference, is_json, payload) in [(b'5', true, json_of(100)), (b'6', false, vec![7; 100])] {
        asking.send_frame(push(reference, "realtime:room", is_json, &payload)).await;
        asking.expect(ack(&char::from(reference).to_string())).await;
        assert!(listener.frame().await.into_data().ends_with(&payload));
    }
    silent.broadcast().await;
    for (reference, is_json, payload) in [(b'7', true, json_of(101)), (b'8', false, vec![7; 101])] {
        asking.send_frame(push(reference, "realtime:room", is_json, &payload)).await;
        asking.expect(refused(&char::from(reference).to_string())).await;
    }
    listener.send_frame(push(b'9', "realtime:room", true, &json_of(101))).await;
    listener.expect_nothing().await;
    silent.expect_nothing().await;
    assert_eq!(server.metric("tidegate_dropped_total{reason=\"too_large\"}").await, 5.0);
    for client in [asking, silent, listener] {
        client.close().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_message_passes_at_its_bound_and_closes_the_socket_one_byte_past_it() {
    let mut config = config();
    config.limits.message_bytes_max = 1000;
    let server = TestServer::start_with(config);
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join_with("room", json!({ "broadcast": { "self": true } })).await;
    let beat = |bytes: usize| {
        let empty = json!([null, "1", "phoenix", "heartbeat", { "x": "" }]).to_string();
        let filling = "x".repeat(bytes - empty.len());
        json!([null, "1", "phoenix", "heartbeat", { "x": filling }]).to_string()
    };
    let beaten = json!([null, "1", "phoenix", "phx_reply", { "status": "ok", "response": {} }]);
    for serializer in [Serializer::V1, Serializer::V2] {
        let mut client = Client::connect(&server, serializer).await;
        client.send_frame(Frame::text(" ".repeat(1000))).await;
        client.expect_nothing().await;
        client.send_frame(Frame::text(" ".repeat(1001))).await;
        assert_eq!(client.closed().await, Some(1009));
    }
    // In one frame, and in two of which each is short.
    let mut client = Client::connect(&server, Serializer::V2).await;
    let whole = beat(1000);
    client.send_frame(Frame::text(whole.clone())).await;
    client.expect(beaten.clone()).await;
    let (head, tail) = whole.as_bytes().split_at(500);
    let packet = [frame(0x01, head), frame(0x80, tail)].concat();
    client.stream().write_all(&packet).await.unwrap();
    client.expect(beaten).await;
    let packet = [frame(0x01, head), frame(0x80, &[tail, b" "].concat())].concat();
    client.stream().write_all(&packet).await.unwrap();
    assert_eq!(client.closed().await, Some(1009));
    // A header that announces what will never come.
    let mut client = Client::connect(&server, Serializer::V2).await;
    let header = [&[0x82, 0xff][..], &u64::MAX.to_be_bytes(), &[0; 4]].concat();
    client.stream().write_all(&header).await.unwrap();
    client.closed().await;

    let closed = "tidegate_connections_closed_total{code=\"1009\",reason=\"too_large\"}";
    assert!(server.metric(closed).await >= 3.0);
    other.publish("room", json!({ "n": 1 })).await;
    other.hears("room", json!({ "n": 1 })).await;
    other.close().await;
    server.stop().await;
}

/// The largest that may pass is received whole, with a backlog bound far below it.
#[tokio::test]
async fn the_largest_payload_reaches_a_client_whose_outbox_is_empty() {
    let server = TestServer::start();
    let mut sender = Client::connect(&server, Serializer::V2).await;
    sender.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    let mut receiver = Client::connect(&server, Serializer::V1).await;
    receiver.join("room").await;
    let empty = json!({ "type": "broadcast", "event": "e", "payload": { "x": "" } }).to_string();
    let filling = "x".repeat(3_000_500 - empty.len());
    sender.publish("room", json!({ "x": filling })).await;
    sender.expect(json!(["r1", null, "realtime:room", "phx_reply", "$any"])).await;
    receiver.hears("room", json!({ "x": filling })).await;
    sender.close().await;
    receiver.close().await;
    server.stop().await;
}
