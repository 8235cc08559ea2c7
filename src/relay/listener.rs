//! The one session that listens.
//!
//! Invariants: any error ends the whole session, and the next one is a fresh connection, so that
//! nothing goes on half; every statement has a deadline, because a half-open TCP connection says
//! nothing; a channel is called active only after its LISTEN has been answered; a new session first
//! listens to everything, and then finds out what was missed.

use std::{
    collections::HashSet,
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
use tokio_util::sync::CancellationToken;

use super::{
    canary::{Canaries, Canary, Good, Probe},
    clock_offset::Clocks,
    gaps::Gaps,
    ingest::{Notification, STATS_CHANNEL},
    link::LinkError,
    listens::{Changes, Listens},
    metrics::Metrics,
    places::Relayed,
    settings::Settings,
    status::LinkStatus,
};
use crate::{
    auth::Authenticator,
    clock::{Backoff, unix_seconds},
    db::{self, history, revocations::REVOCATIONS_CHANNEL, session},
    invalidation::{CatchUpCause, Feeds, GapCause},
    secret::Secret,
    telemetry::metrics::{count, set_now},
};

/// The first wait after a session has ended.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// How often idle LISTENs are looked for; oftener only if they linger for less.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
const SWEEP_INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Listens to the database.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) settings: Settings,
    /// A session-mode connection.
    pub(super) url: Secret,
    /// Takes what the session receives.
    pub(super) queue: mpsc::Sender<Notification>,
    pub(super) gaps: Gaps,
    pub(super) canaries: Canaries,
    pub(super) listens: Arc<Listens>,
    pub(super) feeds: Arc<Feeds>,
    pub(super) auth: Arc<Authenticator>,
    pub(super) link: Arc<LinkStatus>,
    pub(super) metrics: Arc<Metrics>,
}

impl Listener {
    /// Listens until the server stops: one session after the other, with jittered backoff between.
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::new(BACKOFF_MIN);
        let mut history = Handover { cause: GapCause::Start, good: None };
        self.metrics.gap_begins(history.cause);
        loop {
            let mut was_up = false;
            let ended = tokio::select! {
                error = self.session(&mut history, &mut was_up) => error,
                () = stop.cancelled() => break,
            };
            // What a viewer may miss from here on is missed for this reason, not for those of the
            // attempts that fail.
            if was_up {
                history.cause = GapCause::Link((&ended).into());
                self.metrics.gap_begins(history.cause);
            }
            self.link.set_up(false);
            self.metrics.listens.set(0);
            self.metrics.reconnects.of(&ended).inc();
            self.listens.deactivate_all();
            // What nobody holds any more is forgotten without a session, too.
            self.listens.forget_idle(self.settings.linger);
            if was_up {
                backoff.reset();
            }
            tracing::warn!(error = &ended as &dyn Error, cause = ended.label(), "no database link");
            let wait = backoff.next(self.settings.backoff_max);
            tokio::select! {
                () = sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)) => {}
                () = stop.cancelled() => break,
            }
        }
        self.link.set_up(false);
    }

    /// Runs one session, from its connection to the error that ends it.
    async fn session(&self, history: &mut Handover, was_up: &mut bool) -> LinkError {
        let connect_timeout = self.settings.connect_timeout;
        let listener = match timeout(connect_timeout, open(&self.url, connect_timeout)).await {
            Ok(Ok(listener)) => listener,
            Ok(Err(error)) => return error,
            Err(_elapsed) => return LinkError::Unanswered,
        };
        let deadline = self.settings.heartbeat_timeout;
        let mut session = ListenSession { parent: self, listener: Some(listener), deadline };
        let Err(error) = session.serve(history, was_up).await;
        // What arrived while a statement waited for its answer.
        while let Some(notification) = session.listener().next_buffered() {
            if notification.channel() != self.canaries.channel {
                self.forward(&notification).await;
            }
        }
        error
    }

    /// Hands a notification on. Waits if the queue is full: the rest stays in Postgres.
    async fn forward(&self, notification: &PgNotification) {
        let notification = Notification {
            channel: notification.channel().into(),
            payload: notification.payload().to_owned(),
            pid: notification.process_id(),
            received: Instant::now(),
        };
        // The receiver lives as long as the sender, which `self` holds.
        let _ = self.queue.send(notification).await;
    }
}

async fn open(url: &Secret, connect_timeout: Duration) -> Result<PgListener, LinkError> {
    let options = db::options(url).map_err(LinkError::Url)?;
    // A connection of its own asks first: a pool tries a refused connection again until its time
    // is over, and then does not say why.
    if session::is_in_recovery(&options).await.map_err(LinkError::Connect)? {
        return Err(LinkError::InRecovery);
    }
    let pool = db::single(options, connect_timeout);
    let mut listener = PgListener::connect_with(&pool).await.map_err(LinkError::Connect)?;
    // A lost connection is reported, never replaced without notice.
    listener.eager_reconnect(false);
    listener.ignore_pool_close_event(true);
    Ok(listener)
}

/// What one session leaves to the next.
struct Handover {
    /// Why something may be missed.
    cause: GapCause,
    /// The point up to which nothing is.
    good: Option<Good>,
}

/// One session.
struct ListenSession<'a> {
    parent: &'a Listener,
    /// Taken when the session ends.
    listener: Option<PgListener>,
    /// For each statement.
    deadline: Duration,
}

impl Drop for ListenSession<'_> {
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
type Probing<'a> = Pin<Box<dyn Future<Output = Option<Probe>> + Send + 'a>>;

/// Waits for the probe that is under way; forever if none is.
async fn probed(probing: &mut Option<Probing<'_>>) -> Option<Probe> {
    match probing {
        Some(probing) => probing.await,
        None => std::future::pending().await,
    }
}

impl ListenSession<'_> {
    #[expect(clippy::expect_used, reason = "only `drop` takes it")]
    fn listener(&mut self) -> &mut PgListener {
        self.listener.as_mut().expect("a session has its listener until it is dropped")
    }

    /// Listens until an error ends the session.
    async fn serve(
        &mut self,
        history: &mut Handover,
        was_up: &mut bool,
    ) -> Result<Infallible, LinkError> {
        let Listener { settings, canaries, listens, link, metrics, .. } = self.parent;
        self.begin(history).await?;
        *was_up = true;
        link.set_up(true);
        set_now(&metrics.last_heartbeat);
        tracing::info!("database link is up");

        let mut heartbeat = interval(settings.heartbeat_interval);
        let mut sweep = interval(SWEEP_INTERVAL.min(settings.linger.max(SWEEP_INTERVAL_MIN)));
        let mut next_canary = interval(settings.canary_interval);
        for timer in [&mut heartbeat, &mut sweep, &mut next_canary] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut clocks = Clocks::default();
        let mut canary = Canary::new();
        // The canary's way to the database is not the session's: it must not be waited for.
        let mut probing: Option<Probing<'_>> = None;
        let mut overdue = pin!(sleep(Duration::MAX));
        loop {
            tokio::select! {
                received = self.listener().try_recv() => match received {
                    Ok(Some(notification)) if notification.channel() == canaries.channel => {
                        if let Some(took) = canary.arrived(notification.payload()) {
                            metrics.canary_seconds.observe(took.as_secs_f64());
                            link.canary_arrived();
                        }
                    }
                    Ok(Some(notification)) => self.parent.forward(&notification).await,
                    Ok(None) => return Err(LinkError::Closed),
                    Err(error) => return Err(LinkError::Broken(error)),
                },
                probe = probed(&mut probing) => {
                    probing = None;
                    if let Some(probe) = probe {
                        self.look_into(history, &probe).await?;
                        // What cannot be looked into makes no snapshot good.
                        canary.committed(probe.failures.is_some().then_some(probe.snapshot));
                        overdue.as_mut().reset(Instant::now() + settings.canary_timeout);
                    }
                }
                () = &mut overdue, if canary.is_awaited() => return Err(LinkError::CanaryLost),
                () = listens.changed() => drop(self.sync(CatchUpCause::LateListen).await?),
                _ = sweep.tick() => drop(self.sync(CatchUpCause::LateListen).await?),
                _ = heartbeat.tick() => {
                    let asked = Instant::now();
                    let theirs = self.run(|listener| Box::pin(session::heartbeat(listener))).await?;
                    let ours = unix_seconds();
                    metrics.last_heartbeat.set(ours);
                    link.set_clock_offset(clocks.compare(theirs, ours, asked.elapsed()));
                }
                _ = next_canary.tick(), if probing.is_none() && !canary.is_awaited() => {
                    canary = Canary::new();
                    let looked = history.good.as_ref().map(|good| good.looked.clone());
                    probing = Some(Box::pin(canaries.send(canary.nonce().to_owned(), looked)));
                }
            }
            if let (Some(snapshot), Some(good)) = (canary.good(), &mut history.good)
                && good.snapshot != *snapshot
            {
                good.snapshot = snapshot.clone();
            }
        }
    }

    /// Listens to everything that is wanted, then offers what viewers may have missed.
    async fn begin(&mut self, history: &mut Handover) -> Result<(), LinkError> {
        let Listener { gaps, canaries, listens, auth, metrics, .. } = self.parent;
        let limit = self.deadline / 2;
        self.run(|listener| Box::pin(session::bound(listener, limit))).await?;
        self.run(|listener| {
            Box::pin(async move {
                let channels = [STATS_CHANNEL, REVOCATIONS_CHANNEL, &*canaries.channel];
                listener.listen_all(channels).await
            })
        })
        .await?;
        // One may have been notified before.
        auth.revocations.mark_stale();
        let identity = self.run(|listener| Box::pin(session::identity(listener))).await?;
        let (cause, covered) = (history.cause, listens.covered());
        while self.sync(cause.into()).await? == Synced::Some {}
        let snapshot = self.run(|listener| Box::pin(history::snapshot(listener))).await?;
        let good = history.good.clone();
        let now = Good { looked: snapshot.xacts.clone(), snapshot, identity };
        let this = now.clone();
        self.run(|listener| {
            Box::pin(
                async move { gaps.catch_up(listener, cause, covered, good.as_ref(), &this).await },
            )
        })
        .await?;
        // What it sees has been heard, or was read just now.
        history.good = Some(now);
        metrics.gap_ends();
        Ok(())
    }

    /// Offers what the canary has found that triggers could not notify.
    async fn look_into(&mut self, history: &mut Handover, probe: &Probe) -> Result<(), LinkError> {
        let (Some(good), Some((seen, failures))) = (&mut history.good, &probe.failures) else {
            return Ok(());
        };
        good.looked.clone_from(seen);
        if failures.is_empty() {
            return Ok(());
        }
        let (gaps, since) = (&self.parent.gaps, &good.snapshot);
        self.run(|listener| Box::pin(gaps.catch_up_failures(listener, since, probe))).await?;
        self.parent.metrics.gap_ends();
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

    /// Unlistens what is not wanted and listens to what is, as much as fits into one exchange each.
    /// Viewers who had joined an event before it was listened to are caught up for this cause.
    async fn sync(&mut self, cause: CatchUpCause) -> Result<Synced, LinkError> {
        let Listener { settings, gaps, listens, feeds, metrics, .. } = self.parent;
        let changes = listens.changes(settings.linger);
        if changes.is_empty() {
            return Ok(Synced::Nothing);
        }
        let Changes { unlisten, listen } = &changes;
        // First, so that the session never listens to more than it may.
        if !unlisten.is_empty() {
            self.run(|listener| Box::pin(session::unlisten(listener, unlisten))).await?;
        }
        let relayed: Vec<_> =
            listen.iter().filter_map(|channel| listens.relayed(channel)).collect();
        if !listen.is_empty() {
            self.run(|listener| Box::pin(session::listen(listener, listen))).await?;
            self.run(|listener| Box::pin(gaps.learn(listener, relayed.clone()))).await?;
        }
        // Whoever has joined by now has not heard the database until here: it was away, or there was
        // no place. Those who join from here on say so themselves, or find the channel active.
        let is_viewed = |relayed: &&Arc<Relayed>| {
            relayed.target.feed(feeds).is_some_and(|feed| feeds.has_viewers(&feed))
        };
        let viewed = relayed.iter().filter(is_viewed).map(|relayed| Arc::clone(&relayed.channel));
        let viewed: HashSet<_> = viewed.collect();
        for relayed in listens.activate(listen) {
            let Some(feed) = relayed.target.feed(feeds) else { continue };
            if feed.take_owed() || viewed.contains(&relayed.channel) {
                feeds.offer_gap(&feed, cause, None, Instant::now());
            }
        }
        tracing::debug!(listened = listen.len(), unlistened = unlisten.len(), "listens changed");
        metrics.listens.set(count(listens.listening()));
        Ok(Synced::Some)
    }
}

/// What there was to do for the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Synced {
    /// Nothing.
    Nothing,
    /// Something, and perhaps there is more.
    Some,
}
