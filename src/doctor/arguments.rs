//! The arguments of `tidegate doctor`.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use crate::secret::Secret;

/// A silence longer than the 60 s after which proxies end a connection unless told otherwise, and
/// than the 65 s between two heartbeats of a hidden tab.
const IDLE: &str = "70s";
/// Longest silence; the gateway itself ends one of 90 s.
const IDLE_MAX: Duration = Duration::from_secs(600);

/// Looks at the whole path, from a write to a page, and says how to mend what is broken.
///
/// Exits with 0 if all is well, 2 if there are warnings, 1 if something failed. What is tried in the
/// database rolls back; numbers of sequences that it takes are not given back.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// The database, in place of `database_url` and `notify_database_url`
    #[arg(long, value_name = "URL")]
    pub(super) database_url: Option<Secret>,
    /// Where clients connect: https://HOST or wss://HOST/realtime/v1 [default: the settings' listen]
    #[arg(long)]
    pub(super) url: Option<String>,
    /// The token to join with; `-` reads it from standard input [default: a short-lived one for anon]
    #[arg(long, value_name = "JWT")]
    pub token: Option<Secret>,
    /// Certificates (PEM) that the server of --url is trusted by [default: public authorities]
    #[arg(long, value_name = "FILE")]
    pub(super) ca_file: Option<PathBuf>,
    /// Also waits so long, 70s unless said, to see whether what is in front ends an idle connection
    #[arg(long, value_name = "LENGTH", num_args = 0..=1, default_missing_value = IDLE, value_parser = idle)]
    pub(super) slow: Option<Duration>,
    /// Prints a JSON array instead of lines
    #[arg(long)]
    pub(super) json: bool,
}

fn idle(text: &str) -> Result<Duration, &'static str> {
    let length = humantime::parse_duration(text).ok();
    length
        .filter(|length| *length <= IDLE_MAX)
        .ok_or("expected a duration of 10m at most, such as 70s")
}
