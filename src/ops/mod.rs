//! The library's ops on a tape: shapes checked, gradients wired. One function here is what makes a kernel differentiable.
//!
//! Every method adds one [`Function`] and returns its output; [M, …] is the models' axis, and a leading axis of 1 is shared by all of them.
//! Errors name the op, the argument, what was expected and what came.

mod attention;
mod black_scholes;
mod cast;
mod conv1d;
mod dense;
mod gather;
mod hedge;
mod loss;
mod map;
mod objective;
mod pool;
mod recurrent;

pub use attention::AttentionOptions;
pub use conv1d::Conv1dOptions;
pub use hedge::{HedgeRisk, RolloutInputs, RolloutSpot};
pub use objective::ObjectiveOptions;
pub use recurrent::{Layer, RecurrentOptions, RecurrentOutput};

use crate::kernels::kernel::Elem;
use crate::kernels::{Pass, View, cast as casts, map as maps};
use crate::tape::{Tape, Var};
use crate::{Error, Result};

/// The view that an op of ours always gets.
fn need<'a>(views: &'a [Option<View>], i: usize, op: &'static str) -> Result<&'a View> {
    views.get(i).and_then(Option::as_ref).ok_or_else(|| Error::Internal(format!("{op}: the plan left out tensor {i}")))
}

fn optional(views: &[Option<View>], i: usize) -> Option<&View> {
    views.get(i).and_then(Option::as_ref)
}

/// Zeros in gradients of any storage.
fn zeros(pass: &mut Pass, grads: &[Option<View>]) -> Result<()> {
    for grad in grads.iter().flatten().filter(|grad| grad.len() > 0) {
        if grad.elem().is_half() {
            let none = pass.device().zeros("zeros", grad.len())?;
            casts::cast(pass, &View::from(&none), grad, 1.0)?;
        } else {
            maps::fill(pass, 0.0, grad)?;
        }
    }
    Ok(())
}

fn wrong(op: &'static str, arg: &str, expected: impl Into<String>, got: &[usize]) -> Error {
    Error::Shape { op, arg: arg.into(), expected: expected.into(), got: format!("{got:?}") }
}

impl Tape {
    /// The only output of an op.
    fn one(&mut self, op: impl crate::tape::Function + 'static, inputs: &[Option<Var>]) -> Result<Var> {
        let name = op.name();
        self.apply(op, inputs)?.first().copied().ok_or_else(|| Error::Internal(format!("{name} has no output")))
    }

    /// Sizes of a tensor of N axes.
    fn axes<const N: usize>(&self, op: &'static str, arg: &str, x: Var, names: &str) -> Result<[usize; N]> {
        self.shape(x).try_into().map_err(|_| wrong(op, arg, names, self.shape(x)))
    }

    fn expect(&self, op: &'static str, arg: &str, x: Var, shape: &[usize]) -> Result<()> {
        if self.shape(x) == shape { Ok(()) } else { Err(wrong(op, arg, format!("{shape:?}"), self.shape(x))) }
    }

    /// Words: lengths, masks, steps, ids.
    fn expect_words(&self, op: &'static str, arg: &str, x: Var) -> Result<()> {
        match self.values.get(x.at()) {
            Some(value) if value.elem != Elem::U32 => Err(Error::Shape { op, arg: arg.into(), expected: "words".into(), got: "reals".into() }),
            _ => Ok(()),
        }
    }

    /// Words of rows: one for each of `outer`, or, without its first axis or with that of size 1, the same for all models.
    fn expect_rows(&self, op: &'static str, arg: &str, x: Var, outer: &[usize]) -> Result<()> {
        let shape = self.shape(x);
        let shared = outer.get(1..).is_some_and(|rest| shape == rest && !rest.is_empty() || shape.first() == Some(&1) && shape[1..] == *rest);
        if shape != outer && !shared {
            return Err(wrong(op, arg, format!("{outer:?}, or that of one model"), shape));
        }
        self.expect_words(op, arg, x)
    }
}
