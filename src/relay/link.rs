//! Why the database link is lost.

use crate::invalidation::LinkLoss;

/// Why a listening session ended, or never began.
#[derive(Debug, thiserror::Error, strum::VariantNames, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum LinkError {
    /// The URL cannot be read.
    #[error("the database URL cannot be read")]
    Url(#[source] sqlx::Error),
    /// No connection was made.
    #[error("no connection to the database")]
    Connect(#[source] sqlx::Error),
    /// The connection was taken and not answered in time.
    #[strum(serialize = "connect")]
    #[error("the database does not answer")]
    Unanswered,
    /// The server is a standby: it refuses LISTEN.
    #[error("the database is in recovery: LISTEN needs the primary")]
    InRecovery,
    /// A statement failed.
    #[error("a statement of the listening session failed")]
    Statement(#[source] sqlx::Error),
    /// A statement was not answered in time: the connection is half open.
    #[error("the listening session does not answer")]
    Silent,
    /// The server closed the connection.
    #[error("the database closed the listening session")]
    Closed,
    /// The connection broke while notifications were awaited.
    #[error("the listening session broke")]
    Broken(#[source] sqlx::Error),
    /// A notification to this gateway itself was committed and did not arrive.
    #[error(
        "a committed notification did not arrive: notify_database_url needs a session of its own, \
         not one of a transaction pooler, in the database of database_url"
    )]
    CanaryLost,
}

impl LinkError {
    /// The error as metrics and logs name it.
    #[must_use]
    pub fn label(&self) -> &'static str {
        self.into()
    }
}

impl From<&LinkError> for LinkLoss {
    fn from(error: &LinkError) -> Self {
        match error {
            LinkError::Url(_) => Self::Url,
            LinkError::Connect(_) | LinkError::Unanswered => Self::Connect,
            LinkError::InRecovery => Self::InRecovery,
            LinkError::Statement(_) => Self::Statement,
            LinkError::Silent => Self::Silent,
            LinkError::Closed => Self::Closed,
            LinkError::Broken(_) => Self::Broken,
            LinkError::CanaryLost => Self::CanaryLost,
        }
    }
}
