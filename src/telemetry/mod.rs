//! What is measured and logged, without knowing of what.

pub mod audit;
pub mod logs;
pub mod metrics;
