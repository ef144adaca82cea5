//! How much of the best of many trials is luck: deflated Sharpe ratio and probability of back-test overfitting.
//!
//! Per bar, with s the Sharpe ratio of a trial (n−1), n its bars, g₃ and g₄ its skewness and kurtosis (not excess):
//! ```text
//! probabilistic_sharpe(s*) = Φ((s − s*)·√(n−1) / √(1 − g₃·s + (g₄−1)/4·s²))
//! expected_max_sharpe      = sd·((1−γ)·Z(1 − 1/N) + γ·Z(1 − 1/(N·e))),  sd the deviation (n−1) of the ratios of N trials, γ = 0.5772…
//! deflated_sharpe          = probabilistic_sharpe(expected_max_sharpe)
//! minimum_track_record     = 1 + (1 − g₃·s + (g₄−1)/4·s²)·(Z(level) / (s − s*))²   bars
//! ```
//! CSCV: time is cut into `splits` contiguous blocks, the first T mod splits of them one bar longer. Each of the C(splits, splits/2) ways to
//! call half of the blocks in sample picks the trial with the highest Sharpe ratio there; its rank r among the S trials in the other
//! half gives ω = r/(S+1) and the logit λ = ln(ω/(1−ω)). pbo is the share of combinations with λ ≤ 0: the choice did no better
//! than the median trial. Equal ratios share their mean rank; in sample the lowest index wins. An undefined ratio never wins and
//! ranks below every other.
//!
//! Shapes   returns [S,T]; sums [splits,4,S] (sum and sum of squares of each block, low and high words); masks [C], bit b for block b in
//!          sample; best [C,3] (key, trial, key out of sample) and counts [C,2] (trials below and level with it), both carried over
//!          between runs of trials.
//! Launch   `cscv_blocks`: one workgroup per trial. `cscv_best`, `cscv_rank`: one workgroup per combination, threads stride over trials.
//!          Moments come from the `performance` kernel; ratios, ranks and logits are finished on the host in f64.
//! Scratch  sums, 16·splits bytes per trial.
//! Floor    4·T bytes per trial once, then 16·splits bytes (from cache) and about 1,000 integer instructions per trial and combination.
//!          The CPU column takes the exact key only where two trials are close, and an f64 ratio elsewhere.
//! Numerics returns are scaled by their row's largest exponent to fixed point and summed exactly, so every device picks the same trials
//!          and counts the same ranks, bit for bit; ratios nearer than 2⁻²⁵ are level. A deviation below 2⁻¹⁰ of the root mean square counts as none.
//! Source   Bailey & López de Prado 2012, J. Risk 15(2) (probabilistic ratio, track record); 2014, J. Portfolio Management 40(5)
//!          (deflated ratio); Bailey, Borwein, López de Prado & Zhu 2015, J. Computational Finance 20(4) (CSCV).
//! Files    shaders/multiple_testing.wgsl · cuda/multiple_testing.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, Pass, Read, View};
use crate::fixed::{exponent, ratio_key, scaled_variance, to_fixed};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes_u32};
use crate::performance::{Performance, STATISTICS, normal_cdf, performance, probabilistic_sharpe};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the three kernels.
    pub struct CscvParams {
        /// Trials of this launch.
        n: u32,
        /// Bars.
        t: u32,
        /// Blocks that time is cut into.
        splits: u32,
        /// Fractional bits of the fixed-point sums.
        shift: u32,
        /// Combinations of this launch.
        combinations: u32,
        /// Index of the first trial of this launch among all trials.
        first: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 128;
/// Most blocks: C(20, 10) = 184,756 combinations.
pub const MAX_SPLITS: u32 = 20;
/// No trial has been chosen yet.
pub const NONE: u32 = u32::MAX;
/// Instructions of one key.
const KEY: u64 = 1000;
/// Euler's constant γ.
const EULER: f64 = 0.577_215_664_901_532_9;

const OP: &str = "multiple_testing";

fn params(words: &[u32]) -> CscvParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn scores(words: &[u32]) -> u64 {
    u64::from(params(words).n) * u64::from(params(words).combinations)
}

/// Exact sums of every block.
pub static CSCV_BLOCKS: Kernel = Kernel {
    name: "cscv_blocks",
    about: "exact sum and sum of squares of each block of a trial's returns",
    args: &[reads("returns"), writes_u32("sums")],
    params: layout::<CscvParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| u64::from(params(words).n),
    wgsl: wgsl!("multiple_testing"),
    cuda: cuda!("multiple_testing"),
    cpu: Some(Cpu { f32: cscv_blocks_cpu::<f32>, f64: cscv_blocks_cpu::<f64> }),
    cost: Cost { unit: "bar", units: |words| u64::from(params(words).n) * u64::from(params(words).t), bytes: 4.0, flops: 150.0 },
};

/// The best trial of every combination in sample.
pub static CSCV_BEST: Kernel = Kernel {
    name: "cscv_best",
    about: "best trial of each combination of blocks",
    args: &[reads_u32("sums"), reads_u32("masks"), writes_u32("best")],
    params: layout::<CscvParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| u64::from(params(words).combinations),
    wgsl: wgsl!("multiple_testing"),
    cuda: cuda!("multiple_testing"),
    cpu: Some(Cpu { f32: cscv_best_cpu::<f32>, f64: cscv_best_cpu::<f64> }),
    cost: Cost { unit: "trial-combination", units: scores, bytes: 0.0, flops: KEY as f64 },
};

/// The rank of that trial out of sample.
pub static CSCV_RANK: Kernel = Kernel {
    name: "cscv_rank",
    about: "rank of that trial on the other blocks",
    args: &[reads_u32("sums"), reads_u32("masks"), reads_u32("best"), writes_u32("counts")],
    params: layout::<CscvParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| u64::from(params(words).combinations),
    wgsl: wgsl!("multiple_testing"),
    cuda: cuda!("multiple_testing"),
    cpu: Some(Cpu { f32: cscv_rank_cpu::<f32>, f64: cscv_rank_cpu::<f64> }),
    cost: Cost { unit: "trial-combination", units: scores, bytes: 0.0, flops: KEY as f64 },
};

// ---- CPU ----------------------------------------------------------------------------------------------------------

/// First bar of a block.
fn edge(p: &CscvParams, block: u32) -> u32 {
    block * (p.t / p.splits) + block.min(p.t % p.splits)
}

fn cscv_blocks_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: CscvParams = launch.params()?;
    let (returns, sums) = (launch.real()?, launch.word_mut()?);
    let (n, t, splits) = (p.n as usize, p.t as usize, p.splits as usize);
    let rows: Vec<Vec<(i64, u64)>> = returns[..n * t].par_chunks_exact(t).map(|row| blocks(&p, row)).collect();
    for (trial, row) in rows.iter().enumerate() {
        for (block, (sum, squares)) in row.iter().enumerate().take(splits) {
            let at = 4 * block * n + trial;
            (sums[at], sums[at + n]) = (*sum as u32, (*sum >> 32) as u32);
            (sums[at + 2 * n], sums[at + 3 * n]) = (*squares as u32, (*squares >> 32) as u32);
        }
    }
    Ok(())
}

/// Sum and sum of squares of each block, in units that the row's largest value sets.
fn blocks<R: Real>(p: &CscvParams, row: &[R]) -> Vec<(i64, u64)> {
    let largest = row.iter().map(|x| exponent(x.f32())).max().unwrap_or(1).max(1);
    let scale = p.shift as i32 + 126 - largest as i32;
    let block = |b: u32| {
        row[edge(p, b) as usize..edge(p, b + 1) as usize].iter().fold((0i64, 0u64), |(sum, squares), x| {
            let x = to_fixed(x.f64(), scale);
            let size = u128::from(x.unsigned_abs());
            (sum + x, squares + ((size * size) >> p.shift) as u64)
        })
    };
    (0..p.splits).map(block).collect()
}

/// Trials per tile of the CPU columns.
const TILE: usize = 256;

/// Sums of a tile of trials over the blocks of a combination, and their f64 ratios sum·|sum| / (n·squares − sum²).
struct Tile {
    sum: [i64; TILE],
    squares: [u64; TILE],
    ratio: [f64; TILE],
    bars: u64,
    shift: u32,
}

impl Tile {
    fn new(p: &CscvParams) -> Tile {
        Tile { sum: [0; TILE], squares: [0; TILE], ratio: [0.0; TILE], bars: 0, shift: p.shift }
    }

    /// Fills the tile with trials `range`.
    fn fill(&mut self, p: &CscvParams, sums: &[u32], mask: u32, range: Range<usize>) {
        let n = p.n as usize;
        self.sum.fill(0);
        self.squares.fill(0);
        self.bars = 0;
        for block in (0..p.splits).filter(|b| mask >> b & 1 == 1) {
            self.bars += u64::from(edge(p, block + 1) - edge(p, block));
            let words = |k: usize| &sums[(4 * block as usize + k) * n..][range.clone()];
            let pair = |low: &[u32], high: &[u32], l: usize| u64::from(low[l]) | u64::from(high[l]) << 32;
            let (s0, s1, q0, q1) = (words(0), words(1), words(2), words(3));
            for l in 0..range.len() {
                self.sum[l] += pair(s0, s1, l) as i64;
                self.squares[l] += pair(q0, q1, l);
            }
        }
        let unit = self.bars as f64 * 2f64.powi(p.shift as i32);
        for l in 0..range.len() {
            let s = self.sum[l] as f64;
            self.ratio[l] = s * s.abs() / (unit * self.squares[l] as f64 - s * s);
        }
    }

    /// Order of the trial's Sharpe ratio as a key; 0 if undefined.
    fn key(&self, l: usize) -> u32 {
        let variance = if self.bars < 2 { 0 } else { scaled_variance(self.bars, self.sum[l], self.squares[l], self.shift) };
        let size = u128::from(self.sum[l].unsigned_abs());
        if variance == 0 { 0 } else { ratio_key(size * size, variance, self.sum[l] < 0) }
    }

    /// Whether the f64 ratio can be trusted to tell trials apart that differ by more than [`CLOSE`].
    fn sound(&self, l: usize) -> bool {
        let unit = self.bars as f64 * 2f64.powi(self.shift as i32);
        let s = self.sum[l] as f64;
        let total = unit * self.squares[l] as f64;
        self.bars > 1 && total - s * s > total * 1e-5
    }
}

/// Relative distance within which f64 ratios are settled by exact keys.
const CLOSE: f64 = 1e-6;

fn tiles(p: &CscvParams) -> impl Iterator<Item = Range<usize>> {
    let n = p.n as usize;
    (0..n.div_ceil(TILE)).map(move |i| i * TILE..((i + 1) * TILE).min(n))
}

fn complement(p: &CscvParams, mask: u32) -> u32 {
    !mask & ((1 << p.splits) - 1)
}

fn cscv_best_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: CscvParams = launch.params()?;
    let (sums, masks, best) = (launch.word()?, launch.word()?, launch.word_mut()?);
    best.par_chunks_exact_mut(3).zip(masks.par_iter()).take(p.combinations as usize).for_each(|(best, &mask)| {
        let (mut tile, mut close, mut winner) = (Tile::new(&p), f64::NEG_INFINITY, None);
        for range in tiles(&p) {
            tile.fill(&p, sums, mask, range.clone());
            for l in 0..range.len() {
                let ratio = tile.ratio[l];
                if best[1] != NONE && ratio < close - close.abs() * CLOSE {
                    continue;
                }
                let key = tile.key(l);
                if best[1] == NONE || key > best[0] {
                    (best[0], best[1]) = (key, p.first + (range.start + l) as u32);
                    winner = Some(range.start + l);
                    close = if key > 0 { ratio } else { f64::NEG_INFINITY };
                }
            }
        }
        if let Some(trial) = winner {
            tile.fill(&p, sums, complement(&p, mask), trial..trial + 1);
            best[2] = tile.key(0);
        }
    });
    Ok(())
}

fn cscv_rank_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: CscvParams = launch.params()?;
    let (sums, masks, best, counts) = (launch.word()?, launch.word()?, launch.word()?, launch.word_mut()?);
    let rows = counts.par_chunks_exact_mut(2).zip(masks.par_iter()).zip(best.par_chunks_exact(3));
    rows.take(p.combinations as usize).for_each(|((counts, &mask), best)| {
        let mut tile = Tile::new(&p);
        // Signed ratios around the pivot's key: below the first a trial is surely below, above the second surely above.
        let pivot = ratio_of(best[2]);
        let (low, high) = if best[2] == 0 || pivot.abs() < 1e-9 { (f64::NEG_INFINITY, f64::INFINITY) } else { around(pivot) };
        for range in tiles(&p) {
            tile.fill(&p, sums, complement(&p, mask), range.clone());
            for l in 0..range.len() {
                let ratio = tile.ratio[l];
                if tile.sound(l) && (ratio < low || ratio > high) {
                    counts[0] += u32::from(ratio < low);
                } else {
                    let key = tile.key(l);
                    counts[0] += u32::from(key < best[2]);
                    counts[1] += u32::from(key == best[2]);
                }
            }
        }
    });
    Ok(())
}

fn around(x: f64) -> (f64, f64) {
    (x - x.abs() * CLOSE, x + x.abs() * CLOSE)
}

/// The signed squared ratio that a key stands for, to its 25 bits.
fn ratio_of(key: u32) -> f64 {
    let magnitude = key.abs_diff(crate::fixed::KEY_ZERO);
    if magnitude == 0 {
        return 0.0;
    }
    let (bits, sign) = (magnitude - 1, if key < crate::fixed::KEY_ZERO { -1.0 } else { 1.0 });
    sign * (1.0 + f64::from(bits & 0x1ff_ffff) / 2f64.powi(25)) * 2f64.powi((bits >> 25) as i32 + crate::fixed::RATIO_MIN)
}

// ---- closed forms -------------------------------------------------------------------------------------------------

/// Z, the quantile function of the standard normal distribution, to about 1e-14; NaN outside (0, 1).
///
/// Newton's method on ln Φ, which is concave, from a point below the root: it rises to the root and never beyond.
pub fn normal_quantile(p: f64) -> f64 {
    if p.is_nan() || p <= 0.0 || p >= 1.0 {
        return f64::NAN;
    }
    if p > 0.5 {
        return -normal_quantile(1.0 - p);
    }
    let mut x = -(-2.0 * p.ln()).sqrt();
    for _ in 0..60 {
        let below = normal_cdf(x);
        let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
        let step = (below / p).ln() * below / density;
        x -= step;
        if step.abs() <= 1e-15 * x.abs().max(1e-3) {
            break;
        }
    }
    x
}

/// Expected highest Sharpe ratio of `trials` independent trials without skill whose ratios have deviation `sd`, in the unit of `sd`;
/// 0 for fewer than two trials.
///
/// Source: Bailey & López de Prado 2014, J. Portfolio Management 40(5), equation 6.
pub fn expected_max_sharpe(trials: u64, sd: f64) -> f64 {
    if trials < 2 {
        return 0.0;
    }
    let n = trials as f64;
    // Z(1 − x) = −Z(x), which keeps its digits for any number of trials.
    -sd * ((1.0 - EULER) * normal_quantile(1.0 / n) + EULER * normal_quantile(1.0 / (n * std::f64::consts::E)))
}

/// What a Sharpe ratio is judged by, all per bar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrackRecord {
    /// Sharpe ratio per bar, not annualised (n−1).
    pub sharpe: f64,
    /// Skewness.
    pub skew: f64,
    /// Kurtosis, not excess.
    pub kurtosis: f64,
    /// Bars.
    pub bars: u64,
}

impl TrackRecord {
    /// From the [`STATISTICS`] of a series of `bars` returns.
    pub fn of(statistics: &[f64], bars: u64) -> TrackRecord {
        let p = Performance::finish(statistics, bars, 1.0);
        TrackRecord { sharpe: p.sharpe, skew: p.skew, kurtosis: p.kurtosis, bars }
    }

    /// Probability that the true ratio is above `benchmark` (per bar); NaN where the ratio is undefined.
    pub fn probabilistic(&self, benchmark: f64) -> f64 {
        probabilistic_sharpe(self.sharpe, benchmark, self.skew, self.kurtosis, self.bars)
    }
}

/// Probability that the true Sharpe ratio of the best of `trials` is above what luck gives the best of them; `sd` is the deviation
/// of the trials' ratios per bar.
pub fn deflated_sharpe(record: &TrackRecord, trials: u64, sd: f64) -> f64 {
    record.probabilistic(expected_max_sharpe(trials, sd))
}

/// Bars after which a ratio of this size would be above `benchmark` (per bar) at confidence `level` (0.95, say).
///
/// Infinite where the ratio is not above the benchmark, NaN where it is undefined.
pub fn minimum_track_record(record: &TrackRecord, benchmark: f64, level: f64) -> f64 {
    let TrackRecord { sharpe, skew, kurtosis, .. } = *record;
    if sharpe <= benchmark {
        return f64::INFINITY;
    }
    let spread = 1.0 - skew * sharpe + (kurtosis - 1.0) / 4.0 * sharpe * sharpe;
    1.0 + spread * (normal_quantile(level) / (sharpe - benchmark)).powi(2)
}

// ---- the op -------------------------------------------------------------------------------------------------------

/// What to test.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MultipleTesting {
    /// Blocks of the cross-validation: even, 2 to [`MAX_SPLITS`].
    pub splits: u32,
    /// Number of trials that the best one was chosen from; `None` takes the rows with a defined ratio. More than there are rows where the
    /// rows are a sample.
    pub trials: Option<u64>,
    /// Sharpe ratio per bar that `probabilistic_sharpe` and `minimum_track_record` compare with.
    pub benchmark: f64,
    /// Confidence of `minimum_track_record`.
    pub level: f64,
}

impl Default for MultipleTesting {
    /// 16 blocks (12,870 combinations), every row a trial, against zero, at 95 %.
    fn default() -> Self {
        MultipleTesting { splits: 16, trials: None, benchmark: 0.0, level: 0.95 }
    }
}

/// What was found; ratios are per bar, undefined ones NaN.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Tested {
    /// Sharpe ratio of each trial [S].
    pub sharpe: Vec<f64>,
    /// Probability that its true ratio is above the benchmark [S].
    pub probabilistic_sharpe: Vec<f64>,
    /// Probability that its true ratio is above `expected_max_sharpe` [S].
    pub deflated_sharpe: Vec<f64>,
    /// Bars that its ratio needs to be above the benchmark at the level asked for [S].
    pub minimum_track_record: Vec<f64>,
    /// Number of trials that the deflation counts.
    pub trials: u64,
    /// Deviation of the defined ratios (n−1); NaN below two.
    pub deviation: f64,
    /// Ratio that luck gives the best of so many trials.
    pub expected_max_sharpe: f64,
    /// Probability of back-test overfitting; NaN below two trials.
    pub pbo: f64,
    /// Share of combinations whose chosen trial has a negative ratio out of sample (an undefined one counts).
    pub loss: f64,
    /// Trial chosen by each combination [C].
    pub chosen: Vec<u32>,
    /// Logit of its rank out of sample [C].
    pub logits: Vec<f64>,
    /// Launches on the device.
    pub launches: usize,
}

/// Blocks in sample of every combination, in ascending order: the words of `splits` bits of which half are set.
pub fn combinations(splits: u32) -> Vec<u32> {
    (0..1u32 << splits).filter(|mask| mask.count_ones() == splits / 2).collect()
}

/// Refuses a value that is not finite, naming its row and column.
pub(crate) fn finite(op: &'static str, returns: &[f32], bars: usize) -> Result<()> {
    match returns.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(i) => {
            let name = format!("returns[{}, {}]", i / bars, i % bars);
            Err(Error::Parameter { op, name, value: returns[i].to_string(), help: "returns must be finite; leave the row out or fill the gap".into() })
        }
    }
}

/// [N,T] of a slice, checked.
pub(crate) fn shape_of(op: &'static str, returns: &[f32], rows: usize) -> Result<(u64, u64)> {
    let bars = returns.len().checked_div(rows).unwrap_or(0);
    if rows == 0 || bars == 0 || rows * bars != returns.len() || bars >= 1 << 24 {
        let got = format!("{} values for {rows} rows", returns.len());
        return Err(Error::Shape { op, arg: "returns".into(), expected: "[N,T] with N ≥ 1 and 1 ≤ T < 2^24".into(), got });
    }
    finite(op, returns, bars)?;
    Ok((rows as u64, bars as u64))
}

impl MultipleTesting {
    fn check(&self, bars: u64) -> Result<()> {
        let wrong = |name: &str, value: String, help: String| Err(Error::Parameter { op: OP, name: name.into(), value, help });
        if self.splits < 2 || self.splits > MAX_SPLITS || self.splits % 2 == 1 {
            return wrong("splits", self.splits.to_string(), format!("must be even, 2 to {MAX_SPLITS}"));
        }
        let least = u64::from(self.splits.max(4));
        if bars < least {
            let help = format!("{bars} bars give blocks without a bar, or halves without the two that a Sharpe ratio needs; {least} bars are the least");
            return wrong("splits", self.splits.to_string(), help);
        }
        if !self.benchmark.is_finite() {
            return wrong("benchmark", self.benchmark.to_string(), "must be a finite Sharpe ratio per bar".into());
        }
        if self.level.is_nan() || self.level <= 0.5 || self.level >= 1.0 {
            return wrong("level", self.level.to_string(), "must be a confidence between 0.5 and 1, such as 0.95".into());
        }
        if self.trials == Some(0) {
            return wrong("trials", "0".into(), "must be at least 1: the best was chosen from some trial".into());
        }
        Ok(())
    }
}

/// A run of trials whose sums are on the device.
struct Run {
    params: CscvParams,
    sums: Buffer,
    statistics: Read,
}

/// Tests `trials` rows of `returns` [S,T], simple returns per bar of every trial over the same bars.
///
/// The returns are uploaded in runs that fit the device. Any S ≥ 1; `splits` ≤ T and T ≥ 4.
/// # Errors
/// `Shape` if the length is no multiple of `trials`; `Parameter` for a return that is not finite (row and column are named), an odd or
/// too large number of splits or fewer bars than blocks; `TooLarge` if one trial exceeds the device.
pub fn multiple_testing(device: &Device, returns: &[f32], trials: usize, config: &MultipleTesting) -> Result<Tested> {
    let (s, t) = shape_of(OP, returns, trials)?;
    config.check(t)?;
    let (work, masks) = (Work::new(device, config.splits, t)?, combinations(config.splits));
    let (mut statistics, mut launches, mut runs) = (Vec::with_capacity((s * STATISTICS) as usize), 0, Vec::<Run>::new());
    let mut pass = device.pass(OP);
    for range in work.runs(s)? {
        if let Some(earlier) = runs.last() {
            // One run's returns on the device at a time; its sums stay.
            launches += pass.launches();
            statistics.extend(std::mem::replace(&mut pass, device.pass(OP)).submit()?.f64(earlier.statistics)?);
        }
        let values = &returns[(range.start * t) as usize..(range.end * t) as usize];
        runs.push(work.sums(&mut pass, values, range)?);
    }
    let reads = work.ranks(&mut pass, &runs, &masks)?;
    launches += pass.launches();
    let mut done = pass.submit()?;
    if let Some(run) = runs.last() {
        statistics.extend(done.f64(run.statistics)?);
    }
    let (mut best, mut counts) = (Vec::new(), Vec::new());
    for (b, c) in reads {
        best.extend(done.u32(b)?);
        counts.extend(done.u32(c)?);
    }
    Ok(finish(&statistics, s, t, config, &best, &counts, launches))
}

/// A run of combinations, with buffers of its own: `best` and `counts` carry over between runs of trials.
struct Part {
    combinations: u32,
    masks: Buffer,
    best: Buffer,
    counts: Buffer,
}

impl Part {
    fn new(device: &Device, masks: &[u32]) -> Result<Part> {
        Ok(Part {
            combinations: masks.len() as u32,
            masks: device.upload_u32("masks", masks)?,
            best: device.upload_u32("best", &[0, NONE, 0].repeat(masks.len()))?,
            counts: device.zeros_u32("counts", 2 * masks.len() as u64)?,
        })
    }
}

/// What every launch of the cross-validation shares.
struct Work<'a> {
    device: &'a Device,
    t: u64,
    splits: u64,
    params: CscvParams,
}

impl<'a> Work<'a> {
    fn new(device: &'a Device, splits: u32, t: u64) -> Result<Work<'a>> {
        // Block sums, then a tree per block.
        device.check_rounds(OP, 2 * t.div_ceil(u64::from(WG)) + 10 * u64::from(splits) + 40, "rounds")?;
        // Sums stay below 2^62, and fixed-point values below 2^50.
        let shift = 50.min(62 - t.next_power_of_two().trailing_zeros());
        Ok(Work { device, t, splits: u64::from(splits), params: CscvParams { n: 0, t: t as u32, splits, shift, combinations: 0, first: 0 } })
    }

    /// Runs of trials whose returns, sums and loops fit one launch.
    fn runs(&self, s: u64) -> Result<Vec<Range<u64>>> {
        let rounds = self.device.limits().loop_rounds.saturating_sub(400) / (self.splits / 2 + 36);
        let most = rounds.saturating_mul(u64::from(WG)).clamp(1, u64::from(u32::MAX));
        let planned = self.device.plan(OP, s, self.t.max(4 * self.splits), 1, 150 * self.t)?;
        let parts = planned.into_iter().flat_map(|run| {
            let parts = (run.end - run.start).div_ceil(most);
            (0..parts).map(move |i| run.start + i * most..(run.start + (i + 1) * most).min(run.end))
        });
        Ok(parts.collect())
    }

    /// Records moments and block sums of a run of trials.
    fn sums(&self, pass: &mut Pass, values: &[f32], trials: Range<u64>) -> Result<Run> {
        let n = trials.end - trials.start;
        let returns = self.device.upload("returns", values)?;
        let sums = self.device.zeros_u32("sums", 4 * self.splits * n)?;
        let params = CscvParams { n: n as u32, first: trials.start as u32, ..self.params };
        pass.launch(&CSCV_BLOCKS, &params, &[View::from(&returns), View::from(&sums)])?;
        let statistics = performance(pass, &returns, n, self.t)?;
        Ok(Run { params, sums, statistics: pass.read(&statistics)? })
    }

    /// Records the choice of every combination over all runs of trials, then its rank over all runs; returns the parts' reads.
    fn ranks(&self, pass: &mut Pass, runs: &[Run], masks: &[u32]) -> Result<Vec<(Read, Read)>> {
        let largest = runs.iter().map(|run| u64::from(run.params.n)).max().unwrap_or(0);
        let parts = self.device.plan(OP, masks.len() as u64, 3, 1, largest * KEY)?;
        let one = |part: Range<u64>| {
            let part = Part::new(self.device, &masks[part.start as usize..part.end as usize])?;
            let [masks, best, counts] = [&part.masks, &part.best, &part.counts].map(View::from);
            for run in runs {
                let params = CscvParams { combinations: part.combinations, ..run.params };
                pass.launch(&CSCV_BEST, &params, &[View::from(&run.sums), masks.clone(), best.clone()])?;
            }
            for run in runs {
                let params = CscvParams { combinations: part.combinations, ..run.params };
                pass.launch(&CSCV_RANK, &params, &[View::from(&run.sums), masks.clone(), best.clone(), counts.clone()])?;
            }
            Ok((pass.read(&part.best)?, pass.read(&part.counts)?))
        };
        parts.into_iter().map(one).collect()
    }
}

/// Ratios, ranks and logits in f64.
fn finish(statistics: &[f64], s: u64, t: u64, config: &MultipleTesting, best: &[u32], counts: &[u32], launches: usize) -> Tested {
    let records: Vec<TrackRecord> = statistics.chunks_exact(STATISTICS as usize).map(|x| TrackRecord::of(x, t)).collect();
    let sharpe: Vec<f64> = records.iter().map(|r| r.sharpe).collect();
    let defined: Vec<f64> = sharpe.iter().copied().filter(|x| x.is_finite()).collect();
    let n = defined.len() as f64;
    let mean = defined.iter().sum::<f64>() / n;
    let deviation = if defined.len() < 2 { f64::NAN } else { (defined.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0)).sqrt() };
    let trials = config.trials.unwrap_or(defined.len() as u64);
    let expected = expected_max_sharpe(trials, deviation);
    // Twice the mean rank: trials below, and half of those level with it.
    let logit = |below: u32, level: u32| {
        let rank = f64::from(below) + (f64::from(level) + 1.0) / 2.0;
        (rank / (s as f64 + 1.0 - rank)).ln()
    };
    let combinations = best.len() / 3;
    let share = |count: usize| if s < 2 { f64::NAN } else { count as f64 / combinations as f64 };
    let overfit = counts.chunks_exact(2).filter(|c| 2 * u64::from(c[0]) + u64::from(c[1]) <= s).count();
    Tested {
        probabilistic_sharpe: records.iter().map(|r| r.probabilistic(config.benchmark)).collect(),
        deflated_sharpe: records.iter().map(|r| r.probabilistic(expected)).collect(),
        minimum_track_record: records.iter().map(|r| minimum_track_record(r, config.benchmark, config.level)).collect(),
        sharpe,
        trials,
        deviation,
        expected_max_sharpe: expected,
        pbo: share(overfit),
        loss: share(best.chunks_exact(3).filter(|b| b[2] < crate::fixed::KEY_ZERO).count()),
        chosen: best.chunks_exact(3).map(|b| b[1]).collect(),
        logits: counts.chunks_exact(2).map(|c| logit(c[0], c[1])).collect(),
        launches,
    }
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let &[s, _] = case.shape("returns")? else {
        return Err(Error::Shape { op: OP, arg: "returns".into(), expected: "[S,T]".into(), got: format!("{:?}", case.shape("returns")?) });
    };
    let config = MultipleTesting { splits: case.number("splits")? as u32, ..MultipleTesting::default() };
    let tested = multiple_testing(device, case.f32("returns")?, s, &config)?;
    let mut outputs = Outputs::launched(tested.launches);
    outputs.reals("sharpe", tested.sharpe);
    outputs.reals("probabilistic_sharpe", tested.probabilistic_sharpe);
    outputs.reals("deflated_sharpe", tested.deflated_sharpe);
    outputs.reals("expected_max_sharpe", vec![tested.expected_max_sharpe]);
    outputs.reals("pbo", vec![tested.pbo]);
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_invert_the_distribution() {
        for (p, want) in [(0.5, 0.0), (0.025, -1.959_963_984_540_054), (0.841_344_746_068_542_9, 1.0), (1e-12, -7.034_483_825_301_131)] {
            assert!((normal_quantile(p) - want).abs() < 1e-12, "{p}: {}", normal_quantile(p));
        }
        for x in [-30.0, -3.0, -0.001, 0.4, 2.5] {
            assert!((normal_quantile(normal_cdf(x)) - x).abs() < 1e-11 * x.abs().max(1.0), "{x}: {}", normal_quantile(normal_cdf(x)));
        }
        assert!([0.0, 1.0, -0.1, 1.1, f64::NAN].iter().all(|&p| normal_quantile(p).is_nan()));
    }

    #[test]
    fn expected_maximum_of_93_trials() {
        // 2.505 deviations; also close to the exact expectation for a million.
        assert!((expected_max_sharpe(93, 1.0) - 2.505).abs() < 5e-4);
        assert!((expected_max_sharpe(1_000_000, 2.0) / 2.0 - 4.863).abs() < 0.01);
        assert_eq!((expected_max_sharpe(0, 1.0), expected_max_sharpe(1, f64::NAN)), (0.0, 0.0));
    }

    #[test]
    fn a_track_record_of_the_minimum_length_is_just_significant() {
        let record = TrackRecord { sharpe: 0.08, skew: -0.7, kurtosis: 6.0, bars: 0 };
        let least = minimum_track_record(&record, 0.01, 0.95);
        let at = |bars: f64| TrackRecord { bars: bars as u64, ..record }.probabilistic(0.01);
        assert!(at(least.ceil()) >= 0.95 && at(least.ceil() - 1.0) < 0.95, "{least}");
        assert_eq!(minimum_track_record(&record, 0.08, 0.95), f64::INFINITY);
        assert!(minimum_track_record(&TrackRecord { sharpe: f64::NAN, ..record }, 0.0, 0.95).is_nan());
    }

    #[test]
    fn keys_give_back_their_ratio() {
        for x in [1e-9f64, 0.004, 1.0, 77.0] {
            let key = crate::fixed::ratio_key_of(x, false);
            assert!((ratio_of(key) / x - 1.0).abs() < 1e-7 && ratio_of(crate::fixed::ratio_key_of(x, true)) < 0.0, "{x}");
        }
        assert_eq!(combinations(4), [0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100]);
        assert_eq!(combinations(20).len(), 184_756);
    }
}
