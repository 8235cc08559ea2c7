//! The upgrade: who gets in, who does not, and what they are told.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::{clock::unix_now, protocol::serializer::Serializer, secret::Secret};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{interval, timeout},
};

use crate::support::{
    client::Client,
    raw::{Answer, answer, ask, frame, is_silent, pipeline_unread, post, send, until_end, upgrade},
    server::{DEADLINE, TestServer, config},
    token,
};

/// What the reference server answers to a key that opens nothing.
async fn expect_refused(server: &TestServer, path: &str, text: &str) {
    let answer = ask(server, upgrade(path, &[])).await;
    assert_eq!(answer.status, 401, "{path}: {answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/json; charset=utf-8"), "{path}");
    assert_eq!(answer.json(), json!({ "error": text }), "{path}");
}

#[tokio::test]
async fn a_key_that_opens_nothing_is_refused_with_its_reason() {
    let server = TestServer::start();
    let no_signer = "Failed to generate JWT signer";
    let with_kid =
        format!("{no_signer} for key ID (kid) \"k1\", check your JWT secret or JWKS configuration");
    let without_kid = format!("{no_signer}, check your JWT secret or JWKS configuration");
    // {"role":"anon","exp":9999999999} under {"alg":"ES256","kid":"k1"} and under {"alg":"none"}.
    let claims = "eyJyb2xlIjoiYW5vbiIsImV4cCI6OTk5OTk5OTk5OX0";
    let es256 = format!("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIiwidHlwIjoiSldUIn0.{claims}.AAAA");
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{claims}.");
    let required = "Fields `role` and `exp` are required in JWT";
    let path = "/realtime/v1/websocket?vsn=2.0.0";
    expect_refused(&server, path, "API key is missing").await;
    for (key, text) in [
        (token::named("expired"), "Token has expired"),
        (
            token::with_claims(json!({ "role": "anon", "nbf": unix_now() + 3600 })),
            "Token is not valid yet",
        ),
        (token::named("no_role"), required),
        (token::named("no_exp"), required),
        (token::named("wrong_secret"), "Failed to validate JWT signature"),
        (String::new(), "The token provided is not a valid JWT"),
        ("garbage".to_owned(), "The token provided is not a valid JWT"),
        ("a.b.c".to_owned(), "The token provided is not a valid JWT"),
        ("t".repeat(9000), "The token provided is not a valid JWT"),
        (es256, &with_kid),
        (unsigned, &without_kid),
    ] {
        expect_refused(&server, &format!("{path}&apikey={key}"), text).await;
    }
    let refused = "tidegate_connections_refused_total{reason=\"token\"}";
    assert_eq!(server.metric(refused).await, 12.0);
    assert_eq!(server.metric("tidegate_connections_accepted_total").await, 0.0);
    server.stop().await;
}

#[tokio::test]
async fn a_key_of_another_issuer_or_for_another_audience_is_refused_where_that_is_asked_for() {
    let mut settings = config();
    settings.auth.issuers = vec!["us".to_owned()];
    settings.auth.audiences = vec!["authenticated".to_owned()];
    let server = TestServer::start_with(settings);
    let path = "/realtime/v1/websocket?vsn=2.0.0";
    for (iss, aud, text) in [
        ("them", "authenticated", "Token is of another issuer"),
        ("us", "anon", "Token is for another audience"),
    ] {
        let key = token::with_claims(json!({ "role": "anon", "iss": iss, "aud": aud }));
        expect_refused(&server, &format!("{path}&apikey={key}"), text).await;
    }
    let key = token::with_claims(json!({ "role": "anon", "iss": "us", "aud": ["authenticated"] }));
    Client::with_token(&server, Serializer::V2, &key).await.close().await;
    server.stop().await;
}

/// An immediate refusal would have clients with a stale key knock once a second for good; one that
/// held others up would let them stop everybody.
#[tokio::test]
async fn a_refusal_for_its_key_is_delayed_and_delays_nobody_else() {
    let mut config = config();
    config.protocol.error_delay = Duration::from_millis(700);
    let server = TestServer::start_with(config);
    let mut refused = send(&server, upgrade("/socket/websocket?apikey=garbage", &[])).await;
    server.metric_reaches("tidegate_tokens_total{result=\"malformed\"}", 1.0).await;
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join("room").await;
    other.expect_nothing().await;
    assert!(is_silent(&refused), "a whole conversation fits into the delay");
    assert_eq!(answer(&mut refused).await.status, 401);
    drop(refused);
    other.close().await;
    server.stop().await;
}

#[tokio::test]
async fn the_header_x_api_key_goes_before_the_query() {
    let server = TestServer::start();
    let good = token::of_role("anon");
    let status = async |query: &str, headers: &[&str]| {
        let path = format!("/realtime/v1/websocket?vsn=1.0.0{query}");
        ask(&server, upgrade(&path, headers)).await.status
    };
    let header = format!("x-api-key: {good}");
    assert_eq!(status("", &[&header]).await, 101);
    assert_eq!(status("&apikey=garbage", &[&header]).await, 101);
    assert_eq!(status(&format!("&apikey={good}"), &["x-api-key: garbage"]).await, 401);
    // Read for REST, not for sockets.
    assert_eq!(status("", &[&format!("authorization: Bearer {good}")]).await, 401);
    assert_eq!(status("", &[&format!("apikey: {good}")]).await, 401);
    server.stop().await;
}

#[tokio::test]
async fn a_key_may_be_percent_encoded_and_broken_by_whitespace() {
    let server = TestServer::start();
    let token = token::of_role("anon");
    let (half, rest) = token.split_at(20);
    let encoded: String = token.bytes().map(|byte| format!("%{byte:02X}")).collect();
    for key in [
        format!("%20{half}%0A%09{rest}+"),
        encoded.clone(),
        // Once by the client, once more by a proxy.
        encoded.replace('%', "%25"),
    ] {
        let path = format!("/socket/websocket?vsn=2.0.0&apikey={key}");
        assert_eq!(ask(&server, upgrade(&path, &[])).await.status, 101, "{key}");
    }
    for key in [format!("{half} {rest}"), encoded] {
        let header = format!("x-api-key: {key}");
        let answer = ask(&server, upgrade("/socket/websocket", &[&header])).await;
        assert_eq!(answer.status, 101, "{header}");
    }
    server.stop().await;
}

#[tokio::test]
async fn an_unknown_version_is_refused_without_a_body_before_the_key_is_looked_at() {
    let server = TestServer::start();
    for vsn in ["3.0.0", "1.1.0", "2", "", "abc", "2.0.0-rc.1"] {
        for key in ["garbage".to_owned(), token::of_role("anon")] {
            let path = format!("/realtime/v1/websocket?vsn={vsn}&apikey={key}");
            let answer = ask(&server, upgrade(&path, &[])).await;
            assert_eq!((answer.status, &*answer.body), (403, ""), "{path}");
        }
    }
    let refused = "tidegate_connections_refused_total{reason=\"version\"}";
    assert_eq!(server.metric(refused).await, 12.0);
    for result in ["ok", "missing", "malformed"] {
        let series = format!("tidegate_tokens_total{{result=\"{result}\"}}");
        assert_eq!(server.metric(&series).await, 0.0, "{series}");
    }
    server.stop().await;
}

/// realtime-js 2.0.0 sends `vsn=1.0.0`; an older Phoenix client sends none.
#[tokio::test]
async fn without_a_version_the_first_one_is_spoken() {
    let server = TestServer::start();
    let token = token::of_role("anon");
    let beat = br#"{"topic":"phoenix","event":"heartbeat","payload":{},"ref":"1"}"#;
    let request = upgrade(&format!("/socket/websocket?apikey={token}"), &[]);
    // In one packet: what follows the head is the WebSocket's, and not lost.
    let mut stream = send(&server, [request.as_bytes(), &frame(0x81, beat)].concat()).await;
    assert_eq!(answer(&mut stream).await.status, 101);
    stream.write_all(&frame(0x88, &1000_u16.to_be_bytes())).await.unwrap();
    let received = until_end(&mut stream).await;
    assert_eq!((received[0], usize::from(received[1])), (0x81, received.len() - 6), "text, close");
    let reply: Value = serde_json::from_slice(&received[2..received.len() - 4]).unwrap();
    assert_eq!(
        reply,
        json!({ "ref": "1", "topic": "phoenix", "event": "phx_reply",
            "payload": { "status": "ok", "response": {} } })
    );
    server.stop().await;
}

#[tokio::test]
async fn both_paths_open_a_socket_and_no_other_does() {
    let server = TestServer::start();
    let query =
        format!("apikey={}&vsn=2.0.0&log_level=warn&eventsPerSecond=10", token::of_role("anon"));
    for (path, status) in [
        ("/realtime/v1/websocket", 101),
        ("/socket/websocket", 101),
        ("/realtime/v1/websocket/", 404),
        ("/socket/websocketx", 404),
        ("/socket/longpoll", 404),
        ("/websocket", 404),
        ("/", 404),
    ] {
        let answer = ask(&server, upgrade(&format!("{path}?{query}"), &[])).await;
        assert_eq!(answer.status, status, "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_upgrade_is_a_bad_request() {
    let server = TestServer::start();
    let path = format!("/realtime/v1/websocket?apikey={}", token::of_role("anon"));
    let whole = upgrade(&path, &[]);
    let requests = [
        format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"),
        format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n"),
        whole.replace("GET ", "POST "),
        whole.replace("upgrade: websocket\r\n", ""),
        whole.replace("upgrade: websocket", "upgrade: h2c"),
        whole.replace("connection: Upgrade", "connection: keep-alive"),
        whole.replace("sec-websocket-version: 13", "sec-websocket-version: 8"),
        whole.replace("sec-websocket-version: 13\r\n", ""),
        whole.replace("sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""),
    ];
    for request in &requests {
        assert_eq!(ask(&server, request).await.status, 400, "{request}");
    }
    let refused = "tidegate_connections_refused_total{reason=\"bad_request\"}";
    assert_eq!(server.metric(refused).await, 9.0);
    // Any of many, in any case, as proxies write it.
    let many = whole.replace("connection: Upgrade", "Connection: keep-alive, upgrade");
    assert_eq!(ask(&server, many.replace("websocket\r\n", "WebSocket\r\n")).await.status, 101);
    server.stop().await;
}

/// The answer to an upgrade that asks for more than a socket.
async fn upgraded_with(headers: &[&str]) -> Answer {
    let server = TestServer::start();
    let path = format!("/realtime/v1/websocket?apikey={}", token::of_role("anon"));
    let answer = ask(&server, upgrade(&path, headers)).await;
    assert_eq!(answer.status, 101);
    assert_eq!(answer.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    server.stop().await;
    answer
}

#[tokio::test]
async fn no_sub_protocol_is_echoed() {
    let asked = "sec-websocket-protocol: phoenix, base64url.bearer.phx.abc";
    assert_eq!(upgraded_with(&[asked]).await.header("sec-websocket-protocol"), None);
}

/// What is compressed tells its content by its length, and may unfold to more than it weighs.
#[tokio::test]
async fn no_compression_is_negotiated() {
    let asked = "sec-websocket-extensions: permessage-deflate; client_max_window_bits";
    assert_eq!(upgraded_with(&[asked]).await.header("sec-websocket-extensions"), None);
}

#[tokio::test]
async fn without_a_list_a_page_of_any_origin_may_connect() {
    upgraded_with(&["origin: https://elsewhere.example"]).await;
    upgraded_with(&["origin: null"]).await;
}

#[tokio::test]
async fn long_poll_is_not_found() {
    let server = TestServer::start();
    let anon = token::of_role("anon");
    for path in ["/socket/longpoll", "/realtime/v1/longpoll"] {
        let path = format!("{path}?vsn=2.0.0&apikey={anon}");
        let get = format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n");
        assert_eq!(ask(&server, get).await.status, 404, "{path}");
        assert_eq!(ask(&server, post(&path, &[], "[]")).await.status, 404, "{path}");
        assert_eq!(ask(&server, upgrade(&path, &[])).await.status, 404, "{path}");
    }
    server.stop().await;
}

/// Overload is answered at once: a delayed answer would hold what there is too little of.
#[tokio::test]
async fn past_the_last_place_an_upgrade_is_refused_at_once_and_a_place_is_given_back() {
    let mut config = config();
    config.limits.connections_max = 2;
    config.protocol.error_delay = Duration::from_millis(1500);
    let server = TestServer::start_with(config);
    let path = format!("/realtime/v1/websocket?vsn=2.0.0&apikey={}", token::of_role("anon"));
    let mut first = Client::connect(&server, Serializer::V2).await;
    let second = Client::connect(&server, Serializer::V2).await;
    // A key is looked at before the places are counted, and its refusal is delayed: the marker.
    let mut delayed = send(&server, upgrade("/realtime/v1/websocket?apikey=garbage", &[])).await;
    server.metric_reaches("tidegate_tokens_total{result=\"malformed\"}", 1.0).await;
    let full = ask(&server, upgrade(&path, &[])).await;
    assert_eq!(full.status, 429);
    assert_eq!(full.header("content-type"), Some("application/json; charset=utf-8"));
    assert_eq!(full.json(), json!({ "error": "Too many connected users" }));
    assert!(is_silent(&delayed), "the answer came before that which was due earlier");
    assert_eq!(server.metric("tidegate_connections_refused_total{reason=\"full\"}").await, 1.0);
    first.expect_nothing().await;
    second.close().await;
    server.metric_falls_to("tidegate_connections", 1.0).await;
    // The place is given back when the connection's task ends, a moment after it is uncounted.
    while ask(&server, upgrade(&path, &[])).await.status != 101 {}
    first.expect_nothing().await;
    assert_eq!(answer(&mut delayed).await.status, 401);
    drop(delayed);
    first.close().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_come_at_once_as_many_get_in_as_there_are_places() {
    let mut config = config();
    config.limits.connections_max = 10;
    let server = TestServer::start_with(config);
    let request = upgrade(&format!("/socket/websocket?apikey={}", token::of_role("anon")), &[]);
    let mut asking = JoinSet::new();
    for _ in 0..50 {
        let (address, request) = (server.public, request.clone());
        asking.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            (answer(&mut stream).await.status, stream)
        });
    }
    let answers = asking.join_all().await;
    let count = |status| answers.iter().filter(|answer| answer.0 == status).count();
    assert_eq!((count(101), count(429)), (10, 40));
    drop(answers);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    server.stop().await;
}

/// As a proxy does that keeps its connections.
#[tokio::test]
async fn an_upgrade_may_follow_other_requests_on_its_connection() {
    let server = TestServer::start();
    let mut stream = send(&server, "GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await;
    assert_eq!(answer(&mut stream).await.body, "ok");
    let path = format!("/socket/websocket?vsn=2.0.0&apikey={}", token::of_role("anon"));
    stream.write_all(upgrade("/socket/websocket", &[]).as_bytes()).await.unwrap();
    assert_eq!(answer(&mut stream).await.status, 401);
    stream.write_all(upgrade(&path, &[]).as_bytes()).await.unwrap();
    assert_eq!(answer(&mut stream).await.status, 101);
    let beat = r#"[null,"1","phoenix","heartbeat",{}]"#;
    stream.write_all(&frame(0x81, beat.as_bytes())).await.unwrap();
    stream.write_all(&frame(0x88, &[])).await.unwrap();
    let received = until_end(&mut stream).await;
    assert!(String::from_utf8_lossy(&received).contains("phx_reply"), "{received:?}");
    server.stop().await;
}

#[tokio::test]
async fn who_goes_away_in_mid_handshake_gives_the_place_back() {
    let mut config = config();
    config.limits.connections_max = 1;
    let server = TestServer::start_with(config);
    let path = format!("/realtime/v1/websocket?apikey={}", token::of_role("anon"));
    for _ in 0..20 {
        // Closed at once, before or after the answer.
        drop(send(&server, upgrade(&path, &[])).await);
    }
    while ask(&server, upgrade(&path, &[])).await.status != 101 {}
    server.stop().await;
}

#[tokio::test]
async fn a_long_head_is_read_and_one_of_64_kib_is_refused_and_disturbs_nobody() {
    let server = TestServer::start();
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join_with("room", json!({ "broadcast": { "self": true } })).await;
    let path = format!("/realtime/v1/websocket?apikey={}", token::of_role("anon"));
    let head = |bytes: usize| upgrade(&path, &[&format!("cookie: {}", "c".repeat(bytes))]);
    // A long JWT may stand in the URL and in headers.
    assert_eq!(ask(&server, head(24 * 1024)).await.status, 101);
    assert_eq!(ask(&server, head(64 * 1024)).await.status, 431);
    let url = format!("{path}&x={}", "x".repeat(64 * 1024));
    let status = ask(&server, upgrade(&url, &[])).await.status;
    assert!(matches!(status, 414 | 431), "{status}");
    other.publish("room", json!({ "n": 1 })).await;
    other.hears("room", json!({ "n": 1 })).await;
    other.close().await;
    server.stop().await;
}

#[tokio::test]
async fn half_a_head_is_closed_after_the_handshakes_time() {
    let mut config = config();
    config.limits.handshake_timeout = Duration::from_millis(150);
    let server = TestServer::start_with(config);
    let mut other = Client::connect(&server, Serializer::V2).await;
    let head = upgrade(&format!("/socket/websocket?apikey={}", token::of_role("anon")), &[]);
    for part in ["", "GET", &head[..head.len() / 2], &head[..head.len() - 2]] {
        let mut stream = send(&server, part).await;
        let received = until_end(&mut stream).await;
        let received = String::from_utf8_lossy(&received);
        assert!(!received.contains("101"), "{part}: {received}");
    }
    // Whoever is through has all the time of a socket.
    other.expect_nothing().await;
    assert_eq!(server.metric("tidegate_connections_accepted_total").await, 1.0);
    other.close().await;
    server.stop().await;
}

/// The time is for the whole head, however its bytes come, and for each head of a connection.
#[tokio::test]
async fn a_head_that_trickles_is_closed_after_the_handshakes_time() {
    let mut config = config();
    config.limits.handshake_timeout = Duration::from_millis(300);
    let server = TestServer::start_with(config);
    let head = upgrade(&format!("/socket/websocket?apikey={}", token::of_role("anon")), &[]);
    for requests_before in [0, 1] {
        let mut stream = TcpStream::connect(server.public).await.unwrap();
        for _ in 0..requests_before {
            stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
            assert_eq!(answer(&mut stream).await.body, "ok");
        }
        let (mut reading, mut writing) = stream.into_split();
        let mut trickles = JoinSet::new();
        let head = head.clone();
        trickles.spawn(async move {
            let mut ticks = interval(Duration::from_millis(10));
            for byte in head.into_bytes() {
                ticks.tick().await;
                if writing.write_all(&[byte]).await.is_err() {
                    return;
                }
            }
            panic!("the server has waited for the whole of it");
        });
        let mut received = Vec::new();
        let read = reading.read_to_end(&mut received);
        assert!(timeout(DEADLINE, read).await.is_ok(), "the server closes in time");
        assert!(!received.starts_with(b"HTTP/1.1 101"));
        drop(reading);
        trickles.join_all().await;
    }
    assert_eq!(server.metric("tidegate_connections_accepted_total").await, 0.0);
    server.stop().await;
}

#[tokio::test]
async fn a_hundred_headers_are_read_and_one_more_is_refused() {
    let server = TestServer::start();
    let path = format!("/realtime/v1/websocket?apikey={}", token::of_role("anon"));
    // Five are the upgrade's own.
    for (count, status) in [(95, 101), (96, 431)] {
        let headers: Vec<String> = (0..count).map(|n| format!("x-{n}: {n}")).collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        assert_eq!(ask(&server, upgrade(&path, &headers)).await.status, status, "{count}");
    }
    server.stop().await;
}

#[tokio::test]
async fn heads_that_come_to_nothing_are_counted_by_their_fault() {
    let mut config = config();
    config.limits.handshake_timeout = Duration::from_millis(300);
    let server = TestServer::start_with(config);
    let refused = |reason: &str| {
        server.count(&format!("tidegate_connections_refused_total{{reason=\"{reason}\"}}"))
    };
    assert_eq!(ask(&server, "GET / HTTP/9.9\r\n\r\n").await.status, 400);
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(64 * 1024));
    assert_eq!(ask(&server, long).await.status, 431);
    for bytes in ["", "GET / HTTP/1.1\r\n"] {
        until_end(&mut send(&server, bytes).await).await;
    }
    // Silence behind an answered request is nobody's fault.
    let mut stream = send(&server, "GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await;
    assert_eq!(answer(&mut stream).await.status, 200);
    until_end(&mut stream).await;
    server.metric_reaches("tidegate_connections_refused_total{reason=\"head_timeout\"}", 2.0).await;
    assert_eq!(
        [refused("malformed_head"), refused("large_head"), refused("head_timeout")],
        [1, 1, 2]
    );
    server.stop().await;
}

/// Each held a place for as long as it wished.
#[tokio::test]
async fn who_asks_and_reads_no_answer_is_ended_at_the_writes_deadline() {
    let mut config = config();
    config.limits.write_timeout = Duration::from_millis(300);
    let server = TestServer::start_with(config);
    let mut attackers = JoinSet::new();
    for (address, path) in [(server.public, "/nothing"), (server.admin, "/metrics")] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        attackers.spawn(async move { pipeline_unread(address, &request).await });
    }
    // They do not leave by themselves.
    let ended = timeout(6 * DEADLINE, attackers.join_all()).await;
    assert!(ended.is_ok(), "the server ends what makes no progress");
    server.metric_reaches("tidegate_connections_refused_total{reason=\"stalled\"}", 2.0).await;
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_http_is_refused_and_harms_nobody() {
    let server = TestServer::start();
    let mut other = Client::connect(&server, Serializer::V1).await;
    let mut random = fastrand::Rng::with_seed(5);
    let mut noise: Vec<Vec<u8>> =
        (0..50).map(|length| (0..length * 8).map(|_| random.u8(..)).collect()).collect();
    noise.push(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec());
    noise.push(b"SSH-2.0-OpenSSH_9.6\r\n\r\n".to_vec());
    noise.push(b"GET / HTTP/9.9\r\n\r\n".to_vec());
    noise.push(b"GET http://[::bad HTTP/1.1\r\n\r\n".to_vec());
    noise.push(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec());
    noise.push(frame(0x81, b"{}"));
    for mut bytes in noise {
        bytes.extend(b"\r\n\r\n");
        let mut stream = send(&server, &bytes).await;
        stream.shutdown().await.ok();
        let received = until_end(&mut stream).await;
        let answered = received.is_empty() || received.starts_with(b"HTTP/1.1 4");
        assert!(answered, "{bytes:?}: {:?}", String::from_utf8_lossy(&received));
    }
    other.expect_nothing().await;
    other.close().await;
    Client::connect(&server, Serializer::V2).await.close().await;
    server.stop().await;
}

/// Whatever is changed in an upgrade that would succeed: no socket without the key as it was.
#[tokio::test]
async fn an_upgrade_changed_at_random_opens_no_socket_without_its_key_and_harms_nobody() {
    let server = TestServer::start();
    let mut other = Client::connect(&server, Serializer::V1).await;
    let key = token::of_role("anon");
    let path = format!("/realtime/v1/websocket?apikey={key}&vsn=2.0.0");
    let good = upgrade(&path, &["origin: https://page.example", "x-forwarded-for: 192.0.2.1"]);
    let mut random = fastrand::Rng::with_seed(7);
    let mut opened = 0;
    for _ in 0..300 {
        let mut bytes = good.clone().into_bytes();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len() - 4);
            match random.u8(..3) {
                0 => bytes[at] = random.u8(..),
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, random.u8(..)),
            }
        }
        let mut stream = send(&server, &bytes).await;
        stream.shutdown().await.ok();
        let received = until_end(&mut stream).await;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if received.starts_with(b"HTTP/1.1 101 ") {
            opened += 1;
            assert!(text.contains(&key), "{text:?}");
        } else {
            let is_answered = received.is_empty() || received.starts_with(b"HTTP/1.1 4");
            assert!(is_answered, "{text:?}: {:?}", String::from_utf8_lossy(&received));
        }
    }
    assert!(opened > 10, "{opened} were still good");
    other.expect_nothing().await;
    other.close().await;
    server.stop().await;
}

#[tokio::test]
async fn an_opaque_key_opens_a_socket_and_a_rest_broadcast_as_its_role() {
    let mut config = config();
    config.publishable_key = Secret::from("sb_publishable_key");
    config.secret_key = Secret::from("sb_secret_key");
    let server = TestServer::start_with(config);
    let mut viewer = Client::with_token(&server, Serializer::V1, "sb_publishable_key").await;
    viewer.join("cache_invalidate_AB3028").await;
    let body = r#"{"messages":[{"topic":"cache_invalidate_AB3028","event":"e","payload":{}}]}"#;
    for key in ["sb_publishable_key", "sb_secret_key"] {
        let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {key}");
        assert_eq!(TestServer::request(server.public, &head, body).await.0, 202);
    }
    // Only the secret key may write there.
    assert_eq!(viewer.broadcast().await.1["event"], "e");
    viewer.expect_nothing().await;
    let refused = Client::refused(&server, "/realtime/v1/websocket?apikey=sb_secret_other").await;
    assert_eq!(refused.status(), 401);
    viewer.close().await;
    server.stop().await;
}
