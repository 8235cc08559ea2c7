//! The `sh` process that owns a throw-away Postgres and its directory.
//!
//! Invariants: the supervisor's standard input is a pipe that only this process holds. When the
//! pipe closes, which the kernel does even after SIGKILL, the supervisor stops Postgres and removes
//! the directory. Postgres never runs as root. Nothing here is bound to a runtime: each answer is
//! read from a copy of the pipe's handle.

use std::{
    fs,
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use nix::unistd::{User, geteuid};
use tokio::{
    io::AsyncReadExt as _,
    time::{Instant, timeout_at},
};

/// How long initdb, a start with recovery, or a stop may take on a slow and busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Interval at which the log is read while Postgres starts, which takes about 50 ms.
pub(super) const LOG_INTERVAL: Duration = Duration::from_millis(5);

/// The line that Postgres logs when clients can connect.
const READY: &str = "database system is ready to accept connections";

/// The line that Postgres logs when it ends, also when it could not start.
const ENDED: &str = "database system is shut down";

/// Settings of the server: nothing synced, everything that the gateway can use, little memory.
/// `synchronous_commit` stays on: without it a commit is in no file for up to 0.6 s, and an
/// immediate stop loses what a client was told is committed.
const SERVER_SETTINGS: [&str; 14] = [
    "-c",
    "listen_addresses=127.0.0.1",
    "-c",
    "fsync=off",
    "-c",
    "full_page_writes=off",
    "-c",
    "wal_level=logical",
    "-c",
    "max_connections=100",
    "-c",
    "shared_buffers=16MB",
    "-c",
    "log_destination=stderr",
];

/// Variables that would lead initdb, Postgres or psql to another cluster.
const FOREIGN_VARIABLES: [&str; 20] = [
    "PGAPPNAME",
    "PGCHANNELBINDING",
    "PGCLIENTENCODING",
    "PGDATA",
    "PGDATABASE",
    "PGDATESTYLE",
    "PGGSSENCMODE",
    "PGHOST",
    "PGHOSTADDR",
    "PGOPTIONS",
    "PGPASSFILE",
    "PGPASSWORD",
    "PGPORT",
    "PGREQUIREAUTH",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSSLMODE",
    "PGTARGETSESSIONATTRS",
    "PGTZ",
    "PGUSER",
];

/// The supervisor's script. Its first answer is the directory; then each request line (`start PORT`
/// or `stop`) gets one line back, `ok …` or `error …`; the end of its input ends everything.
///
/// Terminal signals and a broken pipe must not end it before it has cleaned up. SIGQUIT is
/// Postgres' immediate stop, which no slow client can delay. The directory is removed twice because
/// a killed postmaster's children may still be writing for a moment.
const SUPERVISOR: &str = r#"
trap '' HUP INT PIPE TERM
umask 077
bin=$1 temp=$2
shift 2
dir=$(mktemp -d "$temp/tidegate.XXXXXX" 2>/dev/null) || dir=$(mktemp -d /tmp/tidegate.XXXXXX) || {
    echo "error no temporary directory can be written: $temp, /tmp"
    exit 1
}
pid=
stop() {
    [ -z "$pid" ] || { kill -QUIT "$pid"; wait "$pid"; pid=; }
}
cd "$dir"
if "$bin/initdb" -D "$dir/data" -U postgres --no-sync --auth=trust -E UTF8 --locale=C \
    >"$dir/initdb.log" 2>&1 </dev/null
then echo "ok $dir"
else echo "error initdb: $(tail -n 1 "$dir/initdb.log")"
fi
while read -r request port; do
    case $request in
    start)
        "$bin/postgres" -D "$dir/data" -p "$port" -k "$dir" "$@" >>"$dir/log" 2>&1 </dev/null &
        pid=$!
        echo ok
        ;;
    stop)
        stop
        echo ok
        ;;
    esac
done
stop
cd /
rm -rf "$dir" || { sleep 1; rm -rf "$dir"; }
"#;

/// Why there is no cluster, or why an action on it failed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Neither `PATH` nor the usual directories hold initdb, postgres and psql together.
    #[error("PostgreSQL server binaries not found: apt-get install postgresql")]
    NotInstalled,
    /// Postgres refuses to run as root, and there is no other user to run it as.
    #[error("PostgreSQL does not run as root: add a user named postgres")]
    NoUnprivilegedUser,
    /// The operating system refused an action.
    #[error("could not {action}")]
    System {
        /// The action, as an infinitive.
        action: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The supervisor could not make the directory or initialise the cluster.
    #[error("could not make a database cluster: {reason}")]
    Supervisor {
        /// One line of the supervisor or of initdb.
        reason: String,
    },
    /// Postgres ended instead of accepting connections, or did neither in time.
    #[error("PostgreSQL did not start: {reason}")]
    NotStarted {
        /// The line of its log that says why, or the last one.
        reason: String,
    },
    /// An action did not end in time.
    #[error("{what} took longer than {} s", PATIENCE.as_secs())]
    TimedOut {
        /// The action that did not end.
        what: &'static str,
    },
    /// psql ended with an error: the SQL is wrong, or the server is not there.
    #[error("psql: {message}")]
    Psql {
        /// All of its standard error.
        message: String,
    },
}

/// The `sh` process that owns Postgres and the directory, and the two pipes to it.
#[derive(Debug)]
pub(super) struct Supervisor {
    process: Child,
    /// `None` only while it is being dropped.
    requests: Option<ChildStdin>,
    answers: ChildStdout,
}

impl Supervisor {
    /// Starts the supervisor, whose first answer is the directory. `binaries` holds initdb and
    /// postgres; `settings` are arguments of the server, which win over its usual ones.
    ///
    /// # Errors
    /// [`ClusterError::System`] and [`ClusterError::NoUnprivilegedUser`]; nothing is left behind.
    pub(super) fn spawn(binaries: &Path, settings: &[&str]) -> Result<Self, ClusterError> {
        let temp = std::env::temp_dir();
        let mut command = Command::new("/bin/sh");
        without_foreign_variables(&mut command);
        command.args(["-c", SUPERVISOR, "tidegate-cluster"]).arg(binaries).arg(short(&temp));
        command.args(SERVER_SETTINGS).args(settings).current_dir("/");
        // A process group of its own, which a terminal's Ctrl-C or a test runner's kill does not
        // reach.
        command.process_group(0);
        // No handle of ours is inherited: a test runner waits until all copies are closed.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if geteuid().is_root() {
            let user = unprivileged_user().ok_or(ClusterError::NoUnprivilegedUser)?;
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let action = "run /bin/sh";
        let mut process =
            command.spawn().map_err(|source| ClusterError::System { action, source })?;
        match (process.stdin.take(), process.stdout.take()) {
            (requests @ Some(_), Some(answers)) => Ok(Self { process, requests, answers }),
            _ => Err(ClusterError::System { action, source: io::ErrorKind::BrokenPipe.into() }),
        }
    }

    /// Starts Postgres on this port, and waits until it accepts connections.
    ///
    /// # Errors
    /// [`ClusterError::NotStarted`] if it ends instead; it is stopped then.
    pub(super) async fn start_postgres(
        &mut self,
        port: u16,
        dir: &Path,
    ) -> Result<(), ClusterError> {
        let log = dir.join("log");
        // Earlier starts have logged to the same file.
        let seen = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let seen = usize::try_from(seen).unwrap_or(usize::MAX);
        let deadline = Instant::now() + PATIENCE;
        self.request(&format!("start {port}\n"), "a start of PostgreSQL").await?;
        let result = loop {
            let text = fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(text.get(seen..).unwrap_or_default());
            if text.contains(READY) {
                return Ok(());
            }
            if text.contains(ENDED) || Instant::now() >= deadline {
                break Err(ClusterError::NotStarted { reason: reason_in(&text) });
            }
            tokio::time::sleep(LOG_INTERVAL).await;
        };
        // The supervisor must forget this process before it is asked for another.
        self.stop_postgres().await?;
        result
    }

    /// Stops Postgres at once, if it runs.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`] if it does not end.
    pub(super) async fn stop_postgres(&mut self) -> Result<(), ClusterError> {
        self.request("stop\n", "a stop of PostgreSQL").await
    }

    async fn request(&mut self, line: &str, what: &'static str) -> Result<(), ClusterError> {
        // A request is far smaller than a pipe's buffer, so that this write never waits.
        let written = match &mut self.requests {
            Some(pipe) => pipe.write_all(line.as_bytes()),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        let action = "talk to the database's supervisor";
        written.map_err(|source| ClusterError::System { action, source })?;
        self.answer(what).await.map(drop)
    }

    /// Reads one answer and returns what follows its `ok`.
    ///
    /// # Errors
    /// [`ClusterError::Supervisor`] with what follows its `error`, [`ClusterError::TimedOut`] if
    /// none comes.
    ///
    /// # Cancel safety
    /// Not cancel-safe: the answer would be taken for the next request's.
    pub(super) async fn answer(&mut self, what: &'static str) -> Result<String, ClusterError> {
        let failed = |source| {
            let action = "talk to the database's supervisor";
            ClusterError::System { action, source }
        };
        // A copy of the handle for each answer, because a runtime keeps what it has polled.
        let pipe = self.answers.as_fd().try_clone_to_owned().map_err(failed)?;
        let pipe = tokio::process::ChildStdout::from_std(ChildStdout::from(pipe));
        let mut pipe = pipe.map_err(failed)?;
        let mut line = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while line.last() != Some(&b'\n') {
            let read = timeout_at(deadline, pipe.read_u8()).await;
            line.push(read.or(Err(ClusterError::TimedOut { what }))?.map_err(failed)?);
        }
        let line = String::from_utf8_lossy(&line);
        match line.trim_end().split_once(' ') {
            Some(("error", reason)) => Err(ClusterError::Supervisor { reason: reason.to_owned() }),
            Some(("ok", value)) => Ok(value.to_owned()),
            _ => Ok(String::new()),
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        drop(self.requests.take());
        // Without our pipe the supervisor can only end; a failure to wait leaves nothing to do.
        drop(self.process.wait());
    }
}

/// Returns a user as whom Postgres runs where this process is root.
fn unprivileged_user() -> Option<User> {
    ["postgres", "nobody"].iter().find_map(|name| User::from_name(name).ok().flatten())
}

/// Returns a directory whose Unix sockets have addresses short enough for the kernel (107 bytes).
fn short(temp: &Path) -> &Path {
    if temp.as_os_str().len() > 70 { Path::new("/tmp") } else { temp }
}

/// Makes a command independent of the caller's environment, and English, so that its log can be
/// parsed.
pub(super) fn without_foreign_variables(command: &mut Command) {
    for name in FOREIGN_VARIABLES {
        command.env_remove(name);
    }
    command.env("LC_ALL", "C");
}

/// Returns the line of Postgres' log that explains why it did not start, without its time.
fn reason_in(log: &str) -> String {
    let says_why = |line: &&str| line.contains("could not bind") || line.contains("FATAL");
    let line = log.lines().find(says_why).or(log.lines().last()).unwrap_or("it has logged nothing");
    line.split_once("] ").map_or(line, |(_, message)| message).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_failed_start_is_the_line_that_says_why() {
        let log = "2026-01-01 00:00:00.000 UTC [7] LOG:  starting\n\
            2026-01-01 00:00:00.001 UTC [7] LOG:  could not bind IPv4 address\n\
            2026-01-01 00:00:00.002 UTC [7] FATAL:  could not create any TCP/IP sockets\n\
            2026-01-01 00:00:00.003 UTC [7] LOG:  database system is shut down\n";
        assert_eq!(reason_in(log), "LOG:  could not bind IPv4 address");
        assert_eq!(reason_in("postgres: no such option\n"), "postgres: no such option");
        assert_eq!(reason_in(""), "it has logged nothing");
    }
}
