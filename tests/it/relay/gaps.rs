//! Gaps in the database link: of whatever was committed while the gateway could not hear it, the
//! viewers of each event that may have changed are told once, and nobody else is told anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
    time::Duration,
};

use serde_json::json;
use sqlx::{AssertSqlSafe, PgConnection, postgres::PgListener};
use tidegate::{
    db,
    demo::cluster::Cluster,
    protocol::serializer::Serializer::{self, V1, V2},
    relay::LinkError,
    secret::Secret,
    server::Config,
};
use tokio::time::timeout;

use crate::support::{
    client::Client,
    proxy::Proxy,
    server::{DEADLINE, TestServer, config},
    system::{ART, Database, EVENT, OTHER_ART, PERSON, SECOND_ART, Shape, bid},
};

const TOPIC: &str = "cache_invalidate_AB3028";
const OTHER_SPELLING: &str = "cache_invalidate:AB3028";
const OTHER_TOPIC: &str = "cache_invalidate_AB3029";

/// Everything of AB3028.
const ALL: [&str; 5] = [
    "/live/event/AB3028",
    "/live/event/AB3028-2-3/bids",
    "/live/event/AB3028-2-9/bids",
    "/live/event/AB3028/artists",
    "/live/event/AB3028/media",
];
/// What every event has, as far as is known of one that is not listened to.
const RESYNC: [&str; 3] =
    ["/live/event/AB3028", "/live/event/AB3028/artists", "/live/event/AB3028/media"];
/// Everything of AB3029.
const OTHER_ALL: [&str; 4] = [
    "/live/event/AB3029",
    "/live/event/AB3029-1-1/bids",
    "/live/event/AB3029/artists",
    "/live/event/AB3029/media",
];
/// What changes with a vote, and with a bid on `ART`, on `SECOND_ART` and on `OTHER_ART`.
const VOTE: [&str; 1] = ["/live/event/AB3028"];
const BID: [&str; 2] = ["/live/event/AB3028", "/live/event/AB3028-2-3/bids"];
const SECOND_BID: [&str; 2] = ["/live/event/AB3028", "/live/event/AB3028-2-9/bids"];
const OTHER_BID: [&str; 2] = ["/live/event/AB3029", "/live/event/AB3029-1-1/bids"];
const MEDIA: [&str; 1] = ["/live/event/AB3028/media"];

/// The server's end of the session is seen as one or the other: `closed`, `broken`.
const ENDED: &str = "ended";

/// 1 while something may have been missed.
const GAP_OPEN: &str = "tidegate_relay_gap_open";

/// What clients are caught up for that join; all other causes concern whole events.
const CAUSES_OF_JOINS: [&str; 4] = ["fresh", "held", "returned", "unknown"];

/// How the listening session is lost.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    /// The server ends the session.
    Terminated,
    /// The network drops everything and closes nothing.
    HalfOpen,
}

/// A database with everything of ours, a gateway, and between the gateway's listening session and
/// the database a network that can fail; what else the gateway asks goes another way.
struct Scene {
    database: Database,
    proxy: Proxy,
    server: TestServer,
    config: Config,
}

/// What the viewers of an event are told.
#[derive(Debug, PartialEq)]
struct Told {
    topic: String,
    kind: String,
    cause: String,
    endpoints: BTreeSet<String>,
}

/// A transaction of another session.
struct Transaction(PgConnection);

impl Scene {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let (database, proxy, mut config) = prepare().await;
        change(&mut config);
        let server = TestServer::start_with(config.clone());
        server.link_is_up().await;
        Self { database, proxy, server, config }
    }

    async fn viewer(&self, topic: &str) -> Client {
        let all: &[_] = if topic == OTHER_TOPIC { &OTHER_ALL } else { &ALL };
        viewer(&self.server, V2, topic, all).await
    }

    /// A viewer of each event, both of which have heard of a bid, so that the history can be
    /// trusted; all of that is long ago.
    async fn viewers(&self) -> [Client; 2] {
        let mut viewers = [self.viewer(TOPIC).await, self.viewer(OTHER_TOPIC).await];
        self.database.run(&format!("{} {}", bid(ART, 1), bid(OTHER_ART, 1))).await;
        hears(&mut viewers[0], "bid_placed", &BID).await;
        hears(&mut viewers[1], "bid_placed", &OTHER_BID).await;
        self.is_long_ago().await;
        viewers
    }

    /// Lets all that stands in the history be ten minutes older, and the gateway know that it has
    /// heard of it.
    async fn is_long_ago(&self) {
        let age = "update tidegate.broadcast_history set at = at - interval '10 minutes'";
        self.database.run(age).await;
        is_good(&self.server).await;
    }

    /// From here on the listening session hears nothing, and no other begins before `restore`.
    async fn lose(&self, loss: Loss) {
        self.proxy.hold_at("pg_is_in_recovery");
        match loss {
            Loss::Terminated => terminate(&self.database, 1).await,
            Loss::HalfOpen => self.proxy.freeze_existing(),
        }
    }

    /// Lets a new session begin, once the gateway has given the last one up.
    async fn restore(&mut self) {
        self.proxy.has_held().await;
        assert_eq!(self.server.metric(GAP_OPEN).await, 1.0);
        self.proxy.release();
        self.server.link_is_up().await;
        assert_eq!(self.server.metric(GAP_OPEN).await, 0.0);
    }

    /// A gap in which this SQL is run.
    async fn gap(&mut self, sql: &str) {
        self.lose(Loss::Terminated).await;
        self.database.run(sql).await;
        self.restore().await;
    }

    /// Fails unless the viewers hear what their events are notified of now, byte for byte, and
    /// nothing before it: what waits to be sent would be merged with it.
    async fn tells_nothing<const N: usize>(&self, viewers: [(&mut Client, &str); N]) {
        let marker = json!({ "id": 0, "marker": fastrand::u32(..) });
        let channels: BTreeSet<_> =
            viewers.iter().map(|(_, topic)| topic.replace(':', "_")).collect();
        for channel in channels {
            self.database.run(&format!("select pg_notify('{channel}', '{marker}')")).await;
        }
        for (viewer, topic) in viewers {
            let (told_topic, envelope) = viewer.broadcast().await;
            let expected = (format!("realtime:{topic}"), &marker);
            assert_eq!((told_topic, &envelope["payload"]), expected);
        }
    }

    /// Fails unless whole events were caught up so often since the start, by cause and method, and
    /// by no other cause.
    async fn has_counted(&self, expected: &[(&str, &str, u64)]) {
        assert_eq!(catch_ups(&self.server).await, expected.iter().map(by_labels).collect());
    }

    /// Fails unless these gaps have begun since the start, each so often, and have been closed.
    async fn has_had_gaps(&self, expected: &[(&str, u64)]) {
        let gaps = counts(&self.server, "tidegate_relay_gaps_total").await;
        let by_cause = |(cause, count): &(&str, u64)| (format!("cause=\"{cause}\""), *count);
        assert_eq!(gaps, expected.iter().map(by_cause).collect());
        self.server.metric_falls_to(GAP_OPEN, 0.0).await;
    }

    async fn end(self, viewers: impl IntoIterator<Item = Client>) {
        for viewer in viewers {
            viewer.ends().await;
        }
        self.server.stop().await;
    }
}

impl Transaction {
    /// Runs this, and lets what it has written into the history be ten minutes old.
    async fn begin(database: &Database, sql: &str) -> Self {
        let mut session = database.connect().await;
        let age = "update tidegate.broadcast_history set at = at - interval '10 minutes'
            where xact = pg_current_xact_id()";
        run(&mut session, &format!("begin; {sql} {age}")).await;
        Self(session)
    }

    async fn commit(mut self) {
        run(&mut self.0, "commit").await;
    }
}

/// What a gateway needs, with short intervals; the listening session has a role of its own.
async fn prepare() -> (Database, Proxy, Config) {
    let database = Database::start(Shape::Production).await;
    let name = database.shape.database();
    let url = database.cluster.url(name);
    db::migrate(&Secret::from(&*url)).await.unwrap();
    database.run("create role listener login in role tidegate").await;
    let proxy = Proxy::start("127.0.0.1", database.cluster.port()).await;
    let mut config = config();
    config.database_url = Secret::from(&*url.replace("postgres@", "tidegate@"));
    config.notify_database_url =
        Secret::from(&*format!("postgres://listener@{}/{name}", proxy.address));
    config.relay.connect_timeout = Duration::from_secs(1);
    config.relay.heartbeat_timeout = DEADLINE;
    config.relay.listen_wait = DEADLINE;
    config.relay.canary_interval = Duration::from_millis(50);
    // A test says which of the two finds a half-open link.
    config.relay.heartbeat_interval = Duration::from_secs(600);
    config.relay.canary_timeout = Duration::from_secs(600);
    config.relay.resync_spread = Duration::from_millis(20);
    // What is sent says what has happened, and not what was sent before.
    let merge = config.topic[0].merge.as_mut().unwrap();
    (merge.window, merge.carry) = (Duration::ZERO, Duration::ZERO);
    (database, proxy, config)
}

/// A viewer who has joined: of a client of whom nothing is known, so that it is told everything.
async fn viewer(server: &TestServer, serializer: Serializer, topic: &str, all: &[&str]) -> Client {
    let mut viewer = Client::connect(server, serializer).await;
    viewer.join_only(topic, json!({})).await;
    is_caught_up(&mut viewer, topic, "unknown", all).await;
    viewer
}

async fn told(viewer: &mut Client) -> Told {
    let (topic, envelope) = viewer.broadcast().await;
    let payload = &envelope["payload"];
    let text = |name: &str| payload[name].as_str().unwrap_or_default().to_owned();
    let listed = payload["endpoints"].as_array().expect("a list of endpoints");
    let endpoints: BTreeSet<_> =
        listed.iter().map(|endpoint| endpoint.as_str().expect("an endpoint").to_owned()).collect();
    assert_eq!(endpoints.len(), listed.len(), "an endpoint twice: {payload}");
    let cause = text("cause").replace("closed", ENDED).replace("broken", ENDED);
    Told { topic, kind: text("type"), cause, endpoints }
}

/// Fails unless the next thing that the viewer is told is what it has missed for this cause.
async fn is_caught_up(viewer: &mut Client, topic: &str, cause: &str, endpoints: &[&str]) {
    let expected = Told {
        topic: format!("realtime:{topic}"),
        kind: "catch_up".to_owned(),
        cause: cause.to_owned(),
        endpoints: endpoints.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(told(viewer).await, expected);
}

/// Fails unless the next thing that the viewer is told is a change, by its own notification.
async fn hears(viewer: &mut Client, kind: &str, endpoints: &[&str]) {
    let told = told(viewer).await;
    assert_eq!((told.kind, told.cause), (kind.to_owned(), String::new()));
    assert_eq!(told.endpoints, endpoints.iter().map(ToString::to_string).collect());
}

/// Waits until the gateway knows of all that was committed that it has heard of it: one canary may
/// be under way, the next leaves after the one before it was judged.
async fn is_good(server: &TestServer) {
    let count = "tidegate_canary_seconds_count";
    server.metric_reaches(count, server.metric(count).await + 3.0).await;
}

/// The series of a metric that are not zero, by their labels.
async fn counts(server: &TestServer, metric: &str) -> BTreeMap<String, u64> {
    let (_, text) = TestServer::request(server.admin, "GET /metrics HTTP/1.1", "").await;
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let Some(series) = line.strip_prefix(metric).and_then(|rest| rest.strip_prefix('{')) else {
            continue;
        };
        let (labels, value) = series.split_once("} ").expect("labels and a value");
        let labels = labels.replace("closed", ENDED).replace("broken", ENDED);
        *counts.entry(labels).or_default() += value.parse::<u64>().unwrap();
    }
    counts.retain(|_, value| *value > 0);
    counts
}

/// How often whole events were caught up.
async fn catch_ups(server: &TestServer) -> BTreeMap<String, u64> {
    let mut counts = counts(server, "tidegate_catch_ups_total").await;
    counts.retain(|labels, _| !CAUSES_OF_JOINS.iter().any(|cause| labels.contains(cause)));
    counts
}

fn by_labels((cause, method, count): &(&str, &str, u64)) -> (String, u64) {
    (format!("cause=\"{cause}\",method=\"{method}\""), *count)
}

/// Waits until a session has ended by this cause.
async fn has_ended_by(server: &TestServer, cause: &str) {
    let series = format!("tidegate_relay_reconnects_total{{cause=\"{cause}\"}}");
    server.metric_reaches(&series, 1.0).await;
}

async fn terminate(database: &Database, sessions: u32) {
    let terminate = "select count(pg_terminate_backend(pid, 10000))
        from pg_stat_activity where usename = 'listener'";
    assert_eq!(database.run(terminate).await, sessions.to_string(), "sessions that listen");
}

async fn run(session: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(session).await.unwrap();
}

fn media() -> String {
    format!("insert into art_media (art_id) values ('{ART}');")
}

/// Bids of one statement.
fn bids(art: &str, count: u32) -> String {
    format!(
        "insert into bids (art_id, amount) select '{art}', n from generate_series(1, {count}) n;"
    )
}

/// Of transactions that overlap the gap, one that ends in it is found in the history, old as its
/// rows are, and one that ends after it is notified.
async fn a_gap_is_made_up_for(loss: Loss, cause: &str) {
    let mut scene = Scene::start_with(|config| {
        if loss == Loss::HalfOpen {
            config.relay.heartbeat_interval = Duration::from_millis(50);
            config.relay.heartbeat_timeout = Duration::from_secs(2);
        }
    })
    .await;
    let [mut viewer, mut other] = scene.viewers().await;
    let mut other_spelling = self::viewer(&scene.server, V1, OTHER_SPELLING, &ALL).await;
    let into_the_gap = Transaction::begin(&scene.database, &bid(SECOND_ART, 2)).await;
    let beyond_it = Transaction::begin(&scene.database, &media()).await;
    is_good(&scene.server).await;

    scene.lose(loss).await;
    scene.database.run(&bid(ART, 2)).await;
    into_the_gap.commit().await;
    scene.restore().await;
    let both = [BID[0], BID[1], SECOND_BID[1]];
    is_caught_up(&mut viewer, TOPIC, cause, &both).await;
    is_caught_up(&mut other_spelling, OTHER_SPELLING, cause, &both).await;
    beyond_it.commit().await;
    hears(&mut viewer, "media_updated", &MEDIA).await;
    hears(&mut other_spelling, "media_updated", &MEDIA).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(cause, "exact", 1)]).await;

    // What this gap has hidden is not hidden by the next one.
    scene.is_long_ago().await;
    scene.gap("").await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other_spelling, OTHER_SPELLING)]).await;
    scene.has_counted(&[(cause, "exact", 1)]).await;
    scene.end([viewer, other, other_spelling]).await;
}

#[tokio::test]
async fn what_was_committed_after_the_session_was_terminated_is_told_once() {
    a_gap_is_made_up_for(Loss::Terminated, ENDED).await;
}

/// A router that has forgotten a connection tells neither side.
#[tokio::test]
async fn what_was_committed_while_the_link_was_half_open_is_told_once() {
    a_gap_is_made_up_for(Loss::HalfOpen, "silent").await;
}

/// What was committed in the last moment was never sent.
#[tokio::test]
async fn what_was_committed_before_and_after_a_crash_is_told_once() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    for _ in 0..2 {
        scene.lose(Loss::HalfOpen).await;
        scene.database.run(&bid(ART, 2)).await;
        scene.database.cluster.restart().await.unwrap();
        scene.database.run(&media()).await;
        scene.restore().await;
        is_caught_up(&mut viewer, TOPIC, ENDED, &[BID[0], BID[1], MEDIA[0]]).await;
        scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
        scene.is_long_ago().await;
    }
    scene.has_counted(&[(ENDED, "exact", 2)]).await;
    scene.end([viewer, other]).await;
}

/// A message may have been sent to a session that was already cut off.
#[tokio::test]
async fn what_was_told_within_the_minute_before_a_gap_is_told_again() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.database.run(&media()).await;
    hears(&mut viewer, "media_updated", &MEDIA).await;
    is_good(&scene.server).await;
    scene.gap("").await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &MEDIA).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// The attempts that fail are no gaps of their own.
#[tokio::test]
async fn a_gap_that_is_read_in_vain_is_told_once_and_by_its_own_cause() {
    let mut scene = Scene::start_with(|config| {
        config.relay.heartbeat_timeout = Duration::from_secs(2);
    })
    .await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.lose(Loss::Terminated).await;
    scene.database.run(&bid(ART, 2)).await;
    scene.proxy.hold_at("pg_visible_in_snapshot");
    scene.proxy.has_held().await;
    has_ended_by(&scene.server, "silent").await;
    scene.database.run(&bid(SECOND_ART, 3)).await;
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &[BID[0], BID[1], SECOND_BID[1]]).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// Each is either notified to the new session or read by it.
#[tokio::test]
async fn what_is_committed_while_the_next_session_begins_is_told() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.lose(Loss::Terminated).await;
    scene.proxy.hold_at("LISTEN \"cache_invalidate_AB3028\"");
    scene.proxy.has_held().await;
    scene.database.run(&bid(ART, 2)).await;
    scene.proxy.hold_at("tidegate.trigger_failures");
    scene.proxy.has_held().await;
    scene.database.run(&media()).await;
    scene.restore().await;
    let mut heard = BTreeSet::new();
    while heard.len() < 3 {
        heard.extend(told(&mut viewer).await.endpoints);
    }
    assert_eq!(heard, [BID[0], BID[1], MEDIA[0]].map(ToOwned::to_owned).into());
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "exact", 1)]).await;
    viewer.close().await;
    scene.end([other]).await;
}

/// Else the gateways of one database would rely on each other.
#[tokio::test]
async fn two_gateways_of_one_database_both_tell_what_was_missed() {
    let mut scene = Scene::start().await;
    let second = TestServer::start_with(scene.config.clone());
    second.link_is_up().await;
    let [mut viewer, mut other] = scene.viewers().await;
    let mut viewer_of_second = self::viewer(&second, V1, TOPIC, &ALL).await;
    scene.database.run(&bid(ART, 2)).await;
    for viewer in [&mut viewer, &mut viewer_of_second] {
        hears(viewer, "bid_placed", &BID).await;
    }
    scene.is_long_ago().await;
    is_good(&second).await;

    scene.proxy.hold_at("pg_is_in_recovery");
    terminate(&scene.database, 2).await;
    scene.database.run(&bid(SECOND_ART, 3)).await;
    for server in [&scene.server, &second] {
        server.metric_falls_to("tidegate_relay_link_up", 0.0).await;
    }
    scene.restore().await;
    second.link_is_up().await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &SECOND_BID).await;
    is_caught_up(&mut viewer_of_second, TOPIC, ENDED, &SECOND_BID).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.database.run(&scene.database.shape.vote()).await;
    for viewer in [&mut viewer, &mut viewer_of_second] {
        hears(viewer, "vote_cast", &VOTE).await;
    }
    for server in [&scene.server, &second] {
        let counted = [by_labels(&(ENDED, "exact", 1))];
        assert_eq!(catch_ups(server).await, counted.into());
    }
    viewer_of_second.ends().await;
    second.stop().await;
    scene.end([viewer, other]).await;
}

/// What the seed's triggers notify stands in no history.
#[tokio::test]
async fn an_event_that_was_told_without_an_id_gets_the_complete_list() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene
        .database
        .run(
            "create function notify_of_vote() returns trigger language plpgsql as $$ begin
                perform pg_notify('cache_invalidate_' || new.eid, json_build_object(
                    'type', 'vote_cast', 'event_eid', new.eid,
                    'timestamp', extract(epoch from now()),
                    'endpoints', json_build_array('/live/event/' || new.eid))::text);
                return new;
            end $$;
            drop trigger cache_invalidate_votes_trigger on votes;
            create trigger cache_invalidate_votes_trigger after insert on votes
                for each row execute function notify_of_vote()",
        )
        .await;
    let vote = scene.database.shape.vote();
    scene.database.run(&vote).await;
    hears(&mut viewer, "vote_cast", &VOTE).await;
    is_good(&scene.server).await;
    let another = vote.replace(PERSON, &PERSON.replace("b1", "b2"));
    scene.gap(&format!("{another} {}", bid(OTHER_ART, 2))).await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, ENDED, &OTHER_BID).await;
    scene.has_counted(&[(ENDED, "complete", 1), (ENDED, "exact", 1)]).await;
    // Ids that come again do not say what was written before.
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.is_long_ago().await;
    scene.gap("").await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &ALL).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "complete", 2), (ENDED, "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// Whether its triggers write a history nobody knows.
#[tokio::test]
async fn where_nothing_was_ever_heard_everybody_gets_the_complete_list() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = [scene.viewer(TOPIC).await, scene.viewer(OTHER_TOPIC).await];
    scene.gap(&bid(ART, 2)).await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, ENDED, &OTHER_ALL).await;
    // An event of which nothing was heard itself is like those that were.
    scene.database.run(&bid(ART, 3)).await;
    hears(&mut viewer, "bid_placed", &BID).await;
    scene.is_long_ago().await;
    scene.gap(&bid(OTHER_ART, 2)).await;
    is_caught_up(&mut other, OTHER_TOPIC, ENDED, &OTHER_BID).await;
    scene.tells_nothing([(&mut viewer, TOPIC)]).await;
    scene.has_counted(&[(ENDED, "complete", 2), (ENDED, "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// The history is a help, not a condition.
#[tokio::test]
async fn where_the_history_cannot_be_read_everybody_gets_the_complete_list_and_the_link_stays() {
    let mut scene = Scene::start_with(|config| {
        // A locked table is given up after half of it.
        config.relay.heartbeat_timeout = Duration::from_secs(2);
    })
    .await;
    let [mut viewer, mut other] = scene.viewers().await;
    let mut session = scene.database.connect().await;
    let mut gaps = 0;
    for (broken, mended) in [
        (
            "revoke all on tidegate.broadcast_history from tidegate",
            "grant select on tidegate.broadcast_history to tidegate",
        ),
        (
            "revoke all on tidegate.trigger_failures from tidegate",
            "grant select on tidegate.trigger_failures to tidegate",
        ),
        (
            "revoke usage on schema tidegate from tidegate",
            "grant usage on schema tidegate to tidegate",
        ),
        ("begin; lock table tidegate.broadcast_history in access exclusive mode", "commit"),
        ("drop table tidegate.broadcast_history", "select 1"),
        ("drop table tidegate.trigger_failures", "select 1"),
        ("drop schema tidegate cascade", "select 1"),
    ] {
        let unreadable = scene.server.metric("tidegate_history_unreadable_total").await;
        scene.lose(Loss::Terminated).await;
        scene.database.run(&bid(ART, 2)).await;
        run(&mut session, broken).await;
        scene.restore().await;
        gaps += 1;
        is_caught_up(&mut viewer, TOPIC, ENDED, &ALL).await;
        is_caught_up(&mut other, OTHER_TOPIC, ENDED, &OTHER_ALL).await;
        scene.has_counted(&[(ENDED, "complete", 2 * gaps)]).await;
        assert!(scene.server.metric("tidegate_history_unreadable_total").await > unreadable);
        scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
        assert_eq!(scene.server.metric("tidegate_relay_link_up").await, 1.0, "{broken}");
        run(&mut session, mended).await;
    }
    let ends = counts(&scene.server, "tidegate_relay_reconnects_total").await;
    assert_eq!(ends, [("cause=\"ended\"".to_owned(), gaps)].into());
    scene.end([viewer, other]).await;
}

/// What was committed at its beginning may be forgotten already.
#[tokio::test]
async fn a_gap_that_is_longer_than_the_history_ends_in_the_complete_list() {
    let mut scene = Scene::start_with(|config| {
        config.history.keep = Duration::from_secs(1);
        // So long at least is the gap.
        config.relay.canary_timeout = Duration::from_secs(2);
    })
    .await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.lose(Loss::HalfOpen).await;
    Transaction::begin(&scene.database, &bid(ART, 2)).await.commit().await;
    scene.database.run("select tidegate.forget_history('1 second')").await;
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, "canary_lost", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "canary_lost", &OTHER_ALL).await;
    scene.has_counted(&[("canary_lost", "complete", 2)]).await;
    scene.end([viewer, other]).await;
}

/// Beyond the 50th change of one transaction the history has a pointer for each event.
#[tokio::test]
async fn a_pointer_in_the_history_stands_for_everything_of_its_event() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.gap(&format!("begin; {} {} commit", bids(OTHER_ART, 25), bids(ART, 26))).await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, ENDED, &OTHER_BID).await;
    scene.has_counted(&[(ENDED, "complete", 1), (ENDED, "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// Runs this while triggers do not find the artworks.
/// Forgetting takes what a message said of a person, and not what has to be fetched again.
#[tokio::test]
async fn what_was_forgotten_in_a_gap_is_made_up_for_all_the_same() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    let artist =
        format!("insert into event_artists (event_id, artist_id) values ('{EVENT}', '{PERSON}');");
    let forget = format!("select tidegate.forget_person('{PERSON}')");
    scene.lose(Loss::Terminated).await;
    scene.database.run(&artist).await;
    assert_eq!(scene.database.run(&forget).await, "1");
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &[ALL[0], ALL[3]]).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "exact", 1)]).await;

    // An endpoint that names the person is taken out, and everything of the event stands in its
    // place.
    scene.is_long_ago().await;
    let page = format!("select manual_cache_invalidation('AB3028', '/live/person/{PERSON}')");
    scene.lose(Loss::Terminated).await;
    scene.database.run(&page).await;
    assert_eq!(scene.database.run(&forget).await, "1");
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &ALL).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.end([viewer, other]).await;
}

fn without_artworks(sql: &str) -> String {
    format!(
        "begin; alter table art rename to elsewhere; {sql} alter table elsewhere rename to art;
        commit"
    )
}

/// More endpoints than a message may name one by one.
#[tokio::test]
async fn a_gap_with_too_many_endpoints_ends_in_the_complete_list() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    let endpoints: Vec<_> = (0..201).map(|n| format!("/live/event/AB3028/{n}")).collect();
    let invalidate = |endpoint: &String| {
        format!("select from manual_cache_invalidation('AB3028', '{endpoint}');")
    };
    scene.gap(&endpoints.iter().map(invalidate).collect::<String>()).await;
    let all: Vec<_> = endpoints.iter().map(|endpoint| &**endpoint).chain(ALL).collect();
    is_caught_up(&mut viewer, TOPIC, ENDED, &all).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// What a trigger could not do in the gap may be what somebody has missed.
#[tokio::test]
async fn a_trigger_that_failed_in_the_gap_makes_everybody_get_the_complete_list() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.gap(&without_artworks(&bid(ART, 2))).await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, ENDED, &OTHER_ALL).await;
    scene.has_counted(&[(ENDED, "complete", 2)]).await;

    // Old failures are forgiven, and so are those of which no viewer can miss anything.
    scene.is_long_ago().await;
    let of_no_event = format!(
        "alter table bids drop constraint bids_art_id_fkey; {} {}",
        bid(PERSON, 1),
        bid(ART, 3)
    );
    scene.gap(&of_no_event).await;
    assert!(scene.database.failures().await.contains("P0002"));
    is_caught_up(&mut viewer, TOPIC, ENDED, &BID).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "complete", 2), (ENDED, "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// Without a gap nobody would ever notice that a message was not sent.
#[tokio::test]
async fn a_trigger_that_fails_makes_everybody_get_the_complete_list_at_the_next_canary() {
    let mut scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.database.run(&without_artworks(&bid(ART, 2))).await;
    is_caught_up(&mut viewer, TOPIC, "trigger_failure", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "trigger_failure", &OTHER_ALL).await;
    is_good(&scene.server).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    // Nor does it cost anything once more.
    scene.is_long_ago().await;
    scene.gap(&bid(ART, 3)).await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &BID).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[(ENDED, "exact", 1), ("trigger_failure", "complete", 2)]).await;
    scene.has_had_gaps(&[("start", 1), ("trigger_failure", 1), (ENDED, 1)]).await;
    scene.end([viewer, other]).await;
}

/// An artwork that came after the LISTEN, of which, and of whose first bid, nobody was told: its
/// endpoint was in no message.
#[tokio::test]
async fn the_complete_list_has_the_endpoints_that_have_come_to_exist_meanwhile() {
    let scene = Scene::start().await;
    let [mut viewer, other] = scene.viewers().await;
    let art = "00000000-0000-4000-8000-0000000000a9";
    let insert = format!(
        "set session_replication_role = replica;
        insert into art (id, event_id, round, easel)
        select '{art}', event_id, 7, 5 from art where id = '{ART}'"
    );
    scene.database.run(&insert).await;
    scene.is_long_ago().await;
    scene.database.run(&without_artworks(&bid(art, 2))).await;
    let mut all = ALL.to_vec();
    all.push("/live/event/AB3028-7-5/bids");
    is_caught_up(&mut viewer, TOPIC, "trigger_failure", &all).await;
    drop(other);
    scene.end([viewer]).await;
}

/// Replaces `pg_notify` by one that fails for these channels.
fn notify_fails_for(pattern: &str) -> String {
    format!(
        "alter function pg_catalog.pg_notify(text, text) rename to notify_in_truth;
        create function pg_catalog.pg_notify(channel text, payload text) returns void
        language plpgsql as $$ begin
            if channel ~ '{pattern}' then
                raise 'not notified';
            end if;
            perform pg_catalog.notify_in_truth(channel, payload);
        end $$;"
    )
}

#[tokio::test]
async fn a_failure_that_names_its_event_concerns_no_other() {
    let scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    scene.database.run(&notify_fails_for("^cache_invalidate_AB3028$")).await;
    scene.database.run(&format!("begin; {} {} commit", bid(ART, 2), bid(OTHER_ART, 2))).await;
    is_caught_up(&mut viewer, TOPIC, "trigger_failure", &ALL).await;
    hears(&mut other, "bid_placed", &OTHER_BID).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[("trigger_failure", "complete", 1)]).await;
    scene.end([viewer, other]).await;
}

/// A transaction records ten failures at most: the events of the others are not named.
#[tokio::test]
async fn a_transaction_that_fails_for_many_events_leaves_none_untold() {
    let scene = Scene::start().await;
    let eids: Vec<_> = (1..=12).map(|n| format!("AB40{n:02}")).collect();
    let mut viewer = Client::connect(&scene.server, V2).await;
    for eid in &eids {
        let row = format!(
            "with e as (insert into events (eid) values ('{eid}') returning id)
            insert into art (event_id, round, easel) select id, 1, 1 from e"
        );
        scene.database.run(&row).await;
        viewer.join_only(&format!("cache_invalidate_{eid}"), json!({})).await;
        assert_eq!(told(&mut viewer).await.cause, "unknown");
    }
    scene.is_long_ago().await;
    scene.database.run(&notify_fails_for("^cache_invalidate_AB40")).await;
    scene.database.run("update art set description = 'sunny' where round = 1 and easel = 1").await;
    let series = "tidegate_catch_ups_total{cause=\"trigger_failure\",method=\"complete\"}";
    scene.server.metric_reaches(series, 12.0).await;
    let mut caught_up = BTreeSet::new();
    for _ in &eids {
        caught_up.insert(told(&mut viewer).await.topic);
    }
    assert_eq!(caught_up.len(), 12);
    scene.end([viewer]).await;
}

/// Filling the real queue takes gigabytes, so that another function answers in its place.
#[tokio::test]
async fn what_a_full_queue_kept_from_viewers_is_read_from_the_history() {
    let scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    let full = "create function pg_catalog.pg_notification_queue_usage()
        returns double precision language sql as 'select 0.51::double precision';";
    let change = format!(
        "begin;
        alter function pg_catalog.pg_notification_queue_usage() rename to usage_in_truth;
        {full} {} {}
        drop function pg_catalog.pg_notification_queue_usage();
        alter function pg_catalog.usage_in_truth() rename to pg_notification_queue_usage;
        commit",
        bid(ART, 2),
        media()
    );
    scene.database.run(&change).await;
    is_caught_up(&mut viewer, TOPIC, "queue_full", &[BID[0], BID[1], MEDIA[0]]).await;
    is_good(&scene.server).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[("queue_full", "exact", 1)]).await;
    scene.has_had_gaps(&[("start", 1), ("queue_full", 1)]).await;
    scene.end([viewer, other]).await;
}

/// Where canaries cannot fly, nothing after the session's start is known to have arrived.
#[tokio::test]
async fn without_canaries_a_gap_reaches_back_to_the_start_of_the_session() {
    let mut scene = Scene::start_with(|config| {
        config.database_url = Secret::from("postgres://nobody@127.0.0.1:1/nothing");
    })
    .await;
    let mut viewer = scene.viewer(TOPIC).await;
    scene.database.run(&bid(ART, 1)).await;
    hears(&mut viewer, "bid_placed", &BID).await;
    scene.server.metric_reaches("tidegate_canary_failures_total", 1.0).await;
    let age = "update tidegate.broadcast_history set at = at - interval '10 minutes';";
    scene.gap(&format!("{age} {}", media())).await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &[BID[0], BID[1], MEDIA[0]]).await;
    scene.database.run(age).await;
    scene.gap("").await;
    scene.tells_nothing([(&mut viewer, TOPIC)]).await;
    scene.has_counted(&[(ENDED, "exact", 1)]).await;
    scene.end([viewer]).await;
}

/// A pooler gives each statement a session that it likes, and that hears nothing: a LISTEN
/// succeeds, and that is all.
async fn a_lost_canary_ends_the_session(database: &Database, mut config: Config) {
    database.cluster.create_database("elsewhere").await.unwrap();
    let url = database.cluster.url("elsewhere").replace("postgres@", "listener@");
    config.notify_database_url = Secret::from(&*url);
    config.relay.canary_timeout = Duration::from_millis(500);
    let server = TestServer::start_with(config);
    has_ended_by(&server, "canary_lost").await;
    server.stop().await;
}

#[tokio::test]
async fn a_session_that_does_not_hear_the_canary_ends_and_its_error_names_the_pooler() {
    let (database, _proxy, config) = prepare().await;
    a_lost_canary_ends_the_session(&database, config).await;
    let error = LinkError::CanaryLost.to_string();
    assert!(error.contains("pooler") && error.contains("notify_database_url"), "{error}");
}

/// A pooler is no better where no failures of triggers can be read.
#[tokio::test]
async fn a_database_with_nothing_of_ours_has_its_pooler_found_out_too() {
    let (database, _proxy, config) = prepare().await;
    database.run("drop schema tidegate cascade").await;
    a_lost_canary_ends_the_session(&database, config).await;
}

/// That a canary has left, and has seen a change, does not say that the change has arrived.
#[tokio::test]
async fn what_a_lost_canary_has_seen_was_missed() {
    let (database, proxy, mut config) = prepare().await;
    let mut sky = Proxy::start("127.0.0.1", database.cluster.port()).await;
    let name = database.shape.database();
    config.database_url = Secret::from(&*format!("postgres://tidegate@{}/{name}", sky.address));
    config.relay.canary_timeout = Duration::from_secs(2);
    let server = TestServer::start_with(config.clone());
    server.link_is_up().await;
    let mut scene = Scene { database, proxy, server, config };
    let [mut viewer, mut other] = scene.viewers().await;
    sky.hold_at("tidegate_canary");
    sky.has_held().await;
    scene.lose(Loss::HalfOpen).await;
    Transaction::begin(&scene.database, &bid(ART, 2)).await.commit().await;
    sky.release();
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, "canary_lost", &BID).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[("canary_lost", "exact", 1)]).await;
    scene.end([viewer, other]).await;
}

/// A standby that takes over may lack what the gateway has heard.
#[tokio::test]
async fn a_server_on_another_timeline_costs_everybody_the_complete_list() {
    let scene = Scene::start().await;
    let [mut viewer, mut other] = scene.viewers().await;
    let cluster = &scene.database.cluster;
    cluster.stop_immediate().await.unwrap();
    shell(cluster, "touch data/standby.signal && chown --reference=data data/standby.signal");
    let promote = async {
        has_ended_by(&scene.server, "in_recovery").await;
        cluster.psql("postgres", "select pg_promote()").await.unwrap();
    };
    // A standby is not called started before its promotion.
    let (restarted, ()) = tokio::join!(cluster.restart(), promote);
    restarted.unwrap();
    is_caught_up(&mut viewer, TOPIC, "restored", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "restored", &OTHER_ALL).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[("restored", "complete", 2)]).await;
    // The end of the session, and what the next one has found.
    scene.has_had_gaps(&[("start", 1), (ENDED, 1), ("restored", 1)]).await;
    scene.end([viewer, other]).await;
}

/// A snapshot of the disk that was put back has the same name and the same timeline.
#[tokio::test]
async fn a_server_that_went_back_costs_everybody_the_complete_list() {
    let (database, proxy, config) = prepare().await;
    database.cluster.stop_immediate().await.unwrap();
    shell(&database.cluster, "cp -a data copy");
    database.cluster.restart().await.unwrap();
    let server = TestServer::start_with(config.clone());
    server.link_is_up().await;
    let scene = Scene { database, proxy, server, config };
    let [mut viewer, mut other] = scene.viewers().await;
    scene.database.cluster.stop_immediate().await.unwrap();
    shell(&scene.database.cluster, "rm -rf data && mv copy data");
    scene.database.cluster.restart().await.unwrap();
    is_caught_up(&mut viewer, TOPIC, "restored", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "restored", &OTHER_ALL).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[("restored", "complete", 2)]).await;
    scene.end([viewer, other]).await;
}

/// What it holds is as old as the dump, whatever the server has counted since.
#[tokio::test]
async fn a_database_that_was_dropped_and_made_anew_costs_everybody_the_complete_list() {
    let (database, proxy, config) = prepare().await;
    let name = database.shape.database();
    let Database { cluster, listener, .. } = database;
    // It would be in the way of the copy.
    drop(listener);
    let copy = format!("create database copy template {name}");
    let copied = async { while cluster.psql("postgres", &copy).await.is_err() {} };
    timeout(DEADLINE, copied).await.expect("nobody else is connected");
    let listener = PgListener::connect(&cluster.url("postgres")).await.unwrap();
    let database = Database { cluster, shape: Shape::Production, listener };
    let server = TestServer::start_with(config.clone());
    server.link_is_up().await;
    let mut scene = Scene { database, proxy, server, config };
    let [mut viewer, mut other] = scene.viewers().await;
    scene.lose(Loss::Terminated).await;
    for sql in [
        format!("drop database {name} with (force)"),
        format!("alter database copy rename to {name}"),
    ] {
        scene.database.cluster.psql("postgres", &sql).await.unwrap();
    }
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, "restored", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "restored", &OTHER_ALL).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[("restored", "complete", 2)]).await;
    scene.end([viewer, other]).await;
}

/// Some providers tell nobody the system's identifier; that costs a list per restart, and no more.
#[tokio::test]
async fn a_server_that_does_not_tell_its_name_is_another_one_after_a_restart() {
    let mut scene = Scene::start().await;
    scene.database.run("revoke execute on function pg_control_system() from public").await;
    let [mut viewer, mut other] = scene.viewers().await;
    // From the next session on it is known by the time of its start.
    scene.gap("").await;
    is_caught_up(&mut viewer, TOPIC, "restored", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "restored", &OTHER_ALL).await;
    scene.gap(&bid(ART, 2)).await;
    is_caught_up(&mut viewer, TOPIC, ENDED, &BID).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    scene.is_long_ago().await;
    scene.lose(Loss::HalfOpen).await;
    scene.database.cluster.restart().await.unwrap();
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, "restored", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "restored", &OTHER_ALL).await;
    scene.has_counted(&[(ENDED, "exact", 1), ("restored", "complete", 4)]).await;
    scene.end([viewer, other]).await;
}

/// Runs this in the cluster's directory.
fn shell(cluster: &Cluster, script: &str) {
    let data = cluster.data_dir();
    let dir = data.parent().unwrap();
    let output = Command::new("/bin/sh").args(["-ec", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Production clients give a join up after 2 s, for good; so it does not wait for the database.
#[tokio::test]
async fn who_joins_before_the_listen_is_active_is_answered_and_caught_up_when_it_is() {
    let mut scene = Scene::start_with(|config| {
        config.relay.listen_wait = Duration::from_millis(50);
    })
    .await;
    scene.proxy.hold_at("AB3028");
    let mut first = viewer(&scene.server, V2, TOPIC, &RESYNC).await;
    scene.proxy.has_held().await;
    let mut second = viewer(&scene.server, V1, OTHER_SPELLING, &RESYNC).await;
    scene.database.run(&bid(ART, 2)).await;
    scene.proxy.release();
    is_caught_up(&mut first, TOPIC, "late_listen", &ALL).await;
    is_caught_up(&mut second, OTHER_SPELLING, "late_listen", &ALL).await;
    scene.tells_nothing([(&mut first, TOPIC), (&mut second, OTHER_SPELLING)]).await;
    scene.has_counted(&[("late_listen", "complete", 1)]).await;
    scene.end([second]).await;
    first.close().await;
}

#[tokio::test]
async fn viewers_who_are_there_before_the_first_session_are_caught_up_when_it_begins() {
    let (database, mut proxy, mut config) = prepare().await;
    config.relay.listen_wait = Duration::from_millis(50);
    proxy.hold_at("pg_is_in_recovery");
    let server = TestServer::start_with(config.clone());
    let mut viewer = viewer(&server, V2, TOPIC, &RESYNC).await;
    let mut other = Client::connect(&server, V1).await;
    other.join_only(OTHER_TOPIC, json!({})).await;
    assert_eq!(told(&mut other).await.cause, "unknown");
    proxy.has_held().await;
    database.run(&bid(ART, 2)).await;
    let mut scene = Scene { database, proxy, server, config };
    scene.restore().await;
    is_caught_up(&mut viewer, TOPIC, "start", &ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, "start", &OTHER_ALL).await;
    scene.tells_nothing([(&mut viewer, TOPIC), (&mut other, OTHER_TOPIC)]).await;
    scene.has_counted(&[("start", "complete", 2)]).await;
    scene.end([viewer, other]).await;
}

/// Nobody knows what is committed between the answer to its join and the next LISTEN.
#[tokio::test]
async fn who_joins_while_the_link_is_away_is_answered_and_caught_up_when_it_is_back() {
    let mut scene = Scene::start_with(|config| {
        config.relay.listen_wait = Duration::from_millis(50);
    })
    .await;
    let mut other = {
        let mut other = Client::connect(&scene.server, V2).await;
        other.join_only(OTHER_TOPIC, json!({})).await;
        assert_eq!(told(&mut other).await.cause, "unknown");
        scene.server.metric_reaches("tidegate_relay_listens", 1.0).await;
        other
    };
    scene.database.run(&bid(OTHER_ART, 1)).await;
    // Its LISTEN may have been late.
    while told(&mut other).await.kind != "bid_placed" {}
    scene.is_long_ago().await;
    let late = catch_ups(&scene.server).await;
    scene.lose(Loss::Terminated).await;
    scene.server.metric_falls_to("tidegate_relay_link_up", 0.0).await;
    // To an event that was listened to, and to one that was not.
    let mut again = viewer(&scene.server, V1, OTHER_TOPIC, &OTHER_ALL).await;
    let mut first = viewer(&scene.server, V2, TOPIC, &RESYNC).await;
    scene.database.run(&bid(ART, 2)).await;
    scene.restore().await;
    is_caught_up(&mut first, TOPIC, ENDED, &ALL).await;
    is_caught_up(&mut again, OTHER_TOPIC, ENDED, &OTHER_ALL).await;
    is_caught_up(&mut other, OTHER_TOPIC, ENDED, &OTHER_ALL).await;
    scene
        .tells_nothing([(&mut first, TOPIC), (&mut again, OTHER_TOPIC), (&mut other, OTHER_TOPIC)])
        .await;
    let mut counted = late;
    counted.extend([by_labels(&(ENDED, "complete", 2))]);
    assert_eq!(catch_ups(&scene.server).await, counted);
    scene.end([other, again, first]).await;
}

/// Nobody was there to hear of what was committed meanwhile, so nobody knows it.
#[tokio::test]
async fn an_event_whose_last_viewer_has_left_is_forgotten_and_begins_anew() {
    let mut scene = Scene::start_with(|config| config.relay.linger = Duration::ZERO).await;
    let [mut viewer, mut other] = scene.viewers().await;
    let leave = json!([null, "9", format!("realtime:{TOPIC}"), "phx_leave", {}]);
    viewer.send(leave).await;
    scene.server.metric_falls_to("tidegate_relay_listens", 1.0).await;
    let art = "00000000-0000-4000-8000-0000000000a9";
    let insert = format!(
        "insert into art (id, event_id, round, easel)
        select '{art}', event_id, 7, 5 from art where id = '{ART}';"
    );
    scene.gap(&format!("{insert} {}", bid(art, 2))).await;
    scene.tells_nothing([(&mut other, OTHER_TOPIC)]).await;
    let mut all = ALL.to_vec();
    all.push("/live/event/AB3028-7-5/bids");
    let mut next = self::viewer(&scene.server, V2, TOPIC, &all).await;
    scene.tells_nothing([(&mut next, TOPIC)]).await;
    scene.has_counted(&[]).await;
    viewer.close().await;
    scene.end([next, other]).await;
}

const COUNT: &str = "select count(*) from tidegate.broadcast_history";

/// Rows of this many hours ago.
fn history(count: u32, hours: u32) -> String {
    format!(
        "insert into tidegate.broadcast_history (eid, endpoints, payload, at)
        select 'AB3028', '{{}}', '{{}}', now() - make_interval(hours => {hours})
        from generate_series(1, {count});"
    )
}

#[tokio::test]
async fn a_gateway_forgets_what_the_history_has_kept_long_enough() {
    let (database, _proxy, mut config) = prepare().await;
    config.history.keep = Duration::from_secs(5 * 3600);
    // More than one batch.
    let rows = format!("{} {}", history(2_500, 6), history(3, 4));
    database.run(&format!("truncate tidegate.broadcast_history; {rows}")).await;
    let server = TestServer::start_with(config);
    let forgotten = async { while database.run(COUNT).await != "3" {} };
    timeout(DEADLINE, forgotten).await.expect("the old rows are forgotten");
    server.stop().await;
}

/// Else all gateways of a database delete at the same moments.
#[tokio::test]
async fn while_one_gateway_forgets_another_does_not() {
    let (database, _proxy, mut config) = prepare().await;
    config.history.keep = Duration::from_secs(5 * 3600);
    database.run(&format!("truncate tidegate.broadcast_history; {}", history(10, 6))).await;
    // As the one that forgets.
    let mut session = database.connect().await;
    run(&mut session, "begin; select pg_advisory_xact_lock(x'7469646567617465'::bigint)").await;
    let server = TestServer::start_with(config.clone());
    // Its second sign of life comes after it would have forgotten.
    let alive = "select bool_or(seen_at > started_at) from tidegate.gateways";
    let lives = async { while database.run(alive).await != "t" {} };
    timeout(DEADLINE, lives).await.expect("a sign of life");
    assert_eq!(database.run(COUNT).await, "10");
    run(&mut session, "commit").await;
    let next = TestServer::start_with(config);
    let forgotten = async { while database.run(COUNT).await != "0" {} };
    timeout(DEADLINE, forgotten).await.expect("the next one forgets them");
    next.stop().await;
    server.stop().await;
}
