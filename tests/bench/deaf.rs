//! What a notification costs the server while many sockets may be deaf and many events have been
//! joined: one that names an event of which all of them have just been told something, and one of
//! which all of them are told.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tidegate::{db, demo::cluster::Cluster, secret::Secret};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::interval,
};

use crate::{
    UNLIMITED, row,
    support::{Gateway, frame, socket, token, upgrade},
};

const DATABASE: &str = "deaf";
/// Between two looks at something that is awaited.
const TICK: Duration = Duration::from_millis(100);
/// The server has nothing left to do once it has used no processor for so many looks.
const QUIET_TICKS: u32 = 10;
/// Topics of one viewer's socket.
const TOPICS_PER_SOCKET: usize = 500;
/// Suspects of one address.
const SUSPECTS_PER_ADDRESS: usize = 1_000;
/// Topics of a suspect's round.
const ROUND: usize = 64;
/// After so long a suspect may be told something again.
const SPACING: Duration = Duration::from_secs(15);
/// Of `/proc/{pid}/stat`, in milliseconds.
const CPU_TICK: u64 = 10;

/// Two rows: `count` suspects and as many events.
pub(crate) async fn measure(cluster: &Cluster, short: bool) {
    let (count, rounds) = if short { (200, 1) } else { (10_000, 3) };
    let gateway = start(cluster, count).await;
    let mut clients = JoinSet::new();
    for first in (1..=count).step_by(TOPICS_PER_SOCKET) {
        let last = (first + TOPICS_PER_SOCKET - 1).min(count);
        clients.spawn(view(gateway.addresses[0], first, last));
    }
    // Only topics of events that everybody may know are written there.
    let known = "select count(*) from tidegate.recent_topics";
    let mut ticks = interval(TICK);
    while cluster.psql(DATABASE, known).await.unwrap() != count.to_string() {
        ticks.tick().await;
    }
    let heard = Arc::new(AtomicUsize::new(0));
    for number in 0..count {
        clients.spawn(be_deaf(gateway.addresses[0], number, Arc::clone(&heard)));
    }
    let expect = async |all: usize| {
        let mut ticks = interval(TICK);
        while heard.load(Ordering::Relaxed) < all {
            ticks.tick().await;
        }
    };
    let in_rounds = rounds * ROUND * count;
    expect(in_rounds).await;

    let pid = gateway.pid();
    let before = quiet_cpu(pid).await;
    let all = format!("select {} from generate_series(1, {count}) n", name("'BN' || n"));
    cluster.psql(DATABASE, &all).await.unwrap();
    let cost = (quiet_cpu(pid).await - before).as_secs_f64() / count as f64;
    assert_eq!(heard.load(Ordering::Relaxed), in_rounds, "all have just been told something");
    row(
        &format!(
            "server CPU per notification that names one of {count} events, {count} suspects, \
             who were all told something just before"
        ),
        &format!("{:.0} µs", cost * 1e6),
        "≤ 1 ms",
    );

    if short {
        // The next round would come between.
        return;
    }
    ticks = interval(SPACING);
    ticks.tick().await;
    ticks.tick().await;
    let (before, started) = (quiet_cpu(pid).await, Instant::now());
    let so_far = heard.load(Ordering::Relaxed);
    cluster.psql(DATABASE, &format!("select {}", name("'BN1'"))).await.unwrap();
    expect(so_far + count).await;
    let elapsed = started.elapsed();
    let cost = (quiet_cpu(pid).await - before).as_secs_f64() / count as f64;
    row(
        &format!("server CPU per suspect that a notification has told to join, {count} of them"),
        &format!("{:.1} µs; the last after {:.0} ms", cost * 1e6, elapsed.as_secs_f64() * 1e3),
        "",
    );
}

/// A gateway and its database, in which everybody may know so many events.
async fn start(cluster: &Cluster, count: usize) -> Gateway {
    cluster.create_database(DATABASE).await.unwrap();
    let database = cluster.url(DATABASE);
    db::migrate(&Secret::from(&*database)).await.unwrap();
    let events = format!(
        "create table public.events (eid text primary key, enabled boolean);
        insert into public.events select 'BN' || n, true from generate_series(1, {count}) n"
    );
    cluster.psql(DATABASE, &events).await.unwrap();
    let mut settings = UNLIMITED.to_vec();
    settings.extend([
        ("TIDEGATE_LIMITS__SOCKET_JOINS_PER_SECOND_MAX", "0"),
        ("TIDEGATE_LIMITS__SOCKET_MESSAGES_PER_SECOND_MAX", "0"),
        ("TIDEGATE_LIMITS__SILENCE_TIMEOUT", "1h"),
    ]);
    Gateway::start(&database, &settings).await
}

/// The statement's call that names an event as the database's monitoring does.
fn name(eid: &str) -> String {
    format!("pg_notify('global_cache_stats', json_build_object('event_eid', {eid})::text)")
}

/// Joins the topics of these events, and reads whatever comes.
async fn view(server: SocketAddr, first: usize, last: usize) {
    let stream = socket(Ipv4Addr::new(127, 0, 0, 3), None).unwrap();
    let mut stream = stream.connect(server).await.unwrap();
    upgrade(&mut stream, &token("anon"), "viewer").await.unwrap();
    for number in first..=last {
        let join = format!(
            r#"{{"topic":"realtime:cache_invalidate_BN{number}","event":"phx_join","payload":{{}},"ref":"1"}}"#
        );
        stream.write_all(&frame(0x81, join.as_bytes())).await.unwrap();
    }
    let mut bytes = vec![0; 1 << 16];
    while stream.read(&mut bytes).await.unwrap_or(0) > 0 {}
}

/// Opens a socket and says nothing; counts what it is told.
async fn be_deaf(server: SocketAddr, number: usize, heard: Arc<AtomicUsize>) {
    let last = u8::try_from(4 + number / SUSPECTS_PER_ADDRESS).unwrap();
    let stream = socket(Ipv4Addr::new(127, 0, 0, last), None).unwrap();
    let mut stream = stream.connect(server).await.unwrap();
    upgrade(&mut stream, &token("anon"), "deaf").await.unwrap();
    let word = b"phx_error";
    let (mut bytes, mut kept) = (vec![0; 8192], 0);
    loop {
        let read = stream.read(&mut bytes[kept..]).await.unwrap_or(0);
        if read == 0 {
            return;
        }
        let held = kept + read;
        let found = bytes[..held].windows(word.len()).filter(|found| found == word).count();
        heard.fetch_add(found, Ordering::Relaxed);
        // A word may be cut in two.
        kept = held.min(word.len() - 1);
        bytes.copy_within(held - kept..held, 0);
    }
}

/// Waits until a process has nothing to do, and returns what it has used of the processors.
async fn quiet_cpu(pid: u32) -> Duration {
    let (mut ticks, mut last, mut quiet) = (interval(TICK), cpu(pid), 0);
    while quiet < QUIET_TICKS {
        ticks.tick().await;
        let used = cpu(pid);
        quiet = if used == last { quiet + 1 } else { 0 };
        last = used;
    }
    last
}

fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit(") ").next().unwrap().split(' ').skip(11).take(2);
    let used: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(used * CPU_TICK)
}
