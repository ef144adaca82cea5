//! Sums, means and maxima over a set of axes, and gradients of broadcast operands.
//!
//! sum   y[k] = Σ_r x[k,r];   mean  y[k] = Σ_r x[k,r]/R;   max  y[k] = max_r x[k,r], index[k] the lowest r that reaches it.
//! k runs over the axes that stay, r over those that are reduced, both in row-major order.
//!
//! Shapes   x row-major, rank ≤ 6, any axes; y the axes that stay (all axes reduced: one number). R = 0 gives sum 0; mean and max refuse it.
//! Backward sum and mean: [`map::broadcast`]. max: grad_x is grad_y at index, else 0. [`binary_backward`] sums a derivative to the shape
//!          of a broadcast operand.
//! Launch   axes are merged into at most three that stay and three that go. `lanes` threads share an output, by the length R alone: where the last axis is
//!          reduced, neighbouring threads read neighbouring elements of one output; else those of neighbouring outputs.
//!          Longer than PART, R is cut into parts: one group per (outputs, part), then the parts are summed by the same kernel.
//! Scratch  parts·K reals where R is cut, else none.     Floor 4 bytes per element of x.
//! Numerics per thread sums of 32 in a row, then their sum; then a tree over the lanes; then parts. The order depends on the axes and R alone: the
//!          batch may be split in any way. max: a NaN wins (the first of them), as its gradient would be lost otherwise; −0 equals 0.
//! Source   Higham 1993, SIAM J. Sci. Comput. 14(4) for blocked sums.
//! Files    shaders/reduce.wgsl · cuda/reduce.cu · reference: the `_cpu` functions

use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::map::{self, Binary, Dims, Gradient, RANK, Side, binary_gradient, bind, binding_elements, check_len, elements};
use crate::real::Real;
use crate::{Error, Result};
use pulp::Arch;
use rayon::prelude::*;

/// Threads per workgroup.
const WG: u32 = 256;
/// Elements of an output that one part holds where the last axis is reduced …
const PART_ALONG: u64 = 4096;
/// … and where it stays.
const PART_ACROSS: u64 = 1024;

/// Elements from the first to the last of a part, about.
const FAR: u64 = 1 << 23;

params! {
    /// Params of [`REDUCE`] and [`REDUCE_MAX`]: axes innermost first.
    pub struct ReduceParams {
        /// Outputs.
        kept: u32,
        /// Elements per output.
        reduced: u32,
        /// Parts of this launch.
        parts: u32,
        /// Elements per part.
        part: u32,
        /// Threads per output.
        lanes: u32,
        /// 1 if neighbouring threads share an output.
        along: u32,
        /// Divisor of the sum …
        divisor: u32,
        /// … and factor.
        factor: f32,
        /// First element of x.
        x_at: u32,
        /// First element of y; y is [parts,kept].
        y_at: u32,
        /// Size of axis 0 that stays.
        kn0: u32,
        /// Its stride.
        ks0: u32,
        /// Size of axis 1 that stays.
        kn1: u32,
        /// Its stride.
        ks1: u32,
        /// Stride of axis 2 that stays.
        ks2: u32,
        /// Size of axis 0 that goes.
        rn0: u32,
        /// Its stride.
        rs0: u32,
        /// Size of axis 1 that goes.
        rn1: u32,
        /// Its stride.
        rs1: u32,
        /// Stride of axis 2 that goes.
        rs2: u32,
    }
}

params! {
    /// Params of [`REDUCE_MAX_BACKWARD`]: axes innermost first; each has a stride in the outputs or in the reduced index.
    pub struct ReduceSpreadParams {
        /// Elements of grad_x.
        count: u32,
        /// First output.
        k_at: u32,
        /// First reduced index.
        r_at: u32,
        /// First element of grad_x.
        x_at: u32,
        /// Size of axis 0.
        n0: u32,
        /// Its stride in the outputs.
        k0: u32,
        /// Its stride in the reduced index.
        r0: u32,
        /// Size of axis 1.
        n1: u32,
        /// Its stride in the outputs.
        k1: u32,
        /// Its stride in the reduced index.
        r1: u32,
        /// Size of axis 2.
        n2: u32,
        /// Its stride in the outputs.
        k2: u32,
        /// Its stride in the reduced index.
        r2: u32,
        /// Size of axis 3.
        n3: u32,
        /// Its stride in the outputs.
        k3: u32,
        /// Its stride in the reduced index.
        r3: u32,
        /// Size of axis 4.
        n4: u32,
        /// Its stride in the outputs.
        k4: u32,
        /// Its stride in the reduced index.
        r4: u32,
        /// Size of axis 5.
        n5: u32,
        /// Its stride in the outputs.
        k5: u32,
        /// Its stride in the reduced index.
        r5: u32,
    }
}

fn reduce_params(words: &[u32]) -> ReduceParams {
    params_of(words).unwrap_or_else(bytemuck::Zeroable::zeroed)
}

fn groups(words: &[u32]) -> u64 {
    let p = reduce_params(words);
    u64::from(p.kept).div_ceil(u64::from(WG / p.lanes.max(1))) * u64::from(p.parts)
}

fn elements_read(words: &[u32]) -> u64 {
    u64::from(reduce_params(words).kept) * u64::from(reduce_params(words).reduced)
}

fn spread_count(words: &[u32]) -> u64 {
    params_of::<ReduceSpreadParams>(words).map_or(0, |p| u64::from(p.count))
}

/// Sums over some axes.
pub static REDUCE: Kernel = Kernel {
    name: "reduce",
    about: "sums and means over axes, in a fixed order",
    args: &[reads("x"), writes("y")],
    params: layout::<ReduceParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("reduce"),
    cuda: cuda!("reduce"),
    cpu: Some(Cpu { f32: reduce_cpu::<f32>, f64: reduce_cpu::<f64> }),
    cost: Cost { unit: "element", units: elements_read, bytes: 4.0, flops: 1.0 },
};

/// Maxima over some axes.
pub static REDUCE_MAX: Kernel = Kernel {
    name: "reduce_max",
    about: "maxima over axes and where they are",
    args: &[reads("x"), writes("y"), writes_u32("index")],
    params: layout::<ReduceParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("reduce"),
    cuda: cuda!("reduce"),
    cpu: Some(Cpu { f32: reduce_max_cpu::<f32>, f64: reduce_max_cpu::<f64> }),
    cost: Cost { unit: "element", units: elements_read, bytes: 4.0, flops: 2.0 },
};

/// Gradient of a maximum.
pub static REDUCE_MAX_BACKWARD: Kernel = Kernel {
    name: "reduce_max_backward",
    about: "gradient of maxima over axes",
    args: &[reads("grad_y"), reads_u32("index"), writes("grad_x")],
    params: layout::<ReduceSpreadParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| spread_count(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("reduce"),
    cuda: cuda!("reduce"),
    cpu: Some(Cpu { f32: reduce_max_backward_cpu::<f32>, f64: reduce_max_backward_cpu::<f64> }),
    cost: Cost { unit: "element", units: spread_count, bytes: 12.0, flops: 1.0 },
};

// ---- shapes -----------------------------------------------------------------------------------------------------------

/// A reduction of a row-major tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reduce {
    /// Shape of x.
    pub dims: Dims,
    /// Which axes go.
    pub reduced: [bool; RANK],
}

/// One merged axis.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Axis {
    n: u64,
    stride: u64,
    reduced: bool,
}

impl Reduce {
    /// From any shape and the numbers of the axes that go.
    /// # Errors
    /// `Shape` for more than [`RANK`] dimensions or an axis that the shape lacks.
    pub fn over(shape: &[u64], axes: &[usize]) -> Result<Reduce> {
        let dims = map::dims(shape)?;
        let mut reduced = [false; RANK];
        for &axis in axes {
            if axis >= shape.len() {
                return Err(Error::Shape { op: "reduce", arg: "axes".into(), expected: format!("axes below {}", shape.len()), got: format!("{axes:?}") });
            }
            reduced[RANK - shape.len() + axis] = true;
        }
        Ok(Reduce { dims, reduced })
    }

    /// The reduction that sums a tensor of shape `from` to the shape `to` that was broadcast to it.
    /// # Errors
    /// `Shape` if `to` does not broadcast to `from`.
    pub fn to_shape(from: &Dims, to: &Dims) -> Result<Reduce> {
        map::Layout::broadcast("reduce", to, from)?;
        Ok(Reduce { dims: *from, reduced: std::array::from_fn(|d| to[d] != from[d]) })
    }

    /// Outputs.
    pub fn kept(&self) -> u64 {
        elements(&std::array::from_fn(|d| if self.reduced[d] { 1 } else { self.dims[d] }))
    }

    /// Elements per output.
    pub fn length(&self) -> u64 {
        elements(&std::array::from_fn(|d| if self.reduced[d] { self.dims[d] } else { 1 }))
    }

    /// Shape of y with the reduced axes as ones.
    pub fn out(&self) -> Dims {
        std::array::from_fn(|d| if self.reduced[d] { 1 } else { self.dims[d] })
    }

    /// Axes, outermost first, merged where neighbours go the same way.
    fn axes(&self) -> Vec<Axis> {
        let strides = map::row_major(&self.dims);
        let mut axes: Vec<Axis> = Vec::with_capacity(RANK);
        for d in (0..RANK).filter(|&d| self.dims[d] != 1) {
            match axes.last_mut() {
                Some(outer) if outer.reduced == self.reduced[d] => *outer = Axis { n: outer.n * self.dims[d], stride: strides[d], ..*outer },
                _ => axes.push(Axis { n: self.dims[d], stride: strides[d], reduced: self.reduced[d] }),
            }
        }
        axes
    }

    /// Whether the last axis goes.
    fn along(&self) -> bool {
        self.axes().last().is_none_or(|a| a.reduced)
    }

    fn part(&self) -> u64 {
        if self.along() {
            return PART_ALONG;
        }
        // Far-apart elements make shorter parts, so that a part of a wide table fits a binding.
        let stride = self.axes().iter().rev().find(|a| a.reduced).map_or(1, |a| a.stride);
        (FAR / stride.max(1)).clamp(32, PART_ACROSS)
    }

    fn parts(&self) -> u64 {
        self.length().div_ceil(self.part()).max(1)
    }

    /// Reals of scratch that sums and means need.
    pub fn scratch(&self) -> u64 {
        if self.parts() > 1 { self.parts().saturating_mul(self.kept()) } else { 0 }
    }

    /// # Errors
    /// `TooLarge` for a length that no index holds.
    pub fn check(&self) -> Result<()> {
        if self.length() < 1 << 31 {
            return Ok(());
        }
        let what = "reduce: elements per output".into();
        Err(Error::TooLarge { what, needed: self.length(), limit: (1 << 31) - 1, unit: "elements", help: "reduce one axis at a time".into() })
    }
}

/// Threads that share an output: by its length and the way it lies.
fn lanes(length: u64, along: bool) -> u32 {
    let wanted = if along { length.div_ceil(4) } else { length.div_ceil(32) };
    (wanted.max(1).next_power_of_two() as u32).min(if along { WG } else { 16 })
}

// ---- recording --------------------------------------------------------------------------------------------------------

/// What a launch reduces.
#[derive(Clone)]
struct Piece {
    kept: Vec<Axis>,
    reduced: Vec<Axis>,
    x_at: u64,
    y_at: u64,
}

fn product(axes: &[Axis]) -> u64 {
    axes.iter().map(|a| a.n).product()
}

fn reach(axes: &[Axis]) -> u64 {
    axes.iter().map(|a| (a.n - 1) * a.stride).sum()
}

impl Piece {
    fn new(op: &Reduce) -> Piece {
        let (reduced, kept): (Vec<Axis>, Vec<Axis>) = op.axes().into_iter().partition(|a| a.reduced);
        Piece { kept, reduced, x_at: 0, y_at: 0 }
    }

    /// The range of x from a first to a last reduced index, over all outputs.
    fn span(&self, from: u64, to: u64) -> (u64, u64) {
        match self.reduced.as_slice() {
            [only] => (self.x_at + from * only.stride, reach(&self.kept) + (to - from - 1) * only.stride + 1),
            axes => (self.x_at, reach(&self.kept) + reach(axes) + 1),
        }
    }

    /// Two halves along the outermost axis that stays.
    fn halves(&self) -> Option<[Piece; 2]> {
        let cut = self.kept.iter().position(|a| a.n > 1)?;
        let half = self.kept[cut].n / 2;
        let (mut low, mut high) = (self.clone(), self.clone());
        low.kept[cut].n = half;
        high.kept[cut].n -= half;
        high.x_at += half * self.kept[cut].stride;
        high.y_at += half * product(&self.kept[cut + 1..]);
        Some([low, high])
    }

    fn params(&self, along: bool, length: u64, part: u64, parts: u64) -> ReduceParams {
        let axis = |axes: &[Axis], d: usize| axes.iter().rev().nth(d).map_or((1, 0), |a| (a.n as u32, a.stride as u32));
        let (k0, k1, k2) = (axis(&self.kept, 0), axis(&self.kept, 1), axis(&self.kept, 2));
        let (r0, r1, r2) = (axis(&self.reduced, 0), axis(&self.reduced, 1), axis(&self.reduced, 2));
        ReduceParams {
            kept: product(&self.kept) as u32,
            reduced: length as u32,
            parts: parts as u32,
            part: part as u32,
            lanes: lanes(length, along),
            along: u32::from(along),
            divisor: 1,
            factor: 1.0,
            x_at: 0,
            y_at: 0,
            kn0: k0.0,
            ks0: k0.1,
            kn1: k1.0,
            ks1: k1.1,
            ks2: k2.1,
            rn0: r0.0,
            rs0: r0.1,
            rn1: r1.0,
            rs1: r1.1,
            rs2: r2.1,
        }
    }
}

/// Most outputs × parts and elements that one launch takes.
fn fits(device: &Device, kept: u64, parts: u64, lanes: u32, length: u64) -> bool {
    let groups = kept.div_ceil(u64::from(WG / lanes)).saturating_mul(parts);
    let work = kept.saturating_mul(length).saturating_mul(4);
    groups <= device.limits().groups() && kept < 1 << 31 && (work <= device.limits().work_per_launch || kept * parts == 1)
}

fn too_wide(device: &Device, op: &'static str, needed: u64) -> Error {
    let help = "reduce one axis at a time, the outermost last".into();
    Error::TooLarge { what: format!("{op}: one output"), needed: 4 * needed, limit: 4 * binding_elements(device), unit: "B", help }
}

/// Records y = factor·Σ/divisor.
fn sum(pass: &mut Pass, name: &'static str, op: &Reduce, divisor: u64, factor: f32, x: &View, y: &View, scratch: Option<&View>) -> Result<()> {
    op.check()?;
    check_len(name, "x", x, elements(&op.dims))?;
    check_len(name, "y", y, op.kept())?;
    if op.kept() == 0 {
        return Ok(());
    }
    if op.length() == 0 {
        return map::fill(pass, 0.0, y);
    }
    let scratch = match (op.scratch(), scratch) {
        (0, _) => None,
        (needed, Some(scratch)) if scratch.len() >= needed => Some(scratch),
        (needed, got) => {
            let got = got.map_or("none".into(), |s| format!("{} elements", s.len()));
            return Err(Error::Shape { op: name, arg: "scratch".into(), expected: format!("at least {needed} elements (Reduce::scratch)"), got });
        }
    };
    let last = |p: ReduceParams| ReduceParams { divisor: divisor as u32, factor, ..p };
    let device = pass.device().clone();
    let mut pieces = vec![Piece::new(op)];
    while let Some(piece) = pieces.pop() {
        match parts_per_launch(&device, op, &piece) {
            Some(most) => match scratch {
                None => sum_whole(pass, op, &piece, x, y, last)?,
                Some(scratch) => sum_parts(pass, op, &piece, most, x, y, scratch, last)?,
            },
            None => {
                let (_, needed) = piece.span(0, op.length());
                pieces.extend(piece.halves().ok_or_else(|| too_wide(&device, name, needed))?.into_iter().rev());
            }
        }
    }
    Ok(())
}

/// How many parts of a piece one launch can take; `None` if the piece must be cut first.
fn parts_per_launch(device: &Device, op: &Reduce, piece: &Piece) -> Option<u64> {
    let (kept, parts, limit) = (product(&piece.kept), op.parts(), binding_elements(device).saturating_sub(device.limits().align));
    if kept > limit || (parts > 1 && kept.saturating_mul(parts) > limit) {
        return None;
    }
    let mut most = parts;
    loop {
        let length = (most * op.part()).min(op.length());
        if piece.span(0, length).1 <= limit && fits(device, kept, most, lanes(op.length().min(op.part()), op.along()), length) {
            return Some(most);
        }
        if most == 1 || piece.reduced.len() > 1 {
            return None;
        }
        most = most.div_ceil(2);
    }
}

fn sum_whole(pass: &mut Pass, op: &Reduce, piece: &Piece, x: &View, y: &View, last: impl Fn(ReduceParams) -> ReduceParams) -> Result<()> {
    let (at, span) = piece.span(0, op.length());
    let device = pass.device().clone();
    let ((x, x_at), (y, y_at)) = (bind(&device, x, at, span), bind(&device, y, piece.y_at, product(&piece.kept)));
    let params = last(piece.params(op.along(), op.length(), op.length(), 1));
    pass.launch(&REDUCE, &ReduceParams { x_at, y_at, ..params }, &[x, y])
}

fn sum_parts(
    pass: &mut Pass,
    op: &Reduce,
    piece: &Piece,
    most: u64,
    x: &View,
    y: &View,
    scratch: &View,
    last: impl Fn(ReduceParams) -> ReduceParams,
) -> Result<()> {
    let (kept, parts, part) = (product(&piece.kept), op.parts(), op.part());
    let device = pass.device().clone();
    for first in (0..parts).step_by(most as usize) {
        let end = (first + most).min(parts);
        let (from, to) = (first * part, (end * part).min(op.length()));
        let (at, span) = piece.span(from, to);
        let ((x, x_at), (sums, y_at)) = (bind(&device, x, at, span), bind(&device, scratch, first * kept, (end - first) * kept));
        // The lanes are those of a full part, whatever is left for the last.
        let params = ReduceParams { lanes: lanes(part, op.along()), ..piece.params(op.along(), to - from, part, end - first) };
        pass.launch(&REDUCE, &ReduceParams { x_at, y_at, ..params }, &[x, sums])?;
    }
    let stage = |n, stride| if n == 1 { vec![] } else { vec![Axis { n, stride, reduced: false }] };
    let second = Piece { kept: stage(kept, 1), reduced: stage(parts, kept), x_at: 0, y_at: piece.y_at };
    let (y, y_at) = bind(&device, y, piece.y_at, kept);
    // Lanes as for one output, so that the number of outputs moves no bit.
    let params = ReduceParams { lanes: lanes(parts, true), y_at, ..second.params(kept == 1, parts, parts, 1) };
    device.check_rounds("reduce", 2 * parts.div_ceil(u64::from(params.lanes)) + 64, "rounds")?;
    pass.launch(&REDUCE, &last(params), &[scratch.part(0..kept * parts), y])
}

/// Records y = Σ x over the axes that go; `scratch` holds [`Reduce::scratch`] reals.
/// # Errors
/// `Shape` for other lengths; `TooLarge` if one output's elements lie too far apart for the device.
pub fn reduce_sum(pass: &mut Pass, op: &Reduce, x: &View, y: &View, scratch: Option<&View>) -> Result<()> {
    sum(pass, "reduce_sum", op, 1, 1.0, x, y, scratch)
}

/// Records y = mean of x over the axes that go; `scratch` as for [`reduce_sum`].
/// # Errors
/// As [`reduce_sum`]; `Shape` if there is nothing to average.
pub fn reduce_mean(pass: &mut Pass, op: &Reduce, x: &View, y: &View, scratch: Option<&View>) -> Result<()> {
    not_empty("reduce_mean", op)?;
    sum(pass, "reduce_mean", op, op.length(), 1.0, x, y, scratch)
}

fn not_empty(name: &'static str, op: &Reduce) -> Result<()> {
    if op.length() > 0 || op.kept() == 0 {
        return Ok(());
    }
    Err(Error::Shape { op: name, arg: "x".into(), expected: "at least one element per output".into(), got: format!("{:?}", op.dims) })
}

/// Records grad_x of [`reduce_sum`]: grad_y repeated.
/// # Errors
/// `Shape` for other lengths.
pub fn reduce_sum_backward(pass: &mut Pass, op: &Reduce, grad_y: &View, grad_x: &View) -> Result<()> {
    map::broadcast(pass, 1, &op.out(), &op.dims, grad_y, grad_x)
}

/// Records grad_x of [`reduce_mean`]: grad_y/R repeated.
/// # Errors
/// `Shape` for other lengths.
pub fn reduce_mean_backward(pass: &mut Pass, op: &Reduce, grad_y: &View, grad_x: &View) -> Result<()> {
    map::broadcast(pass, op.length().max(1), &op.out(), &op.dims, grad_y, grad_x)
}

/// Records y = max of x over the axes that go, and `index` (words), the lowest reduced index that reaches it.
/// # Errors
/// `Shape` for other lengths or nothing to choose from; `TooLarge` where one output does not fit a launch or a thread's loop.
pub fn reduce_max(pass: &mut Pass, op: &Reduce, x: &View, y: &View, index: &View) -> Result<()> {
    op.check()?;
    not_empty("reduce_max", op)?;
    check_len("reduce_max", "x", x, elements(&op.dims))?;
    check_len("reduce_max", "y", y, op.kept())?;
    check_len("reduce_max", "index", index, op.kept())?;
    if op.kept() == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    let threads = lanes(op.length(), op.along());
    device.check_rounds("reduce_max", op.length().div_ceil(u64::from(threads)) + 64, "rounds")?;
    let limit = binding_elements(&device).saturating_sub(device.limits().align);
    let mut pieces = vec![Piece::new(op)];
    while let Some(piece) = pieces.pop() {
        let (kept, (at, span)) = (product(&piece.kept), piece.span(0, op.length()));
        if span > limit || !fits(&device, kept, 1, threads, op.length()) {
            pieces.extend(piece.halves().ok_or_else(|| too_wide(&device, "reduce_max", span))?.into_iter().rev());
            continue;
        }
        let ((x, x_at), (y, y_at)) = (bind(&device, x, at, span), bind(&device, y, piece.y_at, kept));
        let (index, _) = bind(&device, index, piece.y_at, kept);
        let params = ReduceParams { x_at, y_at, ..piece.params(op.along(), op.length(), op.length(), 1) };
        pass.launch(&REDUCE_MAX, &params, &[x, y, index])?;
    }
    Ok(())
}

/// Records grad_x of [`reduce_max`] from its `index`.
/// # Errors
/// `Shape` for other lengths; `TooLarge` if the outputs do not fit a launch.
pub fn reduce_max_backward(pass: &mut Pass, op: &Reduce, index: &View, grad_y: &View, grad_x: &View) -> Result<()> {
    op.check()?;
    check_len("reduce_max_backward", "grad_y", grad_y, op.kept())?;
    check_len("reduce_max_backward", "index", index, op.kept())?;
    check_len("reduce_max_backward", "grad_x", grad_x, elements(&op.dims))?;
    if grad_x.len() == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    let mut axes = op.axes();
    if axes.is_empty() {
        axes.push(Axis { n: 1, stride: 1, reduced: true });
    }
    // Steps of each axis in the outputs and in the reduced index.
    let step = |d: usize, reduced: bool| -> u64 {
        if axes[d].reduced == reduced { axes[d + 1..].iter().filter(|a| a.reduced == reduced).map(|a| a.n).product() } else { 0 }
    };
    let steps: Vec<[u64; 2]> = (0..axes.len()).map(|d| [step(d, false), step(d, true)]).collect();
    let inner: u64 = axes[1..].iter().map(|a| a.n).product();
    let outputs = |n: u64| (n - 1) * steps[0][0] + (1..axes.len()).map(|d| (axes[d].n - 1) * steps[d][0]).sum::<u64>() + 1;
    let limit = binding_elements(&device).saturating_sub(device.limits().align);
    let fits = |n: u64| {
        let count = n.saturating_mul(inner);
        count.max(outputs(n)) <= limit && count.div_ceil(u64::from(WG)) <= device.limits().groups() && (n == 1 || 10 * count <= device.limits().work_per_launch)
    };
    let mut most = axes[0].n;
    while !fits(most) {
        if most == 1 {
            return Err(too_wide(&device, "reduce_max_backward", inner));
        }
        most = most.div_ceil(2);
    }
    for first in (0..axes[0].n).step_by(most as usize) {
        let n = most.min(axes[0].n - first);
        let (x, shift) = (first * inner, first * steps[0][0]);
        let (gx, x_at) = bind(&device, grad_x, x, n * inner);
        let ((gy, k_at), (at, _)) = (bind(&device, grad_y, shift, outputs(n)), bind(&device, index, shift, outputs(n)));
        let mut words = [0u32; 4 + 3 * RANK];
        words[..4].copy_from_slice(&[(n * inner) as u32, k_at, (first * steps[0][1]) as u32, x_at]);
        for (i, axis) in words[4..].chunks_exact_mut(3).enumerate() {
            let at = axes.len().checked_sub(i + 1);
            axis.copy_from_slice(&at.map_or([1, 0, 0], |d| [if d == 0 { n } else { axes[d].n } as u32, steps[d][0] as u32, steps[d][1] as u32]));
        }
        let params: ReduceSpreadParams = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words[..]));
        pass.launch(&REDUCE_MAX_BACKWARD, &params, &[gy, at, gx])?;
    }
    Ok(())
}

// ---- broadcast operands -----------------------------------------------------------------------------------------------

/// Scratch of [`binary_backward`], two views because a launch does not read and write one buffer.
#[derive(Debug, Clone, Copy, Default)]
pub struct BinaryScratch<'a> {
    /// [`Binary::scratch_full`] reals: a derivative before it is summed.
    pub full: Option<&'a View>,
    /// [`Binary::scratch_parts`] reals: the parts of a long sum.
    pub parts: Option<&'a View>,
}

impl Binary {
    fn operand(&self, side: Side) -> Dims {
        if side == Side::A { self.a } else { self.b }
    }

    fn sum_of(&self, side: Side) -> Result<Option<Reduce>> {
        let (dims, operand) = (self.dims()?, self.operand(side));
        if operand == dims { Ok(None) } else { Reduce::to_shape(&dims, &operand).map(Some) }
    }

    /// Reals that a derivative takes before it is summed; 0 where none is.
    /// # Errors
    /// As [`Binary::dims`].
    pub fn scratch_full(&self) -> Result<u64> {
        let mut full = 0;
        for side in [Side::A, Side::B] {
            if self.sum_of(side)?.is_some() && matches!(self.gradient(side), Gradient::Mapped) {
                full = elements(&self.dims()?);
            }
        }
        Ok(full)
    }

    /// Reals that the parts of the sums take.
    /// # Errors
    /// As [`Binary::dims`].
    pub fn scratch_parts(&self) -> Result<u64> {
        let parts = |side| Ok(self.sum_of(side)?.map_or(0, |sum| sum.scratch()));
        Ok(parts(Side::A)?.max(parts(Side::B)?))
    }
}

/// Records the gradients of [`map::binary`] that are given, each summed to the shape of its operand.
/// # Errors
/// `Shape` if a length is not that of its shape or scratch is missing.
pub fn binary_backward(
    pass: &mut Pass,
    op: &Binary,
    a: &View,
    b: &View,
    grad_y: &View,
    grad_a: Option<&View>,
    grad_b: Option<&View>,
    scratch: &BinaryScratch<'_>,
) -> Result<()> {
    let dims = op.dims()?;
    check_len("binary_backward", "a", a, elements(&op.a))?;
    check_len("binary_backward", "b", b, elements(&op.b))?;
    check_len("binary_backward", "grad_y", grad_y, elements(&dims))?;
    for (side, arg, grad) in [(Side::A, "grad_a", grad_a), (Side::B, "grad_b", grad_b)] {
        let Some(grad) = grad else { continue };
        check_len("binary_backward", arg, grad, elements(&op.operand(side)))?;
        match (op.sum_of(side)?, op.gradient(side)) {
            (None, _) => binary_gradient(pass, op, side, a, b, grad_y, grad)?,
            (Some(reduce), Gradient::Scaled(factor)) => sum(pass, "binary_backward", &reduce, 1, factor, grad_y, grad, scratch.parts)?,
            (Some(reduce), Gradient::Mapped) => {
                let full = scratch.full.filter(|full| full.len() >= elements(&dims)).ok_or_else(|| Error::Shape {
                    op: "binary_backward",
                    arg: "scratch.full".into(),
                    expected: format!("at least {} elements (Binary::scratch_full)", elements(&dims)),
                    got: scratch.full.map_or("none".into(), |s| format!("{}", s.len())),
                })?;
                let full = full.part(0..elements(&dims));
                binary_gradient(pass, op, side, a, b, grad_y, &full)?;
                sum(pass, "binary_backward", &reduce, 1, 1.0, &full, grad, scratch.parts)?;
            }
        }
    }
    Ok(())
}

// ---- CPU --------------------------------------------------------------------------------------------------------------

/// Values that are added in a row before they join a sum.
const BLOCK: usize = 32;
/// Elements that one task reads at least.
const GRAIN: usize = 16 << 10;
/// Outputs that lie side by side and are summed together.
const TILE: usize = 512;
/// Sums of one output that run side by side.
const SUMS: usize = 16;

struct Sums<'a, R> {
    arch: Arch,
    p: ReduceParams,
    x: &'a [R],
}

impl<R: Real> Sums<'_, R> {
    /// First element of output k.
    fn kept_at(&self, k: usize) -> usize {
        let (n0, n1) = (self.p.kn0 as usize, self.p.kn1 as usize);
        let (i0, rest) = (k % n0, k / n0);
        self.p.x_at as usize + i0 * self.p.ks0 as usize + (rest % n1) * self.p.ks1 as usize + (rest / n1) * self.p.ks2 as usize
    }

    /// Where reduced index r lies from there.
    #[inline(always)]
    fn reduced_at(&self, r: usize) -> usize {
        let (n0, n1) = (self.p.rn0 as usize, self.p.rn1 as usize);
        if r < n0 {
            return r * self.p.rs0 as usize;
        }
        let (i0, rest) = (r % n0, r / n0);
        i0 * self.p.rs0 as usize + (rest % n1) * self.p.rs1 as usize + (rest / n1) * self.p.rs2 as usize
    }

    fn range(&self, part: usize) -> std::ops::Range<usize> {
        let size = self.p.part as usize;
        part * size..((part + 1) * size).min(self.p.reduced as usize)
    }

    fn finished(&self, sum: R) -> R {
        sum * R::of(f64::from(self.p.factor)) / R::of(f64::from(self.p.divisor))
    }

    /// Outputs that lie side by side, tile by tile, row by row.
    #[inline(always)]
    fn across(&self, at: usize, part: usize, y: &mut [R]) {
        let (mut total, mut block) = ([R::ZERO; TILE], [R::ZERO; TILE]);
        let (total, block) = (&mut total[..y.len()], &mut block[..y.len()]);
        let range = self.range(part);
        let mut r = range.start;
        while r < range.end {
            let end = (r + BLOCK).min(range.end);
            block.fill(R::ZERO);
            for r in r..end {
                let from = at + self.reduced_at(r);
                for (sum, &x) in block.iter_mut().zip(&self.x[from..from + y.len()]) {
                    *sum += x;
                }
            }
            total.iter_mut().zip(block.iter()).for_each(|(t, &b)| *t += b);
            r = end;
        }
        y.iter_mut().zip(total.iter()).for_each(|(y, &t)| *y = self.finished(t));
    }

    /// One output.
    #[inline(always)]
    fn along(&self, at: usize, part: usize) -> R {
        let range = self.range(part);
        let mut total = [R::ZERO; SUMS];
        let mut r = range.start;
        while r < range.end {
            // A run of neighbours, at most BLOCK long per sum.
            let run = (self.p.rn0 as usize - r % self.p.rn0 as usize).min(range.end - r).min(BLOCK * SUMS);
            let from = at + self.reduced_at(r);
            let mut block = [R::ZERO; SUMS];
            if self.p.rs0 == 1 {
                let mut chunks = self.x[from..from + run].chunks_exact(SUMS);
                for chunk in chunks.by_ref() {
                    for i in 0..SUMS {
                        block[i] += chunk[i];
                    }
                }
                chunks.remainder().iter().zip(block.iter_mut()).for_each(|(&x, sum)| *sum += x);
            } else {
                for i in 0..run {
                    block[i % SUMS] += self.x[from + i * self.p.rs0 as usize];
                }
            }
            for i in 0..SUMS {
                total[i] += block[i];
            }
            r += run;
        }
        let mut half = SUMS / 2;
        while half > 0 {
            for i in 0..half {
                total[i] += total[i + half];
            }
            half /= 2;
        }
        self.finished(total[0])
    }
}

fn reduce_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ReduceParams = launch.params()?;
    let sums = Sums { arch: Arch::new(), p, x: launch.real()? };
    let kept = p.kept as usize;
    let y = &mut launch.real_mut()?[p.y_at as usize..][..kept * p.parts as usize];
    if p.along == 0 && p.ks0 == 1 {
        // Rows of outputs that lie side by side.
        let row = p.kn0 as usize;
        let rows_per_part = kept / row;
        let cost = TILE.min(row) * (p.part.min(p.reduced) as usize).max(1);
        y.par_chunks_mut(row).enumerate().with_min_len((GRAIN / cost).max(1)).for_each(|(i, y)| {
            let (part, at) = (i / rows_per_part, sums.kept_at(i % rows_per_part * row));
            y.par_chunks_mut(TILE).enumerate().with_min_len((GRAIN / cost).max(1)).for_each(|(tile, y)| {
                sums.arch.dispatch(
                    #[inline(always)]
                    || sums.across(at + tile * TILE, part, y),
                );
            });
        });
        return Ok(());
    }
    let least = (GRAIN / (p.part.min(p.reduced) as usize).max(1)).max(1);
    y.par_chunks_mut(least).enumerate().for_each(|(chunk, y)| {
        sums.arch.dispatch(
            #[inline(always)]
            || {
                for (i, y) in y.iter_mut().enumerate() {
                    let i = chunk * least + i;
                    *y = sums.along(sums.kept_at(i % kept), i / kept);
                }
            },
        );
    });
    Ok(())
}

/// Whether x comes before the best so far.
fn beats<R: Real>(x: R, best: R) -> bool {
    let nan = |x: R| x.partial_cmp(&x).is_none();
    x > best || (nan(x) && !nan(best))
}

fn reduce_max_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ReduceParams = launch.params()?;
    let sums = Sums { arch: Arch::new(), p, x: launch.real()? };
    let (kept, at) = (p.kept as usize, p.y_at as usize);
    let (y, index) = (&mut launch.real_mut()?[at..][..kept], &mut launch.word_mut()?[at..][..kept]);
    let least = (GRAIN / (p.reduced as usize)).max(1);
    y.par_iter_mut().zip(index).enumerate().with_min_len(least).for_each(|(k, (y, index))| {
        let at = sums.kept_at(k);
        let (mut best, mut best_at) = (sums.x[at], 0);
        for r in 1..p.reduced as usize {
            let x = sums.x[at + sums.reduced_at(r)];
            if beats(x, best) {
                (best, best_at) = (x, r);
            }
        }
        *y = best;
        *index = best_at as u32;
    });
    Ok(())
}

fn reduce_max_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: ReduceSpreadParams = launch.params()?;
    let words: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(&p));
    let (grad_y, index, grad_x) = (launch.real()?, launch.word()?, launch.real_mut()?);
    grad_x[p.x_at as usize..][..p.count as usize].par_iter_mut().enumerate().with_min_len(GRAIN).for_each(|(i, out)| {
        let (mut rest, mut k, mut r) = (i as u32, p.k_at, p.r_at);
        for axis in words[4..].chunks_exact(3) {
            let at = rest % axis[0];
            rest /= axis[0];
            k += at * axis[1];
            r += at * axis[2];
        }
        *out = if index[k as usize] == r { grad_y[k as usize] } else { R::ZERO };
    });
    Ok(())
}
