//! Element-wise functions with broadcasting: y[i] = f(a[i], b[i], c[i]) over strided regions of up to six dimensions.
//!
//! One kernel, [`MAP`], holds every function of one, two and three operands and the derivatives that backward passes need; a params
//! word chooses. A stride of 0 broadcasts; a stride and an offset make a copy a transpose, a slice, or a part of a concatenation.
//! unary     copy, −x, e^x, ln x, ln(1+x), √x, x², |x|, sign, 1/x, max(x,0), gelu x·Φ(x), tanh, σ(x) = 1/(1+e^−x), x·σ(x),
//!           softplus ln(1+e^x), clamp to [lo,hi], scale·x + shift, x^p, 1 where x > 0 else 0
//! binary    a+b, a−b, a·b, a/b, min, max (at a tie the gradient goes to a), glu a·σ(b)
//! ternary   gated residual x·g + y·(1−g)
//! dropout   y = x/(1−p) where the element's random word is at least p·2³², else 0
//!
//! Shapes   any, rank ≤ 6, sizes ≥ 0; each operand a view with an offset and one stride per dimension, in elements.
//! Backward grad_x = grad_y·f′, from x or from y ([`Unary::keeps`]); derivatives of broadcast operands are summed (kernels/reduce.rs).
//!          dropout is its own backward: the same words give the same mask.
//! Launch   dimensions are sorted by y's strides and merged where all operands allow; WG·PER elements per workgroup, thread t takes
//!          elements t, t+WG, …, so writes are coalesced, and reads wherever the inner strides are 1.
//! Scratch  none.     Floor 4 bytes per element of each operand and of y.
//! Numerics the shaders' and the f32 column's exp, ln, tanh and Φ are series within 3 ulp or so; a NaN operand gives NaN (but to
//!          `copy_strided` and `fill`, which move bits, nothing is special). x^p of a negative x is NaN unless p is whole.
//! Random   Philox4x32-10, key = 64-bit seed, counter = (element/4 low, high, stream, step), word element mod 4; the
//!          step is read from a buffer, so that a recorded pass draws new masks when it is replayed.
//! Source   Hendrycks & Gimpel 2016, arXiv:1606.08415 (gelu); Dauphin et al. 2017, arXiv:1612.08083 (glu).
//! Files    shaders/map.wgsl · cuda/map.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use pulp::Arch;
use rayon::prelude::*;

/// Most dimensions of a region.
pub const RANK: usize = 6;

/// Sizes or strides, outermost first; missing dimensions are leading ones.
pub type Dims = [u64; RANK];

/// Threads per workgroup.
const WG: u32 = 256;
/// Elements per thread.
const PER: u32 = 4;

params! {
    /// Params of [`MAP`]: dimension 0 is the innermost.
    pub struct MapParams {
        /// Which function.
        code: u32,
        /// How many of a, b, c it takes.
        arity: u32,
        /// 1 adds to y, 0 overwrites it.
        add: u32,
        /// Elements.
        count: u32,
        /// Dimensions.
        rank: u32,
        /// First scalar of the function.
        p: f32,
        /// Second scalar.
        q: f32,
        /// First element of a …
        a_at: u32,
        /// … of b …
        b_at: u32,
        /// … of c …
        c_at: u32,
        /// … and of y.
        y_at: u32,
        /// Size of dimension 0.
        n0: u32,
        /// Stride of a in dimension 0.
        a0: u32,
        /// Stride of b in dimension 0.
        b0: u32,
        /// Stride of c in dimension 0.
        c0: u32,
        /// Stride of y in dimension 0.
        y0: u32,
        /// Size of dimension 1.
        n1: u32,
        /// Stride of a in dimension 1.
        a1: u32,
        /// Stride of b in dimension 1.
        b1: u32,
        /// Stride of c in dimension 1.
        c1: u32,
        /// Stride of y in dimension 1.
        y1: u32,
        /// Size of dimension 2.
        n2: u32,
        /// Stride of a in dimension 2.
        a2: u32,
        /// Stride of b in dimension 2.
        b2: u32,
        /// Stride of c in dimension 2.
        c2: u32,
        /// Stride of y in dimension 2.
        y2: u32,
        /// Size of dimension 3.
        n3: u32,
        /// Stride of a in dimension 3.
        a3: u32,
        /// Stride of b in dimension 3.
        b3: u32,
        /// Stride of c in dimension 3.
        c3: u32,
        /// Stride of y in dimension 3.
        y3: u32,
        /// Size of dimension 4.
        n4: u32,
        /// Stride of a in dimension 4.
        a4: u32,
        /// Stride of b in dimension 4.
        b4: u32,
        /// Stride of c in dimension 4.
        c4: u32,
        /// Stride of y in dimension 4.
        y4: u32,
        /// Size of dimension 5.
        n5: u32,
        /// Stride of a in dimension 5.
        a5: u32,
        /// Stride of b in dimension 5.
        b5: u32,
        /// Stride of c in dimension 5.
        c5: u32,
        /// Stride of y in dimension 5.
        y5: u32,
    }
}

params! {
    /// Params of [`FILL`].
    pub struct FillParams {
        /// Elements.
        count: u32,
        /// What to write.
        value: f32,
    }
}

params! {
    /// Params of [`DROPOUT`].
    pub struct DropoutParams {
        /// Elements.
        count: u32,
        /// Quarter of the first element's index, low word …
        block: u32,
        /// … and high word.
        block_high: u32,
        /// Which dropout of the model.
        stream: u32,
        /// Seed, low word …
        seed: u32,
        /// … and high word.
        seed_high: u32,
        /// Words below it are dropped.
        threshold: u32,
        /// Probability.
        p: f32,
    }
}

fn map_count(words: &[u32]) -> u64 {
    params_of::<MapParams>(words).map_or(0, |p| u64::from(p.count))
}

fn fill_count(words: &[u32]) -> u64 {
    params_of::<FillParams>(words).map_or(0, |p| u64::from(p.count))
}

fn dropout_count(words: &[u32]) -> u64 {
    params_of::<DropoutParams>(words).map_or(0, |p| u64::from(p.count))
}

/// Any function of one, two or three strided operands.
pub static MAP: Kernel = Kernel {
    name: "map",
    about: "element-wise functions with broadcasting, their derivatives, strided copies",
    args: &[reads("a"), reads("b"), reads("c"), writes("y")],
    params: layout::<MapParams>(),
    workgroup: WG,
    constants: &[("PER", PER)],
    groups: |words| map_count(words).div_ceil(u64::from(WG * PER)),
    wgsl: wgsl!("map"),
    cuda: cuda!("map"),
    cpu: Some(Cpu { f32: map_cpu::<f32>, f64: map_cpu::<f64> }),
    cost: Cost { unit: "element", units: map_count, bytes: 8.0, flops: 8.0 },
};

/// One value everywhere.
pub static FILL: Kernel = Kernel {
    name: "fill",
    about: "one value in every element",
    args: &[writes("y")],
    params: layout::<FillParams>(),
    workgroup: WG,
    constants: &[("PER", PER)],
    groups: |words| fill_count(words).div_ceil(u64::from(WG * PER)),
    wgsl: wgsl!("map"),
    cuda: cuda!("map"),
    cpu: Some(Cpu { f32: fill_cpu::<f32>, f64: fill_cpu::<f64> }),
    cost: Cost { unit: "element", units: fill_count, bytes: 4.0, flops: 0.0 },
};

/// Zeros at random, the rest scaled.
pub static DROPOUT: Kernel = Kernel {
    name: "dropout",
    about: "dropout, forward and backward",
    args: &[reads("x"), reads_u32("step"), writes("y")],
    params: layout::<DropoutParams>(),
    workgroup: WG,
    constants: &[("PER", PER)],
    groups: |words| dropout_count(words).div_ceil(u64::from(WG * PER)),
    wgsl: wgsl!("map"),
    cuda: cuda!("map"),
    cpu: Some(Cpu { f32: dropout_cpu::<f32>, f64: dropout_cpu::<f64> }),
    cost: Cost { unit: "element", units: dropout_count, bytes: 8.0, flops: 27.0 },
};

/// The functions of [`MAP`]; `_D` marks a derivative times the gradient (a what forward kept, b the gradient).
mod code {
    pub(super) const COPY: u32 = 0;
    pub(super) const NEG: u32 = 1;
    pub(super) const EXP: u32 = 2;
    pub(super) const LOG: u32 = 3;
    pub(super) const LOG1P: u32 = 4;
    pub(super) const SQRT: u32 = 5;
    pub(super) const SQUARE: u32 = 6;
    pub(super) const ABS: u32 = 7;
    pub(super) const SIGN: u32 = 8;
    pub(super) const RECIPROCAL: u32 = 9;
    pub(super) const RELU: u32 = 10;
    pub(super) const GELU: u32 = 11;
    pub(super) const TANH: u32 = 12;
    pub(super) const SIGMOID: u32 = 13;
    pub(super) const SILU: u32 = 14;
    pub(super) const SOFTPLUS: u32 = 15;
    pub(super) const CLAMP: u32 = 16;
    pub(super) const AFFINE: u32 = 17;
    pub(super) const POWER: u32 = 18;
    pub(super) const STEP: u32 = 19;
    /// a/(p + q).
    pub(super) const SHARE: u32 = 20;
    pub(super) const LOG_D: u32 = 32;
    pub(super) const LOG1P_D: u32 = 33;
    pub(super) const SQRT_D: u32 = 34;
    pub(super) const SQUARE_D: u32 = 35;
    pub(super) const ABS_D: u32 = 36;
    pub(super) const RECIPROCAL_D: u32 = 37;
    pub(super) const RELU_D: u32 = 38;
    pub(super) const GELU_D: u32 = 39;
    pub(super) const TANH_D: u32 = 40;
    pub(super) const SIGMOID_D: u32 = 41;
    pub(super) const SILU_D: u32 = 42;
    pub(super) const SOFTPLUS_D: u32 = 43;
    pub(super) const CLAMP_D: u32 = 44;
    pub(super) const POWER_D: u32 = 45;
    pub(super) const ADD: u32 = 64;
    pub(super) const SUB: u32 = 65;
    pub(super) const MUL: u32 = 66;
    pub(super) const DIV: u32 = 67;
    pub(super) const MIN: u32 = 68;
    pub(super) const MAX: u32 = 69;
    pub(super) const GLU: u32 = 70;
    /// a·(1 − b).
    pub(super) const REST: u32 = 71;
    /// −c·a/b².
    pub(super) const DIV_B: u32 = 96;
    pub(super) const MIN_A: u32 = 97;
    pub(super) const MIN_B: u32 = 98;
    pub(super) const MAX_A: u32 = 99;
    pub(super) const MAX_B: u32 = 100;
    /// c·a·σ(b)·(1 − σ(b)).
    pub(super) const GLU_B: u32 = 101;
    /// a·c + b·(1 − c).
    pub(super) const MIX: u32 = 102;
    /// c·(a − b).
    pub(super) const MIX_C: u32 = 103;

    /// How many operands a function takes.
    pub(super) fn arity(code: u32) -> u32 {
        match code {
            0..32 => 1,
            32..96 => 2,
            _ => 3,
        }
    }
}

// ---- shapes -----------------------------------------------------------------------------------------------------------

/// Sizes with leading ones up to [`RANK`].
/// # Errors
/// `Shape` for more dimensions.
pub fn dims(shape: &[u64]) -> Result<Dims> {
    let mut dims = [1; RANK];
    let lead = RANK.checked_sub(shape.len()).ok_or_else(|| Error::Shape {
        op: "map",
        arg: "shape".into(),
        expected: format!("at most {RANK} dimensions"),
        got: format!("{shape:?}; merge dimensions that lie next to each other"),
    })?;
    dims[lead..].copy_from_slice(shape);
    Ok(dims)
}

/// Elements of a shape, saturating.
pub fn elements(dims: &Dims) -> u64 {
    if dims.contains(&0) { 0 } else { dims.iter().fold(1, |n, &d| n.saturating_mul(d)) }
}

/// Strides of a row-major tensor.
pub fn row_major(dims: &Dims) -> Dims {
    let mut strides: Dims = [1; RANK];
    for d in (0..RANK - 1).rev() {
        strides[d] = strides[d + 1].saturating_mul(dims[d + 1]);
    }
    strides
}

/// Where the elements of a region lie in a view: (i0, …, i5) at offset + Σ i_d·stride_d.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// First element.
    pub offset: u64,
    /// Step of each dimension, in elements; 0 repeats.
    pub strides: Dims,
}

impl Layout {
    /// A whole row-major tensor.
    pub fn row_major(dims: &Dims) -> Layout {
        Layout { offset: 0, strides: row_major(dims) }
    }

    /// A row-major tensor of shape `from` repeated along its dimensions of size 1 to the shape `to`.
    /// # Errors
    /// `Shape` where a size is neither 1 nor that of `to`.
    pub fn broadcast(op: &'static str, from: &Dims, to: &Dims) -> Result<Layout> {
        let mut layout = Layout::row_major(from);
        for d in 0..RANK {
            if from[d] != to[d] {
                if from[d] != 1 {
                    return Err(Error::Shape { op, arg: "shape".into(), expected: format!("one that broadcasts to {to:?}"), got: format!("{from:?}") });
                }
                layout.strides[d] = 0;
            }
        }
        Ok(layout)
    }

    /// One past the last element, saturating; `dims` has no 0.
    pub(crate) fn end(&self, dims: &Dims) -> u64 {
        dims.iter().zip(&self.strides).fold(self.offset, |end, (n, s)| end.saturating_add((n - 1).saturating_mul(*s))).saturating_add(1)
    }
}

/// The shape that two shapes broadcast to.
/// # Errors
/// `Shape` where two sizes differ and neither is 1.
pub fn broadcast_dims(op: &'static str, a: &Dims, b: &Dims) -> Result<Dims> {
    let mut dims = *a;
    for d in 0..RANK {
        dims[d] = match (a[d], b[d]) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => return Err(Error::Shape { op, arg: "b".into(), expected: format!("a shape that broadcasts with {a:?}"), got: format!("{b:?}") }),
        };
    }
    Ok(dims)
}

/// Refuses a view whose length is not `elements`.
pub(crate) fn check_len(op: &'static str, arg: &'static str, view: &View, elements: u64) -> Result<()> {
    if view.len() == elements {
        return Ok(());
    }
    Err(Error::Shape { op, arg: arg.into(), expected: format!("{elements} elements"), got: format!("{}", view.len()) })
}

/// Largest range that a launch binds, in elements.
pub(crate) fn binding_elements(device: &Device) -> u64 {
    (device.limits().binding_bytes / 4).min(1 << 31)
}

/// Elements `at .. at + span` of a view as a range that starts aligned, and where `at` lies in it: nothing is copied.
pub(crate) fn bind(device: &Device, view: &View, at: u64, span: u64) -> (View, u32) {
    let start = at - at % device.limits().align;
    (view.part(start..at + span), (at - start) as u32)
}

// ---- recording --------------------------------------------------------------------------------------------------------

/// A function and its scalars.
#[derive(Clone, Copy)]
struct Function {
    code: u32,
    p: f32,
    q: f32,
    add: bool,
}

impl Function {
    fn of(code: u32) -> Function {
        Function { code, p: 0.0, q: 0.0, add: false }
    }
}

/// One dimension of a launch: size, then strides of a, b, c, y.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Axis {
    n: u64,
    strides: [u64; 4],
}

/// What remains to be launched: a box of elements.
#[derive(Clone)]
struct Piece {
    axes: Vec<Axis>,
    at: [u64; 4],
}

impl Piece {
    fn new(dims: &Dims, layouts: &[Layout; 4]) -> Piece {
        let axis = |d: usize| Axis { n: dims[d], strides: std::array::from_fn(|k| layouts[k].strides[d]) };
        let mut axes: Vec<Axis> = (0..RANK).map(axis).filter(|a| a.n > 1).collect();
        axes.sort_by_key(|a| std::cmp::Reverse(a.strides[3]));
        let mut merged: Vec<Axis> = Vec::with_capacity(axes.len());
        for axis in axes {
            match merged.last_mut() {
                Some(outer) if (0..4).all(|k| outer.strides[k] == axis.strides[k].saturating_mul(axis.n)) => {
                    *outer = Axis { n: outer.n * axis.n, strides: axis.strides };
                }
                _ => merged.push(axis),
            }
        }
        if merged.is_empty() {
            merged.push(Axis { n: 1, strides: [1; 4] });
        }
        Piece { axes: merged, at: layouts.map(|l| l.offset) }
    }

    fn count(&self) -> u64 {
        self.axes.iter().fold(1, |n, a| n.saturating_mul(a.n))
    }

    fn span(&self, k: usize) -> u64 {
        self.axes.iter().map(|a| (a.n - 1) * a.strides[k]).sum::<u64>() + 1
    }

    /// Whether no two elements share a place in y: each stride passes what lies inside it.
    fn writes_apart(&self) -> bool {
        let mut inner = 1;
        self.axes.iter().rev().all(|a| {
            let apart = a.n == 1 || a.strides[3] >= inner;
            inner += (a.n - 1) * a.strides[3];
            apart
        })
    }

    /// Halves of the axis that a limit asks to cut; `None` if the piece fits a launch.
    fn halves(&self, device: &Device) -> Option<[Piece; 2]> {
        let limits = device.limits();
        let wide = |k: &usize| self.span(*k) + self.at[*k] % limits.align > binding_elements(device);
        let longest = |size: &dyn Fn(&Axis) -> u64| (0..self.axes.len()).filter(|&d| self.axes[d].n > 1).max_by_key(|&d| size(&self.axes[d]));
        let cut = match (0..4).find(wide) {
            Some(k) => longest(&|a| (a.n - 1) * a.strides[k])?,
            None => {
                let most = (limits.groups().saturating_mul(u64::from(WG * PER))).min(1 << 31).min(limits.work_per_launch / 20).max(1);
                if self.count() <= most {
                    return None;
                }
                longest(&|a| a.n)?
            }
        };
        let half = self.axes[cut].n / 2;
        let (mut low, mut high) = (self.clone(), self.clone());
        low.axes[cut].n = half;
        high.axes[cut].n -= half;
        for k in 0..4 {
            high.at[k] += half * self.axes[cut].strides[k];
        }
        Some([low, high])
    }
}

/// Records y = f(a, b, c) over `dims`.
fn record(pass: &mut Pass, op: &'static str, f: Function, dims: &Dims, operands: [(&View, &Layout); 3], y: (&View, &Layout)) -> Result<()> {
    if elements(dims) == 0 {
        return Ok(());
    }
    let [a, b, c] = operands;
    for ((view, layout), arg) in [a, b, c, y].into_iter().zip(["a", "b", "c", "y"]) {
        if layout.end(dims) > view.len() {
            let expected = format!("at least {} elements", layout.end(dims));
            return Err(Error::Shape { op, arg: arg.into(), expected, got: format!("{}", view.len()) });
        }
    }
    let piece = Piece::new(dims, &[*a.1, *b.1, *c.1, *y.1]);
    if !piece.writes_apart() {
        let got = format!("sizes {dims:?} with strides {:?}", y.1.strides);
        return Err(Error::Shape { op, arg: "y".into(), expected: "strides that give every element a place of its own".into(), got });
    }
    let views = [a.0, b.0, c.0, y.0];
    let mut pieces = vec![piece];
    while let Some(piece) = pieces.pop() {
        match piece.halves(pass.device()) {
            Some([low, high]) => pieces.extend([high, low]),
            None => launch(pass, f, &piece, views)?,
        }
    }
    Ok(())
}

fn launch(pass: &mut Pass, f: Function, piece: &Piece, views: [&View; 4]) -> Result<()> {
    let bound: [(View, u32); 4] = std::array::from_fn(|k| bind(pass.device(), views[k], piece.at[k], piece.span(k)));
    let mut words = [0u32; 11 + 5 * RANK];
    let head = [f.code, code::arity(f.code), u32::from(f.add), piece.count() as u32, piece.axes.len() as u32, f.p.to_bits(), f.q.to_bits()];
    words[..7].copy_from_slice(&head);
    for (word, (_, at)) in words[7..11].iter_mut().zip(&bound) {
        *word = *at;
    }
    for (axis, words) in piece.axes.iter().rev().zip(words[11..].chunks_exact_mut(5)) {
        words[0] = axis.n as u32;
        for k in 0..4 {
            words[1 + k] = axis.strides[k] as u32;
        }
    }
    let params: MapParams = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words[..]));
    pass.launch(&MAP, &params, &bound.map(|(view, _)| view))
}

/// Records over contiguous views of equal length.
fn record_flat(pass: &mut Pass, op: &'static str, f: Function, n: u64, operands: [&View; 3], y: &View) -> Result<()> {
    let dims = [1, 1, 1, 1, 1, n];
    let flat = Layout::row_major(&dims);
    record(pass, op, f, &dims, operands.map(|view| (view, &flat)), (y, &flat))
}

// ---- unary ------------------------------------------------------------------------------------------------------------

/// A function of one operand.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unary {
    /// x.
    Copy,
    /// −x.
    Neg,
    /// e^x.
    Exp,
    /// ln x.
    Log,
    /// ln(1 + x).
    Log1p,
    /// √x.
    Sqrt,
    /// x².
    Square,
    /// |x|; its derivative at 0 is 0.
    Abs,
    /// −1, 0 or 1; no gradient.
    Sign,
    /// 1/x.
    Reciprocal,
    /// max(x, 0); its derivative at 0 is 0.
    Relu,
    /// x·Φ(x), Φ the normal distribution function.
    Gelu,
    /// Hyperbolic tangent.
    Tanh,
    /// 1/(1 + e^−x).
    Sigmoid,
    /// x/(1 + e^−x).
    Silu,
    /// ln(1 + e^x).
    Softplus,
    /// x cut to [lo, hi]; the gradient passes inside, bounds included.
    Clamp {
        /// Lower bound.
        lo: f32,
        /// Upper bound.
        hi: f32,
    },
    /// scale·x + shift.
    Affine {
        /// Factor.
        scale: f32,
        /// Summand.
        shift: f32,
    },
    /// x^p.
    Power {
        /// Exponent.
        p: f32,
    },
    /// 1 where x > 0, else 0; no gradient.
    Step,
}

/// What a backward pass needs from its forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// Only the gradient.
    Nothing,
    /// x.
    Input,
    /// y.
    Output,
}

impl Unary {
    fn function(self) -> Function {
        let (code, p, q) = match self {
            Unary::Copy => (code::COPY, 0.0, 0.0),
            Unary::Neg => (code::NEG, 0.0, 0.0),
            Unary::Exp => (code::EXP, 0.0, 0.0),
            Unary::Log => (code::LOG, 0.0, 0.0),
            Unary::Log1p => (code::LOG1P, 0.0, 0.0),
            Unary::Sqrt => (code::SQRT, 0.0, 0.0),
            Unary::Square => (code::SQUARE, 0.0, 0.0),
            Unary::Abs => (code::ABS, 0.0, 0.0),
            Unary::Sign => (code::SIGN, 0.0, 0.0),
            Unary::Reciprocal => (code::RECIPROCAL, 0.0, 0.0),
            Unary::Relu => (code::RELU, 0.0, 0.0),
            Unary::Gelu => (code::GELU, 0.0, 0.0),
            Unary::Tanh => (code::TANH, 0.0, 0.0),
            Unary::Sigmoid => (code::SIGMOID, 0.0, 0.0),
            Unary::Silu => (code::SILU, 0.0, 0.0),
            Unary::Softplus => (code::SOFTPLUS, 0.0, 0.0),
            Unary::Clamp { lo, hi } => (code::CLAMP, lo, hi),
            Unary::Affine { scale, shift } => (code::AFFINE, scale, shift),
            Unary::Power { p } => (code::POWER, p, 0.0),
            Unary::Step => (code::STEP, 0.0, 0.0),
        };
        Function { code, p, q, add: false }
    }

    /// Derivative times gradient; `None` where it is zero everywhere.
    fn derivative(self) -> Option<Function> {
        let code = match self {
            Unary::Copy => code::COPY,
            Unary::Neg => code::NEG,
            Unary::Exp => code::MUL,
            Unary::Log => code::LOG_D,
            Unary::Log1p => code::LOG1P_D,
            Unary::Sqrt => code::SQRT_D,
            Unary::Square => code::SQUARE_D,
            Unary::Abs => code::ABS_D,
            Unary::Reciprocal => code::RECIPROCAL_D,
            Unary::Relu => code::RELU_D,
            Unary::Gelu => code::GELU_D,
            Unary::Tanh => code::TANH_D,
            Unary::Sigmoid => code::SIGMOID_D,
            Unary::Silu => code::SILU_D,
            Unary::Softplus => code::SOFTPLUS_D,
            Unary::Clamp { .. } => code::CLAMP_D,
            Unary::Affine { .. } => code::AFFINE,
            Unary::Power { .. } => code::POWER_D,
            Unary::Sign | Unary::Step => return None,
        };
        let Function { p, q, .. } = self.function();
        Some(Function { code, p, q: if matches!(self, Unary::Affine { .. }) { 0.0 } else { q }, add: false })
    }

    /// What [`unary_backward`] takes as `kept`.
    pub fn keeps(self) -> Kept {
        match self {
            Unary::Copy | Unary::Neg | Unary::Affine { .. } | Unary::Sign | Unary::Step => Kept::Nothing,
            Unary::Exp | Unary::Sqrt | Unary::Reciprocal | Unary::Relu | Unary::Tanh | Unary::Sigmoid => Kept::Output,
            _ => Kept::Input,
        }
    }

    /// # Errors
    /// `Parameter` for a clamp whose bounds are crossed, or a scalar that is not finite (bounds may be infinite).
    pub fn check(&self) -> Result<()> {
        let (name, value, legal) = match *self {
            Unary::Clamp { lo, hi } => ("lo, hi", format!("{lo}, {hi}"), lo <= hi),
            Unary::Affine { scale, shift } => ("scale, shift", format!("{scale}, {shift}"), scale.is_finite() && shift.is_finite()),
            Unary::Power { p } => ("p", format!("{p}"), p.is_finite()),
            _ => return Ok(()),
        };
        let help = "give finite numbers, and lo ≤ hi".into();
        if legal { Ok(()) } else { Err(Error::Parameter { op: "unary", name: name.into(), value, help }) }
    }
}

/// Records y = f(x), element by element.
/// # Errors
/// `Shape` if the lengths differ; see [`Unary::check`].
pub fn unary(pass: &mut Pass, op: Unary, x: &View, y: &View) -> Result<()> {
    op.check()?;
    check_len("unary", "y", y, x.len())?;
    record_flat(pass, "unary", op.function(), x.len(), [x; 3], y)
}

/// Records grad_x = grad_y·f′; `kept` is what [`Unary::keeps`] names, else `None`.
/// # Errors
/// `Shape` if the lengths differ or `kept` is missing.
pub fn unary_backward(pass: &mut Pass, op: Unary, kept: Option<&View>, grad_y: &View, grad_x: &View) -> Result<()> {
    op.check()?;
    check_len("unary_backward", "grad_x", grad_x, grad_y.len())?;
    let Some(f) = op.derivative() else { return fill(pass, 0.0, grad_x) };
    let a = match (op.keeps(), kept) {
        (Kept::Nothing, _) => grad_y,
        (_, Some(kept)) => kept,
        (keeps, None) => {
            return Err(Error::Shape { op: "unary_backward", arg: "kept".into(), expected: format!("the forward pass's {keeps:?}"), got: "none".into() });
        }
    };
    check_len("unary_backward", "kept", a, grad_y.len())?;
    record_flat(pass, "unary_backward", f, grad_y.len(), [a, grad_y, grad_y], grad_x)
}

// ---- binary -----------------------------------------------------------------------------------------------------------

/// A function of two operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BinaryFunction {
    /// a + b.
    Add,
    /// a − b.
    Sub,
    /// a·b.
    Mul,
    /// a/b.
    Div,
    /// The smaller; a at a tie.
    Min,
    /// The larger; a at a tie.
    Max,
    /// a/(1 + e^−b).
    Glu,
}

/// y = f(a, b) over the shape that both broadcast to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Binary {
    /// Which.
    pub function: BinaryFunction,
    /// Shape of a.
    pub a: Dims,
    /// Shape of b.
    pub b: Dims,
}

impl Binary {
    /// Shape of y.
    /// # Errors
    /// `Shape` where the shapes do not broadcast.
    pub fn dims(&self) -> Result<Dims> {
        broadcast_dims("binary", &self.a, &self.b)
    }

    /// # Errors
    /// As [`Binary::dims`].
    pub fn check(&self) -> Result<()> {
        self.dims().map(|_| ())
    }
}

/// Records y = f(a, b).
/// # Errors
/// `Shape` if the shapes do not broadcast or a length is not that of its shape.
pub fn binary(pass: &mut Pass, op: &Binary, a: &View, b: &View, y: &View) -> Result<()> {
    let dims = op.dims()?;
    check_len("binary", "a", a, elements(&op.a))?;
    check_len("binary", "b", b, elements(&op.b))?;
    check_len("binary", "y", y, elements(&dims))?;
    let code = match op.function {
        BinaryFunction::Add => code::ADD,
        BinaryFunction::Sub => code::SUB,
        BinaryFunction::Mul => code::MUL,
        BinaryFunction::Div => code::DIV,
        BinaryFunction::Min => code::MIN,
        BinaryFunction::Max => code::MAX,
        BinaryFunction::Glu => code::GLU,
    };
    let (at_a, at_b) = (Layout::broadcast("binary", &op.a, &dims)?, Layout::broadcast("binary", &op.b, &dims)?);
    record(pass, "binary", Function::of(code), &dims, [(a, &at_a), (b, &at_b), (b, &at_b)], (y, &Layout::row_major(&dims)))
}

/// Which operand of a binary function a gradient is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

/// What a gradient is before it is summed over broadcast dimensions.
pub(crate) enum Gradient {
    /// grad_y times this.
    Scaled(f32),
    /// A map of the operands.
    Mapped,
}

impl Binary {
    pub(crate) fn gradient(&self, side: Side) -> Gradient {
        match (self.function, side) {
            (BinaryFunction::Add, _) | (BinaryFunction::Sub, Side::A) => Gradient::Scaled(1.0),
            (BinaryFunction::Sub, Side::B) => Gradient::Scaled(-1.0),
            _ => Gradient::Mapped,
        }
    }
}

/// Records the gradient of one operand at the shape of y.
pub(crate) fn binary_gradient(pass: &mut Pass, op: &Binary, side: Side, a: &View, b: &View, grad_y: &View, grad: &View) -> Result<()> {
    let dims = op.dims()?;
    let (at_a, at_b, at_y) = (Layout::broadcast("binary", &op.a, &dims)?, Layout::broadcast("binary", &op.b, &dims)?, Layout::row_major(&dims));
    let (a, b, g) = ((a, &at_a), (b, &at_b), (grad_y, &at_y));
    use BinaryFunction::{Add, Div, Glu, Max, Min, Mul, Sub};
    let (code, operands) = match (op.function, side) {
        (Add, _) | (Sub, Side::A) => (code::COPY, [g, g, g]),
        (Sub, Side::B) => (code::NEG, [g, g, g]),
        (Mul, Side::A) => (code::MUL, [b, g, g]),
        (Mul, Side::B) => (code::MUL, [a, g, g]),
        (Div, Side::A) => (code::DIV, [g, b, b]),
        (Div, Side::B) => (code::DIV_B, [a, b, g]),
        (Min, Side::A) => (code::MIN_A, [a, b, g]),
        (Min, Side::B) => (code::MIN_B, [a, b, g]),
        (Max, Side::A) => (code::MAX_A, [a, b, g]),
        (Max, Side::B) => (code::MAX_B, [a, b, g]),
        (Glu, Side::A) => (code::GLU, [g, b, b]),
        (Glu, Side::B) => (code::GLU_B, [a, b, g]),
    };
    record(pass, "binary_backward", Function::of(code), &dims, operands, (grad, &at_y))
}

// ---- copies -----------------------------------------------------------------------------------------------------------

/// A copy between two regions of the same shape: transpose, permute, slice, concatenate, broadcast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyStrided {
    /// Shape of both regions.
    pub dims: Dims,
    /// Region of x; strides may be 0 or overlap.
    pub from: Layout,
    /// Region of y; every element has a place of its own. The rest of y stays as it is.
    pub to: Layout,
    /// Adds to y instead of overwriting it.
    pub add: bool,
}

/// Records y[to] = x[from], or y[to] += x[from]. The views are of different buffers.
/// # Errors
/// `Shape` if a region leaves its view or elements of y coincide.
pub fn copy_strided(pass: &mut Pass, op: &CopyStrided, x: &View, y: &View) -> Result<()> {
    let f = Function { add: op.add, ..Function::of(code::COPY) };
    record(pass, "copy_strided", f, &op.dims, [(x, &op.from); 3], (y, &op.to))
}

/// Records y = x/divisor repeated from `from` to `to`, both row-major: the backward pass of a sum (divisor 1) or a mean (n).
/// # Errors
/// `Shape` if the shapes do not broadcast or a length is not that of its shape.
pub fn broadcast(pass: &mut Pass, divisor: u64, from: &Dims, to: &Dims, x: &View, y: &View) -> Result<()> {
    check_len("broadcast", "x", x, elements(from))?;
    check_len("broadcast", "y", y, elements(to))?;
    let (at_x, at_y) = (Layout::broadcast("broadcast", from, to)?, Layout::row_major(to));
    // The divisor as the sum of two f32: only the f64 reference feels the second.
    let p = divisor as f32;
    let q = (divisor as f64 - f64::from(p)) as f32;
    let f = if divisor == 1 { Function::of(code::COPY) } else { Function { p, q, ..Function::of(code::SHARE) } };
    record(pass, "broadcast", f, to, [(x, &at_x); 3], (y, &at_y))
}

/// Records y += scale·x: how a tape adds a second gradient.
/// # Errors
/// `Shape` if the lengths differ.
pub fn accumulate(pass: &mut Pass, scale: f32, x: &View, y: &View) -> Result<()> {
    check_len("accumulate", "y", y, x.len())?;
    let code = if scale == 1.0 { code::COPY } else { code::AFFINE };
    record_flat(pass, "accumulate", Function { code, p: scale, q: 0.0, add: true }, x.len(), [x; 3], y)
}

/// Records y = value everywhere.
pub fn fill(pass: &mut Pass, value: f32, y: &View) -> Result<()> {
    let device = pass.device().clone();
    let most = binding_elements(&device).min(device.limits().groups().saturating_mul(u64::from(WG * PER))).min(device.limits().work_per_launch);
    let step = (most / device.limits().align * device.limits().align).max(device.limits().align);
    for start in (0..y.len()).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
        let part = y.part(start..start + step);
        pass.launch(&FILL, &FillParams { count: part.len() as u32, value }, &[part])?;
    }
    Ok(())
}

// ---- gates ------------------------------------------------------------------------------------------------------------

/// Gated linear unit on the halves of each row: y[r,j] = x[r,j]·σ(x[r,W+j]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GluHalves {
    /// Rows.
    pub rows: u64,
    /// Width W of y; x is twice as wide.
    pub width: u64,
}

impl GluHalves {
    fn layouts(&self) -> (Dims, Layout, Layout, Layout) {
        let dims = [1, 1, 1, 1, self.rows, self.width];
        let half = |offset| Layout { offset, strides: [0, 0, 0, 0, self.width.saturating_mul(2), 1] };
        (dims, half(0), half(self.width), Layout::row_major(&dims))
    }

    fn check(&self, op: &'static str, x: (&'static str, &View), y: (&'static str, &View)) -> Result<()> {
        check_len(op, x.0, x.1, self.rows.saturating_mul(self.width).saturating_mul(2))?;
        check_len(op, y.0, y.1, self.rows.saturating_mul(self.width))
    }
}

/// Records y [R,W] from x [R,2W].
/// # Errors
/// `Shape` for other lengths.
pub fn glu(pass: &mut Pass, op: &GluHalves, x: &View, y: &View) -> Result<()> {
    op.check("glu", ("x", x), ("y", y))?;
    let (dims, a, b, at_y) = op.layouts();
    record(pass, "glu", Function::of(code::GLU), &dims, [(x, &a), (x, &b), (x, &b)], (y, &at_y))
}

/// Records grad_x [R,2W] from x [R,2W] and grad_y [R,W].
/// # Errors
/// `Shape` for other lengths.
pub fn glu_backward(pass: &mut Pass, op: &GluHalves, x: &View, grad_y: &View, grad_x: &View) -> Result<()> {
    op.check("glu_backward", ("x", x), ("grad_y", grad_y))?;
    op.check("glu_backward", ("grad_x", grad_x), ("grad_y", grad_y))?;
    let (dims, a, b, at_y) = op.layouts();
    record(pass, "glu_backward", Function::of(code::GLU), &dims, [(grad_y, &at_y), (x, &b), (x, &b)], (grad_x, &a))?;
    record(pass, "glu_backward", Function::of(code::GLU_B), &dims, [(x, &a), (x, &b), (grad_y, &at_y)], (grad_x, &b))
}

/// Records out = x·gate + y·(1 − gate), all of the same length.
/// # Errors
/// `Shape` if the lengths differ.
pub fn gated_residual(pass: &mut Pass, x: &View, y: &View, gate: &View, out: &View) -> Result<()> {
    for (arg, view) in [("y", y), ("gate", gate), ("out", out)] {
        check_len("gated_residual", arg, view, x.len())?;
    }
    record_flat(pass, "gated_residual", Function::of(code::MIX), x.len(), [x, y, gate], out)
}

/// Gradients of [`gated_residual`] that are wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct GatedResidualGrads<'a> {
    /// grad_out·gate.
    pub x: Option<&'a View>,
    /// grad_out·(1 − gate).
    pub y: Option<&'a View>,
    /// grad_out·(x − y).
    pub gate: Option<&'a View>,
}

/// Records the gradients of [`gated_residual`] that are given.
/// # Errors
/// `Shape` if the lengths differ.
pub fn gated_residual_backward(pass: &mut Pass, x: &View, y: &View, gate: &View, grad_out: &View, grads: &GatedResidualGrads<'_>) -> Result<()> {
    let n = x.len();
    for (arg, view) in [("y", Some(y)), ("gate", Some(gate)), ("grad_out", Some(grad_out)), ("grad_x", grads.x), ("grad_y", grads.y), ("grad_gate", grads.gate)]
    {
        if let Some(view) = view {
            check_len("gated_residual_backward", arg, view, n)?;
        }
    }
    let wanted = [(grads.x, code::MUL, [grad_out, gate, gate]), (grads.y, code::REST, [grad_out, gate, gate]), (grads.gate, code::MIX_C, [x, y, grad_out])];
    for (grad, code, operands) in wanted {
        if let Some(grad) = grad {
            record_flat(pass, "gated_residual_backward", Function::of(code), n, operands, grad)?;
        }
    }
    Ok(())
}

// ---- dropout ----------------------------------------------------------------------------------------------------------

/// Dropout of one place in a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of zero, in [0, 1]; 1 gives zeros everywhere.
    pub p: f32,
    /// Seed of the model.
    pub seed: u64,
    /// A number of its own for every dropout of a model.
    pub stream: u32,
}

impl Dropout {
    /// # Errors
    /// `Parameter` if p is outside [0, 1].
    pub fn check(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.p) {
            return Ok(());
        }
        Err(Error::Parameter { op: "dropout", name: "p".into(), value: self.p.to_string(), help: "give a probability in [0, 1]".into() })
    }
}

/// Records y = mask·x/(1 − p); with gradients for x it is the backward pass. `step` is one word on the device:
/// a pass that is replayed draws a new mask when it has changed.
///
/// The mask depends on the element's index, seed, step and stream alone: the same bits on every device and in every split.
/// # Errors
/// `Shape` if the lengths differ or `step` is not one word; `Parameter` for p.
pub fn dropout(pass: &mut Pass, op: &Dropout, step: &View, x: &View, y: &View) -> Result<()> {
    op.check()?;
    check_len("dropout", "y", y, x.len())?;
    check_len("dropout", "step", step, 1)?;
    let device = pass.device().clone();
    let unit = device.limits().align.max(4).next_multiple_of(4);
    let most = binding_elements(&device).min(device.limits().groups().saturating_mul(u64::from(WG * PER))).min(device.limits().work_per_launch / 40);
    let run = (most / unit * unit).max(unit);
    for start in (0..x.len()).step_by(usize::try_from(run).unwrap_or(usize::MAX)) {
        let (from, to) = (x.part(start..start + run), y.part(start..start + run));
        let block = start / 4;
        let params = DropoutParams {
            count: from.len() as u32,
            block: block as u32,
            block_high: (block >> 32) as u32,
            stream: op.stream,
            seed: op.seed as u32,
            seed_high: (op.seed >> 32) as u32,
            threshold: (f64::from(op.p) * 4_294_967_296.0).min(4_294_967_295.0) as u32,
            p: op.p,
        };
        pass.launch(&DROPOUT, &params, &[from, step.clone(), to])?;
    }
    Ok(())
}

/// Conformance binding of ops whose truth is finite differences and closed forms in the tests.
/// # Errors
/// `Data`: there are no conformance files.
pub(crate) fn verify(_: &Device, case: &Case) -> Result<Outputs> {
    Err(Error::Data {
        file: case.path.display().to_string(),
        row: None,
        column: None,
        value: None,
        message: format!("'{}' has no conformance files", case.kernel),
        help: "its tests compare it with closed forms and finite differences".into(),
    })
}

// ---- CPU --------------------------------------------------------------------------------------------------------------

/// Reals with the functions of this file: in f32 as series that the compiler turns into vectors, in f64 as exact as they come.
pub(crate) trait Maths: Real {
    /// e^x.
    fn exp_map(self) -> Self;
    /// ln x.
    fn ln_map(self) -> Self;
    /// ln(1 + x).
    fn ln_1p_map(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh_map(self) -> Self;
    /// Normal distribution function.
    fn phi_map(self) -> Self;
    /// x^p.
    fn power_map(self, p: Self) -> Self;
}

impl Maths for f64 {
    fn exp_map(self) -> f64 {
        self.exp()
    }
    fn ln_map(self) -> f64 {
        self.ln()
    }
    fn ln_1p_map(self) -> f64 {
        self.ln_1p()
    }
    fn tanh_map(self) -> f64 {
        self.tanh()
    }
    /// Φ(x) = ½ + φ(x)·(x + x³/3 + x⁵/15 + …) inside ±3; outside by the continued fraction of Mills' ratio.
    fn phi_map(self) -> f64 {
        let density = (-0.5 * self * self).exp() * 0.398_942_280_401_432_7;
        let x = self.abs();
        if x <= 3.0 {
            let (mut term, mut sum, mut k) = (self, self, 1.0);
            while term.abs() > 1e-18 * sum.abs() {
                k += 2.0;
                term *= self * self / k;
                sum += term;
            }
            return 0.5 + density * sum;
        }
        let tail = density / (1..=120).rev().fold(x, |below, k| x + f64::from(k) / below);
        if self > 0.0 { 1.0 - tail } else { tail }
    }
    fn power_map(self, p: f64) -> f64 {
        self.powf(p)
    }
}

/// tanh(x)/x in x² for |x| ≤ 0.63, within 6e-8.
const TANH: [f32; 6] = [1.0, -0.333_332_5, 0.133_309_32, -0.053_705_316, 0.020_539_926, -0.005_602_728_6];
/// e^(z²)·erfc(z)/t in t = 1/(1 + z/2) for z in [0, 9.7], within 2e-8.
const ERFC: [f32; 10] =
    [0.282_062_74, 0.282_893_6, 0.238_322_02, 0.227_128_65, -0.103_115_95, 0.430_557_46, -0.681_548_2, 0.437_810_54, -0.127_121_1, 0.013_010_177];

#[inline(always)]
fn horner<const N: usize>(c: &[f32; N], x: f32) -> f32 {
    let mut sum = c[N - 1];
    for i in (0..N - 1).rev() {
        sum = sum * x + c[i];
    }
    sum
}

/// 2·artanh(s) for |s| < 0.34.
#[inline(always)]
fn twice_artanh(s: f32) -> f32 {
    2.0 * s * horner(&[1.0, 0.333_333_34, 0.2, 0.142_857_15, 0.111_111_11, 0.090_909_09, 0.076_923_08], s * s)
}

impl Maths for f32 {
    #[inline(always)]
    fn exp_map(self) -> f32 {
        // Adding 1.5·2²³ rounds to a whole number and leaves it in the low bits.
        let y = self.clamp(-88.0, 89.0);
        let rounded = y * std::f32::consts::LOG2_E + 12_582_912.0;
        let n = rounded - 12_582_912.0;
        let r = (y - n * 0.693_359_4) + n * 2.121_944_4e-4;
        let p = horner(&[0.5, 0.166_666_67, 0.041_666_668, 0.008_333_334, 0.001_388_889, 0.000_198_412_7], r);
        // In two factors, so that 2^128 is not needed below the largest number.
        let half = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f00_0000));
        let e = (1.0 + (r + r * r * p)) * half * 2.0;
        if self < -87.0 { 0.0 } else { e }
    }
    #[inline(always)]
    fn ln_map(self) -> f32 {
        // Subnormal numbers are scaled by 2^24.
        let small = self < f32::MIN_POSITIVE;
        let raw = (if small { self * 16_777_216.0 } else { self }).to_bits().wrapping_add(0x004a_fb0d);
        let e = ((raw >> 23) as i32 - if small { 151 } else { 127 }) as f32;
        let m = f32::from_bits((raw & 0x7f_ffff) + 0x3f35_04f3);
        let ln = e * 0.693_359_4 + (twice_artanh((m - 1.0) / (m + 1.0)) - e * 2.121_944_4e-4);
        let edge = if self == 0.0 {
            f32::NEG_INFINITY
        } else if self > 0.0 {
            self
        } else {
            f32::NAN
        };
        if self > 0.0 && self < f32::INFINITY { ln } else { edge }
    }
    #[inline(always)]
    fn ln_1p_map(self) -> f32 {
        let near = twice_artanh(self / (2.0 + self));
        if self > -0.5 && self < 0.7 { near } else { (1.0 + self).ln_map() }
    }
    #[inline(always)]
    fn tanh_map(self) -> f32 {
        let near = self * horner(&TANH, self * self);
        let far = 1.0 - 2.0 / ((2.0 * self.abs()).exp_map() + 1.0);
        let far = if self < 0.0 { -far } else { far };
        if self.abs() < 0.625 { near } else { far }
    }
    #[inline(always)]
    fn phi_map(self) -> f32 {
        let z = (self.abs() * std::f32::consts::FRAC_1_SQRT_2).min(9.7);
        let t = 1.0 / (1.0 + 0.5 * z);
        let tail = 0.5 * t * horner(&ERFC, t) * (-z * z).exp_map();
        if self > 0.0 { 1.0 - tail } else { tail }
    }
    #[inline(always)]
    fn power_map(self, p: f32) -> f32 {
        self.powf(p)
    }
}

#[inline(always)]
fn sigmoid<R: Maths>(x: R) -> R {
    R::ONE / (R::ONE + (-x).exp_map())
}

#[inline(always)]
fn select<R: Real>(yes: bool, x: R) -> R {
    if yes { x } else { R::ZERO }
}

#[inline(always)]
fn sign<R: Real>(x: R) -> R {
    select(x > R::ZERO, R::ONE) - select(x < R::ZERO, R::ONE)
}

#[inline(always)]
fn is_nan<R: Real>(x: R) -> bool {
    x.partial_cmp(&x).is_none()
}

/// A function over slices of equal length, as a loop in its caller: a closure would be a call that no vector loop survives.
macro_rules! each {
    ($out:ident, $xs:ident, |$x:ident| $f:expr) => {
        for (out, &$x) in $out.iter_mut().zip($xs) {
            let v = $f;
            *out = if is_nan($x) { $x } else { v };
        }
    };
    ($out:ident, $xs:ident, $gs:ident, |$x:ident, $g:ident| $f:expr) => {
        for ((out, &$x), &$g) in $out.iter_mut().zip($xs).zip($gs) {
            let v = $f;
            *out = if is_nan($x) | is_nan($g) { $x + $g } else { v };
        }
    };
    ($out:ident, $xs:ident, $ys:ident, $gs:ident, |$x:ident, $y:ident, $g:ident| $f:expr) => {
        for (((out, &$x), &$y), &$g) in $out.iter_mut().zip($xs).zip($ys).zip($gs) {
            let v = $f;
            *out = if is_nan($x) | is_nan($y) | is_nan($g) { $x + $y + $g } else { v };
        }
    };
}

#[inline(always)]
fn apply<R: Maths>(code: u32, p: R, q: R, a: &[R], b: &[R], c: &[R], y: &mut [R]) {
    // bell = 1/√2π.
    let (zero, one, two, bell) = (R::ZERO, R::ONE, R::of(2.0), R::of(0.398_942_280_401_432_7));
    match code {
        code::COPY => y.copy_from_slice(a),
        code::NEG => each!(y, a, |x| -x),
        code::EXP => each!(y, a, |x| x.exp_map()),
        code::LOG => each!(y, a, |x| x.ln_map()),
        code::LOG1P => each!(y, a, |x| x.ln_1p_map()),
        code::SQRT => each!(y, a, |x| x.sqrt()),
        code::SQUARE => each!(y, a, |x| x * x),
        code::ABS => each!(y, a, |x| x.abs()),
        code::SIGN => each!(y, a, |x| sign(x)),
        code::RECIPROCAL => each!(y, a, |x| one / x),
        code::RELU => each!(y, a, |x| if x > zero { x } else { zero }),
        code::GELU => each!(y, a, |x| x * x.phi_map()),
        code::TANH => each!(y, a, |x| x.tanh_map()),
        code::SIGMOID => each!(y, a, |x| sigmoid(x)),
        code::SILU => each!(y, a, |x| x * sigmoid(x)),
        code::SOFTPLUS => each!(y, a, |x| if x > zero { x } else { zero } + (if x > zero { -x } else { x }).exp_map().ln_1p_map()),
        code::CLAMP => each!(y, a, |x| {
            if x < p {
                p
            } else if x > q {
                q
            } else {
                x
            }
        }),
        code::AFFINE => each!(y, a, |x| p * x + q),
        code::POWER => each!(y, a, |x| x.power_map(p)),
        code::STEP => each!(y, a, |x| select(x > zero, one)),
        code::SHARE => each!(y, a, |x| x / (p + q)),
        code::LOG_D => each!(y, a, b, |x, g| g / x),
        code::LOG1P_D => each!(y, a, b, |x, g| g / (one + x)),
        code::SQRT_D => each!(y, a, b, |y, g| g / (two * y)),
        code::SQUARE_D => each!(y, a, b, |x, g| two * x * g),
        code::ABS_D => each!(y, a, b, |x, g| sign(x) * g),
        code::RECIPROCAL_D => each!(y, a, b, |y, g| -(g * y * y)),
        code::RELU_D => each!(y, a, b, |y, g| select(y > zero, g)),
        code::GELU_D => each!(y, a, b, |x, g| g * (x.phi_map() + x * bell * (-(x * x) / two).exp_map())),
        code::TANH_D => each!(y, a, b, |y, g| g * (one - y * y)),
        code::SIGMOID_D => each!(y, a, b, |y, g| g * y * (one - y)),
        code::SILU_D => each!(y, a, b, |x, g| g * sigmoid(x) * (one + x * sigmoid(-x))),
        code::SOFTPLUS_D => each!(y, a, b, |x, g| g * sigmoid(x)),
        code::CLAMP_D => each!(y, a, b, |x, g| select((x >= p) & (x <= q), g)),
        code::POWER_D => each!(y, a, b, |x, g| if p == zero { zero } else { g * p * x.power_map(p - one) }),
        code::ADD => each!(y, a, b, |a, b| a + b),
        code::SUB => each!(y, a, b, |a, b| a - b),
        code::MUL => each!(y, a, b, |a, b| a * b),
        code::DIV => each!(y, a, b, |a, b| a / b),
        code::MIN => each!(y, a, b, |a, b| if b < a { b } else { a }),
        code::MAX => each!(y, a, b, |a, b| if b > a { b } else { a }),
        code::GLU => each!(y, a, b, |a, b| a * sigmoid(b)),
        code::REST => each!(y, a, b, |a, b| a * (one - b)),
        code::DIV_B => each!(y, a, b, c, |a, b, g| -(g * (a / b) / b)),
        code::MIN_A => each!(y, a, b, c, |a, b, g| select(a <= b, g)),
        code::MIN_B => each!(y, a, b, c, |a, b, g| select(b < a, g)),
        code::MAX_A => each!(y, a, b, c, |a, b, g| select(a >= b, g)),
        code::MAX_B => each!(y, a, b, c, |a, b, g| select(b > a, g)),
        code::GLU_B => each!(y, a, b, c, |a, b, g| g * a * sigmoid(b) * sigmoid(-b)),
        code::MIX => each!(y, a, b, c, |a, b, g| a * g + b * (one - g)),
        _ => each!(y, a, b, c, |a, b, g| g * (a - b)),
    }
}

/// Elements that one task takes at least.
const GRAIN: usize = 16 << 10;
/// Elements that are brought into a row before a function runs over them.
const BLOCK: usize = 256;

/// Rows of a, b, c that do not lie side by side, and of results that will not.
struct Memory<R>([[R; BLOCK]; 4]);

impl<R: Real> Memory<R> {
    fn new() -> Box<Memory<R>> {
        Box::new(Memory([[R::ZERO; BLOCK]; 4]))
    }
}

struct Map<'a, R> {
    arch: Arch,
    p: MapParams,
    /// Size and strides of a, b, c, y, innermost first.
    axes: [[usize; 5]; RANK],
    operands: [&'a [R]; 3],
}

fn map_cpu<R: Maths>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: MapParams = launch.params()?;
    let operands = [launch.real()?, launch.real()?, launch.real()?];
    let y = launch.real_mut()?;
    let words: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(&p));
    let axes = std::array::from_fn(|d| std::array::from_fn(|i| words[11 + 5 * d + i] as usize));
    let map = Map { arch: Arch::new(), p, axes, operands };
    map.level(p.rank as usize - 1, [p.a_at, p.b_at, p.c_at].map(|at| at as usize), &mut y[p.y_at as usize..], &mut Memory::new());
    Ok(())
}

/// Rows and columns of a tile of a transpose.
const TILE: usize = 16;
/// Rows shorter than this are brought together.
const SHORT: usize = 64;

impl<R: Maths> Map<'_, R> {
    /// The elements of dimension `d` and inside; `y` starts at the first of them.
    fn level(&self, d: usize, at: [usize; 3], y: &mut [R], memory: &mut Memory<R>) {
        let [n, _, _, _, step] = self.axes[d];
        if d == 0 {
            return self.line(at, y, memory);
        }
        let inner: usize = self.axes[..d].iter().map(|a| a[0]).product();
        let run = if d == 1 { self.rows_together().max(1) } else { 1 };
        if n * inner <= GRAIN || n <= run {
            return self.rows(d, at, n, y, memory);
        }
        // Runs of rows, each to one task.
        let run = run.max((GRAIN / inner).min(n));
        y.par_chunks_mut(step * run).take(n.div_ceil(run)).enumerate().for_each_init(Memory::new, |memory, (i, y)| {
            self.rows(d, self.moved(d, at, i * run), run.min(n - i * run), y, memory);
        });
    }

    /// `n` items of dimension `d`.
    fn rows(&self, d: usize, at: [usize; 3], n: usize, y: &mut [R], memory: &mut Memory<R>) {
        let step = self.axes[d][4];
        if d == 1 && self.transposes() {
            return self.transpose(at, n, y);
        }
        let run = if d == 1 { self.rows_together() } else { 0 };
        if run > 1 {
            return self.arch.dispatch(
                #[inline(always)]
                || self.short_rows(run, at, n, y, memory),
            );
        }
        y.chunks_mut(step).take(n).enumerate().for_each(|(i, y)| self.level(d - 1, self.moved(d, at, i), y, memory));
    }

    fn moved(&self, d: usize, at: [usize; 3], i: usize) -> [usize; 3] {
        std::array::from_fn(|k| at[k] + i * self.axes[d][1 + k])
    }

    /// Whether this is a copy whose source runs along dimension 1.
    fn transposes(&self) -> bool {
        self.p.code == code::COPY && self.p.add == 0 && self.axes[0][4] == 1 && self.axes[0][1] > 1 && self.axes[1][1] == 1
    }

    /// Tile by tile, so that each line of the cache is read once.
    fn transpose(&self, at: [usize; 3], n: usize, y: &mut [R]) {
        let ([columns, step, ..], row) = (self.axes[0], self.axes[1][4]);
        let x = &self.operands[0][at[0]..];
        for (tile, y) in y.chunks_mut(row * TILE).take(n.div_ceil(TILE)).enumerate() {
            let rows = TILE.min(n - tile * TILE);
            for first in (0..columns).step_by(TILE) {
                let width = TILE.min(columns - first);
                let mut block = [[R::ZERO; TILE]; TILE];
                for (j, block) in block.iter_mut().enumerate().take(width) {
                    block[..rows].copy_from_slice(&x[tile * TILE + (first + j) * step..][..rows]);
                }
                for (i, y) in y.chunks_mut(row).take(rows).enumerate() {
                    for (j, y) in y[first..first + width].iter_mut().enumerate() {
                        *y = block[j][i];
                    }
                }
            }
        }
    }

    /// How many short rows of dimension 0 make a block, 0 where they are not short or y leaves gaps.
    fn rows_together(&self) -> usize {
        let [n, _, _, _, step] = self.axes[0];
        if n < SHORT && step == 1 && self.axes[1][4] == n && !self.transposes() { BLOCK / n } else { 0 }
    }

    /// Rows that lie side by side in y, `run` at a time.
    #[inline(always)]
    fn short_rows(&self, run: usize, at: [usize; 3], n: usize, y: &mut [R], memory: &mut Memory<R>) {
        let width = self.axes[0][0];
        for (i, y) in y[..n * width].chunks_mut(run * width).enumerate() {
            let from = self.moved(1, at, i * run);
            let Memory([a, b, c, out]) = memory;
            let len = y.len();
            self.gather(0, from[0], &mut a[..len]);
            if self.p.arity > 1 {
                self.gather(1, from[1], &mut b[..len]);
            }
            if self.p.arity > 2 {
                self.gather(2, from[2], &mut c[..len]);
            }
            self.function([&a[..len], &b[..len], &c[..len]], 1, y, out);
        }
    }

    #[inline(always)]
    fn gather(&self, k: usize, at: usize, memory: &mut [R]) {
        let ([width, ..], step, row) = (self.axes[0], self.axes[0][1 + k], self.axes[1][1 + k]);
        let x = &self.operands[k][at..];
        for (i, memory) in memory.chunks_mut(width).enumerate() {
            match step {
                0 => memory.fill(x[i * row]),
                1 => memory.iter_mut().zip(&x[i * row..i * row + width]).for_each(|(m, &v)| *m = v),
                _ => memory.iter_mut().zip(x[i * row..].iter().step_by(step)).for_each(|(m, &v)| *m = v),
            }
        }
    }

    /// The innermost dimension.
    fn line(&self, at: [usize; 3], y: &mut [R], memory: &mut Memory<R>) {
        let [n, _, _, _, step] = self.axes[0];
        let step = step.max(1);
        let y = &mut y[..(n - 1) * step + 1];
        if n <= GRAIN {
            return self.arch.dispatch(
                #[inline(always)]
                || self.segment(at, y, memory),
            );
        }
        y.par_chunks_mut(GRAIN * step).enumerate().for_each_init(Memory::new, |memory, (i, y)| {
            self.arch.dispatch(
                #[inline(always)]
                || self.segment(self.moved(0, at, i * GRAIN), y, memory),
            );
        });
    }

    #[inline(always)]
    fn segment(&self, at: [usize; 3], y: &mut [R], memory: &mut Memory<R>) {
        let [_, a_step, b_step, c_step, step] = self.axes[0];
        let step = step.max(1);
        for (i, y) in y.chunks_mut(BLOCK * step).enumerate() {
            let Memory([buf_a, buf_b, buf_c, out]) = memory;
            let n = y.len().div_ceil(step);
            let from = self.moved(0, at, i * BLOCK);
            let a = staged(self.operands[0], from[0], a_step, n, buf_a);
            let b = if self.p.arity > 1 { staged(self.operands[1], from[1], b_step, n, buf_b) } else { a };
            let c = if self.p.arity > 2 { staged(self.operands[2], from[2], c_step, n, buf_c) } else { a };
            self.function([a, b, c], step, y, out);
        }
    }

    /// The function over slices of equal length, to every `step`-th element of y.
    #[inline(always)]
    fn function(&self, [a, b, c]: [&[R]; 3], step: usize, y: &mut [R], out: &mut [R; BLOCK]) {
        let (p, q) = (R::of(f64::from(self.p.p)), R::of(f64::from(self.p.q)));
        if step == 1 && self.p.add == 0 {
            return apply(self.p.code, p, q, a, b, c, y);
        }
        let out = &mut out[..a.len()];
        apply(self.p.code, p, q, a, b, c, out);
        for (y, &v) in y.iter_mut().step_by(step).zip(out.iter()) {
            *y = if self.p.add == 1 { *y + v } else { v };
        }
    }
}

/// n elements as a slice: in place where they lie side by side, else gathered.
#[inline(always)]
fn staged<'a, R: Real>(x: &'a [R], at: usize, step: usize, n: usize, memory: &'a mut [R; BLOCK]) -> &'a [R] {
    match step {
        1 => return &x[at..at + n],
        0 => memory[..n].fill(x[at]),
        _ => memory[..n].iter_mut().zip(x[at..].iter().step_by(step)).for_each(|(m, &v)| *m = v),
    }
    &memory[..n]
}

fn fill_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: FillParams = launch.params()?;
    let value = R::of(f64::from(p.value));
    launch.real_mut()?.par_chunks_mut(GRAIN).for_each(|y| y.fill(value));
    Ok(())
}

/// Counters that run side by side.
const LANES: usize = 16;

/// The words of LANES counters in a row, word by word.
#[inline(always)]
fn philox_lanes(first: u64, stream: u32, step: u32, mut k: [u32; 2]) -> [[u32; LANES]; 4] {
    let mut c = [[0; LANES], [0; LANES], [stream; LANES], [step; LANES]];
    for l in 0..LANES {
        let block = first + l as u64;
        (c[0][l], c[1][l]) = (block as u32, (block >> 32) as u32);
    }
    for _ in 0..10 {
        for l in 0..LANES {
            let (a, b) = (u64::from(c[0][l]) * 0xD251_1F53, u64::from(c[2][l]) * 0xCD9E_8D57);
            (c[0][l], c[1][l], c[2][l], c[3][l]) = ((b >> 32) as u32 ^ c[1][l] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3][l] ^ k[1], a as u32);
        }
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

fn dropout_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: DropoutParams = launch.params()?;
    let (x, step, y) = (launch.real()?, launch.word()?[0], launch.real_mut()?);
    let scale = if p.p < 1.0 { R::ONE / (R::ONE - R::of(f64::from(p.p))) } else { R::ZERO };
    let first = u64::from(p.block) | u64::from(p.block_high) << 32;
    let arch = Arch::new();
    y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).enumerate().for_each(|(i, (y, x))| {
        arch.dispatch(
            #[inline(always)]
            || {
                for (j, (y, x)) in y.chunks_mut(4 * LANES).zip(x.chunks(4 * LANES)).enumerate() {
                    let words = philox_lanes(first + (i * GRAIN / 4 + j * LANES) as u64, p.stream, step, [p.seed, p.seed_high]);
                    let mut keep = [R::ZERO; 4 * LANES];
                    for (at, keep) in keep.iter_mut().enumerate() {
                        *keep = select(words[at % 4][at / 4] >= p.threshold, scale);
                    }
                    for ((y, &x), &keep) in y.iter_mut().zip(x).zip(&keep) {
                        *y = if keep > R::ZERO { x * keep } else { R::ZERO };
                    }
                }
            },
        );
    });
    Ok(())
}
