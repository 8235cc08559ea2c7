//! The link to Postgres: what clients and operators see while it is missing, and that it heals.

use std::{
    collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path, process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use tidegate::{
    db,
    demo::cluster::Cluster,
    protocol::serializer::Serializer::{V1, V2},
    secret::Secret,
    server::Config,
};
use tokio::{
    net::TcpListener,
    time::{Instant, timeout},
};

use crate::support::{
    client::Client,
    postgres::Database,
    proxy::Proxy,
    server::{DEADLINE, TestServer, config, plain_rule},
};

/// Relayed as it comes.
const EVENT: &str = "plain_AB3028";

/// A gateway that gives a silent database up quickly.
fn settings(url: &str) -> Config {
    let mut config = config();
    config.database_url = Secret::from(url);
    config.relay.connect_timeout = Duration::from_millis(400);
    config.topic.push(plain_rule());
    config
}

/// As above, with the listening session alone at this URL.
fn listening_at(url: &str, database_url: &str) -> Config {
    let mut config = settings(database_url);
    config.notify_database_url = Secret::from(url);
    config
}

/// Where no database is.
const NOWHERE: &str = "postgres://nobody@127.0.0.1:1/nothing";

/// Ends of sessions and failed attempts by cause, those that have happened.
async fn ends(server: &TestServer) -> BTreeMap<String, u64> {
    let (_, text) = TestServer::request(server.admin, "GET /metrics HTTP/1.1", "").await;
    let ends = text.lines().filter_map(|line| {
        let series = line.strip_prefix("tidegate_relay_reconnects_total{cause=\"")?;
        let (cause, value) = series.split_once("\"} ")?;
        Some((cause.to_owned(), value.parse().unwrap()))
    });
    ends.filter(|(_, value)| *value > 0).collect()
}

/// Waits until a session has ended, or an attempt has failed, by this cause.
async fn ended_by(server: &TestServer, cause: &str) {
    let series = format!("tidegate_relay_reconnects_total{{cause=\"{cause}\"}}");
    let ended = async { while server.metric(&series).await < 1.0 {} };
    if timeout(DEADLINE, ended).await.is_err() {
        panic!("no end by {cause} but {:?}", ends(server).await);
    }
}

async fn readiness(server: &TestServer, query: &str) -> (u16, Value) {
    let head = format!("GET /readyz{query} HTTP/1.1");
    let (status, body) = TestServer::request(server.admin, &head, "").await;
    (status, serde_json::from_str(&body).unwrap())
}

/// Fails unless the viewer of `EVENT` gets what the database notifies now, and nothing before it.
async fn is_relayed(database: &mut Database, viewer: &mut Client, nth: u32) {
    database.notify(EVENT, &format!(r#"{{"nth":{nth}}}"#)).await;
    let payload = json!({ "nth": nth });
    let envelope = json!({ "type": "broadcast", "event": "news", "payload": payload });
    assert_eq!(viewer.broadcast().await, (format!("realtime:{EVENT}"), envelope));
}

#[tokio::test]
async fn without_its_database_a_server_serves_joins_and_is_healed_when_it_comes() {
    let cluster = Cluster::start().await.unwrap();
    let mut database = Database::create_in(&cluster).await;
    cluster.stop_immediate().await.unwrap();
    let mut settings = settings(database.url());
    settings.relay.listen_wait = Duration::from_millis(200);
    let server = TestServer::start_with(settings);

    let mut viewer = Client::connect(&server, V1).await;
    let asked_at = Instant::now();
    viewer.join(EVENT).await;
    // Production clients give a join up after 2 s, for good.
    let took = asked_at.elapsed();
    assert!((Duration::from_millis(200)..Duration::from_secs(2)).contains(&took), "{took:?}");
    let down = json!({ "ready": true, "draining": false, "link": "down", "canary": null });
    assert_eq!(readiness(&server, "").await, (200, down));
    let strictly = json!({ "ready": false, "draining": false, "link": "down", "canary": null });
    assert_eq!(readiness(&server, "?strict=1").await, (503, strictly));
    // What needs no database goes on.
    let mut ordinary = Client::connect(&server, V2).await;
    ordinary.join_with("room", json!({ "broadcast": { "self": true } })).await;
    ordinary.send(json!([null, "1", "realtime:room", "broadcast", { "event": "e" }])).await;
    assert_eq!(ordinary.broadcast().await.1, json!({ "event": "e" }));
    ended_by(&server, "connect").await;

    for nth in 0..2 {
        cluster.restart().await.unwrap();
        server.link_is_up().await;
        // Strictly when it has heard itself, too, which it may not have for long.
        let ready = async {
            loop {
                if let (200, body) = readiness(&server, "?strict=1").await {
                    break body;
                }
            }
        };
        let mut ready = timeout(DEADLINE, ready).await.expect("it is ready in time");
        drop(ready.as_object_mut().unwrap().remove("canary"));
        assert_eq!(ready, json!({ "ready": true, "draining": false, "link": "up" }));
        database.reconnect().await;
        is_relayed(&mut database, &mut viewer, nth).await;

        // A crash, and once more.
        cluster.stop_immediate().await.unwrap();
        let down = async { while server.metric("tidegate_relay_link_up").await > 0.0 {} };
        timeout(DEADLINE, down).await.expect("the crash is noticed");
        assert_eq!(readiness(&server, "?strict=1").await.0, 503);
        assert_eq!(readiness(&server, "").await.0, 200);
        viewer.expect_nothing().await;
    }
    viewer.close().await;
    ordinary.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_terminated_session_is_replaced_by_one_that_listens_to_everything() {
    let mut database = Database::create().await;
    // Sessions for anything else are of the same name.
    let server = TestServer::start_with(listening_at(database.url(), NOWHERE));
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(EVENT).await;
    viewer.join("auction_winner_AB3028").await;
    assert_eq!(ends(&server).await, BTreeMap::new());
    for nth in 1..=2 {
        let terminate = "select count(pg_terminate_backend(pid)) from pg_stat_activity
            where application_name = 'tidegate' and datname = current_database()";
        assert_eq!(database.value::<i64>(terminate).await, 1, "one session");
        let ended = async { while ends(&server).await.values().sum::<u64>() < nth {} };
        timeout(DEADLINE, ended).await.expect("the end is counted");
        server.link_is_up().await;
        assert_eq!(server.metric("tidegate_relay_listens").await, 2.0);
        is_relayed(&mut database, &mut viewer, 7).await;
        database.notify("auction_winner_AB3028", "{}").await;
        assert_eq!(viewer.broadcast().await.1["event"], "auction_winner");
    }
    let causes: Vec<_> = ends(&server).await.into_iter().collect();
    assert!(
        causes == [("broken".to_owned(), 2)] || causes == [("closed".to_owned(), 2)],
        "{causes:?}"
    );
    viewer.close().await;
    server.stop().await;
}

/// A router that has forgotten a connection tells neither side.
#[tokio::test]
async fn a_half_open_session_is_noticed_by_its_heartbeat_and_replaced() {
    let mut database = Database::create().await;
    let mut proxy = Proxy::start("127.0.0.1", database.port()).await;
    let mut settings = listening_at(&database.url_at(proxy.address), database.url());
    settings.relay.heartbeat_interval = Duration::from_millis(50);
    settings.relay.heartbeat_timeout = Duration::from_secs(1);
    let server = TestServer::start_with(settings);
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(EVENT).await;
    is_relayed(&mut database, &mut viewer, 1).await;

    proxy.freeze_existing();
    ended_by(&server, "silent").await;
    server.link_is_up().await;
    proxy.has_accepted(2).await;
    is_relayed(&mut database, &mut viewer, 2).await;
    viewer.close().await;
    server.stop().await;
}

/// Else each of them keeps a connection of Postgres' and a task of ours.
#[tokio::test]
async fn the_socket_of_a_session_that_was_given_up_is_closed() {
    let database = Database::create().await;
    let mut proxy = Proxy::start("127.0.0.1", database.port()).await;
    let mut settings = listening_at(&database.url_at(proxy.address), database.url());
    settings.relay.heartbeat_interval = Duration::from_millis(50);
    settings.relay.heartbeat_timeout = Duration::from_secs(1);
    let server = TestServer::start_with(settings);
    server.link_is_up().await;
    proxy.freeze_existing();
    ended_by(&server, "silent").await;
    server.link_is_up().await;
    proxy.has_open(1).await;
    server.stop().await;
}

#[tokio::test]
async fn a_database_that_accepts_and_says_nothing_is_given_up_after_connect_timeout() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let url = format!("postgres://a@127.0.0.1:{port}/a");
    let server = TestServer::start_with(listening_at(&url, NOWHERE));
    // Each attempt is a connection; none is waited for longer than the time-out.
    let mut held = Vec::new();
    for _ in 0..3 {
        let attempt = timeout(DEADLINE, silent.accept()).await.expect("another attempt");
        held.push(attempt.unwrap());
    }
    assert!(server.metric("tidegate_relay_reconnects_total{cause=\"connect\"}").await >= 2.0);
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(EVENT).await;
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_database_that_falls_silent_after_the_handshake_is_given_up_too() {
    let mut database = Database::create().await;
    let mut proxy = Proxy::start("127.0.0.1", database.port()).await;
    proxy.hold_at("pg_is_in_recovery");
    let mut settings = listening_at(&database.url_at(proxy.address), database.url());
    settings.relay.heartbeat_timeout = Duration::from_secs(1);
    let server = TestServer::start_with(settings);
    proxy.has_held().await;
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(EVENT).await;
    // Another attempt: the first one was given up.
    proxy.has_accepted(2).await;
    proxy.release();
    server.link_is_up().await;
    is_relayed(&mut database, &mut viewer, 1).await;
    viewer.close().await;
    server.stop().await;
}

/// As above, while a LISTEN of a join is on its way.
#[tokio::test]
async fn a_listen_that_is_not_answered_ends_the_session_and_is_made_up_for() {
    let mut database = Database::create().await;
    let mut proxy = Proxy::start("127.0.0.1", database.port()).await;
    let mut settings = listening_at(&database.url_at(proxy.address), database.url());
    settings.relay.heartbeat_timeout = Duration::from_secs(1);
    settings.relay.listen_wait = Duration::from_millis(50);
    let server = TestServer::start_with(settings);
    server.link_is_up().await;
    proxy.hold_at("AB3028");
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(EVENT).await;
    proxy.has_held().await;
    ended_by(&server, "silent").await;
    proxy.release();
    proxy.has_accepted(2).await;
    let listens = async { while server.metric("tidegate_relay_listens").await < 1.0 {} };
    timeout(DEADLINE, listens).await.expect("the event is listened to");
    is_relayed(&mut database, &mut viewer, 1).await;
    viewer.close().await;
    server.stop().await;
}

/// A pooler in front of the ordinary connection cannot LISTEN.
#[tokio::test]
async fn the_listening_session_has_a_url_of_its_own() {
    let mut database = Database::create().await;
    let server = TestServer::start_with(listening_at(database.url(), NOWHERE));
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(EVENT).await;
    is_relayed(&mut database, &mut viewer, 1).await;
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_url_that_cannot_be_read_is_named_as_the_cause() {
    for url in ["plain text", "postgres://a@b:port/c", "postgres://a@b/c?sslmode=maybe"] {
        let server = TestServer::start_with(settings(url));
        ended_by(&server, "url").await;
        assert_eq!(ends(&server).await.keys().collect::<Vec<_>>(), ["url"]);
        assert_eq!(readiness(&server, "").await.1["link"], "down");
        server.stop().await;
    }
}

/// Else `mysql://…` is tried as Postgres, at Postgres' port, and the mistake is never named.
#[tokio::test]
async fn a_url_of_another_scheme_is_named_as_the_cause_and_not_tried() {
    let mut database = Database::create().await;
    let url = database.url().replace("postgres://", "mysql://");
    let server = TestServer::start_with(settings(&url));
    let decided = async {
        while server.metric("tidegate_relay_link_up").await < 1.0 && ends(&server).await.is_empty()
        {
        }
    };
    timeout(DEADLINE, decided).await.expect("an attempt has ended");
    assert_eq!(ends(&server).await.keys().collect::<Vec<_>>(), ["url"]);
    let count = "select count(*) from pg_stat_activity where application_name = 'tidegate' and datname = current_database()";
    assert_eq!(database.value::<i64>(count).await, 0);
    server.stop().await;
}

#[tokio::test]
async fn a_place_of_a_viewer_who_left_while_the_database_was_away_is_free() {
    let mut database = Database::create().await;
    let proxy = Proxy::start("127.0.0.1", database.port()).await;
    proxy.freeze_all();
    let mut settings = listening_at(&database.url_at(proxy.address), database.url());
    settings.relay.listens_max = 1;
    settings.relay.linger = Duration::ZERO;
    settings.relay.listen_wait = Duration::from_millis(1);
    let server = TestServer::start_with(settings);
    let mut gone = Client::connect(&server, V1).await;
    gone.join("cache_invalidate_AB3029").await;
    gone.close().await;
    let gone = async { while server.metric("tidegate_connections").await > 0.0 {} };
    timeout(DEADLINE, gone).await.expect("the viewer is gone");
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(EVENT).await;
    proxy.release();
    server.link_is_up().await;
    is_relayed(&mut database, &mut viewer, 1).await;
    viewer.close().await;
    server.stop().await;
}

/// A standby lets everybody read and nobody LISTEN; a failover makes it the primary.
#[tokio::test]
async fn a_database_in_recovery_is_refused_until_it_is_promoted() {
    let cluster = Cluster::start().await.unwrap();
    let mut database = Database::create_in(&cluster).await;
    cluster.stop_immediate().await.unwrap();
    put(&cluster.data_dir().join("standby.signal"), "");
    let promote = async {
        let server = TestServer::start_with(settings(database.url()));
        ended_by(&server, "in_recovery").await;
        assert_eq!(server.metric("tidegate_relay_link_up").await, 0.0);
        let mut viewer = Client::connect(&server, V2).await;
        viewer.join(EVENT).await;
        cluster.psql("postgres", "select pg_promote()").await.unwrap();
        server.link_is_up().await;
        (server, viewer)
    };
    // A standby is not called started before its promotion.
    let (restarted, (server, mut viewer)) = tokio::join!(cluster.restart(), promote);
    restarted.unwrap();
    database.reconnect().await;
    is_relayed(&mut database, &mut viewer, 1).await;
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_wrong_password_name_or_certificate_is_refused_and_named() {
    let Guarded { cluster, database, right, wrong } = Guarded::start().await;
    let (name, port) = (database.name(), cluster.port());
    let at = |user: &str, host: &str| format!("postgres://{user}@{host}:{port}/{name}");
    let proxy = Proxy::start("127.0.0.2", port).await;
    let other_host = database.url_at(proxy.address).replace("postgres@", "secure@");
    for (url, reason) in [
        (at("guarded:wrong", "127.0.0.1"), "password authentication failed"),
        (at("guarded", "127.0.0.1"), "password authentication failed"),
        (at("nobody", "127.0.0.1"), "role \"nobody\" does not exist"),
        (cluster.url("no_such"), "database \"no_such\" does not exist"),
        (at("secure", "127.0.0.1") + "?sslmode=disable", "no encryption"),
        (at("secure", "localhost") + "?sslmode=verify-full", "UnknownIssuer"),
        (at("secure", "localhost") + "?sslmode=verify-full&" + &wrong, "UnknownIssuer"),
        (at("secure", "localhost") + "?sslmode=verify-ca&" + &wrong, "UnknownIssuer"),
        (other_host + "?sslmode=verify-full&" + &right, "not valid for name"),
    ] {
        let server = TestServer::start_with(settings(&url));
        ended_by(&server, "connect").await;
        assert_eq!(ends(&server).await.keys().collect::<Vec<_>>(), ["connect"], "{url}");
        assert_eq!(server.metric("tidegate_relay_link_up").await, 0.0, "{url}");
        server.stop().await;
        let error = db::migrate(&Secret::from(&*url)).await.unwrap_err();
        let db::MigrateError::Connect(cause) = error else { panic!("{url}: {error:?}") };
        assert!(cause.to_string().contains(reason), "{url}: {cause}");
    }
}

#[tokio::test]
async fn a_right_password_or_certificate_is_accepted_by_the_link_and_by_migrate() {
    let Guarded { cluster, mut database, right, .. } = Guarded::start().await;
    let (name, port) = (database.name().to_owned(), cluster.port());
    let at = |user: &str, host: &str| format!("postgres://{user}@{host}:{port}/{name}");
    let proxy = Proxy::start("127.0.0.2", port).await;
    let other_host = database.url_at(proxy.address).replace("postgres@", "secure@");
    let is_tls = "select bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid)
        where application_name = 'tidegate'";
    for (url, tls) in [
        (at("guarded:correct%20horse", "127.0.0.1") + "?sslmode=disable", false),
        (at("secure", "127.0.0.1"), true),
        (at("secure", "localhost") + "?sslmode=verify-full&" + &right, true),
        (at("secure", "127.0.0.1") + "?sslmode=verify-full&" + &right, true),
        (other_host + "?sslmode=verify-ca&" + &right, true),
    ] {
        db::migrate(&Secret::from(&*url)).await.unwrap();
        let mut settings = settings(&url);
        settings.relay.connect_timeout = DEADLINE;
        let server = TestServer::start_with(settings);
        server.link_is_up().await;
        let mut viewer = Client::connect(&server, V1).await;
        viewer.join(EVENT).await;
        is_relayed(&mut database, &mut viewer, 1).await;
        assert_eq!(database.value::<bool>(is_tls).await, tls, "{url}");
        viewer.close().await;
        server.stop().await;
        let count = "select count(*) from pg_stat_activity where application_name = 'tidegate'";
        let gone = async { while database.value::<i64>(count).await > 0 {} };
        timeout(DEADLINE, gone).await.expect("a stopped server holds no connection");
    }
}

/// A cluster with TLS, a role `guarded` that needs a password and a role `secure` that needs TLS.
struct Guarded {
    cluster: Cluster,
    database: Database,
    /// The URL's parameter that names the server's CA.
    right: String,
    /// And one that names another.
    wrong: String,
}

impl Guarded {
    async fn start() -> Self {
        let cluster = Cluster::start().await.unwrap();
        let mut database = Database::create_in(&cluster).await;
        let tls = cluster.data_dir().join("tls");
        make_certificates(&tls);
        let hba = cluster.data_dir().join("pg_hba.conf");
        let (trust, tls) = (fs::read_to_string(&hba).unwrap(), tls.display());
        let guard = "host all guarded all scram-sha-256\nhostssl all secure all trust\nhost all secure all reject\n";
        put(&hba, &format!("{guard}{trust}"));
        // One by one: `alter system` runs in no transaction.
        for statement in [
            "create role guarded login superuser password 'correct horse'",
            "create role secure login superuser",
            &format!("alter system set ssl_cert_file = '{tls}/server.crt'"),
            &format!("alter system set ssl_key_file = '{tls}/server.key'"),
            "alter system set ssl = on",
            "select pg_reload_conf()",
        ] {
            database.run(statement).await;
        }
        let reloaded = async {
            // What a new session says is what Postgres has read; an old one may be ahead of it.
            database.reconnect().await;
            while database.value::<String>("show ssl").await != "on" {
                database.reconnect().await;
            }
        };
        timeout(DEADLINE, reloaded).await.expect("the settings are read again");
        let ca = |name: &str| format!("sslrootcert={tls}/{name}.crt");
        let (right, wrong) = (ca("ca"), ca("other"));
        Self { cluster, database, right, wrong }
    }
}

/// Writes a file that Postgres owns.
fn put(file: &Path, text: &str) {
    fs::write(file, text).unwrap();
    give(file);
}

/// To whoever owns the data directory: Postgres reads no key of anybody else's.
fn give(file: &Path) {
    let owner = fs::metadata(file.parent().unwrap()).unwrap();
    std::os::unix::fs::chown(file, Some(owner.uid()), Some(owner.gid())).unwrap();
}

/// A certificate of localhost and 127.0.0.1 by a CA of our own, and another CA.
fn make_certificates(dir: &Path) {
    fs::create_dir(dir).unwrap();
    give(dir);
    put(
        &dir.join("names"),
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    );
    let openssl = |arguments: &str| {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(dir)
            .output()
            .expect("openssl is installed: apt-get install openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for ca in ["ca", "other"] {
        openssl(&format!("req -x509 {key} -keyout {ca}.key -out {ca}.crt -subj /CN={ca} -days 2"));
    }
    openssl(&format!("req {key} -keyout server.key -out server.csr -subj /CN=tidegate-test"));
    openssl(
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
    );
    give(&dir.join("server.key"));
    give(&dir.join("server.crt"));
}
