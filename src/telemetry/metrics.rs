//! How metrics are made: a registry, and families whose label values are closed sets.
//!
//! Invariants: all series of a closed set exist at zero from the start, so that a rate over a
//! counter sees its first increment, and each is resolved once: where something is counted, a short
//! search finds its series. Nothing here knows what is measured, and there is no static: two servers
//! of one process count apart.

use std::marker::PhantomData;

use parking_lot::Mutex;
pub(crate) use prometheus::{
    Counter as SecondsCounter, Histogram, IntCounter as Counter, IntCounterVec as CounterOpen,
    IntGauge as Gauge, IntGaugeVec as GaugeOpen,
};
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, Opts, TextEncoder,
    core::{AtomicF64, Collector, GenericGaugeVec},
    process_collector::ProcessCollector,
};
use strum::{VariantArray, VariantNames};

use crate::clock::unix_seconds;

/// From a quarter of a millisecond to ten seconds: three buckets a decade, so that a quantile is
/// off by a factor of 2.5 at most.
pub(crate) const LATENCY_BUCKETS: [f64; 15] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
];

/// A gauge of a fraction or of seconds.
pub(crate) type NumberGauge = prometheus::core::GenericGauge<AtomicF64>;
/// Counters by the values of one label or several.
pub(crate) type CounterBy<L, const N: usize = 1> = By<L, Counter, N>;
/// Gauges by the values of one label or several.
pub(crate) type GaugeBy<L, const N: usize = 1> = By<L, Gauge, N>;
/// Gauges of fractions or of seconds by the values of a label.
pub(crate) type NumberGaugeBy<L> = By<L, NumberGauge>;
/// Histograms by the values of a label.
pub(crate) type HistogramBy<L> = By<L, Histogram>;
/// Gauges of fractions or of seconds by a label whose values are not a closed set.
pub(crate) type NumberOpen = GenericGaugeVec<AtomicF64>;

/// A closed set of values of `N` labels.
pub(crate) trait Label<const N: usize = 1>: Sized {
    /// Every value; one that occurs twice is one series.
    fn all() -> impl Iterator<Item = [&'static str; N]>;

    /// The values of the labels, in the order in which the labels are named.
    fn values(&self) -> [&'static str; N];
}

/// An enum without data: each variant is a value, by the name that `strum` gives it.
impl<T: VariantArray + Copy + Into<&'static str>> Label for T {
    fn all() -> impl Iterator<Item = [&'static str; 1]> {
        T::VARIANTS.iter().map(|value| [(*value).into()])
    }

    fn values(&self) -> [&'static str; 1] {
        [(*self).into()]
    }
}

/// The name of an error: one of a closed set, whatever data the error carries.
#[derive(Debug)]
pub(crate) struct Named<E>(&'static str, PhantomData<fn(E)>);

impl<'a, E> From<&'a E> for Named<E>
where
    &'a E: Into<&'static str>,
{
    fn from(error: &'a E) -> Self {
        Self(error.into(), PhantomData)
    }
}

impl<E: VariantNames> Label for Named<E> {
    fn all() -> impl Iterator<Item = [&'static str; 1]> {
        E::VARIANTS.iter().map(|value| [*value])
    }

    fn values(&self) -> [&'static str; 1] {
        [self.0]
    }
}

/// `ok`, or the name of an error.
#[derive(Debug)]
pub(crate) struct OkOr<E>(&'static str, PhantomData<fn(E)>);

impl<'a, T, E> From<&'a Result<T, E>> for OkOr<E>
where
    &'a E: Into<&'static str>,
{
    fn from(result: &'a Result<T, E>) -> Self {
        Self(result.as_ref().map_or_else(Into::into, |_| "ok"), PhantomData)
    }
}

impl<E: VariantNames> Label for OkOr<E> {
    fn all() -> impl Iterator<Item = [&'static str; 1]> {
        ["ok"].into_iter().chain(E::VARIANTS.iter().copied()).map(|value| [value])
    }

    fn values(&self) -> [&'static str; 1] {
        [self.0]
    }
}

/// Metrics of one name, one for each value of its labels.
#[derive(Debug, Clone)]
pub(crate) struct By<L, M, const N: usize = 1> {
    each: Vec<([&'static str; N], M)>,
    /// Counts what its type does not list; on no page, and a debug build stops.
    unlisted: M,
    label: PhantomData<fn(L)>,
}

impl<L: Label<N>, M: Clone, const N: usize> By<L, M, N> {
    fn new(resolve: impl Fn(&[&'static str; N]) -> M, unlisted: M) -> Self {
        let mut each: Vec<([&'static str; N], M)> = Vec::new();
        for values in L::all() {
            if !each.iter().any(|(known, _)| *known == values) {
                each.push((values, resolve(&values)));
            }
        }
        Self { each, unlisted, label: PhantomData }
    }

    /// The metric of this value.
    pub(crate) fn of(&self, label: impl Into<L>) -> &M {
        let values = label.into().values();
        let found = self.each.iter().find(|(known, _)| *known == values);
        debug_assert!(found.is_some(), "{values:?} is not listed");
        found.map_or(&self.unlisted, |(_, metric)| metric)
    }
}

/// The metrics of one server. Names get the prefix `tidegate_`.
#[derive(Debug)]
pub struct Registry {
    registry: prometheus::Registry,
    open: Mutex<Vec<OpenFamily>>,
}

/// A family whose label values the database or an operator decides: it has no series at first.
#[derive(Debug, Clone)]
pub struct OpenFamily {
    /// The name without its prefix.
    pub name: String,
    /// `counter` or `gauge`.
    pub kind: &'static str,
    /// The names of its labels.
    pub labels: Vec<String>,
}

#[expect(clippy::expect_used, reason = "names are literals; a test makes all metrics")]
impl Registry {
    /// A registry with the version and the process' own metrics.
    pub(crate) fn new() -> Self {
        let registry = Self { registry: prometheus::Registry::new(), open: Mutex::default() };
        let info = GaugeOpen::new(opts("build_info", "Always 1."), &["version"]);
        let info = registry.register(info.expect("names are valid"));
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry
            .registry
            .register(Box::new(ProcessCollector::for_self()))
            .expect("names are distinct");
        registry
    }

    /// A counter.
    pub(crate) fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(Counter::with_opts(opts(name, help)).expect("names are valid"))
    }

    /// A counter of seconds.
    pub(crate) fn seconds_counter(&self, name: &str, help: &str) -> SecondsCounter {
        self.register(SecondsCounter::with_opts(opts(name, help)).expect("names are valid"))
    }

    /// Counters by `labels`, each at zero.
    pub(crate) fn counter_by<L: Label<N>, const N: usize>(
        &self,
        name: &str,
        labels: [&str; N],
        help: &str,
    ) -> CounterBy<L, N> {
        let all = CounterOpen::new(opts(name, help), &labels).expect("names are valid");
        let all = self.register(all);
        let unlisted = Counter::with_opts(opts(name, help)).expect("names are valid");
        By::new(|values| all.with_label_values(values), unlisted)
    }

    /// Counters by labels whose values the database or an operator decides.
    pub(crate) fn counter_open<const N: usize>(
        &self,
        name: &str,
        labels: [&str; N],
        help: &str,
    ) -> CounterOpen {
        self.note_open(name, "counter", &labels);
        self.register(CounterOpen::new(opts(name, help), &labels).expect("names are valid"))
    }

    /// A gauge.
    pub(crate) fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(opts(name, help)).expect("names are valid"))
    }

    /// Gauges by `labels`, each at zero.
    pub(crate) fn gauge_by<L: Label<N>, const N: usize>(
        &self,
        name: &str,
        labels: [&str; N],
        help: &str,
    ) -> GaugeBy<L, N> {
        let all = GaugeOpen::new(opts(name, help), &labels).expect("names are valid");
        let all = self.register(all);
        let unlisted = Gauge::with_opts(opts(name, help)).expect("names are valid");
        By::new(|values| all.with_label_values(values), unlisted)
    }

    /// Gauges by labels whose values the database or an operator decides.
    pub(crate) fn gauge_open<const N: usize>(
        &self,
        name: &str,
        labels: [&str; N],
        help: &str,
    ) -> GaugeOpen {
        self.note_open(name, "gauge", &labels);
        self.register(GaugeOpen::new(opts(name, help), &labels).expect("names are valid"))
    }

    /// A gauge of a fraction or of seconds.
    pub(crate) fn number(&self, name: &str, help: &str) -> NumberGauge {
        self.register(NumberGauge::with_opts(opts(name, help)).expect("names are valid"))
    }

    /// Gauges of fractions or of seconds by `label`, each at zero.
    pub(crate) fn number_by<L: Label>(
        &self,
        name: &str,
        label: &str,
        help: &str,
    ) -> NumberGaugeBy<L> {
        let all = NumberOpen::new(opts(name, help), &[label]).expect("names are valid");
        let all = self.register(all);
        let unlisted = NumberGauge::with_opts(opts(name, help)).expect("names are valid");
        By::new(|values| all.with_label_values(values), unlisted)
    }

    /// Gauges of fractions or of seconds by a label whose values the database decides.
    pub(crate) fn number_open(&self, name: &str, label: &str, help: &str) -> NumberOpen {
        self.note_open(name, "gauge", &[label]);
        self.register(NumberOpen::new(opts(name, help), &[label]).expect("names are valid"))
    }

    /// A histogram of seconds, with [`LATENCY_BUCKETS`].
    pub(crate) fn latency(&self, name: &str, help: &str) -> Histogram {
        self.histogram(name, help, &LATENCY_BUCKETS)
    }

    /// A histogram.
    pub(crate) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts).expect("names are valid"))
    }

    /// Histograms by `label`, each empty.
    pub(crate) fn histogram_by<L: Label>(
        &self,
        name: &str,
        label: &str,
        help: &str,
        buckets: &[f64],
    ) -> HistogramBy<L> {
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
        let unlisted = Histogram::with_opts(opts.clone()).expect("names are valid");
        let all = self.register(HistogramVec::new(opts, &[label]).expect("names are valid"));
        By::new(|values| all.with_label_values(values), unlisted)
    }

    /// The families that have no series at first.
    #[must_use]
    pub fn open_families(&self) -> Vec<OpenFamily> {
        self.open.lock().clone()
    }

    /// Everything that is measured, in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        // Writing into memory does not fail, and a half-written scrape is better than none.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }

    fn note_open(&self, name: &str, kind: &'static str, labels: &[&str]) {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.open.lock().push(OpenFamily { name: name.to_owned(), kind, labels });
    }

    fn register<M: Collector + Clone + 'static>(&self, metric: M) -> M {
        self.registry.register(Box::new(metric.clone())).expect("names are distinct");
        metric
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("tidegate")
}

/// `number` as the value of a gauge.
pub(crate) fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Sets a timestamp to now.
pub(crate) fn set_now(timestamp: &NumberGauge) {
    timestamp.set(unix_seconds());
}

/// Counts something in a gauge while it exists.
#[derive(Debug)]
pub(crate) struct GaugeGuard(Gauge);

impl GaugeGuard {
    /// Counts one more, until it is dropped.
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, VariantArray, strum::IntoStaticStr)]
    #[strum(serialize_all = "snake_case")]
    enum Colour {
        DarkRed,
        Blue,
    }

    #[derive(Debug, VariantNames, strum::IntoStaticStr)]
    #[strum(serialize_all = "snake_case")]
    #[expect(dead_code, reason = "its data is not a label")]
    enum Fault {
        #[strum(serialize = "lost")]
        Gone(u8),
        #[strum(serialize = "lost")]
        Away,
        Late,
    }

    struct Pair(Colour);

    impl Label<2> for Pair {
        fn all() -> impl Iterator<Item = [&'static str; 2]> {
            Colour::VARIANTS.iter().map(|colour| Self(*colour).values())
        }

        fn values(&self) -> [&'static str; 2] {
            [self.0.into(), "x"]
        }
    }

    fn series(registry: &Registry) -> Vec<String> {
        let text = String::from_utf8(registry.render()).unwrap();
        let ours = text.lines().filter(|line| line.starts_with("tidegate_m"));
        ours.map(str::to_owned).collect()
    }

    #[test]
    fn every_series_of_a_closed_set_exists_at_zero() {
        let registry = Registry::new();
        let colours: CounterBy<Colour> = registry.counter_by("m_a", ["colour"], "A.");
        let pairs: GaugeBy<Pair, 2> = registry.gauge_by("m_b", ["colour", "more"], "B.");
        let faults: CounterBy<OkOr<Fault>> = registry.counter_by("m_c", ["result"], "C.");
        colours.of(Colour::Blue).inc();
        pairs.of(Pair(Colour::DarkRed)).set(3);
        for result in [Ok(()), Err(Fault::Gone(1)), Err(Fault::Away), Err(Fault::Late)] {
            faults.of(&result).inc();
        }
        let expected = [
            r#"tidegate_m_a{colour="blue"} 1"#,
            r#"tidegate_m_a{colour="dark_red"} 0"#,
            r#"tidegate_m_b{colour="blue",more="x"} 0"#,
            r#"tidegate_m_b{colour="dark_red",more="x"} 3"#,
            r#"tidegate_m_c{result="late"} 1"#,
            r#"tidegate_m_c{result="lost"} 2"#,
            r#"tidegate_m_c{result="ok"} 1"#,
        ];
        assert_eq!(series(&registry), expected);
    }

    #[test]
    fn two_servers_of_one_process_count_apart() {
        let (a, b) = (Registry::new(), Registry::new());
        let (a, b) = (a.counter("m", "M."), b.counter("m", "M."));
        a.inc();
        assert_eq!((a.get(), b.get()), (1, 0));
    }

    #[test]
    fn a_guard_counts_while_it_exists() {
        let gauge = Registry::new().gauge("m", "M.");
        let guard = GaugeGuard::new(&gauge);
        assert_eq!(gauge.get(), 1);
        drop(guard);
        assert_eq!(gauge.get(), 0);
    }
}
