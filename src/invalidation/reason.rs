//! Why invalidations are sent and clients are caught up, and how it is known what they have missed.

use strum::VariantArray as _;

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
    /// The first session of this process.
    Start,
    /// A session after one that ended for this reason.
    Link(LinkLoss),
    /// Another server than before, or the same one restored.
    Restored,
    /// The notification queue was too full to notify.
    QueueFull,
    /// A trigger has recorded a failure.
    TriggerFailure,
    /// An operator asked for it.
    Operator,
}

impl CatchUpCause {
    /// Every cause.
    pub fn all() -> impl Iterator<Item = Self> {
        let links = LinkLoss::VARIANTS.iter().copied().map(Self::Link);
        [
            Self::Fresh,
            Self::Held,
            Self::Returned,
            Self::Unknown,
            Self::SlowClient,
            Self::LateListen,
            Self::Start,
            Self::Restored,
            Self::QueueFull,
            Self::TriggerFailure,
            Self::Operator,
        ]
        .into_iter()
        .chain(links)
    }

    /// Those for which something may have been missed of every event: the gaps of the relay.
    pub fn gaps() -> impl Iterator<Item = Self> {
        let links = LinkLoss::VARIANTS.iter().copied().map(Self::Link);
        [Self::Start, Self::Restored, Self::QueueFull, Self::TriggerFailure]
            .into_iter()
            .chain(links)
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
            Self::Start => "start",
            Self::Link(loss) => loss.label(),
            Self::Restored => "restored",
            Self::QueueFull => "queue_full",
            Self::TriggerFailure => "trigger_failure",
            Self::Operator => "operator",
        }
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

/// How it is known what somebody has missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// From what was heard, or from the history.
    Exact,
    /// It is not: the complete list.
    Complete,
}

impl Coverage {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Exact, Self::Complete];

    /// The metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Complete => "complete",
        }
    }
}

/// Why an invalidation was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendReason {
    /// Nothing had been sent within the window.
    Leading,
    /// The window, or a mute, has ended.
    Window,
    /// Everybody may have missed something.
    Gap,
    /// One client has joined.
    CatchUp,
    /// One client that was just caught up would else forget it.
    Repeat,
}

impl SendReason {
    /// Every reason.
    pub const ALL: [Self; 5] =
        [Self::Leading, Self::Window, Self::Gap, Self::CatchUp, Self::Repeat];

    /// The metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Leading => "leading",
            Self::Window => "window",
            Self::Gap => "gap",
            Self::CatchUp => "catch_up",
            Self::Repeat => "repeat",
        }
    }
}
