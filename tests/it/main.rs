//! Behaviour, tested against a real server on a port of its own and, where it matters, a real
//! Postgres.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "the exception for tests does not reach their helpers"
)]

mod access_token;
mod admin;
mod audit;
mod authorization;
mod bad_input;
mod broadcast;
mod broadcast_private;
mod catch_up;
mod commands;
mod conformance;
mod database_history;
mod database_link;
mod database_notify;
mod database_objects;
mod demo;
mod deployed;
mod doctor;
mod drain;
mod events;
mod gaps;
mod grafana;
mod handshake;
mod healing;
mod hostile_notify;
mod http_broadcast;
mod join;
mod jwks;
mod jws;
mod leave;
mod limits;
mod metrics;
mod policies;
mod privacy;
mod readme;
mod reload;
mod revocation;
mod secrets;
mod security;
mod slow_consumer;
mod support;
mod survey;
mod tidy;
