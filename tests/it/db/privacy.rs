//! Who may read what the database keeps of persons, what operators are shown of it, and how a
//! person is forgotten.

use serde_json::{Value, json};
use tidegate::{db, demo::cluster::Cluster, protocol::serializer::Serializer::V2, secret::Secret};
use tokio::time::timeout;

use crate::support::{
    client::Client,
    server::{DEADLINE, TestServer, config},
    system::{Database, EVENT, OTHER_EVENT, PERSON, ROUND, Shape},
};

const OTHER_PERSON: &str = "00000000-0000-4000-8000-0000000000b2";
const ARTIST: &str = "a0b1c2d3-e4f5-4000-8000-00000000abcd";

/// A migrated database whose owner is no superuser, with the roles that Supabase has and what it
/// gives them by default.
async fn of_a_project() -> Database {
    let database = Database::start(Shape::Production).await;
    database
        .run(
            "drop schema tidegate cascade;
            create role anon; create role authenticated; create role service_role bypassrls;
            create role project login createrole;
            grant create on database production to project;
            grant all on schema public to project;
            do $$
            declare
                v_table regclass;
                v_function regprocedure;
            begin
                for v_table in
                    select oid from pg_class
                    where relnamespace = 'public'::regnamespace and relkind = 'r'
                loop
                    execute format('alter table %s owner to project', v_table);
                end loop;
                for v_function in select oid from pg_proc where pronamespace = 'public'::regnamespace
                loop
                    execute format('drop function %s', v_function);
                end loop;
            end
            $$;
            alter default privileges for role project
                grant all on tables to anon, authenticated, service_role;
            alter default privileges for role project
                grant all on functions to anon, authenticated, service_role;",
        )
        .await;
    let url = database.cluster.url("production").replace("postgres@", "project@");
    db::migrate(&Secret::from(&*url)).await.unwrap();
    database
}

/// What a role gets, or the SQLSTATE with which it is refused.
async fn as_role(cluster: &Cluster, role: &str, sql: &str) -> Result<String, String> {
    let sql = format!("\\set VERBOSITY sqlstate\nset role {role}; {sql}");
    cluster.psql("production", &sql).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn only_the_owner_and_the_gateway_read_the_history_and_only_the_owner_forgets() {
    let database = of_a_project().await;
    let cluster = &database.cluster;
    let read = "select payload from tidegate.broadcast_history";
    let forget = format!("select tidegate.forget_person('{PERSON}')");
    for role in ["anon", "authenticated", "service_role"] {
        let all = [
            read,
            &forget,
            "select * from tidegate.lost_sockets",
            "select * from tidegate.migrations",
        ];
        for sql in all {
            let refused = as_role(cluster, role, sql).await.unwrap_err();
            assert!(refused.contains("42501"), "{role}: {sql}: {refused}");
        }
    }
    as_role(cluster, "tidegate", read).await.unwrap();
    as_role(cluster, "tidegate", "select version from tidegate.migrations").await.unwrap();
    for sql in [
        &*forget,
        "update tidegate.broadcast_history set payload = ''",
        "insert into tidegate.broadcast_history (eid, endpoints, payload) values ('A', '{}', '')",
        "delete from tidegate.migrations",
    ] {
        let refused = as_role(cluster, "tidegate", sql).await.unwrap_err();
        assert!(refused.contains("42501"), "{sql}: {refused}");
    }
    assert_eq!(as_role(cluster, "project", &forget).await.unwrap(), "0");
    // Not only because the schema is closed to them.
    for role in ["anon", "authenticated", "service_role", "tidegate"] {
        let may = format!(
            "select has_function_privilege('{role}', 'tidegate.forget_person(uuid)', 'execute')"
        );
        assert_eq!(database.run(&may).await, "f", "{role}");
    }
    // Nor after a role that had lost its rights, or was made later, has been given them again.
    database.run("drop owned by tidegate").await;
    as_role(cluster, "tidegate", read).await.unwrap_err();
    database.run("set role project; select tidegate.grant_access()").await;
    as_role(cluster, "tidegate", read).await.unwrap();
    as_role(cluster, "tidegate", "delete from tidegate.revocations").await.unwrap();
    as_role(cluster, "tidegate", "select version from tidegate.migrations").await.unwrap();
    as_role(cluster, "tidegate", &forget).await.unwrap_err();
    as_role(cluster, "service_role", &forget).await.unwrap_err();
}

/// Rows of all tables that name this person, in one spelling or another, and some that do not.
fn rows_that_name(person: &str, digits: &str) -> String {
    let letters = person.to_uppercase();
    format!(
        "truncate tidegate.broadcast_history;
        insert into event_artists (event_id, artist_id) values
            ('{EVENT}', '{person}'), ('{EVENT}', '{OTHER_PERSON}');
        insert into round_contestants (round_id, artist_id) values ('{ROUND}', '{person}');
        select manual_cache_invalidation('AB3029', '/live/person/{letters}');
        insert into tidegate.broadcast_history (eid, type, table_name, endpoints, payload) values
            ('AB3028', 'a', 'x', '{{/a,/b}}', '{{\"who\": \"{digits}\", \"pointer\": true}}'),
            ('AB3028', 'b', 'x', '{{/c}}', 'no JSON: {letters}');
        insert into tidegate.trigger_failures (message, sqlstate) values
            ('notifying: {letters} is too long', '54000'), ('notifying', '54000');
        insert into tidegate.lost_sockets (gateway, client, topic, last_data_at) values
            ('{PERSON}', '{PERSON}', 'event_offers_{OTHER_EVENT}_{person}', now()),
            ('{PERSON}', '{PERSON}', 'cache_invalidate_AB3028', now());
        insert into tidegate.recent_topics (topic) values
            ('event_offers_{OTHER_EVENT}_{person}'), ('event_offers_{OTHER_EVENT}_{PERSON}');
        insert into tidegate.revocations (claim, value, until) values
            ('sub', '{person}', now() + interval '1 hour'),
            ('jti', '{digits}', now() - interval '1 hour'),
            ('sub', '{OTHER_PERSON}', now() - interval '1 hour');"
    )
}

/// The tables of schema `tidegate` that name a person, given by the digits of the id, and in how
/// many rows.
async fn naming(database: &Database, digits: &str) -> Vec<String> {
    let tables = "select c.oid::regclass from pg_class c
        where relnamespace = 'tidegate'::regnamespace and relkind = 'r' order by relname";
    let tables = database.run(tables).await;
    assert!(tables.lines().count() >= 7, "{tables}");
    let mut naming = Vec::new();
    for table in tables.lines() {
        let rows = format!(
            "select count(*) from {table} t where replace(lower(t::text), '-', '') like '%{digits}%'"
        );
        let count = database.run(&rows).await;
        if count != "0" {
            naming.push(format!("{table} {count}"));
        }
    }
    naming
}

#[tokio::test]
async fn a_person_is_forgotten_everywhere_and_nobody_else_is() {
    let database = of_a_project().await;
    let digits = ARTIST.replace('-', "");
    database.run(&rows_that_name(ARTIST, &digits)).await;
    let named = [
        "tidegate.broadcast_history 5",
        "tidegate.lost_sockets 1",
        "tidegate.recent_topics 1",
        "tidegate.revocations 2",
        "tidegate.trigger_failures 1",
    ];
    assert_eq!(naming(&database, &digits).await, named);
    let kept = "id, eid, type, table_name, operation, xact, at";
    let before = database.history(kept).await;
    let forget = format!("select tidegate.forget_person('{ARTIST}')");
    assert_eq!(database.run(&forget).await, (5 + 1 + 1 + 1 + 1).to_string());
    assert_eq!(database.history(kept).await, before);

    // Nowhere, but in the revocation that holds.
    assert_eq!(naming(&database, &digits).await, ["tidegate.revocations 1"]);
    let told = database.history("type, endpoints, payload").await;
    let told: Vec<Vec<&str>> = told.lines().map(|line| line.splitn(3, '|').collect()).collect();
    let both = "{/live/event/AB3028,/live/event/AB3028/artists}";
    let page = "{/live/event/AB3029,/live/event/AB3029/media}";
    let endpoints: Vec<_> = told.iter().map(|row| (row[0], row[1])).collect();
    let expected = [
        ("event_artists_updated", both),
        ("event_artists_updated", both),
        ("round_contestants_updated", both),
        ("manual_invalidation", page),
        ("a", "{/a,/b}"),
        ("b", "{/c}"),
    ];
    assert_eq!(endpoints, expected);
    let payloads: Vec<Value> =
        told.iter().map(|row| serde_json::from_str(row[2]).unwrap()).collect();
    let id = &payloads[0]["id"];
    assert_eq!(
        payloads[0],
        json!({
            "id": id, "type": "event_artists_updated", "event_eid": "AB3028",
            "endpoints": ["/live/event/AB3028", "/live/event/AB3028/artists"], "forgotten": true,
        })
    );
    assert_eq!(payloads[1]["artist_id"], OTHER_PERSON);
    let pointers: Vec<_> = payloads.iter().map(|payload| payload["pointer"] == true).collect();
    assert_eq!(pointers, [false, false, false, true, true, false]);
    assert_eq!(database.failures().await, "|||54000|notifying\n|||54000|notifying");
    assert_eq!(
        database.run("select topic from tidegate.lost_sockets").await,
        "cache_invalidate_AB3028"
    );
    let offers = format!("event_offers_{OTHER_EVENT}_{PERSON}");
    assert_eq!(database.run("select topic from tidegate.recent_topics").await, offers);
    let revoked = format!("{OTHER_PERSON}\n{ARTIST}");
    let values = "select value from tidegate.revocations order by value";
    assert_eq!(database.run(values).await, revoked);

    // There is nothing left to forget, and nobody is no person.
    assert_eq!(database.run(&forget).await, "0");
    database.try_run("select tidegate.forget_person(null)").await.unwrap_err();
}

/// A revocation that were forgotten would open what the person's tokens open.
#[tokio::test]
async fn a_revocation_that_holds_is_kept_and_told_of() {
    let database = of_a_project().await;
    let revoke = format!(
        "insert into tidegate.revocations (claim, value, until)
        values ('sub', '{PERSON}', now() + interval '1 hour')"
    );
    database.run(&revoke).await;
    let mut command = database.cluster.psql_command("production");
    let forget = format!("select tidegate.forget_person('{PERSON}')");
    let output = command.args(["-c", &forget]).output().await.unwrap();
    let notices = String::from_utf8_lossy(&output.stderr);
    assert!(notices.contains("hold until their time is over: 1"), "{notices}");
    assert_eq!(database.run("select count(*) from tidegate.revocations").await, "1");
}

#[tokio::test]
async fn operators_are_shown_no_payload_and_no_person() {
    let database = Database::start(Shape::Production).await;
    let url = database.cluster.url("production");
    db::migrate(&Secret::from(&*url)).await.unwrap();
    let mut config = config();
    config.database_url = Secret::from(&*url.replace("postgres@", "tidegate@"));
    let server = TestServer::start_with(config);
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join("cache_invalidate_AB3028").await;
    database
        .run(&format!(
            "insert into event_artists (event_id, artist_id) values ('{EVENT}', '{ARTIST}');
            insert into votes (event_id, eid, person_id) values ('{EVENT}', 'AB3028', '{PERSON}');
            update art set status = 'sold', winner_id = '{PERSON}' where event_id = '{EVENT}'"
        ))
        .await;
    let kept = "select count(*) from tidegate.broadcast_history where payload like '%artist_id%'";
    assert_eq!(database.run(kept).await, "1");
    let sent = "GET /events/AB3028/history HTTP/1.1";
    let told = async {
        loop {
            let (_, text) = TestServer::request(server.admin, sent, "").await;
            if text.contains("event_artists_updated") {
                return text;
            }
        }
    };
    let told = timeout(DEADLINE, told).await.unwrap();
    let (_, events) = TestServer::request(server.admin, "GET /events HTTP/1.1", "").await;
    let (_, metrics) = TestServer::request(server.admin, "GET /metrics HTTP/1.1", "").await;
    assert!(events.contains("AB3028"), "{events}");
    for text in [told, events, metrics] {
        for hidden in [ARTIST, PERSON, "artist_id", "winner_", "Vermeer", "cache_version"] {
            assert!(!text.contains(hidden), "{hidden}: {text}");
        }
    }
    drop(viewer);
    server.stop().await;
}
