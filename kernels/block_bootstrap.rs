//! Confidence intervals of Sharpe ratios by the block bootstrap, which keeps the dependence of neighbouring returns.
//!
//! A replicate of a series strings blocks of it together until T bars are full; a block that passes the end goes on at the start.
//! ```text
//! circular     block lengths are all L
//! stationary   block lengths are geometric with mean L: P(length > k) = (1 − 1/L)^k
//! ```
//! Block k of replicate r takes the words 2·(k mod 2), 2·(k mod 2) + 1 of Philox at counter (r, 0, k/2, STREAM·2^16), the seed as key: its
//! first bar is ⌊word·T/2³²⌋, its length one more than the entries of the series' table that do not exceed the second word's upper 31
//! bits (entry k is P(length ≤ k + 1)·2³¹). So all series share their draws, and integers alone decide which bars a replicate takes.
//! The interval holds the central `level` of the replicates' ratios (percentiles by linear interpolation).
//!
//! Automatic block length (Politis & White): with R(k) the autocovariances and m the lag after which K = max(5, √log₁₀T) autocorrelations in a
//! row are below 2·√(log₁₀T/T), M = 2m and λ the flat-top window (1 up to ½, then 2(1 − |x|)),
//! L = (2·G²/D)^{1/3}·T^{1/3},  G = Σ λ(k/M)·|k|·R(k),  g = Σ λ(k/M)·R(k),  D = 2·g² (stationary) or 4/3·g² (circular), at most min(3√T, T/3).
//!
//! Shapes   returns [N,T]; statistics [N, STATISTICS] of `performance` (the mean shifts the sums); lengths [N,K] ascending; sharpe [R,N].
//! Launch   one workgroup of WG threads per (replicate, series): WG blocks are drawn at once, their lengths summed up, then threads stride
//!          over the bars that they cover.
//! Scratch  none; workgroup memory 4·WG + 1 words.
//! Floor    4 bytes gathered from cache and about 60 integer instructions per bar of a replicate.
//! Numerics sums of deviations from the series' mean; a replicate whose variance is below 1e-5 of its mean square has no ratio.
//! Source   Politis & Romano 1992 (circular), 1994, J. American Statistical Association 89 (stationary); Politis & White 2004,
//!          Econometric Reviews 23(1), with the correction of Patton, Politis & White 2009.
//! Files    shaders/block_bootstrap.wgsl · cuda/block_bootstrap.cu · reference: `block_bootstrap_cpu`

use crate::conformance::{UNDEFINED, defined};
use crate::device::{Device, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::multiple_testing::{TrackRecord, shape_of};
use crate::performance::{STATISTICS, performance};
use crate::philox::philox4x32;
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of [`BLOCK_BOOTSTRAP`].
    pub struct BootstrapParams {
        /// Series of this launch.
        n: u32,
        /// Bars.
        t: u32,
        /// Entries per series in the table of lengths.
        table: u32,
        /// Replicates of this launch.
        replicates: u32,
        /// Index of the first of them.
        first: u32,
        /// Seed, low word …
        seed: u32,
        /// … and high word.
        seed_high: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;
/// Stream of the random numbers.
const STREAM: u32 = 0x4242;
/// Most replicates.
pub const MAX_REPLICATES: u32 = 1 << 20;

const OP: &str = "block_bootstrap";

fn params(words: &[u32]) -> BootstrapParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn pairs(words: &[u32]) -> u64 {
    u64::from(params(words).n) * u64::from(params(words).replicates)
}

/// Sharpe ratios of replicates.
pub static BLOCK_BOOTSTRAP: Kernel = Kernel {
    name: "block_bootstrap",
    about: "Sharpe ratios of block-bootstrap replicates",
    args: &[reads("returns"), reads("statistics"), reads_u32("lengths"), writes("sharpe")],
    params: layout::<BootstrapParams>(),
    workgroup: WG,
    constants: &[],
    groups: pairs,
    wgsl: wgsl!("block_bootstrap"),
    cuda: cuda!("block_bootstrap"),
    cpu: Some(Cpu { f32: block_bootstrap_cpu::<f32>, f64: block_bootstrap_cpu::<f64> }),
    cost: Cost { unit: "bar", units: |words| pairs(words) * u64::from(params(words).t), bytes: 0.0, flops: 60.0 },
};

fn block_bootstrap_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BootstrapParams = launch.params()?;
    let (returns, statistics, lengths, sharpe) = (launch.real()?, launch.real()?, launch.word()?, launch.real_mut()?);
    let (n, t, table) = (p.n as usize, p.t as usize, p.table as usize);
    sharpe.par_iter_mut().enumerate().take(pairs(launch.params) as usize).for_each(|(i, out)| {
        let row = i % n;
        let bars = Bars::new(&p, p.first + (i / n) as u32, &lengths[row * table..(row + 1) * table]);
        *out = ratio(&returns[row * t..(row + 1) * t], statistics[row * STATISTICS as usize], bars);
    });
    Ok(())
}

/// Runs of bars that a replicate takes, one after the other: (first bar, bars), none of them past the end of the series.
struct Bars<'a> {
    p: &'a BootstrapParams,
    replicate: u32,
    lengths: &'a [u32],
    block: u32,
    left: u32,
    wrapped: Option<u32>,
}

impl<'a> Bars<'a> {
    fn new(p: &'a BootstrapParams, replicate: u32, lengths: &'a [u32]) -> Bars<'a> {
        Bars { p, replicate, lengths, block: 0, left: p.t, wrapped: None }
    }
}

impl Iterator for Bars<'_> {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<(usize, usize)> {
        let (start, length) = match self.wrapped.take() {
            Some(rest) => (0, rest),
            None if self.left == 0 => return None,
            None => {
                let word = philox4x32([self.replicate, 0, self.block / 2, STREAM << 16], [self.p.seed, self.p.seed_high]);
                let draw = &word[2 * (self.block % 2) as usize..];
                self.block += 1;
                let start = ((u64::from(draw[0]) * u64::from(self.p.t)) >> 32) as u32;
                let length = self.lengths.partition_point(|&entry| entry <= draw[1] >> 1) as u32 + 1;
                let length = length.min(self.left);
                self.left -= length;
                (start, length)
            }
        };
        let here = length.min(self.p.t - start);
        self.wrapped = (here < length).then_some(length - here);
        Some((start as usize, here as usize))
    }
}

/// Sharpe ratio of a replicate, summed in blocks of 64.
fn ratio<R: Real>(x: &[R], mean: R, bars: Bars<'_>) -> R {
    let (mut sum, mut squares) = (R::ZERO, R::ZERO);
    for (start, count) in bars {
        for block in x[start..start + count].chunks(64) {
            let (mut s, mut q) = (R::ZERO, R::ZERO);
            for &v in block {
                let d = v - mean;
                s += d;
                q += d * d;
            }
            sum += s;
            squares += q;
        }
    }
    let count = R::of(x.len() as f64);
    let offset = sum / count;
    let central = squares - sum * offset;
    if x.len() > 1 && central > R::of(1e-5) * squares { (mean + offset) / (central / (count - R::ONE)).sqrt() } else { R::of(UNDEFINED) }
}

// ---- block lengths ------------------------------------------------------------------------------------------------

/// How blocks are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Geometric lengths: replicates are stationary.
    #[default]
    Stationary,
    /// Equal lengths.
    Circular,
}

/// The automatic (mean) block length of a series: 1 for independent returns, more the longer they depend on one another.
///
/// At least 1, at most min(3√T, T/3); 1 for a constant series and for fewer than 9 values. The head of this module has the formula.
pub fn automatic_block(x: &[f32], kind: Kind) -> f64 {
    let t = x.len() as f64;
    if x.len() < 9 {
        return 1.0;
    }
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / t;
    let d: Vec<f64> = x.iter().map(|&v| f64::from(v) - mean).collect();
    let covariance = |k: usize| d[k..].iter().zip(&d).map(|(a, b)| a * b).sum::<f64>() / t;
    let variance = covariance(0);
    if variance <= 0.0 {
        return 1.0;
    }
    let run = 5.max(t.log10().sqrt().ceil() as usize);
    let longest = (t.sqrt().ceil() as usize + run).min(x.len() - 1);
    let covariances: Vec<f64> = (0..=longest).map(covariance).collect();
    let small = |k: usize| covariances[k].abs() < 2.0 * (t.log10() / t).sqrt() * variance;
    // The first lag after which a whole run is small; failing that, the last one that is not.
    let lag = (0..=longest.saturating_sub(run)).find(|m| (m + 1..=m + run).all(small));
    let lag = lag.or_else(|| (1..=longest).rev().find(|&k| !small(k))).unwrap_or(0).max(1);
    let window = (2 * lag).min(longest);
    let flat_top = |k: usize| (2.0 * (1.0 - k as f64 / window as f64)).clamp(0.0, 1.0);
    let both = |f: &dyn Fn(usize) -> f64| 2.0 * (1..=window).map(|k| flat_top(k) * f(k) * covariances[k]).sum::<f64>();
    let (g, spectrum) = (both(&|k| k as f64), variance + both(&|_| 1.0));
    let d = spectrum * spectrum * if kind == Kind::Stationary { 2.0 } else { 4.0 / 3.0 };
    let most = (3.0 * t.sqrt()).min(t / 3.0).ceil();
    let block = (2.0 * g * g / d).cbrt() * t.cbrt();
    if block.is_nan() { 1.0 } else { block.clamp(1.0, most) }
}

/// The table from which lengths are drawn: entry k is P(length ≤ k + 1)·2³¹, at most t − 1 entries.
fn length_table(kind: Kind, block: f64, t: u64) -> Vec<u32> {
    let most = (t - 1) as usize;
    match kind {
        Kind::Circular => vec![0; (block.round().max(1.0) as usize - 1).min(most)],
        Kind::Stationary => {
            let stays = 1.0 - 1.0 / block;
            let mut above = 1.0;
            let entry = |above: f64| ((1.0 - above) * 2f64.powi(31)).min(2f64.powi(31) - 1.0) as u32;
            let tail = std::iter::repeat_with(|| {
                above *= stays;
                entry(above)
            });
            let mut table: Vec<u32> = tail.take(most).take_while(|&e| e < (1 << 31) - 1).collect();
            if table.len() < most {
                table.push((1 << 31) - 1);
            }
            table
        }
    }
}

// ---- the op -------------------------------------------------------------------------------------------------------

/// How to bootstrap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bootstrap {
    /// Replicates per series, 1 to [`MAX_REPLICATES`].
    pub replicates: u32,
    /// (Mean) block length in bars, 1 to T; `None` takes [`automatic_block`] of each series.
    pub block: Option<f64>,
    /// Seed; the same one draws the same bars on every device.
    pub seed: u64,
    /// Probability that the interval is to hold, 0.95 say.
    pub level: f64,
    /// How blocks are drawn.
    pub kind: Kind,
}

impl Default for Bootstrap {
    /// 2,000 stationary replicates with automatic blocks, a 95 % interval.
    fn default() -> Self {
        Bootstrap { replicates: 2000, block: None, seed: 0, level: 0.95, kind: Kind::Stationary }
    }
}

/// A Sharpe ratio per bar and its interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Ratio of the series itself; NaN where it is undefined.
    pub sharpe: f64,
    /// Lower end; NaN where fewer than two replicates have a ratio.
    pub lower: f64,
    /// Upper end.
    pub upper: f64,
    /// Share of the replicates whose ratio is above zero.
    pub positive: f64,
    /// (Mean) block length that was used.
    pub block: f64,
    /// Replicates that have a ratio.
    pub replicates: u32,
}

impl Bootstrap {
    fn check(&self, bars: u64) -> Result<()> {
        let wrong = |name: &str, value: String, help: String| Err(Error::Parameter { op: OP, name: name.into(), value, help });
        if self.replicates == 0 || self.replicates > MAX_REPLICATES {
            return wrong("replicates", self.replicates.to_string(), format!("must be 1 to {MAX_REPLICATES}"));
        }
        if self.level.is_nan() || self.level <= 0.0 || self.level >= 1.0 {
            return wrong("level", self.level.to_string(), "must be a probability between 0 and 1, such as 0.95".into());
        }
        match self.block {
            Some(block) if block.is_nan() || block < 1.0 || block > bars as f64 => {
                wrong("block", block.to_string(), format!("must be 1 to {bars} bars, the length of the series"))
            }
            _ => Ok(()),
        }
    }
}

/// Sharpe ratios per bar of every replicate, [R,N], on the device's own precision; undefined ones NaN. Beside them the ratio of every
/// series and the block length that it was given.
///
/// # Errors
/// As [`bootstrap_sharpe`].
pub fn replicates(device: &Device, returns: &[f32], series: usize, config: &Bootstrap) -> Result<(Vec<f64>, Vec<TrackRecord>, Vec<f64>)> {
    let (n, t) = shape_of(OP, returns, series)?;
    config.check(t)?;
    let blocks: Vec<f64> = match config.block {
        Some(block) => vec![block; series],
        None => returns.par_chunks_exact(t as usize).map(|x| automatic_block(x, config.kind)).collect(),
    };
    let tables: Vec<Vec<u32>> = blocks.par_iter().map(|&block| length_table(config.kind, block, t)).collect();
    // One entry that no draw reaches ends every table.
    let entries = tables.iter().map(Vec::len).max().unwrap_or(0) + 1;
    // Draws, scans and searches of every batch of WG blocks, then a search per bar.
    let shortest = blocks.iter().copied().fold(t as f64, f64::min);
    let batches = (2.0 * t as f64 / (shortest * f64::from(WG))).ceil() as u64 + 2;
    let deep = u64::from(entries.next_power_of_two().trailing_zeros());
    device.check_rounds(OP, batches * (20 + deep) + 8 * (t.div_ceil(u64::from(WG)) + batches) + 100, "rounds")?;

    let mut pass = device.pass(OP);
    let mut reads = Vec::new();
    for rows in device.plan(OP, n, t.max(entries as u64).max(STATISTICS), 1, 0)? {
        let count = rows.end - rows.start;
        let values = &returns[(rows.start * t) as usize..(rows.end * t) as usize];
        let mut lengths = vec![u32::MAX; entries * count as usize];
        for (row, table) in lengths.chunks_exact_mut(entries).zip(&tables[rows.start as usize..rows.end as usize]) {
            row[..table.len()].copy_from_slice(table);
        }
        let (x, lengths) = (device.upload("returns", values)?, device.upload_u32("lengths", &lengths)?);
        let statistics = performance(&mut pass, &x, count, t)?;
        let mut parts = Vec::new();
        for part in device.plan(OP, u64::from(config.replicates), count, count, count * t * 60)? {
            let sharpe = device.zeros("sharpe", (part.end - part.start) * count)?;
            let params = BootstrapParams {
                n: count as u32,
                t: t as u32,
                table: entries as u32,
                replicates: (part.end - part.start) as u32,
                first: part.start as u32,
                seed: config.seed as u32,
                seed_high: (config.seed >> 32) as u32,
            };
            pass.launch(&BLOCK_BOOTSTRAP, &params, &[View::from(&x), View::from(&statistics), View::from(&lengths), View::from(&sharpe)])?;
            parts.push(pass.read(&sharpe)?);
        }
        reads.push((rows, pass.read(&statistics)?, parts));
    }
    let mut done = pass.submit()?;
    let (mut ratios, mut records) = (vec![f64::NAN; config.replicates as usize * series], Vec::with_capacity(series));
    for (rows, statistics, parts) in reads {
        let count = (rows.end - rows.start) as usize;
        let mut replicate = 0;
        for part in parts {
            for row in done.f64(part)?.chunks_exact(count) {
                let out = &mut ratios[replicate * series + rows.start as usize..][..count];
                out.iter_mut().zip(row).for_each(|(out, &x)| *out = defined(x));
                replicate += 1;
            }
        }
        records.extend(done.f64(statistics)?.chunks_exact(STATISTICS as usize).map(|s| TrackRecord::of(s, t)));
    }
    Ok((ratios, records, blocks))
}

/// Confidence interval of the Sharpe ratio per bar of each of `series` rows of `returns` [N,T], simple returns per bar.
///
/// All series share their draws, so the replicates of two series can be compared bar by bar.
/// # Errors
/// `Shape` if the length is no multiple of `series`; `Parameter` for a return that is not finite (row and column are named) and for
/// settings outside their range; `TooLarge` if one series exceeds the device.
pub fn bootstrap_sharpe(device: &Device, returns: &[f32], series: usize, config: &Bootstrap) -> Result<Vec<Interval>> {
    let (ratios, records, blocks) = replicates(device, returns, series, config)?;
    let interval = |row: usize| {
        let mut sorted: Vec<f64> = ratios.iter().skip(row).step_by(series).copied().filter(|x| !x.is_nan()).collect();
        sorted.sort_by(f64::total_cmp);
        let share = sorted.iter().filter(|&&x| x > 0.0).count() as f64 / sorted.len() as f64;
        Interval {
            sharpe: records[row].sharpe,
            lower: percentile(&sorted, (1.0 - config.level) / 2.0),
            upper: percentile(&sorted, (1.0 + config.level) / 2.0),
            positive: if sorted.is_empty() { f64::NAN } else { share },
            block: blocks[row],
            replicates: sorted.len() as u32,
        }
    };
    Ok((0..series).into_par_iter().map(interval).collect())
}

/// Percentile of sorted values by linear interpolation; NaN below two values.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    if sorted.len() < 2 {
        return f64::NAN;
    }
    let at = share * (sorted.len() - 1) as f64;
    let low = (at.floor() as usize).min(sorted.len() - 2);
    sorted[low] + (at - low as f64) * (sorted[low + 1] - sorted[low])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(kind: Kind, block: f64, t: u32, replicate: u32) -> Vec<Vec<usize>> {
        let table = length_table(kind, block, u64::from(t));
        let p = BootstrapParams { n: 1, t, table: table.len() as u32, replicates: 1, first: 0, seed: 5, seed_high: 0 };
        Bars::new(&p, replicate, &table).map(|(start, count)| (start..start + count).collect()).collect()
    }

    #[test]
    fn replicates_have_t_bars_in_blocks_that_wrap() {
        for (kind, block) in [(Kind::Stationary, 7.0), (Kind::Circular, 7.0), (Kind::Stationary, 1.0), (Kind::Circular, 50.0), (Kind::Stationary, 50.0)] {
            for replicate in 0..20 {
                let bars: Vec<usize> = taken(kind, block, 50, replicate).concat();
                assert_eq!(bars.len(), 50, "{kind:?} {block}");
                assert!(bars.iter().all(|&j| j < 50));
                let breaks = bars.windows(2).filter(|w| w[1] != (w[0] + 1) % 50).count();
                if kind == Kind::Circular {
                    assert!(breaks < (50.0 / block).ceil() as usize, "{block}: {breaks}");
                }
            }
        }
    }

    #[test]
    fn stationary_blocks_have_their_mean_length_and_every_bar_its_share() {
        let (t, replicates) = (400, 500);
        let mut counts = vec![0u32; t as usize];
        let mut blocks = 0;
        for replicate in 0..replicates {
            let bars = taken(Kind::Stationary, 12.0, t, replicate).concat();
            blocks += 1 + bars.windows(2).filter(|w| w[1] != (w[0] + 1) % t as usize).count();
            bars.iter().for_each(|&j| counts[j] += 1);
        }
        let mean = f64::from(t * replicates) / blocks as f64;
        assert!((mean - 12.0).abs() < 0.5, "mean block {mean}");
        // Each bar is taken once per replicate on average; the mean of 500 has a deviation of about √(23/500).
        assert!(counts.iter().all(|&c| (f64::from(c) / f64::from(replicates) - 1.0).abs() < 0.9), "{counts:?}");
        let table = length_table(Kind::Stationary, 4.0, 1000);
        assert_eq!((table[0], table[1]), (1 << 29, (1 << 29) + (3 << 27)), "P(1) = 1/4, P(≤ 2) = 7/16");
        assert!(table.len() < 100 && table.is_sorted());
    }

    #[test]
    fn automatic_blocks_grow_with_dependence() {
        let noise = |i: u32| crate::philox::normals(philox4x32([i, 0, 0, 0], [4, 9]))[0];
        let series = |phi: f64| {
            let mut x = 0.0;
            (0..3000).map(move |i| {
                x = phi * x + noise(i);
                x as f32
            })
        };
        let length = |phi: f64| automatic_block(&series(phi).collect::<Vec<_>>(), Kind::Stationary);
        // For an AR(1) the theory gives (2φ/(1−φ²))^{2/3}·T^{1/3}: 17.5 at φ = 0.5, 39 at φ = 0.8.
        assert!(length(0.0) < 6.0, "{}", length(0.0));
        assert!((9.0..30.0).contains(&length(0.5)), "{}", length(0.5));
        assert!((20.0..80.0).contains(&length(0.8)), "{}", length(0.8));
        assert_eq!((automatic_block(&[0.01; 100], Kind::Circular), automatic_block(&[0.1, 0.2], Kind::Circular)), (1.0, 1.0));
    }

    #[test]
    fn percentiles_interpolate() {
        let x = [1.0, 2.0, 4.0];
        assert_eq!([0.0, 0.25, 0.75, 1.0].map(|p| percentile(&x, p)), [1.0, 1.5, 3.0, 4.0]);
        assert!(percentile(&x[..1], 0.5).is_nan());
    }
}
