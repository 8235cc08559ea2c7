//! What the benchmarks share: a gateway in a process of its own, tokens, the bytes of clients that
//! no library would write, and the rows of the printed table.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
};

use serde_json::{Value, json};
use tidegate::{auth::sign::sign, clock::unix_now, secret::Secret};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpSocket, TcpStream},
    process::{Child, Command},
};

/// The binary that is measured.
pub(crate) const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");
const SECRET: &str = "the-secret-of-the-benchmark";

/// A gateway of its own for each measurement: memory says little on a warm one.
pub(crate) struct Gateway {
    pub(crate) process: Child,
    /// Its public port, and that of the operators.
    pub(crate) addresses: [SocketAddr; 2],
}

impl Gateway {
    /// Starts a gateway with these settings over the default ones.
    pub(crate) async fn start(database_url: &str, settings: &[(&str, &str)]) -> Self {
        let mut process = Command::new(TIDEGATE)
            .arg("serve")
            .env("TIDEGATE_LISTEN", "127.0.0.1:0")
            .env("TIDEGATE_ADMIN_LISTEN", "127.0.0.1:0")
            .env("TIDEGATE_JWT_SECRET", SECRET)
            .env("TIDEGATE_DATABASE_URL", database_url)
            .env("TIDEGATE_LOG", "error")
            .envs(settings.iter().copied())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
        // `listening public=127.0.0.1:40001 admin=127.0.0.1:40002`
        let mut addresses = line.split(['=', ' ', '\n']).filter_map(|word| word.parse().ok());
        let addresses = [(); 2].map(|()| addresses.next().unwrap());
        Self { process, addresses }
    }

    /// Returns the id of its process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id().unwrap()
    }
}

/// Creates a token of this role.
pub(crate) fn token(role: &str) -> String {
    token_with(json!({ "role": role }))
}

/// Creates a token with these claims that is valid for a day, unless they say otherwise.
pub(crate) fn token_with(mut claims: Value) -> String {
    claims.as_object_mut().unwrap().entry("exp").or_insert_with(|| (unix_now() + 86_400).into());
    sign(&Secret::from(SECRET), &claims).unwrap()
}

/// Prints a row of the table.
pub(crate) fn row(cells: &[&str]) {
    println!("| {} |", cells.join(" | "));
}

/// Returns the resident memory of a process, in KiB.
pub(crate) fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Creates a client's socket with this address. The system takes `receive_buffer` bytes for the
/// client, or as many as it likes.
pub(crate) fn socket(from: Ipv4Addr, receive_buffer: Option<u32>) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    if let Some(bytes) = receive_buffer {
        socket.set_recv_buffer_size(bytes)?;
    }
    // A head and its body are two writes, and neither may wait for the other.
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Opens a WebSocket with this token by hand; the rest of the answer's head is left unread.
pub(crate) async fn upgrade(stream: &mut TcpStream, token: &str, agent: &str) -> io::Result<()> {
    let request = format!(
        "GET /realtime/v1/websocket?vsn=1.0.0&apikey={token} HTTP/1.1\r\nhost: x\r\n\
         user-agent: {agent}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut status = [0; 12];
    stream.read_exact(&mut status).await?;
    if status.ends_with(b" 101") { Ok(()) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

/// Returns a client's frame: the first byte as given (FIN and opcode), the mask all zeros.
pub(crate) fn frame(first_byte: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first_byte];
    match payload.len() {
        length @ ..126 => frame.push(0x80 | u8::try_from(length).unwrap()),
        length @ 126..65_536 => {
            frame.push(0x80 | 126);
            frame.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}
