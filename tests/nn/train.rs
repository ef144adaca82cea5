//! Training: models learn, do not disturb each other, know nothing of the future, and go on bit for bit from a checkpoint.

use crate::common::{Rng, open, open_all};
use forback::nn::{Cell, Declared, Linear, Module, Parameters, Recurrent};
use forback::ops::RecurrentOptions;
use forback::sim::walk_forward::WalkForward;
use forback::tape::{Tape, Var};
use forback::train::data::{Fold, Table};
use forback::train::schedule::{EarlyStopping, Schedule};
use forback::train::walk_forward::{Plan, folds, walk_forward};
use forback::train::{Epoch, Model, TrainConfig, Trainer};
use forback::{Device, Result};
use ndarray::Array2;

struct Net {
    cell: Recurrent,
    head: Linear,
}

impl Net {
    fn new(cell: Cell) -> Net {
        Net { cell: Recurrent::new("cell", cell, 2, 5), head: Linear::new("head", 5, 1) }
    }
}

impl Model for Net {
    fn declare(&self, to: &mut Declared) {
        self.cell.declare(to);
        self.head.declare(to);
    }

    fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var> {
        let y = self.cell.forward(tape, parameters, x, RecurrentOptions::default())?;
        let &[m, b, t, h] = tape.shape(y) else { panic!("an LSTM gives [M,B,T,H]") };
        let last = tape.slice(y, 2, t - 1..t)?;
        let last = tape.reshape(last, &[m, b, h])?;
        self.head.forward(tape, parameters, last)
    }
}

/// Two features, and the next value of the first as target; rows from `cut` on come from another seed.
fn table(rows: usize, cut: usize) -> Table {
    let (mut rng, mut other) = (Rng::new(1), Rng::new(2));
    let value = |t: usize| (t as f32 * 0.4).sin();
    let mut features = Array2::zeros((rows, 2));
    for t in 0..rows {
        let (a, b) = (0.1 * rng.normal() as f32, 0.1 * other.normal() as f32);
        features[[t, 0]] = value(t) + if t < cut { a } else { 3.0 + b };
        features[[t, 1]] = if t < cut { a } else { b };
    }
    let targets = Array2::from_shape_fn((rows, 1), |(t, _)| features[[(t + 1).min(rows - 1), 0]]);
    Table::new(features.view(), targets.view(), 6).unwrap()
}

fn fold(table: &Table, rows: usize) -> Fold {
    let (a, b) = (rows * 3 / 4, rows - 1);
    Fold { train: (5..a as u32).collect(), valid: (a as u32..b as u32).collect(), test: vec![7, 8, 9], scaler: table.scaler(0..a) }
}

fn config(epochs: usize) -> TrainConfig {
    TrainConfig { epochs, batch: 16, learning_rate: vec![1e-2], seed: 3, ..TrainConfig::default() }
}

fn train(device: &Device, folds: &[Fold], table: &Table, config: TrainConfig) -> (Vec<Epoch>, Vec<Vec<f32>>, Vec<f32>) {
    let net = Net::new(Cell::Lstm);
    let mut trainer = Trainer::new(device, &net, table, folds, config).unwrap();
    let mut epochs = Vec::new();
    let mut each = |epoch: &Epoch| {
        epochs.push(epoch.clone());
        Ok(())
    };
    trainer.fit(&mut each).unwrap();
    let weights = trainer.parameters().get("cell.weight_hh_l0").unwrap();
    (epochs, trainer.predict().unwrap(), weights)
}

#[test]
fn models_learn_alike_on_every_device() {
    let table = table(120, usize::MAX);
    let folds = vec![fold(&table, 120); 3];
    let mut all: Vec<(String, Vec<Epoch>)> = Vec::new();
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let slow = ["wgpu", "cuda-host"].contains(&device.info().kind.name());
        let (epochs, predictions, _) = train(&device, &folds, &table, config(if slow { 1 } else { 12 }));
        assert_eq!((predictions.len(), predictions[0].len()), (3, 3));
        assert!(predictions[0] != predictions[1], "two models started the same");
        if !slow {
            let (first, last) = (&epochs[0].valid, &epochs[epochs.len() - 1].valid);
            assert!(first.iter().zip(last).all(|(a, b)| *b < 0.5 * a), "{first:?} to {last:?}");
        }
        all.push((device.info().kind.name().into(), epochs));
    }
    for (name, epochs) in &all[1..] {
        for (k, (a, b)) in epochs[0].valid.iter().zip(&all[0].1[0].valid).enumerate() {
            assert!((a - b).abs() < 1e-3 * b, "{name}, model {k}: {a}, reference {b}");
        }
    }
}

#[test]
fn a_model_that_explodes_skips_steps_and_disturbs_nobody() {
    let table = table(90, usize::MAX);
    let folds = vec![fold(&table, 90); 3];
    let device = open("cpu").unwrap();
    let each = |middle: f64| TrainConfig { learning_rate: vec![1e-2, middle, 1e-2], max_grad_norm: None, ..config(3) };
    let ((_, _, good), (epochs, _, bad)) = (train(&device, &folds, &table, each(1e-2)), train(&device, &folds, &table, each(1e30)));
    let n = good.len() / 3;
    assert_eq!(good[..n], bad[..n], "model 0");
    assert_eq!(good[2 * n..], bad[2 * n..], "model 2");
    assert!(epochs.iter().all(|e| e.skipped[0] == 0 && e.skipped[2] == 0));
    assert!(epochs.iter().map(|e| e.skipped[1]).sum::<u32>() > 0, "{epochs:?}");
    assert!(bad.iter().all(|w| w.is_finite()), "a skipped step left its mark");
}

#[test]
fn a_resumed_training_has_the_bits_of_an_unbroken_one() {
    let (dir, table) = (tempfile::tempdir().unwrap(), table(90, usize::MAX));
    let path = dir.path().join("training.safetensors");
    let folds = vec![fold(&table, 90); 2];
    let schedule = Schedule::Plateau { factor: 0.5, patience: 0, threshold: 0.01, floor: 0.01 };
    let config = TrainConfig { schedule, stopping: Some(EarlyStopping { patience: 3, threshold: 0.0 }), ..config(6) };
    for device in open_all(&["cpu", "cuda-host"]) {
        let config = TrainConfig { epochs: if device.info().kind.name() == "cpu" { 6 } else { 2 }, ..config.clone() };
        let (_, whole, weights) = train(&device, &folds, &table, config.clone());
        let net = Net::new(Cell::Lstm);
        let mut first = Trainer::new(&device, &net, &table, &folds, config.clone()).unwrap();
        for _ in 0..config.epochs / 2 {
            first.one_epoch().unwrap();
        }
        first.save(&path).unwrap();
        let mut second = Trainer::new(&device, &net, &table, &folds, config).unwrap();
        second.resume(&path).unwrap();
        second.fit(&mut |_| Ok(())).unwrap();
        assert_eq!(second.predict().unwrap(), whole);
        assert_eq!(second.parameters().get("cell.weight_hh_l0").unwrap(), weights);
    }
    let other = Net::new(Cell::Gru);
    let device = open("cpu").unwrap();
    let error = Trainer::new(&device, &other, &table, &folds, config).unwrap().resume(&path).unwrap_err().to_string();
    assert!(error.contains("another architecture") && error.contains("weight_ih_l0"), "{error}");
}

#[test]
fn models_are_saved_as_pytorch_reads_them() {
    let (dir, device) = (tempfile::tempdir().unwrap(), open("cpu").unwrap());
    let path = dir.path().join("model.safetensors");
    let mut declared = Declared::new();
    Net::new(Cell::Lstm).declare(&mut declared);
    let (ours, theirs) = (Parameters::new(&device, 3, &declared, 1).unwrap(), Parameters::new(&device, 2, &declared, 9).unwrap());
    ours.save(&path, 2).unwrap();
    let data = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&data).unwrap();
    let mut names: Vec<_> = file.names().into_iter().map(|n| n.to_string()).collect();
    names.sort();
    let cell = ["cell.bias_hh_l0", "cell.bias_ih_l0", "cell.weight_hh_l0", "cell.weight_ih_l0"];
    assert_eq!(names, [&cell[..], &["head.bias", "head.weight"]].concat());
    assert_eq!(file.tensor("cell.weight_ih_l0").unwrap().shape(), [20, 2]);
    assert!(file.tensor("cell.bias_hh_l0").unwrap().data().iter().all(|&b| b == 0));

    let before = theirs.get("head.weight").unwrap();
    theirs.load(&path, 1).unwrap();
    let (want, got) = (ours.get("cell.weight_hh_l0").unwrap(), theirs.get("cell.weight_hh_l0").unwrap());
    assert_eq!(got[100..], want[200..]);
    assert_eq!(theirs.get("head.weight").unwrap()[..5], before[..5], "model 0 was not asked for");

    let mut other = Declared::new();
    Recurrent::new("cell", Cell::Lstm, 3, 5).declare(&mut other);
    other.add("extra", &[2], forback::nn::Init::Constant(0.0));
    let error = Parameters::new(&device, 1, &other, 1).unwrap().load(&path, 0).unwrap_err().to_string();
    for part in ["'cell.weight_ih_l0' is [20, 2], this model has [20, 3]", "'extra' is missing", "'head.bias' is not of this model"] {
        assert!(error.contains(part), "'{error}' does not say '{part}'");
    }
    let cut = dir.path().join("cut.safetensors");
    std::fs::write(&cut, &data[..data.len() / 2]).unwrap();
    assert!(theirs.load(&cut, 0).unwrap_err().to_string().contains("damaged"));
    assert!(theirs.load(&path, 2).unwrap_err().to_string().contains("2 models"));
}

/// Predictions up to a row are the same bits whatever comes later; with a future row among the training samples they are not.
#[test]
fn nothing_of_the_future_reaches_a_prediction() {
    let device = open("cpu").unwrap();
    let windows = WalkForward { train: 60, test: 20, step: 20, ..WalkForward::default() };
    let plan = Plan { windows, horizon: 1, valid: 0.2, seeds: 2, learning_rates: vec![1e-2], per_series: false };
    let net = Net::new(Cell::Gru);
    let cut = 101;
    let run = |table: &Table| walk_forward(&device, &net, table, &plan, &config(2), &mut |_| Ok(())).unwrap();
    let (past, changed) = (run(&table(160, usize::MAX)), run(&table(160, cut)));
    assert_eq!(past.rows, changed.rows);
    let known = past.rows.iter().take_while(|&&row| (row as usize) < cut).count();
    assert!(known > 20 && known < past.rows.len(), "{known} of {}", past.rows.len());
    assert_eq!(past.predictions[0][..known], changed.predictions[0][..known]);
    assert!(past.predictions[0][known..].iter().zip(&changed.predictions[0][known..]).all(|(a, b)| a != b));

    // The same comparison finds a fold that was given a row of the future.
    let leaky = |table: &Table| {
        let mut folds = folds(table, &windows, 1, 0.2).unwrap();
        folds[0].train.push(cut as u32 + 10);
        let mut trainer = Trainer::new(&device, &net, table, &folds[..1], config(2)).unwrap();
        trainer.fit(&mut |_| Ok(())).unwrap();
        trainer.predict().unwrap()
    };
    assert!(leaky(&table(160, usize::MAX)) != leaky(&table(160, cut)));
}

#[test]
fn folds_are_purged_and_scaled_on_the_past_alone() {
    let table = table(200, usize::MAX);
    let windows = WalkForward { train: 80, test: 30, step: 30, purge: 2, embargo: 3, ..WalkForward::default() };
    let all = folds(&table, &windows, 4, 0.25).unwrap();
    assert!(all.len() > 2);
    for (k, fold) in all.iter().enumerate() {
        let a = 30 * k as u32;
        assert_eq!((fold.train[0], fold.valid[fold.valid.len() - 1]), (a + 5, a + 80 - 4 - 1), "whole windows, targets inside");
        assert_eq!(fold.valid[0] - fold.train[fold.train.len() - 1], 5, "targets of the last learning samples end before validation");
        assert_eq!((fold.test[0], fold.test.len()), (a + 85, 30), "purge and embargo");
        assert_eq!(fold.scaler, table.scaler(a as usize..fold.train[fold.train.len() - 1] as usize + 1));
    }
    let text = |windows: WalkForward, horizon: u32, valid: f64| folds(&table, &windows, horizon, valid).unwrap_err().to_string();
    assert!(text(WalkForward { train: 8, ..windows }, 4, 0.0).contains("lengthen train"));
    assert!(text(windows, 4, 1.0).contains("[0, 1)"));
    let nan = Array2::from_shape_fn((10, 1), |(t, _)| if t == 4 { f32::NAN } else { 0.0 });
    let error = Table::new(nan.view(), Array2::zeros((10, 1)).view(), 3).unwrap_err().to_string();
    assert!(error.contains("features, row 4, column 0") && error.contains("NaN"), "{error}");
    let samples = Fold { train: vec![3], valid: vec![], test: vec![], scaler: table.scaler(0..10) };
    let error = Trainer::new(&open("cpu").unwrap(), &Net::new(Cell::Gru), &table, &[samples], config(1)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("a sample of model 0") && error.contains("row 3"), "{error}");
}
