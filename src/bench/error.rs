//! The reasons for which a bench fails.

use std::io;

/// Why a bench failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// An argument contradicts another, or cannot be used.
    #[error("{0}")]
    Arguments(&'static str),
    /// The server's name has no address.
    #[error("cannot resolve {host}")]
    Resolve {
        /// Host and port of `--url`.
        host: String,
        /// The resolver's error; none when it knew no address.
        #[source]
        source: Option<io::Error>,
    },
    /// The process may not open as many files; `ulimit -Hn` tells the limit.
    #[error("{needed} open files are needed, the limit is {limit}")]
    FileLimit {
        /// Files that this run opens at most.
        needed: u64,
        /// The hard limit.
        limit: u64,
    },
    /// The server's process cannot be read in `/proc`.
    #[error("cannot measure the server's process")]
    Process(#[source] io::Error),
    /// The database refused the connection or a notification.
    #[error("cannot publish by the database")]
    Database(#[from] sqlx::Error),
    /// The loop of bare writes failed.
    #[error("cannot measure bare writes")]
    Bare(#[source] io::Error),
    /// The report could not be written.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
    /// The report is written; something in it went wrong.
    #[error("{failures} failures, {missing} deliveries missing")]
    Incomplete {
        /// The number of failures, as listed in the report.
        failures: u64,
        /// Deliveries that did not come.
        missing: u64,
    },
}

impl BenchError {
    /// The exit code: 64 for arguments that cannot be used, else 1.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Arguments(_) => 64,
            Self::Resolve { .. }
            | Self::FileLimit { .. }
            | Self::Process(_)
            | Self::Database(_)
            | Self::Bare(_)
            | Self::Output(_)
            | Self::Incomplete { .. } => 1,
        }
    }
}
