//! The `/live` endpoints that the page fetches and that notifications name, as JSON.
//!
//! Invariants: each endpoint is one statement, which returns the whole answer, or no row if there
//! is no such event or artwork; amounts are JSON numbers; only a well-formed path reaches the
//! database.

use std::str::FromStr;

use sqlx::PgPool;

/// Longest id of an event, in bytes.
const EID_BYTES_MAX: usize = 50;
/// Longest name of an easel, in bytes: numbers, and letters in older data.
const EASEL_BYTES_MAX: usize = 10;

/// An endpoint that a path names.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Endpoint {
    /// `/live/event/{eid}`: the event and its artworks.
    Event { eid: String },
    /// `/live/event/{eid}/media`: the photos.
    Media { eid: String },
    /// `/live/event/{eid}/artists`: the artists.
    Artists { eid: String },
    /// `/live/event/{eid}-{round}-{easel}/bids`: the bids on an artwork, the highest first.
    Bids { eid: String, round: i32, easel: String },
}

/// The error of a path that names no endpoint.
#[derive(Debug, PartialEq)]
pub(super) struct NotAnEndpoint;

impl FromStr for Endpoint {
    type Err = NotAnEndpoint;

    fn from_str(path: &str) -> Result<Self, NotAnEndpoint> {
        let rest = path.strip_prefix("/live/event/").ok_or(NotAnEndpoint)?;
        let (name, part) = rest.split_once('/').unwrap_or((rest, ""));
        let is_word = |text: &str, bytes_max: usize| {
            (1..=bytes_max).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        let event = || is_word(name, EID_BYTES_MAX).then(|| name.to_owned()).ok_or(NotAnEndpoint);
        match part {
            "" if !rest.ends_with('/') => Ok(Self::Event { eid: event()? }),
            "media" => Ok(Self::Media { eid: event()? }),
            "artists" => Ok(Self::Artists { eid: event()? }),
            "bids" => {
                // From the end, because the event's id may hold hyphens.
                let mut parts = name.rsplitn(3, '-');
                let (Some(easel), Some(round), Some(eid)) =
                    (parts.next(), parts.next(), parts.next())
                else {
                    return Err(NotAnEndpoint);
                };
                let round = round.parse().map_err(|_no_number| NotAnEndpoint)?;
                if !is_word(eid, EID_BYTES_MAX) || !is_word(easel, EASEL_BYTES_MAX) {
                    return Err(NotAnEndpoint);
                }
                Ok(Self::Bids { eid: eid.to_owned(), round, easel: easel.to_owned() })
            }
            _ => Err(NotAnEndpoint),
        }
    }
}

impl Endpoint {
    /// Reads the endpoint's JSON; `None` if there is no such event or artwork.
    ///
    /// # Errors
    /// The database's error.
    pub(super) async fn read(&self, pool: &PgPool) -> Result<Option<String>, sqlx::Error> {
        let query = match self {
            Self::Event { eid } => sqlx::query_scalar(EVENT).bind(eid),
            Self::Media { eid } => sqlx::query_scalar(MEDIA).bind(eid),
            Self::Artists { eid } => sqlx::query_scalar(ARTISTS).bind(eid),
            Self::Bids { eid, round, easel } => {
                sqlx::query_scalar(BIDS).bind(eid).bind(round).bind(easel)
            }
        };
        query.fetch_optional(pool).await
    }
}

const EVENT: &str = "
select json_build_object(
    'eid', e.eid,
    'name', e.name,
    'venue', e.venue,
    'current_round', e.current_round,
    'event_start_datetime', e.event_start_datetime,
    'artworks', (
        select coalesce(json_agg(json_build_object(
            'id', a.id,
            'art_code', a.art_code,
            'round', a.round,
            'easel', a.easel,
            'artist_id', a.artist_id,
            'status', a.status,
            'starting_bid', a.starting_bid,
            'current_bid', a.current_bid,
            'bid_count', a.bid_count,
            'vote_count', a.vote_count,
            'winner', winner.nickname,
            'updated_at', a.updated_at
        ) order by a.round, length(a.art_code), a.art_code), '[]')
        from art a left join people winner on winner.id = a.winner_id
        where a.event_id = e.id
    )
)::text
from events e where e.eid = $1";

const MEDIA: &str = "
select json_build_object(
    'eid', e.eid,
    'media', (
        select coalesce(json_agg(json_build_object(
            'id', m.id,
            'art_id', m.art_id,
            'media_id', m.media_id,
            'is_primary', m.is_primary,
            'display_order', m.display_order,
            'created_at', m.created_at
        ) order by m.art_id, m.display_order), '[]')
        from art_media m join art a on a.id = m.art_id
        where a.event_id = e.id
    )
)::text
from events e where e.eid = $1";

const ARTISTS: &str = "
select json_build_object(
    'eid', e.eid,
    'artists', (
        select coalesce(json_agg(json_build_object('id', p.id, 'name', p.nickname)
            order by p.nickname), '[]')
        from people p
        where exists (select from art a where a.event_id = e.id and a.artist_id = p.id)
    )
)::text
from events e where e.eid = $1";

const BIDS: &str = "
select json_build_object(
    'eid', e.eid,
    'round', a.round,
    'easel', a.easel,
    'art_id', a.id,
    'bids', (
        select coalesce(json_agg(json_build_object(
            'amount', b.amount,
            'currency', b.currency_code,
            'bidder', b.nickname,
            'created_at', b.created_at
        ) order by b.amount desc), '[]')
        from (
            select b.amount, b.currency_code, p.nickname, b.created_at
            from bids b left join people p on p.id = b.person_id
            where b.art_id = a.id
            order by b.amount desc
            limit 50
        ) b
    )
)::text
from art a join events e on e.id = a.event_id
where e.eid = $1 and a.round = $2 and a.easel::text = $3
limit 1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_an_endpoint_or_nothing() {
        let eid = || "AB3028".to_owned();
        let bids = |eid: &str, round, easel: &str| {
            Ok(Endpoint::Bids { eid: eid.to_owned(), round, easel: easel.to_owned() })
        };
        for (path, endpoint) in [
            ("/live/event/AB3028", Ok(Endpoint::Event { eid: eid() })),
            ("/live/event/AB3028/media", Ok(Endpoint::Media { eid: eid() })),
            ("/live/event/AB3028/artists", Ok(Endpoint::Artists { eid: eid() })),
            ("/live/event/AB3028-2-6/bids", bids("AB3028", 2, "6")),
            ("/live/event/AB3028-2-A/bids", bids("AB3028", 2, "A")),
            ("/live/event/A-B-1-2/bids", bids("A-B", 1, "2")),
        ] {
            assert_eq!(path.parse(), endpoint, "{path}");
        }
        let longest = format!("/live/event/{}", "A".repeat(EID_BYTES_MAX));
        assert!(longest.parse::<Endpoint>().is_ok());
        for path in [
            "/live/event/",
            "/live/event/AB3028/",
            "/live/event/AB3028/media/",
            "/live/event/AB3028/votes",
            "/live/event/AB%203028",
            "/live/event/AB3028'",
            "/live/event/AB3028/bids",
            "/live/event/AB3028-x-1/bids",
            "/live/event/AB3028-1-/bids",
            "/live/event/-1-2/bids",
            "/live/artists",
            &format!("{longest}A"),
        ] {
            assert_eq!(path.parse::<Endpoint>(), Err(NotAnEndpoint), "{path}");
        }
    }
}
