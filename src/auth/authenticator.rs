//! Who is believed: a token's text → its claims, checked with the keys of the moment.
//!
//! Invariants: keys, demands and the tokens that they have verified are one value, [`Trust`], which
//! is replaced whole: nothing that an old key has shown outlives it. A token that is remembered is
//! only asked whether it has expired. Of the two locks `sources` is taken first.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};

use super::{
    jwks::{self, JwksError},
    jwt::{Claims, Demands, Parts, Token, TokenError},
    keys::{DocumentError, KeySet, Origin, Published, SECRET_BYTES_MIN},
    revocations::Revocations,
};
use crate::secret::Secret;
use crate::{
    metrics::Metrics,
    protocol::payload::OPAQUE_KEY_PREFIX,
    server::settings::{Config, Jwks},
};

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
    jwks: Arc<Jwks>,
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
    fn parse(text: Vec<u8>, from: Origin) -> Result<Self, DocumentError> {
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
    pub(super) fn jwks(&self) -> Arc<Jwks> {
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
        from: Origin,
        read_as: &Arc<Jwks>,
        metrics: &Metrics,
    ) -> Result<(), DocumentError> {
        let mut sources = self.sources.lock();
        let is_current = Arc::ptr_eq(&sources.jwks, read_as);
        let place = match from {
            Origin::File => &mut sources.file,
            Origin::Url => &mut sources.url,
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
            file = Document::parse(text, Origin::File)?;
            jwks::note(&file.published, Origin::File, metrics);
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
        for (origin, document) in [(Origin::File, &self.file), (Origin::Url, &self.url)] {
            let keys = i64::try_from(document.published.key_count()).unwrap_or(i64::MAX);
            metrics.jwks_keys.with_label_values(&[origin.kind()]).set(keys);
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
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::auth::{
        keys::{Algorithm, KeySlot},
        sign::sign,
    };

    const NOW: i64 = 1_800_000_000;
    const SECRET: &str = "a-secret-that-is-long-enough-to-sign";

    fn config() -> Config {
        let mut config = Config::defaults();
        config.jwt_secret = SECRET.into();
        config.auth.leeway = Duration::ZERO;
        config
    }

    fn verifier(config: &Config) -> Verifier {
        Verifier::new(config, &Metrics::new()).unwrap()
    }

    fn token(claims: &Value) -> String {
        sign(&SECRET.into(), claims).unwrap()
    }

    fn verify(claims: &Value) -> Result<Arc<Token>, TokenError> {
        verifier(&config()).verify(&token(claims), NOW)
    }

    fn lasting() -> String {
        token(&json!({ "role": "anon", "exp": NOW + 9 }))
    }

    #[test]
    fn a_token_holds_until_the_second_of_its_expiry_and_the_leeway() {
        let mut config = config();
        for leeway in [0_i64, 5] {
            config.auth.leeway = Duration::from_secs(leeway.unsigned_abs());
            let verifier = verifier(&config);
            let ends = |exp| verifier.verify(&token(&json!({ "role": "anon", "exp": exp })), NOW);
            assert!(ends(NOW - leeway + 1).is_ok());
            let expired = ends(NOW - leeway).unwrap_err();
            assert_eq!(expired, TokenError::Expired { seconds: leeway });
        }
    }

    #[test]
    fn a_remembered_token_still_expires() {
        let (verifier, token) = (verifier(&config()), lasting());
        assert!(!verifier.is_known(&token));
        assert!(verifier.verify(&token, NOW).is_ok());
        assert!(verifier.is_known(&token));
        let expired = verifier.verify(&token, NOW + 10).unwrap_err();
        assert_eq!(expired, TokenError::Expired { seconds: 1 });
    }

    #[test]
    fn a_token_in_its_grace_is_still_checked_with_the_keys_of_the_moment() {
        let (mut config, metrics, token) = (config(), Metrics::new(), lasting());
        let (verifier, grace) = (verifier(&config), Duration::from_secs(30));
        let token = verifier.verify(&token, NOW).unwrap();
        for reload in [false, true] {
            if reload {
                verifier.reload(&config, &metrics).unwrap();
            }
            assert!(verifier.recheck(&token, NOW + 9 + 29, grace).is_ok());
            let expired = verifier.recheck(&token, NOW + 9 + 30, grace).unwrap_err();
            assert_eq!(expired, TokenError::Expired { seconds: 30 });
            assert!(verifier.verify(token.text(), NOW + 9).is_err(), "it opens nothing");
        }
        config.jwt_secret = "another-secret-that-is-long-enough-to-sign".into();
        verifier.reload(&config, &metrics).unwrap();
        let changed = verifier.recheck(&token, NOW, grace).unwrap_err();
        assert_eq!(changed, TokenError::KeyGone);
        assert!(verifier.recheck(verifier.anonymous(), NOW, grace).is_ok());
    }

    #[test]
    fn an_opaque_key_that_has_been_changed_is_noticed() {
        let mut config = config();
        config.secret_key = "sb_secret_a".into();
        let verifier = verifier(&config);
        let token = verifier.verify("sb_secret_a", NOW).unwrap();
        assert!(verifier.recheck(&token, NOW, Duration::ZERO).is_ok());
        config.secret_key = "sb_secret_b".into();
        verifier.reload(&config, &Metrics::new()).unwrap();
        let gone = verifier.recheck(&token, NOW, Duration::ZERO).unwrap_err();
        assert_eq!(gone, TokenError::KeyGone);
    }

    #[test]
    fn an_audience_or_a_missing_subject_changes_nothing_unless_asked_for() {
        let claims = json!({ "role": "authenticated", "aud": "x", "iss": 1, "exp": NOW + 9 });
        let verified = verify(&claims).unwrap();
        assert_eq!((verified.claims.sub(), verified.claims.iat()), (None, None));
    }

    #[test]
    fn revocation_and_audit_can_name_a_token() {
        let claims = json!({ "role": "authenticated", "exp": NOW + 9, "iat": NOW as f64 - 0.4,
            "sub": "a", "session_id": "b", "jti": "c" });
        let claims = verify(&claims).unwrap().claims.clone();
        let named = (claims.sub(), claims.session_id(), claims.jti(), claims.iat());
        assert_eq!(named, (Some("a"), Some("b"), Some("c"), Some(NOW)));
        let strange = json!({ "role": "a", "exp": NOW + 9, "sub": 1, "jti": ["c"] });
        let strange = verify(&strange).unwrap();
        assert_eq!((strange.claims.sub(), strange.claims.jti()), (None, None));
    }

    #[test]
    fn the_previous_secret_is_good_as_long_as_it_is_set() {
        let old = lasting();
        let mut config = config();
        config.jwt_secret = "another-secret-that-is-long-enough-to-sign".into();
        let verifier = verifier(&config);
        assert_eq!(verifier.verify(&old, NOW).unwrap_err(), TokenError::Signature);
        config.jwt_secret_previous = SECRET.into();
        verifier.reload(&config, &Metrics::new()).unwrap();
        let verified_by = verifier.verify(&old, NOW).unwrap().verified_by;
        assert_eq!(verified_by.slot, KeySlot::Previous);
        assert_eq!(verified_by.algorithm, Some(Algorithm::Hs256));
        config.jwt_secret_previous = Secret::default();
        verifier.reload(&config, &Metrics::new()).unwrap();
        assert!(!verifier.is_known(&old), "it outlives its key");
        assert_eq!(verifier.verify(&old, NOW).unwrap_err(), TokenError::Signature);
    }

    #[test]
    fn a_reload_is_told_and_takes_over_opaque_keys_issuers_and_bounds() {
        let mut config = config();
        config.publishable_key = "sb_publishable_a".into();
        let verifier = verifier(&config);
        let mut changes = verifier.changes();
        assert!(
            verifier.verify("sb_publishable_a", NOW).is_ok()
                && verifier.verify(&lasting(), NOW).is_ok()
        );
        assert!(!changes.has_changed().unwrap());
        config.publishable_key = "sb_publishable_b".into();
        config.auth.issuers = vec!["us".to_owned()];
        verifier.reload(&config, &Metrics::new()).unwrap();
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert!(!verifier.is_known("sb_publishable_a") && verifier.is_known("sb_publishable_b"));
        assert_eq!(verifier.verify(&lasting(), NOW).unwrap_err(), TokenError::Issuer);
        config.auth.issuers.clear();
        config.limits.token_bytes_max = lasting().len() - 1;
        verifier.reload(&config, &Metrics::new()).unwrap();
        assert_eq!(verifier.verify(&lasting(), NOW).unwrap_err(), TokenError::Malformed);
    }

    #[test]
    fn a_reload_that_fails_changes_nothing() {
        let mut config = config();
        let verifier = verifier(&config);
        let changes = verifier.changes();
        config.jwt_secret = "another-secret-that-is-long-enough-to-sign".into();
        config.jwks.file = "/nowhere/keys.json".to_owned();
        let error = verifier.reload(&config, &Metrics::new()).unwrap_err();
        assert_eq!(error.kind(), "unreadable");
        assert!(!changes.has_changed().unwrap() && verifier.verify(&lasting(), NOW).is_ok());
    }

    #[test]
    fn a_document_read_for_other_settings_is_ignored_and_the_same_one_changes_nothing() {
        let (config, metrics) = (config(), Metrics::new());
        let verifier = verifier(&config);
        let changes = verifier.changes();
        let read_as = verifier.jwks();
        let document = br#"{"keys":[]}"#.to_vec();
        verifier.take(document.clone(), Origin::Url, &read_as, &metrics).unwrap();
        assert!(changes.has_changed().unwrap());
        for (read_as, text) in
            [(&Arc::new(config.jwks.clone()), b"{}".to_vec()), (&read_as, document)]
        {
            let changes = verifier.changes();
            verifier.take(text, Origin::Url, read_as, &metrics).unwrap();
            assert!(!changes.has_changed().unwrap());
        }
        let error = verifier.take(b"{}".to_vec(), Origin::Url, &read_as, &metrics).unwrap_err();
        assert_eq!(error, DocumentError::Malformed);
    }

    #[test]
    fn an_opaque_key_stands_for_its_role_and_an_unknown_one_for_nothing() {
        let mut config = config();
        config.publishable_key = "sb_publishable_a".into();
        config.secret_key = "sb_secret_b".into();
        let verifier = verifier(&config);
        let role = |key| verifier.verify(key, NOW).map(|token| token.claims.role.to_string());
        assert_eq!(role("sb_publishable_a").unwrap(), "anon");
        assert_eq!(role("sb_secret_b").unwrap(), "service_role");
        for key in ["sb_", "sb_secret_", "sb_secret_bb", "sb_publishable_b"] {
            assert_eq!(role(key).unwrap_err(), TokenError::Malformed, "{key}");
        }
        // An empty `access_token` is not the one that the key stands for.
        assert!(!verifier.verify("sb_secret_b", NOW).unwrap().is(""));
    }

    #[test]
    fn a_token_above_the_bound_is_not_looked_at() {
        let (mut config, token) = (config(), lasting());
        config.limits.token_bytes_max = token.len();
        assert!(verifier(&config).verify(&token, NOW).is_ok());
        config.limits.token_bytes_max = token.len() - 1;
        assert_eq!(verifier(&config).verify(&token, NOW).unwrap_err(), TokenError::Malformed);
    }

    #[test]
    fn a_secret_signs_with_each_of_its_algorithms_whatever_the_kid() {
        let (verifier, key) =
            (verifier(&config()), jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes()));
        for (algorithm, ours) in [
            (jsonwebtoken::Algorithm::HS256, Algorithm::Hs256),
            (jsonwebtoken::Algorithm::HS384, Algorithm::Hs384),
            (jsonwebtoken::Algorithm::HS512, Algorithm::Hs512),
        ] {
            let header = jsonwebtoken::Header {
                kid: Some("of-no-key-set".to_owned()),
                ..jsonwebtoken::Header::new(algorithm)
            };
            let claims = json!({ "role": "anon", "exp": NOW + 9 });
            let token = jsonwebtoken::encode(&header, &claims, &key).unwrap();
            let verified_by = verifier.verify(&token, NOW).unwrap().verified_by;
            assert_eq!(
                verified_by,
                super::super::keys::VerifiedBy { slot: KeySlot::Current, algorithm: Some(ours) }
            );
        }
    }

    proptest! {
        #[test]
        fn a_token_changed_in_any_place_never_verifies(place in any::<prop::sample::Index>(), by in any::<char>()) {
            let (verifier, token) = (verifier(&config()), lasting());
            let place = place.index(token.len());
            let changed: String =
                token.chars().enumerate().map(|(at, it)| if at == place { by } else { it }).collect();
            prop_assert_eq!(verifier.verify(&changed, NOW).is_ok(), changed == token);
        }

        #[test]
        fn a_token_that_is_cut_stretched_or_moved_never_verifies(
            from in any::<prop::sample::Index>(),
            to in any::<prop::sample::Index>(),
            more in "[A-Za-z0-9_.=-]{0,8}",
        ) {
            let (verifier, token) = (verifier(&config()), lasting());
            let (from, to) = (from.index(token.len()), to.index(token.len() + 1));
            let part = token.get(from..to).unwrap_or_default();
            for changed in [format!("{part}{more}"), format!("{more}{part}"), format!("{token}{more}"), format!("{more}{token}")] {
                prop_assert_eq!(verifier.verify(&changed, NOW).is_ok(), changed == token);
            }
        }

        #[test]
        fn no_text_and_no_three_parts_panic_or_verify(
            text in any::<String>(),
            parts in prop::array::uniform3(prop::collection::vec(any::<u8>(), 0..64)),
        ) {
            use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
            let verifier = verifier(&config());
            let parts = parts.map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
            let header = r#"{"alg":"HS256"}"#;
            let headed = format!("{}.{parts}", URL_SAFE_NO_PAD.encode(header));
            for text in [text, parts, headed] {
                prop_assert!(verifier.verify(&text, NOW).is_err());
            }
        }

        #[test]
        fn random_claims_are_read_or_refused_and_never_panic(
            name in prop::sample::select(vec!["exp", "nbf", "iat", "role", "iss", "aud", "sub"]),
            value in r#"-?[0-9]{1,25}(\.[0-9]{1,5})?(e[+-]?[0-9]{1,4})?|"[ -!#-\[\]-~]{0,80}"|\[\]|\{\}|null|true"#,
            now in any::<i64>(),
        ) {
            let demands = Demands { issuers: vec!["a".to_owned()], audiences: vec!["a".to_owned()], ..Demands::default() };
            for rest in ["", r#","role":"anon","exp":1900000000,"iss":"a","aud":["a"]"#] {
                let claims = format!("{{\"{name}\":{value}{rest}}}");
                for demands in [&demands, &Demands::default()] {
                    if let Ok(claims) = Claims::read(claims.as_bytes(), demands, now, Duration::ZERO) {
                        prop_assert!(!claims.role.is_empty() && claims.exp > now);
                    }
                }
            }
        }
    }
}
