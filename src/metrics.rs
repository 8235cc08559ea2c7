//! Every metric: name, unit, help, labels.
//!
//! Invariants: label values come from closed sets, and all of them exist from the start, so that a
//! rate over a counter sees its first increment; hot paths use handles resolved here, once.

use std::{sync::Arc, time::Duration};

use prometheus::{
    Counter, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts,
    core::{AtomicF64, GenericGauge, GenericGaugeVec},
};

use crate::{
    auth::{
        jwks::JwksError,
        jwt::{Token, TokenError},
        keys::{Origin, Unusable, VerifiedBy},
    },
    db::deployed::TRIGGERS,
    http::{Route, connection::CloseReason},
    hub::outbox::{Committed, Departure},
    invalidation::{GapCause, Tally},
    policies::{AuthorizeError, Question},
    protocol::{error_code::ErrorCode, generation::Generation, message::Malformed},
    relay::{LinkError, Outcome},
    server::reload::ReloadError,
    socket::channel::EndReason,
    telemetry::metrics::{CounterBy, Registry},
    upkeep::survey,
};

/// From a quarter of a millisecond to ten seconds: three buckets a decade, so that a quantile is
/// off by a factor of 2.5 at most.
const LATENCY_BUCKETS: [f64; 15] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
];
/// What is computed and waits for nobody: from 5 µs to 10 ms.
const COMPUTING_BUCKETS: [f64; 11] = [
    0.000_005, 0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005,
    0.01,
];
/// Lives of connections: from a second to a day.
const LIFETIME_BUCKETS: [f64; 9] =
    [1.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0];
/// From a commit to a socket: latencies of what left at once, and the window of what waited.
const WRITE_BUCKETS: [f64; 21] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0,
    2.5, 3.0, 3.25, 3.5, 4.0, 5.0, 10.0,
];
/// Payloads of notifications, of which Postgres takes less than 8,000 bytes.
const PAYLOAD_BUCKETS: [f64; 8] = [64.0, 128.0, 256.0, 512.0, 1_024.0, 2_048.0, 4_096.0, 8_000.0];

/// The label of the events that have no series of their own.
pub(crate) const OTHER_EVENTS: &str = "other";

/// What a connection attempt or a message was refused or dropped for, where no wire code says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// A broadcast to a topic that the token may not write to.
    WriteDenied,
    /// A broadcast whose payload is not an object.
    NotObject,
    /// A broadcast above the payload limit.
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
    /// A broadcast to a rule's topic, over the project's rate.
    Rate,
}

impl Dropped {
    /// Every reason.
    pub const ALL: [Self; 9] = [
        Self::WriteDenied,
        Self::NotObject,
        Self::TooLarge,
        Self::UnknownEvent,
        Self::StaleLeave,
        Self::EmptyRef,
        Self::Backlog,
        Self::WriteUnanswered,
        Self::Rate,
    ];

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::WriteDenied => "write_denied",
            Self::NotObject => "not_object",
            Self::TooLarge => "too_large",
            Self::UnknownEvent => "unknown_event",
            Self::StaleLeave => "stale_leave",
            Self::EmptyRef => "empty_ref",
            Self::Backlog => "backlog",
            Self::WriteUnanswered => "write_unanswered",
            Self::Rate => "rate",
        }
    }
}

/// Why a connection attempt came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedUpgrade {
    /// Not a WebSocket upgrade.
    BadRequest,
    /// A web page that may not connect.
    Origin,
    /// A `vsn` that is not spoken here.
    Version,
    /// The key is missing or wrong.
    Token,
    /// The address knocks too often.
    Handshakes,
    /// The address has brought too many wrong tokens, and this one is not known to be right.
    Failures,
    /// All places of sockets are taken.
    Full,
    /// The address has as many sockets as it may.
    AddressFull,
    /// Too many connections are still asking.
    Pending,
    /// The server is draining.
    Draining,
    /// The peer went away between the answer and the first frame.
    Abandoned,
}

impl RefusedUpgrade {
    /// Every reason.
    pub const ALL: [Self; 11] = [
        Self::BadRequest,
        Self::Origin,
        Self::Version,
        Self::Token,
        Self::Handshakes,
        Self::Failures,
        Self::Full,
        Self::AddressFull,
        Self::Pending,
        Self::Draining,
        Self::Abandoned,
    ];

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Origin => "origin",
            Self::Version => "version",
            Self::Token => "token",
            Self::Handshakes => "handshakes",
            Self::Failures => "failures",
            Self::Full => "full",
            Self::AddressFull => "address_full",
            Self::Pending => "pending",
            Self::Draining => "draining",
            Self::Abandoned => "abandoned",
        }
    }
}

/// The metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    /// Where they are registered, and those of the rooms.
    pub registry: Registry,
    /// Open sockets.
    pub connections: IntGauge,
    /// Sockets opened.
    pub connections_accepted: IntCounter,
    /// By [`RefusedUpgrade`].
    pub connections_refused: IntCounterVec,
    /// By [`CloseReason`] and close code.
    pub connections_closed: IntCounterVec,
    /// From a socket's upgrade to its end.
    pub connection_seconds: Histogram,
    /// From the accepted connection to the answer to its upgrade, by `ok` or `refused`.
    pub handshake_seconds: HistogramVec,
    /// Sockets that have joined something, by [`Generation`].
    pub client_versions: IntCounterVec,
    /// Heartbeats of clients, `on_time` or `late`.
    pub heartbeats: IntCounterVec,
    /// Requests on the public port, upgrades among them, by [`Route`] and status.
    pub http_requests: IntCounterVec,
    /// `accept` failed: no file descriptor, no memory.
    pub accept_errors: IntCounter,
    /// Settings read again, by result.
    pub reloads: IntCounterVec,
    /// Revocations that hold, at the time of the scrape.
    pub revocations: IntGauge,
    /// Joined channels.
    pub channels: IntGauge,
    /// By result (`ok`, `withheld`, `error`) and [`ErrorCode`].
    pub joins: IntCounterVec,
    /// From the join's frame to its reply.
    pub join_seconds: Histogram,
    /// Joined channels that ended, by [`EndReason`].
    pub channels_ended: IntCounterVec,
    /// Data frames in.
    pub frames_in: IntCounter,
    /// Data frames out.
    pub frames_out: IntCounter,
    /// Payload bytes of data frames in.
    pub bytes_in: IntCounter,
    /// Payload bytes of data frames out.
    pub bytes_out: IntCounter,
    /// By [`Malformed`].
    pub malformed: IntCounterVec,
    /// Messages understood and dropped, by [`Dropped`].
    pub dropped: IntCounterVec,
    /// Verifications, by `ok` or [`TokenError::kind`].
    pub tokens: IntCounterVec,
    /// Verifications that were `ok`, by key and algorithm: [`VerifiedBy`].
    pub tokens_accepted: IntCounterVec,
    /// One verification.
    pub token_seconds: Histogram,
    /// Tokens that expired on an open socket.
    pub token_expiries: IntCounter,
    /// `access_token` events, by `ok` or `refused`.
    pub token_refreshes: IntCounterVec,
    /// When a key set was last read, by [`Origin`], seconds since 1970.
    pub jwks_read: GenericGaugeVec<AtomicF64>,
    /// Keys that can be used, by [`Origin`].
    pub jwks_keys: IntGaugeVec,
    /// Keys left out, by [`Unusable`]; once for each document.
    pub jwks_keys_unusable: IntCounterVec,
    /// By [`Origin`] and [`JwksError::kind`].
    pub jwks_failures: IntCounterVec,
    /// By source (`event`, `stats`, `other`) and [`Outcome`].
    pub notifications: IntCounterVec,
    /// Payloads of notifications.
    pub notification_bytes: Histogram,
    /// From the stamp in a notification's payload, by the database's clock, to its arrival.
    pub commit_to_received: Histogram,
    /// From that stamp to the end of the write to a client, of what left at once.
    pub commit_to_write_at_once: Histogram,
    /// The same of what had to wait for its event's window.
    pub commit_to_write_merged: Histogram,
    /// Invalidations that wait for their window, at the time of the scrape.
    pub invalidations_pending: IntGauge,
    /// Events that are live, at the time of the scrape.
    pub events_live: IntGauge,
    /// Events that are muted, at the time of the scrape.
    pub events_muted: IntGauge,
    /// Events with viewers that nothing was ever published for and the database does not know.
    pub events_never_published: IntGauge,
    /// Notifications that name an event without a viewer here.
    pub published_without_viewer: IntCounter,
    /// Viewers of each of the busiest events, and of all others.
    pub event_viewers: IntGaugeVec,
    /// Invalidations that came for each.
    pub event_notifications: IntCounterVec,
    /// Frames of invalidations to whole events.
    pub event_deliveries: IntCounterVec,
    /// Invalidations of each that left as part of another.
    pub event_merged: IntCounterVec,
    /// When one last came for each of the busiest, seconds since 1970.
    pub event_last_notification: GenericGaugeVec<AtomicF64>,
    /// Unions that took the place of what a slow client had not read.
    pub conflations: IntCounter,
    /// From a canary's departure to its arrival.
    pub canary_seconds: Histogram,
    /// When a canary last arrived, seconds since 1970.
    pub canary_last: GenericGauge<AtomicF64>,
    /// Canaries that could not be sent.
    pub canary_failures: IntCounter,
    /// Questions to the history that the server refused.
    pub history_unreadable: IntCounter,
    /// Questions to the policies of private channels, by [`Question`].
    pub policy_seconds: HistogramVec,
    /// By [`Question`] and `allowed`, `denied` or [`AuthorizeError::kind`].
    pub policy_questions: IntCounterVec,
    /// 1 while the listening session is up.
    pub relay_link_up: IntGauge,
    /// By what ended the session, or the attempt: [`LinkError`].
    pub relay_reconnects: IntCounterVec,
    /// Times at which something may have been missed, by [`GapCause`].
    pub(crate) relay_gaps: CounterBy<GapCause>,
    /// 1 from a gap's beginning until its catch-up has been handed over.
    pub relay_gap_open: IntGauge,
    /// When the last notification arrived, seconds since 1970.
    pub relay_last_notification: GenericGauge<AtomicF64>,
    /// When the session last answered a heartbeat, seconds since 1970.
    pub relay_last_heartbeat: GenericGauge<AtomicF64>,
    /// LISTENs that are active.
    pub relay_listens: IntGauge,
    /// Joined events that cannot be listened to, by reason (`full`, `too_long`).
    pub relay_listens_refused: IntCounterVec,
    /// Whether the trigger of a table sees an operation, 1 or 0, of tables that exist.
    pub database_triggers: IntGaugeVec,
    /// 1 where a function is missing or is not this version's.
    pub database_drift: IntGaugeVec,
    /// Migrations of this version that the database lacks.
    pub database_migrations_pending: IntGauge,
    /// Rows written, as Postgres counts them, since the gateway looks.
    pub database_writes: IntCounterVec,
    /// Rows of the history, by the table that caused them, since the gateway looks.
    pub database_history_rows: IntCounterVec,
    /// What triggers could not do, as they recorded it, since the gateway looks.
    pub database_trigger_failures: IntCounter,
    /// How full the queue of notifications is, from 0 to 1.
    pub database_notify_queue: GenericGauge<AtomicF64>,
    /// The database's clock less ours, as the session's heartbeats see it.
    pub database_clock_offset: GenericGauge<AtomicF64>,
    /// When the oldest message of the history was written, seconds since 1970; 0 if there is none.
    pub database_history_oldest: GenericGauge<AtomicF64>,
    /// When the database was last looked at, seconds since 1970.
    pub database_last_look: GenericGauge<AtomicF64>,
    /// Looks that failed.
    pub database_look_failures: IntCounter,
    /// Sessions of the pool, `idle` or `used`, at the time of the scrape.
    pub database_pool: IntGaugeVec,
    /// Sessions that the pool may have.
    pub database_pool_max: IntGauge,
    /// Threads that run tasks.
    pub tokio_workers: IntGauge,
    /// Tasks that have not ended, at the time of the scrape.
    pub tokio_tasks: IntGauge,
    /// Tasks that no worker has taken yet, at the time of the scrape.
    pub tokio_global_queue: IntGauge,
    /// What all workers have been busy, at the time of the scrape.
    pub tokio_busy: Counter,
}

impl Metrics {
    /// The metrics of a new server, all at zero.
    ///
    /// # Panics
    /// Never: the names are distinct, which a test shows.
    #[must_use]
    #[expect(clippy::too_many_lines, reason = "a list, one entry a metric")]
    pub fn new() -> Self {
        let new = Maker { registry: Registry::new() };
        let frames = new.counters("frames_total", "Data frames, by direction.", &["direction"]);
        let bytes = new.counters(
            "bytes_total",
            "Payload bytes of data frames, by direction.",
            &["direction"],
        );
        let commit_to_write = new.histograms(
            "commit_to_write_seconds",
            "From a notification's stamp to the end of the write to a socket, by how it was sent.",
            &["sent"],
            &WRITE_BUCKETS,
        );
        let metrics = Self {
            connections: new.gauge("connections", "Open sockets."),
            connections_accepted: new.counter("connections_accepted_total", "Sockets opened."),
            connections_refused: new.counters(
                "connections_refused_total",
                "Connection attempts refused, by reason.",
                &["reason"],
            ),
            connections_closed: new.counters(
                "connections_closed_total",
                "Sockets closed, by reason and close code.",
                &["reason", "code"],
            ),
            connection_seconds: new.histogram_of(
                "connection_seconds",
                "From a socket's upgrade to its end.",
                &LIFETIME_BUCKETS,
            ),
            handshake_seconds: new.histograms(
                "handshake_seconds",
                "From an accepted connection to the answer to its upgrade, by result.",
                &["result"],
                &LATENCY_BUCKETS,
            ),
            client_versions: new.counters(
                "client_versions_total",
                "Sockets that have joined something, by the supabase-js whose joins look like their first.",
                &["version"],
            ),
            heartbeats: new.counters(
                "heartbeats_total",
                "Heartbeats of clients, by whether they came in time.",
                &["timing"],
            ),
            http_requests: new.counters(
                "http_requests_total",
                "Requests answered on the public port, by route and status.",
                &["route", "status"],
            ),
            accept_errors: new.counter("accept_errors_total", "Failed accepts; each backs off."),
            reloads: new.counters(
                "reloads_total",
                "Readings of rules and keys while running, by result.",
                &["result"],
            ),
            revocations: new.gauge("revocations", "Revocations that hold."),
            channels: new.gauge("channels", "Joined channels."),
            joins: new.counters(
                "joins_total",
                "Joins answered, by result and code.",
                &["result", "code"],
            ),
            join_seconds: new.histogram("join_seconds", "From a join's frame to its reply."),
            channels_ended: new.counters(
                "channels_ended_total",
                "Joined channels that ended, by reason.",
                &["reason"],
            ),
            frames_in: frames.with_label_values(&["in"]),
            frames_out: frames.with_label_values(&["out"]),
            bytes_in: bytes.with_label_values(&["in"]),
            bytes_out: bytes.with_label_values(&["out"]),
            malformed: new.counters(
                "malformed_total",
                "Frames that are not messages, by reason.",
                &["reason"],
            ),
            dropped: new.counters(
                "dropped_total",
                "Messages understood and dropped, by reason.",
                &["reason"],
            ),
            tokens: new.counters("tokens_total", "Token verifications, by result.", &["result"]),
            tokens_accepted: new.counters(
                "tokens_accepted_total",
                "Tokens found genuine, by key and algorithm.",
                &["key", "algorithm"],
            ),
            token_seconds: new.histogram_of(
                "token_seconds",
                "One verification of a token.",
                &COMPUTING_BUCKETS,
            ),
            token_expiries: new.counter("token_expiries_total", "Tokens that expired on open channels."),
            token_refreshes: new.counters(
                "token_refreshes_total",
                "Tokens sent for channels that are joined, by result.",
                &["result"],
            ),
            jwks_read: new.times(
                "jwks_last_success_timestamp_seconds",
                "When the key set was last read, by origin; 0 if never.",
                &["origin"],
            ),
            jwks_keys: new.gauges("jwks_keys", "Keys that can be used, by origin.", &["origin"]),
            jwks_keys_unusable: new.counters(
                "jwks_keys_unusable_total",
                "Keys of documents that are left out, by reason.",
                &["reason"],
            ),
            jwks_failures: new.counters(
                "jwks_failures_total",
                "Key sets that could not be had, by origin and kind.",
                &["origin", "kind"],
            ),
            notifications: new.counters(
                "notifications_total",
                "Notifications received from Postgres, by source and outcome.",
                &["source", "outcome"],
            ),
            notification_bytes: new.histogram_of(
                "notification_bytes",
                "Payload bytes of a notification.",
                &PAYLOAD_BUCKETS,
            ),
            commit_to_received: new.histogram(
                "commit_to_received_seconds",
                "From the stamp in a notification's payload to its arrival here.",
            ),
            commit_to_write_at_once: commit_to_write.with_label_values(&["at_once"]),
            commit_to_write_merged: commit_to_write.with_label_values(&["merged"]),
            invalidations_pending: new.gauge("invalidations_pending", "Invalidations that wait for their window."),
            events_live: new.gauge("events_live", "Events that somebody has joined, or that are listened to."),
            events_muted: new.gauge("events_muted", "Events that are muted."),
            events_never_published: new.gauge(
                "events_never_published",
                "Events with viewers that nothing was ever published for.",
            ),
            published_without_viewer: new.counter(
                "published_without_viewer_total",
                "Changes of events that nobody here has joined.",
            ),
            event_viewers: new.gauges(
                "event_viewers",
                "Channels of an event, of the busiest ones and of all others.",
                &["eid"],
            ),
            event_notifications: new.counters(
                "event_notifications_total",
                "Invalidations that came for an event, from wherever.",
                &["eid"],
            ),
            event_deliveries: new.counters(
                "event_deliveries_total",
                "Frames put into outboxes by invalidations of a whole event.",
                &["eid"],
            ),
            event_merged: new.counters(
                "event_merged_total",
                "Invalidations of an event that left as part of another.",
                &["eid"],
            ),
            event_last_notification: new.times(
                "event_last_notification_timestamp_seconds",
                "When an invalidation last came for one of the busiest events; 0 if never.",
                &["eid"],
            ),
            conflations: new.counter(
                "conflations_total",
                "Backlogs of slow clients that one merged invalidation has replaced.",
            ),
            canary_seconds: new
                .histogram("canary_seconds", "From a canary's departure to its arrival."),
            canary_last: new
                .number("canary_last_arrival_timestamp_seconds", "When a canary last arrived."),
            canary_failures: new
                .counter("canary_failures_total", "Canaries that could not be sent."),
            history_unreadable: new.counter(
                "history_unreadable_total",
                "Questions to the history that the server refused to answer.",
            ),
            policy_seconds: new.histograms(
                "policy_seconds",
                "One question to the policies of a private channel, by action.",
                &["action"],
                &LATENCY_BUCKETS,
            ),
            policy_questions: new.counters(
                "policy_questions_total",
                "Questions to the policies of private channels, by action and result.",
                &["action", "result"],
            ),
            relay_link_up: new.gauge("relay_link_up", "1 while the listening session is up."),
            relay_reconnects: new.counters(
                "relay_reconnects_total",
                "Ends of listening sessions and failed attempts, by cause.",
                &["cause"],
            ),
            relay_gaps: new.registry.counter_by(
                "relay_gaps_total",
                ["cause"],
                "Times at which notifications may have been missed, by cause.",
            ),
            relay_gap_open: new.gauge(
                "relay_gap_open",
                "1 while notifications may have been missed and viewers are not caught up.",
            ),
            relay_last_notification: new.number(
                "relay_last_notification_timestamp_seconds",
                "When the last notification arrived.",
            ),
            relay_last_heartbeat: new.number(
                "relay_last_heartbeat_timestamp_seconds",
                "When the listening session last answered a heartbeat.",
            ),
            relay_listens: new.gauge("relay_listens", "Active LISTENs."),
            relay_listens_refused: new.counters(
                "relay_listens_refused_total",
                "Joined events that cannot be listened to, by reason.",
                &["reason"],
            ),
            database_triggers: new.gauges(
                "database_trigger_present",
                "1 where a trigger tells of the operation on the table, 0 where it is missing.",
                &["table", "operation"],
            ),
            database_drift: new.gauges(
                "database_function_drift",
                "1 where the database's function is missing or not this version's.",
                &["function"],
            ),
            database_migrations_pending: new.gauge(
                "database_migrations_pending",
                "Migrations of this version that the database lacks.",
            ),
            database_writes: new.counters(
                "database_writes_total",
                "Rows written to a table, as Postgres counts them.",
                &["table"],
            ),
            database_history_rows: new.counters(
                "database_history_rows_total",
                "Messages in the history, by the table that caused them.",
                &["table"],
            ),
            database_trigger_failures: new.counter(
                "database_trigger_failures_total",
                "Failures that triggers have recorded.",
            ),
            database_notify_queue: new.number(
                "database_notify_queue_ratio",
                "How full the server's queue of notifications is, from 0 to 1.",
            ),
            database_clock_offset: new.number(
                "database_clock_offset_seconds",
                "The database's clock less the gateway's, as heartbeats see it.",
            ),
            database_history_oldest: new.number(
                "database_history_oldest_timestamp_seconds",
                "When the oldest message in the history was written; 0 if there is none.",
            ),
            database_last_look: new.number(
                "database_last_look_timestamp_seconds",
                "When triggers, functions, tables and queue were last looked at; 0 if never.",
            ),
            database_look_failures: new.counter("database_look_failures_total", "Looks at the database that failed."),
            database_pool: new.gauges(
                "database_pool_connections",
                "Sessions of the pool, by state.",
                &["state"],
            ),
            database_pool_max: new.gauge("database_pool_max", "Sessions that the pool may have."),
            tokio_workers: new.gauge("tokio_workers", "Threads that run tasks."),
            tokio_tasks: new.gauge("tokio_tasks", "Tasks that have not ended."),
            tokio_global_queue: new.gauge(
                "tokio_global_queue_tasks",
                "Tasks that are ready and that no worker has taken yet.",
            ),
            tokio_busy: new.seconds("tokio_busy_seconds_total", "Time that workers were busy, of all of them."),
            registry: new.registry,
        };
        metrics.start_at_zero();
        metrics
    }

    /// Counts a verification, which found out nothing if there was no token.
    pub(crate) fn count_token(&self, result: &Result<Arc<Token>, TokenError>) {
        let label = result.as_ref().map_or_else(TokenError::kind, |_| "ok");
        self.tokens.with_label_values(&[label]).inc();
        if let Ok(token) = result {
            self.tokens_accepted.with_label_values(&token.verified_by.labels()).inc();
        }
    }

    /// Measures a write that has ended, of what was committed then.
    pub(crate) fn count_write(&self, committed: Committed) {
        let took = match committed.departure {
            Departure::AtOnce => &self.commit_to_write_at_once,
            Departure::Merged => &self.commit_to_write_merged,
        };
        took.observe(committed.at.elapsed().as_secs_f64());
    }

    /// Counts what has come for an event, or for [`OTHER_EVENTS`], and what has become of it.
    pub(crate) fn count_event(&self, eid: &str, tally: Tally) {
        self.event_notifications.with_label_values(&[eid]).inc_by(tally.notifications);
        self.event_deliveries.with_label_values(&[eid]).inc_by(tally.deliveries);
        self.event_merged.with_label_values(&[eid]).inc_by(tally.merged);
    }

    /// Shows one of the busiest events, if it was not shown before with counters at zero.
    pub(crate) fn show_event(&self, eid: &str, viewers: usize, last_notification: f64) {
        self.count_event(eid, Tally::default());
        self.show_viewers(eid, viewers);
        self.event_last_notification.with_label_values(&[eid]).set(last_notification);
    }

    /// Shows how many viewers an event, or [`OTHER_EVENTS`], has.
    pub(crate) fn show_viewers(&self, eid: &str, viewers: usize) {
        let viewers = i64::try_from(viewers).unwrap_or(i64::MAX);
        self.event_viewers.with_label_values(&[eid]).set(viewers);
    }

    /// Shows an event no longer.
    pub(crate) fn forget_event(&self, eid: &str) {
        // It fails for what is not shown.
        let _ = self.event_viewers.remove_label_values(&[eid]);
        let _ = self.event_last_notification.remove_label_values(&[eid]);
        for counter in [&self.event_notifications, &self.event_deliveries, &self.event_merged] {
            let _ = counter.remove_label_values(&[eid]);
        }
    }

    /// Counts up to what all workers have been busy since the runtime began.
    pub(crate) fn show_busy(&self, busy: Duration) {
        self.tokio_busy.inc_by((busy.as_secs_f64() - self.tokio_busy.get()).max(0.0));
    }

    /// Counts a message that is dropped.
    pub(crate) fn count_dropped(&self, reason: Dropped) {
        self.dropped.with_label_values(&[reason.kind()]).inc();
    }

    /// Shows the pool's sessions: of so many so many are idle.
    pub(crate) fn show_pool(&self, size: u32, idle: usize) {
        let idle = i64::try_from(idle).unwrap_or(i64::MAX);
        self.database_pool.with_label_values(&["idle"]).set(idle);
        // The two are read one after the other.
        self.database_pool.with_label_values(&["used"]).set((i64::from(size) - idle).max(0));
    }

    /// The registry in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        self.registry.render()
    }

    fn start_at_zero(&self) {
        self.start_clients_at_zero();
        self.start_database_at_zero();
    }

    /// What clients do and are told.
    fn start_clients_at_zero(&self) {
        for result in ["ok", "refused"] {
            self.handshake_seconds.with_label_values(&[result]);
            self.token_refreshes.with_label_values(&[result]);
        }
        for timing in ["on_time", "late"] {
            self.heartbeats.with_label_values(&[timing]);
        }
        for question in Question::ALL {
            self.policy_seconds.with_label_values(&[question.kind()]);
            for result in AuthorizeError::KINDS.into_iter().chain(["allowed", "denied"]) {
                self.policy_questions.with_label_values(&[question.kind(), result]);
            }
        }
        for generation in Generation::ALL {
            self.client_versions.with_label_values(&[generation.kind()]);
        }
        for route in Route::ALL {
            for status in route.statuses() {
                self.http_requests.with_label_values(&[route.kind(), status.as_str()]);
            }
        }
        for reason in EndReason::ALL {
            self.channels_ended.with_label_values(&[reason.kind()]);
        }
        for reason in RefusedUpgrade::ALL {
            self.connections_refused.with_label_values(&[reason.kind()]);
        }
        for reason in CloseReason::all() {
            self.connections_closed.with_label_values(&[reason.kind(), reason.code_label()]);
        }
        for result in ["ok", "withheld"] {
            self.joins.with_label_values(&[result, ""]);
        }
        for code in ErrorCode::ALL {
            self.joins.with_label_values(&["error", code.as_str()]);
        }
        for result in ReloadError::KINDS.into_iter().chain(["ok"]) {
            self.reloads.with_label_values(&[result]);
        }
        for reason in Malformed::ALL {
            self.malformed.with_label_values(&[reason.kind()]);
        }
        for reason in Dropped::ALL {
            self.dropped.with_label_values(&[reason.kind()]);
        }
        for result in TokenError::KINDS.into_iter().chain(["ok"]) {
            self.tokens.with_label_values(&[result]);
        }
        for verified_by in VerifiedBy::all() {
            self.tokens_accepted.with_label_values(&verified_by.labels());
        }
        for origin in Origin::ALL {
            self.jwks_read.with_label_values(&[origin.kind()]);
            self.jwks_keys.with_label_values(&[origin.kind()]);
            for kind in JwksError::kinds(origin) {
                self.jwks_failures.with_label_values(&[origin.kind(), kind]);
            }
        }
        for reason in Unusable::ALL {
            self.jwks_keys_unusable.with_label_values(&[reason.kind()]);
        }
    }

    /// What the database sends, and what becomes of it.
    fn start_database_at_zero(&self) {
        for state in ["idle", "used"] {
            self.database_pool.with_label_values(&[state]);
        }
        for table in TRIGGERS.map(|it| it.table) {
            self.database_writes.with_label_values(&[table]);
            self.database_history_rows.with_label_values(&[table]);
        }
        for origin in [survey::MANUAL, survey::OTHER] {
            self.database_history_rows.with_label_values(&[origin]);
        }
        for outcome in Outcome::ALL {
            for source in outcome.sources() {
                self.notifications.with_label_values(&[source, outcome.kind()]);
            }
        }
        self.count_event(OTHER_EVENTS, Tally::default());
        self.show_viewers(OTHER_EVENTS, 0);
        for cause in LinkError::KINDS {
            self.relay_reconnects.with_label_values(&[cause]);
        }
        for reason in ["full", "too_long"] {
            self.relay_listens_refused.with_label_values(&[reason]);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// A joined channel, which is counted while it is open and when it ends.
#[derive(Debug)]
pub(crate) struct OpenChannel {
    _open: Counted,
    ended: IntCounterVec,
    /// Why it ends, if that is not its connection's end.
    pub(crate) ends_for: EndReason,
}

impl OpenChannel {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            _open: Counted::new(&metrics.channels),
            ended: metrics.channels_ended.clone(),
            ends_for: EndReason::Connection,
        }
    }
}

impl Drop for OpenChannel {
    fn drop(&mut self) {
        self.ended.with_label_values(&[self.ends_for.kind()]).inc();
    }
}

/// Something that a gauge counts while it exists.
#[derive(Debug)]
pub(crate) struct Counted(IntGauge);

impl Counted {
    pub(crate) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Makes and registers metrics under the prefix.
struct Maker {
    registry: Registry,
}

#[expect(clippy::expect_used, reason = "names are literals of this file; a test makes them all")]
impl Maker {
    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(name, help).namespace("tidegate")
    }

    fn register<M: prometheus::core::Collector + Clone + 'static>(&self, metric: M) -> M {
        self.registry.register(metric)
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(Self::opts(name, help)).expect("names are valid"))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Self::opts(name, help), labels).expect("names are valid"))
    }

    fn seconds(&self, name: &str, help: &str) -> Counter {
        self.register(Counter::with_opts(Self::opts(name, help)).expect("names are valid"))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(Self::opts(name, help)).expect("names are valid"))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Self::opts(name, help), labels).expect("names are valid"))
    }

    fn number(&self, name: &str, help: &str) -> GenericGauge<AtomicF64> {
        self.register(GenericGauge::with_opts(Self::opts(name, help)).expect("names are valid"))
    }

    fn times(&self, name: &str, help: &str, labels: &[&str]) -> GenericGaugeVec<AtomicF64> {
        self.register(
            GenericGaugeVec::new(Self::opts(name, help), labels).expect("names are valid"),
        )
    }

    fn histogram(&self, name: &str, help: &str) -> Histogram {
        self.histogram_of(name, help, &LATENCY_BUCKETS)
    }

    fn histogram_of(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::from(Self::opts(name, help)).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts).expect("names are valid"))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let opts = HistogramOpts::from(Self::opts(name, help)).buckets(buckets.to_vec());
        self.register(HistogramVec::new(opts, labels).expect("names are valid"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_the_prefix_or_is_the_process() {
        let text = String::from_utf8(Metrics::new().render()).unwrap();
        let names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        assert!(names.len() > 25, "{names:?}");
        for name in names {
            assert!(name.starts_with("tidegate_") || name.starts_with("process_"), "{name}");
        }
    }
}
