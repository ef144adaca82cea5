//! Convolution over time of many models at once: y[m,b,o,t] = f(bias[m,o] + Σ_{c,k} weight[m,o,c,k]·x[m,b,c,t + k·dilation − left]), and its
//! gradients; x is 0 outside 0..T and from the sequence's length on, y is 0 from the output's length on.
//!
//! g = grad_y·f′ where y is valid, else 0;  grad_x[b,c,s] = Σ_{o,k} weight[o,c,k]·g[b,o,s + left − k·dilation];
//! grad_weight[o,c,k] = Σ_{b,t} g[b,o,t]·x[b,c,t + k·dilation − left];  grad_bias[o] = Σ_{b,t} g[b,o,t].
//!
//! Shapes   x [M or 1,B,C,T], weight [M,O,C,K], bias [M,O]?, y, grad_y [M,B,O,U], lengths u32 [B]?; grad_x as x: the sum over models where x
//!          is shared. U = T + left + right − (K−1)·dilation. A sequence of length L > 0 has L + U − T valid outputs, one of length 0 none.
//! Padding  Symmetric p (PyTorch's `padding`), Same (left half, rounded down, and right the rest), Causal (left alone: y[t] sees x[..= t]).
//! Launch   an implicit product in tiles of 32 × 64 by 128 threads of 4 × 4: outputs × (b,t), depth (c,k); grad_x channels × (b,s), depth (o,k)
//!          of every model where x is shared; grad_weight outputs × (c,k), depth (b,t).
//! Splits   grad_weight splits B and T, by shape alone, into at most 4,096 terms; partial results [M,S,O·C·K + O] go to scratch, added in order.
//! Kept     gelu and silu keep the pre-activation [M,B,O,U], written by the convolution; y follows from it by `conv1d_activate`.
//! Floor    4·B·(C·T + O·U) bytes and 2·B·U·O·C·K flops per model.
//! Numerics sums in f32 in order along the depth (CPU: by blocks of 256). What lies past a length is never multiplied.
//! Files    shaders/conv1d.wgsl · cuda/conv1d.cu · gemm_lanes.rs, the fast f32 column · reference: the `_cpu` functions

use crate::activation::{self, Activation};
use crate::conformance::{Case, Outputs};
use crate::device::{Device, Output, Pass, View};
use crate::gemm_lanes::{self, DEPTH, Left, Packed, Start};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::lanes::take_memory;
use crate::real::Real;
use crate::split_sum::{SplitSumParams, split_sum};
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the kernels.
    #[derive(Default)]
    pub struct Conv1dParams {
        /// Models of this launch.
        models: u32,
        /// Models of x: 1 where it is shared.
        x_models: u32,
        /// Sequences of this launch.
        batch: u32,
        /// Channels of x.
        inputs: u32,
        /// Channels of y.
        outputs: u32,
        /// Taps K.
        taps: u32,
        /// Steps of x.
        time: u32,
        /// Steps of y.
        out_time: u32,
        /// Zeros before the first step.
        left: u32,
        /// Steps between taps.
        dilation: u32,
        /// Position in [`Activation::ALL`].
        activation: u32,
        /// Bits of `flag`.
        flags: u32,
        /// Splits of this launch, in grad_weight, per model.
        splits: u32,
        /// Sequences of a split.
        split_batch: u32,
        /// Steps of a split.
        split_time: u32,
    }
}

/// Bits of [`Conv1dParams::flags`].
mod flag {
    /// There is a bias.
    pub(super) const BIAS: u32 = 1;
    /// grad_x starts from what is there: an earlier launch has summed models before these.
    pub(super) const CONTINUE: u32 = 2;
}

/// Rows and columns of the tile, and what it loads of the depth at once.
const TILE: [u64; 2] = [32, 64];
const STEP: u64 = 16;
/// Terms of a split.
const TERMS: u64 = 4096;

fn params(words: &[u32]) -> Conv1dParams {
    params_of(words).unwrap_or_default()
}

fn tiles(rows: u64, columns: u64) -> u64 {
    rows.div_ceil(TILE[0]) * columns.div_ceil(TILE[1])
}

fn forward_groups(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.models) * tiles(p.outputs.into(), u64::from(p.batch) * u64::from(p.out_time))
}

fn grad_x_groups(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.x_models) * tiles(p.inputs.into(), u64::from(p.batch) * u64::from(p.time))
}

fn grad_weight_groups(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.models) * u64::from(p.splits) * tiles(p.outputs.into(), u64::from(p.inputs) * u64::from(p.taps))
}

fn values(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.models) * u64::from(p.batch) * u64::from(p.outputs) * u64::from(p.out_time)
}

fn products(words: &[u32]) -> u64 {
    let p = params(words);
    values(words) * u64::from(p.inputs) * u64::from(p.taps)
}

/// The floor counts products; bytes depend on the shape and are far below.
const COST: Cost = Cost { unit: "product", units: products, bytes: 0.25, flops: 2.0 };
const WG: u32 = 128;
const TILE_QUADS: &[(&str, u32)] = &[("ROW_QUADS", 8), ("COL_QUADS", 16), ("THREAD_QUADS", 1)];

/// Forward.
pub static CONV1D_FORWARD: Kernel = Kernel {
    name: "conv1d_forward",
    about: "convolution over time with bias and activation",
    args: &[reads("x"), reads("weight"), reads("bias"), writes("y")],
    params: layout::<Conv1dParams>(),
    workgroup: WG,
    constants: TILE_QUADS,
    groups: forward_groups,
    wgsl: wgsl!("conv1d"),
    cuda: cuda!("conv1d"),
    cpu: Some(Cpu { f32: forward_lanes::<false>, f64: conv1d_forward_cpu::<f64, false> }),
    cost: COST,
};

/// Forward of sequences of unequal lengths.
pub static CONV1D_FORWARD_RAGGED: Kernel = Kernel {
    name: "conv1d_forward_ragged",
    about: "the same for sequences of unequal lengths",
    args: &[reads("x"), reads("weight"), reads("bias"), reads_u32("lengths"), writes("y")],
    cpu: Some(Cpu { f32: forward_lanes::<true>, f64: conv1d_forward_cpu::<f64, true> }),
    ..CONV1D_FORWARD
};

/// y of a kept pre-activation.
pub static CONV1D_ACTIVATE: Kernel = Kernel {
    name: "conv1d_activate",
    about: "activation of a kept pre-activation",
    args: &[reads("kept"), writes("y")],
    groups: |words| values(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: activate_lanes, f64: conv1d_activate_cpu::<f64> }),
    cost: Cost { unit: "value", units: values, bytes: 8.0, flops: 20.0 },
    ..CONV1D_FORWARD
};

/// Gradient with respect to x.
pub static CONV1D_GRAD_X: Kernel = Kernel {
    name: "conv1d_grad_x",
    about: "gradient of convolutions with respect to their input",
    args: &[reads("grad_y"), reads("kept"), reads("weight"), writes("grad_x")],
    groups: grad_x_groups,
    cpu: Some(Cpu { f32: grad_x_lanes::<false>, f64: conv1d_grad_x_cpu::<f64, false> }),
    ..CONV1D_FORWARD
};

/// Gradient with respect to x of unequal lengths.
pub static CONV1D_GRAD_X_RAGGED: Kernel = Kernel {
    name: "conv1d_grad_x_ragged",
    about: "the same for sequences of unequal lengths",
    args: &[reads("grad_y"), reads("kept"), reads("weight"), reads_u32("lengths"), writes("grad_x")],
    cpu: Some(Cpu { f32: grad_x_lanes::<true>, f64: conv1d_grad_x_cpu::<f64, true> }),
    ..CONV1D_GRAD_X
};

/// Partial gradients with respect to weight and bias.
pub static CONV1D_GRAD_WEIGHT: Kernel = Kernel {
    name: "conv1d_grad_weight",
    about: "partial gradients of convolutions with respect to weight and bias",
    args: &[reads("x"), reads("grad_y"), reads("kept"), writes("partials")],
    groups: grad_weight_groups,
    cpu: Some(Cpu { f32: grad_weight_lanes::<false>, f64: conv1d_grad_weight_cpu::<f64, false> }),
    ..CONV1D_FORWARD
};

/// Partial gradients with respect to weight and bias, of unequal lengths.
pub static CONV1D_GRAD_WEIGHT_RAGGED: Kernel = Kernel {
    name: "conv1d_grad_weight_ragged",
    about: "the same for sequences of unequal lengths",
    args: &[reads("x"), reads("grad_y"), reads("kept"), reads_u32("lengths"), writes("partials")],
    cpu: Some(Cpu { f32: grad_weight_lanes::<true>, f64: conv1d_grad_weight_cpu::<f64, true> }),
    ..CONV1D_GRAD_WEIGHT
};

// ---- the reference ------------------------------------------------------------------------------------------------------

/// Sizes as the CPU column uses them.
#[derive(Clone, Copy)]
struct Sizes<'a> {
    b: usize,
    c: usize,
    o: usize,
    k: usize,
    t: usize,
    u: usize,
    left: usize,
    dilation: usize,
    shared: bool,
    lengths: Option<&'a [u32]>,
}

impl<'a> Sizes<'a> {
    fn of(p: &Conv1dParams, lengths: Option<&'a [u32]>) -> Sizes<'a> {
        Sizes {
            b: p.batch as usize,
            c: p.inputs as usize,
            o: p.outputs as usize,
            k: p.taps as usize,
            t: p.time as usize,
            u: p.out_time as usize,
            left: p.left as usize,
            dilation: p.dilation as usize,
            shared: p.x_models == 1,
            lengths,
        }
    }

    /// Valid steps of x.
    fn length(&self, b: usize) -> usize {
        self.lengths.map_or(self.t, |lengths| (lengths[b] as usize).min(self.t))
    }

    /// Valid steps of y.
    fn out_length(&self, b: usize) -> usize {
        match self.length(b) {
            0 => 0,
            length => (length + self.u).saturating_sub(self.t),
        }
    }

    /// Position of x[m,b,c,0].
    fn x_at(&self, m: usize, b: usize, c: usize) -> usize {
        (((if self.shared { 0 } else { m }) * self.b + b) * self.c + c) * self.t
    }

    /// Step of x that tap k of output t reads, if it is inside `length`.
    fn source(&self, t: usize, k: usize, length: usize) -> Option<usize> {
        (t + k * self.dilation).checked_sub(self.left).filter(|&s| s < length)
    }
}

fn conv1d_forward_cpu<R: Real, const RAGGED: bool>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (x, weight, bias) = (launch.real()?, launch.real()?, launch.real()?);
    let lengths = if RAGGED { Some(launch.word()?) } else { None };
    let y = launch.real_mut()?;
    let z = Sizes::of(&p, lengths);
    let activation = Activation::of_word(p.activation);
    for (row, y) in y.chunks_exact_mut(z.u).enumerate() {
        let (m, b, o) = (row / (z.b * z.o), row / z.o % z.b, row % z.o);
        let valid = z.out_length(b);
        y[valid..].fill(R::ZERO);
        for (t, y) in y[..valid].iter_mut().enumerate() {
            let mut sum = if p.flags & flag::BIAS != 0 { bias[m * z.o + o] } else { R::ZERO };
            for c in 0..z.c {
                for k in 0..z.k {
                    if let Some(s) = z.source(t, k, z.length(b)) {
                        sum += weight[((m * z.o + o) * z.c + c) * z.k + k] * x[z.x_at(m, b, c) + s];
                    }
                }
            }
            *y = activation.apply(sum);
        }
    }
    Ok(())
}

fn conv1d_activate_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (kept, y) = (launch.real()?, launch.real_mut()?);
    let activation = Activation::of_word(p.activation);
    y.iter_mut().zip(kept).for_each(|(y, &x)| *y = activation.apply(x));
    Ok(())
}

fn conv1d_grad_x_cpu<R: Real, const RAGGED: bool>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (grad_y, kept, weight) = (launch.real()?, launch.real()?, launch.real()?);
    let lengths = if RAGGED { Some(launch.word()?) } else { None };
    let grad_x = launch.real_mut()?;
    let z = Sizes::of(&p, lengths);
    let activation = Activation::of_word(p.activation);
    if p.flags & flag::CONTINUE == 0 {
        grad_x.fill(R::ZERO);
    }
    for row in 0..p.models as usize * z.b * z.o {
        let (m, b, o) = (row / (z.b * z.o), row / z.o % z.b, row % z.o);
        for t in 0..z.out_length(b) {
            let g = grad_y[row * z.u + t] * activation.slope(kept[row * z.u + t]);
            for c in 0..z.c {
                for k in 0..z.k {
                    if let Some(s) = z.source(t, k, z.length(b)) {
                        grad_x[z.x_at(m, b, c) + s] += g * weight[((m * z.o + o) * z.c + c) * z.k + k];
                    }
                }
            }
        }
    }
    Ok(())
}

/// Sequences and steps of a split.
fn split_of(p: &Conv1dParams, split: usize) -> (Range<usize>, Range<usize>) {
    let pieces = p.out_time.div_ceil(p.split_time) as usize;
    let (block, piece) = (split / pieces, split % pieces);
    let run = |at: usize, each: u32, all: u32| at * each as usize..((at + 1) * each as usize).min(all as usize);
    (run(block, p.split_batch, p.batch), run(piece, p.split_time, p.out_time))
}

fn conv1d_grad_weight_cpu<R: Real, const RAGGED: bool>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (x, grad_y, kept) = (launch.real()?, launch.real()?, launch.real()?);
    let lengths = if RAGGED { Some(launch.word()?) } else { None };
    let partials = launch.real_mut()?;
    let z = Sizes::of(&p, lengths);
    let activation = Activation::of_word(p.activation);
    let weights = z.o * z.c * z.k;
    for (item, partial) in partials.chunks_exact_mut(weights + z.o).enumerate() {
        let (m, (items, steps)) = (item / p.splits as usize, split_of(&p, item % p.splits as usize));
        partial.fill(R::ZERO);
        for b in items {
            for o in 0..z.o {
                let row = ((m * z.b + b) * z.o + o) * z.u;
                for t in steps.start..steps.end.min(z.out_length(b)) {
                    let g = grad_y[row + t] * activation.slope(kept[row + t]);
                    partial[weights + o] += g;
                    for c in 0..z.c {
                        for k in 0..z.k {
                            if let Some(s) = z.source(t, k, z.length(b)) {
                                partial[(o * z.c + c) * z.k + k] += g * x[z.x_at(m, b, c) + s];
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

// ---- the fast f32 column --------------------------------------------------------------------------------------------------

/// out[j] = row[start + j] where 0 ≤ start + j < valid, else 0.
#[inline(always)]
fn shifted(row: &[f32], start: isize, valid: usize, out: &mut [f32]) {
    let before = usize::try_from(-start).unwrap_or(0).min(out.len());
    let from = usize::try_from(start).unwrap_or(0).min(valid);
    let count = (valid - from).min(out.len() - before);
    out[..before].fill(0.0);
    out[before..before + count].copy_from_slice(&row[from..from + count]);
    out[before + count..].fill(0.0);
}

fn forward_lanes<const RAGGED: bool>(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (x, weight, bias) = (launch.real()?, launch.real()?, launch.real()?);
    let lengths = if RAGGED { Some(launch.word()?) } else { None };
    let (z, arch) = (Sizes::of(&p, lengths), Arch::new());
    let y = launch.real_mut()?;
    y.par_chunks_exact_mut(z.o * z.u).enumerate().for_each(|(item, y)| arch.dispatch(Forward { p: &p, z, item, x, weight, bias, y }));
    Ok(())
}

struct Forward<'a> {
    p: &'a Conv1dParams,
    z: Sizes<'a>,
    item: usize,
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (z, y) = (self.z, self.y);
        let (m, b, depth) = (self.item / z.b, self.item % z.b, z.c * z.k);
        let (length, valid) = (z.length(b), z.out_length(b));
        if valid == 0 {
            y.fill(0.0);
            return;
        }
        let mut memory = take_memory(gemm_lanes::packed_len::<S>(depth, valid));
        let fill = |d: usize, j: usize, out: &mut [f32]| {
            let at = z.x_at(m, b, d / z.k);
            shifted(&self.x[at..at + length], (j + d % z.k * z.dilation) as isize - z.left as isize, length, out);
        };
        let packed = Packed::rows(simd, depth, valid, memory.reals(), fill);
        for (o, y) in y.chunks_exact_mut(z.u).enumerate() {
            y[..valid].fill(if self.p.flags & flag::BIAS != 0 { self.bias[m * z.o + o] } else { 0.0 });
        }
        let left = Left::Rows { data: &self.weight[m * z.o * depth..(m + 1) * z.o * depth], stride: depth };
        gemm_lanes::multiply(simd, left, &packed, z.o, Start::Kept, y, z.u);
        let activation = Activation::of_word(self.p.activation);
        for y in y.chunks_exact_mut(z.u) {
            activation::apply(simd, activation, &mut y[..valid], None);
            y[valid..].fill(0.0);
        }
    }
}

fn activate_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (kept, y) = (launch.real()?, launch.real_mut()?);
    let arch = Arch::new();
    y.par_chunks_mut(8192).zip(kept.par_chunks(8192)).for_each(|(y, kept)| {
        y.copy_from_slice(kept);
        arch.dispatch(Activate(Activation::of_word(p.activation), y));
    });
    Ok(())
}

struct Activate<'a>(Activation, &'a mut [f32]);

impl WithSimd for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        activation::apply(simd, self.0, self.1, None);
    }
}

fn grad_x_lanes<const RAGGED: bool>(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (grad_y, kept, weight) = (launch.real()?, launch.real()?, launch.real()?);
    let lengths = if RAGGED { Some(launch.word()?) } else { None };
    let grad_x = launch.real_mut()?;
    let (z, arch, summed) = (Sizes::of(&p, lengths), Arch::new(), if p.x_models == 1 { p.models as usize } else { 1 });
    // weight [M,O,C,K] to [M,C,O,K], so that the depth (o,k) of a channel lies together
    let turned: Vec<f32> = weight
        .par_chunks_exact(z.o * z.c * z.k)
        .flat_map_iter(|w| (0..z.o * z.c * z.k).map(move |i| w[(i / z.k % z.o * z.c + i / (z.k * z.o)) * z.k + i % z.k]))
        .collect();
    grad_x.par_chunks_exact_mut(z.c * z.t).enumerate().for_each(|(item, grad_x)| {
        arch.dispatch(GradX { p: &p, z, item, summed, grad_y, kept, turned: &turned, grad_x });
    });
    Ok(())
}

struct GradX<'a> {
    p: &'a Conv1dParams,
    z: Sizes<'a>,
    item: usize,
    summed: usize,
    grad_y: &'a [f32],
    kept: &'a [f32],
    turned: &'a [f32],
    grad_x: &'a mut [f32],
}

impl WithSimd for GradX<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (z, grad_x) = (self.z, self.grad_x);
        let (first, b, depth) = (self.item / z.b * self.summed, self.item % z.b, z.o * z.k);
        let (length, valid) = (z.length(b), z.out_length(b));
        let keep = self.p.flags & flag::CONTINUE != 0;
        if !keep {
            grad_x.fill(0.0);
        }
        if valid == 0 {
            return;
        }
        let activation = Activation::of_word(self.p.activation);
        let mut memory = take_memory(gemm_lanes::packed_len::<S>(depth, length) + z.o * valid);
        let (slopes, panels) = memory.reals().split_at_mut(z.o * valid);
        for m in first..first + self.summed {
            for (o, out) in slopes.chunks_exact_mut(valid).enumerate() {
                let at = ((m * z.b + b) * z.o + o) * z.u;
                activation::pull_back(simd, activation, &self.grad_y[at..at + valid], &self.kept[at..at + valid], out);
            }
            let fill = |d: usize, j: usize, out: &mut [f32]| {
                let o = d / z.k;
                shifted(&slopes[o * valid..(o + 1) * valid], (j + z.left) as isize - (d % z.k * z.dilation) as isize, valid, out);
            };
            let packed = Packed::rows(simd, depth, length, panels, fill);
            let left = Left::Rows { data: &self.turned[m * z.c * depth..(m + 1) * z.c * depth], stride: depth };
            gemm_lanes::multiply(simd, left, &packed, z.c, Start::Kept, grad_x, z.t);
        }
    }
}

fn grad_weight_lanes<const RAGGED: bool>(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: Conv1dParams = launch.params()?;
    let (x, grad_y, kept) = (launch.real()?, launch.real()?, launch.real()?);
    let lengths = if RAGGED { Some(launch.word()?) } else { None };
    let (z, arch) = (Sizes::of(&p, lengths), Arch::new());
    let partials = launch.real_mut()?;
    partials.par_chunks_exact_mut(z.o * z.c * z.k + z.o).enumerate().for_each(|(item, partial)| {
        arch.dispatch(GradWeight { p: &p, z, item, x, grad_y, kept, partial });
    });
    Ok(())
}

struct GradWeight<'a> {
    p: &'a Conv1dParams,
    z: Sizes<'a>,
    item: usize,
    x: &'a [f32],
    grad_y: &'a [f32],
    kept: &'a [f32],
    partial: &'a mut [f32],
}

impl WithSimd for GradWeight<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (z, columns) = (self.z, self.z.c * self.z.k);
        let (m, (items, steps)) = (self.item / self.p.splits as usize, split_of(self.p, self.item % self.p.splits as usize));
        let activation = Activation::of_word(self.p.activation);
        let deepest = DEPTH.min(steps.len());
        let mut memory = take_memory(gemm_lanes::packed_len::<S>(deepest, columns) + z.o * deepest + columns * deepest);
        let (slopes, rest) = memory.reals().split_at_mut(z.o * deepest);
        let (windows, panels) = rest.split_at_mut(columns * deepest);
        self.partial.fill(0.0);
        let (weight, bias) = self.partial.split_at_mut(z.o * columns);
        for b in items {
            let (length, valid) = (z.length(b), z.out_length(b));
            for t0 in (steps.start..steps.end.min(valid)).step_by(DEPTH) {
                let deep = DEPTH.min(steps.end.min(valid) - t0);
                for (o, out) in slopes.chunks_exact_mut(deep).enumerate().take(z.o) {
                    let at = ((m * z.b + b) * z.o + o) * z.u + t0;
                    activation::pull_back(simd, activation, &self.grad_y[at..at + deep], &self.kept[at..at + deep], out);
                    bias[o] += sum(simd, out);
                }
                for (d, out) in windows.chunks_exact_mut(deep).enumerate().take(columns) {
                    let at = z.x_at(m, b, d / z.k);
                    shifted(&self.x[at..at + length], (t0 + d % z.k * z.dilation) as isize - z.left as isize, length, out);
                }
                let right = gemm_lanes::Right { data: windows, stride: deep, along_depth: true };
                let packed = Packed::right(simd, right, deep, columns, panels);
                gemm_lanes::multiply(simd, Left::Rows { data: slopes, stride: deep }, &packed, z.o, Start::Kept, weight, columns);
            }
        }
    }
}

#[inline(always)]
fn sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (whole, rest) = S::as_simd_f32s(x);
    let mut sum = simd.partial_load_f32s(rest);
    for &x in whole {
        sum = simd.add_f32s(sum, x);
    }
    simd.reduce_sum_f32s(sum)
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// Zeros around a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// As many before as behind.
    Symmetric(u64),
    /// As many steps out as in; an odd one goes behind.
    Same,
    /// All before: a result depends on its own step and earlier ones.
    Causal,
}

/// Sizes and options of a convolution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conv1d {
    /// Independent weight sets M.
    pub models: u64,
    /// Models of x: M, or 1 where all share it.
    pub x_models: u64,
    /// Sequences B.
    pub batch: u64,
    /// Channels C of x.
    pub inputs: u64,
    /// Channels O of y.
    pub outputs: u64,
    /// Taps K.
    pub taps: u64,
    /// Steps T of x.
    pub time: u64,
    /// Zeros around it.
    pub padding: Padding,
    /// Steps between taps.
    pub dilation: u64,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether sequences have lengths.
    pub ragged: bool,
    /// What is applied to the result.
    pub activation: Activation,
}

const OP: &str = "conv1d";

impl Conv1d {
    /// # Errors
    /// `Parameter` for zero sizes, taps that reach beyond the padded sequence, an x of some but not all models, sizes beyond 32 bits.
    pub fn check(&self) -> Result<()> {
        let wrong = |name: &str, value: u64, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
        let sizes = [
            ("models", self.models),
            ("inputs", self.inputs),
            ("outputs", self.outputs),
            ("taps", self.taps),
            ("time", self.time),
            ("dilation", self.dilation),
        ];
        for (name, size) in sizes {
            if size == 0 || size > 1 << 20 {
                return wrong(name, size, "must be between 1 and 1,048,576");
            }
        }
        if let Padding::Symmetric(padding) = self.padding
            && padding > 1 << 20
        {
            return wrong("padding", padding, "must be at most 1,048,576");
        }
        if self.x_models != 1 && self.x_models != self.models {
            return wrong("x_models", self.x_models, "must be 1 (shared by all models) or the number of models");
        }
        if self.inputs * self.taps > 1 << 24 || self.outputs * self.taps > 1 << 24 || self.reach() >= 1 << 24 {
            return wrong("taps", self.taps, "with these channels and this dilation is too many; channels·taps and dilation·(taps − 1) must stay below 2^24");
        }
        let (left, right) = self.sides();
        if self.time + left + right <= self.reach() {
            return wrong("taps", self.taps, "with this dilation reach beyond the padded sequence; use fewer, a smaller dilation or more padding");
        }
        if self.batch.saturating_mul(self.out_time().max(self.time)) > u64::from(u32::MAX) / 4 {
            return wrong("batch", self.batch, "times the steps must stay below 2^30; use fewer sequences");
        }
        Ok(())
    }

    fn reach(&self) -> u64 {
        (self.taps - 1) * self.dilation
    }

    /// Zeros before and behind.
    fn sides(&self) -> (u64, u64) {
        match self.padding {
            Padding::Symmetric(p) => (p, p),
            Padding::Same => (self.reach() / 2, self.reach() - self.reach() / 2),
            Padding::Causal => (self.reach(), 0),
        }
    }

    /// Steps U of y.
    pub fn out_time(&self) -> u64 {
        let (left, right) = self.sides();
        (self.time + left + right).saturating_sub(self.reach())
    }

    /// Reals of y.
    fn out_len(&self) -> u64 {
        self.models * self.batch * self.outputs * self.out_time()
    }

    /// Reals that forward keeps for backward besides y: the pre-activation for gelu and silu, else 0.
    pub fn saved(&self) -> u64 {
        if self.activation.keeps_input() { self.out_len() } else { 0 }
    }

    /// Reals of scratch that forward needs: none.
    pub fn scratch(&self) -> u64 {
        0
    }

    /// Reals of scratch that backward needs for the gradients of weight and bias.
    pub fn scratch_backward(&self, _: &Device) -> u64 {
        self.models * self.splits().0 * self.partial()
    }

    fn partial(&self) -> u64 {
        self.outputs * (self.inputs * self.taps + 1)
    }

    /// Splits, sequences of a split and steps of a split in grad_weight: by the shape alone.
    fn splits(&self) -> (u64, u64, u64) {
        let u = self.out_time().max(1);
        let pieces = u.div_ceil(TERMS);
        let steps = u.div_ceil(pieces);
        // Two tiles for each processor of a large GPU, 64 terms at least.
        let wanted = (256 / (self.models * tiles(self.outputs, self.inputs * self.taps) * pieces)).max(1);
        let items = self.batch.div_ceil(wanted).max(64u64.div_ceil(u)).min(TERMS / steps).max(1).min(self.batch.max(1));
        (self.batch.div_ceil(items).max(1) * u.div_ceil(steps), items, steps)
    }

    fn params(&self) -> Conv1dParams {
        let (splits, items, steps) = self.splits();
        Conv1dParams {
            models: self.models as u32,
            x_models: self.x_models as u32,
            batch: self.batch as u32,
            inputs: self.inputs as u32,
            outputs: self.outputs as u32,
            taps: self.taps as u32,
            time: self.time as u32,
            out_time: self.out_time() as u32,
            left: self.sides().0 as u32,
            dilation: self.dilation as u32,
            activation: self.activation.word(),
            flags: 0,
            splits: splits as u32,
            split_batch: items as u32,
            split_time: steps as u32,
        }
    }

    /// Runs of models with all their sequences, or of sequences of one model, that one launch can take; `unit` sequences stay together.
    fn parts(&self, device: &Device, groups: u64, unit: u64) -> Result<Vec<(Range<u64>, Range<u64>)>> {
        let wide = (self.inputs * self.time).max(self.outputs * self.out_time());
        let work = 2 * self.inputs * self.taps * self.outputs * self.out_time();
        let limits = device.limits();
        if self.batch * wide <= limits.binding_bytes / 4 && self.batch.saturating_mul(work) <= limits.work_per_launch {
            let weights = self.partial() * if unit == self.splits().1 { self.splits().0 } else { 1 };
            let runs = device.plan(OP, self.models, (self.batch * wide).max(weights), groups, self.batch * work)?;
            return Ok(runs.into_iter().map(|run| (run, 0..self.batch)).collect());
        }
        let units = device.plan(OP, self.batch.div_ceil(unit), unit * wide, groups.div_ceil(self.batch.div_ceil(unit)), unit * work)?;
        let items = move |run: &Range<u64>| run.start * unit..(run.end * unit).min(self.batch);
        Ok((0..self.models).flat_map(|m| units.iter().map(move |run| (m..m + 1, items(run))).collect::<Vec<_>>()).collect())
    }

    fn x_range(&self, models: &Range<u64>, items: &Range<u64>) -> Range<u64> {
        let models = if self.x_models == 1 { 0..1 } else { models.clone() };
        self.range(&models, items, self.inputs * self.time)
    }

    fn y_range(&self, models: &Range<u64>, items: &Range<u64>) -> Range<u64> {
        self.range(models, items, self.outputs * self.out_time())
    }

    /// Range of [M,B,each] for all sequences of some models, or some sequences of one.
    fn range(&self, models: &Range<u64>, items: &Range<u64>, each: u64) -> Range<u64> {
        (models.start * self.batch + items.start) * each..((models.end - 1) * self.batch + items.end) * each
    }

    /// Params of a launch.
    fn part(&self, models: &Range<u64>, items: &Range<u64>) -> Conv1dParams {
        let count = (models.end - models.start) as u32;
        let x_models = if self.x_models == 1 { 1 } else { count };
        Conv1dParams { models: count, x_models, batch: (items.end - items.start) as u32, ..self.params() }
    }
}

fn expect(arg: &str, view: &View, len: u64, shape: &str) -> Result<()> {
    if view.len() == len {
        return Ok(());
    }
    Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{shape} = {len} values"), got: format!("{} values", view.len()) })
}

fn expect_lengths(op: &Conv1d, lengths: &Option<View>) -> Result<()> {
    let fits = match lengths {
        Some(lengths) => op.ragged && lengths.len() == op.batch && lengths.elem() == Elem::U32,
        None => !op.ragged,
    };
    if fits {
        return Ok(());
    }
    let expected = if op.ragged { format!("u32 [{}]", op.batch) } else { "none".into() };
    Err(Error::Shape { op: OP, arg: "lengths".into(), expected, got: format!("{lengths:?}") })
}

/// Inputs and outputs of [`conv1d`].
#[derive(Debug, Clone)]
pub struct Conv1dArgs {
    /// [M or 1,B,C,T].
    pub x: View,
    /// [M,O,C,K].
    pub weight: View,
    /// [M,O], exactly where [`Conv1d::bias`] says so.
    pub bias: Option<View>,
    /// u32 [B], exactly where [`Conv1d::ragged`] says so; beyond T counts as T.
    pub lengths: Option<View>,
    /// Result [M,B,O,U].
    pub y: View,
    /// What backward needs, [`Conv1d::saved`] reals; `None` where there is no backward.
    pub saved: Option<View>,
}

/// Records y. No sequences record nothing.
/// # Errors
/// `Parameter`, `Shape`, `TooLarge`.
pub fn conv1d(pass: &mut Pass, op: &Conv1d, args: &Conv1dArgs) -> Result<()> {
    op.check()?;
    let weights = op.outputs * op.inputs * op.taps;
    expect("x", &args.x, op.x_models * op.batch * op.inputs * op.time, "[M or 1,B,C,T]")?;
    expect("weight", &args.weight, op.models * weights, "[M,O,C,K]")?;
    expect("y", &args.y, op.out_len(), "[M,B,O,U]")?;
    expect_lengths(op, &args.lengths)?;
    if args.bias.is_some() != op.bias {
        let said = |there: bool| String::from(if there { "a bias" } else { "none" });
        return Err(Error::Shape { op: OP, arg: "bias".into(), expected: said(op.bias), got: said(args.bias.is_some()) });
    }
    if let Some(bias) = &args.bias {
        expect("bias", bias, op.models * op.outputs, "[M,O]")?;
    }
    if let Some(saved) = &args.saved {
        expect("saved", saved, op.saved(), "the pre-activation where it is kept")?;
    }
    if op.batch == 0 {
        return Ok(());
    }
    let kept = args.saved.as_ref().filter(|_| op.saved() > 0);
    let device = pass.device().clone();
    device.check_rounds(OP, (op.inputs * op.taps).div_ceil(STEP) * (STEP + 5), "rounds")?;
    for (m, b) in op.parts(&device, tiles(op.outputs, op.batch * op.out_time()), 1)? {
        let flags = if op.bias { flag::BIAS } else { 0 };
        let params = Conv1dParams { flags, activation: if kept.is_some() { 0 } else { op.activation.word() }, ..op.part(&m, &b) };
        let x = pass.input(&args.x, op.x_range(&m, &b))?;
        let weight = pass.input(&args.weight, m.start * weights..m.end * weights)?;
        let bias = args.bias.as_ref().map(|bias| pass.input(bias, m.start * op.outputs..m.end * op.outputs)).transpose()?;
        let out = pass.output(kept.unwrap_or(&args.y), op.y_range(&m, &b))?;
        let mut views = vec![x, weight.clone(), bias.unwrap_or(weight)];
        if let Some(lengths) = &args.lengths {
            views.push(pass.input(lengths, b.clone())?);
        }
        views.push(out.view.clone());
        pass.launch(if op.ragged { &CONV1D_FORWARD_RAGGED } else { &CONV1D_FORWARD }, &params, &views)?;
        if kept.is_some() {
            let y = pass.output(&args.y, op.y_range(&m, &b))?;
            pass.launch(&CONV1D_ACTIVATE, &op.part(&m, &b), &[out.view.clone(), y.view.clone()])?;
            pass.finish(y)?;
        }
        pass.finish(out)?;
    }
    Ok(())
}

/// Inputs and outputs of [`conv1d_backward`]. A gradient that is `None` is not computed.
#[derive(Debug, Clone)]
pub struct Conv1dBackwardArgs {
    /// [M or 1,B,C,T].
    pub x: View,
    /// [M,O,C,K].
    pub weight: View,
    /// As in forward.
    pub lengths: Option<View>,
    /// y of forward for relu, tanh and sigmoid; its `saved` for gelu and silu; not read without activation.
    pub kept: Option<View>,
    /// [M,B,O,U].
    pub grad_y: View,
    /// [M or 1,B,C,T], overwritten.
    pub grad_x: Option<View>,
    /// [M,O,C,K], overwritten.
    pub grad_weight: Option<View>,
    /// [M,O], overwritten.
    pub grad_bias: Option<View>,
    /// [`Conv1d::scratch_backward`] reals; not used for grad_x alone.
    pub scratch: View,
}

/// Records the gradients that are asked for. Without sequences nothing is written.
/// # Errors
/// As [`conv1d`].
pub fn conv1d_backward(pass: &mut Pass, op: &Conv1d, args: &Conv1dBackwardArgs) -> Result<()> {
    op.check()?;
    let weights = op.outputs * op.inputs * op.taps;
    expect("x", &args.x, op.x_models * op.batch * op.inputs * op.time, "[M or 1,B,C,T]")?;
    expect("weight", &args.weight, op.models * weights, "[M,O,C,K]")?;
    expect("grad_y", &args.grad_y, op.out_len(), "[M,B,O,U]")?;
    expect_lengths(op, &args.lengths)?;
    for (arg, view, len) in [
        ("grad_x", &args.grad_x, args.x.len()),
        ("grad_weight", &args.grad_weight, op.models * weights),
        ("grad_bias", &args.grad_bias, op.models * op.outputs),
    ] {
        view.as_ref().map_or(Ok(()), |view| expect(arg, view, len, "the shape of what it is the gradient of"))?;
    }
    let kept = match (&args.kept, op.activation) {
        (_, Activation::None) => args.grad_y.clone(),
        (Some(kept), _) => kept.clone(),
        (None, activation) => {
            let expected = format!("what backward of {} needs", activation.name());
            return Err(Error::Shape { op: OP, arg: "kept".into(), expected, got: "none".into() });
        }
    };
    expect("kept", &kept, op.out_len(), "[M,B,O,U]")?;
    if op.batch == 0 {
        return Ok(());
    }
    if let Some(grad_x) = &args.grad_x {
        record_grad_x(pass, op, args, &kept, grad_x)?;
    }
    if args.grad_weight.is_some() || args.grad_bias.is_some() {
        record_grad_weight(pass, op, args, &kept)?;
    }
    Ok(())
}

fn record_grad_x(pass: &mut Pass, op: &Conv1d, args: &Conv1dBackwardArgs, kept: &View, grad_x: &View) -> Result<()> {
    let device = pass.device().clone();
    let weights = op.outputs * op.inputs * op.taps;
    let rounds = (op.outputs * op.taps).div_ceil(STEP) * (STEP + 5);
    device.check_rounds(OP, rounds, "rounds")?;
    let shared = op.x_models == 1;
    // A thread of a shared x loops over the models of its launch.
    let most = if shared { (device.limits().loop_rounds / (rounds + 1)).max(1) } else { u64::MAX };
    let mut parts = Vec::new();
    for (m, b) in op.parts(&device, tiles(op.inputs, op.batch * op.time), 1)? {
        let step = most.min(m.end - m.start);
        parts.extend((m.start..m.end).step_by(step as usize).map(|from| (from..(from + step).min(m.end), b.clone())));
    }
    if shared {
        // All models of some sequences, then the next sequences.
        parts.sort_by_key(|(m, b)| (b.start, m.start));
    }
    let mut open: Option<Output> = None;
    for (m, b) in parts {
        let fresh = !shared || m.start == 0;
        if fresh {
            open = Some(pass.output(grad_x, op.x_range(&m, &b))?);
        }
        let Some(out) = &open else { return Err(Error::Internal("grad_x of a shared x starts without its first model".into())) };
        let mut views = vec![
            pass.input(&args.grad_y, op.y_range(&m, &b))?,
            pass.input(kept, op.y_range(&m, &b))?,
            pass.input(&args.weight, m.start * weights..m.end * weights)?,
        ];
        if let Some(lengths) = &args.lengths {
            views.push(pass.input(lengths, b.clone())?);
        }
        views.push(out.view.clone());
        let params = Conv1dParams { flags: if fresh { 0 } else { flag::CONTINUE }, ..op.part(&m, &b) };
        pass.launch(if op.ragged { &CONV1D_GRAD_X_RAGGED } else { &CONV1D_GRAD_X }, &params, &views)?;
        if (!shared || m.end == op.models)
            && let Some(out) = open.take()
        {
            pass.finish(out)?;
        }
    }
    Ok(())
}

fn record_grad_weight(pass: &mut Pass, op: &Conv1d, args: &Conv1dBackwardArgs, kept: &View) -> Result<()> {
    let device = pass.device().clone();
    let (splits, items, steps) = op.splits();
    let (width, weights) = (op.partial(), op.outputs * op.inputs * op.taps);
    if args.scratch.len() < op.models * splits * width {
        let (expected, got) = (format!("at least {} values (scratch_backward)", op.models * splits * width), format!("{} values", args.scratch.len()));
        return Err(Error::Shape { op: OP, arg: "scratch".into(), expected, got });
    }
    device.check_rounds(OP, (items * steps).div_ceil(STEP) * (2 * STEP + 6), "rounds")?;
    let pieces = op.out_time().div_ceil(steps);
    for (m, b) in op.parts(&device, splits * tiles(op.outputs, op.inputs * op.taps), items)? {
        let (first, here) = (b.start / items * pieces, (b.end - b.start).div_ceil(items) * pieces);
        let mut views = vec![pass.input(&args.x, op.x_range(&m, &b))?, pass.input(&args.grad_y, op.y_range(&m, &b))?, pass.input(kept, op.y_range(&m, &b))?];
        if let Some(lengths) = &args.lengths {
            views.push(pass.input(lengths, b.clone())?);
        }
        let out = pass.output(&args.scratch, (m.start * splits + first) * width..((m.end - 1) * splits + first + here) * width)?;
        views.push(out.view.clone());
        let params = Conv1dParams { splits: here as u32, ..op.part(&m, &b) };
        pass.launch(if op.ragged { &CONV1D_GRAD_WEIGHT_RAGGED } else { &CONV1D_GRAD_WEIGHT }, &params, &views)?;
        pass.finish(out)?;
    }
    let partials = args.scratch.part(0..op.models * splits * width);
    let sums = SplitSumParams { models: op.models as u32, splits: splits as u32, width: width as u32, first: 0, count: weights as u32 };
    if let Some(grad_weight) = &args.grad_weight {
        split_sum(pass, OP, sums, &partials, grad_weight)?;
    }
    if let Some(grad_bias) = &args.grad_bias {
        split_sum(pass, OP, SplitSumParams { first: weights as u32, count: op.outputs as u32, ..sums }, &partials, grad_bias)?;
    }
    Ok(())
}

/// Conformance binding. x [B,C,T] with weight [O,C,K], or both with a dimension of models before; `padding` a number, "same" or "causal".
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let shape = |name: &str| -> Result<[u64; 4]> {
        let dims: Vec<u64> = case.shape(name)?.iter().map(|&d| d as u64).collect();
        match dims[..] {
            [a, b, c] => Ok([1, a, b, c]),
            [m, a, b, c] => Ok([m, a, b, c]),
            _ => Err(Error::Shape { op: OP, arg: name.into(), expected: "[·,·,·] or [M,·,·,·]".into(), got: format!("{dims:?}") }),
        }
    };
    let ([x_models, batch, inputs, time], [models, outputs, _, taps]) = (shape("x")?, shape("weight")?);
    let whole = |name: &str, otherwise: u64| if case.given(name) { case.number(name).map(|x| x as u64) } else { Ok(otherwise) };
    let padding = match case.text("padding") {
        Ok("same") => Padding::Same,
        Ok("causal") => Padding::Causal,
        Ok("valid") => Padding::Symmetric(0),
        _ if case.truth("causal").unwrap_or(false) => Padding::Causal,
        _ => Padding::Symmetric(whole("padding", 0)?),
    };
    let activation = if case.given("activation") { Activation::named(case.text("activation")?)? } else { Activation::None };
    let dilation = whole("dilation", 1)?;
    let (bias, ragged) = (case.has("bias"), case.has("lengths"));
    let op = Conv1d { models, x_models, batch, inputs, outputs, taps, time, padding, dilation, bias, ragged, activation };
    op.check()?;
    let upload = |name: &str| -> Result<View> { Ok(View::from(&device.upload(name, case.f32(name)?)?)) };
    let zeros = |name: &str, len: u64| -> Result<View> { Ok(View::from(&device.zeros(name, len)?)) };
    let lengths = if ragged { Some(View::from(&device.upload_u32("lengths", case.u32("lengths")?)?)) } else { None };
    let args = Conv1dArgs {
        x: upload("x")?,
        weight: upload("weight")?,
        bias: if bias { Some(upload("bias")?) } else { None },
        lengths: lengths.clone(),
        y: zeros("y", op.out_len())?,
        saved: Some(zeros("saved", op.saved())?),
    };
    let mut pass = device.pass(OP);
    conv1d(&mut pass, &op, &args)?;
    let mut reads = vec![("y", pass.read(&args.y)?)];
    if case.has("grad_y") {
        let back = Conv1dBackwardArgs {
            grad_x: Some(zeros("grad_x", args.x.len())?),
            grad_weight: Some(zeros("grad_weight", args.weight.len())?),
            grad_bias: if bias { Some(zeros("grad_bias", models * outputs)?) } else { None },
            grad_y: upload("grad_y")?,
            scratch: zeros("scratch", op.scratch_backward(device))?,
            kept: if activation.keeps_input() { args.saved } else { Some(args.y) },
            x: args.x,
            weight: args.weight,
            lengths,
        };
        conv1d_backward(&mut pass, &op, &back)?;
        for (name, view) in [("grad_x", &back.grad_x), ("grad_weight", &back.grad_weight), ("grad_bias", &back.grad_bias)] {
            if let Some(view) = view {
                reads.push((name, pass.read(view)?));
            }
        }
    }
    let mut results = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        results.reals(name, done.f64(read)?);
    }
    Ok(results)
}
