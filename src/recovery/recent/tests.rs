//! Tests of which topics are remembered, and which of them anybody may be told of.

use tokio::time::advance;

use super::*;
use crate::server::settings::Config;

const SECOND: Duration = Duration::from_secs(1);

fn rules() -> Rules {
    let config = Config::defaults();
    Rules::new(config.topic, config.topics)
}

/// A memory for so many topics, and so many unknown ones of an address.
fn memory(all: usize, of_address: usize) -> Recent {
    let recent = Recent::new(Bounds { all, of_address });
    recent.set_answered(true);
    recent
}

fn join(recent: &Recent, topic: &str, address: u128) {
    recent.joined(&rules(), topic, Uuid::from_u128(address));
}

fn open(recent: &Recent) -> Vec<String> {
    recent.open(99).iter().map(|open| open.topic.to_string()).collect()
}

fn remembered(recent: &Recent) -> Vec<String> {
    let state = recent.state.lock();
    let mut topics: Vec<_> = state.topics.keys().map(ToString::to_string).collect();
    topics.sort_unstable();
    assert_eq!(topics.len(), state.places.len());
    let of_events: usize = state.events.values().map(|event| event.topics.len()).sum();
    assert_eq!(topics.len(), of_events);
    topics
}

#[tokio::test(start_paused = true)]
async fn nobody_is_told_of_an_event_before_the_database_calls_it_public() {
    let recent = memory(9, 9);
    join(&recent, "cache_invalidate_AB1", 1);
    advance(SECOND).await;
    join(&recent, "auction_winner_AB1", 1);
    for standing in [Standing::Unknown, Standing::Private] {
        recent.answered("AB1", standing);
        assert_eq!(open(&recent), [""; 0]);
        assert!(!recent.is_open("AB1"));
    }
    recent.published("AB1");
    assert_eq!(open(&recent), [""; 0]);
    recent.answered("AB1", Standing::Public);
    assert_eq!(open(&recent), ["auction_winner_AB1", "cache_invalidate_AB1"]);
    assert_eq!(recent.open_of("AB1").len(), 2);
    recent.answered("AB1", Standing::Private);
    assert_eq!(open(&recent), [""; 0]);
}

/// Without a database, or while it is away, a deaf client would be healed by nobody.
#[tokio::test(start_paused = true)]
async fn while_no_database_answers_all_may_be_told_of_what_it_has_said_nothing_of() {
    let recent = memory(9, 9);
    join(&recent, "cache_invalidate_AB1", 1);
    join(&recent, "cache_invalidate_AB2", 1);
    recent.answered("AB2", Standing::Private);
    recent.set_answered(false);
    assert_eq!(open(&recent), ["cache_invalidate_AB1"]);
    join(&recent, "cache_invalidate_AB3", 1);
    assert!(recent.is_open("AB3") && !recent.is_open("AB2"));
    recent.set_answered(true);
    assert_eq!(open(&recent), [""; 0]);
    assert_eq!(remembered(&recent).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_nobody_has_viewed_for_an_hour_is_not_told_of() {
    let recent = memory(9, 9);
    join(&recent, "cache_invalidate_AB1", 1);
    recent.answered("AB1", Standing::Public);
    advance(VIEWED_LATELY - SECOND).await;
    assert!(recent.is_open("AB1"));
    let viewed = recent.open(9).into_iter().map(|open| open.topic).collect::<Vec<_>>();
    recent.viewed(&viewed);
    advance(VIEWED_LATELY - SECOND).await;
    assert_eq!(open(&recent), ["cache_invalidate_AB1"]);
    advance(SECOND).await;
    assert_eq!(open(&recent), [""; 0]);
    assert!(!recent.is_open("AB1"));
    // The event is still known.
    assert!(recent.is_known("AB1"));
    advance(REMEMBERED).await;
    recent.sweep();
    assert_eq!(remembered(&recent), [""; 0]);
    assert!(!recent.is_known("AB1"));
}

/// Anybody can join 500 events that do not exist.
#[tokio::test(start_paused = true)]
async fn what_clients_invent_pushes_out_only_what_clients_have_invented() {
    let recent = memory(4, 2);
    for eid in ["AB1", "AB2"] {
        join(&recent, &format!("cache_invalidate_{eid}"), 1);
    }
    recent.answered("AB1", Standing::Private);
    recent.published("AB2");
    let known = ["cache_invalidate_AB1".to_owned(), "cache_invalidate_AB2".to_owned()];
    for number in 0..100 {
        advance(SECOND).await;
        join(&recent, &format!("cache_invalidate_NO{number}"), number % 7 + 2);
    }
    let left = remembered(&recent);
    assert_eq!((left.len(), &left[..2]), (4, &known[..]));
    assert_eq!(left[2..], ["cache_invalidate_NO98", "cache_invalidate_NO99"]);
    // Not even the latest of them takes the place of a known one.
    for eid in ["NO98", "NO99"] {
        recent.published(eid);
    }
    join(&recent, "cache_invalidate_NO100", 1);
    assert_eq!(remembered(&recent), left);
}

#[tokio::test(start_paused = true)]
async fn of_one_address_only_so_many_unknown_events_are_remembered() {
    let recent = memory(9, 2);
    join(&recent, "cache_invalidate_OTHER", 2);
    for number in 0..5 {
        advance(SECOND).await;
        join(&recent, &format!("cache_invalidate_NO{number}"), 1);
    }
    let left = ["cache_invalidate_NO3", "cache_invalidate_NO4", "cache_invalidate_OTHER"];
    assert_eq!(remembered(&recent), left);
    // Known ones do not count.
    recent.published("NO3");
    join(&recent, "cache_invalidate_NO5", 1);
    assert_eq!(remembered(&recent).len(), 4);
}

#[tokio::test(start_paused = true)]
async fn the_database_is_told_of_known_topics_once_a_minute_and_asked_as_often() {
    let recent = memory(9, 9);
    let joined = || join(&recent, "cache_invalidate_AB1", 1);
    joined();
    assert_eq!(recent.unasked(9), ["AB1".into()]);
    assert_eq!(recent.take_new(), []);
    recent.answered("AB1", Standing::Private);
    assert_eq!(recent.unasked(9), []);
    assert_eq!(recent.take_new(), ["cache_invalidate_AB1".into()]);
    joined();
    assert_eq!(recent.take_new(), []);
    advance(NOTED_AGAIN).await;
    joined();
    assert_eq!(recent.take_new(), ["cache_invalidate_AB1".into()]);
    assert_eq!(recent.unasked(9), ["AB1".into()]);
    // What the database has told is not told to it.
    recent.joined_elsewhere(&rules(), "cache_invalidate_AB2", SECOND);
    recent.published("AB2");
    assert_eq!(recent.take_new(), []);
}

/// Whose topic names more than the event may be somebody's own.
#[tokio::test(start_paused = true)]
async fn a_topic_that_names_more_than_its_event_is_open_by_its_rule_alone() {
    let mut config = Config::defaults();
    config.topic[0].pattern = vec!["room_{eid}_{person:uuid}".parse().unwrap()];
    let topic = format!("room_AB1_{}", Uuid::nil());
    for listed in [false, true] {
        config.topic[0].listed = listed;
        let rules = Rules::new(config.topic.clone(), config.topics);
        let recent = memory(9, 9);
        recent.joined(&rules, &topic, Uuid::nil());
        recent.joined(&rules, "auction_winner_AB1", Uuid::nil());
        recent.answered("AB1", Standing::Public);
        assert_eq!(open(&recent).contains(&topic), listed);
    }
}
