//! Kind 11: clients that want to learn of events that are not public.

use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinSet;

use super::{Field, TOLD, Tally};
use crate::{
    siege::{
        client::{Client, Event, Identity},
        operator::pass,
        stage::{HIDDEN, HIDDEN_UNSEEN, attackers},
        witnesses::steady,
    },
    support::token,
};

/// Strangers at a time.
const STRANGERS: usize = 20;
/// How long one waits to be told something: the first round is at 2.5 s.
const WAIT: Duration = Duration::from_secs(6);
/// Endpoints of an event that does not exist.
const UNKNOWN_ENDPOINTS: usize = 3;

/// Strangers who send nothing, and one who asks.
pub(super) fn begin(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    for number in 0..STRANGERS {
        let (field, tally) = (field.clone(), tally.clone());
        tasks.spawn(async move {
            let mut attempts = steady(Duration::from_millis(500));
            for round in 0_usize.. {
                attempts.tick().await;
                let agent = format!("a stranger {number}-{round}");
                let _ended = tokio::time::timeout(WAIT, listen(&field, &agent, &tally)).await;
            }
        });
    }
    let (field, tally) = (field.clone(), tally.clone());
    tasks.spawn(async move {
        loop {
            let _ended = tokio::time::timeout(WAIT, ask(&field, &tally)).await;
            pass(Duration::from_secs(1)).await;
        }
    });
}

/// Waits for topics that are named without having been asked for.
async fn listen(field: &Field, agent: &str, tally: &Tally) -> Result<(), String> {
    let identity = Identity { from: attackers(11), agent, token: &field.key, reads: None };
    let mut client = Client::open(field.public, &identity).await?;
    tally.count("strangers");
    loop {
        if let Event::ChannelEnded { sub_topic } = client.next().await? {
            tally.count("topics that a stranger was told");
            if sub_topic.contains(HIDDEN) || sub_topic.contains(HIDDEN_UNSEEN) {
                tally.count(TOLD);
            }
        }
    }
}

/// Joins an event that is not public, and reads what is said of it.
async fn ask(field: &Field, tally: &Tally) -> Result<(), String> {
    let key = token("anon");
    let identity =
        Identity { from: attackers(11), agent: "one who asks", token: &key, reads: None };
    let mut client = Client::open(field.public, &identity).await?;
    let topic = format!("cache_invalidate_{HIDDEN_UNSEEN}");
    client.push_join(&topic, &key).await?;
    tally.count("joins of what is not public");
    loop {
        if let Event::Broadcast { payload, .. } = client.next().await? {
            let payload: Value = serde_json::from_str(payload.get()).unwrap_or_default();
            let endpoints = payload["endpoints"].as_array().map_or(0, Vec::len);
            tally.count("lists of what is not public");
            if endpoints > UNKNOWN_ENDPOINTS {
                tally.count(TOLD);
            }
        }
    }
}
