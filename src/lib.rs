//! Back-test sweeps, and the kernels under them, on any device.
//!
//! # A tour
//!
//! 1. **Prices** are an `ndarray` [T,N] of f32: your own, [`data::read_prices`] from CSV or Parquet files, or [`sim::market::synthetic`].
//! 2. A **grid** is text, [`sim::grid::Grid`]: ranges, lists, constraints, and the sides, stops and sizes of [`sim::grid::OVERLAYS`].
//! 3. A **device** is opened by name, [`Device::open`]: `auto`, `cpu`, `wgpu`, `cuda`. No type of wgpu or of a CUDA crate appears anywhere.
//! 4. A **sweep**, [`sim::sweep::sweep`], scores every set on every asset, chooses per walk-forward window, and stitches what the choices
//!    earned out of sample: a [`sim::sweep::SweepReport`] of plain numbers.
//! 5. **Luck**, [`sim::luck::luck`], says what the best of so many sets is worth.
//!
//! ```
//! use forback::sim::{grid::Grid, luck::*, market, sweep::*};
//!
//! # fn main() -> forback::Result<()> {
//! let device = forback::Device::open("cpu")?;
//! let market = market::synthetic(1260, 1, 7)?;
//! let config = SweepConfig::new(Grid::parse("sma_cross", Some("fast=2:20:2,slow=30:90:10,trailing_stop=0|0.05"))?);
//! let run = SweepRun::new(&device, market.close.view(), &config)?;
//! let (report, _) = run.whole(false, &mut |_| Ok(()))?;
//! let best = report.ranked(0, RankBy::Sharpe, 1)[0];
//!
//! let ratios = (0..report.sets.len()).map(|set| report.set(0, set).sharpe).collect();
//! let (selected, sample) = (run.portfolios(0, &[best])?, run.portfolios(0, &(0..report.sets.len()).collect::<Vec<_>>())?);
//! let evidence = Evidence { ratios, selected: &selected, stitched: &[], sample: &sample, periods_per_year: 252.0 };
//! let luck = luck(&device, &evidence, &LuckConfig::default())?;
//! // In a synthetic market the best set of one half of time is nothing special in the other.
//! assert!(luck.overfitting.is_some_and(|o| o.pbo > 0.5));
//! # Ok(()) }
//! ```
//!
//! Further on: [`sim::sweep::SweepRun::replay`] for every trade of one set, [`sim::parts`] for shards of a sweep on several machines,
//! [`sim::portfolio`] for shared capital, [`report`] for the page, [`kernels::multiple_testing`], and the kernels themselves in
//! [`kernels`], which record into a [`kernels::Pass`] and run at one submit.

#![forbid(unsafe_code)]

#[cfg(feature = "cli")]
pub mod cli;
pub mod conformance;
pub mod data;
pub mod nn;
pub mod ops;
pub mod plan;
pub mod regimes;
pub mod report;
pub mod sim;
pub mod tape;
pub mod train;

pub use forback_kernels as kernels;
pub use forback_kernels::{Device, DeviceInfo, DeviceKind, Error, OpenOptions, Result};
