//! What the process emits: no token, key, secret, payload or query string, whatever goes wrong and
//! however much it is asked to log (CWE-532, CWE-209).
//!
//! Everything that must not come out is planted with a mark in it, or is a part of a token. The
//! server runs at `trace` with its audit log on, every way to fail is gone, and then all that the
//! process has said is searched.

use std::{fs, path::PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tidegate::{
    auth::sign::sign,
    clock::unix_now,
    db,
    protocol::serializer::Serializer::{V1, V2},
    secret::Secret,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::Client,
    postgres::Database,
    process::{Serving, run},
    raw,
    server::{DEADLINE, TestServer},
};

/// Stands in every secret, payload and parameter.
const MARK: &str = "MARK7c1f";
const JWT_SECRET: &str = "MARK7c1f-jwt-secret-that-is-long-enough";
const PREVIOUS: &str = "MARK7c1f-the-secret-before-that-one-....";
const ADMIN_TOKEN: &str = "MARK7c1f-admin-token";
const PUBLISHABLE: &str = "sb_publishable_MARK7c1f";
const SECRET_KEY: &str = "sb_secret_MARK7c1f";
const TOPIC: &str = "cache_invalidate_AB3028";

/// The server, what it is asked with, and what it has answered.
struct Stage {
    serving: Serving,
    database: Database,
    folder: PathBuf,
    /// Of every kind, each with why it is wrong.
    tokens: Vec<(&'static str, String)>,
    answers: String,
}

fn token(secret: &str, claims: Value) -> String {
    let mut claims = claims;
    claims["email"] = format!("{MARK}@example.com").into();
    sign(&Secret::from(secret), &claims).unwrap()
}

fn tokens() -> Vec<(&'static str, String)> {
    let (now, none) = (unix_now(), "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0");
    let valid = token(JWT_SECRET, json!({ "role": "authenticated", "exp": now + 3600 }));
    let claims = valid.split('.').nth(1).unwrap().to_owned();
    vec![
        ("valid", valid.clone()),
        ("previous", token(PREVIOUS, json!({ "role": "anon", "exp": now + 3600 }))),
        ("forged", token("another-secret", json!({ "role": "service_role", "exp": now + 3600 }))),
        ("expired", token(JWT_SECRET, json!({ "role": "authenticated", "exp": now - 3600 }))),
        ("without a role", token(JWT_SECRET, json!({ "exp": now + 3600 }))),
        ("without an end", token(JWT_SECRET, json!({ "role": "anon" }))),
        ("unsigned", format!("{none}.{claims}.")),
        ("cut", valid[..valid.len() - 9].to_owned()),
        ("of four parts", format!("{valid}.{MARK}")),
        ("no JWT", format!("{MARK}-is-no-token")),
        ("of three parts", format!("{MARK}.{MARK}.{MARK}")),
        ("too long", format!("{MARK}{}", "x".repeat(9000))),
        ("opaque", PUBLISHABLE.to_owned()),
        ("opaque and secret", SECRET_KEY.to_owned()),
        ("opaque and unknown", format!("sb_secret_unknown_{MARK}")),
    ]
}

impl Stage {
    async fn start() -> Self {
        let folder = std::env::temp_dir().join(format!("tidegate-{:016x}", fastrand::u64(..)));
        fs::create_dir(&folder).unwrap();
        let database = Database::create().await;
        db::migrate(&Secret::from(database.url())).await.unwrap();
        // The cluster trusts whoever comes, whatever the password.
        let url = database.url().replacen("postgres@", &format!("postgres:{MARK}@"), 1);
        assert!(url.contains(MARK), "{url}");
        let audit = folder.join("audit").to_str().unwrap().to_owned();
        let variables = [
            ("TIDEGATE_LOG", "trace"),
            ("TIDEGATE_AUDIT_LOG", &audit),
            ("TIDEGATE_DATABASE_URL", &url),
            ("TIDEGATE_JWT_SECRET", JWT_SECRET),
            ("TIDEGATE_JWT_SECRET_PREVIOUS", PREVIOUS),
            ("TIDEGATE_ADMIN_TOKEN", ADMIN_TOKEN),
            ("TIDEGATE_PUBLISHABLE_KEY", PUBLISHABLE),
            ("TIDEGATE_SECRET_KEY", SECRET_KEY),
            ("TIDEGATE_PROTOCOL__ERROR_DELAY", "1ms"),
            ("TIDEGATE_RELAY__BACKOFF_MAX", "100ms"),
            ("TIDEGATE_RELAY__CANARY_INTERVAL", "200ms"),
            ("TIDEGATE_LIMITS__MESSAGE_BYTES_MAX", "300000"),
            ("TIDEGATE_LIMITS__PAYLOAD_BYTES_MAX", "200000"),
            ("TIDEGATE_LIMITS__OUTBOX_BYTES_MAX", "65536"),
            ("TIDEGATE_LIMITS__FAILURES_PER_ADDRESS_MAX", "0"),
            ("TIDEGATE_LIMITS__BODY_TIMEOUT", "200ms"),
            ("TIDEGATE_LIMITS__WRITE_TIMEOUT", "200ms"),
        ];
        let prelude = format!("exec 2>{}", folder.join("stderr").display());
        let serving = Serving::after(&prelude, &variables).await;
        let stage = Self { serving, database, folder, tokens: tokens(), answers: String::new() };
        stage.reaches("tidegate_relay_link_up", 1.0).await;
        stage
    }

    fn token(&self, kind: &str) -> String {
        self.tokens.iter().find(|(name, _)| *name == kind).unwrap().1.clone()
    }

    async fn metrics(&self) -> String {
        let head = format!("GET /metrics HTTP/1.1\r\nauthorization: Bearer {ADMIN_TOKEN}");
        TestServer::request(self.serving.admin, &head, "").await.1
    }

    async fn reaches(&self, series: &str, value: f64) {
        let of = |metrics: &str| {
            let line =
                metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
            line.and_then(|text| text.parse::<f64>().ok()).unwrap_or_default()
        };
        let reached = async { while of(&self.metrics().await) < value {} };
        timeout(2 * DEADLINE, reached).await.unwrap_or_else(|_| panic!("{series}: not {value}"));
    }

    /// Writes these bytes to the public port, and reads the answer.
    async fn ask(&mut self, request: impl AsRef<[u8]>) -> u16 {
        let mut stream = TcpStream::connect(self.serving.public).await.unwrap();
        // It may be answered before it has been read.
        drop(stream.write_all(request.as_ref()).await);
        let answer = raw::answer(&mut stream).await;
        self.answers.push_str(&format!("{answer:?}\n"));
        answer.status
    }

    /// Has the server answer to everything that was sent before, and keeps what it says.
    async fn settle(&mut self, client: &mut Client) {
        client.send(json!([null, "settled", "phoenix", "heartbeat", {}])).await;
        loop {
            // Broadcasts are the clients' own business.
            let Frame::Text(text) = client.frame().await else { continue };
            if text.contains("\"settled\"") {
                break;
            }
            if !text.contains("\"broadcast\"") {
                self.answers.push_str(&format!("{text}\n"));
            }
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

/// Upgrades of every kind, most of which are refused.
async fn upgrades(stage: &mut Stage) {
    let headers = [
        format!("authorization: Bearer {MARK}"),
        format!("cookie: sb={MARK}"),
        format!("user-agent: {MARK}"),
        format!("origin: https://{MARK}.example"),
    ];
    let headers: Vec<_> = headers.iter().map(String::as_str).collect();
    for (kind, token) in stage.tokens.clone() {
        let path = format!("/realtime/v1/websocket?vsn=2.0.0&apikey={token}&more={MARK}");
        let refused = stage.ask(raw::upgrade(&path, &headers)).await;
        let is_good = ["valid", "previous", "opaque", "opaque and secret"].contains(&kind);
        assert_eq!(refused == 101, is_good, "{kind}: {refused}");
        let header = format!("x-api-key: {token}");
        let path = format!("/socket/websocket?more={MARK}");
        stage.ask(raw::upgrade(&path, &[headers.as_slice(), &[&header]].concat())).await;
    }
    let good = stage.token("valid");
    for query in [
        format!("more={MARK}"),
        format!("vsn={MARK}&apikey={good}"),
        format!("vsn=9.9.9&apikey={good}"),
        format!("log_level={MARK}&apikey={good}%00%ff"),
        format!("apikey=%zz{MARK}"),
    ] {
        stage.ask(raw::upgrade(&format!("/realtime/v1/websocket?{query}"), &headers)).await;
    }
    for request in [
        format!("GET /realtime/v1/websocket?apikey={good} HTTP/1.1\r\nhost: x\r\n\r\n"),
        format!("GET /{MARK}?apikey={good} HTTP/1.1\r\nhost: x\r\n\r\n"),
        format!("GET /?{MARK} HTTP/1.1\r\nhost: x\r\ncontent-length: {MARK}\r\n\r\n"),
        format!("{MARK}\r\n\r\n"),
        format!("GET /?{MARK} HTTP/9.9\r\n\r\n"),
        format!("GET /?{MARK}\u{1} HTTP/1.1\r\nhost: x\r\n\r\n"),
        format!("GET /?{MARK} HTTP/1.1\r\nbad header {MARK}\r\n\r\n"),
        format!("GET /?{} HTTP/1.1\r\nhost: x\r\n\r\n", MARK.repeat(6000)),
    ] {
        let answer = TestServer::raw_half(stage.serving.public, request.as_bytes()).await;
        stage.answers.push_str(&answer);
    }
}

fn join(reference: &str, topic: &str, payload: &Value) -> Value {
    json!([reference, reference, format!("realtime:{topic}"), "phx_join", payload])
}

/// Joins, changed tokens and broadcasts, of which most come to nothing.
async fn sockets(stage: &mut Stage) {
    for serializer in [V1, V2] {
        for (number, (_, token)) in stage.tokens.clone().into_iter().enumerate() {
            let good = stage.token("valid");
            let mut client = Client::at(stage.serving.public, serializer, &good).await;
            for topic in [TOPIC, "room", "admin-auction-AB3028", "sms-all-messages", ""] {
                let reference = format!("{number}{topic}");
                let payload = json!({ "config": {}, "access_token": token, "more": MARK });
                client.send(join(&reference, topic, &payload)).await;
                for access_token in [json!(token), json!(null), json!({ "a": MARK }), json!(7)] {
                    let payload = json!({ "access_token": access_token });
                    let topic = format!("realtime:{topic}");
                    client.send(json!([reference, "t", topic, "access_token", payload])).await;
                }
            }
            stage.settle(&mut client).await;
            client.close().await;
        }
    }
    let mut client = Client::at(stage.serving.public, V2, &stage.token("previous")).await;
    let refused = [
        json!(MARK),
        json!([MARK]),
        json!({ "config": MARK }),
        json!({ "config": { "private": MARK } }),
        json!({ "config": { "private": true, "more": MARK } }),
        json!({ "config": { "broadcast": MARK, "presence": MARK } }),
        json!({ "config": { "broadcast": { "replay": { "since": MARK } }, "private": true } }),
        // Bindings that can be read are echoed; these cannot.
        json!({ "config": { "postgres_changes": MARK } }),
        json!({ "config": {}, "access_token": { "a": MARK } }),
    ];
    for (number, payload) in refused.into_iter().enumerate() {
        client.send(join(&format!("j{number}"), "room", &payload)).await;
    }
    client.send(join("ack", "ack", &json!({ "config": { "broadcast": { "ack": true } } }))).await;
    for (event, payload) in [
        ("broadcast", json!({ "type": "broadcast", "event": MARK, "payload": { "a": MARK } })),
        ("broadcast", json!(MARK)),
        ("broadcast", json!({ "payload": MARK.repeat(26_000) })),
        ("presence", json!({ "type": "presence", "event": "track", "payload": { "a": MARK } })),
        ("phx_leave", json!({ "a": MARK })),
        ("unheard_of", json!({ "a": MARK })),
    ] {
        for topic in ["realtime:ack", "realtime:nowhere", "realtime:cache_invalidate_AB3028"] {
            client.send(json!(["ack", "b", topic, event, payload])).await;
        }
    }
    stage.settle(&mut client).await;
    client.close().await;
}

/// Frames that no client library sends.
async fn frames(stage: &mut Stage) {
    let long = MARK.repeat(200);
    let good = stage.token("valid");
    for serializer in [V1, V2] {
        let mut client = Client::at(stage.serving.public, serializer, &good).await;
        for text in [
            MARK.to_owned(),
            String::new(),
            format!("[\"{MARK}"),
            format!("[1,2,\"{MARK}\"]"),
            format!("[null,\"{long}\",\"{MARK}\",\"broadcast\",{{}}]"),
            format!("[null,null,\"{long}\",\"broadcast\",{{}}]"),
            format!("[null,null,7,\"{MARK}\",{{}}]"),
            format!("{{\"topic\":\"{MARK}\",\"event\":7,\"payload\":\"{MARK}\",\"ref\":null}}"),
            format!("{{\"topic\":\"t\",\"event\":\"e\",\"payload\":{{\"{MARK}\":}},\"ref\":null}}"),
            format!("{}\"{MARK}\"{}", "[".repeat(2000), "]".repeat(2000)),
        ] {
            client.send_frame(Frame::text(text)).await;
        }
        for head in [
            &[][..],
            &[0],
            &[3],
            &[3, 255, 0, 0, 0, 1],
            &[4, 1, 1, 1, 1],
            &[9, 0],
            &[3, 0, 0, 1, 1, 9, 1],
        ] {
            client.send_frame(Frame::binary([head, MARK.as_bytes()].concat())).await;
            client.send_frame(Frame::Ping(MARK.as_bytes().to_owned().into())).await;
        }
        client.close().await;
    }
    let invalid = [&[0xff, 0xfe], MARK.as_bytes()].concat();
    let (mut unmasked, mut large) = (raw::frame(0x81, MARK.as_bytes()), raw::frame(0x81, &[]));
    unmasked[1] &= 0x7f;
    large[1] = 0xff;
    large.splice(2..2, 400_000_u64.to_be_bytes());
    for bytes in [
        raw::frame(0x81, &invalid),
        raw::frame(0xf1, MARK.as_bytes()),
        raw::frame(0x83, MARK.as_bytes()),
        raw::frame(0x80, MARK.as_bytes()),
        raw::frame(0x09, MARK.as_bytes()),
        raw::frame(0x88, &[&[0, 1], MARK.as_bytes()].concat()),
        raw::frame(0x88, &[&1000_u16.to_be_bytes(), MARK.as_bytes()].concat()),
        unmasked,
        large,
    ] {
        let path = format!("/realtime/v1/websocket?vsn=2.0.0&apikey={good}");
        let mut stream = TcpStream::connect(stage.serving.public).await.unwrap();
        stream.write_all(raw::upgrade(&path, &[]).as_bytes()).await.unwrap();
        assert_eq!(raw::answer(&mut stream).await.status, 101);
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        // A pong gives a ping back.
        raw::until_end(&mut stream).await;
    }
}

/// Broadcasts over HTTP, with each status that there is.
async fn requests(stage: &mut Stage) {
    let message = |topic: &str, payload: Value| json!({ "messages": [{ "topic": topic, "event": "e", "payload": payload, "private": false }] });
    let payload = json!({ "a": MARK });
    for (_, token) in stage.tokens.clone() {
        let body = message("room", payload.clone()).to_string();
        for header in [format!("apikey: {token}"), format!("authorization: Bearer {token}")] {
            stage.ask(raw::post("/api/broadcast", &[&header], &body)).await;
        }
    }
    let key = format!("apikey: {}", stage.token("valid"));
    let json_type = "content-type: application/json";
    let mut statuses = Vec::new();
    for (path, body) in [
        ("/api/broadcast", MARK.to_owned()),
        ("/api/broadcast", format!("{{\"messages\":[{{\"{MARK}\":")),
        ("/api/broadcast", format!("{{\"messages\":[\"{MARK}\"]}}")),
        (
            "/api/broadcast",
            json!({ "messages": [{ "topic": 7, "event": MARK, "private": MARK }] }).to_string(),
        ),
        ("/api/broadcast", message("room", json!(MARK.repeat(26_000))).to_string()),
        ("/api/broadcast", message("room", json!({ "a": MARK.repeat(26_000) })).to_string()),
        ("/api/broadcast", message(TOPIC, payload.clone()).to_string()),
        ("/api/broadcast", MARK.repeat(1_100_000)),
        ("/api/broadcast/room/events/e?private=true", payload.to_string()),
        ("/api/broadcast/cache_invalidate_AB3028/events/e", payload.to_string()),
        ("/api/broadcast/room/events/e", MARK.to_owned()),
        ("/api/broadcast/room/events/e", MARK.repeat(26_000)),
        ("/api/broadcast/room", payload.to_string()),
        ("/api/broadcast/room/events/e", payload.to_string()),
    ] {
        let path = format!("{path}{}more={MARK}", if path.contains('?') { '&' } else { '?' });
        statuses.push(stage.ask(raw::post(&path, &[&key, json_type], body)).await);
    }
    let of_type = format!("content-type: {MARK}");
    statuses
        .push(stage.ask(raw::post("/api/broadcast/room/events/e", &[&key, &of_type], MARK)).await);
    let mut slow = raw::post("/api/broadcast", &[&key], MARK.repeat(20));
    slow.truncate(slow.len() - 5);
    statuses.push(stage.ask(slow).await);
    for status in [202, 400, 403, 404, 408, 413, 415, 422] {
        assert!(statuses.contains(&status), "{status} is not among {statuses:?}");
    }
}

/// Operators' calls, some of which are not the operator's.
async fn operators(stage: &mut Stage) {
    for token in
        [ADMIN_TOKEN.to_owned(), format!("wrong-{MARK}"), stage.token("valid"), String::new()]
    {
        for (request, body) in [
            ("GET /events", String::new()),
            ("GET /readyz?strict=1", String::new()),
            ("GET /events/AB3028/history", String::new()),
            ("POST /events/AB3028/invalidate", MARK.to_owned()),
            ("POST /events/AB3028/invalidate", json!({ "endpoint": { "a": MARK } }).to_string()),
            ("POST /events/AB3028/invalidate", json!({ "endpoint": "/live/x" }).to_string()),
            ("POST /events/AB3028/mute", String::new()),
            ("POST /revoke", json!({ MARK: MARK }).to_string()),
            ("POST /reload", MARK.to_owned()),
            ("POST /none", MARK.to_owned()),
        ] {
            let (what, more) = (request.split('?').next().unwrap(), format!("?more={MARK}"));
            for request in [request.to_owned(), format!("{what}{more}")] {
                let head = format!("{request} HTTP/1.1\r\nauthorization: Bearer {token}");
                let (_, answer) = TestServer::request(stage.serving.admin, &head, &body).await;
                stage.answers.push_str(&answer);
            }
        }
    }
}

/// Notifications that nobody should send, and a database that is away and comes back, and one that
/// has lost what is the gateway's.
async fn databases(stage: &mut Stage) {
    let mut viewer = Client::at(stage.serving.public, V2, &stage.token("valid")).await;
    viewer.join_only(TOPIC, json!({})).await;
    stage.reaches("tidegate_relay_listens", 1.0).await;
    let large = json!({ "a": MARK.repeat(990) }).to_string();
    for payload in [
        MARK,
        "",
        &format!("[\"{MARK}\"]"),
        &format!("{{\"endpoints\":\"{MARK}\",\"type\":7}}"),
        &format!("{{\"endpoints\":[null,7,\"{MARK}\"],\"id\":\"{MARK}\"}}"),
        &format!("{{\"{MARK}\":"),
        &large,
    ] {
        for channel in [TOPIC, "global_cache_stats", "auction_winner_AB3028"] {
            stage.database.notify(channel, payload).await;
        }
    }
    let name = stage.database.name().to_owned();
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
        where application_name = 'tidegate' and datname = current_database()";
    let (server, _) = stage.database.url().rsplit_once('/').unwrap();
    let mut elsewhere = PgConnection::connect(&format!("{server}/postgres")).await.unwrap();
    let mut allow = async |allowed: bool| {
        let sql = format!("alter database {name} allow_connections {allowed}");
        elsewhere.execute(AssertSqlSafe(sql)).await.unwrap();
    };
    allow(false).await;
    stage.database.run(end).await;
    stage.reaches("tidegate_relay_reconnects_total{cause=\"connect\"}", 1.0).await;
    let again = Client::at(stage.serving.public, V2, &stage.token("valid")).await;
    again.close().await;
    allow(true).await;
    stage.reaches("tidegate_relay_link_up", 1.0).await;
    stage.database.run("drop schema tidegate cascade").await;
    operators(stage).await;
    stage.database.run(end).await;
    stage.reaches("tidegate_relay_reconnects_total{cause=\"connect\"}", 1.0).await;
    stage.reaches("tidegate_relay_link_up", 1.0).await;
    drop(viewer);
}

/// Who does not read is closed; what waits for it is dropped, with a word in the log.
async fn slow_consumer(stage: &mut Stage) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(stage.serving.public).await.unwrap();
    let path = format!("/realtime/v1/websocket?vsn=2.0.0&apikey={}", stage.token("valid"));
    stream.write_all(raw::upgrade(&path, &[]).as_bytes()).await.unwrap();
    raw::answer(&mut stream).await;
    let text = join("1", "auction_winner_AB3028", &json!({ "config": {} })).to_string();
    stream.write_all(&raw::frame(0x81, text.as_bytes())).await.unwrap();
    stage.reaches("tidegate_topics", 1.0).await;
    let key = format!("apikey: {SECRET_KEY}");
    let series = "tidegate_connections_closed_total{code=\"1008\",reason=\"slow_consumer\"} 1";
    let closed = async {
        while !stage.metrics().await.contains(series) {
            let payload = json!({ "a": MARK.repeat(20_000) });
            let message =
                json!({ "topic": "auction_winner_AB3028", "event": "e", "payload": payload });
            let body = json!({ "messages": [message] }).to_string();
            assert_eq!(stage.ask(raw::post("/api/broadcast", &[&key], body)).await, 202);
        }
    };
    timeout(DEADLINE, closed).await.expect("the slow one is closed");
}

/// What the other commands say, right and wrong.
async fn commands(stage: &mut Stage) {
    let file = stage.folder.join("tidegate.toml");
    let mistakes = format!("listen = \"{MARK}\"\njwt_secret = 7\n[limits]\nno = \"{MARK}\"\n");
    fs::write(&file, format!("admin_token = [\"{MARK}\"]\n{mistakes}")).unwrap();
    let broken = stage.folder.join("broken.toml");
    fs::write(&broken, format!("jwt_secret = \"{MARK}\nlog = 7")).unwrap();
    let url = format!("postgres://postgres:{MARK}@127.0.0.1:1/none?password={MARK}");
    let (file, broken) = (file.to_str().unwrap(), broken.to_str().unwrap());
    let secrets = [("TIDEGATE_JWT_SECRET", JWT_SECRET), ("TIDEGATE_LOG", "trace")];
    let mut of = secrets.to_vec();
    of.extend([
        ("TIDEGATE_ADMIN_TOKEN", ADMIN_TOKEN),
        ("TIDEGATE_ADMIN_LISTEN", "127.0.0.1:1"),
        ("TIDEGATE_DATABASE_URL", &*url),
        ("TIDEGATE_PUBLISHABLE_KEY", PUBLISHABLE),
        ("TIDEGATE_SECRET_KEY", SECRET_KEY),
    ]);
    let wrong =
        [[("TIDEGATE_CONFIG", file), ("TIDEGATE_LIMITS__CONNECTIONS_MAX", MARK)].as_slice(), &of]
            .concat();
    let unreadable = [[("TIDEGATE_CONFIG", broken)].as_slice(), &of].concat();
    let keys = [
        secrets.as_slice(),
        &[("TIDEGATE_PUBLISHABLE_KEY", MARK), ("TIDEGATE_DATABASE_URL", MARK)],
    ]
    .concat();
    let forged = stage.token("forged");
    let claims = format!("{{\"{MARK}\":");
    for arguments in [
        &["config"][..],
        &["config", "--check"],
        &["config", "--explain", "--topic", "room", "--token", &forged],
        &["token", "--role", "anon", "--claims", &claims],
        &["migrate"],
        &["migrate", "--uninstall"],
        &["invalidate", "AB3028"],
        &["serve", "--jwt-secret"],
    ] {
        for variables in [&of, &wrong, &unreadable, &keys] {
            let said = run(arguments, variables).await;
            stage.answers.push_str(&format!("{}{}", said.out, said.err));
        }
    }
}

/// Where one of the words stands in a text.
fn find(source: &str, text: &str, words: &[(String, String)], found: &mut Vec<String>) {
    for (name, word) in words {
        let lines = text.lines().filter(|line| line.contains(word.as_str())).take(3);
        found.extend(lines.map(|line| {
            let at = line.find(word.as_str()).unwrap_or_default();
            let (from, to) = (
                line.floor_char_boundary(at.saturating_sub(300)),
                line.ceil_char_boundary(at + 100),
            );
            format!("{source}, {name}: {}", &line[from..to.min(line.len())])
        }));
    }
}

#[tokio::test]
async fn nothing_secret_comes_out_whatever_goes_wrong() {
    let mut stage = Stage::start().await;
    upgrades(&mut stage).await;
    sockets(&mut stage).await;
    frames(&mut stage).await;
    requests(&mut stage).await;
    operators(&mut stage).await;
    slow_consumer(&mut stage).await;
    databases(&mut stage).await;
    commands(&mut stage).await;
    let last = Client::at(stage.serving.public, V2, &stage.token("valid")).await;
    let metrics = stage.metrics().await;
    stage.serving.signal(Signal::SIGHUP);
    stage.reaches("tidegate_reloads_total{result=\"ok\"}", 1.0).await;
    stage.serving.signal(Signal::SIGTERM);
    assert_eq!(last.closed().await, Some(1012));
    let said = stage.serving.ended().await;
    assert_eq!(said.code, Some(0));

    let log = fs::read_to_string(stage.folder.join("stderr")).unwrap();
    let audit = fs::read_to_string(stage.folder.join("audit")).unwrap();
    let mut words = vec![("the mark".to_owned(), MARK.to_owned())];
    for (kind, token) in &stage.tokens {
        let parts = token.split('.').skip(1).filter(|part| part.len() > 20);
        words.extend(parts.map(|part| ((*kind).to_owned(), part.to_owned())));
    }
    let mut found = Vec::new();
    for (source, text) in [
        ("standard output", &said.out),
        ("standard error", &log),
        ("audit log", &audit),
        ("metrics", &metrics),
        ("answers", &stage.answers),
    ] {
        find(source, text, &words, &mut found);
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(!log.contains("panicked"), "{log}");
    // It was looked for where there was something to be found.
    for (text, wanted) in [
        (&log, "TRACE"),
        (&log, "sqlx"),
        (&audit, "refuse_upgrade"),
        (&stage.answers, "Unauthorized"),
    ] {
        assert!(text.contains(wanted), "{wanted}");
    }
}
