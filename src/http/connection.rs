//! One WebSocket: read, decode, hand over, drain, write; and its deadlines.
//!
//! Invariants: this task alone touches the WebSocket; a batch is written frame by frame and flushed
//! once; deadlines and the outbox's notices wait neither for frames that wait nor for a client that
//! does not read; every way out is a [`CloseReason`].

use std::{collections::VecDeque, future::poll_fn, pin::Pin, sync::Arc};

use futures_util::{FutureExt, StreamExt};
use tokio::{
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError, Message as Frame,
        protocol::{Role, WebSocketConfig},
    },
};

use super::{
    close::{CloseReason, close},
    shared::Shared,
    writing::{COPIED_MAX, Writing},
};
use crate::{
    hub::outbox::{Committed, Drained, Ended, Interruption, Notice, Outbox},
    limits::Metered,
    protocol::message::Message,
    socket::{Due, Socket},
    telemetry::{audit::Audit, metrics::GaugeGuard},
};

/// Kept per socket, so small: measured at 3.9 KiB of memory per idle socket, 6.9 with 4 KiB.
const READ_BUFFER_BYTES: usize = 1024;
/// A batch leaves in pieces of about this size; what a burst has filled stays allocated.
const WRITE_BUFFER_BYTES: usize = COPIED_MAX;
/// What the write buffer holds at most: what has not left yet, a frame behind it with its head, and
/// the library's own answers to pings and closes.
const WRITE_BUFFER_BYTES_MAX: usize = 2 * WRITE_BUFFER_BYTES + 1024;
/// Most writes after which everything else has its turn.
const WRITES_PER_TURN: usize = 16;
/// Most frames that are handled together, so that a flood does not keep its own replies waiting.
const RECEIVED_MAX: usize = 64;
/// Payload bytes after which no further frame is read into the batch.
const RECEIVED_BYTES_MAX: usize = 64 * 1024;

/// What the WebSocket yields; `None` at its end.
type Received = Option<Result<Frame, WsError>>;

/// What wakes the loop.
enum Event {
    Received(Received),
    Drained(Result<Drained, Ended>),
    Due(Due),
    Tick,
}

/// One client's connection.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    websocket: WebSocketStream<Metered<TcpStream>>,
    writing: Writing,
    outbox: Arc<Outbox>,
    socket: Socket,
    last_data: Instant,
    counted: GaugeGuard,
}

impl Connection {
    /// Takes over an upgraded stream; `read` is what came after the upgrade's head.
    pub(crate) async fn new(
        shared: Arc<Shared>,
        stream: TcpStream,
        read: Vec<u8>,
        outbox: Arc<Outbox>,
        socket: Socket,
    ) -> Self {
        let limits = shared.limits.settings();
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(WRITE_BUFFER_BYTES)
            .max_write_buffer_size(WRITE_BUFFER_BYTES_MAX)
            .max_message_size(Some(limits.message_bytes_max))
            .max_frame_size(Some(limits.message_bytes_max));
        let counted = GaugeGuard::new(&shared.metrics.connections);
        shared.metrics.accepted.inc();
        let stream = Metered::new(Arc::clone(shared.limits.metering()), stream, &read);
        let websocket =
            WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config)).await;
        let (writing, last_data) = (Writing::default(), Instant::now());
        Self { shared, websocket, writing, outbox, socket, last_data, counted }
    }

    /// Runs the connection to its end.
    #[expect(clippy::manual_async_fn, reason = "an `async fn` has room for its argument twice")]
    pub(crate) fn run(mut self) -> impl Future<Output = ()> + Send {
        async move {
            let reason = self.serve().await;
            self.end(reason).await;
        }
    }

    /// Says goodbye. Boxed: an open socket's task need not reserve space for its end.
    fn end(self, reason: CloseReason) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let metrics = &self.shared.metrics;
        metrics.closed.of(reason).inc();
        metrics.connection_seconds.observe(self.socket.opened().elapsed().as_secs_f64());
        tracing::debug!(reason = reason.label(), "connection closed");
        Audit::Close { reason: reason.label(), code: reason.code_label() }
            .note(self.socket.caller(), None);
        let Self { websocket, mut writing, socket, counted, .. } = self;
        // Its channels leave before the peer is waited for; it counts until the peer has gone.
        drop(socket);
        writing.batch = VecDeque::new();
        Box::pin(async move {
            close(websocket, writing, reason).await;
            drop(counted);
        })
    }

    async fn serve(&mut self) -> CloseReason {
        let mut writes = 0_usize;
        let tick = sleep_until(self.next_tick());
        tokio::pin!(tick);
        loop {
            let event = tokio::select! {
                // What must not wait comes first; then frames to write, the common case.
                biased;
                () = &mut tick => Event::Tick,
                drained = self.outbox.drain(&mut self.writing.batch) => Event::Drained(drained),
                received = self.websocket.next() => Event::Received(received),
                due = self.socket.due() => Event::Due(due),
            };
            let (mut step, mut received) = (Ok(()), None);
            match event {
                Event::Tick => step = self.tick(),
                Event::Drained(Ok(Drained::Notice(notice))) => self.notice(notice),
                Event::Drained(Ok(Drained::Behind(replaceable))) => {
                    self.socket.conflate(replaceable);
                }
                Event::Drained(Ok(Drained::Frames(committed))) => {
                    let is_stalled = match self.write(committed, tick.as_mut()).await {
                        Ok(is_stalled) => is_stalled,
                        Err(reason) => return reason,
                    };
                    writes = writes.wrapping_add(1);
                    // No deadline has come nearer.
                    if !is_stalled && !writes.is_multiple_of(WRITES_PER_TURN) {
                        continue;
                    }
                    // A client that is written to without a pause is still heard and answered.
                    if let Some(due) = self.socket.due().now_or_never() {
                        Box::pin(self.socket.answer(due)).await;
                    }
                    received = self.websocket.next().now_or_never();
                }
                Event::Drained(Err(ended)) => step = Err(ended.into()),
                Event::Received(first) => received = Some(first),
                Event::Due(due) => Box::pin(self.socket.answer(due)).await,
            }
            if let Some(received) = received {
                step = self.receive(received).await;
            }
            if let Err(reason) = step {
                return reason;
            }
            self.set(tick.as_mut());
        }
    }

    /// Sets the timer to the next deadline. One that has moved away is found out when the timer
    /// fires; only a nearer one needs it set.
    fn set(&self, tick: Pin<&mut Sleep>) {
        let next = self.next_tick();
        if next < tick.deadline() || tick.is_elapsed() {
            tick.reset(next);
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Nudged => self.socket.review(),
            Notice::Overflowed(topic) => self.socket.overflowed(topic),
        }
    }

    /// Handles a received frame together with those that have arrived behind it.
    async fn receive(&mut self, first: Received) -> Result<(), CloseReason> {
        let mut messages: Vec<Message> = Vec::new();
        let mut end = self.read(first, &mut messages);
        for _ in 1..RECEIVED_MAX {
            let bytes = messages.iter().map(|message| message.payload.len()).sum::<usize>();
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
            Some(Err(error)) => return Err(CloseReason::from(&error)),
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
        let metrics = &self.shared.metrics;
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
                metrics.malformed.of(malformed).inc();
                tracing::debug!(reason = malformed.label(), "malformed frame");
            }
        }
        Ok(())
    }

    /// Writes a batch; `committed` is when the oldest of it was committed. Returns whether the client
    /// had to be waited for.
    async fn write(
        &mut self,
        committed: Option<Committed>,
        tick: Pin<&mut Sleep>,
    ) -> Result<bool, CloseReason> {
        let (metrics, batch) = (&self.shared.metrics, &self.writing.batch);
        metrics.frames_out.inc_by(batch.len() as u64);
        let bytes = batch.iter().map(|queued| queued.frame.len()).sum::<usize>();
        metrics.bytes_out.inc_by(bytes as u64);
        let is_replaceable = batch.iter().all(|queued| queued.kind.replaceable().is_some());
        let Self { writing, websocket, .. } = self;
        let written = poll_fn(|context| writing.poll(websocket, context)).now_or_never();
        // Nearly every write fits into the system's buffer: only one that does not needs a timer,
        // and room for it.
        let is_stalled = written.is_none();
        let result = match written {
            Some(written) => written.map_err(|error| CloseReason::from(&error)),
            None => {
                let result = Box::pin(self.wait_for_client(is_replaceable, tick)).await;
                // Nothing was read meanwhile.
                self.websocket.get_mut().forgive();
                if result.is_err() {
                    // What it has not read may have changed long before it was last heard of.
                    self.outbox.end(Ended::SlowConsumer);
                }
                result
            }
        };
        if result.is_ok()
            && let Some(committed) = committed
        {
            self.shared.metrics.count_write(committed);
        }
        result.map(|()| is_stalled)
    }

    /// Waits for a write that does not fit into the system's buffer, and gives the client up that
    /// takes nothing for too long. A client has longer as long as everything that waits for it is
    /// replaceable: then the wait costs nobody a message, and a close would make old clients deaf.
    /// Deadlines and the outbox's notices do not wait.
    async fn wait_for_client(
        &mut self,
        is_replaceable: bool,
        mut tick: Pin<&mut Sleep>,
    ) -> Result<(), CloseReason> {
        let shared = Arc::clone(&self.shared);
        let limits = shared.limits.settings();
        let (mut has_longer, mut is_ending) = (is_replaceable, false);
        let mut longest =
            if has_longer { limits.merged_write_timeout } else { limits.write_timeout };
        let (mut progress, mut deadline) = (self.writing.progress(), Instant::now() + longest);
        loop {
            let Self { writing, websocket, outbox, socket, .. } = self;
            tokio::select! {
                biased;
                () = &mut tick => self.tick()?,
                interruption = outbox.interrupted(has_longer, is_ending) => match interruption {
                    Interruption::Notice(notice) => self.notice(notice),
                    Interruption::HeldUp => {
                        (has_longer, longest) = (false, limits.write_timeout);
                        deadline = deadline.min(Instant::now() + longest);
                    }
                    Interruption::Ended(Ended::SlowConsumer) => {
                        return Err(CloseReason::SlowConsumer);
                    }
                    Interruption::Ended(Ended::Draining) => {
                        (has_longer, is_ending) = (false, true);
                        deadline = deadline.min(Instant::now() + limits.write_timeout);
                    }
                },
                due = socket.due() => Box::pin(socket.answer(due)).await,
                written = poll_fn(|context| writing.poll(websocket, context)) => {
                    return written.map_err(|error| CloseReason::from(&error));
                }
                () = sleep_until(deadline) => {
                    let now = self.writing.progress();
                    if is_ending {
                        return Err(CloseReason::Draining);
                    } else if now == progress {
                        return Err(CloseReason::WriteTimeout);
                    }
                    // It reads, if slowly.
                    (progress, deadline) = (now, Instant::now() + longest);
                }
            }
            self.set(tick.as_mut());
        }
    }

    fn tick(&mut self) -> Result<(), CloseReason> {
        let limits = self.shared.limits.settings();
        if self.silent_at() <= Instant::now() {
            return Err(CloseReason::Silent);
        }
        if self
            .socket
            .empty_since()
            .is_some_and(|since| since.elapsed() >= limits.no_channel_timeout)
        {
            return Err(CloseReason::NoChannels);
        }
        self.socket.tick();
        Ok(())
    }

    /// When the client is closed for its silence. It has twice the time if it has sent something
    /// that is read only once it has taken what is being written.
    fn silent_at(&self) -> Instant {
        let timeout = self.shared.limits.settings().silence_timeout;
        let silent_at = self.last_data + timeout;
        let has_longer = silent_at <= Instant::now() && self.has_unread();
        if has_longer { silent_at + timeout } else { silent_at }
    }

    /// Whether the client has sent something that is not read, because it is being written to.
    fn has_unread(&self) -> bool {
        let is_waited_for = !self.writing.is_done();
        let mut byte = [0];
        let peeked = self.websocket.get_ref().stream().peek(&mut byte).now_or_never();
        is_waited_for && peeked.is_some_and(|peeked| peeked.is_ok_and(|length| length > 0))
    }

    fn next_tick(&self) -> Instant {
        let limits = self.shared.limits.settings();
        let silence = self.silent_at();
        let empty = self.socket.empty_since().map(|since| since + limits.no_channel_timeout);
        let tick = Instant::now() + self.socket.next_tick(limits.silence_timeout);
        tick.min(silence).min(empty.unwrap_or(silence))
    }
}
