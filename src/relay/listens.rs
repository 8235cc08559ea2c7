//! Which NOTIFY channels somebody wants, and which of them are active.
//!
//! Channels of joined events are held by their viewers' channels; a LISTEN outlives its last
//! holder by `linger`, so that a page reload does not cost one. Nothing but what rules name can
//! get in here: this is the allow-list.
//!
//! Invariants: at most `max` channels are held, and at most twice as many are remembered; a channel
//! is forgotten only by the session's [`Listens::changes`], so that what it listens to is known.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{
    access::rule::NOTIFY_CHANNEL_BYTES_MAX, invalidation::Feed, protocol::topic::TopicKey,
};

/// Most UNLISTENs of one look, each an exchange with the server while joins wait for theirs.
const UNLISTENS_MAX: usize = 16;

/// A NOTIFY channel and where its notifications go.
#[derive(Debug)]
pub struct Source {
    /// The channel's name, at most 63 bytes.
    pub channel: Box<str>,
    /// The user event of the broadcast.
    pub user_event: Box<str>,
    /// One for each spelling of the event.
    pub topics: Vec<TopicKey>,
    /// The event, where the rule merges.
    pub(crate) event: Option<Arc<Feed>>,
}

/// The channels that are wanted.
#[derive(Debug)]
pub struct Listens {
    state: Mutex<State>,
    changed: Notify,
    max: usize,
}

#[derive(Debug, Default)]
struct State {
    wanted: HashMap<Box<str>, Wanted>,
    /// How many of them somebody holds.
    held: usize,
}

#[derive(Debug)]
struct Wanted {
    source: Arc<Source>,
    holders: usize,
    /// Since when nobody holds it.
    idle_since: Option<Instant>,
    active: watch::Sender<bool>,
    /// Since when everything on the channel has been heard, but for what a gap that is not filled
    /// yet may have hidden.
    covered_since: Option<Instant>,
}

/// A viewer's hold on a NOTIFY channel; dropping it lets go.
#[derive(Debug)]
pub struct Listening {
    listens: Arc<Listens>,
    source: Arc<Source>,
    active: watch::Receiver<bool>,
}

/// Why an event that is joined cannot be listened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unlistenable {
    /// Postgres would cut the name.
    #[error("name longer than {NOTIFY_CHANNEL_BYTES_MAX} bytes")]
    TooLong,
    /// All places are held.
    #[error("too many channels")]
    Full,
}

impl Unlistenable {
    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::Full => "full",
        }
    }
}

/// What the session has to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) listen: Vec<Box<str>>,
    pub(crate) unlisten: Vec<Box<str>>,
}

impl Listens {
    /// At most `max` channels.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), max }
    }

    /// Holds a NOTIFY channel, and has it listened to.
    ///
    /// # Errors
    /// [`Unlistenable`]; the event's other sources still reach its viewers.
    pub fn hold(self: &Arc<Self>, source: Source) -> Result<Listening, Unlistenable> {
        if source.channel.len() > NOTIFY_CHANNEL_BYTES_MAX {
            return Err(Unlistenable::TooLong);
        }
        let (listening, is_new) = {
            let mut state = self.state.lock();
            let State { wanted, held } = &mut *state;
            let entry = wanted.get(&source.channel);
            let (is_new, is_held) = (entry.is_none(), entry.is_some_and(|it| it.holders > 0));
            if !is_held && *held >= self.max || is_new && wanted.len() >= 2 * self.max {
                return Err(Unlistenable::Full);
            }
            let entry = wanted.entry(source.channel.clone()).or_insert_with(|| Wanted {
                source: Arc::new(source),
                holders: 0,
                idle_since: None,
                active: watch::Sender::new(false),
                covered_since: None,
            });
            *held += usize::from(!is_held);
            entry.holders += 1;
            entry.idle_since = None;
            let listening = Listening {
                listens: Arc::clone(self),
                source: Arc::clone(&entry.source),
                active: entry.active.subscribe(),
            };
            (listening, is_new)
        };
        if is_new {
            self.changed.notify_one();
        }
        Ok(listening)
    }

    /// Where notifications on `channel` go, if anybody wanted it.
    pub(crate) fn source(&self, channel: &str) -> Option<Arc<Source>> {
        self.state.lock().wanted.get(channel).map(|wanted| Arc::clone(&wanted.source))
    }

    /// Waits until a channel is wanted that was not.
    ///
    /// # Cancel safety
    /// A wake-up that nobody has taken is kept.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What differs from what the session listens to: channels to listen to, and some of the
    /// channels that nobody has held for `linger`, which are forgotten here. While more are
    /// remembered than may be held, nothing lingers.
    pub(crate) fn changes(&self, linger: Duration) -> Changes {
        let now = Instant::now();
        let mut changes = Changes::default();
        let mut state = self.state.lock();
        let mut surplus = state.wanted.len().saturating_sub(self.max);
        state.wanted.retain(|channel, wanted| {
            let is_active = *wanted.active.borrow();
            let is_over = wanted
                .idle_since
                .is_some_and(|since| surplus > 0 || now.duration_since(since) >= linger);
            match (is_over, is_active) {
                (true, true) if changes.unlisten.len() >= UNLISTENS_MAX => return true,
                (true, true) => changes.unlisten.push(channel.clone()),
                (false, false) => changes.listen.push(channel.clone()),
                (true, false) | (false, true) => {}
            }
            surplus = surplus.saturating_sub(usize::from(is_over));
            !is_over
        });
        changes
    }

    /// Says that these channels are listened to, and wakes who waits for them. Gives those that
    /// were not before, not by an earlier session either.
    pub(crate) fn activate(&self, channels: &[Box<str>]) -> Vec<Arc<Source>> {
        let mut state = self.state.lock();
        let mut fresh = Vec::new();
        for channel in channels {
            if let Some(wanted) = state.wanted.get_mut(channel) {
                if wanted.covered_since.is_none() {
                    wanted.covered_since = Some(Instant::now());
                    fresh.push(Arc::clone(&wanted.source));
                }
                wanted.active.send_replace(true);
            }
        }
        fresh
    }

    /// The channels that were listened to, by this session or an earlier one.
    pub(crate) fn covered(&self) -> Vec<Arc<Source>> {
        let state = self.state.lock();
        let covered = state.wanted.values().filter(|it| it.covered_since.is_some());
        covered.map(|it| Arc::clone(&it.source)).collect()
    }

    /// Says that not everything on the channel has been heard up to now.
    pub(crate) fn cover_anew(&self, channel: &str) {
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
        self.state.lock().wanted.get(channel).is_some_and(|it| *it.active.borrow())
    }

    /// Says that no channel is listened to: the session is gone.
    pub(crate) fn deactivate_all(&self) {
        for wanted in self.state.lock().wanted.values() {
            wanted.active.send_replace(false);
        }
    }
}

impl Listening {
    /// Whether the channel is listened to.
    #[must_use]
    pub fn is_active(&self) -> bool {
        *self.active.borrow()
    }

    /// Since when everything on the channel has been heard.
    pub(crate) fn covered_since(&self) -> Option<Instant> {
        self.listens.covered_since(&self.source.channel)
    }

    /// Waits, apart from this hold, until the channel is listened to.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) fn activation(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut active = self.active.clone();
        async move {
            // The sender lives as long as somebody holds the channel; if it has gone, nobody waits.
            let _ = active.wait_for(|active| *active).await;
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut state = self.listens.state.lock();
        let State { wanted, held } = &mut *state;
        if let Some(wanted) = wanted.get_mut(&self.source.channel) {
            wanted.holders -= 1;
            if wanted.holders == 0 {
                wanted.idle_since = Some(Instant::now());
                *held -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINGER: Duration = Duration::from_secs(60);

    fn source(channel: &str) -> Source {
        Source { channel: channel.into(), user_event: "e".into(), topics: Vec::new(), event: None }
    }

    #[tokio::test(start_paused = true)]
    async fn a_channel_is_listened_to_once_and_lingers_after_its_last_holder() {
        let listens = Arc::new(Listens::new(9));
        let (first, second) =
            (listens.hold(source("a")).unwrap(), listens.hold(source("a")).unwrap());
        let listen = listens.changes(LINGER).listen;
        assert_eq!(listen, ["a".into()]);
        assert_eq!(listens.activate(&listen).len(), 1);
        assert!(first.is_active() && second.is_active());
        assert_eq!(listens.changes(LINGER), Changes::default());
        drop((first, second));
        assert_eq!(listens.changes(LINGER), Changes::default());
        tokio::time::advance(LINGER).await;
        assert_eq!(listens.changes(LINGER).unlisten, ["a".into()]);
        assert!(listens.source("a").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_viewer_who_comes_back_in_time_keeps_the_listen() {
        let listens = Arc::new(Listens::new(9));
        drop(listens.hold(source("a")).unwrap());
        tokio::time::advance(LINGER / 2).await;
        let _back = listens.hold(source("a")).unwrap();
        tokio::time::advance(LINGER).await;
        assert!(listens.changes(LINGER).unlisten.is_empty());
    }

    #[test]
    fn the_number_of_channels_and_their_length_are_bounded() {
        let listens = Arc::new(Listens::new(1));
        let _held = listens.hold(source(&"a".repeat(63))).unwrap();
        assert_eq!(listens.hold(source("b")).unwrap_err(), Unlistenable::Full);
        assert_eq!(listens.hold(source(&"a".repeat(64))).unwrap_err(), Unlistenable::TooLong);
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_lingers_makes_room_for_who_comes() {
        let listens = Arc::new(Listens::new(1));
        drop(listens.hold(source("a")).unwrap());
        drop(listens.activate(&["a".into()]));
        let _held = listens.hold(source("b")).unwrap();
        let changes = listens.changes(LINGER);
        assert_eq!((changes.listen, changes.unlisten), (vec!["b".into()], vec!["a".into()]));
        assert_eq!(listens.hold(source("c")).unwrap_err(), Unlistenable::Full);
    }

    #[tokio::test]
    async fn a_lost_session_makes_channels_wait_again() {
        let listens = Arc::new(Listens::new(9));
        let held = listens.hold(source("a")).unwrap();
        drop(listens.activate(&["a".into()]));
        held.activation().await;
        listens.deactivate_all();
        assert!(!held.is_active());
        assert_eq!(listens.changes(LINGER).listen, ["a".into()]);
    }
}
