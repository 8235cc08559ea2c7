//! A client's stream, metered below the WebSocket library, which hides the frames of a message and
//! answers pings itself.
//!
//! A client that sends too much is read more slowly; nothing is lost, refused or closed for it. What
//! has been read beyond a limit is owed, and nothing more is read until waiting has paid for it.
//! Every frame counts as a message, so that neither pings nor empty fragments are free.
//!
//! Invariants: nothing is written otherwise than as given; a socket that keeps within its limits
//! and sends whole messages needs no timer.

use std::{
    io,
    num::NonZeroU32,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use super::{
    frames::{FrameCount, Frames},
    metrics::{Limited, Metrics},
    rate::{BURST_SECONDS, limiter},
    settings::Settings,
};
use crate::clock::Limiter;

/// What a client may send at once beside the largest message.
const BURST_BYTES: usize = 64 * 1024;

/// A message has taken too long from its first byte to its last.
#[derive(Debug, thiserror::Error)]
#[error("a message was not finished in time")]
struct Unfinished;

/// Whether a stream has failed because a message was not finished in time.
pub(crate) fn is_unfinished(error: &io::Error) -> bool {
    error.get_ref().and_then(|inner| inner.downcast_ref::<Unfinished>()).is_some()
}

/// What all metered streams of a server share.
#[derive(Debug)]
pub(crate) struct Metering {
    pub(super) settings: Settings,
    pub(super) metrics: Metrics,
}

/// A stream whose input is metered.
#[derive(Debug)]
pub(crate) struct Metered<S> {
    limits: Arc<Metering>,
    stream: S,
    bytes: Meter,
    messages: Meter,
    joins: Meter,
    frames: Frames,
    /// When the message that is being received began, or was last held up by us.
    begun: Option<Instant>,
    /// Nothing is read until what is owed has been paid for.
    is_held: bool,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Metered<S> {
    /// Meters what is read from `stream`; `read` has been read from it already.
    pub(crate) fn new(metering: Arc<Metering>, stream: S, read: &[u8]) -> Self {
        let limits = &metering.settings;
        let bytes = limits.message_bytes_max.saturating_add(BURST_BYTES);
        let mut metered = Self {
            stream,
            bytes: Meter::new(limiter(limits.socket_bytes_per_second_max, 0, bytes)),
            messages: Meter::new(limiter(limits.socket_messages_per_second_max, BURST_SECONDS, 0)),
            // A client that comes back joins all its topics at once.
            joins: Meter::new(limiter(
                limits.socket_joins_per_second_max,
                BURST_SECONDS,
                limits.channels_per_socket_max,
            )),
            frames: Frames::default(),
            begun: None,
            is_held: false,
            timer: None,
            limits: metering,
        };
        metered.count(read);
        metered
    }

    /// Counts a join, which only who reads messages can tell.
    pub(crate) fn count_join(&mut self) {
        self.joins.take(1);
    }

    /// Restarts the client's deadline, because its socket was not read for a while.
    pub(crate) fn forgive(&mut self) {
        if self.begun.is_some() {
            self.begun = Some(Instant::now());
        }
    }

    /// The stream, which is not to be read.
    pub(crate) fn stream(&self) -> &S {
        &self.stream
    }

    /// The stream itself, for what nobody counts any more.
    pub(crate) fn unmetered(&mut self) -> &mut S {
        &mut self.stream
    }

    fn count(&mut self, read: &[u8]) {
        let FrameCount { frames, has_ended } = self.frames.count(read);
        self.bytes.take(read.len());
        self.messages.take(frames);
        if has_ended {
            self.begun = None;
        }
        if !self.frames.is_open {
            self.begun = None;
        } else if self.begun.is_none() {
            self.begun = Some(Instant::now());
        }
    }

    /// Until when nothing more is read, and for what.
    fn held_until(&mut self) -> Option<(Instant, Limited)> {
        for (meter, limited) in [
            (&mut self.bytes, Limited::SocketBytes),
            (&mut self.messages, Limited::SocketMessages),
            (&mut self.joins, Limited::SocketJoins),
        ] {
            if let Some(until) = meter.owes_until() {
                return Some((until, limited));
            }
        }
        None
    }

    fn deadline(&self) -> Option<Instant> {
        self.begun.map(|begun| begun + self.limits.settings.message_timeout)
    }

    fn poll_until(&mut self, context: &mut Context<'_>, until: Instant) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if timer.deadline() != until {
            timer.as_mut().reset(until);
        }
        ready!(timer.as_mut().poll(context));
        self.timer = None;
        Poll::Ready(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while let Some((until, limited)) = this.held_until() {
            if !this.is_held {
                this.is_held = true;
                this.limits.metrics.limited.of(limited).inc();
            }
            ready!(this.poll_until(context, until));
        }
        if this.is_held {
            this.is_held = false;
            this.forgive();
        }
        let before = buffer.filled().len();
        match Pin::new(&mut this.stream).poll_read(context, buffer) {
            Poll::Ready(Ok(())) => {
                this.count(buffer.filled().get(before..).unwrap_or_default());
                if this.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                    return Poll::Ready(Err(io::Error::other(Unfinished)));
                }
                // What there is to wait for is found out when there is nothing to read.
                this.timer = None;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                let Some(deadline) = this.deadline() else {
                    this.timer = None;
                    return Poll::Pending;
                };
                ready!(this.poll_until(context, deadline));
                Poll::Ready(Err(io::Error::other(Unfinished)))
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A rate that is paid for afterwards.
#[derive(Debug)]
struct Meter {
    limiter: Option<Limiter>,
    owed: u32,
}

impl Meter {
    fn new(limiter: Option<Limiter>) -> Self {
        Self { limiter, owed: 0 }
    }

    fn take(&mut self, count: usize) {
        if self.limiter.is_some() {
            self.owed = self.owed.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        }
    }

    /// Pays what the limiter allows. Returns when the next part can be paid, if some is left.
    fn owes_until(&mut self) -> Option<Instant> {
        let limiter = self.limiter.as_ref()?;
        while let Some(owed) = NonZeroU32::new(self.owed) {
            // More than a burst is paid in parts.
            let (part, paid) = match limiter.check_n(owed) {
                Ok(paid) => (owed, paid),
                Err(too_much) => {
                    let part = NonZeroU32::new(too_much.0)?;
                    (part, limiter.check_n(part).ok()?)
                }
            };
            match paid {
                Ok(()) => self.owed -= part.get(),
                Err(not_until) => return Some(not_until.earliest_possible().into()),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::JoinSet,
    };

    use super::*;
    use crate::{
        limits::frames::tests::{GOES_ON, PING, TEXT, TEXT_BEGINS, frame},
        server::settings::Config,
        telemetry::metrics::Registry,
    };

    fn metered(set: impl FnOnce(&mut Settings)) -> (DuplexStream, Metered<DuplexStream>) {
        let mut settings = Config::defaults().limits;
        settings.message_bytes_max = 1000;
        set(&mut settings);
        let metering = Arc::new(Metering { settings, metrics: Metrics::new(&Registry::new()) });
        let (client, server) = duplex(1 << 20);
        (client, Metered::new(metering, server, &[]))
    }

    /// What is read until nothing comes for `patience`, or the error; and how long it took.
    async fn read_all(
        stream: &mut Metered<DuplexStream>,
        patience: Duration,
    ) -> (usize, Option<io::Error>) {
        let (mut bytes, mut buffer) = (0, [0; 1024]);
        loop {
            match tokio::time::timeout(patience, stream.read(&mut buffer)).await {
                Err(_elapsed) => return (bytes, None),
                Ok(Ok(length)) => bytes += length,
                Ok(Err(error)) => return (bytes, Some(error)),
            }
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn bytes_over_the_budget_wait_and_none_is_lost() {
        let (mut client, mut server) = metered(|limits| {
            limits.socket_bytes_per_second_max = 1000;
            limits.socket_messages_per_second_max = 0;
        });
        let sent = frame(TEXT, 80_000);
        client.write_all(&sent).await.unwrap();
        let before = Instant::now();
        assert_eq!(read_all(&mut server, 2 * SECOND).await.0, sent.len());
        // At once: the largest message and 64 KiB.
        let seconds = (before.elapsed() - 2 * SECOND).as_secs();
        assert!((12..=14).contains(&seconds), "{seconds}");
        assert!(server.limits.metrics.limited.of(Limited::SocketBytes).get() > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn pings_and_empty_fragments_count_as_messages() {
        for flood in [frame(PING, 0), frame(GOES_ON, 0), frame(TEXT, 0)] {
            let (mut client, mut server) =
                metered(|limits| limits.socket_messages_per_second_max = 100);
            client.write_all(&flood.repeat(2000)).await.unwrap();
            let before = Instant::now();
            assert_eq!(read_all(&mut server, 3 * SECOND).await.0, 2000 * flood.len());
            let seconds = (before.elapsed() - 3 * SECOND).as_secs();
            assert!(
                (8..=10).contains(&seconds),
                "a thousand at once, then a hundred a second: {seconds}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn within_the_limits_nothing_waits_and_no_timer_is_made() {
        let (mut client, mut server) = metered(|_| {});
        client.write_all(&frame(TEXT, 4).repeat(1000)).await.unwrap();
        let before = Instant::now();
        assert_eq!(read_all(&mut server, SECOND).await.0, 10_000);
        assert_eq!(before.elapsed(), SECOND);
        assert!(server.timer.is_none() && server.begun.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_joins_as_channels_pass_at_once() {
        let (mut client, mut server) = metered(|limits| {
            limits.socket_joins_per_second_max = 1;
            limits.channels_per_socket_max = 50;
        });
        for _ in 0..50 {
            server.count_join();
        }
        assert_eq!(server.held_until(), None);
        server.count_join();
        client.write_all(&frame(TEXT, 1)).await.unwrap();
        let before = Instant::now();
        assert_eq!(server.read(&mut [0; 64]).await.unwrap(), 7);
        let waited = before.elapsed();
        assert!(waited >= SECOND && waited < SECOND + SECOND / 10, "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_is_not_finished_in_time_is_an_error_whatever_stands_between() {
        let (mut client, mut server) = metered(|limits| limits.message_timeout = 10 * SECOND);
        let mut clients = JoinSet::new();
        clients.spawn(async move {
            client.write_all(&frame(TEXT_BEGINS, 3)).await.unwrap();
            loop {
                tokio::time::sleep(SECOND).await;
                let more = [frame(PING, 0), frame(GOES_ON, 0), frame(GOES_ON, 1)].concat();
                if client.write_all(&more).await.is_err() {
                    return;
                }
            }
        });
        let before = Instant::now();
        let (_, error) = read_all(&mut server, 5 * SECOND).await;
        assert!(is_unfinished(&error.unwrap()));
        assert_eq!(before.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn neither_pings_nor_whole_messages_nor_silence_are_unfinished() {
        let (mut client, mut server) = metered(|limits| limits.message_timeout = 2 * SECOND);
        let mut clients = JoinSet::new();
        clients.spawn(async move {
            for _ in 0..30 {
                tokio::time::sleep(SECOND).await;
                // Half a ping, and its rest a second later.
                let (half, rest) = (frame(PING, 9)[..7].to_vec(), frame(PING, 9)[7..].to_vec());
                client.write_all(&half).await.unwrap();
                tokio::time::sleep(SECOND).await;
                client.write_all(&[rest, frame(TEXT, 9)].concat()).await.unwrap();
            }
            client
        });
        let (bytes, error) = read_all(&mut server, 40 * SECOND).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!(bytes, 30 * 30);
    }

    /// Else a large message of a client that has used up its budget could never be finished.
    #[tokio::test(start_paused = true)]
    async fn the_time_in_which_we_hold_it_up_is_not_the_clients() {
        let (mut client, mut server) = metered(|limits| {
            limits.message_timeout = SECOND;
            limits.socket_bytes_per_second_max = 1000;
        });
        let sent = frame(TEXT, 100_000);
        client.write_all(&sent).await.unwrap();
        let (bytes, error) = read_all(&mut server, 2 * SECOND).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!(bytes, sent.len());
    }

    #[test]
    fn metering_costs_a_socket_little() {
        assert!(size_of::<Metered<()>>() <= 224, "{}", size_of::<Metered<()>>());
    }
}
