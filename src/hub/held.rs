//! How much all outboxes together hold.
//!
//! Invariants: a frame that many sockets wait for counts once, from its encoding until the last of
//! them has written or dropped it; what is small and for one client alone is not counted, because a
//! client that does not read is not read either.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::{Message as Frame, Utf8Bytes};

/// Shorter frames are not counted.
const HELD_MIN: usize = 256;

/// The bounds of every outbox and of all of them, and how near they come.
#[derive(Debug)]
pub struct OutboxBounds {
    /// Most bytes that may wait behind another frame. A connection holds as much, and what it is
    /// writing: a short batch or one frame.
    bytes_max: usize,
    /// Most bytes that all outboxes may hold together.
    all_bytes_max: usize,
    held: AtomicUsize,
    /// Notified when more is held than may be.
    over: Notify,
    /// The largest of one outbox since the last turn, and between that and the one before.
    highest: [AtomicUsize; 2],
}

impl OutboxBounds {
    /// Creates the bounds: at most `bytes_max` in each outbox, and `all_bytes_max` in all of them.
    #[must_use]
    pub fn new(bytes_max: usize, all_bytes_max: usize) -> Arc<Self> {
        let (held, over, highest) = (AtomicUsize::new(0), Notify::new(), Default::default());
        Arc::new(Self { bytes_max, all_bytes_max, held, over, highest })
    }

    /// The bound of each outbox, in bytes.
    pub(super) fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// The bound of all outboxes together, in bytes.
    pub(super) fn all_bytes_max(&self) -> usize {
        self.all_bytes_max
    }

    /// What all outboxes hold, in bytes.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// By how much all outboxes together hold more than they may, in bytes.
    pub(super) fn excess(&self) -> usize {
        self.held().saturating_sub(self.all_bytes_max)
    }

    /// Waits until all outboxes together hold more than they may.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(super) async fn over(&self) {
        self.over.notified().await;
    }

    /// Counts a frame until its last copy is dropped. Copies share its bytes.
    pub(super) fn hold(self: &Arc<Self>, frame: Frame) -> Frame {
        if frame.len() < HELD_MIN {
            return frame;
        }
        let hold = |bytes| Bytes::from_owner(Held::new(bytes, Arc::clone(self)));
        match frame {
            Frame::Text(text) => {
                let held = Utf8Bytes::try_from(hold(Bytes::from(text.clone())));
                Frame::Text(held.unwrap_or(text))
            }
            Frame::Binary(bytes) => Frame::Binary(hold(bytes)),
            frame @ (Frame::Ping(_) | Frame::Pong(_) | Frame::Close(_) | Frame::Frame(_)) => frame,
        }
    }

    /// The largest of one outbox since the turn before the last, in bytes.
    #[must_use]
    pub fn highest(&self) -> usize {
        self.highest.iter().map(|bytes| bytes.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Ends one period of the high-water mark. All readers within a period see the same mark.
    pub fn turn(&self) {
        let [now, before] = &self.highest;
        before.store(now.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    pub(super) fn note(&self, bytes: usize) {
        let [now, _] = &self.highest;
        // Nearly always it was higher; a line that nobody writes costs nobody anything.
        if bytes > now.load(Ordering::Relaxed) {
            now.fetch_max(bytes, Ordering::Relaxed);
        }
    }
}

/// The bytes of a frame, which count while this lives.
#[derive(Debug)]
struct Held {
    bytes: Bytes,
    bounds: Arc<OutboxBounds>,
}

impl Held {
    fn new(bytes: Bytes, bounds: Arc<OutboxBounds>) -> Self {
        let before = bounds.held.fetch_add(bytes.len(), Ordering::Relaxed);
        if before + bytes.len() > bounds.all_bytes_max {
            bounds.over.notify_one();
        }
        Self { bytes, bounds }
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.bounds.held.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}
