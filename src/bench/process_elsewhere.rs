//! What a process has used, on a system without `/proc`: nothing can be measured.

use std::{io, time::Duration};

/// A process that cannot be measured.
#[derive(Debug)]
pub(super) struct Process;

/// CPU time that was never read.
#[derive(Debug)]
pub(super) struct Cpu;

/// Resident memory in KiB, never read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    /// Everything resident.
    pub(super) rss_kib: u64,
    /// The same without files and shared memory.
    pub(super) anon_kib: u64,
}

impl Process {
    /// The process with this id.
    pub(super) fn of(_pid: u32) -> Self {
        Self
    }

    /// This process.
    pub(super) fn own() -> Self {
        Self
    }

    /// # Errors
    /// Always.
    #[expect(clippy::unused_async, reason = "elsewhere it waits for the kernel's account")]
    pub(super) async fn cpu(&self) -> io::Result<Cpu> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// # Errors
    /// Always.
    pub(super) fn memory(&self) -> io::Result<Memory> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Cpu {
    /// Returns nothing used.
    pub(super) fn since(&self, _earlier: &Self) -> Duration {
        Duration::ZERO
    }
}

/// # Errors
/// Always.
pub(super) fn thread_cpu() -> io::Result<Duration> {
    Err(io::ErrorKind::Unsupported.into())
}
