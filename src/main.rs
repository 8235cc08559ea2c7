//! Arguments, logs, settings, run, exit code.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks to a terminal")]

use std::{error::Error, io, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use tidegate::{
    admin::client::{self, CommandError},
    auth::{revocations::By, sign::sign_role},
    bench,
    cli::explain::explain,
    db, demo,
    doctor::{self, DoctorError},
    protocol::topic::Privacy,
    secret::Secret,
    server::{
        Server, forbid_core_files, raise_file_limit,
        settings::{Config, Effective},
    },
    telemetry::{audit::AuditLog, logs::start_logs},
};
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

/// Bad arguments or settings.
const USAGE: u8 = 64;

/// A Supabase Realtime-compatible broadcast gateway.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
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
        #[arg(value_parser = |claim: &str| By::named(claim).ok_or("expected sub, session_id or jti"))]
        claim: By,
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

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print(); // Nowhere to say that the terminal is gone.
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    let runtime = match cli.command {
        // One thread takes what has arrived meanwhile at once; several wake each other for each
        // frame, on processors that the measured server needs.
        Some(Command::Bench(_)) => Builder::new_current_thread().enable_all().build(),
        Some(_) | None => Builder::new_multi_thread().enable_all().build(),
    };
    let done = runtime.map_err(Failure::from).and_then(|it| it.block_on(Box::pin(run(cli))));
    match done {
        Ok(exit) => ExitCode::from(exit),
        Err(Failure { exit, error }) => {
            let mut cause: Option<&dyn Error> = Some(&*error);
            let mut separator = "tidegate: ";
            while let Some(error) = cause {
                eprint!("{separator}{error}");
                (cause, separator) = (error.source(), ": ");
            }
            eprintln!();
            ExitCode::from(exit)
        }
    }
}

/// What ends the process, and with which code.
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

/// Gives the exit code of what went well.
async fn run(cli: Cli) -> Result<u8, Failure> {
    let mut out = io::stdout();
    match cli.command.unwrap_or(Command::Serve) {
        Command::Bench(args) => {
            bench::run(*args, &mut out)
                .await
                .map_err(|error| Failure { exit: error.exit_code(), error: Box::new(error) })?;
        }
        Command::Demo(args) => {
            // An action that the end cuts off is rolled back twice, of which the server gives notice.
            start_logs("warn,sqlx::postgres::notice=error,tidegate=info", None).map_err(usage)?;
            demo::run(args, terminated()?).await?;
        }
        Command::Doctor(args) => return examine(args).await,
        Command::Serve => serve().await?,
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
            let asked = client::invalidate(&config, &eid, endpoint.as_deref()).await;
            println!("{}", asked.map_err(unasked)?);
        }
        Command::Mute { eid, length } => {
            let (config, _) = settings()?;
            println!("{}", client::mute(&config, &eid, length).await.map_err(unasked)?);
        }
        Command::Revoke { claim, value, length } => {
            let (config, _) = settings()?;
            let asked = client::revoke(&config, claim, &value, length).await;
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

/// Gives 0 if all is well, 1 if something has failed, 2 if there are warnings.
async fn examine(mut args: doctor::DoctorArgs) -> Result<u8, Failure> {
    let (config, _) = settings()?;
    if args.token.as_ref().is_some_and(|it| it.expose() == "-") {
        args.token = Some(Secret::from(io::read_to_string(io::stdin())?.trim()));
    }
    let examined = doctor::run(config, &args, &mut io::stdout()).await;
    let failure = |error: DoctorError| Failure { exit: error.exit_code(), error: Box::new(error) };
    Ok(examined.map_err(failure)?.exit_code())
}

/// Serves until it is told to end; a hangup has it read its rules and keys again.
async fn serve() -> Result<(), Failure> {
    let (file, variables) = sources();
    let read_file = file.clone();
    let read = move || {
        let loaded = Config::load(read_file.as_deref(), variables.clone());
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
    // Before the line, which says that a signal may come.
    let (terminated, mut hangups) = (terminated()?, signal(SignalKind::hangup())?);
    let services = Arc::clone(server.services());
    let reload = async {
        while hangups.recv().await.is_some() {
            // It has logged what is wrong; the old settings hold.
            let _ = services.reload();
            if let Some(Err(error)) = audit.as_deref().map(AuditLog::reopen) {
                tracing::warn!(error = &error as &dyn Error, "the old file is written on");
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

/// The settings' sources: the file that `TIDEGATE_CONFIG` names, and the environment.
#[expect(clippy::disallowed_methods, reason = "this is the one reader of the environment")]
fn sources() -> (Option<PathBuf>, Vec<(String, String)>) {
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    (std::env::var_os("TIDEGATE_CONFIG").map(PathBuf::from), variables.collect())
}

fn settings() -> Result<(Config, Effective), Failure> {
    let (file, variables) = sources();
    Config::load(file.as_deref(), variables).map_err(usage)
}

/// Waits for SIGTERM or Ctrl-C.
fn terminated() -> Result<impl Future<Output = ()>, io::Error> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
