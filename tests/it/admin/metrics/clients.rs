//! Connections, requests, joins, tokens, fan-outs: what clients do is counted, and nothing else.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use tidegate::{
    clock::unix_now,
    protocol::serializer::Serializer::{V1, V2},
    server::Gateway,
};
use tokio::time::advance;

use crate::support::{
    client::Client,
    page::{Page, browser},
    raw,
    server::{TestServer, config, counted},
    token::{forged, of_role, with_claims},
};

const WEBSOCKET: &str = "/realtime/v1/websocket?vsn=2.0.0&apikey=";
const BROADCAST: &str = "/realtime/v1/api/broadcast";

/// The series of some metrics, as they were at one time.
struct Series {
    metrics: &'static [&'static str],
    values: BTreeMap<String, f64>,
}

impl Series {
    /// Those of these metrics, of a histogram its `_count`.
    async fn of(server: &TestServer, metrics: &'static [&'static str]) -> Self {
        Self { metrics, values: Self::read(server, metrics).await }
    }

    async fn read(server: &TestServer, metrics: &[&str]) -> BTreeMap<String, f64> {
        let (status, text) = TestServer::request(server.admin, "GET /metrics HTTP/1.1", "").await;
        assert_eq!(status, 200);
        let series = text.lines().filter_map(|line| line.rsplit_once(' '));
        series
            .filter_map(|(name, value)| Some((name.strip_prefix("tidegate_")?, value)))
            .filter(|(name, _)| metrics.contains(&name.split('{').next().unwrap_or(name)))
            .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
            .collect()
    }

    /// Fails unless exactly these series have changed since, by so much.
    async fn changed_by(self, server: &TestServer, changes: &[(&str, f64)]) {
        let expected: BTreeMap<_, _> =
            changes.iter().map(|(name, change)| ((*name).to_owned(), *change)).collect();
        let mut changed = Self::read(server, self.metrics).await;
        for (name, value) in &mut changed {
            *value -= self.values.get(name).unwrap_or_else(|| panic!("{name} is new"));
        }
        changed.retain(|_, change| *change != 0.0);
        assert_eq!(changed, expected);
    }
}

#[tokio::test]
async fn a_sockets_life_is_counted_from_its_handshake_to_its_end() {
    let server = TestServer::start();
    let before = Series::of(
        &server,
        &[
            "connections",
            "connections_accepted_total",
            "connections_closed_total",
            "connections_refused_total",
            "connection_seconds_count",
            "handshake_seconds_count",
            "http_requests_total",
        ],
    )
    .await;
    let client = Client::connect(&server, V2).await;
    let staying = Client::connect(&server, V1).await;
    client.close().await;
    server.metric_falls_to("tidegate_connections", 1.0).await;
    let forger = raw::upgrade(&format!("{WEBSOCKET}{}", forged(&json!({ "role": "anon" }))), &[]);
    assert_eq!(raw::ask(&server, forger).await.status, 401);
    before
        .changed_by(
            &server,
            &[
                ("connections", 1.0),
                ("connections_accepted_total", 2.0),
                ("connections_closed_total{code=\"none\",reason=\"peer\"}", 1.0),
                ("connections_refused_total{reason=\"token\"}", 1.0),
                ("connection_seconds_count", 1.0),
                ("handshake_seconds_count{result=\"ok\"}", 2.0),
                ("handshake_seconds_count{result=\"refused\"}", 1.0),
                ("http_requests_total{route=\"websocket\",status=\"101\"}", 2.0),
                ("http_requests_total{route=\"websocket\",status=\"401\"}", 1.0),
            ],
        )
        .await;
    staying.close().await;
    server.stop().await;
}

#[tokio::test]
async fn requests_are_counted_by_route_and_status() {
    let server = TestServer::start();
    let before = Series::of(&server, &["http_requests_total", "handshake_seconds_count"]).await;
    let service = format!("apikey: {}", of_role("service_role"));
    let body = json!({ "messages": [{ "topic": "t", "event": "e", "payload": {} }] }).to_string();
    for (request, status) in [
        (raw::post(BROADCAST, &[&service], &body), 202),
        (raw::post(BROADCAST, &[], &body), 401),
        (raw::post(&format!("{BROADCAST}/t/events/e"), &[&service], "{}"), 202),
        (raw::post(&format!("{BROADCAST}/t"), &[&service], "{}"), 404),
        (raw::post("/somewhere?apikey=secret", &[], ""), 404),
        (b"OPTIONS /api/broadcast HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(), 204),
        (b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(), 200),
        (b"GET /socket/websocket HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(), 400),
    ] {
        assert_eq!(raw::ask(&server, request).await.status, status);
    }
    before
        .changed_by(
            &server,
            &[
                ("http_requests_total{route=\"broadcast\",status=\"202\"}", 2.0),
                ("http_requests_total{route=\"broadcast\",status=\"401\"}", 1.0),
                ("http_requests_total{route=\"unknown\",status=\"404\"}", 2.0),
                ("http_requests_total{route=\"preflight\",status=\"204\"}", 1.0),
                ("http_requests_total{route=\"healthz\",status=\"200\"}", 1.0),
                ("http_requests_total{route=\"websocket\",status=\"400\"}", 1.0),
                ("handshake_seconds_count{result=\"refused\"}", 1.0),
            ],
        )
        .await;
    server.stop().await;
}

/// A hidden tab beats once a minute, a frozen page not at all; both are seen before they are missed.
#[tokio::test(start_paused = true)]
async fn a_heartbeat_after_more_than_40_seconds_of_silence_is_late() {
    let gateway = Gateway::new(config()).unwrap();
    let beats =
        |timing| counted(&gateway, &format!("tidegate_heartbeats_total{{timing=\"{timing}\"}}"));
    let mut page = Page::open(&gateway, browser(1));
    advance(Duration::from_secs(40)).await;
    page.expect_nothing().await;
    assert_eq!((beats("on_time"), beats("late")), (1, 0));
    advance(Duration::from_millis(40_001)).await;
    page.expect_nothing().await;
    assert_eq!((beats("on_time"), beats("late")), (1, 1));
    // What it says otherwise is a sign of life, too.
    advance(Duration::from_secs(30)).await;
    page.join("1", "room").await;
    advance(Duration::from_secs(30)).await;
    page.expect_nothing().await;
    assert_eq!((beats("on_time"), beats("late")), (2, 1));
}

/// What the published clients send, `tests/js/generations.test.js` shows.
#[tokio::test]
async fn a_sockets_first_join_tells_its_clients_generation() {
    let server = TestServer::start();
    let before = Series::of(&server, &["client_versions_total"]).await;
    let config = json!({
        "broadcast": { "ack": false, "self": false },
        "presence": { "key": "", "enabled": false },
        "postgres_changes": [], "private": false,
    });
    let mut newest = Client::connect(&server, V2).await;
    newest.send(json!([null, "1", "phoenix", "heartbeat", {}])).await;
    newest.expect(json!([null, "1", "phoenix", "phx_reply", "$any"])).await;
    newest.join_with("room", config.clone()).await;
    newest.join_with("lobby", json!({})).await;
    let mut unlike_any = Client::connect(&server, V2).await;
    unlike_any.join_with("room", json!({})).await;
    let mut older = Client::connect(&server, V1).await;
    older.join_with("room", config).await;
    let silent = Client::connect(&server, V1).await;
    before
        .changed_by(
            &server,
            &[
                ("client_versions_total{version=\"2.81+\"}", 1.0),
                ("client_versions_total{version=\"2.12+\"}", 1.0),
                ("client_versions_total{version=\"other\"}", 1.0),
            ],
        )
        .await;
    for client in [newest, unlike_any, older, silent] {
        client.close().await;
    }
    server.stop().await;
}

/// Each channel that was opened ends exactly once.
#[tokio::test]
async fn channels_end_for_named_reasons() {
    let mut config = config();
    config.limits.broadcasts_per_second_max = 1;
    let server = TestServer::start_with(config);
    let before = Series::of(&server, &["joins_total", "channels_ended_total", "channels"]).await;
    let mut client = Client::connect(&server, V2).await;
    let left = client.join("left").await;
    client.send(json!([left, "90", "realtime:left", "phx_leave", {}])).await;
    client.expect(json!([left, "90", "realtime:left", "phx_reply", "$any"])).await;
    client.expect(json!([left, left, "realtime:left", "phx_close", {}])).await;

    let replaced = client.join("replaced").await;
    client.join("replaced").await;
    client.expect(json!([replaced, replaced, "realtime:replaced", "phx_close", {}])).await;

    let forged = forged(&json!({ "role": "anon" }));
    let ended = client.join("token").await;
    let refresh = json!({ "access_token": forged });
    client.send(json!([ended, "91", "realtime:token", "access_token", refresh])).await;
    client.expect(json!([ended, null, "realtime:token", "system", "$any"])).await;
    client.expect(json!([ended, ended, "realtime:token", "phx_close", {}])).await;

    let fast = client.join("fast").await;
    let push = json!({ "type": "broadcast", "event": "e", "payload": {} });
    for _ in 0..61 {
        client.send(json!([fast, null, "realtime:fast", "broadcast", push])).await;
    }
    client.expect(json!([fast, null, "realtime:fast", "system", "$any"])).await;
    client.expect(json!([fast, fast, "realtime:fast", "phx_close", {}])).await;

    let mut staying = Client::connect(&server, V2).await;
    staying.join("room").await;
    client.join("lobby").await;
    client.close().await;
    server.metric_falls_to("tidegate_channels", 1.0).await;
    before
        .changed_by(
            &server,
            &[
                ("joins_total{code=\"\",result=\"ok\"}", 7.0),
                ("channels", 1.0),
                ("channels_ended_total{reason=\"left\"}", 1.0),
                ("channels_ended_total{reason=\"replaced\"}", 1.0),
                ("channels_ended_total{reason=\"token\"}", 1.0),
                ("channels_ended_total{reason=\"too_fast\"}", 1.0),
                ("channels_ended_total{reason=\"connection\"}", 2.0),
            ],
        )
        .await;
    staying.close().await;
    server.stop().await;
}

#[tokio::test]
async fn tokens_are_counted_when_they_are_verified_exchanged_and_over() {
    let server = TestServer::start();
    let user =
        |seconds: i64| with_claims(json!({ "role": "authenticated", "exp": unix_now() + seconds }));
    let mut client = Client::connect(&server, V2).await;
    let before = Series::of(
        &server,
        &[
            "tokens_total",
            "tokens_accepted_total",
            "token_seconds_count",
            "token_refreshes_total",
            "token_expiries_total",
            "channels_ended_total",
        ],
    )
    .await;
    let topic = "realtime:room";
    let join = |token: &str| json!({ "config": {}, "access_token": token });
    client.send(json!(["1", "1", topic, "phx_join", join(&user(3600))])).await;
    client.expect(json!(["1", "1", topic, "phx_reply", "$any"])).await;
    let refresh = async |client: &mut Client, token: &Value| {
        client.send(json!(["1", "2", topic, "access_token", { "access_token": token }])).await;
        client.expect_nothing().await;
    };
    let short = user(2);
    for token in [json!(user(7200)), json!(short), json!(short), Value::Null, json!("sb_x")] {
        refresh(&mut client, &token).await;
    }
    client.expect(json!(["1", null, topic, "system", "$any"])).await;
    client.expect(json!(["1", "1", topic, "phx_close", {}])).await;
    client.send(json!(["3", "3", topic, "phx_join", join(&user(3600))])).await;
    client.expect(json!(["3", "3", topic, "phx_reply", "$any"])).await;
    let forged = forged(&json!({ "role": "authenticated" }));
    client.send(json!(["3", "4", topic, "access_token", { "access_token": forged }])).await;
    client.expect(json!(["3", null, topic, "system", "$any"])).await;
    client.expect(json!(["3", "3", topic, "phx_close", {}])).await;
    let missing = raw::ask(&server, raw::upgrade("/socket/websocket", &[])).await;
    assert_eq!(missing.status, 401);
    before
        .changed_by(
            &server,
            &[
                ("tokens_total{result=\"ok\"}", 4.0),
                ("tokens_total{result=\"signature\"}", 1.0),
                ("tokens_total{result=\"missing\"}", 1.0),
                ("tokens_accepted_total{algorithm=\"HS256\",key=\"current\"}", 4.0),
                ("token_seconds_count", 5.0),
                ("token_refreshes_total{result=\"ok\"}", 2.0),
                ("token_refreshes_total{result=\"refused\"}", 1.0),
                ("token_expiries_total", 1.0),
                ("channels_ended_total{reason=\"token\"}", 2.0),
            ],
        )
        .await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_fan_out_tells_how_many_it_reaches_and_how_much_waits() {
    let mut config = config();
    config.limits.connections_max = 7;
    let server = TestServer::start_with(config);
    assert_eq!(server.metric("tidegate_connections_max").await, 7.0);
    assert_eq!(server.metric("tidegate_outbox_max_bytes").await, f64::from(1 << 20));
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(&server, V2).await;
        client.join("room").await;
        clients.push(client);
    }
    let before = Series::of(
        &server,
        &[
            "deliveries_total",
            "broadcasts_total",
            "fanout_seconds_count",
            "fanout_receivers_sum",
            "fanout_receivers_count",
        ],
    )
    .await;
    let payload = json!({ "x": "x".repeat(30_000) });
    server.publish("room", &payload).await;
    server.publish("nobody", &payload).await;
    for client in &mut clients {
        client.broadcast().await;
    }
    before
        .changed_by(
            &server,
            &[
                ("deliveries_total", 3.0),
                ("broadcasts_total{source=\"rest\"}", 2.0),
                ("fanout_seconds_count", 2.0),
                ("fanout_receivers_sum", 3.0),
                ("fanout_receivers_count", 2.0),
            ],
        )
        .await;
    let highest = server.metric("tidegate_outbox_high_water_bytes").await;
    assert!((30_000.0..40_000.0).contains(&highest), "{highest}");
    // Whoever looks next sees the same.
    assert_eq!(server.metric("tidegate_outbox_high_water_bytes").await, highest);
    for client in clients {
        client.close().await;
    }
    server.stop().await;
}
