//! What SECURITY.md and `docs/security/` say is what the code does: the table of decisions is
//! `protocol/authorization.json`, every test that they name exists, every setting that they name
//! is one.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::access::authorization::Table;

const DEFAULTS: &str = include_str!("../../../src/server/defaults.toml");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    let path = root().join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The rows of the tables below this heading of a page, cell by cell, without their heads.
fn rows(page: &str, heading: &str) -> Vec<Vec<String>> {
    let page = read(&format!("docs/security/{page}.md"));
    let text = page.split(&format!("# {heading}\n")).nth(1);
    let text =
        text.unwrap_or_else(|| panic!("no heading {heading}")).split("\n## ").next().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let is_row =
        |number: &usize| lines[*number].starts_with("| ") && !lines[*number].starts_with("|-");
    let is_head = |number: usize| lines.get(number + 1).is_some_and(|line| line.starts_with("|-"));
    (0..lines.len())
        .filter(|number| is_row(number) && !is_head(*number))
        .map(|number| {
            let cells = lines[number].trim_matches('|').split('|');
            cells.map(|cell| cell.trim().to_owned()).collect()
        })
        .collect()
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The text of all files below a folder, what is installed or built aside.
fn texts(folder: &str, ending: &str) -> String {
    let (mut text, mut folders) = (String::new(), vec![root().join(folder)]);
    while let Some(folder) = folders.pop() {
        let paths: Vec<PathBuf> =
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        for path in paths {
            if path.is_dir() && !path.ends_with("node_modules") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == ending)
                && !path.ends_with("security.rs")
            {
                text.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }
    text
}

/// Pages and their headings: the last column of the tables below names tests.
const PROVED: [(&str, &str); 5] = [
    ("threats", "Threats"),
    ("tokens", "Strange tokens"),
    ("database", "What a hostile NOTIFY can do"),
    ("limits", "Limits"),
    ("database", "The database role"),
];

#[test]
fn every_test_that_the_paper_names_exists() {
    let rust = texts("src", "rs") + &texts("tests", "rs");
    let javascript = texts("tests/js", "js");
    let mut named = 0;
    for (page, heading) in PROVED {
        for row in rows(page, heading) {
            let proofs: Vec<&str> = quoted(row.last().unwrap()).collect();
            assert!(!proofs.is_empty(), "{heading}: no test is named: {row:?}");
            for proof in proofs {
                let exists = rust.contains(&format!("fn {proof}("))
                    || javascript.contains(&format!("'{proof}'"));
                assert!(exists, "{heading}: there is no test {proof}");
                named += 1;
            }
        }
    }
    assert!(named > 100, "{named} tests");
}

#[test]
fn every_threat_has_a_number_and_a_control_and_every_asked_number_a_threat() {
    let threats = rows("threats", "Threats");
    let mut numbers = BTreeSet::new();
    for threat in &threats {
        let [_, cwe, control, _, _] = threat.as_slice() else { panic!("five cells: {threat:?}") };
        let read: Vec<u32> = cwe
            .split(", ")
            .map(|number| number.parse().unwrap_or_else(|_| panic!("{threat:?}")))
            .collect();
        assert!(!read.is_empty() && !control.is_empty(), "{threat:?}");
        numbers.extend(read);
    }
    for asked in [
        20, 89, 94, 117, 190, 208, 287, 306, 307, 345, 346, 347, 352, 400, 532, 598, 613, 639, 770,
        862, 863, 918, 1385,
    ] {
        assert!(numbers.contains(&asked), "CWE-{asked} has no row");
    }
}

/// Every setting in the third column of the limits, and in the fourth of the threats, is one, and
/// every limit among the settings is in the table.
#[test]
fn every_setting_that_the_paper_names_is_one_and_no_limit_is_missing() {
    let defaults: toml::Table = DEFAULTS.parse().unwrap();
    let is_setting = |name: &str| match name.split_once('.') {
        Some((section, field)) => {
            defaults.get(section).is_some_and(|table| table.get(field).is_some())
        }
        None => defaults.contains_key(name),
    };
    for threat in rows("threats", "Threats") {
        for setting in quoted(&threat[3]) {
            assert!(is_setting(setting), "{setting} is no setting: {threat:?}");
        }
    }
    let limits: BTreeSet<String> = rows("limits", "Limits")
        .iter()
        .flat_map(|row| quoted(&row[0]).map(str::to_owned).collect::<Vec<_>>())
        .collect();
    for setting in &limits {
        assert!(is_setting(setting), "{setting} is no setting");
    }
    for field in defaults["limits"].as_table().unwrap().keys() {
        assert!(limits.contains(&format!("limits.{field}")), "limits.{field} is not in the table");
    }
}

/// A verdict as the table shows it.
fn letter(decision: &str) -> &str {
    match decision.split(':').next().unwrap() {
        "allowed" => "A",
        "withheld" => "w",
        "policies" => "P",
        "refused" => "-",
        verdict => panic!("{verdict}"),
    }
}

/// The topic, of each UUID its last two digits.
fn short(topic: &str) -> String {
    let parts: Vec<String> = topic
        .split('_')
        .map(|part| if part.len() == 36 { format!("<{}>", &part[34..]) } else { part.to_owned() })
        .collect();
    parts.join("_")
}

/// The table of the paper: in each cell who may read, then who may write.
fn decisions() -> Vec<String> {
    let table = Table::load();
    let who: Vec<&String> = table.who.keys().collect();
    let head: String = who.iter().map(|who| format!(" {who} |")).collect();
    let mut lines = vec![format!("| topic | rule |{head}")];
    for row in &table.decisions {
        let cell =
            |who: &&String| format!(" `{}{}` |", letter(&row.read[*who]), letter(&row.write[*who]));
        let cells: String = who.iter().map(cell).collect();
        let privacy = if row.private { " (private)" } else { "" };
        let rule = row.rule.as_deref().unwrap_or("");
        lines.push(format!("| `{}`{privacy} | {rule} |{cells}", short(&row.topic)));
    }
    lines
}

/// As `cargo doc` shows it to whoever changes it.
#[test]
fn the_answers_to_strange_tokens_are_those_of_the_code() {
    let source = read("src/auth/jwt.rs");
    let documented: Vec<&str> =
        source.lines().filter_map(|line| line.strip_prefix("//! | ")).skip(1).collect();
    let rows = rows("tokens", "Strange tokens");
    let shown: Vec<String> = rows.iter().map(|row| format!("{} | {} |", row[0], row[1])).collect();
    assert_eq!(shown, documented);
}

#[test]
fn the_table_of_decisions_is_the_one_that_the_function_is_tested_with() {
    let wanted = decisions();
    let paper = read("SECURITY.md");
    let text = paper.split("<!-- decisions -->\n").nth(1).expect("the table stands between marks");
    let lines: Vec<&str> =
        text.lines().filter(|line| !line.starts_with("|-")).take(wanted.len()).collect();
    assert_eq!(lines, wanted, "the table should be\n{}", wanted.join("\n"));
}
