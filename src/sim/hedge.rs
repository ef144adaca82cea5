//! Hedge simulations: a grid of markets × options × policies × intervals × costs over common random numbers, one comparable table.
//!
//! Plan     set-ups of one market and maturity share their paths. They come in runs whose results [U,3,P] stay below `KEPT_BYTES`; paths come in
//!          slabs of at most 2²⁰, a launch each or several. Nothing depends on the plan, bit for bit.
//! Reduced  on the device to moments, order statistics and histograms (kernels/hedge_risk.rs): memory is paths × set-ups of a run, never × steps.
//! Theory   Derman and Kamal: sd ≈ √(π/4)·vega·σ/√N with N trades; Leland: a hedge's costs are the option's price at his volatility less
//!          its price, and those of the first trade.

use crate::kernels::hedge::{self, HedgeMarket, Hedges, hedge_steps, leland_volatility, option_at_level};
pub use crate::kernels::hedge::{Costs, HedgedOption, OptionKind, Policy, Position};
pub use crate::kernels::hedge_risk::{Histogram, RiskFigures, RiskOptions};
use crate::kernels::hedge_risk::{Slab, hedge_risk};
use crate::kernels::paths::{self, Draws, Markets, Stored, field};
pub use crate::kernels::paths::{Basis, Jumps, Model, Variance};
use crate::kernels::{Buffer, Device, View};
use crate::{Error, Result};
use std::ops::Range;
use std::time::Instant;

const OP: &str = "hedge";
/// Results of one run of set-ups, at most, where one set-up takes less.
const KEPT_BYTES: u64 = 192 << 20;
/// Results of one set-up, at most: P&L, cost and turnover of every path.
const MOST_BYTES: u64 = 4 << 30;
/// Paths of a slab: a multiple of the blocks of the reduction.
const SLAB: u64 = 1 << 20;

/// A market to hedge in.
#[derive(Debug, Clone, PartialEq)]
pub struct Market {
    /// What rows and pages call it.
    pub name: String,
    /// What moves the spot.
    pub model: Model,
    /// Price at the start.
    pub spot: f64,
    /// Growth of the expected spot a year (Bootstrap, Regimes: added to their own).
    pub drift: f64,
    /// Interest rate a year, continuously compounded.
    pub rate: f64,
    /// Dividend yield a year.
    pub dividend: f64,
}

/// What paths need besides the markets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sources<'a> {
    /// Futures beside the spot, for policies that trade them.
    pub basis: Option<Basis>,
    /// Prices [P,T+1] of markets whose model is `Replay`.
    pub given: Option<&'a [f32]>,
}

/// What to simulate: every combination of the lists.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeRequest {
    /// Markets.
    pub markets: Vec<Market>,
    /// What is hedged, one unit.
    pub options: Vec<HedgedOption>,
    /// When and how far to trade.
    pub policies: Vec<Policy>,
    /// What trades cost.
    pub costs: Vec<Costs>,
    /// Steps between decisions, 1 or more.
    pub rebalance: Vec<u32>,
    /// Annual volatilities that hedges use; empty: the market's own.
    pub hedge_volatility: Vec<f64>,
    /// T: a step is maturity / T years.
    pub steps: u32,
    /// P.
    pub paths: u64,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Whether paths 2i and 2i + 1 mirror each other.
    pub antithetic: bool,
    /// Which figures.
    pub risk: RiskOptions,
}

/// One way to hedge: a row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Setup {
    /// Index of its market.
    pub market: usize,
    /// Index of its option.
    pub option: usize,
    /// When and how far it trades.
    pub policy: Policy,
    /// What trades cost.
    pub costs: Costs,
    /// Steps between decisions.
    pub rebalance: u32,
    /// Annual volatility of its deltas and of the premium.
    pub hedge_volatility: f64,
}

/// What theory says of a row; NaN where it says nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Theory {
    /// Deviation of P&L: Derman and Kamal.
    pub sd: f64,
    /// Costs, proportional ones: Leland, and the first trade.
    pub cost: f64,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeRow {
    /// What was done.
    pub setup: Setup,
    /// Black-Scholes price of the option at the start, at the set-up's volatility.
    pub premium: f64,
    /// What came of it.
    pub risk: RiskFigures,
    /// What theory expected.
    pub theory: Theory,
    /// Distribution of P&L.
    pub histogram: Histogram,
}

/// All rows, in the order of [`HedgeRequest::setups`].
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeTable {
    /// One per set-up.
    pub rows: Vec<HedgeRow>,
    /// P.
    pub paths: u64,
    /// T.
    pub steps: u32,
    /// Launches of the simulation.
    pub launches: usize,
    /// Seconds of the whole.
    pub seconds: f64,
}

/// One path under one set-up.
#[derive(Debug, Clone, PartialEq)]
pub struct Explained {
    /// T + 1 steps; the last is maturity.
    pub steps: Vec<StepRow>,
    /// What the option paid.
    pub payoff: f64,
    /// P&L.
    pub pnl: f64,
    /// Σ costs.
    pub cost: f64,
}

/// One step of a path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRow {
    /// t.
    pub step: u32,
    /// Years from the start.
    pub time: f64,
    /// Spot.
    pub spot: f64,
    /// Black-Scholes delta, with the sign of the hedge.
    pub delta: f64,
    /// Gamma of the option.
    pub gamma: f64,
    /// Spot (or futures) held after the trade.
    pub holding: f64,
    /// Spot (or futures) bought.
    pub trade: f64,
    /// Cost of the step's trades.
    pub cost: f64,
    /// Cash after them.
    pub cash: f64,
    /// Cash and holdings less the option's Black-Scholes value.
    pub pnl: f64,
    /// Price of the second option or of the futures; NaN where there is none.
    pub hedge_price: f64,
    /// Second options held.
    pub option_holding: f64,
    /// Second options bought.
    pub option_trade: f64,
}

fn bad(name: &str, value: impl std::fmt::Display, help: &str) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() }
}

impl HedgeRequest {
    /// A daily delta hedge without costs, over 100,000 paths of 252 steps.
    pub fn new(market: Market, option: HedgedOption) -> HedgeRequest {
        HedgeRequest {
            markets: vec![market],
            options: vec![option],
            policies: vec![Policy::Delta],
            costs: vec![Costs::default()],
            rebalance: vec![1],
            hedge_volatility: Vec::new(),
            steps: 252,
            paths: 100_000,
            seed: 0,
            antithetic: false,
            risk: RiskOptions::default(),
        }
    }

    /// Checks every market, option and set-up, and that the results fit.
    /// # Errors
    /// `Parameter` naming what is illegal; `TooLarge` for too many paths.
    pub fn check(&self) -> Result<()> {
        let empty = [("markets", self.markets.len()), ("options", self.options.len()), ("policies", self.policies.len()), ("costs", self.costs.len())];
        if let Some((name, _)) = empty.iter().chain(&[("rebalance", self.rebalance.len())]).find(|(_, n)| *n == 0) {
            return Err(bad(name, "none", "give one at least"));
        }
        if self.paths == 0 {
            return Err(bad("paths", 0, "give the paths to simulate, 1 or more"));
        }
        if self.paths > MOST_BYTES / 12 {
            let help = "simulate fewer paths: standard errors fall with their root only, 10 million know a deviation to 0.03 %".into();
            let needed = self.paths.saturating_mul(12);
            return Err(Error::TooLarge {
                what: format!("{OP}: P&L, cost and turnover of {} paths", self.paths),
                needed,
                limit: MOST_BYTES,
                unit: "bytes",
                help,
            });
        }
        self.risk.check()?;
        if let Some(v) = self.hedge_volatility.iter().find(|v| !(v.is_finite() && **v > 0.0)) {
            return Err(bad("hedge_volatility", v, "give an annual volatility above 0: 0.2 is twenty per cent"));
        }
        for option in &self.options {
            if !(option.maturity.is_finite() && option.maturity > 0.0) {
                return Err(bad("maturity", option.maturity, "give years to maturity, above 0"));
            }
            for market in &self.markets {
                hedge::check_market(&self.market_of(market, option))?;
                self.generator(market, option.maturity, None)?;
            }
        }
        for setup in self.setups() {
            let (market, option) = (&self.markets[setup.market], &self.options[setup.option]);
            let shared = self.market_of(market, option);
            let own = self.own(&setup);
            hedge::check_setup(&shared, &own)?;
            if setup.policy == Policy::Leland {
                leland_volatility(own.volatility, own.costs.fraction(), shared.dt() * f64::from(own.every), option.position)?;
            }
        }
        Ok(())
    }

    /// The grid: markets × options × volatilities × policies × intervals × costs, the last fastest. Rows that cannot differ stand once: `none`
    /// has no interval and no costs, `static` no interval.
    pub fn setups(&self) -> Vec<Setup> {
        let mut all = Vec::new();
        for (market, m) in self.markets.iter().enumerate() {
            let volatilities = if self.hedge_volatility.is_empty() { vec![self.volatility(m)] } else { self.hedge_volatility.clone() };
            for option in 0..self.options.len() {
                for &hedge_volatility in &volatilities {
                    for policy in &self.policies {
                        let (intervals, costs) = match policy {
                            Policy::None => (self.rebalance.len().min(1), self.costs.len().min(1)),
                            Policy::Static => (self.rebalance.len().min(1), self.costs.len()),
                            _ => (self.rebalance.len(), self.costs.len()),
                        };
                        for &rebalance in &self.rebalance[..intervals] {
                            let setup = |&costs: &Costs| Setup { market, option, policy: policy.clone(), costs, rebalance, hedge_volatility };
                            all.extend(self.costs[..costs].iter().map(setup));
                        }
                    }
                }
            }
        }
        all
    }

    /// Annual volatility of a market that hedges use by default: σ, the root of the variance that is expected on average over the first option's life,
    /// that of the stationary regimes or of the history.
    pub fn volatility(&self, market: &Market) -> f64 {
        let maturity = self.options.first().map_or(1.0, |o| o.maturity);
        if let Model::Heston(v) | Model::Bates(v, _) = &market.model {
            let decay = v.reversion * maturity;
            let share = if decay > 1e-9 { -(-decay).exp_m1() / decay } else { 1.0 };
            return (v.mean + (v.start - v.mean) * share).sqrt();
        }
        let markets = self.generator(market, maturity, None);
        markets.map_or(f64::NAN, |m| f64::from(m.field(0, field::VOLATILITY)))
    }

    fn market_of(&self, market: &Market, option: &HedgedOption) -> HedgeMarket {
        HedgeMarket { level: market.spot, rate: market.rate, dividend: market.dividend, maturity: option.maturity, steps: self.steps }
    }

    fn generator(&self, market: &Market, maturity: f64, basis: Option<Basis>) -> Result<Markets> {
        let draws = Draws { seed: self.seed, antithetic: self.antithetic, matched: false };
        let own = paths::Market { spot: market.spot, drift: market.drift, model: market.model.clone(), basis };
        Markets::new(OP, &[own], u64::from(self.steps), maturity, &draws)
    }

    /// A set-up as the kernels take it.
    fn own(&self, setup: &Setup) -> hedge::Setup {
        let (market, option) = (&self.markets[setup.market], self.options[setup.option]);
        let premium = option_at_level(&self.market_of(market, &option), &option, setup.hedge_volatility)[0];
        hedge::Setup {
            option,
            policy: setup.policy.clone(),
            costs: setup.costs,
            every: setup.rebalance,
            volatility: setup.hedge_volatility,
            premium: Some(premium),
        }
    }

    /// Simulates everything. `progress` hears of path-steps × set-ups done and in all; what it returns as an error stops the run.
    /// # Errors
    /// Those of [`HedgeRequest::check`], of `progress`, and of the device.
    pub fn run(&self, device: &Device, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<HedgeTable> {
        self.run_with(device, &Sources::default(), progress)
    }

    /// As [`HedgeRequest::run`], with futures or given paths.
    /// # Errors
    /// As for [`HedgeRequest::run`]; `Parameter` where a policy trades futures and there are none, or given paths are missing.
    pub fn run_with(&self, device: &Device, sources: &Sources<'_>, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<HedgeTable> {
        self.check()?;
        let (start, setups) = (Instant::now(), self.setups());
        let mut table: Vec<Option<(RiskFigures, Histogram)>> = vec![None; setups.len()];
        let total = self.paths.saturating_mul(u64::from(self.steps)).saturating_mul(setups.len() as u64);
        let (mut done, mut launches) = (0, 0);
        progress(0, total)?;
        for group in groups(&self.options, &setups) {
            let simulation = Simulation::of(self, device, sources, &setups, &group)?;
            for run in group.chunks(self.abreast(device)) {
                let own: Vec<hedge::Setup> = run.iter().map(|&i| self.own(&setups[i])).collect();
                let hedges = Hedges::new(device, &simulation.market, &own)?;
                let mut slabs = Vec::new();
                for first in (0..self.paths).step_by(SLAB as usize) {
                    let paths = first..(first + SLAB).min(self.paths);
                    let count = paths.end - paths.start;
                    let mut pass = device.pass(OP);
                    slabs.push(Slab { results: simulation.record(&mut pass, &hedges, paths)?, paths: count });
                    launches += pass.launches();
                    pass.submit()?;
                    done += count * u64::from(self.steps) * run.len() as u64;
                    progress(done, total)?;
                }
                let figures = hedge_risk(device, &slabs, run.len(), &self.risk, self.antithetic)?;
                run.iter().zip(figures).for_each(|(&i, figures)| table[i] = Some(figures));
            }
        }
        let missing = || Error::Internal("a set-up of the hedge has no figures".into());
        let rows = setups.into_iter().zip(table).map(|(s, t)| t.ok_or_else(missing).map(|t| self.row(s, t))).collect::<Result<_>>()?;
        Ok(HedgeTable { rows, paths: self.paths, steps: self.steps, launches, seconds: start.elapsed().as_secs_f64() })
    }

    /// Set-ups whose results are kept at once.
    fn abreast(&self, device: &Device) -> usize {
        let by_memory = KEPT_BYTES / (12 * self.paths);
        let by_binding = device.limits().binding_bytes / (12 * self.paths.min(SLAB));
        by_memory.min(by_binding).clamp(1, 4096) as usize
    }

    fn row(&self, setup: Setup, (mut risk, histogram): (RiskFigures, Histogram)) -> HedgeRow {
        let (market, option) = (&self.markets[setup.market], &self.options[setup.option]);
        let shared = self.market_of(market, option);
        let premium = option_at_level(&shared, option, setup.hedge_volatility)[0];
        risk.turnover /= market.spot;
        risk.indifference_price = premium + option.position.sign() * (-market.rate * option.maturity).exp() * risk.entropic;
        let theory = self.theory(&setup, &shared);
        HedgeRow { premium, risk, theory, histogram, setup }
    }

    fn theory(&self, setup: &Setup, market: &HedgeMarket) -> Theory {
        let (option, volatility) = (&self.options[setup.option], setup.hedge_volatility);
        let matches = matches!(self.markets[setup.market].model, Model::Gbm { volatility: v } if (v / volatility - 1.0).abs() < 1e-3);
        let hedges = matches!(setup.policy, Policy::Delta | Policy::Leland) && matches!(option.kind, OptionKind::Call | OptionKind::Put);
        if !(matches && hedges) {
            return Theory { sd: f64::NAN, cost: f64::NAN };
        }
        let trades = f64::from(self.steps.div_ceil(setup.rebalance));
        let [price, delta, _, vega] = option_at_level(market, option, volatility);
        let dt = market.dt() * f64::from(setup.rebalance);
        // Leland's volatility for the side that pays: a short option costs its price at the higher one, a long one gives its price at the lower.
        let other = leland_volatility(volatility, setup.costs.fraction(), dt, option.position);
        let first = setup.costs.fraction() * delta.abs() * market.level;
        let cost = other.map_or(f64::NAN, |v| (option_at_level(market, option, v)[0] - price).abs() + first);
        Theory { sd: (std::f64::consts::PI / 4.0).sqrt() * vega * volatility / trades.sqrt(), cost }
    }

    /// P&L of some paths under a set-up as the device computes it.
    /// # Errors
    /// As for [`HedgeRequest::run`]; `Parameter` for a set-up or a path that is not there.
    pub fn pnl_of(&self, device: &Device, setup: usize, paths: Range<u64>) -> Result<Vec<f64>> {
        self.pnl_with(device, &Sources::default(), setup, paths)
    }

    /// As [`HedgeRequest::pnl_of`], with futures or given paths.
    /// # Errors
    /// As for [`HedgeRequest::pnl_of`].
    pub fn pnl_with(&self, device: &Device, sources: &Sources<'_>, setup: usize, paths: Range<u64>) -> Result<Vec<f64>> {
        let setups = self.chosen(setup, &paths)?;
        let simulation = Simulation::of(self, device, sources, &setups, &[setup])?;
        let hedges = Hedges::new(device, &simulation.market, &[self.own(&setups[setup])])?;
        let mut pass = device.pass(OP);
        let results = simulation.record(&mut pass, &hedges, paths.clone())?;
        let read = pass.read(results.view(0..paths.end - paths.start))?;
        pass.submit()?.f64(read)
    }

    fn chosen(&self, setup: usize, paths: &Range<u64>) -> Result<Vec<Setup>> {
        self.check()?;
        let setups = self.setups();
        if setup >= setups.len() {
            return Err(bad("setup", setup, &format!("set-ups are numbered from 0 to {}", setups.len() - 1)));
        }
        if paths.start >= paths.end || paths.end > self.paths {
            return Err(bad("path", format!("{}..{}", paths.start, paths.end), &format!("paths are numbered from 0 to {}", self.paths - 1)));
        }
        Ok(setups)
    }

    /// One path of the run again, step by step: its prices from the device, the hedge in f64.
    /// # Errors
    /// As for [`HedgeRequest::pnl_of`].
    pub fn explain(&self, device: &Device, setup: usize, path: u64) -> Result<Explained> {
        self.explain_with(device, &Sources::default(), setup, path)
    }

    /// As [`HedgeRequest::explain`], with futures or given paths.
    /// # Errors
    /// As for [`HedgeRequest::pnl_of`].
    pub fn explain_with(&self, device: &Device, sources: &Sources<'_>, setup: usize, path: u64) -> Result<Explained> {
        let setups = self.chosen(setup, &(path..path.saturating_add(1)))?;
        let own = self.own(&setups[setup]);
        let simulation = Simulation::of(self, device, sources, &setups, &[setup])?;
        let with_futures = own.policy.trades_futures();
        let mut pass = device.pass(OP);
        let stored = Stored { variance: false, events: with_futures, future: with_futures };
        let given = simulation.given.as_ref().map(View::from);
        let one = paths::paths(&mut pass, &simulation.markets, 0, path..path + 1, given.as_ref(), stored)?;
        let spot = pass.read(&one.spot)?;
        let future = one.future.as_ref().map(|x| pass.read(x)).transpose()?;
        let events = one.events.as_ref().map(|x| pass.read(x)).transpose()?;
        let mut finished = pass.submit()?;
        let spot = finished.f64(spot)?;
        let future = future.map_or(Ok(Vec::new()), |read| finished.f64(read))?;
        let events = events.map_or(Ok(Vec::new()), |read| finished.u32(read))?;
        let dt = simulation.market.dt();
        let steps = hedge_steps(&simulation.market, &own, &spot, &future, &events)?;
        let cost = steps.iter().map(|s| s.cost).sum();
        let pnl = steps.last().map_or(f64::NAN, |s| s.pnl);
        let payoff = spot.last().map_or(f64::NAN, |&s| own.option.kind.payoff(s, own.option.strike));
        let row = |(t, (s, &spot)): (usize, (hedge::HedgeStep, &f64))| StepRow {
            step: t as u32,
            time: t as f64 * dt,
            spot,
            delta: s.delta,
            gamma: s.gamma,
            holding: s.holding,
            trade: s.trade,
            cost: s.cost,
            cash: s.cash,
            pnl: s.pnl,
            hedge_price: s.hedge_price,
            option_holding: s.option_holding,
            option_trade: s.option_trade,
        };
        Ok(Explained { steps: steps.into_iter().zip(&spot).enumerate().map(row).collect(), payoff, pnl, cost })
    }
}

/// Simulates a request; see [`HedgeRequest::run`].
/// # Errors
/// As for [`HedgeRequest::run`].
pub fn run(device: &Device, request: &HedgeRequest, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<HedgeTable> {
    request.run(device, progress)
}

/// Set-ups that share their paths: of one market and maturity, with or without futures.
fn groups(options: &[HedgedOption], setups: &[Setup]) -> Vec<Vec<usize>> {
    let key = |i: usize| (setups[i].market, options[setups[i].option].maturity.to_bits(), setups[i].policy.trades_futures());
    let mut order: Vec<usize> = (0..setups.len()).collect();
    order.sort_by_key(|&i| (key(i), i));
    order.chunk_by(|&a, &b| key(a) == key(b)).map(<[usize]>::to_vec).collect()
}

/// Paths of a group of set-ups.
struct Simulation {
    market: HedgeMarket,
    markets: Markets,
    given: Option<Buffer>,
}

impl Simulation {
    fn of(request: &HedgeRequest, device: &Device, sources: &Sources<'_>, setups: &[Setup], group: &[usize]) -> Result<Simulation> {
        let first = group.first().map(|&i| &setups[i]).ok_or_else(|| Error::Internal("a group of no set-ups".into()))?;
        let (own, option) = (&request.markets[first.market], &request.options[first.option]);
        let with_futures = first.policy.trades_futures();
        if with_futures && sources.basis.is_none() {
            return Err(bad("policy", first.policy.name(), "it trades futures: give their basis"));
        }
        let markets = request.generator(own, option.maturity, sources.basis.filter(|_| with_futures))?;
        let given = match (&own.model, sources.given) {
            (Model::Replay, Some(prices)) => {
                let row = u64::from(request.steps) + 1;
                if prices.len() as u64 != request.paths * row {
                    let expected = format!("[P,T+1] = [{}, {row}] prices", request.paths);
                    return Err(Error::Shape { op: OP, arg: "given".into(), expected, got: format!("{} values", prices.len()) });
                }
                if let Some(i) = prices.iter().position(|s| !(s.is_normal() && *s > 0.0)) {
                    return Err(bad(&format!("given[{}, {}]", i as u64 / row, i as u64 % row), prices[i], "prices must be positive, finite numbers"));
                }
                Some(device.upload("given", prices)?)
            }
            (Model::Replay, None) => return Err(bad("model", "replay", "give the prices of the paths")),
            _ => None,
        };
        Ok(Simulation { market: request.market_of(own, option), markets, given })
    }

    fn record(&self, pass: &mut crate::kernels::Pass, hedges: &Hedges, paths: Range<u64>) -> Result<Buffer> {
        let row = self.markets.steps() + 1;
        let given = self.given.as_ref().map(|g| g.view(paths.start * row..paths.end * row));
        hedges.simulate(pass, &self.markets, 0, paths, given.as_ref())
    }
}
