//! Verifies tokens with the current keys, and remembers the ones that it has verified.
//!
//! Invariants: keys, demands and the tokens that they have verified are one value, a
//! [`TrustSnapshot`], which is replaced as a whole, so that no token stays verified by a key that
//! has been removed; of a remembered token only expiry and revocation are checked again. Of the two
//! locks, `sources` is taken before `trust`.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    algorithm::SECRET_BYTES_MIN,
    claims::{Claims, Demands},
    error::TokenError,
    jwk::{DocumentError, KeySource, PublishedKeys, Unusable},
    jwks::{self, JwksError},
    jwt::{Token, TokenParts},
    keys::KeySet,
    metrics::Metrics,
    revocations::Revocations,
    settings::{Settings, TrustSettings},
};
use crate::{
    clock::unix_now,
    protocol::payload::OPAQUE_KEY_PREFIX,
    secret::Secret,
    telemetry::metrics::{Registry, count, set_now},
};

/// Most verified tokens that are remembered. 10,000 viewers share one anon key.
const REMEMBERED_MAX: usize = 16_384;
/// Shortest time between two searches for remembered tokens that nobody holds, in seconds.
const FORGET_INTERVAL: i64 = 1;

/// Verifies tokens with the project's keys.
pub struct Authenticator {
    trust: RwLock<Arc<TrustSnapshot>>,
    sources: Mutex<Sources>,
    /// Sends whenever `trust` has been replaced.
    changed: watch::Sender<()>,
    /// Notified when a token names a key that is not here, and when the settings are replaced.
    wanted: Notify,
    anonymous: Arc<Token>,
    /// The section `[auth]` as it was at the start.
    settings: Settings,
    metrics: Metrics,
    /// Revocations of tokens that are otherwise valid.
    pub revocations: Revocations,
}

/// The settings and documents from which a snapshot is made.
struct Sources {
    /// `jwt_secret` and `jwt_secret_previous`.
    secrets: [Secret; 2],
    /// Keys that are not JWTs, and the tokens that they stand for.
    opaque: Vec<(Secret, Arc<Token>)>,
    demands: Arc<Demands>,
    token_bytes_max: usize,
    jwks: Arc<jwks::Settings>,
    file: Document,
    url: Document,
}

/// A key set as it was last read.
#[derive(Default)]
struct Document {
    text: Vec<u8>,
    published: PublishedKeys,
}

impl Document {
    fn parse(text: Vec<u8>, from: KeySource) -> Result<Self, DocumentError> {
        Ok(Self { published: PublishedKeys::parse(&text, from)?, text })
    }
}

/// Keys and demands at one time, and the tokens that they have verified.
struct TrustSnapshot {
    keys: KeySet,
    opaque: Vec<(Secret, Arc<Token>)>,
    demands: Arc<Demands>,
    token_bytes_max: usize,
    remembered: Mutex<Remembered>,
}

/// Tokens whose signature has been verified, so that one anon key is parsed and stored once. At the
/// bound the tokens that nobody holds are evicted; if all are held, a further one is not stored.
#[derive(Default)]
struct Remembered {
    tokens: HashMap<Box<str>, Arc<Token>>,
    /// When tokens were last evicted, in seconds since 1970.
    forgotten_at: i64,
}

impl Authenticator {
    /// Creates an authenticator with the keys of the settings and those of `jwks.file`.
    ///
    /// # Errors
    /// [`JwksError`] if the file cannot be read or is not a key set.
    pub(crate) fn new(settings: &TrustSettings, metrics: Metrics) -> Result<Self, JwksError> {
        let sources = Sources::new(settings, &metrics)?;
        sources.show(&metrics);
        Ok(Self {
            trust: RwLock::new(Arc::new(sources.snapshot())),
            sources: Mutex::new(sources),
            changed: watch::Sender::new(()),
            wanted: Notify::new(),
            anonymous: Arc::new(Token::opaque("", "anon")),
            settings: settings.auth.clone(),
            metrics,
            revocations: Revocations::new(settings.auth.revocations_max),
        })
    }

    /// Creates an authenticator for a command, which serves nobody and shows no metrics.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn standalone(settings: &TrustSettings) -> Result<Self, JwksError> {
        Self::new(settings, Metrics::new(&Registry::new()))
    }

    /// `auth.leeway` as it was at the start.
    #[must_use]
    pub fn leeway(&self) -> Duration {
        self.settings.leeway
    }

    /// `auth.grace` as it was at the start.
    #[must_use]
    pub fn grace(&self) -> Duration {
        self.settings.grace
    }

    /// `auth.revocation_keep` as it was at the start.
    #[must_use]
    pub fn revocation_keep(&self) -> Duration {
        self.settings.revocation_keep
    }

    /// The token that counts when all tokens of a client have expired: role `anon`, no claims.
    #[must_use]
    pub fn anonymous(&self) -> &Arc<Token> {
        &self.anonymous
    }

    /// Verifies a token now, and counts the verification and its duration.
    ///
    /// # Errors
    /// As [`Self::verify_at`].
    pub fn verify(&self, text: &str) -> Result<Arc<Token>, TokenError> {
        let started = Instant::now();
        let verified = self.verify_at(text, unix_now());
        self.metrics.token_seconds.observe(started.elapsed().as_secs_f64());
        self.metrics.tokens.of(&verified).inc();
        if let Ok(token) = &verified {
            self.metrics.tokens_accepted.of(token.verified_by).inc();
        }
        verified
    }

    /// Counts a request that should have a token and has none.
    pub(crate) fn count_missing(&self) {
        self.metrics.tokens.of(&Err::<(), _>(TokenError::Missing)).inc();
    }

    /// Returns the token with its claims if one of the current keys has signed it and it is valid
    /// at `now`, in seconds since 1970. Nothing is counted.
    ///
    /// # Errors
    /// [`TokenError`]: form before signature before claims, in the order of the table of
    /// [`super::jwt`].
    pub fn verify_at(&self, text: &str, now: i64) -> Result<Arc<Token>, TokenError> {
        let trust = Arc::clone(&self.trust.read());
        self.unless_revoked(self.judge(&trust, text, now, trust.demands.leeway)?, now)
    }

    /// Verifies a token again with the current keys and demands; a token that has expired up to
    /// `allowance` ago is still valid.
    ///
    /// # Errors
    /// As [`Self::verify_at`]; [`TokenError::KeyGone`] if the key that signed it has been removed.
    pub fn recheck(
        &self,
        token: &Arc<Token>,
        now: i64,
        allowance: Duration,
    ) -> Result<Arc<Token>, TokenError> {
        if token.text().is_empty() {
            return Ok(Arc::clone(token));
        }
        let trust = Arc::clone(&self.trust.read());
        match self.judge(&trust, token.text(), now, allowance) {
            Ok(token) => self.unless_revoked(token, now),
            // The token was verified before, so its key is gone; an opaque key that has been
            // removed is taken for a malformed JWT.
            Err(TokenError::Signature | TokenError::NoSigner { .. } | TokenError::Malformed) => {
                Err(TokenError::KeyGone)
            }
            Err(error) => Err(error),
        }
    }

    fn unless_revoked(&self, token: Arc<Token>, now: i64) -> Result<Arc<Token>, TokenError> {
        let is_revoked = self.revocations.is_revoked(&token.claims, now);
        if is_revoked { Err(TokenError::Revoked) } else { Ok(token) }
    }

    fn judge(
        &self,
        trust: &TrustSnapshot,
        text: &str,
        now: i64,
        allowance: Duration,
    ) -> Result<Arc<Token>, TokenError> {
        if text.len() > trust.token_bytes_max {
            return Err(TokenError::Malformed);
        }
        if let Some(token) = trust.known(text) {
            token.check_expiry(now, allowance)?;
            return Ok(token);
        }
        if text.starts_with(OPAQUE_KEY_PREFIX) {
            return Err(TokenError::Malformed);
        }
        let TokenParts { header, signed, payload, signature } = TokenParts::of(text)?;
        let verified_by = trust.keys.verify(&header, signed, signature).inspect_err(|_| {
            if trust.keys.lacks(&header) {
                self.wanted.notify_one();
            }
        })?;
        let claims = Claims::read(&payload, &trust.demands, now, allowance)?;
        let token = Arc::new(Token::new(text, claims, verified_by));
        trust.remember(&token, now);
        Ok(token)
    }

    /// Whether the current keys have verified this text before. The token may have expired.
    #[must_use]
    pub fn is_known(&self, text: &str) -> bool {
        let trust = Arc::clone(&self.trust.read());
        text.len() <= trust.token_bytes_max && trust.known(text).is_some()
    }

    /// Whether a text has the form of a JWT under an algorithm of ours, which nobody guesses: it may
    /// be anybody's.
    #[must_use]
    pub fn is_jwt(&self, text: &str) -> bool {
        text.len() <= self.trust.read().token_bytes_max && TokenParts::of(text).is_ok()
    }

    /// Replaces keys and demands by those of these settings, and reads the key set's file again.
    /// The keys of `jwks.url` are dropped if it is another URL.
    ///
    /// # Errors
    /// [`JwksError`] if the file cannot be read or is not a key set; then nothing has changed.
    pub fn reload(&self, settings: &TrustSettings) -> Result<(), JwksError> {
        let mut new = Sources::new(settings, &self.metrics)?;
        let mut sources = self.sources.lock();
        if new.jwks.url == sources.jwks.url {
            new.url = std::mem::take(&mut sources.url);
        }
        *sources = new;
        self.replace(&sources);
        self.wanted.notify_one();
        Ok(())
    }

    /// Subscribes to changes of keys and demands, after which a verified token may be invalid.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Reads `jwks.url` once, where no [`KeyFollower`](super::follower::KeyFollower) runs.
    ///
    /// # Errors
    /// [`JwksError`]; the keys stay as they are.
    pub(crate) async fn read_url(&self) -> Result<(), JwksError> {
        let jwks = self.jwks();
        if jwks.url.is_empty() {
            return Ok(());
        }
        let text = jwks::fetch(&jwks).await?;
        Ok(self.take(text, KeySource::Url, &jwks)?)
    }

    /// Returns how many keys of this key set can be used.
    pub(crate) fn key_count(&self, from: KeySource) -> usize {
        self.sources.lock().document(from).published.key_count()
    }

    /// Returns the reasons of all keys that are left out of both key sets.
    pub(crate) fn unusable_keys(&self) -> Vec<Unusable> {
        let sources = self.sources.lock();
        let all = sources.file.published.unusable.iter().chain(&sources.url.published.unusable);
        all.map(|(_, reason)| *reason).collect()
    }

    /// Forgets revocations that are over, and updates their gauge.
    pub(crate) fn show(&self) {
        self.revocations.sweep(unix_now());
        self.metrics.revocations.set(count(self.revocations.count()));
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The current settings of key sets.
    pub(super) fn jwks(&self) -> Arc<jwks::Settings> {
        Arc::clone(&self.sources.lock().jwks)
    }

    /// Waits until a token names a key that is not here, or the settings are replaced.
    ///
    /// # Cancel safety
    /// Cancel-safe: a notification that nobody waits for is stored.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Replaces the keys of a document that was read by the settings `read_as`. It is ignored if
    /// those are no longer the current settings; a document that is unchanged changes nothing.
    ///
    /// # Errors
    /// [`DocumentError`]; the keys stay those of the last document.
    pub(super) fn take(
        &self,
        text: Vec<u8>,
        from: KeySource,
        read_as: &Arc<jwks::Settings>,
    ) -> Result<(), DocumentError> {
        let mut sources = self.sources.lock();
        let is_current = Arc::ptr_eq(&sources.jwks, read_as);
        let document = sources.document_mut(from);
        if is_current && document.text != text {
            *document = Document::parse(text, from)?;
            record(&document.published, from, &self.metrics);
            self.replace(&sources);
        }
        Ok(())
    }

    fn replace(&self, sources: &Sources) {
        sources.show(&self.metrics);
        *self.trust.write() = Arc::new(sources.snapshot());
        self.changed.send_replace(());
    }
}

impl Sources {
    fn new(settings: &TrustSettings, metrics: &Metrics) -> Result<Self, JwksError> {
        let secrets = [&settings.jwt_secret, &settings.jwt_secret_previous].map(Clone::clone);
        for (setting, secret) in ["jwt_secret", "jwt_secret_previous"].iter().zip(&secrets) {
            if (1..SECRET_BYTES_MIN).contains(&secret.expose().len()) {
                tracing::warn!(setting, "shorter than 32 bytes: it can be guessed from a token");
            }
        }
        let opaque = [(&settings.publishable_key, "anon"), (&settings.secret_key, "service_role")];
        let opaque = opaque
            .into_iter()
            .filter(|(key, _)| !key.is_empty())
            .map(|(key, role)| (key.clone(), Arc::new(Token::opaque(key.expose(), role))));
        let mut file = Document::default();
        if !settings.jwks.file.is_empty() {
            let text = jwks::read_file(&settings.jwks)?;
            file = Document::parse(text, KeySource::File)?;
            record(&file.published, KeySource::File, metrics);
        }
        Ok(Self {
            secrets,
            opaque: opaque.collect(),
            demands: Arc::new(Demands {
                leeway: settings.auth.leeway,
                issuers: settings.auth.issuers.clone(),
                audiences: settings.auth.audiences.clone(),
            }),
            token_bytes_max: settings.token_bytes_max,
            jwks: Arc::new(settings.jwks.clone()),
            file,
            url: Document::default(),
        })
    }

    fn document(&self, from: KeySource) -> &Document {
        match from {
            KeySource::File => &self.file,
            KeySource::Url => &self.url,
        }
    }

    fn document_mut(&mut self, from: KeySource) -> &mut Document {
        match from {
            KeySource::File => &mut self.file,
            KeySource::Url => &mut self.url,
        }
    }

    /// Updates the gauges of keys.
    fn show(&self, metrics: &Metrics) {
        for from in [KeySource::File, KeySource::Url] {
            metrics.jwks_keys.of(from).set(count(self.document(from).published.key_count()));
        }
    }

    fn snapshot(&self) -> TrustSnapshot {
        let secrets = [&self.secrets[0], &self.secrets[1]];
        TrustSnapshot {
            keys: KeySet::new(secrets, &self.file.published, &self.url.published),
            opaque: self.opaque.clone(),
            demands: Arc::clone(&self.demands),
            token_bytes_max: self.token_bytes_max,
            remembered: Mutex::default(),
        }
    }
}

/// Logs and counts a document that has changed, and its keys that are left out.
fn record(published: &PublishedKeys, from: KeySource, metrics: &Metrics) {
    let keys = published.key_count();
    set_now(metrics.jwks_read.of(from));
    for (place, reason) in &published.unusable {
        metrics.jwks_keys_unusable.of(*reason).inc();
        let (origin, reason) = (from.label(), reason.label());
        tracing::warn!(origin, place, reason, "a key of the key set is left out");
    }
    tracing::info!(origin = from.label(), keys, "the key set has been read");
}

impl TrustSnapshot {
    /// Returns the token of an opaque key, or a token that was verified before: neither needs a
    /// signature to be checked.
    fn known(&self, text: &str) -> Option<Arc<Token>> {
        if text.starts_with(OPAQUE_KEY_PREFIX) {
            let mut opaque = self.opaque.iter();
            return opaque.find(|(key, _)| key.is(text)).map(|(_, token)| Arc::clone(token));
        }
        self.remembered.lock().tokens.get(text).cloned()
    }

    fn remember(&self, token: &Arc<Token>, now: i64) {
        let mut remembered = self.remembered.lock();
        let is_due = remembered.forgotten_at.saturating_add(FORGET_INTERVAL) <= now;
        if remembered.tokens.len() >= REMEMBERED_MAX && is_due {
            remembered.forgotten_at = now;
            remembered.tokens.retain(|_, token| Arc::strong_count(token) > 1);
        }
        if remembered.tokens.len() < REMEMBERED_MAX {
            remembered.tokens.insert(token.text().into(), Arc::clone(token));
        }
    }
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authenticator")
    }
}

#[cfg(test)]
mod tests;
