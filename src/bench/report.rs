//! The report of a run: one JSON object, or a table for people.
//!
//! Invariant: a number that was not measured is absent, never zero.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
    time::Duration,
};

use serde::Serialize;

use super::latency::Percentiles;

/// All numbers of a run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) url: String,
    pub(super) vsn: &'static str,
    pub(super) topic: String,
    pub(super) opening: Opening,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) publishing: Option<Publishing>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server: Option<Server>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bare: Option<BareLoop>,
    /// The count of each failure, by its text.
    pub(super) failures: BTreeMap<String, u64>,
}

/// Numbers from the first connect to the last join's answer.
#[derive(Debug, Serialize)]
pub(super) struct Opening {
    pub(super) sockets: usize,
    pub(super) sockets_joined: usize,
    pub(super) channels_per_socket: usize,
    pub(super) channels_joined: u64,
    pub(super) topics: usize,
    pub(super) in_flight: usize,
    pub(super) seconds: f64,
    pub(super) joins_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) handshake_us: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) join_reply_us: Option<Percentiles>,
}

/// Numbers from the first message to the last delivery.
#[derive(Debug, Serialize)]
pub(super) struct Publishing {
    pub(super) publish: &'static str,
    pub(super) ticks_per_second: u32,
    pub(super) messages_per_tick: u64,
    pub(super) messages: u64,
    pub(super) payload_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) frame_bytes: Option<usize>,
    /// Absent without a publishing socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) messages_acknowledged: Option<u64>,
    pub(super) deliveries_expected: u64,
    pub(super) deliveries: u64,
    /// Messages that the server merged into others.
    pub(super) deliveries_merged: u64,
    pub(super) seconds: f64,
    pub(super) deliveries_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) latency_us: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) statement_us: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tick_lateness_us: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bench_cpu_us_per_delivery: Option<f64>,
}

/// The server's use of its machine.
#[derive(Debug, Serialize)]
pub(super) struct Server {
    pub(super) pid: u32,
    /// CPU time of the joins and of the handshakes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpu_us_per_join: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpu_us_per_delivery: Option<f64>,
    pub(super) rss_before_kib: u64,
    pub(super) rss_joined_kib: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rss_published_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rss_kib_per_socket: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rss_anon_kib_per_socket: Option<f64>,
}

/// The cost of the same bytes, written without a server.
#[derive(Debug, Serialize)]
pub(super) struct BareLoop {
    pub(super) sockets: usize,
    pub(super) writes: u64,
    pub(super) writes_blocked: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpu_us_per_write: Option<f64>,
    /// The server's CPU time for each delivery divided by that of a bare write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server_to_bare_ratio: Option<f64>,
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { url, vsn, topic, opening, publishing, server, bare, failures } = self;
        writeln!(f, "{url}, vsn {vsn}, topic {topic}")?;
        write!(f, "{opening}")?;
        if let Some(publishing) = publishing {
            write!(f, "{publishing}")?;
        }
        if let Some(server) = server {
            write!(f, "{server}")?;
        }
        if let Some(bare) = bare {
            write!(f, "{bare}")?;
        }
        if !failures.is_empty() {
            writeln!(f, "failures")?;
        }
        for (kind, count) in failures {
            writeln!(f, "  {count:>7} × {kind}")?;
        }
        Ok(())
    }
}

impl Display for Opening {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "opening")?;
        let Self { sockets, sockets_joined, channels_joined, topics, seconds, .. } = self;
        line(f, "sockets joined", format_args!("{sockets_joined} of {sockets}"))?;
        line(f, "channels joined", format_args!("{channels_joined} on {topics} topics"))?;
        let rate = self.joins_per_second;
        line(f, "joins/s", format_args!("{rate:.0}, {seconds:.2} s in all"))?;
        percentiles(f, "handshake ms", self.handshake_us)?;
        percentiles(f, "join reply ms", self.join_reply_us)
    }
}

impl Display for Publishing {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "publishing by {}", self.publish)?;
        let Self { messages, messages_per_tick, ticks_per_second, seconds, .. } = self;
        line(
            f,
            "messages",
            format_args!("{messages}: {messages_per_tick} × {ticks_per_second}/s, {seconds:.2} s"),
        )?;
        let (payload, frame) = (self.payload_bytes, self.frame_bytes.unwrap_or_default());
        line(f, "bytes", format_args!("payload {payload}, frame {frame}"))?;
        if let Some(acknowledged) = self.messages_acknowledged {
            line(f, "acknowledged", format_args!("{acknowledged}"))?;
        }
        let Self { deliveries, deliveries_merged, deliveries_expected, .. } = self;
        line(
            f,
            "delivered",
            format_args!("{deliveries} (+ {deliveries_merged} merged) of {deliveries_expected}"),
        )?;
        line(f, "deliveries/s", format_args!("{:.0}", self.deliveries_per_second))?;
        percentiles(f, "latency ms", self.latency_us)?;
        percentiles(f, "statement ms", self.statement_us)?;
        percentiles(f, "tick lateness ms", self.tick_lateness_us)?;
        number(f, "bench CPU µs/delivery", self.bench_cpu_us_per_delivery)
    }
}

impl Display for Server {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "server, pid {}", self.pid)?;
        number(f, "CPU µs/join", self.cpu_us_per_join)?;
        number(f, "CPU µs/delivery", self.cpu_us_per_delivery)?;
        number(f, "KiB/joined socket", self.rss_kib_per_socket)?;
        number(f, "  anonymous", self.rss_anon_kib_per_socket)?;
        let Self { rss_before_kib, rss_joined_kib, .. } = self;
        line(f, "resident KiB", format_args!("{rss_before_kib}, joined {rss_joined_kib}"))?;
        if let Some(published) = self.rss_published_kib {
            line(f, "  after publishing", format_args!("{published}"))?;
        }
        Ok(())
    }
}

impl Display for BareLoop {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { sockets, writes, writes_blocked, .. } = self;
        writeln!(f, "bare writes")?;
        line(f, "writes", format_args!("{writes} to {sockets} sockets, {writes_blocked} blocked"))?;
        number(f, "CPU µs/write", self.cpu_us_per_write)?;
        number(f, "server ÷ bare", self.server_to_bare_ratio)
    }
}

/// Returns microseconds for each of `count`; `None` if there are none.
pub(super) fn microseconds_each(used: Duration, count: u64) -> Option<f64> {
    ratio(used.as_secs_f64() * 1e6, count)
}

/// Returns `amount` for each of `count`; `None` if there are none.
pub(super) fn ratio(amount: f64, count: u64) -> Option<f64> {
    (count > 0).then(|| amount / count as f64)
}

fn line(f: &mut Formatter<'_>, label: &str, value: fmt::Arguments<'_>) -> fmt::Result {
    writeln!(f, "  {label:<22}{value}")
}

fn number(f: &mut Formatter<'_>, label: &str, value: Option<f64>) -> fmt::Result {
    value.map_or(Ok(()), |value| line(f, label, format_args!("{value:.2}")))
}

fn percentiles(f: &mut Formatter<'_>, label: &str, value: Option<Percentiles>) -> fmt::Result {
    let Some(Percentiles { p50, p95, p99, max }) = value else { return Ok(()) };
    let [p50, p95, p99, max] = [p50, p95, p99, max].map(|microseconds| microseconds / 1_000.0);
    line(f, label, format_args!("p50 {p50:.2}  p95 {p95:.2}  p99 {p99:.2}  max {max:.2}"))
}
