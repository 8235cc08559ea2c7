//! All inbound rates and caps: of the project, of a client's share of it, of an address, of a
//! socket.
//!
//! Invariants: nothing here decides what anybody is told; a limiter that the settings switch off
//! costs nothing; time is the runtime's, which tests can pause; whatever is kept by address is
//! bounded and swept.

mod address;
mod addresses;
mod bucket;
mod frames;
mod memory;
mod meter;
mod metrics;
mod origins;
mod places;
mod rate;
mod settings;
mod shares;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;

pub use self::{
    address::Address,
    origins::Origin,
    settings::{NetworkSettings, Settings},
};
pub(crate) use self::{
    address::{client_ip, is_trusted},
    bucket::{Bucket, TooFast},
    meter::{Metered, Metering, is_unfinished},
    metrics::{Effect, Limited, Rate},
    places::{Kept, Place, Places},
    rate::SWEEP_INTERVAL,
    shares::{Amount, Broadcasts, Exceeded, Share},
};
use self::{addresses::Addresses, metrics::Metrics, origins::Origins, shares::Shares};
use crate::telemetry::{
    audit::{Caller, Subject},
    metrics::{Registry, count},
};

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
    shares: Shares,
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
        let forgotten = metrics.limited.of(Limited::AddressForgotten).clone();
        Self {
            trusted_proxies: network.trusted_proxies,
            addresses: Addresses::new(&settings, forgotten),
            origins: Origins::new(network.origins),
            shares: Shares::new(&settings),
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

    /// Returns the address whose share of places a connection of `peer` counts for: none for a trusted
    /// proxy and for `localhost`, where a proxy of this machine comes from, which stand for many.
    pub(crate) fn share_of(&self, peer: IpAddr) -> Option<Address> {
        let peer = peer.to_canonical();
        let is_localhost = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let stands_for_many =
            is_localhost.contains(&peer) || is_trusted(peer, &self.trusted_proxies);
        (!stands_for_many).then(|| peer.into())
    }

    /// Shows how many addresses and shares are remembered.
    pub(crate) fn show(&self) {
        let metrics = &self.metering.metrics;
        metrics.addresses.set(count(self.addresses.count()));
        metrics.shares.set(count(self.shares.count()));
    }

    /// Forgets whoever has everything back.
    pub(crate) fn sweep(&self) {
        self.addresses.sweep();
        self.shares.sweep();
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

    /// The share of the holder of a verified token.
    pub(crate) fn share(&self, caller: Caller, subject: Subject<'_>) -> Share {
        self.shares.of(caller.address().into(), subject)
    }

    /// Counts a request to broadcast; false, and counted, if its address sends them too fast.
    #[must_use]
    pub(crate) fn request(&self, caller: Caller) -> bool {
        let is_admitted = self.shares.request(caller.address().into());
        if !is_admitted {
            self.count(Limited::AddressRequests);
        }
        is_admitted
    }

    /// Counts a join of a topic without a rule; false, and counted, if it goes too fast.
    #[must_use]
    pub(crate) fn join(&self, share: Share) -> bool {
        self.shares.join(share).map_err(|limited| self.count(limited)).is_ok()
    }

    /// Takes broadcasts that came together, all of them or none.
    ///
    /// # Errors
    /// The first rate that is [`Exceeded`], which is counted.
    pub(crate) fn broadcast(
        &self,
        share: Share,
        all: &Broadcasts,
        effect: Effect,
    ) -> Result<(), Exceeded> {
        let taken = self.shares.broadcast(share, all);
        taken.inspect_err(|exceeded| self.count(Limited::Broadcasts(exceeded.rate, effect)))
    }

    /// Takes a broadcast that the policies have allowed and that its sender has paid for.
    ///
    /// # Errors
    /// The first rate that is [`Exceeded`], which is counted.
    pub(crate) fn send(&self, one: Amount, effect: Effect) -> Result<(), Exceeded> {
        let taken = self.shares.send(one);
        taken.inspect_err(|exceeded| self.count(Limited::Broadcasts(exceeded.rate, effect)))
    }

    /// Takes a broadcast of what one channel may send; false, and counted, if the channel alone
    /// exceeds its client's share.
    #[must_use]
    pub(crate) fn channel(&self, sent: &mut Bucket) -> bool {
        let is_admitted = self.shares.channel(sent).is_ok();
        if !is_admitted {
            self.count(Limited::Broadcasts(Rate::ClientBroadcasts, Effect::Closed));
        }
        is_admitted
    }

    /// Whether nothing that the client broadcasts by a request can be sent; then it is counted.
    #[must_use]
    pub(crate) fn is_spent(&self, share: Share) -> bool {
        let spent = self.shares.spent(share);
        if let Some(rate) = spent {
            self.count(Limited::Broadcasts(rate, Effect::Refused));
        }
        spent.is_some()
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

    #[test]
    fn whoever_stands_for_many_has_no_share_of_places() {
        let proxies = vec!["10.0.0.0/8".parse().unwrap()];
        let limits = limits(|config| config.network.trusted_proxies = proxies);
        let has_share = |peer: &str| limits.share_of(peer.parse().unwrap()).is_some();
        let many = ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.1.2.3"];
        assert_eq!(many.map(has_share), [false; 4]);
        assert_eq!(["127.0.0.2", "192.0.2.1", "2001:db8::1"].map(has_share), [true; 3]);
    }

    /// A person, or without a number the holder of the public key at this address.
    fn share(limits: &Limits, address: u8, person: Option<&str>) -> Share {
        let caller = Caller::at([192, 0, 2, address].into());
        let role = if person.is_some() { "authenticated" } else { "anon" };
        limits.share(caller, Subject { role, sub: person })
    }

    fn servers(limits: &Limits) -> Share {
        let subject = Subject { role: "service_role", sub: None };
        limits.share(Caller::at([192, 0, 2, 1].into()), subject)
    }

    fn amount(count: usize, bytes: usize) -> Amount {
        let mut amount = Amount::default();
        for n in 0..count {
            amount += Amount::one(if n == 0 { bytes } else { 0 });
        }
        amount
    }

    fn ordinary(count: usize) -> Broadcasts {
        Broadcasts { ordinary: amount(count, 0), ..Broadcasts::default() }
    }

    /// What became of broadcasts: the rate that they exceed, and whether fewer would not.
    fn take(limits: &Limits, share: Share, all: &Broadcasts) -> Result<(), (Rate, TooFast)> {
        let taken = limits.broadcast(share, all, Effect::Refused);
        taken.map_err(|Exceeded { rate, too_fast }| (rate, too_fast))
    }

    #[tokio::test(start_paused = true)]
    async fn sixty_seconds_worth_of_joins_pass_at_once_and_then_so_many_a_second() {
        let limits = limits(|config| config.limits.joins_per_second_max = 2);
        // A share is one a second at least.
        let [one, other, third] = [1, 2, 3].map(|n| share(&limits, n, None));
        let count = |share| (0..200).filter(|_| limits.join(share)).count();
        assert_eq!((count(one), count(other), count(third)), (60, 60, 0));
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!((count(one), count(other), count(third)), (3, 3, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_of_broadcasts_passes_whole_or_not_at_all() {
        let limits = limits(|config| config.limits.broadcasts_per_second_max = 1);
        let one = share(&limits, 1, None);
        let take = |count| take(&limits, one, &ordinary(count)).map_err(|(_, too_fast)| too_fast);
        assert_eq!(take(61), Err(TooFast::Batch), "more than will ever fit");
        assert_eq!(take(58), Ok(()));
        assert_eq!(take(3), Err(TooFast::Batch), "two would fit");
        assert_eq!(take(2), Ok(()));
        assert_eq!(take(1), Err(TooFast::One));
        assert_eq!(take(2), Err(TooFast::One));
        assert_eq!(take(0), Ok(()));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(take(2), Err(TooFast::Batch));
        assert_eq!(take(1), Ok(()));
    }

    /// With the settings as they are.
    #[tokio::test(start_paused = true)]
    async fn a_client_empties_its_own_share_and_no_others() {
        let limits = limits(|_| {});
        let [anon, neighbour] = [1, 2].map(|n| share(&limits, n, None));
        let own = (0..10_000).filter(|_| take(&limits, anon, &ordinary(1)).is_ok()).count();
        assert_eq!(own, 20 * 60, "a fifth of the project's");
        assert!(limits.is_spent(anon));
        assert_eq!((0..10_000).filter(|_| limits.join(anon)).count(), 20 * 60);
        // A person is not the address from which others flood, nor bound to it.
        let person = share(&limits, 1, Some("a"));
        assert!(!limits.is_spent(person) && !limits.is_spent(neighbour));
        assert_eq!(take(&limits, person, &ordinary(1)), Ok(()));
        assert_eq!(take(&limits, neighbour, &ordinary(1)), Ok(()));
        assert!(limits.join(person) && limits.join(neighbour));
        let elsewhere = share(&limits, 3, Some("a"));
        assert_eq!(
            take(&limits, elsewhere, &ordinary(1200)).map_err(|(rate, _)| rate),
            Err(Rate::ClientBroadcasts),
            "what a person has used is used everywhere"
        );
        // A share that is refused takes nothing of the project's rate.
        let sent = 6000 - 1200 - 2;
        let mut passed = 0;
        for n in 4..100 {
            let another = share(&limits, n, None);
            passed += (0..2000).filter(|_| take(&limits, another, &ordinary(1)).is_ok()).count();
        }
        assert_eq!(passed, sent);
        assert!(limits.is_spent(neighbour), "the last bound is the project's");
    }

    #[tokio::test(start_paused = true)]
    async fn what_servers_send_to_rules_topics_passes_when_browsers_have_used_up_everything() {
        let limits = limits(|_| {});
        for n in 0..100 {
            let anon = share(&limits, n, None);
            while take(&limits, anon, &ordinary(1)).is_ok() {}
        }
        let (servers, ruled) = (servers(&limits), amount(1, 10));
        let winner = Broadcasts { ruled, ..Broadcasts::default() };
        assert!(!limits.is_spent(servers));
        assert_eq!((0..10_000).filter(|_| take(&limits, servers, &winner).is_ok()).count(), 6000);
        assert!(limits.is_spent(servers));
        // Whom a rule lets write besides is a client like any other.
        let person = share(&limits, 1, Some("a"));
        assert_eq!(take(&limits, person, &winner), Err((Rate::Broadcasts, TooFast::One)));
        assert_eq!(
            take(&limits, servers, &ordinary(1)).map_err(|(rate, _)| rate),
            Err(Rate::Broadcasts)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn broadcasts_are_rated_by_their_bytes_too() {
        let limits = limits(|_| {});
        let [one, other] = [1, 2].map(|n| share(&limits, n, None));
        let largest = limits.settings().payload_bytes_max;
        let of = |count, bytes| Broadcasts { ordinary: amount(count, bytes), ..Default::default() };
        assert_eq!(take(&limits, one, &of(1, largest)), Ok(()));
        let bytes = Rate::ClientBroadcastBytes;
        assert_eq!(take(&limits, one, &of(1, 1000)), Err((bytes, TooFast::One)));
        assert_eq!(take(&limits, one, &of(2, 1000)), Err((bytes, TooFast::Batch)));
        assert_eq!(take(&limits, other, &of(1, largest)), Ok(()));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(take(&limits, one, &of(1, 200_000)), Ok(()));
        assert_eq!(take(&limits, one, &of(1, 1000)), Err((bytes, TooFast::One)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_sent_costs_its_sender_and_nobody_else() {
        let limits = limits(|_| {});
        let unsent = Broadcasts { unsent: amount(1, 1), ..Broadcasts::default() };
        for n in 0..100 {
            let client = share(&limits, n, None);
            let count = (0..2000).filter(|_| take(&limits, client, &unsent).is_ok()).count();
            assert_eq!(count, 1200);
        }
        assert_eq!(take(&limits, share(&limits, 200, None), &ordinary(1200)), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn shares_beyond_the_bound_are_one_and_used_ones_are_not_forgotten() {
        let limits = limits(|config| config.limits.shares_max = 3);
        let shares = [1, 2, 3, 4, 5].map(|n| share(&limits, n, None));
        for share in &shares[..3] {
            assert_eq!(take(&limits, *share, &ordinary(1200)), Ok(()));
        }
        assert_eq!(take(&limits, shares[3], &ordinary(1000)), Ok(()));
        let error = take(&limits, shares[4], &ordinary(1000));
        assert_eq!(error, Err((Rate::ClientBroadcasts, TooFast::Batch)));
        assert_eq!(limits.shares.count(), 4);
        assert!(shares[..3].iter().all(|share| limits.is_spent(*share)));
        tokio::time::advance(Duration::from_secs(60)).await;
        limits.sweep();
        assert_eq!(limits.shares.count(), 0);
        // Without a sweep there is room, too.
        for share in &shares[..3] {
            assert_eq!(take(&limits, *share, &ordinary(60)), Ok(()));
        }
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(take(&limits, shares[3], &ordinary(1)), Ok(()));
        assert_eq!(limits.shares.count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_asks_ten_seconds_worth_at_once_and_then_so_often_a_second() {
        let limits = limits(|_| {});
        let [one, other] = [1, 2].map(|n| Caller::at([192, 0, 2, n].into()));
        let count = |caller| (0..5000).filter(|_| limits.request(caller)).count();
        assert_eq!((count(one), count(other)), (1000, 1000));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(count(one), 100);
    }

    #[test]
    fn zero_is_no_limit() {
        let limits = limits(|config| {
            config.limits.joins_per_second_max = 0;
            config.limits.broadcasts_per_second_max = 0;
            config.limits.broadcast_bytes_per_second_max = 0;
        });
        let one = share(&limits, 1, None);
        assert!((0..10_000).all(|_| limits.join(one)));
        let all = Broadcasts { ordinary: amount(1, usize::MAX), ..Broadcasts::default() };
        assert!((0..100_000).all(|_| take(&limits, one, &all).is_ok()));
    }
}
