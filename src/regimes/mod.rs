//! Market regimes.

pub mod switching;
