//! Risk figures of simulated P&L: moments, tails, order statistics, histograms, with standard errors; rows reduced on the device.
//!
//! mean, sd (n−1), skew; entropic = (1/a)·(ln Σ e^(−a·x) − ln n); VaR_α = −q, q the linear-interpolated α-quantile (`var`) or the order
//! statistic x₍k₎, k = ⌈αn⌉ (`var_order`); CVaR_α = −x₍k₎ + Σ (x₍k₎ − x)⁺ / (αn): Rockafellar and Uryasev's, with a fraction of the k-th loss
//! (`cvar`), or over ⌈αn⌉: mean of the k worst (`cvar_tail_mean`); quadratic CVaR = min_ω ω + λ·√(mean ((−x − ω)⁺)²).
//! errors   mean: sd/√n; sd: from the fourth moment; VaR: half the width of the ±1.96·√(nα(1−α)) order statistics over 1.96; CVaR: sd of
//!          (x₍k₎ − x)⁺/α over √n; entropic: sd of e^(−a·x) over its mean, a and √n. Antithetic neighbours count as one draw: their
//!          covariance is added.
//!
//! Shapes   values: buffers of rows [R,P], each a slab of the paths; partial [R,⌈P/2048⌉,10]; counts [Q,slabs,2048] of queries; tails
//!          [Q,⌈P/2048⌉,4].
//! Launch   `hedge_moments`, `hedge_tail` a workgroup per row and 2,048 values; `hedge_count` a workgroup per query and slab; `hedge_sum_counts`
//!          a thread per bin.
//! Floor    4 bytes a value and sweep: one for moments, three for order statistics (11 + 11 + 10 bits of the ordered image), one per tail.
//! Numerics blocks of 2,048 about their own mean, merged on the host in f64 in order: the same bits whatever the slabs. Order statistics are
//!          exact (of values rounded to f32). Counts by integer atomics in workgroup memory.
//! Source   Chan, Golub, LeVeque 1983; Pébay 2008 (higher moments); Rockafellar & Uryasev 2000; Föllmer & Schied 2002 (entropic).
//! Files    shaders/hedge_risk.wgsl · cuda/hedge_risk.cu · reference: the `_cpu` functions

use crate::device::{Buffer, Device, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of the kernels.
    pub struct HedgeRiskParams {
        /// Rows, or queries.
        rows: u32,
        /// Values of a row.
        count: u32,
        /// Rows from one that has an exponential sum to the next; the others have none.
        period: u32,
        /// Workgroups of a query of `hedge_count`.
        slabs: u32,
        /// Bits of the image that are known (`hedge_count`); 32: a histogram between edges.
        known: u32,
        /// Bins of a histogram.
        bins: u32,
        /// Absolute risk aversion.
        risk_aversion: f32,
    }
}

const OP: &str = "hedge_risk";
const WG: u32 = 128;
/// Values of a block.
const BLOCK: usize = 2048;
/// Reals of a block: mean, Σd², Σd³, Σd⁴, Σ d·d' of neighbours, least, largest, Σ e^(−a(x − least)), Σ of their squares, Σ of products of neighbours.
const PARTIAL: usize = 10;
/// Bins of a query.
const BINS: usize = 2048;
/// Reals of a tail's block: Σ e, Σ e², Σ e·e' of neighbours with e = (v − x)⁺, values below v.
const TAIL: usize = 4;

fn params(words: &[u32]) -> HedgeRiskParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn blocks(words: &[u32]) -> u64 {
    u64::from(params(words).rows) * u64::from(params(words).count).div_ceil(BLOCK as u64)
}

fn values(words: &[u32]) -> u64 {
    u64::from(params(words).rows) * u64::from(params(words).count)
}

/// Moments of blocks of each row.
pub static HEDGE_MOMENTS: Kernel = Kernel {
    name: "hedge_moments",
    about: "moments, extremes and exponential sums of blocks of P&L",
    args: &[reads("values"), writes("partial")],
    params: layout::<HedgeRiskParams>(),
    workgroup: WG,
    constants: &[],
    groups: blocks,
    wgsl: wgsl!("hedge_risk"),
    cuda: cuda!("hedge_risk"),
    cpu: Some(Cpu { f32: hedge_moments_cpu::<f32>, f64: hedge_moments_cpu::<f64> }),
    cost: Cost { unit: "value", units: values, bytes: 4.0, flops: 20.0 },
};

/// Counts of a digit of the ordered image, or of a histogram.
pub static HEDGE_COUNT: Kernel = Kernel {
    name: "hedge_count",
    about: "digits of order statistics, or bins of histograms, counted",
    args: &[reads("values"), reads_u32("queries"), reads("edges"), writes_u32("counts")],
    groups: |words| u64::from(params(words).rows) * u64::from(params(words).slabs),
    cpu: Some(Cpu { f32: hedge_count_cpu::<f32>, f64: hedge_count_cpu::<f64> }),
    cost: Cost { unit: "value", units: values, bytes: 4.0, flops: 6.0 },
    ..HEDGE_MOMENTS
};

/// Counts summed over slabs.
pub static HEDGE_SUM_COUNTS: Kernel = Kernel {
    name: "hedge_sum_counts",
    about: "counts of the slabs of a query summed",
    args: &[reads_u32("counts"), writes_u32("sums")],
    groups: |words| (u64::from(params(words).rows) * BINS as u64).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hedge_sum_counts_cpu::<f32>, f64: hedge_sum_counts_cpu::<f64> }),
    cost: Cost { unit: "bin", units: |words| u64::from(params(words).rows) * BINS as u64, bytes: 8.0, flops: 1.0 },
    ..HEDGE_MOMENTS
};

/// Shortfalls below thresholds.
pub static HEDGE_TAIL: Kernel = Kernel {
    name: "hedge_tail",
    about: "sums of shortfalls below a threshold and of their squares",
    args: &[reads("values"), reads_u32("queries"), reads("edges"), writes("tails")],
    cpu: Some(Cpu { f32: hedge_tail_cpu::<f32>, f64: hedge_tail_cpu::<f64> }),
    cost: Cost { unit: "value", units: values, bytes: 4.0, flops: 8.0 },
    ..HEDGE_MOMENTS
};

// ---- CPU column -----------------------------------------------------------------------------------------------------------------

/// Image of a real whose order as a whole number is the real's.
pub(crate) fn image(x: f32) -> u32 {
    let raw = x.to_bits();
    if raw >> 31 == 1 { !raw } else { raw | 1 << 31 }
}

fn value_of(image: u32) -> f32 {
    f32::from_bits(if image >> 31 == 1 { image & 0x7fff_ffff } else { !image })
}

/// Digit of the image that comes after `known` bits: how far to shift it, and how many values it has.
fn digit(known: u32) -> (u32, u32) {
    match known {
        0 => (21, 2048),
        11 => (10, 2048),
        _ => (0, 1024),
    }
}

fn hedge_moments_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRiskParams = launch.params()?;
    let (values, partial) = (launch.real()?, launch.real_mut()?);
    let (count, blocks) = (p.count as usize, (p.count as usize).div_ceil(BLOCK));
    partial.par_chunks_exact_mut(PARTIAL).take(p.rows as usize * blocks).enumerate().for_each(|(i, out)| {
        let (row, block) = (i / blocks, i % blocks);
        let x = &values[row * count + block * BLOCK..][..BLOCK.min(count - block * BLOCK)];
        let pivot = x[0];
        let mean = pivot + sum(x, |v| v - pivot) / R::of(x.len() as f64);
        let (least, most) = x.iter().fold((pivot, pivot), |(a, b), &v| (a.min(v), b.max(v)));
        let pairs = |f: &dyn Fn(R) -> R| x.chunks_exact(2).map(|pair| f(pair[0]) * f(pair[1])).sum::<R>();
        let a = -R::of(f64::from(p.risk_aversion));
        let weight = |v: R| (a * (v - least)).exp();
        out[..7].copy_from_slice(&[
            mean,
            sum(x, |v| (v - mean) * (v - mean)),
            sum(x, |v| (v - mean) * (v - mean) * (v - mean)),
            sum(x, |v| (v - mean) * (v - mean) * ((v - mean) * (v - mean))),
            pairs(&|v| v - mean),
            least,
            most,
        ]);
        if row.is_multiple_of(p.period.max(1) as usize) {
            let weights: Vec<R> = x.iter().map(|&v| weight(v)).collect();
            out[7] = sum(&weights, |w| w);
            out[8] = sum(&weights, |w| w * w);
            out[9] = weights.chunks_exact(2).map(|pair| pair[0] * pair[1]).sum();
        }
    });
    Ok(())
}

/// Σ f(x) in sixteen strands, which the compiler keeps in a vector.
fn sum<R: Real>(x: &[R], f: impl Fn(R) -> R) -> R {
    let mut strands = [R::ZERO; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder().iter().map(|&v| f(v)).sum::<R>();
    for chunk in chunks {
        for (strand, &v) in strands.iter_mut().zip(chunk) {
            *strand += f(v);
        }
    }
    strands.into_iter().sum::<R>() + rest
}

fn hedge_count_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRiskParams = launch.params()?;
    let (values, queries, edges, counts) = (launch.real()?, launch.word()?, launch.real()?, launch.word_mut()?);
    let (count, slabs) = (p.count as usize, p.slabs.max(1) as usize);
    let slab = count.div_ceil(slabs);
    let (shift, digits) = digit(p.known);
    counts.par_chunks_exact_mut(BINS).take(p.rows as usize * slabs).enumerate().for_each(|(i, out)| {
        let (query, part) = (i / slabs, i % slabs);
        let row = queries[2 * query] as usize * count;
        let x = &values[row + (part * slab).min(count)..row + ((part + 1) * slab).min(count)];
        out.fill(0);
        if p.known >= 32 {
            let (low, scale, last) = (edges[2 * query].f32(), edges[2 * query + 1].f32(), p.bins.clamp(1, BINS as u32) - 1);
            for v in x {
                out[(((v.f32() - low) * scale).max(0.0) as u32).min(last) as usize] += 1;
            }
        } else {
            let prefix = queries[2 * query + 1];
            for v in x {
                let image = image(v.f32());
                if p.known == 0 || image >> (32 - p.known) == prefix {
                    out[(image >> shift & (digits - 1)) as usize] += 1;
                }
            }
        }
    });
    Ok(())
}

fn hedge_sum_counts_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRiskParams = launch.params()?;
    let (counts, sums) = (launch.word()?, launch.word_mut()?);
    for (query, out) in sums.chunks_exact_mut(BINS).take(p.rows as usize).enumerate() {
        out.fill(0);
        for part in counts[query * p.slabs as usize * BINS..].chunks_exact(BINS).take(p.slabs as usize) {
            out.iter_mut().zip(part).for_each(|(sum, n)| *sum += n);
        }
    }
    Ok(())
}

fn hedge_tail_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRiskParams = launch.params()?;
    let (values, queries, edges, tails) = (launch.real()?, launch.word()?, launch.real()?, launch.real_mut()?);
    let (count, blocks) = (p.count as usize, (p.count as usize).div_ceil(BLOCK));
    tails.par_chunks_exact_mut(TAIL).take(p.rows as usize * blocks).enumerate().for_each(|(i, out)| {
        let (query, block) = (i / blocks, i % blocks);
        let (row, level) = (queries[2 * query] as usize, edges[2 * query]);
        let x = &values[row * count + block * BLOCK..][..BLOCK.min(count - block * BLOCK)];
        let short = |v: R| (level - v).max(R::ZERO);
        out[0] = sum(x, short);
        out[1] = sum(x, |v| short(v) * short(v));
        out[2] = x.chunks_exact(2).map(|pair| short(pair[0]) * short(pair[1])).sum();
        out[3] = sum(x, |v| if v < level { R::ONE } else { R::ZERO });
    });
    Ok(())
}

// ---- figures ----------------------------------------------------------------------------------------------------------------------

/// Which figures, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct RiskOptions {
    /// Tail probability of VaR and CVaR.
    pub alpha: f64,
    /// Absolute risk aversion of the entropic risk, per unit of money.
    pub risk_aversion: f64,
    /// λ of the quadratic CVaR, above 1; `None`: not computed.
    pub quadratic: Option<f64>,
    /// Probabilities of the quantiles that are wanted.
    pub quantiles: Vec<f64>,
    /// Bins of the histogram, at most 2,048.
    pub bins: usize,
}

impl Default for RiskOptions {
    fn default() -> RiskOptions {
        RiskOptions { alpha: 0.05, risk_aversion: 1.0, quadratic: None, quantiles: vec![0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99], bins: 64 }
    }
}

impl RiskOptions {
    /// Checks every option.
    /// # Errors
    /// `Parameter` naming the illegal one.
    pub fn check(&self) -> Result<()> {
        let inside = |name: &str, x: f64| {
            if x > 0.0 && x < 1.0 { Ok(()) } else { Err(bad(name, x, "give a probability between 0 and 1: 0.05 is the worst five per cent")) }
        };
        inside("alpha", self.alpha)?;
        self.quantiles.iter().try_for_each(|&q| inside("quantiles", q))?;
        if !(self.risk_aversion.is_finite() && self.risk_aversion > 0.0) {
            return Err(bad("risk_aversion", self.risk_aversion, "give an absolute risk aversion above 0, per unit of money"));
        }
        if let Some(q) = self.quadratic.filter(|q| !(q.is_finite() && *q > 1.0)) {
            return Err(bad("quadratic", q, "the quadratic CVaR's λ is above 1 (10)"));
        }
        if self.bins == 0 || self.bins > BINS {
            return Err(bad("bins", self.bins, "a histogram has 1 to 2048 bins"));
        }
        Ok(())
    }
}

fn bad(name: &str, value: impl std::fmt::Display, help: &str) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() }
}

/// Risk figures of P&L at maturity, per option; `_error` are standard errors. Losses are positive.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RiskFigures {
    /// Mean P&L.
    pub mean: f64,
    /// Its standard error.
    pub mean_error: f64,
    /// Standard deviation (n−1); NaN for one path.
    pub sd: f64,
    /// Its standard error.
    pub sd_error: f64,
    /// Third standardised moment; NaN without deviation.
    pub skew: f64,
    /// Worst path.
    pub min: f64,
    /// Best path.
    pub max: f64,
    /// Loss at α: linear-interpolated percentile.
    pub var: f64,
    /// Loss at α: order statistic ⌈αn⌉.
    pub var_order: f64,
    /// Standard error of VaR.
    pub var_error: f64,
    /// Mean loss of the worst α: Rockafellar and Uryasev, with a fraction of the k-th loss.
    pub cvar: f64,
    /// Mean loss of the ⌈αn⌉ worst.
    pub cvar_tail_mean: f64,
    /// Standard error of CVaR.
    pub cvar_error: f64,
    /// (1/a)·(log-sum-exp(−a·P&L) − ln n).
    pub entropic: f64,
    /// Its standard error.
    pub entropic_error: f64,
    /// min over ω of ω + λ·√mean ((−P&L − ω)⁺)²; NaN unless asked for.
    pub quadratic_cvar: f64,
    /// Premium at which hedging is worth as much as not trading, at the entropic risk aversion; set by whoever knows the premium.
    pub indifference_price: f64,
    /// Mean cost of a path.
    pub cost: f64,
    /// Its standard error.
    pub cost_error: f64,
    /// Mean traded notional of a path.
    pub turnover: f64,
    /// Linear-interpolated quantiles at the probabilities asked for.
    pub quantiles: Vec<f64>,
}

/// Counts of equal bins between two edges.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histogram {
    /// Lower edge of the first bin.
    pub low: f64,
    /// Upper edge of the last bin.
    pub high: f64,
    /// Paths in each bin.
    pub counts: Vec<u64>,
}

/// A slab of paths: results [U,3,P] as `hedge` leaves them.
#[derive(Debug, Clone)]
pub struct Slab {
    /// P&L, cost and turnover of each set-up.
    pub results: Buffer,
    /// P; a multiple of 2,048 but in the last slab.
    pub paths: u64,
}

/// Sums of a row.
#[derive(Clone, Copy, Default)]
struct Moments {
    n: f64,
    mean: f64,
    m2: f64,
    m3: f64,
    m4: f64,
    pairs: f64,
    least: f64,
    most: f64,
    weight: f64,
    weight2: f64,
    weight_pairs: f64,
}

impl Moments {
    fn of(x: &[f64], n: f64) -> Moments {
        Moments { n, mean: x[0], m2: x[1], m3: x[2], m4: x[3], pairs: x[4], least: x[5], most: x[6], weight: x[7], weight2: x[8], weight_pairs: x[9] }
    }

    /// Joins with what comes after.
    fn join(self, b: Moments, risk_aversion: f64) -> Moments {
        if self.n == 0.0 {
            return b;
        }
        let (n, d) = (self.n + b.n, b.mean - self.mean);
        let (na, nb) = (self.n, b.n);
        let least = self.least.min(b.least);
        let scale = |m: &Moments| (-risk_aversion * (m.least - least)).exp();
        let (sa, sb) = (scale(&self), scale(&b));
        let mean = self.mean + d * nb / n;
        // Neighbours lie in one block: Σ d·d' about the joint mean, pairs of them, and 2·mean offset of the pairs' sums left out is 0.
        let shift = |m: &Moments| m.pairs + 0.5 * m.n * (m.mean - mean) * (m.mean - mean);
        Moments {
            n,
            mean,
            m2: self.m2 + b.m2 + d * d * na * nb / n,
            m3: self.m3 + b.m3 + d.powi(3) * na * nb * (na - nb) / (n * n) + 3.0 * d * (na * b.m2 - nb * self.m2) / n,
            m4: self.m4
                + b.m4
                + d.powi(4) * na * nb * (na * na - na * nb + nb * nb) / n.powi(3)
                + 6.0 * d * d * (na * na * b.m2 + nb * nb * self.m2) / (n * n)
                + 4.0 * d * (na * b.m3 - nb * self.m3) / n,
            pairs: shift(&self) + shift(&b),
            least,
            most: self.most.max(b.most),
            weight: self.weight * sa + b.weight * sb,
            weight2: self.weight2 * sa * sa + b.weight2 * sb * sb,
            weight_pairs: self.weight_pairs * sa * sa + b.weight_pairs * sb * sb,
        }
    }

    /// Standard error of the mean of n draws with these central sums; antithetic neighbours are one draw.
    fn error(n: f64, m2: f64, pairs: f64, antithetic: bool) -> f64 {
        if n < 2.0 {
            return f64::NAN;
        }
        let total = m2 + if antithetic { 2.0 * pairs } else { 0.0 };
        (total.max(0.0) / (n * (n - 1.0))).sqrt()
    }
}

/// Reduces results of all slabs to figures and a histogram of P&L, one per set-up.
/// # Errors
/// `Parameter` for an illegal option; `Shape` where a slab is not [U,3,P]; device errors.
pub fn hedge_risk(device: &Device, slabs: &[Slab], setups: usize, options: &RiskOptions, antithetic: bool) -> Result<Vec<(RiskFigures, Histogram)>> {
    options.check()?;
    if let Some(s) = slabs.iter().find(|s| s.results.len() != setups as u64 * 3 * s.paths || s.paths == 0) {
        return Err(Error::Shape {
            op: OP,
            arg: "results".into(),
            expected: format!("[U,3,P] = [{setups}, 3, {}]", s.paths),
            got: format!("{} values", s.results.len()),
        });
    }
    let reducer = Reducer { device, slabs, rows: 3 * setups, n: slabs.iter().map(|s| s.paths).sum() };
    let moments = reducer.moments(options.risk_aversion)?;
    let mut out: Vec<RiskFigures> = (0..setups).map(|u| of_moments(&moments[3 * u..3 * u + 3], options, antithetic)).collect();
    reducer.quantiles(options, &mut out)?;
    reducer.tails(options, antithetic, &mut out)?;
    if let Some(lambda) = options.quadratic {
        reducer.quadratic(lambda, &mut out)?;
    }
    let histograms = reducer.histograms(options, &out)?;
    Ok(out.into_iter().zip(histograms).collect())
}

fn of_moments(rows: &[Moments], options: &RiskOptions, antithetic: bool) -> RiskFigures {
    let (m, cost, turnover) = (rows[0], rows[1], rows[2]);
    let (n, a) = (m.n, options.risk_aversion);
    let variance = if n > 1.0 { m.m2 / (n - 1.0) } else { f64::NAN };
    let population = m.m2 / n;
    let skew = if population > 0.0 { m.m3 / n / population.powf(1.5) } else { f64::NAN };
    let spread = ((m.m4 / n - population * population).max(0.0) / n).sqrt();
    let sd_error = if variance > 0.0 { spread / (2.0 * variance.sqrt()) } else { 0.0 };
    let weights = Moments::error(n, m.weight2 - m.weight * m.weight / n, m.weight_pairs - 0.5 * m.weight * m.weight / n, antithetic);
    RiskFigures {
        mean: m.mean,
        mean_error: Moments::error(n, m.m2, m.pairs, antithetic),
        sd: variance.sqrt(),
        sd_error,
        skew,
        min: m.least,
        max: m.most,
        entropic: ((m.weight / n).ln()) / a - m.least,
        entropic_error: weights / (m.weight / n) / a,
        quadratic_cvar: f64::NAN,
        indifference_price: f64::NAN,
        cost: cost.mean,
        cost_error: Moments::error(n, cost.m2, cost.pairs, antithetic),
        turnover: turnover.mean,
        ..RiskFigures::default()
    }
}

/// One-based rank of an order statistic and the weight of the next one, of the linear-interpolated quantile.
fn linear_rank(n: u64, q: f64) -> (u64, f64) {
    let at = q * (n - 1) as f64;
    let low = (at.floor() as u64).min(n - 1);
    (low + 1, at - low as f64)
}

/// Rank ⌈αn⌉.
fn tail_rank(n: u64, alpha: f64) -> u64 {
    ((alpha * n as f64 * (1.0 - 1e-12)).ceil() as u64).clamp(1, n)
}

/// An order statistic on its way: row, rank within the values that share the known bits, the bits.
#[derive(Clone, Copy)]
struct Wanted {
    row: u32,
    rank: u64,
    prefix: u32,
}

struct Reducer<'a> {
    device: &'a Device,
    slabs: &'a [Slab],
    rows: usize,
    n: u64,
}

impl Reducer<'_> {
    fn params(&self, rows: usize, slab: &Slab) -> HedgeRiskParams {
        HedgeRiskParams { rows: rows as u32, count: slab.paths as u32, period: 3, slabs: 1, known: 0, bins: 0, risk_aversion: 0.0 }
    }

    fn moments(&self, risk_aversion: f64) -> Result<Vec<Moments>> {
        let mut joined = vec![Moments::default(); self.rows];
        for slab in self.slabs {
            let blocks = slab.paths.div_ceil(BLOCK as u64);
            let partial = self.device.zeros("partial", self.rows as u64 * blocks * PARTIAL as u64)?;
            let mut pass = self.device.pass(OP);
            let params = HedgeRiskParams { risk_aversion: risk_aversion as f32, ..self.params(self.rows, slab) };
            pass.launch(&HEDGE_MOMENTS, &params, &[View::from(&slab.results), View::from(&partial)])?;
            let read = pass.read(&partial)?;
            let values = pass.submit()?.f64(read)?;
            for (row, parts) in values.chunks_exact(blocks as usize * PARTIAL).enumerate() {
                for (i, part) in parts.chunks_exact(PARTIAL).enumerate() {
                    let n = (slab.paths - (i * BLOCK) as u64).min(BLOCK as u64);
                    joined[row] = joined[row].join(Moments::of(part, n as f64), f64::from(risk_aversion as f32));
                }
            }
        }
        Ok(joined)
    }

    /// Counts of every query, over all slabs.
    fn counts(&self, queries: &[u32], edges: &[f64], known: u32, bins: usize) -> Result<Vec<u64>> {
        let n = queries.len() / 2;
        let mut sums = vec![0u64; n * BINS];
        let words = self.device.upload_u32("queries", queries)?;
        let reals = self.device.zeros("edges", edges.len().max(2) as u64)?;
        if !edges.is_empty() {
            self.device.write_f64(&reals, edges)?;
        }
        for slab in self.slabs {
            let parts = (1024 / n as u64).clamp(1, 128).min(slab.paths.div_ceil(BLOCK as u64)) as u32;
            let counts = self.device.zeros_u32("counts", n as u64 * u64::from(parts) * BINS as u64)?;
            let total = self.device.zeros_u32("sums", (n * BINS) as u64)?;
            let params = HedgeRiskParams { slabs: parts, known, bins: bins as u32, ..self.params(n, slab) };
            let mut pass = self.device.pass(OP);
            pass.launch(&HEDGE_COUNT, &params, &[View::from(&slab.results), View::from(&words), View::from(&reals), View::from(&counts)])?;
            pass.launch(&HEDGE_SUM_COUNTS, &params, &[View::from(&counts), View::from(&total)])?;
            let read = pass.read(&total)?;
            for (sum, more) in sums.iter_mut().zip(pass.submit()?.u32(read)?) {
                *sum += u64::from(more);
            }
        }
        Ok(sums)
    }

    /// Order statistics: (row, one-based rank) each.
    fn select(&self, ranks: &[(u32, u64)]) -> Result<Vec<f64>> {
        let mut wanted: Vec<Wanted> = ranks.iter().map(|&(row, rank)| Wanted { row, rank, prefix: 0 }).collect();
        for known in [0, 11, 22] {
            let mut asked: Vec<(u32, u32)> = wanted.iter().map(|w| (w.row, w.prefix)).collect();
            asked.sort_unstable();
            asked.dedup();
            // Counts of a few hundred queries at a time: 8 KiB each.
            for some in asked.chunks(256) {
                let queries: Vec<u32> = some.iter().flat_map(|&(row, prefix)| [row, prefix]).collect();
                let counts = self.counts(&queries, &[], known, 0)?;
                for w in &mut wanted {
                    let Ok(query) = some.binary_search(&(w.row, w.prefix)) else { continue };
                    if w.rank == 0 {
                        continue;
                    }
                    let bins = &counts[query * BINS..(query + 1) * BINS];
                    let (mut below, mut bin) = (0, 0);
                    while bin + 1 < BINS && below + bins[bin] < w.rank {
                        below += bins[bin];
                        bin += 1;
                    }
                    // The rank is taken from a copy with the next prefix, which later chunks do not hold.
                    *w = Wanted { row: w.row | DONE, rank: w.rank - below, prefix: w.prefix << digit(known).1.ilog2() | bin as u32 };
                }
            }
            wanted.iter_mut().for_each(|w| w.row &= !DONE);
        }
        Ok(wanted.iter().map(|w| f64::from(value_of(w.prefix))).collect())
    }

    fn quantiles(&self, options: &RiskOptions, out: &mut [RiskFigures]) -> Result<()> {
        let (n, alpha) = (self.n, options.alpha);
        let k = tail_rank(n, alpha);
        let half_width = 1.96 * (n as f64 * alpha * (1.0 - alpha)).sqrt();
        let around = |by: f64| ((alpha * n as f64 + by).round().max(1.0) as u64).min(n);
        let probabilities: Vec<f64> = std::iter::once(alpha).chain(options.quantiles.iter().copied()).collect();
        let mut ranks = vec![k, around(-half_width), around(half_width)];
        for &q in &probabilities {
            let (low, _) = linear_rank(n, q);
            ranks.extend([low, (low + 1).min(n)]);
        }
        let asked: Vec<(u32, u64)> = (0..out.len()).flat_map(|u| ranks.iter().map(move |&r| (3 * u as u32, r))).collect();
        let values = self.select(&asked)?;
        for (figures, x) in out.iter_mut().zip(values.chunks_exact(ranks.len())) {
            let quantile = |i: usize| {
                let (low, high) = (x[3 + 2 * i], x[4 + 2 * i]);
                low + linear_rank(n, probabilities[i]).1 * (high - low)
            };
            figures.var = -quantile(0);
            figures.var_order = -x[0];
            figures.var_error = (x[2] - x[1]) / (2.0 * 1.96);
            figures.quantiles = (1..probabilities.len()).map(quantile).collect();
        }
        Ok(())
    }

    /// Shortfalls below a level per set-up: Σe, Σe², Σe·e' of neighbours, values below.
    fn shortfalls(&self, levels: &[f64]) -> Result<Vec<[f64; TAIL]>> {
        let mut sums = vec![[0.0; TAIL]; levels.len()];
        let queries: Vec<u32> = (0..levels.len() as u32).flat_map(|u| [3 * u, 0]).collect();
        let edges: Vec<f64> = levels.iter().flat_map(|&v| [v, 0.0]).collect();
        let words = self.device.upload_u32("queries", &queries)?;
        let reals = self.device.zeros("edges", edges.len() as u64)?;
        self.device.write_f64(&reals, &edges)?;
        for slab in self.slabs {
            let blocks = slab.paths.div_ceil(BLOCK as u64);
            let tails = self.device.zeros("tails", levels.len() as u64 * blocks * TAIL as u64)?;
            let mut pass = self.device.pass(OP);
            let args = [View::from(&slab.results), View::from(&words), View::from(&reals), View::from(&tails)];
            pass.launch(&HEDGE_TAIL, &self.params(levels.len(), slab), &args)?;
            let read = pass.read(&tails)?;
            let values = pass.submit()?.f64(read)?;
            for (sum, parts) in sums.iter_mut().zip(values.chunks_exact(blocks as usize * TAIL)) {
                for part in parts.chunks_exact(TAIL) {
                    sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        Ok(sums)
    }

    fn tails(&self, options: &RiskOptions, antithetic: bool, out: &mut [RiskFigures]) -> Result<()> {
        let n = self.n as f64;
        let (worst, k) = (options.alpha * n, tail_rank(self.n, options.alpha) as f64);
        let levels: Vec<f64> = out.iter().map(|f| -f.var_order).collect();
        for (figures, [e, e2, pairs, _]) in out.iter_mut().zip(self.shortfalls(&levels)?) {
            figures.cvar = figures.var_order + e / worst;
            figures.cvar_tail_mean = figures.var_order + e / k;
            figures.cvar_error = Moments::error(n, e2 - e * e / n, pairs - 0.5 * e * e / n, antithetic) / options.alpha;
        }
        Ok(())
    }

    /// ω by bisection of 1 = λ·mean e / √(mean e²), e = (−ω − x)⁺, which falls in ω.
    fn quadratic(&self, lambda: f64, out: &mut [RiskFigures]) -> Result<()> {
        let n = self.n as f64;
        // At ω below −max by enough, the slope 1 − λ·… is negative; at −min and above it is 1.
        let mut low: Vec<f64> = out.iter().map(|f| -f.max - (f.max - f.min + f.max.abs() * 1e-6) / (lambda * lambda - 1.0).sqrt() - 1e-12).collect();
        let mut high: Vec<f64> = out.iter().map(|f| -f.min).collect();
        let value = |omega: f64, s: &[f64; TAIL]| omega + lambda * (s[1] / n).sqrt();
        for figures in out.iter_mut() {
            figures.quadratic_cvar = -figures.min;
        }
        for _ in 0..24 {
            let middle: Vec<f64> = low.iter().zip(&high).map(|(a, b)| 0.5 * (a + b)).collect();
            let sums = self.shortfalls(&middle.iter().map(|w| -w).collect::<Vec<_>>())?;
            for (u, s) in sums.iter().enumerate() {
                out[u].quadratic_cvar = out[u].quadratic_cvar.min(value(middle[u], s));
                if s[1] > 0.0 && lambda * (s[0] / n) > (s[1] / n).sqrt() { low[u] = middle[u] } else { high[u] = middle[u] }
            }
        }
        Ok(())
    }

    fn histograms(&self, options: &RiskOptions, figures: &[RiskFigures]) -> Result<Vec<Histogram>> {
        let mut out = Vec::with_capacity(figures.len());
        for (some, at) in figures.chunks(256).zip((0u32..).step_by(256)) {
            let queries: Vec<u32> = (0..some.len() as u32).flat_map(|u| [3 * (at + u), 0]).collect();
            let scale = |f: &RiskFigures| if f.max > f.min { options.bins as f64 / (f.max - f.min) } else { 0.0 };
            let edges: Vec<f64> = some.iter().flat_map(|f| [f.min, scale(f)]).collect();
            let counts = self.counts(&queries, &edges, 32, options.bins)?;
            out.extend(some.iter().zip(counts.chunks_exact(BINS)).map(|(f, bins)| Histogram {
                low: f.min,
                high: f.max,
                counts: bins[..options.bins].to_vec(),
            }));
        }
        Ok(out)
    }
}

/// Marks a query that has been answered in this round.
const DONE: u32 = 1 << 31;
