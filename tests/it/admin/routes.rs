//! The admin port: readiness, metrics, and who may ask.

use serde_json::{Value, json};
use strum::{VariantArray, VariantNames};
use tidegate::{
    auth::TokenError,
    http::{CloseReason, RefusedUpgrade},
    invalidation::{BadEndpoint, CatchUpCause, Coverage, SendReason},
    protocol::{error_code::ErrorCode, message::Malformed, serializer::Serializer},
    relay::{LinkError, Outcome},
    secret::Secret,
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet};
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::Client,
    raw::pipeline_unread,
    server::{DEADLINE, TestServer, config},
    token,
};

async fn get(server: &TestServer, path: &str) -> (u16, String) {
    TestServer::request(server.admin, &format!("GET {path} HTTP/1.1"), "").await
}

#[tokio::test]
async fn without_a_database_a_server_lives_and_is_ready_strictly_too() {
    let server = TestServer::start();
    assert_eq!(get(&server, "/healthz").await, (200, "ok".to_owned()));
    let public = TestServer::request(server.public, "GET /healthz HTTP/1.1", "").await;
    assert_eq!(public, (200, "ok".to_owned()));
    for path in ["/readyz", "/readyz?strict=1"] {
        let (status, body) = get(&server, path).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200, "{path}");
        let ready = json!({ "ready": true, "draining": false, "link": "none", "canary": null });
        assert_eq!(body, ready, "{path}");
    }
    server.stop().await;
}

/// All gateways go out of a load balancer at once if a database's restart takes one out.
#[tokio::test]
async fn a_link_that_is_down_makes_a_server_unready_only_if_asked_strictly() {
    let mut config = config();
    // A port that nobody listens on.
    config.database_url = Secret::from("postgres://nobody@127.0.0.1:1/none");
    let server = TestServer::start_with(config);
    server.metric_reaches("tidegate_relay_reconnects_total{cause=\"connect\"}", 1.0).await;
    for (path, wanted) in [("/readyz", 200), ("/readyz?strict=1", 503)] {
        let (status, body) = get(&server, path).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["link"]), (wanted, &json!("down")), "{path}");
    }
    assert_eq!(get(&server, "/healthz").await.0, 200);
    assert_eq!(server.metric("tidegate_relay_link_up").await, 0.0);
    // Clients among themselves are served all the same, and so is a join that would have listened.
    let mut client = Client::connect(&server, Serializer::V1).await;
    client.join("cache_invalidate_AB3028").await;
    server.publish("cache_invalidate_AB3028", &json!({ "n": 1 })).await;
    client.hears("cache_invalidate_AB3028", json!({ "n": 1 })).await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn with_a_token_every_route_asks_for_it() {
    let mut config = config();
    config.admin_token = Secret::from("the-admins-token");
    let server = TestServer::start_with(config);
    let ask = async |request: &str, authorization: &str| {
        let head = format!("{request} HTTP/1.1{authorization}");
        TestServer::request(server.admin, &head, "").await
    };
    for request in ["GET /metrics", "GET /healthz", "GET /readyz", "POST /drain", "GET /none"] {
        for authorization in [
            "",
            "\r\nauthorization: Bearer wrong",
            "\r\nauthorization: Bearer the-admins-toke",
            "\r\nauthorization: Bearer the-admins-token2",
            "\r\nauthorization: Bearer the-admins-tokem",
            "\r\nauthorization: Bearer",
            "\r\nauthorization: the-admins-token",
            "\r\nauthorization: Basic the-admins-token",
            "\r\napikey: the-admins-token",
        ] {
            let (status, body) = ask(request, authorization).await;
            assert_eq!(status, 401, "{request} {authorization}");
            assert!(!body.contains("tidegate_"), "{body}");
        }
    }
    let right = "\r\nauthorization: Bearer the-admins-token";
    for (request, status) in [
        ("GET /metrics", 200),
        ("GET /healthz", 200),
        ("GET /readyz", 200),
        ("GET /none", 404),
        ("POST /drain", 202),
    ] {
        assert_eq!(ask(request, right).await.0, status, "{request}");
    }
    server.stop().await;
}

/// What the admin port answers to a request with these header lines, without anything else.
async fn ask_with(server: &TestServer, request: &str, headers: &[&str]) -> u16 {
    let head =
        format!("{request} HTTP/1.1\r\nconnection: close\r\n{}\r\n\r\n", headers.join("\r\n"));
    let answer = TestServer::raw(server.admin, head.as_bytes()).await;
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

/// A page that the operator looks at makes the browser ask (CWE-352), or has its own name point to
/// this machine and reads the answers (CWE-350).
#[tokio::test]
async fn without_a_token_no_web_page_reaches_the_operators_port() {
    let server = TestServer::start();
    let requests = [
        "GET /metrics",
        "GET /events",
        "GET /healthz",
        "POST /events/AB3028/mute?for=1h",
        "POST /drain",
    ];
    for request in requests {
        for headers in [
            &["host: localhost", "origin: https://evil.example"][..],
            &["host: localhost", "origin: null"],
            &["host: localhost", "origin: http://localhost"],
            &["host: localhost", "sec-fetch-site: cross-site"],
            &["host: localhost", "sec-fetch-site: same-site"],
            &["host: localhost", "sec-fetch-site: none", "sec-fetch-site: cross-site"],
            &["host: evil.example"],
            &["host: evil.example:9400"],
            &["host: localhost.evil.example"],
            &["host: 127.0.0.1.evil.example"],
            &["host: localhost@evil.example"],
            &["host: 10.0.0.1"],
            &["host: 0.0.0.0"],
            &["host: [::2]:9400"],
            &["host: localhost", "host: evil.example"],
            &["host: "],
        ] {
            assert_eq!(ask_with(&server, request, headers).await, 403, "{request} {headers:?}");
        }
        let (method, path) = request.split_once(' ').unwrap();
        let absolute = format!("{method} http://evil.example{path}");
        assert_eq!(ask_with(&server, &absolute, &["host: localhost"]).await, 403);
    }
    assert!(!server.gateway.draining.is_cancelled());
    for headers in [
        &["host: localhost"][..],
        &["host: LOCALHOST:9400"],
        &["host: 127.0.0.1:9400"],
        &["host: 127.8.9.10"],
        &["host: [::1]:9400"],
        &["host: [::ffff:127.0.0.1]"],
        &["host: localhost", "sec-fetch-site: none"],
        // HTTP/1.0 health checks; a browser always names one.
        &["x-none: x"],
    ] {
        assert_eq!(ask_with(&server, "GET /healthz", headers).await, 200, "{headers:?}");
    }
    server.stop().await;
}

/// Whoever has the token may come from anywhere, and no page has it.
#[tokio::test]
async fn with_a_token_the_operators_port_has_any_name() {
    let mut config = config();
    config.admin_token = Secret::from("the-admins-token");
    let server = TestServer::start_with(config);
    for headers in [&["host: metrics.internal"][..], &["host: x", "origin: https://ops.example"]] {
        assert_eq!(ask_with(&server, "GET /metrics", headers).await, 401, "{headers:?}");
        let right = [headers, &["authorization: Bearer the-admins-token"]].concat();
        assert_eq!(ask_with(&server, "GET /metrics", &right).await, 200, "{headers:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_route_is_not_found() {
    let server = TestServer::start();
    for request in
        ["GET /", "GET /metricsx", "POST /metrics", "POST /readyz", "GET /healthz/", "GET //"]
    {
        let (status, body) =
            TestServer::request(server.admin, &format!("{request} HTTP/1.1"), "").await;
        assert_eq!((status, &*body), (404, r#"{"message":"not found"}"#), "{request}");
    }
    // The public port shows nothing of it.
    for path in ["/metrics", "/readyz", "/drain"] {
        let (status, _) =
            TestServer::request(server.public, &format!("GET {path} HTTP/1.1"), "").await;
        assert_eq!(status, 404, "{path}");
    }
    server.stop().await;
}

/// A rate sees a counter's first increment only if the series was there before.
#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a list of names")]
async fn every_series_is_there_before_anything_has_happened() {
    let server = TestServer::start();
    let (_, text) = get(&server, "/metrics").await;
    let mut wanted: Vec<String> = [
        "connections",
        "connections_accepted_total",
        "accept_errors_total",
        "channels",
        "topics",
        "join_seconds_count",
        "join_seconds_sum",
        "join_seconds_bucket{le=\"+Inf\"}",
        "frames_total{direction=\"in\"}",
        "frames_total{direction=\"out\"}",
        "bytes_total{direction=\"in\"}",
        "bytes_total{direction=\"out\"}",
        "broadcasts_total{source=\"socket\"}",
        "broadcasts_total{source=\"rest\"}",
        "broadcasts_total{source=\"database\"}",
        "broadcasts_total{source=\"merged\"}",
        "invalidations_merged_total",
        "deaf_suspects",
        "heals_sent_total",
        "healed_total",
        "canary_seconds_count",
        "canary_last_arrival_timestamp_seconds",
        "canary_failures_total",
        "history_unreadable_total",
        "deliveries_total",
        "fanout_seconds_count",
        "fanout_seconds_sum",
        "fanout_seconds_bucket{le=\"+Inf\"}",
        "relay_link_up",
        "relay_last_notification_timestamp_seconds",
        "joins_total{code=\"\",result=\"ok\"}",
        "joins_total{code=\"\",result=\"withheld\"}",
        "tokens_total{result=\"ok\"}",
    ]
    .map(str::to_owned)
    .into();
    for reason in RefusedUpgrade::VARIANTS {
        wanted.push(format!("connections_refused_total{{reason=\"{}\"}}", reason.label()));
    }
    for reason in CloseReason::all() {
        let (code, reason) = (reason.code_label(), reason.label());
        wanted.push(format!("connections_closed_total{{code=\"{code}\",reason=\"{reason}\"}}"));
    }
    for code in ErrorCode::VARIANTS {
        wanted.push(format!("joins_total{{code=\"{}\",result=\"error\"}}", code.as_str()));
    }
    for malformed in Malformed::VARIANTS {
        wanted.push(format!("malformed_total{{reason=\"{}\"}}", malformed.label()));
    }
    for result in TokenError::VARIANTS {
        wanted.push(format!("tokens_total{{result=\"{result}\"}}"));
    }
    for why in SendReason::VARIANTS {
        wanted.push(format!("invalidations_sent_total{{reason=\"{}\"}}", why.label()));
    }
    for bad in BadEndpoint::VARIANTS {
        wanted.push(format!("endpoints_dropped_total{{reason=\"{}\"}}", bad.label()));
    }
    for (cause, method) in CatchUpCause::all()
        .flat_map(|cause| Coverage::VARIANTS.iter().map(move |method| (cause, *method)))
    {
        let (cause, method) = (cause.label(), method.label());
        wanted.push(format!("catch_ups_total{{cause=\"{cause}\",method=\"{method}\"}}"));
    }
    for cause in LinkError::VARIANTS {
        wanted.push(format!("relay_reconnects_total{{cause=\"{cause}\"}}"));
    }
    for name in &wanted {
        let series = format!("tidegate_{name} ");
        assert!(text.lines().any(|line| line.starts_with(&series)), "{series}\n{text}");
    }
    for outcome in Outcome::VARIANTS {
        let series = "tidegate_notifications_total{";
        let label = format!("outcome=\"{}\"", outcome.label());
        let has = |line: &str| {
            line.starts_with(series) && line.contains(&label) && line.contains("source=\"")
        };
        assert!(text.lines().any(has), "{label}");
    }
    let build = format!("tidegate_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    assert!(text.lines().any(|line| line == build), "{build}");
    for name in [
        "cpu_seconds_total",
        "open_fds",
        "max_fds",
        "resident_memory_bytes",
        "start_time_seconds",
        "threads",
    ] {
        let series = format!("process_{name} ");
        assert!(text.lines().any(|line| line.starts_with(&series)), "{series}");
    }
    server.stop().await;
}

#[tokio::test]
async fn every_metric_says_what_it_is_and_is_of_one_type() {
    let server = TestServer::start();
    let (_, text) = get(&server, "/metrics").await;
    let mut names = std::collections::HashSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(names.insert(name), "{name} twice");
            assert!(text.contains(&format!("# HELP {name} ")), "{name} has a help");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix).filter(|base| names.contains(base)));
            assert!(names.contains(base.unwrap_or(name)), "{name} has a type");
        }
    }
    server.stop().await;
}

/// A client that counts what it sends and gets.
struct Counting {
    client: Client,
    sent: (f64, f64),
    received: (f64, f64),
}

impl Counting {
    async fn connect(server: &TestServer) -> Self {
        let client = Client::connect(server, Serializer::V2).await;
        Self { client, sent: (0.0, 0.0), received: (0.0, 0.0) }
    }

    async fn send(&mut self, text: &str) {
        self.sent.0 += 1.0;
        self.sent.1 += text.len() as f64;
        self.client.send_frame(Frame::text(text)).await;
    }

    async fn expect(&mut self, event: &str) -> Value {
        let Frame::Text(text) = self.client.frame().await else { panic!("text") };
        self.received.0 += 1.0;
        self.received.1 += text.len() as f64;
        let message: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(message[3], event, "{message}");
        message
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one conversation and what it comes to")]
async fn after_one_conversation_every_counter_is_exact() {
    let server = TestServer::start();
    let mut a = Counting::connect(&server).await;
    let mut b = Counting::connect(&server).await;
    let refused = Client::refused(&server, "/socket/websocket?apikey=garbage").await;
    assert_eq!(refused.status(), 401);
    assert_eq!(Client::refused(&server, "/socket/websocket?vsn=7.0.0").await.status(), 403);

    let ack = r#"{"config":{"broadcast":{"ack":true}}}"#;
    a.send(&format!(r#"["1","1","realtime:room","phx_join",{ack}]"#)).await;
    a.expect("phx_reply").await;
    b.send(r#"["1","1","realtime:room","phx_join",{"config":{}}]"#).await;
    b.expect("phx_reply").await;
    b.send(r#"["2","2","realtime:admin-auction-AB1","phx_join",{"config":{}}]"#).await;
    b.expect("phx_reply").await;
    b.send(r#"["3","3","realtime:sms-1","phx_join",{"config":{}}]"#).await;
    assert_eq!(b.expect("phx_reply").await[4]["status"], "error");
    let bad = r#"{"config":{},"access_token":"garbage"}"#;
    b.send(&format!(r#"["4","4","realtime:x","phx_join",{bad}]"#)).await;
    assert_eq!(b.expect("phx_reply").await[4]["status"], "error");

    // Three broadcasts: one over a socket, two over HTTP, of which one is heard by two.
    a.send(r#"["1","2","realtime:room","broadcast",{"type":"broadcast","event":"é"}]"#).await;
    a.expect("phx_reply").await;
    b.expect("broadcast").await;
    server.publish("room", &json!({ "n": 1 })).await;
    a.expect("broadcast").await;
    b.expect("broadcast").await;
    server.publish("nobody", &json!({ "n": 1 })).await;

    // Dropped, each for its reason.
    a.send("nonsense").await;
    a.send("[]").await;
    a.send(r#"["1",null,"realtime:room","no_such_event",{}]"#).await;
    a.send(r#"["1",null,"realtime:room","broadcast",[]]"#).await;
    a.send(r#"["0","5","realtime:room","phx_leave",{}]"#).await;
    a.send(r#"["","","realtime:y","phx_join",{"config":{}}]"#).await;
    a.send(r#"[null,"9","phoenix","heartbeat",{}]"#).await;
    a.expect("phx_reply").await;

    b.send(r#"["1","6","realtime:room","phx_leave",{}]"#).await;
    b.expect("phx_reply").await;
    b.expect("phx_close").await;
    let sum = |a: (f64, f64), b: (f64, f64)| (a.0 + b.0, a.1 + b.1);
    let (sent, received) = (sum(a.sent, b.sent), sum(a.received, b.received));

    let expected = [
        ("connections", 2.0),
        ("connections_accepted_total", 2.0),
        ("connections_refused_total{reason=\"token\"}", 1.0),
        ("connections_refused_total{reason=\"version\"}", 1.0),
        ("connections_refused_total{reason=\"full\"}", 0.0),
        ("channels", 2.0),
        // The withheld channel is no subscriber.
        ("topics", 1.0),
        ("joins_total{code=\"\",result=\"ok\"}", 2.0),
        ("joins_total{code=\"\",result=\"withheld\"}", 1.0),
        ("joins_total{code=\"Unauthorized\",result=\"error\"}", 1.0),
        ("joins_total{code=\"MalformedJWT\",result=\"error\"}", 1.0),
        ("join_seconds_count", 3.0),
        ("frames_total{direction=\"in\"}", sent.0),
        ("frames_total{direction=\"out\"}", received.0),
        ("bytes_total{direction=\"in\"}", sent.1),
        ("bytes_total{direction=\"out\"}", received.1),
        ("malformed_total{reason=\"not_json\"}", 1.0),
        ("malformed_total{reason=\"wrong_shape\"}", 1.0),
        ("malformed_total{reason=\"truncated\"}", 0.0),
        ("dropped_total{reason=\"unknown_event\"}", 1.0),
        ("dropped_total{reason=\"not_object\"}", 1.0),
        ("dropped_total{reason=\"stale_leave\"}", 1.0),
        ("dropped_total{reason=\"empty_ref\"}", 1.0),
        ("dropped_total{reason=\"write_denied\"}", 0.0),
        // Two upgrades, two requests; the refused upgrade and the refused join.
        ("tokens_total{result=\"ok\"}", 4.0),
        ("tokens_total{result=\"malformed\"}", 2.0),
        ("tokens_total{result=\"missing\"}", 0.0),
        ("broadcasts_total{source=\"socket\"}", 1.0),
        ("broadcasts_total{source=\"rest\"}", 2.0),
        ("broadcasts_total{source=\"database\"}", 0.0),
        ("deliveries_total", 3.0),
        ("fanout_seconds_count", 3.0),
        ("relay_link_up", 0.0),
    ];
    for (series, value) in expected {
        assert_eq!(server.metric(&format!("tidegate_{series}")).await, value, "{series}");
    }
    a.client.close().await;
    drop(b);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    for (labels, value) in
        [("code=\"none\",reason=\"peer\"", 1.0), ("code=\"none\",reason=\"peer_gone\"", 1.0)]
    {
        let series = format!("tidegate_connections_closed_total{{{labels}}}");
        assert_eq!(server.metric(&series).await, value, "{series}");
    }
    assert_eq!(server.metric("tidegate_channels").await, 0.0);
    assert_eq!(server.metric("tidegate_topics").await, 0.0);
    server.stop().await;
}

#[tokio::test]
async fn a_scrape_is_of_the_text_format_and_shows_no_secret() {
    let server = TestServer::start();
    let token = token::of_role("anon");
    let client = Client::with_token(&server, Serializer::V1, &token).await;
    let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let answer = TestServer::raw(server.admin, request.as_bytes()).await;
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    assert!(answer.ends_with('\n'));
    assert!(!answer.contains(&token) && !answer.contains(token::SECRET));
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn every_metric_has_the_prefix_or_is_the_process() {
    let server = TestServer::start();
    let (status, text) = TestServer::request(server.admin, "GET /metrics HTTP/1.1", "").await;
    assert_eq!(status, 200);
    let names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    assert!(names.len() > 25, "{names:?}");
    for name in names {
        assert!(name.starts_with("tidegate_") || name.starts_with("process_"), "{name}");
    }
    server.stop().await;
}

/// No place comes back by itself here: a newcomer takes that of a connection that is not answered.
#[tokio::test]
async fn strangers_who_hold_the_operators_port_shut_nobody_out() {
    let mut config = config();
    config.admin_token = Secret::from("a-token-of-operators");
    config.limits.handshake_timeout = 60 * DEADLINE;
    config.limits.write_timeout = 60 * DEADLINE;
    let server = TestServer::start_with(config);
    let mut attackers = JoinSet::new();
    let mut half_open = Vec::new();
    let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let head = "GET /healthz HTTP/1.1\r\nauthorization: Bearer a-token-of-operators";
    for _ in 0..3 {
        for _ in 0..40 {
            let mut stream = TcpStream::connect(server.admin).await.unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n").await.unwrap();
            half_open.push(stream);
        }
        for _ in 0..8 {
            let address = server.admin;
            attackers.spawn(async move { pipeline_unread(address, request).await });
        }
        let answer = TestServer::request(server.admin, head, "").await;
        assert_eq!(answer, (200, "ok".to_owned()));
    }
    let displaced = server.count("tidegate_connections_refused_total{reason=\"displaced\"}");
    assert!(displaced > 0);
    assert_eq!(server.count("tidegate_connections_refused_total{reason=\"pending\"}"), 0);
    attackers.shutdown().await;
    drop(half_open);
    server.stop().await;
}
