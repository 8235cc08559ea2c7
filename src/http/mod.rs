//! The public routes, and the upgrade to a WebSocket.
//!
//! Invariants: one `match` decides the route; an upgrade is refused for its token after
//! `error_delay`, for anything else at once: overload must hold nobody's place.

pub mod connection;
mod rest;
pub(crate) mod visits;

use std::{borrow::Cow, error::Error, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tracing::Instrument;

use self::connection::Connection;
use crate::{
    auth::jwt::{Token, TokenError},
    hub::{NoPermit, Permit, outbox::Outbox},
    limits::{AddressPermit, Limited, client_ip},
    metrics::RefusedUpgrade,
    policies,
    protocol::{
        error_code::{ErrorCode, Refusal},
        serializer::Serializer,
    },
    recovery::ClientKey,
    server::Services,
    socket::Socket,
    telemetry::audit::{Audit, Caller},
};

/// Largest head of a request; a long JWT in the URL and in headers fits.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// How long a request may still take when everything else has ended.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// What an address is told whose token is not read.
pub(crate) const TOO_MANY_REQUESTS: &str = "Too many requests";
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
        (services.limits.settings().handshake_timeout, services.stopped.clone());
    // Of the first request; those behind it are waited for, which is not our time.
    let accepted = Mutex::new(Some(Instant::now()));
    let service = service_fn(|ask| {
        let (services, fallback) = (Arc::clone(&services), fallback.clone());
        let since = accepted.lock().take().unwrap_or_else(Instant::now);
        async move {
            Ok::<_, std::convert::Infallible>(answer(services, ask, peer, fallback, since).await)
        }
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

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// A WebSocket.
    Websocket,
    /// Broadcasts by REST, a batch of them or a single one.
    Broadcast,
    /// A browser's question whether a page may broadcast.
    Preflight,
    /// A look whether the process lives.
    Health,
    /// Nothing that there is.
    Unknown,
    /// A page of the demo.
    Page,
}

impl Route {
    /// Every route.
    pub const ALL: [Self; 6] = [
        Self::Websocket,
        Self::Broadcast,
        Self::Preflight,
        Self::Health,
        Self::Unknown,
        Self::Page,
    ];

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Websocket => "websocket",
            Self::Broadcast => "broadcast",
            Self::Preflight => "preflight",
            Self::Health => "healthz",
            Self::Unknown => "unknown",
            Self::Page => "page",
        }
    }

    /// What it can be answered with.
    #[must_use]
    pub fn statuses(self) -> &'static [StatusCode] {
        match self {
            Self::Websocket => &[
                StatusCode::SWITCHING_PROTOCOLS,
                StatusCode::BAD_REQUEST,
                StatusCode::UNAUTHORIZED,
                StatusCode::FORBIDDEN,
                StatusCode::TOO_MANY_REQUESTS,
                StatusCode::SERVICE_UNAVAILABLE,
            ],
            Self::Broadcast => &[
                StatusCode::ACCEPTED,
                StatusCode::BAD_REQUEST,
                StatusCode::UNAUTHORIZED,
                StatusCode::FORBIDDEN,
                StatusCode::REQUEST_TIMEOUT,
                StatusCode::PAYLOAD_TOO_LARGE,
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                StatusCode::UNPROCESSABLE_ENTITY,
                StatusCode::TOO_MANY_REQUESTS,
            ],
            Self::Preflight => &[StatusCode::NO_CONTENT],
            Self::Health => &[StatusCode::OK],
            Self::Unknown => &[StatusCode::NOT_FOUND],
            Self::Page => &[
                StatusCode::OK,
                StatusCode::TEMPORARY_REDIRECT,
                StatusCode::NOT_FOUND,
                StatusCode::METHOD_NOT_ALLOWED,
                StatusCode::SERVICE_UNAVAILABLE,
            ],
        }
    }
}

/// Answers a request that began at `since`: the first of its connection when that was accepted.
async fn answer(
    services: Arc<Services>,
    ask: Ask,
    peer: SocketAddr,
    fallback: Option<Fallback>,
    since: Instant,
) -> Answer {
    let (route, answer) = route(&services, ask, peer, fallback).await;
    let (metrics, status) = (&services.metrics, answer.status());
    debug_assert!(route.statuses().contains(&status), "{route:?} {status}");
    metrics.http_requests.with_label_values(&[route.kind(), status.as_str()]).inc();
    if route == Route::Websocket {
        let is_ok = status == StatusCode::SWITCHING_PROTOCOLS;
        let result = if is_ok { "ok" } else { "refused" };
        let seconds = since.elapsed().as_secs_f64();
        metrics.handshake_seconds.with_label_values(&[result]).observe(seconds);
    }
    answer
}

async fn route(
    services: &Arc<Services>,
    ask: Ask,
    peer: SocketAddr,
    fallback: Option<Fallback>,
) -> (Route, Answer) {
    let path = ask.uri().path().to_owned();
    let trusted = &services.limits.trusted_proxies;
    let caller = Caller::at(client_ip(peer.ip(), ask.headers(), trusted));
    // The fronting gateway's prefix may be there or stripped.
    let api = path.strip_prefix("/realtime/v1").unwrap_or(&path).strip_prefix("/api/broadcast");
    match (ask.method(), path.as_str(), api) {
        (_, "/realtime/v1/websocket" | "/socket/websocket", _) => {
            (Route::Websocket, upgrade(Arc::clone(services), ask, caller, peer).await)
        }
        (&Method::GET | &Method::HEAD, "/healthz", _) => {
            (Route::Health, text(StatusCode::OK, "ok"))
        }
        (&Method::OPTIONS, _, Some(_)) => (Route::Preflight, rest::preflight(services, &ask)),
        (&Method::POST, _, Some("")) => {
            (Route::Broadcast, rest::broadcast_batch(services, ask, caller).await)
        }
        (&Method::POST, _, Some(target)) => match rest::target(target) {
            Some((topic, event)) => (
                Route::Broadcast,
                rest::broadcast_single(services, ask, caller, &topic, &event).await,
            ),
            None => (Route::Unknown, not_found()),
        },
        (_, _, _) => match fallback {
            Some(fallback) => (Route::Page, fallback.answer(ask).await),
            None => (Route::Unknown, not_found()),
        },
    }
}

/// Opens a WebSocket: origin, version, how often the address knocks, then key, then place. The
/// reference server looks at the key before any limit; here those go first that cost no
/// verification.
async fn upgrade(
    services: Arc<Services>,
    mut ask: Ask,
    caller: Caller,
    peer: SocketAddr,
) -> Answer {
    let Some(accept) = websocket_accept(&ask) else {
        let answer = empty(StatusCode::BAD_REQUEST);
        return refuse(&services, caller, RefusedUpgrade::BadRequest, None, answer);
    };
    if !services.limits.origins.allow(ask.headers()) {
        let answer = empty(StatusCode::FORBIDDEN);
        return refuse(&services, caller, RefusedUpgrade::Origin, None, answer);
    }
    let query = ask.uri().query().unwrap_or_default().to_owned();
    let Some(serializer) = Serializer::from_vsn(query_value(&query, "vsn").as_deref()) else {
        let answer = empty(StatusCode::FORBIDDEN);
        return refuse(&services, caller, RefusedUpgrade::Version, None, answer);
    };
    if services.draining.is_cancelled() {
        return draining(&services, caller);
    }
    if !services.limits.addresses.shake_hands(caller.address().into()) {
        services.limits.count(Limited::AddressHandshakes);
        return too_many(&services, caller, RefusedUpgrade::Handshakes);
    }
    let apikey = header_text(&ask, "x-api-key").or_else(|| query_value(&query, "apikey"));
    let apikey = apikey.map(|text| without_whitespace(&text));
    let token = match verify(&services, caller, apikey.as_deref()) {
        Ok(token) => token,
        Err(Unverified::Unread) => return too_many(&services, caller, RefusedUpgrade::Failures),
        Err(Unverified::Wrong(error)) => {
            tracing::debug!(reason = error.kind(), "upgrade refused");
            sleep(services.config.protocol.error_delay).await;
            let answer = refused_upgrade(&error.refuse_upgrade());
            return refuse(&services, caller, RefusedUpgrade::Token, Some(error.kind()), answer);
        }
    };
    let outbox = services.sockets.outbox(serializer);
    let Some(address) = services.limits.connect(caller.address().into()) else {
        return too_many(&services, caller, RefusedUpgrade::AddressFull);
    };
    let permit = match services.sockets.admit(&outbox) {
        Ok(permit) => (permit, address),
        Err(NoPermit::Draining) => return draining(&services, caller),
        Err(NoPermit::Full) => return too_many(&services, caller, RefusedUpgrade::Full),
    };
    let upgraded = hyper::upgrade::on(&mut ask);
    let connections = services.connections.clone();
    let user_agent = header_text(&ask, "user-agent").unwrap_or_default();
    let client = ClientKey::new(caller.address().into(), &user_agent);
    let trusted = &services.limits.trusted_proxies;
    services.visits.note(&user_agent, ask.headers(), caller, peer, trusted);
    let number = services.sockets.next_number();
    let headers = policies::socket_headers(ask.headers());
    let caller = caller.on(number);
    let socket = Socket::new(Arc::clone(&services), Arc::clone(&outbox), token, client, caller)
        .with_headers(headers);
    let opened = open(services, upgraded, permit, outbox, socket);
    connections.spawn(opened.instrument(tracing::debug_span!("connection", number)));
    let mut answer = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    answer
}

/// Becomes the connection's task, once the answer has been written.
#[expect(clippy::manual_async_fn, reason = "an `async fn` has room for its arguments twice")]
fn open(
    services: Arc<Services>,
    upgraded: OnUpgrade,
    permit: (Permit, AddressPermit),
    outbox: Arc<Outbox>,
    socket: Socket,
) -> impl Future<Output = ()> + Send {
    async move {
        let Some((stream, read)) = taken_over(upgraded).await else {
            count_refused(&services, socket.caller(), RefusedUpgrade::Abandoned, None);
            return;
        };
        Audit::Connect.note(socket.caller(), Some(socket.apikey()));
        let connection = Connection::new(services, stream, read, outbox, socket);
        // In a place of its own: it is there for a moment, the task for as long as the socket.
        Box::pin(connection).await.run().await;
        drop(permit);
    }
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

fn refuse(
    services: &Services,
    caller: Caller,
    reason: RefusedUpgrade,
    fault: Option<&'static str>,
    answer: Answer,
) -> Answer {
    count_refused(services, caller, reason, fault);
    answer
}

/// Says that a connection attempt came to nothing; `fault` is what was wrong with its token.
pub(crate) fn count_refused(
    services: &Services,
    caller: Caller,
    reason: RefusedUpgrade,
    fault: Option<&'static str>,
) {
    services.metrics.connections_refused.with_label_values(&[reason.kind()]).inc();
    Audit::RefuseUpgrade { reason: reason.kind(), fault }.note(caller, None);
}

/// Refuses an upgrade for a limit.
fn too_many(services: &Services, caller: Caller, reason: RefusedUpgrade) -> Answer {
    let refusal = match reason {
        RefusedUpgrade::Handshakes => Refusal::new(ErrorCode::ClientJoinRateLimitReached),
        RefusedUpgrade::Failures => {
            Refusal::with_detail(ErrorCode::ClientJoinRateLimitReached, TOO_MANY_REQUESTS)
        }
        _ => Refusal::new(ErrorCode::ConnectionRateLimitReached),
    };
    refuse(services, caller, reason, None, refused_upgrade(&refusal))
}

/// Why a request has no verified token.
pub(crate) enum Unverified {
    /// The token is wrong, or there is none.
    Wrong(TokenError),
    /// The address has brought too many wrong ones, and this one is not known to be right. All
    /// viewers of a venue have one address and the same key, which therefore still opens.
    Unread,
}

impl Unverified {
    /// The label of the audit log.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Wrong(error) => error.kind(),
            Self::Unread => "unread",
        }
    }
}

/// The token of a request.
pub(crate) fn verify(
    services: &Services,
    caller: Caller,
    text: Option<&str>,
) -> Result<Arc<Token>, Unverified> {
    let Some(text) = text else {
        let missing = Err(TokenError::Missing);
        services.metrics.count_token(&missing);
        return missing.map_err(Unverified::Wrong);
    };
    let (addresses, address) = (&services.limits.addresses, caller.address().into());
    let is_known = services.verifier.is_known(text);
    if !is_known && !addresses.may_fail(address) {
        services.limits.count(Limited::AddressFailures);
        return Err(Unverified::Unread);
    }
    let verified = services.verify(text);
    if !is_known && verified.is_err() {
        addresses.fail(address);
    }
    verified.map_err(Unverified::Wrong)
}

fn draining(services: &Services, caller: Caller) -> Answer {
    let refusal = Refusal::new(ErrorCode::RealtimeRestarting);
    refuse(services, caller, RefusedUpgrade::Draining, None, refused_upgrade(&refusal))
}

fn refused_upgrade(refusal: &Refusal) -> Answer {
    let status = StatusCode::from_u16(refusal.code.status()).unwrap_or(StatusCode::BAD_REQUEST);
    object(status, &json!({ "error": refusal.text() }))
}

/// The first value of a query's parameter, decoded.
pub(crate) fn query_value(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes())
        .find(|(key, _)| key == name)
        .map(|(_, value)| Cow::into_owned(value))
}

/// A header's value, if it is text.
pub(crate) fn header_text(ask: &Ask, name: &str) -> Option<String> {
    ask.headers().get(name)?.to_str().ok().map(str::to_owned)
}

fn without_whitespace(text: &str) -> String {
    percent_decode_str(text)
        .decode_utf8_lossy()
        .chars()
        .filter(|character| !character.is_whitespace())
        .collect()
}

fn not_found() -> Answer {
    object(StatusCode::NOT_FOUND, &json!({ "message": "not found" }))
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

    /// The largest part of what an idle socket costs.
    #[test]
    fn a_sockets_task_has_no_room_for_what_is_rare() {
        fn bytes<A, B, C, D, E, F>(_: fn(A, B, C, D, E) -> F) -> usize {
            size_of::<F>()
        }
        assert!(bytes(open) <= 2304, "{} bytes", bytes(open));
    }
}
