//! What is minimised: the mean of a criterion over windows, or minus what predictions earn as positions.
//!
//! ```text
//! p[b] position of sample b, y[b] what the asset earns until the next bar, link[b] 1 where sample b−1 is the bar before b, else 0
//! r[b] = mean over outputs of p[b]·y[b] − cost·|p[b] − link[b]·p[b−1]|        loss = −sharpe(r), max_drawdown(r), …
//! ```
//! Per batch, a loss is that of the batch's bars, which follow each other. Per epoch it is that of all bars, exactly, with the memory of a
//! batch: a first sweep over the batches runs the models without a backward sweep and keeps r, one value a bar and model, on the host; its
//! moments are added up on the device, and the gradient of the objective by each r[b] follows from their coefficients. A second sweep runs
//! each batch again, starts its backward sweep from those gradients and adds the parameters' gradients up; then the optimiser steps once.
//! A batch carries one sample more, the one before its first, so that costs between batches are charged and differentiated as inside them.
//!
//! Cost     two forward sweeps and a backward sweep an epoch.
//! Lengths  models of unequal folds are evaluated in groups of equal length; what pads a batch has gradient 0.
//! Source   kernels/objective.rs for values and coefficients.

use crate::kernels::View;
use crate::kernels::loss::Criterion;
use crate::kernels::objective::{Goal, Objective as Op, objective_finish, objective_gradient, objective_moments, objective_tail};
use crate::{Device, Error, Result};
use std::collections::BTreeMap;
use std::ops::Range;

/// What is minimised.
#[derive(Debug, Clone, PartialEq)]
pub enum Objective {
    /// The mean of a criterion over the windows of a batch.
    Criterion(Criterion),
    /// Predictions are positions, targets the returns that they earn, decimals.
    Earnings(Earnings),
}

impl From<Criterion> for Objective {
    fn from(criterion: Criterion) -> Objective {
        Objective::Criterion(criterion)
    }
}

/// An objective of the returns that positions earn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Earnings {
    /// Which one; it is made large or small as its name wants.
    pub goal: Goal,
    /// Return periods per year.
    pub periods_per_year: f64,
    /// Floor of the ratios' denominators, per period.
    pub floor: f64,
    /// One-way cost as a share of what is traded: 0.0005 is five basis points.
    pub cost: f64,
    /// Of all bars of an epoch, with one step an epoch, instead of each batch's.
    pub per_epoch: bool,
}

impl Earnings {
    /// Per batch, without costs, daily bars, floor 1e-5.
    pub fn new(goal: Goal) -> Earnings {
        Earnings { goal, periods_per_year: 252.0, floor: 1e-5, cost: 0.0, per_epoch: false }
    }

    /// What a value is multiplied by to be minimised.
    pub fn sign(&self) -> f64 {
        match self.goal {
            Goal::MaxDrawdown { .. } | Goal::Cvar { .. } => 1.0,
            _ => -1.0,
        }
    }

    /// Whether the order of bars matters, so that all of them must follow each other.
    pub(super) fn is_path(&self) -> bool {
        matches!(self.goal, Goal::Calmar | Goal::MaxDrawdown { .. })
    }

    pub(super) fn op(&self, rows: usize, bars: usize) -> Op {
        Op { goal: self.goal, rows: rows as u64, bars: bars as u64, periods_per_year: self.periods_per_year, floor: self.floor }
    }

    /// Refuses what has no meaning.
    pub(super) fn check(&self) -> Result<()> {
        self.op(1, 1).check()?;
        if self.cost.is_finite() && self.cost >= 0.0 {
            return Ok(());
        }
        let help = "give a finite share, at least 0".into();
        Err(Error::Parameter { op: "train", name: "cost".into(), value: self.cost.to_string(), help })
    }
}

/// Bars of all models that are on the device at a time.
const BARS: usize = 1024;
/// Values below this stand for undefined ones.
const UNDEFINED: f64 = -9e29;

/// Stretches of a series that are on the device one after the other.
fn steps(bars: usize) -> impl Iterator<Item = Range<usize>> {
    (0..bars).step_by(BARS).map(move |from| from..(from + BARS).min(bars))
}

/// Models whose series have the same length, and what the device knows of them.
struct Group {
    models: Vec<usize>,
    bars: usize,
    coefficients: View,
}

/// Series of net returns, one per model.
pub(super) struct Series<'a> {
    device: &'a Device,
    earnings: Earnings,
    returns: &'a [Vec<f32>],
    groups: Vec<Group>,
    /// Loss of each model; NaN where it is undefined.
    pub(super) losses: Vec<f64>,
}

impl<'a> Series<'a> {
    /// Values and coefficients of every series.
    pub(super) fn of(device: &'a Device, earnings: Earnings, returns: &'a [Vec<f32>]) -> Result<Series<'a>> {
        let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (k, r) in returns.iter().enumerate().filter(|(_, r)| !r.is_empty()) {
            by_length.entry(r.len()).or_default().push(k);
        }
        let mut all = Series { device, earnings, returns, groups: Vec::new(), losses: vec![f64::NAN; returns.len()] };
        for (bars, models) in by_length {
            all.group(bars, models)?;
        }
        Ok(all)
    }

    fn upload(&self, models: &[usize], bars: &Range<usize>) -> Result<View> {
        let part: Vec<f32> = models.iter().flat_map(|&k| &self.returns[k][bars.clone()]).copied().collect();
        Ok(View::from(&self.device.upload("net returns", &part)?))
    }

    fn group(&mut self, bars: usize, models: Vec<usize>) -> Result<()> {
        let op = self.earnings.op(models.len(), bars);
        let zeros = |label: &str, len: u64| Ok::<View, Error>(View::from(&self.device.zeros(label, len)?));
        let (state, value, coefficients) = (zeros("moments", op.state())?, zeros("value", op.rows)?, zeros("coefficients", op.saved())?);
        let bins = zeros("bins", op.bins())?;
        for (sweep, part) in (0..op.sweeps(self.device)).flat_map(|sweep| steps(bars).map(move |part| (sweep, part))) {
            let (op, returns) = (self.earnings.op(models.len(), part.len()), self.upload(&models, &part)?);
            let mut pass = self.device.pass("moments");
            if sweep == 0 {
                objective_moments(&mut pass, &op, &returns, part.start as u64, &state)?;
            }
            objective_tail(&mut pass, &op, &returns, part.start as u64, sweep, &state, &bins)?;
            pass.submit()?;
        }
        let mut pass = self.device.pass("objective");
        objective_finish(&mut pass, &op, &state, &value, &coefficients)?;
        let read = pass.read(&value)?;
        for (&k, value) in models.iter().zip(pass.submit()?.f64(read)?) {
            self.losses[k] = if value > UNDEFINED { self.earnings.sign() * value } else { f64::NAN };
        }
        self.groups.push(Group { models, bars, coefficients });
        Ok(())
    }

    /// Gradients of the losses by the returns, one list per model.
    pub(super) fn gradients(&self) -> Result<Vec<Vec<f32>>> {
        let mut out: Vec<Vec<f32>> = self.returns.iter().map(|r| Vec::with_capacity(r.len())).collect();
        for group in &self.groups {
            let sign = View::from(&self.device.upload("sign", &vec![self.earnings.sign() as f32; group.models.len()])?);
            for part in steps(group.bars) {
                let op = self.earnings.op(group.models.len(), part.len());
                let returns = self.upload(&group.models, &part)?;
                let grad = View::from(&self.device.zeros("gradient", returns.len())?);
                let mut pass = self.device.pass("objective gradient");
                objective_gradient(&mut pass, &op, &returns, part.start as u64, &group.coefficients, &sign, &grad)?;
                let read = pass.read(&grad)?;
                let values = pass.submit()?.f32(read)?;
                for (&k, values) in group.models.iter().zip(values.chunks_exact(part.len())) {
                    out[k].extend_from_slice(values);
                }
            }
        }
        Ok(out)
    }
}
