//! Hedgers: closed forms of untrained ones, constants of the literature, gradients, and what training gains out of sample.

use crate::common::{Rng, open, open_all};
use crate::support::close;
use forback::kernels::hedge_rollout::{Baseline, Claim, Head, HedgeRollout, Network};
use forback::kernels::real::Real;
use forback::nn::hedge::*;
use forback::nn::{Declared, Module, Parameters};
use forback::ops::HedgeRisk;
use forback::tape::{Tape, Var};
use forback::train::hedge::*;
use forback::{Device, Result};

fn parameters(device: &Device, hedger: &dyn Module, models: usize) -> Parameters {
    let mut declared = Declared::new();
    hedger.declare(&mut declared);
    Parameters::new(device, models, &declared, 7).unwrap()
}

/// Values of what `build` returns, in f64.
fn values(device: &Device, build: impl Fn(&mut Tape) -> Result<Vec<Var>>) -> Vec<Vec<f64>> {
    let mut tape = Tape::new(device);
    let out = tape.no_grad(|tape| build(tape)).unwrap();
    let mut pass = device.pass("test");
    let plan = tape.record(&mut pass, &out).unwrap();
    let reads: Vec<_> = out.iter().map(|&x| pass.read(plan.view(x).unwrap()).unwrap()).collect();
    let mut done = pass.submit().unwrap();
    reads.into_iter().map(|read| done.f64(read).unwrap()).collect()
}

fn input(tape: &mut Tape, x: &[f64], shape: &[usize]) -> Result<Var> {
    let device = tape.device().clone();
    let buffer = device.zeros("input", x.len() as u64)?;
    device.write_f64(&buffer, x)?;
    tape.input(&buffer, shape)
}

fn call(spot: f64, strike: f64, left: f64, volatility: f64) -> [f64; 3] {
    let spread = volatility * left.sqrt();
    let d1 = (spot / strike).ln() / spread + 0.5 * spread;
    let price = spot * d1.normal_cdf() - strike * (d1 - spread).normal_cdf();
    [price, d1.normal_cdf(), (-0.5 * d1 * d1).exp() / (std::f64::consts::TAU.sqrt() * spot * spread)]
}

#[test]
fn black_scholes_deltas_of_the_reference_and_at_the_edges() {
    assert!((black_scholes_delta(100.0, 100.0, 1.0, 0.2, true) - 0.539_827_837_3).abs() < 1e-10);
    assert!((black_scholes_delta(100.0, 100.0, 1.0, 0.2, false) - (0.539_827_837_3 - 1.0)).abs() < 1e-10);
    let edges = [(99.0, 0.0), (100.0, 0.5), (101.0, 1.0)];
    for (spot, want) in edges {
        assert_eq!(black_scholes_delta(spot, 100.0, 0.0, 0.2, true), want);
        assert_eq!(black_scholes_delta(spot, 100.0, 1.0, 0.0, true), want);
    }
}

#[test]
fn an_untrained_regime_hedger_mixes_the_deltas_of_its_regimes() {
    let (spot, volatilities) = ([90.0, 100.0, 112.0], [0.1, 0.35]);
    let deltas: Vec<f64> = regime_deltas(&spot, 100.0, 0.5, &volatilities, true).iter().map(|&d| f64::from(d)).collect();
    let hedger = RegimeDeltaHedger::new("hedger", 2, 1);
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let parameters = parameters(&device, &hedger, 2);
        let probs = [1.0, 0.0, 0.3, 0.7, 0.0, 1.0];
        let out = values(&device, |tape| {
            let (probs, hedges) = (input(tape, &probs, &[1, 3, 2])?, input(tape, &deltas, &[1, 3, 1, 2])?);
            let positions = input(tape, &[1.0, -2.0, 0.0], &[1, 3, 1])?;
            Ok(hedger.hedge(tape, &parameters, probs, hedges, positions, None)?.to_vec())
        });
        let mixed = 0.3 * deltas[2] + 0.7 * deltas[3];
        let (delta, h) = ([deltas[0], mixed, deltas[5]], [-deltas[0], 2.0 * mixed, 0.0]);
        close("delta", &out[1], &[delta, delta].concat(), 0.0, 1e-6);
        close("h", &out[0], &[h, h].concat(), 0.0, 1e-6);
        assert!(mixed > deltas[2].min(deltas[3]) && mixed < deltas[2].max(deltas[3]));
    }
}

#[test]
fn delta_and_gamma_hedges_leave_the_third_order() {
    let value = |spot: f64| (call(spot, 105.0, 0.5, 0.2), call(spot, 95.0, 0.25, 0.2));
    let (position, option) = value(100.0);
    let hedger = DynamicDeltaHedger::new("hedger", 1, 1);
    let device = open("reference").unwrap();
    let parameters = parameters(&device, &hedger, 1);
    let out = values(&device, |tape| {
        let mut one = |x: f64| input(tape, &[x], &[1, 1, 1]);
        let (probs, d, g, od, og) = (one(1.0)?, one(position[1])?, one(position[2])?, one(option[1])?, one(option[2])?);
        let (position, option) = (PositionGreeks { delta: d, gamma: Some(g) }, PositionGreeks { delta: od, gamma: Some(og) });
        Ok(hedger.hedge(tape, &parameters, probs, position, option)?.to_vec())
    });
    let (spot, opt) = (out[0][0], out[1][0]);
    assert!((opt + 0.797_922_533_9).abs() < 1e-6 && (spot - 0.177_194_310_2).abs() < 1e-6, "{opt} {spot}");
    assert!((position[1] + opt * option[1] + spot).abs() < 1e-6 && (position[2] + opt * option[2]).abs() < 1e-6);
    let residual = |ds: f64| {
        let (p, o) = value(100.0 + ds);
        p[0] - position[0] + opt * (o[0] - option[0]) + spot * ds
    };
    assert!((residual(1.0) - 3.422_33e-4).abs() < 1e-7, "{}", residual(1.0));
    assert!((residual(1.0) / residual(0.5) - 7.992).abs() < 1e-2, "{}", residual(1.0) / residual(0.5));
    let missing = {
        let mut tape = Tape::new(&device);
        let one = input(&mut tape, &[1.0], &[1, 1, 1]).unwrap();
        let bare = PositionGreeks { delta: one, gamma: None };
        hedger.hedge(&mut tape, &parameters, one, bare, bare).unwrap_err().to_string()
    };
    assert!(missing.contains("gamma"), "{missing}");
}

#[test]
fn bands_are_those_of_whalley_and_wilmott_until_trained() {
    let gamma = call(100.0, 100.0, 1.0, 0.2)[2];
    let hedger = TransactionCostAwareHedger::new("hedger", 1, 1, 0.001, 1.0).unwrap();
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let parameters = parameters(&device, &hedger, 1);
        let out = values(&device, |tape| {
            let probs = input(tape, &[1.0; 3], &[1, 3, 1])?;
            let (previous, target) = (input(tape, &[0.5, 0.53, 0.9], &[1, 3, 1])?, input(tape, &[0.54; 3], &[1, 3, 1])?);
            let (spot, gamma) = (input(tape, &[100.0; 3], &[1, 3, 1])?, input(tape, &[gamma; 3], &[1, 3, 1])?);
            let width = hedger.width(tape, &parameters, probs, spot, gamma)?;
            let [h, cost] = hedger.hedge(tape, &parameters, probs, [previous, target, spot, gamma])?;
            Ok(vec![width, h, cost])
        });
        let w = 0.038_949_583_6;
        // ε = 1e-12 beside Γ² = 4e-4: 8e-10 relative.
        close("width", &out[0], &[w; 3], 0.0, 2e-7);
        close("h", &out[1], &[0.54 - w, 0.53, 0.54 + w], 0.0, 2e-7);
        close("cost", &out[2], &[0.1 * (0.04 - w), 0.0, 0.1 * (0.36 - w)], 0.0, 1e-6);
    }
    assert!(TransactionCostAwareHedger::new("hedger", 1, 1, 0.001, 0.0).is_err());
    let free = TransactionCostAwareHedger::new("hedger", 1, 1, 0.0, 1.0).unwrap();
    let device = open("reference").unwrap();
    let parameters = self::parameters(&device, &free, 1);
    let out = values(&device, |tape| {
        let mut one = |x: f64| input(tape, &[x], &[1, 1, 1]);
        let (probs, previous, target, spot, gamma) = (one(1.0)?, one(0.2)?, one(0.5)?, one(100.0)?, one(0.02)?);
        Ok(free.hedge(tape, &parameters, probs, [previous, target, spot, gamma])?.to_vec())
    });
    assert_eq!(out, [[0.5], [0.0]], "without costs the hedge is the target");
}

/// A fixed cost widens the band to (12·k·Γ²/a)^¼, and what trades goes to the target.
#[test]
fn a_fixed_cost_makes_trades_jump_to_the_target() {
    let gamma = call(100.0, 100.0, 1.0, 0.2)[2];
    let usual = TransactionCostAwareHedger::new("hedger", 1, 1, 0.001, 1.0).unwrap();
    let hedger = TransactionCostAwareHedger { fixed_cost: 0.02, ..usual };
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let parameters = parameters(&device, &hedger, 1);
        let out = values(&device, |tape| {
            let probs = input(tape, &[1.0; 3], &[1, 3, 1])?;
            let (previous, target) = (input(tape, &[0.4, 0.5, 0.7], &[1, 3, 1])?, input(tape, &[0.54; 3], &[1, 3, 1])?);
            let (spot, gamma) = (input(tape, &[100.0; 3], &[1, 3, 1])?, input(tape, &[gamma; 3], &[1, 3, 1])?);
            let width = hedger.width(tape, &parameters, probs, spot, gamma)?;
            let [h, cost] = hedger.hedge(tape, &parameters, probs, [previous, target, spot, gamma])?;
            Ok(vec![width, h, cost])
        });
        let w = (12.0 * 0.02 * gamma * gamma).powf(0.25);
        assert!(w > 0.04 && w < 0.14, "the cases lie on both sides: {w}");
        close("width", &out[0], &[w; 3], 1e-6, 0.0);
        close("h", &out[1], &[0.54, 0.5, 0.54], 0.0, 1e-7);
        close("cost", &out[2], &[0.1 * 0.14 + 0.02, 0.0, 0.1 * 0.16 + 0.02], 0.0, 1e-6);
    }
}

#[test]
fn transitions_that_change_nothing_leave_the_hedge_of_now() {
    let device = open("reference").unwrap();
    let (p, hedges) = ([0.2, 0.8], [-1.0, -3.0]);
    let run = |lookahead: usize, transition: &[f64], shape: &[usize]| {
        let hedger = TransitionAwareHedger { lookahead, ..TransitionAwareHedger::new("hedger", 2, 1) };
        let parameters = parameters(&device, &hedger, 1);
        values(&device, |tape| {
            let (probs, matrix) = (input(tape, &p, &[1, 1, 2])?, input(tape, transition, shape)?);
            let hedges = input(tape, &hedges, &[1, 1, 1, 2])?;
            Ok(vec![hedger.hedge(tape, &parameters, probs, matrix, hedges, None)?])
        })[0][0]
    };
    // The average's 1 / (L + 1) is an f32: 3e-8.
    let identity = [1.0, 0.0, 0.0, 1.0];
    assert!((run(5, &identity, &[1, 1, 2, 2]) + 2.6).abs() < 2e-7);
    assert!((run(0, &[0.9, 0.1, 0.5, 0.5], &[1, 1, 2, 2]) + 2.6).abs() < 1e-12);
    let stationary = 0.5 * (-1.0 - 3.0);
    assert!((run(3, &[0.5; 4], &[1, 1, 2, 2]) - (-2.6 + 3.0 * stationary) / 4.0).abs() < 2e-7);
    assert!((run(2, &[identity, [0.5; 4]].concat(), &[1, 1, 2, 2, 2]) - (-2.6 - 2.6 + stationary) / 3.0).abs() < 2e-7);
}

#[test]
fn the_hedge_loss_is_least_at_the_regression() {
    let device = open("reference").unwrap();
    let mut rng = Rng::new(5);
    let t = 400;
    let futures: Vec<f64> = (0..t).map(|_| rng.normal()).collect();
    let spot: Vec<f64> = futures.iter().map(|f| 0.7 * f + 0.3 * rng.normal()).collect();
    let mean = |x: &[f64]| x.iter().sum::<f64>() / t as f64;
    let (ms, mf) = (mean(&spot), mean(&futures));
    let product = |a: &[f64], ma: f64, b: &[f64], mb: f64| a.iter().zip(b).map(|(a, b)| (a - ma) * (b - mb)).sum::<f64>() / (t as f64 - 1.0);
    let (ss, sf, ff) = (product(&spot, ms, &spot, ms), product(&spot, ms, &futures, mf), product(&futures, mf, &futures, mf));
    let run = |h: f64, futures: &[f64], options: HedgeLoss| {
        let mut tape = Tape::new(&device);
        let buffer = device.zeros("h", 1).unwrap();
        device.write_f64(&buffer, &[h]).unwrap();
        let ratio = tape.variable(&buffer, &[1, 1, 1, 1]).unwrap();
        let ones = input(&mut tape, &vec![1.0; t], &[1, 1, t, 1]).unwrap();
        let held = tape.mul(ratio, ones).unwrap();
        let (s, f) = (input(&mut tape, &spot, &[1, 1, t, 1]).unwrap(), input(&mut tape, futures, &[1, 1, t, 1]).unwrap());
        let loss = delta_hedge_loss(&mut tape, held, [s, f, ones], options).unwrap();
        tape.backward(loss).unwrap();
        let mut pass = device.pass("test");
        let plan = tape.record(&mut pass, &[loss]).unwrap();
        let (value, grad) = (pass.read(plan.view(loss).unwrap()).unwrap(), pass.read(plan.grad(ratio).unwrap()).unwrap());
        let mut done = pass.submit().unwrap();
        (done.f64(value).unwrap()[0], done.f64(grad).unwrap()[0])
    };
    let (value, grad) = run(-sf / ff, &futures, HedgeLoss::default());
    // The divisor T − 1 is an f32 factor: 6e-8 relative.
    assert!((value - (ss - sf * sf / ff)).abs() < 1e-7 * ss && grad.abs() < 1e-12, "{value} {grad}");
    assert!((run(-0.4, &vec![0.0; t], HedgeLoss::default()).0 - ss).abs() < 1e-6 * ss);
    let costly = run(-0.5, &futures, HedgeLoss { cost: 0.01, ..HedgeLoss::default() });
    let free = run(-0.5, &futures, HedgeLoss::default());
    assert!((costly.0 - free.0 - 0.1 * 0.01 * 0.5).abs() < 1e-6 && (costly.1 - free.1 + 0.1 * 0.01).abs() < 1e-6, "one trade of a half");
}

/// Loss and gradient of hedges [2,B,T,n] of an h that two models differ in.
fn hedge_loss(device: &Device, [b, t, n]: [usize; 3], values: &[Vec<f64>; 4], lengths: Option<&[u32]>, options: HedgeLoss) -> (Vec<f64>, Vec<f64>) {
    let mut tape = Tape::new(device);
    let [h, rest @ ..] = values;
    let buffer = device.zeros("h", h.len() as u64).unwrap();
    device.write_f64(&buffer, h).unwrap();
    let h = tape.variable(&buffer, &[2, b, t, n]).unwrap();
    let rest = rest.each_ref().map(|x| input(&mut tape, x, &[1, b, t, n]).unwrap());
    let lengths = lengths.map(|x| tape.input(&device.upload_u32("lengths", x).unwrap(), &[1, b]).unwrap());
    let loss = delta_hedge_loss(&mut tape, h, rest, HedgeLoss { lengths, ..options }).unwrap();
    let ones = input(&mut tape, &[1.0, 1.0], &[2]).unwrap();
    tape.backward_with(loss, ones).unwrap();
    let mut pass = device.pass("test");
    let plan = tape.record(&mut pass, &[loss]).unwrap();
    let (value, grad) = (pass.read(plan.view(loss).unwrap()).unwrap(), pass.read(plan.grad(h).unwrap()).unwrap());
    let mut done = pass.submit().unwrap();
    (done.f64(value).unwrap(), done.f64(grad).unwrap())
}

/// Sequences that differ in length have the loss and the gradient of each one alone, averaged; the risk of one asset by asset is the sum of those of
/// the assets alone; what is sold at the end costs at the price of the end.
#[test]
fn hedge_losses_of_sequences_and_assets_are_those_of_each_alone() {
    let (b, t, n) = (3, 7, 2);
    let lengths = [7u32, 2, 5];
    let mut rng = Rng::new(11);
    let mut draw = |len: usize, mean: f64| -> Vec<f64> { (0..len).map(|_| f64::from((mean + 0.3 * rng.normal()) as f32)).collect() };
    let all = [draw(2 * b * t * n, 0.0), draw(b * t * n, 0.0), draw(b * t * n, 0.0), draw(b * t * n, 5.0)];
    let risks =
        [HedgeRisk::Variance, HedgeRisk::MeanVariance { risk_aversion: 2.0 }, HedgeRisk::Cvar { alpha: 0.4 }, HedgeRisk::Entropic { risk_aversion: 1.5 }];
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        for (risk, by_asset) in risks.into_iter().flat_map(|risk| [(risk, false), (risk, true)]) {
            let options = HedgeLoss { risk, by_asset, cost: 0.01, cost_weight: 0.7, mean_weight: 0.2, exit: true, ..HedgeLoss::default() };
            let (loss, grad) = hedge_loss(&device, [b, t, n], &all, Some(&lengths), options);
            let (mut want, mut slope) = ([0.0; 2], vec![0.0; grad.len()]);
            for (i, &length) in lengths.iter().enumerate() {
                let length = length as usize;
                let own = all.each_ref().map(|x| x.chunks_exact(t * n).skip(i).step_by(b).flat_map(|x| x[..length * n].to_vec()).collect());
                let (alone, of) = hedge_loss(&device, [1, length, n], &own, None, options);
                for model in 0..2 {
                    want[model] += alone[model] / b as f64;
                    let to = &mut slope[(model * b + i) * t * n..][..length * n];
                    to.iter_mut().zip(&of[model * length * n..]).for_each(|(to, of)| *to = of / b as f64);
                }
            }
            let name = format!("{} {risk:?} by asset {by_asset}", device.info());
            close(&name, &loss, &want, 2e-6, 1e-6);
            close(&format!("{name} gradient"), &grad, &slope, 1e-5, 1e-6);
        }
    }
    let device = open("reference").unwrap();
    let mut tape = Tape::new(&device);
    let [h, rest @ ..] = all.each_ref().map(|x| input(&mut tape, &x[..b * t * n], &[1, b, t, n]).unwrap());
    for (options, name) in
        [(HedgeLoss { cost: -0.1, ..HedgeLoss::default() }, "cost"), (HedgeLoss { mean_weight: f64::NAN, ..HedgeLoss::default() }, "mean_weight")]
    {
        let refused = delta_hedge_loss(&mut tape, h, rest, options).unwrap_err().to_string();
        assert!(refused.contains(name), "{refused}");
    }
    let of = |x: &[Vec<f64>; 4], n: usize, options: HedgeLoss| hedge_loss(&device, [b, t, n], x, None, options).0;
    let asset = |i: usize| all.each_ref().map(|x| x.iter().skip(i).step_by(n).copied().collect::<Vec<f64>>());
    let apart = of(&all, n, HedgeLoss { by_asset: true, ..HedgeLoss::default() });
    let (one, two) = (of(&asset(0), 1, HedgeLoss::default()), of(&asset(1), 1, HedgeLoss::default()));
    close("by asset", &apart, &[one[0] + two[0], one[1] + two[1]], 1e-6, 0.0);
    let costs = HedgeLoss { cost: 1.0, cost_weight: 1.0, entry: false, ..HedgeLoss::default() };
    let (kept, sold) = (of(&all, n, costs), of(&all, n, HedgeLoss { exit: true, ..costs }));
    for model in 0..2 {
        let ends = (0..b).flat_map(|i| (0..n).map(move |k| (i * t + t - 1) * n + k));
        let want: f64 = ends.map(|at| all[0][model * b * t * n + at].abs() * (all[3][at] + all[2][at])).sum::<f64>() / b as f64;
        assert!((sold[model] - kept[model] - want).abs() < 1e-5 * want, "model {model}: {} {want}", sold[model] - kept[model]);
    }
}

/// Geometric Brownian motion [P,T+1] without drift.
fn gbm(seed: u32, paths: usize, steps: usize, maturity: f64, volatility: f64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    let dt = maturity / steps as f64;
    let mut out = Vec::with_capacity(paths * (steps + 1));
    for _ in 0..paths {
        let mut x = 100f64.ln();
        for t in 0..=steps {
            out.push(x.exp() as f32);
            x += if t < steps { volatility * dt.sqrt() * rng.normal() - 0.5 * volatility * volatility * dt } else { 0.0 };
        }
    }
    out
}

fn option(policy: &HedgePolicy, models: usize, paths: usize, steps: usize) -> HedgeRollout {
    let premium = call(100.0, 100.0, 0.25, 0.2)[0];
    HedgeRollout { strike: 100.0, maturity: 0.25, volatility: 0.2, premium, ..policy.rollout(models, paths, steps) }
}

fn sd(x: &[f64]) -> f64 {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    (x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (x.len() as f64 - 1.0)).sqrt()
}

fn entropic(x: &[f64], a: f64) -> f64 {
    (x.iter().map(|x| (-a * x).exp()).sum::<f64>() / x.len() as f64).ln() / a
}

fn cvar(x: &[f64], alpha: f64) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = (alpha * x.len() as f64) as usize;
    -sorted[..n].iter().sum::<f64>() / n as f64
}

#[test]
fn untrained_policies_have_the_errors_of_discrete_black_scholes_hedges() {
    let device = open("cpu").unwrap();
    for (steps, want) in [(21, 0.741), (63, 0.433)] {
        let spot = gbm(3, 50_000, steps, 0.25, 0.2);
        for policy in [HedgePolicy::lstm("p", 1, 4), HedgePolicy::mlp("p", Head::Residual)] {
            let paths = 50_000;
            let op = option(&policy, 1, paths, steps);
            let trainer = HedgeTrainer::new(&device, &policy, &op, &[HedgeCosts::proportional(0.0)], &HedgeTrainConfig::default()).unwrap();
            trainer.write(&spot, &[], &[]).unwrap();
            let score = trainer.score().unwrap();
            let (got, mean) = (sd(&score.pnl), score.pnl.iter().sum::<f64>() / paths as f64);
            // Three standard errors of a sd with kurtosis about 5 over 50,000 paths: 1.3 %.
            assert!((got / want - 1.0).abs() < 0.014, "{steps} steps: sd {got}, expected {want}");
            assert!(mean.abs() < 3.0 * got / (paths as f64).sqrt(), "{steps} steps: mean {mean}");
        }
    }
}

/// Options that mature at different steps: prices with zeros behind them.
#[test]
fn shorter_paths_are_written_with_zeros_behind() {
    let device = open("cpu").unwrap();
    let policy = HedgePolicy::lstm("p", 1, 4);
    let op = HedgeRollout { ragged: true, strike: 100.0, ..policy.rollout(1, 2, 3) };
    let trainer = HedgeTrainer::new(&device, &policy, &op, &[HedgeCosts::proportional(0.001)], &HedgeTrainConfig::default()).unwrap();
    trainer.write(&[100.0, 101.0, 0.0, 0.0, 100.0, 99.0, 98.0, 97.0], &[], &[]).unwrap();
    let [one, three] = trainer.score().unwrap().pnl[..] else { panic!("two paths") };
    // The first is one step of a third of a year: short the call, long its delta.
    let delta = call(100.0, 100.0, 1.0 / 3.0, 0.2)[1];
    assert!((one - (delta - 1.0 - 0.1 * delta)).abs() < 1e-5 && three.is_finite(), "{one} {three}");
    assert!(trainer.step().unwrap()[0].is_finite());
    for (spot, at) in [([100.0, 0.0, 0.0, 0.0, 100.0, 99.0, 98.0, 97.0], "spot[1]"), ([100.0, 99.0, 98.0, 97.0, 100.0, 99.0, 0.0, 97.0], "spot[6]")] {
        let refused = trainer.write(&spot, &[], &[]).unwrap_err().to_string();
        assert!(refused.contains(at), "{refused}");
    }
}

#[test]
fn trained_bands_beat_black_scholes_where_trading_costs() {
    let device = open("cpu").unwrap();
    let (paths, steps, cost, aversion) = (2048, 30, 0.005, 0.5);
    let policy = HedgePolicy {
        network: Network::Mlp { widths: vec![16, 16], activation: forback::kernels::activation::Activation::Silu },
        ..HedgePolicy::mlp("p", Head::Band)
    };
    let op = option(&policy, 1, paths, steps);
    let config = HedgeTrainConfig { risk: HedgeRisk::Entropic { risk_aversion: aversion }, learning_rate: vec![5e-3], ..HedgeTrainConfig::default() };
    let trainer = HedgeTrainer::new(&device, &policy, &op, &[HedgeCosts::proportional(cost)], &config).unwrap();
    let unseen = gbm(999, paths, steps, 0.25, 0.2);
    trainer.write(&unseen, &[], &[]).unwrap();
    let plain = trainer.score().unwrap();
    for step in 0..100 {
        trainer.write(&gbm(step + 1, paths, steps, 0.25, 0.2), &[], &[]).unwrap();
        trainer.step().unwrap();
    }
    trainer.write(&unseen, &[], &[]).unwrap();
    let band = trainer.score().unwrap();
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    println!("entropic {:.3} against {:.3}", entropic(&band.pnl, aversion), entropic(&plain.pnl, aversion));
    println!("CVaR 5 % {:.3} against {:.3}, cost {:.3} against {:.3}", cvar(&band.pnl, 0.05), cvar(&plain.pnl, 0.05), mean(&band.cost), mean(&plain.cost));
    assert!(entropic(&band.pnl, aversion) < entropic(&plain.pnl, aversion) - 0.1);
    assert!(cvar(&band.pnl, 0.05) < cvar(&plain.pnl, 0.05));
    assert!(mean(&band.cost) < 0.8 * mean(&plain.cost) && mean(&band.turnover) < mean(&plain.turnover));
}

/// A world of two regimes: spot changes β_k times those of the future, plus noise.
fn world(seed: u32, paths: usize, betas: [f64; 2], sds: [f64; 2], noise: f64) -> HedgeWorld {
    let (steps, mut rng) = (20, Rng::new(seed));
    let (mut spot, mut futures, mut probs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..paths {
        let (mut s, mut f, mut k) = (100.0, 50.0, usize::from(rng.normal() > 0.0));
        spot.push(s as f32);
        futures.push(f as f32);
        for _ in 0..steps {
            if rng.normal() > 1.5 {
                k = 1 - k;
            }
            probs.extend([1.0 - k as f32, k as f32]);
            let df = sds[k] * rng.normal();
            f += df;
            s += betas[k] * df + noise * rng.normal();
            spot.push(s as f32);
            futures.push(f as f32);
        }
    }
    HedgeWorld { paths, assets: 1, steps, spot, futures, probs, regimes: 2 }
}

fn hedgers(hedges: [f64; 2]) -> Vec<(&'static str, RegimeHedge)> {
    let hedges = hedges.to_vec();
    let small = RegimeDeltaHedger { hidden: 16, range: 2.0, ..RegimeDeltaHedger::new("h", 2, 1) };
    let lstm = LstmDeltaHedger { policy: HedgePolicy { range: 2.0, ..HedgePolicy::lstm("h", 1, 8) }, regimes: 2 };
    let dynamic = DynamicDeltaHedger { hidden: 16, range: 2.0, ..DynamicDeltaHedger::new("h", 2, 1) };
    let band = TransactionCostAwareHedger { hidden: 16, ..TransactionCostAwareHedger::new("h", 2, 1, 0.0, 1.0).unwrap() };
    let ahead = TransitionAwareHedger { hidden: 16, range: 2.0, lookahead: 1, ..TransitionAwareHedger::new("h", 2, 1) };
    vec![
        ("regime", RegimeHedge::of(&small, hedges.clone())),
        ("dynamic", RegimeHedge::of_dynamic(&dynamic, hedges.clone())),
        ("lstm", RegimeHedge::of_lstm(&lstm, hedges.clone())),
        ("band", RegimeHedge::of_band(&band, hedges.clone())),
        ("ahead", RegimeHedge::of_transitions(&ahead, vec![0.93, 0.07, 0.07, 0.93], hedges)),
    ]
}

#[test]
fn every_hedger_trains_and_beats_the_static_regression_in_two_regimes() {
    let device = open("cpu").unwrap();
    let (betas, sds) = ([0.5, 1.5], [0.4, 0.8]);
    let (train, valid) = (world(1, 2048, betas, sds, 0.1), world(2, 2048, betas, sds, 0.1));
    for (name, hedger) in hedgers([-1.0, -1.0]) {
        let config = HedgeTrainConfig { learning_rate: vec![0.01], ..HedgeTrainConfig::default() };
        let (_, report) = train_delta_hedger(
            &device,
            &hedger,
            [&train, &valid],
            HedgeCosts::proportional(0.0),
            &config,
            &HedgeEpochs { epochs: 20, ..HedgeEpochs::default() },
        )
        .unwrap();
        println!("{name}: {:.3}, static {:.3} at {:.3}, unhedged {:.3}", report.hedged_sd, report.static_sd, report.static_ratio[0], report.unhedged_sd);
        assert!(report.hedged_sd.is_finite() && report.valid.len() == report.train.len());
        if name != "band" {
            // Noise alone leaves 0.1·√20 = 0.447; least squares leave over three times that.
            assert!(report.hedged_sd < 0.6 * report.static_sd, "{name}: {} against {}", report.hedged_sd, report.static_sd);
            assert!(report.effectiveness > 0.9, "{name}: {}", report.effectiveness);
        }
    }
}

/// Two assets, the second at ten times the prices: hedges by regime leave the noise alone, and a trained hedger that starts from nothing gets there too.
#[test]
fn portfolios_of_assets_are_hedged_by_one_policy() {
    let device = open("cpu").unwrap();
    let (betas, sds) = ([0.5, 1.5], [0.4, 0.8]);
    let pair = |seed: u32| {
        let (one, two) = (world(seed, 1024, betas, sds, 0.1), world(seed, 1024, [0.2, 1.4], sds, 0.1));
        let join = |a: &[f32], b: &[f32]| -> Vec<f32> {
            a.chunks_exact(21).zip(b.chunks_exact(21)).flat_map(|(a, b)| a.iter().copied().chain(b.iter().map(|x| 10.0 * x))).collect()
        };
        HedgeWorld { assets: 2, spot: join(&one.spot, &two.spot), futures: join(&one.futures, &two.futures), ..one }
    };
    let (train, valid) = (pair(5), pair(6));
    let run = |hedges: Vec<f64>, epochs: usize| {
        let small = RegimeDeltaHedger { hidden: 16, range: 2.0, ..RegimeDeltaHedger::new("h", 2, 2) };
        let config = HedgeTrainConfig { learning_rate: vec![0.01], ..HedgeTrainConfig::default() };
        let epochs = HedgeEpochs { epochs, positions: vec![1.0, 0.1], ..HedgeEpochs::default() };
        train_delta_hedger(&device, &RegimeHedge::of(&small, hedges), [&train, &valid], HedgeCosts::proportional(0.0), &config, &epochs).unwrap().1
    };
    let exact = run(vec![-0.5, -1.5, -0.02, -0.14], 0);
    // Both assets share the draws, noise included: twice 0.1·√20.
    assert!((exact.baseline_sd / (0.2 * 20f64.sqrt()) - 1.0).abs() < 0.1, "{}", exact.baseline_sd);
    assert!(exact.hedged_sd == exact.baseline_sd && exact.train.is_empty());
    assert!(exact.static_ratio.len() == 2 && exact.static_ratio[0] > exact.static_ratio[1]);
    let three = RegimeHedge::of(&RegimeDeltaHedger::new("h", 2, 2), vec![-0.5, -1.5, -0.02]);
    let ahead = RegimeHedge { ahead: Some((vec![1.0], 0)), hedges: vec![0.0; 4], ..three.clone() };
    for (hedger, arg) in [(three, "hedges"), (ahead, "transition")] {
        let (config, epochs) = (HedgeTrainConfig::default(), HedgeEpochs::default());
        let refused = train_delta_hedger(&device, &hedger, [&train, &valid], HedgeCosts::proportional(0.0), &config, &epochs).err().unwrap().to_string();
        assert!(refused.contains(arg), "{refused}");
    }
    let learned = run(vec![0.0; 4], 25);
    assert!((learned.baseline_sd / learned.unhedged_sd - 1.0).abs() < 1e-6, "an untrained hedge of nothing");
    assert!(learned.hedged_sd < 0.7 * learned.static_sd, "{} against {}", learned.hedged_sd, learned.static_sd);
}

#[test]
fn a_linear_world_is_learned_within_a_hundredth() {
    let device = open("cpu").unwrap();
    let h0 = 1.25;
    // F = S / h0: the hedge of one unit is −h0.
    let (train, valid) = (world(3, 1024, [h0; 2], [0.5; 2], 0.0), world(4, 512, [h0; 2], [0.5; 2], 0.0));
    let (_, hedger) = hedgers([0.0, 0.0]).swap_remove(0);
    let config = HedgeTrainConfig { learning_rate: vec![0.02], ..HedgeTrainConfig::default() };
    let epochs = HedgeEpochs { epochs: 60, patience: 60, ..HedgeEpochs::default() };
    let (_, report) = train_delta_hedger(&device, &hedger, [&train, &valid], HedgeCosts::proportional(0.0), &config, &epochs).unwrap();
    // |h + h0| ≤ 1 % of h0 leaves at most 1 % of the risk.
    assert!(report.hedged_sd < 0.01 * report.unhedged_sd, "{} of {}", report.hedged_sd, report.unhedged_sd);
    assert!((report.static_ratio[0] - h0).abs() < 1e-4);
    let bad = HedgeWorld { futures: vec![0.0; train.futures.len()], ..train.clone() };
    assert!(train_delta_hedger(&device, &hedger, [&bad, &valid], HedgeCosts::proportional(0.0), &config, &epochs).is_err());
}

#[test]
fn rollouts_need_no_memory_for_paths_times_steps() {
    let device = open("cpu").unwrap();
    let policy = HedgePolicy::lstm("p", 1, 8);
    let bytes = |paths: usize, steps: usize| {
        let op = HedgeRollout { baseline: Baseline::Call, claim: Claim::Call, ..policy.rollout(1, paths, steps) };
        let [scratch, partials] = op.scratch_backward(&device).unwrap();
        op.scratch(&device).unwrap() + scratch + partials
    };
    assert_eq!(bytes(100_000, 252), bytes(1_000_000, 252));
    assert_eq!(bytes(100_000, 252), bytes(100_000, 1000));
    for device in open_all(&["wgpu", "cuda-host"]) {
        let op = |paths: usize| policy.rollout(1, paths, 252).scratch_backward(&device).unwrap();
        assert_eq!(op(200_000), op(2_000_000), "{}", device.info());
    }
}
