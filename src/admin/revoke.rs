//! `POST /revoke`: tokens that are good and shall open nothing.
//!
//! Invariant: what is answered with 202 counts on this gateway already; whether other gateways and
//! the next process know of it, the answer says.

use std::time::Duration;

use hyper::StatusCode;
use serde::Deserialize;
use serde_json::json;
use tokio::time::timeout;

use super::{body::body, shared::Shared};
use crate::{
    auth::revocations::{Full, Revocation, RevokedBy, Stored, VALUE_BYTES_MAX},
    clock::unix_now,
    db::revocations::{self, RevocationRow},
    http::{Refused, Request, Response, fields, object},
    telemetry::audit::{Audit, Caller},
};

/// Longest revocation: ten years, as long as an anon key lives.
const LENGTH_MAX: Duration = Duration::from_secs(3660 * 24 * 3600);

/// `{"sub":"…"}`, `{"session_id":"…"}` or `{"jti":"…"}`, and `"for":"5h"` unless the setting is
/// meant; `0s` takes it back.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    sub: Option<Box<str>>,
    session_id: Option<Box<str>>,
    jti: Option<Box<str>>,
    #[serde(rename = "for")]
    length: Option<Box<str>>,
}

/// Revokes, here at once and through the database everywhere.
///
/// `{"claim":"sub","until":1767225600,"via":"database","error":null,"message":"…"}`
///
/// # Errors
/// [`Refused`] for a body that names no claim, or more than one, and for a full list.
pub(super) async fn revoke(
    shared: &Shared,
    request: Request,
    caller: Caller,
) -> Result<Response, Refused> {
    let (by, value, length) = asked(shared, &body(shared, request).await?)?;
    let now = unix_now();
    let until = now.saturating_add(i64::try_from(length.as_secs()).unwrap_or(i64::MAX));
    let revocation = Revocation { by, value: value.clone(), at: now, until };
    let list = &shared.auth.revocations;
    let full = |full: Full| Refused(StatusCode::INSUFFICIENT_STORAGE, full.to_string().into());
    // Here first: the database may take its time.
    list.revoke(revocation.clone(), Stored::No, now).map_err(full)?;
    shared.sockets.review();
    let stored = match &shared.pool {
        Some(pool) => {
            let row = RevocationRow {
                claim: by.claim().to_owned(),
                value: String::from(value.clone()),
                at: now,
                until,
            };
            let store = revocations::revoke(pool, &row);
            match timeout(shared.database_timeout, store).await {
                Ok(stored) => Some(stored.map_err(|_no_detail| "the database refuses it")),
                Err(_elapsed) => Some(Err("the database does not answer")),
            }
        }
        None => None,
    };
    if let Some(Ok(())) = stored {
        list.revoke(revocation, Stored::Yes, now).map_err(full)?;
    }
    let (via, error) = match stored {
        Some(Ok(())) => ("database", None),
        Some(Err(error)) => ("gateway", Some(error)),
        None => ("gateway", None),
    };
    let result = match (length.is_zero(), via) {
        (true, _) => "taken_back",
        (false, "database") => "everywhere",
        (false, _) => "here",
    };
    Audit::Revoke { by: by.claim(), value: &value, result }.note(caller, None);
    tracing::info!(claim = by.claim(), until, via, "an operator has revoked");
    let what = match (length.is_zero(), by) {
        (true, _) => format!("{} opens again what it opened", by.claim()),
        (false, RevokedBy::Sub) => {
            "tokens of sub that were issued until now open nothing".to_owned()
        }
        (false, RevokedBy::SessionId | RevokedBy::Jti) => {
            format!("tokens of {} open nothing", by.claim())
        }
    };
    let message = match (via, error) {
        ("database", _) => format!("{what}, on every gateway"),
        (_, Some(error)) => {
            format!("{what}, on this gateway alone, until it ends: {error}")
        }
        (_, None) => format!("{what}, on this gateway, until it ends: there is no database"),
    };
    let answer = json!({
        "claim": by.claim(), "until": until, "via": via, "error": error, "message": message,
    });
    Ok(object(StatusCode::ACCEPTED, &answer))
}

/// What the body asks for.
fn asked(shared: &Shared, body: &[u8]) -> Result<(RevokedBy, Box<str>, Duration), Refused> {
    let unreadable = || {
        Refused::bad(
            "the body: expected one of {\"sub\":\"…\"}, {\"session_id\":\"…\"}, {\"jti\":\"…\"}, \
             with \"for\":\"5h\" if wanted",
        )
    };
    let Body { sub, session_id, jti, length } = fields(body).ok_or_else(unreadable)?;
    let (by, value) = match (sub, session_id, jti) {
        (Some(sub), None, None) => (RevokedBy::Sub, sub),
        (None, Some(session_id), None) => (RevokedBy::SessionId, session_id),
        (None, None, Some(jti)) => (RevokedBy::Jti, jti),
        (_, _, _) => return Err(unreadable()),
    };
    if !(1..=VALUE_BYTES_MAX).contains(&value.len()) || value.contains(char::is_control) {
        return Err(Refused::bad(format!(
            "{}: expected 1 to {VALUE_BYTES_MAX} bytes without control characters",
            by.claim()
        )));
    }
    let length = match length {
        None => shared.auth.revocation_keep(),
        Some(text) => humantime::parse_duration(&text)
            .ok()
            .filter(|length| *length <= LENGTH_MAX)
            .ok_or(Refused::bad("for: expected a duration such as 5h, at most 10 years"))?,
    };
    Ok((by, value, length))
}
