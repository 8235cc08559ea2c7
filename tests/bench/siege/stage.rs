//! What stands before the siege begins: the events of the database, the addresses from which
//! everybody comes, the keys, and a gateway of default settings.

use std::{net::Ipv4Addr, path::Path};

use tidegate::{db, demo::cluster::Cluster, secret::Secret};

use crate::support::Gateway;

/// The events that have viewers from the beginning.
pub(crate) const EVENTS: [&str; 4] = ["AB4001", "AB4002", "AB4003", "AB4004"];
/// Events of the database that somebody joins for the first time during the siege.
pub(crate) const LATE: [&str; 6] = ["AB4101", "AB4102", "AB4103", "AB4104", "AB4105", "AB4106"];
/// An event that is not public, with a viewer who knows its name.
pub(crate) const HIDDEN: &str = "AB4900";
/// An event that is not public and that nobody has joined.
pub(crate) const HIDDEN_UNSEEN: &str = "AB4901";
/// Artworks of each event; each bid of the run goes to another one, so that its endpoint changes
/// once.
pub(crate) const ARTWORKS: usize = 240;
const EASELS: usize = 12;

/// The viewers' address. The attackers of kind N come from 127.0.0.(100 + N).
pub(crate) const VIEWERS: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// The project's own servers.
pub(crate) const SERVERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Viewers that come during the siege.
pub(crate) const NEWCOMERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
/// Clients that chat in an ordinary room.
pub(crate) const NEIGHBOURS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 4);
/// Old clients that lose their sockets and come back.
pub(crate) const RETURNING: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 5);
/// Viewers that are also in an ordinary room and read slowly.
pub(crate) const MEMBERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
/// Where the attackers of this kind come from.
pub(crate) fn attackers(kind: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, 100 + kind)
}

/// The room of the slow members.
pub(crate) const LOBBY: &str = "lobby";
/// What operators show on their port.
pub(crate) const ADMIN_TOKEN: &str = "the-operators-token-of-the-siege";

const DATABASE: &str = "siege";
/// A database role that may do nothing but connect.
const STRANGER: &str = "stranger";
const TABLES: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/examples/production_tables.sql");

/// The database, the gateway on it, and where a role without rights finds the database.
pub(crate) struct Stage {
    pub(crate) gateway: Gateway,
    pub(crate) database: String,
    pub(crate) stranger: String,
    _cluster: Cluster,
}

impl Stage {
    /// Fills a database and starts a gateway.
    pub(crate) async fn set() -> Self {
        let cluster = Cluster::start().await.unwrap();
        cluster.create_database(DATABASE).await.unwrap();
        cluster.psql_file(DATABASE, Path::new(TABLES)).await.unwrap();
        let database = cluster.url(DATABASE);
        db::migrate(&Secret::from(&*database)).await.unwrap();
        cluster.psql(DATABASE, &rows()).await.unwrap();
        // What has been notified of an event is told to whoever joins it; here nothing has been.
        cluster.psql(DATABASE, "truncate tidegate.broadcast_history").await.unwrap();
        let stranger = database.replace("postgres@", &format!("{STRANGER}@"));
        let gateway = Gateway::start(&database, &[("TIDEGATE_ADMIN_TOKEN", ADMIN_TOKEN)]).await;
        Self { gateway, database, stranger, _cluster: cluster }
    }
}

/// All events, in the order of their numbers in the ledger.
pub(crate) fn events() -> impl Iterator<Item = &'static str> {
    EVENTS.into_iter().chain(LATE).chain([HIDDEN])
}

fn rows() -> String {
    let events = events().chain([HIDDEN_UNSEEN]);
    let events = events.map(|eid| format!("('{eid}', {})", !eid.starts_with("AB49")));
    let events: Vec<_> = events.collect();
    format!(
        "create role {STRANGER} login;
        insert into events (eid, enabled) values {};
        insert into art (art_code, event_id, round, easel)
            select eid || '-' || n / {EASELS} + 1 || '-' || n % {EASELS} + 1, id,
                n / {EASELS} + 1, n % {EASELS} + 1
            from events, generate_series(0, {ARTWORKS} - 1) n",
        events.join(", ")
    )
}

/// The code of an event's artwork.
pub(crate) fn art_code(eid: &str, artwork: usize) -> String {
    format!("{eid}-{}-{}", artwork / EASELS + 1, artwork % EASELS + 1)
}

/// The number of the artwork whose bids are at this endpoint: `/live/event/AB4001-2-3/bids`.
pub(crate) fn artwork(eid: &str, endpoint: &str) -> Option<usize> {
    let code = endpoint.strip_prefix("/live/event/")?.strip_suffix("/bids")?;
    let (round, easel) = code.strip_prefix(eid)?.strip_prefix('-')?.split_once('-')?;
    let (round, easel): (usize, usize) = (round.parse().ok()?, easel.parse().ok()?);
    Some((round - 1) * EASELS + easel - 1)
}
