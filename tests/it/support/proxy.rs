//! A network that fails as networks do: without a word.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use super::server::DEADLINE;

/// More than any statement of ours has.
const PIECE_BYTES: usize = 64 * 1024;

/// Forwards TCP connections to a target, and holds their bytes back when told to.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    state: watch::Sender<State>,
    seen: watch::Receiver<Seen>,
    _tasks: JoinSet<()>,
}

/// What is held back.
#[derive(Debug, Clone, Default)]
struct State {
    /// Of connections with a lower number, everything.
    frozen_below: usize,
    /// From the piece on in which a client says this.
    hold_at: Option<&'static str>,
    /// Counts the orders, so that a test knows which of them a client has run into.
    order: usize,
}

#[derive(Debug, Default)]
struct Seen {
    accepted: usize,
    open: usize,
    held_by_order: usize,
}

impl Proxy {
    /// Forwards to this port of 127.0.0.1, from a port of the system's choice at `host`.
    pub(crate) async fn start(host: &str, port: u16) -> Self {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, watched) = watch::channel(State::default());
        let (seen, seen_by_test) = watch::channel(Seen::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let number = seen.borrow().accepted;
                seen.send_modify(|seen| {
                    seen.accepted += 1;
                    seen.open += 1;
                });
                let (watched, seen) = (watched.clone(), seen.clone());
                connections.spawn(async move {
                    forward(client, port, number, &watched, &seen).await;
                    seen.send_modify(|seen| seen.open -= 1);
                });
            }
        });
        Self { address, state, seen: seen_by_test, _tasks: tasks }
    }

    /// Nothing goes on, neither on the connections that exist nor on those to come; none is closed.
    pub(crate) fn freeze_all(&self) {
        self.state.send_modify(|state| state.frozen_below = usize::MAX);
    }

    /// Nothing goes on on the connections that exist; new ones work.
    pub(crate) fn freeze_existing(&self) {
        let accepted = self.seen.borrow().accepted;
        self.state.send_modify(|state| state.frozen_below = accepted);
    }

    /// Holds back what clients say from this on.
    pub(crate) fn hold_at(&self, words: &'static str) {
        self.state.send_modify(|state| {
            state.hold_at = Some(words);
            state.order += 1;
        });
    }

    /// Lets everything go on, also what was held.
    pub(crate) fn release(&self) {
        self.state.send_modify(|state| *state = State { order: state.order, ..State::default() });
    }

    /// Waits until a client has said what is held back.
    pub(crate) async fn has_held(&mut self) {
        let order = self.state.borrow().order;
        self.wait(|seen| seen.held_by_order == order).await;
    }

    /// Waits until so many connections have been accepted.
    pub(crate) async fn has_accepted(&mut self, count: usize) {
        self.wait(|seen| seen.accepted >= count).await;
    }

    /// Waits until at most so many connections are open.
    pub(crate) async fn has_open(&mut self, at_most: usize) {
        self.wait(|seen| seen.open <= at_most).await;
    }

    async fn wait(&mut self, is: impl Fn(&Seen) -> bool) {
        if timeout(DEADLINE, self.seen.wait_for(|seen| is(seen))).await.is_err() {
            panic!("the proxy has seen only {:?}", *self.seen.borrow());
        }
    }
}

/// Until one side has closed.
async fn forward(
    client: TcpStream,
    port: u16,
    number: usize,
    state: &watch::Receiver<State>,
    seen: &watch::Sender<Seen>,
) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    // Else small pieces that follow each other wait 40 ms each.
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let up = pump(client_read, server_write, state.clone(), |state, bytes| {
        let says =
            |words: &str| bytes.windows(words.len()).any(|window| window == words.as_bytes());
        let is_held = state.hold_at.is_some_and(says);
        if is_held {
            seen.send_modify(|seen| seen.held_by_order = state.order);
        }
        is_held || number < state.frozen_below
    });
    let down =
        pump(server_read, client_write, state.clone(), |state, _| number < state.frozen_below);
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

async fn pump(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    holds: impl Fn(&State, &[u8]) -> bool,
) {
    // A vector without room reads 64 bytes, which may end within the words to hold at.
    let mut waiting = Vec::with_capacity(PIECE_BYTES);
    loop {
        if !holds(&state.borrow_and_update(), &waiting) {
            if to.write_all(&waiting).await.is_err() {
                return;
            }
            waiting.clear();
        }
        tokio::select! {
            // Read while bytes are held, too: so the end of a connection is seen.
            read = from.read_buf(&mut waiting) => match read {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            },
            changed = state.changed() => if changed.is_err() { return },
        }
    }
}
