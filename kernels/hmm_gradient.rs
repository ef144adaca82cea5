//! Gradients of the log-likelihood of hidden Markov models without a tape, and gradients through their posteriors.
//!
//! The gradient of Σ_b g(b)·log-likelihood(b) is made of posteriors. With f filtered, p predicted, γ posterior and r(t) = γ(t) / p(t),
//! the pair posterior is ξ(t,i,j) = f(t,i)·A(t,i,j)·r(t+1,j): every step's share needs its neighbours only, so nothing is recomputed,
//! no [T,K,K] array exists, and all steps go at once.
//!
//! chain      f and g·r [B,T,2,K]; r(0) stands for γ(0).
//! log_init   g·γ(0).                      log_obs  g·γ, 0 where nothing was observed.
//! log_trans  g·ξ, summed over what shares a table: Σ_b, Σ_t, both or neither.
//! weights    Σ g·(ξ(t,i,j) − A(t,i,j)·Σ_j ξ(t,i,·))·(u(t+1), 1), the softmax's own Jacobian.
//! parameters Σ_t g·γ(t,k)·∂ log b(t,k) / ∂θ, where θ is
//!            GaussianDiagonal: mean [K,D], log variance [K,D];  GaussianFull: mean [K,D], inverse Cholesky factor [K,D(D+1)/2];
//!            StudentT: location, log scale, degrees of freedom [K,D] each;  Poisson: log rate [K,D];
//!            Categorical: log-probability [K,symbols];  Regression: β [K,R], log variance [K].
//!
//! Tangent    γ and ξ are themselves the gradient of the log-likelihood with respect to log_obs and log_trans. The vector-Jacobian
//!            product with upstream gradients (of γ, of ξ) is a Hessian times a vector, and the Hessian is symmetric: it is the derivative
//!            of (γ, ξ) along that direction. Two sweeps over time give it: the slopes of log f forward and of log β backward, each a
//!            mean of its neighbours' under weights that sum to one, centred at every step so that nothing grows with T.
//!            dγ = γ·slope and dξ = ξ·slope then go through the same kernels as γ and ξ.
//!
//! Shapes   B sequences, T steps, K states, D observed numbers, U inputs, P parameters; inputs and models as in kernels/hmm.rs.
//!          grad_log_likelihood [B]; grad_log_obs [B,T,K]; grad_model [B or 1, P] with P = K + the parameters above;
//!          grad_log_trans as the table, or [B or 1,K,K,U+1] as the weights. Directions: log_init [B or 1,K], log_trans
//!          [B or 1, T−1 or 1,K,K], log_obs [B,T,K].
//! Launch   one thread per output and block of 256 steps, then fixed-order sums over blocks and, where the batch shares a model, over
//!          sequences in blocks of 64: the same bits whatever the split. `hmm_tangent`: `lanes` threads per sequence, states over them.
//! Scratch  chain [run,T,2,K], partials [run,⌈T/256⌉,P], tangent [run,T,3,K] (slope of log f, slope handed back, dγ).
//! Floor    12·K bytes read and 12·K written per step by the chain, 4·(2·K + D) read per step and parameter block; exp per pair of states
//!          and step only where transitions vary.
//! Numerics a sequence with an impossible step has zero gradient; steps past a length and missing ones contribute nothing.
//! Source   Baum et al. 1970 (score as expected score); Filardo 1994 (input-driven); Pearlmutter 1994 for Hessian-vector products.
//! Files    shaders/hmm_gradient.wgsl · cuda/hmm_gradient.cu · reference: the `_cpu` functions

use crate::device::{Buffer, Device, Pass, View};
use crate::hmm::{Bound, Emission, ForwardBackward, Hmm, IMPOSSIBLE, Transitions, bounded, capped, flag};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use bytemuck::Zeroable;
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the gradient and tangent kernels.
    pub struct HmmGradientParams {
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
        /// Parameters of a model; in `hmm_gradient_steps` the sequences that have a gradient of their own.
        p: u32,
        /// Blocks of steps.
        blocks: u32,
        /// Threads per sequence of `hmm_tangent`.
        lanes: u32,
        /// [`Emission::code`].
        emission: u32,
        /// Symbols of a categorical emission.
        symbols: u32,
        /// Bits of `flag`, then UPSTREAM, TANGENT and MOVES_….
        flags: u32,
        /// First step of this launch of `hmm_tangent`.
        begin: u32,
        /// One past its last step.
        end: u32,
        /// Reals between the models of two sequences; 0: shared.
        model_stride: u32,
        /// Reals between the tables or weights of two sequences; 0: shared.
        trans_stride: u32,
        /// Reals between the tables of two steps; 0: constant.
        trans_step: u32,
        /// Reals between the start gradients of two sequences …
        start_stride: u32,
        /// … and where the first lies.
        start_offset: u32,
        /// Reals between the directions of log_init of two sequences.
        init_stride: u32,
        /// Reals between the directions of log_trans of two sequences …
        direction_stride: u32,
        /// … and of two steps.
        direction_step: u32,
    }
}

params! {
    /// Params of `hmm_gradient_reduce`.
    pub struct HmmReduceParams {
        /// Rows to sum.
        rows: u32,
        /// Columns.
        p: u32,
        /// Rows of one sum.
        block: u32,
    }
}

const UPSTREAM: u32 = 1 << 16;
const TANGENT: u32 = 1 << 17;
const MOVES_INIT: u32 = 1 << 18;
const MOVES_TRANS: u32 = 1 << 19;
const MOVES_OBS: u32 = 1 << 20;

const WG: u32 = 64;
/// Steps of one partial sum.
const BLOCK: u64 = 256;
/// Sequences of one sum over the batch.
const SEQUENCES: u64 = 64;
/// Floats of a tile of `hmm_gradient_softmax`.
const STATES: u64 = 1024;
/// Sequences that one thread may add.
const LONGEST: usize = 1 << 14;
/// γ / p is cut off here.
const LARGEST: f64 = 1e36;

fn params(words: &[u32]) -> HmmGradientParams {
    params_of(words).unwrap_or(HmmGradientParams::zeroed())
}

fn states_of(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.b) * u64::from(p.t) * u64::from(p.k)
}

fn sums_of(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.b) * u64::from(p.blocks) * u64::from(p.p)
}

fn pairs_of(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.b) * u64::from(p.t.saturating_sub(1)) * u64::from(p.k) * u64::from(p.k)
}

fn threads(n: u64) -> u64 {
    n.div_ceil(u64::from(WG))
}

/// Filtered probabilities and ratios of smoothed to predicted ones, scaled by the upstream gradient; and grad_log_obs.
pub static HMM_GRADIENT_CHAIN: Kernel = Kernel {
    name: "hmm_gradient_chain",
    about: "gradient of the log-likelihood with respect to log-observations, and what the sums need",
    args: &[
        reads("filtered"),
        reads("predicted"),
        reads("posterior"),
        reads("grad_log_likelihood"),
        reads_u32("words"),
        writes("grad_log_obs"),
        writes("chain"),
    ],
    params: layout::<HmmGradientParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| threads(states_of(words)),
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_gradient_chain_cpu::<f32>, f64: hmm_gradient_chain_cpu::<f64> }),
    cost: Cost { unit: "state-step", units: states_of, bytes: 24.0, flops: 4.0 },
};

/// Gradient of initial probabilities and emission parameters, per block of steps.
pub static HMM_GRADIENT_EMISSION: Kernel = Kernel {
    name: "hmm_gradient_emission",
    about: "gradient with respect to initial probabilities and emission parameters, per block of steps",
    args: &[reads("start"), reads("grad_log_obs"), reads("obs"), reads("model"), writes("partials")],
    params: layout::<HmmGradientParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| threads(sums_of(words)),
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_gradient_emission_cpu::<f32>, f64: hmm_gradient_emission_cpu::<f64> }),
    cost: Cost { unit: "parameter-step", units: |words| sums_of(words) * BLOCK, bytes: 4.0, flops: 6.0 },
};

/// Gradient of constant transition tables, per block of steps.
pub static HMM_GRADIENT_TABLE: Kernel = Kernel {
    name: "hmm_gradient_table",
    about: "gradient with respect to a constant transition table, per block of steps",
    args: &[reads("chain"), reads("transitions"), reads("tangent"), reads("direction"), writes("partials")],
    params: layout::<HmmGradientParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| {
        let p = params(words);
        threads(u64::from(p.b) * u64::from(p.blocks) * u64::from(p.k) * u64::from(p.k))
    },
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_gradient_table_cpu::<f32>, f64: hmm_gradient_table_cpu::<f64> }),
    cost: Cost { unit: "pair-step", units: pairs_of, bytes: 4.0, flops: 3.0 },
};

/// Gradient of transition tables that change with time.
pub static HMM_GRADIENT_STEPS: Kernel = Kernel {
    name: "hmm_gradient_steps",
    about: "gradient with respect to a transition table for every step",
    args: &[reads("chain"), reads("transitions"), reads("tangent"), reads("direction"), writes("grad_log_trans")],
    params: layout::<HmmGradientParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| {
        let p = params(words);
        threads(u64::from(p.p) * u64::from(p.t.saturating_sub(1)) * u64::from(p.k) * u64::from(p.k))
    },
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_gradient_steps_cpu::<f32>, f64: hmm_gradient_steps_cpu::<f64> }),
    cost: Cost { unit: "pair-step", units: pairs_of, bytes: 8.0, flops: 8.0 },
};

/// Gradient of softmax transition weights, per block of steps.
pub static HMM_GRADIENT_SOFTMAX: Kernel = Kernel {
    name: "hmm_gradient_softmax",
    about: "gradient with respect to the weights of input-driven transitions, per block of steps",
    args: &[reads("chain"), reads("transitions"), reads("tangent"), reads("direction"), reads("inputs"), writes("partials")],
    params: layout::<HmmGradientParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| {
        let p = params(words);
        u64::from(p.b) * u64::from(p.blocks) * u64::from(p.k)
    },
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_gradient_softmax_cpu::<f32>, f64: hmm_gradient_softmax_cpu::<f64> }),
    cost: Cost { unit: "pair-step", units: pairs_of, bytes: 4.0, flops: 20.0 },
};

/// Sums of blocks of rows, in order.
pub static HMM_GRADIENT_REDUCE: Kernel = Kernel {
    name: "hmm_gradient_reduce",
    about: "sums over blocks of rows in a fixed order",
    args: &[reads("partials"), writes("sums")],
    params: layout::<HmmReduceParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| params_of::<HmmReduceParams>(words).map_or(0, |p| threads(u64::from(p.rows).div_ceil(u64::from(p.block).max(1)) * u64::from(p.p))),
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_gradient_reduce_cpu::<f32>, f64: hmm_gradient_reduce_cpu::<f64> }),
    cost: Cost { unit: "value", units: |words| params_of::<HmmReduceParams>(words).map_or(0, |p| u64::from(p.rows) * u64::from(p.p)), bytes: 4.0, flops: 1.0 },
};

/// Slopes of posteriors along a direction: one sweep forward, one backward.
pub static HMM_TANGENT: Kernel = Kernel {
    name: "hmm_tangent",
    about: "derivative of posterior and pair posterior along a direction",
    args: &[
        reads("chain"),
        reads("transitions"),
        reads("inputs"),
        reads_u32("words"),
        reads("direction_init"),
        reads("direction_trans"),
        reads("direction_obs"),
        writes("tangent"),
    ],
    params: layout::<HmmGradientParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| {
        let p = params(words);
        u64::from(p.b).div_ceil(u64::from(WG / p.lanes.clamp(1, WG)))
    },
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_tangent_cpu::<f32>, f64: hmm_tangent_cpu::<f64> }),
    cost: Cost { unit: "pair-step", units: pairs_of, bytes: 8.0, flops: 24.0 },
};

/// Slopes of the posterior, and the part of it that belongs to observed steps.
pub static HMM_TANGENT_POSTERIOR: Kernel = Kernel {
    name: "hmm_tangent_posterior",
    about: "derivative of the posterior along a direction, apart from what it is made of",
    args: &[reads("tangent"), reads_u32("words"), writes("tangent_posterior"), writes("grad_log_obs")],
    params: layout::<HmmGradientParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| threads(states_of(words)),
    wgsl: wgsl!("hmm_gradient"),
    cuda: cuda!("hmm_gradient"),
    cpu: Some(Cpu { f32: hmm_tangent_posterior_cpu::<f32>, f64: hmm_tangent_posterior_cpu::<f64> }),
    cost: Cost { unit: "state-step", units: states_of, bytes: 12.0, flops: 1.0 },
};

// ---- CPU ------------------------------------------------------------------------------------------------------------------

impl HmmGradientParams {
    fn has(&self, bits: u32) -> bool {
        self.flags & bits != 0
    }

    fn length(&self, words: &[u32], b: usize) -> usize {
        let each = if self.has(flag::MASKED) { 1 + self.t as usize } else { 1 };
        if self.has(flag::LENGTHS) { words[b * each].min(self.t) as usize } else { self.t as usize }
    }

    fn observed(&self, words: &[u32], b: usize, t: usize) -> bool {
        !self.has(flag::MASKED) || words[b * (1 + self.t as usize) + 1 + t] != 0
    }

    fn steps(&self, block: usize, end: usize) -> Range<usize> {
        let begin = block * BLOCK as usize;
        begin..(begin + BLOCK as usize).min(end).max(begin)
    }
}

fn hmm_gradient_chain_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmGradientParams = launch.params()?;
    let (filtered, predicted, posterior, upstream) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?);
    let (words, grad_log_obs, chain) = (launch.word()?, launch.real_mut()?, launch.real_mut()?);
    let (t_max, k) = (p.t as usize, p.k as usize);
    let rows = grad_log_obs.par_chunks_exact_mut(k).zip(chain.par_chunks_exact_mut(2 * k)).take(p.b as usize * t_max).enumerate();
    rows.for_each(|(row, (grad, chain))| {
        let (b, t) = (row / t_max, row % t_max);
        let g = if p.has(UPSTREAM) { upstream[b] } else { R::ONE };
        for j in 0..k {
            let (share, pred) = (posterior[row * k + j], predicted[row * k + j]);
            let ratio = match t {
                0 => share,
                _ if pred > R::ZERO && share > R::ZERO => (share / pred).min(R::of(LARGEST)),
                _ => R::ZERO,
            };
            chain[j] = filtered[row * k + j];
            chain[k + j] = g * ratio;
            grad[j] = if p.observed(words, b, t) { share * g } else { R::ZERO };
        }
    });
    Ok(())
}

/// A parameter of one state: its block (location, scale, …), its state, and its place within both.
#[derive(Clone, Copy)]
struct Parameter {
    kind: usize,
    k: usize,
    i: usize,
    j: usize,
}

fn parameter_of(p: &HmmGradientParams, at: usize) -> Parameter {
    let (k, d, symbols) = (p.k as usize, p.d as usize, p.symbols as usize);
    let kd = k * d;
    match p.emission {
        5 => Parameter { kind: 0, k: at / symbols, i: at % symbols, j: 0 },
        6 if at < k * (d - 1) => Parameter { kind: 0, k: at / (d - 1), i: at % (d - 1), j: 0 },
        6 => Parameter { kind: 1, k: at - k * (d - 1), i: 0, j: 0 },
        2 if at >= kd => {
            let size = d * (d + 1) / 2;
            let (mut row, mut rest) = (0, (at - kd) % size);
            while rest > row {
                row += 1;
                rest -= row;
            }
            Parameter { kind: 1, k: (at - kd) / size, i: row, j: rest }
        }
        _ => Parameter { kind: at / kd, k: (at % kd) / d, i: at % d, j: 0 },
    }
}

/// ψ(x + ½) − ψ(x) − 1/2x by recurrence and the asymptotic series.
fn digamma_step<R: Real>(x: R) -> R {
    // Both columns of f64 and f32 share the series; 24 steps make it exact in f64.
    let steps = if R::DIGITS > 24 { 24.0 } else { 8.0 };
    let (mut y, mut sum, half) = (x, R::ZERO, R::of(0.5));
    if x < R::of(steps) {
        for _ in 0..steps as usize {
            sum += half / (y * (y + half));
            y += R::ONE;
        }
        sum -= R::of(0.5 * steps) / (x * y);
    }
    let inverse = R::ONE / (y * y);
    let series = [0.125, -0.015_625, 0.007_812_5, -17.0 / 2048.0, 31.0 / 2048.0];
    sum + series.iter().rev().fold(R::ZERO, |tail, &c| inverse * (R::of(c) + tail))
}

/// Row of the inverse Cholesky factor, times x − mean.
fn whitened<R: Real>(factor: &[R], mean: &[R], x: &[R], row: usize) -> R {
    bounded((0..=row).fold(R::ZERO, |sum, c| sum + factor[row * (row + 1) / 2 + c] * capped(x[c] - mean[c])))
}

/// Derivative of log b_k(x) with respect to one parameter of the sequence's model.
fn score<R: Real>(p: &HmmGradientParams, q: Parameter, model: &[R], x: &[R]) -> R {
    let (k, d) = (p.k as usize, p.d as usize);
    let (kd, half) = (k * d, R::of(0.5));
    let own = k + q.k * d + q.i;
    match p.emission {
        1 => {
            let z = bounded(capped(x[q.i] - model[own]) * model[own + kd]);
            if q.kind == 0 { z * model[own + kd] } else { half * (z * z - R::ONE) }
        }
        2 => {
            let (mean, factor) = (&model[k + q.k * d..], &model[k + kd + q.k * (d * (d + 1) / 2)..]);
            if q.kind == 1 {
                let diagonal = if q.i == q.j { R::ONE / factor[q.i * (q.i + 3) / 2] } else { R::ZERO };
                return diagonal - whitened(factor, mean, x, q.i) * capped(x[q.j] - mean[q.j]);
            }
            (q.i..d).fold(R::ZERO, |sum, row| sum + factor[row * (row + 1) / 2 + q.i] * whitened(factor, mean, x, row))
        }
        3 => {
            let (scale, inverse) = (model[own + kd], model[own + 3 * kd]);
            let z = bounded(capped(x[q.i] - model[own]) * scale);
            let tail = z * z * inverse;
            let w = (model[own + 2 * kd] + model[own + 2 * kd]) / (R::ONE + tail);
            match q.kind {
                0 => w * inverse * z * scale,
                1 => w * tail - R::ONE,
                _ => half * (digamma_step(half / inverse) - tail.ln_1p() + w * tail * inverse),
            }
        }
        4 => capped(x[q.i]) - model[own].exp(),
        5 => R::of(f64::from(x[0].f64() as usize == q.i)),
        _ => {
            let width = d - 1;
            let beta = &model[k + q.k * width..];
            let residual = (0..width).fold(capped(x[0]), |rest, r| rest - beta[r] * capped(x[1 + r]));
            let inverse = model[k + k * width + q.k];
            let z = bounded(residual * inverse);
            if q.kind == 0 { z * inverse * capped(x[1 + q.i]) } else { half * (z * z - R::ONE) }
        }
    }
}

fn hmm_gradient_emission_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmGradientParams = launch.params()?;
    let (start, grad_log_obs, obs, model) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?);
    let partials = launch.real_mut()?;
    let (t, k, d, blocks, width) = (p.t as usize, p.k as usize, p.d as usize, p.blocks as usize, p.p as usize);
    let rows = partials.par_chunks_exact_mut(width).take(p.b as usize * blocks).enumerate();
    rows.for_each(|(row, out)| {
        let (b, block) = (row / blocks, row % blocks);
        let model = &model[b * p.model_stride as usize..];
        for (at, sum) in out.iter_mut().enumerate() {
            *sum = R::ZERO;
            if at < k {
                if block == 0 {
                    *sum = start[b * p.start_stride as usize + p.start_offset as usize + at];
                }
                continue;
            }
            let q = parameter_of(&p, at - k);
            for step in p.steps(block, t) {
                let at = b * t + step;
                let weight = grad_log_obs[at * k + q.k];
                if weight != R::ZERO {
                    *sum += weight * score(&p, q, model, &obs[at * d..(at + 1) * d]);
                }
            }
        }
    });
    Ok(())
}

/// What the pair posterior of a step is made of.
#[derive(Clone, Copy)]
struct Pairs<'a, R> {
    p: HmmGradientParams,
    chain: &'a [R],
    transitions: &'a [R],
    tangent: &'a [R],
    direction: &'a [R],
}

impl<'a, R: Real> Pairs<'a, R> {
    fn of(launch: &mut CpuLaunch<'a, R>) -> Result<Pairs<'a, R>> {
        let p = launch.params()?;
        Ok(Pairs { p, chain: launch.real()?, transitions: launch.real()?, tangent: launch.real()?, direction: launch.real()? })
    }

    /// Posterior of the pair without its transition probability; in a tangent pass times the slope of its logarithm.
    fn at(&self, b: usize, t: usize, i: usize, j: usize) -> R {
        let (k, row) = (self.p.k as usize, b * self.p.t as usize + t);
        let x = self.chain[2 * row * k + i] * self.chain[(2 * row + 3) * k + j];
        if !self.p.has(TANGENT) {
            return x;
        }
        let mut slope = self.tangent[3 * row * k + i] + self.tangent[(3 * row + 4) * k + j];
        if self.p.has(MOVES_TRANS) {
            slope += self.direction[b * self.p.direction_stride as usize + t * self.p.direction_step as usize + i * k + j];
        }
        x * slope
    }
}

/// A transition probability from its logarithm.
fn probability<R: Real>(log: R) -> R {
    if log <= R::of(IMPOSSIBLE) { R::ZERO } else { log.exp() }
}

fn hmm_gradient_table_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let pairs = Pairs::of(&mut launch)?;
    let partials = launch.real_mut()?;
    let p = pairs.p;
    let (k, blocks) = (p.k as usize, p.blocks as usize);
    let rows = partials.par_chunks_exact_mut(k * k).take(p.b as usize * blocks).enumerate();
    rows.for_each(|(row, out)| {
        let (b, block) = (row / blocks, row % blocks);
        for (at, sum) in out.iter_mut().enumerate() {
            let a = probability(pairs.transitions[b * p.trans_stride as usize + at]);
            *sum = p.steps(block, p.t as usize - 1).map(|t| a * pairs.at(b, t, at / k, at % k)).sum();
        }
    });
    Ok(())
}

fn hmm_gradient_steps_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let pairs = Pairs::of(&mut launch)?;
    let grad_log_trans = launch.real_mut()?;
    let p = pairs.p;
    let (k, slots) = (p.k as usize, p.t as usize - 1);
    let rows = grad_log_trans.par_chunks_exact_mut(k * k).take(p.p as usize * slots).enumerate();
    rows.for_each(|(row, out)| {
        let (first, t) = (row / slots, row % slots);
        let last = if p.p > 1 { first + 1 } else { p.b as usize };
        for (at, sum) in out.iter_mut().enumerate() {
            for b in first..last {
                let log = pairs.transitions[b * p.trans_stride as usize + t * p.trans_step as usize + at];
                *sum += probability(log) * pairs.at(b, t, at / k, at % k);
            }
        }
    });
    Ok(())
}

/// Probabilities of row i of slot t from softmax weights.
fn softmax_row<R: Real>(p: &HmmGradientParams, weights: &[R], inputs: &[R], b: usize, t: usize, i: usize, out: &mut [R]) {
    let (k, u) = (p.k as usize, p.u as usize);
    let x = &inputs[(b * p.t as usize + t + 1) * u..][..u];
    let rows = weights[b * p.trans_stride as usize + i * k * (u + 1)..].chunks_exact(u + 1);
    let mut top = R::of(2.0 * IMPOSSIBLE);
    for (logit, w) in out.iter_mut().zip(rows) {
        *logit = w[..u].iter().zip(x).fold(w[u], |sum, (&w, &x)| sum + w * capped(x));
        top = top.max(*logit);
    }
    if top <= R::of(IMPOSSIBLE) {
        return out.fill(R::ZERO);
    }
    out.iter_mut().for_each(|x| *x = (*x - top).exp());
    let mass: R = out.iter().copied().sum();
    out.iter_mut().for_each(|x| *x = *x / mass);
}

fn hmm_gradient_softmax_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let pairs = Pairs::of(&mut launch)?;
    let (inputs, partials) = (launch.real()?, launch.real_mut()?);
    let p = pairs.p;
    let (k, u, blocks) = (p.k as usize, p.u as usize, p.blocks as usize);
    let rows = partials.par_chunks_exact_mut(k * (u + 1)).take(p.b as usize * blocks * k).enumerate();
    rows.for_each(|(row, out)| {
        let (i, block, b) = (row % k, row / k % blocks, row / k / blocks);
        let mut a = vec![R::ZERO; k];
        out.fill(R::ZERO);
        for t in p.steps(block, p.t as usize - 1) {
            softmax_row(&p, pairs.transitions, inputs, b, t, i, &mut a);
            let total = (0..k).fold(R::ZERO, |sum, j| sum + a[j] * pairs.at(b, t, i, j));
            let x = &inputs[(b * p.t as usize + t + 1) * u..][..u];
            for j in 0..k {
                let residual = a[j] * (pairs.at(b, t, i, j) - total);
                let own = &mut out[j * (u + 1)..(j + 1) * (u + 1)];
                own.iter_mut().zip(x).for_each(|(sum, &x)| *sum += residual * capped(x));
                own[u] += residual;
            }
        }
    });
    Ok(())
}

fn hmm_gradient_reduce_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmReduceParams = launch.params()?;
    let (partials, sums) = (launch.real()?, launch.real_mut()?);
    let (rows, width, block) = (p.rows as usize, p.p as usize, p.block as usize);
    sums.par_chunks_exact_mut(width).take(rows.div_ceil(block)).enumerate().for_each(|(at, out)| {
        out.fill(R::ZERO);
        for row in partials[at * block * width..((at + 1) * block).min(rows) * width].chunks_exact(width) {
            out.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x);
        }
    });
    Ok(())
}

/// What the tangent of one sequence reads.
struct Moves<'a, R> {
    p: HmmGradientParams,
    chain: &'a [R],
    transitions: &'a [R],
    inputs: &'a [R],
    words: &'a [u32],
    init: &'a [R],
    trans: &'a [R],
    obs: &'a [R],
}

impl<R: Real> Moves<'_, R> {
    fn trans(&self, b: usize, t: usize, at: usize) -> R {
        let p = &self.p;
        if p.has(MOVES_TRANS) { self.trans[b * p.direction_stride as usize + t * p.direction_step as usize + at] } else { R::ZERO }
    }

    fn obs(&self, b: usize, t: usize, j: usize) -> R {
        let (p, k) = (&self.p, self.p.k as usize);
        if p.has(MOVES_OBS) && p.observed(self.words, b, t) { self.obs[(b * p.t as usize + t) * k + j] } else { R::ZERO }
    }

    /// Transition probabilities of slot t.
    fn probabilities(&self, b: usize, t: usize, out: &mut [R]) {
        let (p, k) = (&self.p, self.p.k as usize);
        if p.has(flag::SOFTMAX) {
            out.chunks_exact_mut(k).enumerate().for_each(|(i, row)| softmax_row(p, self.transitions, self.inputs, b, t, i, row));
        } else {
            let at = b * p.trans_stride as usize + t * p.trans_step as usize;
            out.iter_mut().zip(&self.transitions[at..]).for_each(|(a, &log)| *a = probability(log));
        }
    }

    fn sweep(&self, b: usize, out: &mut [R]) {
        let (p, k) = (&self.p, self.p.k as usize);
        let length = p.length(self.words, b);
        let chain = |t: usize, part: usize, j: usize| self.chain[(2 * (b * p.t as usize + t) + part) * k + j];
        let mean = |mass: R, sum: R| if mass > R::ZERO { sum / mass } else { R::ZERO };
        let (mut a, mut now, mut other) = (vec![R::ZERO; k * k], vec![R::ZERO; k], vec![R::ZERO; k]);
        // Slopes of the filtered logarithms, centred at every step.
        for t in 0..length {
            if t > 0 {
                self.probabilities(b, t - 1, &mut a);
            }
            for j in 0..k {
                let slope = if t == 0 {
                    if p.has(MOVES_INIT) { self.init[b * p.init_stride as usize + j] } else { R::ZERO }
                } else {
                    let (mut mass, mut sum) = (R::ZERO, R::ZERO);
                    for i in 0..k {
                        let share = chain(t - 1, 0, i) * a[i * k + j];
                        mass += share;
                        sum += share * (other[i] + self.trans(b, t - 1, i * k + j));
                    }
                    mean(mass, sum)
                };
                now[j] = slope + self.obs(b, t, j);
            }
            let centre = (0..k).fold(R::ZERO, |sum, j| sum + chain(t, 0, j) * now[j]);
            for j in 0..k {
                other[j] = now[j] - centre;
                out[3 * t * k + j] = other[j];
            }
        }
        // Slopes of the smoothed logarithms; `other` holds what step t + 1 hands back.
        for t in (0..length).rev() {
            if t + 1 < length {
                self.probabilities(b, t, &mut a);
            }
            for i in 0..k {
                let (mut mass, mut slope) = (R::ONE, R::ZERO);
                if t + 1 < length {
                    let mut sum = R::ZERO;
                    mass = R::ZERO;
                    for j in 0..k {
                        let share = a[i * k + j] * chain(t + 1, 1, j);
                        mass += share;
                        sum += share * (self.trans(b, t, i * k + j) + other[j]);
                    }
                    slope = mean(mass, sum);
                }
                let share = chain(t, 0, i) * mass;
                now[i] = share * (out[3 * t * k + i] + slope);
                out[(3 * t + 1) * k + i] = slope;
                out[(3 * t + 2) * k + i] = share;
            }
            let centre: R = now.iter().copied().sum();
            for i in 0..k {
                if t + 1 < length {
                    out[(3 * t + 4) * k + i] = other[i] - centre;
                }
                let slope = out[(3 * t + 1) * k + i] - centre;
                let total = out[3 * t * k + i] + slope;
                out[(3 * t + 2) * k + i] *= total;
                other[i] = self.obs(b, t, i) + slope;
            }
        }
    }
}

fn hmm_tangent_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmGradientParams = launch.params()?;
    let (chain, transitions, inputs, words) = (launch.real()?, launch.real()?, launch.real()?, launch.word()?);
    let moves = Moves { p, chain, transitions, inputs, words, init: launch.real()?, trans: launch.real()?, obs: launch.real()? };
    let sequences = launch.real_mut()?.par_chunks_exact_mut(3 * p.t as usize * p.k as usize).take(p.b as usize).enumerate();
    sequences.for_each(|(b, out)| moves.sweep(b, out));
    Ok(())
}

fn hmm_tangent_posterior_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmGradientParams = launch.params()?;
    let (tangent, words, posterior, grad_log_obs) = (launch.real()?, launch.word()?, launch.real_mut()?, launch.real_mut()?);
    let (t_max, k) = (p.t as usize, p.k as usize);
    let rows = posterior.par_chunks_exact_mut(k).zip(grad_log_obs.par_chunks_exact_mut(k)).take(p.b as usize * t_max).enumerate();
    rows.for_each(|(row, (slope, grad))| {
        let (b, t) = (row / t_max, row % t_max);
        for j in 0..k {
            slope[j] = if t < p.length(words, b) { tangent[(3 * row + 2) * k + j] } else { R::ZERO };
            grad[j] = if p.observed(words, b, t) { slope[j] } else { R::ZERO };
        }
    });
    Ok(())
}

// ---- ops ------------------------------------------------------------------------------------------------------------------

/// The probabilities of forward-backward that gradients are made of, [B,T,K] each.
#[derive(Debug, Clone)]
pub struct Probabilities {
    /// p(state | observations up to the step).
    pub filtered: View,
    /// p(state | observations before the step).
    pub predicted: View,
    /// p(state | all observations).
    pub posterior: View,
}

/// Gradients with respect to everything that an [`Hmm`] is made of.
#[derive(Debug, Clone)]
pub struct HmmGradient {
    /// With respect to log_obs [B,T,K]: of fused emissions too, as if they had been given as log-probabilities.
    pub log_obs: Buffer,
    /// With respect to log_init [K] and the emission's parameters, [B or 1, width].
    pub model: Buffer,
    /// Reals of one row of `model`.
    pub width: u64,
    /// With respect to log_trans, or to the softmax weights; the shape is theirs.
    pub transitions: Buffer,
}

/// A change of log_trans [B or 1, T−1 or 1, K, K].
#[derive(Debug, Clone)]
pub struct TransDirection {
    /// The change.
    pub values: View,
    /// One for each sequence.
    pub per_sequence: bool,
    /// One for each step.
    pub per_step: bool,
}

/// A direction in the space of logarithms, or the upstream gradients of posterior (`log_obs`) and pair posterior (`log_trans`).
#[derive(Debug, Clone, Default)]
pub struct Direction {
    /// Change of log_init [B or 1,K].
    pub log_init: Option<View>,
    /// Change of log_trans.
    pub log_trans: Option<TransDirection>,
    /// Change of log_obs [B,T,K].
    pub log_obs: Option<View>,
}

/// Derivatives of the posteriors along a direction.
#[derive(Debug, Clone)]
pub struct HmmTangent {
    /// Derivative of the posterior [B,T,K].
    pub posterior: Buffer,
    /// The vector-Jacobian product: gradient of Σ direction·(posterior, pair posterior) with respect to what the model is made of.
    /// `transitions` holds the derivative of the pair posterior where transitions are a table.
    pub gradient: HmmGradient,
}

impl Probabilities {
    /// Those of a forward-backward pass that was asked for all three.
    /// # Errors
    /// `Parameter` naming the one that is missing.
    pub fn of(result: &ForwardBackward) -> Result<Probabilities> {
        let view = |name: &str, view: &Option<View>| {
            let help = "ask forward-backward for filtered, predicted and posterior probabilities".into();
            view.clone().ok_or_else(|| Error::Parameter { op: "hmm_gradient", name: name.into(), value: "absent".into(), help })
        };
        Ok(Probabilities {
            filtered: view("filtered", &result.filtered)?,
            predicted: view("predicted", &result.predicted)?,
            posterior: view("posterior", &result.posterior)?,
        })
    }
}

impl Emission {
    /// Parameters of K states with a gradient each.
    pub fn gradients(self, k: u64, d: u64) -> u64 {
        match self {
            Emission::LogProbabilities => 0,
            Emission::GaussianDiagonal => 2 * k * d,
            Emission::GaussianFull => k * d + k * d * (d + 1) / 2,
            Emission::StudentT => 3 * k * d,
            Emission::Poisson => k * d,
            Emission::Categorical { symbols } => k * u64::from(symbols),
            Emission::Regression => k * d.saturating_sub(1) + k,
        }
    }
}

/// Sizes that follow from an [`Hmm`].
struct Plan {
    blocks: u64,
    width: u64,
    trans_width: u64,
    per_step: bool,
    trans_per_sequence: bool,
    runs: Vec<Range<u64>>,
    most: u64,
}

impl Plan {
    fn of(device: &Device, op: &'static str, hmm: &Hmm, tangent: bool) -> Result<Plan> {
        hmm.check(op)?;
        let (t, k) = (hmm.t, hmm.k);
        let (blocks, width) = (t.div_ceil(BLOCK), k + hmm.emission.gradients(k, hmm.d));
        let (trans_width, per_step, trans_per_sequence) = match hmm.transitions {
            Transitions::Table { per_step, per_sequence, .. } => (k * k, per_step && t > 1, per_sequence),
            Transitions::Softmax { u, per_sequence, .. } => (k * k * (u + 1), false, per_sequence),
        };
        let table = if per_step && trans_per_sequence { (t - 1) * k * k } else { 1 };
        let partials = blocks * width.max(trans_width);
        let elements = hmm.elements().max(if tangent { 3 } else { 2 } * t * k).max(partials).max(table);
        let groups = threads(t * k).max(threads(blocks * width)).max(blocks * k).max(threads(table)) + 1;
        let work = 20 * t * (width + trans_width + if tangent { 2 * k * k } else { 0 });
        device.check_rounds(op, rounds(hmm, blocks), "rounds")?;
        let mut runs = device.plan(op, hmm.b, elements, groups, work)?;
        if per_step && !trans_per_sequence {
            // One thread adds the sequences of a run.
            runs = runs.into_iter().flat_map(|r| (r.start..r.end).step_by(LONGEST).map(move |at| at..(at + LONGEST as u64).min(r.end))).collect();
        }
        let most = runs.iter().map(|r| r.end - r.start).max().unwrap_or(0);
        Ok(Plan { blocks, width, trans_width, per_step, trans_per_sequence, runs, most })
    }

    fn params(&self, hmm: &Hmm, bound: &Bound) -> HmmGradientParams {
        let k2 = hmm.k * hmm.k;
        let has = |bit: u32, stride: u64| if bound.params.flags & bit != 0 { stride as u32 } else { 0 };
        let shape = bound.params;
        let (trans_stride, trans_step) = match hmm.transitions {
            Transitions::Table { per_step, .. } => (if per_step { (hmm.t - 1).max(1) * k2 } else { k2 }, if per_step { k2 } else { 0 }),
            Transitions::Softmax { u, .. } => (k2 * (u + 1), 0),
        };
        HmmGradientParams {
            b: shape.b,
            t: shape.t,
            k: shape.k,
            d: shape.d,
            u: shape.u,
            p: self.width as u32,
            blocks: self.blocks as u32,
            lanes: shape.k.min(WG).next_power_of_two(),
            emission: shape.emission,
            symbols: shape.symbols,
            flags: shape.flags & (flag::SOFTMAX | flag::LENGTHS | flag::MASKED),
            model_stride: has(flag::MODELS, hmm.stride()),
            trans_stride: has(flag::TRANS_SEQUENCE, trans_stride),
            trans_step: trans_step as u32,
            ..HmmGradientParams::zeroed()
        }
    }
}

/// Loop rounds of one thread of the gradient kernels, at most; a loop of n takes n + 1.
fn rounds(hmm: &Hmm, blocks: u64) -> u64 {
    let (k, d, group) = (hmm.k, hmm.d, u64::from(WG));
    let score = match hmm.emission {
        Emission::GaussianFull => (d + 1) + (d + 1) * (d + 2) / 2,
        Emission::StudentT => 9,
        _ => d + 1,
    };
    let softmax = match hmm.transitions {
        Transitions::Table { .. } => 0,
        Transitions::Softmax { u, .. } => {
            let tile = (STATES / k).clamp(1, group);
            let (logits, outer) = (((tile * k).div_ceil(group) + 1) * (u + 2), ((k * (u + 1)).div_ceil(group) + 1) * (tile + 2));
            BLOCK.div_ceil(tile) * (1 + logits + 4 * (k + 1) + outer)
        }
    };
    (d + 2 + BLOCK * (1 + score)).max(softmax).max(blocks + 1).max(LONGEST as u64 + 1)
}

/// Where a gradient is gathered: partial sums of a run, rows [B,P], and their sum where the batch shares it.
struct Gather {
    partials: Buffer,
    rows: Buffer,
    width: u64,
    shared: bool,
}

impl Gather {
    fn new(device: &Device, plan: &Plan, b: u64, width: u64, shared: bool) -> Result<Gather> {
        let partials = device.zeros("partial gradients", plan.most * plan.blocks * width)?;
        Ok(Gather { partials, rows: device.zeros("gradients", b * width)?, width, shared })
    }

    /// The range that a run of sequences writes its blocks to.
    fn view(&self, plan: &Plan, run: &Range<u64>) -> View {
        self.partials.view(0..(run.end - run.start) * plan.blocks * self.width)
    }

    /// Sums the blocks of each sequence of the run.
    fn close(&self, pass: &mut Pass, plan: &Plan, run: &Range<u64>) -> Result<()> {
        let out = pass.output(&self.rows, run.start * self.width..run.end * self.width)?;
        let params = HmmReduceParams { rows: ((run.end - run.start) * plan.blocks) as u32, p: self.width as u32, block: plan.blocks as u32 };
        pass.launch(&HMM_GRADIENT_REDUCE, &params, &[self.view(plan, run), out.view.clone()])?;
        pass.finish(out)
    }

    /// The gradient: a row per sequence, or their sum.
    fn result(self, pass: &mut Pass, b: u64) -> Result<Buffer> {
        let device = pass.device().clone();
        let (mut rows, mut n) = (self.rows, b);
        while self.shared && n > 1 {
            let sums = n.div_ceil(SEQUENCES);
            let next = device.zeros("gradients", sums * self.width)?;
            for run in device.plan("hmm_gradient", sums, SEQUENCES * self.width, threads(self.width) + 1, SEQUENCES * self.width)? {
                let (first, last) = (run.start * SEQUENCES, (run.end * SEQUENCES).min(n));
                let from = pass.input(&rows, first * self.width..last * self.width)?;
                let out = pass.output(&next, run.start * self.width..run.end * self.width)?;
                let params = HmmReduceParams { rows: (last - first) as u32, p: self.width as u32, block: SEQUENCES as u32 };
                pass.launch(&HMM_GRADIENT_REDUCE, &params, &[from, out.view.clone()])?;
                pass.finish(out)?;
            }
            (rows, n) = (next, sums);
        }
        Ok(rows)
    }
}

/// The gradient's outputs while runs fill them.
struct Outputs {
    log_obs: Buffer,
    model: Gather,
    trans: Option<Gather>,
    steps: Option<Buffer>,
}

impl Outputs {
    fn new(device: &Device, plan: &Plan, hmm: &Hmm) -> Result<Outputs> {
        let tables = if plan.trans_per_sequence { hmm.b } else { 1 };
        Ok(Outputs {
            log_obs: device.zeros("grad_log_obs", hmm.b * hmm.t * hmm.k)?,
            model: Gather::new(device, plan, hmm.b, plan.width, !hmm.per_sequence)?,
            trans: if plan.per_step { None } else { Some(Gather::new(device, plan, hmm.b, plan.trans_width, !plan.trans_per_sequence)?) },
            steps: if plan.per_step { Some(device.zeros("grad_log_trans", tables * (hmm.t - 1) * hmm.k * hmm.k)?) } else { None },
        })
    }

    /// Emission parameters and transitions of a run. `start` has the gradient of log_init where the params say, `tangent` and `direction`
    /// are read in a tangent pass only.
    fn gather(&self, pass: &mut Pass, plan: &Plan, hmm: &Hmm, of: &RunViews<'_>) -> Result<()> {
        let RunViews { run, bound, params, chain, start, grad_log_obs, tangent, direction } = of;
        let [model, obs, _, transitions, inputs] = bound.views.clone();
        let partials = self.model.view(plan, run);
        pass.launch(&HMM_GRADIENT_EMISSION, params, &[(*start).clone(), (*grad_log_obs).clone(), obs, model, partials])?;
        self.model.close(pass, plan, run)?;
        let mut args = vec![(*chain).clone(), transitions, (*tangent).clone(), (*direction).clone()];
        if let Some(trans) = &self.trans {
            let softmax = matches!(hmm.transitions, Transitions::Softmax { .. });
            if softmax {
                args.push(inputs);
            }
            args.push(trans.view(plan, run));
            pass.launch(if softmax { &HMM_GRADIENT_SOFTMAX } else { &HMM_GRADIENT_TABLE }, params, &args)?;
            return trans.close(pass, plan, run);
        }
        if let Some(steps) = &self.steps {
            let each = (hmm.t - 1) * hmm.k * hmm.k;
            let n = if plan.trans_per_sequence { run.end - run.start } else { 1 };
            let range = if plan.trans_per_sequence { run.start * each..run.end * each } else { 0..each };
            let out = pass.output(steps, range)?;
            args.push(out.view.clone());
            pass.launch(&HMM_GRADIENT_STEPS, &HmmGradientParams { p: n as u32, ..*params }, &args)?;
            pass.finish(out)?;
        }
        Ok(())
    }

    fn result(self, pass: &mut Pass, plan: &Plan, hmm: &Hmm) -> Result<HmmGradient> {
        let model = self.model.result(pass, hmm.b)?;
        let transitions = match (self.trans, self.steps) {
            (Some(trans), _) => trans.result(pass, hmm.b)?,
            (None, Some(steps)) => steps,
            (None, None) => return Err(Error::Internal("hmm_gradient: no place for transitions".into())),
        };
        Ok(HmmGradient { log_obs: self.log_obs, model, width: plan.width, transitions })
    }
}

/// Views of one run of sequences.
struct RunViews<'a> {
    run: &'a Range<u64>,
    bound: &'a Bound,
    params: HmmGradientParams,
    chain: &'a View,
    start: &'a View,
    grad_log_obs: &'a View,
    tangent: &'a View,
    direction: &'a View,
}

/// Sequences `run` of a view [B, each].
fn part(pass: &mut Pass, view: &View, run: &Range<u64>, each: u64) -> Result<View> {
    pass.input(&view.buffer, view.range.start + run.start * each..view.range.start + run.end * each)
}

fn check_len(op: &'static str, arg: &str, view: &View, shape: &[u64]) -> Result<()> {
    let expected: u64 = shape.iter().product();
    if view.len() == expected {
        return Ok(());
    }
    Err(Error::Shape { op, arg: arg.into(), expected: format!("{shape:?}, {expected} values"), got: format!("{} values", view.len()) })
}

fn check_probabilities(op: &'static str, hmm: &Hmm, probabilities: &Probabilities) -> Result<()> {
    let Probabilities { filtered, predicted, posterior } = probabilities;
    [("filtered", filtered), ("predicted", predicted), ("posterior", posterior)]
        .into_iter()
        .try_for_each(|(name, view)| check_len(op, name, view, &[hmm.b, hmm.t, hmm.k]))
}

/// Records the chain of a run; `upstream` [B] or none for ones.
fn record_chain(
    pass: &mut Pass,
    hmm: &Hmm,
    probabilities: &Probabilities,
    upstream: Option<&View>,
    run: &Range<u64>,
    (bound, params): (&Bound, HmmGradientParams),
    (grad_log_obs, chain): (&View, &View),
) -> Result<()> {
    let each = hmm.t * hmm.k;
    let filtered = part(pass, &probabilities.filtered, run, each)?;
    let predicted = part(pass, &probabilities.predicted, run, each)?;
    let posterior = part(pass, &probabilities.posterior, run, each)?;
    let (upstream, bit) = match upstream {
        Some(view) => (part(pass, view, run, 1)?, UPSTREAM),
        None => (posterior.clone(), 0),
    };
    let params = HmmGradientParams { flags: params.flags | bit, ..params };
    let args = [filtered, predicted, posterior, upstream, bound.views[2].clone(), grad_log_obs.clone(), chain.clone()];
    pass.launch(&HMM_GRADIENT_CHAIN, &params, &args)
}

/// Records the gradient of Σ_b g(b)·log-likelihood(b) from what forward-backward left; `upstream` is g [B], or none for ones.
/// # Errors
/// `Shape` for a view of the wrong length, those of [`Hmm::check`], `TooLarge` where one sequence passes a limit of the device.
pub fn hmm_gradient(pass: &mut Pass, hmm: &Hmm, probabilities: &Probabilities, upstream: Option<&View>) -> Result<HmmGradient> {
    const OP: &str = "hmm_gradient";
    let device = pass.device().clone();
    let plan = Plan::of(&device, OP, hmm, false)?;
    check_probabilities(OP, hmm, probabilities)?;
    if let Some(view) = upstream {
        check_len(OP, "upstream", view, &[hmm.b])?;
    }
    let each = hmm.t * hmm.k;
    let outputs = Outputs::new(&device, &plan, hmm)?;
    let chain = device.zeros("chain", plan.most * 2 * each)?;
    for run in &plan.runs {
        let bound = hmm.bind(pass, run)?;
        let params = plan.params(hmm, &bound);
        let chain = chain.view(0..(run.end - run.start) * 2 * each);
        let grad_log_obs = pass.output(&outputs.log_obs, run.start * each..run.end * each)?;
        record_chain(pass, hmm, probabilities, upstream, run, (&bound, params), (&grad_log_obs.view, &chain))?;
        let params = HmmGradientParams { start_stride: 2 * each as u32, start_offset: hmm.k as u32, ..params };
        let views = RunViews { run, bound: &bound, params, chain: &chain, start: &chain, grad_log_obs: &grad_log_obs.view, tangent: &chain, direction: &chain };
        outputs.gather(pass, &plan, hmm, &views)?;
        pass.finish(grad_log_obs)?;
    }
    outputs.result(pass, &plan, hmm)
}

/// Records the derivative of posterior and pair posterior along `direction`, which is also the gradient through them: give the upstream
/// gradient of the posterior as `log_obs` and that of the pair posterior as `log_trans`.
///
/// At steps without observation the direction's log_obs is not read, and the gradient with respect to log_obs is 0.
/// # Errors
/// As [`hmm_gradient`].
pub fn hmm_tangent(pass: &mut Pass, hmm: &Hmm, probabilities: &Probabilities, direction: &Direction) -> Result<HmmTangent> {
    const OP: &str = "hmm_tangent";
    let device = pass.device().clone();
    let plan = Plan::of(&device, OP, hmm, true)?;
    check_probabilities(OP, hmm, probabilities)?;
    let moves = Bindings::of(OP, hmm, direction)?;
    let each = hmm.t * hmm.k;
    let outputs = Outputs::new(&device, &plan, hmm)?;
    let posterior = device.zeros("posterior tangent", hmm.b * each)?;
    let chain = device.zeros("chain", plan.most * 2 * each)?;
    let tangent = device.zeros("tangent", plan.most * 3 * each)?;
    for run in &plan.runs {
        let n = run.end - run.start;
        let bound = hmm.bind(pass, run)?;
        let params = moves.params(plan.params(hmm, &bound));
        let (chain, tangent) = (chain.view(0..n * 2 * each), tangent.view(0..n * 3 * each));
        let grad_log_obs = pass.output(&outputs.log_obs, run.start * each..run.end * each)?;
        record_chain(pass, hmm, probabilities, None, run, (&bound, params), (&grad_log_obs.view, &chain))?;
        let [init, trans, obs] = moves.bind(pass, hmm, run, &chain)?;
        let [_, _, words, transitions, inputs] = bound.views.clone();
        let args = [chain.clone(), transitions, inputs, words.clone(), init, trans.clone(), obs, tangent.clone()];
        record_sweeps(pass, hmm, params, &args)?;
        let slopes = pass.output(&posterior, run.start * each..run.end * each)?;
        pass.launch(&HMM_TANGENT_POSTERIOR, &params, &[tangent.clone(), words, slopes.view.clone(), grad_log_obs.view.clone()])?;
        let params = HmmGradientParams { start_stride: each as u32, start_offset: 0, flags: params.flags | TANGENT, ..params };
        let views =
            RunViews { run, bound: &bound, params, chain: &chain, start: &slopes.view, grad_log_obs: &grad_log_obs.view, tangent: &tangent, direction: &trans };
        outputs.gather(pass, &plan, hmm, &views)?;
        pass.finish(grad_log_obs)?;
        pass.finish(slopes)?;
    }
    Ok(HmmTangent { posterior, gradient: outputs.result(pass, &plan, hmm)? })
}

/// Both sweeps in one launch where the loops may be as long as the series; else forward over blocks of time, then backward.
fn record_sweeps(pass: &mut Pass, hmm: &Hmm, params: HmmGradientParams, args: &[View]) -> Result<()> {
    let (t, k) = (hmm.t, hmm.k);
    // A loop of n takes n + 1 rounds; twice over, because a software adapter walks the branches that are not taken too.
    let own = k.div_ceil(u64::from(params.lanes).max(1));
    let driven = if params.has(flag::SOFTMAX) { own + 1 + own * (2 * k + 1) + 3 * own * k * (u64::from(params.u) + 1) } else { 0 };
    let (once, rounds) = (4 * own + 16, 24 + 2 * (2 * (own + 1) + own * (k + 1) + (k + 1) + driven));
    pass.device().check_rounds("hmm_tangent", once + rounds, "rounds per step")?;
    let limit = pass.device().limits().loop_rounds - once;
    let mut launch = |bits: u32, range: Range<u64>| {
        let part = HmmGradientParams { begin: range.start as u32, end: range.end as u32, flags: params.flags | bits, ..params };
        pass.launch(&HMM_TANGENT, &part, args)
    };
    if limit / rounds >= 2 * t {
        return launch(flag::FORWARD | flag::BACKWARD, 0..t);
    }
    let block = limit / rounds;
    let blocks = || (0..t.div_ceil(block)).map(|i| i * block..((i + 1) * block).min(t));
    blocks().try_for_each(|range| launch(flag::FORWARD, range))?;
    blocks().rev().try_for_each(|range| launch(flag::BACKWARD, range))
}

/// A checked direction and the strides that belong to it.
struct Bindings<'a> {
    direction: &'a Direction,
    init_each: u64,
    trans_each: u64,
    trans_step: u64,
}

impl<'a> Bindings<'a> {
    fn of(op: &'static str, hmm: &Hmm, direction: &'a Direction) -> Result<Bindings<'a>> {
        let (b, t, k) = (hmm.b, hmm.t, hmm.k);
        let init_each = match &direction.log_init {
            Some(view) if view.len() == b * k => k,
            Some(view) => {
                check_len(op, "direction of log_init", view, &[1, k])?;
                0
            }
            None => 0,
        };
        let (mut trans_each, mut trans_step) = (0, 0);
        if let Some(TransDirection { values, per_sequence, per_step }) = &direction.log_trans {
            let slots = if *per_step { (t - 1).max(1) } else { 1 };
            check_len(op, "direction of log_trans", values, &[if *per_sequence { b } else { 1 }, slots, k, k])?;
            trans_each = if *per_sequence { slots * k * k } else { 0 };
            trans_step = if *per_step { k * k } else { 0 };
        }
        if let Some(view) = &direction.log_obs {
            check_len(op, "direction of log_obs", view, &[b, t, k])?;
        }
        Ok(Bindings { direction, init_each, trans_each, trans_step })
    }

    fn params(&self, params: HmmGradientParams) -> HmmGradientParams {
        let bit = |present: bool, bit: u32| if present { bit } else { 0 };
        let flags = bit(self.direction.log_init.is_some(), MOVES_INIT)
            | bit(self.direction.log_trans.is_some(), MOVES_TRANS)
            | bit(self.direction.log_obs.is_some(), MOVES_OBS);
        HmmGradientParams {
            flags: params.flags | flags,
            init_stride: self.init_each as u32,
            direction_stride: self.trans_each as u32,
            direction_step: self.trans_step as u32,
            ..params
        }
    }

    /// log_init, log_trans and log_obs of a run; `absent` stands for what is not given.
    fn bind(&self, pass: &mut Pass, hmm: &Hmm, run: &Range<u64>, absent: &View) -> Result<[View; 3]> {
        let bind = |pass: &mut Pass, view: Option<&View>, each: u64| match view {
            None => Ok(absent.clone()),
            Some(view) if each == 0 => pass.input(&view.buffer, view.range.clone()),
            Some(view) => part(pass, view, run, each),
        };
        let init = bind(pass, self.direction.log_init.as_ref(), self.init_each)?;
        let trans = bind(pass, self.direction.log_trans.as_ref().map(|t| &t.values), self.trans_each)?;
        let obs = bind(pass, self.direction.log_obs.as_ref(), hmm.t * hmm.k)?;
        Ok([init, trans, obs])
    }
}
