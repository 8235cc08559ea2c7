//! The viewers: each joins as the published clients do, reads everything, and beats.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use serde::Deserialize;
use tokio::{
    task::JoinSet,
    time::{Instant, interval_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    client::{BEAT, Client, Event, Identity},
    ledger::{Ledger, Viewer},
    stage::{LOBBY, artwork},
};

/// Most viewers that connect at a time: the system of the machine drops connections that come all
/// at once, and delays them by a second.
const IN_FLIGHT: usize = 50;
/// What slow members read, per second.
const MEMBERS_READ: u32 = 600_000;

/// The payload of what is told: an invalidation, or a fact with its number.
#[derive(Deserialize)]
struct Told<'a> {
    #[serde(borrow, default)]
    endpoints: Vec<std::borrow::Cow<'a, str>>,
    fact: Option<usize>,
}

/// How one viewer views.
#[derive(Clone)]
pub(crate) struct Seat {
    pub(crate) at: SocketAddr,
    pub(crate) from: Ipv4Addr,
    pub(crate) key: Arc<str>,
    pub(crate) ledger: Arc<Ledger>,
    /// It sits in the ordinary room, too, and reads slowly.
    pub(crate) is_member: bool,
}

/// Opens so many viewers of each of the events, and returns when all have joined or failed; their
/// tasks go on.
pub(crate) async fn open(
    seat: &Seat,
    events: impl Iterator<Item = usize>,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Vec<Arc<Viewer>> {
    let (mut viewers, mut opening) = (Vec::new(), JoinSet::new());
    for event in events {
        if opening.len() >= IN_FLIGHT {
            opening.join_next().await;
        }
        let viewer = Viewer::new(event, !seat.is_member);
        viewers.push(Arc::clone(&viewer));
        let (seat, stop) = (seat.clone(), stop.clone());
        let (joined, is_joined) = tokio::sync::oneshot::channel();
        tasks.spawn(async move {
            let viewing = async {
                let client = seat.join(&viewer).await?;
                // Nobody may wait for it any more.
                let _ = joined.send(());
                seat.view(client, &viewer).await
            };
            if let Some(Err(reason)) = stop.run_until_cancelled(viewing).await {
                viewer.ended(reason);
            }
        });
        opening.spawn(async move { drop(is_joined.await) });
    }
    while opening.join_next().await.is_some() {}
    viewers
}

impl Seat {
    async fn join(&self, viewer: &Viewer) -> Result<Client, String> {
        let identity = Identity {
            from: self.from,
            agent: "Mozilla/5.0 (of the siege)",
            token: &self.key,
            reads: self.is_member.then_some(MEMBERS_READ),
        };
        let mut client = Client::open(self.at, &identity).await?;
        let eid = self.ledger.events[viewer.event].eid;
        client.join(&format!("cache_invalidate_{eid}"), &self.key).await?;
        if self.is_member {
            client.join(LOBBY, &self.key).await?;
        } else {
            client.join(&format!("auction_winner_{eid}"), &self.key).await?;
        }
        viewer.joined(&self.ledger);
        Ok(client)
    }

    /// Reads until the socket ends, and returns why.
    async fn view(&self, mut client: Client, viewer: &Viewer) -> Result<(), String> {
        let eid = self.ledger.events[viewer.event].eid;
        let mut beats = interval_at(Instant::now() + BEAT, BEAT);
        loop {
            let event = tokio::select! {
                event = client.next() => event?,
                _ = beats.tick() => {
                    client.beat().await?;
                    continue;
                }
            };
            match event {
                Event::Broadcast { sub_topic, payload } if sub_topic.ends_with(eid) => {
                    let Ok(told) = serde_json::from_str::<Told<'_>>(payload.get()) else {
                        continue;
                    };
                    let artworks = told.endpoints.iter().filter_map(|text| artwork(eid, text));
                    self.ledger.told(viewer, artworks);
                    if let Some(fact) = told.fact {
                        self.ledger.heard(viewer, fact);
                    }
                }
                // The room may end for a client that cannot take it; its other channels may not.
                Event::ChannelEnded { sub_topic } if sub_topic == LOBBY => {
                    client.push_join(LOBBY, &self.key).await?;
                }
                Event::ChannelEnded { sub_topic } => return Err(format!("{sub_topic} has ended")),
                Event::Broadcast { .. } | Event::Reply { .. } | Event::Other => {}
            }
        }
    }
}
