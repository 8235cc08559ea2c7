//! The public routes: the WebSocket upgrade, REST broadcasts, health.
//!
//! Invariants: one `match` decides the route; a body is read up to its bound, in its time, and no
//! further; an upgrade is refused for its token after `error_delay`, for anything else at once.

use std::{borrow::Cow, error::Error, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Incoming},
    header::{self, HeaderName, HeaderValue},
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{
    auth::jwt::{Token, TokenError, unix_now},
    connection::Connection,
    hub::{FannedOut, TopicKey},
    metrics::{Dropped, RefusedUpgrade},
    outbox::Outbox,
    protocol::{
        error_code::{ErrorCode, Refusal},
        message::{FIELD_BYTES_MAX, Json, UserBroadcast, UserPayload},
        payload::Privacy,
        serializer::{Broadcast, Serializer},
    },
    server::{Place, Services},
    socket::Socket,
    topic_rules::Found,
};

/// Largest head of a request; a long JWT in the URL and in headers fits.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// How long a request may still take when everything else has ended.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest body of a REST broadcast.
const BODY_BYTES_MAX: usize = 8_000_000;
/// Up to here a body needs no place of its own.
const SMALL_BODY_BYTES: u64 = 64 * 1024;

/// A whole answer.
pub type Answer = Response<Full<Bytes>>;
/// A request.
pub type Ask = Request<Incoming>;
/// Answers what no public route does.
///
/// The one seam of the server: the demo serves its pages through it.
pub type Fallback = Arc<dyn Answering>;

/// See [`Fallback`].
pub trait Answering: Send + Sync + std::fmt::Debug {
    /// Answers a request.
    fn answer(&self, ask: Ask) -> Pin<Box<dyn Future<Output = Answer> + Send>>;
}

/// Serves one connection: requests, until one of them becomes a WebSocket.
pub(crate) async fn serve(
    services: Arc<Services>,
    stream: TcpStream,
    peer: SocketAddr,
    fallback: Option<Fallback>,
) {
    let (head_timeout, stopped) =
        (services.config.limits.handshake_timeout, services.stopped.clone());
    let service = service_fn(|ask| {
        let (services, fallback) = (Arc::clone(&services), fallback.clone());
        async move { Ok::<_, std::convert::Infallible>(route(services, ask, fallback).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stopped.cancelled() => {
            // What is being answered is still answered; a head that is being sent is not waited for.
            connection.as_mut().graceful_shutdown();
            timeout(ANSWER_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = served {
        tracing::debug!(error = &error as &dyn Error, %peer, "request failed");
    }
}

async fn route(services: Arc<Services>, ask: Ask, fallback: Option<Fallback>) -> Answer {
    let path = ask.uri().path().to_owned();
    // The fronting gateway's prefix may be there or stripped.
    let api = path.strip_prefix("/realtime/v1").unwrap_or(&path).strip_prefix("/api/broadcast");
    match (ask.method(), path.as_str(), api) {
        (_, "/realtime/v1/websocket" | "/socket/websocket", _) => upgrade(services, ask).await,
        (&Method::GET | &Method::HEAD, "/healthz", _) => text(StatusCode::OK, "ok"),
        (&Method::OPTIONS, _, Some(_)) => preflight(),
        (&Method::POST, _, Some("")) => cross_origin(broadcast_batch(&services, ask).await),
        (&Method::POST, _, Some(rest)) => match single_target(rest) {
            Some((topic, event)) => {
                cross_origin(broadcast_single(&services, ask, &topic, &event).await)
            }
            None => not_found(),
        },
        (_, _, _) => match fallback {
            Some(fallback) => fallback.answer(ask).await,
            None => not_found(),
        },
    }
}

/// Opens a WebSocket: version, then key, then place.
async fn upgrade(services: Arc<Services>, mut ask: Ask) -> Answer {
    let Some(accept) = websocket_accept(&ask) else {
        return refuse(&services, RefusedUpgrade::BadRequest, empty(StatusCode::BAD_REQUEST));
    };
    let query = ask.uri().query().unwrap_or_default().to_owned();
    let Some(serializer) = Serializer::from_vsn(query_value(&query, "vsn").as_deref()) else {
        return refuse(&services, RefusedUpgrade::Version, empty(StatusCode::FORBIDDEN));
    };
    if services.draining.is_cancelled() {
        return draining(&services);
    }
    let apikey = header_text(&ask, "x-api-key").or_else(|| query_value(&query, "apikey"));
    let verified = match apikey {
        None => Err(TokenError::Missing),
        Some(text) => services.verifier.verify(&without_whitespace(&text), unix_now()),
    };
    services.metrics.count_token(&verified);
    let token = match verified {
        Ok(token) => token,
        Err(error) => {
            tracing::debug!(reason = error.kind(), "upgrade refused");
            sleep(services.config.protocol.error_delay).await;
            let answer = refused_upgrade(&error.refuse_upgrade());
            return refuse(&services, RefusedUpgrade::Token, answer);
        }
    };
    let outbox = Arc::new(Outbox::new(serializer, services.config.limits.outbox_bytes_max));
    let place = match Place::take(&services, &outbox) {
        Ok(place) => place,
        Err(RefusedUpgrade::Draining) => return draining(&services),
        Err(reason) => {
            let refusal = Refusal::new(ErrorCode::ConnectionRateLimitReached);
            return refuse(&services, reason, refused_upgrade(&refusal));
        }
    };
    let upgraded = hyper::upgrade::on(&mut ask);
    let connections = services.connections.clone();
    connections.spawn(open(services, upgraded, place, outbox, token));
    let mut answer = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    answer
}

/// Becomes the connection's task, once the answer has been written.
async fn open(
    services: Arc<Services>,
    upgraded: OnUpgrade,
    place: Place,
    outbox: Arc<Outbox>,
    token: Arc<Token>,
) {
    let Some((stream, read)) = taken_over(upgraded).await else {
        let refused = &services.metrics.connections_refused;
        refused.with_label_values(&[RefusedUpgrade::Abandoned.kind()]).inc();
        return;
    };
    let socket = Socket::new(Arc::clone(&services), Arc::clone(&outbox), token);
    Connection::new(services, stream, read, outbox, socket).await.run().await;
    drop(place);
}

/// The stream, and what the client has sent behind the head. That is copied: the library's buffer,
/// in which the head was read, has 8 KiB and would live as long as the socket.
async fn taken_over(upgraded: OnUpgrade) -> Option<(TcpStream, Vec<u8>)> {
    let parts = upgraded.await.ok()?.downcast::<TokioIo<TcpStream>>().ok()?;
    Some((parts.io.into_inner(), parts.read_buf.to_vec()))
}

/// The value of `Sec-WebSocket-Accept`, if the request is an upgrade of version 13.
fn websocket_accept(ask: &Ask) -> Option<HeaderValue> {
    let has = |name: HeaderName, wanted: &str| {
        ask.headers().get_all(name).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|text| text.split(',').any(|it| it.trim().eq_ignore_ascii_case(wanted)))
        })
    };
    let is_upgrade = ask.method() == Method::GET
        && has(header::CONNECTION, "upgrade")
        && has(header::UPGRADE, "websocket")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    let key = ask.headers().get(header::SEC_WEBSOCKET_KEY).filter(|_| is_upgrade)?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()
}

fn refuse(services: &Services, reason: RefusedUpgrade, answer: Answer) -> Answer {
    services.metrics.connections_refused.with_label_values(&[reason.kind()]).inc();
    answer
}

fn draining(services: &Services) -> Answer {
    let refusal = Refusal::new(ErrorCode::RealtimeRestarting);
    refuse(services, RefusedUpgrade::Draining, refused_upgrade(&refusal))
}

fn refused_upgrade(refusal: &Refusal) -> Answer {
    let status = StatusCode::from_u16(refusal.code.status()).unwrap_or(StatusCode::BAD_REQUEST);
    object(status, &json!({ "error": refusal.text() }))
}

/// `POST /api/broadcast`: `{"messages":[{"topic","event","payload","private"?,"id"?}]}`.
///
/// Source: supabase/realtime `broadcast_controller.ex`, `batch_broadcast.ex` @833cf36.
async fn broadcast_batch(services: &Services, ask: Ask) -> Answer {
    let Ok(token) = rest_token(services, &ask) else {
        return unauthorized();
    };
    let body = match body(services, ask).await {
        Ok(body) => body,
        Err(status) => return empty(status),
    };
    let Ok(batch) = serde_json::from_slice::<Batch<'_>>(&body) else {
        return object(StatusCode::BAD_REQUEST, &json!({ "message": "Bad Request" }));
    };
    let messages = batch.messages.unwrap_or_default();
    if messages.is_empty() {
        return invalid(&json!({ "messages": ["can't be blank"] }));
    }
    let checked: Vec<_> =
        messages.iter().map(|message| RestMessage::check(services, message)).collect();
    if checked.iter().any(Result::is_err) {
        let errors: Vec<_> =
            checked.into_iter().map(|it| it.err().unwrap_or_else(|| json!({}))).collect();
        return invalid(&json!({ "messages": errors }));
    }
    for message in checked.into_iter().flatten() {
        let RestMessage { topic, privacy, broadcast } = message;
        // What may not be written is skipped, and the answer is the same, as upstream.
        let _ = publish(services, &token, &topic, privacy, broadcast).await;
    }
    empty(StatusCode::ACCEPTED)
}

/// `POST /api/broadcast/{topic}/events/{event}[?private=true]`: the body is the payload.
async fn broadcast_single(services: &Services, ask: Ask, topic: &str, event: &str) -> Answer {
    let Ok(token) = rest_token(services, &ask) else {
        return unauthorized();
    };
    let content_type = header_text(&ask, "content-type").unwrap_or_default();
    let content_type = content_type.split(';').next().unwrap_or_default().trim();
    let is_binary = match content_type {
        "application/json" | "" => false,
        "application/octet-stream" => true,
        _ => {
            return object(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                &json!({ "error":
                    "Unsupported Media Type. Use application/json or application/octet-stream" }),
            );
        }
    };
    let is_private = query_value(ask.uri().query().unwrap_or_default(), "private");
    let privacy =
        if is_private.as_deref() == Some("true") { Privacy::Private } else { Privacy::Public };
    let body = match body(services, ask).await {
        Ok(body) => body,
        Err(status) => return empty(status),
    };
    if body.len() > services.config.limits.payload_bytes_max {
        return invalid(&json!({ "payload": ["Payload size exceeds tenant limit"] }));
    }
    let payload = if is_binary {
        UserPayload::Binary(body)
    } else {
        let body = if body.is_empty() { Bytes::from_static(b"{}") } else { body };
        match Json::parse(body) {
            Ok(json) => UserPayload::Json(json),
            Err(_not_json) => {
                return object(StatusCode::BAD_REQUEST, &json!({ "message": "Bad Request" }));
            }
        }
    };
    let message = UserBroadcast { user_event: event.into(), payload };
    let broadcast = Broadcast::User { message, metadata: None };
    match publish(services, &token, topic, privacy, broadcast).await {
        Ok(()) => empty(StatusCode::ACCEPTED),
        Err(Denied) => object(StatusCode::FORBIDDEN, &json!({ "message": "Unauthorized" })),
    }
}

/// The topic may not be written to with this token.
struct Denied;

/// Broadcasts to a topic if its rule lets the token write.
async fn publish(
    services: &Services,
    token: &Token,
    sub_topic: &str,
    privacy: Privacy,
    broadcast: Broadcast,
) -> Result<(), Denied> {
    let topics = match services.rules.find(sub_topic) {
        Found::Rule(rule, captures) if rule.may_write(&captures, &token.claims) => {
            rule.topics(sub_topic, &captures)
        }
        Found::Other if privacy == Privacy::Public => {
            vec![TopicKey { sub_topic: sub_topic.into(), privacy }]
        }
        // Private topics are the database's to decide, which is not asked yet.
        Found::Rule(..) | Found::Other | Found::Refused => {
            services.metrics.count_dropped(Dropped::WriteDenied);
            return Err(Denied);
        }
    };
    let (started, broadcasts) = (Instant::now(), [broadcast]);
    let mut fanned_out = FannedOut::default();
    for topic in &topics {
        fanned_out += services.hub.publish(topic, &broadcasts).await;
    }
    services.metrics.count_fan_out(&services.metrics.broadcasts_rest, 1, fanned_out, started);
    Ok(())
}

/// The token of `Authorization: Bearer`, or of `apikey` where that is absent, empty or of another
/// scheme. A bare token in `Authorization` is accepted.
fn rest_token(services: &Services, ask: &Ask) -> Result<Arc<Token>, TokenError> {
    let authorization = header_text(ask, "authorization").unwrap_or_default();
    let bearer = match authorization.trim().split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        Some(_) => "",
        None => authorization.trim(),
    };
    let text = if bearer.is_empty() || bearer.eq_ignore_ascii_case("bearer") {
        header_text(ask, "apikey").unwrap_or_default()
    } else {
        bearer.to_owned()
    };
    let verified = if text.is_empty() {
        Err(TokenError::Missing)
    } else {
        services.verifier.verify(&text, unix_now())
    };
    services.metrics.count_token(&verified);
    verified
}

#[derive(Deserialize)]
struct Batch<'a> {
    #[serde(borrow)]
    messages: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct RestFields<'a> {
    #[serde(borrow)]
    topic: Option<&'a RawValue>,
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    private: Option<Value>,
    id: Option<Value>,
}

/// One message of a batch, checked.
struct RestMessage {
    topic: String,
    privacy: Privacy,
    broadcast: Broadcast,
}

impl RestMessage {
    fn check(services: &Services, message: &RawValue) -> Result<Self, Value> {
        // The derived reader would take an array of the fields, too.
        let is_object = message.get().starts_with('{');
        let fields = serde_json::from_str::<RestFields<'_>>(message.get());
        let Some(fields) = fields.ok().filter(|_| is_object) else {
            return Err(json!({ "topic": ["is invalid"] }));
        };
        let mut errors = serde_json::Map::new();
        let topic = text_field("topic", fields.topic, &mut errors);
        let event = text_field("event", fields.event, &mut errors);
        let privacy = match &fields.private {
            None | Some(Value::Null | Value::Bool(false)) => Privacy::Public,
            Some(Value::Bool(true)) => Privacy::Private,
            Some(Value::String(text)) if matches!(text.as_str(), "true" | "1") => Privacy::Private,
            Some(Value::String(text)) if matches!(text.as_str(), "false" | "0") => Privacy::Public,
            Some(_) => {
                errors.insert("private".to_owned(), json!(["is invalid"]));
                Privacy::Private
            }
        };
        let payload = fields.payload.map(RawValue::get).filter(|it| *it != "null");
        match payload {
            None => drop(errors.insert("payload".to_owned(), json!(["can't be blank"]))),
            Some(payload) if !payload.starts_with('{') => {
                errors.insert("payload".to_owned(), json!(["is invalid"]));
            }
            Some(payload) if payload.len() > services.config.limits.payload_bytes_max => {
                let text = "Payload size exceeds tenant limit";
                errors.insert("payload".to_owned(), json!([text]));
            }
            Some(_) => {}
        }
        if !errors.is_empty() {
            return Err(errors.into());
        }
        let meta = match fields.id {
            Some(Value::String(id)) => format!(",\"meta\":{}", json!({ "id": id })),
            _ => String::new(),
        };
        // To both serializers as text, the payload as it was sent.
        let envelope = format!(
            "{{\"event\":{}{meta},\"payload\":{},\"type\":\"broadcast\"}}",
            Value::from(event),
            payload.unwrap_or("{}"),
        );
        let envelope =
            Json::parse(envelope.into()).map_err(|_deep| json!({ "payload": ["is invalid"] }))?;
        Ok(Self { topic, privacy, broadcast: Broadcast::Envelope(envelope) })
    }
}

/// A text that is neither blank nor longer than a frame's field.
fn text_field(
    name: &str,
    value: Option<&RawValue>,
    errors: &mut serde_json::Map<String, Value>,
) -> String {
    let mut wrong = |text: &str| drop(errors.insert(name.to_owned(), json!([text])));
    let Some(value) = value.filter(|value| value.get() != "null") else {
        wrong("can't be blank");
        return String::new();
    };
    match serde_json::from_str::<String>(value.get()) {
        Ok(text) if text.trim().is_empty() => wrong("can't be blank"),
        Ok(text) if text.len() > FIELD_BYTES_MAX => wrong("is too long"),
        Ok(text) => return text,
        Err(_no_text) => wrong("is invalid"),
    }
    String::new()
}

/// `/{topic}/events/{event}`, each percent-encoded, neither empty nor longer than a frame's field.
fn single_target(rest: &str) -> Option<(String, String)> {
    let (topic, event) = rest.strip_prefix('/')?.split_once("/events/")?;
    let decode = |text: &str| {
        let text = percent_decode_str(text).decode_utf8().ok()?.into_owned();
        (!text.is_empty() && text.len() <= FIELD_BYTES_MAX).then_some(text)
    };
    if event.contains('/') {
        return None;
    }
    Some((decode(topic)?, decode(event)?))
}

/// The whole body, or the status that says why not. Large ones are read a few at a time.
async fn body(services: &Services, ask: Ask) -> Result<Bytes, StatusCode> {
    let is_small = ask.body().size_hint().upper().is_some_and(|it| it <= SMALL_BODY_BYTES);
    let read = async {
        let _permit = if is_small { None } else { Some(services.bodies.acquire().await) };
        Limited::new(ask.into_body(), BODY_BYTES_MAX).collect().await
    };
    match timeout(services.config.limits.body_timeout, read).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(StatusCode::PAYLOAD_TOO_LARGE),
        Ok(Err(_broken)) => Err(StatusCode::BAD_REQUEST),
        Err(_elapsed) => Err(StatusCode::REQUEST_TIMEOUT),
    }
}

/// The first value of a query's parameter, decoded.
fn query_value(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes())
        .find(|(key, _)| key == name)
        .map(|(_, value)| Cow::into_owned(value))
}

fn header_text(ask: &Ask, name: &str) -> Option<String> {
    ask.headers().get(name)?.to_str().ok().map(str::to_owned)
}

fn without_whitespace(text: &str) -> String {
    percent_decode_str(text)
        .decode_utf8_lossy()
        .chars()
        .filter(|character| !character.is_whitespace())
        .collect()
}

fn preflight() -> Answer {
    let mut answer = cross_origin(empty(StatusCode::NO_CONTENT));
    let headers = answer.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("POST, OPTIONS"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static(
            "authorization, apikey, content-type, x-client-info, traceparent, tracestate, baggage",
        ),
    );
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    answer
}

fn cross_origin(mut answer: Answer) -> Answer {
    answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    answer
}

fn unauthorized() -> Answer {
    object(StatusCode::UNAUTHORIZED, &json!({ "message": "Unauthorized" }))
}

fn not_found() -> Answer {
    object(StatusCode::NOT_FOUND, &json!({ "message": "not found" }))
}

fn invalid(errors: &Value) -> Answer {
    object(StatusCode::UNPROCESSABLE_ENTITY, &json!({ "errors": errors }))
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer
}

/// An answer of plain text.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    content(status, "text/plain; charset=utf-8", body)
}

/// An answer of JSON.
pub(crate) fn object(status: StatusCode, body: &Value) -> Answer {
    content(status, "application/json; charset=utf-8", body.to_string())
}

/// An answer of any type.
pub(crate) fn content(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_messages_path_is_decoded_part_by_part() {
        let target = |path| single_target(path).map(|(topic, event)| format!("{topic}|{event}"));
        assert_eq!(target("/room%2F1/events/my%20event").as_deref(), Some("room/1|my event"));
        assert_eq!(target("/room/events/"), None);
        assert_eq!(target("/room/events/a/b"), None);
        assert_eq!(target("/room"), None);
        assert_eq!(target(&format!("/{}/events/e", "t".repeat(256))), None);
    }
}
