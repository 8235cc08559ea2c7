//! Runs of the bench against a server that does only what a load needs.

use clap::Parser;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::broadcast,
};
use tokio_tungstenite::{accept_async, tungstenite::Message};

use super::*;

/// More open files than these runs need.
const OPEN_FILES_MAX: u64 = 1_024;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: BenchArgs,
}

/// A broadcast on its way to all connections: topic and frame.
type Sent = (String, Message);

/// A server that does only what a load needs: answers joins and relays broadcasts, but refuses
/// topics with `refused` in their names, and loses messages to those with `lossy`.
struct MiniServer {
    url: String,
    /// Ends when the server is dropped.
    _tasks: JoinSet<()>,
}

impl MiniServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("ws://{}/socket", listener.local_addr().unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let (hub, _) = broadcast::channel(1_024);
            let mut connections = JoinSet::new();
            loop {
                let (stream, _address) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, hub.clone()));
            }
        });
        Self { url, _tasks: tasks }
    }
}

async fn serve(stream: TcpStream, hub: broadcast::Sender<Sent>) {
    let mut socket = accept_async(stream).await.unwrap();
    let (mut sent, mut joined) = (hub.subscribe(), Vec::new());
    socket.send(Message::Ping("are you there".into())).await.unwrap();
    loop {
        let frame = tokio::select! {
            frame = socket.next() => frame,
            sent = sent.recv() => {
                let (topic, frame) = sent.unwrap();
                if joined.contains(&topic) && !topic.contains("lossy") {
                    socket.send(frame).await.unwrap();
                }
                continue;
            }
        };
        let reply = match frame {
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text).unwrap() {
                Value::Object(message) => answer_object(message, &hub, &mut joined),
                Value::Array(message) => answer_array(&message, &mut joined),
                other => panic!("{other} is no message"),
            },
            Some(Ok(Message::Binary(push))) => answer_push(&push, &hub),
            Some(Ok(Message::Pong(pong))) => {
                assert_eq!(pong, "are you there".as_bytes());
                continue;
            }
            Some(Ok(other)) => panic!("{other:?} was not expected"),
            Some(Err(_)) | None => return,
        };
        socket.send(Message::text(reply.to_string())).await.unwrap();
    }
}

fn answer_object(
    mut message: serde_json::Map<String, Value>,
    hub: &broadcast::Sender<Sent>,
    joined: &mut Vec<String>,
) -> Value {
    let topic = message["topic"].as_str().unwrap().to_owned();
    let payload = if message["event"] == "phx_join" {
        join(topic.clone(), &message["payload"], joined)
    } else {
        assert_eq!(message["event"], "broadcast");
        let mut relayed = message.clone();
        relayed.insert("ref".into(), Value::Null);
        relayed.remove("join_ref");
        hub.send((topic, Message::text(Value::from(relayed).to_string()))).unwrap();
        json!({ "status": "ok", "response": {} })
    };
    message.insert("event".into(), "phx_reply".into());
    message.insert("payload".into(), payload);
    Value::from(message)
}

fn answer_array(message: &[Value], joined: &mut Vec<String>) -> Value {
    let [join_ref, reference, topic, event, payload] = message else { panic!("{message:?}") };
    assert_eq!(event, "phx_join");
    let reply = join(topic.as_str().unwrap().to_owned(), payload, joined);
    json!([join_ref, reference, topic, "phx_reply", reply])
}

/// Kind 3 in, kind 4 out, text reply back.
fn answer_push(push: &[u8], hub: &broadcast::Sender<Sent>) -> Value {
    let [3, join_ref, reference, topic, event, 0, 1, rest @ ..] = push else { panic!("{push:?}") };
    let (join_ref, rest) = rest.split_at((*join_ref).into());
    let (reference, rest) = rest.split_at((*reference).into());
    let frame = [&[4, *topic, *event, 0, 1], rest].concat();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let topic = text(&rest[..(*topic).into()]);
    hub.send((topic.clone(), Message::binary(frame))).unwrap();
    let reply = json!({ "status": "ok", "response": {} });
    json!([text(join_ref), text(reference), topic, "phx_reply", reply])
}

fn join(topic: String, payload: &Value, joined: &mut Vec<String>) -> Value {
    assert_eq!(payload["access_token"], "key");
    if topic.contains("refused") {
        return json!({ "status": "error", "response": { "reason": "Unauthorized: no" } });
    }
    // A publisher's own channel gets nothing.
    if payload["config"]["broadcast"]["ack"] == false {
        joined.push(topic);
    }
    json!({ "status": "ok", "response": { "postgres_changes": [] } })
}

/// Runs a bench with `options` and returns its result and its JSON.
async fn bench(url: &str, options: &str) -> (Result<(), BenchError>, Value) {
    let fixed = ["bench", "--apikey", "key", "--json", "--url", url];
    let cli = Cli::parse_from(fixed.into_iter().chain(options.split_whitespace()));
    let mut out = Vec::new();
    let result = Box::pin(run(cli.args, OPEN_FILES_MAX, &mut out)).await;
    (result, serde_json::from_slice(&out).unwrap_or_default())
}

#[tokio::test]
async fn every_message_reaches_every_viewer_in_both_versions() {
    let server = MiniServer::start().await;
    for vsn in ["1.0.0", "2.0.0"] {
        let options = "--sockets 12 --channels 2 --topics 3 --rate 30 --seconds 1 --burst 2";
        let (result, report) = bench(&server.url, &format!("{options} --vsn {vsn}")).await;
        assert!(result.is_ok(), "{result:?} {report}");
        assert_eq!(report["opening"]["sockets_joined"], 12);
        assert_eq!(report["opening"]["channels_joined"], 24);
        let publishing = &report["publishing"];
        assert_eq!(publishing["messages"], 60);
        assert_eq!(publishing["messages_acknowledged"], 60);
        // Each of three topics has eight of the channels.
        assert_eq!(publishing["deliveries_expected"], 60 * 8);
        assert_eq!(publishing["deliveries"], 60 * 8);
        assert_eq!(publishing["deliveries_merged"], 0);
        let latency = publishing["latency_us"]["p50"].as_f64().unwrap();
        assert!(latency > 0.0 && latency < 1e6, "{report}");
        assert!(report.get("server").is_none() && report.get("bare").is_none());
    }
}

#[tokio::test]
async fn the_servers_process_and_bare_writes_are_measured() {
    let server = MiniServer::start().await;
    let pid = std::process::id();
    let options = format!("--sockets 4 --rate 50 --seconds 1 --baseline --pid {pid}");
    let (result, report) = bench(&server.url, &options).await;
    assert!(result.is_ok(), "{result:?} {report}");
    assert_eq!(report["bare"]["sockets"], 4);
    assert_eq!(report["bare"]["writes"], 200);
    for path in [
        "/server/cpu_us_per_join",
        "/server/cpu_us_per_delivery",
        "/bare/cpu_us_per_write",
        "/bare/server_to_bare_ratio",
    ] {
        assert!(report.pointer(path).unwrap().as_f64().unwrap() > 0.0, "{path} in {report}");
    }
}

#[tokio::test]
async fn a_lost_message_fails_the_run() {
    let server = MiniServer::start().await;
    let options = "--sockets 2 --rate 5 --seconds 1 --topic lossy-{n}";
    let (result, report) = bench(&server.url, options).await;
    let Err(BenchError::Incomplete { failures: 0, missing: 10 }) = result else {
        panic!("{result:?} {report}");
    };
    assert_eq!(report["publishing"]["deliveries"], 0);
    assert!(report["publishing"].get("latency_us").is_none(), "nothing was measured");
}

#[tokio::test]
async fn a_refused_join_is_told_with_its_reason() {
    let server = MiniServer::start().await;
    let (result, report) = bench(&server.url, "--sockets 3 --topic refused").await;
    let Err(BenchError::Incomplete { failures: 3, missing: 0 }) = result else {
        panic!("{result:?} {report}");
    };
    assert_eq!(report["failures"], json!({ "join: Unauthorized: no": 3 }));
    assert!(report.get("publishing").is_none(), "nobody would receive");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_failure_of_each_socket() {
    let url = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("ws://{}/socket", listener.local_addr().unwrap())
    };
    let (result, report) = bench(&url, "--sockets 3").await;
    assert!(matches!(result, Err(BenchError::Incomplete { failures: 3, .. })), "{result:?}");
    assert_eq!(report["failures"], json!({ "connect: connection refused": 3 }));
}

#[tokio::test]
async fn arguments_that_contradict_each_other_are_refused() {
    for options in [
        "--channels 2",
        "--topics 2 --topic same",
        "--publish sql",
        "--baseline --seconds 0",
        "--url wss://example.com/realtime/v1",
        "--url nowhere",
    ] {
        let mut cli = vec!["bench", "--apikey", "key"];
        cli.extend(options.split_whitespace());
        let args = Cli::parse_from(cli).args;
        let error = Box::pin(run(args, OPEN_FILES_MAX, &mut Vec::new())).await.unwrap_err();
        assert_eq!(error.exit_code(), 64, "{options}: {error}");
    }
}

#[tokio::test]
async fn a_url_may_name_the_websocket_or_not() {
    for url in ["ws://[::1]:4/socket", "http://[::1]:4/socket/", "ws://[::1]:4/socket/websocket"] {
        let cli = Cli::parse_from(["bench", "--apikey", "a+b", "--url", url]);
        let target = Target::resolve(&cli.args).await.unwrap();
        assert_eq!(target.viewer_path, "/socket/websocket?apikey=a%2Bb&vsn=1.0.0");
        assert_eq!(target.host, "[::1]:4");
        assert_eq!(target.address, "[::1]:4".parse().unwrap());
    }
}

#[test]
fn keys_are_never_shown() {
    let cli = Cli::parse_from(["bench", "--apikey", "topsecret", "--database-url", "topsecret"]);
    assert!(!format!("{cli:?}").contains("topsecret"));
}
