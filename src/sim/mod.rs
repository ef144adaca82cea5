//! Simulation: grids of strategies, walk-forward windows, a synthetic market.

pub mod grid;
pub mod market;
pub mod portfolio;
pub mod sweep;
pub mod walk_forward;
