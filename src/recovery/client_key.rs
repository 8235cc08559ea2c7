//! What a client that comes back is known by: its address and its `User-Agent`, which many clients
//! may share.

use uuid::Uuid;

use crate::limits::Address;

/// Stands for a client's address and `User-Agent`, and for its address alone. Whoever guesses them
/// can verify the guess by it; nobody else learns anything from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientKey {
    record: Uuid,
    address: Uuid,
}

impl ClientKey {
    /// Returns the same key for all clients that share both.
    #[must_use]
    pub fn new(address: Address, user_agent: &str) -> Self {
        let key = |text: String| Uuid::new_v5(&Uuid::NAMESPACE_URL, text.as_bytes());
        Self {
            record: key(format!("{} {user_agent}", address.ip())),
            address: key(address.ip().to_string()),
        }
    }

    /// Returns what the client's record is found by, in other gateways too.
    pub(super) fn record(self) -> Uuid {
        self.record
    }

    /// Returns what stands for all clients of the address.
    pub(super) fn address(self) -> Uuid {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn an_address_is_the_same_in_both_families_and_an_agent_tells_apart() {
        let [plain, mapped] = ["10.0.0.1", "::ffff:10.0.0.1"]
            .map(|text| Address::from(text.parse::<IpAddr>().unwrap()));
        let client = ClientKey::new(plain, "browser");
        assert_eq!(ClientKey::new(mapped, "browser"), client);
        let other = ClientKey::new(mapped, "other");
        assert_eq!(other.address(), client.address());
        assert_ne!(other.record(), client.record());
    }
}
