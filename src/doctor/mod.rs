//! `tidegate doctor`: looks at the whole path, from a write to a page, and says of each step what it
//! saw and how to mend it.
//!
//! The [`Check`]s stand in the order of the path: database, triggers, NOTIFY, gateway, client, and
//! then what people complain of. With `--json` they are an array of
//! `{"check": "listen-arrives", "status": "failed", "saw": "…", "fix": "…"}`: `check` is
//! [`Check::name`], `status` one of `ok`, `warning`, `failed`, `skipped`, and `fix` is null where
//! there is nothing to mend.
//!
//! Invariants: no secret and no token is written; every step has a deadline, and so has the whole;
//! what fails stops only what needs it; nothing is left behind: what is tried in the database rolls
//! back, and the one thing that must be committed is an invalidation of [`CANARY_EID`], whose rows
//! of the history are deleted again.

mod client;
mod database;
mod gateway;
mod notify;
mod report;
mod socket;
mod symptoms;
mod target;
mod triggers;

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use percent_encoding::percent_decode_str;
use tokio::time::timeout;

use self::{
    report::{Report, Seen},
    target::Target,
};
use crate::{
    admin::client::Client, auth::sign::sign_role, db, secret::Secret, server::settings::Config,
};

pub use self::report::{Check, Group, Status};

/// The event whose invalidation goes the whole way. No real event has its id: theirs are `AB` and a
/// number. Each run has the same, so that no metric gets a label for every run.
pub const CANARY_EID: &str = "tidegate-doctor";

/// For the whole, unless it waits for an idle time-out.
const EXAMINATION_TIMEOUT: Duration = Duration::from_secs(60);
/// A silence longer than the 60 s after which proxies end a connection unless told otherwise, and
/// than the 65 s between two heartbeats of a hidden tab.
const IDLE: &str = "70s";
/// Longest silence; the gateway itself ends one of 90 s.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// How long the token lives that is made where none is given: longer than the whole.
const TOKEN_LIFE: Duration = Duration::from_secs(900);

/// Looks at the whole path, from a write to a page, and says how to mend what is broken.
///
/// Exits with 0 if all is well, 2 if there are warnings, 1 if something failed. What is tried in the
/// database rolls back; numbers of sequences that it takes are not given back.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// The database, in place of `database_url` and `notify_database_url`
    #[arg(long, value_name = "URL")]
    database_url: Option<Secret>,
    /// Where clients connect: https://HOST or wss://HOST/realtime/v1 [default: the settings' listen]
    #[arg(long)]
    url: Option<String>,
    /// The token to join with; `-` reads it from standard input [default: a short-lived one for anon]
    #[arg(long, value_name = "JWT")]
    pub token: Option<Secret>,
    /// Certificates (PEM) that the server of --url is trusted by [default: public authorities]
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Also waits so long, 70s unless said, to see whether what is in front ends an idle connection
    #[arg(long, value_name = "LENGTH", num_args = 0..=1, default_missing_value = IDLE, value_parser = idle)]
    slow: Option<Duration>,
    /// Prints a JSON array instead of lines
    #[arg(long)]
    json: bool,
}

fn idle(text: &str) -> Result<Duration, &'static str> {
    let length = humantime::parse_duration(text).ok();
    length.filter(|it| *it <= IDLE_MAX).ok_or("expected a duration of 10m at most, such as 70s")
}

/// Why there is no report, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    /// An argument cannot be used.
    #[error("{0}")]
    Arguments(&'static str),
    /// Nobody reads the report.
    #[error("the report cannot be written")]
    Output(#[from] io::Error),
}

impl DoctorError {
    /// Of the process: 64 for arguments that cannot be used.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Arguments(_) => 64,
            Self::Output(_) => 1,
        }
    }
}

/// What is looked at.
struct Patient {
    config: Config,
    /// The gateway's operators' port.
    admin: Client,
    /// Whether clients' address was given, or is that of the settings.
    is_public: bool,
    /// Where clients connect; none if the settings do not say.
    target: Option<Target>,
    ca_file: Option<PathBuf>,
    token: Option<Secret>,
    /// Whether the token was made for this run.
    is_token_made: bool,
    /// How long an idle connection is watched, if it is.
    idle: Option<Duration>,
}

impl Patient {
    fn new(mut config: Config, args: &DoctorArgs) -> Result<Self, DoctorError> {
        if let Some(url) = &args.database_url {
            if db::options(url).is_err() {
                return Err(DoctorError::Arguments(
                    "--database-url: expected postgres://USER:PASSWORD@HOST/DATABASE",
                ));
            }
            config.database_url = url.clone();
            config.notify_database_url = Secret::default();
        }
        let target = match &args.url {
            Some(url) => Some(Target::parse(url).ok_or(DoctorError::Arguments(
                "--url: expected https://HOST, or like ws://127.0.0.1:4000/realtime/v1",
            ))?),
            None => Target::of_settings(config.listen),
        };
        let signed = || sign_role(&config.jwt_secret, "anon", "{}", TOKEN_LIFE).ok();
        let key = || Some(&config.publishable_key).filter(|key| !key.is_empty()).cloned();
        let made = if args.token.is_none() { signed() } else { None };
        let is_token_made = made.is_some();
        let token = args.token.clone().or_else(|| made.map(|it| Secret::from(&*it)));
        let admin = Client {
            listen: config.admin_listen,
            token: config.admin_token.clone(),
            database_timeout: config.relay.connect_timeout,
        };
        Ok(Self {
            admin,
            token: token.or_else(key),
            is_token_made,
            is_public: args.url.is_some(),
            ca_file: args.ca_file.clone(),
            idle: args.slow,
            target,
            config,
        })
    }

    /// What no line may show.
    fn secrets(&self) -> Vec<String> {
        let config = &self.config;
        let urls =
            [&config.database_url, &config.notify_database_url, &config.migrate_database_url];
        let mut secrets: Vec<String> = [
            &config.admin_token,
            &config.jwt_secret,
            &config.jwt_secret_previous,
            &config.publishable_key,
            &config.secret_key,
        ]
        .into_iter()
        .chain(&self.token)
        .chain(urls)
        .map(|it| it.expose().to_owned())
        .collect();
        secrets.extend(urls.into_iter().flat_map(|url| passwords(url.expose())));
        secrets
    }
}

/// The passwords in a URL, as they stand there and decoded.
fn passwords(url: &str) -> impl Iterator<Item = String> {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let user = address.rsplit_once('@').map(|(user, _)| user);
    let of_user = user.and_then(|it| it.split_once("://")?.1.split_once(':')).map(|(_, it)| it);
    let of_query =
        query.split('&').filter_map(|pair| pair.split_once('=').filter(|it| it.0 == "password"));
    let all: Vec<_> = of_user.into_iter().chain(of_query.map(|(_, value)| value)).collect();
    let decoded = |it: &str| percent_decode_str(it).decode_utf8_lossy().into_owned();
    all.into_iter().flat_map(move |it| [it.to_owned(), decoded(it)]).collect::<Vec<_>>().into_iter()
}

/// Examines what the settings and arguments name, and writes the report to `out` as it goes. Gives
/// the worst that was seen.
///
/// # Errors
/// [`DoctorError`]; what is wrong with the patient stands in the report.
pub async fn run(
    config: Config,
    args: &DoctorArgs,
    out: &mut (dyn Write + Send),
) -> Result<Status, DoctorError> {
    let patient = Patient::new(config, args)?;
    let mut report = Report::new(out, args.json, patient.secrets());
    let limit = EXAMINATION_TIMEOUT + args.slow.unwrap_or_default();
    match timeout(limit, Box::pin(examine(&patient, &mut report))).await {
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

async fn examine(patient: &Patient, report: &mut Report<'_>) -> io::Result<()> {
    let mut database = database::examine(patient, report).await?;
    triggers::examine(patient, report, &mut database).await?;
    notify::examine(patient, report, &mut database).await?;
    let gateway = gateway::examine(patient, report, &database).await?;
    client::examine(patient, report, &mut database, &gateway).await?;
    symptoms::examine(patient, report, &mut database, &gateway).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_found_wherever_a_url_has_it() {
        let of = |url| passwords(url).collect::<Vec<_>>();
        assert_eq!(of("postgres://u:p%40ss@h/d"), ["p%40ss", "p@ss"]);
        assert_eq!(of("postgres://h/d?user=u&password=q"), ["q", "q"]);
        assert!(of("postgres://u@h/d?sslmode=require").is_empty());
    }
}
