//! A walk-forward sweep from the library: crossings of moving averages on ten years of a synthetic market.
//!
//!     cargo run --release --example 02_sweep
//!
//! prints
//!
//!     best of 867 sets in sample: [("fast", 44.0), ("slow", 190.0), ("short", 0.0)], Sharpe 0.80
//!     chosen anew in 24 windows, out of sample: Sharpe 0.52

use forback::sim::{grid::Grid, market, sweep::*};

fn main() -> forback::Result<()> {
    let market = market::synthetic(2520, 1, 7)?;
    let config = SweepConfig::new(Grid::parse("sma_cross", Some("fast=2:50:2,slow=20:200:5"))?);
    let report = sweep(&forback::Device::open("cpu")?, market.close.view(), &config)?;
    for best in report.ranked(0, RankBy::Sharpe, 1) {
        println!("best of {} sets in sample: {:?}, Sharpe {:.2}", report.sets.len(), report.sets.get(best), report.set(0, best).sharpe);
    }
    if let Some(chosen) = &report.costs[0].per_asset {
        println!("chosen anew in {} windows, out of sample: Sharpe {:.2}", report.windows.len(), chosen.portfolio.sharpe);
    }
    Ok(())
}
