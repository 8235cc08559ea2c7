//! What a process has used, read from `/proc`: CPU time by thread, resident memory.
//!
//! CPU comes from each thread's `schedstat`, in nanoseconds; the clock ticks of `/proc/PID/stat`
//! are too coarse for a microsecond per delivery. A thread that ends between two readings takes
//! what it used since the first with it.

use std::{collections::BTreeMap, fs, io, path::PathBuf, time::Duration};

/// The kernel brings a thread's account up to date when the thread stops running, or every few
/// milliseconds: what has just become idle is read after this long.
const ACCOUNT_DELAY: Duration = Duration::from_millis(2);

/// A running process, by its id.
#[derive(Debug)]
pub(super) struct Process {
    directory: PathBuf,
}

/// Nanoseconds on CPU of each thread, by thread id.
#[derive(Debug, Default)]
pub(super) struct Cpu(BTreeMap<u32, u64>);

/// Resident memory in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// `VmRSS`: everything resident.
    pub(super) rss_kib: u64,
    /// `RssAnon`: without files and shared memory.
    pub(super) anon_kib: u64,
}

impl Process {
    pub(super) fn of(pid: u32) -> Self {
        Self { directory: format!("/proc/{pid}").into() }
    }

    pub(super) fn own() -> Self {
        Self { directory: "/proc/self".into() }
    }

    /// # Errors
    /// There is no such process, it may not be read, or the kernel keeps no `schedstat`.
    pub(super) async fn cpu(&self) -> io::Result<Cpu> {
        tokio::time::sleep(ACCOUNT_DELAY).await;
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(self.directory.join("task"))? {
            let path = entry?.path();
            let thread = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            match fs::read_to_string(path.join("schedstat")) {
                Ok(schedstat) => {
                    threads.insert(thread.ok_or_else(malformed)?, on_cpu(&schedstat)?);
                }
                // The thread has ended since the directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        if threads.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Cpu(threads))
    }

    /// # Errors
    /// There is no such process, or it may not be read.
    pub(super) fn memory(&self) -> io::Result<Memory> {
        let status = fs::read_to_string(self.directory.join("status"))?;
        Ok(Memory { rss_kib: kib(&status, "VmRSS:")?, anon_kib: kib(&status, "RssAnon:")? })
    }
}

impl Cpu {
    /// CPU time used since `earlier` by the threads that still run.
    pub(super) fn since(&self, earlier: &Self) -> Duration {
        let used = self.0.iter().map(|(thread, now)| {
            now.saturating_sub(earlier.0.get(thread).copied().unwrap_or_default())
        });
        Duration::from_nanos(used.sum())
    }
}

/// CPU time that the calling thread has used.
///
/// # Errors
/// The kernel keeps no `schedstat`.
pub(super) fn thread_cpu() -> io::Result<Duration> {
    std::thread::sleep(ACCOUNT_DELAY);
    Ok(Duration::from_nanos(on_cpu(&fs::read_to_string("/proc/thread-self/schedstat")?)?))
}

/// The first field of `schedstat`.
fn on_cpu(schedstat: &str) -> io::Result<u64> {
    schedstat
        .split_ascii_whitespace()
        .next()
        .and_then(|field| field.parse().ok())
        .ok_or_else(malformed)
}

/// A line of `status` such as `VmRSS: 12345 kB`.
fn kib(status: &str, name: &str) -> io::Result<u64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok())
        .ok_or_else(malformed)
}

fn malformed() -> io::Error {
    io::Error::from(io::ErrorKind::InvalidData)
}

#[cfg(test)]
mod tests {
    use std::{hint::black_box, time::Instant};

    use super::*;

    #[test]
    fn lines_of_proc_are_read() {
        let status = "Name:\tx\nVmRSS:\t   12345 kB\nRssAnon:\t      67 kB\nVmSwap:\t 0 kB\n";
        assert_eq!(kib(status, "VmRSS:").unwrap(), 12_345);
        assert_eq!(kib(status, "RssAnon:").unwrap(), 67);
        assert!(kib(status, "RssFile:").is_err());
        assert_eq!(on_cpu("233145 261818 2\n").unwrap(), 233_145);
        assert!(on_cpu("").is_err());
    }

    #[test]
    fn cpu_counts_threads_that_began_in_between() {
        let earlier = Cpu([(1, 100), (2, 50)].into());
        let later = Cpu([(1, 130), (3, 7)].into());
        assert_eq!(later.since(&earlier), Duration::from_nanos(37));
    }

    #[tokio::test]
    async fn work_on_this_thread_is_seen() {
        let (own, before) = (Process::own(), thread_cpu().unwrap());
        let all_before = own.cpu().await.unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(20) {
            black_box(own.memory().unwrap());
        }
        // Other tests may run on the same core: the thread gets at least a tenth of it.
        assert!(thread_cpu().unwrap() - before > Duration::from_millis(2));
        assert!(own.cpu().await.unwrap().since(&all_before) > Duration::from_millis(2));
        let memory = own.memory().unwrap();
        assert!(memory.rss_kib >= memory.anon_kib && memory.anon_kib > 0);
    }

    #[tokio::test]
    async fn a_process_that_is_not_there_is_an_error() {
        assert!(Process::of(u32::MAX).cpu().await.is_err());
        assert!(Process::of(u32::MAX).memory().is_err());
    }
}
