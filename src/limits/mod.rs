//! All inbound rates and caps, `governor` behind them: of the project, of an address, of a socket.
//!
//! Invariants: nothing here decides what anybody is told; a limiter that the settings switch off
//! costs nothing; time is the runtime's, which tests can pause; whatever is kept by address is
//! bounded and swept.

mod addresses;
mod meter;
mod origins;

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use governor::{Quota, RateLimiter, clock::Clock};
use tokio::time::sleep;

pub use self::{addresses::Address, origins::Origin};
pub(crate) use self::{
    addresses::{Addresses, client_ip, is_trusted},
    meter::{Metered, is_unfinished},
    origins::Origins,
};
use crate::{
    clock::{Limiter, TokioClock},
    metrics::Metrics,
    server::{Services, settings::Config},
};

/// An address or a socket may use up at once what it is allowed in so many seconds.
const BURST_SECONDS: u32 = 10;
/// The project as a whole; the reference server takes its averages over so many.
const PROJECT_BURST_SECONDS: u32 = 60;
/// Between two sweeps. By then every burst has come back, so that nothing is forgotten by them.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// A limit that somebody has met, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
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

impl Limited {
    /// Every limit with every effect.
    pub const ALL: [Self; 11] = [
        Self::AddressConnections,
        Self::AddressHandshakes,
        Self::AddressFailures,
        Self::AddressForgotten,
        Self::Joins,
        Self::BroadcastsRefused,
        Self::BroadcastsDropped,
        Self::BroadcastsClosed,
        Self::SocketJoins,
        Self::SocketMessages,
        Self::SocketBytes,
    ];

    /// The metric's labels: limiter, effect.
    #[must_use]
    pub fn kinds(self) -> [&'static str; 2] {
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

/// Why broadcasts go too fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TooFast {
    /// So many do not fit; fewer would.
    Batch,
    /// Not even one fits.
    One,
}

/// The limits of one server.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Of each address.
    pub(crate) addresses: Addresses,
    /// Of browsers.
    pub(crate) origins: Origins,
    joins: Option<Limiter>,
    broadcasts: Option<Limiter>,
}

impl Limits {
    /// What the settings ask for.
    pub(crate) fn new(config: &Config, metrics: &Metrics) -> Self {
        let limits = &config.limits;
        Self {
            addresses: Addresses::new(limits, &metrics.limited),
            origins: Origins::new(config.network.origins.clone()),
            joins: limiter(limits.joins_per_second_max, PROJECT_BURST_SECONDS, 0),
            broadcasts: limiter(limits.broadcasts_per_second_max, PROJECT_BURST_SECONDS, 0),
        }
    }

    /// Counts a join; false if it goes too fast.
    pub(crate) fn join(&self) -> bool {
        self.joins.as_ref().is_none_or(|joins| joins.check().is_ok())
    }

    /// Counts broadcasts that came together, all of them or none.
    ///
    /// # Errors
    /// [`TooFast`]; none is counted then.
    pub(crate) fn broadcast(&self, count: usize) -> Result<(), TooFast> {
        let (Some(limiter), Ok(count)) = (&self.broadcasts, u32::try_from(count)) else {
            return if self.broadcasts.is_none() { Ok(()) } else { Err(TooFast::Batch) };
        };
        let Some(all) = NonZeroU32::new(count) else { return Ok(()) };
        match limiter.check_n(all) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(not_until)) => {
                // One fits so much earlier than all of them.
                let earlier = not_until.quota().replenish_interval() * (count - 1);
                let wait = not_until.wait_time_from(TokioClock.now());
                Err(if wait > earlier { TooFast::One } else { TooFast::Batch })
            }
            // More than would ever fit: as if it were the largest batch that may.
            Err(_more_than_a_burst) => Err(TooFast::Batch),
        }
    }
}

/// So many a second, and at once what comes in `burst_seconds`, `burst_min` at least; none if
/// there is no limit.
fn limiter(per_second: u32, burst_seconds: u32, burst_min: usize) -> Option<Limiter> {
    let rate = NonZeroU32::new(per_second)?;
    let burst_min = u32::try_from(burst_min).unwrap_or(u32::MAX);
    let burst = per_second.saturating_mul(burst_seconds).max(burst_min);
    let quota = Quota::per_second(rate).allow_burst(NonZeroU32::new(burst).unwrap_or(rate));
    Some(RateLimiter::direct_with_clock(quota, TokioClock))
}

/// Forgets until the server stops: addresses, and how far behind a client was.
pub(crate) async fn run(services: Arc<Services>) {
    let sweeping = async {
        loop {
            sleep(SWEEP_INTERVAL).await;
            services.limits.addresses.sweep();
            services.backlogs.turn();
        }
    };
    services.stopped.run_until_cancelled(sweeping).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(set: impl FnOnce(&mut Config)) -> Limits {
        let mut config = Config::defaults();
        set(&mut config);
        Limits::new(&config, &Metrics::new())
    }

    #[tokio::test(start_paused = true)]
    async fn sixty_seconds_worth_of_joins_pass_at_once_and_then_so_many_a_second() {
        let limits = limits(|config| config.limits.joins_per_second_max = 2);
        assert_eq!((0..200).filter(|_| limits.join()).count(), 120);
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!((0..200).filter(|_| limits.join()).count(), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_of_broadcasts_passes_whole_or_not_at_all() {
        let limits = limits(|config| config.limits.broadcasts_per_second_max = 1);
        assert_eq!(limits.broadcast(61), Err(TooFast::Batch), "more than will ever fit");
        assert_eq!(limits.broadcast(58), Ok(()));
        assert_eq!(limits.broadcast(3), Err(TooFast::Batch), "two would fit");
        assert_eq!(limits.broadcast(2), Ok(()));
        assert_eq!(limits.broadcast(1), Err(TooFast::One));
        assert_eq!(limits.broadcast(2), Err(TooFast::One));
        assert_eq!(limits.broadcast(0), Ok(()));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(limits.broadcast(2), Err(TooFast::Batch));
        assert_eq!(limits.broadcast(1), Ok(()));
    }

    #[test]
    fn zero_is_no_limit() {
        let limits = limits(|config| {
            config.limits.joins_per_second_max = 0;
            config.limits.broadcasts_per_second_max = 0;
        });
        assert!((0..10_000).all(|_| limits.join()));
        assert_eq!(limits.broadcast(usize::MAX), Ok(()));
    }
}
