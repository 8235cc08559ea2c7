//! What viewers notice of a flood, and what it costs the server: handshakes that are never
//! finished, garbage, and readers that do not read, all from another address than the viewers'.
//!
//! Each attacker begins anew as soon as it is thrown out, ten times a second at most.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::interval,
};

use crate::{
    number, row,
    support::{Gateway, frame, resident_kib, socket, token, upgrade},
};

/// Where the attackers come from.
const ATTACKERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Between two attempts of one attacker.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at the server's memory, and between two large messages to slow readers.
const TICK: Duration = Duration::from_millis(100);
/// Of a message to slow readers.
const LARGE: usize = 16 * 1024;
/// What a slow reader's system takes for it.
const RECEIVE_BUFFER: u32 = 4096;

/// How many of each.
#[derive(Clone, Copy)]
struct Flood {
    half_open: usize,
    garbage: usize,
    slow_readers: usize,
}

/// A row for the time before, during and after.
pub(crate) async fn measure(gateway: &Gateway, short: bool) {
    let (viewers, seconds, flood) = if short {
        (50, 1, Flood { half_open: 20, garbage: 10, slow_readers: 5 })
    } else {
        (1_000, 15, Flood { half_open: 2_000, garbage: 1_000, slow_readers: 500 })
    };
    let arguments =
        format!("--sockets {viewers} --rate 10 --seconds {seconds} --topic auction_winner_{{n}}");
    let (address, pid) = (gateway.addresses[0], gateway.pid());
    viewers_notice(gateway, "before a flood", &arguments, pid).await;
    let mut attackers = JoinSet::new();
    let open = Arc::new(AtomicU64::new(0));
    for number in 0..flood.half_open + flood.garbage + flood.slow_readers {
        let open = Arc::clone(&open);
        attackers.spawn(async move {
            let mut attempts = interval(PAUSE);
            loop {
                attempts.tick().await;
                let Ok(stream) = connect(address).await else { continue };
                open.fetch_add(1, Ordering::Relaxed);
                // However it ends: the next attempt follows.
                let _ = if number < flood.half_open {
                    half_open(stream).await
                } else if number < flood.half_open + flood.garbage {
                    garbage(stream, number).await
                } else {
                    slow_reader(stream).await
                };
            }
        });
    }
    attackers.spawn(async move {
        let mut ticks = interval(TICK);
        loop {
            ticks.tick().await;
            let _ = publish_large(address).await;
        }
    });
    let all = (flood.half_open + flood.garbage + flood.slow_readers) as u64;
    let mut ticks = interval(TICK);
    while open.load(Ordering::Relaxed) < all {
        ticks.tick().await;
    }
    let what = format!(
        "during a flood of {} half-open handshakes, {} garbage sockets, {} slow readers",
        flood.half_open, flood.garbage, flood.slow_readers
    );
    viewers_notice(gateway, &what, &arguments, pid).await;
    let connections = open.load(Ordering::Relaxed);
    attackers.shutdown().await;
    viewers_notice(gateway, &format!("after {connections} such connections"), &arguments, pid)
        .await;
}

/// One run of viewers, and the most memory that the server has meanwhile.
async fn viewers_notice(gateway: &Gateway, when: &str, arguments: &str, pid: u32) {
    let mut watch = JoinSet::new();
    let most = Arc::new(AtomicU64::new(0));
    let peak = Arc::clone(&most);
    watch.spawn(async move {
        let mut ticks = interval(TICK);
        loop {
            ticks.tick().await;
            peak.fetch_max(resident_kib(pid), Ordering::Relaxed);
        }
    });
    let (report, _) = gateway.try_measure(arguments).await;
    watch.shutdown().await;
    let (arrived, expected) = (
        number(&report, "/publishing/deliveries"),
        number(&report, "/publishing/deliveries_expected"),
    );
    row(
        &format!("viewers {when}"),
        &format!(
            "p50 {:.1} ms, p99 {:.1} ms, lost {:.0} of {expected:.0}, server {:.0} MiB",
            number(&report, "/publishing/latency_us/p50") / 1000.0,
            number(&report, "/publishing/latency_us/p99") / 1000.0,
            expected - arrived,
            most.load(Ordering::Relaxed) as f64 / 1024.0,
        ),
        "",
    );
}

async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    socket(ATTACKERS, Some(RECEIVE_BUFFER))?.connect(address).await
}

/// Begins a request and does not end it.
async fn half_open(mut stream: TcpStream) -> std::io::Result<()> {
    stream.write_all(b"GET /realtime/v1/websocket?vsn=1.0.0 HTTP/1.1\r\nhost: x\r\n").await?;
    stream.read_to_end(&mut Vec::new()).await.map(drop)
}

/// Bytes that are no HTTP, or no frames, or frames that say nothing, without end.
async fn garbage(mut stream: TcpStream, number: usize) -> std::io::Result<()> {
    let mut bytes = vec![0; 1024];
    fastrand::Rng::with_seed(number as u64).fill(&mut bytes);
    if !number.is_multiple_of(3) {
        upgrade(&mut stream, &token("anon"), "").await?;
    }
    if number % 3 == 2 {
        bytes = frame(0x81, b"{").repeat(100);
    }
    loop {
        stream.write_all(&bytes).await?;
    }
}

/// Joins a topic with large messages, and does not read them.
async fn slow_reader(mut stream: TcpStream) -> std::io::Result<()> {
    upgrade(&mut stream, &token("anon"), "").await?;
    let join = br#"{"topic":"realtime:slow","event":"phx_join","payload":{},"ref":"1"}"#;
    stream.write_all(&frame(0x81, join)).await?;
    let mut beats = interval(Duration::from_secs(5));
    loop {
        beats.tick().await;
        let beat = br#"{"topic":"phoenix","event":"heartbeat","payload":{},"ref":"2"}"#;
        stream.write_all(&frame(0x81, beat)).await?;
    }
}

async fn publish_large(address: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    let text = "x".repeat(LARGE);
    let body =
        format!(r#"{{"messages":[{{"topic":"slow","event":"e","payload":{{"x":"{text}"}}}}]}}"#);
    let request = format!(
        "POST /api/broadcast HTTP/1.1\r\nhost: x\r\nconnection: close\r\napikey: {}\r\n\
         content-length: {}\r\n\r\n{body}",
        token("anon"),
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    stream.read_to_end(&mut Vec::new()).await.map(drop)
}
