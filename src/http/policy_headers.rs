//! The headers of a request that the policies of private channels can read.

use std::sync::Arc;

use hyper::HeaderMap;
use serde_json::{Map, Value};

/// Longest JSON object of headers that is kept for a socket.
const SOCKET_HEADERS_BYTES_MAX: usize = 1024;

/// Returns the headers of an upgrade request as a JSON object, for the policies of its socket:
/// headers that begin with `x-`, except the API key and those that a proxy adds, because they would
/// take memory for as long as the socket lives. Returns `None` if no header is left or if the object
/// is longer than [`SOCKET_HEADERS_BYTES_MAX`].
pub(super) fn socket_headers(headers: &HeaderMap) -> Option<Arc<str>> {
    let added = ["x-forwarded-", "x-real-ip", "x-request-id"];
    let is_visible = |name: &str| {
        name.starts_with("x-")
            && name != "x-api-key"
            && !added.iter().any(|prefix| name.starts_with(prefix))
    };
    let json = headers_json(headers, is_visible);
    (json.len() > 2 && json.len() <= SOCKET_HEADERS_BYTES_MAX).then(|| json.into())
}

/// Returns the headers of a REST request as a JSON object, for its policies: all headers except
/// credentials.
pub(super) fn rest_headers(headers: &HeaderMap) -> Arc<str> {
    let secret = ["authorization", "apikey", "x-api-key", "cookie", "proxy-authorization"];
    headers_json(headers, |name| !secret.contains(&name)).into()
}

/// Returns a JSON object of the visible headers. Values of one name are joined by commas; a value
/// that is not visible ASCII is left out.
fn headers_json(headers: &HeaderMap, is_visible: impl Fn(&str) -> bool) -> String {
    let mut object: Map<String, Value> = Map::new();
    for (name, value) in headers {
        let (true, Ok(value)) = (is_visible(name.as_str()), value.to_str()) else { continue };
        match object.get_mut(name.as_str()) {
            Some(Value::String(values)) => {
                values.push_str(", ");
                values.push_str(value);
            }
            Some(_) | None => drop(object.insert(name.as_str().to_owned(), value.into())),
        }
    }
    Value::Object(object).to_string()
}

#[cfg(test)]
mod tests {
    use hyper::header::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn policies_see_a_requests_headers_and_nothing_that_proves_who_somebody_is() {
        let mut map = headers(&[
            ("authorization", "Bearer secret"),
            ("apikey", "secret"),
            ("x-api-key", "secret"),
            ("cookie", "secret"),
            ("proxy-authorization", "secret"),
            ("x-client-info", "a\"b"),
            ("user-agent", "c"),
        ]);
        map.append("x-client-info", HeaderValue::from_static("d"));
        map.append("x-bytes", HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(*rest_headers(&map), *r#"{"user-agent":"c","x-client-info":"a\"b, d"}"#);
        assert_eq!(*socket_headers(&map).unwrap(), *r#"{"x-client-info":"a\"b, d"}"#);
    }

    #[test]
    fn a_socket_keeps_no_headers_that_are_a_proxys_none_or_too_many() {
        let proxied = [("x-forwarded-for", "1"), ("x-real-ip", "2"), ("x-request-id", "3")];
        assert_eq!(socket_headers(&headers(&proxied)), None);
        let long = |length: usize| headers(&[("x-a", &"v".repeat(length))]);
        let most = SOCKET_HEADERS_BYTES_MAX - r#"{"x-a":""}"#.len();
        assert_eq!(
            socket_headers(&long(most)).map(|text| text.len()),
            Some(SOCKET_HEADERS_BYTES_MAX)
        );
        assert_eq!(socket_headers(&long(most + 1)), None);
    }
}
