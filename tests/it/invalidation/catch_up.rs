//! Catch-up on join: what a client gets right after the reply, by what is known of it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tidegate::{
    access::Denied,
    protocol::serializer::Serializer::{V1, V2},
    recovery::ClientKey,
    secret::Secret,
    server::{Config, Gateway},
};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{Instant, advance, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{
        Message as Frame,
        client::IntoClientRequest,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use crate::support::{
    client::{self, Client},
    page::{LOOK, Page, QUIET, TOPIC, World, browser, endpoints, jump, patient},
    postgres::Database,
    proxy::Proxy,
    server::{DEADLINE, TestServer, config},
    token,
};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// What belongs to any event.
const RESYNC: [&str; 3] =
    ["/live/event/AB3028", "/live/event/AB3028/media", "/live/event/AB3028/artists"];

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A catch-up's cause and endpoints.
fn told(cause: &str, endpoints: &[&str]) -> (String, Vec<String>) {
    (cause.to_owned(), endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect())
}

/// The complete list of the world's event, of which these have been seen, in their order.
fn everything(cause: &str, seen: &[&str]) -> (String, Vec<String>) {
    told(cause, &[&RESYNC, seen].concat())
}

/// Catch-ups so far, by cause and method.
async fn count(server: &TestServer, cause: &str, method: &str) -> f64 {
    let series = format!("tidegate_catch_ups_total{{cause=\"{cause}\",method=\"{method}\"}}");
    server.metric(&series).await
}

/// A page is fetched before it joins, and may be answered by a cache.
#[tokio::test]
async fn a_page_that_was_just_loaded_gets_what_has_changed_within_thirty_seconds() {
    let mut world = World::start().await;
    world.change("/old").await;
    jump(seconds(25)).await;
    world.change("/b").await;
    world.change("/a").await;
    let topic = format!("realtime:{TOPIC}");
    let token = token::of_role("authenticated");
    for (number, (reference, payload)) in (1..).zip([
        ("1", json!({ "config": {} })),
        ("1", json!({ "config": {}, "access_token": token })),
        // The newest clients begin at 6.
        ("6", json!({ "config": {} })),
        ("6", json!({ "config": {}, "access_token": null })),
    ]) {
        let mut page = Page::open(&world.server.gateway, browser(number));
        page.send(json!([reference, reference, topic, "phx_join", payload])).await;
        page.expect_ok(reference, TOPIC).await;
        assert_eq!(page.caught_up().await, told("fresh", &["/b", "/a"]), "{payload}");
        page.expect_nothing().await;
    }
    assert_eq!(count(&world.server, "fresh", "exact").await, 4.0);
    let sent = "tidegate_invalidations_sent_total{reason=\"catch_up\"}";
    assert_eq!(world.server.metric(sent).await, 5.0, "the watcher's, too");
    world.stop().await;
}

/// A page of the newest clients that has been away knows its token when it comes back; any other
/// ref, however low, may be that of a page that was frozen.
#[tokio::test]
async fn a_client_of_which_nothing_is_known_gets_everything() {
    let mut world = World::start().await;
    world.change("/b").await;
    world.change("/a").await;
    let topic = format!("realtime:{TOPIC}");
    let token = token::of_role("anon");
    let mut number = 0;
    for reference in ["6", "2", "5", "7", "16", "17", "999999999999999999999", "one", "-1"] {
        let mut payload = json!({ "config": {} });
        if reference == "6" {
            payload["access_token"] = json!(token);
        }
        number += 1;
        let mut page = Page::open(&world.server.gateway, browser(number));
        page.send(json!([reference, reference, topic, "phx_join", payload])).await;
        page.expect_ok(reference, TOPIC).await;
        assert_eq!(page.caught_up().await, everything("unknown", &["/a", "/b"]), "{reference}");
        page.expect_nothing().await;
    }
    // A page that was just loaded begins with a join.
    for first in [
        json!([null, "1", "phoenix", "heartbeat", {}]),
        json!([null, "1", topic, "access_token", { "access_token": token }]),
        json!([null, "1", topic, "phx_leave", {}]),
    ] {
        number += 1;
        let mut page = Page::open(&world.server.gateway, browser(number));
        page.send(first).await;
        assert_eq!(page.message().await[3], "phx_reply");
        page.join("1", TOPIC).await;
        assert_eq!(page.caught_up().await, everything("unknown", &["/a", "/b"]));
    }
    // The watcher was the first of all.
    assert_eq!(count(&world.server, "unknown", "complete").await, f64::from(number));
    assert_eq!(count(&world.server, "fresh", "complete").await, 1.0);
    world.stop().await;
}

#[tokio::test]
async fn a_page_that_was_just_loaded_is_fresh_for_each_topic_that_it_joins() {
    let mut world = World::start().await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", "room").await;
    world.change("/a").await;
    jump(seconds(60)).await;
    world.change("/b").await;
    page.join("9", TOPIC).await;
    assert_eq!(page.caught_up().await, told("fresh", &["/b"]));
    // The other spelling is the same event.
    let colon = "cache_invalidate:AB3028";
    page.join("10", colon).await;
    let (topic, payload) = page.told().await;
    assert_eq!((&*topic, endpoints(&payload)), (colon, vec!["/b".to_owned()]));
    drop(page);
    world.stop().await;
}

#[tokio::test]
async fn who_has_held_the_topic_on_the_same_socket_gets_what_has_changed_within_thirty_seconds() {
    let mut world = World::start().await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("20", TOPIC).await;
    assert_eq!(page.caught_up().await, everything("unknown", &[]));
    jump(QUIET).await;
    world.change("/old").await;
    assert_eq!(endpoints(&page.told().await.1), ["/old"]);
    jump(seconds(60)).await;
    world.change("/a").await;
    assert_eq!(endpoints(&page.told().await.1), ["/a"]);
    // A join in the place of the one before, and one after a leave.
    page.join("21", TOPIC).await;
    assert_eq!(page.caught_up().await, told("held", &["/a"]));
    assert_eq!(page.message().await[3], "phx_close");
    page.leave("21", TOPIC).await;
    page.join("22", TOPIC).await;
    assert_eq!(page.caught_up().await, told("held", &["/a"]));
    jump(seconds(60)).await;
    page.join("23", TOPIC).await;
    assert_eq!(page.message().await[3], "phx_close");
    page.expect_nothing().await;
    assert_eq!(count(&world.server, "held", "exact").await, 2.0);
    drop(page);
    world.stop().await;
}

/// Its channel ended when its token was refused, which may be long before the next is taken.
#[tokio::test]
async fn who_was_refused_in_between_has_not_held_the_topic() {
    let mut world = World::start().await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", TOPIC).await;
    let bad = json!({ "config": {}, "access_token": "garbage" });
    page.send(json!(["2", "2", format!("realtime:{TOPIC}"), "phx_join", bad])).await;
    assert_eq!(page.message().await[4]["status"], "error");
    assert_eq!(page.message().await[3], "phx_close");
    world.change("/missed").await;
    jump(seconds(60)).await;
    page.join("3", TOPIC).await;
    let (_, endpoints) = page.caught_up().await;
    assert!(endpoints.contains(&"/missed".to_owned()), "{endpoints:?}");
    drop(page);
    world.stop().await;
}

/// A client that comes back, and what it is told: its join is none of a page just loaded.
async fn returned(gateway: &Arc<Gateway>, client: ClientKey) -> (String, Vec<String>) {
    let mut page = Page::open(gateway, client);
    page.join("30", TOPIC).await;
    let told = page.caught_up().await;
    page.expect_nothing().await;
    page.leave("30", TOPIC).await;
    told
}

#[tokio::test]
async fn a_client_that_comes_back_gets_what_has_changed_since_a_minute_before_it_was_last_heard() {
    let mut world = World::start().await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", TOPIC).await;
    world.change("/before").await;
    jump(seconds(100)).await;
    world.change("/slack").await;
    jump(seconds(40)).await;
    assert_eq!(endpoints(&page.told().await.1), ["/before"]);
    assert_eq!(endpoints(&page.told().await.1), ["/slack"]);
    // Its last sign of life; what it was sent after that may not have arrived.
    page.expect_nothing().await;
    jump(seconds(20)).await;
    world.change("/unseen").await;
    assert_eq!(endpoints(&page.told().await.1), ["/unseen"]);
    jump(seconds(60)).await;
    drop(page);
    world.change("/away").await;
    jump(seconds(3600)).await;
    world.change("/late").await;
    let told_since = told("returned", &["/slack", "/unseen", "/away", "/late"]);
    assert_eq!(returned(&world.server.gateway, browser(1)).await, told_since);
    // Others are not it: of another address, another browser, another topic.
    let all = everything("unknown", &["/away", "/before", "/late", "/slack", "/unseen"]);
    let other_browser = ClientKey::new(IpAddr::from([10, 0, 0, 1]).into(), "Mozilla/6.0");
    for other in [browser(2), other_browser] {
        assert_eq!(returned(&world.server.gateway, other).await, all);
    }
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("31", "cache_invalidate:AB3028").await;
    assert_eq!(page.caught_up().await, all);
    drop(page);
    assert_eq!(count(&world.server, "returned", "exact").await, 1.0);
    world.stop().await;
}

/// Another client of the same address and browser may have a socket that is dead and not found out
/// yet, for as long as a socket may be silent.
#[tokio::test]
async fn of_who_was_heard_a_moment_ago_it_is_not_certain_for_how_long_it_was_not() {
    let mut world = World::start().await;
    world.change("/long ago").await;
    jump(seconds(90)).await;
    let mut dead = Page::open(&world.server.gateway, browser(1));
    dead.join("1", TOPIC).await;
    // This one and what follows never arrive.
    world.change("/missed").await;
    jump(seconds(70)).await;
    let mut other = Page::open(&world.server.gateway, browser(1));
    other.join("1", TOPIC).await;
    drop(other);
    assert_eq!(returned(&world.server.gateway, browser(1)).await, told("returned", &["/missed"]));
    drop(dead);
    world.stop().await;
}

#[tokio::test]
async fn of_several_clients_of_one_address_and_browser_the_longest_absence_counts() {
    let mut world = World::start().await;
    let mut pages = Vec::new();
    for endpoint in ["/1", "/2", "/3"] {
        jump(seconds(300)).await;
        let mut page = Page::open(&world.server.gateway, browser(1));
        page.join("1", TOPIC).await;
        pages.push(page);
        world.change(endpoint).await;
    }
    // Whichever ends last.
    for place in [1, 0, 0] {
        drop(pages.remove(place));
        jump(seconds(10)).await;
    }
    let expected = told("returned", &["/1", "/2", "/3"]);
    assert_eq!(returned(&world.server.gateway, browser(1)).await, expected);
    // Who has been caught up may have been another.
    assert_eq!(returned(&world.server.gateway, browser(1)).await, expected);
    world.stop().await;
}

#[tokio::test]
async fn a_leave_leaves_no_record_and_no_other_end_is_one() {
    let mut world = World::start().await;
    let colon = "cache_invalidate:AB3028";
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", TOPIC).await;
    page.join("2", colon).await;
    world.change("/a").await;
    for _ in 0..2 {
        page.told().await;
    }
    page.leave("2", colon).await;
    drop(page);
    jump(seconds(300)).await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("30", colon).await;
    assert_eq!(page.caught_up().await, everything("unknown", &["/a"]));
    page.join("31", TOPIC).await;
    assert_eq!(page.caught_up().await, told("returned", &["/a"]));
    page.leave("31", TOPIC).await;
    drop(page);
    // It has left this time; somebody else of its kind has not.
    assert_eq!(returned(&world.server.gateway, browser(1)).await, told("returned", &["/a"]));
    world.stop().await;
}

#[tokio::test]
async fn a_record_is_believed_for_a_day() {
    let mut world = World::start().await;
    let lose = async |world: &mut World, address: u8| {
        let mut page = Page::open(&world.server.gateway, browser(address));
        page.join("1", TOPIC).await;
        drop(page);
        jump(seconds(100)).await;
        world.change("/a").await;
    };
    lose(&mut world, 1).await;
    jump(DAY - seconds(200)).await;
    assert_eq!(returned(&world.server.gateway, browser(1)).await, told("returned", &["/a"]));
    lose(&mut world, 2).await;
    jump(DAY - seconds(100)).await;
    assert_eq!(returned(&world.server.gateway, browser(2)).await, everything("unknown", &["/a"]));
    world.stop().await;
}

/// A merged rule that withholds from whoever has not proved who he is.
fn withholding(config: &mut Config) {
    let rule = &mut config.topic[0];
    assert_eq!(&*rule.name, "cache");
    rule.denied = Denied::Withhold;
    rule.read[0].role = Some(vec!["authenticated".into()]);
}

#[tokio::test]
async fn who_may_read_only_later_gets_everything_then() {
    let mut world = World::start_with_token(withholding, "authenticated").await;
    let topic = format!("realtime:{TOPIC}");
    let token = token::of_role("authenticated");
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", TOPIC).await;
    page.expect_nothing().await;
    world.change("/a").await;
    jump(seconds(60)).await;
    page.send(json!(["1", "2", topic, "access_token", { "access_token": token }])).await;
    assert_eq!(page.caught_up().await, everything("unknown", &["/a"]));
    // Another one changes nothing for a reader.
    let another = token::with_claims(json!({ "role": "authenticated", "sub": "x" }));
    page.send(json!(["1", "3", topic, "access_token", { "access_token": another }])).await;
    page.expect_nothing().await;
    drop(page);
    world.stop().await;
}

/// Clients from 2.15 on send their token with the next join, and not before.
#[tokio::test]
async fn who_was_withheld_until_it_joins_again_gets_everything() {
    let mut world = World::start_with_token(withholding, "authenticated").await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", TOPIC).await;
    world.change("/a").await;
    jump(seconds(60)).await;
    let payload = json!({ "config": {}, "access_token": token::of_role("authenticated") });
    page.send(json!(["2", "2", format!("realtime:{TOPIC}"), "phx_join", payload])).await;
    page.expect_ok("2", TOPIC).await;
    assert_eq!(page.caught_up().await, everything("unknown", &["/a"]));
    drop(page);
    world.stop().await;
}

/// A page that lives for days has left more topics than are remembered of it.
#[tokio::test]
async fn a_socket_that_has_left_a_thousand_topics_leaves_a_record_of_what_it_holds() {
    // Nobody listens to what it leaves, which is quicker.
    let mut world = World::start_with(|config| config.relay.listens_max = 1).await;
    let gateway = Arc::clone(&world.server.gateway);
    let mut page = Page::open(&gateway, browser(1));
    for number in 0..1_001 {
        let (reference, topic) = (number.to_string(), format!("auction_winner_{number}"));
        page.join(&reference, &topic).await;
        page.leave(&reference, &topic).await;
    }
    page.join("1002", TOPIC).await;
    drop(page);
    world.change("/missed").await;
    jump(seconds(300)).await;
    // One of its kind was heard of later.
    let mut page = Page::open(&gateway, browser(1));
    page.join("1", TOPIC).await;
    drop(page);
    assert_eq!(returned(&gateway, browser(1)).await, told("returned", &["/missed"]));
    world.stop().await;
}

/// Inserts a gateway that was last seen so long ago.
async fn insert_gateway(world: &mut World, ago: &str, ended: &str) {
    let insert = format!(
        "insert into tidegate.gateways (id, seen_at, ended_at) values
        (gen_random_uuid(), now() - interval '{ago}', {ended})"
    );
    world.database.run(&insert).await;
    world.look().await;
}

/// Another gateway may have lost the client, or one like it, without telling.
#[tokio::test]
async fn beside_another_gateway_or_within_a_day_of_one_that_crashed_no_record_is_believed() {
    let mut world = World::start().await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", TOPIC).await;
    drop(page);
    world.change("/a").await;
    let gateway = Arc::clone(&world.server.gateway);
    let believed = told("returned", &["/a"]);
    let unknown = everything("unknown", &["/a"]);
    assert_eq!(returned(&gateway, browser(1)).await, believed);
    for (ago, ended, is_believed) in [
        ("0s", "null", false),
        ("23h 59m", "null", false),
        ("24h 1m", "null", true),
        ("0s", "now()", true),
    ] {
        insert_gateway(&mut world, ago, ended).await;
        let expected = if is_believed { &believed } else { &unknown };
        assert_eq!(&returned(&gateway, browser(1)).await, expected, "{ago} {ended}");
        world.database.run("delete from tidegate.gateways where seen_at < now() - interval '5s' or ended_at is null").await;
        world.look().await;
        assert_eq!(returned(&gateway, browser(1)).await, believed);
    }
    // Nor while the database does not say who lives.
    let hide = "alter table tidegate.gateways rename column ended_at to hidden";
    world.database.run(hide).await;
    world.look().await;
    assert_eq!(returned(&gateway, browser(1)).await, unknown);
    world.stop().await;
}

/// The first viewer of an event is told everything, and for a while everybody else.
#[tokio::test]
async fn where_the_event_has_not_been_heard_for_long_enough_everybody_gets_everything() {
    let mut world = World::start_with(|config| config.relay.linger = seconds(300)).await;
    let gateway = Arc::clone(&world.server.gateway);
    let mut held = Page::open(&gateway, browser(1));
    held.join("1", TOPIC).await;
    held.leave("1", TOPIC).await;
    let mut gone = Page::open(&gateway, browser(2));
    gone.join("1", TOPIC).await;
    drop(gone);
    world.change("/a").await;
    assert_eq!(returned(&gateway, browser(2)).await, told("returned", &["/a"]));
    // Nobody is there: what happens then is not heard.
    world.watcher.leave("1", TOPIC).await;
    jump(seconds(301)).await;
    world.server.metric_falls_to("tidegate_relay_listens", 0.0).await;
    let payload = json!({ "endpoints": ["/unheard"] });
    world.database.notify(TOPIC, &payload.to_string()).await;

    let fresh = async || {
        let mut page = Page::open(&gateway, browser(3));
        page.join("1", TOPIC).await;
        page
    };
    assert_eq!(fresh().await.caught_up().await, everything("fresh", &["/a"]));
    held.join("2", TOPIC).await;
    assert_eq!(held.caught_up().await, everything("held", &["/a"]));
    assert_eq!(returned(&gateway, browser(2)).await, everything("returned", &["/a"]));
    jump(seconds(29)).await;
    assert_eq!(fresh().await.caught_up().await, everything("fresh", &["/a"]));
    jump(seconds(2)).await;
    fresh().await.expect_nothing().await;
    assert_eq!(returned(&gateway, browser(2)).await, everything("returned", &["/a"]));
    drop(held);
    world.stop().await;
}

/// It has lost the topic before it had it; how long it had been away before, nobody knows.
#[tokio::test]
async fn who_goes_while_its_join_waits_has_lost_the_topic_as_well() {
    let database = Database::create().await;
    let mut proxy = Proxy::start("127.0.0.1", database.port()).await;
    let through_proxy = database.url_at(proxy.address);
    let change = |config: &mut Config| config.notify_database_url = Secret::from(&*through_proxy);
    let world = World::start_on(database, change, "anon").await;
    let topic = "cache_invalidate_AB77";
    proxy.hold_at("cache_invalidate_AB77");
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.ask("1", topic).await;
    proxy.has_held().await;
    drop(page);
    proxy.release();
    let mut deaf = Page::open(&world.server.gateway, browser(1));
    jump(seconds(3)).await;
    // What its address has lost is told first.
    for topic in [topic, TOPIC] {
        let expected = json!([null, null, format!("realtime:{topic}"), "phx_error", {}]);
        assert_eq!(deaf.message().await, expected);
    }
    deaf.join("30", topic).await;
    assert_eq!(deaf.caught_up().await.0, "unknown");
    drop(deaf);
    world.stop().await;
}

/// A socket of this address of the loopback network and this `User-Agent`, which speaks V1.
struct Wire(WebSocketStream<TcpStream>);

impl Wire {
    async fn open(server: &TestServer, address: [u8; 4], agent: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((address, 0))).unwrap();
        let stream = socket.connect(server.public).await.unwrap();
        let token = token::of_role("anon");
        let url = format!("ws://{}/realtime/v1/websocket?apikey={token}", server.public);
        let mut request = url.into_client_request().unwrap();
        request.headers_mut().insert("user-agent", agent.parse().unwrap());
        Self(client_async(request, stream).await.unwrap().0)
    }

    /// Joins the world's event with this ref.
    async fn join(&mut self, reference: &str) {
        let topic = format!("realtime:{TOPIC}");
        let join = json!([reference, reference, topic, "phx_join", { "config": {} }]);
        self.0.send(Frame::text(client::encode(V1, &join))).await.unwrap();
        assert_eq!(self.message().await[4]["status"], "ok");
    }

    async fn message(&mut self) -> Value {
        let frame = timeout(DEADLINE, self.0.next()).await.expect("a frame in time");
        client::decode(V1, frame.unwrap().unwrap().to_text().unwrap())
    }

    async fn caught_up(&mut self) -> (String, Vec<String>) {
        let payload = &self.message().await[4]["payload"];
        (payload["cause"].as_str().unwrap().to_owned(), endpoints(payload))
    }

    /// Closes with this code, or finds itself closed; gives the server's code.
    async fn close(mut self, code: Option<u16>) -> Option<u16> {
        if let Some(code) = code {
            let frame = CloseFrame { code: CloseCode::from(code), reason: "".into() };
            self.0.close(Some(frame)).await.unwrap();
        }
        loop {
            match timeout(DEADLINE, self.0.next()).await.expect("an end in time") {
                Some(Ok(Frame::Close(frame))) => return frame.map(|close| close.code.into()),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return None,
            }
        }
    }
}

const SAFARI: &str = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) Safari/604.1";

/// No end but a leave proves that the page is gone: one in the back-forward cache closes with 1001
/// when it comes back, a frozen one answers pings until it is closed as silent.
#[tokio::test]
async fn a_page_that_was_frozen_is_told_on_its_return_what_it_has_missed() {
    for code in [Some(1001), Some(1000), None] {
        let mut world = World::start().await;
        let here = [127, 0, 0, 2];
        let mut page = Wire::open(&world.server, here, SAFARI).await;
        page.join("1").await;
        jump(seconds(70)).await;
        world.change("/frozen").await;
        if code.is_none() {
            jump(seconds(20)).await;
        }
        // The server's answer, or its own word.
        assert_eq!(page.close(code).await, Some(code.unwrap_or(1000)));
        world.server.metric_falls_to("tidegate_connections", 0.0).await;
        jump(seconds(3600)).await;
        world.change("/away").await;
        jump(seconds(200)).await;

        let expected = told("returned", &["/frozen", "/away"]);
        let unknown = everything("unknown", &["/away", "/frozen"]);
        for (address, agent, expected) in [
            (here, SAFARI, &expected),
            (here, "Mozilla/5.0 (iPhone) Firefox", &unknown),
            ([127, 0, 0, 3], SAFARI, &unknown),
        ] {
            let mut page = Wire::open(&world.server, address, agent).await;
            page.join("9").await;
            assert_eq!(&page.caught_up().await, expected, "{code:?} {agent}");
            page.close(Some(1000)).await;
        }
        world.stop().await;
    }
}

/// What the world's database clock has not noticed of a jump.
async fn age_records(database: &mut Database, by: Duration) {
    let sql = format!(
        "update tidegate.lost_sockets
        set last_data_at = last_data_at - interval '{} seconds'",
        by.as_secs()
    );
    database.run(&sql).await;
}

/// Clients that a load balancer sends to another gateway.
#[tokio::test]
async fn what_an_orderly_drain_leaves_is_believed_by_the_gateway_that_goes_on() {
    let mut world = World::start().await;
    let other = TestServer::start_with(patient(&world.database));
    other.link_is_up().await;
    world.change("/before").await;
    jump(seconds(100)).await;
    let mut page = Page::open(&other.gateway, browser(1));
    page.join("1", TOPIC).await;
    page.caught_up().await;
    page.join("2", "auction_winner_AB3028").await;
    page.join("3", "room").await;
    jump(seconds(30)).await;
    world.change("/away").await;
    let mut left = Page::open(&other.gateway, browser(2));
    left.join("1", TOPIC).await;
    left.caught_up().await;
    left.leave("1", TOPIC).await;
    // Two gateways: each may have lost clients of the other.
    world.look().await;
    assert_eq!(returned(&world.server.gateway, browser(1)).await.0, "unknown");
    drop((page, left));
    other.stop().await;

    let topics = "select string_agg(topic, ' ' order by topic) from tidegate.lost_sockets";
    let left = world.database.value::<String>(topics).await;
    assert_eq!(left, format!("auction_winner_AB3028 {TOPIC}"));
    let gateways = "select string_agg((ended_at is not null)::text, ' ' order by seen_at)
        from tidegate.gateways";
    assert_eq!(world.database.value::<String>(gateways).await, "false true");
    age_records(&mut world.database, LOOK).await;
    // The first may be seen by the end of a look that had begun while the other was there.
    world.look().await;
    world.look().await;
    let expected = told("returned", &["/away"]);
    assert_eq!(returned(&world.server.gateway, browser(1)).await, expected);
    assert_eq!(returned(&world.server.gateway, browser(2)).await.0, "unknown");
    world.stop().await;
}

/// It has heard nothing of the event yet, so it tells everything; but it knows who comes back.
#[tokio::test]
async fn the_next_process_knows_whom_the_last_one_has_lost() {
    let mut world = World::start().await;
    world.change("/a").await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", TOPIC).await;
    page.caught_up().await;
    let World { server, mut database, watcher } = world;
    drop((watcher, page));
    server.stop().await;
    let server = World::restart(&mut database).await;
    assert_eq!(returned(&server.gateway, browser(1)).await, everything("returned", &[]));
    assert_eq!(returned(&server.gateway, browser(2)).await, everything("unknown", &[]));
    server.stop().await;
}

/// Who holds the drain up is as good as lost, and nobody has heard of it.
#[tokio::test]
async fn a_drain_that_leaves_sockets_behind_is_no_orderly_end() {
    let mut world = World::start().await;
    let mut config = patient(&world.database);
    config.drain.timeout = Duration::from_millis(300);
    config.limits.outbox_bytes_max = 1 << 24;
    let mut other = TestServer::start_with(config);
    other.link_is_up().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(other.public).await.unwrap();
    let mut deaf = Client::over(&other, stream, V2, &token::of_role("anon")).await;
    deaf.join("room").await;
    deaf.join(TOPIC).await;
    // More than the system's buffers take: the write waits.
    for _ in 0..8 {
        other.publish("room", &json!({ "x": "x".repeat(1_000_000) })).await;
    }
    let _ = TestServer::request(other.admin, "POST /drain HTTP/1.1", "").await;
    other.ended().await;
    let is_told = "select exists (select from tidegate.gateways where ended_at is not null)
        <= exists (select from tidegate.lost_sockets)";
    assert!(world.database.value::<bool>(is_told).await, "ended without leaving its records");
    drop(deaf);
    world.stop().await;
}

/// The others' records are read again only for a while; who could not read them for longer must
/// begin anew.
#[tokio::test]
async fn records_that_were_left_while_the_database_could_not_be_asked_are_read_afterwards() {
    let database = Database::create().await;
    let (superuser, port) = (database.url().to_owned(), database.port());
    let limited = format!("postgres://tidegate@127.0.0.1:{port}/{}", database.name());
    let change = |config: &mut Config| {
        config.notify_database_url = Secret::from(&*superuser);
        config.database_url = Secret::from(&*limited);
    };
    let mut world = World::start_on(database, change, "anon").await;
    let other = TestServer::start_with(patient(&world.database));
    other.link_is_up().await;
    let mut page = Page::open(&other.gateway, browser(1));
    page.join("1", TOPIC).await;
    page.caught_up().await;
    world.change("/missed").await;
    jump(seconds(300)).await;
    // One of its kind is here.
    let mut twin = Page::open(&world.server.gateway, browser(1));
    twin.join("1", TOPIC).await;
    drop(twin);
    world.database.run("revoke insert, update on tidegate.gateways from tidegate").await;
    world.look().await;
    drop(page);
    other.stop().await;
    world.database.run("update tidegate.lost_sockets set at = at - interval '3 minutes'").await;
    age_records(&mut world.database, LOOK * 2).await;
    world.look().await;
    assert_eq!(returned(&world.server.gateway, browser(1)).await.0, "unknown");
    world.database.run("grant insert, update on tidegate.gateways to tidegate").await;
    world.look().await;
    let (cause, endpoints) = returned(&world.server.gateway, browser(1)).await;
    assert_eq!(cause, "returned");
    assert!(endpoints.contains(&"/missed".to_owned()), "{endpoints:?}");
    world.stop().await;
}

/// Tells the event of a change over HTTP, as the database does.
async fn publish(server: &TestServer, topic: &str, payload: &Value) {
    let token = token::of_role("service_role");
    let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {token}");
    let message = json!({ "topic": topic, "event": "cache_invalidation", "payload": payload });
    let body = json!({ "messages": [message] }).to_string();
    assert_eq!(TestServer::request(server.public, &head, &body).await.0, 202);
}

#[tokio::test]
async fn a_catch_up_is_a_broadcast_of_the_topic_as_the_client_spells_it() {
    let server = TestServer::start();
    publish(&server, TOPIC, &json!({ "endpoints": ["/a"] })).await;
    let sent = "tidegate_invalidations_sent_total{reason=\"leading\"}";
    server.metric_reaches(sent, 1.0).await;
    jump(seconds(40)).await;
    publish(&server, TOPIC, &json!({ "endpoints": ["/b"] })).await;
    for serializer in [V1, V2] {
        for topic in [TOPIC, "cache_invalidate:AB3028"] {
            let mut client = Client::connect(&server, serializer).await;
            let topic = format!("realtime:{topic}");
            client.send(json!(["1", "1", topic, "phx_join", { "config": {} }])).await;
            let ok = json!({ "status": "ok", "response": "$any" });
            client.expect(json!(["1", "1", topic, "phx_reply", ok])).await;
            let (said_on, envelope) = client.broadcast().await;
            assert_eq!(said_on, topic);
            let payload = &envelope["payload"];
            assert_eq!(envelope["event"], "cache_invalidation");
            assert_eq!(
                (&payload["cause"], endpoints(payload)),
                (&json!("fresh"), vec!["/b".into()])
            );
            client.ends().await;
        }
    }
    server.stop().await;
}

#[tokio::test(start_paused = true)]
async fn only_topics_of_rules_that_merge_are_caught_up() {
    let mut config = config();
    config.topic[0].merge = None;
    config.topic[0].resync.clear();
    let server = TestServer::start_with(config);
    let mut page = Page::open(&server.gateway, browser(1));
    for (reference, topic) in [("20", TOPIC), ("21", "auction_winner_AB3028"), ("22", "room")] {
        page.join(reference, topic).await;
        page.expect_nothing().await;
    }
    drop(page);
    server.stop().await;
}

/// Sends an invalidation as `service_role`, on a socket that has joined the topic.
async fn invalidate(publisher: &mut Page, payload: &Value) {
    invalidate_on(publisher, TOPIC, payload).await;
}

async fn invalidate_on(publisher: &mut Page, topic: &str, payload: &Value) {
    let envelope =
        json!({ "type": "broadcast", "event": "cache_invalidation", "payload": payload });
    publisher.send(json!([null, null, format!("realtime:{topic}"), "broadcast", envelope])).await;
}

/// Everything that a page is told now, within a second: the lists.
async fn lists(page: &mut Page) -> Vec<Vec<String>> {
    let mut lists = Vec::new();
    while let Some(message) = page.message_until(Instant::now() + seconds(1)).await {
        assert_eq!(message[3], "broadcast", "{message}");
        lists.push(endpoints(&message[4]["payload"]));
    }
    lists
}

/// A client forgets a message that is followed by another within two seconds.
#[tokio::test(start_paused = true)]
async fn who_was_just_caught_up_gets_it_again_with_the_messages_of_the_next_five_seconds() {
    let server = TestServer::start();
    let service = token::of_role("service_role");
    let mut publisher = Page::with_token(&server.gateway, browser(9), &service);
    publisher.join("2", TOPIC).await;
    assert_eq!(publisher.caught_up().await, everything("unknown", &[]));
    advance(seconds(10)).await;
    let mut page = Page::open(&server.gateway, browser(1));
    page.join("2", TOPIC).await;
    page.caught_up().await;
    // The other spelling is another channel.
    let colon = "cache_invalidate:AB3028";
    page.join("3", colon).await;
    page.caught_up().await;

    let said = json!({ "type": "bid_placed", "endpoints": ["/a"], "timestamp": 1.5, "amount": 7 });
    invalidate(&mut publisher, &said).await;
    assert_eq!(publisher.told().await, (TOPIC.to_owned(), said.clone()));
    let mut told = Vec::new();
    for _ in 0..4 {
        told.push(page.told().await);
    }
    let (messages, repeats) = told.split_at(2);
    assert!(messages.iter().all(|(_, payload)| *payload == said), "{messages:?}");
    for (_, repeat) in repeats {
        assert_eq!(endpoints(repeat), [&["/a"][..], &RESYNC].concat());
        assert_eq!((&repeat["type"], &repeat["amount"]), (&json!("bid_placed"), &json!(7)));
        assert_eq!(repeat["merged"], 1);
        assert_ne!(repeat["timestamp"], 1.5, "clients drop what they have seen");
    }
    let topics = |told: &[(String, Value)]| -> BTreeSet<String> {
        told.iter().map(|(topic, _)| topic.clone()).collect()
    };
    let both = BTreeSet::from([TOPIC.to_owned(), colon.to_owned()]);
    assert_eq!((topics(messages), topics(repeats)), (both.clone(), both));

    // Three seconds later the window is over, and the catch-up still may have been forgotten.
    invalidate(&mut publisher, &json!({ "endpoints": ["/b"] })).await;
    assert_eq!(endpoints(&publisher.told().await.1), ["/b", "/a"]);
    let all = [&["/b", "/a"][..], &RESYNC].concat();
    assert_eq!(lists(&mut page).await, [vec!["/b", "/a"], vec!["/b", "/a"], all.clone(), all]);
    invalidate(&mut publisher, &json!({ "endpoints": ["/c"] })).await;
    assert_eq!(endpoints(&publisher.told().await.1), ["/c", "/b"]);
    assert_eq!(lists(&mut page).await, [["/c", "/b"], ["/c", "/b"]]);
    assert_eq!(lists(&mut publisher).await, [[""; 0]; 0]);
    let repeats = server.count("tidegate_invalidations_sent_total{reason=\"repeat\"}");
    assert_eq!(repeats, 4);
    drop((page, publisher));
    server.stop().await;
}

/// After its `phx_close` a channel is no more.
#[tokio::test(start_paused = true)]
async fn who_has_left_is_repeated_nothing() {
    let server = TestServer::start();
    let service = token::of_role("service_role");
    let mut publisher = Page::with_token(&server.gateway, browser(9), &service);
    publisher.join("2", TOPIC).await;
    let mut page = Page::open(&server.gateway, browser(1));
    page.join("2", TOPIC).await;
    page.caught_up().await;
    page.leave("2", TOPIC).await;
    invalidate(&mut publisher, &json!({ "endpoints": ["/a"] })).await;
    assert_eq!(lists(&mut publisher).await.len(), 3, "its catch-up, the message, the repeat");
    assert_eq!(lists(&mut page).await, [[""; 0]; 0]);
    drop((page, publisher));
    server.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_window_is_said_before_a_drain_closes() {
    let server = TestServer::start();
    let service = token::of_role("service_role");
    let mut publisher = Page::with_token(&server.gateway, browser(9), &service);
    publisher.join("2", TOPIC).await;
    publisher.caught_up().await;
    advance(seconds(10)).await;
    for endpoint in ["/a", "/b"] {
        invalidate(&mut publisher, &json!({ "endpoints": [endpoint] })).await;
        if endpoint == "/a" {
            assert_eq!(endpoints(&publisher.told().await.1), ["/a"]);
        }
    }
    server.gateway.draining.cancel();
    let told = publisher.told().await.1;
    assert_eq!(endpoints(&told), ["/b", "/a"]);
    drop(publisher);
    server.stop().await;
}

/// What a page has been told since its join, up to this endpoint: the reply and the catch-up come
/// first.
async fn all_told(mut page: Page, until: &str) -> BTreeSet<String> {
    page.expect_ok("1", TOPIC).await;
    let mut all = BTreeSet::new();
    while !all.contains(until) {
        all.extend(endpoints(&page.told().await.1));
    }
    all
}

/// Joins an event whose endpoints are told one after the other, by number, and reads until one is:
/// by then it must know each that was before.
async fn misses_nothing(gateway: &Arc<Gateway>, topic: &str) {
    let mut page = Page::open(gateway, browser(1));
    page.join("1", topic).await;
    let (mut known, mut is_caught_up, mut newest) = (BTreeSet::new(), false, None);
    while !is_caught_up || newest.is_none() {
        let (_, payload) = page.told().await;
        let numbers = endpoints(&payload)
            .into_iter()
            .filter_map(|endpoint| endpoint[1..].parse::<u32>().ok());
        known.extend(numbers);
        if payload["type"] == "catch_up" {
            is_caught_up = true;
        } else {
            newest = known.last().copied();
        }
    }
    let missed: Vec<_> = (0..newest.unwrap()).filter(|number| !known.contains(number)).collect();
    assert_eq!(missed, [0; 0], "of {topic} up to {newest:?}");
}

/// A change is noted before its message is fanned out, and a page subscribes before it reads what
/// has changed: so it is in the one or in the other. The moment between is short: it takes many
/// joins to hit it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_joins_while_others_are_told_misses_nothing() {
    const EVENTS: u32 = 4;
    let mut config = config();
    // As many messages as can be, each of which says no more than it must.
    let merge = config.topic[0].merge.as_mut().unwrap();
    (merge.window, merge.carry) = (Duration::ZERO, Duration::ZERO);
    let server = TestServer::start_with(config);
    let topic = |event: u32| format!("cache_invalidate_AB{event}");
    let mut telling = JoinSet::new();
    for event in 0..EVENTS {
        let (gateway, topic) = (Arc::clone(&server.gateway), topic(event));
        telling.spawn(async move {
            let service = token::of_role("service_role");
            let mut publisher = Page::with_token(&gateway, browser(9), &service);
            publisher.join("1", &topic).await;
            publisher.caught_up().await;
            for number in 0..100 {
                let payload = json!({ "type": "t", "endpoints": [format!("/{number}")] });
                invalidate_on(&mut publisher, &topic, &payload).await;
                while publisher.told().await.1["type"] != "t" {}
            }
        });
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let mut joining = JoinSet::new();
    for task in 0..64 {
        let (gateway, is_over) = (Arc::clone(&server.gateway), Arc::clone(&is_over));
        joining.spawn(async move {
            let mut joins = 0;
            while !is_over.load(Ordering::Relaxed) {
                misses_nothing(&gateway, &topic(task % EVENTS)).await;
                joins += 1;
            }
            joins
        });
    }
    telling.join_all().await;
    is_over.store(true, Ordering::Relaxed);
    let mut joins = 0;
    while !joining.is_empty() {
        // For those who wait for a message and find that nobody sends any more.
        for event in 0..EVENTS {
            let payload = json!({ "type": "t", "endpoints": ["/0"] });
            publish(&server, &topic(event), &payload).await;
        }
        while let Some(ended) = joining.try_join_next() {
            joins += ended.unwrap();
        }
    }
    assert!(joins > 1_000, "{joins} joins");
    server.stop().await;
}

/// As above, with what the database commits and the exact list.
#[tokio::test]
async fn whoever_joins_while_changes_are_committed_misses_nothing() {
    const COUNT: usize = 400;
    let no_window = |config: &mut Config| {
        let merge = config.topic[0].merge.as_mut().unwrap();
        (merge.window, merge.carry) = (Duration::ZERO, Duration::ZERO);
    };
    let mut world = World::start_with(no_window).await;
    let mut pages = Vec::new();
    for number in 0..COUNT {
        let payload = json!({ "endpoints": [format!("/{number}")] });
        // The answer comes with the commit, the notification some time after that.
        world.database.notify(TOPIC, &payload.to_string()).await;
        let mut page = Page::open(&world.server.gateway, browser(1));
        page.ask("1", TOPIC).await;
        pages.push(page);
    }
    world.database.notify(TOPIC, &json!({ "endpoints": ["/end"] }).to_string()).await;
    for (number, page) in pages.into_iter().enumerate() {
        let all = all_told(page, "/end").await;
        let missed: Vec<_> = (0..COUNT)
            .map(|change| format!("/{change}"))
            .filter(|endpoint| !all.contains(endpoint))
            .collect();
        assert_eq!(missed, [""; 0], "of the page that joined after /{number}");
    }
    assert_eq!(count(&world.server, "fresh", "complete").await, 1.0, "the watcher's");
    assert!(count(&world.server, "fresh", "exact").await > 0.0);
    world.stop().await;
}
