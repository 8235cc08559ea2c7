//! The bodies of REST requests: small ones as they come, large ones a few at a time.
//!
//! Invariants: a body has a bound and a time; a large body holds a place from the moment at which it
//! turns out to be large until its request has been answered; an address holds a part of the places
//! at most, and a body that comes too slowly gives its place back.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::{
    StatusCode,
    body::{Body as _, Incoming},
};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

use crate::limits::{Address, Limited, Limits};

/// Largest body of a REST broadcast.
const BODY_BYTES_MAX: usize = 8_000_000;
/// Largest body that needs no place.
const SMALL_BODY_BYTES: usize = 64 * 1024;
/// Most large bodies of requests at a time, 8 MB each at most.
const PLACES_MAX: usize = 16;
/// Most large bodies of servers (`service_role`) at a time, beside those.
const SERVER_PLACES_MAX: usize = 4;
/// Most of them of one address.
const PLACES_PER_ADDRESS_MAX: usize = 4;
/// A large body brings at least so much a second, or is given up.
const PACE_BYTES: f64 = 16.0 * 1024.0;
/// By how much a large body may be late: a lost packet alone costs a second.
const PACE_SLACK: Duration = Duration::from_secs(3);

/// Who sends a body.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sender {
    pub(super) address: Address,
    /// Whether the token is a server's.
    pub(super) is_server: bool,
}

/// The places of large bodies.
#[derive(Debug)]
pub(crate) struct Bodies {
    all: Semaphore,
    /// Those of servers, which no browser can take.
    servers: Semaphore,
    /// The places of each address that has one or waits for one.
    by_address: Mutex<HashMap<Address, Arc<Semaphore>>>,
}

impl Default for Bodies {
    fn default() -> Self {
        Self {
            all: Semaphore::new(PLACES_MAX),
            servers: Semaphore::new(SERVER_PLACES_MAX),
            by_address: Mutex::default(),
        }
    }
}

/// A body that has been read, and its place while it is worked on.
#[derive(Debug)]
pub(super) struct Body<'a> {
    pub(super) bytes: Bytes,
    pub(super) _place: Option<Place<'a>>,
}

/// A large body's place.
#[derive(Debug)]
pub(super) struct Place<'a> {
    bodies: &'a Bodies,
    address: Address,
    permits: Option<(OwnedSemaphorePermit, SemaphorePermit<'a>)>,
}

impl Bodies {
    /// Reads a whole body.
    ///
    /// # Errors
    /// The status of the response: 413 for a body that is too large, 400 for one that breaks off,
    /// 408 for one that does not come in time.
    pub(super) async fn read(
        &self,
        limits: &Limits,
        sender: Sender,
        body: Incoming,
    ) -> Result<Body<'_>, StatusCode> {
        let read = self.read_at_pace(limits.settings().body_timeout, sender, body).await;
        if read.as_ref().is_err_and(|status| *status == StatusCode::REQUEST_TIMEOUT) {
            limits.count(Limited::Bodies);
        }
        read
    }

    async fn read_at_pace(
        &self,
        time: Duration,
        sender: Sender,
        mut body: Incoming,
    ) -> Result<Body<'_>, StatusCode> {
        let length = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if length > BODY_BYTES_MAX {
            return Err(StatusCode::PAYLOAD_TOO_LARGE);
        }
        let mut bytes = BytesMut::new();
        let mut deadline = Instant::now() + time;
        let mut large: Option<(Place<'_>, Pace)> = None;
        loop {
            let at_pace = large.as_ref().map_or(deadline, |(_, pace)| pace.deadline(bytes.len()));
            let frame = timeout_at(deadline.min(at_pace), body.frame())
                .await
                .map_err(|_elapsed| StatusCode::REQUEST_TIMEOUT)?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|_broken| StatusCode::BAD_REQUEST)?;
            let Ok(data) = frame.into_data() else { continue };
            let read = bytes.len() + data.len();
            if read > BODY_BYTES_MAX {
                return Err(StatusCode::PAYLOAD_TOO_LARGE);
            }
            match &mut large {
                None if read > SMALL_BODY_BYTES => {
                    let place = timeout_at(deadline, self.place(sender))
                        .await
                        .map_err(|_elapsed| StatusCode::REQUEST_TIMEOUT)?;
                    // The wait for a place is not the client's.
                    deadline = Instant::now() + time;
                    // In one piece, rather than in pieces that double.
                    bytes.reserve(length.max(read) - bytes.len());
                    large = Some((place, Pace { since: Instant::now(), from: read }));
                }
                None | Some(_) => {}
            }
            bytes.extend_from_slice(&data);
        }
        let place = large.map(|(place, _)| place);
        Ok(Body { bytes: bytes.freeze(), _place: place })
    }

    /// Waits for a place.
    async fn place(&self, sender: Sender) -> Place<'_> {
        let Sender { address, is_server } = sender;
        let own = {
            let mut by_address = self.by_address.lock();
            let new = || Arc::new(Semaphore::new(PLACES_PER_ADDRESS_MAX));
            Arc::clone(by_address.entry(address).or_insert_with(new))
        };
        let mut place = Place { bodies: self, address, permits: None };
        // Neither is ever closed. An address that waits for its own places keeps no other waiting.
        if let Ok(own) = own.acquire_owned().await
            && let Ok(one) = if is_server { &self.servers } else { &self.all }.acquire().await
        {
            place.permits = Some((own, one));
        }
        place
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.permits = None;
        let mut by_address = self.bodies.by_address.lock();
        if by_address.get(&self.address).is_some_and(|places| Arc::strong_count(places) == 1) {
            by_address.remove(&self.address);
        }
    }
}

/// Since when a large body comes, and how much of it had come then, in bytes.
struct Pace {
    since: Instant,
    from: usize,
}

impl Pace {
    /// By when more must have come of a body of which so much has.
    fn deadline(&self, read: usize) -> Instant {
        #[expect(clippy::cast_precision_loss, reason = "a body is far below 2^52 bytes")]
        let steps = read.saturating_sub(self.from) as f64 / PACE_BYTES;
        self.since + PACE_SLACK + Duration::from_secs_f64(steps)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tokio::time::timeout;

    use super::*;

    fn address(n: u8) -> Sender {
        Sender { address: IpAddr::from([192, 0, 2, n]).into(), is_server: false }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_has_a_part_of_the_places_and_leaves_no_entry_behind() {
        let bodies = Bodies::default();
        let mut held = Vec::new();
        for _ in 0..PLACES_PER_ADDRESS_MAX {
            held.push(bodies.place(address(1)).await);
        }
        let second = Duration::from_secs(1);
        assert!(timeout(second, bodies.place(address(1))).await.is_err());
        for n in 2..=4 {
            for _ in 0..PLACES_PER_ADDRESS_MAX {
                held.push(timeout(second, bodies.place(address(n))).await.unwrap());
            }
        }
        assert!(timeout(second, bodies.place(address(5))).await.is_err(), "all are taken");
        assert_eq!(bodies.by_address.lock().len(), 4, "who has given up is forgotten");
        held.clear();
        assert_eq!(bodies.by_address.lock().len(), 0);
        assert_eq!(bodies.all.available_permits(), PLACES_MAX);
    }
}
