//! Behaviour, tested against a real server on a port of its own and, where it matters, a real
//! Postgres.

mod conformance;
mod support;
