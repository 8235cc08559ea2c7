//! The commands that ask a running gateway for something, at the admin address of the settings.
//!
//! Invariants: every wait has a bound, and so has what is read; the token goes into a header and
//! nowhere else.

use std::{
    error::Error,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response, StatusCode, client::conn::http1, header, http::request};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::{net::TcpStream, time::timeout};

use crate::{auth::revocations::RevokedBy, server::settings::Config};

/// How long an answer may take beyond what the gateway gives its database.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Most that is read of an answer.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Why a gateway has not done what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The settings do not say where it is.
    #[error("admin_listen: port 0 names no gateway; set TIDEGATE_ADMIN_LISTEN to where it listens")]
    NoPort,
    /// There is none.
    #[error("nobody answers at {address} (admin_listen); is the gateway running there?")]
    Nobody {
        /// Where it was looked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something accepts the connection and says nothing.
    #[error("no answer in time from {address} (admin_listen)")]
    Silent {
        /// Where it was looked for.
        address: SocketAddr,
    },
    /// Something else is there, or it ended meanwhile.
    #[error("no answer that can be read from {address} (admin_listen)")]
    Unreadable {
        /// Where it was looked for.
        address: SocketAddr,
        /// What was wrong.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// It asks for another token.
    #[error("the gateway does not take the admin_token; set TIDEGATE_ADMIN_TOKEN to its own")]
    Token,
    /// It does not know what to make of an argument.
    #[error("{message}")]
    Argument {
        /// The gateway's own words.
        message: String,
    },
    /// It cannot.
    #[error("the gateway answers {status}: {message}")]
    Refused {
        /// Of the answer.
        status: StatusCode,
        /// The gateway's own words.
        message: String,
    },
    /// It has told its own viewers; those of others know nothing.
    #[error("{message}")]
    OnlyHere {
        /// The gateway's own words.
        message: String,
    },
}

impl CommandError {
    /// Of the process: 64 for bad arguments or settings.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoPort | Self::Token | Self::Argument { .. } => 64,
            Self::Nobody { .. }
            | Self::Silent { .. }
            | Self::Unreadable { .. }
            | Self::Refused { .. }
            | Self::OnlyHere { .. } => 1,
        }
    }
}

/// Has an endpoint of an event fetched again, or everything of it. Gives what the gateway says.
///
/// # Errors
/// [`CommandError`]; asking again does no harm.
pub async fn invalidate(
    config: &Config,
    eid: &str,
    endpoint: Option<&str>,
) -> Result<String, CommandError> {
    let body = json!({ "endpoint": endpoint }).to_string();
    post(config, &format!("/events/{}/invalidate", encoded(eid)), body).await
}

/// Holds back what an event is sent, for so long. Gives what the gateway says.
///
/// # Errors
/// [`CommandError`]; asking again does no harm.
pub async fn mute(config: &Config, eid: &str, length: Duration) -> Result<String, CommandError> {
    let length = humantime::format_duration(length).to_string();
    let target = format!("/events/{}/mute?for={}", encoded(eid), encoded(&length));
    post(config, &target, String::new()).await
}

/// Revokes the tokens with this claim, for so long or as long as the gateway's settings say. Gives
/// what the gateway says.
///
/// # Errors
/// [`CommandError`]; asking again does no harm.
pub async fn revoke(
    config: &Config,
    by: RevokedBy,
    value: &str,
    length: Option<Duration>,
) -> Result<String, CommandError> {
    let mut body = Map::from_iter([(by.claim().to_owned(), value.into())]);
    if let Some(length) = length {
        body.insert("for".to_owned(), humantime::format_duration(length).to_string().into());
    }
    post(config, "/revoke", Value::from(body).to_string()).await
}

fn encoded(text: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(text, NON_ALPHANUMERIC)
}

#[derive(Deserialize)]
struct Said {
    message: String,
    error: Option<String>,
}

async fn post(config: &Config, target: &str, body: String) -> Result<String, CommandError> {
    let address = address(config.admin_listen)?;
    let limit = config.relay.connect_timeout + ANSWER_TIMEOUT;
    let ask = Request::post(target);
    let answer = timeout(limit, exchange(config, address, ask, body, ANSWER_BYTES_MAX)).await;
    let answer = answer.map_err(|_elapsed| CommandError::Silent { address })??;
    let (status, body) = (answer.status(), answer.body());
    let said = serde_json::from_slice::<Said>(body);
    let message = match &said {
        Ok(said) => said.message.clone(),
        Err(_) => "an answer that is not a gateway's".to_owned(),
    };
    match (status, said) {
        (StatusCode::UNAUTHORIZED, _) => Err(CommandError::Token),
        (StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE, Ok(_)) => {
            Err(CommandError::Argument { message })
        }
        (StatusCode::OK | StatusCode::ACCEPTED, Ok(Said { error: None, .. })) => Ok(message),
        (StatusCode::OK | StatusCode::ACCEPTED, Ok(Said { error: Some(_), .. })) => {
            Err(CommandError::OnlyHere { message })
        }
        (status, _) => Err(CommandError::Refused { status, message }),
    }
}

/// Where the gateway is found from this machine.
fn address(listen: SocketAddr) -> Result<SocketAddr, CommandError> {
    if listen.port() == 0 {
        return Err(CommandError::NoPort);
    }
    let ip = match listen.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Ok(SocketAddr::new(ip, listen.port()))
}

/// What the gateway shows under this target, at most so many bytes of it.
///
/// # Errors
/// [`CommandError`]; an answer of any status but that of a wrong token is none.
pub(crate) async fn get(
    config: &Config,
    target: &str,
    bytes_max: usize,
) -> Result<Response<Bytes>, CommandError> {
    let address = address(config.admin_listen)?;
    let look = exchange(config, address, Request::get(target), String::new(), bytes_max);
    let answer = timeout(ANSWER_TIMEOUT, look).await;
    let answer = answer.map_err(|_elapsed| CommandError::Silent { address })??;
    match answer.status() {
        StatusCode::UNAUTHORIZED => Err(CommandError::Token),
        _ => Ok(answer),
    }
}

async fn exchange(
    config: &Config,
    address: SocketAddr,
    ask: request::Builder,
    body: String,
    bytes_max: usize,
) -> Result<Response<Bytes>, CommandError> {
    let unreadable = |source| CommandError::Unreadable { address, source };
    let mut ask = ask.header(header::HOST, address.to_string()).header(header::CONNECTION, "close");
    if !config.admin_token.is_empty() {
        let authorization = format!("Bearer {}", config.admin_token.expose());
        ask = ask.header(header::AUTHORIZATION, authorization);
    }
    // A token that no header can hold is none that the gateway has.
    let ask = ask.body(Full::new(Bytes::from(body))).map_err(|_no_header| CommandError::Token)?;
    let stream = TcpStream::connect(address)
        .await
        .map_err(|source| CommandError::Nobody { address, source })?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreadable(error.into()))?;
    let answer = async move {
        let answer = sender.send_request(ask).await?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, bytes_max).collect().await?;
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    // What breaks the connection breaks the answer, which says so.
    let (answer, _) = tokio::join!(answer, connection);
    answer.map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_that_listens_everywhere_is_asked_on_this_machine() {
        for (listen, asked) in [
            ("0.0.0.0:9400", "127.0.0.1:9400"),
            ("[::]:9400", "[::1]:9400"),
            ("10.0.0.1:9400", "10.0.0.1:9400"),
        ] {
            assert_eq!(address(listen.parse().unwrap()).unwrap().to_string(), asked);
        }
        assert!(matches!(address(([127, 0, 0, 1], 0).into()), Err(CommandError::NoPort)));
    }
}
