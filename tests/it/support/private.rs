//! A database with private channels, on either table, and the example's policies.

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use sqlx::{Connection as _, PgConnection};
use tidegate::{
    clock::unix_now,
    db,
    demo::cluster::Cluster,
    policies::{Allowed, PolicyQuery, QueryError},
    secret::Secret,
    server::{Config, Gateway},
};

use super::{server::config, system::migration, token};

/// The user whom [`Private::start`] makes a member of `room:1`, who may write there.
pub(crate) const MEMBER: &str = "00000000-0000-4000-8000-000000000001";
/// A member of `room:1` who may not write.
pub(crate) const READER: &str = "00000000-0000-4000-8000-000000000002";
/// A member of nothing.
pub(crate) const STRANGER: &str = "00000000-0000-4000-8000-000000000003";

const DATABASE: &str = "private";

/// Whose `realtime.messages` it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Table {
    /// Our migration's, on a plain Postgres.
    Plain,
    /// Supabase's own.
    Supabase,
}

impl Table {
    pub(crate) const BOTH: [Self; 2] = [Self::Plain, Self::Supabase];
}

/// A database in a cluster of its own, migrated, with the policies of the example.
pub(crate) struct Private {
    pub(crate) cluster: Cluster,
}

impl Private {
    pub(crate) async fn start(table: Table) -> Self {
        let cluster = Cluster::start().await.unwrap();
        cluster.create_database(DATABASE).await.unwrap();
        let owner = match table {
            Table::Plain => "postgres",
            Table::Supabase => {
                cluster.psql(DATABASE, include_str!("supabase_messages.sql")).await.unwrap();
                "project"
            }
        };
        let private = Self { cluster };
        db::migrate(&private.url(owner).as_str().into()).await.unwrap();
        let example = migration("examples/private_channels.sql");
        private.cluster.psql_file(DATABASE, &example).await.unwrap();
        private
            .run(&format!(
                "insert into room_members (topic, user_id, may_write)
                values ('room:1', '{MEMBER}', true), ('room:1', '{READER}', false)"
            ))
            .await;
        private
    }

    /// The address for a role; trust is the cluster's way of asking for passwords.
    pub(crate) fn url(&self, role: &str) -> String {
        self.cluster.url(DATABASE).replacen("postgres@", &format!("{role}@"), 1)
    }

    pub(crate) async fn run(&self, sql: &str) -> String {
        match self.cluster.psql(DATABASE, sql).await {
            Ok(rows) => rows,
            Err(error) => panic!("{error}\n{sql}"),
        }
    }

    /// What Postgres says to a role that is denied something.
    pub(crate) async fn denied(&self, role: &str, sql: &str) -> String {
        let mut command = self.cluster.psql_command(DATABASE);
        let output = command.args(["-d", &self.url(role), "-c", sql]).output().await.unwrap();
        assert!(!output.status.success(), "{role}: {sql}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// A gateway's settings, which connects as its least-privileged role and has time.
    pub(crate) fn config(&self) -> Config {
        let mut config = config();
        config.database_url = Secret::from(&*self.url("tidegate"));
        config.policies.timeout = Duration::from_secs(8);
        config
    }

    /// The parts of a gateway that does not run.
    pub(crate) fn gateway(&self) -> Arc<Gateway> {
        Gateway::new(self.config()).unwrap()
    }

    /// How many sessions of the gateway's are in this state.
    pub(crate) async fn sessions(&self, condition: &str) -> usize {
        let sql = format!(
            "select count(*) from pg_stat_activity where usename = 'tidegate' and {condition}"
        );
        self.run(&sql).await.parse().unwrap()
    }
}

/// A policy that lets everybody read and write `gate:*`, once a lock can be had that the test holds.
pub(crate) struct Gate(PgConnection);

impl Gate {
    pub(crate) async fn close(database: &Private) -> Self {
        database
            .run(
                "create function pass_gate() returns boolean language plpgsql security definer
                    as 'begin perform pg_advisory_xact_lock_shared(1); return true; end';
                create policy gate on realtime.messages to authenticated
                    using (topic like 'gate:%' and pass_gate())
                    with check (topic like 'gate:%' and pass_gate())",
            )
            .await;
        let mut gate = Self(PgConnection::connect(&database.url("postgres")).await.unwrap());
        gate.run("select pg_advisory_lock(1)").await;
        gate
    }

    pub(crate) async fn open(&mut self) {
        self.run("select pg_advisory_unlock(1)").await;
    }

    pub(crate) async fn close_again(&mut self) {
        self.run("select pg_advisory_lock(1)").await;
    }

    /// Waits until a question waits before the gate.
    pub(crate) async fn has_visitor(&mut self) {
        self.has_visitors(1).await;
    }

    /// Waits until so many questions wait before the gate.
    pub(crate) async fn has_visitors(&mut self, count: i64) {
        let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted";
        while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut self.0).await.unwrap() < count {}
    }

    async fn run(&mut self, sql: &'static str) {
        sqlx::query(sql).execute(&mut self.0).await.unwrap();
    }
}

/// A question by somebody with these claims.
pub(crate) fn asking(gateway: &Gateway, claims: Value, sub_topic: &str) -> PolicyQuery {
    let token = gateway.auth.verify_at(&token::with_claims(claims), unix_now()).unwrap();
    PolicyQuery { token, sub_topic: sub_topic.into(), headers: "{}".into() }
}

/// What a user may read of a topic, presence asked about, too.
pub(crate) async fn read(
    gateway: &Gateway,
    claims: Value,
    sub_topic: &str,
) -> Result<Allowed, QueryError> {
    gateway.policies.read(asking(gateway, claims, sub_topic), true).await
}

/// Whether a user may write to a topic.
pub(crate) async fn write(
    gateway: &Gateway,
    claims: Value,
    sub_topic: &str,
) -> Result<bool, QueryError> {
    gateway.policies.write(asking(gateway, claims, sub_topic)).await
}
