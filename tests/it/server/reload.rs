//! Rules that are read again while clients are joined.

use std::{fs, path::PathBuf};

use serde_json::json;
use tidegate::{
    auth::sign::sign,
    clock::unix_now,
    protocol::serializer::Serializer,
    secret::Secret,
    server::{
        Server,
        settings::{Config, ConfigError},
    },
};

use crate::support::{
    client::Client,
    server::{TestServer, config},
    token,
};

const ADMIN: &str = "admin-auction-AB3028";
const CACHE: &str = "cache_invalidate_AB3028";

/// A settings file of the test's own, taken away at its end.
struct File(PathBuf);

impl File {
    fn new(text: &str) -> Self {
        let file =
            Self(std::env::temp_dir().join(format!("tidegate-{}.toml", uuid::Uuid::new_v4())));
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        fs::write(&self.0, text).unwrap();
    }

    /// A server that reads this file again, with the ports and delays of tests.
    fn server(&self, watched: bool) -> TestServer {
        let path = self.0.clone();
        let read = move || -> Result<Config, ConfigError> {
            let (read, _) = Config::load(Some(&path), Vec::new())?;
            let Config { topic, topics, jwt_secret_previous, .. } = read;
            Ok(Config { topic, topics, jwt_secret_previous, ..config() })
        };
        let server = Server::bind(read().unwrap()).unwrap();
        let watch = watched.then(|| self.0.clone());
        TestServer::of(server.with_reload(Box::new(read), watch))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // A test that has failed leaves what it has.
        let _ = fs::remove_file(&self.0);
    }
}

/// The admin rule, which lets this level read.
fn admin_rule(level: &str) -> String {
    format!(
        r#"
        [[topic]]
        name = "admin"
        pattern = ["admin-auction-{{eid}}"]
        read = [{{ claim = "admin_events.{{eid}}", any_of = ["{level}"] }}]
        write = [{{ role = ["service_role"] }}]
        denied = "withhold"
        "#
    )
}

fn producer() -> String {
    token::with_claims(json!({
        "role": "authenticated", "admin_events": { "AB3028": "producer" },
    }))
}

async fn reload(server: &TestServer) -> (u16, String) {
    TestServer::request(server.admin, "POST /reload HTTP/1.1", "").await
}

/// The reviewer's question: a grant that is taken away ends deliveries at once, not at the next
/// join, and no socket pays for it.
#[tokio::test]
async fn a_grant_that_is_taken_away_or_given_counts_at_once_for_who_has_joined() {
    let file = File::new(&admin_rule("producer"));
    let server = file.server(false);
    let mut client = Client::with_token(&server, Serializer::V2, &producer()).await;
    client.join(ADMIN).await;
    server.publish(ADMIN, &json!({ "n": 1 })).await;
    client.hears(ADMIN, json!({ "n": 1 })).await;

    file.write(&admin_rule("super"));
    assert_eq!(reload(&server).await.0, 200);
    server.metric_falls_to("tidegate_topics", 0.0).await;
    server.publish(ADMIN, &json!({ "n": 2 })).await;
    client.expect_nothing().await;

    file.write(&admin_rule("producer"));
    assert_eq!(reload(&server).await.0, 200);
    server.metric_reaches("tidegate_topics", 1.0).await;
    server.publish(ADMIN, &json!({ "n": 3 })).await;
    client.hears(ADMIN, json!({ "n": 3 })).await;
    assert_eq!(server.metric("tidegate_connections").await, 1.0);
    client.close().await;
    server.stop().await;
}

/// A rule with a NOTIFY channel, whose topics are spelled in these ways.
fn cache_rule(patterns: &str) -> String {
    format!(
        r#"
        [[topic]]
        name = "cache"
        pattern = [{patterns}]
        listen = "cache_invalidate_{{eid}}"
        event = "cache_invalidation"
        merge = {{ window = "3s", carry = "5s", union = "endpoints" }}
        resync = ["/live/event/{{eid}}", "/live/event/{{eid}}/media", "/live/event/{{eid}}/artists"]
        read = [{{ role = ["anon", "authenticated", "service_role"] }}]
        write = [{{ role = ["service_role"] }}]
        "#
    )
}

#[tokio::test]
async fn a_spelling_that_a_rule_gains_is_reached_by_who_has_joined_and_by_requests() {
    let file = File::new(&cache_rule(r#""cache_invalidate_{eid}""#));
    let server = file.server(false);
    let writer_token = token::of_role("service_role");
    let mut writer = Client::with_token(&server, Serializer::V2, &writer_token).await;
    let room = writer.join("room").await;
    writer.join(CACHE).await;

    let both = cache_rule(r#""cache_invalidate_{eid}", "cache_invalidate:{eid}""#);
    file.write(&format!("{both}\n[topics]\nallow_other = false\n"));
    assert_eq!(reload(&server).await.0, 200);
    // All channels of a socket are decided about together: the other one's end shows that.
    writer.message().await;
    writer.expect(json!([room, room, "realtime:room", "phx_close", {}])).await;

    let mut viewer = Client::connect(&server, Serializer::V2).await;
    viewer.join("cache_invalidate:AB3028").await;
    writer.publish(CACHE, json!({ "n": 1 })).await;
    viewer.hears("cache_invalidate:AB3028", json!({ "n": 1 })).await;
    server.publish(CACHE, &json!({ "n": 2 })).await;
    viewer.hears("cache_invalidate:AB3028", json!({ "n": 2 })).await;
    viewer.close().await;
    writer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn an_ordinary_channel_that_is_served_no_more_is_closed_with_its_reason() {
    let file = File::new("");
    let server = file.server(false);
    let mut client = Client::connect(&server, Serializer::V2).await;
    let room = client.join("room").await;
    client.join("cache_invalidate_AB3028").await;
    file.write("[topics]\nallow_other = false\n");
    assert_eq!(reload(&server).await.0, 200);
    let payload = json!({
        "message": "You do not have permissions to read from this Channel topic: room",
        "status": "error", "extension": "system", "channel": "room",
    });
    client.expect(json!([room, null, "realtime:room", "system", payload])).await;
    client.expect(json!([room, room, "realtime:room", "phx_close", {}])).await;
    client.expect_nothing().await;
    assert_eq!(server.metric("tidegate_channels").await, 1.0);
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn mistakes_are_named_without_secrets_and_the_old_rules_hold() {
    let file = File::new(&admin_rule("producer"));
    let server = file.server(false);
    file.write("jwt_secret = \"hidden-secret\"\nlisten = \"nowhere\"\n[[topic]]\nname = 3\n");
    let (status, body) = reload(&server).await;
    assert_eq!(status, 422, "{body}");
    assert!(body.contains("listen") && body.contains("topic"), "{body}");
    assert!(!body.contains("hidden-secret"), "{body}");
    assert_eq!(server.metric("tidegate_reloads_total{result=\"config\"}").await, 1.0);
    let mut client = Client::with_token(&server, Serializer::V2, &producer()).await;
    client.join(ADMIN).await;
    server.publish(ADMIN, &json!({ "n": 1 })).await;
    client.hears(ADMIN, json!({ "n": 1 })).await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_was_given_its_settings_says_that_it_has_none_to_read() {
    let server = TestServer::start();
    let (status, body) = reload(&server).await;
    assert_eq!(status, 422);
    assert!(body.contains("no settings to read again"), "{body}");
    server.stop().await;
}

/// Nobody has to tell the server: operators change the file that is mounted.
#[tokio::test]
async fn a_changed_file_is_read_by_itself() {
    let file = File::new(&admin_rule("producer"));
    let server = file.server(true);
    let mut client = Client::with_token(&server, Serializer::V2, &producer()).await;
    client.join(ADMIN).await;
    file.write(&admin_rule("super_duper"));
    server.metric_reaches("tidegate_reloads_total{result=\"ok\"}", 1.0).await;
    server.metric_falls_to("tidegate_topics", 0.0).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

/// The end of a rotation: tokens of the old secret open nothing, and viewers see on.
#[tokio::test]
async fn a_key_that_is_taken_away_ends_what_it_opened_and_public_topics_flow_on() {
    let file = File::new("jwt_secret_previous = \"the-secret-before-that-one-is-long-enough\"\n");
    let server = file.server(false);
    let claims = json!({
        "role": "authenticated", "exp": unix_now() + 3600, "admin_events": { "AB3028": "super" },
    });
    let old = sign(&Secret::from("the-secret-before-that-one-is-long-enough"), &claims).unwrap();
    let mut client = Client::connect(&server, Serializer::V2).await;
    for (reference, topic) in [("1", "room"), ("2", ADMIN), ("3", CACHE)] {
        let topic = format!("realtime:{topic}");
        let payload = json!({ "config": {}, "access_token": old });
        client.send(json!([reference, reference, topic, "phx_join", payload])).await;
        let ok = json!({ "status": "ok", "response": "$any" });
        client.expect(json!([reference, reference, topic, "phx_reply", ok])).await;
    }
    client.caught_up(CACHE).await;
    file.write("");
    assert_eq!(reload(&server).await.0, 200);
    let payload = json!({
        "message": "Failed to validate JWT signature", "status": "error",
        "extension": "system", "channel": "room",
    });
    client.expect(json!(["1", null, "realtime:room", "system", payload])).await;
    client.expect(json!(["1", "1", "realtime:room", "phx_close", {}])).await;
    server.publish(ADMIN, &json!({ "n": 1 })).await;
    server.publish(CACHE, &json!({ "n": 2 })).await;
    client.hears(CACHE, json!({ "n": 2 })).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}
