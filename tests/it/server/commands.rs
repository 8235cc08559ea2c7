//! The binary: what its commands print, with which code they exit, and what the environment does.

use std::{fs, net::SocketAddr};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tidegate::{
    auth::Authenticator,
    clock::unix_now,
    protocol::serializer::Serializer::{V1, V2},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

use crate::support::{
    client::Client,
    postgres::Database,
    process::{BINARY, SERVE, Said, Scratch, Serving, command, run},
    server::{DEADLINE, TestServer, config},
    token::{self, SECRET},
};

/// What the admin rule says of the levels that may read.
const ADMIN_GRANT: &str =
    r#"{ claim = "admin_events.{eid}", any_of = ["super", "producer", "photo", "voting"] }"#;

#[tokio::test]
async fn the_version_is_the_packages() {
    let said = run(&["--version"], &[]).await;
    assert_eq!(said.out, format!("tidegate {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!((said.code, &*said.err), (Some(0), ""));
    let help = run(&["--help"], &[]).await;
    assert_eq!((help.code, &*help.err), (Some(0), ""));
    for command in ["serve", "migrate", "token", "config", "demo", "bench"] {
        assert!(help.out.contains(&format!("  {command} ")), "{command}: {}", help.out);
    }
}

fn verifier() -> Authenticator {
    Authenticator::standalone(&config().trust()).unwrap()
}

#[tokio::test]
async fn a_token_is_all_that_is_printed_and_opens_a_socket() {
    let secret = [("TIDEGATE_JWT_SECRET", SECRET)];
    let claims = r#"{"sub":"x","admin_events":{"AB3028":"producer"}}"#;
    let arguments = ["token", "--role", "anon", "--claims", claims, "--ttl", "2h"];
    let said = run(&arguments, &secret).await;
    assert_eq!((said.code, &*said.err), (Some(0), ""));
    let token = said.out.strip_suffix('\n').unwrap();
    assert!(token.split('.').count() == 3 && !token.contains(char::is_whitespace), "{token:?}");

    let verified = verifier().verify_at(token, unix_now()).unwrap();
    let claim = |path: &[&str]| {
        verified.claims.text_at(path.iter().map(|part| (*part).to_owned())).unwrap().to_owned()
    };
    assert_eq!(&*verified.claims.role, "anon");
    assert_eq!(
        (claim(&["sub"]), claim(&["admin_events", "AB3028"])),
        ("x".into(), "producer".into())
    );
    let lasts = verified.claims.exp - unix_now();
    assert!((7140..=7200).contains(&lasts), "{lasts}");

    let server = TestServer::start();
    let mut client = Client::with_token(&server, V2, token).await;
    client.join("cache_invalidate_AB3028").await;
    client.close().await;
    server.stop().await;

    // An hour, unless said.
    let said = run(&["token", "--role", "service_role"], &secret).await;
    let lasts =
        verifier().verify_at(said.out.trim_end(), unix_now()).unwrap().claims.exp - unix_now();
    assert!((3540..=3600).contains(&lasts), "{lasts}");
}

#[tokio::test]
async fn bad_arguments_exit_64_and_say_what_is_wrong() {
    let secret = [("TIDEGATE_JWT_SECRET", SECRET)];
    for (arguments, named) in [
        (&["swim"][..], "swim"),
        (&["serve", "--port", "1"], "--port"),
        (&["--no-such-option"], "--no-such-option"),
        (&["serve", "twice"], "twice"),
        (&["token"], "--role"),
        (&["token", "--role", "anon", "--ttl", "soon"], "--ttl"),
        (&["token", "--role", "anon", "--ttl", "-1h"], "-1"),
        (&["token", "--role", "anon", "--claims", "[]"], "claims"),
        (&["token", "--role", "anon", "--claims", "{\"sub\":"], "claims"),
        (&["config", "--chek"], "--chek"),
    ] {
        let said = run(arguments, &secret).await;
        assert_eq!((said.code, &*said.out), (Some(64), ""), "{arguments:?}");
        assert!(said.err.contains(named), "{arguments:?}: {}", said.err);
        assert!(!said.err.contains(SECRET));
    }
    let said = run(&["token", "--role", "anon"], &[]).await;
    assert_eq!((said.code, &*said.out), (Some(64), ""));
    assert!(said.err.contains("TIDEGATE_JWT_SECRET"), "{}", said.err);
}

#[tokio::test]
async fn all_mistakes_of_the_settings_are_told_in_one_go_and_no_secret_is() {
    let file = Scratch::new(
        "listne = \"0.0.0.0:4000\"\njwt_secret = 7\nadmin_token = [\"hidden-token\"]\n[limits]\nwrite_timeout = \"0s\"\n[relay]\nlinger = \"ages\"\n",
    );
    let variables = [
        ("TIDEGATE_CONFIG", file.path()),
        ("TIDEGATE_LISTEN", "nowhere"),
        ("TIDEGATE_LIMITS__CONNECTIONS_MAX", "many"),
        ("TIDEGATE_TOPICS__ALLOW_OTHER", "perhaps"),
        ("TIDEGATE_NO_SUCH", "hidden-value"),
        ("TIDEGATE_NOSUCH__SECTION", "1"),
        ("TIDEGATE_PROTOCOL__ERROR_DELAY", "1501ms"),
        ("TIDEGATE_DATABASE_URL", "postgres://a:hidden-password@127.0.0.1/a"),
    ];
    for arguments in [
        &[][..],
        &["serve"],
        &["migrate"],
        &["config"],
        &["config", "--check"],
        &["token", "--role", "anon"],
    ] {
        let said = run(arguments, &variables).await;
        assert_eq!((said.code, &*said.out), (Some(64), ""), "{arguments:?}: {}", said.err);
        for named in [
            "listne",
            "jwt_secret",
            "admin_token",
            "limits.write_timeout",
            "relay.linger",
            "listen",
            "TIDEGATE_LIMITS__CONNECTIONS_MAX",
            "TIDEGATE_TOPICS__ALLOW_OTHER",
            "TIDEGATE_NO_SUCH",
            "TIDEGATE_NOSUCH__SECTION",
            "protocol.error_delay",
        ] {
            assert!(said.err.contains(named), "{arguments:?}, {named}: {}", said.err);
        }
        assert!(said.err.contains(file.name()), "where it is set: {}", said.err);
        assert!(!said.err.contains("hidden"), "{}", said.err);
    }
}

#[tokio::test]
async fn the_printed_settings_hide_secrets_and_can_be_read_again() {
    let secrets = [
        ("TIDEGATE_JWT_SECRET", "hidden-1"),
        ("TIDEGATE_ADMIN_TOKEN", "hidden-2"),
        ("DATABASE_URL", "postgres://a:hidden-3@127.0.0.1/a"),
        ("TIDEGATE_NOTIFY_DATABASE_URL", "postgres://a:hidden-4@127.0.0.1/a"),
        ("TIDEGATE_MIGRATE_DATABASE_URL", "postgres://a:hidden-5@127.0.0.1/a"),
    ];
    let said = run(&["config"], &secrets).await;
    assert_eq!((said.code, &*said.err), (Some(0), ""));
    assert!(!said.out.contains("hidden-"), "{}", said.out);
    assert_eq!(said.out.matches("<hidden>").count(), 5, "{}", said.out);
    // Printed again from what was printed.
    let file = Scratch::new(&said.out);
    let again = run(&["config"], &[("TIDEGATE_CONFIG", file.path())]).await;
    assert_eq!((again.code, &*again.err, again.out), (Some(0), "", said.out));

    let checked = run(&["config", "--check"], &secrets).await;
    assert_eq!((checked.code, &*checked.out, &*checked.err), (Some(0), "", ""));
    let wrong = [("TIDEGATE_RELAY__LISTENS_MAX", "0")];
    let checked = run(&["config", "--check"], &wrong).await;
    assert_eq!((checked.code, &*checked.out), (Some(64), ""));
    assert!(checked.err.contains("relay.listens_max"), "{}", checked.err);
}

#[tokio::test]
async fn a_file_goes_over_the_defaults_and_the_environment_over_the_file() {
    let file = Scratch::new(
        "log = \"debug\"\njwt_secret = \"of-the-file\"\n[limits]\nconnections_max = 7\nchannels_per_socket_max = 8\n",
    );
    let variables = [
        ("TIDEGATE_CONFIG", file.path()),
        ("TIDEGATE_LIMITS__CHANNELS_PER_SOCKET_MAX", "9"),
        ("TIDEGATE_LOG", "warn"),
        ("DATABASE_URL", "postgres://over-the-other"),
    ];
    let said = run(&["config"], &variables).await;
    assert_eq!((said.code, &*said.err), (Some(0), ""));
    let has = |line: &str| said.out.lines().any(|printed| printed == line);
    assert!(has("connections_max = 7"), "the file's: {}", said.out);
    assert!(has("channels_per_socket_max = 9"), "the environment's: {}", said.out);
    assert!(has("log = \"warn\""), "the environment's: {}", said.out);
    assert!(has("silence_timeout = \"90s\""), "the default: {}", said.out);
    assert!(has("jwt_secret = \"<hidden>\""), "the file's: {}", said.out);

    // Each of the two may be wrong; what is right in the other does not mend it.
    let missing = [("TIDEGATE_CONFIG", "/no/such/tidegate.toml"), SERVE[0], SERVE[1], SERVE[2]];
    for arguments in [&["serve"][..], &["config", "--check"], &["migrate"]] {
        let said = run(arguments, &missing).await;
        assert_eq!((said.code, &*said.out), (Some(64), ""), "{arguments:?}");
        assert!(said.err.contains("/no/such/tidegate.toml"), "{}", said.err);
    }
    let no_toml = Scratch::new("listen = \n");
    let said = run(&["config"], &[("TIDEGATE_CONFIG", no_toml.path())]).await;
    assert_eq!((said.code, &*said.out), (Some(64), ""));
    assert!(said.err.contains(no_toml.name()), "{}", said.err);
}

#[tokio::test]
async fn topic_rules_of_a_file_take_the_place_of_the_built_in_ones() {
    let rules = "[topics]\nallow_other = false\n\
        [[topic]]\nname = \"score\"\npattern = [\"score-{eid}\"]\nlisten = \"score_{eid}\"\nevent = \"goal\"\n\
        read = [{ role = [\"anon\"] }]\nwrite = [{ claim = \"referee\", equals = \"{eid}\" }]\n";
    let file = Scratch::new(rules);
    let mut database = Database::create().await;
    let serving = Serving::start(&[
        ("TIDEGATE_CONFIG", file.path()),
        ("TIDEGATE_DATABASE_URL", database.url()),
        ("TIDEGATE_RELAY__LISTEN_WAIT", "1500ms"),
        ("TIDEGATE_PROTOCOL__ERROR_DELAY", "1ms"),
    ])
    .await;
    let (anon, referee) = (
        token::of_role("anon"),
        token::with_claims(json!({ "role": "anon", "referee": "AB3028" })),
    );
    let mut viewer = Client::at(serving.public, V1, &anon).await;
    for refused in ["cache_invalidate_AB3028", "room", "score-", "score-AB 1"] {
        let topic = format!("realtime:{refused}");
        viewer.send(json!(["9", "9", topic, "phx_join", { "config": {} }])).await;
        let error = json!({ "status": "error", "response": { "reason": "$any" } });
        viewer.expect(json!(["9", "9", topic, "phx_reply", error])).await;
    }
    until_link_is_up(&serving).await;
    viewer.join("score-AB3028").await;
    viewer.join("score-AB3029").await;
    database.notify("score_AB3028", "{}").await;
    assert_eq!(
        viewer.broadcast().await,
        ("realtime:score-AB3028".into(), envelope("goal", &json!({})))
    );

    // The referee of one event writes to that event alone; who is none, to neither.
    for (token, may_write) in [(&anon, &[][..]), (&referee, &["score-AB3028"])] {
        let mut writer = Client::at(serving.public, V2, token).await;
        for sub_topic in ["score-AB3028", "score-AB3029"] {
            writer.join(sub_topic).await;
            writer.publish(sub_topic, json!({ "by": sub_topic })).await;
            writer.expect_nothing().await;
            if may_write.contains(&sub_topic) {
                viewer.hears(sub_topic, json!({ "by": sub_topic })).await;
            }
            viewer.expect_nothing().await;
        }
        writer.close().await;
    }
    viewer.close().await;
    assert_eq!(serving.end(Signal::SIGTERM).await.code, Some(0));

    let wrong = rules.replace("score_{eid}", "score_{who}").replace("equals", "eqals");
    for (wrong, named) in [
        (rules.replace("score_{eid}", "score_{who}"), "score"),
        (rules.replace("equals", "eqals"), "eqals"),
        (rules.replace("{ role = [\"anon\"] }", "{}"), "score"),
        (wrong, "eqals"),
    ] {
        let file = Scratch::new(&wrong);
        let said = run(&["config", "--check"], &[("TIDEGATE_CONFIG", file.path())]).await;
        assert_eq!((said.code, &*said.out), (Some(64), ""), "{wrong}");
        assert!(said.err.contains(named), "{wrong}\n{}", said.err);
    }
}

fn envelope(event: &str, payload: &Value) -> Value {
    json!({ "type": "broadcast", "event": event, "payload": payload })
}

async fn metrics(admin: SocketAddr) -> String {
    TestServer::request(admin, "GET /metrics HTTP/1.1", "").await.1
}

/// The value of a series without labels.
fn metric(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

async fn until_link_is_up(serving: &Serving) {
    let up = async {
        while metric(&metrics(serving.admin).await, "tidegate_relay_link_up") != Some(1.0) {}
    };
    timeout(DEADLINE, up).await.expect("the link is up in time");
}

#[tokio::test]
async fn sigterm_and_sigint_end_a_server_with_0_and_its_sockets_with_1012() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let serving = Serving::start(&[]).await;
        assert_ne!(serving.public.port(), 0);
        assert_ne!(serving.public, serving.admin);
        let head = "GET /healthz HTTP/1.1";
        assert_eq!(TestServer::request(serving.public, head, "").await.0, 200);
        let (_, ready) = TestServer::request(serving.admin, "GET /readyz HTTP/1.1", "").await;
        assert_eq!(ready, r#"{"canary":null,"draining":false,"link":"none","ready":true}"#);
        let mut client = Client::at(serving.public, V1, &token::of_role("anon")).await;
        client.join("cache_invalidate_AB3028").await;
        let public = serving.public;
        let (said, closed) = tokio::join!(serving.end(signal), client.closed());
        assert_eq!((said.code, &*said.out), (Some(0), ""), "one line is all: {}", said.err);
        assert!(!said.err.contains(SECRET));
        assert_eq!(closed, Some(1012));
        assert!(TcpStream::connect(public).await.is_err());
    }
}

/// Who starts it may change its mind; a signal that kills drains nothing.
#[tokio::test]
async fn from_the_line_on_a_signal_ends_a_server_orderly() {
    for _ in 0..10 {
        let serving = Serving::start(&[]).await;
        assert_eq!(serving.end(Signal::SIGTERM).await.code, Some(0));
    }
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why_in_one_line() {
    let said = run(&["serve"], &SERVE[..2]).await;
    assert!(matches!(said.code, Some(1 | 64)), "{:?}", said.code);
    assert!(said.err.contains("TIDEGATE_JWT_SECRET"), "{}", said.err);
    assert_eq!((said.out.lines().count(), said.err.lines().count()), (0, 1), "{}", said.err);

    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (variable, name) in
        [("TIDEGATE_LISTEN", "(listen)"), ("TIDEGATE_ADMIN_LISTEN", "(admin_listen)")]
    {
        let mut variables = SERVE.to_vec();
        variables.push((variable, &address));
        let said = run(&["serve"], &variables).await;
        assert_eq!((said.code, &*said.out), (Some(1), ""), "{}", said.err);
        assert_eq!(said.err.lines().count(), 1, "{}", said.err);
        assert!(said.err.contains(&address) && said.err.contains(name), "{}", said.err);
        assert!(said.err.contains("in use"), "{}", said.err);
    }
}

#[tokio::test]
async fn a_server_raises_its_limit_of_open_files_to_the_hard_one() {
    let serving = Serving::after("ulimit -Sn 256 && ulimit -Hn 1024", &[]).await;
    let file = format!("/proc/{}/limits", serving.child.id().unwrap());
    let limits = fs::read_to_string(file).unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let files: Vec<_> = files.split_whitespace().collect();
    assert_eq!(files[..2], ["1024", "1024"], "{limits}");
    assert!(!metrics(serving.admin).await.is_empty(), "it serves");
    assert_eq!(serving.end(Signal::SIGTERM).await.code, Some(0));
}

/// The secrets and everybody's tokens stand in its memory.
#[tokio::test]
async fn a_server_that_crashes_leaves_no_core_file() {
    let serving = Serving::after("ulimit -c unlimited", &[]).await;
    let limits = fs::read_to_string(format!("/proc/{}/limits", serving.child.id().unwrap()));
    let limits = limits.unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[4..6], ["1", "1"], "less than a page, and no program gets it: {line}");
    serving.end(Signal::SIGTERM).await;
}

#[tokio::test]
async fn a_short_admin_token_is_warned_of_and_works() {
    for (token, warned) in [("fifteen-bytes-..", false), ("fifteen-bytes-.", true), ("", false)] {
        let serving = Serving::start(&[("TIDEGATE_ADMIN_TOKEN", token)]).await;
        let head = format!("GET /readyz HTTP/1.1\r\nauthorization: Bearer {token}");
        assert_eq!(TestServer::request(serving.admin, &head, "").await.0, 200);
        let said = serving.end(Signal::SIGTERM).await;
        assert_eq!(said.err.contains("admin_token is shorter"), warned, "{}", said.err);
        assert!(!said.err.contains("fifteen"), "{}", said.err);
    }
}

#[tokio::test]
async fn a_server_without_descriptors_survives_and_serves_again_when_there_are_some() {
    let serving =
        Serving::after("ulimit -n 64", &[("TIDEGATE_LIMITS__HANDSHAKE_TIMEOUT", "60s")]).await;
    let token = token::of_role("anon");
    let mut client = Client::at(serving.public, V1, &token).await;
    client.join("cache_invalidate_AB3028").await;
    // Before the flood: later there is no descriptor for it.
    let mut admin = TcpStream::connect(serving.admin).await.unwrap();
    let before = scrape(&mut admin).await;
    assert_eq!(metric(&before, "tidegate_accept_errors_total"), Some(0.0));

    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(TcpStream::connect(serving.public).await.unwrap());
    }
    let counted = async {
        loop {
            let errors = metric(&scrape(&mut admin).await, "tidegate_accept_errors_total");
            if errors.expect("the metric is there") >= 2.0 {
                break;
            }
        }
    };
    timeout(DEADLINE, counted).await.expect("failed accepts are counted");
    // Who is in stays in.
    client.expect_nothing().await;
    drop(flood);
    let asked_at = Instant::now();
    let mut late = timeout(DEADLINE, Client::at(serving.public, V2, &token)).await.unwrap();
    late.join("cache_invalidate_AB3028").await;
    assert!(asked_at.elapsed() < DEADLINE / 2, "{:?}", asked_at.elapsed());
    assert_eq!(metric(&metrics(serving.admin).await, "tidegate_connections"), Some(2.0));
    late.close().await;
    client.close().await;
    let said = serving.end(Signal::SIGTERM).await;
    assert_eq!(said.code, Some(0), "{}", said.err);
    // Told, not shouted.
    let told = said.err.lines().filter(|line| line.contains("accept")).count();
    assert!((1..50).contains(&told), "{told} lines");
}

/// The metrics, over a connection that is kept.
async fn scrape(stream: &mut TcpStream) -> String {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut stream = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        let read = timeout(DEADLINE, stream.read_line(&mut line)).await;
        assert!(read.expect("an answer in time").unwrap() > 0, "the admin connection lives");
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    String::from_utf8(body).unwrap()
}

#[tokio::test]
async fn migrate_makes_a_vote_reach_its_viewers_and_changes_nothing_the_second_time() {
    let mut database = Database::create().await;
    let url = database.url().to_owned();
    let variables = [("TIDEGATE_DATABASE_URL", &*url)];
    let objects = "select count(*) from pg_class c join pg_namespace n on n.oid = relnamespace
        where nspname in ('tidegate', 'public')";
    let mut counts = Vec::new();
    for _ in 0..2 {
        let said = run(&["migrate"], &variables).await;
        assert_eq!((said.code, said.out.lines().count()), (Some(0), 1), "{}", said.err);
        counts.push(database.value::<i64>(objects).await);
    }
    assert!(counts[0] > 0 && counts[0] == counts[1], "{counts:?}");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/schema");
    let files = i64::try_from(fs::read_dir(folder).unwrap().count()).unwrap();
    let migrations = "select count(*) from tidegate.migrations where success";
    assert_eq!(database.value::<i64>(migrations).await, files, "a file is not registered");

    database.run(include_str!("../../../migrations/examples/production_tables.sql")).await;
    // Again, now that there are tables to put triggers on.
    assert_eq!(run(&["migrate"], &variables).await.code, Some(0));
    database
        .run(
            "insert into events (id, eid) values
                ('00000000-0000-4000-8000-000000003028', 'AB3028');
            insert into art (id, art_code, event_id, round, easel) values
                ('00000000-0000-4000-8000-0000000000a1', 'AB3028-2-3',
                '00000000-0000-4000-8000-000000003028', 2, 3)",
        )
        .await;

    let serving = Serving::start(&[
        ("TIDEGATE_DATABASE_URL", &*url),
        ("TIDEGATE_RELAY__LISTEN_WAIT", "1500ms"),
    ])
    .await;
    until_link_is_up(&serving).await;
    let token = token::of_role("anon");
    let mut viewers = [
        Client::at(serving.public, V1, &token).await,
        Client::at(serving.public, V2, &token).await,
    ];
    let topics = ["cache_invalidate_AB3028", "cache_invalidate:AB3028"];
    for (viewer, topic) in viewers.iter_mut().zip(topics) {
        viewer.join(topic).await;
    }
    database
        .run(
            "insert into votes (event_id, eid, round, easel, art_id, art_uuid, person_id) values
                ('00000000-0000-4000-8000-000000003028', 'AB3028', 2, 3, 'AB3028-2-3',
                '00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-0000000000b1')",
        )
        .await;
    for (viewer, topic) in viewers.iter_mut().zip(topics) {
        let (_, vote) = viewer.broadcast().await;
        let payload = &vote["payload"];
        let told = json!([vote["event"], payload["type"], payload["endpoints"]]);
        assert_eq!(told, json!(["cache_invalidation", "vote_cast", ["/live/event/AB3028"]]));
        viewer.repeated(topic, vote["payload"].clone()).await;
        viewer.expect_nothing().await;
    }
    // At the end of the window. It names all that is repeated, and so is as it came.
    database.run("select manual_cache_invalidation('AB3028')").await;
    for viewer in &mut viewers {
        let (_, manual) = viewer.broadcast().await;
        assert_eq!(manual["payload"]["type"], "manual_invalidation");
        let endpoints = json!(["/live/event/AB3028", "/live/event/AB3028/media"]);
        assert_eq!(manual["payload"]["endpoints"], endpoints);
    }
    for viewer in viewers {
        viewer.close().await;
    }
    let said = serving.end(Signal::SIGTERM).await;
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(!said.err.contains("endpoints"), "payloads are not logged: {}", said.err);
}

#[tokio::test]
async fn migrate_without_its_database_exits_1_and_says_why() {
    // A port that nobody has: ours, and not listened to.
    let port = tokio::net::TcpSocket::new_v4().unwrap();
    port.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("postgres://a:hidden-password@{}/a", port.local_addr().unwrap());
    for variables in [
        &[("TIDEGATE_DATABASE_URL", &*url)][..],
        // The role that may create triggers goes first.
        &[("TIDEGATE_DATABASE_URL", "postgres://b/b"), ("TIDEGATE_MIGRATE_DATABASE_URL", &*url)],
    ] {
        let running = command(BINARY, &["migrate"], variables).output();
        // It may wait for a database that is starting.
        let said: Said = timeout(2 * DEADLINE, running).await.unwrap().unwrap().into();
        assert_eq!((said.code, &*said.out), (Some(1), ""), "{}", said.err);
        assert!(said.err.contains("no connection to the database"), "{}", said.err);
        assert!(said.err.contains("refused"), "the system's reason: {}", said.err);
        assert!(!said.err.contains("hidden-password"), "{}", said.err);
    }
}

#[tokio::test]
async fn a_server_says_in_its_log_why_there_is_no_database_link() {
    let port = tokio::net::TcpSocket::new_v4().unwrap();
    port.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("postgres://a:hidden-password@{}/a", port.local_addr().unwrap());
    let serving = Serving::start(&[
        ("TIDEGATE_DATABASE_URL", &url),
        ("TIDEGATE_RELAY__CONNECT_TIMEOUT", "200ms"),
    ])
    .await;
    let failed = async {
        let series = "tidegate_relay_reconnects_total{cause=\"connect\"}";
        while metric(&metrics(serving.admin).await, series) < Some(1.0) {}
    };
    timeout(DEADLINE, failed).await.expect("an attempt fails in time");
    let said = serving.end(Signal::SIGTERM).await;
    assert_eq!(said.code, Some(0));
    let line = said.err.lines().find(|line| line.contains("no database link")).unwrap();
    assert!(line.contains("WARN") && line.contains("cause=\"connect\""), "{line}");
    assert!(line.contains("refused"), "the system's reason: {line}");
    assert!(!said.err.contains("hidden-password"), "{}", said.err);
}

#[tokio::test]
async fn migrate_without_a_url_names_the_setting() {
    let said = run(&["migrate"], &[]).await;
    assert!(matches!(said.code, Some(1 | 64)), "{:?}", said.code);
    assert!(said.err.contains("TIDEGATE_DATABASE_URL"), "{}", said.err);
}

#[tokio::test]
async fn migrate_takes_away_what_it_made_and_makes_it_again() {
    let mut database = Database::create().await;
    database.run(include_str!("../../../migrations/examples/production_tables.sql")).await;
    let url = database.url().to_owned();
    // The role that may create triggers goes first, here as well.
    let variables = [
        ("TIDEGATE_DATABASE_URL", "postgres://127.0.0.1:1/none"),
        ("TIDEGATE_MIGRATE_DATABASE_URL", &*url),
    ];
    let ours =
        "select (select count(*) from pg_namespace where nspname in ('tidegate', 'realtime'))
        + (select count(*) from pg_trigger where not tgisinternal)
        + (select count(*) from pg_proc where pronamespace = 'public'::regnamespace)";
    for _ in 0..2 {
        let said = run(&["migrate"], &variables).await;
        assert_eq!(said.code, Some(0), "{}", said.err);
        // Two schemas, a trigger for each of nine tables, four functions.
        assert_eq!(database.value::<i64>(ours).await, 15);
        for _ in 0..2 {
            let said = run(&["migrate", "--uninstall"], &variables).await;
            assert_eq!((said.code, said.out.lines().count()), (Some(0), 1), "{}", said.err);
            assert!(said.err.contains("role tidegate is left"), "{}", said.err);
            assert_eq!(database.value::<i64>(ours).await, 0);
        }
    }
    let said = run(&["migrate", "--uninstall"], &[]).await;
    assert_eq!((said.code, &*said.out), (Some(1), ""));
    assert!(said.err.contains("TIDEGATE_DATABASE_URL"), "{}", said.err);
}

#[tokio::test]
async fn an_uninstall_that_fails_takes_nothing_away() {
    let mut database = Database::create().await;
    let url = database.url().to_owned();
    assert_eq!(run(&["migrate"], &[("TIDEGATE_DATABASE_URL", &url)]).await.code, Some(0));
    let stranger = format!("stranger_{}", database.name());
    database.run(&format!("create role {stranger} login")).await;
    let theirs = url.replace("postgres@", &format!("{stranger}@"));
    let said = run(&["migrate", "--uninstall"], &[("TIDEGATE_DATABASE_URL", &theirs)]).await;
    assert_eq!((said.code, &*said.out), (Some(1), ""), "{}", said.err);
    assert!(said.err.contains("nothing was taken away: "), "{}", said.err);
    assert!(said.err.contains("permission denied"), "the database's reason: {}", said.err);
    let ours = "select count(*) from pg_proc where pronamespace = 'public'::regnamespace
        and to_regclass('tidegate.broadcast_history') is not null";
    assert_eq!(database.value::<i64>(ours).await, 4);
    database.run(&format!("drop role {stranger}")).await;
}

/// The reviewer's and the supporter's question, answered without a server.
#[tokio::test]
async fn config_explains_what_a_token_may_do_and_by_which_rule_and_grant() {
    let admin = token::with_claims(json!({
        "role": "authenticated", "admin_events": { "AB3028": "photo" },
    }));
    let expired = token::named("expired");
    let secret = [("TIDEGATE_JWT_SECRET", SECRET)];
    for (arguments, expected) in [
        (
            vec!["--topic", "admin-auction-AB3028", "--token", &admin],
            format!(
                "token: verified, role authenticated\n\
                 topic: admin-auction-AB3028 (rule admin; eid = AB3028)\n\
                 read: allowed: grant 1 {ADMIN_GRANT}\nwrite: refused: no grant\n"
            ),
        ),
        (
            vec!["--topic", "realtime:cache_invalidate_AB3028", "--token", &expired],
            "topic: cache_invalidate_AB3028 (rule cache; eid = AB3028)\n\
             read: allowed: grant 1 { role = [\"anon\", \"authenticated\", \"service_role\"] } \
             (asked as anon: the token has ended)\n\
             write: refused: no grant (asked as anon: the token has ended)\n"
                .to_owned(),
        ),
        (
            vec!["--topic", "room", "--private", "--token", &admin],
            "topic: room (no rule)\nread: policies: private\nwrite: policies: private\n".to_owned(),
        ),
        (
            vec!["--topic", "room"],
            "token: no token\ntopic: room (no rule)\nread: refused: missing\nwrite: refused: missing\n"
                .to_owned(),
        ),
    ] {
        let arguments = [vec!["config", "--explain"], arguments].concat();
        let said = run(&arguments, &secret).await;
        assert_eq!((said.code, &*said.err), (Some(0), ""), "{arguments:?}");
        assert!(said.out.ends_with(&expected), "{}\nexpected {expected}", said.out);
        assert!(!said.out.contains(&admin), "a token is printed");
    }
    let said = run(&["config", "--explain"], &secret).await;
    assert_eq!(said.code, Some(64));
}

#[tokio::test]
async fn sighup_has_the_rules_read_again_and_closes_no_socket() {
    let file = Scratch::new("");
    let variables = [("TIDEGATE_CONFIG", file.path())];
    let serving = Serving::start(&variables).await;
    let mut client = Client::at(serving.public, V2, &token::of_role("anon")).await;
    client.join("room").await;
    // Its own watch of the file may come first: then this reads the same again.
    fs::write(file.path(), "[topics]\nallow_other = false\n").unwrap();
    serving.signal(Signal::SIGHUP);
    let system = client.message().await;
    assert_eq!(system[3], "system", "{system}");
    assert_eq!(client.message().await[3], "phx_close");
    client.expect_nothing().await;
    drop(client);
    assert_eq!(serving.end(Signal::SIGTERM).await.code, Some(0));
}
