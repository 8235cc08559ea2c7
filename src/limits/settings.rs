//! `[network]` and `[limits]`: who stands in front of the gateway, and how much of everything a
//! client may use.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};

use super::{memory, origins::Origin};
use crate::clock::duration;

/// The memory of a machine that does not tell.
const MEMORY_BYTES_ASSUMED: usize = 2 << 30;

/// Who is in front.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSettings {
    /// Web pages that may connect: `https://app.example.com`, `https://*.example.com` (not the bare
    /// domain), `null`; an empty list lets any.
    pub origins: Vec<Origin>,
    /// Networks, or single addresses, whose `X-Forwarded-For` is believed: `10.0.0.0/8`, `::1`.
    #[serde(deserialize_with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
}

/// What bounds clients.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Most sockets; at the limit an upgrade is refused with 429, at once.
    pub connections_max: usize,
    /// Most sockets of one address (IPv6: /64); at the limit an upgrade is refused with 429.
    pub connections_per_address_max: usize,
    /// Most upgrades of one address per second, ten times as many at once; beyond, 429. 0: any.
    pub handshakes_per_address_max: u32,
    /// Most tokens of one address per second that turn out wrong, ten times as many at once;
    /// beyond, one that is neither known to be right nor a JWT is refused with 429 unread. 0: any.
    pub failures_per_address_max: u32,
    /// Most addresses without a socket that are remembered; beyond, those that were seen longest
    /// ago are forgotten.
    pub addresses_max: usize,
    /// Most joins per second of topics without a rule, 60 s' worth at once; beyond, an error
    /// reply. 0: any.
    pub joins_per_second_max: u32,
    /// Most broadcasts of clients per second, 60 s' worth at once; beyond, REST gets 429 and what
    /// sockets send is dropped. 0: any.
    pub broadcasts_per_second_max: u32,
    /// Most bytes of their payloads per second, 10 s' worth at once, `payload_bytes_max` at least;
    /// beyond, the same. 0: any.
    pub broadcast_bytes_per_second_max: u32,
    /// Most broadcasts per second by which servers (`service_role`) may write to the topics of
    /// rules, beside all other broadcasts, 60 s' worth at once; beyond, the same. 0: any.
    pub server_broadcasts_per_second_max: u32,
    /// How much of each of the three rates above that all clients share one client may take, in
    /// percent; a channel that takes more alone ends if its topic has no rule. A client is the
    /// person of a token, else an address.
    pub client_share_percent: u32,
    /// Most clients whose shares are remembered; beyond, newcomers have one share together.
    pub shares_max: usize,
    /// Most requests of one address to broadcast by REST per second, ten times as many at once;
    /// beyond, 429, unread. 0: any.
    pub requests_per_address_max: u32,
    /// Most messages of one REST batch; beyond, 429.
    pub batch_messages_max: usize,
    /// Most joins of one socket per second, ten times as many at once, `channels_per_socket_max` at
    /// least; beyond, the socket is read more slowly. 0: any.
    pub socket_joins_per_second_max: u32,
    /// Most frames of one socket per second, pings and fragments among them, ten times as many at
    /// once; beyond, the socket is read more slowly. 0: any.
    pub socket_messages_per_second_max: u32,
    /// Most bytes of one socket per second, whatever the frames, and one largest message and 64 KiB
    /// at once; beyond, the socket is read more slowly. 0: any.
    pub socket_bytes_per_second_max: u32,
    /// Most channels of one socket; at the limit a join is refused.
    pub channels_per_socket_max: usize,
    /// Largest message in; a larger one closes the socket with 1009.
    pub message_bytes_max: usize,
    /// Largest broadcast payload; a larger one is dropped, with an error reply if acked.
    pub payload_bytes_max: usize,
    /// Most bytes that may wait for one client; beyond, it is closed as a slow consumer.
    pub outbox_bytes_max: usize,
    /// Most bytes that may wait for all clients together; beyond, those for whom most waits are
    /// conflated, lose ordinary channels, and at last are closed. 0: a quarter of the memory.
    pub outboxes_bytes_max: usize,
    /// Longest token; a longer one is not a JWT.
    pub token_bytes_max: usize,
    /// From accept to the end of the request's head.
    #[serde(deserialize_with = "duration")]
    pub handshake_timeout: Duration,
    /// For the body of a request; then 408.
    #[serde(deserialize_with = "duration")]
    pub body_timeout: Duration,
    /// From a message's first byte to its last, but for the time in which it is read more slowly;
    /// then the socket is closed with 1008.
    #[serde(deserialize_with = "duration")]
    pub message_timeout: Duration,
    /// Without a data frame for so long, a socket is closed with 1000.
    #[serde(deserialize_with = "duration")]
    pub silence_timeout: Duration,
    /// A socket whose channels have all gone is closed after so long.
    #[serde(deserialize_with = "duration")]
    pub no_channel_timeout: Duration,
    /// A client that takes nothing of what is written to it for so long, or not the whole of an HTTP
    /// answer, is given up.
    #[serde(deserialize_with = "duration")]
    pub write_timeout: Duration,
    /// The same where nothing waits but what one invalidation can take the place of.
    #[serde(deserialize_with = "duration")]
    pub merged_write_timeout: Duration,
}

impl Settings {
    /// Most bytes that may wait for all clients together.
    pub(crate) fn outboxes_bytes(&self) -> usize {
        match self.outboxes_bytes_max {
            0 => memory::bytes().unwrap_or(MEMORY_BYTES_ASSUMED) / 4,
            bytes => bytes,
        }
    }

    /// Returns what is wrong with the section, one text for each mistake.
    pub(crate) fn validate(&self) -> Vec<String> {
        let counts = [
            ("connections_max", self.connections_max),
            ("connections_per_address_max", self.connections_per_address_max),
            ("addresses_max", self.addresses_max),
            ("shares_max", self.shares_max),
            ("batch_messages_max", self.batch_messages_max),
            ("channels_per_socket_max", self.channels_per_socket_max),
            ("message_bytes_max", self.message_bytes_max),
            ("outbox_bytes_max", self.outbox_bytes_max),
        ];
        let durations = [
            ("handshake_timeout", self.handshake_timeout),
            ("body_timeout", self.body_timeout),
            ("message_timeout", self.message_timeout),
            ("silence_timeout", self.silence_timeout),
            ("write_timeout", self.write_timeout),
            ("merged_write_timeout", self.merged_write_timeout),
        ];
        let counts = counts.iter().filter(|(_, count)| *count == 0);
        let is_percent = (1..=100).contains(&self.client_share_percent);
        let percent = "limits.client_share_percent: must be from 1 to 100";
        let durations = durations.iter().filter(|(_, duration)| duration.is_zero());
        counts
            .map(|(name, _)| format!("limits.{name}: must be at least 1"))
            .chain(durations.map(|(name, _)| format!("limits.{name}: must be longer than 0s")))
            .chain((!is_percent).then(|| percent.to_owned()))
            .collect()
    }
}

/// Reads networks; an address alone is a network of one.
fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let network = |text: String| {
        let one = || text.parse::<IpAddr>().ok().map(IpNet::from);
        text.parse()
            .ok()
            .or_else(one)
            .ok_or_else(|| de::Error::custom("expected networks such as 10.0.0.0/8"))
    };
    Vec::<String>::deserialize(deserializer)?.into_iter().map(network).collect()
}
