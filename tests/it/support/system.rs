//! A database with the system file run, on either shape of the tables, and what it has notified.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection, postgres::PgListener};
use tidegate::demo::cluster::{Cluster, ClusterError};

/// How long anything that must happen may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) const EVENT: &str = "00000000-0000-4000-8000-000000003028";
pub(crate) const OTHER_EVENT: &str = "00000000-0000-4000-8000-000000003029";
/// Round 2 of AB3028, at the easel `Shape::easel`.
pub(crate) const ART: &str = "00000000-0000-4000-8000-0000000000a1";
/// Round 2 of AB3028, at the easel 9.
pub(crate) const SECOND_ART: &str = "00000000-0000-4000-8000-0000000000a2";
/// Round 1 of AB3029, at the easel 1.
pub(crate) const OTHER_ART: &str = "00000000-0000-4000-8000-0000000000a3";
/// Round 2 of AB3028, without an easel.
pub(crate) const ART_WITHOUT_EASEL: &str = "00000000-0000-4000-8000-0000000000a4";
/// Round 2 of AB3028, in production's shape.
pub(crate) const ROUND: &str = "00000000-0000-4000-8000-0000000000c1";
/// Round 1 of AB3029, in production's shape.
pub(crate) const OTHER_ROUND: &str = "00000000-0000-4000-8000-0000000000c2";
pub(crate) const PERSON: &str = "00000000-0000-4000-8000-0000000000b1";

const CHANNELS: [&str; 5] = [
    "auction_winner_AB3028",
    "cache_invalidate_AB3028",
    "cache_invalidate_AB3029",
    "global_cache_stats",
    "marker",
];

pub(crate) fn migration(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("migrations").join(file)
}

pub(crate) fn system_file() -> PathBuf {
    migration("broadcast_cache_invalidation_system.sql")
}

/// Which columns the tables have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Shape {
    Seed,
    Production,
}

impl Shape {
    pub(crate) const BOTH: [Self; 2] = [Self::Seed, Self::Production];

    pub(crate) fn database(self) -> &'static str {
        match self {
            Self::Seed => "seed",
            Self::Production => "production",
        }
    }

    pub(crate) fn tables(self) -> PathBuf {
        migration("examples").join(format!("{}_tables.sql", self.database()))
    }

    pub(crate) fn easel(self) -> &'static str {
        match self {
            Self::Seed => "A",
            Self::Production => "3",
        }
    }

    pub(crate) fn vote(self) -> String {
        match self {
            Self::Seed => format!(
                "insert into votes (art_id, person_id, round, event_id)
                values ('{ART}', '{PERSON}', 2, '{EVENT}');"
            ),
            Self::Production => format!(
                "insert into votes (event_id, eid, round, easel, art_id, art_uuid, person_id)
                values ('{EVENT}', 'AB3028', 2, 3, 'AB3028-2-3', '{ART}', '{PERSON}');"
            ),
        }
    }

    /// The triggers that the system file makes: table, name, operations.
    pub(crate) fn triggers(self) -> &'static [(&'static str, &'static str, usize)] {
        const TRIGGERS: [(&str, &str, usize); 9] = [
            ("art", "cache_invalidate_art_trigger", 2),
            ("art_media", "cache_invalidate_media_trigger", 3),
            ("bids", "cache_invalidate_bids_trigger", 2),
            ("events", "cache_invalidate_events_trigger", 1),
            ("votes", "cache_invalidate_votes_trigger", 3),
            ("artwork_offers", "cache_invalidate_artwork_offers_trigger", 3),
            ("event_artists", "cache_invalidate_event_artists_trigger", 3),
            ("payment_processing", "cache_invalidate_payment_processing_trigger", 1),
            ("round_contestants", "cache_invalidate_round_contestants_trigger", 3),
        ];
        match self {
            Self::Seed => &TRIGGERS[..5],
            Self::Production => &TRIGGERS,
        }
    }

    pub(crate) fn media_column(self) -> &'static str {
        match self {
            Self::Seed => "artwork_id",
            Self::Production => "art_id",
        }
    }

    /// Two events with artworks, made before anybody listens.
    fn rows(self) -> String {
        let easel = self.easel();
        let codes = match self {
            Self::Seed => String::new(),
            Self::Production => format!(
                "update art set art_code = 'AB3028-2-3' where id = '{ART}';
                insert into people (id, nickname) values ('{PERSON}', 'Vermeer');
                insert into rounds (id, event_id, round_number)
                values ('{ROUND}', '{EVENT}', 2), ('{OTHER_ROUND}', '{OTHER_EVENT}', 1);"
            ),
        };
        format!(
            "insert into events (id, eid) values ('{EVENT}', 'AB3028'), ('{OTHER_EVENT}', 'AB3029');
            insert into art (id, event_id, round, easel) values
                ('{ART}', '{EVENT}', 2, '{easel}'), ('{SECOND_ART}', '{EVENT}', 2, '9'),
                ('{OTHER_ART}', '{OTHER_EVENT}', 1, '1'), ('{ART_WITHOUT_EASEL}', '{EVENT}', 2, null);
            {codes}"
        )
    }
}

/// Gives AB3028 another name, of which no trigger tells.
pub(crate) fn rename_event(eid: &str) -> String {
    format!(
        "set session_replication_role = replica;
        update events set eid = '{eid}' where id = '{EVENT}';
        reset session_replication_role;"
    )
}

pub(crate) fn bid(art: &str, amount: u32) -> String {
    format!("insert into bids (art_id, person_id, amount) values ('{art}', '{PERSON}', {amount});")
}

/// A database of one shape with the system file run and some rows, and a session that hears all.
pub(crate) struct Database {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) shape: Shape,
    pub(crate) listener: PgListener,
}

impl Database {
    pub(crate) async fn both() -> [Self; 2] {
        let cluster = Arc::new(Cluster::start().await.unwrap());
        [Self::create(&cluster, Shape::Seed).await, Self::create(&cluster, Shape::Production).await]
    }

    pub(crate) async fn start(shape: Shape) -> Self {
        Self::create(&Arc::new(Cluster::start().await.unwrap()), shape).await
    }

    async fn create(cluster: &Arc<Cluster>, shape: Shape) -> Self {
        cluster.create_database(shape.database()).await.unwrap();
        cluster.psql_file(shape.database(), &shape.tables()).await.unwrap();
        cluster.psql_file(shape.database(), &system_file()).await.unwrap();
        cluster.psql(shape.database(), &shape.rows()).await.unwrap();
        let mut listener = PgListener::connect(&cluster.url(shape.database())).await.unwrap();
        listener.listen_all(CHANNELS).await.unwrap();
        Self { cluster: Arc::clone(cluster), shape, listener }
    }

    pub(crate) async fn try_run(&self, sql: &str) -> Result<String, ClusterError> {
        self.cluster.psql(self.shape.database(), sql).await
    }

    pub(crate) async fn run(&self, sql: &str) -> String {
        match self.try_run(sql).await {
            Ok(rows) => rows,
            Err(error) => panic!("{:?}: {error}\n{sql}", self.shape),
        }
    }

    pub(crate) async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.cluster.url(self.shape.database())).await.unwrap()
    }

    /// Runs SQL and gives all that it has notified, in order: `[[channel, payload], …]`. The stamps
    /// of the payloads, and their rows in the history, are checked and taken out.
    pub(crate) async fn told(&mut self, sql: &str) -> Value {
        self.run(sql).await;
        let mut told = Vec::new();
        for (channel, mut payload) in self.heard_until_marker().await {
            self.take_id(&channel, &mut payload).await;
            take_stamp(&channel, &mut payload);
            told.push(json!([channel, payload]));
        }
        Value::Array(told)
    }

    /// As `told`, without the monitoring channel.
    pub(crate) async fn told_viewers(&mut self, sql: &str) -> Value {
        let mut told = self.told(sql).await;
        if let Value::Array(told) = &mut told {
            told.retain(|message| message[0] != "global_cache_stats");
        }
        told
    }

    pub(crate) async fn heard_until_marker(&mut self) -> Vec<(String, Value)> {
        self.run("select pg_notify('marker', '')").await;
        let mut heard = Vec::new();
        loop {
            let next = tokio::time::timeout(DEADLINE, self.listener.try_recv()).await;
            let next = next.expect("the marker arrives").unwrap().expect("the session lives");
            if next.channel() == "marker" {
                return heard;
            }
            let payload = serde_json::from_str(next.payload()).unwrap();
            heard.push((next.channel().to_owned(), payload));
        }
    }

    /// `id` is that of the row of the history that holds this payload, on the events' channels only.
    async fn take_id(&self, channel: &str, payload: &mut Value) {
        let told = payload.to_string();
        let id = payload.as_object_mut().unwrap().remove("id");
        let Some(eid) = channel.strip_prefix("cache_invalidate_") else {
            assert_eq!(id, None, "{channel}");
            return;
        };
        let id = id.expect("the payload names its row").as_u64().unwrap();
        let row = format!(
            "select eid = '{eid}', type = payload::jsonb ->> 'type', payload
            from tidegate.broadcast_history where id = {id}"
        );
        let row = self.run(&row).await;
        let payload = row.strip_prefix("t|t|").expect("the history has the payload");
        assert_eq!(serde_json::from_str::<Value>(payload).unwrap().to_string(), told);
    }

    /// These columns of the history, oldest first.
    pub(crate) async fn history(&self, columns: &str) -> String {
        self.run(&format!("select {columns} from tidegate.broadcast_history order by id")).await
    }

    /// The recorded failures, oldest first: `table|operation|event_eid|sqlstate|message`.
    pub(crate) async fn failures(&self) -> String {
        self.run(
            "select table_name, operation, event_eid, sqlstate, message
            from tidegate.trigger_failures order by id",
        )
        .await
    }
}

/// `timestamp` is the wall clock in seconds as a JSON number; `cache_version` the same moment in
/// whole milliseconds, on the events' channels only.
fn take_stamp(channel: &str, payload: &mut Value) {
    let fields = payload.as_object_mut().unwrap();
    let seconds = fields.remove("timestamp").unwrap().as_f64().unwrap();
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((clock - seconds).abs() < 60.0, "{channel}: {seconds} is not the time, {clock}");
    let version = fields.remove("cache_version");
    assert_eq!(version.is_some(), channel.starts_with("cache_invalidate_"), "{channel}");
    if let Some(version) = version {
        let milliseconds = f64::from(u32::try_from(version.as_u64().unwrap() % 1_000_000).unwrap());
        let difference = (seconds * 1000.0) % 1_000_000.0 - milliseconds;
        assert!((-0.1..1.1).contains(&difference), "{version} is not {seconds} in milliseconds");
    }
}

pub(crate) fn viewers(eid: &str, payload: &Value) -> Value {
    json!([format!("cache_invalidate_{eid}"), payload])
}

pub(crate) fn stats(eid: &str, table: &str, operation: &str) -> Value {
    let payload = json!({ "event_eid": eid, "table": table, "operation": operation });
    json!(["global_cache_stats", payload])
}

pub(crate) fn vote_cast(easel: &str) -> Value {
    json!({
        "type": "vote_cast", "event_eid": "AB3028", "endpoints": ["/live/event/AB3028"],
        "art_id": ART, "round": 2, "easel": easel,
    })
}

pub(crate) fn art_updated(easel: &str) -> Value {
    json!({
        "type": "art_updated", "event_eid": "AB3028",
        "endpoints": ["/live/event/AB3028", "/live/event/AB3028/media"],
        "art_id": ART, "round": 2, "easel": easel,
    })
}

pub(crate) fn bid_placed(easel: &str, amount: u32) -> Value {
    let bids = format!("/live/event/AB3028-2-{easel}/bids");
    json!({
        "type": "bid_placed", "event_eid": "AB3028", "endpoints": ["/live/event/AB3028", bids],
        "art_id": ART, "round": 2, "easel": easel, "amount": amount,
    })
}

pub(crate) fn media_updated(shape: Shape) -> Value {
    let mut payload = json!({
        "type": "media_updated", "event_eid": "AB3028", "endpoints": ["/live/event/AB3028/media"],
        "art_id": ART,
    });
    if shape == Shape::Seed {
        payload["artwork_id"] = json!(ART);
    }
    payload
}
