//! Storage of tensors in 16 bits.

use super::need;
use crate::kernels::Pass;
use crate::kernels::cast;
use crate::kernels::kernel::Elem;
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

struct CastOp {
    from: Elem,
    to: Elem,
    shape: Vec<usize>,
    grad_scale: f32,
}

impl Function for CastOp {
    fn name(&self) -> &'static str {
        "cast"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn takes(&self) -> Option<Elem> {
        Some(self.from)
    }
    fn gives(&self, _: usize) -> Elem {
        self.to
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        cast::cast(pass, need(io.inputs, 0, "cast")?, need(io.outputs, 0, "cast")?, 1.0)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        cast::cast(pass, need(io.grad_outputs, 0, "cast")?, need(io.grad_inputs, 0, "cast")?, self.grad_scale)
    }
}

impl Tape {
    /// The same numbers in another storage: f32 to f16 or bf16, rounded to nearest, or back, exactly. Its gradient is cast back.
    ///
    /// Mixed precision: parameters stay f32 (the masters that an optimiser steps), their casts and the data's go through linear, attention and
    /// recurrent layers, the result is cast to f32 for the loss. See [`Tape::cast_scaled`] where gradients in f16 would underflow.
    /// # Errors
    /// `Shape` between two storages of 16 bits, or for words; `Parameter` if the device lacks the storage.
    pub fn cast(&mut self, x: Var, to: Elem) -> Result<Var> {
        self.cast_scaled(x, to, 1.0)
    }

    /// [`Tape::cast`] whose gradient is multiplied by a factor when it is cast back: 1/s on every parameter, where the loss was multiplied by s
    /// so that gradients stay inside f16. Gradients that overflow are not finite, and the optimiser skips that model's step.
    /// # Errors
    /// As for [`Tape::cast`]; `Parameter` for a factor that is not positive and finite.
    pub fn cast_scaled(&mut self, x: Var, to: Elem, grad_scale: f32) -> Result<Var> {
        let from = self.elem(x);
        if from == Elem::U32 || to == Elem::U32 || (from.is_half() && to.is_half() && from != to) {
            let (expected, got) = ("f32 to f16 or bf16, or back".into(), format!("{} to {}", from.wgsl(), to.wgsl()));
            return Err(Error::Shape { op: "cast", arg: "to".into(), expected, got });
        }
        if !(grad_scale > 0.0 && grad_scale.is_finite()) {
            let help = "must be positive and finite".into();
            return Err(Error::Parameter { op: "cast", name: "grad_scale".into(), value: grad_scale.to_string(), help });
        }
        if from == to && grad_scale == 1.0 {
            return Ok(x);
        }
        if from == to {
            let (expected, got) = ("another storage for a scaled gradient".into(), format!("{} to {}", from.wgsl(), to.wgsl()));
            return Err(Error::Shape { op: "cast", arg: "to".into(), expected, got });
        }
        let shape = self.shape(x).to_vec();
        self.one(CastOp { from, to, shape, grad_scale }, &[Some(x)])
    }
}
