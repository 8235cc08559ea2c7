//! Which address a client is counted by, and which proxies may name it.
//!
//! Invariant: `X-Forwarded-For` is read only as far as trusted proxies have written it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use hyper::HeaderMap;
use ipnet::IpNet;

/// What a client is counted by: its IPv4 address, or the /64 network of its IPv6 address, which is
/// what a subscriber gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address(IpAddr);

impl Address {
    /// The address, or the first one of the network.
    pub(crate) fn ip(self) -> IpAddr {
        self.0
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        })
    }
}

/// The client behind `peer`: itself, or, as long as that is a trusted proxy, whom it names as the
/// last entry of `X-Forwarded-For` that has not been read. An entry that is no address ends the
/// walk at the proxy that wrote it.
pub(crate) fn client_ip(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let mut client = peer.to_canonical();
    // Several headers are one list. What is not text is an entry that is no address.
    let values = headers.get_all("x-forwarded-for").iter().rev();
    for entry in values.flat_map(|value| value.to_str().unwrap_or_default().rsplit(',')) {
        if !is_trusted(client, trusted) {
            break;
        }
        let Some(named) = forwarded(entry.trim()) else { break };
        client = named;
    }
    client
}

/// Whether a proxy of these networks speaks from there.
pub(crate) fn is_trusted(address: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&address))
}

/// `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn forwarded(entry: &str) -> Option<IpAddr> {
    let with_port = || entry.parse::<SocketAddr>().ok().map(|address| address.ip());
    let in_brackets = || entry.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let ip = entry.parse().ok().or_else(with_port).or_else(in_brackets)?;
    Some(ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    /// The client of a peer with these headers, `10.0.0.0/8` and `2001:db8:1::/48` being trusted.
    fn client(peer: &str, forwarded: &[&str]) -> String {
        let trusted =
            ["10.0.0.0/8", "2001:db8:1::/48"].map(|network| network.parse::<IpNet>().unwrap());
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append("x-forwarded-for", value.parse().unwrap());
        }
        client_ip(peer.parse().unwrap(), &headers, &trusted).to_string()
    }

    #[test]
    fn only_a_trusted_proxy_is_believed_whom_it_speaks_for() {
        for (peer, forwarded, expected) in [
            ("203.0.113.9", &["198.51.100.1"][..], "203.0.113.9"),
            ("203.0.113.9", &[], "203.0.113.9"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            // As a dual-stack listener sees an IPv4 proxy.
            ("::ffff:10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            ("2001:db8:1::5", &["198.51.100.1"], "198.51.100.1"),
            ("2001:db8:2::5", &["198.51.100.1"], "2001:db8:2::5"),
        ] {
            assert_eq!(client(peer, forwarded), expected, "{peer} {forwarded:?}");
        }
    }

    #[test]
    fn what_a_client_claims_itself_stands_left_of_what_the_proxy_saw() {
        for (forwarded, expected) in [
            (&["192.0.2.66, 198.51.100.1"][..], "198.51.100.1"),
            // It names one of our proxies to have its own claim read.
            (&["192.0.2.66, 10.0.0.9, 198.51.100.1"], "198.51.100.1"),
            (&["192.0.2.66", "198.51.100.1"], "198.51.100.1"),
            (&["192.0.2.66", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
            (&["198.51.100.1", "10.0.0.3,10.0.0.2"], "198.51.100.1"),
            (&["::ffff:198.51.100.1"], "198.51.100.1"),
            (&["198.51.100.1 , \t10.0.0.2"], "198.51.100.1"),
            // Nobody but proxies: the first of them.
            (&["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ] {
            assert_eq!(client("10.0.0.1", forwarded), expected, "{forwarded:?}");
        }
    }

    #[test]
    fn an_entry_that_is_no_address_ends_the_walk_at_who_wrote_it() {
        for bad in ["", "unknown", "198.51.100", "198.51.100.1/32", "_hidden", "1.2.3.4, "] {
            assert_eq!(client("10.0.0.1", &[bad]), "10.0.0.1", "{bad:?}");
            let after_a_hop = format!("192.0.2.66, {bad}, 10.0.0.2");
            assert_eq!(client("10.0.0.1", &[&after_a_hop]), "10.0.0.2", "{bad:?}");
        }
        assert_eq!(client("10.0.0.1", &["192.0.2.66", "\u{fc}"]), "10.0.0.1", "no text");
    }

    #[test]
    fn a_port_beside_the_address_is_read_past() {
        for (entry, expected) in [
            ("198.51.100.1:4711", "198.51.100.1"),
            ("[2001:db8:2::1]:4711", "2001:db8:2::1"),
            ("[2001:db8:2::1]", "2001:db8:2::1"),
            ("2001:db8:2::1", "2001:db8:2::1"),
        ] {
            assert_eq!(client("10.0.0.1", &[entry]), expected, "{entry}");
        }
    }

    #[test]
    fn ipv6_is_counted_by_its_64_and_mapped_ipv4_as_ipv4() {
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:0:0:2"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:192.0.2.1"), address("192.0.2.1"));
        assert_ne!(address("192.0.2.1"), address("192.0.2.2"));
    }
}
