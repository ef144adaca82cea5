//! An LSTM that forecasts the next value, trained walk-forward: every fold, seed and learning rate is a model of its own, and all train at once.
//!
//!     cargo run --release --example 05_forecaster
//!
//! prints
//!
//!     36 models, 600 rows out of sample
//!     learning rate 0.003: error 0.16
//!     learning rate 0.01: error 0.13
//!     the last value as forecast: error 0.26

use forback::nn::{Cell, Declared, Linear, Module, Parameters, Recurrent};
use forback::ops::RecurrentOptions;
use forback::sim::walk_forward::WalkForward;
use forback::tape::{Tape, Var};
use forback::train::walk_forward::{Plan, walk_forward};
use forback::train::{Model, TrainConfig, data::Table};
use ndarray::Array2;

struct Forecaster {
    lstm: Recurrent,
    head: Linear,
}

impl Model for Forecaster {
    fn declare(&self, to: &mut Declared) {
        self.lstm.declare(to);
        self.head.declare(to);
    }

    fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> forback::Result<Var> {
        let y = self.lstm.forward(tape, parameters, x, RecurrentOptions::default())?;
        let &[m, b, t, h] = tape.shape(y) else { unreachable!("an LSTM gives [M,B,T,H]") };
        let last = tape.slice(y, 2, t - 1..t)?;
        let last = tape.reshape(last, &[m, b, h])?;
        self.head.forward(tape, parameters, last)
    }
}

fn main() -> forback::Result<()> {
    // An oscillation with noise: the next value can be known in part, from the last few.
    let rows = 1200;
    let noise = |t: usize| ((t * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.4;
    let series: Vec<f32> = (0..rows).map(|t| (t as f32 * 0.3).sin() + noise(t)).collect();
    let features = Array2::from_shape_fn((rows, 1), |(t, _)| series[t]);
    let targets = Array2::from_shape_fn((rows, 1), |(t, _)| series[(t + 1).min(rows - 1)]);
    let table = Table::new(features.view(), targets.view(), 16)?;

    let model = Forecaster { lstm: Recurrent::new("lstm", Cell::Lstm, 1, 8), head: Linear::new("head", 8, 1) };
    let windows = WalkForward { train: 500, test: 100, step: 100, ..WalkForward::default() };
    let plan = Plan { windows, horizon: 1, valid: 0.2, seeds: 3, learning_rates: vec![3e-3, 1e-2], per_series: false };
    let config = TrainConfig { epochs: 8, batch: 32, ..TrainConfig::default() };
    let device = forback::Device::open("cpu")?;
    let out = walk_forward(&device, &model, &table, &plan, &config, &mut |_| Ok(()))?;

    let error = |predictions: &[f32]| {
        let squares = out.rows.iter().zip(predictions).map(|(&t, p)| f64::from(p - series[t as usize + 1]).powi(2));
        (squares.sum::<f64>() / out.rows.len() as f64).sqrt()
    };
    println!("{} models, {} rows out of sample", out.losses.len(), out.rows.len());
    for (rate, predictions) in plan.learning_rates.iter().zip(&out.predictions) {
        println!("learning rate {rate}: error {:.2}", error(predictions));
    }
    println!("the last value as forecast: error {:.2}", error(&out.rows.iter().map(|&t| series[t as usize]).collect::<Vec<_>>()));
    Ok(())
}
