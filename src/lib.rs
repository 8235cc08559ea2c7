//! Tidegate: a broadcast gateway that speaks Supabase Realtime's protocol.
//!
//! ```text
//!         accept            upgrade             Frame            Message
//!  TCP ──────────► server ──────────► connection ─────► protocol ───────► socket ─────► channel
//!                    │ http             ▲   the only task that             one match      │ auth, topic rules
//!                    │ REST broadcast       touches the WebSocket          per event      ▼
//!                    └───────────────────────────────────────────────────────────────►  hub ◄── merge (per event)
//!  Postgres ─ NOTIFY ─► relay::listener ─► relay::ingest ─► topic rule ─────────────────► │      ▲ catch-up
//!              history ──────────────────► relay::history ────────────────────────────────│──────┘
//!  TCP ◄─ flush once ── connection ◄─ drain whole batch ── outbox ◄── push, never waits ──┘
//! ```
//!
//! The modules in reading order:
//!
//! | module | its one job |
//! |---|---|
//! | [`protocol`] | the wire: messages, serializers, payloads, error codes; pure |
//! | [`outbox`] | the frames waiting for one client |
//! | [`hub`] | who is joined to which topic; fan-out |
//! | [`merge`] | per event: send now, or unite and send later; what has changed of late |
//! | [`topic_rules`], [`authorization`] | a topic → its rule and grants; the one function that decides |
//! | [`auth`] | token → claims or why not; what Postgres' policies let them do |
//! | `channel` | one joined channel: what each event does |
//! | [`socket`] | channels by topic: the routing table of events |
//! | [`lost_sockets`], `healing` | who was away and since when; who may be deaf |
//! | [`limits`] | inbound rates and caps of the project, an address, a socket |
//! | [`connection`] | one WebSocket and its deadlines |
//! | [`relay`] | NOTIFY → broadcast; gaps and what they have hidden |
//! | [`db`] | every SQL statement |
//! | [`deployed`] | what the migrations make, and whether the database has it |
//! | [`http`], `rest`, [`admin`] | public and admin routes, REST broadcasts |
//! | [`server`], [`reload`] | listen, accept, cap, drain; rules and keys read again |
//! | [`metrics`], [`audit`], [`config`] | what is measured, what is on record, what can be set |
//! | [`mod@demo`], [`mod@bench`], [`mod@doctor`], [`explain`] | the other commands |
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
pub mod db;
pub mod demo;
pub mod doctor;
pub mod http;
pub mod hub;
pub mod invalidation;
pub mod limits;
pub mod metrics;
pub mod policies;
pub mod protocol;
pub mod recovery;
pub mod relay;
pub mod secret;
pub mod server;
pub mod socket;
pub mod telemetry;
mod upkeep;
mod wire_client;
