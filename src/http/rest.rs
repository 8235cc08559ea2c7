//! REST broadcasts: a batch of messages, or a single one.
//!
//! Invariants: a batch is checked whole before any of it is sent; a body is read up to its bound, in
//! its time, and no further.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    StatusCode,
    body::Body,
    header::{self, HeaderValue},
};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tokio::time::{Instant, timeout};

use super::{
    Answer, Ask, TOO_MANY_REQUESTS, Unverified, empty, header_text, object, query_value, verify,
};
use crate::{
    access::decision::{Action, Asked, Decision, Verdict},
    auth::jwt::Token,
    hub::{BroadcastSource, FanOut, To},
    limits::{self, TooFast},
    metrics::Dropped,
    policies::{self, Asking, AuthorizeError},
    protocol::{
        message::{FIELD_BYTES_MAX, Json, UserBroadcast, UserPayload},
        serializer::Broadcast,
        topic::{Privacy, TopicKey},
    },
    server::Services,
    telemetry::audit::{Audit, Caller},
};

/// Largest body of a REST broadcast.
const BODY_BYTES_MAX: usize = 8_000_000;
/// How long policies may be asked about the private topics of one batch; what then is not answered
/// is not sent.
const QUESTIONS_TIMEOUT: Duration = Duration::from_secs(5);
/// Up to here a body needs no place of its own.
const SMALL_BODY_BYTES: u64 = 64 * 1024;

/// `POST /api/broadcast`: `{"messages":[{"topic","event","payload","private"?,"id"?}]}`.
///
/// Source: supabase/realtime `broadcast_controller.ex`, `batch_broadcast.ex` @833cf36.
pub(crate) async fn broadcast_batch(services: &Services, ask: Ask, caller: Caller) -> Answer {
    let origin = services.limits.origins.allowed(ask.headers());
    let answer = batch(services, ask, caller).await;
    cross_origin(services, answer, origin)
}

async fn batch(services: &Services, ask: Ask, caller: Caller) -> Answer {
    let token = match rest_token(services, &ask, caller) {
        Ok(token) => token,
        Err(unverified) => return refused(&unverified),
    };
    let mut sender = Sender::new(services, caller, token, &ask);
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
    // What may not be written costs nobody else's broadcasts.
    let writable = |it: &&RestMessage| may_write(services, &sender.token, &it.topic, it.privacy);
    let count = checked.iter().flatten().filter(writable).count();
    if let Err(too_fast) = services.limits.broadcast(count) {
        return limited(
            services,
            match too_fast {
                TooFast::Batch => "Too many messages to broadcast, please reduce the batch size",
                TooFast::One => "You have exceeded your rate limit",
            },
        );
    }
    for message in checked.into_iter().flatten() {
        let RestMessage { topic, privacy, broadcast } = message;
        // What may not be written is skipped, and the answer is the same, as upstream.
        let _ = sender.publish(&topic, privacy, broadcast).await;
    }
    empty(StatusCode::ACCEPTED)
}

/// `POST /api/broadcast/{topic}/events/{event}[?private=true]`: the body is the payload.
pub(crate) async fn broadcast_single(
    services: &Services,
    ask: Ask,
    caller: Caller,
    topic: &str,
    event: &str,
) -> Answer {
    let origin = services.limits.origins.allowed(ask.headers());
    let answer = single(services, ask, caller, topic, event).await;
    cross_origin(services, answer, origin)
}

async fn single(services: &Services, ask: Ask, caller: Caller, topic: &str, event: &str) -> Answer {
    let token = match rest_token(services, &ask, caller) {
        Ok(token) => token,
        Err(unverified) => return refused(&unverified),
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
    let mut sender = Sender::new(services, caller, token, &ask);
    let body = match body(services, ask).await {
        Ok(body) => body,
        Err(status) => return empty(status),
    };
    if body.len() > services.limits.settings().payload_bytes_max {
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
    if may_write(services, &sender.token, topic, privacy) && services.limits.broadcast(1).is_err() {
        return limited(services, "You have exceeded your rate limit");
    }
    let message = UserBroadcast { user_event: event.into(), payload };
    let broadcast = Broadcast::User { message, metadata: None };
    match sender.publish(topic, privacy, broadcast).await {
        Ok(()) => empty(StatusCode::ACCEPTED),
        Err(Unsent::Denied) => object(StatusCode::FORBIDDEN, &json!({ "message": "Unauthorized" })),
        Err(Unsent::Unanswered(error)) => {
            let (status, text) = unanswered(&error);
            object(status, &json!({ "message": text }))
        }
        Err(Unsent::TooFast) => limited(services, "You have exceeded your rate limit"),
    }
}

/// Whether a broadcast may be written, which of private topics only the policies know.
fn may_write(services: &Services, token: &Token, sub_topic: &str, privacy: Privacy) -> bool {
    decide(services, token, sub_topic, privacy).is_allowed()
}

fn decide(services: &Services, token: &Token, sub_topic: &str, privacy: Privacy) -> Decision {
    services.rules().decide(&Asked {
        action: Action::Write,
        sub_topic,
        privacy,
        token: Ok(&token.claims),
        fallback: None,
    })
}

/// Why a message is not sent.
enum Unsent {
    /// The topic may not be written to with this token.
    Denied,
    /// The policies of a private channel gave no answer.
    Unanswered(AuthorizeError),
    /// They have allowed it, and it is one too many.
    TooFast,
}

impl Unsent {
    /// The reason on record.
    fn kind(&self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Unanswered(error) => error.kind(),
            Self::TooFast => "too_fast",
        }
    }
}

/// What a sender is told without whose policies' answer nothing was sent.
///
/// Source: supabase/realtime `broadcast_controller.ex` @833cf36.
fn unanswered(error: &AuthorizeError) -> (StatusCode, &'static str) {
    let status = StatusCode::UNPROCESSABLE_ENTITY;
    match error {
        AuthorizeError::Policy { .. } => (status, "RLS policy error"),
        AuthorizeError::QueryCanceled => (status, "Query canceled"),
        AuthorizeError::MissingPartition => (status, "Missing messages partition"),
        AuthorizeError::Unavailable(_) | AuthorizeError::NotSetUp(_) => {
            (status, "Tenant database unavailable")
        }
        AuthorizeError::PoolTimeout => (StatusCode::TOO_MANY_REQUESTS, "Connection pool exhausted"),
    }
}

/// Who sends the messages of one request.
struct Sender<'a> {
    services: &'a Services,
    caller: Caller,
    token: Arc<Token>,
    /// Of the request, for the policies.
    headers: Arc<str>,
    /// By private topic, why it may not be written to.
    answers: HashMap<Box<str>, Option<Dropped>>,
    /// When no more questions are asked.
    deadline: Instant,
}

impl<'a> Sender<'a> {
    fn new(services: &'a Services, caller: Caller, token: Arc<Token>, ask: &Ask) -> Self {
        let headers = policies::rest_headers(ask.headers());
        let deadline = Instant::now() + QUESTIONS_TIMEOUT;
        Self { services, caller, token, headers, answers: HashMap::new(), deadline }
    }

    /// Broadcasts to a topic if its rule or, on a private channel, its policies let the token write.
    async fn publish(
        &mut self,
        sub_topic: &str,
        privacy: Privacy,
        broadcast: Broadcast,
    ) -> Result<(), Unsent> {
        let services = self.services;
        let decision = decide(services, &self.token, sub_topic, privacy);
        let answer = match decision.verdict {
            Verdict::Policies => self.ask(sub_topic).await,
            Verdict::Allowed | Verdict::Withheld | Verdict::Refused => Ok(()),
        };
        let fault = answer.as_ref().err().map(Unsent::kind);
        Audit::Rest { topic: sub_topic, decision: &decision, fault }
            .note(self.caller, Some(&self.token));
        match decision.verdict {
            Verdict::Allowed => {}
            // Who may not write costs nobody else's broadcasts, so that it is counted afterwards.
            Verdict::Policies => {
                answer?;
                services.limits.broadcast(1).map_err(|_too_fast| {
                    services.metrics.count_dropped(Dropped::Rate);
                    Unsent::TooFast
                })?;
            }
            Verdict::Withheld | Verdict::Refused => {
                services.metrics.count_dropped(Dropped::WriteDenied);
                return Err(Unsent::Denied);
            }
        }
        let (topics, event) = match decision.rule {
            Some((rule, captures)) => {
                (rule.topics(sub_topic, &captures), services.feeds.of(&rule, &captures))
            }
            None => (vec![TopicKey { sub_topic: sub_topic.into(), privacy }], None),
        };
        let mut broadcasts = vec![broadcast];
        if let Some(event) = &event {
            broadcasts = services.feeds.offer(event, broadcasts, None);
        }
        if broadcasts.is_empty() {
            return Ok(());
        }
        let (source, to) = (BroadcastSource::Rest, To::All);
        let fan_out =
            FanOut { source, topics: &topics, broadcasts: &broadcasts, committed: None, to };
        services.hub.fan_out(fan_out).await;
        Ok(())
    }

    /// Asks the policies of a private topic, once for all messages of the request.
    async fn ask(&mut self, sub_topic: &str) -> Result<(), Unsent> {
        let metrics = &self.services.metrics;
        if let Some(answer) = self.answers.get(sub_topic) {
            let Some(reason) = answer else { return Ok(()) };
            metrics.count_dropped(*reason);
            return Err(Unsent::Denied);
        }
        let may_write = if Instant::now() < self.deadline {
            let (token, headers) = (Arc::clone(&self.token), Arc::clone(&self.headers));
            let asking = Asking { token, sub_topic: sub_topic.into(), headers };
            self.services.policies.write(asking).await
        } else {
            Err(AuthorizeError::PoolTimeout)
        };
        let (answer, unsent) = match may_write {
            Ok(true) => (None, Ok(())),
            Ok(false) => (Some(Dropped::WriteDenied), Err(Unsent::Denied)),
            Err(error) => (Some(Dropped::WriteUnanswered), Err(Unsent::Unanswered(error))),
        };
        if let Some(reason) = answer {
            metrics.count_dropped(reason);
        }
        self.answers.insert(sub_topic.into(), answer);
        unsent
    }
}

/// The token of `Authorization: Bearer`, or of `apikey` where that is absent, empty or of another
/// scheme. A bare token in `Authorization` is accepted.
fn rest_token(services: &Services, ask: &Ask, caller: Caller) -> Result<Arc<Token>, Unverified> {
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
    let verified = verify(services, caller, Some(&*text).filter(|text| !text.is_empty()));
    if let Err(unverified) = &verified {
        Audit::RefuseRest { fault: unverified.kind() }.note(caller, None);
    }
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
            Some(payload) if payload.len() > services.limits.settings().payload_bytes_max => {
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
pub(crate) fn target(rest: &str) -> Option<(String, String)> {
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
    match timeout(services.limits.settings().body_timeout, read).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(StatusCode::PAYLOAD_TOO_LARGE),
        Ok(Err(_broken)) => Err(StatusCode::BAD_REQUEST),
        Err(_elapsed) => Err(StatusCode::REQUEST_TIMEOUT),
    }
}

/// Tells a browser that it may.
pub(crate) fn preflight(services: &Services, ask: &Ask) -> Answer {
    let origin = services.limits.origins.allowed(ask.headers());
    let mut answer = cross_origin(services, empty(StatusCode::NO_CONTENT), origin);
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

fn cross_origin(services: &Services, mut answer: Answer, origin: Option<HeaderValue>) -> Answer {
    let headers = answer.headers_mut();
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    if services.limits.origins.is_listed() {
        // No cache may give one page the answer to another.
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
    answer
}

fn refused(unverified: &Unverified) -> Answer {
    match unverified {
        Unverified::Wrong(_) => {
            object(StatusCode::UNAUTHORIZED, &json!({ "message": "Unauthorized" }))
        }
        Unverified::Unread => {
            object(StatusCode::TOO_MANY_REQUESTS, &json!({ "message": TOO_MANY_REQUESTS }))
        }
    }
}

fn limited(services: &Services, text: &str) -> Answer {
    services.limits.count(limits::Limited::BroadcastsRefused);
    object(StatusCode::TOO_MANY_REQUESTS, &json!({ "message": text }))
}

fn invalid(errors: &Value) -> Answer {
    object(StatusCode::UNPROCESSABLE_ENTITY, &json!({ "errors": errors }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_messages_path_is_decoded_part_by_part() {
        let read = |path| target(path).map(|(topic, event)| format!("{topic}|{event}"));
        assert_eq!(read("/room%2F1/events/my%20event").as_deref(), Some("room/1|my event"));
        assert_eq!(read("/room/events/"), None);
        assert_eq!(read("/room/events/a/b"), None);
        assert_eq!(read("/room"), None);
        assert_eq!(read(&format!("/{}/events/e", "t".repeat(256))), None);
    }
}
