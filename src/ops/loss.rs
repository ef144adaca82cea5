//! Losses of predictions: one value per model.

use super::{need, optional, wrong};
use crate::kernels::kernel::Elem;
use crate::kernels::loss::{self, Criterion, Loss, LossArgs};
use crate::kernels::{Device, Pass};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

struct LossOp(Loss);

const NAME: &str = "loss";

impl Function for LossOp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![vec![self.0.models as usize]]
    }
    fn saved(&self) -> Option<(Elem, u64)> {
        Some((Elem::F32, self.0.saved()))
    }
    fn scratch(&self, _: &Device) -> Vec<u64> {
        vec![self.0.scratch()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b1111, outputs: 0 }
    }

    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let (Some(total), [scratch]) = (io.saved, io.scratch) else { return Err(Error::Internal("a loss has no memory".into())) };
        let args = LossArgs {
            prediction: need(io.inputs, 0, NAME)?,
            target: need(io.inputs, 1, NAME)?,
            weight: optional(io.inputs, 2),
            quantiles: optional(io.inputs, 3),
        };
        loss::loss(pass, &self.0, &args, need(io.outputs, 0, NAME)?, total, scratch)
    }

    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let total = io.saved.ok_or_else(|| Error::Internal("a loss has no memory".into()))?;
        let args = LossArgs {
            prediction: need(io.inputs, 0, NAME)?,
            target: need(io.inputs, 1, NAME)?,
            weight: optional(io.inputs, 2),
            quantiles: optional(io.inputs, 3),
        };
        loss::loss_backward(pass, &self.0, &args, total, need(io.grad_outputs, 0, NAME)?, need(io.grad_inputs, 0, NAME)?)
    }
}

impl Tape {
    /// Weighted mean of a criterion over the rows of each model: prediction [M,…,C], target [M or 1,…,C] ([M or 1,…] words for cross-entropy, reals for
    /// pinball), weight [M or 1,…] of the rows, quantiles [C] for pinball; to [M].
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for an option outside its range.
    pub fn loss(&mut self, criterion: Criterion, prediction: Var, target: Var, weight: Option<Var>, quantiles: Option<Var>) -> Result<Var> {
        let shape = self.shape(prediction).to_vec();
        if shape.len() < 2 {
            return Err(wrong(NAME, "prediction", "[M,…,C]", &shape));
        }
        let (m, columns) = (shape[0], shape[shape.len() - 1]);
        let narrow = matches!(criterion, Criterion::Pinball | Criterion::CrossEntropy { .. });
        let inner = if narrow { &shape[1..shape.len() - 1] } else { &shape[1..] };
        let target_models = self.models_of("target", target, m, inner)?;
        if matches!(criterion, Criterion::CrossEntropy { .. }) {
            self.expect_words(NAME, "target", target)?;
        }
        let weight_models = weight.map_or(Ok(1), |w| self.models_of("weight", w, m, &shape[1..shape.len() - 1]))?;
        if let Some(quantiles) = quantiles {
            self.expect(NAME, "quantiles", quantiles, &[columns])?;
        }
        let rows = shape[1..shape.len() - 1].iter().product::<usize>() as u64;
        let op = Loss { target_models, weight_models, ..Loss::new(criterion, m as u64, rows, columns as u64) };
        op.check()?;
        for (arg, x) in [("target", Some(target)), ("weight", weight)] {
            if x.is_some_and(|x| self.needs_grad(x)) {
                return Err(wrong(NAME, arg, "a tensor without gradient: detach it", self.shape(target)));
            }
        }
        self.one(LossOp(op), &[Some(prediction), Some(target), weight, quantiles])
    }

    /// M or 1, the leading axis of a tensor whose others are `inner`.
    fn models_of(&self, arg: &str, x: Var, m: usize, inner: &[usize]) -> Result<u64> {
        match self.shape(x).split_first() {
            Some((&first, rest)) if (first == m || first == 1) && rest == inner => Ok(first as u64),
            _ => Err(wrong(NAME, arg, format!("[{m} or 1] with {inner:?}"), self.shape(x))),
        }
    }
}
