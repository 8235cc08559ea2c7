//! Kind 5: sockets that do not read, and large broadcasts for them.

use std::time::Duration;

use serde_json::json;
use tokio::{io::AsyncWriteExt, task::JoinSet};

use super::{Field, Tally};
use crate::{
    siege::{http::Http, network::connect, stage::attackers, witnesses::steady},
    support::{frame, upgrade},
};

const SOCKETS: usize = 300;
/// Of each broadcast.
const BYTES: usize = 2_900_000;
/// Between two broadcasts.
const BROADCASTS: Duration = Duration::from_secs(5);
/// Between two attempts of a socket that was thrown out, and two of its heartbeats.
const PAUSE: Duration = Duration::from_secs(2);
/// What the client's system takes.
const RECEIVE_BUFFER: u32 = 4096;
const ROOM: &str = "unread";

/// Sockets that do not read, and their publisher.
pub(super) fn begin(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    for _ in 0..SOCKETS {
        let (field, tally) = (field.clone(), tally.clone());
        tasks.spawn(async move {
            let mut ticks = steady(PAUSE);
            loop {
                ticks.tick().await;
                let stay = async {
                    let from = attackers(5);
                    let mut stream = connect(from, field.public, Some(RECEIVE_BUFFER)).await?;
                    upgrade(&mut stream, &field.key, "no reader").await?;
                    let join = json!({
                        "topic": format!("realtime:{ROOM}"), "event": "phx_join", "payload": {},
                        "ref": "1", "join_ref": "1",
                    });
                    stream.write_all(&frame(0x81, join.to_string().as_bytes())).await?;
                    tally.count("sockets");
                    let beat = json!({
                        "topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "2",
                    });
                    let beat = frame(0x81, beat.to_string().as_bytes());
                    loop {
                        ticks.tick().await;
                        stream.write_all(&beat).await?;
                    }
                };
                let _ended: std::io::Result<()> = stay.await;
            }
        });
    }
    let (field, tally) = (field.clone(), tally.clone());
    tasks.spawn(async move {
        let mut http = Http::new(attackers(5), field.public);
        let payload = json!({ "x": "x".repeat(BYTES) });
        let message = [json!({ "topic": ROOM, "event": "e", "payload": payload })];
        let mut ticks = steady(BROADCASTS);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            match http.publish(&field.key, &message).await {
                Ok(status) => tally.count(&format!("answered {status}")),
                Err(_) => tally.count("not answered"),
            }
        }
    });
}
