//! A thousand LSTM models with different starts and learning rates, trained at once: which rate learns fastest?
//!
//!     cargo run --release --example 07_thousand_models
//!
//! prints
//!
//!     1000 models of 199 parameters
//!     median validation loss at rate 1e-4: 0.27, at the best of 20 rates below 0.01: true
//!     the best rate is … (it depends on the processor's vectors)

use forback::nn::{Cell, Declared, Linear, Module, Parameters, Recurrent};
use forback::ops::RecurrentOptions;
use forback::tape::{Tape, Var};
use forback::train::data::{Fold, Table};
use forback::train::{Model, TrainConfig, Trainer};
use ndarray::Array2;

struct Small {
    lstm: Recurrent,
    head: Linear,
}

impl Model for Small {
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
    let rows = 400;
    let value = |t: usize| (t as f32 * 0.25).sin() * (t as f32 * 0.07).cos();
    let features = Array2::from_shape_fn((rows, 1), |(t, _)| value(t));
    let targets = Array2::from_shape_fn((rows, 1), |(t, _)| value(t + 1));
    let table = Table::new(features.view(), targets.view(), 12)?;
    let fold = Fold { train: (11..320).collect(), valid: (330..400).collect(), test: Vec::new(), scaler: table.scaler(0..320) };

    // 20 rates from 1e-4 to 0.1, 50 starts each.
    let rates: Vec<f64> = (0..1000).map(|k| 1e-4 * 1000f64.powf((k % 20) as f64 / 19.0)).collect();
    let model = Small { lstm: Recurrent::new("lstm", Cell::Lstm, 1, 6), head: Linear::new("head", 6, 1) };
    let config = TrainConfig { epochs: 3, batch: 16, learning_rate: rates.clone(), ..TrainConfig::default() };
    let folds = vec![fold; rates.len()];
    let device = forback::Device::open("cpu")?;
    let mut trainer = Trainer::new(&device, &model, &table, &folds, config)?;
    trainer.fit(&mut |_| Ok(()))?;
    let of = |i: usize| {
        let mut losses: Vec<f64> = trainer.progress().iter().skip(i).step_by(20).map(|p| p.best).collect();
        losses.sort_by(f64::total_cmp);
        losses[losses.len() / 2]
    };
    let best = (0..20).min_by(|&a, &b| of(a).total_cmp(&of(b))).unwrap_or(0);
    println!("1000 models of {} parameters", trainer.parameters().count());
    println!("median validation loss at rate 1e-4: {:.2}, at the best of 20 rates below 0.01: {}", of(0), of(best) < 0.01);
    println!("the best rate is {:.1e}: {:.5}", rates[best], of(best));
    Ok(())
}
