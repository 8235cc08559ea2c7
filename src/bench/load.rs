//! The load of one run: what all its sockets and publishers share.

use std::{net::SocketAddr, time::Duration};

use hyper::Uri;
use tokio::net::lookup_host;

use super::{arguments::BenchArgs, error::BenchError, tally::Tally};
use crate::{secret::Secret, wire_client::message::Vsn};

/// The run's load.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) target: Target,
    pub(super) vsn: Vsn,
    pub(super) viewer_key: Secret,
    pub(super) publisher_key: Secret,
    /// Topics with their prefix, as on the wire.
    pub(super) topics: Vec<String>,
    /// Channels of each viewer.
    pub(super) channels: usize,
    pub(super) ticks: u64,
    /// Time between two ticks.
    pub(super) period: Duration,
    /// Messages to each tick.
    pub(super) burst: u64,
    pub(super) payload_bytes: usize,
    pub(super) deadline: Duration,
    pub(super) tally: Tally,
}

/// Where the sockets connect.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    /// The `Host` header.
    pub(super) host: String,
    /// Path and query with the viewers' key.
    pub(super) viewer_path: String,
    /// Path and query with the publishers' key.
    pub(super) publisher_path: String,
}

impl Load {
    /// Creates the load that the arguments describe, with an empty tally whose time begins.
    pub(super) fn new(args: &BenchArgs, target: Target) -> Self {
        let publisher_key = args.publisher_apikey.as_ref().unwrap_or(&args.apikey);
        Self {
            target,
            vsn: args.vsn,
            viewer_key: args.apikey.clone(),
            publisher_key: publisher_key.clone(),
            topics: (0..args.topics).map(|index| args.topic_name(index)).collect(),
            channels: args.channels,
            ticks: u64::from(args.rate) * u64::from(args.seconds),
            period: Duration::from_secs(1) / args.rate,
            burst: args.burst,
            payload_bytes: args.payload_bytes,
            deadline: Duration::from_secs(args.deadline),
            tally: Tally::new(args.topics),
        }
    }
}

impl Target {
    /// Parses `--url` and resolves its host.
    ///
    /// # Errors
    /// [`BenchError::Arguments`] for a URL of another form, [`BenchError::Resolve`] for a host
    /// without an address.
    pub(super) async fn resolve(args: &BenchArgs) -> Result<Self, BenchError> {
        let bad_url = "--url must be like ws://127.0.0.1:4000/realtime/v1, without TLS";
        let bad_url = || BenchError::Arguments(bad_url);
        let url: Uri = args.url.parse().map_err(|_not_a_url| bad_url())?;
        let (Some("ws" | "http"), Some(authority)) = (url.scheme_str(), url.authority()) else {
            return Err(bad_url());
        };
        let host = authority.to_string();
        let path = url.path().trim_end_matches('/').trim_end_matches("/websocket");
        let path_with = |key: &Secret| {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.append_pair("apikey", key.expose()).append_pair("vsn", args.vsn.as_str());
            format!("{path}/websocket?{}", query.finish())
        };
        let publisher_key = args.publisher_apikey.as_ref().unwrap_or(&args.apikey);
        let (viewer_path, publisher_path) = (path_with(&args.apikey), path_with(publisher_key));

        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        let addresses = lookup_host((name, authority.port_u16().unwrap_or(80))).await;
        let address = match addresses {
            // A server that listens on all addresses of one family may not listen on the other's.
            Ok(addresses) => addresses.min_by_key(SocketAddr::is_ipv6),
            Err(error) => return Err(BenchError::Resolve { host, source: Some(error) }),
        };
        let Some(address) = address else {
            return Err(BenchError::Resolve { host, source: None });
        };
        Ok(Self { address, host, viewer_path, publisher_path })
    }
}
