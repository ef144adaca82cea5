//! Sharpe ratio of every series in every window, and its gradient.
//!
//! sharpe[n,w] = √A · m/s over returns[n, start_w .. end_w], s with divisor n−1; undefined below two returns or at zero deviation.
//! grad_returns[n,t] = Σ_{w ∋ t} grad_sharpe[n,w]·√A·(1/(c·s) − m·(r_t − m)/((c−1)·s³)), c the window's length; undefined windows
//! contribute nothing.
//!
//! Shapes   returns, grad_returns [N,T]; windows [W,2] half-open; sharpe, grad_sharpe [N,W]; moments [N,W,2] (mean, deviation).
//! Launch   the windows' edges cut time into G segments. `segment_moments`: one workgroup per (series, segment), two passes over its
//!          bars. `walk_forward_sharpe`: one thread per (series, window) merges segments by Chan's rule: every bar is read once
//!          however many windows cover it. `walk_forward_sharpe_backward`: one thread per (series, bar) sums over its segment's windows.
//! Scratch  segments [N,G,2].
//! Floor    4·T bytes per series forward, 8·T backward.
//! Numerics deviations from each segment's first return, so a constant series has zero deviation exactly.
//! Source   Sharpe 1994; Chan, Golub, LeVeque 1983 for the merge.
//! Files    shaders/walk_forward_sharpe.wgsl · cuda/walk_forward_sharpe.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs, UNDEFINED, defined};
use crate::device::{Buffer, Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of the three kernels.
    pub struct WalkForwardParams {
        /// Series.
        n: u32,
        /// Bars.
        t: u32,
        /// Windows.
        w: u32,
        /// Segments.
        g: u32,
        /// Periods per year, rounded …
        periods: f32,
        /// … and what rounding took away, which only the f64 reference feels.
        periods_low: f32,
    }
}

const WG: u32 = 64;

fn params(words: &[u32]) -> WalkForwardParams {
    params_of(words).unwrap_or(WalkForwardParams { n: 0, t: 0, w: 0, g: 0, periods: 0.0, periods_low: 0.0 })
}

fn bars(words: &[u32]) -> u64 {
    u64::from(params(words).n) * u64::from(params(words).t)
}

/// Mean and central sum of squares of every segment.
pub static SEGMENT_MOMENTS: Kernel = Kernel {
    name: "segment_moments",
    about: "mean and central squares of each segment between window edges",
    args: &[reads("returns"), reads_u32("edges"), writes("segments")],
    params: layout::<WalkForwardParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| u64::from(params(words).n) * u64::from(params(words).g),
    wgsl: wgsl!("walk_forward_sharpe"),
    cuda: cuda!("walk_forward_sharpe"),
    cpu: Some(Cpu { f32: segment_moments_cpu::<f32>, f64: segment_moments_cpu::<f64> }),
    cost: Cost { unit: "bar", units: bars, bytes: 4.0, flops: 6.0 },
};

/// Sharpe ratio of every window as merges of segments.
pub static WALK_FORWARD_SHARPE: Kernel = Kernel {
    name: "walk_forward_sharpe",
    about: "Sharpe ratio of every series in every window",
    args: &[reads("segments"), reads_u32("edges"), reads_u32("spans"), writes("sharpe"), writes("moments")],
    params: layout::<WalkForwardParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| (u64::from(params(words).n) * u64::from(params(words).w)).div_ceil(u64::from(WG)),
    wgsl: wgsl!("walk_forward_sharpe"),
    cuda: cuda!("walk_forward_sharpe"),
    cpu: Some(Cpu { f32: walk_forward_sharpe_cpu::<f32>, f64: walk_forward_sharpe_cpu::<f64> }),
    cost: Cost { unit: "window", units: |words| u64::from(params(words).n) * u64::from(params(words).w), bytes: 12.0, flops: 40.0 },
};

/// Gradient of the Sharpe ratios with respect to the returns.
pub static WALK_FORWARD_SHARPE_BACKWARD: Kernel = Kernel {
    name: "walk_forward_sharpe_backward",
    about: "gradient of the windows' Sharpe ratios",
    args: &[
        reads("returns"),
        reads("moments"),
        reads("grad_sharpe"),
        reads_u32("edges"),
        reads_u32("spans"),
        reads_u32("segment_of"),
        reads_u32("covers"),
        writes("grad_returns"),
    ],
    params: layout::<WalkForwardParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| bars(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("walk_forward_sharpe"),
    cuda: cuda!("walk_forward_sharpe"),
    cpu: Some(Cpu { f32: walk_forward_sharpe_backward_cpu::<f32>, f64: walk_forward_sharpe_backward_cpu::<f64> }),
    cost: Cost { unit: "bar", units: bars, bytes: 8.0, flops: 40.0 },
};

/// No segment: the bar lies in no window.
const OUTSIDE: u32 = u32::MAX;

/// Windows cut into segments, as plain words.
#[derive(Debug, Clone, PartialEq)]
struct Segments {
    /// Edges [G+1].
    edges: Vec<u32>,
    /// First and one past the last segment of each window [W,2].
    spans: Vec<u32>,
    /// Segment of each bar, or OUTSIDE [T].
    segment_of: Vec<u32>,
    /// For each segment the first entry of its list in `covers`, then the lists of windows that cover it.
    covers: Vec<u32>,
}

impl Segments {
    fn of(windows: &[[u32; 2]], t: u32) -> Result<Segments> {
        if let Some((w, window)) = windows.iter().enumerate().find(|(_, w)| w[0] > w[1] || w[1] > t) {
            return Err(Error::Shape {
                op: "walk_forward_sharpe",
                arg: format!("windows[{w}]"),
                expected: format!("inside 0..{t}"),
                got: format!("{window:?}"),
            });
        }
        let mut edges: Vec<u32> = windows.iter().flatten().copied().collect();
        edges.sort_unstable();
        edges.dedup();
        let at = |edge: u32| edges.partition_point(|&e| e < edge) as u32;
        let spans: Vec<u32> = windows.iter().flatten().map(|&edge| at(edge)).collect();
        let mut lists: Vec<Vec<u32>> = vec![Vec::new(); edges.len().saturating_sub(1)];
        for (w, span) in spans.chunks_exact(2).enumerate() {
            for list in &mut lists[span[0] as usize..span[1] as usize] {
                list.push(w as u32);
            }
        }
        let mut segment_of = vec![OUTSIDE; t as usize];
        for (g, pair) in edges.windows(2).enumerate().filter(|(g, _)| !lists[*g].is_empty()) {
            segment_of[pair[0] as usize..pair[1] as usize].fill(g as u32);
        }
        let mut covers = vec![0u32; lists.len() + 1];
        for (g, list) in lists.iter().enumerate() {
            covers[g] = covers.len() as u32;
            covers.extend(list);
        }
        covers[lists.len()] = covers.len() as u32;
        Ok(Segments { edges, spans, segment_of, covers })
    }

    fn count(&self) -> u64 {
        self.edges.len().saturating_sub(1) as u64
    }
}

fn segment_moments_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: WalkForwardParams = launch.params()?;
    let (returns, edges, segments) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let rows = returns.par_chunks_exact(p.t as usize).zip(segments.par_chunks_exact_mut(2 * p.g as usize));
    rows.take(p.n as usize).for_each(|(x, out)| {
        for g in 0..p.g as usize {
            let bars = &x[edges[g] as usize..edges[g + 1] as usize];
            let count = R::of(bars.len() as f64);
            let offset = bars.iter().map(|&r| r - bars[0]).sum::<R>() / count;
            out[2 * g] = bars[0] + offset;
            out[2 * g + 1] = bars.iter().map(|&r| ((r - bars[0]) - offset) * ((r - bars[0]) - offset)).sum();
        }
    });
    Ok(())
}

fn walk_forward_sharpe_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: WalkForwardParams = launch.params()?;
    let (segments, edges, spans) = (launch.real()?, launch.word()?, launch.word()?);
    let (sharpe, moments) = (launch.real_mut()?, launch.real_mut()?);
    let (w, year) = (p.w as usize, year_of::<R>(&p));
    let out = sharpe.par_chunks_exact_mut(w).zip(moments.par_chunks_exact_mut(2 * w)).enumerate();
    out.take(p.n as usize).for_each(|(n, (sharpe, moments))| {
        let segment = &segments[2 * n * p.g as usize..2 * (n + 1) * p.g as usize];
        for i in 0..w {
            let (mut count, mut mean, mut m2) = (R::ZERO, R::ZERO, R::ZERO);
            for g in spans[2 * i] as usize..spans[2 * i + 1] as usize {
                let more = R::of(f64::from(edges[g + 1] - edges[g]));
                let (total, delta) = (count + more, segment[2 * g] - mean);
                mean += delta * (more / total);
                m2 += segment[2 * g + 1] + delta * delta * (count * more / total);
                count = total;
            }
            let valid = count > R::ONE && m2 > R::ZERO;
            let deviation = if valid { (m2 / (count - R::ONE)).sqrt() } else { R::ZERO };
            sharpe[i] = if valid { mean / deviation * year } else { R::of(UNDEFINED) };
            moments[2 * i] = mean;
            moments[2 * i + 1] = deviation;
        }
    });
    Ok(())
}

fn walk_forward_sharpe_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: WalkForwardParams = launch.params()?;
    let (returns, moments, grad_sharpe) = (launch.real()?, launch.real()?, launch.real()?);
    let (edges, spans, segment_of, covers) = (launch.word()?, launch.word()?, launch.word()?, launch.word()?);
    let grad_returns = launch.real_mut()?;
    let (t, w, year) = (p.t as usize, p.w as usize, year_of::<R>(&p));
    grad_returns.par_chunks_exact_mut(t).enumerate().take(p.n as usize).for_each(|(n, out)| {
        for j in 0..t {
            let g = segment_of[j] as usize;
            let mut sum = R::ZERO;
            if segment_of[j] != OUTSIDE {
                for &i in &covers[covers[g] as usize..covers[g + 1] as usize] {
                    let i = i as usize;
                    let (mean, deviation) = (moments[2 * (n * w + i)], moments[2 * (n * w + i) + 1]);
                    if deviation > R::ZERO {
                        let count = R::of(f64::from(edges[spans[2 * i + 1] as usize] - edges[spans[2 * i] as usize]));
                        let slope = mean / ((count - R::ONE) * deviation * deviation);
                        let d = R::ONE / count - slope * (returns[n * t + j] - mean);
                        sum += grad_sharpe[n * w + i] * year / deviation * d;
                    }
                }
            }
            out[j] = sum;
        }
    });
    Ok(())
}

/// What the forward pass keeps: its result, and what the backward pass needs.
pub struct WalkForwardSharpe {
    /// Sharpe ratios [N,W]; undefined ones are −1e30 on the device.
    pub sharpe: Buffer,
    moments: Buffer,
    words: [Buffer; 4],
    segments: Segments,
    n: u64,
    t: u64,
    w: u64,
    periods: (f32, f32),
}

/// √A.
fn year_of<R: Real>(p: &WalkForwardParams) -> R {
    (R::of(f64::from(p.periods)) + R::of(f64::from(p.periods_low))).sqrt()
}

/// A as the sum of two f32.
fn split(periods_per_year: f64) -> Result<(f32, f32)> {
    if periods_per_year.is_finite() && periods_per_year > 0.0 {
        let high = periods_per_year as f32;
        return Ok((high, (periods_per_year - f64::from(high)) as f32));
    }
    let help = "give a positive number of return periods per year".into();
    Err(Error::Parameter { op: "walk_forward_sharpe", name: "periods_per_year".into(), value: periods_per_year.to_string(), help })
}

/// Records the Sharpe ratios of `returns` [N,T] in `windows`.
///
/// sharpe[n,w] depends on the returns inside window w alone. The result is per-period until scaled: [`WalkForwardSharpe::sharpe`] is
/// annualised by √(periods per year).
/// # Errors
/// `Shape` if a window leaves 0..T or the buffer is not [N,T]; `Parameter` for a non-positive number of periods.
pub fn walk_forward_sharpe(pass: &mut Pass, returns: &Buffer, n: u64, t: u64, windows: &[[u32; 2]], periods_per_year: f64) -> Result<WalkForwardSharpe> {
    if t == 0 || returns.len() != n * t {
        let got = format!("{} values for N = {n}, T = {t}", returns.len());
        return Err(Error::Shape { op: "walk_forward_sharpe", arg: "returns".into(), expected: "[N,T] with T ≥ 1".into(), got });
    }
    let periods = split(periods_per_year)?;
    let segments = Segments::of(windows, t as u32)?;
    let device = pass.device().clone();
    let (w, g) = (windows.len() as u64, segments.count());
    let words = [
        device.upload_u32("edges", &segments.edges)?,
        device.upload_u32("spans", &segments.spans)?,
        device.upload_u32("segment_of", &segments.segment_of)?,
        device.upload_u32("covers", &segments.covers)?,
    ];
    let sharpe = device.zeros("sharpe", n * w)?;
    let moments = device.zeros("moments", 2 * n * w)?;
    let scratch = device.zeros("segments", 2 * n * g)?;
    if w > 0 {
        device.check_rounds("walk_forward_sharpe", (2 * t.div_ceil(u64::from(WG)) + 64).max(g), "rounds")?;
        for run in device.plan("walk_forward_sharpe", n, t.max(2 * g).max(2 * w), g.max(w.div_ceil(u64::from(WG))), 6 * t + 40 * w)? {
            let params =
                WalkForwardParams { n: (run.end - run.start) as u32, t: t as u32, w: w as u32, g: g as u32, periods: periods.0, periods_low: periods.1 };
            let x = pass.input(returns, run.start * t..run.end * t)?;
            let out = pass.output(&scratch, 2 * g * run.start..2 * g * run.end)?;
            if g > 0 {
                pass.launch(&SEGMENT_MOMENTS, &params, &[x, View::from(&words[0]), out.view.clone()])?;
            }
            let merged = out.view.clone();
            let (s, m) = (pass.output(&sharpe, w * run.start..w * run.end)?, pass.output(&moments, 2 * w * run.start..2 * w * run.end)?);
            pass.launch(&WALK_FORWARD_SHARPE, &params, &[merged, View::from(&words[0]), View::from(&words[1]), s.view.clone(), m.view.clone()])?;
            pass.finish(s)?;
            pass.finish(m)?;
        }
    }
    Ok(WalkForwardSharpe { sharpe, moments, words, segments, n, t, w, periods })
}

/// Records grad_returns [N,T] from grad_sharpe [N,W]; overwrites nothing but its result.
pub fn walk_forward_sharpe_backward(pass: &mut Pass, forward: &WalkForwardSharpe, returns: &Buffer, grad_sharpe: &Buffer) -> Result<Buffer> {
    let WalkForwardSharpe { n, t, w, .. } = *forward;
    if grad_sharpe.len() != n * w || returns.len() != n * t {
        let got = format!("{} and {} values", grad_sharpe.len(), returns.len());
        return Err(Error::Shape { op: "walk_forward_sharpe", arg: "grad_sharpe, returns".into(), expected: format!("[{n},{w}] and [{n},{t}]"), got });
    }
    let device = pass.device().clone();
    let grad_returns = device.zeros("grad_returns", n * t)?;
    let g = forward.segments.count();
    if g == 0 {
        return Ok(grad_returns);
    }
    let [edges, spans, segment_of, covers] = &forward.words;
    for run in device.plan("walk_forward_sharpe_backward", n, t.max(2 * w), t.div_ceil(u64::from(WG)), 40 * t)? {
        let params = WalkForwardParams {
            n: (run.end - run.start) as u32,
            t: t as u32,
            w: w as u32,
            g: g as u32,
            periods: forward.periods.0,
            periods_low: forward.periods.1,
        };
        let x = pass.input(returns, run.start * t..run.end * t)?;
        let m = pass.input(&forward.moments, 2 * w * run.start..2 * w * run.end)?;
        let s = pass.input(grad_sharpe, w * run.start..w * run.end)?;
        let out = pass.output(&grad_returns, run.start * t..run.end * t)?;
        let args = [x, m, s, edges.into(), spans.into(), segment_of.into(), covers.into(), out.view.clone()];
        pass.launch(&WALK_FORWARD_SHARPE_BACKWARD, &params, &args)?;
        pass.finish(out)?;
    }
    Ok(grad_returns)
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let &[n, t] = case.shape("returns")? else {
        return Err(Error::Shape { op: "walk_forward_sharpe", arg: "returns".into(), expected: "[N,T]".into(), got: format!("{:?}", case.shape("returns")?) });
    };
    let windows: Vec<[u32; 2]> = case.u32("windows")?.chunks_exact(2).map(|w| [w[0], w[1]]).collect();
    let returns = device.upload("returns", case.f32("returns")?)?;
    let mut pass = device.pass("walk_forward_sharpe");
    let forward = walk_forward_sharpe(&mut pass, &returns, n as u64, t as u64, &windows, case.number("periods_per_year")?)?;
    let sharpe = pass.read(&forward.sharpe)?;
    let grad = if case.has("grad_sharpe") {
        let grad_sharpe = device.upload("grad_sharpe", case.f32("grad_sharpe")?)?;
        let grad_returns = walk_forward_sharpe_backward(&mut pass, &forward, &returns, &grad_sharpe)?;
        Some(pass.read(&grad_returns)?)
    } else {
        None
    };
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.reals("sharpe", done.f64(sharpe)?.into_iter().map(defined).collect());
    if let Some(read) = grad {
        outputs.reals("grad_returns", done.f64(read)?);
    }
    Ok(outputs)
}
