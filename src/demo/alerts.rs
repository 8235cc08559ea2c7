//! Prometheus beside the demo, where it is installed: the gateway's own rules on a throw-away
//! store.
//!
//! Invariants: the demo needs no Prometheus, and nothing stays behind, however this process ends:
//! as with Postgres, a small `sh` supervisor owns Prometheus; its standard input is a pipe that
//! only this process holds.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

use super::cluster::free_port;

/// How long the start may take; a third of a second is usual.
const PATIENCE: Duration = Duration::from_secs(10);

/// Interval at which the port is tried during the start.
const TRY_INTERVAL: Duration = Duration::from_millis(20);

/// The configuration that operators give Prometheus.
const CONFIG: &str = include_str!("../../grafana/prometheus/prometheus.yml");
const RECORDING: &str = include_str!("../../grafana/prometheus/recording.yml");
const ALERTS: &str = include_str!("../../grafana/prometheus/alerts.yml");

/// The gateway's admin address in [`CONFIG`].
const TARGET: &str = "127.0.0.1:9400";

/// The supervisor's script, which ends with its input. Prometheus may be killed: nobody needs its
/// store.
const SUPERVISOR: &str = r#"
trap '' HUP INT PIPE TERM
umask 077
command -v prometheus >/dev/null || exit 1
dir=$(mktemp -d "$1/tidegate.XXXXXX") || exit 1
cd "$dir" || exit 1
printf '%s' "$2" >prometheus.yml
printf '%s' "$3" >recording.yml
printf '%s' "$4" >alerts.yml
prometheus --config.file=prometheus.yml --storage.tsdb.path=data --web.listen-address="$5" \
    >log 2>&1 </dev/null &
pid=$!
cat >/dev/null
kill -KILL "$pid"
wait "$pid"
cd /
rm -rf "$dir"
"#;

/// A running Prometheus.
#[derive(Debug)]
pub(super) struct Prometheus {
    supervisor: Child,
    /// `None` only while it is being dropped.
    input: Option<ChildStdin>,
    address: SocketAddr,
}

impl Prometheus {
    /// Starts a Prometheus that scrapes this admin address; `None` where it is not installed or
    /// does not start, which is logged.
    pub(super) async fn start(admin: SocketAddr) -> Option<Self> {
        let started = match Self::spawn(admin) {
            Ok(mut started) => started.is_reached().await.then_some(started),
            Err(error) => {
                tracing::debug!(%error, "cannot run a shell for Prometheus");
                None
            }
        };
        if started.is_none() {
            tracing::info!("no Prometheus: the demo goes on without alerts");
        }
        started
    }

    /// Returns the address of its pages.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn spawn(admin: SocketAddr) -> io::Result<Self> {
        let port = free_port().map_err(io::Error::other)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut command = Command::new("/bin/sh");
        command.args(["-c", SUPERVISOR, "tidegate-prometheus"]).arg(std::env::temp_dir());
        command.arg(CONFIG.replace(TARGET, &admin.to_string())).args([RECORDING, ALERTS]);
        command.arg(address.to_string());
        // A process group of its own, which a terminal's Ctrl-C does not reach; no handle of ours.
        command.process_group(0).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut supervisor = command.spawn()?;
        let input = supervisor.stdin.take();
        Ok(Self { supervisor, input, address })
    }

    /// Waits until the port is open, and returns false if Prometheus ends before.
    async fn is_reached(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline && matches!(self.supervisor.try_wait(), Ok(None)) {
            if TcpStream::connect(self.address).await.is_ok() {
                return true;
            }
            sleep(TRY_INTERVAL).await;
        }
        false
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.input.take());
        // Without our pipe the supervisor can only end; a failure to wait leaves nothing to do.
        drop(self.supervisor.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_of_the_demo_is_the_operators_with_another_target() {
        assert_eq!(CONFIG.matches(TARGET).count(), 1);
    }
}
