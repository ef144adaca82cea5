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
//! Floor    32 bytes and about 500 integer instructions per set and window. The CPU column first asks, from the upper halves of the sums in
//!          f32 (16 bytes, about 20 instructions), whether a set could beat the best one so far, and takes the exact key only then.
//! Numerics exact integers.
//! Source   design of the sweep; Chan's merge is exact here because the sums are.
//! Files    shaders/walk_forward_select.wgsl · cuda/walk_forward_select.cu · reference: the `_cpu` functions

use crate::Result;
use crate::backtest::{SET_WORDS, TILE, sharpe_of};
use crate::fixed::{KEY_ZERO, RATIO_MIN, ratio_key, scaled_variance};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads_u32, writes, writes_u32};
use crate::real::Real;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

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

/// sum² / variance of the sets that have this key, with the sum's sign and the key's 25 bits; none if it is undefined.
fn ratio_of(key: u32) -> Option<f64> {
    if key == 0 || key == KEY_ZERO {
        return (key == KEY_ZERO).then_some(0.0);
    }
    let magnitude = key.abs_diff(KEY_ZERO) - 1;
    let ratio = (1.0 + f64::from(magnitude & 0x1ff_ffff) / 2f64.powi(25)) * 2f64.powi((magnitude >> 25) as i32 + RATIO_MIN);
    Some(if key < KEY_ZERO { -ratio } else { ratio })
}

/// What a slot has chosen so far.
struct Slot<'a> {
    best: &'a mut [u32],
    chosen: &'a mut [u32],
    /// Exact sums of its set, if it is of this launch.
    sums: Option<(i64, u64)>,
    winner: Option<usize>,
}

impl Slot<'_> {
    /// Takes a set if its key is larger.
    fn offer(&mut self, p: &SelectParams, n: u64, set: usize, sum: i64, squares: u64) {
        // Without squares there is no ratio, and equal sums have equal keys.
        if self.best[1] != NONE && (squares == 0 || self.sums == Some((sum, squares))) {
            return;
        }
        let key = score_key(n, sum, squares, p.shift);
        if self.best[1] == NONE || key > self.best[0] {
            (self.best[0], self.best[1]) = (key, p.first + set as u32);
            (self.sums, self.winner) = (Some((sum, squares)), Some(set));
        }
    }
}

/// Marks the sets of a tile that could beat a ratio, from the upper halves of their sums alone: both are known to one unit.
struct Candidates<'a> {
    from: &'a [u32],
    to: &'a [u32],
    n: f64,
    shift: u32,
    ratio: f64,
    excess: &'a mut [f32; TILE],
}

impl WithSimd for Candidates<'_> {
    /// Whether there are any.
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> bool {
        let (sums_from, sums_to) = (plane(self.from, 1), plane(self.to, 1));
        let (squares_from, squares_to) = (plane(self.from, 3), plane(self.to, 3));
        let (unit, ratio) = ((self.n * 2f64.powi(self.shift as i32 - 32)) as f32, self.ratio as f32);
        // Far more than the roundings of f32, relative to both sides.
        let (margin, rising) = (1e-5f32, self.ratio >= 0.0);
        let mut any = 0u32;
        for l in 0..TILE {
            let sum = sums_to[l].wrapping_sub(sums_from[l]) as i32 as f32;
            let square = unit * squares_to[l].wrapping_sub(squares_from[l]) as i32 as f32;
            // Sum below `top` and above `−bottom`; the variance between `least` and `most`.
            let (top, far) = (sum + 1.0, sum.abs() + 1.0);
            let near = (sum.abs() - 1.0).max(0.0);
            let (least, most) = (square - unit - far * far, square + unit - near * near);
            let reach = top * top.abs();
            let other = ratio * if rising { least } else { most };
            let excess = reach - other + margin * (reach.abs() + (ratio * (square + unit)).abs());
            self.excess[l] = excess;
            any |= u32::from(excess > 0.0) | u32::from(excess.is_nan());
        }
        any != 0
    }
}

/// Exact sums of a tile in a window over some assets.
struct AddAssets<'a> {
    p: &'a SelectParams,
    prefix: &'a [u32],
    assets: Range<usize>,
    tile: usize,
    span: &'a [u32],
    sum: &'a mut [i64; TILE],
    square: &'a mut [u64; TILE],
}

impl WithSimd for AddAssets<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for a in self.assets {
            let (from, to) = (edge(self.p, self.prefix, a, self.tile, self.span[0]), edge(self.p, self.prefix, a, self.tile, self.span[1]));
            let pair = |w: &[u32], k: usize, l: usize| u64::from(w[k * TILE + l]) | (u64::from(w[(k + 1) * TILE + l]) << 32);
            for l in 0..TILE {
                self.sum[l] += pair(to, 0, l).wrapping_sub(pair(from, 0, l)) as i64;
                self.square[l] += pair(to, 2, l).wrapping_sub(pair(from, 2, l));
            }
        }
    }
}

#[inline(always)]
fn plane(words: &[u32], k: usize) -> &[u32; TILE] {
    words[k * TILE..].first_chunk().unwrap_or(&[0; TILE])
}

/// Words of a tile before an edge.
fn edge<'a>(p: &SelectParams, prefix: &'a [u32], a: usize, tile: usize, edge: u32) -> &'a [u32] {
    &prefix[((a * p.tiles as usize + tile) * p.edges as usize + edge as usize) * 4 * TILE..][..4 * TILE]
}

fn walk_forward_select_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: SelectParams = launch.params()?;
    let (prefix, spans, sets) = (launch.word()?, launch.word()?, launch.word()?);
    let (best, chosen) = (launch.word_mut()?, launch.word_mut()?);
    let (w, pooled) = (p.w as usize, p.pooled as usize);
    let slots = best.chunks_exact_mut(2).zip(chosen.chunks_exact_mut(SET_WORDS)).take(p.a as usize / pooled * w);
    let mut slots: Vec<Slot<'_>> = slots.map(|(best, chosen)| Slot { best, chosen, sums: None, winner: None }).collect();
    // Some windows of one slot of assets at a time, tile by tile: a tile's prefixes stay in the cache.
    let some = w.div_ceil(rayon::current_num_threads()).max(1);
    let jobs = slots.chunks_mut(w.max(1)).enumerate().flat_map(|(i, slots)| slots.chunks_mut(some).enumerate().map(move |(k, slots)| (i, k * some, slots)));
    jobs.collect::<Vec<_>>().into_par_iter().for_each(|(i, first, slots)| {
        for tile in 0..p.tiles as usize {
            for (k, slot) in slots.iter_mut().enumerate() {
                let span = &spans[4 * (first + k)..][..4];
                offer_tile(&p, prefix, i * pooled..(i + 1) * pooled, tile, span, slot);
            }
        }
        for slot in slots {
            if let Some(set) = slot.winner {
                slot.chosen.copy_from_slice(&sets[set * SET_WORDS..(set + 1) * SET_WORDS]);
            }
        }
    });
    Ok(())
}

/// Offers the sets of a tile to a slot, in order.
fn offer_tile(p: &SelectParams, prefix: &[u32], assets: Range<usize>, tile: usize, span: &[u32], slot: &mut Slot<'_>) {
    let (arch, n) = (Arch::new(), u64::from(span[2]) * u64::from(p.pooled));
    let sets = tile * TILE..p.sets as usize;
    if p.pooled == 1 {
        let (from, to) = (edge(p, prefix, assets.start, tile, span[0]), edge(p, prefix, assets.start, tile, span[1]));
        let mut excess = [f32::INFINITY; TILE];
        let ratio = if slot.best[1] == NONE { None } else { ratio_of(slot.best[0]) };
        if let Some(ratio) = ratio
            && !arch.dispatch(Candidates { from, to, n: n as f64, shift: p.shift, ratio, excess: &mut excess })
        {
            return;
        }
        for (_, set) in excess.iter().zip(sets).filter(|(excess, _)| **excess > 0.0 || excess.is_nan()) {
            let (sum, squares) = between(p, prefix, assets.start, set, span[0], span[1]);
            slot.offer(p, n, set, sum, squares);
        }
        return;
    }
    let (mut sum, mut square) = ([0; TILE], [0; TILE]);
    arch.dispatch(AddAssets { p, prefix, assets, tile, span, sum: &mut sum, square: &mut square });
    // Close to the best one in f64: the exact key decides.
    let unit = n as f64 * 2f64.powi(p.shift as i32);
    for (l, set) in sets.take(TILE).enumerate() {
        let close = if slot.best[1] == NONE { None } else { ratio_of(slot.best[0]) }.unwrap_or(f64::NEG_INFINITY);
        let s = sum[l] as f64;
        let ratio = s * s.abs() / (unit * square[l] as f64 - s * s);
        if ratio > close - close.abs() * 1e-6 || ratio.is_nan() {
            slot.offer(p, n, set, sum[l], square[l]);
        }
    }
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::philox::philox4x32;
    use crate::{Device, View};

    /// The choice of all sets by their exact keys, one after the other.
    fn by_keys(p: &SelectParams, prefix: &[u32], spans: &[u32], slot: usize) -> [u32; 2] {
        let span = &spans[4 * (slot % p.w as usize)..][..4];
        let mut best = [0, NONE];
        for set in 0..p.sets as usize {
            let (sum, squares) = between(p, prefix, slot / p.w as usize, set, span[0], span[1]);
            let key = score_key(u64::from(span[2]), sum, squares, p.shift);
            if best[1] == NONE || key > best[0] {
                best = [key, p.first + set as u32];
            }
        }
        best
    }

    #[test]
    fn the_filter_loses_no_winner() {
        let (a, w, tiles, edges) = (2usize, 5usize, 3usize, 6usize);
        let p = SelectParams { a: a as u32, pooled: 1, w: w as u32, tiles: tiles as u32, edges: edges as u32, sets: 180, first: 7, shift: 50 };
        // From sums of all signs to losses alone, many of them equal, some sets without trades.
        for (seed, drift) in [(1u32, 0i64), (2, 1 << 44), (3, -(1 << 46)), (4, -(1 << 40))] {
            let mut prefix = vec![0u32; a * tiles * edges * 4 * TILE];
            for tile in 0..a * tiles {
                for l in 0..TILE {
                    let (mut sum, mut squares) = (0i64, 0u64);
                    for e in 0..edges {
                        let words = philox4x32([(tile * TILE + l / 3) as u32, e as u32, seed, 0], [1, 2]);
                        let x = (words[0] % 1024) as i64 - 512;
                        if l % 11 != 5 {
                            sum += (x << 36) + drift;
                            squares += (1 << 42) + (u64::from(words[1]) << 8);
                        }
                        for (k, word) in [sum as u32, (sum >> 32) as u32, squares as u32, (squares >> 32) as u32].into_iter().enumerate() {
                            prefix[((tile * edges + e) * 4 + k) * TILE + l] = word;
                        }
                    }
                }
            }
            let spans: Vec<u32> = (0..w as u32).flat_map(|i| [i, 5, 21 * (5 - i), 0]).collect();
            let device = Device::open("cpu").unwrap();
            let u = |x: &[u32]| device.upload_u32("x", x).unwrap();
            let (best, chosen) = (u(&[0, NONE].repeat(a * w)), device.zeros_u32("chosen", (a * w * SET_WORDS) as u64).unwrap());
            let buffers = [u(&prefix), u(&spans), u(&vec![0; tiles * TILE * SET_WORDS]), best.clone(), chosen];
            let args: Vec<View> = buffers.iter().map(View::from).collect();
            let mut pass = device.pass("test");
            pass.launch(&WALK_FORWARD_SELECT, &p, &args).unwrap();
            let read = pass.read(&best).unwrap();
            let got = pass.submit().unwrap().u32(read).unwrap();
            for (slot, got) in got.chunks_exact(2).enumerate() {
                assert_eq!(got, by_keys(&p, &prefix, &spans, slot), "seed {seed}, slot {slot}");
                let ratio = ratio_of(got[0]).unwrap();
                assert!(crate::fixed::ratio_key_of(ratio.abs(), ratio < 0.0).abs_diff(got[0]) <= 1, "key {} of {ratio}", got[0]);
            }
        }
    }
}
