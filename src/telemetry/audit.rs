//! The audit log: connections, joins, refusals and operators' calls, one JSON object per line.
//!
//! Invariants: only this file emits events with its target, and only those are written to the audit
//! log; a line holds names and reasons, never a token, a key, a query string or a payload; a text
//! that a client chose is cut, and escaped as JSON, so that an event is one line (CWE-117); while
//! the log is off, nothing is formatted and nothing is allocated.
//!
//! | `event` | when | fields, besides `connection`, `address`, `role` and `sub` as far as they are known |
//! |---|---|---|
//! | `start` | the server begins | `gateway`, `version` |
//! | `connect` | an upgrade has succeeded | |
//! | `refuse_upgrade` | an upgrade is refused | `reason`, `fault` |
//! | `join` | a join is answered | `topic`, `result`, `rule`, `because`; or the `reason` of a refusal |
//! | `leave` | a channel ends before its connection | `topic`, `reason` |
//! | `token` | a channel is decided about again, and its access or its token changes | `topic`, `result`, `rule`, `because`, `fault` |
//! | `refuse_broadcast` | a channel may not send | `topic`, `rule`, `count` of the broadcasts that arrived together |
//! | `rest` | a REST broadcast; of those of a request that are not sent, the first, and the `count` of all | `topic`, `result`, `rule`, `because`, `fault`, `count` |
//! | `close` | a connection ends, and its channels with it | `reason`, `code` |
//! | `admin` | an operator's call; metrics and health only if the call is refused | `method`, `route`, `status` |
//! | `revoke` | an operator revokes tokens | `by`, `value`, `result` |
//! | `reload` | settings and keys are read again | `result` |
//!
//! `result` and `because` are the verdict and the reason of an access decision; `fault` is the fault
//! of the token that was offered, or the reason why the policies of a private channel have not
//! allowed the action. When a join or a token is refused, `role` and `sub` are those of the token
//! that stays in force: the connection's, or the channel's.
//!
//! A file may be rotated with `copytruncate`, or renamed and then [reopened](AuditLog::reopen),
//! which SIGHUP does.

use std::{
    borrow::Cow,
    fmt::Display,
    fs::{File, OpenOptions},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::Arc,
};

use parking_lot::RwLock;
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::{
    Layer,
    filter::{FilterFn, LevelFilter, Targets, filter_fn},
    fmt::{self, MakeWriter},
    registry::LookupSpan,
};

/// The target of audit events, and of no others.
const TARGET: &str = "tidegate::telemetry::audit";
/// The value of the setting that means standard output.
const STANDARD_OUTPUT: &str = "-";
/// Longest text of a client; the rest is cut off.
const TEXT_BYTES_MAX: usize = 256;

/// The client: its address, and the number of its connection once it has one.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    address: IpAddr,
    connection: Option<u64>,
}

impl Caller {
    /// A client at this address, without a connection.
    #[must_use]
    pub fn at(address: IpAddr) -> Self {
        Self { address: address.to_canonical(), connection: None }
    }

    /// The client's address.
    #[must_use]
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// The same client on the connection of this number.
    #[must_use]
    pub fn on(self, connection: u64) -> Self {
        Self { connection: Some(connection), ..self }
    }
}

/// The holder of a token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    /// The token's role.
    pub(crate) role: &'a str,
    /// The token's `sub`, if it is a text.
    pub(crate) sub: Option<&'a str>,
}

/// An access decision.
#[derive(Clone, Copy)]
pub(crate) struct Decided<'a> {
    /// The verdict.
    pub(crate) result: &'static str,
    /// The name of the topic's rule.
    pub(crate) rule: Option<&'a str>,
    /// The reason.
    pub(crate) because: &'a dyn Display,
}

/// An event; the table of this file has the meaning of its fields.
#[derive(Clone, Copy)]
pub(crate) enum Audit<'a> {
    Start { gateway: uuid::Uuid },
    Connect,
    RefuseUpgrade { reason: &'static str, fault: Option<&'static str> },
    Join { topic: &'a str, decided: Decided<'a> },
    RefuseJoin { topic: &'a str, reason: &'a str },
    Leave { topic: &'a str, reason: &'static str },
    Token { topic: &'a str, decided: Decided<'a>, fault: Option<&'static str> },
    RefuseBroadcast { topic: &'a str, rule: Option<&'a str>, count: usize },
    Rest { topic: &'a str, decided: Decided<'a>, fault: Option<&'static str>, count: Option<usize> },
    RefuseRest { fault: &'static str },
    Close { reason: &'static str, code: &'static str },
    Admin { method: &'a str, route: &'static str, status: u16 },
    Revoke { by: &'static str, value: &'a str, result: &'static str },
    Reload { result: &'static str },
}

impl Audit<'_> {
    /// Writes the event with its client and the holder of the token, as far as they are known.
    pub(crate) fn note(self, caller: impl Into<Option<Caller>>, subject: Option<Subject<'_>>) {
        if !tracing::enabled!(target: TARGET, Level::INFO) {
            return;
        }
        let caller = caller.into();
        macro_rules! line {
            ($event:literal $($field:tt)*) => {
                tracing::info!(
                    target: TARGET,
                    event = $event,
                    connection = caller.and_then(|caller| caller.connection),
                    address = caller.map(|caller| tracing::field::display(caller.address)),
                    role = subject.map(|subject| text(subject.role)).as_deref(),
                    sub = subject.and_then(|subject| subject.sub).map(text).as_deref()
                    $($field)*
                )
            };
        }
        match self {
            Self::Start { gateway } => {
                line!("start", gateway = %gateway, version = env!("CARGO_PKG_VERSION"));
            }
            Self::Connect => line!("connect"),
            Self::RefuseUpgrade { reason, fault } => line!("refuse_upgrade", reason, fault),
            Self::Join { topic, decided: Decided { result, rule, because } } => {
                line!("join", topic = &*text(topic), result, rule, because = %because);
            }
            Self::RefuseJoin { topic, reason } => {
                line!("join", topic = &*text(topic), result = "refused", reason);
            }
            Self::Leave { topic, reason } => line!("leave", topic = &*text(topic), reason),
            Self::Token { topic, decided: Decided { result, rule, because }, fault } => {
                line!("token", topic = &*text(topic), result, rule, because = %because, fault);
            }
            Self::RefuseBroadcast { topic, rule, count } => {
                line!("refuse_broadcast", topic = &*text(topic), rule, count);
            }
            Self::Rest { topic, decided: Decided { result, rule, because }, fault, count } => {
                let topic = text(topic);
                line!("rest", topic = &*topic, result, rule, because = %because, fault, count);
            }
            Self::RefuseRest { fault } => line!("rest", result = "refused", fault),
            Self::Close { reason, code } => line!("close", reason, code),
            Self::Admin { method, route, status } => {
                line!("admin", method = &*text(method), route, status);
            }
            Self::Revoke { by, value, result } => {
                line!("revoke", by, value = &*text(value), result);
            }
            Self::Reload { result } => line!("reload", result),
        }
    }
}

/// Returns what is shown of a text that a client chose. JSON escapes the ASCII control characters;
/// terminals obey those beyond ASCII as well, which are replaced here.
fn text(text: &str) -> Cow<'_, str> {
    let text = text.get(..text.floor_char_boundary(TEXT_BYTES_MAX)).unwrap_or_default();
    let is_command = |c: char| c.is_control() && !c.is_ascii_control() || c == '\u{7f}';
    if text.contains(is_command) {
        text.replace(is_command, "\u{fffd}").into()
    } else {
        text.into()
    }
}

/// Returns the filter that keeps audit events out of another log.
#[must_use]
pub fn is_elsewhere() -> FilterFn<fn(&Metadata<'_>) -> bool> {
    let is_elsewhere: fn(&Metadata<'_>) -> bool = |metadata| metadata.target() != TARGET;
    // Without the hint, events of every level would reach the filter, whatever the other log's
    // level is.
    filter_fn(is_elsewhere).with_max_level_hint(LevelFilter::TRACE)
}

/// Why the audit log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the audit log {} (audit_log)", path.display())]
pub struct AuditError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The open audit log.
#[derive(Debug)]
pub enum AuditLog {
    /// Standard output.
    StandardOutput,
    /// A file.
    File {
        /// The name of the file.
        path: PathBuf,
        /// The file, open for appending.
        file: RwLock<Arc<File>>,
    },
}

impl AuditLog {
    /// Opens the log that the setting names: a file, which is readable for its owner alone if it is
    /// new, or `-` for standard output. Returns `None` if the setting is empty.
    ///
    /// # Errors
    /// [`AuditError`] if the file cannot be opened for appending.
    pub fn open(setting: &str) -> Result<Option<Arc<Self>>, AuditError> {
        Ok(match setting {
            "" => None,
            STANDARD_OUTPUT => Some(Arc::new(Self::StandardOutput)),
            path => {
                let path = PathBuf::from(path);
                let file = RwLock::new(Arc::new(append(&path)?));
                Some(Arc::new(Self::File { path, file }))
            }
        })
    }

    /// Opens the file again by its name, because an operator may have renamed it.
    ///
    /// # Errors
    /// [`AuditError`] if the file cannot be opened; the old one stays open.
    pub fn reopen(&self) -> Result<(), AuditError> {
        match self {
            Self::StandardOutput => {}
            Self::File { path, file } => {
                let fresh = Arc::new(append(path)?);
                *file.write() = fresh;
            }
        }
        Ok(())
    }

    /// Returns the layer that writes audit events, and no others. A line that cannot be written is
    /// reported on standard error.
    #[must_use]
    pub fn layer<S>(self: Arc<Self>) -> impl Layer<S> + Send + Sync
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        fmt::layer()
            .json()
            .flatten_event(true)
            .with_level(false)
            .with_target(false)
            .with_current_span(false)
            .with_span_list(false)
            .with_writer(Writers(self))
            .with_filter(Targets::new().with_target(TARGET, Level::INFO))
    }
}

fn append(path: &PathBuf) -> Result<File, AuditError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| AuditError { path: path.clone(), source })
}

struct Writers(Arc<AuditLog>);

impl MakeWriter<'_> for Writers {
    type Writer = Box<dyn Write>;

    fn make_writer(&self) -> Self::Writer {
        match &*self.0 {
            AuditLog::StandardOutput => Box::new(io::stdout()),
            AuditLog::File { file, .. } => Box::new(Arc::clone(&file.read())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(text(&"é".repeat(200)), "é".repeat(128));
        assert_eq!(text(&format!("a{}", "é".repeat(200))), format!("a{}", "é".repeat(127)));
    }

    #[test]
    fn what_a_terminal_takes_for_a_command_is_not_shown() {
        assert_eq!(text("a\u{9b}31m\u{7f}b\nc"), "a\u{fffd}31m\u{fffd}b\nc");
    }
}
