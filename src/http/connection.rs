//! One WebSocket: read, decode, hand over, drain, write; and its deadlines.
//!
//! Invariants: this task alone touches the WebSocket; a batch is fed frame by frame and flushed
//! once, under the write deadline; every way out is a [`CloseReason`].

use std::{
    pin::{Pin, pin},
    sync::Arc,
};

use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until},
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
};
use crate::{
    hub::outbox::{Committed, Drained, Ended, Outbox, Queued},
    limits::{Metered, Settings},
    protocol::message::Message,
    socket::{Due, Socket},
    telemetry::{audit::Audit, metrics::GaugeGuard},
};

/// Kept per socket, so small: measured at 3.9 KiB of memory per idle socket, 6.9 with 4 KiB.
const READ_BUFFER_BYTES: usize = 1024;
/// A batch leaves in pieces of about this size; what a burst has filled stays allocated.
const WRITE_BUFFER_BYTES: usize = 4096;
/// Most writes between two reads.
const WRITES_PER_READ: usize = 16;
/// Most frames that are handled together, so that a flood does not keep its own replies waiting.
const RECEIVED_MAX: usize = 64;
/// Payload bytes after which no further frame is read into the batch.
const RECEIVED_BYTES_MAX: usize = 64 * 1024;
/// Longest list of a batch that is kept for the next one, in frames.
const BATCH_KEPT: usize = 64;

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
        let counted = GaugeGuard::new(&shared.metrics.connections);
        shared.metrics.accepted.inc();
        let stream = Metered::new(Arc::clone(shared.limits.metering()), stream, &read);
        let websocket =
            WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config)).await;
        Self { shared, websocket, outbox, socket, last_data: Instant::now(), counted }
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
                // Frames to write are the common case, so they are polled first.
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
                    // No deadline has come nearer. A client that is written to without a pause is
                    // still read now and then.
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

    /// Writes a batch; `committed` is when the oldest of it was committed.
    async fn write(
        &mut self,
        batch: &mut Vec<Queued>,
        committed: Option<Committed>,
    ) -> Result<(), CloseReason> {
        let metrics = &self.shared.metrics;
        metrics.frames_out.inc_by(batch.len() as u64);
        metrics
            .bytes_out
            .inc_by(batch.iter().map(|queued| queued.frame.len()).sum::<usize>() as u64);
        let is_replaceable = batch.iter().all(|queued| queued.replaceable.is_some());
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
                    let limits = self.shared.limits.settings();
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
                    self.shared.metrics.count_write(committed);
                }
                Ok(())
            }
            Some(Err(error)) => Err(CloseReason::from(&error)),
            None => Err(self.outbox.ended().map_or(CloseReason::WriteTimeout, CloseReason::from)),
        };
        if is_stalled && result.is_err() {
            // What it has not read may have changed long before it was last heard of.
            self.outbox.end(Ended::SlowConsumer);
        }
        result
    }

    fn tick(&mut self) -> Result<(), CloseReason> {
        let limits = self.shared.limits.settings();
        if self.last_data.elapsed() >= limits.silence_timeout {
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

    fn next_tick(&self) -> Instant {
        let limits = self.shared.limits.settings();
        let silence = self.last_data + limits.silence_timeout;
        let empty = self.socket.empty_since().map(|since| since + limits.no_channel_timeout);
        let tick = Instant::now() + self.socket.next_tick(limits.silence_timeout);
        tick.min(silence).min(empty.unwrap_or(silence))
    }
}

/// Waits for a write that does not fit into the system's buffer; returns `None` if it takes too long.
/// A client has longer as long as everything that waits for it is replaceable: then the wait costs
/// nobody a message, and a close would make old clients deaf.
///
/// The write is dropped before its end only if the connection is given up.
async fn in_time<W: Future>(
    mut write: Pin<&mut W>,
    outbox: &Outbox,
    limits: &Settings,
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
