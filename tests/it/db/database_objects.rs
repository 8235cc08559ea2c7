//! The triggers and functions that `migrations/` creates, on both shapes of the tables: what they
//! notify, whom they let in, and that no write ever fails because of them.

use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};
use tidegate::demo::cluster::Cluster;

use crate::support::system::{
    ART, ART_WITHOUT_EASEL, Database, EVENT, OTHER_ART, OTHER_EVENT, PERSON, ROUND, SECOND_ART,
    Shape, art_updated, bid, bid_placed, media_updated, migration, rename_event, stats,
    system_file, viewers, vote_cast,
};

#[tokio::test]
async fn each_write_notifies_its_event_and_the_monitoring_channel() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let easel = shape.easel();
        let media = shape.media_column();

        for (sql, operation) in [
            (shape.vote(), "INSERT"),
            ("update votes set round = 2".to_owned(), "UPDATE"),
            ("delete from votes".to_owned(), "DELETE"),
        ] {
            assert_eq!(
                database.told(&sql).await,
                json!([viewers("AB3028", &vote_cast(easel)), stats("AB3028", "votes", operation)])
            );
        }
        for (sql, operation, amount) in [
            (bid(ART, 250), "INSERT", 250),
            ("update bids set amount = 260".to_owned(), "UPDATE", 260),
        ] {
            assert_eq!(
                database.told(&sql).await,
                json!([
                    viewers("AB3028", &bid_placed(easel, amount)),
                    stats("AB3028", "bids", operation)
                ])
            );
        }
        for (sql, operation) in [
            (format!("insert into art_media ({media}) values ('{ART}')"), "INSERT"),
            ("update art_media set media_id = gen_random_uuid()".to_owned(), "UPDATE"),
            ("delete from art_media".to_owned(), "DELETE"),
        ] {
            assert_eq!(
                database.told(&sql).await,
                json!([
                    viewers("AB3028", &media_updated(shape)),
                    stats("AB3028", "art_media", operation)
                ])
            );
        }
        assert_eq!(
            database.told(&format!("update art set current_bid = 1 where id = '{ART}'")).await,
            json!([viewers("AB3028", &art_updated(easel)), stats("AB3028", "art", "UPDATE")])
        );
        let new = "00000000-0000-4000-8000-0000000000a9";
        let mut payload = art_updated("7");
        payload["art_id"] = json!(new);
        payload["endpoints"] = json!([
            "/live/event/AB3028",
            "/live/event/AB3028/media",
            "/live/event/AB3028-2-7/bids"
        ]);
        let sql = format!(
            "insert into art (id, event_id, round, easel) values ('{new}', '{EVENT}', 2, '7')"
        );
        assert_eq!(
            database.told(&sql).await,
            json!([viewers("AB3028", &payload), stats("AB3028", "art", "INSERT")])
        );
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn a_write_that_is_rolled_back_or_concerns_no_event_notifies_nobody() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let vote = shape.vote();
        assert_eq!(database.told(&format!("begin; {vote} rollback;")).await, json!([]));
        assert_eq!(
            database.told("insert into art (round, easel) values (1, '1')").await,
            json!([])
        );
        assert_eq!(
            database
                .told("insert into bids (amount) values (1); insert into votes default values")
                .await,
            json!([])
        );
        // Nobody was to be told, so that nothing failed.
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn an_artwork_that_becomes_sold_names_its_winner_once() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let easel = shape.easel();
        database.told(&format!("{}{}", bid(ART, 100), bid(ART, 250))).await;
        let sell = format!("update art set status = 'sold' where id = '{ART}'");
        let production = shape == Shape::Production;
        let sale = json!(["auction_winner_AB3028", {
            "type": "auction_status_change", "event_eid": "AB3028", "art_id": ART,
            "art_code": production.then_some("AB3028-2-3"),
            "old_status": "active", "new_status": "sold",
            "is_winning_bidder": true, "winning_amount": 250,
            "currency": production.then_some("USD"),
            "winner_person_id": PERSON, "winner_nickname": production.then_some("Vermeer"),
        }]);
        assert_eq!(
            database.told_viewers(&sell).await,
            json!([viewers("AB3028", &art_updated(easel)), sale])
        );
        // It is sold already, so that no viewer learns of a second winner.
        assert_eq!(
            database.told_viewers(&sell).await,
            json!([viewers("AB3028", &art_updated(easel))])
        );
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn every_artwork_of_one_transaction_is_told_with_a_timestamp_of_its_own() {
    // Postgres drops equal notifications of a transaction, and clients drop equal timestamps.
    for mut database in Database::both().await {
        database
            .run(&format!(
                "begin; {}
                update art set current_bid = 5 where id = '{ART}';
                update art set current_bid = 5 where id = '{ART}';
                commit;",
                bid(ART, 5)
            ))
            .await;
        let mut timestamps = Vec::new();
        for (channel, payload) in database.heard_until_marker().await {
            if channel == "cache_invalidate_AB3028" {
                timestamps.push(payload["timestamp"].to_string());
            }
        }
        let count = timestamps.len();
        timestamps.sort_unstable();
        timestamps.dedup();
        assert_eq!((count, timestamps.len()), (3, 3));
    }
}

#[tokio::test]
async fn a_row_that_moves_tells_both_places() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let move_art = format!("update art set event_id = '{OTHER_EVENT}' where id = '{ART}'");
        let told = database.told_viewers(&move_art).await;
        assert_eq!(told[0][0], "cache_invalidate_AB3029");
        assert_eq!(
            told[0][1]["endpoints"],
            json!(["/live/event/AB3029", "/live/event/AB3029/media"])
        );
        assert_eq!(told[1], viewers("AB3028", &art_updated(shape.easel())));
        assert_eq!(told.as_array().unwrap().len(), 2);

        // Within an event one message names the bids of both artworks, and nothing twice.
        database.told(&bid(SECOND_ART, 5)).await;
        let told =
            database.told_viewers(&format!("update bids set art_id = '{ART_WITHOUT_EASEL}'")).await;
        assert_eq!(told.as_array().unwrap().len(), 1);
        assert_eq!(
            told[0][1]["endpoints"],
            json!(["/live/event/AB3028", "/live/event/AB3028-2-9/bids"])
        );
        let told = database.told_viewers(&format!("update bids set art_id = '{OTHER_ART}'")).await;
        assert_eq!(told[0][0], "cache_invalidate_AB3029");
        assert_eq!(told[1][0], "cache_invalidate_AB3028");

        // A row that leaves every event tells the one that it left.
        let told = database.told_viewers("update bids set art_id = null").await;
        assert_eq!(told.as_array().unwrap().len(), 1);
        assert_eq!(told[0][0], "cache_invalidate_AB3029");
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn a_bid_without_an_easel_invalidates_the_event_and_no_null() {
    for mut database in Database::both().await {
        let told = database.told_viewers(&bid(ART_WITHOUT_EASEL, 7)).await;
        let payload = json!({
            "type": "bid_placed", "event_eid": "AB3028", "endpoints": ["/live/event/AB3028"],
            "art_id": ART_WITHOUT_EASEL, "round": 2, "easel": null, "amount": 7,
        });
        assert_eq!(told, json!([viewers("AB3028", &payload)]));
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn no_missing_column_or_table_fails_a_write() {
    for database in Database::both().await {
        let shape = database.shape;
        let columns = database
            .run(
                "select table_name, column_name from information_schema.columns
                where table_schema = 'public'",
            )
            .await;
        let tables = written_tables(shape);
        let mut script = String::new();
        let mut count = 0;
        for (table, column) in columns.lines().map(|line| line.split_once('|').unwrap()) {
            script += &format!(
                "begin; alter table {table} drop column {column} cascade; {} rollback;",
                writes_whatever_the_columns(&tables, table, column)
            );
            count += 1;
        }
        assert!(count > 20, "{columns}");
        let written = database.run(&script).await;
        let each = vec!["1"; tables.len()].join("|") + "\n";
        assert_eq!(written, each.repeat(count).trim_end(), "{shape:?}");

        for table in ["events", "bids"] {
            database
                .run(&format!("begin; drop table {table} cascade; {} rollback", shape.vote()))
                .await;
        }
        let bid = bid(ART, 9);
        database
            .run(&format!(
                "alter table bids drop constraint bids_art_id_fkey;
                begin; drop table art cascade; {bid} rollback;"
            ))
            .await;
    }
}

/// The tables of a shape whose rows come and go, those that others refer to first.
fn written_tables(shape: Shape) -> Vec<&'static str> {
    shape.triggers().iter().map(|(table, ..)| *table).filter(|table| *table != "events").collect()
}

/// Inserts into, updates and deletes from the tables, whichever columns they have, and gives how
/// many rows each has got.
fn writes_whatever_the_columns(
    tables: &[&str],
    dropped_table: &str,
    dropped_column: &str,
) -> String {
    let id = "00000000-0000-4000-8000-0000000000f1";
    let row = json!({
        "id": id, "created_at": "2025-08-18", "updated_at": "2025-08-18", "status": "active",
        "event_id": EVENT, "eid": "AB3028", "round": 2, "easel": "3", "art_id": ART,
        "art_uuid": ART, "artwork_id": ART, "person_id": PERSON, "amount": 5, "vote_factor": 1,
        "currency_code": "USD", "is_primary": true, "display_order": 1, "bid_count": 0,
        "vote_count": 0, "winner_id": null, "currency": "USD", "is_winner": false,
        "round_id": ROUND,
    });
    let (mut sql, mut counts, mut deletes) = (String::new(), Vec::new(), String::new());
    for table in tables {
        let kept = if *table == dropped_table && dropped_column == "created_at" {
            "id"
        } else {
            "created_at"
        };
        sql += &format!(
            "create temp table new_{table} on commit drop as
                select (jsonb_populate_record(null::public.{table}, '{row}')).*;
            with written as (insert into public.{table} select * from new_{table} returning 1)
                select count(*) as {table} from written \\gset
            update public.{table} set {kept} = {kept};"
        );
        counts.push(format!(":{table}"));
        deletes = format!("delete from public.{table};{deletes}");
    }
    for (table, status) in [("art", "sold"), ("payment_processing", "completed")] {
        if tables.contains(&table) && (dropped_table, dropped_column) != (table, "status") {
            sql += &format!("update public.{table} set status = '{status}';");
        }
    }
    let kept = if (dropped_table, dropped_column) == ("events", "created_at") {
        "id"
    } else {
        "created_at"
    };
    sql += &format!("update public.events set {kept} = {kept};");
    format!("{sql} select {}; {deletes}", counts.join(", "))
}

#[tokio::test]
async fn no_value_of_any_column_fails_a_write_or_is_recorded() {
    for database in Database::both().await {
        // Every column is a text, so that it can hold anything: first those of the rows that are
        // written, so that looking their references up fails, then those of the events too.
        let written = written_tables(database.shape).join(",");
        let referred = if database.shape == Shape::Seed { "events" } else { "events,rounds" };
        let all = format!("{written},events");
        for (tables, written) in [(&*written, &*written), (referred, &*all)] {
            database
                .run(&format!(
                    "do $$ declare t text; c text; begin
                        foreach t in array string_to_array('{tables}', ',') loop
                            select string_agg(format('%I text', column_name), ', ') into c
                            from information_schema.columns
                            where table_schema = 'public' and table_name = t;
                            execute format('drop table public.%I cascade', t);
                            execute format('create table public.%I (%s)', t, c);
                        end loop;
                    end $$;
                    select enable_cache_invalidation();"
                ))
                .await;
            for value in [
                "sec ret",
                "",
                "\\u0001sec ret",
                "null",
                EVENT,
                "sold",
                "-1e999",
                &"sec ret".repeat(3000),
            ] {
                for table in written.split(',') {
                    database
                        .run(&format!(
                            "insert into {table} select (jsonb_populate_record(null::{table}, (
                                select jsonb_object_agg(attname, e'{value}') from pg_attribute
                                where attrelid = '{table}'::regclass and attnum > 0))).*;
                            update {table} set id = 'sec ret', created_at = 'sec ret';
                            {}",
                            match table {
                                "art" => "update art set status = 'sold'",
                                "payment_processing" =>
                                    "update payment_processing set status = 'failed'",
                                _ => "",
                            }
                        ))
                        .await;
                }
            }
        }
        database.run("delete from votes; delete from art_media;").await;
        let failures = database.failures().await;
        assert!(failures.contains("22P02|looking up the event\n"), "{failures}");
        // What names our objects and no data is kept.
        assert!(failures.contains("42883|looking up the event: operator does not"), "{failures}");
        assert!(!failures.contains("sec ret"), "{failures}");
    }
}

#[tokio::test]
async fn an_event_that_no_channel_can_be_named_after_is_recorded() {
    for mut database in Database::both().await {
        // 63 bytes is the longest name of a channel, 17 of them before the event's.
        let longest = "A".repeat(46);
        let too_long = "A".repeat(47);
        database.listener.listen(&format!("cache_invalidate_{longest}")).await.unwrap();
        let told = database
            .told_viewers(&format!(
                "{} update art set current_bid = 3 where id = '{ART}';",
                rename_event(&longest)
            ))
            .await;
        assert_eq!(told[0][0], format!("cache_invalidate_{longest}"));
        assert_eq!(database.failures().await, "");

        for (eid, recorded) in [(too_long.as_str(), too_long.as_str()), ("AB 30", ""), ("Ä1", "")]
        {
            database.run("truncate tidegate.trigger_failures").await;
            let told = database
                .told(&format!(
                    "{} update art set current_bid = 4 where id = '{ART}';",
                    rename_event(eid)
                ))
                .await;
            assert_eq!(told, json!([]));
            let reason =
                "no channel can be named after this event: 1 to 46 letters, digits and hyphens";
            assert_eq!(database.failures().await, format!("art|UPDATE|{recorded}|22023|{reason}"));
        }
    }
}

#[tokio::test]
async fn a_payload_of_8000_bytes_becomes_a_pointer() {
    for mut database in Database::both().await {
        let shape = database.shape;
        // What a payload has besides the round; neither the stamp's nor this id's length varies.
        database
            .told(&format!(
                "alter table votes alter round type text;
                alter table tidegate.broadcast_history alter column id restart with 1000; {}",
                shape.vote()
            ))
            .await;
        let set_round = |length: usize| format!("update votes set round = repeat('r', {length})");
        database.told(&set_round(1000)).await;
        let length = "select octet_length(payload) from tidegate.broadcast_history
            order by id desc limit 1";
        let rest = database.run(length).await.parse::<usize>().unwrap() - 1000;

        let mut longest = vote_cast(shape.easel());
        longest["round"] = json!("r".repeat(7999 - rest));
        let told = database.told_viewers(&set_round(7999 - rest)).await;
        assert_eq!(told, json!([viewers("AB3028", &longest)]));
        assert_eq!(database.failures().await, "");

        let pointer = json!({
            "type": "vote_cast", "event_eid": "AB3028", "pointer": true,
            "endpoints": ["/live/event/AB3028", "/live/event/AB3028/media"],
        });
        for (length, size) in [(8000 - rest, 8000), (20_000 - rest, 20_000)] {
            database.run("truncate tidegate.trigger_failures").await;
            let told = database.told_viewers(&set_round(length)).await;
            assert_eq!(told, json!([viewers("AB3028", &pointer)]));
            let replaced = format!("a payload of {size} bytes was replaced by a pointer");
            assert_eq!(database.failures().await, format!("votes|UPDATE|AB3028|22023|{replaced}"));
        }
    }
}

#[tokio::test]
async fn a_queue_that_is_more_than_half_full_is_spared() {
    // Filling the real queue takes gigabytes, so that another function answers in its place.
    for mut database in Database::both().await {
        let shape = database.shape;
        let usage = |value: &str| {
            format!(
                "create or replace function pg_catalog.pg_notification_queue_usage()
                returns double precision language sql as 'select {value}::double precision';"
            )
        };
        database
            .run("alter function pg_catalog.pg_notification_queue_usage() rename to real_usage")
            .await;
        database.run("truncate tidegate.broadcast_history").await;
        database.run(&usage("0.5")).await;
        let told = database.told_viewers(&shape.vote()).await;
        assert_eq!(told, json!([viewers("AB3028", &vote_cast(shape.easel()))]));

        database.run(&usage("0.51")).await;
        assert_eq!(database.told(&bid(ART, 5)).await, json!([]));
        let full = "bids|INSERT|AB3028|53000|the notification queue is more than half full";
        assert_eq!(database.failures().await, format!("{full}\n{full}"));
        // The history has what nobody was told.
        assert_eq!(
            database.history("payload::jsonb ->> 'type', payload::jsonb ->> 'amount'").await,
            "vote_cast|\nbid_placed|5"
        );
        let error = database.try_run("select manual_cache_invalidation('AB3028')").await;
        assert!(error.unwrap_err().to_string().contains("more than half full"));
    }
}

/// A session plans the reading of a row once, and goes on by that plan for hours.
#[tokio::test]
async fn a_session_tells_all_the_same_after_a_columns_type_has_changed() {
    for mut database in Database::both().await {
        assert_ne!(database.told(&bid(ART, 5)).await, json!([]));
        let mut other = database.connect().await;
        other.execute("alter table bids alter column amount type double precision").await.unwrap();
        for amount in [6, 7] {
            let told = database.told_viewers(&bid(ART, amount)).await;
            let expected = bid_placed(database.shape.easel(), amount);
            assert_eq!(told, json!([viewers("AB3028", &expected)]));
        }
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn a_locked_table_delays_a_write_by_50_ms_and_is_recorded() {
    for mut database in Database::both().await {
        // Without foreign keys, whose own checks wait for the same lock.
        database
            .run(
                "do $$ declare c record; begin
                    for c in select conname, conrelid::regclass as t from pg_constraint where contype = 'f' loop
                        execute format('alter table %s drop constraint %I', c.t, c.conname);
                    end loop;
                end $$",
            )
            .await;
        for locked in ["art", "events"] {
            let mut other = database.connect().await;
            let mut transaction = other.begin().await.unwrap();
            let lock = sqlx::AssertSqlSafe(format!("lock table {locked} in access exclusive mode"));
            sqlx::raw_sql(lock).execute(&mut *transaction).await.unwrap();
            // The write ends while the lock is held; without a limit it would hit the time-out.
            let sql = format!("set statement_timeout = '20s'; {}", bid(ART, 5));
            assert_eq!(database.told(&sql).await, json!([]));
            transaction.rollback().await.unwrap();
        }
        assert_eq!(
            database.failures().await,
            "bids|INSERT||55P03|looking up the artwork: canceling statement due to lock timeout\n\
            bids|INSERT||55P03|looking up the event: canceling statement due to lock timeout"
        );

        // A locked table of failures loses the failure, not the write.
        database.run("alter table events rename to no_events").await;
        let mut other = database.connect().await;
        let mut transaction = other.begin().await.unwrap();
        let lock = "lock table tidegate.trigger_failures in access exclusive mode";
        sqlx::raw_sql(lock).execute(&mut *transaction).await.unwrap();
        let sql = format!("set statement_timeout = '20s'; {}", bid(ART, 6));
        database.run(&sql).await;
        transaction.rollback().await.unwrap();
        assert_eq!(database.run("select count(*) from bids").await, "3");
    }
}

#[tokio::test]
async fn a_write_survives_the_loss_of_each_of_our_own_objects() {
    for database in Database::both().await {
        let shape = database.shape;
        let functions = database
            .run(
                "select p.oid::regprocedure from pg_proc p
                where pronamespace = 'tidegate'::regnamespace and prorettype <> 'trigger'::regtype",
            )
            .await;
        assert!(functions.lines().count() >= 12, "{functions}");
        let mut losses = vec![
            "drop table tidegate.trigger_failures".to_owned(),
            "drop table tidegate.broadcast_history".to_owned(),
        ];
        losses.extend(functions.lines().map(|function| format!("drop function {function}")));
        for loss in losses {
            let written = database
                .run(&format!(
                    "begin; {loss};
                    {} {} update art set status = 'sold';
                    insert into bids (art_id) values (null);
                    update events set eid = 'not an event' where id = '{EVENT}'; update bids set amount = 6;
                    select (select count(*) from votes), (select count(*) from bids);
                    rollback;",
                    shape.vote(),
                    bid(ART, 5)
                ))
                .await;
            assert_eq!(written, "1|2", "{loss}");
        }
    }
}

#[tokio::test]
async fn failures_are_bounded_per_transaction_and_in_all() {
    let database = Database::start(Shape::Seed).await;
    database.run(&rename_event("not an event")).await;
    let many = |count: u32| {
        format!(
            "insert into bids (art_id, amount) select '{ART}', n from generate_series(1, {count}) n;"
        )
    };
    let count = "select count(*) from tidegate.trigger_failures";
    database.run(&many(9)).await;
    assert_eq!(database.run(count).await, "9");
    database.run(&many(11)).await;
    assert_eq!(database.run(count).await, "19");
    database
        .run(&format!("do $$ begin for i in 1..200 loop {} commit; end loop; end $$", many(11)))
        .await;
    let left: u32 = database.run(count).await.parse().unwrap();
    assert!((1000..=1100).contains(&left), "{left}");
    // The newest are kept.
    let newest = "select max(id) = (select last_value from tidegate.trigger_failures_id_seq)
        from tidegate.trigger_failures";
    assert_eq!(database.run(newest).await, "t");
    assert_eq!(database.run("select count(*) from bids").await, "2220");
}

/// By it a gateway tells failures that it has looked into from those that it has not.
#[tokio::test]
async fn a_failure_names_its_transaction_also_in_a_table_of_before() {
    let database = Database::start(Shape::Seed).await;
    database.run(&rename_event("not an event")).await;
    let failing = format!("begin; {} select pg_current_xact_id(); commit;", bid(ART, 1));
    let newest = "select xact from tidegate.trigger_failures order by id desc limit 1";
    let xact = database.run(&failing).await;
    assert_eq!(database.run(newest).await, xact);

    // A file of before has made the table, and rows in it.
    database.run("alter table tidegate.trigger_failures drop column xact").await;
    for rows in [1, 2] {
        database.cluster.psql_file("seed", &system_file()).await.unwrap();
        let is_known = "select count(*), bool_and(xact is not null) from tidegate.trigger_failures";
        assert_eq!(database.run(is_known).await, format!("{rows}|t"));
        let xact = database.run(&failing).await;
        assert_eq!(database.run(newest).await, xact);
    }
}

#[tokio::test]
async fn a_hostile_search_path_changes_nothing() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let vote = shape.vote().replace("into votes", "into public.votes");
        let told = database
            .told_viewers(&format!(
                "create schema evil;
                create table evil.events as select id, 'EVIL'::text as eid from public.events;
                create table evil.art as select * from public.art;
                create function evil.pg_notify(text, text) returns void language plpgsql
                    as 'begin raise exception ''evil''; end';
                create function evil.to_jsonb(anyelement) returns jsonb language plpgsql
                    as 'begin raise exception ''evil''; end';
                create function evil.member(jsonb, text) returns text language plpgsql
                    as 'begin raise exception ''evil''; end';
                create operator evil.->> (leftarg = jsonb, rightarg = text, function = evil.member);
                set search_path = evil, pg_catalog, public;
                {vote}"
            ))
            .await;
        assert_eq!(told, json!([viewers("AB3028", &vote_cast(shape.easel()))]));
        assert_eq!(database.failures().await, "");
        let unpinned = "select p.oid::regprocedure from pg_proc p
            where pronamespace in ('tidegate'::regnamespace, 'public'::regnamespace)
                and not coalesce('search_path=\"\"' = any (proconfig), false)";
        assert_eq!(database.run(unpinned).await, "");
    }
}

/// The roles of a Supabase database, and its habit of granting every new function to all of them.
const SUPABASE_ROLES: &str = "
    create role anon; create role authenticated; create role service_role; create role tidegate login;
    grant usage on schema public to anon, authenticated, service_role;
    alter default privileges in schema public
        grant all on functions to anon, authenticated, service_role;
    create schema tidegate;
    alter default privileges in schema tidegate grant all on tables to anon, authenticated;
    alter default privileges in schema tidegate grant all on functions to anon, authenticated;
    grant usage on schema tidegate to anon, authenticated;";

#[tokio::test]
async fn browsers_are_denied_every_function_and_table() {
    let cluster = Cluster::start().await.unwrap();
    for shape in Shape::BOTH {
        let name = shape.database();
        cluster.create_database(name).await.unwrap();
        let roles = if shape == Shape::Seed { SUPABASE_ROLES } else { "" };
        cluster.psql(name, roles).await.unwrap();
        cluster.psql_file(name, &shape.tables()).await.unwrap();
        let before = "select p.oid::regprocedure from pg_proc p
            where pronamespace in (select oid from pg_namespace where nspname in ('public', 'tidegate'))";
        assert_eq!(cluster.psql(name, before).await.unwrap(), "");
        for file in [
            migration("schema/0001_gateway_schema.sql"),
            system_file(),
            migration("schema/0003_gateways.sql"),
            migration("schema/0004_private_channels.sql"),
        ] {
            cluster.psql_file(name, &file).await.unwrap();
        }

        let calls = cluster
            .psql(
                name,
                "select format('select %s.%I(%s)', pronamespace::regnamespace, proname,
                    (select string_agg('null::' || format_type(t, null), ', ') from unnest(proargtypes) t))
                from pg_proc p
                where pronamespace in ('public'::regnamespace, 'tidegate'::regnamespace)
                union all
                select format('select from %s', c.oid::regclass) from pg_class c
                where relnamespace = 'tidegate'::regnamespace and relkind in ('r', 'v', 'm', 'S')",
            )
            .await
            .unwrap();
        assert!(calls.lines().count() >= 26, "{calls}");
        for role in ["anon", "authenticated"] {
            for call in calls.lines() {
                let sql = format!("\\set VERBOSITY sqlstate\nset role {role}; {call}");
                let error = cluster.psql(name, &sql).await.expect_err(call).to_string();
                assert!(error.contains("42501"), "{role}: {call}: {error}");
            }
            // Not only because the schema is closed.
            let open = format!(
                "select p.oid::regprocedure::text from pg_proc p
                where pronamespace in ('public'::regnamespace, 'tidegate'::regnamespace)
                    and has_function_privilege('{role}', p.oid, 'execute')
                union all
                select c.oid::regclass::text from pg_class c
                where relnamespace = 'tidegate'::regnamespace and relkind in ('r', 'S')
                    and has_table_privilege('{role}', c.oid, 'select, insert, update, delete, truncate')
                union all
                select 'tidegate' where has_schema_privilege('{role}', 'tidegate', 'usage')"
            );
            assert_eq!(cluster.psql(name, &open).await.unwrap(), "");
        }
    }
}

#[tokio::test]
async fn the_gateway_and_server_code_may_what_they_need_and_no_more() {
    let cluster = Cluster::start().await.unwrap();
    let name = "production";
    cluster.create_database(name).await.unwrap();
    cluster.psql(name, SUPABASE_ROLES).await.unwrap();
    cluster.psql_file(name, &Shape::Production.tables()).await.unwrap();
    cluster.psql_file(name, &system_file()).await.unwrap();
    cluster.psql_file(name, &migration("schema/0003_gateways.sql")).await.unwrap();
    let run = async |role: &str, sql: &str| {
        cluster.psql(name, &format!("set role {role}; {sql}")).await.map_err(|e| e.to_string())
    };
    for role in ["tidegate", "service_role"] {
        let sent = run(role, "select manual_cache_invalidation('AB3028')").await.unwrap();
        assert!(sent.contains("manual_invalidation"), "{sent}");
        // These run with the rights of who calls them, and neither owns the tables.
        run(role, "select disable_cache_invalidation()").await.unwrap_err();
        run(role, "drop trigger cache_invalidate_art_trigger on art").await.unwrap_err();
    }
    run("tidegate", "select * from tidegate.event_endpoints('AB3028')").await.unwrap();
    run("tidegate", "select * from tidegate.known_events(10)").await.unwrap();
    run("service_role", "select * from tidegate.known_events(10)").await.unwrap_err();
    run("tidegate", "select * from tidegate.trigger_failures").await.unwrap();
    for role in ["tidegate", "service_role"] {
        run(role, "select * from get_cache_invalidation_stats('AB3028', 60)").await.unwrap();
    }
    run("tidegate", "select payload from tidegate.broadcast_history").await.unwrap();
    for table in ["broadcast_history", "trigger_failures"] {
        // Whoever may lock one of these holds up every write that has a trigger.
        for mode in ["access exclusive", "share", "row exclusive", "row share"] {
            let lock = format!("begin; lock table tidegate.{table} in {mode} mode");
            let error = run("tidegate", &lock).await.unwrap_err();
            assert!(error.contains("permission denied"), "{lock}: {error}");
        }
        let delete = format!("delete from tidegate.{table} where id = 0");
        run("tidegate", &delete).await.unwrap_err();
    }
    run("tidegate", "select tidegate.forget_history('72 hours')").await.unwrap();
    run("tidegate", "update tidegate.broadcast_history set payload = ''").await.unwrap_err();
    run("service_role", "select * from tidegate.broadcast_history").await.unwrap_err();
    run("service_role", "select tidegate.forget_history('72 hours')").await.unwrap_err();
    let id = "gen_random_uuid()";
    for (table, row, key) in [
        ("gateways", format!("(id) values ({id})"), "seen_at"),
        (
            "lost_sockets",
            format!("(gateway, client, topic, last_data_at) values ({id}, {id}, 'a', now())"),
            "at",
        ),
        ("recent_topics", "(topic) values ('a')".to_owned(), "seen_at"),
    ] {
        let insert = format!("insert into tidegate.{table} {row}");
        run("tidegate", &insert).await.unwrap();
        let update = format!("update tidegate.{table} set {key} = {key} returning {key}");
        assert_ne!(run("tidegate", &update).await.unwrap(), "", "{table}");
        let delete = format!("delete from tidegate.{table} where {key} <= now() returning 'gone'");
        assert_eq!(run("tidegate", &delete).await.unwrap(), "gone", "{table}");
        run("tidegate", &format!("truncate tidegate.{table}")).await.unwrap_err();
        run("service_role", &insert).await.unwrap_err();
        run("service_role", &format!("select * from tidegate.{table}")).await.unwrap_err();
    }
    run("tidegate", "select * from art").await.unwrap_err();
    run("tidegate", "create table tidegate.mine (id int)").await.unwrap_err();
    run("service_role", "select * from tidegate.trigger_failures").await.unwrap_err();
}

#[tokio::test]
async fn a_browser_that_may_vote_needs_no_right_of_ours() {
    let databases = Database::both().await;
    databases[0].run("create role anon").await;
    for mut database in databases {
        let shape = database.shape;
        let told = database
            .told_viewers(&format!(
                "grant insert on votes to anon; set role anon; {}",
                shape.vote()
            ))
            .await;
        assert_eq!(told, json!([viewers("AB3028", &vote_cast(shape.easel()))]));
        assert_eq!(database.failures().await, "");
    }
}

#[tokio::test]
async fn the_system_file_runs_again_and_again_as_the_owner_of_the_tables() {
    let cluster = Cluster::start().await.unwrap();
    cluster.psql("postgres", "create role app login createrole").await.unwrap();
    for shape in Shape::BOTH {
        let name = shape.database();
        cluster.psql("postgres", &format!("create database {name} owner app")).await.unwrap();
        let system = system_file();
        let system = system.to_str().unwrap();
        let tables = shape.tables();
        let tables = tables.to_str().unwrap();
        // By psql, alone and within a transaction.
        let sql = format!(
            "grant create on schema public to app; set role app;
            \\i {tables}\n\\i {tables}\n\\i {system}\n\\i {system}\n
            begin;\n\\i {system}\ncommit;"
        );
        assert_eq!(cluster.psql(name, &sql).await.unwrap(), "");

        // As one string, the way the gateway runs it.
        let text = std::fs::read_to_string(system_file()).unwrap();
        let mut connection = PgConnection::connect(&cluster.url(name)).await.unwrap();
        connection.execute("set role app").await.unwrap();
        for _ in 0..2 {
            let text = sqlx::AssertSqlSafe(text.clone());
            sqlx::raw_sql(text).execute(&mut connection).await.unwrap();
        }
        let triggers = "select string_agg(tgname || ' ' || tgenabled::text, ',' order by tgname)
            from pg_trigger where tgname like 'cache_invalidate%'";
        let mut made: Vec<_> =
            shape.triggers().iter().map(|(_, trigger, _)| format!("{trigger} O")).collect();
        made.sort_unstable();
        assert_eq!(cluster.psql(name, triggers).await.unwrap(), made.join(","));
        let owners = "select distinct proowner::regrole from pg_proc
            where pronamespace in ('public'::regnamespace, 'tidegate'::regnamespace)";
        assert_eq!(cluster.psql(name, owners).await.unwrap(), "app");
    }
}

#[tokio::test]
async fn running_the_file_again_locks_no_table() {
    // A trigger that is right is left alone, so that a run in mid-auction waits for nobody.
    let database = Database::start(Shape::Production).await;
    let mut other = database.connect().await;
    let mut transaction = other.begin().await.unwrap();
    let mut tables: Vec<_> = database.shape.triggers().iter().map(|(table, ..)| *table).collect();
    tables.extend(["tidegate.broadcast_history", "tidegate.trigger_failures"]);
    let writes = format!("lock table {} in row exclusive mode", tables.join(", "));
    sqlx::raw_sql(sqlx::AssertSqlSafe(writes)).execute(&mut *transaction).await.unwrap();
    database.cluster.psql_file("production", &system_file()).await.unwrap();
    transaction.rollback().await.unwrap();
}

#[tokio::test]
async fn a_missing_table_is_skipped_with_a_notice() {
    let cluster = Cluster::start().await.unwrap();
    cluster.create_database("empty").await.unwrap();
    let run = async || {
        let mut command = cluster.psql_command("empty");
        let output = command.arg("-f").arg(system_file()).output().await.unwrap();
        let notices = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{notices}");
        notices
    };
    let notices = run().await;
    for (table, ..) in Shape::Production.triggers() {
        let notice =
            format!("table public.{table} does not exist: its cache invalidation is skipped");
        assert!(notices.contains(&notice), "{notices}");
    }
    // What exists is served, a view by our table's name is not mistaken for one.
    cluster
        .psql(
            "empty",
            "create table votes (id int, eid text); create view bids as select 1 as art_id;",
        )
        .await
        .unwrap();
    let notices = run().await;
    assert!(!notices.contains("public.votes"), "{notices}");
    assert!(notices.contains("public.bids"), "{notices}");
    cluster.psql("empty", "insert into votes values (1, 'AB3028')").await.unwrap();
    assert_eq!(
        cluster.psql("empty", "select count(*) from tidegate.trigger_failures").await.unwrap(),
        "0"
    );
    assert_eq!(
        cluster.psql("empty", "select * from tidegate.event_endpoints('AB3028')").await.unwrap(),
        "/live/event/AB3028\n/live/event/AB3028/media\n/live/event/AB3028/artists"
    );
    let known = "select count(*) from tidegate.known_events(9)";
    assert_eq!(cluster.psql("empty", known).await.unwrap(), "0");
}

#[tokio::test]
async fn the_gateway_schema_and_the_system_file_run_in_either_order() {
    let cluster = Cluster::start().await.unwrap();
    let schema = migration("schema/0001_gateway_schema.sql");
    let history = migration("schema/0002_broadcast_history.sql");
    let gateways = migration("schema/0003_gateways.sql");
    let read_only = migration("schema/0007_history_read_only.sql");
    let system = system_file();
    let rights = "select has_schema_privilege('tidegate', 'tidegate', 'usage'),
        has_function_privilege('tidegate', 'public.manual_cache_invalidation(text, text)', 'execute'),
        has_function_privilege('tidegate', 'tidegate.event_endpoints(text)', 'execute'),
        has_table_privilege('tidegate', 'tidegate.trigger_failures', 'select'),
        has_table_privilege('tidegate', 'tidegate.broadcast_history', 'select'),
        has_table_privilege('tidegate', 'tidegate.broadcast_history', 'insert, update, delete'),
        (select bool_and(has_table_privilege('tidegate', 'tidegate.' || name, action))
            from unnest(array['gateways', 'lost_sockets', 'recent_topics']) as name,
                unnest(array['select', 'insert', 'update', 'delete']) as action),
        (select rolsuper or rolcreaterole or rolcreatedb or rolbypassrls or not rolcanlogin
            from pg_roles where rolname = 'tidegate')";
    let mut shapes = Vec::new();
    for (name, files) in [
        ("system_first", [&system, &schema, &history, &gateways, &read_only]),
        ("schema_first", [&schema, &history, &gateways, &read_only, &system]),
        ("in_between", [&schema, &system, &history, &gateways, &read_only]),
    ] {
        // The role is the cluster's, so that each order has to make it itself.
        cluster.psql("postgres", "drop role if exists tidegate").await.unwrap();
        cluster.create_database(name).await.unwrap();
        for file in files {
            cluster.psql_file(name, file).await.unwrap();
        }
        assert_eq!(cluster.psql(name, rights).await.unwrap(), "t|t|t|t|t|f|t|f", "{name}");
        // A role that has lost its rights, or was made later, gets them from the system file alone.
        cluster.psql(name, "drop owned by tidegate").await.unwrap();
        cluster.psql_file(name, &system).await.unwrap();
        assert_eq!(cluster.psql(name, rights).await.unwrap(), "t|t|t|t|t|f|t|f", "{name}");
        // The two files make the same table.
        let table =
            "select string_agg(concat_ws(' ', attname, format_type(atttypid, null), attnotnull,
                attidentity, pg_get_expr(adbin, adrelid)), ',' order by attnum),
                (select string_agg(indexdef, ',' order by indexdef) from pg_indexes
                where tablename = 'broadcast_history')
            from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
            where attrelid = 'tidegate.broadcast_history'::regclass and attnum > 0";
        shapes.push(cluster.psql(name, table).await.unwrap());
        cluster.psql(name, "drop owned by tidegate").await.unwrap();
    }
    shapes.dedup();
    assert_eq!(shapes.len(), 1, "{shapes:#?}");
    // A role that may not make roles makes the schema, and says what is missing.
    cluster.psql("postgres", "drop role tidegate; create role app").await.unwrap();
    cluster.psql("postgres", "create database modest owner app").await.unwrap();
    let mut command = cluster.psql_command("modest");
    let output = command.args(["-c", "set role app", "-f"]).arg(&schema).output().await.unwrap();
    let notices = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{notices}");
    assert!(notices.contains("role tidegate not created"), "{notices}");
    let made = "select to_regnamespace('tidegate') is not null, to_regrole('tidegate') is null";
    assert_eq!(cluster.psql("modest", made).await.unwrap(), "t|t");
}

#[tokio::test]
async fn private_channels_are_opened_in_any_order_and_again_once_the_roles_are_there() {
    let cluster = Cluster::start().await.unwrap();
    let gateway = migration("schema/0001_gateway_schema.sql");
    let (private, system) = (migration("schema/0004_private_channels.sql"), system_file());
    let roles = "create role anon; create role authenticated; create role service_role bypassrls";
    let drop_all = "drop owned by tidegate, anon, authenticated, service_role;
        drop role tidegate, anon, authenticated, service_role";
    let opened = "select pg_has_role('tidegate', 'anon', 'member'),
        pg_has_role('tidegate', 'authenticated', 'member'),
        pg_has_role('tidegate', 'service_role', 'member'),
        (select rolinherit from pg_roles where rolname = 'tidegate'),
        has_function_privilege('tidegate', 'tidegate.insert_probes(text, text[])', 'execute'),
        has_function_privilege('anon', 'tidegate.insert_probes(text, text[])', 'execute'),
        has_table_privilege('authenticated', 'realtime.messages', 'insert'),
        has_table_privilege('tidegate', 'realtime.messages', 'insert'),
        (select relrowsecurity from pg_class where oid = 'realtime.messages'::regclass),
        (select count(*) from pg_policy)";
    let all = "t|t|f|f|t|f|t|f|t|0";
    // Roles before, in between, or only then made when everything has run.
    for (name, before, order) in [
        ("roles_first", true, [&gateway, &private, &system]),
        ("system_first", true, [&system, &gateway, &private]),
        ("roles_last", false, [&gateway, &private, &system]),
        ("alone", false, [&private, &gateway, &system]),
    ] {
        cluster.create_database(name).await.unwrap();
        if before {
            cluster.psql(name, roles).await.unwrap();
        }
        for file in order {
            cluster.psql_file(name, file).await.unwrap();
        }
        if !before {
            cluster.psql(name, roles).await.unwrap();
            cluster.psql_file(name, &system).await.unwrap();
        }
        for again in [&private, &system] {
            assert_eq!(cluster.psql(name, opened).await.unwrap(), all, "{name}");
            cluster.psql_file(name, again).await.unwrap();
        }
        assert_eq!(cluster.psql(name, opened).await.unwrap(), all, "{name}");
        cluster
            .psql(
                name,
                "insert into realtime.messages (topic, extension, inserted_at)
            values ('a', 'broadcast', '1999-01-01'), ('a', 'broadcast', 'infinity')",
            )
            .await
            .unwrap();
        cluster.psql(name, drop_all).await.unwrap();
    }
    // Who may neither make nor change roles makes the rest, and says what is missing.
    cluster
        .psql("postgres", "create role app; create role anon; create role tidegate")
        .await
        .unwrap();
    cluster.psql("postgres", "create database modest owner app").await.unwrap();
    let mut command = cluster.psql_command("modest");
    let output = command.args(["-c", "set role app", "-f"]).arg(&private).output().await.unwrap();
    let notices = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{notices}");
    assert!(notices.contains("grant anon, authenticated to tidegate"), "{notices}");
    let half = "select rolinherit, pg_has_role('tidegate', 'anon', 'member') from pg_roles
        where rolname = 'tidegate'";
    assert_eq!(cluster.psql("modest", half).await.unwrap(), "t|f");
}

#[tokio::test]
async fn a_schema_realtime_that_somebody_else_has_made_stays_as_it_is() {
    let everything =
        "select concat_ws(' ', oid::regclass, relowner::regrole, relacl, relrowsecurity,
            obj_description(oid)) from pg_class where relnamespace = 'realtime'::regnamespace
        union all select concat_ws(' ', oid::regprocedure, proowner::regrole, proacl, prosrc)
        from pg_proc where pronamespace = 'realtime'::regnamespace
        union all select concat_ws(' ', polname, polrelid::regclass) from pg_policy
        union all select concat_ws(' ', nspname, nspowner::regrole, nspacl, obj_description(oid))
        from pg_namespace where nspname = 'realtime' order by 1";
    let supabase = format!(
        "{} create policy theirs on realtime.messages using (true);",
        include_str!("../support/supabase_messages.sql")
    );
    for (theirs, notice) in
        [(&*supabase, None), ("create schema realtime", Some("private channels are unavailable"))]
    {
        let cluster = Cluster::start().await.unwrap();
        cluster.create_database("theirs").await.unwrap();
        cluster.psql("theirs", theirs).await.unwrap();
        let before = cluster.psql("theirs", everything).await.unwrap();
        let mut command = cluster.psql_command("theirs");
        for file in [
            migration("schema/0001_gateway_schema.sql"),
            migration("schema/0004_private_channels.sql"),
            system_file(),
            migration("schema/0004_private_channels.sql"),
        ] {
            command.arg("-f").arg(file);
        }
        let output = command.output().await.unwrap();
        let notices = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{notices}");
        assert_eq!(notices.contains("private channels are unavailable"), notice.is_some());
        assert_eq!(cluster.psql("theirs", everything).await.unwrap(), before);
        cluster.psql_file("theirs", &migration("uninstall.sql")).await.unwrap();
        assert_eq!(cluster.psql("theirs", everything).await.unwrap(), before);
    }
}

#[tokio::test]
async fn an_uninstall_leaves_what_others_have_put_into_our_schema_realtime() {
    let cluster = Cluster::start().await.unwrap();
    cluster.create_database("shared").await.unwrap();
    let private = migration("schema/0004_private_channels.sql");
    cluster.psql_file("shared", &private).await.unwrap();
    let theirs = "create view realtime.theirs as select realtime.topic();
        create policy theirs on realtime.messages using (realtime.topic() = topic)";
    cluster.psql("shared", theirs).await.unwrap();
    cluster.psql_file("shared", &migration("uninstall.sql")).await.unwrap();
    let left =
        "select to_regclass('realtime.messages') is null, to_regclass('realtime.theirs') is null,
        to_regnamespace('tidegate') is null";
    assert_eq!(cluster.psql("shared", left).await.unwrap(), "t|f|t");
    // It is still known as ours.
    cluster.psql_file("shared", &private).await.unwrap();
    cluster.psql("shared", "drop view realtime.theirs").await.unwrap();
    cluster.psql_file("shared", &migration("uninstall.sql")).await.unwrap();
    let left = "select to_regnamespace('realtime') is null";
    assert_eq!(cluster.psql("shared", left).await.unwrap(), "t");
}

#[tokio::test]
async fn what_an_earlier_system_left_is_replaced() {
    let cluster = Cluster::start().await.unwrap();
    for shape in Shape::BOTH {
        let name = shape.database();
        cluster.create_database(name).await.unwrap();
        cluster.psql_file(name, &shape.tables()).await.unwrap();
        cluster
            .psql(
                name,
                "create function old_trigger() returns trigger language plpgsql
                    as 'begin raise exception ''old''; end';
                create trigger cache_invalidate_votes_trigger after insert on votes
                    for each row execute function old_trigger();
                create function manual_cache_invalidation(eid varchar, endpoint text default null)
                    returns void language sql as '';
                create function manual_cache_invalidation(a text, b text default null)
                    returns boolean language sql as 'select true';
                create function get_cache_invalidation_stats(eid text, minutes int default 5)
                    returns table (event_eid text, count int) language sql as 'select ''a'', 1';
                create function disable_cache_invalidation() returns void language sql as '';",
            )
            .await
            .unwrap();
        cluster.psql_file(name, &system_file()).await.unwrap();
        let votes = "insert into votes (round) values (1); select count(*) from votes;
            select count(*) from pg_proc where proname = 'manual_cache_invalidation';
            select manual_cache_invalidation('AB3028') ->> 'type';
            select count(*) from pg_proc where proname = 'get_cache_invalidation_stats';
            select count from get_cache_invalidation_stats('AB3028');
            select disable_cache_invalidation();";
        let count = shape.triggers().len();
        assert_eq!(
            cluster.psql(name, votes).await.unwrap(),
            format!("1\n1\nmanual_invalidation\n1\n1\n{count}")
        );
    }
}

#[tokio::test]
async fn a_manual_invalidation_reaches_the_event() {
    for mut database in Database::both().await {
        let manual = |endpoints: Value| {
            viewers(
                "AB3028",
                &json!({
                    "type": "manual_invalidation", "event_eid": "AB3028", "endpoints": endpoints,
                }),
            )
        };
        let stats = stats("AB3028", "manual", "MANUAL");
        assert_eq!(
            database
                .told("SELECT manual_cache_invalidation('AB3028', '/live/event/AB3028');")
                .await,
            json!([manual(json!(["/live/event/AB3028"])), stats])
        );
        assert_eq!(
            database.told("SELECT manual_cache_invalidation('AB3028');").await,
            json!([manual(json!(["/live/event/AB3028", "/live/event/AB3028/media"])), stats])
        );
        // A person who calls it learns of a mistake, unlike a write.
        for wrong in ["null", "''", "'AB 3028'", "repeat('A', 47)"] {
            let error =
                database.try_run(&format!("select manual_cache_invalidation({wrong})")).await;
            assert!(error.unwrap_err().to_string().contains("an event id has 1 to 46"), "{wrong}");
        }
        database.run("select manual_cache_invalidation(repeat('A', 46))").await;
    }
}

#[tokio::test]
async fn an_event_lists_all_its_endpoints() {
    for database in Database::both().await {
        let shape = database.shape;
        let easel = shape.easel();
        let mut bids = [
            format!("/live/event/AB3028-2-{easel}/bids"),
            "/live/event/AB3028-2-9/bids".to_owned(),
        ];
        bids.sort_unstable();
        let mut expected = vec![
            "/live/event/AB3028".to_owned(),
            "/live/event/AB3028/media".to_owned(),
            "/live/event/AB3028/artists".to_owned(),
        ];
        expected.extend(bids);
        let listed = database.run("select * from tidegate.event_endpoints('AB3028')").await;
        let mut listed: Vec<_> = listed.lines().collect();
        listed[3..].sort_unstable();
        assert_eq!(listed, expected);
        // Of an event that not everybody may know, anybody is told as much as of one that does not
        // exist. One shape says so itself, for the other row security does.
        let (hide, show) = match shape {
            Shape::Production => (
                "update events set enabled = false where eid = 'AB3028'",
                "update events set enabled = true where eid = 'AB3028'",
            ),
            Shape::Seed => (
                "alter table events enable row level security",
                "alter table events disable row level security",
            ),
        };
        let count = "select count(*) from tidegate.event_endpoints('AB3028')";
        for (change, endpoints) in [(hide, "3"), (show, "5")] {
            database.run(change).await;
            assert_eq!(database.run(count).await, endpoints, "{change}");
        }
        // An event that nobody knows may still be viewed; what is no event has no endpoints.
        let unknown = database.run("select * from tidegate.event_endpoints('AB1')").await;
        assert_eq!(unknown.lines().count(), 3);
        for wrong in ["null", "''", "'AB 1'"] {
            let sql = format!("select * from tidegate.event_endpoints({wrong})");
            assert_eq!(database.run(&sql).await, "");
        }
        let known = "select string_agg(eid, ' ' order by eid) from tidegate.known_events(9) as eid";
        assert_eq!(database.run(known).await, "AB3028 AB3029");
        assert_eq!(database.run("select count(*) from tidegate.known_events(1)").await, "1");
    }
}

#[tokio::test]
async fn the_triggers_can_be_disabled_and_enabled() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let count = shape.triggers().len().to_string();
        assert_eq!(database.run("select disable_cache_invalidation()").await, count);
        assert_eq!(database.told(&shape.vote()).await, json!([]));
        assert_eq!(database.run("select enable_cache_invalidation()").await, count);
        let vote_cast = json!([viewers("AB3028", &vote_cast(shape.easel()))]);
        // Each by another person, because a person has one vote per round.
        assert_eq!(database.told_viewers(&shape.vote().replace(PERSON, EVENT)).await, vote_cast);
        // The file itself enables again, too.
        database.run("select disable_cache_invalidation()").await;
        database.cluster.psql_file(shape.database(), &system_file()).await.unwrap();
        assert_eq!(database.told_viewers(&shape.vote().replace(PERSON, ART)).await, vote_cast);
    }
}

/// The commands of the system's first description, as its operators know them.
#[tokio::test]
async fn the_commands_that_operators_know_work_as_printed() {
    for mut database in Database::both().await {
        let shape = database.shape;
        let easel = shape.easel();
        if shape == Shape::Seed {
            let vote = format!(
                "INSERT INTO votes (art_id, person_id, round, event_id)
                VALUES ('{ART}', '{PERSON}', 2, '{EVENT}');"
            );
            let told = database.told_viewers(&vote).await;
            assert_eq!(told, json!([viewers("AB3028", &vote_cast(easel))]));
            let bid = format!(
                "INSERT INTO bids (art_id, person_id, amount, event_id)
                VALUES ('{ART}', '{PERSON}', 100, '{EVENT}');"
            );
            let told = database.told_viewers(&bid).await;
            assert_eq!(told, json!([viewers("AB3028", &bid_placed(easel, 100))]));
        }
        let health = database
            .run(
                "SELECT trigger_name, event_manipulation, action_statement
                FROM information_schema.triggers
                WHERE trigger_name LIKE 'cache_invalidate%';",
            )
            .await;
        let operations: usize = shape.triggers().iter().map(|(.., count)| count).sum();
        assert_eq!(health.lines().count(), operations, "{health}");
        let disable = "
            DROP TRIGGER cache_invalidate_art_trigger ON art;
            DROP TRIGGER cache_invalidate_votes_trigger ON votes;
            DROP TRIGGER cache_invalidate_bids_trigger ON bids;
            DROP TRIGGER cache_invalidate_media_trigger ON art_media;";
        assert_eq!(database.told(&format!("{disable} {}", bid(ART, 5))).await, json!([]));
        let file = system_file();
        let enable = format!("\\i {}\n", file.to_str().unwrap());
        let told = database.told_viewers(&format!("{enable} {}", bid(ART, 6))).await;
        assert_eq!(told, json!([viewers("AB3028", &bid_placed(easel, 6))]));
    }
}

/// Two of those commands name columns and a view that Postgres does not have.
#[tokio::test]
async fn the_commands_that_never_worked_have_equivalents() {
    for database in Database::both().await {
        database.run(&bid(ART, 5)).await;
        for never in [
            "SELECT schemaname, tablename, triggername
            FROM pg_trigger t
            JOIN pg_class c ON c.oid = t.tgrelid
            JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE triggername LIKE 'cache_invalidate%';",
            "SELECT * FROM pg_stat_user_triggers WHERE schemaname = 'public';",
        ] {
            database.try_run(never).await.unwrap_err();
        }
        let triggers = database
            .run(
                "SELECT n.nspname AS schemaname, c.relname AS tablename, t.tgname AS triggername,
                    t.tgenabled <> 'D' AS enabled
                FROM pg_trigger t
                JOIN pg_class c ON c.oid = t.tgrelid
                JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE t.tgname LIKE 'cache_invalidate%'
                ORDER BY tablename;",
            )
            .await;
        let mut made = database.shape.triggers().to_vec();
        made.sort_unstable();
        let made: Vec<_> = (made.iter())
            .map(|(table, trigger, _)| format!("public|{table}|{trigger}|t"))
            .collect();
        assert_eq!(triggers, made.join("\n"));
        let activity = database
            .run(
                "SELECT relname, n_tup_ins, n_tup_upd, n_tup_del
                FROM pg_stat_user_tables
                WHERE schemaname = 'public' AND relname IN ('art', 'votes', 'bids', 'art_media')
                ORDER BY relname;",
            )
            .await;
        assert_eq!(activity.lines().count(), 4);
        database.run("SELECT * FROM tidegate.trigger_failures ORDER BY id DESC LIMIT 20;").await;
        let calls = database
            .run(
                "SET track_functions = 'pl';
                SELECT funcname, calls, total_time FROM pg_stat_user_functions
                WHERE schemaname = 'tidegate' ORDER BY calls DESC;",
            )
            .await;
        assert_eq!(calls, "", "functions are counted only after track_functions is on");
    }
}
