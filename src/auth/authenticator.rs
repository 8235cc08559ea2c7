//! Who is believed: a token's text → its claims, checked with the keys of the moment.
//!
//! Invariants: keys, demands and the tokens that they have verified are one value, [`Trust`], which
//! is replaced whole: nothing that an old key has shown outlives it. A token that is remembered is
//! only asked whether it has expired. Of the two locks `sources` is taken first.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};

use super::{
    algorithm::SECRET_BYTES_MIN,
    claims::{Claims, Demands},
    error::TokenError,
    jwk::{DocumentError, KeySource, Published},
    jwks::{self, JwksError},
    jwt::{Parts, Token},
    keys::KeySet,
    revocations::Revocations,
};
use crate::secret::Secret;
use crate::{metrics::Metrics, protocol::payload::OPAQUE_KEY_PREFIX, server::settings::Config};

/// Most verified tokens that are remembered; 10,000 viewers share one anon key.
const REMEMBERED_MAX: usize = 16_384;
/// Between two looks for remembered tokens that nobody holds, seconds.
const FORGET_INTERVAL: i64 = 1;

/// Verifies tokens with the project's keys.
pub struct Verifier {
    trust: RwLock<Arc<Trust>>,
    sources: Mutex<Sources>,
    /// Told of each [`Trust`].
    changed: watch::Sender<()>,
    /// A token has named a key that is not here, or the key set has another address.
    wanted: Notify,
    anonymous: Arc<Token>,
    /// What is genuine and shall open nothing.
    pub revocations: Revocations,
}

/// What trust is made of.
struct Sources {
    /// `jwt_secret` and `jwt_secret_previous`.
    secrets: [Secret; 2],
    /// Keys that are no JWTs, and the tokens that they stand for.
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
    published: Published,
}

impl Document {
    fn parse(text: Vec<u8>, from: KeySource) -> Result<Self, DocumentError> {
        Ok(Self { published: Published::parse(&text, from)?, text })
    }
}

/// Whom we believe at one time.
struct Trust {
    keys: KeySet,
    opaque: Vec<(Secret, Arc<Token>)>,
    demands: Arc<Demands>,
    token_bytes_max: usize,
    remembered: Mutex<Remembered>,
}

/// Tokens whose signature has been verified, so that one anon key is parsed and kept once. At the
/// bound those that nobody holds are forgotten; if all are held, the next is not kept.
#[derive(Default)]
struct Remembered {
    tokens: HashMap<Box<str>, Arc<Token>>,
    /// When those that nobody holds were last forgotten, in seconds since 1970.
    forgotten_at: i64,
}

impl Verifier {
    /// With the keys of the settings, and those of `jwks.file`.
    ///
    /// # Errors
    /// [`JwksError`] if the file cannot be read or is no key set.
    pub fn new(config: &Config, metrics: &Metrics) -> Result<Self, JwksError> {
        let sources = Sources::new(config, metrics)?;
        sources.show(metrics);
        Ok(Self {
            trust: RwLock::new(Arc::new(sources.trust())),
            sources: Mutex::new(sources),
            changed: watch::Sender::new(()),
            wanted: Notify::new(),
            anonymous: Arc::new(Token::opaque("", "anon")),
            revocations: Revocations::new(config.auth.revocations_max),
        })
    }

    /// What is left of somebody whose tokens have all expired: the role `anon`, no claims.
    #[must_use]
    pub fn anonymous(&self) -> &Arc<Token> {
        &self.anonymous
    }

    /// The token with its claims, if one of our keys has signed it and it holds at `now`, in seconds
    /// since 1970.
    ///
    /// # Errors
    /// [`TokenError`]; form before signature before claims, as the table of [`super::jwt`] says.
    pub fn verify(&self, text: &str, now: i64) -> Result<Arc<Token>, TokenError> {
        let trust = Arc::clone(&self.trust.read());
        self.unless_revoked(self.judge(&trust, text, now, trust.demands.leeway)?, now)
    }

    /// The token as the keys and demands of the moment have it, even if it ended up to `allowance`
    /// ago.
    ///
    /// # Errors
    /// As [`Self::verify`]; [`TokenError::KeyGone`] if no key is left that signed it.
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
            // It has been verified; an opaque key that is not known is no JWT, either.
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
        trust: &Trust,
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
        let Parts { header, signed, payload, signature } = Parts::of(text)?;
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

    /// Whether the keys of the moment have already shown this to be genuine. It may have expired.
    #[must_use]
    pub fn is_known(&self, text: &str) -> bool {
        let trust = Arc::clone(&self.trust.read());
        text.len() <= trust.token_bytes_max && trust.known(text).is_some()
    }

    /// Takes over the keys and demands of these settings, and reads the key set's file again. Keys
    /// of a URL that is another are dropped.
    ///
    /// # Errors
    /// [`JwksError`] if the file cannot be read or is no key set; then nothing has changed.
    pub fn reload(&self, config: &Config, metrics: &Metrics) -> Result<(), JwksError> {
        let mut new = Sources::new(config, metrics)?;
        let mut sources = self.sources.lock();
        if new.jwks.url == sources.jwks.url {
            new.url = std::mem::take(&mut sources.url);
        }
        *sources = new;
        self.replace(&sources, metrics);
        self.wanted.notify_one();
        Ok(())
    }

    /// Told whenever keys or demands are others: what was verified before may not hold any more.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Where the key set is.
    pub(super) fn jwks(&self) -> Arc<jwks::Settings> {
        Arc::clone(&self.sources.lock().jwks)
    }

    /// Waits until a token names a key that is not here, or the settings are others.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Takes the keys of a document that was read as these settings say; if they are no longer the
    /// settings, it is ignored. A document that has been taken before changes nothing.
    ///
    /// # Errors
    /// [`DocumentError`]; the keys stay those of the last document.
    pub(super) fn take(
        &self,
        text: Vec<u8>,
        from: KeySource,
        read_as: &Arc<jwks::Settings>,
        metrics: &Metrics,
    ) -> Result<(), DocumentError> {
        let mut sources = self.sources.lock();
        let is_current = Arc::ptr_eq(&sources.jwks, read_as);
        let place = match from {
            KeySource::File => &mut sources.file,
            KeySource::Url => &mut sources.url,
        };
        if is_current && place.text != text {
            *place = Document::parse(text, from)?;
            jwks::note(&place.published, from, metrics);
            self.replace(&sources, metrics);
        }
        Ok(())
    }

    fn replace(&self, sources: &Sources, metrics: &Metrics) {
        sources.show(metrics);
        *self.trust.write() = Arc::new(sources.trust());
        self.changed.send_replace(());
    }
}

impl Sources {
    fn new(config: &Config, metrics: &Metrics) -> Result<Self, JwksError> {
        let secrets = [&config.jwt_secret, &config.jwt_secret_previous].map(Clone::clone);
        for (setting, secret) in ["jwt_secret", "jwt_secret_previous"].iter().zip(&secrets) {
            if (1..SECRET_BYTES_MIN).contains(&secret.expose().len()) {
                tracing::warn!(setting, "shorter than 32 bytes: it can be guessed from a token");
            }
        }
        let opaque = [(&config.publishable_key, "anon"), (&config.secret_key, "service_role")];
        let opaque = opaque
            .into_iter()
            .filter(|(key, _)| !key.is_empty())
            .map(|(key, role)| (key.clone(), Arc::new(Token::opaque(key.expose(), role))));
        let mut file = Document::default();
        if !config.jwks.file.is_empty() {
            let text = jwks::read_file(&config.jwks)?;
            file = Document::parse(text, KeySource::File)?;
            jwks::note(&file.published, KeySource::File, metrics);
        }
        Ok(Self {
            secrets,
            opaque: opaque.collect(),
            demands: Arc::new(Demands {
                leeway: config.auth.leeway,
                issuers: config.auth.issuers.clone(),
                audiences: config.auth.audiences.clone(),
            }),
            token_bytes_max: config.limits.token_bytes_max,
            jwks: Arc::new(config.jwks.clone()),
            file,
            url: Document::default(),
        })
    }

    fn show(&self, metrics: &Metrics) {
        for (origin, document) in [(KeySource::File, &self.file), (KeySource::Url, &self.url)] {
            let keys = i64::try_from(document.published.key_count()).unwrap_or(i64::MAX);
            metrics.jwks_keys.with_label_values(&[origin.label()]).set(keys);
        }
    }

    fn trust(&self) -> Trust {
        let secrets = [&self.secrets[0], &self.secrets[1]];
        Trust {
            keys: KeySet::new(secrets, &self.file.published, &self.url.published),
            opaque: self.opaque.clone(),
            demands: Arc::clone(&self.demands),
            token_bytes_max: self.token_bytes_max,
            remembered: Mutex::default(),
        }
    }
}

impl Trust {
    /// What needs no look at a signature: a key that is no JWT, or a token that was verified before.
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

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

#[cfg(test)]
mod tests;
