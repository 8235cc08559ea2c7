//! What operators see of events and make of them: the admin routes, and the commands that ask them.

use std::{
    net::SocketAddr,
    process::Stdio,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use tidegate::{
    db,
    protocol::serializer::Serializer::{V1, V2},
    secret::Secret,
    server::Config,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    process::Command,
    time::timeout,
};

use crate::support::{
    client::{Client, resync},
    postgres::Database,
    proxy::Proxy,
    server::{DEADLINE, TestServer, config},
    token,
};

const EID: &str = "AB3028";
const TOPIC: &str = "cache_invalidate_AB3028";
const OTHER_SPELLING: &str = "cache_invalidate:AB3028";

/// A server without a database, of a short window; nothing is carried, so that each message is
/// what it is about.
fn settings() -> Config {
    let mut config = config();
    let merge = config.topic[0].merge.as_mut().unwrap();
    (merge.window, merge.carry) = (Duration::from_millis(50), Duration::ZERO);
    config
}

fn settings_at(url: &str) -> Config {
    let mut config = settings();
    config.database_url = Secret::from(url);
    // A join on a busy machine waits for its LISTEN, and is not owed the complete list afterwards.
    config.relay.listen_wait = Duration::from_millis(1500);
    config
}

async fn ask(server: &TestServer, request: &str, body: &str) -> (u16, Value) {
    let (status, text) =
        TestServer::request(server.admin, &format!("{request} HTTP/1.1"), body).await;
    (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{request}: {text}")))
}

async fn done(server: &TestServer, request: &str, body: &str) -> Value {
    let (status, answer) = ask(server, request, body).await;
    assert!((200..300).contains(&status), "{request}: {status} {answer}");
    answer
}

/// The message of a refusal.
async fn refusal(server: &TestServer, request: &str, body: &str) -> (u16, String) {
    let (status, answer) = ask(server, request, body).await;
    let message = answer["message"].as_str().unwrap_or_default().to_owned();
    assert_eq!(answer, json!({ "message": message }), "{request}");
    (status, message)
}

/// The rows of `GET /events`.
async fn live(server: &TestServer) -> Vec<Value> {
    let answer = done(server, "GET /events", "").await;
    let rows = answer["events"].as_array().unwrap().clone();
    assert_eq!(answer["live"], rows.len(), "{answer}");
    rows
}

/// Waits until the event's row is as wanted, and gives it.
async fn row_when(server: &TestServer, eid: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let found = timeout(DEADLINE, async {
        loop {
            last = live(server).await.into_iter().find(|row| row["eid"] == eid).unwrap_or_default();
            if wanted(&last) {
                return last.clone();
            }
        }
    });
    let found = found.await;
    found.unwrap_or_else(|_| panic!("{eid} is not as wanted: {last}"))
}

async fn history(server: &TestServer, query: &str) -> Value {
    done(server, &format!("GET /events/{EID}/history{query}"), "").await
}

/// Takes the times out of an answer's object, checked to be of the last minute, or, where they
/// are a minute's beginning, of the last two.
fn take_time(object: &mut Value, name: &str) {
    let text = object.as_object_mut().unwrap().remove(name).unwrap();
    let text = text.as_str().unwrap_or_else(|| panic!("{name} is {text}"));
    assert_eq!((text.len(), text.ends_with('Z')), (24, true), "{text} is in UTC with milliseconds");
    let at = humantime::parse_rfc3339(text).unwrap();
    let age = SystemTime::now().duration_since(at).unwrap_or_default();
    assert!(age < Duration::from_secs(120), "{name} is {text}");
}

/// The payload of the next invalidation, which is of this topic.
async fn invalidation(client: &mut Client, sub_topic: &str) -> Value {
    let (topic, envelope) = client.broadcast().await;
    assert_eq!(topic, format!("realtime:{sub_topic}"), "{envelope}");
    assert_eq!(envelope["event"], "cache_invalidation", "{envelope}");
    envelope["payload"].clone()
}

/// Invalidates an endpoint as a backend does, over HTTP.
async fn publish(server: &TestServer, endpoint: &str) {
    let token = token::of_role("service_role");
    let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {token}");
    let payload = json!({ "type": "test", "endpoints": [endpoint] });
    let message = json!({ "topic": TOPIC, "event": "cache_invalidation", "payload": payload });
    let body = json!({ "messages": [message] }).to_string();
    assert_eq!(TestServer::request(server.public, &head, &body).await, (202, String::new()));
}

/// A database with our objects.
async fn migrated() -> Database {
    let database = Database::create().await;
    db::migrate(&Secret::from(database.url())).await.unwrap();
    database
}

#[tokio::test]
async fn live_events_are_listed_the_busiest_first() {
    let server = TestServer::start_with(settings());
    assert_eq!(done(&server, "GET /events", "").await, json!({ "live": 0, "events": [] }));
    let mut first = Client::connect(&server, V1).await;
    let mut second = Client::connect(&server, V2).await;
    first.join("cache_invalidate_AB3029").await;
    first.join(TOPIC).await;
    second.join(OTHER_SPELLING).await;
    // Of rules without `merge`, and of none.
    first.join("auction_winner_AB3028").await;
    first.join("room").await;

    let mut rows = live(&server).await;
    for row in &mut rows {
        let mut coverage = row.as_object_mut().unwrap().remove("coverage").unwrap();
        take_time(&mut coverage, "since");
        assert!((0.0..60.0).contains(&coverage["seconds"].as_f64().unwrap()), "{coverage}");
    }
    let row = |eid: &str, viewers: usize| {
        json!({
            "eid": eid, "rule": "cache", "viewers": viewers, "last_notification": null,
            "last_delivery": null, "merged": 0, "pending": 0, "endpoints": 0,
            "catch_ups": viewers, "heals": 0, "history": "unknown", "never_published": true,
            "muted_for": null,
        })
    };
    assert_eq!(rows, [row("AB3028", 2), row("AB3029", 1)]);
    let one = done(&server, "GET /events?limit=1", "").await;
    assert_eq!((&one["live"], &one["events"].as_array().unwrap().len()), (&json!(2), &1));
    assert_eq!(one["events"][0]["eid"], "AB3028");

    first.close().await;
    second.close().await;
    row_when(&server, EID, Value::is_null).await;
    row_when(&server, "AB3029", Value::is_null).await;
    server.stop().await;
}

#[tokio::test]
async fn an_event_is_live_while_it_is_listened_to_and_its_row_says_how_it_is_heard() {
    let mut database = Database::create().await;
    let server = TestServer::start_with(settings_at(database.url()));
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    let row = row_when(&server, EID, |row| row["viewers"] == 1).await;
    assert_eq!((&row["history"], &row["last_notification"]), (&json!("unknown"), &Value::Null));
    let since = row["coverage"]["since"].clone();
    assert!(since.is_string(), "{row}");

    for (payload, history) in [
        (r#"{"endpoints":["/a"],"id":7}"#, "trusted"),
        (r#"{"endpoints":["/b"]}"#, "untrusted"),
        (r#"{"endpoints":["/a"],"id":8}"#, "untrusted"),
    ] {
        database.notify(TOPIC, payload).await;
        invalidation(&mut viewer, TOPIC).await;
        let mut row = row_when(&server, EID, |row| row["last_delivery"].is_string()).await;
        assert_eq!(row["history"], history, "{payload}");
        take_time(&mut row, "last_notification");
        take_time(&mut row, "last_delivery");
    }
    let row = row_when(&server, EID, |_| true).await;
    assert_eq!((&row["endpoints"], &row["merged"]), (&json!(2), &json!(0)), "{row}");

    // Nobody has joined, and it is heard all the same.
    viewer.close().await;
    let row = row_when(&server, EID, |row| row["viewers"] == 0).await;
    assert!(row["coverage"]["since"].is_string(), "{row}");
    assert_eq!(history(&server, "").await["messages"].as_array().unwrap().len(), 3);
    server.stop().await;
}

#[tokio::test]
async fn an_event_that_is_no_longer_listened_to_is_not_live_and_its_history_stays() {
    let database = Database::create().await;
    let mut settings = settings_at(database.url());
    settings.relay.linger = Duration::ZERO;
    let server = TestServer::start_with(settings);
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(TOPIC).await;
    publish(&server, "/a").await;
    invalidation(&mut viewer, TOPIC).await;
    viewer.close().await;
    row_when(&server, EID, Value::is_null).await;
    server.metric_falls_to("tidegate_relay_listens", 0.0).await;
    assert_eq!(history(&server, "").await["messages"][0]["endpoints"], json!(["/a"]));
    server.stop().await;
}

/// Nothing vouches for what is said before the LISTEN is active.
#[tokio::test]
async fn an_event_that_is_not_listened_to_has_no_coverage() {
    let mut settings = settings_at("postgres://nobody@127.0.0.1:1/none");
    settings.relay.listen_wait = Duration::from_millis(10);
    settings.relay.connect_timeout = Duration::from_millis(300);
    let server = TestServer::start_with(settings);
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(TOPIC).await;
    let row = row_when(&server, EID, |row| row["viewers"] == 1).await;
    assert_eq!(row["coverage"], Value::Null, "{row}");
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one conversation and what is told of it")]
async fn the_history_tells_what_was_sent_when_to_how_many_made_of_what_and_why() {
    let mut database = Database::create().await;
    let mut settings = settings_at(database.url());
    settings.topic[0].merge.as_mut().unwrap().window = Duration::from_secs(3);
    let server = TestServer::start_with(settings);
    server.link_is_up().await;
    let mut viewers = [Client::connect(&server, V1).await, Client::connect(&server, V2).await];
    viewers[0].join(TOPIC).await;
    viewers[1].join(OTHER_SPELLING).await;

    let transaction = format!(
        "begin;
        select pg_notify('{TOPIC}', '{{\"type\":\"vote_cast\",\"endpoints\":[\"/a\"],\"id\":7}}');
        select pg_notify('{TOPIC}', '{{\"type\":\"bid_placed\",\"endpoints\":[\"/b\",\"/a\"]}}');
        commit"
    );
    database.run(&transaction).await;
    for (viewer, topic) in viewers.iter_mut().zip([TOPIC, OTHER_SPELLING]) {
        assert_eq!(invalidation(viewer, topic).await["endpoints"], json!(["/a", "/b"]));
    }
    // Within the window, from two sources; and what an operator asks for goes with it.
    database.notify(TOPIC, r#"{"endpoints":["/c"]}"#).await;
    row_when(&server, EID, |row| row["pending"] == 1).await;
    publish(&server, "/d").await;
    row_when(&server, EID, |row| row["pending"] == 2).await;
    for (viewer, topic) in viewers.iter_mut().zip([TOPIC, OTHER_SPELLING]) {
        assert_eq!(invalidation(viewer, topic).await["endpoints"], json!(["/c", "/d"]));
    }
    let row = row_when(&server, EID, |row| row["merged"] == 2).await;
    assert_eq!(row["pending"], 0, "{row}");
    done(&server, &format!("POST /events/{EID}/invalidate"), r#"{"endpoint":"/e"}"#).await;
    for (viewer, topic) in viewers.iter_mut().zip([TOPIC, OTHER_SPELLING]) {
        assert_eq!(invalidation(viewer, topic).await["endpoints"], json!(["/e"]));
    }

    // It is noted when everybody has been sent it.
    let mut told = Value::Null;
    let noted = async {
        while told["messages"].as_array().is_none_or(|messages| messages.len() < 3) {
            told = history(&server, "").await;
        }
    };
    timeout(DEADLINE, noted).await.expect("three messages are noted");
    assert_eq!(told["eid"], EID);
    let mut at = Vec::new();
    for message in told["messages"].as_array_mut().unwrap() {
        at.push(message["at"].as_str().unwrap().to_owned());
        take_time(message, "at");
    }
    assert!(at.is_sorted_by(|newer, older| newer >= older), "{at:?}");
    let vote = json!({ "id": 7, "type": "vote_cast" });
    let bid = json!({ "id": null, "type": "bid_placed" });
    let untold = json!({ "id": null, "type": null });
    let rest = json!({ "id": null, "type": "test" });
    let message = |why: &str, cause: Value, endpoints: &[&str], from: &[&Value]| {
        json!({
            "rule": "cache", "why": why, "cause": cause, "endpoints": endpoints,
            "endpoint_count": endpoints.len(), "merged": from.len(), "from": from,
            "deliveries": 2, "repeats": 0,
        })
    };
    assert_eq!(
        told["messages"],
        json!([
            message("gap", json!("operator"), &["/e"], &[]),
            message("window", Value::Null, &["/c", "/d"], &[&untold, &rest]),
            message("leading", Value::Null, &["/a", "/b"], &[&vote, &bid]),
        ])
    );
    let newest = history(&server, "?limit=1&minutes=1440").await;
    let newest: Vec<_> =
        newest["messages"].as_array().unwrap().iter().map(|message| &message["why"]).collect();
    assert_eq!(newest, ["gap"]);
    for viewer in viewers {
        viewer.close().await;
    }
    server.stop().await;
}

/// Else nobody can see afterwards what viewers were told while they came back in crowds.
#[tokio::test]
async fn the_last_200_messages_are_remembered_however_many_clients_join() {
    let mut settings = settings();
    settings.topic[0].merge.as_mut().unwrap().window = Duration::ZERO;
    let server = TestServer::start_with(settings);
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(TOPIC).await;
    for number in 0..203 {
        publish(&server, &format!("/{number}")).await;
        assert_eq!(invalidation(&mut viewer, TOPIC).await["endpoints"][0], format!("/{number}"));
    }
    for _ in 0..220 {
        let mut joined = Client::connect(&server, V1).await;
        joined.join(TOPIC).await;
        joined.close().await;
    }
    let told = history(&server, "?limit=1000").await;
    let messages = told["messages"].as_array().unwrap();
    let (newest, oldest) = (&messages[0]["endpoints"], &messages[messages.len() - 1]["endpoints"]);
    assert_eq!((messages.len(), newest, oldest), (200, &json!(["/202"]), &json!(["/3"])));
    // Those who joined are counted, by minute.
    let mut count = 0;
    for mut joined in told["single_clients"].as_array().unwrap().iter().cloned() {
        take_time(&mut joined, "minute");
        count += joined.as_object_mut().unwrap().remove("clients").unwrap().as_u64().unwrap();
        let expected = json!({
            "rule": "cache", "why": "catch_up", "cause": "unknown", "method": "complete",
        });
        assert_eq!(joined, expected);
    }
    assert_eq!(count, 221);
    assert_eq!(row_when(&server, EID, |_| true).await["catch_ups"], 221);
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn who_was_told_to_join_again_is_counted_with_the_event() {
    let server = TestServer::start_with(settings());
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    // It asks for nothing, as a client that is deaf does.
    let mut deaf = Client::connect(&server, V2).await;
    deaf.expect(json!([null, null, format!("realtime:{TOPIC}"), "phx_error", {}])).await;
    let row = row_when(&server, EID, |row| row["heals"] == 1).await;
    assert_eq!((&row["viewers"], &row["catch_ups"]), (&json!(1), &json!(1)), "{row}");
    let told = history(&server, "").await;
    let mut heal = told["single_clients"].as_array().unwrap()[0].clone();
    take_time(&mut heal, "minute");
    let expected =
        json!({ "rule": "cache", "why": "heal", "cause": null, "method": null, "clients": 1 });
    assert_eq!(heal, expected, "{told}");
    viewer.close().await;
    deaf.close().await;
    server.stop().await;
}

/// An answer has a bound.
#[tokio::test]
async fn of_a_long_list_the_history_shows_the_first_hundred_endpoints() {
    let server = TestServer::start_with(settings());
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    done(&server, &format!("POST /events/{EID}/mute?for=1h"), "").await;
    for number in 0..101 {
        publish(&server, &format!("/{number}")).await;
    }
    done(&server, &format!("POST /events/{EID}/mute?for=0s"), "").await;
    let endpoints = invalidation(&mut viewer, TOPIC).await["endpoints"].clone();
    assert_eq!(endpoints.as_array().unwrap().len(), 101);
    row_when(&server, EID, |row| row["last_delivery"].is_string()).await;
    let message = &history(&server, "").await["messages"][0];
    assert_eq!(message["endpoints"], json!(endpoints.as_array().unwrap()[..100]));
    assert_eq!((&message["endpoint_count"], &message["merged"]), (&json!(101), &json!(101)));
    assert_eq!(message["from"].as_array().unwrap().len(), 50);
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn without_a_database_an_operators_invalidation_reaches_the_viewers_of_this_gateway() {
    let server = TestServer::start_with(settings());
    let mut viewers = [Client::connect(&server, V1).await, Client::connect(&server, V2).await];
    viewers[0].join(TOPIC).await;
    viewers[1].join(OTHER_SPELLING).await;
    let request = format!("POST /events/{EID}/invalidate");
    let longest = format!("/{}", "x".repeat(511));
    for (body, endpoint, sent) in [
        (
            r#"{"endpoint":"/live/event/AB3028-1-2/bids"}"#,
            json!("/live/event/AB3028-1-2/bids"),
            None,
        ),
        (&json!({ "endpoint": longest }).to_string(), json!(longest), None),
        ("", Value::Null, Some(())),
        (" {} \n", Value::Null, Some(())),
        (r#"{"endpoint":null}"#, Value::Null, Some(())),
    ] {
        let (status, mut answer) = ask(&server, &request, body).await;
        let message = answer.as_object_mut().unwrap().remove("message").unwrap();
        assert!(message.as_str().unwrap().contains("there is no database"), "{message}");
        let expected = json!({
            "eid": EID, "endpoint": endpoint, "via": "gateway", "error": null, "viewers": 2,
            "muted_for": null,
        });
        assert_eq!((status, answer), (202, expected), "{body}");
        // The complete list ends with what was invalidated before.
        let complete = resync(EID).map(Value::from).into_iter();
        let complete =
            complete.chain(["/live/event/AB3028-1-2/bids".into(), longest.clone().into()]);
        let endpoints = sent.map_or_else(|| vec![endpoint], |()| complete.collect());
        for (viewer, topic) in viewers.iter_mut().zip([TOPIC, OTHER_SPELLING]) {
            let payload = invalidation(viewer, topic).await;
            let expected = json!({
                "type": "catch_up", "event_eid": EID, "cause": "operator", "endpoints": endpoints,
                "timestamp": payload["timestamp"],
            });
            assert_eq!(payload, expected, "{body}");
        }
    }
    let series = r#"tidegate_catch_ups_total{cause="operator",method="complete"}"#;
    assert_eq!(server.metric(series).await, 3.0);
    for viewer in viewers {
        viewer.ends().await;
    }
    // An event that nobody has joined: there is nobody to tell.
    let answer = done(&server, "POST /events/AB9/invalidate", "").await;
    assert_eq!((&answer["via"], &answer["viewers"]), (&json!("gateway"), &json!(0)));
    server.stop().await;
}

#[tokio::test]
async fn with_a_database_it_reaches_every_gateway_and_the_history() {
    let mut database = migrated().await;
    let servers = [(); 2].map(|()| TestServer::start_with(settings_at(database.url())));
    let mut viewers = Vec::new();
    for server in &servers {
        server.link_is_up().await;
        let mut viewer = Client::connect(server, V2).await;
        viewer.join(TOPIC).await;
        viewers.push(viewer);
    }
    let request = format!("POST /events/{EID}/invalidate");
    for (body, endpoint, endpoints) in [
        (r#"{"endpoint":"/live/x"}"#, json!("/live/x"), json!(["/live/x"])),
        ("", Value::Null, json!(["/live/event/AB3028", "/live/event/AB3028/media"])),
    ] {
        let (status, mut answer) = ask(&servers[0], &request, body).await;
        let message = answer.as_object_mut().unwrap().remove("message").unwrap();
        assert!(message.as_str().unwrap().contains("every gateway"), "{message}");
        let expected = json!({
            "eid": EID, "endpoint": endpoint, "via": "database", "error": null, "muted_for": null,
        });
        assert_eq!((status, answer), (202, expected));
        for viewer in &mut viewers {
            let payload = invalidation(viewer, TOPIC).await;
            assert_eq!(payload["type"], "manual_invalidation", "{payload}");
            assert_eq!(payload["endpoints"], endpoints, "{payload}");
        }
    }
    let rows = "select count(*) from tidegate.broadcast_history
        where eid = 'AB3028' and type = 'manual_invalidation'";
    assert_eq!(database.value::<i64>(rows).await, 2);
    for viewer in viewers {
        viewer.close().await;
    }
    for server in servers {
        server.stop().await;
    }
}

#[tokio::test]
async fn where_the_database_fails_the_answer_says_so_and_viewers_here_are_told_all_the_same() {
    let database = migrated().await;
    let proxy = Proxy::start("127.0.0.1", database.port()).await;
    let without_objects = Database::create().await;
    let mut hangs = settings_at(&database.url_at(proxy.address));
    hangs.notify_database_url = Secret::from(database.url());
    hangs.relay.connect_timeout = Duration::from_millis(300);
    let refuses = settings_at(without_objects.url());
    for (settings, eid, named) in [
        (refuses, EID, "manual_cache_invalidation"),
        (hangs, EID, ""),
        // Its channel would have more than 63 bytes.
        (settings_at(database.url()), &*"A".repeat(50), "46"),
    ] {
        let server = TestServer::start_with(settings);
        server.link_is_up().await;
        let topic = format!("cache_invalidate_{eid}");
        let mut viewer = Client::connect(&server, V1).await;
        viewer.join(&topic).await;
        proxy.freeze_all();
        let request = format!("POST /events/{eid}/invalidate");
        let (status, answer) = ask(&server, &request, r#"{"endpoint":"/live/x"}"#).await;
        assert_eq!((status, &answer["via"]), (202, &json!("gateway")), "{answer}");
        assert_eq!(answer["viewers"], 1, "{answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(named), "{error}");
        assert!(answer["message"].as_str().unwrap().contains("the database failed"), "{answer}");
        let payload = invalidation(&mut viewer, &topic).await;
        assert_eq!(
            (&payload["cause"], &payload["endpoints"]),
            (&json!("operator"), &json!(["/live/x"]))
        );
        viewer.close().await;
        server.stop().await;
    }
}

#[tokio::test]
async fn a_body_that_is_not_an_endpoint_is_refused_and_nothing_is_sent() {
    let mut settings = settings();
    settings.limits.body_timeout = Duration::from_millis(100);
    let server = TestServer::start_with(settings);
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    let request = format!("POST /events/{EID}/invalidate");
    let too_long = json!({ "endpoint": "x".repeat(513) }).to_string();
    let too_large = json!({ "endpoint": "x".repeat(9_000) }).to_string();
    for (body, status, named) in [
        ("null", 400, "the body"),
        ("7", 400, "the body"),
        (r#""/live/x""#, 400, "the body"),
        (r#"["/live/x"]"#, 400, "the body"),
        (r#"{"endpoints":["/live/x"]}"#, 400, "the body"),
        (r#"{"endpoint":"/a","endpoint":"/b"}"#, 400, "the body"),
        (r#"{"endpoint":["/live/x"]}"#, 400, "the body"),
        (r#"{"endpoint":7}"#, 400, "the body"),
        (r#"{"endpoint":"/live/x"}x"#, 400, "the body"),
        (r#"{"endpoint":"/live/x""#, 400, "the body"),
        (r#"{"endpoint":""}"#, 400, "endpoint"),
        (r#"{"endpoint":"/a\u0000"}"#, 400, "endpoint"),
        (r#"{"endpoint":"/a\n"}"#, 400, "endpoint"),
        (&too_long, 400, "512"),
        (&too_large, 413, "too large"),
    ] {
        let refusal = refusal(&server, &request, body).await;
        assert!(refusal.0 == status && refusal.1.contains(named), "{body}: {refusal:?}");
    }
    // A body that does not come.
    let head = format!("{request} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{{");
    let answer = TestServer::raw(server.admin, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_muted_event_holds_everything_back_and_sends_it_as_one_at_its_end() {
    let server = TestServer::start_with(settings());
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    let mute = async |length: &str| {
        done(&server, &format!("POST /events/{EID}/mute?for={length}"), "").await
    };
    let muted = mute("10m").await;
    assert_eq!(muted["eid"], EID);
    assert!((590.0..=600.0).contains(&muted["muted_for"].as_f64().unwrap()), "{muted}");
    // From each source.
    publish(&server, "/a").await;
    row_when(&server, EID, |row| row["pending"] == 1).await;
    publish(&server, "/b").await;
    let request = format!("POST /events/{EID}/invalidate");
    let asked = done(&server, &request, r#"{"endpoint":"/c"}"#).await;
    assert!(asked["muted_for"].as_f64().unwrap() > 500.0, "{asked}");
    publish(&server, "/a").await;
    let row = row_when(&server, EID, |row| row["pending"] == 3).await;
    assert!((500.0..=600.0).contains(&row["muted_for"].as_f64().unwrap()), "{row}");
    assert_eq!(row["last_delivery"], Value::Null, "{row}");
    viewer.expect_nothing().await;
    // Who joins meanwhile is caught up, with what is held back.
    let mut late = Client::connect(&server, V2).await;
    late.send(json!(["r9", "r9", format!("realtime:{TOPIC}"), "phx_join", { "config": {} }])).await;
    late.message().await;
    let caught_up = late.caught_up(TOPIC).await;
    assert!(["/a", "/b", "/c"].iter().all(|endpoint| caught_up.contains(&(*endpoint).to_owned())));

    // Longer, shorter; it is one mute.
    assert!(mute("24h").await["muted_for"].as_f64().unwrap() > 86_000.0);
    assert!(mute("1h+30m").await["muted_for"].as_f64().unwrap() < 5401.0);
    viewer.expect_nothing().await;
    assert_eq!(mute("0s").await["muted_for"], Value::Null);
    for client in [&mut viewer, &mut late] {
        let payload = invalidation(client, TOPIC).await;
        assert_eq!(payload["endpoints"], json!(["/a", "/b", "/c"]), "{payload}");
        assert_eq!(payload["merged"], 3, "{payload}");
    }
    let row = row_when(&server, EID, |row| row["merged"] == 2).await;
    assert_eq!((&row["muted_for"], &row["pending"]), (&Value::Null, &json!(0)), "{row}");
    viewer.ends().await;
    late.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_mute_ends_by_itself() {
    let server = TestServer::start_with(settings());
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(TOPIC).await;
    done(&server, &format!("POST /events/{EID}/mute?for=700ms"), "").await;
    publish(&server, "/a").await;
    publish(&server, "/b").await;
    assert_eq!(invalidation(&mut viewer, TOPIC).await["endpoints"], json!(["/a", "/b"]));
    assert_eq!(row_when(&server, EID, |_| true).await["muted_for"], Value::Null);
    publish(&server, "/c").await;
    assert_eq!(invalidation(&mut viewer, TOPIC).await["endpoints"], json!(["/c"]));
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn what_a_mute_holds_back_is_sent_before_the_server_ends() {
    let server = TestServer::start_with(settings());
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    done(&server, &format!("POST /events/{EID}/mute?for=1h"), "").await;
    publish(&server, "/a").await;
    publish(&server, "/b").await;
    row_when(&server, EID, |row| row["pending"] == 2).await;
    let ended = async {
        assert_eq!(invalidation(&mut viewer, TOPIC).await["endpoints"], json!(["/a", "/b"]));
        assert_eq!(viewer.closed().await, Some(1012));
    };
    tokio::join!(server.stop(), ended);
}

/// An operator mutes before the doors open.
#[tokio::test]
async fn a_mute_holds_for_who_joins_later_and_is_not_forgotten_for_want_of_room() {
    let mut settings = settings();
    settings.relay.listens_max = 1;
    let server = TestServer::start_with(settings);
    done(&server, &format!("POST /events/{EID}/mute?for=1h"), "").await;
    let row = row_when(&server, EID, |_| true).await;
    assert_eq!((&row["viewers"], row["muted_for"].is_f64()), (&json!(0), true), "{row}");
    for request in ["POST /events/AB3029/mute?for=1h", "POST /events/AB3029/invalidate"] {
        let (status, message) = refusal(&server, request, "").await;
        assert!(status == 503 && message.contains("relay.listens_max"), "{status} {message}");
    }
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(TOPIC).await;
    publish(&server, "/a").await;
    row_when(&server, EID, |row| row["pending"] == 1).await;
    viewer.expect_nothing().await;
    done(&server, &format!("POST /events/{EID}/mute?for=0"), "").await;
    assert_eq!(invalidation(&mut viewer, TOPIC).await["endpoints"], json!(["/a"]));
    viewer.close().await;
    // And then it is.
    row_when(&server, EID, Value::is_null).await;
    done(&server, "POST /events/AB3029/mute?for=1h", "").await;
    assert_eq!(refusal(&server, &format!("GET /events/{EID}/history"), "").await.0, 404);
    server.stop().await;
}

/// A rule may have a class of its own for events, or several events of one id.
#[tokio::test]
async fn an_event_of_any_merged_rule_is_found_by_its_id() {
    const PERSON: &str = "00000000-0000-4000-8000-00000000000a";
    let mut settings = settings();
    let rule = |name: &str, pattern: &str, listen: &str| {
        serde_json::from_value(json!({
            "name": name, "pattern": [pattern], "listen": listen, "event": "news",
            "merge": {}, "read": [{ "role": ["anon"] }],
        }))
        .unwrap()
    };
    let by_uuid = rule("uuid", "by_{eid:uuid}", "by_{eid:uuid}");
    let by_person = rule("person", "of_{eid}_{person:uuid}", "of_{eid}_{person:uuid}");
    settings.topic[0] = by_uuid;
    settings.topic.push(by_person);
    let server = TestServer::start_with(settings);
    let answer = done(&server, &format!("POST /events/{PERSON}/mute?for=1h"), "").await;
    assert!(answer["muted_for"].is_f64(), "{answer}");
    assert_eq!(row_when(&server, PERSON, |_| true).await["rule"], "uuid");
    // Whose event it is, the id alone does not say; but it does once the event is known.
    let request = format!("POST /events/{EID}/invalidate");
    assert_eq!(refusal(&server, &request, "").await.0, 400);
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(&format!("of_AB3028_{PERSON}")).await;
    let answer = done(&server, &request, r#"{"endpoint":"/a"}"#).await;
    assert_eq!(answer["viewers"], 1, "{answer}");
    let (topic, envelope) = viewer.broadcast().await;
    assert_eq!(topic, format!("realtime:of_AB3028_{PERSON}"));
    assert_eq!(envelope["payload"]["endpoints"], json!(["/a"]), "{envelope}");
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_bad_parameter_is_refused_by_name() {
    let server = TestServer::start_with(settings());
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    let too_long = "A".repeat(51);
    for (request, named) in [
        ("GET /events?limit=0", "limit: expected a number from 1 to 10000"),
        ("GET /events?limit=10001", "limit"),
        ("GET /events?limit=", "limit"),
        ("GET /events?limit=+5", "limit"),
        ("GET /events?limit=-1", "limit"),
        ("GET /events?limit=1.5", "limit"),
        ("GET /events?limit=99999999999999999999999", "limit"),
        ("GET /events?limit=5&limit=6", "limit: given twice"),
        ("GET /events?minutes=5", "unknown parameter: expected limit"),
        ("GET /events/AB3028/history?minutes=0", "minutes: expected a number from 1 to 1440"),
        ("GET /events/AB3028/history?minutes=1441", "minutes"),
        ("GET /events/AB3028/history?minutes=soon", "minutes"),
        ("GET /events/AB3028/history?limit=1001", "limit: expected a number from 1 to 1000"),
        ("GET /events/AB3028/history?minute=5", "expected minutes, limit"),
        ("POST /events/AB3028/mute", "for: expected a duration from 0s to 24h"),
        ("POST /events/AB3028/mute?for=", "for"),
        ("POST /events/AB3028/mute?for=soon", "for"),
        ("POST /events/AB3028/mute?for=-5m", "for"),
        ("POST /events/AB3028/mute?for=86400001ms", "for"),
        ("POST /events/AB3028/mute?for=99999999999999999999d", "for"),
        ("POST /events/AB3028/mute?for=5m&for=6m", "for: given twice"),
        ("POST /events/AB3028/mute?length=5m", "expected for"),
        ("POST /events/AB3028/invalidate?endpoint=/a", "unknown parameter: expected none"),
        ("POST /events//invalidate", "event id"),
        ("POST /events/AB_3028/invalidate", "event id"),
        ("POST /events/AB%203028/mute?for=5m", "event id"),
        ("POST /events/%ff/mute?for=5m", "event id"),
        ("GET /events/AB%2F3028/history", "event id"),
        (&format!("GET /events/{too_long}/history"), "event id"),
        (&format!("POST /events/{too_long}/invalidate"), "event id"),
    ] {
        let (status, message) = refusal(&server, request, "").await;
        assert_eq!(status, 400, "{request}: {message}");
        assert!(message.contains(named), "{request}: {message}");
    }
    // An id is an id, encoded or not; and one that nobody here knows is none of ours.
    done(&server, "GET /events/%41%423028/history", "").await;
    let (status, message) = refusal(&server, "GET /events/AB9/history", "").await;
    assert!(status == 404 && message.contains("does not know the event"), "{status} {message}");
    for request in [
        "POST /events",
        "GET /events/",
        "GET /events/AB3028",
        "GET /events/AB3028/",
        "GET /events/AB3028/invalidate",
        "GET /events/AB3028/mute?for=5m",
        "POST /events/AB3028/history",
        "GET /events/AB3028/history/",
        "POST /events/AB3028/invalidate/x",
        "DELETE /events/AB3028/mute",
    ] {
        assert_eq!(refusal(&server, request, "").await, (404, "not found".to_owned()), "{request}");
    }
    let row = row_when(&server, EID, |_| true).await;
    assert_eq!((&row["muted_for"], &row["pending"]), (&Value::Null, &json!(0)), "{row}");
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn no_path_no_parameter_and_no_body_ends_the_admin_port() {
    const PARTS: [&str; 40] = [
        "/",
        "/",
        "//",
        "..",
        "events",
        "/events/",
        "/events/AB3028/",
        "/events/AB3028/history",
        "/events/AB3028/invalidate",
        "/events/AB3028/mute",
        "history",
        "mute",
        "?",
        "?",
        "&",
        "&",
        "=",
        "=",
        "%",
        "%00",
        "%ff",
        "%2F",
        "%F0%9F%8E%A8",
        "+",
        "-",
        "0",
        "1",
        "0s",
        "1d",
        "24h",
        "18446744073709551616",
        "1e9",
        "NaN",
        "for",
        "limit",
        "minutes",
        "AB3028",
        "{}",
        "'",
        ";",
    ];
    let server = TestServer::start_with(settings());
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..1_500 {
        let method = if random.bool() { "GET" } else { "POST" };
        let count = random.usize(1..9);
        let parts = std::iter::repeat_with(|| PARTS[random.usize(..PARTS.len())]);
        let target: String = parts.take(count).collect();
        let length = random.usize(..40);
        let head = format!(
            "{method} /{target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        );
        let mut request = head.clone().into_bytes();
        request.extend(std::iter::repeat_with(|| random.u8(..)).take(length));
        let answer = TestServer::raw(server.admin, &request).await;
        let (answered, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let status = answered.split(' ').nth(1).unwrap_or_default();
        let said = format!("seed {seed}\n{head}{answer}");
        assert!(["200", "202", "400", "404", "413"].contains(&status), "{said}");
        assert!(body.is_empty() || serde_json::from_str::<Value>(body).is_ok(), "{said}");
    }
    done(&server, "GET /events", "").await;
    server.stop().await;
}

#[tokio::test]
async fn with_a_token_the_routes_of_events_ask_for_it_before_anything_else() {
    let mut settings = settings();
    settings.admin_token = Secret::from("the-admins-token");
    let server = TestServer::start_with(settings);
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;
    let requests = [
        "GET /events",
        "GET /events/AB3028/history",
        "POST /events/AB3028/mute?for=0s",
        "POST /events/AB3028/invalidate",
    ];
    for request in requests {
        for authorization in ["", "\r\nauthorization: Bearer the-admins-toke"] {
            // A body that never comes is not waited for.
            let head = format!("{request} HTTP/1.1{authorization}\r\ncontent-length: 9\r\n\r\n");
            let answer = TestServer::raw(server.admin, head.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 401 "), "{request}: {answer}");
            assert!(!answer.contains(EID), "{request}: {answer}");
        }
    }
    viewer.expect_nothing().await;
    for request in requests {
        let head = format!("{request} HTTP/1.1\r\nauthorization: Bearer the-admins-token");
        let (status, body) = TestServer::request(server.admin, &head, "").await;
        assert!((200..300).contains(&status), "{request}: {status} {body}");
    }
    // The public port shows nothing of it.
    for request in requests {
        let head = format!("{request} HTTP/1.1");
        assert_eq!(TestServer::request(server.public, &head, "").await.0, 404, "{request}");
    }
    invalidation(&mut viewer, TOPIC).await;
    viewer.close().await;
    server.stop().await;
}

/// A link that is up and deaf fills no gap.
#[tokio::test]
async fn readiness_tells_the_canarys_age_and_strictly_asks_for_a_young_one() {
    let database = Database::create().await;
    let proxy = Proxy::start("127.0.0.1", database.port()).await;
    let mut settings = settings_at(&database.url_at(proxy.address));
    settings.notify_database_url = Secret::from(database.url());
    settings.relay.canary_interval = Duration::from_millis(200);
    settings.relay.canary_timeout = Duration::from_secs(60);
    let server = TestServer::start_with(settings);
    let readyz = async |query: &str| ask(&server, &format!("GET /readyz{query}"), "").await;
    // Until it is as wanted; the answer.
    let becomes = async |wanted: fn(u16, &Value) -> bool| {
        let looked = timeout(DEADLINE, async {
            loop {
                let (status, body) = readyz("?strict=1").await;
                if wanted(status, &body) {
                    return body;
                }
            }
        });
        match looked.await {
            Ok(body) => body,
            Err(_) => panic!("{:?}", readyz("?strict=1").await),
        }
    };
    server.link_is_up().await;
    let fresh = becomes(|status, body| status == 200 && body["canary"].is_f64()).await;
    assert!(fresh["canary"].as_f64().unwrap() <= 0.6, "{fresh}");
    assert_eq!((&fresh["ready"], &fresh["link"]), (&json!(true), &json!("up")));
    proxy.freeze_all();
    let stale = becomes(|status, _| status == 503).await;
    assert!(stale["canary"].as_f64().unwrap() > 0.6, "{stale}");
    assert_eq!((&stale["ready"], &stale["link"]), (&json!(false), &json!("up")));
    let (status, body) = readyz("").await;
    assert_eq!((status, &body["ready"]), (200, &json!(true)), "{body}");
    proxy.release();
    becomes(|status, _| status == 200).await;
    server.stop().await;
}

#[tokio::test]
async fn a_canary_that_never_came_is_null_and_strictly_not_waited_for() {
    let database = Database::create().await;
    let mut settings = settings_at("postgres://nobody@127.0.0.1:1/none");
    settings.notify_database_url = Secret::from(database.url());
    settings.relay.canary_interval = Duration::from_millis(100);
    settings.relay.connect_timeout = Duration::from_secs(1);
    let server = TestServer::start_with(settings);
    server.link_is_up().await;
    let refused = async {
        loop {
            let (status, body) = ask(&server, "GET /readyz?strict=1", "").await;
            if status == 503 {
                return body;
            }
        }
    };
    let refused = timeout(DEADLINE, refused).await.expect("it is not ready in time");
    let expected = json!({ "ready": false, "draining": false, "link": "up", "canary": null });
    assert_eq!(refused, expected);
    server.stop().await;
    // Without a database there is none, and nothing is missed.
    let server = TestServer::start_with(self::settings());
    let (status, body) = ask(&server, "GET /readyz?strict=1", "").await;
    let expected = json!({ "ready": true, "draining": false, "link": "none", "canary": null });
    assert_eq!((status, body), (200, expected));
    server.stop().await;
}

/// What a command says: exit code, stdout, stderr.
async fn run(
    arguments: &[&str],
    admin: SocketAddr,
    more: &[(&str, &str)],
) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(arguments).env_clear().env("TIDEGATE_ADMIN_LISTEN", admin.to_string());
    command.envs(more.iter().copied()).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(DEADLINE, command.output()).await.expect("it ends in time").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code().expect("no signal has ended it");
    (code, text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn the_commands_invalidate_and_mute_through_the_admin_address() {
    let mut settings = settings();
    settings.admin_token = Secret::from("the-admins-token");
    let server = TestServer::start_with(settings);
    let token = [("TIDEGATE_ADMIN_TOKEN", "the-admins-token")];
    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(TOPIC).await;

    let (code, out, err) = run(&["invalidate", EID, "/live/ä?&%"], server.admin, &token).await;
    assert_eq!((code, &*err), (0, ""), "{out}");
    assert!(out.lines().count() == 1 && out.contains("/live/ä?&%"), "{out}");
    assert_eq!(invalidation(&mut viewer, TOPIC).await["endpoints"], json!(["/live/ä?&%"]));
    let (code, out, err) = run(&["mute", EID, "--for", "1h 30m"], server.admin, &token).await;
    assert_eq!((code, &*err), (0, ""), "{out}");
    assert!(out.lines().count() == 1 && out.contains("1h 30m"), "{out}");
    let (code, out, err) = run(&["invalidate", EID], server.admin, &token).await;
    assert_eq!((code, &*err), (0, ""), "{out}");
    viewer.expect_nothing().await;
    let (code, _, err) = run(&["mute", EID, "--for", "0s"], server.admin, &token).await;
    assert_eq!((code, &*err), (0, ""));
    let payload = invalidation(&mut viewer, TOPIC).await;
    let complete = resync(EID).map(Value::from).into_iter().chain(["/live/ä?&%".into()]);
    assert_eq!(payload["endpoints"], complete.collect::<Value>());

    for more in [&[][..], &[("TIDEGATE_ADMIN_TOKEN", "hidden-token")]] {
        let (code, out, err) = run(&["invalidate", EID], server.admin, more).await;
        assert_eq!((code, &*out), (64, ""), "{err}");
        assert!(err.contains("TIDEGATE_ADMIN_TOKEN") && !err.contains("hidden-token"), "{err}");
    }
    for (arguments, named) in [
        (&["invalidate"][..], "EID"),
        (&["mute", EID], "--for"),
        (&["mute", EID, "--for", "soon"], "--for"),
        (&["mute", EID, "--for", "25h"], "24h"),
        (&["mute", "AB 3028", "--for", "1h"], "event id"),
        (&["invalidate", "../AB3028"], "event id"),
        (&["invalidate", ""], "event id"),
        (&["invalidate", EID, ""], "endpoint"),
        (&["invalidate", EID, "/a", "/b"], "/b"),
    ] {
        let (code, out, err) = run(arguments, server.admin, &token).await;
        assert_eq!((code, &*out), (64, ""), "{arguments:?}: {err}");
        assert!(err.contains(named), "{arguments:?}: {err}");
    }
    let settings = [token[0], ("TIDEGATE_NO_SUCH", "1")];
    assert_eq!(run(&["mute", EID, "--for", "1h"], server.admin, &settings).await.0, 64);
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn where_no_gateway_answers_the_commands_exit_1_and_say_where_they_looked() {
    let bound = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = bound.local_addr().unwrap();
    drop(bound);
    for arguments in [&["invalidate", EID][..], &["mute", EID, "--for", "1h"]] {
        let (code, out, err) = run(arguments, closed, &[]).await;
        assert_eq!((code, &*out, err.lines().count()), (1, "", 1), "{err}");
        assert!(err.contains("nobody answers") && err.contains(&closed.to_string()), "{err}");
        let (code, _, err) = run(arguments, ([127, 0, 0, 1], 0).into(), &[]).await;
        assert!(code == 64 && err.contains("TIDEGATE_ADMIN_LISTEN"), "{code} {err}");
    }
    // Something else is there.
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap();
    for (said, named) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", "can be read"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", "not a gateway"),
        ("HTTP/1.1 202 Accepted\r\ncontent-length: 90\r\n\r\n{\"message\":", "can be read"),
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "404"),
        ("", "can be read"),
    ] {
        let answer = async {
            let (mut stream, _) = other.accept().await.unwrap();
            // It answers once it has been asked.
            stream.read_buf(&mut Vec::with_capacity(9_000)).await.unwrap();
            // The command may go before it has been told everything.
            let _ = stream.write_all(said.as_bytes()).await;
            let _ = stream.shutdown().await;
        };
        let ((code, out, err), ()) = tokio::join!(run(&["invalidate", EID], address, &[]), answer);
        assert_eq!((code, &*out), (1, ""), "{said}: {err}");
        assert!(err.contains(named), "{said}: {err}");
    }
    // It accepts, by its backlog, and says nothing.
    let quick = [("TIDEGATE_RELAY__CONNECT_TIMEOUT", "1ms")];
    let (code, _, err) = run(&["invalidate", EID], address, &quick).await;
    assert!(code == 1 && err.contains("no answer in time"), "{code} {err}");
}

/// Who runs it must know that viewers of other gateways were not told.
#[tokio::test]
async fn an_invalidation_that_only_one_gateway_has_told_exits_1() {
    let database = Database::create().await;
    let server = TestServer::start_with(settings_at(database.url()));
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(TOPIC).await;
    let (code, out, err) = run(&["invalidate", EID, "/a"], server.admin, &[]).await;
    assert_eq!((code, &*out), (1, ""), "{err}");
    assert!(err.contains("the database failed") && err.contains("this gateway alone"), "{err}");
    assert_eq!(invalidation(&mut viewer, TOPIC).await["endpoints"], json!(["/a"]));
    viewer.close().await;
    server.stop().await;
}
