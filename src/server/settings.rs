//! Settings: the built-in file, then the operator's file, then the environment over both.
//!
//! Invariants: all mistakes are reported together; what exists as a [`Config`] is right; nothing
//! reads it from the environment but `main`, which hands the variables over.

use std::{net::SocketAddr, path::Path, time::Duration};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format, Toml},
    value::{Dict, Map, Num, Value},
};
use hyper::{Uri, http::uri::Scheme};
use serde::Deserialize;

use crate::{
    access::{rule::Rule, settings::Topics},
    clock::duration,
    db,
    limits::{self, NetworkSettings},
    policies,
    protocol::payload::OPAQUE_KEY_PREFIX,
    secret::Secret,
    upkeep,
};

const DEFAULTS: &str = include_str!("defaults.toml");

/// The variables that are not settings.
const NOT_SETTINGS: [&str; 1] = ["config"];

/// Every setting, with its default in `src/defaults.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Public address: WebSocket, REST broadcast, health.
    pub listen: SocketAddr,
    /// Admin address: metrics, readiness. Without `admin_token` it must be a loopback one.
    pub admin_listen: SocketAddr,
    /// Bearer token that the admin address asks for; empty asks for none.
    pub admin_token: Secret,
    /// Postgres; empty serves clients among themselves, without a database.
    pub database_url: Secret,
    /// A session-mode connection for LISTEN; empty means `database_url`.
    pub notify_database_url: Secret,
    /// A role that may create triggers, for `migrate`; empty means `database_url`.
    pub migrate_database_url: Secret,
    /// Secret of the project, for tokens signed with HS256, HS384 or HS512.
    pub jwt_secret: Secret,
    /// The secret before the current one, as long as tokens of both are about; empty is none.
    pub jwt_secret_previous: Secret,
    /// A key that stands for the role `anon`: `sb_publishable_…`; empty is none.
    pub publishable_key: Secret,
    /// A key that stands for the role `service_role`: `sb_secret_…`; empty is none.
    pub secret_key: Secret,
    /// Log filter, as `tracing-subscriber` reads it: `info`, `tidegate=debug`.
    pub log: String,
    /// Where the audit log goes, JSON lines: a file, `-` for standard output, empty for nowhere.
    pub audit_log: String,
    /// What clients notice.
    pub protocol: Protocol,
    /// What is asked of tokens.
    pub auth: Auth,
    /// Public keys that tokens are signed with.
    pub jwks: Jwks,
    /// The database's decisions about private channels.
    pub policies: policies::Settings,
    /// Who is in front.
    pub network: NetworkSettings,
    /// What bounds clients.
    pub limits: limits::Settings,
    /// The database link.
    pub relay: Relay,
    /// What the database remembers.
    pub history: upkeep::Settings,
    /// What is measured, and how often.
    pub metrics: Metrics,
    /// The orderly end.
    pub drain: Drain,
    /// Topics that no rule matches.
    pub topics: Topics,
    /// The topic rules, in the order in which they are tried.
    pub topic: Vec<Rule>,
}

/// What clients notice.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// Delay of error replies to joins and of refused upgrades; at most 1.5 s.
    #[serde(deserialize_with = "duration")]
    pub error_delay: Duration,
    /// Whether a client that sends a `presence` object without `enabled` waits for a state.
    pub presence_default: bool,
}

/// What is asked of tokens.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// By so much `exp` and `nbf` may be missed by clocks that differ.
    #[serde(deserialize_with = "duration")]
    pub leeway: Duration,
    /// So long after `exp` a joined channel still lives on its token; no shorter than the leeway.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
    /// One of these must be `iss`; an empty list asks for nothing.
    pub issuers: Vec<String>,
    /// One of these must be in `aud`; an empty list asks for nothing.
    pub audiences: Vec<String>,
    /// Most revocations that are remembered; beyond, a further one is refused.
    pub revocations_max: usize,
    /// How long a revocation holds, unless it says: no shorter than a token's life.
    #[serde(deserialize_with = "duration")]
    pub revocation_keep: Duration,
}

/// Public keys that tokens are signed with.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jwks {
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

/// The database link.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    /// How long a join waits for its topic's LISTEN before it is answered all the same.
    #[serde(deserialize_with = "duration")]
    pub listen_wait: Duration,
    /// How long a LISTEN is kept after its last viewer has gone.
    #[serde(deserialize_with = "duration")]
    pub linger: Duration,
    /// Most LISTENs; beyond, further events are joined but not relayed, and counted.
    pub listens_max: usize,
    /// Between two heartbeats on the listening session.
    #[serde(deserialize_with = "duration")]
    pub heartbeat_interval: Duration,
    /// A heartbeat, or any other statement of the session, that takes longer ends the session.
    #[serde(deserialize_with = "duration")]
    pub heartbeat_timeout: Duration,
    /// A connection attempt that takes longer is given up.
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    /// Longest wait between two attempts.
    #[serde(deserialize_with = "duration")]
    pub backoff_max: Duration,
    /// Between two canaries: notifications to this gateway itself, by which it knows up to where
    /// everything has arrived.
    #[serde(deserialize_with = "duration")]
    pub canary_interval: Duration,
    /// A canary that has not arrived so long after its commit ends the session.
    #[serde(deserialize_with = "duration")]
    pub canary_timeout: Duration,
    /// When each viewer of each event gets the complete list, the events are spread over so long.
    #[serde(deserialize_with = "duration")]
    pub resync_spread: Duration,
}

/// What is measured.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Most events with series of their own, the busiest; the rest share `other`. At most 1,000.
    pub events_max: usize,
    /// Between two looks at the database's triggers, functions, writes and queue; at least 1 s.
    #[serde(deserialize_with = "duration")]
    pub database_interval: Duration,
}

/// The orderly end.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Within so long all sockets are closed, in jittered batches.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
}

/// Everything that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// The built-in settings alone.
    ///
    /// # Panics
    /// Never: a test reads them.
    #[must_use]
    pub fn defaults() -> Self {
        #[expect(clippy::expect_used, reason = "the built-in settings are tested to be right")]
        Self::load(None, Vec::new()).expect("the built-in settings are right").0
    }

    /// Reads the settings: `file` over the built-in ones, `variables` (those that begin with
    /// `TIDEGATE_`, and `DATABASE_URL`) over both. Gives the settings and their printed form.
    ///
    /// # Errors
    /// [`ConfigError`] with every mistake that was found.
    pub fn load(
        file: Option<&Path>,
        variables: Vec<(String, String)>,
    ) -> Result<(Self, Effective), ConfigError> {
        let mut mistakes = Vec::new();
        let mut figment = Figment::from(Toml::string(DEFAULTS));
        let defaults: Dict = figment.extract().unwrap_or_default();
        if let Some(file) = file {
            figment = figment.merge(Toml::file_exact(file));
        }
        figment = figment.merge(Variables(read_variables(variables, &defaults, &mut mistakes)));
        let mut values: Dict = match figment.extract() {
            Ok(values) => values,
            Err(error) => {
                // The first line says where; the next would show the line, which may be a secret.
                let place = |error: figment::Error| {
                    let text = error.to_string();
                    let line = text.lines().next().unwrap_or_default();
                    format!("{}: {line}", file.unwrap_or(Path::new("settings")).display())
                };
                mistakes.extend(error.into_iter().map(place));
                return Err(ConfigError(mistakes));
            }
        };
        // One mistake ends a reading: note it, put the default in its place, read again.
        let config = loop {
            match Figment::from(Variables(values.clone())).extract::<Self>() {
                Ok(config) => break Some(config),
                Err(error) => {
                    let path = error.path.clone();
                    mistakes.push(describe(&figment, &error));
                    if !replace_by_default(&mut values, &defaults, &path, &error) {
                        break None;
                    }
                }
            }
        };
        if let Some(config) = &config {
            mistakes.extend(config.mistakes());
        }
        match config {
            Some(config) if mistakes.is_empty() => Ok((config, Effective(values))),
            Some(_) | None => Err(ConfigError(mistakes)),
        }
    }

    /// The URL for LISTEN.
    #[must_use]
    pub fn notify_url(&self) -> &Secret {
        first_set([&self.notify_database_url, &self.database_url])
    }

    /// The URL for everything else that a gateway asks the database.
    #[must_use]
    pub fn pool_url(&self) -> &Secret {
        first_set([&self.database_url, &self.notify_database_url])
    }

    /// The URL for migrations.
    #[must_use]
    pub fn migrate_url(&self) -> &Secret {
        first_set([&self.migrate_database_url, &self.database_url])
    }

    /// What is wrong although every value can be read.
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if self.protocol.error_delay > Duration::from_millis(1500) {
            mistakes.push(
                "protocol.error_delay: at most 1500ms, or clients give the join up".to_owned(),
            );
        }
        mistakes.extend(self.policies.validate());
        if self.relay.listen_wait > Duration::from_millis(1500) {
            mistakes
                .push("relay.listen_wait: at most 1500ms, or clients give the join up".to_owned());
        }
        if self.metrics.database_interval < Duration::from_secs(1) {
            mistakes.push("metrics.database_interval: at least 1s".to_owned());
        }
        if self.admin_token.is_empty() && !self.admin_listen.ip().is_loopback() {
            mistakes.push(format!(
                "admin_listen: {} is not a loopback address; set admin_token to listen there",
                self.admin_listen
            ));
        }
        for (name, url) in [
            ("database_url", &self.database_url),
            ("notify_database_url", &self.notify_database_url),
            ("migrate_database_url", &self.migrate_database_url),
        ] {
            if !url.is_empty() && db::options(url).is_err() {
                mistakes.push(format!("{name}: expected postgres://USER:PASSWORD@HOST/DATABASE"));
            }
        }
        for (name, values) in
            [("auth.issuers", &self.auth.issuers), ("auth.audiences", &self.auth.audiences)]
        {
            if values.iter().any(String::is_empty) {
                mistakes.push(format!("{name}: one of them is empty"));
            }
        }
        if self.auth.grace < self.auth.leeway {
            mistakes.push(
                "auth.grace: no shorter than auth.leeway, or who is let in is thrown out"
                    .to_owned(),
            );
        }
        if self.metrics.events_max > 1000 {
            mistakes.push("metrics.events_max: at most 1000, each has five series".to_owned());
        }
        mistakes.extend(self.jwks.mistakes());
        mistakes.extend(self.limits.validate());
        mistakes.extend(self.zeros());
        for (name, key) in
            [("publishable_key", &self.publishable_key), ("secret_key", &self.secret_key)]
        {
            if !key.is_empty() && !key.expose().starts_with(OPAQUE_KEY_PREFIX) {
                mistakes.push(format!("{name}: expected a key that begins with sb_"));
            }
        }
        for (number, rule) in self.topic.iter().enumerate() {
            let before = &self.topic[..number];
            if rule.listen.is_some() && before.iter().any(|it| it.listen == rule.listen) {
                mistakes.push(format!("topic \"{}\": another rule listens to the same", rule.name));
            }
            mistakes.extend(
                rule.mistakes().into_iter().map(|text| format!("topic \"{}\": {text}", rule.name)),
            );
        }
        mistakes
    }

    /// What must not be nothing, and is.
    fn zeros(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        for (name, value) in
            [("relay.listens_max", self.relay.listens_max), ("jwks.bytes_max", self.jwks.bytes_max)]
        {
            if value == 0 {
                mistakes.push(format!("{name}: must be at least 1"));
            }
        }
        for (name, value) in [
            ("relay.heartbeat_interval", self.relay.heartbeat_interval),
            ("relay.heartbeat_timeout", self.relay.heartbeat_timeout),
            ("relay.connect_timeout", self.relay.connect_timeout),
            ("relay.canary_interval", self.relay.canary_interval),
            ("relay.canary_timeout", self.relay.canary_timeout),
            ("jwks.timeout", self.jwks.timeout),
            ("jwks.refresh_interval", self.jwks.refresh_interval),
        ] {
            if value.is_zero() {
                mistakes.push(format!("{name}: must be longer than 0s"));
            }
        }
        mistakes
    }
}

impl Jwks {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let is_address = |url: &str| {
            let url = url.parse::<Uri>().ok();
            url.is_some_and(|url| {
                let host = url.host().is_some_and(|host| !host.is_empty());
                // A password here would be printed with the settings.
                let is_bare = url.authority().is_some_and(|it| !it.as_str().contains('@'));
                url.scheme() == Some(&Scheme::HTTPS) && host && is_bare
            })
        };
        if !self.url.is_empty() && (!is_address(&self.url) || self.url.contains('#')) {
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
        mistakes
    }
}

/// The effective settings, for printing: secrets are hidden.
#[derive(Debug)]
pub struct Effective(Dict);

/// Stands for what is not shown.
const HIDDEN: &str = "<hidden>";

/// The URL with `<hidden>` for its password, wherever that stands.
fn hide_password(url: &str) -> String {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
    let user_and_host =
        rest.rsplit_once('@').and_then(|(user, host)| Some((user.split_once(':')?.0, host)));
    let mut shown = match user_and_host {
        Some((user, host)) => format!("{scheme}://{user}:{HIDDEN}@{host}"),
        None => address.to_owned(),
    };
    for (number, pair) in query.split('&').filter(|pair| !pair.is_empty()).enumerate() {
        shown.push(if number == 0 { '?' } else { '&' });
        match pair.split_once('=') {
            Some((key, _)) if key.contains("pass") => shown.push_str(&format!("{key}={HIDDEN}")),
            Some(_) | None => shown.push_str(pair),
        }
    }
    shown
}

/// The settings whose values are never shown whole.
const SECRETS: [&str; 8] = [
    "admin_token",
    "database_url",
    "notify_database_url",
    "migrate_database_url",
    "jwt_secret",
    "jwt_secret_previous",
    "publishable_key",
    "secret_key",
];

impl Effective {
    /// The settings as a file that could be read again, but for the secrets.
    ///
    /// # Errors
    /// [`ConfigError`] if a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let mut values = self.0.clone();
        for name in SECRETS {
            let Some(value) = values.get_mut(name) else { continue };
            let Some(text) = value.as_str().filter(|text| !text.is_empty()) else { continue };
            *value =
                if name.ends_with("_url") { hide_password(text).into() } else { HIDDEN.into() };
        }
        toml::to_string(&values).map_err(|error| ConfigError(vec![error.to_string()]))
    }
}

/// Settings from a dictionary.
struct Variables(Dict);

impl Provider for Variables {
    fn metadata(&self) -> Metadata {
        Metadata::named("environment variables")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.0.clone()))
    }
}

/// `TIDEGATE_SECTION__FIELD=text`, read as the type that the default has.
fn read_variables(
    variables: Vec<(String, String)>,
    defaults: &Dict,
    mistakes: &mut Vec<String>,
) -> Dict {
    let mut values = Dict::new();
    for (variable, text) in variables {
        let Some(name) = variable.strip_prefix("TIDEGATE_") else {
            if variable == "DATABASE_URL" {
                values.entry("database_url".to_owned()).or_insert_with(|| text.into());
            }
            continue;
        };
        let name = name.to_ascii_lowercase();
        if NOT_SETTINGS.contains(&name.as_str()) {
            continue;
        }
        let (section, field) = match name.split_once("__") {
            Some((section, field)) => (Some(section), field),
            None => (None, name.as_str()),
        };
        let default = match section {
            Some(section) => defaults.get(section).and_then(|it| it.as_dict()?.get(field)),
            None => defaults.get(field),
        };
        let Some(value) = default.and_then(|default| read_as(default, &text)) else {
            mistakes.push(match default {
                Some(default) => format!("{variable}: expected {}", expected(default)),
                None => format!("{variable}: no such setting"),
            });
            continue;
        };
        match section {
            None => {
                values.insert(field.to_owned(), value);
            }
            Some(section) => {
                let entry = values.entry(section.to_owned()).or_insert_with(|| Dict::new().into());
                if let Value::Dict(_, fields) = entry {
                    fields.insert(field.to_owned(), value);
                }
            }
        }
    }
    values
}

fn read_as(default: &Value, text: &str) -> Option<Value> {
    match default {
        Value::String(..) => Some(text.into()),
        Value::Bool(..) => text.parse::<bool>().ok().map(Value::from),
        Value::Num(..) => text.parse::<u64>().ok().map(Value::from),
        // Rules are a list of another kind, and not for a variable.
        Value::Array(_, rules) if !rules.is_empty() => None,
        Value::Array(..) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            Some(parts.map(Value::from).collect::<Vec<_>>().into())
        }
        Value::Char(..) | Value::Empty(..) | Value::Dict(..) => None,
    }
}

fn expected(default: &Value) -> &'static str {
    match default {
        Value::Bool(..) => "true or false",
        Value::Num(_, Num::F32(_) | Num::F64(_)) => "a number",
        Value::Num(..) => "a whole number",
        Value::String(..) | Value::Char(..) => "a text",
        Value::Empty(..) | Value::Dict(..) | Value::Array(..) => "a settings file, not a variable",
    }
}

/// The mistake with its setting and where that was set; never its value, which may be a secret.
fn describe(figment: &Figment, error: &figment::Error) -> String {
    let path = error.path.join(".");
    let source = figment
        .find_metadata(&path)
        .map(|metadata| match &metadata.source {
            Some(source) => format!(" (from {source})"),
            None => format!(" (from {})", metadata.name),
        })
        .unwrap_or_default();
    let is_secret = SECRETS.iter().any(|secret| path == *secret);
    let text = if is_secret { "expected a text".to_owned() } else { error.kind.to_string() };
    if path.is_empty() { text } else { format!("{path}: {text}{source}") }
}

/// Puts the default, or nothing, where the mistake is. False if that changes nothing.
fn replace_by_default(
    values: &mut Dict,
    defaults: &Dict,
    path: &[String],
    error: &figment::Error,
) -> bool {
    let mut path: Vec<&str> = path.iter().map(String::as_str).collect();
    // An unknown field is named by the error, not by its path.
    if let figment::error::Kind::UnknownField(field, _) = &error.kind
        && path.last() != Some(&field.as_str())
    {
        path.push(field);
    }
    // Rules are a list: a mistake in one replaces them all.
    if path.first() == Some(&"topic") {
        path.truncate(1);
    }
    match path.as_slice() {
        [name] => replace(values, defaults.get(*name), name),
        [section, name, ..] => {
            let default = defaults.get(*section).and_then(Value::as_dict);
            match values.get_mut(*section) {
                Some(Value::Dict(_, fields)) => {
                    replace(fields, default.and_then(|fields| fields.get(*name)), name)
                }
                _ => replace(values, defaults.get(*section), section),
            }
        }
        [] => false,
    }
}

fn replace(values: &mut Dict, default: Option<&Value>, name: &str) -> bool {
    match default {
        Some(default) => values.insert(name.to_owned(), default.clone()).as_ref() != Some(default),
        None => values.remove(name).is_some(),
    }
}

fn first_set(urls: [&Secret; 2]) -> &Secret {
    let [first, second] = urls;
    if first.is_empty() { second } else { first }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(variables: &[(&str, &str)]) -> Result<(Config, Effective), ConfigError> {
        let owned = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Config::load(None, owned)
    }

    #[test]
    fn the_built_in_settings_are_right() {
        assert!(load(&[]).is_ok());
    }

    #[test]
    fn a_variable_goes_over_the_file_and_keeps_a_secret_of_digits_a_text() {
        let (config, _) = load(&[
            ("TIDEGATE_JWT_SECRET", "12345"),
            ("TIDEGATE_LIMITS__CONNECTIONS_MAX", "7"),
            ("DATABASE_URL", "postgres://a"),
            ("TIDEGATE_PROTOCOL__ERROR_DELAY", "10ms"),
            ("TIDEGATE_TOPICS__ALLOW_OTHER", "false"),
        ])
        .unwrap();
        assert_eq!(config.jwt_secret.expose(), "12345");
        assert_eq!(config.limits.connections_max, 7);
        assert_eq!(config.notify_url().expose(), "postgres://a");
        assert_eq!(config.protocol.error_delay, Duration::from_millis(10));
        assert!(!config.topics.allow_other);
    }

    #[test]
    fn all_mistakes_are_reported_together_and_without_secrets() {
        let ConfigError(mistakes) = load(&[
            ("TIDEGATE_LISTEN", "nowhere"),
            ("TIDEGATE_ADMIN_LISTEN", "0.0.0.0:9400"),
            ("TIDEGATE_LIMITS__CONNECTIONS_MAX", "many"),
            ("TIDEGATE_RELAY__LINGER", "soon"),
            ("TIDEGATE_NO_SUCH", "1"),
            ("TIDEGATE_PROTOCOL__ERROR_DELAY", "2s"),
            ("TIDEGATE_JWT_SECRET", "hidden-secret"),
        ])
        .unwrap_err();
        for name in [
            "listen",
            "admin_listen",
            "TIDEGATE_LIMITS__CONNECTIONS_MAX",
            "relay.linger",
            "TIDEGATE_NO_SUCH",
            "protocol.error_delay",
        ] {
            assert!(mistakes.iter().any(|text| text.starts_with(name)), "{name}: {mistakes:?}");
        }
        assert_eq!(mistakes.len(), 6, "{mistakes:?}");
        assert!(!mistakes.iter().any(|text| text.contains("hidden-secret")));
    }

    #[test]
    fn the_database_is_looked_at_every_second_at_most() {
        for (interval, is_right) in [("1s", true), ("1h", true), ("999ms", false), ("0s", false)] {
            let loaded = load(&[("TIDEGATE_METRICS__DATABASE_INTERVAL", interval)]);
            assert_eq!(loaded.is_ok(), is_right, "{interval}");
        }
    }

    #[test]
    fn so_many_events_may_have_series_and_no_more() {
        for (max, is_right) in [("0", true), ("1000", true), ("1001", false), ("-1", false)] {
            let loaded = load(&[("TIDEGATE_METRICS__EVENTS_MAX", max)]);
            assert_eq!(loaded.is_ok(), is_right, "{max}");
        }
    }

    #[test]
    fn origins_and_proxies_that_cannot_be_read_are_mistakes() {
        let (config, _) = load(&[
            ("TIDEGATE_NETWORK__ORIGINS", "https://app.example.com, https://*.example.com, null"),
            ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "10.0.0.0/8, ::1, 2001:db8::/32"),
        ])
        .unwrap();
        assert_eq!((config.network.origins.len(), config.network.trusted_proxies.len()), (3, 3));
        for (name, bad) in [
            ("TIDEGATE_NETWORK__ORIGINS", "app.example.com"),
            ("TIDEGATE_NETWORK__ORIGINS", "https://app.example.com/"),
            ("TIDEGATE_NETWORK__ORIGINS", "*"),
            ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "10.0.0.0/33"),
            ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "proxy.example.com"),
            ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "*"),
        ] {
            let ConfigError(mistakes) = load(&[(name, bad)]).unwrap_err();
            let [mistake] = mistakes.as_slice() else { panic!("{bad}: {mistakes:?}") };
            assert!(mistake.starts_with("network.") && mistake.contains("expected"), "{mistake}");
        }
    }

    #[test]
    fn a_file_that_is_no_toml_is_named_without_the_line_that_may_be_a_secret() {
        let file = std::env::temp_dir().join(format!("tidegate-{}.toml", uuid::Uuid::new_v4()));
        std::fs::write(&file, "log = \"info\"\njwt_secret = \"hidden-secret\n").unwrap();
        let ConfigError(mistakes) = Config::load(Some(&file), Vec::new()).unwrap_err();
        std::fs::remove_file(&file).unwrap();
        let [mistake] = mistakes.as_slice() else { panic!("{mistakes:?}") };
        assert!(mistake.contains("line 2") && !mistake.contains("hidden"), "{mistake}");
    }

    #[test]
    fn a_key_set_is_had_from_a_file_or_over_https() {
        for url in [
            "https://a.example/keys",
            "https://a.example",
            "HTTPS://127.0.0.1:8443/a?b=c",
            "https://[::1]/",
        ] {
            assert!(load(&[("TIDEGATE_JWKS__URL", url)]).is_ok(), "{url}");
        }
        for url in [
            "http://a.example/keys",
            "a.example",
            "/keys",
            "https:///keys",
            "https://u:p@a.example/",
            "file:///keys",
            "https://a.example/#keys",
            "wss://a.example",
            "https:// a.example",
        ] {
            let ConfigError(mistakes) = load(&[("TIDEGATE_JWKS__URL", url)]).unwrap_err();
            assert_eq!(mistakes, ["jwks.url: expected https://HOST/PATH, without a user"], "{url}");
        }
        for (variable, value) in [
            ("TIDEGATE_JWKS__FILE", "https://a.example/keys"),
            ("TIDEGATE_JWKS__FILE", "/etc/keys/"),
            ("TIDEGATE_JWKS__CA_FILE", "ca.pem"),
        ] {
            assert_eq!(load(&[(variable, value)]).unwrap_err().0.len(), 1, "{variable}={value}");
        }
        assert!(load(&[("TIDEGATE_AUTH__ISSUERS", "a, b")]).is_ok());
    }

    #[test]
    fn the_grace_is_no_shorter_than_the_leeway() {
        assert!(load(&[("TIDEGATE_AUTH__LEEWAY", "30s")]).is_ok());
        assert!(load(&[("TIDEGATE_AUTH__LEEWAY", "31s")]).is_err());
    }

    #[test]
    fn a_urls_password_is_hidden_wherever_it_stands() {
        for (url, shown) in [
            ("postgres://u:p@h/d", "postgres://u:<hidden>@h/d"),
            ("postgres://u:p:@//x@h/d?a=b", "postgres://u:<hidden>@h/d?a=b"),
            ("postgres://u@h/d?sslmode=require", "postgres://u@h/d?sslmode=require"),
            ("postgres://h/d?password=p&user=u", "postgres://h/d?password=<hidden>&user=u"),
        ] {
            assert_eq!(hide_password(url), shown);
        }
    }

    #[test]
    fn the_printed_settings_can_be_read_again_and_hide_secrets() {
        let (_, effective) = load(&[("TIDEGATE_JWT_SECRET", "hidden-secret")]).unwrap();
        let printed = effective.to_toml().unwrap();
        assert!(!printed.contains("hidden-secret") && printed.contains("<hidden>"));
        assert!(Figment::from(Toml::string(&printed)).extract::<Config>().is_ok());
    }
}
