//! The activity: votes, bids, photos and changes of artworks, as an audience would make them.
//!
//! Invariants: the same seed gives the same actions in the same order, whatever the database
//! answers; an action is one transaction; an action that fails is logged, and the next one follows.

use std::{error::Error, time::Duration};

use fastrand::Rng;
use sqlx::{PgConnection, PgPool};
use tokio::time::sleep;
use uuid::Uuid;

use super::example::{Artwork, Example, id};

/// Most artworks of an event whose bidding is closed at the same time.
const CLOSED_MAX: usize = 2;
/// Most photos of an artwork; beyond, the oldest is deleted.
const PHOTOS_MAX: i64 = 5;
/// The part of the activity that is on the first event, in percent.
const ON_FIRST_EVENT: u32 = 80;

/// The audience, whose next actions depend on its earlier ones.
#[derive(Debug)]
pub(super) struct Crowd {
    rng: Rng,
    guests: Vec<Uuid>,
    places: Vec<Place>,
}

/// An artwork as the audience sees it.
#[derive(Debug)]
struct Place {
    artwork: Artwork,
    status: Status,
    on_easel: bool,
    has_bids: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Status {
    Active,
    Closed,
    Sold,
}

/// One action of one guest.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    /// Votes for an artwork, instead of an earlier vote in the round if there is one.
    Vote { art: Uuid, person: Uuid },
    /// Bids `step` more than the highest bid.
    Bid { art: Uuid, person: Uuid, step: i32 },
    /// Adds a photo.
    Photo { art: Uuid, media: Uuid },
    /// Opens or closes the bidding, or sells to the highest bidder.
    Status { art: Uuid, status: &'static str },
    /// Takes an artwork off its easel, or puts it back.
    Easel { art: Uuid, easel: Option<i32> },
}

impl Crowd {
    /// Creates an audience of the example's guests.
    pub(super) fn new(example: Example) -> Self {
        let Example { rng, artworks, guests, .. } = example;
        let place = |artwork| {
            let status = Status::Active;
            Place { artwork, status, on_easel: true, has_bids: false }
        };
        Self { rng, guests, places: artworks.into_iter().map(place).collect() }
    }

    /// Draws the next action.
    pub(super) fn next_action(&mut self) -> Action {
        let event = usize::from(self.rng.u32(0..100) >= ON_FIRST_EVENT);
        let index = self.pick(event, |_| true);
        let art = self.places[index].artwork.id;
        let person = self.guests[self.rng.usize(..self.guests.len())];
        match self.rng.u32(0..100) {
            0..50 => Action::Vote { art, person },
            50..84 => {
                let index = self.pick(event, |place| place.status == Status::Active);
                let place = &mut self.places[index];
                place.has_bids = true;
                let art = place.artwork.id;
                Action::Bid { art, person, step: self.rng.i32(1..=4) * 5 }
            }
            84..93 => Action::Photo { art, media: id(&mut self.rng) },
            93..97 => self.next_status(event),
            _ => self.next_easel(event),
        }
    }

    /// Draws a change of status: open, closed, sold if there is a bid, and open again when the
    /// buyer withdraws.
    fn next_status(&mut self, event: usize) -> Action {
        let closed = |place: &Place| place.status != Status::Active;
        let closed_count = self
            .places
            .iter()
            .filter(|place| place.artwork.event == event && closed(place))
            .count();
        let index = self.pick(event, |place| closed(place) == (closed_count >= CLOSED_MAX));
        let place = &mut self.places[index];
        let (next, status) = match place.status {
            Status::Active => (Status::Closed, "closed"),
            Status::Closed if place.has_bids => (Status::Sold, "sold"),
            Status::Closed | Status::Sold => (Status::Active, "active"),
        };
        place.status = next;
        Action::Status { art: place.artwork.id, status }
    }

    /// Draws a change of easel; at most one artwork of an event is off its easel.
    fn next_easel(&mut self, event: usize) -> Action {
        let is_missing = |place: &Place| place.artwork.event == event && !place.on_easel;
        let missing = self.places.iter().position(is_missing);
        let index = missing.unwrap_or_else(|| self.pick(event, |_| true));
        let place = &mut self.places[index];
        place.on_easel = !place.on_easel;
        let easel = place.on_easel.then_some(place.artwork.easel);
        Action::Easel { art: place.artwork.id, easel }
    }

    /// Returns the index of a random artwork of the event that is `wanted`, else of any artwork.
    fn pick(&mut self, event: usize, wanted: impl Fn(&Place) -> bool) -> usize {
        let wanted = |place: &Place| place.artwork.event == event && wanted(place);
        let indexes: Vec<usize> =
            (0..self.places.len()).filter(|index| wanted(&self.places[*index])).collect();
        let all = self.places.len();
        self.rng.choice(indexes).unwrap_or_else(|| self.rng.usize(..all))
    }

    /// Draws the wait until the next action: mostly short, sometimes long, as with people.
    fn pause(&mut self, rate: f64) -> Duration {
        let mean_count = -(1.0 - self.rng.f64()).ln();
        Duration::from_secs_f64(mean_count.min(5.0) / rate)
    }
}

impl Action {
    /// Performs the action in one transaction.
    ///
    /// # Errors
    /// The database's error; nothing has changed then.
    pub(super) async fn perform(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        let mut transaction = pool.begin().await?;
        match self {
            Self::Vote { art, person } => vote(&mut transaction, *art, *person).await?,
            Self::Bid { art, person, step } => bid(&mut transaction, *art, *person, *step).await?,
            Self::Photo { art, media } => add_photo(&mut transaction, *art, *media).await?,
            Self::Status { art, status } => set_status(&mut transaction, *art, status).await?,
            Self::Easel { art, easel } => set_easel(&mut transaction, *art, *easel).await?,
        }
        transaction.commit().await
    }

    /// Returns the action's name for the log.
    fn kind(&self) -> &'static str {
        match self {
            Self::Vote { .. } => "vote",
            Self::Bid { .. } => "bid",
            Self::Photo { .. } => "photo",
            Self::Status { .. } => "status",
            Self::Easel { .. } => "easel",
        }
    }
}

/// Performs `rate` actions a second on average, without end.
///
/// # Cancel safety
/// An action under way is rolled back.
pub(super) async fn run(pool: &PgPool, mut crowd: Crowd, rate: f64) {
    if rate <= 0.0 {
        return std::future::pending().await;
    }
    loop {
        sleep(crowd.pause(rate)).await;
        let action = crowd.next_action();
        if let Err(error) = action.perform(pool).await {
            let kind = action.kind();
            tracing::warn!(kind, error = &error as &dyn Error, "an action failed; going on");
        }
    }
}

async fn vote(session: &mut PgConnection, art: Uuid, person: Uuid) -> Result<(), sqlx::Error> {
    let former: Option<Uuid> = sqlx::query_scalar(
        "delete from votes v using art a
         where a.id = $1 and v.event_id = a.event_id and v.round = a.round and v.person_id = $2
         returning v.art_uuid",
    )
    .bind(art)
    .bind(person)
    .fetch_optional(&mut *session)
    .await?;
    if let Some(former) = former {
        count_votes(session, former).await?;
    }
    sqlx::query(
        "insert into votes (event_id, eid, round, easel, art_id, art_uuid, person_id)
         select a.event_id, e.eid, a.round, a.easel, a.art_code, a.id, $2
         from art a join events e on e.id = a.event_id
         where a.id = $1",
    )
    .bind(art)
    .bind(person)
    .execute(&mut *session)
    .await?;
    count_votes(session, art).await
}

async fn count_votes(session: &mut PgConnection, art: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update art
         set vote_count = (select count(*) from votes where art_uuid = $1), updated_at = now()
         where id = $1",
    )
    .bind(art)
    .execute(session)
    .await
    .map(drop)
}

async fn bid(
    session: &mut PgConnection,
    art: Uuid,
    person: Uuid,
    step: i32,
) -> Result<(), sqlx::Error> {
    let placed = sqlx::query(
        "insert into bids (art_id, person_id, amount)
         select id, $2, coalesce(current_bid + $3, starting_bid)
         from art where id = $1 and status = 'active'",
    )
    .bind(art)
    .bind(person)
    .bind(step)
    .execute(&mut *session)
    .await?;
    // Somebody with psql may have closed the bidding.
    if placed.rows_affected() == 0 {
        return Ok(());
    }
    sqlx::query(
        "update art
         set current_bid = (select max(amount) from bids where art_id = $1),
             bid_count = bid_count + 1,
             updated_at = now()
         where id = $1",
    )
    .bind(art)
    .execute(session)
    .await
    .map(drop)
}

async fn add_photo(session: &mut PgConnection, art: Uuid, media: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into art_media (art_id, media_id, display_order)
         select $1, $2, coalesce(max(display_order), 0) + 1 from art_media where art_id = $1",
    )
    .bind(art)
    .bind(media)
    .execute(&mut *session)
    .await?;
    sqlx::query(
        "delete from art_media where id in (
             select id from art_media where art_id = $1 order by display_order desc offset $2
         )",
    )
    .bind(art)
    .bind(PHOTOS_MAX)
    .execute(session)
    .await
    .map(drop)
}

async fn set_status(
    session: &mut PgConnection,
    art: Uuid,
    status: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update art
         set status = $2::art_status,
             closing_time = case when $2 = 'active' then null else coalesce(closing_time, now()) end,
             winner_id = case when $2 = 'sold' then (
                 select person_id from bids where art_id = $1 order by amount desc limit 1
             ) end,
             updated_at = now()
         where id = $1",
    )
    .bind(art)
    .bind(status)
    .execute(session)
    .await
    .map(drop)
}

async fn set_easel(
    session: &mut PgConnection,
    art: Uuid,
    easel: Option<i32>,
) -> Result<(), sqlx::Error> {
    sqlx::query("update art set easel = $2, updated_at = now() where id = $1")
        .bind(art)
        .bind(easel)
        .execute(session)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::{super::example::EVENTS, *};

    fn actions(seed: u64) -> Vec<Action> {
        let mut crowd = Crowd::new(Example::new(seed));
        (0..2000).map(|_| crowd.next_action()).collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_actions() {
        assert_eq!(actions(1), actions(1));
        assert_ne!(actions(1), actions(2));
    }

    #[test]
    fn every_kind_of_action_occurs_and_most_are_on_the_first_event() {
        let actions = actions(1);
        for kind in ["vote", "bid", "photo", "status", "easel"] {
            assert!(actions.iter().any(|action| action.kind() == kind), "{kind}");
        }
        let first: Vec<_> = Example::new(1)
            .artworks
            .into_iter()
            .filter_map(|artwork| (EVENTS[artwork.event].eid == "AB3028").then_some(artwork.id))
            .collect();
        let on_first = actions
            .iter()
            .filter(|action| match action {
                Action::Vote { art, .. }
                | Action::Bid { art, .. }
                | Action::Photo { art, .. }
                | Action::Status { art, .. }
                | Action::Easel { art, .. } => first.contains(art),
            })
            .count();
        assert!((1400..1800).contains(&on_first), "{on_first}");
    }

    /// With all artworks closed or sold, nothing would move on the page.
    #[test]
    fn most_artworks_can_be_bid_on_at_any_time() {
        let mut crowd = Crowd::new(Example::new(3));
        for _ in 0..5000 {
            crowd.next_action();
            let closed = crowd.places.iter().filter(|place| place.status != Status::Active);
            assert!(closed.count() <= CLOSED_MAX * EVENTS.len());
        }
    }

    #[test]
    fn pauses_are_as_long_as_the_rate_asks_for_on_average() {
        let mut crowd = Crowd::new(Example::new(4));
        let total: Duration = (0..10_000).map(|_| crowd.pause(10.0)).sum();
        assert!((900..1100).contains(&total.as_secs()), "{total:?}");
        assert!((0..10_000).all(|_| crowd.pause(10.0) <= Duration::from_millis(500)));
    }
}
