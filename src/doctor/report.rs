//! The checks, their results, and the report: one line for each check, or one JSON array.
//!
//! Invariants: each check is noted exactly once, in the order of [`Check::ALL`], which is that of
//! the path; a server's text is one line of bounded length, without commands to a terminal; no
//! secret of the settings and no token is written, even where a server repeats it.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use serde_json::{Value, json};

/// Longest text of a server in the report.
const SAID_CHARS_MAX: usize = 300;
/// Shortest secret that is hidden: a shorter one occurs in other texts by chance.
const SECRET_BYTES_MIN: usize = 6;

/// The part of the path that a check examines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Postgres, and the gateway's role in it.
    Database,
    /// Triggers on the tables, and what they notify.
    Triggers,
    /// The way from a commit to the listening session.
    Notify,
    /// The process, its keys and its clock.
    Gateway,
    /// The way from the gateway to a page.
    Client,
    /// Complaints of users, explained from all other checks.
    Complaints,
}

impl Group {
    /// Returns the group's heading in the report.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Database => "database",
            Self::Triggers => "triggers",
            Self::Notify => "NOTIFY",
            Self::Gateway => "gateway",
            Self::Client => "client",
            Self::Complaints => "complaints",
        }
    }
}

macro_rules! checks {
    ($($group:ident { $($check:ident $name:literal,)* })*) => {
        /// One step of the examination. Its name is stable: scripts know it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Check {
            $($(#[doc = concat!("`", $name, "`")] $check,)*)*
        }

        impl Check {
            /// All checks, in the order of the path.
            pub const ALL: &'static [Self] = &[$($(Self::$check,)*)*];

            /// Returns the name that scripts know.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $($(Self::$check => $name,)*)* }
            }

            /// Returns the part of the path.
            #[must_use]
            pub const fn group(self) -> Group {
                match self { $($(Self::$check)|* => Group::$group,)* }
            }
        }
    };
}

checks! {
    Database {
        DatabaseReachable "database-reachable",
        DatabaseVersion "database-version",
        DatabasePrimary "database-primary",
        DatabaseClock "database-clock",
        RoleRights "role-rights",
        RoleLeastPrivilege "role-least-privilege",
        BrowserRights "browser-rights",
        HistoryRetention "history-retention",
        NotifyQueue "notify-queue",
        WalLevel "wal-level",
    }
    Triggers {
        TriggerCoverage "trigger-coverage",
        FunctionDrift "function-drift",
        FunctionSafety "function-safety",
        TriggerFailures "trigger-failures",
        DryRunVotes "dry-run-votes",
        DryRunBids "dry-run-bids",
        DryRunMedia "dry-run-media",
        DryRunArt "dry-run-art",
        DryRunEventArtists "dry-run-event-artists",
        DryRunRoundContestants "dry-run-round-contestants",
        DryRunArtworkOffers "dry-run-artwork-offers",
        DryRunPaymentProcessing "dry-run-payment-processing",
        DryRunEvents "dry-run-events",
    }
    Notify {
        ListenReachable "listen-reachable",
        ListenArrives "listen-arrives",
        ListenAllowList "listen-allow-list",
    }
    Gateway {
        GatewayAdmin "gateway-admin",
        GatewayLink "gateway-link",
        GatewayClock "gateway-clock",
        JwtKeys "jwt-keys",
        Token "token",
    }
    Client {
        WebsocketUpgrade "websocket-upgrade",
        ClientAddress "client-address",
        ClientJoin "client-join",
        EndToEnd "end-to-end",
        UnlistedChannel "unlisted-channel",
        IdleTimeout "idle-timeout",
    }
    Complaints {
        NoNotifications "no-notifications",
        TooManyNotifications "too-many-notifications",
        NotRefreshing "not-refreshing",
        WrongEvent "wrong-event",
    }
}

/// The outcome of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Everything is as it should be.
    Ok,
    /// The step works, and an operator should read the line.
    Warning,
    /// The step does not work.
    Failed,
    /// The step was not examined.
    Skipped,
}

impl Status {
    /// Returns the exit code of the process if no check is worse.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Ok | Self::Skipped => 0,
            Self::Failed => 1,
            Self::Warning => 2,
        }
    }

    /// Returns the word in the report.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) status: Status,
    /// What the check has seen, or why it was skipped.
    pub(super) saw: String,
    /// A command, or a setting by its name; `None` where there is nothing to mend.
    pub(super) fix: Option<String>,
}

impl Seen {
    pub(super) fn ok(saw: impl Into<String>) -> Self {
        Self { status: Status::Ok, saw: saw.into(), fix: None }
    }

    pub(super) fn warning(saw: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { status: Status::Warning, saw: saw.into(), fix: Some(fix.into()) }
    }

    pub(super) fn failed(saw: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { status: Status::Failed, saw: saw.into(), fix: Some(fix.into()) }
    }

    pub(super) fn skipped(why: impl Into<String>) -> Self {
        Self { status: Status::Skipped, saw: why.into(), fix: None }
    }
}

/// Collects the results and writes each line as it comes; JSON at the end.
pub(super) struct Report<'a> {
    out: &'a mut (dyn Write + Send),
    is_json: bool,
    /// Texts that must not be written, the longest first.
    secrets: Vec<String>,
    seen: BTreeMap<Check, Seen>,
    group: Option<Group>,
}

impl<'a> Report<'a> {
    pub(super) fn new(
        out: &'a mut (dyn Write + Send),
        is_json: bool,
        secrets: Vec<String>,
    ) -> Self {
        let mut secrets = secrets;
        secrets.retain(|secret| secret.len() >= SECRET_BYTES_MIN);
        // A secret that contains another is hidden first: else its rest would be written.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self { out, is_json, secrets, seen: BTreeMap::new(), group: None }
    }

    /// Notes the result of a check, and writes its line.
    ///
    /// # Errors
    /// The report's reader is gone.
    pub(super) fn note(&mut self, check: Check, seen: Seen) -> io::Result<()> {
        let Seen { status, saw, fix } = seen;
        let seen = Seen { status, saw: self.clean(&saw), fix: fix.map(|fix| self.clean(&fix)) };
        if !self.is_json {
            if self.group.replace(check.group()) != Some(check.group()) {
                writeln!(self.out, "{}", check.group().name())?;
            }
            writeln!(self.out, "  {:<8} {:<27} {}", status.name(), check.name(), seen.saw)?;
            if let Some(fix) = &seen.fix {
                writeln!(self.out, "{:11}fix: {fix}", "")?;
            }
            self.out.flush()?;
        }
        let before = self.seen.insert(check, seen);
        debug_assert!(before.is_none(), "{} is told of twice", check.name());
        Ok(())
    }

    /// Notes that these checks were skipped, and why.
    ///
    /// # Errors
    /// The report's reader is gone.
    pub(super) fn skip(&mut self, checks: &[Check], why: &str) -> io::Result<()> {
        checks.iter().try_for_each(|check| self.note(*check, Seen::skipped(why)))
    }

    /// Returns whether a check has been noted.
    pub(super) fn has(&self, check: Check) -> bool {
        self.seen.contains_key(&check)
    }

    /// Returns the outcome of a check; `Skipped` before it is noted.
    pub(super) fn status(&self, check: Check) -> Status {
        self.seen.get(&check).map_or(Status::Skipped, |seen| seen.status)
    }

    /// Returns what a check has seen; empty before it is noted.
    pub(super) fn saw(&self, check: Check) -> &str {
        self.seen.get(&check).map_or("", |seen| &seen.saw)
    }

    /// Writes the end of the report, and returns the worst outcome.
    ///
    /// # Errors
    /// The report's reader is gone.
    pub(super) fn finish(self) -> io::Result<Status> {
        debug_assert!(self.seen.keys().eq(Check::ALL), "a check is not told of");
        let count = |wanted| self.seen.values().filter(|seen| seen.status == wanted).count();
        let [ok, warnings, failed, skipped] =
            [Status::Ok, Status::Warning, Status::Failed, Status::Skipped].map(count);
        if self.is_json {
            let row = |(check, seen): (&Check, &Seen)| {
                json!({
                    "check": check.name(), "status": seen.status.name(),
                    "saw": seen.saw, "fix": seen.fix,
                })
            };
            writeln!(self.out, "{:#}", Value::from_iter(self.seen.iter().map(row)))?;
        } else {
            writeln!(
                self.out,
                "ok: {ok}, warnings: {warnings}, failed: {failed}, skipped: {skipped}"
            )?;
        }
        self.out.flush()?;
        Ok(match (failed, warnings) {
            (1.., _) => Status::Failed,
            (0, 1..) => Status::Warning,
            (0, 0) => Status::Ok,
        })
    }

    fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.secrets {
            text = text.replace(&**secret, "<hidden>");
        }
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
}

/// Returns a server's text, cut to its longest length.
pub(super) fn said(text: &str) -> String {
    let mut said: String = text.chars().take(SAID_CHARS_MAX).collect();
    if said.len() < text.len() {
        said.push('…');
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(is_json: bool, secrets: &[&str], notes: &[(Check, Seen)]) -> (String, Status) {
        let mut out = Vec::new();
        let secrets = secrets.iter().map(|secret| (*secret).to_owned()).collect();
        let mut report = Report::new(&mut out, is_json, secrets);
        for check in Check::ALL {
            let noted = notes.iter().find(|(noted, _)| noted == check);
            let seen = noted.map_or(Seen::ok("good"), |(_, seen)| seen.clone());
            report.note(*check, seen).unwrap();
        }
        let status = report.finish().unwrap();
        (String::from_utf8(out).unwrap(), status)
    }

    #[test]
    fn names_are_kebab_case_and_each_is_one_checks() {
        let mut names: Vec<_> = Check::ALL.iter().map(|check| check.name()).collect();
        let is_kebab = |name: &&str| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        assert!(names.iter().all(is_kebab));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Check::ALL.len());
        assert!(Check::ALL.is_sorted_by_key(|check| check.group()));
    }

    #[test]
    fn the_worst_status_is_that_of_the_whole() {
        let warning = (Check::Token, Seen::warning("w", "f"));
        let failed = (Check::EndToEnd, Seen::failed("w", "f"));
        let skipped = (Check::WalLevel, Seen::skipped("w"));
        let of = |notes: &[_]| report(true, &[], notes).1;
        assert_eq!(of(&[]), Status::Ok);
        assert_eq!(of(std::slice::from_ref(&skipped)), Status::Ok);
        assert_eq!(of(&[warning.clone(), skipped]), Status::Warning);
        assert_eq!(of(&[warning, failed]), Status::Failed);
    }

    #[test]
    fn a_secret_is_hidden_whoever_repeats_it_and_a_line_is_one_line() {
        let note =
            (Check::Token, Seen::failed("he said s3cret-1\nand \x1b[2J s3cret", "use s3cret-1"));
        for is_json in [false, true] {
            let text = report(is_json, &["s3cret", "s3cret-1", "o"], std::slice::from_ref(&note)).0;
            assert!(!text.contains("s3cret") && !text.contains('\x1b'), "{text}");
            assert!(text.contains("he said <hidden> and  [2J <hidden>"), "{text}");
            assert!(text.contains("good"), "a short secret hides nothing: {text}");
        }
    }

    #[test]
    fn json_is_an_array_of_all_checks_in_order() {
        let (text, _) = report(true, &[], &[(Check::Token, Seen::warning("seen", "do"))]);
        let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
        let names: Vec<_> = rows.iter().map(|row| row["check"].as_str().unwrap()).collect();
        assert!(names.into_iter().eq(Check::ALL.iter().map(|check| check.name())));
        let row = rows.iter().find(|row| row["check"] == "token").unwrap();
        assert_eq!(
            *row,
            json!({ "check": "token", "status": "warning", "saw": "seen", "fix": "do" })
        );
        assert_eq!(rows[0]["fix"], Value::Null);
    }
}
