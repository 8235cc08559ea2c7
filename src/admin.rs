//! The admin routes: metrics, readiness, drain.
//!
//! Invariant: with a token set, every route asks for it.

use std::sync::Arc;

use hyper::{Method, StatusCode, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::TcpStream;

use crate::{
    auth::jwt::Secret,
    http::{Answer, Ask, content, empty, object, text},
    server::Services,
};

/// Serves one connection's requests.
pub(crate) async fn serve(services: Arc<Services>, stream: TcpStream) {
    let (timeout, stopped) = (services.config.limits.handshake_timeout, services.stopped.clone());
    let service = service_fn(|ask| {
        let answer = route(&services, &ask);
        async move { Ok::<_, std::convert::Infallible>(answer) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // What an operator's tool sends wrong is its own to see.
        _ = connection => {}
        () = stopped.cancelled() => {}
    }
}

fn route(services: &Services, ask: &Ask) -> Answer {
    if !is_allowed(&services.config.admin_token, ask) {
        return object(StatusCode::UNAUTHORIZED, &json!({ "message": "Unauthorized" }));
    }
    match (ask.method(), ask.uri().path()) {
        (&Method::GET, "/metrics") => {
            let topics = i64::try_from(services.hub.topic_count()).unwrap_or(i64::MAX);
            services.metrics.topics.set(topics);
            let body = services.metrics.render();
            content(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", body)
        }
        (&Method::GET | &Method::HEAD, "/healthz") => text(StatusCode::OK, "ok"),
        (&Method::GET, "/readyz") => readiness(services, ask.uri().query() == Some("strict=1")),
        (&Method::POST, "/drain") => {
            services.draining.cancel();
            empty(StatusCode::ACCEPTED)
        }
        (_, _) => object(StatusCode::NOT_FOUND, &json!({ "message": "not found" })),
    }
}

/// `{"ready":true,"draining":false,"link":"up"}`: 503 while draining and, if `strict`, while the
/// database link is down. Without `strict` a link that is down does not take the gateway out of a
/// load balancer: all gateways would go at once, and their clients with them.
fn readiness(services: &Services, strict: bool) -> Answer {
    let draining = services.draining.is_cancelled();
    let link = match (services.config.notify_url().is_empty(), services.metrics.relay_link_up.get())
    {
        (true, _) => "none",
        (false, 0) => "down",
        (false, _) => "up",
    };
    let ready = !(draining || strict && link == "down");
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    object(status, &json!({ "ready": ready, "draining": draining, "link": link }))
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
