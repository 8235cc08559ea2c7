//! Kind 7, without any key: connections that send requests without end and read no answer.

use std::{net::SocketAddr, time::Duration};

use tokio::{io::AsyncWriteExt, task::JoinSet};

use super::{Field, Tally};
use crate::siege::{network::connect, operator::pass, stage::attackers, witnesses::steady};

/// On the public port, and on that of the operators.
const PUBLIC: usize = 4096;
const ADMIN: usize = 64;
/// Between two first connections, and between two attempts of each.
const PACE: Duration = Duration::from_millis(2);
const PAUSE: Duration = Duration::from_secs(1);
/// What the client's system takes.
const RECEIVE_BUFFER: u32 = 4096;
/// Requests of one write.
const REQUESTS: usize = 64;

/// Connections to both ports.
pub(super) fn begin(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    for number in 0..PUBLIC {
        let request = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";
        tasks.spawn(pipeline(field.public, number, request, "connections", tally.clone()));
    }
    for number in 0..ADMIN {
        let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n";
        tasks.spawn(pipeline(field.admin, number, request, "to operators", tally.clone()));
    }
}

async fn pipeline(
    to: SocketAddr,
    number: usize,
    request: &'static str,
    what: &'static str,
    tally: Tally,
) {
    pass(PACE * u32::try_from(number).unwrap_or(u32::MAX)).await;
    let (mut attempts, requests) = (steady(PAUSE), request.repeat(REQUESTS));
    loop {
        attempts.tick().await;
        let flood = async {
            let mut stream = connect(attackers(7), to, Some(RECEIVE_BUFFER)).await?;
            tally.count(what);
            loop {
                stream.write_all(requests.as_bytes()).await?;
            }
        };
        let _ended: std::io::Result<()> = flood.await;
    }
}
