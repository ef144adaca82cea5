//! Rollouts of neural hedging policies: gradients against finite differences in f64, every device against the f64 column, Black-Scholes deltas
//! out of untrained policies, and the same bits whatever the split.

use crate::support::{close, devices, reference, upload, values};
use forback::kernels::activation::Activation;
use forback::kernels::hedge_rollout::{
    Baseline, Claim, Head, HedgeRollout, HedgeRolloutArgs, Network, Spot, hedge_rollout, hedge_rollout_backward, hedge_rollout_holdings,
};
use forback::kernels::paths::{Draws, Jumps, Market, Markets, Model, PathSource, Stored, Variance, paths};
use forback::kernels::{Device, OpenOptions, View};

/// Inputs of a rollout.
struct Case {
    op: HedgeRollout,
    weights: Vec<f64>,
    risk: Vec<f32>,
    spot: Vec<f32>,
    extra: Vec<f32>,
    claim: Vec<f32>,
    grad_pnl: Vec<f32>,
    grad_costs: Vec<f32>,
}

/// Results: pnl, costs, gradient of the weights.
struct Out {
    pnl: Vec<f64>,
    costs: Vec<f64>,
    grad: Vec<f64>,
}

/// Steps of a path of a ragged rollout: all numbers from 1 to T occur.
fn length(op: &HedgeRollout, path: usize) -> usize {
    1 + (path * 7 + 2) % op.steps as usize
}

fn case(seed: u64, op: HedgeRollout) -> Case {
    let (m, p, t) = (op.models, op.paths, op.steps);
    let scale = 0.8 / (op.inputs() as f32).sqrt();
    let weights = values(seed, m * op.weights()).iter().map(|&w| f64::from(w * scale)).collect();
    // A fixed cost jumps where a delta rounds to 1 in f32 and in f64 does not: few paths have one.
    let fixed = if p < 100 { 0.003 } else { 0.0 };
    let risk = (0..m).flat_map(|i| [0.002 + 0.001 * i as f32, 0.01, fixed, 0.1 + 0.1 * i as f32]).collect();
    let steps = values(seed + 1, p * (t + 1));
    let spot = steps.chunks_exact(t as usize + 1).flat_map(|z| {
        z.iter().scan(op.strike as f32 * 1.01, |s, z| {
            *s *= (0.05 * z).exp();
            Some(*s)
        })
    });
    let mut extra = values(seed + 2, p * t * op.columns());
    if op.baseline == Baseline::Given && op.head == Head::WhalleyWilmott {
        extra.chunks_exact_mut(op.columns() as usize).for_each(|x| x[1] = 0.05 + 0.1 * x[1].abs());
    }
    let mut spot: Vec<f32> = spot.collect();
    for path in (0..p as usize).filter(|_| op.ragged) {
        let (length, columns) = (length(&op, path), op.columns() as usize);
        spot[path * (t as usize + 1)..][..t as usize + 1][length + 1..].fill(0.0);
        // Nobody reads what lies behind the end.
        extra[path * t as usize * columns..][..t as usize * columns][length * columns..].fill(f32::NAN);
    }
    let claim = if op.claim == Claim::Given { values(seed + 3, p) } else { Vec::new() };
    let (grad_pnl, grad_costs) = (values(seed + 4, m * p), values(seed + 5, 2 * m * p));
    Case { weights, risk, spot, extra, claim, grad_pnl, grad_costs, op }
}

fn zeros(device: &Device, len: u64) -> View {
    View::from(&device.zeros("test", len).unwrap())
}

fn run(device: &Device, case: &Case, weights: &[f64], backward: bool) -> Out {
    let spot = upload(device, &case.spot);
    run_on(device, case, weights, backward, Spot::Given(&spot))
}

fn run_on(device: &Device, case: &Case, weights: &[f64], backward: bool, spot: Spot<'_>) -> Out {
    let op = &case.op;
    let w = zeros(device, weights.len() as u64);
    device.write_f64(&w, weights).unwrap();
    let risk = upload(device, &case.risk);
    let some = |x: &[f32]| (!x.is_empty()).then(|| upload(device, x));
    let (extra, claim) = (some(&case.extra), some(&case.claim));
    let args = HedgeRolloutArgs { weights: &w, risk: &risk, spot, extra: extra.as_ref(), claim: claim.as_ref() };
    let (pnl, costs) = (zeros(device, op.models * op.paths), zeros(device, 2 * op.models * op.paths));
    let scratch = zeros(device, op.scratch(device).unwrap());
    let mut pass = device.pass("test");
    hedge_rollout(&mut pass, op, &args, &pnl, &costs, &scratch).unwrap();
    let grad = zeros(device, op.models * op.weights());
    if backward {
        let [scratch, partials] = op.scratch_backward(device).unwrap().map(|len| zeros(device, len));
        let grads = [upload(device, &case.grad_pnl), upload(device, &case.grad_costs)];
        hedge_rollout_backward(&mut pass, op, &args, [&grads[0], &grads[1]], &grad, [&scratch, &partials]).unwrap();
    }
    let reads = [pass.read(&pnl).unwrap(), pass.read(&costs).unwrap(), pass.read(&grad).unwrap()];
    let mut done = pass.submit().unwrap();
    let [pnl, costs, grad] = reads.map(|read| done.f64(read).unwrap());
    Out { pnl, costs, grad }
}

fn loss(case: &Case, out: &Out) -> f64 {
    let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
    dot(&case.grad_pnl, &out.pnl) + dot(&case.grad_costs, &out.costs)
}

fn mlp(widths: &[usize], activation: Activation) -> Network {
    Network::Mlp { widths: widths.to_vec(), activation }
}

fn lstm(layers: usize, hidden: usize) -> Network {
    Network::Lstm { layers, hidden }
}

/// A spread of networks, heads and shapes: (M, P, T, features).
fn cases() -> Vec<(String, Case)> {
    use Activation::{Relu, Silu, Tanh};
    use Head::{Band, Residual, WhalleyWilmott};
    let shapes = [
        (mlp(&[1], Tanh), Residual, [1, 1, 1, 0]),
        (mlp(&[5, 3], Relu), Residual, [2, 3, 4, 1]),
        (mlp(&[7, 2, 11, 5], Silu), Band, [1, 131, 3, 2]),
        (mlp(&[33, 64], Tanh), WhalleyWilmott, [3, 5, 37, 0]),
        (mlp(&[64, 64, 64], Relu), Band, [1, 67, 2, 3]),
        (lstm(1, 1), Residual, [1, 2, 3, 0]),
        (lstm(2, 5), Residual, [2, 7, 5, 2]),
        (lstm(1, 13), WhalleyWilmott, [1, 129, 33, 1]),
        (lstm(2, 64), Band, [1, 3, 3, 0]),
        (lstm(2, 3), Residual, [1, 257, 65, 0]),
    ];
    let mut all = Vec::new();
    for (i, (network, head, [m, p, t, features])) in shapes.into_iter().enumerate() {
        for (baseline, claim) in [(Baseline::Call, Claim::Call), (Baseline::Put, Claim::Put), (Baseline::Given, Claim::Given)] {
            let usual = HedgeRollout::new(network.clone(), m, p, t);
            let op = HedgeRollout {
                head,
                features: features as usize,
                baseline,
                claim,
                strike: 2.0,
                maturity: 0.5,
                volatility: 0.3,
                rate: if i % 2 == 0 { 0.0 } else { 0.04 },
                premium: 0.2,
                range: 0.5,
                unwind: i % 3 > 0,
                ..usual
            };
            all.push((format!("{:?} {head:?} {baseline:?} M {m} P {p} T {t} F {features}", op.network), case(10 * i as u64, op)));
        }
    }
    let ragged = [
        (mlp(&[5, 3], Tanh), WhalleyWilmott, [2, 67, 5, 1], Baseline::Call),
        (mlp(&[9], Silu), Band, [1, 3, 1, 2], Baseline::Given),
        (lstm(2, 5), Residual, [2, 7, 37, 2], Baseline::Given),
        (lstm(1, 13), WhalleyWilmott, [1, 129, 33, 1], Baseline::Given),
        (lstm(1, 3), Band, [1, 257, 65, 0], Baseline::Put),
    ];
    for (i, (network, head, [m, p, t, features], baseline)) in ragged.into_iter().enumerate() {
        for unwind in [false, true] {
            let claim = if i % 2 == 0 { Claim::Call } else { Claim::Given };
            let usual = HedgeRollout { head, features: features as usize, baseline, claim, unwind, ..HedgeRollout::new(network.clone(), m, p, t) };
            let op = HedgeRollout { strike: 2.0, maturity: 0.5, volatility: 0.3, rate: 0.04, premium: 0.2, range: 0.5, ragged: true, ..usual };
            all.push((format!("ragged {:?} {head:?} {baseline:?} M {m} P {p} T {t} F {features}", op.network), case(300 + 10 * i as u64, op)));
        }
    }
    all
}

/// A path that ends after L steps earns what it earns where all paths have L steps, and what it holds then it holds for good.
#[test]
fn a_ragged_path_is_a_short_one() {
    for device in devices().into_iter().chain([reference()]) {
        for network in [mlp(&[5, 3], Activation::Tanh), lstm(2, 5)] {
            let (m, p, t) = (2u64, 67u64, 9u64);
            let op = HedgeRollout { ragged: true, rate: 0.03, maturity: 0.4, premium: 0.1, unwind: true, ..HedgeRollout::new(network, m, p, t) };
            let whole = case(21, op);
            let out = run(&device, &whole, &whole.weights, false);
            let held = holdings(&device, &whole);
            for path in [0, 1, 2, 30, 66] {
                let steps = length(&whole.op, path);
                let maturity = 0.4 * steps as f64 / t as f64;
                let mut one = case(21, HedgeRollout { paths: 1, steps: steps as u64, maturity, ragged: false, ..whole.op.clone() });
                one.risk.clone_from(&whole.risk);
                one.spot = whole.spot[path * (t as usize + 1)..][..=steps].to_vec();
                let alone = run(&device, &one, &whole.weights, false);
                for model in 0..2 {
                    let name = format!("{} {:?} path {path} model {model}", device.info(), whole.op.network);
                    close(&name, &out.pnl[model * 67 + path..][..1], &alone.pnl[model..=model], 0.0, 1e-6);
                    close(&name, &out.costs[2 * (model * 67 + path)..][..2], &alone.costs[2 * model..][..2], 0.0, 1e-6);
                    let held = &held[(model * 67 + path) * t as usize..][..t as usize];
                    assert!(held[steps - 1..].iter().all(|h| *h == held[steps - 1]), "{name}: {held:?}");
                }
            }
        }
    }
}

fn holdings(device: &Device, case: &Case) -> Vec<f64> {
    let op = &case.op;
    let weights = zeros(device, case.weights.len() as u64);
    device.write_f64(&weights, &case.weights).unwrap();
    let (risk, spot) = (upload(device, &case.risk), upload(device, &case.spot));
    let args = HedgeRolloutArgs { weights: &weights, risk: &risk, spot: Spot::Given(&spot), extra: None, claim: None };
    let (holdings, scratch) = (zeros(device, op.models * op.paths * op.steps), zeros(device, op.scratch_holdings(device).unwrap()));
    let mut pass = device.pass("test");
    hedge_rollout_holdings(&mut pass, op, &args, &holdings, &scratch).unwrap();
    let read = pass.read(&holdings).unwrap();
    pass.submit().unwrap().f64(read).unwrap()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let device = reference();
    for (name, case) in cases() {
        let grad = run(&device, &case, &case.weights, true).grad;
        let (mut kinks, mut tried) = (0, 0);
        for i in (0..grad.len()).step_by((grad.len() / 11).max(1)) {
            let at = |step: f64| {
                let mut moved = case.weights.clone();
                moved[i] += step;
                loss(&case, &run(&device, &case, &moved, false))
            };
            let slope = |h: f64| (at(h) - at(-h)) / (2.0 * h);
            let (one, two) = (slope(1e-6), slope(2e-6));
            tried += 1;
            // The two slopes differ where a kink lies between: a trade that changes its sign, an edge of a band.
            if (one - two).abs() > 2e-7 * one.abs().max(1.0) {
                kinks += 1;
                continue;
            }
            let want = (4.0 * one - two) / 3.0;
            assert!((grad[i] - want).abs() <= 2e-6 * want.abs().max(1.0), "{name}: gradient {i} is {:e}, differences {want:e}", grad[i]);
        }
        assert!(kinks * 3 <= tried, "{name}: {kinks} kinks among {tried} weights");
    }
}

/// A lookback cuts the gradient through an LSTM's state, and that alone: it changes nothing where the window holds all steps, or where the state
/// carries nothing from step to step.
#[test]
fn a_lookback_cuts_the_gradient_through_the_state() {
    for device in devices().into_iter().chain([reference()]) {
        for layers in [1, 2] {
            let hidden = 3usize;
            let of = |lookback: u64, forgets: bool| {
                let mut case = case(3, HedgeRollout { lookback, ..HedgeRollout::new(lstm(layers, hidden), 2, 67, 37) });
                let each = case.op.weights() as usize;
                for weights in case.weights.chunks_exact_mut(each).filter(|_| forgets) {
                    let (mut at, mut inputs) = (0, 4);
                    for _ in 0..layers {
                        weights[at + 4 * hidden * inputs..][..4 * hidden * hidden].fill(0.0);
                        // The forget gate: sigmoid(−80) is 2e-35.
                        weights[at + 4 * hidden * (inputs + hidden) + hidden..][..hidden].fill(-80.0);
                        at += 4 * hidden * (inputs + hidden + 1);
                        inputs = hidden;
                    }
                }
                run(&device, &case, &case.weights, true)
            };
            let (whole, cut, same) = (of(0, false), of(5, false), of(37, false));
            assert!(whole.pnl == cut.pnl && whole.grad == same.grad, "{}", device.info());
            let size = whole.grad.iter().fold(0.0f64, |m, g| m.max(g.abs()));
            let most = whole.grad.iter().zip(&cut.grad).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(most > 1e-3 * size, "{}: {most:e} of {size:e}", device.info());
            // Only the recurrent weights, which are zero, would tell of the state: their gradients are those of one step.
            let (whole, cut) = (of(0, true), of(1, true));
            let size = whole.grad.iter().fold(0.0f64, |m, g| m.max(g.abs()));
            close(&format!("{} without memory", device.info()), &cut.grad, &whole.grad, 0.0, 1e-6 * size);
        }
    }
}

#[test]
fn devices_agree() {
    let truth = reference();
    let cut = HedgeRollout { lookback: 10, ..HedgeRollout::new(lstm(2, 7), 2, 131, 33) };
    for device in devices() {
        for (name, case) in cases().into_iter().chain([("lookback".into(), case(77, cut.clone()))]) {
            let (got, want) = (run(&device, &case, &case.weights, true), run(&truth, &case, &case.weights, true));
            let name = format!("{} {name}", device.info());
            close(&format!("{name} pnl"), &got.pnl, &want.pnl, 0.0, 2e-6 * case.op.strike);
            close(&format!("{name} costs"), &got.costs, &want.costs, 1e-5, 1e-5);
            let scale = want.grad.iter().fold(1.0f64, |m, g| m.max(g.abs()));
            close(&format!("{name} gradient"), &got.grad, &want.grad, 1e-4, 2e-5 * scale);
        }
    }
}

/// Weights of policies whose head is zero, which follow their baseline.
fn untrained(op: &HedgeRollout, seed: u64) -> Vec<f64> {
    let head = op.outputs() * (op.head_inputs() + 1);
    let each = op.weights() as usize;
    let mut weights: Vec<f64> = values(seed, op.models * op.weights()).iter().map(|&w| f64::from(w)).collect();
    weights.chunks_exact_mut(each).for_each(|w| w[each - head..].fill(0.0));
    weights
}

#[test]
fn holdings_of_untrained_policies_are_black_scholes_deltas() {
    for device in devices().into_iter().chain([reference()]) {
        for (network, steps) in [(mlp(&[8, 8], Activation::Tanh), 5), (lstm(1, 4), 1), (lstm(2, 3), 34)] {
            let op = HedgeRollout { strike: 100.0, maturity: 0.25, ..HedgeRollout::new(network, 2, 131, steps) };
            let mut case = case(7, op);
            case.weights = untrained(&case.op, 3);
            let got = holdings(&device, &case);
            let t = steps as usize;
            let want: Vec<f64> = (0..2 * 131 * t)
                .map(|i| {
                    let (path, step) = (i / t % 131, i % t);
                    let spread = 0.2 * (0.25 * (t - step) as f64 / t as f64).sqrt();
                    let d1 = (f64::from(case.spot[path * (t + 1) + step]) / 100.0).ln() / spread + 0.5 * spread;
                    use forback::kernels::real::Real;
                    d1.normal_cdf()
                })
                .collect();
            close(&format!("{} {:?}", device.info(), case.op.network), &got, &want, 0.0, 1e-6);
        }
    }
}

#[test]
fn results_do_not_depend_on_the_split() {
    let options = [None, Some(1 << 19), Some(1 << 17)];
    for name in ["cpu", "wgpu", "cuda-host"] {
        for network in [mlp(&[9, 4], Activation::Tanh), lstm(1, 3)] {
            let op = HedgeRollout { maturity: 0.3, ..HedgeRollout::new(network, 2, 700, 6) };
            let case = case(5, op);
            let mut first: Option<Out> = None;
            for bytes in options {
                let Ok(device) = Device::open_with(name, &OpenOptions { binding_bytes: bytes, ..OpenOptions::default() }) else { continue };
                let out = run(&device, &case, &case.weights, true);
                if let Some(first) = &first {
                    assert!(out.pnl == first.pnl && out.costs == first.costs, "{name} {bytes:?} {:?}", case.op.network);
                    assert!(out.grad == first.grad, "{name} {bytes:?} {:?}: gradient", case.op.network);
                }
                first.get_or_insert(out);
            }
        }
    }
}

/// Prices drawn slab by slab, forward and again backward, give the bits of the same prices stored; their memory does not grow with the paths.
#[test]
fn simulated_prices_are_the_stored_ones() {
    let variance = Variance { start: 0.04, mean: 0.05, reversion: 2.0, volatility: 0.5, correlation: -0.6 };
    let jumps = Jumps { intensity: 3.0, mean: -0.05, sd: 0.1 };
    let models = [Model::Gbm { volatility: 0.2 }, Model::Bates(variance, jumps)];
    for device in devices().into_iter().chain([reference()]) {
        for (i, (model, network)) in models.clone().into_iter().zip([mlp(&[5], Activation::Tanh), lstm(1, 3)]).enumerate() {
            let (paths_of, steps) = if i == 0 { (8192 + 300, 3) } else { (400, 9) };
            let op = HedgeRollout { strike: 100.0, maturity: 0.3, ..HedgeRollout::new(network, 2, paths_of, steps) };
            let case = case(9, op);
            let market = Market { spot: 100.0, drift: 0.02, model, basis: None };
            let draws = Draws { seed: 5, antithetic: true, matched: false };
            let markets = Markets::new("test", &[market.clone(), market], steps, 0.3, &draws).unwrap();
            let mut pass = device.pass("test");
            let stored = paths(&mut pass, &markets, 1, 7..7 + paths_of, None, Stored::default()).unwrap();
            pass.submit().unwrap();
            let want = run_on(&device, &case, &case.weights, true, Spot::Given(&View::from(&stored.spot)));
            let source = PathSource::new(&device, &markets, 1, 7).unwrap();
            let slab = zeros(&device, case.op.slab(&device).unwrap());
            assert_eq!(slab.len(), paths_of.min(8192) * (steps + 1));
            let got = run_on(&device, &case, &case.weights, true, Spot::Simulated(&source, &slab));
            assert!(got.pnl == want.pnl && got.costs == want.costs && got.grad == want.grad, "{}: {:?}", device.info(), case.op.network);
            source.reseed(6).unwrap();
            let other = run_on(&device, &case, &case.weights, true, Spot::Simulated(&source, &slab));
            assert!(other.pnl.iter().zip(&got.pnl).all(|(a, b)| a != b), "{}: another seed", device.info());
        }
    }
}

#[test]
fn wrong_arguments_are_errors() {
    let device = Device::open("cpu").unwrap();
    let good = HedgeRollout::new(mlp(&[4], Activation::Tanh), 1, 2, 3);
    let bad = [
        HedgeRollout { network: mlp(&[], Activation::Tanh), ..good.clone() },
        HedgeRollout { network: mlp(&[65], Activation::Tanh), ..good.clone() },
        HedgeRollout { network: lstm(3, 4), ..good.clone() },
        HedgeRollout { network: lstm(1, 0), ..good.clone() },
        HedgeRollout { features: 61, ..good.clone() },
        HedgeRollout { maturity: 0.0, ..good.clone() },
        HedgeRollout { volatility: f64::NAN, ..good.clone() },
        HedgeRollout { strike: -1.0, ..good.clone() },
        HedgeRollout { steps: 0, ..good.clone() },
        HedgeRollout { models: 0, ..good.clone() },
    ];
    for op in bad {
        assert!(op.check().is_err(), "{op:?}");
    }
    let case = case(1, good.clone());
    let view = |x: &[f32]| upload(&device, x);
    let weights: Vec<f32> = case.weights.iter().map(|&w| w as f32).collect();
    let (w, risk, spot, short) = (view(&weights), view(&case.risk), view(&case.spot), view(&case.spot[1..]));
    let (pnl, costs, scratch) = (zeros(&device, 2), zeros(&device, 4), zeros(&device, 1));
    let args = HedgeRolloutArgs { weights: &w, risk: &risk, spot: Spot::Given(&short), extra: None, claim: None };
    let error = hedge_rollout(&mut device.pass("test"), &good, &args, &pnl, &costs, &scratch).unwrap_err().to_string();
    assert!(error.contains("hedge_rollout") && error.contains("spot") && error.contains("8 values"), "{error}");
    let given = HedgeRollout { claim: Claim::Given, ..good };
    let args = HedgeRolloutArgs { spot: Spot::Given(&spot), ..args };
    let error = hedge_rollout(&mut device.pass("test"), &given, &args, &pnl, &costs, &scratch).unwrap_err().to_string();
    assert!(error.contains("claim"), "{error}");
}
