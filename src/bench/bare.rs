//! The cost of the same bytes without any server: a loop of non-blocking writes, which is the floor
//! under every delivery.
//!
//! The readers are tasks like those of the load, so that a write wakes as much as a delivery does.
//! Only the CPU of the writing thread is counted. Every message is one write, in bursts too.

use std::{
    future::poll_fn,
    io::{self, ErrorKind::WouldBlock, Write},
    mem::MaybeUninit,
    net::{Ipv4Addr, TcpStream as StdTcpStream},
    pin::Pin,
    task::ready,
    thread,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{TcpListener, TcpStream},
    task::{JoinSet, spawn_blocking},
};

use super::process::thread_cpu;

/// The spread of the writes over sockets and time.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) sockets: usize,
    /// Sockets to which one message is written.
    pub(super) receivers: usize,
    /// Messages to each tick.
    pub(super) burst: u64,
    pub(super) ticks: u32,
    pub(super) period: Duration,
    /// One message with its WebSocket header.
    pub(super) frame: Vec<u8>,
}

/// The cost of the loop.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bare {
    pub(super) writes: u64,
    /// Writes that the kernel took in part or not at all; they were not repeated.
    pub(super) blocked: u64,
    /// CPU time of the writing thread.
    pub(super) cpu: Duration,
}

/// Connects the sockets over loopback, writes, and returns the cost.
///
/// # Errors
/// The kernel refused a socket, or keeps no account of a thread's CPU time.
pub(super) async fn measure(shape: Shape) -> io::Result<Bare> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let mut readers = JoinSet::new();
    let mut sockets = Vec::with_capacity(shape.sockets);
    for _ in 0..shape.sockets {
        let (far, (near, _address)) =
            tokio::try_join!(TcpStream::connect(address), listener.accept())?;
        near.set_nodelay(true)?;
        // Taken from the runtime: the thread below writes without waiting.
        sockets.push(near.into_std()?);
        readers.spawn(read_away(far));
    }
    let bare = spawn_blocking(move || write_all(&sockets, &shape)).await?;
    readers.shutdown().await;
    bare
}

fn write_all(sockets: &[StdTcpStream], shape: &Shape) -> io::Result<Bare> {
    let (mut writes, mut blocked) = (0, 0);
    let mut sockets = sockets.iter().cycle();
    let cpu_before = thread_cpu()?;
    let begun = Instant::now();
    for tick in 0..shape.ticks {
        thread::sleep((shape.period * tick).saturating_sub(begun.elapsed()));
        for _ in 0..shape.burst {
            for mut socket in sockets.by_ref().take(shape.receivers) {
                match socket.write(&shape.frame) {
                    Ok(length) if length == shape.frame.len() => writes += 1,
                    Ok(_) => blocked += 1,
                    Err(error) if error.kind() == WouldBlock => blocked += 1,
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(Bare { writes, blocked, cpu: thread_cpu()?.saturating_sub(cpu_before) })
}

/// Reads until the other side closes, as a viewer does, and discards everything.
async fn read_away(mut stream: TcpStream) {
    poll_fn(|cx| {
        loop {
            let mut space = [const { MaybeUninit::uninit() }; 8 << 10];
            let mut buffer = ReadBuf::uninit(&mut space);
            let read = ready!(Pin::new(&mut stream).poll_read(cx, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                return std::task::Poll::Ready(());
            }
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_message_is_a_write_to_each_of_its_receivers() {
        let shape = Shape {
            sockets: 5,
            receivers: 3,
            burst: 2,
            ticks: 4,
            period: Duration::from_millis(1),
            frame: b"\x81\x05hello".to_vec(),
        };
        let bare = measure(shape).await.unwrap();
        assert_eq!((bare.writes, bare.blocked), (24, 0));
        assert!(bare.cpu > Duration::ZERO);
    }
}
