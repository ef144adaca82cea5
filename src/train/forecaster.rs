//! Models of windows that `forback train` offers: an LSTM, a GRU, a transformer encoder, a perceptron, each with a linear head on the last step.
//!
//! ```text
//! lstm, gru      x [M,B,T,I] ──> recurrent layer, H ──> its last step ──> head
//! transformer    x ──> project to H, + a learned position per row ──> encoder layer (causal, norm first, 2H wide inside) ──> last step ──> head
//! mlp            x, rows side by side [M,B,T·I] ──> H, GELU ──> H, GELU ──> head
//! ```
//! Bounded predictions are tanh of the head: positions. Tensors are named as PyTorch's: `lstm.weight_ih_l0`, `encoder.self_attn.in_proj_weight`, ….

use super::Model;
use crate::kernels::activation::Activation;
use crate::kernels::map::Unary;
use crate::nn::{Cell, Declared, EncoderLayer, Init, Linear, Module, Parameters, Recurrent};
use crate::ops::{AttentionOptions, RecurrentOptions};
use crate::tape::{Tape, Var};
use crate::{Error, Result};
use std::str::FromStr;

/// Kind of model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Long short-term memory.
    Lstm,
    /// Gated recurrent unit.
    Gru,
    /// Transformer encoder layer.
    Transformer,
    /// Perceptron with two hidden layers.
    Mlp,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::Lstm, Kind::Gru, Kind::Transformer, Kind::Mlp];

    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Lstm => "lstm",
            Kind::Gru => "gru",
            Kind::Transformer => "transformer",
            Kind::Mlp => "mlp",
        }
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Kind> {
        let names = Kind::ALL.map(Kind::name);
        Kind::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| Error::Unknown {
            kind: "model",
            given: text.into(),
            suggestion: crate::data::nearest(text, names),
            known: names.map(String::from).to_vec(),
        })
    }
}

/// A model of windows.
#[derive(Debug, Clone)]
pub struct Forecaster {
    kind: Kind,
    window: usize,
    inputs: usize,
    hidden: usize,
    bounded: bool,
    head: Linear,
}

impl Forecaster {
    /// Windows of `window` rows of `inputs` features to `outputs` values; `bounded` keeps them within ±1.
    /// # Errors
    /// `Parameter` for a size of 0, or a transformer whose width is odd.
    pub fn new(kind: Kind, window: usize, inputs: usize, hidden: usize, outputs: usize, bounded: bool) -> Result<Forecaster> {
        let wrong =
            |name: &str, value: usize, help: &str| Err(Error::Parameter { op: "model", name: name.into(), value: value.to_string(), help: help.into() });
        for (name, value) in [("window", window), ("inputs", inputs), ("hidden", hidden), ("outputs", outputs)] {
            if value == 0 {
                return wrong(name, value, "give at least 1");
            }
        }
        if kind == Kind::Transformer && !hidden.is_multiple_of(2) {
            return wrong("hidden", hidden, "a transformer has heads of equal width: give an even number, such as 16");
        }
        Ok(Forecaster { kind, window, inputs, hidden, bounded, head: Linear::new("head", hidden, outputs) })
    }

    /// Heads of the transformer: as many as are 8 wide or wider, at most 4.
    fn heads(&self) -> usize {
        [4, 2].into_iter().find(|n| self.hidden.is_multiple_of(*n) && self.hidden / n >= 8).unwrap_or(if self.hidden >= 4 { 2 } else { 1 })
    }

    fn recurrent(&self) -> Recurrent {
        let cell = if self.kind == Kind::Lstm { Cell::Lstm } else { Cell::Gru };
        Recurrent::new(self.kind.name(), cell, self.inputs, self.hidden)
    }

    fn project(&self) -> Linear {
        Linear::new("project", self.inputs, self.hidden)
    }

    fn encoder(&self) -> EncoderLayer {
        let (width, heads) = (self.hidden, self.heads());
        EncoderLayer { prefix: "encoder".into(), width, heads, feedforward: 2 * width, activation: Activation::Gelu, norm_first: true }
    }

    fn layers(&self) -> [Linear; 2] {
        let layer = |name: &str, inputs: usize| Linear { activation: Activation::Gelu, ..Linear::new(name, inputs, self.hidden) };
        [layer("layer1", self.window * self.inputs), layer("layer2", self.hidden)]
    }
}

impl Model for Forecaster {
    fn declare(&self, to: &mut Declared) {
        match self.kind {
            Kind::Lstm | Kind::Gru => self.recurrent().declare(to),
            Kind::Transformer => {
                self.project().declare(to);
                to.add("position", &[self.window, self.hidden], Init::Normal(0.02));
                self.encoder().declare(to);
            }
            Kind::Mlp => self.layers().iter().for_each(|layer| layer.declare(to)),
        }
        self.head.declare(to);
    }

    fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var> {
        let &[m, b, t, i] = tape.shape(x) else {
            return Err(Error::Shape { op: "model", arg: "x".into(), expected: "[M,B,T,I]".into(), got: format!("{:?}", tape.shape(x)) });
        };
        let state = match self.kind {
            Kind::Mlp => {
                let mut y = tape.reshape(x, &[m, b, t * i])?;
                for layer in self.layers() {
                    y = layer.forward(tape, parameters, y)?;
                }
                y
            }
            Kind::Lstm | Kind::Gru => {
                let y = self.recurrent().forward(tape, parameters, x, RecurrentOptions::default())?;
                last(tape, y)?
            }
            Kind::Transformer => {
                let x = self.project().forward(tape, parameters, x)?;
                let position = parameters.on(tape, "position")?;
                let position = tape.reshape(position, &[m, 1, t, self.hidden])?;
                let x = tape.add(x, position)?;
                let y = self.encoder().forward(tape, parameters, x, AttentionOptions { causal: true, ..Default::default() }, None)?;
                last(tape, y)?
            }
        };
        let y = self.head.forward(tape, parameters, state)?;
        if self.bounded { tape.unary(Unary::Tanh, y) } else { Ok(y) }
    }
}

/// The last step of [M,B,T,H].
fn last(tape: &mut Tape, y: Var) -> Result<Var> {
    let &[m, b, t, h] = tape.shape(y) else {
        return Err(Error::Shape { op: "model", arg: "y".into(), expected: "[M,B,T,H]".into(), got: format!("{:?}", tape.shape(y)) });
    };
    let y = tape.slice(y, 2, t - 1..t)?;
    tape.reshape(y, &[m, b, h])
}
