//! Barrier and Asian options by simulation: payoffs are reduced along the paths, nothing of a path is stored; prices come with standard errors.
//!
//! european    η(S_T − K)⁺                                 control e^(−rT)·S_T, of known mean
//! barrier     european, alive (knock-out) or not (knock-in) after Π (1 − p_t);  p_t = e^(−2·ln(B/S_t)·ln(B/S_t+1)/(σ²dt)) is the chance that a Brownian bridge
//!             meets the barrier between two spots on its near side, 1 beyond it;  control: the European option, by closed form
//! geometric   η((Π S_t)^(1/T) − K)⁺, t = 1 … T               control: the European option
//! arithmetic  η((Σ S_t)/T − K)⁺                             control: the geometric option, ln of its mean is normal with mean ln S0 + (μ − ½σ²)·T(n+1)/2n and variance
//!             σ²T(n+1)(2n+1)/6n² under geometric Brownian motion
//! price = mean x − β·(mean y − E y), β = Cov(x,y)/Var(y); without a known E y, the mean. With antithetic draws a pair is one sample.
//!
//! Shapes   sums [blocks,5]: Σx, Σx², Σy, Σy², Σxy of a block of WG·per samples; the host adds the blocks in order, in f64.
//! Launch   a thread per path, a launch per option: options of one call see the same paths.     Scratch sums.
//! Floor    about 100 (gbm) to 290 (bates) instructions per path-step; no memory.
//! Numerics between jumps the bridge is exact for geometric Brownian motion; of stochastic variance it takes the mean of a step's ends; a jump counts as part of the
//!          bridge. Sums of a thread are over `per` samples.
//! Source   Glasserman 2004, Monte Carlo Methods in Financial Engineering, 4.1 and 6.4; Kemna & Vorst 1990 for the geometric control.
//! Files    shaders/exotic_price.wgsl · cuda/exotic_price.cu · reference: `exotic_price_cpu`

use crate::black_scholes::sensitivities;
use crate::conformance::{Case, Outputs};
use crate::device::{Device, View};
use crate::heston_price::{Heston, Merton, heston_reference, merton_reference};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::paths::{Draws, Kind, Market, Markets, Model, PathMarket, field};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of the kernels.
    pub struct ExoticParams {
        /// Samples of this launch: paths, or pairs of them.
        samples: u32,
        /// Steps.
        t: u32,
        /// Row of the market.
        market: u32,
        /// Index of the first path, low word …
        first: u32,
        /// … and high word.
        first_high: u32,
        /// Samples per thread.
        per: u32,
        /// 1 call, 2 barrier above, 4 knock-in, 8 bridge; style in the bits from 256 on: 0 European, 1 barrier, 2 arithmetic, 3 geometric.
        kind: u32,
        /// K.
        strike: f32,
        /// B.
        barrier: f32,
        /// e^(−rT).
        discount: f32,
    }
}

const WG: u32 = 64;
const OP: &str = "exotic_price";
/// Samples per thread.
const PER: u32 = 16;
/// Sums of a block.
const SUMS: usize = 5;

const CALL: u32 = 1;
const UP: u32 = 2;
const KNOCK_IN: u32 = 4;
const BRIDGE: u32 = 8;
const BARRIER: u32 = 1;
const ARITHMETIC: u32 = 2;
const GEOMETRIC: u32 = 3;

fn params(words: &[u32]) -> ExoticParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn blocks(p: &ExoticParams) -> u64 {
    u64::from(p.samples).div_ceil(u64::from(WG) * u64::from(p.per.max(1)))
}

/// Under geometric Brownian motion; the other kinds differ in the constant MODEL.
pub static EXOTIC_PRICE_GBM: Kernel = Kernel {
    name: "exotic_price_gbm",
    about: "barrier and Asian options along paths of geometric Brownian motion",
    args: &[reads("market"), reads_u32("market_words"), writes("sums")],
    params: layout::<ExoticParams>(),
    workgroup: WG,
    constants: &[("MODEL", 0)],
    groups: |words| blocks(&params(words)),
    wgsl: wgsl!("exotic_price"),
    cuda: cuda!("exotic_price"),
    cpu: Some(Cpu { f32: exotic_price_cpu::<f32>, f64: exotic_price_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: |words| u64::from(params(words).samples) * u64::from(params(words).t), bytes: 0.01, flops: 100.0 },
};

/// Under Merton's jump diffusion.
pub static EXOTIC_PRICE_MERTON: Kernel = Kernel {
    name: "exotic_price_merton",
    about: "barrier and Asian options along paths of a jump diffusion",
    constants: &[("MODEL", 1)],
    cost: Cost { flops: 140.0, ..EXOTIC_PRICE_GBM.cost },
    ..EXOTIC_PRICE_GBM
};

/// Under Heston's stochastic variance.
pub static EXOTIC_PRICE_HESTON: Kernel = Kernel {
    name: "exotic_price_heston",
    about: "barrier and Asian options along paths with stochastic variance",
    constants: &[("MODEL", 2)],
    cost: Cost { flops: 260.0, ..EXOTIC_PRICE_GBM.cost },
    ..EXOTIC_PRICE_GBM
};

/// Under Bates' model.
pub static EXOTIC_PRICE_BATES: Kernel = Kernel {
    name: "exotic_price_bates",
    about: "barrier and Asian options along paths with stochastic variance and jumps",
    constants: &[("MODEL", 3)],
    cost: Cost { flops: 290.0, ..EXOTIC_PRICE_GBM.cost },
    ..EXOTIC_PRICE_GBM
};

// ---- the reference ------------------------------------------------------------------------------------------------------

impl ExoticParams {
    fn payoff<R: Real>(&self, x: R) -> R {
        let over = x - R::of(f64::from(self.strike));
        let gain = if self.kind & CALL != 0 { over } else { -over };
        R::of(f64::from(self.discount)) * gain.max(R::ZERO)
    }

    /// Chance that a step in log-spot does not meet the barrier.
    fn missed<R: Real>(&self, bridge: bool, x: R, y: R, level: R, variance: R) -> R {
        let side = if self.kind & UP != 0 { R::ONE } else { -R::ONE };
        let (before, after) = (side * (level - x), side * (level - y));
        match before <= R::ZERO || after <= R::ZERO {
            true => R::ZERO,
            false if bridge => R::ONE - (R::of(-2.0) * before * after / variance.max(R::of(1e-30))).exp(),
            false => R::ONE,
        }
    }

    /// Payoff and control of one path.
    fn sample<R: Real>(&self, m: &PathMarket<'_, R>, path: u64, has_variance: bool) -> (R, R) {
        let style = self.kind >> 8;
        let spot = m.get(field::SPOT);
        let level = (R::of(f64::from(self.barrier.max(1e-30))) / spot).ln();
        let mut s = m.start(path);
        let mut alive = self.missed(false, s.x, s.x, level, R::ZERO);
        let (mut sum, mut logs) = (R::ZERO, R::ZERO);
        for quad in 0..self.t.div_ceil(4) {
            let d = m.draws(path, quad);
            for t in 4 * quad..(4 * quad + 4).min(self.t) {
                let before = s;
                m.step(&mut s, &d, t);
                if style == BARRIER {
                    let variance = if has_variance { R::of(0.5) * (before.v + s.v) * m.get(field::DT) } else { m.get(field::VARIANCE) };
                    alive *= self.missed(self.kind & BRIDGE != 0, before.x, s.x, level, variance);
                }
                if style == ARITHMETIC {
                    sum += m.spot(&s);
                }
                logs += s.x;
            }
        }
        let steps = R::of(f64::from(self.t));
        let (end, geometric) = (m.spot(&s), self.payoff(spot * (logs / steps).exp()));
        let european = self.payoff(end);
        match style {
            BARRIER => (if self.kind & KNOCK_IN != 0 { european * (R::ONE - alive) } else { european * alive }, european),
            ARITHMETIC => (self.payoff(sum / steps), geometric),
            GEOMETRIC => (geometric, european),
            _ => (european, R::of(f64::from(self.discount)) * end),
        }
    }
}

fn exotic_price_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ExoticParams = launch.params()?;
    let (reals, words, sums) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let m = PathMarket::of(reals, words, p.market as usize);
    let own = words.get(p.market as usize * crate::paths::WORDS..).unwrap_or_default();
    let antithetic = own.get(crate::paths::word::ANTITHETIC).is_some_and(|&x| x != 0);
    let kind = own.get(crate::paths::word::KIND).copied().unwrap_or_default();
    let has_variance = kind == Kind::Heston as u32 || kind == Kind::Bates as u32;
    let (first, mirrors) = (u64::from(p.first_high) << 32 | u64::from(p.first), if antithetic { 2 } else { 1 });
    let block = u64::from(WG) * u64::from(p.per);
    sums.par_chunks_exact_mut(SUMS).enumerate().for_each(|(b, out)| {
        let mut total = [R::ZERO; SUMS];
        for index in b as u64 * block..((b as u64 + 1) * block).min(u64::from(p.samples)) {
            let (mut x, mut y) = (R::ZERO, R::ZERO);
            for mirror in 0..mirrors {
                let pair = p.sample(&m, first + index * mirrors + mirror, has_variance);
                x += pair.0 / R::of(mirrors as f64);
                y += pair.1 / R::of(mirrors as f64);
            }
            for (sum, value) in total.iter_mut().zip([x, x * x, y, y * y, x * y]) {
                *sum += value;
            }
        }
        out.copy_from_slice(&total);
    });
    Ok(())
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// What an option pays by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Style {
    /// The spot at maturity.
    European,
    /// The spot at maturity, unless (or only if) a barrier is met.
    Barrier {
        /// Level.
        level: f64,
        /// Above the spot, or below it.
        up: bool,
        /// Comes to life at the barrier, or ends there.
        knock_in: bool,
        /// Watched all the time (by Brownian bridges), or at the steps alone.
        continuous: bool,
    },
    /// The arithmetic mean of the spots at steps 1 … T.
    ArithmeticAsian,
    /// Their geometric mean.
    GeometricAsian,
}

/// An option on simulated paths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exotic {
    /// What it pays by.
    pub style: Style,
    /// Call, or put.
    pub call: bool,
    /// Strike.
    pub strike: f64,
}

/// Price by simulation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// With the control variate where its mean is known.
    pub price: f64,
    /// Its standard error.
    pub error: f64,
    /// Mean payoff without the control.
    pub plain: f64,
    /// Its standard error.
    pub plain_error: f64,
    /// Mean of the control on the paths, and what it is.
    pub control: Option<(f64, f64)>,
}

/// How to simulate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Simulation {
    /// Paths.
    pub paths: u64,
    /// Steps T, which are also the times of barriers that are not continuous and of averages.
    pub steps: u64,
    /// Years.
    pub maturity: f64,
    /// Continuous rate a year, for discounting; the market's drift is rate less dividend yield.
    pub rate: f64,
    /// Random numbers.
    pub draws: Draws,
}

fn wrong(name: &str, value: impl std::fmt::Display, help: &str) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() }
}

impl Exotic {
    fn check(&self, index: usize, spot: f64) -> Result<()> {
        if !(self.strike >= 0.0 && self.strike.is_finite()) {
            return Err(wrong(&format!("strike[{index}]"), self.strike, "must be 0 or a positive number"));
        }
        match self.style {
            Style::Barrier { level, .. } if !(level > 0.0 && level.is_finite()) => {
                Err(wrong(&format!("barrier[{index}]"), level, &format!("must be a positive number; the spot is {spot}")))
            }
            _ => Ok(()),
        }
    }

    fn code(&self) -> u32 {
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        bit(self.call, CALL)
            | match self.style {
                Style::European => 0,
                Style::Barrier { up, knock_in, continuous, .. } => BARRIER << 8 | bit(up, UP) | bit(knock_in, KNOCK_IN) | bit(continuous, BRIDGE),
                Style::ArithmeticAsian => ARITHMETIC << 8,
                Style::GeometricAsian => GEOMETRIC << 8,
            }
    }

    fn level(&self) -> f32 {
        if let Style::Barrier { level, .. } = self.style { level as f32 } else { 1.0 }
    }

    /// Mean of the control, where there is a closed form.
    fn control(&self, market: &Market, sim: &Simulation) -> Option<f64> {
        match (self.style, &market.model) {
            (Style::European, _) => Some(market.spot * ((market.drift - sim.rate) * sim.maturity).exp()),
            (Style::ArithmeticAsian, Model::Gbm { volatility }) => Some(geometric_asian(market.spot, self.strike, *volatility, market.drift, sim, self.call)),
            (Style::ArithmeticAsian, _) => None,
            _ => european(market, self.strike, sim, self.call),
        }
    }
}

/// Price of a European option under a market's model, where there is a closed form.
pub fn european(market: &Market, strike: f64, sim: &Simulation, call: bool) -> Option<f64> {
    if strike <= 0.0 {
        return None;
    }
    let term = [market.spot, strike, sim.maturity, sim.rate, sim.rate - market.drift];
    match &market.model {
        Model::Gbm { volatility } => Some(sensitivities(&[term[0], term[1], term[2], *volatility, term[3], term[4]], u32::from(call)).price),
        Model::Merton { volatility, jumps } => {
            Some(merton_reference(&term, &Merton { volatility: *volatility, intensity: jumps.intensity, jump_mean: jumps.mean, jump_sd: jumps.sd }, call))
        }
        Model::Heston(v) | Model::Bates(v, _) if v.reversion > 0.0 => {
            let mut model = Heston::new(v.start, v.reversion, v.mean, v.volatility, v.correlation);
            if let Model::Bates(_, jumps) = &market.model {
                (model.intensity, model.jump_mean, model.jump_sd) = (jumps.intensity, jumps.mean, jumps.sd);
            }
            Some(heston_reference(&term, &model, call))
        }
        _ => None,
    }
}

/// Price of a geometric Asian option under geometric Brownian motion, averaged over steps 1 … T.
pub fn geometric_asian(spot: f64, strike: f64, volatility: f64, drift: f64, sim: &Simulation, call: bool) -> f64 {
    let n = sim.steps as f64;
    let mean = spot.ln() + (drift - 0.5 * volatility * volatility) * sim.maturity * (n + 1.0) / (2.0 * n);
    let variance = volatility * volatility * sim.maturity * (n + 1.0) * (2.0 * n + 1.0) / (6.0 * n * n);
    let (discount, forward) = ((-sim.rate * sim.maturity).exp(), (mean + 0.5 * variance).exp());
    crate::heston_price::flat_price(discount * forward, discount * strike, (forward / strike).ln(), variance.sqrt(), call)
}

/// Prices of options on the same paths of one market.
/// # Errors
/// `Parameter` for no paths, a market without bridges (regimes, bootstrap, given paths) or with futures, a strike or barrier that is not positive; those of
/// [`Markets::new`] and of the device.
pub fn exotic_prices(device: &Device, market: &Market, options: &[Exotic], sim: &Simulation) -> Result<Vec<Estimate>> {
    let kernel = match market.model.kind() {
        _ if market.basis.is_some() => return Err(wrong("basis", "given", "options are on the spot: leave the basis out")),
        Kind::Gbm => &EXOTIC_PRICE_GBM,
        Kind::Merton => &EXOTIC_PRICE_MERTON,
        Kind::Heston => &EXOTIC_PRICE_HESTON,
        Kind::Bates => &EXOTIC_PRICE_BATES,
        kind => return Err(wrong("model", kind.name(), "must be gbm, merton, heston or bates: the others have no bridge between steps")),
    };
    if sim.paths == 0 || sim.paths > crate::paths::MAX_PATHS {
        return Err(wrong("paths", sim.paths, "1 to 2^40"));
    }
    if sim.draws.matched {
        return Err(wrong("matched", true, "moment matching makes paths depend on each other, so that their standard error means nothing; use antithetic"));
    }
    if !sim.rate.is_finite() {
        return Err(wrong("rate", sim.rate, "must be a finite number"));
    }
    options.iter().enumerate().try_for_each(|(i, option)| option.check(i, market.spot))?;
    let markets = Markets::new(OP, std::slice::from_ref(market), sim.steps, sim.maturity, &sim.draws)?;
    let mirrors = if sim.draws.antithetic { 2 } else { 1 };
    let (samples, rounds) = (sim.paths.div_ceil(mirrors), sim.steps * markets.rounds().max(1) * mirrors);
    // As many samples per thread as the device's loops allow.
    let per = (1..=PER).rev().find(|&per| device.check_rounds(OP, (rounds + 16) * u64::from(per), "rounds").is_ok()).unwrap_or(1);
    device.check_rounds(OP, (rounds + 16) * u64::from(per), "rounds")?;
    let block = u64::from(WG) * u64::from(per);
    let (reals, words) = markets.upload(device)?;
    let mut estimates = Vec::with_capacity(options.len());
    for option in options {
        let mut total = [0.0; SUMS];
        // Runs of whole blocks, a pass each: sums of a run come back before the next.
        let runs = device.plan(OP, samples.div_ceil(block), SUMS as u64, 1, block * sim.steps * mirrors * kernel.cost.flops as u64)?;
        for run in runs.into_iter().flat_map(|run| (run.start..run.end).step_by(1 << 20).map(move |at| at..(at + (1 << 20)).min(run.end))) {
            let first = run.start * block;
            let count = (run.end * block).min(samples) - first;
            let path = first * mirrors;
            let sums = View::from(&device.zeros("sums", count.div_ceil(block) * SUMS as u64)?);
            let params = ExoticParams {
                samples: count as u32,
                t: sim.steps as u32,
                market: 0,
                first: path as u32,
                first_high: (path >> 32) as u32,
                per,
                kind: option.code(),
                strike: option.strike as f32,
                barrier: option.level(),
                discount: (-sim.rate * sim.maturity).exp() as f32,
            };
            let mut pass = device.pass(OP);
            pass.launch(kernel, &params, &[View::from(&reals), View::from(&words), sums.clone()])?;
            let read = pass.read(&sums)?;
            for sums in pass.submit()?.f64(read)?.chunks_exact(SUMS) {
                total.iter_mut().zip(sums).for_each(|(total, x)| *total += x);
            }
        }
        estimates.push(estimate(total, samples as f64, option.control(market, sim)));
    }
    Ok(estimates)
}

fn estimate([x, xx, y, yy, xy]: [f64; SUMS], n: f64, known: Option<f64>) -> Estimate {
    let (mean_x, mean_y, free) = (x / n, y / n, (n - 1.0).max(1.0));
    let variance = |square: f64, a: f64, b: f64| ((square - n * a * b) / free).max(0.0);
    let (var_x, var_y, cov) = (variance(xx, mean_x, mean_x), variance(yy, mean_y, mean_y), (xy - n * mean_x * mean_y) / free);
    let plain_error = (var_x / n).sqrt();
    match known {
        Some(known) if var_y > 0.0 => {
            let beta = cov / var_y;
            let left = (var_x - beta * cov).max(0.0);
            Estimate { price: mean_x - beta * (mean_y - known), error: (left / n).sqrt(), plain: mean_x, plain_error, control: Some((mean_y, known)) }
        }
        _ => Estimate { price: mean_x, error: plain_error, plain: mean_x, plain_error, control: None },
    }
}

/// Conformance binding: one option under geometric Brownian motion; numbers spot, strike, maturity, volatility, rate, dividend, steps, paths, seed; flags call,
/// up, knock_in, continuous; text style.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let style = match case.text("style")? {
        "european" => Style::European,
        "arithmetic" => Style::ArithmeticAsian,
        "geometric" => Style::GeometricAsian,
        "barrier" => {
            Style::Barrier { level: case.number("barrier")?, up: case.flag("up"), knock_in: case.flag("knock_in"), continuous: case.flag("continuous") }
        }
        other => {
            let known = ["european", "arithmetic", "geometric", "barrier"].map(String::from).to_vec();
            return Err(Error::Unknown { kind: "style", given: other.into(), suggestion: None, known });
        }
    };
    let (rate, dividend) = (case.number("rate")?, case.number("dividend")?);
    let model = Model::Gbm { volatility: case.number("volatility")? };
    let market = Market { spot: case.number("spot")?, drift: rate - dividend, model, basis: None };
    let draws = Draws { seed: case.number("seed")? as u64, ..Draws::default() };
    let sim = Simulation { paths: case.number("paths")? as u64, steps: case.number("steps")? as u64, maturity: case.number("maturity")?, rate, draws };
    let found = exotic_prices(device, &market, &[Exotic { style, call: case.flag("call"), strike: case.number("strike")? }], &sim)?;
    let mut results = Outputs::launched(1);
    results.reals("price", found.iter().map(|x| x.price).collect());
    results.reals("error", found.iter().map(|x| x.error).collect());
    Ok(results)
}
