//! A transformer encoder that tells rising from falling windows: 8 models with different weights train side by side.
//!
//!     cargo run --release --example 06_transformer
//!
//! prints
//!
//!     2289 parameters a model, 51 launches a step
//!     right of 50 windows, model by model: [50, 50, 50, 50, 50, 50, 50, 50]

use forback::kernels::activation::Activation;
use forback::kernels::loss::Criterion;
use forback::nn::{Declared, EncoderLayer, Linear, Module, Parameters};
use forback::ops::AttentionOptions;
use forback::tape::{Tape, Var};
use forback::train::data::{Fold, Table};
use forback::train::{Model, TrainConfig, Trainer};
use ndarray::Array2;

struct Classifier {
    project: Linear,
    encoder: EncoderLayer,
    head: Linear,
}

impl Model for Classifier {
    fn declare(&self, to: &mut Declared) {
        self.project.declare(to);
        self.encoder.declare(to);
        self.head.declare(to);
    }

    fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> forback::Result<Var> {
        let x = self.project.forward(tape, parameters, x)?;
        let y = self.encoder.forward(tape, parameters, x, AttentionOptions { causal: true, ..Default::default() }, None)?;
        let mean = tape.mean(y, &[2])?;
        self.head.forward(tape, parameters, mean)
    }
}

fn main() -> forback::Result<()> {
    // Each window of 12 rows rises or falls under noise; column 1 tells where in the window a row is.
    let (rows, window) = (2400, 12);
    let noise = |t: usize| (t * 7919 % 1009) as f32 / 1009.0 - 0.5;
    let rises = |t: usize| (t / window * 31) % 7 < 3;
    let slope = |t: usize| (t % window) as f32 / window as f32 - 0.5;
    let features = Array2::from_shape_fn((rows, 2), |(t, c)| if c == 0 { noise(t) + if rises(t) { slope(t) } else { -slope(t) } } else { slope(t) });
    let targets = Array2::from_shape_fn((rows, 1), |(t, _)| f32::from(rises(t)));
    let table = Table::new(features.view(), targets.view(), window)?;
    let ends: Vec<u32> = (0..rows / window).map(|i| (i * window + window - 1) as u32).collect();
    let (train, test) = ends.split_at(150);
    let fold = Fold { train: train.to_vec(), valid: Vec::new(), test: test.to_vec(), scaler: table.scaler(0..1800) };

    let model = Classifier {
        project: Linear::new("project", 2, 16),
        encoder: EncoderLayer { prefix: "encoder".into(), width: 16, heads: 2, feedforward: 32, activation: Activation::Gelu, norm_first: true },
        head: Linear::new("head", 16, 1),
    };
    let folds = vec![fold; 8];
    let criterion = Criterion::Bce { positive_weight: 1.0 };
    let config = TrainConfig { epochs: 30, batch: 25, objective: criterion.into(), learning_rate: vec![3e-3], ..TrainConfig::default() };
    let device = forback::Device::open("cpu")?;
    let mut trainer = Trainer::new(&device, &model, &table, &folds, config)?;
    trainer.fit(&mut |_| Ok(()))?;
    let right = |logits: &[f32]| logits.iter().zip(test).filter(|(logit, t)| (**logit > 0.0) == rises(**t as usize)).count();
    let shares: Vec<usize> = trainer.predict()?.iter().map(|logits| right(logits)).collect();
    println!("{} parameters a model, {} launches a step", trainer.parameters().count(), trainer.launches());
    println!("right of {} windows, model by model: {shares:?}", test.len());
    Ok(())
}
