//! Clients that read too slowly: of invalidations one takes the place of many, so that nobody is
//! closed for them and nothing is missed; what cannot be replaced ends them.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};
use tidegate::{
    limits::Settings,
    protocol::serializer::Serializer::{self, V1, V2},
};
use tokio::{net::TcpSocket, time::timeout};

use crate::support::{
    client::Client,
    page::{Page, QUIET, TOPIC, World, browser, endpoints, jump},
    server::{DEADLINE, TestServer, config},
    token,
};

/// The complete list of [`World`]'s event begins with it.
const RESYNC: [&str; 3] =
    ["/live/event/AB3028", "/live/event/AB3028/media", "/live/event/AB3028/artists"];
/// Room for one short message.
const NARROW: usize = 300;

fn told(cause: &str, endpoints: &[&str]) -> (String, Vec<String>) {
    (cause.to_owned(), endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect())
}

async fn conflations(server: &TestServer, method: &str) -> (f64, f64) {
    let series = format!("tidegate_catch_ups_total{{cause=\"slow_client\",method=\"{method}\"}}");
    (server.metric("tidegate_conflations_total").await, server.metric(&series).await)
}

#[tokio::test]
async fn a_slow_client_is_told_in_one_message_exactly_what_it_was_too_slow_for() {
    let mut world = World::start().await;
    world.change("/before").await;
    let mut slow = Page::slow(&world.server.gateway, browser(1), NARROW);
    slow.join("1", TOPIC).await;
    slow.caught_up().await;
    jump(QUIET).await;
    world.change("/read").await;
    assert_eq!(slow.told().await.1["endpoints"], json!(["/read"]));

    let (conflated, caught_up) = conflations(&world.server, "exact").await;
    // One fits, and a second does not.
    for endpoint in ["/a", "/b", "/a", "/c"] {
        world.change(endpoint).await;
    }
    assert_eq!(slow.caught_up().await, told("slow_client", &["/b", "/a", "/c"]));
    slow.expect_nothing().await;
    let now = conflations(&world.server, "exact").await;
    assert_eq!(now, (conflated + 1.0, caught_up + 1.0));
    // It is as it was before.
    jump(QUIET).await;
    world.change("/d").await;
    assert_eq!(slow.told().await.1["endpoints"], json!(["/d"]));
    slow.expect_nothing().await;
    drop(slow);
    world.stop().await;
}

/// The list of who joins is replaced by the same list, and each spelling is a topic of its own.
#[tokio::test]
async fn a_catch_up_that_does_not_fit_is_told_later_and_each_topic_by_itself() {
    let mut world = World::start().await;
    world.change("/a").await;
    let everything = told("slow_client", &[&RESYNC, &["/a"] as &[_]].concat());
    let mut slow = Page::slow(&world.server.gateway, browser(1), 1);
    for (reference, topic) in [("2", TOPIC), ("3", "cache_invalidate:AB3028")] {
        slow.join(reference, topic).await;
        assert_eq!(slow.caught_up().await, everything);
    }
    slow.expect_nothing().await;
    assert_eq!(conflations(&world.server, "complete").await, (2.0, 2.0));
    drop(slow);
    world.stop().await;
}

/// What is sent late may have changed long before.
#[tokio::test]
async fn what_has_waited_for_a_mutes_end_and_then_for_a_slow_client_is_told() {
    let mut world = World::start().await;
    let mut slow = Page::slow(&world.server.gateway, browser(1), NARROW);
    slow.join("1", TOPIC).await;
    slow.expect_nothing().await;
    let mute = "POST /events/AB3028/mute?for=10m HTTP/1.1";
    assert_eq!(TestServer::request(world.server.admin, mute, "").await.0, 200);
    let payload = json!({ "type": "t", "endpoints": ["/muted"] }).to_string();
    world.database.notify(TOPIC, &payload).await;
    let offered = "tidegate_notifications_total{outcome=\"offered\",source=\"event\"}";
    world.server.metric_reaches(offered, 1.0).await;
    jump(Duration::from_secs(601)).await;
    assert_eq!(endpoints(&world.watcher.told().await.1), ["/muted"]);
    jump(QUIET).await;
    world.change("/a").await;
    assert_eq!(slow.caught_up().await, told("slow_client", &["/muted", "/a"]));
    slow.expect_nothing().await;
    drop(slow);
    world.stop().await;
}

#[tokio::test]
async fn who_goes_away_before_it_was_told_gets_everything_when_it_comes_back() {
    let mut world = World::start().await;
    world.change("/old").await;
    jump(Duration::from_secs(3600)).await;
    for (number, changes, expected) in [
        (1, 1, told("returned", &["/a1"])),
        (2, 2, told("unknown", &[&RESYNC, &["/a1", "/a2", "/old"] as &[_]].concat())),
    ] {
        let client = browser(number);
        let mut slow = Page::slow(&world.server.gateway, client, NARROW);
        slow.join("1", TOPIC).await;
        slow.expect_nothing().await;
        for change in 1..=changes {
            world.change(&format!("/a{change}")).await;
            if changes == 1 {
                slow.told().await;
            }
        }
        drop(slow);
        let mut back = Page::open(&world.server.gateway, client);
        back.join("30", TOPIC).await;
        assert_eq!(back.caught_up().await, expected);
        drop(back);
        jump(Duration::from_secs(3600)).await;
    }
    world.stop().await;
}

/// A server that sends every invalidation at once and alone, so that there are many of them, and
/// somebody who sends them and hears each before the next.
struct Flood {
    server: TestServer,
    sender: Client,
    sent: u64,
}

impl Flood {
    async fn start(change: impl FnOnce(&mut Settings)) -> Self {
        let mut config = config();
        let merge = config.topic[0].merge.as_mut().unwrap();
        (merge.window, merge.carry) = (Duration::ZERO, Duration::ZERO);
        change(&mut config.limits);
        let server = TestServer::start_with(config);
        let service = token::of_role("service_role");
        let mut sender = Client::with_token(&server, V2, &service).await;
        sender.join_with(TOPIC, json!({ "broadcast": { "self": true } })).await;
        Self { server, sender, sent: 0 }
    }

    /// Sends one that the kernel holds few of for a client.
    async fn send(&mut self) {
        self.sent += 1;
        let payload = json!({ "endpoints": [self.sent.to_string()], "x": "x".repeat(200_000) });
        let push =
            json!({ "type": "broadcast", "event": "cache_invalidation", "payload": payload });
        let topic = format!("realtime:{TOPIC}");
        self.sender.send(json!(["1", "push", topic, "broadcast", push])).await;
        assert_eq!(self.sender.broadcast().await.1["payload"], payload);
    }

    async fn send_until(&mut self, mut done: impl FnMut(&TestServer) -> bool) {
        let flooding = async {
            while !done(&self.server) {
                self.send().await;
            }
        };
        timeout(3 * DEADLINE, flooding).await.expect("the slow one is found out");
    }

    async fn closed(&self, reason: &str) -> f64 {
        let labels = format!("code=\"none\",reason=\"{reason}\"");
        self.server.metric(&format!("tidegate_connections_closed_total{{{labels}}}")).await
    }
}

/// A client whose system holds only a few bytes for it.
async fn narrow(server: &TestServer, serializer: Serializer) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(server.public).await.unwrap();
    Client::over(server, stream, serializer, &token::of_role("anon")).await
}

#[tokio::test]
async fn a_viewer_that_reads_too_late_stays_and_hears_of_every_endpoint() {
    for serializer in [V1, V2] {
        let mut flood = Flood::start(|limits| {
            limits.outbox_bytes_max = 64 * 1024;
            // It does not apply while nothing waits but what can be replaced.
            limits.write_timeout = Duration::from_millis(1);
            limits.merged_write_timeout = 6 * DEADLINE;
        })
        .await;
        let mut slow = narrow(&flood.server, serializer).await;
        slow.join(TOPIC).await;
        let mut before = 0;
        flood
            .send_until(|server| {
                let now = server.count("tidegate_deliveries_total");
                // It has fallen behind when a message is put into the sender's outbox only.
                now - std::mem::replace(&mut before, now) == 1
            })
            .await;
        for _ in 0..3 {
            flood.send().await;
        }
        let (mut missed, mut told): (BTreeSet<_>, _) =
            ((1..=flood.sent).map(|number| number.to_string()).collect(), Value::Null);
        while !missed.is_empty() {
            told = slow.broadcast().await.1["payload"].take();
            for endpoint in endpoints(&told) {
                missed.remove(&endpoint);
            }
        }
        assert_eq!((&told["type"], &told["cause"]), (&json!("catch_up"), &json!("slow_client")));
        slow.expect_nothing().await;
        flood.send().await;
        assert_eq!(endpoints(&slow.broadcast().await.1["payload"]), [flood.sent.to_string()]);
        let conflated = flood.server.metric("tidegate_conflations_total").await;
        assert!(conflated >= 1.0, "{conflated}");
        slow.close().await;
        flood.sender.close().await;
        flood.server.stop().await;
    }
}

#[tokio::test]
async fn who_reads_no_invalidation_is_closed_at_their_own_deadline() {
    let mut flood = Flood::start(|limits| {
        limits.outbox_bytes_max = 64 * 1024;
        limits.write_timeout = 60 * DEADLINE;
        limits.merged_write_timeout = Duration::from_millis(300);
    })
    .await;
    let mut deaf = narrow(&flood.server, V2).await;
    deaf.join(TOPIC).await;
    flood.send_until(|server| server.count("tidegate_connections") == 1).await;
    assert_eq!(flood.closed("write_timeout").await, 1.0);
    drop(deaf);
    flood.sender.close().await;
    flood.server.stop().await;
}

#[tokio::test]
async fn who_holds_up_what_cannot_be_replaced_is_closed_at_the_writes_deadline() {
    let mut flood = Flood::start(|limits| {
        limits.outbox_bytes_max = 1 << 30;
        limits.write_timeout = Duration::from_millis(300);
        limits.merged_write_timeout = 60 * DEADLINE;
    })
    .await;
    let mut deaf = narrow(&flood.server, V2).await;
    deaf.join(TOPIC).await;
    deaf.join("room").await;
    // Several messages wait, so that one is being written.
    flood.send_until(|server| server.gateway.sockets.highest_backlog() > 1_000_000).await;
    flood.server.publish("room", &json!({ "sold": true })).await;
    flood.server.metric_falls_to("tidegate_connections", 1.0).await;
    assert_eq!(flood.closed("write_timeout").await, 1.0);
    drop(deaf);
    flood.sender.close().await;
    flood.server.stop().await;
}
