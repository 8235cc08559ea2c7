//! REST broadcasts: a batch of messages, or a single one.
//!
//! Invariants: what is refused for going too fast is refused before its body is read, and where
//! possible before its token is; a batch is checked whole before any of it is sent; a body is read up
//! to its bound, in its time, and no further.

mod batch;

use std::sync::Arc;

use bytes::Bytes;
use hyper::{
    StatusCode,
    header::{self, HeaderValue},
};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use self::batch::{BatchError, Bounds, RestMessage};
use super::{
    bodies::{self, Body},
    exchange::{Refused, Request, Response, empty, header_text, message, object, query_value},
    sender::{MessageSender, PublishError, unanswered},
    shared::Shared,
    token::{TOO_MANY_REQUESTS, TokenRefused, verify},
};
use crate::{
    auth::Token,
    limits::{Effect, Kept, Limited, Place, Share, TooFast},
    protocol::{
        message::{FIELD_BYTES_MAX, Json, UserBroadcast, UserPayload},
        serializer::Broadcast,
        topic::Privacy,
    },
    telemetry::audit::{Audit, Caller},
};

/// What a sender is told whose messages go too fast, and who sends a batch that is too large.
///
/// Source: supabase/realtime `batch_broadcast.ex` @833cf36.
const TOO_FAST: &str = "You have exceeded your rate limit";
const TOO_MANY: &str = "Too many messages to broadcast, please reduce the batch size";

/// Answers `POST /api/broadcast`: `{"messages":[{"topic","event","payload","private"?,"id"?}]}`.
///
/// Source: supabase/realtime `broadcast_controller.ex`, `batch_broadcast.ex` @833cf36.
pub(super) async fn broadcast_batch(shared: &Shared, request: Request, caller: Caller) -> Response {
    let origin = shared.limits.origins.allowed(request.headers());
    let response = batch(shared, request, caller).await;
    cross_origin(shared, response, origin)
}

async fn batch(shared: &Shared, request: Request, caller: Caller) -> Response {
    let sender = match admit(shared, &request, caller) {
        Ok(sender) => sender,
        Err(refused) => return refused.response(),
    };
    let share = sender.1;
    let mut sender = MessageSender::new(shared, caller, sender, Effect::Dropped, &request);
    let (body, _kept) = match body(shared, request, caller, share).await {
        Ok(body) => body,
        Err(status) => return empty(status),
    };
    let limits = shared.limits.settings();
    let (messages_max, payload_bytes_max) = (limits.batch_messages_max, limits.payload_bytes_max);
    let messages = match batch::read(&body.bytes, Bounds { messages_max, payload_bytes_max }) {
        Ok(messages) => messages,
        Err(BatchError::Malformed) => return message(StatusCode::BAD_REQUEST, "Bad Request"),
        Err(BatchError::TooMany) => {
            shared.limits.count(Limited::BatchMessages);
            return message(StatusCode::TOO_MANY_REQUESTS, TOO_MANY);
        }
        Err(BatchError::Invalid(errors)) => return invalid(&errors),
    };
    let decide = |message: RestMessage| (sender.decide(&message.topic, message.privacy), message);
    let decided: Vec<_> = messages.into_iter().map(decide).collect();
    let costs = decided.iter().map(|(decision, message)| (decision, &message.broadcast));
    if let Err(exceeded) = sender.pay(costs) {
        let text = match exceeded.too_fast {
            TooFast::Batch => TOO_MANY,
            TooFast::One => TOO_FAST,
        };
        return message(StatusCode::TOO_MANY_REQUESTS, text);
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
    let sender = match admit(shared, &request, caller) {
        Ok(sender) => sender,
        Err(refused) => return refused.response(),
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
    let share = sender.1;
    let mut sender = MessageSender::new(shared, caller, sender, Effect::Refused, &request);
    let (Body { bytes: body, _place }, _kept) = match body(shared, request, caller, share).await {
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
    let user_broadcast = UserBroadcast { user_event: event.into(), payload };
    let broadcast = Broadcast::User { message: user_broadcast, metadata: None };
    if sender.pay([(&decision, &broadcast)].into_iter()).is_err() {
        return message(StatusCode::TOO_MANY_REQUESTS, TOO_FAST);
    }
    match sender.publish(&decision, topic, privacy, broadcast).await {
        Ok(()) => empty(StatusCode::ACCEPTED),
        Err(PublishError::Denied) => message(StatusCode::FORBIDDEN, "Unauthorized"),
        Err(PublishError::Unanswered(error)) => {
            let (status, text) = unanswered(&error);
            message(status, text)
        }
        Err(PublishError::TooFast) => message(StatusCode::TOO_MANY_REQUESTS, TOO_FAST),
    }
}

/// Admits a request before its body is read: the limits that cost no verification first, then the
/// token, then the share of its holder.
///
/// # Errors
/// [`Refused`], as the sender is told.
fn admit(
    shared: &Shared,
    request: &Request,
    caller: Caller,
) -> Result<(Arc<Token>, Share), Refused> {
    let text = token_text(request);
    let text = Some(&*text).filter(|text| !text.is_empty());
    let too_many = |text: &'static str| Refused(StatusCode::TOO_MANY_REQUESTS, text.into());
    // To look up a token that has been verified costs nothing; what servers send does not wait for
    // the requests of clients that share their address.
    let known = text.filter(|text| shared.auth.is_known(text));
    let known = known.map(|text| verify(shared, caller, Some(text)));
    let share = |token: &Token| shared.limits.share(caller, token.subject());
    let is_servers = matches!(&known, Some(Ok(token)) if share(token).is_servers());
    if !is_servers && !shared.limits.request(caller) {
        return Err(too_many(TOO_MANY_REQUESTS));
    }
    let token = known.unwrap_or_else(|| verify(shared, caller, text)).map_err(|error| {
        Audit::RefuseRest { fault: error.label() }.note(caller, None);
        match error {
            TokenRefused::Wrong(_) => Refused(StatusCode::UNAUTHORIZED, "Unauthorized".into()),
            TokenRefused::Unread => too_many(TOO_MANY_REQUESTS),
        }
    })?;
    let share = share(&token);
    if shared.limits.is_spent(share) {
        return Err(too_many(TOO_FAST));
    }
    Ok((token, share))
}

/// Returns the token of `Authorization: Bearer`, or of `apikey` where that is absent, empty or of
/// another scheme. A bare token in `Authorization` is accepted.
fn token_text(request: &Request) -> String {
    let authorization = header_text(request, "authorization").unwrap_or_default();
    let bearer = match authorization.trim().split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        Some(_) => "",
        None => authorization.trim(),
    };
    if bearer.is_empty() || bearer.eq_ignore_ascii_case("bearer") {
        header_text(request, "apikey").unwrap_or_default()
    } else {
        bearer.to_owned()
    }
}

/// Reads the whole body, which holds its place until it is dropped, and keeps the connection's place
/// from then on.
async fn body(
    shared: &Shared,
    request: Request,
    caller: Caller,
    share: Share,
) -> Result<(Body<'_>, Option<Kept>), StatusCode> {
    let place = request.extensions().get::<Arc<Place>>().cloned();
    let sender = bodies::Sender { address: caller.address().into(), is_server: share.is_servers() };
    let body = shared.bodies.read(&shared.limits, sender, request.into_body()).await?;
    Ok((body, place.as_ref().map(Place::keep)))
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
