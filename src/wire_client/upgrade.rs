//! The client's half of a WebSocket handshake: writes the request, reads and checks the answer.
//!
//! Invariant: the head of an answer is bounded in bytes. The caller bounds the time.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};

use super::failure::Failure;

/// Most bytes of the head of a handshake's answer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// A server's answer to an upgrade request, whatever its status.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The head, with the empty line that ends it.
    pub(crate) head: Vec<u8>,
    /// The bytes that were read together with the head.
    pub(crate) rest: Vec<u8>,
    /// The `Sec-WebSocket-Accept` that belongs to the request's key.
    accept: String,
}

/// Requests a WebSocket over `stream` and reads the head of the answer.
///
/// # Errors
/// The [`Failure`] of the stream, or of an answer whose head has no end.
pub(crate) async fn upgrade(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    host: &str,
    path: &str,
    user_agent: &str,
) -> Result<Answer, Failure> {
    let key = generate_key();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nUser-Agent: {user_agent}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.map_err(Failure::lost)?;
    stream.flush().await.map_err(Failure::lost)?;
    let mut head = Vec::with_capacity(512);
    let head_length = loop {
        if let Some(at) = head.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if head.len() > HEAD_BYTES_MAX {
            return Err(Failure::Handshake);
        }
        if stream.read_buf(&mut head).await.map_err(Failure::lost)? == 0 {
            return Err(Failure::Closed);
        }
    };
    let rest = head.split_off(head_length);
    Ok(Answer { head, rest, accept: derive_accept_key(key.as_bytes()) })
}

impl Answer {
    /// Checks that the answer opens a WebSocket: `HTTP/1.1 101 …` and the right
    /// `Sec-WebSocket-Accept`.
    ///
    /// # Errors
    /// [`Failure::Refused`] with another status, [`Failure::Handshake`] for anything else.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        check_answer(&self.head, &self.accept)
    }
}

fn check_answer(head: &[u8], accept: &str) -> Result<(), Failure> {
    let head = str::from_utf8(head).map_err(|_not_text| Failure::Handshake)?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    match status {
        None => return Err(Failure::Handshake),
        Some(101) => {}
        Some(status) => return Err(Failure::Refused(status)),
    }
    let accepted = lines.filter_map(|line| line.split_once(':')).any(|(name, value)| {
        name.eq_ignore_ascii_case("sec-websocket-accept") && value.trim() == accept
    });
    if accepted { Ok(()) } else { Err(Failure::Handshake) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_must_be_101_and_name_the_key() {
        let check = |head: &str| check_answer(head.as_bytes(), "abc=").map_err(|e| e.to_string());
        assert_eq!(check("HTTP/1.1 101 Switching\r\nsec-websocket-accept: abc=\r\n\r\n"), Ok(()));
        let text = |text: &str| Err(text.to_owned());
        assert_eq!(
            check("HTTP/1.1 101 Switching\r\nSec-WebSocket-Accept: abd=\r\n\r\n"),
            text("handshake: not a WebSocket's answer")
        );
        assert_eq!(
            check("HTTP/1.1 429 Too Many Requests\r\n\r\n"),
            text("handshake: answered 429")
        );
        assert_eq!(check("SSH-2.0-x\r\n\r\n"), text("handshake: not a WebSocket's answer"));
    }
}
