//! A walk-forward sweep over a panel of prices: the grid back-tested on every asset, the choice per window replayed out of sample,
//! and what it has to be compared with.
//!
//! [`sweep`] is the whole of it in one call. A [`SweepRun`] is the same made ready, to be run whole ([`SweepRun::whole`]) or in
//! [`parts`](super::parts), with the same bits, and to replay single sets.
//!
//! Sets  a position counts the sets that run, 0 to S−1; [`SweepRun::id`] is the set's number in the grid. They differ where sets were
//!       drawn at random.

use super::grid::{Grid, ParameterSets};
use super::parts::{Fold, Part, Row, SetSum, Winner, Winners};
use super::portfolio::{Pooled, Pooling, portfolio_of};
use super::regime_filter::{self, Gates};
use super::sample::{LISTED, sample};
use super::walk_forward::WalkForward;
use crate::kernels::backtest_sweep::{Chunk, Execution, Outcome, Selected, Strategy, Sweep};
use crate::kernels::performance::{Performance, finish, performance_read};
use crate::kernels::portfolio_sweep::{Rebalance, Scheme};
use crate::{Device, Error, Result};
use ndarray::{Array2, Array3, ArrayView2, Axis, Slice};
use rayon::prelude::*;
use std::borrow::Cow;
use std::cmp::Ordering;
use std::ops::Range;

/// Bars of all sets of an asset that one launch replays.
const REPLAYED_BARS: usize = 1 << 18;

/// Most sets of one sweep unless `SweepConfig::limit` says otherwise: 100 bytes of host memory each.
pub const MOST_SETS: u64 = 50_000_000;

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
    /// Portfolios with shared capital to pool what a walk-forward chose into.
    pub portfolios: Vec<Scheme>,
    /// When and how far they trade.
    pub rebalance: Rebalance,
    /// Trade in some regimes only; every set runs at every threshold.
    pub regimes: Option<Gates>,
    /// Sets drawn from the grid, instead of all.
    pub random: Option<Random>,
    /// Most sets to run.
    pub limit: u64,
    /// Time every launch.
    pub profile: bool,
}

impl SweepConfig {
    /// The grid at 10 bp, traded at the next close, chosen anew per asset for every quarter on three years of daily bars, by Sharpe ratio.
    pub fn new(grid: Grid) -> SweepConfig {
        SweepConfig {
            grid,
            cost_bps: vec![10.0],
            execution: Execution::NextClose,
            walk_forward: Some(WalkForward::default()),
            select: Select::default(),
            rank_by: RankBy::default(),
            portfolios: Vec::new(),
            rebalance: Rebalance::default(),
            regimes: None,
            periods_per_year: 252.0,
            random: None,
            limit: MOST_SETS,
            profile: false,
        }
    }
}

/// A draw of sets without replacement; see [`sample`](mod@super::sample).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Random {
    /// How many.
    pub sets: u64,
    /// Seed of the draw.
    pub seed: u64,
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
    /// Position of the chosen set per window: [N,W], [W] if pooled, empty for buy-and-hold.
    pub best: Vec<u32>,
    /// The assets pooled with shared capital and drifting weights, flat in gaps between windows: as `SweepConfig::portfolios` asks.
    pub portfolios: Vec<(Scheme, Pooled)>,
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
    /// The sets that ran, by position.
    pub sets: ParameterSets,
    /// Their numbers in the grid, where sets were drawn at random.
    pub ids: Option<Vec<u64>>,
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

    /// Number of a set in the grid.
    pub fn id(&self, set: usize) -> u64 {
        self.ids.as_ref().and_then(|ids| ids.get(set)).copied().unwrap_or(set as u64)
    }

    /// Statistics of a set at a cost level.
    pub fn set(&self, cost: usize, set: usize) -> SetMean {
        self.costs[cost].sums[set].mean(self.assets)
    }

    /// The best `top` sets at a cost level; ties: lowest index first, undefined last.
    pub fn ranked(&self, cost: usize, rank_by: RankBy, top: usize) -> Vec<usize> {
        ranked(&self.costs[cost].sums, self.assets, rank_by, top)
    }
}

/// Positions of the best `top` of some sets; ties: lowest index first, undefined last.
pub(super) fn ranked(sums: &[SetSum], assets: usize, rank_by: RankBy, top: usize) -> Vec<usize> {
    let scores: Vec<f64> = sums.iter().map(|sum| rank_by.score(&sum.mean(assets))).collect();
    let order = |a: &usize, b: &usize| match (scores[*a].is_nan(), scores[*b].is_nan()) {
        (false, false) => scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)),
        (x, y) => x.cmp(&y).then(Ordering::Equal).then(a.cmp(b)),
    };
    let mut sets: Vec<usize> = (0..sums.len()).collect();
    let top = top.min(sets.len());
    if top < sets.len() && top > 0 {
        sets.select_nth_unstable_by(top - 1, order);
    }
    sets.truncate(top);
    sets.sort_by(order);
    sets
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

impl SweepConfig {
    /// First counted return: the longest warm-up of the grid, and the first decision with a regime probability where there are gates.
    /// # Errors
    /// As [`first_return`]; `Parameter` if the gates leave fewer than two returns.
    pub fn first_return(&self, bars: usize) -> Result<u32> {
        let first = first_return(&self.grid, bars)?;
        let Some(gates) = &self.regimes else { return Ok(first) };
        let known = gates.first_bar() + regime_filter::lag(self.execution);
        if known + 3 > bars {
            let help = format!("the first probability is there at bar {} of {bars}: use more bars, or an earlier first refit", gates.first_bar());
            return Err(Error::Parameter { op: "sweep", name: "regimes".into(), value: "too late".into(), help });
        }
        Ok(first.max(known as u32))
    }
}

/// Sweeps a panel of closes [T,N].
///
/// # Errors
/// As [`Sweep::run`]; `Parameter` if the history is too short for the grid's windows or a walk-forward window.
pub fn sweep(device: &Device, close: ArrayView2<'_, f32>, config: &SweepConfig) -> Result<SweepReport> {
    let (report, _) = SweepRun::new(device, close, config)?.whole(false, &mut |_| Ok(()))?;
    Ok(report)
}

fn slice_of(prices: ArrayView2<'_, f32>) -> Cow<'_, [f32]> {
    prices.to_slice().map_or_else(|| Cow::Owned(prices.iter().copied().collect()), Cow::Borrowed)
}

/// Gated weights that are held at once: 64 MiB.
const GATED_VALUES: usize = 16 << 20;

/// Values that portfolios are averaged from at once.
const PORTFOLIO_VALUES: usize = 1 << 23;

/// The open after each bar [T,N]; after the last there is only its close.
fn next_opens(close: &[f32], open: &[f32], assets: usize) -> Vec<f32> {
    open.iter().skip(assets).chain(&close[close.len() - assets..]).copied().collect()
}

/// Prices [T,N] at which what is decided at each close is traded: the next opens where there are any, else the closes.
#[cfg(feature = "cli")]
pub(crate) fn fills<'a>(close: ArrayView2<'a, f32>, open: Option<ArrayView2<'_, f32>>) -> Cow<'a, [f32]> {
    match open {
        Some(open) => Cow::Owned(next_opens(&slice_of(close), &slice_of(open), close.dim().1)),
        None => slice_of(close),
    }
}

/// Which sets run, and where their parameters stand in the columns.
enum Chosen {
    /// All of the columns.
    All,
    /// These of the columns, which hold the whole grid.
    Picked(Vec<u32>),
    /// All of the columns, which hold sets of these numbers.
    Drawn(Vec<u64>),
}

/// A sweep made ready: prices, sets and windows are checked, nothing has run.
pub struct SweepRun<'a> {
    device: &'a Device,
    config: &'a SweepConfig,
    close: Cow<'a, [f32]>,
    open: Option<Cow<'a, [f32]>>,
    bars: usize,
    assets: usize,
    strategy: Strategy,
    columns: ParameterSets,
    chosen: Chosen,
    start: u32,
    windows: Vec<[u32; 4]>,
}

/// Every set at every threshold, which varies fastest.
fn gated(mut columns: ParameterSets, chosen: Chosen, thresholds: &[f32], limit: u64) -> Result<(ParameterSets, Chosen)> {
    let (sets, g) = (columns.len(), thresholds.len());
    let needed = (sets * g) as u64;
    if needed > limit.min(u64::from(u32::MAX)) {
        let help = "use fewer thresholds, or wider steps in the grid".into();
        return Err(Error::TooLarge { what: format!("{sets} sets at {g} thresholds"), needed, limit, unit: "sets", help });
    }
    for column in &mut columns.columns {
        *column = column.iter().flat_map(|&x| std::iter::repeat_n(x, g)).collect();
    }
    columns.names.push(regime_filter::PARAMETER);
    columns.columns.push(thresholds.iter().copied().cycle().take(sets * g).collect());
    let chosen = match chosen {
        Chosen::All => Chosen::All,
        Chosen::Picked(ids) => Chosen::Picked(ids.iter().flat_map(|&id| (0..g as u32).map(move |t| id * g as u32 + t)).collect()),
        Chosen::Drawn(ids) => Chosen::Drawn(ids.iter().flat_map(|&id| (0..g as u64).map(move |t| id * g as u64 + t)).collect()),
    };
    Ok((columns, chosen))
}

/// What some sets gave.
struct Executed {
    sums: Vec<Vec<SetSum>>,
    rows: Option<Array3<Row>>,
    outcome: Outcome,
}

/// Weights over all bars of (column, asset).
type WeightsOf<'a> = dyn Fn(usize, usize) -> Vec<f32> + Sync + 'a;
/// What takes the weights of some columns: the first one's position, the columns, their weights.
type UseWeights<'a> = dyn FnMut(usize, &[u32], &WeightsOf<'_>) -> Result<()> + 'a;

impl<'a> SweepRun<'a> {
    /// A sweep over closes [T,N].
    /// # Errors
    /// `Parameter` if the history is too short for the grid's windows or a walk-forward window; `TooLarge` above the config's limit.
    pub fn new(device: &'a Device, close: ArrayView2<'a, f32>, config: &'a SweepConfig) -> Result<SweepRun<'a>> {
        let (bars, assets) = close.dim();
        let start = config.first_return(bars)?;
        if let Some(gates) = config.regimes.as_ref().filter(|gates| gates.dim() != (assets, bars)) {
            let (n, t) = gates.dim();
            let expected = format!("of the closes' [{bars},{assets}]");
            return Err(Error::Shape { op: "sweep", arg: "regimes".into(), expected, got: format!("[{t},{n}]") });
        }
        let windows = match &config.walk_forward {
            Some(scheme) => scheme.windows(start, bars.saturating_sub(1) as u32)?,
            None => Vec::new(),
        };
        let (mut columns, mut chosen) = match config.random {
            None => (config.grid.sets(config.limit)?, Chosen::All),
            Some(Random { sets, seed }) => {
                let drawn = sample(&config.grid, sets, seed, config.limit)?;
                // Beside the whole columns a set gives the same bits as in the whole sweep.
                if config.grid.is_counted() && config.grid.raw_len() <= LISTED {
                    (config.grid.sets(LISTED as u64)?, Chosen::Picked(drawn.ids.iter().map(|&id| id as u32).collect()))
                } else {
                    (drawn.sets, Chosen::Drawn(drawn.ids))
                }
            }
        };
        if let Some(gates) = &config.regimes {
            (columns, chosen) = gated(columns, chosen, gates.thresholds(), config.limit)?;
        }
        let close = slice_of(close);
        let strategy = Strategy::named(columns.strategy.name)?;
        Ok(SweepRun { device, config, close, open: None, bars, assets, strategy, columns, chosen, start, windows })
    }

    /// The same with opens [T,N], which `next_open` trades at.
    #[must_use]
    pub fn with_open(self, open: ArrayView2<'a, f32>) -> SweepRun<'a> {
        SweepRun { open: Some(slice_of(open)), ..self }
    }

    /// Prices [T,N] at which what is decided for return j is traded.
    pub(crate) fn fills(&self) -> Cow<'_, [f32]> {
        match (&self.open, self.config.execution) {
            (Some(open), Execution::NextOpen) => Cow::Owned(next_opens(&self.close, open, self.assets)),
            _ => Cow::Borrowed(&self.close),
        }
    }

    /// Sets that run, S.
    #[allow(clippy::len_without_is_empty, reason = "a sweep has at least one set")]
    pub fn len(&self) -> usize {
        match &self.chosen {
            Chosen::Picked(ids) => ids.len(),
            _ => self.columns.len(),
        }
    }

    /// Assets N.
    pub fn assets(&self) -> usize {
        self.assets
    }

    /// The config that it was made of.
    pub fn config(&self) -> &SweepConfig {
        self.config
    }

    /// Windows [W].
    pub fn windows(&self) -> &[[u32; 4]] {
        &self.windows
    }

    /// First counted return.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// How many times longer than usual a set-bar takes, as a first guess: gated weights are scored outside the kernel.
    pub fn slowness(&self) -> f64 {
        if self.config.regimes.is_some() { 40.0 } else { 1.0 }
    }

    /// Set-bars of one set: assets × returns × cost levels.
    pub fn work_per_set(&self) -> f64 {
        self.assets as f64 * self.bars.saturating_sub(1) as f64 * self.config.cost_bps.len() as f64
    }

    /// Number in the grid of the set at a position.
    pub fn id(&self, position: usize) -> u64 {
        match &self.chosen {
            Chosen::All => position as u64,
            Chosen::Picked(ids) => ids.get(position).map_or(u64::MAX, |&id| u64::from(id)),
            Chosen::Drawn(ids) => ids.get(position).copied().unwrap_or(u64::MAX),
        }
    }

    /// Position of the set of that number in the grid.
    pub fn position(&self, id: u64) -> Option<usize> {
        match &self.chosen {
            Chosen::All => (id < self.columns.len() as u64).then_some(id as usize),
            Chosen::Picked(ids) => u32::try_from(id).ok().and_then(|id| ids.binary_search(&id).ok()),
            Chosen::Drawn(ids) => ids.binary_search(&id).ok(),
        }
    }

    /// Names and values of the set at a position.
    pub fn set(&self, position: usize) -> Vec<(&'static str, f32)> {
        self.columns.get(self.column(position) as usize)
    }

    /// The sets that run, by position.
    pub fn sets(&self) -> ParameterSets {
        match &self.chosen {
            Chosen::Picked(ids) => {
                let mut sets = ParameterSets { columns: vec![Vec::new(); self.columns.columns.len()], ..self.columns.clone() };
                for (to, from) in sets.columns.iter_mut().zip(&self.columns.columns) {
                    to.extend(ids.iter().map(|&id| from[id as usize]));
                }
                sets
            }
            _ => self.columns.clone(),
        }
    }

    /// Index into the columns.
    fn column(&self, position: usize) -> u32 {
        match &self.chosen {
            Chosen::Picked(ids) => ids.get(position).copied().unwrap_or(u32::MAX),
            _ => position as u32,
        }
    }

    fn position_of_column(&self, column: u32) -> u32 {
        match &self.chosen {
            Chosen::Picked(ids) => ids.binary_search(&column).map_or(u32::MAX, |position| position as u32),
            _ => column,
        }
    }

    fn job<R>(&self, only: Option<&[u32]>, stitch: bool, run: impl FnOnce(&Sweep<'_>) -> Result<R>) -> Result<R> {
        let parameters: Vec<(&str, &[f32])> = self.columns.names.iter().copied().zip(self.columns.columns.iter().map(Vec::as_slice)).collect();
        let nothing: Vec<u32> = self.windows.iter().map(|w| w[2]).collect();
        run(&Sweep {
            close: &self.close,
            open: self.open.as_deref(),
            assets: self.assets,
            strategy: self.strategy,
            parameters: &parameters,
            only,
            cost_bps: &self.config.cost_bps,
            execution: self.config.execution,
            start: self.start,
            periods_per_year: self.config.periods_per_year,
            windows: &self.windows,
            stitch_ends: (!stitch).then_some(&nothing),
            per_asset: self.config.select != Select::Pooled,
            pooled: self.config.select != Select::PerAsset,
            scores: false,
            profile: self.config.profile,
        })
    }

    /// Runs the sets at ascending positions (`None`: all). Choices in the outcome are positions.
    fn execute(&self, positions: Option<&[u32]>, stitch: bool, keep: bool, visit: &mut dyn FnMut(&Chunk) -> Result<()>) -> Result<Executed> {
        let only: Option<Vec<u32>> = match (positions, &self.chosen) {
            (Some(positions), _) => Some(positions.iter().map(|&p| self.column(p as usize)).collect()),
            (None, Chosen::Picked(ids)) => Some(ids.clone()),
            (None, _) => None,
        };
        let (sets, assets, costs) = (positions.map_or(self.len(), <[u32]>::len), self.assets, self.config.cost_bps.len());
        if let Some(gates) = &self.config.regimes {
            let columns = only.unwrap_or_else(|| (0..self.columns.len() as u32).collect());
            return self.execute_gated(gates, &columns, stitch, keep);
        }
        let mut sums = vec![vec![SetSum::default(); sets]; costs];
        let mut rows = keep.then(|| Array3::from_elem((costs, sets, assets), Row::default()));
        let mut outcome = self.job(only.as_deref(), stitch, |job| {
            job.run(self.device, &mut |chunk| {
                for set in chunk.sets.clone() {
                    for asset in chunk.assets.clone() {
                        let row = Row::of(&chunk.stats(set, asset));
                        sums[chunk.cost][set].add(&row);
                        if let Some(rows) = &mut rows {
                            rows[[chunk.cost, set, asset]] = row;
                        }
                    }
                }
                visit(chunk)
            })
        })?;
        for best in outcome.per_asset.iter_mut().chain(&mut outcome.pooled).flat_map(|selected| &mut selected.best) {
            *best = self.position_of_column(*best);
        }
        Ok(Executed { sums, rows, outcome })
    }

    /// The same with gates: sets that differ in the threshold alone share their positions.
    fn execute_gated(&self, gates: &Gates, columns: &[u32], stitch: bool, keep: bool) -> Result<Executed> {
        let (n, costs, w) = (self.assets, self.config.cost_bps.len(), self.windows.len());
        let mut sums = vec![vec![SetSum::default(); columns.len()]; costs];
        let mut rows = keep.then(|| Array3::from_elem((costs, columns.len(), n), Row::default()));
        let (per_asset, pooled) = (self.config.select != Select::Pooled && w > 0, self.config.select != Select::PerAsset && w > 0);
        let mut keys = vec![vec![Vec::new(); columns.len()]; costs];
        let mut pooled_keys = keys.clone();
        let mut outcome = Outcome::default();
        let returns = self.fill_returns();
        self.positions(columns, &mut |first, few, weights| {
            // A replay counts as one launch.
            outcome.launches += 1;
            outcome.submits += 1;
            let scored: Vec<Vec<Vec<regime_filter::Scored>>> = few
                .par_iter()
                .enumerate()
                .map(|(s, &column)| {
                    let of = |asset: usize| {
                        let gated = self.gated_weights(gates, column, asset, &weights(s, asset));
                        let score = |bps: &f64| {
                            let net = regime_filter::net(&gated, &returns[asset], bps * 1e-4);
                            regime_filter::score(&gated, &net, self.start as usize, &self.windows, self.config.periods_per_year)
                        };
                        self.config.cost_bps.iter().map(score).collect()
                    };
                    (0..n).map(of).collect()
                })
                .collect();
            for (s, by_asset) in scored.iter().enumerate() {
                for (asset, by_cost) in by_asset.iter().enumerate() {
                    for (cost, scored) in by_cost.iter().enumerate() {
                        sums[cost][first + s].add(&scored.row);
                        if let Some(rows) = &mut rows {
                            rows[[cost, first + s, asset]] = scored.row;
                        }
                        if per_asset {
                            keys[cost][first + s].extend(scored.train.iter().map(|m| regime_filter::key(m.sharpe())));
                        }
                    }
                }
                for cost in (0..costs).filter(|_| pooled) {
                    let all = |i: usize| by_asset.iter().fold(regime_filter::Moments::default(), |sum, by_cost| sum.and(by_cost[cost].train[i]));
                    pooled_keys[cost][first + s] = (0..w).map(|i| regime_filter::key(all(i).sharpe())).collect();
                }
            }
            Ok(())
        })?;
        outcome.stitched_bars = regime_filter::stitched(&self.windows).into_iter().flatten().map(|j| j as u32).collect();
        for (wanted, keys, count, all) in
            [(self.config.select != Select::Pooled, &keys, n * w, true), (self.config.select != Select::PerAsset, &pooled_keys, w, false)]
        {
            if !wanted {
                continue;
            }
            let mut list = Vec::with_capacity(costs);
            for (keys, &bps) in keys.iter().zip(&self.config.cost_bps) {
                let mut selected = regime_filter::selected(if w > 0 { regime_filter::winners(keys, count) } else { Vec::new() });
                selected.performance = regime_filter::nothing(n);
                if stitch && w > 0 {
                    self.stitch_gated(gates, columns, &returns, bps, &mut selected)?;
                }
                for best in &mut selected.best {
                    *best = self.position_of_column(columns[*best as usize]);
                }
                list.push(selected);
            }
            if all { outcome.per_asset = list } else { outcome.pooled = list }
        }
        Ok(Executed { sums, rows, outcome })
    }

    /// The stitched series of a choice among `columns`, and their performance.
    fn stitch_gated(&self, gates: &Gates, columns: &[u32], returns: &[Vec<f32>], bps: f64, selected: &mut Selected) -> Result<()> {
        let mut chosen: Vec<u32> = selected.best.iter().map(|&best| columns[best as usize]).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let mut held = std::collections::HashMap::new();
        self.positions(&chosen, &mut |_, few, weights| {
            for (s, &column) in few.iter().enumerate() {
                held.insert(column, (0..self.assets).map(|asset| self.gated_weights(gates, column, asset, &weights(s, asset))).collect::<Vec<_>>());
            }
            Ok(())
        })?;
        let series = |set: u32, asset: usize| {
            let weights =
                held.get(&columns[set as usize]).map(|assets| assets[asset].clone()).ok_or_else(|| Error::Internal("a chosen set did not run".into()))?;
            let net = regime_filter::net(&weights, &returns[asset], bps * 1e-4);
            Ok((weights, net))
        };
        regime_filter::stitch(selected, self.assets, &self.windows, &series)?;
        let compare = Comparison { device: self.device, assets: self.assets, periods_per_year: self.config.periods_per_year };
        if !selected.stitched.is_empty() {
            selected.performance = compare.performance(&selected.stitched, self.assets)?;
        }
        Ok(())
    }

    /// Ungated weights of columns at ascending indices, some at a time: `use_them(first, columns, weights of (i, asset))`.
    fn positions(&self, columns: &[u32], use_them: &mut UseWeights<'_>) -> Result<()> {
        let g = self.config.regimes.as_ref().map_or(1, |gates| gates.thresholds().len()) as u32;
        let bars = self.bars.saturating_sub(1);
        let most = (GATED_VALUES / (bars * self.assets).max(1)).max(1);
        let mut first = 0;
        while first < columns.len() {
            let end = columns.len().min(first + most);
            let few = &columns[first..end];
            // A threshold has no part in a position: the first set of those that differ in it alone stands for all.
            let mut bases: Vec<u32> = few.iter().map(|column| column / g * g).collect();
            bases.dedup();
            let replay = self.job(None, true, |job| job.replay(self.device, 0, &bases))?;
            let at = |i: usize, asset: usize| {
                let base = bases.binary_search(&(few[i] / g * g)).unwrap_or(0);
                replay.weight[(asset * bases.len() + base) * bars..][..bars].to_vec()
            };
            use_them(first, few, &at)?;
            first = end;
        }
        Ok(())
    }

    /// Weights of a column on an asset behind its gate.
    fn gated_weights(&self, gates: &Gates, column: u32, asset: usize, weights: &[f32]) -> Vec<f32> {
        let threshold = self.columns.columns.last().map_or(0.0, |thresholds| thresholds[column as usize]);
        let mut weights = weights.to_vec();
        gates.close(threshold, asset, regime_filter::lag(self.config.execution), &mut weights);
        weights[..(self.start as usize).min(self.bars - 1)].fill(0.0);
        weights
    }

    /// Returns of each asset between its fills [N][T−1].
    fn fill_returns(&self) -> Vec<Vec<f32>> {
        let (fills, n) = (self.fills(), self.assets);
        let price = |j: usize, a: usize| f64::from(fills[j * n + a]);
        (0..n).map(|a| (0..self.bars.saturating_sub(1)).map(|j| (price(j + 1, a) / price(j, a) - 1.0) as f32).collect()).collect()
    }

    /// Runs all sets at once. `visit` sees every chunk of statistics once, as soon as it is there; `keep` hands out the rows
    /// [cost, set, asset].
    /// # Errors
    /// As [`Sweep::run`], and those of `visit`.
    pub fn whole(&self, keep: bool, visit: &mut dyn FnMut(&Chunk) -> Result<()>) -> Result<(SweepReport, Option<Array3<Row>>)> {
        let Executed { sums, rows, outcome } = self.execute(None, true, keep, visit)?;
        Ok((self.report(sums, outcome)?, rows))
    }

    /// Runs the sets at positions `sets`: statistics, and winners among them.
    /// # Errors
    /// As [`Sweep::run`], and those of `visit`; `Shape` for an empty range or one past the sets.
    pub fn part(&self, sets: Range<usize>, keep: bool, visit: &mut dyn FnMut(&Chunk) -> Result<()>) -> Result<Part> {
        if sets.is_empty() || sets.end > self.len() {
            let expected = format!("a range of sets inside 0..{}", self.len());
            return Err(Error::Shape { op: "sweep", arg: "part".into(), expected, got: format!("{sets:?}") });
        }
        let positions: Vec<u32> = (sets.start as u32..sets.end as u32).collect();
        let Executed { sums, rows, outcome } = self.execute(Some(&positions), false, keep, visit)?;
        Ok(Part { sets, winners: winners(&outcome), rows, sums, launches: outcome.launches, submits: outcome.submits })
    }

    /// The report of parts that together hold every set: the winners run once more for the out-of-sample series, so that the result is
    /// that of [`SweepRun::whole`], bit for bit.
    /// # Errors
    /// `Parameter` if sets are missing; as [`Sweep::run`].
    pub fn finish(&self, fold: Fold, visit: &mut dyn FnMut(&Chunk) -> Result<()>) -> Result<SweepReport> {
        if let Some(gap) = fold.missing(0..self.len()).first() {
            let help = "run the missing sets, then finish".into();
            return Err(Error::Parameter { op: "sweep", name: "parts".into(), value: format!("without sets {} to {}", gap.start, gap.end - 1), help });
        }
        let Fold { sums, winners: wanted, launches, submits, .. } = fold;
        let mut positions: Vec<u32> = wanted.per_asset.iter().chain(&wanted.pooled).flatten().map(|winner| winner.set).collect();
        positions.sort_unstable();
        positions.dedup();
        let mut outcome = if positions.is_empty() { Outcome::default() } else { self.execute(Some(&positions), true, false, visit)?.outcome };
        if winners(&outcome) != wanted {
            return Err(Error::Internal("the winners of all parts do not win among themselves".into()));
        }
        outcome.launches += launches;
        outcome.submits += submits;
        self.report(sums, outcome)
    }

    /// Net returns of the sets at ascending positions on every bar at a cost [N,sets,T−1], and the weights held over the same bars.
    /// Nothing is held before [`SweepRun::start`]. 8 bytes per value: ask for a part of many sets at a time.
    /// # Errors
    /// As [`Sweep::run`]; `Shape` for positions that do not ascend or are not there.
    pub fn returns(&self, cost: usize, positions: &[usize]) -> Result<(Array3<f32>, Array3<f32>)> {
        let (n, bars) = (self.assets, self.bars.saturating_sub(1));
        let (mut net, mut weight) = (Array3::zeros((n, positions.len(), bars)), Array3::zeros((n, positions.len(), bars)));
        if let Some(gates) = &self.config.regimes {
            let columns: Vec<u32> = positions.iter().map(|&position| self.column(position)).collect();
            let (returns, bps) = (self.fill_returns(), self.config.cost_bps[cost]);
            self.positions(&columns, &mut |first, few, weights| {
                for (s, asset) in (0..few.len()).flat_map(|s| (0..n).map(move |asset| (s, asset))) {
                    let gated = self.gated_weights(gates, few[s], asset, &weights(s, asset));
                    let earned = regime_filter::net(&gated, &returns[asset], bps * 1e-4);
                    for j in 0..bars {
                        (net[[asset, first + s, j]], weight[[asset, first + s, j]]) = (earned[j], gated[j]);
                    }
                }
                Ok(())
            })?;
            return Ok((net, weight));
        }
        let most = (REPLAYED_BARS / bars.max(1)).max(1);
        for (i, few) in positions.chunks(most).enumerate() {
            let columns: Vec<u32> = few.iter().map(|&position| self.column(position)).collect();
            let replay = self.job(None, true, |job| job.replay(self.device, cost, &columns))?;
            for (all, own) in [(&mut net, replay.net), (&mut weight, replay.weight)] {
                let own = Array3::from_shape_vec((n, few.len(), bars), own).map_err(|e| Error::Internal(e.to_string()))?;
                all.slice_axis_mut(Axis(1), Slice::from(i * most..i * most + few.len())).assign(&own);
            }
        }
        Ok((net, weight))
    }

    /// Net returns over the counted bars of equal-weight portfolios of all assets [positions, T−1−start], rebalanced every bar at no cost.
    /// # Errors
    /// As the sweep.
    pub fn portfolios(&self, cost: usize, positions: &[usize]) -> Result<Vec<f32>> {
        let per_set = (self.assets * self.bars).max(1);
        let mut all = Vec::new();
        for some in positions.chunks((PORTFOLIO_VALUES / per_set).max(1)) {
            let (net, _) = self.returns(cost, some)?;
            let mean = net.mean_axis(Axis(0)).ok_or_else(|| Error::Internal("a sweep has an asset".into()))?;
            all.extend(mean.slice_axis(Axis(1), Slice::from(self.start as usize..)).iter());
        }
        Ok(all)
    }

    /// Rows (cost, asset) of the set at a position.
    pub(super) fn rows_of(&self, position: usize) -> Result<Vec<Row>> {
        Ok(self.execute(Some(&[position as u32]), false, true, &mut |_| Ok(()))?.rows.map(|rows| rows.into_raw_vec_and_offset().0).unwrap_or_default())
    }

    /// What was chosen, pooled over the bars from the first stitched one to the last.
    fn pooled(&self, selected: &Selected, bars: &[u32], cost_bps: f64) -> Result<Vec<(Scheme, Pooled)>> {
        let (Some(&first), Some(&last)) = (bars.first(), bars.last()) else { return Ok(Vec::new()) };
        if self.config.portfolios.is_empty() {
            return Ok(Vec::new());
        }
        let (n, t, fills) = (self.assets, last as usize + 1, self.fills());
        let returns = Array2::from_shape_fn((t, n), |(j, a)| (f64::from(fills[(j + 1) * n + a]) / f64::from(fills[j * n + a]) - 1.0) as f32);
        let mut positions = Array2::zeros((t, n));
        for a in 0..n {
            for (k, &j) in bars.iter().enumerate() {
                positions[[j as usize, a]] = selected.weights[a * bars.len() + k];
            }
        }
        let of = |&scheme: &Scheme| {
            let SweepConfig { rebalance, execution, periods_per_year, .. } = *self.config;
            let pooling = Pooling { scheme, cap: None, rebalance, cost_bps, execution, start: first as usize, periods_per_year };
            Ok((scheme, portfolio_of(self.device, returns.view(), positions.view(), &pooling)?))
        };
        self.config.portfolios.iter().map(of).collect()
    }

    fn report(&self, sums: Vec<Vec<SetSum>>, outcome: Outcome) -> Result<SweepReport> {
        let Outcome { per_asset, pooled, stitched_bars, launches, submits, profile } = outcome;
        let returns = self.bars.saturating_sub(1) as u32;
        let counted: Vec<u32> = if self.windows.is_empty() { (self.start..returns).collect() } else { stitched_bars.clone() };
        let mut compare = Comparison { device: self.device, assets: self.assets, periods_per_year: self.config.periods_per_year };
        let (mut per_asset, mut pooled) = (per_asset.into_iter(), pooled.into_iter());
        let mut costs = Vec::with_capacity(sums.len());
        for (sums, &cost_bps) in sums.into_iter().zip(&self.config.cost_bps) {
            let mut selected = |next: Option<Selected>| {
                let Some(s) = next.filter(|s| !s.stitched.is_empty()) else { return Ok(None) };
                let portfolios = self.pooled(&s, &stitched_bars, cost_bps)?;
                compare.selected(s, portfolios).map(Some)
            };
            let (per_asset, pooled) = (selected(per_asset.next())?, selected(pooled.next())?);
            costs.push(CostLevel { cost_bps, per_asset, pooled, sums });
        }
        let buy_and_hold = if counted.is_empty() { None } else { Some(compare.buy_and_hold(&self.fills(), &counted)?) };
        let ids = match &self.chosen {
            Chosen::All => None,
            Chosen::Picked(ids) => Some(ids.iter().map(|&id| u64::from(id)).collect()),
            Chosen::Drawn(ids) => Some(ids.clone()),
        };
        Ok(SweepReport {
            sets: self.sets(),
            ids,
            assets: self.assets,
            bars: self.bars,
            start: self.start,
            windows: self.windows.clone(),
            stitched_bars,
            costs,
            buy_and_hold,
            launches,
            submits,
            profile,
        })
    }
}

fn winners(outcome: &Outcome) -> Winners {
    let of = |selected: &Selected| selected.best.iter().zip(&selected.keys).map(|(&set, &key)| Winner { key, set }).collect();
    // Without windows nothing is chosen.
    let all = |list: &[Selected]| list.iter().map(of).filter(|winners: &Vec<Winner>| !winners.is_empty()).collect();
    Winners { per_asset: all(&outcome.per_asset), pooled: all(&outcome.pooled) }
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
        Ok(OutOfSample { portfolio, returns, assets, turnover: 0.0, trades: 0, best: Vec::new(), portfolios: Vec::new() })
    }

    fn selected(&mut self, selected: Selected, portfolios: Vec<(Scheme, Pooled)>) -> Result<OutOfSample> {
        let turnover = selected.turnover.iter().sum::<f64>() / selected.stitched.len().max(1) as f64;
        let trades = selected.trades.iter().sum();
        let out = self.of(&selected.stitched, selected.performance)?;
        Ok(OutOfSample { turnover, trades, best: selected.best, portfolios, ..out })
    }

    fn buy_and_hold(&mut self, fills: &[f32], bars: &[u32]) -> Result<OutOfSample> {
        let n = self.assets;
        let at = |j: usize, a: usize| f64::from(fills[j * n + a]);
        let series: Vec<f32> = (0..n).flat_map(|a| bars.iter().map(move |&j| (j as usize, a))).map(|(j, a)| (at(j + 1, a) / at(j, a) - 1.0) as f32).collect();
        let assets = self.performance(&series, n)?;
        self.of(&series, assets)
    }
}
