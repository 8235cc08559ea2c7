//! Secrets of the settings: never printed, compared in constant time.

use std::fmt;

use subtle::ConstantTimeEq;

/// A secret of the settings. Its `Debug` is `<hidden>`.
#[derive(Clone, Default, serde::Deserialize)]
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
        is_same(text.bytes(), self.0.as_bytes())
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

/// Compares every byte of `given`, however early the first difference is; `wanted` is repeated, so
/// that the time tells nothing about its length. Nothing is equal to an empty `wanted`.
fn is_same(given: impl ExactSizeIterator<Item = u8>, wanted: &[u8]) -> bool {
    if wanted.is_empty() {
        return false;
    }
    let length = given.len().ct_eq(&wanted.len());
    let bytes = given.zip(wanted.iter().cycle());
    bytes.fold(length, |same, (a, b)| same & a.ct_eq(b)).into()
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

    /// A comparison that stops at the first difference, or at a wrong length, reads less.
    #[test]
    fn a_text_is_read_to_its_end_wherever_it_differs() {
        let secret = "abcdefgh";
        for text in
            ["abcdefgh", "xbcdefgh", "abcdefgx", "abcdexgh", "a", "x", "abcdefghi", "xxxxxxxxxxxx"]
        {
            let mut read = 0;
            let bytes = text.bytes().inspect(|_| read += 1);
            assert_eq!(is_same(bytes, secret.as_bytes()), text == secret, "{text}");
            assert_eq!(read, text.len(), "{text}");
        }
    }

    #[test]
    fn its_debug_says_nothing() {
        assert_eq!(format!("{:?}", Secret::from("abc")), "<hidden>");
    }
}
