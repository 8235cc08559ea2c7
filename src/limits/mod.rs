//! All inbound rates and caps, `governor` behind them: of the project, of an address, of a socket.
//!
//! Invariants: nothing here decides what anybody is told; a limiter that the settings switch off
//! costs nothing; time is the runtime's, which tests can pause; whatever is kept by address is
//! bounded and swept.

mod address;
mod addresses;
mod frames;
mod memory;
mod meter;
mod metrics;
mod origins;
mod rate;
mod settings;

use std::{num::NonZeroU32, sync::Arc};

use governor::clock::Clock;
use ipnet::IpNet;

pub use self::{
    address::Address,
    origins::Origin,
    settings::{NetworkSettings, Settings},
};
pub(crate) use self::{
    address::{client_ip, is_trusted},
    meter::{Metered, Metering, is_unfinished},
    metrics::Limited,
    rate::SWEEP_INTERVAL,
};
use self::{
    addresses::Addresses,
    metrics::Metrics,
    origins::Origins,
    rate::{PROJECT_BURST_SECONDS, limiter},
};
use crate::{
    clock::{Limiter, TokioClock},
    telemetry::metrics::{Registry, count},
};

/// Why broadcasts go too fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TooFast {
    /// The batch does not fit; a smaller one would.
    Batch,
    /// Not even one fits.
    One,
}

/// The limits of one server.
#[derive(Debug)]
pub(crate) struct Limits {
    metering: Arc<Metering>,
    /// Networks whose `X-Forwarded-For` is believed.
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// What each address has used up.
    pub(crate) addresses: Addresses,
    /// Which web pages may connect.
    pub(crate) origins: Origins,
    joins: Option<Limiter>,
    broadcasts: Option<Limiter>,
}

/// A socket of an address, which counts until this is dropped.
#[derive(Debug)]
pub(crate) struct AddressPermit {
    limits: Arc<Limits>,
    address: Address,
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        self.limits.addresses.leave(self.address);
    }
}

impl Limits {
    /// Creates the limits that the settings ask for.
    pub(crate) fn new(settings: Settings, network: NetworkSettings, registry: &Registry) -> Self {
        let metrics = Metrics::new(registry);
        let project = |per_second| limiter(per_second, PROJECT_BURST_SECONDS, 0);
        let forgotten = metrics.limited.of(Limited::AddressForgotten).clone();
        Self {
            trusted_proxies: network.trusted_proxies,
            addresses: Addresses::new(&settings, forgotten),
            origins: Origins::new(network.origins),
            joins: project(settings.joins_per_second_max),
            broadcasts: project(settings.broadcasts_per_second_max),
            metering: Arc::new(Metering { settings, metrics }),
        }
    }

    /// The settings, whose single bounds others enforce.
    pub(crate) fn settings(&self) -> &Settings {
        &self.metering.settings
    }

    /// What streams of clients are metered by.
    pub(crate) fn metering(&self) -> &Arc<Metering> {
        &self.metering
    }

    /// Counts a limit that was met.
    pub(crate) fn count(&self, limited: Limited) {
        self.metering.metrics.limited.of(limited).inc();
    }

    /// Shows how many addresses are remembered.
    pub(crate) fn show(&self) {
        self.metering.metrics.addresses.set(count(self.addresses.count()));
    }

    /// Counts a socket of the address until the permit is dropped.
    ///
    /// Returns `None`, and counts the refusal, if the address has as many sockets as it may.
    pub(crate) fn connect(self: &Arc<Self>, address: Address) -> Option<AddressPermit> {
        if !self.addresses.connect(address) {
            self.count(Limited::AddressConnections);
            return None;
        }
        Some(AddressPermit { limits: Arc::clone(self), address })
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::server::settings::Config;

    fn limits(set: impl FnOnce(&mut Config)) -> Limits {
        let mut config = Config::defaults();
        set(&mut config);
        Limits::new(config.limits, config.network, &Registry::new())
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
