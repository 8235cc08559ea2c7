//! The example: two events with their artworks and people, planned from a seed, then inserted.
//!
//! Invariant: the same seed gives the same rows, ids included.

use fastrand::Rng;
use sqlx::PgPool;
use uuid::{Builder, Uuid};

/// The tables of production.
const TABLES: &str = include_str!("../../migrations/examples/production_tables.sql");

/// Artworks of an event in each of its two rounds.
const EASELS: i32 = 6;
const ROUNDS: i32 = 2;

/// The names of an event.
pub(super) struct EventName {
    pub(super) eid: &'static str,
    pub(super) name: &'static str,
    venue: &'static str,
}

/// The events, the busiest first.
pub(super) const EVENTS: [EventName; 2] = [
    EventName { eid: "AB3028", name: "Live painting at the harbour", venue: "Harbour Hall" },
    EventName { eid: "AB3029", name: "Live painting in the old mill", venue: "Mill Street Stage" },
];

/// The artists, one for each artwork.
const ARTISTS: [&str; 24] = [
    "Ines Marlow",
    "Tomas Okafor",
    "Yuki Brandt",
    "Leila Haddad",
    "Pablo Ferrin",
    "Nora Lindqvist",
    "Amadou Keita",
    "Sofia Petrov",
    "Malik Osei",
    "Clara Jansen",
    "Ravi Menon",
    "Ewa Nowak",
    "Hugo Valdes",
    "Mina Sato",
    "Oskar Bloom",
    "Zara Whitlock",
    "Diego Prado",
    "Anja Keller",
    "Femi Adeyemi",
    "Lucie Moreau",
    "Kofi Mensah",
    "Petra Horak",
    "Jonas Reed",
    "Aiko Tanaka",
];

/// Each adjective with each of [`BIRDS`] is a guest's nickname.
const ADJECTIVES: [&str; 10] =
    ["Amber", "Bold", "Calm", "Early", "Gentle", "Keen", "Lucky", "Merry", "Quiet", "Swift"];
const BIRDS: [&str; 12] = [
    "Avocet",
    "Curlew",
    "Dunlin",
    "Eider",
    "Gannet",
    "Heron",
    "Kittiwake",
    "Osprey",
    "Petrel",
    "Plover",
    "Tern",
    "Wigeon",
];

/// An artwork before the first action.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Artwork {
    pub(super) id: Uuid,
    /// The event's index in [`EVENTS`].
    pub(super) event: usize,
    pub(super) round: i32,
    pub(super) easel: i32,
    artist: Uuid,
    photo: Uuid,
    starting_bid: i32,
}

/// All rows of the example, and the random generator after they were drawn.
#[derive(Debug)]
pub(super) struct Example {
    pub(super) rng: Rng,
    pub(super) artworks: Vec<Artwork>,
    /// The people who vote and bid.
    pub(super) guests: Vec<Uuid>,
    events: Vec<Uuid>,
    artists: Vec<Uuid>,
}

impl Example {
    /// Draws the rows of the example; the database is not touched.
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut ids = |count: usize| -> Vec<Uuid> { (0..count).map(|_| id(&mut rng)).collect() };
        let events = ids(EVENTS.len());
        let artists = ids(ARTISTS.len());
        let guests = ids(ADJECTIVES.len() * BIRDS.len());
        let mut painters = artists.clone();
        rng.shuffle(&mut painters);
        let places = (0..EVENTS.len()).flat_map(|event| {
            let rounds = 1..=ROUNDS;
            rounds.flat_map(move |round| (1..=EASELS).map(move |easel| (event, round, easel)))
        });
        let artworks = places
            .zip(painters)
            .map(|((event, round, easel), artist)| {
                let (id, photo) = (id(&mut rng), id(&mut rng));
                let starting_bid = rng.i32(4..=12) * 10;
                Artwork { id, event, round, easel, artist, photo, starting_bid }
            })
            .collect();
        Self { rng, artworks, guests, events, artists }
    }

    /// Creates the tables and inserts all rows.
    ///
    /// # Errors
    /// The database's error; the tables may exist then, without rows.
    pub(super) async fn insert(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(TABLES).execute(pool).await?;
        let mut transaction = pool.begin().await?;
        let guests = ADJECTIVES
            .iter()
            .flat_map(|one| BIRDS.iter().map(move |other| format!("{one} {other}")));
        let names: Vec<String> =
            ARTISTS.iter().map(|name| (*name).to_owned()).chain(guests).collect();
        let people: Vec<Uuid> = self.artists.iter().chain(&self.guests).copied().collect();
        sqlx::query(
            "insert into people (id, nickname) select * from unnest($1::uuid[], $2::text[])",
        )
        .bind(people)
        .bind(names)
        .execute(&mut *transaction)
        .await?;
        for (id, event) in self.events.iter().zip(&EVENTS) {
            sqlx::query(
                "insert into events (id, eid, name, venue, current_round, event_start_datetime)
                 values ($1, $2, $3, $4, $5, now() - interval '40 minutes')",
            )
            .bind(id)
            .bind(event.eid)
            .bind(event.name)
            .bind(event.venue)
            .bind(ROUNDS)
            .execute(&mut *transaction)
            .await?;
        }
        for artwork in &self.artworks {
            let Artwork { round, easel, .. } = artwork;
            sqlx::query(
                "with artwork as (
                     insert into art (id, event_id, artist_id, art_code, round, easel, starting_bid)
                     values ($1, $2, $3, $4, $5, $6, $7)
                     returning id
                 )
                 insert into art_media (art_id, media_id, is_primary) select id, $8, true from artwork",
            )
            .bind(artwork.id)
            .bind(self.events[artwork.event])
            .bind(artwork.artist)
            .bind(format!("{}-{round}-{easel}", EVENTS[artwork.event].eid))
            .bind(round)
            .bind(easel)
            .bind(artwork.starting_bid)
            .bind(artwork.photo)
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await
    }
}

/// Draws a random id, which the seed decides.
pub(super) fn id(rng: &mut Rng) -> Uuid {
    Builder::from_random_bytes(rng.u128(..).to_be_bytes()).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_has_twelve_artworks_by_different_artists() {
        let example = Example::new(1);
        for event in 0..EVENTS.len() {
            let of_event = example.artworks.iter().filter(|artwork| artwork.event == event);
            assert_eq!(of_event.count(), 12);
        }
        let mut artists: Vec<_> = example.artworks.iter().map(|artwork| artwork.artist).collect();
        artists.sort_unstable();
        artists.dedup();
        assert_eq!(artists.len(), ARTISTS.len());
    }

    #[test]
    fn the_same_seed_plans_the_same_rows() {
        let (one, same, other) = (Example::new(7), Example::new(7), Example::new(8));
        assert_eq!((&one.artworks, &one.guests), (&same.artworks, &same.guests));
        assert_ne!(one.artworks, other.artworks);
    }
}
