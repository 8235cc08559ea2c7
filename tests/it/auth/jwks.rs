//! The key set: a file that changes, and a URL that is read over TLS, from servers that do wrong
//! whatever a server can.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tidegate::{
    clock::unix_now,
    protocol::serializer::Serializer::V2,
    secret::Secret,
    server::{Config, Server, StartError},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{interval, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    auth::jws,
    support::{
        client::Client,
        folder::Folder,
        raw::{ask, upgrade},
        server::{DEADLINE, TestServer, config},
    },
};

/// What a key server says when it is asked.
#[derive(Clone)]
enum Says {
    /// These bytes, over TLS, and the end.
    Bytes(Vec<u8>),
    /// These, and then one more from time to time.
    Drips(Vec<u8>),
    /// Nothing, over TLS.
    Nothing,
    /// Nothing, not even TLS.
    NoTls,
    /// These bytes, without TLS.
    Plain(&'static [u8]),
}

impl Says {
    fn document(keys: &Value) -> Self {
        Self::text("200 OK", "", &keys.to_string())
    }

    fn text(status: &str, headers: &str, body: &str) -> Self {
        let length = body.len();
        let answer =
            format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
        Self::Bytes(answer.into_bytes())
    }
}

/// A server of key sets on 127.0.0.1, and on all other addresses of this machine.
struct KeyServer {
    port: u16,
    says: Arc<Mutex<Says>>,
    asked: watch::Receiver<usize>,
    _tasks: JoinSet<()>,
}

impl KeyServer {
    async fn start(folder: &Folder, says: Says) -> Self {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = folder.acceptor();
        let says = Arc::new(Mutex::new(says));
        let (count, asked) = watch::channel(0);
        let (mut tasks, said) = (JoinSet::new(), Arc::clone(&says));
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let says = said.lock().clone();
                connections.spawn(answer(acceptor.clone(), stream, says));
                count.send_modify(|count| *count += 1);
            }
        });
        Self { port, says, asked, _tasks: tasks }
    }

    fn url(&self) -> String {
        format!("https://localhost:{}/keys", self.port)
    }

    fn says(&self, says: Says) {
        *self.says.lock() = says;
    }

    fn asked(&self) -> usize {
        *self.asked.borrow()
    }

    /// Waits until it has been asked so often.
    async fn asked_times(&self, count: usize) {
        let mut asked = self.asked.clone();
        let reached = timeout(DEADLINE, asked.wait_for(|times| *times >= count)).await;
        assert!(reached.is_ok(), "asked {} times and not {count}", self.asked());
    }
}

async fn answer(acceptor: TlsAcceptor, mut stream: TcpStream, says: Says) {
    match says {
        Says::NoTls => return std::future::pending().await,
        Says::Plain(bytes) => {
            let _ = stream.write_all(bytes).await; // Whoever asked may be gone.
            return;
        }
        Says::Bytes(_) | Says::Drips(_) | Says::Nothing => {}
    }
    // Whoever does not trust us says so here.
    let Ok(mut stream) = acceptor.accept(stream).await else { return };
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_gone) => return,
        }
    }
    let request = String::from_utf8(request).unwrap();
    assert!(request.starts_with("GET /keys HTTP/1.1\r\n"), "{request}");
    match says {
        Says::Bytes(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Says::Drips(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let mut pace = interval(Duration::from_millis(20));
            while stream.write_all(b" ").await.is_ok() && stream.flush().await.is_ok() {
                pace.tick().await;
            }
        }
        Says::Nothing | Says::NoTls | Says::Plain(_) => std::future::pending().await,
    }
}

fn certified() -> Folder {
    let folder = Folder::new();
    folder.make_certificates();
    folder
}

/// A gateway that has its keys from there, and no secret.
fn reading(keys: &KeyServer, folder: &Folder) -> Config {
    let mut config = config();
    config.jwt_secret = Secret::default();
    config.jwks.url = keys.url();
    config.jwks.ca_file = folder.path("ca.crt");
    config
}

async fn has_keys(server: &TestServer, origin: &str, count: f64) {
    server.metric_reaches(&format!("tidegate_jwks_keys{{origin=\"{origin}\"}}"), count).await;
}

fn failures(origin: &str, kind: &str) -> String {
    format!("tidegate_jwks_failures_total{{kind=\"{kind}\",origin=\"{origin}\"}}")
}

/// How an upgrade with this token is answered.
async fn status(server: &TestServer, token: &str) -> u16 {
    let path = format!("/realtime/v1/websocket?vsn=2.0.0&apikey={token}");
    ask(server, upgrade(&path, &[])).await.status
}

fn kind(server: &TestServer, token: &str) -> &'static str {
    let verified = server.gateway.auth.verify_at(token, unix_now());
    verified.map_or_else(|error| error.label(), |_| "ok")
}

#[tokio::test]
async fn a_key_that_is_new_at_the_url_is_fetched_when_a_token_names_it_and_not_again_at_once() {
    let folder = certified();
    let ((first, old), (second, new)) = (jws::good("rs256"), jws::good("es256"));
    let keys = KeyServer::start(&folder, Says::document(&first)).await;
    let settings = reading(&keys, &folder);
    let server = TestServer::start_with(settings.clone());
    has_keys(&server, "url", 1.0).await;
    assert_eq!(status(&server, &old).await, 101);
    let accepted = "tidegate_tokens_accepted_total{algorithm=\"RS256\",key=\"jwks\"}";
    assert_eq!(server.metric(accepted).await, 1.0);
    assert_eq!(keys.asked(), 1);

    // The keys rotate; the interval is ten minutes.
    keys.says(Says::document(&second));
    let mut changes = server.gateway.auth.changes();
    assert_eq!(status(&server, &new).await, 401, "nobody waits for keys");
    timeout(DEADLINE, changes.changed()).await.expect("the keys are fetched").unwrap();
    assert_eq!(status(&server, &new).await, 101);
    assert_eq!(kind(&server, &old), "no_signer", "the old key is gone");
    assert_eq!(keys.asked(), 2);

    // Tokens that name unknown keys do not make it ask again: what asks next is the reload.
    for _ in 0..5 {
        assert_eq!(kind(&server, &old), "no_signer");
        // An exchange, during which it could.
        assert_eq!(status(&server, &old).await, 401);
    }
    server.gateway.auth.reload(&settings.trust()).unwrap();
    keys.asked_times(3).await;
    let read = server.metric("tidegate_jwks_last_success_timestamp_seconds{origin=\"url\"}").await;
    assert!((unix_now() as f64 - read).abs() < 60.0, "{read}");
    assert_eq!(kind(&server, &new), "ok");
    assert_eq!(keys.asked(), 3);
    server.stop().await;
}

#[tokio::test]
async fn the_last_good_keys_outlive_everything_that_a_server_can_do_wrong() {
    let folder = certified();
    let (document, token) = jws::good("rs256");
    let elsewhere = KeyServer::start(&folder, Says::document(&document)).await;
    let keys = KeyServer::start(&folder, Says::document(&document)).await;
    let mut settings = reading(&keys, &folder);
    settings.jwks.refresh_interval = Duration::from_millis(20);
    settings.jwks.timeout = Duration::from_millis(500);
    settings.jwks.bytes_max = 20_000;
    let server = TestServer::start_with(settings.clone());
    has_keys(&server, "url", 1.0).await;
    let redirect = |status: &str, location: &str| {
        Says::text(status, &format!("location: {location}\r\n"), &document.to_string())
    };
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let endless = format!("{chunked}{}", format!("2710\r\n{}\r\n", " ".repeat(10_000)).repeat(10));
    let many: Vec<_> = (0..65).map(|_| json!({})).collect();
    let bad = [
        ("redirect", redirect("302 Found", &elsewhere.url())),
        ("redirect", redirect("301 Moved Permanently", "/keys")),
        ("redirect", redirect("307 Temporary Redirect", "http://127.0.0.1:9400/")),
        ("redirect", redirect("308 Permanent Redirect", "file:///etc/passwd")),
        ("status", Says::text("500 Internal Server Error", "", &document.to_string())),
        ("status", Says::text("404 Not Found", "", "")),
        ("status", Says::text("204 No Content", "", "")),
        ("too_large", Says::text("200 OK", "", &" ".repeat(20_001))),
        ("too_large", Says::Bytes(endless.into_bytes())),
        ("http", Says::text("200 OK", &format!("a: {}\r\n", "a".repeat(40_000)), "{}")),
        ("http", Says::Bytes(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{".to_vec())),
        ("http", Says::Bytes(b"garbage\r\n\r\n".to_vec())),
        ("http", Says::Bytes(Vec::new())),
        ("timeout", Says::Nothing),
        ("timeout", Says::NoTls),
        ("timeout", Says::Drips(b"HTTP/1.1 200 OK\r\ncontent-length: 20000\r\n\r\n".to_vec())),
        ("document", Says::text("200 OK", "", "<html>sign in</html>")),
        ("document", Says::text("200 OK", "", "")),
        ("document", Says::text("200 OK", "", "{}")),
        ("document", Says::text("200 OK", "", r#"{"keys":[],"keys":[]}"#)),
        ("document", Says::document(&json!({ "keys": many }))),
        ("tls", Says::Plain(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")),
        ("tls", Says::Plain(b"")),
    ];
    for (number, (kind_of, says)) in bad.into_iter().enumerate() {
        let series = failures("url", kind_of);
        let before = server.metric(&series).await;
        keys.says(says);
        server.metric_reaches(&series, before + 1.0).await;
        assert_eq!(kind(&server, &token), "ok", "{number}: {kind_of}");
    }
    assert_eq!(elsewhere.asked(), 0, "no redirect is followed");
    // It is healed by itself.
    keys.says(Says::document(&json!({ "keys": [] })));
    server.metric_falls_to("tidegate_jwks_keys{origin=\"url\"}", 0.0).await;
    assert_eq!(kind(&server, &token), "no_signer");
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_another_authority_or_another_name_vouches_for_is_not_believed() {
    let folder = certified();
    let (document, token) = jws::good("rs256");
    let keys = KeyServer::start(&folder, Says::document(&document)).await;
    let mut settings = reading(&keys, &folder);
    settings.jwks.refresh_interval = Duration::from_millis(20);
    for (kind_of, ca_file, host) in [
        ("tls", folder.path("other.crt"), "localhost"),
        // The public authorities.
        ("tls", String::new(), "localhost"),
        // Its certificate is for 127.0.0.1.
        ("tls", folder.path("ca.crt"), "127.0.0.2"),
        ("authorities", folder.path("nothing.crt"), "localhost"),
        ("authorities", folder.path("names"), "localhost"),
    ] {
        settings.jwks.ca_file = ca_file;
        settings.jwks.url = format!("https://{host}:{}/keys", keys.port);
        let server = TestServer::start_with(settings.clone());
        server.metric_reaches(&failures("url", kind_of), 1.0).await;
        assert_eq!(kind(&server, &token), "no_signer", "{host}");
        server.stop().await;
    }
    // By its address it is.
    settings.jwks.ca_file = folder.path("ca.crt");
    settings.jwks.url = format!("https://127.0.0.1:{}/keys", keys.port);
    let server = TestServer::start_with(settings);
    has_keys(&server, "url", 1.0).await;
    assert_eq!(kind(&server, &token), "ok");
    server.stop().await;
}

#[tokio::test]
async fn a_gateway_whose_key_server_is_away_serves_all_other_tokens() {
    let mut settings = config();
    settings.jwks.url = "https://127.0.0.1:1/keys".to_owned();
    let server = TestServer::start_with(settings);
    server.metric_reaches(&failures("url", "connect"), 1.0).await;
    let mut client = Client::connect(&server, V2).await;
    client.join("room").await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn secrets_at_the_url_are_left_out_and_named() {
    let folder = certified();
    let (mut document, token) = jws::good("rs256");
    let keys = document["keys"].as_array_mut().unwrap();
    let mut pair = keys[0].clone();
    pair["kid"] = "pair".into();
    pair["d"] = "AQAB".into();
    keys.push(pair);
    keys.push(json!({ "kty": "oct", "kid": "oct", "k": "A".repeat(43) }));
    let keys = KeyServer::start(&folder, Says::document(&document)).await;
    let server = TestServer::start_with(reading(&keys, &folder));
    has_keys(&server, "url", 1.0).await;
    let series = "tidegate_jwks_keys_unusable_total{reason=\"private\"}";
    assert_eq!(server.metric(series).await, 2.0);
    assert_eq!(kind(&server, &token), "ok");
    server.stop().await;
}

#[tokio::test]
async fn keys_of_a_url_that_is_no_longer_set_are_dropped_by_the_reload() {
    let folder = certified();
    let (document, token) = jws::good("es384");
    let keys = KeyServer::start(&folder, Says::document(&document)).await;
    let mut settings = reading(&keys, &folder);
    let server = TestServer::start_with(settings.clone());
    has_keys(&server, "url", 1.0).await;
    assert_eq!(kind(&server, &token), "ok");
    let verifier = &server.gateway.auth;
    verifier.reload(&settings.trust()).unwrap();
    assert_eq!(kind(&server, &token), "ok", "it is the same URL");
    (settings.jwks.url, settings.jwks.ca_file) = (String::new(), String::new());
    verifier.reload(&settings.trust()).unwrap();
    assert_eq!(kind(&server, &token), "no_signer");
    assert_eq!(server.metric("tidegate_jwks_keys{origin=\"url\"}").await, 0.0);
    server.stop().await;
}

#[tokio::test]
async fn a_file_is_followed_and_a_broken_one_changes_nothing() {
    let folder = Folder::new();
    let ((first, old), (second, new)) = (jws::good("eddsa"), jws::good("rs512"));
    let mut settings = config();
    settings.jwt_secret = Secret::default();
    settings.jwks.file = folder.write("keys.json", &first.to_string());
    settings.jwks.bytes_max = 10_000;
    let server = TestServer::start_with(settings);
    // Before anything has run.
    assert_eq!((kind(&server, &old), kind(&server, &new)), ("ok", "no_signer"));
    for (kind_of, text) in [("document", "{".to_owned()), ("too_large", " ".repeat(10_001))] {
        folder.write("keys.json", &text);
        server.metric_reaches(&failures("file", kind_of), 1.0).await;
        assert_eq!(kind(&server, &old), "ok");
    }
    let mut changes = server.gateway.auth.changes();
    folder.write("keys.json", &second.to_string());
    timeout(DEADLINE, changes.changed()).await.expect("the file is looked at").unwrap();
    assert_eq!((kind(&server, &old), kind(&server, &new)), ("no_signer", "ok"));
    std::fs::remove_file(folder.path("keys.json")).unwrap();
    server.metric_reaches(&failures("file", "unreadable"), 1.0).await;
    assert_eq!(kind(&server, &new), "ok");
    // Each state of the file is told once.
    for kind_of in ["document", "too_large", "unreadable"] {
        assert_eq!(server.metric(&failures("file", kind_of)).await, 1.0, "{kind_of}");
    }
    server.stop().await;
}

#[tokio::test]
async fn who_has_joined_by_a_key_that_is_taken_away_is_told_and_ended() {
    let folder = Folder::new();
    let (document, token) = jws::good("es256");
    let mut settings = config();
    settings.jwks.file = folder.write("keys.json", &document.to_string());
    let server = TestServer::start_with(settings);
    let mut client = Client::connect(&server, V2).await;
    let payload = json!({ "config": {}, "access_token": token });
    client.send(json!(["1", "1", "realtime:room", "phx_join", payload])).await;
    let response = json!({ "status": "ok", "response": { "postgres_changes": [] } });
    client.expect(json!(["1", "1", "realtime:room", "phx_reply", response])).await;
    folder.write("keys.json", r#"{"keys":[]}"#);
    let message = "Failed to validate JWT signature";
    let system = json!({
        "message": message, "status": "error", "extension": "system", "channel": "room",
    });
    client.expect(json!(["1", null, "realtime:room", "system", system])).await;
    client.expect(json!(["1", "1", "realtime:room", "phx_close", {}])).await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_gateway_starts_with_any_kind_of_key_and_with_no_file_that_it_cannot_read() {
    let folder = Folder::new();
    let mut settings = config();
    settings.jwt_secret = Secret::default();
    assert!(matches!(Server::bind(settings.clone()), Err(StartError::NoSecret)));
    let (document, _) = jws::good("rs384");
    for (text, expected) in [
        (document.to_string(), None),
        ("[]".to_owned(), Some("document")),
        (" ".repeat(70_000), Some("too_large")),
    ] {
        settings.jwks.file = folder.write("keys.json", &text);
        let error = match Server::bind(settings.clone()) {
            Ok(_) => None,
            Err(StartError::Keys { file, source }) if file == settings.jwks.file => {
                Some(source.label())
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(error, expected);
    }
    // A folder is no file, and a pipe would be waited for.
    settings.jwks.file = folder.path("");
    assert!(matches!(Server::bind(settings), Err(StartError::Keys { .. })));
}
