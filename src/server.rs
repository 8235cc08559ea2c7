//! Listen, accept, cap, drain. Owns the task trackers and the tokens that end everything.
//!
//! Invariants: a task of this server runs on one of its trackers; sockets are closed by ending
//! their outboxes, so that nothing on the hot path looks at a shared token.

use std::{error::Error, io, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use slab::Slab;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admin,
    auth::jwt::Verifier,
    config::Config,
    http,
    hub::Hub,
    metrics::Metrics,
    outbox::{Ended, Outbox},
    relay::{listener, listens::Listens},
    topic_rules::TopicRules,
};

/// Connections that the system holds for us to accept: when all clients come back at once, a SYN
/// that finds no place is sent again only a second later.
const ACCEPT_BACKLOG: u32 = 4096;
/// Waits after a failed accept: no descriptor, no memory.
const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Most connections that are not sockets: heads being read, requests being answered, refusals
/// being delayed.
const PENDING_MAX: usize = 4096;

/// What every part of one server shares.
#[derive(Debug)]
pub struct Services {
    /// The settings.
    pub config: Config,
    /// The metrics.
    pub metrics: Metrics,
    /// Who is joined to what.
    pub hub: Arc<Hub>,
    /// Who may.
    pub rules: TopicRules,
    /// Who somebody is.
    pub verifier: Verifier,
    /// What is wanted from the database.
    pub listens: Arc<Listens>,
    /// Open sockets, so that a drain finds them.
    pub(crate) sockets: Mutex<Slab<Arc<Outbox>>>,
    /// The sockets' tasks.
    pub(crate) connections: TaskTracker,
    /// All other tasks.
    pub(crate) tracker: TaskTracker,
    /// Cancelled when the drain begins: nothing new is taken.
    pub draining: CancellationToken,
    /// Cancelled when the sockets are gone: everything ends.
    pub(crate) stopped: CancellationToken,
}

impl Services {
    /// Everything that the settings ask for, not running yet.
    #[must_use]
    pub fn new(config: Config) -> Arc<Self> {
        let rules = TopicRules::new(config.topic.clone(), config.topics.allow_other);
        Arc::new(Self {
            metrics: Metrics::new(),
            hub: Arc::default(),
            rules,
            verifier: Verifier::new(&config.jwt_secret, config.limits.token_bytes_max),
            listens: Arc::new(Listens::new(config.relay.listens_max)),
            sockets: Mutex::default(),
            connections: TaskTracker::new(),
            tracker: TaskTracker::new(),
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
            config,
        })
    }
}

/// A socket's place in the server; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Place {
    services: Arc<Services>,
    slot: usize,
}

impl Place {
    /// Takes a place, if one is free.
    pub(crate) fn take(services: &Arc<Services>, outbox: &Arc<Outbox>) -> Option<Self> {
        let mut sockets = services.sockets.lock();
        if sockets.len() >= services.config.limits.connections_max {
            return None;
        }
        let slot = sockets.insert(Arc::clone(outbox));
        Some(Self { services: Arc::clone(services), slot })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.services.sockets.lock().remove(self.slot);
    }
}

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No secret, no tokens.
    #[error("jwt_secret is not set: set TIDEGATE_JWT_SECRET to the project's JWT secret")]
    NoSecret,
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
    services: Arc<Services>,
    public: TcpListener,
    admin: TcpListener,
    fallback: Option<http::Fallback>,
}

impl Server {
    /// Listens on both addresses.
    ///
    /// # Errors
    /// [`StartError`] if there is no secret, or an address cannot be had.
    pub fn bind(config: Config) -> Result<Self, StartError> {
        if config.jwt_secret.is_empty() {
            return Err(StartError::NoSecret);
        }
        let public = bind(config.listen, "listen")?;
        let admin = bind(config.admin_listen, "admin_listen")?;
        Ok(Self { services: Services::new(config), public, admin, fallback: None })
    }

    /// Answers what no public route does; the demo's pages.
    #[must_use]
    pub fn with_fallback(self, fallback: http::Fallback) -> Self {
        Self { fallback: Some(fallback), ..self }
    }

    /// What the server's parts share.
    #[must_use]
    pub fn services(&self) -> &Arc<Services> {
        &self.services
    }

    /// Where it listens: public, admin.
    ///
    /// # Errors
    /// What the system says of a socket that has no address.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.public.local_addr()?, self.admin.local_addr()?))
    }

    /// Serves until `shutdown` or an admin's request, then drains.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { services, public, admin, fallback } = self;
        if !services.config.notify_url().is_empty() {
            services.tracker.spawn(listener::run(Arc::clone(&services)));
        }
        let pending = Arc::new(Semaphore::new(PENDING_MAX));
        let accept_public = accept(&public, &services, move |services, stream, peer| {
            let (fallback, pending) = (fallback.clone(), Arc::clone(&pending));
            async move {
                // Above the bound a connection is not answered at all: it is closed.
                if let Ok(_permit) = pending.try_acquire() {
                    http::serve(services, stream, peer, fallback).await;
                }
            }
        });
        let accept_admin =
            accept(&admin, &services, |services, stream, _peer| admin::serve(services, stream));
        tokio::select! {
            () = accept_public => {}
            () = accept_admin => {}
            () = shutdown => {}
            () = services.draining.cancelled() => {}
        }
        drop(public);
        services.draining.cancel();
        tokio::select! {
            // The admin's port answers to the end.
            () = accept(&admin, &services, |services, stream, _peer| admin::serve(services, stream)) => {}
            () = drain(&services) => {}
        }
    }
}

/// Closes all sockets in jittered batches, then ends everything, within the drain's time.
async fn drain(services: &Services) {
    let deadline = Instant::now() + services.config.drain.timeout;
    let outboxes: Vec<_> =
        services.sockets.lock().iter().map(|(_, outbox)| Arc::clone(outbox)).collect();
    tracing::info!(sockets = outboxes.len(), "draining");
    // Clients come back at once: the spread is theirs. A hundred need none.
    let spread =
        Duration::from_millis(outboxes.len() as u64).min(services.config.drain.timeout / 2);
    for batch in outboxes.chunks(outboxes.len().div_ceil(20).max(100)) {
        for outbox in batch {
            outbox.end(Ended::Draining);
        }
        if outboxes.len() > batch.len() {
            sleep((spread / 20).mul_f64(0.5 + fastrand::f64())).await;
        }
    }
    services.connections.close();
    let closed = timeout_at(deadline, services.connections.wait()).await;
    services.stopped.cancel();
    services.tracker.close();
    // What still runs after the deadline is dropped with the runtime.
    let ended =
        timeout_at(deadline.max(Instant::now() + Duration::from_secs(1)), services.tracker.wait())
            .await;
    tracing::info!(complete = closed.is_ok() && ended.is_ok(), "drained");
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

/// Accepts for good, each connection in a task of its own.
async fn accept<F, S>(listener: &TcpListener, services: &Arc<Services>, serve: S)
where
    F: Future<Output = ()> + Send + 'static,
    S: Fn(Arc<Services>, TcpStream, SocketAddr) -> F,
{
    let mut backoff = ACCEPT_BACKOFF.0;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                backoff = ACCEPT_BACKOFF.0;
                // Without it a reply waits for the acknowledgement of the frame before.
                if stream.set_nodelay(true).is_ok() {
                    services.tracker.spawn(serve(Arc::clone(services), stream, peer));
                }
            }
            Err(error) => {
                services.metrics.accept_errors.inc();
                tracing::warn!(error = &error as &dyn Error, "cannot accept; waiting");
                sleep(backoff).await;
                backoff = (backoff * 2).min(ACCEPT_BACKOFF.1);
            }
        }
    }
}

/// Raises the limit of open files to what the system allows, and gives it.
///
/// # Errors
/// What the system says.
pub fn raise_file_limit() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}
