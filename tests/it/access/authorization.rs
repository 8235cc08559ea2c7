//! Every decision of `protocol/authorization.json`: by the function alone, by a server, and as
//! `tidegate config --explain` says it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tidegate::{
    access::{AccessRequest, Action, Rules},
    auth::{Claims, TokenError},
    clock::unix_now,
    protocol::{serializer::Serializer, topic::Privacy},
    server::Config,
};

use tokio::time::Instant;

use crate::support::{
    client::Client,
    page::{Page, browser},
    server::{DEADLINE, TestServer, config},
    token,
};

/// The table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Table {
    #[serde(rename = "about")]
    _about: String,
    pub(crate) who: BTreeMap<String, Who>,
    pub(crate) decisions: Vec<Row>,
}

/// Somebody.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Who {
    claims: Map<String, Value>,
    fault: Option<Fault>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Fault {
    Expired,
    Signature,
}

/// What everybody may do with one topic.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    pub(crate) topic: String,
    #[serde(default)]
    pub(crate) private: bool,
    pub(crate) rule: Option<String>,
    pub(crate) read: BTreeMap<String, String>,
    pub(crate) write: BTreeMap<String, String>,
}

impl Table {
    pub(crate) fn load() -> Self {
        serde_json::from_str(include_str!("../../../protocol/authorization.json")).unwrap()
    }
}

impl Who {
    fn token(&self) -> String {
        let exp = unix_now() + if self.fault == Some(Fault::Expired) { -3600 } else { 3600 };
        let mut claims = self.claims.clone();
        claims.insert("exp".to_owned(), exp.into());
        match self.fault {
            Some(Fault::Signature) => token::forged(&claims.into()),
            Some(Fault::Expired) | None => token::with_claims(claims.into()),
        }
    }

    fn claims(&self) -> Result<Claims, TokenError> {
        let mut claims = self.claims.clone();
        claims.insert("exp".to_owned(), i64::MAX.into());
        match self.fault {
            Some(Fault::Expired) => Err(TokenError::Expired { seconds: 3600 }),
            Some(Fault::Signature) => Err(TokenError::Signature),
            None => Claims::try_from(claims),
        }
    }
}

fn rules() -> Rules {
    let config = Config::defaults();
    Rules::new(config.topic, config.topics)
}

#[test]
fn the_function_decides_as_the_table_says() {
    let (rules, table) = (rules(), Table::load());
    let anon = table.who["anon"].claims().unwrap();
    for row in &table.decisions {
        for (action, cells) in [(Action::Read, &row.read), (Action::Write, &row.write)] {
            assert!(cells.keys().eq(table.who.keys()), "{}: somebody is missing", row.topic);
            for (name, expected) in cells {
                let claims = table.who[name].claims();
                let decision = rules.decide(&AccessRequest {
                    action,
                    sub_topic: &row.topic,
                    privacy: if row.private { Privacy::Private } else { Privacy::Public },
                    token: claims.as_ref(),
                    fallback: Some(&anon),
                });
                let context = format!("{name}, {action:?} {}", row.topic);
                assert_eq!(decision.to_string(), *expected, "{context}");
                let rule = decision.rule.map(|(rule, _)| rule.name.to_string());
                assert_eq!(rule, row.rule, "{context}");
            }
        }
    }
}

/// A rule that nobody has thought through does not get in.
#[test]
fn every_rule_and_every_spelling_is_in_the_table() {
    let (config, table) = (Config::defaults(), Table::load());
    for rule in &config.topic {
        for pattern in &rule.pattern {
            let is_covered = table.decisions.iter().any(|row| {
                row.rule.as_deref() == Some(&*rule.name) && pattern.captures(&row.topic).is_some()
            });
            assert!(is_covered, "{pattern} of rule {} is not in the table", rule.name);
        }
    }
}

/// Joins as everybody and asks the server, by the wire alone, what it lets them do.
#[tokio::test]
async fn a_server_does_what_the_table_says() {
    let (server, table) = (TestServer::start(), Table::load());
    for row in table.decisions.iter().filter(|row| !row.private) {
        for (name, who) in &table.who {
            let context = format!("{name}, {}", row.topic);
            let mut client = Client::connect(&server, Serializer::V2).await;
            let topic = format!("realtime:{}", row.topic);
            let payload = json!({
                "config": { "broadcast": { "self": true } }, "access_token": who.token(),
            });
            client.send(json!(["1", "1", topic, "phx_join", payload])).await;
            let reply = client.message().await;
            let (expected, _) = row.read[name].split_once(':').unwrap();
            if expected == "refused" {
                assert_eq!(reply[4]["status"], "error", "{context}: {reply}");
                client.close().await;
                continue;
            }
            assert_eq!(reply[4]["status"], "ok", "{context}: {reply}");
            if expected == "allowed" && row.rule.as_deref() == Some("cache") {
                client.caught_up(&row.topic).await;
            }
            // What it reads: a broadcast of the service is heard or not.
            if row.write["service"].starts_with("allowed") {
                server.publish(&row.topic, &json!({ "by": "service" })).await;
                if expected == "allowed" {
                    client.hears(&row.topic, json!({ "by": "service" })).await;
                }
            }
            // What it writes: its own broadcast comes back or is dropped without a word.
            let broadcast = json!({ "type": "broadcast", "event": "e", "payload": { "by": name } });
            client.send(json!(["1", "2", topic, "broadcast", broadcast])).await;
            if row.write[name].starts_with("allowed") && expected == "allowed" {
                client.hears(&row.topic, json!({ "by": name })).await;
            }
            client.expect_nothing().await;
            client.close().await;
        }
    }
    server.stop().await;
}

/// Where only private channels are served, a join that says nothing of it is told so; topics with a
/// rule are what the rule says.
#[tokio::test]
async fn a_public_join_of_an_ordinary_topic_is_refused_where_only_private_ones_are_served() {
    let mut config = config();
    config.topics.private_only = true;
    let server = TestServer::start_with(config);
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.send(json!(["1", "1", "realtime:room", "phx_join", { "config": {} }])).await;
    let reason = "PrivateOnly: This project only allows private channels";
    let payload = json!({ "status": "error", "response": { "reason": reason } });
    client.expect(json!(["1", "1", "realtime:room", "phx_reply", payload])).await;
    client.join("cache_invalidate_AB3028").await;
    client.close().await;
    server.stop().await;
}

/// Probing tells nothing: what is forbidden, what only looks like a topic and what is not served
/// are answered by the same text at the same moment, to the millisecond of a clock that stands.
#[tokio::test(start_paused = true)]
async fn unknown_and_forbidden_topics_are_answered_alike_in_text_and_time() {
    let mut config = config();
    config.protocol.error_delay = Duration::from_millis(700);
    config.topics.allow_other = false;
    let server = TestServer::start_with(config);
    let mut answers = BTreeSet::new();
    for sub_topic in [
        "sms-+14165550100",
        "sms-nobody",
        "active-campaigns",
        "active-campaigns-2",
        "admin-settings",
        "admin-no-such-thing",
        "cache_invalidate_AB 3028",
        "event_offers_x_y",
        "room-1",
    ] {
        let mut page = Page::open(&server.gateway, browser(1));
        let asked = Instant::now();
        page.ask("1", sub_topic).await;
        let answer = page.message_until(asked + DEADLINE).await.expect("an answer");
        answers.insert((asked.elapsed(), answer.to_string().replace(sub_topic, "<sub>")));
    }
    let answers: Vec<_> = answers.into_iter().collect();
    let [(after, _)] = answers.as_slice() else { panic!("{answers:#?}") };
    assert_eq!(*after, Duration::from_millis(700));
    server.stop().await;
}
