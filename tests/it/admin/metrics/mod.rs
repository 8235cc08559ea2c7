//! What is measured, as `/metrics` shows it.

mod clients;

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::{
    clock::unix_now,
    db,
    protocol::serializer::Serializer::{V1, V2},
    secret::Secret,
    server::Config,
};
use tokio::time::timeout;

use crate::support::{
    client::Client,
    postgres::Database,
    proxy::Proxy,
    server::{DEADLINE, TestServer, config, plain_rule},
    system::{self, Shape},
    token,
};

/// Relayed as it comes.
const PLAIN: &str = "plain_AB3028";
/// Merged.
const CACHE: &str = "cache_invalidate_AB3028";
const RECEIVED: &str = "tidegate_commit_to_received_seconds";
const WRITTEN_AT_ONCE: &str = "tidegate_commit_to_write_seconds_count{sent=\"at_once\"}";
const WRITTEN_MERGED: &str = "tidegate_commit_to_write_seconds_count{sent=\"merged\"}";

fn settings(url: &str) -> Config {
    let mut config = config();
    config.database_url = Secret::from(url);
    config.topic.push(plain_rule());
    config
}

/// Broadcasts an invalidation to the event's viewers, over HTTP.
async fn invalidate(server: &TestServer, payload: Value) {
    let head =
        format!("POST /api/broadcast HTTP/1.1\r\napikey: {}", token::of_role("service_role"));
    let message = json!({ "topic": CACHE, "event": "cache_invalidation", "payload": payload });
    let body = json!({ "messages": [message] }).to_string();
    assert_eq!(TestServer::request(server.public, &head, &body).await, (202, String::new()));
}

#[tokio::test]
async fn a_gap_is_open_until_the_first_session_has_caught_up() {
    let database = Database::create().await;
    let mut proxy = Proxy::start("127.0.0.1", database.port()).await;
    proxy.hold_at("pg_is_in_recovery");
    let mut config = settings(database.url());
    config.notify_database_url = Secret::from(&*database.url_at(proxy.address));
    config.relay.connect_timeout = DEADLINE;
    let server = TestServer::start_with(config);
    proxy.has_held().await;
    assert_eq!(server.metric("tidegate_relay_gap_open").await, 1.0);
    assert_eq!(server.metric("tidegate_relay_gaps_total{cause=\"start\"}").await, 1.0);
    proxy.release();
    server.link_is_up().await;
    assert_eq!(server.metric("tidegate_relay_gap_open").await, 0.0);
    assert_eq!(server.metric("tidegate_relay_gaps_total{cause=\"start\"}").await, 1.0);
    server.stop().await;
}

#[tokio::test]
async fn without_a_database_there_is_no_gap() {
    let server = TestServer::start();
    assert_eq!(server.metric("tidegate_relay_gap_open").await, 0.0);
    assert_eq!(server.metric("tidegate_relay_gaps_total{cause=\"start\"}").await, 0.0);
    server.stop().await;
}

/// The session sees a clock that is far ahead of ours; without the difference nobody would believe
/// the stamps that are made by it.
#[tokio::test]
async fn stamps_are_read_by_the_databases_clock() {
    const AHEAD: i64 = 100_000;
    let mut database = Database::create().await;
    let role = format!("clock_{:08x}", fastrand::u32(..));
    let skew = format!(
        "create schema skewed;
        create function skewed.clock_timestamp() returns timestamptz language sql as
            $$ select pg_catalog.clock_timestamp() + interval '{AHEAD} seconds' $$;
        grant usage on schema skewed to public;
        create role {role} login;
        alter role {role} set search_path = skewed, pg_catalog"
    );
    database.run(&skew).await;
    let mut config = settings(database.url());
    let url = database.url().replace("postgres@", &format!("{role}@"));
    config.notify_database_url = Secret::from(&*url);
    config.relay.heartbeat_interval = Duration::from_millis(50);
    let server = TestServer::start_with(config);
    let offset = "tidegate_database_clock_offset_seconds";
    server.metric_reaches(offset, 99_000.0).await;
    assert!(server.metric(offset).await < 101_000.0);

    let mut viewer = Client::connect(&server, V1).await;
    viewer.join(PLAIN).await;
    let stamp = unix_now() + AHEAD;
    database.notify(PLAIN, &json!({ "timestamp": stamp }).to_string()).await;
    viewer.broadcast().await;
    assert_eq!(server.metric(&format!("{RECEIVED}_count")).await, 1.0);
    // One of our own clock is a day old.
    database.notify(PLAIN, &json!({ "timestamp": unix_now() }).to_string()).await;
    viewer.broadcast().await;
    assert_eq!(server.metric(&format!("{RECEIVED}_count")).await, 1.0);
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_notification_is_measured_to_its_arrival_and_to_each_write() {
    let mut database = Database::create().await;
    let server = TestServer::start_with(settings(database.url()));
    server.link_is_up().await;
    let mut viewers = [Client::connect(&server, V1).await, Client::connect(&server, V2).await];
    for viewer in &mut viewers {
        viewer.join(PLAIN).await;
    }
    // From the future, by less than clocks differ.
    for payload in [json!({ "timestamp": unix_now() }), json!({ "timestamp": unix_now() + 20 })] {
        database.notify(PLAIN, &payload.to_string()).await;
        for viewer in &mut viewers {
            viewer.broadcast().await;
        }
    }
    server.metric_reaches(WRITTEN_AT_ONCE, 4.0).await;
    assert_eq!(server.metric(&format!("{RECEIVED}_count")).await, 2.0);
    let below_zero = server.metric(&format!("{RECEIVED}_sum")).await < 0.0;
    assert!(!below_zero, "what is ahead of our clock counts as no time");
    // What has no stamp is relayed all the same.
    for payload in ["{}", r#"{"timestamp":"soon"}"#, r#"{"timestamp":1692374522000}"#] {
        database.notify(PLAIN, payload).await;
        for viewer in &mut viewers {
            viewer.broadcast().await;
        }
    }
    assert_eq!(server.metric(&format!("{RECEIVED}_count")).await, 2.0);
    assert_eq!(server.metric(WRITTEN_AT_ONCE).await, 4.0);
    assert_eq!(server.metric(WRITTEN_MERGED).await, 0.0);
    assert_eq!(server.metric("tidegate_notification_bytes_count").await, 5.0);
    for viewer in viewers {
        viewer.ends().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn what_has_waited_for_its_window_is_measured_apart() {
    let mut database = Database::create().await;
    let mut config = settings(database.url());
    config.topic[0].merge.as_mut().unwrap().window = Duration::from_millis(100);
    let server = TestServer::start_with(config);
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(CACHE).await;
    // On a slow machine each of them may find its window over.
    let waits = async {
        while server.metric(WRITTEN_MERGED).await < 1.0 {
            let payload = json!({ "timestamp": unix_now(), "endpoints": ["/a"] });
            database.notify(CACHE, &payload.to_string()).await;
        }
    };
    timeout(DEADLINE, waits).await.expect("one waits for its window");
    assert!(server.metric(WRITTEN_AT_ONCE).await >= 1.0, "the first has not");
    assert!(server.metric("tidegate_window_wait_seconds_count").await >= 1.0);
    drop(viewer);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    server.stop().await;
}

#[tokio::test]
async fn a_change_of_an_event_that_nobody_has_joined_is_counted() {
    let mut database = Database::create().await;
    let server = TestServer::start_with(settings(database.url()));
    server.link_is_up().await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join("cache_invalidate:AB3028").await;
    let without = "tidegate_published_without_viewer_total";
    let noted = "tidegate_notifications_total{outcome=\"noted\",source=\"stats\"}";
    for (count, (eid, expected)) in
        [("AB3028", 0.0), ("AB3029", 1.0), ("AB3028", 1.0), ("no event", 2.0)].iter().enumerate()
    {
        let stats = json!({ "event_eid": eid, "table": "votes", "operation": "INSERT" });
        database.notify("global_cache_stats", &stats.to_string()).await;
        server.metric_reaches(noted, count as f64 + 1.0).await;
        assert_eq!(server.metric(without).await, *expected, "{eid}");
    }
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn an_event_is_joined_in_vain_if_nothing_was_ever_published_and_the_database_knows_nothing() {
    const UUID: &str = "cache_invalidate_00000000-0000-4000-8000-000000003028";
    let database = system::Database::start(Shape::Production).await;
    let url = database.cluster.url(database.shape.database());
    db::migrate(&Secret::from(&*url)).await.unwrap();
    let mut config = settings(&url.replace("postgres@", "tidegate@"));
    config.relay.listen_wait = Duration::from_millis(1500);
    let server = TestServer::start_with(config);
    server.link_is_up().await;
    let in_vain = "tidegate_events_never_published";
    let mut viewer = Client::connect(&server, V2).await;
    // It has artworks, and is quiet.
    viewer.join_only(CACHE, json!({})).await;
    viewer.broadcast().await;
    server.metric_reaches("tidegate_relay_listens", 1.0).await;
    assert_eq!(server.metric(in_vain).await, 0.0);
    // The row's id in the place of the event's.
    viewer.join_only(UUID, json!({})).await;
    viewer.broadcast().await;
    server.metric_reaches("tidegate_relay_listens", 2.0).await;
    assert_eq!(server.metric(in_vain).await, 1.0);
    assert_eq!(server.metric("tidegate_events_live").await, 2.0);
    let (_, events) = TestServer::request(server.admin, "GET /events HTTP/1.1", "").await;
    let events: Value = serde_json::from_str(&events).unwrap();
    for row in events["events"].as_array().unwrap() {
        assert_eq!(row["never_published"], row["eid"] != "AB3028", "{row}");
    }
    // Whatever anybody publishes is news.
    database.run(&format!("select pg_notify('{UUID}', '{{\"endpoints\":[\"/a\"]}}')")).await;
    viewer.broadcast().await;
    assert_eq!(server.metric(in_vain).await, 0.0);
    drop(viewer);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    server.stop().await;
}

#[tokio::test]
async fn without_a_database_an_event_is_joined_in_vain_until_somebody_publishes() {
    let server = TestServer::start();
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(CACHE).await;
    let in_vain = "tidegate_events_never_published";
    assert_eq!(server.metric(in_vain).await, 1.0);
    invalidate(&server, json!({ "endpoints": ["/a"] })).await;
    viewer.broadcast().await;
    assert_eq!(server.metric(in_vain).await, 0.0);
    drop(viewer);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    server.stop().await;
}

#[tokio::test]
async fn an_event_has_series_of_its_own() {
    let server = TestServer::start();
    let mut viewers = [Client::connect(&server, V1).await, Client::connect(&server, V2).await];
    for viewer in &mut viewers {
        viewer.join(CACHE).await;
    }
    let metric = async |name: &str, eid: &str| {
        server.metric(&format!("tidegate_event_{name}{{eid=\"{eid}\"}}")).await
    };
    assert_eq!(metric("viewers", "AB3028").await, 2.0);
    assert_eq!(metric("viewers", "other").await, 0.0);
    assert_eq!(metric("last_notification_timestamp_seconds", "AB3028").await, 0.0);
    invalidate(&server, json!({ "endpoints": ["/a"] })).await;
    for viewer in &mut viewers {
        viewer.broadcast().await;
        // And once more, with what it was caught up with.
        viewer.broadcast().await;
    }
    let deliveries = "tidegate_event_deliveries_total{eid=\"AB3028\"}";
    server.metric_reaches(deliveries, 2.0).await;
    assert_eq!(metric("notifications_total", "AB3028").await, 1.0);
    assert_eq!(metric("merged_total", "AB3028").await, 0.0);
    assert_eq!(metric("notifications_total", "other").await, 0.0);
    assert!(metric("last_notification_timestamp_seconds", "AB3028").await > 1e9);
    for viewer in viewers {
        viewer.ends().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn what_a_mute_holds_back_is_pending() {
    let server = TestServer::start();
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join(CACHE).await;
    let (muted, pending) = ("tidegate_events_muted", "tidegate_invalidations_pending");
    let mute = async |length: &str| {
        let head = format!("POST /events/AB3028/mute?for={length} HTTP/1.1");
        assert_eq!(TestServer::request(server.admin, &head, "").await.0, 200);
    };
    mute("10m").await;
    for endpoint in ["/a", "/b", "/c"] {
        invalidate(&server, json!({ "endpoints": [endpoint] })).await;
    }
    assert_eq!((server.metric(muted).await, server.metric(pending).await), (1.0, 3.0));
    mute("0s").await;
    viewer.broadcast().await;
    assert_eq!((server.metric(muted).await, server.metric(pending).await), (0.0, 0.0));
    assert_eq!(server.metric("tidegate_event_merged_total{eid=\"AB3028\"}").await, 2.0);
    drop(viewer);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn the_runtime_tells_how_busy_it_is() {
    let server = TestServer::start();
    assert_eq!(server.metric("tidegate_tokio_workers").await, 3.0);
    assert!(server.metric("tidegate_tokio_tasks").await >= 1.0);
    let busy = server.metric("tidegate_tokio_busy_seconds_total").await;
    // Each look keeps it busy.
    let rises = async { while server.metric("tidegate_tokio_busy_seconds_total").await <= busy {} };
    timeout(DEADLINE, rises).await.expect("it is busy");
    server.metric("tidegate_tokio_global_queue_tasks").await;
    server.stop().await;
}
