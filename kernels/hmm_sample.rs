//! Random state paths and observations of hidden Markov models: ancestral, and from the posterior given observations.
//!
//! ancestral  z(0) ~ init, z(t) ~ A(t−1, z(t−1), ·), x(t) ~ emission of z(t).
//! posterior  z(L−1) ~ filtered(L−1), z(t) ~ filtered(t,i)·A(t,i,z(t+1)): forward filter, backward sample.
//!
//! Draws    path p takes word t mod 4 of Philox at counter (p low, p high, t/4, STREAM·2^16) with the seed as key for its state at t.
//!          A draw picks the first state whose cumulative weight exceeds ⌊word·total/2³²⌋; weights are whole numbers, totals 64 bits wide, so
//!          that integers alone decide. Ancestral weights of tables are ⌊2³¹·p⌋ with p from log p in fixed point (within 3e-8 of p, no
//!          built-in exponential): the same states on every device, and a p below 2⁻³¹ is never drawn. Weights of softmax transitions and
//!          of the posterior come from f32 sums, relative to the largest of the row: devices agree but where a word falls within their
//!          rounding, some 1e-7 of the draws (1e-6 for the posterior).
//!          Observation d of path p at t: word t mod 4 of counter (…, t/4, STREAM·2^16 | 1 + d), and of | 2^15 + 1 + d for a second word.
//!          Normals by Box-Muller as in kernels/philox.rs, Student-t by Bailey's polar form, Poisson by inversion outwards from the mode.
//!
//! Shapes   as in kernels/hmm.rs; states [B,T] or, from the posterior, [B,draws,T] u32; sampled obs [B,T,D]; 0 past a sequence's length.
//!          Path p is the sequence, or sequence·draws + draw: results do not depend on how a batch is cut.
//! Launch   `hmm_weights` a thread per table entry, once. `hmm_sample` a thread per path, `hmm_sample_observations` a thread per path and
//!          four steps, `hmm_sample_posterior` a thread per path, in blocks of time.
//! Scratch  the weights of the tables; the filtered probabilities [B,T,K] for the posterior.
//! Floor    4 bytes written per step and 12 instructions of Philox; K additions and comparisons.
//! Source   Salmon et al. 2011 (Philox); Carter & Kohn 1994, Biometrika 81 (backward sampling); Bailey 1994, Math. Comp. 62 (Student-t).
//! Files    shaders/hmm_sample.wgsl · cuda/hmm_sample.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, Pass, View};
use crate::hmm::{Emission, Hmm, IMPOSSIBLE, Transitions, Wanted, hmm_forward_backward};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::philox::{normals, philox4x32, uniform};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the four kernels.
    pub struct HmmSampleParams {
        /// Sequences of this launch, or table entries of `hmm_weights`.
        b: u32,
        /// Steps of a sequence.
        t: u32,
        /// States.
        k: u32,
        /// Observed numbers a step.
        d: u32,
        /// Inputs a step.
        u: u32,
        /// Draws per sequence.
        draws: u32,
        /// Elements from one sequence's model to the next one's; 0: shared.
        model_row: u32,
        /// Elements from one sequence's transitions to the next one's; 0: shared.
        trans_row: u32,
        /// Elements from one step's transitions to the next one's; 0: constant.
        trans_step: u32,
        /// 1: transitions are a softmax of inputs.
        softmax: u32,
        /// Words per sequence: 0 none, 1 lengths, more: masks too.
        words_row: u32,
        /// Kind of emission: `Emission::code`.
        emission: u32,
        /// Symbols of a categorical emission.
        symbols: u32,
        /// First step of this launch.
        from_step: u32,
        /// One past its last step.
        to_step: u32,
        /// Index of the first path, low word …
        first: u32,
        /// … and high word.
        first_high: u32,
        /// Seed, low word …
        seed: u32,
        /// … and high word.
        seed_high: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;
/// Stream of ancestral draws.
const ANCESTRAL: u32 = 0x4853;
/// Stream of posterior draws.
const POSTERIOR: u32 = 0x4850;
/// Factor bit of the second word of an observation.
const SECOND: u32 = 1 << 15;

const OP: &str = "hmm_sample";

fn params(words: &[u32]) -> HmmSampleParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn paths(words: &[u32]) -> u64 {
    u64::from(params(words).b) * u64::from(params(words).draws)
}

fn path_steps(words: &[u32]) -> u64 {
    let p = params(words);
    paths(words) * u64::from(p.to_step.saturating_sub(p.from_step))
}

/// Whole-number weights of log-probabilities.
pub static HMM_WEIGHTS: Kernel = Kernel {
    name: "hmm_weights",
    about: "whole-number weights of log-probabilities, equal on every device",
    args: &[reads("log_prob"), writes_u32("weights")],
    params: layout::<HmmSampleParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| u64::from(params(words).b).div_ceil(u64::from(WG)),
    wgsl: wgsl!("hmm_sample"),
    cuda: cuda!("hmm_sample"),
    cpu: Some(Cpu { f32: hmm_weights_cpu::<f32>, f64: hmm_weights_cpu::<f64> }),
    cost: Cost { unit: "entry", units: |words| u64::from(params(words).b), bytes: 8.0, flops: 60.0 },
};

/// Ancestral state paths.
pub static HMM_SAMPLE: Kernel = Kernel {
    name: "hmm_sample",
    about: "state paths drawn from the model",
    args: &[reads_u32("init_weights"), reads_u32("weights"), reads_u32("words"), reads("log_trans"), reads("inputs"), writes_u32("states")],
    groups: |words| paths(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_sample_cpu::<f32>, f64: hmm_sample_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 4.0, flops: 60.0 },
    ..HMM_WEIGHTS
};

/// Observations of given states.
pub static HMM_SAMPLE_OBSERVATIONS: Kernel = Kernel {
    name: "hmm_sample_observations",
    about: "observations drawn from the emissions of given states",
    args: &[reads("model"), reads_u32("words"), reads_u32("states"), writes("obs")],
    groups: |words| (paths(words) * u64::from(params(words).t.div_ceil(4))).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_sample_observations_cpu::<f32>, f64: hmm_sample_observations_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: |words| paths(words) * u64::from(params(words).t), bytes: 8.0, flops: 80.0 },
    ..HMM_WEIGHTS
};

/// State paths from the posterior.
pub static HMM_SAMPLE_POSTERIOR: Kernel = Kernel {
    name: "hmm_sample_posterior",
    about: "state paths drawn given the observations, backwards over the filtered probabilities",
    args: &[reads("filtered"), reads_u32("words"), reads("log_trans"), reads("inputs"), writes_u32("states")],
    groups: |words| paths(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_sample_posterior_cpu::<f32>, f64: hmm_sample_posterior_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 8.0, flops: 80.0 },
    ..HMM_WEIGHTS
};

// ---- draws ----------------------------------------------------------------------------------------------------------------

/// ⌊2³¹·e^x⌋ or one or two less, for x ≤ 0 (a positive x counts as 0): integers from the bits of x on.
pub fn weight(x: f32) -> u32 {
    let raw = x.to_bits();
    if raw >> 31 == 0 {
        return 1 << 31;
    }
    let exponent = (raw >> 23 & 0xff) as i32;
    if exponent > 131 {
        return 0;
    }
    // y = −x with 27 fractional bits, z = y·log2 e with 26: e^x = 2^−z
    let mantissa = raw & 0x7f_ffff | 0x80_0000;
    let y = if exponent >= 123 { mantissa << (exponent - 123) } else { mantissa >> (123 - exponent).min(31) };
    let z = high(y, 0xB8AA_3B29);
    // g = ln 2 times the fraction, 32 bits; e^−g by its series from the end
    let g = high(z << 6, 0xB172_17F8);
    let mut r = 1u32 << 31;
    for n in (1..=11).rev() {
        r = (1 << 31) - high(g, r) / n;
    }
    r >> (z >> 26)
}

/// Upper word of a product.
fn high(a: u32, b: u32) -> u32 {
    ((u64::from(a) * u64::from(b)) >> 32) as u32
}

/// The first of K states whose cumulative weight exceeds ⌊word·total/2³²⌋; `fallback` where all weights are 0.
fn pick(k: usize, word: u32, fallback: u32, weight: impl Fn(usize) -> u32) -> u32 {
    let total: u64 = (0..k).map(|j| u64::from(weight(j))).sum();
    let target = ((u128::from(word) * u128::from(total)) >> 32) as u64;
    let mut sum = 0;
    for j in 0..k {
        sum += u64::from(weight(j));
        if sum > target {
            return j as u32;
        }
    }
    fallback
}

/// The four words of path `path` at steps 4·(t/4) … for a factor.
fn words_of(p: &HmmSampleParams, path: u64, t: usize, factor: u32, stream: u32) -> [u32; 4] {
    let path = path + (u64::from(p.first_high) << 32 | u64::from(p.first));
    philox4x32([path as u32, (path >> 32) as u32, (t / 4) as u32, factor | stream << 16], [p.seed, p.seed_high])
}

fn length_of(p: &HmmSampleParams, words: &[u32], b: usize) -> usize {
    if p.words_row == 0 { p.t as usize } else { words[b * p.words_row as usize].min(p.t) as usize }
}

/// A real in (0, 1] as a whole number of 2³¹sts.
fn whole<R: Real>(x: R) -> u32 {
    (x.f64().clamp(0.0, 1.0) * f64::from(1u32 << 31)) as u32
}

/// Logits of row i of sequence b at step t.
fn logits<R: Real>(p: &HmmSampleParams, log_trans: &[R], inputs: &[R], [b, t, i]: [usize; 3], out: &mut [R]) {
    let (k, u) = (p.k as usize, p.u as usize);
    let input = &inputs[(b * p.t as usize + t) * u..][..u];
    let weights = log_trans[b * p.trans_row as usize + i * k * (u + 1)..].chunks_exact(u + 1);
    for (logit, w) in out.iter_mut().zip(weights) {
        *logit = w[..u].iter().zip(input).fold(w[u], |sum, (&w, &x)| sum + w * x);
    }
}

fn hmm_weights_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmSampleParams = launch.params()?;
    let (log_prob, weights) = (launch.real()?, launch.word_mut()?);
    weights.par_iter_mut().zip(log_prob).take(p.b as usize).for_each(|(w, x)| *w = weight(x.f32()));
    Ok(())
}

fn hmm_sample_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmSampleParams = launch.params()?;
    let (init_weights, weights, words) = (launch.word()?, launch.word()?, launch.word()?);
    let (log_trans, inputs, states) = (launch.real()?, launch.real()?, launch.word_mut()?);
    let k = p.k as usize;
    states.par_chunks_exact_mut(p.t as usize).enumerate().take(p.b as usize).for_each(|(b, states)| {
        let stop = length_of(&p, words, b).min(p.to_step as usize);
        let mut row = vec![R::ZERO; if p.softmax > 0 { k } else { 0 }];
        let mut draw = [0; 4];
        for t in p.from_step as usize..stop {
            if t % 4 == 0 || t == p.from_step as usize {
                draw = words_of(&p, b as u64, t, 0, ANCESTRAL);
            }
            states[t] = if t == 0 {
                let at = b * p.model_row as usize;
                pick(k, draw[0], 0, |j| init_weights[at + j])
            } else {
                let i = states[t - 1] as usize;
                if p.softmax > 0 {
                    logits(&p, log_trans, inputs, [b, t, i], &mut row);
                    let top = row.iter().fold(R::of(IMPOSSIBLE), |m, &x| m.max(x));
                    pick(k, draw[t % 4], i as u32, |j| weight((row[j] - top).f32()))
                } else {
                    let at = b * p.trans_row as usize + (t - 1) * p.trans_step as usize + i * k;
                    pick(k, draw[t % 4], i as u32, |j| weights[at + j])
                }
            };
        }
    });
    Ok(())
}

fn hmm_sample_posterior_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmSampleParams = launch.params()?;
    let (filtered, words, log_trans, inputs, states) = (launch.real()?, launch.word()?, launch.real()?, launch.real()?, launch.word_mut()?);
    let (t_max, k, draws) = (p.t as usize, p.k as usize, p.draws as usize);
    states.par_chunks_exact_mut(t_max).enumerate().take(p.b as usize * draws).for_each(|(path, states)| {
        let b = path / draws;
        let length = length_of(&p, words, b);
        let (mut into, mut row) = (vec![R::ZERO; k], vec![R::ZERO; k]);
        for t in (p.from_step as usize..length.min(p.to_step as usize)).rev() {
            let now = &filtered[(b * t_max + t) * k..][..k];
            into.copy_from_slice(now);
            if t + 1 < length {
                let next = states[t + 1] as usize;
                for i in 0..k {
                    into[i] *= transition(&p, log_trans, inputs, [b, t + 1, i], next, &mut row);
                }
            }
            let top = into.iter().fold(R::ZERO, |m, &x| m.max(x));
            let word = words_of(&p, path as u64, t, 0, POSTERIOR)[t % 4];
            states[t] = if top > R::ZERO { pick(k, word, 0, |i| whole(into[i] / top)) } else { 0 };
        }
    });
    Ok(())
}

/// p(state j at step t | state i one step before).
fn transition<R: Real>(p: &HmmSampleParams, log_trans: &[R], inputs: &[R], [b, t, i]: [usize; 3], j: usize, row: &mut [R]) -> R {
    let probability = |x: R| if x <= R::of(IMPOSSIBLE) { R::ZERO } else { x.exp() };
    let k = p.k as usize;
    if p.softmax == 0 {
        return probability(log_trans[b * p.trans_row as usize + (t - 1) * p.trans_step as usize + i * k + j]);
    }
    logits(p, log_trans, inputs, [b, t, i], row);
    let top = row.iter().fold(R::of(IMPOSSIBLE), |m, &x| m.max(x));
    probability(row[j] - top) / row.iter().map(|&x| probability(x - top)).sum::<R>()
}

// ---- observations ---------------------------------------------------------------------------------------------------------

fn hmm_sample_observations_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmSampleParams = launch.params()?;
    let (model, words, states, obs) = (launch.real()?, launch.word()?, launch.word()?, launch.real_mut()?);
    let (t_max, k, d) = (p.t as usize, p.k as usize, p.d as usize);
    obs.par_chunks_exact_mut(t_max * d).enumerate().take(p.b as usize).for_each(|(b, obs)| {
        let parameters = &model[b * p.model_row as usize + k..];
        let states = &states[b * t_max..];
        for t in (0..length_of(&p, words, b)).step_by(4) {
            let most = (length_of(&p, words, b) - t).min(4);
            for i in 0..if p.emission == REGRESSION { 1 } else { d } {
                let first = words_of(&p, b as u64, t, 1 + i as u32, ANCESTRAL);
                let second = words_of(&p, b as u64, t, SECOND | (1 + i as u32), ANCESTRAL);
                for c in 0..most {
                    let state = states[t + c] as usize;
                    obs[(t + c) * d + i] = observation(&p, parameters, state, i, &obs[(t + c) * d..][..d], normals(first)[c], first[c], second[c]);
                }
            }
        }
    });
    Ok(())
}

const REGRESSION: u32 = 6;

/// One observed number: coordinate i of a state's emission. `x` holds the coordinates before it, and the regressors.
fn observation<R: Real>(p: &HmmSampleParams, parameters: &[R], state: usize, i: usize, x: &[R], normal: f64, first: u32, second: u32) -> R {
    let (k, d) = (p.k as usize, p.d as usize);
    let z = R::of(normal);
    match p.emission {
        1 => parameters[state * d + i] + z / parameters[(k + state) * d + i],
        2 => {
            let triangle = d * (d + 1) / 2;
            let (mean, factor) = (&parameters[state * d..], &parameters[k * d + state * triangle + i * (i + 1) / 2..]);
            let known = (0..i).fold(R::ZERO, |sum, j| sum + factor[j] * (x[j] - mean[j]));
            mean[i] + (z - known) / factor[i]
        }
        3 => {
            let at = |part: usize| parameters[(part * k + state) * d + i];
            // √(ν·(u^(−2/ν) − 1))·cos 2πv
            let grown = (R::of(-2.0 * uniform(first).ln()) * at(3)).f64().exp_m1();
            let radius = (R::of(grown) / at(3)).sqrt();
            at(0) + radius * R::of((std::f64::consts::TAU * uniform(second)).cos()) / at(1)
        }
        4 => poisson(parameters[state * d + i], uniform(first)),
        5 => {
            let symbols = p.symbols as usize;
            R::of(f64::from(pick(symbols, first, 0, |s| weight(parameters[state * symbols + s].f32()))))
        }
        _ => {
            let r = d - 1;
            let fit = (0..r).fold(R::ZERO, |sum, i| sum + x[1 + i] * parameters[state * r + i]);
            fit + z / parameters[k * r + state]
        }
    }
}

/// Inversion outwards from the mode: mode, mode + 1, mode − 1, …
fn poisson<R: Real>(log_rate: R, u: f64) -> R {
    let rate = log_rate.exp();
    let mode = R::of(rate.f64().min(1e9).floor());
    let at_mode = (mode * log_rate - rate - crate::hmm::log_factorial(mode)).exp();
    let (mut left, mut up, mut down) = (R::of(u) - at_mode, at_mode, at_mode);
    if left < R::ZERO {
        return mode;
    }
    for n in 1..POISSON_ROUNDS {
        let n = R::of(f64::from(n));
        up = up * rate / (mode + n);
        left -= up;
        if left < R::ZERO {
            return mode + n;
        }
        if n <= mode {
            down = down * (mode - n + R::ONE) / rate;
            left -= down;
            if left < R::ZERO {
                return mode - n;
            }
        }
        if up <= R::ZERO && down <= R::ZERO {
            break;
        }
    }
    mode
}

/// Steps away from the mode after which a Poisson draw gives the mode.
const POISSON_ROUNDS: u32 = 10_000;

// ---- ops ------------------------------------------------------------------------------------------------------------------

/// Paths drawn from a model.
#[derive(Debug, Clone)]
pub struct Sample {
    /// States [B,T].
    pub states: Buffer,
    /// Observations [B,T,D]; none for `Emission::LogProbabilities`.
    pub obs: Option<Buffer>,
}

/// Model, words, log_trans and inputs of a run, and the params that go with them; `obs` is not bound.
struct Chain {
    params: HmmSampleParams,
    model: View,
    words: View,
    log_trans: View,
    inputs: View,
}

impl Chain {
    fn of(pass: &mut Pass, hmm: &Hmm, run: &Range<u64>, seed: u64, draws: u64) -> Result<Chain> {
        let device = pass.device().clone();
        let part = |pass: &mut Pass, view: &View, each: Option<u64>| match each {
            Some(each) => pass.input(&view.buffer, view.range.start + run.start * each..view.range.start + run.end * each),
            None => pass.input(&view.buffer, view.range.clone()),
        };
        let (t, k) = (hmm.t, hmm.k);
        let stride = hmm.stride();
        let model = part(pass, &hmm.model, hmm.per_sequence.then_some(stride))?;
        let none = || Ok::<View, Error>(View::from(&device.zeros("no inputs", 1)?));
        let (row, step, u, log_trans, inputs) = match &hmm.transitions {
            Transitions::Table { log_trans, per_sequence, per_step } => {
                let row = k * k * if *per_step { (t - 1).max(1) } else { 1 };
                let table = part(pass, log_trans, per_sequence.then_some(row))?;
                (if *per_sequence { row } else { 0 }, if *per_step { k * k } else { 0 }, 0, table, none()?)
            }
            Transitions::Softmax { weights, inputs, u, per_sequence } => {
                let row = k * k * (u + 1);
                let weights = part(pass, weights, per_sequence.then_some(row))?;
                (if *per_sequence { row } else { 0 }, 0, *u, weights, part(pass, inputs, Some(t * u))?)
            }
        };
        let words_row = if hmm.words.is_none() { 0 } else { 1 + if hmm.masked { t } else { 0 } };
        let words = match &hmm.words {
            Some(words) => part(pass, words, Some(words_row))?,
            None => View::from(&device.zeros_u32("no words", 1)?),
        };
        let first = run.start * draws;
        let params = HmmSampleParams {
            b: (run.end - run.start) as u32,
            t: t as u32,
            k: k as u32,
            d: hmm.d as u32,
            u: u as u32,
            draws: draws as u32,
            model_row: if hmm.per_sequence { stride as u32 } else { 0 },
            trans_row: row as u32,
            trans_step: step as u32,
            softmax: u32::from(matches!(hmm.transitions, Transitions::Softmax { .. })),
            words_row: words_row as u32,
            emission: hmm.emission.code(),
            symbols: hmm.emission.symbols(),
            from_step: 0,
            to_step: t as u32,
            first: first as u32,
            first_high: (first >> 32) as u32,
            seed: seed as u32,
            seed_high: (seed >> 32) as u32,
        };
        Ok(Chain { params, model, words, log_trans, inputs })
    }
}

/// Steps of a launch whose loops take `rounds` a step.
fn block_of(device: &Device, t: u64, rounds: u64) -> Result<u64> {
    let steps = device.limits().loop_rounds / rounds.max(1) / 4 * 4;
    if steps == 0 {
        device.check_rounds(OP, 4 * rounds, "rounds")?;
    }
    Ok(steps.min(t.next_multiple_of(4)))
}

/// Whole-number weights of a view, or of one element where they are not needed.
fn weights_of(pass: &mut Pass, view: &View, wanted: bool) -> Result<View> {
    let device = pass.device().clone();
    let n = if wanted { view.len() } else { 1 };
    let weights = device.zeros_u32("weights", n)?;
    if wanted {
        for run in device.plan(OP, n, 1, 1, 60)? {
            let from = pass.input(&view.buffer, view.range.start + run.start..view.range.start + run.end)?;
            let out = pass.output(&weights, run.clone())?;
            let params = HmmSampleParams { b: (run.end - run.start) as u32, ..bytemuck::Zeroable::zeroed() };
            pass.launch(&HMM_WEIGHTS, &params, &[from, out.view.clone()])?;
            pass.finish(out)?;
        }
    }
    Ok(View::from(&weights))
}

/// The model without its observations, checked: a stand-in of their shape takes their place.
fn without_obs(hmm: &Hmm) -> Result<Hmm> {
    let mut chain = hmm.clone();
    if hmm.emission != Emission::Regression {
        chain.obs.range = 0..hmm.b.saturating_mul(hmm.t).saturating_mul(hmm.emission.observed(hmm.k, hmm.d));
    }
    chain.check(OP)?;
    Ok(chain)
}

/// Records one path per sequence: states, and what they emit.
///
/// `hmm.obs` is not read (it may be any view), but for `Emission::Regression`, whose regressors are taken from it (its first column is
/// replaced in the result). Lengths are kept, masks do not matter. The same seed gives the same states on every device; observations
/// agree within 1e-6 of their scale.
/// # Errors
/// Those of [`Hmm::check`].
pub fn hmm_sample(pass: &mut Pass, hmm: &Hmm, seed: u64) -> Result<Sample> {
    let chain = without_obs(hmm)?;
    let device = pass.device().clone();
    let (b, t, k, d) = (hmm.b, hmm.t, hmm.k, hmm.d);
    // A software adapter goes through the loops of branches that it does not take, too.
    let softmax = if let Transitions::Softmax { u, .. } = hmm.transitions { 3 * k * (u + 14) } else { 0 };
    let block = block_of(&device, t, 12 * k + 30 + softmax)?;
    let states = device.zeros_u32("states", b * t)?;
    let emits = hmm.emission != Emission::LogProbabilities;
    device.check_rounds("hmm_sample_observations", d * (24 + 4 * (14 + d + 26 * u64::from(hmm.emission.symbols()))), "rounds")?;
    let obs = if emits { Some(device.zeros("obs", b * t * d)?) } else { None };
    if let (Some(obs), Emission::Regression) = (&obs, hmm.emission) {
        pass.copy(&hmm.obs, obs)?;
    }
    let elements = Hmm { emission: Emission::Categorical { symbols: 1 }, d: 1, ..chain.clone() }.elements().max(t * d.max(1));
    for run in device.plan(OP, b, elements.max(hmm.stride()), t.div_ceil(4), t * (60 + 4 * k))? {
        let Chain { params, model, words, log_trans, inputs } = Chain::of(pass, &chain, &run, seed, 1)?;
        let init_weights = weights_of(pass, &model, true)?;
        let weights = weights_of(pass, &log_trans, params.softmax == 0)?;
        let out = pass.output(&states, run.start * t..run.end * t)?;
        for from in (0..t).step_by(block as usize) {
            let part = HmmSampleParams { from_step: from as u32, to_step: (from + block).min(t) as u32, ..params };
            let args = [init_weights.clone(), weights.clone(), words.clone(), log_trans.clone(), inputs.clone(), out.view.clone()];
            pass.launch(&HMM_SAMPLE, &part, &args)?;
        }
        if let Some(obs) = &obs {
            let emitted = pass.output(obs, run.start * t * d..run.end * t * d)?;
            let start = run.start * t * d;
            if hmm.emission == Emission::Regression && !start.is_multiple_of(device.limits().align) {
                pass.copy(obs.view(start..run.end * t * d), &emitted.view)?;
            }
            pass.launch(&HMM_SAMPLE_OBSERVATIONS, &params, &[model, words, out.view.clone(), emitted.view.clone()])?;
            pass.finish(emitted)?;
        }
        pass.finish(out)?;
    }
    Ok(Sample { states, obs })
}

/// Records `draws` state paths per sequence from the posterior: [B,draws,T]. Sequences with an impossible step have path 0.
/// # Errors
/// Those of [`Hmm::check`]; `Parameter` for no draws.
pub fn hmm_sample_posterior(pass: &mut Pass, hmm: &Hmm, seed: u64, draws: u64) -> Result<Buffer> {
    hmm.check("hmm_sample_posterior")?;
    if draws == 0 || draws > u64::from(u32::MAX) / 2 {
        let help = "give at least one draw per sequence".into();
        return Err(Error::Parameter { op: "hmm_sample_posterior", name: "draws".into(), value: draws.to_string(), help });
    }
    let device = pass.device().clone();
    let (b, t, k) = (hmm.b, hmm.t, hmm.k);
    let filter = hmm_forward_backward(pass, hmm, Wanted { filtered: true, ..Wanted::default() })?;
    let filtered = filter.filtered.ok_or_else(|| Error::Internal("no filtered probabilities".into()))?;
    let softmax = if let Transitions::Softmax { u, .. } = hmm.transitions { 9 * k * k * (u + 2) } else { 0 };
    let block = block_of(&device, t, 21 * k + 16 + softmax)?;
    let states = device.zeros_u32("posterior states", b * draws * t)?;
    for run in device.plan(OP, b, hmm.elements().max(t * k).max(draws * t), draws, draws * t * (60 + 12 * k))? {
        let Chain { params, words, log_trans, inputs, .. } = Chain::of(pass, hmm, &run, seed, draws)?;
        let start = filtered.range.start;
        let probabilities = pass.input(&filtered.buffer, start + run.start * t * k..start + run.end * t * k)?;
        let out = pass.output(&states, run.start * draws * t..run.end * draws * t)?;
        let blocks = t.div_ceil(block);
        for i in (0..blocks).rev() {
            let part = HmmSampleParams { from_step: (i * block) as u32, to_step: ((i + 1) * block).min(t) as u32, ..params };
            pass.launch(&HMM_SAMPLE_POSTERIOR, &part, &[probabilities.clone(), words.clone(), log_trans.clone(), inputs.clone(), out.view.clone()])?;
        }
        pass.finish(out)?;
    }
    Ok(states)
}

/// Binding for files: log_init, log_trans; the number of steps and the seed; states [B,T].
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let wrong = |arg: &str| Error::Shape { op: OP, arg: arg.into(), expected: "[B,K], [B or 1,T−1 or 1,K,K]".into(), got: "another shape".into() };
    let (&[b, k], &[tables, slots, ..]) = (case.shape("log_init")?, case.shape("log_trans")?) else { return Err(wrong("log_init, log_trans")) };
    let t = case.number("steps")? as u64;
    let model = View::from(&device.upload("model", case.f32("log_init")?)?);
    let log_trans = View::from(&device.upload("log_trans", case.f32("log_trans")?)?);
    let hmm = Hmm {
        b: b as u64,
        t,
        k: k as u64,
        d: 0,
        emission: Emission::LogProbabilities,
        obs: model.clone(),
        model,
        per_sequence: b > 1,
        transitions: Transitions::Table { log_trans, per_sequence: tables > 1, per_step: slots > 1 },
        words: None,
        masked: false,
    };
    let mut pass = device.pass(OP);
    let sample = hmm_sample(&mut pass, &hmm, case.number("seed")? as u64)?;
    let states = pass.read(&sample.states)?;
    let mut outputs = Outputs::launched(pass.launches());
    outputs.words("states", pass.submit()?.u32(states)?);
    Ok(outputs)
}
