//! What is being written to one client: a batch of frames, the large ones of it from the bytes that
//! all their receivers share.
//!
//! Invariants: a frame is written whole, or the connection is given up; while a large frame is on
//! its way nothing else is written or read; [`Writing::poll`] may be called, dropped and called
//! again without a loss.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::Sink;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error as WsError, Message as Frame},
};

use crate::hub::outbox::Queued;

/// A longer frame is not copied into the library's buffer, which would be a copy for each of its
/// receivers.
pub(super) const COPIED_MAX: usize = 4096;
/// Longest batch whose list is kept for the next one, in frames.
const BATCH_KEPT: usize = 64;
/// Longest head of a frame of a server: two bytes, and a length of eight.
const HEAD_MAX: usize = 10;

/// A batch on its way to the client.
#[derive(Debug, Default)]
pub(super) struct Writing {
    /// What is still to be written.
    pub(super) batch: VecDeque<Queued>,
    large: Option<Box<Large>>,
    /// Grows whenever the client's system has taken something.
    progress: u64,
}

/// A large frame, and how much of it has been written.
#[derive(Debug)]
struct Large {
    head: [u8; HEAD_MAX],
    head_length: usize,
    payload: Bytes,
    written: usize,
}

impl Writing {
    /// A number that has grown if anything has been written since it was last asked for.
    pub(super) fn progress(&self) -> u64 {
        self.progress
    }

    /// Whether nothing is on its way.
    pub(super) fn is_done(&self) -> bool {
        self.batch.is_empty() && self.large.is_none()
    }

    /// Writes until the whole batch has left.
    ///
    /// # Errors
    /// That of the stream; the connection is over.
    pub(super) fn poll<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        websocket: &mut WebSocketStream<S>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), WsError>> {
        loop {
            if let Some(large) = &mut self.large {
                while large.written < large.len() {
                    let stream = Pin::new(websocket.get_mut());
                    large.written += ready!(large.poll_write(stream, context))?;
                    self.progress += 1;
                }
                self.large = None;
            }
            let Some(Queued { frame, .. }) = self.batch.front() else {
                ready!(Pin::new(&mut *websocket).poll_flush(context))?;
                if self.batch.capacity() > BATCH_KEPT {
                    self.batch = VecDeque::new();
                }
                return Poll::Ready(Ok(()));
            };
            if frame.len() > COPIED_MAX {
                // What was written before leaves before it.
                ready!(Pin::new(&mut *websocket).poll_flush(context))?;
            } else {
                ready!(Pin::new(&mut *websocket).poll_ready(context))?;
            }
            self.progress += 1;
            let Some(Queued { frame, .. }) = self.batch.pop_front() else { continue };
            match Large::of(frame) {
                Ok(large) => self.large = Some(Box::new(large)),
                Err(frame) => Pin::new(&mut *websocket).start_send(frame)?,
            }
        }
    }
}

impl Large {
    /// Returns the frame as it is written, or the frame itself if it is one for the library.
    fn of(frame: Frame) -> Result<Self, Frame> {
        if frame.len() <= COPIED_MAX {
            return Err(frame);
        }
        let (opcode, payload) = match frame {
            Frame::Text(text) => (0x1, Bytes::from(text)),
            Frame::Binary(bytes) => (0x2, bytes),
            Frame::Ping(_) | Frame::Pong(_) | Frame::Close(_) | Frame::Frame(_) => {
                return Err(frame);
            }
        };
        let mut head = [0; HEAD_MAX];
        head[0] = 0x80 | opcode;
        let head_length = match u16::try_from(payload.len()) {
            Ok(length) => {
                head[1] = 126;
                head[2..4].copy_from_slice(&length.to_be_bytes());
                4
            }
            Err(_is_longer) => {
                head[1] = 127;
                head[2..].copy_from_slice(&(payload.len() as u64).to_be_bytes());
                HEAD_MAX
            }
        };
        Ok(Self { head, head_length, payload, written: 0 })
    }

    fn len(&self) -> usize {
        self.head_length + self.payload.len()
    }

    fn poll_write<S: AsyncWrite>(
        &self,
        stream: Pin<&mut S>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let head = self.head[..self.head_length].get(self.written..).unwrap_or_default();
        let written = self.written.saturating_sub(self.head_length);
        let parts = [IoSlice::new(head), IoSlice::new(&self.payload[written..])];
        let length = ready!(stream.poll_write_vectored(context, &parts))?;
        Poll::Ready(if length > 0 { Ok(length) } else { Err(io::ErrorKind::WriteZero.into()) })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tokio::io::{AsyncReadExt, duplex};
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;
    use crate::hub::outbox::Kind;

    fn queued(frame: Frame) -> Queued {
        Queued { frame, kind: Kind::Own }
    }

    async fn write_all<S: AsyncRead + AsyncWrite + Unpin>(
        writing: &mut Writing,
        websocket: &mut WebSocketStream<S>,
    ) {
        std::future::poll_fn(|context| writing.poll(websocket, context)).await.unwrap();
    }

    #[tokio::test]
    async fn frames_of_all_lengths_arrive_whole_and_in_their_order() {
        // Less than a head fits at once, so that every place is one at which it stops.
        for room in [1, 7, 4096, 1 << 20] {
            let (server, client) = duplex(room);
            let mut server = WebSocketStream::from_raw_socket(server, Role::Server, None).await;
            let mut client = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
            let lengths = [0, 1, 125, 126, COPIED_MAX, COPIED_MAX + 1, 65_535, 65_536, 2];
            let frames = lengths.into_iter().enumerate().map(|(number, length)| {
                let letter = char::from(b'a' + u8::try_from(number).unwrap());
                let text = String::from(letter).repeat(length);
                if number % 2 == 0 { Frame::text(text) } else { Frame::binary(text) }
            });
            let frames: Vec<_> = frames.collect();
            let mut writing = Writing::default();
            writing.batch.extend(frames.iter().cloned().map(queued));
            let received = async {
                let mut received = Vec::new();
                while received.len() < frames.len() {
                    received.push(client.next().await.unwrap().unwrap());
                }
                received
            };
            let ((), received) = tokio::join!(write_all(&mut writing, &mut server), received);
            assert!(received == frames, "with room for {room}");
            assert!(writing.is_done());
        }
    }

    #[tokio::test]
    async fn a_large_frame_costs_a_socket_that_does_not_read_no_copy() {
        let (server, mut client) = duplex(64);
        let mut server = WebSocketStream::from_raw_socket(server, Role::Server, None).await;
        let (mut writing, payload) = (Writing::default(), Bytes::from(vec![b'x'; 3_000_000]));
        writing.batch.push_back(queued(Frame::binary(payload.clone())));
        let poll = std::future::poll_fn(|context| writing.poll(&mut server, context));
        assert!(futures_util::FutureExt::now_or_never(poll).is_none());
        assert!(!writing.is_done());
        let large = writing.large.as_ref().unwrap();
        assert_eq!(large.payload.as_ptr(), payload.as_ptr());
        // Nor is there one behind the library's buffer.
        let mut sent = [0; 65];
        client.read_exact(&mut sent[..64]).await.unwrap();
        let progress = writing.progress();
        let poll = std::future::poll_fn(|context| writing.poll(&mut server, context));
        assert!(futures_util::FutureExt::now_or_never(poll).is_none());
        assert!(writing.progress() > progress);
    }
}
