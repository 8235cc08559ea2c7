//! Who gets a LISTEN while there are not enough, and how whoever got none is healed.

use std::{net::SocketAddr, time::Duration};

use serde_json::{Value, json};
use tidegate::{
    access::Denied,
    db,
    protocol::serializer::Serializer::{V1, V2},
    secret::Secret,
    server::Config,
};
use tokio::{
    net::TcpSocket,
    time::{Instant, timeout},
};

use crate::support::{
    client::{Client, resync},
    postgres::Database,
    server::{DEADLINE, TestServer, config},
    token,
};

/// What is counted of viewers whose event is not listened to.
const UNHEARD: &str = "tidegate_relay_viewers_unheard";
const REFUSED: &str = "tidegate_relay_listens_refused_total";

/// A database with our schema and the one event `AB3028`, which has neither artworks nor history.
async fn database() -> Database {
    let mut database = Database::create().await;
    database
        .run(
            "create table public.events (id uuid default gen_random_uuid(), eid text);
            insert into public.events (eid) values ('AB3028')",
        )
        .await;
    db::migrate(&Secret::from(database.url())).await.unwrap();
    database
}

fn settings(database: &Database, max: usize, per_address_max: usize) -> Config {
    let mut config = config();
    config.database_url = Secret::from(database.url());
    config.relay.listens_max = max;
    config.relay.listens_per_address_max = per_address_max;
    config.relay.linger = Duration::ZERO;
    config.relay.listen_wait = Duration::from_millis(1500);
    // The database is asked which events it knows as often as a canary is sent.
    config.relay.canary_interval = Duration::from_millis(200);
    config
}

async fn start(config: Config) -> TestServer {
    let server = TestServer::start_with(config);
    server.link_is_up().await;
    server.metric_reaches("tidegate_relay_known_events", 1.0).await;
    server
}

/// A viewer on the loopback address 127.0.0.`last`.
async fn client_from(server: &TestServer, last: u8) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, last], 0))).unwrap();
    let stream = socket.connect(server.public).await.unwrap();
    Client::over(server, stream, V2, &token::of_role("anon")).await
}

fn of(family: &str, reason: &str) -> String {
    format!("{family}{{reason=\"{reason}\"}}")
}

async fn notify(database: &mut Database, eid: &str, endpoint: &str) {
    let payload = json!({ "type": "t", "endpoints": [endpoint] }).to_string();
    database.notify(&format!("cache_invalidate_{eid}"), &payload).await;
}

/// The endpoints of the next invalidation.
async fn told(viewer: &mut Client) -> (Value, Vec<String>) {
    let (_, envelope) = viewer.broadcast().await;
    let payload = &envelope["payload"];
    let endpoints = serde_json::from_value(payload["endpoints"].clone()).unwrap();
    (payload["cause"].clone(), endpoints)
}

/// The endpoints of the next invalidation that names this one.
async fn told_of(viewer: &mut Client, endpoint: &str) -> Vec<String> {
    let found = async {
        loop {
            let (_, endpoints) = told(viewer).await;
            if endpoints.iter().any(|named| named == endpoint) {
                return endpoints;
            }
        }
    };
    timeout(DEADLINE, found).await.unwrap_or_else(|_| panic!("nothing is told of {endpoint}"))
}

/// Whoever holds the key of every browser can join events that nobody has ever heard of.
#[tokio::test]
async fn a_flood_of_invented_events_keeps_no_event_out_that_the_database_knows() {
    let mut database = database().await;
    let server = start(settings(&database, 20, 20)).await;
    let mut flood = Client::connect(&server, V1).await;
    for number in 0..30 {
        flood.join(&format!("cache_invalidate_X{number}")).await;
    }
    assert_eq!(server.metric(&of(UNHEARD, "address")).await, 10.0);
    server.metric_reaches("tidegate_relay_listens", 20.0).await;

    let mut viewer = Client::connect(&server, V2).await;
    viewer.join("cache_invalidate_AB3028").await;
    viewer.join("auction_winner_AB3028").await;
    assert_eq!(server.metric(&of(REFUSED, "displaced")).await, 2.0);
    server.metric_reaches("tidegate_relay_listens", 20.0).await;
    notify(&mut database, "AB3028", "/first").await;
    assert!(told_of(&mut viewer, "/first").await.contains(&"/first".to_owned()));
    // It is merged, too: neither of these comes without the other.
    notify(&mut database, "AB3028", "/a").await;
    notify(&mut database, "AB3028", "/b").await;
    assert!(told_of(&mut viewer, "/a").await.contains(&"/b".to_owned()));
    database.notify("auction_winner_AB3028", "{}").await;
    let winner = async { while viewer.broadcast().await.0 != "realtime:auction_winner_AB3028" {} };
    timeout(DEADLINE, winner).await.expect("the winner is heard");

    flood.close().await;
    server.metric_falls_to("tidegate_relay_listens", 2.0).await;
    for reason in ["address", "full", "displaced"] {
        server.metric_falls_to(&of(UNHEARD, reason), 0.0).await;
    }
    viewer.close().await;
    server.stop().await;
}

#[tokio::test]
async fn one_address_takes_so_many_places_of_unknown_events_and_others_have_theirs() {
    let mut database = database().await;
    let server = start(settings(&database, 20, 3)).await;
    let mut flood = client_from(&server, 2).await;
    for number in 0..5 {
        flood.join(&format!("cache_invalidate_X{number}")).await;
    }
    assert_eq!(server.metric(&of(REFUSED, "address")).await, 2.0);
    assert_eq!(server.metric(&of(UNHEARD, "address")).await, 2.0);
    // Another socket of the address is no other address; and what is known costs no such place.
    let mut second = client_from(&server, 2).await;
    second.join("cache_invalidate_X5").await;
    assert_eq!(server.metric(&of(UNHEARD, "address")).await, 3.0);
    second.join("cache_invalidate_AB3028").await;
    let mut viewer = client_from(&server, 3).await;
    viewer.join("cache_invalidate_NEW1").await;
    assert_eq!(server.metric(&of(UNHEARD, "address")).await, 3.0);
    server.metric_reaches("tidegate_relay_listens", 5.0).await;
    notify(&mut database, "NEW1", "/new").await;
    told_of(&mut viewer, "/new").await;
    notify(&mut database, "AB3028", "/known").await;
    told_of(&mut second, "/known").await;
    for client in [flood, second, viewer] {
        client.close().await;
    }
    server.metric_falls_to("tidegate_relay_listens", 0.0).await;
    server.stop().await;
}

/// The viewer was answered `ok`; what changed while there was no place must be told.
#[tokio::test]
async fn beyond_listens_max_an_event_is_joined_counted_and_caught_up_when_a_place_is_free() {
    let mut database = database().await;
    let server = start(settings(&database, 1, 9)).await;
    let mut first = Client::connect(&server, V1).await;
    let joined = first.join("cache_invalidate_AB1").await;
    let mut viewers = [Client::connect(&server, V2).await, Client::connect(&server, V1).await];
    for (viewer, topic) in viewers.iter_mut().zip(["cache_invalidate_AB2", "cache_invalidate:AB2"])
    {
        viewer.join(topic).await;
    }
    assert_eq!(server.metric(&of(REFUSED, "full")).await, 2.0);
    assert_eq!(server.metric(&of(UNHEARD, "full")).await, 2.0);
    notify(&mut database, "AB2", "/missed").await;
    notify(&mut database, "AB1", "/heard").await;
    told_of(&mut first, "/heard").await;
    for viewer in &mut viewers {
        viewer.expect_nothing().await;
    }

    // The place is given back by a leave; its socket goes on.
    first.send(json!([joined, "7", "realtime:cache_invalidate_AB1", "phx_leave", {}])).await;
    for viewer in &mut viewers {
        let (cause, endpoints) = told(viewer).await;
        assert_eq!((cause, &endpoints[..]), (json!("late_listen"), &resync("AB2")[..]));
    }
    server.metric_falls_to(&of(UNHEARD, "full"), 0.0).await;
    assert_eq!(server.metric("tidegate_relay_listens").await, 1.0);
    // It is merged from here on: neither of these comes without the other.
    notify(&mut database, "AB2", "/a").await;
    notify(&mut database, "AB2", "/b").await;
    for viewer in &mut viewers {
        assert!(told_of(viewer, "/a").await.contains(&"/b".to_owned()));
    }
    first.close().await;
    for viewer in viewers {
        viewer.close().await;
    }
    server.metric_falls_to("tidegate_relay_listens", 0.0).await;
    server.stop().await;
}

/// An event that is announced while its viewers wait.
#[tokio::test]
async fn an_event_that_comes_to_be_known_takes_a_place_and_its_viewers_are_caught_up() {
    let mut database = database().await;
    let server = start(settings(&database, 1, 9)).await;
    let mut flood = Client::connect(&server, V1).await;
    flood.join("cache_invalidate_X1").await;
    let mut viewer = Client::connect(&server, V2).await;
    viewer.join("cache_invalidate_AB3029").await;
    assert_eq!(server.metric(&of(UNHEARD, "full")).await, 1.0);
    // Only the history knows this one.
    database
        .run(
            "insert into tidegate.broadcast_history (eid, endpoints, payload)
            values ('AB3029', '{/live/event/AB3029-1-1/bids}', '{}')",
        )
        .await;
    let (cause, endpoints) = told(&mut viewer).await;
    assert_eq!(cause, "late_listen");
    assert!(endpoints.contains(&"/live/event/AB3029-1-1/bids".to_owned()), "{endpoints:?}");
    assert_eq!(server.metric(&of(REFUSED, "displaced")).await, 1.0);
    assert_eq!(server.metric(&of(UNHEARD, "displaced")).await, 1.0);
    notify(&mut database, "AB3029", "/a").await;
    told_of(&mut viewer, "/a").await;
    viewer.close().await;
    flood.close().await;
    server.metric_falls_to(&of(UNHEARD, "displaced"), 0.0).await;
    server.stop().await;
}

/// A place that is given away to a known event comes back when that goes.
#[tokio::test]
async fn a_viewer_whose_place_was_taken_is_healed_when_it_is_free_again() {
    let mut database = database().await;
    let server = start(settings(&database, 1, 9)).await;
    let mut displaced = Client::connect(&server, V2).await;
    displaced.join("cache_invalidate_AB1").await;
    let mut known = Client::connect(&server, V1).await;
    known.join("cache_invalidate_AB3028").await;
    assert_eq!(server.metric(&of(UNHEARD, "displaced")).await, 1.0);
    notify(&mut database, "AB1", "/missed").await;
    known.close().await;
    let since = Instant::now();
    // It looks every few seconds, and need not send anything.
    let healed = async {
        loop {
            if let Ok((cause, _)) = timeout(DEADLINE, told(&mut displaced)).await {
                return cause;
            }
        }
    };
    let cause = timeout(4 * DEADLINE, healed).await;
    assert_eq!(cause, Ok(json!("late_listen")), "after {:?}", since.elapsed());
    assert_eq!(server.metric(&of(UNHEARD, "displaced")).await, 0.0);
    displaced.close().await;
    server.stop().await;
}

/// A viewer who may not read any more holds nothing either, and its socket goes on.
#[tokio::test]
async fn a_place_is_given_back_by_a_token_that_may_not_read() {
    let mut database = database().await;
    let mut config = settings(&database, 1, 9);
    let rule = &mut config.topic[0];
    rule.denied = Denied::Withhold;
    rule.read[0].role = Some(vec!["authenticated".into()]);
    let server = start(config).await;
    let [may_read, may_not] = ["authenticated", "anon"].map(token::of_role);
    let mut first = Client::with_token(&server, V2, &may_read).await;
    let joined = first.join("cache_invalidate_AB1").await;
    let mut viewer = Client::with_token(&server, V2, &may_read).await;
    viewer.join("cache_invalidate_AB2").await;
    assert_eq!(server.metric(&of(UNHEARD, "full")).await, 1.0);
    let topic = "realtime:cache_invalidate_AB1";
    let other = json!({ "access_token": may_not });
    first.send(json!([joined, "7", topic, "access_token", other])).await;
    assert_eq!(told(&mut viewer).await.0, "late_listen");
    notify(&mut database, "AB2", "/a").await;
    told_of(&mut viewer, "/a").await;
    first.expect_nothing().await;
    first.close().await;
    viewer.close().await;
    server.stop().await;
}
