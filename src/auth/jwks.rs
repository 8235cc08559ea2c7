//! Where the key set comes from: a file that is looked at, a URL that is read again and again.
//!
//! Invariants: the addresses are the operator's, never a token's; a document is bounded in bytes and
//! time; no redirect is followed; what cannot be read or understood leaves the last good keys in
//! place and is counted by kind; a token that names a key which is not here makes the URL be read
//! again, at most every 30 s however many such tokens come, and is answered without waiting.

use std::{
    error::Error,
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::future::{Either, join, select};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::{
    Request, StatusCode, Uri, body::Bytes, client::conn::http1, header, http::uri::Scheme,
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use strum::{IntoStaticStr, VariantArray, VariantNames};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

use super::{
    authenticator::Verifier,
    jwk::{DocumentError, KeySource, Published},
};
use crate::{
    clock::{duration, unix_seconds},
    metrics::Metrics,
    server::Services,
    telemetry::metrics::Label,
};

/// Between two looks at the file.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// At most so often does an unknown `kid` make the URL be read.
const UNKNOWN_KID_INTERVAL: Duration = Duration::from_secs(30);
/// After the first failure, then twice as long, up to `jwks.refresh_interval`.
const BACKOFF: Duration = Duration::from_secs(1);
/// Largest head of an answer.
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
    /// The file is missing, is no file, or is not ours to read.
    #[error("jwks.file cannot be read")]
    Unreadable(#[source] io::Error),
    /// The certificates of `jwks.ca_file` cannot be read, or there are none.
    #[error("jwks.ca_file has no certificate that can be read")]
    Authorities,
    /// Nobody answers at the address.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// The server is not who it should be, or speaks no TLS that we do.
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    /// What it speaks is not HTTP.
    #[error("the answer is not HTTP")]
    Http(#[source] Box<dyn Error + Send + Sync>),
    /// It points elsewhere.
    #[error("the answer is a redirect, which is not followed")]
    Redirect,
    /// It answers with another status than 200.
    #[error("the answer's status is {0}")]
    Status(u16),
    /// More bytes than `jwks.bytes_max`.
    #[error("the document has more bytes than jwks.bytes_max")]
    TooLarge,
    /// `jwks.timeout` has passed.
    #[error("jwks.timeout has passed")]
    Timeout,
    /// It is no key set.
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

/// The source of a key set, and the error that has kept it from being read.
pub(crate) struct JwksFailure<'a>(pub(crate) KeySource, pub(crate) &'a JwksError);

impl Label<2> for JwksFailure<'_> {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        KeySource::VARIANTS
            .iter()
            .flat_map(|from| JwksError::labels(*from).map(|label| [from.label(), label]))
    }

    fn values(&self) -> [&'static str; 2] {
        [self.0.label(), self.1.label()]
    }
}

/// Keeps the verifier's keys as file and URL have them, to the end of the server.
pub(crate) async fn run(services: Arc<Services>) {
    let both = join(watch_file(&services), follow_url(&services));
    services.stopped.run_until_cancelled(both).await;
}

/// Tells of a document that is another, and of the keys in it that are left out.
pub(super) fn note(published: &Published, from: KeySource, metrics: &Metrics) {
    let keys = published.key_count();
    metrics.jwks_read.with_label_values(&[from.label()]).set(unix_seconds());
    for (place, reason) in &published.unusable {
        metrics.jwks_keys_unusable.with_label_values(&[reason.label()]).inc();
        let (origin, reason) = (from.label(), reason.label());
        tracing::warn!(origin, place, reason, "a key of the key set is left out");
    }
    tracing::info!(origin = from.label(), keys, "the key set has been read");
}

/// The bytes of `jwks.file`.
///
/// # Errors
/// [`JwksError`] if it cannot be read or has too many.
pub(super) fn read_file(jwks: &Settings) -> Result<Vec<u8>, JwksError> {
    let read = || {
        // A pipe would be waited for.
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

/// What tells a file from the one that was there before.
#[derive(PartialEq, Eq)]
struct Stamp(i64, i64, u64, u64);

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self(metadata.mtime(), metadata.mtime_nsec(), metadata.len(), metadata.ino())
    }
}

/// Takes the file's keys whenever it is another. A fault is told once for each state of the file.
async fn watch_file(services: &Services) {
    let mut seen: Option<(Arc<Settings>, Option<Stamp>)> = None;
    loop {
        let jwks = services.verifier.jwks();
        if !jwks.file.is_empty() {
            let stamp = tokio::fs::metadata(&jwks.file).await.ok().map(|it| Stamp::of(&it));
            let is_seen = seen
                .as_ref()
                .is_some_and(|(read_as, seen)| Arc::ptr_eq(read_as, &jwks) && *seen == stamp);
            if !is_seen {
                let taken = read_file(&jwks).and_then(|text| {
                    Ok(services.verifier.take(text, KeySource::File, &jwks, &services.metrics)?)
                });
                count(services, KeySource::File, &taken, &mut None);
                seen = Some((jwks, stamp));
            }
        }
        sleep(LOOK_INTERVAL).await;
    }
}

/// Reads the URL every `jwks.refresh_interval`, sooner after a failure or when a key is missed.
async fn follow_url(services: &Services) {
    let verifier = &services.verifier;
    let mut backoff = BACKOFF;
    let mut missed_at: Option<Instant> = None;
    let mut told = None;
    loop {
        let jwks = verifier.jwks();
        if jwks.url.is_empty() {
            verifier.wanted().await;
            continue;
        }
        let fetched = timeout(jwks.timeout, fetch(&jwks)).await;
        let taken = fetched
            .unwrap_or(Err(JwksError::Timeout))
            .and_then(|text| Ok(verifier.take(text, KeySource::Url, &jwks, &services.metrics)?));
        count(services, KeySource::Url, &taken, &mut told);
        let wait = if taken.is_ok() {
            backoff = BACKOFF;
            jwks.refresh_interval
        } else {
            let wait = backoff;
            backoff = (backoff * 2).min(jwks.refresh_interval);
            wait.min(jwks.refresh_interval)
        };
        // Gateways that started together need not ask together.
        let mut next = Instant::now() + wait.mul_f64(0.8 + 0.4 * fastrand::f64());
        let mut is_missed = false;
        while timeout_at(next, verifier.wanted()).await.is_ok() {
            if !Arc::ptr_eq(&jwks, &verifier.jwks()) {
                break;
            }
            let sooner = on_unknown_kid(missed_at, Instant::now());
            if sooner < next {
                (next, is_missed) = (sooner, true);
            }
        }
        if is_missed {
            missed_at = Some(Instant::now());
        }
    }
}

/// When the URL is read for a key that is missed, if it was last read for one at `missed_at`.
fn on_unknown_kid(missed_at: Option<Instant>, now: Instant) -> Instant {
    missed_at.map_or(now, |at| (at + UNKNOWN_KID_INTERVAL).max(now))
}

/// Counts a reading, and tells of a fault that is another than the last one.
fn count(
    services: &Services,
    from: KeySource,
    taken: &Result<(), JwksError>,
    told: &mut Option<&'static str>,
) {
    let metrics = &services.metrics;
    match taken {
        Ok(()) => {
            metrics.jwks_read.with_label_values(&[from.label()]).set(unix_seconds());
            *told = None;
        }
        Err(error) => {
            metrics.jwks_failures.with_label_values(&[from.label(), error.label()]).inc();
            if told.replace(error.label()) != Some(error.label()) {
                let (origin, error) = (from.label(), error as &dyn Error);
                tracing::warn!(error, origin, "no key set; the keys stay those of the last one");
            }
        }
    }
}

/// Reads the URL once, where there is no [`run`] that follows it.
///
/// # Errors
/// [`JwksError`]; the keys stay as they are.
pub(crate) async fn read_url(verifier: &Verifier, metrics: &Metrics) -> Result<(), JwksError> {
    let jwks = verifier.jwks();
    if jwks.url.is_empty() {
        return Ok(());
    }
    let text = timeout(jwks.timeout, fetch(&jwks)).await.unwrap_or(Err(JwksError::Timeout))?;
    Ok(verifier.take(text, KeySource::Url, &jwks, metrics)?)
}

/// The bytes that the URL answers with.
async fn fetch(jwks: &Settings) -> Result<Vec<u8>, JwksError> {
    // The settings' check has read the URL.
    let uri = jwks.url.parse::<Uri>().unwrap_or_default();
    let host = uri.host().unwrap_or_default().to_owned();
    let stream = connect(jwks, &host, uri.port_u16().unwrap_or(443)).await?;
    let mut builder = http1::Builder::new();
    builder.max_buf_size(HEAD_BYTES_MAX);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(http)?;
    let authority = uri.authority().map_or("", |it| it.as_str());
    let path = uri.path_and_query().map_or("/", |it| it.as_str());
    let request = Request::get(path)
        .header(header::HOST, authority)
        .header(header::ACCEPT, "application/jwk-set+json, application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new());
    let answer = async {
        let request = request.map_err(|error| JwksError::Http(error.into()))?;
        let answer = sender.send_request(request).await.map_err(http)?;
        match answer.status() {
            StatusCode::OK => {}
            status if status.is_redirection() => return Err(JwksError::Redirect),
            status => return Err(JwksError::Status(status.as_u16())),
        }
        match Limited::new(answer.into_body(), jwks.bytes_max).collect().await {
            Ok(body) => Ok(body.to_bytes().to_vec()),
            Err(error) if error.is::<LengthLimitError>() => Err(JwksError::TooLarge),
            Err(error) => Err(JwksError::Http(error)),
        }
    };
    // The connection has no task of its own: it ends with the answer.
    match select(pin!(answer), pin!(connection)).await {
        Either::Left((answer, _)) => answer,
        Either::Right((_, answer)) => answer.await,
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
    // An IPv6 address stands in brackets.
    let host = host.trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| JwksError::Connect(io::Error::other(error)))?;
    let connector = TlsConnector::from(Arc::new(tls(&jwks.ca_file)?));
    let stream = TcpStream::connect((host, port)).await.map_err(JwksError::Connect)?;
    connector.connect(name, stream).await.map_err(JwksError::Tls)
}

/// Trusts the authorities of this file, or the public ones if it has no name.
///
/// # Errors
/// [`JwksError`]; the file has no certificate.
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
    fn a_missed_key_is_asked_for_at_once_and_then_every_30_seconds_at_most() {
        let now = Instant::now();
        let (second, half) = (Duration::from_secs(1), Duration::from_secs(30));
        assert_eq!(on_unknown_kid(None, now), now);
        assert_eq!(on_unknown_kid(Some(now), now), now + half);
        assert_eq!(on_unknown_kid(Some(now), now + half - second), now + half);
        assert_eq!(on_unknown_kid(Some(now), now + half), now + half);
        assert_eq!(on_unknown_kid(Some(now), now + half + second), now + half + second);
    }

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
