//! Option prices, greeks, implied volatilities, hedge ratios and intervals: closed forms, finite differences, each other, and every column against the
//! reference.

use super::support::{devices, reference};
use super::tape::{check, leaf};
use crate::common::{Rng, open};
use forback::kernels::black_scholes::{Greeks, TERMS, option_greeks, sensitivities};
use forback::kernels::exotic_price::{Exotic, Simulation, Style, european, exotic_prices, geometric_asian};
use forback::kernels::heston_price::{Heston, Merton, heston_prices, merton_prices};
use forback::kernels::implied_volatility::{VolatilityStatus, implied_volatilities};
use forback::kernels::map::Unary;
use forback::kernels::minimum_variance_hedge_ratio::{COLLINEAR, FLAT_FUTURES, HedgeRatio, POOLED, hedge_ratios, rolling_hedge_ratios};
use forback::kernels::paths::{Draws, Jumps, Market, Model, Variance};
use forback::kernels::{Device, Error, OpenOptions};
use forback::sim::calibrate::{HestonFitOptions, calibrate_heston, calibrate_volatility};
use forback::sim::hedge_frequency::{FrequencyRule, HedgeFrequency, Persistence, leland_number, leland_volatility, optimal_hedge_frequency};
use forback::tape::Tape;

fn columns(g: &Greeks) -> [&Vec<f64>; 6] {
    [&g.price, &g.delta, &g.gamma, &g.vega, &g.theta, &g.rho]
}

/// Random options of all four kinds.
fn options(seed: u32, n: usize) -> (Vec<f32>, Vec<u32>) {
    let mut rng = Rng::new(seed);
    let mut terms = Vec::with_capacity(TERMS * n);
    let mut between = |low: f64, high: f64| (low + (high - low) * rng.unit()) as f32;
    for _ in 0..n {
        terms.extend([between(50.0, 200.0), between(50.0, 200.0), between(0.01, 3.0), between(0.05, 0.9), between(-0.02, 0.1), between(0.0, 0.05)]);
    }
    (terms, (0..n as u32).map(|i| i % 4).collect())
}

fn names(error: Error, words: &[&str]) {
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "'{text}' does not say {words:?}");
}

// ---- Black-Scholes ------------------------------------------------------------------------------------------------------

#[test]
fn greeks_have_their_known_values() {
    let terms = [[100.0, 100.0, 1.0, 0.2, 0.0, 0.0], [100.0, 100.0, 1.0, 0.2, 0.05, 0.0]];
    let want = [[7.965_567_455_4, 0.539_827_837_3, 0.019_847_627_4, 39.695_254_747_7], [10.450_583_572_2, 0.636_830_651_2, 0.018_762_017_3, 37.524_034_691_7]];
    for (terms, want) in terms.iter().zip(want) {
        let x = sensitivities::<f64>(terms, 1);
        for (got, want) in [x.price, x.spot, x.gamma, x.volatility].iter().zip(want) {
            assert!((got - want).abs() < 6e-11, "{got} against {want}");
        }
    }
    // 0.2 is no f32: 7.5e-9 of volatility moves the price by 3e-7.
    let single: Vec<f32> = terms.iter().flatten().map(|&x| x as f32).collect();
    for device in devices() {
        let found = option_greeks(&device, &single, &[1, 1]).unwrap();
        for (row, want) in want.iter().enumerate() {
            for (got, want) in [&found.price, &found.delta, &found.gamma, &found.vega].iter().zip(want) {
                assert!((got[row] / want - 1.0).abs() < 2e-6, "{}: {} against {want}", device.info(), got[row]);
            }
        }
    }
}

#[test]
fn greeks_are_the_derivatives_of_the_price() {
    let (terms, kind) = options(1, 64);
    for (row, &kind) in kind.iter().enumerate() {
        let at: [f64; TERMS] = std::array::from_fn(|i| f64::from(terms[TERMS * row + i]));
        let x = sensitivities(&at, kind);
        for (c, slope) in [x.spot, x.strike, x.maturity, x.volatility, x.rate, x.dividend].into_iter().enumerate() {
            let moved = |h: f64| {
                let mut moved = at;
                moved[c] += h;
                sensitivities(&moved, kind)
            };
            let h = 1e-4 * at[c].abs().max(0.01);
            let first = |h: f64| (moved(h).price - moved(-h).price) / (2.0 * h);
            let want = (4.0 * first(0.5 * h) - first(h)) / 3.0;
            let size = want.abs().max(1e-3 * x.price.abs().max(1.0));
            assert!((slope - want).abs() < 1e-6 * size, "option {row} kind {kind}, by term {c}: {slope} against {want}");
        }
        let h = 1e-4 * at[0];
        let shifted = |h: f64| sensitivities(&[at[0] + h, at[1], at[2], at[3], at[4], at[5]], kind).spot;
        let want = (shifted(h) - shifted(-h)) / (2.0 * h);
        assert!((x.gamma - want).abs() < 1e-5 * want.abs().max(1e-4), "option {row}: gamma {} against {want}", x.gamma);
    }
}

/// Errors as a share of what the column is measured in. The largest seen on any device: price 3e-7, delta 4e-7, gamma 3e-6, vega 8e-7, theta 2e-6, rho 5e-7.
#[test]
fn every_column_gives_the_reference_greeks() {
    for n in [1, 63, 64, 65, 1009, 5003] {
        let (terms, kind) = options(n as u32, n);
        let want = option_greeks(&reference(), &terms, &kind).unwrap();
        for device in devices() {
            let got = option_greeks(&device, &terms, &kind).unwrap();
            for (name, (got, want)) in ["price", "delta", "gamma", "vega", "theta", "rho"].iter().zip(columns(&got).into_iter().zip(columns(&want))) {
                let vanilla = want.iter().zip(&kind).filter(|(_, k)| **k < 2).map(|(x, _)| x.abs()).fold(0.0, f64::max);
                let digital = want.iter().zip(&kind).filter(|(_, k)| **k > 1).map(|(x, _)| x.abs()).fold(0.0, f64::max);
                for i in 0..n {
                    let scale = if kind[i] < 2 { vanilla } else { digital };
                    assert!((got[i] - want[i]).abs() <= 1e-5 * scale, "{} {name}[{i}] of {n}: {} against {}", device.info(), got[i], want[i]);
                }
            }
        }
    }
}

#[test]
fn prices_do_not_depend_on_the_split() {
    let (terms, kind) = options(7, 3001);
    for name in ["cpu", "wgpu", "cuda-host"] {
        let Some(device) = open(name) else { continue };
        let whole = option_greeks(&device, &terms, &kind).unwrap();
        let small = OpenOptions { binding_bytes: Some(16 << 10), work_per_launch: Some(30_000), ..OpenOptions::default() };
        let parts = option_greeks(&Device::open_with(name, &small).unwrap(), &terms, &kind).unwrap();
        assert!(whole == parts, "{name}");
    }
}

#[test]
fn without_time_or_volatility_greeks_are_their_limits() {
    // In, at and out of the money; no time, no volatility.
    let rows = [
        ([110.0, 100.0, 0.0, 0.2, 0.05, 0.02], 1, [10.0, 1.0]),
        ([100.0, 100.0, 0.0, 0.2, 0.05, 0.02], 1, [0.0, 0.5]),
        ([90.0, 100.0, 0.0, 0.2, 0.05, 0.02], 1, [0.0, 0.0]),
        ([90.0, 100.0, 0.0, 0.2, 0.05, 0.02], 0, [10.0, -1.0]),
        ([100.0, 100.0, 0.0, 0.2, 0.05, 0.02], 0, [0.0, -0.5]),
        ([110.0, 100.0, 1.0, 0.0, 0.05, 0.0], 1, [110.0 - 100.0 * (-0.05f64).exp(), 1.0]),
        ([90.0, 100.0, 1.0, 0.0, 0.0, 0.0], 0, [10.0, -1.0]),
        ([110.0, 100.0, 1.0, 0.0, 0.05, 0.0], 3, [(-0.05f64).exp(), 0.0]),
        ([100.0, 100.0, 0.0, 0.2, 0.0, 0.0], 2, [0.5, 0.0]),
        ([90.0, 100.0, 0.0, 0.2, 0.0, 0.0], 3, [0.0, 0.0]),
    ];
    let terms: Vec<f32> = rows.iter().flat_map(|(x, _, _)| x.map(|x: f64| x as f32)).collect();
    let kind: Vec<u32> = rows.iter().map(|r| r.1).collect();
    for device in devices().into_iter().chain([reference()]) {
        let got = option_greeks(&device, &terms, &kind).unwrap();
        assert!(columns(&got).iter().all(|x| x.iter().all(|x| x.is_finite())), "{got:?}");
        for (i, (_, _, want)) in rows.iter().enumerate() {
            assert!((got.price[i] - want[0]).abs() < 2e-5 && (got.delta[i] - want[1]).abs() < 1e-6, "row {i}: {} {}", got.price[i], got.delta[i]);
            assert!(got.gamma[i] == 0.0, "row {i}");
        }
        // The limits are met from above.
        let near = option_greeks(&device, &[110.0, 100.0, 1e-6, 0.2, 0.0, 0.0], &[1]).unwrap();
        assert!((near.price[0] - 10.0).abs() < 1e-5 && (near.delta[0] - 1.0).abs() < 1e-6);
    }
}

#[test]
fn wrong_terms_are_named() {
    let good = [100.0f32, 100.0, 1.0, 0.2, 0.0, 0.0];
    let device = open("cpu").unwrap();
    for (c, value, name) in [
        (0, -1.0, "spot[1]"),
        (0, f32::NAN, "spot[1]"),
        (1, 0.0, "strike[1]"),
        (2, -0.1, "maturity[1]"),
        (3, f32::INFINITY, "volatility[1]"),
        (4, 90.0, "rate[1]"),
    ] {
        let mut bad = good;
        bad[c] = value;
        names(option_greeks(&device, &[good, bad].concat(), &[1, 1]).unwrap_err(), &["black_scholes", name]);
    }
    names(option_greeks(&device, &good, &[4]).unwrap_err(), &["kind[0]", "4"]);
    names(option_greeks(&device, &good[..5], &[1]).unwrap_err(), &["terms", "[N,6]"]);
    assert_eq!(option_greeks(&device, &[], &[]).unwrap(), Greeks::default());
}

// ---- implied volatility -------------------------------------------------------------------------------------------------

/// σ at which f64 Black-Scholes gives the price, by bisection; the price's own rounding is what it cannot undo.
fn bisected(quote: &[f32], kind: u32) -> f64 {
    let at: Vec<f64> = quote.iter().map(|&x| f64::from(x)).collect();
    let (mut low, mut high) = (1e-9, 1e3);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        let x = sensitivities(&[at[0], at[1], at[2], middle, at[4], at[5]], kind);
        if x.price < at[3] { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

#[test]
fn implied_volatilities_over_the_whole_plane() {
    let (mut quotes, mut kinds, mut wants) = (Vec::new(), Vec::new(), Vec::new());
    for &(t, r, q) in &[(1.0f32, 0.0f32, 0.0f32), (0.004, 0.03, 0.01), (7.0, 0.05, 0.0)] {
        for moneyness in [-3.0f32, -1.0, -0.3, -0.1, -0.02, -1e-3, 0.0, 1e-3, 0.02, 0.1, 0.3, 1.0, 3.0] {
            for total in [0.002f32, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 6.0] {
                for kind in [0, 1] {
                    let (s, k) = (100.0f32, 100.0 * moneyness.exp());
                    let sigma = total / t.sqrt();
                    let at = [s, k, t, sigma, r, q].map(f64::from);
                    let price = sensitivities(&at, kind).price as f32;
                    quotes.extend([s, k, t, price, r, q]);
                    kinds.push(kind);
                    wants.push(f64::from(sigma));
                }
            }
        }
    }
    for device in devices().into_iter().chain([reference()]) {
        let (got, status) = implied_volatilities(&device, &quotes, &kinds).unwrap();
        let (mut solved, mut worst) = (0, 0.0f64);
        for (i, quote) in quotes.chunks_exact(6).enumerate() {
            assert!(got[i].is_finite());
            if status[i] != VolatilityStatus::Ok {
                assert!(got[i] == 0.0 && matches!(status[i], VolatilityStatus::AtIntrinsic | VolatilityStatus::AboveBound | VolatilityStatus::BelowIntrinsic));
                continue;
            }
            solved += 1;
            let want = bisected(quote, kinds[i]);
            let x = sensitivities(&[quote[0], quote[1], quote[2], want as f32, quote[4], quote[5]].map(f64::from), kinds[i]);
            // Three ulps of the largest price in the quote, over vega: an in-the-money quote is no better. Largest seen otherwise: 3.3e-5.
            let rounding = 3.0 * f64::from(f32::EPSILON) * f64::from(quote[0].max(quote[1])) / x.volatility.max(1e-30);
            let over = if kinds[i] == 1 { quote[0] > quote[1] } else { quote[0] < quote[1] };
            let allowed = 5e-5 * want + if over || quote[3] > 0.5 * quote[0].min(quote[1]) { rounding } else { 0.0 };
            worst = worst.max((got[i] - want).abs() / want);
            assert!((got[i] - want).abs() <= allowed, "{}: {quote:?} kind {}: {} against {want}, allowed {allowed:e}", device.info(), kinds[i], got[i]);
        }
        assert!(solved * 10 > 5 * kinds.len(), "{}: only {solved} of {} were solved", device.info(), kinds.len());
        println!("{}: {solved} of {} solved, largest relative error {worst:.2e}", device.info(), kinds.len());
    }
}

#[test]
fn statuses_say_what_is_wrong() {
    use VolatilityStatus::*;
    let rows = [
        ([100.0f32, 90.0, 1.0, 9.0, 0.0, 0.0], 1, BelowIntrinsic),
        ([100.0, 90.0, 1.0, -1.0, 0.0, 0.0], 0, BelowIntrinsic),
        ([100.0, 90.0, 1.0, 100.5, 0.0, 0.0], 1, AboveBound),
        ([100.0, 90.0, 1.0, 100.0, 0.0, 0.0], 1, AboveBound),
        ([100.0, 90.0, 1.0, 91.0, 0.0, 0.0], 0, AboveBound),
        ([100.0, 90.0, 0.0, 12.0, 0.0, 0.0], 1, Expired),
        ([100.0, 90.0, -1.0, 12.0, 0.0, 0.0], 1, Expired),
        ([100.0, 90.0, 1.0, f32::NAN, 0.0, 0.0], 1, NotFinite),
        ([f32::INFINITY, 90.0, 1.0, 12.0, 0.0, 0.0], 1, NotFinite),
        ([100.0, 0.0, 1.0, 12.0, 0.0, 0.0], 1, NotFinite),
        ([-100.0, 90.0, 1.0, 12.0, 0.0, 0.0], 1, NotFinite),
        ([100.0, 90.0, 1.0, 10.0, 0.0, 0.0], 1, AtIntrinsic),
        ([100.0, 90.0, 1.0, 0.0, 0.0, 0.0], 0, AtIntrinsic),
        ([100.0, 90.0, 1.0, 12.0, 0.0, 0.0], 1, Ok),
    ];
    let quotes: Vec<f32> = rows.iter().flat_map(|r| r.0).collect();
    let kind: Vec<u32> = rows.iter().map(|r| r.1).collect();
    for device in devices().into_iter().chain([reference()]) {
        let (volatility, status) = implied_volatilities(&device, &quotes, &kind).unwrap();
        for (i, (_, _, want)) in rows.iter().enumerate() {
            assert_eq!(status[i], *want, "{} row {i}", device.info());
            assert!(volatility[i].is_finite() && (volatility[i] > 0.0) == (*want == Ok), "row {i}: {}", volatility[i]);
        }
    }
    names(implied_volatilities(&reference(), &quotes[..6], &[2]).unwrap_err(), &["kind[0]", "digital"]);
}

// ---- Heston, Bates, Merton ----------------------------------------------------------------------------------------------

fn plain(rows: &[[f32; 5]]) -> Vec<f32> {
    rows.concat()
}

#[test]
fn without_volatility_of_variance_heston_is_black_scholes() {
    let rows = [[100.0, 80.0, 0.5, 0.03, 0.01], [100.0, 100.0, 0.02, 0.0, 0.0], [100.0, 150.0, 3.0, 0.05, 0.02], [100.0, 100.0, 0.0, 0.05, 0.02]];
    for device in devices().into_iter().chain([reference()]) {
        for kind in [0, 1] {
            for sigma in [0.0, 1e-4] {
                let got = heston_prices(&device, &plain(&rows), &[kind; 4], &[Heston::new(0.04, 1.5, 0.04, sigma, -0.5)]).unwrap();
                for (got, x) in got.iter().zip(rows) {
                    let volatility = f64::from(0.04f32).sqrt();
                    let terms = [x[0], x[1], x[2], 0.0, x[3], x[4]].map(f64::from);
                    let want = sensitivities(&[terms[0], terms[1], terms[2], volatility, terms[4], terms[5]], kind).price;
                    // 1e-4 of volatility of variance is worth 4.03e-4 over three years (a put costs 38.656_577 by 40 digits), less elsewhere.
                    assert!((got - want).abs() < if sigma > 0.0 { 4.6e-4 } else { 5e-5 }, "{} {x:?} kind {kind}: {got} against {want}", device.info());
                    if sigma > 0.0 && x[2] == 3.0 && kind == 0 {
                        assert!((got - 38.656_577).abs() < 5e-5, "{}: {got}", device.info());
                    }
                }
            }
        }
    }
}

/// Bates without variance of the variance is Merton: a Fourier integral against a series.
#[test]
fn bates_agrees_with_mertons_series() {
    let rows = [
        [100.0, 70.0, 0.5, 0.03, 0.01],
        [100.0, 100.0, 0.1, 0.0, 0.0],
        [100.0, 140.0, 2.0, 0.05, 0.02],
        [100.0, 101.0, 0.01, 0.02, 0.0],
        [50.0, 60.0, 1.0, 0.0, 0.0],
    ];
    for (intensity, jump_mean, jump_sd) in [(0.5, -0.1, 0.15), (3.0, 0.05, 0.1), (1.0, -0.3, 0.0), (20.0, -0.02, 0.03)] {
        let bates = Heston { intensity, jump_mean, jump_sd, ..Heston::new(0.0225, 1.0, 0.0225, 0.0, 0.0) };
        let merton = Merton { volatility: 0.15, intensity, jump_mean, jump_sd };
        for (device, allowed) in devices().into_iter().map(|d| (d, 1e-4)).chain([(reference(), 3e-7)]) {
            for kind in [0, 1] {
                let fourier = heston_prices(&device, &plain(&rows), &[kind; 5], &[bates]).unwrap();
                let series = merton_prices(&device, &plain(&rows), &[kind; 5], &[merton]).unwrap();
                for (i, (a, b)) in fourier.iter().zip(&series).enumerate() {
                    assert!((a - b).abs() < allowed, "{} {:?} λ {intensity}: {a} against {b}", device.info(), rows[i]);
                }
            }
        }
    }
}

#[test]
fn heston_on_every_device_many_models_at_once() {
    let mut rng = Rng::new(5);
    let mut between = |low: f64, high: f64| low + (high - low) * rng.unit();
    for (n, m) in [(1, 1), (7, 3), (67, 5)] {
        let terms: Vec<f32> =
            (0..n).flat_map(|_| [100.0, between(50.0, 180.0), between(0.02, 5.0), between(0.0, 0.05), between(0.0, 0.03)]).map(|x| x as f32).collect();
        let models: Vec<Heston> =
            (0..m).map(|_| Heston::new(between(0.01, 0.2), between(0.3, 10.0), between(0.01, 0.2), between(0.05, 2.0), between(-0.95, 0.5))).collect();
        let kind: Vec<u32> = (0..n as u32).map(|i| i % 2).collect();
        let want = heston_prices(&reference(), &terms, &kind, &models).unwrap();
        assert_eq!(want.len(), n * m);
        let other: Vec<u32> = kind.iter().map(|k| 1 - k).collect();
        let mirrored = heston_prices(&reference(), &terms, &other, &models).unwrap();
        for (i, x) in terms.chunks_exact(5).cycle().take(n * m).enumerate() {
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let parity = x[0] * (-x[4] * x[2]).exp() - x[1] * (-x[3] * x[2]).exp();
            let gap = if kind[i % n] == 1 { want[i] - mirrored[i] } else { mirrored[i] - want[i] };
            assert!((gap - parity).abs() < 1e-9, "parity: {gap} against {parity}");
        }
        for device in devices() {
            let got = heston_prices(&device, &terms, &kind, &models).unwrap();
            for i in 0..n * m {
                // Largest seen: 4e-5, 4e-7 of spot.
                assert!((got[i] - want[i]).abs() < 2e-4, "{} [{i}]: {} against {}", device.info(), got[i], want[i]);
            }
        }
    }
}

#[test]
fn wrong_models_are_named() {
    let device = open("cpu").unwrap();
    let terms = [100.0f32, 100.0, 1.0, 0.0, 0.0];
    let good = Heston::new(0.04, 1.0, 0.04, 0.5, -0.7);
    assert!(!Heston { vol_of_vol: 0.5, ..good }.is_feller() && Heston { vol_of_vol: 0.2, ..good }.is_feller());
    let bad = [
        (Heston { variance: -0.1, ..good }, "variance[1]"),
        (Heston { reversion: 0.0, ..good }, "reversion[1]"),
        (Heston { correlation: 1.5, ..good }, "correlation[1]"),
        (Heston { intensity: -1.0, ..good }, "intensity[1]"),
        (Heston { mean: f64::NAN, ..good }, "mean[1]"),
    ];
    for (model, name) in bad {
        names(heston_prices(&device, &terms, &[1], &[good, model]).unwrap_err(), &[name]);
    }
    names(heston_prices(&device, &[100.0, -1.0, 1.0, 0.0, 0.0], &[1], &[good]).unwrap_err(), &["strike[0]"]);
    names(heston_prices(&device, &terms, &[3], &[good]).unwrap_err(), &["kind[0]"]);
    let merton = Merton { volatility: 0.2, intensity: 500.0, jump_mean: 0.0, jump_sd: 0.1 };
    names(merton_prices(&device, &terms, &[1], &[merton]).unwrap_err(), &["intensity[0]", "80 jumps"]);
    // No jumps at all is legal.
    let none = Merton { intensity: 0.0, ..merton };
    assert!((merton_prices(&device, &terms, &[1], &[none]).unwrap()[0] - 7.965_567).abs() < 1e-5);
}

#[test]
fn heston_is_found_again_from_its_own_surface() {
    use forback::data::options::SurfacePoint;
    let truth = Heston::new(0.05, 3.0, 0.08, 0.6, -0.6);
    let device = reference();
    let mut points = Vec::new();
    for maturity in [0.1, 0.5, 2.0] {
        for strike in [80.0, 90.0, 100.0, 110.0, 125.0] {
            points.push(SurfacePoint { spot: 100.0, strike, maturity, rate: 0.02, dividend: 0.01, volatility: 0.2 });
        }
    }
    let terms: Vec<f32> = points.iter().flat_map(|p| [p.spot, p.strike, p.maturity, p.rate, p.dividend].map(|x| x as f32)).collect();
    let prices = heston_prices(&device, &terms, &[1; 15], &[truth]).unwrap();
    for (p, price) in points.iter_mut().zip(prices) {
        let quote = [p.spot, p.strike, p.maturity, price, p.rate, p.dividend].map(|x| x as f32);
        p.volatility = implied_volatilities(&device, &quote, &[1]).unwrap().0[0];
    }
    for device in [reference(), open("cpu").unwrap()] {
        let fit = calibrate_heston(&device, &points, &HestonFitOptions::default()).unwrap();
        assert!(fit.rmse < 2e-3, "{fit:?}");
        let (got, want) = (fit.model, truth);
        for (got, want) in [(got.variance, want.variance), (got.mean, want.mean), (got.correlation, want.correlation), (got.vol_of_vol, want.vol_of_vol)] {
            assert!((got - want).abs() < 0.02 * want.abs(), "{fit:?}");
        }
    }
    points[3].volatility = f64::NAN;
    names(calibrate_heston(&device, &points, &HestonFitOptions::default()).unwrap_err(), &["volatility[3]"]);
    names(calibrate_heston(&device, &points[..2], &HestonFitOptions::default()).unwrap_err(), &["points"]);
}

// ---- the tape -----------------------------------------------------------------------------------------------------------

#[test]
fn gradients_of_black_scholes() {
    for n in [1usize, 5, 66, 131] {
        let mut rng = Rng::new(n as u32);
        let kinds: Vec<u32> = (0..n as u32).map(|i| i % 4).collect();
        check(&format!("black_scholes [{n}]"), vec![leaf(&mut rng, &[n, TERMS])], 2e-5, |tape, x| {
            // Spot and strike about 1, maturity and volatility about a half, rates of some percent.
            let mut columns = Vec::new();
            for (c, (scale, shift, positive)) in
                [(0.1, 0.0, true), (0.1, 0.0, true), (0.1, -0.7, true), (0.1, -0.7, true), (0.02, 0.02, false), (0.02, 0.01, false)].into_iter().enumerate()
            {
                let column = tape.slice(x[0], 1, c..c + 1)?;
                let column = tape.affine(column, scale, shift)?;
                columns.push(if positive { tape.unary(Unary::Exp, column)? } else { column });
            }
            let terms = tape.concat(&columns, 1)?;
            let kind = tape.input(&tape.device().upload_u32("kind", &kinds)?, &[n])?;
            Ok(vec![tape.black_scholes(terms, kind)?])
        });
    }
    let device = open("cpu").unwrap();
    let mut tape = Tape::new(&device);
    let terms = tape.variable(&device.zeros("terms", 12).unwrap(), &[2, 6]).unwrap();
    let (reals, words) = (tape.input(&device.zeros("kind", 2).unwrap(), &[2]).unwrap(), tape.input(&device.zeros_u32("kind", 3).unwrap(), &[3]).unwrap());
    names(tape.black_scholes(terms, reals).unwrap_err(), &["black_scholes", "kind", "words"]);
    names(tape.black_scholes(terms, words).unwrap_err(), &["kind", "[2]"]);
    names(tape.black_scholes(words, words).unwrap_err(), &["terms", "[N,6]"]);
}

/// Price as the mean of discounted payoffs over simulated paths, its gradients by spot and volatility through the tape: delta and vega of the closed form.
#[test]
fn pathwise_greeks_through_the_tape() {
    const PATHS: usize = 20_000;
    const STEPS: usize = 4;
    let (strike, maturity, rate) = (105.0f32, 0.75f32, 0.03f32);
    let mut rng = Rng::new(99);
    let z: Vec<f32> = (0..PATHS * STEPS).map(|_| rng.normal() as f32).collect();
    let want = sensitivities(&[100.0, 105.0, 0.75, f64::from(0.25f32), f64::from(rate), 0.0], 1);
    for name in ["reference", "cpu", "wgpu", "cuda-host"] {
        let Some(device) = open(name) else { continue };
        let mut tape = Tape::new(&device);
        let spot = tape.variable(&device.upload("spot", &[100.0]).unwrap(), &[1]).unwrap();
        let volatility = tape.variable(&device.upload("volatility", &[0.25]).unwrap(), &[1]).unwrap();
        let price = (|| {
            let normals = tape.input(&device.upload("normals", &z)?, &[PATHS, STEPS])?;
            let dt = maturity / STEPS as f32;
            let variance = tape.unary(Unary::Square, volatility)?;
            let drift = tape.affine(variance, -0.5 * dt, rate * dt)?;
            let width = tape.affine(volatility, dt.sqrt(), 0.0)?;
            let steps = tape.mul(normals, width)?;
            let steps = tape.add(steps, drift)?;
            let log = tape.sum(steps, &[1])?;
            let growth = tape.unary(Unary::Exp, log)?;
            let end = tape.mul(growth, spot)?;
            let over = tape.affine(end, 1.0, -strike)?;
            let payoff = tape.unary(Unary::Relu, over)?;
            let paid = tape.affine(payoff, (-rate * maturity).exp(), 0.0)?;
            tape.mean(paid, &[0])
        })()
        .unwrap();
        tape.backward(price).unwrap();
        let mut pass = device.pass("pathwise");
        let plan = tape.record(&mut pass, &[price]).unwrap();
        let reads = [plan.view(price).unwrap(), plan.grad(spot).unwrap(), plan.grad(volatility).unwrap()].map(|view| pass.read(view).unwrap());
        let mut done = pass.submit().unwrap();
        let got = reads.map(|read| done.f64(read).unwrap()[0]);
        // Their standard errors, from the same paths on the host.
        let mut sums = [[0.0; 2]; 3];
        for z in z.chunks_exact(STEPS) {
            let w: f64 = z.iter().map(|&z| f64::from(z)).sum::<f64>() * (0.75 / STEPS as f64).sqrt();
            let end = 100.0 * ((f64::from(rate) - 0.03125) * 0.75 + 0.25 * w).exp();
            let inside = if end > 105.0 { (-f64::from(rate) * 0.75).exp() } else { 0.0 };
            for (sum, x) in sums.iter_mut().zip([inside * (end - 105.0), inside * end / 100.0, inside * end * (w - 0.25 * 0.75)]) {
                sum[0] += x;
                sum[1] += x * x;
            }
        }
        let n = PATHS as f64;
        for (i, (got, want)) in got.iter().zip([want.price, want.spot, want.volatility]).enumerate() {
            let (mean, square) = (sums[i][0] / n, sums[i][1] / n);
            let error = ((square - mean * mean) / n).sqrt();
            assert!((got - want).abs() < 3.0 * error, "{name} {i}: {got} against {want}, standard error {error}");
            assert!((got - mean).abs() < 1e-5 * mean.abs(), "{name} {i}: {got} against the same paths in f64, {mean}");
        }
    }
}

// ---- hedge ratios -------------------------------------------------------------------------------------------------------

/// Least-squares slopes of spot on the futures, by elimination.
fn slopes(spot: &[f64], futures: &[Vec<f64>]) -> Vec<f64> {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let covariance = |x: &[f64], y: &[f64]| {
        let (a, b) = (mean(x), mean(y));
        x.iter().zip(y).map(|(x, y)| (x - a) * (y - b)).sum::<f64>()
    };
    let m = futures.len();
    let mut rows: Vec<Vec<f64>> =
        (0..m).map(|i| (0..m).map(|j| covariance(&futures[i], &futures[j])).chain([covariance(&futures[i], spot)]).collect()).collect();
    for i in 0..m {
        for r in 0..m {
            if r != i {
                let factor = rows[r][i] / rows[i][i];
                for c in 0..=m {
                    let x = rows[i][c];
                    rows[r][c] -= factor * x;
                }
            }
        }
    }
    (0..m).map(|i| rows[i][m] / rows[i][i]).collect()
}

#[test]
fn one_regime_gives_the_least_squares_slopes() {
    for (batch, steps, n, m) in [(1u64, 2u64, 1u64, 1u64), (1, 64, 1, 1), (3, 65, 2, 3), (5, 130, 1, 8), (2, 1009, 3, 2)] {
        let mut rng = Rng::new((batch * 100 + steps) as u32);
        let futures = rng.returns((batch * steps * m) as usize, 1e-3, 0.01);
        let spot: Vec<f32> = (0..(batch * steps * n) as usize)
            .map(|i| {
                let (row, s) = (i / n as usize, i % n as usize);
                let load: f32 = (0..m as usize).map(|j| futures[row * m as usize + j] * (0.3 + 0.1 * (j + s) as f32)).sum();
                load + if steps > 2 { 0.003 * rng.normal() as f32 } else { 0.0 }
            })
            .collect();
        let op = HedgeRatio::new(batch, steps, 1, n, m);
        for (device, allowed) in devices().into_iter().map(|d| (d, 2e-4)).chain([(reference(), 1e-6)]) {
            let got = hedge_ratios(&device, &op, &spot, &futures, None, None).unwrap();
            assert_eq!(got.ratio, got.per_regime, "one regime is the mixture");
            if steps <= m {
                continue;
            }
            for b in 0..batch as usize {
                let column = |x: &[f32], width: usize, c: usize| -> Vec<f64> {
                    x[b * steps as usize * width..(b + 1) * steps as usize * width].chunks_exact(width).map(|r| f64::from(r[c])).collect()
                };
                let f: Vec<Vec<f64>> = (0..m as usize).map(|j| column(&futures, m as usize, j)).collect();
                for s in 0..n as usize {
                    let want = slopes(&column(&spot, n as usize, s), &f);
                    for j in 0..m as usize {
                        let h = got.ratio[(b * m as usize + j) * n as usize + s];
                        assert!((h - want[j]).abs() < allowed * want[j].abs().max(1.0), "{} {b} {j} {s}: {h} against {}", device.info(), want[j]);
                    }
                    let r2 = got.effectiveness[b * n as usize + s];
                    assert!((0.0..=1.0 + 1e-5).contains(&r2), "{r2}");
                }
            }
            assert!(got.flags.iter().all(|&flag| flag == 0), "{:?}", got.flags);
        }
    }
}

/// Two regimes with (covariance, variance) = (1, 1) and (8, 16), equally likely: 9/17, not the average 0.75 of 1 and 0.5.
#[test]
fn the_mixture_is_a_ratio_of_averages() {
    let (mut spot, mut futures, mut probs) = (Vec::new(), Vec::new(), Vec::new());
    for (f, s, first) in [(1.0f32, 1.0f32, 1.0f32), (-1.0, -1.0, 1.0), (4.0, 2.0, 0.0), (-4.0, -2.0, 0.0)] {
        spot.push(s);
        futures.push(f);
        probs.extend([first, 1.0 - first]);
    }
    // A last step without a return of its own in either regime: only its probabilities count.
    spot.push(0.0);
    futures.push(0.0);
    probs.extend([1e-7f32, 1e-7]);
    for device in devices().into_iter().chain([reference()]) {
        let op = HedgeRatio::new(1, 5, 2, 1, 1);
        let got = hedge_ratios(&device, &op, &spot, &futures, Some(&probs), None).unwrap();
        assert!((got.ratio[0] - 9.0 / 17.0).abs() < 1e-6, "{got:?}");
        assert!((got.per_regime[0] - 1.0).abs() < 1e-6 && (got.per_regime[1] - 0.5).abs() < 1e-6);
        // Var_S = (1 + 4)/2, and cov²/var = 4.5²/8.5.
        assert!((got.effectiveness[0] - 4.5 * 4.5 / 8.5 / 2.5).abs() < 1e-6);
        let average = hedge_ratios(&device, &HedgeRatio { average_of_ratios: true, ..op }, &spot, &futures, Some(&probs), None).unwrap();
        assert!((average.ratio[0] - 0.75).abs() < 1e-6 && average.effectiveness[0] < got.effectiveness[0]);
        // Futures twice as large need half the ratio.
        let double: Vec<f32> = futures.iter().map(|x| 2.0 * x).collect();
        let half = hedge_ratios(&device, &op, &spot, &double, Some(&probs), None).unwrap();
        assert!((half.ratio[0] - 4.5 / 17.0).abs() < 1e-6);
    }
}

#[test]
fn what_cannot_be_hedged_is_flagged() {
    let mut rng = Rng::new(3);
    let x = rng.returns(50, 0.0, 0.01);
    let pairs = |second: &dyn Fn(f32) -> f32| -> Vec<f32> { x.iter().flat_map(|&x| [x, second(x)]).collect() };
    for device in devices().into_iter().chain([reference()]) {
        let flat = hedge_ratios(&device, &HedgeRatio::new(1, 50, 1, 1, 1), &x, &[0.3; 50], None, None).unwrap();
        assert!(flat.ratio[0] == 0.0 && flat.flags == [FLAT_FUTURES; 2] && flat.effectiveness[0] == 0.0, "{flat:?}");
        let same = hedge_ratios(&device, &HedgeRatio::new(1, 50, 1, 1, 2), &x, &pairs(&|x| 2.0 * x), None, None).unwrap();
        assert!((same.ratio[0] - 1.0).abs() < 1e-5 && same.ratio[1] == 0.0 && same.flags == [COLLINEAR; 2], "{same:?}");
        let with_flat = hedge_ratios(&device, &HedgeRatio::new(1, 50, 1, 1, 2), &x, &pairs(&|_| 0.5), None, None).unwrap();
        assert!((with_flat.ratio[0] - 1.0).abs() < 1e-5 && with_flat.ratio[1] == 0.0 && with_flat.flags[1] == FLAT_FUTURES, "{with_flat:?}");
        let probs: Vec<f32> = (0..50).flat_map(|_| [1.0, 0.0]).collect();
        let empty = hedge_ratios(&device, &HedgeRatio::new(1, 50, 2, 1, 1), &x, &x, Some(&probs), None).unwrap();
        assert!(empty.flags == [0, POOLED, 0] && (empty.per_regime[1] - 1.0).abs() < 1e-6, "{empty:?}");
        // Garbage past the length changes no bit.
        let mut longer = x.clone();
        longer[40..].fill(7.0);
        let op = HedgeRatio::new(1, 50, 1, 1, 1);
        let (cut, other) =
            (hedge_ratios(&device, &op, &x, &x, None, Some(&[40])).unwrap(), hedge_ratios(&device, &op, &longer, &x, None, Some(&[40])).unwrap());
        assert_eq!(cut, other);
    }
    let (device, op) = (open("cpu").unwrap(), HedgeRatio::new(1, 50, 1, 1, 1));
    names(hedge_ratios(&device, &op, &x, &x, None, Some(&[1])).unwrap_err(), &["lengths[0]", "two returns"]);
    let mut holes = x.clone();
    holes[17] = f32::NAN;
    names(hedge_ratios(&device, &op, &x, &holes, None, None).unwrap_err(), &["futures[17]"]);
    names(hedge_ratios(&device, &op, &x, &x, Some(&[-1.0; 50]), None).unwrap_err(), &["probs[0]"]);
    names(hedge_ratios(&device, &HedgeRatio::new(1, 1, 1, 1, 1), &x[..1], &x[..1], None, None).unwrap_err(), &["steps"]);
    names(hedge_ratios(&device, &HedgeRatio::new(1, 5, 1, 1, 9), &x[..5], &x[..45], None, None).unwrap_err(), &["futures", "8"]);
    names(hedge_ratios(&device, &op, &x[..49], &x, None, None).unwrap_err(), &["spot", "50"]);
}

#[test]
fn rolling_windows_are_a_batch_of_them() {
    let mut rng = Rng::new(8);
    let (n, m, steps, window, shift) = (2u64, 2u64, 203u64, 60u64, 7u64);
    let (spot, futures, probs) = (rng.returns(406, 0.0, 0.01), rng.returns(406, 0.0, 0.02), (0..406).map(|_| rng.unit() as f32).collect::<Vec<_>>());
    let windows = (steps - window) / shift + 1;
    let gather = |x: &[f32]| -> Vec<f32> { (0..windows).flat_map(|w| x[(w * shift * 2) as usize..((w * shift + window) * 2) as usize].to_vec()).collect() };
    for name in ["reference", "cpu", "wgpu", "cuda-host"] {
        let Some(device) = open(name) else { continue };
        let rolled = rolling_hedge_ratios(&device, &HedgeRatio::new(1, steps, 2, n, m), window, shift, &spot, &futures, Some(&probs)).unwrap();
        let batch = hedge_ratios(&device, &HedgeRatio::new(windows, window, 2, n, m), &gather(&spot), &gather(&futures), Some(&gather(&probs)), None).unwrap();
        assert_eq!(rolled, batch, "{name}");
        // In parts.
        let small = OpenOptions { binding_bytes: Some(4 << 10), work_per_launch: Some(60_000), ..OpenOptions::default() };
        let device = Device::open_with(name, &small).unwrap();
        let parts = rolling_hedge_ratios(&device, &HedgeRatio::new(1, steps, 2, n, m), window, shift, &spot, &futures, Some(&probs)).unwrap();
        assert_eq!(rolled, parts, "{name}");
        names(rolling_hedge_ratios(&device, &HedgeRatio::new(1, steps, 2, n, m), 300, 1, &spot, &futures, None).unwrap_err(), &["window", "300"]);
    }
}

// ---- how often ----------------------------------------------------------------------------------------------------------

#[test]
fn hedge_intervals_have_their_known_values() {
    let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-8, "{got} against {want}");
    let leland = leland_number(0.005, 0.2, 1.0 / 52.0);
    near(leland, 0.287_681_369_6);
    near(leland_volatility(0.2, leland, false).unwrap(), 0.226_952_098_0);
    near(leland_volatility(0.2, leland, true).unwrap(), 0.168_797_941_9);
    let much = leland_number(0.01, 0.2, 1.0 / 365.0);
    assert!((much - 1.524).abs() < 1e-3);
    names(leland_volatility(0.2, much, true).unwrap_err(), &["leland number", "long gamma"]);
    let budget = optimal_hedge_frequency(&HedgeFrequency::new(0.2, 0.001, 0.02, 100.0, FrequencyRule::Budget { leland: 0.1 })).unwrap();
    near(budget.years, 0.006_366_197_7);
    near(budget.leland, 0.1);
    assert!((budget.periods - 1.604).abs() < 1e-3);
    let rule = FrequencyRule::Balance { risk_aversion: 1.0 };
    let base = HedgeFrequency::new(0.2, 0.001, 0.019_847_627_4, 100.0, rule);
    let balance = optimal_hedge_frequency(&base).unwrap();
    assert!((balance.years - 0.010_033_389_0).abs() < 1e-10 && (balance.periods - 2.528).abs() < 1e-3, "{balance:?}");
    // It is the minimum of what it balances.
    let dollar = base.gamma * 1e4;
    let loss = |dt: f64| 0.001 * dollar * 0.2 * (2.0 / std::f64::consts::PI / dt).sqrt() + 0.25 * dollar * dollar * 0.2f64.powi(4) * dt;
    assert!(loss(balance.years) < loss(0.99 * balance.years) && loss(balance.years) < loss(1.01 * balance.years));
    // Regimes: between those of each, and no longer than they last.
    let two = HedgeFrequency { volatility: vec![0.1, 0.3], probabilities: vec![0.5, 0.5], ..base.clone() };
    let years = |x: &HedgeFrequency| optimal_hedge_frequency(x).unwrap().years;
    let alone = |v: f64| years(&HedgeFrequency { volatility: vec![v], ..base.clone() });
    assert!(alone(0.3) < years(&two) && years(&two) < alone(0.1));
    let short = HedgeFrequency { persistence: Some(Persistence::Probability(vec![0.0, 0.2])), ..two.clone() };
    near(years(&short), 1.125 / 252.0);
    near(years(&HedgeFrequency { persistence: Some(Persistence::Duration(vec![1.0, 1.25])), ..two.clone() }), 1.125 / 252.0);
    near(years(&HedgeFrequency { persistence: Some(Persistence::Duration(vec![1e6, 1e6])), ..two.clone() }), years(&two));
    assert_eq!(years(&HedgeFrequency { cost: 0.0, ..base.clone() }), base.shortest);
    assert_eq!(years(&HedgeFrequency { gamma: 0.0, ..base.clone() }), base.longest);
    names(optimal_hedge_frequency(&HedgeFrequency { volatility: vec![0.0], ..base.clone() }).unwrap_err(), &["volatility[0]"]);
    names(
        optimal_hedge_frequency(&HedgeFrequency { persistence: Some(Persistence::Probability(vec![1.0])), ..base.clone() }).unwrap_err(),
        &["persistence[0]"],
    );
    names(optimal_hedge_frequency(&HedgeFrequency { rule: FrequencyRule::Balance { risk_aversion: 0.0 }, ..base }).unwrap_err(), &["risk_aversion"]);
}

#[test]
fn volatility_of_a_history() {
    let mut rng = Rng::new(12);
    let mut prices = vec![100.0f32];
    for _ in 0..2520 {
        let last = f64::from(prices[prices.len() - 1]);
        prices.push((last * (0.0003 + 0.01 * rng.normal()).exp()) as f32);
    }
    let fit = calibrate_volatility(&prices, 252.0).unwrap();
    assert!((fit.volatility - 0.01 * 252f64.sqrt()).abs() < 3.0 * fit.error && fit.returns == 2520, "{} ± {}", fit.volatility, fit.error);
    names(calibrate_volatility(&[1.0, 2.0], 252.0).unwrap_err(), &["prices", "three"]);
    names(calibrate_volatility(&[1.0, -2.0, 1.0], 252.0).unwrap_err(), &["prices[1]"]);
    names(calibrate_volatility(&prices, 0.0).unwrap_err(), &["periods_per_year"]);
}

// ---- barriers and averages ----------------------------------------------------------------------------------------------

fn gbm() -> Market {
    Market { spot: 100.0, drift: 0.03, model: Model::Gbm { volatility: 0.25 }, basis: None }
}

fn simulation(paths: u64, steps: u64, antithetic: bool) -> Simulation {
    Simulation { paths, steps, maturity: 0.5, rate: 0.05, draws: Draws { seed: 7, antithetic, matched: false } }
}

/// Down-and-out call without rebate, B ≤ K, watched all the time: Merton's closed form, c − (S/B)^(1−2μ/σ²)·c(B²/S).
fn down_and_out(spot: f64, strike: f64, level: f64, volatility: f64, rate: f64, drift: f64, maturity: f64) -> f64 {
    let call = |s: f64| sensitivities(&[s, strike, maturity, volatility, rate, rate - drift], 1).price;
    call(spot) - (spot / level).powf(1.0 - 2.0 * drift / (volatility * volatility)) * call(level * level / spot)
}

#[test]
fn barriers_and_averages_meet_their_closed_forms() {
    let barrier = |level: f64, up: bool, knock_in: bool| Style::Barrier { level, up, knock_in, continuous: true };
    let options = [
        Exotic { style: Style::European, call: true, strike: 105.0 },
        Exotic { style: barrier(90.0, false, false), call: true, strike: 100.0 },
        Exotic { style: barrier(90.0, false, true), call: true, strike: 100.0 },
        Exotic { style: Style::GeometricAsian, call: false, strike: 98.0 },
        Exotic { style: Style::ArithmeticAsian, call: true, strike: 100.0 },
        Exotic { style: barrier(115.0, true, false), call: false, strike: 105.0 },
    ];
    let market = gbm();
    for (name, paths) in [("reference", 100_000), ("cpu", 100_000), ("wgpu", 100_000), ("cuda-host", 3000)] {
        let Some(device) = open(name) else { continue };
        for antithetic in [false, true] {
            let sim = simulation(paths, 26, antithetic);
            let got = exotic_prices(&device, &market, &options, &sim).unwrap();
            let out = down_and_out(100.0, 100.0, 90.0, 0.25, 0.05, 0.03, 0.5);
            let vanilla = european(&market, 100.0, &sim, true).unwrap();
            let known = [european(&market, 105.0, &sim, true).unwrap(), out, vanilla - out, geometric_asian(100.0, 98.0, 0.25, 0.03, &sim, false)];
            for (i, want) in known.iter().enumerate() {
                let x = got[i];
                assert!((x.price - want).abs() < 3.5 * x.error, "{name} {i}: {x:?} against {want}");
                assert!((x.plain - want).abs() < 3.5 * x.plain_error, "{name} {i}: {x:?} against {want}");
            }
            // In and out are the European option on every path.
            assert!((got[1].plain + got[2].plain - got[1].control.unwrap().0).abs() < 1e-4 * vanilla, "{name}");
            // The control takes away nearly all of the variance of an arithmetic average.
            assert!(got[4].error < 0.05 * got[4].plain_error, "{name}: {:?}", got[4]);
            assert!(got[4].price > geometric_asian(100.0, 100.0, 0.25, 0.03, &sim, true));
            assert!(got[5].price < european(&market, 105.0, &sim, false).unwrap());
        }
    }
}

/// Watched at the steps alone a knock-out is worth more, and by half as much when the steps are a quarter as long.
#[test]
fn bridges_take_away_the_bias_of_steps() {
    let device = open("cpu").unwrap();
    let out = down_and_out(100.0, 100.0, 95.0, 0.25, 0.05, 0.03, 0.5);
    let priced = |steps: u64, continuous: bool| {
        let style = Style::Barrier { level: 95.0, up: false, knock_in: false, continuous };
        exotic_prices(&device, &gbm(), &[Exotic { style, call: true, strike: 100.0 }], &simulation(60_000, steps, false)).unwrap()[0]
    };
    let (coarse, fine) = (priced(8, false), priced(32, false));
    let (bias, less) = (coarse.price - out, fine.price - out);
    assert!(bias > 10.0 * coarse.error && less > 5.0 * fine.error, "{bias} {less}");
    assert!((bias / less - 2.0).abs() < 0.5, "{bias} against {less}");
    for steps in [1, 3, 8] {
        let x = priced(steps, true);
        assert!((x.price - out).abs() < 3.5 * x.error, "{steps}: {x:?} against {out}");
    }
}

#[test]
fn exotic_prices_under_other_models() {
    let jumps = Jumps { intensity: 1.0, mean: -0.1, sd: 0.1 };
    let variance = Variance { start: 0.05, mean: 0.06, reversion: 2.0, volatility: 0.4, correlation: -0.6 };
    let models = [Model::Merton { volatility: 0.2, jumps }, Model::Heston(variance), Model::Bates(variance, jumps)];
    let style = Style::Barrier { level: 88.0, up: false, knock_in: false, continuous: true };
    let options = [
        Exotic { style: Style::European, call: true, strike: 100.0 },
        Exotic { style, call: true, strike: 100.0 },
        Exotic { style: Style::GeometricAsian, call: true, strike: 100.0 },
    ];
    for model in models {
        let market = Market { model, ..gbm() };
        let sim = simulation(40_000, 32, false);
        let want = exotic_prices(&reference(), &market, &options, &sim).unwrap();
        let exact = european(&market, 100.0, &sim, true).unwrap();
        assert!((want[0].price - exact).abs() < 3.5 * want[0].error, "{:?}: {:?} against {exact}", market.model, want[0]);
        for name in ["cpu", "wgpu", "cuda-host"] {
            let Some(device) = open(name) else { continue };
            let sim = if name == "cuda-host" { simulation(1000, 32, false) } else { sim };
            let want = if name == "cuda-host" { exotic_prices(&reference(), &market, &options, &sim).unwrap() } else { want.clone() };
            let got = exotic_prices(&device, &market, &options, &sim).unwrap();
            for (got, want) in got.iter().zip(&want) {
                // The same paths: rounding alone differs.
                assert!((got.price - want.price).abs() < 1e-4 * want.price.max(1.0) + 0.02 * want.error, "{name} {:?}: {got:?} against {want:?}", market.model);
            }
        }
    }
}

#[test]
fn wrong_exotics_are_named() {
    let device = open("cpu").unwrap();
    let plain = Exotic { style: Style::European, call: true, strike: 100.0 };
    let price = |market: &Market, option: Exotic, sim: &Simulation| exotic_prices(&device, market, &[plain, option], sim).unwrap_err();
    let sim = simulation(100, 4, false);
    names(price(&gbm(), Exotic { strike: -1.0, ..plain }, &sim), &["strike[1]"]);
    let style = Style::Barrier { level: 0.0, up: true, knock_in: false, continuous: true };
    names(price(&gbm(), Exotic { style, ..plain }, &sim), &["barrier[1]"]);
    names(price(&gbm(), plain, &Simulation { paths: 0, ..sim }), &["paths", "2^40"]);
    names(price(&Market { model: Model::Replay, ..gbm() }, plain, &sim), &["model", "replay"]);
    let matched = Draws { matched: true, ..sim.draws };
    names(price(&gbm(), plain, &Simulation { draws: matched, ..sim }), &["matched"]);
    // One path and one step are legal; results do not depend on how a run is split.
    assert!(exotic_prices(&device, &gbm(), &[plain], &simulation(1, 1, false)).unwrap()[0].price.is_finite());
    let whole = exotic_prices(&device, &gbm(), &[plain], &simulation(5001, 5, true)).unwrap();
    let small = Device::open_with("cpu", &OpenOptions { work_per_launch: Some(600_000), ..OpenOptions::default() }).unwrap();
    assert_eq!(whole, exotic_prices(&small, &gbm(), &[plain], &simulation(5001, 5, true)).unwrap());
}
