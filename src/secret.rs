//! Secrets of the settings: never printed, compared in constant time.

use std::fmt;

use subtle::ConstantTimeEq;

/// A secret of the settings. Its `Debug` is `<hidden>`.
#[derive(Clone, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Returns whether the secret is not set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether `text` is the secret; false for a secret that is not set. The time depends on
    /// the length of `text` alone.
    #[must_use]
    pub fn is(&self, text: &str) -> bool {
        let (given, wanted) = (text.as_bytes(), self.0.as_bytes());
        if wanted.is_empty() {
            return false;
        }
        // The secret is repeated, so that the time tells nothing about its length.
        let repeated = wanted.iter().cycle();
        let same = given
            .iter()
            .zip(repeated)
            .fold(given.len().ct_eq(&wanted.len()), |same, (a, b)| same & a.ct_eq(b));
        same.into()
    }

    /// The secret itself.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_secret_itself_is_it() {
        let secret = Secret::from("abc");
        assert!(secret.is("abc"));
        for text in ["", "a", "ab", "abd", "Abc", "abcabc", "abcd", "xabc"] {
            assert!(!secret.is(text), "{text}");
        }
        assert!(!Secret::default().is("") && !Secret::default().is("a"));
    }

    #[test]
    fn its_debug_says_nothing() {
        assert_eq!(format!("{:?}", Secret::from("abc")), "<hidden>");
    }
}
