//! A client of HTTP that keeps its connection, from an address of its own.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use super::client::DEADLINE;
use super::network::connect;

/// What an answer's body is read into, and dropped.
const SCRATCH_BYTES: usize = 64 * 1024;

/// One connection, or none yet.
pub(crate) struct Http {
    from: Ipv4Addr,
    to: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
    scratch: Vec<u8>,
}

impl Http {
    pub(crate) fn new(from: Ipv4Addr, to: SocketAddr) -> Self {
        Self { from, to, stream: None, scratch: vec![0; SCRATCH_BYTES] }
    }

    /// Posts a body with this header line, and returns the status of the answer. After an error the
    /// next request opens a new connection.
    ///
    /// # Errors
    /// Of the stream, or because no answer comes in time.
    pub(crate) async fn post(&mut self, path: &str, header: &str, body: &[u8]) -> io::Result<u16> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => BufReader::new(connect(self.from, self.to, None).await?),
        };
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\n{header}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        let exchange = async {
            stream.write_all(head.as_bytes()).await?;
            // Refused before it has been read, it is answered all the same.
            let _ = stream.write_all(body).await;
            answer(&mut stream, &mut self.scratch).await
        };
        let answered = timeout(DEADLINE, exchange).await;
        let (status, stays) = answered.map_err(|_elapsed| io::ErrorKind::TimedOut)??;
        if stays {
            self.stream = Some(stream);
        }
        Ok(status)
    }

    /// Publishes messages over the REST route with this key.
    ///
    /// # Errors
    /// As [`Http::post`].
    pub(crate) async fn publish(&mut self, key: &str, messages: &[Value]) -> io::Result<u16> {
        let body = json!({ "messages": messages }).to_string();
        self.post("/api/broadcast", &format!("apikey: {key}"), body.as_bytes()).await
    }
}

/// Reads an answer, and returns its status and whether the connection stays open.
async fn answer(stream: &mut BufReader<TcpStream>, scratch: &mut [u8]) -> io::Result<(u16, bool)> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).await?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut left = length.map_or(0, |length| length.parse::<usize>().unwrap_or(0));
    while left > 0 {
        let part = left.min(scratch.len());
        let read = stream.read(&mut scratch[..part]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= read;
    }
    Ok((status, !head.contains("connection: close")))
}
