//! Element-wise functions, broadcasting, reductions, and tensors put together or taken apart.

use super::{need, optional, wrong};
use crate::kernels::kernel::Elem;
use crate::kernels::map::{self, Binary, BinaryFunction, CopyStrided, Dims, Dropout, GatedResidualGrads, GluHalves, Kept, Layout, RANK, Unary};
use crate::kernels::reduce::{self, BinaryScratch, Reduce};
use crate::kernels::{Device, Pass, View};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

fn sizes(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|&n| n as u64).collect()
}

fn dims(shape: &[usize]) -> Result<Dims> {
    map::dims(&sizes(shape))
}

/// A shape without the leading ones of [`Dims`], of this many axes.
fn shape_of(dims: &Dims, axes: usize) -> Vec<usize> {
    dims[RANK - axes..].iter().map(|&n| n as usize).collect()
}

const NOTHING: Keeps = Keeps { inputs: 0, outputs: 0 };

// ---- one operand ----------------------------------------------------------------------------------------------------------

struct UnaryOp {
    f: Unary,
    shape: Vec<usize>,
}

impl Function for UnaryOp {
    fn name(&self) -> &'static str {
        "unary"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        match self.f.keeps() {
            Kept::Nothing => NOTHING,
            Kept::Input => Keeps { inputs: 1, outputs: 0 },
            Kept::Output => Keeps { inputs: 0, outputs: 1 },
        }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        map::unary(pass, self.f, need(io.inputs, 0, "unary")?, need(io.outputs, 0, "unary")?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let kept = optional(io.inputs, 0).or(optional(io.outputs, 0));
        map::unary_backward(pass, self.f, kept, need(io.grad_outputs, 0, "unary")?, need(io.grad_inputs, 0, "unary")?)
    }
}

struct DropoutOp {
    op: Dropout,
    shape: Vec<usize>,
}

impl Function for DropoutOp {
    fn name(&self) -> &'static str {
        "dropout"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b10, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        map::dropout(pass, &self.op, need(io.inputs, 1, "dropout")?, need(io.inputs, 0, "dropout")?, need(io.outputs, 0, "dropout")?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        map::dropout(pass, &self.op, need(io.inputs, 1, "dropout")?, need(io.grad_outputs, 0, "dropout")?, need(io.grad_inputs, 0, "dropout")?)
    }
}

struct GluOp {
    op: GluHalves,
    shape: Vec<usize>,
}

impl Function for GluOp {
    fn name(&self) -> &'static str {
        "glu"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 1, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        map::glu(pass, &self.op, need(io.inputs, 0, "glu")?, need(io.outputs, 0, "glu")?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (x, grad_y) = (need(io.inputs, 0, "glu")?, need(io.grad_outputs, 0, "glu")?);
        map::glu_backward(pass, &self.op, x, grad_y, need(io.grad_inputs, 0, "glu")?)
    }
}

/// x·gate + y·(1 − gate), all of one shape.
struct GatedResidualOp {
    shape: Vec<usize>,
}

impl Function for GatedResidualOp {
    fn name(&self) -> &'static str {
        "gated_residual"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b111, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let [x, y, gate] = self.three(io.inputs)?;
        map::gated_residual(pass, x, y, gate, need(io.outputs, 0, "gated_residual")?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let [x, y, gate] = self.three(io.inputs)?;
        let grads = GatedResidualGrads { x: optional(io.grad_inputs, 0), y: optional(io.grad_inputs, 1), gate: optional(io.grad_inputs, 2) };
        map::gated_residual_backward(pass, x, y, gate, need(io.grad_outputs, 0, "gated_residual")?, &grads)
    }
}

impl GatedResidualOp {
    fn three<'a>(&self, inputs: &'a [Option<View>]) -> Result<[&'a View; 3]> {
        Ok([need(inputs, 0, "gated_residual")?, need(inputs, 1, "gated_residual")?, need(inputs, 2, "gated_residual")?])
    }
}

// ---- two operands ---------------------------------------------------------------------------------------------------------

struct BinaryOp {
    op: Binary,
    shape: Vec<usize>,
}

impl BinaryOp {
    /// Of a sum, or a difference of equal shapes: the factor of the gradient, which needs no operand.
    fn sign(&self, side: usize) -> Option<f32> {
        match (self.op.function, side) {
            (BinaryFunction::Add, _) => Some(1.0),
            (BinaryFunction::Sub, _) if self.op.a == self.op.b => Some(if side == 0 { 1.0 } else { -1.0 }),
            _ => None,
        }
    }

    /// The gradient of a sum's operand: the incoming one, summed to the operand's shape.
    fn pass_on(&self, pass: &mut Pass, sign: f32, of: &Dims, grad_y: &View, grad: &View, parts: Option<&View>) -> Result<()> {
        let whole = self.op.dims()?;
        if *of == whole {
            return map::unary(pass, if sign > 0.0 { Unary::Copy } else { Unary::Neg }, grad_y, grad);
        }
        reduce::reduce_sum(pass, &Reduce::to_shape(&whole, of)?, grad_y, grad, parts)
    }
}

impl Function for BinaryOp {
    fn name(&self) -> &'static str {
        "binary"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn scratch_backward(&self, _: &Device) -> Vec<u64> {
        vec![self.op.scratch_full().unwrap_or(0), self.op.scratch_parts().unwrap_or(0)]
    }
    fn keeps(&self) -> Keeps {
        if self.sign(0).is_some() { NOTHING } else { Keeps { inputs: 0b11, outputs: 0 } }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        map::binary(pass, &self.op, need(io.inputs, 0, "binary")?, need(io.inputs, 1, "binary")?, need(io.outputs, 0, "binary")?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (grad_y, scratch) = (need(io.grad_outputs, 0, "binary")?, BinaryScratch { full: io.scratch.first(), parts: io.scratch.get(1) });
        let grads = [optional(io.grad_inputs, 0), optional(io.grad_inputs, 1)];
        if self.sign(0).is_some() {
            for (side, of) in [(0, &self.op.a), (1, &self.op.b)] {
                if let (Some(grad), Some(sign)) = (grads[side], self.sign(side)) {
                    self.pass_on(pass, sign, of, grad_y, grad, scratch.parts)?;
                }
            }
            return Ok(());
        }
        let (a, b) = (need(io.inputs, 0, "binary")?, need(io.inputs, 1, "binary")?);
        reduce::binary_backward(pass, &self.op, a, b, grad_y, grads[0], grads[1], &scratch)
    }
}

// ---- regions --------------------------------------------------------------------------------------------------------------

/// y = x[region]: a slice or a permutation.
struct RegionOp {
    name: &'static str,
    dims: Dims,
    from: Layout,
    shape: Vec<usize>,
    /// Whether the region is all of x.
    whole: bool,
}

impl Function for RegionOp {
    fn name(&self) -> &'static str {
        self.name
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        NOTHING
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let op = CopyStrided { dims: self.dims, from: self.from, to: Layout::row_major(&self.dims), add: false };
        map::copy_strided(pass, &op, need(io.inputs, 0, self.name)?, need(io.outputs, 0, self.name)?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let grad_x = need(io.grad_inputs, 0, self.name)?;
        if !self.whole {
            map::fill(pass, 0.0, grad_x)?;
        }
        let op = CopyStrided { dims: self.dims, from: Layout::row_major(&self.dims), to: self.from, add: false };
        map::copy_strided(pass, &op, need(io.grad_outputs, 0, self.name)?, grad_x)
    }
}

struct ConcatOp {
    parts: Vec<(Dims, Layout)>,
    shape: Vec<usize>,
}

impl Function for ConcatOp {
    fn name(&self) -> &'static str {
        "concat"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        NOTHING
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        for (i, (dims, to)) in self.parts.iter().enumerate() {
            let op = CopyStrided { dims: *dims, from: Layout::row_major(dims), to: *to, add: false };
            map::copy_strided(pass, &op, need(io.inputs, i, "concat")?, need(io.outputs, 0, "concat")?)?;
        }
        Ok(())
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        for (i, (dims, from)) in self.parts.iter().enumerate() {
            if let Some(grad) = optional(io.grad_inputs, i) {
                let op = CopyStrided { dims: *dims, from: *from, to: Layout::row_major(dims), add: false };
                map::copy_strided(pass, &op, need(io.grad_outputs, 0, "concat")?, grad)?;
            }
        }
        Ok(())
    }
}

// ---- reductions -----------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq)]
enum Reduction {
    Sum,
    Mean,
    Max,
}

struct ReduceOp {
    op: Reduce,
    how: Reduction,
    shape: Vec<usize>,
}

impl Function for ReduceOp {
    fn name(&self) -> &'static str {
        "reduce"
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn saved(&self) -> Option<(Elem, u64)> {
        (self.how == Reduction::Max).then(|| (Elem::U32, self.op.kept()))
    }
    fn scratch(&self, _: &Device) -> Vec<u64> {
        vec![if self.how == Reduction::Max { 0 } else { self.op.scratch() }]
    }
    fn keeps(&self) -> Keeps {
        NOTHING
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let (x, y, scratch) = (need(io.inputs, 0, "reduce")?, need(io.outputs, 0, "reduce")?, io.scratch.first());
        match (self.how, io.saved) {
            (Reduction::Sum, _) => reduce::reduce_sum(pass, &self.op, x, y, scratch),
            (Reduction::Mean, _) => reduce::reduce_mean(pass, &self.op, x, y, scratch),
            (Reduction::Max, Some(index)) => reduce::reduce_max(pass, &self.op, x, y, index),
            (Reduction::Max, None) => Err(Error::Internal("a maximum has no memory".into())),
        }
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (grad_y, grad_x) = (need(io.grad_outputs, 0, "reduce")?, need(io.grad_inputs, 0, "reduce")?);
        match (self.how, io.saved) {
            (Reduction::Sum, _) => reduce::reduce_sum_backward(pass, &self.op, grad_y, grad_x),
            (Reduction::Mean, _) => reduce::reduce_mean_backward(pass, &self.op, grad_y, grad_x),
            (Reduction::Max, Some(index)) => reduce::reduce_max_backward(pass, &self.op, index, grad_y, grad_x),
            (Reduction::Max, None) => Err(Error::Internal("a maximum has no memory".into())),
        }
    }
}

impl Tape {
    /// f of every element.
    /// # Errors
    /// `Parameter` for a function without meaning: lo > hi, a factor that is no number.
    pub fn unary(&mut self, f: Unary, x: Var) -> Result<Var> {
        f.check()?;
        let shape = self.shape(x).to_vec();
        self.one(UnaryOp { f, shape }, &[Some(x)])
    }

    /// f of pairs of elements; axes of size 1, and missing leading ones, are repeated.
    /// # Errors
    /// `Shape` where two sizes differ and neither is 1, or beyond six axes.
    pub fn binary(&mut self, function: BinaryFunction, a: Var, b: Var) -> Result<Var> {
        let op = Binary { function, a: dims(self.shape(a))?, b: dims(self.shape(b))? };
        let axes = self.shape(a).len().max(self.shape(b).len());
        let shape = shape_of(&op.dims()?, axes);
        self.one(BinaryOp { op, shape }, &[Some(a), Some(b)])
    }

    /// a + b, broadcasting.
    /// # Errors
    /// As for [`Tape::binary`].
    pub fn add(&mut self, a: Var, b: Var) -> Result<Var> {
        self.binary(BinaryFunction::Add, a, b)
    }

    /// a − b, broadcasting.
    /// # Errors
    /// As for [`Tape::binary`].
    pub fn sub(&mut self, a: Var, b: Var) -> Result<Var> {
        self.binary(BinaryFunction::Sub, a, b)
    }

    /// a·b, broadcasting.
    /// # Errors
    /// As for [`Tape::binary`].
    pub fn mul(&mut self, a: Var, b: Var) -> Result<Var> {
        self.binary(BinaryFunction::Mul, a, b)
    }

    /// a / b, broadcasting.
    /// # Errors
    /// As for [`Tape::binary`].
    pub fn div(&mut self, a: Var, b: Var) -> Result<Var> {
        self.binary(BinaryFunction::Div, a, b)
    }

    /// scale·x + shift.
    /// # Errors
    /// `Parameter` for a number that is not finite.
    pub fn affine(&mut self, x: Var, scale: f32, shift: f32) -> Result<Var> {
        self.unary(Unary::Affine { scale, shift }, x)
    }

    /// Zeros at random with probability p, the rest divided by 1 − p. `seed` and `stream` number the dropouts of a model; `step` is one word on the
    /// device: another step is another mask, so that a replayed pass draws anew, and backward sees the same.
    /// # Errors
    /// `Parameter` for p outside [0, 1]; `Shape` for a step of other than one word.
    pub fn dropout(&mut self, x: Var, p: f32, seed: u64, stream: u32, step: Var) -> Result<Var> {
        let op = Dropout { p, seed, stream };
        op.check()?;
        self.expect("dropout", "step", step, &[1])?;
        self.expect_words("dropout", "step", step)?;
        let shape = self.shape(x).to_vec();
        self.one(DropoutOp { op, shape }, &[Some(x), Some(step)])
    }

    /// a·σ(b) for x = a | b along the last axis: half as wide. Dauphin et al. 2017.
    /// # Errors
    /// `Shape` for an odd width.
    pub fn glu(&mut self, x: Var) -> Result<Var> {
        let mut shape = self.shape(x).to_vec();
        let Some(last) = shape.last_mut().filter(|n| n.is_multiple_of(2)) else {
            return Err(wrong("glu", "x", "[…,2·D]", self.shape(x)));
        };
        *last /= 2;
        let width = *last as u64;
        let rows = shape.iter().rev().skip(1).map(|&n| n as u64).product();
        self.one(GluOp { op: GluHalves { rows, width }, shape }, &[Some(x)])
    }

    /// x·gate + y·(1 − gate), broadcasting: in one launch where the shapes are the same.
    /// # Errors
    /// As for [`Tape::binary`].
    pub fn gated_residual(&mut self, x: Var, y: Var, gate: Var) -> Result<Var> {
        let shape = self.shape(x).to_vec();
        if self.shape(y) == shape && self.shape(gate) == shape {
            return self.one(GatedResidualOp { shape }, &[Some(x), Some(y), Some(gate)]);
        }
        let difference = self.sub(x, y)?;
        let part = self.mul(difference, gate)?;
        self.add(y, part)
    }

    /// Elements `from..to` of an axis.
    /// # Errors
    /// `Shape` for an axis or a range that is not there.
    pub fn slice(&mut self, x: Var, axis: usize, range: std::ops::Range<usize>) -> Result<Var> {
        let mut shape = self.shape(x).to_vec();
        if axis >= shape.len() || range.start > range.end || range.end > shape[axis] {
            return Err(wrong("slice", "x", format!("one with {range:?} along axis {axis}"), &shape));
        }
        let (whole, lead) = (dims(&shape)?, RANK - shape.len());
        let all = range.len() == shape[axis];
        let mut from = Layout::row_major(&whole);
        from.offset = range.start as u64 * from.strides[lead + axis];
        shape[axis] = range.len();
        let op = RegionOp { name: "slice", dims: dims(&shape)?, from, shape, whole: all };
        self.one(op, &[Some(x)])
    }

    /// Axes in another order: axis i of the result is axis `order[i]` of x.
    /// # Errors
    /// `Shape` if `order` does not name every axis once.
    pub fn permute(&mut self, x: Var, order: &[usize]) -> Result<Var> {
        let shape = self.shape(x).to_vec();
        let mut seen: Vec<usize> = order.to_vec();
        seen.sort_unstable();
        if seen != (0..shape.len()).collect::<Vec<_>>() {
            return Err(wrong("permute", "order", format!("each of the {} axes once", shape.len()), order));
        }
        let (strides, lead) = (map::row_major(&dims(&shape)?), RANK - shape.len());
        let mut from = Layout { offset: 0, strides: [0; RANK] };
        for (to, &axis) in order.iter().enumerate() {
            from.strides[lead + to] = strides[lead + axis];
        }
        let shape: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
        let op = RegionOp { name: "permute", dims: dims(&shape)?, from, shape, whole: true };
        self.one(op, &[Some(x)])
    }

    /// Tensors one after the other along an axis.
    /// # Errors
    /// `Shape` if they differ in another axis; `Parameter` for none.
    pub fn concat(&mut self, parts: &[Var], axis: usize) -> Result<Var> {
        let Some(&first) = parts.first() else {
            let help = "give at least one tensor".into();
            return Err(Error::Parameter { op: "concat", name: "parts".into(), value: "none".into(), help });
        };
        let mut shape = self.shape(first).to_vec();
        if axis >= shape.len() {
            return Err(wrong("concat", "axis", format!("below {}", shape.len()), &[axis]));
        }
        shape[axis] = 0;
        for &part in parts {
            let mut like = self.shape(part).to_vec();
            let width = like.get(axis).copied().unwrap_or(0);
            if let Some(n) = like.get_mut(axis) {
                *n = shape[axis];
            }
            if like != shape {
                return Err(wrong("concat", "parts", format!("shapes that differ along axis {axis} alone, as {:?}", self.shape(first)), self.shape(part)));
            }
            shape[axis] += width;
        }
        let (strides, lead) = (map::row_major(&dims(&shape)?), RANK - shape.len());
        let mut at = 0;
        let mut places = Vec::with_capacity(parts.len());
        for &part in parts {
            places.push((dims(self.shape(part))?, Layout { offset: at * strides[lead + axis], strides }));
            at += self.shape(part)[axis] as u64;
        }
        let inputs: Vec<Option<Var>> = parts.iter().map(|&x| Some(x)).collect();
        self.one(ConcatOp { parts: places, shape }, &inputs)
    }

    /// Sum over axes, which go.
    /// # Errors
    /// `Shape` for an axis that is not there.
    pub fn sum(&mut self, x: Var, axes: &[usize]) -> Result<Var> {
        self.reduce(Reduction::Sum, x, axes)
    }

    /// Mean over axes, which go.
    /// # Errors
    /// `Shape` for an axis that is not there.
    pub fn mean(&mut self, x: Var, axes: &[usize]) -> Result<Var> {
        self.reduce(Reduction::Mean, x, axes)
    }

    /// Largest element over axes, which go; the lowest index takes the gradient at ties.
    /// # Errors
    /// `Shape` for an axis that is not there.
    pub fn max(&mut self, x: Var, axes: &[usize]) -> Result<Var> {
        self.reduce(Reduction::Max, x, axes)
    }

    fn reduce(&mut self, how: Reduction, x: Var, axes: &[usize]) -> Result<Var> {
        let shape = self.shape(x).to_vec();
        if let Some(axis) = axes.iter().find(|&&axis| axis >= shape.len()) {
            return Err(wrong("reduce", "axes", format!("below {}", shape.len()), &[*axis]));
        }
        let op = Reduce::over(&sizes(&shape), axes)?;
        op.check()?;
        let shape = shape.iter().enumerate().filter(|(axis, _)| !axes.contains(axis)).map(|(_, &n)| n).collect();
        self.one(ReduceOp { op, how, shape }, &[Some(x)])
    }
}
