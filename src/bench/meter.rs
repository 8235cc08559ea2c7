//! The server's use of its machine during a run.

use std::{io, time::Duration};

use tokio::time::sleep;

use super::{
    process::{Cpu, Memory, Process},
    report::{Opening, Server, microseconds_each, ratio},
};

/// The server's process and what it had used when the measurement began.
#[derive(Debug)]
pub(super) struct Meter {
    pid: u32,
    process: Process,
    cpu: Cpu,
    memory: Memory,
}

impl Meter {
    /// Begins to measure the process with this id.
    ///
    /// # Errors
    /// The process cannot be read in `/proc`.
    pub(super) async fn start(pid: u32) -> io::Result<Self> {
        let process = Process::of(pid);
        let (cpu, memory) = (process.cpu().await?, process.memory()?);
        Ok(Self { pid, process, cpu, memory })
    }

    /// Measures the cost of the joins, and after `settle` the memory of the sockets.
    ///
    /// # Errors
    /// The process cannot be read in `/proc`.
    pub(super) async fn finish_opening(
        self,
        opening: &Opening,
        settle: Duration,
    ) -> io::Result<Server> {
        let cpu = self.process.cpu().await?.since(&self.cpu);
        sleep(settle).await;
        let (before, joined) = (self.memory, self.process.memory()?);
        let sockets = opening.sockets_joined as u64;
        // Negative where the server gave back more of an earlier load than it took for this one.
        let kib = |joined: u64, before: u64| ratio(joined as f64 - before as f64, sockets);
        Ok(Server {
            pid: self.pid,
            cpu_us_per_join: microseconds_each(cpu, opening.channels_joined),
            cpu_us_per_delivery: None,
            rss_before_kib: before.rss_kib,
            rss_joined_kib: joined.rss_kib,
            rss_published_kib: None,
            rss_kib_per_socket: kib(joined.rss_kib, before.rss_kib),
            rss_anon_kib_per_socket: kib(joined.anon_kib, before.anon_kib),
        })
    }

    /// Adds the cost of `deliveries` since the measurement began to what is known of the server.
    ///
    /// # Errors
    /// The process cannot be read in `/proc`.
    pub(super) async fn finish_publishing(
        self,
        deliveries: u64,
        server: &mut Server,
    ) -> io::Result<()> {
        let cpu = self.process.cpu().await?.since(&self.cpu);
        server.cpu_us_per_delivery = microseconds_each(cpu, deliveries);
        server.rss_published_kib = Some(self.process.memory()?.rss_kib);
        Ok(())
    }
}
