//! Leaves, asked for and not: what ends, what goes on, what is given back.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::protocol::serializer::Serializer;
use tokio::{io::AsyncWriteExt, task::JoinSet};
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::Client,
    raw::frame,
    server::{TestServer, config},
};

fn ok(join_ref: &str, reference: &str, topic: &str) -> Value {
    json!([join_ref, reference, topic, "phx_reply", { "status": "ok", "response": {} }])
}

async fn leave(client: &mut Client, join_ref: &str, topic: &str) {
    client.send(json!([join_ref, "leave", topic, "phx_leave", {}])).await;
    client.expect(ok(join_ref, "leave", topic)).await;
    client.expect(json!([join_ref, join_ref, topic, "phx_close", {}])).await;
}

#[tokio::test]
async fn leaving_some_channels_leaves_the_others_joined() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    let mut refs = Vec::new();
    for number in 0..20 {
        refs.push(client.join(&format!("t{number}")).await);
    }
    for number in (0..20).step_by(2) {
        leave(&mut client, &refs[number], &format!("realtime:t{number}")).await;
    }
    assert_eq!(server.metric("tidegate_channels").await, 10.0);
    assert_eq!(server.metric("tidegate_topics").await, 10.0);
    for number in 0..20 {
        server.publish(&format!("t{number}"), &json!({ "n": number })).await;
    }
    for number in (1..20).step_by(2) {
        client.hears(&format!("t{number}"), json!({ "n": number })).await;
    }
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

/// Clients that remove a channel and make it anew send both at once; a `phx_close` with a wrong
/// ref would kill the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leave_and_join_at_once_keep_their_refs_while_others_broadcast() {
    let server = TestServer::start();
    let mut publisher = Client::connect(&server, Serializer::V2).await;
    publisher.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    let mut publishers = JoinSet::new();
    publishers.spawn(async move {
        loop {
            publisher.publish("room", json!({ "n": 1 })).await;
            publisher.frame().await;
        }
    });
    let mut client = Client::connect(&server, Serializer::V2).await;
    let mut old = client.join("room").await;
    for round in 0..200 {
        let new = format!("j{round}");
        let topic = "realtime:room";
        let leave = json!([old, "l", topic, "phx_leave", {}]).to_string();
        let join = json!([new, new, topic, "phx_join", { "config": {} }]).to_string();
        let packet = [frame(0x81, leave.as_bytes()), frame(0x81, join.as_bytes())].concat();
        client.stream().write_all(&packet).await.unwrap();
        let joined = json!({ "status": "ok", "response": { "postgres_changes": [] } });
        for expected in [
            ok(&old, "l", topic),
            json!([old, old, topic, "phx_close", {}]),
            json!([new, new, topic, "phx_reply", joined]),
        ] {
            let message = loop {
                let message = client.message().await;
                if message[3] != "broadcast" {
                    break message;
                }
            };
            assert_eq!(message, expected);
        }
        old = new;
    }
    client.hears("room", json!({ "n": 1 })).await;
    publishers.shutdown().await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_second_leave_is_answered_and_closes_nothing() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    let joined = client.join("room").await;
    leave(&mut client, &joined, "realtime:room").await;
    client.send(json!([joined, "again", "realtime:room", "phx_leave", {}])).await;
    client.expect(ok(&joined, "again", "realtime:room")).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_leave_gives_its_channels_place_back() {
    let mut config = config();
    config.limits.channels_per_socket_max = 1;
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    for topic in ["a", "b", "a"] {
        let joined = client.join(topic).await;
        leave(&mut client, &joined, &format!("realtime:{topic}")).await;
    }
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_leave_waits_for_the_refusal_of_its_join_and_is_answered_as_of_no_channel() {
    let mut config = config();
    config.protocol.error_delay = Duration::from_millis(100);
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    let payload = json!({ "config": {}, "access_token": "garbage" });
    client.send(json!(["1", "1", "realtime:room", "phx_join", payload])).await;
    client.send(json!(["1", "2", "realtime:room", "phx_leave", {}])).await;
    client.expect_nothing().await;
    let reason = "MalformedJWT: The token provided is not a valid JWT";
    let error = json!({ "status": "error", "response": { "reason": reason } });
    client.expect(json!(["1", "1", "realtime:room", "phx_reply", error])).await;
    client.expect(ok("1", "2", "realtime:room")).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_socket_that_ends_in_any_way_leaves_all_its_topics() {
    let server = TestServer::start();
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join_with("t0", json!({ "broadcast": { "self": true } })).await;
    let joined = async || {
        let mut client = Client::connect(&server, Serializer::V2).await;
        for number in 0..5 {
            client.join(&format!("t{number}")).await;
        }
        client
    };
    // A page that is closed, a client that ends itself, an application's own code, and no word.
    for code in [1001_u16, 1000, 4321] {
        let mut client = joined().await;
        client.stream().write_all(&frame(0x88, &code.to_be_bytes())).await.unwrap();
        assert_eq!(client.closed().await, Some(code), "a close is answered by the same");
        server.metric_falls_to("tidegate_channels", 1.0).await;
    }
    let mut client = joined().await;
    client.stream().write_all(&frame(0x88, &[])).await.unwrap();
    client.closed().await;
    drop(joined().await);
    // In the middle of a message.
    let mut client = joined().await;
    client.stream().write_all(&[0x81, 0xfe, 0xff]).await.unwrap();
    drop(client);
    server.metric_falls_to("tidegate_connections", 1.0).await;
    assert_eq!(server.metric("tidegate_channels").await, 1.0);
    assert_eq!(server.metric("tidegate_topics").await, 1.0);
    for (reason, code, count) in [
        ("peer", "1001", 1.0),
        ("peer", "1000", 1.0),
        ("peer", "other", 1.0),
        ("peer", "none", 1.0),
        ("peer_gone", "none", 2.0),
    ] {
        let series =
            format!("tidegate_connections_closed_total{{code=\"{code}\",reason=\"{reason}\"}}");
        assert_eq!(server.metric(&series).await, count, "{series}");
    }
    other.publish("t0", json!({ "n": 1 })).await;
    other.hears("t0", json!({ "n": 1 })).await;
    other.send_frame(Frame::Close(None)).await;
    other.closed().await;
    server.stop().await;
}
