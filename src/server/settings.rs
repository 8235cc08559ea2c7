//! Settings: the built-in file, then the operator's file, then the environment over both.
//!
//! Invariants: all mistakes are reported together; what exists as a [`Config`] is right; nothing
//! reads it from the environment but `main`, which hands the variables over.

mod load;
mod show;

use std::{net::SocketAddr, time::Duration};

use serde::Deserialize;

pub use self::show::Effective;
use crate::{
    access::{self, Rule, Topics},
    admin,
    auth::{self, TrustSettings, jwks},
    clock::duration,
    db,
    limits::{self, NetworkSettings},
    policies,
    protocol::payload::OPAQUE_KEY_PREFIX,
    relay,
    secret::Secret,
    socket, upkeep,
};

/// Every setting, with its default in `src/server/defaults.toml`.
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
    pub protocol: socket::Settings,
    /// What is asked of tokens.
    pub auth: auth::Settings,
    /// Public keys that tokens are signed with.
    pub jwks: jwks::Settings,
    /// The database's decisions about private channels.
    pub policies: policies::Settings,
    /// Who is in front.
    pub network: NetworkSettings,
    /// What bounds clients.
    pub limits: limits::Settings,
    /// The database link.
    pub relay: relay::Settings,
    /// What the database remembers.
    pub history: upkeep::Settings,
    /// What is measured, and how often.
    pub metrics: admin::Settings,
    /// The orderly end.
    pub drain: Drain,
    /// Topics that no rule matches.
    pub topics: Topics,
    /// The topic rules, in the order in which they are tried.
    pub topic: Vec<Rule>,
}

/// Everything that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);

/// `[drain]`: the orderly end.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Within so long all sockets are closed, in jittered batches.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
}

impl Config {
    /// Returns the built-in settings alone.
    ///
    /// # Panics
    /// Never: a test reads them.
    #[must_use]
    pub fn defaults() -> Self {
        #[expect(clippy::expect_used, reason = "the built-in settings are tested to be right")]
        Self::load(None, Vec::new()).expect("the built-in settings are right").0
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

    /// All settings that decide which tokens are accepted.
    #[must_use]
    pub fn trust(&self) -> TrustSettings {
        TrustSettings {
            jwt_secret: self.jwt_secret.clone(),
            jwt_secret_previous: self.jwt_secret_previous.clone(),
            publishable_key: self.publishable_key.clone(),
            secret_key: self.secret_key.clone(),
            auth: self.auth.clone(),
            jwks: self.jwks.clone(),
            token_bytes_max: self.limits.token_bytes_max,
        }
    }

    /// The URL for migrations.
    #[must_use]
    pub fn migrate_url(&self) -> &Secret {
        first_set([&self.migrate_database_url, &self.database_url])
    }

    /// Returns what is wrong although every value can be read, one text for each mistake.
    fn validate(&self) -> Vec<String> {
        let mut mistakes = self.protocol.validate();
        mistakes.extend(self.policies.validate());
        mistakes.extend(self.relay.validate());
        mistakes.extend(self.metrics.validate());
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
        mistakes.extend(self.auth.validate());
        mistakes.extend(self.jwks.validate());
        mistakes.extend(self.limits.validate());
        for (name, key) in
            [("publishable_key", &self.publishable_key), ("secret_key", &self.secret_key)]
        {
            if !key.is_empty() && !key.expose().starts_with(OPAQUE_KEY_PREFIX) {
                mistakes.push(format!("{name}: expected a key that begins with sb_"));
            }
        }
        mistakes.extend(access::validate_rules(&self.topic));
        mistakes
    }
}

fn first_set(urls: [&Secret; 2]) -> &Secret {
    let [first, second] = urls;
    if first.is_empty() { second } else { first }
}

#[cfg(test)]
mod tests;
