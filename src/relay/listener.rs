//! The one session that listens.
//!
//! Invariants: any error ends the whole session, and the next one is a fresh connection, so that
//! nothing goes on half; every statement has a deadline, because a half-open TCP connection says
//! nothing; a channel is called active only after its LISTEN has been answered; a new session first
//! listens to everything, and then finds out what was missed.

use std::{
    convert::Infallible,
    error::Error,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use sqlx::postgres::{PgListener, PgNotification};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    canary::{self, Canary, Good, Look},
    clock_offset::Clocks,
    gaps,
    ingest::{self, Notification, STATS_CHANNEL},
};
use crate::{
    clock::unix_seconds,
    db::{self, REVOCATIONS_CHANNEL},
    invalidation::{CatchUpCause, LinkLoss},
    metrics::Metrics,
    secret::Secret,
    server::Services,
};

/// The first wait after a session has ended.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// LISTENs, and events whose endpoints are asked for, at a time.
const LISTENS_PER_STATEMENT: usize = 256;

/// How often idle LISTENs are looked for; oftener only if they linger for less.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
const SWEEP_INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Why a listening session ended, or never began.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The URL cannot be read.
    #[error("the database URL cannot be read")]
    Url(#[source] sqlx::Error),
    /// No connection was made.
    #[error("no connection to the database")]
    Connect(#[source] sqlx::Error),
    /// Somebody took the connection and said nothing in time.
    #[error("the database does not answer")]
    Unanswered,
    /// The server is a standby: it refuses LISTEN.
    #[error("the database is in recovery: LISTEN needs the primary")]
    InRecovery,
    /// A statement failed.
    #[error("a statement of the listening session failed")]
    Statement(#[source] sqlx::Error),
    /// A statement was not answered in time: the connection is half open.
    #[error("the listening session does not answer")]
    Silent,
    /// The server closed the connection.
    #[error("the database closed the listening session")]
    Closed,
    /// The connection broke while notifications were awaited.
    #[error("the listening session broke")]
    Broken(#[source] sqlx::Error),
    /// A notification to this gateway itself was committed and did not arrive.
    #[error(
        "a committed notification did not arrive: notify_database_url needs a session of its own, \
         not one of a transaction pooler, in the database of database_url"
    )]
    CanaryLost,
}

impl LinkError {
    /// Every label that [`Self::kind`] gives.
    pub const KINDS: [&'static str; 8] =
        ["url", "connect", "in_recovery", "statement", "silent", "closed", "broken", "canary_lost"];

    /// The metric's label.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        LinkLoss::from(self).label()
    }
}

impl From<&LinkError> for LinkLoss {
    fn from(error: &LinkError) -> Self {
        match error {
            LinkError::Url(_) => Self::Url,
            LinkError::Connect(_) | LinkError::Unanswered => Self::Connect,
            LinkError::InRecovery => Self::InRecovery,
            LinkError::Statement(_) => Self::Statement,
            LinkError::Silent => Self::Silent,
            LinkError::Closed => Self::Closed,
            LinkError::Broken(_) => Self::Broken,
            LinkError::CanaryLost => Self::CanaryLost,
        }
    }
}

/// Listens until the server drains: one session after the other, with jittered backoff between.
pub(crate) async fn run(services: Arc<Services>) {
    let (queue, notifications) = mpsc::channel(ingest::BACKLOG_MAX);
    services.tracker.spawn(ingest::run(Arc::clone(&services), notifications));
    let mut backoff = BACKOFF_MIN;
    let mut link = Link { cause: CatchUpCause::Start, good: None };
    gap_begins(&services.metrics, link.cause);
    loop {
        let mut was_up = false;
        let ended = tokio::select! {
            error = session(&services, &queue, &mut link, &mut was_up) => error,
            () = services.stopped.cancelled() => break,
        };
        // What a viewer may miss from here on is missed for this reason, not for those of the
        // attempts that fail.
        if was_up {
            link.cause = CatchUpCause::Link(LinkLoss::from(&ended));
            gap_begins(&services.metrics, link.cause);
        }
        services.metrics.relay_link_up.set(0);
        services.metrics.relay_listens.set(0);
        services.metrics.relay_reconnects.with_label_values(&[ended.kind()]).inc();
        services.listens.deactivate_all();
        // What nobody holds any more is forgotten without a session, too.
        drop(services.listens.changes(services.config.relay.linger));
        if was_up {
            backoff = BACKOFF_MIN;
        }
        tracing::warn!(error = &ended as &dyn Error, cause = ended.kind(), "no database link");
        tokio::select! {
            () = sleep(backoff.mul_f64(0.5 + fastrand::f64() / 2.0)) => {}
            () = services.stopped.cancelled() => break,
        }
        backoff = (backoff * 2).min(services.config.relay.backoff_max);
    }
    services.metrics.relay_link_up.set(0);
}

/// From here on something may be missed, until viewers have been told what.
pub(super) fn gap_begins(metrics: &Metrics, cause: CatchUpCause) {
    metrics.relay_gaps.of(cause).inc();
    metrics.relay_gap_open.set(1);
}

/// One session, from its connection to the error that ends it.
async fn session(
    services: &Services,
    queue: &mpsc::Sender<Notification>,
    link: &mut Link,
    was_up: &mut bool,
) -> LinkError {
    let relay = &services.config.relay;
    let connect = open(services.config.notify_url(), relay.connect_timeout);
    let listener = match timeout(relay.connect_timeout, connect).await {
        Ok(Ok(listener)) => listener,
        Ok(Err(error)) => return error,
        Err(_elapsed) => return LinkError::Unanswered,
    };
    let own_channel = canary::channel(services.gateway);
    let mut session =
        Session { listener: Some(listener), deadline: relay.heartbeat_timeout, own_channel };
    let Err(error) = session.serve(services, queue, link, was_up).await;
    // What arrived while a statement waited for its answer.
    while let Some(notification) = session.listener().next_buffered() {
        if notification.channel() != session.own_channel {
            forward(queue, &notification).await;
        }
    }
    error
}

async fn open(url: &Secret, connect_timeout: Duration) -> Result<PgListener, LinkError> {
    let options = db::options(url).map_err(LinkError::Url)?;
    // A connection of its own asks first: a pool tries a refused connection again until its time
    // is over, and then does not say why.
    if db::is_in_recovery(&options).await.map_err(LinkError::Connect)? {
        return Err(LinkError::InRecovery);
    }
    let pool = db::single(options, connect_timeout);
    let mut listener = PgListener::connect_with(&pool).await.map_err(LinkError::Connect)?;
    // A lost connection is told, never mended behind our back.
    listener.eager_reconnect(false);
    listener.ignore_pool_close_event(true);
    Ok(listener)
}

/// Waits if the queue is full: the rest stays in Postgres.
async fn forward(queue: &mpsc::Sender<Notification>, notification: &PgNotification) {
    let notification = Notification {
        channel: notification.channel().into(),
        payload: notification.payload().to_owned(),
        pid: notification.process_id(),
        received: Instant::now(),
    };
    // The receiver lives as long as the sender, which `run` holds.
    let _ = queue.send(notification).await;
}

/// What one session leaves to the next.
struct Link {
    /// Why something may be missed.
    cause: CatchUpCause,
    /// Up to where nothing is.
    good: Option<Good>,
}

struct Session {
    /// Taken when the session ends.
    listener: Option<PgListener>,
    deadline: Duration,
    /// The canary's.
    own_channel: String,
}

impl Drop for Session {
    /// Closes the connection at once. A listener that is dropped spawns a last `UNLISTEN`, which
    /// on a frozen connection holds that and the server's session until TCP gives up; on a runtime
    /// that never runs it, it is dropped with its connection.
    fn drop(&mut self) {
        let listener = self.listener.take();
        if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() {
            let entered = runtime.enter();
            drop(listener);
            drop(entered);
            runtime.shutdown_background();
        }
    }
}

type Statement<'a, T> = Pin<Box<dyn Future<Output = Result<T, sqlx::Error>> + Send + 'a>>;
type Looking<'a> = Pin<Box<dyn Future<Output = Option<Look>> + Send + 'a>>;

/// What the look gives that is under way, if one is.
async fn look(looking: &mut Option<Looking<'_>>) -> Option<Look> {
    match looking {
        Some(looking) => looking.await,
        None => std::future::pending().await,
    }
}

impl Session {
    #[expect(clippy::expect_used, reason = "only `drop` takes it")]
    fn listener(&mut self) -> &mut PgListener {
        self.listener.as_mut().expect("a session has its listener until it is dropped")
    }

    /// Listens until an error ends the session.
    async fn serve(
        &mut self,
        services: &Services,
        queue: &mpsc::Sender<Notification>,
        link: &mut Link,
        was_up: &mut bool,
    ) -> Result<Infallible, LinkError> {
        let relay = &services.config.relay;
        self.begin(services, link).await?;
        *was_up = true;
        services.metrics.relay_link_up.set(1);
        services.metrics.relay_last_heartbeat.set(unix_seconds());
        tracing::info!("database link is up");

        let mut heartbeat = interval(relay.heartbeat_interval);
        let mut sweep = interval(SWEEP_INTERVAL.min(relay.linger.max(SWEEP_INTERVAL_MIN)));
        let mut canaries = interval(relay.canary_interval);
        for timer in [&mut heartbeat, &mut sweep, &mut canaries] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut clocks = Clocks::default();
        let mut canary = Canary::new();
        // The canary's way to the database is not the session's: it must not be waited for.
        let mut looking: Option<Looking<'_>> = None;
        let mut overdue = pin!(sleep(Duration::MAX));
        loop {
            tokio::select! {
                received = self.listener().try_recv() => match received {
                    Ok(Some(notification)) if notification.channel() == self.own_channel => {
                        if let Some(took) = canary.arrived(notification.payload()) {
                            services.metrics.canary_seconds.observe(took.as_secs_f64());
                            services.metrics.canary_last.set(unix_seconds());
                        }
                    }
                    Ok(Some(notification)) => forward(queue, &notification).await,
                    Ok(None) => return Err(LinkError::Closed),
                    Err(error) => return Err(LinkError::Broken(error)),
                },
                look = look(&mut looking) => {
                    looking = None;
                    if let Some(look) = look {
                        self.look_into(services, link, &look).await?;
                        // What cannot be looked into makes no snapshot good.
                        canary.committed(look.failures.is_some().then_some(look.snapshot));
                        overdue.as_mut().reset(Instant::now() + relay.canary_timeout);
                    }
                }
                () = &mut overdue, if canary.is_awaited() => return Err(LinkError::CanaryLost),
                () = services.listens.changed() => self.sync(services).await?,
                _ = sweep.tick() => self.sync(services).await?,
                _ = heartbeat.tick() => {
                    let asked = Instant::now();
                    let theirs = self.run(|listener| Box::pin(db::heartbeat(listener))).await?;
                    let (ours, metrics) = (unix_seconds(), &services.metrics);
                    metrics.relay_last_heartbeat.set(ours);
                    let offset = clocks.compare(theirs, ours, asked.elapsed());
                    metrics.database_clock_offset.set(offset);
                }
                _ = canaries.tick(), if looking.is_none() && !canary.is_awaited() => {
                    canary = Canary::new();
                    let looked = link.good.as_ref().map(|good| good.looked.clone());
                    let nonce = canary.nonce().to_owned();
                    looking = Some(Box::pin(canary::send(services, nonce, looked)));
                }
            }
            if let (Some(snapshot), Some(good)) = (canary.good(), &mut link.good)
                && good.snapshot != *snapshot
            {
                good.snapshot = snapshot.clone();
            }
        }
    }

    /// Listens to everything that is wanted, then tells who may have missed something.
    async fn begin(&mut self, services: &Services, link: &mut Link) -> Result<(), LinkError> {
        let limit = self.deadline / 2;
        self.run(|listener| Box::pin(db::bound(listener, limit))).await?;
        let own_channel = self.own_channel.clone();
        self.run(|listener| {
            Box::pin(async move {
                listener.listen_all([STATS_CHANNEL, REVOCATIONS_CHANNEL, &*own_channel]).await
            })
        })
        .await?;
        // One may have been told before.
        services.revocations_changed.notify_one();
        let identity = self.run(|listener| Box::pin(db::identity(listener))).await?;
        let (cause, covered) = (link.cause, services.listens.covered());
        self.sync_for(services, cause).await?;
        let snapshot = self.run(|listener| Box::pin(db::snapshot(listener))).await?;
        let good = link.good.clone();
        let now = Good { looked: snapshot.xacts.clone(), snapshot, identity };
        let this = now.clone();
        self.run(|listener| {
            Box::pin(async move {
                gaps::catch_up(services, listener, cause, covered, good.as_ref(), &this).await
            })
        })
        .await?;
        // What it sees has been heard, or was read just now.
        link.good = Some(now);
        services.metrics.relay_gap_open.set(0);
        Ok(())
    }

    /// Tells viewers of what the canary has found that triggers could not notify.
    async fn look_into(
        &mut self,
        services: &Services,
        link: &mut Link,
        look: &Look,
    ) -> Result<(), LinkError> {
        let (Some(good), Some((seen, failures))) = (&mut link.good, &look.failures) else {
            return Ok(());
        };
        good.looked.clone_from(seen);
        if failures.is_empty() {
            return Ok(());
        }
        let since = &good.snapshot;
        self.run(|listener| Box::pin(gaps::catch_up_failures(services, listener, since, look)))
            .await?;
        services.metrics.relay_gap_open.set(0);
        Ok(())
    }

    /// Runs statements on the session, under the deadline.
    async fn run<'a, T>(
        &'a mut self,
        statement: impl FnOnce(&'a mut PgListener) -> Statement<'a, T>,
    ) -> Result<T, LinkError> {
        match timeout(self.deadline, statement(self.listener())).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(LinkError::Statement(error)),
            Err(_elapsed) => Err(LinkError::Silent),
        }
    }

    /// Listens to what is wanted and unlistens what is not.
    async fn sync(&mut self, services: &Services) -> Result<(), LinkError> {
        self.sync_for(services, CatchUpCause::LateListen).await
    }

    /// As [`Self::sync`]; who has joined an event that nobody has listened to is caught up for this
    /// cause.
    async fn sync_for(
        &mut self,
        services: &Services,
        cause: CatchUpCause,
    ) -> Result<(), LinkError> {
        let changes = services.listens.changes(services.config.relay.linger);
        for channels in changes.listen.chunks(LISTENS_PER_STATEMENT) {
            self.run(|listener| {
                Box::pin(async move { listener.listen_all(channels.iter().map(|it| &**it)).await })
            })
            .await?;
            let sources = channels.iter().filter_map(|it| services.listens.source(it)).collect();
            self.run(|listener| Box::pin(gaps::learn(services, listener, sources))).await?;
            for source in services.listens.activate(channels) {
                if let Some(event) = source.event.as_ref().filter(|event| event.take_owed()) {
                    services.feeds.offer_gap(event, cause, None, Instant::now());
                }
            }
        }
        for channel in &changes.unlisten {
            self.run(|listener| Box::pin(listener.unlisten(channel))).await?;
        }
        if changes != super::listens::Changes::default() {
            let (listened, unlistened) = (changes.listen.len(), changes.unlisten.len());
            tracing::debug!(listened, unlistened, "listens changed");
            let gauge = &services.metrics.relay_listens;
            gauge.add(i64::try_from(listened).unwrap_or(i64::MAX));
            gauge.sub(i64::try_from(unlistened).unwrap_or(i64::MAX));
        }
        Ok(())
    }
}
