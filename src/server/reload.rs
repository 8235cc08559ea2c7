//! Settings that are read again while the server runs: topic rules and keys.
//!
//! Invariants: mistakes leave everything as it was; no socket is closed; whoever has joined is
//! decided about anew.

use std::{
    error::Error,
    fmt,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::sleep;

use super::{
    Services,
    settings::{Config, ConfigError},
};
use crate::{access::Rules, auth::jwks::JwksError, clock::FileStamp, telemetry::audit::Audit};

/// Between two looks at the settings' file.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Reads the settings as they were read at the start.
pub type Read = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// Where the settings come from; nowhere in a server that was given its settings.
#[derive(Default)]
pub(crate) struct Reload {
    source: OnceLock<(Read, Option<Watched>)>,
    turn: Mutex<()>,
}

/// A file, and its stamp when it was first looked at.
struct Watched {
    file: PathBuf,
    seen: Option<FileStamp>,
}

impl Reload {
    /// Says where from, once.
    pub(crate) fn set(&self, read: Read, file: Option<PathBuf>) {
        let watched = file.map(|file| Watched { seen: FileStamp::of(&file), file });
        // Whoever comes second is not heard: a server has one source.
        let _ = self.source.set((read, watched));
    }
}

impl fmt::Debug for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reload")
    }
}

/// Why nothing was read again.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The server was given its settings.
    #[error("this server has no settings to read again")]
    NoSource,
    /// They are wrong; the old ones hold.
    #[error("the settings are wrong, and the old ones hold")]
    Config(#[source] ConfigError),
    /// The key set's file cannot be used; the old keys hold.
    #[error("the key set cannot be used, and the old settings hold")]
    Keys(#[source] JwksError),
}

impl ReloadError {
    /// Every label that [`Self::kind`] gives.
    pub const KINDS: [&'static str; 3] = ["no_source", "config", "keys"];

    /// The metric's label.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoSource => "no_source",
            Self::Config(_) => "config",
            Self::Keys(_) => "keys",
        }
    }
}

impl Services {
    /// Reads the settings again and takes over rules and keys; what else has changed waits for the
    /// next start.
    ///
    /// # Errors
    /// [`ReloadError`]; everything is as before.
    pub fn reload(&self) -> Result<(), ReloadError> {
        let done = self.try_reload();
        let result = done.as_ref().map_or_else(ReloadError::kind, |()| "ok");
        self.metrics.reloads.with_label_values(&[result]).inc();
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
        let (read, _) = self.reload.source.get().ok_or(ReloadError::NoSource)?;
        // Of two at once the one that reads later takes over later.
        let _one_at_a_time = self.reload.turn.lock();
        let config = read().map_err(ReloadError::Config)?;
        self.verifier.reload(&config.trust()).map_err(ReloadError::Keys)?;
        self.access.replace(Rules::new(config.topic, config.topics));
        self.review();
        Ok(())
    }
}

/// Reads the settings again whenever their file changes.
pub(crate) async fn watch(services: Arc<Services>) {
    let Some((_, Some(Watched { file, seen }))) = services.reload.source.get() else { return };
    let mut seen = *seen;
    let watch = async {
        loop {
            sleep(LOOK_INTERVAL).await;
            let now = FileStamp::of(file);
            // A file that is away is being replaced.
            if now.is_some() && now != seen {
                seen = now;
                // It has told what is wrong, and the file will change again.
                let _ = services.reload();
            }
        }
    };
    services.stopped.run_until_cancelled(watch).await;
}

/// Has whoever has joined be decided about anew whenever the keys are others.
pub(crate) async fn follow_keys(services: Arc<Services>) {
    let mut changes = services.verifier.changes();
    let follow = async {
        while changes.changed().await.is_ok() {
            services.review();
        }
    };
    services.stopped.run_until_cancelled(follow).await;
}
