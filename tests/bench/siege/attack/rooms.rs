//! Kinds 9 and 10: ordinary rooms, whose rates are the project's, and whose members read slowly.

use std::time::Duration;

use serde_json::json;
use tokio::{io::AsyncWriteExt, task::JoinSet};

use super::{Field, Tally};
use crate::{
    siege::{
        http::Http,
        network::connect,
        stage::{LOBBY, attackers},
        witnesses::steady,
    },
    support::{frame, upgrade},
};

/// Connections that publish by REST, and between two requests of each: 2,000 a second.
const PUBLISHERS: usize = 8;
const PUBLISHING: Duration = Duration::from_millis(4);
/// Sockets that join rooms and talk.
const TALKERS: usize = 5;
/// Between two joins of each, each with something said.
const TALKING: Duration = Duration::from_millis(20);
/// Of a large batch: three messages below the bound of a payload.
const MESSAGE_BYTES: usize = 2_600_000;
const MESSAGES: usize = 3;
/// Between two large batches.
const BATCHES: Duration = Duration::from_secs(4);

/// Empties the project's rates.
pub(super) fn begin_rates(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    for _ in 0..PUBLISHERS {
        let (field, tally) = (field.clone(), tally.clone());
        tasks.spawn(async move {
            let mut http = Http::new(attackers(9), field.public);
            let message = [json!({ "topic": "noise", "event": "e", "payload": {} })];
            let mut ticks = steady(PUBLISHING);
            loop {
                ticks.tick().await;
                match http.publish(&field.key, &message).await {
                    Ok(status) => tally.count(&format!("answered {status}")),
                    Err(_) => tally.count("not answered"),
                }
            }
        });
    }
    for talker in 0..TALKERS {
        let (field, tally) = (field.clone(), tally.clone());
        tasks.spawn(async move {
            let mut attempts = steady(Duration::from_secs(1));
            loop {
                attempts.tick().await;
                let _ended = talk(&field, talker, &tally).await;
            }
        });
    }
}

async fn talk(field: &Field, talker: usize, tally: &Tally) -> std::io::Result<()> {
    let mut stream = connect(attackers(9), field.public, None).await?;
    upgrade(&mut stream, &field.key, "a talker").await?;
    let (mut reads, mut writes) = stream.into_split();
    let talking = async {
        let mut ticks = steady(TALKING);
        for number in 0_usize.. {
            ticks.tick().await;
            let topic = format!("realtime:room-{talker}-{}", number % 100);
            let join = json!({
                "topic": topic, "event": "phx_join", "payload": {},
                "ref": "1", "join_ref": number.to_string(),
            });
            let said = json!({
                "topic": topic, "event": "broadcast", "ref": "2",
                "payload": { "type": "broadcast", "event": "e", "payload": {} },
            });
            let frames = [join, said].map(|message| frame(0x81, message.to_string().as_bytes()));
            writes.write_all(&frames.concat()).await?;
            tally.count("joins, each with a broadcast");
        }
        Ok(())
    };
    let mut sink = tokio::io::sink();
    tokio::select! {
        ended = talking => ended,
        read = tokio::io::copy(&mut reads, &mut sink) => read.map(drop),
    }
}

/// Large batches to the room of slow members.
pub(super) fn begin_large(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    let (field, tally) = (field.clone(), tally.clone());
    tasks.spawn(async move {
        let mut http = Http::new(attackers(10), field.public);
        let payload = json!({ "x": "x".repeat(MESSAGE_BYTES) });
        let message = json!({ "topic": LOBBY, "event": "e", "payload": payload });
        let messages = vec![message; MESSAGES];
        let mut ticks = steady(BATCHES);
        loop {
            ticks.tick().await;
            match http.publish(&field.key, &messages).await {
                Ok(status) => tally.count(&format!("answered {status}")),
                Err(_) => tally.count("not answered"),
            }
        }
    });
}
