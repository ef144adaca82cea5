//! Attention pooling with a gate, and positions.

use super::{Declared, Init, LayerNorm, Linear, Module, Parameters, under};
use crate::kernels::activation::Activation;
use crate::kernels::map::Unary;
use crate::ops::AttentionOptions;
use crate::tape::{Tape, Var};
use crate::{Error, Result};

/// Additive attention over time, mixed into each step by a gate: scores e[t] = v·tanh(W·h[t] + b), context c = Σ_t softmax(e)[t]·h[t], gate
/// g[t] = σ(w·h[t] + b), result norm((1 − g[t])·h[t] + g[t]·c). Bahdanau, Cho, Bengio 2015 (scores); Ilse, Tomczak, Welling 2018 (pooling).
#[derive(Debug, Clone)]
pub struct AttentionPooling {
    /// Prefix of `score.weight` [S,E] and `score.bias` [S], `score_out.weight` [1,S], `gate.weight` [1,E] and `gate.bias` [1], `norm.weight` and
    /// `norm.bias` [E].
    pub prefix: String,
    /// E.
    pub width: usize,
    /// S.
    pub scores: usize,
    /// c[t] over steps up to t alone, rather than over all: needed wherever more than the last step is used and time matters. Then E is at most 256.
    pub causal: bool,
}

/// Results of [`AttentionPooling`].
#[derive(Debug, Clone, Copy)]
pub struct Pooled {
    /// [M,B,T,E].
    pub y: Var,
    /// [M,B,E]; of every step where causal: [M,B,T,E].
    pub context: Var,
    /// [M,B,T], without gradient; of every step where causal: [M,B,T,T].
    pub weights: Var,
}

const OP: &str = "attention_pooling";

impl AttentionPooling {
    /// Over the whole sequence, with scores of a quarter of the width.
    pub fn new(prefix: &str, width: usize) -> AttentionPooling {
        AttentionPooling { prefix: prefix.into(), width, scores: (width / 4).max(1), causal: false }
    }

    fn parts(&self) -> (Linear, Linear, Linear, LayerNorm) {
        let at = |name: &str| under(&self.prefix, name);
        let score = Linear { activation: Activation::Tanh, ..Linear::new(&at("score"), self.width, self.scores) };
        let out = Linear { bias: false, ..Linear::new(&at("score_out"), self.scores, 1) };
        let gate = Linear { activation: Activation::Sigmoid, ..Linear::new(&at("gate"), self.width, 1) };
        (score, out, gate, LayerNorm::new(&at("norm"), self.width))
    }

    /// h [M,B,T,E] and the valid steps of its sequences, words [M·B] (all unless given). What stands past them in y means nothing.
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for a width beyond 256 where causal.
    pub fn forward(&self, tape: &mut Tape, parameters: &Parameters, h: Var, lengths: Option<Var>) -> Result<Pooled> {
        let &[m, b, t, e] = tape.shape(h) else {
            return Err(Error::Shape { op: OP, arg: "h".into(), expected: "[M,B,T,E]".into(), got: format!("{:?}", tape.shape(h)) });
        };
        let (score, out, gate, norm) = self.parts();
        let hidden = score.forward(tape, parameters, h)?;
        let scores = out.forward(tape, parameters, hidden)?;
        let (context, weights, each) = if self.causal {
            let (context, weights) = self.prefixes(tape, scores, h, lengths)?;
            (context, weights, context)
        } else {
            let lengths = match lengths {
                Some(lengths) => tape.reshape(lengths, &[m, b])?,
                None => {
                    let all = tape.device().upload_u32("steps", &vec![t as u32; m * b])?;
                    tape.input(&all, &[m, b])?
                }
            };
            let scores = tape.reshape(scores, &[m, b, t])?;
            let (context, weights) = tape.attention_pool(scores, h, lengths)?;
            (context, weights, tape.reshape(context, &[m, b, 1, e])?)
        };
        let gate = gate.forward(tape, parameters, h)?;
        let mixed = tape.gated_residual(each, h, gate)?;
        Ok(Pooled { y: norm.forward(tape, parameters, mixed)?, context, weights })
    }

    /// Context of every step over itself and those before it: causal attention with one head whose score of key t is e[t], whatever the query.
    fn prefixes(&self, tape: &mut Tape, scores: Var, h: Var, lengths: Option<Var>) -> Result<(Var, Var)> {
        let &[m, b, t, e] = tape.shape(h) else { return Err(Error::Internal("prefixes of something else".into())) };
        let first: Vec<f32> = (0..e).map(|i| if i == 0 { 1.0 } else { 0.0 }).collect();
        let first = tape.input(&tape.device().upload("first", &first)?, &[e])?;
        let k = tape.mul(scores, first)?;
        let ones = tape.detach(scores)?;
        let ones = tape.unary(Unary::Affine { scale: 0.0, shift: 1.0 }, ones)?;
        let q = tape.mul(ones, first)?;
        let heads = |tape: &mut Tape, x: Var| tape.reshape(x, &[m * b, 1, t, e]);
        let (q, k, v) = (heads(tape, q)?, heads(tape, k)?, heads(tape, h)?);
        let options = AttentionOptions { causal: true, scale: Some(1.0), kv_len: lengths, ..AttentionOptions::default() };
        let (context, lse) = tape.attention(q, k, v, options)?;
        let weights = tape.attention_weights(q, k, lse, options)?;
        Ok((tape.reshape(context, &[m, b, t, e])?, tape.reshape(weights, &[m, b, t, t])?))
    }
}

impl Module for AttentionPooling {
    fn declare(&self, to: &mut Declared) {
        let (score, out, gate, norm) = self.parts();
        score.declare(to);
        out.declare(to);
        gate.declare(to);
        norm.declare(to);
    }
}

/// A learned row for each position, added.
#[derive(Debug, Clone)]
pub struct Positions {
    /// Prefix of `weight` [T,E].
    pub prefix: String,
    /// T, the longest sequence.
    pub steps: usize,
    /// E.
    pub width: usize,
}

impl Positions {
    /// x [M or 1,B,T,E], T at most `steps`, to [M,B,T,E].
    /// # Errors
    /// `Shape` for a longer sequence or another width.
    pub fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var> {
        let t = match tape.shape(x) {
            &[_, _, t, e] if t <= self.steps && e == self.width => t,
            other => {
                let (expected, got) = (format!("[M or 1,B,T,{}] with T at most {}", self.width, self.steps), format!("{other:?}"));
                return Err(Error::Shape { op: "positions", arg: "x".into(), expected, got });
            }
        };
        let table = parameters.on(tape, &under(&self.prefix, "weight"))?;
        let m = tape.shape(table)[0];
        let rows = tape.slice(table, 1, 0..t)?;
        let rows = tape.reshape(rows, &[m, 1, t, self.width])?;
        tape.add(x, rows)
    }
}

impl Module for Positions {
    fn declare(&self, to: &mut Declared) {
        to.add_undecayed(under(&self.prefix, "weight"), &[self.steps, self.width], Init::Normal(0.02));
    }
}

/// Sinusoids of positions [T,E] to add to x [M,B,T,E]: sin(t·10000^(−2i/E)) in column 2i and the cosine in column 2i + 1. Vaswani et al. 2017.
/// # Errors
/// Of the device.
pub fn sinusoids(tape: &mut Tape, steps: usize, width: usize) -> Result<Var> {
    let of = |at: usize| {
        let (t, column) = ((at / width) as f64, at % width);
        let angle = t * 10_000f64.powf(-((column - column % 2) as f64) / width as f64);
        if column % 2 == 0 { angle.sin() as f32 } else { angle.cos() as f32 }
    };
    let table: Vec<f32> = (0..steps * width).map(of).collect();
    tape.input(&tape.device().upload("sinusoids", &table)?, &[steps, width])
}
