//! Prometheus beside the demo, where it is installed: the gateway's own rules on a throw-away store.
//!
//! Invariants: nothing is missed without it, and nothing stays behind, however this process ends:
//! as with Postgres, a small `sh` supervisor holds it, whose standard input is a pipe that only this
//! process has.

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

/// How long its start may take, which takes a third of a second.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often its port is tried meanwhile.
const TRY_INTERVAL: Duration = Duration::from_millis(20);

/// What an operator gives Prometheus.
const CONFIG: &str = include_str!("../../grafana/prometheus/prometheus.yml");
const RECORDING: &str = include_str!("../../grafana/prometheus/recording.yml");
const ALERTS: &str = include_str!("../../grafana/prometheus/alerts.yml");

/// The gateway's admin address in [`CONFIG`].
const TARGET: &str = "127.0.0.1:9400";

/// Ends with its input. A killed Prometheus leaves a store that nobody needs.
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
    /// Starts one that scrapes this admin address; `None` where it is not installed or does not
    /// start, which is logged.
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

    /// Where its pages are.
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
        // A group of its own, so that a terminal's Ctrl-C passes it by; no handle of ours.
        command.process_group(0).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut supervisor = command.spawn()?;
        let input = supervisor.stdin.take();
        Ok(Self { supervisor, input, address })
    }

    /// Waits until its port is open, or it has ended.
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
        // Without our pipe it can only end; a failure to wait leaves nothing to do.
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
