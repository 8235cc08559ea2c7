//! Topic → rule → decision: who may read and write what.

pub mod decision;
pub mod rule;
pub mod settings;
