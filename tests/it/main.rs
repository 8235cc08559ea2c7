//! Behaviour, tested against a real server on a port of its own and, where it matters, a real
//! Postgres. The folders are the rooms of `src`.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "the exception for tests does not reach their helpers"
)]

mod support;

mod protocol {
    mod bad_input;
    mod conformance;
}
mod auth {
    mod jwks;
    mod jws;
    mod revocation;
    mod secrets;
}
mod access {
    pub(super) mod authorization;
}
mod limits {
    mod rates;
}
mod invalidation {
    mod catch_up;
    mod events;
}
mod recovery {
    mod healing;
    mod strangers;
}
mod db {
    mod database_history;
    mod database_objects;
    mod deployed;
    mod policies;
    mod privacy;
}
mod relay {
    mod database_link;
    mod database_notify;
    mod gaps;
    mod hostile_notify;
    mod places;
}
mod upkeep {
    mod survey;
}
mod socket {
    mod access_token;
    mod broadcast;
    mod broadcast_private;
    mod held_up;
    mod join;
    mod leave;
    mod slow_consumer;
    mod waiting;
}
mod http {
    mod handshake;
    mod http_broadcast;
}
mod admin {
    mod audit;
    pub(super) mod metrics;
    mod routes;
}
mod server {
    mod commands;
    mod drain;
    mod reload;
}
mod commands {
    mod demo;
    mod doctor;
}
mod papers {
    mod docs;
    mod grafana;
    mod security;
    mod tidy;
}
