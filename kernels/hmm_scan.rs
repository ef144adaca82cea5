//! Forward-backward of few, long sequences: an associative scan over time.
//!
//! Step t is the matrix M(t) = A(t−1)·diag(b(t)) (M(0) has init·b(0) in every row; past the length it is the identity). Products of runs
//! of steps are elements: K rows, each scaled by a power of two of its own, kept as an exponent.
//! ```text
//! up     chunks of L steps: row i of the product is the forward recursion from state i      RADIX chunks make a group, and so on
//! down   α at the start and β at the end of every child, from those of its group: vector · element, element · vector
//! back   the recursion of kernels/hmm.rs inside every chunk, from its α; then backwards from γ = α∘β of its last step
//! ```
//! The longest chain is 2·L + L + 2·RADIX per level instead of 2·T: some 450 steps for T = 1,000,000.
//!
//! Shapes   inputs and results as in kernels/hmm.rs, transitions as tables, K ≤ STATES; elements [B, ΣC, K, K+1] (row, exponent), vectors
//!          [B, ΣC, 2, K] (α, β), records [B,C,4] (log-likelihood high and low, first impossible step or −1).
//! Launch   `hmm_scan_chunks` and `hmm_scan_merge` a thread per row of a matrix, `hmm_scan_down` a thread per group and direction,
//!          `hmm_scan_forward` and `hmm_scan_backward` a thread per chunk, `hmm_scan_sum` a thread per sequence. Rows never meet: no
//!          barrier but for the table that the CUDA column keeps in shared memory.
//! Scratch  elements and vectors: K·(K + 3)·4 bytes per chunk of L = 64 steps, 1/RADIX more for the levels above.
//! Floor    the work is (K + 3) / 3 of the sequential one: 2·K³ flops per step up, 2·K² forward, 4·K² backward.
//! Crossover [`wins`]: where a thread (or some lanes) per sequence would leave most of the device idle; a constant per kind of device.
//! Numerics as in kernels/hmm.rs: probabilities, powers of two; a step whose sum falls below 2⁻⁶⁰ is redone in logarithms with a whole power of
//!          two taken out, so that the rows of one element keep their ratios. Equal to the sequential result within 1e-5. As there, what is
//!          below 2⁻¹²⁶ of its row is zero.
//!          The WGSL column indexes its vectors by variables, which drivers may keep in memory; the CUDA column is unrolled.
//! Source   Hassan, Särkkä, García-Fernández 2021, IEEE Trans. Signal Process. 69, arXiv:2102.05743; Blelloch 1990 (up and down).
//! Files    shaders/hmm_scan.wgsl · cuda/hmm_scan.cu · reference: the `_cpu` functions, against `log_space`

use crate::device::{Buffer, Device, DeviceKind, Pass, View};
use crate::hmm::{Compensated, Emission, ForwardBackward, Hmm, IMPOSSIBLE, LOG_ZERO, MOST, Pair, SUMMARY, Transitions, Wanted, exponent_of, hmm_emission};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of the six kernels.
    pub struct HmmScanParams {
        /// Sequences.
        b: u32,
        /// Steps.
        t: u32,
        /// States.
        k: u32,
        /// Reals from one sequence's model to the next one's; 0: shared.
        model_row: u32,
        /// Reals from one sequence's transitions to the next one's; 0: shared.
        trans_row: u32,
        /// Reals from one step's transitions to the next one's; 0: constant.
        trans_step: u32,
        /// Words per sequence: 0 none, 1 lengths, more: masks too.
        words_row: u32,
        /// Steps of a chunk.
        chunk: u32,
        /// Chunks of a sequence.
        chunks: u32,
        /// Elements of the lower level, per sequence.
        children: u32,
        /// Elements of the upper level, per sequence.
        groups: u32,
        /// First real of the lower level, in `elements` (merge) or `vectors` (down).
        child_at: u32,
        /// First real of the upper level there.
        group_at: u32,
        /// First real of the lower level in `elements` (down).
        element_at: u32,
        /// Section of `states` for filtered probabilities, or NONE.
        filtered: u32,
        /// Section for predicted probabilities, or NONE.
        predicted: u32,
        /// Section for posterior probabilities, or NONE.
        posterior: u32,
        /// Section that holds α between the passes.
        park: u32,
        /// 1: the upper level is the whole sequence.
        root: u32,
        /// Reals of `summary` per sequence.
        record: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;
/// Most states.
pub const SCAN_STATES: u64 = 16;
/// Elements that make one of the next level.
const RADIX: u64 = 32;
/// Steps of a chunk.
const CHUNK: u64 = 64;
/// No section.
const NONE: u32 = u32::MAX;
/// Exponent of a row without any possible path.
const DEAD: i32 = -(1 << 24);
/// A step whose sum is below this is done again in logarithms.
const RETRY: f64 = 1.0 / (1u64 << 60) as f64;

const OP: &str = "hmm_scan";
const CONSTANTS: &[(&str, u32)] = &[("STATES", SCAN_STATES as u32), ("RADIX", RADIX as u32)];

fn params(words: &[u32]) -> HmmScanParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn chunk_count(words: &[u32]) -> u64 {
    u64::from(params(words).b) * u64::from(params(words).chunks)
}

fn group_count(words: &[u32]) -> u64 {
    u64::from(params(words).b) * u64::from(params(words).groups)
}

fn steps(words: &[u32]) -> u64 {
    u64::from(params(words).b) * u64::from(params(words).t)
}

/// Row of the product of a chunk's steps, from every state.
pub static HMM_SCAN_CHUNKS: Kernel = Kernel {
    name: "hmm_scan_chunks",
    about: "products of the steps of every chunk of time",
    args: &[reads("model"), reads("obs"), reads_u32("words"), reads("log_trans"), writes("elements")],
    params: layout::<HmmScanParams>(),
    workgroup: WG,
    constants: CONSTANTS,
    groups: |words| (chunk_count(words) * u64::from(params(words).k)).div_ceil(u64::from(WG)),
    wgsl: wgsl!("hmm_scan"),
    cuda: cuda!("hmm_scan"),
    cpu: Some(Cpu { f32: hmm_scan_chunks_cpu::<f32>, f64: hmm_scan_chunks_cpu::<f64> }),
    // At K = 4.
    cost: Cost { unit: "sequence-step", units: steps, bytes: 18.0, flops: 220.0 },
};

/// Products of groups.
pub static HMM_SCAN_MERGE: Kernel = Kernel {
    name: "hmm_scan_merge",
    about: "products of the elements of every group",
    args: &[writes("elements")],
    groups: |words| (group_count(words) * u64::from(params(words).k)).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_scan_merge_cpu::<f32>, f64: hmm_scan_merge_cpu::<f64> }),
    cost: Cost { unit: "group", units: group_count, bytes: 2600.0, flops: 4000.0 },
    ..HMM_SCAN_CHUNKS
};

/// Vectors at the edges of the elements of every group.
pub static HMM_SCAN_DOWN: Kernel = Kernel {
    name: "hmm_scan_down",
    about: "forward and backward vectors at the edges of every element",
    args: &[writes("elements"), writes("vectors")],
    groups: |words| (2 * group_count(words)).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_scan_down_cpu::<f32>, f64: hmm_scan_down_cpu::<f64> }),
    cost: Cost { unit: "group", units: group_count, bytes: 3600.0, flops: 2000.0 },
    ..HMM_SCAN_CHUNKS
};

/// Filtered and predicted probabilities of every chunk.
pub static HMM_SCAN_FORWARD: Kernel = Kernel {
    name: "hmm_scan_forward",
    about: "filtered and predicted probabilities and log-likelihood of every chunk",
    args: &[reads("model"), reads("obs"), reads_u32("words"), reads("log_trans"), reads("vectors"), writes("states"), writes("records")],
    groups: |words| chunk_count(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_scan_forward_cpu::<f32>, f64: hmm_scan_forward_cpu::<f64> }),
    cost: Cost { unit: "sequence-step", units: steps, bytes: 32.0, flops: 80.0 },
    ..HMM_SCAN_CHUNKS
};

/// Log-likelihoods of the sequences.
pub static HMM_SCAN_SUM: Kernel = Kernel {
    name: "hmm_scan_sum",
    about: "log-likelihood and first impossible step of every sequence",
    args: &[reads("records"), writes("summary")],
    groups: |words| u64::from(params(words).b).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_scan_sum_cpu::<f32>, f64: hmm_scan_sum_cpu::<f64> }),
    cost: Cost { unit: "chunk", units: chunk_count, bytes: 16.0, flops: 14.0 },
    ..HMM_SCAN_CHUNKS
};

/// Posterior probabilities of every chunk.
pub static HMM_SCAN_BACKWARD: Kernel = Kernel {
    name: "hmm_scan_backward",
    about: "posterior probabilities of every chunk",
    args: &[reads_u32("words"), reads("log_trans"), reads("vectors"), reads("summary"), writes("states")],
    groups: |words| chunk_count(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hmm_scan_backward_cpu::<f32>, f64: hmm_scan_backward_cpu::<f64> }),
    cost: Cost { unit: "sequence-step", units: steps, bytes: 32.0, flops: 90.0 },
    ..HMM_SCAN_CHUNKS
};

// ---- CPU ------------------------------------------------------------------------------------------------------------------

/// 2^n; 0 below the normal numbers of f32.
fn pow2<R: Real>(n: i32) -> R {
    if n < -126 { R::ZERO } else { R::of(2f64.powi(n.min(127))) }
}

fn length_of(p: &HmmScanParams, words: &[u32], b: usize) -> usize {
    if p.words_row == 0 { p.t as usize } else { words[b * p.words_row as usize].min(p.t) as usize }
}

fn probability<R: Real>(x: R) -> R {
    if x <= R::of(IMPOSSIBLE) { R::ZERO } else { x.exp() }
}

/// Probabilities of the transitions into step t ≥ 1 of sequence b.
fn load<R: Real>(p: &HmmScanParams, log_trans: &[R], b: usize, t: usize, a: &mut [R]) {
    let at = b * p.trans_row as usize + (t - 1) * p.trans_step as usize;
    a.iter_mut().zip(&log_trans[at..]).for_each(|(a, &x)| *a = probability(x));
}

/// pred = v·A.
fn predict<R: Real>(v: &[R], a: &[R], pred: &mut [R]) {
    pred.fill(R::ZERO);
    for (&v, row) in v.iter().zip(a.chunks_exact(pred.len())) {
        pred.iter_mut().zip(row).for_each(|(x, &a)| *x += v * a);
    }
}

/// The steps of the recursion: model, observations, transitions.
#[derive(Clone, Copy)]
struct Steps<'a, R> {
    p: &'a HmmScanParams,
    model: &'a [R],
    obs: &'a [R],
    words: &'a [u32],
    log_trans: &'a [R],
}

/// Vectors of one thread.
struct Own<R> {
    v: Vec<R>,
    pred: Vec<R>,
    a: Vec<R>,
    log_b: Vec<R>,
}

impl<R: Real> Own<R> {
    fn new(k: usize) -> Own<R> {
        let zeros = |n: usize| vec![R::ZERO; n];
        Own { v: zeros(k), pred: zeros(k), a: zeros(k * k), log_b: zeros(k) }
    }
}

impl<R: Real> Steps<'_, R> {
    /// pred of step t from v.
    fn predict(&self, b: usize, t: usize, own: &mut Own<R>) {
        if t == 0 {
            let init = &self.model[b * self.p.model_row as usize..];
            own.pred.iter_mut().zip(init).for_each(|(x, &init)| *x = probability(init));
            return;
        }
        if self.p.trans_step > 0 {
            load(self.p, self.log_trans, b, t, &mut own.a);
        }
        predict(&own.v, &own.a, &mut own.pred);
    }

    /// v = pred·b / (2^e·exp(shift)) with a sum in [1, 2); gives e and the shift, or DEAD where no state is possible.
    fn observe(&self, b: usize, t: usize, own: &mut Own<R>) -> (i32, R) {
        let (k, row) = (self.p.k as usize, self.p.words_row as usize);
        let at = (b * self.p.t as usize + t) * k;
        if row > 1 && self.words[b * row + 1 + t] == 0 {
            own.log_b.fill(R::ZERO);
        } else {
            own.log_b.iter_mut().zip(&self.obs[at..at + k]).for_each(|(out, x)| *out = x.min(R::of(MOST)));
        }
        let shift = own.log_b.iter().fold(R::of(LOG_ZERO), |m, &x| m.max(x));
        let mut sum = R::ZERO;
        for j in 0..k {
            own.v[j] = own.pred[j] * if own.log_b[j] <= R::of(IMPOSSIBLE) { R::ZERO } else { (own.log_b[j] - shift).exp() };
            sum += own.v[j];
        }
        let mut n = 0;
        if sum < R::of(RETRY) {
            for j in 0..k {
                let possible = own.pred[j] > R::ZERO && own.log_b[j] > R::of(IMPOSSIBLE);
                own.v[j] = if possible { (own.log_b[j] - shift) + own.pred[j].ln() } else { R::of(LOG_ZERO) };
            }
            let top = own.v.iter().fold(R::of(LOG_ZERO), |m, &x| m.max(x));
            if top <= R::of(IMPOSSIBLE) {
                own.v.fill(R::ZERO);
                return (DEAD, shift);
            }
            n = (top.f64().max(-1e6) * std::f64::consts::LOG2_E).floor() as i32;
            let out = if top < R::of(-1e6) { top } else { R::of(f64::from(n) * std::f64::consts::LN_2) };
            own.v.iter_mut().for_each(|x| *x = if *x <= R::of(IMPOSSIBLE) { R::ZERO } else { (*x - out).exp() });
            sum = own.v.iter().copied().sum();
        }
        let (e, scale) = exponent_of(sum);
        own.v.iter_mut().for_each(|x| *x *= scale);
        (n + e, shift)
    }
}

fn hmm_scan_chunks_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmScanParams = launch.params()?;
    let steps = Steps { p: &p, model: launch.real()?, obs: launch.real()?, words: launch.word()?, log_trans: launch.real()? };
    let (k, chunk, chunks) = (p.k as usize, p.chunk as usize, p.chunks as usize);
    let elements = launch.real_mut()?;
    elements.par_chunks_exact_mut(k * (k + 1)).enumerate().take(p.b as usize * chunks).for_each(|(at, element)| {
        let (b, c) = (at / chunks, at % chunks);
        let stop = length_of(&p, steps.words, b).min((c + 1) * chunk);
        let mut own = Own::new(k);
        load(&p, steps.log_trans, b, 1, &mut own.a);
        for (row, out) in element.chunks_exact_mut(k + 1).enumerate() {
            own.v.fill(R::ZERO);
            own.v[row] = R::ONE;
            let mut e = 0;
            for t in c * chunk..stop {
                steps.predict(b, t, &mut own);
                let (more, _) = steps.observe(b, t, &mut own);
                if more == DEAD {
                    e = DEAD;
                    break;
                }
                e += more;
            }
            out[..k].copy_from_slice(&own.v);
            out[k] = R::of(f64::from(e.max(DEAD)));
        }
    });
    Ok(())
}

fn exponent<R: Real>(element: &[R], k: usize, i: usize) -> i32 {
    element[i * (k + 1) + k].f64() as i32
}

/// v ← v·element; gives the exponent taken out, relative to the largest of the element's rows.
fn times_element<R: Real>(element: &[R], v: &mut [R], out: &mut [R]) -> i32 {
    let k = v.len();
    let largest = (0..k).map(|i| exponent(element, k, i)).fold(DEAD, i32::max);
    let top = (0..k).filter(|&i| v[i] > R::ZERO).map(|i| exponent(element, k, i)).fold(DEAD, i32::max);
    out.fill(R::ZERO);
    for i in (0..k).filter(|&i| v[i] > R::ZERO) {
        let x = v[i] * pow2(exponent(element, k, i) - top);
        out.iter_mut().zip(&element[i * (k + 1)..]).for_each(|(out, &m)| *out += x * m);
    }
    let sum: R = out.iter().copied().sum();
    if sum <= R::of(1e-37) {
        v.fill(R::ZERO);
        return DEAD;
    }
    let (e, scale) = exponent_of(sum);
    v.iter_mut().zip(&*out).for_each(|(v, &x)| *v = x * scale);
    e + top - largest
}

/// v ← element·v.
fn element_times<R: Real>(element: &[R], v: &mut [R], out: &mut [R]) {
    let k = v.len();
    for (out, row) in out.iter_mut().zip(element.chunks_exact(k + 1)) {
        *out = row.iter().zip(&*v).fold(R::ZERO, |sum, (&m, &x)| sum + m * x);
    }
    let top = (0..k).filter(|&i| out[i] > R::ZERO).map(|i| exponent(element, k, i)).fold(DEAD, i32::max);
    for i in 0..k {
        v[i] = if out[i] > R::ZERO { out[i] * pow2(exponent(element, k, i) - top) } else { R::ZERO };
    }
    let most = v.iter().fold(R::ZERO, |m, &x| m.max(x));
    if most > R::of(1e-37) {
        let (_, scale) = exponent_of(most);
        v.iter_mut().for_each(|x| *x *= scale);
    }
}

fn hmm_scan_merge_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmScanParams = launch.params()?;
    let (k, children, groups) = (p.k as usize, p.children as usize, p.groups as usize);
    // The upper level lies behind the lower one.
    let (lower, upper) = launch.real_mut()?.split_at_mut(p.group_at as usize);
    let (lower, each) = (&lower[p.child_at as usize..], k * (k + 1));
    upper.par_chunks_exact_mut(each).enumerate().take(p.b as usize * groups).for_each(|(at, element)| {
        let (b, g) = (at / groups, at % groups);
        let (mut v, mut out) = (vec![R::ZERO; k], vec![R::ZERO; k]);
        let last = ((g + 1) * RADIX as usize).min(children);
        for (row, result) in element.chunks_exact_mut(k + 1).enumerate() {
            v.fill(R::ZERO);
            v[row] = R::ONE;
            let mut e = 0;
            for c in g * RADIX as usize..last {
                let more = times_element(&lower[(b * children + c) * each..][..each], &mut v, &mut out);
                if more == DEAD {
                    e = DEAD;
                    break;
                }
                e += more;
            }
            result[..k].copy_from_slice(&v);
            result[k] = R::of(f64::from(e.max(DEAD)));
        }
    });
    Ok(())
}

fn hmm_scan_down_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmScanParams = launch.params()?;
    let (elements, vectors) = (&*launch.real_mut()?, launch.real_mut()?);
    let (k, children, groups) = (p.k as usize, p.children as usize, p.groups as usize);
    // The lower level lies before the upper one.
    let split = if p.root > 0 { vectors.len() } else { p.group_at as usize };
    let (lower, upper) = vectors.split_at_mut(split);
    let lower = &mut lower[p.child_at as usize..][..p.b as usize * children * 2 * k];
    lower.par_chunks_exact_mut(children * 2 * k).enumerate().for_each(|(b, lower)| {
        let (mut v, mut out) = (vec![R::ZERO; k], vec![R::ZERO; k]);
        for (g, own) in lower.chunks_mut(RADIX as usize * 2 * k).enumerate() {
            let (first, count) = (g * RADIX as usize, own.len() / (2 * k));
            for back in [false, true] {
                if p.root > 0 {
                    v.fill(if back { R::ONE } else { R::ZERO });
                    v[0] = R::ONE;
                } else {
                    v.copy_from_slice(&upper[((b * groups + g) * 2 + usize::from(back)) * k..][..k]);
                }
                for n in 0..count {
                    let c = if back { count - 1 - n } else { n };
                    own[(2 * c + usize::from(back)) * k..][..k].copy_from_slice(&v);
                    let element = &elements[p.element_at as usize + (b * children + first + c) * k * (k + 1)..][..k * (k + 1)];
                    if back {
                        element_times(element, &mut v, &mut out);
                    } else {
                        times_element(element, &mut v, &mut out);
                    }
                }
            }
        }
    });
    Ok(())
}

/// The sections of `states` cut into chunks of time: [sequence·chunk][section].
fn cut<'a, R>(p: &HmmScanParams, states: &'a mut [R]) -> Vec<Vec<&'a mut [R]>> {
    let (b, t, k) = (p.b as usize, p.t as usize, p.k as usize);
    let mut out: Vec<Vec<&mut [R]>> = (0..b * p.chunks as usize).map(|_| Vec::new()).collect();
    for section in states.chunks_exact_mut(b * t * k) {
        let pieces = section.chunks_exact_mut(t * k).flat_map(|sequence| sequence.chunks_mut(p.chunk as usize * k));
        out.iter_mut().zip(pieces).for_each(|(out, piece)| out.push(piece));
    }
    out
}

fn hmm_scan_forward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmScanParams = launch.params()?;
    let steps = Steps { p: &p, model: launch.real()?, obs: launch.real()?, words: launch.word()?, log_trans: launch.real()? };
    let (vectors, states, records) = (launch.real()?, launch.real_mut()?, launch.real_mut()?);
    let (k, chunk, chunks) = (p.k as usize, p.chunk as usize, p.chunks as usize);
    let keeps = p.filtered != NONE || p.posterior != NONE;
    let pieces = cut(&p, states).into_par_iter().zip(records.par_chunks_exact_mut(4)).enumerate();
    pieces.for_each(|(at, (mut sections, record))| {
        let (b, c) = (at / chunks, at % chunks);
        let stop = length_of(&p, steps.words, b).min((c + 1) * chunk);
        let mut own = Own::new(k);
        load(&p, steps.log_trans, b, 1, &mut own.a);
        own.v.copy_from_slice(&vectors[2 * at * k..][..k]);
        let start: R = own.v.iter().copied().sum();
        let (mut total, mut sum, mut failed) = (Compensated::new(), R::ONE, R::of(-1.0));
        if start > R::ZERO {
            own.v.iter_mut().for_each(|x| *x = *x / start);
        } else if c * chunk < stop {
            failed = R::of((c * chunk) as f64);
        }
        for t in c * chunk..stop {
            if failed >= R::ZERO {
                break;
            }
            steps.predict(b, t, &mut own);
            let row = (t - c * chunk) * k;
            if p.predicted != NONE {
                sections[p.predicted as usize][row..row + k].iter_mut().zip(&own.pred).for_each(|(out, &x)| *out = x / sum);
            }
            let (e, shift) = steps.observe(b, t, &mut own);
            if e == DEAD {
                failed = R::of(t as f64);
                break;
            }
            sum = own.v.iter().copied().sum();
            total.add(shift);
            total.add(R::of(f64::from(e)) * R::of(0.693_359_375));
            total.add(R::of(f64::from(e)) * R::of(std::f64::consts::LN_2 - 0.693_359_375));
            if keeps {
                sections[p.park as usize][row..row + k].iter_mut().zip(&own.v).for_each(|(out, &x)| *out = x / sum);
            }
        }
        total.add(sum.ln());
        let (high, low) = total.parts();
        record.copy_from_slice(&[high, low, failed, R::ZERO]);
    });
    Ok(())
}

fn hmm_scan_sum_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmScanParams = launch.params()?;
    let (records, summary) = (launch.real()?, launch.real_mut()?);
    let rows = records.chunks_exact(4 * p.chunks as usize).zip(summary.chunks_exact_mut(p.record as usize));
    for (records, summary) in rows.take(p.b as usize) {
        let (mut total, mut failed) = (Compensated::new(), R::of(-1.0));
        for record in records.chunks_exact(4) {
            total.add(record[0]);
            total.add(record[1]);
            failed = if failed < R::ZERO { record[2] } else { failed };
        }
        let (high, low) = total.parts();
        let value = if failed < R::ZERO { [high, low] } else { [R::of(LOG_ZERO), R::ZERO] };
        summary[..4].copy_from_slice(&[value[0], value[1], failed, R::ZERO]);
    }
    Ok(())
}

fn hmm_scan_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmScanParams = launch.params()?;
    let (words, log_trans, vectors, summary) = (launch.word()?, launch.real()?, launch.real()?, launch.real()?);
    let (k, chunk, chunks) = (p.k as usize, p.chunk as usize, p.chunks as usize);
    cut(&p, launch.real_mut()?).into_par_iter().enumerate().for_each(|(at, mut sections)| {
        let (b, c) = (at / chunks, at % chunks);
        let stop = length_of(&p, words, b).min((c + 1) * chunk);
        let possible = summary[b * p.record as usize + 2] < R::ZERO;
        let mut own = Own::new(k);
        let mut gamma = vec![R::ZERO; k];
        load(&p, log_trans, b, 1, &mut own.a);
        for t in (c * chunk..stop).rev() {
            let row = (t - c * chunk) * k;
            own.v.fill(R::ZERO);
            if possible {
                own.v.copy_from_slice(&sections[p.park as usize][row..row + k]);
            }
            if t + 1 == stop {
                own.v.iter_mut().zip(&vectors[(2 * at + 1) * k..]).for_each(|(v, &beta)| *v *= beta);
            } else {
                if p.trans_step > 0 {
                    load(&p, log_trans, b, t + 1, &mut own.a);
                }
                predict(&own.v, &own.a, &mut own.pred);
                own.pred.iter_mut().zip(&gamma).for_each(|(x, &gamma)| *x = if *x > R::ZERO { gamma / *x } else { R::ZERO });
                for (v, a) in own.v.iter_mut().zip(own.a.chunks_exact(k)) {
                    *v *= a.iter().zip(&own.pred).fold(R::ZERO, |sum, (&a, &x)| sum + a * x);
                }
            }
            let sum: R = own.v.iter().copied().sum();
            for j in 0..k {
                gamma[j] = if sum > R::ZERO { own.v[j] / sum } else { R::ZERO };
                sections[p.posterior as usize][row + j] = gamma[j];
            }
        }
    });
    Ok(())
}

// ---- op -------------------------------------------------------------------------------------------------------------------

/// Shortest series for which the scan's launches are worth it.
const LONG: u64 = 4096;
/// Sequences of three states up to which a GPU is taken to be idle in the sequential kernel.
const IDLE_GPU: u64 = 512;

/// Whether the scan is taken: the sequential kernel would leave the device idle, and the scan's (K + 3) / 3 times as much work does not
/// eat up what it gains.
///
/// `cpu`: a sequence runs on one thread, the scan on all: where B·(K + 3)/3 stays below half the number of threads. By the count of work, so
/// two threads never take it. GPU: up to 512 sequences of three states, fewer of more: a thread (or eight) each is little beside tens of
/// thousands. Both wait for measurements on machines with more cores and on cards: `cargo test --test hmm crossover -- --ignored` prints
/// them. Software adapters never take it: on llvmpipe with two cores it was slower at every size tried (0.97 of the sequential kernel's speed at
/// B 1, K 2, T 4,096, down to 0.1 at B 8). Nor does `reference`, which is the truth.
pub fn wins(device: &Device, hmm: &Hmm, wanted: Wanted) -> bool {
    if !able(device, hmm, wanted) || hmm.t < LONG {
        return false;
    }
    let threads = rayon::current_num_threads() as u64;
    match device.info().kind {
        DeviceKind::Cpu => 2 * hmm.b * (hmm.k + 3) <= 3 * threads,
        DeviceKind::Wgpu | DeviceKind::Cuda if !device.info().software => hmm.b * (hmm.k + 3) <= 3 * IDLE_GPU,
        _ => false,
    }
}

/// Elements of every level per sequence, from the chunks up.
fn levels(t: u64) -> Vec<u64> {
    let mut levels = vec![t.div_ceil(CHUNK)];
    while let Some(&last) = levels.last().filter(|&&n| n > RADIX) {
        levels.push(last.div_ceil(RADIX));
    }
    levels
}

/// Whether the scan can do it at all: tables, few states, no pairs, everything within one binding.
fn able(device: &Device, hmm: &Hmm, wanted: Wanted) -> bool {
    let sections = u64::from(wanted.filtered) + u64::from(wanted.predicted) + u64::from(wanted.posterior);
    let elements: u64 = levels(hmm.t).iter().sum::<u64>() * hmm.k * (hmm.k + 1);
    let largest = hmm.b * (sections * hmm.t * hmm.k).max(elements).max(hmm.elements());
    // A software adapter goes through the loops of branches that it does not take, too.
    let loops = (CHUNK * (2 * hmm.k * hmm.k + 10 * hmm.k + 16)).max(RADIX * (2 * hmm.k * hmm.k + 12 * hmm.k + 8)).max(2 * levels(hmm.t)[0]);
    matches!(hmm.transitions, Transitions::Table { .. })
        && loops <= device.limits().loop_rounds
        && (1..=SCAN_STATES).contains(&hmm.k)
        && wanted.pair == Pair::None
        && largest <= (device.limits().binding_bytes / 4).min(u64::from(u32::MAX))
}

/// Records forward-backward by the scan, whatever [`wins`] says.
/// # Errors
/// Those of [`Hmm::check`]; `Parameter` for what the scan does not do: pair posteriors, softmax transitions, more than 16 states.
pub fn hmm_scan(pass: &mut Pass, hmm: &Hmm, wanted: Wanted) -> Result<ForwardBackward> {
    hmm_scan_with(pass, hmm, wanted, SUMMARY)
}

/// As [`hmm_scan`], with room for `record` reals per sequence in the summary.
pub(crate) fn hmm_scan_with(pass: &mut Pass, hmm: &Hmm, wanted: Wanted, record: u64) -> Result<ForwardBackward> {
    hmm.check(OP)?;
    let device = pass.device().clone();
    if !able(&device, hmm, wanted) {
        let help = "it takes tables, up to 16 states, no pair posteriors, and what fits into one binding; use hmm_forward_backward".into();
        return Err(Error::Parameter { op: OP, name: "scan over time".into(), value: format!("B {}, T {}, K {}", hmm.b, hmm.t, hmm.k), help });
    }
    let (b, t, k) = (hmm.b, hmm.t, hmm.k);
    let log_obs = if hmm.emission == Emission::LogProbabilities { hmm.obs.clone() } else { View::from(&hmm_emission(pass, hmm)?) };
    let obs = pass.input(&log_obs.buffer, log_obs.range.clone())?;
    let bound = hmm.bind(pass, &(0..b))?;
    let [model, _, words, log_trans, _] = bound.views;
    let levels = levels(t);

    let per_step = matches!(hmm.transitions, Transitions::Table { per_step: true, .. });
    let per_sequence = matches!(hmm.transitions, Transitions::Table { per_sequence: true, .. });
    let mut section = 0;
    let mut place = |wanted: bool| {
        let at = if wanted { section } else { NONE };
        section += u32::from(wanted);
        at
    };
    let (filtered, predicted, posterior) = (place(wanted.filtered), place(wanted.predicted), place(wanted.posterior));
    let shape = HmmScanParams {
        b: b as u32,
        t: t as u32,
        k: k as u32,
        model_row: if hmm.per_sequence { hmm.stride() as u32 } else { 0 },
        trans_row: if per_sequence { (k * k * if per_step { (t - 1).max(1) } else { 1 }) as u32 } else { 0 },
        trans_step: if per_step { (k * k) as u32 } else { 0 },
        words_row: if hmm.words.is_none() { 0 } else { 1 + if hmm.masked { t as u32 } else { 0 } },
        chunk: CHUNK as u32,
        chunks: levels[0] as u32,
        filtered,
        predicted,
        posterior,
        park: if filtered != NONE { filtered } else { posterior },
        record: record as u32,
        ..bytemuck::Zeroable::zeroed()
    };
    let buffer = |label: &str, each: u64, count: u64| device.zeros(label, (b * each * count).max(1));
    let all: u64 = levels.iter().sum();
    let (elements, vectors) = (buffer("scan elements", k * (k + 1), all)?, buffer("scan vectors", 2 * k, all)?);
    let states = buffer("states", t * k, u64::from(section))?;
    let (records, summary) = (buffer("scan records", 4, levels[0])?, device.zeros("hmm summary", record * b)?);
    let view = |x: &Buffer| View::from(x);

    pass.launch(&HMM_SCAN_CHUNKS, &shape, &[model.clone(), obs.clone(), words.clone(), log_trans.clone(), view(&elements)])?;
    let start = |level: usize, each: u64| (b * each * levels[..level].iter().sum::<u64>()) as u32;
    for l in 1..levels.len() {
        let part = HmmScanParams {
            children: levels[l - 1] as u32,
            groups: levels[l] as u32,
            child_at: start(l - 1, k * (k + 1)),
            group_at: start(l, k * (k + 1)),
            ..shape
        };
        pass.launch(&HMM_SCAN_MERGE, &part, &[view(&elements)])?;
    }
    for l in (0..levels.len()).rev() {
        let root = l + 1 == levels.len();
        let part = HmmScanParams {
            children: levels[l] as u32,
            groups: if root { 1 } else { levels[l + 1] as u32 },
            child_at: start(l, 2 * k),
            group_at: if root { 0 } else { start(l + 1, 2 * k) },
            element_at: start(l, k * (k + 1)),
            root: u32::from(root),
            ..shape
        };
        pass.launch(&HMM_SCAN_DOWN, &part, &[view(&elements), view(&vectors)])?;
    }
    let lowest = vectors.view(0..b * levels[0] * 2 * k);
    pass.launch(&HMM_SCAN_FORWARD, &shape, &[model, obs, words.clone(), log_trans.clone(), lowest.clone(), view(&states), view(&records)])?;
    pass.launch(&HMM_SCAN_SUM, &shape, &[view(&records), view(&summary)])?;
    if wanted.posterior {
        pass.launch(&HMM_SCAN_BACKWARD, &shape, &[words, log_trans, lowest, view(&summary), view(&states)])?;
    }
    let result = |section: u32| (section != NONE).then(|| states.view(u64::from(section) * b * t * k..(u64::from(section) + 1) * b * t * k));
    Ok(ForwardBackward { filtered: result(filtered), predicted: result(predicted), posterior: result(posterior), pair: None, summary, record })
}
