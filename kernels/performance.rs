//! Performance statistics of many return series at once.
//!
//! With R the returns of a series, n their number, A periods per year, m₂ m₃ m₄ central sums, E the compounded equity from 1:
//! mean = A·mean(R); volatility = √A·sd (n−1); sharpe = √A·mean/sd; sortino = √A·mean/√(mean(min(R,0)²)); total_return = E_n − 1;
//! cagr = E_n^(A/n) − 1; max_drawdown = max(1 − E/peak), the peak includes the start; calmar = cagr/max_drawdown; skew, kurtosis
//! (not excess) with divisor n; hit_rate = share of R > 0; cvar_95 = −mean of the worst k = 0.05·n returns, the last with its fractional
//! weight (Rockafellar & Uryasev); probabilistic_sharpe = Φ(s√(n−1)/√(1 − skew·s + (kurtosis−1)/4·s²)), s the per-period ratio.
//!
//! Shapes   returns [N,T] simple returns per period; statistics [N, STATISTICS] on the device, ratios finished on the host in f64.
//! Launch   one workgroup of WG threads per series: shifted sum, central sums, drawdown by an ordered tree of
//!          (growth, end to peak, lowest, worst) summaries, then a radix selection of the tail.
//! Scratch  none; workgroup memory 6·WG + 256 words.
//! Floor    T·4 bytes read once from memory (the seven passes hit the cache), about 60 instructions per value.
//! Numerics sums are shifted by the first return and reduced in a fixed tree; growth is mantissa·2^exponent; a return ≤ −100 % is
//!          ruin: total return −1, drawdown 1.
//! Source   names and divisors as in empyrical; Bailey & López de Prado 2012; Rockafellar & Uryasev 2000.
//! Files    shaders/performance.wgsl · cuda/performance.cu · reference: `performance_cpu`

use crate::conformance::{Case, Outputs, defined};
use crate::device::{Buffer, Device, Pass, Read, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, writes};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of [`PERFORMANCE`].
    pub struct PerformanceParams {
        /// Series.
        n: u32,
        /// Returns per series.
        t: u32,
        /// Index of the order statistic where the tail ends: ⌊0.05·T⌋.
        tail: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 128;
/// Statistics per series: mean, m2, m3, m4, downside sum of squares, hits, growth mantissa, growth exponent, max drawdown,
/// tail sum, tail count, tail value.
pub const STATISTICS: u64 = 12;
/// Share of the worst returns in `cvar_95`.
const TAIL: f64 = 0.05;

fn params(words: &[u32]) -> Option<PerformanceParams> {
    params_of(words)
}

/// Moments, growth, drawdown and tail of each series.
pub static PERFORMANCE: Kernel = Kernel {
    name: "performance",
    about: "moments, growth, drawdown and tail of return series",
    args: &[reads("returns"), writes("statistics")],
    params: layout::<PerformanceParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| params(words).map_or(0, |p| u64::from(p.n)),
    wgsl: wgsl!("performance"),
    cuda: cuda!("performance"),
    cpu: Some(Cpu { f32: performance_cpu::<f32>, f64: performance_cpu::<f64> }),
    cost: Cost { unit: "value", units: |words| params(words).map_or(0, |p| u64::from(p.n) * u64::from(p.t)), bytes: 4.0, flops: 60.0 },
};

fn performance_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PerformanceParams = launch.params()?;
    let (returns, statistics) = (launch.real()?, launch.real_mut()?);
    let rows = returns.par_chunks_exact(p.t as usize).zip(statistics.par_chunks_exact_mut(STATISTICS as usize));
    rows.take(p.n as usize).for_each(|(x, out)| series(x, p.tail as usize, out));
    Ok(())
}

/// Sum in blocks of 64, so that f32 keeps its digits.
fn blocked<R: Real>(x: &[R], f: impl Fn(R) -> R) -> R {
    x.chunks(64).map(|block| block.iter().map(|&v| f(v)).sum::<R>()).sum()
}

fn series<R: Real>(x: &[R], tail: usize, out: &mut [R]) {
    let (n, first) = (R::of(x.len() as f64), x[0]);
    let offset = blocked(x, |v| v - first) / n;
    let centred = |v: R| (v - first) - offset;
    let m2 = blocked(x, |v| centred(v) * centred(v));
    let m3 = blocked(x, |v| centred(v) * centred(v) * centred(v));
    let m4 = blocked(x, |v| centred(v) * centred(v) * centred(v) * centred(v));
    let downside = blocked(x, |v| v.min(R::ZERO) * v.min(R::ZERO));
    let hits = x.iter().filter(|&&v| v > R::ZERO).count();
    let (mantissa, exponent, drawdown) = growth(x);
    let mut sorted: Vec<R> = x.to_vec();
    let (worse, value, _) = sorted.select_nth_unstable_by(tail.min(x.len() - 1), |a, b| a.f64().total_cmp(&b.f64()));
    let value = *value;
    let below = worse.iter().filter(|&&v| v < value);
    let (count, sum) = below.fold((0usize, 0f64), |(c, s), v| (c + 1, s + v.f64()));
    let values =
        [first + offset, m2, m3, m4, downside, R::of(hits as f64), mantissa, R::of(f64::from(exponent)), drawdown, R::of(sum), R::of(count as f64), value];
    out.copy_from_slice(&values);
}

/// Compounded growth as (mantissa, exponent), and the largest drawdown from the running peak.
fn growth<R: Real>(x: &[R]) -> (R, i32, R) {
    let (mut mantissa, mut exponent, mut level, mut lowest) = (R::ONE, 0, R::ONE, R::ONE);
    for block in x.chunks(64) {
        for &v in block {
            let factor = (R::ONE + v).max(R::of(1e-30));
            mantissa *= factor;
            level = (level * factor).min(R::ONE);
            lowest = lowest.min(level);
        }
        mantissa = mantissa.max(R::of(1e-37));
        let shift = mantissa.f64().log2().floor() as i32;
        mantissa = R::of(mantissa.f64() * 2f64.powi(-shift));
        exponent += shift;
    }
    (mantissa, exponent, R::ONE - lowest)
}

/// Statistics of one series, finished in f64. Undefined ones are NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Performance {
    /// Annualised mean return.
    pub mean: f64,
    /// Annualised standard deviation (n−1).
    pub volatility: f64,
    /// Annualised Sharpe ratio (n−1); undefined below two returns or at zero deviation.
    pub sharpe: f64,
    /// Annualised Sortino ratio against zero; undefined without losses.
    pub sortino: f64,
    /// Compounded return over all bars.
    pub total_return: f64,
    /// Compound annual growth rate.
    pub cagr: f64,
    /// Largest loss from a running peak, positive.
    pub max_drawdown: f64,
    /// cagr / max_drawdown; undefined without a drawdown.
    pub calmar: f64,
    /// Skewness.
    pub skew: f64,
    /// Kurtosis, not excess.
    pub kurtosis: f64,
    /// Share of returns above zero.
    pub hit_rate: f64,
    /// Mean of the worst 5 % of returns, as a positive loss.
    pub cvar_95: f64,
    /// Probability that the true Sharpe ratio is above zero.
    pub probabilistic_sharpe: f64,
}

/// Names and values of a [`Performance`], in the order of the conformance contract.
impl Performance {
    /// Of no return at all.
    pub const NONE: Performance = Performance {
        mean: f64::NAN,
        volatility: f64::NAN,
        sharpe: f64::NAN,
        sortino: f64::NAN,
        total_return: 0.0,
        cagr: f64::NAN,
        max_drawdown: 0.0,
        calmar: f64::NAN,
        skew: f64::NAN,
        kurtosis: f64::NAN,
        hit_rate: f64::NAN,
        cvar_95: f64::NAN,
        probabilistic_sharpe: f64::NAN,
    };

    /// (name, value) pairs.
    pub fn entries(&self) -> [(&'static str, f64); 13] {
        [
            ("mean", self.mean),
            ("volatility", self.volatility),
            ("sharpe", self.sharpe),
            ("sortino", self.sortino),
            ("total_return", self.total_return),
            ("cagr", self.cagr),
            ("max_drawdown", self.max_drawdown),
            ("calmar", self.calmar),
            ("skew", self.skew),
            ("kurtosis", self.kurtosis),
            ("hit_rate", self.hit_rate),
            ("cvar_95", self.cvar_95),
            ("probabilistic_sharpe", self.probabilistic_sharpe),
        ]
    }

    /// Finishes the [`STATISTICS`] of a series of `t` returns.
    pub fn finish(s: &[f64], t: u64, periods_per_year: f64) -> Performance {
        let n = t as f64;
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { f64::NAN };
        let year = periods_per_year.sqrt();
        let deviation = if t < 2 { f64::NAN } else { (s[1] / (n - 1.0)).sqrt() };
        let (m2, log_growth) = (s[1] / n, s[6].max(1e-300).ln() + s[7] * std::f64::consts::LN_2);
        let (cagr, max_drawdown) = ((log_growth * periods_per_year / n).exp_m1(), s[8]);
        let (skew, kurtosis) = (ratio(s[2] / n, m2 * m2.sqrt()), ratio(s[3] / n, m2 * m2));
        let per_bar = ratio(s[0], deviation);
        let tail = TAIL * n;
        Performance {
            mean: s[0] * periods_per_year,
            volatility: deviation * year,
            sharpe: per_bar * year,
            sortino: ratio(s[0], (s[4] / n).sqrt()) * year,
            total_return: log_growth.exp_m1(),
            cagr,
            max_drawdown,
            calmar: ratio(cagr, max_drawdown),
            skew,
            kurtosis,
            hit_rate: s[5] / n,
            cvar_95: -(s[9] + (tail - s[10]) * s[11]) / tail,
            probabilistic_sharpe: probabilistic_sharpe(per_bar, 0.0, skew, kurtosis, t),
        }
    }
}

/// Probability that the true Sharpe ratio is above `benchmark`, from the measured ratio (both per period), skewness, kurtosis (not
/// excess) and the number of periods; NaN where one is undefined.
pub fn probabilistic_sharpe(sharpe: f64, benchmark: f64, skew: f64, kurtosis: f64, periods: u64) -> f64 {
    let spread = 1.0 - skew * sharpe + (kurtosis - 1.0) / 4.0 * sharpe * sharpe;
    if spread > 0.0 { normal_cdf((sharpe - benchmark) * (periods as f64 - 1.0).sqrt() / spread.sqrt()) } else { f64::NAN }
}

/// Φ, the standard normal distribution function, to about 1e-15 (complementary error function by series and continued fraction).
pub fn normal_cdf(x: f64) -> f64 {
    if x.is_nan() {
        return f64::NAN;
    }
    let z = x.abs();
    let density = (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt();
    let upper = if z < 3.0 {
        let (mut term, mut sum, mut k) = (z, z, 1.0);
        while term > 1e-18 * sum && k < 200.0 {
            term *= z * z / (2.0 * k + 1.0);
            sum += term;
            k += 1.0;
        }
        0.5 - density * sum
    } else {
        let fraction = (1..=80).rev().fold(z, |f, k| z + f64::from(k) / f);
        density / fraction
    };
    if x > 0.0 { 1.0 - upper } else { upper }
}

/// Records the statistics of `returns` [N,T]; finish the result with [`finish`].
/// # Errors
/// `Shape` if the values are not [N,T] or T is zero; `TooLarge` if one series exceeds a binding.
pub fn performance(pass: &mut Pass, returns: impl Into<View>, n: u64, t: u64) -> Result<Buffer> {
    let returns = returns.into();
    if t == 0 || returns.len() != n * t {
        let got = format!("{} values for N = {n}, T = {t}", returns.len());
        return Err(Error::Shape { op: "performance", arg: "returns".into(), expected: "[N,T] with T ≥ 1".into(), got });
    }
    let device = pass.device().clone();
    // Six strided passes and one run of ⌈T/WG⌉ values, four scans of 256 bins, two trees.
    device.check_rounds("performance", 8 * t.div_ceil(u64::from(WG)) + 1200, "rounds")?;
    let statistics = device.zeros("statistics", n * STATISTICS)?;
    for run in device.plan("performance", n, t.max(STATISTICS), 1, 60 * t)? {
        let x = pass.input(&returns.buffer, returns.range.start + run.start * t..returns.range.start + run.end * t)?;
        let out = pass.output(&statistics, run.start * STATISTICS..run.end * STATISTICS)?;
        let params = PerformanceParams { n: (run.end - run.start) as u32, t: t as u32, tail: (TAIL * t as f64).floor() as u32 };
        pass.launch(&PERFORMANCE, &params, &[x, out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(statistics)
}

/// Finishes downloaded statistics [N, STATISTICS] of series of `t` returns.
pub fn finish(statistics: &[f64], t: u64, periods_per_year: f64) -> Vec<Performance> {
    statistics.chunks_exact(STATISTICS as usize).map(|s| Performance::finish(s, t, periods_per_year)).collect()
}

/// [`performance`] and its download in one call: a read to be finished after the pass was submitted.
pub fn performance_read(pass: &mut Pass, returns: impl Into<View>, n: u64, t: u64) -> Result<Read> {
    let statistics = performance(pass, returns, n, t)?;
    pass.read(&statistics)
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let &[n, t] = case.shape("returns")? else {
        return Err(Error::Shape { op: "performance", arg: "returns".into(), expected: "[N,T]".into(), got: format!("{:?}", case.shape("returns")?) });
    };
    let returns = device.upload("returns", case.f32("returns")?)?;
    let mut pass = device.pass("performance");
    let read = performance_read(&mut pass, &returns, n as u64, t as u64)?;
    let mut outputs = Outputs::launched(pass.launches());
    let statistics = pass.submit()?.f64(read)?;
    let finished = finish(&statistics, t as u64, case.number("periods_per_year")?);
    for i in 0..13 {
        let name = finished.first().map_or("", |p| p.entries()[i].0);
        outputs.reals(name, finished.iter().map(|p| defined(p.entries()[i].1)).collect());
    }
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_cdf_matches_tables() {
        for (x, want) in
            [(0.0, 0.5), (1.0, 0.841_344_746_068_542_9), (-1.959_963_984_540_054, 0.025), (3.5, 0.999_767_370_920_964_5), (-8.0, 6.220_960_574_271_785e-16)]
        {
            assert!((normal_cdf(x) - want).abs() < 1e-15_f64.max(1e-12 * want), "{x}: {}", normal_cdf(x));
        }
    }

    #[test]
    fn ruin_twice_in_a_block_is_still_a_number() {
        let mut out = [0.0f32; STATISTICS as usize];
        series(&[0.01, -1.5, 0.02, -2.0, 0.0], 0, &mut out);
        let wide: Vec<f64> = out.iter().map(|&x| f64::from(x)).collect();
        let p = Performance::finish(&wide, 5, 252.0);
        assert!((p.total_return + 1.0).abs() < 1e-9 && (p.max_drawdown - 1.0).abs() < 1e-6, "{p:?}");
    }

    #[test]
    fn one_return_has_no_deviation() {
        let mut out = [0.0f64; STATISTICS as usize];
        series(&[-0.1], 0, &mut out);
        let p = Performance::finish(&out, 1, 252.0);
        assert!(p.sharpe.is_nan() && p.volatility.is_nan() && (p.total_return + 0.1).abs() < 1e-15 && (p.max_drawdown - 0.1).abs() < 1e-15);
        assert!((p.cvar_95 - 0.1).abs() < 1e-15);
    }
}
