//! A client's stream, metered below the WebSocket library: that hides the frames of a message, and
//! answers pings itself.
//!
//! Whoever sends too much is read more slowly; nothing is lost, refused or closed for it. What has
//! been read beyond a limit is owed, and nothing more is read until it has been paid for by
//! waiting. Every frame counts as a message, so that neither pings nor empty fragments are free.
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

use super::{BURST_SECONDS, Limited, limiter};
use crate::clock::Limiter;
use crate::server::Services;

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

/// A stream whose input is metered.
#[derive(Debug)]
pub(crate) struct Metered<S> {
    services: Arc<Services>,
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
    /// Meters what `stream` gives; `read` has been read from it already.
    pub(crate) fn new(services: Arc<Services>, stream: S, read: &[u8]) -> Self {
        let limits = &services.config.limits;
        let bytes = limits.message_bytes_max.saturating_add(BURST_BYTES);
        let mut metered = Self {
            stream,
            bytes: Meter::new(limiter(limits.socket_bytes_per_second_max, 0, bytes)),
            messages: Meter::new(limiter(limits.socket_messages_per_second_max, BURST_SECONDS, 0)),
            // Whoever comes back joins everything at once.
            joins: Meter::new(limiter(
                limits.socket_joins_per_second_max,
                BURST_SECONDS,
                limits.channels_per_socket_max,
            )),
            frames: Frames::default(),
            begun: None,
            is_held: false,
            timer: None,
            services,
        };
        metered.count(read);
        metered
    }

    /// Counts a join, which only who reads messages can tell.
    pub(crate) fn count_join(&mut self) {
        self.joins.take(1);
    }

    /// Gives the client its time again, because it was not read for a while.
    pub(crate) fn forgive(&mut self) {
        if self.begun.is_some() {
            self.begun = Some(Instant::now());
        }
    }

    /// The stream itself, for what nobody counts any more.
    pub(crate) fn unmetered(&mut self) -> &mut S {
        &mut self.stream
    }

    fn count(&mut self, read: &[u8]) {
        let Counted { frames, has_ended } = self.frames.count(read);
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
        self.begun.map(|begun| begun + self.services.config.limits.message_timeout)
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
                this.services.metrics.count_limited(limited);
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
                if this.deadline().is_some_and(|it| it <= Instant::now()) {
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

    /// Pays what can be paid; gives when more can be, if that is not all.
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

/// What bytes have begun and ended.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    frames: usize,
    has_ended: bool,
}

/// Where frames and messages begin and end in what a client sends. Whether they are right is for
/// the library to say, which reads the same bytes.
#[derive(Debug, Default)]
struct Frames {
    /// Of the frame's header, read and in all; equal between two frames and in a payload.
    header_read: u8,
    header_length: u8,
    /// Where the header goes on behind the length.
    mask_at: u8,
    /// FIN and opcode.
    first: u8,
    /// Bytes of the payload that are still to come.
    left: u64,
    /// A message has begun and not ended.
    is_open: bool,
}

impl Frames {
    /// Source: RFC 6455, section 5.2.
    fn count(&mut self, mut bytes: &[u8]) -> Counted {
        let mut counted = Counted::default();
        while let Some((&byte, rest)) = bytes.split_first() {
            if self.header_read == self.header_length && self.left > 0 {
                let skipped =
                    usize::try_from(self.left).map_or(bytes.len(), |it| it.min(bytes.len()));
                bytes = bytes.get(skipped..).unwrap_or_default();
                self.left -= skipped as u64;
            } else {
                bytes = rest;
                self.read_header(byte, &mut counted);
            }
            let is_whole = self.header_read == self.header_length && self.left == 0;
            if is_whole && self.is_data() && self.first & 0x80 != 0 {
                self.is_open = false;
                counted.has_ended = true;
            }
        }
        counted
    }

    fn read_header(&mut self, byte: u8, counted: &mut Counted) {
        if self.header_read == self.header_length {
            (self.header_read, self.header_length) = (0, 2);
        }
        match self.header_read {
            0 => {
                self.first = byte;
                counted.frames += 1;
                self.is_open |= self.is_data();
            }
            1 => {
                let (length, more) = match byte & 0x7f {
                    126 => (0, 2),
                    127 => (0, 8),
                    length => (u64::from(length), 0),
                };
                self.left = length;
                self.header_length += more + if byte & 0x80 != 0 { 4 } else { 0 };
                self.mask_at = 2 + more;
            }
            at if at < self.mask_at => self.left = self.left << 8 | u64::from(byte),
            _ => {}
        }
        self.header_read += 1;
    }

    /// Pings, pongs and closes may stand between the frames of a message.
    fn is_data(&self) -> bool {
        self.first & 0x08 == 0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::JoinSet,
    };

    use super::*;
    use crate::server::settings::Config;

    /// A frame of a client: FIN and opcode as given.
    fn frame(first: u8, length: usize) -> Vec<u8> {
        let mut frame = vec![first];
        match length {
            ..126 => frame.push(0x80 | u8::try_from(length).unwrap()),
            126..65_536 => {
                frame.push(0x80 | 126);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            _ => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend([0x7f; 4]);
        frame.resize(frame.len() + length, 0x81);
        frame
    }

    const TEXT: u8 = 0x81;
    const TEXT_BEGINS: u8 = 0x01;
    const GOES_ON: u8 = 0x00;
    const ENDS: u8 = 0x80;
    const PING: u8 = 0x89;

    #[test]
    fn a_message_is_open_from_its_first_byte_to_its_last() {
        for (bytes, count, is_open, has_ended) in [
            (vec![], 0, false, false),
            (frame(TEXT, 0), 1, false, true),
            (frame(TEXT, 5)[..1].to_vec(), 1, true, false),
            (frame(TEXT, 5)[..10].to_vec(), 1, true, false),
            (frame(TEXT, 5), 1, false, true),
            (frame(TEXT, 126), 1, false, true),
            (frame(TEXT, 65_535), 1, false, true),
            (frame(TEXT, 65_536), 1, false, true),
            (frame(TEXT, 65_536)[..65_549].to_vec(), 1, true, false),
            (frame(PING, 125), 1, false, false),
            (frame(PING, 0)[..3].to_vec(), 1, false, false),
            ([frame(TEXT_BEGINS, 3), frame(GOES_ON, 0), frame(PING, 4)].concat(), 3, true, false),
            ([frame(TEXT_BEGINS, 3), frame(PING, 0), frame(ENDS, 0)].concat(), 3, false, true),
            ([frame(TEXT, 3), frame(TEXT, 9)[..2].to_vec()].concat(), 2, true, true),
        ] {
            let mut frames = Frames::default();
            let counted = frames.count(&bytes);
            assert_eq!(counted, Counted { frames: count, has_ended }, "{bytes:?}");
            assert_eq!(frames.is_open, is_open, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn frames_are_counted_alike_however_their_bytes_arrive(
            parts in prop::collection::vec((any::<u8>(), 0_usize..300), 0..20),
            cuts in prop::collection::vec(1_usize..40, 1..200),
        ) {
            let bytes: Vec<u8> = parts.iter().flat_map(|(first, length)| frame(*first, *length)).collect();
            let mut whole = Frames::default();
            let all = whole.count(&bytes).frames;
            prop_assert_eq!(all, parts.len());
            let (mut cut, mut rest, mut count) = (Frames::default(), &bytes[..], 0);
            for length in cuts.into_iter().chain([usize::MAX]) {
                let (part, left) = rest.split_at(length.min(rest.len()));
                count += cut.count(part).frames;
                rest = left;
            }
            prop_assert_eq!((count, cut.is_open), (all, whole.is_open));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            Frames::default().count(&bytes);
        }
    }

    fn metered(set: impl FnOnce(&mut Config)) -> (DuplexStream, Metered<DuplexStream>) {
        let mut config = Config::defaults();
        config.limits.message_bytes_max = 1000;
        set(&mut config);
        let (client, server) = duplex(1 << 20);
        (client, Metered::new(Services::new(config).unwrap(), server, &[]))
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
        let (mut client, mut server) = metered(|config| {
            config.limits.socket_bytes_per_second_max = 1000;
            config.limits.socket_messages_per_second_max = 0;
        });
        let sent = frame(TEXT, 80_000);
        client.write_all(&sent).await.unwrap();
        let before = Instant::now();
        assert_eq!(read_all(&mut server, 2 * SECOND).await.0, sent.len());
        // At once: the largest message and 64 KiB.
        let seconds = (before.elapsed() - 2 * SECOND).as_secs();
        assert!((12..=14).contains(&seconds), "{seconds}");
        let delayed = Limited::SocketBytes.kinds();
        assert!(server.services.metrics.limited.with_label_values(&delayed).get() > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn pings_and_empty_fragments_count_as_messages() {
        for flood in [frame(PING, 0), frame(GOES_ON, 0), frame(TEXT, 0)] {
            let (mut client, mut server) =
                metered(|config| config.limits.socket_messages_per_second_max = 100);
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
        let (mut client, mut server) = metered(|config| {
            config.limits.socket_joins_per_second_max = 1;
            config.limits.channels_per_socket_max = 50;
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
        let (mut client, mut server) =
            metered(|config| config.limits.message_timeout = 10 * SECOND);
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
        let (mut client, mut server) = metered(|config| config.limits.message_timeout = 2 * SECOND);
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
        let (mut client, mut server) = metered(|config| {
            config.limits.message_timeout = SECOND;
            config.limits.socket_bytes_per_second_max = 1000;
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
