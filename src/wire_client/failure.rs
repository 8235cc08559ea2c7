//! What can go wrong with a client's WebSocket or with one of its channels.
//!
//! The texts are the rows of the bench's list of failures and part of the doctor's findings.

use std::io;

use super::frame::FrameError;

/// A failure of one socket, or of one of its channels.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("connect: {0}")]
    Connect(io::ErrorKind),
    #[error("handshake: deadline")]
    HandshakeDeadline,
    #[error("handshake: answered {0}")]
    Refused(u16),
    #[error("handshake: not a WebSocket's answer")]
    Handshake,
    #[error("join: deadline")]
    JoinDeadline,
    #[error("join: {0}")]
    JoinRefused(String),
    #[error("publish: {0}")]
    PublishRefused(String),
    #[error("publish: never acknowledged")]
    Unacknowledged,
    #[error("channel: {0}")]
    ChannelEnded(String),
    #[error("system: {0}")]
    System(String),
    #[error("frame: not understood")]
    NotUnderstood,
    #[error("frame: {0}")]
    Frame(#[from] FrameError),
    #[error("closed without a close frame")]
    Closed,
    #[error("closed with {0}")]
    ClosedWith(u16),
    #[error("lost: {0}")]
    Lost(io::ErrorKind),
    #[error("write: deadline")]
    WriteDeadline,
}

impl Failure {
    /// Returns the failure of a stream that cannot be read or written any more.
    #[expect(clippy::needless_pass_by_value, reason = "it is passed to map_err")]
    pub(crate) fn lost(error: io::Error) -> Self {
        Self::Lost(error.kind())
    }
}
