//! Listen, accept, cap, drain. Owns the task trackers and the tokens that end everything.
//!
//! Invariants: a task of this server runs on one of its trackers; sockets are closed by ending
//! their outboxes, so that nothing on the hot path looks at a shared token.

pub mod reload;
pub mod settings;

use std::{error::Error, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use sqlx::PgPool;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Notify, Semaphore},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use self::{reload::Reload, settings::Config};
use crate::{
    access::rule::TopicRules,
    admin::{self, busiest::Busiest},
    auth::{
        authenticator::Verifier,
        jwks::{self, JwksError},
        jwt::{Token, TokenError},
    },
    clock::unix_now,
    db,
    http::{self, visits::Visits},
    hub::{Hub, Sockets, outbox::Ended},
    invalidation::{self, Events},
    limits::{self, Limits},
    metrics::{Metrics, RefusedUpgrade},
    policies::Policies,
    recovery::{
        healing::{self, Healing},
        lost_sockets::LostSockets,
    },
    relay::{listener, listens::Listens},
    telemetry::audit::{Audit, Caller},
    upkeep::{revocations, sharing, survey},
};

/// Connections that the system holds for us to accept: when all clients come back at once, a SYN
/// that finds no place is sent again only a second later.
const ACCEPT_BACKLOG: u32 = 4096;
/// What everything else may take once the sockets are closed, however long that took.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// The answer to a connection that finds no place.
const OVERLOADED: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
/// Waits after a failed accept: no descriptor, no memory.
const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Most connections that are not sockets: heads being read, requests being answered, refusals
/// being delayed.
const PENDING_MAX: usize = 4096;
/// A shorter token of operators is warned of, and taken: who locks himself out cannot drain.
const ADMIN_TOKEN_BYTES_MIN: usize = 16;
/// Most connections of operators' tools.
const ADMIN_CONNECTIONS_MAX: usize = 64;
/// Most topics of lost sockets that are remembered: of 10,000 clients six each, and then of none.
const LOST_TOPICS_MAX: usize = 60_000;
/// Most large bodies of requests that are read at a time, 8 MB each at most.
const BODIES_MAX: usize = 16;

/// What every part of one server shares.
#[derive(Debug)]
pub struct Services {
    /// The settings.
    pub config: Config,
    /// The metrics.
    pub metrics: Metrics,
    /// Who is joined to what.
    pub hub: Arc<Hub>,
    /// Who may; exchanged as a whole when the settings are read again.
    rules: RwLock<Arc<TopicRules>>,
    /// Who somebody is.
    pub verifier: Arc<Verifier>,
    /// Who may what on private channels.
    pub policies: Arc<Policies>,
    /// How much of everything.
    pub(crate) limits: Arc<Limits>,
    /// What is wanted from the database.
    pub listens: Arc<Listens>,
    /// What waits for its window, and what has changed of late.
    pub(crate) events: Arc<Events>,
    /// Who was connected and is no more.
    pub(crate) lost_sockets: Arc<LostSockets>,
    /// Who may be deaf.
    pub(crate) healing: Arc<Healing>,
    /// Which events have series of their own.
    pub(crate) busiest: Mutex<Busiest>,
    /// Somebody has told that the database's revocations have changed.
    pub(crate) revocations_changed: Notify,
    /// From where doctors have come.
    pub(crate) visits: Visits,
    /// What reads the settings again.
    pub(crate) reload: Reload,
    /// Connections for what the listening session is not for, if there is a database.
    pub(crate) pool: Option<PgPool>,
    /// Names this process among the gateways of its database.
    pub(crate) gateway: Uuid,
    /// Open sockets, so that a drain finds them.
    pub sockets: Arc<Sockets>,
    /// The sockets' tasks.
    pub(crate) connections: TaskTracker,
    /// Places for bodies of more than a few bytes.
    pub(crate) bodies: Semaphore,
    /// All other tasks.
    pub(crate) tracker: TaskTracker,
    /// Cancelled when the drain begins: nothing new is taken.
    pub draining: CancellationToken,
    /// Cancelled when the sockets are gone: everything ends.
    pub(crate) stopped: CancellationToken,
}

impl Services {
    /// Everything that the settings ask for, not running yet.
    ///
    /// # Errors
    /// [`JwksError`] if there is a key set's file and it cannot be used.
    pub fn new(config: Config) -> Result<Arc<Self>, JwksError> {
        let metrics = Metrics::new();
        let (registry, draining) = (&metrics.registry, CancellationToken::new());
        let verifier = Arc::new(Verifier::new(&config, &metrics)?);
        let rules = TopicRules::new(config.topic.clone(), config.topics);
        let tracker = TaskTracker::new();
        Ok(Arc::new(Self {
            policies: Arc::new(Policies::new(&config, &metrics, &tracker)),
            limits: Arc::new(Limits::new(config.limits.clone(), config.network.clone(), registry)),
            hub: Arc::new(Hub::new(registry)),
            rules: RwLock::new(Arc::new(rules)),
            revocations_changed: Notify::new(),
            visits: Visits::default(),
            reload: Reload::default(),
            verifier,
            listens: Arc::new(Listens::new(config.relay.listens_max)),
            events: Arc::new(Events::new(config.relay.listens_max)),
            lost_sockets: Arc::new(LostSockets::new(
                LOST_TOPICS_MAX,
                config.limits.silence_timeout,
            )),
            healing: Arc::default(),
            busiest: Mutex::default(),
            // The settings' check has read the URL.
            pool: db::pool(config.pool_url(), config.relay.connect_timeout).ok(),
            gateway: Uuid::new_v4(),
            sockets: Arc::new(Sockets::new(
                config.limits.connections_max,
                config.limits.outbox_bytes_max,
                draining.clone(),
                registry,
            )),
            connections: TaskTracker::new(),
            bodies: Semaphore::new(BODIES_MAX),
            tracker,
            draining,
            stopped: CancellationToken::new(),
            metrics,
            config,
        }))
    }

    /// The token with its claims, if it holds now.
    ///
    /// # Errors
    /// As [`Verifier::verify`].
    pub(crate) fn verify(&self, text: &str) -> Result<Arc<Token>, TokenError> {
        let started = Instant::now();
        let verified = self.verifier.verify(text, unix_now());
        self.metrics.token_seconds.observe(started.elapsed().as_secs_f64());
        self.metrics.count_token(&verified);
        verified
    }

    /// Who may what, by the settings as they were read last.
    #[must_use]
    pub fn rules(&self) -> Arc<TopicRules> {
        Arc::clone(&self.rules.read())
    }

    /// Exchanges the rules; [`Self::review`] brings them to those who have joined.
    pub(crate) fn replace_rules(&self, rules: TopicRules) {
        *self.rules.write() = Arc::new(rules);
    }

    /// Has every socket look at its channels' tokens and topics anew.
    pub(crate) fn review(&self) {
        self.sockets.review();
    }
}

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
    services: Arc<Services>,
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
        let services = Services::new(config).map_err(|source| StartError::Keys { file, source })?;
        Ok(Self { services, public, admin, fallback: None })
    }

    /// Answers what no public route does; the demo's pages.
    #[must_use]
    pub fn with_fallback(self, fallback: http::Fallback) -> Self {
        Self { fallback: Some(fallback), ..self }
    }

    /// Reads the settings with `read` when it is asked to, and when `file` changes.
    #[must_use]
    pub fn with_reload(self, read: reload::Read, file: Option<PathBuf>) -> Self {
        self.services.reload.set(read, file);
        self
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
        Audit::Start { gateway: services.gateway }.note(None, None);
        if !services.config.notify_url().is_empty() {
            services.tracker.spawn(listener::run(Arc::clone(&services)));
        }
        if let Some(pool) = services.pool.clone() {
            services.tracker.spawn(sharing::run(Arc::clone(&services), pool.clone()));
            services.tracker.spawn(survey::run(Arc::clone(&services), pool.clone()));
            services.tracker.spawn(revocations::run(Arc::clone(&services), pool));
        }
        services.tracker.spawn(jwks::run(Arc::clone(&services)));
        services.tracker.spawn(invalidation::run(Arc::clone(&services)));
        services.tracker.spawn(healing::run(Arc::clone(&services)));
        services.tracker.spawn(reload::watch(Arc::clone(&services)));
        services.tracker.spawn(reload::follow_keys(Arc::clone(&services)));
        let (limits, sockets) = (Arc::clone(&services.limits), Arc::clone(&services.sockets));
        services.tracker.spawn(every(
            limits::SWEEP_INTERVAL,
            services.stopped.clone(),
            move || {
                limits.addresses.sweep();
                sockets.turn();
            },
        ));
        let accept_public = accept(&public, &services, PENDING_MAX, |services, stream, peer| {
            http::serve(services, stream, peer, fallback.clone())
        });
        // The admin's port answers to the end.
        let accept_admin =
            accept(&admin, &services, ADMIN_CONNECTIONS_MAX, |services, stream, peer| {
                admin::serve(services, stream, Caller::at(peer.ip()))
            });
        tokio::pin!(accept_admin);
        tokio::select! {
            () = accept_public => {}
            () = &mut accept_admin => {}
            () = shutdown => {}
            () = services.draining.cancelled() => {}
        }
        drop(public);
        services.draining.cancel();
        tokio::select! {
            () = accept_admin => {}
            () = drain(&services) => {}
        }
    }
}

/// Does something again and again, first after one interval, until the server stops.
async fn every(interval: Duration, stop: CancellationToken, mut act: impl FnMut()) {
    let acting = async {
        loop {
            sleep(interval).await;
            act();
        }
    };
    stop.run_until_cancelled(acting).await;
}

/// Closes all sockets in jittered batches, then ends everything, within the drain's time.
async fn drain(services: &Services) {
    let deadline = Instant::now() + services.config.drain.timeout;
    invalidation::flush(services).await;
    let outboxes = services.sockets.outboxes();
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
    // Who never had a database to share with has nobody to leave anything to.
    if let Some(pool) = services.pool.as_ref().filter(|pool| pool.size() > 0) {
        let is_orderly = closed.is_ok();
        sharing::end(services, pool, is_orderly, Instant::now() + STOP_TIMEOUT).await;
    }
    services.stopped.cancel();
    services.tracker.close();
    // What still runs after the deadline is dropped with the runtime.
    let ended =
        timeout_at(deadline.max(Instant::now() + STOP_TIMEOUT), services.tracker.wait()).await;
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

/// Accepts for good, each connection in a task of its own; those above `pending_max` are refused
/// with an answer that needs no task.
async fn accept<F, S>(
    listener: &TcpListener,
    services: &Arc<Services>,
    pending_max: usize,
    serve: S,
) where
    F: Future<Output = ()> + Send + 'static,
    S: Fn(Arc<Services>, TcpStream, SocketAddr) -> F,
{
    let pending = Arc::new(Semaphore::new(pending_max));
    let mut backoff = ACCEPT_BACKOFF.0;
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                services.metrics.accept_errors.inc();
                tracing::warn!(error = &error as &dyn Error, "cannot accept; waiting");
                sleep(backoff).await;
                backoff = (backoff * 2).min(ACCEPT_BACKOFF.1);
                continue;
            }
        };
        backoff = ACCEPT_BACKOFF.0;
        let Ok(permit) = Arc::clone(&pending).try_acquire_owned() else {
            http::count_refused(services, Caller::at(peer.ip()), RefusedUpgrade::Pending, None);
            // What does not fit into the empty buffer of a new connection is not sent.
            let _ = stream.try_write(OVERLOADED);
            continue;
        };
        // Without it a reply waits for the acknowledgement of the frame before.
        if stream.set_nodelay(true).is_ok() {
            let served = serve(Arc::clone(services), stream, peer);
            services.tracker.spawn(async move {
                served.await;
                drop(permit);
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
    async fn half_open_handshakes_have_so_many_places_and_give_them_back() {
        let mut config = Config::defaults();
        config.limits.handshake_timeout = Duration::from_secs(600);
        let services = Services::new(config).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut serving = JoinSet::new();
        let served = Arc::clone(&services);
        serving.spawn(async move {
            accept(&listener, &served, 2, |services, stream, peer| {
                http::serve(services, stream, peer, None)
            })
            .await;
        });
        let half_open = async || {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // It may have been refused already.
            drop(stream.write_all(b"GET / HTTP/1.1\r\n").await);
            stream
        };
        let (first, second) = (half_open().await, half_open().await);
        assert_eq!(answer(half_open().await).await.as_bytes(), OVERLOADED);
        let pending = RefusedUpgrade::Pending.kind();
        let refused = services.metrics.connections_refused.with_label_values(&[pending]);
        assert_eq!(refused.get(), 1);
        drop(first);
        let served = async {
            loop {
                let mut stream = half_open().await;
                drop(stream.write_all(b"host: test\r\nconnection: close\r\n\r\n").await);
                if answer(stream).await.starts_with("HTTP/1.1 404") {
                    return;
                }
            }
        };
        assert!(timeout(DEADLINE, served).await.is_ok(), "the place is given back");
        drop(second);
    }
}
