//! One Postgres for the whole process, and a database of its own for each test.

use std::str::FromStr;

use sqlx::{
    AssertSqlSafe, ConnectOptions, Executor, PgConnection, Row,
    postgres::{PgConnectOptions, PgListener},
};
use tidegate::demo::cluster::Cluster;
use tokio::sync::OnceCell;

/// Bound to no runtime; it ends with the process.
static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();

/// An empty database, and a session on it.
pub(crate) struct Database {
    name: String,
    url: String,
    session: PgConnection,
}

impl Database {
    /// Makes a database in the cluster that all tests share.
    pub(crate) async fn create() -> Self {
        Self::create_in(CLUSTER.get_or_try_init(Cluster::start).await.unwrap()).await
    }

    /// Makes a database in a cluster of the test's own.
    pub(crate) async fn create_in(cluster: &Cluster) -> Self {
        let name = format!("test_{:016x}", fastrand::u64(..));
        cluster.create_database(&name).await.unwrap();
        let url = cluster.url(&name);
        let session = connect(&url).await;
        Self { name, url, session }
    }

    /// What the cluster calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where it is.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Its TCP port on 127.0.0.1.
    pub(crate) fn port(&self) -> u16 {
        PgConnectOptions::from_str(&self.url).unwrap().get_port()
    }

    /// Its address through another address, that of a proxy.
    pub(crate) fn url_at(&self, address: std::net::SocketAddr) -> String {
        format!("postgres://postgres@{address}/{}", self.name)
    }

    /// Another session.
    pub(crate) async fn connect(&self) -> PgConnection {
        connect(&self.url).await
    }

    /// A new session in the place of one that was lost.
    pub(crate) async fn reconnect(&mut self) {
        self.session = connect(&self.url).await;
    }

    /// A session that hears these channels.
    pub(crate) async fn listener(&self, channels: &[&str]) -> PgListener {
        let mut listener = PgListener::connect(&self.url).await.unwrap();
        listener.listen_all(channels.iter().copied()).await.unwrap();
        listener
    }

    /// Notifies in a transaction of its own.
    pub(crate) async fn notify(&mut self, channel: &str, payload: &str) {
        let notify = sqlx::query("select pg_notify($1, $2)").bind(channel).bind(payload);
        self.session.execute(notify).await.unwrap();
    }

    /// Runs statements.
    pub(crate) async fn run(&mut self, sql: &str) {
        self.session.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await.unwrap();
    }

    /// The first column of the only row.
    pub(crate) async fn value<T>(&mut self, sql: &'static str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        self.session.fetch_one(sql).await.unwrap().get(0)
    }
}

async fn connect(url: &str) -> PgConnection {
    PgConnectOptions::from_str(url).unwrap().connect().await.unwrap()
}
