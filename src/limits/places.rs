//! The places of one port for connections that are no sockets, and which connection makes way.
//!
//! Invariants: at most `max` connections hold a place, and those of one address at most a quarter of
//! them; a connection whose request has come whole keeps its place until the answer, and any other
//! loses it to a newcomer, first the one whose client has asked nothing for longest; a place is given
//! back exactly once.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::address::Address;

/// One address may hold one part in so many of the places.
const SHARES: usize = 4;

/// The places of one port.
#[derive(Debug)]
pub(crate) struct Places {
    state: Mutex<State>,
    max: usize,
    share: usize,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    by_address: HashMap<Address, usize>,
    /// Connections that the server waits for, by the number of their place: the oldest is first.
    idle: BTreeMap<u64, Idle>,
    next: u64,
}

/// A connection that the server waits for: its head has not come, or its answer is not taken.
#[derive(Debug)]
struct Idle {
    address: Option<Address>,
    displaced: CancellationToken,
}

/// A connection's place, until this is dropped or the connection has to make way.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    number: AtomicU64,
    address: Option<Address>,
    displaced: CancellationToken,
}

/// Keeps a place from newcomers until this is dropped.
#[derive(Debug)]
pub(crate) struct Kept {
    place: Arc<Place>,
    /// False if the connection has made way already.
    is_held: bool,
}

impl Places {
    /// Creates `max` places.
    pub(crate) fn new(max: usize) -> Arc<Self> {
        let share = (max / SHARES).max(1);
        Arc::new(Self { state: Mutex::default(), max, share })
    }

    /// Takes a place for a newcomer; `None` as the address exempts it from the share of one address.
    /// Where there is none left, the oldest connection that is not being answered makes way: of the
    /// newcomer's own address if that holds its share, else of all.
    ///
    /// Returns `None` if all of those are being answered.
    pub(crate) fn take(self: &Arc<Self>, address: Option<Address>) -> Option<Place> {
        let displaced = CancellationToken::new();
        let (number, loser) = {
            let mut state = self.state.lock();
            let held = address.and_then(|address| state.by_address.get(&address));
            let is_of_share = held.is_some_and(|held| *held >= self.share);
            let mut loser = None;
            if is_of_share || state.taken >= self.max {
                let may_lose = |idle: &Idle| !is_of_share || idle.address == address;
                let oldest = state.idle.iter().find(|(_, idle)| may_lose(idle));
                let number = oldest.map(|(number, _)| *number)?;
                loser = state.give_back(number);
            }
            state.taken += 1;
            if let Some(address) = address {
                *state.by_address.entry(address).or_default() += 1;
            }
            state.next += 1;
            let number = state.next;
            state.idle.insert(number, Idle { address, displaced: displaced.clone() });
            (number, loser)
        };
        if let Some(loser) = loser {
            loser.displaced.cancel();
        }
        let number = AtomicU64::new(number);
        Some(Place { places: Arc::clone(self), number, address, displaced })
    }
}

impl State {
    /// Frees the place of a connection that is idle.
    fn give_back(&mut self, number: u64) -> Option<Idle> {
        let idle = self.idle.remove(&number)?;
        self.taken -= 1;
        if let Some(address) = idle.address
            && let Some(held) = self.by_address.get_mut(&address)
        {
            *held -= 1;
            if *held == 0 {
                self.by_address.remove(&address);
            }
        }
        Some(idle)
    }
}

impl Place {
    /// Keeps the place while a request is being answered.
    pub(crate) fn keep(self: &Arc<Self>) -> Kept {
        let number = self.number.load(Ordering::Relaxed);
        let is_held = self.places.state.lock().idle.remove(&number).is_some();
        Kept { place: Arc::clone(self), is_held }
    }

    /// Has the connection be the last to make way, unless it has to already.
    pub(crate) fn renew(&self) {
        let mut state = self.places.state.lock();
        if let Some(idle) = state.idle.remove(&self.number.load(Ordering::Relaxed)) {
            self.insert(&mut state, idle);
        }
    }

    fn insert(&self, state: &mut State, idle: Idle) {
        state.next += 1;
        self.number.store(state.next, Ordering::Relaxed);
        state.idle.insert(state.next, idle);
    }

    /// Waits until the connection has to make way for a newcomer.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn displaced(&self) {
        self.displaced.cancelled().await;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.is_held {
            let Place { places, address, displaced, .. } = &*self.place;
            let idle = Idle { address: *address, displaced: displaced.clone() };
            self.place.insert(&mut places.state.lock(), idle);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nothing is idle under this number if the connection has made way.
        let number = self.number.load(Ordering::Relaxed);
        drop(self.places.state.lock().give_back(number));
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Option<Address> {
        Some(text.parse::<IpAddr>().unwrap().into())
    }

    fn taken(places: &Places) -> usize {
        places.state.lock().taken
    }

    #[test]
    fn the_oldest_connection_that_is_not_answered_makes_way() {
        let places = Places::new(3);
        let held = [(); 3].map(|()| Arc::new(places.take(None).unwrap()));
        let kept = held[0].keep();
        let newcomer = Arc::new(places.take(None).unwrap());
        let lost = || held.each_ref().map(|place| place.displaced.is_cancelled());
        assert_eq!((lost(), taken(&places)), ([false, true, false], 3));
        let (second, last) = (held[2].keep(), newcomer.keep());
        assert!(places.take(None).is_none(), "all are being answered");
        drop(second);
        assert!(places.take(None).is_some());
        assert_eq!((lost(), taken(&places)), ([false, true, true], 2));
        drop((kept, last, held, newcomer));
        assert_eq!(taken(&places), 0);
    }

    #[test]
    fn an_address_with_its_share_displaces_itself_and_nobody_else() {
        let places = Places::new(8);
        let (one, other) = (address("192.0.2.1"), address("192.0.2.2"));
        let bystander = places.take(other).unwrap();
        let first = Arc::new(places.take(one).unwrap());
        let second = places.take(one).unwrap();
        let third = Arc::new(places.take(one).unwrap());
        let lost = |place: &Place| place.displaced.is_cancelled();
        assert!(lost(&first) && !lost(&second) && !lost(&third) && !lost(&bystander));
        let kept = third.keep();
        drop(second);
        let fourth = Arc::new(places.take(one).unwrap());
        let also_kept = fourth.keep();
        assert!(places.take(one).is_none(), "its share is being answered");
        assert!(places.take(other).is_some());
        assert!((0..5).map(|_| places.take(None)).collect::<Option<Vec<_>>>().is_some());
        drop((kept, also_kept, bystander, first, third, fourth));
        assert_eq!((taken(&places), places.state.lock().by_address.len()), (0, 0));
    }

    #[test]
    fn a_connection_that_has_made_way_gives_nothing_back_twice() {
        let places = Places::new(1);
        let first = Arc::new(places.take(None).unwrap());
        let second = places.take(None).unwrap();
        // Its request had just come.
        drop(first.keep());
        drop(first);
        assert_eq!(taken(&places), 1);
        drop(second);
        assert_eq!(taken(&places), 0);
    }
}
