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
//!
//! Several series of a [`Table`], such as assets, share each model (pooled) or have models of their own. A choice among configurations is
//! made per fold, on the validation rows inside its training window: [`select`].

use super::data::{Fold, Table};
use super::{Epoch, Model, TrainConfig, Trainer};
use crate::sim::walk_forward::WalkForward;
use crate::{Device, Error, Result};
use std::ops::Range;

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
    /// A model for each series instead of one for all.
    pub per_series: bool,
}

/// Which model is which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Configuration.
    pub configuration: usize,
    /// Group of series: the series itself, or 0 where all share a model.
    pub group: usize,
    /// Fold.
    pub fold: usize,
    /// Seed.
    pub seed: usize,
}

/// The models of a plan: configurations × groups × folds × seeds, seeds innermost.
#[derive(Debug, Clone)]
pub struct Models {
    /// Samples of each model, M.
    pub folds: Vec<Fold>,
    /// Learning rate of each.
    pub learning_rates: Vec<f64>,
    /// Windows of the folds (learning from, to, prediction from, to), rows of a series.
    pub windows: Vec<[u32; 4]>,
    configurations: usize,
    groups: usize,
    seeds: usize,
}

/// Predictions out of sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Stitched {
    /// Rows that are predicted: by group, then ascending within each series.
    pub rows: Vec<u32>,
    /// Fold that predicted each row.
    pub fold: Vec<u32>,
    /// Group of each row.
    pub group: Vec<u32>,
    /// Of each configuration, the mean over seeds [rows,O].
    pub predictions: Vec<Vec<f32>>,
    /// Best validation loss of each configuration, group, fold and seed.
    pub losses: Vec<f64>,
    /// Groups, folds and seeds.
    pub sizes: [usize; 3],
}

/// What was chosen per group and fold, and its predictions.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected {
    /// Index of the chosen configuration, counted through all that were given, of each group and fold.
    pub chosen: Vec<usize>,
    /// Its predictions [rows,O].
    pub predictions: Vec<f32>,
}

/// Samples and scaler of every window, all series together.
/// # Errors
/// Those of [`WalkForward::windows`]; `Parameter` for a share outside [0, 1), or a window too short to learn from, with what it needs.
pub fn folds(table: &Table, windows: &WalkForward, horizon: u32, valid: f64) -> Result<Vec<Fold>> {
    folds_of(table, windows, horizon, valid, 0..table.series)
}

/// The same of some series.
/// # Errors
/// As for [`folds`].
pub fn folds_of(table: &Table, windows: &WalkForward, horizon: u32, valid: f64, series: Range<usize>) -> Result<Vec<Fold>> {
    let wrong = |name: &str, value: String, help: String| Err(Error::Parameter { op: "walk_forward", name: name.into(), value, help });
    if !(0.0..1.0).contains(&valid) {
        return wrong("valid", valid.to_string(), "give a share in [0, 1)".into());
    }
    let rows = table.rows_of_series() as u32;
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
        let all = |list: &[u32]| series.clone().flat_map(|s| list.iter().map(move |&row| row + s as u32 * rows)).collect::<Vec<u32>>();
        let known = a as usize..samples[learn - 1] as usize + 1;
        let stretches: Vec<Range<usize>> = series.clone().map(|s| known.start + s * rows as usize..known.end + s * rows as usize).collect();
        let test: Vec<u32> = (c.max(reach)..d).collect();
        out.push(Fold { train: all(&samples[..learn]), valid: all(&samples[samples.len() - held..]), test: all(&test), scaler: table.scaler_of(&stretches) });
    }
    Ok(out)
}

impl Plan {
    /// The models that it stands for.
    /// # Errors
    /// As for [`folds`]; `Parameter` without a seed or a learning rate.
    pub fn models(&self, table: &Table) -> Result<Models> {
        if self.seeds == 0 || self.learning_rates.is_empty() {
            let help = "give at least one seed and one learning rate".into();
            return Err(Error::Parameter { op: "walk_forward", name: "seeds, learning_rates".into(), value: "none".into(), help });
        }
        let groups: Vec<Range<usize>> =
            if self.per_series { (0..table.series).map(|s| s..s + 1).collect() } else { std::iter::once(0..table.series).collect() };
        let mut base = Vec::new();
        for group in &groups {
            base.extend(folds_of(table, &self.windows, self.horizon, self.valid, group.clone())?);
        }
        let folds = self.learning_rates.iter().flat_map(|_| base.iter().flat_map(|fold| std::iter::repeat_n(fold.clone(), self.seeds))).collect();
        let learning_rates = self.learning_rates.iter().flat_map(|&rate| std::iter::repeat_n(rate, base.len() * self.seeds)).collect();
        let windows = self.windows.windows(0, (table.rows_of_series() as u32).saturating_sub(self.horizon))?;
        Ok(Models { folds, learning_rates, windows, configurations: self.learning_rates.len(), groups: groups.len(), seeds: self.seeds })
    }
}

impl Models {
    /// Which one model `k` is.
    pub fn place(&self, k: usize) -> Place {
        let (folds, rest) = (self.windows.len(), k / self.seeds);
        Place { configuration: rest / folds / self.groups, group: rest / folds % self.groups, fold: rest % folds, seed: k % self.seeds }
    }

    /// Puts the test predictions of all models together, each test window up to the start of the next one.
    pub fn stitch(&self, table: &Table, predicted: &[Vec<f32>], losses: Vec<f64>) -> Stitched {
        let (o, folds, per) = (table.outputs, self.windows.len(), table.rows_of_series() as u32);
        let sizes = [self.groups, folds, self.seeds];
        let empty = vec![Vec::new(); self.configurations];
        let mut out = Stitched { rows: Vec::new(), fold: Vec::new(), group: Vec::new(), predictions: empty, losses, sizes };
        for (group, fold) in (0..self.groups).flat_map(|group| (0..folds).map(move |fold| (group, fold))) {
            let model = |configuration: usize| ((configuration * self.groups + group) * folds + fold) * self.seeds;
            let until = self.windows.get(fold + 1).map_or(u32::MAX, |next| next[2]);
            for (i, &row) in self.folds[model(0)].test.iter().enumerate().filter(|(_, row)| *row % per < until) {
                out.rows.push(row);
                out.fold.push(fold as u32);
                out.group.push(group as u32);
                for (configuration, predictions) in out.predictions.iter_mut().enumerate() {
                    for value in i * o..(i + 1) * o {
                        let first = model(configuration);
                        let sum: f64 = (first..first + self.seeds).map(|k| f64::from(predicted[k][value])).sum();
                        predictions.push((sum / self.seeds as f64) as f32);
                    }
                }
            }
        }
        out
    }
}

/// Of each group and fold the configuration with the least validation loss, mean over seeds, and its predictions; the first of equals. What is
/// given predicts the same rows, such as models of several widths.
/// # Errors
/// `Shape` where the rows differ.
pub fn select(all: &[Stitched]) -> Result<Selected> {
    let wrong = |got: &str| Error::Shape { op: "select", arg: "rows".into(), expected: "the same rows, folds and seeds in all".into(), got: got.into() };
    let first = all.first().ok_or_else(|| wrong("nothing"))?;
    if all.iter().any(|s| s.rows != first.rows || s.sizes != first.sizes) {
        return Err(wrong("others"));
    }
    let [groups, folds, seeds] = first.sizes;
    let configurations: Vec<(usize, usize)> = all.iter().enumerate().flat_map(|(i, s)| (0..s.predictions.len()).map(move |c| (i, c))).collect();
    let loss = |(i, c): (usize, usize), place: usize| {
        let from = (c * groups * folds + place) * seeds;
        let mean = all[i].losses[from..from + seeds].iter().sum::<f64>() / seeds as f64;
        if mean.is_nan() { f64::INFINITY } else { mean }
    };
    let best = |place: usize| {
        let each = (0..configurations.len()).map(|k| (k, loss(configurations[k], place)));
        each.reduce(|a, b| if b.1 < a.1 { b } else { a }).map_or(0, |(k, _)| k)
    };
    let chosen: Vec<usize> = (0..groups * folds).map(best).collect();
    let o = first.predictions.first().map_or(0, Vec::len) / first.rows.len().max(1);
    let of = |(i, (fold, group)): (usize, (&u32, &u32))| {
        let (s, c) = configurations[chosen[*group as usize * folds + *fold as usize]];
        all[s].predictions[c][i * o..(i + 1) * o].to_vec()
    };
    let predictions = first.fold.iter().zip(&first.group).enumerate().flat_map(of).collect();
    Ok(Selected { chosen, predictions })
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
    let models = plan.models(table)?;
    let config = TrainConfig { learning_rate: models.learning_rates.clone(), ..config.clone() };
    let mut trainer = Trainer::new(device, model, table, &models.folds, config)?;
    trainer.fit(each)?;
    let losses = trainer.progress().iter().map(|p| p.best).collect();
    Ok(models.stitch(table, &trainer.predict()?, losses))
}
