//! Optimiser steps: every column against a plain f64 optimiser, skipped models, splits that change no bit, illegal options.

use forback::kernels::optimiser::{Algorithm, Average, Optimiser, OptimiserArgs, Tensor, optimiser_step};
use forback::kernels::{Device, Error, OpenOptions, Schedule, View};

const ADAMW: Algorithm = Algorithm::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

fn devices() -> Vec<(String, Device)> {
    let open = |name: &str, options: OpenOptions| (format!("{name} {options:?}"), Device::open_with(name, &options).unwrap());
    let schedule = |s| OpenOptions { schedule: Some(s), ..OpenOptions::default() };
    let checked = |c| OpenOptions { checked: Some(c), ..OpenOptions::default() };
    vec![
        open("reference", OpenOptions::default()),
        open("cpu", OpenOptions::default()),
        open("wgpu", checked(true)),
        open("wgpu", checked(false)),
        open("cuda-host", schedule(Schedule::Forward)),
        open("cuda-host", schedule(Schedule::Reverse)),
    ]
}

/// Numbers in [-1, 1), the same for the same seed.
fn noise(seed: u32, n: u64) -> Vec<f32> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A training: gradients, rates and losses of every step.
#[derive(Clone)]
struct Problem {
    op: Optimiser,
    start: Vec<f32>,
    grads: Vec<Vec<f32>>,
    rates: Vec<Vec<f32>>,
    losses: Option<Vec<Vec<f32>>>,
    decay: Option<Vec<f32>>,
    hyper: Option<Vec<f32>>,
}

#[derive(Debug, Clone, PartialEq)]
struct State {
    parameters: Vec<f64>,
    moment1: Vec<f64>,
    moment2: Vec<f64>,
    average: Vec<f64>,
    counters: Vec<u32>,
    norm: Vec<f64>,
}

impl Problem {
    fn new(op: Optimiser, steps: u32) -> Problem {
        let n = op.len() + 3;
        let grads = (0..steps).map(|s| noise(100 + s, n)).collect();
        let rates = (0..steps).map(|s| noise(200 + s, op.models).into_iter().map(|x| 1.0 + 0.5 * x).collect()).collect();
        Problem { op, start: noise(1, n), grads, rates, losses: None, decay: None, hyper: None }
    }

    fn run(&self, device: &Device) -> Result<State, Error> {
        let (op, n) = (&self.op, self.start.len() as u64);
        let up = |label: &str, x: &[f32]| device.upload(label, x).map(|b| View::from(&b));
        let zeros = |label: &str, len: u64| device.zeros(label, len).map(|b| View::from(&b));
        let parameters = up("parameters", &self.start)?;
        let (moment1, moment2, average) = (zeros("moment1", n)?, zeros("moment2", n)?, zeros("average", n)?);
        let (norm, scratch) = (zeros("norm", op.models)?, zeros("scratch", op.scratch())?);
        let counters = View::from(&device.zeros_u32("counters", 3 * op.models)?);
        let table = View::from(&device.upload_u32("table", &op.table())?);
        let decay = self.decay.as_ref().map(|x| up("decay", x)).transpose()?;
        let hyper = self.hyper.as_ref().map(|x| up("hyper", x)).transpose()?;
        let mut pass = device.pass("test");
        for step in 0..self.grads.len() {
            let (grads, rate) = (up("grads", &self.grads[step])?, up("rate", &self.rates[step])?);
            let loss = self.losses.as_ref().map(|x| up("loss", &x[step])).transpose()?;
            let args = OptimiserArgs {
                table: &table,
                grads: &grads,
                rate: &rate,
                loss: loss.as_ref(),
                decay: decay.as_ref(),
                hyper: hyper.as_ref(),
                parameters: &parameters,
                moment1: Some(&moment1),
                moment2: Some(&moment2),
                average: Some(&average),
                counters: &counters,
                norm: &norm,
                scratch: &scratch,
            };
            optimiser_step(&mut pass, op, &args)?;
        }
        let reads = [&parameters, &moment1, &moment2, &average, &norm].map(|v| pass.read(v));
        let [parameters, moment1, moment2, average, norm] = reads;
        let counters = pass.read(&counters)?;
        let mut done = pass.submit()?;
        Ok(State {
            parameters: done.f64(parameters?)?,
            moment1: done.f64(moment1?)?,
            moment2: done.f64(moment2?)?,
            average: done.f64(average?)?,
            norm: done.f64(norm?)?,
            counters: done.u32(counters)?,
        })
    }

    /// The textbook, one model after the other.
    fn expected(&self) -> State {
        let op = &self.op;
        let n = self.start.len();
        let zero = vec![0.0; n];
        let mut s = State {
            parameters: self.start.iter().map(|&x| f64::from(x)).collect(),
            moment1: zero.clone(),
            moment2: zero.clone(),
            average: zero,
            counters: vec![0; 3 * op.models as usize],
            norm: vec![0.0; op.models as usize],
        };
        for (step, m) in (0..self.grads.len()).flat_map(|s| (0..op.models as usize).map(move |m| (s, m))) {
            let places: Vec<(usize, usize)> = op
                .tensors
                .iter()
                .enumerate()
                .flat_map(|(k, t)| {
                    let first = t.offset as usize + m * t.size as usize;
                    (first..first + t.size as usize).map(move |i| (k, i))
                })
                .collect();
            let g: Vec<f64> = places.iter().map(|&(_, i)| f64::from(self.grads[step][i])).collect();
            let loss = self.losses.as_ref().map_or(0.0, |l| l[step][m]);
            let bad = g.iter().any(|x| !x.is_finite());
            let norm = g.iter().map(|x| x * x).sum::<f64>().sqrt();
            let own = self.hyper.as_ref().map(|h| [0, 1, 2, 3].map(|i| f64::from(h[4 * m + i])));
            let max_norm = own.map_or(op.max_grad_norm.unwrap_or(0.0), |h| h[3]);
            let status = u32::from(bad) + 2 * u32::from(!loss.is_finite()) + 4 * u32::from(!bad && max_norm == 0.0 && norm > 1e18);
            s.counters[3 * m + 2] = status;
            if status != 0 {
                s.counters[3 * m + 1] += 1;
                s.norm[m] = -1e30;
                continue;
            }
            s.counters[3 * m] += 1;
            s.norm[m] = norm;
            let t = f64::from(s.counters[3 * m]);
            let factor = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let lr = op.learning_rate * f64::from(self.rates[step][m]);
            let lambda = own.map_or(op.weight_decay, |h| h[2]);
            for (&(k, i), g) in places.iter().zip(&g) {
                let decay = lambda * self.decay.as_ref().map_or(1.0, |d| f64::from(d[k]));
                let (mut g, w) = (g * factor, s.parameters[i]);
                match op.algorithm {
                    Algorithm::Sgd { momentum, nesterov } => {
                        let mu = own.map_or(momentum, |h| h[0]);
                        g += decay * w;
                        if momentum > 0.0 {
                            s.moment1[i] = mu * s.moment1[i] + g;
                        }
                        let d = if nesterov { g + mu * s.moment1[i] } else { s.moment1[i] };
                        s.parameters[i] -= lr * if momentum > 0.0 { d } else { g };
                    }
                    Algorithm::Adamw { beta1, beta2, eps } | Algorithm::Adam { beta1, beta2, eps } => {
                        let (b1, b2) = own.map_or((beta1, beta2), |h| (h[0], h[1]));
                        if matches!(op.algorithm, Algorithm::Adam { .. }) {
                            g += decay * w;
                        } else {
                            s.parameters[i] *= 1.0 - lr * decay;
                        }
                        s.moment1[i] = b1 * s.moment1[i] + (1.0 - b1) * g;
                        s.moment2[i] = b2 * s.moment2[i] + (1.0 - b2) * g * g;
                        let root = s.moment2[i].sqrt() / (1.0 - b2.powf(t)).sqrt() + eps;
                        s.parameters[i] -= lr / (1.0 - b1.powf(t)) * s.moment1[i] / root;
                    }
                }
                let w = s.parameters[i];
                match op.average {
                    Average::None => {}
                    Average::Exponential { decay } => s.average[i] = if t == 1.0 { w } else { decay * s.average[i] + (1.0 - decay) * w },
                    Average::Polyak { start } => s.average[i] += (w - s.average[i]) / (t - f64::from(start)).max(1.0),
                }
            }
        }
        s
    }

    fn check(&self, what: &str) {
        let want = self.expected();
        for (name, device) in devices() {
            let got = self.run(&device).unwrap();
            let tolerance = if name.starts_with("reference") { 1e-11 } else { 3e-6 };
            assert_eq!(got.counters, want.counters, "{what} on {name}");
            for (part, got, want) in [
                ("parameters", &got.parameters, &want.parameters),
                ("moment1", &got.moment1, &want.moment1),
                ("moment2", &got.moment2, &want.moment2),
                ("average", &got.average, &want.average),
                ("norm", &got.norm, &want.norm),
            ] {
                for (i, (g, w)) in got.iter().zip(want).enumerate() {
                    assert!((g - w).abs() <= tolerance * (1.0 + w.abs()), "{what} on {name}: {part}[{i}] = {g:e}, expected {w:e}");
                }
            }
        }
    }
}

fn op(models: u64, size: u64, algorithm: Algorithm) -> Optimiser {
    Optimiser { algorithm, weight_decay: 0.1, ..Optimiser::adamw(models, size, 0.01) }
}

#[test]
fn every_rule_is_the_textbooks() {
    let sgd = |momentum, nesterov| Algorithm::Sgd { momentum, nesterov };
    let adam = Algorithm::Adam { beta1: 0.8, beta2: 0.99, eps: 1e-6 };
    for (i, (algorithm, average)) in [
        (ADAMW, Average::None),
        (ADAMW, Average::Exponential { decay: 0.9 }),
        (adam, Average::Polyak { start: 2 }),
        (sgd(0.0, false), Average::None),
        (sgd(0.9, false), Average::Exponential { decay: 0.5 }),
        (sgd(0.9, true), Average::Polyak { start: 0 }),
        (Algorithm::Adamw { beta1: 0.0, beta2: 0.0, eps: 1e-3 }, Average::None),
    ]
    .into_iter()
    .enumerate()
    {
        for (models, sizes) in [(1, vec![1]), (3, vec![7, 1, 64]), (2, vec![2049, 0, 5]), (1, vec![5000])] {
            let mut problem = Problem::new(Optimiser { average, tensors: Tensor::pack(models, &sizes), ..op(models, 1, algorithm) }, 4);
            problem.check(&format!("rule {i}, {models} x {sizes:?}"));
            problem.op.max_grad_norm = Some(0.7);
            problem.decay = Some((0..sizes.len()).map(|k| (k % 3) as f32 * 0.5).collect());
            problem.check(&format!("rule {i}, {models} x {sizes:?}, clipped, masked"));
        }
    }
}

#[test]
fn models_have_their_own_hyper_parameters() {
    let hyper = vec![0.9, 0.999, 0.0, 0.0, 0.5, 0.75, 0.1, 0.3, 0.0, 0.0, 0.2, 5.0];
    // ε damps steps along gradients that cancel against the decay: their sign is rounding
    for algorithm in [ADAMW, Algorithm::Adam { beta1: 0.9, beta2: 0.9, eps: 1e-3 }, Algorithm::Sgd { momentum: 0.5, nesterov: true }] {
        let mut problem = Problem::new(op(3, 130, algorithm), 5);
        problem.hyper = Some(hyper.clone());
        problem.check(&format!("{algorithm:?}"));
    }
}

#[test]
fn late_steps_are_corrected_precisely() {
    // 1 − βᵗ from t = 1 to where it is 1: the counters start late.
    let problem = Problem::new(op(1, 3, ADAMW), 1);
    for t in [1u32, 2, 17, 400, 5_000, 100_000, 20_000_000] {
        for (name, device) in devices() {
            let up = |x: &[f32]| View::from(&device.upload("x", x).unwrap());
            let (w, g, m, v) = (up(&[1.0, -2.0, 0.0]), up(&problem.grads[0]), up(&[0.0; 3]), up(&[0.0; 3]));
            let (rate, norm, scratch) = (up(&[1.0]), up(&[0.0]), up(&vec![0.0; problem.op.scratch() as usize]));
            let counters = View::from(&device.upload_u32("counters", &[t - 1, 0, 0]).unwrap());
            let table = View::from(&device.upload_u32("table", &problem.op.table()).unwrap());
            let args = OptimiserArgs {
                table: &table,
                grads: &g,
                rate: &rate,
                loss: None,
                decay: None,
                hyper: None,
                parameters: &w,
                moment1: Some(&m),
                moment2: Some(&v),
                average: None,
                counters: &counters,
                norm: &norm,
                scratch: &scratch,
            };
            let mut pass = device.pass("late");
            optimiser_step(&mut pass, &problem.op, &args).unwrap();
            let read = pass.read(&scratch).unwrap();
            let scales = pass.submit().unwrap().f64(read).unwrap();
            let t = f64::from(t);
            let want = [0.01 / -(t * 0.9f64.ln()).exp_m1(), 1.0 / (-(t * 0.999f64.ln()).exp_m1()).sqrt()];
            let tolerance = if name.starts_with("reference") { 1e-11 } else { 5e-7 };
            for (got, want) in scales[5..7].iter().zip(want) {
                assert!((got / want - 1.0).abs() < tolerance, "{name}, step {t}: {got:e}, expected {want:e}");
            }
        }
    }
}

#[test]
fn a_bad_model_skips_its_step_alone_and_bit_for_bit() {
    let clean = Problem::new(Optimiser { average: Average::Exponential { decay: 0.9 }, ..op(4, 5003, ADAMW) }, 3);
    let mut bad = clean.clone();
    bad.grads[1][5003 + 4999] = f32::NAN;
    bad.grads[1][2 * 5003] = f32::NEG_INFINITY;
    bad.losses = Some(vec![vec![0.0; 4], vec![1.0, f32::NAN, 1.0, f32::INFINITY], vec![0.0; 4]]);
    bad.check("bad models");
    for (name, device) in devices() {
        let (clean_end, mut bad_start) = (clean.run(&device).unwrap(), bad.clone());
        bad_start.grads.truncate(2);
        let after_skip = bad_start.run(&device).unwrap();
        let mut one = clean.clone();
        one.grads.truncate(1);
        let before = one.run(&device).unwrap();
        assert_eq!(after_skip.counters, [2, 0, 0, 1, 1, 3, 1, 1, 1, 1, 1, 2], "{name}");
        let parts = |s: State| [s.parameters, s.moment1, s.moment2, s.average];
        for (skipped, before) in parts(after_skip).iter().zip(&parts(before)) {
            assert_eq!(skipped[5003..], before[5003..], "{name}: a skipped model changed");
        }
        for (beside, alone) in parts(bad.run(&device).unwrap()).iter().zip(&parts(clean_end)) {
            assert_eq!(beside[..5003], alone[..5003], "{name}: a good model felt the others");
        }
    }
}

#[test]
fn norms_of_large_gradients_do_not_overflow() {
    for (name, device) in devices() {
        let mut problem = Problem::new(Optimiser { max_grad_norm: Some(1.0), ..op(2, 3000, ADAMW) }, 1);
        problem.grads[0][..3000].iter_mut().for_each(|g| *g *= 1e30);
        let (got, want) = (problem.run(&device).unwrap(), problem.expected());
        for (got, want) in got.norm.iter().zip(&want.norm).chain(got.parameters.iter().zip(&want.parameters)) {
            assert!((got / want - 1.0).abs() < 2e-5, "{name}: {got:e}, expected {want:e}");
        }
        problem.op.max_grad_norm = None;
        let got = problem.run(&device).unwrap();
        assert_eq!(got.counters, [0, 1, 4, 1, 0, 0], "{name}: squares that do not fit are refused");
        assert!(got.parameters[..3000].iter().zip(&problem.start).all(|(&w, &s)| w == f64::from(s)));
    }
}

#[test]
fn splits_change_no_bit() {
    for spec in ["cpu", "wgpu", "cuda-host"] {
        let whole = Device::open(spec).unwrap();
        let small = OpenOptions { binding_bytes: Some(32 << 10), work_per_launch: Some(50_000), groups_per_dimension: Some(3), ..OpenOptions::default() };
        let split = Device::open_with(spec, &small).unwrap();
        for (models, sizes) in [(61, vec![257, 8]), (3, vec![5, 9001]), (2, vec![12_289]), (700, vec![3, 1, 2])] {
            let average = Average::Polyak { start: 0 };
            let mut problem = Problem::new(Optimiser { average, max_grad_norm: Some(1.0), tensors: Tensor::pack(models, &sizes), ..op(models, 1, ADAMW) }, 2);
            problem.decay = Some(noise(9, sizes.len() as u64));
            assert_eq!(problem.run(&whole).unwrap(), problem.run(&split).unwrap(), "{spec} {models} x {sizes:?}");
            problem.op.algorithm = Algorithm::Sgd { momentum: 0.9, nesterov: true };
            assert_eq!(problem.run(&whole).unwrap(), problem.run(&split).unwrap(), "{spec} {models} x {sizes:?}, sgd");
        }
    }
}

#[test]
fn illegal_options_are_named() {
    let device = Device::open("cpu").unwrap();
    let good = op(2, 10, ADAMW);
    let run = |op: Optimiser| Problem::new(op, 1).run(&device);
    let named = |op: Optimiser, name: &str| match run(op) {
        Err(Error::Parameter { op: "adamw", name: got, .. }) => assert_eq!(got, name),
        other => panic!("{name}: {other:?}"),
    };
    named(Optimiser { learning_rate: f64::NAN, ..good.clone() }, "learning_rate");
    named(Optimiser { learning_rate: -1.0, ..good.clone() }, "learning_rate");
    named(Optimiser { weight_decay: -0.1, ..good.clone() }, "weight_decay");
    named(Optimiser { max_grad_norm: Some(0.0), ..good.clone() }, "max_grad_norm");
    named(Optimiser { algorithm: Algorithm::Adam { beta1: 1.0, beta2: 0.9, eps: 1e-8 }, ..good.clone() }, "beta1");
    named(Optimiser { algorithm: Algorithm::Adamw { beta1: 0.9, beta2: -0.1, eps: 1e-8 }, ..good.clone() }, "beta2");
    named(Optimiser { algorithm: Algorithm::Adamw { beta1: 0.9, beta2: 0.9, eps: f64::INFINITY }, ..good.clone() }, "eps");
    named(Optimiser { algorithm: Algorithm::Sgd { momentum: 0.0, nesterov: true }, ..good.clone() }, "momentum");
    named(Optimiser { average: Average::Exponential { decay: 1.0 }, ..good.clone() }, "average decay");
    let mut short = Problem::new(good.clone(), 1);
    short.grads[0].truncate(19);
    let overlap = vec![Tensor { offset: 0, size: 10 }, Tensor { offset: 19, size: 1 }];
    let overlap = run(Optimiser { tensors: overlap, ..good });
    assert!(matches!(overlap, Err(Error::Shape { op: "adamw", ref arg, .. }) if arg == "tensors[1]"), "{overlap:?}");
    assert!(matches!(short.run(&device), Err(Error::Shape { op: "adamw", arg, .. }) if arg == "grads"));
    let none = run(op(0, 10, ADAMW)).unwrap();
    assert!(none.counters.is_empty());
    run(op(3, 0, ADAMW)).unwrap();
}
