//! Where a hidden Markov chain goes from here: distribution over the states s steps ahead, survival in a state, and how long it lasts.
//!
//! forecast(0) = p·A(0), forecast(s) = forecast(s−1)·A(s): with one matrix, p·A^(s+1). Slot s leads from s to s + 1 steps ahead.
//! survival(s,k) = Π_{r ≤ s} a_kk(r): the chance to stay in k for the next s + 1 steps.
//! sojourn D ≥ 1, the steps until k is left, the current one counted; S_0 = 1, S_s = survival(s−1), a the last slot's a_kk:
//!          E[D] = Σ_{s<H} S_s + S_H/(1−a),  E[D²] = Σ_{s<H} (2s+1)·S_s + S_H·((2H+1)/(1−a) + 2a/(1−a)²);
//!          the q-quantile solves S = 1 − q, geometric within a step. With one matrix: 1/(1−a), a/(1−a)², ln(1−q)/ln a, whatever H.
//! expected = Σ_k p_k·E[D_k]: the average of durations, not the duration of the average probability.
//!
//! Shapes   probability [B,K]; log_trans [B or 1, H or 1, K,K], or weights [B or 1, K,K,U+1] with inputs [B,H,U] (slot s reads inputs[s]);
//!          forecast, survival [B,H,K]; sojourn [B,K,3] mean, variance, quantile; capped [B,K] (1: the mean or quantile passed the cap);
//!          expected [B].
//! Launch   `hmm_forecast` 1 to 128 threads per sequence, `hmm_sojourn` a thread per sequence and state, `hmm_sojourn_average` a thread per
//!          sequence.
//! Scratch  none; workgroup memory 3·STATES floats.
//! Floor    4·K bytes written per step ahead; K exponentials and 2·K² flops per step where the matrix changes.
//! Numerics every step divides by the sum of the step before, so that rows sum to one within a rounding at any horizon; 1 − a comes from
//!          log a by expm1, so that long durations keep their digits. A state that cannot be left (a = 1) lasts the cap; its variance is
//!          undefined.
//! Source   Rabiner 1989, Proc. IEEE 77, section IV.D (durations); Kemeny & Snell 1960 for powers and sojourns.
//! Files    shaders/hmm_forecast.wgsl · cuda/hmm_forecast.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs, UNDEFINED};
use crate::device::{Buffer, Device, Pass, View};
use crate::hmm::{IMPOSSIBLE, LOG_ZERO, MAX_STATES, Transitions, log_sum_exp};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, writes, writes_u32};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the three kernels.
    pub struct HmmForecastParams {
        /// Sequences of this launch.
        b: u32,
        /// Steps ahead.
        h: u32,
        /// States.
        k: u32,
        /// Inputs a step.
        u: u32,
        /// Reals from one sequence's transitions to the next one's; 0: shared.
        trans_row: u32,
        /// Reals from one step's transitions to the next one's; 0: constant.
        trans_step: u32,
        /// 1: transitions are a softmax of inputs.
        softmax: u32,
        /// First step of this launch.
        from_step: u32,
        /// One past its last step.
        to_step: u32,
        /// Threads per sequence.
        lanes: u32,
        /// Longest duration.
        cap: f32,
        /// ln(1 − q) of the quantile.
        log_left: f32,
    }
}

/// Threads per workgroup of `hmm_forecast`.
const WG: u32 = 128;
/// Reals of `sojourn` per state.
pub const SOJOURN: u64 = 3;

const OP: &str = "hmm_forecast";
const STATES: (&str, u32) = ("STATES", MAX_STATES as u32);

fn params(words: &[u32]) -> HmmForecastParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn states(words: &[u32]) -> u64 {
    u64::from(params(words).b) * u64::from(params(words).k)
}

/// Distribution over the states at every step ahead.
pub static HMM_FORECAST: Kernel = Kernel {
    name: "hmm_forecast",
    about: "probability of every state at every step ahead",
    args: &[reads("probability"), reads("log_trans"), reads("inputs"), writes("forecast")],
    params: layout::<HmmForecastParams>(),
    workgroup: WG,
    constants: &[STATES],
    groups: |words| u64::from(params(words).b).div_ceil(u64::from(WG / params(words).lanes.max(1)).max(1)),
    wgsl: wgsl!("hmm_forecast"),
    cuda: cuda!("hmm_forecast"),
    cpu: Some(Cpu { f32: hmm_forecast_cpu::<f32>, f64: hmm_forecast_cpu::<f64> }),
    cost: Cost { unit: "state-step", units: |words| states(words) * u64::from(params(words).h), bytes: 4.0, flops: 16.0 },
};

/// Survival and sojourn times.
pub static HMM_SOJOURN: Kernel = Kernel {
    name: "hmm_sojourn",
    about: "survival in every state and mean, variance and quantile of its duration",
    args: &[reads("log_trans"), reads("inputs"), writes("survival"), writes("sojourn"), writes_u32("capped")],
    workgroup: 64,
    groups: |words| states(words).div_ceil(64),
    cpu: Some(Cpu { f32: hmm_sojourn_cpu::<f32>, f64: hmm_sojourn_cpu::<f64> }),
    cost: Cost { unit: "state-step", units: |words| states(words) * u64::from(params(words).h.max(1)), bytes: 8.0, flops: 8.0 },
    ..HMM_FORECAST
};

/// Average of the durations under a belief.
pub static HMM_SOJOURN_AVERAGE: Kernel = Kernel {
    name: "hmm_sojourn_average",
    about: "expected duration under the probabilities of the states",
    args: &[reads("probability"), reads("sojourn"), writes("expected")],
    workgroup: 64,
    groups: |words| u64::from(params(words).b).div_ceil(64),
    cpu: Some(Cpu { f32: hmm_sojourn_average_cpu::<f32>, f64: hmm_sojourn_average_cpu::<f64> }),
    cost: Cost { unit: "state", units: states, bytes: 8.0, flops: 2.0 },
    ..HMM_FORECAST
};

// ---- CPU ------------------------------------------------------------------------------------------------------------------

/// Row i of the log-transitions of slot s.
fn log_row<R: Real>(p: &HmmForecastParams, log_trans: &[R], inputs: &[R], [b, s, i]: [usize; 3], out: &mut [R]) {
    let (k, u) = (p.k as usize, p.u as usize);
    let at = b * p.trans_row as usize + s * p.trans_step as usize + i * k * (u + 1);
    if p.softmax == 0 {
        out.copy_from_slice(&log_trans[at..at + k]);
        return;
    }
    let input = &inputs[(b * p.h as usize + s) * u..][..u];
    for (logit, w) in out.iter_mut().zip(log_trans[at..].chunks_exact(u + 1)) {
        *logit = w[..u].iter().zip(input).fold(w[u], |sum, (&w, &x)| sum + w * x);
    }
    let total = log_sum_exp(out);
    out.iter_mut().for_each(|x| *x = if *x <= R::of(IMPOSSIBLE) { R::of(LOG_ZERO) } else { *x - total });
}

fn hmm_forecast_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmForecastParams = launch.params()?;
    let (probability, log_trans, inputs, forecast) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let (h, k) = (p.h as usize, p.k as usize);
    forecast.par_chunks_exact_mut(h * k).enumerate().take(p.b as usize).for_each(|(b, out)| {
        let (mut a, mut row) = (vec![R::ZERO; k * k], vec![R::ZERO; k]);
        let mut now = probability[b * k..(b + 1) * k].to_vec();
        for s in 0..h {
            if s == 0 || p.softmax > 0 || p.trans_step > 0 {
                for (i, a) in a.chunks_exact_mut(k).enumerate() {
                    log_row(&p, log_trans, inputs, [b, s, i], &mut row);
                    a.iter_mut().zip(&row).for_each(|(a, &x)| *a = if x <= R::of(IMPOSSIBLE) { R::ZERO } else { x.exp() });
                }
            }
            let sum: R = now.iter().copied().sum();
            let next = &mut out[s * k..(s + 1) * k];
            next.fill(R::ZERO);
            for (a, &p) in a.chunks_exact(k).zip(&now) {
                next.iter_mut().zip(a).for_each(|(x, &a)| *x += p * a);
            }
            next.iter_mut().for_each(|x| *x = if sum > R::ZERO { *x / sum } else { R::ZERO });
            now.copy_from_slice(next);
        }
    });
    Ok(())
}

/// e^x − 1 with the digits of small x.
fn exp_m1<R: Real>(x: R) -> R {
    R::of(x.f64().exp_m1())
}

fn hmm_sojourn_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmForecastParams = launch.params()?;
    let (log_trans, inputs) = (launch.real()?, launch.real()?);
    let (survival, sojourn, capped) = (launch.real_mut()?, launch.real_mut()?, launch.word_mut()?);
    let (h, k) = (p.h as usize, p.k as usize);
    let out = sojourn.par_chunks_exact_mut(SOJOURN as usize * k).zip(capped.par_chunks_exact_mut(k));
    // With H = 0 there is no survival to write.
    let rows: Vec<&mut [R]> = if h == 0 { (0..p.b).map(|_| &mut [][..]).collect() } else { survival.chunks_exact_mut(h * k).take(p.b as usize).collect() };
    out.take(p.b as usize).zip(rows).enumerate().for_each(|(b, ((sojourn, capped), survival))| {
        let mut row = vec![R::ZERO; k];
        for i in 0..k {
            let mut walk = Sojourn::new(&p);
            for s in 0..h.max(1) {
                if s == 0 || p.softmax > 0 || p.trans_step > 0 {
                    log_row(&p, log_trans, inputs, [b, s, i], &mut row);
                }
                walk.log_stay = row[i].min(R::ZERO);
                if h > 0 {
                    walk.step();
                    survival[s * k + i] = walk.survival;
                }
            }
            let (values, hit) = walk.finish();
            sojourn[3 * i..3 * i + 3].copy_from_slice(&values);
            capped[i] = hit;
        }
    });
    Ok(())
}

/// The sums of one state's sojourn.
struct Sojourn<R> {
    log_stay: R,
    log_survival: R,
    survival: R,
    steps: R,
    first: R,
    second: R,
    quantile: R,
    log_left: R,
    cap: R,
}

impl<R: Real> Sojourn<R> {
    fn new(p: &HmmForecastParams) -> Self {
        let (log_left, cap) = (R::of(f64::from(p.log_left)), R::of(f64::from(p.cap)));
        Sojourn {
            log_stay: R::ZERO,
            log_survival: R::ZERO,
            survival: R::ONE,
            steps: R::ZERO,
            first: R::ZERO,
            second: R::ZERO,
            quantile: R::of(-1.0),
            log_left,
            cap,
        }
    }

    /// One more step with probability exp(log_stay) to stay.
    fn step(&mut self) {
        self.first += self.survival;
        self.second += (self.steps + self.steps + R::ONE) * self.survival;
        let after = self.log_survival + self.log_stay;
        if self.quantile < R::ZERO && after <= self.log_left {
            self.quantile = self.steps + (self.log_left - self.log_survival) / self.log_stay;
        }
        self.log_survival = after;
        self.survival = if after <= R::of(IMPOSSIBLE) { R::ZERO } else { after.exp() };
        self.steps += R::ONE;
    }

    /// Mean, variance, quantile, and whether a cap was met.
    fn finish(self) -> ([R; 3], u32) {
        let leave = -exp_m1(self.log_stay.max(R::of(-80.0)));
        let absorbing = leave <= R::ZERO && self.survival > R::ZERO;
        let (mut mean, mut variance) = (self.first, self.second);
        if !absorbing && self.survival > R::ZERO {
            let stay = R::ONE - leave;
            mean += self.survival / leave;
            variance += self.survival * ((self.steps + self.steps + R::ONE) + (stay + stay) / leave) / leave;
        }
        let variance = if absorbing { R::of(UNDEFINED) } else { (variance - mean * mean).max(R::ZERO) };
        let mut quantile = self.quantile;
        if quantile < R::ZERO {
            quantile = if absorbing { self.cap } else { self.steps + (self.log_left - self.log_survival) / self.log_stay };
        }
        let hit = absorbing || mean > self.cap || quantile > self.cap;
        ([if absorbing { self.cap } else { mean.min(self.cap) }, variance, quantile.min(self.cap)], u32::from(hit))
    }
}

fn hmm_sojourn_average_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HmmForecastParams = launch.params()?;
    let (probability, sojourn, expected) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let k = p.k as usize;
    expected.par_iter_mut().enumerate().take(p.b as usize).for_each(|(b, out)| {
        let rows = probability[b * k..(b + 1) * k].iter().zip(sojourn[3 * b * k..].chunks_exact(3));
        *out = rows.map(|(&p, s)| p * s[0]).sum();
    });
    Ok(())
}

// ---- ops ------------------------------------------------------------------------------------------------------------------

/// What to look ahead from.
#[derive(Debug, Clone)]
pub struct Ahead {
    /// Sequences.
    pub b: u64,
    /// States.
    pub k: u64,
    /// Steps ahead.
    pub steps: u64,
    /// Probability of every state now [B,K].
    pub probability: View,
    /// log_trans [B or 1, H or 1, K,K], or a softmax with inputs [B,H,U]: slot s leads from s to s + 1 steps ahead.
    pub transitions: Transitions,
}

/// How long states last.
#[derive(Debug, Clone)]
pub struct Sojourns {
    /// Chance to stay for the next s + 1 steps [B,H,K].
    pub survival: Buffer,
    /// Mean, variance and quantile of the duration [B,K,3]; the variance of a state that cannot be left is −1e30.
    pub sojourn: Buffer,
    /// 1 where the mean or the quantile was cut at the cap [B,K].
    pub capped: Buffer,
    /// Expected duration under `probability` [B].
    pub expected: Buffer,
}

/// Sequences of a launch, its params, and views of probability, log_trans, inputs.
type Run = (Range<u64>, HmmForecastParams, [View; 3]);

impl Ahead {
    fn slots(&self) -> u64 {
        self.steps.max(1)
    }

    /// Length of the transitions of one sequence, and of one step.
    fn strides(&self) -> (u64, u64) {
        let k2 = self.k * self.k;
        match &self.transitions {
            Transitions::Table { per_step: true, .. } => (self.slots() * k2, k2),
            Transitions::Table { .. } => (k2, 0),
            Transitions::Softmax { u, .. } => (k2 * (u + 1), 0),
        }
    }

    fn check(&self, steps_at_least: u64) -> Result<()> {
        let parameter = |name: &str, value: u64, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
        if self.b == 0 || self.b > u64::from(u32::MAX) / 2 {
            return parameter("sequences", self.b, "give at least one sequence");
        }
        if !(1..=MAX_STATES).contains(&self.k) {
            return parameter("states", self.k, "give 1 to 1024 states");
        }
        if self.steps < steps_at_least || self.steps > u64::from(u32::MAX) / 2 {
            return parameter("steps ahead", self.steps, "look at least one step ahead");
        }
        let len = |arg: &str, view: &View, expected: u64| {
            if view.len() == expected {
                return Ok(());
            }
            Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{expected} values"), got: format!("{} values", view.len()) })
        };
        len("probability", &self.probability, self.b * self.k)?;
        let many = |per_sequence: bool| if per_sequence { self.b } else { 1 };
        match &self.transitions {
            Transitions::Table { log_trans, per_sequence, .. } => len("log_trans", log_trans, many(*per_sequence) * self.strides().0),
            Transitions::Softmax { weights, inputs, u, per_sequence } => {
                len("weights", weights, many(*per_sequence) * self.strides().0)?;
                len("inputs", inputs, self.b * self.slots() * u)
            }
        }
    }

    /// Runs of the batch, with their params and views of probability, log_trans, inputs.
    fn runs(&self, pass: &mut Pass, lanes: u64) -> Result<Vec<Run>> {
        let device = pass.device().clone();
        let (row, step) = self.strides();
        let (h, k) = (self.steps, self.k);
        let (table, per_sequence, u) = match &self.transitions {
            Transitions::Table { log_trans, per_sequence, .. } => (log_trans, *per_sequence, 0),
            Transitions::Softmax { weights, per_sequence, u, .. } => (weights, *per_sequence, *u),
        };
        let softmax = matches!(self.transitions, Transitions::Softmax { .. });
        let elements = (h * k).max(3 * k).max(if per_sequence { row } else { 1 }).max(self.slots() * u);
        let mut out = Vec::new();
        for run in device.plan(OP, self.b, elements, lanes.max(k).div_ceil(64), self.slots() * k * k * 4)? {
            let part =
                |pass: &mut Pass, view: &View, each: u64| pass.input(&view.buffer, view.range.start + run.start * each..view.range.start + run.end * each);
            let probability = part(pass, &self.probability, k)?;
            let log_trans = if per_sequence { part(pass, table, row)? } else { pass.input(&table.buffer, table.range.clone())? };
            let inputs = match &self.transitions {
                Transitions::Softmax { inputs, u, .. } if *u > 0 => part(pass, inputs, self.slots() * u)?,
                _ => View::from(&device.zeros("no inputs", 1)?),
            };
            let params = HmmForecastParams {
                b: (run.end - run.start) as u32,
                h: h as u32,
                k: k as u32,
                u: u as u32,
                trans_row: if per_sequence { row as u32 } else { 0 },
                trans_step: step as u32,
                softmax: u32::from(softmax),
                from_step: 0,
                to_step: h as u32,
                lanes: lanes as u32,
                cap: 0.0,
                log_left: 0.0,
            };
            out.push((run, params, [probability, log_trans, inputs]));
        }
        Ok(out)
    }

    /// Rounds of one step's loops.
    fn rounds(&self, lanes: u64) -> u64 {
        let each = self.k.div_ceil(lanes);
        let u = if let Transitions::Softmax { u, .. } = self.transitions { u } else { 0 };
        // A software adapter goes through the loops of branches that it does not take, too.
        (each + 1) * (2 * self.k + 6) + if u > 0 || matches!(self.transitions, Transitions::Softmax { .. }) { each * 3 * self.k * (u + 2) } else { 0 }
    }
}

/// Records the probabilities of the states 1 … H steps ahead [B,H,K].
///
/// They use the present probabilities and the transitions alone: with filtered probabilities at t, nothing after t.
/// # Errors
/// `Parameter` for no sequences, states or steps; `Shape` for a view of the wrong length.
pub fn hmm_forecast(pass: &mut Pass, ahead: &Ahead) -> Result<Buffer> {
    ahead.check(1)?;
    let device = pass.device().clone();
    let (h, k) = (ahead.steps, ahead.k);
    let lanes = k.next_power_of_two().min(u64::from(WG));
    let rounds = ahead.rounds(lanes);
    device.check_rounds(OP, rounds, "rounds")?;
    let block = device.limits().loop_rounds / rounds;
    let forecast = device.zeros("forecast", ahead.b * h * k)?;
    for (run, params, [probability, log_trans, inputs]) in ahead.runs(pass, lanes)? {
        let out = pass.output(&forecast, run.start * h * k..run.end * h * k)?;
        for i in 0..h.div_ceil(block) {
            let part = HmmForecastParams { from_step: (i * block) as u32, to_step: ((i + 1).saturating_mul(block)).min(h) as u32, ..params };
            pass.launch(&HMM_FORECAST, &part, &[probability.clone(), log_trans.clone(), inputs.clone(), out.view.clone()])?;
        }
        pass.finish(out)?;
    }
    Ok(forecast)
}

/// Records survival and sojourn times; `ahead.steps` may be 0 for constant transitions. The duration of a state counts the current step;
/// beyond the last slot, that slot's probability to stay goes on. `level` is the quantile's (0.5: the median), `cap` the longest duration
/// (10,000 is usual).
/// # Errors
/// As [`hmm_forecast`]; `Parameter` for a level outside (0, 1) or a cap that is not at least 1.
pub fn hmm_sojourn(pass: &mut Pass, ahead: &Ahead, level: f64, cap: f64) -> Result<Sojourns> {
    let constant = matches!(ahead.transitions, Transitions::Table { per_step: false, .. });
    ahead.check(u64::from(!constant))?;
    let wrong =
        |name: &str, value: f64, help: &str| Err(Error::Parameter { op: "hmm_sojourn", name: name.into(), value: value.to_string(), help: help.into() });
    if !(level > 0.0 && level < 1.0) {
        return wrong("level", level, "give a quantile between 0 and 1, as 0.5 for the median");
    }
    if !(1.0..1e7).contains(&cap) {
        return wrong("cap", cap, "give a longest duration from 1 to 10 million steps");
    }
    let device = pass.device().clone();
    let (b, h, k) = (ahead.b, ahead.steps, ahead.k);
    let softmax = if let Transitions::Softmax { u, .. } = ahead.transitions { 2 * k * (u + 2) } else { 5 };
    device.check_rounds("hmm_sojourn", ahead.slots() * (2 + softmax), "rounds")?;
    let out = Sojourns {
        survival: device.zeros("survival", (b * h * k).max(1))?,
        sojourn: device.zeros("sojourn", SOJOURN * b * k)?,
        capped: device.zeros_u32("capped", b * k)?,
        expected: device.zeros("expected duration", b)?,
    };
    for (run, mut params, [probability, log_trans, inputs]) in ahead.runs(pass, 1)? {
        (params.cap, params.log_left) = (cap as f32, (1.0 - level).ln() as f32);
        let of_survival = if h > 0 { run.start * h * k..run.end * h * k } else { 0..1 };
        let (survival, sojourn) = (pass.output(&out.survival, of_survival)?, pass.output(&out.sojourn, SOJOURN * k * run.start..SOJOURN * k * run.end)?);
        let (capped, expected) = (pass.output(&out.capped, run.start * k..run.end * k)?, pass.output(&out.expected, run.clone())?);
        pass.launch(&HMM_SOJOURN, &params, &[log_trans, inputs, survival.view.clone(), sojourn.view.clone(), capped.view.clone()])?;
        pass.launch(&HMM_SOJOURN_AVERAGE, &params, &[probability, sojourn.view.clone(), expected.view.clone()])?;
        for output in [survival, sojourn, capped, expected] {
            pass.finish(output)?;
        }
    }
    Ok(out)
}

/// Binding for files: probability [B,K], log_trans [B or 1, H or 1, K,K], the number of steps; forecast [B,H,K].
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let wrong = || Error::Shape { op: OP, arg: "probability, log_trans".into(), expected: "[B,K], [B or 1,H or 1,K,K]".into(), got: "another shape".into() };
    let (&[b, k], &[tables, slots, ..]) = (case.shape("probability")?, case.shape("log_trans")?) else { return Err(wrong()) };
    let log_trans = View::from(&device.upload("log_trans", case.f32("log_trans")?)?);
    let ahead = Ahead {
        b: b as u64,
        k: k as u64,
        steps: case.number("steps")? as u64,
        probability: View::from(&device.upload("probability", case.f32("probability")?)?),
        transitions: Transitions::Table { log_trans, per_sequence: tables > 1, per_step: slots > 1 },
    };
    let mut pass = device.pass(OP);
    let forecast = hmm_forecast(&mut pass, &ahead)?;
    let read = pass.read(&forecast)?;
    let mut outputs = Outputs::launched(pass.launches());
    outputs.reals("forecast", pass.submit()?.f64(read)?);
    Ok(outputs)
}
