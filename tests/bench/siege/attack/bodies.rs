//! Kinds 4 and 6: messages that cost much more to parse than to send.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
};

use super::{Field, Tally};
use crate::{
    siege::{http::Http, network::connect, stage::attackers, witnesses::steady},
    support::{frame, upgrade},
};

/// Empty objects of a batch: 3 MB.
const OBJECTS: usize = 1_000_000;
/// Connections that send batches, and sockets that send large joins.
const SENDERS: usize = 4;
/// Between two batches of one sender.
const BATCHES: Duration = Duration::from_secs(1);
/// Items of a large join's list: 4.2 MB, below the bound of a message.
const ITEMS: usize = 600_000;
/// What costs most when it is kept as a tree.
const ITEM: &str = r#"{"":0}"#;
/// Between two large joins of one sender.
const LARGE_JOINS: Duration = Duration::from_secs(2);

/// REST batches of nothing.
pub(super) fn begin_batches(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    for _ in 0..SENDERS {
        let (field, tally) = (field.clone(), tally.clone());
        tasks.spawn(async move {
            let body = format!(r#"{{"messages":[{}{{}}]}}"#, "{},".repeat(OBJECTS - 1));
            let mut http = Http::new(attackers(4), field.public);
            let (mut ticks, header) = (steady(BATCHES), format!("apikey: {}", field.key));
            loop {
                ticks.tick().await;
                tally.count("batches");
                match http.post("/api/broadcast", &header, body.as_bytes()).await {
                    Ok(status) => tally.count(&format!("answered {status}")),
                    Err(_) => tally.count("not answered"),
                }
            }
        });
    }
}

/// Joins and tokens with large trees.
pub(super) fn begin_joins(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    for number in 0..SENDERS {
        let (field, tally) = (field.clone(), tally.clone());
        tasks.spawn(async move {
            let items = vec![ITEM; ITEMS].join(",");
            let message = if number.is_multiple_of(2) {
                format!(
                    r#"{{"topic":"realtime:large-{number}","event":"phx_join","ref":"1","join_ref":"1","payload":{{"config":{{"postgres_changes":[{items}]}}}}}}"#
                )
            } else {
                format!(
                    r#"{{"topic":"realtime:large-{number}","event":"access_token","ref":"2","join_ref":"1","payload":{{"access_token":[{items}]}}}}"#
                )
            };
            let join = format!(
                r#"{{"topic":"realtime:large-{number}","event":"phx_join","ref":"1","join_ref":"1","payload":{{}}}}"#
            );
            let message = frame(0x81, message.as_bytes());
            let mut ticks = steady(LARGE_JOINS);
            loop {
                ticks.tick().await;
                let send = async {
                    let mut stream = connect(attackers(6), field.public, None).await?;
                    upgrade(&mut stream, &field.key, "a large one").await?;
                    if !number.is_multiple_of(2) {
                        stream.write_all(&frame(0x81, join.as_bytes())).await?;
                    }
                    stream.write_all(&message).await?;
                    tally.count("large messages");
                    // Until it is answered, or closed.
                    stream.read(&mut [0; 4096]).await
                };
                let _ended = tokio::time::timeout(LARGE_JOINS * 5, send).await;
            }
        });
    }
}
