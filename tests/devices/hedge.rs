//! Hedge simulation: equal P&L path by path on every device, in any split of paths and set-ups; risk figures against sorted f64; what theory
//! says of costs and deviations; what bad requests are told.

use super::common::{DEVICES, assert_bits, open, open_all, open_with, variants};
use super::{Guards, error};
use forback::kernels::hedge::{self as kernel, HedgeMarket, HedgeParams, Hedges, Setup, hedge_paths, hedge_steps};
use forback::kernels::hedge_risk::{HEDGE_COUNT, HEDGE_MOMENTS, HEDGE_SUM_COUNTS, HEDGE_TAIL, HedgeRiskParams, RiskFigures, RiskOptions, Slab, hedge_risk};
use forback::kernels::kernel::{Elem, Kernel};
use forback::kernels::paths::{Basis, Draws, Jumps, Market as Spot, Markets, Model, Variance};
use forback::kernels::{Device, Error, KERNELS, View};
use forback::sim::hedge::{Costs, HedgeRequest, HedgedOption, Market, OptionKind, Policy, Position, Sources};
use std::ops::Range;

const ROUGH: Variance = Variance { start: 0.04, mean: 0.05, reversion: 1.5, volatility: 0.5, correlation: -0.7 };
const JUMPS: Jumps = Jumps { intensity: 1.0, mean: -0.05, sd: 0.1 };
const BASIS: Basis = Basis { start: 0.01, mean: 0.0, reversion: 2.0, volatility: 0.02, correlation: 0.1 };
const STEPS: u32 = 37;

fn regimes() -> Model {
    Model::Regimes { drift: vec![0.05, -0.1], volatility: vec![0.15, 0.3], trans: vec![0.95, 0.05, 0.1, 0.9], start: vec![0.7, 0.3] }
}

fn models() -> Vec<Model> {
    let log_returns = (0..53).map(|i| 0.01 * (f64::from(i * 7919 % 13) - 6.1) / 6.0).collect();
    vec![
        Model::Gbm { volatility: 0.2 },
        Model::Merton { volatility: 0.2, jumps: JUMPS },
        Model::Heston(ROUGH),
        Model::Bates(ROUGH, JUMPS),
        regimes(),
        Model::Bootstrap { log_returns, block: 5.0, circular: false },
    ]
}

fn option(kind: OptionKind, position: Position) -> HedgedOption {
    HedgedOption { kind, strike: 101.0, maturity: 0.5, position }
}

fn setup(policy: Policy, every: u32) -> Setup {
    Setup { option: option(OptionKind::Call, Position::Short), policy, costs: Costs::bps(5.0), every, volatility: 0.22, premium: None }
}

/// One set-up of every kind that trades the spot.
fn setups() -> Vec<Setup> {
    let gamma = Policy::DeltaGamma { strike: 105.0, maturity: 1.0, half_spread_bps: 10.0 };
    let policies = [
        Policy::None,
        Policy::Static,
        Policy::Delta,
        Policy::Leland,
        Policy::Band { width: 0.04 },
        Policy::WhalleyWilmott { risk_aversion: 0.7 },
        Policy::Move { threshold: 0.02 },
        gamma,
    ];
    let mut all: Vec<Setup> = [1, 5].into_iter().flat_map(|every| policies.iter().map(move |p| setup(p.clone(), every))).collect();
    for (kind, position) in [(OptionKind::Put, Position::Long), (OptionKind::Digital, Position::Short), (OptionKind::Spot, Position::Long)] {
        let costs = Costs { half_spread_bps: 3.0, unwind: true, ..Costs::bps(2.0) };
        all.push(Setup { option: option(kind, position), costs, premium: Some(4.0), ..setup(Policy::Delta, 2) });
    }
    all
}

fn futures_setups() -> Vec<Setup> {
    let mut all = vec![setup(Policy::RegimeRatio { ratios: vec![0.9, 1.1] }, 1), setup(Policy::MinimumVariance { window: 7 }, 3)];
    all.push(Setup { option: option(OptionKind::Spot, Position::Long), ..all[1].clone() });
    all
}

fn market(steps: u32) -> HedgeMarket {
    HedgeMarket { level: 100.0, rate: 0.03, dividend: 0.01, maturity: 0.5, steps }
}

fn prepared(model: &Model, basis: Option<Basis>, steps: u32) -> Markets {
    let own = Spot { spot: 100.0, drift: 0.02, model: model.clone(), basis };
    Markets::new("hedge", &[own], u64::from(steps), 0.5, &Draws { seed: 11, antithetic: true, matched: false }).unwrap()
}

/// Results [U,3,P].
fn simulated(device: &Device, markets: &Markets, hedges: &Hedges, paths: Range<u64>, given: Option<&View>) -> Vec<f64> {
    let mut pass = device.pass("hedge");
    let results = hedges.simulate(&mut pass, markets, 0, paths, given).unwrap();
    let read = pass.read(&results).unwrap();
    pass.submit().unwrap().f64(read).unwrap()
}

/// Largest error of what a set-up gave, as a share of spot (turnover: of twice that, or twice itself), against `most`.
fn compare(what: &str, setups: &[Setup], want: &[f64], got: &[f64], paths: usize, most: f64) {
    for (u, s) in setups.iter().enumerate() {
        let rows = u * 3 * paths..(u + 1) * 3 * paths;
        // A path at a threshold, or at a digital's strike, may fall on either side of it.
        let jumps = matches!(s.policy, Policy::Move { .. }) || s.option.kind == OptionKind::Digital;
        // Variances of seven changes, each a difference of prices, have three digits fewer (1.2e-5 seen); ratios of gammas lose some too (2.1e-5).
        let loose = matches!(s.policy, Policy::MinimumVariance { .. } | Policy::DeltaGamma { .. });
        let allowed = if loose { 4e-5 } else { most };
        // Turnover: 2.2e-6 of spot seen.
        let errors = want[rows.clone()].iter().zip(&got[rows]).enumerate().map(|(i, (w, g))| {
            let turnover = i >= 2 * paths;
            (w - g).abs() / if turnover { 2.0 * w.abs().max(100.0) } else { 100.0 }
        });
        let worst = errors.filter(|e| !jumps || *e < 1e-4).fold(0.0, f64::max);
        assert!(worst <= allowed, "{what}: {:?} {:?} every {}: {worst:e} of spot", s.policy, s.option.kind, s.every);
    }
}

#[test]
fn every_device_agrees_path_by_path() {
    let paths = 67usize;
    for (model, basis) in models().into_iter().map(|m| (m, None)).chain([(Model::Gbm { volatility: 0.2 }, Some(BASIS)), (regimes(), Some(BASIS))]) {
        let markets = prepared(&model, basis, STEPS);
        let setups = if basis.is_some() { futures_setups() } else { setups() };
        // f64 first, then cpu, then the others: 4.2e-6 of f64 was seen, drifts being rounded to f32.
        let mut done: Vec<Vec<f64>> = Vec::new();
        for device in open_all(&DEVICES) {
            let hedges = Hedges::new(&device, &market(STEPS), &setups).unwrap();
            let got = simulated(&device, &markets, &hedges, 5..5 + paths as u64, None);
            for (want, most) in done.iter().zip([6e-6, 2e-6]) {
                compare(&format!("{} {:?} within {most}", device.info(), model.kind()), &setups, want, &got, paths, most);
            }
            done.push(got);
        }
    }
}

#[test]
fn replayed_paths_are_the_given_ones() {
    let (paths, row) = (35u64, u64::from(STEPS) + 1);
    let given: Vec<f32> = (0..paths * row).map(|i| 100.0 * (0.02 * ((i % row) as f32 * 0.7 + (i / row) as f32).sin()).exp()).collect();
    let own = Spot { spot: 100.0, drift: 0.0, model: Model::Replay, basis: None };
    let markets = Markets::new("hedge", &[own], u64::from(STEPS), 0.5, &Draws::default()).unwrap();
    for device in open_all(&DEVICES) {
        let buffer = device.upload("given", &given).unwrap();
        for s in setups().into_iter().filter(|s| s.option.kind == OptionKind::Call) {
            let hedges = Hedges::new(&device, &market(STEPS), std::slice::from_ref(&s)).unwrap();
            let replayed = simulated(&device, &markets, &hedges, 0..paths, Some(&View::from(&buffer)));
            let direct = hedge_paths(&device, &market(STEPS), &s, &given).unwrap();
            compare(&device.info().to_string(), &[s], &[direct.pnl, direct.cost, direct.turnover].concat(), &replayed, paths as usize, 2e-6);
        }
    }
}

#[test]
fn one_path_step_by_step_adds_up_to_its_run() {
    let row = STEPS as usize + 1;
    let spot: Vec<f32> = (0..row).map(|t| 100.0 * (0.05 * (t as f32 * 0.7).sin()).exp()).collect();
    let device = open("reference").unwrap();
    let wide: Vec<f64> = spot.iter().map(|&s| f64::from(s)).collect();
    for s in setups() {
        let run = hedge_paths(&device, &market(STEPS), &s, &spot).unwrap();
        let steps = hedge_steps(&market(STEPS), &s, &wide, &[], &[]).unwrap();
        assert_eq!(steps.len(), row);
        let cost: f64 = steps.iter().map(|s| s.cost).sum();
        let holding: f64 = steps.iter().map(|s| s.trade).sum();
        assert!((steps[row - 1].pnl - run.pnl[0]).abs() < 1e-9 && (cost - run.cost[0]).abs() < 1e-9, "{:?}", s.policy);
        assert!((holding - steps[row - 1].holding).abs() < 1e-12);
    }
}

#[test]
fn no_bit_depends_on_the_split_of_paths_and_set_ups() {
    let (paths, model) = (150u64, Model::Heston(ROUGH));
    let (markets, setups) = (prepared(&model, None, 13), setups());
    for spec in DEVICES {
        for options in variants(spec) {
            let Some(device) = open_with(spec, &options) else { continue };
            let whole = simulated(&device, &markets, &Hedges::new(&device, &market(13), &setups).unwrap(), 0..paths, None);
            let at = |u: usize, row: usize, path: u64| whole[((3 * u + row) as u64 * paths + path) as usize];
            for (from, to) in [(0, 1), (1, 64), (64, 150)] {
                let part = simulated(&device, &markets, &Hedges::in_tiles(&device, &market(13), &setups, 3).unwrap(), from..to, None);
                let want: Vec<f64> = (0..3 * setups.len()).flat_map(|r| (from..to).map(move |p| (r, p))).map(|(r, p)| at(r / 3, r % 3, p)).collect();
                assert_bits(&format!("{spec} paths {from}..{to}"), &part, &want);
            }
            let alone = simulated(&device, &markets, &Hedges::new(&device, &market(13), &setups[7..8]).unwrap(), 0..paths, None);
            assert_bits(spec, &alone, &whole[7 * 3 * paths as usize..8 * 3 * paths as usize]);
        }
    }
}

// ---- risk figures -------------------------------------------------------------------------------------------------------------

/// Figures by their definitions, from all values sorted.
fn oracle(values: &[f64], options: &RiskOptions) -> RiskFigures {
    let n = values.len() as f64;
    let mut x = values.to_vec();
    x.sort_by(f64::total_cmp);
    let mean = x.iter().sum::<f64>() / n;
    let moment = |k: i32| x.iter().map(|v| (v - mean).powi(k)).sum::<f64>() / n;
    let quantile = |q: f64| {
        let at = q * (n - 1.0);
        let low = at.floor() as usize;
        x[low] + at.fract() * (x[(low + 1).min(x.len() - 1)] - x[low])
    };
    let worst = options.alpha * n;
    let k = (worst * (1.0 - 1e-12)).ceil().max(1.0) as usize;
    let fraction = x[..k - 1].iter().sum::<f64>() + (worst - (k - 1) as f64) * x[k - 1];
    let a = options.risk_aversion;
    let weight = x.iter().map(|v| (-a * (v - x[0])).exp()).sum::<f64>();
    let lambda = options.quadratic.unwrap();
    let quadratic = |omega: f64| omega + lambda * (x.iter().map(|v| (-v - omega).max(0.0).powi(2)).sum::<f64>() / n).sqrt();
    let (low, high) = (-x[x.len() - 1] - (x[x.len() - 1] - x[0]), -x[0]);
    let best = (0..=20_000).map(|i| quadratic(low + (high - low) * f64::from(i) / 20_000.0)).fold(f64::INFINITY, f64::min);
    RiskFigures {
        mean,
        sd: (moment(2) * n / (n - 1.0)).sqrt(),
        skew: moment(3) / moment(2).powf(1.5),
        min: x[0],
        max: x[x.len() - 1],
        var: -quantile(options.alpha),
        var_order: -x[k - 1],
        cvar: -fraction / worst,
        cvar_tail_mean: -x[..k].iter().sum::<f64>() / k as f64,
        entropic: (weight / n).ln() / a - x[0],
        quadratic_cvar: best,
        quantiles: options.quantiles.iter().map(|&q| quantile(q)).collect(),
        ..RiskFigures::default()
    }
}

#[test]
fn risk_figures_are_those_of_the_sorted_values() {
    let options = RiskOptions { quadratic: Some(3.0), bins: 50, ..RiskOptions::default() };
    for paths in [1usize, 2, 67, 2047, 2048, 2049, 6007] {
        // Two set-ups: skewed P&L around 1000, then around 0 with ties; costs; turnover.
        let value = |row: usize, i: usize| {
            let u = ((i * 7919 + row * 31) % 10_007) as f64 / 10_007.0;
            match row {
                0 => 1000.0 + 3.0 * (u + 1e-3).ln(),
                3 => (40.0 * (u - 0.4)).round() / 8.0,
                _ => u,
            }
        };
        let values: Vec<f32> = (0..6).flat_map(|row| (0..paths).map(move |i| value(row, i) as f32)).collect();
        for device in open_all(&DEVICES) {
            let slab = |range: Range<usize>| {
                let rows: Vec<f32> = values.chunks_exact(paths).flat_map(|row| row[range.clone()].to_vec()).collect();
                Slab { results: device.upload("results", &rows).unwrap(), paths: range.len() as u64 }
            };
            let figures = hedge_risk(&device, &[slab(0..paths)], 2, &options, false).unwrap();
            for (u, (got, histogram)) in figures.iter().enumerate() {
                let x: Vec<f64> = values[3 * u * paths..(3 * u + 1) * paths].iter().map(|&v| f64::from(v)).collect();
                let want = oracle(&x, &options);
                let what = format!("{} P {paths} set-up {u}", device.info());
                let close = |name: &str, got: f64, want: f64, allowed: f64| {
                    assert!(got.is_nan() && want.is_nan() || (got - want).abs() <= allowed, "{what}: {name} {got} against {want}");
                };
                // Blocks about their own mean: 1e-6 of a deviation, and the rounding of a mean near 1000.
                let rounding = 1e-7 * want.mean.abs() + 2e-6;
                close("mean", got.mean, want.mean, rounding);
                close("sd", got.sd, want.sd, 2e-6 * want.sd.abs() + 1e-6);
                if paths > 2 {
                    close("skew", got.skew, want.skew, 1e-4);
                }
                for (name, got, want) in [
                    ("min", got.min, want.min),
                    ("max", got.max, want.max),
                    ("var_order", got.var_order, want.var_order),
                    ("var", got.var, want.var),
                    ("cvar", got.cvar, want.cvar),
                    ("cvar_tail_mean", got.cvar_tail_mean, want.cvar_tail_mean),
                ] {
                    close(name, got, want, 1e-9 * want.abs() + if name.starts_with("cvar") { 4e-5 } else { 1e-9 });
                }
                close("entropic", got.entropic, want.entropic, rounding);
                close("quadratic_cvar", got.quadratic_cvar, want.quadratic_cvar, 1e-3);
                got.quantiles.iter().zip(&want.quantiles).for_each(|(g, w)| close("quantile", *g, *w, 1e-9 * w.abs() + 1e-9));
                assert_eq!((histogram.counts.iter().sum::<u64>(), histogram.counts.len()), (paths as u64, 50), "{what}");
                assert!(paths < 67 || got.mean_error > 0.0 && got.sd_error > 0.0 && got.cvar_error >= 0.0 && got.var_error >= 0.0 && got.entropic_error > 0.0);
            }
            if paths > 2048 {
                let parts = hedge_risk(&device, &[slab(0..2048), slab(2048..paths)], 2, &options, false).unwrap();
                // As texts: what is undefined is NaN.
                assert_eq!(format!("{parts:?}"), format!("{figures:?}"), "{}: slabs change bits", device.info());
            }
        }
    }
}

// ---- theory -------------------------------------------------------------------------------------------------------------------

fn request(steps: u32, paths: u64, policies: Vec<Policy>, bps: &[f64]) -> HedgeRequest {
    let market = Market { name: "gbm".into(), model: Model::Gbm { volatility: 0.2 }, spot: 100.0, drift: 0.0, rate: 0.0, dividend: 0.0 };
    let option = HedgedOption { kind: OptionKind::Call, strike: 100.0, maturity: 0.25, position: Position::Short };
    let costs = bps.iter().map(|&b| Costs::bps(b)).collect();
    HedgeRequest { policies, costs, steps, paths, seed: 7, ..HedgeRequest::new(market, option) }
}

/// S = K = 100, T = 0.25, σ = 0.2: deviations 0.741, 0.433, 0.219 with 21, 63 and 252 trades; theory says 0.771, 0.445, 0.222.
#[test]
fn the_deviation_of_a_delta_hedge_is_derman_and_kamals() {
    let device = open("cpu").unwrap();
    let mut last = f64::INFINITY;
    for (steps, known, near) in [(21, 0.741, 0.05), (63, 0.433, 0.035), (252, 0.219, 0.02), (1000, f64::NAN, 0.012)] {
        let table = request(steps, 60_000, vec![Policy::Delta], &[0.0]).run(&device, &mut |_, _| Ok(())).unwrap();
        let row = &table.rows[0];
        let risk = &row.risk;
        assert!(risk.mean.abs() < 3.0 * risk.mean_error, "N {steps}: mean {} ± {}", risk.mean, risk.mean_error);
        assert!(known.is_nan() || (risk.sd - known).abs() < 3.0 * risk.sd_error + 5e-4, "N {steps}: sd {} ± {} against {known}", risk.sd, risk.sd_error);
        assert!((risk.sd / row.theory.sd - 1.0).abs() < near, "N {steps}: sd {} against theory {}", risk.sd, row.theory.sd);
        assert!(risk.sd < 0.65 * last, "finer steps, less deviation");
        last = risk.sd;
    }
}

#[test]
fn costs_are_lelands_and_bands_beat_plain_delta() {
    let device = open("cpu").unwrap();
    let policies = vec![Policy::Delta, Policy::Leland, Policy::WhalleyWilmott { risk_aversion: 1.0 }, Policy::Band { width: 0.06 }];
    let table = request(63, 40_000, policies, &[10.0, 50.0]).run(&device, &mut |_, _| Ok(())).unwrap();
    let of = |policy: usize, cost: usize| &table.rows[2 * policy + cost];
    // N = 63, 10 bp: 0.2504 simulated elsewhere without the first trade (0.0520), 0.2448 the difference of prices.
    let (delta, leland) = (of(0, 0), of(1, 0));
    assert!((delta.risk.cost - 0.3024).abs() < 1e-3 + 3.0 * delta.risk.cost_error, "{} ± {}", delta.risk.cost, delta.risk.cost_error);
    assert!((leland.theory.cost - 0.2968).abs() < 1e-3 && (leland.risk.mean + leland.theory.cost).abs() < 0.015, "{} {}", leland.theory.cost, leland.risk.mean);
    for cost in 0..2 {
        let (delta, leland, wilmott, band) = (of(0, cost), of(1, cost), of(2, cost), of(3, cost));
        assert!(leland.risk.sd < delta.risk.sd && leland.risk.cost < delta.risk.cost, "Leland: {} {}", leland.risk.sd, leland.risk.cost);
        assert!(wilmott.risk.cost < delta.risk.cost && wilmott.risk.entropic < delta.risk.entropic, "Whalley-Wilmott at its own risk aversion");
        assert!(wilmott.risk.indifference_price < delta.risk.indifference_price);
        assert!(band.risk.cost < delta.risk.cost);
    }
}

#[test]
fn a_second_option_takes_most_of_the_deviation() {
    let device = open("cpu").unwrap();
    let gamma = Policy::DeltaGamma { strike: 100.0, maturity: 0.5, half_spread_bps: 0.0 };
    let table = request(63, 5_000, vec![Policy::Delta, gamma], &[0.0]).run(&device, &mut |_, _| Ok(())).unwrap();
    let [delta, gamma] = [0, 1].map(|i| &table.rows[i].risk);
    assert!(gamma.sd < 0.5 * delta.sd && gamma.mean.abs() < 4.0 * gamma.mean_error, "{} {}", gamma.sd, delta.sd);
}

#[test]
fn futures_hedge_a_spot_position() {
    let device = open("cpu").unwrap();
    let option = HedgedOption { kind: OptionKind::Spot, strike: 100.0, maturity: 0.25, position: Position::Long };
    let market = Market { name: "gbm".into(), model: Model::Gbm { volatility: 0.2 }, spot: 100.0, drift: 0.0, rate: 0.0, dividend: 0.0 };
    let policies = vec![Policy::None, Policy::RegimeRatio { ratios: vec![1.0] }, Policy::MinimumVariance { window: 20 }];
    let request = HedgeRequest { policies, steps: 60, paths: 3000, ..HedgeRequest::new(market, option) };
    let sources = Sources { basis: Some(BASIS), given: None };
    let table = request.run_with(&device, &sources, &mut |_, _| Ok(())).unwrap();
    let sd: Vec<f64> = table.rows.iter().map(|r| r.risk.sd).collect();
    assert!(sd[1] < 0.2 * sd[0] && sd[2] < 0.25 * sd[0], "{sd:?}");
    let missing = error(request.run(&device, &mut |_, _| Ok(())));
    assert!(matches!(&missing, Error::Parameter { help, .. } if help.contains("basis")), "{missing}");
    let explained = request.explain_with(&device, &sources, 2, 17).unwrap();
    let run = request.pnl_with(&device, &sources, 2, 17..18).unwrap();
    assert!((explained.pnl - run[0]).abs() < 4e-3, "{} {}", explained.pnl, run[0]);
}

#[test]
fn a_path_explained_is_the_path_of_the_run() {
    for device in open_all(&["reference", "cpu", "wgpu"]) {
        let policies = vec![Policy::Delta, Policy::WhalleyWilmott { risk_aversion: 1.0 }];
        let request = HedgeRequest { antithetic: true, ..request(20, 200, policies, &[10.0]) };
        for setup in 0..2 {
            let run = request.pnl_of(&device, setup, 0..200).unwrap();
            let table = request.run(&device, &mut |_, _| Ok(())).unwrap();
            assert!((table.rows[setup].risk.mean - run.iter().sum::<f64>() / 200.0).abs() < 1e-5);
            for path in [0u64, 1, 77, 199] {
                let explained = request.explain(&device, setup, path).unwrap();
                assert_eq!(explained.steps.len(), 21);
                assert!((explained.pnl - run[path as usize]).abs() < 2e-4, "{}: {} {}", device.info(), explained.pnl, run[path as usize]);
            }
        }
    }
}

#[test]
fn bad_requests_say_what_to_do() {
    let good = request(21, 100, vec![Policy::Delta], &[1.0]);
    let market = |change: &dyn Fn(&mut Market)| {
        let mut request = good.clone();
        change(&mut request.markets[0]);
        request
    };
    let option = |change: &dyn Fn(&mut HedgedOption)| {
        let mut request = good.clone();
        change(&mut request.options[0]);
        request
    };
    let policy = |policy: Policy| HedgeRequest { policies: vec![policy], ..good.clone() };
    let cases: Vec<(&str, HedgeRequest)> = vec![
        ("paths", HedgeRequest { paths: 0, ..good.clone() }),
        ("steps", HedgeRequest { steps: 0, ..good.clone() }),
        ("rebalance", HedgeRequest { rebalance: vec![0], ..good.clone() }),
        ("rebalance", HedgeRequest { rebalance: vec![], ..good.clone() }),
        ("policies", HedgeRequest { policies: vec![], ..good.clone() }),
        ("maturity", option(&|o| o.maturity = 0.0)),
        ("maturity", option(&|o| o.maturity = -1.0)),
        ("maturity", option(&|o| o.maturity = f64::NAN)),
        ("strike", option(&|o| o.strike = 0.0)),
        ("strike", option(&|o| o.strike = f64::INFINITY)),
        ("spot", market(&|m| m.spot = -1.0)),
        ("rate", market(&|m| m.rate = f64::NAN)),
        ("volatility", market(&|m| m.model = Model::Gbm { volatility: 0.0 })),
        ("volatility", market(&|m| m.model = Model::Gbm { volatility: -0.2 })),
        ("hedge_volatility", HedgeRequest { hedge_volatility: vec![0.0], ..good.clone() }),
        ("cost_bps", HedgeRequest { costs: vec![Costs::bps(-1.0)], ..good.clone() }),
        ("cost_bps", HedgeRequest { costs: vec![Costs::bps(f64::NAN)], ..good.clone() }),
        ("band", policy(Policy::Band { width: -0.1 })),
        ("risk_aversion", policy(Policy::WhalleyWilmott { risk_aversion: 0.0 })),
        ("threshold", policy(Policy::Move { threshold: f64::NAN })),
        ("maturity", policy(Policy::DeltaGamma { strike: 100.0, maturity: 0.2, half_spread_bps: 0.0 })),
        ("window", policy(Policy::MinimumVariance { window: 1 })),
        ("ratios", policy(Policy::RegimeRatio { ratios: vec![] })),
        ("alpha", HedgeRequest { risk: RiskOptions { alpha: 1.0, ..RiskOptions::default() }, ..good.clone() }),
        ("bins", HedgeRequest { risk: RiskOptions { bins: 0, ..RiskOptions::default() }, ..good.clone() }),
    ];
    for (name, request) in cases {
        match error(request.check()) {
            Error::Parameter { name: got, help, .. } => assert!(got.contains(name) && !help.is_empty(), "{name}: {got}"),
            other => panic!("{name}: {other}"),
        }
    }
    let many = error(HedgeRequest { paths: 1_000_000_000_000, ..good.clone() }.check());
    assert!(matches!(&many, Error::TooLarge { help, .. } if help.contains("fewer paths")), "{many}");
    // A long option at Leland's number above 1, on whose side there is no such volatility.
    let mut long = HedgeRequest { policies: vec![Policy::Leland], costs: vec![Costs::bps(200.0)], steps: 252, ..good.clone() };
    long.options[0].position = Position::Long;
    assert!(matches!(&error(long.check()), Error::Parameter { help, .. } if help.contains("Leland")));
    let stopped = good.run(&open("cpu").unwrap(), &mut |done, _| if done > 0 { Err(Error::Interrupted { message: "stop".into() }) } else { Ok(()) });
    assert!(matches!(error(stopped), Error::Interrupted { .. }));
    assert_eq!(policy(Policy::None).setups().len(), 1);
}

#[test]
fn the_smallest_runs_have_figures() {
    for device in open_all(&DEVICES) {
        let table = request(1, 1, vec![Policy::None, Policy::Delta], &[1.0]).run(&device, &mut |_, _| Ok(())).unwrap();
        let risk = &table.rows[1].risk;
        assert!(risk.mean.is_finite() && risk.sd.is_nan() && (risk.var + risk.mean).abs() < 1e-7 && (risk.cvar + risk.mean).abs() < 1e-6, "{risk:?}");
    }
}

// ---- guards -------------------------------------------------------------------------------------------------------------------

/// Whether a kernel has the text of one that is launched between guards, with another market or other policies.
pub(super) fn has_guarded_twin(name: &str) -> bool {
    name.starts_with("hedge_")
        && !name.ends_with("_gbm")
        && !name.ends_with("_given_paths")
        && KERNELS.iter().any(|k| k.name == name && k.params.name == "HedgeParams")
}

pub(super) fn guarded(g: &mut Guards) {
    let (count, steps, set_ups) = (67u32, 6u32, 2u32);
    // policy, every, greek, kind, flags, second option, window, premium, row; then kind, every, first, last of the greek
    let words: Vec<u32> = (0..set_ups).flat_map(|u| [2 + u, 2, 0, 0, 3, 0, 2, 0, u]).chain([0, 2, 0, set_ups]).collect();
    let mut reals = vec![100.0, 1e-4, 0.0];
    reals.resize(16, 0.0);
    for _ in 0..set_ups {
        reals.extend([1e-3, 0.01, 0.05, 100.0, 4.0, 1.0, 1e-3, 10.0]);
        reals.extend([1.0; 8]);
    }
    let table: Vec<f32> = (0..=steps).flat_map(|_| [10.0, 0.05, 1.0, 4.0, 1.0, 0.1, 100.0, 100.0]).collect();
    let results = (3 * set_ups * count) as usize;
    let params = HedgeParams { paths: count, first: 0, columns: count, steps, setups: set_ups, greeks: 1, market: 0, path: 0, path_high: 0, window: 2 };
    let spot: Vec<f32> = (0..count * (steps + 1)).map(|i| 95.0 + (i % 11) as f32).collect();
    let (market, market_words) = prepared(&Model::Gbm { volatility: 0.2 }, None, steps).parts();
    let (future, future_words) = prepared(&Model::Gbm { volatility: 0.2 }, Some(BASIS), steps).parts();
    let [words, market_words, future_words] = [&words, &market_words, &future_words].map(|x| g.words(x));
    let [reals, table, spot, market, future] = [&reals, &table, &spot, &market, &future].map(|x| g.reals(x));
    let out = g.out(Elem::F32, results);
    g.launch(&kernel::HEDGE_GIVEN, &params, &[&words, &reals, &table, &out, &spot]);
    let simulated: [&'static Kernel; 3] = [&kernel::HEDGE_DELTA_GBM, &kernel::HEDGE_BAND_GBM, &kernel::HEDGE_GAMMA_GBM];
    for kernel in simulated {
        let out = g.out(Elem::F32, results);
        g.launch(kernel, &params, &[&words, &reals, &table, &out, &market, &market_words]);
    }
    let (alone, out) = (g.words(&[2, 2, 0, 0, 3, 0, 2, 0, 0, 0, 2, 0, 1]), g.out(Elem::F32, results / 2));
    g.launch(&kernel::HEDGE_SINGLE_GBM, &HedgeParams { setups: 1, ..params }, &[&alone, &reals, &table, &out, &market, &market_words]);
    let (out, history) = (g.out(Elem::F32, results), g.out(Elem::F32, 4 * count as usize));
    g.launch(&kernel::HEDGE_FUTURES_GBM, &params, &[&words, &reals, &table, &out, &future, &future_words, &history]);

    let n = 2500usize;
    let values: Vec<f32> = (0..2 * n).map(|i| (i % 97) as f32 * 0.01 - 0.3).collect();
    let risk = HedgeRiskParams { rows: 2, count: n as u32, period: 1, slabs: 3, known: 0, bins: 10, risk_aversion: 1.0 };
    let (values, queries, edges) = (g.reals(&values), g.words(&[0, 0, 1, 0]), g.reals(&[-0.3, 1.0, 0.1, 1.0]));
    let (partial, counts, sums, tails) = (g.out(Elem::F32, 40), g.out(Elem::U32, 6 * 2048), g.out(Elem::U32, 2 * 2048), g.out(Elem::F32, 16));
    g.launch(&HEDGE_MOMENTS, &risk, &[&values, &partial]);
    g.launch(&HEDGE_COUNT, &risk, &[&values, &queries, &edges, &counts]);
    g.launch(&HEDGE_SUM_COUNTS, &risk, &[&counts, &sums]);
    g.launch(&HEDGE_TAIL, &risk, &[&values, &queries, &edges, &tails]);
}
