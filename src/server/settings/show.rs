//! Prints the effective settings.
//!
//! Invariant: secrets are hidden, and so are the passwords of URLs.

use figment::value::Dict;

use super::ConfigError;

/// The effective settings, for printing: secrets are hidden.
#[derive(Debug)]
pub struct Effective(pub(super) Dict);

/// Stands for what is not shown.
const HIDDEN: &str = "<hidden>";

/// The URL with `<hidden>` for its password, wherever that stands.
pub(super) fn hide_password(url: &str) -> String {
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
pub(super) const SECRETS: [&str; 8] = [
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
