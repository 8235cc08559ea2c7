//! Stamps, and what has been heard.

use std::{collections::BTreeSet, time::Duration};

use super::*;
use crate::invalidation::{
    payload::Stamp,
    tests::{feed, feed_with, stamp},
};

/// Clients drop what has the timestamp of another message.
#[tokio::test(start_paused = true)]
async fn every_message_of_ours_has_a_timestamp_of_its_own() {
    let feed = feed_with(|merge| merge.window = Duration::ZERO);
    // The clock has been set back an hour; and it may stand still between two messages.
    let hour = Stamp(3_600_000_000 + feed.state.lock().stamps.next().0);
    feed.state.lock().stamps.last = hour;
    let mut stamps = vec![hour.to_string()];
    let mut viewers = Vec::new();
    for number in 0..50 {
        let (viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
        stamps.push(stamp(&catch_up.unwrap().broadcast));
        viewers.push(viewer);
        feed.tell_by(1, &[&format!("/{number}")]);
        feed.tell_by(1, &[&format!("/{number}/b")]);
        let out = feed.sends().await;
        stamps.push(stamp(&out.outgoing.broadcast));
        // Those who get this one get no other.
        stamps.push(stamp(&out.repeats.last().unwrap().broadcast));
    }
    let different: BTreeSet<_> = stamps.iter().collect();
    assert_eq!(different.len(), stamps.len());
    assert!(stamps.is_sorted(), "each is later than those before");
}

#[test]
fn one_notification_that_names_no_row_is_enough_not_to_trust_the_history() {
    let feed = feed();
    assert_eq!(feed.heard(), Heard::Nothing);
    for (has_id, heard) in [
        (true, Heard::OnlyWithId),
        (true, Heard::OnlyWithId),
        (false, Heard::SomeWithoutId),
        (true, Heard::SomeWithoutId),
    ] {
        feed.hear(has_id);
        assert_eq!(feed.heard(), heard);
    }
}
