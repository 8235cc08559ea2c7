//! The history of what the database has told, and the triggers of the tables besides art, votes,
//! bids and media: what is written down, how much of it, how long, and that no write fails for it.

use std::time::Instant;

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tidegate::demo::cluster::Cluster;

use crate::support::system::{
    ART, ART_WITHOUT_EASEL, Database, EVENT, OTHER_ART, OTHER_EVENT, OTHER_ROUND, PERSON, ROUND,
    SECOND_ART, Shape, bid, migration, stats, system_file, viewers, vote_cast,
};

const BID_COLUMNS: &str = "eid, type, table_name, operation, endpoints";

/// Bids of growing amounts on one artwork, in one statement.
fn bids(art: &str, count: u32) -> String {
    format!(
        "insert into bids (art_id, amount) select '{art}', n from generate_series(1, {count}) n;"
    )
}

/// What the viewers of events hear of some SQL, ids included.
async fn heard(database: &mut Database, sql: &str) -> Vec<Value> {
    database.run(sql).await;
    let heard = database.heard_until_marker().await.into_iter();
    heard
        .filter(|(channel, _)| channel.starts_with("cache_invalidate_"))
        .map(|(_, payload)| payload)
        .collect()
}

#[tokio::test]
async fn the_history_says_what_was_told_of_which_row_by_which_transaction() {
    for mut database in Database::both().await {
        let easel = database.shape.easel();
        database.run("truncate tidegate.broadcast_history").await;
        let transaction = format!(
            "begin; {} {} select 'xact ' || pg_current_xact_id(); commit;",
            database.shape.vote(),
            bid(ART, 250)
        );
        let xact = database.run(&transaction).await;
        let told: Vec<_> = database.heard_until_marker().await;
        assert_eq!(told.len(), 4);
        let written = format!(
            "AB3028|vote_cast|votes|INSERT|{{/live/event/AB3028}}\n\
            AB3028|bid_placed|bids|INSERT|{{/live/event/AB3028,/live/event/AB3028-2-{easel}/bids}}"
        );
        assert_eq!(database.history(BID_COLUMNS).await, written);
        assert_eq!(database.history("'xact ' || xact").await, format!("{xact}\n{xact}"));
        let at = "at > now() - interval '1 minute' and at <= clock_timestamp()";
        assert_eq!(database.history(at).await, "t\nt");

        database.told("select manual_cache_invalidation('AB3029')").await;
        let manual = "AB3029|manual_invalidation|manual|MANUAL|{/live/event/AB3029,/live/event/AB3029/media}";
        assert_eq!(database.history(BID_COLUMNS).await, format!("{written}\n{manual}"));
        // What was given to the person who called is what was told.
        let given = database.run("select manual_cache_invalidation('AB3028')").await;
        let newest = "select payload from tidegate.broadcast_history order by id desc limit 1";
        assert_eq!(database.run(newest).await, given);
    }
}

/// The tables besides those that the first shape has.
const FURTHER_SEED_TABLES: &str = "
    create table event_artists (id int, eid text, artist_id text);
    create table round_contestants (id int, event_id uuid, artist_id text, round int);
    create table artwork_offers (id int, artwork_id uuid, status text);
    create table payment_processing (id int, art_id uuid, payment_amount numeric, payment_status text);
    select enable_cache_invalidation();";

#[tokio::test]
async fn artists_contestants_and_offers_are_told() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let offer = "00000000-0000-4000-8000-0000000000d1";
        let (artists, contestants, offers, offer) = match shape {
            Shape::Seed => {
                database.run(FURTHER_SEED_TABLES).await;
                (
                    format!("(eid, artist_id) values ('AB3028', '{PERSON}')"),
                    format!("(event_id, artist_id, round) values ('{EVENT}', '{PERSON}', 2)"),
                    format!("(id, artwork_id, status) values (7, '{ART}', 'pending')"),
                    json!(7),
                )
            }
            Shape::Production => (
                format!("(event_id, artist_id) values ('{EVENT}', '{PERSON}')"),
                format!("(round_id, artist_id) values ('{ROUND}', '{PERSON}')"),
                format!("(id, art_id) values ('{offer}', '{ART}')"),
                json!(offer),
            ),
        };
        let event = "/live/event/AB3028";
        let both = [event, "/live/event/AB3028/artists"];
        let artists_updated = json!({
            "type": "event_artists_updated", "event_eid": "AB3028", "endpoints": both,
            "artist_id": PERSON,
        });
        let contestants_updated = json!({
            "type": "round_contestants_updated", "event_eid": "AB3028", "endpoints": both,
            "artist_id": PERSON, "round": 2,
        });
        let offer_updated = json!({
            "type": "artwork_offer_updated", "event_eid": "AB3028", "endpoints": [event],
            "art_id": ART, "offer_id": offer, "status": "pending",
        });
        for (table, row, payload) in [
            ("event_artists", artists, artists_updated),
            ("round_contestants", contestants, contestants_updated),
            ("artwork_offers", offers, offer_updated),
        ] {
            for (sql, operation) in [
                (format!("insert into {table} {row}"), "INSERT"),
                (format!("update {table} set id = id"), "UPDATE"),
                (format!("delete from {table}"), "DELETE"),
            ] {
                assert_eq!(
                    database.told(&sql).await,
                    json!([viewers("AB3028", &payload), stats("AB3028", table, operation)])
                );
            }
        }
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn a_payment_is_told_when_it_ends() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let easel = shape.easel();
        let (status, amount) = match shape {
            Shape::Seed => {
                database.run(FURTHER_SEED_TABLES).await;
                ("payment_status", "payment_amount")
            }
            Shape::Production => ("status", "amount"),
        };
        let payment = |status: &str, amount: u32| {
            let payload = json!({
                "type": "payment_status_changed", "event_eid": "AB3028", "endpoints": ["/live/event/AB3028"],
                "art_id": ART, "round": 2, "easel": easel, "payment_status": status,
                "payment_amount": amount,
            });
            json!([viewers("AB3028", &payload), stats("AB3028", "payment_processing", "UPDATE")])
        };
        let insert = format!(
            "insert into payment_processing (art_id, {amount}, {status}) values ('{ART}', 50, 'pending')"
        );
        let nothing = json!([]);
        for (sql, told) in [
            (insert, &nothing),
            (format!("update payment_processing set {status} = 'processing'"), &nothing),
            (format!("update payment_processing set {status} = 'cancelled'"), &nothing),
            (format!("update payment_processing set {status} = 'failed'"), &payment("failed", 50)),
            (
                format!("update payment_processing set {status} = 'completed'"),
                &payment("completed", 50),
            ),
            // What viewers see of it is the same.
            ("update payment_processing set id = id".to_owned(), &nothing),
            (format!("update payment_processing set {amount} = 60"), &payment("completed", 60)),
            (format!("update payment_processing set {status} = 'refunded'"), &nothing),
            ("delete from payment_processing".to_owned(), &nothing),
        ] {
            assert_eq!(&database.told(&sql).await, told, "{sql}");
        }
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn an_event_that_changes_tells_its_viewers_under_either_name() {
    for mut database in Database::both().await {
        let changed = |eid: &str| {
            let endpoint = format!("/live/event/{eid}");
            viewers(
                eid,
                &json!({
                    "type": "event_status_changed", "event_eid": eid, "endpoints": [endpoint],
                }),
            )
        };
        let insert = "insert into events (eid) values ('AB3030')";
        assert_eq!(database.told(insert).await, json!([]));
        let update = format!("update events set name = 'Another' where id = '{EVENT}'");
        let stats = stats("AB3028", "events", "UPDATE");
        assert_eq!(database.told(&update).await, json!([changed("AB3028"), stats]));
        let rename = format!(
            "update events set eid = null where id = '{OTHER_EVENT}';
            update events set eid = 'AB3029' where id = '{EVENT}'"
        );
        // The name is lost first, then another event takes it.
        assert_eq!(
            database.told_viewers(&rename).await,
            json!([changed("AB3029"), changed("AB3029"), changed("AB3028")])
        );
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn rows_that_move_between_events_stand_in_the_history_of_both() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let easel = shape.easel();
        if shape == Shape::Production {
            let insert = format!("insert into round_contestants (round_id) values ('{ROUND}')");
            database.told(&insert).await;
            let told = database
                .told_viewers(&format!("update round_contestants set round_id = '{OTHER_ROUND}'"))
                .await;
            assert_eq!(told[0][0], "cache_invalidate_AB3029");
            assert_eq!(told[0][1]["round"], 1);
            assert_eq!(told[1][0], "cache_invalidate_AB3028");
            assert_eq!(told[1][1]["round"], 2);
        }

        // The bids of an artwork are found under its round and its easel.
        let (one, other) = if shape == Shape::Seed { ("B", "C") } else { ("5", "6") };
        let here = "/live/event/AB3028";
        for (sql, endpoints) in [
            (
                format!("update art set easel = '{one}' where id = '{ART}'"),
                json!([
                    here,
                    "/live/event/AB3028/media",
                    format!("{here}-2-{one}/bids"),
                    format!("{here}-2-{easel}/bids")
                ]),
            ),
            (
                format!("update art set easel = null where id = '{ART}'"),
                json!([here, "/live/event/AB3028/media", format!("{here}-2-{one}/bids")]),
            ),
            (
                format!("update art set round = 3, easel = '{other}' where id = '{ART}'"),
                json!([here, "/live/event/AB3028/media", format!("{here}-3-{other}/bids")]),
            ),
        ] {
            let told = database.told_viewers(&sql).await;
            assert_eq!(told.as_array().unwrap().len(), 1);
            assert_eq!(told[0][1]["endpoints"], endpoints);
        }
        database.run("truncate tidegate.broadcast_history").await;
        let there = "/live/event/AB3029";
        database
            .told(&format!(
                "update art set event_id = '{OTHER_EVENT}', round = 1, easel = '{one}' where id = '{ART}'"
            ))
            .await;
        assert_eq!(
            database.history("eid, endpoints").await,
            format!(
                "AB3029|{{{there},{there}/media,{there}-1-{one}/bids}}\n\
                AB3028|{{{here},{here}/media,{here}-3-{other}/bids}}"
            )
        );
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn what_is_rolled_back_leaves_no_history() {
    for mut database in Database::both().await {
        let vote = database.shape.vote();
        database.run("truncate tidegate.broadcast_history").await;
        assert_eq!(database.told(&format!("begin; {vote} rollback")).await, json!([]));
        assert_eq!(database.history("*").await, "");

        // A savepoint gives back what it took of the 50 rows, the pointer too.
        let script = format!(
            "begin; savepoint a; {} rollback to a; {} commit;",
            bids(ART, 60),
            bids(ART, 50)
        );
        assert_eq!(heard(&mut database, &script).await.len(), 50);
        let pointers = "count(*), count(*) filter (where payload like '%pointer%')";
        let count = format!("select {pointers} from tidegate.broadcast_history");
        assert_eq!(database.run(&count).await, "50|0");
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn a_transaction_tells_50_messages_and_then_a_pointer_for_each_event() {
    for mut database in Database::both().await {
        let count = "select eid, count(*), count(*) filter (where payload::jsonb ? 'pointer')
            from tidegate.broadcast_history group by eid order by eid";
        for (rows, kept) in [(50, "50|0"), (51, "51|1"), (1000, "51|1")] {
            database.run("truncate tidegate.broadcast_history").await;
            let told = heard(&mut database, &bids(ART, rows)).await;
            assert_eq!(database.run(count).await, format!("AB3028|{kept}"));
            let (pointers, bids): (Vec<_>, Vec<_>) =
                told.iter().partition(|payload| payload.get("pointer").is_some());
            // The pointer stands for the bids past the fiftieth.
            assert_eq!(bids.len(), rows.min(50) as usize);
            for (place, bid) in bids.iter().enumerate() {
                assert_eq!(bid["amount"], place + 1);
            }
            assert_eq!(pointers.len(), usize::from(rows > 50));
            for pointer in pointers {
                let endpoints = json!(["/live/event/AB3028", "/live/event/AB3028/media"]);
                assert_eq!(pointer["endpoints"], endpoints);
                assert_eq!(pointer["type"], "bid_placed");
                assert_eq!(pointer["pointer"], true);
            }
            let ids: std::collections::BTreeSet<_> =
                told.iter().map(|payload| payload["id"].as_u64().unwrap()).collect();
            assert_eq!(ids.len(), told.len());
        }

        // All events share the count, and each has its own pointer.
        database.run("truncate tidegate.broadcast_history").await;
        let script = format!(
            "begin; {} {} {} commit;",
            bids(ART, 30),
            bids(OTHER_ART, 60),
            bids(SECOND_ART, 30)
        );
        database.run(&script).await;
        assert_eq!(database.run(count).await, "AB3028|31|1\nAB3029|21|1");
        // The count ends with its transaction.
        database.run("truncate tidegate.broadcast_history").await;
        database.run(&format!("{} {}", bids(ART, 30), bids(ART, 30))).await;
        assert_eq!(database.run(count).await, "AB3028|60|0");
        assert_eq!(database.failures().await, "");
    }
}

/// Locks a table against everybody while a write goes on.
async fn lock(connection: &mut PgConnection, table: &str) {
    let lock = format!("begin; lock table {table} in access exclusive mode");
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(connection).await.unwrap();
}

#[tokio::test]
async fn a_locked_history_delays_a_transaction_once_and_is_recorded() {
    for mut database in Database::both().await {
        let mut other = database.connect().await;
        lock(&mut other, "tidegate.broadcast_history").await;
        let told = heard(&mut database, &bid(ART, 5)).await;
        assert_eq!((told.len(), told[0].get("id")), (1, None), "{told:?}");
        assert_eq!(told[0]["amount"], 5);
        assert_eq!(
            database.failures().await,
            "bids|INSERT|AB3028|55P03|writing the history: canceling statement due to lock timeout"
        );

        // 50 ms for each of 1,000 rows would be 50 s.
        let begun = Instant::now();
        let told = heard(&mut database, &bids(ART, 1000)).await;
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
        assert_eq!(told.len(), 51);
        assert!(told.iter().all(|payload| payload.get("id").is_none()));
        assert_eq!(database.run("select count(*) from tidegate.trigger_failures").await, "11");

        // Nor can the table of failures take the time that the history no longer takes.
        lock(&mut other, "tidegate.trigger_failures").await;
        let begun = Instant::now();
        assert_eq!(heard(&mut database, &bids(ART, 1000)).await.len(), 51);
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());

        // A person is told, too.
        assert_eq!(
            heard(&mut database, "select manual_cache_invalidation('AB3028')").await.len(),
            1
        );
        other.close().await.unwrap();
        assert!(heard(&mut database, &bid(ART, 6)).await[0]["id"].is_u64());
    }
}

#[tokio::test]
async fn a_history_that_may_not_be_written_or_is_broken_costs_the_id_alone() {
    for mut database in Database::both().await {
        let easel = database.shape.easel();
        // The owner of the functions, who alone matters: the triggers run as it.
        database
            .run(
                "do $$ declare f regprocedure; begin
                    if to_regrole('app') is null then create role app; end if;
                    grant usage on schema tidegate to app;
                    grant select on all tables in schema public to app;
                    grant select, insert, delete on tidegate.trigger_failures to app;
                    for f in select oid from pg_proc where pronamespace = 'tidegate'::regnamespace loop
                        execute format('alter function %s owner to app', f);
                    end loop;
                end $$",
            )
            .await;
        let mut votes = 0;
        for (broken, failure) in [
            (
                "select",
                "42501|writing the history: permission denied for sequence broadcast_history_id_seq",
            ),
            (
                "grant usage on sequence tidegate.broadcast_history_id_seq to app",
                "42501|writing the history: permission denied for table broadcast_history",
            ),
            (
                "grant insert on tidegate.broadcast_history to app;
                alter table tidegate.broadcast_history rename column payload to body",
                "42703|writing the history: column \"payload\" of relation \"broadcast_history\" does not exist",
            ),
            (
                "alter table tidegate.broadcast_history rename column body to payload;
                alter table tidegate.broadcast_history alter eid type uuid using null",
                "42804|writing the history: column \"eid\" is of type uuid but expression is of type text",
            ),
            (
                "drop table tidegate.broadcast_history",
                "42P01|writing the history: relation \"tidegate.broadcast_history_id_seq\" does not exist",
            ),
        ] {
            database.run("truncate tidegate.trigger_failures").await;
            let vote =
                database.shape.vote().replace(PERSON, &PERSON.replace("b1", &format!("c{votes}")));
            let broken = broken.replace(
                "alter eid type uuid using null",
                "alter eid drop not null, alter eid type uuid using null",
            );
            let told = heard(&mut database, &format!("{broken}; {vote}")).await;
            votes += 1;
            let expected = vote_cast(easel);
            assert_eq!(told.len(), 1);
            assert_eq!((told[0].get("id"), &told[0]["endpoints"]), (None, &expected["endpoints"]));
            assert_eq!(database.failures().await, format!("votes|INSERT|AB3028|{failure}"));
        }
        assert_eq!(database.run("select count(*) from votes").await, votes.to_string());
    }
}

#[tokio::test]
async fn settings_of_a_session_keep_nothing_from_being_told_and_no_write_from_being_made() {
    for mut database in Database::both().await {
        for setting in [
            "told = '51'",
            "told = '7 51'",
            "told = 'many'",
            "pointed = '|AB3028|.'",
            "pointed = '7 |AB3028|.'",
            "history_written = '{\"AB3028\": {\"count\": 51, \"pointer\": 7}}'",
            "history_failed = 'on'",
            "history_failed = '7'",
            "failure_count = '10'",
            "failure_count = 'many'",
        ] {
            let bid = bid(ART, 5);
            let told = heard(&mut database, &format!("set tidegate.{setting}; {bid}")).await;
            assert_eq!(told.len(), 1, "{setting}");
            assert!(told[0]["id"].is_u64() && told[0].get("pointer").is_none(), "{told:?}");
        }
        // What another transaction of the same session has noted is not believed either.
        let script = format!(
            "begin; {} select set_config('tidegate.' || n, current_setting('tidegate.' || n), false)
            from unnest(array['told', 'pointed']) n; commit; {}",
            bids(ART, 60),
            bid(ART, 61)
        );
        let told = heard(&mut database, &script).await;
        assert_eq!((told.len(), &told[51]["amount"]), (52, &json!(61)));
        database.run("truncate tidegate.trigger_failures").await;
        let unknown = "insert into events (eid) values ('no name');
            update events set name = 'a' where eid = 'no name'";
        database.run(&format!("set tidegate.failure_count = '10'; {unknown}")).await;
        assert!(database.failures().await.starts_with("events|UPDATE||22023|"));
    }
}

/// What is written past the pointer asks no table and describes nothing, so that a statement of many
/// rows does not take longer for each.
#[tokio::test]
async fn past_the_pointer_a_row_is_neither_described_nor_looked_up() {
    for mut database in Database::both().await {
        database.run(&bids(ART, 500)).await;
        database.run(&bids(OTHER_ART, 500)).await;
        database.heard_until_marker().await;
        for (update, described) in [
            ("update bids set amount = amount + 1", 52),
            ("update art set current_bid = 5", 4),
            // One that moves is told at both places, as long as neither has its pointer.
            (&*format!("update bids set art_id = '{SECOND_ART}'"), 104),
            ("delete from votes", 0),
        ] {
            let calls = |function| {
                format!(
                    "select coalesce(sum(calls), 0) from pg_stat_xact_user_functions
                    where schemaname = 'tidegate' and funcname = '{function}';"
                )
            };
            let script = format!(
                "set track_functions = 'all'; begin; {update}; {} {} rollback",
                calls("describe_change"),
                calls("locate_change"),
            );
            let counted = database.run(&script).await;
            let counted: Vec<u32> = counted.lines().map(|line| line.parse().unwrap()).collect();
            // Each artwork is looked up once more, to learn that its event has its pointer.
            assert!(counted[0] <= described, "{update}: {counted:?}");
            assert!(counted[1] <= described + 8, "{update}: {counted:?}");
        }
    }
}

/// A table of many events, each of which has few rows.
#[tokio::test]
async fn a_statement_that_concerns_every_event_tells_each_once_past_the_fiftieth_message() {
    for database in Database::both().await {
        database
            .run(
                "insert into events (id, eid) select md5(n::text)::uuid, 'AB' || 5000 + n
                from generate_series(1, 100) n;
                set session_replication_role = replica;
                insert into art (event_id, round) select md5((n % 100 + 1)::text)::uuid, 1
                from generate_series(1, 2000) n;
                truncate tidegate.broadcast_history",
            )
            .await;
        database
            .run(
                "update art set current_bid = 5 where event_id <> all (array(
            select id from events where eid like 'AB30%'))",
            )
            .await;
        let kept = database.history("payload::jsonb ? 'pointer', eid").await;
        let (pointers, rows): (Vec<_>, Vec<_>) =
            kept.lines().partition(|row| row.starts_with("t|"));
        assert_eq!((rows.len(), pointers.len()), (50, 100));
        let events: std::collections::BTreeSet<_> = pointers.into_iter().collect();
        assert_eq!(events.len(), 100);
        assert_eq!(database.failures().await, "");
    }
}

/// A sale is told on a channel of its own, for which no pointer stands.
#[tokio::test]
async fn every_sale_of_a_statement_is_told_past_the_pointer_too() {
    for mut database in Database::both().await {
        database
            .run(&format!(
                "insert into art (event_id, round) select '{EVENT}', 1 from generate_series(1, 100)"
            ))
            .await;
        database.heard_until_marker().await;
        database.run("update art set status = 'sold'").await;
        let heard = database.heard_until_marker().await;
        let sales = heard.iter().filter(|(channel, _)| channel == "auction_winner_AB3028");
        assert_eq!(sales.count(), 103);
        assert_eq!(database.failures().await, "");
    }
}

/// Both sessions write rows of an event each, and find them by an index, so that they read nothing
/// that the other writes; what the triggers read is then all that could fail them.
#[tokio::test]
async fn serializable_transactions_that_touch_other_rows_do_not_fail_by_what_a_trigger_reads() {
    for database in Database::both().await {
        // Of small tables Postgres reads everything, unless told otherwise.
        database
            .run(
                "alter table bids drop constraint bids_art_id_fkey;
                vacuum analyze art; vacuum analyze events; vacuum analyze bids",
            )
            .await;
        for triggers in ["disable", "enable"] {
            database.run(&format!("select {triggers}_cache_invalidation()")).await;
            let mut sessions = [database.connect().await, database.connect().await];
            for session in &mut sessions {
                let begin = "begin isolation level serializable; select pg_current_xact_id()";
                sqlx::raw_sql(begin).execute(session).await.unwrap();
            }
            let rows = [(EVENT, ART), (OTHER_EVENT, OTHER_ART)];
            for (session, (event, art)) in sessions.iter_mut().zip(rows) {
                let sql = format!(
                    "set local enable_seqscan = off;
                    update events set name = 'a' where id = '{event}';
                    set local enable_seqscan = on; {}",
                    bid(art, 5)
                );
                sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(session).await.unwrap();
            }
            for session in &mut sessions {
                let commit = sqlx::raw_sql("commit").execute(session).await;
                assert!(commit.is_ok(), "{triggers}: {commit:?}");
            }
        }
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn a_large_column_that_is_not_told_is_not_fetched() {
    for database in Database::both().await {
        database
            .run(&format!(
                "alter table art add story text; alter table bids add story text;
                alter table art alter story set storage external;
                alter table bids alter story set storage external;
                update art set story = repeat('a', 1000000) where id = '{ART}';
                {} update bids set story = repeat('a', 1000000)",
                bid(ART, 5)
            ))
            .await;
        // How often what is stored apart was looked up, in a session of its own each.
        let fetched = "select sum(idx_scan) from pg_stat_xact_all_tables s join pg_class c
            on c.reltoastrelid = s.relid where c.oid in ('art'::regclass, 'bids'::regclass)";
        let read = format!("begin; select length(story) from art where id = '{ART}'; {fetched}");
        assert_eq!(database.run(&read).await, "1000000\n1");
        let write = format!(
            "begin; update art set current_bid = 6 where id = '{ART}'; update bids set amount = 6;
            update art set status = 'sold' where id = '{ART}'; {fetched}; commit"
        );
        assert_eq!(database.run(&write).await, "0");
        assert_eq!(database.failures().await, "");
    }
}

/// A name in a query is a column before it is a table.
#[tokio::test]
async fn columns_by_any_name_change_nothing_of_what_is_told() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let sell = format!("update art set status = 'sold' where id = '{ART}'");
        let mut writes = vec![bid(ART, 5), shape.vote(), sell];
        let mut tables = vec!["art", "bids", "votes", "events"];
        if shape == Shape::Production {
            writes.push(format!("insert into round_contestants (round_id) values ('{ROUND}')"));
            tables.extend(["people", "rounds", "round_contestants"]);
        }
        let mut told = Vec::new();
        for columns in
            ["", "a b e h k m o p r s w missing written new old found artwork event v_eid"]
        {
            let mut script = String::new();
            for table in &tables {
                for column in columns.split_whitespace() {
                    script += &format!("alter table {table} add {column} int default 7;");
                }
            }
            script += &format!(
                "delete from bids; delete from votes; update art set status = 'active' where id = '{ART}';"
            );
            database.told(&script).await;
            told.push(database.told(&writes.join(";")).await);
            let endpoints = "select * from tidegate.event_endpoints('AB3028')";
            assert_eq!(database.run(endpoints).await.lines().count(), 5);
        }
        assert_eq!(told[0], told[1]);
        assert_eq!(told[0].as_array().unwrap().len(), 2 * writes.len() + 1);
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn a_cascade_deletes_what_it_must_and_records_whom_it_could_not_tell() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let media = shape.media_column();
        let further = match shape {
            Shape::Seed => String::new(),
            Shape::Production => format!(
                "insert into event_artists (event_id) values ('{EVENT}');
                insert into round_contestants (round_id) values ('{ROUND}');
                insert into artwork_offers (art_id) values ('{ART}');
                insert into payment_processing (art_id) values ('{ART}');"
            ),
        };
        database
            .told(&format!(
                "{} {} insert into art_media ({media}) values ('{ART}'); {further}",
                shape.vote(),
                bid(ART, 5)
            ))
            .await;
        let told = database.told_viewers(&format!("delete from events where id = '{EVENT}'")).await;
        let left = "select (select count(*) from art), (select count(*) from votes),
            (select count(*) from bids), (select count(*) from art_media)";
        assert_eq!(database.run(left).await, "1|0|0|0");
        // Production's votes know their event's name; everything else has lost its event.
        let told = told.as_array().unwrap();
        assert_eq!(told.len(), usize::from(shape == Shape::Production), "{told:?}");
        let mut failures: Vec<_> =
            database.failures().await.lines().map(ToOwned::to_owned).collect();
        failures.sort();
        let lost: &[_] = match shape {
            Shape::Seed => &["art_media", "votes"],
            Shape::Production => {
                &["art_media", "artwork_offers", "event_artists", "round_contestants"]
            }
        };
        let lost: Vec<_> = (lost.iter())
            .map(|table| format!("{table}|DELETE||P0002|the event of the row was not found"))
            .collect();
        assert_eq!(failures, lost);
    }
}

#[tokio::test]
async fn a_reference_that_leads_nowhere_is_recorded() {
    for mut database in Database::both().await {
        database
            .run(
                "do $$ declare c record; begin
                    for c in select conname, conrelid::regclass as t from pg_constraint where contype = 'f' loop
                        execute format('alter table %s drop constraint %I', c.t, c.conname);
                    end loop;
                end $$",
            )
            .await;
        let mut writes = vec![
            ("bids", format!("insert into bids (art_id, amount) values ('{PERSON}', 5)")),
            ("art", format!("insert into art (event_id, round) values ('{PERSON}', 5)")),
        ];
        if database.shape == Shape::Production {
            let contestant =
                format!("insert into round_contestants (round_id) values ('{PERSON}')");
            writes.push(("round_contestants", contestant));
        }
        for (table, sql) in writes {
            database.run("truncate tidegate.trigger_failures").await;
            assert_eq!(database.told(&sql).await, json!([]));
            assert_eq!(
                database.failures().await,
                format!("{table}|INSERT||P0002|the event of the row was not found")
            );
        }
    }
}

#[tokio::test]
async fn the_statistics_count_the_history() {
    for mut database in Database::both().await {
        database.run("truncate tidegate.broadcast_history").await;
        let columns = "select event_eid, table_name, operation, count, last_invalidation";
        assert_eq!(
            database.run(&format!("{columns} from get_cache_invalidation_stats()")).await,
            ""
        );
        database
            .told(&format!(
                "{} {} {} {}",
                bid(ART, 1),
                bid(ART_WITHOUT_EASEL, 2),
                bid(OTHER_ART, 3),
                database.shape.vote()
            ))
            .await;
        database
            .run(
                "update tidegate.broadcast_history set at = at - interval '61 minutes'
                where type = 'vote_cast';
                update tidegate.broadcast_history set at = at - interval '59 minutes'
                where eid = 'AB3029'",
            )
            .await;
        let here = "AB3028|bids|INSERT|2";
        let there = "AB3029|bids|INSERT|1";
        for (arguments, counted) in [
            ("", format!("{here}\n{there}")),
            ("'AB3028'", here.to_owned()),
            ("'AB3028', 62", format!("{here}\nAB3028|votes|INSERT|1")),
            ("p_minutes_back => 62", format!("{here}\n{there}\nAB3028|votes|INSERT|1")),
            ("p_minutes_back => 58", here.to_owned()),
            ("'AB3028', 0", String::new()),
            ("'AB1'", String::new()),
            ("null, null", String::new()),
        ] {
            let sql = format!(
                "select event_eid, table_name, operation, count from get_cache_invalidation_stats({arguments})"
            );
            assert_eq!(database.run(&sql).await, counted, "{arguments}");
        }
        let last = "select last_invalidation = (select max(at) from tidegate.broadcast_history)
            from get_cache_invalidation_stats('AB3028')";
        assert_eq!(database.run(last).await, "t");
    }
}

#[tokio::test]
async fn the_history_is_forgotten_in_batches_the_oldest_first() {
    let database = Database::start(Shape::Production).await;
    database
        .run(
            "truncate tidegate.broadcast_history restart identity;
            insert into tidegate.broadcast_history (eid, endpoints, payload, at)
            select 'AB3028', '{}', '{}', now() - make_interval(hours => 80 - n)
            from generate_series(1, 20) n",
        )
        .await;
    let left = "min(id) || '-' || max(id) || ', ' || count(*)";
    let left = format!("select {left} from tidegate.broadcast_history");
    // Of 20 rows that are 79 to 60 hours old, 7 are older than 72.5.
    for (keep, limit, forgotten, kept) in [
        ("90 hours", 1000, "0", "1-20, 20"),
        ("72.5 hours", 5, "5", "6-20, 15"),
        ("72.5 hours", 5, "2", "8-20, 13"),
        ("72.5 hours", 5, "0", "8-20, 13"),
        ("1 hour", 0, "0", "8-20, 13"),
    ] {
        let forget = format!("select tidegate.forget_history('{keep}', {limit})");
        assert_eq!(database.run(&forget).await, forgotten);
        assert_eq!(database.run(&left).await, kept);
    }
    // What another session deletes is skipped and not waited for.
    let mut other = database.connect().await;
    let mut transaction = other.begin().await.unwrap();
    let sql = "delete from tidegate.broadcast_history where id < 10";
    sqlx::raw_sql(sql).execute(&mut *transaction).await.unwrap();
    let forget = "set role tidegate_test; select tidegate.forget_history('1 hour')";
    database
        .run(
            "create role tidegate_test; grant usage on schema tidegate to tidegate_test;
            grant execute on function tidegate.forget_history(interval, int) to tidegate_test",
        )
        .await;
    assert_eq!(database.run(forget).await, "11");
    transaction.rollback().await.unwrap();
    assert_eq!(database.run(&left).await, "8-9, 2");
    for wrong in ["null", "'-1 hour'"] {
        let error = database.try_run(&format!("select tidegate.forget_history({wrong})")).await;
        assert!(error.unwrap_err().to_string().contains("an interval of time"), "{wrong}");
    }
    assert_eq!(database.run(&left).await, "8-9, 2");
}

#[tokio::test]
async fn what_is_uninstalled_is_gone_and_can_be_installed_again() {
    let cluster = Cluster::start().await.unwrap();
    let uninstall = migration("uninstall.sql");
    for shape in Shape::BOTH {
        let name = shape.database();
        cluster.create_database(name).await.unwrap();
        cluster.psql_file(name, &shape.tables()).await.unwrap();
        // What an older system has left is not ours.
        let old = "create function manual_cache_invalidation(a int) returns int language sql as 'select 1'";
        let ours = "select count(*) from (
                select oid from pg_proc where pronamespace = 'public'::regnamespace
                union all select oid from pg_trigger where not tgisinternal
                union all select oid from pg_namespace where nspname in ('tidegate', 'realtime')
            ) as ours";
        let before = cluster.psql(name, ours).await.unwrap();
        for _ in 0..2 {
            for file in [
                "schema/0001_gateway_schema.sql",
                "schema/0002_broadcast_history.sql",
                "schema/0003_gateways.sql",
                "schema/0004_private_channels.sql",
            ] {
                cluster.psql_file(name, &migration(file)).await.unwrap();
            }
            cluster.psql_file(name, &system_file()).await.unwrap();
            cluster
                .psql(name, "insert into events (eid) values (null); update events set eid = eid")
                .await
                .unwrap();
            for again in [false, true] {
                let mut command = cluster.psql_command(name);
                let output = command.arg("-f").arg(&uninstall).output().await.unwrap();
                let notices = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{notices}");
                assert!(notices.contains("role tidegate is left"), "{again}: {notices}");
                assert_eq!(cluster.psql(name, ours).await.unwrap(), before);
            }
            cluster.psql(name, "update events set eid = eid").await.unwrap();
        }
        cluster.psql(name, old).await.unwrap();
        cluster.psql_file(name, &uninstall).await.unwrap();
        assert_eq!(cluster.psql(name, "select manual_cache_invalidation(1)").await.unwrap(), "1");
    }
    // Nothing of ours holds the role.
    cluster.psql("postgres", "drop role tidegate").await.unwrap();
}
