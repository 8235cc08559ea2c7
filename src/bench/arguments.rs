//! The arguments of `tidegate bench`, and the contradictions among them.

use clap::{Args, ValueEnum};

use crate::{secret::Secret, wire_client::message::Vsn};

/// Puts a load of viewers on any server of this protocol and measures it.
///
/// Memory is only meaningful on a freshly started server: one that has served a load before keeps
/// some of it.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// Where clients connect: ws://HOST:PORT/PATH, to which /websocket is appended
    #[arg(long, default_value = "ws://127.0.0.1:4000/realtime/v1")]
    pub(super) url: String,
    /// Key that viewers connect and join with, a JWT
    #[arg(long, value_name = "JWT")]
    pub(super) apikey: Secret,
    /// Key that publishing sockets use where viewers may not write [default: --apikey]
    #[arg(long, value_name = "JWT")]
    pub(super) publisher_apikey: Option<Secret>,
    /// Protocol version
    #[arg(long, value_enum, default_value = "1.0.0")]
    pub(super) vsn: Vsn,
    /// Viewers, each a socket of its own
    #[arg(long, default_value_t = 1_000, value_parser = at_least_one)]
    pub(super) sockets: usize,
    /// Channels that each socket joins
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub(super) channels: usize,
    /// Topics over which the channels are spread, in turn
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub(super) topics: usize,
    /// Name of a topic, without realtime: and with its number, from 1, for the n in braces
    #[arg(long, value_name = "PATTERN", default_value = "bench-{n}")]
    pub(super) topic: String,
    /// Ticks per second, over all topics, which take turns
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) rate: u32,
    /// Messages to each tick: one write, or one transaction
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(super) burst: u64,
    /// How long to publish; 0 only opens and joins
    #[arg(long, default_value_t = 10)]
    pub(super) seconds: u32,
    /// How to publish: over a socket for each topic, or by pg_notify on the channel named like
    /// the topic
    #[arg(long, value_enum, default_value = "socket")]
    pub(super) publish: Publish,
    /// Database to notify, for `--publish sql`
    #[arg(long, value_name = "URL")]
    pub(super) database_url: Option<Secret>,
    /// Bytes of a message's own payload
    #[arg(long, value_name = "BYTES", default_value_t = 230)]
    pub(super) payload_bytes: usize,
    /// Process id of the server, on this machine: measures its CPU and memory
    #[arg(long)]
    pub(super) pid: Option<u32>,
    /// Also measures bare writes of the same bytes to as many TCP sockets
    #[arg(long)]
    pub(super) baseline: bool,
    /// Sockets that open and join at the same time
    #[arg(long, value_name = "SOCKETS", default_value_t = 200, value_parser = at_least_one)]
    pub(super) in_flight: usize,
    /// Seconds that a handshake, the answers to a socket's joins, or a write may take
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) deadline: u64,
    /// Prints one JSON object instead of a table
    #[arg(long)]
    pub(super) json: bool,
}

/// The way by which messages enter the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Publish {
    Socket,
    Sql,
}

impl BenchArgs {
    /// Checks what the parser of arguments cannot see.
    ///
    /// # Errors
    /// The sentence that names the arguments which contradict each other.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let longest_topic = self.topic_name(self.topics - 1).len();
        let problem = if self.channels > self.topics {
            "--channels must not exceed --topics: a socket joins a topic once"
        } else if self.topics > 1 && !self.topic.contains("{n}") {
            "--topic must contain {n} when there are several --topics"
        } else if longest_topic > TOPIC_BYTES_MAX {
            "--topic must not exceed 255 bytes, with its prefix realtime:"
        } else if self.publish == Publish::Sql && self.database_url.is_none() {
            "--publish sql needs --database-url"
        } else if self.publish == Publish::Sql && self.payload_bytes > NOTIFY_PAYLOAD_BYTES_MAX {
            "--payload-bytes must be below 8000 for --publish sql"
        } else if self.publish == Publish::Sql
            && longest_topic - TOPIC_PREFIX.len() > NOTIFY_CHANNEL_BYTES_MAX
        {
            "--topic must not exceed 63 bytes for --publish sql"
        } else if self.baseline && self.seconds == 0 {
            "--baseline needs messages: --seconds must not be 0"
        } else {
            return Ok(());
        };
        Err(problem)
    }

    /// Returns the topic with this index, as on the wire.
    pub(super) fn topic_name(&self, index: usize) -> String {
        format!("{TOPIC_PREFIX}{}", self.topic.replace("{n}", &(index + 1).to_string()))
    }

    /// Returns the number of files that the run opens at most.
    pub(super) fn files_needed(&self) -> usize {
        let publishers = if self.publish == Publish::Socket { self.topics } else { 0 };
        self.sockets + publishers + FILES_BESIDES
    }
}

/// What every topic begins with on the wire.
pub(super) const TOPIC_PREFIX: &str = "realtime:";
/// Files besides sockets: the runtime's own, the database, `/proc`.
pub(super) const FILES_BESIDES: usize = 64;
/// Postgres' own bound of a notification.
const NOTIFY_PAYLOAD_BYTES_MAX: usize = 7_999;
/// Postgres' own bound of a channel's name.
const NOTIFY_CHANNEL_BYTES_MAX: usize = 63;
/// A topic's length is one byte in a binary frame.
const TOPIC_BYTES_MAX: usize = 255;

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}
