//! Random paths of market models, one set of functions for every kernel that simulates: this op stores the paths, others consume them as they go.
//!
//! x(t) = ln S(t)/S(0), dt = maturity/T, z standard normals; every kind of market adds its drift a per step:
//! ```text
//! gbm        x += a + σ√dt·z                                     a = (μ − ½σ²)·dt
//! merton     x += a + n·μ_J + √(σ²dt + n·σ_J²)·z                 n ~ Poisson(λ·dt), a = (μ − ½σ² − λ·(e^{μ_J + ½σ_J²} − 1))·dt
//! heston     x += a − ln M + K2·v' + √(K3·(v + v'))·z − ½K3·v    v → v' by QE, M = E[e^{A·v'} | v], A = K2 + ½K3
//! bates      heston, with the jumps of merton
//! regimes    x += a + a(k) + σ(k)√dt·z, then k → k' ~ trans(k, ·)
//! bootstrap  x += a + h(i), then i → i + 1 or a random i         blocks of geometric length (stationary) or of fixed length (circular)
//! replay     x = ln of a given price over S(0)
//! assets     x_i += a_i(k) + Σ_j L_ij(k)·z_j                    L Cholesky factor of the covariance of a step; or a row of joint history
//! futures    ln F/S → b + (1 − e^{−κdt})·(mean − b) + s·(ρ·z + √(1−ρ²)·z'),  s² = σ²·(1 − e^{−2κdt})/2κ
//! ```
//! QE, with m, s² the mean and variance of v' given v and ψ = s²/m²: up to ψ = 1.5 v' = m·(1 + q·Φ⁻¹(u))²/(1 + q²),
//! q² = ψ/(2 − ψ + √(2·(2 − ψ))); above it v' = max(0, ½m·(ψ + 1)·ln((1 − p)/(1 − u))), p = (ψ − 1)/(ψ + 1). ln M is exact in both, so that
//! E[S] grows by its drift whatever dt; where M is infinite the plain coefficient K0 takes its place. K2 = ½dt·(κρ/ξ − ½) + ρ/ξ,
//! K3 = ½dt·(1 − ρ²). Given its number of jumps a log step is normal, so jumps need no normals of their own.
//!
//! Draws    word t mod 4 of Philox at counter (path low, path high, t/4, factor | STREAM·2^16), the seed as key; the four words give four normals as
//!          in kernels/philox.rs. A path depends on its index alone, never on the launch. Antithetic: paths 2i and 2i + 1 take the
//!          draws of i, the second with −z and the complement of every word. Jump counts, regimes and bars of the bootstrap come from
//!          words by comparison with whole thresholds ⌊2³²·P⌋, so they are equal on every device.
//! Matched  z' = (z − mean)/sd per step and factor over all paths: their sums first, then the paths.
//!
//! Shapes   market [Mk, FIELDS] and tails, market_words [Mk, WORDS] and tails; spot, variance, future [P,T+1]; events [P,T+1] u32: the
//!          regime at t, or the jumps of the step that led to t, or the bar of history that it took.
//! Launch   `paths_*` a thread per path; `paths_assets_*` a thread per path and asset; `paths_moments` a workgroup per BLOCK paths, four steps, a factor.
//! Scratch  none.
//! Floor    4 bytes written per path-step; about 90 instructions for gbm, 22 of them Philox.
//! Speed    million path-steps a second of one Zen 4 core with AVX-512, generated and not stored: random words 2740, normals 1330, gbm 980 (1070
//!          with two vectors of paths interleaved), merton 610, three regimes 540, bootstrap 500, circular 650, heston with Feller's
//!          condition violated 226, bates 203.
//! Numerics log-spot is summed in f32: spot within 6e-7 relative of f64 after 255 steps, Heston 3e-6. QE changes its form at ψ = 1.5: a
//!          step whose ψ falls within rounding of it (some 1e-7 of the steps) may take the other one on another device.
//! Source   Andersen 2008, J. Computational Finance 11(3) (QE, martingale correction); Merton 1976, J. Financial Economics 3; Bates 1996, Review
//!          of Financial Studies 9; Politis & Romano 1992, 1994 (bootstrap); Salmon et al. 2011 (Philox).
//! Files    shaders/paths_generator.wgsl, paths.wgsl · cuda/paths.cuh, paths.cu · kernels/paths_lanes.rs · reference: `paths_cpu`

use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::philox::{normals, philox4x32, uniform};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the kernels that store paths.
    pub struct PathsParams {
        /// Paths of this launch.
        paths: u32,
        /// Steps.
        t: u32,
        /// Row of the market.
        market: u32,
        /// Index of the first path, low word …
        first: u32,
        /// … and high word.
        first_high: u32,
        /// What to store besides spot: 1 variance, 2 events, 4 futures.
        store: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;
/// Stream of the random numbers.
pub const STREAM: u32 = 0x5054;
/// Factors of the counters.
pub mod factor {
    /// Normal of the first asset; asset n takes SPOT + n.
    pub const SPOT: u32 = 0;
    /// Uniform of the variance.
    pub const VARIANCE: u32 = 0x1000;
    /// Number of jumps.
    pub const JUMPS: u32 = 0x2000;
    /// Transition of the regime.
    pub const REGIME: u32 = 0x4000;
    /// First regime.
    pub const FIRST_REGIME: u32 = 0x4001;
    /// Normal of the basis.
    pub const BASIS: u32 = 0x5000;
    /// Whether a block of the bootstrap ends.
    pub const RESTART: u32 = 0x6000;
    /// Where the next block starts.
    pub const BLOCK: u32 = 0x6001;
}

const OP: &str = "paths";

// ---- models -----------------------------------------------------------------------------------------------------------------

/// Kind of a market, a constant of every kernel that simulates it; [`FUTURES`] is added where a market has a basis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// Geometric Brownian motion.
    Gbm = 0,
    /// With jumps.
    Merton = 1,
    /// Stochastic variance.
    Heston = 2,
    /// Stochastic variance and jumps.
    Bates = 3,
    /// Volatility and drift by a hidden Markov chain.
    Regimes = 4,
    /// Historical returns in random blocks.
    Bootstrap = 5,
    /// Given paths.
    Replay = 6,
}

/// Added to the kind in the constant MODEL: futures beside the spot.
pub const FUTURES: u32 = 16;

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 7] = [Kind::Gbm, Kind::Merton, Kind::Heston, Kind::Bates, Kind::Regimes, Kind::Bootstrap, Kind::Replay];

    /// Name in texts and kernel names.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Gbm => "gbm",
            Kind::Merton => "merton",
            Kind::Heston => "heston",
            Kind::Bates => "bates",
            Kind::Regimes => "regimes",
            Kind::Bootstrap => "bootstrap",
            Kind::Replay => "replay",
        }
    }

    fn of(word: u32) -> Kind {
        Kind::ALL.into_iter().find(|&kind| kind as u32 == word % FUTURES).unwrap_or(Kind::Gbm)
    }
}

/// Jumps of the log-price: normal sizes at Poisson times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Jumps {
    /// Jumps a year, λ ≥ 0.
    pub intensity: f64,
    /// Mean of a log jump.
    pub mean: f64,
    /// Deviation of a log jump, ≥ 0.
    pub sd: f64,
}

/// Stochastic variance: dv = κ(θ − v)dt + ξ√v dW, correlated ρ with the spot. 2κθ < ξ² (Feller's condition violated) is allowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Variance {
    /// Variance at the start, v0 ≥ 0, a year.
    pub start: f64,
    /// Long-run variance θ ≥ 0.
    pub mean: f64,
    /// Mean reversion κ ≥ 0, a year.
    pub reversion: f64,
    /// Volatility of variance ξ ≥ 0.
    pub volatility: f64,
    /// Correlation ρ with the spot, −1 … 1.
    pub correlation: f64,
}

/// What moves a market; rates and volatilities a year.
#[derive(Debug, Clone, PartialEq)]
pub enum Model {
    /// Geometric Brownian motion.
    Gbm {
        /// Volatility σ ≥ 0.
        volatility: f64,
    },
    /// Merton's jump diffusion; the drift is compensated for the jumps.
    Merton {
        /// Volatility σ ≥ 0 of the diffusion.
        volatility: f64,
        /// The jumps.
        jumps: Jumps,
    },
    /// Heston's stochastic variance.
    Heston(Variance),
    /// Heston with jumps.
    Bates(Variance, Jumps),
    /// K regimes with their own drift and volatility; the regime at t governs step t.
    Regimes {
        /// Growth rate of each regime [K], added to the market's.
        drift: Vec<f64>,
        /// Volatility of each [K].
        volatility: Vec<f64>,
        /// Transition probabilities of a step [K,K].
        trans: Vec<f64>,
        /// Probabilities of the regime at time 0 [K].
        start: Vec<f64>,
    },
    /// Blocks of historical log-returns, one per step; a block that passes the end goes on at the start.
    Bootstrap {
        /// Historical log-returns [n] of a step each; the market's drift is added to them.
        log_returns: Vec<f64>,
        /// Length of a block ≥ 1: mean of a geometric one, or a whole number.
        block: f64,
        /// Blocks of one length instead of geometric ones.
        circular: bool,
    },
    /// Given prices; see [`Markets::with_given`].
    Replay,
}

impl Model {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Model::Gbm { .. } => Kind::Gbm,
            Model::Merton { .. } => Kind::Merton,
            Model::Heston(_) => Kind::Heston,
            Model::Bates(..) => Kind::Bates,
            Model::Regimes { .. } => Kind::Regimes,
            Model::Bootstrap { .. } => Kind::Bootstrap,
            Model::Replay => Kind::Replay,
        }
    }
}

/// The log basis ln F/S: an Ornstein-Uhlenbeck process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Basis {
    /// At time 0.
    pub start: f64,
    /// Long-run mean.
    pub mean: f64,
    /// Mean reversion κ ≥ 0, a year.
    pub reversion: f64,
    /// Volatility ≥ 0, a year.
    pub volatility: f64,
    /// Correlation of its shocks with the normals of the spot, −1 … 1.
    pub correlation: f64,
}

/// A market.
#[derive(Debug, Clone, PartialEq)]
pub struct Market {
    /// Price at time 0, > 0.
    pub spot: f64,
    /// Growth rate of the expected spot, a year (Bootstrap, Regimes: added to their own).
    pub drift: f64,
    /// What moves it.
    pub model: Model,
    /// Futures beside it.
    pub basis: Option<Basis>,
}

/// How random numbers are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Draws {
    /// Seed.
    pub seed: u64,
    /// Paths 2i and 2i + 1 mirror each other.
    pub antithetic: bool,
    /// Normals with mean 0 and deviation 1 over all paths at every step: [`match_moments`] must fill the table.
    pub matched: bool,
}

// ---- the market table -------------------------------------------------------------------------------------------------------

/// Reals of a market's row.
pub const FIELDS: usize = 32;
/// Words of a market's row.
pub const WORDS: usize = 16;

/// Columns of a market's row of reals; per step where not said otherwise.
pub mod field {
    /// Price at time 0.
    pub const SPOT: usize = 0;
    /// Drift of the log-price.
    pub const DRIFT: usize = 1;
    /// σ√dt.
    pub const SD: usize = 2;
    /// σ²dt.
    pub const VARIANCE: usize = 3;
    /// Mean of a log jump.
    pub const JUMP_MEAN: usize = 4;
    /// Variance of a log jump.
    pub const JUMP_VARIANCE: usize = 5;
    /// Variance at time 0, a year.
    pub const V0: usize = 6;
    /// e^{−κdt}.
    pub const DECAY: usize = 7;
    /// θ(1 − e^{−κdt}).
    pub const MEAN: usize = 8;
    /// s² = S1·v + S0.
    pub const S1: usize = 9;
    /// The other part of s².
    pub const S0: usize = 10;
    /// Coefficient of v.
    pub const K1: usize = 11;
    /// Coefficient of v'.
    pub const K2: usize = 12;
    /// Coefficient of v and v' under the root.
    pub const K3: usize = 13;
    /// Constant without martingale correction.
    pub const K0: usize = 14;
    /// K2 + ½K3.
    pub const A: usize = 15;
    /// Log basis at time 0.
    pub const BASIS: usize = 16;
    /// e^{−κdt} of the basis.
    pub const BASIS_DECAY: usize = 17;
    /// Its mean·(1 − e^{−κdt}).
    pub const BASIS_MEAN: usize = 18;
    /// Its loading on the spot's normal.
    pub const BASIS_SPOT: usize = 19;
    /// Its loading on its own.
    pub const BASIS_OWN: usize = 20;
    /// Years of a step.
    pub const DT: usize = 22;
    /// Growth rate of the expected spot, a year.
    pub const DRIFT_ANNUAL: usize = 23;
    /// Volatility for reference, a year: σ, √v0, that of the stationary regimes, of the history; 0 for replay.
    pub const VOLATILITY: usize = 24;
}

/// Columns of a market's row of words.
pub mod word {
    /// Kind, and FUTURES.
    pub const KIND: usize = 0;
    /// Seed, low word …
    pub const SEED: usize = 1;
    /// … and high word.
    pub const SEED_HIGH: usize = 2;
    /// 1: antithetic.
    pub const ANTITHETIC: usize = 3;
    /// Steps.
    pub const STEPS: usize = 4;
    /// First word of its thresholds.
    pub const TABLE: usize = 5;
    /// Thresholds of the jumps, or regimes.
    pub const ENTRIES: usize = 6;
    /// First real of its regimes [K,2], history [n] or given prices [paths,T+1].
    pub const REALS: usize = 7;
    /// Bars of history.
    pub const BARS: usize = 8;
    /// A block ends where the word is below it.
    pub const RESTART: usize = 9;
    /// Length of circular blocks; 0: geometric.
    pub const BLOCK: usize = 10;
    /// First real of the table of moments [factors,T,2]; 0: none.
    pub const MATCHED: usize = 11;
    /// Low word of the index of the first given path.
    pub const FIRST: usize = 12;
    /// Assets of a joint market; 0: one, with a row of reals of its own.
    pub const ASSETS: usize = 13;
}

/// Markets of one kind, prepared for a number of steps: coefficients in f64, rounded once to f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Markets {
    kind: Kind,
    futures: bool,
    count: u32,
    steps: u32,
    matched: Option<u32>,
    reals: Vec<f32>,
    words: Vec<u32>,
}

/// Most steps of a path.
pub const MAX_STEPS: u64 = 1 << 24;
/// Most regimes.
pub const MAX_REGIMES: usize = 64;
/// Most jumps expected in a step.
const MAX_JUMPS: f64 = 64.0;

fn wrong(op: &'static str, name: &str, value: impl std::fmt::Display, help: &str) -> Error {
    Error::Parameter { op, name: name.into(), value: value.to_string(), help: help.into() }
}

fn at_least(op: &'static str, name: &str, x: f64, least: f64, help: &str) -> Result<f64> {
    if x.is_finite() && x >= least { Ok(x) } else { Err(wrong(op, name, x, help)) }
}

fn correlation_of(op: &'static str, name: &str, x: f64) -> Result<f64> {
    if x.abs() <= 1.0 { Ok(x) } else { Err(wrong(op, name, x, "correlations lie between −1 and 1")) }
}

/// P·2³² as a threshold: a word is below it with probability P; 1 is as near as words come.
fn threshold(p: f64) -> u32 {
    (p.clamp(0.0, 1.0) * 4_294_967_296.0).min(4_294_967_295.0) as u32
}

/// Thresholds ⌊2³²·P(n ≤ k)⌋ of a Poisson number, as far as words tell them apart.
fn poisson_thresholds(mean: f64) -> Vec<u32> {
    let (mut p, mut sum, mut k) = ((-mean).exp(), 0.0, 0.0);
    let mut thresholds = Vec::new();
    loop {
        sum += p;
        if threshold(sum) >= u32::MAX - 1 {
            return thresholds;
        }
        thresholds.push(threshold(sum));
        k += 1.0;
        p *= mean / k;
    }
}

/// Thresholds of a row of probabilities [K]: K − 1 cumulative sums.
fn row_thresholds(op: &'static str, name: &str, row: &[f64]) -> Result<Vec<u32>> {
    let sum: f64 = row.iter().sum();
    if row.iter().any(|p| !(p.is_finite() && *p >= -1e-6)) || (sum - 1.0).abs() > 1e-4 {
        return Err(wrong(op, name, format!("{row:?}"), "every row holds probabilities whose sum is 1"));
    }
    let cumulative = row.iter().scan(0.0, |c, p| {
        *c += p.max(0.0) / sum;
        Some(threshold(*c))
    });
    Ok(cumulative.take(row.len() - 1).collect())
}

/// Growth e^{mean + ½sd²} − 1 that a jump adds on average.
fn jump_growth(jumps: &Jumps) -> f64 {
    (jumps.mean + 0.5 * jumps.sd * jumps.sd).exp_m1()
}

/// Stationary probabilities of a chain, by repeated squaring of a lazy version of it.
fn stationary(trans: &[f64], k: usize) -> Vec<f64> {
    let mut a: Vec<f64> = trans.iter().enumerate().map(|(i, p)| 0.5 * p + if i % (k + 1) == 0 { 0.5 } else { 0.0 }).collect();
    for _ in 0..40 {
        let squared: Vec<f64> = (0..k * k).map(|i| (0..k).map(|j| a[i / k * k + j] * a[j * k + i % k]).sum()).collect();
        let sums: Vec<f64> = squared.chunks(k).map(|row| row.iter().sum()).collect();
        a = squared.iter().enumerate().map(|(i, p)| p / sums[i / k]).collect();
    }
    a[..k].to_vec()
}

impl Markets {
    /// Prepares markets of one kind for `steps` steps of `maturity`/`steps` years.
    /// # Errors
    /// `Parameter` that names what is wrong and what is legal: no market, markets of several kinds, no or too many steps, a maturity that is not
    /// positive, volatilities below 0, probabilities that do not sum to 1, NaN.
    pub fn new(op: &'static str, markets: &[Market], steps: u64, maturity: f64, draws: &Draws) -> Result<Markets> {
        let Some(first) = markets.first() else { return Err(wrong(op, "markets", 0, "give at least one")) };
        if steps == 0 || steps > MAX_STEPS {
            return Err(wrong(op, "steps", steps, "1 to 2^24"));
        }
        if !(maturity.is_finite() && maturity > 0.0) {
            return Err(wrong(op, "maturity", maturity, "a positive number of years"));
        }
        let (kind, futures) = (first.model.kind(), first.basis.is_some());
        if markets.iter().any(|m| m.model.kind() != kind || m.basis.is_some() != futures) {
            return Err(wrong(op, "markets", "of several kinds", "a table holds one kind, all with futures or none: give one call per kind"));
        }
        let matched = kind != Kind::Bootstrap && kind != Kind::Replay && draws.matched;
        let mut table = Markets {
            kind,
            futures,
            count: markets.len() as u32,
            steps: steps as u32,
            matched: None,
            reals: vec![0.0; FIELDS * markets.len()],
            words: vec![0; WORDS * markets.len()],
        };
        if matched {
            table.matched = Some(table.reals.len() as u32);
            let factors = if futures { 2 } else { 1 };
            table.reals.extend([1.0, 0.0].repeat(factors * steps as usize));
        }
        for (i, market) in markets.iter().enumerate() {
            let row = table.row(op, i, market, maturity / steps as f64)?;
            if let Some(j) = row.iter().position(|x| !(*x as f32).is_finite()) {
                return Err(wrong(op, &format!("coefficient {j} of market {i}"), row[j], "its parameters are too large for f32"));
            }
            for (to, x) in table.reals[i * FIELDS..].iter_mut().zip(row) {
                *to = x as f32;
            }
            let words = &mut table.words[i * WORDS..];
            words[word::KIND] = table.kind as u32 | if futures { FUTURES } else { 0 };
            (words[word::SEED], words[word::SEED_HIGH]) = (draws.seed as u32, (draws.seed >> 32) as u32);
            words[word::ANTITHETIC] = u32::from(draws.antithetic);
            words[word::STEPS] = steps as u32;
            words[word::MATCHED] = table.matched.unwrap_or(0);
        }
        if table.reals.len() as u64 > u64::from(u32::MAX) {
            return Err(wrong(op, "markets", markets.len(), "their tables pass 2^32 numbers: give fewer at once"));
        }
        Ok(table)
    }

    /// The row of a market; its tables go to the tails, the words that point to them into its row of words.
    fn row(&mut self, op: &'static str, index: usize, market: &Market, dt: f64) -> Result<[f64; FIELDS]> {
        if !(market.spot.is_finite() && market.spot > 0.0) {
            return Err(wrong(op, "spot", market.spot, "a positive price"));
        }
        let drift = at_least(op, "drift", market.drift, f64::MIN, "a number")?;
        let mut row = [0.0; FIELDS];
        (row[field::SPOT], row[field::DT], row[field::DRIFT_ANNUAL]) = (market.spot, dt, drift);
        row[field::DRIFT] = drift * dt;
        match &market.model {
            Model::Gbm { volatility } => diffusion(op, *volatility, dt, &mut row)?,
            Model::Merton { volatility, jumps } => {
                diffusion(op, *volatility, dt, &mut row)?;
                self.jumps(op, index, jumps, dt, &mut row)?;
            }
            Model::Heston(variance) => heston(op, variance, dt, &mut row)?,
            Model::Bates(variance, jumps) => {
                heston(op, variance, dt, &mut row)?;
                self.jumps(op, index, jumps, dt, &mut row)?;
            }
            Model::Regimes { drift, volatility, trans, start } => self.regimes(op, index, [drift, volatility, trans, start], dt, &mut row)?,
            Model::Bootstrap { log_returns, block, circular } => self.history(op, index, log_returns, *block, *circular, &mut row)?,
            Model::Replay => {}
        }
        if let Some(basis) = &market.basis {
            let kappa = at_least(op, "basis reversion", basis.reversion, 0.0, "at least 0")?;
            let sd = at_least(op, "basis volatility", basis.volatility, 0.0, "at least 0")?;
            let rho = correlation_of(op, "basis correlation", basis.correlation)?;
            let gone = -(-kappa * dt).exp_m1();
            let step = if kappa * dt < 1e-12 { sd * dt.sqrt() } else { sd * (-(-2.0 * kappa * dt).exp_m1() / (2.0 * kappa)).sqrt() };
            (row[field::BASIS], row[field::BASIS_DECAY], row[field::BASIS_MEAN]) = (basis.start, 1.0 - gone, basis.mean * gone);
            (row[field::BASIS_SPOT], row[field::BASIS_OWN]) = (step * rho, step * (1.0 - rho * rho).sqrt());
        }
        Ok(row)
    }

    fn jumps(&mut self, op: &'static str, index: usize, jumps: &Jumps, dt: f64, row: &mut [f64; FIELDS]) -> Result<()> {
        let intensity = at_least(op, "jump intensity", jumps.intensity, 0.0, "jumps a year, at least 0")?;
        let sd = at_least(op, "jump sd", jumps.sd, 0.0, "at least 0")?;
        at_least(op, "jump mean", jumps.mean, f64::MIN, "a number")?;
        if intensity * dt > MAX_JUMPS {
            return Err(wrong(op, "jump intensity", intensity, "more than 64 jumps a step: take more steps"));
        }
        row[field::DRIFT] -= intensity * jump_growth(jumps) * dt;
        (row[field::JUMP_MEAN], row[field::JUMP_VARIANCE]) = (jumps.mean, sd * sd);
        let thresholds = poisson_thresholds(intensity * dt);
        self.words[index * WORDS + word::TABLE] = self.words.len() as u32;
        self.words[index * WORDS + word::ENTRIES] = thresholds.len() as u32;
        self.words.extend(thresholds);
        Ok(())
    }

    fn regimes(&mut self, op: &'static str, index: usize, [drift, volatility, trans, start]: [&[f64]; 4], dt: f64, row: &mut [f64; FIELDS]) -> Result<()> {
        let k = drift.len();
        if k == 0 || k > MAX_REGIMES || volatility.len() != k || start.len() != k || trans.len() != k * k {
            let got = format!("{} drifts, {} volatilities, {} transitions, {} start", drift.len(), volatility.len(), trans.len(), start.len());
            return Err(Error::Shape { op, arg: "regimes".into(), expected: format!("[K], [K], [K,K], [K], K from 1 to {MAX_REGIMES}"), got });
        }
        let share = stationary(trans, k);
        let words = index * WORDS;
        self.words[words + word::TABLE] = self.words.len() as u32;
        self.words[words + word::ENTRIES] = k as u32;
        self.words[words + word::REALS] = self.reals.len() as u32;
        let thresholds = row_thresholds(op, "start", start)?;
        self.words.extend(thresholds);
        let mut variance = 0.0;
        for i in 0..k {
            let sd = at_least(op, "volatility", volatility[i], 0.0, "at least 0")?;
            let mu = at_least(op, "drift", drift[i], f64::MIN, "a number")?;
            self.reals.extend([((mu - 0.5 * sd * sd) * dt) as f32, (sd * dt.sqrt()) as f32]);
            let thresholds = row_thresholds(op, "trans", &trans[i * k..(i + 1) * k])?;
            self.words.extend(thresholds);
            variance += share[i] * sd * sd;
        }
        row[field::VOLATILITY] = variance.sqrt();
        Ok(())
    }

    fn history(&mut self, op: &'static str, index: usize, log_returns: &[f64], block: f64, circular: bool, row: &mut [f64; FIELDS]) -> Result<()> {
        let n = log_returns.len();
        if n == 0 || n as u64 > 1 << 31 {
            return Err(wrong(op, "history", n, "1 to 2^31 returns"));
        }
        if let Some(i) = log_returns.iter().position(|r| !(*r as f32).is_finite()) {
            return Err(wrong(op, &format!("return {i} of the history"), log_returns[i], "log-returns are finite: prices must be positive"));
        }
        if !(block.is_finite() && block >= 1.0) || circular && (block.fract() != 0.0 || block > 2e9) {
            return Err(wrong(op, "block", block, "a mean length of at least 1 step; circular: whole"));
        }
        let words = &mut self.words[index * WORDS..];
        words[word::REALS] = self.reals.len() as u32;
        words[word::BARS] = n as u32;
        words[word::RESTART] = threshold(1.0 / block);
        words[word::BLOCK] = if circular { block as u32 } else { 0 };
        self.reals.extend(log_returns.iter().map(|&r| r as f32));
        let mean = log_returns.iter().sum::<f64>() / n as f64;
        let variance = log_returns.iter().map(|r| (r - mean) * (r - mean)).sum::<f64>() / (n.max(2) - 1) as f64;
        row[field::VOLATILITY] = (variance / row[field::DT]).sqrt();
        Ok(())
    }

    /// Kind of all its markets.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether they have futures.
    pub fn futures(&self) -> bool {
        self.futures
    }

    /// Markets.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Steps.
    pub fn steps(&self) -> u64 {
        u64::from(self.steps)
    }

    /// Rounds of a thread's loops in a step, at most: what `Device::check_rounds` asks for.
    pub fn rounds(&self) -> u64 {
        let entries = (0..self.count as usize).map(|i| self.words[i * WORDS + word::ENTRIES]).max().unwrap_or(0);
        2 + u64::from(entries)
    }

    /// Its reals and words, as they are uploaded.
    pub fn parts(&self) -> (Vec<f32>, Vec<u32>) {
        (self.reals.clone(), self.words.clone())
    }

    /// One of a row's reals: a column of [`field`].
    pub fn field(&self, market: usize, column: usize) -> f32 {
        self.reals.get(market * FIELDS + column).copied().unwrap_or(0.0)
    }

    /// The two buffers of the table: reals and words.
    /// # Errors
    /// `OutOfMemory`; `Parameter` for given paths, which come by [`Markets::with_given`].
    pub fn upload(&self, device: &Device) -> Result<(Buffer, Buffer)> {
        if self.kind == Kind::Replay {
            return Err(wrong(OP, "model", "replay", "bind the given paths with Markets::with_given"));
        }
        Ok((device.upload("market", &self.reals)?, device.upload_u32("market_words", &self.words)?))
    }

    /// Given paths that one binding of the device holds beside the table: runs for [`Markets::with_given`] have no more.
    /// # Errors
    /// `TooLarge` if it holds none.
    pub fn most_given(&self, device: &Device) -> Result<u64> {
        let bars = u64::from(self.steps) + 1;
        let rows = (self.reals.len() as u64).next_multiple_of(device.limits().align.max(1));
        let room = (device.limits().binding_bytes / 4).min(u64::from(u32::MAX)).saturating_sub(rows);
        if room < bars {
            let (what, help) = (format!("{OP}: a given path beside its market"), "shorten the paths or use another device".into());
            return Err(Error::TooLarge { what, needed: rows + bars, limit: room + rows, unit: "numbers", help });
        }
        Ok(room / bars)
    }

    /// The two buffers for a run of given paths: `given` [P,T+1] prices, of which `paths` are appended to the reals.
    /// Each path starts at its own first price over the market's spot.
    /// # Errors
    /// `Shape` if `given` does not hold the paths.
    pub fn with_given(&self, pass: &mut Pass, given: &View, paths: Range<u64>) -> Result<(View, View)> {
        let bars = u64::from(self.steps) + 1;
        if given.len() < paths.end * bars {
            let expected = format!("[{} or more, {bars}] prices", paths.end);
            return Err(Error::Shape { op: OP, arg: "given".into(), expected, got: format!("{} numbers", given.len()) });
        }
        let device = pass.device().clone();
        let rows = (self.reals.len() as u64).next_multiple_of(device.limits().align.max(1));
        let count = (paths.end - paths.start) * bars;
        let market = device.zeros("market", rows + count)?;
        device.write(market.view(0..self.reals.len() as u64), &self.reals)?;
        pass.copy(given.part(paths.start * bars..paths.end * bars), market.view(rows..rows + count))?;
        let mut words = self.words.clone();
        for row in words.chunks_exact_mut(WORDS).take(self.count as usize) {
            (row[word::REALS], row[word::FIRST]) = (rows as u32, paths.start as u32);
        }
        Ok((View::from(&market), View::from(&device.upload_u32("market_words", &words)?)))
    }
}

fn diffusion(op: &'static str, volatility: f64, dt: f64, row: &mut [f64; FIELDS]) -> Result<()> {
    let sd = at_least(op, "volatility", volatility, 0.0, "at least 0")?;
    row[field::DRIFT] -= 0.5 * sd * sd * dt;
    (row[field::SD], row[field::VARIANCE], row[field::VOLATILITY]) = (sd * dt.sqrt(), sd * sd * dt, sd);
    Ok(())
}

/// Coefficients of QE with central weights.
fn heston(op: &'static str, variance: &Variance, dt: f64, row: &mut [f64; FIELDS]) -> Result<()> {
    let v0 = at_least(op, "variance", variance.start, 0.0, "at least 0")?;
    let theta = at_least(op, "mean variance", variance.mean, 0.0, "at least 0")?;
    let kappa = at_least(op, "reversion", variance.reversion, 0.0, "at least 0")?;
    let xi = at_least(op, "volatility of variance", variance.volatility, 0.0, "at least 0")?;
    let rho = correlation_of(op, "correlation", variance.correlation)?;
    let (decay, gone) = ((-kappa * dt).exp(), -(-kappa * dt).exp_m1());
    // (1 − e^{−κdt})/κ, also for κ = 0
    let span = if kappa * dt < 1e-12 { dt } else { gone / kappa };
    let (rho, ratio) = if xi > 0.0 { (rho, rho / xi) } else { (0.0, 0.0) };
    let half = 0.5 * dt * (kappa * ratio - 0.5);
    (row[field::V0], row[field::DECAY], row[field::MEAN]) = (v0, decay, theta * gone);
    (row[field::S1], row[field::S0]) = (xi * xi * decay * span, 0.5 * theta * xi * xi * gone * span);
    (row[field::K0], row[field::K1], row[field::K2]) = (-ratio * kappa * theta * dt, half - ratio, half + ratio);
    row[field::K3] = 0.5 * dt * (1.0 - rho * rho);
    row[field::A] = row[field::K2] + 0.5 * row[field::K3];
    row[field::VOLATILITY] = v0.sqrt();
    Ok(())
}

// ---- several assets -------------------------------------------------------------------------------------------------------------

/// What moves several assets together; rates and volatilities a year.
#[derive(Debug, Clone, PartialEq)]
pub enum Joint {
    /// Correlated Brownian motions, in one regime or several.
    Regimes {
        /// Growth rates [K,N], added to those of the assets.
        drift: Vec<f64>,
        /// Volatilities [K,N] ≥ 0.
        volatility: Vec<f64>,
        /// Correlations [K,N,N], positive definite.
        correlation: Vec<f64>,
        /// Transition probabilities of a step [K,K].
        trans: Vec<f64>,
        /// Probabilities of the regime at time 0 [K].
        start: Vec<f64>,
    },
    /// Blocks of joint history, one row per step.
    Bootstrap {
        /// Historical log-returns [n,N] of a step each.
        log_returns: Vec<f64>,
        /// As for [`Model::Bootstrap`].
        block: f64,
        /// As for [`Model::Bootstrap`].
        circular: bool,
    },
}

impl Joint {
    /// One regime: geometric Brownian motions with correlations [N,N].
    pub fn gbm(volatility: Vec<f64>, correlation: Vec<f64>) -> Joint {
        Joint::Regimes { drift: vec![0.0; volatility.len()], volatility, correlation, trans: vec![1.0], start: vec![1.0] }
    }
}

/// Cholesky factor, lower triangle by rows, of a correlation matrix [N,N].
fn cholesky(op: &'static str, name: &str, matrix: &[f64], n: usize) -> Result<Vec<f64>> {
    let mut factor: Vec<f64> = Vec::with_capacity(n * (n + 1) / 2);
    for i in 0..n {
        for j in 0..=i {
            let (x, mirror) = (matrix[i * n + j], matrix[j * n + i]);
            let unit = i != j || (x - 1.0).abs() < 1e-6;
            if !(x.is_finite() && x.abs() <= 1.0 + 1e-6 && (x - mirror).abs() < 1e-6 && unit) {
                return Err(wrong(op, &format!("{name}[{i}][{j}]"), x, "a symmetric matrix of correlations with ones on its diagonal"));
            }
            let (row, other) = (i * (i + 1) / 2, j * (j + 1) / 2);
            let known: f64 = (0..j).map(|k| factor[row + k] * factor[other + k]).sum();
            if i == j {
                if x - known <= 1e-12 {
                    let help = "not positive definite: asset {i} follows from those before it; drop it or shrink the correlations";
                    return Err(wrong(op, &format!("{name}, pivot {i}"), x - known, &help.replace("{i}", &i.to_string())));
                }
                factor.push((x - known).sqrt());
            } else {
                factor.push((x - known) / factor[other + j]);
            }
        }
    }
    Ok(factor)
}

impl Markets {
    /// Prepares N assets that move together: spots and growth rates [N]. [`paths_assets`] simulates them.
    /// # Errors
    /// As for [`Markets::new`]; `Parameter` for correlations that are not positive definite, `Shape` for lengths that do not fit.
    pub fn joint(op: &'static str, spot: &[f64], drift: &[f64], model: &Joint, steps: u64, maturity: f64, draws: &Draws) -> Result<Markets> {
        let n = spot.len();
        let one = Market { spot: 1.0, drift: 0.0, model: Model::Gbm { volatility: 0.0 }, basis: None };
        let kind = if matches!(model, Joint::Regimes { .. }) { Kind::Regimes } else { Kind::Bootstrap };
        let mut table = Markets::new(op, &[one], steps, maturity, &Draws { matched: false, ..*draws })?;
        table.kind = kind;
        let (dt, k) = (maturity / steps as f64, if let Joint::Regimes { start, .. } = model { start.len() } else { 0 });
        let rows = match model {
            Joint::Regimes { drift: mu, volatility, correlation, trans, .. } => {
                mu.len() == k * n && volatility.len() == k * n && correlation.len() == k * n * n && trans.len() == k * k && (1..=MAX_REGIMES).contains(&k)
            }
            Joint::Bootstrap { log_returns, .. } => !log_returns.is_empty() && log_returns.len().is_multiple_of(n.max(1)),
        };
        if n == 0 || drift.len() != n || !rows {
            let expected = "spot [N], drift [N] and the model's arrays for N assets".to_string();
            return Err(Error::Shape { op, arg: "assets".into(), expected, got: format!("{n} spots, {} drifts, and others", drift.len()) });
        }
        table.words[word::KIND] = kind as u32;
        table.words[word::ASSETS] = n as u32;
        if draws.matched && kind == Kind::Regimes {
            table.matched = Some(table.reals.len() as u32);
            table.words[word::MATCHED] = table.reals.len() as u32;
            table.reals.extend([1.0, 0.0].repeat(n * steps as usize));
        }
        table.words[word::REALS] = table.reals.len() as u32;
        for (i, &price) in spot.iter().enumerate() {
            if !(price.is_finite() && price > 0.0) {
                return Err(wrong(op, &format!("spot of asset {i}"), price, "a positive price"));
            }
            at_least(op, "drift", drift[i], f64::MIN, "a number")?;
        }
        table.reals.extend(spot.iter().map(|&x| x as f32));
        match model {
            Joint::Regimes { drift: mu, volatility, correlation, trans, start } => {
                table.words[word::TABLE] = table.words.len() as u32;
                table.words[word::ENTRIES] = k as u32;
                let thresholds = row_thresholds(op, "start", start)?;
                table.words.extend(thresholds);
                for r in 0..k {
                    let thresholds = row_thresholds(op, "trans", &trans[r * k..(r + 1) * k])?;
                    table.words.extend(thresholds);
                    for i in 0..n {
                        let sd = at_least(op, "volatility", volatility[r * n + i], 0.0, "at least 0")?;
                        table.reals.push(((drift[i] + mu[r * n + i] - 0.5 * sd * sd) * dt) as f32);
                    }
                    let factor = cholesky(op, &format!("correlation of regime {r}"), &correlation[r * n * n..(r + 1) * n * n], n)?;
                    for i in 0..n {
                        let sd = volatility[r * n + i] * dt.sqrt();
                        table.reals.extend(factor[i * (i + 1) / 2..(i + 1) * (i + 2) / 2].iter().map(|l| (l * sd) as f32));
                    }
                }
            }
            Joint::Bootstrap { log_returns, block, circular } => {
                let first: Vec<f64> = log_returns.iter().step_by(n).copied().collect();
                let at = table.words[word::REALS];
                table.history(op, 0, &first, *block, *circular, &mut [1.0; FIELDS])?;
                table.reals.truncate(at as usize + n);
                table.words[word::REALS] = at;
                table.reals.extend(drift.iter().map(|mu| (mu * dt) as f32));
                table.reals.extend(log_returns.iter().map(|&r| r as f32));
            }
        }
        match table.reals.iter().position(|x| !x.is_finite()) {
            Some(i) => Err(wrong(op, &format!("number {i} of the table"), table.reals[i], "parameters are finite and fit f32")),
            None => Ok(table),
        }
    }

    /// Assets of a joint market, else 0.
    pub fn assets(&self) -> u32 {
        self.words[word::ASSETS]
    }
}

// ---- the generator, scalar --------------------------------------------------------------------------------------------------

/// A market's row and tables as a kernel sees them.
#[derive(Clone, Copy)]
pub(crate) struct PathMarket<'a, R> {
    pub(crate) kind: Kind,
    pub(crate) futures: bool,
    pub(crate) reals: &'a [R],
    pub(crate) words: &'a [u32],
    row: &'a [R],
    pub(crate) seed: [u32; 2],
    pub(crate) antithetic: bool,
    pub(crate) matched: usize,
    pub(crate) steps: u32,
    pub(crate) table: usize,
    pub(crate) entries: usize,
    pub(crate) tail: usize,
    pub(crate) bars: u32,
    pub(crate) restart: u32,
    pub(crate) block: u32,
    pub(crate) first: u32,
}

/// What is known of a path at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PathState<R> {
    /// ln S(t)/S(0).
    pub(crate) x: R,
    /// Variance.
    pub(crate) v: R,
    /// ln F(t)/S(t).
    pub(crate) basis: R,
    /// Regime that governs step t, or the jumps of the step before.
    pub(crate) regime: u32,
    /// Bar of history that the step before took, or where the given path lies.
    pub(crate) at: u32,
}

/// The draws of four steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PathDraws<R> {
    /// Normals of the spot.
    pub(crate) z: [R; 4],
    /// Normals of the basis.
    pub(crate) zb: [R; 4],
    /// Words of jumps, regimes, or of the ends of blocks.
    pub(crate) w: [u32; 4],
    /// Words of the variance, or of the starts of blocks.
    pub(crate) w2: [u32; 4],
}

impl<'a, R: Real> PathMarket<'a, R> {
    pub(crate) fn of(reals: &'a [R], words: &'a [u32], index: usize) -> PathMarket<'a, R> {
        let own = &words[index * WORDS..][..WORDS];
        PathMarket {
            kind: Kind::of(own[word::KIND]),
            futures: own[word::KIND] & FUTURES != 0,
            reals,
            words,
            row: &reals[index * FIELDS..][..FIELDS],
            seed: [own[word::SEED], own[word::SEED_HIGH]],
            antithetic: own[word::ANTITHETIC] != 0,
            matched: own[word::MATCHED] as usize,
            steps: own[word::STEPS],
            table: own[word::TABLE] as usize,
            entries: own[word::ENTRIES] as usize,
            tail: own[word::REALS] as usize,
            bars: own[word::BARS],
            restart: own[word::RESTART],
            block: own[word::BLOCK],
            first: own[word::FIRST],
        }
    }

    /// A column of its row.
    pub(crate) fn get(&self, column: usize) -> R {
        self.row[column]
    }

    fn jumps(&self) -> bool {
        matches!(self.kind, Kind::Merton | Kind::Bates)
    }

    fn variance(&self) -> bool {
        matches!(self.kind, Kind::Heston | Kind::Bates)
    }

    /// The four words of a factor; mirrored for the second path of an antithetic pair.
    fn words(&self, path: u64, quad: u32, factor: u32) -> [u32; 4] {
        let index = if self.antithetic { path / 2 } else { path };
        let flip = if self.antithetic && path % 2 == 1 { u32::MAX } else { 0 };
        philox4x32([index as u32, (index >> 32) as u32, quad, factor | STREAM << 16], self.seed).map(|w| w ^ flip)
    }

    /// Four normals of a factor, the `slot`-th of the table of moments.
    fn normals(&self, path: u64, quad: u32, factor: u32, slot: u32) -> [R; 4] {
        let mirrored = self.antithetic && path % 2 == 1;
        let index = if self.antithetic { path / 2 } else { path };
        let mut z = normals(philox4x32([index as u32, (index >> 32) as u32, quad, factor | STREAM << 16], self.seed)).map(R::of);
        for (i, z) in z.iter_mut().enumerate() {
            *z = if mirrored { -*z } else { *z };
            let t = (4 * quad + i as u32).min(self.steps - 1);
            if self.matched > 0 {
                let at = self.matched + 2 * (slot * self.steps + t) as usize;
                *z = z.mul_add(self.reals[at], self.reals[at + 1]);
            }
        }
        z
    }

    /// How many of `count` thresholds from `at` on a word has reached.
    fn reached(&self, at: usize, count: usize, word: u32) -> u32 {
        self.words[at..at + count].iter().filter(|&&threshold| threshold <= word).count() as u32
    }

    pub(crate) fn start(&self, path: u64) -> PathState<R> {
        let mut s = PathState { v: self.get(field::V0), basis: self.get(field::BASIS), ..PathState::default() };
        if self.kind == Kind::Regimes {
            s.regime = self.reached(self.table, self.entries - 1, self.words(path, 0, factor::FIRST_REGIME)[0]);
        }
        if self.kind == Kind::Replay {
            s.at = (path as u32).wrapping_sub(self.first).wrapping_mul(self.steps + 1).wrapping_add(self.tail as u32);
            s.x = self.given(s.at);
        }
        s
    }

    /// Draws of steps 4·quad ….
    pub(crate) fn draws(&self, path: u64, quad: u32) -> PathDraws<R> {
        let mut d = PathDraws::default();
        if !matches!(self.kind, Kind::Bootstrap | Kind::Replay) {
            d.z = self.normals(path, quad, factor::SPOT, 0);
        }
        if self.variance() {
            d.w2 = self.words(path, quad, factor::VARIANCE);
        }
        if self.jumps() {
            d.w = self.words(path, quad, factor::JUMPS);
        }
        if self.kind == Kind::Regimes {
            d.w = self.words(path, quad, factor::REGIME);
        }
        if self.kind == Kind::Bootstrap {
            d.w = self.words(path, quad, factor::RESTART);
            d.w2 = self.words(path, quad, factor::BLOCK);
        }
        if self.futures {
            d.zb = self.normals(path, quad, factor::BASIS, 1);
        }
        d
    }

    /// Step t: from t to t + 1.
    pub(crate) fn step(&self, s: &mut PathState<R>, d: &PathDraws<R>, t: u32) {
        let i = (t % 4) as usize;
        let (z, mut step) = (d.z[i], self.get(field::DRIFT));
        if self.jumps() {
            s.regime = self.reached(self.table, self.entries, d.w[i]);
        }
        let n = R::of(f64::from(if self.jumps() { s.regime } else { 0 }));
        match self.kind {
            Kind::Gbm => step = z.mul_add(self.get(field::SD), step),
            Kind::Merton => step += n * self.get(field::JUMP_MEAN) + (self.get(field::VARIANCE) + n * self.get(field::JUMP_VARIANCE)).sqrt() * z,
            Kind::Heston | Kind::Bates => {
                let (v, log_m) = self.variance_step(s.v, d.w2[i]);
                let spread = self.get(field::K3) * (s.v + v);
                step += match log_m {
                    Some(log_m) => self.get(field::K2) * v - R::of(0.5) * self.get(field::K3) * s.v - log_m,
                    None => self.get(field::K0) + self.get(field::K1) * s.v + self.get(field::K2) * v,
                };
                step += n * self.get(field::JUMP_MEAN) + (spread + n * self.get(field::JUMP_VARIANCE)).sqrt() * z;
                s.v = v;
            }
            Kind::Regimes => {
                let at = self.tail + 2 * s.regime as usize;
                step = z.mul_add(self.reals[at + 1], step + self.reals[at]);
                let row = self.table + (self.entries - 1) * (1 + s.regime as usize);
                s.regime = self.reached(row, self.entries - 1, d.w[i]);
            }
            Kind::Bootstrap => {
                s.at = self.bar(s.at, d.w[i], d.w2[i], t);
                step += self.reals[self.tail + s.at as usize];
            }
            Kind::Replay => s.at += 1,
        }
        // The sum of a step first: a constant added to a number with few bits would be rounded the same way every time.
        s.x = if self.kind == Kind::Replay { self.given(s.at) } else { s.x + step };
        if self.futures {
            let shock = z * self.get(field::BASIS_SPOT) + d.zb[i] * self.get(field::BASIS_OWN);
            s.basis = self.get(field::BASIS_MEAN) + self.get(field::BASIS_DECAY) * s.basis + shock;
        }
    }

    fn given(&self, at: u32) -> R {
        (self.reals[at as usize] / self.get(field::SPOT)).ln()
    }

    /// The next variance and, where it is finite, ln E[e^{A·v'}].
    fn variance_step(&self, v: R, word: u32) -> (R, Option<R>) {
        let (one, half) = (R::ONE, R::of(0.5));
        let a = self.get(field::A);
        let m = self.get(field::MEAN) + self.get(field::DECAY) * v;
        let psi = (self.get(field::S1) * v + self.get(field::S0)) / (m * m).max(R::of(1e-30));
        let u = uniform(word);
        if psi <= R::of(1.5) {
            let two = R::of(2.0) - psi;
            let q2 = psi / (two + (two + two).sqrt());
            let base = m / (one + q2);
            let root = one + q2.sqrt() * R::of(normal_quantile(u));
            let less = -R::of(2.0) * a * base * q2;
            let room = one + less;
            let log_m = (room > R::ZERO).then(|| a * base / room - half * less.ln_1p());
            (base * root * root, log_m)
        } else {
            let p = (psi - one) / (psi + one);
            let scale = half * m * (psi + one);
            let next = scale * (R::of(-(1.0 - u).ln()) + (one - p).ln());
            // scale is the mean of the exponential part: M = p + (1 − p)/(1 − A·scale) = 1 + A·m/(1 − A·scale)
            let room = one - a * scale;
            let log_m = (room > R::ZERO).then(|| (a * m / room).ln_1p());
            (next.max(R::ZERO), log_m)
        }
    }

    /// The bar that a step of the bootstrap takes.
    fn bar(&self, at: u32, end: u32, start: u32, t: u32) -> u32 {
        let restart = t == 0 || if self.block > 0 { t.is_multiple_of(self.block) } else { end < self.restart };
        let next = if at + 1 == self.bars { 0 } else { at + 1 };
        if restart { ((u64::from(start) * u64::from(self.bars)) >> 32) as u32 } else { next }
    }

    /// S(t).
    pub(crate) fn spot(&self, s: &PathState<R>) -> R {
        if self.kind == Kind::Replay { self.reals[s.at as usize] } else { self.get(field::SPOT) * s.x.exp() }
    }

    /// F(t).
    pub(crate) fn future(&self, s: &PathState<R>) -> R {
        self.spot(s) * s.basis.exp()
    }

    /// What `events` holds.
    pub(crate) fn event(&self, s: &PathState<R>) -> u32 {
        if self.kind == Kind::Bootstrap { s.at } else { s.regime }
    }
}

/// Φ⁻¹ in f64: Hastings' rational start, then Halley's steps with Φ itself; ±∞ at 0 and 1.
pub fn normal_quantile(u: f64) -> f64 {
    if !(u > 0.0 && u < 1.0) {
        return if u == 0.0 {
            f64::NEG_INFINITY
        } else if u == 1.0 {
            f64::INFINITY
        } else {
            f64::NAN
        };
    }
    let p = u.min(1.0 - u);
    let w = (-2.0 * p.ln()).sqrt();
    let mut x = w - (2.515_517 + w * (0.802_853 + w * 0.010_328)) / (1.0 + w * (1.432_788 + w * (0.189_269 + w * 0.001_308)));
    for _ in 0..3 {
        let tail = 0.5 * crate::real::erfc(x * std::f64::consts::FRAC_1_SQRT_2);
        let step = (tail - p) * (0.5 * x * x).exp() * (2.0 * std::f64::consts::PI).sqrt();
        x += step / (1.0 - 0.5 * x * step);
    }
    if u < 0.5 { -x } else { x }
}

// ---- kernels ----------------------------------------------------------------------------------------------------------------

fn params(words: &[u32]) -> PathsParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn path_steps(words: &[u32]) -> u64 {
    u64::from(params(words).paths) * u64::from(params(words).t)
}

/// Paths of geometric Brownian motion; the other kinds differ in the constant MODEL.
pub static PATHS_GBM: Kernel = Kernel {
    name: "paths_gbm",
    about: "paths of geometric Brownian motion",
    args: &[reads("market"), reads_u32("market_words"), writes("spot"), writes("variance"), writes_u32("events"), writes("future")],
    params: layout::<PathsParams>(),
    workgroup: WG,
    constants: &[("MODEL", 0)],
    groups: |words| u64::from(params(words).paths).div_ceil(u64::from(WG)),
    wgsl: wgsl!("paths"),
    cuda: cuda!("paths"),
    cpu: Some(Cpu { f32: crate::paths_lanes::paths, f64: paths_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 4.0, flops: 90.0 },
};

macro_rules! paths_kernels {
    ($($kernel:ident $name:literal $about:literal $model:literal $flops:literal;)*) => {$(
        #[doc = concat!("P", $about, ".")]
        pub static $kernel: Kernel = Kernel {
            name: $name,
            about: concat!("p", $about),
            constants: &[("MODEL", $model)],
            cost: Cost { flops: $flops, ..PATHS_GBM.cost },
            ..PATHS_GBM
        };
    )*};
}

paths_kernels! {
    PATHS_MERTON "paths_merton" "aths of a jump diffusion" 1 130.0;
    PATHS_HESTON "paths_heston" "aths with stochastic variance" 2 250.0;
    PATHS_BATES "paths_bates" "aths with stochastic variance and jumps" 3 290.0;
    PATHS_REGIMES "paths_regimes" "aths with regimes of a Markov chain" 4 130.0;
    PATHS_BOOTSTRAP "paths_bootstrap" "aths from blocks of historical returns" 5 70.0;
    PATHS_REPLAY "paths_replay" "aths as given" 6 20.0;
    PATHS_GBM_FUTURES "paths_gbm_futures" "aths of geometric Brownian motion with futures" 16 170.0;
    PATHS_MERTON_FUTURES "paths_merton_futures" "aths of a jump diffusion with futures" 17 210.0;
    PATHS_HESTON_FUTURES "paths_heston_futures" "aths with stochastic variance and futures" 18 330.0;
    PATHS_BATES_FUTURES "paths_bates_futures" "aths with stochastic variance, jumps and futures" 19 370.0;
    PATHS_REGIMES_FUTURES "paths_regimes_futures" "aths with regimes of a Markov chain and futures" 20 210.0;
    PATHS_BOOTSTRAP_FUTURES "paths_bootstrap_futures" "aths from blocks of historical returns with futures" 21 150.0;
}

/// Which kernel stores the paths of a kind, with and without futures; none for given paths with futures.
fn kernel_of(kind: Kind, futures: bool) -> Option<&'static Kernel> {
    let kernels = match kind {
        Kind::Gbm => (&PATHS_GBM, Some(&PATHS_GBM_FUTURES)),
        Kind::Merton => (&PATHS_MERTON, Some(&PATHS_MERTON_FUTURES)),
        Kind::Heston => (&PATHS_HESTON, Some(&PATHS_HESTON_FUTURES)),
        Kind::Bates => (&PATHS_BATES, Some(&PATHS_BATES_FUTURES)),
        Kind::Regimes => (&PATHS_REGIMES, Some(&PATHS_REGIMES_FUTURES)),
        Kind::Bootstrap => (&PATHS_BOOTSTRAP, Some(&PATHS_BOOTSTRAP_FUTURES)),
        Kind::Replay => (&PATHS_REPLAY, None),
    };
    if futures { kernels.1 } else { Some(kernels.0) }
}

/// Bits of [`PathsParams::store`].
pub(crate) mod store {
    pub(crate) const VARIANCE: u32 = 1;
    pub(crate) const EVENTS: u32 = 2;
    pub(crate) const FUTURE: u32 = 4;
}

/// Rows of the four outputs, path by path; those that are not stored are empty.
pub(crate) struct Rows<'a, R> {
    pub(crate) spot: &'a mut [R],
    pub(crate) variance: &'a mut [R],
    pub(crate) events: &'a mut [u32],
    pub(crate) future: &'a mut [R],
}

/// Cuts the outputs into runs of `each` paths.
pub(crate) fn runs<'a, R: Real>(p: &PathsParams, [spot, variance, future]: [&'a mut [R]; 3], events: &'a mut [u32], each: usize) -> Vec<Rows<'a, R>> {
    let (paths, bars) = (p.paths as usize, p.t as usize + 1);
    let count = paths.div_ceil(each);
    let run = each * bars;
    let (mut variances, mut futures) = (variance.chunks_mut(run), future.chunks_mut(run));
    let mut events = events.chunks_mut(run);
    let stored = |bit: u32| p.store & bit != 0;
    let spots = spot[..paths * bars].chunks_mut(run);
    let rows = spots.map(|spot| {
        let n = spot.len();
        let part = |rows: &mut std::slice::ChunksMut<'a, R>, bit| if stored(bit) { rows.next().map_or(&mut [][..], |x| &mut x[..n]) } else { &mut [] };
        let (variance, future) = (part(&mut variances, store::VARIANCE), part(&mut futures, store::FUTURE));
        let events = if stored(store::EVENTS) { events.next().map_or(&mut [][..], |x| &mut x[..n]) } else { &mut [] };
        Rows { spot, variance, events, future }
    });
    let rows: Vec<Rows<'a, R>> = rows.collect();
    debug_assert_eq!(rows.len(), count);
    rows
}

fn paths_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PathsParams = launch.params()?;
    let (reals, words) = (launch.real()?, launch.word()?);
    let (spot, variance, events, future) = (launch.real_mut()?, launch.real_mut()?, launch.word_mut()?, launch.real_mut()?);
    let market = PathMarket::of(reals, words, p.market as usize);
    let first = u64::from(p.first_high) << 32 | u64::from(p.first);
    runs(&p, [spot, variance, future], events, 1).into_par_iter().enumerate().for_each(|(i, rows)| {
        let path = first + i as u64;
        let mut s = market.start(path);
        let mut d = PathDraws::default();
        for t in 0..=p.t {
            rows.spot[t as usize] = market.spot(&s);
            if let Some(v) = rows.variance.get_mut(t as usize) {
                *v = s.v;
            }
            if let Some(event) = rows.events.get_mut(t as usize) {
                *event = market.event(&s);
            }
            if let Some(future) = rows.future.get_mut(t as usize) {
                *future = market.future(&s);
            }
            if t < p.t {
                if t % 4 == 0 {
                    d = market.draws(path, t / 4);
                }
                market.step(&mut s, &d, t);
            }
        }
    });
    Ok(())
}

// ---- several assets and moments ---------------------------------------------------------------------------------------------------

/// Paths of several assets with regimes; that of joint history differs in the constant MODEL.
pub static PATHS_ASSETS_REGIMES: Kernel = Kernel {
    name: "paths_assets_regimes",
    about: "paths of correlated assets, in one regime or several",
    args: &[reads("market"), reads_u32("market_words"), writes("spot"), writes_u32("events")],
    constants: &[("MODEL", 4)],
    groups: |words| (u64::from(params(words).paths) * u64::from(params(words).market)).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: crate::paths_lanes::paths_assets, f64: paths_assets_cpu::<f64> }),
    cost: Cost { unit: "asset-step", units: |words| path_steps(words) * u64::from(params(words).market), bytes: 4.0, flops: 100.0 },
    ..PATHS_GBM
};

/// Paths of several assets from blocks of joint history.
pub static PATHS_ASSETS_BOOTSTRAP: Kernel = Kernel {
    name: "paths_assets_bootstrap",
    about: "paths of several assets from blocks of joint history",
    constants: &[("MODEL", 5)],
    ..PATHS_ASSETS_REGIMES
};

/// Sums and sums of squares of normals over blocks of paths.
pub static PATHS_MOMENTS: Kernel = Kernel {
    name: "paths_moments_gbm",
    about: "sums and sums of squares of the normals of every step over blocks of paths",
    args: &[reads("market"), reads_u32("market_words"), writes("sums")],
    constants: &[("MODEL", 0)],
    groups: moment_groups,
    cpu: Some(Cpu { f32: crate::paths_lanes::paths_moments, f64: paths_moments_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: |words| path_steps(words) * u64::from(params(words).store), bytes: 0.0, flops: 70.0 },
    ..PATHS_GBM
};

/// Paths of a block of sums.
pub(crate) const BLOCK: u64 = 2048;

fn moment_groups(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.paths).div_ceil(BLOCK) * u64::from(p.t.div_ceil(4)) * u64::from(p.store)
}

fn paths_assets_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PathsParams = launch.params()?;
    let (reals, words, spot, events) = (launch.real()?, launch.word()?, launch.real_mut()?, launch.word_mut()?);
    let (market, bars, n) = (PathMarket::of(reals, words, 0), p.t as usize + 1, p.market as usize);
    let first = u64::from(p.first_high) << 32 | u64::from(p.first);
    let events = (events[..if p.store & store::EVENTS > 0 { p.paths as usize * bars } else { 0 }]).par_chunks_exact_mut(bars);
    let events: Vec<&mut [u32]> = events.collect();
    let events = events.into_iter().map(Some).chain(std::iter::repeat_with(|| None)).take(p.paths as usize).collect::<Vec<_>>();
    spot.par_chunks_exact_mut(bars * n).zip(events).enumerate().take(p.paths as usize).for_each(|(i, (rows, mut events))| {
        let path = first + i as u64;
        let (spots, tail) = (&reals[market.tail..][..n], &reals[market.tail + n..]);
        let mut s = market.start(path);
        let (mut x, mut z, mut w) = (vec![R::ZERO; n], vec![[R::ZERO; 4]; n], ([0; 4], [0; 4]));
        for t in 0..=p.t {
            if let Some(events) = &mut events {
                events[t as usize] = market.event(&s);
            }
            for ((to, spot), x) in rows[t as usize * n..].iter_mut().zip(spots).zip(&x) {
                *to = *spot * x.exp();
            }
            if t == p.t {
                break;
            }
            if t % 4 == 0 {
                w = market.joint_words(path, t / 4);
                if market.kind == Kind::Regimes {
                    z.iter_mut().enumerate().for_each(|(j, z)| *z = market.normals(path, t / 4, factor::SPOT + j as u32, j as u32));
                }
            }
            market.joint_step(&mut s, &mut x, &z, tail, w, t);
        }
    });
    Ok(())
}

impl<R: Real> PathMarket<'_, R> {
    fn joint_words(&self, path: u64, quad: u32) -> ([u32; 4], [u32; 4]) {
        if self.kind == Kind::Regimes {
            (self.words(path, quad, factor::REGIME), [0; 4])
        } else {
            (self.words(path, quad, factor::RESTART), self.words(path, quad, factor::BLOCK))
        }
    }

    /// Step t of all assets: `tail` holds, per regime, drifts [N] and the loadings' lower triangle; or drifts [N] and the history [n,N].
    fn joint_step(&self, s: &mut PathState<R>, x: &mut [R], z: &[[R; 4]], tail: &[R], (w, w2): ([u32; 4], [u32; 4]), t: u32) {
        let (n, c) = (x.len(), (t % 4) as usize);
        if self.kind == Kind::Regimes {
            let own = &tail[s.regime as usize * (n + n * (n + 1) / 2)..];
            for (i, x) in x.iter_mut().enumerate() {
                let loadings = &own[n + i * (i + 1) / 2..][..=i];
                *x += loadings.iter().zip(z).fold(own[i], |sum, (&l, z)| z[c].mul_add(l, sum));
            }
            let row = self.table + (self.entries - 1) * (1 + s.regime as usize);
            s.regime = self.reached(row, self.entries - 1, w[c]);
        } else {
            s.at = self.bar(s.at, w[c], w2[c], t);
            let history = &tail[n * (1 + s.at as usize)..];
            x.iter_mut().zip(tail).zip(history).for_each(|((x, drift), h)| *x += *drift + *h);
        }
    }
}

fn paths_moments_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PathsParams = launch.params()?;
    let (reals, words, sums) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let mut market = PathMarket::of(reals, words, 0);
    market.matched = 0;
    let assets = words[word::ASSETS] > 0;
    let (t, slots) = (p.t as usize, p.store as usize);
    let first = u64::from(p.first_high) << 32 | u64::from(p.first);
    sums.par_chunks_exact_mut(2 * t * slots).enumerate().take(u64::from(p.paths).div_ceil(BLOCK) as usize).for_each(|(block, sums)| {
        let from = block as u64 * BLOCK;
        let to = (from + BLOCK).min(u64::from(p.paths));
        for (slot, sums) in sums.chunks_exact_mut(2 * t).enumerate() {
            let factor = if slot == 0 || assets { factor::SPOT + slot as u32 } else { factor::BASIS };
            for (quad, sums) in sums.chunks_mut(8).enumerate() {
                let mut total = [(R::ZERO, R::ZERO); 4];
                for path in from..to {
                    let z = market.normals(first + path, quad as u32, factor, 0);
                    for (sum, z) in total.iter_mut().zip(z) {
                        *sum = (sum.0 + z, z.mul_add(z, sum.1));
                    }
                }
                for (out, sum) in sums.chunks_exact_mut(2).zip(total) {
                    (out[0], out[1]) = sum;
                }
            }
        }
    });
    Ok(())
}

/// Fills the table of moments of markets with [`Draws::matched`]: over the paths of this range the normals of every step and factor then have
/// mean 0 and deviation 1. Runs its own passes; the range is that of all paths, however they are split later.
/// # Errors
/// `Parameter` where the markets do not ask for it or the range has fewer than two paths.
pub fn match_moments(device: &Device, markets: &mut Markets, paths: Range<u64>) -> Result<()> {
    let Some(at) = markets.matched else {
        return Err(wrong(OP, "matched", "false", "prepare the markets with Draws { matched: true, .. } and a model that draws normals"));
    };
    let count = paths.end.saturating_sub(paths.start);
    if count < 2 || paths.end > MAX_PATHS {
        return Err(wrong(OP, "paths", count, "2 to 2^40"));
    }
    let t = u64::from(markets.steps);
    let slots = if markets.assets() > 0 { u64::from(markets.assets()) } else { 1 + u64::from(markets.futures) };
    let each = 2 * t * slots;
    device.check_rounds(OP, 2 * BLOCK / u64::from(WG), "rounds")?;
    let (market, words) = (device.upload("market", &markets.reals)?, device.upload_u32("market_words", &markets.words)?);
    let mut sums = vec![0.0; each as usize];
    let (blocks, most) = (count.div_ceil(BLOCK), (MOMENT_SUMS / each).max(1));
    for run in device.plan(OP, blocks, each, t.div_ceil(4) * slots, BLOCK * t * slots * 70)? {
        for from in run.clone().step_by(most as usize) {
            let to = (from + most).min(run.end);
            let first = paths.start + from * BLOCK;
            let params = PathsParams {
                paths: ((to * BLOCK).min(count) - from * BLOCK) as u32,
                t: markets.steps,
                market: 0,
                first: first as u32,
                first_high: (first >> 32) as u32,
                store: slots as u32,
            };
            let partial = device.zeros("sums", (to - from) * each)?;
            let mut pass = device.pass("moments");
            pass.launch(&PATHS_MOMENTS, &params, &[View::from(&market), View::from(&words), View::from(&partial)])?;
            let read = pass.read(&partial)?;
            for block in pass.submit()?.f64(read)?.chunks_exact(each as usize) {
                sums.iter_mut().zip(block).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    for (i, sum) in sums.chunks_exact(2).enumerate() {
        let mean = sum[0] / count as f64;
        let scale = 1.0 / (sum[1] / count as f64 - mean * mean).max(1e-30).sqrt();
        let to = at as usize + 2 * i;
        (markets.reals[to], markets.reals[to + 1]) = (scale as f32, (-mean * scale) as f32);
    }
    Ok(())
}

/// Sums that a pass of [`match_moments`] holds, at most or a block's.
const MOMENT_SUMS: u64 = 1 << 24;

/// Stored paths of several assets.
#[derive(Debug, Clone)]
pub struct AssetPaths {
    /// Prices [P,T+1,N].
    pub spot: Buffer,
    /// Regimes, or bars of history, [P,T+1].
    pub events: Buffer,
}

/// Records paths of the assets of [`Markets::joint`], for a range of global indices.
/// # Errors
/// As for [`paths`].
pub fn paths_assets(pass: &mut Pass, markets: &Markets, paths: Range<u64>) -> Result<AssetPaths> {
    let count = paths.end.saturating_sub(paths.start);
    if count == 0 || paths.end > MAX_PATHS {
        return Err(wrong(OP, "paths", count, "1 to 2^40"));
    }
    if markets.assets() == 0 {
        return Err(wrong(OP, "markets", "of one asset", "prepare them with Markets::joint"));
    }
    let device = pass.device().clone();
    let kernel = if markets.kind == Kind::Regimes { &PATHS_ASSETS_REGIMES } else { &PATHS_ASSETS_BOOTSTRAP };
    let (bars, n) = (markets.steps() + 1, u64::from(markets.assets()));
    let loops = markets.steps() * markets.rounds() + if markets.kind == Kind::Regimes { markets.steps().div_ceil(4) * 6 * n } else { 0 };
    device.check_rounds(OP, loops, "rounds")?;
    let len = |each: u64| count.saturating_mul(bars).saturating_mul(each);
    let out = AssetPaths { spot: device.zeros("spot", len(n))?, events: device.zeros_u32("events", len(1))? };
    let (market, words) = (device.upload("market", &markets.reals)?, device.upload_u32("market_words", &markets.words)?);
    for run in device.plan(OP, count, bars * n, n, 60 * bars * n * n)? {
        let first = paths.start + run.start;
        let params = PathsParams {
            paths: (run.end - run.start) as u32,
            t: markets.steps,
            market: n as u32,
            first: first as u32,
            first_high: (first >> 32) as u32,
            store: store::EVENTS,
        };
        let spot = pass.output(&out.spot, run.start * bars * n..run.end * bars * n)?;
        let events = pass.output(&out.events, run.start * bars..run.end * bars)?;
        pass.launch(kernel, &params, &[View::from(&market), View::from(&words), spot.view.clone(), events.view.clone()])?;
        pass.finish(spot)?;
        pass.finish(events)?;
    }
    Ok(out)
}

// ---- op -----------------------------------------------------------------------------------------------------------------------

/// What to store besides spot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Variance a year of Heston and Bates.
    pub variance: bool,
    /// Regimes, numbers of jumps, or bars of history.
    pub events: bool,
    /// Futures prices.
    pub future: bool,
}

/// Stored paths; each [P,T+1].
#[derive(Debug, Clone)]
pub struct Paths {
    /// Prices.
    pub spot: Buffer,
    /// Variances a year.
    pub variance: Option<Buffer>,
    /// Regimes at t; jumps of the step that led to t; bar of history that it took.
    pub events: Option<Buffer>,
    /// Futures prices.
    pub future: Option<Buffer>,
}

/// Most paths of a run.
pub const MAX_PATHS: u64 = 1 << 40;

/// Records `paths` (a range of global indices) of row `market` of a table; `given` [paths.end,T+1] holds the prices of `Model::Replay`.
///
/// A path depends on seed and index alone: any split into ranges gives the same paths.
/// # Errors
/// `Parameter` for no paths, more than 2^40 or a market that the table lacks; `Shape` for given paths that do not fit; `TooLarge` where a path
/// does not fit the device.
pub fn paths(pass: &mut Pass, markets: &Markets, market: u32, paths: Range<u64>, given: Option<&View>, stored: Stored) -> Result<Paths> {
    let count = paths.end.saturating_sub(paths.start);
    if count == 0 || paths.end > MAX_PATHS {
        return Err(wrong(OP, "paths", count, "1 to 2^40"));
    }
    if market >= markets.count {
        return Err(wrong(OP, "market", market, "a row of the table"));
    }
    if stored.future && !markets.futures {
        return Err(wrong(OP, "future", "stored", "this market has no basis: give one"));
    }
    let Some(kernel) = kernel_of(markets.kind, markets.futures) else {
        return Err(wrong(OP, "basis", "given paths", "given paths have no futures: give the futures as paths of their own"));
    };
    let device = pass.device().clone();
    let bars = markets.steps() + 1;
    device.check_rounds(OP, markets.steps() * markets.rounds(), "rounds")?;
    let len = count.saturating_mul(bars);
    let out = Paths {
        spot: device.zeros("spot", len)?,
        variance: if stored.variance { Some(device.zeros("variance", len)?) } else { None },
        events: if stored.events { Some(device.zeros_u32("events", len)?) } else { None },
        future: if stored.future { Some(device.zeros("future", len)?) } else { None },
    };
    let variance = out.variance.clone().map_or_else(|| device.zeros("no variance", 1), Ok)?;
    let events = out.events.clone().map_or_else(|| device.zeros_u32("no events", 1), Ok)?;
    let future = out.future.clone().map_or_else(|| device.zeros("no future", 1), Ok)?;
    let shared = if markets.kind == Kind::Replay { None } else { Some(markets.upload(&device)?) };
    let bits = [(stored.variance, store::VARIANCE), (stored.events, store::EVENTS), (stored.future, store::FUTURE)];
    let most = if markets.kind == Kind::Replay { markets.most_given(&device)? } else { u64::MAX };
    let runs = device.plan(OP, count, bars, 1, 90 * bars)?;
    for run in runs.into_iter().flat_map(|run| run.clone().step_by(most as usize).map(move |from| from..run.end.min(from.saturating_add(most)))) {
        let (reals, words) = match (&shared, given) {
            (Some((reals, words)), _) => (View::from(reals), View::from(words)),
            (None, Some(given)) => markets.with_given(pass, given, paths.start + run.start..paths.start + run.end)?,
            (None, None) => return Err(Error::Shape { op: OP, arg: "given".into(), expected: "[P,T+1] prices".into(), got: "none".into() }),
        };
        let range = run.start * bars..run.end * bars;
        let part = |pass: &mut Pass, buffer: &Buffer, wanted: bool| pass.output(buffer, if wanted { range.clone() } else { 0..1 });
        let outputs =
            [part(pass, &out.spot, true)?, part(pass, &variance, stored.variance)?, part(pass, &events, stored.events)?, part(pass, &future, stored.future)?];
        let store = bits.iter().map(|&(wanted, bit)| if wanted { bit } else { 0 }).sum();
        let rows = PathsParams { paths: (run.end - run.start) as u32, t: markets.steps, market, store, ..first_path(paths.start + run.start) };
        let views: Vec<View> = [reals, words].into_iter().chain(outputs.iter().map(|o| o.view.clone())).collect();
        pass.launch(kernel, &rows, &views)?;
        for output in outputs {
            pass.finish(output)?;
        }
    }
    Ok(out)
}

/// Params of a launch whose first path has this index.
fn first_path(index: u64) -> PathsParams {
    PathsParams { first: index as u32, first_high: (index >> 32) as u32, ..bytemuck::Zeroable::zeroed() }
}

/// A market on a device whose prices are drawn wherever they are needed, and again where they are needed again: nothing keeps them.
#[derive(Debug, Clone)]
pub struct PathSource {
    kernel: &'static Kernel,
    steps: u32,
    market: u32,
    first: u64,
    rounds: u64,
    matched: bool,
    reals: Buffer,
    words: Buffer,
}

impl PathSource {
    /// Row `market` of a table; path 0 of the source is path `first` of the market.
    /// # Errors
    /// `Parameter` for given paths (which need no drawing), a row that the table lacks, or an index past 2^40; `OutOfMemory`.
    pub fn new(device: &Device, markets: &Markets, market: u32, first: u64) -> Result<PathSource> {
        if market >= markets.count || markets.assets() > 0 {
            return Err(wrong(OP, "market", market, "a row of a table of single markets"));
        }
        if first >= MAX_PATHS {
            return Err(wrong(OP, "first", first, "below 2^40"));
        }
        let (kernel, (reals, words)) = (kernel_of(markets.kind, false), markets.upload(device)?);
        let Some(kernel) = kernel.filter(|_| !markets.futures) else {
            return Err(wrong(OP, "basis", "given", "only the spot is drawn again: leave the basis out"));
        };
        Ok(PathSource { kernel, steps: markets.steps, market, first, rounds: markets.rounds(), matched: markets.matched.is_some(), reals, words })
    }

    /// Steps of a path.
    pub fn steps(&self) -> u64 {
        u64::from(self.steps)
    }

    /// Another seed: whatever is submitted from now on, prepared passes too, draws other paths.
    /// # Errors
    /// `Parameter` where moments were matched, which were those of one seed.
    pub fn reseed(&self, seed: u64) -> Result<()> {
        if self.matched {
            return Err(wrong(OP, "matched", "true", "moments are matched for one seed: prepare a source for each"));
        }
        let at = u64::from(self.market) * WORDS as u64 + word::SEED as u64;
        self.words.device().write_u32(self.words.view(at..at + 2), &[seed as u32, (seed >> 32) as u32])
    }

    /// Records the prices of a range of paths into `spot` [n,T+1].
    /// # Errors
    /// `Shape` for another length; `Parameter` for an index past 2^40; `TooLarge` where a path does not fit the device.
    pub fn draw(&self, pass: &mut Pass, paths: Range<u64>, spot: &View) -> Result<()> {
        let (count, bars) = (paths.end.saturating_sub(paths.start), self.steps() + 1);
        if self.first + paths.end > MAX_PATHS {
            return Err(wrong(OP, "paths", self.first + paths.end, "indices below 2^40"));
        }
        if spot.len() != count * bars {
            return Err(Error::Shape { op: OP, arg: "spot".into(), expected: format!("[{count},{bars}]"), got: format!("{} numbers", spot.len()) });
        }
        let device = pass.device().clone();
        device.check_rounds(OP, self.steps() * self.rounds, "rounds")?;
        let (no_variance, no_events, no_future) = (device.zeros("no variance", 1)?, device.zeros_u32("no events", 1)?, device.zeros("no future", 1)?);
        for run in device.plan(OP, count, bars, 1, 90 * bars)? {
            let out = pass.output(spot, run.start * bars..run.end * bars)?;
            let rows =
                PathsParams { paths: (run.end - run.start) as u32, t: self.steps, market: self.market, ..first_path(self.first + paths.start + run.start) };
            let tables = [View::from(&self.reals), View::from(&self.words)];
            let others = [View::from(&no_variance), View::from(&no_events), View::from(&no_future)];
            let views: Vec<View> = tables.into_iter().chain([out.view.clone()]).chain(others).collect();
            pass.launch(self.kernel, &rows, &views)?;
            pass.finish(out)?;
        }
        Ok(())
    }
}

// ---- files ----------------------------------------------------------------------------------------------------------------------

fn reals_of(case: &Case, name: &str) -> Result<Vec<f64>> {
    Ok(case.f32(name)?.iter().map(|&x| f64::from(x)).collect())
}

/// The model of a file: `model` names the kind, its parameters are those of [`Model`] by name.
fn model_of(case: &Case) -> Result<Model> {
    let jumps = || Ok::<Jumps, Error>(Jumps { intensity: case.number("jump_intensity")?, mean: case.number("jump_mean")?, sd: case.number("jump_sd")? });
    let variance = || {
        Ok::<Variance, Error>(Variance {
            start: case.number("v0")?,
            mean: case.number("theta")?,
            reversion: case.number("kappa")?,
            volatility: case.number("xi")?,
            correlation: case.number("rho")?,
        })
    };
    match case.text("model")? {
        "gbm" => Ok(Model::Gbm { volatility: case.number("volatility")? }),
        "merton" => Ok(Model::Merton { volatility: case.number("volatility")?, jumps: jumps()? }),
        "heston" => Ok(Model::Heston(variance()?)),
        "bates" => Ok(Model::Bates(variance()?, jumps()?)),
        "regimes" => Ok(Model::Regimes {
            drift: reals_of(case, "drift")?,
            volatility: reals_of(case, "volatility")?,
            trans: reals_of(case, "trans")?,
            start: reals_of(case, "start")?,
        }),
        "bootstrap" => Ok(Model::Bootstrap { log_returns: reals_of(case, "log_returns")?, block: case.number("block")?, circular: case.truth("circular")? }),
        "replay" => Ok(Model::Replay),
        other => {
            let known = Kind::ALL.iter().map(|k| k.name().to_string()).collect();
            Err(Error::Unknown { kind: "market model", given: other.into(), suggestion: None, known })
        }
    }
}

/// Binding for files: params spot, drift, maturity, steps, paths, seed, antithetic and those of the model; spot and events [P,T+1].
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let market = Market { spot: case.number("spot")?, drift: case.number("drift")?, model: model_of(case)?, basis: None };
    let draws = Draws { seed: case.number("seed")? as u64, antithetic: case.truth("antithetic")?, matched: false };
    let markets = Markets::new(OP, &[market], case.number("steps")? as u64, case.number("maturity")?, &draws)?;
    let given = if case.has("given") { Some(View::from(&device.upload("given", case.f32("given")?)?)) } else { None };
    let mut pass = device.pass(OP);
    let stored = Stored { events: true, ..Stored::default() };
    let out = paths(&mut pass, &markets, 0, 0..case.number("paths")? as u64, given.as_ref(), stored)?;
    let spot = pass.read(&out.spot)?;
    let events = out.events.as_ref().map(|events| pass.read(events)).transpose()?;
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.reals("spot", done.f64(spot)?);
    if let Some(events) = events {
        outputs.words("events", done.u32(events)?);
    }
    Ok(outputs)
}
