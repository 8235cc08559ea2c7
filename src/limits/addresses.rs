//! What each address has used up: sockets, handshakes, wrong tokens.
//!
//! Invariants: at most `addresses_max` addresses are remembered beside those with open sockets, which
//! are never forgotten, so that nobody gets a second set of sockets by having others forgotten.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    address::Address,
    rate::{BURST_SECONDS, SWEEP_INTERVAL, limiter},
    settings::Settings,
};
use crate::{clock::Limiter, telemetry::metrics::Counter};

/// Of the remembered addresses, so large a part is forgotten at once.
const BATCH_PART: usize = 16;

/// What addresses have used up.
#[derive(Debug)]
pub(crate) struct Addresses {
    state: Mutex<State>,
    max: usize,
    connections_max: usize,
    handshakes_per_second: u32,
    failures_per_second: u32,
    forgotten: Counter,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Address, AddressEntry>,
    /// Number of entries at which idle ones are removed. Above the bound only while the last removal
    /// found too few entries without sockets.
    crowded_at: usize,
}

#[derive(Debug)]
struct AddressEntry {
    connections: usize,
    handshakes: Option<Limiter>,
    failures: Option<Limiter>,
    /// A failure is paid for before a token is looked at; the payment is kept while none fails.
    is_paid: bool,
    seen: Instant,
}

impl Addresses {
    /// Creates a table without an address; `forgotten` counts those that are forgotten for room.
    pub(crate) fn new(limits: &Settings, forgotten: Counter) -> Self {
        let state = State { entries: HashMap::new(), crowded_at: limits.addresses_max };
        Self {
            state: Mutex::new(state),
            max: limits.addresses_max,
            connections_max: limits.connections_per_address_max,
            handshakes_per_second: limits.handshakes_per_address_max,
            failures_per_second: limits.failures_per_address_max,
            forgotten,
        }
    }

    /// Counts a socket; false if the address has as many as it may.
    #[must_use]
    pub(crate) fn connect(&self, address: Address) -> bool {
        self.with(address, |entry| {
            let has_room = entry.connections < self.connections_max;
            entry.connections += usize::from(has_room);
            has_room
        })
    }

    /// A socket that was counted has ended.
    pub(crate) fn leave(&self, address: Address) {
        self.with(address, |entry| entry.connections = entry.connections.saturating_sub(1));
    }

    /// Counts an upgrade; false if they come too fast.
    #[must_use]
    pub(crate) fn shake_hands(&self, address: Address) -> bool {
        self.with(address, |entry| {
            entry.handshakes.as_ref().is_none_or(|handshakes| handshakes.check().is_ok())
        })
    }

    /// Whether a token that may be wrong is looked at; false if too many have been.
    #[must_use]
    pub(crate) fn may_fail(&self, address: Address) -> bool {
        self.with(address, |entry| {
            let pay = |failures: &Limiter| failures.check().is_ok();
            entry.is_paid = entry.is_paid || entry.failures.as_ref().is_none_or(pay);
            entry.is_paid
        })
    }

    /// Counts a token that was wrong.
    pub(crate) fn fail(&self, address: Address) {
        self.with(address, |entry| entry.is_paid = false);
    }

    /// How many addresses are remembered.
    pub(crate) fn count(&self) -> usize {
        self.state.lock().entries.len()
    }

    /// Forgets those of whom nothing is left to be known.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.entries.retain(|_, entry| {
            entry.connections > 0 || now.duration_since(entry.seen) < SWEEP_INTERVAL
        });
        state.entries.shrink_to(self.max / BATCH_PART);
        state.crowded_at = self.max.max(state.entries.len());
    }

    fn with<T>(&self, address: Address, change: impl FnOnce(&mut AddressEntry) -> T) -> T {
        let mut state = self.state.lock();
        if !state.entries.contains_key(&address) && state.entries.len() >= state.crowded_at {
            self.forget_oldest(&mut state);
        }
        let now = Instant::now();
        let entry = state.entries.entry(address).or_insert_with(|| AddressEntry {
            connections: 0,
            handshakes: limiter(self.handshakes_per_second, BURST_SECONDS, 0),
            failures: limiter(self.failures_per_second, BURST_SECONDS, 0),
            is_paid: false,
            seen: now,
        });
        entry.seen = now;
        change(entry)
    }

    fn forget_oldest(&self, state: &mut State) {
        let batch = (self.max / BATCH_PART).max(1);
        let idle = state.entries.iter().filter(|(_, entry)| entry.connections == 0);
        let mut idle: Vec<_> = idle.map(|(address, entry)| (entry.seen, *address)).collect();
        if idle.len() > batch {
            idle.select_nth_unstable_by_key(batch, |(seen, _)| *seen);
            idle.truncate(batch);
        }
        for (_, address) in &idle {
            state.entries.remove(address);
        }
        self.forgotten.inc_by(idle.len() as u64);
        // Where too many hold sockets, not every newcomer looks again.
        let is_crowded = state.entries.len() >= self.max;
        state.crowded_at = if is_crowded { state.entries.len() + batch } else { self.max };
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, time::Duration};

    use super::*;
    use crate::{server::settings::Config, telemetry::metrics::Registry};

    fn addresses(set: impl FnOnce(&mut Settings)) -> Addresses {
        let mut limits = Config::defaults().limits;
        set(&mut limits);
        Addresses::new(&limits, Registry::new().counter("forgotten", "Forgotten."))
    }

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn an_address_has_so_many_sockets_and_gets_a_place_back() {
        let addresses = addresses(|limits| limits.connections_per_address_max = 2);
        let (one, other) = (address("192.0.2.1"), address("192.0.2.2"));
        assert!(addresses.connect(one) && addresses.connect(one));
        assert!(!addresses.connect(one) && addresses.connect(other));
        addresses.leave(one);
        assert!(addresses.connect(one) && !addresses.connect(one));
    }

    #[tokio::test(start_paused = true)]
    async fn ten_seconds_worth_of_handshakes_pass_at_once() {
        let addresses = addresses(|limits| limits.handshakes_per_address_max = 3);
        let (one, other) = (address("192.0.2.1"), address("192.0.2.2"));
        let count = |address| (0..100).filter(|_| addresses.shake_hands(address)).count();
        assert_eq!((count(one), count(one)), (30, 0));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!((count(one), count(other)), (6, 30));
    }

    #[tokio::test(start_paused = true)]
    async fn only_tokens_that_fail_are_counted() {
        let addresses = addresses(|limits| limits.failures_per_address_max = 1);
        let one = address("192.0.2.1");
        assert!((0..1000).all(|_| addresses.may_fail(one)));
        for _ in 0..10 {
            assert!(addresses.may_fail(one));
            addresses.fail(one);
        }
        assert!(!addresses.may_fail(one));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(addresses.may_fail(one) && addresses.may_fail(one));
        addresses.fail(one);
        assert!(!addresses.may_fail(one));
    }

    #[tokio::test(start_paused = true)]
    async fn the_address_seen_longest_ago_is_forgotten_and_never_one_with_a_socket() {
        let addresses = addresses(|limits| {
            limits.addresses_max = 3;
            limits.connections_per_address_max = 1;
            limits.failures_per_address_max = 1;
        });
        let [held, first, second, third] =
            ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"].map(address);
        assert!(addresses.connect(held));
        for address in [first, second, third] {
            tokio::time::advance(Duration::from_millis(1)).await;
            while addresses.may_fail(address) {
                addresses.fail(address);
            }
        }
        assert_eq!((addresses.count(), addresses.forgotten.get()), (3, 1));
        assert!(!addresses.connect(held), "its socket is still counted");
        assert!(!addresses.may_fail(second) && !addresses.may_fail(third), "both are remembered");
        assert!(addresses.may_fail(first), "a forgotten address starts at zero");
    }

    #[test]
    fn where_all_hold_sockets_all_are_remembered_and_newcomers_do_not_look_each_time() {
        let addresses = addresses(|limits| limits.addresses_max = 32);
        let number = |n: u32| Address::from(IpAddr::from(n.to_be_bytes()));
        assert!((0..100).all(|n| addresses.connect(number(n))));
        assert_eq!(addresses.count(), 100);
        // Of those without a socket there are no more than a batch.
        assert!((1000..9000).all(|n| addresses.shake_hands(number(n))));
        assert!(addresses.count() <= 102, "{}", addresses.count());
        for n in 0..100 {
            addresses.leave(number(n));
        }
        assert!((1000..9000).all(|n| addresses.shake_hands(number(n))));
        assert!(addresses.count() <= 102, "{}", addresses.count());
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_everything_back_is_swept() {
        let addresses = addresses(|limits| limits.addresses_max = 8);
        let (gone, held) = (address("192.0.2.1"), address("192.0.2.2"));
        assert!(addresses.shake_hands(gone) && addresses.connect(held));
        tokio::time::advance(SWEEP_INTERVAL - Duration::from_millis(1)).await;
        addresses.sweep();
        assert_eq!(addresses.count(), 2);
        tokio::time::advance(Duration::from_millis(1)).await;
        addresses.sweep();
        assert_eq!(addresses.count(), 1);
        assert!(addresses.connect(held));
    }
}
