//! A walk-forward sweep from the library: crossings of moving averages on ten years of a synthetic market.
//!
//!     cargo run --release --example 02_sweep
//!
//! prints
//!
//!     best of 867 sets in sample: [("fast", 24.0), ("slow", 170.0), ("short", 0.0)], Sharpe 0.70
//!     chosen anew in 24 windows, out of sample: Sharpe 0.36

use forback::kernels::backtest_sweep::Execution;
use forback::kernels::philox::{normals, philox4x32};
use forback::sim::{grid::Grid, market::regime_switching_market, sweep::*};

fn main() -> forback::Result<()> {
    let market = regime_switching_market(2520, 1, |path, block| normals(philox4x32([path as u32, (path >> 32) as u32, block, 0], [7, 0])))?;
    let (grid, walk_forward) = (Grid::parse("sma_cross", Some("fast=2:50:2,slow=20:200:5"))?, Some("train=756,test=63".parse()?));
    let (execution, select, rank_by) = (Execution::NextClose, Select::PerAsset, RankBy::Sharpe);
    let config = SweepConfig { grid, cost_bps: vec![10.0], execution, walk_forward, select, rank_by, periods_per_year: 252.0, profile: false };
    let report = sweep(&forback::Device::open("cpu")?, market.close.view(), &config, 1_000_000, &mut |_| Ok(()))?;
    for best in report.ranked(0, rank_by, 1) {
        println!("best of {} sets in sample: {:?}, Sharpe {:.2}", report.sets.len(), report.sets.get(best), report.set(0, best).sharpe);
    }
    if let Some(chosen) = &report.costs[0].per_asset {
        println!("chosen anew in {} windows, out of sample: Sharpe {:.2}", report.windows.len(), chosen.portfolio.sharpe);
    }
    Ok(())
}
