//! Black-Scholes price and greeks of calls, puts and cash-or-nothing digitals on a spot with a dividend yield.
//!
//! F = S·e^(−qT), X = K·e^(−rT), d1 = ln(F/X)/(σ√T) + ½σ√T, d2 = d1 − σ√T, η = 1 for calls and −1 for puts:
//! price    η·(F·Φ(ηd1) − X·Φ(ηd2));  digital e^(−rT)·Φ(ηd2), which pays 1
//! delta    ∂/∂S,  gamma ∂²/∂S²,  vega ∂/∂σ (for 1.00 of volatility),  theta −∂/∂T (per year),  rho ∂/∂r (for 1.00 of rate)
//! backward grad_terms = grad_price·(∂/∂S, ∂/∂K, ∂/∂T, ∂/∂σ, ∂/∂r, ∂/∂q)
//! Where σ√T = 0 price and greeks are their limits: the intrinsic value of the forward, Φ → 0, 1, or ½ at the strike. Gamma there is 0, and
//! vega at the strike F·√T·φ(0); a digital's delta at the strike, which has no limit, is 0.
//!
//! Shapes   terms, grad_terms [N,6]: spot, strike, maturity (years), volatility, rate, dividend (a year, continuous); kind [N] words:
//!          bit 0 call, bit 1 digital; all others [N].
//! Launch   a thread per option.     Scratch none.     Saved none.
//! Floor    52 bytes with all greeks, 32 for the price alone, 56 backward; about 90 instructions: bound by memory on a GPU.
//! Numerics ln(S/K) next to the strike from S − K, which is exact; Φ by e^(x²)·erfc(x), so that far prices keep their relative accuracy.
//! Source   Black & Scholes 1973, J. Political Economy 81(3); Merton 1973 for the yield.
//! Files    shaders/black_scholes.wgsl · cuda/black_scholes.cu · reference: the `_cpu` functions; f32: lanes below

use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::lanes;
use crate::real::Real;
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the kernels.
    pub struct BlackScholesParams {
        /// Options of this launch.
        rows: u32,
    }
}

const WG: u32 = 64;
const OP: &str = "black_scholes";
/// Reals of an option.
pub const TERMS: usize = 6;
/// σ√T from here down has no width.
const TINY: f64 = 1e-12;
/// 1/√(2π).
const DENSITY: f64 = 0.398_942_280_401_432_7;

fn rows(words: &[u32]) -> u64 {
    params_of::<BlackScholesParams>(words).map_or(0, |p| u64::from(p.rows))
}

/// Price and greeks.
pub static BLACK_SCHOLES: Kernel = Kernel {
    name: "black_scholes",
    about: "Black-Scholes price and greeks of calls, puts and digitals",
    args: &[reads("terms"), reads_u32("kind"), writes("price"), writes("delta"), writes("gamma"), writes("vega"), writes("theta"), writes("rho")],
    params: layout::<BlackScholesParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| rows(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("black_scholes"),
    cuda: cuda!("black_scholes"),
    cpu: Some(Cpu { f32: black_scholes_lanes, f64: black_scholes_cpu::<f64> }),
    cost: Cost { unit: "option", units: rows, bytes: 52.0, flops: 90.0 },
};

/// Price alone.
pub static BLACK_SCHOLES_PRICE: Kernel = Kernel {
    name: "black_scholes_price",
    about: "Black-Scholes price alone",
    args: &[reads("terms"), reads_u32("kind"), writes("price")],
    cpu: Some(Cpu { f32: price_lanes, f64: black_scholes_price_cpu::<f64> }),
    cost: Cost { unit: "option", units: rows, bytes: 32.0, flops: 70.0 },
    ..BLACK_SCHOLES
};

/// Gradients by the terms.
pub static BLACK_SCHOLES_BACKWARD: Kernel = Kernel {
    name: "black_scholes_backward",
    about: "gradient of the Black-Scholes price by each of its terms",
    args: &[reads("terms"), reads_u32("kind"), reads("grad_price"), writes("grad_terms")],
    cpu: Some(Cpu { f32: backward_lanes, f64: black_scholes_backward_cpu::<f64> }),
    cost: Cost { unit: "option", units: rows, bytes: 56.0, flops: 96.0 },
    ..BLACK_SCHOLES
};

// ---- the reference ------------------------------------------------------------------------------------------------------

/// Price, its derivatives by each of the terms, and the second by spot.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sensitivities<R> {
    /// Price.
    pub price: R,
    /// Delta.
    pub spot: R,
    /// ∂price/∂strike.
    pub strike: R,
    /// Minus theta.
    pub maturity: R,
    /// Vega.
    pub volatility: R,
    /// Rho.
    pub rate: R,
    /// ∂price/∂dividend.
    pub dividend: R,
    /// Gamma.
    pub gamma: R,
}

/// ln(a/b), also where a/b is next to 1.
pub(crate) fn log_ratio<R: Real>(a: R, b: R) -> R {
    let x = (a - b) / b;
    if x.abs() < R::of(0.5) { x.ln_1p() } else { (a / b).ln() }
}

/// Price and sensitivities of one option from its six terms and its kind.
pub fn sensitivities<R: Real>(terms: &[R; TERMS], kind: u32) -> Sensitivities<R> {
    let [s, k, t, sigma, r, q] = *terms;
    let (growth, discount) = ((-q * t).exp(), (-r * t).exp());
    let (forward, strike, root, half) = (s * growth, k * discount, t.sqrt(), R::of(0.5));
    let (sd, call, zero) = (sigma * root, kind & 1 == 1, R::ZERO);
    let side = if call { R::ONE } else { -R::ONE };
    if sd <= R::of(TINY) {
        let n = match forward.partial_cmp(&strike) {
            Some(std::cmp::Ordering::Equal) => half,
            _ if side * (forward - strike) > zero => R::ONE,
            _ => zero,
        };
        if kind > 1 {
            let price = discount * n;
            return Sensitivities { price, maturity: -r * price, rate: -t * price, ..Default::default() };
        }
        let volatility = if forward == strike { forward * root * R::of(DENSITY) } else { zero };
        return Sensitivities {
            price: (side * (forward - strike)).max(zero),
            spot: side * growth * n,
            strike: -side * discount * n,
            maturity: side * n * (r * strike - q * forward),
            volatility,
            rate: side * t * strike * n,
            dividend: -side * t * forward * n,
            gamma: zero,
        };
    }
    let d = (log_ratio(s, k) + (r - q) * t) / sd;
    let (d1, d2) = (d + half * sd, d - half * sd);
    let density = |x: R| (-half * x * x).exp() * R::of(DENSITY);
    let p2 = (side * d2).normal_cdf();
    if kind > 1 {
        let price = discount * p2;
        let a = side * discount * density(d2);
        let slope = a / sd;
        return Sensitivities {
            price,
            spot: slope / s,
            strike: -slope / k,
            maturity: a * ((r - q - half * sigma * sigma) / sd - half * d2 / t) - r * price,
            volatility: -a * d1 / sigma,
            rate: slope * t - t * price,
            dividend: -slope * t,
            gamma: -slope * d1 / (s * s * sd),
        };
    }
    let (p1, n1) = ((side * d1).normal_cdf(), density(d1));
    Sensitivities {
        price: (side * (forward * p1 - strike * p2)).max(zero),
        spot: side * growth * p1,
        strike: -side * discount * p2,
        maturity: half * forward * n1 * sigma / root + side * (r * strike * p2 - q * forward * p1),
        volatility: forward * n1 * root,
        rate: side * t * strike * p2,
        dividend: -side * t * forward * p1,
        gamma: growth * n1 / (s * sd),
    }
}

fn option<R: Real>(terms: &[R], row: usize) -> [R; TERMS] {
    std::array::from_fn(|i| terms[TERMS * row + i])
}

fn black_scholes_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BlackScholesParams = launch.params()?;
    let (terms, kind) = (launch.real()?, launch.word()?);
    let outs = [launch.real_mut()?, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?];
    let [price, delta, gamma, vega, theta, rho] = outs;
    for i in 0..p.rows as usize {
        let x = sensitivities(&option(terms, i), kind[i]);
        (price[i], delta[i], gamma[i], vega[i], theta[i], rho[i]) = (x.price, x.spot, x.gamma, x.volatility, -x.maturity, x.rate);
    }
    Ok(())
}

fn black_scholes_price_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BlackScholesParams = launch.params()?;
    let (terms, kind, price) = (launch.real()?, launch.word()?, launch.real_mut()?);
    for i in 0..p.rows as usize {
        price[i] = sensitivities(&option(terms, i), kind[i]).price;
    }
    Ok(())
}

fn black_scholes_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BlackScholesParams = launch.params()?;
    let (terms, kind, grad_price, grad_terms) = (launch.real()?, launch.word()?, launch.real()?, launch.real_mut()?);
    for i in 0..p.rows as usize {
        let x = sensitivities(&option(terms, i), kind[i]);
        let by_term = [x.spot, x.strike, x.maturity, x.volatility, x.rate, x.dividend];
        for (to, by) in grad_terms[TERMS * i..TERMS * (i + 1)].iter_mut().zip(by_term) {
            *to = grad_price[i] * by;
        }
    }
    Ok(())
}

// ---- the fast f32 column --------------------------------------------------------------------------------------------------

/// Options of a block: their terms and results lie in columns on the stack.
const BLOCK: usize = 64;
/// Options of a task.
const TASK: usize = 4096;
/// Columns of results: those of [`Sensitivities`], in its order.
const RESULTS: usize = 8;

/// Sensitivities of up to [`BLOCK`] options.
struct Block<'a> {
    terms: &'a [f32],
    kind: &'a [u32],
    results: &'a mut [[f32; BLOCK]; RESULTS],
}

/// ln(a/b): the exponent and a series in the mantissa, by (a − b)/(a + b) where a/b is next to 1.
#[inline(always)]
pub(crate) fn log_ratio_lanes<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
    const SERIES: [f32; 6] = [0.090_909_09, 0.111_111_11, 0.142_857_15, 0.2, 0.333_333_34, 1.0];
    // 2^23 + e has e in its low bits.
    const WHOLE: u32 = 0x4b00_0000;
    let one = simd.splat_f32s(1.0);
    let raw = simd.add_u32s(simd.transmute_u32s_f32s(simd.div_f32s(a, b)), simd.splat_u32s(0x4a_fb0d));
    let biased = simd.or_u32s(simd.wrapping_dyn_shr_u32s(raw, simd.splat_u32s(23)), simd.splat_u32s(WHOLE));
    let e = simd.sub_f32s(simd.transmute_f32s_u32s(biased), simd.splat_f32s(8_388_608.0 + 127.0));
    let m = simd.transmute_f32s_u32s(simd.add_u32s(simd.and_u32s(raw, simd.splat_u32s(0x7f_ffff)), simd.splat_u32s(0x3f35_04f3)));
    let near = simd.equal_f32s(e, simd.splat_f32s(0.0));
    let (top, bottom) =
        (simd.select_f32s(near, simd.sub_f32s(a, b), simd.sub_f32s(m, one)), simd.select_f32s(near, simd.add_f32s(a, b), simd.add_f32s(m, one)));
    let s = simd.div_f32s(top, bottom);
    let q = simd.mul_f32s(s, s);
    let mut p = simd.splat_f32s(0.076_923_08);
    for c in &SERIES {
        p = simd.mul_add_f32s(p, q, simd.splat_f32s(*c));
    }
    let p = simd.mul_f32s(simd.add_f32s(s, s), p);
    simd.mul_add_f32s(e, simd.splat_f32s(0.693_359_4), simd.mul_add_f32s(e, simd.splat_f32s(-2.121_944_4e-4), p))
}

/// The lanes of a column from an option on.
#[inline(always)]
fn load<S: Simd>(_: S, column: &[f32; BLOCK], at: usize) -> S::f32s {
    S::as_simd_f32s(&column[at..at + S::F32_LANES]).0[0]
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut columns = [[1f32; BLOCK]; TERMS];
        let mut sides = [1f32; BLOCK];
        let count = self.kind.len();
        for (i, (row, kind)) in self.terms.chunks_exact(TERMS).zip(self.kind).enumerate() {
            for (column, &x) in columns.iter_mut().zip(row) {
                column[i] = x;
            }
            sides[i] = if kind & 1 == 1 { 1.0 } else { -1.0 };
        }
        let (half, density, zero) = (simd.splat_f32s(0.5), simd.splat_f32s(DENSITY as f32), simd.splat_f32s(0.0));
        let lanes = S::F32_LANES;
        for at in (0..count).step_by(lanes) {
            let [s, k, t] = [load(simd, &columns[0], at), load(simd, &columns[1], at), load(simd, &columns[2], at)];
            let [sigma, r, q] = [load(simd, &columns[3], at), load(simd, &columns[4], at), load(simd, &columns[5], at)];
            let side = load(simd, &sides, at);
            let growth = lanes::exp(simd, simd.neg_f32s(simd.mul_f32s(q, t)));
            let discount = lanes::exp(simd, simd.neg_f32s(simd.mul_f32s(r, t)));
            let (forward, strike, root) = (simd.mul_f32s(s, growth), simd.mul_f32s(k, discount), simd.sqrt_f32s(t));
            let sd = simd.mul_f32s(sigma, root);
            let d = simd.div_f32s(simd.mul_add_f32s(simd.sub_f32s(r, q), t, log_ratio_lanes(simd, s, k)), sd);
            let (d1, d2) = (simd.mul_add_f32s(half, sd, d), simd.sub_f32s(d, simd.mul_f32s(half, sd)));
            let (p1, bell) = lanes::normal_cdf_and_bell(simd, simd.mul_f32s(side, d1));
            let (p2, _) = lanes::normal_cdf_and_bell(simd, simd.mul_f32s(side, d2));
            let n1 = simd.mul_f32s(bell, density);
            let (fp, kp) = (simd.mul_f32s(forward, p1), simd.mul_f32s(strike, p2));
            let by_rates = simd.mul_f32s(side, simd.sub_f32s(simd.mul_f32s(r, kp), simd.mul_f32s(q, fp)));
            let width = simd.div_f32s(simd.mul_f32s(simd.mul_f32s(half, forward), simd.mul_f32s(n1, sigma)), root);
            let (up, down) = (simd.mul_f32s(side, t), simd.neg_f32s(side));
            let results = [
                simd.max_f32s(simd.mul_f32s(side, simd.sub_f32s(fp, kp)), zero),
                simd.mul_f32s(side, simd.mul_f32s(growth, p1)),
                simd.mul_f32s(down, simd.mul_f32s(discount, p2)),
                simd.add_f32s(width, by_rates),
                simd.mul_f32s(simd.mul_f32s(forward, n1), root),
                simd.mul_f32s(up, kp),
                simd.neg_f32s(simd.mul_f32s(up, fp)),
                simd.div_f32s(simd.mul_f32s(growth, n1), simd.mul_f32s(s, sd)),
            ];
            for (column, x) in self.results.iter_mut().zip(results) {
                S::as_mut_simd_f32s(&mut column[at..at + lanes]).0[0] = x;
            }
        }
        // Digitals and options without width are few.
        for i in 0..count {
            let terms: [f32; TERMS] = std::array::from_fn(|c| columns[c][i]);
            if self.kind[i] > 1 || terms[3] * terms[2].sqrt() <= TINY as f32 {
                let x = sensitivities(&terms, self.kind[i]);
                for (column, x) in self.results.iter_mut().zip([x.price, x.spot, x.strike, x.maturity, x.volatility, x.rate, x.dividend, x.gamma]) {
                    column[i] = x;
                }
            }
        }
    }
}

/// Hands the results of each block of a task to `each`, with the block's first option.
fn blocks(terms: &[f32], kind: &[u32], mut each: impl FnMut(usize, usize, &[[f32; BLOCK]; RESULTS])) {
    let (arch, mut results) = (Arch::new(), [[0f32; BLOCK]; RESULTS]);
    for (b, (terms, kind)) in terms.chunks(TERMS * BLOCK).zip(kind.chunks(BLOCK)).enumerate() {
        arch.dispatch(Block { terms, kind, results: &mut results });
        each(b * BLOCK, kind.len(), &results);
    }
}

fn black_scholes_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let (terms, kind) = (launch.real()?, launch.word()?);
    let [price, delta, gamma] = [launch.real_mut()?, launch.real_mut()?, launch.real_mut()?];
    let [vega, theta, rho] = [launch.real_mut()?, launch.real_mut()?, launch.real_mut()?];
    let first = price.par_chunks_mut(TASK).zip(delta.par_chunks_mut(TASK)).zip(gamma.par_chunks_mut(TASK));
    let second = vega.par_chunks_mut(TASK).zip(theta.par_chunks_mut(TASK)).zip(rho.par_chunks_mut(TASK));
    let inputs = terms.par_chunks(TERMS * TASK).zip(kind.par_chunks(TASK));
    first.zip(second).zip(inputs).for_each(|((((price, delta), gamma), ((vega, theta), rho)), (terms, kind))| {
        blocks(terms, kind, |at, count, x| {
            for (to, of) in [(&mut *price, 0), (&mut *delta, 1), (&mut *gamma, 7), (&mut *vega, 4), (&mut *rho, 5)] {
                to[at..at + count].copy_from_slice(&x[of][..count]);
            }
            theta[at..at + count].iter_mut().zip(&x[3]).for_each(|(to, x)| *to = -x);
        });
    });
    Ok(())
}

fn price_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let (terms, kind, price) = (launch.real()?, launch.word()?, launch.real_mut()?);
    price.par_chunks_mut(TASK).zip(terms.par_chunks(TERMS * TASK)).zip(kind.par_chunks(TASK)).for_each(|((price, terms), kind)| {
        blocks(terms, kind, |at, count, x| price[at..at + count].copy_from_slice(&x[0][..count]));
    });
    Ok(())
}

fn backward_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let (terms, kind, grad, out) = (launch.real()?, launch.word()?, launch.real()?, launch.real_mut()?);
    let inputs = terms.par_chunks(TERMS * TASK).zip(kind.par_chunks(TASK)).zip(grad.par_chunks(TASK));
    out.par_chunks_mut(TERMS * TASK).zip(inputs).for_each(|(out, ((terms, kind), grad))| {
        blocks(terms, kind, |at, count, x| {
            for i in 0..count {
                for c in 0..TERMS {
                    out[TERMS * (at + i) + c] = grad[at + i] * x[1 + c][i];
                }
            }
        });
    });
    Ok(())
}

// ---- host data ------------------------------------------------------------------------------------------------------------

/// What an option pays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum OptionKind {
    /// max(K − S, 0).
    Put = 0,
    /// max(S − K, 0).
    Call = 1,
    /// 1 where S < K.
    DigitalPut = 2,
    /// 1 where S > K.
    DigitalCall = 3,
}

impl OptionKind {
    /// Its word in the kernels' `kind`.
    pub fn code(self) -> u32 {
        self as u32
    }
}

/// Names of the six terms, in their order.
pub const TERM_NAMES: [&str; TERMS] = ["spot", "strike", "maturity", "volatility", "rate", "dividend"];

/// Checks options [N,6] and gives them back: spot and strike positive, maturity and volatility not negative, all finite, |rate·maturity| and
/// |dividend·maturity| at most 80 (e^80 is near the largest f32).
/// # Errors
/// `Parameter` naming the term and the option's index, `Shape` if the lengths do not match.
pub fn checked_terms<'a>(op: &'static str, terms: &'a [f32], kind: &[u32]) -> Result<&'a [f32]> {
    if terms.len() != TERMS * kind.len() {
        let got = format!("{} reals for {} kinds", terms.len(), kind.len());
        return Err(Error::Shape { op, arg: "terms".into(), expected: "[N,6], one row per kind".into(), got });
    }
    for (row, (x, &kind)) in terms.chunks_exact(TERMS).zip(kind).enumerate() {
        for (c, &value) in x.iter().enumerate() {
            let least = match c {
                0 | 1 => f32::MIN_POSITIVE,
                2 | 3 => 0.0,
                _ => f32::MIN,
            };
            if !value.is_finite() || value < least {
                let help = match c {
                    0 | 1 => "must be a positive number",
                    2 | 3 => "must be 0 or a positive number",
                    _ => "must be a finite number",
                };
                return Err(Error::Parameter { op, name: format!("{}[{row}]", TERM_NAMES[c]), value: value.to_string(), help: help.into() });
            }
        }
        for c in [4, 5] {
            if (x[c] * x[2]).abs() > 80.0 {
                let help = "times the maturity it is beyond 80: e to that power is no f32; it is a fraction a year, not percent".into();
                return Err(Error::Parameter { op, name: format!("{}[{row}]", TERM_NAMES[c]), value: x[c].to_string(), help });
            }
        }
        if kind > 3 {
            let help = "must be 0 put, 1 call, 2 digital put or 3 digital call".into();
            return Err(Error::Parameter { op, name: format!("kind[{row}]"), value: kind.to_string(), help });
        }
    }
    Ok(terms)
}

/// Six columns [N], or [1] that all rows share, as rows [N,6].
/// # Errors
/// `Shape` naming the column whose length is neither.
pub fn rows_of(op: &'static str, names: &[&str; TERMS], columns: &[&[f32]; TERMS], n: usize) -> Result<Vec<f32>> {
    for (name, column) in names.iter().zip(columns) {
        if column.len() != n && column.len() != 1 {
            return Err(Error::Shape { op, arg: (*name).into(), expected: format!("[{n}] or [1]"), got: format!("[{}]", column.len()) });
        }
    }
    Ok((0..n).flat_map(|i| columns.iter().map(move |column| column[if column.len() == 1 { 0 } else { i }])).collect())
}

/// Price and greeks of N options on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Greeks {
    /// Prices [N], in the unit of the spot (digitals: of the unit paid).
    pub price: Vec<f64>,
    /// ∂price/∂spot [N].
    pub delta: Vec<f64>,
    /// ∂²price/∂spot² [N].
    pub gamma: Vec<f64>,
    /// ∂price/∂volatility [N], for 1.00 of volatility.
    pub vega: Vec<f64>,
    /// −∂price/∂maturity [N], per year.
    pub theta: Vec<f64>,
    /// ∂price/∂rate [N], for 1.00 of rate.
    pub rho: Vec<f64>,
}

/// Black-Scholes price and greeks of options [N,6] on a device, checked, uploaded and read back.
/// # Errors
/// `Parameter` naming term and index; `Shape`; those of the device.
pub fn option_greeks(device: &Device, terms: &[f32], kind: &[u32]) -> Result<Greeks> {
    let n = kind.len() as u64;
    let terms = View::from(&device.upload("terms", checked_terms(OP, terms, kind)?)?);
    let kind = View::from(&device.upload_u32("kind", kind)?);
    let mut pass = device.pass(OP);
    let out = BlackScholes::new(device, n)?;
    black_scholes(&mut pass, &terms, &kind, &out)?;
    let reads = out.columns().map(|(_, view)| pass.read(view)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut done = pass.submit()?;
    let mut next = reads.into_iter().map(|read| done.f64(read));
    let mut column = || next.next().unwrap_or_else(|| Err(Error::Internal("a column was not read".into())));
    Ok(Greeks { price: column()?, delta: column()?, gamma: column()?, vega: column()?, theta: column()?, rho: column()? })
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// Where price and greeks are written, [N] each.
#[derive(Debug, Clone)]
pub struct BlackScholes {
    /// Price.
    pub price: View,
    /// ∂/∂spot.
    pub delta: View,
    /// ∂²/∂spot².
    pub gamma: View,
    /// ∂/∂volatility.
    pub vega: View,
    /// −∂/∂maturity, per year.
    pub theta: View,
    /// ∂/∂rate.
    pub rho: View,
}

impl BlackScholes {
    /// New memory for n options.
    /// # Errors
    /// Those of the device.
    pub fn new(device: &Device, n: u64) -> Result<BlackScholes> {
        let column = |name: &str| -> Result<View> { Ok(View::from(&device.zeros(name, n)?)) };
        Ok(BlackScholes {
            price: column("price")?,
            delta: column("delta")?,
            gamma: column("gamma")?,
            vega: column("vega")?,
            theta: column("theta")?,
            rho: column("rho")?,
        })
    }

    /// The columns with their names.
    pub fn columns(&self) -> [(&'static str, &View); 6] {
        let BlackScholes { price, delta, gamma, vega, theta, rho } = self;
        [("price", price), ("delta", delta), ("gamma", gamma), ("vega", vega), ("theta", theta), ("rho", rho)]
    }
}

/// Options N of terms [N,6] and kind [N].
fn count(terms: &View, kind: &View) -> Result<u64> {
    let n = kind.len();
    if terms.len() != TERMS as u64 * n || kind.elem() != Elem::U32 || n > u64::from(u32::MAX) {
        let got = format!("{} reals, {} {}", terms.len(), n, kind.elem().wgsl());
        return Err(Error::Shape { op: OP, arg: "terms, kind".into(), expected: "[N,6] reals and [N] words, N below 2^32".into(), got });
    }
    Ok(n)
}

fn expect(arg: &str, view: &View, len: u64) -> Result<()> {
    if view.len() == len {
        return Ok(());
    }
    Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{len} values"), got: format!("{}", view.len()) })
}

fn of_terms(run: &Range<u64>) -> Range<u64> {
    TERMS as u64 * run.start..TERMS as u64 * run.end
}

fn params(run: &Range<u64>) -> BlackScholesParams {
    BlackScholesParams { rows: (run.end - run.start) as u32 }
}

/// Records price and greeks of options terms [N,6], kind [N]. Terms are not looked at: [`checked_terms`] does that on the host.
/// # Errors
/// `Shape`, `TooLarge`.
pub fn black_scholes(pass: &mut Pass, terms: &View, kind: &View, out: &BlackScholes) -> Result<()> {
    let n = count(terms, kind)?;
    for (name, view) in out.columns() {
        expect(name, view, n)?;
    }
    for run in pass.device().clone().plan(OP, n, TERMS as u64, 1, 90)? {
        let mut args = vec![pass.input(terms, of_terms(&run))?, pass.input(kind, run.clone())?];
        let mut outputs = Vec::with_capacity(6);
        for (_, view) in out.columns() {
            let output = pass.output(view, run.clone())?;
            args.push(output.view.clone());
            outputs.push(output);
        }
        pass.launch(&BLACK_SCHOLES, &params(&run), &args)?;
        for output in outputs {
            pass.finish(output)?;
        }
    }
    Ok(())
}

/// Records price [N] alone.
/// # Errors
/// `Shape`, `TooLarge`.
pub fn black_scholes_price(pass: &mut Pass, terms: &View, kind: &View, price: &View) -> Result<()> {
    let n = count(terms, kind)?;
    expect("price", price, n)?;
    for run in pass.device().clone().plan(OP, n, TERMS as u64, 1, 70)? {
        let (x, k) = (pass.input(terms, of_terms(&run))?, pass.input(kind, run.clone())?);
        let out = pass.output(price, run.clone())?;
        pass.launch(&BLACK_SCHOLES_PRICE, &params(&run), &[x, k, out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(())
}

/// Records grad_terms [N,6] from grad_price [N].
/// # Errors
/// `Shape`, `TooLarge`.
pub fn black_scholes_backward(pass: &mut Pass, terms: &View, kind: &View, grad_price: &View, grad_terms: &View) -> Result<()> {
    let n = count(terms, kind)?;
    expect("grad_price", grad_price, n)?;
    expect("grad_terms", grad_terms, TERMS as u64 * n)?;
    for run in pass.device().clone().plan(OP, n, TERMS as u64, 1, 96)? {
        let (x, k, g) = (pass.input(terms, of_terms(&run))?, pass.input(kind, run.clone())?, pass.input(grad_price, run.clone())?);
        let out = pass.output(grad_terms, of_terms(&run))?;
        pass.launch(&BLACK_SCHOLES_BACKWARD, &params(&run), &[x, k, g, out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(())
}

/// Conformance binding: columns in, columns out; `is_digital` words are optional.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let mut kind: Vec<u32> = case.u32("is_call")?.iter().map(|&call| u32::from(call != 0)).collect();
    if case.has("is_digital") {
        kind.iter_mut().zip(case.u32("is_digital")?).for_each(|(kind, &digital)| *kind |= u32::from(digital != 0) << 1);
    }
    let columns = [case.f32("spot")?, case.f32("strike")?, case.f32("maturity")?, case.f32("volatility")?, case.f32("rate")?, case.f32("dividend")?];
    let rows = rows_of(OP, &TERM_NAMES, &columns, kind.len())?;
    let terms = View::from(&device.upload("terms", checked_terms(OP, &rows, &kind)?)?);
    let kind = View::from(&device.upload_u32("kind", &kind)?);
    let out = BlackScholes::new(device, kind.len())?;
    let mut pass = device.pass(OP);
    black_scholes(&mut pass, &terms, &kind, &out)?;
    let mut reads = Vec::new();
    for (name, view) in out.columns() {
        reads.push((name, pass.read(view)?));
    }
    let mut results = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        results.reals(name, done.f64(read)?);
    }
    Ok(results)
}
