//! Why a connection ended, and how the peer is told.
//!
//! Invariant: every way out of a connection is a [`CloseReason`], with its close code and its labels.

use std::{future::poll_fn, time::Duration};

use futures_util::StreamExt;
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError,
        error::ProtocolError,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use super::writing::Writing;
use crate::{
    hub::outbox::Ended,
    limits::{Metered, is_unfinished},
    telemetry::metrics::Label,
};

/// How long a peer may take to answer a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum CloseReason {
    /// The peer said goodbye, with this code.
    Peer(Option<u16>),
    /// The peer went away without a word.
    PeerGone,
    /// No data frame for too long.
    Silent,
    /// All channels have gone.
    NoChannels,
    /// The outbox overflowed.
    SlowConsumer,
    /// A write missed its deadline.
    WriteTimeout,
    /// A message that was begun and not finished in time.
    Unfinished,
    /// A message above the bound.
    TooLarge,
    /// The peer broke the WebSocket protocol.
    Protocol,
    /// A text frame that is not UTF-8.
    #[strum(serialize = "invalid_utf8")]
    InvalidUtf8,
    /// The server drains.
    Draining,
}

impl CloseReason {
    /// Every reason; of the peer's, one for each label of its code.
    pub fn all() -> impl Iterator<Item = Self> {
        // RFC 6455 reserves 4000 and above for what applications agree on: the label is `other`.
        let codes = [1000, 1001, 1002, 1003, 1005, 1007, 1008, 1009, 1011, 1012, 1013, 4000];
        let peers = codes.into_iter().map(Some).chain([None]).map(Self::Peer);
        peers.chain([
            Self::PeerGone,
            Self::Silent,
            Self::NoChannels,
            Self::SlowConsumer,
            Self::WriteTimeout,
            Self::Unfinished,
            Self::TooLarge,
            Self::Protocol,
            Self::InvalidUtf8,
            Self::Draining,
        ])
    }

    /// The reason as metrics and logs name it.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// The code that the peer is sent, or has sent.
    fn code(self) -> Option<u16> {
        match self {
            Self::Peer(code) => code,
            // Nothing can be said to a peer that does not read.
            Self::PeerGone | Self::WriteTimeout => None,
            Self::Silent | Self::NoChannels => Some(1000),
            Self::Protocol => Some(1002),
            Self::InvalidUtf8 => Some(1007),
            Self::SlowConsumer | Self::Unfinished => Some(1008),
            Self::TooLarge => Some(1009),
            Self::Draining => Some(1012),
        }
    }

    /// The code as a label: those of the RFC; a peer's own are `other`.
    #[must_use]
    pub fn code_label(self) -> &'static str {
        match self.code() {
            None => "none",
            Some(1000) => "1000",
            Some(1001) => "1001",
            Some(1002) => "1002",
            Some(1003) => "1003",
            Some(1005) => "1005",
            Some(1007) => "1007",
            Some(1008) => "1008",
            Some(1009) => "1009",
            Some(1011) => "1011",
            Some(1012) => "1012",
            Some(1013) => "1013",
            Some(_) => "other",
        }
    }
}

/// `reason` and `code`.
impl Label<2> for CloseReason {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        Self::all().map(|reason| reason.values())
    }

    fn values(&self) -> [&'static str; 2] {
        [self.label(), self.code_label()]
    }
}

impl From<Ended> for CloseReason {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::SlowConsumer => Self::SlowConsumer,
            Ended::Draining => Self::Draining,
        }
    }
}

impl From<&WsError> for CloseReason {
    fn from(error: &WsError) -> Self {
        match error {
            WsError::Capacity(_) => Self::TooLarge,
            WsError::Io(error) if is_unfinished(error) => Self::Unfinished,
            WsError::Utf8(_) => Self::InvalidUtf8,
            WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake)
            | WsError::ConnectionClosed
            | WsError::AlreadyClosed
            | WsError::Io(_) => Self::PeerGone,
            WsError::WriteBufferFull(_) => Self::SlowConsumer,
            WsError::Protocol(_) => Self::Protocol,
            // Not raised by an open WebSocket; the list is the library's and open.
            _ => Self::Protocol,
        }
    }
}

/// Says goodbye, once the frame that is on its way has left, and waits, for a while, until the peer
/// has: what is sent to a closed socket would reset the connection before the peer has read the
/// close frame.
pub(super) async fn close(
    mut websocket: WebSocketStream<Metered<TcpStream>>,
    mut writing: Writing,
    reason: CloseReason,
) {
    let goodbye = async {
        match reason {
            // The library has queued the answer to the peer's close frame.
            CloseReason::Peer(_) => {
                while websocket.next().await.is_some_and(|frame| frame.is_ok()) {}
            }
            CloseReason::PeerGone | CloseReason::WriteTimeout => {}
            CloseReason::Silent
            | CloseReason::NoChannels
            | CloseReason::SlowConsumer
            | CloseReason::Unfinished
            | CloseReason::TooLarge
            | CloseReason::Protocol
            | CloseReason::InvalidUtf8
            | CloseReason::Draining => {
                let code = CloseCode::from(reason.code().unwrap_or(1011));
                let frame = CloseFrame { code, reason: "".into() };
                let written = poll_fn(|context| writing.poll(&mut websocket, context)).await;
                if written.is_ok() && websocket.close(Some(frame)).await.is_ok() {
                    let (stream, mut rest) = (websocket.get_mut().unmetered(), [0; 512]);
                    while stream.read(&mut rest).await.is_ok_and(|length| length > 0) {}
                }
            }
        }
    };
    // A peer that does not answer is left.
    let _ = timeout(CLOSE_TIMEOUT, goodbye).await;
}
