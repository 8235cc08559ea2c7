//! Clients that have come back deaf are told to join again: who, of what, when, and how often.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::json;
use tidegate::{protocol::serializer::Serializer, server::Gateway};
use tokio::time::advance;

use crate::support::{
    client::Client,
    page::{Page, TOPIC, World, browser, endpoints, jump},
    server::{TestServer, config},
    token,
};

/// What any client waits anew after a `phx_error`, at most.
const SPACING: Duration = Duration::from_secs(14);

/// What a page was told to join again, each time, and how long after it opened its socket.
type Rounds = Vec<(Duration, Vec<String>)>;

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// What a page is told until `until` after it opened its socket, which is nothing else.
async fn rounds(page: &mut Page, until: f64) -> Rounds {
    let mut rounds = Rounds::new();
    while let Some(message) = page.message_until(page.opened + seconds(until)).await {
        let topic = message[2].as_str().unwrap();
        assert_eq!(message, json!([null, null, topic, "phx_error", {}]));
        let topic = topic.strip_prefix("realtime:").unwrap().to_owned();
        let since = page.opened.elapsed();
        match rounds.last_mut() {
            Some((at, topics)) if *at == since => topics.push(topic),
            Some(_) | None => rounds.push((since, vec![topic])),
        }
    }
    rounds
}

/// The same topics at each of these times.
fn at(times: &[f64], topics: &[&str]) -> Rounds {
    let topics: Vec<_> = topics.iter().map(|topic| (*topic).to_owned()).collect();
    times.iter().map(|at| (seconds(*at), topics.clone())).collect()
}

/// A page that holds these topics, the last of which it has joined last.
async fn living(gateway: &Arc<Gateway>, topics: &[&str]) -> Page {
    let mut page = Page::open(gateway, browser(1));
    // Nothing is known of it, so it is caught up.
    for (number, topic) in (2..).zip(topics) {
        page.join(&format!("r{number}"), topic).await;
        if topic.starts_with("cache") {
            page.caught_up().await;
        }
        advance(seconds(1.0)).await;
    }
    page
}

fn counts(server: &TestServer) -> [u64; 3] {
    ["deaf_suspects", "heals_sent_total", "healed_total"]
        .map(|name| server.count(&format!("tidegate_{name}")))
}

const AB1: &str = "cache_invalidate_AB1";
const AB2: &str = "cache_invalidate:AB2";
const WINNER: &str = "auction_winner_AB1";

/// 2.11.15 after any lost connection. Who has not reacted to five does not hold the topic.
#[tokio::test(start_paused = true)]
async fn a_socket_that_joins_nothing_is_told_what_others_have_joined_five_times() {
    let server = TestServer::start();
    let living = living(&server.gateway, &[AB1, WINNER, AB2]).await;
    let mut deaf = Page::open(&server.gateway, browser(2));
    // The latest first.
    let told = rounds(&mut deaf, 3600.0).await;
    assert_eq!(told, at(&[2.5, 17.0, 32.0, 92.0, 152.0], &[AB2, WINNER, AB1]));
    assert_eq!(counts(&server), [1, 15, 0]);
    drop((deaf, living));
    assert_eq!(counts(&server), [0, 15, 0]);
    server.stop().await;
}

/// Clients from 2.15 on join by themselves up to 10 s after they opened their socket, and wait
/// anew after each `phx_error`: one every 5 s kept them out for good.
#[tokio::test(start_paused = true)]
async fn a_socket_that_begins_like_an_old_one_is_told_at_once_and_never_twice_within_14_seconds() {
    let server = TestServer::start();
    let living = living(&server.gateway, &[AB1]).await;
    let heartbeat = json!([null, "40", "phoenix", "heartbeat", {}]);
    let join = |reference: &str| json!([reference, reference, "realtime:room", "phx_join", { "config": {} }]);
    for (number, (after, first, times)) in (10..).zip([
        (0.1, heartbeat.clone(), [2.5, 17.0, 32.0, 92.0]),
        (4.0, heartbeat.clone(), [2.5, 17.0, 32.0, 92.0]),
        (0.1, join("17"), [2.5, 17.0, 32.0, 92.0]),
        (0.1, join("4000000000"), [2.5, 17.0, 32.0, 92.0]),
        // A page that was just loaded begins neither in the middle nor with a goodbye.
        (0.1, join("2"), [2.5, 17.0, 32.0, 92.0]),
        (0.1, json!(["3", "10", "realtime:room", "phx_leave", {}]), [2.5, 17.0, 32.0, 92.0]),
    ]) {
        let mut page = Page::open(&server.gateway, browser(number));
        let mut told = rounds(&mut page, after).await;
        page.send(first).await;
        assert_eq!(page.message().await[3], "phx_reply");
        told.extend(rounds(&mut page, 93.0).await);
        assert_eq!(told, at(&times, &[AB1]));
    }
    // One whose first word is a join that it does not begin with is found out by its ref alone.
    let mut page = Page::open(&server.gateway, browser(20));
    page.send(join("1")).await;
    assert_eq!(page.message().await[3], "phx_reply");
    assert_eq!(rounds(&mut page, 3600.0).await, []);
    drop((page, living));
    server.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_page_that_joins_in_time_is_left_alone() {
    let server = TestServer::start();
    let _living = living(&server.gateway, &[AB1, AB2]).await;
    let mut pages = Vec::new();
    for (reference, after) in [("1", 0.0), ("r1", 0.0), ("6", 1.0), ("1", 2.4)] {
        let mut page = Page::open(&server.gateway, browser(2));
        assert_eq!(rounds(&mut page, after).await, []);
        page.join(reference, "room").await;
        pages.push(page);
    }
    // One that has nothing any more has been heard of, too.
    let mut left = Page::open(&server.gateway, browser(2));
    left.join("1", "room").await;
    left.leave("1", "room").await;
    pages.push(left);
    for page in &mut pages {
        assert_eq!(rounds(page, 3600.0).await, []);
    }
    assert_eq!(counts(&server), [0, 0, 0]);
}

/// At the moment of its round it may be about to join.
#[tokio::test(start_paused = true)]
async fn a_socket_is_never_told_of_a_topic_that_it_has_joined() {
    let server = TestServer::start();
    let _living = living(&server.gateway, &[AB1, WINNER, AB2]).await;
    let mut page = Page::open(&server.gateway, browser(2));
    page.join("30", AB1).await;
    page.caught_up().await;
    assert_eq!(rounds(&mut page, 20.0).await, at(&[2.5, 17.0], &[AB2, WINNER]));
    page.join("31", WINNER).await;
    assert_eq!(rounds(&mut page, 40.0).await, at(&[32.0], &[AB2]));
    page.join("32", AB2).await;
    page.caught_up().await;
    assert_eq!(rounds(&mut page, 3600.0).await, []);
    // It has joined one without being told.
    assert_eq!(counts(&server), [1, 5, 2]);
    // Another spelling is another topic.
    let underscore = "cache_invalidate_AB2";
    let mut other = living(&server.gateway, &[underscore]).await;
    assert_eq!(rounds(&mut other, 10.0).await, []);
    assert_eq!(rounds(&mut page, 4000.0).await[0].1, [underscore]);
}

#[tokio::test(start_paused = true)]
async fn who_joins_after_being_told_is_counted_as_healed_once_for_each_topic() {
    let server = TestServer::start();
    let _living = living(&server.gateway, &[AB1, WINNER]).await;
    let mut deaf = Page::open(&server.gateway, browser(2));
    assert_eq!(rounds(&mut deaf, 3.0).await, at(&[2.5], &[WINNER, AB1]));
    assert_eq!(counts(&server), [1, 2, 0]);
    for reference in ["41", "42"] {
        deaf.join(reference, WINNER).await;
        if reference == "42" {
            assert_eq!(deaf.message().await[3], "phx_close");
        }
        assert_eq!(counts(&server), [1, 2, 1]);
    }
    deaf.join("43", "cache_invalidate_AB3").await;
    deaf.caught_up().await;
    assert_eq!(counts(&server), [1, 2, 1]);
    deaf.join("44", AB1).await;
    deaf.caught_up().await;
    assert_eq!(counts(&server), [1, 2, 2]);
    assert_eq!(rounds(&mut deaf, 3600.0).await, []);
}

/// An address may have lost dozens: each signed-in user joins a topic for every event to come.
#[tokio::test(start_paused = true)]
async fn a_round_has_64_topics_at_most_those_first_that_the_address_has_lost() {
    let server = TestServer::start();
    let lost: Vec<_> = (0..60).map(|number| format!("auction_winner_LOST{number}")).collect();
    let recent: Vec<_> = (0..70).map(|number| format!("auction_winner_NEW{number}")).collect();
    let texts = |all: &[String]| -> BTreeSet<String> { all.iter().cloned().collect() };
    // Long ago, and a page of its own was there last.
    let mut page = Page::open(&server.gateway, browser(2));
    for topic in &lost {
        page.join("1", topic).await;
    }
    drop(page);
    advance(seconds(3600.0)).await;
    let recents: Vec<_> = recent.iter().map(String::as_str).collect();
    let _living = living(&server.gateway, &recents).await;
    let mut deaf = Page::open(&server.gateway, browser(2));
    let told = rounds(&mut deaf, 40.0).await;
    let [(_, first), (_, second), (_, third)] = &*told else { panic!("{told:?}") };
    assert_eq!([first.len(), second.len(), third.len()], [64; 3]);
    // Each of the lost ones, then the others, the latest first; and then again.
    let latest_first: Vec<_> = recent.iter().rev().cloned().collect();
    let (own, others) = first.split_at(60);
    assert_eq!((texts(own), others), (texts(&lost), &latest_first[..4]));
    assert_eq!(second, &latest_first[4..68]);
    assert_eq!(third[..2], latest_first[68..]);
    assert_eq!((texts(&third[2..62]), &third[62..]), (texts(&lost), &latest_first[..2]));
    // Who has lost nothing hears of what others have joined.
    let mut other = Page::open(&server.gateway, browser(3));
    assert_eq!(rounds(&mut other, 3.0).await, [(seconds(2.5), latest_first[..64].to_vec())]);
}

/// A page in the back-forward cache closes with 1001 as well: no end proves that a page is gone.
#[tokio::test(start_paused = true)]
async fn what_a_client_has_left_is_not_lost() {
    let server = TestServer::start();
    let mut page = Page::open(&server.gateway, browser(2));
    for (reference, topic) in [("1", AB1), ("2", WINNER), ("3", AB2)] {
        page.join(reference, topic).await;
        if topic != WINNER {
            page.caught_up().await;
        }
        advance(seconds(1.0)).await;
    }
    page.leave("3", AB2).await;
    drop(page);
    let told = |mut page: Page| async move { rounds(&mut page, 3.0).await.remove(0).1 };
    let mut deaf = told(Page::open(&server.gateway, browser(2))).await;
    // As a topic that anybody has joined it comes last.
    assert_eq!(deaf.pop().unwrap(), AB2);
    deaf.sort_unstable();
    assert_eq!(deaf, [WINNER, AB1]);
    let other = told(Page::open(&server.gateway, browser(3))).await;
    assert_eq!(other, [AB2, WINNER, AB1]);
}

/// Topics that nobody has joined, that are not listened to, and that the token may not read.
#[tokio::test(start_paused = true)]
async fn a_socket_is_told_only_of_topics_of_the_database_that_its_token_may_read() {
    let mut config = config();
    let admin = config.topic.iter_mut().find(|rule| &*rule.name == "admin").unwrap();
    admin.pattern.truncate(1);
    admin.listen = Some("admin_{eid}".parse().unwrap());
    admin.event = Some("changed".into());
    let server = TestServer::start_with(config);
    let of_ab1 = token::with_claims(json!({
        "role": "authenticated", "admin_events": { "AB1": "voting" },
    }));
    let service = token::of_role("service_role");
    let all = ["admin-auction-AB1", "admin-auction-AB2", AB1, "room", "admin-voting-AB1"];
    let mut living = Page::with_token(&server.gateway, browser(1), &service);
    for (reference, topic) in (2..).zip(all) {
        living.join(&format!("r{reference}"), topic).await;
        if topic == AB1 {
            living.caught_up().await;
        }
        advance(seconds(1.0)).await;
    }
    for (token, expected) in [
        (token::of_role("anon"), &[AB1][..]),
        (of_ab1, &[AB1, "admin-auction-AB1"]),
        (service, &[AB1, "admin-auction-AB2", "admin-auction-AB1"]),
    ] {
        let mut deaf = Page::with_token(&server.gateway, browser(2), &token);
        assert_eq!(rounds(&mut deaf, 3.0).await, at(&[2.5], expected));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_joined_elsewhere_meanwhile_is_told_in_the_next_round() {
    let server = TestServer::start();
    let mut deaf = Page::open(&server.gateway, browser(2));
    assert_eq!(rounds(&mut deaf, 10.0).await, []);
    assert_eq!(counts(&server), [1, 0, 0]);
    let _living = living(&server.gateway, &[AB1]).await;
    assert_eq!(rounds(&mut deaf, 33.0).await, at(&[17.0, 32.0], &[AB1]));
}

/// On the wire, in both versions; a silent socket is found by the connection's own timer.
#[tokio::test]
async fn a_deaf_client_is_told_in_its_serializer() {
    let server = TestServer::start();
    let mut living = Page::open(&server.gateway, browser(1));
    living.join("r2", AB1).await;
    let mut clients = Vec::new();
    for serializer in [Serializer::V1, Serializer::V2] {
        for is_silent in [true, false] {
            let mut client = Client::connect(&server, serializer).await;
            if !is_silent {
                client.expect_nothing().await;
            }
            clients.push(client);
        }
    }
    server.metric_reaches("tidegate_connections", 4.0).await;
    jump(seconds(2.5)).await;
    for client in &mut clients {
        client.expect(json!([null, null, format!("realtime:{AB1}"), "phx_error", {}])).await;
        client.expect_nothing().await;
    }
    assert_eq!(server.metric("tidegate_deaf_suspects").await, 4.0);
    assert_eq!(server.metric("tidegate_heals_sent_total").await, 4.0);
    drop((clients, living));
    server.metric_falls_to("tidegate_deaf_suspects", 0.0).await;
    server.stop().await;
}

/// Names an event as the database's monitoring does, and waits until the gateway has heard it.
async fn name(world: &mut World, eid: &str) {
    let noted = "tidegate_notifications_total{outcome=\"noted\",source=\"stats\"}";
    let before = world.server.metric(noted).await;
    let payload = json!({ "event_eid": eid, "table": "bids", "operation": "INSERT" });
    world.database.notify("global_cache_stats", &payload.to_string()).await;
    world.server.metric_reaches(noted, before + 1.0).await;
}

/// What a page is told to join next.
async fn healed_in_order(page: &mut Page, count: usize) -> Vec<String> {
    let mut topics = Vec::new();
    for _ in 0..count {
        let message = page.message().await;
        assert_eq!(message[3], "phx_error", "{message}");
        topics.push(message[2].as_str().unwrap().strip_prefix("realtime:").unwrap().to_owned());
    }
    topics
}

/// As `healed_in_order`, in any.
pub(super) async fn healed_of(page: &mut Page, count: usize) -> BTreeSet<String> {
    healed_in_order(page, count).await.into_iter().collect()
}

pub(super) fn set(topics: &[&str]) -> BTreeSet<String> {
    topics.iter().map(|topic| (*topic).to_owned()).collect()
}

/// A deaf client needs its topic most when something happens.
#[tokio::test]
async fn news_of_an_event_heal_at_once_who_may_be_deaf_to_it() {
    let mut world = World::start().await;
    let gateway = Arc::clone(&world.server.gateway);
    let other = "cache_invalidate:AB3028";
    let mut page = Page::open(&gateway, browser(1));
    for (reference, topic) in [("2", WINNER), ("3", other), ("4", AB1)] {
        page.join(reference, topic).await;
        if topic != WINNER {
            page.caught_up().await;
        }
    }
    drop(page);
    let mut deaf = Page::open(&gateway, browser(2));
    let mut joined = Page::open(&gateway, browser(3));
    joined.join("20", TOPIC).await;
    joined.caught_up().await;
    // The first three rounds; the next is at 92 s.
    for at in [2.5, 14.5, 15.0] {
        jump(seconds(at)).await;
        assert_eq!(healed_of(&mut deaf, 4).await, set(&[TOPIC, other, AB1, WINNER]));
        assert_eq!(healed_of(&mut joined, 3).await, set(&[other, AB1, WINNER]));
    }
    // Too early after a round.
    name(&mut world, "AB1").await;
    deaf.expect_nothing().await;
    jump(SPACING - seconds(0.5)).await;
    name(&mut world, "AB1").await;
    deaf.expect_nothing().await;
    jump(seconds(0.5)).await;
    // All topics of the event, in all spellings; and none that is joined.
    world.database.notify(TOPIC, r#"{"type":"t","endpoints":["/a"]}"#).await;
    assert_eq!(healed_of(&mut deaf, 2).await, set(&[TOPIC, other]));
    assert_eq!(healed_of(&mut joined, 1).await, set(&[other]));
    assert_eq!(endpoints(&joined.told().await.1), ["/a"]);
    // It is the socket that must not be told too often.
    name(&mut world, "AB1").await;
    deaf.expect_nothing().await;
    jump(SPACING).await;
    name(&mut world, "AB1").await;
    assert_eq!(healed_of(&mut deaf, 2).await, set(&[AB1, WINNER]));
    jump(SPACING).await;
    // Of an event that nobody knows.
    name(&mut world, "AB9").await;
    deaf.expect_nothing().await;
    drop((deaf, joined));
    world.stop().await;
}

/// They count as rounds.
#[tokio::test]
async fn news_put_the_next_round_off_by_fourteen_seconds() {
    let mut world = World::start().await;
    let mut deaf = Page::open(&world.server.gateway, browser(2));
    jump(seconds(2.5)).await;
    assert_eq!(healed_of(&mut deaf, 1).await, set(&[TOPIC]));
    jump(SPACING).await;
    name(&mut world, "AB3028").await;
    assert_eq!(healed_of(&mut deaf, 1).await, set(&[TOPIC]));
    // The round of 17 s would be now, that of 32 s is not yet.
    jump(SPACING - seconds(1.0)).await;
    deaf.expect_nothing().await;
    jump(seconds(1.0)).await;
    assert_eq!(healed_of(&mut deaf, 1).await, set(&[TOPIC]));
    drop(deaf);
    world.stop().await;
}

#[tokio::test]
async fn a_socket_that_has_just_opened_is_not_healed_by_news() {
    let mut world = World::start().await;
    let mut page = Page::open(&world.server.gateway, browser(2));
    page.send(json!([null, "40", "phoenix", "heartbeat", {}])).await;
    assert_eq!(page.message().await[3], "phx_reply");
    world.change("/a").await;
    // Six seconds later it has been told once.
    assert_eq!(healed_of(&mut page, 1).await, set(&[TOPIC]));
    page.expect_nothing().await;
    drop(page);
    world.stop().await;
}

/// Somewhere is always news.
#[tokio::test]
async fn news_of_events_that_a_socket_has_nothing_to_do_with_do_not_put_its_rounds_off() {
    let mut world = World::start().await;
    let mut deaf = Page::open(&world.server.gateway, browser(2));
    jump(seconds(2.5)).await;
    assert_eq!(healed_of(&mut deaf, 1).await, set(&[TOPIC]));
    for _ in 0..30 {
        name(&mut world, "AB9").await;
        jump(seconds(5.0)).await;
    }
    // After 17, 32, 92 and 152 seconds.
    assert_eq!(healed_of(&mut deaf, 4).await, set(&[TOPIC]));
    deaf.expect_nothing().await;
    drop(deaf);
    world.stop().await;
}

/// When a gateway is started again, everybody comes back at once, many of them deaf.
#[tokio::test]
async fn what_was_joined_of_late_and_what_was_lost_outlives_the_gateway() {
    let mut world = World::start().await;
    let mut page = Page::open(&world.server.gateway, browser(1));
    page.join("1", WINNER).await;
    page.join("2", AB1).await;
    page.caught_up().await;
    world.look().await;
    let known = "select string_agg(topic, ' ' order by topic) from tidegate.recent_topics";
    assert_eq!(world.database.value::<String>(known).await, format!("{WINNER} {AB1} {TOPIC}"));
    page.leave("1", WINNER).await;
    drop(page);
    let World { server, mut database, watcher } = world;
    drop(watcher);
    server.stop().await;
    database
        .run(
            "insert into tidegate.recent_topics values
            ('cache_invalidate_OLD', now() - interval '70 minutes'),
            ('cache_invalidate_HOUR', now() - interval '50 minutes')",
        )
        .await;

    let server = World::restart(&mut database).await;
    let hour = "cache_invalidate_HOUR";
    for address in [1, 2] {
        let mut deaf = Page::open(&server.gateway, browser(address));
        jump(seconds(2.5)).await;
        let topics = healed_in_order(&mut deaf, 4).await;
        deaf.expect_nothing().await;
        if address == 1 {
            assert_eq!(topics[0], AB1, "its own first");
        }
        assert_eq!(topics[3], hour, "the latest first");
        assert_eq!(topics.into_iter().collect::<BTreeSet<_>>(), set(&[AB1, TOPIC, WINNER, hour]));
    }
    server.stop().await;
}
