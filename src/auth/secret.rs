//! A secret of the settings: shown to nobody, compared in constant time.

use std::fmt;

/// A secret of the settings; its `Debug` hides it.
#[derive(Clone, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Whether it was not set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `text` is the secret, asked in constant time; an unset secret is nothing.
    #[must_use]
    pub fn is(&self, text: &str) -> bool {
        let (given, wanted) = (text.as_bytes(), self.0.as_bytes());
        let differ = given.iter().zip(wanted).fold(0, |differ, (a, b)| differ | (a ^ b));
        !wanted.is_empty() && given.len() == wanted.len() && differ == 0
    }

    /// The secret itself, for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<hidden>")
    }
}
