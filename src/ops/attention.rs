//! Scaled dot-product attention.

use super::{need, optional, wrong};
use crate::kernels::attention::{self, Attention, AttentionArgs, AttentionGrads, Bias, Dropout};
use crate::kernels::kernel::Elem;
use crate::kernels::map;
use crate::kernels::{Device, Pass};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

/// Options of attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionOptions {
    /// Query i sees key j only if j ≤ i + Tk − Tq.
    pub causal: bool,
    /// … and only if |i + Tk − Tq − j| < window.
    pub window: Option<u64>,
    /// Factor of q·k; none: 1/√D.
    pub scale: Option<f64>,
    /// Keys of each item, words [B].
    pub kv_len: Option<Var>,
    /// Added to the scores [B or 1,NH or 1,Tq,Tk].
    pub bias: Option<Var>,
    /// Dropout of the weights …
    pub dropout: Option<Dropout>,
    /// … and which draw of it, one word [1]: needed with dropout.
    pub step: Option<Var>,
}

struct AttentionOp {
    op: Attention,
    /// One tensor q | k | v rather than three.
    packed: bool,
    stored: Elem,
    shapes: Vec<Vec<usize>>,
}

impl AttentionOp {
    /// q, k, v among inputs or their gradients.
    fn qkv(&self) -> [usize; 3] {
        if self.packed { [0, 0, 0] } else { [0, 1, 2] }
    }

    /// kv_len, bias and step.
    fn rest(&self) -> [usize; 3] {
        if self.packed { [1, 2, 3] } else { [3, 4, 5] }
    }
}

const NAME: &str = "attention";

impl Function for AttentionOp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        self.shapes.clone()
    }
    fn takes(&self) -> Option<Elem> {
        Some(self.stored)
    }
    fn gives(&self, i: usize) -> Elem {
        if i == 0 { self.stored } else { Elem::F32 }
    }
    fn scratch_backward(&self, device: &Device) -> Vec<u64> {
        vec![self.op.scratch_backward(device)]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b111111, outputs: 0b11 }
    }

    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let ([q, k, v], [kv_len, bias, step]) = (self.qkv(), self.rest());
        let args = AttentionArgs {
            q: need(io.inputs, q, NAME)?.clone(),
            k: need(io.inputs, k, NAME)?.clone(),
            v: need(io.inputs, v, NAME)?.clone(),
            kv_len: optional(io.inputs, kv_len).cloned(),
            bias: optional(io.inputs, bias).cloned(),
            step: optional(io.inputs, step).cloned(),
            out: need(io.outputs, 0, NAME)?.clone(),
            lse: need(io.outputs, 1, NAME)?.clone(),
        };
        attention::attention(pass, &self.op, &args)
    }

    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let ([q, k, v], [kv_len, bias, step]) = (self.qkv(), self.rest());
        let args = AttentionArgs {
            q: need(io.inputs, q, NAME)?.clone(),
            k: need(io.inputs, k, NAME)?.clone(),
            v: need(io.inputs, v, NAME)?.clone(),
            kv_len: optional(io.inputs, kv_len).cloned(),
            bias: optional(io.inputs, bias).cloned(),
            step: optional(io.inputs, step).cloned(),
            out: need(io.outputs, 0, NAME)?.clone(),
            lse: need(io.outputs, 1, NAME)?.clone(),
        };
        let [scratch] = io.scratch else { return Err(Error::Internal("attention has no scratch".into())) };
        let grads = AttentionGrads {
            grad_out: need(io.grad_outputs, 0, NAME)?.clone(),
            scratch: scratch.clone(),
            grad_q: optional(io.grad_inputs, q).cloned(),
            grad_k: optional(io.grad_inputs, k).cloned(),
            grad_v: optional(io.grad_inputs, v).cloned(),
            grad_bias: optional(io.grad_inputs, bias).cloned(),
        };
        if let Some(grad_bias) = grads.grad_bias.as_ref().filter(|_| self.op.batch == 0) {
            map::fill(pass, 0.0, grad_bias)?;
        }
        attention::attention_backward(pass, &self.op, &args, &grads)
    }
}

/// Weights of attention from what it left in its log-sum-exp.
struct WeightsOp {
    op: Attention,
    packed: bool,
    shape: Vec<usize>,
}

const WEIGHTS: &str = "attention_weights";

impl Function for WeightsOp {
    fn name(&self) -> &'static str {
        WEIGHTS
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let (q, k) = (need(io.inputs, 0, WEIGHTS)?, need(io.inputs, usize::from(!self.packed), WEIGHTS)?);
        let rest = if self.packed { 1 } else { 2 };
        let args = AttentionArgs {
            q: q.clone(),
            k: k.clone(),
            // Values and result are not bound, but have their lengths.
            v: k.clone(),
            out: q.part(0..self.op.elements()[3]),
            lse: need(io.inputs, rest, WEIGHTS)?.clone(),
            kv_len: optional(io.inputs, rest + 1).cloned(),
            bias: optional(io.inputs, rest + 2).cloned(),
            step: optional(io.inputs, rest + 3).cloned(),
        };
        attention::attention_weights(pass, &self.op, &args, need(io.outputs, 0, WEIGHTS)?)
    }
    fn backward(&self, _: &mut Pass, _: &Backward<'_>) -> Result<()> {
        Err(Error::Internal("attention weights have no gradient".into()))
    }
}

impl Tape {
    /// softmax(q·kᵀ·scale + bias)·v for q [B,NH,Tq,D], k and v [B,NH,Tk,D]: [B,NH,Tq,D], and the log-sum-exp of the scores [B,NH,Tq], through which no
    /// gradient flows, in f32 whatever q, k, v are stored in. Models fold into B. A row that may see no key gives 0. With `causal`, out[t] depends on keys up to t alone.
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for a width beyond 256, a window of 0, a probability outside [0, 1).
    pub fn attention(&mut self, q: Var, k: Var, v: Var, options: AttentionOptions) -> Result<(Var, Var)> {
        let [b, heads, queries, width] = self.axes(NAME, "q", q, "[B,NH,Tq,D]")?;
        let [_, _, keys, _] = self.axes(NAME, "k", k, "[B,NH,Tk,D]")?;
        self.expect(NAME, "k", k, &[b, heads, keys, width])?;
        self.expect(NAME, "v", v, &[b, heads, keys, width])?;
        let op = Attention { keys: keys as u64, ..Attention::new(b as u64, heads as u64, queries as u64, width as u64) };
        self.attend(op, false, &[q, k, v], vec![b, heads, queries, width], options)
    }

    /// Self-attention of one projection qkv [B,T,3·E], q | k | v with E = heads·D each: [B,T,E]. No transposes, one buffer.
    /// # Errors
    /// As for [`Tape::attention`].
    pub fn attention_packed(&mut self, qkv: Var, heads: usize, options: AttentionOptions) -> Result<(Var, Var)> {
        let (op, out) = self.packed(NAME, qkv, heads)?;
        self.attend(op, true, &[qkv], out, options)
    }

    /// Weights of [`Tape::attention`] before dropout [B,NH,Tq,Tk], for plots: from its q, k, options and log-sum-exp; 0 for what a query may not see.
    /// No gradient flows through them.
    /// # Errors
    /// As for [`Tape::attention`].
    pub fn attention_weights(&mut self, q: Var, k: Var, lse: Var, options: AttentionOptions) -> Result<Var> {
        let [b, heads, queries, width] = self.axes(WEIGHTS, "q", q, "[B,NH,Tq,D]")?;
        let [_, _, keys, _] = self.axes(WEIGHTS, "k", k, "[B,NH,Tk,D]")?;
        self.expect(WEIGHTS, "k", k, &[b, heads, keys, width])?;
        let op = Attention { keys: keys as u64, ..Attention::new(b as u64, heads as u64, queries as u64, width as u64) };
        self.weigh(op, false, &[q, k, lse], options)
    }

    /// The same of [`Tape::attention_packed`].
    /// # Errors
    /// As for [`Tape::attention`].
    pub fn attention_weights_packed(&mut self, qkv: Var, heads: usize, lse: Var, options: AttentionOptions) -> Result<Var> {
        let (op, _) = self.packed(WEIGHTS, qkv, heads)?;
        self.weigh(op, true, &[qkv, lse], options)
    }

    fn weigh(&mut self, op: Attention, packed: bool, inputs: &[Var], options: AttentionOptions) -> Result<Var> {
        let op = self.with_options(op, options)?;
        let shape = [op.batch, op.heads, op.queries, op.keys].map(|n| n as usize).to_vec();
        if let Some(&lse) = inputs.last() {
            self.expect(WEIGHTS, "lse", lse, &shape[..3])?;
        }
        let inputs: Vec<Option<Var>> = inputs.iter().map(|&x| Some(x)).chain([options.kv_len, options.bias, options.step]).collect();
        self.no_grad(|tape| tape.one(WeightsOp { op, packed, shape }, &inputs))
    }

    /// Sizes of a packed projection: the op, and the shape of its result.
    fn packed(&self, name: &'static str, qkv: Var, heads: usize) -> Result<(Attention, Vec<usize>)> {
        let [b, steps, row] = self.axes(name, "qkv", qkv, "[B,T,3·E]")?;
        if heads == 0 || !row.is_multiple_of(3 * heads) {
            return Err(wrong(name, "qkv", format!("[B,T,3·E] with E a multiple of {heads} heads"), self.shape(qkv)));
        }
        Ok((Attention::packed(b as u64, heads as u64, steps as u64, (row / 3 / heads) as u64), vec![b, steps, row / 3]))
    }

    fn attend(&mut self, op: Attention, packed: bool, qkv: &[Var], out: Vec<usize>, options: AttentionOptions) -> Result<(Var, Var)> {
        let op = self.with_options(op, options)?;
        let sizes = [op.batch, op.heads, op.queries].map(|n| n as usize);
        let inputs: Vec<Option<Var>> = qkv.iter().map(|&x| Some(x)).chain([options.kv_len, options.bias, options.step]).collect();
        let shapes = vec![out, sizes.to_vec()];
        let stored = self.elem(qkv[0]);
        for (name, x) in ["q", "k", "v"].into_iter().zip(qkv).map(|(name, &x)| (name, Some(x))).chain([("bias", options.bias)]) {
            self.stored_in(NAME, name, x, stored)?;
        }
        let out = self.apply(AttentionOp { op, packed, stored, shapes }, &inputs)?;
        let lse = self.detach(out[1])?;
        Ok((out[0], lse))
    }

    /// The op with its options, which fit it.
    fn with_options(&self, op: Attention, options: AttentionOptions) -> Result<Attention> {
        let AttentionOptions { causal, window, scale, kv_len, bias, dropout, step } = options;
        let sizes = [op.batch, op.heads, op.queries, op.keys].map(|n| n as usize);
        let bias_shape = match bias {
            Some(bias) => {
                let [b, heads, _, _] = self.axes(NAME, "bias", bias, "[B or 1,NH or 1,Tq,Tk]")?;
                let fits = |n: usize, all: usize| n == 1 || n == all;
                let expected = [if fits(b, sizes[0]) { b } else { sizes[0] }, if fits(heads, sizes[1]) { heads } else { sizes[1] }, sizes[2], sizes[3]];
                self.expect(NAME, "bias", bias, &expected)?;
                Some(Bias { per_item: b == sizes[0], per_head: heads == sizes[1] })
            }
            None => None,
        };
        if let Some(kv_len) = kv_len {
            self.expect(NAME, "kv_len", kv_len, &sizes[..1])?;
            self.expect_words(NAME, "kv_len", kv_len)?;
        }
        if let Some(step) = step {
            self.expect(NAME, "step", step, &[1])?;
            self.expect_words(NAME, "step", step)?;
        }
        let op = Attention { causal, window, scale, bias: bias_shape, dropout, ..op };
        op.check()?;
        Ok(op)
    }
}
