//! Connections, requests and frames of the public port.

use hyper::StatusCode;
use strum::VariantArray;

use super::close::CloseReason;
use crate::{
    hub::outbox::{Committed, Departure},
    protocol::message::Malformed,
    telemetry::metrics::{
        Counter, CounterBy, Gauge, Histogram, HistogramBy, LATENCY_BUCKETS, Label, Registry,
    },
};

/// Lives of connections: from a second to a day.
const LIFETIME_BUCKETS: [f64; 9] =
    [1.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0];
/// From a commit to a socket: latencies of what left at once, and the window of what waited.
const WRITE_BUCKETS: [f64; 21] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0,
    2.5, 3.0, 3.25, 3.5, 4.0, 5.0, 10.0,
];

/// Why a connection attempt came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RefusedUpgrade {
    /// The request is no WebSocket upgrade.
    BadRequest,
    /// The web page may not connect.
    Origin,
    /// The `vsn` is not one that is spoken here.
    Version,
    /// The key is missing or wrong.
    Token,
    /// The address upgrades too often.
    Handshakes,
    /// The address has brought too many wrong tokens, and this one is neither known nor a JWT.
    Failures,
    /// All places of sockets are taken.
    Full,
    /// The address has as many sockets as it may.
    AddressFull,
    /// All places of connections that are no sockets are being answered.
    Pending,
    /// The connection has made way for a newcomer while the server waited for its client.
    Displaced,
    /// The head is not HTTP.
    MalformedHead,
    /// The head is too large.
    LargeHead,
    /// The head has not come in time.
    HeadTimeout,
    /// An answer was not taken in time.
    Stalled,
    /// The server is draining.
    Draining,
    /// The peer went away between the answer and the first frame.
    Abandoned,
}

impl RefusedUpgrade {
    /// The reason as logs name it.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Route {
    /// A WebSocket.
    Websocket,
    /// Broadcasts by REST, a batch of them or a single one.
    Broadcast,
    /// A browser's question whether a page may broadcast.
    Preflight,
    /// A look whether the process lives.
    #[strum(serialize = "healthz")]
    Health,
    /// No route.
    Unknown,
    /// A page of the demo.
    Page,
}

impl Route {
    /// What it can be answered with.
    pub(crate) fn statuses(self) -> &'static [StatusCode] {
        match self {
            Self::Websocket => &[
                StatusCode::SWITCHING_PROTOCOLS,
                StatusCode::BAD_REQUEST,
                StatusCode::UNAUTHORIZED,
                StatusCode::FORBIDDEN,
                StatusCode::TOO_MANY_REQUESTS,
                StatusCode::SERVICE_UNAVAILABLE,
            ],
            Self::Broadcast => &[
                StatusCode::ACCEPTED,
                StatusCode::BAD_REQUEST,
                StatusCode::UNAUTHORIZED,
                StatusCode::FORBIDDEN,
                StatusCode::REQUEST_TIMEOUT,
                StatusCode::PAYLOAD_TOO_LARGE,
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                StatusCode::UNPROCESSABLE_ENTITY,
                StatusCode::TOO_MANY_REQUESTS,
            ],
            Self::Preflight => &[StatusCode::NO_CONTENT],
            Self::Health => &[StatusCode::OK],
            Self::Unknown => &[StatusCode::NOT_FOUND],
            Self::Page => &[
                StatusCode::OK,
                StatusCode::TEMPORARY_REDIRECT,
                StatusCode::NOT_FOUND,
                StatusCode::METHOD_NOT_ALLOWED,
                StatusCode::SERVICE_UNAVAILABLE,
            ],
        }
    }
}

/// A request that was answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answered(pub(crate) Route, pub(crate) StatusCode);

/// `route` and `status`.
impl Label<2> for Answered {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        let all = Route::VARIANTS.iter();
        all.flat_map(|route| route.statuses().iter().map(|status| Self(*route, *status).values()))
    }

    fn values(&self) -> [&'static str; 2] {
        let Self(route, status) = self;
        let listed = route.statuses().iter().find(|listed| *listed == status);
        [(*route).into(), listed.map_or("", StatusCode::as_str)]
    }
}

/// What became of an upgrade.
#[derive(Debug, Clone, Copy, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Handshake {
    Ok,
    Refused,
}

/// Which way a frame goes.
#[derive(Debug, Clone, Copy, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
enum Direction {
    In,
    Out,
}

/// The room's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Open sockets.
    pub(super) connections: Gauge,
    /// Sockets opened.
    pub(super) accepted: Counter,
    /// Connection attempts that came to nothing.
    pub(super) refused: CounterBy<RefusedUpgrade>,
    /// Sockets closed.
    pub(super) closed: CounterBy<CloseReason, 2>,
    /// From a socket's upgrade to its end.
    pub(super) connection_seconds: Histogram,
    /// From the accepted connection to the answer to its upgrade.
    pub(super) handshake_seconds: HistogramBy<Handshake>,
    /// Requests answered, upgrades among them.
    pub(super) requests: CounterBy<Answered, 2>,
    /// Accepts that failed: no file descriptor, no memory.
    pub(crate) accept_errors: Counter,
    /// Data frames in.
    pub(super) frames_in: Counter,
    /// Data frames out.
    pub(super) frames_out: Counter,
    /// Payload bytes of data frames in.
    pub(super) bytes_in: Counter,
    /// Payload bytes of data frames out.
    pub(super) bytes_out: Counter,
    /// Frames that are no messages.
    pub(super) malformed: CounterBy<Malformed>,
    /// From a notification's stamp, by the database's clock, to the end of the write to a client.
    commit_to_write: HistogramBy<Departure>,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        let frames: CounterBy<Direction> =
            registry.counter_by("frames_total", ["direction"], "Data frames, by direction.");
        let bytes: CounterBy<Direction> = registry.counter_by(
            "bytes_total",
            ["direction"],
            "Payload bytes of data frames, by direction.",
        );
        Self {
            connections: registry.gauge("connections", "Open sockets."),
            accepted: registry.counter("connections_accepted_total", "Sockets opened."),
            refused: registry.counter_by(
                "connections_refused_total",
                ["reason"],
                "Connection attempts refused, by reason.",
            ),
            closed: registry.counter_by(
                "connections_closed_total",
                ["reason", "code"],
                "Sockets closed, by reason and close code.",
            ),
            connection_seconds: registry.histogram(
                "connection_seconds",
                "From a socket's upgrade to its end.",
                &LIFETIME_BUCKETS,
            ),
            handshake_seconds: registry.histogram_by(
                "handshake_seconds",
                "result",
                "From an accepted connection to the answer to its upgrade, by result.",
                &LATENCY_BUCKETS,
            ),
            requests: registry.counter_by(
                "http_requests_total",
                ["route", "status"],
                "Requests answered on the public port, by route and status.",
            ),
            accept_errors: registry
                .counter("accept_errors_total", "Failed accepts; each backs off."),
            frames_in: frames.of(Direction::In).clone(),
            frames_out: frames.of(Direction::Out).clone(),
            bytes_in: bytes.of(Direction::In).clone(),
            bytes_out: bytes.of(Direction::Out).clone(),
            malformed: registry.counter_by(
                "malformed_total",
                ["reason"],
                "Frames that are not messages, by reason.",
            ),
            commit_to_write: registry.histogram_by(
                "commit_to_write_seconds",
                "sent",
                "From a notification's stamp to the end of the write to a socket, by how it was sent.",
                &WRITE_BUCKETS,
            ),
        }
    }

    /// Measures a write that has ended, of what was committed then.
    pub(super) fn count_write(&self, committed: Committed) {
        let took = committed.at.elapsed().as_secs_f64();
        self.commit_to_write.of(committed.departure).observe(took);
    }
}
