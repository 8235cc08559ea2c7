//! Compares the database with what this version's migrations create: triggers, functions and the
//! migrations themselves.
//!
//! Invariants: the expected functions are parsed from the embedded SQL, so that there is no second
//! list of them; the comparison reads catalogs, statistics and `tidegate.migrations`, for which the
//! gateway's own role suffices, and waits for no lock on a table.

use std::fmt;

use sqlx::{PgConnection, postgres::types::Oid};

use super::{
    catalog::{self, FoundFunction, FoundTable},
    migrate::{self, SYSTEM_SQL},
};

/// An operation that writes rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, strum::IntoStaticStr)]
#[strum(serialize_all = "UPPERCASE")]
pub enum Operation {
    /// INSERT.
    Insert,
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
}

impl Operation {
    /// The metric's label, which is also the SQL keyword.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// The operation's bit in `pg_trigger.tgtype`.
    fn bit(self) -> i32 {
        match self {
            Self::Insert => 4,
            Self::Delete => 8,
            Self::Update => 16,
        }
    }
}

/// A trigger that the system file creates if its table exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trigger {
    /// Name of the table in schema `public`.
    pub table: &'static str,
    /// Name of the trigger.
    pub name: &'static str,
    /// Operations that fire it.
    pub operations: &'static [Operation],
}

const WRITTEN: &[Operation] = &[Operation::Insert, Operation::Update];
const ALL: &[Operation] = &[Operation::Insert, Operation::Update, Operation::Delete];
const UPDATED: &[Operation] = &[Operation::Update];

/// Every trigger that the system file creates.
pub const TRIGGERS: [Trigger; 9] = [
    trigger("art", "cache_invalidate_art_trigger", WRITTEN),
    trigger("votes", "cache_invalidate_votes_trigger", ALL),
    trigger("bids", "cache_invalidate_bids_trigger", WRITTEN),
    trigger("art_media", "cache_invalidate_media_trigger", ALL),
    trigger("event_artists", "cache_invalidate_event_artists_trigger", ALL),
    trigger("round_contestants", "cache_invalidate_round_contestants_trigger", ALL),
    trigger("artwork_offers", "cache_invalidate_artwork_offers_trigger", ALL),
    trigger("payment_processing", "cache_invalidate_payment_processing_trigger", UPDATED),
    trigger("events", "cache_invalidate_events_trigger", UPDATED),
];

const fn trigger(
    table: &'static str,
    name: &'static str,
    operations: &'static [Operation],
) -> Trigger {
    Trigger { table, name, operations }
}

/// A function that the migrations define.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Name with schema: `tidegate.publish`.
    pub name: &'static str,
    /// Types of the arguments, in the form in which Postgres prints them: `text, text, jsonb`.
    arguments: String,
    /// Source text, in the form of `pg_proc.prosrc`.
    body: &'static str,
    /// Whether the function is SECURITY DEFINER.
    is_definer: bool,
    /// Settings that hold while it runs, in the form of `pg_proc.proconfig`: `search_path=""`.
    settings: Vec<String>,
}

impl Function {
    /// Returns every function of the migrations and of the system file. Where a function is defined
    /// more than once, the last definition counts.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for sql in migrate::schema_files().chain([SYSTEM_SQL]) {
            // An indented definition belongs to a DO block, which creates the function only under a
            // condition and for other programs.
            for definition in sql.split("\ncreate or replace function ").skip(1) {
                let Some(function) = Self::read(definition) else { continue };
                all.retain(|known| known.name != function.name);
                all.push(function);
            }
        }
        all
    }

    /// Parses `name(arguments) returns … as $$body$$;`.
    fn read(definition: &'static str) -> Option<Self> {
        let (name, rest) = definition.split_once('(')?;
        let (arguments, rest) = rest.split_once(')')?;
        let (head, rest) = rest.split_once("as $$")?;
        let (body, _) = rest.split_once("$$")?;
        let types = arguments.split(',').filter_map(|argument| {
            let (_name, kind) = argument.trim().split_once(' ')?;
            Some(kind.split(" default ").next().unwrap_or(kind))
        });
        let settings = head.lines().filter_map(|line| {
            let (name, value) = line.strip_prefix("set ")?.split_once(" = ")?;
            let value = value.trim_matches('\'');
            // Postgres stores search_path as a list of names and quotes an empty name.
            Some(format!("{name}={}", if value.is_empty() { "\"\"" } else { value }))
        });
        Some(Self {
            name,
            arguments: types.collect::<Vec<_>>().join(", "),
            body,
            is_definer: head.lines().any(|line| line == "security definer"),
            settings: settings.collect(),
        })
    }

    /// Returns how the function in `found` with the same name and arguments differs from this one.
    fn drift(&self, found: &[FoundFunction]) -> Option<Drift> {
        let is_same =
            |found: &&FoundFunction| found.name == self.name && found.arguments == self.arguments;
        let Some(found) = found.iter().find(is_same) else { return Some(Drift::Missing) };
        // A migration that was run from a checkout with CRLF line ends is the same text.
        if found.body.replace('\r', "") != self.body {
            Some(Drift::Body)
        } else if found.is_definer != self.is_definer {
            Some(Drift::Security)
        } else if found.settings != self.settings {
            Some(Drift::Settings)
        } else {
            None
        }
    }
}

/// How a function of the database differs from this version's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    /// No function has the name and the arguments.
    Missing,
    /// The source text differs.
    Body,
    /// One of the two is SECURITY DEFINER and the other is not.
    Security,
    /// The settings differ: a pinned `search_path`, a `lock_timeout`.
    Settings,
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Body => "another text",
            Self::Security => "not SECURITY DEFINER as it should be, or the other way round",
            Self::Settings => "its search_path is not pinned, or another setting differs",
        })
    }
}

/// A table of [`TRIGGERS`] that exists in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Name of the table in schema `public`.
    pub name: &'static str,
    /// Operations for which the table or one of its partitions lacks a trigger. A trigger does not
    /// count if it is disabled, fires on replicas only, is restricted to some columns or rows, or
    /// calls another function.
    pub missing: Vec<Operation>,
    /// Rows written by the operations that a trigger should cover, as counted by Postgres'
    /// statistics, which include transactions that were rolled back.
    pub(crate) writes: u64,
    /// The table and its partitions, whose rows `writes` counts.
    pub(crate) relations: Vec<Oid>,
}

/// State of the migrations of schema `tidegate` in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Migrations {
    /// The role may read the table of migrations.
    Known {
        /// Numbers of this version's migrations that have not run, or have run with another text.
        pending: Vec<i64>,
        /// Whether the database has later migrations: the gateway is older than its database.
        is_newer: bool,
    },
    /// The role may not read the table: migration 6, which grants the right, has not run, or the
    /// role was created after it.
    Unreadable,
}

impl Migrations {
    /// Returns the number of pending migrations. Counts [`Self::Unreadable`] as one, because running
    /// `tidegate migrate` is the remedy for that, too.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        match self {
            Self::Known { pending, .. } => pending.len(),
            Self::Unreadable => 1,
        }
    }
}

/// State of everything in the database that this version's migrations create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deployed {
    /// The tables that exist, in the order of [`TRIGGERS`].
    pub tables: Vec<Table>,
    /// Every function of this version; `None` where the database has the same function.
    pub functions: Vec<(&'static str, Option<Drift>)>,
    /// Migrations of the gateway's own schema.
    pub migrations: Migrations,
}

impl Deployed {
    /// Reads the state of the database.
    ///
    /// # Errors
    /// The session is lost, or a statement was cancelled.
    pub async fn read(session: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let names = TRIGGERS.map(|trigger| trigger.table);
        let found = catalog::tables(session, &names).await?;
        let tables = TRIGGERS.iter().filter_map(|trigger| {
            let table = found.iter().find(|table| table.name == trigger.table)?;
            let is_missing = |operation: &&Operation| table.covered & operation.bit() == 0;
            Some(Table {
                name: trigger.table,
                missing: trigger.operations.iter().filter(is_missing).copied().collect(),
                writes: trigger.operations.iter().map(|operation| table.written(*operation)).sum(),
                relations: table.relations.clone(),
            })
        });
        let tables = tables.collect();
        let expected = Function::all();
        let names: Vec<_> = expected.iter().map(|function| function.name).collect();
        let found = catalog::functions(session, &names).await?;
        let functions =
            expected.iter().map(|function| (function.name, function.drift(&found))).collect();
        Ok(Self { tables, functions, migrations: migrations(session).await? })
    }

    /// Returns table and operation of each missing trigger.
    pub fn missing_triggers(&self) -> impl Iterator<Item = (&'static str, Operation)> {
        self.tables
            .iter()
            .flat_map(|table| table.missing.iter().map(|operation| (table.name, *operation)))
    }

    /// Returns the functions that differ from this version's.
    pub fn drifted(&self) -> impl Iterator<Item = (&'static str, Drift)> {
        self.functions.iter().filter_map(|(name, drift)| Some((*name, (*drift)?)))
    }
}

/// Compares the migrations that have run with this version's.
async fn migrations(session: &mut PgConnection) -> Result<Migrations, sqlx::Error> {
    let Some(applied) = catalog::applied_migrations(session).await? else {
        return Ok(Migrations::Unreadable);
    };
    let expected = migrate::migrations();
    let is_pending = |migration: &&sqlx::migrate::Migration| {
        let is_same = |(version, checksum): &(i64, Vec<u8>)| {
            *version == migration.version && **checksum == *migration.checksum
        };
        !applied.iter().any(is_same)
    };
    let newest = expected.iter().map(|migration| migration.version).max();
    Ok(Migrations::Known {
        pending: expected.iter().filter(is_pending).map(|migration| migration.version).collect(),
        is_newer: applied.iter().map(|(version, _)| *version).max() > newest,
    })
}

impl FoundTable {
    /// Returns the number of rows that the operation has written.
    fn written(&self, operation: Operation) -> u64 {
        let count = match operation {
            Operation::Insert => self.inserted,
            Operation::Update => self.updated,
            Operation::Delete => self.deleted,
        };
        u64::try_from(count).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_triggers_are_those_that_the_system_file_makes() {
        let made: Vec<_> = SYSTEM_SQL
            .lines()
            .filter(|line| line.contains("_trigger', '"))
            .map(|line| line.trim().trim_end_matches(','))
            .collect();
        let expected: Vec<_> = TRIGGERS
            .iter()
            .map(|trigger| {
                // Postgres prints the operations of a trigger in this order.
                let mut operations = trigger.operations.to_vec();
                operations.sort_by_key(|operation| operation.bit());
                let operations: Vec<_> =
                    operations.iter().map(|operation| operation.label()).collect();
                format!("('{}', '{}', '{}')", trigger.table, trigger.name, operations.join(" OR "))
            })
            .collect();
        assert_eq!(made, expected);
    }

    #[test]
    fn every_function_of_the_files_is_read() {
        let all = Function::all();
        let definitions: usize = migrate::schema_files()
            .chain([SYSTEM_SQL])
            .map(|sql| sql.matches("\ncreate or replace function ").count())
            .sum();
        assert_eq!(all.len(), definitions, "a function is defined twice, or not read");
        for function in &all {
            let (schema, _) = function.name.split_once('.').unwrap();
            assert!(["tidegate", "public"].contains(&schema), "{}", function.name);
            assert!(function.body.starts_with('\n') && function.body.ends_with('\n'));
            assert_eq!(function.settings[0], "search_path=\"\"", "{}", function.name);
            // Without an index the plan costs so much that Postgres would compile it for each row.
            let has = |setting: &str| function.settings.iter().any(|other| other == setting);
            assert_eq!(has("enable_seqscan=off"), has("jit=off"), "{}", function.name);
        }
        let named = |name| all.iter().find(|function| function.name == name).unwrap();
        let trigger = named("tidegate.cache_invalidation");
        assert!(trigger.is_definer && trigger.arguments.is_empty());
        let settings =
            ["search_path=\"\"", "lock_timeout=50ms", "plan_cache_mode=force_generic_plan"];
        assert_eq!(trigger.settings, settings);
        let manual = named("public.manual_cache_invalidation");
        assert_eq!(manual.arguments, "text, text");
        assert!(!named("tidegate.publish").is_definer);
        assert_eq!(named("tidegate.insert_probes").arguments, "text, text[]");
    }

    #[test]
    fn migrations_that_cannot_be_read_are_to_be_run() {
        assert_eq!(Migrations::Unreadable.pending_count(), 1);
        let none = Migrations::Known { pending: Vec::new(), is_newer: false };
        assert_eq!(none.pending_count(), 0);
    }
}
