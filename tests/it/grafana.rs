//! What `grafana/` says of metrics is what the code exports: the reference table, both ways, and
//! every name in boards, rules and runbook.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use tidegate::metrics::Metrics;

/// Sets of label values: how a series of a metric can be named.
type Values = BTreeMap<String, BTreeSet<String>>;

/// A metric as `/metrics` shows it, or as the table does.
#[derive(Debug, Default, PartialEq, Eq)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
}

fn read(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What the code exports, with the values of labels that it has from the start.
fn exported() -> BTreeMap<String, (Metric, Values)> {
    let metrics = Metrics::new();
    // What is counted and looked at decides the values of these; at first they have no series.
    metrics.channels_ended.with_label_values(&["left"]);
    metrics.client_versions.with_label_values(&["1"]);
    metrics.http_requests.with_label_values(&["/", "200"]);
    metrics.relay_gaps.with_label_values(&["closed"]);
    metrics.database_triggers.with_label_values(&["art", "INSERT"]);
    metrics.database_drift.with_label_values(&["function"]);
    metrics.database_writes.with_label_values(&["art"]);
    metrics.database_history_rows.with_label_values(&["art"]);

    let text = String::from_utf8(metrics.render()).unwrap();
    let mut exported = BTreeMap::<String, (Metric, Values)>::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("# TYPE ") {
            let (name, kind) = head.split_once(' ').unwrap();
            name.clone_into(&mut family);
            exported.entry(family.clone()).or_default().0.kind = kind.to_owned();
        } else if let Some((_, rest)) = line.split_once('{') {
            let (metric, values) = exported.entry(family.clone()).or_default();
            for pair in rest.split_once('}').unwrap().0.split(',') {
                let (label, value) = pair.split_once('=').unwrap();
                if label != "le" {
                    metric.labels.insert(label.to_owned());
                    let value = value.trim_matches('"').to_owned();
                    values.entry(label.to_owned()).or_default().insert(value);
                }
            }
        }
    }
    exported
}

/// The rows of the reference, and the values of labels that they list.
fn documented() -> BTreeMap<String, (Metric, Values)> {
    let mut documented = BTreeMap::new();
    for line in read("grafana/README.md").lines() {
        let Some(row) = line.strip_prefix("| `") else { continue };
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let &[name, kind, _unit, labels, meaning, _what_to_do, ""] = &*cells else {
            panic!("a row of another shape: {line}");
        };
        let name = name.trim_end_matches('`');
        assert!(!meaning.is_empty(), "{name} has no meaning");
        let mut values = Values::new();
        let mut metric = Metric { kind: kind.to_owned(), ..Metric::default() };
        for part in labels.split('`').skip(1).collect::<Vec<_>>().chunks(2) {
            metric.labels.insert(part[0].to_owned());
            let listed = part.get(1).and_then(|rest| rest.split_once('(')?.1.split_once(')'));
            if let Some((listed, _)) = listed {
                let listed = listed.split(", ").map(str::to_owned).collect();
                values.insert(part[0].to_owned(), listed);
            }
        }
        assert!(documented.insert(name.to_owned(), (metric, values)).is_none(), "{name} twice");
    }
    documented
}

#[test]
fn the_reference_of_metrics_is_the_codes_own() {
    let (exported, documented) = (exported(), documented());
    let of = |all: &BTreeMap<String, (Metric, Values)>| {
        all.iter()
            .map(|(name, (metric, _))| format!("{name} {} {:?}", metric.kind, metric.labels))
            .collect::<BTreeSet<_>>()
    };
    let (code, table) = (of(&exported), of(&documented));
    let lacking: Vec<_> = code.difference(&table).collect();
    let wrong: Vec<_> = table.difference(&code).collect();
    assert!(
        lacking.is_empty() && wrong.is_empty(),
        "not in grafana/README.md as the code has it: {lacking:#?}\nnot in the code: {wrong:#?}"
    );
    for (name, (_, values)) in &documented {
        for (label, listed) in values {
            assert_eq!(exported[name].1.get(label), Some(listed), "{name}{{{label}}}");
        }
    }
}

#[test]
fn the_reference_names_settings_that_exist() {
    let defaults: toml::Table = include_str!("../../src/defaults.toml").parse().unwrap();
    for word in read("grafana/README.md").split('`').skip(1).step_by(2) {
        if let Some((section, field)) = word.split_once('.')
            && let Some(section) = defaults.get(section).and_then(toml::Value::as_table)
        {
            assert!(section.contains_key(field), "there is no setting {word}");
        }
    }
}
