//! Tidegate: a broadcast gateway that speaks Supabase Realtime's protocol.
//!
//! ```text
//!         accept            upgrade             Frame            Message
//!  TCP ──────────► server ──────────► http ───────────► protocol ───────► socket ─────► channel
//!                                      │ REST             the only task that  one match     │ auth, access
//!                                      │ broadcast        touches the         per event     ▼
//!                                      └──────────────────────────────────────────────► publish
//!  Postgres ─ NOTIFY ─► relay::listener ─► relay::ingest ─────────────────────────────────► │
//!              history ──────────────────► relay::gaps ───► invalidation ◄── merged topics ─┤
//!                                                               │ window, union, catch-up   ▼
//!  TCP ◄─ flush once ── http::connection ◄─ drain whole batch ── hub::outbox ◄── push ──── hub
//! ```
//!
//! The code is rooms, from the ground up. A room may name the rooms of its third column, all of
//! which stand above it, and no other; `tests/it/papers/tidy.rs` reads this table.
//!
//! | room | its one job | may name |
//! |---|---|---|
//! | [`clock`] | the time, and how it is written | |
//! | [`secret`] | texts that are never printed | |
//! | [`protocol`] | the wire: topics, messages, serializers, payloads, error codes; pure | |
//! | [`telemetry`] | metrics, audit log and logs, without knowing of what | clock |
//! | [`auth`] | token → claims, or why not | clock, secret, protocol, telemetry |
//! | [`access`] | topic → rule → decision | clock, protocol, telemetry, auth |
//! | [`limits`] | how much of everything | clock, telemetry |
//! | [`hub`] | who hears which topic; fan-out; what waits for one client | protocol, telemetry |
//! | [`invalidation`] | the feed of one auction event: window, union, catch-up | clock, protocol, telemetry, access, hub |
//! | [`recovery`] | clients that were away: what they have missed, and who may be deaf | clock, protocol, telemetry, auth, access, limits, hub, invalidation |
//! | [`publish`] | the one way in: a broadcast, its topic, its source → feed or hub | protocol, access, hub, invalidation |
//! | [`db`] | every SQL statement; rows are plain | secret |
//! | [`policies`] | what row-level security lets a token do on a private channel | clock, protocol, telemetry, auth, db |
//! | [`relay`] | NOTIFY → publish; gaps and what they have hidden | clock, secret, protocol, telemetry, auth, access, limits, hub, invalidation, recovery, publish, db |
//! | [`upkeep`] | periodic work against the database | clock, telemetry, auth, hub, recovery, db |
//! | [`socket`] | the Phoenix socket: its channels, and the routing table of events | clock, protocol, telemetry, auth, access, limits, hub, invalidation, recovery, publish, policies, relay |
//! | [`http`] | the public port: routes, upgrade, connection, REST | protocol, telemetry, auth, access, limits, hub, recovery, publish, policies, socket |
//! | [`admin`] | the operators' port | clock, secret, telemetry, auth, access, limits, hub, invalidation, db, relay, http |
//! | [`server`] | the house: builds, starts, reloads and drains every room above | clock, secret, protocol, telemetry, auth, access, limits, hub, invalidation, recovery, publish, db, policies, relay, upkeep, socket, http, admin |
//! | [`wire_client`] | a client of the protocol that shares no code with the server | |
//! | [`mod@bench`] | `tidegate bench` | secret, wire_client |
//! | [`mod@doctor`] | `tidegate doctor` | clock, secret, protocol, auth, access, db, relay, http, admin, server, wire_client |
//! | [`mod@demo`] | `tidegate demo` | secret, auth, db, http, admin, server |
//! | [`cli`] | arguments, the small commands, exit codes | secret, protocol, telemetry, auth, access, db, admin, server, bench, doctor, demo |
//!
//! Invariants everything serves: every byte to a client goes through its outbox, so order is the
//! order of pushes; everything has a bound; a broadcast is encoded once per serializer and its user
//! payload never re-serialised; nobody waits for a slow client; what is dropped, refused or closed
//! has a named reason and a counter.

pub mod access;
pub mod admin;
pub mod auth;
pub mod bench;
pub mod cli;
pub mod clock;
pub mod db;
pub mod demo;
pub mod doctor;
pub mod http;
pub mod hub;
pub mod invalidation;
pub mod limits;
pub mod policies;
pub mod protocol;
pub(crate) mod publish;
pub mod recovery;
pub mod relay;
pub mod secret;
pub mod server;
pub mod socket;
pub mod telemetry;
pub mod upkeep;
mod wire_client;
