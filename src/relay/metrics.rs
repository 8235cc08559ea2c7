//! The database link, notifications, gaps and canaries.

use strum::VariantArray;

use super::{link::LinkError, places::NoPlace};
use crate::{
    invalidation::GapCause,
    telemetry::metrics::{
        Counter, CounterBy, Gauge, GaugeBy, Histogram, Label, Named, NumberGauge, Registry,
    },
};

/// Payloads of notifications, of which Postgres takes less than 8,000 bytes.
const PAYLOAD_BUCKETS: [f64; 8] = [64.0, 128.0, 256.0, 512.0, 1_024.0, 2_048.0, 4_096.0, 8_000.0];

/// What became of a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Outcome {
    /// At least one client was sent it.
    Delivered,
    /// It waits for its event's next message.
    Offered,
    /// Nobody here has joined the event.
    NoViewer,
    /// Its payload is not JSON.
    Malformed,
    /// Its payload is JSON, but not an object.
    NotObject,
    /// Its payload is above the limit.
    Oversized,
    /// Nobody has asked for its channel.
    UnknownChannel,
    /// A monitoring notification: noted, not relayed.
    Noted,
}

/// What a notification's channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum ChannelKind {
    /// An event that somebody has joined.
    Event,
    /// The monitoring of all events.
    Stats,
    /// Revocations that have changed.
    Revocations,
    /// A channel that nobody has asked for.
    Other,
}

impl Outcome {
    /// The outcome as logs name it.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Notifications of a channel, and what became of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handled(pub(super) ChannelKind, pub(super) Outcome);

impl Handled {
    /// The channels whose notifications can come to this.
    fn channels(outcome: Outcome) -> &'static [ChannelKind] {
        match outcome {
            Outcome::Delivered | Outcome::Offered | Outcome::NoViewer => &[ChannelKind::Event],
            Outcome::Malformed | Outcome::NotObject | Outcome::Oversized => {
                &[ChannelKind::Event, ChannelKind::Stats]
            }
            Outcome::UnknownChannel => &[ChannelKind::Other],
            Outcome::Noted => &[ChannelKind::Stats, ChannelKind::Revocations],
        }
    }
}

/// `source` and `outcome`.
impl Label<2> for Handled {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        Outcome::VARIANTS.iter().flat_map(|outcome| {
            Self::channels(*outcome).iter().map(|channel| Self(*channel, *outcome).values())
        })
    }

    fn values(&self) -> [&'static str; 2] {
        [self.0.into(), self.1.into()]
    }
}

/// The room's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Notifications received.
    pub(super) notifications: CounterBy<Handled, 2>,
    /// Payload bytes of a notification.
    pub(super) notification_bytes: Histogram,
    /// From the stamp in a notification's payload, by the database's clock, to its arrival.
    pub(super) commit_to_received: Histogram,
    /// Notifications that name an event without a viewer here.
    pub(super) published_without_viewer: Counter,
    /// From a canary's departure to its arrival.
    pub(super) canary_seconds: Histogram,
    /// Canaries that could not be sent.
    pub(super) canary_failures: Counter,
    /// Questions to the history that the server refused.
    pub(super) history_unreadable: Counter,
    /// What ended sessions and attempts.
    pub(super) reconnects: CounterBy<Named<LinkError>>,
    /// Times at which something may have been missed.
    gaps: CounterBy<GapCause>,
    /// 1 from a gap's beginning until its catch-up has been handed over.
    gap_open: Gauge,
    /// When the last notification arrived, seconds since 1970.
    pub(super) last_notification: NumberGauge,
    /// When the session last answered a heartbeat, seconds since 1970.
    pub(super) last_heartbeat: NumberGauge,
    /// LISTENs that are active.
    pub(super) listens: Gauge,
    /// Times at which a joined event found no LISTEN, or lost its own.
    pub(crate) listens_refused: CounterBy<NoPlace>,
    /// Channels of viewers whose event is not listened to.
    pub(crate) waiting: GaugeBy<NoPlace>,
    /// Events that the database knows.
    pub(super) known_events: Gauge,
    /// Mirrors of the link's status.
    pub(super) link_up: Gauge,
    pub(super) canary_last: NumberGauge,
    pub(super) clock_offset: NumberGauge,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            notifications: registry.counter_by(
                "notifications_total",
                ["source", "outcome"],
                "Notifications received from Postgres, by source and outcome.",
            ),
            notification_bytes: registry.histogram(
                "notification_bytes",
                "Payload bytes of a notification.",
                &PAYLOAD_BUCKETS,
            ),
            commit_to_received: registry.latency(
                "commit_to_received_seconds",
                "From the stamp in a notification's payload to its arrival here.",
            ),
            published_without_viewer: registry.counter(
                "published_without_viewer_total",
                "Changes of events that nobody here has joined.",
            ),
            canary_seconds: registry
                .latency("canary_seconds", "From a canary's departure to its arrival."),
            canary_failures: registry
                .counter("canary_failures_total", "Canaries that could not be sent."),
            history_unreadable: registry.counter(
                "history_unreadable_total",
                "Questions to the history that the server refused to answer.",
            ),
            reconnects: registry.counter_by(
                "relay_reconnects_total",
                ["cause"],
                "Ends of listening sessions and failed attempts, by cause.",
            ),
            gaps: registry.counter_by(
                "relay_gaps_total",
                ["cause"],
                "Times at which notifications may have been missed, by cause.",
            ),
            gap_open: registry.gauge(
                "relay_gap_open",
                "1 while notifications may have been missed and viewers are not caught up.",
            ),
            last_notification: registry.number(
                "relay_last_notification_timestamp_seconds",
                "When the last notification arrived.",
            ),
            last_heartbeat: registry.number(
                "relay_last_heartbeat_timestamp_seconds",
                "When the listening session last answered a heartbeat.",
            ),
            listens: registry.gauge("relay_listens", "Active LISTENs."),
            listens_refused: registry.counter_by(
                "relay_listens_refused_total",
                ["reason"],
                "Times at which a joined event found no LISTEN, or lost its own, by reason.",
            ),
            waiting: registry.gauge_by(
                "relay_viewers_unheard",
                ["reason"],
                "Channels of viewers whose event is not listened to, by reason.",
            ),
            known_events: registry
                .gauge("relay_known_events", "Events that the database is known to have."),
            link_up: registry.gauge("relay_link_up", "1 while the listening session is up."),
            canary_last: registry
                .number("canary_last_arrival_timestamp_seconds", "When a canary last arrived."),
            clock_offset: registry.number(
                "database_clock_offset_seconds",
                "The database's clock less the gateway's, as heartbeats see it.",
            ),
        }
    }

    /// Notes that something may be missed from here on, until [`Self::gap_ends`].
    pub(super) fn gap_begins(&self, cause: GapCause) {
        self.gaps.of(cause).inc();
        self.gap_open.set(1);
    }

    /// Notes that viewers have been told what was missed.
    pub(super) fn gap_ends(&self) {
        self.gap_open.set(0);
    }
}
