//! One WebSocket of the load: opens, joins, sends heartbeats, and counts what arrives.
//!
//! Ten thousand connections share two cores with the server that they measure: each is a stream, a
//! timer and two empty vectors. A connection reads into a buffer on the stack, with one system call
//! for each wake, and parses frames in place.

use std::{
    future::poll_fn,
    io, mem,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf},
    net::{TcpSocket, TcpStream},
    time::{Instant, Interval, interval_at, timeout},
};

use super::load::Load;
use crate::wire_client::{
    failure::Failure,
    frame::{Frame, FrameReader, push_pong},
    message::{Event, Join, merged_count},
    upgrade::upgrade,
};

/// The interval of realtime-js since 2.11.8.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(25);
/// Most bytes of one read, on the stack: some twenty broadcasts.
const READ_BYTES: usize = 8 << 10;
/// Sockets that share one loopback address; the kernel has some 28,000 ports for each address.
const SOCKETS_PER_ADDRESS: usize = 20_000;

/// The purpose of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) enum Role {
    /// Joins as many topics as the load says, beginning with its own number modulo topics.
    Viewer { number: usize },
    /// Joins one topic, with `ack`.
    Publisher { topic: usize },
}

/// An open WebSocket.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    reader: FrameReader,
    /// Masked pongs that have not been written.
    owed: Vec<u8>,
    beat: Interval,
    load: Arc<Load>,
    role: Role,
    last_ref: u64,
    joins_sent: Duration,
    joins_awaited: usize,
    joins_refused: usize,
}

/// Why a connection woke.
#[derive(Debug)]
enum Wake {
    Beat,
    Owed,
    /// The last join has been answered.
    Answered,
    Tick(Instant),
}

impl Connection {
    /// Connects and upgrades to a WebSocket.
    ///
    /// # Errors
    /// The [`Failure`] of this socket, which is closed.
    pub(super) async fn open(load: Arc<Load>, role: Role) -> Result<Self, Failure> {
        let begun = load.tally.now();
        let handshake = timeout(load.deadline, handshake(&load, role)).await;
        let (stream, rest) = handshake.map_err(|_elapsed| Failure::HandshakeDeadline)??;
        load.tally.handshake.record(load.tally.now() - begun);
        Ok(Self {
            stream,
            reader: FrameReader::resumed(rest),
            owed: Vec::new(),
            beat: interval_at(Instant::now() + HEARTBEAT_INTERVAL, HEARTBEAT_INTERVAL),
            load,
            role,
            last_ref: 0,
            joins_sent: Duration::ZERO,
            joins_awaited: 0,
            joins_refused: 0,
        })
    }

    /// Joins all topics of the connection at once and waits for every answer. Refusals and missing
    /// answers are counted; the connection goes on with the channels that were joined.
    ///
    /// # Errors
    /// The [`Failure`] that ended the connection.
    pub(super) async fn join(&mut self) -> Result<(), Failure> {
        let load = Arc::clone(&self.load);
        let (ack, access_token) = match self.role {
            Role::Viewer { .. } => (false, load.viewer_key.expose()),
            Role::Publisher { .. } => (true, load.publisher_key.expose()),
        };
        let mut joins = Vec::new();
        for channel in 0..self.channel_count() {
            let topic = &load.topics[self.topic_of(channel)];
            let reference = self.next_ref();
            load.vsn.push_join(&Join { topic, reference, ack, access_token }, &mut joins);
        }
        self.joins_awaited = self.channel_count();
        self.joins_sent = load.tally.now();
        self.write(&joins).await?;
        let answers = async {
            while self.joins_awaited > 0 {
                let wake = poll_fn(|cx| self.poll_wake(cx)).await?;
                self.serve(wake).await?;
            }
            Ok(())
        };
        let Ok(answered) = timeout(load.deadline, answers).await else {
            load.tally.fail(&Failure::JoinDeadline);
            return Ok(());
        };
        answered
    }

    /// Returns whether every channel was joined.
    pub(super) const fn is_joined(&self) -> bool {
        self.joins_awaited == 0 && self.joins_refused == 0
    }

    /// Receives until the connection ends, and counts its end as a failure.
    pub(super) async fn view(mut self) {
        loop {
            let wake = poll_fn(|cx| self.poll_wake(cx)).await;
            let served = match wake {
                Ok(wake) => self.serve(wake).await,
                Err(failure) => Err(failure),
            };
            if let Err(failure) = served {
                self.load.tally.fail(&failure);
                return;
            }
        }
    }

    /// Receives until the next of `ticks`, and returns the time at which that was due.
    ///
    /// # Errors
    /// The [`Failure`] that ended the connection.
    pub(super) async fn next_tick(&mut self, ticks: &mut Interval) -> Result<Instant, Failure> {
        loop {
            let wake = poll_fn(|cx| match self.poll_wake(cx) {
                // Frames first: a client that does not read its acknowledgements is a slow
                // consumer.
                Poll::Pending => ticks.poll_tick(cx).map(|due| Ok(Wake::Tick(due))),
                ready @ Poll::Ready(_) => ready,
            });
            match wake.await? {
                Wake::Tick(due) => return Ok(due),
                wake => self.serve(wake).await?,
            }
        }
    }

    /// Returns a ref that this connection has not used.
    pub(super) const fn next_ref(&mut self) -> u64 {
        self.last_ref += 1;
        self.last_ref
    }

    /// Writes masked frames.
    ///
    /// # Errors
    /// [`Failure::Lost`], or [`Failure::WriteDeadline`] if the server does not read.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        timeout(self.load.deadline, self.stream.write_all(bytes))
            .await
            .map_err(|_elapsed| Failure::WriteDeadline)?
            .map_err(Failure::lost)
    }

    async fn serve(&mut self, wake: Wake) -> Result<(), Failure> {
        match wake {
            Wake::Beat => {
                let mut beat = Vec::new();
                let reference = self.next_ref();
                self.load.vsn.push_heartbeat(reference, &mut beat);
                self.write(&beat).await
            }
            Wake::Owed => {
                let owed = mem::take(&mut self.owed);
                self.write(&owed).await
            }
            Wake::Answered | Wake::Tick(_) => Ok(()),
        }
    }

    /// Receives everything that has arrived; ready when the connection must act besides.
    fn poll_wake(&mut self, cx: &mut Context<'_>) -> Poll<Result<Wake, Failure>> {
        loop {
            let mut space = [const { MaybeUninit::uninit() }; READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut space);
            let read = Pin::new(&mut self.stream).poll_read(cx, &mut buffer);
            if read.is_pending() {
                // The timer is polled once for each wake, when there is nothing left to read.
                ready!(self.beat.poll_tick(cx));
                return Poll::Ready(Ok(Wake::Beat));
            }
            let joining = self.joins_awaited > 0;
            match read {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::lost(error))),
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => {
                    return Poll::Ready(Err(Failure::Closed));
                }
                Poll::Ready(Ok(())) | Poll::Pending => self.receive(buffer.filled())?,
            }
            if !self.owed.is_empty() {
                return Poll::Ready(Ok(Wake::Owed));
            }
            if joining && self.joins_awaited == 0 {
                return Poll::Ready(Ok(Wake::Answered));
            }
        }
    }

    fn receive(&mut self, input: &[u8]) -> Result<(), Failure> {
        let now = self.load.tally.now();
        let mut reader = mem::take(&mut self.reader);
        let read = reader.read(input, |frame| self.take(frame, now));
        self.reader = reader;
        read
    }

    fn take(&mut self, frame: Frame<'_>, now: Duration) -> Result<(), Failure> {
        match frame {
            Frame::Text(payload) | Frame::Binary(payload) => {
                let tally = &self.load.tally;
                if let Some(sent) = tally.stamps.sent(payload) {
                    let merged_count = merged_count(payload);
                    tally.delivered(sent, now, merged_count, || frame.to_server_bytes());
                } else if matches!(frame, Frame::Text(_)) {
                    match self.load.vsn.read(payload) {
                        Some(event) => self.take_event(event, now),
                        None => tally.fail(&Failure::NotUnderstood),
                    }
                }
                Ok(())
            }
            Frame::Ping(payload) => {
                push_pong(payload, &mut self.owed);
                Ok(())
            }
            Frame::Pong => Ok(()),
            Frame::Close(Some(code)) => Err(Failure::ClosedWith(code)),
            Frame::Close(None) => Err(Failure::Closed),
        }
    }

    fn take_event(&mut self, event: Event, now: Duration) {
        let tally = &self.load.tally;
        match event {
            Event::Reply { reference, refusal } => match (self.joined_by(reference), refusal) {
                (Some(channel), None) => {
                    self.joins_awaited = self.joins_awaited.saturating_sub(1);
                    if let Role::Viewer { .. } = self.role {
                        tally.join_reply.record(now.saturating_sub(self.joins_sent));
                        tally.joined(self.topic_of(channel));
                    }
                }
                (Some(_), Some(reason)) => {
                    self.joins_awaited = self.joins_awaited.saturating_sub(1);
                    self.joins_refused += 1;
                    tally.fail(&Failure::JoinRefused(reason));
                }
                (None, refusal) => match (self.role, refusal) {
                    (_, Some(reason)) => tally.fail(&Failure::PublishRefused(reason)),
                    (Role::Publisher { .. }, None) => tally.acknowledged(),
                    (Role::Viewer { .. }, None) => {}
                },
            },
            Event::SystemError(message) => tally.fail(&Failure::System(message)),
            Event::ChannelEnded(event) => tally.fail(&Failure::ChannelEnded(event)),
            Event::Broadcast { .. } | Event::Other => {}
        }
    }

    /// Returns the channel whose join had this ref: the first refs of a connection are those of its
    /// joins.
    fn joined_by(&self, reference: u64) -> Option<usize> {
        let channel = usize::try_from(reference).ok()?.checked_sub(1)?;
        (channel < self.channel_count()).then_some(channel)
    }

    fn channel_count(&self) -> usize {
        match self.role {
            Role::Viewer { .. } => self.load.channels,
            Role::Publisher { .. } => 1,
        }
    }

    /// Returns the index of a channel's topic.
    fn topic_of(&self, channel: usize) -> usize {
        match self.role {
            Role::Viewer { number } => {
                (number * self.load.channels + channel) % self.load.topics.len()
            }
            Role::Publisher { topic } => topic,
        }
    }
}

/// Connects and upgrades; returns the stream and the bytes that followed the answer's head.
async fn handshake(load: &Load, role: Role) -> Result<(TcpStream, Vec<u8>), Failure> {
    let connected = connect(load.target.address, role).await;
    let mut stream = connected.map_err(|error| Failure::Connect(error.kind()))?;
    let path = match role {
        Role::Viewer { .. } => &load.target.viewer_path,
        Role::Publisher { .. } => &load.target.publisher_path,
    };
    let answer = upgrade(&mut stream, &load.target.host, path, "tidegate-bench").await?;
    answer.check()?;
    Ok((stream, answer.rest))
}

async fn connect(address: SocketAddr, role: Role) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if let (IpAddr::V4(Ipv4Addr::LOCALHOST), Role::Viewer { number }) = (address.ip(), role) {
        let last_octet = u8::try_from(1 + number / SOCKETS_PER_ADDRESS).unwrap_or(u8::MAX);
        if last_octet > 1 {
            socket.bind((Ipv4Addr::new(127, 0, 0, last_octet), 0).into())?;
        }
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
