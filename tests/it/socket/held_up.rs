//! A client that does not read what is written to it: what ends for it ends all the same, and at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use tidegate::{
    auth::sign::sign,
    clock::unix_now,
    protocol::{
        serializer::Serializer::V2,
        topic::{Privacy, TopicKey},
    },
    secret::Secret,
    server::{Server, settings::Config},
};
use tokio::{net::TcpSocket, time::timeout};

use crate::support::{
    client::Client,
    private::{MEMBER, Private, Table},
    server::{DEADLINE, TestServer, config},
    token,
};

const ADMIN: &str = "admin-auction-AB3028";
const ROOM: &str = "room";

/// Settings by which nobody is closed for not reading, so that whatever ends is ended by something
/// else.
fn patient() -> Config {
    let mut config = config();
    config.limits.write_timeout = 60 * DEADLINE;
    config.limits.merged_write_timeout = 60 * DEADLINE;
    config.limits.outbox_bytes_max = 1 << 30;
    config
}

/// An event admin's token.
fn admin(mut claims: Value) -> String {
    let more = json!({ "role": "authenticated", "admin_events": { "AB3028": "producer" } });
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    token::with_claims(claims)
}

/// A server, and a client that has joined the admin topic and an ordinary room and reads nothing.
struct HeldUp {
    server: TestServer,
    client: Client,
}

impl HeldUp {
    async fn start(config: Config, token: &str) -> Self {
        Self::of(TestServer::start_with(config), token).await
    }

    async fn of(server: TestServer, token: &str) -> Self {
        let held_up = Self::connect(server, token).await;
        held_up.fill().await;
        held_up
    }

    /// Joins, and reads until now.
    async fn connect(server: TestServer, token: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let stream = socket.connect(server.public).await.unwrap();
        let apikey = token::of_role("anon");
        let mut client = Client::over(&server, stream, V2, &apikey).await;
        for (reference, sub_topic) in [("1", ROOM), ("2", ADMIN)] {
            let topic = format!("realtime:{sub_topic}");
            let payload = json!({ "config": {}, "access_token": token });
            client.send(json!([reference, reference, topic, "phx_join", payload])).await;
            assert_eq!(client.message().await[4]["status"], "ok");
        }
        Self { server, client }
    }

    /// Publishes to the room until much waits for the client, whatever its system holds for it.
    async fn fill(&self) {
        let filling = async {
            while self.server.gateway.sockets.highest_backlog() < 1_000_000 {
                self.server.publish(ROOM, &json!({ "x": "x".repeat(200_000) })).await;
            }
        };
        timeout(3 * DEADLINE, filling).await.expect("something waits for the client");
    }

    /// How many are subscribed to a public topic.
    fn subscribers(&self, sub_topic: &str) -> usize {
        let key = TopicKey { sub_topic: sub_topic.into(), privacy: Privacy::Public };
        self.server.gateway.hub.subscriber_count(&key)
    }

    /// Fails unless the client hears neither topic any more, though it reads nothing.
    async fn loses_both(&self) {
        let topics = [ROOM, ADMIN];
        let losing = async {
            while topics.iter().any(|topic| self.subscribers(topic) > 0) {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, losing).await.expect("what has ended is not heard");
        for topic in topics {
            self.server.publish(topic, &json!({ "after": true })).await;
        }
    }

    /// Reads everything that waits, none of which was published after the end.
    async fn reads_on(mut self) {
        self.client.send(json!([null, "beat", "phoenix", "heartbeat", {}])).await;
        loop {
            let message = self.client.message().await;
            if message[1] == "beat" {
                break;
            }
            assert_ne!(message[4]["payload"], json!({ "after": true }), "{message}");
        }
        self.client.close().await;
        self.server.stop().await;
    }

    async fn revoke(&self, body: &Value) {
        let head = "POST /revoke HTTP/1.1";
        let (status, answer) =
            TestServer::request(self.server.admin, head, &body.to_string()).await;
        assert_eq!(status, 202, "{answer}");
    }
}

#[tokio::test]
async fn a_revoked_token_opens_nothing_to_who_does_not_read() {
    for revoked in [json!({ "sub": "u" }), json!({ "session_id": "s" }), json!({ "jti": "t" })] {
        let claims = json!({ "sub": "u", "session_id": "s", "jti": "t", "iat": unix_now() - 60 });
        let held_up = HeldUp::start(patient(), &admin(claims)).await;
        held_up.revoke(&revoked).await;
        held_up.loses_both().await;
        held_up.reads_on().await;
    }
}

#[tokio::test]
async fn a_token_that_has_ended_opens_nothing_to_who_does_not_read() {
    let mut config = patient();
    (config.auth.grace, config.auth.leeway) = (Duration::ZERO, Duration::from_secs(60));
    let token = admin(json!({ "exp": unix_now() + 5 }));
    let held_up = HeldUp::start(config, &token).await;
    held_up.loses_both().await;
    held_up.reads_on().await;
}

/// What a reload that makes this of the settings takes away from a client with this token.
async fn loses_by_reload(config: Config, token: &str, change: fn(&mut Config)) {
    let (is_changed, before) = (Arc::new(AtomicBool::new(false)), config.clone());
    let changed = Arc::clone(&is_changed);
    let read = move || {
        let mut config = before.clone();
        if changed.load(Ordering::SeqCst) {
            change(&mut config);
        }
        Ok(config)
    };
    let server = Server::bind(config).unwrap().with_reload(Box::new(read), None);
    let held_up = HeldUp::of(TestServer::of(server), token).await;
    is_changed.store(true, Ordering::SeqCst);
    let (status, answer) =
        TestServer::request(held_up.server.admin, "POST /reload HTTP/1.1", "").await;
    assert_eq!(status, 200, "{answer}");
    held_up.loses_both().await;
    held_up.reads_on().await;
}

#[tokio::test]
async fn a_key_that_is_taken_away_opens_nothing_to_who_does_not_read() {
    let (mut config, old) = (patient(), Secret::from("the-secret-before-that-one-is-long-enough"));
    config.jwt_secret_previous = old.clone();
    let claims = json!({
        "role": "authenticated", "exp": unix_now() + 3600, "admin_events": { "AB3028": "super" },
    });
    let token = sign(&old, &claims).unwrap();
    loses_by_reload(config, &token, |config| config.jwt_secret_previous = Secret::from("")).await;
}

#[tokio::test]
async fn a_grant_that_is_taken_away_opens_nothing_to_who_does_not_read() {
    let change = |config: &mut Config| {
        config.topics.allow_other = false;
        for rule in &mut config.topic {
            if &*rule.name == "admin" {
                rule.read.clear();
            }
        }
    };
    loses_by_reload(patient(), &admin(json!({})), change).await;
}

#[tokio::test]
async fn who_sends_nothing_and_does_not_read_is_closed_for_its_silence() {
    let mut config = patient();
    config.limits.silence_timeout = Duration::from_secs(3);
    let held_up = HeldUp::start(config, &admin(json!({}))).await;
    let silent = "tidegate_connections_closed_total{code=\"1000\",reason=\"silent\"}";
    held_up.server.metric_reaches(silent, 1.0).await;
    held_up.server.stop().await;
}

/// What it has sent is read when it has taken what is being written; it has twice the time.
#[tokio::test]
async fn who_has_sent_something_that_is_not_read_yet_is_not_silent() {
    let mut config = patient();
    config.limits.silence_timeout = Duration::from_secs(3);
    let mut held_up = HeldUp::start(config, &admin(json!({}))).await;
    held_up.client.send(json!([null, "early", "phoenix", "heartbeat", {}])).await;
    // It came later, and has said nothing at all.
    let other = Client::connect(&held_up.server, V2).await;
    assert_eq!(other.closed().await, Some(1000));
    held_up.reads_on().await;
}

#[tokio::test]
async fn who_does_not_read_does_not_hold_a_drain_up() {
    let mut config = patient();
    config.limits.write_timeout = Duration::from_millis(200);
    config.drain.timeout = 6 * DEADLINE;
    let mut held_up = HeldUp::start(config, &admin(json!({}))).await;
    let status = TestServer::request(held_up.server.admin, "POST /drain HTTP/1.1", "").await.0;
    assert_eq!(status, 202);
    timeout(DEADLINE, held_up.server.ended()).await.expect("the drain goes on");
}

#[tokio::test]
async fn what_policies_say_reaches_who_does_not_read() {
    let private = Private::start(Table::Plain).await;
    let mut config = patient();
    config.database_url = private.config().database_url;
    config.policies.timeout = DEADLINE;
    let member = |name: &str| {
        token::with_claims(json!({ "role": "authenticated", "sub": MEMBER, "name": name }))
    };
    let mut held_up = HeldUp::connect(TestServer::start_with(config), &member("a")).await;
    let topic = "realtime:room:1";
    let join = json!({ "config": { "private": true }, "access_token": member("a") });
    held_up.client.send(json!(["3", "3", topic, "phx_join", join])).await;
    assert_eq!(held_up.client.message().await[4]["status"], "ok");
    private.run("delete from room_members").await;
    let mut lock = PgConnection::connect(&private.url("postgres")).await.unwrap();
    lock.execute("begin; lock table room_members in access exclusive mode").await.unwrap();
    let token = json!({ "access_token": member("b") });
    held_up.client.send(json!(["3", "4", topic, "access_token", token])).await;
    while private.sessions("wait_event_type = 'Lock'").await == 0 {}
    held_up.fill().await;
    let key = TopicKey { sub_topic: "room:1".into(), privacy: Privacy::Private };
    assert_eq!(held_up.server.gateway.hub.subscriber_count(&key), 1);
    lock.execute("commit").await.unwrap();
    let losing = async {
        while held_up.server.gateway.hub.subscriber_count(&key) > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, losing).await.expect("what the policies say counts");
    held_up.reads_on().await;
}
