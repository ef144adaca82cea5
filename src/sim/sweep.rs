//! A walk-forward sweep over a panel of prices: the grid back-tested on every asset, the choice per window replayed out of sample,
//! and what it has to be compared with.

use super::grid::{Grid, ParameterSets};
use super::walk_forward::WalkForward;
use crate::kernels::backtest_sweep::{Chunk, Execution, Outcome, Selected, SetStats, Strategy, Sweep};
use crate::kernels::performance::{Performance, finish, performance_read};
use crate::{Device, Error, Result};
use ndarray::ArrayView2;
use std::cmp::Ordering;

/// What to sweep, beside the prices.
#[derive(Debug, Clone)]
pub struct SweepConfig {
    /// The grid, and with it the strategy.
    pub grid: Grid,
    /// One-way costs in basis points, at least one; the first is the one that sets are ranked by.
    pub cost_bps: Vec<f64>,
    /// When decisions are traded.
    pub execution: Execution,
    /// Walk-forward scheme; `None` sweeps in sample only.
    pub walk_forward: Option<WalkForward>,
    /// Which choices to make per window.
    pub select: Select,
    /// What sets are ranked by.
    pub rank_by: RankBy,
    /// Return periods per year.
    pub periods_per_year: f64,
    /// Time every launch.
    pub profile: bool,
}

/// Which choices the walk-forward makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Select {
    /// A set per window and asset.
    #[default]
    PerAsset,
    /// One set per window for all assets.
    Pooled,
    /// Both.
    Both,
}

/// What sets are ranked by; means over assets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RankBy {
    /// Highest Sharpe ratio first.
    #[default]
    Sharpe,
    /// Highest total return first.
    TotalReturn,
    /// Smallest drawdown first.
    MaxDrawdown,
    /// Smallest turnover first.
    Turnover,
}

impl RankBy {
    /// Names on the command line.
    pub const NAMES: [&str; 4] = ["sharpe", "total_return", "max_drawdown", "turnover"];

    /// The ranking of that name.
    pub fn named(name: &str) -> Result<RankBy> {
        match name {
            "sharpe" => Ok(RankBy::Sharpe),
            "total_return" => Ok(RankBy::TotalReturn),
            "max_drawdown" => Ok(RankBy::MaxDrawdown),
            "turnover" => Ok(RankBy::Turnover),
            _ => Err(Error::Unknown {
                kind: "ranking",
                given: name.into(),
                suggestion: crate::data::nearest(name, RankBy::NAMES),
                known: RankBy::NAMES.map(String::from).to_vec(),
            }),
        }
    }

    /// Larger is better.
    fn score(self, s: &SetMean) -> f64 {
        match self {
            RankBy::Sharpe => s.sharpe,
            RankBy::TotalReturn => s.total_return,
            RankBy::MaxDrawdown => -s.max_drawdown,
            RankBy::Turnover => -s.turnover,
        }
    }
}

/// Statistics of a set, as means over assets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SetMean {
    /// Mean of the defined annualised Sharpe ratios; NaN if none is.
    pub sharpe: f64,
    /// Mean compounded return.
    pub total_return: f64,
    /// Mean of the largest drawdowns.
    pub max_drawdown: f64,
    /// Mean turnover over all bars.
    pub turnover: f64,
    /// Trades on all assets.
    pub trades: u64,
}

/// Sums over assets, 24 bytes a set.
#[derive(Debug, Clone, Copy, Default)]
struct SetSum {
    sharpe: f32,
    defined: u32,
    total_return: f32,
    max_drawdown: f32,
    turnover: f32,
    trades: u32,
}

impl SetSum {
    fn add(&mut self, s: &SetStats) {
        if !s.sharpe.is_nan() {
            self.sharpe += s.sharpe as f32;
            self.defined += 1;
        }
        self.total_return += s.total_return as f32;
        self.max_drawdown += s.max_drawdown as f32;
        self.turnover += s.turnover as f32;
        self.trades = self.trades.saturating_add(s.trades.min(u64::from(u32::MAX)) as u32);
    }

    fn mean(&self, assets: usize) -> SetMean {
        let n = assets as f64;
        SetMean {
            sharpe: if self.defined == 0 { f64::NAN } else { f64::from(self.sharpe) / f64::from(self.defined) },
            total_return: f64::from(self.total_return) / n,
            max_drawdown: f64::from(self.max_drawdown) / n,
            turnover: f64::from(self.turnover) / n,
            trades: u64::from(self.trades),
        }
    }
}

/// An equal-weight portfolio and its assets, over the stitched out-of-sample bars.
#[derive(Debug, Clone)]
pub struct OutOfSample {
    /// The portfolio of all assets, rebalanced to equal weights every bar at no cost.
    pub portfolio: Performance,
    /// Its returns [K].
    pub returns: Vec<f32>,
    /// Each asset on its own [N].
    pub assets: Vec<Performance>,
    /// Turnover per asset and bar, on average.
    pub turnover: f64,
    /// Trades on all assets.
    pub trades: u64,
    /// Chosen set per window: [N,W], [W] if pooled, empty for buy-and-hold.
    pub best: Vec<u32>,
}

/// Results at one cost level.
#[derive(Debug, Clone)]
pub struct CostLevel {
    /// One-way cost in basis points.
    pub cost_bps: f64,
    /// Walk-forward with a set per window and asset.
    pub per_asset: Option<OutOfSample>,
    /// Walk-forward with one set per window.
    pub pooled: Option<OutOfSample>,
    sums: Vec<SetSum>,
}

/// What a sweep found.
#[derive(Debug)]
pub struct SweepReport {
    /// The sets.
    pub sets: ParameterSets,
    /// Assets N.
    pub assets: usize,
    /// Bars T.
    pub bars: usize,
    /// First counted return: the longest warm-up of the grid.
    pub start: u32,
    /// Windows [W]: train start, train end, test start, test end on the return index.
    pub windows: Vec<[u32; 4]>,
    /// Return indices of the stitched bars [K].
    pub stitched_bars: Vec<u32>,
    /// Each cost level.
    pub costs: Vec<CostLevel>,
    /// Buy-and-hold over the same stitched bars (over all counted bars without a walk-forward), before costs.
    pub buy_and_hold: Option<OutOfSample>,
    /// Launches on the device.
    pub launches: usize,
    /// Submits.
    pub submits: usize,
    /// Times of the launches, if asked for.
    pub profile: Vec<crate::kernels::LaunchTime>,
}

impl SweepReport {
    /// Set-bars that were simulated: sets × assets × returns × cost levels.
    pub fn work(&self) -> f64 {
        self.sets.len() as f64 * self.assets as f64 * self.bars.saturating_sub(1) as f64 * self.costs.len() as f64
    }

    /// Statistics of a set at a cost level.
    pub fn set(&self, cost: usize, set: usize) -> SetMean {
        self.costs[cost].sums[set].mean(self.assets)
    }

    /// The best `top` sets at a cost level; ties: lowest index first, undefined last.
    pub fn ranked(&self, cost: usize, rank_by: RankBy, top: usize) -> Vec<usize> {
        let scores: Vec<f64> = (0..self.sets.len()).map(|s| rank_by.score(&self.set(cost, s))).collect();
        let order = |a: &usize, b: &usize| match (scores[*a].is_nan(), scores[*b].is_nan()) {
            (false, false) => scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)),
            (x, y) => x.cmp(&y).then(Ordering::Equal).then(a.cmp(b)),
        };
        let mut sets: Vec<usize> = (0..self.sets.len()).collect();
        let top = top.min(sets.len());
        if top < sets.len() && top > 0 {
            sets.select_nth_unstable_by(top - 1, order);
        }
        sets.truncate(top);
        sets.sort_by(order);
        sets
    }
}

/// First counted return: the longest warm-up of the grid.
/// # Errors
/// `Parameter` if it leaves fewer than the two returns that a Sharpe ratio needs.
pub fn first_return(grid: &Grid, bars: usize) -> Result<u32> {
    let first = grid.warm_up();
    let least = u64::from(first) + 3;
    if bars as u64 >= least {
        return Ok(first);
    }
    let help = format!(
        "its longest window warms up over {first} bars and two returns after that are the least, {least} bars; \
         the history has {bars} bars: set shorter windows, or use more bars"
    );
    Err(Error::Parameter { op: "sweep", name: "grid".into(), value: grid.to_string(), help })
}

/// Sweeps a panel of closes [T,N].
///
/// `visit` sees every chunk of statistics once, as soon as it is there (progress, files).
/// # Errors
/// As [`Sweep::run`]; `Parameter` if the history is too short for the grid's windows or a walk-forward window.
pub fn sweep(
    device: &Device,
    close: ArrayView2<'_, f32>,
    config: &SweepConfig,
    limit: u64,
    visit: &mut dyn FnMut(&Chunk) -> Result<()>,
) -> Result<SweepReport> {
    let (bars, assets) = close.dim();
    let sets = config.grid.sets(limit)?;
    let returns = bars.saturating_sub(1) as u32;
    let start = first_return(&config.grid, bars)?;
    let windows = match &config.walk_forward {
        Some(scheme) => scheme.windows(start, returns)?,
        None => Vec::new(),
    };
    let close = close.as_standard_layout();
    let close = close.as_slice().ok_or_else(|| Error::Internal("a standard layout is contiguous".into()))?;
    let columns: Vec<(&str, &[f32])> = sets.names.iter().copied().zip(sets.columns.iter().map(Vec::as_slice)).collect();
    let job = Sweep {
        close,
        open: None,
        assets,
        strategy: Strategy::named(sets.strategy.name)?,
        parameters: &columns,
        cost_bps: &config.cost_bps,
        execution: config.execution,
        start,
        periods_per_year: config.periods_per_year,
        windows: &windows,
        stitch_ends: None,
        per_asset: config.select != Select::Pooled,
        pooled: config.select != Select::PerAsset,
        scores: false,
        profile: config.profile,
    };
    let mut sums = vec![vec![SetSum::default(); sets.len()]; config.cost_bps.len()];
    let outcome = job.run(device, &mut |chunk| {
        for set in chunk.sets.clone() {
            for asset in chunk.assets.clone() {
                sums[chunk.cost][set].add(&chunk.stats(set, asset));
            }
        }
        visit(chunk)
    })?;
    let Outcome { per_asset, pooled, stitched_bars, launches, submits, profile } = outcome;
    let counted: Vec<u32> = if windows.is_empty() { (start..returns).collect() } else { stitched_bars.clone() };
    let mut compare = Comparison { device, assets, periods_per_year: config.periods_per_year };
    let (mut per_asset, mut pooled) = (per_asset.into_iter(), pooled.into_iter());
    let mut costs = Vec::with_capacity(sums.len());
    for (sums, &cost_bps) in sums.into_iter().zip(&config.cost_bps) {
        let per_asset = per_asset.next().filter(|s| !s.stitched.is_empty()).map(|s| compare.selected(s)).transpose()?;
        let pooled = pooled.next().filter(|s| !s.stitched.is_empty()).map(|s| compare.selected(s)).transpose()?;
        costs.push(CostLevel { cost_bps, per_asset, pooled, sums });
    }
    let buy_and_hold = if counted.is_empty() { None } else { Some(compare.buy_and_hold(close, &counted)?) };
    Ok(SweepReport { sets, assets, bars, start, windows, stitched_bars, costs, buy_and_hold, launches, submits, profile })
}

/// Turns stitched series into what is printed.
struct Comparison<'a> {
    device: &'a Device,
    assets: usize,
    periods_per_year: f64,
}

impl Comparison<'_> {
    /// Mean over assets of `series` [N,K], bar by bar.
    fn portfolio(&self, series: &[f32]) -> Vec<f32> {
        let bars = series.len() / self.assets;
        (0..bars).map(|k| (series.iter().skip(k).step_by(bars).map(|&x| f64::from(x)).sum::<f64>() / self.assets as f64) as f32).collect()
    }

    fn performance(&self, series: &[f32], n: usize) -> Result<Vec<Performance>> {
        let bars = (series.len() / n) as u64;
        let mut pass = self.device.pass("performance");
        let returns = self.device.upload("returns", series)?;
        let read = performance_read(&mut pass, &returns, n as u64, bars)?;
        Ok(finish(&pass.submit()?.f64(read)?, bars, self.periods_per_year))
    }

    fn of(&mut self, series: &[f32], assets: Vec<Performance>) -> Result<OutOfSample> {
        let returns = self.portfolio(series);
        let portfolio = self.performance(&returns, 1)?.into_iter().next().ok_or_else(|| Error::Internal("one series has one performance".into()))?;
        Ok(OutOfSample { portfolio, returns, assets, turnover: 0.0, trades: 0, best: Vec::new() })
    }

    fn selected(&mut self, selected: Selected) -> Result<OutOfSample> {
        let turnover = selected.turnover.iter().sum::<f64>() / selected.stitched.len().max(1) as f64;
        let trades = selected.trades.iter().sum();
        let out = self.of(&selected.stitched, selected.performance)?;
        Ok(OutOfSample { turnover, trades, best: selected.best, ..out })
    }

    fn buy_and_hold(&mut self, close: &[f32], bars: &[u32]) -> Result<OutOfSample> {
        let n = self.assets;
        let at = |j: usize, a: usize| f64::from(close[j * n + a]);
        let series: Vec<f32> = (0..n).flat_map(|a| bars.iter().map(move |&j| (j as usize, a))).map(|(j, a)| (at(j + 1, a) / at(j, a) - 1.0) as f32).collect();
        let assets = self.performance(&series, n)?;
        self.of(&series, assets)
    }
}
