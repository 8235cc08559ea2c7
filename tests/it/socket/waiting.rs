//! Topics that wait for an answer while tokens are revoked, or keys and rules exchanged: for them it
//! counts when the answer comes, and before the messages that wait behind it.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::{
    access::Rule,
    auth::sign::sign,
    clock::unix_now,
    protocol::serializer::Serializer,
    secret::Secret,
    server::{Config, Server},
};

use crate::support::{
    client::Client,
    page::{Page, browser},
    private::{Gate, MEMBER, Private, STRANGER, Table},
    server::{TestServer, config},
    token,
};

/// The secret that signs the tokens of who is about to lose them.
const OLD: &str = "the-secret-before-that-one-is-long-enough";

/// What takes a token's rights away.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Revocation,
    Keys,
    Rules,
}

const CHANGES: [Change; 3] = [Change::Revocation, Change::Keys, Change::Rules];

/// A token of the subject that is about to be revoked, by the secret that is about to be replaced.
fn losing(session: &str) -> String {
    let claims = json!({
        "role": "authenticated", "sub": STRANGER, "session_id": session, "exp": unix_now() + 3600,
        "admin_events": { "AB3028": "producer" },
    });
    sign(&Secret::from(OLD), &claims).unwrap()
}

/// A server that reads other settings when it is told to.
fn server(before: Config, after: Config) -> TestServer {
    let read = move || Ok(after.clone());
    TestServer::of(Server::bind(before).unwrap().with_reload(Box::new(read), None))
}

/// A server for which this change is one: rules change as `other_rules` says.
fn changing(
    mut before: Config,
    change: Change,
    other_rules: impl FnOnce(&mut Config),
) -> TestServer {
    before.jwt_secret_previous = Secret::from(OLD);
    let mut after = before.clone();
    match change {
        Change::Revocation => {}
        Change::Keys => after.jwt_secret_previous = Secret::default(),
        Change::Rules => other_rules(&mut after),
    }
    server(before, after)
}

impl Change {
    async fn happens(self, server: &TestServer) {
        let (path, body) = match self {
            Self::Revocation => ("revoke", json!({ "sub": STRANGER }).to_string()),
            Self::Keys | Self::Rules => ("reload", String::new()),
        };
        let head = format!("POST /{path} HTTP/1.1");
        let (status, answer) = TestServer::request(server.admin, &head, &body).await;
        assert!(matches!(status, 200 | 202), "{self:?}: {answer}");
    }

    /// What the channel of a topic without a rule is told.
    fn reason(self, sub_topic: &str) -> String {
        match self {
            Self::Revocation => "Token has been revoked".to_owned(),
            Self::Keys => "Failed to validate JWT signature".to_owned(),
            Self::Rules => {
                format!("You do not have permissions to read from this Channel topic: {sub_topic}")
            }
        }
    }
}

fn join(reference: &str, sub_topic: &str, config: &Value, token: &str) -> Value {
    let payload = json!({ "config": config, "access_token": token });
    json!([reference, reference, format!("realtime:{sub_topic}"), "phx_join", payload])
}

fn broadcast(reference: &str, sub_topic: &str) -> Value {
    let envelope = json!({ "type": "broadcast", "event": "e", "payload": {} });
    json!([null, reference, format!("realtime:{sub_topic}"), "broadcast", envelope])
}

/// The last words to a channel that has lost its token, and the answer to a broadcast after them.
fn ended(join_ref: &str, reference: &str, sub_topic: &str, reason: &str) -> [Value; 3] {
    let topic = format!("realtime:{sub_topic}");
    let system = json!({
        "message": reason, "status": "error", "extension": "system", "channel": sub_topic,
    });
    let unmatched = json!({ "status": "error", "response": { "reason": "unmatched topic" } });
    [
        json!([join_ref, null, topic, "system", system]),
        json!([join_ref, join_ref, topic, "phx_close", {}]),
        json!([null, reference, topic, "phx_reply", unmatched]),
    ]
}

/// The socket's own review passes over topics that wait.
#[tokio::test]
async fn a_channel_that_waits_for_policies_loses_its_token_before_what_waits_behind_it() {
    let database = Private::start(Table::Plain).await;
    let mut gate = Gate::close(&database).await;
    gate.open().await;
    for change in CHANGES {
        let server = changing(database.config(), change, |after| after.topics.allow_other = false);
        let private = json!({ "private": true, "broadcast": { "ack": true } });
        let member = token::with_claims(json!({ "role": "authenticated", "sub": MEMBER }));
        let mut other = Client::with_token(&server, Serializer::V2, &member).await;
        let mut client = Client::connect(&server, Serializer::V2).await;
        for (reference, topic, config) in [
            ("1", "room", &json!({})),
            ("2", "gate:writes", &private),
            ("3", "gate:reads", &private),
        ] {
            client.send(join(reference, topic, config, &losing("s"))).await;
            let ok = json!({ "status": "ok", "response": "$any" });
            let topic = format!("realtime:{topic}");
            client.expect(json!([reference, reference, topic, "phx_reply", ok])).await;
        }
        other.join_with("gate:writes", private.clone()).await;
        gate.close_again().await;
        // One channel waits to be told whether it may write, the other what its next token may read.
        client.send(broadcast("4", "gate:writes")).await;
        let next = json!({ "access_token": losing("t") });
        client.send(json!([null, "t", "realtime:gate:reads", "access_token", next])).await;
        client.send(broadcast("5", "gate:reads")).await;
        gate.has_visitors(2).await;
        change.happens(&server).await;
        // The socket has been reviewed when its channel that does not wait has ended.
        let [system, close, _] = ended("1", "", "room", &change.reason("room"));
        client.expect(system).await;
        client.expect(close).await;

        gate.open().await;
        let mut said = Vec::new();
        for _ in 0..6 {
            said.push(client.message().await);
        }
        for (join_ref, reference, topic) in [("2", "4", "gate:writes"), ("3", "5", "gate:reads")] {
            let name = format!("realtime:{topic}");
            let of_topic: Vec<_> = said.iter().filter(|message| message[2] == *name).collect();
            let expected = ended(join_ref, reference, topic, &change.reason(topic));
            assert_eq!(of_topic, expected.each_ref(), "{change:?}");
        }
        client.ends().await;
        assert_eq!(server.metric("tidegate_deliveries_total").await, 0.0, "{change:?}");
        other.close().await;
        server.stop().await;
        database.run("delete from tidegate.revocations").await;
    }
}

/// The settings of a gateway whose database does not answer: a join of a topic that is relayed
/// waits for its LISTEN, in vain. A page takes the answer when it is looked at, and not before.
fn without_a_link() -> Config {
    let mut config = config();
    config.database_url = Secret::from("postgres://nobody@127.0.0.1:1/none");
    config.relay.listen_wait = Duration::from_millis(50);
    config
}

/// A rule that lets an event's producers read what the database notifies.
fn desk(reader: &str) -> Rule {
    let rule = format!(
        r#"
        name = "desk"
        pattern = ["desk_{{eid}}"]
        listen = "desk_{{eid}}"
        event = "news"
        read = [{{ claim = "admin_events.{{eid}}", any_of = ["{reader}"] }}]
        write = [{{ role = ["service_role"] }}]
        denied = "withhold"
        "#
    );
    toml::from_str(&rule).unwrap()
}

#[tokio::test]
async fn a_join_that_waits_for_its_listen_hears_nothing_by_a_token_that_is_lost_meanwhile() {
    for change in CHANGES.map(Some).into_iter().chain([None]) {
        let mut before = without_a_link();
        before.topic.push(desk("producer"));
        let server = changing(before, change.unwrap_or(Change::Revocation), |after| {
            *after.topic.last_mut().unwrap() = desk("super");
        });
        let mut page = Page::open(&server.gateway, browser(1));
        page.send(join("1", "desk_AB3028", &json!({}), &losing("s"))).await;
        if let Some(change) = change {
            change.happens(&server).await;
        }
        // Answered with `ok`, as whoever is withheld.
        page.expect_ok("1", "desk_AB3028").await;
        server.publish("desk_AB3028", &json!({ "n": 1 })).await;
        match change {
            Some(_) => page.expect_nothing().await,
            None => assert_eq!(page.message().await[4]["payload"], json!({ "n": 1 })),
        }
        drop(page);
        server.stop().await;
    }
}

#[tokio::test]
async fn a_join_that_waits_for_its_listen_gains_the_spelling_that_its_rule_gains_meanwhile() {
    let spellings = ["cache_invalidate:AB3028", "cache_invalidate_AB3028"];
    let after = without_a_link();
    let mut before = after.clone();
    before.topic[0].pattern.truncate(1);
    let server = server(before, after);
    let service = token::of_role("service_role");
    let mut writer = Page::with_token(&server.gateway, browser(1), &service);
    writer.ask("1", spellings[0]).await;
    Change::Rules.happens(&server).await;
    writer.expect_ok("1", spellings[0]).await;
    let mut viewer = Page::open(&server.gateway, browser(2));
    viewer.join("1", spellings[1]).await;
    viewer.caught_up().await;
    writer.send(broadcast("2", spellings[0])).await;
    let heard = viewer.message().await;
    let topic = format!("realtime:{}", spellings[1]);
    assert_eq!((&heard[2], &heard[3]), (&json!(topic), &json!("broadcast")));
    drop((writer, viewer));
    server.stop().await;
}

/// A refusal stands; the join behind it is decided about by the rules of its turn.
#[tokio::test]
async fn behind_a_refusal_that_waits_a_join_is_decided_about_by_what_holds_when_its_turn_comes() {
    let mut served = config();
    served.protocol.error_delay = Duration::from_millis(50);
    let mut unserved = served.clone();
    unserved.topics.allow_other = false;
    for (before, after, second) in
        [(unserved.clone(), served.clone(), "ok"), (served, unserved, "error")]
    {
        let server = server(before, after);
        let mut page = Page::open(&server.gateway, browser(1));
        page.send(join("1", "room", &json!({}), "garbage")).await;
        page.ask("2", "room").await;
        Change::Rules.happens(&server).await;
        for (reference, status) in [("1", "error"), ("2", second)] {
            let message = page.message().await;
            let said = (&message[1], &message[4]["status"]);
            assert_eq!(said, (&json!(reference), &json!(status)), "{message}");
        }
        drop(page);
        server.stop().await;
    }
}
