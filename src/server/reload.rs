//! Settings that are read again while the server runs: topic rules and keys.
//!
//! Invariants: mistakes leave everything as it was; no socket is closed; each channel that is joined
//! is decided about again.

use std::{
    error::Error,
    fmt,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use strum::VariantNames;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::settings::{Config, ConfigError};
use crate::{
    access::{Access, Rules},
    admin::ReloadFailure,
    auth::{Authenticator, jwks::JwksError},
    clock::FileStamp,
    hub::Sockets,
    telemetry::{
        audit::Audit,
        metrics::{CounterBy, OkOr, Registry},
    },
};

/// Between two looks at the settings' file.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Reads the settings as they were read at the start.
pub type Read = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// Reads rules and keys again.
pub(crate) struct Reload {
    /// Where the settings come from; unset in a server that was given its settings.
    source: OnceLock<(Read, Option<Watched>)>,
    turn: Mutex<()>,
    auth: Arc<Authenticator>,
    access: Arc<Access>,
    sockets: Arc<Sockets>,
    results: CounterBy<OkOr<ReloadError>>,
}

/// A file, and its stamp when the settings were first read.
struct Watched {
    file: PathBuf,
    seen: Option<FileStamp>,
}

impl fmt::Debug for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reload")
    }
}

/// Why nothing was read again.
#[derive(Debug, thiserror::Error, VariantNames, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum ReloadError {
    /// The server was given its settings.
    #[error("this server has no settings to read again")]
    NoSource,
    /// The settings are wrong; the old ones hold.
    #[error("the settings are wrong, and the old ones hold")]
    Config(#[source] ConfigError),
    /// The key set's file cannot be used; the old keys hold.
    #[error("the key set cannot be used, and the old settings hold")]
    Keys(#[source] JwksError),
}

impl From<ReloadError> for ReloadFailure {
    fn from(error: ReloadError) -> Self {
        let message = error.to_string();
        let mistakes = match error {
            ReloadError::Config(ConfigError(mistakes)) => mistakes,
            ReloadError::Keys(error) => vec![error.to_string()],
            ReloadError::NoSource => Vec::new(),
        };
        Self { message, mistakes }
    }
}

impl Reload {
    /// Creates a reload without a source.
    pub(super) fn new(
        auth: Arc<Authenticator>,
        access: Arc<Access>,
        sockets: Arc<Sockets>,
        registry: &Registry,
    ) -> Self {
        Self {
            source: OnceLock::new(),
            turn: Mutex::default(),
            auth,
            access,
            sockets,
            results: registry.counter_by(
                "reloads_total",
                ["result"],
                "Readings of rules and keys while running, by result.",
            ),
        }
    }

    /// Sets where the settings come from, once.
    pub(super) fn set(&self, read: Read, file: Option<PathBuf>) {
        let watched = file.map(|file| Watched { seen: FileStamp::of(&file), file });
        // A second source is ignored: a server has one.
        let _ = self.source.set((read, watched));
    }

    /// Reads the settings again and takes over rules and keys; other settings wait for the next
    /// start.
    ///
    /// # Errors
    /// [`ReloadError`]; everything is as before.
    pub(super) fn reload(&self) -> Result<(), ReloadError> {
        let done = self.try_reload();
        self.results.of(&done).inc();
        let result = done.as_ref().map_or_else(Into::into, |()| "ok");
        Audit::Reload { result }.note(None, None);
        match &done {
            Ok(()) => tracing::info!("rules and keys read again"),
            Err(ReloadError::NoSource) => {}
            Err(ReloadError::Config(mistakes)) => {
                tracing::warn!(error = %mistakes, "settings not read again: they are wrong");
            }
            Err(ReloadError::Keys(error)) => {
                let error = error as &dyn Error;
                tracing::warn!(error, "settings not read again: the key set cannot be used");
            }
        }
        done
    }

    fn try_reload(&self) -> Result<(), ReloadError> {
        let (read, _) = self.source.get().ok_or(ReloadError::NoSource)?;
        // Of two at once the one that reads later takes over later.
        let _one_at_a_time = self.turn.lock();
        let config = read().map_err(ReloadError::Config)?;
        self.auth.reload(&config.trust()).map_err(ReloadError::Keys)?;
        self.access.replace(Rules::new(config.topic, config.topics));
        self.sockets.review();
        Ok(())
    }

    /// Reads the settings again whenever their file changes, until the server stops.
    pub(super) async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let Some((_, Some(Watched { file, seen }))) = self.source.get() else { return };
        let mut seen = *seen;
        let watch = async {
            loop {
                sleep(LOOK_INTERVAL).await;
                let now = FileStamp::of(file);
                // A file that is away is being replaced.
                if now.is_some() && now != seen {
                    seen = now;
                    // What is wrong has been logged, and the file will change again.
                    let _ = self.reload();
                }
            }
        };
        stop.run_until_cancelled(watch).await;
    }

    /// Has channels decided about again whenever the keys change, until the server stops.
    pub(super) async fn follow_keys(self: Arc<Self>, stop: CancellationToken) {
        let mut changes = self.auth.changes();
        let follow = async {
            while changes.changed().await.is_ok() {
                self.sockets.review();
            }
        };
        stop.run_until_cancelled(follow).await;
    }
}
