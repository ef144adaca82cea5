//! Training: thousands of models side by side, one recorded step replayed.
//!
//! ```text
//! table on the device ──ids──> windows [M,B,T,I] ──scaler──> model ──> loss [M] ──> gradients ──> clip, check, optimiser     one submit
//! ```
//!
//! Every model has its own samples, scaler, order and learning rate; all of them take each step together. An epoch has as many batches as
//! the largest fold needs, smaller folds go round more often. A model whose loss or gradient is not finite skips that step, and the epoch
//! says which and when ([`Epoch::troubles`]); the others go on. Seeds decide everything: the same seed gives the same bits, and so does a
//! run that was stopped and resumed.
//!
//! What is minimised is an [`Objective`]: a criterion over windows, or a figure of what predictions earn as positions, per batch or per
//! epoch ([`objective`] says how). With an average of the weights ([`TrainConfig::average`]) it is the average that is validated, kept and
//! asked for predictions; the weights themselves go on being trained.

pub mod checkpoint;
pub mod data;
pub mod forecaster;
pub mod hedge;
pub mod log;
pub mod market;
pub mod objective;
pub mod schedule;
pub mod score;
mod step;
pub mod walk_forward;

pub use objective::{Earnings, Objective};

use crate::kernels::Buffer;
use crate::kernels::loss::Criterion;
use crate::kernels::optimiser::{Algorithm, Average, Tensor as Segment};
use crate::kernels::philox::philox4x32;
use crate::nn::{Declared, Parameters};
use crate::tape::{Tape, Var};
use crate::{Device, Error, Result};
use data::{Fold, Table};
use objective::Series;
use schedule::{EarlyStopping, Progress, Rates, Schedule};
use std::cell::RefCell;
use step::{Apply, Batch, Inputs, Recorded, Recorder, What};

/// What is trained.
pub trait Model {
    /// Adds the tensors of one model.
    fn declare(&self, to: &mut Declared);
    /// Windows x [M,B,T,I] to predictions [M,B,O].
    /// # Errors
    /// Those of its ops.
    fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var>;
}

/// How to train.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainConfig {
    /// Passes over the largest fold.
    pub epochs: usize,
    /// Windows of a model in a batch, B.
    pub batch: usize,
    /// Batches whose gradients are averaged for a step; 1 for a step each.
    pub accumulate: usize,
    /// What is minimised.
    pub objective: Objective,
    /// Rule of the step.
    pub algorithm: Algorithm,
    /// Learning rate of each model, or one for all.
    pub learning_rate: Vec<f64>,
    /// Decoupled weight decay of matrices; biases and norms have none.
    pub weight_decay: f64,
    /// Largest norm of a model's gradient.
    pub max_grad_norm: Option<f64>,
    /// Rate over time.
    pub schedule: Schedule,
    /// Steps over which the rate rises from 0.
    pub warm_up: u64,
    /// When a model stops.
    pub stopping: Option<EarlyStopping>,
    /// Average of the weights over the steps, which is then what is validated, kept and predicts.
    pub average: Average,
    /// Shuffle the samples of each epoch; of batches that are series, the batches.
    pub shuffle: bool,
    /// Decides starts and orders.
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> TrainConfig {
        TrainConfig {
            epochs: 20,
            batch: 32,
            accumulate: 1,
            objective: Objective::Criterion(Criterion::Mse),
            algorithm: Algorithm::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
            learning_rate: vec![1e-3],
            weight_decay: 0.01,
            max_grad_norm: Some(1.0),
            schedule: Schedule::Constant,
            warm_up: 0,
            stopping: None,
            average: Average::None,
            shuffle: true,
            seed: 0,
        }
    }
}

/// An epoch of all models.
#[derive(Debug, Clone, PartialEq)]
pub struct Epoch {
    /// From 0.
    pub epoch: usize,
    /// Mean training loss of each model; NaN where no batch had one.
    pub train: Vec<f64>,
    /// Validation loss of each model; the training loss where it has no validation samples.
    pub valid: Vec<f64>,
    /// Learning rate of each model in the last step; 0 where it has stopped.
    pub learning_rate: Vec<f64>,
    /// Mean norm of each model's gradient over the steps that it took, before clipping; NaN without any.
    pub grad_norm: Vec<f64>,
    /// Steps that each model skipped in this epoch, its loss or gradient not being finite.
    pub skipped: Vec<u32>,
    /// The first of them, counted from the start of the training.
    pub first_skipped: Vec<Option<usize>>,
    /// Steps of the epoch.
    pub steps: usize,
    /// Windows that all models together learned from.
    pub windows: u64,
    /// Seconds.
    pub seconds: f64,
}

impl Epoch {
    /// A line for each model that skipped steps: which, how many, and from which step on.
    pub fn troubles(&self) -> Vec<String> {
        let one = |(model, first): (usize, &Option<usize>)| {
            let (step, n) = ((*first)?, self.skipped[model]);
            let what = "its loss or gradient was not finite; lower its learning rate or clip its gradient";
            Some(format!("model {model} skipped {n} of {} steps of epoch {}, first step {step}: {what}", self.steps, self.epoch))
        };
        self.first_skipped.iter().enumerate().filter_map(one).collect()
    }

    /// Windows a second.
    pub fn windows_per_second(&self) -> f64 {
        self.windows as f64 / self.seconds.max(1e-9)
    }
}

/// A batch that is done: where a training stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Epoch, from 0.
    pub epoch: usize,
    /// Batch of the epoch, from 1.
    pub batch: usize,
    /// Batches of the epoch, over both sweeps of an epoch-wise objective.
    pub batches: usize,
    /// Windows of the batch, of all models.
    pub windows: u64,
    /// Mean loss over the models whose loss is a number; NaN in the first sweep of an epoch-wise objective.
    pub loss: f64,
}

type Order = ((usize, usize), Vec<u32>);
type Watch<'a> = Box<dyn FnMut(&Step) -> Result<()> + 'a>;

/// M models in training.
pub struct Trainer<'a, N: Model> {
    device: Device,
    model: &'a N,
    table: &'a Table,
    folds: &'a [Fold],
    config: TrainConfig,
    parameters: Parameters,
    state: State,
    how: How,
    score: Recorded,
    predict: Recorded,
    rates: Rates,
    progress: Vec<Progress>,
    best: Vec<f32>,
    epoch: usize,
    watch: RefCell<Option<Watch<'a>>>,
    /// Of each model: epoch, round and its order.
    orders: RefCell<Vec<Order>>,
}

/// How a step is taken.
enum How {
    /// One pass.
    Whole(Box<Recorded>),
    /// Parts whose gradients add up, then the optimiser.
    Parts(Box<Parts>),
}

struct Parts {
    part: Recorded,
    apply: Apply,
    /// Net returns of the weights, where those that are scored are the averages'.
    first: Option<Recorded>,
}

/// What the optimiser carries from step to step.
struct State {
    moment1: Buffer,
    moment2: Buffer,
    counters: Buffer,
    rate: Buffer,
    /// The averages, in place of the values.
    average: Option<Parameters>,
    /// Sum of gradients, where steps have parts.
    sum: Option<Buffer>,
}

/// Sums of an epoch.
struct Tally {
    loss: Vec<f64>,
    losses: Vec<u32>,
    norm: Vec<f64>,
    norms: Vec<u32>,
    first_skipped: Vec<Option<usize>>,
}

impl Tally {
    fn new(m: usize) -> Tally {
        Tally { loss: vec![0.0; m], losses: vec![0; m], norm: vec![0.0; m], norms: vec![0; m], first_skipped: vec![None; m] }
    }

    /// Adds a batch's losses; their mean over the models that have one.
    fn losses(&mut self, losses: impl Iterator<Item = f64>) -> f64 {
        let (mut sum, mut n) = (0.0, 0.0);
        for (k, loss) in losses.enumerate().filter(|(_, loss)| loss.is_finite()) {
            self.loss[k] += loss;
            self.losses[k] += 1;
            (sum, n) = (sum + loss, n + 1.0);
        }
        sum / n
    }

    /// Adds a step's norms, which are negative where it was skipped.
    fn norms(&mut self, step: usize, norms: &[f32]) {
        for (k, &norm) in norms.iter().enumerate() {
            if norm >= 0.0 {
                self.norm[k] += f64::from(norm);
                self.norms[k] += 1;
            } else if self.first_skipped[k].is_none() {
                self.first_skipped[k] = Some(step);
            }
        }
    }
}

fn means(sums: &[f64], counts: &[u32]) -> Vec<f64> {
    sums.iter().zip(counts).map(|(&s, &n)| s / f64::from(n)).collect()
}

impl<'a, N: Model> Trainer<'a, N> {
    /// Draws the models, one per fold, and records their steps.
    /// # Errors
    /// `Parameter` for no fold, an empty training set, a sample without a whole window, an option out of range; those of the model's ops;
    /// `TooLarge` beyond the device.
    pub fn new(device: &Device, model: &'a N, table: &'a Table, folds: &'a [Fold], config: TrainConfig) -> Result<Trainer<'a, N>> {
        check(table, folds, &config)?;
        let m = folds.len();
        let mut declared = Declared::new();
        model.declare(&mut declared);
        let parameters = Parameters::new(device, m, &declared, config.seed)?;
        let size = parameters.values().len();
        let per_epoch = matches!(config.objective, Objective::Earnings(Earnings { per_epoch: true, .. }));
        let in_parts = per_epoch || config.accumulate > 1;
        let average = if config.average == Average::None {
            None
        } else {
            // A model that never steps has its start as average.
            Some(parameters.with_values(device.upload("average", &download(device, parameters.values())?)?)?)
        };
        let state = State {
            moment1: device.zeros("moment1", size)?,
            moment2: device.zeros("moment2", size)?,
            counters: device.zeros_u32("counters", 3 * m as u64)?,
            rate: device.zeros("rate", m as u64)?,
            average,
            sum: if in_parts { Some(device.zeros("sum of gradients", size)?) } else { None },
        };
        let inputs = Inputs::new(device, table, folds)?;
        let recorder = Recorder { device, model, table, inputs: &inputs, config: &config, state: &state };
        let how = match &state.sum {
            None => How::Whole(Box::new(recorder.batch(&parameters, What::Step)?)),
            Some(sum) => {
                let part = recorder.batch(&parameters, if per_epoch { What::PartOfEpoch } else { What::Part })?;
                let first = if per_epoch && state.average.is_some() { Some(recorder.batch(&parameters, What::Returns)?) } else { None };
                How::Parts(Box::new(Parts { part, apply: recorder.apply(&parameters, sum)?, first }))
            }
        };
        let known = state.average.as_ref().unwrap_or(&parameters);
        let wanted = if matches!(config.objective, Objective::Earnings(_)) { What::Returns } else { What::Loss };
        let (score, predict) = (recorder.batch(known, wanted)?, recorder.batch(known, What::Prediction)?);
        let steps = steps_of(folds, &config);
        let rates = Rates::new(config.schedule.clone(), config.warm_up, (steps * config.epochs) as u64, m);
        let progress = vec![Progress::new(); m];
        Ok(Trainer {
            device: device.clone(),
            model,
            table,
            folds,
            config,
            parameters,
            state,
            how,
            score,
            predict,
            rates,
            progress,
            best: Vec::new(),
            epoch: 0,
            watch: RefCell::new(None),
            orders: RefCell::new(vec![((0, 0), Vec::new()); m]),
        })
    }

    /// Calls `f` after every batch; what it returns ends the training.
    pub fn watch(&mut self, f: impl FnMut(&Step) -> Result<()> + 'a) {
        self.watch.replace(Some(Box::new(f)));
    }

    /// The parameters as they are.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Best epoch and state of each model.
    pub fn progress(&self) -> &[Progress] {
        &self.progress
    }

    /// The model that is trained.
    pub fn model(&self) -> &N {
        self.model
    }

    /// Averages of the weights over the steps, where the config asks for them.
    pub fn average(&self) -> Option<&Parameters> {
        self.state.average.as_ref()
    }

    /// What is validated, kept and predicts: the averages where there are any, else the parameters.
    pub fn evaluated(&self) -> &Parameters {
        self.state.average.as_ref().unwrap_or(&self.parameters)
    }

    /// Epochs that are done.
    pub fn epochs(&self) -> usize {
        self.epoch
    }

    /// Launches of a training step; with parts, of one of them and the optimiser.
    pub fn launches(&self) -> usize {
        match &self.how {
            How::Whole(step) => step.replay.launches(),
            How::Parts(parts) => parts.part.replay.launches() + parts.apply.launches(),
        }
    }

    /// Bytes of what a batch computes on the device, parameters and data apart: it does not depend on how many batches there are.
    pub fn batch_bytes(&self) -> u64 {
        match &self.how {
            How::Whole(step) => step.bytes,
            How::Parts(parts) => parts.part.bytes,
        }
    }

    /// Trains until the last epoch, or until every model has stopped, then puts each model back to its best epoch.
    /// # Errors
    /// Those of the device; what `each` returns ends the training.
    pub fn fit(&mut self, each: &mut dyn FnMut(&Epoch) -> Result<()>) -> Result<()> {
        self.fit_saving(&mut |_, epoch| each(epoch))
    }

    /// As [`Trainer::fit`]; `each` also gets the trainer, to save it.
    /// # Errors
    /// Those of the device; what `each` returns ends the training.
    pub fn fit_saving(&mut self, each: &mut dyn FnMut(&Self, &Epoch) -> Result<()>) -> Result<()> {
        while self.epoch < self.config.epochs && self.progress.iter().any(|p| p.stopped.is_none()) {
            let epoch = self.one_epoch()?;
            each(self, &epoch)?;
        }
        self.restore_best()
    }

    /// One epoch.
    /// # Errors
    /// Those of the device.
    pub fn one_epoch(&mut self) -> Result<Epoch> {
        let start = std::time::Instant::now();
        let (m, steps) = (self.folds.len(), steps_of(self.folds, &self.config));
        let before = self.counters()?;
        let mut tally = Tally::new(m);
        let windows = match self.config.objective {
            Objective::Earnings(earnings) if earnings.per_epoch => self.step_of_epoch(earnings, &mut tally)?,
            _ => {
                (0..steps).try_for_each(|step| self.step(step, steps, &mut tally))?;
                (steps * self.config.accumulate * self.config.batch * m) as u64
            }
        };
        let train = means(&tally.loss, &tally.losses);
        let learning_rate = self.rates_now(((self.epoch + 1) * steps - 1) as u64).into_iter().map(f64::from).collect();
        let valid = self.validate(&train)?;
        self.rates.epoch(&valid);
        self.keep_best(&valid)?;
        let skipped = self.counters()?.chunks_exact(3).zip(before.chunks_exact(3)).map(|(now, then)| now[1] - then[1]).collect();
        let epoch = Epoch {
            epoch: self.epoch,
            train,
            valid,
            learning_rate,
            grad_norm: means(&tally.norm, &tally.norms),
            skipped,
            first_skipped: tally.first_skipped,
            steps,
            windows,
            seconds: start.elapsed().as_secs_f64(),
        };
        self.epoch += 1;
        Ok(epoch)
    }

    /// One step of all models, of one batch or of several.
    fn step(&self, step: usize, steps: usize, tally: &mut Tally) -> Result<()> {
        let (m, k) = (self.folds.len(), self.config.accumulate);
        let number = self.epoch * steps + step;
        self.device.write(&self.state.rate, &self.rates_now(number as u64))?;
        let mut means = vec![0.0; m];
        for part in step * k..(step + 1) * k {
            let batch = self.batch(part);
            let (losses, norms) = match &self.how {
                How::Whole(step) => step.run(&self.device, &batch)?,
                How::Parts(parts) => {
                    if let Some(seed) = &parts.part.seed {
                        self.device.write(seed, &vec![1.0 / k as f32; m])?;
                    }
                    parts.part.run(&self.device, &batch)?
                }
            };
            means.iter_mut().zip(&losses).for_each(|(mean, &loss)| *mean += f64::from(loss) / k as f64);
            let loss = tally.losses(losses.iter().map(|&l| f64::from(l)));
            tally.norms(number, &norms);
            self.tell(part + 1, steps * k, loss)?;
        }
        if let How::Parts(parts) = &self.how {
            tally.norms(number, &parts.apply.run(&self.device, &means)?);
        }
        Ok(())
    }

    /// The one step of an epoch whose objective is that of all its bars; the windows that it learned from.
    fn step_of_epoch(&self, earnings: Earnings, tally: &mut Tally) -> Result<u64> {
        let folds = self.folds;
        let lists: Vec<&[u32]> = folds.iter().map(|f| f.train.as_slice()).collect();
        let b = self.config.batch;
        let batches = lists.iter().map(|l| l.len()).max().unwrap_or(0).div_ceil(b);
        self.device.write(&self.state.rate, &self.rates_now(self.epoch as u64))?;
        let How::Parts(parts) = &self.how else { return Err(Error::Internal("an epoch's step has parts".into())) };
        let first = parts.first.as_ref().unwrap_or(&self.score);
        let returns = self.returns(first, &lists, &mut |batch| self.tell(batch, 2 * batches, f64::NAN))?;
        let series = Series::of(&self.device, earnings, &returns)?;
        let (losses, gradients) = (series.losses.clone(), series.gradients()?);
        let mean = tally.losses(losses.iter().copied());
        for c in 0..batches {
            let batch = self.series(&lists, c * b);
            if let Some(seed) = &parts.part.seed {
                let of = |g: &Vec<f32>| (c * b..(c + 1) * b).map(|i| g.get(i).copied().unwrap_or(0.0)).collect::<Vec<f32>>();
                self.device.write(seed, &gradients.iter().flat_map(of).collect::<Vec<f32>>())?;
            }
            parts.part.run(&self.device, &batch)?;
            self.tell(batches + c + 1, 2 * batches, mean)?;
        }
        tally.norms(self.epoch, &parts.apply.run(&self.device, &losses)?);
        Ok(lists.iter().map(|l| l.len() as u64).sum())
    }

    fn tell(&self, batch: usize, batches: usize, loss: f64) -> Result<()> {
        let windows = (self.folds.len() * self.config.batch) as u64;
        let step = Step { epoch: self.epoch, batch, batches, windows, loss };
        self.watch.borrow_mut().as_mut().map_or(Ok(()), |watch| watch(&step))
    }

    /// Predictions of each model for its test samples [samples,O].
    /// # Errors
    /// Those of the device.
    pub fn predict(&self) -> Result<Vec<Vec<f32>>> {
        self.predict_for(&self.folds.iter().map(|f| f.test.as_slice()).collect::<Vec<_>>())
    }

    /// Predictions of each model for the windows that end at these rows [rows,O], a list per model.
    /// # Errors
    /// `Shape` for another number of lists, `Parameter` for a row without a whole window; those of the device.
    pub fn predict_for(&self, lists: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        if lists.len() != self.folds.len() {
            let got = format!("{}", lists.len());
            return Err(Error::Shape { op: "predict", arg: "lists".into(), expected: format!("{}, one per model", self.folds.len()), got });
        }
        let first = self.table.window as u32 - 1;
        if let Some(&row) = lists.iter().copied().flatten().find(|&&row| row < first || row as usize >= self.table.rows()) {
            let help = format!("the last row of a whole window: {first} to {}", self.table.rows() - 1);
            return Err(Error::Parameter { op: "predict", name: "row".into(), value: row.to_string(), help });
        }
        let (b, o) = (self.config.batch, self.table.outputs);
        let mut out: Vec<Vec<f32>> = lists.iter().map(|list| Vec::with_capacity(list.len() * o)).collect();
        for from in (0..longest(lists)).step_by(b) {
            let (values, _) = self.predict.run(&self.device, &self.windows(lists, from))?;
            for (k, list) in lists.iter().enumerate() {
                out[k].extend_from_slice(&values[k * b * o..][..part(list, from, b).len() * o]);
            }
        }
        Ok(out)
    }

    /// Loss of each model on its validation samples; `otherwise` where it has none.
    fn validate(&self, otherwise: &[f64]) -> Result<Vec<f64>> {
        let folds = self.folds;
        let lists: Vec<&[u32]> = folds.iter().map(|f| f.valid.as_slice()).collect();
        let losses = match self.config.objective {
            Objective::Earnings(earnings) => {
                let returns = self.returns(&self.score, &lists, &mut |_| Ok(()))?;
                Series::of(&self.device, earnings, &returns)?.losses
            }
            Objective::Criterion(_) => {
                let b = self.config.batch;
                let mut sums = vec![0.0; lists.len()];
                for from in (0..longest(&lists)).step_by(b) {
                    let (losses, _) = self.score.run(&self.device, &self.windows(&lists, from))?;
                    for ((sum, list), &loss) in sums.iter_mut().zip(&lists).zip(&losses) {
                        // A batch without a sample has the loss of nothing.
                        match part(list, from, b).len() {
                            0 => {}
                            n => *sum += f64::from(loss) * n as f64,
                        }
                    }
                }
                sums.iter().zip(&lists).map(|(sum, list)| sum / list.len() as f64).collect()
            }
        };
        Ok(losses.into_iter().zip(&lists).zip(otherwise).map(|((loss, list), &other)| if list.is_empty() { other } else { loss }).collect())
    }

    /// Net returns of each model over a list of samples.
    fn returns(&self, recorded: &Recorded, lists: &[&[u32]], told: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<Vec<f32>>> {
        let b = self.config.batch;
        let mut out: Vec<Vec<f32>> = lists.iter().map(|list| Vec::with_capacity(list.len())).collect();
        for (c, from) in (0..longest(lists)).step_by(b).enumerate() {
            let (values, _) = recorded.run(&self.device, &self.series(lists, from))?;
            for (k, list) in lists.iter().enumerate() {
                out[k].extend_from_slice(&values[k * b..][..part(list, from, b).len()]);
            }
            told(c + 1)?;
        }
        Ok(out)
    }

    /// Windows of each list from its sample `from` on, weighted 1, and what pads them, weighted 0.
    fn windows(&self, lists: &[&[u32]], from: usize) -> Batch {
        let (b, anything) = (self.config.batch, self.table.window as u32 - 1);
        let (mut samples, mut factors) = (Vec::new(), Vec::new());
        for list in lists {
            let part = part(list, from, b);
            samples.extend(part.iter().copied().chain(std::iter::repeat_n(anything, b - part.len())));
            factors.extend((0..b).map(|i| if i < part.len() { 1.0 } else { 0.0 }));
        }
        Batch { samples, factors }
    }

    /// The same for series: each with the sample before it, and whether each follows the one before.
    fn series(&self, lists: &[&[u32]], from: usize) -> Batch {
        let (b, anything) = (self.config.batch, self.table.window as u32 - 1);
        let (mut samples, mut factors) = (Vec::new(), Vec::new());
        for list in lists {
            let at = |i: usize| list.get(i).copied();
            let before = |i: usize| i.checked_sub(1).and_then(at);
            samples.push(before(from).unwrap_or(anything));
            for i in from..from + b {
                samples.push(at(i).unwrap_or(anything));
                factors.push(if at(i).is_some() && before(i).map(|row| row + 1) == at(i) { 1.0 } else { 0.0 });
            }
        }
        Batch { samples, factors }
    }

    /// Batch `number` of the epoch, for every model.
    fn batch(&self, number: usize) -> Batch {
        let (m, b) = (self.folds.len(), self.config.batch);
        if matches!(self.config.objective, Objective::Criterion(_)) {
            let samples = (0..m).flat_map(|k| self.samples(k, number * b..(number + 1) * b)).collect();
            return Batch { samples, factors: vec![1.0; m * b] };
        }
        let mut all = Batch { samples: Vec::new(), factors: Vec::new() };
        for (k, fold) in self.folds.iter().enumerate() {
            let batch = self.series(&[&fold.train], self.start(k, number));
            all.samples.extend(batch.samples);
            all.factors.extend(batch.factors);
        }
        all
    }

    /// Where batch `number` of model k starts in its fold: batches in a new order each time round, the last one ending with the fold.
    fn start(&self, k: usize, number: usize) -> usize {
        let (n, b) = (self.folds[k].train.len(), self.config.batch);
        let count = n.div_ceil(b);
        let batch = self.with_order(k, number / count, || (0..count as u32).collect(), |order| order[number % count]);
        (batch as usize * b).min(n.saturating_sub(b))
    }

    /// Samples `range` of model k's endless list: its fold, in a new order each time round.
    fn samples(&self, k: usize, range: std::ops::Range<usize>) -> Vec<u32> {
        let train = &self.folds[k].train;
        range.map(|i| self.with_order(k, i / train.len(), || train.clone(), |order| order[i % train.len()])).collect()
    }

    /// A list of model k in the order of a round of this epoch, which is kept for the next call.
    fn with_order(&self, k: usize, round: usize, list: impl Fn() -> Vec<u32>, f: impl Fn(&[u32]) -> u32) -> u32 {
        let order = &mut self.orders.borrow_mut()[k];
        if order.0 != (self.epoch, round) || order.1.is_empty() {
            let list = list();
            *order = ((self.epoch, round), if self.config.shuffle { shuffled(&list, self.config.seed, [k, self.epoch, round]) } else { list });
        }
        f(&order.1)
    }

    fn rates_now(&self, step: u64) -> Vec<f32> {
        let each = |k: usize| self.config.learning_rate[if self.config.learning_rate.len() == 1 { 0 } else { k }] as f32;
        let going = self.progress.iter().map(|p| if p.stopped.is_none() { 1.0 } else { 0.0 });
        self.rates.at(step).iter().zip(going).enumerate().map(|(k, (factor, going))| each(k) * factor * going).collect()
    }

    fn counters(&self) -> Result<Vec<u32>> {
        let mut pass = self.device.pass("counters");
        let read = pass.read(&self.state.counters)?;
        pass.submit()?.u32(read)
    }

    /// Keeps the parameters of the models whose epoch was the best so far.
    fn keep_best(&mut self, valid: &[f64]) -> Result<()> {
        let epoch = self.epoch;
        let better: Vec<bool> = self.progress.iter_mut().zip(valid).map(|(p, &loss)| p.epoch(epoch, loss, self.config.stopping)).collect();
        if !better.contains(&true) {
            return Ok(());
        }
        let now = download(&self.device, self.evaluated().values())?;
        if self.best.is_empty() {
            self.best.clone_from(&now);
        }
        for Segment { offset, size } in self.parameters.segments() {
            for (k, _) in better.iter().enumerate().filter(|(_, better)| **better) {
                let range = (offset + k as u64 * size) as usize..(offset + (k as u64 + 1) * size) as usize;
                self.best[range.clone()].copy_from_slice(&now[range]);
            }
        }
        Ok(())
    }

    /// Puts each model back to its best epoch.
    fn restore_best(&mut self) -> Result<()> {
        if self.best.is_empty() {
            return Ok(());
        }
        self.device.write(self.parameters.values(), &self.best)?;
        self.state.average.as_ref().map_or(Ok(()), |average| self.device.write(average.values(), &self.best))
    }
}

fn download(device: &Device, buffer: &Buffer) -> Result<Vec<f32>> {
    let mut pass = device.pass("download");
    let read = pass.read(buffer)?;
    pass.submit()?.f32(read)
}

/// A list in the order that seed and counter give. Fisher, Yates; Durstenfeld 1964.
fn shuffled(list: &[u32], seed: u64, counter: [usize; 3]) -> Vec<u32> {
    let mut out = list.to_vec();
    let key = [seed as u32, (seed >> 32) as u32];
    for i in (1..out.len()).rev() {
        let word = philox4x32([i as u32, counter[0] as u32, counter[1] as u32, 0x7368_7566 ^ counter[2] as u32], key)[0];
        out.swap(i, ((u64::from(word) * (i as u64 + 1)) >> 32) as usize);
    }
    out
}

/// The samples of a batch.
fn part(list: &[u32], from: usize, batch: usize) -> &[u32] {
    &list[from.min(list.len())..(from + batch).min(list.len())]
}

fn longest(lists: &[&[u32]]) -> usize {
    lists.iter().map(|l| l.len()).max().unwrap_or(0)
}

/// Steps of an epoch.
fn steps_of(folds: &[Fold], config: &TrainConfig) -> usize {
    match config.objective {
        Objective::Earnings(Earnings { per_epoch: true, .. }) => 1,
        _ => folds.iter().map(|f| f.train.len().div_ceil(config.batch).div_ceil(config.accumulate)).max().unwrap_or(0),
    }
}

fn check(table: &Table, folds: &[Fold], config: &TrainConfig) -> Result<()> {
    let wrong = |name: String, value: String, help: &str| Err(Error::Parameter { op: "train", name, value, help: help.into() });
    if folds.is_empty() {
        return wrong("folds".into(), "none".into(), "give at least one");
    }
    if config.batch == 0 || config.epochs == 0 {
        return wrong("batch, epochs".into(), format!("{}, {}", config.batch, config.epochs), "both are at least 1");
    }
    if config.accumulate == 0 {
        return wrong("accumulate".into(), "0".into(), "1 steps after every batch");
    }
    if let Objective::Earnings(earnings) = &config.objective {
        check_series(earnings, folds, config)?;
    }
    if config.learning_rate.len() != 1 && config.learning_rate.len() != folds.len() {
        return wrong("learning_rate".into(), format!("{} values", config.learning_rate.len()), "give one, or one per model");
    }
    let first = table.window as u32 - 1;
    for (k, fold) in folds.iter().enumerate() {
        if fold.train.is_empty() {
            return wrong(format!("training samples of model {k}"), "none".into(), "lengthen the training window, or shorten purge and window");
        }
        if fold.scaler.len() != table.inputs {
            return wrong(format!("scaler of model {k}"), format!("{} features", fold.scaler.len()), "one pair per feature");
        }
        let all = fold.train.iter().chain(&fold.valid).chain(&fold.test);
        if let Some(&row) = all.into_iter().find(|&&row| row < first || row as usize >= table.rows()) {
            return wrong(format!("a sample of model {k}"), format!("row {row}"), "the last row of a whole window inside the table");
        }
    }
    Ok(())
}

/// What an objective of returns asks of the folds.
fn check_series(earnings: &Earnings, folds: &[Fold], config: &TrainConfig) -> Result<()> {
    let wrong = |name: String, value: String, help: &str| Err(Error::Parameter { op: "train", name, value, help: help.into() });
    earnings.check()?;
    if earnings.per_epoch && config.accumulate > 1 {
        return wrong("accumulate".into(), config.accumulate.to_string(), "an objective of the whole epoch has one step an epoch; leave it at 1");
    }
    if !earnings.per_epoch && config.batch < 2 {
        return wrong("batch".into(), config.batch.to_string(), "a series of returns has at least 2 bars; take larger batches, or the objective per epoch");
    }
    for (k, fold) in folds.iter().enumerate() {
        if fold.train.len() < if earnings.per_epoch { 2 } else { config.batch } {
            let help = "a batch is a series of as many bars; take smaller batches, or a longer training window";
            return wrong(format!("training samples of model {k}"), fold.train.len().to_string(), help);
        }
        let gap = |list: &[u32]| list.windows(2).find(|w| w[1] != w[0] + 1).map(|w| w[1]);
        if let Some(row) = gap(&fold.train).or(gap(&fold.valid)).filter(|_| earnings.is_path()) {
            let help = "drawdowns need bars that follow each other: one series, in order, or an objective without drawdown";
            return wrong(format!("a sample of model {k}"), format!("row {row}"), help);
        }
    }
    Ok(())
}
