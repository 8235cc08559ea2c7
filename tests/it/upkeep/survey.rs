//! What the metrics say of the database, looked at as the gateway's own role: each thing is broken
//! in turn, and exactly its series moves and goes back; writes and what is told of them are counted
//! once, whatever happens to the server.

use std::{collections::BTreeMap, fs, time::Duration};

use nix::sys::signal::Signal;
use sqlx::{Connection as _, Executor as _, PgConnection};
use tidegate::{db, secret::Secret, server::Config};
use tokio::time::timeout;

use crate::support::{
    process::Serving,
    server::{DEADLINE, TestServer, config},
    system::{ART, Database, EVENT, OTHER_EVENT, PERSON, Shape, bid, system_file},
};

const LAST_LOOK: &str = "tidegate_database_last_look_timestamp_seconds";
const LOOK_FAILURES: &str = "tidegate_database_look_failures_total";
const OLDEST: &str = "tidegate_database_history_oldest_timestamp_seconds";
const FAILURES: &str = "tidegate_database_trigger_failures_total";

fn trigger(table: &str, operation: &str) -> String {
    format!("tidegate_database_trigger_present{{operation=\"{operation}\",table=\"{table}\"}}")
}

fn drift(function: &str) -> String {
    format!("tidegate_database_function_drift{{function=\"{function}\"}}")
}

fn writes(table: &str) -> String {
    format!("tidegate_database_writes_total{{table=\"{table}\"}}")
}

fn history(table: &str) -> String {
    format!("tidegate_database_history_rows_total{{table=\"{table}\"}}")
}

/// A gateway that looks at a migrated database all the time, as its least-privileged role.
struct Scene {
    database: Database,
    server: TestServer,
}

fn settings(database: &Database) -> Config {
    let url = database.cluster.url(database.shape.database());
    let mut config = config();
    config.database_url = Secret::from(&*url.replace("postgres@", "tidegate@"));
    config.metrics.database_interval = Duration::from_millis(200);
    config
}

async fn migrated() -> Database {
    let database = Database::start(Shape::Production).await;
    let url = database.cluster.url(database.shape.database());
    db::migrate(&Secret::from(&*url)).await.unwrap();
    database
}

impl Scene {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let database = migrated().await;
        let mut config = settings(&database);
        change(&mut config);
        let server = TestServer::start_with(config);
        let scene = Self { database, server };
        scene.is_looked_at().await;
        scene
    }

    /// Waits for a look that began after this was called.
    async fn is_looked_at(&self) {
        // One may be under way.
        for _ in 0..2 {
            let before = self.server.metric(LAST_LOOK).await;
            let later = async { while self.server.metric(LAST_LOOK).await <= before {} };
            assert!(timeout(DEADLINE, later).await.is_ok(), "the database is looked at");
        }
    }

    async fn run(&self, sql: &str) -> String {
        // psql's session reports what it has written when it ends, a moment after psql itself.
        self.database.run(sql).await
    }

    /// What `/metrics` says of these, and they begin with `tidegate_database_`.
    async fn series(&self, names: &[&str]) -> BTreeMap<String, f64> {
        let (_, text) = TestServer::request(self.server.admin, "GET /metrics HTTP/1.1", "").await;
        text.lines()
            .filter_map(|line| {
                let (series, value) = line.rsplit_once(' ')?;
                let name = series.strip_prefix("tidegate_database_")?.split('{').next()?;
                names.contains(&name).then(|| (series.to_owned(), value.parse().unwrap()))
            })
            .collect()
    }

    async fn deployed(&self) -> BTreeMap<String, f64> {
        self.series(&["trigger_present", "function_drift", "migrations_pending"]).await
    }

    /// Waits until exactly these series have other values than `right`.
    async fn differs(&self, right: &BTreeMap<String, f64>, expected: &[String], why: &str) {
        let mut found = Vec::new();
        let differs = async {
            loop {
                let now = self.deployed().await;
                assert_eq!(now.len(), right.len());
                found = now.into_iter().filter(|(name, value)| right[name] != *value).collect();
                if found.iter().map(|(name, _)| name).eq(expected) {
                    return;
                }
            }
        };
        let is_so = timeout(DEADLINE, differs).await.is_ok();
        assert!(is_so, "{why}: {found:?} and not {expected:?}");
    }

    /// Waits until so many writes and messages of a table have been counted, and nothing more.
    async fn has_counted(&self, table: &str, write_count: u32, told: u32) {
        self.server.metric_reaches(&writes(table), write_count.into()).await;
        self.server.metric_reaches(&history(table), told.into()).await;
        self.is_looked_at().await;
        assert_eq!(self.server.metric(&writes(table)).await, f64::from(write_count), "{table}");
        assert_eq!(self.server.metric(&history(table)).await, f64::from(told), "{table}");
    }
}

#[tokio::test]
async fn what_is_broken_moves_its_own_series_and_they_go_back() {
    let scene = Scene::start().await;
    let right = scene.deployed().await;
    for (name, value) in &right {
        let expected = if name.contains("trigger_present") { 1.0 } else { 0.0 };
        assert_eq!(*value, expected, "{name}");
    }
    let pending = "tidegate_database_migrations_pending".to_owned();
    let votes = ["DELETE", "INSERT", "UPDATE"].map(|operation| trigger("votes", operation));
    for (fault, repair, expected) in [
        ("drop trigger cache_invalidate_votes_trigger on votes", "", votes.to_vec()),
        (
            "alter table events disable trigger cache_invalidate_events_trigger",
            "",
            vec![trigger("events", "UPDATE")],
        ),
        (
            "create or replace function tidegate.stamp() returns jsonb language sql
            set search_path = '' as 'select null::jsonb'",
            "",
            vec![drift("tidegate.stamp")],
        ),
        (
            "alter function public.manual_cache_invalidation(text, text) reset search_path",
            "",
            vec![drift("public.manual_cache_invalidation")],
        ),
        ("drop function tidegate.publish(text, text, jsonb)", "", vec![drift("tidegate.publish")]),
        (
            "create table kept as select * from tidegate.migrations where version = 5;
            delete from tidegate.migrations where version = 5",
            "insert into tidegate.migrations select * from kept",
            vec![pending],
        ),
    ] {
        scene.run(fault).await;
        scene.differs(&right, &expected, fault).await;
        scene.run(repair).await;
        let name = scene.database.shape.database();
        scene.database.cluster.psql_file(name, &system_file()).await.unwrap();
        scene.differs(&right, &[], fault).await;
    }
    scene.server.stop().await;
}

#[tokio::test]
async fn a_table_that_is_dropped_takes_its_series_along() {
    let scene = Scene::start().await;
    let right = scene.deployed().await;
    scene.run("drop table artwork_offers").await;
    let gone = async { while scene.deployed().await.len() != right.len() - 3 {} };
    assert!(timeout(DEADLINE, gone).await.is_ok());
    let left = scene.deployed().await;
    assert!(left.keys().all(|series| !series.contains("artwork_offers")), "{left:?}");
    scene.server.stop().await;
}

#[tokio::test]
async fn writes_that_nobody_is_told_of_are_seen_in_the_difference() {
    let scene = Scene::start().await;
    // Nothing of what was there before.
    let counted = scene.series(&["writes_total", "history_rows_total"]).await;
    assert_eq!(counted.len(), 9 + 11);
    assert!(counted.values().all(|count| *count == 0.0), "{counted:?}");
    scene.run(&format!("{} {}", scene.database.shape.vote(), bid(ART, 5))).await;
    scene.has_counted("votes", 1, 1).await;
    scene.has_counted("bids", 1, 1).await;

    scene.run(&format!("alter table bids disable trigger user; {}", bid(ART, 6))).await;
    scene.has_counted("bids", 2, 1).await;
    // Of what a transaction has undone nobody is told, and Postgres has counted it.
    scene.run(&format!("begin; delete from votes; {} rollback", bid(ART, 7))).await;
    scene.has_counted("votes", 2, 1).await;
    scene.has_counted("bids", 3, 1).await;
    // No trigger tells of these, so they are none of the writes that ought to be told.
    scene.run("insert into events (eid) values ('AB1'); delete from bids").await;
    scene.run("alter table bids enable trigger user").await;
    scene.run(&bid(ART, 8)).await;
    scene.has_counted("bids", 4, 2).await;
    scene.has_counted("events", 0, 0).await;

    // Of many rows for one event a transaction tells 50, and then of all.
    let many = format!(
        "insert into bids (art_id, amount) select '{ART}', n from generate_series(1, 80) n"
    );
    scene.run(&many).await;
    scene.has_counted("bids", 84, 53).await;
    scene.run("select manual_cache_invalidation('AB3028')").await;
    scene.server.metric_reaches(&history("manual"), 1.0).await;
    scene
        .run(
            "insert into tidegate.broadcast_history (eid, table_name, endpoints, payload)
            values ('AB3028', 'elsewhere', '{}', '{}'), ('AB3028', null, '{}', '{}')",
        )
        .await;
    scene.server.metric_reaches(&history("other"), 2.0).await;
    scene.server.stop().await;
}

#[tokio::test]
async fn payments_under_way_and_rows_without_an_event_are_writes_without_a_message() {
    let scene = Scene::start().await;
    let pay = |status| format!("update payment_processing set status = '{status}';");
    scene.run(&format!("insert into payment_processing (art_id) values ('{ART}')")).await;
    scene.run(&format!("{} {} {}", pay("sent"), pay("completed"), pay("completed"))).await;
    scene.has_counted("payment_processing", 3, 1).await;
    scene.run("insert into art (round) values (1)").await;
    scene.has_counted("art", 1, 0).await;
    // An update that changes nothing is told.
    scene.run(&format!("update events set name = name where id = '{EVENT}'")).await;
    scene.has_counted("events", 1, 1).await;
    scene.server.stop().await;
}

#[tokio::test]
async fn a_message_is_counted_once_in_whatever_order_transactions_commit() {
    let scene = Scene::start().await;
    let mut first = scene.database.connect().await;
    let begin = format!("begin; {}", bid(ART, 1));
    first.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(begin))).await.unwrap();
    scene.run(&bid(ART, 2)).await;
    scene.server.metric_reaches(&history("bids"), 1.0).await;
    scene.is_looked_at().await;
    assert_eq!(scene.server.metric(&history("bids")).await, 1.0);
    first.execute("commit").await.unwrap();
    first.close().await.unwrap();
    scene.has_counted("bids", 2, 2).await;
    scene.server.stop().await;
}

#[tokio::test]
async fn the_writes_to_partitions_are_their_tables_and_are_told_as_such() {
    let scene = Scene::start().await;
    scene
        .run(
            "drop table bids;
            create table bids (id uuid default gen_random_uuid(), art_id uuid, person_id uuid, amount numeric)
                partition by range (amount);
            create table bids_low partition of bids for values from (0) to (100);
            create table bids_high (like bids);
            insert into bids_high select gen_random_uuid(), null, null, 150 from generate_series(1, 500);
            select enable_cache_invalidation()",
        )
        .await;
    scene.is_looked_at().await;
    scene.run(&bid(ART, 5)).await;
    scene.has_counted("bids", 1, 1).await;
    let told = scene.database.history("type || ' ' || table_name").await;
    assert_eq!(told.lines().last(), Some("bid_placed bids"));
    // What had been written to it before is no write of this table's.
    scene.run("alter table bids attach partition bids_high for values from (100) to (200)").await;
    scene.is_looked_at().await;
    scene.run(&bid(ART, 160)).await;
    scene.has_counted("bids", 2, 2).await;
    scene.run("alter table bids detach partition bids_high").await;
    scene.is_looked_at().await;
    scene.run(&bid(ART, 6)).await;
    scene.has_counted("bids", 3, 3).await;
    scene.server.stop().await;
}

#[tokio::test]
async fn no_crash_reset_or_exchange_of_the_database_moves_a_counter() {
    let scene = Scene::start_with(|config| {
        config.relay.connect_timeout = Duration::from_secs(1);
    })
    .await;
    let tenfold = format!(
        "insert into bids (art_id, amount) select '{ART}', n from generate_series(1, 10) n"
    );
    scene.run(&tenfold).await;
    scene.has_counted("bids", 10, 10).await;

    scene.run("select pg_stat_reset_single_table_counters('bids'::regclass)").await;
    scene.is_looked_at().await;
    scene.run(&bid(ART, 1)).await;
    scene.has_counted("bids", 11, 11).await;
    scene.run("select pg_stat_reset()").await;
    scene.is_looked_at().await;
    scene.run(&bid(ART, 1)).await;
    scene.has_counted("bids", 12, 12).await;

    let failed = scene.server.metric(LOOK_FAILURES).await;
    scene.database.cluster.stop_immediate().await.unwrap();
    scene.server.metric_reaches(LOOK_FAILURES, failed + 1.0).await;
    let looked = scene.server.metric(LAST_LOOK).await;
    scene.server.metric_reaches(LOOK_FAILURES, failed + 2.0).await;
    assert_eq!(scene.server.metric(LAST_LOOK).await, looked);
    scene.database.cluster.restart().await.unwrap();
    scene.is_looked_at().await;
    scene.run(&bid(ART, 1)).await;
    scene.has_counted("bids", 13, 13).await;

    // A copy has the same tables, and has counted on its own.
    let (cluster, name) = (&scene.database.cluster, scene.database.shape.database());
    let close = format!(
        "alter database {name} allow_connections false;
        select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    );
    cluster.psql("postgres", &close).await.unwrap();
    cluster.psql("postgres", &format!("create database copy template {name}")).await.unwrap();
    for _ in 0..3 {
        cluster.psql("copy", &tenfold).await.unwrap();
    }
    let exchange =
        format!("alter database {name} rename to former; alter database copy rename to {name}");
    cluster.psql("postgres", &exchange).await.unwrap();
    scene.is_looked_at().await;
    scene.run(&bid(ART, 1)).await;
    scene.has_counted("bids", 14, 14).await;

    let other =
        "alter table bids rename to old_bids; create table bids (like old_bids including all);
        insert into bids (art_id) select null from generate_series(1, 300);";
    scene.run(&format!("{other} select enable_cache_invalidation()")).await;
    scene.is_looked_at().await;
    scene.run(&bid(ART, 1)).await;
    scene.has_counted("bids", 15, 15).await;
    scene.server.stop().await;
}

#[tokio::test]
async fn what_triggers_could_not_do_and_the_age_of_the_history_are_shown() {
    let scene = Scene::start().await;
    scene.run(&format!("update events set name = 'a' where id = '{OTHER_EVENT}'")).await;
    scene.has_counted("events", 1, 1).await;
    let oldest = "select extract(epoch from min(at)) from tidegate.broadcast_history";
    let oldest: f64 = scene.run(oldest).await.parse().unwrap();
    assert!((scene.server.metric(OLDEST).await - oldest).abs() < 0.001);
    assert_eq!(scene.server.metric(FAILURES).await, 0.0);
    let nowhere = format!("insert into votes (event_id, person_id) values (null, '{PERSON}')");
    scene.run(&nowhere).await;
    scene.run("insert into bids (art_id) values (null)").await;
    let lost = "alter table bids drop constraint bids_art_id_fkey;
        insert into bids (art_id) select gen_random_uuid() from generate_series(1, 2)";
    scene.run(lost).await;
    scene.server.metric_reaches(FAILURES, 2.0).await;
    scene.run("truncate tidegate.broadcast_history, tidegate.trigger_failures").await;
    scene.server.metric_falls_to(OLDEST, 0.0).await;
    assert_eq!(scene.server.metric(FAILURES).await, 2.0);
    scene.server.stop().await;
}

#[tokio::test]
async fn a_locked_history_fails_the_look_in_its_time_and_loses_no_count() {
    let scene = Scene::start_with(|config| {
        config.relay.connect_timeout = Duration::from_secs(1);
    })
    .await;
    let failed = scene.server.metric(LOOK_FAILURES).await;
    let mut owner = scene.database.connect().await;
    lock(&mut owner).await;
    scene.server.metric_reaches(LOOK_FAILURES, failed + 2.0).await;
    // The trigger waits 50 ms and tells without the history.
    scene.run(&bid(ART, 1)).await;
    owner.execute("rollback").await.unwrap();
    scene.has_counted("bids", 1, 0).await;
    scene.server.metric_reaches(FAILURES, 1.0).await;
    scene.server.stop().await;
}

async fn lock(session: &mut PgConnection) {
    session.execute("begin").await.unwrap();
    let lock = "lock table tidegate.broadcast_history in access exclusive mode";
    session.execute(lock).await.unwrap();
}

#[tokio::test]
async fn the_queue_of_notifications_and_the_pool_are_shown() {
    let scene = Scene::start().await;
    assert_eq!(scene.server.metric("tidegate_database_pool_max").await, 3.0);
    let sessions = async || scene.series(&["pool_connections"]).await.into_values().sum::<f64>();
    assert!((1.0..=3.0).contains(&sessions().await));
    // Another function answers in its place: filling the real queue takes gigabytes.
    let queue = "tidegate_database_notify_queue_ratio";
    scene.server.metric_falls_to(queue, 0.1).await;
    scene.run("alter function pg_catalog.pg_notification_queue_usage() rename to real_usage").await;
    scene
        .run(
            "create function pg_catalog.pg_notification_queue_usage() returns double precision
            language sql as 'select 0.75::double precision'",
        )
        .await;
    scene.server.metric_reaches(queue, 0.75).await;
    scene.server.stop().await;

    let server = TestServer::start();
    assert_eq!(server.metric("tidegate_database_pool_max").await, 0.0);
    for state in ["idle", "used"] {
        let series = format!("tidegate_database_pool_connections{{state=\"{state}\"}}");
        assert_eq!(server.metric(&series).await, 0.0);
    }
    assert_eq!(server.metric(LAST_LOOK).await, 0.0);
    server.stop().await;
}

#[tokio::test]
async fn a_database_with_nothing_of_ours_is_looked_at_all_the_same() {
    let database = migrated().await;
    database.run("drop schema tidegate cascade").await;
    let server = TestServer::start_with(settings(&database));
    server.metric_reaches(LAST_LOOK, 1.0).await;
    assert_eq!(server.metric(LOOK_FAILURES).await, 0.0);
    assert_eq!(server.metric(&trigger("art", "INSERT")).await, 0.0);
    assert_eq!(server.metric(&drift("tidegate.cache_invalidation")).await, 1.0);
    server.metric_reaches("tidegate_database_migrations_pending", 6.0).await;
    database.run("insert into art (round) select 1 from generate_series(1, 5)").await;
    server.metric_reaches(&writes("art"), 5.0).await;
    server.stop().await;
}

/// When the database was looked at last, as `/metrics` shows it.
fn last_look(metrics: &str) -> String {
    let value = metrics.lines().find_map(|line| line.strip_prefix(LAST_LOOK));
    value.expect("there is such a series").to_owned()
}

#[tokio::test]
async fn the_log_says_at_start_what_is_missing_and_again_when_that_changes() {
    let database = migrated().await;
    database.run("drop trigger cache_invalidate_votes_trigger on votes").await;
    database.run("alter function tidegate.stamp() reset search_path").await;
    database.run("alter table tidegate.migrations rename to hidden").await;
    let url = database.cluster.url(database.shape.database()).replace("postgres@", "tidegate@");
    let variables =
        [("TIDEGATE_DATABASE_URL", &*url), ("TIDEGATE_METRICS__DATABASE_INTERVAL", "1s")];
    let serving = Serving::start(&variables).await;
    let metrics = async || TestServer::request(serving.admin, "GET /metrics HTTP/1.1", "").await.1;
    let says = async |series: &str| {
        let series = format!("{series}\n");
        let said = async { while !metrics().await.contains(&series) {} };
        assert!(timeout(DEADLINE, said).await.is_ok(), "{series}");
        // What has been said is not said again by the looks that follow.
        for _ in 0..2 {
            let look = last_look(&metrics().await);
            let next = async { while last_look(&metrics().await) == look {} };
            assert!(timeout(DEADLINE, next).await.is_ok(), "{series}");
        }
    };
    says(&format!("{} 0", trigger("votes", "INSERT"))).await;
    database.run("alter table tidegate.hidden rename to migrations").await;
    says("tidegate_database_migrations_pending 0").await;
    // At once, so that no look sees the half of it.
    let system = fs::read_to_string(system_file()).unwrap();
    database.run(&format!("begin; {system} commit;")).await;
    says(&format!("{} 1", trigger("votes", "INSERT"))).await;
    let said = serving.end(Signal::SIGTERM).await;
    let found: Vec<_> = said
        .err
        .lines()
        .filter_map(|line| line.split_once("tidegate::upkeep::survey: "))
        .map(|(head, text)| (head.contains("WARN"), text))
        .collect();
    let missing = "missing in the database, or not this version's: run `tidegate migrate`";
    let triggers = "triggers=\"votes INSERT, votes UPDATE, votes DELETE\"";
    let functions =
        "functions=\"tidegate.stamp (its search_path is not pinned, or another setting differs)\"";
    let expected = [
        (true, format!("{missing} {triggers} {functions} migrations=\"1, 2, 3, 4, 5, 6, 7\"")),
        (true, format!("{missing} {triggers} {functions} migrations=\"\"")),
        (false, "the database has every trigger, function and migration tables=9".to_owned()),
    ];
    let found: Vec<_> =
        found.into_iter().map(|(is_warning, text)| (is_warning, text.to_owned())).collect();
    assert_eq!(found, expected, "{}", said.err);
}
