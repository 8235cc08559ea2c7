//! Limits of this process: as many open files as the system allows, and no image of its memory.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one, and returns it.
///
/// # Errors
/// The system's refusal; the limit stays as it was.
pub(super) fn raise_file_limit() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Tries to raise the limit of open files and returns what holds afterwards: `u64::MAX` if the
/// system does not report it.
pub(super) fn open_files_max() -> u64 {
    let soft = || getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, _hard)| soft);
    raise_file_limit().or_else(|_refused| soft()).unwrap_or(u64::MAX)
}

/// Has a crash leave no image of the memory, in which the secrets and all clients' tokens stand
/// (CWE-528).
///
/// # Errors
/// The system's refusal.
pub(super) fn forbid_core_files() -> io::Result<()> {
    // Not 0: Linux writes no file for either, but hands the image to a program that core_pattern
    // names unless the limit is 1.
    Ok(setrlimit(Resource::RLIMIT_CORE, 1, 1)?)
}
