//! Clients, joins, channels and dropped messages.

use std::sync::Arc;

use strum::VariantArray;

use crate::{
    protocol::{error_code::ErrorCode, generation::Generation},
    telemetry::metrics::{Counter, CounterBy, Gauge, GaugeGuard, Histogram, Label, Registry},
};

/// Why a message that was understood is dropped, where no wire code says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Dropped {
    /// A broadcast to a topic that the token may not write to.
    WriteDenied,
    /// A broadcast whose payload is not an object.
    NotObject,
    /// A broadcast above the payload limit, or another message above that of control messages.
    TooLarge,
    /// An event that channels do not know.
    UnknownEvent,
    /// A leave of a channel that has been replaced.
    StaleLeave,
    /// A join with an empty ref.
    EmptyRef,
    /// More messages for a topic than may wait for its join.
    Backlog,
    /// A broadcast to a private channel whose policies could not be asked.
    WriteUnanswered,
    /// A broadcast beyond its client's share, or the project's rates.
    Rate,
    /// A broadcast that has ended its channel, which alone exceeds what one client may send.
    ChannelRate,
    /// A message for a topic that the socket has no channel of.
    UnmatchedTopic,
}

/// Why a joined channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum EndReason {
    /// Its client has left.
    Left,
    /// Its client has joined the topic once more.
    Replaced,
    /// Its token does not hold or does not open the topic any more.
    Token,
    /// Its client broadcasts too fast.
    TooFast,
    /// Its client reads too slowly for what is broadcast.
    TooSlow,
    /// The database's policies could not be asked.
    Unanswered,
    /// Its connection has ended.
    Connection,
}

impl EndReason {
    /// The reason as the audit log names it.
    pub(super) fn label(self) -> &'static str {
        self.into()
    }
}

/// What a join was answered with.
#[derive(Debug, Clone, Copy)]
pub(super) enum JoinResult {
    /// `ok`, and the channel hears its topic.
    Ok,
    /// `ok`, and the channel is silent until its claims allow reading.
    Withheld,
    /// An error reply with this code.
    Error(ErrorCode),
}

/// `result` and `code`.
impl Label<2> for JoinResult {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        let codes = ErrorCode::VARIANTS.iter().map(|code| Self::Error(*code));
        [Self::Ok, Self::Withheld].into_iter().chain(codes).map(|result| result.values())
    }

    fn values(&self) -> [&'static str; 2] {
        match self {
            Self::Ok => ["ok", ""],
            Self::Withheld => ["withheld", ""],
            Self::Error(code) => ["error", code.as_str()],
        }
    }
}

/// Whether a heartbeat came as often as clients of open tabs send them.
#[derive(Debug, Clone, Copy, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Timing {
    OnTime,
    Late,
}

/// What became of a token that a client sent for a joined channel.
#[derive(Debug, Clone, Copy, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Refresh {
    Ok,
    Refused,
}

/// The room's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Sockets that have joined something, by the client of their first join.
    pub(super) client_versions: CounterBy<Generation>,
    /// Heartbeats of clients.
    pub(super) heartbeats: CounterBy<Timing>,
    /// Joins answered.
    pub(super) joins: CounterBy<JoinResult, 2>,
    /// From a join's frame to its reply.
    pub(super) join_seconds: Histogram,
    /// Joined channels.
    channels: Gauge,
    /// Joined channels that ended.
    channels_ended: Arc<CounterBy<EndReason>>,
    /// Messages understood and dropped.
    pub(crate) dropped: CounterBy<Dropped>,
    /// Tokens that expired on an open socket.
    pub(super) token_expiries: Counter,
    /// Tokens that clients sent for joined channels.
    pub(super) token_refreshes: CounterBy<Refresh>,
    /// Backlogs of slow clients that one merged invalidation has replaced.
    pub(super) conflations: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            client_versions: registry.counter_by(
                "client_versions_total",
                ["version"],
                "Sockets that have joined something, by the supabase-js whose joins look like their first.",
            ),
            heartbeats: registry.counter_by(
                "heartbeats_total",
                ["timing"],
                "Heartbeats of clients, by whether they came in time.",
            ),
            joins: registry.counter_by(
                "joins_total",
                ["result", "code"],
                "Joins answered, by result and code.",
            ),
            join_seconds: registry.latency("join_seconds", "From a join's frame to its reply."),
            channels: registry.gauge("channels", "Joined channels."),
            channels_ended: Arc::new(registry.counter_by(
                "channels_ended_total",
                ["reason"],
                "Joined channels that ended, by reason.",
            )),
            dropped: registry.counter_by(
                "dropped_total",
                ["reason"],
                "Messages understood and dropped, by reason.",
            ),
            token_expiries: registry
                .counter("token_expiries_total", "Tokens that expired on open channels."),
            token_refreshes: registry.counter_by(
                "token_refreshes_total",
                ["result"],
                "Tokens sent for channels that are joined, by result.",
            ),
            conflations: registry.counter(
                "conflations_total",
                "Backlogs of slow clients that one merged invalidation has replaced.",
            ),
        }
    }

    /// Counts a joined channel until the guard is dropped.
    pub(super) fn open_channel(&self) -> OpenChannel {
        OpenChannel {
            _open: GaugeGuard::new(&self.channels),
            ended: Arc::clone(&self.channels_ended),
            ends_for: EndReason::Connection,
        }
    }
}

/// Counts a joined channel while it is open and when it ends.
#[derive(Debug)]
pub(super) struct OpenChannel {
    _open: GaugeGuard,
    ended: Arc<CounterBy<EndReason>>,
    /// Why it ends, if not with its connection.
    pub(super) ends_for: EndReason,
}

impl Drop for OpenChannel {
    fn drop(&mut self) {
        self.ended.of(self.ends_for).inc();
    }
}
