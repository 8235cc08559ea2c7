//! One WebSocket: read, decode, hand over, drain, write; its deadlines and why it ended.
//!
//! Invariants: this task alone touches the WebSocket; a batch is fed frame by frame and flushed
//! once, under the write deadline; every way out is a [`CloseReason`].

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError, Message as Frame,
        error::ProtocolError,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    hub::outbox::{Committed, Drained, Ended, Outbox, Queued},
    limits::{self, Metered, is_unfinished},
    metrics::Counted,
    protocol::message::Message,
    server::Services,
    socket::{Due, Socket},
    telemetry::audit::Audit,
};

/// Kept per socket, so small: measured at 3.9 KiB of memory per idle socket, 6.9 with 4 KiB.
const READ_BUFFER_BYTES: usize = 1024;
/// A batch leaves in pieces of about this size; what a burst has filled stays allocated.
const WRITE_BUFFER_BYTES: usize = 4096;
/// Most writes without a look at what has been received.
const WRITES_PER_READ: usize = 16;
/// How long a peer may take to answer a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Most frames that are handled together, so that a flood does not keep its own replies waiting.
const RECEIVED_MAX: usize = 64;
/// No more are read once so many bytes of payload have been.
const RECEIVED_BYTES_MAX: usize = 64 * 1024;
/// A batch's list is kept for the next one up to so many frames.
const BATCH_KEPT: usize = 64;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Peer(_) => "peer",
            Self::PeerGone => "peer_gone",
            Self::Silent => "silent",
            Self::NoChannels => "no_channels",
            Self::SlowConsumer => "slow_consumer",
            Self::WriteTimeout => "write_timeout",
            Self::Unfinished => "unfinished",
            Self::TooLarge => "too_large",
            Self::Protocol => "protocol",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::Draining => "draining",
        }
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

impl From<Ended> for CloseReason {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::SlowConsumer => Self::SlowConsumer,
            Ended::Draining => Self::Draining,
        }
    }
}

/// What the WebSocket gives; nothing at its end.
type Received = Option<Result<Frame, WsError>>;

/// What the loop can be woken by.
enum Event {
    Received(Received),
    Drained(Result<Drained, Ended>),
    Due(Due),
    Tick,
}

/// One client's connection.
pub(crate) struct Connection {
    services: Arc<Services>,
    websocket: WebSocketStream<Metered<TcpStream>>,
    outbox: Arc<Outbox>,
    socket: Socket,
    last_data: Instant,
    counted: Counted,
}

impl Connection {
    /// Takes over an upgraded stream; `read` is what came after the upgrade's head.
    pub(crate) async fn new(
        services: Arc<Services>,
        stream: TcpStream,
        read: Vec<u8>,
        outbox: Arc<Outbox>,
        socket: Socket,
    ) -> Self {
        let limits = services.limits.settings();
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(WRITE_BUFFER_BYTES)
            // A batch is at most an outbox and one frame of any size, which is a message of ours
            // or a client's and its envelope.
            .max_write_buffer_size(
                WRITE_BUFFER_BYTES
                    + 2 * (limits.outbox_bytes_max
                        + limits.message_bytes_max
                        + limits.payload_bytes_max),
            )
            .max_message_size(Some(limits.message_bytes_max))
            .max_frame_size(Some(limits.message_bytes_max));
        let counted = Counted::new(&services.metrics.connections);
        services.metrics.connections_accepted.inc();
        let stream = Metered::new(Arc::clone(services.limits.metering()), stream, &read);
        let websocket =
            WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config)).await;
        Self { services, websocket, outbox, socket, last_data: Instant::now(), counted }
    }

    /// Runs the connection to its end.
    #[expect(clippy::manual_async_fn, reason = "an `async fn` has room for its argument twice")]
    pub(crate) fn run(mut self) -> impl Future<Output = ()> + Send {
        async move {
            let reason = self.serve().await;
            self.end(reason).await;
        }
    }

    /// Says goodbye, in a place of its own: an open socket's task need not have room for its end.
    fn end(self, reason: CloseReason) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let labels = [reason.kind(), reason.code_label()];
        let metrics = &self.services.metrics;
        metrics.connections_closed.with_label_values(&labels).inc();
        metrics.connection_seconds.observe(self.socket.opened().elapsed().as_secs_f64());
        tracing::debug!(reason = reason.kind(), "connection closed");
        Audit::Close { reason: reason.kind(), code: reason.code_label() }
            .note(self.socket.caller(), None);
        let Self { websocket, socket, counted, .. } = self;
        // Its channels leave before the peer is waited for; it counts until the peer has gone.
        drop(socket);
        Box::pin(async move {
            close(websocket, reason).await;
            drop(counted);
        })
    }

    async fn serve(&mut self) -> CloseReason {
        let (mut batch, mut writes) = (Vec::new(), 0_usize);
        let tick = sleep_until(self.next_tick());
        tokio::pin!(tick);
        loop {
            let event = tokio::select! {
                // What is there to be written is the common case, so the rest is not asked first.
                biased;
                drained = self.outbox.drain(&mut batch) => Event::Drained(drained),
                received = self.websocket.next() => Event::Received(received),
                due = self.socket.due() => Event::Due(due),
                () = &mut tick => Event::Tick,
            };
            let step = match event {
                Event::Drained(Ok(Drained::Nudged)) => {
                    self.socket.review();
                    Ok(())
                }
                Event::Drained(Ok(Drained::Behind(replaceable))) => {
                    self.socket.conflate(replaceable);
                    Ok(())
                }
                Event::Drained(Ok(Drained::Frames(committed))) => {
                    if let Err(reason) = self.write(&mut batch, committed).await {
                        return reason;
                    }
                    writes = writes.wrapping_add(1);
                    // No deadline has come nearer. Who is written to without a pause is still
                    // heard now and then.
                    if !writes.is_multiple_of(WRITES_PER_READ) {
                        continue;
                    }
                    match self.websocket.next().now_or_never() {
                        Some(received) => self.receive(received).await,
                        None => continue,
                    }
                }
                Event::Drained(Err(ended)) => Err(ended.into()),
                Event::Received(received) => self.receive(received).await,
                Event::Due(due) => {
                    Box::pin(self.socket.answer(due)).await;
                    Ok(())
                }
                Event::Tick => self.tick(),
            };
            if let Err(reason) = step {
                return reason;
            }
            // Deadlines that move away are found out when the timer fires; only a nearer one
            // needs it set.
            let next = self.next_tick();
            if next < tick.deadline() || tick.is_elapsed() {
                tick.as_mut().reset(next);
            }
        }
    }

    /// Handles what has been received, and what has come behind it, together.
    async fn receive(&mut self, first: Received) -> Result<(), CloseReason> {
        let mut messages: Vec<Message> = Vec::new();
        let mut end = self.read(first, &mut messages);
        for _ in 1..RECEIVED_MAX {
            let bytes = messages.iter().map(|it| it.payload.len()).sum::<usize>();
            if end.is_err() || bytes > RECEIVED_BYTES_MAX {
                break;
            }
            let Some(received) = self.websocket.next().now_or_never() else {
                break;
            };
            end = self.read(received, &mut messages);
        }
        self.socket.handle(messages).await;
        end
    }

    fn read(&mut self, received: Received, messages: &mut Vec<Message>) -> Result<(), CloseReason> {
        let frame = match received {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Err(broken(&error)),
            None => return Err(CloseReason::PeerGone),
        };
        match frame {
            Frame::Text(_) | Frame::Binary(_) => {}
            // Answered by the library. They do not count as a sign of life: a frozen page's
            // socket answers pings while its messages are lost.
            Frame::Ping(_) | Frame::Pong(_) | Frame::Frame(_) => return Ok(()),
            Frame::Close(frame) => {
                return Err(CloseReason::Peer(frame.map(|frame| frame.code.into())));
            }
        }
        self.last_data = Instant::now();
        let metrics = &self.services.metrics;
        metrics.frames_in.inc();
        metrics.bytes_in.inc_by(frame.len() as u64);
        match self.outbox.serializer().decode(frame) {
            Ok(message) => {
                if &*message.event == "phx_join" {
                    self.websocket.get_mut().count_join();
                }
                messages.push(message);
            }
            Err(malformed) => {
                metrics.malformed.with_label_values(&[malformed.kind()]).inc();
                tracing::debug!(reason = malformed.kind(), "malformed frame");
            }
        }
        Ok(())
    }

    /// Writes a batch, the oldest of which was committed then.
    async fn write(
        &mut self,
        batch: &mut Vec<Queued>,
        committed: Option<Committed>,
    ) -> Result<(), CloseReason> {
        let metrics = &self.services.metrics;
        metrics.frames_out.inc_by(batch.len() as u64);
        metrics.bytes_out.inc_by(batch.iter().map(|it| it.frame.len()).sum::<usize>() as u64);
        let is_replaceable = batch.iter().all(|it| it.replaceable.is_some());
        let (websocket, mut is_stalled) = (&mut self.websocket, false);
        let written = {
            let mut write = pin!(async {
                for Queued { frame, .. } in batch.drain(..) {
                    websocket.feed(frame).await?;
                }
                websocket.flush().await
            });
            // Nearly every write fits into the system's buffer: only one that does not needs a
            // timer, and room for it.
            match write.as_mut().now_or_never() {
                Some(written) => Some(written),
                None => {
                    is_stalled = true;
                    let limits = self.services.limits.settings();
                    Box::pin(in_time(write, &self.outbox, limits, is_replaceable)).await
                }
            }
        };
        if is_stalled {
            // Nothing was read meanwhile.
            self.websocket.get_mut().forgive();
        }
        if batch.capacity() > BATCH_KEPT {
            *batch = Vec::new();
        }
        let result = match written {
            Some(Ok(())) => {
                if let Some(committed) = committed {
                    self.services.metrics.count_write(committed);
                }
                Ok(())
            }
            Some(Err(error)) => Err(broken(&error)),
            None => Err(self.outbox.ended().map_or(CloseReason::WriteTimeout, CloseReason::from)),
        };
        if is_stalled && result.is_err() {
            // What it has not read may have changed long before it was last heard of.
            self.outbox.end(Ended::SlowConsumer);
        }
        result
    }

    fn tick(&mut self) -> Result<(), CloseReason> {
        let limits = self.services.limits.settings();
        if self.last_data.elapsed() >= limits.silence_timeout {
            return Err(CloseReason::Silent);
        }
        if self.socket.empty_since().is_some_and(|it| it.elapsed() >= limits.no_channel_timeout) {
            return Err(CloseReason::NoChannels);
        }
        self.socket.tick();
        Ok(())
    }

    fn next_tick(&self) -> Instant {
        let limits = self.services.limits.settings();
        let silence = self.last_data + limits.silence_timeout;
        let empty = self.socket.empty_since().map(|since| since + limits.no_channel_timeout);
        let tick = Instant::now() + self.socket.next_tick(limits.silence_timeout);
        tick.min(silence).min(empty.unwrap_or(silence))
    }
}

/// What a write comes to that does not fit into the system's buffer; nothing if it takes too long.
/// A client has longer as long as everything that waits for it is replaceable: then nobody misses
/// anything by waiting, and to be closed makes old clients deaf.
///
/// The write is not dropped before it has ended, unless the connection is given up.
async fn in_time<W: Future>(
    mut write: Pin<&mut W>,
    outbox: &Outbox,
    limits: &limits::Settings,
    is_replaceable: bool,
) -> Option<W::Output> {
    let mut has_longer = is_replaceable;
    let longest = if has_longer { limits.merged_write_timeout } else { limits.write_timeout };
    let mut deadline = Instant::now() + longest;
    loop {
        tokio::select! {
            biased;
            written = write.as_mut() => return Some(written),
            () = outbox.holds_up(), if has_longer => {
                has_longer = false;
                deadline = deadline.min(Instant::now() + limits.write_timeout);
            }
            () = sleep_until(deadline) => return None,
        }
    }
}

/// Says goodbye and waits, for a while, until the peer has: what is sent to a closed socket would
/// reset the connection before the peer has read the close frame.
async fn close(mut websocket: WebSocketStream<Metered<TcpStream>>, reason: CloseReason) {
    let goodbye = async {
        match reason {
            // The library has queued the answer to the peer's close frame.
            CloseReason::Peer(_) => while websocket.next().await.is_some_and(|it| it.is_ok()) {},
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
                if websocket.close(Some(frame)).await.is_ok() {
                    let (stream, mut rest) = (websocket.get_mut().unmetered(), [0; 512]);
                    while stream.read(&mut rest).await.is_ok_and(|length| length > 0) {}
                }
            }
        }
    };
    // A peer that does not answer is left.
    let _ = timeout(CLOSE_TIMEOUT, goodbye).await;
}

fn broken(error: &WsError) -> CloseReason {
    match error {
        WsError::Capacity(_) => CloseReason::TooLarge,
        WsError::Io(error) if is_unfinished(error) => CloseReason::Unfinished,
        WsError::Utf8(_) => CloseReason::InvalidUtf8,
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake)
        | WsError::ConnectionClosed
        | WsError::AlreadyClosed
        | WsError::Io(_) => CloseReason::PeerGone,
        WsError::WriteBufferFull(_) => CloseReason::SlowConsumer,
        WsError::Protocol(_) => CloseReason::Protocol,
        // Not raised by an open WebSocket; the list is the library's and open.
        _ => CloseReason::Protocol,
    }
}
