//! Simulation: grids of strategies, walk-forward windows, a synthetic market, sweeps whole and in parts.

pub mod calibrate;
pub mod grid;
pub mod hedge;
pub mod hedge_frequency;
pub mod luck;
pub mod market;
pub mod parts;
pub mod portfolio;
pub mod regime_filter;
pub mod replay;
pub mod sample;
pub mod sweep;
pub mod walk_forward;
