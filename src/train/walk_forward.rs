//! Walk-forward training: every fold, seed and configuration is a model of its own, and all of them train together.
//!
//! ```text
//! rows   a                              b          c              d
//!        ├── learn ──┤ h ┤── validate ──┤ gap      ├─── predict ──┤          windows [a,b), [c,d) of sim::walk_forward
//! ```
//! A sample t of the training part has its whole window and its target inside it: a + T − 1 ≤ t and t + h < b, with h the rows that a target
//! looks ahead. Validation takes the last share of those; learning ends h rows before it. Test samples are c ≤ t < d: their windows may reach
//! back over the gap, which is past by then. Scalers know the learning rows a … of their fold alone. Predictions are stitched in order of
//! time, each test window up to the start of the next one.

use super::data::{Fold, Table};
use super::{Epoch, Model, TrainConfig, Trainer};
use crate::sim::walk_forward::WalkForward;
use crate::{Device, Error, Result};

/// What trains together.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Windows.
    pub windows: WalkForward,
    /// Rows that a target looks ahead: 1 for the next return.
    pub horizon: u32,
    /// Share of a training window that chooses the best epoch, in [0, 1).
    pub valid: f64,
    /// Models that differ in their start and order alone, per fold and configuration; their predictions are averaged.
    pub seeds: usize,
    /// Configurations: learning rates.
    pub learning_rates: Vec<f64>,
}

/// Predictions out of sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Stitched {
    /// Rows that are predicted, ascending.
    pub rows: Vec<u32>,
    /// Fold that predicted each row.
    pub fold: Vec<u32>,
    /// Of each configuration, the mean over seeds [rows,O].
    pub predictions: Vec<Vec<f32>>,
    /// Best validation loss of each configuration, fold and seed.
    pub losses: Vec<f64>,
}

/// Samples and scaler of every window.
/// # Errors
/// Those of [`WalkForward::windows`]; `Parameter` for a share outside [0, 1), or a window too short to learn from, with what it needs.
pub fn folds(table: &Table, windows: &WalkForward, horizon: u32, valid: f64) -> Result<Vec<Fold>> {
    let wrong = |name: &str, value: String, help: String| Err(Error::Parameter { op: "walk_forward", name: name.into(), value, help });
    if !(0.0..1.0).contains(&valid) {
        return wrong("valid", valid.to_string(), "give a share in [0, 1)".into());
    }
    let rows = table.rows() as u32;
    let reach = table.window as u32 - 1;
    let mut out = Vec::new();
    for [a, b, c, d] in windows.windows(0, rows.saturating_sub(horizon))? {
        let samples: Vec<u32> = (a + reach..b.saturating_sub(horizon)).collect();
        let held = (samples.len() as f64 * valid) as usize;
        let learn = samples.len().saturating_sub(held + if held > 0 { horizon as usize } else { 0 });
        if learn == 0 {
            let help = format!("windows of {} rows, targets {horizon} ahead and {held} rows to validate leave none; lengthen train", table.window);
            return wrong("train", format!("{} rows", b - a), help);
        }
        let train = samples[..learn].to_vec();
        let scaler = table.scaler(a as usize..train[learn - 1] as usize + 1);
        out.push(Fold { train, valid: samples[samples.len() - held..].to_vec(), test: (c.max(reach)..d).collect(), scaler });
    }
    Ok(out)
}

/// Trains all folds × configurations × seeds at once and stitches what they predict.
/// # Errors
/// As for [`folds`] and [`Trainer`].
pub fn walk_forward<N: Model>(
    device: &Device,
    model: &N,
    table: &Table,
    plan: &Plan,
    config: &TrainConfig,
    each: &mut dyn FnMut(&Epoch) -> Result<()>,
) -> Result<Stitched> {
    if plan.seeds == 0 || plan.learning_rates.is_empty() {
        let help = "give at least one seed and one learning rate".into();
        return Err(Error::Parameter { op: "walk_forward", name: "seeds, learning_rates".into(), value: "none".into(), help });
    }
    let base = folds(table, &plan.windows, plan.horizon, plan.valid)?;
    // Model (configuration, fold, seed), seeds innermost.
    let per = plan.learning_rates.len() * plan.seeds;
    let models: Vec<Fold> = plan.learning_rates.iter().flat_map(|_| base.iter().flat_map(|fold| std::iter::repeat_n(fold.clone(), plan.seeds))).collect();
    let rates = plan.learning_rates.iter().flat_map(|&rate| std::iter::repeat_n(rate, base.len() * plan.seeds)).collect();
    let config = TrainConfig { learning_rate: rates, ..config.clone() };
    let mut trainer = Trainer::new(device, model, table, &models, config)?;
    trainer.fit(each)?;
    let predicted = trainer.predict()?;
    let o = table.outputs;
    let mut out = Stitched { rows: Vec::new(), fold: Vec::new(), predictions: vec![Vec::new(); plan.learning_rates.len()], losses: Vec::new() };
    out.losses.extend(trainer.progress().iter().map(|p| p.best));
    debug_assert_eq!(models.len(), base.len() * per);
    for (f, fold) in base.iter().enumerate() {
        let until = base.get(f + 1).and_then(|next| next.test.first().copied()).unwrap_or(u32::MAX);
        let kept = fold.test.iter().take_while(|&&row| row < until).count();
        out.rows.extend(&fold.test[..kept]);
        out.fold.extend(std::iter::repeat_n(f as u32, kept));
        for (c, predictions) in out.predictions.iter_mut().enumerate() {
            let first = (c * base.len() + f) * plan.seeds;
            for i in 0..kept * o {
                let sum: f64 = (first..first + plan.seeds).map(|k| f64::from(predicted[k][i])).sum();
                predictions.push((sum / plan.seeds as f64) as f32);
            }
        }
    }
    Ok(out)
}
