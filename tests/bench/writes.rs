//! What the triggers add to a write: to single-row inserts, each a transaction of its own, to one
//! UPDATE of many rows, and to the votes of many sessions at once on a disk that is waited for. Each
//! with the triggers and without them in turns, so that whatever drifts meanwhile touches both alike.
//!
//! Somebody listens, as a gateway would. What has arrived of the inserts is counted, so that no round
//! can have run with triggers in the wrong state.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use sqlx::{Connection as _, PgConnection, postgres::PgListener};
use tidegate::{db, demo::cluster::Cluster, secret::Secret};
use tokio::{task::JoinSet, time::timeout};

const TABLES: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/examples/production_tables.sql");

const ROWS: &str = "
    insert into events (id, eid) values ('00000000-0000-4000-8000-000000003028', 'AB3028');
    insert into art (id, art_code, event_id, round, easel) values
        ('00000000-0000-4000-8000-0000000000a1', 'AB3028-2-3',
        '00000000-0000-4000-8000-000000003028', 2, 3)";

const VOTE: &str =
    "INSERT INTO votes (event_id, eid, round, easel, art_id, art_uuid, person_id) VALUES
    ('00000000-0000-4000-8000-000000003028', 'AB3028', 2, 3, 'AB3028-2-3',
    '00000000-0000-4000-8000-0000000000a1', gen_random_uuid())";

const INSERTS: [(&str, &str); 2] = [
    (
        "bids",
        "INSERT INTO bids (art_id, person_id, amount) VALUES
            ('00000000-0000-4000-8000-0000000000a1', gen_random_uuid(), 250)",
    ),
    ("votes", VOTE),
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
    let url = prepare(cluster, name).await;
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

/// Makes a migrated database with an event, and returns its address.
async fn prepare(cluster: &Cluster, name: &str) -> String {
    cluster.create_database(name).await.unwrap();
    cluster.psql_file(name, Path::new(TABLES)).await.unwrap();
    let url = cluster.url(name);
    db::migrate(&Secret::from(&*url)).await.unwrap();
    cluster.psql(name, ROWS).await.unwrap();
    url
}

/// The time of one UPDATE of many rows.
pub(crate) struct Mass {
    pub(crate) what: &'static str,
    pub(crate) without: Duration,
    pub(crate) with: Duration,
}

/// Votes of one event, and artworks of 400 events.
const MASSES: [(&str, &str); 2] = [
    ("votes of one event", "UPDATE votes SET vote_factor = vote_factor + 1"),
    ("artworks of 400 events", "UPDATE art SET vote_count = vote_count + 1 WHERE easel IS NULL"),
];

/// Measures UPDATEs of so many rows, the best of so many turns with the triggers and without.
pub(crate) async fn mass(cluster: &Cluster, rows: usize, turns: usize) -> Vec<Mass> {
    let name = "mass";
    let url = prepare(cluster, name).await;
    let fill = format!(
        "set session_replication_role = replica;
        insert into events (id, eid) select md5(n::text)::uuid, 'AB' || 5000 + n
            from generate_series(1, 400) n;
        insert into art (event_id, round) select md5((n % 400 + 1)::text)::uuid, 2
            from generate_series(1, {rows}) n;
        insert into votes (event_id, eid, round, easel, art_id, art_uuid, person_id)
            select '00000000-0000-4000-8000-000000003028', 'AB3028', 2, 3, 'AB3028-2-3',
                '00000000-0000-4000-8000-0000000000a1', gen_random_uuid()
            from generate_series(1, {rows})"
    );
    cluster.psql(name, &fill).await.unwrap();
    let mut writer = PgConnection::connect(&url).await.unwrap();
    let mut masses = Vec::new();
    for (what, update) in MASSES {
        let mut best = [Duration::MAX; 2];
        for turn in 0..2 * turns {
            let has_triggers = turn % 2 == 0;
            switch(&mut writer, has_triggers).await;
            // What the last one has left behind costs this one nothing.
            sqlx::query("VACUUM votes, art").execute(&mut writer).await.unwrap();
            let begun = Instant::now();
            let written = sqlx::query(update).execute(&mut writer).await.unwrap().rows_affected();
            let took = begun.elapsed();
            assert_eq!(written, rows as u64, "{what}");
            let best = &mut best[usize::from(has_triggers)];
            *best = took.min(*best);
        }
        masses.push(Mass { what, without: best[0], with: best[1] });
    }
    masses
}

/// The votes of many sessions at once, in a second.
pub(crate) struct Rates {
    pub(crate) without: f64,
    pub(crate) with: f64,
}

/// Sessions that vote at once.
pub(crate) const SESSIONS: usize = 16;

/// Measures votes of [`SESSIONS`] sessions, in so many turns of so many votes of each session, half
/// of them with the triggers. The cluster should wait for its disk, as NOTIFY lets commits do that
/// one after the other.
pub(crate) async fn at_once(cluster: &Cluster, turns: usize, votes: usize) -> Rates {
    let url = prepare(cluster, "at_once").await;
    let mut listener = PgListener::connect(&url).await.unwrap();
    let channels = ["cache_invalidate_AB3028", "global_cache_stats", "marker"];
    listener.listen_all(channels).await.unwrap();
    let mut owner = PgConnection::connect(&url).await.unwrap();
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(PgConnection::connect(&url).await.unwrap());
    }
    let mut took = [Duration::ZERO; 2];
    for turn in 0..turns {
        let has_triggers = matches!(turn % 4, 0 | 3);
        switch(&mut owner, has_triggers).await;
        let mut voting = JoinSet::new();
        let begun = Instant::now();
        for mut session in sessions.drain(..) {
            voting.spawn(async move {
                for _ in 0..votes {
                    sqlx::query(VOTE).execute(&mut session).await.unwrap();
                }
                session
            });
        }
        sessions = voting.join_all().await;
        took[usize::from(has_triggers)] += begun.elapsed();
        let told = if has_triggers { NOTIFICATIONS_PER_INSERT * SESSIONS * votes } else { 0 };
        assert_eq!(heard_until_marker(&mut listener, &mut owner).await, told);
    }
    let count = u32::try_from(turns / 2 * SESSIONS * votes).unwrap();
    let [without, with] = took.map(|took| f64::from(count) / took.as_secs_f64());
    Rates { without, with }
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
