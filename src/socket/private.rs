//! A private channel: what it asks the database's policies, and what it does with their answers.
//!
//! Invariants: until the policies have said yes, nothing is read or written; an answer holds until
//! the token changes, whatever becomes of the policies; trouble with the database is never told as a
//! no, and never ends a channel for good.

use std::sync::Arc;

use super::channel::{Channel, Context, EndReason, Fate};
use crate::{
    metrics::Dropped,
    policies::{Allowed, PolicyQuery, QueryError},
    protocol::{
        error_code::{ErrorCode, Refusal},
        topic::Privacy,
    },
};

/// What a private channel's policies have answered.
#[derive(Debug)]
pub(super) struct Answers {
    reads: Allowed,
    /// None until it was asked about by this token.
    writes: Option<bool>,
}

impl Answers {
    /// Nothing.
    pub(super) const NOTHING: Self = Self { reads: Allowed::NONE, writes: None };

    /// Whether broadcasts may be sent.
    pub(super) fn may_write(&self) -> bool {
        self.writes == Some(true)
    }

    /// Whether presence may be read.
    pub(super) fn may_read_presence(&self) -> bool {
        self.reads.presence
    }

    /// By another token the policies are asked anew. What may be read stays until they answer.
    pub(super) fn forget_writes(&mut self) {
        self.writes = None;
    }
}

impl Channel {
    /// Whether the policies decide about it.
    pub(crate) fn is_private(&self) -> bool {
        self.key.privacy == Privacy::Private
    }

    /// Whether the policies must be asked before a broadcast.
    pub(crate) fn asks_before_writing(&self) -> bool {
        self.is_private() && self.policies.writes.is_none()
    }

    /// Whether the client waits for the presence of others.
    pub(crate) fn wants_presence(&self) -> bool {
        self.config.presence
    }

    /// Whether the client wants what was sent before, which is not offered.
    pub(crate) fn wants_replay(&self) -> bool {
        self.config.replay
    }

    /// A question of this channel's.
    pub(crate) fn asking(&self, headers: &Arc<str>) -> PolicyQuery {
        PolicyQuery {
            token: Arc::clone(&self.token),
            sub_topic: self.sub_topic(),
            headers: Arc::clone(headers),
        }
    }

    /// What the policies' answer makes of a join.
    ///
    /// # Errors
    /// [`Refusal`] if nothing may be read, or nobody knows.
    pub(crate) fn admit_by(mut self, reads: Result<Allowed, QueryError>) -> Result<Self, Refusal> {
        let sub_topic = &self.key.sub_topic;
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

    /// Does what the policies say of a joined channel by its new token.
    ///
    /// Source: supabase/realtime `realtime_channel.ex` `handle_in("access_token", …)` @833cf36.
    pub(crate) fn take_reads(
        &mut self,
        context: Context<'_>,
        reads: Result<Allowed, QueryError>,
    ) -> Fate {
        let had = self.policies.reads;
        let reads = match reads {
            Ok(reads) => reads,
            Err(error @ QueryError::Policy { .. }) => {
                return self.end_with(context, &error.refuse(&self.key.sub_topic));
            }
            Err(error) => {
                self.complain(context, error.refuse(&self.key.sub_topic).text());
                return Fate::Ended(EndReason::Unanswered);
            }
        };
        if !reads.any() {
            return self.end_with(context, &Refusal::unauthorized(&self.key.sub_topic));
        }
        if (had.broadcast && !reads.broadcast) || (had.presence && !reads.presence) {
            let sub_topic = &self.key.sub_topic;
            let text = format!(
                "You no longer have permission to read from this Channel topic: {sub_topic}"
            );
            return self.end_with(context, &Refusal::with_detail(ErrorCode::Unauthorized, text));
        }
        self.policies.reads = reads;
        self.may_read = reads.broadcast;
        self.follow(context);
        Fate::Open
    }

    /// Remembers whether the policies let it broadcast. Without an answer what has waited for it is
    /// dropped, and they are asked again.
    pub(crate) fn take_writes(&mut self, writes: Result<bool, QueryError>) -> Result<(), Dropped> {
        self.policies.writes = Some(writes.map_err(|_counted| Dropped::WriteUnanswered)?);
        Ok(())
    }
}
