//! `tidegate doctor`: all is well, and then one thing after the other is broken and named.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, process::Stdio, time::Duration};

use serde_json::{Value, json};
use tidegate::{
    db,
    doctor::{CANARY_EID, Check},
    protocol::serializer::Serializer::V2,
    secret::Secret,
    server::Config,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
    time::timeout,
};

use crate::support::{
    client::Client,
    folder::Folder,
    postgres::Database,
    process::{BINARY, Said, Scratch, command, run},
    server::{DEADLINE, TestServer, config},
    token::{self, SECRET},
};

const PRODUCTION: &str = include_str!("../../../migrations/examples/production_tables.sql");
const SEED: &str = include_str!("../../../migrations/examples/seed_tables.sql");

/// An event with a row in each table.
const ROWS: &str = "
    insert into events (id, eid) values ('00000000-0000-4000-8000-000000003028', 'AB3028');
    insert into people (id, nickname) values ('00000000-0000-4000-8000-0000000000b1', 'Vermeer');
    insert into art (id, art_code, event_id, round, easel) values
        ('00000000-0000-4000-8000-0000000000a1', 'AB3028-2-3', '00000000-0000-4000-8000-000000003028', 2, 3);
    insert into rounds (id, event_id, round_number) values
        ('00000000-0000-4000-8000-0000000000c1', '00000000-0000-4000-8000-000000003028', 2);
    insert into round_contestants (round_id) values ('00000000-0000-4000-8000-0000000000c1');
    insert into event_artists (event_id) values ('00000000-0000-4000-8000-000000003028');
    insert into artwork_offers (art_id) values ('00000000-0000-4000-8000-0000000000a1');
    insert into payment_processing (art_id) values ('00000000-0000-4000-8000-0000000000a1');
";

/// A database with everything, a gateway on it, and the settings that both have.
struct Scene {
    database: Database,
    server: TestServer,
    variables: BTreeMap<&'static str, String>,
}

impl Scene {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_on(PRODUCTION, ROWS, change).await
    }

    /// With these tables and rows.
    async fn start_on(tables: &str, rows: &str, change: impl FnOnce(&mut Config)) -> Self {
        let mut database = Database::create().await;
        database.run(tables).await;
        database.run(rows).await;
        db::migrate(&Secret::from(database.url())).await.unwrap();
        // What was written before is not what is looked at.
        database.run("truncate tidegate.broadcast_history").await;
        let mut config = config();
        let url = database.url().replace("postgres@", "tidegate@");
        config.database_url = Secret::from(&*url);
        // Else one run would wait for the window that the last one has opened.
        config.topic[0].merge.as_mut().unwrap().window = Duration::ZERO;
        change(&mut config);
        let server = TestServer::start_with(config);
        server.metric_reaches("tidegate_canary_last_arrival_timestamp_seconds", 1.0).await;
        let variables = BTreeMap::from([
            ("TIDEGATE_DATABASE_URL", url),
            ("TIDEGATE_MIGRATE_DATABASE_URL", database.url().to_owned()),
            ("TIDEGATE_JWT_SECRET", SECRET.to_owned()),
            ("TIDEGATE_LISTEN", server.public.to_string()),
            ("TIDEGATE_ADMIN_LISTEN", server.admin.to_string()),
        ]);
        Self { database, server, variables }
    }

    /// Runs the doctor with these arguments, and these variables over its own; an empty one is
    /// none.
    async fn said(&self, arguments: &[&str], variables: &[(&'static str, &str)]) -> Said {
        let mut all: BTreeMap<&str, &str> =
            self.variables.iter().map(|(name, value)| (*name, &**value)).collect();
        all.extend(variables.iter().copied());
        all.retain(|_, value| !value.is_empty());
        let all: Vec<_> = all.into_iter().collect();
        run(&[&["doctor"], arguments].concat(), &all).await
    }

    async fn examined(&self, arguments: &[&str], variables: &[(&'static str, &str)]) -> Findings {
        let said = self.said(&[&["--json"], arguments].concat(), variables).await;
        Findings::read(&said)
    }

    /// With nothing changed.
    async fn found(&self) -> Findings {
        self.examined(&[], &[]).await
    }

    /// With this function before those of Postgres in the role's search path.
    async fn found_with(&mut self, function: &str) -> Findings {
        let role = format!("alter role tidegate in database {}", self.database.name());
        let place = format!("{role} set search_path = before, pg_catalog, public");
        self.database.run(&format!("create function before.{function}; {place}")).await;
        let found = self.found().await;
        let (name, _) = function.split_once(" returns").unwrap();
        let remove = format!("{role} reset search_path; drop function before.{name}");
        self.database.run(&remove).await;
        found
    }

    async fn stop(self) {
        self.server.stop().await;
    }
}

/// What the doctor says of each check.
struct Findings {
    code: Option<i32>,
    rows: Vec<Value>,
}

impl Findings {
    fn read(said: &Said) -> Self {
        assert_eq!(said.err, "");
        let rows: Vec<Value> = serde_json::from_str(&said.out).expect("an array");
        let names: Vec<_> = rows.iter().map(|row| row["check"].as_str().unwrap()).collect();
        assert!(names.into_iter().eq(Check::ALL.iter().map(|check| check.name())));
        Self { code: said.code, rows }
    }

    fn row(&self, check: &str) -> &Value {
        self.rows.iter().find(|row| row["check"] == check).unwrap()
    }

    /// What was seen of it, and how it is mended, in one text.
    fn text(&self, check: &str) -> String {
        let row = self.row(check);
        format!("{} | {}", row["saw"].as_str().unwrap(), row["fix"].as_str().unwrap_or_default())
    }

    /// Fails unless these checks, and no others, are not well; a check that is not looked at is
    /// neither.
    #[track_caller]
    fn are(&self, expected: &[(&str, &str)]) {
        let unwell: Vec<_> = self
            .rows
            .iter()
            .filter(|row| row["status"] != "ok" && row["status"] != "skipped")
            .map(|row| (row["check"].as_str().unwrap(), row["status"].as_str().unwrap()))
            .collect();
        let said: Vec<_> = unwell.iter().map(|(check, _)| self.text(check)).collect();
        assert_eq!(unwell, expected, "{said:#?}");
        let has = |wanted| expected.iter().any(|(_, status)| *status == wanted);
        let code = if has("failed") {
            1
        } else if has("warning") {
            2
        } else {
            0
        };
        assert_eq!(self.code, Some(code));
    }

    /// Fails unless the line of the check says all of this.
    #[track_caller]
    fn says(&self, check: &str, words: &[&str]) {
        let text = self.text(check);
        for word in words {
            assert!(text.contains(word), "{check} does not say {word:?}: {text}");
        }
    }

    /// The checks that were not looked at.
    fn skipped(&self) -> Vec<&str> {
        let rows = self.rows.iter().filter(|row| row["status"] == "skipped");
        rows.map(|row| row["check"].as_str().unwrap()).collect()
    }
}

#[tokio::test]
async fn a_healthy_system_is_well_in_every_check_and_exits_0() {
    let mut scene = Scene::start().await;
    let found = scene.found().await;
    found.are(&[]);
    // There is nothing in front.
    assert_eq!(found.skipped(), ["idle-timeout"]);
    found.says("dry-run-votes", &["INSERT would tell vote_cast of AB3028 for /live/event/AB3028"]);
    found.says("dry-run-bids", &["INSERT would tell bid_placed", "/live/event/AB3028-2-3/bids"]);
    found.says("dry-run-media", &["INSERT would tell media_updated", "/live/event/AB3028/media"]);
    found.says("dry-run-payment-processing", &["UPDATE would tell payment_status_changed"]);
    found.says("token", &["role anon", "read allowed: grant 1"]);
    found.says("client-address", &["127.0.0.1", "nothing in front"]);
    found.says("wal-level", &["logical", "does not matter"]);
    found.says("end-to-end", &[CANARY_EID, "ms"]);

    // Nothing is left behind.
    for (what, count) in [
        ("votes", "select count(*) from votes"),
        ("bids", "select count(*) from bids"),
        ("history", "select count(*) from tidegate.broadcast_history"),
        ("failures", "select count(*) from tidegate.trigger_failures"),
        ("payments", "select count(*) from payment_processing where status <> 'pending'"),
        (
            "statistics",
            "select sum(n_tup_ins)::bigint from pg_stat_user_tables
            where relname in ('votes', 'bids', 'art_media')",
        ),
    ] {
        assert_eq!(scene.database.value::<i64>(count).await, 0, "{what}");
    }

    let said = scene.said(&[], &[]).await;
    assert_eq!((said.code, &*said.err), (Some(0), ""));
    assert!(said.out.starts_with("database\n  ok       database-reachable "), "{}", said.out);
    assert!(said.out.ends_with(" warnings: 0, failed: 0, skipped: 1\n"), "{}", said.out);
    scene.stop().await;
}

#[tokio::test]
async fn arguments_and_settings_that_cannot_be_used_exit_64_and_no_secret_is_repeated() {
    let secret = [("TIDEGATE_JWT_SECRET", SECRET)];
    for (arguments, named) in [
        (&["doctor", "--url", "nowhere"][..], "--url"),
        (&["doctor", "--url", "ftp://a.example"], "--url"),
        (&["doctor", "--database-url", "hidden-password"], "--database-url"),
        (&["doctor", "--slow", "20m"], "--slow"),
        (&["doctor", "--no-such"], "--no-such"),
    ] {
        let said = run(arguments, &secret).await;
        assert_eq!((said.code, &*said.out), (Some(64), ""), "{arguments:?}");
        assert!(said.err.contains(named) && !said.err.contains("hidden"), "{}", said.err);
    }
    let said = run(&["doctor"], &[("TIDEGATE_LISTEN", "nowhere")]).await;
    assert_eq!((said.code, &*said.out), (Some(64), ""));
}

/// Neither where all is well nor where everything fails.
#[tokio::test]
async fn no_secret_and_no_token_is_printed() {
    let scene = Scene::start().await;
    let token = token::of_role("anon");
    let hidden = "hidden-p@ssword";
    let url = scene.variables["TIDEGATE_DATABASE_URL"]
        .replace("tidegate@", "tidegate:hidden-p%40ssword@");
    let broken = format!("postgres://u:{hidden}@127.0.0.1:1/{hidden}");
    for (arguments, variables) in [
        (vec!["--token", &token], vec![("TIDEGATE_DATABASE_URL", &*url)]),
        (vec!["--token", hidden], vec![("TIDEGATE_DATABASE_URL", &*broken)]),
        (vec!["--token", &token, "--database-url", &broken], vec![("TIDEGATE_JWT_SECRET", hidden)]),
    ] {
        for json in [&["--json"][..], &[]] {
            let said = scene.said(&[json, &arguments].concat(), &variables).await;
            for secret in [&*token, hidden, "hidden-p%40ssword", SECRET] {
                assert!(!format!("{}{}", said.out, said.err).contains(secret), "{}", said.out);
            }
        }
    }
    scene.stop().await;
}

#[test]
fn the_readme_lists_every_check() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operate/troubleshooting.md");
    let page = std::fs::read_to_string(page).unwrap();
    let section = page.split("## The checks").nth(1).expect("the section");
    let section = section.split("\n## ").next().unwrap();
    let listed: Vec<_> =
        section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let checks: Vec<_> = Check::ALL.iter().map(|check| check.name()).collect();
    assert_eq!(listed, checks);
}

/// An address where nobody listens.
fn nowhere() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// What a front does with a piece of what passes.
enum Passed {
    On(Vec<u8>),
    Swallowed,
    /// The last that passes, in either direction.
    Last(Vec<u8>),
}

/// Something in front of a server, which changes what passes.
struct Front {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Front {
    async fn start<U, D>(to: SocketAddr, up: U, down: D) -> Self
    where
        U: Fn(&[u8]) -> Passed + Clone + Send + 'static,
        D: Fn(&[u8]) -> Passed + Clone + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (up, down) = (up.clone(), down.clone());
                connections.spawn(async move {
                    let server = TcpStream::connect(to).await.unwrap();
                    for stream in [&client, &server] {
                        stream.set_nodelay(true).unwrap();
                    }
                    let (client_read, client_write) = client.into_split();
                    let (server_read, server_write) = server.into_split();
                    tokio::select! {
                        () = pass(client_read, server_write, up) => {}
                        () = pass(server_read, client_write, down) => {}
                    }
                });
            }
        });
        Self { address, _tasks: tasks }
    }

    /// Names every client `203.0.113.7`, as what is in front of production does.
    async fn naming(
        to: SocketAddr,
        down: impl Fn(&[u8]) -> Passed + Clone + Send + 'static,
    ) -> Self {
        let up = |bytes: &[u8]| match String::from_utf8(bytes.to_vec()) {
            Ok(text) if text.starts_with("GET ") => {
                Passed::On(text.replacen("\r\n", "\r\nX-Forwarded-For: 203.0.113.7\r\n", 1).into())
            }
            _ => Passed::On(bytes.to_vec()),
        };
        Self::start(to, up, down).await
    }

    /// Answers each connection's first words with these, and ends it.
    async fn saying(answer: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut asked = [0; 4096];
                // Who only looks whether somebody listens says nothing.
                if client.read(&mut asked).await.is_ok_and(|count| count > 0) {
                    drop(client.write_all(&answer).await);
                    drop(client.shutdown().await);
                }
            }
        });
        Self { address, _tasks: tasks }
    }

    fn url(&self) -> String {
        format!("ws://{}/realtime/v1", self.address)
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, change: impl Fn(&[u8]) -> Passed) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = match from.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let (passed, is_last) = match change(&bytes[..count]) {
            Passed::On(bytes) => (bytes, false),
            Passed::Last(bytes) => (bytes, true),
            Passed::Swallowed => continue,
        };
        if to.write_all(&passed).await.is_err() || is_last {
            return;
        }
    }
}

fn as_it_is(bytes: &[u8]) -> Passed {
    Passed::On(bytes.to_vec())
}

fn has(bytes: &[u8], words: &str) -> bool {
    bytes.windows(words.len()).any(|window| window == words.as_bytes())
}

/// The answer of a Postgres that refuses everybody with this code.
fn refusal(code: &str, message: &str) -> Vec<u8> {
    let fields = format!("SFATAL\0VFATAL\0C{code}\0M{message}\0\0");
    let length = u32::try_from(fields.len() + 4).unwrap();
    [&b"E"[..], &length.to_be_bytes(), fields.as_bytes()].concat()
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_is_named_with_its_reason() {
    let scene = Scene::start().await;
    let nobody = nowhere();
    let refusing = |code, message| Front::saying(refusal(code, message));
    let password = refusing("28P01", "password authentication failed for user \"u\"").await;
    let full = refusing("53300", "sorry, too many clients already").await;
    let pooler = refusing("XX000", "Tenant or user not found").await;
    let stranger = Front::saying(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()).await;
    let plain = |front: &Front| format!("postgres://u:pw@{}/d?sslmode=disable", front.address);
    let good = scene.variables["TIDEGATE_DATABASE_URL"].clone();
    let (server, _) = good.rsplit_once('/').unwrap();
    for (url, words) in [
        ("postgres://u@no-such-host.invalid/d".to_owned(), ["no address (DNS)", "the host"]),
        (format!("postgres://u@{nobody}/d"), ["refused", "start Postgres"]),
        (format!("{good}?sslmode=require"), ["no TLS", "sslmode"]),
        (format!("{server}/no_such_database"), ["3D000", "database's name"]),
        (plain(&password), ["the password is wrong", "password of u"]),
        (plain(&full), ["too many clients", "max_connections"]),
        (plain(&pooler), ["Tenant or user not found", "u.PROJECT"]),
        (plain(&stranger), ["does not speak as Postgres", "TIDEGATE_DATABASE_URL"]),
    ] {
        let variables =
            [("TIDEGATE_DATABASE_URL", &*url), ("TIDEGATE_NOTIFY_DATABASE_URL", &*good)];
        let found = scene.examined(&[], &variables).await;
        found.are(&[("database-reachable", "failed"), ("no-notifications", "failed")]);
        found.says("database-reachable", &words);
        found.says("no-notifications", &["database-reachable"]);
    }
    let found = scene.examined(&[], &[("TIDEGATE_DATABASE_URL", "")]).await;
    assert_eq!(found.row("database-reachable")["status"], "warning");
    scene.stop().await;
}

/// Whoever sets a role's search path puts functions before those of Postgres: a cheap way to have a
/// server that is old, a standby, late, or full.
#[tokio::test]
async fn a_server_that_is_too_old_a_standby_late_or_full_is_named() {
    let mut scene = Scene::start().await;
    scene.database.run("create schema before; grant usage on schema before to public").await;
    for (function, check, status, words, consequence) in [
        (
            "current_setting(text) returns text language sql as $$ select '120004' $$",
            "database-version",
            "failed",
            ["need Postgres 13", "upgrade"],
            None,
        ),
        (
            "current_setting(text) returns text language sql as $$ select '140004' $$",
            "database-version",
            "warning",
            ["oldest version that is tested", "upgrade"],
            None,
        ),
        (
            "pg_is_in_recovery() returns boolean language sql as $$ select true $$",
            "database-primary",
            "failed",
            ["standby", "primary"],
            Some("no-notifications"),
        ),
        (
            "clock_timestamp() returns timestamptz language sql as
                $$ select pg_catalog.clock_timestamp() + interval '2 seconds' $$",
            "database-clock",
            "warning",
            ["ahead of ours", "NTP"],
            None,
        ),
        (
            "clock_timestamp() returns timestamptz language sql as
                $$ select pg_catalog.clock_timestamp() - interval '20 seconds' $$",
            "database-clock",
            "failed",
            ["behind ours", "NTP"],
            None,
        ),
        (
            "pg_notification_queue_usage() returns float8 language sql as $$ select 0.6 $$",
            "notify-queue",
            "failed",
            ["60 % full", "pg_stat_activity"],
            Some("no-notifications"),
        ),
    ] {
        let found = scene.found_with(function).await;
        let also = consequence.map(|affected| (affected, "failed"));
        found.are(&[(check, status)].into_iter().chain(also).collect::<Vec<_>>());
        found.says(check, &words);
    }
    scene.found().await.are(&[]);
    scene.stop().await;
}

#[tokio::test]
async fn rights_that_are_missing_or_too_many_are_named() {
    let mut scene = Scene::start().await;
    for (break_it, mend_it, check, status, words) in [
        (
            "revoke insert, update on tidegate.gateways from tidegate",
            "grant insert, update on tidegate.gateways to tidegate",
            "role-rights",
            "failed",
            [
                "lacks INSERT, UPDATE ON tidegate.gateways",
                "GRANT INSERT, UPDATE ON tidegate.gateways TO tidegate",
            ],
        ),
        (
            "revoke execute on function tidegate.event_endpoints from tidegate",
            "grant execute on function tidegate.event_endpoints to tidegate",
            "role-rights",
            "failed",
            ["EXECUTE ON FUNCTION tidegate.event_endpoints", "tidegate migrate"],
        ),
        (
            "grant insert on votes to tidegate",
            "revoke insert on votes from tidegate",
            "role-least-privilege",
            "warning",
            ["may write votes", "TIDEGATE_DATABASE_URL=postgres://tidegate"],
        ),
        (
            "alter table bids owner to tidegate",
            "alter table bids owner to postgres",
            "role-least-privilege",
            "warning",
            ["owns bids", "the role that `tidegate migrate` makes"],
        ),
        (
            "grant select on tidegate.broadcast_history to public",
            "revoke select on tidegate.broadcast_history from public",
            "browser-rights",
            "failed",
            ["public may use tidegate.broadcast_history", "tidegate.grant_access()"],
        ),
        (
            "grant execute on function manual_cache_invalidation to public",
            "revoke execute on function manual_cache_invalidation from public",
            "browser-rights",
            "failed",
            ["public may call public.manual_cache_invalidation", "tidegate migrate"],
        ),
    ] {
        scene.database.run(break_it).await;
        let found = scene.found().await;
        found.are(&[(check, status)]);
        found.says(check, &words);
        scene.database.run(mend_it).await;
    }
    let superuser = scene.database.url().to_owned();
    let found = scene.examined(&["--database-url", &superuser], &[]).await;
    found.are(&[("role-least-privilege", "warning")]);
    found.says("role-least-privilege", &["postgres is a superuser"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_history_that_nobody_shortens_and_a_log_of_failures_are_named() {
    let mut scene = Scene::start().await;
    scene
        .database
        .run(
            "insert into tidegate.broadcast_history (eid, endpoints, payload, at)
            values ('AB3028', '{}', '{}', now() - interval '3 hours')",
        )
        .await;
    let found = scene.examined(&[], &[("TIDEGATE_HISTORY__KEEP", "1h")]).await;
    found.are(&[("history-retention", "warning")]);
    found.says("history-retention", &["reaches back 3h", "history.keep is 1h", "forget_history"]);
    scene
        .database
        .run(
            "insert into tidegate.trigger_failures (table_name, operation, sqlstate, message)
            values ('votes', 'INSERT', '42P01', 'looking up the event')",
        )
        .await;
    let found = scene.found().await;
    found.are(&[("trigger-failures", "warning")]);
    found.says("trigger-failures", &["votes INSERT 42P01 looking up the event", "SELECT * FROM"]);
    scene.stop().await;
}

#[tokio::test]
async fn each_trigger_that_is_missing_or_disabled_is_named_by_its_table() {
    let mut scene = Scene::start().await;
    for (table, trigger, check) in [
        ("votes", "votes", "dry-run-votes"),
        ("bids", "bids", "dry-run-bids"),
        ("art_media", "media", "dry-run-media"),
        ("art", "art", "dry-run-art"),
        ("event_artists", "event_artists", "dry-run-event-artists"),
        ("round_contestants", "round_contestants", "dry-run-round-contestants"),
        ("artwork_offers", "artwork_offers", "dry-run-artwork-offers"),
        ("payment_processing", "payment_processing", "dry-run-payment-processing"),
        ("events", "events", "dry-run-events"),
    ] {
        let trigger = format!("cache_invalidate_{trigger}_trigger");
        scene.database.run(&format!("alter table {table} disable trigger {trigger}")).await;
        let found = scene.found().await;
        found.are(&[
            ("trigger-coverage", "failed"),
            (check, "failed"),
            ("no-notifications", "failed"),
        ]);
        found
            .says("trigger-coverage", &[&format!("{table} UPDATE"), "enable_cache_invalidation()"]);
        found.says(check, &["tells nobody", "tidegate migrate"]);
        scene.database.run("select enable_cache_invalidation()").await;
    }
    scene.database.run("drop trigger cache_invalidate_votes_trigger on votes").await;
    scene.found().await.says("trigger-coverage", &["votes INSERT, votes UPDATE, votes DELETE"]);
    scene.database.run("select enable_cache_invalidation()").await;
    scene.database.run("drop table artwork_offers").await;
    let found = scene.found().await;
    found.are(&[]);
    found.says("dry-run-artwork-offers", &["there is no table public.artwork_offers"]);
    scene.stop().await;
}

/// Whoever takes the gateway over may read the history, and not rewrite it.
#[tokio::test]
async fn a_role_that_may_change_the_history_is_named() {
    let mut scene = Scene::start().await;
    for right in
        ["update on tidegate.broadcast_history", "execute on function tidegate.forget_person"]
    {
        scene.database.run(&format!("grant {right} to tidegate")).await;
        let found = scene.found().await;
        found.are(&[("role-least-privilege", "warning")]);
        found.says("role-least-privilege", &["tidegate may change what the history says"]);
        scene.database.run(&format!("revoke {right} from tidegate")).await;
    }
    scene.found().await.are(&[]);
    scene.stop().await;
}

/// Rows of a partition are told as those of their table, and a trigger that is disabled on one
/// partition alone leaves its rows untold.
#[tokio::test]
async fn a_table_of_partitions_is_well_until_one_of_them_is_silent() {
    let mut scene = Scene::start().await;
    scene
        .database
        .run(
            "alter table votes rename to old_votes;
            create table votes (like old_votes including defaults) partition by list (round);
            create table votes_1 partition of votes for values in (1);
            create table votes_2 partition of votes for values in (2);
            drop table old_votes;
            select enable_cache_invalidation()",
        )
        .await;
    let found = scene.found().await;
    found.are(&[]);
    found.says("dry-run-votes", &["INSERT would tell vote_cast of AB3028"]);
    scene.database.run("alter table votes_2 disable trigger all").await;
    let found = scene.found().await;
    found.are(&[
        ("trigger-coverage", "failed"),
        ("dry-run-votes", "failed"),
        ("no-notifications", "failed"),
    ]);
    found.says("trigger-coverage", &["votes INSERT, votes UPDATE, votes DELETE"]);
    scene.stop().await;
}

#[tokio::test]
async fn functions_that_are_not_this_versions_or_not_safe_are_named() {
    let mut scene = Scene::start().await;
    let migrate = async |scene: &Scene| {
        db::migrate(&Secret::from(scene.database.url())).await.unwrap();
    };
    // What the text says is the same.
    scene
        .database
        .run(
            "create or replace function tidegate.stamp() returns jsonb language sql
            set search_path = '' as $$
                select jsonb_build_object('timestamp', extract(epoch from clock_timestamp()),
                    'cache_version', floor(extract(epoch from clock_timestamp()) * 1000)::bigint)
            $$",
        )
        .await;
    let found = scene.found().await;
    found.are(&[("function-drift", "failed")]);
    found.says("function-drift", &["tidegate.stamp: another text", "tidegate migrate"]);
    migrate(&scene).await;

    scene
        .database
        .run(
            "create table kept as select checksum from tidegate.migrations where version = 3;
            update tidegate.migrations set checksum = 'x' where version = 3",
        )
        .await;
    let found = scene.found().await;
    found.are(&[("function-drift", "failed")]);
    found.says("function-drift", &["[3]", "TIDEGATE_MIGRATE_DATABASE_URL"]);
    let restore = "update tidegate.migrations set checksum = (select checksum from kept)";
    scene.database.run(&format!("{restore} where version = 3")).await;

    for break_it in [
        "alter function tidegate.publish(text, text, jsonb) reset search_path",
        "alter function tidegate.forget_history(interval, integer) security invoker",
    ] {
        scene.database.run(break_it).await;
        let found = scene.found().await;
        found.are(&[("function-safety", "failed")]);
        found.says("function-safety", &["tidegate.", "tidegate migrate"]);
        migrate(&scene).await;
    }
    scene
        .database
        .run(
            "create function note() returns trigger language plpgsql security definer
                as $$ begin return null; end $$;
            create trigger note after insert on votes for each row execute function note()",
        )
        .await;
    let found = scene.found().await;
    found.are(&[("function-safety", "warning")]);
    found.says("function-safety", &["public.note", "SET search_path = ''"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_dry_run_needs_a_role_that_may_write_and_leaves_alone_what_no_rollback_undoes() {
    let mut scene = Scene::start().await;
    let found = scene.examined(&[], &[("TIDEGATE_MIGRATE_DATABASE_URL", "")]).await;
    found.are(&[]);
    for check in ["dry-run-votes", "dry-run-events"] {
        assert_eq!(found.row(check)["status"], "skipped");
        found.says(check, &["may not write", "set TIDEGATE_MIGRATE_DATABASE_URL"]);
    }
    scene
        .database
        .run(
            "create function tell() returns trigger language plpgsql set search_path = ''
                as $$ begin perform public.http_post('http://a.example'); return null; end $$;
            create trigger tell after insert or update on bids for each row execute function tell()",
        )
        .await;
    let found = scene.found().await;
    found.are(&[]);
    assert_eq!(found.row("dry-run-bids")["status"], "skipped");
    found.says("dry-run-bids", &["trigger tell", "no rollback undoes"]);

    // A message that names what belongs to another event.
    scene
        .database
        .run(
            "drop trigger tell on bids;
            create or replace function tidegate.bids_endpoint(p_eid text, p_round text, p_easel text)
            returns text language sql set search_path = '' as $$ select '/live/event/AB30281/bids' $$",
        )
        .await;
    let found = scene.found().await;
    found.are(&[
        ("function-drift", "failed"),
        ("dry-run-bids", "failed"),
        ("no-notifications", "failed"),
    ]);
    found.says("dry-run-bids", &["endpoints of another event"]);
    scene.stop().await;
}

/// Of rolled back writes, and of a few more, nobody should be told.
#[tokio::test]
async fn a_table_that_is_written_and_not_told_of_is_named() {
    let mut scene = Scene::start_with(|config| {
        config.metrics.database_interval = Duration::from_millis(50);
    })
    .await;
    let looked = "tidegate_database_last_look_timestamp_seconds";
    scene.server.metric_reaches(looked, 1.0).await;
    scene
        .database
        .run(
            "alter table event_artists disable trigger cache_invalidate_event_artists_trigger;
            insert into event_artists (event_id)
                select '00000000-0000-4000-8000-000000003028' from generate_series(1, 6);
            alter table event_artists enable trigger cache_invalidate_event_artists_trigger",
        )
        .await;
    scene
        .server
        .metric_reaches("tidegate_database_writes_total{table=\"event_artists\"}", 6.0)
        .await;
    let found = scene.found().await;
    found.are(&[("no-notifications", "warning")]);
    found.says("no-notifications", &["tells of event_artists (", "trigger-failures"]);
    scene.stop().await;
}

/// Five seconds are given to whoever accepts a connection and says nothing.
#[tokio::test]
async fn a_server_that_says_nothing_is_not_waited_for() {
    let scene = Scene::start().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://u@{}/d", silent.local_addr().unwrap());
    let found = scene.examined(&[], &[("TIDEGATE_NOTIFY_DATABASE_URL", &url)]).await;
    found.are(&[("listen-reachable", "failed"), ("no-notifications", "failed")]);
    found.says("listen-reachable", &["says nothing", "TIDEGATE_NOTIFY_DATABASE_URL"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_dry_run_fits_the_seeds_tables_and_goes_round_what_postgres_refuses() {
    let rows = "
        insert into events (id, eid) values ('00000000-0000-4000-8000-000000003028', 'AB3028');
        insert into art (event_id, round, easel)
            values ('00000000-0000-4000-8000-000000003028', 2, 'A');
    ";
    let mut scene = Scene::start_on(SEED, rows, |_| {}).await;
    let found = scene.found().await;
    found.are(&[]);
    found.says("dry-run-votes", &["INSERT would tell vote_cast of AB3028"]);
    found.says("dry-run-bids", &["INSERT would tell bid_placed", "/live/event/AB3028-2-A/bids"]);
    found.says("dry-run-media", &["INSERT would tell media_updated of AB3028"]);
    found.says("dry-run-artwork-offers", &["there is no table"]);

    scene.database.run("alter table votes add column \"paid by\" text not null").await;
    let found = scene.found().await;
    found.are(&[]);
    assert_eq!(found.row("dry-run-votes")["status"], "skipped");
    found.says("dry-run-votes", &["23502 paid by", "no row to update"]);
    scene.database.run("insert into votes (art_id, \"paid by\") select id, 'card' from art").await;
    let found = scene.found().await;
    found.are(&[]);
    found.says("dry-run-votes", &["UPDATE would tell vote_cast of AB3028"]);

    scene.database.run("begin; lock table bids in access exclusive mode").await;
    let found = scene.found().await;
    found.are(&[]);
    assert_eq!(found.row("dry-run-bids")["status"], "skipped");
    found.says("dry-run-bids", &["bids is locked by another session"]);
    scene.database.run("rollback").await;
    scene.stop().await;
}

/// Other users of the machine see arguments, and not what a command reads.
#[tokio::test]
async fn a_token_may_be_read_from_standard_input() {
    let token = token::with_claims(json!({ "role": "authenticated", "sub": "somebody" }));
    let variables = [("TIDEGATE_JWT_SECRET", SECRET)];
    let mut command = command(BINARY, &["doctor", "--token", "-"], &variables);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(format!("{token}\n").as_bytes()).await.unwrap();
    drop(input);
    let output = timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(out.contains("verified, role authenticated, of a person"), "{out}");
}

#[tokio::test]
async fn a_listen_that_is_deaf_is_named_with_its_likely_cause() {
    let mut scene = Scene::start().await;
    let nobody = format!("postgres://tidegate@{}/d", nowhere());
    let found = scene.examined(&[], &[("TIDEGATE_NOTIFY_DATABASE_URL", &nobody)]).await;
    found.are(&[("listen-reachable", "failed"), ("no-notifications", "failed")]);
    found.says("listen-reachable", &["refused", "TIDEGATE_NOTIFY_DATABASE_URL"]);

    let good = scene.variables["TIDEGATE_DATABASE_URL"].clone();
    // Another database of the same server.
    scene.database.run(&format!("create database {}_2", scene.database.name())).await;
    let other = format!("{good}_2");
    // A pooler: the session that listens is not the one that answers.
    let port = scene.database.port();
    let pooler = Front::start(SocketAddr::from(([127, 0, 0, 1], port)), as_it_is, |bytes| {
        if bytes.starts_with(b"A") { Passed::Swallowed } else { as_it_is(bytes) }
    });
    let pooler = pooler.await;
    let by_pooler = format!("postgres://tidegate@{}/{}", pooler.address, scene.database.name());
    for url in [&other, &by_pooler] {
        let found = scene.examined(&[], &[("TIDEGATE_NOTIFY_DATABASE_URL", url)]).await;
        found.are(&[("listen-arrives", "failed"), ("no-notifications", "failed")]);
        let words = ["within 2 s", "pooler in transaction mode", "another database", "port 5432"];
        found.says("listen-arrives", &words);
    }

    let open = Scratch::new(
        "[[topic]]\nname = \"cache\"\npattern = [\"cache_invalidate_{eid}\"]\nlisten = \"cache_invalidate_{eid}\"\n\
         event = \"cache_invalidation\"\nmerge = { window = \"3s\" }\nread = [{ role = [\"anon\"] }]\n\
         [[topic]]\nname = \"open\"\npattern = [\"open_{x:any}\"]\nlisten = \"open_{x:any}\"\nevent = \"e\"\n",
    );
    let found = scene.examined(&[], &[("TIDEGATE_CONFIG", open.path())]).await;
    found.are(&[("listen-allow-list", "warning")]);
    found.says("listen-allow-list", &["topic rule open", "{eid}"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_gateway_that_is_away_another_or_late_is_named() {
    let scene = Scene::start().await;
    let nobody = nowhere().to_string();
    let found = scene.examined(&[], &[("TIDEGATE_ADMIN_LISTEN", &nobody)]).await;
    found.are(&[("gateway-admin", "failed")]);
    found.says("gateway-admin", &["nobody answers", "TIDEGATE_ADMIN_LISTEN"]);

    let locked =
        Front::saying(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n".to_vec()).await;
    let address = locked.address.to_string();
    let found = scene.examined(&[], &[("TIDEGATE_ADMIN_LISTEN", &address)]).await;
    found.are(&[("gateway-admin", "failed")]);
    found.says("gateway-admin", &["does not take the admin_token", "TIDEGATE_ADMIN_TOKEN"]);

    let late = Front::start(scene.server.admin, as_it_is, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let Some((head, rest)) = text.split_once("date: ") else { return as_it_is(bytes) };
        let (_, rest) = rest.split_once("\r\n").unwrap();
        Passed::On(format!("{head}date: Sun, 06 Nov 1994 08:49:37 GMT\r\n{rest}").into())
    });
    let late = late.await;
    let address = late.address.to_string();
    let found = scene.examined(&[], &[("TIDEGATE_ADMIN_LISTEN", &address)]).await;
    found.are(&[("gateway-clock", "failed")]);
    found.says("gateway-clock", &["behind ours", "off the database's", "NTP"]);

    let other = TestServer::start();
    let (public, admin) = (other.public.to_string(), other.admin.to_string());
    let here = [("TIDEGATE_LISTEN", &*public), ("TIDEGATE_ADMIN_LISTEN", &*admin)];
    let found = scene.examined(&[], &here).await;
    found.are(&[
        ("gateway-link", "failed"),
        ("end-to-end", "failed"),
        ("no-notifications", "failed"),
    ]);
    found.says("gateway-link", &["without a database", "TIDEGATE_DATABASE_URL"]);
    found.says("end-to-end", &["never heard it", "one database"]);
    other.stop().await;

    let mut deaf = config();
    deaf.database_url = Secret::from(scene.database.url());
    deaf.notify_database_url = Secret::from(&*format!("postgres://u@{nobody}/d"));
    let deaf = TestServer::start_with(deaf);
    deaf.metric_reaches("tidegate_relay_reconnects_total{cause=\"connect\"}", 1.0).await;
    let (public, admin) = (deaf.public.to_string(), deaf.admin.to_string());
    let here = [("TIDEGATE_LISTEN", &*public), ("TIDEGATE_ADMIN_LISTEN", &*admin)];
    let found = scene.examined(&[], &here).await;
    found.are(&[
        ("gateway-link", "failed"),
        ("end-to-end", "failed"),
        ("no-notifications", "failed"),
    ]);
    found.says("gateway-link", &["the link is down", "connect ("]);
    deaf.stop().await;
    scene.stop().await;
}

#[tokio::test]
async fn keys_and_tokens_that_are_no_good_are_explained() {
    let scene = Scene::start().await;
    let anon = token::of_role("anon");
    let unusable = Scratch::new(r#"{"keys":[{"kid":"a","kty":"nope"}]}"#);
    let broken = Scratch::new("no keys");
    let keys =
        async |variables: &[(&'static str, &str)], expected: &[(&str, &str)], words: &[&str]| {
            let found = scene.examined(&["--token", &anon], variables).await;
            found.are(expected);
            found.says("jwt-keys", words);
        };
    let none = [("jwt-keys", "failed"), ("token", "failed")];
    keys(&[("TIDEGATE_JWT_SECRET", "")], &none, &["no key", "TIDEGATE_JWT_SECRET"]).await;
    let short = [("jwt-keys", "warning"), ("token", "failed")];
    keys(&[("TIDEGATE_JWT_SECRET", "short-secret")], &short, &["shorter than 32 bytes"]).await;
    let file = [("TIDEGATE_JWKS__FILE", unusable.path())];
    keys(&file, &[("jwt-keys", "warning")], &["1 keys are left out: type"]).await;
    let file = [("TIDEGATE_JWKS__FILE", broken.path())];
    keys(&file, &[("jwt-keys", "failed")], &["TIDEGATE_JWKS__FILE"]).await;
    let url = format!("https://{}/keys", nowhere());
    let url = [("TIDEGATE_JWKS__URL", &*url)];
    keys(&url, &[("jwt-keys", "failed")], &["jwks.url cannot be read", "TIDEGATE_JWKS__URL"]).await;

    let shut =
        [("token", "failed"), ("websocket-upgrade", "failed"), ("no-notifications", "failed")];
    for (token, words) in [
        (token::named("expired"), ["expired", "newer token"]),
        (
            token::forged(&json!({ "role": "anon", "exp": 4_000_000_000_u32 })),
            ["signature", "TIDEGATE_JWT_SECRET"],
        ),
        ("nonsense".to_owned(), ["not a JWT", "give a JWT"]),
    ] {
        let found = scene.examined(&["--token", &token], &[]).await;
        found.are(&shut);
        found.says("token", &words);
        found.says("websocket-upgrade", &["answers 40", "see `token`"]);
    }
    let now = tidegate::clock::unix_now();
    let future = token::with_claims(json!({ "role": "anon", "iat": now + 600 }));
    let found = scene.examined(&["--token", &future], &[]).await;
    found.are(&[("token", "warning")]);
    found.says("token", &["s in the future", "NTP"]);

    let stranger = token::of_role("stranger");
    let found = scene.examined(&["--token", &stranger], &[]).await;
    found.are(&[("token", "failed"), ("client-join", "failed"), ("no-notifications", "failed")]);
    found.says("token", &["role stranger", "read refused: no grant"]);
    found.says("client-join", &["Unauthorized", "config --explain"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_gateway_with_other_rules_is_found_out() {
    let scene = Scene::start_with(|config| config.topic[0].read.clear()).await;
    let found = scene.found().await;
    found.are(&[("client-join", "failed"), ("no-notifications", "failed")]);
    scene.stop().await;

    let open: tidegate::access::Rule = toml::from_str(
        r#"
        name = "open"
        pattern = ["tidegate_doctor_{eid}"]
        listen = "tidegate_doctor_{eid}"
        event = "e"
        read = [{ role = ["anon"] }]
        "#,
    )
    .unwrap();
    let scene = Scene::start_with(|config| config.topic.push(open)).await;
    let found = scene.found().await;
    found.are(&[("unlisted-channel", "failed")]);
    found.says("unlisted-channel", &["tidegate_doctor_unlisted", "listen-allow-list"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_front_that_does_not_pass_the_upgrade_is_told_apart_from_a_gateway_that_refuses() {
    let scene = Scene::start().await;
    let closed = [("websocket-upgrade", "failed"), ("no-notifications", "failed")];
    let answer = |status: &str| {
        format!("HTTP/1.1 {status}\r\nserver: nginx/1.22\r\ncontent-length: 0\r\n\r\n").into_bytes()
    };
    for (answer, words) in [
        (answer("200 OK"), ["by nginx/1.22 answers 200", "proxy_set_header Upgrade"]),
        (answer("404 Not Found"), ["answers 404", "/realtime/v1/"]),
        (answer("429 Too Many Requests"), ["answers 429", "limits.connections_max"]),
        (answer("502 Bad Gateway"), ["answers 502", "start the gateway"]),
        (answer("301 Moved Permanently"), ["answers 301", "https instead of http"]),
        (b"SSH-2.0-OpenSSH\r\n\r\n".to_vec(), ["not a WebSocket's answer", "upgrade"]),
        (Vec::new(), ["without an answer", "upgrade"]),
    ] {
        let front = Front::saying(answer).await;
        let found = scene.examined(&["--url", &front.url()], &[]).await;
        found.are(&closed);
        found.says("websocket-upgrade", &words);
    }
    let stripping = Front::start(
        scene.server.public,
        |bytes| {
            let text = String::from_utf8_lossy(bytes);
            Passed::On(text.replace("Upgrade: websocket\r\n", "").into())
        },
        as_it_is,
    );
    let stripping = stripping.await;
    let found = scene.examined(&["--url", &stripping.url()], &[]).await;
    found.are(&closed);
    found.says("websocket-upgrade", &["answers 400", "proxy_set_header Upgrade $http_upgrade"]);

    let found = scene.examined(&["--url", &format!("ws://{}", nowhere())], &[]).await;
    found.are(&closed);
    found.says("websocket-upgrade", &["refused", "--url"]);
    let found = scene.examined(&["--url", &format!("wss://{}", scene.server.public)], &[]).await;
    found.are(&closed);
    found.says("websocket-upgrade", &["no TLS", "--ca-file"]);
    scene.stop().await;
}

#[tokio::test]
async fn clients_whose_address_does_not_arrive_are_told_of() {
    let scene = Scene::start().await;
    let silent = Front::start(scene.server.public, as_it_is, as_it_is).await;
    let found = scene.examined(&["--url", &silent.url()], &[]).await;
    found.are(&[("client-address", "warning")]);
    found.says("client-address", &["does not name the client", "X-Forwarded-For"]);
    let naming = Front::naming(scene.server.public, as_it_is).await;
    let found = scene.examined(&["--url", &naming.url()], &[]).await;
    found.are(&[("client-address", "warning")]);
    found.says(
        "client-address",
        &["is not believed", "TIDEGATE_NETWORK__TRUSTED_PROXIES=127.0.0.1"],
    );
    let other = TestServer::start();
    let url = format!("ws://{}", other.public);
    let found = scene.examined(&["--url", &url], &[]).await;
    found.says("client-address", &["has not seen this client", "TIDEGATE_ADMIN_LISTEN"]);
    other.stop().await;
    scene.stop().await;
}

/// As in production: TLS ends in front of the gateway.
#[tokio::test]
async fn a_front_with_tls_is_passed_if_its_certificate_is_trusted() {
    let scene = Scene::start().await;
    let folder = Folder::new();
    folder.make_certificates();
    let (acceptor, to) = (folder.acceptor(), scene.server.public);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut front = JoinSet::new();
    front.spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let Ok(mut client) = acceptor.accept(client).await else { continue };
            let mut server = TcpStream::connect(to).await.unwrap();
            drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
        }
    });
    let url = format!("https://localhost:{port}");
    let found = scene.examined(&["--url", &url, "--ca-file", &folder.path("ca.crt")], &[]).await;
    // It names nobody.
    found.are(&[("client-address", "warning")]);
    found.says("websocket-upgrade", &["101 at wss://localhost"]);
    for authority in [&["--ca-file", &folder.path("other.crt")][..], &[]] {
        let found = scene.examined(&[&["--url", &url], authority].concat(), &[]).await;
        found.are(&[("websocket-upgrade", "failed"), ("no-notifications", "failed")]);
        found.says("websocket-upgrade", &["no TLS with wss://localhost", "--ca-file"]);
    }
    scene.stop().await;
}

fn trusting(config: &mut Config) {
    config.network.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
}

#[tokio::test]
async fn a_front_that_ends_idle_connections_or_swallows_frames_is_named() {
    let scene = Scene::start_with(trusting).await;
    let good = Front::naming(scene.server.public, as_it_is).await;
    let found = scene.examined(&["--url", &good.url(), "--slow", "50ms"], &[]).await;
    found.are(&[]);
    assert!(found.skipped().is_empty());
    found.says("client-address", &["comes from 203.0.113.7, by 127.0.0.1"]);
    found.says("idle-timeout", &["outlives 50ms"]);
    let found = scene.examined(&["--url", &good.url()], &[]).await;
    found.are(&[]);
    found.says("idle-timeout", &["pass --slow", "65 s"]);

    // After the last thing that it is told, a client is silent.
    let impatient = Front::naming(scene.server.public, |bytes| {
        let is_told = has(bytes, "manual_invalidation");
        if is_told { Passed::Last(bytes.to_vec()) } else { as_it_is(bytes) }
    });
    let impatient = impatient.await;
    let found = scene.examined(&["--url", &impatient.url(), "--slow", "20s"], &[]).await;
    found.are(&[("idle-timeout", "failed")]);
    found.says("idle-timeout", &["ended after", "proxy_read_timeout"]);

    let swallowing = Front::naming(scene.server.public, |bytes| {
        let is_told = has(bytes, "manual_invalidation");
        if is_told { Passed::Swallowed } else { as_it_is(bytes) }
    });
    let swallowing = swallowing.await;
    let found = scene.examined(&["--url", &swallowing.url()], &[]).await;
    found.are(&[("end-to-end", "failed"), ("no-notifications", "failed")]);
    found.says("end-to-end", &["though the gateway has sent it", "what is in front"]);
    scene.stop().await;
}

#[tokio::test]
async fn too_many_notifications_are_explained() {
    let mut scene = Scene::start().await;
    scene
        .database
        .run(
            "create function former() returns trigger language plpgsql set search_path = '' as $$
            begin
                perform pg_notify('cache_invalidate_AB3028', '{}');
                return null;
            end $$;
            create trigger former after insert on votes for each row execute function former()",
        )
        .await;
    let found = scene.found().await;
    found.are(&[("too-many-notifications", "warning")]);
    found.says("too-many-notifications", &["public.former on votes", "drop those triggers"]);
    scene.database.run("drop trigger former on votes").await;
    let plain = Scratch::new(
        "[[topic]]\nname = \"cache\"\npattern = [\"cache_invalidate_{eid}\"]\nlisten = \"cache_invalidate_{eid}\"\n\
         event = \"cache_invalidation\"\nread = [{ role = [\"anon\"] }]\n",
    );
    let found = scene.examined(&[], &[("TIDEGATE_CONFIG", plain.path())]).await;
    found.are(&[("too-many-notifications", "warning")]);
    found.says("too-many-notifications", &["rule cache", "merge = { window"]);

    let mut client = Client::connect(&scene.server, V2).await;
    client.join("cache_invalidate_AB3028").await;
    client.join("cache_invalidate:AB3028").await;
    let found = scene.found().await;
    found.are(&[("too-many-notifications", "warning")]);
    found.says("too-many-notifications", &["AB3028 has 2 channels on 1 sockets", "removeChannel"]);
    client.close().await;
    scene.stop().await;
}

#[tokio::test]
async fn data_that_does_not_refresh_is_explained() {
    let scene = Scene::start().await;
    let mute = "POST /events/AB3028/mute?for=10m HTTP/1.1";
    assert_eq!(TestServer::request(scene.server.admin, mute, "").await.0, 200);
    let found = scene.found().await;
    found.are(&[("not-refreshing", "warning")]);
    found.says("not-refreshing", &["muted: AB3028", "tidegate mute AB3028 --for 0s"]);
    let unmute = "POST /events/AB3028/mute?for=0s HTTP/1.1";
    assert_eq!(TestServer::request(scene.server.admin, unmute, "").await.0, 200);

    let quick = Scratch::new(
        "[[topic]]\nname = \"cache\"\npattern = [\"cache_invalidate_{eid}\"]\nlisten = \"cache_invalidate_{eid}\"\n\
         event = \"cache_invalidation\"\nmerge = { window = \"1s\" }\nread = [{ role = [\"anon\"] }]\n",
    );
    let found = scene.examined(&[], &[("TIDEGATE_CONFIG", quick.path())]).await;
    found.are(&[("not-refreshing", "warning")]);
    found.says("not-refreshing", &["shorter than pages wait", "window of 3s"]);
    scene.stop().await;
}

#[tokio::test]
async fn news_of_another_event_is_explained() {
    let mut scene = Scene::start().await;
    let mut client = Client::connect(&scene.server, V2).await;
    client.join("cache_invalidate_00000000-0000-4000-8000-000000003028").await;
    let found = scene.found().await;
    found.are(&[("wrong-event", "warning")]);
    found.says("wrong-event", &["by their UUID", "00000000-0000-4000-8000-000000003028"]);
    client.close().await;

    let mut client = Client::connect(&scene.server, V2).await;
    client.join("cache_invalidate_AB9999").await;
    let found = scene.found().await;
    found.are(&[("wrong-event", "warning")]);
    found.says("wrong-event", &["knows no event of: AB9999", "subscribe by the event's eid"]);
    client.close().await;
    scene
        .database
        .run(
            "insert into tidegate.broadcast_history (eid, type, endpoints, payload)
            values ('AB3028', 'vote_cast', '{/live/event/AB30281}', '{}')",
        )
        .await;
    let found = scene.found().await;
    found.are(&[("wrong-event", "failed")]);
    found.says("wrong-event", &["AB3028 names /live/event/AB30281", "tidegate migrate"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_database_without_the_migrations_is_told_what_to_run() {
    let mut scene = Scene::start().await;
    scene.database.run(include_str!("../../../migrations/uninstall.sql")).await;
    scene.database.run("grant connect on database postgres to tidegate").await;
    let name = scene.database.name().to_owned();
    scene.database.run(&format!("grant connect on database {name} to tidegate")).await;
    let found = scene.found().await;
    found.says("role-rights", &["does not exist", "tidegate migrate"]);
    found.says("trigger-coverage", &["votes INSERT", "tidegate migrate"]);
    found.says("function-drift", &["missing", "tidegate migrate"]);
    found.says("dry-run-votes", &["the migrations have not run"]);
    assert_eq!(found.code, Some(1));
    scene.stop().await;
}
