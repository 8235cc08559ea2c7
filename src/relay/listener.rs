//! The one session that listens.
//!
//! Invariants: any error ends the whole session, and the next one is a fresh connection, so that
//! nothing goes on half; every statement has a deadline, because a half-open TCP connection says
//! nothing; a channel is called active only after its LISTEN has been answered.

use std::{convert::Infallible, error::Error, sync::Arc, time::Duration};

use sqlx::postgres::{PgListener, PgNotification};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use super::ingest::{self, Notification, STATS_CHANNEL};
use crate::{auth::jwt::Secret, db, server::Services};

/// The first wait after a session has ended.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

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
}

impl LinkError {
    /// Every label that [`Self::kind`] gives.
    pub const KINDS: [&'static str; 7] =
        ["url", "connect", "in_recovery", "statement", "silent", "closed", "broken"];

    /// The metric's label.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Url(_) => "url",
            Self::Connect(_) | Self::Unanswered => "connect",
            Self::InRecovery => "in_recovery",
            Self::Statement(_) => "statement",
            Self::Silent => "silent",
            Self::Closed => "closed",
            Self::Broken(_) => "broken",
        }
    }
}

/// Listens until the server drains: one session after the other, with jittered backoff between.
pub(crate) async fn run(services: Arc<Services>) {
    let (queue, notifications) = mpsc::channel(ingest::BACKLOG_MAX);
    services.tracker.spawn(ingest::run(Arc::clone(&services), notifications));
    let mut backoff = BACKOFF_MIN;
    loop {
        let mut was_up = false;
        let ended = tokio::select! {
            error = session(&services, &queue, &mut was_up) => error,
            () = services.stopped.cancelled() => break,
        };
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

/// One session, from its connection to the error that ends it.
async fn session(
    services: &Services,
    queue: &mpsc::Sender<Notification>,
    was_up: &mut bool,
) -> LinkError {
    let relay = &services.config.relay;
    let connect = open(services.config.notify_url(), relay.connect_timeout);
    let listener = match timeout(relay.connect_timeout, connect).await {
        Ok(Ok(listener)) => listener,
        Ok(Err(error)) => return error,
        Err(_elapsed) => return LinkError::Unanswered,
    };
    let mut session = Session { listener: Some(listener), deadline: relay.heartbeat_timeout };
    let Err(error) = session.serve(services, queue, was_up).await;
    // What arrived while a statement waited for its answer.
    while let Some(notification) = session.listener().next_buffered() {
        forward(queue, &notification).await;
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
    };
    // The receiver lives as long as the sender, which `run` holds.
    let _ = queue.send(notification).await;
}

struct Session {
    /// Taken when the session ends.
    listener: Option<PgListener>,
    deadline: Duration,
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

type Statement<'a> = std::pin::Pin<Box<dyn Future<Output = Result<(), sqlx::Error>> + Send + 'a>>;

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
        was_up: &mut bool,
    ) -> Result<Infallible, LinkError> {
        let relay = &services.config.relay;
        self.run(|listener| Box::pin(listener.listen(STATS_CHANNEL))).await?;
        self.sync(services).await?;
        *was_up = true;
        services.metrics.relay_link_up.set(1);
        services.metrics.relay_last_heartbeat.set(ingest::unix_seconds());
        tracing::info!("database link is up");

        let mut heartbeat = interval(relay.heartbeat_interval);
        let mut sweep = interval(SWEEP_INTERVAL.min(relay.linger.max(SWEEP_INTERVAL_MIN)));
        for timer in [&mut heartbeat, &mut sweep] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            tokio::select! {
                received = self.listener().try_recv() => match received {
                    Ok(Some(notification)) => forward(queue, &notification).await,
                    Ok(None) => return Err(LinkError::Closed),
                    Err(error) => return Err(LinkError::Broken(error)),
                },
                () = services.listens.changed() => self.sync(services).await?,
                _ = sweep.tick() => self.sync(services).await?,
                _ = heartbeat.tick() => {
                    self.run(|listener| Box::pin(db::heartbeat(listener))).await?;
                    services.metrics.relay_last_heartbeat.set(ingest::unix_seconds());
                }
            }
        }
    }

    /// Runs statements on the session, under the deadline.
    async fn run(
        &mut self,
        statement: impl FnOnce(&mut PgListener) -> Statement<'_>,
    ) -> Result<(), LinkError> {
        match timeout(self.deadline, statement(self.listener())).await {
            Ok(result) => result.map_err(LinkError::Statement),
            Err(_elapsed) => Err(LinkError::Silent),
        }
    }

    /// Listens to what is wanted and unlistens what is not.
    async fn sync(&mut self, services: &Services) -> Result<(), LinkError> {
        let changes = services.listens.changes(services.config.relay.linger);
        if !changes.listen.is_empty() {
            let channels = changes.listen.clone();
            self.run(|listener| {
                Box::pin(async move { listener.listen_all(channels.iter().map(|it| &**it)).await })
            })
            .await?;
            services.listens.activate(&changes.listen);
        }
        for channel in &changes.unlisten {
            let channel = channel.clone();
            self.run(|listener| Box::pin(async move { listener.unlisten(&channel).await })).await?;
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
