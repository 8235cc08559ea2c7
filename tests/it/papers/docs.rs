//! What the README says is what the code does.

use std::{collections::BTreeMap, fs, path::Path};

const DEFAULTS: &str = include_str!("../../../src/server/defaults.toml");

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

/// Rows of two or more cells whose first is code: `| `name` | `value` | …`.
fn rows(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split("` | `");
            let name = cells.next()?.to_owned();
            Some((name, cells.next()?.split('`').next()?.to_owned()))
        })
        .collect()
}

fn defaults() -> BTreeMap<String, String> {
    let plain = |value: &toml::Value| match value {
        toml::Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    let mut defaults = BTreeMap::new();
    for (name, value) in DEFAULTS.parse::<toml::Table>().unwrap() {
        match &value {
            toml::Value::Table(section) => {
                for (field, value) in section {
                    defaults.insert(format!("{name}.{field}"), plain(value));
                }
            }
            toml::Value::Array(_) => assert_eq!(name, "topic"),
            value => drop(defaults.insert(name, plain(value))),
        }
    }
    defaults
}

#[test]
fn the_table_of_settings_is_the_codes_own() {
    assert_eq!(rows(&read("docs/reference/settings.md")), defaults());
}

#[test]
fn whatever_is_deployed_names_settings_that_exist() {
    let known: Vec<_> = defaults().keys().map(|it| it.replace('.', "__").to_uppercase()).collect();
    let mut found = 0;
    for file in [
        "docker-compose.yml",
        "deploy/nginx.conf",
        "deploy/Caddyfile",
        "deploy/kong.yml",
        "deploy/tidegate.service",
    ] {
        for named in read(file).split("TIDEGATE_").skip(1) {
            let name: String =
                named.chars().take_while(|it| it.is_ascii_uppercase() || *it == '_').collect();
            assert!(known.contains(&name), "{file}: TIDEGATE_{name}");
            found += 1;
        }
    }
    assert!(found > 5, "{found}");
}

#[test]
fn the_built_in_rules_of_the_readme_are_those_of_the_settings() {
    let page = read("docs/guide/topics.md");
    let topics = page.split("## The built-in rules").nth(1).unwrap();
    let topics = topics.split("\n## ").next().unwrap();
    let rules = DEFAULTS.parse::<toml::Table>().unwrap();
    let patterns = rules["topic"].as_array().unwrap().iter().flat_map(|rule| {
        rule["pattern"].as_array().unwrap().iter().map(|it| it.as_str().unwrap().to_owned())
    });
    for pattern in patterns {
        let prefix = pattern.split('{').next().unwrap();
        assert!(topics.contains(&format!("`{prefix}")), "{pattern} is not in the table");
    }
}

#[test]
fn the_clients_of_the_readme_are_those_that_are_tested() {
    let page = read("docs/guide/clients.md");
    let line = page.lines().find(|line| line.starts_with("Tested unchanged")).unwrap();
    let package: serde_json::Value = serde_json::from_str(&read("tests/js/package.json")).unwrap();
    let mut count = 0;
    for (_, version) in package["devDependencies"].as_object().unwrap() {
        let Some(version) = version.as_str().unwrap().strip_prefix("npm:@supabase/supabase-js@")
        else {
            continue;
        };
        count += 1;
        assert!(line.contains(version), "supabase-js {version} is not in the README");
    }
    // The last one stands behind an `and`, the list behind a comma of its own.
    assert_eq!(line.matches(", ").count(), count - 1, "the README names others");
}
