//! A client of the protocol as the browsers have it: version 1.0.0, refs from one, a heartbeat that
//! is its owner's to send.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Interval, MissedTickBehavior, interval, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{
        ClientRequestBuilder, Error as WsError, Message as Frame,
        protocol::frame::coding::CloseCode,
    },
};

use super::network::connect;

/// How long anything may take that is expected to happen, however busy the machine is.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
/// Heartbeats of the published clients.
pub(crate) const BEAT: Duration = Duration::from_secs(25);
/// Between two portions of a slow reader.
const PORTION: Duration = Duration::from_millis(100);

/// Who opens a socket.
#[derive(Clone)]
pub(crate) struct Identity<'a> {
    pub(crate) from: Ipv4Addr,
    pub(crate) agent: &'a str,
    pub(crate) token: &'a str,
    /// Bytes per second that it reads at most.
    pub(crate) reads: Option<u32>,
}

/// One WebSocket.
pub(crate) struct Client {
    websocket: WebSocketStream<Slowly>,
    reference: u64,
}

/// What comes from the gateway.
#[derive(Debug)]
pub(crate) enum Event {
    /// The answer to a message, by its ref, and why it is not ok.
    Reply { reference: String, refusal: Option<String> },
    /// A broadcast: its topic without `realtime:`, and the user's payload.
    Broadcast { sub_topic: String, payload: Box<RawValue> },
    /// The gateway has ended a channel: the topic without `realtime:`.
    ChannelEnded { sub_topic: String },
    /// Anything else.
    Other,
}

impl Client {
    /// Opens a socket.
    ///
    /// # Errors
    /// In words: the status of a refusal, or what the stream says.
    pub(crate) async fn open(at: SocketAddr, identity: &Identity<'_>) -> Result<Self, String> {
        let open = async {
            // The system would otherwise read ahead for a slow reader, whole megabytes.
            let buffer = identity.reads.map(|_| 16 * 1024);
            let stream = connect(identity.from, at, buffer).await.map_err(|e| e.to_string())?;
            let stream = Slowly::new(stream, identity.reads);
            let token = identity.token;
            let url = format!("ws://{at}/realtime/v1/websocket?apikey={token}&vsn=1.0.0");
            let request = ClientRequestBuilder::new(url.parse().unwrap())
                .with_header("user-agent", identity.agent);
            match client_async(request, stream).await {
                Ok((websocket, _)) => Ok(Self { websocket, reference: 0 }),
                Err(WsError::Http(answer)) => Err(format!("refused {}", answer.status().as_u16())),
                Err(error) => Err(error.to_string()),
            }
        };
        timeout(DEADLINE, open).await.unwrap_or_else(|_| Err("no answer".to_owned()))
    }

    /// Sends a join with this token, and returns its ref.
    ///
    /// # Errors
    /// In words, when the socket has ended.
    pub(crate) async fn push_join(
        &mut self,
        sub_topic: &str,
        token: &str,
    ) -> Result<String, String> {
        let config = json!({
            "broadcast": { "ack": true, "self": false }, "presence": { "key": "" },
            "postgres_changes": [], "private": false,
        });
        let payload = json!({ "config": config, "access_token": token });
        self.push(&format!("realtime:{sub_topic}"), "phx_join", &payload).await
    }

    /// Joins a topic, and waits for the answer; what comes before it is dropped.
    ///
    /// # Errors
    /// In words: the refusal, or the end of the socket.
    pub(crate) async fn join(&mut self, sub_topic: &str, token: &str) -> Result<(), String> {
        let joining = async {
            let sent = self.push_join(sub_topic, token).await?;
            self.answered(&sent).await
        };
        timeout(DEADLINE, joining).await.unwrap_or_else(|_| Err("not answered".to_owned()))
    }

    /// Waits for the answer to a message.
    ///
    /// # Errors
    /// In words: the refusal, or the end of a channel or of the socket.
    pub(crate) async fn answered(&mut self, sent: &str) -> Result<(), String> {
        loop {
            match self.next().await? {
                Event::Reply { reference, refusal } if reference == sent => {
                    return refusal.map_or(Ok(()), Err);
                }
                Event::ChannelEnded { .. } => return Err("the channel has ended".to_owned()),
                Event::Reply { .. } | Event::Broadcast { .. } | Event::Other => {}
            }
        }
    }

    /// Says something on a topic, and returns the ref.
    ///
    /// # Errors
    /// In words, when the socket has ended.
    pub(crate) async fn broadcast(
        &mut self,
        sub_topic: &str,
        payload: &Value,
    ) -> Result<String, String> {
        let payload = json!({ "type": "broadcast", "event": "said", "payload": payload });
        self.push(&format!("realtime:{sub_topic}"), "broadcast", &payload).await
    }

    /// Sends a heartbeat.
    ///
    /// # Errors
    /// In words, when the socket has ended.
    pub(crate) async fn beat(&mut self) -> Result<(), String> {
        self.push("phoenix", "heartbeat", &json!({})).await.map(drop)
    }

    async fn push(&mut self, topic: &str, event: &str, payload: &Value) -> Result<String, String> {
        self.reference += 1;
        let reference = self.reference.to_string();
        let message = json!({
            "topic": topic, "event": event, "payload": payload, "ref": reference,
            "join_ref": reference,
        });
        let sent = self.websocket.send(Frame::text(message.to_string())).await;
        sent.map(|()| reference).map_err(|error| error.to_string())
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// In words, when the socket has ended.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn next(&mut self) -> Result<Event, String> {
        match self.websocket.next().await {
            Some(Ok(Frame::Text(text))) => Ok(event(&text)),
            Some(Ok(Frame::Close(frame))) => {
                let code = frame.map_or(CloseCode::Status, |frame| frame.code);
                Err(format!("closed {}", u16::from(code)))
            }
            Some(Ok(_)) => Ok(Event::Other),
            Some(Err(error)) => Err(error.to_string()),
            None => Err("ended".to_owned()),
        }
    }

    /// Closes as a page does that is left.
    pub(crate) async fn close(mut self) {
        // It goes in any case.
        let _ = timeout(DEADLINE, self.websocket.close(None)).await;
    }
}

#[derive(Deserialize)]
struct Message<'a> {
    topic: &'a str,
    event: &'a str,
    #[serde(borrow)]
    payload: &'a RawValue,
    #[serde(rename = "ref")]
    reference: Option<&'a str>,
}

#[derive(Deserialize)]
struct Answer {
    status: String,
    response: Value,
}

#[derive(Deserialize)]
struct Envelope {
    payload: Box<RawValue>,
}

fn event(text: &str) -> Event {
    let Ok(message) = serde_json::from_str::<Message<'_>>(text) else { return Event::Other };
    let sub_topic = message.topic.strip_prefix("realtime:").unwrap_or(message.topic).to_owned();
    match (message.event, message.reference) {
        ("phx_reply", Some(reference)) => {
            let Ok(answer) = serde_json::from_str::<Answer>(message.payload.get()) else {
                return Event::Other;
            };
            let refusal = (answer.status != "ok").then(|| answer.response["reason"].to_string());
            Event::Reply { reference: reference.to_owned(), refusal }
        }
        ("phx_error" | "phx_close", _) => Event::ChannelEnded { sub_topic },
        ("broadcast", _) => match serde_json::from_str::<Envelope>(message.payload.get()) {
            Ok(Envelope { payload }) => Event::Broadcast { sub_topic, payload },
            Err(_no_envelope) => Event::Other,
        },
        (_, _) => Event::Other,
    }
}

/// A stream that reads so many bytes per second at most.
struct Slowly {
    stream: TcpStream,
    portions: Option<(Interval, usize)>,
    left: usize,
}

impl Slowly {
    fn new(stream: TcpStream, bytes_per_second: Option<u32>) -> Self {
        let portions = bytes_per_second.map(|bytes| {
            let mut ticks = interval(PORTION);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            (ticks, bytes as usize / 10)
        });
        Self { stream, portions, left: 0 }
    }
}

impl AsyncRead for Slowly {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some((ticks, portion)) = &mut this.portions else {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        };
        if this.left == 0 {
            std::task::ready!(ticks.poll_tick(cx));
            this.left = *portion;
        }
        let length = this.left.min(buf.remaining());
        let mut some = ReadBuf::new(buf.initialize_unfilled_to(length));
        std::task::ready!(Pin::new(&mut this.stream).poll_read(cx, &mut some))?;
        let read = some.filled().len();
        this.left -= read;
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Slowly {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
