//! The operators' port: metrics, readiness, events, revocations, reload, drain.
//!
//! Invariants: with a token set, every route asks for it; without one, only programs of this machine
//! are answered, which a browser is not: a web page could make it ask, or have its own name point
//! here (CWE-346, CWE-350). A caller with the right token keeps its place while it is answered, and a
//! stranger's connection makes way for a newcomer at any time.

mod body;
mod busiest;
pub mod client;
mod events;
mod metrics;
mod revoke;
mod scrape;
mod settings;
mod shared;

use std::{net::IpAddr, sync::Arc, time::Duration};

use hyper::{
    Method, StatusCode,
    header::{self, HeaderValue},
    http::uri::Authority,
};
use serde_json::json;
use tokio::net::TcpStream;

pub use self::settings::Settings;
pub(crate) use self::{
    busiest::Busiest,
    metrics::Metrics,
    shared::{ReloadFailure, Shared},
};
use crate::{
    http::{
        Refused, RefusedUpgrade, Request, Response, Serving, empty, message, not_found, object,
        text,
    },
    limits::Place,
    secret::Secret,
    telemetry::audit::{Audit, Caller},
};

/// Number of missed canaries after which the link no longer counts as ready.
pub(crate) const CANARIES_MISSED: u32 = 3;

/// Answers one connection's requests. What is being answered when the server stops is cut off. Returns
/// the fault for which the connection was ended, if it was for one.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    stream: TcpStream,
    caller: Caller,
    place: Place,
) -> Option<RefusedUpgrade> {
    let limits = shared.limits.settings();
    let serving = Serving {
        head_timeout: limits.handshake_timeout,
        head_bytes_max: None,
        write_timeout: limits.write_timeout,
        patience: Duration::ZERO,
        stop: shared.stopped.clone(),
    };
    let place = Arc::new(place);
    let answer = |request| {
        let (shared, place) = (Arc::clone(&shared), Arc::clone(&place));
        async move { noted(&shared, request, caller, &place).await }
    };
    serving.serve(stream, &place, answer).await
}

/// Answers, and records the call. Metrics and health are recorded only if they are refused: they
/// change nothing, name no event, and are asked for all the time.
async fn noted(shared: &Shared, request: Request, caller: Caller, place: &Arc<Place>) -> Response {
    let (method, route_name) = (request.method().clone(), name(request.uri().path()));
    let answer = route(shared, request, caller, place).await;
    let is_look = matches!(route_name, "metrics" | "healthz" | "readyz");
    let status = answer.status();
    if !is_look || matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        let (method, status) = (method.as_str(), status.as_u16());
        Audit::Admin { method, route: route_name, status }.note(caller, None);
    }
    answer
}

async fn route(shared: &Shared, request: Request, caller: Caller, place: &Arc<Place>) -> Response {
    if !is_allowed(&shared.admin_token, &request) {
        return message(StatusCode::UNAUTHORIZED, "Unauthorized");
    }
    if shared.admin_token.is_empty() && is_from_a_page(&request) {
        let text = "set admin_token to let browsers and other names in";
        return message(StatusCode::FORBIDDEN, text);
    }
    // Strangers who reach the port get no further, so they displace nobody who does.
    let _kept = place.keep();
    let path = request.uri().path().to_owned();
    let answer = match (request.method(), path.as_str(), event_and_action(&path)) {
        (&Method::GET, "/events", _) => events::list(shared, &request).await,
        (&Method::GET, _, Some((eid, "history"))) => events::history(shared, &request, eid).await,
        (&Method::POST, _, Some((eid, "invalidate"))) => {
            events::invalidate(shared, request, eid).await
        }
        (&Method::POST, _, Some((eid, "mute"))) => events::mute(shared, &request, eid),
        (&Method::GET, "/metrics", _) => Ok(scrape::scrape(shared).await),
        (&Method::GET, path, _) if let Some(nonce) = path.strip_prefix("/visits/") => {
            let visit = shared.visits.show(nonce);
            let visit = visit.map(|visit| object(StatusCode::OK, &visit));
            visit.ok_or(Refused(StatusCode::NOT_FOUND, "no such visit".into()))
        }
        (&Method::POST, "/revoke", _) => revoke::revoke(shared, request, caller).await,
        (_, _, _) => Ok(route_whole(shared, &request)),
    };
    answer.unwrap_or_else(|refused| refused.response())
}

/// Parses `/events/{eid}/{action}`.
fn event_and_action(path: &str) -> Option<(&str, &str)> {
    path.strip_prefix("/events/")?.split_once('/')
}

/// Returns the route of a path as the audit log names it.
fn name(path: &str) -> &'static str {
    match (path, event_and_action(path)) {
        ("/metrics", _) => "metrics",
        ("/healthz", _) => "healthz",
        ("/readyz", _) => "readyz",
        ("/drain", _) => "drain",
        ("/reload", _) => "reload",
        ("/revoke", _) => "revoke",
        ("/events", _) => "events",
        (path, _) if path.starts_with("/visits/") => "visits",
        (_, Some((_, "history"))) => "history",
        (_, Some((_, "invalidate"))) => "invalidate",
        (_, Some((_, "mute"))) => "mute",
        (_, _) => "unknown",
    }
}

/// Answers the routes that concern the whole gateway.
fn route_whole(shared: &Shared, request: &Request) -> Response {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => text(StatusCode::OK, "ok"),
        (&Method::GET, "/readyz") => readiness(shared, request.uri().query() == Some("strict=1")),
        (&Method::POST, "/reload") => match (shared.reload)() {
            Ok(()) => object(StatusCode::OK, &json!({ "reloaded": ["rules", "keys"] })),
            Err(ReloadFailure { message, mistakes }) => {
                let body = json!({ "message": message, "mistakes": mistakes });
                object(StatusCode::UNPROCESSABLE_ENTITY, &body)
            }
        },
        (&Method::POST, "/drain") => {
            shared.draining.cancel();
            empty(StatusCode::ACCEPTED)
        }
        (_, _) => not_found(),
    }
}

/// Answers `{"ready":true,"draining":false,"link":"up","canary":1.25}`: 503 while draining and, if `strict`,
/// while the database link is down or may not work, because the last canary arrived too long
/// ago. Without `strict` a link that is down does not take the gateway out of a load balancer:
/// all gateways would go at once, and their clients with them.
fn readiness(shared: &Shared, strict: bool) -> Response {
    let draining = shared.draining.is_cancelled();
    let link = match (&shared.listens, shared.link.is_up()) {
        (None, _) => "none",
        (Some(_), false) => "down",
        (Some(_), true) => "up",
    };
    // In seconds; `None` before the first.
    let canary = shared.link.canary_age().map(events::seconds);
    let silence = canary.unwrap_or_else(|| shared.feeds.started().elapsed().as_secs_f64());
    let patience = shared.canary_interval * CANARIES_MISSED;
    let is_deaf = link == "down" || link == "up" && silence > patience.as_secs_f64();
    let ready = !(draining || strict && is_deaf);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "ready": ready, "draining": draining, "link": link, "canary": canary });
    object(status, &body)
}

/// Whether the request carries the admin token, compared in constant time.
fn is_allowed(token: &Secret, request: &Request) -> bool {
    if token.is_empty() {
        return true;
    }
    request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
        .is_some_and(|given| token.is(given))
}

/// Whether a browser asks on behalf of a page, or by a name that is not this machine's.
fn is_from_a_page(request: &Request) -> bool {
    let headers = request.headers();
    let is_own = |value: &HeaderValue| matches!(value.as_bytes(), b"none" | b"same-origin");
    let is_here = |authority: &str| {
        authority.parse::<Authority>().is_ok_and(|authority| is_loopback(authority.host()))
    };
    let hosts = headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or_default());
    headers.contains_key(header::ORIGIN)
        || !headers.get_all("sec-fetch-site").iter().all(is_own)
        || !hosts.chain(request.uri().authority().map(Authority::as_str)).all(is_here)
}

fn is_loopback(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}
