//! Whether a database has what this version's migrations make, seen as the gateway's own role: each
//! thing is broken in turn, and that thing alone is found.

use sqlx::{ConnectOptions as _, PgConnection, postgres::PgConnectOptions};
use tidegate::{
    db::{
        self,
        deployed::{Deployed, Drift, Function, Migrations, TRIGGERS},
    },
    demo::cluster::Cluster,
    secret::Secret,
};

use crate::support::postgres::Database;

const TABLES: &str = include_str!("../../../migrations/examples/production_tables.sql");
const SYSTEM: &str = include_str!("../../../migrations/broadcast_cache_invalidation_system.sql");

/// A migrated database with production's tables, and a session of the gateway's role.
async fn migrated() -> (Database, PgConnection) {
    let mut database = Database::create().await;
    database.run(TABLES).await;
    db::migrate(&database.url().into()).await.unwrap();
    let session = as_gateway(&database).await;
    (database, session)
}

async fn as_gateway(database: &Database) -> PgConnection {
    let url: PgConnectOptions = database.url().parse().unwrap();
    url.username("tidegate").connect().await.unwrap()
}

/// What is wrong: `votes INSERT`, `tidegate.publish: Body`, `migration 5`.
async fn wrong(session: &mut PgConnection) -> Vec<String> {
    let deployed = Deployed::read(session).await.unwrap();
    let triggers = deployed.missing_triggers();
    let mut wrong: Vec<_> =
        triggers.map(|(table, operation)| format!("{table} {}", operation.label())).collect();
    wrong.extend(deployed.drifted().map(|(name, drift)| format!("{name}: {drift:?}")));
    match &deployed.migrations {
        Migrations::Known { pending, is_newer } => {
            wrong.extend(pending.iter().map(|number| format!("migration {number}")));
            wrong.extend(is_newer.then(|| "newer".to_owned()));
        }
        Migrations::Unreadable => wrong.push("unreadable".to_owned()),
    }
    wrong
}

const NOTHING: [&str; 0] = [];

#[tokio::test]
async fn what_migrate_makes_is_all_there_for_the_gateways_own_role() {
    let (_database, mut session) = migrated().await;
    assert_eq!(wrong(&mut session).await, NOTHING);
    let deployed = Deployed::read(&mut session).await.unwrap();
    assert_eq!(deployed.tables.len(), TRIGGERS.len());
    assert_eq!(deployed.functions.len(), Function::all().len());
    assert_eq!(deployed.migrations.pending_count(), 0);
}

#[tokio::test]
async fn a_database_with_nothing_of_ours_lacks_everything_and_says_so() {
    // The roles of a cluster are those of all its databases, so this one has its own.
    let cluster = Cluster::start().await.unwrap();
    let mut database = Database::create_in(&cluster).await;
    database.run("create table votes (id int); create role tidegate login").await;
    let mut session = as_gateway(&database).await;
    let deployed = Deployed::read(&mut session).await.unwrap();
    let missing: Vec<_> = deployed
        .missing_triggers()
        .map(|(table, operation)| format!("{table} {}", operation.label()))
        .collect();
    assert_eq!(missing, ["votes INSERT", "votes UPDATE", "votes DELETE"]);
    assert_eq!(deployed.drifted().count(), Function::all().len());
    assert!(deployed.drifted().all(|(_, drift)| drift == Drift::Missing));
    assert!(deployed.migrations.pending_count() >= 7);
}

#[tokio::test]
async fn a_trigger_that_does_not_tell_of_every_row_is_missing() {
    let (mut database, mut session) = migrated().await;
    let all = ["votes INSERT", "votes UPDATE", "votes DELETE"];
    let make = |events: &str, function: &str| {
        format!(
            "drop trigger cache_invalidate_votes_trigger on votes;
            create trigger cache_invalidate_votes_trigger {events} execute function {function}"
        )
    };
    let ours = "tidegate.cache_invalidation()";
    let any = "after insert or update or delete on votes";
    for (fault, missing) in [
        ("drop trigger cache_invalidate_votes_trigger on votes".to_owned(), &all[..]),
        ("alter table votes disable trigger cache_invalidate_votes_trigger".to_owned(), &all),
        (
            "alter table votes enable replica trigger cache_invalidate_votes_trigger".to_owned(),
            &all,
        ),
        (
            format!(
                "create or replace function cache_invalidation() returns trigger language plpgsql
                as 'begin return null; end'; {}",
                make(&format!("{any} for each row"), "public.cache_invalidation()")
            ),
            &all,
        ),
        (make("after insert or delete on votes for each row", ours), &all[1..2]),
        (make("after update of round on votes for each row", ours), &all),
        (make("after insert on votes for each row when (new.round > 1)", ours), &all),
        (make("before insert or update or delete on votes for each row", ours), &all),
        (make(&format!("{any} for each statement"), ours), &all),
    ] {
        database.run(&fault).await;
        assert_eq!(wrong(&mut session).await, missing, "{fault}");
        database.run(SYSTEM).await;
        assert_eq!(wrong(&mut session).await, NOTHING, "{fault}");
    }
    // One that always fires, under whatever name, tells of everything.
    database
        .run(
            "alter table votes enable always trigger cache_invalidate_votes_trigger;
            alter trigger cache_invalidate_votes_trigger on votes rename to another",
        )
        .await;
    assert_eq!(wrong(&mut session).await, NOTHING);
}

#[tokio::test]
async fn a_table_that_does_not_exist_lacks_nothing() {
    let (mut database, mut session) = migrated().await;
    database.run("drop table artwork_offers").await;
    assert_eq!(wrong(&mut session).await, NOTHING);
    database.run("create table artwork_offers (id int)").await;
    let missing = ["artwork_offers INSERT", "artwork_offers UPDATE", "artwork_offers DELETE"];
    assert_eq!(wrong(&mut session).await, missing);
}

#[tokio::test]
async fn a_partition_without_its_trigger_leaves_its_table_untold() {
    let (mut database, mut session) = migrated().await;
    database
        .run(
            "drop table votes;
            create table votes (id uuid, round integer) partition by list (round);
            create table votes_1 partition of votes for values in (1);
            create table votes_2 partition of votes for values in (2) partition by range (id);
            create table votes_2_all partition of votes_2 default;
            select public.enable_cache_invalidation()",
        )
        .await;
    assert_eq!(wrong(&mut session).await, NOTHING);
    let all = ["votes INSERT", "votes UPDATE", "votes DELETE"];
    for partition in ["votes_1", "votes_2_all"] {
        let trigger = |what| format!("alter table {partition} {what} trigger all");
        database.run(&trigger("disable")).await;
        assert_eq!(wrong(&mut session).await, all, "{partition}");
        database.run(&trigger("enable")).await;
        assert_eq!(wrong(&mut session).await, NOTHING, "{partition}");
    }
}

#[tokio::test]
async fn a_function_that_is_not_this_versions_is_named_with_what_differs() {
    let (mut database, mut session) = migrated().await;
    for (fault, drift) in [
        (
            "create or replace function tidegate.publish(p_table text, p_operation text, p_message jsonb)
            returns void language plpgsql set search_path = '' as 'begin end'",
            "tidegate.publish: Body",
        ),
        (
            "alter function public.manual_cache_invalidation(text, text) reset search_path",
            "public.manual_cache_invalidation: Settings",
        ),
        (
            "alter function tidegate.cache_invalidation() reset all",
            "tidegate.cache_invalidation: Settings",
        ),
        (
            "alter function tidegate.cache_invalidation() security invoker",
            "tidegate.cache_invalidation: Security",
        ),
        ("alter function tidegate.fit(text, text, jsonb) security definer", "tidegate.fit: Security"),
        ("drop function tidegate.stamp()", "tidegate.stamp: Missing"),
        (
            "drop function tidegate.stamp();
            create function tidegate.stamp(text) returns jsonb language sql as 'select null::jsonb'",
            "tidegate.stamp: Missing",
        ),
    ] {
        database.run(fault).await;
        assert_eq!(wrong(&mut session).await, [drift], "{fault}");
        database.run(SYSTEM).await;
        // What was altered and not replaced keeps its settings until it is replaced.
        assert_eq!(wrong(&mut session).await, NOTHING, "{fault}");
    }
    // The files of another system's checkout.
    database.run(&SYSTEM.replace('\n', "\r\n")).await;
    assert_eq!(wrong(&mut session).await, NOTHING);
}

#[tokio::test]
async fn a_migration_that_is_not_there_or_is_another_one_is_pending() {
    let (mut database, mut session) = migrated().await;
    let keep = "create table kept as select * from tidegate.migrations";
    let restore =
        "truncate tidegate.migrations; insert into tidegate.migrations select * from kept";
    database.run(keep).await;
    for (fault, found) in [
        ("delete from tidegate.migrations where version = 5", &["migration 5"][..]),
        ("update tidegate.migrations set success = false where version = 6", &["migration 6"]),
        ("update tidegate.migrations set checksum = 'x' where version = 2", &["migration 2"]),
        (
            "update tidegate.migrations set version = 9999 where version = 1",
            &["migration 1", "newer"],
        ),
        ("revoke all on tidegate.migrations from tidegate", &["unreadable"]),
        ("revoke usage on schema tidegate from tidegate", &["unreadable"]),
    ] {
        database.run(fault).await;
        assert_eq!(wrong(&mut session).await, found, "{fault}");
        database.run(restore).await;
        database.run(SYSTEM).await;
        assert_eq!(wrong(&mut session).await, NOTHING, "{fault}");
    }
    database.run("drop table tidegate.migrations").await;
    let all: Vec<_> = (1..=7).map(|number| format!("migration {number}")).collect();
    assert_eq!(wrong(&mut session).await, all);
}

/// As when all machines of a deployment migrate at their start.
#[tokio::test]
async fn many_may_migrate_one_database_at_once() {
    let (mut database, mut session) = migrated().await;
    let url = Secret::from(database.url());
    for round in 0..5 {
        if round == 2 {
            // From the start, too; the roles of the cluster are there.
            db::uninstall(&url).await.unwrap();
        }
        let migrate = || async { db::migrate(&url).await };
        let results = tokio::join!(migrate(), migrate(), migrate(), migrate(), migrate());
        for result in <[_; 5]>::from(results) {
            result.unwrap();
        }
        assert_eq!(wrong(&mut session).await, NOTHING);
        // What every one of them changes.
        database.run("revoke select on tidegate.broadcast_history from tidegate").await;
    }
}
