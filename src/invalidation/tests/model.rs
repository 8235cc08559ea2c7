//! A feed against a model of what it must say, whatever happens to it.

use std::{collections::BTreeSet, mem, time::Duration};

use proptest::prelude::*;
use tokio::time::{Instant, sleep_until};

use super::{ARTISTS, CARRY, EVENT, MEDIA, Out, WINDOW, feed, listed, payload, repeated, stamp};
use crate::invalidation::{
    catch_up::ClientHistory,
    outgoing::ToSend,
    reason::{CatchUpCause, GapCause},
    window::SETTLE_MAX,
};

/// Something that happens to a feed.
#[derive(Debug, Clone)]
enum Step {
    Told { pid: u32, endpoints: BTreeSet<u8> },
    Pointer,
    Gap { missed: Option<BTreeSet<u8>>, spread: u64 },
    Joined,
}

fn steps() -> impl Strategy<Value = Vec<(u64, Step)>> {
    let endpoints = || prop::collection::btree_set(0_u8..12, 0..4);
    let step = prop_oneof![
        12 => (1_u32..4, endpoints()).prop_map(|(pid, endpoints)| Step::Told { pid, endpoints }),
        1 => Just(Step::Pointer),
        1 => (prop::option::of(endpoints()), 0_u64..5_000)
            .prop_map(|(missed, spread)| Step::Gap { missed, spread }),
        2 => Just(Step::Joined),
    ];
    let pause = prop_oneof![3 => 0_u64..12, 2 => 0_u64..1_500, 1 => 0_u64..9_000];
    prop::collection::vec((pause, step), 1..120)
}

/// What the feed must send, computed as simply as possible.
#[derive(Debug, Default)]
struct Model {
    seen: BTreeSet<String>,
    own: BTreeSet<String>,
    is_everything: bool,
    offered: Option<Instant>,
    may_wait_for: Duration,
    sent: Vec<(Instant, BTreeSet<String>)>,
    caught_up: Vec<(Instant, BTreeSet<String>)>,
    stamps: BTreeSet<String>,
}

impl Model {
    fn offer(&mut self, endpoints: &[String], spread: Duration) {
        self.seen.extend(endpoints.iter().cloned());
        self.own.extend(endpoints.iter().cloned());
        self.offered.get_or_insert_with(Instant::now);
        self.may_wait_for = self.may_wait_for.max(WINDOW.max(spread) + SETTLE_MAX);
    }

    fn check(&mut self, out: &Out) {
        let waited = out.at - self.offered.take().expect("only what was offered is sent");
        assert!(waited <= self.may_wait_for, "{waited:?}");
        if let Some((before, _)) = self.sent.last() {
            assert!(out.at - *before >= WINDOW, "{:?}", out.at - *before);
        }
        let mut own = mem::take(&mut self.own);
        if mem::take(&mut self.is_everything) {
            own.extend([EVENT, MEDIA, ARTISTS].map(str::to_owned));
            own.extend(self.seen.iter().cloned());
        }
        let carried = self.sent.iter().filter(|(at, _)| out.at - *at <= CARRY);
        let mut expected = own.clone();
        expected.extend(carried.flat_map(|(_, own)| own.iter().cloned()));
        let said: Vec<_> = out.endpoints();
        let set: BTreeSet<_> = said.iter().cloned().collect();
        assert_eq!(set.len(), said.len(), "each once");
        assert_eq!(set, expected);
        self.caught_up.retain(|(at, _)| out.at - *at <= CARRY);
        let missing = self.caught_up.iter().filter(|(_, it)| !it.is_subset(&set));
        let both: Vec<BTreeSet<_>> =
            missing.map(|(_, it)| it.union(&set).cloned().collect()).collect();
        let repeats = repeated(out).into_iter();
        assert_eq!(both, repeats.map(|(_, texts)| texts.into_iter().collect()).collect::<Vec<_>>());
        self.sent.push((out.at, own));
        self.may_wait_for = Duration::ZERO;
        if payload(&out.outgoing.broadcast)["timestamp"] != 1.5 {
            assert!(self.stamps.insert(stamp(&out.outgoing.broadcast)), "of its own");
        }
    }
}

/// Plays the steps, and sends what is due in between.
async fn play(steps: Vec<(u64, Step)>) {
    let texts = |numbers: &BTreeSet<u8>| {
        numbers.iter().map(|number| format!("/{number}")).collect::<Vec<_>>()
    };
    let (feed, mut model) = (feed(), Model::default());
    let mut viewers = Vec::new();
    for (pause, step) in steps {
        let until = Instant::now() + Duration::from_millis(pause);
        while feed.next().is_some_and(|next| next <= until) {
            sleep_until(feed.next().unwrap()).await;
            if let ToSend::Send(outgoing) = feed.due(false) {
                model.check(&Out::new(&feed, outgoing));
            }
        }
        sleep_until(until).await;
        match step {
            Step::Told { pid, endpoints } => {
                let texts = texts(&endpoints);
                feed.tell_by(pid, &texts.iter().map(String::as_str).collect::<Vec<_>>());
                model.offer(&texts, Duration::ZERO);
            }
            Step::Pointer => {
                feed.take(r#"{"pointer":true,"timestamp":1.0}"#, 9);
                model.is_everything = true;
                model.offer(&[], Duration::ZERO);
            }
            Step::Gap { missed, spread } => {
                let spread = Duration::from_millis(spread);
                let missed = missed.map(|numbers| texts(&numbers));
                let list = missed.iter().flatten().map(|text| Box::from(text.as_str())).collect();
                let earliest = Instant::now() + spread;
                feed.offer_gap(
                    CatchUpCause::Gap(GapCause::Start),
                    missed.as_ref().map(|_| &list),
                    earliest,
                );
                model.is_everything |= missed.is_none();
                model.offer(&missed.unwrap_or_default(), spread);
            }
            Step::Joined => {
                let (viewer, catch_up) = feed.join(ClientHistory::Nothing, None);
                let texts = listed(&catch_up.unwrap().broadcast).into_iter().collect();
                model.caught_up.push((Instant::now(), texts));
                viewers.push(viewer);
            }
        }
    }
    while let Some(out) = feed.next_sent().await {
        model.check(&out);
    }
    assert_eq!(model.offered, None, "everything has left");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Never two messages within a window; each says exactly what was offered since the one
    /// before, and what is carried; nothing stays behind.
    #[test]
    fn whatever_happens_every_endpoint_leaves_with_the_next_message(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(play(steps));
    }
}
