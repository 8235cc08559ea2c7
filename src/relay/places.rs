//! Who has a place while there are fewer than events that somebody has joined.
//!
//! Anybody can invent events, so a place has a worth: that of an event which the database knows or
//! somebody has published to is never given to another; one of an event that nobody knows counts
//! for the address that took it, of which each has so many, and goes to the first known event that
//! finds no other; one that only lingers goes to whoever comes.
//!
//! Invariants: at most `max` channels have a place; what the session listens to is either wanted and
//! active, or surplus; each wanted channel that is not active is pending, but while the session asks
//! for it; nothing here walks over all channels.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, HashSet},
    mem,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{limits::Address, publish::Target};

/// A NOTIFY channel, and where its notifications go.
#[derive(Debug)]
pub(super) struct Relayed {
    /// The channel's name, at most 63 bytes.
    pub(super) channel: Arc<str>,
    /// The user event of the broadcast.
    pub(super) user_event: Box<str>,
    /// The event's spellings and its feed.
    pub(super) target: Target,
}

/// What a viewer's channel wants to hear.
#[derive(Debug)]
pub(crate) struct Wish<'a> {
    /// The NOTIFY channel.
    pub(crate) channel: String,
    /// The user event of the broadcast.
    pub(crate) user_event: &'a str,
    /// Where the notifications of the channel go.
    pub(crate) target: &'a Target,
    /// The id of the event, if the rule has events.
    pub(crate) eid: Option<&'a str>,
    /// Whether somebody is known to have published to it.
    pub(crate) is_published: bool,
    /// The viewer's address.
    pub(crate) address: Address,
}

/// How many places there are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places {
    /// Places of all.
    pub(crate) max: usize,
    /// Most places of events that nobody knows which one address may take.
    pub(crate) per_address_max: usize,
}

/// Why a joined event is not listened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum NoPlace {
    /// Postgres would cut the name, or refuse it for its NUL.
    TooLong,
    /// All places are taken by events that have as much right to them.
    Full,
    /// Nobody knows the event, and the address has all places of such that it may have.
    Address,
    /// Nobody knew the event, and one that is known has taken its place.
    Displaced,
}

/// The channels with a place, and what the session listens to.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The channels that have a place.
    pub(super) wanted: HashMap<Arc<str>, Wanted>,
    /// Those whose place another may take, the first one first.
    pub(super) yielding: BTreeMap<Worth, Arc<str>>,
    /// How many places of unknown events each address has taken.
    pub(super) unknown: HashMap<Address, usize>,
    /// The events that the database knows.
    pub(super) known: HashSet<Box<str>>,
    /// The wanted channels that are to be listened to.
    pub(super) pending: HashSet<Arc<str>>,
    /// The channels that are listened to and not wanted.
    pub(super) surplus: HashSet<Arc<str>>,
    /// How many wanted channels are listened to.
    pub(super) active: usize,
    /// The number of the next change of a worth.
    next: u64,
}

/// What the place of a channel is worth that may have to yield it: the lowest yields first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Worth {
    /// The event is not known, and nobody holds the channel since then.
    IdleUnknown(u64),
    /// Nobody holds the channel since then.
    IdleKnown(u64),
    /// Somebody holds the channel, and nobody knows the event: who came last yields first, because
    /// a flood comes after those whom it wants to displace.
    Unknown(Reverse<u64>),
}

/// A channel with a place.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) relayed: Arc<Relayed>,
    pub(super) eid: Option<Box<str>>,
    pub(super) is_known: bool,
    /// Who took the place.
    address: Address,
    /// The channel's key among those that yield, if it is one.
    worth: Option<Worth>,
    pub(super) holders: usize,
    /// Since when nobody holds it.
    pub(super) idle_since: Option<Instant>,
    pub(super) active: watch::Sender<bool>,
    /// Since when everything on the channel has been heard, but for what a gap that is not filled
    /// yet may have hidden.
    pub(super) covered_since: Option<Instant>,
}

impl State {
    /// Makes sure that there is a place for one more channel. Returns how many viewers have lost
    /// theirs.
    ///
    /// # Errors
    /// [`NoPlace`] if no other yields.
    pub(super) fn make_room(
        &mut self,
        places: Places,
        wish: &Wish<'_>,
        is_known: bool,
    ) -> Result<usize, NoPlace> {
        let taken = self.unknown.get(&wish.address).copied().unwrap_or(0);
        if !is_known && taken >= places.per_address_max {
            return Err(NoPlace::Address);
        }
        if self.wanted.len() < places.max {
            return Ok(0);
        }
        match self.yielding.first_key_value() {
            Some((Worth::Unknown(_), _)) if !is_known => Err(NoPlace::Full),
            Some((_, channel)) => {
                let channel = Arc::clone(channel);
                Ok(self.remove(&channel))
            }
            None => Err(NoPlace::Full),
        }
    }

    /// Gives a channel that nobody holds yet a place.
    pub(super) fn insert(&mut self, wish: Wish<'_>) -> Arc<str> {
        let channel: Arc<str> = wish.channel.into();
        let relayed = Relayed {
            channel: Arc::clone(&channel),
            user_event: wish.user_event.into(),
            target: wish.target.clone(),
        };
        *self.unknown.entry(wish.address).or_default() += 1;
        self.pending.insert(Arc::clone(&channel));
        self.wanted.insert(
            Arc::clone(&channel),
            Wanted {
                relayed: Arc::new(relayed),
                eid: wish.eid.map(Box::from),
                is_known: false,
                address: wish.address,
                worth: None,
                holders: 0,
                idle_since: None,
                active: watch::Sender::new(false),
                covered_since: None,
            },
        );
        channel
    }

    /// Records that the channel's event is known: it counts for no address, and yields to nobody
    /// while somebody holds it.
    pub(super) fn know(&mut self, channel: &Arc<str>) {
        if let Some(wanted) = self.wanted.get_mut(channel)
            && !wanted.is_known
        {
            wanted.is_known = true;
            let address = wanted.address;
            self.give_back(address);
        }
        self.weigh(channel);
    }

    /// Finds out what the channel's place is worth.
    pub(super) fn weigh(&mut self, channel: &Arc<str>) {
        let Some(wanted) = self.wanted.get_mut(channel) else { return };
        self.next += 1;
        let worth = match (wanted.holders > 0, wanted.is_known) {
            // Whoever joins later does not make the others yield earlier.
            (true, false) if matches!(wanted.worth, Some(Worth::Unknown(_))) => return,
            (true, true) => None,
            (true, false) => Some(Worth::Unknown(Reverse(self.next))),
            (false, true) => Some(Worth::IdleKnown(self.next)),
            (false, false) => Some(Worth::IdleUnknown(self.next)),
        };
        if let Some(former) = mem::replace(&mut wanted.worth, worth) {
            self.yielding.remove(&former);
        }
        if let Some(worth) = worth {
            self.yielding.insert(worth, Arc::clone(channel));
        }
    }

    /// Takes a channel's place away, and returns how many held it.
    fn remove(&mut self, channel: &Arc<str>) -> usize {
        let Some(wanted) = self.wanted.remove(channel) else { return 0 };
        if let Some(worth) = wanted.worth {
            self.yielding.remove(&worth);
        }
        if !wanted.is_known {
            self.give_back(wanted.address);
        }
        self.pending.remove(channel);
        if wanted.active.send_replace(false) {
            self.active -= 1;
            self.surplus.insert(Arc::clone(channel));
        }
        wanted.holders
    }

    fn give_back(&mut self, address: Address) {
        if let Some(taken) = self.unknown.get_mut(&address) {
            *taken -= 1;
            if *taken == 0 {
                self.unknown.remove(&address);
            }
        }
    }

    /// Forgets the channels that nobody has held for `linger`.
    pub(super) fn forget_idle(&mut self, linger: Duration) {
        let now = Instant::now();
        let is_over = |channel: &&Arc<str>| {
            let since = self.wanted.get(*channel).and_then(|wanted| wanted.idle_since);
            since.is_some_and(|since| now.duration_since(since) >= linger)
        };
        // Of each kind those come first that have been idle for longest.
        let (unknown, others) = (..Worth::IdleKnown(0), Worth::IdleKnown(0)..);
        let unknown = self.yielding.range(unknown).map(|(_, channel)| channel);
        let others = self.yielding.range(others).map(|(_, channel)| channel);
        let over = unknown.take_while(is_over).chain(others.take_while(is_over));
        let over: Vec<_> = over.cloned().collect();
        for channel in over {
            self.remove(&channel);
        }
    }
}
