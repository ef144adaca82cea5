//! The lane-wise f32 column of `hmm_expectation`: one (model, sequence) per lane, 16 at a time, for normal emissions with independent
//! dimensions and 2 to 6 states. Plain arrays of lanes; the compiler makes vectors of them for the widest unit that the processor has.
//! The plain column is `expectation` in `hmm_baum_welch.rs`; the recursion is that of shaders/hmm_baum_welch.wgsl.
//!
//! Layout   a tile's observations are transposed into [T,D,lane], α goes into [T,K,lane] (T = 1,000, K = 3: 192 KB, second-level cache).
//! Ragged   a lane whose sequence is over keeps its α; its γ is zero until the backward pass reaches its last step.
//! Bits     every operation is per lane: a sequence's bits depend neither on its lane nor on its neighbours.

use crate::hmm::{IMPOSSIBLE, LEAST, LOG_ZERO};
use crate::hmm_baum_welch::BaumWelchParams;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Lanes of a tile.
const L: usize = 16;
/// Steps that are summed before they are added to the total.
const BLOCK: usize = 64;
/// Most bytes of α per worker.
const MEMORY: usize = 64 << 20;
/// Below this a probability is zero.
const TINY: f32 = 1e-37;

type V = [f32; L];

/// What the launch holds.
pub(crate) struct Launch<'a> {
    pub(crate) p: BaumWelchParams,
    pub(crate) obs: &'a [f32],
    pub(crate) words: &'a [u32],
    pub(crate) parameters: &'a [f32],
    pub(crate) model: &'a [f32],
    /// Reals of `parameters` and of `model` per model, and of `statistics` per job.
    pub(crate) widths: [usize; 3],
}

/// Whether a launch has a lane-wise version: a matter of its shape alone, so that no split of the batch changes a bit.
pub(crate) fn fits(p: &BaumWelchParams) -> bool {
    p.emission == 1 && (2..=6).contains(&p.k) && p.t as usize * (p.k + p.d) as usize * L * 4 <= MEMORY
}

/// Runs the jobs of `rows`: (job, its statistics).
pub(crate) fn run(launch: &Launch<'_>, rows: &mut [(usize, &mut [f32])]) {
    let arch = Arch::new();
    let (t, k, d) = (launch.p.t as usize, launch.p.k as usize, launch.p.d as usize);
    let memory = || Memory {
        alpha: vec![[0.0; L]; t * k],
        x: vec![[0.0; L]; t * d],
        seen: vec![[0.0; L]; if launch.p.masked != 0 { t } else { 0 }],
        packed: vec![[0.0; L]; 2 * k * d],
        sums: vec![[0.0; L]; 2 * k * (1 + 2 * d)],
    };
    rows.par_chunks_mut(L).for_each_init(memory, |memory, rows| arch.dispatch(Tile { launch, rows, memory }));
}

/// Memory of one worker.
struct Memory {
    /// α [T,K].
    alpha: Vec<V>,
    /// Observations [T,D].
    x: Vec<V>,
    /// 1 where a step was observed [T]; empty without masks.
    seen: Vec<V>,
    /// Means [K,D], then 1/deviations [K,D].
    packed: Vec<V>,
    /// Sums of a block [K,1+2D], then the totals.
    sums: Vec<V>,
}

struct Tile<'a, 'b, 'c, 'd> {
    launch: &'a Launch<'b>,
    rows: &'a mut [(usize, &'d mut [f32])],
    memory: &'c mut Memory,
}

impl WithSimd for Tile<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.launch.p.k {
            2 => self.run::<2>(),
            3 => self.run::<3>(),
            4 => self.run::<4>(),
            5 => self.run::<5>(),
            _ => self.run::<6>(),
        }
    }
}

// ---- functions of lanes -----------------------------------------------------------------------------------------------------

/// e^x for x ≤ 0; zero below −87.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.max(-88.0).mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, x.max(-88.0)));
    let p = r.mul_add(1.984_127e-4, 1.388_888_9e-3);
    let p = r.mul_add(p, 8.333_334e-3);
    let p = r.mul_add(p, 4.166_666_8e-2);
    let p = r.mul_add(p, 0.166_666_67);
    let p = r.mul_add(p, 0.5);
    let p = r.mul_add(p, 1.0);
    let p = r.mul_add(p, 1.0);
    let power = f32::from_bits((shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

/// ln x of a normal positive number.
#[inline(always)]
fn ln(x: f32) -> f32 {
    // The mantissa lies between √½ and √2.
    let raw = x.to_bits().wrapping_add(0x4a_fb0d);
    let e = ((raw >> 23) as i32 - 127) as f32;
    let m = f32::from_bits((raw & 0x7f_ffff).wrapping_add(0x3f35_04f3));
    let s = (m - 1.0) / (m + 1.0);
    let q = s * s;
    let tail = q * q.mul_add(q.mul_add(q.mul_add(0.111_111_11, 0.142_857_15), 0.2), 0.333_333_34);
    e.mul_add(0.693_145_75, e.mul_add(1.428_606_8e-6, 2.0 * s.mul_add(tail, s)))
}

/// Adds z to the sum of two.
#[inline(always)]
fn compensated(sum: &mut V, low: &mut V, z: &V) {
    for l in 0..L {
        let next = sum[l] + z[l];
        let part = next - sum[l];
        low[l] += (sum[l] - (next - part)) + (z[l] - part);
        sum[l] = next;
    }
}

/// Mantissa in [1, 2) and exponent of a normal positive number.
#[inline(always)]
fn split(x: f32) -> (f32, f32) {
    let bits = x.to_bits();
    (f32::from_bits((bits & 0x7f_ffff) | 0x3f80_0000), ((bits >> 23) as i32 - 127) as f32)
}

/// pred(j) = Σ_i α(i)·A(i,j).
#[inline(always)]
fn predict<const K: usize>(alpha: &[V; K], a: &[[V; K]; K]) -> [V; K] {
    let mut out = [[0.0; L]; K];
    for i in 0..K {
        for j in 0..K {
            for l in 0..L {
                out[j][l] = alpha[i][l].mul_add(a[i][j][l], out[j][l]);
            }
        }
    }
    out
}

#[inline(always)]
fn total<const K: usize>(x: &[V; K]) -> V {
    let mut sum = x[0];
    for j in 1..K {
        for l in 0..L {
            sum[l] += x[j][l];
        }
    }
    sum
}

/// K vectors of a slice.
#[inline(always)]
fn load<const K: usize>(from: &[V], at: usize) -> [V; K] {
    std::array::from_fn(|j| from[at + j])
}

// ---- a tile -------------------------------------------------------------------------------------------------------------------

/// The models of a tile and the lengths of its sequences.
struct Models<const K: usize> {
    init: [V; K],
    trans: [[V; K]; K],
    constant: [V; K],
    lengths: [usize; L],
}

impl Tile<'_, '_, '_, '_> {
    #[inline(always)]
    fn run<const K: usize>(self) {
        let Tile { launch, rows, memory } = self;
        let models = gather::<K>(launch, rows, memory);
        let (sum, low, failed) = forward(launch, &models, memory);
        let (gamma, pairs) = backward(launch, &models, memory);
        let (each, width) = (1 + 2 * launch.p.d as usize, launch.widths[2]);
        let totals = &memory.sums[K * each..];
        for (l, (_, out)) in rows.iter_mut().enumerate() {
            for i in 0..K {
                out[i] = gamma[i][l];
                for j in 0..K {
                    out[K + i * K + j] = pairs[i][j][l] * models.trans[i][j][l];
                }
            }
            for e in 0..K * each {
                out[K + K * K + e] = totals[e][l];
            }
            let summary = if failed[l] < 0.0 { [sum[l], low[l], -1.0] } else { [LOG_ZERO as f32, 0.0, failed[l]] };
            out[width - 3..].copy_from_slice(&summary);
        }
    }
}

/// Transposes a tile. Lanes without a job repeat the first one's model over no steps.
#[inline(always)]
fn gather<const K: usize>(launch: &Launch<'_>, rows: &[(usize, &mut [f32])], memory: &mut Memory) -> Models<K> {
    let p = &launch.p;
    let (t, d) = (p.t as usize, p.d as usize);
    let each = if p.masked != 0 { 1 + t } else { 1 };
    let mut models = Models { init: [[0.0; L]; K], trans: [[[0.0; L]; K]; K], constant: [[0.0; L]; K], lengths: [0; L] };
    for l in 0..L {
        let job = rows[if l < rows.len() { l } else { 0 }].0;
        let (m, q) = (job / p.per_model as usize, job % p.per_model as usize);
        let n = m / p.restarts as usize * p.per_model as usize + q;
        let natural = &launch.parameters[m * launch.widths[0]..];
        let packed = &launch.model[m * launch.widths[1] + K..];
        for i in 0..K {
            models.init[i][l] = natural[i];
            models.constant[i][l] = packed[2 * K * d + i];
            for j in 0..K {
                models.trans[i][j][l] = natural[K + i * K + j];
            }
        }
        for e in 0..2 * K * d {
            memory.packed[e][l] = packed[e];
        }
        if l < rows.len() {
            models.lengths[l] = launch.words[n * each].min(p.t) as usize;
        }
        let x = &launch.obs[n * t * d..(n + 1) * t * d];
        for (to, &from) in memory.x.iter_mut().zip(x).take(models.lengths[l] * d) {
            to[l] = from;
        }
        if p.masked != 0 {
            for (to, &from) in memory.seen.iter_mut().zip(&launch.words[n * each + 1..(n + 1) * each]) {
                to[l] = if from != 0 { 1.0 } else { 0.0 };
            }
        }
    }
    models
}

/// α of every step; log-likelihood as a sum of two, and the first impossible step or −1.
#[inline(always)]
fn forward<const K: usize>(launch: &Launch<'_>, models: &Models<K>, memory: &mut Memory) -> (V, V, V) {
    let (d, masked) = (launch.p.d as usize, launch.p.masked != 0);
    let (mut sum, mut low, mut failed) = ([0.0; L], [0.0; L], [-1.0; L]);
    let (mut alpha, mut mass) = (models.init, [1.0; L]);
    let longest = models.lengths.iter().copied().max().unwrap_or(0);
    let shortest = models.lengths.iter().copied().min().unwrap_or(0);
    for t in 0..longest {
        let mut level = if t == 0 { alpha } else { predict(&alpha, &models.trans) };
        let mut scale = [1.0; L];
        if t > 0 {
            for l in 0..L {
                scale[l] = 1.0 / mass[l];
            }
        }
        let mut mantissa = [[0.0; L]; K];
        let mut shift = [LOG_ZERO as f32; L];
        for j in 0..K {
            let mut log_b = [0.0; L];
            for i in 0..d {
                let (mean, inverse, x) = (&memory.packed[j * d + i], &memory.packed[(K + j) * d + i], &memory.x[t * d + i]);
                for l in 0..L {
                    let z = ((x[l] - mean[l]) * inverse[l]).clamp(-1e14, 1e14);
                    log_b[l] = z.mul_add(z, log_b[l]);
                }
            }
            for l in 0..L {
                log_b[l] = log_b[l].mul_add(-0.5, models.constant[j][l]).max(LEAST as f32);
            }
            if masked {
                for l in 0..L {
                    log_b[l] *= memory.seen[t][l];
                }
            }
            // Both sides of every choice are computed: a branch per lane would keep the loop from becoming vectors.
            for l in 0..L {
                let log = log_b[l];
                let predicted = level[j][l] * scale[l];
                let (m, e) = split(predicted);
                let possible = predicted >= TINY;
                mantissa[j][l] = if possible { m } else { 0.0 };
                level[j][l] = if possible { e.mul_add(std::f32::consts::LN_2, log) } else { LOG_ZERO as f32 };
                shift[l] = shift[l].max(level[j][l]);
            }
        }
        let mut next = [[0.0; L]; K];
        for j in 0..K {
            for l in 0..L {
                next[j][l] = mantissa[j][l] * exp(level[j][l] - shift[l]);
            }
        }
        let next_mass = total(&next);
        // Lanes that are over, or impossible from here on, stay as they are.
        let mut live = [1.0; L];
        if t >= shortest || shift.iter().any(|s| *s <= IMPOSSIBLE as f32) {
            for l in 0..L {
                let runs = t < models.lengths[l];
                failed[l] = if runs && failed[l] < 0.0 && shift[l] <= IMPOSSIBLE as f32 { t as f32 } else { failed[l] };
                live[l] = if runs && failed[l] < 0.0 { 1.0 } else { 0.0 };
            }
        }
        for j in 0..K {
            for l in 0..L {
                alpha[j][l] = if live[l] > 0.0 { next[j][l] } else { alpha[j][l] };
            }
        }
        let mut logs = [0.0; L];
        for l in 0..L {
            mass[l] = if live[l] > 0.0 { next_mass[l] } else { mass[l] };
            shift[l] *= live[l];
        }
        for l in 0..L {
            logs[l] = ln(mass[l]) * live[l];
        }
        compensated(&mut sum, &mut low, &shift);
        compensated(&mut sum, &mut low, &logs);
        memory.alpha[t * K..(t + 1) * K].copy_from_slice(&alpha);
    }
    (sum, low, failed)
}

/// γ of the first step and the sums over pairs; the states' sums are left in `memory`.
#[inline(always)]
fn backward<const K: usize>(launch: &Launch<'_>, models: &Models<K>, memory: &mut Memory) -> ([V; K], [[V; K]; K]) {
    let (d, masked) = (launch.p.d as usize, launch.p.masked != 0);
    let each = 1 + 2 * d;
    let (block, totals) = memory.sums.split_at_mut(K * each);
    block.fill([0.0; L]);
    totals.fill([0.0; L]);
    let mut pairs = [[[0.0; L]; K]; K];
    let mut pair_block = pairs;
    let mut gamma = [[0.0; L]; K];
    let longest = models.lengths.iter().copied().max().unwrap_or(0);
    let shortest = models.lengths.iter().copied().min().unwrap_or(0);
    for t in (0..longest).rev() {
        if t + 1 >= shortest {
            // Here begins the backward pass of the lanes whose last step this is.
            let alpha: [V; K] = load(&memory.alpha, t * K);
            let mass = total(&alpha);
            for l in 0..L {
                if t + 1 == models.lengths[l] {
                    (0..K).for_each(|j| gamma[j][l] = alpha[j][l] / mass[l]);
                }
            }
        }
        for j in 0..K {
            let mut weight = gamma[j];
            if masked {
                for l in 0..L {
                    weight[l] = if memory.seen[t][l] > 0.0 { weight[l] } else { 0.0 };
                }
            }
            let sums = &mut block[j * each..(j + 1) * each];
            for l in 0..L {
                sums[0][l] += weight[l];
            }
            for i in 0..d {
                let (mean, x) = (&memory.packed[j * d + i], &memory.x[t * d + i]);
                let mut first = sums[1 + i];
                let mut second = sums[1 + d + i];
                for l in 0..L {
                    // What a lane that is over holds is old, but finite.
                    let dev = x[l] - mean[l];
                    let weighted = weight[l] * dev;
                    first[l] += weighted;
                    second[l] = weighted.mul_add(dev, second[l]);
                }
                sums[1 + i] = first;
                sums[1 + d + i] = second;
            }
        }
        if t > 0 {
            let alpha: [V; K] = load(&memory.alpha, (t - 1) * K);
            let mut ratio = predict(&alpha, &models.trans);
            for j in 0..K {
                for l in 0..L {
                    ratio[j][l] = if ratio[j][l] >= TINY { gamma[j][l] / ratio[j][l] } else { 0.0 };
                }
            }
            for i in 0..K {
                let mut inner = [0.0; L];
                for j in 0..K {
                    for l in 0..L {
                        pair_block[i][j][l] = alpha[i][l].mul_add(ratio[j][l], pair_block[i][j][l]);
                        inner[l] = models.trans[i][j][l].mul_add(ratio[j][l], inner[l]);
                    }
                }
                for l in 0..L {
                    gamma[i][l] = alpha[i][l] * inner[l];
                }
            }
            let mass = total(&gamma);
            let mut scale = [0.0; L];
            for l in 0..L {
                scale[l] = 1.0 / mass[l].max(TINY);
            }
            for j in 0..K {
                for l in 0..L {
                    gamma[j][l] *= scale[l];
                }
            }
        }
        if t.is_multiple_of(BLOCK) {
            for i in 0..K {
                for j in 0..K {
                    for l in 0..L {
                        pairs[i][j][l] += pair_block[i][j][l];
                    }
                }
            }
            pair_block = [[[0.0; L]; K]; K];
            for (total, x) in totals.iter_mut().zip(block.iter_mut()) {
                for l in 0..L {
                    total[l] += x[l];
                }
                *x = [0.0; L];
            }
        }
    }
    (gamma, pairs)
}
