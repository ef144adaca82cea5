//! Minimum-variance hedge ratios of n spots by m futures, by regime and for the mixture, of many series at once.
//!
//! h minimises Var(dS − h·dF): h = S_FF⁻¹·S_FS, positive for a long hedged by a short (the position is −h).
//! regime k  weighted moments, v_t = p_tk/Σp:  μ_k = Σ v·x,  S_k = Σ v·(x − μ_k)(x − μ_k)ᵀ
//! mixture   total moments under the probabilities π of the last valid step: Σ π_k·(S_k + (μ_k − μ)(μ_k − μ)ᵀ), μ = Σ π_k·μ_k
//! average   Σ π_k·h_k instead, which minimises nothing; for comparison
//! effectiveness R² = 1 − Var(dS − h·dF)/Var(dS), under the mixture's moments.
//! Systems are solved by Cholesky; with more than one future the diagonal gets ridge·trace. A future without variance, and one that the others explain
//! but for 1e-6 of its variance, has ratio 0 and raises a flag; so does a regime without weight, which takes the moments of all steps.
//!
//! Shapes   spot [B,T,n], futures [B,T,m], m ≤ 8; probs [B or 1,T,K]; lengths [B] words, 2 ≤ length ≤ T; per_regime [B,K,m,n]; ratio [B,m,n];
//!          effectiveness [B,n]; flags [B,K+1] words, the last of the mixture: 1 a future without variance, 2 regime without weight, 4 collinear futures.
//!          Strides from one series to the next make a rolling window a batch: nothing is copied.
//! Launch   moments: a workgroup per entry of each covariance, threads over time; mixture: a thread per entry; solve: a thread per system.
//! Scratch  moments [B,K+1,R] and mixture [B,R], R = m(m+n) + m + 2n + 1.
//! Floor    4·T·(n + m + K) bytes per series.
//! Numerics means first, then centred squares: no difference of large sums.
//! Causal   the ratio at the last valid step uses that step's returns and probabilities and nothing later; probabilities must be filtered.
//! Source   Johnson 1960; Ederington 1979; Alizadeh & Nomikos 2004 for regimes.
//! Files    shaders/minimum_variance_hedge_ratio.wgsl · cuda/minimum_variance_hedge_ratio.cu · reference: the `_cpu` functions, in f64 on both CPU devices

use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the kernels.
    pub struct HedgeRatioParams {
        /// Series of this launch.
        batch: u32,
        /// T.
        steps: u32,
        /// K.
        regimes: u32,
        /// n.
        spots: u32,
        /// m.
        futures_count: u32,
        /// Elements from one series to the next, of the spots …
        spot_stride: u32,
        /// … of the futures …
        futures_stride: u32,
        /// … and of the probabilities; 0: all share them.
        probs_stride: u32,
        /// 1: average of the regimes' ratios.
        average: u32,
        /// Share of the trace that the diagonal gets.
        ridge: f32,
    }
}

const WG: u32 = 64;
const OP: &str = "minimum_variance_hedge_ratio";
/// Futures of a system at most.
pub const MOST_FUTURES: u64 = 8;
const MOST: usize = MOST_FUTURES as usize;
/// A regime with less weight has none.
const NO_WEIGHT: f64 = 1e-6;
/// Variance over squared mean from which a series is constant.
const FLAT: f64 = 1e-12;
/// What must be left of a future's variance when the others have explained their part.
const DEPENDENT: f64 = 1e-6;
/// Flag: a future has no variance.
pub const FLAT_FUTURES: u32 = 1;
/// Flag: the regime has no weight; moments are those of all steps.
pub const POOLED: u32 = 2;
/// Flag: a future is explained by the others.
pub const COLLINEAR: u32 = 4;

fn params(words: &[u32]) -> HedgeRatioParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

impl HedgeRatioParams {
    fn entries(&self) -> usize {
        (self.futures_count * (self.futures_count + self.spots) + self.spots) as usize
    }

    /// Reals of a regime: its covariance, the means of futures and spots, its weight.
    fn record(&self) -> usize {
        self.entries() + (self.futures_count + self.spots) as usize + 1
    }

    fn systems(&self) -> u64 {
        u64::from(self.batch) * (u64::from(self.regimes) + 1)
    }
}

/// Moments of every regime.
pub static HEDGE_COVARIANCES: Kernel = Kernel {
    name: "hedge_covariances",
    about: "weighted means and covariances of spots and futures, by regime",
    args: &[reads("spot"), reads("futures"), reads("probs"), reads_u32("lengths"), writes("moments")],
    params: layout::<HedgeRatioParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| params(words).systems() * params(words).entries() as u64,
    wgsl: wgsl!("minimum_variance_hedge_ratio"),
    cuda: cuda!("minimum_variance_hedge_ratio"),
    cpu: Some(Cpu { f32: hedge_covariances_cpu::<f32>, f64: hedge_covariances_cpu::<f64> }),
    cost: Cost { unit: "step", units: |words| params(words).systems() * u64::from(params(words).steps), bytes: 12.0, flops: 12.0 },
};

/// Moments of the mixture.
pub static HEDGE_MIXTURE: Kernel = Kernel {
    name: "hedge_mixture",
    about: "total means and covariances under the last probabilities",
    args: &[reads("moments"), reads("probs"), reads_u32("lengths"), writes("mixture")],
    groups: |words| (u64::from(params(words).batch) * params(words).entries() as u64).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hedge_mixture_cpu::<f32>, f64: hedge_mixture_cpu::<f64> }),
    cost: Cost { unit: "entry", units: |words| u64::from(params(words).batch) * params(words).entries() as u64, bytes: 16.0, flops: 20.0 },
    ..HEDGE_COVARIANCES
};

/// Ratios from moments.
pub static HEDGE_SOLVE: Kernel = Kernel {
    name: "hedge_solve",
    about: "hedge ratios of every regime and of the mixture",
    args: &[
        reads("moments"),
        reads("probs"),
        reads_u32("lengths"),
        reads("mixture"),
        writes("per_regime"),
        writes("ratio"),
        writes("effectiveness"),
        writes_u32("flags"),
    ],
    groups: |words| params(words).systems().div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: hedge_solve_cpu::<f32>, f64: hedge_solve_cpu::<f64> }),
    cost: Cost { unit: "system", units: |words| params(words).systems(), bytes: 32.0, flops: 40.0 },
    ..HEDGE_COVARIANCES
};

// ---- the reference ------------------------------------------------------------------------------------------------------

fn hedge_covariances_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRatioParams = launch.params()?;
    let (spot, futures, probs) = (launch.real()?, launch.real()?, launch.real()?);
    let (lengths, moments) = (launch.word()?, launch.real_mut()?);
    let (n, m, kinds, regimes) = (p.spots as usize, p.futures_count as usize, p.regimes as usize + 1, p.regimes as usize);
    moments.par_chunks_exact_mut(p.record()).enumerate().for_each(|(index, out)| {
        let (b, k) = (index / kinds, index % kinds);
        let steps = lengths[b].min(p.steps) as usize;
        let weight = |t: usize| if k == regimes { 1.0 } else { probs[b * p.probs_stride as usize + t * regimes + k].f64() };
        let value = |t: usize, c: usize| match c < m {
            true => futures[b * p.futures_stride as usize + t * m + c].f64(),
            false => spot[b * p.spot_stride as usize + t * n + c - m].f64(),
        };
        let total: f64 = (0..steps).map(weight).sum();
        let scale = 1.0 / total.max(1e-30);
        let mean: Vec<f64> = (0..m + n).map(|c| (0..steps).map(|t| weight(t) * value(t, c)).sum::<f64>() * scale).collect();
        let mut pairs: Vec<(usize, usize)> = (0..m).flat_map(|i| (0..m).map(move |j| (i, j))).collect();
        pairs.extend((0..m).flat_map(|i| (0..n).map(move |s| (i, m + s))));
        pairs.extend((0..n).map(|s| (m + s, m + s)));
        for (e, &(i, j)) in pairs.iter().enumerate() {
            out[e] = R::of((0..steps).map(|t| weight(t) * (value(t, i) - mean[i]) * (value(t, j) - mean[j])).sum::<f64>() * scale);
        }
        out[p.entries()..].iter_mut().zip(mean.iter().chain([&total])).for_each(|(to, &x)| *to = R::of(x));
    });
    Ok(())
}

/// Cholesky of `left` in place with the pivots' inverses; the flags of what it had to leave out.
fn factor(left: &mut [[f64; MOST]; MOST], m: usize, ridge: f64) -> u32 {
    let trace: f64 = (0..m).map(|i| left[i][i]).sum();
    let mut found = 0;
    for i in 0..m {
        let own = left[i][i];
        let pivot = own + if m > 1 { ridge * trace } else { 0.0 } - (0..i).map(|j| left[i][j] * left[i][j]).sum::<f64>();
        let (none, bad) = (own <= 1e-30, own <= 1e-30 || pivot <= DEPENDENT * own);
        found |= if none { FLAT_FUTURES } else { u32::from(bad) * COLLINEAR };
        left[i][i] = if bad { 0.0 } else { 1.0 / pivot.sqrt() };
        for r in i + 1..m {
            left[r][i] = (left[r][i] - (0..i).map(|j| left[r][j] * left[i][j]).sum::<f64>()) * left[i][i];
        }
    }
    found
}

fn back_substitute(left: &[[f64; MOST]; MOST], right: &mut [f64; MOST], m: usize) {
    for i in 0..m {
        right[i] = (right[i] - (0..i).map(|j| left[i][j] * right[j]).sum::<f64>()) * left[i][i];
    }
    for i in (0..m).rev() {
        right[i] = (right[i] - (i + 1..m).map(|j| left[j][i] * right[j]).sum::<f64>()) * left[i][i];
    }
}

/// Ratios [m,n] of a covariance in the order of entries and the futures' means; and flags.
fn solved(p: &HedgeRatioParams, covariance: &[f64], mean: &[f64]) -> (Vec<f64>, u32) {
    let (m, n) = (p.futures_count as usize, p.spots as usize);
    let (mut left, mut ratio) = ([[0.0; MOST]; MOST], vec![0.0; m * n]);
    for i in 0..m {
        left[i][..m].copy_from_slice(&covariance[i * m..(i + 1) * m]);
        if left[i][i] <= FLAT * mean[i] * mean[i] {
            left[i][i] = 0.0;
        }
    }
    let found = factor(&mut left, m, f64::from(p.ridge));
    for s in 0..n {
        let mut right = [0.0; MOST];
        for i in 0..m {
            right[i] = covariance[m * m + i * n + s];
        }
        back_substitute(&left, &mut right, m);
        for i in 0..m {
            ratio[i * n + s] = right[i];
        }
    }
    (ratio, found)
}

/// Moments of one series: those of each regime, of all steps where it has no weight (which the flag says), and its share of the mixture.
fn regimes_of<R: Real>(p: &HedgeRatioParams, b: usize, moments: &[R], probs: &[R], lengths: &[u32]) -> Vec<(Vec<f64>, bool, f64)> {
    let (regimes, record) = (p.regimes as usize, p.record());
    let at = |k: usize| &moments[(b * (regimes + 1) + k) * record..][..record];
    let last = (lengths[b].min(p.steps).max(1) - 1) as usize;
    let chance = |k: usize| probs[b * p.probs_stride as usize + last * regimes + k].f64();
    let norm = 1.0 / (0..regimes).map(chance).sum::<f64>().max(1e-30);
    let one = |k: usize| {
        let pooled = at(k)[record - 1].f64() <= NO_WEIGHT;
        (at(if pooled { regimes } else { k }).iter().map(|x| x.f64()).collect(), pooled, chance(k) * norm)
    };
    (0..regimes).map(one).collect()
}

fn hedge_mixture_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRatioParams = launch.params()?;
    let (moments, probs, lengths, mixture) = (launch.real()?, launch.real()?, launch.word()?, launch.real_mut()?);
    let (m, n, entries) = (p.futures_count as usize, p.spots as usize, p.entries());
    for (b, out) in mixture.chunks_exact_mut(p.record()).enumerate() {
        let records = regimes_of(&p, b, moments, probs, lengths);
        let mean: Vec<f64> = (0..m + n).map(|c| records.iter().map(|(x, _, share)| share * x[entries + c]).sum()).collect();
        for e in 0..entries {
            let (i, j) = match e {
                e if e < m * m => (e / m, e % m),
                e if e < m * (m + n) => ((e - m * m) / n, m + (e - m * m) % n),
                e => (e - m * (m + n) + m, e - m * (m + n) + m),
            };
            let spread = |x: &[f64]| x[e] + (x[entries + i] - mean[i]) * (x[entries + j] - mean[j]);
            out[e] = R::of(records.iter().map(|(x, _, share)| share * spread(x)).sum());
        }
        out[entries..].iter_mut().zip(mean.iter().chain([&1.0])).for_each(|(to, &x)| *to = R::of(x));
    }
    Ok(())
}

fn hedge_solve_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRatioParams = launch.params()?;
    let (moments, probs, lengths, mixture) = (launch.real()?, launch.real()?, launch.word()?, launch.real()?);
    let (per_regime, ratio, effectiveness, flags) = (launch.real_mut()?, launch.real_mut()?, launch.real_mut()?, launch.word_mut()?);
    let (m, n, regimes, entries) = (p.futures_count as usize, p.spots as usize, p.regimes as usize, p.entries());
    for b in 0..p.batch as usize {
        let mixed: Vec<f64> = mixture[b * p.record()..][..p.record()].iter().map(|x| x.f64()).collect();
        let (mut whole, mut found) = solved(&p, &mixed[..entries], &mixed[entries..]);
        if p.average == 1 {
            (whole, found) = (vec![0.0; m * n], 0);
        }
        for (k, (x, pooled, share)) in regimes_of(&p, b, moments, probs, lengths).iter().enumerate() {
            let (own, raised) = solved(&p, &x[..entries], &x[entries..]);
            flags[b * (regimes + 1) + k] = raised | if *pooled { POOLED } else { 0 };
            for (i, h) in own.iter().enumerate() {
                per_regime[(b * regimes + k) * m * n + i] = R::of(*h);
                whole[i] += if p.average == 1 { share * h } else { 0.0 };
            }
            found |= if p.average == 1 { raised } else { 0 };
        }
        flags[b * (regimes + 1) + regimes] = found;
        for s in 0..n {
            let before = mixed[m * (m + n) + s];
            let left = |i: usize| 2.0 * mixed[m * m + i * n + s] - (0..m).map(|j| mixed[i * m + j] * whole[j * n + s]).sum::<f64>();
            let gain: f64 = (0..m).map(|i| whole[i * n + s] * left(i)).sum();
            effectiveness[b * n + s] = R::of(if before <= 1e-30 { 0.0 } else { gain / before });
        }
        ratio[b * m * n..(b + 1) * m * n].iter_mut().zip(whole).for_each(|(to, x)| *to = R::of(x));
    }
    Ok(())
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// Sizes and options.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeRatio {
    /// Series B.
    pub batch: u64,
    /// Steps T.
    pub steps: u64,
    /// Regimes K.
    pub regimes: u64,
    /// Spots n.
    pub spots: u64,
    /// Futures m, at most [`MOST_FUTURES`].
    pub futures: u64,
    /// Steps from the start of one series to that of the next: T for a batch, the shift for rolling windows over one series.
    pub shift: u64,
    /// Whether all series share the probabilities [1,T,K].
    pub shared_probs: bool,
    /// Average of the regimes' ratios in place of the mixture's.
    pub average_of_ratios: bool,
    /// Share of the trace that the diagonal gets with more than one future.
    pub ridge: f64,
}

impl HedgeRatio {
    /// A batch of separate series, mixture of total moments, ridge 1e-8.
    pub fn new(batch: u64, steps: u64, regimes: u64, spots: u64, futures: u64) -> HedgeRatio {
        HedgeRatio { batch, steps, regimes, spots, futures, shift: steps, shared_probs: false, average_of_ratios: false, ridge: 1e-8 }
    }

    /// # Errors
    /// `Parameter` naming the size.
    pub fn check(&self) -> Result<()> {
        let most = u64::from(u32::MAX);
        let sizes = [
            ("batch", self.batch, 0, most),
            ("steps", self.steps, 2, most),
            ("regimes", self.regimes, 1, 4096),
            ("spots", self.spots, 1, 1 << 20),
            ("futures", self.futures, 1, MOST_FUTURES),
            ("shift", self.shift, 1, most),
        ];
        for (name, size, least, most) in sizes {
            if size < least || size > most {
                let help = format!("must be between {least} and {most}");
                return Err(Error::Parameter { op: OP, name: name.into(), value: size.to_string(), help });
            }
        }
        if !(0.0..=1.0).contains(&self.ridge) {
            return Err(Error::Parameter { op: OP, name: "ridge".into(), value: self.ridge.to_string(), help: "must be between 0 and 1".into() });
        }
        Ok(())
    }

    fn record(&self) -> u64 {
        self.futures * (self.futures + self.spots) + self.futures + 2 * self.spots + 1
    }

    /// Elements of all series, `each` of a step.
    fn series(&self, each: u64) -> u64 {
        if self.batch == 0 { 0 } else { ((self.batch - 1) * self.shift + self.steps) * each }
    }

    fn run_range(&self, run: &Range<u64>, each: u64) -> Range<u64> {
        run.start * self.shift * each..((run.end - 1) * self.shift + self.steps) * each
    }

    fn params(&self, run: &Range<u64>) -> HedgeRatioParams {
        HedgeRatioParams {
            batch: (run.end - run.start) as u32,
            steps: self.steps as u32,
            regimes: self.regimes as u32,
            spots: self.spots as u32,
            futures_count: self.futures as u32,
            spot_stride: (self.shift * self.spots) as u32,
            futures_stride: (self.shift * self.futures) as u32,
            probs_stride: if self.shared_probs { 0 } else { (self.shift * self.regimes) as u32 },
            average: u32::from(self.average_of_ratios),
            ridge: self.ridge as f32,
        }
    }
}

/// Where results are written.
#[derive(Debug, Clone)]
pub struct HedgeRatioOut {
    /// [B,K,m,n].
    pub per_regime: View,
    /// [B,m,n].
    pub ratio: View,
    /// [B,n].
    pub effectiveness: View,
    /// [B,K+1] words.
    pub flags: View,
    /// Scratch: moments [B,K+1,R].
    pub moments: View,
    /// Scratch: moments of the mixture [B,R].
    pub mixture: View,
}

impl HedgeRatioOut {
    /// New memory.
    /// # Errors
    /// Those of the device.
    pub fn new(device: &Device, op: &HedgeRatio) -> Result<HedgeRatioOut> {
        let zeros = |name: &str, len: u64| -> Result<View> { Ok(View::from(&device.zeros(name, len)?)) };
        Ok(HedgeRatioOut {
            per_regime: zeros("per_regime", op.batch * op.regimes * op.futures * op.spots)?,
            ratio: zeros("ratio", op.batch * op.futures * op.spots)?,
            effectiveness: zeros("effectiveness", op.batch * op.spots)?,
            flags: View::from(&device.zeros_u32("flags", op.batch * (op.regimes + 1))?),
            moments: zeros("moments", op.batch * (op.regimes + 1) * op.record())?,
            mixture: zeros("mixture", op.batch * op.record())?,
        })
    }
}

/// Records the ratios of spot, futures, probs and lengths (shapes in the module's docs; with `shift`, the series lie `shift` steps apart in one buffer).
/// # Errors
/// `Parameter`, `Shape`, `TooLarge`.
pub fn minimum_variance_hedge_ratio(
    pass: &mut Pass,
    op: &HedgeRatio,
    spot: &View,
    futures: &View,
    probs: &View,
    lengths: &View,
    out: &HedgeRatioOut,
) -> Result<()> {
    op.check()?;
    let probs_len = if op.shared_probs { op.steps * op.regimes } else { op.series(op.regimes) };
    let cells = op.batch * op.futures * op.spots;
    let wanted = [
        ("spot", spot, op.series(op.spots)),
        ("futures", futures, op.series(op.futures)),
        ("probs", probs, probs_len),
        ("lengths", lengths, op.batch),
        ("moments", &out.moments, op.batch * (op.regimes + 1) * op.record()),
        ("mixture", &out.mixture, op.batch * op.record()),
        ("per_regime", &out.per_regime, cells * op.regimes),
        ("ratio", &out.ratio, cells),
        ("effectiveness", &out.effectiveness, op.batch * op.spots),
        ("flags", &out.flags, op.batch * (op.regimes + 1)),
    ];
    for (arg, view, len) in wanted {
        if view.len() != len {
            return Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{len} values"), got: view.len().to_string() });
        }
    }
    let device = pass.device().clone();
    device.check_rounds(OP, 2 * op.steps.div_ceil(u64::from(WG)) + 16, "steps")?;
    let width = op.spots.max(op.futures).max(op.regimes);
    let (kinds, record) = (op.regimes + 1, op.record());
    let elements = (op.steps.max(op.shift) * width).max(kinds * record);
    let groups = kinds * (op.futures * (op.futures + op.spots) + op.spots);
    for run in device.plan(OP, op.batch, elements, groups, groups * op.steps * 12)? {
        let params = op.params(&run);
        let part = |each: u64| run.start * each..run.end * each;
        let (s, f) = (pass.input(spot, op.run_range(&run, op.spots))?, pass.input(futures, op.run_range(&run, op.futures))?);
        let p = if op.shared_probs { probs.clone() } else { pass.input(probs, op.run_range(&run, op.regimes))? };
        let l = pass.input(lengths, run.clone())?;
        let (x, y) = (pass.output(&out.moments, part(kinds * record))?, pass.output(&out.mixture, part(record))?);
        pass.launch(&HEDGE_COVARIANCES, &params, &[s, f, p.clone(), l.clone(), x.view.clone()])?;
        pass.launch(&HEDGE_MIXTURE, &params, &[x.view.clone(), p.clone(), l.clone(), y.view.clone()])?;
        let cells = op.futures * op.spots;
        let outputs = [
            pass.output(&out.per_regime, part(op.regimes * cells))?,
            pass.output(&out.ratio, part(cells))?,
            pass.output(&out.effectiveness, part(op.spots))?,
            pass.output(&out.flags, part(kinds))?,
        ];
        let mut args = vec![x.view.clone(), p, l, y.view.clone()];
        args.extend(outputs.iter().map(|output| output.view.clone()));
        pass.launch(&HEDGE_SOLVE, &params, &args)?;
        pass.finish(x)?;
        pass.finish(y)?;
        for output in outputs {
            pass.finish(output)?;
        }
    }
    Ok(())
}

// ---- host data ------------------------------------------------------------------------------------------------------------

/// Ratios on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HedgeRatios {
    /// Ratios of each regime [B,K,m,n].
    pub per_regime: Vec<f64>,
    /// Ratios of the mixture [B,m,n].
    pub ratio: Vec<f64>,
    /// R² [B,n].
    pub effectiveness: Vec<f64>,
    /// [B,K+1]: [`FLAT_FUTURES`], [`POOLED`], [`COLLINEAR`].
    pub flags: Vec<u32>,
}

/// Ratios of returns on the host: spot [B,T,n], futures [B,T,m], probs [B or 1,T,K] or none for one regime, lengths [B] or none for whole series.
/// # Errors
/// `Shape`; `Parameter` naming the index of a return or a probability that is not finite, a negative probability, or a length below 2.
pub fn hedge_ratios(device: &Device, op: &HedgeRatio, spot: &[f32], futures: &[f32], probs: Option<&[f32]>, lengths: Option<&[u32]>) -> Result<HedgeRatios> {
    op.check()?;
    for (name, values) in [("spot", Some(spot)), ("futures", Some(futures)), ("probs", probs)] {
        let least = if name == "probs" { 0.0 } else { f32::MIN };
        if let Some(at) = values.and_then(|values| values.iter().position(|x| !x.is_finite() || *x < least)) {
            let value = values.and_then(|values| values.get(at)).map(f32::to_string).unwrap_or_default();
            let help = if name == "probs" { "must be a finite number of 0 or more" } else { "must be a finite return; drop or fill it" };
            return Err(Error::Parameter { op: OP, name: format!("{name}[{at}]"), value, help: help.into() });
        }
    }
    let whole = vec![op.steps as u32; op.batch as usize];
    let lengths = lengths.unwrap_or(&whole);
    if let Some(b) = lengths.iter().position(|&n| n < 2 || u64::from(n) > op.steps) {
        let help = format!("must be between 2 and {}: a variance needs two returns", op.steps);
        return Err(Error::Parameter { op: OP, name: format!("lengths[{b}]"), value: lengths[b].to_string(), help });
    }
    let ones = vec![1.0; (op.steps * op.regimes) as usize];
    let (op, probs) = match probs {
        Some(probs) => (*op, probs),
        None => (HedgeRatio { shared_probs: true, ..*op }, ones.as_slice()),
    };
    let upload = |name: &str, data: &[f32]| -> Result<View> { Ok(View::from(&device.upload(name, data)?)) };
    let (spot, futures, probs) = (upload("spot", spot)?, upload("futures", futures)?, upload("probs", probs)?);
    let lengths = View::from(&device.upload_u32("lengths", lengths)?);
    let out = HedgeRatioOut::new(device, &op)?;
    let mut pass = device.pass(OP);
    minimum_variance_hedge_ratio(&mut pass, &op, &spot, &futures, &probs, &lengths, &out)?;
    let (per_regime, ratio) = (pass.read(&out.per_regime)?, pass.read(&out.ratio)?);
    let (effectiveness, flags) = (pass.read(&out.effectiveness)?, pass.read(&out.flags)?);
    let mut done = pass.submit()?;
    Ok(HedgeRatios { per_regime: done.f64(per_regime)?, ratio: done.f64(ratio)?, effectiveness: done.f64(effectiveness)?, flags: done.u32(flags)? })
}

/// Ratios of every window of `window` steps, `shift` steps apart, of one series: spot [T,n], futures [T,m], probs [T,K] or none. Window w ends at step
/// w·shift + window − 1 and uses nothing later.
/// # Errors
/// As [`hedge_ratios`]; `Parameter` for a window longer than the series.
pub fn rolling_hedge_ratios(
    device: &Device,
    op: &HedgeRatio,
    window: u64,
    shift: u64,
    spot: &[f32],
    futures: &[f32],
    probs: Option<&[f32]>,
) -> Result<HedgeRatios> {
    if window > op.steps || shift == 0 {
        let help = format!("the window must be at most the {} steps of the series, the shift at least 1", op.steps);
        return Err(Error::Parameter { op: OP, name: "window, shift".into(), value: format!("{window}, {shift}"), help });
    }
    let windows = (op.steps - window) / shift + 1;
    let op = HedgeRatio { batch: windows, steps: window, shift, shared_probs: false, ..*op };
    let part = |x: &[f32], each: u64| x.get(..op.series(each) as usize).map(<[f32]>::to_vec).unwrap_or_else(|| x.to_vec());
    let (spot, futures) = (part(spot, op.spots), part(futures, op.futures));
    let probs = probs.map(|probs| part(probs, op.regimes));
    hedge_ratios(device, &op, &spot, &futures, probs.as_deref(), None)
}

/// Conformance binding: `spot_returns`, `futures_returns`, `probs` with an axis of series or without, of instruments or without; `lengths` are optional.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let (shape, other, states) = (case.shape("spot_returns")?, case.shape("futures_returns")?, case.shape("probs")?);
    let sizes = |shape: &[usize]| match *shape {
        [t] => Some([1, t as u64, 1]),
        [t, n] if states.len() == 2 => Some([1, t as u64, n as u64]),
        [b, t] => Some([b as u64, t as u64, 1]),
        [b, t, n] => Some([b as u64, t as u64, n as u64]),
        _ => None,
    };
    let (Some([batch, steps, spots]), Some([_, _, futures]), Some(&regimes)) = (sizes(shape), sizes(other), states.last()) else {
        return Err(Error::Shape {
            op: OP,
            arg: "spot_returns, futures_returns".into(),
            expected: "[B,T,n], [B,T,m]".into(),
            got: format!("{shape:?}, {other:?}"),
        });
    };
    let shared_probs = states.len() == 3 && states[0] == 1 && batch > 1;
    let op = HedgeRatio { shared_probs, average_of_ratios: case.truth("average_of_ratios")?, ..HedgeRatio::new(batch, steps, regimes as u64, spots, futures) };
    let upload = |name: &str| -> Result<View> { Ok(View::from(&device.upload(name, case.f32(name)?)?)) };
    let whole = vec![steps as u32; batch as usize];
    let lengths = View::from(&device.upload_u32("lengths", if case.has("lengths") { case.u32("lengths")? } else { &whole })?);
    let out = HedgeRatioOut::new(device, &op)?;
    let mut pass = device.pass(OP);
    minimum_variance_hedge_ratio(&mut pass, &op, &upload("spot_returns")?, &upload("futures_returns")?, &upload("probs")?, &lengths, &out)?;
    let reads = [("per_regime", pass.read(&out.per_regime)?), ("ratio", pass.read(&out.ratio)?), ("effectiveness", pass.read(&out.effectiveness)?)];
    let mut results = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        results.reals(name, done.f64(read)?);
    }
    Ok(results)
}
