//! What the database's policies are asked, with which rights, and what they cannot do.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::join_all};
use serde_json::{Value, json};
use tidegate::{
    policies::{Allowed, Missing, PolicyQuery, QueryError},
    secret::Secret,
    server::Gateway,
};
use tokio::time::timeout;

use crate::support::{
    postgres::Database,
    private::{MEMBER, Private, READER, STRANGER, Table, asking, read, write},
    server::{DEADLINE, config},
};

fn user(sub: &str) -> Value {
    json!({ "role": "authenticated", "sub": sub })
}

fn is_policy<T: std::fmt::Debug>(answer: &Result<T, QueryError>) -> bool {
    matches!(answer, Err(QueryError::Policy { .. }))
}

#[tokio::test]
async fn who_may_read_and_write_is_what_the_policies_say_on_either_table() {
    const BROADCAST: Allowed = Allowed { broadcast: true, presence: false };
    let stage = |user_role: &str| json!({ "role": "authenticated", "sub": STRANGER, "user_role": user_role });
    for table in Table::BOTH {
        let database = Private::start(table).await;
        let gateway = database.gateway();
        for (claims, topic, may_read, may_write) in [
            (user(MEMBER), "room:1", Allowed::ALL, true),
            (user(READER), "room:1", Allowed::ALL, false),
            (user(STRANGER), "room:1", Allowed::NONE, false),
            (user(MEMBER), "room:2", Allowed::NONE, false),
            (user(STRANGER), "announcements", BROADCAST, false),
            (stage("performer"), "stage:main", Allowed::ALL, true),
            (stage("audience"), "stage:main", Allowed::ALL, false),
            (stage("other"), "stage:main", Allowed::NONE, false),
            (json!({ "role": "authenticated" }), "room:1", Allowed::NONE, false),
            (json!({ "role": "anon", "sub": MEMBER }), "room:1", Allowed::NONE, false),
            (json!({ "role": "service_role" }), "room:1", Allowed::ALL, true),
        ] {
            let at = format!("{table:?}: {claims} {topic}");
            assert_eq!(read(&gateway, claims.clone(), topic).await.unwrap(), may_read, "{at}");
            assert_eq!(write(&gateway, claims, topic).await.unwrap(), may_write, "{at}");
        }
        // Presence is asked about only if somebody wants it.
        let asking = asking(&gateway, user(MEMBER), "room:1");
        assert_eq!(gateway.policies.read(asking, false).await.unwrap(), BROADCAST);
        // All of it on one session, and nothing is left behind.
        assert_eq!(database.run("select count(*) from realtime.messages").await, "0");
        assert_eq!(database.sessions("state <> 'idle'").await, 0);
        assert_eq!(database.sessions("true").await, 1);
    }
}

#[tokio::test]
async fn a_hostile_topic_is_only_data() {
    let database = Private::start(Table::Plain).await;
    let gateway = database.gateway();
    let long = "ä".repeat(127);
    let topics = [
        "'; drop table realtime.messages; --",
        "$1 $$ $x$ \\ \\' \\x00 %s %I {} \"",
        "a' or '1'='1",
        "room:1\n\t\u{7f}",
        "\u{202e}🦀\u{0}",
        "*",
        "",
        &long,
        "r̈oom:1",
    ];
    for topic in topics {
        let at = format!("{topic:?}");
        assert_eq!(read(&gateway, user(MEMBER), topic).await.unwrap(), Allowed::NONE, "{at}");
        assert!(!write(&gateway, user(MEMBER), topic).await.unwrap(), "{at}");
        // Postgres has no text with a null byte, and nobody is asked about none.
        if topic.contains('\0') || topic.is_empty() {
            continue;
        }
        let quoted = topic.replace('\'', "''");
        database.run(&format!("insert into room_members values ('{quoted}', '{MEMBER}')")).await;
        assert_eq!(read(&gateway, user(MEMBER), topic).await.unwrap(), Allowed::ALL, "{at}");
        assert!(write(&gateway, user(MEMBER), topic).await.unwrap(), "{at}");
    }
    for sub in ["' or true --", "\0", "00000000-0000-4000-8000-000000000001'"] {
        assert!(is_policy(&read(&gateway, user(sub), "room:1").await), "{sub:?}");
    }
    assert_eq!(database.run("select count(*) from realtime.messages").await, "0");
}

#[tokio::test]
async fn policies_see_the_claims_the_topic_and_the_headers_and_nothing_of_the_last_question() {
    let database = Private::start(Table::Plain).await;
    database
        .run(
            "create policy seen on realtime.messages for select to anon using (
                current_user = 'anon' and realtime.topic() = 'seen' and topic = 'seen'
                and auth.jwt() = jsonb_build_object('role', 'anon', 'sub', 'x', 'a', '[1]'::jsonb,
                    'exp', (auth.jwt() ->> 'exp')::bigint)
                and current_setting('request.jwt.claim.sub') = 'x'
                and current_setting('request.jwt.claim.role') = 'anon'
                and current_setting('request.headers')::json ->> 'x-country' = 'NL'
                and not private and event is null and payload is null);
            create policy unseen on realtime.messages for select to anon using (
                realtime.topic() = 'unseen'
                and coalesce(current_setting('request.headers'), '') = '{}'
                and current_setting('request.jwt.claim.sub') = '')",
        )
        .await;
    let gateway = database.gateway();
    let asking = PolicyQuery {
        headers: r#"{"x-country":"NL"}"#.into(),
        ..asking(&gateway, json!({ "role": "anon", "sub": "x", "a": [1] }), "seen")
    };
    assert_eq!(gateway.policies.read(asking, true).await.unwrap(), Allowed::ALL);
    // On the same session.
    let anon = json!({ "role": "anon" });
    assert_eq!(read(&gateway, anon.clone(), "seen").await.unwrap(), Allowed::NONE);
    assert_eq!(read(&gateway, anon, "unseen").await.unwrap(), Allowed::ALL);
    assert_eq!(database.sessions("true").await, 1);
}

#[tokio::test]
async fn a_role_that_policies_do_not_bind_passes_and_no_name_of_a_superuser_does() {
    let database = Private::start(Table::Plain).await;
    database.run("create role boss superuser; create role plain_boss superuser nobypassrls").await;
    // Also where the gateway itself could become anybody.
    for role in ["tidegate", "postgres"] {
        let mut config = database.config();
        config.database_url = Secret::from(&*database.url(role));
        let gateway = Gateway::new(config).unwrap();
        let service = json!({ "role": "service_role" });
        assert_eq!(read(&gateway, service.clone(), "any").await.unwrap(), Allowed::ALL);
        assert!(write(&gateway, service, "any").await.unwrap());
        let unknown = ["nobody", "none", "postgres", "boss", "plain_boss", "SERVICE_ROLE"];
        for name in unknown {
            let claims = json!({ "role": name, "sub": MEMBER });
            assert!(is_policy(&read(&gateway, claims.clone(), "room:1").await), "{role}: {name}");
            assert!(is_policy(&write(&gateway, claims, "room:1").await), "{role}: {name}");
        }
    }
}

#[tokio::test]
async fn a_policy_that_raises_says_no_and_the_session_lives_on() {
    let database = Private::start(Table::Plain).await;
    database
        .run(
            "create function raise() returns boolean language plpgsql
                as 'begin raise exception ''of %'', auth.jwt(); end';
            create policy raises on realtime.messages to anon using (raise()) with check (raise())",
        )
        .await;
    let gateway = database.gateway();
    let anon = json!({ "role": "anon" });
    for _ in 0..2 {
        for answer in [
            read(&gateway, anon.clone(), "room:1").await.map(drop),
            write(&gateway, anon.clone(), "room:1").await.map(drop),
        ] {
            let error = answer.unwrap_err();
            assert_eq!(error.label(), "policy_error");
            assert!(!format!("{error:?}").contains("anon"), "a claim is shown: {error:?}");
        }
        assert_eq!(read(&gateway, user(MEMBER), "room:1").await.unwrap(), Allowed::ALL);
    }
    assert_eq!(database.sessions("true").await, 1);
}

/// Policies that take an hour, for anon.
const SLOW: &str = "create policy slow on realtime.messages to anon
    using (pg_sleep_for('1 hour') is null) with check (pg_sleep_for('1 hour') is null)";

#[tokio::test]
async fn a_slow_policy_is_given_up_in_its_time() {
    let database = Private::start(Table::Plain).await;
    database.run(SLOW).await;
    let mut config = database.config();
    config.policies.timeout = Duration::from_millis(500);
    let gateway = Gateway::new(config).unwrap();
    let anon = json!({ "role": "anon" });
    let slow = [
        read(&gateway, anon.clone(), "room:1").await.unwrap_err(),
        write(&gateway, anon, "room:1").await.unwrap_err(),
    ];
    for error in slow {
        assert_eq!(error.label(), "query_canceled");
        assert_eq!(error.refuse("room:1").text(), "Query was cancelled, please try again");
    }
    // The server ended the statements, so that nothing goes on there.
    assert_eq!(database.sessions("wait_event = 'PgSleep'").await, 0);
    assert_eq!(read(&gateway, user(MEMBER), "room:1").await.unwrap(), Allowed::ALL);
}

#[tokio::test]
async fn a_question_that_nobody_waits_for_keeps_its_place_until_the_server_is_done() {
    let database = Private::start(Table::Plain).await;
    database.run(SLOW).await;
    let mut config = database.config();
    config.policies.connections_max = 1;
    config.policies.timeout = Duration::from_secs(3);
    let gateway = Gateway::new(config).unwrap();
    let mut question = Box::pin(read(&gateway, json!({ "role": "anon" }), "room:1"));
    let asleep = async {
        while database.sessions("wait_event = 'PgSleep'").await == 0 {
            assert!(question.as_mut().now_or_never().is_none(), "it is slow");
        }
    };
    timeout(DEADLINE, asleep).await.unwrap();
    drop(question);
    // Else clients that come and go could take all of the server's sessions.
    let answered = async {
        while let Err(error) = read(&gateway, user(MEMBER), "room:1").await {
            assert_eq!(error.label(), "pool_timeout");
            assert_eq!(database.sessions("true").await, 1);
        }
    };
    timeout(DEADLINE, answered).await.unwrap();
    // The same session, without the transaction and its role.
    assert_eq!(database.sessions("true").await, 1);
    assert_eq!(database.sessions("state = 'idle'").await, 1);
    assert!(write(&gateway, user(MEMBER), "room:1").await.unwrap());
}

#[tokio::test]
async fn more_questions_than_sessions_wait_and_then_are_told_so() {
    let database = Private::start(Table::Plain).await;
    database.run(SLOW).await;
    let mut config = database.config();
    config.policies.connections_max = 2;
    config.policies.timeout = Duration::from_millis(800);
    let gateway = Gateway::new(config).unwrap();
    let questions = (0..40).map(|_| read(&gateway, json!({ "role": "anon" }), "room:1"));
    let mut kinds: HashMap<&str, usize> = HashMap::new();
    for answer in join_all(questions).await {
        let error = answer.unwrap_err();
        if error.label() == "pool_timeout" {
            let text = "Please increase your connection pool size";
            assert_eq!(error.refuse("room:1").text(), text);
        }
        *kinds.entry(error.label()).or_default() += 1;
    }
    // Two are asked, and the others learn in time that there is no place for them.
    assert_eq!(kinds, HashMap::from([("query_canceled", 2), ("pool_timeout", 38)]));
    assert!(database.sessions("true").await <= 2);
    // Fast ones only wait.
    let questions = (0..40).map(|_| read(&gateway, user(MEMBER), "room:1"));
    for answer in join_all(questions).await {
        assert_eq!(answer.unwrap(), Allowed::ALL);
    }
}

#[tokio::test]
async fn a_database_that_is_down_is_unavailable_until_it_is_back() {
    let database = Private::start(Table::Plain).await;
    let gateway = database.gateway();
    let ask = || read(&gateway, user(MEMBER), "room:1");
    assert_eq!(ask().await.unwrap(), Allowed::ALL);
    database.cluster.stop_immediate().await.unwrap();
    for _ in 0..2 {
        let error = ask().await.unwrap_err();
        assert_eq!(error.label(), "unavailable");
        let text = "Realtime was unable to connect to the project database";
        assert_eq!(error.refuse("room:1").text(), text);
    }
    database.cluster.restart().await.unwrap();
    assert_eq!(ask().await.unwrap(), Allowed::ALL);
    // What an idle session was when the server ended it is no matter.
    database.cluster.restart().await.unwrap();
    assert_eq!(ask().await.unwrap(), Allowed::ALL);
}

#[tokio::test]
async fn a_day_without_a_partition_has_its_own_name() {
    let database = Private::start(Table::Supabase).await;
    database
        .run(
            "do $$ begin
                execute (select string_agg(format('drop table %s', inhrelid::regclass), ';')
                    from pg_inherits where inhparent = 'realtime.messages'::regclass);
            end $$",
        )
        .await;
    let gateway = database.gateway();
    let answer = read(&gateway, user(MEMBER), "room:1").await;
    let error = answer.unwrap_err();
    assert_eq!(error.label(), "missing_partition");
    let text = "Realtime was unable to find the expected messages partition";
    assert_eq!(error.refuse("room:1").text(), text);
    // It is looked for before the policies are.
    let answer = write(&gateway, user(MEMBER), "room:1").await;
    assert_eq!(answer.unwrap_err().label(), "missing_partition");
}

#[tokio::test]
async fn what_is_not_set_up_is_unavailable_and_not_denied() {
    let missing = |answer: Result<Allowed, QueryError>| match answer {
        Err(QueryError::NotSetUp(missing)) => missing,
        other => panic!("{other:?}"),
    };
    let nowhere = Gateway::new(config()).unwrap();
    assert_eq!(missing(read(&nowhere, user(MEMBER), "room:1").await), Missing::Database);
    // A database that nobody has migrated.
    let mut empty = Database::create().await;
    let role = format!("user_of_{}", empty.name());
    empty.run(&format!("create role {role}")).await;
    let mut settings = config();
    settings.database_url = Secret::from(empty.url());
    let gateway: Arc<Gateway> = Gateway::new(settings).unwrap();
    let claims = json!({ "role": role });
    assert_eq!(missing(read(&gateway, claims.clone(), "room:1").await), Missing::Schema);
    assert!(matches!(
        write(&gateway, claims, "room:1").await,
        Err(QueryError::NotSetUp(Missing::Schema))
    ));
    // A role that the gateway may not take.
    let database = Private::start(Table::Plain).await;
    database.run("create role editor; grant usage on schema realtime to editor").await;
    let gateway = database.gateway();
    let editor = json!({ "role": "editor" });
    assert_eq!(missing(read(&gateway, editor.clone(), "room:1").await), Missing::Membership);
    database.run("revoke execute on function tidegate.insert_probes from tidegate").await;
    assert_eq!(missing(read(&gateway, user(MEMBER), "room:1").await), Missing::Schema);
    database.run("select tidegate.open_private_channels(); grant editor to tidegate").await;
    assert_eq!(read(&gateway, user(MEMBER), "room:1").await.unwrap(), Allowed::ALL);
    // It may not read the table: that is an answer.
    assert!(is_policy(&read(&gateway, editor.clone(), "room:1").await));
    assert!(!write(&gateway, editor, "room:1").await.unwrap());
}

#[tokio::test]
async fn the_gateways_role_may_ask_and_nothing_else() {
    for table in Table::BOTH {
        let database = Private::start(table).await;
        database
            .run("create table accounts (id int); grant select on accounts to authenticated, anon")
            .await;
        for sql in [
            "select * from accounts",
            "select * from room_members",
            "select * from realtime.messages",
            "insert into realtime.messages (topic, extension) values ('a', 'broadcast')",
            "set role service_role",
            "set role supabase_realtime_admin",
            "set role postgres",
            "create policy mine on realtime.messages using (true)",
            "alter table realtime.messages disable row level security",
            "create table tidegate.mine (id int)",
            "select tidegate.open_private_channels()",
            "create function tidegate.mine() returns int language sql as 'select 1'",
        ] {
            let said = database.denied("tidegate", sql).await;
            let is_denial = ["permission denied", "must be owner", "does not exist"]
                .iter()
                .any(|words| said.contains(words));
            assert!(is_denial, "{table:?}: {sql}: {said}");
        }
        // As anybody of whom it may ask it has that one's rights, which a token gives anyway.
        let roles = "select string_agg(r.rolname, ' ' order by r.rolname) from pg_roles r
            where pg_has_role('tidegate', r.oid, 'member')";
        assert_eq!(database.run(roles).await, "anon authenticated tidegate", "{table:?}");
        let flags = "select rolinherit or rolsuper or rolbypassrls or rolcreaterole or rolcreatedb
            from pg_roles where rolname = 'tidegate'";
        assert_eq!(database.run(flags).await, "f", "{table:?}");
        // What it can leave behind are rows without content, of two extensions.
        database
            .run(
                "set session authorization tidegate;
                select tidegate.insert_probes('a', array['broadcast', 'presence', 'other', null])",
            )
            .await;
        let rows = "select string_agg(concat_ws(' ', topic, extension, payload, event, private,
                binary_payload), ', ' order by extension) from realtime.messages";
        assert_eq!(database.run(rows).await, "a broadcast f, a presence f", "{table:?}");
    }
}
