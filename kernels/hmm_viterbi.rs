//! Most probable state path of every sequence (Viterbi), in logarithms.
//!
//! δ(0,j) = log init(j) + log b(0,j);  δ(t,j) = max_i (δ(t−1,i) + log A(t−1,i,j)) − max_i δ(t−1,i) + log b(t,j), ψ(t,j) the i that wins.
//! path(T−1) = argmax δ(T−1), path(t−1) = ψ(t, path(t));  log_prob = Σ of the maxima taken out. The lowest index wins every tie.
//!
//! Shapes   inputs as in kernels/hmm.rs, with obs = log-probabilities [B,T,K] (fused emissions go through `hmm_emission` first).
//!          path [B,T] u32, 0 past a sequence's length; log_prob [B,2], high and low part; failed [B]: first impossible step or NONE.
//!          Pointers of a step are packed: 2 bits each for K ≤ 4 (four steps to a word), 4 bits for K ≤ 16, 8 bits for K ≤ 256, else words.
//! Zeros    a sequence whose step `failed` is impossible has log_prob −∞; its path is the best one up to that step and 0 from there on.
//! Launch   forward, in blocks of time: `hmm_viterbi` (K ≤ 4) a thread per sequence, `hmm_viterbi_lanes` 8 to 128 threads per sequence.
//!          Back: `hmm_viterbi_path`, a thread per sequence; up to K = 8 a pointer's address does not depend on the state, so that eight
//!          words are in flight at once.
//! Scratch  the pointers; where they would pass POINTER_BYTES, δ is kept every √T steps and the steps in between are run twice.
//! Floor    4·K bytes read and 4 written per step, 1 byte of pointers written and read (K = 4); 2·K² additions and comparisons.
//! Numerics δ is brought back to maximum 0 every step, so its rounding does not grow with T; the maxima are summed compensated. Additions
//!          and comparisons alone, in one order: for tables of transitions and given log-probabilities every f32 device has the same bits.
//! Source   Viterbi 1967; Rabiner 1989.
//! Files    shaders/hmm_viterbi.wgsl · cuda/hmm_viterbi.cu · reference: `hmm_viterbi_cpu`, checked against every path of small models

use crate::Result;
use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, Pass, View};
use crate::hmm::{Batch, Emission, Hmm, HmmParams, IMPOSSIBLE, LOG_ZERO, MAX_STATES, Transitions, flag, hmm_emission, hmm_of_case};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use rayon::prelude::*;

params! {
    /// Params of the three kernels.
    pub struct HmmViterbiParams {
        /// Sequences of this launch.
        b: u32,
        /// Steps of a sequence.
        t: u32,
        /// States.
        k: u32,
        /// Reals from one sequence's model to the next one's; 0: shared.
        model_row: u32,
        /// Reals from one sequence's transitions to the next one's; 0: shared.
        trans_row: u32,
        /// Reals from one step's transitions to the next one's; 0: constant.
        trans_step: u32,
        /// 1: transitions are a softmax of inputs.
        softmax: u32,
        /// Inputs a step.
        u: u32,
        /// Words per sequence: 0 none, 1 lengths, more: masks too.
        words_row: u32,
        /// First step of this launch.
        from_step: u32,
        /// One past its last step.
        to_step: u32,
        /// Slot of `carry` and `ends` that it starts from.
        carry_in: u32,
        /// Slot that it leaves its state in.
        carry_out: u32,
        /// First step that `pointers` holds.
        pointers_from: u32,
        /// Words of `pointers` per sequence.
        pointer_words: u32,
        /// Threads per sequence.
        lanes: u32,
    }
}

/// Threads per workgroup where a thread has a sequence: few, so that small batches spread over the device.
const WG: u32 = 32;
/// Threads per workgroup where a sequence has several.
const WG_LANES: u32 = 128;
/// Most states of the kernel with a thread per sequence.
const SMALL: u64 = 4;
/// Memory that back-pointers may take before δ is kept at checkpoints instead.
pub const POINTER_BYTES: u64 = 256 << 20;
/// No step.
pub const NONE: u32 = u32::MAX;

const OP: &str = "hmm_viterbi";
const STATES: (&str, u32) = ("STATES", MAX_STATES as u32);

fn params(words: &[u32]) -> HmmViterbiParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn steps(p: &HmmViterbiParams) -> u64 {
    u64::from(p.b) * u64::from(p.to_step.saturating_sub(p.from_step))
}

fn pairs(words: &[u32]) -> u64 {
    let p = params(words);
    steps(&p) * u64::from(p.k) * u64::from(p.k)
}

/// Forward, a thread per sequence.
pub static HMM_VITERBI: Kernel = Kernel {
    name: "hmm_viterbi",
    about: "best log-probability of every state and where it came from, up to 4 states",
    args: &[reads("model"), reads("obs"), reads_u32("words"), reads("log_trans"), reads("inputs"), writes("carry"), writes_u32("ends"), writes_u32("pointers")],
    params: layout::<HmmViterbiParams>(),
    workgroup: WG,
    constants: &[STATES],
    groups: |words| u64::from(params(words).b).div_ceil(u64::from(WG)),
    wgsl: wgsl!("hmm_viterbi"),
    cuda: cuda!("hmm_viterbi"),
    cpu: Some(Cpu { f32: hmm_viterbi_cpu::<f32>, f64: hmm_viterbi_cpu::<f64> }),
    // Per pair of states; bytes at K = 4.
    cost: Cost { unit: "pair of states", units: pairs, bytes: 1.1, flops: 3.0 },
};

/// Forward, several threads per sequence.
pub static HMM_VITERBI_LANES: Kernel = Kernel {
    name: "hmm_viterbi_lanes",
    about: "best log-probability of every state and where it came from, from 5 states",
    workgroup: WG_LANES,
    groups: |words| {
        let p = params(words);
        u64::from(p.b).div_ceil(u64::from(WG_LANES / p.lanes.max(1)).max(1))
    },
    cost: Cost { unit: "pair of states", units: pairs, bytes: 0.3, flops: 3.0 },
    ..HMM_VITERBI
};

/// Back through the pointers.
pub static HMM_VITERBI_PATH: Kernel = Kernel {
    name: "hmm_viterbi_path",
    about: "the path that the pointers of the best last state lead back along",
    args: &[
        reads("carry"),
        reads_u32("words"),
        reads_u32("ends"),
        reads_u32("pointers"),
        writes_u32("state"),
        writes_u32("path"),
        writes("log_prob"),
        writes_u32("failed"),
    ],
    params: layout::<HmmViterbiParams>(),
    workgroup: WG,
    constants: &[STATES],
    groups: |words| u64::from(params(words).b).div_ceil(u64::from(WG)),
    wgsl: wgsl!("hmm_viterbi"),
    cuda: cuda!("hmm_viterbi"),
    cpu: Some(Cpu { f32: hmm_viterbi_path_cpu::<f32>, f64: hmm_viterbi_path_cpu::<f64> }),
    cost: Cost { unit: "step", units: |words| steps(&params(words)), bytes: 5.0, flops: 6.0 },
};

/// Words that the pointers of `steps` steps take.
fn pointer_words(k: u64, steps: u64) -> u64 {
    match k {
        0..=4 => steps.div_ceil(4),
        5..=16 => steps * k.div_ceil(8),
        17..=256 => steps * k.div_ceil(4),
        _ => steps * k,
    }
}

/// Stores the pointers of a step.
#[inline(always)]
fn pack(pointers: &mut [u32], k: usize, step: usize, from: &[u32]) {
    if k <= 4 {
        let byte = (0..k).fold(0, |byte, j| byte | from[j] << (2 * j));
        let before = if step.is_multiple_of(4) { 0 } else { pointers[step / 4] };
        pointers[step / 4] = before | byte << (8 * (step % 4));
    } else if k <= 256 {
        let (per_word, bits) = if k <= 16 { (8, 4) } else { (4, 8) };
        let words = &mut pointers[step * k.div_ceil(per_word)..];
        for (word, group) in words.iter_mut().zip(from[..k].chunks(per_word)) {
            *word = group.iter().rev().fold(0, |word, &i| word << bits | i);
        }
    } else {
        pointers[step * k..(step + 1) * k].copy_from_slice(&from[..k]);
    }
}

/// The pointer of state s at a step.
fn unpack(pointers: &[u32], k: usize, step: usize, s: usize) -> u32 {
    match k {
        0..=4 => pointers[step / 4] >> (8 * (step % 4) + 2 * s) & 3,
        5..=16 => pointers[step * k.div_ceil(8) + s / 8] >> (4 * (s % 8)) & 15,
        17..=256 => pointers[step * k.div_ceil(4) + s / 4] >> (8 * (s % 4)) & 255,
        _ => pointers[step * k + s],
    }
}

// ---- CPU ------------------------------------------------------------------------------------------------------------------

/// What a launch hands on: δ and the sum, the failed step and the best state one step before.
struct Carried<'a, R> {
    real_in: &'a [R],
    word_in: &'a [u32],
    real_out: &'a mut [R],
    word_out: &'a mut [u32],
    pointers: &'a mut [u32],
}

/// Working memory of one sequence: δ, the next δ, pointers, transitions, log-probabilities of a step.
struct Work<'a, R> {
    d: &'a mut [R],
    next: &'a mut [R],
    from: &'a mut [u32],
    a: &'a mut [R],
    o: &'a mut [R],
}

/// hi + lo ← hi + lo + x.
#[inline(always)]
fn add_to<R: Real>(sum: &mut (R, R), x: R) {
    let s = sum.0 + x;
    let part = s - sum.0;
    sum.1 += (sum.0 - (s - part)) + (x - part);
    sum.0 = s;
}

/// The largest entry of δ, the lowest index of it.
#[inline(always)]
fn peak<R: Real>(d: &[R]) -> (R, u32) {
    let mut top = (d[0], 0);
    for (i, &x) in d.iter().enumerate().skip(1) {
        if x > top.0 {
            top = (x, i as u32);
        }
    }
    top
}

#[inline(always)]
fn walk<R: Real>(x: &Batch<'_, R>, p: &HmmViterbiParams, b: usize, k: usize, c: Carried<'_, R>, w: Work<'_, R>) {
    let (zero, dead) = (R::of(LOG_ZERO), R::of(IMPOSSIBLE));
    let length = x.length(b);
    let (from_step, stop) = (p.from_step as usize, length.min(p.to_step as usize));
    let (mut sum, mut failed, mut last) = ((R::ZERO, R::ZERO), NONE, 0);
    w.d.fill(zero);
    if from_step > 0 {
        w.d.copy_from_slice(&c.real_in[..k]);
        sum = (c.real_in[k], c.real_in[k + 1]);
        (failed, last) = (c.word_in[0], c.word_in[1]);
    }
    if !x.varies() {
        x.log_trans(b, 0, w.a);
    }
    for t in from_step..stop {
        if failed != NONE {
            break;
        }
        x.log_obs(b, t, w.o);
        if t == 0 {
            w.from.fill(0);
            for ((d, &init), &o) in w.d.iter_mut().zip(x.model(b)).zip(w.o.iter()) {
                *d = (init + o).max(zero);
            }
        } else {
            let (top, state) = peak(w.d);
            if top <= dead {
                failed = t as u32 - 1;
                break;
            }
            last = state;
            add_to(&mut sum, top);
            if x.varies() {
                x.log_trans(b, t - 1, w.a);
            }
            for j in 0..k {
                w.next[j] = w.d[0] + w.a[j];
                w.from[j] = 0;
            }
            for i in 1..k {
                for j in 0..k {
                    let candidate = w.d[i] + w.a[i * k + j];
                    if candidate > w.next[j] {
                        w.next[j] = candidate;
                        w.from[j] = i as u32;
                    }
                }
            }
            for j in 0..k {
                w.d[j] = ((w.next[j] - top) + w.o[j]).max(zero);
            }
        }
        pack(c.pointers, k, t - p.pointers_from as usize, w.from);
    }
    if failed == NONE && p.to_step as usize >= length && from_step < length {
        let (top, state) = peak(w.d);
        if top <= dead {
            failed = length as u32 - 1;
        } else {
            last = state;
            add_to(&mut sum, top);
        }
    }
    c.real_out[..k].copy_from_slice(w.d);
    (c.real_out[k], c.real_out[k + 1]) = sum;
    c.word_out.copy_from_slice(&[failed, last]);
}

/// K known to the compiler: δ and the transitions lie in registers.
fn walk_fixed<R: Real, const K: usize>(x: &Batch<'_, R>, p: &HmmViterbiParams, b: usize, c: Carried<'_, R>) {
    let (mut d, mut next, mut from, mut a, mut o) = ([R::ZERO; K], [R::ZERO; K], [0; K], [[R::ZERO; K]; K], [R::ZERO; K]);
    let work = Work { d: &mut d, next: &mut next, from: &mut from, a: a.as_flattened_mut(), o: &mut o };
    walk(x, p, b, K, c, work);
}

fn walk_any<R: Real>(x: &Batch<'_, R>, p: &HmmViterbiParams, b: usize, c: Carried<'_, R>) {
    let k = p.k as usize;
    let (mut d, mut next, mut from, mut a, mut o) = (vec![R::ZERO; k], vec![R::ZERO; k], vec![0; k], vec![R::ZERO; k * k], vec![R::ZERO; k]);
    walk(x, p, b, k, c, Work { d: &mut d, next: &mut next, from: &mut from, a: &mut a, o: &mut o });
}

/// The launch's inputs as every HMM kernel's CPU column reads them.
fn batch<'a, R: Real>(p: &HmmViterbiParams, launch: &mut CpuLaunch<'a, R>) -> Result<Batch<'a, R>> {
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    let flags = bit(p.model_row > 0, flag::MODELS)
        | bit(p.trans_row > 0, flag::TRANS_SEQUENCE)
        | bit(p.trans_step > 0, flag::TRANS_STEP)
        | bit(p.softmax > 0, flag::SOFTMAX | flag::TRANS_STEP)
        | bit(p.words_row > 0, flag::LENGTHS)
        | bit(p.words_row > 1, flag::MASKED);
    let stride = if p.model_row > 0 { p.model_row } else { p.k };
    let p = HmmParams { b: p.b, t: p.t, k: p.k, u: p.u, stride, flags, ..bytemuck::Zeroable::zeroed() };
    Ok(Batch { p, model: launch.real()?, obs: launch.real()?, words: launch.word()?, log_trans: launch.real()?, inputs: launch.real()? })
}

fn hmm_viterbi_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmViterbiParams = launch.params()?;
    let x = batch(&p, &mut launch)?;
    let (carry, ends, pointers) = (launch.real_mut()?, launch.word_mut()?, launch.word_mut()?);
    let (b, stride) = (p.b as usize, p.k as usize + 2);
    let slot = |at: u32, each: usize| at as usize * b * each..(at as usize + 1) * b * each;
    let (carry_before, ends_before) = (carry[slot(p.carry_in, stride)].to_vec(), ends[slot(p.carry_in, 2)].to_vec());
    let before = carry_before.par_chunks_exact(stride).zip(ends_before.par_chunks_exact(2));
    let after = carry[slot(p.carry_out, stride)].par_chunks_exact_mut(stride).zip(ends[slot(p.carry_out, 2)].par_chunks_exact_mut(2));
    let rows = before.zip(after).zip(pointers.par_chunks_exact_mut(p.pointer_words as usize));
    rows.enumerate().for_each(|(b, (((real_in, word_in), (real_out, word_out)), pointers))| {
        let carried = Carried { real_in, word_in, real_out, word_out, pointers };
        match p.k {
            1 => walk_fixed::<R, 1>(&x, &p, b, carried),
            2 => walk_fixed::<R, 2>(&x, &p, b, carried),
            3 => walk_fixed::<R, 3>(&x, &p, b, carried),
            4 => walk_fixed::<R, 4>(&x, &p, b, carried),
            5 => walk_fixed::<R, 5>(&x, &p, b, carried),
            6 => walk_fixed::<R, 6>(&x, &p, b, carried),
            7 => walk_fixed::<R, 7>(&x, &p, b, carried),
            8 => walk_fixed::<R, 8>(&x, &p, b, carried),
            16 => walk_fixed::<R, 16>(&x, &p, b, carried),
            _ => walk_any(&x, &p, b, carried),
        }
    });
    Ok(())
}

fn hmm_viterbi_path_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmViterbiParams = launch.params()?;
    let (carry, words, ends, pointers) = (launch.real()?, launch.word()?, launch.word()?, launch.word()?);
    let (state, path, log_prob, failed) = (launch.word_mut()?, launch.word_mut()?, launch.real_mut()?, launch.word_mut()?);
    let (b, t, k) = (p.b as usize, p.t as usize, p.k as usize);
    let slot = p.carry_in as usize * b;
    let (sums, ends) = (&carry[slot * (k + 2)..(slot + b) * (k + 2)], &ends[2 * slot..2 * (slot + b)]);
    let before = sums.par_chunks_exact(k + 2).zip(ends.par_chunks_exact(2)).zip(pointers.par_chunks_exact(p.pointer_words as usize));
    let after = state.par_iter_mut().zip(path.par_chunks_exact_mut(t)).zip(log_prob.par_chunks_exact_mut(2)).zip(failed.par_iter_mut());
    before.zip(after).enumerate().for_each(|(b, (((sums, end), pointers), (((state, path), log_prob), failed)))| {
        let length = if p.words_row > 0 { words[b * p.words_row as usize].min(p.t) } else { p.t };
        let stop = length.min(end[0]);
        if (p.from_step < length || p.from_step == 0) && length <= p.to_step {
            *failed = end[0];
            let impossible = [R::of(LOG_ZERO), R::ZERO];
            log_prob.copy_from_slice(if end[0] == NONE { &sums[k..] } else { &impossible });
        }
        if stop <= p.from_step {
            return;
        }
        if stop <= p.to_step {
            *state = end[1];
        }
        for t in (p.from_step..stop.min(p.to_step)).rev() {
            path[t as usize] = *state;
            *state = unpack(pointers, k, (t - p.pointers_from) as usize, *state as usize);
        }
    });
    Ok(())
}

// ---- op -------------------------------------------------------------------------------------------------------------------

/// Most probable paths.
#[derive(Debug, Clone)]
pub struct Viterbi {
    /// States [B,T]; 0 past a sequence's length and from its first impossible step on.
    pub path: Buffer,
    /// Log-probability of path and observations, high and low part [B,2]; see [`log_prob`].
    pub log_prob: Buffer,
    /// First impossible step, or NONE [B].
    pub failed: Buffer,
}

/// Adds high and low parts; −∞ where a sequence is impossible.
pub fn log_prob(parts: &[f64]) -> Vec<f64> {
    parts.chunks_exact(2).map(|x| if x[0] <= IMPOSSIBLE { f64::NEG_INFINITY } else { x[0] + x[1] }).collect()
}

/// Records the most probable path of every sequence. The lowest state wins every tie.
///
/// path[b,t] depends on the whole sequence: it is look-ahead, not for trading.
/// # Errors
/// Those of [`Hmm::check`]; `TooLarge` if one sequence passes what a launch can bind.
pub fn hmm_viterbi(pass: &mut Pass, hmm: &Hmm) -> Result<Viterbi> {
    hmm_viterbi_within(pass, hmm, POINTER_BYTES)
}

/// How time is cut.
struct Blocks {
    /// Steps of a block, a multiple of four.
    steps: u64,
    /// Number of blocks.
    count: u64,
    /// Whether the pointers of all steps are kept.
    kept: bool,
    /// Words of pointers per sequence.
    pointers: u64,
    /// Slots of the carry: one before and after every block, and one for what is run twice.
    slots: u64,
}

impl Blocks {
    fn of(device: &Device, hmm: &Hmm, lanes: u64, bytes: u64) -> Result<Blocks> {
        let (t, k) = (hmm.t, hmm.k);
        let each = k.div_ceil(lanes);
        let softmax = if let Transitions::Softmax { u, .. } = hmm.transitions { (u + 2) * k * if k <= SMALL { k } else { 3 * each } } else { 0 };
        // A software adapter goes through the loops of branches that it does not take, too.
        let rounds = softmax + if k <= SMALL { 12 } else { (each + 1) * (2 * k + 12) + 8 };
        let limit = device.limits().loop_rounds / rounds / 4 * 4;
        if limit == 0 {
            device.check_rounds(OP, 4 * rounds, "rounds")?;
        }
        let bytes = bytes.min(device.limits().binding_bytes);
        let kept = 4 * pointer_words(k, t) <= bytes;
        let wanted = if kept { t } else { t.isqrt() + 1 };
        let steps = wanted.next_multiple_of(4).min(limit);
        let count = t.div_ceil(steps);
        let pointers = pointer_words(k, if kept { t } else { steps.min(t) });
        Ok(Blocks { steps, count, kept, pointers, slots: count + 2 })
    }
}

/// As [`hmm_viterbi`], with back-pointers kept up to `bytes`: beyond, time is walked in blocks and all but the last are run twice.
/// The result does not depend on it.
pub fn hmm_viterbi_within(pass: &mut Pass, hmm: &Hmm, bytes: u64) -> Result<Viterbi> {
    hmm.check(OP)?;
    let device = pass.device().clone();
    let (b, t, k) = (hmm.b, hmm.t, hmm.k);
    let log_obs = if hmm.emission == Emission::LogProbabilities { hmm.obs.clone() } else { View::from(&hmm_emission(pass, hmm)?) };
    let (kernel, lanes) = if k <= SMALL { (&HMM_VITERBI, 1) } else { (&HMM_VITERBI_LANES, k.next_power_of_two().min(u64::from(WG_LANES))) };
    let blocks = Blocks::of(&device, hmm, lanes, bytes)?;
    let out = Viterbi { path: device.zeros_u32("path", b * t)?, log_prob: device.zeros("log_prob", 2 * b)?, failed: device.zeros_u32("failed", b)? };

    let carried = blocks.slots * (k + 2);
    let elements = hmm.elements().max(t * k).max(blocks.pointers).max(carried);
    let most = (bytes / (4 * (blocks.pointers + carried))).max(1);
    let planned = device.plan(OP, b, elements, lanes.div_ceil(u64::from(WG_LANES)), 3 * t * k * k)?;
    let runs = planned.into_iter().flat_map(|run| (run.start..run.end).step_by(most as usize).map(move |from| from..(from + most).min(run.end)));
    let runs: Vec<_> = runs.collect();
    let rows = runs.iter().map(|run| run.end - run.start).max().unwrap_or(0);
    let carry = device.zeros("best log-probabilities", rows * carried)?;
    let ends = device.zeros_u32("best last states", 2 * rows * blocks.slots)?;
    let (pointers, state) = (device.zeros_u32("back-pointers", rows * blocks.pointers)?, device.zeros_u32("path states", rows)?);

    for run in runs {
        let rows = run.end - run.start;
        let (shape, mut views) = shape_of(pass, hmm, &run, lanes, blocks.pointers)?;
        views[1] = pass.input(&log_obs.buffer, log_obs.range.start + run.start * t * k..log_obs.range.start + run.end * t * k)?;
        let (carry, ends) = (carry.view(0..rows * carried), ends.view(0..2 * rows * blocks.slots));
        let (pointers, state) = (pointers.view(0..rows * blocks.pointers), state.view(0..rows));
        let at = |block: u64, carry_in: u64, carry_out: u64| HmmViterbiParams {
            from_step: (block * blocks.steps) as u32,
            to_step: ((block + 1) * blocks.steps).min(t) as u32,
            carry_in: carry_in as u32,
            carry_out: carry_out as u32,
            pointers_from: if blocks.kept { 0 } else { (block * blocks.steps) as u32 },
            ..shape
        };
        let [model, obs, words, log_trans, inputs] = views;
        let forward = [model, obs, words.clone(), log_trans, inputs, carry.clone(), ends.clone(), pointers.clone()];
        for block in 0..blocks.count {
            pass.launch(kernel, &at(block, block, block + 1), &forward)?;
        }
        let path = pass.output(&out.path, run.start * t..run.end * t)?;
        let (log_prob, failed) = (pass.output(&out.log_prob, 2 * run.start..2 * run.end)?, pass.output(&out.failed, run.clone())?);
        let back = [carry, words, ends, pointers, state, path.view.clone(), log_prob.view.clone(), failed.view.clone()];
        for block in (0..blocks.count).rev() {
            if !blocks.kept && block + 1 < blocks.count {
                pass.launch(kernel, &at(block, block, blocks.count + 1), &forward)?;
            }
            pass.launch(&HMM_VITERBI_PATH, &at(block, blocks.count, blocks.count), &back)?;
        }
        for output in [path, log_prob, failed] {
            pass.finish(output)?;
        }
    }
    Ok(out)
}

/// Params without steps and slots, and the bound inputs of a run.
fn shape_of(pass: &mut Pass, hmm: &Hmm, run: &std::ops::Range<u64>, lanes: u64, pointer_words: u64) -> Result<(HmmViterbiParams, [View; 5])> {
    let bound = hmm.bind(pass, run)?;
    let has = |bits: u32| bound.params.flags & bits != 0;
    let (k, u) = (hmm.k, u64::from(bound.params.u));
    let (slots, each) = match hmm.transitions {
        Transitions::Table { per_step: true, .. } => ((hmm.t - 1).max(1), k * k),
        Transitions::Table { .. } => (1, k * k),
        Transitions::Softmax { .. } => (1, k * k * (u + 1)),
    };
    let words_row = match (has(flag::LENGTHS), has(flag::MASKED)) {
        (false, _) => 0,
        (true, false) => 1,
        (true, true) => 1 + hmm.t,
    };
    let shape = HmmViterbiParams {
        b: bound.params.b,
        t: bound.params.t,
        k: bound.params.k,
        model_row: if has(flag::MODELS) { bound.params.stride } else { 0 },
        trans_row: if has(flag::TRANS_SEQUENCE) { (slots * each) as u32 } else { 0 },
        trans_step: if has(flag::TRANS_STEP) && !has(flag::SOFTMAX) { (k * k) as u32 } else { 0 },
        softmax: u32::from(has(flag::SOFTMAX)),
        u: u as u32,
        words_row: words_row as u32,
        lanes: lanes as u32,
        pointer_words: pointer_words as u32,
        ..bytemuck::Zeroable::zeroed()
    };
    Ok((shape, bound.views))
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let hmm = hmm_of_case(device, case)?;
    let mut pass = device.pass(OP);
    let out = hmm_viterbi(&mut pass, &hmm)?;
    let (path, parts) = (pass.read(&out.path)?, pass.read(&out.log_prob)?);
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.words("path", done.u32(path)?);
    outputs.reals("log_prob", log_prob(&done.f64(parts)?).into_iter().map(|x| x.max(LOG_ZERO)).collect());
    Ok(outputs)
}
