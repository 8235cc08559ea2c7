//! `tidegate demo` as somebody sees it who types it: what it prints, serves and leaves behind.

use std::{
    fs,
    net::{SocketAddr, TcpStream as BlockingStream},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStdout, Command},
    time::timeout,
};
use tokio_tungstenite::{client_async, tungstenite::Message as Frame};

use crate::support::server::TestServer;

/// How long a start or an end may take, initdb on a busy machine included.
const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn the_demo_serves_an_event_that_changes_and_leaves_nothing_behind() {
    let mut demo = Demo::start(&["--rate", "20", "--seed", "7"]).await;

    let (status, page) = demo.get("/demo").await;
    assert_eq!((status, page.contains("/demo/demo.js")), (200, true), "{page}");
    assert_eq!(demo.get("/demo/supabase.js").await, (200, BUNDLE.to_owned()));
    assert_eq!(demo.get("/?event=AB3029").await.0, 307);
    let (status, config) = demo.get("/demo/config.json").await;
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!((status, &config["events"][1]["eid"]), (200, &json!("AB3029")));

    for eid in ["AB3028", "AB3029"] {
        let event = demo.json(&format!("/live/event/{eid}")).await;
        assert_eq!(event["artworks"].as_array().map(Vec::len), Some(12), "{event}");
        let media = demo.json(&format!("/live/event/{eid}/media")).await;
        assert!(media["media"].as_array().is_some_and(|media| media.len() >= 12), "{media}");
        let artists = demo.json(&format!("/live/event/{eid}/artists")).await;
        assert_eq!(artists["artists"].as_array().map(Vec::len), Some(12), "{artists}");
    }
    let event = demo.json("/live/event/AB3028").await;
    let artworks = event["artworks"].as_array().unwrap();
    let artwork =
        artworks.iter().find(|artwork| artwork["bid_count"] != 0 && !artwork["easel"].is_null());
    let artwork = artwork.expect("somebody has bid before the page opens");
    assert!(artwork["current_bid"].is_number(), "{artwork}");
    let (round, easel) = (&artwork["round"], &artwork["easel"]);
    let bids = demo.json(&format!("/live/event/AB3028-{round}-{easel}/bids")).await;
    assert!(bids["bids"][0]["amount"].is_number(), "{bids}");
    for path in ["/live/event/AB9", "/live/event/AB3028-9-9/bids", "/live/event/a%27b", "/other"] {
        let not_found = (404, json!({ "message": "not found" }).to_string());
        assert_eq!(demo.get(path).await, not_found, "{path}");
    }
    assert_eq!(TestServer::request(demo.public, "POST /demo HTTP/1.1", "").await.0, 405);

    let invalidation = demo.next_invalidation(config["anonKey"].as_str().unwrap()).await;
    let endpoints = invalidation["endpoints"].as_array().unwrap();
    let of_event = |endpoint: &Value| {
        endpoint.as_str().is_some_and(|path| path.starts_with("/live/event/AB3028"))
    };
    assert!(!endpoints.is_empty() && endpoints.iter().all(of_event), "{invalidation}");

    let database = demo.database_url().await;
    let mut session = PgConnection::connect(&database).await.unwrap();
    // Every user of the machine may try TCP.
    let addresses = sqlx::query_scalar("show listen_addresses");
    let addresses: String = addresses.fetch_one(&mut session).await.unwrap();
    assert_eq!(addresses, "");
    let folder = sqlx::query_scalar("show unix_socket_directories");
    let folder: String = folder.fetch_one(&mut session).await.unwrap();
    assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o077, 0);
    let prometheus = config["prometheus"].as_str().unwrap_or_else(|| {
        panic!("no Prometheus, which `make test` installs: apt-get install prometheus")
    });
    let prometheus: SocketAddr = prometheus.strip_prefix("http://").unwrap().parse().unwrap();
    assert!(prometheus.ip().is_loopback());
    let (_, rules) = TestServer::request(prometheus, "GET /api/v1/rules HTTP/1.1", "").await;
    assert!(rules.contains("LinkDown") && rules.contains("tidegate-joins"), "{rules}");
    let (_, config) =
        TestServer::request(prometheus, "GET /api/v1/status/config HTTP/1.1", "").await;
    assert!(config.contains(&demo.admin.to_string()), "{config}");
    assert_eq!(demo.left_behind(), 2, "the directories of database and Prometheus");
    demo.signal(Signal::SIGINT);
    assert_eq!(demo.ended().await, (Some(0), String::new()));
    assert!(PgConnection::connect(&database).await.is_err(), "Postgres still runs");
    assert!(BlockingStream::connect(prometheus).is_err(), "Prometheus still runs");
}

#[tokio::test]
async fn without_prometheus_the_demo_lacks_only_that() {
    let mut demo = Demo::with_programs(&["cat", "mktemp", "rm", "sleep", "tail"]).await;
    let config = demo.json("/demo/config.json").await;
    assert_eq!(config["prometheus"], Value::Null);
    assert_eq!(demo.get("/demo").await.0, 200);
    assert_eq!(demo.left_behind(), 1, "the database's directory");
    demo.signal(Signal::SIGINT);
    assert_eq!(demo.ended().await, (Some(0), String::new()));
}

/// The seed decides what the page shows, so that two people can look at the same demo.
#[tokio::test]
async fn the_same_seed_shows_the_same_event() {
    let mut shown = Vec::new();
    for _ in 0..2 {
        let mut demo = Demo::start(&["--rate", "0", "--seed", "1"]).await;
        let mut event = demo.json("/live/event/AB3028").await;
        for artwork in event["artworks"].as_array_mut().unwrap() {
            artwork["updated_at"].take();
        }
        shown.push(event["artworks"].take());
        demo.signal(Signal::SIGTERM);
        assert_eq!(demo.ended().await.0, Some(0));
    }
    assert_eq!(shown[0], shown[1]);
}

#[tokio::test]
async fn a_taken_port_is_said_in_one_line_and_nothing_is_left_behind() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let mut demo = Demo::spawn(&["--listen", &address.to_string()]);
    let (code, errors) = demo.ended().await;
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains(&format!("cannot listen on {address}")), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

#[tokio::test]
async fn an_end_while_postgres_starts_leaves_nothing_behind() {
    let mut demo = Demo::spawn(&[]);
    let mut stderr = BufReader::new(demo.process.stderr.take().unwrap()).lines();
    let first = timeout(DEADLINE, stderr.next_line()).await.unwrap().unwrap().unwrap();
    assert!(first.contains("starting a throw-away Postgres"), "{first}");
    demo.signal(Signal::SIGINT);
    assert_eq!(demo.ended().await.0, Some(0));
}

#[tokio::test]
async fn a_client_that_is_not_installed_is_said_with_the_command_that_installs_it() {
    let mut demo = Demo::with(&[], |pages| fs::remove_file(pages.join(BUNDLE_FILE)).unwrap());
    let (code, errors) = demo.ended().await;
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains("supabase.js is missing: run `make demo`"), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

#[tokio::test]
async fn an_admin_address_that_the_network_sees_is_refused() {
    let mut demo = Demo::spawn(&["--admin-listen", "0.0.0.0:0"]);
    let (code, errors) = demo.ended().await;
    assert_eq!(code, Some(64), "{errors}");
    assert!(errors.contains("not a loopback address"), "{errors}");
}

/// What stands for the published client: the tests need no npm.
const BUNDLE: &str = "/* supabase-js */";
const BUNDLE_FILE: &str = "node_modules/@supabase/supabase-js/dist/umd/supabase.js";

/// A demo in a directory of its own, on ports of the system's choice.
struct Demo {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    public: SocketAddr,
    admin: SocketAddr,
    directory: PathBuf,
}

impl Demo {
    /// Starts a demo and waits until it serves.
    async fn start(args: &[&str]) -> Self {
        Self::spawn(args).started().await
    }

    /// Starts a demo that finds no programs but these, and those of Postgres where they always are.
    async fn with_programs(programs: &[&str]) -> Self {
        let spawned = Self::with(&[], |pages| {
            let own = pages.parent().unwrap().join("bin");
            fs::create_dir(&own).unwrap();
            for program in programs {
                let places = std::env::split_paths("/usr/bin:/bin:/usr/local/bin")
                    .map(|place| place.join(program));
                let place = places.into_iter().find(|place| place.is_file()).expect("a program");
                symlink(place, own.join(program)).unwrap();
            }
        });
        spawned.started().await
    }

    async fn started(self) -> Self {
        let mut demo = self;
        let line = timeout(DEADLINE, demo.lines.next_line()).await.expect("a line in time");
        let line = line.unwrap().expect("a demo that starts");
        let address = |name| {
            let word = line.split(' ').find_map(|word| word.strip_prefix(name));
            word.and_then(|word| word.parse::<SocketAddr>().ok())
        };
        assert!(line.starts_with("listening "), "{line}");
        demo.public = address("public=").expect("a public address");
        demo.admin = address("admin=").expect("an admin address");
        demo
    }

    fn spawn(args: &[&str]) -> Self {
        Self::with(args, |_pages| {})
    }

    /// Starts a demo, after `change` has been at its page's directory.
    fn with(args: &[&str], change: impl FnOnce(&Path)) -> Self {
        let name = format!("tidegate-test-{}", uuid::Uuid::new_v4().simple());
        let directory = std::env::temp_dir().join(name);
        let (temp, pages) = (directory.join("temp"), directory.join("pages"));
        fs::create_dir_all(&temp).unwrap();
        // Postgres runs as another user where the tests run as root.
        fs::set_permissions(&temp, fs::Permissions::from_mode(0o1777)).unwrap();
        fs::create_dir_all(pages.join(BUNDLE_FILE).parent().unwrap()).unwrap();
        fs::write(pages.join(BUNDLE_FILE), BUNDLE).unwrap();
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("client/demo");
        for file in ["index.html", "demo.js", "demo.css"] {
            fs::copy(own.join(file), pages.join(file)).unwrap();
        }
        change(&pages);
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.arg("demo").arg("--pages").arg(&pages);
        for (name, value) in [("--listen", "127.0.0.1:0"), ("--admin-listen", "127.0.0.1:0")] {
            if !args.contains(&name) {
                command.args([name, value]);
            }
        }
        let programs = directory.join("bin");
        if programs.exists() {
            command.env("PATH", programs);
        }
        command.args(args).env("TMPDIR", &temp).current_dir(&directory).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        Self { process, lines, public: nowhere, admin: nowhere, directory }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        TestServer::request(self.public, &format!("GET {path} HTTP/1.1"), "").await
    }

    async fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path).await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Joins AB3028 as production clients do and gives the next notification's payload, not what
    /// the join is answered with.
    async fn next_invalidation(&self, key: &str) -> Value {
        let stream = TcpStream::connect(self.public).await.unwrap();
        let path = format!("/realtime/v1/websocket?apikey={key}&vsn=1.0.0");
        let (mut websocket, _) =
            client_async(format!("ws://{}{path}", self.public), stream).await.unwrap();
        let join = json!({
            "topic": "realtime:cache_invalidate_AB3028", "event": "phx_join", "ref": "1",
            "join_ref": "1", "payload": { "config": {}, "access_token": key },
        });
        websocket.send(Frame::text(join.to_string())).await.unwrap();
        loop {
            let frame = timeout(DEADLINE, websocket.next()).await.expect("a broadcast in time");
            if let Frame::Text(text) = frame.unwrap().unwrap() {
                let mut message: Value = serde_json::from_str(&text).unwrap();
                let is_catch_up = message["payload"]["payload"]["type"] == "catch_up";
                if message["event"] == "broadcast" && !is_catch_up {
                    assert_eq!(message["payload"]["event"], "cache_invalidation", "{message}");
                    return message["payload"]["payload"].take();
                }
            }
        }
    }

    /// The address in `psql postgres://…/demo`, which the banner shows.
    async fn database_url(&mut self) -> String {
        loop {
            let line = timeout(DEADLINE, self.lines.next_line()).await.expect("a line in time");
            let line = line.unwrap().expect("a banner that names the database");
            if let Some((_, url)) = line.split_once("psql ") {
                return url.to_owned();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let id = self.process.id().and_then(|id| i32::try_from(id).ok()).expect("a running demo");
        kill(Pid::from_raw(id), signal).unwrap();
    }

    /// How many things the demo has in the temporary directory that it was given.
    fn left_behind(&self) -> usize {
        fs::read_dir(self.directory.join("temp")).unwrap().count()
    }

    /// Waits for the end: the exit code, and what was said of errors. Nothing is left behind.
    async fn ended(&mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        if let Some(mut stderr) = self.process.stderr.take() {
            timeout(DEADLINE, stderr.read_to_string(&mut said)).await.expect("an end").unwrap();
        }
        let ended = timeout(DEADLINE, self.process.wait()).await.expect("an end in time").unwrap();
        assert_eq!(self.left_behind(), 0, "the database's directory is left");
        let errors = said.lines().filter(|line| !line.contains(" INFO "));
        (ended.code(), errors.collect::<Vec<_>>().join("\n"))
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory); // A failed test's demo may still be at it.
    }
}
