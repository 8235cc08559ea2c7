//! REST broadcasts: a batch of messages, or a single one.
//!
//! Invariants: a batch is checked whole before any of it is sent; a body is read up to its bound, in
//! its time, and no further.

mod batch;

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::{
    StatusCode,
    body::Body,
    header::{self, HeaderValue},
};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use self::batch::{Batch, RestMessage};
use super::{
    exchange::{self, Request, Response, empty, header_text, message, object, query_value},
    policy_headers,
    shared::Shared,
    token::{TOO_MANY_REQUESTS, TokenRefused, verify},
};
use crate::{
    access::{AccessRequest, Action, Decision, Verdict},
    auth::Token,
    limits::{Limited, TooFast},
    policies::{PolicyQuery, QueryError},
    protocol::{
        message::{FIELD_BYTES_MAX, Json, UserBroadcast, UserPayload},
        serializer::Broadcast,
        topic::Privacy,
    },
    publish::Source,
    socket::Dropped,
    telemetry::audit::{Audit, Caller},
};

/// Largest body of a REST broadcast.
const BODY_BYTES_MAX: usize = 8_000_000;
/// How long policies may be asked about the private topics of one batch; a message whose topic has
/// no answer by then is not sent.
const QUESTIONS_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest body that needs no permit.
const SMALL_BODY_BYTES: u64 = 64 * 1024;

/// Answers `POST /api/broadcast`: `{"messages":[{"topic","event","payload","private"?,"id"?}]}`.
///
/// Source: supabase/realtime `broadcast_controller.ex`, `batch_broadcast.ex` @833cf36.
pub(super) async fn broadcast_batch(shared: &Shared, request: Request, caller: Caller) -> Response {
    let origin = shared.limits.origins.allowed(request.headers());
    let response = batch(shared, request, caller).await;
    cross_origin(shared, response, origin)
}

async fn batch(shared: &Shared, request: Request, caller: Caller) -> Response {
    let token = match rest_token(shared, &request, caller) {
        Ok(token) => token,
        Err(error) => return refused(&error),
    };
    let mut sender = MessageSender::new(shared, caller, token, &request);
    let body = match body(shared, request).await {
        Ok(body) => body,
        Err(status) => return empty(status),
    };
    let Ok(batch) = serde_json::from_slice::<Batch<'_>>(&body) else {
        return message(StatusCode::BAD_REQUEST, "Bad Request");
    };
    let messages = batch.messages.unwrap_or_default();
    if messages.is_empty() {
        return invalid(&json!({ "messages": ["can't be blank"] }));
    }
    let bytes_max = shared.limits.settings().payload_bytes_max;
    let checked: Vec<_> =
        messages.iter().map(|message| RestMessage::check(message, bytes_max)).collect();
    if checked.iter().any(Result::is_err) {
        let errors: Vec<_> =
            checked.into_iter().map(|message| message.err().unwrap_or_else(|| json!({}))).collect();
        return invalid(&json!({ "messages": errors }));
    }
    let decide = |message: RestMessage| (sender.decide(&message.topic, message.privacy), message);
    let decided: Vec<_> = checked.into_iter().flatten().map(decide).collect();
    // What may not be written costs nobody else's broadcasts.
    let count = decided.iter().filter(|(decision, _)| decision.is_allowed()).count();
    if let Err(too_fast) = shared.limits.broadcast(count) {
        return limited(
            shared,
            match too_fast {
                TooFast::Batch => "Too many messages to broadcast, please reduce the batch size",
                TooFast::One => "You have exceeded your rate limit",
            },
        );
    }
    for (decision, RestMessage { topic, privacy, broadcast }) in decided {
        // What may not be written is skipped, and the response is the same, as upstream.
        let _ = sender.publish(&decision, &topic, privacy, broadcast).await;
    }
    empty(StatusCode::ACCEPTED)
}

/// Answers `POST /api/broadcast/{topic}/events/{event}[?private=true]`, whose body is the payload.
pub(super) async fn broadcast_single(
    shared: &Shared,
    request: Request,
    caller: Caller,
    topic: &str,
    event: &str,
) -> Response {
    let origin = shared.limits.origins.allowed(request.headers());
    let response = single(shared, request, caller, topic, event).await;
    cross_origin(shared, response, origin)
}

async fn single(
    shared: &Shared,
    request: Request,
    caller: Caller,
    topic: &str,
    event: &str,
) -> Response {
    let token = match rest_token(shared, &request, caller) {
        Ok(token) => token,
        Err(error) => return refused(&error),
    };
    let content_type = header_text(&request, "content-type").unwrap_or_default();
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
    let is_private = query_value(request.uri().query().unwrap_or_default(), "private");
    let privacy =
        if is_private.as_deref() == Some("true") { Privacy::Private } else { Privacy::Public };
    let mut sender = MessageSender::new(shared, caller, token, &request);
    let body = match body(shared, request).await {
        Ok(body) => body,
        Err(status) => return empty(status),
    };
    if body.len() > shared.limits.settings().payload_bytes_max {
        return invalid(&json!({ "payload": ["Payload size exceeds tenant limit"] }));
    }
    let payload = if is_binary {
        UserPayload::Binary(body)
    } else {
        let body = if body.is_empty() { Bytes::from_static(b"{}") } else { body };
        match Json::parse(body) {
            Ok(json) => UserPayload::Json(json),
            Err(_not_json) => {
                return message(StatusCode::BAD_REQUEST, "Bad Request");
            }
        }
    };
    let decision = sender.decide(topic, privacy);
    if decision.is_allowed() && shared.limits.broadcast(1).is_err() {
        return limited(shared, "You have exceeded your rate limit");
    }
    let user_broadcast = UserBroadcast { user_event: event.into(), payload };
    let broadcast = Broadcast::User { message: user_broadcast, metadata: None };
    match sender.publish(&decision, topic, privacy, broadcast).await {
        Ok(()) => empty(StatusCode::ACCEPTED),
        Err(PublishError::Denied) => message(StatusCode::FORBIDDEN, "Unauthorized"),
        Err(PublishError::Unanswered(error)) => {
            let (status, text) = unanswered(&error);
            message(status, text)
        }
        Err(PublishError::TooFast) => limited(shared, "You have exceeded your rate limit"),
    }
}

/// Why a message is not sent.
enum PublishError {
    /// The topic may not be written to with this token.
    Denied,
    /// The policies of a private channel gave no answer.
    Unanswered(QueryError),
    /// The policies have allowed the message, and it is one too many.
    TooFast,
}

impl PublishError {
    /// The reason as the audit log names it.
    fn label(&self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Unanswered(error) => error.label(),
            Self::TooFast => "too_fast",
        }
    }
}

/// What the sender is told where the policies gave no answer.
///
/// Source: supabase/realtime `broadcast_controller.ex` @833cf36.
fn unanswered(error: &QueryError) -> (StatusCode, &'static str) {
    let status = StatusCode::UNPROCESSABLE_ENTITY;
    match error {
        QueryError::Policy { .. } => (status, "RLS policy error"),
        QueryError::QueryCanceled => (status, "Query canceled"),
        QueryError::MissingPartition => (status, "Missing messages partition"),
        QueryError::Unavailable(_) | QueryError::NotSetUp(_) => {
            (status, "Tenant database unavailable")
        }
        QueryError::PoolTimeout => (StatusCode::TOO_MANY_REQUESTS, "Connection pool exhausted"),
    }
}

/// The sender of one request's messages.
struct MessageSender<'a> {
    shared: &'a Shared,
    caller: Caller,
    token: Arc<Token>,
    /// Headers of the request as a JSON object, for RLS policies.
    headers: Arc<str>,
    /// By private topic, why it may not be written to; `None` where it may.
    answers: HashMap<Box<str>, Option<Dropped>>,
    /// When the policies are asked no more.
    deadline: Instant,
}

impl<'a> MessageSender<'a> {
    fn new(shared: &'a Shared, caller: Caller, token: Arc<Token>, request: &Request) -> Self {
        let headers = policy_headers::rest_headers(request.headers());
        let deadline = Instant::now() + QUESTIONS_TIMEOUT;
        Self { shared, caller, token, headers, answers: HashMap::new(), deadline }
    }

    /// Decides whether a topic may be written to, which of private topics only the policies know.
    fn decide(&self, sub_topic: &str, privacy: Privacy) -> Decision {
        self.shared.access.decide(&AccessRequest {
            action: Action::Write,
            sub_topic,
            privacy,
            token: Ok(&self.token.claims),
            fallback: None,
        })
    }

    /// Publishes to a topic if its rule or, on a private channel, its policies let the token write.
    async fn publish(
        &mut self,
        decision: &Decision,
        sub_topic: &str,
        privacy: Privacy,
        broadcast: Broadcast,
    ) -> Result<(), PublishError> {
        let shared = self.shared;
        let answer = match decision.verdict {
            Verdict::Policies => self.ask(sub_topic).await,
            Verdict::Allowed | Verdict::Withheld | Verdict::Refused => Ok(()),
        };
        let fault = answer.as_ref().err().map(PublishError::label);
        Audit::Rest { topic: sub_topic, decided: decision.decided(), fault }
            .note(self.caller, Some(self.token.subject()));
        match decision.verdict {
            Verdict::Allowed => {}
            // A message that may not be written costs nobody else's broadcasts, so the rate is
            // counted after the policies' answer.
            Verdict::Policies => {
                answer?;
                shared.limits.broadcast(1).map_err(|_too_fast| {
                    shared.socket.metrics.dropped.of(Dropped::Rate).inc();
                    PublishError::TooFast
                })?;
            }
            Verdict::Withheld | Verdict::Refused => {
                shared.socket.metrics.dropped.of(Dropped::WriteDenied).inc();
                return Err(PublishError::Denied);
            }
        }
        let target = shared.publisher.target(sub_topic, privacy, decision.rule.as_ref());
        shared.publisher.publish(&target, Source::Rest, vec![broadcast]).await;
        Ok(())
    }

    /// Asks the policies of a private topic, once for all messages of the request.
    async fn ask(&mut self, sub_topic: &str) -> Result<(), PublishError> {
        let dropped = &self.shared.socket.metrics.dropped;
        if let Some(answer) = self.answers.get(sub_topic) {
            let Some(reason) = answer else { return Ok(()) };
            dropped.of(*reason).inc();
            return Err(PublishError::Denied);
        }
        let may_write = if Instant::now() < self.deadline {
            let (token, headers) = (Arc::clone(&self.token), Arc::clone(&self.headers));
            let query = PolicyQuery { token, sub_topic: sub_topic.into(), headers };
            self.shared.policies.write(query).await
        } else {
            Err(QueryError::PoolTimeout)
        };
        let (answer, result) = match may_write {
            Ok(true) => (None, Ok(())),
            Ok(false) => (Some(Dropped::WriteDenied), Err(PublishError::Denied)),
            Err(error) => (Some(Dropped::WriteUnanswered), Err(PublishError::Unanswered(error))),
        };
        if let Some(reason) = answer {
            dropped.of(reason).inc();
        }
        self.answers.insert(sub_topic.into(), answer);
        result
    }
}

/// Verifies the token of `Authorization: Bearer`, or of `apikey` where that is absent, empty or of
/// another scheme. A bare token in `Authorization` is accepted.
fn rest_token(
    shared: &Shared,
    request: &Request,
    caller: Caller,
) -> Result<Arc<Token>, TokenRefused> {
    let authorization = header_text(request, "authorization").unwrap_or_default();
    let bearer = match authorization.trim().split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        Some(_) => "",
        None => authorization.trim(),
    };
    let text = if bearer.is_empty() || bearer.eq_ignore_ascii_case("bearer") {
        header_text(request, "apikey").unwrap_or_default()
    } else {
        bearer.to_owned()
    };
    let verified = verify(shared, caller, Some(&*text).filter(|text| !text.is_empty()));
    if let Err(error) = &verified {
        Audit::RefuseRest { fault: error.label() }.note(caller, None);
    }
    verified
}

/// Parses `/{topic}/events/{event}`, each percent-encoded, neither empty nor longer than a frame's
/// field.
pub(super) fn target(rest: &str) -> Option<(String, String)> {
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

/// Reads the whole body. Large ones are read a few at a time.
///
/// # Errors
/// The status of the response: those of [`exchange::body`], and 408 after the deadline.
async fn body(shared: &Shared, request: Request) -> Result<Bytes, StatusCode> {
    let time = shared.limits.settings().body_timeout;
    let is_small =
        request.body().size_hint().upper().is_some_and(|bytes| bytes <= SMALL_BODY_BYTES);
    let read = async {
        let _permit = if is_small { None } else { Some(shared.bodies.acquire().await) };
        exchange::body(request, BODY_BYTES_MAX).await
    };
    timeout(time, read).await.unwrap_or(Err(StatusCode::REQUEST_TIMEOUT))
}

/// Answers a browser's question whether a page may broadcast.
pub(super) fn preflight(shared: &Shared, request: &Request) -> Response {
    let origin = shared.limits.origins.allowed(request.headers());
    let mut response = cross_origin(shared, empty(StatusCode::NO_CONTENT), origin);
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("POST, OPTIONS"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static(
            "authorization, apikey, content-type, x-client-info, traceparent, tracestate, baggage",
        ),
    );
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    response
}

fn cross_origin(shared: &Shared, mut response: Response, origin: Option<HeaderValue>) -> Response {
    let headers = response.headers_mut();
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    if shared.limits.origins.is_listed() {
        // No cache may give one page the response to another.
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

fn refused(error: &TokenRefused) -> Response {
    match error {
        TokenRefused::Wrong(_) => message(StatusCode::UNAUTHORIZED, "Unauthorized"),
        TokenRefused::Unread => message(StatusCode::TOO_MANY_REQUESTS, TOO_MANY_REQUESTS),
    }
}

fn limited(shared: &Shared, text: &str) -> Response {
    shared.limits.count(Limited::BroadcastsRefused);
    message(StatusCode::TOO_MANY_REQUESTS, text)
}

fn invalid(errors: &Value) -> Response {
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
