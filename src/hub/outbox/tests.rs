//! What an outbox takes, replaces and refuses.

use std::{
    collections::HashMap,
    iter,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::FutureExt;
use tokio::task::JoinSet;

use super::*;

fn outbox(bytes_max: usize) -> Outbox {
    Outbox::new(Serializer::V1, &OutboxBounds::new(bytes_max, usize::MAX))
}

/// Of a topic that has this letter.
fn replaceable(topic: char, since: u32) -> Replaceable {
    Replaceable { topic: TopicId::of_hash(u64::from(topic) << 1), since: Since(since) }
}

/// Pushes a message of a topic. Returns whether it is queued.
fn offer(outbox: &Outbox, text: &'static str, topic: char, since: u32) -> bool {
    outbox.push_replaceable(Frame::text(text), replaceable(topic, since))
}

/// What there is for the connection at once: the frames' texts, and what else.
fn drained(outbox: &Outbox) -> Option<(Vec<String>, Drained)> {
    let mut batch = VecDeque::new();
    let drained = outbox.drain(&mut batch).now_or_never()?.unwrap();
    let texts =
        batch.into_iter().map(|queued| queued.frame.to_text().unwrap().to_owned()).collect();
    Some((texts, drained))
}

fn frames(texts: &[&str]) -> Option<(Vec<String>, Drained)> {
    let texts = texts.iter().map(|text| (*text).to_owned()).collect();
    Some((texts, Drained::Frames(None)))
}

fn behind(topic: char, since: u32) -> Option<(Vec<String>, Drained)> {
    Some((Vec::new(), Drained::Behind(replaceable(topic, since))))
}

#[test]
fn a_batch_keeps_the_order_of_pushes() {
    let outbox = outbox(16);
    outbox.push(Frame::text("a")).unwrap();
    assert!(offer(&outbox, "b", 't', 1));
    outbox.push(Frame::text("c")).unwrap();
    assert_eq!(drained(&outbox), frames(&["a", "b", "c"]));
    assert_eq!(drained(&outbox), None);
}

fn committed(departure: Departure, ago: u64) -> Option<Committed> {
    Some(Committed { at: Instant::now() - Duration::from_secs(ago), departure })
}

#[tokio::test(start_paused = true)]
async fn a_batch_has_the_moment_of_the_oldest_of_it_that_has_one() {
    let outbox = outbox(16);
    let (mut batch, a) = (VecDeque::new(), || iter::once(Frame::text("a")));
    outbox.push_all(a(), committed(Departure::AtOnce, 1), Kind::Own).unwrap();
    outbox.push_all(a(), committed(Departure::Merged, 3), Kind::Own).unwrap();
    outbox.push_all(a(), committed(Departure::AtOnce, 2), Kind::Own).unwrap();
    outbox.push(Frame::text("a")).unwrap();
    let oldest = Drained::Frames(committed(Departure::Merged, 3));
    assert_eq!((outbox.drain(&mut batch).await, batch.len()), (Ok(oldest), 4));
    // It has left with them; and what sends nothing has none.
    outbox.push_all(iter::empty(), committed(Departure::AtOnce, 1), Kind::Own).unwrap();
    outbox.push(Frame::text("a")).unwrap();
    batch.clear();
    assert_eq!(outbox.drain(&mut batch).await, Ok(Drained::Frames(None)));
}

#[test]
fn an_empty_outbox_takes_a_frame_of_any_size() {
    assert_eq!(outbox(1).push(Frame::text("abc")), Ok(()));
    assert!(offer(&outbox(1), "abc", 't', 1));
}

#[test]
fn a_backlog_is_taken_at_the_bound_and_refused_one_past_it() {
    let outbox = outbox(4);
    outbox.push(Frame::text("abc")).unwrap();
    assert_eq!(outbox.push(Frame::text("d")), Ok(()));
    assert_eq!(outbox.push(Frame::text("e")), Err(Ended::SlowConsumer));
}

#[test]
fn what_can_be_replaced_is_taken_at_the_bound_and_conflated_one_past_it() {
    let outbox = outbox(4);
    assert!(offer(&outbox, "abc", 't', 7));
    assert!(offer(&outbox, "d", 't', 8));
    assert!(!outbox.is_empty_and_told());
    assert!(!offer(&outbox, "e", 't', 9));
    // While it is behind, nothing is said of the topic.
    assert!(!offer(&outbox, "f", 't', 5));
    assert_eq!(drained(&outbox), behind('t', 5));
    assert!(offer(&outbox, "g", 't', 10));
    assert_eq!(drained(&outbox), frames(&["g"]));
    assert!(outbox.is_empty_and_told());
}

#[test]
fn what_cannot_be_replaced_keeps_its_place_and_its_order() {
    let outbox = outbox(5);
    outbox.push(Frame::text("ab")).unwrap();
    assert!(offer(&outbox, "cd", 't', 1));
    assert!(offer(&outbox, "e", 'u', 2));
    outbox.push(Frame::text("fg")).unwrap();
    // There is no room for a third topic, either, and nobody who is in nobody's way is closed.
    assert!(!offer(&outbox, "hi", 'v', 3));
    assert_eq!(drained(&outbox), frames(&["ab", "fg"]));
    // One after the other, so that what is said of one is written before the next.
    assert_eq!(drained(&outbox), behind('t', 1));
    assert!(offer(&outbox, "j", 't', 1));
    assert_eq!(drained(&outbox), frames(&["j"]));
    assert_eq!(drained(&outbox), behind('u', 2));
    assert_eq!(drained(&outbox), behind('v', 3));
    assert_eq!(drained(&outbox), None);
}

#[test]
fn what_cannot_be_replaced_still_ends_a_client_that_does_not_read_it() {
    let outbox = outbox(4);
    outbox.push(Frame::text("abc")).unwrap();
    assert!(offer(&outbox, "d", 't', 1));
    outbox.push(Frame::text("e")).unwrap();
    assert_eq!(outbox.push(Frame::text("f")), Err(Ended::SlowConsumer));
    assert!(outbox.is_behind());
}

#[test]
fn who_has_not_been_told_is_behind_to_the_end() {
    let outbox = outbox(1);
    assert!(offer(&outbox, "a", 't', 1));
    assert!(!outbox.is_behind());
    assert!(!offer(&outbox, "b", 't', 1));
    outbox.end(Ended::Draining);
    assert!(outbox.is_behind());
    assert_eq!(outbox.push(Frame::text("c")), Err(Ended::Draining));
}

#[tokio::test]
async fn who_is_written_to_learns_when_something_is_held_up() {
    let outbox = Arc::new(outbox(8));
    for is_end in [false, true] {
        assert!(offer(&outbox, "a", 't', 1));
        let mut tasks = JoinSet::new();
        let waiting = Arc::clone(&outbox);
        tasks.spawn(async move { waiting.interrupted(true, false).await });
        tokio::task::yield_now().await;
        assert!(tasks.try_join_next().is_none(), "it can be replaced");
        if is_end {
            outbox.end(Ended::Draining);
        } else {
            outbox.push(Frame::text("fact")).unwrap();
        }
        let expected =
            if is_end { Interruption::Ended(Ended::Draining) } else { Interruption::HeldUp };
        assert_eq!(tasks.join_all().await, [expected]);
        drained(&outbox);
    }
}

#[test]
fn a_moment_is_never_later_than_what_it_was_made_of() {
    let started = Instant::now();
    for (millis, seconds) in [(0, 0), (999, 0), (1_000, 1), (1_999, 1), (86_400_500, 86_400)] {
        let at = started + Duration::from_millis(millis);
        let moment = Since::at(at, started).moment(started);
        // The first second is ever.
        let expected = (seconds > 0).then(|| started + Duration::from_secs(seconds));
        assert_eq!(moment, expected);
    }
    assert_eq!(Since::EVER.moment(started), None);
    assert!(Since::EVER < Since(1));
}

#[test]
fn what_waits_is_small() {
    assert_eq!(size_of::<Queued>(), size_of::<Frame>() + 24);
}

/// Changes are noted before they are pushed, as an event does, and who falls behind is told what
/// is noted: then every change reaches the client, by its own message or by what replaces it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pushes_and_drains_race_and_nothing_is_missed_or_left() {
    const CHANGES: u32 = 20_000;
    let outbox = Arc::new(outbox(64));
    let noted: Arc<HashMap<char, AtomicUsize>> =
        Arc::new(['t', 'u'].map(|topic| (topic, AtomicUsize::new(0))).into());
    let mut publishing = JoinSet::new();
    for topic in ['t', 'u'] {
        let (outbox, noted) = (Arc::clone(&outbox), Arc::clone(&noted));
        publishing.spawn(async move {
            for change in 1..=CHANGES {
                noted[&topic].store(change as usize, Ordering::SeqCst);
                let frame = iter::once(Frame::text(format!("{topic}{change}")));
                let of = Kind::Replaceable(replaceable(topic, change));
                assert!(outbox.push_all(frame, None, of).unwrap() <= 1);
                if change % 64 == 0 {
                    tokio::task::yield_now().await;
                }
            }
        });
    }
    let mut told: HashMap<char, Vec<bool>> =
        ['t', 'u'].map(|topic| (topic, vec![false; CHANGES as usize + 1])).into();
    let (mut batch, mut conflations) = (VecDeque::new(), 0);
    loop {
        let is_over = publishing.is_empty();
        while let Some(joined) = publishing.try_join_next() {
            joined.unwrap();
        }
        match outbox.drain(&mut batch).now_or_never() {
            Some(Ok(Drained::Behind(Replaceable { topic, since }))) => {
                conflations += 1;
                let letter =
                    ['t', 'u'].into_iter().find(|letter| replaceable(*letter, 0).topic == topic);
                let letter = letter.unwrap();
                let last = noted[&letter].load(Ordering::SeqCst);
                told.get_mut(&letter).unwrap()[since.0 as usize..=last].fill(true);
            }
            Some(drained) => assert_eq!(drained, Ok(Drained::Frames(None))),
            None if is_over => break,
            None => {}
        }
        for Queued { frame, .. } in batch.drain(..) {
            let (topic, change) = frame.to_text().unwrap().split_at(1);
            let topic = topic.chars().next().unwrap();
            told.get_mut(&topic).unwrap()[change.parse::<usize>().unwrap()] = true;
        }
        tokio::task::yield_now().await;
    }
    assert!(conflations > 0, "the client is never too slow");
    for (topic, told) in told {
        let missed: Vec<_> = (1..told.len()).filter(|number| !told[*number]).collect();
        assert_eq!(missed, Vec::<usize>::new(), "of {topic}");
    }
    assert!(outbox.is_empty_and_told());
}

impl Outbox {
    fn is_empty_and_told(&self) -> bool {
        let state = self.state.lock();
        state.frames.is_empty() && state.bytes == 0 && state.behind.is_empty()
    }
}

#[test]
fn what_is_queued_when_an_outbox_is_ended_is_still_written() {
    let outbox = outbox(16);
    outbox.push(Frame::text("a")).unwrap();
    outbox.end(Ended::Draining);
    assert_eq!(outbox.push(Frame::text("b")), Err(Ended::Draining));
    assert_eq!(drained(&outbox), frames(&["a"]));
    let ended = outbox.drain(&mut VecDeque::new()).now_or_never().unwrap();
    assert_eq!(ended, Err(Ended::Draining));
}

#[test]
fn the_highest_backlog_of_all_is_remembered_for_two_turns() {
    let bounds = OutboxBounds::new(8, usize::MAX);
    let [low, high] = [(); 2].map(|()| Outbox::new(Serializer::V1, &bounds));
    high.push(Frame::text("abc")).unwrap();
    high.push(Frame::text("de")).unwrap();
    drained(&high);
    low.push(Frame::text("f")).unwrap();
    assert_eq!(bounds.highest(), 5);
    bounds.turn();
    low.push(Frame::text("g")).unwrap();
    assert_eq!(bounds.highest(), 5);
    bounds.turn();
    assert_eq!(bounds.highest(), 2);
    bounds.turn();
    assert_eq!(bounds.highest(), 0);
}

#[tokio::test]
async fn overflow_empties_the_queue_and_is_final() {
    let outbox = outbox(3);
    outbox.push(Frame::text("abc")).unwrap();
    assert_eq!(outbox.push(Frame::text("d")), Err(Ended::SlowConsumer));
    assert_eq!(outbox.push(Frame::text("")), Err(Ended::SlowConsumer));
    assert_eq!(outbox.drain(&mut VecDeque::new()).await, Err(Ended::SlowConsumer));
}

#[test]
fn what_a_connection_is_to_look_at_goes_before_every_frame() {
    let outbox = outbox(16);
    outbox.push(Frame::text("a")).unwrap();
    outbox.nudge();
    outbox.end(Ended::Draining);
    assert_eq!(drained(&outbox), Some((Vec::new(), Drained::Notice(Notice::Nudged))));
    assert_eq!(drained(&outbox), frames(&["a"]));
    outbox.nudge();
    let interrupted = |is_ending| outbox.interrupted(true, is_ending).now_or_never();
    assert_eq!(interrupted(false), Some(Interruption::Notice(Notice::Nudged)));
    assert_eq!(interrupted(false), Some(Interruption::Ended(Ended::Draining)));
    assert_eq!(interrupted(true), None);
}

#[test]
fn who_is_behind_is_told_once_the_frames_before_have_left_whatever_has_come_since() {
    let outbox = outbox(2 * BATCH_BYTES);
    let long: &'static str = "x".repeat(BATCH_BYTES).leak();
    for _ in 0..2 {
        outbox.push(Frame::text(long)).unwrap();
    }
    assert!(!offer(&outbox, "a", 't', 1));
    for _ in 0..2 {
        // Whenever one has left, another comes: it is never empty.
        assert_eq!(drained(&outbox), frames(&[long]));
        outbox.push(Frame::text(long)).unwrap();
    }
    assert_eq!(drained(&outbox), behind('t', 1));
    assert_eq!(drained(&outbox), frames(&[long]));
}

#[test]
fn a_long_queue_leaves_in_short_batches() {
    let outbox = outbox(8 * BATCH_BYTES);
    let half: &'static str = "x".repeat(BATCH_BYTES / 2).leak();
    let longer: &'static str = "y".repeat(BATCH_BYTES + 1).leak();
    for text in [half, half, half, longer, half] {
        outbox.push(Frame::text(text)).unwrap();
    }
    for expected in [&[half, half] as &[_], &[half], &[longer], &[half]] {
        assert_eq!(drained(&outbox), frames(expected));
    }
    assert!(outbox.is_empty_and_told());
}

/// Pushes a broadcast of an ordinary topic that has this letter.
fn say(outbox: &Outbox, text: &'static str, topic: char) -> bool {
    let kind = Kind::Ordinary(replaceable(topic, 0).topic);
    outbox.push_all(iter::once(Frame::text(text)), None, kind).unwrap() == 1
}

fn overflowed(topic: char) -> Option<(Vec<String>, Drained)> {
    Some((Vec::new(), Drained::Notice(Notice::Overflowed(replaceable(topic, 0).topic))))
}

#[test]
fn an_ordinary_topic_that_does_not_fit_ends_alone_and_the_largest_first() {
    let outbox = outbox(8);
    assert!(say(&outbox, "aaaa", 'a'));
    assert!(say(&outbox, "bb", 'b'));
    // The topic that takes most of the room makes room, though another asks for it.
    assert!(say(&outbox, "ccc", 'c'));
    assert!(!say(&outbox, "a", 'a'));
    // It asks for most itself.
    assert!(!say(&outbox, "dddd", 'd'));
    assert_eq!(drained(&outbox), overflowed('d'));
    assert_eq!(drained(&outbox), overflowed('a'));
    assert_eq!(drained(&outbox), frames(&["bb", "ccc"]));
}

#[test]
fn what_a_rule_says_takes_the_room_of_ordinary_topics() {
    let outbox = outbox(8);
    assert!(say(&outbox, "aaaa", 'a'));
    assert!(say(&outbox, "bbb", 'b'));
    outbox.push(Frame::text("own")).unwrap();
    let ruled = Kind::Ruled(replaceable('r', 0).topic);
    assert_eq!(outbox.push_all(iter::once(Frame::text("rule")), None, ruled), Ok(1));
    assert_eq!(drained(&outbox), overflowed('b'));
    assert_eq!(drained(&outbox), overflowed('a'));
    assert_eq!(drained(&outbox), frames(&["own", "rule"]));
}

#[test]
fn nothing_is_left_of_a_topic_that_is_forgotten() {
    let outbox = outbox(8);
    assert!(say(&outbox, "aaa", 'a'));
    assert!(offer(&outbox, "tttt", 't', 1));
    assert!(!offer(&outbox, "tt", 't', 2));
    outbox.push(Frame::text("own")).unwrap();
    for topic in ['a', 't'] {
        outbox.forget(replaceable(topic, 0).topic);
    }
    assert_eq!(drained(&outbox), frames(&["own"]));
    assert!(outbox.is_empty_and_told());
}
