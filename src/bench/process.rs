//! What a process has used, read from `/proc`: CPU time by thread, resident memory.
//!
//! CPU comes from each thread's `schedstat`, in nanoseconds; the clock ticks of `/proc/PID/stat`
//! are too coarse for a microsecond per delivery. A thread that ends between two readings takes
//! what it used since the first with it.

use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};

use nix::{errno::Errno, unistd::gettid};
use procfs::{
    ProcError,
    process::{Process as Directory, Status, Task},
};

/// The kernel brings a thread's account up to date when the thread stops running, or every few
/// milliseconds: what has just become idle is read after this long.
const ACCOUNT_DELAY: Duration = Duration::from_millis(2);

/// A process, by its directory of `/proc`.
#[derive(Debug)]
pub(super) struct Process {
    directory: PathBuf,
}

/// Nanoseconds on CPU of each thread, by thread id.
#[derive(Debug, Default)]
pub(super) struct Cpu(BTreeMap<i32, u64>);

/// Resident memory in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// `VmRSS`: everything resident.
    pub(super) rss_kib: u64,
    /// `RssAnon`: without files and shared memory.
    pub(super) anon_kib: u64,
}

impl Process {
    /// The process with this id, whether there is one or not.
    pub(super) fn of(pid: u32) -> Self {
        Self { directory: format!("/proc/{pid}").into() }
    }

    /// This process.
    pub(super) fn own() -> Self {
        Self { directory: "/proc/self".into() }
    }

    /// Reads the CPU time of every thread.
    ///
    /// # Errors
    /// There is no such process, it may not be read, or the kernel keeps no `schedstat`.
    pub(super) async fn cpu(&self) -> io::Result<Cpu> {
        tokio::time::sleep(ACCOUNT_DELAY).await;
        let mut threads = BTreeMap::new();
        for thread in self.open()?.tasks().map_err(system_error)? {
            let read = thread.and_then(|thread| Ok((thread.tid, on_cpu(&thread)?)));
            match read {
                Ok((thread, nanoseconds)) => {
                    threads.insert(thread, nanoseconds);
                }
                // The thread has ended since the directory was read.
                Err(ProcError::NotFound(_)) => {}
                Err(error) => return Err(system_error(error)),
            }
        }
        if threads.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Cpu(threads))
    }

    /// Reads the resident memory.
    ///
    /// # Errors
    /// There is no such process, or it may not be read.
    pub(super) fn memory(&self) -> io::Result<Memory> {
        Memory::of(&self.open()?.status().map_err(system_error)?)
    }

    fn open(&self) -> io::Result<Directory> {
        Directory::new_with_root(self.directory.clone()).map_err(system_error)
    }
}

impl Memory {
    fn of(status: &Status) -> io::Result<Self> {
        // The kernel's own threads have none.
        let none = || io::Error::from(io::ErrorKind::InvalidData);
        let rss_kib = status.vmrss.ok_or_else(none)?;
        Ok(Self { rss_kib, anon_kib: status.rssanon.ok_or_else(none)? })
    }
}

impl Cpu {
    /// Returns the CPU time used since `earlier` by the threads that still run.
    pub(super) fn since(&self, earlier: &Self) -> Duration {
        let used = self.0.iter().map(|(thread, now)| {
            now.saturating_sub(earlier.0.get(thread).copied().unwrap_or_default())
        });
        Duration::from_nanos(used.sum())
    }
}

/// Returns the CPU time that the calling thread has used.
///
/// # Errors
/// The kernel keeps no `schedstat`.
pub(super) fn thread_cpu() -> io::Result<Duration> {
    std::thread::sleep(ACCOUNT_DELAY);
    let thread = Directory::myself().and_then(|own| own.task_from_tid(gettid().as_raw()));
    thread.and_then(|thread| on_cpu(&thread)).map(Duration::from_nanos).map_err(system_error)
}

/// Reads the nanoseconds that a thread has spent on CPU.
fn on_cpu(thread: &Task) -> Result<u64, ProcError> {
    Ok(thread.schedstat()?.sum_exec_runtime)
}

/// Returns the error as the system words it; one of the content of a file has no number.
fn system_error(error: ProcError) -> io::Error {
    match error {
        ProcError::PermissionDenied(_) => Errno::EACCES.into(),
        ProcError::NotFound(_) => Errno::ENOENT.into(),
        ProcError::Io(error, _) => error,
        ProcError::Incomplete(_) | ProcError::Other(_) | ProcError::InternalError(_) => {
            io::ErrorKind::InvalidData.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, hint::black_box, time::Instant};

    use procfs::{FromBufRead, FromRead, process::Schedstat};

    use super::*;

    #[test]
    fn lines_of_proc_are_read() {
        let status = |rss_anon: &str| {
            let own = fs::read_to_string("/proc/self/status").unwrap();
            let others = own.lines().filter(|line| !line.starts_with("VmRSS:"));
            let others = others.filter(|line| !line.starts_with("RssAnon:"));
            let lines: Vec<_> = others.chain(["VmRSS:\t   12345 kB", rss_anon]).collect();
            Status::from_buf_read(lines.join("\n").as_bytes()).unwrap()
        };
        let memory = Memory::of(&status("RssAnon:\t      67 kB")).unwrap();
        assert_eq!((memory.rss_kib, memory.anon_kib), (12_345, 67));
        assert!(Memory::of(&status("")).is_err());
        let on_cpu =
            |line: &str| Schedstat::from_read(line.as_bytes()).map(|read| read.sum_exec_runtime);
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
