//! Modules: parameters under PyTorch's names, and the forward pass that uses them.
//!
//! A module is plain sizes and a prefix. [`Module::declare`] says which tensors it needs, [`Parameters`] draws them for M models, `forward` puts
//! the ops on a tape. Everything carries the models' axis: x is [M,B,T,…] or, shared by all models, [1,B,T,…].
//!
//! Sources  Vaswani et al. 2017 (encoder layer); Xiong et al. 2020, arXiv:2002.04745 (normalisation before or after); PyTorch's layouts.

pub mod hedge;
mod parameters;
mod pooling;

pub use parameters::{Declared, Init, Parameters, Tensor};
pub use pooling::{AttentionPooling, Pooled, Positions, sinusoids};

use crate::kernels::activation::Activation;
use crate::ops::{AttentionOptions, Layer, RecurrentOptions};
use crate::tape::{Tape, Var};
use crate::{Error, Result};

/// Something with parameters.
pub trait Module {
    /// Adds the tensors that it needs.
    fn declare(&self, to: &mut Declared);
}

/// A name under a prefix.
fn under(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// y = f(x·weightᵀ + bias).
#[derive(Debug, Clone)]
pub struct Linear {
    /// Prefix of its tensors `weight` [O,I] and `bias` [O].
    pub prefix: String,
    /// I.
    pub inputs: usize,
    /// O.
    pub outputs: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// f.
    pub activation: Activation,
}

impl Linear {
    /// With a bias and no activation.
    pub fn new(prefix: &str, inputs: usize, outputs: usize) -> Linear {
        Linear { prefix: prefix.into(), inputs, outputs, bias: true, activation: Activation::None }
    }

    /// x [M or 1,…,I] to [M,…,O].
    /// # Errors
    /// `Shape` naming the argument.
    pub fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var> {
        let weight = parameters.on(tape, &under(&self.prefix, "weight"))?;
        let bias = if self.bias { Some(parameters.on(tape, &under(&self.prefix, "bias"))?) } else { None };
        tape.linear(x, weight, bias, self.activation)
    }
}

impl Module for Linear {
    fn declare(&self, to: &mut Declared) {
        to.add(under(&self.prefix, "weight"), &[self.outputs, self.inputs], Init::fan_in(self.inputs));
        if self.bias {
            to.add(under(&self.prefix, "bias"), &[self.outputs], Init::fan_in(self.inputs));
        }
    }
}

/// Normalisation over the last axis.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// Prefix of its tensors `weight` and `bias` [D].
    pub prefix: String,
    /// D.
    pub width: usize,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// With PyTorch's ε of 1e-5.
    pub fn new(prefix: &str, width: usize) -> LayerNorm {
        LayerNorm { prefix: prefix.into(), width, eps: 1e-5 }
    }

    /// x [M,…,D] to the same shape.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var> {
        let (weight, bias) = (parameters.on(tape, &under(&self.prefix, "weight"))?, parameters.on(tape, &under(&self.prefix, "bias"))?);
        tape.layer_norm(x, weight, bias, self.eps)
    }
}

impl Module for LayerNorm {
    fn declare(&self, to: &mut Declared) {
        to.add(under(&self.prefix, "weight"), &[self.width], Init::Constant(1.0));
        to.add(under(&self.prefix, "bias"), &[self.width], Init::Constant(0.0));
    }
}

/// Which recurrent cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    /// Long short-term memory.
    Lstm,
    /// Gated recurrent unit.
    Gru,
}

/// A stack of LSTM or GRU layers, tensors named as those of `nn.LSTM` and `nn.GRU`: `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0`, then
/// `…_l0_reverse`, `…_l1`, …. An LSTM's two biases are one here: PyTorch's are added up when they are read, and `bias_hh` is written as zeros.
#[derive(Debug, Clone)]
pub struct Recurrent {
    /// Prefix of its tensors.
    pub prefix: String,
    /// The cell.
    pub cell: Cell,
    /// I of the first layer.
    pub inputs: usize,
    /// H.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Both directions of time.
    pub bidirectional: bool,
}

impl Recurrent {
    /// One layer, forward in time.
    pub fn new(prefix: &str, cell: Cell, inputs: usize, hidden: usize) -> Recurrent {
        Recurrent { prefix: prefix.into(), cell, inputs, hidden, layers: 1, bidirectional: false }
    }

    fn suffixes(&self, layer: usize) -> Vec<String> {
        let reverse = self.bidirectional.then(|| format!("l{layer}_reverse"));
        std::iter::once(format!("l{layer}")).chain(reverse).collect()
    }

    /// x [M or 1,B,T,I] to [M,B,T,H], or 2H with two directions.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var, options: RecurrentOptions) -> Result<Var> {
        let mut y = x;
        for layer in 0..self.layers {
            let mut directions = Vec::with_capacity(2);
            for suffix in self.suffixes(layer) {
                let mut get = |name: &str| parameters.on(tape, &under(&self.prefix, &format!("{name}_{suffix}")));
                let (w_ih, w_hh, b_ih) = (get("weight_ih")?, get("weight_hh")?, Some(get("bias_ih")?));
                let b_hh = if self.cell == Cell::Gru { Some(get("bias_hh")?) } else { None };
                directions.push(Layer { w_ih, w_hh, b_ih, b_hh, h0: None, c0: None });
            }
            y = match self.cell {
                Cell::Lstm => tape.lstm(y, &directions, options)?.y,
                Cell::Gru => tape.gru(y, &directions, options)?.y,
            };
        }
        Ok(y)
    }
}

impl Module for Recurrent {
    fn declare(&self, to: &mut Declared) {
        let gates = self.hidden * if self.cell == Cell::Lstm { 4 } else { 3 };
        let start = Init::fan_in(self.hidden);
        for layer in 0..self.layers {
            let inputs = if layer == 0 { self.inputs } else { self.hidden * (1 + usize::from(self.bidirectional)) };
            for suffix in self.suffixes(layer) {
                to.add(under(&self.prefix, &format!("weight_ih_{suffix}")), &[gates, inputs], start);
                to.add(under(&self.prefix, &format!("weight_hh_{suffix}")), &[gates, self.hidden], start);
                to.add(under(&self.prefix, &format!("bias_ih_{suffix}")), &[gates], start);
                if self.cell == Cell::Gru {
                    to.add(under(&self.prefix, &format!("bias_hh_{suffix}")), &[gates], start);
                }
            }
        }
    }
}

/// Self-attention with projections, tensors named as those of `nn.MultiheadAttention`.
#[derive(Debug, Clone)]
pub struct MultiheadAttention {
    /// Prefix of `in_proj_weight` [3E,E], `in_proj_bias` [3E], `out_proj.weight` [E,E], `out_proj.bias` [E].
    pub prefix: String,
    /// E.
    pub width: usize,
    /// NH; E is a multiple of it.
    pub heads: usize,
}

impl MultiheadAttention {
    /// x [M,B,T,E] to the same shape; `options.kv_len` has the valid steps of each of the M·B sequences.
    /// # Errors
    /// `Shape` naming the argument; as for [`Tape::attention`].
    pub fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var, options: AttentionOptions) -> Result<Var> {
        let (qkv, [m, b, t, e]) = self.projected(tape, parameters, x)?;
        let (out, _) = tape.attention_packed(qkv, self.heads, options)?;
        let out = tape.reshape(out, &[m, b, t, e])?;
        Linear::new(&under(&self.prefix, "out_proj"), e, e).forward(tape, parameters, out)
    }

    /// The attention weights that [`MultiheadAttention::forward`] has for x [M,B,T,E], before dropout: [M,B,NH,T,T], for plots; no gradient.
    /// # Errors
    /// As for [`MultiheadAttention::forward`].
    pub fn weights(&self, tape: &mut Tape, parameters: &Parameters, x: Var, options: AttentionOptions) -> Result<Var> {
        tape.no_grad(|tape| {
            let (qkv, [m, b, t, _]) = self.projected(tape, parameters, x)?;
            let (_, lse) = tape.attention_packed(qkv, self.heads, options)?;
            let weights = tape.attention_weights_packed(qkv, self.heads, lse, options)?;
            tape.reshape(weights, &[m, b, self.heads, t, t])
        })
    }

    /// q | k | v [M·B,T,3E], and M, B, T, E.
    fn projected(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<(Var, [usize; 4])> {
        let &[_, b, t, e] = tape.shape(x) else {
            return Err(Error::Shape { op: "attention", arg: "x".into(), expected: "[M,B,T,E]".into(), got: format!("{:?}", tape.shape(x)) });
        };
        let (weight, bias) = (parameters.on(tape, &under(&self.prefix, "in_proj_weight"))?, parameters.on(tape, &under(&self.prefix, "in_proj_bias"))?);
        let qkv = tape.linear(x, weight, Some(bias), Activation::None)?;
        let m = tape.shape(qkv)[0];
        Ok((tape.reshape(qkv, &[m * b, t, 3 * e])?, [m, b, t, e]))
    }
}

impl Module for MultiheadAttention {
    fn declare(&self, to: &mut Declared) {
        let e = self.width;
        to.add(under(&self.prefix, "in_proj_weight"), &[3 * e, e], Init::glorot(e, 3 * e));
        to.add(under(&self.prefix, "in_proj_bias"), &[3 * e], Init::Constant(0.0));
        to.add(under(&self.prefix, "out_proj.weight"), &[e, e], Init::fan_in(e));
        to.add(under(&self.prefix, "out_proj.bias"), &[e], Init::Constant(0.0));
    }
}

/// Attention and a feed-forward network, each added to its input and normalised; tensors named as those of `nn.TransformerEncoderLayer`.
#[derive(Debug, Clone)]
pub struct EncoderLayer {
    /// Prefix of `self_attn.…`, `linear1.…`, `linear2.…`, `norm1.…`, `norm2.…`.
    pub prefix: String,
    /// E.
    pub width: usize,
    /// NH.
    pub heads: usize,
    /// Width of the feed-forward network.
    pub feedforward: usize,
    /// Its activation.
    pub activation: Activation,
    /// Normalise before attention and network rather than after.
    pub norm_first: bool,
}

impl EncoderLayer {
    fn parts(&self) -> (MultiheadAttention, Linear, Linear, LayerNorm, LayerNorm) {
        let at = |name: &str| under(&self.prefix, name);
        let attention = MultiheadAttention { prefix: at("self_attn"), width: self.width, heads: self.heads };
        let first = Linear { activation: self.activation, ..Linear::new(&at("linear1"), self.width, self.feedforward) };
        let second = Linear::new(&at("linear2"), self.feedforward, self.width);
        (attention, first, second, LayerNorm::new(&at("norm1"), self.width), LayerNorm::new(&at("norm2"), self.width))
    }

    /// x [M,B,T,E] to the same shape. With sequences of unequal length `options.kv_len` has their steps, and `valid` [M or 1,B,T,1] is 1 inside and 0
    /// past them, where the result is 0 and no gradient comes from.
    /// # Errors
    /// As for [`MultiheadAttention::forward`].
    pub fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var, options: AttentionOptions, valid: Option<Var>) -> Result<Var> {
        let y = self.whole(tape, parameters, x, options)?;
        match valid {
            Some(valid) => tape.mul(y, valid),
            None => Ok(y),
        }
    }

    fn whole(&self, tape: &mut Tape, parameters: &Parameters, x: Var, options: AttentionOptions) -> Result<Var> {
        let (attention, first, second, norm1, norm2) = self.parts();
        if self.norm_first {
            let normal = norm1.forward(tape, parameters, x)?;
            let seen = attention.forward(tape, parameters, normal, options)?;
            let x = tape.add(x, seen)?;
            let normal = norm2.forward(tape, parameters, x)?;
            let wide = first.forward(tape, parameters, normal)?;
            let narrow = second.forward(tape, parameters, wide)?;
            return tape.add(x, narrow);
        }
        let seen = attention.forward(tape, parameters, x, options)?;
        let sum = tape.add(x, seen)?;
        let x = norm1.forward(tape, parameters, sum)?;
        let wide = first.forward(tape, parameters, x)?;
        let narrow = second.forward(tape, parameters, wide)?;
        let sum = tape.add(x, narrow)?;
        norm2.forward(tape, parameters, sum)
    }
}

impl Module for EncoderLayer {
    fn declare(&self, to: &mut Declared) {
        let (attention, first, second, norm1, norm2) = self.parts();
        attention.declare(to);
        first.declare(to);
        second.declare(to);
        norm1.declare(to);
        norm2.declare(to);
    }
}
