//! Walk-forward selection inside the pass: the best set of every window and asset, or of every window over all assets.
//!
//! The Sharpe ratio of set s in a window is a function of two exact prefix differences (see `backtest.rs`), so no window is simulated
//! again. Sets are ordered by the key of sum²/variance with the sum's sign; the larger key wins, then the lower index; an undefined
//! ratio never wins unless all are, then the lowest index is taken. Keys are integers: every device chooses the same set from the
//! same sums. Pooled selection takes the bars of all assets as one sample.
//!
//! Shapes   prefix [A,tiles,E,4,TILE]; spans [W,4]: first and last edge, bars, 0; for `walk_forward_scores` [W,2,4] train then test;
//!          sets [tiles·TILE, 16]; best [slots,W,2] (key, index) and chosen [slots,W,16] carry over between chunks of sets;
//!          scores [A,W,2,tiles·TILE] per-bar Sharpe ratios, train then test.
//! Launch   `walk_forward_select`: one workgroup per (slot, window), threads stride over sets, tree of (key, index).
//!          `walk_forward_scores`: one thread per (asset, window, set), only when asked for.
//! Scratch  none.
//! Floor    32 bytes and about 500 integer instructions per set and window (the CPU column filters by f64 and takes the exact key
//!          only where two sets are close).
//! Numerics exact integers.
//! Source   design of the sweep; Chan's merge is exact here because the sums are.
//! Files    shaders/walk_forward_select.wgsl · cuda/walk_forward_select.cu · reference: the `_cpu` functions

use crate::Result;
use crate::backtest::{SET_WORDS, TILE, sharpe_of};
use crate::fixed::{ratio_key, scaled_variance};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads_u32, writes, writes_u32};
use crate::real::Real;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

params! {
    /// Params of both kernels.
    pub struct SelectParams {
        /// Assets in `prefix`.
        a: u32,
        /// Assets per slot: 1, or all of them.
        pooled: u32,
        /// Windows.
        w: u32,
        /// Tiles of sets.
        tiles: u32,
        /// Edges.
        edges: u32,
        /// Sets that are real; the rest of the last tile is padding.
        sets: u32,
        /// Index of the first set of this chunk among all sets.
        first: u32,
        /// Fractional bits of the fixed-point sums.
        shift: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 128;
/// No set has been chosen yet.
pub const NONE: u32 = u32::MAX;

fn params(words: &[u32]) -> SelectParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn slots(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.a / p.pooled.max(1)) * u64::from(p.w)
}

fn evaluations(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.a) * u64::from(p.w) * u64::from(p.sets)
}

/// The best set of every window.
pub static WALK_FORWARD_SELECT: Kernel = Kernel {
    name: "walk_forward_select",
    about: "best set of every window, per asset or pooled",
    args: &[reads_u32("prefix"), reads_u32("spans"), reads_u32("sets"), writes_u32("best"), writes_u32("chosen")],
    params: layout::<SelectParams>(),
    workgroup: WG,
    constants: &[],
    groups: slots,
    wgsl: wgsl!("walk_forward_select"),
    cuda: cuda!("walk_forward_select"),
    cpu: Some(Cpu { f32: walk_forward_select_cpu::<f32>, f64: walk_forward_select_cpu::<f64> }),
    cost: Cost { unit: "set-window", units: evaluations, bytes: 32.0, flops: 500.0 },
};

/// Sharpe ratio of every set in every train and test window.
pub static WALK_FORWARD_SCORES: Kernel = Kernel {
    name: "walk_forward_scores",
    about: "train and test Sharpe ratio of every set and window",
    args: &[reads_u32("prefix"), reads_u32("spans"), writes("scores")],
    params: layout::<SelectParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| {
        let p = params(words);
        (u64::from(p.a) * u64::from(p.w) * u64::from(p.tiles) * TILE as u64).div_ceil(u64::from(WG))
    },
    wgsl: wgsl!("walk_forward_select"),
    cuda: cuda!("walk_forward_select"),
    cpu: Some(Cpu { f32: walk_forward_scores_cpu::<f32>, f64: walk_forward_scores_cpu::<f64> }),
    cost: Cost { unit: "set-window", units: evaluations, bytes: 72.0, flops: 500.0 },
};

/// Exact sums between two edges of one asset and set.
fn between(p: &SelectParams, prefix: &[u32], a: usize, set: usize, from: u32, to: u32) -> (i64, u64) {
    let tile = (a * p.tiles as usize + set / TILE) * p.edges as usize;
    let word = |edge: u32, k: usize| u64::from(prefix[((tile + edge as usize) * 4 + k) * TILE + set % TILE]);
    let pair = |edge: u32, k: usize| word(edge, k) | (word(edge, k + 1) << 32);
    (pair(to, 0).wrapping_sub(pair(from, 0)) as i64, pair(to, 2).wrapping_sub(pair(from, 2)))
}

/// Order of Sharpe ratios as a key; 0 if undefined.
fn score_key(n: u64, sum: i64, squares: u64, shift: u32) -> u32 {
    let variance = if n < 2 { 0 } else { scaled_variance(n, sum, squares, shift) };
    let size = u128::from(sum.unsigned_abs());
    if variance == 0 { 0 } else { ratio_key(size * size, variance, sum < 0) }
}

/// Exact sums of a tile in a window, and their f64 ratio sum·|sum| / (n·squares − sum²).
struct TileSums {
    sum: [i64; TILE],
    square: [u64; TILE],
    ratio: [f64; TILE],
}

impl TileSums {
    fn new() -> TileSums {
        TileSums { sum: [0; TILE], square: [0; TILE], ratio: [0.0; TILE] }
    }
}

/// Fills [`TileSums`], all lanes at once.
struct AddAssets<'a> {
    p: &'a SelectParams,
    prefix: &'a [u32],
    assets: std::ops::Range<usize>,
    tile: usize,
    span: &'a [u32],
    n: f64,
    sums: &'a mut TileSums,
}

impl WithSimd for AddAssets<'_> {
    /// The highest ratio; NaN if any is.
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        for a in self.assets {
            let base = (a * self.p.tiles as usize + self.tile) * self.p.edges as usize;
            let words = |edge: u32| &self.prefix[(base + edge as usize) * 4 * TILE..][..4 * TILE];
            let (from, to) = (words(self.span[0]), words(self.span[1]));
            let pair = |w: &[u32], k: usize, l: usize| u64::from(w[k * TILE + l]) | (u64::from(w[(k + 1) * TILE + l]) << 32);
            for l in 0..TILE {
                self.sums.sum[l] += pair(to, 0, l).wrapping_sub(pair(from, 0, l)) as i64;
                self.sums.square[l] += pair(to, 2, l).wrapping_sub(pair(from, 2, l));
            }
        }
        let unit = self.n * 2f64.powi(self.p.shift as i32);
        for l in 0..TILE {
            let s = self.sums.sum[l] as f64;
            self.sums.ratio[l] = s * s.abs() / (unit * self.sums.square[l] as i64 as f64 - s * s);
        }
        let (mut highest, mut undefined) = ([f64::NEG_INFINITY; 8], [false; 8]);
        for ratios in self.sums.ratio.chunks_exact(8) {
            for (l, &ratio) in ratios.iter().enumerate() {
                highest[l] = if ratio > highest[l] { ratio } else { highest[l] };
                undefined[l] |= ratio.is_nan();
            }
        }
        if undefined.contains(&true) { f64::NAN } else { highest.into_iter().fold(f64::NEG_INFINITY, f64::max) }
    }
}

fn walk_forward_select_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: SelectParams = launch.params()?;
    let (prefix, spans, sets) = (launch.word()?, launch.word()?, launch.word()?);
    let (best, chosen) = (launch.word_mut()?, launch.word_mut()?);
    let (w, pooled, arch) = (p.w as usize, p.pooled as usize, Arch::new());
    let slots = best.par_chunks_exact_mut(2).zip(chosen.par_chunks_exact_mut(SET_WORDS)).enumerate();
    slots.take(p.a as usize / pooled * w).for_each(|(slot, (best, chosen))| {
        let span = &spans[4 * (slot % w)..][..4];
        let assets = slot / w * pooled..(slot / w + 1) * pooled;
        let n = u64::from(span[2]) * u64::from(p.pooled);
        let mut winner: Option<usize> = None;
        let mut close = f64::NEG_INFINITY;
        for tile in 0..p.tiles as usize {
            let mut sums = TileSums::new();
            let highest = arch.dispatch(AddAssets { p: &p, prefix, assets: assets.clone(), tile, span, n: n as f64, sums: &mut sums });
            if best[1] != NONE && !highest.is_nan() && highest <= close - close.abs() * 1e-6 {
                continue;
            }
            for l in 0..TILE.min(p.sets as usize - tile * TILE) {
                // An f64 ratio first; the exact key only for what could win.
                let ratio = sums.ratio[l];
                if ratio.is_nan() || ratio > close - close.abs() * 1e-6 || best[1] == NONE {
                    let (key, set) = (score_key(n, sums.sum[l], sums.square[l], p.shift), tile * TILE + l);
                    if best[1] == NONE || key > best[0] {
                        (best[0], best[1]) = (key, p.first + set as u32);
                        winner = Some(set);
                        close = if key > 0 { ratio } else { f64::NEG_INFINITY };
                    }
                }
            }
        }
        if let Some(set) = winner {
            chosen.copy_from_slice(&sets[set * SET_WORDS..(set + 1) * SET_WORDS]);
        }
    });
    Ok(())
}

fn walk_forward_scores_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: SelectParams = launch.params()?;
    let (prefix, spans, scores) = (launch.word()?, launch.word()?, launch.real_mut()?);
    let (w, sets) = (p.w as usize, p.tiles as usize * TILE);
    let n = p.a as usize * w;
    scores[..n * 2 * sets].par_chunks_exact_mut(2 * sets).enumerate().for_each(|(i, out)| {
        let (a, window) = (i / w, i % w);
        for part in 0..2 {
            let span = &spans[4 * (2 * window + part)..][..4];
            for set in 0..sets {
                let (sum, squares) = between(&p, prefix, a, set, span[0], span[1]);
                out[part * sets + set] = R::of(sharpe_of(u64::from(span[2]), sum, squares, p.shift));
            }
        }
    });
    Ok(())
}
