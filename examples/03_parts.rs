//! A sweep in parts, as several machines would share it, and the trades of its best set.
//!
//!     cargo run --release --example 03_parts
//!
//! prints
//!
//!     3 parts choose as one run does: true
//!     set 154 traded 42 times

use forback::sim::{grid::Grid, market, parts, sweep::*};

fn main() -> forback::Result<()> {
    let (device, market) = (forback::Device::open("cpu")?, market::synthetic(2520, 2, 7)?);
    let config = SweepConfig::new(Grid::parse("donchian_breakout", Some("entry=10:100:5,exit=5:50:5"))?);
    let run = SweepRun::new(&device, market.close.view(), &config)?;

    let mut fold = parts::Fold::new(run.len(), config.cost_bps.len());
    for i in 1..=3 {
        fold.add(&run.part(parts::shard(run.len(), i, 3)?, false, &mut |_| Ok(()))?)?;
    }
    let together = run.finish(fold, &mut |_| Ok(()))?;

    let (whole, _) = run.whole(false, &mut |_| Ok(()))?;
    let chosen = |report: &SweepReport| report.costs[0].per_asset.as_ref().map(|chosen| (chosen.best.clone(), chosen.returns.clone()));
    println!("3 parts choose as one run does: {}", chosen(&together) == chosen(&whole));
    for best in whole.ranked(0, RankBy::Sharpe, 1) {
        for replay in run.replay(best)? {
            println!("set {best} traded {} times", replay.trades.len());
        }
    }
    Ok(())
}
