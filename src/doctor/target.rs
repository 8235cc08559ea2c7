//! The address where clients connect, and a stream to there: plain or TLS, with an error for each
//! step that fails.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use hyper::Uri;
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::pki_types::ServerName};
use tokio_util::either::Either;

use crate::{admin::client::reachable, auth::jwks};

/// Longest wait for one address to accept a connection, and for a TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for the addresses of a name.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Most addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReachError {
    #[error("the name {0} has no address (DNS)")]
    Name(String),
    #[error("nobody listens at {0}: the connection is refused")]
    Refused(String),
    #[error("{0} takes no connection in time: a firewall, or nothing is there")]
    Silent(String),
    #[error("{0} has only IPv6 addresses, and this machine has no way to them")]
    OnlyIpv6(String),
    #[error("no connection to {0}: {1}")]
    Other(String, io::Error),
    #[error("no TLS with {0}: {1}")]
    Tls(String, String),
}

impl ReachError {
    /// Returns the error of one attempt.
    fn of(error: io::Error, host: &str, place: &str, is_only_ipv6: bool) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused(place.to_owned()),
            io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::AddrNotAvailable
                if is_only_ipv6 =>
            {
                Self::OnlyIpv6(host.to_owned())
            }
            _ => Self::Other(place.to_owned(), error),
        }
    }
}

/// Connects to one of the addresses of a host.
///
/// # Errors
/// The [`ReachError`] of the last address that was tried.
pub(super) async fn reach(host: &str, port: u16) -> Result<TcpStream, ReachError> {
    let bare = host.trim_matches(['[', ']']);
    let place = format!("{host}:{port}");
    let found = timeout(RESOLVE_TIMEOUT, lookup_host((bare, port))).await;
    let Ok(Ok(addresses)) = found else { return Err(ReachError::Name(host.to_owned())) };
    let mut addresses: Vec<SocketAddr> = addresses.collect();
    let is_only_ipv6 = bare.parse::<IpAddr>().is_err() && addresses.iter().all(SocketAddr::is_ipv6);
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let mut last = ReachError::Name(host.to_owned());
    for address in addresses.into_iter().take(ADDRESSES_MAX) {
        last = match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // With Nagle's algorithm small messages wait for each other.
                let _ = stream.set_nodelay(true); // Slower without, and no less right.
                return Ok(stream);
            }
            Ok(Err(error)) => ReachError::of(error, host, &place, is_only_ipv6),
            Err(_elapsed) if is_only_ipv6 => ReachError::OnlyIpv6(host.to_owned()),
            Err(_elapsed) => ReachError::Silent(place.clone()),
        };
    }
    Err(last)
}

/// Where clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) is_tls: bool,
    pub(super) host: String,
    pub(super) port: u16,
    /// The path without `/websocket`.
    pub(super) path: String,
}

impl Target {
    /// Parses `https://HOST` or `wss://HOST/realtime/v1`, also with `/websocket`. A URL without a
    /// path is the project's, to which clients add `/realtime/v1`.
    pub(super) fn parse(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let is_tls = match uri.scheme_str()? {
            "ws" | "http" => false,
            "wss" | "https" => true,
            _ => return None,
        };
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
        let path = uri.path().trim_end_matches('/').trim_end_matches("/websocket");
        Some(Self {
            is_tls,
            host: authority.host().to_owned(),
            port: authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            path: if path.is_empty() { "/realtime/v1" } else { path }.to_owned(),
        })
    }

    /// Returns the gateway that listens on this machine as the settings say; `None` for port 0.
    pub(super) fn of_settings(listen: SocketAddr) -> Option<Self> {
        let host = match reachable(listen).ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let path = "/realtime/v1".to_owned();
        let (is_tls, port) = (false, listen.port());
        (port != 0).then_some(Self { is_tls, host, port, path })
    }

    /// Formats the address as people write it.
    pub(super) fn place(&self) -> String {
        let scheme = if self.is_tls { "wss" } else { "ws" };
        format!("{scheme}://{}:{}{}", self.host, self.port, self.path)
    }

    /// Connects, and returns the stream and its local address.
    ///
    /// # Errors
    /// [`ReachError`].
    pub(super) async fn connect(
        &self,
        ca_file: Option<&Path>,
    ) -> Result<(Stream, Option<SocketAddr>), ReachError> {
        let stream = reach(&self.host, self.port).await?;
        let own = stream.local_addr().ok();
        if !self.is_tls {
            return Ok((Either::Left(stream), own));
        }
        let tls = |error: String| ReachError::Tls(self.place(), error);
        let ca_file = ca_file.map(Path::to_string_lossy).unwrap_or_default();
        let config = jwks::tls(&ca_file).map_err(|error| match error {
            jwks::JwksError::Authorities => tls("--ca-file has no certificate".to_owned()),
            error => tls(error.to_string()),
        })?;
        let name = ServerName::try_from(self.host.trim_matches(['[', ']']).to_owned())
            .map_err(|error| tls(error.to_string()))?;
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, stream);
        match timeout(CONNECT_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => Ok((Either::Right(Box::new(stream)), own)),
            Ok(Err(error)) => Err(tls(error.to_string())),
            Err(_elapsed) => Err(tls("no answer".to_owned())),
        }
    }
}

/// A stream to the gateway: plain, or TLS, boxed because it is large.
pub(super) type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_a_project_or_the_path_of_its_websocket() {
        let place = |url| Target::parse(url).map(|target| target.place());
        for (url, expected) in [
            ("https://a.example", "wss://a.example:443/realtime/v1"),
            ("https://a.example/", "wss://a.example:443/realtime/v1"),
            ("ws://127.0.0.1:4000/realtime/v1", "ws://127.0.0.1:4000/realtime/v1"),
            ("ws://[::1]:4000/socket/websocket", "ws://[::1]:4000/socket"),
            ("wss://a.example/x/realtime/v1/websocket", "wss://a.example:443/x/realtime/v1"),
        ] {
            assert_eq!(place(url).as_deref(), Some(expected), "{url}");
        }
        for url in ["", "a.example", "ftp://a.example", "https://u:p@a.example", "/realtime/v1"] {
            assert_eq!(place(url), None, "{url}");
        }
    }

    /// The direct addresses of Supabase's databases have IPv6 alone.
    #[test]
    fn a_host_with_ipv6_alone_is_named_where_there_is_no_way_to_it() {
        let of = |kind: io::ErrorKind, is_only_ipv6| {
            ReachError::of(kind.into(), "db.example", "db.example:5432", is_only_ipv6).to_string()
        };
        let unreachable = io::ErrorKind::NetworkUnreachable;
        assert!(of(unreachable, true).starts_with("db.example has only IPv6 addresses"));
        assert!(of(unreachable, false).starts_with("no connection to db.example:5432"));
        assert!(of(io::ErrorKind::ConnectionRefused, true).contains("is refused"));
    }

    #[test]
    fn a_gateway_that_listens_everywhere_is_found_on_this_machine() {
        let of = |listen: &str| {
            Target::of_settings(listen.parse().unwrap()).map(|target| target.place())
        };
        assert_eq!(of("0.0.0.0:4000").as_deref(), Some("ws://127.0.0.1:4000/realtime/v1"));
        assert_eq!(of("[::]:4000").as_deref(), Some("ws://[::1]:4000/realtime/v1"));
        assert_eq!(of("127.0.0.1:0"), None);
    }
}
