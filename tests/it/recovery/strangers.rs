//! Which events a client is told of that has not asked for them: those that it has lost itself, and
//! those that everybody may know. To know of another event is worth something: it may be private.

use std::{collections::BTreeSet, time::Duration};

use tidegate::server::Config;

use super::healing::{healed_of, set};
use crate::support::page::{Page, TOPIC, World, browser, jump};

const FIRST_ROUND: Duration = Duration::from_millis(2500);

/// A table of events as production has it.
const EVENTS: &str = "create table public.events (
        id uuid primary key default gen_random_uuid(), eid varchar(50) unique, enabled boolean);
    insert into public.events (eid, enabled) values
        ('AB3028', true), ('AB1', true), ('AB2', false), ('AB3', null), ('AB4', true)";
/// Of events that everybody may know.
const OPEN: [&str; 2] = ["cache_invalidate:AB1", "auction_winner_AB1"];
/// Of two that not everybody may know, and of one that does not exist.
const HIDDEN: [&str; 3] = ["cache_invalidate_AB2", "cache_invalidate_AB3", "cache_invalidate_AB9"];

/// The built-in rules, which list no events.
fn as_built_in(config: &mut Config) {
    config.topic = Config::defaults().topic;
}

/// A page that has joined all of them.
async fn viewer(world: &World) -> Page {
    let mut viewer = Page::open(&world.server.gateway, browser(1));
    for (reference, topic) in (2..).zip(OPEN.iter().chain(&HIDDEN)) {
        viewer.join(&format!("r{reference}"), topic).await;
        if topic.starts_with("cache") {
            viewer.caught_up().await;
        }
    }
    viewer
}

/// What a silent page of this address is told in its first round.
async fn told(world: &World, address: u8, count: usize) -> BTreeSet<String> {
    let mut silent = Page::open(&world.server.gateway, browser(address));
    jump(FIRST_ROUND).await;
    let told = healed_of(&mut silent, count).await;
    silent.expect_nothing().await;
    told
}

#[tokio::test]
async fn a_silent_stranger_is_told_only_of_viewed_events_that_everybody_may_know() {
    let mut world = World::start_with(as_built_in).await;
    world.database.run(EVENTS).await;
    let viewer = viewer(&world).await;
    // Nobody is told before the database has said so.
    assert_eq!(told(&world, 2, 0).await, set(&[]));
    world.look().await;
    let all_open = [TOPIC, OPEN[0], OPEN[1]];
    assert_eq!(told(&world, 3, 3).await, set(&all_open));
    world.database.run("update public.events set enabled = false where eid = 'AB1'").await;
    world.look().await;
    assert_eq!(told(&world, 4, 1).await, set(&[TOPIC]));
    // Whoever has lost them is told all the same, and nobody else.
    drop(viewer);
    assert_eq!(told(&world, 5, 1).await, set(&[TOPIC]));
    let own: Vec<_> = OPEN.iter().chain(&HIDDEN).copied().chain([TOPIC]).collect();
    assert_eq!(told(&world, 1, 6).await, set(&own));
    world.stop().await;
}

/// News are no way round it.
#[tokio::test]
async fn news_of_an_event_are_told_to_no_stranger_unless_everybody_may_know_the_event() {
    let mut world = World::start_with(as_built_in).await;
    world.database.run(EVENTS).await;
    let viewer = viewer(&world).await;
    world.look().await;
    let mut silent = Page::open(&world.server.gateway, browser(2));
    // The first three rounds; the next is at 92 s.
    for at in [2500, 14_500, 15_000] {
        jump(Duration::from_millis(at)).await;
        assert_eq!(healed_of(&mut silent, 3).await, set(&[TOPIC, OPEN[0], OPEN[1]]));
    }
    jump(Duration::from_secs(14)).await;
    let payload = r#"{"type":"t","endpoints":["/a"]}"#;
    for eid in ["AB2", "AB9", "AB1"] {
        world.database.notify(&format!("cache_invalidate_{eid}"), payload).await;
    }
    assert_eq!(healed_of(&mut silent, 2).await, set(&OPEN));
    silent.expect_nothing().await;
    drop((silent, viewer));
    world.stop().await;
}

/// What anybody can invent would push out what is worth remembering.
#[tokio::test]
async fn only_topics_of_events_that_somebody_knows_are_left_to_the_next_gateway() {
    let mut world = World::start_with(as_built_in).await;
    world.database.run(EVENTS).await;
    let viewer = viewer(&world).await;
    let kept = "select string_agg(topic, ' ' order by topic) from tidegate.recent_topics";
    world.look().await;
    let mut expected: Vec<_> = OPEN.iter().chain(&HIDDEN[..2]).copied().chain([TOPIC]).collect();
    expected.sort_unstable();
    let mut kept: Vec<String> =
        world.database.value::<String>(kept).await.split(' ').map(Into::into).collect();
    kept.sort_unstable();
    assert_eq!(kept, expected);
    drop(viewer);
    world.stop().await;
}

/// Where a database has no such table, or no such column, nobody is told too much.
#[tokio::test]
async fn where_the_database_does_not_say_who_may_know_an_event_row_security_decides() {
    for (table, is_told) in [
        ("create table public.events (eid text); insert into public.events values ('AB1')", true),
        (
            "create table public.events (eid text); insert into public.events values ('AB1');
            alter table public.events enable row level security",
            false,
        ),
        ("create table public.events (name text)", false),
        ("create table public.other ()", false),
    ] {
        let mut world = World::start_with(as_built_in).await;
        world.database.run(table).await;
        let viewer = viewer(&world).await;
        world.look().await;
        let expected = if is_told { &OPEN[..] } else { &[] };
        assert_eq!(told(&world, 2, expected.len()).await, set(expected), "{table}");
        drop(viewer);
        world.stop().await;
    }
}
