//! The house: it listens, accepts, runs the tasks, and drains.
//!
//! Invariants: a task of this server runs on one of its trackers; sockets are closed by ending
//! their outboxes, so that nothing on the hot path looks at a shared token.

mod drain;
mod gateway;
mod reload;
pub mod settings;

use std::{error::Error, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use self::{drain::drain, gateway::Tasks};
pub use self::{
    gateway::Gateway,
    reload::{Read, ReloadError},
    settings::{Config, ConfigError, Drain},
};
use crate::{
    admin,
    auth::jwks::JwksError,
    clock::Backoff,
    http::{self, RefusedUpgrade},
    limits::{self, Place, Places},
    telemetry::audit::{Audit, Caller},
};

/// Connections that the system holds for us to accept: when all clients come back at once, a SYN
/// that finds no place is sent again only a second later.
const ACCEPT_BACKLOG: u32 = 4096;
/// The answer to a connection that finds no place.
const OVERLOADED: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
/// The first and the longest wait after a failed accept: no descriptor, no memory.
const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Most connections that are not sockets: heads being read, requests being answered, refusals
/// being delayed. See [`Places`].
const PENDING_MAX: usize = 4096;
/// A shorter token of operators causes a warning, and is accepted: an operator who is locked out
/// cannot drain.
const ADMIN_TOKEN_BYTES_MIN: usize = 16;
/// Most connections of operators' tools.
const ADMIN_CONNECTIONS_MAX: usize = 64;

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No key, no tokens.
    #[error(
        "jwt_secret is not set: set TIDEGATE_JWT_SECRET to the project's JWT secret, or jwks.file or jwks.url to its public keys"
    )]
    NoSecret,
    /// There is a file of public keys, and it cannot be used.
    #[error("the public keys of {file}")]
    Keys {
        /// `jwks.file`.
        file: String,
        /// What is wrong with it.
        #[source]
        source: JwksError,
    },
    /// The address is taken or not ours.
    #[error("cannot listen on {address} ({name})")]
    Bind {
        /// Which.
        address: SocketAddr,
        /// Its setting.
        name: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A server that listens and does not accept yet.
#[derive(Debug)]
pub struct Server {
    gateway: Arc<Gateway>,
    tasks: Tasks,
    public: TcpListener,
    admin: TcpListener,
    fallback: Option<http::Fallback>,
}

impl Server {
    /// Listens on both addresses.
    ///
    /// # Errors
    /// [`StartError`] if there is no key, or an address cannot be had.
    pub fn bind(config: Config) -> Result<Self, StartError> {
        let jwks = &config.jwks;
        if config.jwt_secret.is_empty() && jwks.file.is_empty() && jwks.url.is_empty() {
            return Err(StartError::NoSecret);
        }
        if (1..ADMIN_TOKEN_BYTES_MIN).contains(&config.admin_token.expose().len()) {
            tracing::warn!("admin_token is shorter than 16 bytes: it can be guessed");
        }
        let public = bind(config.listen, "listen")?;
        let admin = bind(config.admin_listen, "admin_listen")?;
        let file = config.jwks.file.clone();
        let (gateway, tasks) =
            Gateway::build(config).map_err(|source| StartError::Keys { file, source })?;
        Ok(Self { gateway, tasks, public, admin, fallback: None })
    }

    /// Answers what no public route does with `fallback`: the demo's pages.
    #[must_use]
    pub fn with_fallback(self, fallback: http::Fallback) -> Self {
        Self { fallback: Some(fallback), ..self }
    }

    /// Reads the settings with `read` when it is asked to, and when `file` changes.
    #[must_use]
    pub fn with_reload(self, read: Read, file: Option<PathBuf>) -> Self {
        self.gateway.reload.set(read, file);
        self
    }

    /// The server's parts.
    #[must_use]
    pub fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    /// Returns the addresses that it listens on: public, admin.
    ///
    /// # Errors
    /// The system's, for a socket that has no address.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.public.local_addr()?, self.admin.local_addr()?))
    }

    /// Serves until `shutdown` or an admin's request, then drains.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { gateway, tasks, public, admin, fallback } = self;
        Audit::Start { gateway: gateway.id }.note(None, None);
        spawn(&gateway, tasks);
        let accept_public = accept(&public, &gateway, PENDING_MAX, |stream, peer, place| {
            http::serve(Arc::clone(&gateway.http), stream, peer, place, fallback.clone())
        });
        // The admin's port answers to the end.
        let accept_admin =
            accept(&admin, &gateway, ADMIN_CONNECTIONS_MAX, |stream, peer, place| {
                admin::serve(Arc::clone(&gateway.admin), stream, Caller::at(peer.ip()), place)
            });
        tokio::pin!(accept_admin);
        tokio::select! {
            () = accept_public => {}
            () = &mut accept_admin => {}
            () = shutdown => {}
            () = gateway.draining.cancelled() => {}
        }
        drop(public);
        gateway.draining.cancel();
        tokio::select! {
            () = accept_admin => {}
            () = drain(&gateway) => {}
        }
    }
}

/// Starts the tasks, each of which ends when the server stops.
fn spawn(gateway: &Gateway, tasks: Tasks) {
    let (tracker, stop) = (&gateway.tasks, || gateway.stopped.clone());
    if let Some(relay) = tasks.relay {
        let (listening, ingesting, known_events) = relay.run(stop());
        tracker.spawn(listening);
        tracker.spawn(ingesting);
        known_events.map(|known_events| tracker.spawn(known_events));
    }
    tasks.sharing.map(|sharing| tracker.spawn(sharing.run(stop())));
    tasks.survey.map(|survey| tracker.spawn(survey.run(stop())));
    tasks.revocations.map(|revocations| tracker.spawn(revocations.run(stop())));
    tracker.spawn(tasks.keys.run(stop()));
    tracker.spawn(tasks.sender.run(stop()));
    tracker.spawn(tasks.healer.run(stop()));
    tracker.spawn(tasks.reliever.run(stop()));
    tracker.spawn(Arc::clone(&gateway.reload).watch(stop()));
    tracker.spawn(Arc::clone(&gateway.reload).follow_keys(stop()));
    let (limits, sockets) = (Arc::clone(&gateway.limits), Arc::clone(&gateway.sockets));
    let (feeds, recovery) = (Arc::clone(&gateway.feeds), Arc::clone(&gateway.recovery));
    // Memory is swept with a database and without.
    tracker.spawn(every(limits::SWEEP_INTERVAL, stop(), move || {
        limits.sweep();
        feeds.sweep();
        recovery.sweep();
        sockets.turn();
    }));
}

/// Acts again and again, first after one interval, until the server stops.
async fn every(interval: Duration, stop: CancellationToken, mut act: impl FnMut()) {
    let acting = async {
        loop {
            sleep(interval).await;
            act();
        }
    };
    stop.run_until_cancelled(acting).await;
}

fn bind(address: SocketAddr, name: &'static str) -> Result<TcpListener, StartError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(ACCEPT_BACKLOG)
    };
    listen().map_err(|source| StartError::Bind { address, name, source })
}

/// Accepts for good, each connection in a task of its own. Where no place can be had, a connection is
/// refused with an answer that needs no task.
async fn accept<F: Future<Output = Option<RefusedUpgrade>> + Send + 'static>(
    listener: &TcpListener,
    gateway: &Gateway,
    pending_max: usize,
    serve: impl Fn(TcpStream, SocketAddr, Place) -> F,
) {
    let places = Places::new(pending_max);
    let mut backoff = Backoff::new(ACCEPT_BACKOFF.0);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                gateway.http.metrics.accept_errors.inc();
                tracing::warn!(error = &error as &dyn Error, "cannot accept; waiting");
                sleep(backoff.next(ACCEPT_BACKOFF.1)).await;
                continue;
            }
        };
        backoff.reset();
        let caller = Caller::at(peer.ip());
        let Some(place) = places.take(gateway.limits.share_of(peer.ip())) else {
            gateway.http.count_refused(caller, RefusedUpgrade::Pending, None);
            // What does not fit into the empty buffer of a new connection is not sent.
            let _ = stream.try_write(OVERLOADED);
            continue;
        };
        // Without it a reply waits for the acknowledgement of the frame before.
        if stream.set_nodelay(true).is_ok() {
            let (served, http) = (serve(stream, peer, place), Arc::clone(&gateway.http));
            gateway.tasks.spawn(async move {
                if let Some(fault) = served.await {
                    http.count_refused(caller, fault, None);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        task::JoinSet,
        time::timeout,
    };

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// What the server says to half a head, until it closes.
    async fn answer(mut stream: TcpStream) -> String {
        let mut answer = Vec::new();
        let read = timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "the server closes in time");
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn half_open_handshakes_make_way_for_newcomers_and_give_their_places_back() {
        let mut config = Config::defaults();
        config.limits.handshake_timeout = Duration::from_secs(600);
        let gateway = Gateway::new(config).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut serving = JoinSet::new();
        let served = Arc::clone(&gateway);
        serving.spawn(async move {
            accept(&listener, &served, 2, |stream, peer, place| {
                http::serve(Arc::clone(&served.http), stream, peer, place, None)
            })
            .await;
        });
        let half_open = async || {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
            stream
        };
        let (first, mut second) = (half_open().await, half_open().await);
        let mut newcomer = half_open().await;
        assert_eq!(answer(first).await, "", "the oldest makes way");
        let text = String::from_utf8(gateway.registry.render()).unwrap();
        let displaced = "tidegate_connections_refused_total{reason=\"displaced\"} 1";
        assert!(text.lines().any(|line| line == displaced), "{text}");
        for stream in [&mut second, &mut newcomer] {
            stream.write_all(b"host: test\r\nconnection: close\r\n\r\n").await.unwrap();
        }
        for stream in [second, newcomer] {
            assert!(answer(stream).await.starts_with("HTTP/1.1 404"), "the others stay");
        }
        drop((half_open().await, half_open().await));
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_holds_is_forgotten_without_a_database() {
        let (gateway, tasks) = Gateway::build(Config::defaults()).unwrap();
        assert!(gateway.pool.is_none());
        spawn(&gateway, tasks);
        let rules = gateway.access.rules();
        for (rule, captures) in rules.merged("AB3028") {
            assert!(gateway.feeds.of(rule, &captures).is_some());
        }
        assert!(!gateway.feeds.all().is_empty());
        // Longer than a feed is kept; on a paused clock it takes no time.
        sleep(Duration::from_secs(25 * 3600)).await;
        assert!(gateway.feeds.all().is_empty());
        gateway.stopped.cancel();
    }
}
