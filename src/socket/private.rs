//! A private channel: its queries to the database's policies, and what their answers change.
//!
//! Invariants: until the policies have said yes, nothing is read or written; an answer holds until
//! the token changes, whatever becomes of the policies; trouble with the database is never reported
//! as a denial, and never ends a channel for good.

use std::sync::Arc;

use super::{
    channel::{Channel, Context, Next},
    metrics::{Dropped, EndReason},
};
use crate::{
    policies::{Allowed, PolicyQuery, QueryError},
    protocol::{
        error_code::{ErrorCode, Refusal},
        topic::Privacy,
    },
};

impl Channel {
    /// Whether the policies decide about the channel.
    pub(super) fn is_private(&self) -> bool {
        self.privacy() == Privacy::Private
    }

    /// Whether the policies must be asked before a broadcast.
    pub(super) fn asks_before_writing(&self) -> bool {
        self.is_private() && self.policies.writes.is_none()
    }

    /// Whether the client waits for the presence of others.
    pub(super) fn wants_presence(&self) -> bool {
        self.config.presence
    }

    /// Whether the client wants the messages that were sent before, which is not offered.
    pub(super) fn wants_replay(&self) -> bool {
        self.config.replay
    }

    /// Returns a query by this channel's token.
    pub(super) fn query(&self, headers: &Arc<str>) -> PolicyQuery {
        PolicyQuery {
            token: Arc::clone(&self.token),
            sub_topic: Arc::clone(self.sub_topic()),
            headers: Arc::clone(headers),
        }
    }

    /// Admits a join by the policies' answer.
    ///
    /// # Errors
    /// [`Refusal`] if nothing may be read, or the policies gave no answer.
    pub(super) fn admit_by(mut self, reads: Result<Allowed, QueryError>) -> Result<Self, Refusal> {
        let sub_topic = self.sub_topic();
        let reads = reads.map_err(|error| error.refuse(sub_topic))?;
        if !reads.any() {
            return Err(Refusal::unauthorized(sub_topic));
        }
        if self.config.replay {
            return Err(Refusal::with_detail(
                ErrorCode::UnableToReplayMessages,
                "Realtime was unable to replay messages",
            ));
        }
        self.policies.reads = reads;
        self.may_read = reads.broadcast;
        Ok(self)
    }

    /// Applies the policies' answer for a new token to a joined channel.
    ///
    /// Source: supabase/realtime `realtime_channel.ex` `handle_in("access_token", …)` @833cf36.
    pub(super) fn take_reads(
        &mut self,
        context: Context<'_>,
        reads: Result<Allowed, QueryError>,
    ) -> Next {
        let had = self.policies.reads;
        let reads = match reads {
            Ok(reads) => reads,
            Err(error @ QueryError::Policy { .. }) => {
                return self.end_with(context, &error.refuse(self.sub_topic()));
            }
            Err(error) => {
                self.complain(context, error.refuse(self.sub_topic()).text());
                return Next::Ended(EndReason::Unanswered);
            }
        };
        if !reads.any() {
            return self.end_with(context, &Refusal::unauthorized(self.sub_topic()));
        }
        if (had.broadcast && !reads.broadcast) || (had.presence && !reads.presence) {
            let sub_topic = self.sub_topic();
            let text = format!(
                "You no longer have permission to read from this Channel topic: {sub_topic}"
            );
            return self.end_with(context, &Refusal::with_detail(ErrorCode::Unauthorized, text));
        }
        self.policies.reads = reads;
        self.may_read = reads.broadcast;
        self.follow(context);
        Next::Open
    }

    /// Records whether the policies let the channel broadcast.
    ///
    /// # Errors
    /// Without an answer the reason why the waiting messages are dropped; the policies are asked
    /// again.
    pub(super) fn take_writes(&mut self, writes: Result<bool, QueryError>) -> Result<(), Dropped> {
        self.policies.writes = Some(writes.map_err(|_counted| Dropped::WriteUnanswered)?);
        Ok(())
    }
}
