//! The passes that training replays: a step, a part of a step, the optimiser alone, losses or returns, predictions.

use super::objective::Objective;
use super::{Model, State, TrainConfig};
use crate::kernels::kernel::Elem;
use crate::kernels::map;
use crate::kernels::optimiser::{Optimiser, OptimiserArgs, optimiser_step};
use crate::kernels::{Buffer, Pass, Read, Replay, View};
use crate::nn::Parameters;
use crate::ops::ObjectiveOptions;
use crate::tape::{Tape, Var};
use crate::train::data::{Fold, Table};
use crate::{Device, Error, Result};

/// What every recorded pass reads.
pub(super) struct Inputs {
    features: Buffer,
    targets: Buffer,
    mean: Buffer,
    inverse: Buffer,
}

impl Inputs {
    pub(super) fn new(device: &Device, table: &Table, folds: &[Fold]) -> Result<Inputs> {
        let scaler = |part: usize| folds.iter().flat_map(|f| f.scaler.iter().map(move |s| s[part])).collect::<Vec<f32>>();
        Ok(Inputs {
            features: device.upload("features", &table.features)?,
            targets: device.upload("targets", &table.targets)?,
            mean: device.upload("mean", &scaler(0))?,
            inverse: device.upload("scale", &scaler(1))?,
        })
    }
}

/// What a recorded pass computes.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum What {
    /// Losses [M] and their gradients, clipping and optimiser: reads losses and norms.
    Step,
    /// The same, weighted by `seed` [M], gradients added to a sum: reads losses.
    Part,
    /// Net returns [M,B] and parameter gradients from their gradients `seed` [M,B], added to a sum: reads net returns.
    PartOfEpoch,
    /// Losses [M].
    Loss,
    /// Net returns [M,B].
    Returns,
    /// Predictions [M,B,O].
    Prediction,
}

impl What {
    fn differentiates(self) -> bool {
        matches!(self, What::Step | What::Part | What::PartOfEpoch)
    }

    /// Whether a batch starts with the sample before it.
    pub(super) fn has_context(self, objective: &Objective) -> bool {
        matches!(objective, Objective::Earnings(_)) && self != What::Prediction
    }
}

/// Samples of all models for one run.
pub(super) struct Batch {
    /// [M,W], with W = B, or B+1 where a batch starts with the sample before it.
    pub(super) samples: Vec<u32>,
    /// [M,B]: weight of a window in its loss, or 1 where the bar before a sample is that of the sample before.
    pub(super) factors: Vec<f32>,
}

/// A recorded pass over a batch: what to write before, what to read after.
pub(super) struct Recorded {
    pub(super) replay: Replay,
    /// Rows of the windows [M,W·T], then, from `last` on, of their last bars [M,B]: one write for both.
    rows: Buffer,
    last: usize,
    factors: Buffer,
    pub(super) seed: Option<Buffer>,
    out: Read,
    norm: Option<Read>,
    batch: usize,
    context: usize,
    window: usize,
    /// Bytes of the tape's values.
    pub(super) bytes: u64,
}

impl Recorded {
    /// Runs a batch: what the pass reads, and the norm of each model's gradient where it has a step.
    pub(super) fn run(&self, device: &Device, batch: &Batch) -> Result<(Vec<f32>, Vec<f32>)> {
        let t = self.window as u32;
        let mut rows = Vec::with_capacity(self.rows.len() as usize);
        rows.extend(batch.samples.iter().flat_map(|&last| last + 1 - t..=last));
        rows.resize(self.last, 0);
        rows.extend(batch.samples.chunks_exact(self.batch + self.context).flat_map(|row| &row[self.context..]));
        device.write_u32(&self.rows, &rows)?;
        device.write(&self.factors, &batch.factors)?;
        let mut done = self.replay.run()?;
        let norm = self.norm.map_or_else(|| Ok(Vec::new()), |read| done.f32(read))?;
        Ok((done.f32(self.out)?, norm))
    }
}

/// Everything that recording needs.
pub(super) struct Recorder<'a, N: Model> {
    pub(super) device: &'a Device,
    pub(super) model: &'a N,
    pub(super) table: &'a Table,
    pub(super) inputs: &'a Inputs,
    pub(super) config: &'a TrainConfig,
    pub(super) state: &'a State,
}

impl<N: Model> Recorder<'_, N> {
    /// Records a batch of the models with these parameters.
    pub(super) fn batch(&self, parameters: &Parameters, what: What) -> Result<Recorded> {
        let (device, table) = (self.device, self.table);
        let context = usize::from(what.has_context(&self.config.objective));
        let (m, b, t, i) = (parameters.models(), self.config.batch, table.window, table.inputs);
        let w = b + context;
        let (ids, ends) = ((m * w * t) as u64, (m * b) as u64);
        let last = ids.next_multiple_of(device.align(Elem::U32));
        let rows = device.zeros_u32("rows", last + ends)?;
        let factors = device.zeros("factors", (m * b) as u64)?;
        let mut tape = Tape::new(device);
        let features = tape.input(&self.inputs.features, &[1, table.rows(), i])?;
        let (mean, inverse) = (tape.input(&self.inputs.mean, &[m, 1, i])?, tape.input(&self.inputs.inverse, &[m, 1, i])?);
        let (windows, ends) = (tape.input(rows.view(0..ids), &[m, w * t])?, tape.input(rows.view(last..last + ends), &[m, b])?);
        let given = tape.input(&factors, &[m, b])?;
        let x = tape.embedding(features, windows)?;
        let x = tape.sub(x, mean)?;
        let x = tape.mul(x, inverse)?;
        let x = tape.reshape(x, &[m, w, t, i])?;
        let build = |tape: &mut Tape| self.result(tape, parameters, x, ends, given, what);
        let out = if what.differentiates() { build(&mut tape)? } else { tape.no_grad(build)? };
        let mut seed = None;
        match what {
            What::Step => tape.backward(out)?,
            What::Part | What::PartOfEpoch => {
                let shape = tape.shape(out).to_vec();
                let buffer = device.zeros("seed", shape.iter().product::<usize>() as u64)?;
                let start = tape.input(&buffer, &shape)?;
                tape.backward_with(out, start)?;
                seed = Some(buffer);
            }
            _ => {}
        }
        let mut pass = device.pass(if what.differentiates() { "train" } else { "predict" });
        let plan = tape.record(&mut pass, &[out])?;
        let mut norm = None;
        if what == What::Step {
            norm = Some(self.optimiser(&mut pass, parameters, &View::from(parameters.grads()), &plan.view(out)?)?);
        } else if let (true, Some(sum)) = (what.differentiates(), &self.state.sum) {
            map::accumulate(&mut pass, 1.0, &View::from(parameters.grads()), &View::from(sum))?;
        }
        let out = pass.read(plan.view(out)?)?;
        Ok(Recorded { replay: pass.prepare()?, rows, last: last as usize, factors, seed, out, norm, batch: b, context, window: t, bytes: plan.bytes })
    }

    fn result(&self, tape: &mut Tape, parameters: &Parameters, x: Var, ends: Var, given: Var, what: What) -> Result<Var> {
        let (m, w, o) = (tape.shape(x)[0], tape.shape(x)[1], self.table.outputs);
        let b = self.config.batch;
        let prediction = self.model.forward(tape, parameters, x)?;
        if tape.shape(prediction) != [m, w, o] {
            let got = format!("{:?}", tape.shape(prediction));
            return Err(Error::Shape { op: "train", arg: "prediction".into(), expected: format!("[{m},{w},{o}]"), got });
        }
        if what == What::Prediction {
            return Ok(prediction);
        }
        let targets = tape.input(&self.inputs.targets, &[1, self.table.rows(), o])?;
        let y = tape.embedding(targets, ends)?;
        let earnings = match &self.config.objective {
            Objective::Criterion(criterion) => return tape.loss(*criterion, prediction, y, Some(given), None),
            Objective::Earnings(earnings) => *earnings,
        };
        let position = tape.slice(prediction, 1, 1..b + 1)?;
        let mut returns = tape.mul(position, y)?;
        if earnings.cost > 0.0 {
            let before = tape.slice(prediction, 1, 0..b)?;
            let link = tape.reshape(given, &[m, b, 1])?;
            let held = tape.mul(before, link)?;
            let trade = tape.sub(position, held)?;
            let traded = tape.unary(map::Unary::Abs, trade)?;
            let cost = tape.affine(traded, earnings.cost as f32, 0.0)?;
            returns = tape.sub(returns, cost)?;
        }
        let returns = if o == 1 { tape.reshape(returns, &[m, b])? } else { tape.mean(returns, &[2])? };
        if matches!(what, What::Returns | What::PartOfEpoch) {
            return Ok(returns);
        }
        let options = ObjectiveOptions { periods_per_year: earnings.periods_per_year, floor: earnings.floor, ..Default::default() };
        let value = tape.objective(earnings.goal, returns, options)?;
        tape.affine(value, earnings.sign() as f32, 0.0)
    }

    /// Records a step from the sum of gradients, and leaves the sum at zero: the loss is written before.
    pub(super) fn apply(&self, parameters: &Parameters, sum: &Buffer) -> Result<Apply> {
        let loss = self.device.zeros("loss", parameters.models() as u64)?;
        let mut pass = self.device.pass("step");
        let norm = self.optimiser(&mut pass, parameters, &View::from(sum), &View::from(&loss))?;
        map::fill(&mut pass, 0.0, &View::from(sum))?;
        Ok(Apply { replay: pass.prepare()?, loss, norm })
    }

    fn optimiser(&self, pass: &mut Pass, parameters: &Parameters, grads: &View, loss: &View) -> Result<Read> {
        let (device, state) = (self.device, self.state);
        let op = optimiser(parameters, self.config);
        let table = device.upload_u32("blocks", &op.table())?;
        let scratch = device.zeros("optimiser", op.scratch())?;
        let (norm, decay) = (device.zeros("norm", parameters.models() as u64)?, device.upload("decay", &parameters.decay())?);
        let view = |b: &Buffer| View::from(b);
        let average = state.average.as_ref().map(|average| View::from(average.values()));
        let args = OptimiserArgs {
            table: &view(&table),
            grads,
            rate: &view(&state.rate),
            loss: Some(loss),
            decay: Some(&view(&decay)),
            hyper: None,
            parameters: &view(parameters.values()),
            moment1: Some(&view(&state.moment1)),
            moment2: Some(&view(&state.moment2)),
            average: average.as_ref(),
            counters: &view(&state.counters),
            norm: &view(&norm),
            scratch: &view(&scratch),
        };
        optimiser_step(pass, &op, &args)?;
        pass.read(&norm)
    }
}

/// A step from summed gradients.
pub(super) struct Apply {
    replay: Replay,
    loss: Buffer,
    norm: Read,
}

impl Apply {
    /// Steps all models whose loss and gradient are finite; the norm of each gradient.
    pub(super) fn run(&self, device: &Device, losses: &[f64]) -> Result<Vec<f32>> {
        device.write(&self.loss, &losses.iter().map(|&l| l as f32).collect::<Vec<_>>())?;
        self.replay.run()?.f32(self.norm)
    }

    pub(super) fn launches(&self) -> usize {
        self.replay.launches()
    }
}

/// The step as the kernels know it; the learning rate is in the view `rate`.
fn optimiser(parameters: &Parameters, config: &TrainConfig) -> Optimiser {
    Optimiser {
        algorithm: config.algorithm,
        learning_rate: 1.0,
        weight_decay: config.weight_decay,
        max_grad_norm: config.max_grad_norm,
        average: config.average,
        tensors: parameters.segments(),
        models: parameters.models() as u64,
    }
}
