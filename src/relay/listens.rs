//! Which NOTIFY channels somebody wants, which of them have a place, and which are active.
//!
//! Channels of joined events are held by their viewers' channels; a LISTEN outlives its last
//! holder by `linger`, so that a page reload does not cost one. Nothing but what rules name can
//! get in here: this is the allow-list.
//!
//! Invariants: the session listens to at most as many channels as there are places, at any time: it
//! ends LISTENs that are not wanted before it begins others; a channel is forgotten together with its
//! place, and the session is told to end its LISTEN; nothing here walks over all channels, but for
//! the session's end and for what the database has newly told.

use std::{collections::HashSet, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::places::{NoPlace, Places, Relayed, State, Wanted, Wish};
use crate::{
    access::NOTIFY_CHANNEL_BYTES_MAX,
    telemetry::metrics::{CounterBy, GaugeBy, GaugeGuard, count},
};

/// Most LISTENs, and most UNLISTENs, of one exchange with the server; notifications are received
/// between two exchanges.
const BATCH_MAX: usize = 256;
/// How long until a channel without a place looks for one again.
const RETRY: Duration = Duration::from_secs(3);
/// How long until a channel finds out at the latest that its place was given to another.
const LOOK: Duration = Duration::from_secs(15);

/// The channels that are wanted.
#[derive(Debug)]
pub(crate) struct Listens {
    state: Mutex<State>,
    changed: Notify,
    places: Places,
    wait: Duration,
    refused: CounterBy<NoPlace>,
    waiting: GaugeBy<NoPlace>,
}

/// A viewer's hold on a NOTIFY channel; dropping it lets go.
#[derive(Debug)]
pub(crate) struct ListenGuard {
    listens: Arc<Listens>,
    relayed: Arc<Relayed>,
    /// Whether another channel may take the place, as far as was known when it was held.
    may_be_displaced: bool,
    active: watch::Receiver<bool>,
}

/// What a viewer's channel hears from the database.
#[derive(Debug)]
pub(crate) enum Listening {
    /// It holds its NOTIFY channel.
    Held(ListenGuard),
    /// There was no place for its NOTIFY channel.
    Waiting(NoPlace, GaugeGuard),
}

/// What the session has to do, one after the other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) unlisten: Vec<Arc<str>>,
    pub(crate) listen: Vec<Arc<str>>,
}

impl Changes {
    /// Returns whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.unlisten.is_empty() && self.listen.is_empty()
    }
}

impl Listens {
    /// Creates an empty set; a join waits for its LISTEN for at most `wait`. `refused` counts the
    /// times at which a channel found no place or lost its own, `waiting` the viewers' channels that
    /// have none.
    pub(crate) fn new(
        places: Places,
        wait: Duration,
        refused: CounterBy<NoPlace>,
        waiting: GaugeBy<NoPlace>,
    ) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), places, wait, refused, waiting }
    }

    /// How long a join waits for its LISTEN at most.
    pub(crate) fn wait(&self) -> Duration {
        self.wait
    }

    /// Holds a NOTIFY channel, and has it listened to, or counts it among those that wait until it
    /// is asked for again. Its notifications go to the target of the first holder. `former` is what
    /// was returned before, if anything was.
    pub(crate) fn listen(self: &Arc<Self>, wish: Wish<'_>, former: Option<Listening>) -> Listening {
        match (self.hold(wish), former) {
            (Ok(guard), _) => Listening::Held(guard),
            (Err(reason), Some(Listening::Waiting(counted, guard))) if counted == reason => {
                Listening::Waiting(counted, guard)
            }
            (Err(reason), _) => {
                self.refused.of(reason).inc();
                Listening::Waiting(reason, GaugeGuard::new(self.waiting.of(reason)))
            }
        }
    }

    fn hold(self: &Arc<Self>, wish: Wish<'_>) -> Result<ListenGuard, NoPlace> {
        if wish.channel.len() > NOTIFY_CHANNEL_BYTES_MAX || wish.channel.contains('\0') {
            return Err(NoPlace::TooLong);
        }
        let mut state = self.state.lock();
        let is_known = wish.is_published || wish.eid.is_some_and(|eid| state.known.contains(eid));
        let channel = match state.wanted.get_key_value(&*wish.channel) {
            Some((channel, _)) => Arc::clone(channel),
            None => {
                let displaced = state.make_room(self.places, &wish, is_known)?;
                if displaced > 0 {
                    self.refused.of(NoPlace::Displaced).inc();
                    self.waiting.of(NoPlace::Displaced).add(count(displaced));
                }
                let channel = state.insert(wish);
                self.changed.notify_one();
                channel
            }
        };
        let Some(entry) = state.wanted.get_mut(&channel) else {
            return Err(NoPlace::Full);
        };
        entry.holders += 1;
        entry.idle_since = None;
        let (relayed, active) = (Arc::clone(&entry.relayed), entry.active.subscribe());
        if is_known {
            state.know(&channel);
        } else {
            state.weigh(&channel);
        }
        Ok(ListenGuard { listens: Arc::clone(self), relayed, may_be_displaced: !is_known, active })
    }

    /// Takes the events that the database knows, in place of those that it knew before.
    pub(super) fn set_known(&self, known: HashSet<Box<str>>) {
        let mut state = self.state.lock();
        state.known = known;
        let State { wanted, known, .. } = &*state;
        let is_in = |wanted: &Wanted| wanted.eid.as_ref().is_some_and(|eid| known.contains(eid));
        let newly = wanted.iter().filter(|(_, wanted)| !wanted.is_known && is_in(wanted));
        let newly: Vec<_> = newly.map(|(channel, _)| Arc::clone(channel)).collect();
        for channel in newly {
            state.know(&channel);
        }
    }

    /// Where notifications on `channel` go, if it is wanted.
    pub(super) fn relayed(&self, channel: &str) -> Option<Arc<Relayed>> {
        self.state.lock().wanted.get(channel).map(|wanted| Arc::clone(&wanted.relayed))
    }

    /// As [`Self::relayed`], of a channel that was just notified: somebody publishes to it.
    pub(super) fn notified(&self, channel: &str) -> Option<Arc<Relayed>> {
        let mut state = self.state.lock();
        let wanted = state.wanted.get(channel)?;
        let relayed = Arc::clone(&wanted.relayed);
        if !wanted.is_known {
            state.know(&relayed.channel);
        }
        Some(relayed)
    }

    /// Waits until there may be something to do.
    ///
    /// # Cancel safety
    /// A wake-up that nobody has taken is kept.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Forgets the channels that nobody has held for `linger`.
    pub(crate) fn forget_idle(&self, linger: Duration) {
        self.state.lock().forget_idle(linger);
    }

    /// Returns what the session has to do next, and forgets the channels that nobody has held for
    /// `linger`. The session is woken again if that is not all.
    pub(crate) fn changes(&self, linger: Duration) -> Changes {
        let mut state = self.state.lock();
        state.forget_idle(linger);
        let State { pending, surplus, active, .. } = &mut *state;
        let unlisten: Vec<_> = surplus.iter().take(BATCH_MAX).cloned().collect();
        for channel in &unlisten {
            surplus.remove(channel);
        }
        let room = self.places.max.saturating_sub(*active + surplus.len()).min(BATCH_MAX);
        // One that is still to be unlistened waits for that.
        let listen = pending.iter().filter(|channel| !surplus.contains(*channel));
        let listen: Vec<_> = listen.take(room).cloned().collect();
        for channel in &listen {
            pending.remove(channel);
        }
        if !surplus.is_empty() || !pending.is_empty() {
            self.changed.notify_one();
        }
        Changes { unlisten, listen }
    }

    /// Records that these channels are listened to, and wakes the joins that wait for them. Returns
    /// those that were not listened to before, not by an earlier session either.
    pub(super) fn activate(&self, channels: &[Arc<str>]) -> Vec<Arc<Relayed>> {
        let mut state = self.state.lock();
        let State { wanted, pending, surplus, active, .. } = &mut *state;
        let mut fresh = Vec::new();
        for channel in channels {
            let Some(wanted) = wanted.get_mut(channel) else {
                // It lost its place while the server was asked.
                surplus.insert(Arc::clone(channel));
                self.changed.notify_one();
                continue;
            };
            pending.remove(channel);
            if wanted.covered_since.is_none() {
                wanted.covered_since = Some(Instant::now());
                fresh.push(Arc::clone(&wanted.relayed));
            }
            *active += usize::from(!wanted.active.send_replace(true));
        }
        fresh
    }

    /// How many channels the session listens to.
    pub(super) fn listening(&self) -> usize {
        let state = self.state.lock();
        state.active + state.surplus.len()
    }

    /// The channels that were listened to, by this session or an earlier one.
    pub(super) fn covered(&self) -> Vec<Arc<Relayed>> {
        let state = self.state.lock();
        let covered = state.wanted.values().filter(|wanted| wanted.covered_since.is_some());
        covered.map(|wanted| Arc::clone(&wanted.relayed)).collect()
    }

    /// Records that not everything on the channel has been heard up to now.
    pub(crate) fn cover_from_now(&self, channel: &str) {
        if let Some(wanted) = self.state.lock().wanted.get_mut(channel) {
            wanted.covered_since = Some(Instant::now());
        }
    }

    /// Since when everything on the channel has been heard.
    pub(crate) fn covered_since(&self, channel: &str) -> Option<Instant> {
        self.state.lock().wanted.get(channel)?.covered_since
    }

    /// Whether the channel is listened to.
    pub(crate) fn is_active(&self, channel: &str) -> bool {
        self.state.lock().wanted.get(channel).is_some_and(|wanted| *wanted.active.borrow())
    }

    /// Records that no channel is listened to: the session is gone.
    pub(crate) fn deactivate_all(&self) {
        let mut state = self.state.lock();
        let State { wanted, pending, surplus, active, .. } = &mut *state;
        for wanted in wanted.values() {
            wanted.active.send_replace(false);
        }
        pending.extend(wanted.keys().cloned());
        surplus.clear();
        *active = 0;
    }
}

impl Listening {
    /// The hold, unless the place was given to another.
    pub(crate) fn held(&self) -> Option<&ListenGuard> {
        match self {
            Self::Held(guard) => Some(guard).filter(|guard| !guard.is_displaced()),
            Self::Waiting(..) => None,
        }
    }

    /// Whether the channel is listened to.
    pub(crate) fn is_active(&self) -> bool {
        self.held().is_some_and(ListenGuard::is_active)
    }

    /// How long until the channel has to be asked for again, if that may be needed.
    pub(crate) fn looks_again(&self) -> Option<Duration> {
        match self {
            Self::Waiting(NoPlace::TooLong, _) => None,
            Self::Waiting(..) => Some(RETRY),
            Self::Held(guard) => guard.may_be_displaced.then_some(LOOK),
        }
    }
}

impl ListenGuard {
    /// Whether the channel is listened to.
    #[must_use]
    pub(crate) fn is_active(&self) -> bool {
        *self.active.borrow()
    }

    /// Whether another channel has taken the place.
    fn is_displaced(&self) -> bool {
        // The sender lives as long as the place.
        self.active.has_changed().is_err()
    }

    /// Since when everything on the channel has been heard.
    pub(crate) fn covered_since(&self) -> Option<Instant> {
        self.listens.covered_since(&self.relayed.channel)
    }

    /// Waits, apart from this hold, until the channel is listened to, or has lost its place.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) fn activation(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut active = self.active.clone();
        async move {
            // The sender lives as long as the place; if it has gone, nothing comes.
            let _ = active.wait_for(|active| *active).await;
        }
    }
}

impl Drop for ListenGuard {
    fn drop(&mut self) {
        let channel = &self.relayed.channel;
        let mut state = self.listens.state.lock();
        let held = state.wanted.get_mut(channel);
        let Some(held) = held.filter(|held| Arc::ptr_eq(&held.relayed, &self.relayed)) else {
            // It was counted when the place was taken away.
            return self.listens.waiting.of(NoPlace::Displaced).dec();
        };
        held.holders -= 1;
        if held.holders == 0 {
            held.idle_since = Some(Instant::now());
            state.weigh(channel);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::{
        hub::Hub,
        invalidation::Feeds,
        protocol::topic::Privacy,
        publish::{Publisher, Target},
        telemetry::metrics::Registry,
    };

    const LINGER: Duration = Duration::from_secs(60);

    /// Places as a test needs them, and who takes them.
    struct Stage {
        listens: Arc<Listens>,
        target: Target,
    }

    fn stage(max: usize, per_address_max: usize) -> Stage {
        let registry = Registry::new();
        let hub = Arc::new(Hub::new(&registry));
        let publisher = Publisher::new(Arc::clone(&hub), Arc::new(Feeds::new(9, hub, &registry)));
        let refused = registry.counter_by("refused", ["reason"], "Refused.");
        let waiting = registry.gauge_by("waiting", ["reason"], "Waiting.");
        let places = Places { max, per_address_max };
        Stage {
            listens: Arc::new(Listens::new(places, Duration::ZERO, refused, waiting)),
            target: publisher.target("t", Privacy::Public, None),
        }
    }

    impl Stage {
        /// Holds the channel, which is called like its event, from an address that ends like this.
        fn hold_from(&self, address: u8, channel: &str) -> Result<ListenGuard, NoPlace> {
            self.listens.hold(Wish {
                channel: channel.to_owned(),
                user_event: "e",
                target: &self.target,
                eid: Some(channel),
                is_published: false,
                address: IpAddr::from(Ipv4Addr::new(192, 0, 2, address)).into(),
            })
        }

        fn hold(&self, channel: &str) -> Result<ListenGuard, NoPlace> {
            self.hold_from(1, channel)
        }

        fn know(&self, eids: &[&str]) {
            self.listens.set_known(eids.iter().map(|eid| Box::from(*eid)).collect());
        }

        /// Does what the session has to, one exchange, and returns how many LISTENs are new.
        fn sync(&self) -> usize {
            let changes = self.listens.changes(LINGER);
            self.listens.activate(&changes.listen).len()
        }

        fn unheard(&self, reason: NoPlace) -> i64 {
            self.listens.waiting.of(reason).get()
        }
    }

    /// All of it is given back once nobody holds anything and the linger is over.
    async fn is_empty_in_the_end(stage: &Stage) {
        tokio::time::advance(LINGER).await;
        loop {
            let changes = stage.listens.changes(LINGER);
            if changes.is_empty() {
                break;
            }
            assert_eq!(changes.listen, []);
        }
        let state = stage.listens.state.lock();
        assert!(state.wanted.is_empty() && state.yielding.is_empty() && state.unknown.is_empty());
        assert!(state.pending.is_empty() && state.surplus.is_empty());
        assert_eq!(state.active, 0);
    }

    fn names(channels: &[&str]) -> Vec<Arc<str>> {
        channels.iter().map(|channel| Arc::from(*channel)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_channel_is_listened_to_once_and_lingers_after_its_last_holder() {
        let stage = stage(9, 9);
        let (first, second) = (stage.hold("a").unwrap(), stage.hold("a").unwrap());
        assert_eq!(stage.sync(), 1);
        assert!(first.is_active() && second.is_active());
        assert!(stage.listens.changes(LINGER).is_empty());
        drop((first, second));
        assert!(stage.listens.changes(LINGER).is_empty());
        tokio::time::advance(LINGER).await;
        assert_eq!(stage.listens.changes(LINGER).unlisten, names(&["a"]));
        assert!(stage.listens.relayed("a").is_none());
        is_empty_in_the_end(&stage).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_viewer_who_comes_back_in_time_keeps_the_listen() {
        let stage = stage(9, 9);
        drop(stage.hold("a").unwrap());
        stage.sync();
        tokio::time::advance(LINGER / 2).await;
        let back = stage.hold("a").unwrap();
        tokio::time::advance(LINGER).await;
        assert!(stage.listens.changes(LINGER).is_empty() && back.is_active());
    }

    #[test]
    fn the_number_of_channels_and_their_length_are_bounded() {
        let stage = stage(1, 9);
        let held = stage.hold(&"a".repeat(63));
        assert!(held.is_ok());
        assert_eq!(stage.hold("b").unwrap_err(), NoPlace::Full);
        for name in [&*"a".repeat(64), "a\0b"] {
            assert_eq!(stage.hold(name).unwrap_err(), NoPlace::TooLong);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_lingers_makes_room_for_who_comes() {
        let stage = stage(1, 9);
        drop(stage.hold("a").unwrap());
        stage.sync();
        let held = stage.hold("b").unwrap();
        let changes = stage.listens.changes(LINGER);
        assert_eq!((changes.listen, changes.unlisten), (names(&["b"]), names(&["a"])));
        assert_eq!(stage.hold("c").unwrap_err(), NoPlace::Full);
        drop(held);
        is_empty_in_the_end(&stage).await;
    }

    /// Without it, one browser takes all places by events that it invents.
    #[tokio::test(start_paused = true)]
    async fn an_address_has_so_many_places_of_unknown_events_and_any_number_of_known_ones() {
        let stage = stage(9, 2);
        stage.know(&["k1", "k2", "k3"]);
        let mut held: Vec<_> = ["u1", "u2"].map(|name| stage.hold(name).unwrap()).into();
        assert_eq!(stage.hold("u3").unwrap_err(), NoPlace::Address);
        held.extend(["k1", "k2", "k3"].map(|name| stage.hold(name).unwrap()));
        held.push(stage.hold_from(2, "u3").unwrap());
        // The place is there, whoever has taken it.
        held.push(stage.hold("u3").unwrap());
        assert_eq!(stage.hold("u4").unwrap_err(), NoPlace::Address);
        // What somebody has published to is no longer unknown.
        assert!(stage.listens.notified("u1").is_some());
        held.push(stage.hold("u4").unwrap());
        // A place that lingers still counts, so that coming and going gets nobody further.
        held.retain(|guard| !guard.relayed.channel.starts_with('u'));
        assert_eq!(stage.hold("u5").unwrap_err(), NoPlace::Address);
        drop(held);
        is_empty_in_the_end(&stage).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_known_event_takes_the_place_of_the_unknown_one_that_came_last() {
        let stage = stage(3, 9);
        stage.know(&["k1", "k2", "k3", "k4"]);
        let first = stage.hold_from(1, "u1").unwrap();
        let second = stage.hold_from(2, "u2").unwrap();
        let third = stage.hold_from(3, "u3").unwrap();
        // Whoever joins an event later does not make it younger.
        let other = stage.hold_from(4, "u1").unwrap();
        stage.sync();
        let mut known = vec![stage.hold("k1").unwrap()];
        assert!(third.is_displaced() && !third.is_active() && !second.is_displaced());
        assert_eq!(stage.unheard(NoPlace::Displaced), 1);
        known.extend(["k2", "k3"].map(|name| stage.hold(name).unwrap()));
        assert!([&first, &second, &other].iter().all(|guard| guard.is_displaced()));
        assert_eq!(stage.unheard(NoPlace::Displaced), 4);
        // Known ones yield to nobody.
        assert_eq!(stage.hold("k4").unwrap_err(), NoPlace::Full);
        assert_eq!(stage.hold_from(5, "u4").unwrap_err(), NoPlace::Full);
        drop((first, second, third, other));
        assert_eq!(stage.unheard(NoPlace::Displaced), 0);
        let changes = stage.listens.changes(LINGER);
        assert_eq!((changes.unlisten.len(), changes.listen.len()), (3, 3));
        stage.listens.activate(&changes.listen);
        assert!(known.iter().all(ListenGuard::is_active));
        // A place that becomes free is there for who tries again.
        known.pop();
        let _late = stage.hold("k4").unwrap();
        drop(known);
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_that_the_database_comes_to_know_is_safe_from_then_on() {
        let stage = stage(1, 9);
        let held = stage.hold("u").unwrap();
        assert!(held.may_be_displaced);
        stage.know(&["u", "k"]);
        assert_eq!(stage.hold("k").unwrap_err(), NoPlace::Full);
        drop(held);
        let _held = stage.hold("k").unwrap();
    }

    /// Each LISTEN costs the server memory, and each commit that notifies looks at all of them.
    #[tokio::test(start_paused = true)]
    async fn the_session_never_listens_to_more_than_the_bound_whatever_comes_and_goes() {
        let stage = stage(300, 300);
        let mut at_the_server: HashSet<Arc<str>> = HashSet::new();
        let mut held: Vec<ListenGuard> = Vec::new();
        let mut random = fastrand::Rng::with_seed(1);
        for round in 0..2_000 {
            for _ in 0..random.usize(..40) {
                let name = random.usize(..900).to_string();
                held.extend(stage.hold_from(random.u8(..4), &name));
            }
            if random.u8(..10) == 0 {
                let known: Vec<_> = (0..50).map(|_| random.usize(..900).to_string()).collect();
                stage.know(&known.iter().map(|eid| &**eid).collect::<Vec<_>>());
            }
            random.shuffle(&mut held);
            held.truncate(random.usize(..400));
            if random.u8(..50) == 0 {
                stage.listens.deactivate_all();
                at_the_server.clear();
            }
            let Changes { unlisten, listen } = stage.listens.changes(LINGER);
            assert!(unlisten.len() <= BATCH_MAX && listen.len() <= BATCH_MAX);
            for channel in &unlisten {
                assert!(at_the_server.remove(channel), "{round}: {channel}");
            }
            at_the_server.extend(listen.iter().cloned());
            assert!(at_the_server.len() <= 300, "{round}: {} LISTENs", at_the_server.len());
            // While the server is asked, channels come and lose their places.
            held.extend(stage.hold_from(5, &random.usize(..900).to_string()));
            stage.listens.activate(&listen);
            assert_eq!(stage.listens.listening(), at_the_server.len());
            held.retain(|guard| !guard.is_displaced());
            let is_there = |guard: &&ListenGuard| at_the_server.contains(&guard.relayed.channel);
            assert!(held.iter().filter(|guard| guard.is_active()).all(|guard| is_there(&guard)));
        }
        while !stage.listens.changes(LINGER).is_empty() {}
        drop(held);
        is_empty_in_the_end(&stage).await;
    }

    /// They went at 16 in five seconds, while nobody could take their places.
    #[tokio::test(start_paused = true)]
    async fn what_has_lingered_is_unlistened_in_whole_batches_one_after_the_other() {
        let stage = stage(1_000, 1_000);
        let held: Vec<_> = (0..1_000).map(|n| stage.hold(&n.to_string()).unwrap()).collect();
        while stage.sync() > 0 {}
        assert_eq!(stage.listens.listening(), 1_000);
        drop(held);
        tokio::time::advance(LINGER).await;
        let mut batches = Vec::new();
        // One wake-up after the other, without the session's timer.
        loop {
            batches.push(stage.listens.changes(LINGER).unlisten.len());
            let again = tokio::time::timeout(Duration::ZERO, stage.listens.changed());
            if again.await.is_err() {
                break;
            }
        }
        batches.retain(|size| *size > 0);
        assert_eq!(batches, [256, 256, 256, 232]);
        is_empty_in_the_end(&stage).await;
    }

    #[tokio::test]
    async fn a_lost_session_makes_channels_wait_again() {
        let stage = stage(9, 9);
        let held = stage.hold("a").unwrap();
        stage.sync();
        held.activation().await;
        stage.listens.deactivate_all();
        assert!(!held.is_active());
        assert_eq!(stage.listens.changes(LINGER).listen, names(&["a"]));
    }
}
