//! Layer normalisation: y[n,d] = (x[n,d] − μ[n])·r[n]·weight[m,d] + bias[m,d],  r = 1/√(σ² + eps), moments over d with divisor D.
//!
//! h = (x − μ)·r;  a = grad_y·weight;  grad_x = r·(a − mean(a) − h·mean(a·h));  grad_weight[m,d] = Σ_n grad_y·h;  grad_bias = Σ_n grad_y,
//! over the rows of model m: the rows are split evenly over the models.
//!
//! Shapes   x, y, grad_y, grad_x [N,D]; weight, bias and their gradients [M,D], each may be absent; saved [N,2]: μ[n] − x[n,0] and r[n].
//! Launch   rows: LANES threads a row (8 up to D = 64, else 32: one warp), 128 threads a workgroup; three passes over the row, which stays
//!          in the cache. grad_weight: a workgroup per (split of rows, COLUMNS columns), partial sums [M,S,2,D], added in order.
//! Floor    8·N·D bytes forward, 12·N·D backward for x and 8·N·D for the weights.
//! Numerics moments of x − x[n,0], the second around the mean: an offset costs no digits. Sums of 1,024 rows at most, then in order.
//! Source   Ba, Kiros, Hinton 2016, arXiv:1607.06450.
//! Files    shaders/layer_norm.wgsl · cuda/layer_norm.cu · reference: the `_cpu` functions; f32: the lane-wise ones below

use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, writes};
use crate::lanes;
use crate::real::Real;
use crate::split_sum::{SplitSumParams, split_sum};
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the kernels.
    #[derive(Default)]
    pub struct LayerNormParams {
        /// Rows of this launch.
        rows: u32,
        /// Values of a row.
        width: u32,
        /// First row of this launch among all.
        first_row: u32,
        /// Rows of a model.
        model_rows: u32,
        /// Bits of `flag`.
        flags: u32,
        /// eps, rounded …
        eps: f32,
        /// … and what rounding took away, which only the f64 reference feels.
        eps_low: f32,
        /// Splits of a model's rows, in grad_weight.
        splits: u32,
        /// Rows of a split.
        split_rows: u32,
        /// First split of this launch among those of all models, and how many.
        first_split: u32,
        /// Splits of this launch.
        count: u32,
    }
}

/// Bits of [`LayerNormParams::flags`].
mod flag {
    /// There is a weight.
    pub(super) const WEIGHT: u32 = 1;
    /// There is a bias.
    pub(super) const BIAS: u32 = 2;
}

const WG: u32 = 128;
const LANES: u64 = 32;
const FEW_LANES: u64 = 8;
/// Width up to which a row has few lanes.
const NARROW: u64 = 64;
const COLUMNS: u64 = 128;
const FEW_COLUMNS: u64 = 16;
/// The constants of a kernel whose rows have many or few lanes.
const WIDE_TILE: &[(&str, u32)] = &[("LANES", LANES as u32), ("COLUMNS", COLUMNS as u32)];
const NARROW_TILE: &[(&str, u32)] = &[("LANES", FEW_LANES as u32), ("COLUMNS", FEW_COLUMNS as u32)];

fn params(words: &[u32]) -> LayerNormParams {
    params_of(words).unwrap_or_default()
}

fn row_groups(words: &[u32], lanes: u64) -> u64 {
    u64::from(params(words).rows).div_ceil(u64::from(WG) / lanes)
}

fn weight_groups(words: &[u32], columns: u64) -> u64 {
    u64::from(params(words).count) * u64::from(params(words).width).div_ceil(columns)
}

fn elements(words: &[u32]) -> u64 {
    u64::from(params(words).rows) * u64::from(params(words).width)
}

/// Forward, a warp per row.
pub static LAYER_NORM_FORWARD: Kernel = Kernel {
    name: "layer_norm_forward",
    about: "layer normalisation of rows",
    args: &[reads("x"), reads("weight"), reads("bias"), writes("y"), writes("saved")],
    params: layout::<LayerNormParams>(),
    workgroup: WG,
    constants: WIDE_TILE,
    groups: |words| row_groups(words, LANES),
    wgsl: wgsl!("layer_norm"),
    cuda: cuda!("layer_norm"),
    cpu: Some(Cpu { f32: forward_lanes, f64: layer_norm_forward_cpu::<f64> }),
    cost: Cost { unit: "value", units: elements, bytes: 8.0, flops: 8.0 },
};

/// Forward of narrow rows.
pub static LAYER_NORM_FORWARD_SMALL: Kernel = Kernel {
    name: "layer_norm_forward_small",
    about: "the same for narrow rows",
    constants: NARROW_TILE,
    groups: |words| row_groups(words, FEW_LANES),
    ..LAYER_NORM_FORWARD
};

/// Gradient with respect to x, a warp per row.
pub static LAYER_NORM_GRAD_X: Kernel = Kernel {
    name: "layer_norm_grad_x",
    about: "gradient of layer normalisation with respect to its input",
    args: &[reads("x"), reads("saved"), reads("weight"), reads("grad_y"), writes("grad_x")],
    cpu: Some(Cpu { f32: grad_x_lanes, f64: layer_norm_grad_x_cpu::<f64> }),
    cost: Cost { unit: "value", units: elements, bytes: 12.0, flops: 12.0 },
    ..LAYER_NORM_FORWARD
};

/// Gradient with respect to x of narrow rows.
pub static LAYER_NORM_GRAD_X_SMALL: Kernel = Kernel {
    name: "layer_norm_grad_x_small",
    about: "the same for narrow rows",
    constants: NARROW_TILE,
    groups: |words| row_groups(words, FEW_LANES),
    ..LAYER_NORM_GRAD_X
};

/// Partial gradients with respect to weight and bias.
pub static LAYER_NORM_GRAD_WEIGHT: Kernel = Kernel {
    name: "layer_norm_grad_weight",
    about: "partial gradients of layer normalisation with respect to weight and bias",
    args: &[reads("x"), reads("saved"), reads("grad_y"), writes("partials")],
    groups: |words| weight_groups(words, COLUMNS),
    cpu: Some(Cpu { f32: grad_weight_lanes, f64: layer_norm_grad_weight_cpu::<f64> }),
    cost: Cost { unit: "value", units: elements, bytes: 8.0, flops: 5.0 },
    ..LAYER_NORM_FORWARD
};

/// Partial gradients of narrow rows.
pub static LAYER_NORM_GRAD_WEIGHT_SMALL: Kernel = Kernel {
    name: "layer_norm_grad_weight_small",
    about: "the same for narrow rows",
    constants: NARROW_TILE,
    groups: |words| weight_groups(words, FEW_COLUMNS),
    ..LAYER_NORM_GRAD_WEIGHT
};

// ---- the reference ------------------------------------------------------------------------------------------------------

impl LayerNormParams {
    /// Row d of weight or bias for a row of this launch.
    fn of_row<'a, R>(&self, x: &'a [R], row: usize) -> &'a [R] {
        let m = (self.first_row as usize + row) / self.model_rows as usize;
        &x[m * self.width as usize..(m + 1) * self.width as usize]
    }

    /// Rows of a split of this launch, counted from the launch's first row.
    fn split(&self, at: usize) -> Range<usize> {
        let split = self.first_split as usize + at;
        let model = split / self.splits as usize * self.model_rows as usize;
        let from = split % self.splits as usize * self.split_rows as usize;
        let to = (from + self.split_rows as usize).min(self.model_rows as usize);
        model + from - self.first_row as usize..model + to - self.first_row as usize
    }
}

fn layer_norm_forward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LayerNormParams = launch.params()?;
    let (x, weight, bias, y, saved) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?, launch.real_mut()?);
    let (d, eps) = (p.width as usize, R::of(f64::from(p.eps)) + R::of(f64::from(p.eps_low)));
    let divisor = R::ONE / R::of(d as f64);
    for (row, ((x, y), saved)) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(saved.chunks_exact_mut(2)).enumerate() {
        let shift = x.iter().map(|&v| v - x[0]).sum::<R>() * divisor;
        let variance = x.iter().map(|&v| (v - x[0]) - shift).map(|c| c * c).sum::<R>() * divisor;
        let r = R::ONE / (variance + eps).sqrt();
        saved.copy_from_slice(&[shift, r]);
        for j in 0..d {
            let mut v = ((x[j] - x[0]) - shift) * r;
            if p.flags & flag::WEIGHT != 0 {
                v *= p.of_row(weight, row)[j];
            }
            if p.flags & flag::BIAS != 0 {
                v += p.of_row(bias, row)[j];
            }
            y[j] = v;
        }
    }
    Ok(())
}

fn layer_norm_grad_x_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LayerNormParams = launch.params()?;
    let (x, saved, weight, grad_y, grad_x) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let d = p.width as usize;
    let divisor = R::ONE / R::of(d as f64);
    for (row, grad_x) in grad_x.chunks_exact_mut(d).enumerate() {
        let (x, g, shift, r) = (&x[row * d..], &grad_y[row * d..], saved[2 * row], saved[2 * row + 1]);
        let scaled = |j: usize| if p.flags & flag::WEIGHT != 0 { g[j] * p.of_row(weight, row)[j] } else { g[j] };
        let h = |j: usize| ((x[j] - x[0]) - shift) * r;
        let mean = (0..d).map(scaled).sum::<R>() * divisor;
        let slope = (0..d).map(|j| scaled(j) * h(j)).sum::<R>() * divisor;
        for j in 0..d {
            grad_x[j] = r * (scaled(j) - mean - h(j) * slope);
        }
    }
    Ok(())
}

fn layer_norm_grad_weight_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LayerNormParams = launch.params()?;
    let (x, saved, grad_y, partials) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let d = p.width as usize;
    for (split, partial) in partials.chunks_exact_mut(2 * d).enumerate() {
        partial.fill(R::ZERO);
        for row in p.split(split) {
            for j in 0..d {
                let g = grad_y[row * d + j];
                partial[j] += g * ((x[row * d + j] - x[row * d]) - saved[2 * row]) * saved[2 * row + 1];
                partial[d + j] += g;
            }
        }
    }
    Ok(())
}

// ---- the fast f32 column --------------------------------------------------------------------------------------------------

/// Values that a task takes.
const TASK: usize = 16_384;

fn forward_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: LayerNormParams = launch.params()?;
    let (x, weight, bias, y, saved) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?, launch.real_mut()?);
    let (d, arch) = (p.width as usize, Arch::new());
    let rows = (TASK / d).max(1);
    y.par_chunks_mut(rows * d).zip(saved.par_chunks_mut(2 * rows)).enumerate().for_each(|(task, (y, saved))| {
        arch.dispatch(Forward { p: &p, first: task * rows, x: &x[task * rows * d..], weight, bias, y, saved });
    });
    Ok(())
}

struct Forward<'a> {
    p: &'a LayerNormParams,
    first: usize,
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    y: &'a mut [f32],
    saved: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let d = self.p.width as usize;
        let divisor = 1.0 / d as f32;
        for (row, ((x, y), saved)) in self.x.chunks_exact(d).zip(self.y.chunks_exact_mut(d)).zip(self.saved.chunks_exact_mut(2)).enumerate() {
            let first = simd.splat_f32s(x[0]);
            let (whole, rest) = S::as_simd_f32s(x);
            let tail = lanes::tail(simd, rest, x[0]);
            let mut sums = [simd.splat_f32s(0.0); 2];
            for (k, &v) in whole.iter().enumerate() {
                sums[k % 2] = simd.add_f32s(sums[k % 2], simd.sub_f32s(v, first));
            }
            let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.sub_f32s(tail, first));
            let offset = simd.reduce_sum_f32s(sum) * divisor;
            let shift = simd.splat_f32s(offset);
            let mut squares = [simd.splat_f32s(0.0); 2];
            for (k, &v) in whole.iter().enumerate() {
                let c = simd.sub_f32s(simd.sub_f32s(v, first), shift);
                squares[k % 2] = simd.mul_add_f32s(c, c, squares[k % 2]);
            }
            let c = simd.sub_f32s(simd.sub_f32s(lanes::tail(simd, rest, x[0] + offset), first), shift);
            // Lanes past the row hold the mean but for its rounding: leave them out.
            let c = lanes::only(simd, c, rest.len());
            let square = simd.mul_add_f32s(c, c, simd.add_f32s(squares[0], squares[1]));
            let r = 1.0 / (simd.reduce_sum_f32s(square) * divisor + self.p.eps).sqrt();
            saved.copy_from_slice(&[offset, r]);
            let scale = simd.splat_f32s(r);
            let weight = (self.p.flags & flag::WEIGHT != 0).then(|| self.p.of_row(self.weight, self.first + row));
            let bias = (self.p.flags & flag::BIAS != 0).then(|| self.p.of_row(self.bias, self.first + row));
            let (outs, out_rest) = S::as_mut_simd_f32s(y);
            for (k, (out, &v)) in outs.iter_mut().zip(whole).enumerate() {
                let at = k * S::F32_LANES..(k + 1) * S::F32_LANES;
                let mut h = simd.mul_f32s(simd.sub_f32s(simd.sub_f32s(v, first), shift), scale);
                if let Some(weight) = weight {
                    h = simd.mul_f32s(h, S::as_simd_f32s(&weight[at.clone()]).0[0]);
                }
                if let Some(bias) = bias {
                    h = simd.add_f32s(h, S::as_simd_f32s(&bias[at]).0[0]);
                }
                *out = h;
            }
            let at = d - rest.len();
            for (j, (out, &v)) in out_rest.iter_mut().zip(rest).enumerate() {
                *out = ((v - x[0]) - offset) * r * weight.map_or(1.0, |w| w[at + j]) + bias.map_or(0.0, |b| b[at + j]);
            }
        }
    }
}

fn grad_x_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: LayerNormParams = launch.params()?;
    let (x, saved, weight, grad_y, grad_x) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let (d, arch) = (p.width as usize, Arch::new());
    let rows = (TASK / d).max(1);
    grad_x.par_chunks_mut(rows * d).enumerate().for_each(|(task, grad_x)| {
        let at = task * rows;
        arch.dispatch(GradX { p: &p, first: at, x: &x[at * d..], saved: &saved[2 * at..], weight, grad_y: &grad_y[at * d..], grad_x });
    });
    Ok(())
}

struct GradX<'a> {
    p: &'a LayerNormParams,
    first: usize,
    x: &'a [f32],
    saved: &'a [f32],
    weight: &'a [f32],
    grad_y: &'a [f32],
    grad_x: &'a mut [f32],
}

impl WithSimd for GradX<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let d = self.p.width as usize;
        let divisor = 1.0 / d as f32;
        let rows = self.x.chunks_exact(d).zip(self.grad_y.chunks_exact(d)).zip(self.saved.chunks_exact(2));
        for (row, (((x, g), saved), out)) in rows.zip(self.grad_x.chunks_exact_mut(d)).enumerate() {
            let (first, shift, r) = (simd.splat_f32s(x[0]), simd.splat_f32s(saved[0]), simd.splat_f32s(saved[1]));
            let weight = (self.p.flags & flag::WEIGHT != 0).then(|| self.p.of_row(self.weight, self.first + row));
            let ((xs, x_rest), (gs, g_rest), (outs, out_rest)) = (S::as_simd_f32s(x), S::as_simd_f32s(g), S::as_mut_simd_f32s(out));
            let (mut mean, mut slope) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
            for (k, ((&x, &g), out)) in xs.iter().zip(gs).zip(outs.iter_mut()).enumerate() {
                let mut a = g;
                if let Some(weight) = weight {
                    a = simd.mul_f32s(a, S::as_simd_f32s(&weight[k * S::F32_LANES..(k + 1) * S::F32_LANES]).0[0]);
                }
                let h = simd.mul_f32s(simd.sub_f32s(simd.sub_f32s(x, first), shift), r);
                mean = simd.add_f32s(mean, a);
                slope = simd.mul_add_f32s(a, h, slope);
                *out = a;
            }
            let at = d - x_rest.len();
            let a = match weight {
                Some(weight) => simd.mul_f32s(simd.partial_load_f32s(g_rest), simd.partial_load_f32s(&weight[at..])),
                None => simd.partial_load_f32s(g_rest),
            };
            let h = simd.mul_f32s(simd.sub_f32s(simd.sub_f32s(simd.partial_load_f32s(x_rest), first), shift), r);
            let h = lanes::only(simd, h, x_rest.len());
            let mean = simd.splat_f32s(simd.reduce_sum_f32s(simd.add_f32s(mean, a)) * divisor);
            let slope = simd.splat_f32s(simd.reduce_sum_f32s(simd.mul_add_f32s(a, h, slope)) * divisor);
            for (&x, out) in xs.iter().zip(outs) {
                let h = simd.mul_f32s(simd.sub_f32s(simd.sub_f32s(x, first), shift), r);
                *out = simd.mul_f32s(r, simd.sub_f32s(simd.sub_f32s(*out, mean), simd.mul_f32s(h, slope)));
            }
            simd.partial_store_f32s(out_rest, simd.mul_f32s(r, simd.sub_f32s(simd.sub_f32s(a, mean), simd.mul_f32s(h, slope))));
        }
    }
}

fn grad_weight_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: LayerNormParams = launch.params()?;
    let (x, saved, grad_y, partials) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let arch = Arch::new();
    partials.par_chunks_exact_mut(2 * p.width as usize).enumerate().for_each(|(split, partial)| {
        arch.dispatch(GradWeight { d: p.width as usize, rows: p.split(split), x, saved, grad_y, partial });
    });
    Ok(())
}

struct GradWeight<'a> {
    d: usize,
    rows: Range<usize>,
    x: &'a [f32],
    saved: &'a [f32],
    grad_y: &'a [f32],
    partial: &'a mut [f32],
}

impl WithSimd for GradWeight<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let d = self.d;
        self.partial.fill(0.0);
        let (weight, bias) = self.partial.split_at_mut(d);
        let ((weights, weight_rest), (biases, bias_rest)) = (S::as_mut_simd_f32s(weight), S::as_mut_simd_f32s(bias));
        for row in self.rows {
            let (x, g) = (&self.x[row * d..(row + 1) * d], &self.grad_y[row * d..(row + 1) * d]);
            let (offset, scale) = (self.saved[2 * row], self.saved[2 * row + 1]);
            let (first, shift, r) = (simd.splat_f32s(x[0]), simd.splat_f32s(offset), simd.splat_f32s(scale));
            let ((xs, x_rest), (gs, g_rest)) = (S::as_simd_f32s(x), S::as_simd_f32s(g));
            for (((&x, &g), weight), bias) in xs.iter().zip(gs).zip(weights.iter_mut()).zip(biases.iter_mut()) {
                let h = simd.mul_f32s(simd.sub_f32s(simd.sub_f32s(x, first), shift), r);
                *weight = simd.mul_add_f32s(g, h, *weight);
                *bias = simd.add_f32s(*bias, g);
            }
            for (((&v, &g), weight), bias) in x_rest.iter().zip(g_rest).zip(weight_rest.iter_mut()).zip(bias_rest.iter_mut()) {
                *weight += g * (((v - x[0]) - offset) * scale);
                *bias += g;
            }
        }
    }
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// Sizes and options of a layer normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerNorm {
    /// Models M of weight and bias.
    pub models: u64,
    /// Rows N, a multiple of the models: the first N/M rows are those of the first model.
    pub rows: u64,
    /// Values D of a row.
    pub width: u64,
    /// Added to the variance.
    pub eps: f64,
    /// Whether there is a weight.
    pub weight: bool,
    /// Whether there is a bias.
    pub bias: bool,
}

const OP: &str = "layer_norm";

impl LayerNorm {
    /// # Errors
    /// `Parameter` for zero models or width, rows that the models do not divide, an eps that is not positive, sizes beyond 32 bits.
    pub fn check(&self) -> Result<()> {
        let wrong = |name: &str, value: String, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value, help: help.into() });
        let most = u64::from(u32::MAX) / 64;
        if self.models == 0 || self.models > most {
            return wrong("models", self.models.to_string(), "must be between 1 and 67,108,863");
        }
        if self.width == 0 || self.width > most {
            return wrong("width", self.width.to_string(), "must be between 1 and 67,108,863");
        }
        if !self.rows.is_multiple_of(self.models) || self.rows > u64::from(u32::MAX) / 2 {
            return wrong("rows", self.rows.to_string(), "must be a multiple of the models, and below 2^31");
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return wrong("eps", self.eps.to_string(), "must be positive, such as 1e-5");
        }
        Ok(())
    }

    /// Reals that forward keeps for backward: two per row.
    pub fn saved(&self) -> u64 {
        2 * self.rows
    }

    /// Reals of scratch that forward needs.
    pub fn scratch(&self) -> u64 {
        0
    }

    /// Reals of scratch that backward needs for the gradients of weight and bias.
    pub fn scratch_backward(&self, _: &Device) -> u64 {
        2 * self.models * self.splits().0 * self.width
    }

    /// Splits of a model's rows, and rows of a split: by the shape alone.
    fn splits(&self) -> (u64, u64) {
        let rows = (self.rows / self.models).max(1);
        let columns = if self.width <= NARROW { FEW_COLUMNS } else { COLUMNS };
        let wanted = (512 / (self.models * self.width.div_ceil(columns))).min(rows.div_ceil(64)).max(rows.div_ceil(1024)).max(1);
        let split_rows = rows.div_ceil(wanted);
        (rows.div_ceil(split_rows), split_rows)
    }

    fn params(&self) -> LayerNormParams {
        let eps = self.eps as f32;
        let bit = |there: bool, bit: u32| if there { bit } else { 0 };
        LayerNormParams {
            rows: self.rows as u32,
            width: self.width as u32,
            model_rows: (self.rows / self.models) as u32,
            flags: bit(self.weight, flag::WEIGHT) | bit(self.bias, flag::BIAS),
            eps,
            eps_low: (self.eps - f64::from(eps)) as f32,
            ..LayerNormParams::default()
        }
    }

    /// Runs of rows that one launch can take.
    fn runs(&self, device: &Device) -> Result<Vec<Range<u64>>> {
        let lanes = if self.width <= NARROW { FEW_LANES } else { LANES };
        device.check_rounds(OP, 3 * self.width.div_ceil(lanes) + 32, "rounds")?;
        device.plan(OP, self.rows, self.width.max(2), 1, 12 * self.width)
    }
}

fn expect(arg: &str, view: &View, len: u64, shape: &str) -> Result<()> {
    if view.len() == len {
        return Ok(());
    }
    Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{shape} = {len} values"), got: format!("{} values", view.len()) })
}

/// Inputs and outputs of [`layer_norm`].
#[derive(Debug, Clone)]
pub struct LayerNormArgs {
    /// [N,D].
    pub x: View,
    /// [M,D], exactly where [`LayerNorm::weight`] says so.
    pub weight: Option<View>,
    /// [M,D], exactly where [`LayerNorm::bias`] says so.
    pub bias: Option<View>,
    /// Result [N,D].
    pub y: View,
    /// [N,2], for backward.
    pub saved: View,
}

fn optional(op: &LayerNorm, arg: &str, view: &Option<View>, there: bool) -> Result<()> {
    match (view, there) {
        (Some(view), true) => expect(arg, view, op.models * op.width, "[M,D]"),
        (None, false) => Ok(()),
        (given, _) => {
            let said = |there: bool| String::from(if there { "given" } else { "absent" });
            Err(Error::Shape { op: OP, arg: arg.into(), expected: said(there), got: said(given.is_some()) })
        }
    }
}

/// Records y. No rows record nothing.
/// # Errors
/// `Parameter`, `Shape`, `TooLarge`.
pub fn layer_norm(pass: &mut Pass, op: &LayerNorm, args: &LayerNormArgs) -> Result<()> {
    op.check()?;
    expect("x", &args.x, op.rows * op.width, "[N,D]")?;
    expect("y", &args.y, op.rows * op.width, "[N,D]")?;
    expect("saved", &args.saved, op.saved(), "[N,2]")?;
    optional(op, "weight", &args.weight, op.weight)?;
    optional(op, "bias", &args.bias, op.bias)?;
    if op.rows == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    let kernel = if op.width <= NARROW { &LAYER_NORM_FORWARD_SMALL } else { &LAYER_NORM_FORWARD };
    for run in op.runs(&device)? {
        let x = pass.input(&args.x, run.start * op.width..run.end * op.width)?;
        let y = pass.output(&args.y, run.start * op.width..run.end * op.width)?;
        let saved = pass.output(&args.saved, 2 * run.start..2 * run.end)?;
        let params = LayerNormParams { rows: (run.end - run.start) as u32, first_row: run.start as u32, ..op.params() };
        let of = |view: &Option<View>| view.clone().unwrap_or_else(|| x.clone());
        pass.launch(kernel, &params, &[x.clone(), of(&args.weight), of(&args.bias), y.view.clone(), saved.view.clone()])?;
        pass.finish(y)?;
        pass.finish(saved)?;
    }
    Ok(())
}

/// Inputs and outputs of [`layer_norm_backward`]. A gradient that is `None` is not computed.
#[derive(Debug, Clone)]
pub struct LayerNormBackwardArgs {
    /// [N,D].
    pub x: View,
    /// [M,D], exactly where [`LayerNorm::weight`] says so.
    pub weight: Option<View>,
    /// What forward kept [N,2].
    pub saved: View,
    /// [N,D].
    pub grad_y: View,
    /// [N,D], overwritten.
    pub grad_x: Option<View>,
    /// [M,D], overwritten.
    pub grad_weight: Option<View>,
    /// [M,D], overwritten.
    pub grad_bias: Option<View>,
    /// [`LayerNorm::scratch_backward`] reals; not used for grad_x alone.
    pub scratch: View,
}

/// Records the gradients that are asked for. Without rows nothing is written.
/// # Errors
/// As [`layer_norm`].
pub fn layer_norm_backward(pass: &mut Pass, op: &LayerNorm, args: &LayerNormBackwardArgs) -> Result<()> {
    op.check()?;
    for (arg, view) in [("x", Some(&args.x)), ("grad_y", Some(&args.grad_y)), ("grad_x", args.grad_x.as_ref())] {
        view.map_or(Ok(()), |view| expect(arg, view, op.rows * op.width, "[N,D]"))?;
    }
    expect("saved", &args.saved, op.saved(), "[N,2]")?;
    optional(op, "weight", &args.weight, op.weight)?;
    for (arg, view) in [("grad_weight", &args.grad_weight), ("grad_bias", &args.grad_bias)] {
        view.as_ref().map_or(Ok(()), |view| expect(arg, view, op.models * op.width, "[M,D]"))?;
    }
    if op.rows == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    if let Some(grad_x) = &args.grad_x {
        let kernel = if op.width <= NARROW { &LAYER_NORM_GRAD_X_SMALL } else { &LAYER_NORM_GRAD_X };
        for run in op.runs(&device)? {
            let range = run.start * op.width..run.end * op.width;
            let x = pass.input(&args.x, range.clone())?;
            let saved = pass.input(&args.saved, 2 * run.start..2 * run.end)?;
            let grad_y = pass.input(&args.grad_y, range.clone())?;
            let out = pass.output(grad_x, range)?;
            let weight = args.weight.clone().unwrap_or_else(|| x.clone());
            let params = LayerNormParams { rows: (run.end - run.start) as u32, first_row: run.start as u32, ..op.params() };
            pass.launch(kernel, &params, &[x, saved, weight, grad_y, out.view.clone()])?;
            pass.finish(out)?;
        }
    }
    if args.grad_weight.is_some() || args.grad_bias.is_some() {
        record_grad_weight(pass, op, args)?;
    }
    Ok(())
}

fn record_grad_weight(pass: &mut Pass, op: &LayerNorm, args: &LayerNormBackwardArgs) -> Result<()> {
    let device = pass.device().clone();
    let (splits, split_rows) = op.splits();
    let (all, width, model_rows) = (op.models * splits, op.width, op.rows / op.models);
    if args.scratch.len() < 2 * all * width {
        let (expected, got) = (format!("at least {} values (scratch_backward)", 2 * all * width), format!("{} values", args.scratch.len()));
        return Err(Error::Shape { op: OP, arg: "scratch".into(), expected, got });
    }
    let (kernel, columns) = if width <= NARROW { (&LAYER_NORM_GRAD_WEIGHT_SMALL, FEW_COLUMNS) } else { (&LAYER_NORM_GRAD_WEIGHT, COLUMNS) };
    device.check_rounds(OP, split_rows + 64, "rounds")?;
    let start = |split: u64| (split / splits * model_rows + (split % splits * split_rows).min(model_rows)).min(op.rows);
    for run in device.plan(OP, all, split_rows.max(2) * width, width.div_ceil(columns), 8 * split_rows * width)? {
        let rows = start(run.start)..start(run.end);
        let x = pass.input(&args.x, rows.start * width..rows.end * width)?;
        let saved = pass.input(&args.saved, 2 * rows.start..2 * rows.end)?;
        let grad_y = pass.input(&args.grad_y, rows.start * width..rows.end * width)?;
        let out = pass.output(&args.scratch, 2 * run.start * width..2 * run.end * width)?;
        let params = LayerNormParams {
            rows: (rows.end - rows.start) as u32,
            first_row: rows.start as u32,
            splits: splits as u32,
            split_rows: split_rows as u32,
            first_split: run.start as u32,
            count: (run.end - run.start) as u32,
            ..op.params()
        };
        pass.launch(kernel, &params, &[x, saved, grad_y, out.view.clone()])?;
        pass.finish(out)?;
    }
    let partials = args.scratch.part(0..2 * all * width);
    let sums = SplitSumParams { models: op.models as u32, splits: splits as u32, width: 2 * width as u32, first: 0, count: width as u32 };
    for (view, first) in [(&args.grad_weight, 0), (&args.grad_bias, width as u32)] {
        if let Some(view) = view {
            split_sum(pass, OP, SplitSumParams { first, ..sums }, &partials, view)?;
        }
    }
    Ok(())
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let shape = case.shape("x")?;
    let width = shape.last().copied().unwrap_or(1) as u64;
    let rows = shape.iter().rev().skip(1).product::<usize>() as u64;
    let models = ["weight", "bias"].iter().find(|name| case.has(name)).map_or(Ok(1), |name| case.f32(name).map(|w| w.len() as u64 / width.max(1)))?;
    let op = LayerNorm { models, rows, width, eps: case.number("eps")?, weight: case.has("weight"), bias: case.has("bias") };
    op.check()?;
    let upload = |name: &str| -> Result<View> { Ok(View::from(&device.upload(name, case.f32(name)?)?)) };
    let given = |name: &str| if case.has(name) { upload(name).map(Some) } else { Ok(None) };
    let zeros = |name: &str, len: u64| -> Result<View> { Ok(View::from(&device.zeros(name, len)?)) };
    let (x, weight, y, saved) = (upload("x")?, given("weight")?, zeros("y", rows * width)?, zeros("saved", op.saved())?);
    let mut pass = device.pass(OP);
    let args = LayerNormArgs { x: x.clone(), weight: weight.clone(), bias: given("bias")?, y: y.clone(), saved: saved.clone() };
    layer_norm(&mut pass, &op, &args)?;
    let mut reads = vec![("y", pass.read(&y)?)];
    if case.has("grad_y") {
        let args = LayerNormBackwardArgs {
            grad_y: upload("grad_y")?,
            grad_x: Some(zeros("grad_x", rows * width)?),
            grad_weight: if op.weight { Some(zeros("grad_weight", models * width)?) } else { None },
            grad_bias: if op.bias { Some(zeros("grad_bias", models * width)?) } else { None },
            scratch: zeros("scratch", op.scratch_backward(device))?,
            x,
            weight,
            saved,
        };
        layer_norm_backward(&mut pass, &op, &args)?;
        for (name, view) in [("grad_x", &args.grad_x), ("grad_weight", &args.grad_weight), ("grad_bias", &args.grad_bias)] {
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
