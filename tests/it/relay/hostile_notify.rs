//! Any role of the database may NOTIFY on any channel. What one that has no other right can bring
//! about, and what it cannot: docs/security/database.md says no more than these tests.

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tidegate::{db, protocol::serializer::Serializer::V2, secret::Secret};

use crate::support::{
    client::{Client, message_of},
    page::{Page, browser},
    postgres::Database,
    server::{TestServer, config_of_long_windows},
    token,
};

const TOPIC: &str = "cache_invalidate_AB3028";

/// A gateway, its database, and a session of a role that may connect and nothing else.
struct Stage {
    server: TestServer,
    database: Database,
    stranger: PgConnection,
}

impl Stage {
    async fn start() -> Self {
        let mut database = Database::create().await;
        db::migrate(&Secret::from(database.url())).await.unwrap();
        let role = format!("stranger_{:016x}", fastrand::u64(..));
        database.run(&format!("create role {role}")).await;
        let mut stranger = database.connect().await;
        stranger.execute(AssertSqlSafe(format!("set role {role}"))).await.unwrap();
        let mut config = config_of_long_windows();
        config.database_url = Secret::from(database.url());
        config.relay.canary_interval = std::time::Duration::from_millis(100);
        let server = TestServer::start_with(config);
        server.link_is_up().await;
        Self { server, database, stranger }
    }

    async fn notify(&mut self, channel: &str, payload: &str) {
        let notify = sqlx::query("select pg_notify($1, $2)").bind(channel).bind(payload);
        self.stranger.execute(notify).await.unwrap();
    }

    /// Fails unless viewers are still told, and nothing of what came before.
    async fn ends_sound(mut self, mut viewer: Client) {
        let marker = json!({ "marker": 1 });
        self.notify("auction_winner_AB3028", &marker.to_string()).await;
        let (topic, envelope) = viewer.broadcast().await;
        assert_eq!((&*topic, &envelope["payload"]), ("realtime:auction_winner_AB3028", &marker));
        viewer.ends().await;
        assert_eq!(self.server.metric("tidegate_relay_link_up").await, 1.0);
        assert_eq!(
            self.server.metric("tidegate_relay_reconnects_total{cause=\"broken\"}").await,
            0.0
        );
        self.stranger.close().await.unwrap();
        self.server.stop().await;
    }

    async fn viewer(&self) -> Client {
        let mut viewer = Client::connect(&self.server, V2).await;
        viewer.join(TOPIC).await;
        viewer.join("auction_winner_AB3028").await;
        viewer
    }
}

/// The integrity of what is told is the database's: viewers fetch more than they need, or are shown
/// a winner who is none until they fetch.
#[tokio::test]
async fn a_role_without_rights_can_tell_the_viewers_of_an_event() {
    let mut stage = Stage::start().await;
    let mut viewer = stage.viewer().await;
    let forged = json!({ "type": "vote_cast", "endpoints": ["/live/forged"] });
    stage.notify(TOPIC, &forged.to_string()).await;
    let (topic, envelope) = viewer.broadcast().await;
    assert_eq!((topic, &envelope["payload"]), (format!("realtime:{TOPIC}"), &forged));
    // As every message after a catch-up, it comes once more with what was told before.
    assert_eq!(viewer.broadcast().await.1["payload"]["merged"], 1);
    stage.ends_sound(viewer).await;
}

#[tokio::test]
async fn a_role_without_rights_reaches_no_topic_that_the_database_does_not_tell_of() {
    let mut stage = Stage::start().await;
    let service = token::of_role("service_role");
    let mut viewer = Client::with_token(&stage.server, V2, &service).await;
    viewer.join("auction_winner_AB3028").await;
    let topics = [
        "room",
        "admin-auction-AB3028",
        "event_offers_00000000-0000-4000-8000-0000000000ff_00000000-0000-4000-8000-00000000000a",
        "global_cache_stats",
        "tidegate_revocations",
    ];
    for topic in topics {
        viewer.join(topic).await;
    }
    for topic in topics {
        for channel in [topic.to_owned(), format!("realtime:{topic}")] {
            if channel.len() < 64 {
                stage
                    .notify(&channel, r#"{"event_eid":"AB3028","endpoints":["/live/forged"]}"#)
                    .await;
            }
        }
    }
    stage.ends_sound(viewer).await;
}

#[tokio::test]
async fn what_a_role_without_rights_floods_an_event_with_leaves_as_one_message_per_window() {
    let mut stage = Stage::start().await;
    let viewer = stage.viewer().await;
    // All of one transaction, and each in its own: the window is the event's, whoever sends.
    let many = "select pg_notify('cache_invalidate_AB3028',
        json_build_object('endpoints', json_build_array('/live/' || n))::text)
        from generate_series(1, 3000) n";
    stage.stranger.execute(many).await.unwrap();
    for number in 0..300 {
        stage
            .notify(TOPIC, &json!({ "endpoints": [format!("/live/x{number}")] }).to_string())
            .await;
    }
    let mut viewer = viewer;
    let offered = "tidegate_notifications_total{outcome=\"offered\",source=\"event\"}";
    stage.server.metric_reaches(offered, 3300.0).await;
    let first = "tidegate_invalidations_sent_total{reason=\"leading\"}";
    stage.server.metric_reaches(first, 1.0).await;
    viewer.send(json!([null, "marker", "phoenix", "heartbeat", {}])).await;
    let (mut messages, mut longest) = (0, 0);
    while let Some((_, envelope)) = broadcast_before_marker(&mut viewer).await {
        messages += 1;
        longest = longest.max(envelope["payload"]["endpoints"].as_array().unwrap().len());
    }
    assert!((1..=2).contains(&messages), "the first, and once more with what was told: {messages}");
    assert!(longest <= 2000, "{longest} endpoints in one message");
    stage.ends_sound(viewer).await;
}

async fn broadcast_before_marker(viewer: &mut Client) -> Option<(String, Value)> {
    let message = message_of(V2, &viewer.frame().await);
    (message[3] == "broadcast")
        .then(|| (message[2].as_str().unwrap().to_owned(), message[4].clone()))
}

/// Nor does a forged id, of a row that is not there or of another event, keep anything from
/// anybody.
#[tokio::test]
async fn no_form_of_a_notification_ends_the_link_or_reaches_who_should_not_hear_it() {
    let mut stage = Stage::start().await;
    let mut viewer = stage.viewer().await;
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(7980));
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(3900), "]".repeat(3900));
    let not_relayed = ["", "x", "[]", "7", "null", "\"x\"", "{", "{\"a\":}", "\u{feff}{}", &deep];
    for payload in not_relayed {
        stage.notify(TOPIC, payload).await;
        stage.notify("auction_winner_AB3028", payload).await;
        stage.notify("global_cache_stats", payload).await;
    }
    for payload in
        [r#"{"event_eid":7}"#, r#"{"event_eid":"AB3028\n../../x"}"#, r#"{"event_eid":"*"}"#, &large]
    {
        stage.notify("global_cache_stats", payload).await;
    }
    let ids = ["-1", "0", "9223372036854775807", "\"7\"", "null", "[1]", "{}", "1.5"];
    for id in ids {
        stage.notify("auction_winner_AB3028", &format!("{{\"id\":{id},\"winner\":true}}")).await;
    }
    // Of a rule that does not merge, what is an object passes as it came.
    for _ in ids {
        let (topic, envelope) = viewer.broadcast().await;
        assert_eq!(topic, "realtime:auction_winner_AB3028");
        assert_eq!(envelope["payload"]["winner"], true);
    }
    stage.ends_sound(viewer).await;
}

/// The gateway believes a canary by its nonce, which nobody else is told.
#[tokio::test]
async fn a_forged_canary_is_not_believed() {
    let mut stage = Stage::start().await;
    let viewer = stage.viewer().await;
    let seen = stage.server.metric("tidegate_canary_seconds_count").await;
    stage.server.metric_reaches("tidegate_canary_seconds_count", seen + 1.0).await;
    // Its name has 122 bits of chance; a superuser reads it in pg_stat_activity, a stranger does not.
    let visible: Vec<String> = sqlx::query_scalar(
        "select query from pg_stat_activity where application_name = 'tidegate'",
    )
    .fetch_all(&mut stage.stranger)
    .await
    .unwrap();
    assert!(visible.iter().all(|query| query == "<insufficient privilege>"), "{visible:?}");
    let gateway = "select replace(id::text, '-', '') from tidegate.gateways";
    let channel = format!("tidegate_canary_{}", stage.database.value::<String>(gateway).await);
    for nonce in ["", "x", "00000000000000000000000000000000"] {
        stage.notify(&channel, nonce).await;
    }
    stage.ends_sound(viewer).await;
}

#[tokio::test]
async fn a_flood_of_monitoring_notifications_is_noted_and_tells_nobody() {
    let mut stage = Stage::start().await;
    let viewer = stage.viewer().await;
    // One that may be deaf to the event, and is told so once; no number of names tells it again.
    let mut silent = Page::open(&stage.server.gateway, browser(2));
    for _ in 0..2 {
        assert_eq!(silent.message().await[3], "phx_error");
    }
    let many = "select pg_notify('global_cache_stats',
        json_build_object('event_eid', 'AB' || n)::text) from generate_series(1, 5000) n";
    stage.stranger.execute(many).await.unwrap();
    let noted = "tidegate_notifications_total{outcome=\"noted\",source=\"stats\"}";
    stage.server.metric_reaches(noted, 5000.0).await;
    silent.expect_nothing().await;
    drop(silent);
    stage.ends_sound(viewer).await;
}

/// NOTIFY is the one right that everybody has.
#[tokio::test]
async fn a_role_without_rights_reads_and_writes_nothing_of_the_gateways() {
    let mut stage = Stage::start().await;
    for statement in [
        "select * from tidegate.broadcast_history",
        "select * from tidegate.lost_sockets",
        "select * from tidegate.revocations",
        "insert into tidegate.revocations default values",
        "delete from tidegate.broadcast_history",
        "select manual_cache_invalidation('AB3028')",
        "select get_cache_invalidation_stats()",
        "create table tidegate.t ()",
    ] {
        let error = stage.stranger.execute(statement).await.unwrap_err();
        let code = error.as_database_error().unwrap().code().unwrap().into_owned();
        assert_eq!(code, "42501", "{statement}: {error}");
    }
    let viewer = stage.viewer().await;
    stage.ends_sound(viewer).await;
}
