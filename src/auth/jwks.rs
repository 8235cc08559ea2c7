//! Key sets: their settings, and the reading of a file or an https URL.
//!
//! Invariants: the addresses are the operator's, never a token's; a document is bounded in bytes and
//! time; no redirect is followed.

use std::{
    error::Error,
    fs::File,
    io::{self, Read},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::future::{Either, select};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::{
    Request, StatusCode, Uri, body::Bytes, client::conn::http1, header, http::uri::Scheme,
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use strum::{IntoStaticStr, VariantArray, VariantNames};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

use super::jwk::{DocumentError, KeySource};
use crate::{clock::duration, telemetry::metrics::Label};

/// Largest head of a response, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Public keys that tokens are signed with: the section `[jwks]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// A file with a JSON Web Key Set, read again when it changes; empty is none.
    pub file: String,
    /// An https URL of a JSON Web Key Set; empty is none.
    pub url: String,
    /// A file with the certificates (PEM) that the URL's server is trusted by; empty trusts the
    /// public authorities.
    pub ca_file: String,
    /// Between two readings of the URL.
    #[serde(deserialize_with = "duration")]
    pub refresh_interval: Duration,
    /// A reading that takes longer is given up; the keys of the last one stay.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    /// Largest document.
    pub bytes_max: usize,
}

impl Settings {
    /// Returns every mistake of the section.
    pub(crate) fn validate(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if !self.url.is_empty() && !is_address(&self.url) {
            mistakes.push("jwks.url: expected https://HOST/PATH, without a user".to_owned());
        }
        for (name, file) in [("jwks.file", &self.file), ("jwks.ca_file", &self.ca_file)] {
            if file.contains("://") || file.ends_with('/') {
                mistakes.push(format!("{name}: expected the path of a file"));
            }
        }
        if self.url.is_empty() && !self.ca_file.is_empty() {
            mistakes.push("jwks.ca_file: of no use without jwks.url".to_owned());
        }
        if self.bytes_max == 0 {
            mistakes.push("jwks.bytes_max: must be at least 1".to_owned());
        }
        for (name, value) in
            [("jwks.timeout", self.timeout), ("jwks.refresh_interval", self.refresh_interval)]
        {
            if value.is_zero() {
                mistakes.push(format!("{name}: must be longer than 0s"));
            }
        }
        mistakes
    }
}

/// Whether a key set may be read from this URL.
fn is_address(url: &str) -> bool {
    let parsed = url.parse::<Uri>().ok();
    let is_https = parsed.is_some_and(|url| {
        let has_host = url.host().is_some_and(|host| !host.is_empty());
        // A password here would be printed with the settings.
        let is_bare = url.authority().is_some_and(|authority| !authority.as_str().contains('@'));
        url.scheme() == Some(&Scheme::HTTPS) && has_host && is_bare
    });
    is_https && !url.contains('#')
}

/// Why a key set could not be read.
#[derive(Debug, thiserror::Error, VariantNames, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum JwksError {
    /// The file is missing, is not a regular file, or may not be read.
    #[error("jwks.file cannot be read")]
    Unreadable(#[source] io::Error),
    /// `jwks.ca_file` cannot be read, or has no certificate.
    #[error("jwks.ca_file has no certificate that can be read")]
    Authorities,
    /// The server does not accept a connection.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// The server's certificate is not trusted, or no version of TLS is common.
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    /// The response is not HTTP.
    #[error("the answer is not HTTP")]
    Http(#[source] Box<dyn Error + Send + Sync>),
    /// The response is a redirect.
    #[error("the answer is a redirect, which is not followed")]
    Redirect,
    /// The response has another status than 200.
    #[error("the answer's status is {0}")]
    Status(u16),
    /// The document has more bytes than `jwks.bytes_max`.
    #[error("the document has more bytes than jwks.bytes_max")]
    TooLarge,
    /// `jwks.timeout` has passed.
    #[error("jwks.timeout has passed")]
    Timeout,
    /// The document is not a key set.
    #[error(transparent)]
    Document(#[from] DocumentError),
}

impl JwksError {
    /// The metric's label.
    #[must_use]
    pub fn label(&self) -> &'static str {
        self.into()
    }

    /// Returns the labels of the errors that can occur for this source.
    fn labels(from: KeySource) -> impl Iterator<Item = &'static str> {
        let of_files = ["unreadable", "too_large", "document"];
        let can_occur = move |label: &&str| match from {
            KeySource::File => of_files.contains(label),
            KeySource::Url => *label != "unreadable",
        };
        Self::VARIANTS.iter().copied().filter(can_occur)
    }
}

/// A failure to read a key set, as labels: the source and the error.
#[derive(Debug)]
pub(super) struct JwksFailure([&'static str; 2]);

impl JwksFailure {
    pub(super) fn new(from: KeySource, error: &JwksError) -> Self {
        Self([from.label(), error.label()])
    }
}

impl Label<2> for JwksFailure {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        let of = |from: &KeySource| {
            let from = *from;
            JwksError::labels(from).map(move |label| [from.label(), label])
        };
        KeySource::VARIANTS.iter().flat_map(of)
    }

    fn values(&self) -> [&'static str; 2] {
        self.0
    }
}

/// Reads `jwks.file`.
///
/// # Errors
/// [`JwksError`] if the file cannot be read or has too many bytes.
pub(super) fn read_file(jwks: &Settings) -> Result<Vec<u8>, JwksError> {
    let read = || {
        // Reading a pipe would block.
        if !std::fs::metadata(&jwks.file)?.is_file() {
            return Err(io::Error::other("not a file"));
        }
        let mut text = Vec::new();
        let bytes_max = jwks.bytes_max as u64;
        File::open(&jwks.file)?.take(bytes_max.saturating_add(1)).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(JwksError::Unreadable)?;
    if text.len() > jwks.bytes_max { Err(JwksError::TooLarge) } else { Ok(text) }
}

/// Reads `jwks.url` within `jwks.timeout`.
///
/// # Errors
/// [`JwksError`] for every fault of the connection and of the response.
pub(super) async fn fetch(jwks: &Settings) -> Result<Vec<u8>, JwksError> {
    timeout(jwks.timeout, request(jwks)).await.unwrap_or(Err(JwksError::Timeout))
}

async fn request(jwks: &Settings) -> Result<Vec<u8>, JwksError> {
    // `validate` has parsed the URL.
    let uri = jwks.url.parse::<Uri>().unwrap_or_default();
    let host = uri.host().unwrap_or_default().to_owned();
    let stream = connect(jwks, &host, uri.port_u16().unwrap_or(443)).await?;
    let mut builder = http1::Builder::new();
    builder.max_buf_size(HEAD_BYTES_MAX);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(http)?;
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(header::HOST, authority)
        .header(header::ACCEPT, "application/jwk-set+json, application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new());
    let response = async {
        let request = request.map_err(|error| JwksError::Http(error.into()))?;
        let response = sender.send_request(request).await.map_err(http)?;
        match response.status() {
            StatusCode::OK => {}
            status if status.is_redirection() => return Err(JwksError::Redirect),
            status => return Err(JwksError::Status(status.as_u16())),
        }
        match Limited::new(response.into_body(), jwks.bytes_max).collect().await {
            Ok(body) => Ok(body.to_bytes().to_vec()),
            Err(error) if error.is::<LengthLimitError>() => Err(JwksError::TooLarge),
            Err(error) => Err(JwksError::Http(error)),
        }
    };
    // Polling the connection here needs no task: it ends with the response.
    match select(pin!(response), pin!(connection)).await {
        Either::Left((response, _)) => response,
        Either::Right((_, response)) => response.await,
    }
}

fn http(error: hyper::Error) -> JwksError {
    JwksError::Http(error.into())
}

async fn connect(
    jwks: &Settings,
    host: &str,
    port: u16,
) -> Result<TlsStream<TcpStream>, JwksError> {
    // A URL has brackets around an IPv6 address.
    let host = host.trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| JwksError::Connect(io::Error::other(error)))?;
    let connector = TlsConnector::from(Arc::new(tls(&jwks.ca_file)?));
    let stream = TcpStream::connect((host, port)).await.map_err(JwksError::Connect)?;
    connector.connect(name, stream).await.map_err(JwksError::Tls)
}

/// Creates a TLS configuration that trusts the authorities of `ca_file`, or the public ones if that
/// is empty.
///
/// # Errors
/// [`JwksError`] if the file has no certificate.
pub(crate) fn tls(ca_file: &str) -> Result<ClientConfig, JwksError> {
    let mut roots = RootCertStore::empty();
    if ca_file.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    } else {
        let certificates = CertificateDer::pem_file_iter(ca_file)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|_names_the_file| JwksError::Authorities)?;
        roots.add_parsable_certificates(certificates);
    }
    if roots.is_empty() {
        return Err(JwksError::Authorities);
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| JwksError::Tls(io::Error::other(error)))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_of_an_origin_has_its_label() {
        let io = || io::Error::other("x");
        for error in [
            JwksError::Unreadable(io()),
            JwksError::Authorities,
            JwksError::Connect(io()),
            JwksError::Tls(io()),
            JwksError::Http(io().into()),
            JwksError::Redirect,
            JwksError::Status(500),
            JwksError::TooLarge,
            JwksError::Timeout,
            JwksError::Document(DocumentError::TooMany),
        ] {
            let mut pairs = JwksFailure::all();
            assert!(pairs.any(|[_, label]| label == error.label()), "{}", error.label());
        }
    }
}
