//! Baum-Welch: expectation-maximisation of hidden Markov models, thousands of models at once, parameters never leaving the device.
//!
//! expectation   γ(t,k), ξ(t,i,j) by the recursions of kernels/hmm.rs; of them only sums are kept, per sequence: γ(0,k), Σ_t ξ(t,i,j) and, for
//!               each state, Σ_t γ(t,k)·f(x_t) with f of the emission: 1; deviations from the present mean and their squares or products;
//!               Student-t with the weight u = (ν+1)/(ν+z²): u, u·dev, u·dev², ln(1+z²/ν); Poisson x; categorical [x = symbol];
//!               regression with e = y − x·β: x·xᵀ, x·e, e².
//! reduce        sums over the sequences of a model, in their order, compensated.
//! maximisation  init ∝ Σ γ(0); trans row i ∝ Σ ξ(i,·); mean += S1/S0; variance = (S2 − S1²/S0)/S0 and what belongs to the other emissions
//!               (regression: β += (Σ γ x·xᵀ)⁻¹ Σ γ x·e by Cholesky; Student-t: ECM with fixed ν). Moments about the present mean do not cancel.
//! Guards        variance ≥ floor (full covariance: every pivot of its factor); a state of weight below 10⁻³ keeps its emission, a row below
//!               10⁻⁶ its transitions; Dirichlet pseudo-counts on init and trans (never on a hard zero), more on the diagonal (sticky), a normal prior
//!               on means; rates ≥ 10⁻⁶. All but the floor are off by default: then every iteration is plain EM.
//! Stops         for each model alone: when log-likelihood gains less than `tolerance` or than its own rounding, when an observation is impossible, or
//!               when it falls by more than rounding although no prior is active. A stopped model is skipped by all later launches.
//!
//! Shapes   N sequences, T steps, K states, D numbers a step, E sums a state; model m = group·R + restart owns the S sequences of its group.
//!          parameters [M,P] natural: init [K], trans [K,K], then by section  diagonal mean, variance [K,D] · full mean [K,D], covariance
//!          [K,D(D+1)/2] row by row · Student-t location, scale, ν, constant [K,D] · Poisson rate [K,D] · categorical [K,symbols] · regression
//!          β [K,D−1], variance [K].   model [M,stride], log_trans [M,K,K] as kernels/hmm.rs packs them.
//!          statistics [M·S, K + K² + K·(1+E) + 3], last the log-likelihood as a sum of two and the first impossible step or −1.
//!          status [iterations+2, M] words; path [iterations+2, M, 2] log-likelihood of the parameters before each maximisation.
//! Launch   `hmm_expectation`: K ≤ 4, a thread per (model, sequence), all state in registers. `hmm_expectation_lanes`: 8 to 64 threads per
//!          (model, sequence), a state each. `hmm_sums`: a thread per sum, unless D = 1 and normal, where the first kernel
//!          sums. `hmm_reduce`: a thread per (model, sum).
//!          `hmm_maximisation`: a thread per (model, state). The CPU column fuses the first three, a sequence per task.
//! Scratch  α, overwritten by γ [T,K] per (model, sequence); K > 4 two more of that size. None on the CPU but α of the running sequences.
//! Floor    8 bytes of observations and 8·K of α per step and iteration.
//! Numerics probabilities scaled by max_k (log b + exponent of the predicted probability): no observation underflows. Sums run in blocks of 64
//!          steps. Seen in f32 after three iterations: parameters within 5e-6 of f64 up to 10 states, 2e-5 for 33.
//! Source   Rabiner 1989; Kim 1994 for the backward pass; Liu & Rubin 1995 for Student-t; hmmlearn's M-step for the meaning of the priors.
//! Files    shaders/hmm_baum_welch.wgsl · cuda/hmm_baum_welch.cu · reference: the `_cpu` functions · lanes: hmm_expectation.rs

use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, DeviceKind, Pass, View};
use crate::hmm::{Emission, HmmParams, LOG_ZERO, MAX_STATES, log_density};
use crate::hmm_expectation;
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

const OP: &str = "hmm_baum_welch";

params! {
    /// Params of the five kernels.
    pub struct BaumWelchParams {
        /// (model, sequence) pairs: M·S.
        jobs: u32,
        /// Models.
        models: u32,
        /// Models that share their sequences: restarts.
        restarts: u32,
        /// Sequences of a model.
        per_model: u32,
        /// Steps of the longest sequence.
        t: u32,
        /// States.
        k: u32,
        /// Observed numbers a step.
        d: u32,
        /// [`Emission::code`].
        emission: u32,
        /// Symbols of a categorical emission.
        symbols: u32,
        /// Whether words hold masks.
        masked: u32,
        /// First step of this launch.
        begin: u32,
        /// One past its last step.
        end: u32,
        /// 1 forward, 2 backward, 3 both.
        phase: u32,
        /// Iteration: the row of status and path.
        iteration: u32,
        /// 0 only pack, 1 maximise, 2 only judge.
        action: u32,
        /// Least gain in log-likelihood that goes on; negative: never stop.
        tolerance: f32,
        /// Rounding of a log-likelihood, relative.
        rounding: f32,
        /// Pseudo-count of each initial state.
        init_prior: f32,
        /// Pseudo-count of each transition.
        transition_prior: f32,
        /// More pseudo-count of staying.
        sticky: f32,
        /// Pseudo-observations at the prior mean.
        mean_weight: f32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;
/// States that `hmm_expectation` keeps in registers.
const SMALL: u64 = 4;
/// Steps that are summed before they are added to the total.
const BLOCK: usize = 64;
/// Weight below which a state keeps its emission.
const EMPTY_STATE: f64 = 1e-3;
/// Expected departures below which a row keeps its transitions.
const EMPTY_ROW: f64 = 1e-6;
/// Least rate of a Poisson state.
const LEAST_RATE: f64 = 1e-6;
/// Pivots below this share of their diagonal are collinear regressors.
const COLLINEAR: f64 = 1e-6;

const FORWARD: u32 = 1;
const BACKWARD: u32 = 2;
const ONLY_PACK: u32 = 0;
const MAXIMISE: u32 = 1;
const ONLY_JUDGE: u32 = 2;

/// How a model stands after an iteration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Iterations were left to do.
    Running,
    /// The log-likelihood gained less than the tolerance.
    Converged,
    /// The log-likelihood fell by more than rounding although no prior was active.
    Fell,
    /// An observation has probability zero under the model.
    Impossible,
}

impl Status {
    /// From a word of the status buffer.
    pub fn of(word: u32) -> Status {
        match word {
            1 => Status::Converged,
            2 => Status::Fell,
            3 => Status::Impossible,
            _ => Status::Running,
        }
    }
}

/// Reals of one model's emission, natural.
pub fn natural(emission: Emission, k: u64, d: u64) -> u64 {
    match emission {
        Emission::LogProbabilities => 0,
        Emission::GaussianDiagonal => 2 * k * d,
        Emission::GaussianFull => k * d + k * d * (d + 1) / 2,
        Emission::StudentT => 4 * k * d,
        Emission::Poisson => k * d,
        Emission::Categorical { symbols } => k * u64::from(symbols),
        Emission::Regression => k * d,
    }
}

/// Sums of one state beside its weight.
fn sums(code: u32, d: u64, symbols: u64) -> u64 {
    match code {
        0 => 0,
        1 => 2 * d,
        2 => d + d * (d + 1) / 2,
        3 => 4 * d,
        4 => d,
        5 => symbols,
        _ => (d - 1) + (d - 1) * d / 2 + 1,
    }
}

/// Widths that follow from the params.
#[derive(Clone, Copy)]
struct Widths {
    k: usize,
    d: usize,
    /// Sums of a state, its weight included.
    each: usize,
    /// Reals of `statistics` per job.
    statistics: usize,
    /// Reals of `parameters` per model.
    parameters: usize,
    /// Reals of `model` per model.
    model: usize,
}

impl Widths {
    fn of(p: &BaumWelchParams) -> Widths {
        let (k, d) = (u64::from(p.k), u64::from(p.d));
        let emission = emission_of(p);
        let each = 1 + sums(p.emission, d, u64::from(p.symbols));
        Widths {
            k: k as usize,
            d: d as usize,
            each: each as usize,
            statistics: (k + k * k + k * each + 3) as usize,
            parameters: (k + k * k + natural(emission, k, d)) as usize,
            model: (k + emission.parameters(k, d)) as usize,
        }
    }
}

fn emission_of(p: &BaumWelchParams) -> Emission {
    match p.emission {
        0 => Emission::LogProbabilities,
        1 => Emission::GaussianDiagonal,
        2 => Emission::GaussianFull,
        3 => Emission::StudentT,
        4 => Emission::Poisson,
        5 => Emission::Categorical { symbols: p.symbols },
        _ => Emission::Regression,
    }
}

fn params(words: &[u32]) -> BaumWelchParams {
    params_of(words).unwrap_or_else(bytemuck::Zeroable::zeroed)
}

/// Threads per sequence of `hmm_expectation_lanes`.
fn lanes(k: u64) -> u64 {
    k.next_power_of_two().clamp(8, u64::from(WG))
}

/// Sums that `hmm_sums` forms per job: all but the initial state, and those over pairs only where the expectation left them.
fn loose_sums(p: &BaumWelchParams) -> u64 {
    let w = Widths::of(p);
    let pairs = if u64::from(p.k) > SMALL { w.k * w.k } else { 0 };
    (pairs + w.k * w.each) as u64
}

fn sequence_steps(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.jobs) * u64::from(p.end.saturating_sub(p.begin))
}

/// E-step of up to 4 states on a GPU, of any number on the CPU.
pub static HMM_EXPECTATION: Kernel = Kernel {
    name: "hmm_expectation",
    about: "expected states and transitions of every sequence under its model",
    args: &[reads("obs"), reads_u32("words"), reads("parameters"), reads("model"), reads_u32("status"), writes("states"), writes("statistics")],
    params: layout::<BaumWelchParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| u64::from(params(words).jobs).div_ceil(u64::from(WG)),
    wgsl: wgsl!("hmm_baum_welch"),
    cuda: cuda!("hmm_baum_welch"),
    cpu: Some(Cpu { f32: expectation_f32, f64: expectation_cpu::<f64> }),
    cost: Cost { unit: "sequence-step", units: sequence_steps, bytes: 56.0, flops: 220.0 },
};

/// E-step of more states, several threads per sequence.
pub static HMM_EXPECTATION_LANES: Kernel = Kernel {
    name: "hmm_expectation_lanes",
    about: "expected states and transitions of every sequence, a thread per state",
    groups: |words| u64::from(params(words).jobs).div_ceil(u64::from(WG) / lanes(u64::from(params(words).k))),
    cpu: None,
    cost: Cost { unit: "sequence-step", units: sequence_steps, bytes: 200.0, flops: 2000.0 },
    ..HMM_EXPECTATION
};

/// Sums of γ·f(x) and of pairs over time.
pub static HMM_SUMS: Kernel = Kernel {
    name: "hmm_sums",
    about: "statistics of emissions and transitions, weighted by the posterior",
    args: &[reads("obs"), reads_u32("words"), reads("parameters"), reads_u32("status"), reads("states"), writes("statistics")],
    groups: |words| (u64::from(params(words).jobs) * loose_sums(&params(words))).div_ceil(u64::from(WG)),
    cpu: None,
    cost: Cost { unit: "sequence-step", units: sequence_steps, bytes: 40.0, flops: 60.0 },
    ..HMM_EXPECTATION
};

/// Statistics of a model from those of its sequences.
pub static HMM_REDUCE: Kernel = Kernel {
    name: "hmm_reduce",
    about: "statistics of every model, summed over its sequences",
    args: &[reads("statistics"), writes("totals")],
    groups: |words| (u64::from(params(words).models) * Widths::of(&params(words)).statistics as u64).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: reduce_cpu::<f32>, f64: reduce_cpu::<f64> }),
    cost: Cost { unit: "job", units: |words| u64::from(params(words).jobs), bytes: 100.0, flops: 100.0 },
    ..HMM_EXPECTATION
};

/// M-step: the next parameters, natural and packed, and whether the model goes on.
pub static HMM_MAXIMISATION: Kernel = Kernel {
    name: "hmm_maximisation",
    about: "next parameters of every model, its log-likelihood and whether it goes on",
    args: &[reads("guards"), writes("totals"), writes("parameters"), writes("model"), writes("log_trans"), writes_u32("status"), writes("path")],
    groups: |words| (u64::from(params(words).models) * u64::from(params(words).k)).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: maximisation_cpu::<f32>, f64: maximisation_cpu::<f64> }),
    cost: Cost { unit: "state", units: |words| u64::from(params(words).models) * u64::from(params(words).k), bytes: 100.0, flops: 200.0 },
    ..HMM_EXPECTATION
};

// ---- expectation on the CPU -------------------------------------------------------------------------------------------------

/// One sequence under one model.
struct Task<'a, R> {
    p: HmmParams,
    w: Widths,
    obs: &'a [R],
    mask: Option<&'a [u32]>,
    length: usize,
    /// Natural parameters.
    parameters: &'a [R],
    /// Packed emission.
    packed: &'a [R],
}

impl<R: Real> Task<'_, R> {
    fn observed(&self, t: usize) -> bool {
        self.mask.is_none_or(|m| m[t] != 0)
    }

    fn x(&self, t: usize) -> &[R] {
        let width = if self.p.emission == 0 { self.w.k } else { self.w.d };
        &self.obs[t * width..(t + 1) * width]
    }
}

/// Memory of one worker: α of the longest sequence, then vectors of K and a block's sums.
struct Scratch<R> {
    alpha: Vec<R>,
    log_b: Vec<R>,
    gamma: Vec<R>,
    ratio: Vec<R>,
    block: Vec<R>,
}

/// Below this a probability is zero: the smallest normal number, or near it.
fn tiny<R: Real>() -> R {
    R::of(if R::DIGITS < 30 { 1e-37 } else { 1e-300 })
}

/// Adds x to the sum of two.
fn compensated<R: Real>(sum: &mut R, low: &mut R, x: R) {
    let next = *sum + x;
    *low += if sum.abs() >= x.abs() { (*sum - next) + x } else { (x - next) + *sum };
    *sum = next;
}

/// The f32 column: sequences in lanes where `hmm_expectation.rs` has them, else the plain one.
fn expectation_f32(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: BaumWelchParams = launch.params()?;
    if !hmm_expectation::fits(&p) {
        return expectation_cpu(launch);
    }
    let (obs, words, parameters, model, status) = (launch.real()?, launch.word()?, launch.real()?, launch.real()?, launch.word()?);
    let (_, statistics) = (launch.real_mut()?, launch.real_mut()?);
    let w = Widths::of(&p);
    let status = &status[p.iteration as usize * p.models as usize..];
    let running = |job: &usize| status[job / p.per_model as usize] == 0;
    let mut rows: Vec<(usize, &mut [f32])> = statistics.chunks_exact_mut(w.statistics).enumerate().filter(|(job, _)| running(job)).collect();
    let lanes = hmm_expectation::Launch { p, obs, words, parameters, model, widths: [w.parameters, w.model, w.statistics] };
    hmm_expectation::run(&lanes, &mut rows);
    Ok(())
}

fn expectation_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BaumWelchParams = launch.params()?;
    let (obs, words, parameters, model, status) = (launch.real()?, launch.word()?, launch.real()?, launch.real()?, launch.word()?);
    let (_, statistics) = (launch.real_mut()?, launch.real_mut()?);
    let w = Widths::of(&p);
    let (t, width) = (p.t as usize, if p.emission == 0 { w.k } else { w.d });
    let shape = HmmParams { k: p.k, d: p.d, emission: p.emission, symbols: p.symbols, ..bytemuck::Zeroable::zeroed() };
    let each = if p.masked != 0 { 1 + t } else { 1 };
    let scratch = || Scratch {
        alpha: vec![R::ZERO; t * w.k],
        log_b: vec![R::ZERO; w.k],
        gamma: vec![R::ZERO; w.k],
        ratio: vec![R::ZERO; w.k],
        block: vec![R::ZERO; w.k * (w.k + w.each)],
    };
    statistics.par_chunks_exact_mut(w.statistics).enumerate().for_each_init(scratch, |scratch, (job, out)| {
        let (m, q) = (job / p.per_model as usize, job % p.per_model as usize);
        if status[p.iteration as usize * p.models as usize + m] != 0 {
            return;
        }
        let n = m / p.restarts as usize * p.per_model as usize + q;
        let task = Task {
            p: shape,
            w,
            obs: &obs[n * t * width..(n + 1) * t * width],
            mask: (p.masked != 0).then(|| &words[n * each + 1..(n + 1) * each]),
            length: words[n * each].min(p.t) as usize,
            parameters: &parameters[m * w.parameters..(m + 1) * w.parameters],
            packed: &model[m * w.model + w.k..(m + 1) * w.model],
        };
        // A known K lets the compiler unroll.
        match w.k {
            1 => expectation(&task, 1, scratch, out),
            2 => expectation(&task, 2, scratch, out),
            3 => expectation(&task, 3, scratch, out),
            4 => expectation(&task, 4, scratch, out),
            5 => expectation(&task, 5, scratch, out),
            6 => expectation(&task, 6, scratch, out),
            8 => expectation(&task, 8, scratch, out),
            k => expectation(&task, k, scratch, out),
        }
    });
    Ok(())
}

/// The E-step of one sequence: its statistics into `out`.
#[inline(always)]
fn expectation<R: Real>(task: &Task<'_, R>, k: usize, scratch: &mut Scratch<R>, out: &mut [R]) {
    out.fill(R::ZERO);
    let (sums, summary) = out.split_at_mut(task.w.statistics - 3);
    match forward(task, k, scratch) {
        Ok((sum, low)) => {
            summary.copy_from_slice(&[sum, low, R::of(-1.0)]);
            if task.length > 0 {
                backward(task, k, scratch, sums);
            }
        }
        Err(step) => summary.copy_from_slice(&[R::of(LOG_ZERO), R::ZERO, R::of(step as f64)]),
    }
}

/// Filtered probabilities into `alpha`; the log-likelihood as a sum of two, or the first impossible step.
#[inline(always)]
fn forward<R: Real>(task: &Task<'_, R>, k: usize, scratch: &mut Scratch<R>) -> Result<(R, R), usize> {
    let (init, trans) = (&task.parameters[..k], &task.parameters[k..k + k * k]);
    let log_b = &mut scratch.log_b[..k];
    let (mut sum, mut low) = (R::ZERO, R::ZERO);
    for t in 0..task.length {
        let (before, after) = scratch.alpha.split_at_mut(t * k);
        let at = &mut after[..k];
        if t == 0 {
            at.copy_from_slice(init);
        } else {
            predict(&before[(t - 1) * k..], trans, k, at);
        }
        if !task.observed(t) {
            continue;
        }
        for state in 0..k {
            log_b[state] = if task.p.emission == 0 { task.x(t)[state] } else { log_density(&task.p, task.packed, task.x(t), state) };
        }
        let (shift, total) = weigh(at, log_b, k).ok_or(t)?;
        let scale = R::ONE / total;
        for x in at.iter_mut() {
            *x *= scale;
        }
        compensated(&mut sum, &mut low, shift);
        compensated(&mut sum, &mut low, total.ln());
    }
    Ok((sum, low))
}

/// pred(j) = Σ_i α(i)·A(i,j).
#[inline(always)]
fn predict<R: Real>(alpha: &[R], trans: &[R], k: usize, out: &mut [R]) {
    out.fill(R::ZERO);
    for i in 0..k {
        for j in 0..k {
            out[j] = alpha[i].mul_add(trans[i * k + j], out[j]);
        }
    }
}

/// Multiplies predicted probabilities by b·exp(−shift); shift and total, or nothing where all is impossible.
#[inline(always)]
fn weigh<R: Real>(at: &mut [R], log_b: &mut [R], k: usize) -> Option<(R, R)> {
    let impossible = R::of(crate::hmm::IMPOSSIBLE);
    let most = |at: &[R], log_b: &[R]| (0..k).fold(R::of(LOG_ZERO), |m, j| if at[j] > R::ZERO { m.max(log_b[j]) } else { m });
    let mut shift = most(at, log_b);
    if shift <= impossible {
        return None;
    }
    let product = |at: R, log_b: R, shift: R| if at > R::ZERO { at * (log_b - shift).exp() } else { R::ZERO };
    let total: R = (0..k).map(|j| product(at[j], log_b[j], shift)).sum();
    if total < R::of(1e-30) {
        // The likeliest state was hardly predicted: shift by what is likely and predicted.
        for j in 0..k {
            log_b[j] = if at[j] > R::ZERO { log_b[j] + at[j].ln() } else { R::of(LOG_ZERO) };
            at[j] = if at[j] > R::ZERO { R::ONE } else { R::ZERO };
        }
        shift = most(at, log_b);
        if shift <= impossible {
            return None;
        }
    }
    let mut total = R::ZERO;
    for j in 0..k {
        let x = product(at[j], log_b[j], shift);
        at[j] = if x < tiny() { R::ZERO } else { x };
        total += at[j];
    }
    Some((shift, total))
}

/// Posteriors from the filtered probabilities, summed as they come.
#[inline(always)]
fn backward<R: Real>(task: &Task<'_, R>, k: usize, scratch: &mut Scratch<R>, sums: &mut [R]) {
    let (trans, each) = (&task.parameters[k..k + k * k], task.w.each);
    let (gamma, ratio, alpha) = (&mut scratch.gamma[..k], &mut scratch.ratio[..k], &scratch.alpha);
    let (pairs, weights) = scratch.block.split_at_mut(k * k);
    let last = task.length - 1;
    gamma.copy_from_slice(&alpha[last * k..(last + 1) * k]);
    pairs.fill(R::ZERO);
    weights.fill(R::ZERO);
    for t in (0..task.length).rev() {
        if task.observed(t) {
            for state in 0..k {
                moments(&task.p, &task.parameters[k + k * k..], task.x(t), state, gamma[state], &mut weights[state * each..(state + 1) * each]);
            }
        }
        if t > 0 {
            let before = &alpha[(t - 1) * k..t * k];
            predict(before, trans, k, ratio);
            for j in 0..k {
                ratio[j] = if ratio[j] > tiny() { gamma[j] / ratio[j] } else { R::ZERO };
            }
            let mut total = R::ZERO;
            for i in 0..k {
                let mut inner = R::ZERO;
                for j in 0..k {
                    pairs[i * k + j] = before[i].mul_add(ratio[j], pairs[i * k + j]);
                    inner = trans[i * k + j].mul_add(ratio[j], inner);
                }
                gamma[i] = before[i] * inner;
                total += gamma[i];
            }
            let scale = if total > R::ZERO { R::ONE / total } else { R::ZERO };
            gamma.iter_mut().for_each(|g| *g *= scale);
        }
        if t.is_multiple_of(BLOCK) {
            for (sum, x) in sums[k..].iter_mut().zip(pairs.iter_mut().chain(weights.iter_mut())) {
                *sum += *x;
                *x = R::ZERO;
            }
        }
    }
    sums[..k].copy_from_slice(gamma);
    for (sum, &a) in sums[k..].iter_mut().zip(trans) {
        *sum *= a;
    }
}

/// Adds g·f(x) of one state.
#[inline(always)]
fn moments<R: Real>(p: &HmmParams, natural: &[R], x: &[R], state: usize, g: R, out: &mut [R]) {
    let (k, d) = (p.k as usize, p.d as usize);
    out[0] += g;
    let out = &mut out[1..];
    match p.emission {
        0 => {}
        1 => {
            for i in 0..d {
                let dev = x[i] - natural[state * d + i];
                out[i] = g.mul_add(dev, out[i]);
                out[d + i] = (g * dev).mul_add(dev, out[d + i]);
            }
        }
        2 => {
            let mean = &natural[state * d..(state + 1) * d];
            for i in 0..d {
                let weighted = g * (x[i] - mean[i]);
                out[i] += weighted;
                for j in 0..=i {
                    let at = d + i * (i + 1) / 2 + j;
                    out[at] = weighted.mul_add(x[j] - mean[j], out[at]);
                }
            }
        }
        3 => {
            for i in 0..d {
                let (location, scale, freedom) = (natural[state * d + i], natural[(k + state) * d + i], natural[(2 * k + state) * d + i]);
                let dev = x[i] - location;
                let square = (dev / scale) * (dev / scale);
                let weight = g * (freedom + R::ONE) / (freedom + square);
                out[i] += weight;
                out[d + i] = weight.mul_add(dev, out[d + i]);
                out[2 * d + i] = (weight * dev).mul_add(dev, out[2 * d + i]);
                out[3 * d + i] = g.mul_add((square / freedom).ln_1p(), out[3 * d + i]);
            }
        }
        4 => {
            for i in 0..d {
                out[i] = g.mul_add(x[i], out[i]);
            }
        }
        5 => {
            let symbol = (x[0].f64().max(0.0) as usize).min(p.symbols as usize - 1);
            out[symbol] += g;
        }
        _ => {
            let r = d - 1;
            let beta = &natural[state * r..(state + 1) * r];
            let error = x[0] - (0..r).fold(R::ZERO, |sum, i| sum + x[1 + i] * beta[i]);
            let products = r * (r + 1) / 2;
            for i in 0..r {
                let weighted = g * x[1 + i];
                for j in 0..=i {
                    out[i * (i + 1) / 2 + j] = weighted.mul_add(x[1 + j], out[i * (i + 1) / 2 + j]);
                }
                out[products + i] = weighted.mul_add(error, out[products + i]);
            }
            out[products + r] = (g * error).mul_add(error, out[products + r]);
        }
    }
}

// ---- reduce and maximisation on the CPU ---------------------------------------------------------------------------------------

fn reduce_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BaumWelchParams = launch.params()?;
    let (statistics, totals) = (launch.real()?, launch.real_mut()?);
    let (width, per_model) = (Widths::of(&p).statistics, p.per_model as usize);
    totals.par_chunks_exact_mut(width).enumerate().for_each(|(m, out)| {
        let rows = &statistics[m * per_model * width..(m + 1) * per_model * width];
        for (e, total) in out.iter_mut().enumerate() {
            let (mut sum, mut low) = (R::ZERO, R::ZERO);
            rows.chunks_exact(width).for_each(|row| compensated(&mut sum, &mut low, row[e]));
            *total = sum + low;
        }
        // The log-likelihood stays a sum of two; one impossible sequence makes the model impossible.
        let (mut sum, mut low) = (R::ZERO, R::ZERO);
        for row in rows.chunks_exact(width) {
            compensated(&mut sum, &mut low, row[width - 3]);
            low += row[width - 2];
        }
        out[width - 3] = sum;
        out[width - 2] = low;
    });
    Ok(())
}

fn maximisation_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BaumWelchParams = launch.params()?;
    let (guards, totals, parameters, model) = (launch.real()?, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (log_trans, status, path) = (launch.real_mut()?, launch.word_mut()?, launch.real_mut()?);
    let (w, models, row) = (Widths::of(&p), p.models as usize, p.iteration as usize);
    let (status, next) = status.split_at_mut((row + 1) * models);
    let status = &status[row * models..];
    let (past, path) = path.split_at_mut(2 * row * models);
    let past = &past[past.len().saturating_sub(2 * models)..];
    let packed = model.par_chunks_exact_mut(w.model).zip(log_trans.par_chunks_exact_mut(w.k * w.k));
    let rows = path.par_chunks_exact_mut(2).zip(next.par_iter_mut());
    let all = totals.par_chunks_exact_mut(w.statistics).zip(parameters.par_chunks_exact_mut(w.parameters)).zip(packed).zip(rows).take(models);
    all.enumerate().for_each(|(m, (((totals, natural), (model, log_trans)), (path, next)))| {
        if p.action != ONLY_PACK {
            let before = past.get(2 * m..2 * m + 2);
            *next = judge(&p, &w, status[m], totals, before, path);
            if *next != 0 || p.action == ONLY_JUDGE {
                return;
            }
        }
        let group = m / p.restarts as usize;
        let guards = &guards[2 * w.d.max(1) * group..2 * w.d.max(1) * (group + 1)];
        if p.action == MAXIMISE {
            maximise(&p, &w, guards, totals, natural);
        }
        pack(&p, &w, guards, natural, model, log_trans, p.action == ONLY_PACK);
    });
    Ok(())
}

/// Writes the model's line of the path and says how it stands.
fn judge<R: Real>(p: &BaumWelchParams, w: &Widths, status: u32, totals: &[R], before: Option<&[R]>, path: &mut [R]) -> u32 {
    if status != 0 {
        path.copy_from_slice(before.unwrap_or(&[R::ZERO, R::ZERO]));
        return status;
    }
    path.copy_from_slice(&totals[w.statistics - 3..w.statistics - 1]);
    if path[0] <= R::of(crate::hmm::IMPOSSIBLE) {
        return 3;
    }
    let Some(before) = before.filter(|_| p.tolerance >= 0.0) else { return 0 };
    let gain = (path[0] - before[0]) + (path[1] - before[1]);
    let noise = R::of(f64::from(p.rounding)) * path[0].abs();
    let free = p.init_prior == 0.0 && p.transition_prior == 0.0 && p.sticky == 0.0 && p.mean_weight == 0.0;
    if free && gain < R::of(-8.0) * noise - R::of(1e-9) {
        return 2;
    }
    u32::from(gain < noise.max(R::of(f64::from(p.tolerance))))
}

/// Parameters from totals: init, transitions, then every state's emission.
fn maximise<R: Real>(p: &BaumWelchParams, w: &Widths, guards: &[R], totals: &mut [R], natural: &mut [R]) {
    let k = w.k;
    let row = |old: &mut [R], counts: &[R], prior: &dyn Fn(usize) -> f32| {
        if counts.iter().copied().sum::<R>() < R::of(EMPTY_ROW) {
            return;
        }
        let with = |j: usize, old: R| if old > R::ZERO { counts[j] + R::of(f64::from(prior(j))) } else { R::ZERO };
        let total: R = (0..k).map(|j| with(j, old[j])).sum();
        if total > R::ZERO {
            (0..k).for_each(|j| old[j] = with(j, old[j]) / total);
        }
    };
    row(&mut natural[..k], &totals[..k], &|_| p.init_prior);
    for i in 0..k {
        let prior = |j: usize| p.transition_prior + if i == j { p.sticky } else { 0.0 };
        row(&mut natural[k + i * k..k + (i + 1) * k], &totals[k + i * k..k + (i + 1) * k], &prior);
    }
    let at = k + k * k;
    for state in 0..k {
        let sums = &mut totals[at + state * w.each..at + (state + 1) * w.each];
        if sums[0] >= R::of(EMPTY_STATE) {
            maximise_state(p, state, guards, sums, &mut natural[at..]);
        }
    }
}

/// The emission of one state from its sums. `guards` holds the least variance and the prior mean of every dimension.
fn maximise_state<R: Real>(p: &BaumWelchParams, state: usize, guards: &[R], sums: &mut [R], natural: &mut [R]) {
    let (k, d, prior) = (p.k as usize, p.d as usize, R::of(f64::from(p.mean_weight)));
    let (weight, sums) = (sums[0], &mut sums[1..]);
    // How far the mean moves, towards the prior mean where there is one.
    let step = |weight: R, sum: R, mean: R, i: usize| (sum + prior * (guards[d + i] - mean)) / (weight + prior);
    match p.emission {
        0 => {}
        1 => {
            for i in 0..d {
                let mean = natural[state * d + i];
                let move_by = step(weight, sums[i], mean, i);
                let off = mean + move_by - guards[d + i];
                let squares = sums[d + i] - (sums[i] + sums[i]) * move_by + move_by * move_by * weight + prior * off * off;
                natural[state * d + i] = mean + move_by;
                natural[(k + state) * d + i] = (squares / weight).max(guards[i]);
            }
        }
        2 => {
            let triangle = d * (d + 1) / 2;
            let at = k * d + state * triangle;
            for i in 0..d {
                let (mean_i, step_i) = (natural[state * d + i], step(weight, sums[i], natural[state * d + i], i));
                for j in 0..=i {
                    let (mean_j, step_j) = (natural[state * d + j], step(weight, sums[j], natural[state * d + j], j));
                    let off = (mean_i + step_i - guards[d + i]) * (mean_j + step_j - guards[d + j]);
                    let e = i * (i + 1) / 2 + j;
                    let products = sums[d + e] - sums[i] * step_j - sums[j] * step_i + step_i * step_j * weight + prior * off;
                    natural[at + e] = products / weight;
                }
            }
            for i in 0..d {
                natural[state * d + i] += step(weight, sums[i], natural[state * d + i], i);
            }
        }
        3 => {
            for i in 0..d {
                let (u, first, second, location) = (sums[i], sums[d + i], sums[2 * d + i], natural[state * d + i]);
                let move_by = step(u, first, location, i);
                let off = location + move_by - guards[d + i];
                let squares = second - (first + first) * move_by + move_by * move_by * u + prior * off * off;
                natural[state * d + i] = location + move_by;
                natural[(k + state) * d + i] = (squares / weight).max(guards[i]).sqrt();
            }
        }
        4 => (0..d).for_each(|i| natural[state * d + i] = (sums[i] / weight).max(R::of(LEAST_RATE))),
        5 => {
            let symbols = p.symbols as usize;
            (0..symbols).for_each(|i| natural[state * symbols + i] = sums[i] / weight);
        }
        _ => {
            let r = d - 1;
            let (products, rest) = sums.split_at_mut(r * (r + 1) / 2);
            let (right, squares) = rest.split_at_mut(r);
            let explained = solve(products, right, r);
            (0..r).for_each(|i| natural[state * r + i] += right[i]);
            natural[k * r + state] = ((squares[0] - explained) / weight).max(guards[0]);
        }
    }
}

/// Solves A·x = b for a lower-packed symmetric A, by Cholesky in place; x replaces b. Collinear columns get 0. Returns bᵀ·x.
pub(crate) fn solve<R: Real>(a: &mut [R], b: &mut [R], n: usize) -> R {
    let at = |i: usize, j: usize| i * (i + 1) / 2 + j;
    let mut explained = R::ZERO;
    for j in 0..n {
        let diagonal = a[at(j, j)];
        let pivot = (0..j).fold(diagonal, |sum, c| sum - a[at(j, c)] * a[at(j, c)]);
        let inverse = if pivot > R::of(COLLINEAR) * diagonal { R::ONE / pivot.sqrt() } else { R::ZERO };
        for i in j + 1..n {
            a[at(i, j)] = inverse * (0..j).fold(a[at(i, j)], |sum, c| sum - a[at(i, c)] * a[at(j, c)]);
        }
        // The diagonal holds the inverse pivot from here on.
        a[at(j, j)] = inverse;
        b[j] = inverse * (0..j).fold(b[j], |sum, c| sum - a[at(j, c)] * b[c]);
        explained += b[j] * b[j];
    }
    for j in (0..n).rev() {
        b[j] = a[at(j, j)] * (j + 1..n).fold(b[j], |sum, i| sum - a[at(i, j)] * b[i]);
    }
    explained
}

/// Logarithm of a probability on a device.
fn log_probability<R: Real>(x: R) -> R {
    if x >= tiny() { x.ln() } else { R::of(LOG_ZERO) }
}

/// Packs natural parameters as kernels/hmm.rs lays them out; a start has its rows normalised first.
fn pack<R: Real>(p: &BaumWelchParams, w: &Widths, guards: &[R], natural: &mut [R], model: &mut [R], log_trans: &mut [R], start: bool) {
    let k = w.k;
    if start {
        natural[..k + k * k].chunks_exact_mut(k).for_each(|row| {
            let total: R = row.iter().copied().sum();
            row.iter_mut().for_each(|x| *x = *x / total);
        });
    }
    (0..k).for_each(|i| model[i] = log_probability(natural[i]));
    (0..k * k).for_each(|e| log_trans[e] = log_probability(natural[k + e]));
    for state in 0..k {
        pack_state(p, state, guards, &mut natural[k + k * k..], &mut model[k..]);
    }
}

fn pack_state<R: Real>(p: &BaumWelchParams, state: usize, guards: &[R], natural: &mut [R], packed: &mut [R]) {
    let (k, d) = (p.k as usize, p.d as usize);
    let half_log_tau = R::of(0.918_938_533_204_672_8);
    let constant = |logs: R| logs - R::of(d as f64) * half_log_tau;
    match p.emission {
        0 => {}
        1 => {
            let mut logs = R::ZERO;
            for i in 0..d {
                let inverse = R::ONE / natural[(k + state) * d + i].max(guards[i]).sqrt();
                packed[state * d + i] = natural[state * d + i];
                packed[(k + state) * d + i] = inverse;
                logs += inverse.ln();
            }
            packed[2 * k * d + state] = constant(logs);
        }
        2 => {
            let triangle = d * (d + 1) / 2;
            let (covariance, factor) = (&mut natural[k * d + state * triangle..], &mut packed[k * d + state * triangle..][..triangle]);
            let logs = inverse_factor(covariance, factor, guards, d);
            packed[state * d..(state + 1) * d].copy_from_slice(&natural[state * d..(state + 1) * d]);
            packed[k * (d + triangle) + state] = constant(logs);
        }
        3 => {
            let mut constant = R::ZERO;
            for i in 0..d {
                let (scale, freedom) = (natural[(k + state) * d + i], natural[(2 * k + state) * d + i]);
                packed[state * d + i] = natural[state * d + i];
                packed[(k + state) * d + i] = R::ONE / scale;
                packed[(2 * k + state) * d + i] = R::of(0.5) * (freedom + R::ONE);
                packed[(3 * k + state) * d + i] = R::ONE / freedom;
                constant += natural[(3 * k + state) * d + i] - scale.ln();
            }
            packed[4 * k * d + state] = constant;
        }
        4 => {
            let mut total = R::ZERO;
            for i in 0..d {
                packed[state * d + i] = natural[state * d + i].ln();
                total += natural[state * d + i];
            }
            packed[k * d + state] = -total;
        }
        5 => {
            let symbols = p.symbols as usize;
            (0..symbols).for_each(|i| packed[state * symbols + i] = log_probability(natural[state * symbols + i]));
        }
        _ => {
            let r = d - 1;
            let inverse = R::ONE / natural[k * r + state].max(guards[0]).sqrt();
            packed[state * r..(state + 1) * r].copy_from_slice(&natural[state * r..(state + 1) * r]);
            packed[k * r + state] = inverse;
            packed[k * r + k + state] = inverse.ln() - half_log_tau;
        }
    }
}

/// Inverse of the lower Cholesky factor, row by row; pivots below the floor are raised to it, in the covariance too. Returns Σ ln of
/// its diagonal.
fn inverse_factor<R: Real>(covariance: &mut [R], factor: &mut [R], guards: &[R], d: usize) -> R {
    let at = |i: usize, j: usize| i * (i + 1) / 2 + j;
    let mut logs = R::ZERO;
    for i in 0..d {
        for j in 0..i {
            let sum = (0..j).fold(covariance[at(i, j)], |sum, c| sum - factor[at(i, c)] * factor[at(j, c)]);
            factor[at(i, j)] = sum / factor[at(j, j)];
        }
        let pivot = (0..i).fold(covariance[at(i, i)], |sum, c| sum - factor[at(i, c)] * factor[at(i, c)]);
        if pivot < guards[i] {
            covariance[at(i, i)] += guards[i] - pivot;
        }
        factor[at(i, i)] = pivot.max(guards[i]).sqrt();
    }
    for i in 0..d {
        let inverse = R::ONE / factor[at(i, i)];
        for j in 0..i {
            let sum = (j..i).fold(R::ZERO, |sum, c| sum + factor[at(i, c)] * factor[at(c, j)]);
            factor[at(i, j)] = -sum * inverse;
        }
        factor[at(i, i)] = inverse;
        logs += inverse.ln();
    }
    logs
}

// ---- recording ----------------------------------------------------------------------------------------------------------------

/// Sequences on the host.
#[derive(Debug, Clone, Copy)]
pub struct Observations<'a> {
    /// [N,T,D], or log-probabilities [N,T,K].
    pub obs: &'a [f32],
    /// Sequences.
    pub n: usize,
    /// Steps.
    pub t: usize,
    /// Numbers a step: D, or K for log-probabilities.
    pub width: usize,
    /// Length of each sequence [N]; none: all T.
    pub lengths: Option<&'a [u32]>,
    /// Which steps were observed [N,T]; none: all. What stands at a missing step is not read and may be NaN.
    pub observed: Option<&'a [bool]>,
}

impl<'a> Observations<'a> {
    /// Complete sequences of equal length.
    pub fn new(obs: &'a [f32], n: usize, t: usize, width: usize) -> Observations<'a> {
        Observations { obs, n, t, width, lengths: None, observed: None }
    }

    /// Steps of sequence n.
    pub fn length(&self, n: usize) -> usize {
        self.lengths.map_or(self.t, |l| l[n] as usize)
    }

    /// Whether step t of sequence n lies in it and was observed.
    pub fn seen(&self, n: usize, t: usize) -> bool {
        t < self.length(n) && self.observed.is_none_or(|o| o[n * self.t + t])
    }

    /// The numbers of step t of sequence n.
    pub fn x(&self, n: usize, t: usize) -> &'a [f32] {
        let at = (n * self.t + t) * self.width;
        &self.obs[at..at + self.width]
    }

    /// Sequences `from..to` alone.
    pub(crate) fn part(&self, from: usize, to: usize) -> Observations<'a> {
        let steps = from * self.t..to * self.t;
        Observations {
            obs: &self.obs[steps.start * self.width..steps.end * self.width],
            n: to - from,
            lengths: self.lengths.map(|l| &l[from..to]),
            observed: self.observed.map(|o| &o[steps]),
            ..*self
        }
    }

    /// Checks shapes and values.
    /// # Errors
    /// `Shape`, or `Parameter` naming sequence and step: a value that is not a number without a mask, an infinite one, a count that is
    /// negative or not whole, a symbol that is not one, a length beyond T.
    pub fn check(&self, emission: Emission) -> Result<()> {
        let shape = |arg: &str, expected: String, got: usize| Error::Shape { op: OP, arg: arg.into(), expected, got: format!("{got} values") };
        let Observations { n, t, width, .. } = *self;
        if n == 0 || t == 0 || width == 0 {
            let help = "give at least one sequence, one step and one number a step".into();
            return Err(Error::Parameter { op: OP, name: "[sequences, steps, numbers]".into(), value: format!("[{n}, {t}, {width}]"), help });
        }
        if self.obs.len() != n * t * width {
            return Err(shape("obs", format!("[{n},{t},{width}]"), self.obs.len()));
        }
        if let Some(lengths) = self.lengths {
            if lengths.len() != n {
                return Err(shape("lengths", format!("[{n}]"), lengths.len()));
            }
            if let Some(i) = lengths.iter().position(|&l| l as usize > t) {
                let help = format!("sequence {i} is longer than the {t} steps that obs holds");
                return Err(Error::Parameter { op: OP, name: "lengths".into(), value: lengths[i].to_string(), help });
            }
        }
        if let Some(observed) = self.observed.filter(|o| o.len() != n * t) {
            return Err(shape("observed", format!("[{n},{t}]"), observed.len()));
        }
        match emission {
            Emission::Categorical { symbols } if width != 1 || symbols == 0 => {
                let help = format!("a categorical emission observes one of its {symbols} symbols a step, at least one symbol");
                return Err(Error::Parameter { op: OP, name: "numbers a step".into(), value: width.to_string(), help });
            }
            _ => {}
        }
        (0..n).into_par_iter().try_for_each(|i| (0..t).filter(|&s| self.seen(i, s)).try_for_each(|s| self.check_step(emission, i, s)))
    }

    fn check_step(&self, emission: Emission, n: usize, t: usize) -> Result<()> {
        let wrong = |value: f32, help: &str| {
            Err(Error::Parameter { op: OP, name: format!("obs of sequence {n} at step {t}"), value: value.to_string(), help: help.into() })
        };
        for &x in self.x(n, t) {
            if x.is_nan() {
                return wrong(x, "mark the step as missing in `observed`, or fill the gap");
            }
            match emission {
                Emission::LogProbabilities if x < f32::INFINITY => {}
                _ if x.is_infinite() => return wrong(x, "observations are finite"),
                Emission::Poisson if x < 0.0 || x.fract() != 0.0 => return wrong(x, "a Poisson emission observes counts 0, 1, 2 …"),
                Emission::Categorical { symbols } if x < 0.0 || x.fract() != 0.0 || x >= symbols as f32 => {
                    return wrong(x, &format!("symbols are 0 to {}", symbols - 1));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Lengths [N,1], or lengths and masks [N,1+T], as kernels/hmm.rs wants them.
    pub fn words(&self) -> Vec<u32> {
        (0..self.n)
            .flat_map(|n| {
                let length = self.length(n) as u32;
                let mask = self.observed.map(|o| o[n * self.t..(n + 1) * self.t].iter().map(|&x| u32::from(x)));
                std::iter::once(length).chain(mask.into_iter().flatten())
            })
            .collect()
    }

    /// The observations, zero where there is none, and log 0 as devices write it.
    fn filled(&self) -> std::borrow::Cow<'a, [f32]> {
        if (0..self.n).all(|n| (0..self.t).all(|t| self.seen(n, t))) && self.obs.iter().all(|x| x.is_finite()) {
            return self.obs.into();
        }
        let fill = |i: usize, &x: &f32| if self.seen(i / self.width / self.t, i / self.width % self.t) { x.max(LOG_ZERO as f32) } else { 0.0 };
        self.obs.iter().enumerate().map(|(i, x)| fill(i, x)).collect::<Vec<f32>>().into()
    }
}

/// What is fitted to what, and when it stops.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Emission.
    pub emission: Emission,
    /// States.
    pub k: usize,
    /// Sequences of one model: neighbours.
    pub per_model: usize,
    /// Models that are fitted to the same sequences from other starts.
    pub restarts: usize,
    /// A model stops when its log-likelihood gains less; negative: never.
    pub tolerance: f32,
    /// Pseudo-count of each initial state.
    pub init_prior: f32,
    /// Pseudo-count of each transition that is not a hard zero.
    pub transition_prior: f32,
    /// More pseudo-count of staying in a state.
    pub sticky: f32,
    /// Pseudo-observations at the prior mean (normal and Student-t).
    pub mean_weight: f32,
}

impl Settings {
    /// Plain EM of one model per group of `per_model` sequences, without stopping.
    pub fn plain(emission: Emission, k: usize, per_model: usize) -> Settings {
        let (init_prior, transition_prior, sticky, mean_weight) = (0.0, 0.0, 0.0, 0.0);
        Settings { emission, k, per_model, restarts: 1, tolerance: -1.0, init_prior, transition_prior, sticky, mean_weight }
    }

    fn check(&self, data: &Observations<'_>) -> Result<()> {
        let wrong = |name: &str, value: String, help: String| Err(Error::Parameter { op: OP, name: name.into(), value, help });
        if self.k == 0 || self.k as u64 > MAX_STATES {
            return wrong("states", self.k.to_string(), format!("give 1 to {MAX_STATES} states"));
        }
        if self.per_model == 0 || !data.n.is_multiple_of(self.per_model) || self.restarts == 0 {
            let help = format!("the {} sequences divide into models of equally many, each started at least once", data.n);
            return wrong("sequences per model, restarts", format!("{}, {}", self.per_model, self.restarts), help);
        }
        if self.emission == Emission::LogProbabilities && data.width != self.k {
            return wrong("states", self.k.to_string(), format!("obs holds log-probabilities of {} states", data.width));
        }
        for (name, value) in
            [("init_prior", self.init_prior), ("transition_prior", self.transition_prior), ("sticky", self.sticky), ("mean_weight", self.mean_weight)]
        {
            if !(value.is_finite() && value >= 0.0) {
                return wrong(name, value.to_string(), "a pseudo-count is 0 or positive".into());
            }
        }
        let fewest = (0..data.n / self.per_model).map(|g| {
            let seen = |n: usize| (0..data.length(n)).filter(|&t| data.seen(n, t)).count();
            ((g * self.per_model..(g + 1) * self.per_model).map(seen).sum::<usize>(), g)
        });
        match fewest.min() {
            Some((seen, group)) if seen < self.k => {
                let help = format!("the sequences of model {group} have {seen} observed steps in all; give fewer states or longer sequences");
                wrong("states", self.k.to_string(), help)
            }
            _ => Ok(()),
        }
    }
}

/// Models that are being fitted: everything lies on the device.
#[derive(Debug, Clone)]
pub struct BaumWelch {
    /// Natural parameters [M,P].
    pub parameters: Buffer,
    /// Packed models [M,stride].
    pub model: Buffer,
    /// log-probabilities of transitions [M,K,K].
    pub log_trans: Buffer,
    /// Statistics of each model [M,…], of its last expectation.
    pub totals: Buffer,
    /// [`Status`] of each model after each iteration [iterations+2, M].
    pub status: Buffer,
    /// log-likelihood, as a sum of two, of the parameters before each maximisation [iterations+2, M, 2].
    pub path: Buffer,
    /// Iterations recorded so far.
    pub iterations: u32,
    most: u32,
    params: BaumWelchParams,
    /// Statistics of each (model, sequence) of its last expectation; the last is the first impossible step or −1.
    pub statistics: Buffer,
    obs: Buffer,
    words: Buffer,
    guards: Buffer,
    states: Buffer,
    packed: bool,
}

impl BaumWelch {
    /// Uploads sequences and start, and makes room for `iterations`.
    ///
    /// `start` [M,P] natural parameters; init and transition rows are normalised on the device. `guards` [M/restarts, 2, D] least variance
    /// and prior mean of each dimension.
    /// # Errors
    /// As [`Observations::check`]; `Parameter` for more states than observations; `Shape` for a wrong start; `TooLarge` where the device
    /// lacks room.
    pub fn new(device: &Device, data: &Observations<'_>, settings: &Settings, start: &[f32], guards: &[f32], iterations: u32) -> Result<BaumWelch> {
        data.check(settings.emission)?;
        settings.check(data)?;
        let (groups, k) = (data.n / settings.per_model, settings.k);
        let models = groups * settings.restarts;
        let on_host = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference);
        let params = BaumWelchParams {
            jobs: (models * settings.per_model) as u32,
            models: models as u32,
            restarts: settings.restarts as u32,
            per_model: settings.per_model as u32,
            t: data.t as u32,
            k: k as u32,
            d: if settings.emission == Emission::LogProbabilities { 0 } else { data.width as u32 },
            emission: settings.emission.code(),
            symbols: settings.emission.symbols(),
            masked: u32::from(data.observed.is_some()),
            begin: 0,
            end: data.t as u32,
            phase: FORWARD | BACKWARD,
            iteration: 0,
            action: ONLY_PACK,
            tolerance: settings.tolerance,
            rounding: if device.info().kind == DeviceKind::Reference { 1e-13 } else { 3e-7 },
            init_prior: settings.init_prior,
            transition_prior: settings.transition_prior,
            sticky: settings.sticky,
            mean_weight: settings.mean_weight,
        };
        let w = Widths::of(&params);
        let expects = |arg: &str, got: usize, len: usize, shape: String| {
            if got == len {
                Ok(())
            } else {
                Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{shape}, {len} values"), got: format!("{got} values") })
            }
        };
        expects("start", start.len(), models * w.parameters, format!("[{models},{}]", w.parameters))?;
        expects("guards", guards.len(), groups * 2 * w.d.max(1), format!("[{groups},2,{}]", w.d.max(1)))?;
        let (jobs, m) = (u64::from(params.jobs), models as u64);
        let sections = match (on_host, k as u64 <= SMALL) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 3,
        };
        let largest = (sections * jobs * data.t as u64 * k as u64).max(jobs * loose_sums(&params)).max(data.obs.len() as u64);
        if !on_host && largest > u64::from(u32::MAX) {
            let help = "kernels count with 32 bits; fit fewer sequences at once".into();
            return Err(Error::TooLarge { what: OP.into(), needed: largest, limit: u64::from(u32::MAX), unit: "values", help });
        }
        let statistics = device.zeros("statistics", jobs * w.statistics as u64)?;
        Ok(BaumWelch {
            parameters: device.upload("parameters", start)?,
            model: device.zeros("model", m * w.model as u64)?,
            log_trans: device.zeros("log_trans", m * (k * k) as u64)?,
            totals: if settings.per_model == 1 { statistics.clone() } else { device.zeros("totals", m * w.statistics as u64)? },
            status: device.zeros_u32("status", m * u64::from(iterations + 2))?,
            path: device.zeros("path", 2 * m * u64::from(iterations + 2))?,
            iterations: 0,
            most: iterations,
            params,
            obs: device.upload("obs", &data.filled())?,
            words: device.upload_words("words", data.words())?,
            guards: device.upload("guards", guards)?,
            states: device.zeros("states", (sections * jobs * data.t as u64 * k as u64).max(1))?,
            statistics,
            packed: false,
        })
    }

    /// Records `iterations` more: expectation and maximisation each.
    /// # Errors
    /// `TooLarge` if the device cannot run them; `Parameter` for more than [`BaumWelch::new`] made room for.
    pub fn record(&mut self, pass: &mut Pass, iterations: u32) -> Result<()> {
        if self.iterations + iterations > self.most {
            let help = format!("room was made for {}", self.most);
            return Err(Error::Parameter { op: OP, name: "iterations".into(), value: (self.iterations + iterations).to_string(), help });
        }
        for _ in 0..iterations {
            self.step(pass, MAXIMISE)?;
            self.iterations += 1;
        }
        Ok(())
    }

    /// Records the log-likelihood and the statistics of the parameters as they stand: the last line of the path.
    pub fn finish(&mut self, pass: &mut Pass) -> Result<()> {
        self.step(pass, ONLY_JUDGE)
    }

    fn step(&mut self, pass: &mut Pass, action: u32) -> Result<()> {
        let mut params = BaumWelchParams { iteration: self.iterations, action, ..self.params };
        if !self.packed {
            self.maximise(pass, &BaumWelchParams { action: ONLY_PACK, ..params })?;
            self.packed = true;
        }
        self.expect(pass, params)?;
        if self.params.per_model > 1 {
            pass.launch(&HMM_REDUCE, &params, &[View::from(&self.statistics), View::from(&self.totals)])?;
        }
        params.phase = 0;
        self.maximise(pass, &params)
    }

    fn maximise(&self, pass: &mut Pass, params: &BaumWelchParams) -> Result<()> {
        let args = [&self.guards, &self.totals, &self.parameters, &self.model, &self.log_trans, &self.status, &self.path].map(View::from);
        pass.launch(&HMM_MAXIMISATION, params, &args)
    }

    /// The E-step: one launch where the device's loops are long enough, else stretches of time forward, backward and forward again.
    fn expect(&self, pass: &mut Pass, params: BaumWelchParams) -> Result<()> {
        let args = [&self.obs, &self.words, &self.parameters, &self.model, &self.status, &self.states, &self.statistics].map(View::from);
        let device = pass.device().clone();
        if matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference) {
            return pass.launch(&HMM_EXPECTATION, &params, &args);
        }
        let (small, k) = (u64::from(params.k) <= SMALL, u64::from(params.k));
        // Where all threads of a vector walk through every branch, the eight loops of the other densities take a round each.
        let density = 9 + emission_of(&params).rounds(u64::from(params.d));
        let per_lane = k.div_ceil(lanes(k));
        let (forward, backward) = if small { (4 + 4 * density, 4) } else { (6 + per_lane * (k + density + 3) + 2 * k, 6 + k + 2 * per_lane * (k + 3)) };
        let kernel = if small { &HMM_EXPECTATION } else { &HMM_EXPECTATION_LANES };
        let t = u64::from(params.t);
        let stretches = |rounds: u64| -> Result<Vec<(u32, u32)>> {
            let room = device.limits().loop_rounds.saturating_sub(2 * k * k + 1000);
            device.check_rounds(OP, rounds + 2 * k * k + 1000, "rounds a step")?;
            let by_work = device.limits().work_per_launch / (u64::from(params.jobs) * (200 + 4 * k * k)).max(1);
            let most = (room / rounds).min(by_work).max(1).min(t);
            Ok((0..t.div_ceil(most)).map(|i| ((i * most) as u32, ((i + 1) * most).min(t) as u32)).collect())
        };
        if stretches(forward + backward)?.len() == 1 {
            pass.launch(kernel, &params, &args)?;
        } else {
            for (begin, end) in stretches(forward)? {
                pass.launch(kernel, &BaumWelchParams { begin, end, phase: FORWARD, ..params }, &args)?;
            }
            for (begin, end) in stretches(backward)?.into_iter().rev() {
                pass.launch(kernel, &BaumWelchParams { begin, end, phase: BACKWARD, ..params }, &args)?;
            }
        }
        if small && params.emission == Emission::GaussianDiagonal.code() && params.d == 1 {
            return Ok(());
        }
        let args = [&self.obs, &self.words, &self.parameters, &self.status, &self.states, &self.statistics].map(View::from);
        for (begin, end) in stretches(2 + u64::from(params.d))? {
            pass.launch(&HMM_SUMS, &BaumWelchParams { begin, end, ..params }, &args)?;
        }
        Ok(())
    }
}

/// Records `iterations` of Baum-Welch and the log-likelihood of what comes out: [`BaumWelch::new`], [`BaumWelch::record`] and
/// [`BaumWelch::finish`] in one call. [`crate::hmm_fit::fit`] adds starts, restarts and the choice of K.
///
/// # Errors
/// As [`BaumWelch::new`].
pub fn hmm_baum_welch(pass: &mut Pass, data: &Observations<'_>, settings: &Settings, start: &[f32], guards: &[f32], iterations: u32) -> Result<BaumWelch> {
    let device = pass.device().clone();
    let mut fit = BaumWelch::new(&device, data, settings, start, guards, iterations)?;
    fit.record(pass, iterations)?;
    fit.finish(pass)?;
    Ok(fit)
}

/// Conformance binding: one model on all sequences, plain EM.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let &[n, t, d] = case.shape("obs")? else {
        return Err(Error::Shape { op: OP, arg: "obs".into(), expected: "[N,T,D]".into(), got: format!("{:?}", case.shape("obs")?) });
    };
    let (k, iterations) = (case.shape("init")?.iter().product::<usize>(), case.number("iterations")? as u32);
    let full = case.text("covariance")? == "full";
    let emission = if full { Emission::GaussianFull } else { Emission::GaussianDiagonal };
    let mut start = [case.f32("init")?, case.f32("trans")?, case.f32("means")?].concat();
    let covariances = case.f32("covars")?;
    if full {
        start.extend(covariances.chunks_exact(d * d).flat_map(|c| (0..d).flat_map(move |i| (0..=i).map(move |j| c[i * d + j]))));
    } else {
        start.extend(covariances);
    }
    let guards: Vec<f32> = [vec![f32::MIN_POSITIVE; d], vec![0.0; d]].concat();
    let mut pass = device.pass(OP);
    let data = Observations::new(case.f32("obs")?, n, t, d);
    let fit = hmm_baum_welch(&mut pass, &data, &Settings::plain(emission, k, n), &start, &guards, iterations)?;
    let (parameters, path) = (pass.read(&fit.parameters)?, pass.read(&fit.path)?);
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    let (natural, path) = (done.f64(parameters)?, done.f64(path)?);
    outputs.reals("log_likelihood", path.chunks_exact(2).take(iterations as usize).map(|x| x[0] + x[1]).collect());
    outputs.reals("init", natural[..k].to_vec());
    outputs.reals("trans", natural[k..k + k * k].to_vec());
    let at = k + k * k;
    outputs.reals("means", natural[at..at + k * d].to_vec());
    let spread = &natural[at + k * d..];
    let covariances = if full {
        let entry = |c: &[f64], i: usize, j: usize| c[i.max(j) * (i.max(j) + 1) / 2 + i.min(j)];
        spread.chunks_exact(d * (d + 1) / 2).flat_map(|c| (0..d * d).map(move |e| entry(c, e / d, e % d))).collect()
    } else {
        spread.to_vec()
    };
    outputs.reals("covars", covariances);
    Ok(outputs)
}
