//! Losses: values as torch computes them, gradients against central differences, every column against the reference, NaN and splits.

use forback::kernels::loss::{Criterion, Loss, LossArgs, loss, loss_backward};
use forback::kernels::{Device, Error, OpenOptions, Schedule, View};

const NONE: u32 = u32::MAX;

fn devices() -> Vec<(String, Device)> {
    let open = |name: &str, options: OpenOptions| (format!("{name} {options:?}"), Device::open_with(name, &options).unwrap());
    let schedule = |s| OpenOptions { schedule: Some(s), ..OpenOptions::default() };
    let checked = |c| OpenOptions { checked: Some(c), ..OpenOptions::default() };
    vec![
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

#[derive(Clone)]
struct Problem {
    op: Loss,
    prediction: Vec<f32>,
    target: Vec<f32>,
    classes: Vec<u32>,
    weight: Option<Vec<f32>>,
    quantiles: Vec<f32>,
    grad_value: Vec<f32>,
}

impl Problem {
    fn new(op: Loss) -> Problem {
        let rows = op.target_models * op.rows;
        let wide = rows * if op.criterion == Criterion::Pinball { 1 } else { op.columns };
        let mut target: Vec<f32> = noise(2, wide);
        match op.criterion {
            Criterion::Bce { .. } => target.iter_mut().enumerate().for_each(|(i, y)| *y = if i % 5 == 0 { 0.25 } else { (i % 2) as f32 }),
            Criterion::Kl => target.chunks_mut(op.columns as usize).for_each(|row| {
                row.iter_mut().for_each(|y| *y = if *y < -0.8 { 0.0 } else { *y + 1.0 });
                let sum: f32 = row.iter().sum::<f32>().max(1e-3);
                row.iter_mut().for_each(|y| *y /= sum);
            }),
            _ => {}
        }
        let classes = noise(3, rows).into_iter().enumerate().map(|(i, x)| if i % 7 == 3 { NONE } else { ((x + 1.0) * 500.0) as u32 % op.columns as u32 });
        Problem {
            op,
            prediction: noise(1, op.models * op.rows * op.columns).into_iter().map(|x| 4.0 * x).collect(),
            target,
            classes: classes.collect(),
            weight: None,
            quantiles: (0..op.columns).map(|q| (q as f32 + 0.5) / op.columns as f32).collect(),
            grad_value: noise(5, op.models),
        }
    }

    /// Values [M] and gradients [M,N,C].
    fn run(&self, device: &Device) -> Result<(Vec<f64>, Vec<f64>), Error> {
        let op = &self.op;
        let up = |label: &str, x: &[f32]| device.upload(label, x).map(|b| View::from(&b));
        let zeros = |label: &str, len: u64| device.zeros(label, len).map(|b| View::from(&b));
        let prediction = up("prediction", &self.prediction)?;
        let target = match op.criterion {
            Criterion::CrossEntropy { .. } => View::from(&device.upload_u32("classes", &self.classes)?),
            _ => up("target", &self.target)?,
        };
        let weight = self.weight.as_ref().map(|w| up("weight", w)).transpose()?;
        let (quantiles, grad_value) = (up("quantiles", &self.quantiles)?, up("grad_value", &self.grad_value)?);
        let args = LossArgs { prediction: &prediction, target: &target, weight: weight.as_ref(), quantiles: Some(&quantiles) };
        let (value, total, scratch) = (zeros("value", op.models)?, zeros("total", op.saved())?, zeros("scratch", op.scratch())?);
        let grad = zeros("grad", self.prediction.len() as u64)?;
        let mut pass = device.pass("test");
        loss(&mut pass, op, &args, &value, &total, &scratch)?;
        loss_backward(&mut pass, op, &args, &total, &grad_value, &grad)?;
        let (value, grad) = (pass.read(&value)?, pass.read(&grad)?);
        let mut done = pass.submit()?;
        Ok((done.f64(value)?, done.f64(grad)?))
    }
}

fn criteria() -> [Criterion; 9] {
    [
        Criterion::Mse,
        Criterion::Huber { delta: 0.7 },
        Criterion::Bce { positive_weight: 1.0 },
        Criterion::Bce { positive_weight: 2.5 },
        Criterion::Pinball,
        Criterion::CrossEntropy { smoothing: 0.0 },
        Criterion::CrossEntropy { smoothing: 0.1 },
        Criterion::Kl,
        Criterion::Huber { delta: 10.0 },
    ]
}

fn problems() -> Vec<Problem> {
    let mut all = Vec::new();
    for criterion in criteria() {
        for (models, rows, columns) in [(1, 1, 1), (2, 3, 2), (3, 257, 1), (2, 300, 5), (1, 2100, 2), (5, 7, 41)] {
            let own = Loss::new(criterion, models, rows, columns);
            all.push(Problem::new(own));
            let mut weighted = Problem::new(own);
            weighted.weight = Some(noise(6, models * rows).into_iter().map(|w| (w + 0.3).max(0.0)).collect());
            all.push(weighted);
            let mut shared = Problem::new(Loss { target_models: 1, weight_models: 1, ..own });
            shared.weight = Some(noise(7, rows).into_iter().map(|w| (w + 0.5).max(0.0)).collect());
            all.push(shared);
        }
    }
    all
}

#[test]
fn values_are_torchs() {
    // torch 2.15, float64, x = [[2, -1, .5], [0, 3, -2]] and the targets below: mse_loss; huber_loss(delta=1);
    // binary_cross_entropy_with_logits(pos_weight=2); cross_entropy with label_smoothing 0 and .1;
    // kl_div(log_softmax(x), q, reduction="batchmean"). torch has no quantile loss: that one is summed here.
    let x = [2.0, -1.0, 0.5, 0.0, 3.0, -2.0];
    let device = Device::open("reference").unwrap();
    let value = |criterion, target: &[f32], rows, columns| {
        let mut p = Problem::new(Loss::new(criterion, 1, rows, columns));
        (p.prediction, p.target, p.classes) = (x.to_vec(), target.to_vec(), vec![0, 2]);
        p.run(&device).unwrap().0[0]
    };
    let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-14 * (1.0 + want.abs()), "{got:.17}, expected {want:.17}");
    let y = [1.0, -1.0, 2.0, 0.5, 1.0, -2.25];
    close(value(Criterion::Mse, &y, 2, 3), 1.260_416_666_666_666_7);
    close(value(Criterion::Huber { delta: 1.0 }, &y, 6, 1), 0.526_041_666_666_666_6);
    close(value(Criterion::Bce { positive_weight: 2.0 }, &[1.0, 0.0, 1.0, 0.0, 1.0, 0.5], 2, 3), 0.749_330_929_706_045);
    close(value(Criterion::CrossEntropy { smoothing: 0.0 }, &y, 2, 3), 2.648_148_266_017_152_3);
    close(value(Criterion::CrossEntropy { smoothing: 0.1 }, &y, 2, 3), 2.606_481_599_350_485_7);
    close(value(Criterion::Kl, &[0.5, 0.25, 0.25, 0.0, 1.0, 0.0], 2, 3), 0.190_787_880_597_193_18);
    // one target a row, quantiles 1/6, 1/2, 5/6
    let taus = [1.0f32 / 6.0, 0.5, 2.5 / 3.0].map(f64::from);
    let e = [1.0 - 2.0, 1.0 + 1.0, 1.0 - 0.5, -1.0 - 0.0, -1.0 - 3.0, -1.0 + 2.0];
    let pinball: f64 = e.iter().enumerate().map(|(i, &e): (usize, &f64)| (taus[i % 3] * e).max((taus[i % 3] - 1.0) * e)).sum();
    close(value(Criterion::Pinball, &[1.0, -1.0], 2, 3), pinball / 6.0);
}

#[test]
fn gradients_are_central_differences() {
    let device = Device::open("reference").unwrap();
    for problem in problems().iter().filter(|p| p.prediction.len() < 100) {
        let (_, grad) = problem.run(&device).unwrap();
        let each = (problem.op.rows * problem.op.columns) as usize;
        for i in 0..problem.prediction.len() {
            // f32 inputs: a step that they hold exactly
            let h = 1.0 / 1024.0;
            let moved = |by: f32| {
                let mut p = problem.clone();
                p.prediction[i] = (p.prediction[i] * 4096.0).round() / 4096.0 + by;
                p
            };
            let at = |by: f32| moved(by).run(&device).unwrap().0[i / each];
            let here = moved(0.0);
            let want = f64::from(problem.grad_value[i / each]) * (at(h) - at(-h)) / (2.0 * f64::from(h));
            let got = if here.prediction[i] == problem.prediction[i] { grad[i] } else { here.run(&device).unwrap().1[i] };
            let curved = if matches!(problem.op.criterion, Criterion::Pinball | Criterion::Huber { .. }) { 1e-3 } else { 3e-6 };
            assert!((got - want).abs() < curved, "{:?} [{i}]: {got:e}, differences {want:e}", problem.op);
        }
    }
}

#[test]
fn columns_agree_with_the_reference() {
    let reference = Device::open("reference").unwrap();
    let devices = devices();
    for problem in problems() {
        let (value, grad) = problem.run(&reference).unwrap();
        for (name, device) in &devices {
            let (got, got_grad) = problem.run(device).unwrap();
            for (i, (got, want)) in got.iter().zip(&value).enumerate() {
                assert!((got - want).abs() <= 2e-6 * (1.0 + want.abs()), "{name}: {:?} value[{i}] {got:e}, reference {want:e}", problem.op);
            }
            let scale = grad.iter().fold(1e-30f64, |a, b| a.max(b.abs()));
            for (i, (got, want)) in got_grad.iter().zip(&grad).enumerate() {
                assert!((got - want).abs() <= 2e-6 * scale, "{name}: {:?} gradient[{i}] {got:e}, reference {want:e}", problem.op);
            }
        }
    }
}

#[test]
fn extreme_logits_stay_finite() {
    for (name, device) in devices() {
        for criterion in [Criterion::Bce { positive_weight: 1.0 }, Criterion::CrossEntropy { smoothing: 0.0 }] {
            let mut p = Problem::new(Loss::new(criterion, 2, 4, 2));
            p.prediction = vec![1e4, -1e4, -1e4, 1e4, 90.0, -90.0, 0.0, -1e30, 1e4, -1e4, -1e4, 1e4, 90.0, -90.0, 0.0, -1e30];
            p.classes = vec![0, 0, 0, 0, 1, 1, 1, 0];
            p.target = [0.0, 1.0].repeat(8);
            let (value, grad) = p.run(&device).unwrap();
            assert!(value.iter().chain(&grad).all(|x| x.is_finite()), "{name} {criterion:?}: {value:?} {grad:?}");
        }
    }
}

#[test]
fn nan_stays_in_its_model_and_masked_rows_may_hold_anything() {
    for (name, device) in devices() {
        for criterion in criteria() {
            let clean = Problem::new(Loss::new(criterion, 3, 300, 3));
            let (value, grad) = clean.run(&device).unwrap();
            let mut bad = clean.clone();
            // a row that counts in every criterion
            bad.prediction[900 + 3 * 5 + 1] = f32::NAN;
            let (bad_value, bad_grad) = bad.run(&device).unwrap();
            assert!(bad_value[1].is_nan(), "{name} {criterion:?}: the loss is {}", bad_value[1]);
            assert!(bad_grad[900 + 3 * 5 + 1].is_nan(), "{name} {criterion:?}: the gradient hides it");
            assert!(bad_value[0] == value[0] && bad_value[2] == value[2], "{name} {criterion:?}: it spreads");
            assert!(bad_grad[..900] == grad[..900] && bad_grad[1800..] == grad[1800..], "{name} {criterion:?}: its gradient spreads");
            let mut masked = bad.clone();
            masked.weight = Some((0..900).map(|i| if i == 305 || i >= 600 { 0.0 } else { 1.0 }).collect());
            let (value, grad) = masked.run(&device).unwrap();
            assert!(value.iter().chain(&grad).all(|x| x.is_finite()), "{name} {criterion:?}: a masked row counts");
            assert!(value[2] == 0.0 && grad[1800..].iter().all(|&g| g == 0.0) && grad[915..918] == [0.0; 3], "{name} {criterion:?}");
        }
    }
}

#[test]
fn splits_change_no_bit() {
    for spec in ["cpu", "wgpu", "cuda-host"] {
        let whole = Device::open(spec).unwrap();
        let small = OpenOptions { binding_bytes: Some(48 << 10), work_per_launch: Some(60_000), groups_per_dimension: Some(3), ..OpenOptions::default() };
        let split = Device::open_with(spec, &small).unwrap();
        for criterion in criteria() {
            for (models, rows, columns) in [(37, 61, 3), (3, 3001, 3), (700, 2, 1)] {
                let own = Loss::new(criterion, models, rows, columns);
                for op in [own, Loss { target_models: 1, weight_models: 1, rows: rows.min(1000), ..own }] {
                    let mut p = Problem::new(op);
                    p.weight = Some(noise(8, op.weight_models * op.rows).into_iter().map(f32::abs).collect());
                    assert_eq!(p.run(&whole).unwrap(), p.run(&split).unwrap(), "{spec} {op:?}");
                }
            }
        }
    }
}

#[test]
fn illegal_options_are_named() {
    let device = Device::open("cpu").unwrap();
    let named = |criterion, name: &str| match Problem::new(Loss::new(criterion, 1, 2, 2)).run(&device) {
        Err(Error::Parameter { op: "loss", name: got, .. }) => assert_eq!(got, name),
        other => panic!("{name}: {other:?}"),
    };
    named(Criterion::Huber { delta: 0.0 }, "delta");
    named(Criterion::Bce { positive_weight: f64::NAN }, "positive_weight");
    named(Criterion::CrossEntropy { smoothing: 1.0 }, "smoothing");
    let shape = |op: Loss, name: &str| match Problem::new(op).run(&device) {
        Err(Error::Shape { op: "loss", arg, .. }) => assert_eq!(arg, name),
        other => panic!("{name}: {other:?}"),
    };
    let good = Loss::new(Criterion::Mse, 3, 4, 2);
    shape(Loss { target_models: 2, ..good }, "target_models");
    let mut p = Problem::new(good);
    p.target.pop();
    assert!(matches!(p.run(&device), Err(Error::Shape { op: "loss", arg, .. }) if arg == "target"));
    let none = Problem::new(Loss::new(Criterion::Mse, 3, 0, 2)).run(&device).unwrap();
    assert_eq!(none.0, [0.0; 3]);
    assert!(Problem::new(Loss::new(Criterion::Mse, 0, 5, 2)).run(&device).unwrap().0.is_empty());
}
