//! The op `portfolio`: many books with shared capital, in chunks of books and slabs of bars.
//!
//! prices → returns with gaps → targets (positions, times an allocation where there is one) → simulation → statistics at every cost. The
//! targets [P,T,N] need not be resident: they are asked for slab by slab, and state is carried from one to the next on the device, so
//! that results do not depend on the slab, bit for bit.
//!
//! Allocation (weight of an asset at the close of bar j, from prices up to j):
//! * equal: 1/n over the n assets that have had a price;
//! * inverse volatility: 1/sd of the last `window` returns (n−1), scaled to sum 1 over the assets that have two returns and an sd above 0;
//!   those without have none. Capped by water-filling: what passes the cap goes to the others in proportion, repeatedly.
//!
//! Source   order of a bar and missing bars: kernels/portfolio.rs.

use crate::backtest_sweep::Execution;
use crate::conformance::{Case, Outputs, defined};
use crate::device::{Buffer, Device, LaunchTime, View};
use crate::portfolio::{ACTIVITY, MISSING, ORDERS, PORTFOLIO_SCORE, PORTFOLIO_SIMULATE, PortfolioParams, SIGNAL_SCORE, STATE, STATS, WG, lanes};
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

const OP: &str = "portfolio";

/// Returns of N assets over T bars, with the bars that have no price.
#[derive(Debug, Clone, PartialEq)]
pub struct AssetReturns {
    /// [T+1,N]: row j is what bar j−1 earned, `MISSING` where there is no price at bar j; row 0 earned nothing.
    values: Vec<f32>,
    assets: usize,
}

impl AssetReturns {
    /// From closes [T+1,N], positive; NaN is a missing price.
    ///
    /// A missing bar earns 0, and the next return spans the gap. Return j depends on the closes of bars up to j + 1.
    /// # Errors
    /// `Shape` if it is not a matrix; `Parameter` naming a close that is neither positive and finite nor NaN.
    pub fn of_closes(close: &[f32], assets: usize) -> Result<AssetReturns> {
        matrix("close", close.len(), assets)?;
        let mut last = vec![f32::NAN; assets];
        let mut values = Vec::with_capacity(close.len());
        for (i, &price) in close.iter().enumerate() {
            let last = &mut last[i % assets];
            if !(price.is_nan() || (price.is_normal() && price > 0.0)) {
                return Err(bad(&format!("close[{}, {}]", i / assets, i % assets), price, "prices must be positive, finite numbers, or NaN where missing"));
            }
            values.push(if price.is_nan() {
                MISSING
            } else if last.is_nan() {
                0.0
            } else {
                (f64::from(price) / f64::from(*last) - 1.0) as f32
            });
            if !price.is_nan() {
                *last = price;
            }
        }
        Ok(AssetReturns { values, assets })
    }

    /// From returns [T,N], at least −1; NaN where the bar that they lead to has no price.
    /// # Errors
    /// `Shape` if it is not a matrix; `Parameter` naming a return that is infinite or below −1.
    pub fn of_returns(returns: &[f32], assets: usize) -> Result<AssetReturns> {
        matrix("returns", returns.len(), assets)?;
        let mut values = vec![0.0; assets];
        for (i, &r) in returns.iter().enumerate() {
            if !(r.is_nan() || (r.is_finite() && r >= -1.0)) {
                return Err(bad(&format!("returns[{}, {}]", i / assets, i % assets), r, "simple returns are finite and at least -1, or NaN where missing"));
            }
            values.push(if r.is_nan() { MISSING } else { r });
        }
        Ok(AssetReturns { values, assets })
    }

    /// N.
    pub fn assets(&self) -> usize {
        self.assets
    }

    /// T.
    pub fn bars(&self) -> usize {
        self.values.len() / self.assets - 1
    }

    /// What asset i earns over bar j; `None` where the bar that it leads to has no price.
    fn earned(&self, j: usize, i: usize) -> Option<f64> {
        let r = self.values[(j + 1) * self.assets + i];
        (r != MISSING).then_some(f64::from(r))
    }
}

fn matrix(arg: &str, len: usize, assets: usize) -> Result<()> {
    if assets > 0 && len > 0 && len.is_multiple_of(assets) {
        return Ok(());
    }
    Err(Error::Shape { op: OP, arg: arg.into(), expected: "[T,N] with T, N ≥ 1".into(), got: format!("{len} values for N = {assets}") })
}

fn bad(name: &str, value: impl std::fmt::Display, help: &str) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() }
}

// ---- allocation -------------------------------------------------------------------------------------------------------

/// How capital is shared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scheme {
    /// The same share for every asset.
    Equal,
    /// Shares in proportion to 1/sd of the last `window` returns.
    InverseVolatility {
        /// Returns; at least 2.
        window: usize,
    },
}

impl Scheme {
    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Equal => "equal",
            Scheme::InverseVolatility { .. } => "inverse_vol",
        }
    }
}

/// Shares [T,N] of each asset at the close of bar j, from returns up to that close, at most `cap` each.
///
/// They sum to 1, or to less where fewer than 1/cap assets can hold any: the rest is cash.
/// # Errors
/// `Parameter` for a window below 2, or a cap that is not in (0, 1] or below 1/N.
pub fn allocate(returns: &AssetReturns, scheme: Scheme, cap: Option<f64>) -> Result<Vec<f32>> {
    let (t, n) = (returns.bars(), returns.assets);
    if let Some(cap) = cap.filter(|c| !(*c > 0.0 && *c <= 1.0 && c * n as f64 >= 1.0 - 1e-12)) {
        return Err(bad("cap", cap, &format!("a cap lies between 1/N = {} and 1", 1.0 / n as f64)));
    }
    if let Scheme::InverseVolatility { window } = scheme
        && window < 2
    {
        return Err(bad("window", window, "a deviation needs two returns or more"));
    }
    let sizes: Vec<Vec<f64>> = (0..n)
        .into_par_iter()
        .map(|i| {
            let priced = (0..=t).find(|&j| returns.values[j * n + i] != MISSING).unwrap_or(t + 1);
            (0..t)
                .map(|j| match scheme {
                    Scheme::Equal => f64::from(u8::from(j >= priced)),
                    Scheme::InverseVolatility { window } => inverse_deviation(returns, i, j.saturating_sub(window).max(priced)..j),
                })
                .collect()
        })
        .collect();
    let mut shares = vec![0.0f32; t * n];
    shares.par_chunks_exact_mut(n).enumerate().for_each(|(j, row)| {
        let mut weights: Vec<f64> = sizes.iter().map(|s| s[j]).collect();
        water_fill(&mut weights, cap.unwrap_or(1.0));
        row.iter_mut().zip(weights).for_each(|(out, w)| *out = w as f32);
    });
    Ok(shares)
}

/// 1/sd of the returns that are there; 0 with fewer than two, or without any deviation.
fn inverse_deviation(returns: &AssetReturns, asset: usize, bars: Range<usize>) -> f64 {
    let there = || bars.clone().filter_map(|j| returns.earned(j, asset));
    let n = there().count();
    if n < 2 {
        return 0.0;
    }
    let mean = there().sum::<f64>() / n as f64;
    let variance = there().map(|r| (r - mean) * (r - mean)).sum::<f64>() / (n - 1) as f64;
    if variance > 1e-24 { 1.0 / variance.sqrt() } else { 0.0 }
}

/// Scales sizes (not negative) to sum 1 with none above `cap`; what is cut goes to the others in proportion. All at the cap, and the rest
/// cash, where they are too few.
pub fn water_fill(weights: &mut [f64], cap: f64) {
    let mut fixed = vec![false; weights.len()];
    let mut left = 1.0;
    loop {
        let free: f64 = weights.iter().zip(&fixed).filter(|(_, f)| !**f).map(|(w, _)| *w).sum();
        if free <= 0.0 {
            return;
        }
        let (scale, mut cut) = (left / free, false);
        for (w, fixed) in weights.iter_mut().zip(&mut fixed) {
            if !*fixed && *w * scale > cap * (1.0 + 1e-12) {
                (*w, *fixed, cut) = (cap, true, true);
                left -= cap;
            }
        }
        left = left.max(0.0);
        if !cut {
            weights.iter_mut().zip(&fixed).filter(|(_, f)| !**f).for_each(|(w, _)| *w *= scale);
            return;
        }
    }
}

// ---- the op -----------------------------------------------------------------------------------------------------------

/// Fills positions [books, rows, N] of a range of books and of decision bars.
pub type Fill<'a> = dyn Fn(Range<usize>, Range<usize>, &mut [f32]) -> Result<()> + Sync + 'a;

/// Where positions come from; row j is decided at the close of bar j. They may be negative; what they leave is cash.
#[derive(Clone, Copy)]
pub enum Positions<'a> {
    /// [P,T,N].
    Dense(&'a [f32]),
    /// Asked for slab by slab.
    Streamed(&'a Fill<'a>),
}

/// When and how far a book trades.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rebalance {
    /// Largest distance between target and drifted weight that is left alone.
    pub band: f64,
    /// Bars between two rebalances; 1 is every bar.
    pub every: u32,
    /// Trade to the band's edge, not to the target.
    pub to_edge: bool,
}

impl Default for Rebalance {
    /// To the target on every bar.
    fn default() -> Rebalance {
        Rebalance { band: 0.0, every: 1, to_edge: false }
    }
}

/// What to simulate. [`Portfolio::new`] has the defaults.
#[derive(Clone, Copy)]
pub struct Portfolio<'a> {
    /// What assets earn.
    pub returns: &'a AssetReturns,
    /// P.
    pub books: usize,
    /// Positions of each book.
    pub positions: Positions<'a>,
    /// Shares [T,N] that positions are multiplied with.
    pub allocation: Option<&'a [f32]>,
    /// When and how far books trade.
    pub rebalance: Rebalance,
    /// One-way costs in basis points of traded notional.
    pub cost_bps: &'a [f64],
    /// When decisions are traded.
    pub execution: Execution,
    /// First bar that earns; nothing is held before. Rebalances are counted from it.
    pub start: usize,
    /// Return periods per year.
    pub periods_per_year: f64,
    /// Also score every asset of every book on its own, without drift.
    pub assets: bool,
    /// Also return net returns (books × bars × costs values).
    pub net: bool,
    /// Also return the weights that the last bar leaves (books × assets values).
    pub weights: bool,
    /// Bars per launch; `None` lets the device's limits decide.
    pub slab: Option<usize>,
    /// Time every launch.
    pub profile: bool,
}

/// Whether a book kept some of its capital.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It did.
    Solvent,
    /// Nothing was left after this bar.
    Ruined {
        /// Index of the return.
        bar: usize,
    },
}

/// Statistics of a book, or of one of its assets, at one cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PortfolioStats {
    /// Annualised Sharpe ratio; NaN if undefined.
    pub sharpe: f64,
    /// Compounded net return.
    pub total_return: f64,
    /// Largest loss from a running peak, positive.
    pub max_drawdown: f64,
    /// Σ|Δw|, buys and sells.
    pub turnover: f64,
    /// Orders: assets × bars that traded.
    pub trades: u64,
    /// Solvent, or ruined at a bar.
    pub status: Status,
}

/// What a simulation leaves.
#[derive(Debug, Clone, Default)]
pub struct PortfolioOutcome {
    /// Statistics of each book at each cost [P,C].
    pub stats: Vec<PortfolioStats>,
    /// Statistics of each asset on its own [P,C,N], if asked for.
    pub assets: Vec<PortfolioStats>,
    /// Net returns [P,C,T−start], if asked for.
    pub net: Vec<f32>,
    /// Weights after the last bar [P,N], if asked for.
    pub weights: Vec<f64>,
    /// Launches on the device.
    pub launches: usize,
    /// Submits.
    pub submits: usize,
    /// Times of the launches, if asked for.
    pub profile: Vec<LaunchTime>,
}

/// Positions of one launch stay below this many values: 32 MiB.
const STAGE: u64 = 8 << 20;
/// Books that share a launch before its slabs grow beyond a block.
const ABREAST: u64 = 1024;

impl<'a> Portfolio<'a> {
    /// Books at no cost that trade to their targets on every bar, one close after the decision.
    pub fn new(returns: &'a AssetReturns, books: usize, positions: Positions<'a>) -> Portfolio<'a> {
        Portfolio {
            returns,
            books,
            positions,
            allocation: None,
            rebalance: Rebalance::default(),
            cost_bps: &[0.0],
            execution: Execution::NextClose,
            start: 0,
            periods_per_year: 252.0,
            assets: false,
            net: false,
            weights: false,
            slab: None,
            profile: false,
        }
    }

    /// Simulates all books. Statistics and weights at bar j depend on positions up to j (one bar earlier with `next_close`) and returns
    /// up to j.
    /// # Errors
    /// `Shape` for lengths that do not match; `Parameter` naming a value that is out of range or a position that is not finite;
    /// `TooLarge` where not even one book fits the device; device errors.
    pub fn run(&self, device: &Device) -> Result<PortfolioOutcome> {
        self.check()?;
        let (costs, bars) = (self.cost_bps.len(), self.bars());
        let mut out = PortfolioOutcome { net: vec![0.0; if self.net { self.books * costs * bars } else { 0 }], ..PortfolioOutcome::default() };
        let plan = Plan::of(self, device)?;
        let shared = Shared::upload(self, device)?;
        for books in &plan.books {
            self.run_books(device, &shared, books.clone(), plan.slab, &mut out)?;
        }
        Ok(out)
    }

    /// Bars that earn.
    fn bars(&self) -> usize {
        self.returns.bars().saturating_sub(self.start)
    }

    fn lag(&self) -> usize {
        usize::from(self.execution != Execution::SameClose)
    }

    fn check(&self) -> Result<()> {
        let (t, n) = (self.returns.bars(), self.returns.assets);
        let shape = |arg: &str, expected: String, got: String| Err(Error::Shape { op: OP, arg: arg.into(), expected, got });
        if let Positions::Dense(x) = self.positions
            && x.len() != self.books * t * n
        {
            return shape("positions", format!("[P,T,N] = [{}, {t}, {n}]", self.books), format!("{} values", x.len()));
        }
        if let Some(x) = self.allocation {
            if x.len() != t * n {
                return shape("allocation", format!("[T,N] = [{t}, {n}]"), format!("{} values", x.len()));
            }
            if let Some(i) = x.iter().position(|w| !w.is_finite()) {
                return Err(bad(&format!("allocation[{}, {}]", i / n, i % n), x[i], "shares must be finite numbers"));
            }
        }
        if self.cost_bps.is_empty() {
            return shape("cost_bps", "at least one cost".into(), "none".into());
        }
        if let Some((i, c)) = self.cost_bps.iter().enumerate().find(|(_, c)| !(c.is_finite() && **c >= 0.0 && **c < 10_000.0)) {
            return Err(bad(&format!("cost_bps[{i}]"), c, "give basis points from 0 to below 10000"));
        }
        if !(self.rebalance.band.is_finite() && self.rebalance.band >= 0.0) {
            return Err(bad("band", self.rebalance.band, "give a distance between weights, 0 or more (0.01 is one per cent of capital)"));
        }
        if self.execution == Execution::NextOpen {
            return Err(bad("execution", "next_open", "give the returns between the opens that follow each bar, and execute at same_close"));
        }
        if self.rebalance.every == 0 {
            return Err(bad("every", 0, "give the bars between two rebalances, 1 or more"));
        }
        if !(self.periods_per_year.is_finite() && self.periods_per_year > 0.0) {
            return Err(bad("periods_per_year", self.periods_per_year, "give a positive number of return periods per year"));
        }
        if self.slab == Some(0) {
            return Err(bad("slab", 0, "give the bars of a launch, 1 or more"));
        }
        // Bars are counted in f32, orders of a bar below the radix of their two words.
        for (what, needed, limit, unit) in [("a series", t as u64, 1 << 24, "bars"), ("a book", n as u64, (1 << 20) - 1, "assets")] {
            if needed > limit {
                return Err(Error::TooLarge { what: what.into(), needed, limit, unit, help: "cut the range or choose fewer assets".into() });
            }
        }
        Ok(())
    }

    /// Simulates a run of books, slab after slab.
    fn run_books(&self, device: &Device, shared: &Shared, books: Range<usize>, slab: usize, out: &mut PortfolioOutcome) -> Result<()> {
        let (p, n, bars, costs) = (books.len(), self.returns.assets, self.bars(), self.cost_bps.len());
        let series = [p * costs, if self.assets { p * costs * n } else { 0 }];
        let book = Book::alloc(device, p, n, series)?;
        let mut staged = vec![0.0f32; p * slab.min(bars) * n];
        let mut first = 0;
        while first < bars {
            let count = slab.min(bars - first);
            let staged = &mut staged[..p * count * n];
            self.stage(&books, first, count, staged)?;
            let mut pass = device.pass(OP);
            if self.profile {
                pass.profile();
            }
            let params = self.params(p, first, count);
            let rows = (self.start + first) * n..(self.start + first + count) * n;
            let rows = rows.start as u64..rows.end as u64;
            let returns = pass.input(&shared.returns, rows.start..rows.end + n as u64)?;
            let allocation = match &shared.allocation {
                Some(all) => pass.input(all, rows)?,
                None => View::from(&shared.empty),
            };
            let positions = View::from(&device.upload("positions", staged)?);
            let activity = device.zeros("activity", (p * ACTIVITY * count) as u64)?;
            let net = device.zeros("net", if self.net { p * costs * count } else { 4 } as u64)?;
            let view = View::from;
            let args = [returns.clone(), positions.clone(), allocation, view(&book.weights), view(&book.carry), view(&activity)];
            pass.launch(&PORTFOLIO_SIMULATE, &params, &args)?;
            let args = [view(&activity), view(&net), view(&shared.costs), view(&book.state), view(&book.stats)];
            pass.launch(&PORTFOLIO_SCORE, &params, &args)?;
            if self.assets {
                let args = [returns, positions, view(&shared.costs), view(&book.asset_state), view(&book.asset_stats)];
                pass.launch(&SIGNAL_SCORE, &PortfolioParams { composed: 0, ..params }, &args)?;
            }
            let nets = if self.net { Some(pass.read(&net)?) } else { None };
            let last = first + count == bars;
            let ends = if last { Some([&book.stats, &book.asset_stats, &book.weights, &book.carry].map(|b| pass.read(b))) } else { None };
            out.launches += pass.launches();
            out.submits += 1;
            let mut done = pass.submit()?;
            out.profile.extend_from_slice(done.profile());
            if let Some(read) = nets {
                for (row, values) in done.f32(read)?.chunks_exact(count).enumerate() {
                    out.net[(books.start * costs + row) * bars + first..][..count].copy_from_slice(values);
                }
            }
            if let Some([stats, asset_stats, weights, carry]) = ends {
                out.stats.extend(done.f64(stats?)?.chunks_exact(STATS).map(|s| self.finish(s)));
                if self.assets {
                    out.assets.extend(done.f64(asset_stats?)?.chunks_exact(STATS).map(|s| self.finish(s)));
                }
                if self.weights {
                    let (weights, carry) = (done.f64(weights?)?, done.f64(carry?)?);
                    out.weights.extend(weights.iter().enumerate().map(|(i, w)| if carry[i / n] > 0.0 { w / carry[i / n] } else { 0.0 }));
                }
            }
            first += count;
        }
        if bars == 0 {
            let none = self.finish(&[f64::NAN, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]);
            out.stats.extend(vec![none; series[0]]);
            out.assets.extend(vec![none; series[1]]);
            out.weights.extend(vec![0.0; if self.weights { p * n } else { 0 }]);
        }
        Ok(())
    }

    /// Positions that are traded at bars first to first + count, counted from `start`.
    fn stage(&self, books: &Range<usize>, first: usize, count: usize, out: &mut [f32]) -> Result<()> {
        let (t, n, from) = (self.returns.bars(), self.returns.assets, self.start + first);
        // Before the first decision there is no position.
        let before = self.lag().saturating_sub(from).min(count);
        let rows = (from + before).saturating_sub(self.lag())..(from + count).saturating_sub(self.lag()).max((from + before).saturating_sub(self.lag()));
        match self.positions {
            Positions::Dense(all) => {
                for (book, out) in books.clone().zip(out.chunks_exact_mut(count * n)) {
                    let (none, some) = out.split_at_mut(before * n);
                    none.fill(0.0);
                    some.copy_from_slice(&all[(book * t + rows.start) * n..(book * t + rows.end) * n]);
                }
            }
            Positions::Streamed(fill) if before == 0 => fill(books.clone(), rows.clone(), out)?,
            Positions::Streamed(fill) => {
                let mut some = vec![0.0; books.len() * rows.len() * n];
                if !rows.is_empty() {
                    fill(books.clone(), rows.clone(), &mut some)?;
                }
                for (i, out) in out.chunks_exact_mut(count * n).enumerate() {
                    let (none, rest) = out.split_at_mut(before * n);
                    none.fill(0.0);
                    rest.copy_from_slice(&some[i * rows.len() * n..(i + 1) * rows.len() * n]);
                }
            }
        }
        match out.iter().position(|w| !w.is_finite()) {
            Some(i) => {
                let (book, j, asset) = (books.start + i / (count * n), rows.start + i / n % count - before, i % n);
                Err(bad(&format!("positions[{book}, {j}, {asset}]"), out[i], "positions must be finite numbers; 0 holds nothing"))
            }
            None => Ok(()),
        }
    }

    fn params(&self, p: usize, first: usize, count: usize) -> PortfolioParams {
        PortfolioParams {
            p: p as u32,
            n: self.returns.assets as u32,
            bars: count as u32,
            first: first as u32,
            every: self.rebalance.every,
            lanes: lanes(self.returns.assets),
            edge: u32::from(self.rebalance.to_edge),
            composed: u32::from(self.allocation.is_some()),
            costs: self.cost_bps.len() as u32,
            net: u32::from(self.net),
            band: self.rebalance.band as f32,
        }
    }

    fn finish(&self, s: &[f64]) -> PortfolioStats {
        PortfolioStats {
            sharpe: defined(s[0]) * self.periods_per_year.sqrt(),
            total_return: s[1],
            max_drawdown: s[2],
            turnover: s[3],
            trades: (s[4] * ORDERS + s[5]) as u64,
            status: if s[6] < 0.0 { Status::Solvent } else { Status::Ruined { bar: self.start + s[6] as usize } },
        }
    }
}

/// Buffers of a run of books, kept over its slabs.
struct Book {
    weights: Buffer,
    carry: Buffer,
    state: Buffer,
    stats: Buffer,
    asset_state: Buffer,
    asset_stats: Buffer,
}

impl Book {
    fn alloc(device: &Device, p: usize, n: usize, [series, assets]: [usize; 2]) -> Result<Book> {
        let zeros = |name: &str, len: usize| device.zeros(name, len as u64);
        Ok(Book {
            weights: zeros("weights", p * n)?,
            carry: zeros("carry", p)?,
            state: zeros("state", series * STATE)?,
            stats: zeros("stats", series * STATS)?,
            asset_state: zeros("asset state", assets * STATE)?,
            asset_stats: zeros("asset stats", assets * STATS)?,
        })
    }
}

/// Buffers that all books read.
struct Shared {
    returns: Buffer,
    allocation: Option<Buffer>,
    costs: Buffer,
    empty: Buffer,
}

impl Shared {
    fn upload(job: &Portfolio<'_>, device: &Device) -> Result<Shared> {
        let (t, n, lag) = (job.returns.bars(), job.returns.assets, job.lag());
        // Shares are decided with the positions: row j is what bar j trades on.
        let lagged = |x: &[f32]| [&vec![0.0; lag.min(t) * n][..], &x[..(t - lag.min(t)) * n]].concat();
        let costs: Vec<f32> = job
            .cost_bps
            .iter()
            .flat_map(|bps| {
                let cost = bps * 1e-4;
                [cost as f32, (cost - f64::from(cost as f32)) as f32]
            })
            .collect();
        Ok(Shared {
            returns: device.upload("returns", &job.returns.values)?,
            allocation: job.allocation.map(|x| device.upload("allocation", &lagged(x))).transpose()?,
            costs: device.upload("costs", &costs)?,
            empty: device.zeros("no allocation", 4)?,
        })
    }
}

/// Books per chunk and bars per slab.
struct Plan {
    books: Vec<Range<usize>>,
    slab: usize,
}

impl Plan {
    fn of(job: &Portfolio<'_>, device: &Device) -> Result<Plan> {
        let (n, costs, bars) = (job.returns.assets as u64, job.cost_bps.len() as u64, job.bars() as u64);
        let limits = device.limits();
        // Rounds of a bar's loops: assets of a thread, the sum over lanes, blocks; compilers turn a branch into a loop of its own.
        let per_bar = 4 * (n.div_ceil(u64::from(lanes(n as usize))) + 26);
        device.check_rounds(OP, per_bar, "rounds")?;
        let widest = n.max(ACTIVITY as u64).max(if job.net { costs } else { 0 });
        // A slab's rows of returns are one more than its bars.
        let by_binding = (limits.binding_bytes / (4 * widest)).saturating_sub(1).max(1);
        let most = bars.min(limits.loop_rounds / per_bar).min(by_binding).max(1);
        let abreast = (job.books as u64).clamp(1, ABREAST);
        let slab = match job.slab {
            Some(slab) => (slab as u64).min(most),
            None => (STAGE / (n * abreast)).max(64).min(most),
        };
        let assets = if job.assets { n } else { 0 };
        let elements = (slab * widest).max((slab + 1) * n).max(STATE as u64 * costs * assets.max(1)).max(n);
        let groups = (u64::from(lanes(n as usize)).max(costs * assets.max(1))).div_ceil(u64::from(WG));
        let work = slab * (14 * n + 16 * costs * (1 + assets));
        let stage = (STAGE / (slab * n).max(STATE as u64 * costs * assets)).max(1) as usize;
        let runs = device.plan(OP, job.books as u64, elements, groups, work)?;
        let split = |run: Range<u64>| {
            let run = run.start as usize..run.end as usize;
            run.clone().step_by(stage).map(move |first| first..run.end.min(first + stage))
        };
        Ok(Plan { books: runs.into_iter().flat_map(split).collect(), slab: slab as usize })
    }
}

// ---- conformance ------------------------------------------------------------------------------------------------------

/// Conformance binding: close [T+1,N] (NaN missing), positions [P,T,N], allocation [T,N]?; band, every, to_edge, cost_bps, execution.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let assets = case.shape("close")?.get(1).copied().unwrap_or(1);
    let returns = AssetReturns::of_closes(case.f32("close")?, assets)?;
    let books = case.shape("positions")?.first().copied().unwrap_or(0);
    let cost = [case.number("cost_bps")?];
    let rebalance = Rebalance { band: case.number("band")?, every: case.number("every")? as u32, to_edge: case.number("to_edge")? != 0.0 };
    let outcome = Portfolio {
        allocation: if case.has("allocation") { Some(case.f32("allocation")?) } else { None },
        rebalance,
        cost_bps: &cost,
        execution: Execution::named(case.text("execution")?)?,
        periods_per_year: case.number("periods_per_year")?,
        net: true,
        weights: true,
        ..Portfolio::new(&returns, books, Positions::Dense(case.f32("positions")?))
    }
    .run(device)?;
    let mut outputs = Outputs::launched(outcome.launches);
    let column = |f: fn(&PortfolioStats) -> f64| outcome.stats.iter().map(f).collect::<Vec<f64>>();
    outputs.reals("sharpe", column(|s| s.sharpe));
    outputs.reals("total_return", column(|s| s.total_return));
    outputs.reals("max_drawdown", column(|s| s.max_drawdown));
    outputs.reals("turnover", column(|s| s.turnover));
    outputs.words("trades", outcome.stats.iter().map(|s| s.trades as u32).collect());
    outputs.reals("net", outcome.net.iter().map(|&x| f64::from(x)).collect());
    outputs.reals("weights", outcome.weights);
    Ok(outputs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn water_filling_keeps_the_cap_and_the_sum() {
        let mut w = [0.5, 0.3, 0.1, 0.1];
        water_fill(&mut w, 0.3);
        assert!((w.iter().sum::<f64>() - 1.0).abs() < 1e-12 && w.iter().all(|&x| x <= 0.3 + 1e-12), "{w:?}");
        assert_eq!(w[2], w[3]);
        let mut w = [3.0, 1.0];
        water_fill(&mut w, 1.0);
        assert_eq!(w, [0.75, 0.25]);
        // 0.6 to the first, what it gives up to the others 3 : 1, of which 0.36 stays below the cap
        let mut w = [8.0, 3.0, 1.0];
        water_fill(&mut w, 0.6);
        assert!(w.iter().zip([0.6, 0.3, 0.1]).all(|(a, b)| (a - b).abs() < 1e-12), "{w:?}");
        // two assets cannot hold more than twice the cap: the rest is cash
        let mut w = [1.0, 1.0, 0.0];
        water_fill(&mut w, 0.4);
        assert_eq!(w, [0.4, 0.4, 0.0]);
        let mut w = [0.0, 0.0];
        water_fill(&mut w, 0.5);
        assert_eq!(w, [0.0, 0.0]);
    }

    #[test]
    fn gaps_become_one_return_over_the_gap() {
        let x = f32::NAN;
        let r = AssetReturns::of_closes(&[100.0, x, 110.0, x, x, x, 121.0, 50.0, 121.0, 75.0], 2).unwrap();
        assert_eq!((r.bars(), r.assets()), (4, 2));
        let seen: Vec<Option<f64>> = (0..4).flat_map(|j| [r.earned(j, 0), r.earned(j, 1)]).map(|r| r.map(|r| (r * 1e6).round() / 1e6)).collect();
        assert_eq!(seen, [Some(0.1), None, None, None, Some(0.1), Some(0.0), Some(0.0), Some(0.5)]);
        for wrong in [0.0, -1.0, f32::INFINITY] {
            assert!(AssetReturns::of_closes(&[1.0, 1.0, wrong, 1.0], 2).unwrap_err().to_string().contains("close[1, 0]"));
        }
        assert!(AssetReturns::of_returns(&[0.1, -1.5], 2).unwrap_err().to_string().contains("returns[0, 1]"));
        assert!(AssetReturns::of_returns(&[0.1, 0.2, 0.3], 2).is_err());
    }

    #[test]
    fn allocations_look_at_the_past_alone() {
        let n = 3;
        let r: Vec<f32> = (0..40 * n).map(|i| ((i * 7919 % 101) as f32 / 101.0 - 0.5) * [0.01, 0.02, 0.04][i % n]).collect();
        let base = AssetReturns::of_returns(&r, n).unwrap();
        let scheme = Scheme::InverseVolatility { window: 10 };
        let shares = allocate(&base, scheme, None).unwrap();
        for j in [2, 9, 10, 25, 39] {
            let row = &shares[j * n..][..n];
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{row:?}");
            let sd = |i: usize| {
                let x: Vec<f64> = (j.saturating_sub(10)..j).map(|k| f64::from(r[k * n + i])).collect();
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (x.len() as f64 - 1.0)).sqrt()
            };
            let total: f64 = (0..n).map(|i| 1.0 / sd(i)).sum();
            assert!((0..n).all(|i| (f64::from(row[i]) - 1.0 / sd(i) / total).abs() < 1e-6), "bar {j}: {row:?}");
            let mut later = r.clone();
            later[j * n..].iter_mut().for_each(|x| *x = -*x * 3.0);
            let other = allocate(&AssetReturns::of_returns(&later, n).unwrap(), scheme, None).unwrap();
            assert_eq!(other[..(j + 1) * n], shares[..(j + 1) * n], "bar {j} knew what came after it");
        }
        assert_eq!(shares[..2 * n], [0.0; 6], "no deviation of fewer than two returns");
        let capped = allocate(&base, scheme, Some(0.4)).unwrap();
        assert!(capped.iter().all(|&w| w <= 0.4 + 1e-6) && (capped[20 * n..21 * n].iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(allocate(&base, scheme, Some(0.3)).is_err() && allocate(&base, Scheme::InverseVolatility { window: 1 }, None).is_err());
        assert_eq!(allocate(&base, Scheme::Equal, None).unwrap(), vec![1.0 / 3.0; 40 * n]);
    }
}
