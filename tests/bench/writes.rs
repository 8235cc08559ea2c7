//! What the triggers add to a write: single-row inserts, each a transaction of its own, with the
//! triggers and without them in turns, so that whatever drifts meanwhile touches both alike.
//!
//! Somebody listens, as a gateway would. What has arrived is counted, so that no round can have
//! run with triggers in the wrong state.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use sqlx::{Connection as _, PgConnection, postgres::PgListener};
use tidegate::{db, demo::cluster::Cluster, secret::Secret};
use tokio::time::timeout;

const TABLES: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/examples/production_tables.sql");

const ROWS: &str = "
    insert into events (id, eid) values ('00000000-0000-4000-8000-000000003028', 'AB3028');
    insert into art (id, art_code, event_id, round, easel) values
        ('00000000-0000-4000-8000-0000000000a1', 'AB3028-2-3',
        '00000000-0000-4000-8000-000000003028', 2, 3)";

const INSERTS: [(&str, &str); 2] = [
    (
        "bids",
        "INSERT INTO bids (art_id, person_id, amount) VALUES
            ('00000000-0000-4000-8000-0000000000a1', gen_random_uuid(), 250)",
    ),
    (
        "votes",
        "INSERT INTO votes (event_id, eid, round, easel, art_id, art_uuid, person_id) VALUES
            ('00000000-0000-4000-8000-000000003028', 'AB3028', 2, 3, 'AB3028-2-3',
            '00000000-0000-4000-8000-0000000000a1', gen_random_uuid())",
    ),
];

/// Inserts at the start of each turn that are not measured: a changed trigger makes a session plan
/// its statements anew.
const WARM_UP: usize = 10;

/// What is notified of each insert: the event's viewers and the monitoring channel.
const NOTIFICATIONS_PER_INSERT: usize = 2;

const DEADLINE: Duration = Duration::from_secs(30);

/// The median time of an insert into one table.
pub(crate) struct Cost {
    pub(crate) table: &'static str,
    pub(crate) without: Duration,
    pub(crate) with: Duration,
}

/// Measures `turns` turns of `inserts` inserts into each table, half of them with the triggers.
pub(crate) async fn measure(cluster: &Cluster, turns: usize, inserts: usize) -> Vec<Cost> {
    let name = "writes";
    cluster.create_database(name).await.unwrap();
    cluster.psql_file(name, Path::new(TABLES)).await.unwrap();
    let url = cluster.url(name);
    db::migrate(&Secret::from(&*url)).await.unwrap();
    cluster.psql(name, ROWS).await.unwrap();
    let mut listener = PgListener::connect(&url).await.unwrap();
    let channels = ["cache_invalidate_AB3028", "global_cache_stats", "marker"];
    listener.listen_all(channels).await.unwrap();
    let mut writer = PgConnection::connect(&url).await.unwrap();

    let mut costs = Vec::new();
    for (table, insert) in INSERTS {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for turn in 0..turns {
            // With, without; without, with: neither always goes first.
            let has_triggers = matches!(turn % 4, 0 | 3);
            switch(&mut writer, has_triggers).await;
            for count in 0..WARM_UP + inserts {
                let begun = Instant::now();
                sqlx::query(insert).execute(&mut writer).await.unwrap();
                let took = begun.elapsed();
                if count >= WARM_UP {
                    if has_triggers { &mut with } else { &mut without }.push(took);
                }
            }
            let told = if has_triggers { NOTIFICATIONS_PER_INSERT } else { 0 };
            let told = told * (WARM_UP + inserts);
            assert_eq!(heard_until_marker(&mut listener, &mut writer).await, told, "{table}");
        }
        costs.push(Cost { table, without: median(without), with: median(with) });
    }
    let failures = "select count(*) from tidegate.trigger_failures";
    assert_eq!(cluster.psql(name, failures).await.unwrap(), "0", "triggers failed");
    costs
}

async fn switch(writer: &mut PgConnection, has_triggers: bool) {
    let sql = if has_triggers {
        "SELECT enable_cache_invalidation()"
    } else {
        "SELECT disable_cache_invalidation()"
    };
    sqlx::query(sql).execute(writer).await.unwrap();
}

/// How much has been notified since the last time. Read after each turn, which the connection's
/// buffers hold, so that reading takes no time from an insert.
async fn heard_until_marker(listener: &mut PgListener, writer: &mut PgConnection) -> usize {
    sqlx::query("SELECT pg_notify('marker', '')").execute(writer).await.unwrap();
    let mut count = 0;
    loop {
        let next = timeout(DEADLINE, listener.try_recv()).await.unwrap().unwrap().unwrap();
        if next.channel() == "marker" {
            return count;
        }
        count += 1;
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
