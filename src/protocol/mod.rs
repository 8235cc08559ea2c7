//! The wire: what a client may send and what it can be told; pure.
//!
//! Invariants: nothing here uses a runtime, a clock, a random number or I/O; no input panics.
//! The contract as data is in `protocol/` of the repository, and tests compare both.
#![warn(clippy::indexing_slicing)]

pub mod binary;
pub mod error_code;
pub mod generation;
pub mod message;
pub mod payload;
pub mod serializer;
pub mod topic;
