//! The command line: arguments, the small commands, and the exit code of every command.
//!
//! Invariants: the environment is read by `main` alone, which hands it over as an [`Environment`];
//! whatever ends a command is printed once, to standard error, with its causes.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks to a terminal")]

mod explain;
mod process;

use std::{error::Error, io, path::PathBuf, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

use self::{
    explain::explain,
    process::{forbid_core_files, open_files_max, raise_file_limit},
};
use crate::{
    admin::client::{Client, CommandError},
    auth::{revocations::RevokedBy, sign::sign_role},
    bench, db, demo,
    doctor::{self, DoctorError},
    protocol::topic::Privacy,
    secret::Secret,
    server::{
        Server,
        settings::{Config, Effective},
    },
    telemetry::{audit::AuditLog, logs::start_logs},
};

/// The exit code of bad arguments or settings.
const USAGE: u8 = 64;

/// A Supabase Realtime-compatible broadcast gateway.
#[derive(Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serves clients (the default)
    Serve,
    /// Creates or updates the database objects: schema tidegate, triggers, functions
    Migrate {
        /// Takes them away again, with the history; the role tidegate is left
        #[arg(long)]
        uninstall: bool,
    },
    /// Prints a JWT signed with the project's secret
    Token {
        /// Postgres role: anon, authenticated, service_role
        #[arg(long)]
        role: String,
        /// Further claims, a JSON object
        #[arg(long, default_value = "{}")]
        claims: String,
        /// How long the token holds
        #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
        ttl: Duration,
    },
    /// Prints the effective settings, secrets hidden
    Config {
        /// Only says whether they are right
        #[arg(long)]
        check: bool,
        /// Says instead what a token may do with a topic, and which rule and grant decide
        #[arg(long, requires = "topic", conflicts_with = "check")]
        explain: bool,
        /// The topic to explain, without `realtime:`
        #[arg(long, requires = "explain")]
        topic: Option<String>,
        /// The token to explain; `-` reads it from standard input, where no process list shows it
        #[arg(long, requires = "explain")]
        token: Option<String>,
        /// As a private channel
        #[arg(long, requires = "explain")]
        private: bool,
    },
    /// Has the viewers of an event fetch an endpoint again, or everything of the event
    Invalidate {
        /// The event
        eid: String,
        /// The endpoint: /live/event/AB3028
        endpoint: Option<String>,
    },
    /// Holds back what an event is sent, to leave in one message afterwards
    Mute {
        /// The event
        eid: String,
        /// How long, at most 24h; 0s ends it
        #[arg(long = "for", value_name = "LENGTH", value_parser = humantime::parse_duration)]
        length: Duration,
    },
    /// Has tokens open nothing from now on: a person's, a session's or a single one
    Revoke {
        /// The claim: sub, session_id or jti
        #[arg(value_parser = |claim: &str| RevokedBy::named(claim).ok_or("expected sub, session_id or jti"))]
        claim: RevokedBy,
        /// Its value
        value: String,
        /// How long; 0s takes it back
        #[arg(long = "for", value_name = "LENGTH", value_parser = humantime::parse_duration)]
        length: Option<Duration>,
    },
    /// Looks at the whole path, from a write to a page, and says how to mend what is broken
    Doctor(doctor::DoctorArgs),
    /// Starts a throw-away database, a gateway, simulated activity and a page
    Demo(demo::DemoArgs),
    /// Measures a server of this protocol
    Bench(Box<bench::BenchArgs>),
}

/// The environment of the process.
pub struct Environment {
    /// `TIDEGATE_CONFIG`: the operator's file of settings.
    pub config_file: Option<PathBuf>,
    /// All variables; those whose name or value is no text are left out.
    pub variables: Vec<(String, String)>,
}

impl Environment {
    fn settings(&self) -> Result<(Config, Effective), Failure> {
        Config::load(self.config_file.as_deref(), self.variables.clone()).map_err(usage)
    }
}

/// The end of a command that has not done what it should.
struct Failure {
    exit: u8,
    error: Box<dyn Error>,
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { exit: 1, error: Box::new(error) }
    }
}

fn usage(error: impl Error + 'static) -> Failure {
    Failure { exit: USAGE, error: Box::new(error) }
}

fn unasked(error: CommandError) -> Failure {
    Failure { exit: error.exit_code(), error: Box::new(error) }
}

/// Prints why there are no arguments to run, or the help that was asked for, and returns the exit
/// code.
#[must_use]
pub fn refuse(error: &clap::Error) -> u8 {
    let _ = error.print(); // Nowhere to say that the terminal is gone.
    if error.use_stderr() { USAGE } else { 0 }
}

/// Runs the command to its end and returns the exit code of the process.
#[must_use]
pub fn run(cli: Cli, environment: Environment) -> u8 {
    let command = cli.command.unwrap_or(Command::Serve);
    let mut builder = if let Command::Bench(_) = command {
        // One thread takes at once whatever has arrived meanwhile; several wake each other for each
        // frame, on processors that the measured server needs.
        Builder::new_current_thread()
    } else {
        Builder::new_multi_thread()
    };
    let done = builder
        .enable_all()
        .build()
        .map_err(Failure::from)
        .and_then(|runtime| runtime.block_on(Box::pin(dispatch(command, environment))));
    match done {
        Ok(exit) => exit,
        Err(Failure { exit, error }) => {
            let mut cause: Option<&dyn Error> = Some(&*error);
            let mut separator = "tidegate: ";
            while let Some(error) = cause {
                eprint!("{separator}{error}");
                (cause, separator) = (error.source(), ": ");
            }
            eprintln!();
            exit
        }
    }
}

/// Runs the command and returns the exit code of its success.
async fn dispatch(command: Command, environment: Environment) -> Result<u8, Failure> {
    let settings = || environment.settings();
    match command {
        Command::Bench(args) => {
            bench::run(*args, open_files_max(), &mut io::stdout())
                .await
                .map_err(|error| Failure { exit: error.exit_code(), error: Box::new(error) })?;
        }
        Command::Demo(args) => {
            // An action that the end cuts off is rolled back twice, of which the server gives
            // notice.
            start_logs("warn,sqlx::postgres::notice=error,tidegate=info", None).map_err(usage)?;
            // Many viewers need many sockets; with fewer the demo works all the same.
            let _ = raise_file_limit();
            demo::run(args, terminated()?).await?;
        }
        Command::Doctor(args) => return examine(settings()?.0, args).await,
        Command::Serve => serve(environment).await?,
        Command::Migrate { uninstall } => {
            let (config, _) = settings()?;
            start_logs(&config.log, None).map_err(usage)?;
            if uninstall {
                db::uninstall(config.migrate_url()).await?;
                println!("the database objects are gone");
            } else {
                db::migrate(config.migrate_url()).await?;
                println!("the database objects are up to date");
            }
        }
        Command::Token { role, claims, ttl } => {
            let (config, _) = settings()?;
            println!("{}", sign_role(&config.jwt_secret, &role, &claims, ttl).map_err(usage)?);
        }
        Command::Invalidate { eid, endpoint } => {
            let (config, _) = settings()?;
            let asked = client(&config).invalidate(&eid, endpoint.as_deref()).await;
            println!("{}", asked.map_err(unasked)?);
        }
        Command::Mute { eid, length } => {
            let (config, _) = settings()?;
            println!("{}", client(&config).mute(&eid, length).await.map_err(unasked)?);
        }
        Command::Revoke { claim, value, length } => {
            let (config, _) = settings()?;
            let asked = client(&config).revoke(claim, &value, length).await;
            println!("{}", asked.map_err(unasked)?);
        }
        Command::Config { topic: Some(topic), token, private, .. } => {
            let (config, _) = settings()?;
            let token = match token.as_deref() {
                Some("-") => Some(io::read_to_string(io::stdin())?.trim().to_owned()),
                Some(_) | None => token,
            };
            let privacy = if private { Privacy::Private } else { Privacy::Public };
            print!("{}", explain(&config, &topic, token.as_deref(), privacy)?);
        }
        Command::Config { check, .. } => {
            let (_, effective) = settings()?;
            if !check {
                print!("{}", effective.to_toml()?);
            }
        }
    }
    Ok(0)
}

/// Returns a client of the gateway that runs with these settings.
fn client(config: &Config) -> Client {
    Client {
        listen: config.admin_listen,
        token: config.admin_token.clone(),
        database_timeout: config.relay.connect_timeout,
    }
}

/// Returns 0 if all is well, 1 if something has failed, 2 if there are warnings.
async fn examine(config: Config, mut args: doctor::DoctorArgs) -> Result<u8, Failure> {
    if args.token.as_ref().is_some_and(|token| token.expose() == "-") {
        args.token = Some(Secret::from(io::read_to_string(io::stdin())?.trim()));
    }
    let examined = doctor::run(config, &args, &mut io::stdout()).await;
    let failure = |error: DoctorError| Failure { exit: error.exit_code(), error: Box::new(error) };
    Ok(examined.map_err(failure)?.exit_code())
}

/// Serves until SIGTERM or Ctrl-C; SIGHUP makes the server read its rules and keys again and the
/// audit log open its file again.
async fn serve(environment: Environment) -> Result<(), Failure> {
    let file = environment.config_file.clone();
    let read = move || {
        let Environment { config_file, variables } = &environment;
        let loaded = Config::load(config_file.as_deref(), variables.clone());
        loaded.map(|(config, _)| config)
    };
    let config = read().map_err(usage)?;
    let audit = AuditLog::open(&config.audit_log)?;
    start_logs(&config.log, audit.clone()).map_err(usage)?;
    forbid_core_files()?;
    let files = raise_file_limit()?;
    if files < config.limits.connections_max as u64 {
        tracing::warn!(files, "the system allows fewer open files than connections_max");
    }
    let server = Server::bind(config)?.with_reload(Box::new(read), file);
    let (public, admin) = server.addresses()?;
    // Before the line, after which a signal may come.
    let (terminated, mut hangups) = (terminated()?, signal(SignalKind::hangup())?);
    let gateway = Arc::clone(server.gateway());
    let reload = async {
        while hangups.recv().await.is_some() {
            // The reload has logged what is wrong; the old settings hold.
            let _ = gateway.reload();
            if let Some(Err(error)) = audit.as_deref().map(AuditLog::reopen) {
                tracing::warn!(
                    error = &error as &dyn Error,
                    "cannot reopen the audit log; still writing to the old file"
                );
            }
        }
    };
    println!("listening public={public} admin={admin}");
    tokio::select! {
        () = server.run(terminated) => {}
        () = reload => {}
    }
    Ok(())
}

/// Returns a future that ends with SIGTERM or Ctrl-C; both are caught from now on.
fn terminated() -> Result<impl Future<Output = ()>, io::Error> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
