//! Market regimes from the library: found in hindsight, filtered without it, and a sweep that trades in calm ones alone.
//!
//!     cargo run --release --example 04_regimes
//!
//! prints
//!
//!     state 0: volatility 21.0 % a year, 398 bars at a time
//!     state 1: volatility 53.3 % a year, 15 bars at a time
//!     calm out of sample on 69 % of the bars
//!     11 of 15 windows chose the filter; out of sample: Sharpe -0.19

use forback::regimes::{Panel, Refits, RegimeConfig, Train, regimes, rolling};
use forback::sim::{grid::Grid, market, regime_filter::Gates, sweep::*};

fn main() -> forback::Result<()> {
    let (device, market) = (forback::Device::open("cpu")?, market::synthetic(2520, 1, 7)?);
    let panel = Panel { symbols: &market.symbols, close: market.close.view(), columns: Vec::new() };
    let config = RegimeConfig::default();

    // The whole sample, for looking: smoothed probabilities know the future, and no trading code takes them.
    let found = regimes(&device, &panel, &config, &mut |_| Ok(()))?;
    for (k, state) in found.models[0].states.iter().enumerate() {
        println!("state {k}: volatility {:.1} % a year, {:.0} bars at a time", 100.0 * state.volatility, state.duration);
    }

    // Refits on the past alone, for trading: state 0, the calm one, above one half.
    let known = rolling(&device, &panel, &config, Refits { every: 126, train: Train::Last(756) }, &mut |_| Ok(()))?;
    let gates = Gates::new(&known.filtered, &[0], &[0.0, 0.5])?;
    println!("calm out of sample on {:.0} % of the bars", 100.0 * gates.share(0.5));

    let mut sweep = SweepConfig::new(Grid::parse("sma_cross", Some("fast=5:50:5,slow=20:200:20"))?);
    sweep.regimes = Some(gates);
    let (report, _) = SweepRun::new(&device, market.close.view(), &sweep)?.whole(false, &mut |_| Ok(()))?;
    if let Some(chosen) = &report.costs[0].per_asset {
        let filtered = chosen.best.iter().filter(|&&set| report.sets.get(set as usize).last().is_some_and(|(_, p)| *p > 0.0)).count();
        println!("{filtered} of {} windows chose the filter; out of sample: Sharpe {:.2}", report.windows.len(), chosen.portfolio.sharpe);
    }
    Ok(())
}
