//! Requests, responses and bodies of both ports, and the connections that carry them.
//!
//! Invariants: a head, a body and an answer have a bound and a time; one request of a connection is
//! answered at a time, and those behind it are read when its answer has been taken; a request that is being answered when the
//! server stops gets the time that its port grants.

use std::{
    borrow::Cow,
    convert::Infallible,
    error::Error,
    io,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{metrics::RefusedUpgrade, write_deadline::WriteDeadline};
use crate::limits::Place;

/// A request.
pub type Request = hyper::Request<Incoming>;
/// A response with its whole body.
pub type Response = hyper::Response<Full<Bytes>>;

/// How the connections of one port are served.
#[derive(Debug, Clone)]
pub(crate) struct Serving {
    /// From the connection's accept to the end of a request's head.
    pub(crate) head_timeout: Duration,
    /// Largest head; `None` leaves it to the library.
    pub(crate) head_bytes_max: Option<usize>,
    /// How long the peer may take to take an answer.
    pub(crate) write_timeout: Duration,
    /// How long a request may still take when the server stops.
    pub(crate) patience: Duration,
    /// Cancelled when the server stops.
    pub(crate) stop: CancellationToken,
}

impl Serving {
    /// Answers one connection's requests until it ends, becomes a WebSocket, makes way for a newcomer,
    /// or the server stops. Returns the fault for which it was ended, if it was for one.
    pub(crate) async fn serve<F, A>(
        self,
        stream: TcpStream,
        place: &Place,
        answer: A,
    ) -> Option<RefusedUpgrade>
    where
        F: Future<Output = Response> + Send + 'static,
        A: Fn(Request) -> F + Send,
    {
        let has_asked = AtomicBool::new(false);
        let service = service_fn(|request| {
            has_asked.store(true, Ordering::Relaxed);
            let answered = answer(request);
            async move { Ok::<_, Infallible>(answered.await) }
        });
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(self.head_timeout);
        if let Some(bytes_max) = self.head_bytes_max {
            builder.max_buf_size(bytes_max);
        }
        let stream = TokioIo::new(WriteDeadline::new(stream, self.write_timeout));
        let connection = builder.serve_connection(stream, service).with_upgrades();
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = place.displaced() => return Some(RefusedUpgrade::Displaced),
            () = self.stop.cancelled() => {
                // A head that is being sent is not waited for.
                connection.as_mut().graceful_shutdown();
                timeout(self.patience, connection).await.unwrap_or(Ok(()))
            }
        };
        let error = served.err()?;
        tracing::debug!(error = &error as &dyn Error, "request failed");
        fault(&error, has_asked.load(Ordering::Relaxed))
    }
}

/// Returns the fault of the peer for which its connection was ended. A peer that goes away, or is
/// silent between two requests, has none.
fn fault(error: &hyper::Error, has_asked: bool) -> Option<RefusedUpgrade> {
    let is_stalled = || {
        let io = error.source().and_then(|source| source.downcast_ref::<io::Error>());
        io.is_some_and(|io| io.kind() == io::ErrorKind::TimedOut)
    };
    if error.is_parse_too_large() {
        Some(RefusedUpgrade::LargeHead)
    } else if error.is_parse() {
        Some(RefusedUpgrade::MalformedHead)
    } else if error.is_timeout() {
        (!has_asked).then_some(RefusedUpgrade::HeadTimeout)
    } else {
        is_stalled().then_some(RefusedUpgrade::Stalled)
    }
}

/// Why a request is not done, as its sender is told.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) StatusCode, pub(crate) Cow<'static, str>);

impl Refused {
    /// The request is wrong.
    pub(crate) fn bad(text: impl Into<Cow<'static, str>>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }

    /// `{"message":"…"}` with the status.
    pub(crate) fn response(&self) -> Response {
        message(self.0, &self.1)
    }
}

/// Reads a request's body.
///
/// # Errors
/// 413 for more than `bytes_max`, 400 for one that breaks off. The caller sets the deadline.
pub(crate) async fn body(request: Request, bytes_max: usize) -> Result<Bytes, StatusCode> {
    match Limited::new(request.into_body(), bytes_max).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(StatusCode::PAYLOAD_TOO_LARGE),
        Err(_broken) => Err(StatusCode::BAD_REQUEST),
    }
}

/// Reads the fields of a JSON object; a derived reader alone would take an array of them, too.
pub(crate) fn fields<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Option<T> {
    body.starts_with(b"{").then(|| serde_json::from_slice(body).ok()).flatten()
}

/// Returns the first value of a query's parameter, decoded.
pub(crate) fn query_value(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes())
        .find(|(key, _)| key == name)
        .map(|(_, value)| Cow::into_owned(value))
}

/// Returns a header's value, if it is text.
pub(crate) fn header_text(request: &Request, name: &str) -> Option<String> {
    request.headers().get(name)?.to_str().ok().map(str::to_owned)
}

/// Creates a response without a body.
pub(crate) fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// Creates a response of plain text.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response {
    content(status, "text/plain; charset=utf-8", body)
}

/// Creates a response of JSON.
pub(crate) fn object(status: StatusCode, body: &Value) -> Response {
    content(status, "application/json; charset=utf-8", body.to_string())
}

/// Creates a response `{"message":"…"}`.
pub(crate) fn message(status: StatusCode, text: &str) -> Response {
    object(status, &json!({ "message": text }))
}

/// Creates the response to a path that leads nowhere.
pub(crate) fn not_found() -> Response {
    message(StatusCode::NOT_FOUND, "not found")
}

/// Creates a response of any type.
pub(crate) fn content(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
