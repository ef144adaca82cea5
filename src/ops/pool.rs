//! Pooling over time: the last valid step, the mean of the valid ones, or their mean by attention.

use super::{need, optional, wrong};
use crate::kernels::Pass;
use crate::kernels::pool::{self, Pool};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

/// y of h and lengths.
struct PoolOp {
    name: &'static str,
    op: Pool,
    shape: Vec<usize>,
}

const LAST: &str = "last_valid";
const MEAN: &str = "mean_pool";
const ATTENTION: &str = "attention_pool";

impl Function for PoolOp {
    fn name(&self) -> &'static str {
        self.name
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b10, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let (h, lengths, y) = (need(io.inputs, 0, self.name)?, need(io.inputs, 1, self.name)?, need(io.outputs, 0, self.name)?);
        if self.name == LAST { pool::last_valid(pass, &self.op, h, lengths, y) } else { pool::mean_pool(pass, &self.op, h, lengths, y) }
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (lengths, grad_y, grad_h) = (need(io.inputs, 1, self.name)?, need(io.grad_outputs, 0, self.name)?, need(io.grad_inputs, 0, self.name)?);
        let backward = if self.name == LAST { pool::last_valid_backward } else { pool::mean_pool_backward };
        backward(pass, &self.op, lengths, grad_y, grad_h)
    }
}

/// y and weights of scores, h and lengths.
struct AttentionPoolOp {
    op: Pool,
    shapes: Vec<Vec<usize>>,
}

impl Function for AttentionPoolOp {
    fn name(&self) -> &'static str {
        ATTENTION
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        self.shapes.clone()
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b110, outputs: 0b10 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let (scores, h, lengths) = (need(io.inputs, 0, ATTENTION)?, need(io.inputs, 1, ATTENTION)?, need(io.inputs, 2, ATTENTION)?);
        pool::attention_pool(pass, &self.op, scores, h, lengths, need(io.outputs, 1, ATTENTION)?, need(io.outputs, 0, ATTENTION)?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (h, lengths, weights) = (need(io.inputs, 1, ATTENTION)?, need(io.inputs, 2, ATTENTION)?, need(io.outputs, 1, ATTENTION)?);
        let (grad_scores, grad_h) = (optional(io.grad_inputs, 0), optional(io.grad_inputs, 1));
        pool::attention_pool_backward(pass, &self.op, h, lengths, weights, need(io.grad_outputs, 0, ATTENTION)?, grad_scores, grad_h)
    }
}

impl Tape {
    /// The last valid step of each sequence: h [M,…,T,H], lengths words [M,…], or […] or [1,…] where the models share them, to [M,…,H]. A
    /// sequence of length 0 gives 0.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn last_valid(&mut self, h: Var, lengths: Var) -> Result<Var> {
        let (op, shape) = self.pool(LAST, h, lengths)?;
        self.one(PoolOp { name: LAST, op, shape }, &[Some(h), Some(lengths)])
    }

    /// The mean of the valid steps, as [`Tape::last_valid`].
    /// # Errors
    /// `Shape` naming the argument.
    pub fn mean_pool(&mut self, h: Var, lengths: Var) -> Result<Var> {
        let (op, shape) = self.pool(MEAN, h, lengths)?;
        self.one(PoolOp { name: MEAN, op, shape }, &[Some(h), Some(lengths)])
    }

    /// Mean of the valid steps of h [M,…,T,H] by the softmax of their scores [M,…,T]: [M,…,H], and the weights [M,…,T], 0 past the lengths, through
    /// which no gradient flows. Lengths and empty sequences are as in [`Tape::last_valid`]. Every step counts: not causal.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn attention_pool(&mut self, scores: Var, h: Var, lengths: Var) -> Result<(Var, Var)> {
        let (op, shape) = self.pool(ATTENTION, h, lengths)?;
        let steps = self.shape(h)[..self.shape(h).len() - 1].to_vec();
        self.expect(ATTENTION, "scores", scores, &steps)?;
        let out = self.apply(AttentionPoolOp { op, shapes: vec![shape, steps] }, &[Some(scores), Some(h), Some(lengths)])?;
        let &[y, weights] = out.as_slice() else { return Err(Error::Internal("attention_pool has two outputs".into())) };
        Ok((y, self.detach(weights)?))
    }

    fn pool(&self, op: &'static str, h: Var, lengths: Var) -> Result<(Pool, Vec<usize>)> {
        let shape = self.shape(h);
        let [outer @ .., steps, width] = shape else { return Err(wrong(op, "h", "[M,…,T,H]", shape)) };
        if outer.is_empty() {
            return Err(wrong(op, "h", "[M,…,T,H] with sequences", shape));
        }
        self.expect_rows(op, "lengths", lengths, outer)?;
        let count = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        let pool = Pool { rows: count(outer), lengths: count(self.shape(lengths)), steps: *steps as u64, width: *width as u64 };
        pool.check()?;
        Ok((pool, outer.iter().copied().chain([*width]).collect()))
    }
}
