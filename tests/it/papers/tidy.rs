//! Rules of the house that are text: which module may name what, and what no file may say.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use strum::VariantArray;
use tidegate::protocol::error_code::ErrorCode;

struct Source {
    /// Relative to the repository: `src/protocol/binary.rs`.
    path: String,
    text: String,
}

impl Source {
    /// The lines that are neither comments nor unit tests, with their numbers.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let is_code = |(_, line): &(usize, &str)| !line.trim_start().starts_with("//");
        let lines = self.text.lines().enumerate();
        let is_test = |line: &str| line == "#[cfg(test)]" || self.path.ends_with("/tests.rs");
        lines.take_while(move |(_, line)| !is_test(line)).filter(is_code)
    }

    /// The code as one text.
    fn text(&self) -> String {
        self.code().map(|(_, line)| line).collect::<Vec<_>>().join("\n")
    }

    /// Where the code, or the whole text, names one of these.
    fn naming<'a>(
        lines: impl Iterator<Item = (usize, &'a str)>,
        path: &str,
        names: &[&str],
    ) -> Vec<String> {
        lines
            .filter(|(_, line)| names.iter().any(|name| line.contains(name)))
            .map(|(number, line)| format!("{path}:{}: {}", number + 1, line.trim()))
            .collect()
    }
}

/// The files with this ending below a folder, what is installed or built aside.
fn sources(folder: &str, ending: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "node_modules" && name != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|found| found == ending) {
                let text = fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(!found.is_empty(), "no file in {folder}");
    found
}

/// The files of `src` that are not unit tests alone.
fn code() -> Vec<Source> {
    let is_test = |path: &str| path.ends_with("/tests.rs") || path.contains("/tests/");
    sources("src", "rs").into_iter().filter(|file| !is_test(&file.path)).collect()
}

#[track_caller]
fn expect_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}\n{}", found.join("\n"));
}

#[test]
fn the_protocol_uses_no_runtime_clock_chance_or_io() {
    let foreign = [
        "tokio::",
        "tokio_util",
        "time::",
        "Instant",
        "SystemTime",
        "fastrand",
        "uuid",
        "env::",
        "fs::",
        "net::",
        "io::",
        "thread::",
        "async ",
        ".await",
        "parking_lot",
        "tracing",
    ];
    let files: Vec<_> = sources("src", "rs")
        .into_iter()
        .filter(|file| file.path.starts_with("src/protocol"))
        .collect();
    assert!(files.len() > 5, "{} files", files.len());
    for file in files {
        // Its own time, and the frames of the WebSocket library, whose name begins like the runtime's.
        let found = Source::naming(file.code(), &file.path, &foreign);
        expect_none("src/protocol is pure", &found);
        // Nothing of the server but itself.
        let crates: Vec<_> = Source::naming(file.code(), &file.path, &["crate::"])
            .into_iter()
            .filter(|line| !line.contains("crate::protocol"))
            .collect();
        expect_none("src/protocol needs no other module", &crates);
    }
}

/// A row of the map at the head of `src/lib.rs`.
struct Room {
    name: String,
    may_name: Vec<String>,
}

/// The rooms from the ground up.
fn map() -> Vec<Room> {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let rows = lib.lines().filter_map(|line| line.strip_prefix("//! | [`"));
    rows.map(|row| {
        let cells: Vec<_> = row.split(" | ").collect();
        let name = cells[0].trim_end_matches("`]").trim_start_matches("mod@").to_owned();
        let may_name = cells[2].trim_end_matches('|').split(',').map(str::trim);
        let may_name = may_name.filter(|name| !name.is_empty()).map(str::to_owned).collect();
        Room { name, may_name }
    })
    .collect()
}

/// The rooms that this code names: `crate::hub::…`, `use crate::{hub::…, relay::…}`.
fn named(code: &str) -> BTreeSet<String> {
    let ident = |text: &str| -> String {
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut named = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            named.insert(ident(rest));
            continue;
        };
        let (mut depth, mut is_start) = (0, true);
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => is_start = true,
                c if depth == 0 && is_start && c.is_alphabetic() => {
                    named.insert(ident(&group[at..]));
                    is_start = false;
                }
                _ => {}
            }
        }
    }
    named
}

/// `src/hub/outbox.rs` belongs to `hub`.
fn room_of(path: &str) -> &str {
    let inside = path.strip_prefix("src/").unwrap();
    inside.split('/').next().unwrap().trim_end_matches(".rs")
}

#[test]
fn the_reader_of_names_finds_single_names_and_those_of_groups() {
    let code = "use crate::{a::{b, c}, d, e::f};\nlet x = crate::g::h();\nuse crate::i::{j, k};";
    let expected = ["a", "d", "e", "g", "i"].map(str::to_owned);
    assert_eq!(named(code).into_iter().collect::<Vec<_>>(), expected);
}

/// So no circle of rooms can be written down.
#[test]
fn a_room_may_name_only_rooms_above_it() {
    let map = map();
    assert!(map.len() > 20, "{} rooms", map.len());
    for (number, room) in map.iter().enumerate() {
        for name in &room.may_name {
            let is_above = map[..number].iter().any(|above| above.name == *name);
            assert!(is_above, "{} may not name {name}: it stands below it", room.name);
        }
    }
    let mut folders: Vec<_> =
        sources("src", "rs").iter().map(|file| room_of(&file.path).to_owned()).collect();
    folders.retain(|room| room != "lib" && room != "main");
    folders.sort_unstable();
    folders.dedup();
    let mut rooms: Vec<_> = map.into_iter().map(|room| room.name).collect();
    rooms.sort_unstable();
    assert_eq!(folders, rooms, "the map of src/lib.rs has a row for each room");
}

#[test]
fn a_room_names_what_its_row_of_the_map_allows_and_the_row_allows_no_more() {
    let map = map();
    let mut breaches = Vec::new();
    let mut used: BTreeSet<(String, String)> = BTreeSet::new();
    for file in code() {
        let Some(room) = map.iter().find(|room| room.name == room_of(&file.path)) else { continue };
        let mut code = file.text();
        if file.path.ends_with("/mod.rs") || file.path == format!("src/{}.rs", room.name) {
            // The parent of a room's face is the crate itself.
            code = code.replace("super::", "crate::");
        }
        for name in named(&code) {
            if room.may_name.contains(&name) {
                used.insert((room.name.clone(), name));
            } else if name != room.name {
                breaches.push(format!("{} names {name}", file.path));
            }
        }
    }
    expect_none("the map of src/lib.rs does not allow it", &breaches);
    let rows = map
        .iter()
        .flat_map(|room| room.may_name.iter().map(|name| (room.name.clone(), name.clone())));
    let idle = rows.filter(|row| !used.contains(row));
    let idle: Vec<_> = idle.map(|(room, name)| format!("{room} does not name {name}")).collect();
    expect_none("the map of src/lib.rs allows more than is needed", &idle);
}

/// What two children of a room share is a file of its own, so that rooms have no circle inside.
#[test]
fn a_child_names_its_siblings_and_never_the_face_of_its_room() {
    let files = code();
    let mut found = Vec::new();
    for file in &files {
        let parts: Vec<_> = file.path.split('/').collect();
        let [_, room, child, ..] = parts[..] else { continue };
        if child == "mod.rs" {
            continue;
        }
        let code = file.text();
        if named(&code).contains(room) {
            found.push(format!("{} names its own room from outside: write super::", file.path));
        }
        if parts.len() > 3 {
            if code.contains("super::super::") {
                found.push(format!("{} names what is above its parent", file.path));
            }
            continue;
        }
        let is_sibling = |name: &str| {
            let place = format!("src/{room}/{name}");
            let folder = format!("{place}/");
            files
                .iter()
                .any(|file| file.path == format!("{place}.rs") || file.path.starts_with(&folder))
        };
        for name in named(&code.replace("crate::", "elsewhere::").replace("super::", "crate::")) {
            if !is_sibling(&name) {
                found.push(format!("{} names {room}::{name}", file.path));
            }
        }
    }
    expect_none("what children share is a file of its own", &found);
}

#[test]
fn the_files_of_a_room_form_no_circle() {
    let files = code();
    let mut names: BTreeMap<(&str, &str), BTreeSet<String>> = BTreeMap::new();
    for file in &files {
        let parts: Vec<_> = file.path.split('/').collect();
        if let [_, room, child] = parts[..]
            && child != "mod.rs"
        {
            let code = file.text().replace("crate::", "elsewhere::");
            let siblings = named(&code.replace("super::", "crate::"));
            names.insert((room, child.trim_end_matches(".rs")), siblings);
        }
    }
    assert!(names.len() > 100, "{} files", names.len());
    // Take away whatever names nothing that is left: a circle is what stays.
    loop {
        let left: BTreeSet<_> = names.keys().copied().collect();
        names.retain(|(room, _), siblings| {
            siblings.iter().any(|sibling| left.contains(&(*room, sibling.as_str())))
        });
        if names.len() == left.len() {
            break;
        }
    }
    assert!(names.is_empty(), "circles among {names:?}");
}

/// Else the rules above would not see who names whom.
#[test]
fn nothing_names_a_room_by_another_name() {
    let mut found = Vec::new();
    for file in code() {
        let names = ["crate as ", "super as ", "#[path = \".", "#[path = \"/", "include!("];
        found.extend(Source::naming(file.code(), &file.path, &names));
        let hands_on = |(_, line): &(usize, &str)| {
            line.trim_start().starts_with("pub") && line.contains(" use crate::")
        };
        found.extend(Source::naming(file.code().filter(hands_on), &file.path, &["use"]));
        let lines: Vec<_> = file.text.lines().collect();
        for (number, pair) in lines.windows(2).enumerate() {
            if pair[0] == "#[cfg(test)]" && !pair[1].contains("mod tests") {
                found.push(format!("{}:{}: only tests may be left out", file.path, number + 2));
            }
        }
        if file.path == "src/lib.rs" {
            let is_room = |line: &str| line.ends_with(';') && line.contains("mod ");
            let other = file.code().filter(|(_, line)| !line.is_empty() && !is_room(line));
            found.extend(Source::naming(other, &file.path, &[""]));
        }
    }
    expect_none("a room is named by its own name", &found);
}

#[test]
fn a_library_is_named_where_it_is_at_home() {
    let files = code();
    let is_in = |file: &Source, rooms: &[&str]| rooms.contains(&room_of(&file.path));
    let mut found = Vec::new();
    for file in &files {
        let mut forbid = |is_forbidden: bool, library: &str| {
            if is_forbidden {
                found.extend(Source::naming(file.code(), &file.path, &[library]));
            }
        };
        forbid(!is_in(file, &["telemetry"]), "prometheus::");
        forbid(!is_in(file, &["telemetry"]), "use prometheus");
        forbid(!is_in(file, &["protocol", "hub", "http", "wire_client"]), "tokio_tungstenite");
        let is_stateless = [
            "clock",
            "secret",
            "protocol",
            "telemetry",
            "auth",
            "access",
            "limits",
            "hub",
            "invalidation",
            "recovery",
            "publish",
        ];
        forbid(is_in(file, &is_stateless) || is_in(file, &["socket", "http", "admin"]), "sqlx");
        let reads_heads = is_in(file, &["limits"]) || file.path == "src/auth/jwks.rs";
        forbid(is_in(file, &is_stateless) && !reads_heads, "hyper");
    }
    expect_none("the library is not named here", &found);
}

#[test]
fn only_auth_names_the_jwt_library() {
    for file in sources("src", "rs") {
        if room_of(&file.path) != "auth" {
            let found =
                Source::naming(file.text.lines().enumerate(), &file.path, &["jsonwebtoken"]);
            expect_none("keys and tokens are src/auth's", &found);
        }
    }
}

/// A secret has no `==` of its own, and its text is compared with nobody's but by `Secret::is`.
#[test]
fn secrets_are_compared_in_one_place() {
    let mut used = BTreeSet::new();
    for file in code() {
        if file.text().contains(".is(") {
            used.insert(file.path.clone());
        }
        if file.path == "src/secret.rs" {
            let names = ["PartialEq", "PartialOrd", "Hash", " == ", " != "];
            expect_none("no other comparison", &Source::naming(file.code(), &file.path, &names));
            continue;
        }
        let compares = |(_, line): &(usize, &str)| {
            let words = [" == ", " != ", ".eq(", ".ne(", ".cmp(", "matches!"];
            // A literal is no secret.
            words.iter().any(|word| line.contains(word)) && !line.contains("expose() == \"")
        };
        let lines = file.code().filter(compares);
        let found = Source::naming(lines, &file.path, &["expose()", "_token == ", "_key == "]);
        expect_none("secrets are compared by Secret::is", &found);
    }
    for place in ["src/admin/mod.rs", "src/auth/authenticator.rs"] {
        assert!(used.contains(place), "{place} compares a secret");
    }
}

#[test]
fn only_main_reads_the_environment() {
    for file in code() {
        if file.path != "src/main.rs" {
            let names = ["env::var", "env::args", "env::set_var", "env::{", "std::env;"];
            let found = Source::naming(file.code(), &file.path, &names);
            expect_none("settings come through Config", &found);
        }
    }
}

/// A `select!` needs its branches' cancel safety thought about; so there are few places.
#[test]
fn select_stands_in_few_files() {
    let allowed = [
        "src/invalidation/sender.rs",
        "src/recovery/healing.rs",
        "src/relay/listener.rs",
        "src/http/connection.rs",
        "src/http/exchange.rs",
        "src/server/mod.rs",
        "src/cli/mod.rs",
    ];
    for file in sources("src", "rs") {
        let is_command =
            ["src/demo", "src/bench"].iter().any(|command| file.path.starts_with(command));
        if !is_command && !allowed.contains(&&*file.path) {
            expect_none(
                "no select! here",
                &Source::naming(file.code(), &file.path, &["select!", "tokio::select"]),
            );
        }
    }
}

#[test]
fn what_is_left_to_do_has_an_issues_number() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME")];
    let mut files = sources("src", "rs");
    files.extend(sources("tests", "rs"));
    files.extend(sources("protocol", "json"));
    files.extend(sources("protocol", "md"));
    files.extend(sources("migrations", "sql"));
    for file in files {
        let found: Vec<_> = Source::naming(file.text.lines().enumerate(), &file.path, &words)
            .into_iter()
            .filter(|line| !words.iter().any(|word| line.contains(&format!("{word}(#"))))
            .collect();
        expect_none("name the issue, as (#1)", &found);
    }
}

#[test]
fn every_file_begins_with_its_one_job() {
    let mut files = sources("src", "rs");
    files.extend(sources("tests", "rs"));
    let without: Vec<_> = files
        .into_iter()
        .filter(|file| !file.text.starts_with("//! "))
        .map(|file| file.path)
        .collect();
    expect_none("a file begins with //!", &without);
}

#[test]
fn no_test_sleeps_or_is_ignored() {
    let words = [concat!("slee", "p("), concat!("#[ig", "nore")];
    for file in sources("tests", "rs") {
        let found = Source::naming(file.text.lines().enumerate(), &file.path, &words);
        expect_none("a test waits for what happens", &found);
    }
}

/// As the reply to a join shows it, or an upgrade that is refused: `{"error": text}`.
#[test]
fn every_error_code_has_a_test_that_gets_it() {
    let mut expected = String::new();
    for transcript in sources("protocol/transcripts", "json") {
        let transcript: Value = serde_json::from_str(&transcript.text).unwrap();
        for step in transcript["steps"].as_array().unwrap() {
            expected.push_str(&step["expect"].to_string());
        }
    }
    for test in sources("tests/it", "rs") {
        if test.path != "tests/it/papers/tidy.rs" && test.path != "tests/it/protocol/conformance.rs"
        {
            expected.push_str(&test.text);
        }
    }
    let missing: Vec<_> = ErrorCode::VARIANTS
        .iter()
        .filter(|code| {
            let reason = format!("{}: ", code.as_str());
            let answer = format!("\"{}\"", code.text());
            !expected.contains(&reason) && !expected.contains(&answer)
        })
        .map(|code| code.as_str().to_owned())
        .collect();
    expect_none("no test gets these codes", &missing);
}

#[test]
fn every_file_of_tests_is_played() {
    let main = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/main.rs"));
    let main = main.unwrap();
    for file in sources("tests/it", "rs") {
        let name = file.path.strip_prefix("tests/it/").unwrap().trim_end_matches(".rs");
        let Some((folder, module)) = name.trim_end_matches("/mod").split_once('/') else {
            continue;
        };
        if folder == "support" || module.contains('/') {
            continue;
        }
        let (_, after) = main.split_once(&format!("mod {folder} {{")).unwrap_or_default();
        let modules = after.split('}').next().unwrap_or_default();
        let is_declared = modules.contains(&format!("mod {module};"));
        assert!(is_declared, "tests/it/main.rs does not name {folder}::{module}");
    }
}
