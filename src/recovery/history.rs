//! What the client of one socket may have missed: how its page began, and how the socket stands to
//! each topic that the database tells of.
//!
//! Invariants: a topic that the socket has asked for is remembered until the socket ends, and then
//! is lost; a socket is suspect once at most; nothing here awaits or pushes.

use std::{collections::HashMap, mem, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    client_key::ClientKey,
    healing::{Healing, Suspicion},
    lost_sockets::LostSockets,
    suspects::FIRST_ROUND,
};
use crate::{
    auth::Token,
    hub::outbox::Outbox,
    invalidation::ClientHistory,
    protocol::{
        message::{Message, Ref},
        topic::TOPIC_PREFIX,
    },
};

/// Most topics of one socket that are remembered; beyond that those without a channel are
/// forgotten.
const HELD_MAX: usize = 1_000;

/// The history of one socket's client.
#[derive(Debug)]
pub(crate) struct History {
    client: ClientKey,
    opened: Instant,
    /// When the client's last message came.
    last_data: Instant,
    first: FirstMessage,
    /// The client has asked to join anything.
    has_asked: bool,
    /// The topics that the database tells of, without `realtime:`.
    held: HashMap<Box<str>, Hold>,
    /// Set while the client may be deaf to some topic.
    suspicion: Option<Suspicion>,
}

/// What the first message of a socket tells about its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstMessage {
    /// It has not come.
    Awaited,
    /// The page was just loaded.
    Fresh,
    /// The page has had a socket before, or began with something else than a join.
    Earlier,
    /// Neither is certain.
    Unclear,
}

/// How a socket stands to a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// It has asked to join. Its channel knows whether it hears anything.
    Asked,
    /// It has heard the topic, and has left.
    Left,
}

impl FirstMessage {
    /// Reads what the first message of a socket tells.
    ///
    /// A page that was just loaded begins with a join, whose ref is the first of all; the newest
    /// clients begin at 6, without a token. Anything else comes from a page that has had a socket
    /// before, and may be deaf to what it joined there, even if it begins with a leave or with a
    /// join of something else.
    ///
    /// Source: observed of the published clients.
    fn of(first: &Message) -> Self {
        let number = match &first.reference {
            Some(Ref::Text(text) | Ref::Number(text)) => text.parse::<u64>().ok(),
            None => None,
        };
        match (&*first.event, number) {
            ("phx_join", Some(1)) => Self::Fresh,
            ("phx_join", Some(6)) if !first.payload.has_field("access_token") => Self::Fresh,
            // No client library counts like this.
            ("phx_join", None) => Self::Unclear,
            (_, _) => Self::Earlier,
        }
    }
}

impl History {
    /// Begins the history of a socket that has just opened.
    pub(crate) fn new(client: ClientKey) -> Self {
        let now = Instant::now();
        Self {
            client,
            opened: now,
            last_data: now,
            first: FirstMessage::Awaited,
            has_asked: false,
            held: HashMap::new(),
            suspicion: None,
        }
    }

    /// What the client is known by.
    pub(crate) fn client(&self) -> ClientKey {
        self.client
    }

    /// When the socket was opened.
    pub(crate) fn opened(&self) -> Instant {
        self.opened
    }

    /// When a socket that has joined nothing becomes suspect.
    pub(crate) fn suspect_at(&self) -> Instant {
        self.opened + FIRST_ROUND
    }

    /// Returns whether the socket is suspect.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspicion.is_some()
    }

    /// Records that the client has asked to join, and returns whether it had not before.
    pub(crate) fn asks_first(&mut self) -> bool {
        !mem::replace(&mut self.has_asked, true)
    }

    /// Records a message of the client, and returns how long it had been silent. A first message
    /// of a page that has had a socket before makes the socket suspect.
    pub(crate) fn hear(
        &mut self,
        message: &Message,
        healing: &Arc<Healing>,
        outbox: &Arc<Outbox>,
        token: &Arc<Token>,
    ) -> Duration {
        let now = Instant::now();
        let silence = now - mem::replace(&mut self.last_data, now);
        if self.first == FirstMessage::Awaited {
            self.first = FirstMessage::of(message);
            if self.first == FirstMessage::Earlier && self.suspicion.is_none() {
                self.suspect(healing, outbox, token);
            }
        }
        silence
    }

    /// Makes the socket suspect: it may be deaf to topics that it has not asked for.
    pub(crate) fn suspect(
        &mut self,
        healing: &Arc<Healing>,
        outbox: &Arc<Outbox>,
        token: &Arc<Token>,
    ) {
        let joined = self.asked().map(Arc::from).collect();
        let suspicion = healing.suspect(outbox, token, self.client, self.opened, joined);
        self.suspicion = Some(suspicion);
    }

    /// Returns what is known of the client and a topic that it joins. `is_heard` is whether the
    /// join replaces a channel that hears the topic.
    pub(crate) fn of(
        &self,
        sub_topic: &str,
        is_heard: bool,
        lost_sockets: &LostSockets,
    ) -> ClientHistory {
        if is_heard {
            return ClientHistory::Held;
        }
        match (self.held.get(sub_topic), self.first) {
            (Some(Hold::Left), _) => ClientHistory::Held,
            // It has asked before, and was not told what happened since.
            (Some(Hold::Asked), _) => ClientHistory::Nothing,
            (None, FirstMessage::Fresh) => ClientHistory::Fresh,
            (None, FirstMessage::Awaited | FirstMessage::Earlier | FirstMessage::Unclear) => {
                let since = lost_sockets.since(self.client, sub_topic);
                since.map_or(ClientHistory::Nothing, ClientHistory::Since)
            }
        }
    }

    /// Records how the socket stands to a topic, if the database tells of it.
    pub(crate) fn hold(
        &mut self,
        topic: &str,
        hold: Hold,
        is_listened: bool,
        has_channel: impl Fn(&str) -> bool,
    ) {
        let sub_topic = topic.strip_prefix(TOPIC_PREFIX).unwrap_or(topic);
        if let Some(held) = self.held.get_mut(sub_topic) {
            *held = hold;
        } else if is_listened {
            if self.held.len() >= HELD_MAX {
                // A topic with a channel must be remembered; any other saves a complete list at
                // best.
                self.held.retain(|held, _| has_channel(&format!("{TOPIC_PREFIX}{held}")));
            }
            self.held.insert(sub_topic.into(), hold);
        }
        match (&self.suspicion, hold) {
            // Nobody is told of any other topic.
            (Some(suspicion), Hold::Asked) if is_listened => suspicion.joined(sub_topic),
            (Some(suspicion), Hold::Left) => suspicion.left(sub_topic),
            (Some(_), Hold::Asked) | (None, Hold::Asked | Hold::Left) => {}
        }
    }

    /// Returns each topic that the socket has asked for and not left, and when its last data frame
    /// came. `has_heard` is whether a topic's channel was heard, and nothing of it was dropped: how
    /// long a client had been away before that was never answered is not known, nor what has reached
    /// one that was too slow.
    pub(crate) fn lost(
        &self,
        has_heard: impl Fn(&str) -> bool,
    ) -> impl Iterator<Item = (&str, Option<Instant>)> {
        self.asked().map(move |sub_topic| {
            let is_known = has_heard(&format!("{TOPIC_PREFIX}{sub_topic}"));
            (sub_topic, is_known.then_some(self.last_data))
        })
    }

    fn asked(&self) -> impl Iterator<Item = &str> {
        self.held.iter().filter(|(_, hold)| **hold == Hold::Asked).map(|(topic, _)| &**topic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::{Json, Payload};

    fn message(event: &str, reference: Option<&str>, payload: &str) -> Message {
        Message {
            join_ref: None,
            reference: reference.map(|text| Ref::Text(text.into())),
            topic: "realtime:room".into(),
            event: event.into(),
            payload: Payload::Json(Json::parse(payload.to_owned().into()).unwrap()),
        }
    }

    #[test]
    fn only_a_first_join_with_the_ref_of_a_first_message_is_of_a_fresh_page() {
        for (event, reference, payload, expected) in [
            ("phx_join", Some("1"), "{}", FirstMessage::Fresh),
            ("phx_join", Some("6"), "{}", FirstMessage::Fresh),
            ("phx_join", Some("6"), r#"{"access_token":"t"}"#, FirstMessage::Earlier),
            ("phx_join", Some("2"), "{}", FirstMessage::Earlier),
            ("phx_join", None, "{}", FirstMessage::Unclear),
            ("phx_join", Some("x"), "{}", FirstMessage::Unclear),
            ("heartbeat", Some("1"), "{}", FirstMessage::Earlier),
            ("phx_leave", None, "{}", FirstMessage::Earlier),
        ] {
            let first = FirstMessage::of(&message(event, reference, payload));
            assert_eq!(first, expected, "{event} {reference:?} {payload}");
        }
    }

    #[tokio::test]
    async fn topics_without_a_channel_are_forgotten_when_there_are_too_many() {
        let client = ClientKey::new(std::net::IpAddr::from([10, 0, 0, 1]).into(), "browser");
        let mut history = History::new(client);
        for number in 0..=HELD_MAX {
            let topic = format!("realtime:{number}");
            history.hold(&topic, Hold::Asked, true, |topic| topic == "realtime:7");
        }
        let mut held: Vec<_> = history.held.keys().map(|topic| &**topic).collect();
        held.sort_unstable();
        assert_eq!(held, [&*HELD_MAX.to_string(), "7"]);
    }
}
