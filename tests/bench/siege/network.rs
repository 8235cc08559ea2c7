//! Connections as over Ethernet. On loopback a segment has 64 KiB, and the system takes whole
//! megabytes for whoever does not read; from far away it takes little.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::support;

/// Bytes of a segment.
const SEGMENT: u32 = 1460;

/// Connects from this address. The system takes `receive_buffer` bytes for the client, or as many as
/// it likes.
pub(crate) async fn connect(
    from: Ipv4Addr,
    to: SocketAddr,
    receive_buffer: Option<u32>,
) -> io::Result<TcpStream> {
    let socket = support::socket(from, receive_buffer)?;
    SockRef::from(&socket).set_tcp_mss(SEGMENT)?;
    socket.connect(to).await
}
