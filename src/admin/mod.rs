//! The admin routes: metrics, readiness, events, drain.
//!
//! Invariants: with a token set, every route asks for it; without one, only programs of this machine
//! are answered, which a browser is not: a web page could make it ask, or have its own name point
//! here (CWE-346, CWE-350).

pub(crate) mod busiest;
pub mod client;
mod events;
mod revoke;
mod scrape;

use std::{borrow::Cow, net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    Method, StatusCode,
    header::{self, HeaderValue},
    http::uri::Authority,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use serde_json::json;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    clock::unix_seconds,
    http::{Answer, Ask, empty, object, text},
    secret::Secret,
    server::{Services, reload::ReloadError, settings::ConfigError},
    telemetry::audit::{Audit, Caller},
};

/// After so many canaries that did not arrive, the link is not relied on.
pub(crate) const CANARIES_MISSED: u32 = 3;

/// Largest body of a request: an endpoint or a claim's value, escaped, and its field.
const BODY_BYTES_MAX: usize = 8 * 1024;

/// Why a request is not done.
pub(crate) struct Refused(pub(crate) StatusCode, pub(crate) Cow<'static, str>);

impl Refused {
    pub(crate) fn bad(text: impl Into<Cow<'static, str>>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }

    fn answer(&self) -> Answer {
        object(self.0, &json!({ "message": self.1 }))
    }
}

/// Serves one connection's requests.
pub(crate) async fn serve(services: Arc<Services>, stream: TcpStream, caller: Caller) {
    let (head_timeout, stopped) =
        (services.limits.settings().handshake_timeout, services.stopped.clone());
    let service = service_fn(|ask| {
        let services = Arc::clone(&services);
        async move { Ok::<_, std::convert::Infallible>(noted(&services, ask, caller).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // What an operator's tool sends wrong is its own to see.
        _ = connection => {}
        () = stopped.cancelled() => {}
    }
}

/// Answers, and leaves a record of it. Looks that change nothing and tell of no event are too many.
async fn noted(services: &Services, ask: Ask, caller: Caller) -> Answer {
    let (method, route_name) = (ask.method().clone(), name(ask.uri().path()));
    let answer = route(services, ask, caller).await;
    let is_look = matches!(route_name, "metrics" | "healthz" | "readyz");
    let status = answer.status();
    if !is_look || matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        let (method, status) = (method.as_str(), status.as_u16());
        Audit::Admin { method, route: route_name, status }.note(caller, None);
    }
    answer
}

async fn route(services: &Services, ask: Ask, caller: Caller) -> Answer {
    if !is_allowed(&services.config.admin_token, &ask) {
        return object(StatusCode::UNAUTHORIZED, &json!({ "message": "Unauthorized" }));
    }
    if services.config.admin_token.is_empty() && is_from_a_page(&ask) {
        let text = "set admin_token to let browsers and other names in";
        return object(StatusCode::FORBIDDEN, &json!({ "message": text }));
    }
    let path = ask.uri().path().to_owned();
    let answer = match (ask.method(), path.as_str(), event_and_action(&path)) {
        (&Method::GET, "/events", _) => events::list(services, &ask).await,
        (&Method::GET, _, Some((eid, "history"))) => events::history(services, &ask, eid).await,
        (&Method::POST, _, Some((eid, "invalidate"))) => {
            events::invalidate(services, ask, eid).await
        }
        (&Method::POST, _, Some((eid, "mute"))) => events::mute(services, &ask, eid),
        (&Method::GET, "/metrics", _) => Ok(scrape::scrape(services).await),
        (&Method::GET, path, _) if let Some(nonce) = path.strip_prefix("/visits/") => {
            services.visits.show(nonce)
        }
        (&Method::POST, "/revoke", _) => revoke::revoke(services, ask, caller).await,
        (_, _, _) => Ok(route_whole(services, &ask)),
    };
    answer.unwrap_or_else(|refused| refused.answer())
}

/// `/events/{eid}/{action}`
fn event_and_action(path: &str) -> Option<(&str, &str)> {
    path.strip_prefix("/events/")?.split_once('/')
}

/// The route of a path, as the audit log names it.
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

/// The routes that are about the whole gateway.
fn route_whole(services: &Services, ask: &Ask) -> Answer {
    match (ask.method(), ask.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => text(StatusCode::OK, "ok"),
        (&Method::GET, "/readyz") => readiness(services, ask.uri().query() == Some("strict=1")),
        (&Method::POST, "/reload") => match services.reload() {
            Ok(()) => object(StatusCode::OK, &json!({ "reloaded": ["rules", "keys"] })),
            Err(error) => {
                let mistakes = match &error {
                    ReloadError::Config(ConfigError(mistakes)) => mistakes.clone(),
                    ReloadError::Keys(error) => vec![error.to_string()],
                    ReloadError::NoSource => Vec::new(),
                };
                let body = json!({ "message": error.to_string(), "mistakes": mistakes });
                object(StatusCode::UNPROCESSABLE_ENTITY, &body)
            }
        },
        (&Method::POST, "/drain") => {
            services.draining.cancel();
            empty(StatusCode::ACCEPTED)
        }
        (_, _) => object(StatusCode::NOT_FOUND, &json!({ "message": "not found" })),
    }
}

/// `{"ready":true,"draining":false,"link":"up","canary":1.25}`: 503 while draining and, if `strict`,
/// while the database link is down or nobody knows whether it works: the last canary arrived too
/// long ago. Without `strict` a link that is down does not take the gateway out of a load balancer:
/// all gateways would go at once, and their clients with them.
fn readiness(services: &Services, strict: bool) -> Answer {
    let draining = services.draining.is_cancelled();
    let metrics = &services.metrics;
    let link = match (services.config.notify_url().is_empty(), metrics.relay_link_up.get()) {
        (true, _) => "none",
        (false, 0) => "down",
        (false, _) => "up",
    };
    let arrived = metrics.canary_last.get();
    // In seconds; none before the first.
    let canary = (arrived > 0.0).then(|| {
        let age = Duration::try_from_secs_f64(unix_seconds() - arrived).unwrap_or_default();
        events::seconds(age)
    });
    let silence = canary.unwrap_or_else(|| services.events.started().elapsed().as_secs_f64());
    let patience = services.config.relay.canary_interval * CANARIES_MISSED;
    let is_deaf = link == "down" || link == "up" && silence > patience.as_secs_f64();
    let ready = !(draining || strict && is_deaf);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "ready": ready, "draining": draining, "link": link, "canary": canary });
    object(status, &body)
}

/// The request's body without the white space around it.
async fn body(services: &Services, ask: Ask) -> Result<Bytes, Refused> {
    let read = Limited::new(ask.into_body(), BODY_BYTES_MAX).collect();
    match timeout(services.limits.settings().body_timeout, read).await {
        Ok(Ok(body)) => {
            let body = body.to_bytes();
            Ok(body.slice_ref(body.trim_ascii()))
        }
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(Refused(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large".into()))
        }
        Ok(Err(_broken)) => Err(Refused::bad("the body breaks off")),
        Err(_elapsed) => Err(Refused(StatusCode::REQUEST_TIMEOUT, "the body does not come".into())),
    }
}

/// The fields of an object; a derived reader alone would take an array of them, too.
fn fields<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Option<T> {
    body.starts_with(b"{").then(|| serde_json::from_slice(body).ok()).flatten()
}

/// Whether the request carries the admin token, compared in constant time.
fn is_allowed(token: &Secret, ask: &Ask) -> bool {
    if token.is_empty() {
        return true;
    }
    ask.headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
        .is_some_and(|given| token.is(given))
}

/// Whether a browser asks on behalf of a page, or by a name that is not this machine's.
fn is_from_a_page(ask: &Ask) -> bool {
    let headers = ask.headers();
    let is_own = |value: &HeaderValue| matches!(value.as_bytes(), b"none" | b"same-origin");
    let is_here = |authority: &str| {
        authority.parse::<Authority>().is_ok_and(|authority| is_loopback(authority.host()))
    };
    let hosts = headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or_default());
    headers.contains_key(header::ORIGIN)
        || !headers.get_all("sec-fetch-site").iter().all(is_own)
        || !hosts.chain(ask.uri().authority().map(Authority::as_str)).all(is_here)
}

fn is_loopback(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|it| it.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|it| it.to_canonical().is_loopback())
}
