//! What was looked at and what was seen: one line a check, or one JSON array.
//!
//! Invariants: each check is told of exactly once, in the order of [`Check::ALL`], which is that of
//! the path; whatever a server has said is one line of bounded length, without commands to a
//! terminal; no secret of the settings and no token is written, whoever repeats it.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use serde_json::{Value, json};

/// Longest text of a server's that is repeated.
const SAID_CHARS_MAX: usize = 300;
/// A secret that is shorter hides by chance what is none.
const SECRET_BYTES_MIN: usize = 6;

/// Where on the path a check looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Postgres, and the gateway's role in it.
    Database,
    /// What writes to the tables set off.
    Triggers,
    /// From a commit to the listening session.
    Notify,
    /// The process, its keys and its clock.
    Gateway,
    /// From the gateway to a page.
    Client,
    /// What people say when it does not work.
    Complaints,
}

impl Group {
    /// As the report writes it.
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
        /// One thing that is looked at. Its name is stable: scripts know it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Check {
            $($(#[doc = concat!("`", $name, "`")] $check,)*)*
        }

        impl Check {
            /// All of them, in the order of the path.
            pub const ALL: &'static [Self] = &[$($(Self::$check,)*)*];

            /// As scripts know it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $($(Self::$check => $name,)*)* }
            }

            /// Where on the path it is.
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

/// What has become of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is as it should be.
    Ok,
    /// It works, and an operator should know.
    Warning,
    /// It does not work.
    Failed,
    /// It was not looked at.
    Skipped,
}

impl Status {
    /// Of the process, if nothing was worse.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Ok | Self::Skipped => 0,
            Self::Failed => 1,
            Self::Warning => 2,
        }
    }

    /// As the report writes it.
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

/// What a check has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) status: Status,
    /// What there was, or why nothing was looked at.
    pub(super) saw: String,
    /// A command, or a setting by its name.
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

/// Takes what was seen, and writes each line as it comes; JSON at the end.
pub(super) struct Report<'a> {
    out: &'a mut (dyn Write + Send),
    is_json: bool,
    /// What must not be written.
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
        secrets.retain(|it| it.len() >= SECRET_BYTES_MIN);
        // Else what is left of one that has another in it is written.
        secrets.sort_by_key(|it| std::cmp::Reverse(it.len()));
        Self { out, is_json, secrets, seen: BTreeMap::new(), group: None }
    }

    /// Takes what a check has seen.
    ///
    /// # Errors
    /// Nobody reads the report any more.
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

    /// Says why these were not looked at.
    ///
    /// # Errors
    /// Nobody reads the report any more.
    pub(super) fn skip(&mut self, checks: &[Check], why: &str) -> io::Result<()> {
        checks.iter().try_for_each(|check| self.note(*check, Seen::skipped(why)))
    }

    /// Whether a check has been told of.
    pub(super) fn has(&self, check: Check) -> bool {
        self.seen.contains_key(&check)
    }

    /// What a check has become, if it was looked at.
    pub(super) fn status(&self, check: Check) -> Status {
        self.seen.get(&check).map_or(Status::Skipped, |seen| seen.status)
    }

    /// What a check has seen.
    pub(super) fn saw(&self, check: Check) -> &str {
        self.seen.get(&check).map_or("", |seen| &seen.saw)
    }

    /// Writes what belongs at the end, and gives the worst of all.
    ///
    /// # Errors
    /// Nobody reads the report any more.
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
        text.chars().map(|it| if it.is_control() { ' ' } else { it }).collect()
    }
}

/// What a server has said, cut.
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
        let secrets = secrets.iter().map(|it| (*it).to_owned()).collect();
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
        let is_kebab = |it: &&str| it.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
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
