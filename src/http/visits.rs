//! The addresses from which `tidegate doctor` has come, so that an operator learns whether clients'
//! addresses arrive through the proxies in front.
//!
//! Invariants: only a socket whose token holds leaves a visit, only under a name of its own making,
//! and only the last few are kept; nobody but an operator reads them.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
};

use hyper::HeaderMap;
use ipnet::IpNet;
use parking_lot::Mutex;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{limits::is_trusted, telemetry::audit::Caller};

/// Most visits that are remembered.
const VISITS_MAX: usize = 16;
/// The beginning of a visit's `User-Agent`.
const PREFIX: &str = "tidegate-doctor/";

/// Returns the `User-Agent` of a visit.
pub(crate) fn user_agent(nonce: Uuid) -> String {
    format!("{PREFIX}{nonce}")
}

/// One visit.
#[derive(Debug, Clone, Copy)]
struct Visit {
    nonce: Uuid,
    /// The address that the client is counted by.
    address: IpAddr,
    /// The connection's own address.
    peer: SocketAddr,
    /// What became of `X-Forwarded-For`: `believed`, `ignored` or `none`.
    forwarded: &'static str,
}

/// The last visits.
#[derive(Debug, Default)]
pub(crate) struct Visits(Mutex<VecDeque<Visit>>);

impl Visits {
    /// Records a socket, if its `User-Agent` is that of a visit.
    pub(crate) fn note(
        &self,
        user_agent: &str,
        headers: &HeaderMap,
        caller: Caller,
        peer: SocketAddr,
        trusted: &[IpNet],
    ) {
        let nonce = user_agent.strip_prefix(PREFIX).and_then(|nonce| Uuid::try_parse(nonce).ok());
        let Some(nonce) = nonce else { return };
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let is_trusted = is_trusted(peer.ip(), trusted);
        let forwarded = match (headers.contains_key("x-forwarded-for"), is_trusted) {
            (true, true) => "believed",
            (true, false) => "ignored",
            (false, _) => "none",
        };
        let mut visits = self.0.lock();
        if visits.len() == VISITS_MAX {
            visits.pop_front();
        }
        visits.push_back(Visit { nonce, address: caller.address(), peer, forwarded });
    }

    /// Returns `{"address":"203.0.113.7","peer":"10.0.0.5:41234","forwarded":"believed"}`; `None`
    /// for a visit that was not made here, or too long ago.
    pub(crate) fn show(&self, nonce: &str) -> Option<Value> {
        let nonce = Uuid::try_parse(nonce).ok();
        let visits = self.0.lock();
        let visit = visits.iter().find(|visit| Some(visit.nonce) == nonce)?;
        let Visit { address, peer, forwarded, .. } = visit;
        Some(json!({ "address": address, "peer": peer, "forwarded": forwarded }))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_last_visits_are_kept_and_no_other_sockets() {
        let visits = Visits::default();
        let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        let note = |name: &str| {
            visits.note(name, &HeaderMap::new(), Caller::at(peer.ip()), peer, &[]);
        };
        let nonces: Vec<_> = (0..=VISITS_MAX).map(|_| Uuid::new_v4()).collect();
        for nonce in &nonces {
            note(&user_agent(*nonce));
            note("Mozilla/5.0");
            note("tidegate-doctor/x");
        }
        assert_eq!(visits.0.lock().len(), VISITS_MAX);
        let is_kept = |nonce: &Uuid| visits.show(&nonce.to_string()).is_some();
        assert!(!is_kept(&nonces[0]) && nonces[1..].iter().all(is_kept));
    }
}
