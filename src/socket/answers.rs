//! The answers of a private channel's policies.

use crate::policies::Allowed;

/// What the policies allow on one channel, as far as they have answered.
#[derive(Debug)]
pub(super) struct Answers {
    pub(super) reads: Allowed,
    /// `None` until the policies were asked by this token.
    pub(super) writes: Option<bool>,
}

impl Answers {
    /// No answer.
    pub(super) const NOTHING: Self = Self { reads: Allowed::NONE, writes: None };

    /// Whether broadcasts may be sent.
    pub(super) fn may_write(&self) -> bool {
        self.writes == Some(true)
    }

    /// Whether presence may be read.
    pub(super) fn may_read_presence(&self) -> bool {
        self.reads.presence
    }

    /// Forgets the answer about writing, because another token is asked for. What may be read stays
    /// until the policies answer.
    pub(super) fn forget_writes(&mut self) {
        self.writes = None;
    }
}
