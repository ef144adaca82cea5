//! Dense layers, normalisation and softmax.

use super::{need, optional, wrong, zeros};
use crate::kernels::activation::Activation;
use crate::kernels::kernel::Elem;
use crate::kernels::layer_norm::{self, LayerNormArgs, LayerNormBackwardArgs};
use crate::kernels::linear::{self, LinearArgs, LinearBackwardArgs};
use crate::kernels::map;
use crate::kernels::normalise::{self, Normalise};
use crate::kernels::softmax::{self, Softmax, SoftmaxMask};
use crate::kernels::{Device, Pass};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

struct LinearOp {
    op: linear::Linear,
    shape: Vec<usize>,
}

impl Function for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn takes(&self) -> Option<Elem> {
        Some(self.op.stored)
    }
    fn saved(&self) -> Option<(Elem, u64)> {
        Some((self.op.stored, self.op.saved())).filter(|&(_, n)| n > 0)
    }
    fn scratch_backward(&self, device: &Device) -> Vec<u64> {
        vec![self.op.scratch_backward(device)]
    }
    fn keeps(&self) -> Keeps {
        let output = matches!(self.op.activation, Activation::Relu | Activation::Tanh | Activation::Sigmoid);
        Keeps { inputs: 0b11, outputs: u32::from(output) }
    }

    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let args = LinearArgs {
            x: need(io.inputs, 0, "linear")?.clone(),
            weight: need(io.inputs, 1, "linear")?.clone(),
            bias: optional(io.inputs, 2).cloned(),
            y: need(io.outputs, 0, "linear")?.clone(),
            saved: io.saved.cloned(),
        };
        linear::linear(pass, &self.op, &args)
    }

    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let [scratch] = io.scratch else { return Err(Error::Internal("linear has no scratch".into())) };
        if self.op.rows == 0 {
            return zeros(pass, io.grad_inputs);
        }
        let args = LinearBackwardArgs {
            x: need(io.inputs, 0, "linear")?.clone(),
            weight: need(io.inputs, 1, "linear")?.clone(),
            kept: io.saved.or(optional(io.outputs, 0)).cloned(),
            grad_y: need(io.grad_outputs, 0, "linear")?.clone(),
            grad_x: optional(io.grad_inputs, 0).cloned(),
            grad_weight: optional(io.grad_inputs, 1).cloned(),
            grad_bias: optional(io.grad_inputs, 2).cloned(),
            scratch: scratch.clone(),
        };
        linear::linear_backward(pass, &self.op, &args)
    }
}

struct LayerNormOp {
    op: layer_norm::LayerNorm,
    shape: Vec<usize>,
}

impl Function for LayerNormOp {
    fn name(&self) -> &'static str {
        "layer_norm"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn saved(&self) -> Option<(Elem, u64)> {
        Some((Elem::F32, self.op.saved()))
    }
    fn scratch_backward(&self, device: &Device) -> Vec<u64> {
        vec![self.op.scratch_backward(device)]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b11, outputs: 0 }
    }

    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let args = LayerNormArgs {
            x: need(io.inputs, 0, "layer_norm")?.clone(),
            weight: optional(io.inputs, 1).cloned(),
            bias: optional(io.inputs, 2).cloned(),
            y: need(io.outputs, 0, "layer_norm")?.clone(),
            saved: io.saved.cloned().ok_or_else(|| Error::Internal("layer_norm has no memory".into()))?,
        };
        layer_norm::layer_norm(pass, &self.op, &args)
    }

    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let [scratch] = io.scratch else { return Err(Error::Internal("layer_norm has no scratch".into())) };
        let args = LayerNormBackwardArgs {
            x: need(io.inputs, 0, "layer_norm")?.clone(),
            weight: optional(io.inputs, 1).cloned(),
            saved: io.saved.cloned().ok_or_else(|| Error::Internal("layer_norm has no memory".into()))?,
            grad_y: need(io.grad_outputs, 0, "layer_norm")?.clone(),
            grad_x: optional(io.grad_inputs, 0).cloned(),
            grad_weight: optional(io.grad_inputs, 1).cloned(),
            grad_bias: optional(io.grad_inputs, 2).cloned(),
            scratch: scratch.clone(),
        };
        if self.op.rows == 0 {
            for grad in [&args.grad_weight, &args.grad_bias].into_iter().flatten() {
                map::fill(pass, 0.0, grad)?;
            }
        }
        layer_norm::layer_norm_backward(pass, &self.op, &args)
    }
}

struct SoftmaxOp {
    op: Softmax,
    shape: Vec<usize>,
}

impl Function for SoftmaxOp {
    fn name(&self) -> &'static str {
        "softmax"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0, outputs: 1 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        softmax::softmax(pass, &self.op, need(io.inputs, 0, "softmax")?, optional(io.inputs, 1), need(io.outputs, 0, "softmax")?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (y, grad_y) = (need(io.outputs, 0, "softmax")?, need(io.grad_outputs, 0, "softmax")?);
        softmax::softmax_backward(pass, &self.op, y, grad_y, need(io.grad_inputs, 0, "softmax")?)
    }
}

struct NormaliseOp {
    op: Normalise,
    shape: Vec<usize>,
}

impl Function for NormaliseOp {
    fn name(&self) -> &'static str {
        "normalise"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 1, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        normalise::normalise(pass, &self.op, need(io.inputs, 0, "normalise")?, need(io.outputs, 0, "normalise")?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (x, grad_y) = (need(io.inputs, 0, "normalise")?, need(io.grad_outputs, 0, "normalise")?);
        normalise::normalise_backward(pass, &self.op, x, grad_y, need(io.grad_inputs, 0, "normalise")?)
    }
}

/// Sizes between the first and the last axis, multiplied.
fn rows(shape: &[usize]) -> usize {
    shape[1..shape.len() - 1].iter().product()
}

impl Tape {
    /// f(x·weightᵀ + bias): x [M or 1,…,I], weight [M,O,I], bias [M,O] to [M,…,O]; all in the storage of x.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn linear(&mut self, x: Var, weight: Var, bias: Option<Var>, activation: Activation) -> Result<Var> {
        let [m, o, i] = self.axes("linear", "weight", weight, "[M,O,I]")?;
        let mut shape = self.shape(x).to_vec();
        if shape.len() < 2 || shape[shape.len() - 1] != i || (shape[0] != m && shape[0] != 1) {
            return Err(wrong("linear", "x", format!("[{m} or 1,…,{i}] for weight [{m},{o},{i}]"), &shape));
        }
        if let Some(bias) = bias {
            self.expect("linear", "bias", bias, &[m, o])?;
        }
        for (name, tensor) in [("weight", Some(weight)), ("bias", bias)] {
            self.stored_in("linear", name, tensor, self.elem(x))?;
        }
        let op = linear::Linear {
            models: m as u64,
            x_models: shape[0] as u64,
            rows: rows(&shape) as u64,
            inputs: i as u64,
            outputs: o as u64,
            bias: bias.is_some(),
            activation,
            stored: self.elem(x),
        };
        op.check()?;
        shape[0] = m;
        if let Some(last) = shape.last_mut() {
            *last = o;
        }
        self.one(LinearOp { op, shape }, &[Some(x), Some(weight), bias])
    }

    /// (x − mean)/√(variance + eps)·weight + bias over the last axis: x [M,…,D], weight and bias [M,D].
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for an eps that is not positive.
    pub fn layer_norm(&mut self, x: Var, weight: Var, bias: Var, eps: f64) -> Result<Var> {
        let [m, d] = self.axes("layer_norm", "weight", weight, "[M,D]")?;
        self.expect("layer_norm", "bias", bias, &[m, d])?;
        let shape = self.shape(x).to_vec();
        if shape.len() < 2 || shape[0] != m || shape[shape.len() - 1] != d {
            return Err(wrong("layer_norm", "x", format!("[{m},…,{d}]"), &shape));
        }
        let op = layer_norm::LayerNorm { models: m as u64, rows: (m * rows(&shape)) as u64, width: d as u64, eps, weight: true, bias: true };
        op.check()?;
        self.one(LayerNormOp { op, shape }, &[Some(x), Some(weight), Some(bias)])
    }

    /// e^x / Σ e^x over the last axis, or its logarithm.
    /// # Errors
    /// `Shape` for a tensor without axes.
    pub fn softmax(&mut self, x: Var, log: bool) -> Result<Var> {
        self.softmax_of(x, None, log)
    }

    /// The same over the allowed elements alone: mask has a word for each element of x (not 0 is allowed), or a length for each row (the elements
    /// before it are). The others are 0, or −1e30 in the logarithm, with gradient 0; so is a row without an allowed one.
    /// # Errors
    /// `Shape` for a mask of another shape, or of reals.
    pub fn softmax_masked(&mut self, x: Var, mask: Var, log: bool) -> Result<Var> {
        self.softmax_of(x, Some(mask), log)
    }

    fn softmax_of(&mut self, x: Var, mask: Option<Var>, log: bool) -> Result<Var> {
        let shape = self.shape(x).to_vec();
        let Some((&width, outer)) = shape.split_last() else { return Err(wrong("softmax", "x", "[…,D]", &shape)) };
        let kind = match mask.map(|mask| self.shape(mask)) {
            None => SoftmaxMask::None,
            Some(given) if given == shape => SoftmaxMask::Words,
            Some(given) if given == outer => SoftmaxMask::Lengths,
            Some(given) => return Err(wrong("softmax", "mask", format!("words {shape:?}, or lengths {outer:?}"), given)),
        };
        if let Some(mask) = mask {
            self.expect_words("softmax", "mask", mask)?;
        }
        let op = Softmax { rows: outer.iter().product::<usize>() as u64, width: width as u64, log, mask: kind };
        op.check()?;
        self.one(SoftmaxOp { op, shape }, &[Some(x), mask])
    }

    /// x/max(‖x‖₂, eps) over the last axis.
    /// # Errors
    /// `Shape` for a tensor without axes; `Parameter` for an eps that is not positive.
    pub fn normalise(&mut self, x: Var, eps: f32) -> Result<Var> {
        let shape = self.shape(x).to_vec();
        let Some((&width, outer)) = shape.split_last() else { return Err(wrong("normalise", "x", "[…,D]", &shape)) };
        let op = Normalise { rows: outer.iter().product::<usize>() as u64, width: width as u64, eps };
        op.check()?;
        self.one(NormaliseOp { op, shape }, &[Some(x)])
    }
}
