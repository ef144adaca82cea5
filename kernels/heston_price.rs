//! Prices of calls and puts under Heston's stochastic volatility, with jumps (Bates), and under Merton's jump diffusion.
//!
//! dS/S = (r − q)dt + √v dW,  dv = κ(θ − v)dt + σ√v dB,  dW·dB = ρdt; jumps: λ a year, their logarithm normal with mean μ_J and deviation σ_J, compensated.
//! With k = ln F/X and φ(u) = E e^((½ + iu)·ln S_T/F) (Lewis' line), against a normal law of the same variance w, whose price is Black-Scholes':
//!   price = BS(w) + √(FX)/π · ∫_0^∞ Re[e^(iuk)·(e^(−½w(u² + ¼)) − φ(u))] / (u² + ¼) du
//! ln φ in the form that keeps to one branch, without the differences that cancel: β = κ − ρσ(½ + iu), d = √(β² + σ²p), p = u² + ¼, ψ = p/(β + d),
//!   g = −σ²ψ/(β + d),  y = ψ/(β + d)·(1 − e^(−dT))/(1 − g),  ln φ = κθ·(−2/σ²·ln(1 − σ²y) … ) = κθ·(2·L − ψT) − v·ψ·(1 − e^(−dT))/(1 − g·e^(−dT)),  L = −ln(1 − σ²y)/σ²
//! so that σ → 0 is the plain Black-Scholes price. The integral ends where 32 probes, each 1.35 times further, say that the integrand has died away, and is
//! summed in panels of 32 Gauss-Legendre nodes, no wider than 6 widths 1/√w and some 6 waves of e^(iuk).
//! Merton: Σ_n Poisson(n; λT)·BS(F·e^(−λT·m + n(μ_J + ½σ_J²)), w = σ²T + nσ_J²), m = e^(μ_J + ½σ_J²) − 1.
//!
//! Shapes   terms [N,5]: spot, strike, maturity (years), rate, dividend; kind [N] words (bit 0: call); model [M,8]: v0, κ, θ, σ, ρ, λ, μ_J, σ_J, or for
//!          Merton [M,4]: volatility, λ, μ_J, σ_J; model_of [N] words: the row of model; price [N].
//! Launch   heston_price: a warp per option, a lane per node; merton_price: a thread per option.     Scratch none.
//! Floor    28 bytes; about 250 instructions per node, 100 to 800 nodes; Merton 90 per term, about λT + 8√λT + 16 terms.
//! Numerics f32 within about 2e-6 of spot. At most 512 panels: |ρ| = 1 beside large σ√T, and strikes hundreds of deviations away, lose digits.
//! Source   Heston 1993, Rev. Financial Studies 6; Lewis 2000; Albrecher, Mayer, Schoutens, Tistaert 2007 for the branch; Bates 1996; Merton 1976.
//! Files    shaders/heston_price.wgsl · cuda/heston_price.cu · reference: the `_cpu` functions, in f64 on both CPU devices

use crate::black_scholes::log_ratio;
use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::{Add, Div, Mul, Sub};

params! {
    /// Params of the kernels.
    pub struct HestonParams {
        /// Options of this launch.
        rows: u32,
    }
}

const WG: u32 = 32;
const OP: &str = "heston_price";
/// Reals of an option.
pub const PLAIN_TERMS: usize = 5;
/// Their names.
pub const PLAIN_NAMES: [&str; PLAIN_TERMS] = ["spot", "strike", "maturity", "rate", "dividend"];
/// Reals of a Heston model.
pub const HESTON_FIELDS: usize = 8;
/// Reals of a Merton model.
pub const MERTON_FIELDS: usize = 4;
/// Nodes of a panel.
const NODES: usize = 32;
const PANELS: f64 = 512.0;
/// Terms of Merton's series at most.
const SERIES: f64 = 512.0;
/// From here down there is no variance.
const NO_VARIANCE: f64 = 1e-24;

fn rows(words: &[u32]) -> u64 {
    params_of::<HestonParams>(words).map_or(0, |p| u64::from(p.rows))
}

/// Heston and Bates prices.
pub static HESTON_PRICE: Kernel = Kernel {
    name: "heston_price",
    about: "calls and puts under Heston's and Bates' models",
    args: &[reads("terms"), reads_u32("kind"), reads("model"), reads_u32("model_of"), reads("nodes"), writes("price")],
    params: layout::<HestonParams>(),
    workgroup: WG,
    constants: &[],
    groups: rows,
    wgsl: wgsl!("heston_price"),
    cuda: cuda!("heston_price"),
    cpu: Some(Cpu { f32: heston_price_cpu::<f32>, f64: heston_price_cpu::<f64> }),
    cost: Cost { unit: "option", units: rows, bytes: 28.0, flops: 75_000.0 },
};

/// Merton prices.
pub static MERTON_PRICE: Kernel = Kernel {
    name: "merton_price",
    about: "calls and puts under Merton's jump diffusion",
    args: &[reads("terms"), reads_u32("kind"), reads("model"), reads_u32("model_of"), writes("price")],
    groups: |words| rows(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: merton_price_cpu::<f32>, f64: merton_price_cpu::<f64> }),
    cost: Cost { unit: "option", units: rows, bytes: 28.0, flops: 1800.0 },
    ..HESTON_PRICE
};

// ---- models -------------------------------------------------------------------------------------------------------------

/// Heston's model, with Bates' jumps where `intensity` is positive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heston {
    /// v0: variance now, a year.
    pub variance: f64,
    /// κ: speed of the variance's return to its mean, a year; above 0.
    pub reversion: f64,
    /// θ: mean of the variance.
    pub mean: f64,
    /// σ: volatility of the variance.
    pub vol_of_vol: f64,
    /// ρ: correlation of spot and variance.
    pub correlation: f64,
    /// λ: jumps a year.
    pub intensity: f64,
    /// μ_J: mean of the log jump.
    pub jump_mean: f64,
    /// σ_J: its deviation.
    pub jump_sd: f64,
}

impl Heston {
    /// The model without jumps.
    pub fn new(variance: f64, reversion: f64, mean: f64, vol_of_vol: f64, correlation: f64) -> Heston {
        Heston { variance, reversion, mean, vol_of_vol, correlation, intensity: 0.0, jump_mean: 0.0, jump_sd: 0.0 }
    }

    /// Whether the variance stays above 0: 2κθ ≥ σ². Prices do not need it.
    pub fn is_feller(&self) -> bool {
        2.0 * self.reversion * self.mean >= self.vol_of_vol * self.vol_of_vol
    }

    /// The row of the kernels.
    pub fn row(&self) -> [f32; HESTON_FIELDS] {
        let Heston { variance, reversion, mean, vol_of_vol, correlation, intensity, jump_mean, jump_sd } = *self;
        [variance, reversion, mean, vol_of_vol, correlation, intensity, jump_mean, jump_sd].map(|x| x as f32)
    }

    /// # Errors
    /// `Parameter` naming the field, with what is legal.
    pub fn check(&self) -> Result<()> {
        let ranges = [
            ("variance", self.variance, 0.0, f64::MAX, "must be 0 or more"),
            ("reversion", self.reversion, 1e-6, 1e6, "must be between 1e-6 and 1e6 a year"),
            ("mean", self.mean, 0.0, f64::MAX, "must be 0 or more"),
            ("vol_of_vol", self.vol_of_vol, 0.0, 1e4, "must be between 0 and 10,000"),
            ("correlation", self.correlation, -1.0, 1.0, "must be between -1 and 1"),
        ];
        in_ranges(&ranges)?;
        check_jumps(self.intensity, self.jump_mean, self.jump_sd)
    }
}

/// Merton's jump diffusion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merton {
    /// Volatility between jumps, a year.
    pub volatility: f64,
    /// λ: jumps a year.
    pub intensity: f64,
    /// μ_J: mean of the log jump.
    pub jump_mean: f64,
    /// σ_J: its deviation.
    pub jump_sd: f64,
}

impl Merton {
    /// The row of the kernel.
    pub fn row(&self) -> [f32; MERTON_FIELDS] {
        [self.volatility, self.intensity, self.jump_mean, self.jump_sd].map(|x| x as f32)
    }

    /// # Errors
    /// `Parameter` naming the field, with what is legal.
    pub fn check(&self) -> Result<()> {
        in_ranges(&[("volatility", self.volatility, 0.0, f64::MAX, "must be 0 or more")])?;
        check_jumps(self.intensity, self.jump_mean, self.jump_sd)
    }
}

fn in_ranges(ranges: &[(&str, f64, f64, f64, &str)]) -> Result<()> {
    for &(name, value, low, high, help) in ranges {
        if !(value >= low && value <= high) {
            return Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
        }
    }
    Ok(())
}

fn check_jumps(intensity: f64, mean: f64, sd: f64) -> Result<()> {
    in_ranges(&[
        ("intensity", intensity, 0.0, 1e4, "must be between 0 and 10,000 jumps a year"),
        ("jump_mean", mean, -10.0, 4.0, "must be between -10 and 4: it is of the log jump"),
        ("jump_sd", sd, 0.0, 4.0, "must be between 0 and 4: it is of the log jump"),
    ])
}

/// Checks options [N,5]: spot and strike positive, maturity not negative, all finite.
/// # Errors
/// `Parameter` naming the term and the option's index, `Shape` if the lengths do not match.
pub fn checked_plain_terms<'a>(op: &'static str, terms: &'a [f32], kind: &[u32]) -> Result<&'a [f32]> {
    if terms.len() != PLAIN_TERMS * kind.len() {
        let got = format!("{} reals for {} kinds", terms.len(), kind.len());
        return Err(Error::Shape { op, arg: "terms".into(), expected: "[N,5], one row per kind".into(), got });
    }
    for (row, (x, &kind)) in terms.chunks_exact(PLAIN_TERMS).zip(kind).enumerate() {
        let six = [x[0], x[1], x[2], 0.0, x[3], x[4]];
        if let Err(error) = crate::black_scholes::checked_terms(op, &six, &[kind]) {
            return Err(match error {
                Error::Parameter { op, name, value, help } => Error::Parameter { op, name: name.replace("[0]", &format!("[{row}]")), value, help },
                other => other,
            });
        }
        if kind > 1 {
            let help = "must be 0 put or 1 call".into();
            return Err(Error::Parameter { op, name: format!("kind[{row}]"), value: kind.to_string(), help });
        }
    }
    Ok(terms)
}

// ---- the reference ------------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, Copy)]
struct Complex {
    x: f64,
    y: f64,
}

const UNIT: Complex = Complex { x: 1.0, y: 0.0 };

impl Add for Complex {
    type Output = Complex;
    fn add(self, b: Complex) -> Complex {
        Complex { x: self.x + b.x, y: self.y + b.y }
    }
}

impl Sub for Complex {
    type Output = Complex;
    fn sub(self, b: Complex) -> Complex {
        Complex { x: self.x - b.x, y: self.y - b.y }
    }
}

impl Mul for Complex {
    type Output = Complex;
    fn mul(self, b: Complex) -> Complex {
        Complex { x: self.x * b.x - self.y * b.y, y: self.x * b.y + self.y * b.x }
    }
}

impl Mul<Complex> for f64 {
    type Output = Complex;
    fn mul(self, b: Complex) -> Complex {
        Complex { x: self * b.x, y: self * b.y }
    }
}

impl Div for Complex {
    type Output = Complex;
    fn div(self, b: Complex) -> Complex {
        let scale = 1.0 / b.size2();
        Complex { x: (self.x * b.x + self.y * b.y) * scale, y: (self.y * b.x - self.x * b.y) * scale }
    }
}

impl Complex {
    fn size2(self) -> f64 {
        self.x * self.x + self.y * self.y
    }

    /// The root with a real part ≥ 0.
    fn sqrt(self) -> Complex {
        let m = (0.5 * (self.size2().sqrt() + self.x.abs())).sqrt();
        let other = 0.5 * self.y / m.max(1e-150);
        if self.x >= 0.0 { Complex { x: m, y: other } } else { Complex { x: other.abs(), y: m.copysign(self.y) } }
    }

    fn exp(self) -> Complex {
        let (size, (sin, cos)) = (self.x.exp(), self.y.sin_cos());
        Complex { x: size * cos, y: size * sin }
    }
}

/// −ln(1 − sy)/s for s ≥ 0: a series where that is y and little more.
fn log_over(y: Complex, s: f64) -> Complex {
    let w = s * y;
    if w.size2() < 0.0025 {
        let series = (2..=12).rev().fold(Complex { x: 1.0 / 13.0, y: 0.0 }, |p, n| Complex { x: 1.0 / f64::from(n), y: 0.0 } + p * w);
        return y * (UNIT + series * w);
    }
    (-1.0 / s) * Complex { x: 0.5 * (w.size2() - 2.0 * w.x).ln_1p(), y: (-w.y).atan2(1.0 - w.x) }
}

/// ln E e^((½ + iu)·ln S_T/F) under a model's row.
fn exponent(u: f64, t: f64, model: &[f64; HESTON_FIELDS]) -> Complex {
    let [variance, kappa, theta, sigma, rho, intensity, mean, sd] = *model;
    let p = u * u + 0.25;
    let beta = Complex { x: kappa - 0.5 * rho * sigma, y: -rho * sigma * u };
    let d = (beta * beta + Complex { x: sigma * sigma * p, y: 0.0 }).sqrt();
    let sum = beta + d;
    let psi = Complex { x: p, y: 0.0 } / sum;
    let (slope, e) = (psi / sum, (-t * d).exp());
    let g = -sigma * sigma * slope;
    let y = slope * (UNIT - e) / (UNIT - g);
    let level = 2.0 * log_over(y, sigma * sigma) - t * psi;
    let x = kappa * theta * level - variance * (psi * ((UNIT - e) / (UNIT - g * e)));
    if intensity <= 0.0 {
        return x;
    }
    let half = 0.5 * sd * sd;
    let jump = Complex { x: 0.5 * mean + half * (0.25 - u * u), y: u * (mean + half) }.exp();
    x + intensity * t * (jump - UNIT - (mean + half).exp_m1() * Complex { x: 0.5, y: u })
}

/// Black-Scholes price of a call or a put from spot and strike, each already discounted, ln of their ratio, and σ√T.
pub fn flat_price(spot: f64, strike: f64, log_moneyness: f64, sd: f64, call: bool) -> f64 {
    let side = if call { 1.0 } else { -1.0 };
    if sd <= 1e-12 {
        return (side * (spot - strike)).max(0.0);
    }
    let d = log_moneyness / sd;
    (side * (spot * (side * (d + 0.5 * sd)).normal_cdf() - strike * (side * (d - 0.5 * sd)).normal_cdf())).max(0.0)
}

/// Price of one option, spot, strike, maturity, rate, dividend; `small` ends the integral, `nodes` are 32 nodes and their weights.
fn heston_one(term: &[f64; PLAIN_TERMS], model: &[f64; HESTON_FIELDS], call: bool, nodes: &[f64], small: f64) -> f64 {
    let [s, k, t, r, q] = *term;
    let [variance, kappa, theta, _, _, intensity, mean, sd] = *model;
    let (forward, strike, moneyness) = (s * (-q * t).exp(), k * (-r * t).exp(), log_ratio(s, k) + (r - q) * t);
    let decay = -(-kappa * t).exp_m1() / kappa;
    let w = theta * t + (variance - theta) * decay + intensity * t * (mean * mean + sd * sd);
    let least = (if call { 1.0 } else { -1.0 } * (forward - strike)).max(0.0);
    if w <= NO_VARIANCE {
        return least;
    }
    let narrow = 1.0 / w.sqrt();
    let mut end = 0.5 * narrow;
    for i in 0..NODES {
        let probe = 0.5 * narrow * 1.35f64.powi(i as i32);
        let size = exponent(probe, t, model).x.min(0.0).exp() * probe / (probe * probe + 0.25);
        if size > small {
            end = end.max(probe);
        }
    }
    let end = 1.35 * end;
    let reach = moneyness.abs() + if intensity > 0.0 { 3.0 * mean.abs() } else { 0.0 };
    let panels = (end / (6.0 * narrow).min(36.0 / reach.max(1e-9))).ceil().clamp(1.0, PANELS);
    let (span, mut total) = (end / panels, 0.0);
    for panel in 0..panels as usize {
        for (node, weight) in nodes[..NODES].iter().zip(&nodes[NODES..]) {
            let u = (panel as f64 + 0.5 * (node + 1.0)) * span;
            let (p, x) = (u * u + 0.25, exponent(u, t, model));
            total += weight * ((-0.5 * w * p).exp() * (u * moneyness).cos() - x.x.exp() * (x.y + u * moneyness).cos()) / p;
        }
    }
    let found = flat_price(forward, strike, moneyness, w.sqrt(), call) + (forward * strike).sqrt() / std::f64::consts::PI * 0.5 * span * total;
    found.max(least).min(if call { forward } else { strike })
}

/// Price under a model in f64 on the host: spot, strike, maturity, rate, dividend.
pub fn heston_reference(term: &[f64; PLAIN_TERMS], m: &Heston, call: bool) -> f64 {
    let model = [m.variance, m.reversion, m.mean, m.vol_of_vol, m.correlation, m.intensity, m.jump_mean, m.jump_sd];
    heston_one(term, &model, call, &gauss_legendre(NODES), 1e-14)
}

/// The same under Merton's model.
pub fn merton_reference(term: &[f64; PLAIN_TERMS], m: &Merton, call: bool) -> f64 {
    merton_one(term, &[m.volatility, m.intensity, m.jump_mean, m.jump_sd], call)
}

fn heston_price_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let (terms, kind, model) = (launch.real()?, launch.word()?, launch.real()?);
    let (model_of, _, price) = (launch.word()?, launch.real()?, launch.real_mut()?);
    let (nodes, small) = (gauss_legendre(NODES), if R::DIGITS > 24 { 1e-14 } else { 1e-8 });
    price.par_iter_mut().enumerate().for_each(|(i, price)| {
        let term = std::array::from_fn(|c| terms[PLAIN_TERMS * i + c].f64());
        let of = std::array::from_fn(|c| model[HESTON_FIELDS * model_of[i] as usize + c].f64());
        *price = R::of(heston_one(&term, &of, kind[i] & 1 == 1, &nodes, small));
    });
    Ok(())
}

/// Price of one option under Merton's model.
fn merton_one(term: &[f64; PLAIN_TERMS], model: &[f64; MERTON_FIELDS], call: bool) -> f64 {
    let ([s, k, t, r, q], [volatility, intensity, mean, sd]) = (*term, *model);
    let (forward, strike, moneyness) = (s * (-q * t).exp(), k * (-r * t).exp(), log_ratio(s, k) + (r - q) * t);
    let (jumps, jump) = (intensity * t, mean + 0.5 * sd * sd);
    let many = jumps * jump.exp().max(1.0);
    let count = (many + 8.0 * many.sqrt() + 16.0).min(SERIES) as usize;
    let (mut chance, mut sum) = ((-jumps).exp(), 0.0);
    for n in 0..count {
        let shift = n as f64 * jump - jumps * jump.exp_m1();
        let width = (volatility * volatility * t + n as f64 * sd * sd).sqrt();
        sum += chance * flat_price(forward * shift.exp(), strike, moneyness + shift, width, call);
        chance *= jumps / (n + 1) as f64;
    }
    sum
}

fn merton_price_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let (terms, kind, model) = (launch.real()?, launch.word()?, launch.real()?);
    let (model_of, price) = (launch.word()?, launch.real_mut()?);
    price.par_iter_mut().enumerate().for_each(|(i, price)| {
        let term = std::array::from_fn(|c| terms[PLAIN_TERMS * i + c].f64());
        let of = std::array::from_fn(|c| model[MERTON_FIELDS * model_of[i] as usize + c].f64());
        *price = R::of(merton_one(&term, &of, kind[i] & 1 == 1));
    });
    Ok(())
}

/// Nodes, then weights, of Gauss-Legendre quadrature on (−1, 1), by Newton's method on the polynomial.
fn gauss_legendre(n: usize) -> Vec<f64> {
    let mut out = vec![0.0; 2 * n];
    for i in 0..n {
        let mut x = (std::f64::consts::PI * (i as f64 + 0.75) / (n as f64 + 0.5)).cos();
        let mut slope = 1.0;
        for _ in 0..50 {
            let (mut p, mut before) = (1.0, 0.0);
            for j in 0..n {
                let next = ((2 * j + 1) as f64 * x * p - j as f64 * before) / (j + 1) as f64;
                (before, p) = (p, next);
            }
            slope = n as f64 * (x * p - before) / (x * x - 1.0);
            x -= p / slope;
            if (p / slope).abs() < 1e-15 {
                break;
            }
        }
        (out[i], out[n + i]) = (x, 2.0 / ((1.0 - x * x) * slope * slope));
    }
    out
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// Checks the lengths and gives N.
fn count(op: &'static str, [terms, kind, model, model_of, price]: [&View; 5], fields: u64) -> Result<u64> {
    let n = kind.len();
    let words = kind.elem() == Elem::U32 && model_of.elem() == Elem::U32;
    if terms.len() != PLAIN_TERMS as u64 * n || model_of.len() != n || price.len() != n || !words || n > u64::from(u32::MAX) {
        let got = format!("{} terms, {n} kinds, {} rows, {} prices", terms.len(), model_of.len(), price.len());
        return Err(Error::Shape { op, arg: "terms, kind, model_of, price".into(), expected: "[N,5], [N], [N], [N]".into(), got });
    }
    if model.len() == 0 || !model.len().is_multiple_of(fields) {
        return Err(Error::Shape { op, arg: "model".into(), expected: format!("[M,{fields}]"), got: format!("{} values", model.len()) });
    }
    Ok(n)
}

/// Records price [N] of options terms [N,5], kind [N], each under the row model_of [N] of model [M,8]. Values are not looked at; every row must exist.
/// # Errors
/// `Shape`, `TooLarge`.
pub fn heston_price(pass: &mut Pass, terms: &View, kind: &View, model: &View, model_of: &View, price: &View) -> Result<()> {
    let n = count(OP, [terms, kind, model, model_of, price], HESTON_FIELDS as u64)?;
    let device = pass.device().clone();
    let nodes: Vec<f32> = gauss_legendre(NODES).into_iter().map(|x| x as f32).collect();
    let nodes = View::from(&device.upload("nodes", &nodes)?);
    for run in device.plan(OP, n, PLAIN_TERMS as u64, 1, 75_000)? {
        let five = PLAIN_TERMS as u64 * run.start..PLAIN_TERMS as u64 * run.end;
        let (x, k, of) = (pass.input(terms, five)?, pass.input(kind, run.clone())?, pass.input(model_of, run.clone())?);
        let out = pass.output(price, run.clone())?;
        let params = HestonParams { rows: (run.end - run.start) as u32 };
        pass.launch(&HESTON_PRICE, &params, &[x, k, model.clone(), of, nodes.clone(), out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(())
}

/// The same under Merton's model, model [M,4].
/// # Errors
/// `Shape`, `TooLarge`.
pub fn merton_price(pass: &mut Pass, terms: &View, kind: &View, model: &View, model_of: &View, price: &View) -> Result<()> {
    let n = count("merton_price", [terms, kind, model, model_of, price], MERTON_FIELDS as u64)?;
    for run in pass.device().clone().plan("merton_price", n, PLAIN_TERMS as u64, 1, 1800)? {
        let five = PLAIN_TERMS as u64 * run.start..PLAIN_TERMS as u64 * run.end;
        let (x, k, of) = (pass.input(terms, five)?, pass.input(kind, run.clone())?, pass.input(model_of, run.clone())?);
        let out = pass.output(price, run.clone())?;
        let params = HestonParams { rows: (run.end - run.start) as u32 };
        pass.launch(&MERTON_PRICE, &params, &[x, k, model.clone(), of, out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(())
}

/// Checks, uploads, runs and reads back: `rows` are the models' rows, all options under each model where `model_of` is `None`.
fn on_device(device: &Device, op: &'static str, terms: &[f32], kind: &[u32], rows: &[f32], fields: usize, record: Record) -> Result<(Vec<f64>, usize)> {
    checked_plain_terms(op, terms, kind)?;
    let (models, n) = (rows.len() / fields, kind.len());
    let repeated = |x: &[f32]| x.iter().copied().cycle().take(x.len() * models).collect::<Vec<_>>();
    let kinds: Vec<u32> = kind.iter().copied().cycle().take(n * models).collect();
    let of: Vec<u32> = (0..models as u32).flat_map(|m| std::iter::repeat_n(m, n)).collect();
    let (terms, kind) = (View::from(&device.upload("terms", &repeated(terms))?), View::from(&device.upload_u32("kind", &kinds)?));
    let (model, model_of) = (View::from(&device.upload("model", rows)?), View::from(&device.upload_u32("model_of", &of)?));
    let price = View::from(&device.zeros("price", of.len() as u64)?);
    let mut pass = device.pass(op);
    record(&mut pass, &terms, &kind, &model, &model_of, &price)?;
    let (read, launches) = (pass.read(&price)?, pass.launches());
    Ok((pass.submit()?.f64(read)?, launches))
}

type Record = fn(&mut Pass, &View, &View, &View, &View, &View) -> Result<()>;

/// Prices [M,N] of options [N,5] under each of M models, uploaded and read back.
/// # Errors
/// `Parameter` naming what is out of range and the option's or the model's index; those of the device.
pub fn heston_prices(device: &Device, terms: &[f32], kind: &[u32], models: &[Heston]) -> Result<Vec<f64>> {
    models.iter().enumerate().try_for_each(|(i, model)| numbered(i, model.check()))?;
    let rows: Vec<f32> = models.iter().flat_map(Heston::row).collect();
    on_device(device, OP, terms, kind, &rows, HESTON_FIELDS, heston_price).map(|(price, _)| price)
}

/// Prices [M,N] of options [N,5] under each of M Merton models.
/// # Errors
/// As [`heston_prices`]; `Parameter` where more than 80 jumps are expected to a maturity.
pub fn merton_prices(device: &Device, terms: &[f32], kind: &[u32], models: &[Merton]) -> Result<Vec<f64>> {
    let longest = terms.chunks_exact(PLAIN_TERMS).map(|x| f64::from(x[2])).fold(0.0, f64::max);
    for (i, model) in models.iter().enumerate() {
        numbered(i, model.check())?;
        let jumps = model.intensity * longest * (model.jump_mean + 0.5 * model.jump_sd * model.jump_sd).exp().max(1.0);
        if jumps > 80.0 {
            let help = format!("over {longest} years that is more than the 80 jumps that the series takes; simulate, or use a diffusion of the same variance");
            return Err(Error::Parameter { op: "merton_price", name: format!("intensity[{i}]"), value: model.intensity.to_string(), help });
        }
    }
    let rows: Vec<f32> = models.iter().flat_map(Merton::row).collect();
    on_device(device, "merton_price", terms, kind, &rows, MERTON_FIELDS, merton_price).map(|(price, _)| price)
}

/// Says which model is meant.
fn numbered(i: usize, checked: Result<()>) -> Result<()> {
    checked.map_err(|error| match error {
        Error::Parameter { op, name, value, help } => Error::Parameter { op, name: format!("{name}[{i}]"), value, help },
        other => other,
    })
}

/// Conformance binding: columns in, a model per option, `call` out, and `put` for files that ask for it.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let n = case.f32("spot")?.len();
    let at = |name: &str, i: usize| -> Result<f32> {
        let column = if case.has(name) { case.f32(name)? } else { return Ok(0.0) };
        column.get(if column.len() == 1 { 0 } else { i }).copied().ok_or_else(|| Error::Shape {
            op: OP,
            arg: name.into(),
            expected: format!("[{n}] or [1]"),
            got: format!("[{}]", column.len()),
        })
    };
    let (mut terms, mut rows) = (Vec::with_capacity(PLAIN_TERMS * n), Vec::with_capacity(HESTON_FIELDS * n));
    for i in 0..n {
        for name in PLAIN_NAMES {
            terms.push(at(name, i)?);
        }
        for name in ["v0", "kappa", "theta", "sigma", "rho", "intensity", "jump_mean", "jump_sd"] {
            rows.push(at(name, i)?);
        }
    }
    checked_plain_terms(OP, &terms, &vec![1; n])?;
    let (terms, model) = (View::from(&device.upload("terms", &terms)?), View::from(&device.upload("model", &rows)?));
    let model_of = View::from(&device.upload_u32("model_of", &(0..n as u32).collect::<Vec<_>>())?);
    let mut pass = device.pass(OP);
    let mut reads = Vec::new();
    for (name, word) in [("call", 1), ("put", 0)] {
        let kind = View::from(&device.upload_u32("kind", &vec![word; n])?);
        let price = View::from(&device.zeros(name, n as u64)?);
        heston_price(&mut pass, &terms, &kind, &model, &model_of, &price)?;
        reads.push((name, pass.read(&price)?));
    }
    let mut results = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        results.reals(name, done.f64(read)?);
    }
    Ok(results)
}
