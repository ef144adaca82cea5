//! What is minimised, and what goes on around a step: objectives of returns per batch and per epoch, sums of gradients, averages of weights,
//! schedules, logs.

use crate::common::{Rng, open, open_all};
use forback::kernels::objective::Goal;
use forback::kernels::optimiser::{Algorithm, Average};
use forback::nn::{Cell, Declared, Linear, Module, Parameters, Recurrent};
use forback::ops::{ObjectiveOptions, RecurrentOptions};
use forback::sim::walk_forward::WalkForward;
use forback::tape::{Tape, Var};
use forback::train::data::{Fold, Table};
use forback::train::log::Log;
use forback::train::market::{Bars, Feature, Samples, Target};
use forback::train::schedule::{Rates, Schedule};
use forback::train::score;
use forback::train::walk_forward::{Plan, Stitched, folds, folds_of, select};
use forback::train::{Earnings, Epoch, Model, Objective, TrainConfig, Trainer};
use forback::{Device, Result};
use ndarray::Array2;

/// A GRU that holds a position between −1 and 1 in each of O assets.
struct Trader {
    cell: Recurrent,
    head: Linear,
}

impl Trader {
    fn new(assets: usize) -> Trader {
        Trader { cell: Recurrent::new("cell", Cell::Gru, 2, 4), head: Linear::new("head", 4, assets) }
    }
}

impl Model for Trader {
    fn declare(&self, to: &mut Declared) {
        self.cell.declare(to);
        self.head.declare(to);
    }

    fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var> {
        let y = self.cell.forward(tape, parameters, x, RecurrentOptions::default())?;
        let &[m, b, t, h] = tape.shape(y) else { panic!("a GRU gives [M,B,T,H]") };
        let last = tape.slice(y, 2, t - 1..t)?;
        let last = tape.reshape(last, &[m, b, h])?;
        let score = self.head.forward(tape, parameters, last)?;
        tape.unary(forback::kernels::map::Unary::Tanh, score)
    }
}

/// The first feature says in part what the next return will be.
fn table(rows: usize, assets: usize) -> Table {
    let mut rng = Rng::new(7);
    let features = Array2::from_shape_fn((rows, 2), |_| rng.normal() as f32);
    let targets = Array2::from_shape_fn((rows, assets), |(t, i)| 0.01 * (0.3 * features[[t, i % 2]] + rng.normal() as f32) + 0.0005);
    Table::new(features.view(), targets.view(), 3).unwrap()
}

fn fold(table: &Table, train: std::ops::Range<u32>, valid: std::ops::Range<u32>) -> Fold {
    let scaler = vec![[0.1, 0.9], [-0.1, 1.1]];
    assert_eq!(scaler.len(), table.inputs);
    Fold { train: train.collect(), valid: valid.collect(), test: vec![5, 6, 7], scaler }
}

/// Plain descent, so that a step of one epoch is minus the gradient times the rate.
fn descent(objective: Objective, batch: usize, rate: f64) -> TrainConfig {
    TrainConfig {
        epochs: 1,
        batch,
        objective,
        algorithm: Algorithm::Sgd { momentum: 0.0, nesterov: false },
        learning_rate: vec![rate],
        weight_decay: 0.0,
        max_grad_norm: None,
        shuffle: false,
        seed: 5,
        ..TrainConfig::default()
    }
}

const NAMES: [&str; 6] = ["cell.weight_ih_l0", "cell.weight_hh_l0", "cell.bias_ih_l0", "cell.bias_hh_l0", "head.weight", "head.bias"];

fn values(parameters: &Parameters) -> Vec<Vec<f32>> {
    NAMES.iter().map(|name| parameters.get(name).unwrap()).collect()
}

/// Start minus end over rate: the gradient of the one step that an epoch has.
fn gradient_of_epoch(device: &Device, table: &Table, folds: &[Fold], config: &TrainConfig) -> (Vec<Vec<f64>>, u64) {
    let net = Trader::new(table.outputs);
    let mut trainer = Trainer::new(device, &net, table, folds, config.clone()).unwrap();
    let start = values(trainer.parameters());
    trainer.one_epoch().unwrap();
    let end = values(trainer.parameters());
    let each = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)) / config.learning_rate[0]).collect();
    (start.iter().zip(&end).map(each).collect(), trainer.batch_bytes())
}

/// The same from one tape over all windows of one model, with the ops of the library.
fn gradient_of_tape(device: &Device, table: &Table, fold: &Fold, earnings: &Earnings) -> Vec<Vec<f64>> {
    let net = Trader::new(table.outputs);
    let mut declared = Declared::new();
    net.declare(&mut declared);
    let parameters = Parameters::new(device, 1, &declared, 5).unwrap();
    let (n, t, i, o) = (fold.train.len(), table.window, table.inputs, table.outputs);
    let scaled = |row: usize, c: usize| (table.features[row * i + c] - fold.scaler[c][0]) * fold.scaler[c][1];
    let windows: Vec<f32> =
        fold.train.iter().flat_map(|&last| (last as usize + 1 - t..=last as usize).flat_map(move |row| (0..i).map(move |c| scaled(row, c)))).collect();
    let earned: Vec<f32> = (0..o).flat_map(|a| fold.train.iter().map(move |&row| table.targets[row as usize * o + a])).collect();
    let (windows, earned) = (device.upload("windows", &windows).unwrap(), device.upload("earned", &earned).unwrap());
    let mut tape = Tape::new(device);
    let x = tape.input(&windows, &[1, n, t, i]).unwrap();
    let y = tape.input(&earned, &[1, o, n]).unwrap();
    let position = net.forward(&mut tape, &parameters, x).unwrap();
    let position = tape.permute(position, &[0, 2, 1]).unwrap();
    let returns = tape.net_returns(position, y, earnings.cost).unwrap();
    let returns = tape.mean(returns, &[1]).unwrap();
    let returns = tape.reshape(returns, &[1, n]).unwrap();
    let options = ObjectiveOptions { periods_per_year: earnings.periods_per_year, floor: earnings.floor, ..Default::default() };
    let value = tape.objective(earnings.goal, returns, options).unwrap();
    let loss = tape.affine(value, earnings.sign() as f32, 0.0).unwrap();
    tape.backward(loss).unwrap();
    let mut pass = device.pass("whole epoch");
    tape.record(&mut pass, &[]).unwrap();
    let reads: Vec<_> = NAMES.iter().map(|name| pass.read(parameters.grad(name).unwrap()).unwrap()).collect();
    let mut done = pass.submit().unwrap();
    reads.into_iter().map(|read| done.f64(read).unwrap()).collect()
}

fn close(what: &str, got: &[Vec<f64>], want: &[Vec<f64>], tolerance: f64) {
    let scale = want.iter().flatten().fold(0.0f64, |a, b| a.max(b.abs()));
    assert!(scale > 1e-3, "{what}: a gradient of {scale} tells nothing");
    for (name, (got, want)) in NAMES.iter().zip(got.iter().zip(want)) {
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * scale, "{what}, {name}[{i}]: {g}, one tape says {w}; largest {scale}");
        }
    }
}

const GOALS: [Goal; 6] = [
    Goal::Sharpe { risk_free: 0.0001 },
    Goal::Sortino { target: 0.0 },
    Goal::Calmar,
    Goal::MaxDrawdown { additive: true },
    Goal::Cvar { alpha: 0.1 },
    Goal::MeanVariance { risk_aversion: 2.0 },
];

/// The two sweeps give the gradient of one tape over the whole epoch, with costs, whatever the batch, one asset or two.
#[test]
fn an_epoch_in_two_sweeps_has_the_gradient_of_one_tape() {
    // Measured at most 2.6e-7 and 7.5e-7 of the largest gradient: it is read off weights, which are f32 on the host.
    for (name, tolerance) in [("reference", 6e-7), ("cpu", 2e-6)] {
        let device = open(name).unwrap();
        for (goal, batch, assets) in GOALS.into_iter().flat_map(|goal| [(goal, 1, 1), (goal, 13, 1), (goal, 64, 2)]) {
            let table = table(120, assets);
            let folds = [fold(&table, 2..103, 0..0)];
            let earnings = Earnings { cost: 0.0007, per_epoch: true, ..Earnings::new(goal) };
            // A step far beyond the weights' own rounding.
            let (got, _) = gradient_of_epoch(&device, &table, &folds, &descent(Objective::Earnings(earnings), batch, 10.0));
            let want = gradient_of_tape(&device, &table, &folds[0], &earnings);
            close(&format!("{name}, {goal:?}, batches of {batch}, {assets} assets"), &got, &want, tolerance);
        }
    }
}

#[test]
fn an_epoch_of_unequal_folds_is_that_of_each_alone_and_needs_no_more_memory() {
    let table = table(400, 1);
    let earnings = Earnings { cost: 0.001, per_epoch: true, ..Earnings::new(Goal::Sharpe { risk_free: 0.0 }) };
    let config = descent(Objective::Earnings(earnings), 16, 1.0);
    for device in open_all(&["cpu", "wgpu", "cuda-host"]) {
        let slow = device.info().kind.name() != "cpu";
        let long = if slow { 2..40 } else { 2..390 };
        let (short, long) = (fold(&table, 2..35, 40..60), fold(&table, long, 40..60));
        let used = device.used_bytes();
        let (alone, small) = gradient_of_epoch(&device, &table, std::slice::from_ref(&short), &config);
        let (both, _) = gradient_of_epoch(&device, &table, &[short, long.clone()], &config);
        for (alone, both) in alone.iter().zip(&both) {
            assert_eq!(alone[..], both[..alone.len()], "{}: another model changed this one", device.info());
        }
        let (_, large) = gradient_of_epoch(&device, &table, &[long], &config);
        assert_eq!(small, large, "24 batches take what 3 take");
        assert_eq!(device.used_bytes(), used, "nothing is left behind");
    }
}

#[test]
fn positions_learn_to_earn_per_batch_and_per_epoch() {
    let table = table(600, 1);
    let folds = vec![fold(&table, 2..400, 405..600); 2];
    for (per_epoch, goal) in [(false, GOALS[0]), (true, GOALS[0]), (true, GOALS[1]), (true, GOALS[5])] {
        let earnings = Earnings { per_epoch, cost: 0.0001, ..Earnings::new(goal) };
        let config = TrainConfig { epochs: 40, batch: 64, objective: Objective::Earnings(earnings), learning_rate: vec![1e-2], ..TrainConfig::default() };
        let device = open("cpu").unwrap();
        let net = Trader::new(1);
        let mut trainer = Trainer::new(&device, &net, &table, &folds, config).unwrap();
        let mut epochs: Vec<Epoch> = Vec::new();
        let mut batches = 0;
        trainer.watch(|_| Ok(()));
        trainer
            .fit(&mut |epoch| {
                batches += epoch.steps;
                epochs.push(epoch.clone());
                Ok(())
            })
            .unwrap();
        assert_eq!(batches, if per_epoch { 40 } else { 40 * 7 });
        for (k, progress) in trainer.progress().iter().enumerate() {
            let (first, best) = (epochs[0].valid[k], progress.best);
            assert!(best < first - 0.3 * first.abs() && best < 0.0, "{goal:?}, per epoch {per_epoch}, model {k}: {first} to {best}");
        }
        assert!(epochs.iter().all(|e| e.grad_norm.iter().all(|g| *g > 0.0) && e.learning_rate == vec![f64::from(1e-2f32); 2]));
    }
}

#[test]
fn gradients_of_several_batches_make_one_step() {
    let table = table(120, 1);
    let folds = [fold(&table, 2..98, 0..0)];
    let device = open("reference").unwrap();
    let gradient = |batch: usize, accumulate: usize| {
        let config = TrainConfig { accumulate, ..descent(forback::kernels::loss::Criterion::Mse.into(), batch, 1e3) };
        gradient_of_epoch(&device, &table, &folds, &config).0
    };
    // Measured 8.6e-8.
    close("6 batches of 16", &gradient(16, 6), &gradient(96, 1), 3e-7);
}

#[test]
fn what_is_averaged_is_validated_kept_and_resumed() {
    let (dir, table) = (tempfile::tempdir().unwrap(), table(150, 1));
    let path = dir.path().join("training.safetensors");
    let folds = vec![fold(&table, 2..100, 100..150); 2];
    let net = Trader::new(1);
    for (average, per_epoch) in [(Average::Exponential { decay: 0.9 }, false), (Average::Polyak { start: 3 }, true)] {
        let earnings = Earnings { per_epoch, ..Earnings::new(GOALS[0]) };
        let config =
            TrainConfig { epochs: 6, batch: 25, objective: Objective::Earnings(earnings), learning_rate: vec![1e-2], average, ..TrainConfig::default() };
        for device in open_all(&["cpu", "cuda-host"]) {
            let config = TrainConfig { epochs: if device.info().kind.name() == "cpu" { 6 } else { 2 }, ..config.clone() };
            let make = |config: &TrainConfig| Trainer::new(&device, &net, &table, &folds, config.clone()).unwrap();
            let mut whole = make(&config);
            let (mut plain, start) = (make(&TrainConfig { average: Average::None, ..config.clone() }), values(make(&config).parameters()));
            let mut own = start;
            for epoch in 0..config.epochs {
                let (with, without) = (whole.one_epoch().unwrap(), plain.one_epoch().unwrap());
                assert_eq!(values(whole.parameters()), values(plain.parameters()), "an average changed the training");
                assert_eq!(with.train, without.train);
                if let (true, Average::Polyak { start }) = (per_epoch, average) {
                    // One step an epoch: the mean of the weights after each later than `start`.
                    let n = (epoch + 1).saturating_sub(start as usize).max(1) as f32;
                    for (own, now) in own.iter_mut().flatten().zip(values(whole.parameters()).iter().flatten()) {
                        *own += (now - *own) / n;
                    }
                    let averages = values(whole.average().unwrap());
                    let worst = own.iter().flatten().zip(averages.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-6, "epoch {epoch}: {worst}");
                }
                if epoch > 3 || !per_epoch {
                    assert!(with.valid != without.valid, "epoch {epoch}: the average is not what is validated");
                }
                if epoch + 1 == config.epochs / 2 {
                    whole.save(&path).unwrap();
                }
            }
            let mut resumed = make(&config);
            resumed.resume(&path).unwrap();
            resumed.fit(&mut |_| Ok(())).unwrap();
            whole.fit(&mut |_| Ok(())).unwrap();
            assert_eq!(resumed.predict().unwrap(), whole.predict().unwrap());
            assert_eq!(values(resumed.average().unwrap()), values(whole.average().unwrap()));
            let error = plain.resume(&path).unwrap_err().to_string();
            assert!(error.contains("averaged"), "{error}");
        }
    }
}

#[test]
fn a_model_that_skips_steps_is_named_with_its_first_and_stands_in_the_log() {
    let (dir, table) = (tempfile::tempdir().unwrap(), table(120, 1));
    let path = dir.path().join("log.jsonl");
    let folds = vec![fold(&table, 2..90, 90..120); 3];
    let device = open("cpu").unwrap();
    let net = Trader::new(1);
    let config = TrainConfig {
        epochs: 2,
        batch: 16,
        learning_rate: vec![1e-2, 1e-2, 1e30],
        algorithm: Algorithm::Sgd { momentum: 0.9, nesterov: false },
        weight_decay: 1.0,
        max_grad_norm: None,
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(&device, &net, &table, &folds, config).unwrap();
    let mut log = Log::create(&path, &serde_json::json!({ "seed": 0 })).unwrap();
    let mut steps = 0;
    let mut troubles = Vec::new();
    trainer.watch(|step| {
        assert_eq!((step.batches, step.windows), (6, 48));
        Ok(())
    });
    trainer
        .fit(&mut |epoch| {
            steps += epoch.steps;
            troubles.extend(epoch.troubles());
            log.epoch(epoch, &|k| vec![("fold", serde_json::json!(k))])
        })
        .unwrap();
    assert_eq!(steps, 12);
    assert!(troubles.iter().all(|t| t.starts_with("model 2 skipped")), "{troubles:?}");
    assert!(troubles[0].contains("first step 1:") || troubles[0].contains("first step 2:"), "{troubles:?}");
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]["training"]["seed"]), (1 + 2 * 3, &serde_json::json!(0)));
    for (i, line) in lines[1..].iter().enumerate() {
        assert_eq!((line["epoch"].as_u64(), line["model"].as_u64(), line["fold"].as_u64()), (Some(i as u64 / 3), Some(i as u64 % 3), Some(i as u64 % 3)));
        assert_eq!(line["skipped"].as_u64().unwrap() > 0, i % 3 == 2, "{line}");
        assert_eq!(line["first_skipped"].is_null(), i % 3 != 2, "{line}");
        assert!(line["windows_per_second"].as_f64().unwrap() > 0.0 && (i % 3 == 2 || line["train"].as_f64().unwrap() > 0.0));
    }
    // A watcher ends the training.
    let mut stopped = Trainer::new(&device, &net, &table, &folds, TrainConfig::default()).unwrap();
    stopped.watch(|_| Err(forback::Error::Interrupted { message: "enough".into() }));
    assert!(stopped.fit(&mut |_| Ok(())).unwrap_err().to_string().contains("enough"));
}

/// torch 2.15: LinearLR(start_factor=1/4, total_iters=3) then CosineAnnealingLR(T_max=8, eta_min=0.1); CosineAnnealingLR(T_max=10);
/// ReduceLROnPlateau(factor=0.5, patience=2, threshold=0.01, threshold_mode='abs', min_lr=0.2), all on a rate of 1.
#[test]
fn learning_rates_are_those_of_pytorch() {
    let warm = [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        0.9657457896300791,
        0.8681980515339464,
        0.7222075445642905,
        0.55,
        0.3777924554357097,
        0.2318019484660537,
        0.134254210369921,
    ];
    let cosine = [
        1.0,
        0.9755282581475768,
        0.9045084971874737,
        0.7938926261462366,
        0.6545084971874737,
        0.5,
        0.34549150281252633,
        0.2061073738537635,
        0.09549150281252633,
        0.024471741852423234,
    ];
    for (rates, want) in
        [(Rates::new(Schedule::Cosine { floor: 0.1 }, 4, 12, 1), &warm[..]), (Rates::new(Schedule::Cosine { floor: 0.0 }, 0, 10, 1), &cosine[..])]
    {
        for (step, want) in want.iter().enumerate() {
            let got = f64::from(rates.at(step as u64)[0]);
            assert!((got - want).abs() < 1e-7, "step {step}: {got}, {want}");
        }
    }
    let nan = f64::NAN;
    let losses =
        [1.0, 0.9, 0.895, 0.891, 0.8901, 0.85, 0.86, 0.85, 0.845, 0.841, 0.84, 0.8, 0.81, 0.82, 0.83, nan, 0.84, 0.79, 0.79, 0.79, 0.79, 0.79, 0.79, 0.79];
    let want = [vec![1.0; 4], vec![0.5; 4], vec![0.25; 6], vec![0.2; 10]].concat();
    let schedule = Schedule::Plateau { factor: 0.5, patience: 2, threshold: 0.01, floor: 0.2 };
    let mut rates = Rates::new(schedule, 0, 24, 2);
    for (epoch, (loss, want)) in losses.iter().zip(want).enumerate() {
        // The second model's loss always falls.
        rates.epoch(&[*loss, 1.0 - epoch as f64]);
        let got = rates.at(epoch as u64);
        assert!((f64::from(got[0]) - want).abs() < 1e-7 && got[1] == 1.0, "epoch {epoch}: {got:?}, {want}");
    }
}

#[test]
fn options_without_meaning_are_refused_by_name() {
    let table = table(60, 1);
    let device = open("cpu").unwrap();
    let net = Trader::new(1);
    let text = |folds: &[Fold], config: TrainConfig| Trainer::new(&device, &net, &table, folds, config).map(|_| ()).unwrap_err().to_string();
    let good = fold(&table, 2..40, 40..60);
    let with = |earnings: Earnings| TrainConfig { batch: 8, objective: Objective::Earnings(earnings), ..TrainConfig::default() };
    let sharpe = Earnings::new(GOALS[0]);
    let one = [good.clone()];
    assert!(text(&one, with(Earnings { cost: -0.1, ..sharpe })).contains("cost"));
    assert!(text(&one, with(Earnings::new(Goal::Cvar { alpha: 2.0 }))).contains("alpha"));
    assert!(text(&one, TrainConfig { accumulate: 2, ..with(Earnings { per_epoch: true, ..sharpe }) }).contains("one step an epoch"));
    assert!(text(&one, TrainConfig { accumulate: 0, ..with(sharpe) }).contains("accumulate"));
    assert!(text(&one, TrainConfig { batch: 39, ..with(sharpe) }).contains("training samples of model 0"));
    let mut gap = good;
    gap.train.remove(10);
    assert!(text(&[gap], with(Earnings { per_epoch: true, ..Earnings::new(Goal::Calmar) })).contains("follow each other"));
    let trainer = Trainer::new(&device, &net, &table, &one, with(sharpe)).unwrap();
    assert!(trainer.predict_for(&[]).unwrap_err().to_string().contains("one per model"));
    assert!(trainer.predict_for(&[&[0]]).unwrap_err().to_string().contains("whole window"));
    assert!(trainer.parameters().with_values(device.zeros("short", 3).unwrap()).map(|_| ()).unwrap_err().to_string().contains("values"));
}

/// Two assets that differ from another pair from bar `cut` on.
fn closes(bars: usize, cut: usize) -> Array2<f32> {
    let (mut rng, mut other) = (Rng::new(4), Rng::new(5));
    let mut level = [4.0f64, 3.0];
    Array2::from_shape_fn((bars, 2), |(t, i)| {
        let (a, b) = (rng.normal(), other.normal());
        level[i] += 0.01 * if t < cut { a } else { b };
        level[i].exp() as f32
    })
}

#[test]
fn samples_know_the_past_alone_and_targets_what_they_say() {
    let (cut, window) = (150, 10);
    let features = Feature::list("returns:1,5,momentum:21,volatility:21").unwrap();
    assert_eq!(features[1..3], [Feature::Returns(5), Feature::Momentum(21)]);
    let (past, changed) = (closes(220, usize::MAX), closes(220, cut));
    for (target, horizon, delay, ahead) in
        [(Target::Return, 3, 1, 0), (Target::Sign, 1, 0, 0), (Target::Volatility, 5, 1, 0), (Target::Position, 1, 1, 0), (Target::Return, 2, 0, 1)]
    {
        let of = |close: &Array2<f32>| {
            let fill = Array2::from_shape_fn(close.dim(), |(t, i)| if ahead == 1 { close[[(t + 1).min(219), i]] } else { close[[t, i]] });
            Samples::of(&Bars { close: close.view(), fill: fill.view(), delay, ahead }, &features, target, horizon, window).unwrap()
        };
        let (a, b) = (of(&past), of(&changed));
        assert_eq!((a.reach, a.table.series, a.rows() + a.first), (horizon + delay + ahead, 2, 220));
        for row in 0..a.table.rows() {
            let ((asset, bar), d) = (a.place(row as u32), features.len());
            assert_eq!(asset, row / a.rows());
            let (x, y) = (&a.table.features[row * d..(row + 1) * d], &b.table.features[row * d..(row + 1) * d]);
            assert_eq!(x == y, bar < cut, "{target:?}, features of bar {bar}");
            let known = |s: &Samples| (s.truth[row].to_bits(), s.table.targets[row].to_bits());
            if bar + a.reach < cut {
                assert_eq!(known(&a), known(&b), "{target:?}, target of bar {bar}");
            } else if target != Target::Sign {
                assert!(known(&a) != known(&b) || bar + a.reach >= 220, "{target:?}, target of bar {bar} looks less far than it says");
            }
            assert_eq!(a.truth[row].is_nan(), bar + a.reach >= 220);
            let seen = f64::from(a.table.targets[row]) * a.unit[row] + a.base[row];
            assert!(a.truth[row].is_nan() || (seen - a.truth[row]).abs() < 1e-5, "{target:?}: {seen}, {}", a.truth[row]);
        }
        // The first row by hand.
        let (t, p) = (a.first, |bar: usize| f64::from(past[[bar, 0]]));
        let from = t + delay + ahead;
        let logs: Vec<f64> = (from + 1..=from + horizon).map(|j| (p(j) / p(j - 1)).ln()).collect();
        let mean = logs.iter().sum::<f64>() / horizon as f64;
        let want = match target {
            Target::Sign => f64::from(p(from + horizon) > p(from)),
            Target::Volatility => (logs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (horizon as f64 - 1.0)).sqrt().ln(),
            _ => p(from + horizon) / p(from) - 1.0,
        };
        assert!((a.truth[0] - want).abs() < 1e-9 * want.abs().max(1.0), "{target:?}: {}, by hand {want}", a.truth[0]);
        assert!((f64::from(a.table.features[1]) - (p(t) / p(t - 5)).ln()).abs() < 1e-6);
    }
}

#[test]
fn series_share_models_or_have_their_own_and_choices_are_made_inside() {
    let features = Array2::from_shape_fn((300, 1), |(t, _)| t as f32);
    let table = Table::new(features.view(), Array2::zeros((300, 1)).view(), 4).unwrap().stacked(3).unwrap();
    let windows = WalkForward { train: 40, test: 20, step: 20, ..WalkForward::default() };
    let shared = folds(&table, &windows, 2, 0.25).unwrap();
    assert_eq!(shared.len(), 2);
    for fold in &shared {
        assert_eq!(fold.train.len() % 3, 0);
        for list in [&fold.train, &fold.valid, &fold.test] {
            for (s, part) in list.chunks_exact(list.len() / 3).enumerate() {
                assert!(part.iter().all(|&row| (row as usize) / 100 == s && row as usize % 100 >= 3), "a window reaches into another series");
                assert!(part.iter().zip(&list[..]).all(|(row, first)| row % 100 == first % 100));
            }
        }
        let ends: Vec<usize> = (0..3).map(|s| fold.train[(s + 1) * fold.train.len() / 3 - 1] as usize).collect();
        let known: Vec<std::ops::Range<usize>> = ends.iter().map(|end| end + 1 - (ends[0] + 4 - fold.train[0] as usize)..end + 1).collect();
        assert_eq!(fold.scaler, table.scaler_of(&known));
    }
    let plan = Plan { windows, horizon: 2, valid: 0.25, seeds: 2, learning_rates: vec![1e-2, 1e-3], per_series: true };
    let models = plan.models(&table).unwrap();
    assert_eq!(models.folds.len(), 2 * 3 * 2 * 2);
    let place = models.place(12 + 4 + 2 + 1);
    assert_eq!((place.configuration, place.group, place.fold, place.seed), (1, 1, 1, 1));
    assert_eq!(models.folds[0].train, folds_of(&table, &windows, 2, 0.25, 0..1).unwrap()[0].train);

    // Predictions name their model; each configuration is best in one fold of one series.
    let predicted: Vec<Vec<f32>> = models.folds.iter().enumerate().map(|(k, fold)| vec![k as f32; fold.test.len()]).collect();
    let losses: Vec<f64> = (0..24).map(|k| if (k / 12 == 1) == (k % 12 / 2 == 3) { 0.5 } else { f64::NAN }).collect();
    let stitched = models.stitch(&table, &predicted, losses);
    assert_eq!(stitched.rows.len(), 3 * 40);
    let chosen = select(std::slice::from_ref(&stitched)).unwrap();
    assert_eq!(chosen.chosen, [0, 0, 0, 1, 0, 0]);
    for (i, value) in chosen.predictions.iter().enumerate() {
        let (group, fold) = (stitched.group[i] as usize, stitched.fold[i] as usize);
        assert_eq!(stitched.rows[i] as usize / 100, group);
        let first = if (group, fold) == (1, 1) { 12 } else { 0 } + (group * 2 + fold) * 2;
        assert_eq!(*value, first as f32 + 0.5, "the mean of two seeds");
    }
    let other = Stitched { rows: vec![1], ..stitched.clone() };
    assert!(select(&[stitched, other]).is_err());
    assert!(table.clone().stacked(7).is_err() && table.stacked(0).is_err());
}

/// scipy.stats: pearsonr, spearmanr; the rest by hand.
#[test]
fn forecasts_are_scored_as_elsewhere() {
    let (a, b) = ([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]);
    assert!((score::rank_correlation(&a, &b) - 0.9486832980505138).abs() < 1e-12);
    assert!((score::correlation(&[1.0, 2.0, 4.0], &[3.0, 1.0, 2.0]) + 0.327326835353989).abs() < 1e-12);
    assert!(score::correlation(&[1.0, 1.0], &[0.0, 2.0]).is_nan() && score::correlation(&[1.0], &[1.0]).is_nan());
    assert_eq!(score::r_squared(&[1.0, 2.0], &[1.0, 3.0], &[0.0, 0.0]), 1.0 - 1.0 / 5.0);
    assert_eq!(score::accuracy(&[true, false, true, true], &[true, true, false, true]), 0.5);
}
