//! When a feed sends, and what each message names.

use serde_json::json;
use tokio::time::advance;

use super::*;
use crate::{
    hub::outbox::{Committed, Departure},
    invalidation::{
        catch_up::ClientHistory,
        outgoing::ToSend,
        reason::{GapCause, LinkLoss, SendReason},
        tests::{ARTISTS, CARRY, EVENT, MEDIA, WINDOW, endpoints, feed, feed_with, listed, user},
    },
    protocol::{message::Json, serializer::Broadcast},
};

#[tokio::test(start_paused = true)]
async fn the_first_message_leaves_once_its_transaction_can_say_no_more() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell(&["/a"]);
    let out = feed.sends().await;
    assert_eq!((out.at - start, out.reason()), (SETTLE, SendReason::Leading));
    assert!(feed.next_sent().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn what_comes_within_the_window_leaves_at_its_end_in_one_message() {
    let feed = feed();
    feed.tell(&["/a"]);
    let first = feed.sends().await;
    advance(CARRY).await;
    feed.tell(&["/b", "/c"]);
    let second = feed.sends().await;
    assert_eq!(second.reason(), SendReason::Leading, "the window is long over");
    for texts in [["/d", "/c"], ["/c", "/e"], ["/f", "/a"]] {
        advance(Duration::from_millis(900)).await;
        feed.tell(&texts);
    }
    let third = feed.sends().await;
    assert_eq!((third.at - second.at, third.reason()), (WINDOW, SendReason::Window));
    // In the order in which they were first seen; then what is carried.
    assert_eq!(third.endpoints(), ["/d", "/c", "/e", "/f", "/a", "/b"]);
    assert_eq!(third.payload()["merged"], 3);
    assert!(first.at < second.at);
    assert!(feed.next_sent().await.is_none());
}

/// One who writes without a pause would else hold the first message back for good.
#[tokio::test(start_paused = true)]
async fn a_transaction_is_waited_for_as_long_as_it_goes_on_and_fifty_milliseconds_at_most() {
    let (feed, start) = (feed(), Instant::now());
    for _ in 0..4 {
        feed.tell_by(1, &["/a"]);
        assert!(matches!(feed.due(false), ToSend::Later));
        advance(SETTLE - Duration::from_millis(1)).await;
    }
    assert_eq!(feed.sends().await.at - start, Duration::from_millis(37));
    advance(CARRY * 2).await;
    let start = Instant::now();
    let mut sent = None;
    while sent.is_none() {
        feed.tell_by(1, &["/a"]);
        advance(SETTLE - Duration::from_millis(1)).await;
        if let ToSend::Send(_) = feed.due(false) {
            sent = Some(start.elapsed());
        }
    }
    // The first look after 50 ms.
    assert_eq!(sent, Some(Duration::from_millis(54)));
}

#[tokio::test(start_paused = true)]
async fn another_sessions_message_joins_those_that_wait_and_prolongs_nothing() {
    let (feed, start) = (feed(), Instant::now());
    feed.tell_by(1, &["/a"]);
    advance(SETTLE - Duration::from_millis(1)).await;
    feed.tell_by(2, &["/b"]);
    let out = feed.sends().await;
    assert_eq!(out.at - start, SETTLE);
    assert_eq!(out.endpoints(), ["/a", "/b"]);
}

/// The end of an auction changes 24 artworks in one transaction, in which all messages have the
/// same timestamp: clients take the first of those.
#[tokio::test(start_paused = true)]
async fn what_one_transaction_says_is_one_message_whatever_the_window() {
    let feed = feed();
    for expected in [SendReason::Leading, SendReason::Window] {
        for art in 0..24 {
            feed.tell_by(7, &[EVENT, &format!("/art/{art}")]);
        }
        let out = feed.sends().await;
        assert_eq!((out.reason(), out.endpoints().len()), (expected, 25));
        assert_eq!(out.payload()["merged"], 24);
        assert!(feed.next_sent().await.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_alone_and_clean_passes_byte_for_byte() {
    let feed = feed();
    let envelope =
        r#"{ "event":"cache_invalidation","payload":{"endpoints":["/c"]},"type":"broadcast" }"#;
    for broadcast in [
        user(r#"{ "timestamp":1.50, "endpoints":["/a", "/a"] }"#),
        // Nothing is carried that it does not say itself.
        user(r#"{"endpoints":["/b","/c","/a"],"x":1e2}"#),
        user(r#"{"endpoints":["/c","/a","/b"]}"#),
    ] {
        assert!(feed.offer_all(vec![broadcast.clone()], None).rest.is_empty());
        assert_eq!(feed.sends().await.outgoing.broadcast, broadcast);
    }
    for broadcast in
        [user(r#"{"no_list":true}"#), Broadcast::Envelope(Json::parse(envelope.into()).unwrap())]
    {
        advance(CARRY * 2).await;
        assert!(feed.offer_all(vec![broadcast.clone()], None).rest.is_empty());
        assert_eq!(feed.sends().await.outgoing.broadcast, broadcast);
    }
}

/// A `null` in the list throws in clients.
#[tokio::test(start_paused = true)]
async fn a_list_with_something_else_than_texts_is_written_anew() {
    let feed = feed();
    feed.take(r#"{"type":"t","endpoints":["/a",null,7,"/b"],"timestamp":1.5}"#, 1);
    let out = feed.sends().await;
    let payload = out.payload();
    assert_eq!((out.endpoints(), &payload["merged"]), (vec!["/a".into(), "/b".into()], &json!(1)));
    assert_ne!(payload["timestamp"], 1.5);
}

/// Clients forget a message that is followed too soon by another.
#[tokio::test(start_paused = true)]
async fn what_was_just_sent_is_said_again_and_that_is_not_said_again() {
    let feed = feed();
    feed.tell(&["/a"]);
    feed.sends().await;
    feed.tell(&["/b"]);
    let second = feed.sends().await;
    assert_eq!(
        (second.endpoints(), &second.payload()["merged"]),
        (vec!["/b".into(), "/a".into()], &json!(1))
    );
    feed.tell(&["/c"]);
    assert_eq!(feed.sends().await.endpoints(), ["/c", "/b"]);
    feed.tell(&["/d"]);
    assert_eq!(feed.sends().await.endpoints(), ["/d", "/c"]);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_is_carried_for_so_long_and_no_longer() {
    for (late, is_carried) in [(0, true), (1, false)] {
        let feed = feed();
        feed.tell(&["/a"]);
        feed.sends().await;
        advance(CARRY - SETTLE + Duration::from_millis(late)).await;
        feed.tell(&["/b"]);
        let out = feed.sends().await;
        assert_eq!(out.endpoints().contains(&"/a".to_owned()), is_carried);
    }
}

#[tokio::test(start_paused = true)]
async fn a_union_of_two_hundred_is_listed_and_one_more_stands_for_everything() {
    let texts: Vec<_> = (0..=UNION_MAX).map(|number| format!("/{number:03}")).collect();
    for count in [UNION_MAX, UNION_MAX + 1] {
        let feed = feed();
        for text in &texts[..count] {
            feed.tell_by(1, &[text]);
        }
        let out = feed.sends().await;
        let resync = [EVENT, MEDIA, ARTISTS];
        let listed = out.endpoints();
        if count > UNION_MAX {
            let all = resync.into_iter().chain(texts.iter().map(String::as_str));
            assert_eq!(listed, all.collect::<Vec<_>>());
        } else {
            assert_eq!(listed, texts[..count]);
        }
        assert_eq!(out.payload()["merged"], json!(count));
    }
}

#[tokio::test(start_paused = true)]
async fn a_pointer_stands_for_everything_of_the_event() {
    let feed = feed();
    feed.learn(&endpoints(&["/known"]));
    feed.tell(&["/seen"]);
    feed.take(r#"{"type":"t","pointer":true,"id":7}"#, 1);
    feed.tell(&["/late"]);
    let out = feed.sends().await;
    assert_eq!(out.endpoints(), [EVENT, MEDIA, ARTISTS, "/known", "/late", "/seen"]);
    // Alone it is no list that clients could use, and never passes as it came.
    advance(CARRY * 2).await;
    feed.take(r#"{"type":"t","pointer":true,"endpoints":[],"id":8}"#, 1);
    let out = feed.sends().await;
    assert_eq!((out.endpoints().len(), &out.payload()["id"]), (6, &json!(8)));
}

#[tokio::test(start_paused = true)]
async fn without_a_window_only_what_was_sent_together_is_merged() {
    let feed = feed_with(|merge| merge.window = Duration::ZERO);
    for number in 0..9 {
        let start = Instant::now();
        feed.tell_by(1, &["/a"]);
        feed.tell_by(1, &["/b"]);
        let out = feed.sends().await;
        assert_eq!((out.at - start, out.reason()), (SETTLE, SendReason::Leading), "{number}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_muted_event_is_told_leaves_in_one_message_afterwards() {
    let (feed, start) = (feed(), Instant::now());
    let over = start + Duration::from_secs(600);
    feed.mute(Some(over));
    for second in 0..300 {
        feed.tell(&[&format!("/{}", second % 7)]);
        assert!(matches!(feed.due(false), ToSend::Later));
        advance(Duration::from_secs(1)).await;
    }
    assert_eq!(feed.summary().muted_for, Some(Duration::from_secs(300)));
    assert_eq!(feed.summary().pending, 300);
    // Who joins meanwhile is told all the same.
    let (_viewer, catch_up) = feed.join(ClientHistory::Fresh, Some(start));
    assert_eq!(listed(&catch_up.unwrap().broadcast).len(), 7);
    let out = feed.sends().await;
    assert_eq!((out.at, out.endpoints().len()), (over, 7));
    feed.tell(&["/a"]);
    assert_eq!(feed.sends().await.at - over, WINDOW, "the window holds on");
    assert_eq!(feed.summary().muted_for, None);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_muted_no_more_says_at_once_what_waited() {
    let feed = feed();
    feed.mute(Some(Instant::now() + Duration::from_secs(600)));
    feed.tell(&["/a"]);
    advance(Duration::from_secs(60)).await;
    let start = Instant::now();
    assert!(matches!(feed.due(false), ToSend::Later));
    feed.mute(None);
    let out = feed.sends().await;
    assert_eq!((out.at, out.endpoints()), (start, vec!["/a".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn at_the_servers_end_nothing_waits() {
    for is_muted in [false, true] {
        let feed = feed();
        feed.tell(&["/a"]);
        feed.sends().await;
        feed.tell(&["/b"]);
        if is_muted {
            feed.mute(Some(Instant::now() + Duration::from_secs(600)));
        }
        assert!(matches!(feed.due(false), ToSend::Later));
        let ToSend::Send(outgoing) = feed.due(true) else { panic!() };
        assert_eq!(listed(&outgoing.broadcast), ["/b", "/a"]);
        assert!(matches!(feed.due(true), ToSend::Nothing));
    }
}

#[tokio::test(start_paused = true)]
async fn a_gap_that_is_known_is_told_as_it_is_and_any_other_as_everything() {
    let feed = feed();
    feed.learn(&endpoints(&["/known"]));
    let cause = CatchUpCause::Gap(GapCause::Link(LinkLoss::Silent));
    let start = Instant::now();
    feed.offer_gap(cause, Some(&endpoints(&["/b", "/a"])), start);
    let out = feed.sends().await;
    assert_eq!((out.at - start, out.reason()), (SETTLE, SendReason::Gap));
    let said = out.payload();
    let timestamp = &said["timestamp"];
    let expected = json!({
        "type": "catch_up", "event_eid": "AB3028", "cause": "silent",
        "endpoints": ["/b", "/a"], "timestamp": timestamp,
    });
    assert!(timestamp.is_f64());
    assert_eq!(said, expected);
    assert_eq!((out.outgoing.delivery.cause, out.outgoing.delivery.merged), (Some(cause), 0));

    advance(CARRY * 2).await;
    let earliest = Instant::now() + Duration::from_secs(4);
    feed.offer_gap(CatchUpCause::Gap(GapCause::Start), None, earliest);
    let out = feed.sends().await;
    assert_eq!(out.at, earliest);
    assert_eq!(out.payload()["cause"], "start");
    assert_eq!(out.endpoints(), [EVENT, MEDIA, ARTISTS, "/a", "/b", "/known"]);
}

#[tokio::test(start_paused = true)]
async fn a_gap_and_what_is_told_meanwhile_leave_together_when_the_window_allows() {
    let feed = feed();
    feed.tell(&["/a"]);
    let first = feed.sends().await;
    feed.tell(&["/b"]);
    feed.offer_gap(
        CatchUpCause::Gap(GapCause::QueueFull),
        Some(&endpoints(&["/c"])),
        Instant::now(),
    );
    feed.tell(&["/d"]);
    let out = feed.sends().await;
    assert_eq!((out.at - first.at, out.reason()), (WINDOW, SendReason::Gap));
    assert_eq!(out.endpoints(), ["/b", "/c", "/d", "/a"]);
    let said = out.payload();
    // It stands for the newest message.
    assert_eq!((&said["type"], &said["merged"]), (&json!("t"), &json!(2)));
    assert!(feed.next_sent().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_gap_of_which_nothing_is_known_swallows_what_is() {
    let feed = feed();
    feed.tell(&["/a"]);
    feed.offer_gap(CatchUpCause::Gap(GapCause::Start), None, Instant::now());
    feed.offer_gap(CatchUpCause::Gap(GapCause::Start), Some(&endpoints(&["/b"])), Instant::now());
    feed.tell(&["/c"]);
    assert_eq!(feed.sends().await.endpoints(), [EVENT, MEDIA, ARTISTS, "/a", "/b", "/c"]);
}

#[tokio::test(start_paused = true)]
async fn a_message_has_the_moment_of_the_oldest_that_it_stands_for() {
    let feed = feed();
    let start = Instant::now();
    let tell = |committed| {
        let payload = json!({ "endpoints": ["/a"] }).to_string();
        let notified = Notified { pid: 1, committed };
        assert!(feed.offer_all(vec![user(&payload)], Some(notified)).rest.is_empty());
    };
    let ago = |millis| Some(start - Duration::from_millis(millis));
    for committed in [None, ago(20), ago(30), None, ago(10)] {
        tell(committed);
    }
    let out = feed.sends().await.outgoing;
    let moment = |at: Option<Instant>, departure| at.map(|at| Committed { at, departure });
    assert_eq!(out.committed, moment(ago(30), Departure::AtOnce));
    assert_eq!(out.waited, None);
    // The window's end, with what has come meanwhile.
    advance(Duration::from_secs(1)).await;
    tell(ago(5));
    advance(Duration::from_millis(500)).await;
    tell(Some(start));
    let out = feed.sends().await.outgoing;
    assert_eq!(out.committed, moment(ago(5), Departure::Merged));
    assert_eq!(out.waited, Some(WINDOW - Duration::from_secs(1)));
    // Nobody knows when what a gap has hidden was committed.
    feed.offer_gap(CatchUpCause::Gap(GapCause::Start), None, Instant::now());
    assert_eq!(feed.sends().await.outgoing.committed, None);
    feed.offer_gap(CatchUpCause::Gap(GapCause::Start), None, Instant::now() + WINDOW);
    tell(Some(start));
    let out = feed.sends().await.outgoing;
    assert_eq!(out.committed, moment(Some(start), Departure::Merged));
}
