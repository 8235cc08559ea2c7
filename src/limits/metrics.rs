//! What met a limit, and how many addresses and shares are remembered.

use strum::VariantArray;

use crate::telemetry::metrics::{CounterBy, Gauge, Label, Registry};

/// A limit that was met, and its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limited {
    /// One more socket of an address.
    AddressConnections,
    /// One more upgrade of an address.
    AddressHandshakes,
    /// A token that is neither known to be right nor a JWT, of an address with too many wrong ones.
    AddressFailures,
    /// An address too many to be remembered.
    AddressForgotten,
    /// A request to broadcast, of an address.
    AddressRequests,
    /// A body that has not come in time.
    Bodies,
    /// A REST batch with too many messages.
    BatchMessages,
    /// A join of a topic without a rule, beyond the client's share.
    ClientJoins,
    /// A join of a topic without a rule, beyond the project's rate.
    Joins,
    /// Broadcasts.
    Broadcasts(Rate, Effect),
    /// A socket that joins too fast.
    SocketJoins,
    /// A socket that sends too many frames.
    SocketMessages,
    /// A socket that sends too many bytes.
    SocketBytes,
}

/// A rate of broadcasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Rate {
    /// A client's share of the project's broadcasts.
    ClientBroadcasts,
    /// A client's share of the bytes of their payloads.
    ClientBroadcastBytes,
    /// The project's broadcasts.
    Broadcasts,
    /// The bytes of their payloads.
    BroadcastBytes,
    /// Broadcasts of servers to the topics of rules.
    ServerBroadcasts,
}

/// What becomes of broadcasts that go too fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Effect {
    /// Those of a request are refused.
    Refused,
    /// Those of a channel are dropped.
    Dropped,
    /// The channel ends.
    Closed,
}

impl Limited {
    /// All but broadcasts.
    const OTHERS: [Self; 12] = [
        Self::AddressConnections,
        Self::AddressHandshakes,
        Self::AddressFailures,
        Self::AddressForgotten,
        Self::AddressRequests,
        Self::Bodies,
        Self::BatchMessages,
        Self::ClientJoins,
        Self::Joins,
        Self::SocketJoins,
        Self::SocketMessages,
        Self::SocketBytes,
    ];
}

/// `limiter` and `effect`.
impl Label<2> for Limited {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        let effects = |rate| Effect::VARIANTS.iter().map(move |effect| (rate, *effect));
        let broadcasts = Rate::VARIANTS.iter().flat_map(move |rate| effects(*rate));
        // Only what one channel sends alone ends it.
        let broadcasts = broadcasts
            .filter(|(rate, effect)| *effect != Effect::Closed || *rate == Rate::ClientBroadcasts)
            .map(|(rate, effect)| Self::Broadcasts(rate, effect));
        Self::OTHERS.into_iter().chain(broadcasts).map(|limited| limited.values())
    }

    fn values(&self) -> [&'static str; 2] {
        match self {
            Self::AddressConnections => ["address_connections", "refused"],
            Self::AddressHandshakes => ["address_handshakes", "refused"],
            Self::AddressFailures => ["address_failures", "refused"],
            Self::AddressForgotten => ["addresses", "forgotten"],
            Self::AddressRequests => ["address_requests", "refused"],
            Self::Bodies => ["bodies", "refused"],
            Self::BatchMessages => ["batch_messages", "refused"],
            Self::ClientJoins => ["client_joins", "refused"],
            Self::Joins => ["joins", "refused"],
            Self::Broadcasts(rate, effect) => [(*rate).into(), (*effect).into()],
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
    /// Clients whose share of the project's rates is in use, at the time of the scrape.
    pub(crate) shares: Gauge,
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
            shares: registry
                .gauge("rate_shares", "Clients whose share of the project's rates is remembered."),
        }
    }
}
