//! Which web pages may connect: a browser sends its page's origin, and lets no script change it.
//!
//! Invariants: an origin that cannot be read is none that may; what is compared has been read by
//! the same rules on both sides; of a foreign origin nothing is logged but its host.

use std::{
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
};

use hyper::{
    HeaderMap,
    header::{self, HeaderValue},
};
use serde::{Deserialize, Deserializer, de};

/// Longest host that is logged.
const LOGGED_CHARS_MAX: usize = 100;

/// An origin, or a pattern of them: `https://app.example.com`, `https://*.example.com`, `null`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(Kind);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// Of a page that has none, such as a file or a sandboxed frame.
    Null,
    One(Place),
    /// Whatever stands below a host, and not that itself.
    Below(Place),
}

/// Where a page comes from, in small letters, its port spelled out.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    scheme: Box<str>,
    host: Box<str>,
    port: Option<u16>,
}

impl Origin {
    fn allows(&self, origin: &Self) -> bool {
        match (&self.0, &origin.0) {
            (Kind::Null, Kind::Null) => true,
            (Kind::One(wanted), Kind::One(given)) => wanted == given,
            (Kind::Below(wanted), Kind::One(given)) => {
                let labels = given.host.strip_suffix(&*wanted.host);
                let is_below = labels.and_then(|labels| labels.strip_suffix('.'));
                is_below.is_some_and(|labels| !labels.is_empty())
                    && (&wanted.scheme, wanted.port) == (&given.scheme, given.port)
            }
            (Kind::Null | Kind::One(_) | Kind::Below(_), _) => false,
        }
    }
}

/// An origin that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected an origin: https://app.example.com, https://*.example.com, or null")]
pub struct NoOrigin;

impl FromStr for Origin {
    type Err = NoOrigin;

    fn from_str(text: &str) -> Result<Self, NoOrigin> {
        if text == "null" {
            return Ok(Self(Kind::Null));
        }
        let text = text.to_ascii_lowercase();
        let (scheme, rest) = text.split_once("://").ok_or(NoOrigin)?;
        let is_below = rest.starts_with("*.");
        let rest = rest.strip_prefix("*.").unwrap_or(rest);
        let (host, port) = match rest.rsplit_once(':') {
            // The colons of an IPv6 address are in brackets.
            Some((host, port)) if !port.ends_with(']') => {
                let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
                let port = port.parse::<u16>().ok().filter(|_| is_number).ok_or(NoOrigin)?;
                (host, Some(port))
            }
            Some(_) | None => (rest, None),
        };
        if !is_scheme(scheme) || !is_host(host) || (is_below && host.starts_with('[')) {
            return Err(NoOrigin);
        }
        let port = port.or(match scheme {
            "https" => Some(443),
            "http" => Some(80),
            _ => None,
        });
        let place = Place { scheme: scheme.into(), host: host.into(), port };
        Ok(Self(if is_below { Kind::Below(place) } else { Kind::One(place) }))
    }
}

impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

fn is_scheme(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    text.starts_with(|first: char| first.is_ascii_alphabetic()) && text.bytes().all(is_part)
}

/// Labels of letters, digits and dashes, or an IPv6 address in brackets.
fn is_host(text: &str) -> bool {
    if let Some(ip) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return ip.parse::<std::net::Ipv6Addr>().is_ok();
    }
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    text.split('.').all(|label| !label.is_empty() && label.bytes().all(is_part))
}

/// The list of the settings.
#[derive(Debug)]
pub(crate) struct Origins {
    list: Vec<Origin>,
    /// Whether it was said that there is no list though browsers come.
    is_said: AtomicBool,
}

impl Origins {
    /// With an empty list, any may.
    pub(crate) fn new(list: Vec<Origin>) -> Self {
        Self { list, is_said: AtomicBool::new(false) }
    }

    /// Returns whether a page with these headers may connect. A request without an origin comes from
    /// no page.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(header::ORIGIN).iter();
        let Some(first) = values.next() else { return true };
        let origin = first.to_str().ok().and_then(|text| text.parse::<Origin>().ok());
        if self.list.is_empty() {
            self.say_once(origin.as_ref());
            return true;
        }
        // Two origins are none.
        let origin = origin.filter(|_| values.next().is_none());
        origin.is_some_and(|origin| self.list.iter().any(|entry| entry.allows(&origin)))
    }

    /// What a browser is told that may read an answer; nothing for others.
    pub(crate) fn allowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        if self.list.is_empty() {
            return Some(HeaderValue::from_static("*"));
        }
        headers.get(header::ORIGIN).filter(|_| self.allow(headers)).cloned()
    }

    /// Whether answers differ by origin.
    pub(crate) fn is_listed(&self) -> bool {
        !self.list.is_empty()
    }

    fn say_once(&self, origin: Option<&Origin>) {
        if self.is_said.swap(true, Ordering::Relaxed) {
            return;
        }
        let host = match origin.map(|origin| &origin.0) {
            Some(Kind::One(place) | Kind::Below(place)) => &*place.host,
            Some(Kind::Null) | None => "null",
        };
        let host: String = host.chars().take(LOGGED_CHARS_MAX).collect();
        tracing::warn!(host, "pages of any origin may connect; set network.origins to yours");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(list: &[&str]) -> Origins {
        Origins::new(list.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn headers(origins: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for origin in origins {
            headers.append(header::ORIGIN, origin.parse().unwrap());
        }
        headers
    }

    fn allow(list: &[&str], origin: &str) -> bool {
        origins(list).allow(&headers(&[origin]))
    }

    #[test]
    fn an_exact_origin_allows_itself_alone() {
        let list = &["https://app.example.com"];
        for same in
            ["https://app.example.com", "https://APP.example.com", "https://app.example.com:443"]
        {
            assert!(allow(list, same), "{same}");
        }
        for other in [
            "http://app.example.com",
            "https://app.example.com:8443",
            "https://example.com",
            "https://x.app.example.com",
            "https://app.example.com.evil.test",
            "https://app.example.com@evil.test",
            "https://evil.test/https://app.example.com",
            "https://app.example.com/",
            "app.example.com",
            "https://",
            "null",
            "",
        ] {
            assert!(!allow(list, other), "{other}");
        }
        assert!(allow(&["http://localhost:3000"], "http://localhost:3000"));
        assert!(!allow(&["http://localhost:3000"], "http://localhost"));
        assert!(allow(&["http://[::1]:3000"], "http://[::1]:3000"));
        assert!(allow(&["capacitor://localhost"], "capacitor://localhost"));
    }

    #[test]
    fn a_wildcard_allows_every_name_below_and_not_the_host_itself() {
        let list = &["https://*.example.com"];
        for below in ["https://a.example.com", "https://a.b.example.com", "https://A.EXAMPLE.com"] {
            assert!(allow(list, below), "{below}");
        }
        for other in [
            "https://example.com",
            "https://.example.com",
            "https://evilexample.com",
            "https://a.example.com.evil.test",
            "https://evil.test#.example.com",
            "https://evil.test?.example.com",
            "https://evil.test/.example.com",
            "https://evil.test\\.example.com",
            "https://*.example.com",
            "http://a.example.com",
            "https://a.example.com:8443",
            "null",
        ] {
            assert!(!allow(list, other), "{other}");
        }
        assert!(allow(&["http://*.test:3000"], "http://a.test:3000"));
    }

    #[test]
    fn null_is_an_origin_that_must_be_listed() {
        assert!(allow(&["null"], "null"));
        assert!(!allow(&["null"], "https://app.example.com"));
        assert!(!allow(&["https://*.example.com", "https://null"], "null"));
    }

    #[test]
    fn who_sends_no_origin_is_no_page_and_who_sends_two_is_refused() {
        let list = origins(&["https://app.example.com"]);
        assert!(list.allow(&HeaderMap::new()));
        assert!(!list.allow(&headers(&["https://app.example.com", "https://app.example.com"])));
        let mut no_text = HeaderMap::new();
        no_text.insert(header::ORIGIN, HeaderValue::from_bytes(b"https://\xff").unwrap());
        assert!(!list.allow(&no_text));
    }

    #[test]
    fn without_a_list_any_page_may_and_it_is_said_once() {
        let any = origins(&[]);
        assert!(any.allow(&HeaderMap::new()) && !any.is_said.load(Ordering::Relaxed));
        assert!(any.allow(&headers(&["https://evil.test"])) && any.is_said.load(Ordering::Relaxed));
        assert!(any.allow(&headers(&["no origin"])));
    }

    #[test]
    fn a_pattern_that_is_no_origin_is_refused() {
        for bad in [
            "",
            "*",
            "app.example.com",
            "https://app.example.com/",
            "https://app.example.com/path",
            "https://user@app.example.com",
            "https://*",
            "https://*.",
            "https://a.*.example.com",
            "https://*example.com",
            "https://*.*.example.com",
            "https://app..example.com",
            "https://app.example.com:",
            "https://app.example.com:+1",
            "https://app.example.com:70000",
            "https://*.[::1]",
            "://app.example.com",
            "Null",
        ] {
            assert_eq!(bad.parse::<Origin>(), Err(NoOrigin), "{bad}");
        }
    }
}
