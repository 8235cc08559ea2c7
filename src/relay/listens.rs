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

use crate::{access::NOTIFY_CHANNEL_BYTES_MAX, publish::Target, telemetry::metrics::CounterBy};

/// Most UNLISTENs at a time, each an exchange with the server while joins wait for their LISTENs.
const UNLISTENS_MAX: usize = 16;

/// A NOTIFY channel, and where its notifications go.
#[derive(Debug)]
pub(super) struct Relayed {
    /// The channel's name, at most 63 bytes.
    pub(super) channel: Box<str>,
    /// The user event of the broadcast.
    pub(super) user_event: Box<str>,
    /// The event's spellings and its feed.
    pub(super) target: Target,
}

/// The channels that are wanted.
#[derive(Debug)]
pub(crate) struct Listens {
    state: Mutex<State>,
    changed: Notify,
    max: usize,
    wait: Duration,
    refused: CounterBy<ListenError>,
}

#[derive(Debug, Default)]
struct State {
    wanted: HashMap<Box<str>, Wanted>,
    /// How many of them somebody holds.
    held: usize,
}

#[derive(Debug)]
struct Wanted {
    relayed: Arc<Relayed>,
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
pub(crate) struct ListenGuard {
    listens: Arc<Listens>,
    relayed: Arc<Relayed>,
    active: watch::Receiver<bool>,
}

/// Why an event that is joined cannot be listened to.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, strum::VariantArray, strum::IntoStaticStr,
)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum ListenError {
    /// Postgres would cut the name.
    #[error("name longer than {NOTIFY_CHANNEL_BYTES_MAX} bytes")]
    TooLong,
    /// All places are held.
    #[error("too many channels")]
    Full,
}

/// What the session has to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) listen: Vec<Box<str>>,
    pub(crate) unlisten: Vec<Box<str>>,
}

impl Listens {
    /// Creates room for `max` channels; a join waits for its LISTEN for at most `wait`. `refused`
    /// counts the channels that find no room.
    pub(crate) fn new(max: usize, wait: Duration, refused: CounterBy<ListenError>) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), max, wait, refused }
    }

    /// How long a join waits for its LISTEN at most.
    pub(crate) fn wait(&self) -> Duration {
        self.wait
    }

    /// Holds a NOTIFY channel, and has it listened to. Its notifications go to the `target` of the
    /// first holder.
    ///
    /// # Errors
    /// [`ListenError`], which is counted; the event's other sources still reach its viewers.
    pub(crate) fn hold(
        self: &Arc<Self>,
        channel: Box<str>,
        user_event: &str,
        target: &Target,
    ) -> Result<ListenGuard, ListenError> {
        let held = self.try_hold(channel, user_event, target);
        if let Err(error) = &held {
            self.refused.of(*error).inc();
        }
        held
    }

    fn try_hold(
        self: &Arc<Self>,
        channel: Box<str>,
        user_event: &str,
        target: &Target,
    ) -> Result<ListenGuard, ListenError> {
        if channel.len() > NOTIFY_CHANNEL_BYTES_MAX {
            return Err(ListenError::TooLong);
        }
        let (listening, is_new) = {
            let mut state = self.state.lock();
            let State { wanted, held } = &mut *state;
            let entry = wanted.get(&channel);
            let (is_new, is_held) =
                (entry.is_none(), entry.is_some_and(|wanted| wanted.holders > 0));
            if !is_held && *held >= self.max || is_new && wanted.len() >= 2 * self.max {
                return Err(ListenError::Full);
            }
            let entry = wanted.entry(channel).or_insert_with_key(|channel| Wanted {
                relayed: Arc::new(Relayed {
                    channel: channel.clone(),
                    user_event: user_event.into(),
                    target: target.clone(),
                }),
                holders: 0,
                idle_since: None,
                active: watch::Sender::new(false),
                covered_since: None,
            });
            *held += usize::from(!is_held);
            entry.holders += 1;
            entry.idle_since = None;
            let listening = ListenGuard {
                listens: Arc::clone(self),
                relayed: Arc::clone(&entry.relayed),
                active: entry.active.subscribe(),
            };
            (listening, is_new)
        };
        if is_new {
            self.changed.notify_one();
        }
        Ok(listening)
    }

    /// Where notifications on `channel` go, if anybody has asked for it.
    pub(super) fn relayed(&self, channel: &str) -> Option<Arc<Relayed>> {
        self.state.lock().wanted.get(channel).map(|wanted| Arc::clone(&wanted.relayed))
    }

    /// Waits until a channel is wanted that was not.
    ///
    /// # Cancel safety
    /// A wake-up that nobody has taken is kept.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns the channels to listen to, and some of those to unlisten, which nobody has held for
    /// `linger` and which are forgotten here. While more are remembered than may be held, nothing
    /// lingers.
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

    /// Records that these channels are listened to, and wakes the joins that wait for them. Returns
    /// those that were not listened to before, not by an earlier session either.
    pub(super) fn activate(&self, channels: &[Box<str>]) -> Vec<Arc<Relayed>> {
        let mut state = self.state.lock();
        let mut fresh = Vec::new();
        for channel in channels {
            if let Some(wanted) = state.wanted.get_mut(channel) {
                if wanted.covered_since.is_none() {
                    wanted.covered_since = Some(Instant::now());
                    fresh.push(Arc::clone(&wanted.relayed));
                }
                wanted.active.send_replace(true);
            }
        }
        fresh
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
        for wanted in self.state.lock().wanted.values() {
            wanted.active.send_replace(false);
        }
    }
}

impl ListenGuard {
    /// Whether the channel is listened to.
    #[must_use]
    pub(crate) fn is_active(&self) -> bool {
        *self.active.borrow()
    }

    /// Since when everything on the channel has been heard.
    pub(crate) fn covered_since(&self) -> Option<Instant> {
        self.listens.covered_since(&self.relayed.channel)
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

impl Drop for ListenGuard {
    fn drop(&mut self) {
        let mut state = self.listens.state.lock();
        let State { wanted, held } = &mut *state;
        if let Some(wanted) = wanted.get_mut(&self.relayed.channel) {
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
    use crate::{
        hub::Hub, invalidation::Feeds, protocol::topic::Privacy, publish::Publisher,
        telemetry::metrics::Registry,
    };

    const LINGER: Duration = Duration::from_secs(60);

    fn listens(max: usize) -> Arc<Listens> {
        let refused = Registry::new().counter_by("refused", ["reason"], "Refused.");
        Arc::new(Listens::new(max, Duration::ZERO, refused))
    }

    fn hold(listens: &Arc<Listens>, channel: &str) -> Result<ListenGuard, ListenError> {
        let registry = Registry::new();
        let hub = Arc::new(Hub::new(&registry));
        let publisher = Publisher::new(Arc::clone(&hub), Arc::new(Feeds::new(9, hub, &registry)));
        listens.hold(channel.into(), "e", &publisher.target("t", Privacy::Public, None))
    }

    #[tokio::test(start_paused = true)]
    async fn a_channel_is_listened_to_once_and_lingers_after_its_last_holder() {
        let listens = listens(9);
        let (first, second) = (hold(&listens, "a").unwrap(), hold(&listens, "a").unwrap());
        let listen = listens.changes(LINGER).listen;
        assert_eq!(listen, ["a".into()]);
        assert_eq!(listens.activate(&listen).len(), 1);
        assert!(first.is_active() && second.is_active());
        assert_eq!(listens.changes(LINGER), Changes::default());
        drop((first, second));
        assert_eq!(listens.changes(LINGER), Changes::default());
        tokio::time::advance(LINGER).await;
        assert_eq!(listens.changes(LINGER).unlisten, ["a".into()]);
        assert!(listens.relayed("a").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_viewer_who_comes_back_in_time_keeps_the_listen() {
        let listens = listens(9);
        drop(hold(&listens, "a").unwrap());
        tokio::time::advance(LINGER / 2).await;
        let _back = hold(&listens, "a").unwrap();
        tokio::time::advance(LINGER).await;
        assert!(listens.changes(LINGER).unlisten.is_empty());
    }

    #[test]
    fn the_number_of_channels_and_their_length_are_bounded() {
        let listens = listens(1);
        let _held = hold(&listens, &"a".repeat(63)).unwrap();
        assert_eq!(hold(&listens, "b").unwrap_err(), ListenError::Full);
        assert_eq!(hold(&listens, &"a".repeat(64)).unwrap_err(), ListenError::TooLong);
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_lingers_makes_room_for_who_comes() {
        let listens = listens(1);
        drop(hold(&listens, "a").unwrap());
        drop(listens.activate(&["a".into()]));
        let _held = hold(&listens, "b").unwrap();
        let changes = listens.changes(LINGER);
        assert_eq!((changes.listen, changes.unlisten), (vec!["b".into()], vec!["a".into()]));
        assert_eq!(hold(&listens, "c").unwrap_err(), ListenError::Full);
    }

    #[tokio::test]
    async fn a_lost_session_makes_channels_wait_again() {
        let listens = listens(9);
        let held = hold(&listens, "a").unwrap();
        drop(listens.activate(&["a".into()]));
        held.activation().await;
        listens.deactivate_all();
        assert!(!held.is_active());
        assert_eq!(listens.changes(LINGER).listen, ["a".into()]);
    }
}
