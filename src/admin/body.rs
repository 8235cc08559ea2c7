//! The body of an operator's request.

use bytes::Bytes;
use hyper::StatusCode;
use tokio::time::timeout;

use super::shared::Shared;
use crate::http::{self, Refused, Request};

/// Largest body of a request: an endpoint or a claim's value, escaped, and its field.
const BODY_BYTES_MAX: usize = 8 * 1024;

/// Reads the request's body, without the white space around it.
///
/// # Errors
/// [`Refused`] for one that is too large, breaks off or does not come in time.
pub(super) async fn body(shared: &Shared, request: Request) -> Result<Bytes, Refused> {
    let time = shared.limits.settings().body_timeout;
    match timeout(time, http::body(request, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => Ok(body.slice_ref(body.trim_ascii())),
        Ok(Err(status @ StatusCode::PAYLOAD_TOO_LARGE)) => {
            Err(Refused(status, "the body is too large".into()))
        }
        Ok(Err(_)) => Err(Refused::bad("the body breaks off")),
        Err(_elapsed) => Err(Refused(StatusCode::REQUEST_TIMEOUT, "the body does not come".into())),
    }
}
