//! Implied volatility: the σ at which the Black-Scholes price of a call or a put is the quoted one, with a status per quote.
//!
//! A quote is reduced to its out-of-the-money side: x = |ln F/X|, β = (price − intrinsic)/√(FX), F and X the discounted spot and strike; s = σ√T solves
//! b(s) = e^(−x/2)·Φ(−h + t) − e^(x/2)·Φ(−h − t) = β,  h = x/s, t = s/2.  b bends at s_c = √(2x); from there a fixed number of Newton steps on what is
//! nearly a line converges from one side, whatever the quote:
//! β < b(s_c)              ln b    in 1/s²
//! else, β ≤ ½·e^(−x/2)    b       in s
//! else                    ln(e^(−x/2) − b)  in s²
//! φ(√(h² + t²)) divides out of all of them, so that prices down to the smallest f32 keep their digits.
//!
//! Shapes   quotes [N,6]: spot, strike, maturity, price, rate, dividend; kind [N] words (bit 0: call); volatility [N]; status [N] words.
//! Status   0 ok; 1 price below the intrinsic value (or below 0); 2 price not below its upper bound, F of a call, X of a put; 3 maturity ≤ 0; 4 a number
//!          that is not finite, or spot or strike ≤ 0; 5 price at the intrinsic value: no time value is left to solve for. Volatility is 0 but for status 0.
//! Launch   a thread per quote.     Scratch none.
//! Floor    36 bytes; 8 rounds of about 60 instructions.
//! Numerics an in-the-money quote has the rounding of its intrinsic value: σ is as exact as the time value that is left, an ulp of spot over vega.
//! Source   the three regions: Jäckel 2015, "Let's be rational", Wilmott (75).
//! Files    shaders/implied_volatility.wgsl · cuda/implied_volatility.cu · reference: `implied_volatility_cpu`, in f64 on both CPU devices

use crate::black_scholes::{TERMS, log_ratio, rows_of};
use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of [`IMPLIED_VOLATILITY`].
    pub struct ImpliedVolatilityParams {
        /// Quotes of this launch.
        rows: u32,
    }
}

const WG: u32 = 64;
const OP: &str = "implied_volatility";

fn rows(words: &[u32]) -> u64 {
    params_of::<ImpliedVolatilityParams>(words).map_or(0, |p| u64::from(p.rows))
}

/// Volatility and status of quotes.
pub static IMPLIED_VOLATILITY: Kernel = Kernel {
    name: "implied_volatility",
    about: "volatility at which the Black-Scholes price is the quoted one",
    args: &[reads("quotes"), reads_u32("kind"), writes("volatility"), writes_u32("status")],
    params: layout::<ImpliedVolatilityParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| rows(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("implied_volatility"),
    cuda: cuda!("implied_volatility"),
    cpu: Some(Cpu { f32: implied_volatility_cpu::<f32>, f64: implied_volatility_cpu::<f64> }),
    cost: Cost { unit: "quote", units: rows, bytes: 36.0, flops: 600.0 },
};

/// What came of a quote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum VolatilityStatus {
    /// Solved.
    Ok = 0,
    /// Price below the intrinsic value of the forward, or below 0.
    BelowIntrinsic = 1,
    /// Price at or above the discounted spot (call) or strike (put).
    AboveBound = 2,
    /// Maturity is 0 or negative.
    Expired = 3,
    /// A number is not finite, or spot or strike is not positive.
    NotFinite = 4,
    /// Price at the intrinsic value, to an ulp of spot and strike: no time value to solve for.
    AtIntrinsic = 5,
}

impl VolatilityStatus {
    /// The status of a word of the kernel.
    pub fn of(word: u32) -> VolatilityStatus {
        [Self::Ok, Self::BelowIntrinsic, Self::AboveBound, Self::Expired, Self::NotFinite, Self::AtIntrinsic]
            .into_iter()
            .find(|s| *s as u32 == word)
            .unwrap_or(Self::NotFinite)
    }

    /// A line for a user.
    pub fn text(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::BelowIntrinsic => "below its intrinsic value",
            Self::AboveBound => "above its upper bound",
            Self::Expired => "expired",
            Self::NotFinite => "not finite",
            Self::AtIntrinsic => "without time value",
        }
    }
}

// ---- the reference ------------------------------------------------------------------------------------------------------

/// σ√T of an out-of-the-money option: x = |ln F/X|, its price and the room above it over √(FX).
fn total_volatility(x: f64, beta: f64, missing: f64) -> f64 {
    const ROUNDS: usize = 10;
    let (low, high) = ((-0.5 * x).exp(), (0.5 * x).exp());
    let centre = (2.0 * x).sqrt();
    let density = |h: f64, t: f64| (-0.5 * (h * h + t * t)).exp() * std::f64::consts::FRAC_1_SQRT_2 * std::f64::consts::FRAC_2_SQRT_PI * 0.5;
    let price = |h: f64, t: f64| low * (t - h).normal_cdf() - high * (-t - h).normal_cdf();
    let room = |h: f64, t: f64| low * (h - t).normal_cdf() + high * (-t - h).normal_cdf();
    let in_wing = x > 0.0 && beta < price(x / centre, 0.5 * centre);
    let mut s = if in_wing || beta <= missing { centre.max(1e-9) } else { centre.max(1.0) };
    for _ in 0..ROUNDS {
        let (h, t) = (x / s, 0.5 * s);
        s = if in_wing {
            let b = price(h, t).max(f64::MIN_POSITIVE);
            (1.0 / (s * s) + (b / beta).ln() * b / (0.5 * density(h, t) * s * s * s)).max(1e-12).sqrt().recip()
        } else if beta <= missing {
            (s - (price(h, t) - beta) / density(h, t)).clamp(1e-12, 100.0)
        } else {
            let q = room(h, t);
            (s * s + (q / missing).ln() * q * s / (0.5 * density(h, t))).max(1e-12).sqrt()
        };
    }
    s
}

/// Volatility and status of one quote: spot, strike, maturity, price, rate, dividend.
pub fn implied(quote: &[f64; TERMS], call: bool) -> (f64, VolatilityStatus) {
    let [s, k, t, price, r, q] = *quote;
    let least = f64::from(f32::MIN_POSITIVE);
    if quote.iter().any(|x| !x.is_finite()) || s < least || k < least {
        return (0.0, VolatilityStatus::NotFinite);
    }
    if t <= 0.0 {
        return (0.0, VolatilityStatus::Expired);
    }
    let (growth, discount) = ((-q * t).exp_m1(), (-r * t).exp_m1());
    let (forward, strike) = (s + s * growth, k + k * discount);
    let over = if call { 1.0 } else { -1.0 } * ((s - k) + (s * growth - k * discount));
    let (value, missing) = (price - over.max(0.0), if call { forward } else { strike } - price);
    let epsilon = f64::from(f32::EPSILON);
    let slack = epsilon * s.max(k);
    if price < 0.0 || value < -slack {
        return (0.0, VolatilityStatus::BelowIntrinsic);
    }
    if missing < epsilon * price {
        return (0.0, VolatilityStatus::AboveBound);
    }
    if value < least || over > 0.0 && value <= slack {
        return (0.0, VolatilityStatus::AtIntrinsic);
    }
    let scale = forward.sqrt() * strike.sqrt();
    let x = (log_ratio(s, k) + (r - q) * t).abs();
    (total_volatility(x, value / scale, missing / scale) / t.sqrt(), VolatilityStatus::Ok)
}

fn implied_volatility_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    const TASK: usize = 256;
    let (quotes, kind) = (launch.real()?, launch.word()?);
    let (volatility, status) = (launch.real_mut()?, launch.word_mut()?);
    let inputs = quotes.par_chunks(TERMS * TASK).zip(kind.par_chunks(TASK));
    volatility.par_chunks_mut(TASK).zip(status.par_chunks_mut(TASK)).zip(inputs).for_each(|((volatility, status), (quotes, kind))| {
        for i in 0..kind.len() {
            let quote: [f64; TERMS] = std::array::from_fn(|c| quotes[TERMS * i + c].f64());
            let (sigma, found) = implied(&quote, kind[i] & 1 == 1);
            (volatility[i], status[i]) = (R::of(sigma), found as u32);
        }
    });
    Ok(())
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// Records volatility [N] and status [N] of quotes [N,6], kind [N]. A word of kind that is no call is taken for a put.
/// # Errors
/// `Shape`, `TooLarge`.
pub fn implied_volatility(pass: &mut Pass, quotes: &View, kind: &View, volatility: &View, status: &View) -> Result<()> {
    let n = kind.len();
    let lengths = [quotes.len() / TERMS as u64, volatility.len(), status.len()];
    if lengths != [n; 3] || quotes.len() != TERMS as u64 * n || kind.elem() != Elem::U32 || n > u64::from(u32::MAX) {
        let got = format!("{} reals, {n} kinds, {} volatilities, {} statuses", quotes.len(), volatility.len(), status.len());
        return Err(Error::Shape { op: OP, arg: "quotes, kind".into(), expected: "[N,6] reals, [N] words, N below 2^32".into(), got });
    }
    for run in pass.device().clone().plan(OP, n, TERMS as u64, 1, 600)? {
        let six = TERMS as u64 * run.start..TERMS as u64 * run.end;
        let (x, k) = (pass.input(quotes, six)?, pass.input(kind, run.clone())?);
        let (v, s) = (pass.output(volatility, run.clone())?, pass.output(status, run.clone())?);
        let params = ImpliedVolatilityParams { rows: (run.end - run.start) as u32 };
        pass.launch(&IMPLIED_VOLATILITY, &params, &[x, k, v.view.clone(), s.view.clone()])?;
        pass.finish(v)?;
        pass.finish(s)?;
    }
    Ok(())
}

/// Volatilities and statuses of quotes [N,6] on a device, uploaded and read back. Nothing in a quote is an error: its status says what is wrong.
/// # Errors
/// `Shape`; `Parameter` for a kind that is neither put (0) nor call (1); those of the device.
pub fn implied_volatilities(device: &Device, quotes: &[f32], kind: &[u32]) -> Result<(Vec<f64>, Vec<VolatilityStatus>)> {
    if let Some(row) = kind.iter().position(|&kind| kind > 1) {
        let help = "must be 0 put or 1 call: a digital's price may belong to two volatilities".into();
        return Err(Error::Parameter { op: OP, name: format!("kind[{row}]"), value: kind[row].to_string(), help });
    }
    let n = kind.len() as u64;
    let (quotes, kind) = (View::from(&device.upload("quotes", quotes)?), View::from(&device.upload_u32("kind", kind)?));
    let (volatility, status) = (View::from(&device.zeros("volatility", n)?), View::from(&device.zeros_u32("status", n)?));
    let mut pass = device.pass(OP);
    implied_volatility(&mut pass, &quotes, &kind, &volatility, &status)?;
    let (volatility, status) = (pass.read(&volatility)?, pass.read(&status)?);
    let mut done = pass.submit()?;
    Ok((done.f64(volatility)?, done.u32(status)?.into_iter().map(VolatilityStatus::of).collect()))
}

/// Names of the six numbers of a quote, in their order.
pub const QUOTE_NAMES: [&str; TERMS] = ["spot", "strike", "maturity", "price", "rate", "dividend"];

/// Conformance binding: columns in, `volatility` out, and `status`, which a file may ask for.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let price = case.f32("price")?;
    let kind: Vec<u32> = if case.has("is_call") { case.u32("is_call")?.iter().map(|&call| u32::from(call != 0)).collect() } else { vec![1; price.len()] };
    let columns = [case.f32("spot")?, case.f32("strike")?, case.f32("maturity")?, price, case.f32("rate")?, case.f32("dividend")?];
    let rows = rows_of(OP, &QUOTE_NAMES, &columns, kind.len())?;
    let n = kind.len() as u64;
    let (quotes, kind) = (View::from(&device.upload("quotes", &rows)?), View::from(&device.upload_u32("kind", &kind)?));
    let (volatility, status) = (View::from(&device.zeros("volatility", n)?), View::from(&device.zeros_u32("status", n)?));
    let mut pass = device.pass(OP);
    implied_volatility(&mut pass, &quotes, &kind, &volatility, &status)?;
    let (v, s) = (pass.read(&volatility)?, pass.read(&status)?);
    let mut results = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    results.reals("volatility", done.f64(v)?);
    results.words("status", done.u32(s)?);
    Ok(results)
}
