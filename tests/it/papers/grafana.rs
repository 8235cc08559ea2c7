//! What `grafana/` says of metrics is what the code exports: the reference table, both ways, and
//! every name in boards, rules and runbook.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde_json::{Value, json};
use tidegate::{
    server::{Config, Gateway},
    telemetry::metrics::OpenFamily,
};

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
    let gateway = Gateway::new(Config::defaults()).unwrap();
    let text = String::from_utf8(gateway.registry.render()).unwrap();
    let mut exported = BTreeMap::<String, (Metric, Values)>::new();
    // What is counted and looked at decides the values of these; at first they have no series.
    for OpenFamily { name, kind, labels } in gateway.registry.open_families() {
        let (metric, _) = exported.entry(format!("tidegate_{name}")).or_default();
        kind.clone_into(&mut metric.kind);
        metric.labels.extend(labels);
    }
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
    let defaults: toml::Table = include_str!("../../../src/server/defaults.toml").parse().unwrap();
    for word in read("grafana/README.md").split('`').skip(1).step_by(2) {
        if let Some((section, field)) = word.split_once('.')
            && let Some(section) = defaults.get(section).and_then(toml::Value::as_table)
        {
            assert!(section.contains_key(field), "there is no setting {word}");
        }
    }
}

/// Metrics that no board and no rule needs, each with its reason.
const UNUSED: [(&str, &str); 1] =
    [("process_virtual_memory_bytes", "address space; resident memory is what runs out")];

/// A board of `grafana/dashboards/`.
struct Board {
    name: String,
    json: Value,
}

impl Board {
    fn all() -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana/dashboards");
        let mut boards: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let text = fs::read_to_string(&path).unwrap();
                let json = serde_json::from_str(&text)
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                Self { name: path.file_stem().unwrap().to_string_lossy().into_owned(), json }
            })
            .collect();
        boards.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(boards.len(), 5);
        boards
    }

    fn panels(&self) -> &[Value] {
        self.json["panels"].as_array().unwrap()
    }

    /// Panel's title and expression of each query.
    fn queries(&self) -> impl Iterator<Item = (String, &str)> {
        self.panels().iter().flat_map(|panel| {
            let title = format!("{}: {}", self.name, panel["title"].as_str().unwrap_or_default());
            let targets = panel["targets"].as_array().unwrap().iter();
            targets.map(move |target| (title.clone(), target["expr"].as_str().unwrap()))
        })
    }

    /// Expressions of annotations and variables, which have rules of their own.
    fn other_queries(&self) -> impl Iterator<Item = &str> {
        let list = |name: &str| self.json[name]["list"].as_array().unwrap().iter();
        let annotations =
            list("annotations").map(|annotation| annotation["expr"].as_str().unwrap());
        annotations
            .chain(list("templating").filter_map(|variable| variable["query"]["query"].as_str()))
    }
}

/// A metric in an expression.
struct Used<'a> {
    /// As the code exports it: without `_bucket` and the like.
    name: &'a str,
    /// What stands before it.
    before: &'a str,
    /// What stands behind it.
    after: &'a str,
}

/// The metrics of an expression or a text, each of which must exist.
#[track_caller]
fn metrics_of<'a>(text: &'a str, exported: &BTreeMap<String, (Metric, Values)>) -> Vec<Used<'a>> {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(length) = text[at..].find(is_part) {
        let start = at + length;
        let end = text[start..]
            .find(|letter| !is_part(letter))
            .map_or(text.len(), |length| start + length);
        at = end;
        let word = &text[start..end];
        let recorded = text[end..].starts_with(':') || text[..start].ends_with(':');
        let is_metric = word.starts_with("tidegate_") || word.starts_with("process_");
        if !is_metric || recorded {
            continue;
        }
        let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
            let base = word.strip_suffix(suffix)?;
            exported.get(base).is_some_and(|(metric, _)| metric.kind == "histogram").then_some(base)
        });
        let name = histogram.unwrap_or(word);
        assert!(exported.contains_key(name), "{word} is no metric: {text}");
        found.push(Used { name, before: &text[..start], after: &text[end..] });
    }
    found
}

/// The labels that the braces behind a metric name.
fn matched_labels(after: &str) -> Vec<&str> {
    let Some((matchers, _)) = after.strip_prefix('{').and_then(|rest| rest.split_once('}')) else {
        return Vec::new();
    };
    let names = matchers.split(", ").map(|matcher| matcher.split(['=', '!']).next().unwrap());
    names.filter(|name| !name.is_empty()).collect()
}

#[test]
fn every_board_can_be_filtered_refreshed_and_left_for_another() {
    let mut uids = BTreeSet::new();
    for Board { name, json } in Board::all() {
        assert_eq!(json["uid"], format!("tidegate-{name}"));
        assert!(uids.insert(json["uid"].to_string()));
        assert!(json["title"].as_str().unwrap().starts_with("Tidegate: "), "{name}");
        assert!(json["description"].as_str().unwrap().len() > 20, "{name}");
        assert_eq!(json["tags"], json!(["tidegate"]), "{name}");
        assert_eq!(json["refresh"], "30s", "{name}");
        assert_eq!(json["timezone"], "browser", "{name}");
        assert_eq!(json["editable"], true, "{name}");
        assert!(json["schemaVersion"].as_i64() >= Some(41), "{name}");
        let link = &json["links"][0];
        assert_eq!((&link["type"], &link["tags"]), (&json!("dashboards"), &json!(["tidegate"])));
        assert_eq!((&link["keepTime"], &link["includeVars"]), (&json!(true), &json!(true)));

        let annotations = json["annotations"]["list"].as_array().unwrap();
        let names: Vec<_> =
            annotations.iter().map(|annotation| annotation["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["Reconnects", "Gaps", "Deploys"], "{name}");

        let variables = json["templating"]["list"].as_array().unwrap();
        let datasource = &variables[0];
        assert_eq!(datasource["name"], "datasource", "{name}");
        assert_eq!(
            (&datasource["type"], &datasource["query"]),
            (&json!("datasource"), &json!("prometheus"))
        );
        assert_eq!(datasource["label"], "Data source", "{name}");
        let names: Vec<_> =
            variables[1..].iter().map(|variable| variable["name"].as_str().unwrap()).collect();
        let expected: &[&str] =
            if name == "event-night" { &["job", "instance", "eid"] } else { &["job", "instance"] };
        assert_eq!(names, expected, "{name}");
        for variable in &variables[1..] {
            assert_eq!(variable["datasource"]["uid"], "${datasource}", "{name}");
            assert_eq!((&variable["multi"], &variable["includeAll"]), (&json!(true), &json!(true)));
            assert_eq!(variable["allValue"], ".+", "{name}");
            assert_eq!(variable["refresh"], 2, "{name}: on a change of time");
            assert!(
                variable["query"]["query"].as_str().unwrap().starts_with("label_values(tidegate_")
            );
        }
    }
}

/// A board is looked at, not scrolled.
#[test]
fn every_board_fits_one_screen_and_begins_with_the_answer() {
    for board in Board::all() {
        let mut taken = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for panel in board.panels() {
            let what = format!("{}: {}", board.name, panel["title"]);
            assert!(ids.insert(panel["id"].as_i64().unwrap()), "{what}");
            let place = |name: &str| panel["gridPos"][name].as_u64().unwrap();
            assert!(place("x") + place("w") <= 24 && place("y") + place("h") <= 25, "{what}");
            for x in place("x")..place("x") + place("w") {
                for y in place("y")..place("y") + place("h") {
                    assert!(taken.insert((x, y)), "{what} overlaps");
                }
            }
            assert_eq!(panel["type"] == "stat", place("y") == 0, "{what}");
        }
    }
}

#[test]
fn every_panel_says_what_it_shows_and_in_which_unit() {
    for board in Board::all() {
        for panel in board.panels() {
            let what = format!("{}: {}", board.name, panel["title"]);
            assert!(!panel["title"].as_str().unwrap().is_empty(), "{what}");
            assert!(panel["description"].as_str().unwrap().ends_with('.'), "{what}");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{what}");
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{what}");
            let targets = panel["targets"].as_array().unwrap();
            assert!(
                targets.iter().all(|target| target["datasource"]["uid"] == "${datasource}"),
                "{what}"
            );
            assert!(!targets.is_empty(), "{what}");
        }
    }
}

#[test]
fn every_query_can_be_filtered_and_takes_counters_as_rates() {
    let exported = exported();
    for board in Board::all() {
        for (what, query) in board.queries() {
            for range in query.split('[').skip(1) {
                assert!(range.starts_with("$__rate_interval]"), "{what}: {query}");
            }
            assert_eq!(
                query.matches('{').count(),
                query.matches(r#"{job=~"$job", instance=~"$instance""#).count(),
                "{what}: {query}"
            );
            for used in metrics_of(query, &exported) {
                let Used { name, before, after } = used;
                let metric = &exported[name].0;
                let is_rate =
                    ["rate(", "increase("].iter().any(|function| before.ends_with(function));
                assert_eq!(is_rate, metric.kind != "gauge", "{what}: {name}: {query}");
                assert!(after.contains('{'), "{what}: {name}: {query}");
                let own = |label: &&str| !["job", "instance", "le"].contains(label);
                for label in matched_labels(after).into_iter().filter(own) {
                    assert!(metric.labels.contains(label), "{what}: {name} has no {label}");
                }
                if metric.kind == "histogram" {
                    assert!(query.contains("histogram_quantile(") && query.contains("by (le)"));
                }
            }
        }
        for query in board.other_queries() {
            metrics_of(query, &exported);
        }
    }
}

#[test]
fn every_metric_is_on_a_board_or_in_a_rule() {
    let exported = exported();
    let mut unused: BTreeSet<&str> = exported.keys().map(String::as_str).collect();
    let boards = Board::all();
    let rules = ["recording", "alerts"].map(|file| read(&format!("grafana/prometheus/{file}.yml")));
    let queries = boards.iter().flat_map(|board| {
        board.queries().map(|(_, query)| query).chain(board.other_queries()).collect::<Vec<_>>()
    });
    for text in queries.chain(rules.iter().map(String::as_str)) {
        for used in metrics_of(text, &exported) {
            unused.remove(used.name);
        }
    }
    let expected: BTreeSet<_> = UNUSED.iter().map(|(name, _reason)| *name).collect();
    assert_eq!(unused, expected);
}

const RULES: &str = "grafana/prometheus/alerts.yml";

/// Each alert's name and the lines of its rule.
fn alerts() -> Vec<(String, String)> {
    let text = read(RULES);
    let rules = text.split("      - alert: ").skip(1);
    let alerts: Vec<_> = rules
        .map(|rule| {
            let (name, rest) = rule.split_once('\n').unwrap();
            (name.to_owned(), rest.to_owned())
        })
        .collect();
    assert!(alerts.len() > 15);
    alerts
}

/// The files of `grafana/prometheus/tests/`.
fn rule_tests() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana/prometheus/tests");
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names.into_iter().map(|name| format!("grafana/prometheus/tests/{name}")).collect()
}

fn promtool(args: &[&str]) -> String {
    let output = Command::new("promtool")
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("promtool, which `make test` installs: apt-get install prometheus");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "promtool {args:?}\n{said}");
    said
}

#[test]
fn prometheus_accepts_the_configuration_and_the_rules() {
    let said = promtool(&["check", "config", "grafana/prometheus/prometheus.yml"]);
    assert!(!said.contains("duplicate"), "{said}");
    // Its rules are mounted beside it, in the container.
    promtool(&["check", "config", "--syntax-only", "deploy/prometheus.yml"]);
}

#[test]
fn alerts_fire_and_keep_quiet_as_their_tests_say() {
    let tests = rule_tests();
    let args = ["test", "rules"].into_iter().chain(tests.iter().map(String::as_str));
    let said = promtool(&args.collect::<Vec<_>>());
    assert_eq!(said.matches("SUCCESS").count(), tests.len(), "{said}");
}

#[test]
fn every_alert_has_a_test_that_fires_one_that_does_not_and_a_section_of_the_runbook() {
    let runbook = read("grafana/RUNBOOK.md");
    let tests: String = rule_tests().iter().map(|file| read(file)).collect();
    let cases: Vec<_> = tests.split("      - alertname: ").skip(1).collect();
    let mut sections: Vec<_> =
        runbook.lines().filter_map(|line| line.strip_prefix("### ")).map(str::to_owned).collect();
    let names: Vec<_> = alerts().into_iter().map(|(name, _)| name).collect();
    for (name, rule) in alerts() {
        let of = |fires: bool| {
            cases.iter().any(|case| {
                let mut lines = case.lines();
                lines.next() == Some(&name) && case.contains("exp_alerts: []") != fires
            })
        };
        assert!(of(true), "{name} fires in no test");
        assert!(of(false), "{name} keeps quiet in no test");
        let severity = ["critical", "warning"]
            .iter()
            .any(|severity| rule.contains(&format!("labels:\n          severity: {severity}\n")));
        assert!(severity, "{name} has no severity");
        for annotation in ["summary: ", "description: >-"] {
            assert!(rule.contains(&format!("          {annotation}")), "{name}: {annotation}");
        }
        let url = format!("runbook_url: grafana/RUNBOOK.md#{}\n", name.to_lowercase());
        assert!(rule.contains(&url), "{name} leads to no section");
        let section = runbook.split(&format!("### {name}\n")).nth(1);
        let section = section.unwrap_or_else(|| panic!("{name} has no section in the runbook"));
        let section = section.split("\n### ").next().unwrap();
        for part in ["**Means** ", "**Viewers**", "**Look**", "```promql", "**Do** "] {
            assert!(section.contains(part), "{name}: its section has no {part}");
        }
    }
    sections.sort();
    let mut sorted = names;
    sorted.sort();
    assert_eq!(sections, sorted);
}

#[test]
fn the_runbook_and_the_reference_name_commands_that_exist() {
    let help = Command::new(env!("CARGO_BIN_EXE_tidegate")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let known: BTreeSet<_> = help
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .collect();
    assert!(known.contains("serve"), "{help}");
    for file in ["grafana/RUNBOOK.md", "grafana/README.md"] {
        for code in read(file).split(['`', '\n']) {
            let Some(command) = code.strip_prefix("tidegate ") else { continue };
            let command = command.split(' ').next().unwrap();
            assert!(known.contains(command), "{file}: tidegate {command}");
        }
    }
}

#[test]
fn rules_and_runbook_name_metrics_that_exist() {
    let exported = exported();
    let files = [RULES, "grafana/prometheus/recording.yml", "grafana/RUNBOOK.md"];
    for file in files.map(str::to_owned).into_iter().chain(rule_tests()) {
        let text = read(&file);
        for Used { name, after, .. } in metrics_of(&text, &exported) {
            for label in matched_labels(after) {
                let own = ["job", "instance", "le"].contains(&label);
                assert!(own || exported[name].0.labels.contains(label), "{file}: {name} {label}");
            }
        }
    }
}
