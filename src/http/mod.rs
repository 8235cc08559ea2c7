//! The public port: routes, the upgrade to a WebSocket, the connection, REST broadcasts.
//!
//! Invariant: one `match` decides the route, and each response is counted by route and status.

mod bodies;
mod close;
mod connection;
mod exchange;
mod metrics;
mod policy_headers;
mod rest;
mod sender;
mod shared;
mod token;
mod upgrade;
mod visits;
mod write_deadline;
mod writing;

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use hyper::{Method, StatusCode};
use parking_lot::Mutex;
use tokio::{net::TcpStream, time::Instant};

pub(crate) use self::{
    bodies::Bodies,
    exchange::{Refused, Serving, body, content, empty, fields, message, not_found, object, text},
    metrics::Metrics,
    shared::Shared,
    visits::{Visits, user_agent},
};
pub use self::{
    close::CloseReason,
    exchange::{Request, Response},
    metrics::RefusedUpgrade,
};
use self::{
    metrics::{Answered, Handshake, Route},
    upgrade::upgrade,
};
use crate::{
    limits::{Place, client_ip},
    telemetry::audit::Caller,
};

/// Largest head of a request; a long JWT in the URL and in headers fits.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// How long a request may still take when everything else has ended.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Answers what no public route does.
///
/// The one seam of the server: the demo serves its pages through it.
pub type Fallback = Arc<dyn Answering>;

/// See [`Fallback`].
pub trait Answering: Send + Sync + std::fmt::Debug {
    /// Answers a request.
    fn answer(&self, request: Request) -> Pin<Box<dyn Future<Output = Response> + Send>>;
}

/// Serves one connection: requests, until one of them becomes a WebSocket. Returns the fault for which
/// it was ended, if it was for one.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    stream: TcpStream,
    peer: SocketAddr,
    place: Place,
    fallback: Option<Fallback>,
) -> Option<RefusedUpgrade> {
    let limits = shared.limits.settings();
    let serving = Serving {
        head_timeout: limits.handshake_timeout,
        head_bytes_max: Some(HEAD_BYTES_MAX),
        write_timeout: limits.write_timeout,
        patience: ANSWER_TIMEOUT,
        stop: shared.stopped.clone(),
    };
    // The time of the first request counts from the accept; the wait for those behind it is not
    // ours.
    let accepted = Mutex::new(Some(Instant::now()));
    let place = Arc::new(place);
    let answer = |mut request: Request| {
        let since = accepted.lock().take().unwrap_or_else(Instant::now);
        // Whoever asks something is not the one who has waited longest. A request keeps its place from
        // newcomers once it has come whole.
        place.renew();
        request.extensions_mut().insert(Arc::clone(&place));
        answer(Arc::clone(&shared), request, peer, fallback.clone(), since)
    };
    serving.serve(stream, &place, answer).await
}

/// Answers a request that began at `since`: the first of its connection when that was accepted.
async fn answer(
    shared: Arc<Shared>,
    request: Request,
    peer: SocketAddr,
    fallback: Option<Fallback>,
    since: Instant,
) -> Response {
    let (route, response) = route(&shared, request, peer, fallback).await;
    let (metrics, status) = (&shared.metrics, response.status());
    metrics.requests.of(Answered(route, status)).inc();
    if route == Route::Websocket {
        let is_ok = status == StatusCode::SWITCHING_PROTOCOLS;
        let handshake = if is_ok { Handshake::Ok } else { Handshake::Refused };
        metrics.handshake_seconds.of(handshake).observe(since.elapsed().as_secs_f64());
    }
    response
}

async fn route(
    shared: &Arc<Shared>,
    request: Request,
    peer: SocketAddr,
    fallback: Option<Fallback>,
) -> (Route, Response) {
    let path = request.uri().path().to_owned();
    let trusted = &shared.limits.trusted_proxies;
    let caller = Caller::at(client_ip(peer.ip(), request.headers(), trusted));
    // The fronting gateway's prefix may be there or stripped.
    let api = path.strip_prefix("/realtime/v1").unwrap_or(&path).strip_prefix("/api/broadcast");
    match (request.method(), path.as_str(), api) {
        (_, "/realtime/v1/websocket" | "/socket/websocket", _) => {
            (Route::Websocket, upgrade(shared, request, caller, peer).await)
        }
        (&Method::GET | &Method::HEAD, "/healthz", _) => {
            (Route::Health, text(StatusCode::OK, "ok"))
        }
        (&Method::OPTIONS, _, Some(_)) => (Route::Preflight, rest::preflight(shared, &request)),
        (&Method::POST, _, Some("")) => {
            (Route::Broadcast, rest::broadcast_batch(shared, request, caller).await)
        }
        (&Method::POST, _, Some(target)) => match rest::target(target) {
            Some((topic, event)) => (
                Route::Broadcast,
                rest::broadcast_single(shared, request, caller, &topic, &event).await,
            ),
            None => (Route::Unknown, not_found()),
        },
        (_, _, _) => match fallback {
            Some(fallback) => (Route::Page, fallback.answer(request).await),
            None => (Route::Unknown, not_found()),
        },
    }
}
