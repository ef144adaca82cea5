//! Hidden Markov models: what every HMM kernel shares (emissions, transitions, layouts, validation), and forward-backward.
//!
//! forward    pred(t,j) = Σ_i α(t−1,i)·A(t−1,i,j), pred(0,j) = init(j);  α(t,j) = pred(t,j)·b(t,j);  filtered(t) = α(t) / Σ_j α(t,j)
//! backward   r(j) = γ(t+1,j) / Σ_i α(t,i)·A(t,i,j);  γ(t,i) = α(t,i)·Σ_j A(t,i,j)·r(j);  posterior(t) = γ(t) / Σ_i γ(t,i)
//! pair(t,i,j) = α(t,i)·A(t,i,j)·r(j) / Σ_i γ(t,i): the chance of state i at t and state j at t + 1.
//! log-likelihood = Σ_t log p(obs_t | obs before t). A step without observation has b = 1 in every state.
//!
//! Shapes   B sequences, T steps, K states, D observed numbers a step, U inputs a step; row-major f32.
//!          model [B or 1, stride]: log_init [K], then the emission's parameters ([`Emission`]).
//!          log_trans [B or 1, T−1 or 1, K, K]: slot t moves t → t + 1; or weights [B or 1, K, K, U+1] of a softmax over j with inputs
//!          [B,T,U]: slot t reads inputs[t+1], the bias is last.
//!          obs [B,T,K] log-probabilities, or [B,T,D] observations.  words [B,1] lengths, or [B,1+T] length and one word a step: 1 observed.
//!          filtered, predicted, posterior [B,T,K]; pair [B,T−1,K,K] or summed over time [B,K,K]; past a sequence's length all are 0.
//!          summary [B,record]: log-likelihood as the sum of two, first impossible step or −1, then what a later launch continues from.
//! Zeros    −1e30 stands for log 0; whatever is ≤ −1e29 is impossible. A sequence with an impossible step has log-likelihood −∞, filtered
//!          0 from that step on, posterior and pair 0; the others are untouched.
//! Sizes    log-probabilities above 1e28 count as 1e28; what is observed, its distance from a mean and inputs of a softmax as ±1e18 beyond
//!          that, a distance in deviations as ±1e14: every finite input has finite results, and so has its gradient.
//! Launch   K ≤ 4 and K ≤ 8: a thread per sequence, states and transition matrix in registers; log-probabilities under a fixed table have
//!          kernels of their own, in which nothing else is compiled, and so have those without predicted and pair probabilities (llvmpipe walks
//!          every branch: a third of the loads and stores, and with the first step out of the loop 135 ms became 60 for 4,096 × 1,000 × 4; two
//!          thirds of what is left are the driver's loops over lanes in 16 loads and stores a step). More states: 16 to 64 threads of a
//!          workgroup per sequence, a state each. A launch covers steps begin..end of the forward or the backward pass, or both over the whole time.
//!          sm_90: 90 registers for K ≤ 4 under a table, 80 for states alone, 168 for K ≤ 8, no spill; 133 and 255 for the general kernels of so many states,
//!          96 for more.
//! Scratch  α lies in the filtered or the posterior output until it is overwritten; where neither is asked for and the pair is, in a bounded
//!          scratch that the runs of the batch share.
//! Floor    4·K bytes of log-probabilities read, 4·K written by the forward pass; 4·K read and written by the backward pass, which needs
//!          no observations: 16·K a step, 46 µs for 4,096 × 1,000 × 4 at 4.3 TB/s of copy.
//! Numerics probabilities, never logs: b = exp(log b − max over states); α is scaled by the power of two of the sum one step before, so
//!          no division, logarithm or rounding lies on the chain. log-likelihood = Σ max (compensated) + exponents·ln 2 + log Σ α(T). A step
//!          whose sum falls below 2⁻⁶⁰ is done again with the shift max_j (log b + log pred). Backward divides by what is predicted
//!          instead of running β: no second pass over the observations, no scale that could run away. In f32 a state whose share falls
//!          below 2⁻¹²⁶ is forgotten, which matters only where no transition leads back to it; the f64 reference forgets nothing.
//! Source   Rabiner 1989 (scaling); Kim 1994, J. Econometrics 60 (backward pass without β).
//! Files    shaders/hmm.wgsl · cuda/hmm.cu · reference: `log_space` (f64, textbook in logarithms); `scaled`, the recursion above

pub use crate::hmm_pack::*;

use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, DeviceKind, Done, Pass, Read, View};
use crate::hmm_scan;
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

// ---- what a model is ------------------------------------------------------------------------------------------------------

/// How a state gives its observation, and what lies behind log_init in a packed model. The `pack_…` functions write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emission {
    /// `obs` holds log b [B,T,K]; nothing is packed, D is 0.
    LogProbabilities,
    /// Independent normals: mean [K,D], 1/deviation [K,D], constant [K] = −D/2·ln 2π − Σ ln deviation.
    GaussianDiagonal,
    /// Normals: mean [K,D], inverse of the lower Cholesky factor [K,D(D+1)/2] row by row, constant [K] = −D/2·ln 2π − Σ ln of the factor's diagonal.
    GaussianFull,
    /// Independent Student-t: location [K,D], 1/scale [K,D], (ν+1)/2 [K,D], 1/ν [K,D], constant [K].
    StudentT,
    /// Independent counts: log rate [K,D], constant [K] = −Σ rate.
    Poisson,
    /// A symbol 0 … symbols−1, written as a real; D is 1: log-probabilities [K,symbols].
    Categorical {
        /// Number of symbols.
        symbols: u32,
    },
    /// y ~ N(x·β, deviation²) with y first and the regressors after it, D = 1 + R: β [K,R], 1/deviation [K], constant [K].
    Regression,
}

impl Emission {
    /// Reals of one model behind log_init.
    pub fn parameters(self, k: u64, d: u64) -> u64 {
        match self {
            Emission::LogProbabilities => 0,
            Emission::GaussianDiagonal => 2 * k * d + k,
            Emission::GaussianFull => k * d + k * d * (d + 1) / 2 + k,
            Emission::StudentT => 4 * k * d + k,
            Emission::Poisson => k * d + k,
            Emission::Categorical { symbols } => k * u64::from(symbols),
            Emission::Regression => k * d.saturating_sub(1) + 2 * k,
        }
    }

    /// Reals of `obs` per step.
    pub fn observed(self, k: u64, d: u64) -> u64 {
        if self == Emission::LogProbabilities { k } else { d }
    }

    /// Its number in [`HmmParams`], the same in WGSL and CUDA.
    pub fn code(self) -> u32 {
        match self {
            Emission::LogProbabilities => 0,
            Emission::GaussianDiagonal => 1,
            Emission::GaussianFull => 2,
            Emission::StudentT => 3,
            Emission::Poisson => 4,
            Emission::Categorical { .. } => 5,
            Emission::Regression => 6,
        }
    }

    /// Symbols of a categorical emission, else 0.
    pub fn symbols(self) -> u32 {
        if let Emission::Categorical { symbols } = self { symbols } else { 0 }
    }

    /// Loop rounds of one state's density; a loop of n takes n + 1.
    pub(crate) fn rounds(self, d: u64) -> u64 {
        match self {
            Emission::LogProbabilities | Emission::Categorical { .. } => 0,
            Emission::GaussianFull => 2 * d + 1 + d * (d + 1) / 2,
            Emission::Poisson => 1 + 9 * d,
            _ => d + 1,
        }
    }
}

/// How states follow each other.
#[derive(Debug, Clone)]
pub enum Transitions {
    /// log-probabilities [B or 1, T−1 or 1, K, K].
    Table {
        /// The table.
        log_trans: View,
        /// A table for each sequence.
        per_sequence: bool,
        /// A table for each step; slot t moves t → t + 1.
        per_step: bool,
    },
    /// softmax over j of weights[i,j,:]·(u(t+1), 1): computed inside the kernels, never stored.
    Softmax {
        /// Weights [B or 1, K, K, U+1], the bias last; a bias of −1e30 is a hard zero.
        weights: View,
        /// Inputs [B,T,U].
        inputs: View,
        /// U.
        u: u64,
        /// Weights for each sequence.
        per_sequence: bool,
    },
}

/// A batch of sequences under one model, or one model each.
#[derive(Debug, Clone)]
pub struct Hmm {
    /// Sequences.
    pub b: u64,
    /// Steps.
    pub t: u64,
    /// States.
    pub k: u64,
    /// Observed numbers a step; 0 for log-probabilities.
    pub d: u64,
    /// What `obs` holds and what the states do with it.
    pub emission: Emission,
    /// Packed models [B or 1, stride].
    pub model: View,
    /// A model for each sequence.
    pub per_sequence: bool,
    /// How states follow each other.
    pub transitions: Transitions,
    /// [B,T,K] or [B,T,D].
    pub obs: View,
    /// Lengths [B,1], or lengths and masks [B,1+T]; none: all of length T, all observed.
    pub words: Option<View>,
    /// Whether `words` holds masks.
    pub masked: bool,
}

/// Largest K: the states of a sequence lie in workgroup memory.
pub const MAX_STATES: u64 = 512;
/// log 0.
pub const LOG_ZERO: f64 = -1e30;
/// Logarithms at or below stand for zero.
pub const IMPOSSIBLE: f64 = -1e29;
/// Log-probabilities above count as this: sums over any number of steps stay finite.
pub const MOST: f64 = 1e28;
/// Where a fused log-density is cut off: far outliers are unlikely, not impossible.
pub const LEAST: f64 = -1e28;

params! {
    /// Params of the HMM kernels. The shape part is that of [`Hmm::params`].
    pub struct HmmParams {
        /// Sequences of this launch.
        b: u32,
        /// Steps.
        t: u32,
        /// States.
        k: u32,
        /// Observed numbers a step.
        d: u32,
        /// Inputs a step.
        u: u32,
        /// [`Emission::code`].
        emission: u32,
        /// Symbols of a categorical emission.
        symbols: u32,
        /// Reals of one packed model.
        stride: u32,
        /// The `flag` bits.
        flags: u32,
        /// First step of this launch.
        begin: u32,
        /// One past its last step.
        end: u32,
        /// Section of `states` in which the forward pass leaves α.
        park: u32,
        /// Reals of `summary` per sequence.
        record: u32,
    }
}

/// Bits of [`HmmParams::flags`].
pub mod flag {
    /// A model for each sequence.
    pub const MODELS: u32 = 1;
    /// Transitions for each sequence.
    pub const TRANS_SEQUENCE: u32 = 2;
    /// Transitions for each step.
    pub const TRANS_STEP: u32 = 4;
    /// Transitions are a softmax of inputs.
    pub const SOFTMAX: u32 = 8;
    /// `words` holds lengths.
    pub const LENGTHS: u32 = 16;
    /// `words` holds masks too.
    pub const MASKED: u32 = 32;
    /// Filtered probabilities are wanted.
    pub const FILTERED: u32 = 64;
    /// Predicted probabilities are wanted.
    pub const PREDICTED: u32 = 128;
    /// Posterior probabilities are wanted.
    pub const POSTERIOR: u32 = 256;
    /// The pair posterior is wanted, summed over time …
    pub const PAIR_SUM: u32 = 512;
    /// … or for each step.
    pub const PAIR_STEPS: u32 = 1024;
    /// Run the forward pass.
    pub const FORWARD: u32 = 2048;
    /// Run the backward pass.
    pub const BACKWARD: u32 = 4096;
    /// The forward pass leaves α in `states`.
    pub const PARK: u32 = 8192;
}

/// The inputs of a run of sequences, ready to bind: model, obs, words, log_trans, inputs, in this order in every HMM kernel.
pub struct Bound {
    /// Shape and flags; `begin`, `end`, `park` and `record` are 0.
    pub params: HmmParams,
    /// The five views.
    pub views: [View; 5],
}

impl Hmm {
    /// Reals of one packed model.
    pub fn stride(&self) -> u64 {
        self.k + self.emission.parameters(self.k, self.d)
    }

    /// Words per sequence.
    fn words_per_sequence(&self) -> u64 {
        if self.masked { 1 + self.t } else { 1 }
    }

    /// Slots of the transition table: 1 or max(T−1, 1).
    fn slots(&self) -> u64 {
        match self.transitions {
            Transitions::Table { per_step: true, .. } => (self.t - 1).max(1),
            _ => 1,
        }
    }

    /// Longest input per sequence, in elements, for `Device::plan`.
    pub fn elements(&self) -> u64 {
        let trans = match &self.transitions {
            Transitions::Table { per_sequence: true, .. } => self.slots() * self.k * self.k,
            Transitions::Table { .. } => 1,
            Transitions::Softmax { u, per_sequence, .. } => (self.t * u).max(if *per_sequence { self.k * self.k * (u + 1) } else { 1 }),
        };
        let model = if self.per_sequence { self.stride() } else { 1 };
        (self.t * self.emission.observed(self.k, self.d)).max(self.words_per_sequence()).max(trans).max(model)
    }

    /// Loop rounds that one step costs a thread that does all its work: densities of K states and a softmax of K rows.
    pub fn rounds(&self) -> u64 {
        let k = self.k;
        let softmax = if let Transitions::Softmax { u, .. } = self.transitions { k + 1 + k * (k + 1 + k * (u + 1)) } else { 0 };
        2 + k + k * self.emission.rounds(self.d) + softmax
    }

    /// Checks sizes and shapes.
    /// # Errors
    /// `Parameter` for K = 0, T = 0, B = 0 or too many states; `Shape` for a view of the wrong length.
    pub fn check(&self, op: &'static str) -> Result<()> {
        let limit = |name: &str, value: u64, most: u64, help: &str| {
            if (1..=most).contains(&value) {
                return Ok(());
            }
            Err(Error::Parameter { op, name: name.into(), value: value.to_string(), help: help.into() })
        };
        limit("states", self.k, MAX_STATES, "give 1 to 512 states")?;
        limit("steps", self.t, u64::from(u32::MAX) / 2, "give at least one step")?;
        limit("sequences", self.b, u64::from(u32::MAX) / 2, "give at least one sequence")?;
        let fits = match self.emission {
            Emission::LogProbabilities => true,
            Emission::Categorical { symbols } => self.d == 1 && symbols > 0,
            _ => self.d > 0,
        };
        if !fits {
            let help = "a categorical emission observes one symbol a step, the others at least one number".into();
            return Err(Error::Parameter { op, name: "observed numbers a step".into(), value: self.d.to_string(), help });
        }
        let len = |arg: &str, view: &View, expected: u64, shape: String| {
            if view.len() == expected {
                return Ok(());
            }
            Err(Error::Shape { op, arg: arg.into(), expected: format!("{shape}, {expected} values"), got: format!("{} values", view.len()) })
        };
        let (b, t, k) = (self.b, self.t, self.k);
        let many = |per_sequence: bool| if per_sequence { b } else { 1 };
        let (models, observed) = (many(self.per_sequence), self.emission.observed(k, self.d));
        len("model", &self.model, models * self.stride(), format!("[{models},{}]", self.stride()))?;
        len("obs", &self.obs, b * t * observed, format!("[{b},{t},{observed}]"))?;
        match &self.transitions {
            Transitions::Table { log_trans, per_sequence, .. } => {
                let (n, slots) = (many(*per_sequence), self.slots());
                len("log_trans", log_trans, n * slots * k * k, format!("[{n},{slots},{k},{k}]"))?;
            }
            Transitions::Softmax { weights, inputs, u, per_sequence } => {
                let n = many(*per_sequence);
                len("weights", weights, n * k * k * (u + 1), format!("[{n},{k},{k},{}]", u + 1))?;
                len("inputs", inputs, b * t * u, format!("[{b},{t},{u}]"))?;
            }
        }
        match &self.words {
            Some(words) => len("words", words, b * self.words_per_sequence(), format!("[{b},{}]", self.words_per_sequence())),
            None if self.masked => Err(Error::Shape { op, arg: "words".into(), expected: "lengths and masks".into(), got: "nothing".into() }),
            None => Ok(()),
        }
    }

    /// The inputs of sequences `run`, aligned for binding.
    pub fn bind(&self, pass: &mut Pass, run: &Range<u64>) -> Result<Bound> {
        let device = pass.device().clone();
        let part = |pass: &mut Pass, view: &View, each: u64| pass.input(&view.buffer, view.range.start + run.start * each..view.range.start + run.end * each);
        let whole = |pass: &mut Pass, view: &View| pass.input(&view.buffer, view.range.clone());
        let mut flags = 0;
        let mut u = 0;
        let model = if self.per_sequence {
            flags |= flag::MODELS;
            part(pass, &self.model, self.stride())?
        } else {
            whole(pass, &self.model)?
        };
        let (log_trans, inputs) = match &self.transitions {
            Transitions::Table { log_trans, per_sequence, per_step } => {
                flags |= if *per_step { flag::TRANS_STEP } else { 0 };
                let table = if *per_sequence {
                    flags |= flag::TRANS_SEQUENCE;
                    part(pass, log_trans, self.slots() * self.k * self.k)?
                } else {
                    whole(pass, log_trans)?
                };
                (table, View::from(&device.zeros("no inputs", 1)?))
            }
            Transitions::Softmax { weights, inputs, u: inputs_per_step, per_sequence } => {
                u = *inputs_per_step;
                flags |= flag::SOFTMAX | flag::TRANS_STEP;
                let weights = if *per_sequence {
                    flags |= flag::TRANS_SEQUENCE;
                    part(pass, weights, self.k * self.k * (u + 1))?
                } else {
                    whole(pass, weights)?
                };
                (weights, part(pass, inputs, self.t * u)?)
            }
        };
        let obs = part(pass, &self.obs, self.t * self.emission.observed(self.k, self.d))?;
        let words = match &self.words {
            Some(words) => {
                flags |= flag::LENGTHS | if self.masked { flag::MASKED } else { 0 };
                part(pass, words, self.words_per_sequence())?
            }
            None => View::from(&device.zeros_u32("no words", 1)?),
        };
        let params = HmmParams {
            b: (run.end - run.start) as u32,
            t: self.t as u32,
            k: self.k as u32,
            d: self.d as u32,
            u: u as u32,
            emission: self.emission.code(),
            symbols: self.emission.symbols(),
            stride: self.stride() as u32,
            flags,
            begin: 0,
            end: 0,
            park: 0,
            record: 0,
        };
        Ok(Bound { params, views: [model, obs, words, log_trans, inputs] })
    }
}

// ---- inputs on the CPU ----------------------------------------------------------------------------------------------------

/// The inputs of a CPU launch: the five arguments that every HMM kernel starts with.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a, R> {
    pub(crate) p: HmmParams,
    pub(crate) model: &'a [R],
    pub(crate) log_trans: &'a [R],
    pub(crate) inputs: &'a [R],
    pub(crate) obs: &'a [R],
    pub(crate) words: &'a [u32],
}

impl<'a, R: Real> Batch<'a, R> {
    /// Takes params and the first five arguments.
    pub(crate) fn of(launch: &mut CpuLaunch<'a, R>) -> Result<Batch<'a, R>> {
        let p = launch.params()?;
        Ok(Batch { p, model: launch.real()?, obs: launch.real()?, words: launch.word()?, log_trans: launch.real()?, inputs: launch.real()? })
    }

    pub(crate) fn has(&self, bits: u32) -> bool {
        self.p.flags & bits != 0
    }

    /// Steps of sequence b.
    pub(crate) fn length(&self, b: usize) -> usize {
        let each = if self.has(flag::MASKED) { 1 + self.p.t as usize } else { 1 };
        if self.has(flag::LENGTHS) { self.words[b * each].min(self.p.t) as usize } else { self.p.t as usize }
    }

    /// Whether step t of sequence b was observed.
    pub(crate) fn observed(&self, b: usize, t: usize) -> bool {
        !self.has(flag::MASKED) || self.words[b * (1 + self.p.t as usize) + 1 + t] != 0
    }

    /// The packed model of sequence b: log_init, then the emission's parameters.
    pub(crate) fn model(&self, b: usize) -> &'a [R] {
        let stride = self.p.stride as usize;
        let at = if self.has(flag::MODELS) { b * stride } else { 0 };
        &self.model[at..at + stride]
    }

    /// log b(t, ·) of sequence b; zeros where nothing was observed.
    pub(crate) fn log_obs(&self, b: usize, t: usize, out: &mut [R]) {
        let (k, width) = (self.p.k as usize, if self.p.emission == 0 { self.p.k } else { self.p.d } as usize);
        let at = (b * self.p.t as usize + t) * width;
        if !self.observed(b, t) {
            out.fill(R::ZERO);
        } else if self.p.emission == 0 {
            out.iter_mut().zip(&self.obs[at..at + k]).for_each(|(out, x)| *out = x.min(R::of(MOST)));
        } else {
            let parameters = &self.model(b)[k..];
            for (state, log_b) in out.iter_mut().enumerate() {
                *log_b = log_density(&self.p, parameters, &self.obs[at..at + width], state);
            }
        }
    }

    /// The K × K log-probabilities of slot t (t → t + 1) of sequence b; zeros are ≤ −1e29.
    pub(crate) fn log_trans(&self, b: usize, slot: usize, out: &mut [R]) {
        let k = self.p.k as usize;
        let b_trans = if self.has(flag::TRANS_SEQUENCE) { b } else { 0 };
        if !self.has(flag::SOFTMAX) {
            let slots = if self.has(flag::TRANS_STEP) { (self.p.t as usize - 1).max(1) } else { 1 };
            let at = (b_trans * slots + if self.has(flag::TRANS_STEP) { slot } else { 0 }) * k * k;
            out.copy_from_slice(&self.log_trans[at..at + k * k]);
            return;
        }
        let u = self.p.u as usize;
        let at = (b * self.p.t as usize + slot + 1) * u;
        let input = &self.inputs[at..at + u];
        let weights = self.log_trans[b_trans * k * k * (u + 1)..].chunks_exact(u + 1);
        for (logit, w) in out.iter_mut().zip(weights) {
            *logit = w[..u].iter().zip(input).map(|(&w, &x)| w * capped(x)).sum::<R>() + w[u];
        }
        for row in out.chunks_exact_mut(k) {
            let total = log_sum_exp(row);
            row.iter_mut().for_each(|x| *x = if *x <= R::of(IMPOSSIBLE) { R::of(LOG_ZERO) } else { *x - total });
        }
    }

    /// Whether transitions change with time.
    pub(crate) fn varies(&self) -> bool {
        self.has(flag::TRANS_STEP)
    }
}

/// log Σ exp; log 0 if all are impossible.
pub(crate) fn log_sum_exp<R: Real>(x: &[R]) -> R {
    let most = x.iter().fold(R::of(LOG_ZERO), |m, &v| m.max(v));
    if most <= R::of(IMPOSSIBLE) {
        return R::of(LOG_ZERO);
    }
    most + x.iter().map(|&v| if v <= R::of(IMPOSSIBLE) { R::ZERO } else { (v - most).exp() }).sum::<R>().ln()
}

/// log Γ(x + 1) for x ≥ 0: Stirling's series from 8 on, the recursion below.
pub(crate) fn log_factorial<R: Real>(x: R) -> R {
    let (mut z, mut product) = (x + R::ONE, R::ONE);
    while z < R::of(8.0) {
        product *= z;
        z += R::ONE;
    }
    let w = R::ONE / z;
    let series = w * (R::of(1.0 / 12.0) - w * w * (R::of(1.0 / 360.0) - w * w * (R::of(1.0 / 1260.0) - w * w * R::of(1.0 / 1680.0))));
    (z - R::of(0.5)) * z.ln() - z + R::of(0.918_938_533_204_672_8) + series - product.ln()
}

/// An observation, or its distance from a mean: products with any sensible parameter stay finite.
pub(crate) fn capped<R: Real>(x: R) -> R {
    x.max(R::of(-1e18)).min(R::of(1e18))
}

/// A distance in deviations, whose square stays finite.
pub(crate) fn bounded<R: Real>(z: R) -> R {
    z.max(R::of(-1e14)).min(R::of(1e14))
}

/// Log-density of one state at one observation, not below [`LEAST`].
pub(crate) fn log_density<R: Real>(p: &HmmParams, parameters: &[R], x: &[R], state: usize) -> R {
    let (k, d) = (p.k as usize, p.d as usize);
    let value = match p.emission {
        1 => {
            let (mean, scale) = (&parameters[state * d..], &parameters[(k + state) * d..]);
            let squares = (0..d).map(|i| bounded(capped(x[i] - mean[i]) * scale[i])).fold(R::ZERO, |sum, z| sum + z * z);
            parameters[2 * k * d + state] - R::of(0.5) * squares
        }
        2 => {
            let triangle = d * (d + 1) / 2;
            let (mean, factor) = (&parameters[state * d..], &parameters[k * d + state * triangle..]);
            let mut squares = R::ZERO;
            for i in 0..d {
                let row = &factor[i * (i + 1) / 2..];
                let z = bounded((0..=i).fold(R::ZERO, |sum, j| sum + row[j] * capped(x[j] - mean[j])));
                squares += z * z;
            }
            parameters[k * (d + triangle) + state] - R::of(0.5) * squares
        }
        3 => {
            let at = |part: usize, i: usize| parameters[(part * k + state) * d + i];
            let tails = (0..d).fold(R::ZERO, |sum, i| {
                let z = bounded(capped(x[i] - at(0, i)) * at(1, i));
                sum + at(2, i) * (z * z * at(3, i)).ln_1p()
            });
            parameters[4 * k * d + state] - tails
        }
        // Terms of a hundred and more leave a small number: in f64 on every host.
        4 => {
            let count = |i: usize| capped(x[i].f64());
            let terms = (0..d).map(|i| count(i) * parameters[state * d + i].f64() - log_factorial(count(i)));
            R::of(parameters[k * d + state].f64() + terms.sum::<f64>())
        }
        5 => {
            let symbol = (x[0].f64().max(0.0) as usize).min(p.symbols as usize - 1);
            return parameters[state * p.symbols as usize + symbol];
        }
        _ => {
            let r = d - 1;
            let fit = (0..r).fold(R::ZERO, |sum, i| sum + capped(x[1 + i]) * parameters[state * r + i]);
            let z = bounded((capped(x[0]) - fit) * parameters[k * r + state]);
            parameters[k * r + k + state] - R::of(0.5) * (z * z)
        }
    };
    value.max(R::of(LEAST))
}

// ---- forward-backward on the CPU --------------------------------------------------------------------------------------------

/// Where the results of one sequence go.
pub(crate) struct SequenceOut<'a, R> {
    pub(crate) filtered: Option<&'a mut [R]>,
    pub(crate) predicted: Option<&'a mut [R]>,
    pub(crate) posterior: Option<&'a mut [R]>,
    /// [K,K], or [T−1,K,K] with `PAIR_STEPS`.
    pub(crate) pair: Option<&'a mut [R]>,
    /// log-likelihood high and low, first impossible step or −1.
    pub(crate) summary: &'a mut [R],
}

/// Reals of `summary` per sequence that are always there.
pub const SUMMARY: u64 = 4;

/// Cuts the outputs of a launch into those of its sequences; `states` holds the wanted sections in the order filtered, predicted, posterior.
pub(crate) fn sequences<'a, R: Real>(p: &HmmParams, states: &'a mut [R], pair: &'a mut [R], summary: &'a mut [R]) -> Vec<SequenceOut<'a, R>> {
    let (b, t, k) = (p.b as usize, p.t as usize, p.k as usize);
    let mut sections = states.chunks_exact_mut((b * t * k).max(1));
    let mut section = |bit: u32| {
        let whole = if p.flags & bit != 0 { sections.next() } else { None };
        whole.map(|s| s.chunks_exact_mut(t * k))
    };
    let (mut filtered, mut predicted, mut posterior) = (section(flag::FILTERED), section(flag::PREDICTED), section(flag::POSTERIOR));
    let pairs = if p.flags & flag::PAIR_STEPS != 0 { (t - 1) * k * k } else { k * k };
    let wanted = p.flags & (flag::PAIR_SUM | flag::PAIR_STEPS) != 0 && pairs > 0;
    let mut pairs = wanted.then(|| pair.chunks_exact_mut(pairs));
    let next = |x: &mut Option<std::slice::ChunksExactMut<'a, R>>| x.as_mut().and_then(Iterator::next);
    let outs = summary.chunks_exact_mut(p.record as usize).take(b);
    outs.map(|summary| SequenceOut {
        filtered: next(&mut filtered),
        predicted: next(&mut predicted),
        posterior: next(&mut posterior),
        pair: next(&mut pairs),
        summary,
    })
    .collect()
}

/// The textbook recursion in logarithms, normalised at every step: the truth (in f64), written for clarity alone.
pub(crate) fn log_space<R: Real>(batch: &Batch<'_, R>, b: usize, out: &mut SequenceOut<'_, R>) {
    let (k, t_max, length) = (batch.p.k as usize, batch.p.t as usize, batch.length(b));
    let zero = R::of(LOG_ZERO);
    let add = |x: R, y: R| if x <= R::of(IMPOSSIBLE) || y <= R::of(IMPOSSIBLE) { zero } else { x + y };
    let probability = |x: R| if x <= R::of(IMPOSSIBLE) { R::ZERO } else { x.exp() };
    let clear = |x: &mut Option<&mut [R]>| x.iter_mut().for_each(|x| x.fill(R::ZERO));
    [&mut out.filtered, &mut out.predicted, &mut out.posterior, &mut out.pair].into_iter().for_each(clear);
    out.summary.fill(R::ZERO);
    out.summary[2] = R::of(-1.0);
    let (mut log_a, mut log_b) = (vec![zero; k * k], vec![zero; length * k]);
    let (mut alpha, mut norm) = (vec![zero; length * k], vec![R::ZERO; length]);
    // log b(t) from here on without its largest; alpha(t) = log filtered(t), norm(t) = log p(obs_t | obs before) without it too
    let mut total = Compensated::new();
    for (t, row) in log_b.chunks_exact_mut(k).enumerate() {
        batch.log_obs(b, t, row);
        let shift = row.iter().fold(zero, |m, &x| m.max(x));
        row.iter_mut().for_each(|x| *x = add(*x, -shift));
        total.add(if shift <= R::of(IMPOSSIBLE) { R::ZERO } else { shift });
    }
    for t in 0..length {
        let mut pred = batch.model(b)[..k].to_vec();
        if t > 0 {
            if t == 1 || batch.varies() {
                batch.log_trans(b, t - 1, &mut log_a);
            }
            for j in 0..k {
                let into: Vec<R> = (0..k).map(|i| add(alpha[(t - 1) * k + i], log_a[i * k + j])).collect();
                pred[j] = log_sum_exp(&into);
            }
        }
        let joint: Vec<R> = (0..k).map(|j| add(pred[j], log_b[t * k + j])).collect();
        norm[t] = log_sum_exp(&joint);
        for j in 0..k {
            alpha[t * k + j] = add(joint[j], -norm[t]);
        }
        if let Some(x) = &mut out.predicted {
            (0..k).for_each(|j| x[t * k + j] = probability(pred[j]));
        }
        if norm[t] <= R::of(IMPOSSIBLE) {
            out.summary[0] = zero;
            out.summary[2] = R::of(t as f64);
            return;
        }
        if let Some(x) = &mut out.filtered {
            (0..k).for_each(|j| x[t * k + j] = probability(alpha[t * k + j]));
        }
        total.add(norm[t]);
    }
    (out.summary[0], out.summary[1]) = total.parts();
    if out.posterior.is_none() && out.pair.is_none() {
        return;
    }
    let mut beta = vec![R::ZERO; k];
    for t in (0..length).rev() {
        if t + 1 < length {
            if t + 2 == length || batch.varies() {
                batch.log_trans(b, t, &mut log_a);
            }
            let ahead: Vec<R> = (0..k).map(|j| add(beta[j], add(log_b[(t + 1) * k + j], -norm[t + 1]))).collect();
            if let Some(x) = &mut out.pair {
                let slot = if batch.has(flag::PAIR_STEPS) { t * k * k } else { 0 };
                for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
                    x[slot + i * k + j] += probability(add(alpha[t * k + i], add(log_a[i * k + j], ahead[j])));
                }
            }
            for i in 0..k {
                let onto: Vec<R> = (0..k).map(|j| add(log_a[i * k + j], ahead[j])).collect();
                beta[i] = log_sum_exp(&onto);
            }
        }
        if let Some(x) = &mut out.posterior {
            (0..k).for_each(|j| x[t * k + j] = probability(add(alpha[t * k + j], beta[j])));
        }
    }
    debug_assert!(length <= t_max);
}

/// A sum with its rounding errors.
#[derive(Clone, Copy)]
pub(crate) struct Compensated<R> {
    high: R,
    low: R,
}

impl<R: Real> Compensated<R> {
    pub(crate) fn new() -> Self {
        Compensated { high: R::ZERO, low: R::ZERO }
    }

    pub(crate) fn add(&mut self, x: R) {
        let sum = self.high + x;
        let part = sum - self.high;
        self.low += (self.high - (sum - part)) + (x - part);
        self.high = sum;
    }

    /// High and low part, the high one rounded.
    pub(crate) fn parts(self) -> (R, R) {
        let sum = self.high + self.low;
        (sum, (self.high - sum) + self.low)
    }
}

/// A step whose sum is below this is done again with the joint shift.
const RETRY: f64 = 1.0 / (1u64 << 60) as f64;
/// Steps after which the exponents are folded into the sum.
const FOLD: usize = 128;
/// Steps whose pair posteriors are summed before they join the total.
const PAIR_BLOCK: usize = 64;
/// ln 2 as the sum of two: a product of the first with fewer than 2^15 is exact in f32.
const LN2_HIGH: f64 = 0.693_359_375;
const LN2_LOW: f64 = std::f64::consts::LN_2 - LN2_HIGH;

/// α = pred·exp(log b) up to a factor exp(shift); returns the shift and the sum. A sum of 0: the step is impossible.
pub(crate) fn observe<R: Real>(pred: &[R], log_b: &[R], alpha: &mut [R]) -> (R, R) {
    let b = |x: R, shift: R| if x <= R::of(IMPOSSIBLE) { R::ZERO } else { (x - shift).exp() };
    let shift = log_b.iter().fold(R::of(LOG_ZERO), |m, &x| m.max(x));
    let mut sum = R::ZERO;
    for j in 0..pred.len() {
        alpha[j] = pred[j] * b(log_b[j], shift);
        sum += alpha[j];
    }
    if sum >= R::of(RETRY) {
        return (shift, sum);
    }
    let mut shift = R::of(LOG_ZERO);
    for j in 0..pred.len() {
        alpha[j] = if pred[j] > R::ZERO && log_b[j] > R::of(IMPOSSIBLE) { log_b[j] + pred[j].ln() } else { R::of(LOG_ZERO) };
        shift = shift.max(alpha[j]);
    }
    let mut sum = R::ZERO;
    for x in alpha.iter_mut() {
        *x = b(*x, shift);
        sum += *x;
    }
    (shift, sum)
}

/// The recursion of the file's head, one sequence at a time: what the device columns do, in plain Rust.
pub(crate) fn scaled<R: Real>(batch: &Batch<'_, R>, b: usize, out: &mut SequenceOut<'_, R>) {
    let (k, length) = (batch.p.k as usize, batch.length(b));
    let keep = out.posterior.is_some() || out.pair.is_some();
    let clear = |x: &mut Option<&mut [R]>| x.iter_mut().for_each(|x| x.fill(R::ZERO));
    [&mut out.filtered, &mut out.predicted, &mut out.posterior, &mut out.pair].into_iter().for_each(clear);
    out.summary.fill(R::ZERO);
    out.summary[2] = R::of(-1.0);
    if length == 0 {
        return;
    }
    let (mut log_b, mut pred, mut a) = (vec![R::ZERO; k], vec![R::ZERO; k], vec![R::ZERO; k * k]);
    let mut kept = vec![R::ZERO; if keep { length * k } else { k }];
    let probabilities = |slot: usize, a: &mut [R]| {
        batch.log_trans(b, slot, a);
        a.iter_mut().for_each(|x| *x = if *x <= R::of(IMPOSSIBLE) { R::ZERO } else { x.exp() });
    };

    // forward
    let (mut total, mut exponents, mut sum) = (Compensated::new(), 0, R::ONE);
    let mut alpha = vec![R::ZERO; k];
    for t in 0..length {
        let (exponent, scale) = exponent_of(sum);
        if t == 0 {
            for (p, &x) in pred.iter_mut().zip(batch.model(b)) {
                *p = if x <= R::of(IMPOSSIBLE) { R::ZERO } else { x.exp() };
            }
        } else {
            if t == 1 || batch.varies() {
                probabilities(t - 1, &mut a);
            }
            predict(&alpha, &a, &mut pred);
        }
        if let Some(x) = &mut out.predicted {
            (0..k).for_each(|j| x[t * k + j] = pred[j] / sum);
        }
        pred.iter_mut().for_each(|x| *x *= scale);
        exponents += exponent;
        batch.log_obs(b, t, &mut log_b);
        let (shift, now) = observe(&pred, &log_b, &mut alpha);
        if now <= R::ZERO {
            out.summary[0] = R::of(LOG_ZERO);
            out.summary[2] = R::of(t as f64);
            [&mut out.posterior, &mut out.pair].into_iter().for_each(clear);
            return;
        }
        sum = now;
        total.add(shift);
        if t % FOLD == FOLD - 1 {
            fold(&mut total, &mut exponents);
        }
        let inverse = R::ONE / sum;
        if let Some(x) = &mut out.filtered {
            (0..k).for_each(|j| x[t * k + j] = alpha[j] * inverse);
        }
        if keep {
            (0..k).for_each(|j| kept[t * k + j] = alpha[j] * inverse);
        }
    }
    fold(&mut total, &mut exponents);
    total.add(sum.ln());
    (out.summary[0], out.summary[1]) = total.parts();
    if !keep {
        return;
    }

    // backward
    let mut gamma = kept[(length - 1) * k..].to_vec();
    let (mut ratio, mut block) = (vec![R::ZERO; k], vec![R::ZERO; k * k]);
    if let Some(x) = &mut out.posterior {
        x[(length - 1) * k..length * k].copy_from_slice(&gamma);
    }
    for t in (0..length - 1).rev() {
        let alpha = &kept[t * k..(t + 1) * k];
        if t + 2 == length && length > 2 && !batch.varies() {
            // the matrix of the forward pass
        } else if batch.varies() || length == 2 {
            probabilities(t, &mut a);
        }
        predict(alpha, &a, &mut pred);
        for j in 0..k {
            ratio[j] = if pred[j] > R::ZERO { gamma[j] / pred[j] } else { R::ZERO };
        }
        let mut sum = R::ZERO;
        for i in 0..k {
            gamma[i] = alpha[i] * a[i * k..(i + 1) * k].iter().zip(&ratio).fold(R::ZERO, |s, (&a, &r)| a.mul_add(r, s));
            sum += gamma[i];
        }
        let inverse = if sum > R::ZERO { R::ONE / sum } else { R::ZERO };
        if let Some(x) = &mut out.posterior {
            (0..k).for_each(|j| x[t * k + j] = gamma[j] * inverse);
        }
        if let Some(x) = &mut out.pair {
            let steps = batch.has(flag::PAIR_STEPS);
            let target = if steps { &mut x[t * k * k..(t + 1) * k * k] } else { &mut block[..] };
            for i in 0..k {
                for j in 0..k {
                    let p = alpha[i] * a[i * k + j] * ratio[j] * inverse;
                    target[i * k + j] = if steps { p } else { target[i * k + j] + p };
                }
            }
            if !steps && t % PAIR_BLOCK == 0 {
                x.iter_mut().zip(&mut block).for_each(|(x, sum)| *x += std::mem::take(sum));
            }
        }
    }
}

/// pred(j) = Σ_i α(i)·A(i,j).
fn predict<R: Real>(alpha: &[R], a: &[R], pred: &mut [R]) {
    let k = alpha.len();
    pred.fill(R::ZERO);
    for i in 0..k {
        for j in 0..k {
            pred[j] = alpha[i].mul_add(a[i * k + j], pred[j]);
        }
    }
}

/// e and 2^-e with 2^e ≤ x < 2^(e+1), exact.
pub(crate) fn exponent_of<R: Real>(x: R) -> (i32, R) {
    let e = ((x.f64().to_bits() >> 52) & 0x7ff) as i32 - 1023;
    (e, R::of(f64::from_bits(((1023 - e) as u64) << 52)))
}

fn fold<R: Real>(total: &mut Compensated<R>, exponents: &mut i32) {
    let e = R::of(f64::from(std::mem::take(exponents)));
    total.add(e * R::of(LN2_HIGH));
    total.add(e * R::of(LN2_LOW));
}

fn run_cpu<R: Real>(mut launch: CpuLaunch<'_, R>, all: fn(&Batch<'_, R>, &mut [SequenceOut<'_, R>])) -> Result<()> {
    let batch = Batch::of(&mut launch)?;
    let (states, pair, summary) = (launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    if batch.p.begin != 0 || batch.p.end != batch.p.t {
        return Err(Error::Internal("hmm_forward_backward: the CPU column runs the whole time in one launch".into()));
    }
    all(&batch, &mut sequences(&batch.p, states, pair, summary));
    Ok(())
}

/// The truth, in f64.
fn hmm_forward_backward_log_cpu(launch: CpuLaunch<'_, f64>) -> Result<()> {
    run_cpu(launch, |batch, outs| outs.par_iter_mut().enumerate().for_each(|(b, out)| log_space(batch, b, out)))
}

/// The lane-wise f32 column; [`scaled`] is the plain one.
pub(crate) fn hmm_forward_backward_cpu(launch: CpuLaunch<'_, f32>) -> Result<()> {
    run_cpu(launch, crate::hmm_lanes::forward_backward)
}

fn hmm_emission_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmParams = launch.params()?;
    let (model, obs, words, log_obs) = (launch.real()?, launch.real()?, launch.word()?, launch.real_mut()?);
    let batch = Batch { p, model, log_trans: &[], inputs: &[], obs, words };
    let (t, k) = (p.t as usize, p.k as usize);
    log_obs.par_chunks_exact_mut(k).take(p.b as usize * t).enumerate().for_each(|(at, out)| batch.log_obs(at / t, at % t, out));
    Ok(())
}

// ---- kernels ----------------------------------------------------------------------------------------------------------------

fn params(words: &[u32]) -> HmmParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn steps(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.b) * u64::from(p.t)
}

/// Threads of a workgroup of the thread-per-sequence kernels: small, so that few thousand sequences reach every multiprocessor.
const THREADS: u32 = 32;
/// Threads of a workgroup of the other kernels.
const WIDE: u32 = 64;

/// Log-density of every state at every step.
pub static HMM_EMISSION: Kernel = Kernel {
    name: "hmm_emission",
    about: "log-density of every state at every step",
    args: &[reads("model"), reads("obs"), reads_u32("words"), writes("log_obs")],
    params: layout::<HmmParams>(),
    workgroup: WIDE,
    constants: &[("VARIANT", 0)],
    groups: |words| (steps(words) * u64::from(params(words).k)).div_ceil(u64::from(WIDE)),
    wgsl: wgsl!("hmm"),
    cuda: cuda!("hmm"),
    cpu: Some(Cpu { f32: hmm_emission_cpu::<f32>, f64: hmm_emission_cpu::<f64> }),
    cost: Cost { unit: "sequence-step", units: steps, bytes: 20.0, flops: 20.0 },
};

/// Forward-backward for any K.
pub static HMM_FORWARD_BACKWARD: Kernel = Kernel {
    name: "hmm_forward_backward",
    about: "log-likelihood, filtered, predicted and smoothed probabilities, pair posteriors",
    args: &[reads("model"), reads("obs"), reads_u32("words"), reads("log_trans"), reads("inputs"), writes("states"), writes("pair"), writes("summary")],
    params: layout::<HmmParams>(),
    workgroup: WIDE,
    constants: &[("VARIANT", 0)],
    groups: |words| u64::from(params(words).b).div_ceil(sequences_per_group(u64::from(params(words).k))),
    wgsl: wgsl!("hmm"),
    cuda: cuda!("hmm"),
    cpu: Some(Cpu { f32: hmm_forward_backward_cpu, f64: hmm_forward_backward_log_cpu }),
    cost: Cost { unit: "sequence-step", units: steps, bytes: 64.0, flops: 90.0 },
};

/// Forward-backward for K ≤ 4.
pub static HMM_FORWARD_BACKWARD_4: Kernel = Kernel {
    name: "hmm_forward_backward_4",
    about: "the same for up to 4 states, a thread per sequence",
    constants: &[("VARIANT", 4)],
    workgroup: THREADS,
    groups: |words| u64::from(params(words).b).div_ceil(u64::from(THREADS)),
    ..HMM_FORWARD_BACKWARD
};

/// Forward-backward for K ≤ 8.
pub static HMM_FORWARD_BACKWARD_8: Kernel = Kernel {
    name: "hmm_forward_backward_8",
    about: "the same for up to 8 states, a thread per sequence",
    constants: &[("VARIANT", 8)],
    workgroup: THREADS,
    groups: |words| u64::from(params(words).b).div_ceil(u64::from(THREADS)),
    ..HMM_FORWARD_BACKWARD
};

/// Forward-backward for K ≤ 4, log-probabilities that are all there, and a table that does not vary: nothing else is compiled in.
pub static HMM_FORWARD_BACKWARD_TABLE_4: Kernel = Kernel {
    name: "hmm_forward_backward_table_4",
    about: "the same for log-probabilities under a fixed table",
    constants: &[("VARIANT", 104)],
    ..HMM_FORWARD_BACKWARD_4
};

/// Forward-backward for K ≤ 8, log-probabilities that are all there, and a table that does not vary.
pub static HMM_FORWARD_BACKWARD_TABLE_8: Kernel = Kernel {
    name: "hmm_forward_backward_table_8",
    about: "the same for log-probabilities under a fixed table",
    constants: &[("VARIANT", 108)],
    ..HMM_FORWARD_BACKWARD_8
};

/// Forward-backward for K ≤ 4 under such a table, without predicted and pair probabilities.
pub static HMM_FORWARD_BACKWARD_STATES_4: Kernel = Kernel {
    name: "hmm_forward_backward_states_4",
    about: "the same without predicted and pair probabilities",
    constants: &[("VARIANT", 204)],
    ..HMM_FORWARD_BACKWARD_4
};

/// Forward-backward for K ≤ 8 under such a table, without predicted and pair probabilities.
pub static HMM_FORWARD_BACKWARD_STATES_8: Kernel = Kernel {
    name: "hmm_forward_backward_states_8",
    about: "the same without predicted and pair probabilities",
    constants: &[("VARIANT", 208)],
    ..HMM_FORWARD_BACKWARD_8
};

/// Sequences that a workgroup of the wide kernel takes: each has the next power of two ≥ K of its threads.
fn sequences_per_group(k: u64) -> u64 {
    u64::from(WIDE) / k.next_power_of_two().clamp(1, u64::from(WIDE))
}

// ---- the ops ------------------------------------------------------------------------------------------------------------------

/// The pair posterior that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pair {
    /// None.
    #[default]
    None,
    /// Summed over time [B,K,K]: expected transitions.
    Sum,
    /// Of each step [B,T−1,K,K].
    Steps,
}

/// What is wanted; what is not costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// p(state at t | observations up to t).
    pub filtered: bool,
    /// p(state at t | observations before t).
    pub predicted: bool,
    /// p(state at t | all observations).
    pub posterior: bool,
    /// p(states at t and t + 1 | all observations).
    pub pair: Pair,
}

/// Results on the device.
#[derive(Debug, Clone)]
pub struct ForwardBackward {
    /// [B,T,K].
    pub filtered: Option<View>,
    /// [B,T,K].
    pub predicted: Option<View>,
    /// [B,T,K].
    pub posterior: Option<View>,
    /// [B,T−1,K,K] or [B,K,K].
    pub pair: Option<View>,
    /// [B,record]; [`ForwardBackward::likelihoods`] reads it.
    pub summary: Buffer,
    /// Reals of `summary` per sequence.
    pub record: u64,
}

/// What is left on the host of one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likelihood {
    /// log p(observations); −∞ if they are impossible.
    pub value: f64,
    /// The first step that the model cannot give.
    pub impossible: Option<u32>,
}

impl ForwardBackward {
    /// Records the download of the likelihoods.
    pub fn read(&self, pass: &mut Pass) -> Result<Read> {
        pass.read(&self.summary)
    }

    /// Redeems [`ForwardBackward::read`].
    pub fn likelihoods(&self, done: &mut Done, read: Read) -> Result<Vec<Likelihood>> {
        let of = |s: &[f64]| match s[2] < 0.0 {
            true => Likelihood { value: s[0] + s[1], impossible: None },
            false => Likelihood { value: f64::NEG_INFINITY, impossible: Some(s[2] as u32) },
        };
        Ok(done.f64(read)?.chunks_exact(self.record as usize).map(of).collect())
    }
}

/// Records the log-densities [B,T,K] of any emission, for whoever does not evaluate them itself.
/// # Errors
/// Those of [`Hmm::check`].
pub fn hmm_emission(pass: &mut Pass, hmm: &Hmm) -> Result<Buffer> {
    const OP: &str = "hmm_emission";
    hmm.check(OP)?;
    let device = pass.device().clone();
    let each = hmm.t * hmm.k;
    let log_obs = device.zeros("log_obs", hmm.b * each)?;
    device.check_rounds(OP, hmm.rounds(), "rounds")?;
    for run in device.plan(OP, hmm.b, hmm.elements().max(each), each.div_ceil(u64::from(WIDE)), each * 20)? {
        let Bound { mut params, views: [model, obs, words, ..] } = hmm.bind(pass, &run)?;
        params.end = params.t;
        let out = pass.output(&log_obs, run.start * each..run.end * each)?;
        pass.launch(&HMM_EMISSION, &params, &[model, obs, words, out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(log_obs)
}

/// Largest scratch for α, in elements, where no output can hold it.
const SCRATCH: u64 = 8 << 20;

/// Which bits of `flags` each section of `states` stands for, in order.
const SECTIONS: [u32; 3] = [flag::FILTERED, flag::PREDICTED, flag::POSTERIOR];

impl Wanted {
    fn flags(self) -> u32 {
        let bit = |wanted: bool, bit: u32| if wanted { bit } else { 0 };
        let pair = match self.pair {
            Pair::None => 0,
            Pair::Sum => flag::PAIR_SUM,
            Pair::Steps => flag::PAIR_STEPS,
        };
        bit(self.filtered, flag::FILTERED) | bit(self.predicted, flag::PREDICTED) | bit(self.posterior, flag::POSTERIOR) | pair
    }

    fn backward(self) -> bool {
        self.posterior || self.pair != Pair::None
    }
}

/// How one call is cut into launches.
struct Plan {
    kernel: &'static Kernel,
    /// Sequences per launch.
    runs: Vec<Range<u64>>,
    /// Steps per launch.
    block: u64,
    record: u64,
    /// Sections of `states` that are results, and one more if α needs a place of its own.
    wanted: Vec<u32>,
    scratch: bool,
    pairs: u64,
}

impl Plan {
    fn of(device: &Device, hmm: &Hmm, wanted: Wanted) -> Result<Plan> {
        const OP: &str = "hmm_forward_backward";
        let (t, k) = (hmm.t, hmm.k);
        let on_host = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference);
        let sections: Vec<u32> = SECTIONS.into_iter().filter(|bit| wanted.flags() & bit != 0).collect();
        let scratch = !on_host && wanted.backward() && !wanted.filtered && !wanted.posterior;
        let pairs = match wanted.pair {
            Pair::None => 0,
            Pair::Sum => k * k,
            Pair::Steps => (t - 1) * k * k,
        };
        let states = (sections.len() as u64 + u64::from(scratch)) * t * k;
        let block = if on_host { t } else { block_of(device, hmm, wanted.backward())? };
        let record = if block < t { SUMMARY + k } else { SUMMARY };
        let work = t * (4 * k * k + 20 * k) * if wanted.backward() { 2 } else { 1 };
        let groups = 1u64.div_ceil(sequences_per_group(k));
        let mut runs = device.plan(OP, hmm.b, hmm.elements().max(states).max(pairs), groups, work)?;
        if scratch {
            let most = (SCRATCH / (t * k)).max(1);
            runs = runs
                .into_iter()
                .flat_map(|r| (0..(r.end - r.start).div_ceil(most)).map(move |i| r.start + i * most..(r.start + (i + 1) * most).min(r.end)))
                .collect();
        }
        let kernel = if on_host { &HMM_FORWARD_BACKWARD } else { kernel_of(hmm, wanted) };
        Ok(Plan { kernel, runs, block, record, wanted: sections, scratch, pairs })
    }
}

/// Whether observations are log-probabilities, all there, under a table that does not vary.
fn plain(hmm: &Hmm) -> bool {
    hmm.emission == Emission::LogProbabilities && !hmm.masked && matches!(hmm.transitions, Transitions::Table { per_step: false, .. })
}

/// The kernel of a GPU.
fn kernel_of(hmm: &Hmm, wanted: Wanted) -> &'static Kernel {
    let states = !wanted.predicted && wanted.pair == Pair::None;
    match (hmm.k, plain(hmm), states) {
        (9.., ..) => &HMM_FORWARD_BACKWARD,
        (5.., true, true) => &HMM_FORWARD_BACKWARD_STATES_8,
        (5.., true, false) => &HMM_FORWARD_BACKWARD_TABLE_8,
        (5.., false, _) => &HMM_FORWARD_BACKWARD_8,
        (_, true, true) => &HMM_FORWARD_BACKWARD_STATES_4,
        (_, true, false) => &HMM_FORWARD_BACKWARD_TABLE_4,
        (_, false, _) => &HMM_FORWARD_BACKWARD_4,
    }
}

/// Loop rounds of a thread in the device columns, at most: per launch, per step forward, per step backward. A loop of n takes n + 1, and one
/// that is not entered takes one too where all threads of a vector walk through every branch.
fn rounds(hmm: &Hmm) -> [u64; 3] {
    let (k, own) = (hmm.k, hmm.k.div_ceil(u64::from(WIDE)));
    let (logit, varies) = match hmm.transitions {
        Transitions::Softmax { u, .. } => (u + 1, true),
        Transitions::Table { per_step, .. } => (1, per_step),
    };
    // Densities hold eight loops.
    let density = 9 + hmm.emission.rounds(hmm.d);
    let row = (k + 1) * (1 + logit);
    if k <= 8 {
        let load = (k + 1) * (1 + row);
        if plain(hmm) {
            return [2 * load + 4 * (k + 1), 3, 1];
        }
        let varying = if varies { load } else { 4 };
        let densities = if hmm.emission == Emission::LogProbabilities { 1 } else { k } * density + 1;
        return [2 * load + 4 * (k + 1), 3 + densities + varying, 2 + varying];
    }
    let load = (own + 1) * (1 + 3 * row);
    let varying = if varies { load } else { 8 };
    let ahead = 2 + 4 * (own + 1) + own * density + varying + 4 * (k + 1) + own * row;
    [2 * load + 4 * (k + 1), ahead, 2 + 4 * (own + 1) + varying + k + 1 + 2 * own * row]
}

/// Steps of one launch: all where the device's loops may be as long, else as many as one direction can take.
fn block_of(device: &Device, hmm: &Hmm, backward: bool) -> Result<u64> {
    let limit = device.limits().loop_rounds;
    let [once, ahead, back] = rounds(hmm);
    let back = if backward { back } else { 0 };
    if (ahead + back).saturating_mul(hmm.t).saturating_add(once) <= limit {
        return Ok(hmm.t);
    }
    device.check_rounds("hmm_forward_backward", once + ahead.max(back), "rounds per step")?;
    // Never the whole time: a launch of all of it would run both directions.
    Ok(((limit - once) / ahead.max(back)).min(hmm.t.div_ceil(2)))
}

/// Records forward-backward over a batch.
///
/// filtered and predicted at t depend on the observations up to t and before t; posterior and pair on all of them: never trade on those.
/// # Errors
/// Those of [`Hmm::check`]; `TooLarge` where a single sequence passes the device's limits.
pub fn hmm_forward_backward(pass: &mut Pass, hmm: &Hmm, wanted: Wanted) -> Result<ForwardBackward> {
    hmm.check("hmm_forward_backward")?;
    let device = pass.device().clone();
    let (b, each) = (hmm.b, hmm.t * hmm.k);
    let plan = Plan::of(&device, hmm, wanted)?;
    if plan.runs.len() == 1 && hmm_scan::wins(&device, hmm, wanted) {
        return hmm_scan::hmm_scan_with(pass, hmm, wanted, plan.record);
    }
    let summary = device.zeros("hmm summary", b * plan.record)?;
    let pair = device.zeros("pair posterior", (b * plan.pairs).max(1))?;
    let results: Vec<View> = if plan.runs.len() == 1 && !plan.scratch {
        let states = device.zeros("states", (plan.wanted.len() as u64 * b * each).max(1))?;
        (0..plan.wanted.len() as u64).map(|s| states.view(s * b * each..(s + 1) * b * each)).collect()
    } else {
        plan.wanted.iter().map(|_| Ok(View::from(&device.zeros("states", b * each)?))).collect::<Result<_>>()?
    };
    let section = |bit: u32| plan.wanted.iter().position(|&w| w == bit).map(|s| results[s].clone());
    let out = ForwardBackward {
        filtered: section(flag::FILTERED),
        predicted: section(flag::PREDICTED),
        posterior: section(flag::POSTERIOR),
        pair: (wanted.pair != Pair::None).then(|| pair.view(0..b * plan.pairs)),
        summary,
        record: plan.record,
    };
    hmm_forward_backward_into(pass, hmm, wanted, &out)?;
    Ok(out)
}

/// As [`hmm_forward_backward`], into the buffers that an earlier call for this shape and the same wishes gave.
/// # Errors
/// Those of [`hmm_forward_backward`].
pub fn hmm_forward_backward_into(pass: &mut Pass, hmm: &Hmm, wanted: Wanted, into: &ForwardBackward) -> Result<()> {
    hmm.check("hmm_forward_backward")?;
    let device = pass.device().clone();
    let (b, each) = (hmm.b, hmm.t * hmm.k);
    let plan = Plan::of(&device, hmm, wanted)?;
    let results: Vec<&View> = [&into.filtered, &into.predicted, &into.posterior].into_iter().flatten().collect();
    let summary = &into.summary;
    let pair = match &into.pair {
        Some(view) => view.buffer.clone(),
        None => device.zeros("no pairs", 1)?,
    };
    let lengths = [summary.len() == b * plan.record, results.len() == plan.wanted.len(), results.iter().all(|x| x.len() == b * each)];
    if lengths.contains(&false) || into.pair.as_ref().is_some_and(|x| x.len() != b * plan.pairs) {
        let (expected, got) = (format!("results of [{b}, {}, {}]", hmm.t, hmm.k), "those of another shape or other wishes".into());
        return Err(Error::Shape { op: "hmm_forward_backward", arg: "into".into(), expected, got });
    }
    // A run's sections lie together; where results are apart, or α needs a place, they pass through a scratch that the runs share.
    let together = plan.wanted.len() as u64 + u64::from(plan.scratch);
    let longest = plan.runs.iter().map(|r| r.end - r.start).max().unwrap_or(0);
    let through = plan.scratch || (plan.runs.len() > 1 && plan.wanted.len() > 1);
    let states = if through { Some(device.zeros("states of a run", together * longest * each)?) } else { None };
    for run in &plan.runs {
        let n = run.end - run.start;
        let Bound { mut params, views: [model, obs, words, log_trans, inputs] } = hmm.bind(pass, run)?;
        params.flags |= wanted.flags();
        params.record = plan.record as u32;
        params.park = park(&plan);
        let out = match (&states, results.first()) {
            (Some(shared), _) => pass.output(shared, 0..together * n * each)?,
            (None, Some(first)) if plan.runs.len() == 1 => pass.output(&first.buffer, 0..first.buffer.len())?,
            (None, Some(only)) => pass.output(&only.buffer, run.start * each..run.end * each)?,
            (None, None) => {
                let nothing = device.zeros("no states", 1)?;
                pass.output(&nothing, 0..1)?
            }
        };
        let of_pair = if plan.pairs > 0 { run.start * plan.pairs..run.end * plan.pairs } else { 0..1 };
        let (pairs, sums) = (pass.output(&pair, of_pair)?, pass.output(summary, run.start * plan.record..run.end * plan.record)?);
        let args = [model, obs, words, log_trans, inputs, out.view.clone(), pairs.view.clone(), sums.view.clone()];
        launches(pass, &plan, params, wanted.backward(), &args)?;
        pass.finish(out)?;
        pass.finish(pairs)?;
        pass.finish(sums)?;
        if let Some(shared) = &states {
            for (s, result) in results.iter().enumerate() {
                let s = s as u64;
                pass.copy(shared.view(s * n * each..(s + 1) * n * each), result.buffer.view(run.start * each..run.end * each))?;
            }
        }
    }
    Ok(())
}

/// Section in which α waits for the backward pass.
fn park(plan: &Plan) -> u32 {
    let at = |bit: u32| plan.wanted.iter().position(|&w| w == bit);
    at(flag::FILTERED).or_else(|| at(flag::POSTERIOR)).unwrap_or(plan.wanted.len()) as u32
}

/// One launch where the loops may be as long as the series; else forward over the blocks of time, then backward.
fn launches(pass: &mut Pass, plan: &Plan, mut params: HmmParams, backward: bool, args: &[View]) -> Result<()> {
    let (t, block) = (u64::from(params.t), plan.block);
    let park = if backward { flag::PARK } else { 0 };
    params.flags |= park;
    if block >= t {
        params.end = params.t;
        params.flags |= flag::FORWARD | if backward { flag::BACKWARD } else { 0 };
        return pass.launch(plan.kernel, &params, args);
    }
    let blocks: Vec<Range<u64>> = (0..t.div_ceil(block)).map(|i| i * block..((i + 1) * block).min(t)).collect();
    let forward = blocks.iter().map(|r| (flag::FORWARD, r));
    let back = blocks.iter().rev().map(|r| (flag::BACKWARD, r)).take(if backward { blocks.len() } else { 0 });
    for (direction, range) in forward.chain(back) {
        let part = HmmParams { begin: range.start as u32, end: range.end as u32, flags: params.flags | direction, ..params };
        pass.launch(plan.kernel, &part, args)?;
    }
    Ok(())
}

// ---- conformance ------------------------------------------------------------------------------------------------------------

/// The model of an HMM conformance case (shared with hmm_viterbi).
pub(crate) fn hmm_of_case(device: &Device, case: &Case) -> Result<Hmm> {
    let wrong = |arg: &str, expected: &str, got: &[usize]| Error::Shape { op: "hmm", arg: arg.into(), expected: expected.into(), got: format!("{got:?}") };
    let (init, trans) = (case.shape("log_init")?, case.shape("log_trans")?);
    let &[b, t, k] = case.shape("log_obs")? else { return Err(wrong("log_obs", "[B,T,K]", case.shape("log_obs")?)) };
    let (&[models, _], &[tables, slots, ..]) = (init, trans) else { return Err(wrong("log_init, log_trans", "[B or 1,K], [B or 1,T−1 or 1,K,K]", init)) };
    let lengths = if case.has("lengths") { Some(case.u32("lengths")?) } else { None };
    let words = match lengths {
        Some(lengths) => Some(View::from(&device.upload_u32("words", &pack_words(t, lengths, None)?)?)),
        None => None,
    };
    Ok(Hmm {
        b: b as u64,
        t: t as u64,
        k: k as u64,
        d: 0,
        emission: Emission::LogProbabilities,
        model: View::from(&device.upload("model", case.f32("log_init")?)?),
        per_sequence: models > 1,
        transitions: Transitions::Table {
            log_trans: View::from(&device.upload("log_trans", case.f32("log_trans")?)?),
            per_sequence: tables > 1,
            per_step: slots > 1,
        },
        obs: View::from(&device.upload("log_obs", case.f32("log_obs")?)?),
        words,
        masked: false,
    })
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let hmm = hmm_of_case(device, case)?;
    let per_step = matches!(hmm.transitions, Transitions::Table { per_step: true, .. });
    let mut pass = device.pass("hmm_forward_backward");
    let pair = if per_step { Pair::Steps } else { Pair::Sum };
    let result = hmm_forward_backward(&mut pass, &hmm, Wanted { filtered: true, predicted: false, posterior: true, pair })?;
    let summary = result.read(&mut pass)?;
    let mut reals = Vec::new();
    for (name, view) in [("filtered", &result.filtered), ("posterior", &result.posterior), ("pair_posterior", &result.pair)] {
        if let Some(view) = view {
            reals.push((name, pass.read(view)?));
        }
    }
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.reals("log_likelihood", result.likelihoods(&mut done, summary)?.iter().map(|l| l.value.max(LOG_ZERO)).collect());
    for (name, read) in reals {
        outputs.reals(name, done.f64(read)?);
    }
    Ok(outputs)
}
