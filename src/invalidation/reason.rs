//! Why an invalidation is sent, why somebody is caught up, and what a catch-up is made from.
//!
//! Invariant: each is a closed set, whose names are labels of metrics; those of causes also stand
//! in payloads.

use strum::VariantArray as _;

use crate::telemetry::metrics::Label;

/// Why an invalidation was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum SendReason {
    /// Nothing had been sent within the window.
    Leading,
    /// The window, or a mute, has ended.
    Window,
    /// All viewers may have missed something.
    Gap,
    /// One client has joined.
    CatchUp,
    /// One client that was just caught up would otherwise forget the catch-up.
    Repeat,
}

impl SendReason {
    /// The label of the metric.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Whether a catch-up names what was missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Coverage {
    /// It names what has changed, as heard here or read from the history.
    Exact,
    /// It names every endpoint, because what has changed is not known.
    Complete,
}

impl Coverage {
    /// The label of the metric.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// How the session that listens to the database was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum LinkLoss {
    /// The URL cannot be read.
    Url,
    /// No connection was made, or the server did not answer it in time.
    Connect,
    /// The server is a standby, which refuses LISTEN.
    InRecovery,
    /// A statement failed.
    Statement,
    /// A statement was not answered in time.
    Silent,
    /// The server closed the connection.
    Closed,
    /// The connection broke.
    Broken,
    /// A notification to this gateway itself was committed and did not arrive.
    CanaryLost,
}

impl LinkLoss {
    /// The label of the metric, and the payload's `cause`.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Why all viewers may have missed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GapCause {
    /// The first session of this process.
    Start,
    /// A session after one that was lost like this.
    Link(LinkLoss),
    /// Another server than before, or the same one restored.
    Restored,
    /// The notification queue was too full to notify.
    QueueFull,
    /// A trigger has recorded a failure.
    TriggerFailure,
}

impl GapCause {
    /// Every cause.
    pub fn all() -> impl Iterator<Item = Self> {
        let links = LinkLoss::VARIANTS.iter().copied().map(Self::Link);
        [Self::Start, Self::Restored, Self::QueueFull, Self::TriggerFailure]
            .into_iter()
            .chain(links)
    }

    /// The label of the metric, and the payload's `cause`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Link(loss) => loss.label(),
            Self::Restored => "restored",
            Self::QueueFull => "queue_full",
            Self::TriggerFailure => "trigger_failure",
        }
    }
}

impl Label for GapCause {
    fn all() -> impl Iterator<Item = [&'static str; 1]> {
        Self::all().map(|cause| [cause.label()])
    }

    fn values(&self) -> [&'static str; 1] {
        [self.label()]
    }
}

/// Why somebody was caught up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CatchUpCause {
    /// A page that was just loaded.
    Fresh,
    /// A socket that has held the topic before.
    Held,
    /// A client whose earlier socket is known.
    Returned,
    /// A client of which nothing is known.
    Unknown,
    /// A client that has fallen too far behind.
    SlowClient,
    /// A join before the event's LISTEN was active.
    LateListen,
    /// All viewers may have missed something.
    Gap(GapCause),
    /// An operator asked for it.
    Operator,
}

impl CatchUpCause {
    /// Every cause.
    pub fn all() -> impl Iterator<Item = Self> {
        let others = [
            Self::Fresh,
            Self::Held,
            Self::Returned,
            Self::Unknown,
            Self::SlowClient,
            Self::LateListen,
            Self::Operator,
        ];
        others.into_iter().chain(GapCause::all().map(Self::Gap))
    }

    /// The label of the metric, and the payload's `cause`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Held => "held",
            Self::Returned => "returned",
            Self::Unknown => "unknown",
            Self::SlowClient => "slow_client",
            Self::LateListen => "late_listen",
            Self::Gap(cause) => cause.label(),
            Self::Operator => "operator",
        }
    }
}

impl From<GapCause> for CatchUpCause {
    fn from(cause: GapCause) -> Self {
        Self::Gap(cause)
    }
}

/// Catch-ups are counted by cause and coverage.
impl Label<2> for (CatchUpCause, Coverage) {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        CatchUpCause::all().flat_map(|cause| {
            Coverage::VARIANTS.iter().map(move |coverage| [cause.label(), coverage.label()])
        })
    }

    fn values(&self) -> [&'static str; 2] {
        [self.0.label(), self.1.label()]
    }
}
