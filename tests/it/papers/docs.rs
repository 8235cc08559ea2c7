//! What the README and `docs/` say is what the code does, and every link in the papers leads
//! somewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
    process::Command,
};

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
    let known: Vec<_> =
        defaults().keys().map(|name| name.replace('.', "__").to_uppercase()).collect();
    let mut found = 0;
    for file in [
        "docker-compose.yml",
        "deploy/nginx.conf",
        "deploy/Caddyfile",
        "deploy/kong.yml",
        "deploy/tidegate.service",
    ] {
        for named in read(file).split("TIDEGATE_").skip(1) {
            let name: String = named
                .chars()
                .take_while(|letter| letter.is_ascii_uppercase() || *letter == '_')
                .collect();
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
        rule["pattern"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pattern| pattern.as_str().unwrap().to_owned())
    });
    for pattern in patterns {
        let prefix = pattern.split('{').next().unwrap();
        assert!(topics.contains(&format!("`{prefix}")), "{pattern} is not in the table");
    }
}

#[test]
fn the_clients_of_the_readme_are_those_that_are_tested() {
    let package: serde_json::Value = serde_json::from_str(&read("tests/js/package.json")).unwrap();
    for paper in ["README.md", "docs/guide/clients.md"] {
        let text = read(paper);
        let line = text.lines().find(|line| line.starts_with("Tested unchanged")).unwrap();
        let mut count = 0;
        for (_, version) in package["devDependencies"].as_object().unwrap() {
            let Some(version) =
                version.as_str().unwrap().strip_prefix("npm:@supabase/supabase-js@")
            else {
                continue;
            };
            count += 1;
            assert!(line.contains(version), "{paper}: supabase-js {version} is missing");
        }
        // The last one stands behind an `and`, the list behind a comma of its own.
        assert_eq!(line.matches(", ").count(), count - 1, "{paper} names others");
    }
}

#[test]
fn the_commands_of_the_reference_are_those_of_the_binary() {
    let help = Command::new(env!("CARGO_BIN_EXE_tidegate")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let known: BTreeSet<_> = help
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|name| name.starts_with(char::is_alphabetic) && *name != "help")
        .collect();
    let page = read("docs/reference/commands.md");
    let listed: BTreeSet<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split([' ', '`']).next())
        .collect();
    assert_eq!(listed, known);
}

#[test]
fn the_numbers_of_the_readme_are_those_of_the_page_on_performance() {
    let (readme, page) = (read("README.md"), read("docs/contribute/performance.md"));
    let section = readme.split("## Measured").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows: Vec<_> = section.lines().filter(|line| line.starts_with("| ")).collect();
    assert_eq!(rows.len(), 1 + 5, "a head and five numbers");
    for row in rows {
        assert!(page.lines().any(|line| line.starts_with(row)), "another number: {row}");
    }
}

/// The pages below a folder, relative to the repository.
fn pages(folder: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut pages, mut folders) = (Vec::new(), vec![root.join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    pages.sort();
    pages
}

/// The lines of a page that are not in a block of code.
fn prose(page: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    page.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    })
}

/// The anchors of a page's headings, by GitHub's rule: lower case, without punctuation, a hyphen
/// for each space, and a number behind one that has occurred before.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut seen = BTreeMap::<String, usize>::new();
    for line in prose(page) {
        let text = line.trim_start_matches('#');
        if text.len() == line.len() || !text.starts_with(' ') {
            continue;
        }
        assert!(!line.contains("]("), "a link in a heading has another anchor: {line}");
        let anchor: String = text
            .trim()
            .to_lowercase()
            .chars()
            .filter(|letter| letter.is_alphanumeric() || [' ', '-', '_'].contains(letter))
            .map(|letter| if letter == ' ' { '-' } else { letter })
            .collect();
        let count = seen.entry(anchor.clone()).or_default();
        anchors.insert(if *count == 0 { anchor } else { format!("{anchor}-{count}") });
        *count += 1;
    }
    anchors
}

/// The targets of a page's links, but for those to other hosts.
fn links(page: &str) -> Vec<String> {
    let mut links = Vec::new();
    for line in prose(page) {
        let text: String = line.split('`').step_by(2).collect();
        let targets = text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap());
        // `[name]: target`
        let named = text.strip_prefix('[').and_then(|rest| Some(rest.split_once("]: ")?.1));
        let is_ours = |target: &&str| !target.contains("://") && !target.starts_with("mailto:");
        links.extend(targets.chain(named).filter(is_ours).map(str::to_owned));
    }
    links
}

/// The file or folder that a link of this paper leads to, relative to the repository, and the
/// anchor; `None` if it leads out of the repository.
fn target(paper: &str, link: &str) -> Option<(PathBuf, Option<String>)> {
    let (file, anchor) = match link.split_once('#') {
        Some((file, anchor)) => (file, Some(anchor.to_owned())),
        None => (link, None),
    };
    if file.is_empty() {
        return Some((paper.into(), anchor));
    }
    let mut path = PathBuf::new();
    for part in Path::new(paper).with_file_name(file).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => {
                if !path.pop() {
                    return None;
                }
            }
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some((path, anchor))
}

/// The links of a paper with this text that lead nowhere.
fn dead_links(paper: &str, text: &str) -> Vec<String> {
    let is_alive = |link: &str| {
        let Some((path, anchor)) = target(paper, link) else { return false };
        let Some(anchor) = anchor else {
            return Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists();
        };
        let path = path.to_str().unwrap();
        if path == paper {
            return anchors(text).contains(&anchor);
        }
        let full = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        fs::read_to_string(full).is_ok_and(|page| anchors(&page).contains(&anchor))
    };
    links(text).into_iter().filter(|link| !is_alive(link)).collect()
}

#[test]
fn every_link_of_the_papers_leads_to_a_file_and_a_heading() {
    let mut papers: Vec<_> = ["README.md", "SECURITY.md", "CHANGELOG.md", "protocol/README.md"]
        .map(str::to_owned)
        .into();
    papers.extend(pages("grafana"));
    papers.extend(pages("docs"));
    let mut found = 0;
    for paper in papers {
        let text = read(&paper);
        assert_eq!(dead_links(&paper, &text), Vec::<String>::new(), "{paper}");
        found += links(&text).len();
    }
    assert!(found > 100, "{found} links");
}

#[test]
fn a_link_that_leads_nowhere_is_found() {
    let text = "# One\n## `Two_x` and three, four\n## One\n\
        [a](../reference/settings.md) [b](../reference/settings.md#at-the-limits) [c](#one)\n\
        [d](#two_x-and-three-four) [e](#one-1) [f](../../src) [g](https://example.com/no)\n\
        `[h](no.md)`\n```sh\n[i](no.md)\n# Five\n```\n\
        [j](settings.md) [k](../reference/settings.md#no) [l](#five) [m](../../../no) [n](/etc)\n\
        [o](#one-2)\n[p]: no.md\n";
    let dead = dead_links("docs/guide/topics.md", text);
    let expected = [
        "settings.md",
        "../reference/settings.md#no",
        "#five",
        "../../../no",
        "/etc",
        "#one-2",
        "no.md",
    ];
    assert_eq!(dead, expected);
}

#[test]
fn the_readme_is_short_and_no_page_has_more_than_300_lines() {
    let readme = read("README.md");
    assert!(readme.lines().count() <= 150, "{} lines", readme.lines().count());
    assert!(readme.len() <= 8_000, "{} bytes", readme.len());
    for page in pages("docs") {
        let count = read(&page).lines().count();
        assert!(count <= 300, "{page} has {count} lines");
    }
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let contents = "docs/README.md";
    let linked: BTreeSet<_> = links(&read(contents))
        .iter()
        .filter_map(|link| Some(target(contents, link)?.0.to_str()?.to_owned()))
        .collect();
    for page in pages("docs") {
        assert!(page == contents || linked.contains(&page), "{page} is not in {contents}");
    }
}
