//! Convolution over time.

use super::{need, optional, wrong, zeros};
use crate::kernels::activation::Activation;
use crate::kernels::conv1d::{self, Conv1d, Conv1dArgs, Conv1dBackwardArgs, Padding};
use crate::kernels::kernel::Elem;
use crate::kernels::{Device, Pass};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

/// Options of a convolution.
#[derive(Debug, Clone, Copy)]
pub struct Conv1dOptions {
    /// Zeros around each sequence: none unless given.
    pub padding: Padding,
    /// Steps between taps: 1 unless given.
    pub dilation: u64,
    /// Valid steps of each sequence, words [B]: x counts as 0 and y is 0 past them.
    pub lengths: Option<Var>,
    /// Applied to the result.
    pub activation: Activation,
}

impl Default for Conv1dOptions {
    fn default() -> Conv1dOptions {
        Conv1dOptions { padding: Padding::Symmetric(0), dilation: 1, lengths: None, activation: Activation::None }
    }
}

struct Conv1dOp {
    op: Conv1d,
    shape: Vec<usize>,
}

const NAME: &str = "conv1d";

impl Function for Conv1dOp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn saved(&self) -> Option<(Elem, u64)> {
        Some((Elem::F32, self.op.saved())).filter(|&(_, n)| n > 0)
    }
    fn scratch_backward(&self, device: &Device) -> Vec<u64> {
        vec![self.op.scratch_backward(device)]
    }
    fn keeps(&self) -> Keeps {
        let output = matches!(self.op.activation, Activation::Relu | Activation::Tanh | Activation::Sigmoid);
        Keeps { inputs: 0b1011, outputs: u32::from(output) }
    }

    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let args = Conv1dArgs {
            x: need(io.inputs, 0, NAME)?.clone(),
            weight: need(io.inputs, 1, NAME)?.clone(),
            bias: optional(io.inputs, 2).cloned(),
            lengths: optional(io.inputs, 3).cloned(),
            y: need(io.outputs, 0, NAME)?.clone(),
            saved: io.saved.cloned(),
        };
        conv1d::conv1d(pass, &self.op, &args)
    }

    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let [scratch] = io.scratch else { return Err(Error::Internal("conv1d has no scratch".into())) };
        if self.op.batch == 0 {
            return zeros(pass, io.grad_inputs);
        }
        let args = Conv1dBackwardArgs {
            x: need(io.inputs, 0, NAME)?.clone(),
            weight: need(io.inputs, 1, NAME)?.clone(),
            lengths: optional(io.inputs, 3).cloned(),
            kept: io.saved.or(optional(io.outputs, 0)).cloned(),
            grad_y: need(io.grad_outputs, 0, NAME)?.clone(),
            grad_x: optional(io.grad_inputs, 0).cloned(),
            grad_weight: optional(io.grad_inputs, 1).cloned(),
            grad_bias: optional(io.grad_inputs, 2).cloned(),
            scratch: scratch.clone(),
        };
        conv1d::conv1d_backward(pass, &self.op, &args)
    }
}

impl Tape {
    /// y[b,o,t] = f(bias[o] + Σ_{c,k} weight[o,c,k]·x[b,c,t + k·dilation − left]): x [M or 1,B,C,T], weight [M,O,C,K], bias [M,O] to [M,B,O,U],
    /// U = T less the taps' reach plus the padding. With [`Padding::Causal`] y[t] depends on x[..= t] alone; with the others on later steps too.
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for taps that reach beyond the padded sequence and for empty sizes.
    pub fn conv1d(&mut self, x: Var, weight: Var, bias: Option<Var>, options: Conv1dOptions) -> Result<Var> {
        let Conv1dOptions { padding, dilation, lengths, activation } = options;
        let [m, o, c, k] = self.axes(NAME, "weight", weight, "[M,O,C,K]")?;
        let [x_models, b, channels, t] = self.axes(NAME, "x", x, "[M or 1,B,C,T]")?;
        if (x_models != m && x_models != 1) || channels != c {
            return Err(wrong(NAME, "x", format!("[{m} or 1,B,{c},T] for weight {:?}", self.shape(weight)), self.shape(x)));
        }
        if let Some(bias) = bias {
            self.expect(NAME, "bias", bias, &[m, o])?;
        }
        if let Some(lengths) = lengths {
            self.expect(NAME, "lengths", lengths, &[b])?;
            self.expect_words(NAME, "lengths", lengths)?;
        }
        let op = Conv1d {
            models: m as u64,
            x_models: x_models as u64,
            batch: b as u64,
            inputs: c as u64,
            outputs: o as u64,
            taps: k as u64,
            time: t as u64,
            padding,
            dilation,
            bias: bias.is_some(),
            ragged: lengths.is_some(),
            activation,
        };
        op.check()?;
        let shape = vec![m, b, o, op.out_time() as usize];
        self.one(Conv1dOp { op, shape }, &[Some(x), Some(weight), bias, lengths])
    }
}
