//! The audit log: what is on record, that a line is an event whatever a client sends, and that it
//! and the other log are apart.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tidegate::{protocol::serializer::Serializer::V2, telemetry::audit::AuditLog};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::support::{
    client::Client,
    process::{Serving, run},
    raw,
    server::TestServer,
    token,
};

/// A folder that is removed with this.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let name = format!("tidegate-audit-{:016x}", fastrand::u64(..));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// The lines of a log without what differs from run to run: `timestamp` is there and of a form,
/// `address` is this machine's.
fn events(text: &str) -> Vec<Value> {
    let event = |line: &str| {
        let mut event: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line:?}"));
        let fields = event.as_object_mut().unwrap();
        let timestamp = fields.remove("timestamp").expect("a time");
        humantime::parse_rfc3339(timestamp.as_str().unwrap()).expect("a time of RFC 3339");
        if let Some(address) = fields.remove("address") {
            assert_eq!(address, "127.0.0.1");
        }
        event
    };
    text.lines().map(event).collect()
}

fn join(reference: &str, sub_topic: &str) -> Value {
    let topic = format!("realtime:{sub_topic}");
    json!([reference, reference, topic, "phx_join", { "config": {} }])
}

const SUB: &str = "0b5c7f1e-0d5e-4c1d-9f6a-000000000001";
const CACHE: &str = "realtime:cache_invalidate_AB3028";
const ADMIN: &str = "realtime:admin-auction-AB3028";

/// A line about the user of the tests, with these fields, too.
fn by_user(event: &str, more: &Value) -> Value {
    let mut line = json!({ "event": event, "role": "authenticated", "sub": SUB });
    line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    line
}

#[track_caller]
fn expect_lines(log: &str, expected: &[Value]) {
    let events = events(&fs::read_to_string(log).unwrap());
    let version = (&events[0]["event"], &events[0]["version"]);
    assert_eq!(version, (&json!("start"), &json!(env!("CARGO_PKG_VERSION"))));
    for (event, expected) in events.iter().skip(1).zip(expected) {
        assert_eq!(event, expected);
    }
    assert_eq!(events.len() - 1, expected.len(), "{events:#?}");
}

/// What is on record of the socket of the test below.
fn lines_of_a_socket() -> Vec<Value> {
    vec![
        by_user("connect", &json!({})),
        by_user(
            "join",
            &json!({
                "topic": CACHE, "result": "allowed", "rule": "cache", "because": "grant 1"
            }),
        ),
        by_user(
            "join",
            &json!({
                "topic": "realtime:room", "result": "allowed", "because": "no rule"
            }),
        ),
        by_user(
            "join",
            &json!({
                "topic": ADMIN, "result": "withheld", "rule": "admin", "because": "no grant"
            }),
        ),
        by_user(
            "join",
            &json!({
                "topic": "realtime:sms-all-messages", "result": "refused", "reason": "Unauthorized"
            }),
        ),
        by_user("refuse_broadcast", &json!({ "topic": CACHE, "rule": "cache", "count": 1 })),
        by_user(
            "token",
            &json!({
                "topic": ADMIN, "result": "allowed", "rule": "admin", "because": "grant 1"
            }),
        ),
        by_user(
            "token",
            &json!({
                "topic": ADMIN, "result": "withheld", "rule": "admin", "because": "no grant", "fault": "expired"
            }),
        ),
        by_user(
            "token",
            &json!({
                "topic": ADMIN, "result": "refused", "rule": "admin", "because": "signature", "fault": "signature"
            }),
        ),
        by_user("leave", &json!({ "topic": ADMIN, "reason": "token" })),
        by_user("leave", &json!({ "topic": "realtime:room", "reason": "left" })),
        json!({ "event": "close", "reason": "peer", "code": "none" }),
    ]
}

#[tokio::test]
async fn what_a_socket_does_is_on_record_in_order() {
    let folder = Folder::new();
    let log = folder.file("audit.jsonl");
    let serving = Serving::start(&[
        ("TIDEGATE_AUDIT_LOG", &log),
        ("TIDEGATE_LOG", "off"),
        ("TIDEGATE_PROTOCOL__ERROR_DELAY", "1ms"),
    ])
    .await;
    let user = token::with_claims(json!({ "role": "authenticated", "sub": SUB }));
    let mut client = Client::at(serving.public, V2, &user).await;
    client.join("cache_invalidate_AB3028").await;
    client.join("room").await;
    client.join("admin-auction-AB3028").await;
    client.send(join("9", "sms-all-messages")).await;
    assert_eq!(client.message().await[4]["status"], "error");
    client.publish("cache_invalidate_AB3028", json!({})).await;
    let producer = token::with_claims(json!({
        "role": "authenticated", "sub": SUB, "admin_events": { "AB3028": "producer" }
    }));
    for token in [producer, token::named("expired"), token::named("wrong_secret")] {
        client.send(json!(["r3", "t", ADMIN, "access_token", { "access_token": token }])).await;
    }
    assert_eq!(client.message().await[3], "system");
    assert_eq!(client.message().await[3], "phx_close");
    client.send(json!([null, "l", "realtime:room", "phx_leave", {}])).await;
    assert_eq!(client.message().await[3], "phx_reply");
    assert_eq!(client.message().await[3], "phx_close");
    client.close().await;
    let said = serving.end(Signal::SIGTERM).await;
    assert_eq!((said.code, &*said.out, &*said.err), (Some(0), "", ""));

    let mut expected = lines_of_a_socket();
    for line in &mut expected {
        line["connection"] = 1.into();
    }
    expect_lines(&log, &expected);
    let mode = fs::metadata(&log).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "for its owner alone");
}

#[tokio::test]
async fn refused_upgrades_requests_and_operators_calls_are_on_record() {
    let folder = Folder::new();
    let log = folder.file("audit.jsonl");
    let serving = Serving::start(&[
        ("TIDEGATE_AUDIT_LOG", &log),
        ("TIDEGATE_ADMIN_TOKEN", "the-admins-token"),
        ("TIDEGATE_PROTOCOL__ERROR_DELAY", "1ms"),
    ])
    .await;
    for query in ["vsn=9.9.9&apikey=x", "vsn=2.0.0&apikey=x"] {
        let request = raw::upgrade(&format!("/realtime/v1/websocket?{query}"), &[]);
        let mut stream = TcpStream::connect(serving.public).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        raw::answer(&mut stream).await;
    }
    let user = token::with_claims(json!({ "role": "authenticated", "sub": SUB }));
    for (token, sub_topic, private) in [
        (&*token::of_role("service_role"), "cache_invalidate_AB3028", false),
        (&user, "cache_invalidate_AB3028", false),
        (&user, "room", true),
        ("x", "room", false),
    ] {
        let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {token}");
        let message =
            json!({ "topic": sub_topic, "event": "e", "payload": {}, "private": private });
        let body = json!({ "messages": [message] }).to_string();
        TestServer::request(serving.public, &head, &body).await;
    }
    let authorization = "\r\nauthorization: Bearer the-admins-token";
    for (request, authorization) in [
        ("GET /metrics", authorization),
        ("GET /metrics", ""),
        ("POST /events/AB3028/mute?for=0s", authorization),
        ("POST /none", authorization),
    ] {
        let head = format!("{request} HTTP/1.1{authorization}");
        TestServer::request(serving.admin, &head, "").await;
    }
    serving.end(Signal::SIGTERM).await;

    let topic = "cache_invalidate_AB3028";
    let admin = |method, route, status| json!({ "event": "admin", "method": method, "route": route, "status": status });
    expect_lines(
        &log,
        &[
            json!({ "event": "refuse_upgrade", "reason": "version" }),
            json!({ "event": "refuse_upgrade", "reason": "token", "fault": "malformed" }),
            json!({
                "event": "rest", "role": "service_role", "topic": topic, "result": "allowed",
                "rule": "cache", "because": "grant 1"
            }),
            by_user(
                "rest",
                &json!({
                    "topic": topic, "result": "refused", "rule": "cache", "because": "no grant"
                }),
            ),
            // There is no database that could be asked.
            by_user(
                "rest",
                &json!({
                    "topic": "room", "result": "policies", "because": "private",
                    "fault": "not_set_up"
                }),
            ),
            json!({ "event": "rest", "result": "refused", "fault": "malformed" }),
            admin("GET", "metrics", 401),
            admin("POST", "mute", 200),
            admin("POST", "unknown", 404),
        ],
    );
}

/// Else a client that may write nothing fills the log, a line for each forty bytes that it sends.
#[tokio::test]
async fn what_is_denied_of_a_batch_is_one_line_with_its_count() {
    let folder = Folder::new();
    let log = folder.file("audit.jsonl");
    let serving = Serving::start(&[("TIDEGATE_AUDIT_LOG", &log)]).await;
    let user = token::with_claims(json!({ "role": "authenticated", "sub": SUB }));
    let denied = json!({ "topic": "auction_winner_AB3028", "event": "e", "payload": {} });
    let body = json!({ "messages": vec![denied; 500] }).to_string();
    let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {user}");
    // Those that are denied cost their sender, who has 1,200 at once.
    for _ in 0..3 {
        TestServer::request(serving.public, &head, &body).await;
    }
    serving.end(Signal::SIGTERM).await;
    let line = by_user(
        "rest",
        &json!({
            "topic": "auction_winner_AB3028", "result": "refused", "rule": "winner",
            "because": "no grant", "count": 500
        }),
    );
    expect_lines(&log, &[line.clone(), line]);
}

/// CWE-117: a client that writes its own lines into the log.
#[tokio::test]
async fn an_event_is_one_line_whatever_a_client_is_called_or_joins() {
    let folder = Folder::new();
    let log = folder.file("audit.jsonl");
    let serving =
        Serving::start(&[("TIDEGATE_AUDIT_LOG", &log), ("TIDEGATE_LOG", "trace,tidegate=off")])
            .await;
    let forged = "x\"}\r\n{\"event\":\"connect\",\"sub\":\"root\"}\u{2028}\u{9b}2J\u{1b}[2J\0";
    let long = format!("{forged}{}", "\u{20ac}".repeat(1000));
    // Control characters are refused there.
    let role = "x\"}{\"event\":\"connect\",\"role\":\"root\"}";
    let user = token::with_claims(json!({ "role": role, "sub": long }));
    let mut client = Client::at(serving.public, V2, &user).await;
    client.join(forged).await;
    client.close().await;
    serving.end(Signal::SIGTERM).await;
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    let shown = forged.replace('\u{9b}', "\u{fffd}");
    let events = events(&text);
    let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["start", "connect", "join", "close"]);
    assert_eq!(events[1]["role"], role);
    let sub = events[1]["sub"].as_str().unwrap();
    assert!(sub.starts_with(&shown) && sub.len() <= 256 + 2, "{sub:?}");
    assert_eq!(events[2]["topic"], format!("realtime:{shown}"));
}

#[tokio::test]
async fn neither_log_holds_what_the_other_is_for() {
    for (audit, filter) in [
        ("-", "trace"),
        ("-", "tidegate::telemetry::audit=trace"),
        ("", "tidegate::telemetry::audit=trace"),
    ] {
        let folder = Folder::new();
        let errors = folder.file("stderr");
        let prelude = format!("exec 2>{errors}");
        let variables = [("TIDEGATE_AUDIT_LOG", audit), ("TIDEGATE_LOG", filter)];
        let serving = Serving::after(&prelude, &variables).await;
        let mut client = Client::at(serving.public, V2, &token::of_role("anon")).await;
        client.join("room").await;
        client.close().await;
        let said = serving.end(Signal::SIGTERM).await;
        let log = fs::read_to_string(&errors).unwrap();
        assert!(!log.contains("tidegate::telemetry::audit") && !log.contains("\"event\""), "{log}");
        if filter == "trace" {
            // By its number an operator finds the one in the other.
            assert!(
                log.contains("connection{number=1}: tidegate::http::connection: connection closed"),
                "{log}"
            );
        }
        let names: Vec<_> = events(&said.out)
            .iter()
            .map(|event| event["event"].as_str().unwrap().to_owned())
            .collect();
        let expected: &[&str] =
            if audit == "-" { &["start", "connect", "join", "close"] } else { &[] };
        assert_eq!(names, expected, "{filter}");
    }
}

#[tokio::test]
async fn an_audit_log_that_cannot_be_written_is_a_failed_start() {
    let folder = Folder::new();
    let missing = folder.file("none/audit.jsonl");
    for path in [&*missing, folder.0.to_str().unwrap()] {
        let variables = [
            ("TIDEGATE_LISTEN", "127.0.0.1:0"),
            ("TIDEGATE_ADMIN_LISTEN", "127.0.0.1:0"),
            ("TIDEGATE_JWT_SECRET", token::SECRET),
            ("TIDEGATE_AUDIT_LOG", path),
        ];
        let said = run(&["serve"], &variables).await;
        assert_eq!((said.code, &*said.out), (Some(1), ""));
        assert!(said.err.contains(path) && said.err.contains("audit_log"), "{}", said.err);
        assert_eq!(said.err.lines().count(), 1, "{}", said.err);
    }
}

/// As `logrotate` does it, in either of its ways.
#[test]
fn a_log_that_was_renamed_or_cut_is_written_on() {
    let folder = Folder::new();
    let (path, renamed) = (folder.file("audit.jsonl"), folder.file("audit.jsonl.1"));
    fs::write(&path, "before\n").unwrap();
    let log = AuditLog::open(&path).unwrap().unwrap();
    let line = |text: &str| {
        use tracing_subscriber::layer::SubscriberExt;
        let subscriber = tracing_subscriber::registry().with(std::sync::Arc::clone(&log).layer());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "tidegate::telemetry::audit", event = text);
        });
    };
    let names = |path: &str| {
        let text = fs::read_to_string(path).unwrap();
        events(text.strip_prefix("before\n").unwrap_or(&text))
            .iter()
            .map(|event| event["event"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    line("first");
    assert!(fs::read_to_string(&path).unwrap().starts_with("before\n"), "appended");
    fs::rename(&path, &renamed).unwrap();
    line("second");
    log.reopen().unwrap();
    line("third");
    assert_eq!(
        (names(&renamed), names(&path)),
        (vec!["first".into(), "second".into()], vec!["third".into()])
    );
    fs::write(&path, "").unwrap();
    line("fourth");
    assert_eq!(names(&path), ["fourth"]);
    // What cannot be opened again is written on.
    fs::rename(&path, &renamed).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(log.reopen().is_err());
    line("fifth");
    assert_eq!(names(&renamed), ["fourth", "fifth"]);
}
