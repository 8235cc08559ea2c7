//! Rules of the house that are text: which module may name what, and what no file may say.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
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
        lines.take_while(|(_, line)| *line != "#[cfg(test)]").filter(is_code)
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
            } else if path.extension().is_some_and(|it| it == ending) {
                let text = fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(!found.is_empty(), "no file in {folder}");
    found
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
    let files: Vec<_> =
        sources("src", "rs").into_iter().filter(|it| it.path.starts_with("src/protocol")).collect();
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

#[test]
fn only_auth_names_the_jwt_library() {
    for file in sources("src", "rs") {
        if !file.path.starts_with("src/auth") {
            let found =
                Source::naming(file.text.lines().enumerate(), &file.path, &["jsonwebtoken"]);
            expect_none("keys and tokens are src/auth's", &found);
        }
    }
}

#[test]
fn only_main_reads_the_environment() {
    for file in sources("src", "rs") {
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
        "src/connection.rs",
        "src/server.rs",
        "src/merge.rs",
        "src/healing.rs",
        "src/relay/listener.rs",
        "src/relay/upkeep.rs",
        "src/http.rs",
        "src/admin.rs",
        "src/main.rs",
    ];
    for file in sources("src", "rs") {
        let is_command =
            ["src/demo", "src/bench"].iter().any(|command| file.path.starts_with(command));
        if !is_command && !allowed.contains(&&*file.path) {
            expect_none("no select! here", &Source::naming(file.code(), &file.path, &["select!"]));
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
        if test.path != "tests/it/tidy.rs" && test.path != "tests/it/conformance.rs" {
            expected.push_str(&test.text);
        }
    }
    let missing: Vec<_> = ErrorCode::ALL
        .into_iter()
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
        let name = file.path.strip_prefix("tests/it/").unwrap();
        if let Some(module) = name.strip_suffix(".rs").filter(|it| !it.contains('/')) {
            let declared = module == "main" || main.contains(&format!("mod {module};"));
            assert!(declared, "tests/it/main.rs does not name {module}");
        }
    }
}
