//! A throw-away Postgres cluster from the machine's own binaries, for the demo and for the tests.
//!
//! Invariants: nothing stays behind, however this process ends. Postgres is the child of a small
//! `sh` supervisor whose standard input is a pipe that only this process holds; when the pipe
//! closes, which the kernel does even after SIGKILL, the supervisor stops Postgres and removes the
//! directory. Postgres never runs as root. A [`Cluster`] is bound to no runtime, so that tests with
//! a runtime each can share one.
//!
//! Absent on purpose: syncing to disk. A commit outlives Postgres, not the machine.

use std::{
    fs,
    io::{self, Write as _},
    net::{Ipv4Addr, TcpListener},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use nix::unistd::{User, geteuid};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Mutex,
    time::{Instant, timeout_at},
};

/// How long initdb, a start with recovery, or a stop may take on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the log is read while Postgres starts, which takes about 50 ms.
const LOG_INTERVAL: Duration = Duration::from_millis(5);

/// Where ports are chosen: below the range from which kernels take the ports of outgoing
/// connections, so that none of those takes the port of a stopped cluster before it restarts.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// How many ports are tried: another process may take one between our look and Postgres' bind.
const PORT_ATTEMPTS: usize = 20;

/// The line that Postgres logs when clients can connect.
const READY: &str = "database system is ready to accept connections";

/// The line that Postgres logs when it ends, also when it could not start.
const ENDED: &str = "database system is shut down";

/// Settings of the server: nothing synced, everything that the gateway can use, little memory.
/// `synchronous_commit` stays on: without it a commit is in no file for up to 0.6 s, and an
/// immediate stop loses what a client was told is there.
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

/// Variables that would lead initdb, Postgres or psql elsewhere than to this cluster.
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

/// The supervisor. Its first answer is the directory; then each request line (`start PORT` or
/// `stop`) gets one line back, `ok …` or `error …`; the end of its input ends everything.
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

/// Why there is no cluster, or why it did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Neither the usual directories nor `PATH` hold initdb, postgres and psql together.
    #[error("PostgreSQL server binaries not found: apt-get install postgresql")]
    NotInstalled,
    /// Postgres refuses to run as root, and there is nobody else to run it as.
    #[error("PostgreSQL does not run as root: add a user named postgres")]
    NoUnprivilegedUser,
    /// The operating system refused what this module needs of it.
    #[error("could not {action}")]
    System {
        /// What was attempted, as an infinitive.
        action: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The supervisor could not make the directory or initialise the cluster.
    #[error("could not make a database cluster: {reason}")]
    Supervisor {
        /// One line, by the supervisor or by initdb.
        reason: String,
    },
    /// Postgres ended instead of accepting connections, or did neither in time.
    #[error("PostgreSQL did not start: {reason}")]
    NotStarted {
        /// The line of its log that says why, or the last one.
        reason: String,
    },
    /// Something did not end within its time.
    #[error("{what} took longer than {} s", PATIENCE.as_secs())]
    TimedOut {
        /// What did not end.
        what: &'static str,
    },
    /// psql ended with an error: the SQL is wrong, or the server is not there.
    #[error("psql: {message}")]
    Psql {
        /// All of its standard error.
        message: String,
    },
}

/// A running Postgres cluster of its own, with the superuser `postgres` and no password. Dropping
/// it stops Postgres and removes every file, and waits until that is done (about 0.1 s).
#[derive(Debug)]
pub struct Cluster {
    binaries: PathBuf,
    dir: PathBuf,
    port: u16,
    supervisor: Mutex<Supervisor>,
}

impl Cluster {
    /// Makes a cluster and starts it, in about 0.8 s; it accepts connections when this returns.
    ///
    /// # Errors
    /// Any [`ClusterError`]; nothing is left behind.
    pub async fn start() -> Result<Self, ClusterError> {
        let binaries = find_binaries().ok_or(ClusterError::NotInstalled)?;
        let mut supervisor = Supervisor::spawn(&binaries)?;
        let dir = PathBuf::from(supervisor.answer("initdb").await?);
        let mut attempts = 0;
        let port = loop {
            let port = free_port()?;
            attempts += 1;
            match supervisor.start_postgres(port, &dir).await {
                Err(ClusterError::NotStarted { reason })
                    if reason.contains("could not bind") && attempts < PORT_ATTEMPTS => {}
                result => break result.map(|()| port)?,
            }
        };
        Ok(Self { binaries, dir, port, supervisor: Mutex::new(supervisor) })
    }

    /// The TCP address of a database: `postgres://postgres@127.0.0.1:PORT/DATABASE`.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let database = utf8_percent_encode(database, NON_ALPHANUMERIC);
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The address of a database through the Unix socket, which lies in the cluster's directory.
    #[must_use]
    pub fn socket_url(&self, database: &str) -> String {
        let database = utf8_percent_encode(database, NON_ALPHANUMERIC);
        let dir = self.dir.to_string_lossy();
        let dir = utf8_percent_encode(&dir, NON_ALPHANUMERIC);
        format!("postgres://postgres@{dir}:{}/{database}", self.port)
    }

    /// The TCP port on 127.0.0.1; the same for the cluster's whole life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The data directory, as initdb made it.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Makes an empty database.
    ///
    /// # Errors
    /// [`ClusterError::Psql`] when it exists already or the server is stopped.
    pub async fn create_database(&self, name: &str) -> Result<(), ClusterError> {
        let name = name.replace('"', "\"\"");
        self.psql("postgres", &format!("create database \"{name}\"")).await.map(drop)
    }

    /// Runs SQL, which may hold several statements and psql's own commands, and gives the rows:
    /// one per line, columns divided by `|`, without a final line break.
    ///
    /// # Errors
    /// [`ClusterError::Psql`] at the first statement that fails.
    pub async fn psql(&self, database: &str, sql: &str) -> Result<String, ClusterError> {
        let mut command = self.psql_command(database);
        command.stdin(Stdio::piped());
        let failed = |source| ClusterError::System { action: "run psql", source };
        let mut child = command.spawn().map_err(failed)?;
        let input = child.stdin.take();
        let write = async move {
            if let Some(mut input) = input {
                // psql stops reading at the first error, whose message matters more.
                drop(input.write_all(sql.as_bytes()).await);
            }
        };
        let ((), output) = tokio::join!(write, child.wait_with_output());
        rows_of(&output.map_err(failed)?)
    }

    /// Runs a file of SQL as `psql -f`, with the rows as [`Cluster::psql`] gives them.
    ///
    /// # Errors
    /// [`ClusterError::Psql`] at the first statement that fails or when the file is missing.
    pub async fn psql_file(&self, database: &str, file: &Path) -> Result<String, ClusterError> {
        let output = self.psql_command(database).arg("-f").arg(file).output().await;
        rows_of(&output.map_err(|source| ClusterError::System { action: "run psql", source })?)
    }

    /// psql for a database of this cluster: no start-up file, stops at the first error, prints rows
    /// only (`-X -q -At -v ON_ERROR_STOP=1`); its input is empty and its output is piped.
    #[must_use]
    pub fn psql_command(&self, database: &str) -> tokio::process::Command {
        let mut command = Command::new(self.binaries.join("psql"));
        without_foreign_variables(&mut command);
        command.args(["-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-d"]).arg(self.url(database));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true);
        command
    }

    /// Stops Postgres as a crash would: clients are cut off, the next start recovers.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`] when it does not end.
    ///
    /// # Cancel safety
    /// Not cancel-safe: the supervisor's answer would be taken for the next request's.
    pub async fn stop_immediate(&self) -> Result<(), ClusterError> {
        self.supervisor.lock().await.stop_postgres().await
    }

    /// Starts Postgres again, on the same port and data, after stopping it if it runs.
    ///
    /// # Errors
    /// [`ClusterError::NotStarted`], for one when another process has taken the port.
    ///
    /// # Cancel safety
    /// Not cancel-safe: the supervisor's answer would be taken for the next request's.
    pub async fn restart(&self) -> Result<(), ClusterError> {
        let mut supervisor = self.supervisor.lock().await;
        supervisor.stop_postgres().await?;
        supervisor.start_postgres(self.port, &self.dir).await
    }
}

/// The `sh` process that owns Postgres and the directory, and the two pipes to it.
#[derive(Debug)]
struct Supervisor {
    process: Child,
    /// `None` only while it is being dropped.
    requests: Option<ChildStdin>,
    answers: ChildStdout,
}

impl Supervisor {
    fn spawn(binaries: &Path) -> Result<Self, ClusterError> {
        let temp = std::env::temp_dir();
        let mut command = Command::new("/bin/sh");
        without_foreign_variables(&mut command);
        command.args(["-c", SUPERVISOR, "tidegate-cluster"]).arg(binaries).arg(short(&temp));
        command.args(SERVER_SETTINGS).current_dir("/");
        // A group of its own, so that a terminal's Ctrl-C or a test runner's kill passes it by.
        command.process_group(0);
        // No handle of ours is inherited: a test runner waits for those to be closed.
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

    async fn start_postgres(&mut self, port: u16, dir: &Path) -> Result<(), ClusterError> {
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

    async fn stop_postgres(&mut self) -> Result<(), ClusterError> {
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

    /// Reads one answer and gives what follows its `ok`.
    async fn answer(&mut self, what: &'static str) -> Result<String, ClusterError> {
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
        // Without our pipe it can only end; a failure to wait leaves nothing to do.
        drop(self.process.wait());
    }
}

/// The directory that holds initdb, postgres and psql: what `PATH` offers, then the newest of the
/// usual places of Debian, RHEL and Homebrew.
fn find_binaries() -> Option<PathBuf> {
    let in_path = Command::new("/bin/sh").args(["-c", "command -v postgres"]).output().ok();
    let in_path = in_path.and_then(|output| {
        let file = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        file.parent().map(Path::to_path_buf)
    });
    let mut usual: Vec<(u32, PathBuf)> = Vec::new();
    for (parent, prefix, rest) in [
        ("/usr/lib/postgresql", "", "bin"),
        ("/usr", "pgsql-", "bin"),
        ("/opt/homebrew/opt", "postgresql@", "bin"),
        ("/usr/local/opt", "postgresql@", "bin"),
    ] {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse().ok());
            usual.extend(version.map(|version| (version, entry.path().join(rest))));
        }
    }
    usual.sort_unstable_by(|a, b| b.cmp(a));
    let usual = usual.into_iter().map(|(_, directory)| directory);
    in_path.into_iter().chain(usual).find(|directory| {
        ["initdb", "postgres", "psql"].iter().all(|name| directory.join(name).is_file())
    })
}

fn unprivileged_user() -> Option<User> {
    ["postgres", "nobody"].iter().find_map(|name| User::from_name(name).ok().flatten())
}

/// A directory whose Unix socket has an address short enough for the kernel (107 bytes).
fn short(temp: &Path) -> &Path {
    if temp.as_os_str().len() > 70 { Path::new("/tmp") } else { temp }
}

/// A port of 127.0.0.1 that nobody has at this moment.
pub(super) fn free_port() -> Result<u16, ClusterError> {
    let mut last = io::ErrorKind::AddrInUse.into();
    for _ in 0..PORT_ATTEMPTS {
        let port = fastrand::u16(PORTS);
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = error,
        }
    }
    Err(ClusterError::System { action: "find a free port", source: last })
}

/// Makes a command independent of the caller's environment, in English so that the log can be read.
fn without_foreign_variables(command: &mut Command) {
    for name in FOREIGN_VARIABLES {
        command.env_remove(name);
    }
    command.env("LC_ALL", "C");
}

/// The line of Postgres' log that says why it did not start, without its time.
fn reason_in(log: &str) -> String {
    let says_why = |line: &&str| line.contains("could not bind") || line.contains("FATAL");
    let line = log.lines().find(says_why).or(log.lines().last()).unwrap_or("it has logged nothing");
    line.split_once("] ").map_or(line, |(_, message)| message).to_owned()
}

fn rows_of(output: &std::process::Output) -> Result<String, ClusterError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    Err(ClusterError::Psql { message })
}

#[cfg(test)]
mod tests;
