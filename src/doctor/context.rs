//! What one examination looks at: the settings, the arguments over them, and the token to join
//! with.

use std::{path::PathBuf, time::Duration};

use percent_encoding::percent_decode_str;

use super::{arguments::DoctorArgs, target::Target};
use crate::{
    admin::client::Client, auth::sign::sign_role, db, secret::Secret, server::settings::Config,
};

/// The event whose invalidation goes the whole way. No real event has its id: theirs are `AB` and a
/// number. Each run has the same, so that no metric gets a label for every run.
pub const CANARY_EID: &str = "tidegate-doctor";

/// How long the token lives that is made where none is given: longer than an examination.
const TOKEN_LIFE: Duration = Duration::from_secs(900);

/// The system under examination.
pub(super) struct Context {
    pub(super) config: Config,
    /// The gateway's operators' port.
    pub(super) admin: Client,
    /// Whether `--url` names the clients' address; else it is that of the settings.
    pub(super) is_public: bool,
    /// Where clients connect; `None` if the settings do not say.
    pub(super) target: Option<Target>,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) token: Option<Secret>,
    /// Whether the token was made for this run.
    pub(super) is_token_made: bool,
    /// How long an idle connection is watched, if it is.
    pub(super) idle: Option<Duration>,
}

impl Context {
    /// Applies the arguments to the settings, and signs a token where none is given.
    ///
    /// # Errors
    /// The sentence that names the argument which cannot be used.
    pub(super) fn new(mut config: Config, args: &DoctorArgs) -> Result<Self, &'static str> {
        if let Some(url) = &args.database_url {
            if db::options(url).is_err() {
                return Err("--database-url: expected postgres://USER:PASSWORD@HOST/DATABASE");
            }
            config.database_url = url.clone();
            config.notify_database_url = Secret::default();
        }
        let target =
            match &args.url {
                Some(url) => Some(Target::parse(url).ok_or(
                    "--url: expected https://HOST, or like ws://127.0.0.1:4000/realtime/v1",
                )?),
                None => Target::of_settings(config.listen),
            };
        let signed = || sign_role(&config.jwt_secret, "anon", "{}", TOKEN_LIFE).ok();
        let key = || Some(&config.publishable_key).filter(|key| !key.is_empty()).cloned();
        let made = if args.token.is_none() { signed() } else { None };
        let is_token_made = made.is_some();
        let token = args.token.clone().or_else(|| made.map(|token| Secret::from(&*token)));
        Ok(Self {
            admin: Client {
                listen: config.admin_listen,
                token: config.admin_token.clone(),
                database_timeout: config.relay.connect_timeout,
            },
            token: token.or_else(key),
            is_token_made,
            is_public: args.url.is_some(),
            ca_file: args.ca_file.clone(),
            idle: args.slow,
            target,
            config,
        })
    }

    /// Returns the texts that no line of the report may show.
    pub(super) fn secrets(&self) -> Vec<String> {
        let config = &self.config;
        let urls =
            [&config.database_url, &config.notify_database_url, &config.migrate_database_url];
        let mut secrets: Vec<String> = [
            &config.admin_token,
            &config.jwt_secret,
            &config.jwt_secret_previous,
            &config.publishable_key,
            &config.secret_key,
        ]
        .into_iter()
        .chain(&self.token)
        .chain(urls)
        .map(|secret| secret.expose().to_owned())
        .collect();
        secrets.extend(urls.into_iter().flat_map(|url| passwords(url.expose())));
        secrets
    }
}

/// Returns the topic that the doctor joins, without its prefix.
pub(super) fn topic() -> String {
    format!("cache_invalidate_{CANARY_EID}")
}

/// Returns the passwords of a URL, as written and decoded.
fn passwords(url: &str) -> impl Iterator<Item = String> {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let user = address.rsplit_once('@').map(|(user, _)| user);
    let of_user = user
        .and_then(|user| user.split_once("://")?.1.split_once(':'))
        .map(|(_, password)| password);
    let of_query = query
        .split('&')
        .filter_map(|pair| pair.split_once('=').filter(|(name, _)| *name == "password"));
    let all: Vec<_> = of_user.into_iter().chain(of_query.map(|(_, value)| value)).collect();
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    all.into_iter()
        .flat_map(move |text| [text.to_owned(), decoded(text)])
        .collect::<Vec<_>>()
        .into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_found_wherever_a_url_has_it() {
        let of = |url| passwords(url).collect::<Vec<_>>();
        assert_eq!(of("postgres://u:p%40ss@h/d"), ["p%40ss", "p@ss"]);
        assert_eq!(of("postgres://h/d?user=u&password=q"), ["q", "q"]);
        assert!(of("postgres://u@h/d?sslmode=require").is_empty());
    }
}
