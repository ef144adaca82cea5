//! Objectives of a series of returns, one value per row, and their gradients: whole rows at once, or an epoch in batches, exactly.
//!
//! μ, s² mean and variance (divisor n−1) of r[t]; L[t] = Σ_{u≤t} ln(1+r[u]), L before the first bar is 0; ratios divide by √(x² + floor²).
//! sharpe         √A·(μ − risk_free) / √(s² + floor²)
//! sortino        √A·(μ − target) / √(d² + floor²),  d² = mean min(r − target, 0)²
//! calmar         (e^(A·L[T]/n) − 1) / √(D² + floor²),  D = 1 − exp(−max_{u≤t}(L[u] − L[t]))
//! max_drawdown   D, or additive: max_{u≤t}(C[u] − C[t]) with C = Σ r
//! cvar           −(Σ of the ⌊αn⌋ worst + the fraction left of the next) / αn; equal values share their weight
//! mean_variance  A·(μ − ½·risk_aversion·s²)
//! gradient       every objective's is one sum of terms with coefficients per row: constant, (r−μ), min(r−target, 0), 1/(1+r), those
//!                within the drawdown's bars, and steps at the tail's threshold.
//! net_returns    r[t] = p[t]·y[t] − cost·|p[t] − p[t−1]|, p before the first bar 0: an objective of r charges turnover.
//!
//! Shapes   returns, grad_returns, positions [N,T]; value, grad_value [N]; state [N,16]; coefficients [N,12]; lengths words [L], N a multiple
//!          of L: row i has lengths[i mod L] bars, those past them are not read and have gradient 0; asset_returns [L,T] likewise.
//! Launch   `objective_moments` (and `objective_tail` for cvar): one workgroup per row; `objective_finish`: a thread per row;
//!          `objective_gradient`, `net_returns`: a thread per value.
//! Epochs   state adds up over batches of bars in order, then each batch's gradient needs its own returns and the coefficients alone:
//!          memory of one batch, the gradient of the whole epoch. cvar's threshold is an exact order statistic of returns that are never all
//!          there: sweeps over the epoch count one byte more of their ordered images each (bins [N,260]: 256 counts, image, rank), a last one
//!          sums what lies below. net_returns of a batch needs a bar of the neighbours on either side, whose own results are left out.
//! Undefined −1e30, gradient 0: no bar, fewer than two (sharpe, mean_variance), a zero denominator. A factor 1+r below 1e-6 counts as
//!          1e-6 and passes no gradient.
//! Floor    4 bytes a value forward, 8 backward.
//! Numerics deviations from a row's first return, then from its mean; batches merge by Chan's rule. Drawdowns by blocks of 64 bars,
//!          joined in order; the earliest pair wins.
//! Source   Sharpe 1994; Sortino & Price 1994; Rockafellar & Uryasev 2000; Chan, Golub, LeVeque 1983.
//! Files    shaders/objective.wgsl · cuda/objective.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs, UNDEFINED, defined};
use crate::device::{Device, DeviceKind, Pass, View};
use crate::kernel::{Arg, Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

const OP: &str = "objective";

params! {
    /// Params of the kernels; a real is the sum of a field and its `_low`, which only f64 feels.
    pub struct ObjectiveParams {
        /// Rows of the launch, and the first of them within state, coefficients and values.
        n: u32,
        /// First of them.
        first: u32,
        /// Bars of a row.
        t: u32,
        /// Bars of earlier batches.
        start: u32,
        /// Which objective.
        kind: u32,
        /// Periods per year.
        periods: f32,
        /// What its rounding took away.
        periods_low: f32,
        /// Floor of denominators.
        floor: f32,
        /// What its rounding took away.
        floor_low: f32,
        /// Risk-free return, target, α, risk aversion, or cost.
        option: f32,
        /// What its rounding took away.
        option_low: f32,
        /// Rows after which lengths, or asset returns, repeat; 0 where there are no lengths, or each row has its own returns.
        period: u32,
        /// Sweep of the tail: bytes of the threshold's image that are known.
        sweep: u32,
    }
}

const WG: u32 = 128;
/// State of a row: count, mean, central squares, downside squares, the stretch, then the tail's threshold, values below it, their sum,
/// values equal to it.
const STATE: usize = 16;
/// Coefficients of a row: see [`coefficients`].
const COEFFICIENTS: usize = 12;
const STRETCH: usize = 4;
const TAIL: usize = 12;
/// Bins of a row: counts of the values of a byte, the threshold's image so far in two parts of 24 bits and more, its rank.
const BINS: usize = 260;
const PREFIX: usize = 256;
const RANK: usize = 258;

const SHARPE: u32 = 0;
const SORTINO: u32 = 1;
const CALMAR: u32 = 2;
const DRAWDOWN: u32 = 3;
const DRAWDOWN_ADDITIVE: u32 = 4;
const CVAR: u32 = 5;
const MEAN_VARIANCE: u32 = 6;

/// Largest logarithm of a year's growth in f32: a day of +50 % alone in its row says e^102.
const MOST_GROWTH: f64 = 40.0;
/// Smallest 1 + r.
const RUIN: f64 = 1e-6;
/// Bars that one thread of the CPU takes at a time, and bars of a block.
const SEGMENT: usize = 1 << 14;
const BLOCK: usize = 64;
/// Bars that f32 counts exactly.
const LONGEST: u64 = 1 << 24;

fn params(words: &[u32]) -> ObjectiveParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn values(words: &[u32]) -> u64 {
    u64::from(params(words).n) * u64::from(params(words).t)
}

const fn kernel(name: &'static str, about: &'static str, args: &'static [Arg], groups: fn(&[u32]) -> u64, cpu: Cpu, bytes: f64) -> Kernel {
    let cost = Cost { unit: "value", units: values, bytes, flops: 4.0 * bytes };
    Kernel {
        name,
        about,
        args,
        params: layout::<ObjectiveParams>(),
        workgroup: WG,
        constants: &[],
        groups,
        wgsl: wgsl!("objective"),
        cuda: cuda!("objective"),
        cpu: Some(cpu),
        cost,
    }
}

fn by_row(words: &[u32]) -> u64 {
    u64::from(params(words).n)
}

fn by_row_thread(words: &[u32]) -> u64 {
    u64::from(params(words).n).div_ceil(u64::from(WG))
}

fn by_value(words: &[u32]) -> u64 {
    values(words).div_ceil(u64::from(WG))
}

/// Moments and drawdown of a batch, added to the state.
pub static OBJECTIVE_MOMENTS: Kernel = kernel(
    "objective_moments",
    "moments, downside and drawdown of each row, added to a state",
    &[reads("returns"), reads_u32("lengths"), writes("state")],
    by_row,
    Cpu { f32: objective_moments_cpu::<f32>, f64: objective_moments_cpu::<f64> },
    4.0,
);

/// The tail's threshold.
pub static OBJECTIVE_TAIL: Kernel = kernel(
    "objective_tail",
    "order statistic of each row's tail and the sum below it",
    &[reads("returns"), reads_u32("lengths"), writes("state")],
    by_row,
    Cpu { f32: objective_tail_cpu::<f32>, f64: objective_tail_cpu::<f64> },
    4.0,
);

/// The same over an epoch in batches.
pub static OBJECTIVE_TAIL_SWEEP: Kernel = kernel(
    "objective_tail_sweep",
    "one byte of the order statistic of a tail, or the sum below it, over a batch",
    &[reads("returns"), reads_u32("lengths"), writes("state"), writes("bins")],
    by_row,
    Cpu { f32: objective_tail_sweep_cpu::<f32>, f64: objective_tail_sweep_cpu::<f64> },
    4.0,
);

/// Values and coefficients of the gradient.
pub static OBJECTIVE_FINISH: Kernel = kernel(
    "objective_finish",
    "value of each row and the coefficients of its gradient",
    &[reads("state"), writes("value"), writes("coefficients")],
    by_row_thread,
    Cpu { f32: objective_finish_cpu::<f32>, f64: objective_finish_cpu::<f64> },
    0.0,
);

/// Gradients by the returns.
pub static OBJECTIVE_GRADIENT: Kernel = kernel(
    "objective_gradient",
    "gradient of the objectives by the returns",
    &[reads("returns"), reads_u32("lengths"), reads("coefficients"), reads("grad_value"), writes("grad_returns")],
    by_value,
    Cpu { f32: objective_gradient_cpu::<f32>, f64: objective_gradient_cpu::<f64> },
    8.0,
);

/// Returns of positions after costs.
pub static NET_RETURNS: Kernel = kernel(
    "net_returns",
    "returns of positions after costs of turnover",
    &[reads("positions"), reads("asset_returns"), writes("returns")],
    by_value,
    Cpu { f32: net_returns_cpu::<f32>, f64: net_returns_cpu::<f64> },
    12.0,
);

/// Gradients by the positions.
pub static NET_RETURNS_BACKWARD: Kernel = kernel(
    "net_returns_backward",
    "gradient of net returns by the positions",
    &[reads("positions"), reads("asset_returns"), reads("grad_returns"), writes("grad_positions")],
    by_value,
    Cpu { f32: net_returns_backward_cpu::<f32>, f64: net_returns_backward_cpu::<f64> },
    16.0,
);

// ---- CPU column -----------------------------------------------------------------------------------------------------------

fn whole<R: Real>(high: f32, low: f32) -> R {
    R::of(f64::from(high) + f64::from(low))
}

impl ObjectiveParams {
    /// Bars of the batch that belong to a row of the launch.
    fn bars_of(&self, lengths: &[u32], i: usize) -> usize {
        match self.period as usize {
            0 => self.t as usize,
            period => (lengths[(self.first as usize + i) % period].saturating_sub(self.start) as usize).min(self.t as usize),
        }
    }
}

/// Levels of a stretch of bars, counted from its start: total, highest and lowest with their bars, and the deepest fall.
#[derive(Clone, Copy)]
struct Stretch<R> {
    total: R,
    high: R,
    high_at: usize,
    low: R,
    low_at: usize,
    fall: R,
    peak: usize,
    trough: usize,
}

impl<R: Real> Stretch<R> {
    fn empty(at: usize) -> Stretch<R> {
        Stretch { total: R::ZERO, high: R::ZERO, high_at: at, low: R::ZERO, low_at: at, fall: R::ZERO, peak: at, trough: at }
    }

    /// Bars `x` that start at `at`, at most a block of them.
    fn of(x: &[R], at: usize, additive: bool) -> Stretch<R> {
        let mut s = Stretch::empty(at);
        for (i, &r) in x.iter().enumerate() {
            s.total += if additive { r } else { r.max(R::of(RUIN - 1.0)).ln_1p() };
            if s.total > s.high {
                (s.high, s.high_at) = (s.total, at + i + 1);
            }
            if s.total < s.low {
                (s.low, s.low_at) = (s.total, at + i + 1);
            }
            if s.high - s.total > s.fall {
                (s.fall, s.peak, s.trough) = (s.high - s.total, s.high_at, at + i + 1);
            }
        }
        s
    }

    fn join(self, b: Stretch<R>) -> Stretch<R> {
        let mut s = self;
        let across = self.high - (self.total + b.low);
        if across > s.fall {
            (s.fall, s.peak, s.trough) = (across, self.high_at, b.low_at);
        }
        if b.fall > s.fall {
            (s.fall, s.peak, s.trough) = (b.fall, b.peak, b.trough);
        }
        if self.total + b.high > s.high {
            (s.high, s.high_at) = (self.total + b.high, b.high_at);
        }
        if self.total + b.low < s.low {
            (s.low, s.low_at) = (self.total + b.low, b.low_at);
        }
        s.total += b.total;
        s
    }

    fn store(&self, out: &mut [R]) {
        let at = |i: usize| R::of(i as f64);
        let all = [self.total, self.high, at(self.high_at), self.low, at(self.low_at), self.fall, at(self.peak), at(self.trough)];
        out[STRETCH..STRETCH + 8].copy_from_slice(&all);
    }

    fn load(state: &[R]) -> Stretch<R> {
        let s = &state[STRETCH..STRETCH + 8];
        let at = |x: R| x.f64() as usize;
        Stretch { total: s[0], high: s[1], high_at: at(s[2]), low: s[3], low_at: at(s[4]), fall: s[5], peak: at(s[6]), trough: at(s[7]) }
    }
}

/// Moments of bars.
#[derive(Clone, Copy)]
struct Moments<R> {
    count: R,
    mean: R,
    squares: R,
    downside: R,
    stretch: Stretch<R>,
}

impl<R: Real> Moments<R> {
    fn of(x: &[R], at: usize, p: &ObjectiveParams) -> Moments<R> {
        let target = if p.kind == SORTINO { whole(p.option, p.option_low) } else { R::ZERO };
        let (first, count) = (x[0], R::of(x.len() as f64));
        let lanes = |f: &dyn Fn(&[R]) -> R| x.chunks(BLOCK).map(f).sum::<R>();
        let offset = lanes(&|x| x.iter().map(|&r| r - first).sum()) / count;
        let squares = lanes(&|x| x.iter().map(|&r| ((r - first) - offset) * ((r - first) - offset)).sum());
        let downside = lanes(&|x| x.iter().map(|&r| if r < target { (r - target) * (r - target) } else { R::ZERO }).sum());
        let mut stretch = Stretch::empty(at);
        if matches!(p.kind, CALMAR | DRAWDOWN | DRAWDOWN_ADDITIVE) {
            for (i, block) in x.chunks(BLOCK).enumerate() {
                stretch = stretch.join(Stretch::of(block, at + i * BLOCK, p.kind == DRAWDOWN_ADDITIVE));
            }
        }
        Moments { count, mean: first + offset, squares, downside, stretch }
    }

    fn join(self, b: Moments<R>) -> Moments<R> {
        let (count, delta) = (self.count + b.count, b.mean - self.mean);
        Moments {
            count,
            mean: self.mean + delta * (b.count / count),
            squares: self.squares + b.squares + delta * delta * (self.count * b.count / count),
            downside: self.downside + b.downside,
            stretch: self.stretch.join(b.stretch),
        }
    }
}

fn objective_moments_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ObjectiveParams = launch.params()?;
    let (returns, lengths, state) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let (t, start) = (p.t as usize, p.start as usize);
    let states = state[p.first as usize * STATE..].par_chunks_exact_mut(STATE).take(p.n as usize);
    returns.par_chunks_exact(t).zip(states).enumerate().for_each(|(i, (x, state))| {
        let x = &x[..p.bars_of(lengths, i)];
        if x.is_empty() && start == 0 {
            state.fill(R::ZERO);
        }
        if x.is_empty() {
            return;
        }
        let parts: Vec<Moments<R>> = x.par_chunks(SEGMENT).enumerate().map(|(i, x)| Moments::of(x, start + i * SEGMENT, &p)).collect();
        let old = (start > 0).then(|| Moments { count: state[0], mean: state[1], squares: state[2], downside: state[3], stretch: Stretch::load(state) });
        if let Some(all) = old.into_iter().chain(parts).reduce(Moments::join) {
            state.fill(R::ZERO);
            state[..4].copy_from_slice(&[all.count, all.mean, all.squares, all.downside]);
            all.stretch.store(state);
        }
    });
    Ok(())
}

/// Number of returns in the tail: α·n, at most n.
fn tail_of<R: Real>(p: &ObjectiveParams, n: R) -> R {
    let tail = whole::<R>(p.option, p.option_low) * n;
    if tail < n { tail } else { n }
}

fn objective_tail_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ObjectiveParams = launch.params()?;
    let (returns, lengths, state) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let states = state[p.first as usize * STATE..].par_chunks_exact_mut(STATE).take(p.n as usize);
    returns.par_chunks_exact(p.t as usize).zip(states).enumerate().for_each(|(i, (x, state))| {
        let x = &x[..p.bars_of(lengths, i)];
        if x.is_empty() {
            return;
        }
        let rank = (tail_of(&p, R::of(x.len() as f64)).f64() as usize).min(x.len() - 1);
        let mut sorted = x.to_vec();
        let (_, &mut threshold, _) = sorted.select_nth_unstable_by(rank, |a, b| a.f64().total_cmp(&b.f64()));
        // sums in the order of time: the selection's order is no one's
        let [count, sum, equal] = tail_sums(x, threshold);
        state[TAIL..].copy_from_slice(&[threshold, count, sum, equal]);
    });
    Ok(())
}

/// Number and sum of the values below a threshold, and number of those at it.
fn tail_sums<R: Real>(x: &[R], threshold: R) -> [R; 3] {
    let mut sums = [R::ZERO; 3];
    for block in x.chunks(BLOCK) {
        let mut of_block = R::ZERO;
        for &r in block {
            if r < threshold {
                of_block += r;
                sums[0] += R::ONE;
            } else if r == threshold {
                sums[2] += R::ONE;
            }
        }
        sums[1] += of_block;
    }
    sums
}

/// Bytes of a real.
const fn digits<R: Real>() -> u32 {
    if R::DIGITS > 24 { 8 } else { 4 }
}

/// Monotone unsigned image of a real; both zeros are one.
fn ordered<R: Real>(x: R) -> u64 {
    let x = if x == R::ZERO { R::ZERO } else { x };
    let (raw, top) = if digits::<R>() == 8 { (x.f64().to_bits(), 63) } else { (u64::from(x.f32().to_bits()), 31) };
    if raw >> top == 1 { !raw & (u64::MAX >> (63 - top)) } else { raw | 1 << top }
}

fn unordered<R: Real>(key: u64) -> R {
    if digits::<R>() == 8 {
        R::of(f64::from_bits(if key >> 63 == 1 { key & !(1 << 63) } else { !key }))
    } else {
        let key = key as u32;
        R::of(f64::from(f32::from_bits(if key >> 31 == 1 { key & 0x7fff_ffff } else { !key })))
    }
}

/// Adds a byte to the image of a row's threshold from what the last sweep counted; after the last byte the threshold goes to the state.
fn pick<R: Real>(p: &ObjectiveParams, bins: &mut [R], state: &mut [R]) {
    let (mut prefix, mut rank) = (bins[PREFIX].f64() as u64 * (1 << 24) + bins[PREFIX + 1].f64() as u64, bins[RANK].f64() as u64);
    if p.sweep == 1 {
        let n = state[0].f64() as u64;
        (prefix, rank) = (0, (tail_of(p, state[0]).f64() as u64).min(n.max(1) - 1));
    }
    let mut bin = 0;
    while bin < 255 && bins[bin].f64() as u64 <= rank {
        rank -= bins[bin].f64() as u64;
        bin += 1;
    }
    prefix = prefix << 8 | bin as u64;
    if p.sweep < digits::<R>() {
        (bins[PREFIX], bins[PREFIX + 1], bins[RANK]) = (R::of((prefix >> 24) as f64), R::of((prefix & 0xff_ffff) as f64), R::of(rank as f64));
    } else {
        state[TAIL..].copy_from_slice(&[unordered(prefix), R::ZERO, R::ZERO, R::ZERO]);
    }
}

fn objective_tail_sweep_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ObjectiveParams = launch.params()?;
    let (returns, lengths, state, bins) = (launch.real()?, launch.word()?, launch.real_mut()?, launch.real_mut()?);
    let states = state[p.first as usize * STATE..].par_chunks_exact_mut(STATE).take(p.n as usize);
    let bins = bins[p.first as usize * BINS..].par_chunks_exact_mut(BINS).take(p.n as usize);
    returns.par_chunks_exact(p.t as usize).zip(states).zip(bins).enumerate().for_each(|(i, ((x, state), bins))| {
        let x = &x[..p.bars_of(lengths, i)];
        if p.start == 0 && p.sweep > 0 {
            pick(&p, bins, state);
        }
        if p.sweep == digits::<R>() {
            let sums = tail_sums(x, state[TAIL]);
            state[TAIL + 1..].iter_mut().zip(sums).for_each(|(sum, more)| *sum += more);
            return;
        }
        if p.start == 0 {
            bins[..PREFIX].fill(R::ZERO);
        }
        let (prefix, shift) = (bins[PREFIX].f64() as u64 * (1 << 24) + bins[PREFIX + 1].f64() as u64, 8 * (digits::<R>() - 1 - p.sweep));
        for &r in x {
            let key = ordered(r);
            if p.sweep == 0 || key >> (shift + 8) == prefix {
                bins[(key >> shift & 0xff) as usize] += R::ONE;
            }
        }
    });
    Ok(())
}

/// Value of a row, and its coefficients: constant, of r−centre, centre, of min(r−target, 0), of 1/(1+r), of 1/(1+r) in the fall, constant
/// in the fall, its first bar and the bar after its last, the tail's threshold, below it, at it.
fn finish<R: Real>(state: &[R], p: &ObjectiveParams) -> (R, [R; COEFFICIENTS]) {
    let (n, mean, one) = (state[0], state[1], R::ONE);
    let (periods, floor, option): (R, R, R) = (whole(p.periods, p.periods_low), whole(p.floor, p.floor_low), whole(p.option, p.option_low));
    let stretch = Stretch::load(state);
    let mut c = [R::ZERO; COEFFICIENTS];
    (c[2], c[7], c[8]) = (mean, R::of(stretch.peak as f64), R::of(stretch.trough as f64));
    let undefined = (R::of(UNDEFINED), [R::ZERO; COEFFICIENTS]);
    // 1 − e^−fall, without cancellation
    let minus_expm1 = |y: R| R::of(-y.f64().exp_m1());
    let drawdown = minus_expm1(-stretch.fall);
    let value = match p.kind {
        _ if n < one => return undefined,
        SHARPE | MEAN_VARIANCE if n <= one => return undefined,
        SHARPE => {
            let below = (state[2] / (n - one) + floor * floor).sqrt();
            if below <= R::ZERO {
                return undefined;
            }
            let ratio = periods.sqrt() * (mean - option) / below;
            c[0] = periods.sqrt() / (n * below);
            c[1] = -(ratio / ((n - one) * below * below));
            ratio
        }
        MEAN_VARIANCE => {
            c[0] = periods / n;
            c[1] = -(periods * option / (n - one));
            periods * (mean - R::of(0.5) * option * state[2] / (n - one))
        }
        SORTINO => {
            let below = (state[3] / n + floor * floor).sqrt();
            if below <= R::ZERO {
                return undefined;
            }
            let ratio = periods.sqrt() * (mean - option) / below;
            c[0] = periods.sqrt() / (n * below);
            c[3] = -(ratio / (n * below * below));
            ratio
        }
        CALMAR => {
            let below = (drawdown * drawdown + floor * floor).sqrt();
            if below <= R::ZERO {
                return undefined;
            }
            let growth = periods / n * stretch.total;
            let growth = -minus_expm1(growth.min(R::of(if R::DIGITS > 24 { 690.0 } else { MOST_GROWTH })));
            c[4] = (one + growth) * periods / (n * below);
            c[5] = growth * drawdown * (one - drawdown) / (below * below * below);
            growth / below
        }
        DRAWDOWN => {
            c[5] = -(one - drawdown);
            drawdown
        }
        DRAWDOWN_ADDITIVE => {
            c[6] = -one;
            stretch.fall
        }
        _ => {
            let tail = tail_of(p, n);
            let rest = tail - state[TAIL + 1];
            c[9] = state[TAIL];
            c[10] = -(one / tail);
            c[11] = -(rest / (tail * state[TAIL + 3]));
            -((state[TAIL + 2] + rest * state[TAIL]) / tail)
        }
    };
    (value, c)
}

fn objective_finish_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ObjectiveParams = launch.params()?;
    let (state, value, coefficients) = (launch.real()?, launch.real_mut()?, launch.real_mut()?);
    for i in p.first as usize..(p.first + p.n) as usize {
        let (v, c) = finish(&state[i * STATE..(i + 1) * STATE], &p);
        value[i] = v;
        coefficients[i * COEFFICIENTS..(i + 1) * COEFFICIENTS].copy_from_slice(&c);
    }
    Ok(())
}

fn objective_gradient_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ObjectiveParams = launch.params()?;
    let (returns, lengths, coefficients, grad_value, grad) = (launch.real()?, launch.word()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let (t, start) = (p.t as usize, p.start as usize);
    let target = if p.kind == SORTINO { whole(p.option, p.option_low) } else { R::ZERO };
    returns.par_chunks_exact(t).zip(grad.par_chunks_exact_mut(t)).take(p.n as usize).enumerate().for_each(|(i, (x, grad))| {
        let row = p.first as usize + i;
        let c: &[R] = &coefficients[row * COEFFICIENTS..(row + 1) * COEFFICIENTS];
        let up = grad_value[row];
        let (peak, trough) = (c[7].f64() as usize, c[8].f64() as usize);
        let (grad, past) = grad.split_at_mut(p.bars_of(lengths, i));
        past.fill(R::ZERO);
        grad.par_chunks_mut(SEGMENT).zip(x.par_chunks(SEGMENT)).enumerate().for_each(|(s, (grad, x))| {
            for (j, (grad, &r)) in grad.iter_mut().zip(x).enumerate() {
                let at = start + s * SEGMENT + j;
                let falls = at >= peak && at < trough;
                let mut g = c[0] + c[1] * (r - c[2]);
                if r < target {
                    g += c[3] * (r - target);
                }
                if R::ONE + r >= R::of(RUIN) {
                    g += (c[4] + if falls { c[5] } else { R::ZERO }) / (R::ONE + r);
                }
                if falls {
                    g += c[6];
                }
                if r < c[9] {
                    g += c[10];
                } else if r == c[9] {
                    g += c[11];
                }
                *grad = up * g;
            }
        });
    });
    Ok(())
}

/// −1, 0 or 1.
fn sign<R: Real>(x: R) -> R {
    if x > R::ZERO {
        R::ONE
    } else if x < R::ZERO {
        -R::ONE
    } else {
        R::ZERO
    }
}

/// Asset returns of a row of the launch.
fn assets_of<'a, R>(p: &ObjectiveParams, asset_returns: &'a [R], i: usize) -> &'a [R] {
    let row = if p.period == 0 { i } else { (p.first as usize + i) % p.period as usize };
    &asset_returns[row * p.t as usize..(row + 1) * p.t as usize]
}

fn net_returns_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ObjectiveParams = launch.params()?;
    let (positions, asset_returns, returns) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let (t, cost): (usize, R) = (p.t as usize, whole(p.option, p.option_low));
    let rows = positions.par_chunks_exact(t).zip(returns.par_chunks_exact_mut(t)).enumerate();
    rows.take(p.n as usize).for_each(|(i, (x, out))| {
        let y = assets_of(&p, asset_returns, i);
        for j in 0..t {
            let before = if j > 0 { x[j - 1] } else { R::ZERO };
            out[j] = x[j] * y[j] - cost * (x[j] - before).abs();
        }
    });
    Ok(())
}

fn net_returns_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ObjectiveParams = launch.params()?;
    let (positions, asset_returns, grad_returns, grad) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let (t, cost): (usize, R) = (p.t as usize, whole(p.option, p.option_low));
    let rows = positions.par_chunks_exact(t).zip(grad_returns.par_chunks_exact(t)).zip(grad.par_chunks_exact_mut(t)).enumerate();
    rows.take(p.n as usize).for_each(|(i, ((x, g), out))| {
        let y = assets_of(&p, asset_returns, i);
        for j in 0..t {
            let before = if j > 0 { x[j - 1] } else { R::ZERO };
            let after = if j + 1 < t { g[j + 1] * cost * sign(x[j + 1] - x[j]) } else { R::ZERO };
            out[j] = g[j] * (y[j] - cost * sign(x[j] - before)) + after;
        }
    });
    Ok(())
}

// ---- the op ---------------------------------------------------------------------------------------------------------------

/// Which objective. Values are as named; a loss to minimise is their negative where more is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Annualised mean over deviation.
    Sharpe {
        /// Return per period that is free of risk.
        risk_free: f64,
    },
    /// Annualised mean over downside deviation.
    Sortino {
        /// Return per period below which a return is a loss.
        target: f64,
    },
    /// Compound annual growth over the deepest compound drawdown.
    Calmar,
    /// Deepest drawdown, positive.
    MaxDrawdown {
        /// Of summed instead of compounded returns.
        additive: bool,
    },
    /// Mean loss in the worst α of the bars, positive.
    Cvar {
        /// In (0, 1].
        alpha: f64,
    },
    /// Annualised mean less half the variance times the aversion.
    MeanVariance {
        /// At least 0.
        risk_aversion: f64,
    },
}

/// Sizes and options.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Which one.
    pub goal: Goal,
    /// N.
    pub rows: u64,
    /// T, bars of this call.
    pub bars: u64,
    /// A.
    pub periods_per_year: f64,
    /// Floor of the ratios' denominators, per period; 0 leaves ratios undefined at zero risk. Training wants some 1e-5.
    pub floor: f64,
}

/// Returns of N rows, and how many bars of each count.
#[derive(Debug, Clone, Copy)]
pub struct Series<'a> {
    /// [N,T], the bars of this call.
    pub returns: &'a View,
    /// Words [L], N a multiple of L: row i has `lengths[i mod L]` bars of the whole epoch. None: every row has all.
    pub lengths: Option<&'a View>,
}

impl<'a> From<&'a View> for Series<'a> {
    fn from(returns: &'a View) -> Series<'a> {
        Series { returns, lengths: None }
    }
}

impl Series<'_> {
    /// Checks it; the lengths to bind, and the rows after which they repeat.
    fn check(&self, op: &Objective, device: &Device) -> Result<(View, u32)> {
        view_of("returns", self.returns, op.rows * op.bars)?;
        let Some(lengths) = self.lengths else { return Ok((View::from(&device.zeros_u32("no lengths", 1)?), 0)) };
        if lengths.elem() != Elem::U32 || (op.rows > 0 && (lengths.len() == 0 || !op.rows.is_multiple_of(lengths.len()))) {
            let (expected, got) = (format!("words, as many as a divisor of the {} rows", op.rows), format!("{} of {}", lengths.len(), lengths.elem().wgsl()));
            return Err(Error::Shape { op: OP, arg: "lengths".into(), expected, got });
        }
        Ok((lengths.clone(), lengths.len() as u32))
    }
}

fn view_of(name: &str, view: &View, len: u64) -> Result<()> {
    if view.len() == len && view.elem() == Elem::F32 {
        return Ok(());
    }
    let got = format!("{} of {}", view.len(), view.elem().wgsl());
    Err(Error::Shape { op: OP, arg: name.into(), expected: format!("{len} of f32"), got })
}

impl Objective {
    /// Refuses what has no meaning.
    /// # Errors
    /// `Parameter` that names the option.
    pub fn check(&self) -> Result<()> {
        let refuse = |name: &str, value: f64, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
        if !(self.periods_per_year.is_finite() && self.periods_per_year > 0.0) {
            return refuse("periods_per_year", self.periods_per_year, "give a positive number of return periods per year");
        }
        if !(self.floor.is_finite() && self.floor >= 0.0) {
            return refuse("floor", self.floor, "give a finite number, at least 0");
        }
        match self.goal {
            Goal::Sharpe { risk_free: x } if !x.is_finite() => refuse("risk_free", x, "give a finite number"),
            Goal::Sortino { target: x } if !x.is_finite() => refuse("target", x, "give a finite number"),
            Goal::Cvar { alpha: x } if !(x > 0.0 && x <= 1.0) => refuse("alpha", x, "give a share of the bars in (0, 1]"),
            Goal::MeanVariance { risk_aversion: x } if !(x.is_finite() && x >= 0.0) => refuse("risk_aversion", x, "give a finite number, at least 0"),
            _ => Ok(()),
        }
    }

    /// Reals of the state that [`objective_moments`] adds to.
    pub fn state(&self) -> u64 {
        self.rows * STATE as u64
    }

    /// Reals of the bins that [`objective_tail`] counts in: none but for cvar.
    pub fn bins(&self) -> u64 {
        if self.is_cvar() { self.rows * BINS as u64 } else { 0 }
    }

    /// Sweeps over an epoch in batches before [`objective_finish`]: one, or for cvar one more than an order statistic has bytes.
    pub fn sweeps(&self, device: &Device) -> u32 {
        match (self.is_cvar(), device.info().kind) {
            (false, _) => 1,
            (true, DeviceKind::Reference) => 1 + digits::<f64>(),
            (true, _) => 1 + digits::<f32>(),
        }
    }

    fn is_cvar(&self) -> bool {
        matches!(self.goal, Goal::Cvar { .. })
    }

    /// Reals that forward keeps for the gradient: the coefficients.
    pub fn saved(&self) -> u64 {
        self.rows * COEFFICIENTS as u64
    }

    fn check_bars(&self, start: u64) -> Result<()> {
        self.check()?;
        let bars = start.saturating_add(self.bars);
        if bars > LONGEST {
            let help = "shorten the series: f32 does not count further".into();
            return Err(Error::TooLarge { what: format!("{OP}: a row"), needed: bars, limit: LONGEST, unit: "bars", help });
        }
        if self.bars == 0 {
            return Err(Error::Shape { op: OP, arg: "bars".into(), expected: "at least 1".into(), got: "0".into() });
        }
        Ok(())
    }

    fn params(&self, start: u64) -> ObjectiveParams {
        let (kind, option) = match self.goal {
            Goal::Sharpe { risk_free } => (SHARPE, risk_free),
            Goal::Sortino { target } => (SORTINO, target),
            Goal::Calmar => (CALMAR, 0.0),
            Goal::MaxDrawdown { additive } => (if additive { DRAWDOWN_ADDITIVE } else { DRAWDOWN }, 0.0),
            Goal::Cvar { alpha } => (CVAR, alpha),
            Goal::MeanVariance { risk_aversion } => (MEAN_VARIANCE, risk_aversion),
        };
        let split = |x: f64| (x as f32, (x - f64::from(x as f32)) as f32);
        let ((periods, periods_low), (floor, floor_low), (option, option_low)) = (split(self.periods_per_year), split(self.floor), split(option));
        ObjectiveParams {
            n: 0,
            first: 0,
            t: self.bars as u32,
            start: start as u32,
            kind,
            periods,
            periods_low,
            floor,
            floor_low,
            option,
            option_low,
            period: 0,
            sweep: 0,
        }
    }
}

/// Runs `record` on runs of rows that one launch takes: row ranges, and the params for rows counted from the first of all.
fn each_run(pass: &mut Pass, p: ObjectiveParams, rows: u64, groups: u64, record: impl Fn(&mut Pass, Range<u64>, ObjectiveParams) -> Result<()>) -> Result<()> {
    let device = pass.device().clone();
    let bars = u64::from(p.t);
    for run in device.plan(OP, rows, bars.max(STATE as u64), groups, 60 * bars)? {
        let of_run = ObjectiveParams { n: (run.end - run.start) as u32, first: run.start as u32, ..p };
        record(pass, run.start * bars..run.end * bars, of_run)?;
    }
    Ok(())
}

/// Adds the next bars of every row to `state` ([`Objective::state`] reals): returns [N,T], after `start` bars in earlier calls; with
/// `start` 0 the state begins anew. For cvar [`objective_tail`] has to follow.
/// # Errors
/// `Shape` for views of another length; `TooLarge` beyond 2²⁴ bars.
pub fn objective_moments<'a>(pass: &mut Pass, op: &Objective, series: impl Into<Series<'a>>, start: u64, state: &View) -> Result<()> {
    let series = series.into();
    record_rows(pass, op, series, (start, 0), &OBJECTIVE_MOMENTS, &[state])
}

/// For cvar over an epoch in batches: finds the threshold of each row's tail exactly, and what lies below it. The caller goes over the batches
/// [`Objective::sweeps`] times, in the same order with the same returns, and calls this for each with the number of the `sweep`, in sweep 0 after
/// [`objective_moments`]. `bins` are [`Objective::bins`] reals. Other objectives have one sweep, in which this records nothing.
/// # Errors
/// As [`objective_moments`].
pub fn objective_tail<'a>(pass: &mut Pass, op: &Objective, series: impl Into<Series<'a>>, start: u64, sweep: u32, state: &View, bins: &View) -> Result<()> {
    if !op.is_cvar() {
        return Ok(());
    }
    view_of("bins", bins, op.bins())?;
    let (series, sweeps) = (series.into(), op.sweeps(pass.device()));
    if sweep >= sweeps {
        let help = format!("there are {sweeps} sweeps, from 0");
        return Err(Error::Parameter { op: OP, name: "sweep".into(), value: sweep.to_string(), help });
    }
    record_rows(pass, op, series, (start, sweep), &OBJECTIVE_TAIL_SWEEP, &[state, bins])
}

/// Records a kernel of a workgroup per row, which writes the state and what comes behind it.
fn record_rows(pass: &mut Pass, op: &Objective, series: Series<'_>, (start, sweep): (u64, u32), kernel: &'static Kernel, to: &[&View]) -> Result<()> {
    op.check_bars(start)?;
    let (lengths, period) = series.check(op, pass.device())?;
    to.first().map_or(Ok(()), |state| view_of("state", state, op.state()))?;
    // Two strided loops and a run of its own for the moments; four and one, and four scans of 256 bins, for the tail.
    let runs = op.bars.div_ceil(u64::from(WG));
    let rounds = if op.is_cvar() { 5 * runs + 1200 } else { 3 * runs + runs.div_ceil(64) + 64 };
    pass.device().check_rounds(OP, rounds, "rounds")?;
    each_run(pass, ObjectiveParams { period, sweep, ..op.params(start) }, op.rows, 1, |pass, values, p| {
        let mut views = vec![pass.input(series.returns, values)?, lengths.clone()];
        views.extend(to.iter().map(|&view| view.clone()));
        pass.launch(kernel, &p, &views)
    })
}

/// Value [N] of what `state` has seen, and the coefficients ([`Objective::saved`] reals) of its gradient.
/// # Errors
/// `Shape` for views of another length.
pub fn objective_finish(pass: &mut Pass, op: &Objective, state: &View, value: &View, coefficients: &View) -> Result<()> {
    op.check()?;
    view_of("state", state, op.state())?;
    view_of("value", value, op.rows)?;
    view_of("coefficients", coefficients, op.saved())?;
    let p = ObjectiveParams { n: op.rows as u32, ..op.params(0) };
    pass.launch(&OBJECTIVE_FINISH, &p, &[state.clone(), value.clone(), coefficients.clone()])
}

/// grad_returns [N,T] of the bars after `start`, from the coefficients of all bars and grad_value [N]; overwrites it.
/// # Errors
/// `Shape` for views of another length.
pub fn objective_gradient<'a>(
    pass: &mut Pass,
    op: &Objective,
    series: impl Into<Series<'a>>,
    start: u64,
    coefficients: &View,
    grad_value: &View,
    grad_returns: &View,
) -> Result<()> {
    let series = series.into();
    op.check_bars(start)?;
    let (lengths, period) = series.check(op, pass.device())?;
    view_of("coefficients", coefficients, op.saved())?;
    view_of("grad_value", grad_value, op.rows)?;
    view_of("grad_returns", grad_returns, op.rows * op.bars)?;
    each_run(pass, ObjectiveParams { period, ..op.params(start) }, op.rows, op.bars.div_ceil(u64::from(WG)), |pass, values, p| {
        let x = pass.input(series.returns, values.clone())?;
        let out = pass.output(grad_returns, values)?;
        pass.launch(&OBJECTIVE_GRADIENT, &p, &[x, lengths.clone(), coefficients.clone(), grad_value.clone(), out.view.clone()])?;
        pass.finish(out)
    })
}

/// Value [N] of whole rows of returns [N,T]; `state` is temporary, `coefficients` are for [`objective_backward`].
/// # Errors
/// As [`objective_moments`].
pub fn objective<'a>(pass: &mut Pass, op: &Objective, series: impl Into<Series<'a>>, value: &View, coefficients: &View, state: &View) -> Result<()> {
    let series = series.into();
    objective_moments(pass, op, series, 0, state)?;
    if op.is_cvar() {
        record_rows(pass, op, series, (0, 0), &OBJECTIVE_TAIL, &[state])?;
    }
    objective_finish(pass, op, state, value, coefficients)
}

/// grad_returns [N,T] of whole rows.
/// # Errors
/// As [`objective_gradient`].
pub fn objective_backward<'a>(
    pass: &mut Pass,
    op: &Objective,
    series: impl Into<Series<'a>>,
    coefficients: &View,
    grad_value: &View,
    grad_returns: &View,
) -> Result<()> {
    objective_gradient(pass, op, series, 0, coefficients, grad_value, grad_returns)
}

/// Positions held over bars, with a one-way cost as a share of what is traded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NetReturns {
    /// N.
    pub rows: u64,
    /// T.
    pub bars: u64,
    /// 0.0005 is five basis points.
    pub cost: f64,
}

impl NetReturns {
    /// Refuses what has no meaning.
    /// # Errors
    /// `Parameter` for a cost that is negative or no number; `Shape` without bars; `TooLarge` for a row beyond what f32 counts.
    pub fn check(&self) -> Result<()> {
        self.params().map(|_| ())
    }

    fn params(&self) -> Result<ObjectiveParams> {
        if !(self.cost.is_finite() && self.cost >= 0.0) {
            let help = "give a finite share, at least 0".into();
            return Err(Error::Parameter { op: OP, name: "cost".into(), value: self.cost.to_string(), help });
        }
        let op = Objective { goal: Goal::Sharpe { risk_free: self.cost }, rows: self.rows, bars: self.bars, periods_per_year: 1.0, floor: 0.0 };
        op.check_bars(0)?;
        Ok(op.params(0))
    }

    /// Runs `record` on runs of rows, with the asset returns to bind. Those that rows share are bound whole, or, where no binding holds them,
    /// the rows are cut where the series begin again.
    fn each(
        &self,
        pass: &mut Pass,
        p: ObjectiveParams,
        asset_returns: &View,
        record: impl Fn(&mut Pass, View, Range<u64>, ObjectiveParams) -> Result<()>,
    ) -> Result<()> {
        let (series, groups) = (asset_returns.len() / self.bars, self.bars.div_ceil(u64::from(WG)));
        if asset_returns.elem() != Elem::F32
            || series * self.bars != asset_returns.len()
            || (self.rows > 0 && (series == 0 || !self.rows.is_multiple_of(series)))
        {
            let expected = format!("f32 [L,{}], L a divisor of the {} rows", self.bars, self.rows);
            let got = format!("{} of {}", asset_returns.len(), asset_returns.elem().wgsl());
            return Err(Error::Shape { op: OP, arg: "asset_returns".into(), expected, got });
        }
        let cut = 4 * asset_returns.len() > pass.device().limits().binding_bytes;
        if series < self.rows && !cut {
            let p = ObjectiveParams { period: series as u32, ..p };
            return each_run(pass, p, self.rows, groups, |pass, values, p| record(pass, asset_returns.clone(), values, p));
        }
        for copy in 0..self.rows / series.max(1) {
            let from = copy * asset_returns.len();
            each_run(pass, p, series, groups, |pass, values, p| {
                let y = pass.input(asset_returns, values.clone())?;
                record(pass, y, from + values.start..from + values.end, p)
            })?;
        }
        Ok(())
    }
}

/// returns [N,T] of `positions` [N,T] that earn `asset_returns` [L,T], N a multiple of L (row i those of series i mod L), after costs; entering
/// costs too, leaving at the end does not.
/// # Errors
/// `Shape` for views of another length; `Parameter` for a negative cost.
pub fn net_returns(pass: &mut Pass, op: &NetReturns, positions: &View, asset_returns: &View, returns: &View) -> Result<()> {
    let (p, len) = (op.params()?, op.rows * op.bars);
    view_of("positions", positions, len)?;
    view_of("returns", returns, len)?;
    op.each(pass, p, asset_returns, |pass, y, values, p| {
        let (x, out) = (pass.input(positions, values.clone())?, pass.output(returns, values)?);
        pass.launch(&NET_RETURNS, &p, &[x, y, out.view.clone()])?;
        pass.finish(out)
    })
}

/// grad_positions [N,T] from grad_returns [N,T].
/// # Errors
/// As [`net_returns`].
pub fn net_returns_backward(
    pass: &mut Pass,
    op: &NetReturns,
    positions: &View,
    asset_returns: &View,
    grad_returns: &View,
    grad_positions: &View,
) -> Result<()> {
    let (p, len) = (op.params()?, op.rows * op.bars);
    view_of("positions", positions, len)?;
    view_of("grad_returns", grad_returns, len)?;
    view_of("grad_positions", grad_positions, len)?;
    op.each(pass, p, asset_returns, |pass, y, values, p| {
        let (x, g) = (pass.input(positions, values.clone())?, pass.input(grad_returns, values.clone())?);
        let out = pass.output(grad_positions, values)?;
        pass.launch(&NET_RETURNS_BACKWARD, &p, &[x, y, g, out.view.clone()])?;
        pass.finish(out)
    })
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let &[n, t] = case.shape("returns")? else {
        return Err(Error::Shape { op: OP, arg: "returns".into(), expected: "[N,T]".into(), got: format!("{:?}", case.shape("returns")?) });
    };
    let option = |name: &str, usual: f64| case.number(name).unwrap_or(usual);
    let goal = match case.text("objective")? {
        "sharpe" => Goal::Sharpe { risk_free: option("risk_free", 0.0) },
        "sortino" => Goal::Sortino { target: option("target", 0.0) },
        "calmar" => Goal::Calmar,
        "cvar" => Goal::Cvar { alpha: option("alpha", 0.05) },
        "max_drawdown" => Goal::MaxDrawdown { additive: false },
        "mean_variance" => Goal::MeanVariance { risk_aversion: option("risk_aversion", 1.0) },
        other => {
            let known = ["sharpe", "sortino", "calmar", "cvar", "max_drawdown", "mean_variance"].map(String::from).to_vec();
            return Err(Error::Unknown { kind: "objective", given: other.into(), suggestion: None, known });
        }
    };
    let op = Objective { goal, rows: n as u64, bars: t as u64, periods_per_year: option("periods_per_year", 252.0), floor: option("floor", 0.0) };
    let returns = View::from(&device.upload("returns", case.f32("returns")?)?);
    let lengths = if case.has("lengths") { Some(View::from(&device.upload_u32("lengths", case.u32("lengths")?)?)) } else { None };
    let series = Series { returns: &returns, lengths: lengths.as_ref() };
    let zeros = |label: &str, len: u64| Ok::<View, Error>(View::from(&device.zeros(label, len)?));
    let (value, state, coefficients) = (zeros("value", op.rows)?, zeros("state", op.state())?, zeros("coefficients", op.saved())?);
    let mut pass = device.pass(OP);
    objective(&mut pass, &op, series, &value, &coefficients, &state)?;
    let value = pass.read(&value)?;
    let mut grad = None;
    if case.has("grad_y") {
        let (grad_value, grad_returns) = (View::from(&device.upload("grad_y", case.f32("grad_y")?)?), zeros("grad_returns", returns.len())?);
        objective_backward(&mut pass, &op, series, &coefficients, &grad_value, &grad_returns)?;
        grad = Some(pass.read(&grad_returns)?);
    }
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.reals("value", done.f64(value)?.into_iter().map(defined).collect());
    if let Some(grad) = grad {
        outputs.reals("grad_returns", done.f64(grad)?);
    }
    Ok(outputs)
}
