//! A client of the operators' port: the commands that a running gateway carries out, and what it
//! shows to the doctor.
//!
//! Invariants: every wait has a bound, and so has every answer; the token goes into a header and
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

use crate::{auth::revocations::RevokedBy, secret::Secret};

/// How long an answer may take, beyond the time that the gateway gives its database.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of the answer to a command.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Why a gateway has not carried out a command.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The settings do not say where the gateway is.
    #[error("admin_listen: port 0 names no gateway; set TIDEGATE_ADMIN_LISTEN to where it listens")]
    NoPort,
    /// Nothing accepts the connection.
    #[error("nobody answers at {address} (admin_listen); is the gateway running there?")]
    Nobody {
        /// Where the gateway should be.
        address: SocketAddr,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Something accepts the connection and does not answer.
    #[error("no answer in time from {address} (admin_listen)")]
    Silent {
        /// Where the gateway should be.
        address: SocketAddr,
    },
    /// Something else listens there, or the gateway has ended meanwhile.
    #[error("no answer that can be read from {address} (admin_listen)")]
    Unreadable {
        /// Where the gateway should be.
        address: SocketAddr,
        /// What is wrong with the answer.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The gateway expects another token.
    #[error("the gateway does not take the admin_token; set TIDEGATE_ADMIN_TOKEN to its own")]
    Token,
    /// The gateway cannot use an argument.
    #[error("{message}")]
    Argument {
        /// The gateway's own words.
        message: String,
    },
    /// The gateway cannot carry it out.
    #[error("the gateway answers {status}: {message}")]
    Refused {
        /// The answer's status.
        status: StatusCode,
        /// The gateway's own words.
        message: String,
    },
    /// The gateway has told its own viewers, and could not tell those of other gateways.
    #[error("{message}")]
    OnlyHere {
        /// The gateway's own words.
        message: String,
    },
}

impl CommandError {
    /// The exit code of the command: 64 for bad arguments or settings, else 1.
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

/// The operators' port of one gateway, as the settings of both have it.
#[derive(Debug)]
pub struct Client {
    /// `admin_listen`: the address on which the gateway listens.
    pub listen: SocketAddr,
    /// `admin_token`; an empty one is not sent.
    pub token: Secret,
    /// How long the gateway may wait for its database before it answers a command.
    pub database_timeout: Duration,
}

impl Client {
    /// Has all viewers of an event fetch an endpoint again, or everything of the event. Returns the
    /// gateway's words.
    ///
    /// # Errors
    /// [`CommandError`]; repeating the command does no harm.
    pub async fn invalidate(
        &self,
        eid: &str,
        endpoint: Option<&str>,
    ) -> Result<String, CommandError> {
        let body = json!({ "endpoint": endpoint }).to_string();
        self.post(&format!("/events/{}/invalidate", encoded(eid)), body).await
    }

    /// Holds back the messages of an event for `length`. Returns the gateway's words.
    ///
    /// # Errors
    /// [`CommandError`]; repeating the command does no harm.
    pub async fn mute(&self, eid: &str, length: Duration) -> Result<String, CommandError> {
        let length = humantime::format_duration(length).to_string();
        let target = format!("/events/{}/mute?for={}", encoded(eid), encoded(&length));
        self.post(&target, String::new()).await
    }

    /// Revokes the tokens with this claim for `length`, or as long as the gateway's settings say.
    /// Returns the gateway's words.
    ///
    /// # Errors
    /// [`CommandError`]; repeating the command does no harm.
    pub async fn revoke(
        &self,
        by: RevokedBy,
        value: &str,
        length: Option<Duration>,
    ) -> Result<String, CommandError> {
        let mut body = Map::from_iter([(by.claim().to_owned(), value.into())]);
        if let Some(length) = length {
            body.insert("for".to_owned(), humantime::format_duration(length).to_string().into());
        }
        self.post("/revoke", Value::from(body).to_string()).await
    }

    /// Reads what the gateway shows under `target`, at most `bytes_max` bytes of it.
    ///
    /// # Errors
    /// [`CommandError`]; an answer of any status but 401 is none.
    pub(crate) async fn get(
        &self,
        target: &str,
        bytes_max: usize,
    ) -> Result<Response<Bytes>, CommandError> {
        let address = self.address()?;
        let read = self.exchange(address, Request::get(target), String::new(), bytes_max);
        let answer = timeout(ANSWER_TIMEOUT, read).await;
        let answer = answer.map_err(|_elapsed| CommandError::Silent { address })??;
        match answer.status() {
            StatusCode::UNAUTHORIZED => Err(CommandError::Token),
            _ => Ok(answer),
        }
    }

    async fn post(&self, target: &str, body: String) -> Result<String, CommandError> {
        let address = self.address()?;
        let limit = self.database_timeout + ANSWER_TIMEOUT;
        let request = Request::post(target);
        let answer = timeout(limit, self.exchange(address, request, body, ANSWER_BYTES_MAX)).await;
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

    /// Returns the address at which this machine reaches the gateway.
    fn address(&self) -> Result<SocketAddr, CommandError> {
        if self.listen.port() == 0 { Err(CommandError::NoPort) } else { Ok(reachable(self.listen)) }
    }

    async fn exchange(
        &self,
        address: SocketAddr,
        request: request::Builder,
        body: String,
        bytes_max: usize,
    ) -> Result<Response<Bytes>, CommandError> {
        let unreadable = |source| CommandError::Unreadable { address, source };
        let mut request =
            request.header(header::HOST, address.to_string()).header(header::CONNECTION, "close");
        if !self.token.is_empty() {
            let authorization = format!("Bearer {}", self.token.expose());
            request = request.header(header::AUTHORIZATION, authorization);
        }
        // A token that no header can hold is none that the gateway has.
        let request =
            request.body(Full::new(Bytes::from(body))).map_err(|_no_header| CommandError::Token)?;
        let stream = TcpStream::connect(address)
            .await
            .map_err(|source| CommandError::Nobody { address, source })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| unreadable(error.into()))?;
        let answer = async move {
            let answer = sender.send_request(request).await?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, bytes_max).collect().await?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        // An error that ends the connection ends the answer, too, which reports it.
        let (answer, _) = tokio::join!(answer, connection);
        answer.map_err(unreadable)
    }
}

/// Returns the address at which this machine reaches whatever listens on `listen`: the loopback
/// address of the same family where that is the unspecified one.
pub(crate) fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

fn encoded(text: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(text, NON_ALPHANUMERIC)
}

/// The answer to a command.
#[derive(Deserialize)]
struct Said {
    message: String,
    error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(listen: SocketAddr) -> Client {
        Client { listen, token: Secret::default(), database_timeout: Duration::ZERO }
    }

    #[test]
    fn a_gateway_that_listens_everywhere_is_asked_on_this_machine() {
        for (listen, asked) in [
            ("0.0.0.0:9400", "127.0.0.1:9400"),
            ("[::]:9400", "[::1]:9400"),
            ("10.0.0.1:9400", "10.0.0.1:9400"),
        ] {
            let client = client(listen.parse().unwrap());
            assert_eq!(client.address().unwrap().to_string(), asked);
        }
        let nowhere = client(([127, 0, 0, 1], 0).into());
        assert!(matches!(nowhere.address(), Err(CommandError::NoPort)));
    }
}
