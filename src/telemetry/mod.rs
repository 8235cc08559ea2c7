//! What is measured and logged, without knowing of what.

pub mod audit;
pub mod logs;
#[allow(dead_code, reason = "rooms move to it one by one")]
pub mod metrics;
