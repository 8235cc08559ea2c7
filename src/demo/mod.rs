//! The demo: a throw-away database, a gateway, simulated activity and a page, in one process.
//!
//! Invariants: nothing is configured by hand, and nothing stays behind: whatever ends [`run`], also
//! a failed start, stops Postgres and Prometheus and removes their directories. The demo spawns no
//! task: everything ends with [`run`]. The gateway connects as the role that its migrations made,
//! not as a superuser.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::{
    admin::client::reachable,
    auth::sign::{SignError, sign_role},
    db::{self, MigrateError},
    secret::Secret,
    server::{Server, StartError, settings::Config},
};

use self::{
    activity::Crowd,
    alerts::Prometheus,
    cluster::{Cluster, ClusterError},
    example::{EVENTS, Example},
    pages::{Pages, PagesError, Site},
};

mod activity;
mod alerts;
pub mod cluster;
mod example;
mod live;
mod pages;
mod supervisor;

/// The database's name.
const DATABASE: &str = "demo";
/// Sessions for the `/live` endpoints and the activity together.
const SESSIONS_MAX: u32 = 8;
/// A statement that gets no session in this time fails.
const SESSION_WAIT: Duration = Duration::from_secs(3);
/// Interval at which the end of the gateway's sessions is awaited.
const GOODBYE_INTERVAL: Duration = Duration::from_millis(5);
/// How long the page's key is valid; no demo runs longer.
const KEY_TTL: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Actions that are in the database when the page opens.
const ACTIONS_BEFORE: usize = 150;

/// Arguments of `tidegate demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArgs {
    /// Public address: page, WebSocket, REST; 0.0.0.0:4000 shows the demo to the network
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:4000")]
    pub listen: SocketAddr,
    /// Admin address: metrics, readiness; a loopback one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9400", value_parser = loopback)]
    pub admin_listen: SocketAddr,
    /// The same seed gives the same data and the same activity
    #[arg(long, value_name = "N", default_value_t = 3028)]
    pub seed: u64,
    /// Votes, bids and other changes per second; 0 for none
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = rate)]
    pub rate: f64,
    /// Directory of the page
    #[arg(long, value_name = "DIR", default_value = "client/demo")]
    pub pages: PathBuf,
}

/// Why there is no demo.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The page cannot be read.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// There is no throw-away Postgres.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The example's tables or rows cannot be made.
    #[error("cannot make the example data")]
    Example(#[source] sqlx::Error),
    /// The gateway's own database objects cannot be made.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// The page's key cannot be signed.
    #[error("cannot sign the page's key")]
    Key(#[from] SignError),
    /// The gateway cannot start; above all, an address is taken.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The system does not tell where the gateway listens.
    #[error("cannot tell where the gateway listens")]
    Addresses(#[source] io::Error),
}

/// Runs the demo until `shutdown`.
///
/// # Errors
/// [`DemoError`] when it cannot start; nothing is left behind.
pub async fn run(args: DemoArgs, shutdown: impl Future<Output = ()>) -> Result<(), DemoError> {
    let mut shutdown = pin!(shutdown);
    let pages = Pages::load(&args.pages)?;
    tracing::info!("starting a throw-away Postgres");
    let cluster = tokio::select! {
        // A cluster that is half made is removed when its future is dropped.
        () = &mut shutdown => return Ok(()),
        cluster = Box::pin(Cluster::start_without_tcp()) => cluster?,
    };
    let database_url = cluster.socket_url(DATABASE);
    let pool = PgPoolOptions::new()
        .max_connections(SESSIONS_MAX)
        .acquire_timeout(SESSION_WAIT)
        .connect_lazy(&database_url)
        .map_err(DemoError::Example)?;
    let ended = tokio::select! {
        () = &mut shutdown => Ok(None),
        ready = Box::pin(prepare(&args, pages, &cluster, &pool)) => ready.map(Some),
    };
    let ended = match ended {
        Ok(Some((server, crowd, _prometheus))) => {
            tokio::select! {
                () = server.run(shutdown) => {}
                () = activity::run(&pool, crowd, args.rate) => {}
            }
            Ok(())
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    // A session that ends later is cut off, which is logged.
    let _ = timeout(SESSION_WAIT, close(&pool)).await;
    // Waits until Postgres has ended and its directory is gone.
    drop(cluster);
    ended
}

/// Fills the database, listens, and prints the banner when the page can be opened.
async fn prepare(
    args: &DemoArgs,
    pages: Pages,
    cluster: &Cluster,
    pool: &PgPool,
) -> Result<(Server, Crowd, Option<Prometheus>), DemoError> {
    cluster.create_database(DATABASE).await?;
    let example = Example::new(args.seed);
    example.insert(pool).await.map_err(DemoError::Example)?;
    let mut crowd = Crowd::new(example);
    for _ in 0..ACTIONS_BEFORE {
        crowd.next_action().perform(pool).await.map_err(DemoError::Example)?;
    }

    let owner_url = cluster.socket_url(DATABASE);
    let mut config = Config::defaults();
    config.listen = args.listen;
    config.admin_listen = args.admin_listen;
    config.migrate_database_url = owner_url.as_str().into();
    config.database_url =
        owner_url.replacen("postgres://postgres@", "postgres://tidegate@", 1).as_str().into();
    config.jwt_secret = random_secret();
    db::migrate(config.migrate_url()).await?;
    let claims = r#"{"iss":"supabase","ref":"demo"}"#;
    let anon_key = sign_role(&config.jwt_secret, "anon", claims, KEY_TTL)?;

    let server = Server::bind(config)?;
    let (public, admin) = server.addresses().map_err(DemoError::Addresses)?;
    let prometheus = Prometheus::start(admin).await;
    let prometheus_url = prometheus.as_ref().map(Prometheus::url);
    let site = Site::new(pages, &anon_key, prometheus_url.as_deref(), pool.clone());
    say(&banner(public, admin, prometheus_url.as_deref(), &owner_url));
    Ok((server.with_fallback(Arc::new(site)), crowd, prometheus))
}

/// Waits for the end of the gateway's sessions with Postgres, which outlive it, then ends ours.
async fn close(pool: &PgPool) {
    let gateway_is_connected =
        "select exists (select from pg_stat_activity where application_name = 'tidegate')";
    while let Ok(true) = sqlx::query_scalar(gateway_is_connected).fetch_one(pool).await {
        sleep(GOODBYE_INTERVAL).await;
    }
    pool.close().await;
}

/// Returns the text for the terminal once the demo can be used; the first line is for programs.
fn banner(
    public: SocketAddr,
    admin: SocketAddr,
    prometheus: Option<&str>,
    owner_url: &str,
) -> String {
    let host = reachable(public);
    let events: String =
        EVENTS.iter().map(|event| format!("           {}  {}\n", event.eid, event.name)).collect();
    let events = events.trim();
    let (other, first) = (EVENTS[1].eid, EVENTS[0].eid);
    let alerts = prometheus.map(|url| format!("  alerts   {url}/alerts\n")).unwrap_or_default();
    format!(
        "listening public={public} admin={admin}

  Tidegate demo: votes and bids change by themselves.

  page     http://{host}/demo
           http://{host}/demo?event={other}
  events   {events}
  metrics  http://{admin}/metrics
{alerts}  SQL      psql {owner_url}
           psql {owner_url} -c \"select manual_cache_invalidation('{first}')\"

  Ctrl-C stops everything and removes the database.
"
    )
}

/// Prints a line, if the terminal or pipe is still open.
fn say(text: &str) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

fn random_secret() -> Secret {
    let (one, other) = (Uuid::new_v4().simple(), Uuid::new_v4().simple());
    format!("{one}{other}").as_str().into()
}

fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().or(Err("expected IP:PORT"))?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err("not a loopback address, and the demo has no admin token".to_owned())
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=1000.0).contains(&rate) => Ok(rate),
        Ok(_) | Err(_) => Err("expected a number from 0 to 1000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_from_0_to_1000() {
        assert_eq!(rate("0"), Ok(0.0));
        assert_eq!(rate("1000"), Ok(1000.0));
        for wrong in ["-1", "1000.1", "NaN", "inf", "many", ""] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }

    /// The admin address has no token here: it must not be seen from the network.
    #[test]
    fn the_admin_address_is_a_loopback_one() {
        assert!(loopback("127.0.0.1:0").is_ok() && loopback("[::1]:9400").is_ok());
        assert!(loopback("0.0.0.0:9400").is_err() && loopback("localhost:9400").is_err());
    }

    #[test]
    fn the_banner_begins_with_the_line_for_programs_and_shows_an_address_that_can_be_opened() {
        let addresses = (([0, 0, 0, 0], 4000).into(), ([127, 0, 0, 1], 9400).into());
        let banner = banner(addresses.0, addresses.1, Some("http://127.0.0.1:9090"), "postgres");
        assert!(banner.starts_with("listening public=0.0.0.0:4000 admin=127.0.0.1:9400\n"));
        assert!(banner.contains(" http://127.0.0.1:4000/demo\n"));
        assert!(banner.contains("\n  alerts   http://127.0.0.1:9090/alerts\n  SQL "));
    }
}
