//! Simulated paths: equal draws on every device and in any split, moments and prices against closed forms, the order of QE, what
//! mirrored and matched draws are for, and what bad markets are told.

use super::common::{DEVICES, open, open_with, variants};
use super::{Guards, error};
use forback::kernels::kernel::Elem;
use forback::kernels::paths::{
    Basis, Draws, Joint, Jumps, Kind, Market, Markets, Model, PATHS_ASSETS_BOOTSTRAP, PATHS_ASSETS_REGIMES, PATHS_MOMENTS, Paths, PathsParams, Stored,
    Variance, factor, match_moments, normal_quantile, paths, paths_assets,
};
use forback::kernels::philox::{normals, philox4x32};
use forback::kernels::real::erfc;
use forback::kernels::{Device, Error, KERNELS, OpenOptions, View};
use std::ops::Range;

const JUMPS: Jumps = Jumps { intensity: 4.0, mean: -0.05, sd: 0.08 };
/// Feller's condition violated.
const ROUGH: Variance = Variance { start: 0.04, mean: 0.05, reversion: 1.5, volatility: 0.8, correlation: -0.7 };
const BASIS: Basis = Basis { start: 0.01, mean: 0.004, reversion: 6.0, volatility: 0.03, correlation: 0.3 };

fn history(n: usize) -> Vec<f64> {
    (0..n).map(|i| (((i * 37) % n) as f64 / n as f64 - 0.5) / 20.0).collect()
}

fn models() -> Vec<Model> {
    vec![
        Model::Gbm { volatility: 0.2 },
        Model::Merton { volatility: 0.2, jumps: JUMPS },
        Model::Heston(ROUGH),
        Model::Bates(ROUGH, JUMPS),
        Model::Regimes {
            drift: vec![0.1, -0.2, 0.0],
            volatility: vec![0.1, 0.4, 0.2],
            trans: vec![0.95, 0.03, 0.02, 0.1, 0.85, 0.05, 0.1, 0.1, 0.8],
            start: vec![0.5, 0.3, 0.2],
        },
        Model::Bootstrap { log_returns: history(101), block: 5.0, circular: false },
        Model::Bootstrap { log_returns: history(64), block: 7.0, circular: true },
        Model::Replay,
    ]
}

fn prepared(model: &Model, basis: Option<Basis>, steps: u64, maturity: f64, draws: Draws) -> Markets {
    let market = Market { spot: 100.0, drift: 0.03, model: model.clone(), basis };
    Markets::new("paths", &[market], steps, maturity, &draws).unwrap()
}

/// Spot, variance, future, and events, of a range of paths.
fn stored(device: &Device, markets: &Markets, range: Range<u64>) -> (Vec<f64>, Vec<f64>, Vec<f64>, Vec<u32>) {
    let given = |count: u64| (0..count).map(|i| 80.0 + (i * 7 % 41) as f32).collect::<Vec<f32>>();
    let given = (markets.kind() == Kind::Replay).then(|| View::from(&device.upload("given", &given(range.end * (markets.steps() + 1))).unwrap()));
    let mut pass = device.pass("paths");
    let wanted = Stored { variance: true, events: true, future: markets.futures() };
    let out: Paths = paths(&mut pass, markets, 0, range, given.as_ref(), wanted).unwrap();
    let reads = [Some(out.spot), out.variance, out.future].map(|b| b.map(|b| pass.read(&b).unwrap()));
    let events = pass.read(&out.events.unwrap()).unwrap();
    let mut done = pass.submit().unwrap();
    let [spot, variance, future] = reads.map(|read| read.map_or_else(Vec::new, |read| done.f64(read).unwrap()));
    (spot, variance, future, done.u32(events).unwrap())
}

fn spots(device: &Device, markets: &Markets, range: Range<u64>) -> Vec<f64> {
    let mut pass = device.pass("paths");
    let out = paths(&mut pass, markets, 0, range, None, Stored::default()).unwrap();
    let read = pass.read(&out.spot).unwrap();
    pass.submit().unwrap().f64(read).unwrap()
}

/// The largest relative difference.
fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |most, (a, b)| ((a - b) / b).abs().max(most))
}

#[test]
fn paths_agree_on_every_device() {
    let steps = 61;
    for model in models() {
        for (basis, antithetic) in [(None, false), (None, true), (Some(BASIS), true)] {
            if basis.is_some() && model.kind() == Kind::Replay {
                continue;
            }
            let draws = Draws { seed: 77 << 33 | 5, antithetic, matched: false };
            let markets = prepared(&model, basis, steps, 0.5, draws);
            let truth = stored(&open("reference").unwrap(), &markets, 3..140);
            for spec in &DEVICES[1..] {
                let Some(device) = open(spec) else { continue };
                let got = stored(&device, &markets, 3..140);
                let label = format!("{} on {spec}, antithetic {antithetic}", model.kind().name());
                assert_eq!(got.3, truth.3, "{label}: events");
                // Largest seen: 5e-7 for spot and futures, 1e-6 where the variance moves.
                for (name, got, want) in [("spot", &got.0, &truth.0), ("future", &got.2, &truth.2)] {
                    let most = relative(got, want);
                    assert!(most < 2e-6, "{label}: {name} differs by {most:e}");
                }
                let most = got.1.iter().zip(&truth.1).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
                assert!(most < 2e-6, "{label}: variance differs by {most:e}");
            }
        }
    }
}

#[test]
fn a_split_changes_no_bit() {
    for spec in DEVICES {
        for options in variants(spec) {
            let (Some(whole), Some(small)) = (open_with(spec, &options), open_with(spec, &OpenOptions { binding_bytes: Some(1 << 12), ..options.clone() }))
            else {
                continue;
            };
            for model in models() {
                let markets = prepared(&model, None, 18, 0.1, Draws { seed: 4, antithetic: true, matched: false });
                // Across a boundary of the low word of the index.
                let first = if model.kind() == Kind::Replay { 0 } else { (1 << 32) - 30 };
                let at_once = stored(&whole, &markets, first..first + 71);
                let apart = stored(&small, &markets, first..first + 71);
                assert!(at_once == apart, "{spec}: {:?} in launches", model.kind());
                let parts = [first..first + 13, first + 13..first + 71].map(|range| stored(&whole, &markets, range));
                assert!(at_once.0 == [&parts[0].0[..], &parts[1].0].concat(), "{spec}: {:?} in calls", model.kind());
                assert!(at_once.3 == [&parts[0].3[..], &parts[1].3].concat(), "{spec}: {:?} in calls", model.kind());
            }
        }
    }
}

#[test]
fn the_first_step_is_the_documented_draw() {
    let markets = prepared(&Model::Gbm { volatility: 0.2 }, None, 4, 4.0, Draws { seed: 9, ..Draws::default() });
    let spot = spots(&open("reference").unwrap(), &markets, 0..6);
    for (p, path) in spot.chunks(5).enumerate() {
        let z = normals(philox4x32([p as u32, 0, 0, factor::SPOT | forback::kernels::paths::STREAM << 16], [9, 0]));
        for t in 0..4 {
            let step = (path[t + 1] / path[t]).ln();
            assert!((step - (0.03 - 0.02 + 0.2 * z[t])).abs() < 1e-7, "path {p}, step {t}: {step}");
        }
    }
    for u in [1e-300, 1e-10, 0.02, 0.3, 0.5, 0.97, 1.0 - 1e-9] {
        assert!((0.5 * erfc(-normal_quantile(u) * std::f64::consts::FRAC_1_SQRT_2) / u - 1.0).abs() < 1e-9, "{u}");
    }
}

// ---- closed forms -------------------------------------------------------------------------------------------------------

/// Price of a call by its strike.
type Price = Box<dyn Fn(f64) -> f64>;

/// Price of a call on a forward, rate 0.
fn black(forward: f64, strike: f64, sd: f64) -> f64 {
    let phi = |x: f64| 0.5 * erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
    let d = (forward / strike).ln() / sd;
    forward * phi(d + 0.5 * sd) - strike * phi(d - 0.5 * sd)
}

/// Merton's series, rate 0 and growth `drift`.
fn merton(spot: f64, strike: f64, maturity: f64, drift: f64, volatility: f64, jumps: &Jumps) -> f64 {
    let growth = (jumps.mean + 0.5 * jumps.sd * jumps.sd).exp();
    let mean = jumps.intensity * maturity;
    let mut p = (-mean).exp();
    let mut price = 0.0;
    for n in 0..120 {
        let forward = spot * (drift * maturity - mean * (growth - 1.0)).exp() * growth.powi(n);
        price += p * black(forward, strike, (volatility * volatility * maturity + f64::from(n) * jumps.sd * jumps.sd).sqrt());
        p *= mean / f64::from(n + 1);
    }
    price
}

type Complex = (f64, f64);

fn times(a: Complex, b: Complex) -> Complex {
    (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)
}

fn over(a: Complex, b: Complex) -> Complex {
    let size = b.0 * b.0 + b.1 * b.1;
    times(a, (b.0 / size, -b.1 / size))
}

fn plus(a: Complex, b: Complex) -> Complex {
    (a.0 + b.0, a.1 + b.1)
}

fn scaled(a: Complex, x: f64) -> Complex {
    (a.0 * x, a.1 * x)
}

fn exp(a: Complex) -> Complex {
    scaled((a.1.cos(), a.1.sin()), a.0.exp())
}

fn ln(a: Complex) -> Complex {
    (a.0.hypot(a.1).ln(), a.1.atan2(a.0))
}

fn sqrt(a: Complex) -> Complex {
    exp(scaled(ln(a), 0.5))
}

/// E[e^{iu·ln S(T)/F}] of Heston's model at a complex u, in the form without a branch cut.
fn heston_characteristic(u: Complex, maturity: f64, m: &Variance) -> Complex {
    let iu = times((0.0, 1.0), u);
    let (kappa, xi, rho) = (m.reversion, m.volatility, m.correlation);
    let b = plus((kappa, 0.0), scaled(iu, -rho * xi));
    let d = sqrt(plus(times(b, b), scaled(plus(iu, times(u, u)), xi * xi)));
    let low = plus(b, scaled(d, -1.0));
    let g = over(low, plus(b, d));
    let decay = exp(scaled(d, -maturity));
    let rest = plus((1.0, 0.0), scaled(times(g, decay), -1.0));
    let log = ln(over(rest, plus((1.0, 0.0), scaled(g, -1.0))));
    let c = scaled(plus(scaled(low, maturity), scaled(log, -2.0)), kappa * m.mean / (xi * xi));
    let e = times(scaled(low, 1.0 / (xi * xi)), over(plus((1.0, 0.0), scaled(decay, -1.0)), rest));
    exp(plus(c, scaled(e, m.start)))
}

/// Price of a call on a forward under Heston, rate 0: Lewis' integral over the line Im u = −½, by Simpson's rule.
fn heston(forward: f64, strike: f64, maturity: f64, m: &Variance) -> f64 {
    let k = (forward / strike).ln();
    let integrand = |u: f64| times(exp((0.0, u * k)), heston_characteristic((u, -0.5), maturity, m)).0 / (u * u + 0.25);
    let (n, most) = (20_000, 400.0);
    let h = most / f64::from(n);
    let sum: f64 = (0..=n).map(|i| integrand(h * f64::from(i)) * if i == 0 || i == n { 1.0 } else { 2.0 + 2.0 * f64::from(i % 2) }).sum();
    forward - (forward * strike).sqrt() / std::f64::consts::PI * sum * h / 3.0
}

/// Mean and standard error.
fn mean_and_error(x: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = x.clone().count() as f64;
    let mean = x.clone().sum::<f64>() / n;
    (mean, (x.map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0) / n).sqrt())
}

/// Last prices of so many paths, on the fast column.
fn last(markets: &Markets, count: u64) -> Vec<f64> {
    let bars = markets.steps() as usize + 1;
    spots(&open("cpu").unwrap(), markets, 0..count).chunks_exact(bars).map(|path| path[bars - 1]).collect()
}

#[test]
fn prices_match_closed_forms() {
    let (maturity, count) = (0.5, 1 << 16);
    let forward = 100.0 * (0.03f64 * maturity).exp();
    let mild = Variance { volatility: 0.3, ..ROUGH };
    let draws = Draws { seed: 11, ..Draws::default() };
    let cases: [(&str, Model, u64, Price); 5] = [
        ("gbm", Model::Gbm { volatility: 0.25 }, 3, Box::new(move |k| black(forward, k, 0.25 * maturity.sqrt()))),
        ("merton", Model::Merton { volatility: 0.15, jumps: JUMPS }, 3, Box::new(move |k| merton(100.0, k, maturity, 0.03, 0.15, &JUMPS))),
        (
            "no jumps",
            Model::Merton { volatility: 0.15, jumps: Jumps { intensity: 0.0, ..JUMPS } },
            2,
            Box::new(move |k| black(forward, k, 0.15 * maturity.sqrt())),
        ),
        ("heston", Model::Heston(mild), 32, Box::new(move |k| heston(forward, k, maturity, &mild))),
        ("heston, Feller violated", Model::Heston(ROUGH), 32, Box::new(move |k| heston(forward, k, maturity, &ROUGH))),
    ];
    for (name, model, steps, price) in cases {
        let ends = last(&prepared(&model, None, steps, maturity, draws), count);
        let (mean, error) = mean_and_error(ends.iter().copied());
        assert!((mean - forward).abs() < 3.0 * error, "{name}: forward {mean} ± {error}, expected {forward}");
        for strike in [85.0, 100.0, 120.0] {
            let (mean, error) = mean_and_error(ends.iter().map(|s| (s - strike).max(0.0)));
            assert!((mean - price(strike)).abs() < 3.0 * error, "{name}, strike {strike}: {mean} ± {error}, expected {}", price(strike));
        }
    }
    // Bates: the forward, and variance of the log from its parts at ξ = 0.
    let flat = Variance { start: 0.04, mean: 0.04, volatility: 0.0, ..ROUGH };
    let ends = last(&prepared(&Model::Bates(flat, JUMPS), None, 4, maturity, draws), count);
    let (mean, error) = mean_and_error(ends.iter().map(|s| (s - 100.0).max(0.0)));
    let price = merton(100.0, 100.0, maturity, 0.03, 0.2, &JUMPS);
    assert!((mean - price).abs() < 3.0 * error, "bates without volatility of variance: {mean} ± {error}, expected {price}");
    let ends = last(&prepared(&Model::Bates(ROUGH, JUMPS), None, 16, maturity, draws), count);
    let (mean, error) = mean_and_error(ends.iter().copied());
    assert!((mean - forward).abs() < 3.0 * error, "bates: {mean} ± {error}");
}

#[test]
fn the_variance_has_its_mean_and_variance() {
    let markets = prepared(&Model::Heston(ROUGH), None, 25, 1.0, Draws { seed: 3, ..Draws::default() });
    let (_, variance, ..) = stored(&open("cpu").unwrap(), &markets, 0..1 << 15);
    let ends: Vec<f64> = variance.chunks_exact(26).map(|v| v[25]).collect();
    let (mean, error) = mean_and_error(ends.iter().copied());
    let decay = (-ROUGH.reversion).exp();
    let want = ROUGH.mean + (ROUGH.start - ROUGH.mean) * decay;
    assert!((mean - want).abs() < 3.0 * error, "mean {mean} ± {error}, expected {want}");
    let (square, error) = mean_and_error(ends.iter().map(|v| (v - want) * (v - want)));
    let gone = 1.0 - decay;
    let unit = ROUGH.volatility * ROUGH.volatility / ROUGH.reversion;
    let want = ROUGH.start * unit * decay * gone + 0.5 * ROUGH.mean * unit * gone * gone;
    assert!((square - want).abs() < 3.0 * error, "variance {square} ± {error}, expected {want}");
}

#[test]
fn futures_follow_their_basis() {
    let markets = prepared(&Model::Gbm { volatility: 0.2 }, Some(BASIS), 63, 0.25, Draws { seed: 8, ..Draws::default() });
    let (spot, _, future, _) = stored(&open("cpu").unwrap(), &markets, 0..1 << 14);
    let basis: Vec<f64> = spot.iter().zip(&future).map(|(s, f)| (f / s).ln()).collect();
    let ends = basis.chunks_exact(64).map(|b| b[63]);
    let decay = (-BASIS.reversion * 0.25f64).exp();
    let (mean, error) = mean_and_error(ends.clone());
    let want = BASIS.mean + (BASIS.start - BASIS.mean) * decay;
    assert!((mean - want).abs() < 3.0 * error, "{mean} ± {error}, expected {want}");
    let (square, error) = mean_and_error(ends.map(|b| (b - want) * (b - want)));
    let want = BASIS.volatility * BASIS.volatility * (1.0 - decay * decay) / (2.0 * BASIS.reversion);
    assert!((square - want).abs() < 3.0 * error, "{square} ± {error}, expected {want}");
    let moves = spot.chunks_exact(64).zip(basis.chunks_exact(64)).map(|(s, b)| ((s[1] / s[0]).ln(), b[1] - b[0]));
    let (n, x, y) = moves.clone().fold((0.0, 0.0, 0.0), |(n, x, y), m| (n + 1.0, x + m.0, y + m.1));
    let (xx, yy, xy) = moves.fold((0.0, 0.0, 0.0), |s, m| {
        let (dx, dy) = (m.0 - x / n, m.1 - y / n);
        (s.0 + dx * dx, s.1 + dy * dy, s.2 + dx * dy)
    });
    let correlation = xy / (xx * yy).sqrt();
    assert!((correlation - 0.3).abs() < 3.0 / f64::sqrt(n), "correlation {correlation}");
}

/// The oracle of two regimes: kurtosis and autocorrelations of squared returns.
#[test]
fn two_regimes_have_their_moments() {
    let model = Model::Regimes {
        drift: vec![0.5 * 1e-4, 0.5 * 9e-4],
        volatility: vec![0.01, 0.03],
        trans: vec![0.98, 0.02, 0.05, 0.95],
        start: vec![5.0 / 7.0, 2.0 / 7.0],
    };
    let market = Market { spot: 1.0, drift: 0.0, model, basis: None };
    let (steps, count) = (500usize, 2000u64);
    let markets = Markets::new("paths", &[market], steps as u64, steps as f64, &Draws { seed: 2, ..Draws::default() }).unwrap();
    assert!((f64::from(markets.field(0, forback::kernels::paths::field::VOLATILITY)) - 3.285_714_3e-4f64.sqrt()).abs() < 1e-8);
    let (spot, _, _, events) = stored(&open("cpu").unwrap(), &markets, 0..count);
    let returns: Vec<Vec<f64>> = spot.chunks_exact(steps + 1).map(|s| s.windows(2).map(|w| (w[1] / w[0]).ln()).collect()).collect();
    // Paths are independent: errors come from the spread of their means.
    let close = |name: &str, values: Vec<f64>, want: f64| {
        let (mean, error) = mean_and_error(values.iter().copied());
        assert!((mean - want).abs() < 4.0 * error, "{name}: {mean} ± {error}, expected {want}");
    };
    let average = |f: &dyn Fn(&[f64]) -> f64| returns.iter().map(|r| f(r)).collect::<Vec<f64>>();
    let second = 3.285_714_3e-4;
    close("variance", average(&|r| r.iter().map(|x| x * x).sum::<f64>() / r.len() as f64), second);
    let fourth = 6.629_489_6 * second * second;
    close("fourth moment", average(&|r| r.iter().map(|x| x.powi(4)).sum::<f64>() / r.len() as f64), fourth);
    for (lag, want) in [(1, 0.199_865_7), (5, 0.149_509_7)] {
        let product = |r: &[f64]| (lag..r.len()).map(|t| (r[t] * r[t] - second) * (r[t - lag] * r[t - lag] - second)).sum::<f64>() / (r.len() - lag) as f64;
        close(&format!("lag {lag}"), average(&product), want * (fourth - second * second));
    }
    let stays = events.chunks_exact(steps + 1).map(|z| {
        let from = z.windows(2).filter(|w| w[0] == 1).count().max(1);
        z.windows(2).filter(|w| w[0] == 1 && w[1] == 1).count() as f64 - 0.95 * from as f64
    });
    close("stays in regime 1", stays.collect(), 0.0);
}

#[test]
fn blocks_of_history_are_whole() {
    let (n, steps, count) = (97u32, 400usize, 300u64);
    for (block, circular) in [(10.0, false), (10.0, true), (1.0, false)] {
        let model = Model::Bootstrap { log_returns: history(n as usize), block, circular };
        let (spot, _, _, bars) = stored(&open("cpu").unwrap(), &prepared(&model, None, steps as u64, 1.0, Draws { seed: 6, ..Draws::default() }), 0..count);
        let mut breaks = 0;
        for (path, bars) in spot.chunks_exact(steps + 1).zip(bars.chunks_exact(steps + 1)) {
            for t in 1..=steps {
                let want = history(n as usize)[bars[t] as usize] + 0.03 / steps as f64;
                assert!(((path[t] / path[t - 1]).ln() - want).abs() < 1e-6);
                breaks += usize::from(t > 1 && bars[t] != (bars[t - 1] + 1) % n);
            }
        }
        // A random restart goes on as before one time in n.
        let (trials, p) = ((steps - 1) as f64 * count as f64, (1.0 - 1.0 / f64::from(n)) / block);
        let expected = if circular { (steps as f64 / block - 1.0) * count as f64 * (1.0 - 1.0 / f64::from(n)) } else { trials * p };
        let error = if circular { (expected / f64::from(n)).sqrt() } else { (trials * p * (1.0 - p)).sqrt() };
        assert!((breaks as f64 - expected).abs() < 4.0 * error + 1.0, "{block} {circular}: {breaks} breaks, expected {expected} ± {error}");
    }
}

// ---- order, variance reduction -------------------------------------------------------------------------------------------

/// Andersen's first case, ten years: the error of QE shrinks with the step.
#[test]
fn heston_converges_with_the_step() {
    let m = Variance { start: 0.04, mean: 0.04, reversion: 0.5, volatility: 1.0, correlation: -0.9 };
    let exact = heston(100.0, 100.0, 10.0, &m);
    assert!((exact - 13.085).abs() < 1e-3, "Andersen's 13.085: {exact}");
    let bias = |steps: u64| {
        let market = Market { spot: 100.0, drift: 0.0, model: Model::Heston(m), basis: None };
        let markets = Markets::new("paths", &[market], steps, 10.0, &Draws { seed: 21, antithetic: true, matched: false }).unwrap();
        let ends = last(&markets, 1 << 16);
        let pairs: Vec<f64> = ends.chunks_exact(2).map(|p| 0.5 * ((p[0] - 100.0).max(0.0) + (p[1] - 100.0).max(0.0))).collect();
        let (mean, error) = mean_and_error(pairs.iter().copied());
        (mean - exact, error)
    };
    let (coarse, fine) = (bias(5), bias(80));
    assert!(coarse.0.abs() > 4.0 * coarse.1, "steps of two years show: {coarse:?}");
    assert!(fine.0.abs() < 3.0 * fine.1 && fine.0.abs() < 0.25 * coarse.0.abs(), "steps of six weeks do not: {fine:?} after {coarse:?}");
}

#[test]
fn mirrored_and_matched_draws_reduce_the_error() {
    let model = Model::Gbm { volatility: 0.2 };
    let plain = last(&prepared(&model, None, 5, 1.0, Draws { seed: 12, ..Draws::default() }), 1 << 14);
    let mirrored = last(&prepared(&model, None, 5, 1.0, Draws { seed: 12, antithetic: true, matched: false }), 1 << 14);
    let pairs = |ends: &[f64]| mean_and_error(ends.chunks_exact(2).map(|p| 0.5 * (p[0] + p[1])).collect::<Vec<f64>>().into_iter()).1;
    // Var of the pair's mean over that of independent ones: 1 + ρ, ρ = (e^{−σ²} − 1)/(e^{σ²} − 1) = −0.9608.
    let ratio = (pairs(&mirrored) / pairs(&plain)).powi(2);
    assert!((0.03..0.05).contains(&ratio), "variance ratio {ratio}");
    for spec in DEVICES {
        let Some(device) = open(spec) else { continue };
        let mut markets = prepared(&model, Some(BASIS), 6, 1.0, Draws { seed: 12, antithetic: false, matched: true });
        let count = 5000;
        match_moments(&device, &mut markets, 10..10 + count).unwrap();
        let spot = spots(&device, &markets, 10..10 + count);
        for t in 0..6 {
            let steps = spot.chunks_exact(7).map(|s| (s[t + 1] / s[t]).ln());
            let (mean, error) = mean_and_error(steps);
            let sd = error * (count as f64 - 1.0).sqrt();
            let (want_mean, want_sd) = ((0.03 - 0.02) / 6.0, 0.2 / 6f64.sqrt());
            assert!((mean - want_mean).abs() < 1e-7 && (sd - want_sd).abs() < 1e-7, "{spec}, step {t}: {mean:e}, {sd:e}");
        }
    }
}

// ---- several assets -------------------------------------------------------------------------------------------------------

fn joint(model: &Joint, steps: u64, draws: Draws) -> Markets {
    Markets::joint("paths", &[100.0, 50.0, 20.0], &[0.0, 0.02, 0.05], model, steps, 1.0, &draws).unwrap()
}

fn correlated() -> Joint {
    Joint::gbm(vec![0.2, 0.3, 0.1], vec![1.0, 0.6, -0.3, 0.6, 1.0, 0.1, -0.3, 0.1, 1.0])
}

fn asset_spots(device: &Device, markets: &Markets, range: Range<u64>) -> (Vec<f64>, Vec<u32>) {
    let mut pass = device.pass("assets");
    let out = paths_assets(&mut pass, markets, range).unwrap();
    let (spot, events) = (pass.read(&out.spot).unwrap(), pass.read(&out.events).unwrap());
    let mut done = pass.submit().unwrap();
    (done.f64(spot).unwrap(), done.u32(events).unwrap())
}

#[test]
fn assets_agree_on_every_device_and_correlate() {
    let regimes = Joint::Regimes {
        drift: vec![0.1, 0.0, -0.1, 0.0, 0.2, 0.0],
        volatility: vec![0.1, 0.2, 0.3, 0.4, 0.3, 0.2],
        correlation: [[1.0, 0.5, 0.2, 0.5, 1.0, 0.3, 0.2, 0.3, 1.0], [1.0, -0.5, 0.0, -0.5, 1.0, 0.4, 0.0, 0.4, 1.0]].concat(),
        trans: vec![0.9, 0.1, 0.2, 0.8],
        start: vec![0.7, 0.3],
    };
    let rows = Joint::Bootstrap { log_returns: history(3 * 40), block: 4.0, circular: false };
    for model in [correlated(), regimes, rows] {
        for antithetic in [false, true] {
            let markets = joint(&model, 13, Draws { seed: 31, antithetic, matched: false });
            let (truth, events) = asset_spots(&open("reference").unwrap(), &markets, 5..75);
            for spec in DEVICES {
                for options in variants(spec) {
                    let options = OpenOptions { binding_bytes: Some(1 << 12), ..options };
                    let Some(device) = open_with(spec, &options) else { continue };
                    let got = asset_spots(&device, &markets, 5..75);
                    assert_eq!(got.1, events, "{spec}: events");
                    let most = relative(&got.0, &truth);
                    assert!(most < 1e-6, "{spec}: {most:e}");
                }
            }
        }
    }
    let (spot, _) = asset_spots(&open("cpu").unwrap(), &joint(&correlated(), 2, Draws { seed: 1, ..Draws::default() }), 0..20_000);
    let moves: Vec<[f64; 3]> = spot.chunks_exact(9).map(|s| [0, 1, 2].map(|i| (s[3 + i] / s[i]).ln())).collect();
    let n = moves.len() as f64;
    let means = [0, 1, 2].map(|i| moves.iter().map(|m| m[i]).sum::<f64>() / n);
    let product = |i: usize, j: usize| moves.iter().map(|m| (m[i] - means[i]) * (m[j] - means[j])).sum::<f64>();
    for (i, j, want) in [(0, 1, 0.6), (0, 2, -0.3), (1, 2, 0.1)] {
        let correlation = product(i, j) / (product(i, i) * product(j, j)).sqrt();
        assert!((correlation - want).abs() < 3.0 / n.sqrt(), "assets {i}, {j}: {correlation}");
    }
}

// ---- bad input --------------------------------------------------------------------------------------------------------------

#[test]
fn bad_markets_are_told_what_is_wrong() {
    let good = Market { spot: 100.0, drift: 0.0, model: Model::Gbm { volatility: 0.2 }, basis: None };
    let one = std::slice::from_ref(&good);
    let of = |model: Model| Market { model, ..good.clone() };
    let new = |markets: &[Market], steps: u64, maturity: f64| Markets::new("paths", markets, steps, maturity, &Draws::default());
    let named = |result: forback::Result<Markets>, name: &str| match error(result) {
        Error::Parameter { op: "paths", name: found, help, .. } => assert!(found.contains(name) && !help.is_empty(), "{found}, expected {name}"),
        other => panic!("{name}: {other}"),
    };
    named(new(&[], 5, 1.0), "markets");
    named(new(one, 0, 1.0), "steps");
    named(new(one, 1 << 40, 1.0), "steps");
    for maturity in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        named(new(one, 5, maturity), "maturity");
    }
    for spot in [0.0, -1.0, f64::NAN] {
        named(new(&[Market { spot, ..good.clone() }], 5, 1.0), "spot");
    }
    named(new(&[Market { drift: f64::NAN, ..good.clone() }], 5, 1.0), "drift");
    for volatility in [-0.1, f64::NAN, f64::INFINITY] {
        named(new(&[of(Model::Gbm { volatility })], 5, 1.0), "volatility");
    }
    named(new(&[of(Model::Gbm { volatility: 1e30 })], 5, 1.0), "coefficient");
    named(new(&[good.clone(), of(Model::Heston(ROUGH))], 5, 1.0), "markets");
    named(new(&[of(Model::Heston(Variance { correlation: 1.01, ..ROUGH }))], 5, 1.0), "correlation");
    named(new(&[of(Model::Heston(Variance { start: -0.01, ..ROUGH }))], 5, 1.0), "variance");
    named(new(&[of(Model::Heston(Variance { volatility: f64::NAN, ..ROUGH }))], 5, 1.0), "volatility of variance");
    named(new(&[of(Model::Merton { volatility: 0.2, jumps: Jumps { intensity: -1.0, ..JUMPS } })], 5, 1.0), "jump intensity");
    named(new(&[of(Model::Merton { volatility: 0.2, jumps: Jumps { intensity: 1e6, ..JUMPS } })], 5, 1.0), "jump intensity");
    named(new(&[of(Model::Merton { volatility: 0.2, jumps: Jumps { sd: f64::NAN, ..JUMPS } })], 5, 1.0), "jump sd");
    let regimes = |trans: Vec<f64>, start: Vec<f64>| Model::Regimes { drift: vec![0.0; 2], volatility: vec![0.1; 2], trans, start };
    named(new(&[of(regimes(vec![0.9, 0.2, 0.1, 0.9], vec![0.5, 0.5]))], 5, 1.0), "trans");
    named(new(&[of(regimes(vec![0.9, 0.1, 0.1, 0.9], vec![0.5, f64::NAN]))], 5, 1.0), "start");
    assert!(matches!(error(new(&[of(regimes(vec![1.0], vec![1.0]))], 5, 1.0)), Error::Shape { op: "paths", .. }));
    named(new(&[of(Model::Bootstrap { log_returns: vec![], block: 5.0, circular: false })], 5, 1.0), "history");
    named(new(&[of(Model::Bootstrap { log_returns: vec![0.1, f64::NAN], block: 5.0, circular: false })], 5, 1.0), "return 1");
    for (block, circular) in [(0.5, false), (f64::NAN, false), (2.5, true)] {
        named(new(&[of(Model::Bootstrap { log_returns: vec![0.1], block, circular })], 5, 1.0), "block");
    }
    named(new(&[Market { basis: Some(Basis { correlation: f64::NAN, ..BASIS }), ..good.clone() }], 5, 1.0), "basis correlation");
    let assets = |correlation: Vec<f64>| Markets::joint("paths", &[1.0; 3], &[0.0; 3], &Joint::gbm(vec![0.1; 3], correlation), 5, 1.0, &Draws::default());
    named(assets(vec![1.0, 0.9, -0.9, 0.9, 1.0, 0.9, -0.9, 0.9, 1.0]), "correlation of regime 0, pivot 2");
    named(assets(vec![1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]), "pivot 1");
    named(assets(vec![1.0, f64::NAN, 0.0, f64::NAN, 1.0, 0.0, 0.0, 0.0, 1.0]), "correlation of regime 0[1][0]");
    named(assets(vec![1.0, 0.5, 0.0, 0.4, 1.0, 0.0, 0.0, 0.0, 1.0]), "correlation of regime 0[1][0]");
    assert!(matches!(error(assets(vec![1.0])), Error::Shape { .. }));
    // What is allowed: no volatility, no jumps, no reversion.
    let still = last(&new(&[of(Model::Merton { volatility: 0.0, jumps: Jumps { intensity: 0.0, ..JUMPS } })], 5, 1.0).unwrap(), 3);
    assert_eq!(still, [100.0; 3]);
    let markets = new(&[of(Model::Heston(Variance { reversion: 0.0, volatility: 0.0, ..ROUGH }))], 5, 1.0).unwrap();
    assert!(last(&markets, 20).iter().all(|s| s.is_finite()));

    let device = open("cpu").unwrap();
    let mut pass = device.pass("bad");
    let markets = new(one, 5, 1.0).unwrap();
    for range in [0..0, Range { start: 5, end: 3 }, 0..u64::MAX] {
        assert!(matches!(error(paths(&mut pass, &markets, 0, range, None, Stored::default())), Error::Parameter { .. }));
    }
    assert!(matches!(error(paths(&mut pass, &markets, 1, 0..3, None, Stored::default())), Error::Parameter { .. }));
    assert!(matches!(error(paths(&mut pass, &markets, 0, 0..3, None, Stored { future: true, ..Stored::default() })), Error::Parameter { .. }));
    assert!(paths(&mut pass, &markets, 0, 0..1_000_000_000_000, None, Stored::default()).is_err());
    let replay = new(&[of(Model::Replay)], 5, 1.0).unwrap();
    assert!(matches!(error(paths(&mut pass, &replay, 0, 0..3, None, Stored::default())), Error::Shape { .. }));
    let short = View::from(&device.upload("given", &[1.0; 17]).unwrap());
    assert!(matches!(error(paths(&mut pass, &replay, 0, 0..3, Some(&short), Stored::default())), Error::Shape { .. }));
}

// ---- guards -----------------------------------------------------------------------------------------------------------------

/// Every kernel of the op between guards; the last workgroup is not full.
pub(super) fn guarded(g: &mut Guards) {
    let (count, t) = (67u32, 6u32);
    let bars = (count * (t + 1)) as usize;
    let params = PathsParams { paths: count, t, market: 0, first: 0, first_high: 0, store: 7 };
    for kernel in KERNELS.iter().filter(|k| k.params.name == "PathsParams" && k.args.len() == 6) {
        let kind = kernel.name.split('_').nth(1).unwrap();
        let model = models().into_iter().find(|m| m.kind().name() == kind).unwrap();
        let markets = prepared(&model, kernel.name.ends_with("_futures").then_some(BASIS), u64::from(t), 1.0, Draws::default());
        let (mut reals, mut words) = markets.parts();
        if kind == "replay" {
            words[forback::kernels::paths::word::REALS] = reals.len() as u32;
            reals.extend((0..bars).map(|i| 90.0 + (i % 9) as f32));
        }
        let (market, market_words) = (g.reals(&reals), g.words(&words));
        let [spot, variance, future] = [0; 3].map(|_| g.out(Elem::F32, bars));
        let events = g.out(Elem::U32, bars);
        g.launch(kernel, &params, &[&market, &market_words, &spot, &variance, &events, &future]);
    }
    let rows = Joint::Bootstrap { log_returns: history(3 * 40), block: 4.0, circular: false };
    for (kernel, model) in [(&PATHS_ASSETS_REGIMES, correlated()), (&PATHS_ASSETS_BOOTSTRAP, rows)] {
        let (reals, words) = joint(&model, u64::from(t), Draws::default()).parts();
        let (market, market_words) = (g.reals(&reals), g.words(&words));
        let (spot, events) = (g.out(Elem::F32, 3 * bars), g.out(Elem::U32, bars));
        g.launch(kernel, &PathsParams { market: 3, ..params }, &[&market, &market_words, &spot, &events]);
    }
    let (reals, words) = prepared(&Model::Gbm { volatility: 0.2 }, Some(BASIS), u64::from(t), 1.0, Draws::default()).parts();
    let (market, market_words, sums) = (g.reals(&reals), g.words(&words), g.out(Elem::F32, 2 * 2 * 2 * t as usize));
    g.launch(&PATHS_MOMENTS, &PathsParams { paths: 2100, store: 2, ..params }, &[&market, &market_words, &sums]);
}
