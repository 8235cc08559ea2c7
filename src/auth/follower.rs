//! The task that keeps the keys up to date: it polls the key set's file and reads its URL.
//!
//! Invariants: a document that cannot be read or parsed leaves the last good keys in force and is
//! counted by its error; a token that names an unknown key has the URL read again, at most every
//! 30 s however many such tokens arrive, and is answered without waiting.

use std::{error::Error, sync::Arc, time::Duration};

use futures_util::future::join;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{
    authenticator::Authenticator,
    jwk::KeySource,
    jwks::{self, JwksError, JwksFailure},
};
use crate::{
    clock::{Backoff, FileStamp},
    telemetry::metrics::set_now,
};

/// How often the file is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Shortest time between two readings of the URL for unknown keys.
const UNKNOWN_KID_INTERVAL: Duration = Duration::from_secs(30);
/// The wait after the first failure; it doubles, up to `jwks.refresh_interval`.
const BACKOFF: Duration = Duration::from_secs(1);

/// Follows the key set's file and URL.
#[derive(Debug)]
pub(crate) struct KeyFollower {
    auth: Arc<Authenticator>,
}

impl KeyFollower {
    /// Creates the task that updates the keys of `auth`.
    pub(crate) fn new(auth: Arc<Authenticator>) -> Self {
        Self { auth }
    }

    /// Follows both until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(join(self.watch_file(), self.follow_url())).await;
    }

    /// Reads the file whenever it has changed. A fault is logged once for each state of the file.
    async fn watch_file(&self) {
        let mut seen: Option<(Arc<jwks::Settings>, Option<FileStamp>)> = None;
        loop {
            let jwks = self.auth.jwks();
            if !jwks.file.is_empty() {
                let metadata = tokio::fs::metadata(&jwks.file).await.ok();
                let stamp = metadata.as_ref().map(FileStamp::from);
                let is_seen = seen
                    .as_ref()
                    .is_some_and(|(read_as, seen)| Arc::ptr_eq(read_as, &jwks) && *seen == stamp);
                if !is_seen {
                    let taken = jwks::read_file(&jwks)
                        .and_then(|text| Ok(self.auth.take(text, KeySource::File, &jwks)?));
                    self.record(KeySource::File, &taken, &mut None);
                    seen = Some((jwks, stamp));
                }
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Reads the URL every `jwks.refresh_interval`; sooner after a failure, or for an unknown key.
    async fn follow_url(&self) {
        let mut backoff = Backoff::new(BACKOFF);
        let mut missed_at: Option<Instant> = None;
        let mut logged = None;
        loop {
            let jwks = self.auth.jwks();
            if jwks.url.is_empty() {
                self.auth.wanted().await;
                continue;
            }
            let taken = jwks::fetch(&jwks)
                .await
                .and_then(|text| Ok(self.auth.take(text, KeySource::Url, &jwks)?));
            self.record(KeySource::Url, &taken, &mut logged);
            let wait = if taken.is_ok() {
                backoff.reset();
                jwks.refresh_interval
            } else {
                backoff.next(jwks.refresh_interval)
            };
            // The jitter spreads the readings of gateways that started together.
            let mut next = Instant::now() + wait.mul_f64(0.8 + 0.4 * fastrand::f64());
            let mut is_missed = false;
            while timeout_at(next, self.auth.wanted()).await.is_ok() {
                if !Arc::ptr_eq(&jwks, &self.auth.jwks()) {
                    break;
                }
                let sooner = on_unknown_kid(missed_at, Instant::now());
                if sooner < next {
                    (next, is_missed) = (sooner, true);
                }
            }
            if is_missed {
                missed_at = Some(Instant::now());
            }
        }
    }

    /// Counts a reading, and logs its error unless that is the one in `logged`.
    fn record(
        &self,
        from: KeySource,
        taken: &Result<(), JwksError>,
        logged: &mut Option<&'static str>,
    ) {
        let metrics = self.auth.metrics();
        match taken {
            Ok(()) => {
                set_now(metrics.jwks_read.of(from));
                *logged = None;
            }
            Err(error) => {
                metrics.jwks_failures.of(JwksFailure::new(from, error)).inc();
                if logged.replace(error.label()) != Some(error.label()) {
                    let (origin, error) = (from.label(), error as &dyn Error);
                    tracing::warn!(
                        error,
                        origin,
                        "no key set; the keys stay those of the last one"
                    );
                }
            }
        }
    }
}

/// Returns when the URL is read for an unknown key, if `missed_at` is the last reading for one.
fn on_unknown_kid(missed_at: Option<Instant>, now: Instant) -> Instant {
    missed_at.map_or(now, |at| (at + UNKNOWN_KID_INTERVAL).max(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_key_is_asked_for_at_once_and_then_every_30_seconds_at_most() {
        let now = Instant::now();
        let (second, half) = (Duration::from_secs(1), Duration::from_secs(30));
        assert_eq!(on_unknown_kid(None, now), now);
        assert_eq!(on_unknown_kid(Some(now), now), now + half);
        assert_eq!(on_unknown_kid(Some(now), now + half - second), now + half);
        assert_eq!(on_unknown_kid(Some(now), now + half), now + half);
        assert_eq!(on_unknown_kid(Some(now), now + half + second), now + half + second);
    }
}
