//! Which events have series of their own: the busiest, so that nobody fills Prometheus by naming
//! events. The rest share `other`.
//!
//! Invariants: the number of places is bounded, and an event keeps its place until a much busier one
//! needs it; nothing is counted twice, and a counter that is shown only grows: what an event was sent
//! counts in its own series, which begin at zero, while it keeps its place, and else in those of
//! `other`, which do not inherit what an event leaves behind.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
};

use super::metrics::{Metrics, OTHER_EVENTS};
use crate::{access::NOTIFY_CHANNEL_BYTES_MAX, invalidation::Tally};

/// Who has a place.
#[derive(Debug, Default)]
pub(crate) struct Busiest {
    places: HashSet<Box<str>>,
}

/// What is known of the events of one id, whatever their rules.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Row {
    pub(super) viewers: usize,
    /// Something was published for it, or the database knows it.
    pub(super) is_known: bool,
    /// Seconds since 1970; 0 if never.
    pub(super) last_notification: f64,
    /// Since the last look.
    pub(super) tally: Tally,
}

impl Row {
    /// Notes another event of the same id.
    pub(super) fn add(&mut self, other: &Self) {
        self.viewers += other.viewers;
        self.is_known |= other.is_known;
        self.last_notification = self.last_notification.max(other.last_notification);
        self.tally += other.tally;
    }

    /// Whether it takes this one's place. What nobody has ever published for takes nobody's, or who
    /// invents events would make others lose theirs; and one that is hardly busier does not, or
    /// places would change hands all the time.
    fn displaces(&self, holder: &Self) -> bool {
        self.is_known && (!holder.is_known || self.viewers > 2 * holder.viewers)
    }
}

impl Busiest {
    /// Assigns the places, at most `max`, and sets the gauges of all events.
    pub(super) fn show(&mut self, metrics: &Metrics, events: &HashMap<&str, Row>, max: usize) {
        let before = self.places.clone();
        self.give_places(events, max);
        for lost in before.difference(&self.places) {
            metrics.forget_event(lost);
        }
        let mut other = Row::default();
        for (eid, row) in events {
            let (had, has) = (before.contains(*eid), self.places.contains(*eid));
            if has {
                metrics.show_event(eid, row.viewers, row.last_notification);
            } else {
                other.viewers += row.viewers;
            }
            if had && has {
                metrics.count_event(eid, row.tally);
            } else {
                other.tally += row.tally;
            }
        }
        metrics.count_event(OTHER_EVENTS, other.tally);
        metrics.show_viewers(OTHER_EVENTS, other.viewers);
    }

    fn give_places(&mut self, events: &HashMap<&str, Row>, max: usize) {
        self.places.retain(|eid| events.contains_key(&**eid));
        let row = |eid: &str| events.get(eid).copied().unwrap_or_default();
        // Few of thousands are looked at, so that they are not sorted.
        let mut candidates: BinaryHeap<_> = events
            .iter()
            .filter(|(eid, row)| row.viewers > 0 && may_have_a_place(eid))
            .filter(|(eid, _)| !self.places.contains(**eid))
            .map(|(eid, row)| rank(eid, row))
            .collect();
        while let Some((_, _, Reverse(eid))) = candidates.pop() {
            if self.places.len() >= max {
                let weakest = self.places.iter().min_by(|a, b| {
                    let (of_a, of_b) = (row(a), row(b));
                    rank(a, &of_a).cmp(&rank(b, &of_b))
                });
                // Nor will one that is less busy find a place.
                let Some(weakest) =
                    weakest.filter(|place| row(eid).displaces(&row(place))).cloned()
                else {
                    break;
                };
                self.places.remove(&weakest);
            }
            self.places.insert(eid.into());
        }
    }
}

/// The busiest is the greatest.
fn rank<'a>(eid: &'a str, row: &Row) -> (bool, usize, Reverse<&'a str>) {
    (row.is_known, row.viewers, Reverse(eid))
}

/// Whether the id is short, as those are that the database can tell of, and not taken.
fn may_have_a_place(eid: &str) -> bool {
    eid != OTHER_EVENTS && eid.len() <= NOTIFY_CHANNEL_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::telemetry::metrics::Registry;

    /// One gateway's events, and what is shown of them.
    struct Scene {
        registry: Registry,
        metrics: Metrics,
        busiest: Busiest,
    }

    impl Default for Scene {
        fn default() -> Self {
            let registry = Registry::new();
            Self { metrics: Metrics::new(&registry), registry, busiest: Busiest::default() }
        }
    }

    fn known(viewers: usize, notifications: u64) -> Row {
        let tally = Tally { notifications, deliveries: notifications * 10, merged: 1 };
        Row { viewers, is_known: true, last_notification: 7.5, tally }
    }

    fn unknown(viewers: usize) -> Row {
        Row { viewers, ..Row::default() }
    }

    impl Scene {
        /// The series of one metric after a look at these events.
        fn look(&mut self, max: usize, events: &[(&str, Row)]) -> BTreeMap<String, f64> {
            let events: HashMap<_, _> = events.iter().copied().collect();
            self.busiest.show(&self.metrics, &events, max);
            self.series("event_notifications_total")
        }

        fn series(&self, metric: &str) -> BTreeMap<String, f64> {
            let text = String::from_utf8(self.registry.render()).unwrap();
            let name = format!("tidegate_{metric}{{eid=\"");
            let series = text.lines().filter_map(|line| line.strip_prefix(&*name));
            let series = series.map(|line| line.split_once("\"} ").unwrap());
            series.map(|(eid, value)| (eid.to_owned(), value.parse().unwrap())).collect()
        }
    }

    fn are<const N: usize>(expected: [(&str, f64); N]) -> BTreeMap<String, f64> {
        expected.map(|(eid, value)| (eid.to_owned(), value)).into()
    }

    #[test]
    fn an_event_counts_for_itself_from_the_look_that_gives_it_a_place() {
        let mut scene = Scene::default();
        // A rate sees an increment only after a first sample.
        assert_eq!(scene.look(2, &[("a", known(1, 5))]), are([("a", 0.0), ("other", 5.0)]));
        assert_eq!(scene.look(2, &[("a", known(3, 2))]), are([("a", 2.0), ("other", 5.0)]));
        assert_eq!(scene.series("event_deliveries_total"), are([("a", 20.0), ("other", 50.0)]));
        assert_eq!(scene.series("event_merged_total"), are([("a", 1.0), ("other", 1.0)]));
        assert_eq!(scene.series("event_viewers"), are([("a", 3.0), ("other", 0.0)]));
        let last = "event_last_notification_timestamp_seconds";
        assert_eq!(scene.series(last), are([("a", 7.5)]));
    }

    #[test]
    fn who_loses_its_place_adds_to_the_rest_only_what_has_come_since() {
        let mut scene = Scene::default();
        scene.look(1, &[("a", known(5, 0))]);
        let before = scene.look(1, &[("a", known(5, 100)), ("b", known(1, 1))]);
        assert_eq!(before, are([("a", 100.0), ("other", 1.0)]));
        // `b` takes the place: what both have got since the last look is the rest's.
        let after = scene.look(1, &[("a", known(1, 3)), ("b", known(9, 4))]);
        assert_eq!(after, are([("b", 0.0), ("other", 8.0)]));
        assert_eq!(scene.series("event_viewers"), are([("b", 9.0), ("other", 1.0)]));
        let last = "event_last_notification_timestamp_seconds";
        assert_eq!(scene.series(last), are([("b", 7.5)]));
        // And back: its series start at zero, as those of a restarted process do.
        let again = scene.look(1, &[("a", known(30, 1)), ("b", known(9, 1))]);
        assert_eq!(again, are([("a", 0.0), ("other", 10.0)]));
        assert_eq!(scene.look(1, &[("a", known(30, 6))]), are([("a", 6.0), ("other", 10.0)]));
        // The last one is forgotten, and its count with it; the rest stays.
        assert_eq!(scene.look(1, &[]), are([("other", 10.0)]));
        assert_eq!(scene.series("event_viewers"), are([("other", 0.0)]));
    }

    #[test]
    fn whatever_happens_no_counter_that_stays_falls_and_each_notification_is_counted_once() {
        let mut scene = Scene::default();
        let (mut shown, mut total, mut gone) = (BTreeMap::new(), 0, 0.0);
        let mut random = fastrand::Rng::with_seed(5);
        let eids: Vec<_> = (0..12).map(|number| format!("AB{number}")).collect();
        for _ in 0..500 {
            let mut events: HashMap<&str, Row> = HashMap::new();
            for eid in &eids {
                let (is_there, is_known) = (random.u8(..4) > 0, random.bool());
                if is_there {
                    events.insert(eid, Row { is_known, ..known(random.usize(..50), 3) });
                    total += 3;
                }
            }
            scene.busiest.show(&scene.metrics, &events, 4);
            let now = scene.series("event_notifications_total");
            assert!(now.len() <= 5, "{now:?}");
            for (eid, before) in shown {
                match now.get(&eid) {
                    Some(after) => assert!(*after >= before, "{eid}: {before}, then {after}"),
                    None => gone += before,
                }
            }
            shown = now;
        }
        assert_eq!(shown.values().sum::<f64>() + gone, f64::from(total));
        assert!(gone > 0.0, "places have changed hands");
    }

    #[test]
    fn a_place_is_kept_until_one_needs_it_that_is_twice_as_busy() {
        let mut scene = Scene::default();
        let has_place = |scene: &mut Scene, events: &[(&str, Row)]| {
            let series = scene.look(1, events);
            series.into_keys().find(|eid| eid != OTHER_EVENTS)
        };
        for (a, b, expected) in
            [(4, 4, "a"), (4, 8, "a"), (0, 0, "a"), (4, 9, "b"), (9, 9, "b"), (1, 0, "a")]
        {
            let holder = has_place(&mut scene, &[("a", known(a, 0)), ("b", known(b, 0))]);
            assert_eq!(holder.as_deref(), Some(expected), "{a} {b}");
        }
    }

    /// Anybody may join an event that does not exist.
    #[test]
    fn invented_events_take_free_places_alone() {
        let mut scene = Scene::default();
        let shown = scene.look(2, &[("invented", unknown(50)), ("real", known(1, 0))]);
        assert_eq!(shown, are([("invented", 0.0), ("other", 0.0), ("real", 0.0)]));
        let events = [
            ("invented", unknown(1)),
            ("invented2", unknown(50)),
            ("real", known(1, 0)),
            ("real2", known(1, 0)),
        ];
        assert_eq!(scene.look(2, &events), are([("other", 0.0), ("real", 0.0), ("real2", 0.0)]));
    }

    #[test]
    fn without_places_everything_is_the_rests() {
        let mut scene = Scene::default();
        assert_eq!(scene.look(0, &[("a", known(5, 2))]), are([("other", 2.0)]));
        assert_eq!(scene.series("event_viewers"), are([("other", 5.0)]));
    }

    #[test]
    fn an_id_that_is_taken_or_long_has_no_place() {
        let (long, longest) = ("x".repeat(64), "x".repeat(63));
        let mut scene = Scene::default();
        let events = [("other", known(9, 1)), (&*long, known(9, 1)), (&*longest, known(9, 1))];
        assert_eq!(scene.look(3, &events), are([("other", 3.0), (&longest, 0.0)]));
        assert_eq!(scene.series("event_viewers"), are([("other", 18.0), (&longest, 9.0)]));
    }
}
