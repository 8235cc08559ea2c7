//! The upgrade to a WebSocket.
//!
//! Invariants: an upgrade is refused for its token after `error_delay`, for anything else at once,
//! because overload must hold nobody's place; limits that cost no verification come first.

use std::{net::SocketAddr, sync::Arc};

use hyper::{
    Method, StatusCode,
    header::{self, HeaderName, HeaderValue},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::{net::TcpStream, time::sleep};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tracing::Instrument;

use super::{
    connection::Connection,
    exchange::{Request, Response, empty, header_text, object, query_value},
    metrics::RefusedUpgrade,
    policy_headers,
    shared::Shared,
    token::{TOO_MANY_REQUESTS, TokenRefused, verify},
    write_deadline::WriteDeadline,
};
use crate::{
    hub::{NoPermit, Permit, outbox::Outbox},
    limits::{AddressPermit, Limited},
    protocol::{
        error_code::{ErrorCode, Refusal},
        serializer::Serializer,
    },
    recovery::ClientKey,
    socket::Socket,
    telemetry::audit::{Audit, Caller},
};

/// Opens a WebSocket. Checked in this order: origin, version, how often the address upgrades, key,
/// place. The reference server looks at the key before any limit; here those limits come first that
/// cost no verification.
pub(super) async fn upgrade(
    shared: &Arc<Shared>,
    mut request: Request,
    caller: Caller,
    peer: SocketAddr,
) -> Response {
    let refuse = |reason, fault, response| {
        shared.count_refused(caller, reason, fault);
        response
    };
    let Some(accept) = websocket_accept(&request) else {
        return refuse(RefusedUpgrade::BadRequest, None, empty(StatusCode::BAD_REQUEST));
    };
    if !shared.limits.origins.allow(request.headers()) {
        return refuse(RefusedUpgrade::Origin, None, empty(StatusCode::FORBIDDEN));
    }
    let query = request.uri().query().unwrap_or_default().to_owned();
    let Some(serializer) = Serializer::from_vsn(query_value(&query, "vsn").as_deref()) else {
        return refuse(RefusedUpgrade::Version, None, empty(StatusCode::FORBIDDEN));
    };
    let limited = |reason| refuse(reason, None, refused(&refusal(reason)));
    if shared.draining.is_cancelled() {
        return limited(RefusedUpgrade::Draining);
    }
    if !shared.limits.addresses.shake_hands(caller.address().into()) {
        shared.limits.count(Limited::AddressHandshakes);
        return limited(RefusedUpgrade::Handshakes);
    }
    let apikey = header_text(&request, "x-api-key").or_else(|| query_value(&query, "apikey"));
    let apikey = apikey.map(|text| without_whitespace(&text));
    let token = match verify(shared, caller, apikey.as_deref()) {
        Ok(token) => token,
        Err(TokenRefused::Unread) => return limited(RefusedUpgrade::Failures),
        Err(TokenRefused::Wrong(error)) => {
            tracing::debug!(reason = error.label(), "upgrade refused");
            sleep(shared.socket.settings.error_delay).await;
            let response = refused(&error.refuse_upgrade());
            return refuse(RefusedUpgrade::Token, Some(error.label()), response);
        }
    };
    let outbox = shared.sockets.outbox(serializer);
    let Some(address) = shared.limits.connect(caller.address().into()) else {
        return limited(RefusedUpgrade::AddressFull);
    };
    let permit = match shared.sockets.admit(&outbox) {
        Ok(permit) => permit,
        Err(NoPermit::Draining) => return limited(RefusedUpgrade::Draining),
        Err(NoPermit::Full) => return limited(RefusedUpgrade::Full),
    };
    let upgraded = hyper::upgrade::on(&mut request);
    let user_agent = header_text(&request, "user-agent").unwrap_or_default();
    let client = ClientKey::new(caller.address().into(), &user_agent);
    let trusted = &shared.limits.trusted_proxies;
    shared.visits.note(&user_agent, request.headers(), caller, peer, trusted);
    let number = shared.sockets.next_number();
    let headers = policy_headers::socket_headers(request.headers());
    let socket = Arc::clone(&shared.socket);
    let socket = Socket::new(socket, Arc::clone(&outbox), token, client, caller.on(number))
        .with_headers(headers);
    let opened = open(Arc::clone(shared), upgraded, (permit, address), outbox, socket);
    shared.tasks.spawn(opened.instrument(tracing::debug_span!("connection", number)));
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    response
}

/// Becomes the connection's task, once the response has been written.
#[expect(clippy::manual_async_fn, reason = "an `async fn` has room for its arguments twice")]
fn open(
    shared: Arc<Shared>,
    upgraded: OnUpgrade,
    permits: (Permit, AddressPermit),
    outbox: Arc<Outbox>,
    socket: Socket,
) -> impl Future<Output = ()> + Send {
    async move {
        let Some((stream, read)) = taken_over(upgraded).await else {
            shared.count_refused(socket.caller(), RefusedUpgrade::Abandoned, None);
            return;
        };
        Audit::Connect.note(socket.caller(), Some(socket.apikey().subject()));
        let connection = Connection::new(shared, stream, read, outbox, socket);
        // Boxed: it exists for a moment, the task for as long as the socket.
        Box::pin(connection).await.run().await;
        drop(permits);
    }
}

/// Returns the stream, and a copy of what the client has sent behind the head. The library's
/// buffer, into which the head was read, has 8 KiB and would live as long as the socket.
async fn taken_over(upgraded: OnUpgrade) -> Option<(TcpStream, Vec<u8>)> {
    let parts = upgraded.await.ok()?.downcast::<TokioIo<WriteDeadline>>().ok()?;
    Some((parts.io.into_inner().into_inner(), parts.read_buf.to_vec()))
}

/// Returns the value of `Sec-WebSocket-Accept`, if the request is an upgrade of version 13.
fn websocket_accept(request: &Request) -> Option<HeaderValue> {
    let has = |name: HeaderName, wanted: &str| {
        request.headers().get_all(name).iter().any(|value| {
            value.to_str().is_ok_and(|text| {
                text.split(',').any(|token| token.trim().eq_ignore_ascii_case(wanted))
            })
        })
    };
    let is_upgrade = request.method() == Method::GET
        && has(header::CONNECTION, "upgrade")
        && has(header::UPGRADE, "websocket")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    let key = request.headers().get(header::SEC_WEBSOCKET_KEY).filter(|_| is_upgrade)?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()
}

/// What a client is told whose upgrade meets a limit, or a drain.
fn refusal(reason: RefusedUpgrade) -> Refusal {
    match reason {
        RefusedUpgrade::Draining => Refusal::new(ErrorCode::RealtimeRestarting),
        RefusedUpgrade::Handshakes => Refusal::new(ErrorCode::ClientJoinRateLimitReached),
        RefusedUpgrade::Failures => {
            Refusal::with_detail(ErrorCode::ClientJoinRateLimitReached, TOO_MANY_REQUESTS)
        }
        RefusedUpgrade::BadRequest
        | RefusedUpgrade::Origin
        | RefusedUpgrade::Version
        | RefusedUpgrade::Token
        | RefusedUpgrade::Full
        | RefusedUpgrade::AddressFull
        | RefusedUpgrade::Pending
        | RefusedUpgrade::Displaced
        | RefusedUpgrade::MalformedHead
        | RefusedUpgrade::LargeHead
        | RefusedUpgrade::HeadTimeout
        | RefusedUpgrade::Stalled
        | RefusedUpgrade::Abandoned => Refusal::new(ErrorCode::ConnectionRateLimitReached),
    }
}

fn refused(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.code.status()).unwrap_or(StatusCode::BAD_REQUEST);
    object(status, &json!({ "error": refusal.text() }))
}

fn without_whitespace(text: &str) -> String {
    percent_decode_str(text)
        .decode_utf8_lossy()
        .chars()
        .filter(|character| !character.is_whitespace())
        .collect()
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
