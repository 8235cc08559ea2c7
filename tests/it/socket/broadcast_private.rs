//! Private channels: what Postgres' policies let whom read and write, asked when, and what becomes of
//! everything else meanwhile.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tidegate::{clock::unix_now, protocol::serializer::Serializer};

use crate::support::{
    client::Client,
    private::{Gate, MEMBER, Private, READER, STRANGER, Table},
    server::TestServer,
    token,
};

const UNAUTHORIZED: &str = "You do not have permissions to read from this Channel topic: ";

fn user(sub: &str) -> String {
    token::with_claims(json!({ "role": "authenticated", "sub": sub }))
}

/// A private join with an ack for each broadcast.
fn private() -> Value {
    json!({ "private": true, "broadcast": { "ack": true } })
}

fn join(reference: &str, sub_topic: &str, config: &Value) -> Value {
    json!([reference, reference, format!("realtime:{sub_topic}"), "phx_join", { "config": config }])
}

fn reply(join_ref: &str, reference: &str, sub_topic: &str, payload: &Value) -> Value {
    json!([join_ref, reference, format!("realtime:{sub_topic}"), "phx_reply", payload])
}

fn ok(response: &Value) -> Value {
    json!({ "status": "ok", "response": response })
}

fn error(reason: &str) -> Value {
    json!({ "status": "error", "response": { "reason": reason } })
}

fn joined() -> Value {
    ok(&json!({ "postgres_changes": [] }))
}

fn system(join_ref: &str, sub_topic: &str, message: &str) -> Value {
    let payload = json!({
        "message": message, "status": "error", "extension": "system", "channel": sub_topic,
    });
    json!([join_ref, null, format!("realtime:{sub_topic}"), "system", payload])
}

fn close(join_ref: &str, sub_topic: &str) -> Value {
    json!([join_ref, join_ref, format!("realtime:{sub_topic}"), "phx_close", {}])
}

fn refresh(sub_topic: &str, token: &str) -> Value {
    let payload = json!({ "access_token": token });
    json!([null, "t", format!("realtime:{sub_topic}"), "access_token", payload])
}

fn send(reference: &str, sub_topic: &str, payload: &Value) -> Value {
    let envelope = json!({ "type": "broadcast", "event": "e", "payload": payload });
    json!([null, reference, format!("realtime:{sub_topic}"), "broadcast", envelope])
}

fn questions(action: &str, result: &str) -> String {
    format!("tidegate_policy_questions_total{{action=\"{action}\",result=\"{result}\"}}")
}

const WRITE_DENIED: &str = "tidegate_dropped_total{reason=\"write_denied\"}";
const UNANSWERED: &str = "tidegate_dropped_total{reason=\"write_unanswered\"}";

#[tokio::test]
async fn who_may_read_joins_who_may_write_is_heard_and_everybody_else_is_refused() {
    for table in Table::BOTH {
        let database = Private::start(table).await;
        for serializer in [Serializer::V1, Serializer::V2] {
            let server = TestServer::start_with(database.config());
            let mut anon = Client::connect(&server, serializer).await;
            anon.send(join("1", "room:1", &private())).await;
            let refused = error(&format!("Unauthorized: {UNAUTHORIZED}room:1"));
            anon.expect(reply("1", "1", "room:1", &refused)).await;
            let mut member = Client::with_token(&server, serializer, &user(MEMBER)).await;
            let mut reader = Client::with_token(&server, serializer, &user(READER)).await;
            for client in [&mut member, &mut reader] {
                client.send(join("1", "room:1", &private())).await;
                client.expect(reply("1", "1", "room:1", &joined())).await;
            }
            // Public and private channels of one name are two.
            anon.join("room:1").await;
            member.send(send("2", "room:1", &json!({ "n": 1 }))).await;
            member.expect(reply("1", "2", "room:1", &ok(&json!({})))).await;
            reader.hears("room:1", json!({ "n": 1 })).await;
            anon.publish("room:1", json!({ "n": 2 })).await;
            // A no to writing is silence, even where an answer was asked for.
            for n in 1..=2 {
                reader.send(send("3", "room:1", &json!({ "n": 3 }))).await;
                server.metric_reaches(WRITE_DENIED, f64::from(n)).await;
            }
            reader.expect_nothing().await;
            member.expect_nothing().await;
            anon.expect_nothing().await;
            // By the key of signed-out users nothing is left.
            reader.send(refresh("room:1", &token::of_role("anon"))).await;
            reader.expect(system("1", "room:1", &format!("{UNAUTHORIZED}room:1"))).await;
            reader.expect(close("1", "room:1")).await;
            reader.send(send("4", "room:1", &json!({}))).await;
            let unmatched =
                json!([null, "4", "realtime:room:1", "phx_reply", error("unmatched topic")]);
            reader.expect(unmatched).await;
            for client in [anon, member, reader] {
                client.close().await;
            }
            server.stop().await;
        }
    }
}

#[tokio::test]
async fn an_answer_holds_until_the_token_changes_whatever_becomes_of_the_policies() {
    let database = Private::start(Table::Plain).await;
    let server = TestServer::start_with(database.config());
    let token = user(MEMBER);
    let mut member = Client::with_token(&server, Serializer::V2, &token).await;
    let mut reader = Client::with_token(&server, Serializer::V2, &user(READER)).await;
    member.join_with("room:1", private()).await;
    reader.join_with("room:1", private()).await;
    for n in 0..3 {
        member.send(send("a", "room:1", &json!({ "n": n }))).await;
        member.expect(reply("r1", "a", "room:1", &ok(&json!({})))).await;
        reader.hears("room:1", json!({ "n": n })).await;
        database.run("delete from room_members").await;
    }
    assert_eq!(server.metric(&questions("read", "allowed")).await, 2.0);
    assert_eq!(server.metric(&questions("write", "allowed")).await, 1.0);
    // The same token asks nothing, nor does a key that is none.
    for same in [&*token, "sb_publishable_x"] {
        member.send(refresh("room:1", same)).await;
    }
    member.send(send("b", "room:1", &json!({}))).await;
    member.expect(reply("r1", "b", "room:1", &ok(&json!({})))).await;
    reader.hears("room:1", json!({})).await;
    assert_eq!(server.metric(&questions("write", "allowed")).await, 1.0);
    // Another one does, also about writing.
    let again = format!("insert into room_members values ('room:1', '{MEMBER}', false)");
    database.run(&again).await;
    let other = json!({ "role": "authenticated", "sub": MEMBER, "session_id": "s" });
    member.send(refresh("room:1", &token::with_claims(other))).await;
    member.send(send("c", "room:1", &json!({}))).await;
    server.metric_reaches(WRITE_DENIED, 1.0).await;
    assert_eq!(server.metric(&questions("read", "allowed")).await, 3.0);
    assert_eq!(server.metric(&questions("write", "denied")).await, 1.0);
    member.expect_nothing().await;
    reader.ends().await;
    member.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn another_token_changes_what_a_channel_hears_as_the_reference_server_does() {
    let database = Private::start(Table::Plain).await;
    database
        .run(
            "create policy flags on realtime.messages to authenticated
                using (topic = 'flags' and (auth.jwt() ->> extension)::boolean)
                with check (topic = 'flags')",
        )
        .await;
    let server = TestServer::start_with(database.config());
    let flags = |broadcast: bool, presence: bool| {
        let claims =
            json!({ "role": "authenticated", "broadcast": broadcast, "presence": presence });
        token::with_claims(claims)
    };
    let mut speaker = Client::with_token(&server, Serializer::V2, &flags(true, true)).await;
    speaker.join_with("flags", json!({ "private": true })).await;
    let config = json!({ "private": true, "presence": { "enabled": true } });
    let none = format!("{UNAUTHORIZED}flags");
    let less = "You no longer have permission to read from this Channel topic: flags";
    for had in [(true, true), (true, false), (false, true)] {
        for has in [(true, true), (true, false), (false, true), (false, false)] {
            let mut client =
                Client::with_token(&server, Serializer::V2, &flags(had.0, had.1)).await;
            client.join_with("flags", config.clone()).await;
            if had.1 {
                client.expect(json!(["r1", null, "realtime:flags", "presence_state", {}])).await;
            }
            // One extension's yes is not the other's.
            speaker.publish("flags", json!({ "before": true })).await;
            if had.0 {
                client.hears("flags", json!({ "before": true })).await;
            }
            client.expect_nothing().await;
            client.send(refresh("flags", &flags(has.0, has.1))).await;
            let lost = match (had, has) {
                (_, (false, false)) => Some(&*none),
                ((true, _), (false, _)) | ((_, true), (_, false)) => Some(less),
                _ => None,
            };
            if let Some(text) = lost {
                client.expect(system("r1", "flags", text)).await;
                client.expect(close("r1", "flags")).await;
            } else {
                // A message behind the token is handled after it.
                client.send(send("x", "flags", &json!({ "from": "client" }))).await;
                speaker.hears("flags", json!({ "from": "client" })).await;
            }
            speaker.publish("flags", json!({ "after": true })).await;
            speaker.expect_nothing().await;
            if lost.is_none() && has.0 {
                client.hears("flags", json!({ "after": true })).await;
            }
            client.ends().await;
        }
    }
    speaker.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_question_keeps_nothing_waiting_but_its_own_topic() {
    let database = Private::start(Table::Plain).await;
    let mut gate = Gate::close(&database).await;
    let server = TestServer::start_with(database.config());
    let mut client = Client::with_token(&server, Serializer::V2, &user(STRANGER)).await;
    client.send(join("1", "gate:a", &private())).await;
    gate.has_visitor().await;
    client.expect_nothing().await;
    client.join("public").await;
    client.send(join("2", "announcements", &json!({ "private": true }))).await;
    client.expect(reply("2", "2", "announcements", &joined())).await;
    // What comes for the topic waits, in its order: three broadcasts, a leave, a join, a broadcast.
    for reference in ["3", "4", "5"] {
        client.send(send(reference, "gate:a", &json!({}))).await;
    }
    client.send(json!(["1", "6", "realtime:gate:a", "phx_leave", {}])).await;
    client.send(join("7", "gate:a", &private())).await;
    client.send(send("8", "gate:a", &json!({}))).await;
    client.expect_nothing().await;
    gate.open().await;
    client.expect(reply("1", "1", "gate:a", &joined())).await;
    for reference in ["3", "4", "5"] {
        client.expect(reply("1", reference, "gate:a", &ok(&json!({})))).await;
    }
    client.expect(reply("1", "6", "gate:a", &ok(&json!({})))).await;
    client.expect(close("1", "gate:a")).await;
    client.expect(reply("7", "7", "gate:a", &joined())).await;
    client.expect(reply("7", "8", "gate:a", &ok(&json!({})))).await;
    assert_eq!(server.metric(&questions("write", "allowed")).await, 2.0);
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_join_that_replaces_a_channel_is_answered_before_the_old_one_is_closed() {
    let database = Private::start(Table::Plain).await;
    let mut gate = Gate::close(&database).await;
    gate.open().await;
    let server = TestServer::start_with(database.config());
    let mut client = Client::with_token(&server, Serializer::V2, &user(STRANGER)).await;
    let mut other = Client::with_token(&server, Serializer::V2, &user(MEMBER)).await;
    other.join_with("gate:a", private()).await;
    client.send(join("1", "gate:a", &private())).await;
    client.expect(reply("1", "1", "gate:a", &joined())).await;
    other.send(send("w", "gate:a", &json!({ "n": 1 }))).await;
    other.expect(reply("r1", "w", "gate:a", &ok(&json!({})))).await;
    client.hears("gate:a", json!({ "n": 1 })).await;
    gate.close_again().await;
    client.send(join("2", "gate:a", &private())).await;
    gate.has_visitor().await;
    gate.open().await;
    client.expect(reply("2", "2", "gate:a", &joined())).await;
    client.expect(close("1", "gate:a")).await;
    other.send(send("x", "gate:a", &json!({ "n": 2 }))).await;
    client.hears("gate:a", json!({ "n": 2 })).await;
    // Nothing is left of the old one if the new one is refused.
    database.run("drop policy gate on realtime.messages").await;
    client.send(join("3", "gate:a", &private())).await;
    let refused = error(&format!("Unauthorized: {UNAUTHORIZED}gate:a"));
    client.expect(reply("3", "3", "gate:a", &refused)).await;
    client.expect(close("2", "gate:a")).await;
    other.send(send("y", "gate:a", &json!({ "n": 3 }))).await;
    for reference in ["x", "y"] {
        other.expect(reply("r1", reference, "gate:a", &ok(&json!({})))).await;
    }
    client.ends().await;
    other.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_channel_whose_question_outlasts_another_ones_token_still_ends_with_its_own() {
    let database = Private::start(Table::Plain).await;
    let mut gate = Gate::close(&database).await;
    gate.open().await;
    let mut settings = database.config();
    settings.auth.grace = Duration::ZERO;
    let server = TestServer::start_with(settings);
    let mut client = Client::with_token(&server, Serializer::V2, &user(STRANGER)).await;
    let until = |seconds: i64| {
        let exp = unix_now() + seconds;
        token::with_claims(json!({ "role": "authenticated", "sub": STRANGER, "exp": exp }))
    };
    let mut short = join("1", "public", &json!({}));
    short[4]["access_token"] = until(5).into();
    client.send(short).await;
    client.expect(reply("1", "1", "public", &joined())).await;
    let mut longer = join("2", "gate:a", &private());
    longer[4]["access_token"] = until(8).into();
    client.send(longer).await;
    client.expect(reply("2", "2", "gate:a", &joined())).await;
    gate.close_again().await;
    client.send(send("3", "gate:a", &json!({}))).await;
    gate.has_visitor().await;
    let expired = |join_ref: &str, sub_topic: &str| {
        let mut message = system(join_ref, sub_topic, "");
        message[4]["message"] = "$any".into();
        message
    };
    client.expect(expired("1", "public")).await;
    client.expect(close("1", "public")).await;
    gate.open().await;
    client.expect(reply("2", "3", "gate:a", &ok(&json!({})))).await;
    client.expect(expired("2", "gate:a")).await;
    client.expect(close("2", "gate:a")).await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_token_that_is_revoked_while_the_policies_are_asked_joins_nothing() {
    let database = Private::start(Table::Plain).await;
    let mut gate = Gate::close(&database).await;
    let server = TestServer::start_with(database.config());
    server.link_is_up().await;
    let mut client = Client::with_token(&server, Serializer::V2, &user(STRANGER)).await;
    client.send(join("1", "gate:a", &private())).await;
    gate.has_visitor().await;
    let body = json!({ "sub": STRANGER }).to_string();
    let (status, answer) = TestServer::request(server.admin, "POST /revoke HTTP/1.1", &body).await;
    assert_eq!(status, 202, "{answer}");
    server.metric_reaches("tidegate_revocations", 1.0).await;
    gate.open().await;
    let revoked = error("InvalidJWTToken: Token has been revoked");
    client.expect(reply("1", "1", "gate:a", &revoked)).await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_socket_or_a_server_that_ends_while_a_question_is_asked_leaves_nothing() {
    let database = Private::start(Table::Plain).await;
    let mut gate = Gate::close(&database).await;
    let mut settings = database.config();
    settings.policies.timeout = Duration::from_secs(2);
    settings.drain.timeout = Duration::from_secs(2);
    let server = TestServer::start_with(settings);
    let mut client = Client::with_token(&server, Serializer::V2, &user(STRANGER)).await;
    client.send(join("1", "gate:a", &private())).await;
    gate.has_visitor().await;
    drop(client);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    gate.open().await;
    let mut client = Client::with_token(&server, Serializer::V2, &user(STRANGER)).await;
    client.join_with("gate:b", private()).await;
    gate.close_again().await;
    // In the middle of a join and of a broadcast.
    client.send(join("9", "gate:c", &private())).await;
    client.send(send("2", "gate:b", &json!({}))).await;
    gate.has_visitor().await;
    server.stop().await;
    assert_eq!(client.closed().await, Some(1012));
}

#[tokio::test]
async fn policies_that_take_too_long_and_too_many_questions_are_refused_by_name() {
    let database = Private::start(Table::Plain).await;
    let mut gate = Gate::close(&database).await;
    let mut settings = database.config();
    settings.policies.timeout = Duration::from_millis(900);
    settings.policies.connections_max = 1;
    let server = TestServer::start_with(settings);
    let mut client = Client::with_token(&server, Serializer::V2, &user(STRANGER)).await;
    client.send(join("1", "gate:a", &private())).await;
    gate.has_visitor().await;
    client.send(join("2", "gate:b", &private())).await;
    client.expect_nothing().await;
    let busy = error("IncreaseConnectionPool: Please increase your connection pool size");
    client.expect(reply("2", "2", "gate:b", &busy)).await;
    let slow = error("QueryCanceled: Query was cancelled, please try again");
    client.expect(reply("1", "1", "gate:a", &slow)).await;
    assert_eq!(server.metric(&questions("read", "pool_timeout")).await, 1.0);
    assert_eq!(server.metric(&questions("read", "query_canceled")).await, 1.0);
    // Nothing is left that would keep the next from joining.
    gate.open().await;
    client.join_with("gate:a", private()).await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn without_a_database_private_channels_are_unavailable_and_public_ones_are_not() {
    let unavailable =
        "UnableToConnectToProject: Realtime was unable to connect to the project database";
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.send(join("1", "room:1", &private())).await;
    client.expect(reply("1", "1", "room:1", &error(unavailable))).await;
    client.join("room:1").await;
    client.ends().await;
    server.stop().await;

    let database = Private::start(Table::Plain).await;
    let server = TestServer::start_with(database.config());
    let mut member = Client::with_token(&server, Serializer::V2, &user(MEMBER)).await;
    let mut reader = Client::with_token(&server, Serializer::V2, &user(READER)).await;
    member.join_with("room:1", private()).await;
    reader.join_with("room:1", private()).await;
    database.cluster.stop_immediate().await.unwrap();
    // Who asks whether it may write is not told no, and asks again.
    for n in 1..=2 {
        member.send(send("2", "room:1", &json!({}))).await;
        server.metric_reaches(UNANSWERED, f64::from(n)).await;
    }
    member.expect_nothing().await;
    // Whose new token cannot be asked about is told to join again, which a close would not do.
    reader.send(refresh("room:1", &user(STRANGER))).await;
    let text = "Realtime was unable to connect to the project database";
    reader.expect(system("r1", "room:1", text)).await;
    reader.expect(json!(["r1", "r1", "realtime:room:1", "phx_error", {}])).await;
    let ended = "tidegate_channels_ended_total{reason=\"unanswered\"}";
    assert_eq!(server.metric(ended).await, 1.0);
    reader.send(join("5", "room:1", &private())).await;
    reader.expect(reply("5", "5", "room:1", &error(unavailable))).await;
    reader.join("public").await;
    database.cluster.restart().await.unwrap();
    reader.send(join("6", "room:1", &private())).await;
    reader.expect(reply("6", "6", "room:1", &joined())).await;
    member.send(send("3", "room:1", &json!({ "n": 3 }))).await;
    member.expect(reply("r1", "3", "room:1", &ok(&json!({})))).await;
    reader.hears("room:1", json!({ "n": 3 })).await;
    member.ends().await;
    reader.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_policy_that_raises_and_a_role_that_nobody_knows_are_told_no() {
    let database = Private::start(Table::Plain).await;
    database
        .run(
            "create function raise() returns boolean language plpgsql
                as 'begin raise exception ''no''; end';
            create policy raises on realtime.messages for select to authenticated
                using (case when topic = 'raises' then raise() end);
            create policy writes on realtime.messages for insert to authenticated
                with check (case when topic = 'announcements' then raise() end)",
        )
        .await;
    let server = TestServer::start_with(database.config());
    for (claims, topic) in [
        (json!({ "role": "authenticated", "sub": MEMBER }), "raises"),
        (json!({ "role": "nobody", "sub": MEMBER }), "room:1"),
        (json!({ "role": "postgres", "sub": MEMBER }), "room:1"),
        (json!({ "role": "authenticated", "sub": MEMBER }), "unknown"),
    ] {
        let token = token::with_claims(claims);
        let mut client = Client::with_token(&server, Serializer::V2, &token).await;
        client.send(join("1", topic, &private())).await;
        let refused = error(&format!("Unauthorized: {UNAUTHORIZED}{topic}"));
        client.expect(reply("1", "1", topic, &refused)).await;
        client.ends().await;
    }
    assert_eq!(server.metric(&questions("read", "policy_error")).await, 3.0);
    // A failing policy for writing is asked each time, and the channel goes on.
    let mut client = Client::with_token(&server, Serializer::V2, &user(MEMBER)).await;
    client.join_with("announcements", private()).await;
    for n in 1..=2 {
        client.send(send("2", "announcements", &json!({}))).await;
        server.metric_reaches(UNANSWERED, f64::from(n)).await;
    }
    assert_eq!(server.metric(&questions("write", "policy_error")).await, 2.0);
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn replay_is_refused_by_name_to_those_who_may_read() {
    let database = Private::start(Table::Plain).await;
    let server = TestServer::start_with(database.config());
    let mut client = Client::with_token(&server, Serializer::V2, &user(MEMBER)).await;
    let replay = |topic| {
        let broadcast = json!({ "replay": { "since": 1, "limit": 2 } });
        join("1", topic, &json!({ "private": true, "broadcast": broadcast }))
    };
    client.send(replay("room:1")).await;
    let text = "UnableToReplayMessages: Realtime was unable to replay messages";
    client.expect(reply("1", "1", "room:1", &error(text))).await;
    client.send(replay("room:2")).await;
    let refused = error(&format!("Unauthorized: {UNAUTHORIZED}room:2"));
    client.expect(reply("1", "1", "room:2", &refused)).await;
    // What is no object asks for nothing.
    let config = json!({ "private": true, "broadcast": { "replay": null } });
    client.join_with("room:1", config).await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_topic_with_a_rule_is_the_rules_also_where_it_is_joined_as_private() {
    let database = Private::start(Table::Plain).await;
    let server = TestServer::start_with(database.config());
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.join_with("auction_winner_AB3028", json!({ "private": true })).await;
    client.send(join("2", "sms-all-messages", &private())).await;
    let refused = error(&format!("Unauthorized: {UNAUTHORIZED}sms-all-messages"));
    client.expect(reply("2", "2", "sms-all-messages", &refused)).await;
    for result in ["allowed", "denied", "policy_error"] {
        assert_eq!(server.metric(&questions("read", result)).await, 0.0);
    }
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn server_code_passes_without_a_policy() {
    let database = Private::start(Table::Plain).await;
    let server = TestServer::start_with(database.config());
    let mut client =
        Client::with_token(&server, Serializer::V2, &token::of_role("service_role")).await;
    client.join_with("anything", private()).await;
    client.send(send("2", "anything", &json!({}))).await;
    client.expect(reply("r1", "2", "anything", &ok(&json!({})))).await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_hundred_joins_at_once_are_all_answered() {
    let database = Private::start(Table::Plain).await;
    let server = TestServer::start_with(database.config());
    let clients = (0..10).map(async |_| {
        let mut client = Client::with_token(&server, Serializer::V2, &user(MEMBER)).await;
        for n in 0..10 {
            let topic = if n % 2 == 0 { "room:1".to_owned() } else { format!("other:{n}") };
            client.send(join(&n.to_string(), &topic, &private())).await;
        }
        let mut refused = 0;
        for _ in 0..14 {
            let message = client.message().await;
            refused += usize::from(message[4]["status"] == "error");
        }
        // Five topics that are refused; of the five joins of the other, four are replaced.
        assert_eq!(refused, 5);
        client.close().await;
    });
    join_all(clients).await;
    assert_eq!(server.metric(&questions("read", "allowed")).await, 50.0);
    assert_eq!(server.metric(&questions("read", "denied")).await, 50.0);
    assert!(database.sessions("true").await <= 5 + 5);
    server.stop().await;
}

/// Sends one private message over HTTP: status and what the body says.
async fn post(server: &TestServer, token: &str, sub_topic: &str) -> (u16, String) {
    let head = format!(
        "POST /api/broadcast/{sub_topic}/events/e?private=true HTTP/1.1\r\n\
         authorization: Bearer {token}\r\napikey: secret-key\r\nx-client: a\r\nx-client: b\r\n\
         cookie: secret-cookie"
    );
    let (status, body) = TestServer::request(server.public, &head, "{\"n\":1}").await;
    let body: Value = serde_json::from_str(&body).unwrap_or_default();
    (status, body["message"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_batch_asks_once_for_each_private_topic_and_skips_what_may_not_be_written() {
    let database = Private::start(Table::Plain).await;
    let server = TestServer::start_with(database.config());
    let mut listener = Client::with_token(&server, Serializer::V2, &user(READER)).await;
    listener.join_with("room:1", json!({ "private": true })).await;
    let mut public = Client::connect(&server, Serializer::V2).await;
    public.join("room:1").await;
    let message = |topic: &str, private: bool, n: u64| json!({ "topic": topic, "event": "e", "payload": { "n": n }, "private": private });
    let body = json!({ "messages": [
        message("room:1", true, 1), message("room:2", true, 2), message("room:1", false, 3),
        message("room:1", true, 4), message("room:2", true, 5),
    ] });
    for (sub, heard) in [(MEMBER, true), (READER, false)] {
        let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {}", user(sub));
        let answer = TestServer::request(server.public, &head, &body.to_string()).await;
        assert_eq!(answer, (202, String::new()));
        if heard {
            listener.hears("room:1", json!({ "n": 1 })).await;
            listener.hears("room:1", json!({ "n": 4 })).await;
        }
        public.hears("room:1", json!({ "n": 3 })).await;
    }
    assert_eq!(server.metric(&questions("write", "allowed")).await, 1.0);
    assert_eq!(server.metric(&questions("write", "denied")).await, 3.0);
    assert_eq!(server.metric(WRITE_DENIED).await, 6.0);
    listener.ends().await;
    public.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_single_private_message_is_answered_by_name() {
    let database = Private::start(Table::Supabase).await;
    database
        .run(
            "create function raise() returns boolean language plpgsql
                as 'begin raise exception ''no''; end';
            create policy raises on realtime.messages for insert to authenticated
                with check (case when topic = 'raises' then raise() end);
            create policy headers on realtime.messages for insert to anon with check (
                topic = 'headers'
                and current_setting('request.headers')::json ->> 'x-client' = 'a, b'
                and current_setting('request.headers') not like '%secret%'
                and current_setting('request.headers') not like '%Bearer%')",
        )
        .await;
    let mut gate = Gate::close(&database).await;
    let mut settings = database.config();
    settings.policies.timeout = Duration::from_millis(900);
    settings.policies.connections_max = 1;
    let server = TestServer::start_with(settings);
    let said = async |token: &str, topic: &str| post(&server, token, topic).await;
    let sent = (202, String::new());
    assert_eq!(said(&user(MEMBER), "room:1").await, sent);
    assert_eq!(said(&token::of_role("service_role"), "any").await, sent);
    assert_eq!(said(&token::of_role("anon"), "headers").await, sent);
    let said_of = |status: u16, text: &str| (status, text.to_owned());
    assert_eq!(said(&user(READER), "room:1").await, said_of(403, "Unauthorized"));
    let rls = said_of(422, "RLS policy error");
    assert_eq!(said(&user(MEMBER), "raises").await, rls);
    assert_eq!(said(&token::of_role("nobody"), "room:1").await, rls);
    let stranger = user(STRANGER);
    let (slow, busy) = tokio::join!(said(&stranger, "gate:a"), async {
        gate.has_visitor().await;
        said(&stranger, "gate:b").await
    });
    assert_eq!(slow, said_of(422, "Query canceled"));
    assert_eq!(busy, said_of(429, "Connection pool exhausted"));
    database.run("truncate realtime.messages").await;
    let drop_partitions = "do $$ begin
        execute (select string_agg(format('drop table %s', inhrelid::regclass), ';')
            from pg_inherits where inhparent = 'realtime.messages'::regclass);
        end $$";
    database.run(drop_partitions).await;
    let partition = said_of(422, "Missing messages partition");
    assert_eq!(said(&user(MEMBER), "room:1").await, partition);
    database.cluster.stop_immediate().await.unwrap();
    let down = said_of(422, "Tenant database unavailable");
    assert_eq!(said(&user(MEMBER), "room:1").await, down);
    server.stop().await;
}
