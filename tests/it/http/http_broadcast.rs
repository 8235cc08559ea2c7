//! Broadcasts over HTTP: a batch, and a single message.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::protocol::serializer::Serializer;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::{Client, resync},
    raw::{Answer, answer, ask, post, send, until_end},
    server::{TestServer, config, config_of_long_windows},
    token,
};

const BATCH: &str = "/realtime/v1/api/broadcast";
const CACHE: &str = "cache_invalidate_AB3028";

/// One listener of each version on `room`.
async fn listeners(server: &TestServer) -> (Client, Client) {
    let mut v1 = Client::connect(server, Serializer::V1).await;
    let mut v2 = Client::connect(server, Serializer::V2).await;
    v1.join("room").await;
    v2.join("room").await;
    (v1, v2)
}

fn apikey(role: &str) -> String {
    format!("apikey: {}", token::of_role(role))
}

async fn batch(server: &TestServer, body: impl AsRef<[u8]>) -> Answer {
    ask(server, post(BATCH, &[&apikey("anon"), "content-type: application/json"], body)).await
}

async fn single(server: &TestServer, path: &str, headers: &[&str], body: &[u8]) -> Answer {
    let apikey = apikey("anon");
    let headers = [&[&*apikey], headers].concat();
    ask(server, post(&format!("/realtime/v1/api/broadcast/{path}"), &headers, body)).await
}

fn is_accepted(answer: &Answer) -> bool {
    (answer.status, &*answer.body) == (202, "")
}

fn message(payload: &Value) -> String {
    json!({ "messages": [{ "topic": "room", "event": "e", "payload": payload }] }).to_string()
}

#[tokio::test]
async fn a_batch_reaches_both_versions_as_text_in_its_order() {
    let server = TestServer::start();
    let (mut v1, mut v2) = listeners(&server).await;
    let mut elsewhere = Client::connect(&server, Serializer::V2).await;
    elsewhere.join("other").await;
    let mut messages: Vec<_> =
        (0..50).map(|n| json!({ "topic": "room", "event": "e", "payload": { "n": n } })).collect();
    messages.insert(25, json!({ "topic": "other", "event": "e", "payload": { "n": 0 } }));
    let body = json!({ "messages": messages }).to_string();
    for path in ["/api/broadcast", BATCH] {
        // Newer clients begin at the socket's URL: its parameters come along.
        let path = format!("{path}?apikey=garbage&vsn=9.9.9&log_level=info");
        let answer = ask(&server, post(&path, &[&apikey("anon")], &body)).await;
        assert!(is_accepted(&answer), "{answer:?}");
        for n in 0..50 {
            for client in [&mut v1, &mut v2] {
                let envelope = json!({ "type": "broadcast", "event": "e", "payload": { "n": n } });
                client.expect(json!([null, null, "realtime:room", "broadcast", envelope])).await;
            }
        }
        elsewhere.hears("other", json!({ "n": 0 })).await;
    }
    assert_eq!(server.metric("tidegate_broadcasts_total{source=\"rest\"}").await, 102.0);
    assert_eq!(server.metric("tidegate_deliveries_total").await, 202.0);
    for client in [v1, v2, elsewhere] {
        client.ends().await;
    }
    server.stop().await;
}

/// Microsecond timestamps are the clients' keys: no digit may change.
#[tokio::test]
async fn a_payload_passes_byte_for_byte() {
    let server = TestServer::start();
    let (mut v1, mut v2) = listeners(&server).await;
    let payload = r#"{"b":1795337027.5710001,"a":1.50,"a":1e2,"ü":"\u00fc\/"}"#;
    let body = format!(r#"{{"messages":[{{"payload":{payload},"event":"e","topic":"room"}}]}}"#);
    assert!(is_accepted(&batch(&server, &body).await));
    for client in [&mut v1, &mut v2] {
        let Frame::Text(text) = client.frame().await else { panic!("text") };
        assert!(text.contains(payload), "{text}");
    }
    let answer = single(&server, "room/events/e", &[], payload.as_bytes()).await;
    assert!(is_accepted(&answer), "{answer:?}");
    let Frame::Text(text) = v1.frame().await else { panic!("text") };
    assert!(text.contains(payload), "{text}");
    let frame = [b"\x04\x0d\x01\x00\x01realtime:roome", payload.as_bytes()].concat();
    assert_eq!(v2.frame().await, Frame::binary(frame));
    v1.ends().await;
    v2.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn an_id_is_delivered_as_metadata() {
    let server = TestServer::start();
    let (mut v1, mut v2) = listeners(&server).await;
    let id = "5f0c7f5e-1111-4222-8333-944444444444";
    let body = json!({ "messages": [
        { "topic": "room", "event": "e", "payload": { "n": 1 }, "id": id },
        { "topic": "room", "event": "e", "payload": { "n": 2 }, "id": null },
    ] });
    assert!(is_accepted(&batch(&server, body.to_string()).await));
    for client in [&mut v1, &mut v2] {
        let envelope = json!({
            "type": "broadcast", "event": "e", "payload": { "n": 1 }, "meta": { "id": id },
        });
        client.expect(json!([null, null, "realtime:room", "broadcast", envelope])).await;
        client.hears("room", json!({ "n": 2 })).await;
    }
    v1.ends().await;
    v2.ends().await;
    server.stop().await;
}

/// What the clients of all ages send: `Bearer`, a bare token, an empty header and `apikey`, `apikey` alone.
#[tokio::test]
async fn every_form_of_a_good_token_is_taken_and_no_bad_one() {
    let server = TestServer::start();
    let mut listener = Client::connect(&server, Serializer::V1).await;
    listener.join("room").await;
    let good = token::of_role("anon");
    let bad = [
        "garbage".to_owned(),
        token::named("expired"),
        token::named("wrong_secret"),
        token::named("no_role"),
        token::named("no_exp"),
    ];
    let apikey = format!("apikey: {good}");
    let accepted = [
        vec![format!("authorization: Bearer {good}")],
        vec![format!("Authorization: bearer   {good}")],
        vec![format!("authorization: {good}")],
        vec![apikey.clone()],
        vec!["authorization:".to_owned(), apikey.clone()],
        vec!["authorization: Bearer".to_owned(), apikey.clone()],
        vec!["authorization: Basic dXNlcjpwYXNz".to_owned(), apikey.clone()],
        // The user's token goes before the key, whatever that is.
        vec![format!("authorization: Bearer {good}"), "apikey: garbage".to_owned()],
    ];
    let mut refused = vec![
        vec![],
        vec!["authorization:".to_owned()],
        vec!["authorization: Bearer garbage".to_owned(), apikey.clone()],
        vec![format!("x-api-key: {good}")],
    ];
    for bad in bad {
        refused.push(vec![format!("apikey: {bad}")]);
        refused.push(vec![format!("authorization: Bearer {bad}")]);
    }
    for path in [BATCH, "/realtime/v1/api/broadcast/room/events/e"] {
        for (number, headers) in accepted.iter().enumerate() {
            let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
            let body = if path == BATCH {
                message(&json!({ "n": number }))
            } else {
                json!({ "n": number }).to_string()
            };
            let answer = ask(&server, post(path, &headers, body)).await;
            assert!(is_accepted(&answer), "{path} {headers:?}: {answer:?}");
            listener.hears("room", json!({ "n": number })).await;
        }
        for headers in &refused {
            let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
            let path = format!("{path}?apikey={good}");
            let answer = ask(&server, post(&path, &headers, message(&json!({})))).await;
            assert_eq!(answer.status, 401, "{path} {headers:?}");
            assert_eq!(answer.json(), json!({ "message": "Unauthorized" }));
        }
    }
    listener.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn an_invalid_batch_is_described_message_by_message_and_not_delivered_at_all() {
    let server = TestServer::start();
    let (mut v1, mut v2) = listeners(&server).await;
    let blank = json!(["can't be blank"]);
    let good = json!({ "topic": "room", "event": "e", "payload": {} });
    let with = |key: &str, value: Value| {
        let mut message = good.clone();
        message[key] = value;
        message
    };
    let without = |key: &str| {
        let mut message = good.clone();
        message.as_object_mut().unwrap().remove(key);
        message
    };
    for (body, errors) in [
        (json!({}), blank.clone()),
        (json!({ "messages": [] }), blank.clone()),
        (json!({ "messages": [without("topic")] }), json!([{ "topic": blank }])),
        (json!({ "messages": [without("event")] }), json!([{ "event": blank }])),
        (json!({ "messages": [without("payload")] }), json!([{ "payload": blank }])),
        (json!({ "messages": [with("topic", json!(""))] }), json!([{ "topic": blank }])),
        (json!({ "messages": [with("event", json!("  "))] }), json!([{ "event": blank }])),
        (json!({ "messages": [with("event", json!(null))] }), json!([{ "event": blank }])),
        (json!({ "messages": [with("payload", json!(null))] }), json!([{ "payload": blank }])),
        (
            json!({ "messages": [{}] }),
            json!([{ "topic": blank, "event": blank, "payload": blank }]),
        ),
        // All or nothing: one element for each, empty for the good ones.
        (
            json!({ "messages": [good, without("event"), good, without("topic")] }),
            json!([{}, { "event": blank }, {}, { "topic": blank }]),
        ),
    ] {
        let answer = batch(&server, body.to_string()).await;
        assert_eq!(answer.status, 422, "{body}");
        assert_eq!(answer.json(), json!({ "errors": { "messages": errors } }), "{body}");
    }
    // Of another type than asked for.
    for (key, value) in [
        ("payload", json!([])),
        ("payload", json!("text")),
        ("payload", json!(1)),
        ("topic", json!(7)),
        ("event", json!({})),
        ("private", json!("yes")),
        ("private", json!(1)),
        ("topic", json!("t".repeat(256))),
        ("event", json!("e".repeat(256))),
    ] {
        let body = json!({ "messages": [good, with(key, value.clone())] });
        let answer = batch(&server, body.to_string()).await;
        assert_eq!(answer.status, 422, "{key} {value}");
        let errors = &answer.json()["errors"]["messages"];
        assert_eq!(errors[0], json!({}), "{answer:?}");
        assert!(errors[1][key][0].is_string(), "{answer:?}");
    }
    v1.expect_nothing().await;
    assert_eq!(server.metric("tidegate_broadcasts_total{source=\"rest\"}").await, 0.0);
    // At the bound.
    for (key, value) in [("event", json!("e".repeat(255))), ("topic", json!("t".repeat(255)))] {
        let body = json!({ "messages": [with(key, value)] });
        assert!(is_accepted(&batch(&server, body.to_string()).await), "{key}");
    }
    for client in [&mut v1, &mut v2] {
        let envelope = json!({ "type": "broadcast", "event": "e".repeat(255), "payload": {} });
        client.expect(json!([null, null, "realtime:room", "broadcast", envelope])).await;
    }
    v1.ends().await;
    v2.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn messages_that_are_null_are_missing() {
    let server = TestServer::start();
    let answer = batch(&server, r#"{"messages":null}"#).await;
    assert_eq!(answer.status, 422);
    assert_eq!(answer.json(), json!({ "errors": { "messages": ["can't be blank"] } }));
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_json_is_a_bad_request() {
    let server = TestServer::start();
    let (v1, v2) = listeners(&server).await;
    for body in ["", "{", "nonsense", "{\"messages\":[{]}", "\u{0}"] {
        assert_eq!(batch(&server, body).await.status, 400, "{body:?}");
    }
    assert_eq!(batch(&server, b"{\"messages\":[\"\xff\"]}").await.status, 400);
    for body in [&b"{"[..], b"nonsense", b"{}x", b"\"\xff\""] {
        let answer =
            single(&server, "room/events/e", &["content-type: application/json"], body).await;
        assert_eq!(answer.status, 400, "{body:?}");
    }
    v1.ends().await;
    v2.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_payload_is_taken_at_its_bound_and_refused_one_byte_past_it() {
    let mut config = config();
    config.limits.payload_bytes_max = 100;
    let server = TestServer::start_with(config);
    let (mut v1, v2) = listeners(&server).await;
    let payload = |bytes: usize| json!({ "x": "x".repeat(bytes - 8) });
    assert_eq!(payload(100).to_string().len(), 100);
    let too_large = json!(["Payload size exceeds tenant limit"]);

    assert!(is_accepted(&batch(&server, message(&payload(100))).await));
    v1.hears("room", payload(100)).await;
    let answer = batch(&server, message(&payload(101))).await;
    assert_eq!(answer.status, 422);
    assert_eq!(answer.json(), json!({ "errors": { "messages": [{ "payload": too_large }] } }));

    for content_type in ["content-type: application/json", "content-type: application/octet-stream"]
    {
        let bytes = |length| payload(length).to_string().into_bytes();
        let answer = single(&server, "room/events/e", &[content_type], &bytes(100)).await;
        assert!(is_accepted(&answer), "{answer:?}");
        let answer = single(&server, "room/events/e", &[content_type], &bytes(101)).await;
        assert_eq!(answer.status, 422);
        assert_eq!(answer.json(), json!({ "errors": { "payload": too_large } }));
    }
    v1.hears("room", payload(100)).await;
    v1.ends().await;
    v2.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_body_is_read_up_to_eight_megabytes_and_one_byte_more_is_refused() {
    let server = TestServer::start();
    let mut listener = Client::connect(&server, Serializer::V2).await;
    listener.join("room").await;
    let mut body = message(&json!({ "n": 1 })).into_bytes();
    body.resize(8_000_000, b' ');
    assert!(is_accepted(&batch(&server, &body).await));
    listener.hears("room", json!({ "n": 1 })).await;
    body.push(b' ');
    assert_eq!(batch(&server, &body).await.status, 413);
    // Without saying how long it will be.
    let head = format!(
        "POST {BATCH} HTTP/1.1\r\nhost: test\r\n{}\r\ntransfer-encoding: chunked\r\n\r\n",
        apikey("anon")
    );
    let chunk = format!("{:x}\r\n{}\r\n", 1_000_000, " ".repeat(1_000_000));
    let mut request = head.into_bytes();
    for _ in 0..9 {
        request.extend(chunk.as_bytes());
    }
    assert_eq!(ask(&server, &request).await.status, 413);
    // Who may not is refused before anything is read.
    let request = post(BATCH, &["expect: 100-continue"], []);
    let request = String::from_utf8(request).unwrap().replace("length: 0", "length: 8000000");
    assert_eq!(ask(&server, request).await.status, 401);
    listener.ends().await;
    server.stop().await;
}

/// With the anon key, which is public, anybody can send it.
#[tokio::test]
async fn a_batch_of_countless_empty_objects_is_refused_in_a_few_bytes() {
    let server = TestServer::start();
    let listener = Client::connect(&server, Serializer::V2).await;
    let empty = |count| format!("{{\"messages\":[{}]}}", vec!["{}"; count].join(","));
    let answer = batch(&server, empty(1_000_000)).await;
    let text = "Too many messages to broadcast, please reduce the batch size";
    assert_eq!((answer.status, answer.json()), (429, json!({ "message": text })));
    let limited = "tidegate_limited_total{effect=\"refused\",limiter=\"batch_messages\"}";
    assert_eq!(server.count(limited), 1);
    // At the bound, the first ten mistakes are described.
    let answer = batch(&server, empty(1000)).await;
    assert_eq!((answer.status, &answer.json()["errors"]["more"]), (422, &json!(990)));
    assert!(answer.body.len() < 1024, "{}", answer.body.len());
    listener.ends().await;
    server.stop().await;
}

/// A large body that trickles gives its place back, and who sends many of them has a part of the
/// places.
#[tokio::test]
async fn uploads_that_trickle_keep_no_others_from_theirs() {
    let mut config = config();
    config.network.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    config.limits.body_timeout = Duration::from_secs(600);
    let server = TestServer::start_with(config);
    let mut body = message(&json!({ "n": 1 })).into_bytes();
    body.resize(200_000, b' ');
    let request = |address: u8| {
        let address = format!("x-forwarded-for: 192.0.2.{address}");
        post(BATCH, &[&apikey("anon"), &address, "expect: 100-continue"], &body)
    };
    let mut held = Vec::new();
    for _ in 0..16 {
        let trickling = request(1);
        let mut stream = send(&server, &trickling[..trickling.len() - 100_000]).await;
        // Its body is being read.
        assert_eq!(answer(&mut stream).await.status, 100);
        held.push(stream);
    }
    let mut other = send(&server, request(2)).await;
    assert_eq!(answer(&mut other).await.status, 100);
    assert!(is_accepted(&answer(&mut other).await));
    // Long before the time of a body is over.
    assert_eq!(answer(&mut held[0]).await.status, 408);
    server
        .metric_reaches("tidegate_limited_total{effect=\"refused\",limiter=\"bodies\"}", 1.0)
        .await;
    drop((held, other));
    server.stop().await;
}

/// Every wait has a bound: with the anon key, which is public, anybody could hold all the places
/// for requests by bodies that never come.
#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    let mut config = config();
    config.limits.body_timeout = Duration::from_millis(150);
    let server = TestServer::start_with(config);
    let request = String::from_utf8(post(BATCH, &[&apikey("anon")], message(&json!({})))).unwrap();
    let mut stream = send(&server, &request[..request.len() - 5]).await;
    let received = until_end(&mut stream).await;
    assert!(!String::from_utf8_lossy(&received).contains(" 202 "));
    server.stop().await;
}

#[tokio::test]
async fn a_connection_serves_one_request_after_the_other_and_is_closed_when_idle() {
    let mut config = config();
    config.limits.handshake_timeout = Duration::from_millis(300);
    let server = TestServer::start_with(config);
    let mut listener = Client::connect(&server, Serializer::V2).await;
    listener.join("room").await;
    let mut stream = send(&server, []).await;
    for n in 0..10 {
        stream
            .write_all(&post(BATCH, &[&apikey("anon")], message(&json!({ "n": n }))))
            .await
            .unwrap();
        assert!(is_accepted(&answer(&mut stream).await));
        listener.hears("room", json!({ "n": n })).await;
    }
    until_end(&mut stream).await;
    listener.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_single_json_message_reaches_v1_as_text_and_v2_as_kind_4() {
    let server = TestServer::start();
    let (mut v1, mut v2) = listeners(&server).await;
    let json_type = "content-type: application/json";
    for (headers, body, payload) in [
        (vec![json_type], &b"{\"a\":1}"[..], "{\"a\":1}"),
        (vec!["content-type: application/json; charset=utf-8"], b"{\"a\":2}", "{\"a\":2}"),
        // Without a type a body is JSON; an empty one is the empty object.
        (vec![], b"{\"a\":3}", "{\"a\":3}"),
        (vec![], b"", "{}"),
        // Any JSON value as it is, without a `_json` around it; `private` in it is the user's.
        (vec![json_type], b"[1,2]", "[1,2]"),
        (vec![json_type], b"null", "null"),
        (vec![json_type], b"{\"private\":true}", "{\"private\":true}"),
    ] {
        let answer = single(&server, "room/events/e", &headers, body).await;
        assert!(is_accepted(&answer), "{payload}: {answer:?}");
        let frame = [b"\x04\x0d\x01\x00\x01realtime:roome", payload.as_bytes()].concat();
        assert_eq!(v2.frame().await, Frame::binary(frame));
        v1.hears("room", serde_json::from_str(payload).unwrap()).await;
    }
    v1.ends().await;
    v2.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_single_binary_message_reaches_v2_only() {
    let server = TestServer::start();
    let (v1, mut v2) = listeners(&server).await;
    for body in [&[0, 159, 146, 150][..], b"", b"{\"a\":1}"] {
        let headers = ["content-type: application/octet-stream"];
        let answer = single(&server, "room/events/e", &headers, body).await;
        assert!(is_accepted(&answer), "{answer:?}");
        let frame = [b"\x04\x0d\x01\x00\x00realtime:roome", body].concat();
        assert_eq!(v2.frame().await, Frame::binary(frame));
    }
    v1.ends().await;
    v2.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn another_content_type_is_unsupported() {
    let server = TestServer::start();
    let (v1, v2) = listeners(&server).await;
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"] {
        let headers = [&*format!("content-type: {content_type}")];
        let answer = single(&server, "room/events/e", &headers, b"{}").await;
        assert_eq!(answer.status, 415, "{content_type}");
        let text = "Unsupported Media Type. Use application/json or application/octet-stream";
        assert_eq!(answer.json(), json!({ "error": text }));
    }
    v1.ends().await;
    v2.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn topic_and_event_of_a_single_message_are_percent_decoded() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V1).await;
    for (path, topic, event) in [
        ("room%2F1/events/my%20event", "room/1", "my event"),
        ("a%3Ab/events/%C3%BC", "a:b", "ü"),
        ("room+1/events/a+b", "room+1", "a+b"),
        ("100%25/events/%2Fevents%2F", "100%", "/events/"),
        ("x%2Fevents%2Fy/events/e", "x/events/y", "e"),
    ] {
        client.join(topic).await;
        let answer = single(&server, path, &[], b"{}").await;
        assert!(is_accepted(&answer), "{path}: {answer:?}");
        let envelope = json!({ "type": "broadcast", "event": event, "payload": {} });
        let topic = format!("realtime:{topic}");
        client.expect(json!([null, null, topic, "broadcast", envelope])).await;
    }
    for path in [
        "room",
        "room/",
        "room/events",
        "room/events/",
        "/events/e",
        "room/events/e/f",
        "%FF/events/e",
    ] {
        assert_eq!(single(&server, path, &[], b"{}").await.status, 404, "{path}");
    }
    client.ends().await;
    server.stop().await;
}

/// Only the database and `service_role` write to the topics of the rules. An invalidation that is
/// denied must not be merged, either: it would leave with the next one.
#[tokio::test]
async fn a_rules_topic_is_written_by_whom_the_rule_names() {
    let server = TestServer::start_with(config_of_long_windows());
    let mut client = Client::connect(&server, Serializer::V1).await;
    client.join(CACHE).await;
    client.join("room").await;
    let (path_of, json) =
        (|topic: &str, rest: &str| format!("/api/broadcast/{topic}/{rest}"), "{}");
    let forged = json!({ "type": "forged", "endpoints": ["/forged"] });
    let forgery = |topic: &str, event: &str, private: Value| json!({ "topic": topic, "event": event, "payload": forged, "private": private });
    let denied = "tidegate_dropped_total{reason=\"write_denied\"}";
    let mut attempts = 0.0;
    for role in ["anon", "authenticated"] {
        // Of a batch the rest is delivered, and the answer is the same.
        let mut messages = Vec::new();
        for topic in [CACHE, "cache_invalidate:AB3028"] {
            for event in ["e", "cache_invalidation"] {
                for private in [json!(null), json!(true)] {
                    messages.push(forgery(topic, event, private));
                    attempts += 1.0;
                }
                for (query, kind) in [("", "json"), ("?private=true", "json"), ("", "octet-stream")]
                {
                    let path = path_of(topic, &format!("events/{event}{query}"));
                    let kind = format!("content-type: application/{kind}");
                    let request = post(&path, &[&apikey(role), &kind], forged.to_string());
                    let answer = ask(&server, request).await;
                    assert_eq!(answer.status, 403, "{path}");
                    assert_eq!(answer.json(), json!({ "message": "Unauthorized" }));
                    attempts += 1.0;
                }
            }
        }
        messages.push(json!({ "topic": "room", "event": "e", "payload": { "n": 2 } }));
        let body = json!({ "messages": messages }).to_string();
        let answer = ask(&server, post(BATCH, &[&apikey(role)], body)).await;
        assert!(is_accepted(&answer), "{answer:?}");
        client.hears("room", json!({ "n": 2 })).await;
    }
    assert_eq!(server.metric(denied).await, attempts);
    let path = path_of(CACHE, "events/e");
    let answer = ask(&server, post(&path, &[&apikey("service_role")], r#"{"n":3}"#)).await;
    assert!(is_accepted(&answer), "{answer:?}");
    client.hears(CACHE, json!({ "n": 3 })).await;
    server.publish(CACHE, &json!({ "n": 4 })).await;
    client.hears(CACHE, json!({ "n": 4 })).await;
    // The first invalidation that may be written leaves as it came.
    let path = path_of(CACHE, "events/cache_invalidation");
    let payload = json!({ "type": "t", "endpoints": ["/true"] });
    let request = post(&path, &[&apikey("service_role")], payload.to_string());
    assert!(is_accepted(&ask(&server, request).await));
    assert_eq!(client.broadcast().await.1["payload"], payload);
    client.repeated(CACHE, payload).await;
    // Nobody writes what looks like a rule's topic, and what the rules close to all.
    for topic in
        ["cache_invalidate_", "cache_invalidate_AB.3028", "sms-+14165550100", "active-campaigns"]
    {
        let path = path_of(topic, "events/e");
        let answer = ask(&server, post(&path, &[&apikey("service_role")], json)).await;
        assert_eq!(answer.status, 403, "{topic}");
        attempts += 1.0;
    }
    assert_eq!(server.metric(denied).await, attempts);
    let mut late = Client::connect(&server, Serializer::V2).await;
    late.join_only(CACHE, json!({})).await;
    let endpoints = late.caught_up(CACHE).await;
    assert!(endpoints.contains(&"/true".to_owned()), "{endpoints:?}");
    assert!(!endpoints.contains(&"/forged".to_owned()), "{endpoints:?}");
    late.ends().await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn invalidations_of_one_batch_leave_as_one() {
    let server = TestServer::start_with(config_of_long_windows());
    let mut v1 = Client::connect(&server, Serializer::V1).await;
    let mut v2 = Client::connect(&server, Serializer::V2).await;
    let topics = [CACHE, "cache_invalidate:AB3028"];
    v1.join(topics[0]).await;
    v2.join(topics[1]).await;
    let message = |topic: &str, event: &str, n: u64| {
        let payload = json!({ "n": n, "endpoints": ["/both", format!("/{n}")], "timestamp": 1.5 });
        json!({ "topic": topic, "event": event, "payload": payload })
    };
    // One event under both spellings, and something else.
    let invalidation = "cache_invalidation";
    let messages = [
        message(topics[0], invalidation, 1),
        message(topics[0], "e", 2),
        message(topics[1], invalidation, 3),
    ];
    let body = json!({ "messages": messages }).to_string();
    let answer = ask(&server, post(BATCH, &[&apikey("service_role")], body)).await;
    assert!(is_accepted(&answer), "{answer:?}");
    for (mut client, topic) in [v1, v2].into_iter().zip(topics) {
        let (_, other) = client.broadcast().await;
        assert_eq!(other["payload"], messages[1]["payload"]);
        let (_, both) = client.broadcast().await;
        let payload = &both["payload"];
        let endpoints = json!(["/both", "/1", "/3"]);
        assert_eq!((&payload["n"], &payload["endpoints"]), (&json!(3), &endpoints), "{both}");
        assert_eq!(payload["merged"], 2);
        assert!(payload["timestamp"].as_f64() > Some(1e9), "clients drop an old one: {both}");
        // Once more, with what they have been caught up with.
        let (_, repeat) = client.broadcast().await;
        let endpoints = [&["/both", "/1", "/3"].map(str::to_owned), &resync("AB3028")[..]].concat();
        assert_eq!(repeat["payload"]["endpoints"], json!(endpoints), "{topic}");
        client.ends().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_private_message_is_not_relayed_to_the_public_topic_of_its_name() {
    let server = TestServer::start();
    let (mut v1, v2) = listeners(&server).await;
    let send = async |private: Value| {
        let body = json!({ "messages": [
            { "topic": "room", "event": "e", "payload": { "n": 1 }, "private": private },
        ] });
        assert!(is_accepted(&batch(&server, body.to_string()).await), "{private}");
    };
    for private in [json!(true), json!("true"), json!("1")] {
        send(private).await;
        v1.expect_nothing().await;
    }
    for private in [json!(false), json!("false"), json!("0"), json!(null)] {
        send(private).await;
        v1.hears("room", json!({ "n": 1 })).await;
    }
    let answer = single(&server, "room/events/e?private=true", &[], b"{\"private\":false}").await;
    // Nobody can say who may, without a database.
    let unavailable = json!({ "message": "Tenant database unavailable" });
    assert_eq!((answer.status, answer.json()), (422, unavailable));
    v1.expect_nothing().await;
    for query in ["", "?private=false", "?private=1", "?private=TRUE", "?x=true"] {
        let answer = single(&server, &format!("room/events/e{query}"), &[], b"{}").await;
        assert!(is_accepted(&answer), "{query}");
        v1.hears("room", json!({})).await;
    }
    v1.ends().await;
    v2.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_page_of_any_origin_may_ask() {
    let server = TestServer::start();
    for path in [
        "/api/broadcast",
        BATCH,
        "/api/broadcast/room/events/e",
        "/realtime/v1/api/broadcast/room/events/e",
    ] {
        let request = format!(
            "OPTIONS {path} HTTP/1.1\r\nhost: test\r\norigin: https://page.example\r\n\
             access-control-request-method: POST\r\n\
             access-control-request-headers: apikey,authorization,content-type,x-client-info\r\n\r\n"
        );
        let answer = ask(&server, request).await;
        assert!(matches!(answer.status, 200 | 204), "{path}: {answer:?}");
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"), "{path}");
        let methods = answer.header("access-control-allow-methods").unwrap_or_default();
        assert!(methods.contains("POST"), "{methods}");
        let headers = answer.header("access-control-allow-headers").unwrap_or_default();
        for name in ["authorization", "apikey", "content-type", "x-client-info", "traceparent"] {
            assert!(headers.split(',').any(|allowed| allowed.trim() == name), "{name}: {headers}");
        }
    }
    // Without the header a page cannot read the answer, an error's least of all.
    for (headers, body, status) in [
        (vec![apikey("anon")], message(&json!({})), 202),
        (vec![], message(&json!({})), 401),
        (vec![apikey("anon")], "{}".to_owned(), 422),
        (vec![apikey("anon")], "{".to_owned(), 400),
    ] {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let headers = [&headers[..], &["origin: https://page.example"]].concat();
        let answer = ask(&server, post(BATCH, &headers, body)).await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"), "{status}");
    }
    server.stop().await;
}
