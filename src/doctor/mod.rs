//! `tidegate doctor`: examines the whole path, from a write to a page, and reports of each step
//! what it saw and how to mend it.
//!
//! The [`Check`]s stand in the order of the path: database, triggers, NOTIFY, gateway, client, and
//! then what people complain of. With `--json` they are an array of
//! `{"check": "listen-arrives", "status": "failed", "saw": "…", "fix": "…"}`: `check` is
//! [`Check::name`], `status` one of `ok`, `warning`, `failed`, `skipped`, and `fix` is null where
//! there is nothing to mend.
//!
//! Invariants: no secret and no token is written; every step has a deadline, and so has the whole;
//! a check that fails stops only the checks that need it; nothing is left behind: what is tried in
//! the database rolls back, and the one thing that must be committed is an invalidation of
//! [`CANARY_EID`], whose rows of the history are deleted again.

mod arguments;
mod client;
mod context;
mod database;
mod gateway;
mod notify;
mod report;
mod session;
mod socket;
mod symptoms;
mod target;
mod triggers;

use std::{
    io::{self, Write},
    time::Duration,
};

use tokio::time::timeout;

use self::{
    context::Context,
    report::{Report, Seen},
};
use crate::server::settings::Config;

pub use self::{
    arguments::DoctorArgs,
    context::CANARY_EID,
    report::{Check, Group, Status},
};

/// Longest examination, unless it waits for an idle time-out.
const EXAMINATION_TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no report, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    /// An argument cannot be used.
    #[error("{0}")]
    Arguments(&'static str),
    /// The report's reader is gone.
    #[error("the report cannot be written")]
    Output(#[from] io::Error),
}

impl DoctorError {
    /// The exit code of the command: 64 for arguments that cannot be used, else 1.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Arguments(_) => 64,
            Self::Output(_) => 1,
        }
    }
}

/// Examines what the settings and arguments name, and writes the report to `out` as it goes.
/// Returns the worst status of all checks.
///
/// # Errors
/// [`DoctorError`]; what is wrong with the system stands in the report.
pub async fn run(
    config: Config,
    args: &DoctorArgs,
    out: &mut (dyn Write + Send),
) -> Result<Status, DoctorError> {
    let context = Context::new(config, args).map_err(DoctorError::Arguments)?;
    let mut report = Report::new(out, args.json, context.secrets());
    let limit = EXAMINATION_TIMEOUT + args.slow.unwrap_or_default();
    match timeout(limit, Box::pin(examine(&context, &mut report))).await {
        Ok(examined) => examined?,
        Err(_elapsed) => {
            let missing = || Seen::failed("the time was over", "mend what is slow above");
            for check in Check::ALL {
                if !report.has(*check) {
                    report.note(*check, missing())?;
                }
            }
        }
    }
    Ok(report.finish()?)
}

async fn examine(context: &Context, report: &mut Report<'_>) -> io::Result<()> {
    let mut database = database::examine(context, report).await?;
    triggers::examine(context, report, &mut database).await?;
    notify::examine(context, report, &mut database).await?;
    let gateway = gateway::examine(context, report, &database).await?;
    client::examine(context, report, &mut database, &gateway).await?;
    symptoms::examine(context, report, &mut database, &gateway).await
}
