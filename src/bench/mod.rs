//! `tidegate bench`: puts a load of viewers on any server of this protocol and measures it.
//!
//! A run opens sockets, joins, publishes, and reports how many of the expected deliveries arrived,
//! how late, and what the server used for them. Invariants: the load speaks the protocol by
//! [`crate::wire_client`] and never by the server's code; a number that was not measured is not
//! printed; every failure is counted by its name and makes the run fail, after its report; counting
//! allocates nothing, so that the tool does not measure itself.
//!
//! Read `connection` first (one socket), then `publish`, then [`run`].

mod arguments;
mod bare;
mod connection;
mod error;
mod latency;
mod load;
mod meter;
#[cfg(target_os = "linux")]
mod process;
#[cfg(not(target_os = "linux"))]
#[path = "process_elsewhere.rs"]
mod process;
mod publish;
mod report;
mod tally;

use std::{io::Write, sync::Arc, time::Duration};

use sqlx::{Connection as _, PgConnection};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use self::{
    arguments::{FILES_BESIDES, Publish},
    bare::Shape,
    connection::{Connection, Role},
    latency::Latencies,
    load::{Load, Target},
    meter::Meter,
    process::Process,
    report::{BareLoop, Opening, Publishing, Report, Server, microseconds_each},
};
use crate::wire_client::failure::Failure;

pub use self::{arguments::BenchArgs, error::BenchError};

/// How long the server may settle after the last join, and before bare writes.
const SETTLE: Duration = Duration::from_secs(2);
/// Bare writes are measured for no longer than this: their cost hardly varies.
const BARE_SECONDS_MAX: u32 = 5;

/// Puts the load on the server and writes the report to `out`. The process may have
/// `open_files_max` files open.
///
/// # Errors
/// [`BenchError`]; with [`BenchError::Incomplete`] the report has been written all the same.
pub async fn run(
    args: BenchArgs,
    open_files_max: u64,
    out: &mut impl Write,
) -> Result<(), BenchError> {
    args.check().map_err(BenchError::Arguments)?;
    let target = Target::resolve(&args).await?;
    let needed = args.files_needed() as u64;
    if open_files_max < needed {
        return Err(BenchError::FileLimit { needed, limit: open_files_max });
    }
    let load = Arc::new(Load::new(&args, target));
    let server = match args.pid {
        Some(pid) => Some(Meter::start(pid).await.map_err(BenchError::Process)?),
        None => None,
    };

    // Aborts the viewers' tasks when it is shut down or dropped.
    let mut viewers = JoinSet::new();
    let opening = open_viewers(&args, &load, &mut viewers).await;
    let mut server = match server {
        Some(meter) => {
            Some(meter.finish_opening(&opening, SETTLE).await.map_err(BenchError::Process)?)
        }
        None => None,
    };
    let publishing = if load.ticks > 0 && opening.channels_joined > 0 {
        Some(publish(&args, &load, &mut viewers, server.as_mut()).await?)
    } else {
        None
    };
    viewers.shutdown().await;
    let bare = match load.tally.sample() {
        Some(frame) if args.baseline => {
            sleep(SETTLE).await;
            Some(measure_bare(&args, open_files_max, frame.to_vec(), server.as_ref()).await?)
        }
        Some(_) | None => None,
    };

    let missing = publishing.as_ref().map_or(0, |publishing: &Publishing| {
        let arrived = publishing.deliveries + publishing.deliveries_merged;
        publishing.deliveries_expected.saturating_sub(arrived)
    });
    let report = Report {
        url: args.url,
        vsn: args.vsn.as_str(),
        topic: args.topic,
        opening,
        publishing,
        server,
        bare,
        failures: load.tally.failures(),
    };
    let text = if args.json { json(&report)? } else { report.to_string() };
    writeln!(out, "{}", text.trim_end()).map_err(BenchError::Output)?;
    let failures = report.failures.values().sum();
    if failures == 0 && missing == 0 {
        Ok(())
    } else {
        Err(BenchError::Incomplete { failures, missing })
    }
}

/// Opens and joins all viewers; their tasks go on in `viewers`.
async fn open_viewers(args: &BenchArgs, load: &Arc<Load>, viewers: &mut JoinSet<()>) -> Opening {
    let begun = Instant::now();
    let mut sockets_joined = 0;
    let role = |number| Role::Viewer { number };
    open_all(load, args.sockets, args.in_flight, role, |_number, connection| {
        sockets_joined += usize::from(connection.is_joined());
        viewers.spawn(connection.view());
    })
    .await;
    let took = begun.elapsed();
    let channels_joined = load.tally.receivers().iter().sum();
    Opening {
        sockets: args.sockets,
        sockets_joined,
        channels_per_socket: args.channels,
        channels_joined,
        topics: args.topics,
        in_flight: args.in_flight,
        seconds: took.as_secs_f64(),
        joins_per_second: channels_joined as f64 / took.as_secs_f64(),
        handshake_us: load.tally.handshake.percentiles(),
        join_reply_us: load.tally.join_reply.percentiles(),
    }
}

/// Opens and joins `count` connections, at most `in_flight` at a time, and passes each with its
/// number to `ready`. A connection that fails is counted.
async fn open_all(
    load: &Arc<Load>,
    count: usize,
    in_flight: usize,
    role_of: impl Fn(usize) -> Role,
    mut ready: impl FnMut(usize, Connection),
) {
    let mut opening = JoinSet::new();
    let mut numbers = 0..count;
    loop {
        for number in numbers.by_ref().take(in_flight - opening.len()) {
            let (load, role) = (Arc::clone(load), role_of(number));
            opening.spawn(async move {
                let mut connection = Connection::open(load, role).await?;
                connection.join().await?;
                Ok((number, connection))
            });
        }
        match opening.join_next().await {
            Some(Ok(Ok((number, connection)))) => ready(number, connection),
            Some(Ok(Err(failure))) => load.tally.fail(&failure),
            // The panic has been printed; the socket is missing from those joined.
            Some(Err(_panicked)) => {}
            None => return,
        }
    }
}

/// Publishes all ticks, waits for their deliveries, and measures both.
async fn publish(
    args: &BenchArgs,
    load: &Arc<Load>,
    viewers: &mut JoinSet<()>,
    server: Option<&mut Server>,
) -> Result<Publishing, BenchError> {
    let tally = &load.tally;
    let mut publishers = Vec::new();
    let mut database = match (args.publish, &args.database_url) {
        (Publish::Sql, Some(url)) => Some(PgConnection::connect(url.expose()).await?),
        (Publish::Sql, None) | (Publish::Socket, _) => {
            let role = |topic| Role::Publisher { topic };
            open_all(load, args.topics, args.in_flight, role, |topic, connection| {
                if connection.is_joined() {
                    publishers.push((topic, connection));
                }
            })
            .await;
            None
        }
    };
    let receivers = tally.receivers();
    let statements = Latencies::default();
    let meter = match &server {
        Some(server) => Some(Meter::start(server.pid).await.map_err(BenchError::Process)?),
        None => None,
    };
    let own_cpu = Process::own().cpu().await.map_err(BenchError::Process)?;

    let begun = tally.now();
    let messages = match &mut database {
        Some(database) => publish::by_sql(load, database, &statements).await?,
        None => publish::by_sockets(load, publishers, viewers).await,
    };
    let expected = messages.iter().zip(&receivers).map(|(sent, receivers)| sent * receivers).sum();
    let messages: u64 = messages.iter().sum();
    let acknowledgements = if database.is_none() { messages } else { 0 };
    tally.wait_for(expected + acknowledgements).await;
    for _ in tally.acknowledged_count()..acknowledgements {
        tally.fail(&Failure::Unacknowledged);
    }

    let deliveries = tally.delivered_count();
    let own_cpu = Process::own().cpu().await.map_err(BenchError::Process)?.since(&own_cpu);
    if let (Some(server), Some(meter)) = (server, meter) {
        meter.finish_publishing(deliveries, server).await.map_err(BenchError::Process)?;
    }
    let seconds = tally.last_delivery().saturating_sub(begun).as_secs_f64();
    Ok(Publishing {
        publish: if database.is_some() { "sql" } else { "socket" },
        ticks_per_second: args.rate,
        messages_per_tick: args.burst,
        messages,
        payload_bytes: args.payload_bytes,
        frame_bytes: tally.sample().map(<[u8]>::len),
        messages_acknowledged: database.is_none().then(|| tally.acknowledged_count()),
        deliveries_expected: expected,
        deliveries,
        deliveries_merged: tally.merged_count(),
        seconds,
        deliveries_per_second: if deliveries == 0 { 0.0 } else { deliveries as f64 / seconds },
        latency_us: tally.delivery.percentiles(),
        statement_us: statements.percentiles(),
        tick_lateness_us: tally.lateness.percentiles(),
        bench_cpu_us_per_delivery: microseconds_each(own_cpu, deliveries),
    })
}

/// Measures writes of the same frames without a server. The viewers' files must be closed.
async fn measure_bare(
    args: &BenchArgs,
    open_files_max: u64,
    frame: Vec<u8>,
    server: Option<&Server>,
) -> Result<BareLoop, BenchError> {
    let files_max = usize::try_from(open_files_max).unwrap_or(usize::MAX);
    // Each socket here has both of its ends in this process.
    let sockets = args.sockets.min(files_max.saturating_sub(FILES_BESIDES) / 2);
    let receivers = (args.sockets * args.channels / args.topics).clamp(1, sockets);
    let shape = Shape {
        sockets,
        receivers,
        burst: args.burst,
        ticks: args.rate * args.seconds.min(BARE_SECONDS_MAX),
        period: Duration::from_secs(1) / args.rate,
        frame,
    };
    let bare = bare::measure(shape).await.map_err(BenchError::Bare)?;
    let cpu_us_per_write = microseconds_each(bare.cpu, bare.writes);
    let cpu_us_per_delivery = server.and_then(|server| server.cpu_us_per_delivery);
    Ok(BareLoop {
        sockets,
        writes: bare.writes,
        writes_blocked: bare.blocked,
        cpu_us_per_write,
        server_to_bare_ratio: cpu_us_per_delivery
            .zip(cpu_us_per_write)
            .map(|(delivery, write)| delivery / write),
    })
}

fn json(report: &Report) -> Result<String, BenchError> {
    serde_json::to_string(report).map_err(|error| BenchError::Output(error.into()))
}

#[cfg(test)]
mod tests;
