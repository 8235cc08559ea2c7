//! Kinds 2, 3 and 8: many joins of events that nobody knows, on sockets that stay, or that are lost.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use super::{Field, Tally};
use crate::{
    siege::{network::connect, operator::pass, stage::attackers, witnesses::steady},
    support::{frame, upgrade},
};

/// Joins of each socket: the most that a socket may have, and what it may send at once.
const JOINS: usize = 500;
/// Sockets that together join more events than there are places to listen.
const HOLDERS: usize = 20;
/// How long they stay; then others come.
const HOLD: Duration = Duration::from_secs(15);
/// Sockets that fill what is remembered of lost ones.
const LOST: usize = 121;
/// How long a socket that is to be lost may take for its joins.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Sockets that send nothing.
const IDLE: usize = 1500;
/// Between two connections.
const PACE: Duration = Duration::from_millis(3);
/// Notifications of a transaction, and between two of them.
const NOTIFICATIONS: usize = 100;
const NOTIFYING: Duration = Duration::from_millis(100);

/// Sockets that hold the places to listen.
pub(super) fn begin(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    for socket in 0..HOLDERS {
        let (field, tally) = (field.clone(), tally.clone());
        tasks.spawn(async move {
            for round in 0_usize.. {
                let hold = async {
                    let name = |join| format!("cache_invalidate_AB8{round:02}{socket:02}{join:03}");
                    let mut stream = joined(&field, 2, "a holder", name, &tally).await?;
                    stream.read_to_end(&mut Vec::new()).await
                };
                let _ended = tokio::time::timeout(HOLD, hold).await;
                pass(PACE).await;
            }
        });
    }
}

/// Sockets that are lost, then idle ones of the same client, and notifications of nothing.
pub(super) fn begin_healing(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    let (first, firsts_tally) = (field.clone(), tally.clone());
    let lost = Arc::new(AtomicUsize::new(0));
    let are_lost = Arc::clone(&lost);
    tasks.spawn(async move {
        lose(&first, 3, "a suspect", 0, &firsts_tally).await;
        are_lost.store(1, Ordering::Relaxed);
    });
    for number in 0..IDLE {
        let (field, tally, lost) = (field.clone(), tally.clone(), Arc::clone(&lost));
        tasks.spawn(async move {
            let mut attempts = steady(Duration::from_secs(1));
            while lost.load(Ordering::Relaxed) == 0 {
                attempts.tick().await;
            }
            pass(PACE * u32::try_from(number).unwrap_or(u32::MAX)).await;
            loop {
                attempts.tick().await;
                let idle = async {
                    let mut stream = connect(attackers(3), field.public, None).await?;
                    upgrade(&mut stream, &field.key, "a suspect").await?;
                    tally.count("idle sockets");
                    stream.read_to_end(&mut Vec::new()).await
                };
                let _ended = idle.await;
            }
        });
    }
    let (database, tally) = (field.database.clone(), tally.clone());
    tasks.spawn(async move {
        let Ok(mut session) = PgConnection::connect(&database).await else { return };
        let mut ticks = steady(NOTIFYING);
        for round in 0_usize.. {
            ticks.tick().await;
            let notify = "select pg_notify('global_cache_stats',
                json_build_object('event_eid', 'AB7' || $1 || n, 'table', 'votes')::text)
                from generate_series(1, $2) n";
            let notify = sqlx::query(notify).bind(round.to_string());
            let notify = notify.bind(i32::try_from(NOTIFICATIONS).unwrap_or(i32::MAX));
            if notify.execute(&mut session).await.is_ok() {
                tally.add("NOTIFYs", NOTIFICATIONS as u64);
            }
        }
    });
}

/// Sockets that are lost, of another client each time.
pub(super) fn begin_filling(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    let (field, tally) = (field.clone(), tally.clone());
    tasks.spawn(async move {
        for round in 0_usize.. {
            lose(&field, 8, &format!("a filler {round}"), round, &tally).await;
        }
    });
}

/// Opens sockets one after the other, and loses each when its joins were read.
async fn lose(field: &Field, kind: u8, agent: &str, round: usize, tally: &Tally) {
    let mut sockets = JoinSet::new();
    for socket in 0..LOST {
        pass(PACE).await;
        let (field, tally, agent) = (field.clone(), tally.clone(), agent.to_owned());
        sockets.spawn(async move {
            let name = |join| format!("cache_invalidate_AB{kind}{round:02}{socket:03}{join:03}");
            let lost = async {
                let mut stream = joined(&field, kind, &agent, name, &tally).await?;
                // All answers, or most of them.
                let mut left = 100 * JOINS;
                let mut scratch = vec![0; 16 * 1024];
                while left > 0 {
                    match stream.read(&mut scratch).await? {
                        0 => break,
                        read => left = left.saturating_sub(read),
                    }
                }
                tally.count("lost sockets");
                Ok::<_, std::io::Error>(())
            };
            let _ended = tokio::time::timeout(LOST_AFTER, lost).await;
        });
    }
    while sockets.join_next().await.is_some() {}
}

/// A socket that has asked to join so many topics.
async fn joined(
    field: &Field,
    kind: u8,
    agent: &str,
    name: impl Fn(usize) -> String,
    tally: &Tally,
) -> std::io::Result<TcpStream> {
    let from: Ipv4Addr = attackers(kind);
    let mut stream = connect(from, field.public, None).await?;
    upgrade(&mut stream, &field.key, agent).await?;
    tally.count("sockets");
    let mut joins = Vec::new();
    for join in 0..JOINS {
        let message = json!({
            "topic": format!("realtime:{}", name(join)), "event": "phx_join", "payload": {},
            "ref": (join + 1).to_string(), "join_ref": (join + 1).to_string(),
        });
        joins.extend(frame(0x81, message.to_string().as_bytes()));
    }
    stream.write_all(&joins).await?;
    tally.add("joins", JOINS as u64);
    Ok(stream)
}
