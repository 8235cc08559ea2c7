//! What clients are told that join, by what is known of them.

use std::collections::BTreeSet;

use serde_json::json;
use tokio::time::advance;

use super::*;
use crate::invalidation::{
    feed::Feed,
    known::ENDPOINTS_MAX,
    tests::{ARTISTS, CARRY, EVENT, MEDIA, Viewer, endpoints, feed, listed, payload, repeated},
    window::SETTLE,
};

/// What is known of an event whose changes are a minute, ten seconds and no time ago.
async fn told() -> (Feed, Instant) {
    let (feed, start) = (feed(), Instant::now());
    feed.learn(&endpoints(&["/old", "/never"]));
    for (text, then) in [("/old", 50), ("/young", 10), ("/now", 0)] {
        feed.tell(&[text]);
        feed.sends().await;
        advance(Duration::from_secs(then) - SETTLE.min(Duration::from_secs(then))).await;
    }
    (feed, start)
}

#[tokio::test(start_paused = true)]
async fn who_joins_is_told_what_has_changed_since_it_last_heard_of_the_event() {
    let everything = [EVENT, MEDIA, ARTISTS, "/never", "/now", "/old", "/young"];
    let seconds = |number| Duration::from_secs(number);
    for (known, since, method, expected) in [
        (ClientHistory::Fresh, 60, Coverage::Exact, &["/young", "/now"][..]),
        (ClientHistory::Held, 60, Coverage::Exact, &["/young", "/now"]),
        (ClientHistory::Nothing, 60, Coverage::Complete, &everything),
        // Coverage: to the moment itself, and one millisecond too short.
        (ClientHistory::Fresh, 30, Coverage::Exact, &["/young", "/now"]),
        (ClientHistory::Fresh, 29, Coverage::Complete, &everything),
        (ClientHistory::Held, 29, Coverage::Complete, &everything),
    ] {
        let (feed, start) = told().await;
        let now = Instant::now();
        assert!(now - start >= seconds(60));
        let (_viewer, catch_up) = feed.join(known, Some(now - seconds(since)));
        let CatchUp { broadcast, cause, coverage: by, .. } = catch_up.unwrap();
        assert_eq!(
            (by, listed(&broadcast)),
            (method, expected.iter().map(|text| (*text).to_owned()).collect())
        );
        let said = payload(&broadcast);
        assert_eq!((&said["type"], &said["event_eid"]), (&json!("catch_up"), &json!("AB3028")));
        assert_eq!(said["cause"], cause.label());
    }
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_is_told_what_has_changed_since_then_that_moment_included() {
    let (feed, start) = told().await;
    let join = |since, covered| feed.join(ClientHistory::Since(since), covered).1;
    // `/old` changed at the very start.
    let CatchUp { broadcast, cause, coverage, .. } = join(start, Some(start)).unwrap();
    assert_eq!(listed(&broadcast), ["/old", "/young", "/now"]);
    assert_eq!((cause, coverage), (CatchUpCause::Returned, Coverage::Exact));
    let later = start + Duration::from_nanos(1);
    assert_eq!(listed(&join(later, Some(start)).unwrap().broadcast), ["/young", "/now"]);
    // What was before the coverage is not known, nor what happens without any.
    for covered in [Some(later), None] {
        assert_eq!(join(start, covered).unwrap().coverage, Coverage::Complete);
    }
}

#[tokio::test(start_paused = true)]
async fn who_has_missed_nothing_is_told_nothing() {
    let (feed, start) = told().await;
    advance(FRESH + Duration::from_millis(1)).await;
    for known in
        [ClientHistory::Fresh, ClientHistory::Held, ClientHistory::Since(Instant::now() - FRESH)]
    {
        assert!(feed.join(known, Some(start)).1.is_none(), "{known:?}");
    }
    assert!(feed.join(ClientHistory::Nothing, Some(start)).1.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_change_that_waits_for_its_window_is_told_to_who_joins_meanwhile() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell(&["/a"]);
    feed.sends().await;
    advance(FRESH).await;
    feed.tell(&["/b"]);
    let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/b"]);
    assert_eq!(feed.sends().await.endpoints(), ["/b"]);
}

/// A page that was just loaded, too: its fetch may have been answered by a cache.
#[tokio::test(start_paused = true)]
async fn what_stands_for_everything_has_changed_everything_for_who_joins_afterwards() {
    for is_gap in [true, false] {
        let (feed, start) = (feed(), Instant::now());
        feed.learn(&endpoints(&["/known"]));
        advance(FRESH).await;
        if is_gap {
            feed.offer_gap(CatchUpCause::Operator, None, Instant::now());
        } else {
            feed.take(r#"{"type":"t","pointer":true,"id":7}"#, 1);
        }
        feed.sends().await;
        advance(CARRY * 2).await;
        let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
        let told: BTreeSet<_> = listed(&catch_up.unwrap().broadcast).into_iter().collect();
        let all = [EVENT, MEDIA, ARTISTS, "/known"].map(str::to_owned);
        assert_eq!(told, all.into(), "is_gap: {is_gap}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_that_knows_no_more_endpoints_says_so_to_who_comes_back() {
    let (feed, start) = (feed(), Instant::now());
    let texts: Vec<_> = (0..ENDPOINTS_MAX).map(|number| format!("/{number}")).collect();
    for texts in texts.chunks(100) {
        feed.tell_by(1, &texts.iter().map(String::as_str).collect::<Vec<_>>());
    }
    feed.sends().await;
    advance(FRESH * 2).await;
    feed.tell(&["/one more"]);
    assert!(feed.sends().await.endpoints().contains(&"/one more".to_owned()), "it is sent");
    assert_eq!(feed.summary().endpoints, ENDPOINTS_MAX);
    let forgotten = Instant::now();
    let join = |since| feed.join(ClientHistory::Since(since), Some(start)).1.unwrap().coverage;
    advance(Duration::from_secs(1)).await;
    feed.tell(&["/1"]);
    assert_eq!(join(start), Coverage::Complete);
    assert_eq!(join(forgotten), Coverage::Exact);
}

#[tokio::test(start_paused = true)]
async fn who_was_just_caught_up_is_told_so_once_more_after_the_next_message() {
    let feed = feed();
    feed.learn(&endpoints(&["/known"]));
    let (viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
    assert_eq!(catch_up.unwrap().coverage, Coverage::Complete);
    let (other, _) = feed.join(ClientHistory::Nothing, None);
    // One has gone, and one has left.
    let (gone, _) = feed.join(ClientHistory::Nothing, None);
    drop(gone);
    let (Viewer { outbox: _left, subscription }, _) = feed.join(ClientHistory::Nothing, None);
    drop(subscription);
    advance(Duration::from_secs(1)).await;
    feed.tell(&["/a", "/known"]);
    let out = feed.sends().await;
    // The others get theirs as it came.
    assert_eq!(payload(&out.outgoing.broadcast)["timestamp"], 1.5);
    let repeats = repeated(&out);
    assert_eq!(repeats.len(), 2);
    for (expected, (outbox, texts)) in [&viewer, &other].into_iter().zip(&repeats) {
        assert!(Arc::ptr_eq(outbox, &expected.outbox));
        assert_eq!(texts, &["/a", "/known", EVENT, MEDIA, ARTISTS]);
    }
    assert_eq!(out.repeats[0].sub_topic, feed.topics()[0].sub_topic);
    // Once for each message within the time.
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    let texts = ["/b", "/a", "/known", EVENT, MEDIA, ARTISTS].map(str::to_owned);
    assert_eq!(repeated(&out)[0].1, texts);
    feed.tell(&["/c"]);
    assert!(feed.sends().await.repeats.is_empty());
}

/// The second of two catch-ups makes a client forget the first.
#[tokio::test(start_paused = true)]
async fn who_joins_again_at_once_is_told_what_it_was_told_at_first() {
    let (feed, start) = (feed(), Instant::now());
    feed.learn(&endpoints(&["/known"]));
    advance(FRESH).await;
    let (viewer, catch_up) = feed.join(ClientHistory::Nothing, Some(start));
    let all = listed(&catch_up.unwrap().broadcast);
    assert_eq!(all, [EVENT, MEDIA, ARTISTS, "/known"]);
    feed.tell(&["/a"]);
    let again = || viewer.join(&feed, ClientHistory::Held, Some(start));
    assert_eq!(listed(&again().unwrap().broadcast), [&["/a".into()], &*all].concat());
    // Another client is not it.
    let (_other, catch_up) = feed.join(ClientHistory::Held, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/a"]);
    let out = feed.sends().await;
    assert_eq!(repeated(&out).len(), 1, "of the last alone");
    advance(CARRY * 2).await;
    assert_eq!(listed(&again().unwrap().broadcast), ["/a"]);
}

#[tokio::test(start_paused = true)]
async fn a_catch_up_is_repeated_for_so_long_and_no_longer() {
    for (late, is_repeated) in [(0, true), (1, false)] {
        let feed = feed();
        let (_viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
        assert!(catch_up.is_some());
        advance(CARRY - SETTLE + Duration::from_millis(late)).await;
        feed.tell(&["/a"]);
        assert_eq!(feed.sends().await.repeats.len(), usize::from(is_repeated));
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_says_all_of_a_catch_up_is_not_followed_by_it() {
    let (feed, start) = (feed(), Instant::now());
    advance(FRESH).await;
    feed.tell(&["/a"]);
    let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/a"]);
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    assert_eq!(out.endpoints(), ["/a", "/b"]);
    assert!(out.repeats.is_empty());
}

/// Who joins between two messages would else forget the first when the second comes.
#[tokio::test(start_paused = true)]
async fn a_catch_up_says_what_everybody_was_just_told() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell(&["/a"]);
    feed.sends().await;
    advance(Duration::from_secs(1)).await;
    // It needs nothing from before this moment, but for the carried endpoint.
    feed.learn(&endpoints(&["/b"]));
    let since = Instant::now();
    assert!(feed.join(ClientHistory::Since(since), Some(start)).1.is_none());
    feed.tell(&["/b"]);
    let (_viewer, catch_up) = feed.join(ClientHistory::Since(since), Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast), ["/b", "/a"]);
}

/// An event whose server has run for ten seconds, and that time.
async fn feed_of_a_running_server() -> (Feed, Instant) {
    let (feed, started) = (feed(), Instant::now());
    advance(Duration::from_secs(10)).await;
    (feed, started)
}

#[tokio::test(start_paused = true)]
async fn what_takes_a_messages_place_reaches_back_to_its_first_change() {
    let (feed, started) = feed_of_a_running_server().await;
    feed.tell(&["/before"]);
    assert_eq!(feed.sends().await.outgoing.since, Some(Since::at(Instant::now(), started)));
    advance(Duration::from_secs(10)).await;
    let first_change = Instant::now();
    feed.mute(Some(first_change + Duration::from_secs(3600)));
    feed.tell(&["/a"]);
    advance(Duration::from_secs(60)).await;
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    assert_eq!(out.endpoints(), ["/a", "/b"]);
    let since = out.outgoing.since.unwrap();
    assert_eq!(since, Since::at(first_change, started));
    advance(Duration::from_secs(60)).await;
    let (viewer, catch_up) = feed.join(ClientHistory::Behind(since), Some(started));
    let CatchUp { broadcast, cause, coverage, since: again, .. } = catch_up.unwrap();
    assert_eq!((cause, coverage), (CatchUpCause::SlowClient, Coverage::Exact));
    assert_eq!((listed(&broadcast), again), (vec!["/a".to_owned(), "/b".to_owned()], since));
    // What was not heard, or is of ever, is told as a whole.
    for (since, covered_since) in [(since, Instant::now()), (Since::EVER, started)] {
        let catch_up =
            viewer.join(&feed, ClientHistory::Behind(since), Some(covered_since)).unwrap();
        assert_eq!((catch_up.coverage, catch_up.since), (Coverage::Complete, Since::EVER));
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_to_who_was_just_caught_up_reaches_back_as_far_as_the_catch_up() {
    let (feed, started) = feed_of_a_running_server().await;
    feed.tell(&["/a"]);
    feed.sends().await;
    let a = Since::at(Instant::now() - SETTLE, started);
    advance(2 * CARRY).await;
    let (_fresh, caught_up) = feed.join(ClientHistory::Fresh, Some(started));
    let (_unknown, complete) = feed.join(ClientHistory::Nothing, None);
    let asked = Instant::now().checked_sub(FRESH).map_or(Since::EVER, |at| Since::at(at, started));
    assert!(asked <= a, "what it is told of has changed since");
    assert_eq!((caught_up.unwrap().since, complete.unwrap().since), (asked, Since::EVER));
    feed.tell(&["/b"]);
    let out = feed.sends().await;
    let repeated: Vec<_> = out.repeats.iter().map(|repeat| repeat.since).collect();
    assert_eq!(repeated, [Some(asked), Some(Since::EVER)]);
}

#[tokio::test(start_paused = true)]
async fn nothing_takes_the_place_of_what_could_not_be_told_afterwards() {
    let (feed, started) = feed_of_a_running_server().await;
    // It names nothing.
    feed.tell(&[]);
    assert_eq!(feed.sends().await.outgoing.since, None);
    let texts: Vec<_> = (0..ENDPOINTS_MAX).map(|number| format!("/{number}")).collect();
    for part in texts.chunks(ENDPOINTS_MAX / 4) {
        feed.tell(&part.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let since = feed.sends().await.outgoing.since;
    assert!(since.is_some());
    // It is not remembered.
    advance(CARRY).await;
    feed.tell(&["/one/too/many"]);
    let forgotten = Since::at(Instant::now(), started);
    assert_eq!(feed.sends().await.outgoing.since, None);
    let (_viewer, catch_up) = feed.join(ClientHistory::Behind(forgotten), Some(started));
    assert_eq!(catch_up.unwrap().coverage, Coverage::Complete);
}
