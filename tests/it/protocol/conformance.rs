//! Plays every file of `protocol/`: the codec vectors against the serializers, each transcript
//! against a socket in memory and over a real WebSocket.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use strum::VariantArray;
use tidegate::{
    clock::unix_now,
    hub::{OutboxBounds, outbox::Outbox},
    protocol::{
        error_code::ErrorCode,
        message::{Json, Malformed, Payload, Ref, UserBroadcast, UserPayload},
        serializer::{Broadcast, Push, Serializer},
    },
    server::{Config, Gateway},
    socket::Socket,
};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::support::{
    client::{Client, caller, client_key, encode, expected_by, matches, message_of},
    private::{Private, Table},
    server::{DEADLINE, TestServer, config},
    token,
};

fn files(folder: &str) -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("protocol").join(folder);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let value = serde_json::from_str(&text)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            (path.file_name().unwrap().to_string_lossy().into_owned(), value)
        })
        .collect()
}

fn bytes_of(hex: &str) -> Vec<u8> {
    hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn serializer_of(vsn: &str) -> Serializer {
    Serializer::from_vsn(Some(vsn)).unwrap()
}

fn reference_of(value: &Value) -> Option<Ref> {
    (!value.is_null()).then(|| serde_json::from_str(&value.to_string()).unwrap())
}

fn frame_of(vector: &Value) -> Frame {
    match vector.get("text") {
        Some(text) => Frame::text(text.as_str().unwrap()),
        None => Frame::binary(bytes_of(vector["binary"].as_str().unwrap())),
    }
}

fn user_broadcast_of(message: &Value) -> UserBroadcast {
    let payload = match message["encoding"].as_str().unwrap() {
        "json" => UserPayload::Json(Json::parse(message["payload"].to_string().into()).unwrap()),
        "binary" => {
            UserPayload::Binary(Bytes::from(bytes_of(message["payload_hex"].as_str().unwrap())))
        }
        encoding => panic!("no encoding {encoding}"),
    };
    UserBroadcast { user_event: message["user_event"].as_str().unwrap().into(), payload }
}

#[test]
fn every_clients_frame_decodes_as_its_vector_says() {
    let mut count = 0;
    for (file, vector) in files("frames") {
        if vector["direction"] != "client" {
            continue;
        }
        count += 1;
        let decoded =
            serializer_of(vector["serializer"].as_str().unwrap()).decode(frame_of(&vector));
        if let Some(reason) = vector.get("malformed") {
            let kind = decoded.map_err(Malformed::label);
            assert_eq!(
                kind.as_ref().map_err(|kind| Value::from(*kind)),
                Err(reason.clone()).as_ref().map_err(Clone::clone),
                "{file}"
            );
            continue;
        }
        let (decoded, message) =
            (decoded.unwrap_or_else(|error| panic!("{file}: {error}")), &vector["message"]);
        assert_eq!(decoded.join_ref, reference_of(&message["join_ref"]), "{file}");
        assert_eq!(decoded.reference, reference_of(&message["ref"]), "{file}");
        assert_eq!(*decoded.topic, *message["topic"].as_str().unwrap(), "{file}");
        assert_eq!(*decoded.event, *message["event"].as_str().unwrap(), "{file}");
        match decoded.payload {
            Payload::Json(payload) => {
                let payload: Value = serde_json::from_str(payload.as_str()).unwrap();
                assert_eq!(payload, message["payload"], "{file}");
            }
            Payload::UserBroadcast(UserBroadcast { user_event, payload }) => {
                assert_eq!(*user_event, *message["user_event"].as_str().unwrap(), "{file}");
                match payload {
                    UserPayload::Json(json) => {
                        let payload: Value = serde_json::from_str(json.as_str()).unwrap();
                        assert_eq!(
                            (payload, "json"),
                            (message["payload"].clone(), message["encoding"].as_str().unwrap()),
                            "{file}"
                        );
                    }
                    UserPayload::Binary(bytes) => {
                        let wanted = bytes_of(message["payload_hex"].as_str().unwrap());
                        assert_eq!(
                            (bytes.to_vec(), "binary"),
                            (wanted, message["encoding"].as_str().unwrap()),
                            "{file}"
                        );
                    }
                }
            }
            Payload::TooLarge => panic!("{file}: a vector is small"),
        }
    }
    assert!(count > 50, "{count} vectors");
}

#[test]
fn every_message_of_ours_is_written_as_its_vector_says() {
    let mut count = 0;
    for (file, vector) in files("frames") {
        if vector["direction"] != "server" {
            continue;
        }
        count += 1;
        let serializer = serializer_of(vector["serializer"].as_str().unwrap());
        let message = &vector["message"];
        let topic = message["topic"].as_str().unwrap();
        let written = if message.get("user_event").is_some() {
            let metadata =
                message.get("meta").map(|meta| Json::parse(meta.to_string().into()).unwrap());
            let broadcast = Broadcast::User { message: user_broadcast_of(message), metadata };
            serializer.encode_broadcast(topic, &broadcast).unwrap()
        } else {
            let (join_ref, reference) =
                (reference_of(&message["join_ref"]), reference_of(&message["ref"]));
            serializer.encode(&Push {
                join_ref: join_ref.as_ref(),
                reference: reference.as_ref(),
                topic,
                event: message["event"].as_str().unwrap(),
                payload: &message["payload"].to_string(),
            })
        };
        match (written, frame_of(&vector)) {
            (Frame::Text(written), Frame::Text(wanted)) => {
                let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
                assert_eq!(value(&written), value(&wanted), "{file}");
            }
            (written, wanted) => assert_eq!(written, wanted, "{file}"),
        }
    }
    assert!(count > 20, "{count} vectors");
}

#[test]
fn the_table_of_errors_is_the_codes_own() {
    let errors: Vec<Value> = serde_json::from_str(
        &fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("protocol/errors.json"))
            .unwrap(),
    )
    .unwrap();
    let told = |error: &&Value| error["at"] == "upgrade" || error["at"] == "join";
    let documented: HashSet<&str> =
        errors.iter().filter(told).filter_map(|error| error["code"].as_str()).collect();
    let ours: HashSet<&str> = ErrorCode::VARIANTS.iter().map(|code| code.as_str()).collect();
    assert_eq!(documented, ours);
    for code in ErrorCode::VARIANTS {
        let has_text = errors
            .iter()
            .any(|error| error["code"] == code.as_str() && error["text"] == code.text());
        assert!(has_text, "{}: {}", code.as_str(), code.text());
    }
}

#[tokio::test]
async fn every_transcript_plays_against_a_socket_in_memory() {
    let database = Private::start(Table::Plain).await;
    for (file, transcript) in transcripts() {
        for vsn in &transcript.given.vsn {
            let gateway = Gateway::new(transcript.given.config(&database)).unwrap();
            play(&format!("{file} at {vsn}"), &transcript, vsn, &Wires::Memory(gateway)).await;
        }
    }
}

#[tokio::test]
async fn every_transcript_plays_over_a_real_websocket() {
    let database = Private::start(Table::Plain).await;
    for (file, transcript) in transcripts() {
        for vsn in &transcript.given.vsn {
            let server = TestServer::start_with(transcript.given.config(&database));
            play(&format!("{file} at {vsn}"), &transcript, vsn, &Wires::Network(&server)).await;
            server.stop().await;
        }
    }
}

fn transcripts() -> Vec<(String, Transcript)> {
    let transcripts: Vec<_> = files("transcripts")
        .into_iter()
        .map(|(file, value)| {
            let transcript =
                serde_json::from_value(value).unwrap_or_else(|error| panic!("{file}: {error}"));
            (file, transcript)
        })
        .collect();
    assert!(transcripts.len() > 50, "{} transcripts", transcripts.len());
    transcripts
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Transcript {
    #[serde(rename = "name")]
    _name: String,
    #[serde(rename = "source")]
    _source: String,
    given: Given,
    steps: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    vsn: Vec<String>,
    #[serde(default)]
    claims: Option<Value>,
    /// Whether there is a database, with the example's policies.
    #[serde(default)]
    policies: bool,
}

impl Given {
    fn config(&self, database: &Private) -> Config {
        if self.policies { database.config() } else { config() }
    }
}

async fn play(name: &str, transcript: &Transcript, vsn: &str, wires: &Wires<'_>) {
    let role =
        transcript.given.claims.as_ref().map_or("anon", |claims| claims["role"].as_str().unwrap());
    let apikey = token::named(role);
    let mut peers = HashMap::new();
    peers.insert("A".to_owned(), wires.open(serializer_of(vsn), &apikey).await);
    for (number, step) in transcript.steps.iter().enumerate() {
        let at = format!("{name}, step {number}: {step}");
        let step = with_tokens(step);
        if let Some(socket) = step.get("connect") {
            let serializer = serializer_of(step["vsn"].as_str().unwrap());
            let peer = wires.open(serializer, &apikey).await;
            peers.insert(socket.as_str().unwrap().to_owned(), peer);
            continue;
        }
        let socket = step.get("socket").map_or("A", |socket| socket.as_str().unwrap());
        let peer = peers.get_mut(socket).unwrap_or_else(|| panic!("{at}: no socket {socket}"));
        let serializer = peer.serializer;
        if let Some(message) = step.get("send") {
            peer.send(Frame::text(encode(serializer, message))).await;
        } else if let Some(text) = step.get("send_text") {
            peer.send(Frame::text(text.as_str().unwrap())).await;
        } else if let Some(hex) = step.get("send_binary") {
            peer.send(Frame::binary(bytes_of(hex.as_str().unwrap()))).await;
        } else if let Some(expected) = step.get("expect") {
            peer.expect(expected.clone(), &at).await;
        } else if let Some(expected) = step.get("expect_user_broadcast") {
            peer.expect_user_broadcast(expected.clone(), &at).await;
        } else if let Some(hex) = step.get("expect_binary") {
            let wanted = Frame::binary(bytes_of(hex.as_str().unwrap()));
            assert_eq!(peer.receive(&at).await, wanted, "{at}");
        } else if step.get("expect_nothing").is_some() {
            let beat = json!([null, "marker", "phoenix", "heartbeat", {}]);
            peer.send(Frame::text(encode(serializer, &beat))).await;
            let ok = json!({ "status": "ok", "response": {} });
            peer.expect(json!([null, "marker", "phoenix", "phx_reply", ok]), &at).await;
        } else {
            panic!("{at}: no such step");
        }
    }
    for (_, peer) in peers {
        if let Wire::Network(client) = peer.wire {
            client.close().await;
        }
    }
}

fn with_tokens(value: &Value) -> Value {
    match value {
        Value::String(text) => match text.strip_prefix("$token:") {
            Some(name) => token::named(name).into(),
            None => value.clone(),
        },
        Value::Array(values) => values.iter().map(with_tokens).collect(),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| (key.clone(), with_tokens(value))).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

/// Where a transcript is played.
enum Wires<'a> {
    Memory(Arc<Gateway>),
    Network(&'a TestServer),
}

struct Peer {
    serializer: Serializer,
    wire: Wire,
}

enum Wire {
    Memory { socket: Box<Socket>, outbox: Arc<Outbox>, received: VecDeque<Frame> },
    Network(Box<Client>),
}

impl Wires<'_> {
    async fn open(&self, serializer: Serializer, apikey: &str) -> Peer {
        let wire = match self {
            Self::Memory(gateway) => {
                let outbox =
                    Arc::new(Outbox::new(serializer, &OutboxBounds::new(1 << 20, usize::MAX)));
                let token = gateway.auth.verify_at(apikey, unix_now()).unwrap();
                let socket = Socket::new(
                    Arc::clone(&gateway.socket),
                    Arc::clone(&outbox),
                    token,
                    client_key(),
                    caller(),
                );
                Wire::Memory { socket: Box::new(socket), outbox, received: VecDeque::new() }
            }
            Self::Network(server) => {
                Wire::Network(Box::new(Client::with_token(server, serializer, apikey).await))
            }
        };
        Peer { serializer, wire }
    }
}

impl Peer {
    async fn send(&mut self, frame: Frame) {
        match &mut self.wire {
            Wire::Memory { socket, .. } => {
                if let Ok(message) = self.serializer.decode(frame) {
                    socket.handle([message]).await;
                }
            }
            Wire::Network(client) => client.send_frame(frame).await,
        }
    }

    async fn receive(&mut self, at: &str) -> Frame {
        match &mut self.wire {
            Wire::Network(client) => client.frame().await,
            Wire::Memory { socket, outbox, received } => loop {
                if let Some(frame) = received.pop_front() {
                    return frame;
                }
                let mut batch = VecDeque::new();
                let next = async {
                    tokio::select! {
                        biased;
                        drained = outbox.drain(&mut batch) => { drained.unwrap(); None }
                        due = socket.due() => Some(due),
                    }
                };
                match timeout(DEADLINE, next).await {
                    Ok(None) => received.extend(batch.into_iter().map(|queued| queued.frame)),
                    Ok(Some(due)) => socket.answer(due).await,
                    Err(_elapsed) => panic!("{at}: nothing arrives"),
                }
            },
        }
    }

    async fn expect(&mut self, expected: Value, at: &str) {
        let frame = self.receive(at).await;
        assert!(frame.is_text(), "{at}: received {frame:?}");
        self.compare(expected, &frame, at);
    }

    async fn expect_user_broadcast(&mut self, expected: Value, at: &str) {
        let frame = self.receive(at).await;
        assert_eq!(frame.is_binary(), self.serializer == Serializer::V2, "{at}: {frame:?}");
        self.compare(expected, &frame, at);
    }

    fn compare(&self, expected: Value, frame: &Frame, at: &str) {
        let expected = expected_by(self.serializer, expected);
        let received = message_of(self.serializer, frame);
        assert!(matches(&expected, &received), "{at}\nexpected {expected}\nreceived {received}");
    }
}
