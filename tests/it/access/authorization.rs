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
    client::{Client, invalidations},
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
            if row.rule.as_deref() == Some("cache") && row.write[name].starts_with("refused") {
                for frame in invalidations(Serializer::V2, "1", &topic, "/forged") {
                    client.send_frame(frame).await;
                }
                client.expect_nothing().await;
            }
            client.close().await;
        }
    }
    // What may not be written is not remembered for those who come later, either.
    let mut late = Client::connect(&server, Serializer::V2).await;
    late.join_only("cache_invalidate_AB3028", json!({})).await;
    let endpoints = late.caught_up("cache_invalidate_AB3028").await;
    assert!(!endpoints.contains(&"/forged".to_owned()), "{endpoints:?}");
    late.close().await;
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

/// Topics that are forbidden, that only look like a rule's and that are not served.
const CLOSED: [&str; 9] = [
    "sms-+14165550100",
    "sms-nobody",
    "active-campaigns",
    "active-campaigns-2",
    "admin-settings",
    "admin-no-such-thing",
    "cache_invalidate_AB 3028",
    "event_offers_x_y",
    "room-1",
];

/// Every counter and gauge that is not zero.
fn counted(server: &TestServer) -> BTreeMap<String, f64> {
    let text = String::from_utf8(server.gateway.registry.render()).unwrap();
    let series = text.lines().filter(|line| !line.starts_with('#'));
    let series = series.filter_map(|line| line.rsplit_once(' '));
    series.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

/// Probing tells nothing: such topics are answered by the same text at the same moment, and cost
/// the same work. The clock stands, so that it moves only where something waits: the delay is all
/// that an answer waits for, however long it is.
#[tokio::test(start_paused = true)]
async fn unknown_and_forbidden_topics_are_answered_alike_in_text_and_time() {
    for delay in [0, 1, 700, 2900].map(Duration::from_millis) {
        let mut config = config();
        config.protocol.error_delay = delay;
        config.topics.allow_other = false;
        let server = TestServer::start_with(config);
        let mut answers = Vec::new();
        for privacy in [false, true] {
            for sub_topic in CLOSED {
                let mut page = Page::open(&server.gateway, browser(1));
                let before = counted(&server);
                let asked = Instant::now();
                let payload = json!({ "config": { "private": privacy } });
                let topic = format!("realtime:{sub_topic}");
                page.send(json!(["1", "1", topic, "phx_join", payload])).await;
                let answer = page.message_until(asked + DEADLINE).await.expect("an answer");
                assert_eq!(asked.elapsed(), delay, "{sub_topic}");
                let mut work = counted(&server);
                work.retain(|series, value| {
                    let was = before.get(series).copied().unwrap_or_default();
                    *value -= was;
                    *value != 0.0 && !series.contains("process_")
                });
                answers.push((work, answer.to_string().replace(sub_topic, "<sub>")));
            }
        }
        let (first, rest) = answers.split_first().unwrap();
        assert!(first.0.keys().any(|series| series.starts_with("tidegate_joins_total{")));
        for other in rest {
            assert_eq!(other, first);
        }
        server.stop().await;
    }
}

/// The moment tells nothing of the reason, either: whatever the join lacks, it is refused when the
/// delay is over.
#[tokio::test(start_paused = true)]
async fn every_refusal_comes_when_the_delay_is_over_and_not_before() {
    let delay = Duration::from_millis(700);
    let mut config = config();
    config.protocol.error_delay = delay;
    config.limits.channels_per_socket_max = 1;
    config.limits.joins_per_second_max = 1;
    let server = TestServer::start_with(config);
    let exp = unix_now() + 3600;
    let ended = token::with_claims(json!({ "role": "anon", "exp": unix_now() - 3600 }));
    let mut reasons = BTreeSet::new();
    // As many at once as a minute of joins allows, which the last one exceeds.
    let many = (0..60).map(|n| (format!("many-{n}"), json!({ "config": {} })));
    let mut asked = vec![
        ("active-campaigns".to_owned(), json!({})),
        (String::new(), json!({})),
        ("room".to_owned(), json!({ "access_token": "garbage" })),
        ("room".to_owned(), json!({ "access_token": ended })),
        ("room".to_owned(), json!({ "access_token": token::with_claims(json!({})) })),
        (
            "room".to_owned(),
            json!({ "access_token": token::forged(&json!({ "role": "anon", "exp": exp })) }),
        ),
        ("room".to_owned(), json!({ "config": { "private": true } })),
        ("room".to_owned(), json!({ "config": 5 })),
    ];
    asked.extend(many);
    for (sub_topic, payload) in asked {
        let mut page = Page::open(&server.gateway, browser(1));
        let at = Instant::now();
        let topic = format!("realtime:{sub_topic}");
        page.send(json!(["1", "1", topic, "phx_join", payload])).await;
        if sub_topic.starts_with("many-0") {
            // It has joined: what is refused then is the second channel.
            page.expect_ok("1", &sub_topic).await;
            page.ask("2", "one-too-many").await;
        }
        let answer = page.message_until(at + DEADLINE).await.expect("an answer");
        if answer[4]["status"] == "error" {
            assert_eq!(at.elapsed(), delay, "{answer}");
            let reason = answer[4]["response"]["reason"].as_str().unwrap();
            reasons.insert(reason.split(':').next().unwrap().to_owned());
        }
    }
    assert!(reasons.len() >= 7, "{reasons:?}");
    server.stop().await;
}
