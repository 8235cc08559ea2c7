//! What met a limit, and how many addresses are remembered.

use strum::VariantArray;

use crate::telemetry::metrics::{CounterBy, Gauge, Label, Registry};

/// A limit that was met, and its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray)]
pub(crate) enum Limited {
    /// One more socket of an address.
    AddressConnections,
    /// One more upgrade of an address.
    AddressHandshakes,
    /// A token that is not known to be right, of an address with too many wrong ones.
    AddressFailures,
    /// An address too many to be remembered.
    AddressForgotten,
    /// A join of a topic without a rule.
    Joins,
    /// Broadcasts of a request.
    BroadcastsRefused,
    /// A broadcast to a rule's topic.
    BroadcastsDropped,
    /// A broadcast to another topic, which has ended its sender's channel.
    BroadcastsClosed,
    /// A socket that joins too fast.
    SocketJoins,
    /// A socket that sends too many frames.
    SocketMessages,
    /// A socket that sends too many bytes.
    SocketBytes,
}

/// `limiter` and `effect`.
impl Label<2> for Limited {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        Self::VARIANTS.iter().map(Self::values)
    }

    fn values(&self) -> [&'static str; 2] {
        match self {
            Self::AddressConnections => ["address_connections", "refused"],
            Self::AddressHandshakes => ["address_handshakes", "refused"],
            Self::AddressFailures => ["address_failures", "refused"],
            Self::AddressForgotten => ["addresses", "forgotten"],
            Self::Joins => ["joins", "refused"],
            Self::BroadcastsRefused => ["broadcasts", "refused"],
            Self::BroadcastsDropped => ["broadcasts", "dropped"],
            Self::BroadcastsClosed => ["broadcasts", "closed"],
            Self::SocketJoins => ["socket_joins", "delayed"],
            Self::SocketMessages => ["socket_messages", "delayed"],
            Self::SocketBytes => ["socket_bytes", "delayed"],
        }
    }
}

/// The room's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// What met a limit.
    pub(crate) limited: CounterBy<Limited, 2>,
    /// Addresses that are remembered, at the time of the scrape.
    pub(crate) addresses: Gauge,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            limited: registry.counter_by(
                "limited_total",
                ["limiter", "effect"],
                "What met a limit, by limiter and effect.",
            ),
            addresses: registry.gauge("addresses", "Addresses of clients that are remembered."),
        }
    }
}
