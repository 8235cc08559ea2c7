//! A throw-away Postgres cluster from the machine's own binaries, for the demo and for the tests.
//!
//! Invariants: nothing stays behind, however this process ends: a supervisor owns Postgres and its
//! files. A [`Cluster`] is bound to no runtime, so that tests with a runtime each can share one.
//!
//! Absent on purpose, except where it is measured: syncing to disk. A commit outlives Postgres, not
//! the machine.

use std::{
    fs, io,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::{io::AsyncWriteExt as _, sync::Mutex};

use super::supervisor::{Supervisor, without_foreign_variables};

pub use super::supervisor::ClusterError;

/// The range of ports: below the range from which kernels take the ports of outgoing connections,
/// so that no connection takes the port of a stopped cluster before it restarts.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// Most ports that are tried: another process may take one between our attempt and Postgres' bind.
const PORT_ATTEMPTS: usize = 20;

/// A running Postgres cluster of its own, with the superuser `postgres` and no password: every user
/// of the machine may connect by TCP, and only this one by the Unix socket. Dropping it stops
/// Postgres and removes every file, and waits until that is done (about 0.1 s).
#[derive(Debug)]
pub struct Cluster {
    binaries: PathBuf,
    dir: PathBuf,
    port: u16,
    supervisor: Mutex<Supervisor>,
}

impl Cluster {
    /// Creates a cluster and starts it, in about 0.8 s; it accepts connections when this returns.
    ///
    /// # Errors
    /// Any [`ClusterError`]; nothing is left behind.
    pub async fn start() -> Result<Self, ClusterError> {
        Self::start_with(&[]).await
    }

    /// As [`Self::start`], reached by the Unix socket alone, which is in a directory of this user's
    /// own: who reaches the cluster is its superuser.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_without_tcp() -> Result<Self, ClusterError> {
        Self::start_with(&["-c", "listen_addresses="]).await
    }

    /// As [`Self::start`], with commits that wait for the disk.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_synced() -> Result<Self, ClusterError> {
        Self::start_with(&["-c", "fsync=on", "-c", "full_page_writes=on"]).await
    }

    async fn start_with(settings: &[&str]) -> Result<Self, ClusterError> {
        let binaries = find_binaries().ok_or(ClusterError::NotInstalled)?;
        let mut supervisor = Supervisor::spawn(&binaries, settings)?;
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

    /// Returns the TCP address of a database: `postgres://postgres@127.0.0.1:PORT/DATABASE`.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let database = utf8_percent_encode(database, NON_ALPHANUMERIC);
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Returns the address of a database by the Unix socket, which lies in the cluster's directory.
    #[must_use]
    pub fn socket_url(&self, database: &str) -> String {
        let database = utf8_percent_encode(database, NON_ALPHANUMERIC);
        let dir = self.dir.to_string_lossy();
        let dir = utf8_percent_encode(&dir, NON_ALPHANUMERIC);
        format!("postgres://postgres@{dir}:{}/{database}", self.port)
    }

    /// Returns the TCP port on 127.0.0.1; the same for the cluster's whole life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the data directory, as initdb made it.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Creates an empty database.
    ///
    /// # Errors
    /// [`ClusterError::Psql`] when it exists already or the server is stopped.
    pub async fn create_database(&self, name: &str) -> Result<(), ClusterError> {
        let name = name.replace('"', "\"\"");
        self.psql("postgres", &format!("create database \"{name}\"")).await.map(drop)
    }

    /// Runs SQL, which may hold several statements and psql's own commands, and returns the rows:
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

    /// Runs a file of SQL as `psql -f`, and returns the rows as [`Cluster::psql`] does.
    ///
    /// # Errors
    /// [`ClusterError::Psql`] at the first statement that fails or when the file is missing.
    pub async fn psql_file(&self, database: &str, file: &Path) -> Result<String, ClusterError> {
        let output = self.psql_command(database).arg("-f").arg(file).output().await;
        rows_of(&output.map_err(|source| ClusterError::System { action: "run psql", source })?)
    }

    /// Returns psql for a database of this cluster: no start-up file, stops at the first error,
    /// prints rows only (`-X -q -At -v ON_ERROR_STOP=1`); its input is empty and its output is
    /// piped.
    #[must_use]
    pub fn psql_command(&self, database: &str) -> tokio::process::Command {
        let mut command = Command::new(self.binaries.join("psql"));
        without_foreign_variables(&mut command);
        command.args(["-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-d"]);
        command.arg(self.socket_url(database));
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
    /// [`ClusterError::NotStarted`], for example when another process has taken the port.
    ///
    /// # Cancel safety
    /// Not cancel-safe: the supervisor's answer would be taken for the next request's.
    pub async fn restart(&self) -> Result<(), ClusterError> {
        let mut supervisor = self.supervisor.lock().await;
        supervisor.stop_postgres().await?;
        supervisor.start_postgres(self.port, &self.dir).await
    }
}

/// Finds the directory that holds initdb, postgres and psql: that of `PATH`, else the newest of the
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

/// Returns a port of 127.0.0.1 that is free at this moment.
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

fn rows_of(output: &std::process::Output) -> Result<String, ClusterError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    Err(ClusterError::Psql { message })
}

#[cfg(test)]
mod tests;
