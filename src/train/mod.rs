//! Training: thousands of models side by side, one recorded step replayed.
//!
//! ```text
//! table on the device ──ids──> windows [M,B,T,I] ──scaler──> model ──> loss [M] ──> gradients ──> clip, check, optimiser     one submit
//! ```
//!
//! Every model has its own samples, scaler, order and learning rate; all of them take each step together. An epoch has as many steps as the
//! largest fold needs, smaller folds go round more often. A model whose loss or gradient is not finite skips that step and is named in the
//! log; the others go on. Seeds decide everything: the same seed gives the same bits, and so does a run that was stopped and resumed.

pub mod checkpoint;
pub mod data;
pub mod schedule;
pub mod walk_forward;

use crate::kernels::loss::Criterion;
use crate::kernels::optimiser::{Algorithm, Average, Optimiser, OptimiserArgs, Tensor as Segment, optimiser_step};
use crate::kernels::philox::philox4x32;
use crate::kernels::{Buffer, Read, Replay, View};
use crate::nn::{Declared, Parameters};
use crate::tape::{Tape, Var};
use crate::{Device, Error, Result};
use data::{Fold, Table};
use schedule::{EarlyStopping, Progress, Rates, Schedule};

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
    /// Windows of a model in a step, B.
    pub batch: usize,
    /// What is minimised.
    pub criterion: Criterion,
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
    /// Shuffle the samples of each epoch.
    pub shuffle: bool,
    /// Decides starts and orders.
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> TrainConfig {
        TrainConfig {
            epochs: 20,
            batch: 32,
            criterion: Criterion::Mse,
            algorithm: Algorithm::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
            learning_rate: vec![1e-3],
            weight_decay: 0.01,
            max_grad_norm: Some(1.0),
            schedule: Schedule::Constant,
            warm_up: 0,
            stopping: None,
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
    /// Mean training loss of each model; NaN where no step had one.
    pub train: Vec<f64>,
    /// Mean validation loss of each model; the training loss where it has no validation samples.
    pub valid: Vec<f64>,
    /// Steps that each model skipped in this epoch, its loss or gradient not being finite.
    pub skipped: Vec<u32>,
    /// Steps of the epoch.
    pub steps: usize,
    /// Seconds.
    pub seconds: f64,
}

/// A recorded pass over a batch: what to write before, what to read after.
struct Recorded {
    replay: Replay,
    ids: Buffer,
    last: Buffer,
    weight: Buffer,
    out: Read,
}

/// M models in training.
pub struct Trainer<'a, N: Model> {
    device: Device,
    model: &'a N,
    table: &'a Table,
    folds: &'a [Fold],
    config: TrainConfig,
    parameters: Parameters,
    state: State,
    step: Recorded,
    score: Recorded,
    predict: Recorded,
    rates: Rates,
    progress: Vec<Progress>,
    best: Vec<f32>,
    epoch: usize,
}

/// What the optimiser carries from step to step.
struct State {
    moment1: Buffer,
    moment2: Buffer,
    counters: Buffer,
    rate: Buffer,
}

impl<'a, N: Model> Trainer<'a, N> {
    /// Draws the models, one per fold, and records their steps.
    /// # Errors
    /// `Parameter` for no fold, an empty training set, a sample without a whole window; those of the model's ops; `TooLarge` beyond the device.
    pub fn new(device: &Device, model: &'a N, table: &'a Table, folds: &'a [Fold], config: TrainConfig) -> Result<Trainer<'a, N>> {
        check(table, folds, &config)?;
        let m = folds.len();
        let mut declared = Declared::new();
        model.declare(&mut declared);
        let parameters = Parameters::new(device, m, &declared, config.seed)?;
        let size = parameters.values().len();
        let state = State {
            moment1: device.zeros("moment1", size)?,
            moment2: device.zeros("moment2", size)?,
            counters: device.zeros_u32("counters", 3 * m as u64)?,
            rate: device.zeros("rate", m as u64)?,
        };
        let inputs = Inputs::new(device, table, folds)?;
        let step = record(device, model, table, &inputs, &parameters, &config, Some(&state), What::Loss)?;
        let score = record(device, model, table, &inputs, &parameters, &config, None, What::Loss)?;
        let predict = record(device, model, table, &inputs, &parameters, &config, None, What::Prediction)?;
        let steps = steps_of(folds, config.batch);
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
            step,
            score,
            predict,
            rates,
            progress,
            best: Vec::new(),
            epoch: 0,
        })
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

    /// Launches of a training step.
    pub fn launches(&self) -> usize {
        self.step.replay.launches()
    }

    /// Trains until the last epoch, or until every model has stopped, then puts each model back to its best epoch.
    /// # Errors
    /// Those of the device; what `each` returns ends the training.
    pub fn fit(&mut self, each: &mut dyn FnMut(&Epoch) -> Result<()>) -> Result<()> {
        while self.epoch < self.config.epochs && self.progress.iter().any(|p| p.stopped.is_none()) {
            let epoch = self.one_epoch()?;
            each(&epoch)?;
        }
        self.restore_best()
    }

    /// One epoch.
    /// # Errors
    /// Those of the device.
    pub fn one_epoch(&mut self) -> Result<Epoch> {
        let start = std::time::Instant::now();
        let (m, b, steps) = (self.folds.len(), self.config.batch, steps_of(self.folds, self.config.batch));
        let before = self.counters()?;
        let (mut sum, mut count) = (vec![0.0; m], vec![0u32; m]);
        for step in 0..steps {
            let samples: Vec<u32> = (0..m).flat_map(|k| self.samples(k, step * b..(step + 1) * b)).collect();
            self.device.write(&self.state.rate, &self.rates_now((self.epoch * steps + step) as u64))?;
            let loss = self.run(&self.step, &samples, &vec![1.0; m * b])?;
            for ((sum, count), &loss) in sum.iter_mut().zip(&mut count).zip(&loss) {
                if loss.is_finite() {
                    *sum += f64::from(loss);
                    *count += 1;
                }
            }
        }
        let train: Vec<f64> = sum.iter().zip(&count).map(|(&s, &n)| s / f64::from(n)).collect();
        let valid = self.validate(&train)?;
        self.rates.epoch(&valid);
        self.keep_best(&valid)?;
        let skipped = self.counters()?.chunks_exact(3).zip(before.chunks_exact(3)).map(|(now, then)| now[1] - then[1]).collect();
        let epoch = Epoch { epoch: self.epoch, train, valid, skipped, steps, seconds: start.elapsed().as_secs_f64() };
        self.epoch += 1;
        Ok(epoch)
    }

    /// Predictions of each model for its test samples [samples,O].
    /// # Errors
    /// Those of the device.
    pub fn predict(&self) -> Result<Vec<Vec<f32>>> {
        let lists: Vec<&[u32]> = self.folds.iter().map(|f| f.test.as_slice()).collect();
        let o = self.table.outputs;
        let mut out: Vec<Vec<f32>> = lists.iter().map(|list| Vec::with_capacity(list.len() * o)).collect();
        self.over(&self.predict, &lists, |k, valid, values| out[k].extend_from_slice(&values[..valid * o]), o)?;
        Ok(out)
    }

    /// Loss of each model on its validation samples; `otherwise` where it has none.
    fn validate(&self, otherwise: &[f64]) -> Result<Vec<f64>> {
        let lists: Vec<&[u32]> = self.folds.iter().map(|f| f.valid.as_slice()).collect();
        let mut sums = vec![(0.0, 0usize); lists.len()];
        let add = |k: usize, valid: usize, loss: &[f32]| {
            if valid > 0 {
                sums[k].0 += f64::from(loss[0]) * valid as f64;
                sums[k].1 += valid;
            }
        };
        self.over(&self.score, &lists, add, 1)?;
        Ok(sums.iter().zip(otherwise).map(|(&(sum, n), &other)| if n > 0 { sum / n as f64 } else { other }).collect())
    }

    /// Runs a recorded pass over lists of samples, a batch of each at a time; `take` gets model, valid samples, and `each` values per model (per
    /// sample where the pass predicts).
    fn over(&self, recorded: &Recorded, lists: &[&[u32]], mut take: impl FnMut(usize, usize, &[f32]), each: usize) -> Result<()> {
        let b = self.config.batch;
        let longest = lists.iter().map(|l| l.len()).max().unwrap_or(0);
        let anything = self.table.window as u32 - 1;
        for from in (0..longest).step_by(b) {
            let part = |list: &[u32]| list[from.min(list.len())..(from + b).min(list.len())].to_vec();
            let (mut samples, mut weights) = (Vec::new(), Vec::new());
            for list in lists {
                let part = part(list);
                samples.extend(part.iter().copied().chain(std::iter::repeat_n(anything, b - part.len())));
                weights.extend((0..b).map(|i| if i < part.len() { 1.0 } else { 0.0 }));
            }
            let values = self.run(recorded, &samples, &weights)?;
            let per_model = values.len() / lists.len();
            debug_assert!(per_model == each || per_model == b * each);
            for (k, list) in lists.iter().enumerate() {
                take(k, part(list).len(), &values[k * per_model..(k + 1) * per_model]);
            }
        }
        Ok(())
    }

    fn run(&self, recorded: &Recorded, samples: &[u32], weights: &[f32]) -> Result<Vec<f32>> {
        self.device.write_u32(&recorded.ids, &self.table.ids(samples))?;
        self.device.write_u32(&recorded.last, samples)?;
        self.device.write(&recorded.weight, weights)?;
        recorded.replay.run()?.f32(recorded.out)
    }

    /// Samples `range` of model k's endless list: its fold, in a new order each time round.
    fn samples(&self, k: usize, range: std::ops::Range<usize>) -> Vec<u32> {
        let train = &self.folds[k].train;
        let mut round = usize::MAX;
        let mut order: Vec<u32> = Vec::new();
        range
            .map(|i| {
                if i / train.len() != round {
                    round = i / train.len();
                    order = if self.config.shuffle { shuffled(train, self.config.seed, [k, self.epoch, round]) } else { train.clone() };
                }
                order[i % train.len()]
            })
            .collect()
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
        let now = download(&self.device, self.parameters.values())?;
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
        if self.best.is_empty() { Ok(()) } else { self.device.write(self.parameters.values(), &self.best) }
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

fn steps_of(folds: &[Fold], batch: usize) -> usize {
    folds.iter().map(|f| f.train.len().div_ceil(batch)).max().unwrap_or(0)
}

fn check(table: &Table, folds: &[Fold], config: &TrainConfig) -> Result<()> {
    let wrong = |name: String, value: String, help: &str| Err(Error::Parameter { op: "train", name, value, help: help.into() });
    if folds.is_empty() {
        return wrong("folds".into(), "none".into(), "give at least one");
    }
    if config.batch == 0 || config.epochs == 0 {
        return wrong("batch, epochs".into(), format!("{}, {}", config.batch, config.epochs), "both are at least 1");
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

/// What every recorded pass reads.
struct Inputs {
    features: Buffer,
    targets: Buffer,
    mean: Buffer,
    inverse: Buffer,
}

impl Inputs {
    fn new(device: &Device, table: &Table, folds: &[Fold]) -> Result<Inputs> {
        let scaler = |part: usize| folds.iter().flat_map(|f| f.scaler.iter().map(move |s| s[part])).collect::<Vec<f32>>();
        Ok(Inputs {
            features: device.upload("features", &table.features)?,
            targets: device.upload("targets", &table.targets)?,
            mean: device.upload("mean", &scaler(0))?,
            inverse: device.upload("scale", &scaler(1))?,
        })
    }
}

#[derive(Clone, Copy, PartialEq)]
enum What {
    Loss,
    Prediction,
}

/// Records a batch: with `state` a whole training step, else loss or prediction alone.
fn record<N: Model>(
    device: &Device,
    model: &N,
    table: &Table,
    inputs: &Inputs,
    parameters: &Parameters,
    config: &TrainConfig,
    state: Option<&State>,
    what: What,
) -> Result<Recorded> {
    let (m, b, t, i, o) = (parameters.models(), config.batch, table.window, table.inputs, table.outputs);
    let ids = device.zeros_u32("ids", (m * b * t) as u64)?;
    let last = device.zeros_u32("last rows", (m * b) as u64)?;
    let weight = device.zeros("weights", (m * b) as u64)?;
    let mut tape = Tape::new(device);
    let features = tape.input(&inputs.features, &[1, table.rows(), i])?;
    let targets = tape.input(&inputs.targets, &[1, table.rows(), o])?;
    let (mean, inverse) = (tape.input(&inputs.mean, &[m, 1, i])?, tape.input(&inputs.inverse, &[m, 1, i])?);
    let (rows, ends) = (tape.input(&ids, &[m, b * t])?, tape.input(&last, &[m, b])?);
    let weights = tape.input(&weight, &[m, b])?;
    let x = tape.embedding(features, rows)?;
    let x = tape.sub(x, mean)?;
    let x = tape.mul(x, inverse)?;
    let x = tape.reshape(x, &[m, b, t, i])?;
    let build = |tape: &mut Tape| -> Result<(Var, Var)> {
        let prediction = model.forward(tape, parameters, x)?;
        if tape.shape(prediction) != [m, b, o] {
            let got = format!("{:?}", tape.shape(prediction));
            return Err(Error::Shape { op: "train", arg: "prediction".into(), expected: format!("[{m},{b},{o}]"), got });
        }
        let y = tape.embedding(targets, ends)?;
        Ok((prediction, tape.loss(config.criterion, prediction, y, Some(weights), None)?))
    };
    let (prediction, loss) = if state.is_some() { build(&mut tape)? } else { tape.no_grad(build)? };
    if state.is_some() {
        tape.backward(loss)?;
    }
    let mut pass = device.pass(if state.is_some() { "train" } else { "predict" });
    let wanted = if what == What::Loss { loss } else { prediction };
    let plan = tape.record(&mut pass, &[wanted])?;
    if let Some(state) = state {
        let op = optimiser(parameters, config);
        let table = device.upload_u32("blocks", &op.table())?;
        let scratch = device.zeros("optimiser", op.scratch())?;
        let (norm, decay) = (device.zeros("norm", m as u64)?, device.upload("decay", &parameters.decay())?);
        let view = |b: &Buffer| View::from(b);
        let args = OptimiserArgs {
            table: &view(&table),
            grads: &view(parameters.grads()),
            rate: &view(&state.rate),
            loss: Some(&plan.view(loss)?),
            decay: Some(&view(&decay)),
            hyper: None,
            parameters: &view(parameters.values()),
            moment1: Some(&view(&state.moment1)),
            moment2: Some(&view(&state.moment2)),
            average: None,
            counters: &view(&state.counters),
            norm: &view(&norm),
            scratch: &view(&scratch),
        };
        optimiser_step(&mut pass, &op, &args)?;
    }
    let out = pass.read(plan.view(wanted)?)?;
    Ok(Recorded { replay: pass.prepare()?, ids, last, weight, out })
}

/// The step as the kernels know it; the learning rate is in the view `rate`.
fn optimiser(parameters: &Parameters, config: &TrainConfig) -> Optimiser {
    Optimiser {
        algorithm: config.algorithm,
        learning_rate: 1.0,
        weight_decay: config.weight_decay,
        max_grad_norm: config.max_grad_norm,
        average: Average::None,
        tensors: parameters.segments(),
        models: parameters.models() as u64,
    }
}
