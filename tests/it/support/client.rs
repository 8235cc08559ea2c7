//! A client that speaks the protocol frame by frame, in the form of V2 whatever the version:
//! `[join_ref, ref, topic, event, payload]`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tidegate::{protocol::serializer::Serializer, recovery::ClientKey, telemetry::audit::Caller};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error, Message as Frame, http::Response},
};

use super::{
    server::{DEADLINE, TestServer},
    token,
};

/// What the topics of rule `cache` begin with, in both spellings.
const CACHE: &str = "cache_invalidate";

/// One WebSocket.
pub(crate) struct Client {
    websocket: WebSocketStream<TcpStream>,
    serializer: Serializer,
    reference: u32,
}

impl Client {
    /// Connects with the anon key.
    pub(crate) async fn connect(server: &TestServer, serializer: Serializer) -> Self {
        Self::with_token(server, serializer, &token::of_role("anon")).await
    }

    /// Connects with this token.
    pub(crate) async fn with_token(
        server: &TestServer,
        serializer: Serializer,
        token: &str,
    ) -> Self {
        let stream = TcpStream::connect(server.public).await.unwrap();
        Self::over(server, stream, serializer, token).await
    }

    /// Connects with this token over a stream of the test's own.
    pub(crate) async fn over(
        server: &TestServer,
        stream: TcpStream,
        serializer: Serializer,
        token: &str,
    ) -> Self {
        Self::open(server.public, stream, serializer, token).await
    }

    /// Connects with this token to the server at this address, which another process may be.
    pub(crate) async fn at(address: SocketAddr, serializer: Serializer, token: &str) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        Self::open(address, stream, serializer, token).await
    }

    async fn open(
        address: SocketAddr,
        stream: TcpStream,
        serializer: Serializer,
        token: &str,
    ) -> Self {
        let vsn = vsn(serializer);
        let url = format!("ws://{address}/realtime/v1/websocket?apikey={token}&vsn={vsn}");
        let (websocket, _) = client_async(url, stream).await.unwrap();
        Self { websocket, serializer, reference: 0 }
    }

    /// What the server answers to an upgrade of this path that it refuses.
    pub(crate) async fn refused(server: &TestServer, path: &str) -> Response<Option<Vec<u8>>> {
        let stream = TcpStream::connect(server.public).await.unwrap();
        match client_async(format!("ws://{}{path}", server.public), stream).await {
            Err(Error::Http(response)) => *response,
            other => panic!("not refused: {other:?}"),
        }
    }

    /// Sends a message.
    pub(crate) async fn send(&mut self, message: Value) {
        self.send_frame(Frame::text(encode(self.serializer, &message))).await;
    }

    /// Sends a frame as it is.
    pub(crate) async fn send_frame(&mut self, frame: Frame) {
        self.websocket.send(frame).await.unwrap();
    }

    /// The next data frame.
    pub(crate) async fn frame(&mut self) -> Frame {
        loop {
            let next = timeout(DEADLINE, self.websocket.next()).await;
            let frame = next.expect("a frame in time").expect("an open socket").expect("a frame");
            match frame {
                Frame::Ping(_) | Frame::Pong(_) => {}
                frame => return frame,
            }
        }
    }

    /// The next message, in the form of V2; `join_ref` is null on V1.
    pub(crate) async fn message(&mut self) -> Value {
        match self.frame().await {
            Frame::Text(text) => decode(self.serializer, &text),
            frame => panic!("no text frame: {frame:?}"),
        }
    }

    /// Fails unless the next message is this one; `"$any"` stands for any value.
    pub(crate) async fn expect(&mut self, expected: Value) {
        let expected = expected_by(self.serializer, expected);
        let received = self.message().await;
        assert!(matches(&expected, &received), "expected {expected}\nreceived {received}");
    }

    /// Joins a topic with this config, and expects `ok` and, on a topic of rule `cache`, to be
    /// caught up. Gives the join's ref.
    pub(crate) async fn join_with(&mut self, sub_topic: &str, config: Value) -> String {
        let reference = self.join_only(sub_topic, config).await;
        if sub_topic.starts_with(CACHE) {
            self.caught_up(sub_topic).await;
        }
        reference
    }

    /// Joins a topic with this config, and expects `ok`; what follows is the test's to read. Gives
    /// the join's ref.
    pub(crate) async fn join_only(&mut self, sub_topic: &str, config: Value) -> String {
        let reference = self.next_ref();
        let topic = format!("realtime:{sub_topic}");
        self.send(json!([reference, reference, topic, "phx_join", { "config": config }])).await;
        let ok = json!({ "status": "ok", "response": "$any" });
        self.expect(json!([reference, reference, topic, "phx_reply", ok])).await;
        reference
    }

    /// Fails unless the next thing to arrive is the complete list of the topic's event, as who has
    /// joined gets it while the server cannot tell what has changed since it was there before.
    pub(crate) async fn caught_up(&mut self, sub_topic: &str) -> Vec<String> {
        let eid = &sub_topic[CACHE.len() + 1..];
        let (topic, envelope) = self.broadcast().await;
        assert_eq!(topic, format!("realtime:{sub_topic}"), "{envelope}");
        let payload = &envelope["payload"];
        let cause = &payload["cause"];
        let fields = json!({
            "type": "catch_up", "event_eid": eid, "cause": cause,
            "endpoints": payload["endpoints"], "timestamp": payload["timestamp"],
        });
        let expected =
            json!({ "type": "broadcast", "event": "cache_invalidation", "payload": fields });
        assert_eq!(envelope, expected);
        let causes = ["fresh", "held", "returned", "unknown"];
        assert!(causes.iter().any(|known| cause == known), "{envelope}");
        assert!(payload["timestamp"].is_f64(), "{envelope}");
        let endpoints: Vec<String> = serde_json::from_value(payload["endpoints"].clone()).unwrap();
        assert!(endpoints.starts_with(&resync(eid)), "{envelope}");
        endpoints
    }

    /// Fails unless the next thing to arrive is this invalidation once more, for this client alone:
    /// it was just caught up, would forget that over the message, and gets both in one.
    pub(crate) async fn repeated(&mut self, sub_topic: &str, mut payload: Value) {
        let (topic, envelope) = self.broadcast().await;
        let (endpoints, timestamp) =
            (&envelope["payload"]["endpoints"], &envelope["payload"]["timestamp"]);
        assert_ne!(*timestamp, payload["timestamp"], "clients drop it as the same message");
        let listed: Vec<String> = serde_json::from_value(endpoints.clone()).unwrap();
        let first: Vec<String> = serde_json::from_value(payload["endpoints"].take()).unwrap();
        assert!(listed.starts_with(&first), "{envelope}");
        let eid = &sub_topic[CACHE.len() + 1..];
        assert!(resync(eid).iter().all(|endpoint| listed.contains(endpoint)), "{envelope}");
        payload["endpoints"] = endpoints.clone();
        payload["timestamp"] = timestamp.clone();
        payload["merged"] = 1.into();
        let expected =
            json!({ "type": "broadcast", "event": "cache_invalidation", "payload": payload });
        assert_eq!((topic, &envelope), (format!("realtime:{sub_topic}"), &expected));
    }

    /// Joins a topic with the default config.
    pub(crate) async fn join(&mut self, sub_topic: &str) -> String {
        self.join_with(sub_topic, json!({})).await
    }

    /// Fails unless the reply to a heartbeat is the next thing to arrive.
    pub(crate) async fn expect_nothing(&mut self) {
        let reference = self.next_ref();
        self.send(json!([null, reference, "phoenix", "heartbeat", {}])).await;
        let ok = json!({ "status": "ok", "response": {} });
        self.expect(json!([null, reference, "phoenix", "phx_reply", ok])).await;
    }

    /// The topic and the envelope of the next broadcast; on V2 of a kind 4 frame, too.
    pub(crate) async fn broadcast(&mut self) -> (String, Value) {
        let message = message_of(self.serializer, &self.frame().await);
        assert_eq!(message[3], "broadcast", "{message}");
        (message[2].as_str().unwrap().to_owned(), message[4].clone())
    }

    /// Broadcasts this payload on a joined topic, without asking for an answer.
    pub(crate) async fn publish(&mut self, sub_topic: &str, payload: Value) {
        let envelope = json!({ "type": "broadcast", "event": "e", "payload": payload });
        let topic = format!("realtime:{sub_topic}");
        self.send(json!([null, null, topic, "broadcast", envelope])).await;
    }

    /// Fails unless the next thing to arrive is a broadcast of this payload on this topic.
    pub(crate) async fn hears(&mut self, sub_topic: &str, payload: Value) {
        let envelope = json!({ "type": "broadcast", "event": "e", "payload": payload });
        assert_eq!(self.broadcast().await, (format!("realtime:{sub_topic}"), envelope));
    }

    /// The code with which the server closes, after whatever else it sends; none if it just goes.
    pub(crate) async fn closed(mut self) -> Option<u16> {
        loop {
            match timeout(DEADLINE, self.websocket.next()).await.expect("an end in time") {
                Some(Ok(Frame::Close(frame))) => return frame.map(|frame| frame.code.into()),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return None,
            }
        }
    }

    /// Closes with 1000 and waits for the server's answer.
    pub(crate) async fn close(mut self) {
        drop(self.websocket.close(None).await);
        self.closed().await;
    }

    /// Fails if anything has arrived that was not expected, then closes.
    pub(crate) async fn ends(mut self) {
        self.expect_nothing().await;
        self.close().await;
    }

    /// The stream under the WebSocket.
    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        self.websocket.get_mut()
    }

    fn next_ref(&mut self) -> String {
        self.reference += 1;
        format!("r{}", self.reference)
    }
}

/// The least that the complete list of an event holds, in its order.
pub(crate) fn resync(eid: &str) -> [String; 3] {
    ["", "/media", "/artists"].map(|rest| format!("/live/event/{eid}{rest}"))
}

/// What a client may send to have this endpoint told to an event's viewers, in each form that the
/// version knows.
pub(crate) fn invalidations(
    serializer: Serializer,
    join_ref: &str,
    topic: &str,
    endpoint: &str,
) -> Vec<Frame> {
    let event = "cache_invalidation";
    let payload = json!({ "type": "forged", "endpoints": [endpoint] });
    let envelope = json!({ "type": "broadcast", "event": event, "payload": payload });
    let message = json!([join_ref, "w", topic, "broadcast", envelope]);
    let text = Frame::text(encode(serializer, &message));
    if serializer == Serializer::V1 {
        return vec![text];
    }
    // Kind 3, as which the newest clients send a broadcast.
    let fields = [join_ref, "w", topic, event, ""];
    let lengths = fields.map(|text| u8::try_from(text.len()).unwrap());
    let binary = [&[3], &lengths[..], &[1], fields.concat().as_bytes()].concat();
    vec![text, Frame::binary([binary, payload.to_string().into_bytes()].concat())]
}

/// The client behind a socket without a connection.
pub(crate) fn client_key() -> ClientKey {
    ClientKey::new(IpAddr::from(Ipv4Addr::LOCALHOST).into(), "")
}

/// Who stands behind it in the logs.
pub(crate) fn caller() -> Caller {
    Caller::at(Ipv4Addr::LOCALHOST.into())
}

/// The query's value.
pub(crate) fn vsn(serializer: Serializer) -> &'static str {
    match serializer {
        Serializer::V1 => "1.0.0",
        Serializer::V2 => "2.0.0",
    }
}

/// A message of V2's form as the version writes it.
pub(crate) fn encode(serializer: Serializer, message: &Value) -> String {
    match serializer {
        Serializer::V1 => json!({
            "join_ref": message[0], "ref": message[1], "topic": message[2],
            "event": message[3], "payload": message[4],
        })
        .to_string(),
        Serializer::V2 => message.to_string(),
    }
}

/// A message of the server in V2's form. V1's are exactly four keys.
pub(crate) fn decode(serializer: Serializer, text: &str) -> Value {
    let message: Value = serde_json::from_str(text).expect("the server sends JSON");
    match serializer {
        Serializer::V1 => {
            assert_eq!(message.as_object().map(serde_json::Map::len), Some(4), "{message}");
            json!([null, message["ref"], message["topic"], message["event"], message["payload"]])
        }
        Serializer::V2 => {
            assert_eq!(message.as_array().map(Vec::len), Some(5), "{message}");
            message
        }
    }
}

/// A message of the server in V2's form, also that of a kind 4 frame with JSON.
pub(crate) fn message_of(serializer: Serializer, frame: &Frame) -> Value {
    match frame {
        Frame::Text(text) => decode(serializer, text),
        Frame::Binary(bytes) => {
            assert_eq!((bytes[0], bytes[4]), (4, 1), "kind 4, JSON");
            let [topic, event, metadata] = [1, 2, 3].map(|at| usize::from(bytes[at]));
            let text = |from: usize, length: usize| {
                String::from_utf8(bytes[from..from + length].to_vec()).unwrap()
            };
            let payload: Value =
                serde_json::from_slice(&bytes[5 + topic + event + metadata..]).unwrap();
            let user_event = text(5 + topic, event);
            let envelope = json!({ "type": "broadcast", "event": user_event, "payload": payload });
            json!([null, null, text(5, topic), "broadcast", envelope])
        }
        frame => panic!("no message: {frame:?}"),
    }
}

/// What of an expected message the version can show: V1 has no `join_ref`.
pub(crate) fn expected_by(serializer: Serializer, mut expected: Value) -> Value {
    if serializer == Serializer::V1 {
        expected[0] = Value::Null;
    }
    expected
}

/// Compares with the two wildcards.
pub(crate) fn matches(expected: &Value, received: &Value) -> bool {
    match (expected, received) {
        (Value::String(text), _) if text == "$any" => true,
        (Value::String(text), Value::String(uuid)) if text == "$uuid" => {
            uuid::Uuid::try_parse(uuid).is_ok()
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| matches(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| matches(a, b)))
        }
        _ => expected == received,
    }
}
