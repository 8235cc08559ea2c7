//! The one message that leaves a feed when its window opens.
//!
//! Invariant: the newest invalidation leaves byte for byte as it came unless something is added.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{
    journal::Delivery,
    payload::{Endpoints, Invalidation, Stamp, Stamps, Template},
    reason::{CatchUpCause, SendReason},
    window::Union,
};
use crate::{
    hub::outbox::{Committed, Departure, Since},
    protocol::serializer::Broadcast,
};

/// What a feed has to send at the moment.
#[derive(Debug)]
pub(super) enum ToSend {
    /// Nothing waits.
    Nothing,
    /// What waits may not leave yet.
    Later,
    /// This message.
    Send(Box<Outgoing>),
}

/// One message to all subscribers of a feed.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) broadcast: Broadcast,
    /// The newest invalidation of the union; `None` for a union of gaps alone.
    newest: Option<Invalidation>,
    /// The message as the feed's log records it.
    pub(super) delivery: Delivery,
    /// The earliest commit of the union.
    pub(super) committed: Option<Committed>,
    /// A moment not later than the first change of the union; `None` if no later catch-up could
    /// replace the message.
    pub(super) since: Option<Since>,
    /// How long the window has held the union back, if it has.
    pub(super) waited: Option<Duration>,
}

impl Outgoing {
    /// Composes the message of a union, which names `endpoints`; some of them are not the union's own
    /// if `is_extended`. If nothing changes, the message is the newest invalidation as it came.
    pub(super) fn of(
        union: Union,
        template: &Template,
        endpoints: Endpoints,
        is_extended: bool,
        since: Option<Since>,
        stamps: &mut Stamps,
        now: Instant,
    ) -> Self {
        let is_alone = union.messages == 1 && union.gap.is_none() && !union.is_complete;
        let is_as_it_came = is_alone && union.may_pass && !is_extended;
        let reason = match (union.gap, union.has_waited) {
            (Some(_), _) => SendReason::Gap,
            (None, true) => SendReason::Window,
            (None, false) => SendReason::Leading,
        };
        let delivery = Delivery {
            at: SystemTime::now(),
            reason,
            cause: union.gap,
            endpoint_count: endpoints.len(),
            endpoints: Arc::new(endpoints),
            merged: union.messages,
            sources: union.sources,
            deliveries: 0,
            repeats: 0,
        };
        let departure = match reason {
            SendReason::Leading => Departure::AtOnce,
            // A gap's invalidations leave with it, however late.
            SendReason::Window | SendReason::Gap | SendReason::CatchUp | SendReason::Repeat => {
                Departure::Merged
            }
        };
        let committed = union.committed.map(|at| Committed { at, departure });
        let waited = union.has_waited.then(|| now.duration_since(union.first));
        let broadcast = match &union.newest {
            Some(newest) if is_as_it_came => newest.broadcast.clone(),
            newest => {
                write(template, newest.as_ref(), &delivery, &delivery.endpoints, stamps.next())
            }
        };
        Self { broadcast, newest: union.newest, delivery, committed, since, waited }
    }

    /// Returns the same message with other endpoints.
    pub(super) fn naming(
        &self,
        template: &Template,
        endpoints: &Endpoints,
        stamp: Stamp,
    ) -> Broadcast {
        write(template, self.newest.as_ref(), &self.delivery, endpoints, stamp)
    }
}

/// Writes the newest invalidation, or a catch-up if there is none, with these endpoints.
fn write(
    template: &Template,
    newest: Option<&Invalidation>,
    delivery: &Delivery,
    endpoints: &Endpoints,
    stamp: Stamp,
) -> Broadcast {
    match newest {
        Some(newest) => template.rewritten(newest, endpoints, stamp, delivery.merged),
        None => {
            let cause = delivery.cause.map_or(delivery.reason.label(), CatchUpCause::label);
            template.catch_up(cause, endpoints, stamp)
        }
    }
}
