//! `tidegate bench`: puts a load of viewers on any server of this protocol and measures it.
//!
//! Opens sockets, joins, publishes, and tells how many deliveries of the expected ones arrived, how
//! late, and what the server used for them. Invariants: the load speaks the protocol by its own
//! code and never the server's; a number that was not measured is not printed; whatever goes
//! wrong is counted by its name and makes the run fail, after its report; nothing that is counted
//! allocates, so that the tool does not measure itself.
//!
//! Read `connection` first (one socket), then `publish`, then `run` below.

use std::{
    io::{self, Write},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use hyper::Uri;
use sqlx::{Connection as _, PgConnection};
use tokio::{
    net::lookup_host,
    task::JoinSet,
    time::{Instant, sleep},
};

use self::{
    arguments::Publish,
    bare::Shape,
    connection::{Connection, Role},
    latency::Latencies,
    process::{Cpu, Memory, Process},
    report::{BareLoop, Opening, Publishing, Report, Server},
    tally::Tally,
};
use crate::{
    secret::Secret,
    wire_client::{failure::Failure, message::Vsn},
};

pub use self::arguments::BenchArgs;

mod arguments;
mod bare;
mod connection;
mod latency;
mod process;
mod publish;
mod report;
mod tally;

/// Why a bench failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// An argument contradicts another, or cannot be used.
    #[error("{0}")]
    Arguments(&'static str),
    /// The server's name has no address.
    #[error("cannot resolve {host}")]
    Resolve {
        /// Host and port of `--url`.
        host: String,
        /// What the resolver said; none when it knew no address.
        #[source]
        source: Option<io::Error>,
    },
    /// The process may not open as many files; `ulimit -Hn` tells the limit.
    #[error("{needed} open files are needed, the limit is {limit}")]
    FileLimit {
        /// Files that this run opens at most.
        needed: u64,
        /// The hard limit.
        limit: u64,
    },
    /// The server's process cannot be read in `/proc`.
    #[error("cannot measure the server's process")]
    Process(#[source] io::Error),
    /// The database refused the connection or a notification.
    #[error("cannot publish by the database")]
    Database(#[from] sqlx::Error),
    /// The loop of bare writes failed.
    #[error("cannot measure bare writes")]
    Bare(#[source] io::Error),
    /// The report could not be written.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
    /// The report is written; something in it went wrong.
    #[error("{failures} failures, {missing} deliveries missing")]
    Incomplete {
        /// How often something failed, as listed in the report.
        failures: u64,
        /// Deliveries that did not come.
        missing: u64,
    },
}

impl BenchError {
    /// The exit code: 64 for arguments that cannot be used, else 1.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Arguments(_) => 64,
            Self::Resolve { .. }
            | Self::FileLimit { .. }
            | Self::Process(_)
            | Self::Database(_)
            | Self::Bare(_)
            | Self::Output(_)
            | Self::Incomplete { .. } => 1,
        }
    }
}

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
    args.check()?;
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

    // Dropped at the end: a viewer's task ends by being aborted.
    let mut viewers = JoinSet::new();
    let opening = open_viewers(&args, &load, &mut viewers).await;
    let mut server = match server {
        Some(meter) => Some(meter.finish_opening(&opening).await.map_err(BenchError::Process)?),
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

/// What every topic begins with on the wire.
const TOPIC_PREFIX: &str = "realtime:";
/// After the last join, and before bare writes: what the server still does for them is done.
const SETTLE: Duration = Duration::from_secs(2);
/// Files besides sockets: the runtime's own, the database, `/proc`.
const FILES_BESIDES: usize = 64;
/// Bare writes are measured for no longer than this: their cost hardly varies.
const BARE_SECONDS_MAX: u32 = 5;

/// The run's load: what every socket and publisher needs to know.
#[derive(Debug)]
struct Load {
    target: Target,
    vsn: Vsn,
    viewer_key: Secret,
    publisher_key: Secret,
    /// With their prefix, as on the wire.
    topics: Vec<String>,
    /// Channels of each viewer.
    channels: usize,
    ticks: u64,
    /// Between two ticks.
    period: Duration,
    /// Messages to each tick.
    burst: u64,
    payload_bytes: usize,
    deadline: Duration,
    tally: Tally,
}

/// Where the sockets connect.
#[derive(Debug)]
struct Target {
    address: SocketAddr,
    /// The `Host` header.
    host: String,
    /// Path and query for each role's key.
    viewer_path: String,
    publisher_path: String,
}

impl Load {
    fn new(args: &BenchArgs, target: Target) -> Self {
        let publisher_key = args.publisher_apikey.as_ref().unwrap_or(&args.apikey);
        Self {
            target,
            vsn: args.vsn,
            viewer_key: args.apikey.clone(),
            publisher_key: publisher_key.clone(),
            topics: (0..args.topics).map(|index| args.topic_name(index)).collect(),
            channels: args.channels,
            ticks: u64::from(args.rate) * u64::from(args.seconds),
            period: Duration::from_secs(1) / args.rate,
            burst: args.burst,
            payload_bytes: args.payload_bytes,
            deadline: Duration::from_secs(args.deadline),
            tally: Tally::new(args.topics),
        }
    }
}

impl Target {
    async fn resolve(args: &BenchArgs) -> Result<Self, BenchError> {
        let bad_url = "--url must be like ws://127.0.0.1:4000/realtime/v1, without TLS";
        let bad_url = || BenchError::Arguments(bad_url);
        let url: Uri = args.url.parse().map_err(|_not_a_url| bad_url())?;
        let (Some("ws" | "http"), Some(authority)) = (url.scheme_str(), url.authority()) else {
            return Err(bad_url());
        };
        let host = authority.to_string();
        let path = url.path().trim_end_matches('/').trim_end_matches("/websocket");
        let path_with = |key: &Secret| {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.append_pair("apikey", key.expose()).append_pair("vsn", args.vsn.as_str());
            format!("{path}/websocket?{}", query.finish())
        };
        let publisher_key = args.publisher_apikey.as_ref().unwrap_or(&args.apikey);
        let (viewer_path, publisher_path) = (path_with(&args.apikey), path_with(publisher_key));

        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        let addresses = lookup_host((name, authority.port_u16().unwrap_or(80))).await;
        let address = match addresses {
            // A server that listens on all addresses of one family may not listen on the other's.
            Ok(addresses) => addresses.min_by_key(SocketAddr::is_ipv6),
            Err(error) => return Err(BenchError::Resolve { host, source: Some(error) }),
        };
        let Some(address) = address else {
            return Err(BenchError::Resolve { host, source: None });
        };
        Ok(Self { address, host, viewer_path, publisher_path })
    }
}

/// The server's use of its machine since the run began.
#[derive(Debug)]
struct Meter {
    pid: u32,
    process: Process,
    cpu: Cpu,
    memory: Memory,
}

impl Meter {
    async fn start(pid: u32) -> io::Result<Self> {
        let process = Process::of(pid);
        let (cpu, memory) = (process.cpu().await?, process.memory()?);
        Ok(Self { pid, process, cpu, memory })
    }

    /// Tells what the joins cost, and the memory of sockets once the server has settled.
    async fn finish_opening(self, opening: &Opening) -> io::Result<Server> {
        let cpu = self.process.cpu().await?.since(&self.cpu);
        sleep(SETTLE).await;
        let (before, joined) = (self.memory, self.process.memory()?);
        let sockets = opening.sockets_joined as u64;
        // Negative where the server gave back more of an earlier load than it took for this one.
        let kib = |joined: u64, before: u64| ratio(joined as f64 - before as f64, sockets);
        Ok(Server {
            pid: self.pid,
            cpu_us_per_join: microseconds_each(cpu, opening.channels_joined),
            cpu_us_per_delivery: None,
            rss_before_kib: before.rss_kib,
            rss_joined_kib: joined.rss_kib,
            rss_published_kib: None,
            rss_kib_per_socket: kib(joined.rss_kib, before.rss_kib),
            rss_anon_kib_per_socket: kib(joined.anon_kib, before.anon_kib),
        })
    }
}

/// Opens and joins all viewers, who then view in `viewers`.
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

/// Opens and joins `count` connections, at most `in_flight` at a time; `ready` gets each with its
/// number. Those that fail are counted.
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
            // A task that panicked has told so itself; its socket is missing from those joined.
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
        let cpu = meter.process.cpu().await.map_err(BenchError::Process)?.since(&meter.cpu);
        let memory = meter.process.memory().map_err(BenchError::Process)?;
        server.cpu_us_per_delivery = microseconds_each(cpu, deliveries);
        server.rss_published_kib = Some(memory.rss_kib);
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

/// Writes the same frames without a server. The viewers' files must be closed.
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

/// Microseconds for each of `count`; `None` for none.
fn microseconds_each(used: Duration, count: u64) -> Option<f64> {
    ratio(used.as_secs_f64() * 1e6, count)
}

fn ratio(amount: f64, count: u64) -> Option<f64> {
    (count > 0).then(|| amount / count as f64)
}

#[cfg(test)]
mod tests;
