//! Dense layers of many models at once: y[m,n,o] = f(Σ_i x[m,n,i]·weight[m,o,i] + bias[m,o]), f fused; and their gradients.
//!
//! g[m,n,o] = grad_y[m,n,o]·f′;  grad_x[m,n,i] = Σ_o g[m,n,o]·weight[m,o,i];  grad_weight[m,o,i] = Σ_n g[m,n,o]·x[m,n,i];
//! grad_bias[m,o] = Σ_n g[m,n,o].  f′ is taken from y (relu, tanh, sigmoid) or from the kept pre-activation (gelu, silu), on the fly.
//!
//! Shapes   x [M or 1,N,I], weight [M,O,I], bias [M,O]?, y, grad_y [M,N,O]; grad_x as x: the sum over models where x is shared.
//! Launch   a workgroup per tile of the result, batched by model: 64 × 64 by 128 threads of 8 × 4 values, or 32 × 16 by 32 threads of
//!          4 × 4 (one warp) where the large tile would be half empty. Depth goes in steps of 16 through workgroup memory.
//! Splits   grad_weight splits N, by shape alone, so that few small models fill a GPU and no sum is longer than 4,096; partial results
//!          [M,S,O·I + O] go to scratch and are added in order (split_sum). One split writes the gradients directly.
//! Kept     gelu and silu keep the pre-activation [M,N,O]; the others need y; none needs neither.
//! Floor    4·(N·I + O·I + N·O) bytes and 2·N·I·O flops per model. On an H100 64 × 64 tiles of f32 do 32 flops per byte of shared memory.
//! Stored   f32, f16 or bf16: sums are f32 whatever the storage, and are rounded once, to what is stored. On CUDA the products of 16-bit values go
//!          through tensor cores (cuda/half.cuh); g·f′ counts as a rounded value and its rest. grad_weight then passes through scratch.
//! Numerics sums in f32: in order along the depth (GPU), by blocks of 256 (CPU); a NaN stays in its row, or its model's weights.
//! Files    shaders/linear.wgsl · cuda/linear.cu · gemm_lanes.rs, the fast f32 column · reference: the `_cpu` functions

use crate::activation::{self, Activation};
use crate::conformance::{Case, Outputs};
use crate::device::{Device, DeviceKind, Pass, View};
use crate::gemm_lanes::{self, DEPTH, Left, Packed, Right, Start};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_as, writes, writes_as};
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
    pub struct LinearParams {
        /// Models of this launch.
        models: u32,
        /// Models of x: 1 where it is shared.
        x_models: u32,
        /// Rows of this launch.
        rows: u32,
        /// Values of a row of x.
        inputs: u32,
        /// Values of a row of y.
        outputs: u32,
        /// Position in [`Activation::ALL`].
        activation: u32,
        /// Bits of `flag`.
        flags: u32,
        /// Splits of the rows, in grad_weight.
        splits: u32,
        /// Rows of a split.
        split_rows: u32,
    }
}

/// Bits of [`LinearParams::flags`].
mod flag {
    /// There is a bias.
    pub(super) const BIAS: u32 = 1;
    /// grad_x starts from what is there: an earlier launch has summed models before these.
    pub(super) const CONTINUE: u32 = 2;
    /// grad_weight is wanted.
    pub(super) const GRAD_WEIGHT: u32 = 4;
    /// grad_bias is wanted.
    pub(super) const GRAD_BIAS: u32 = 8;
    /// Partial results of the splits go to scratch.
    pub(super) const PARTIAL: u32 = 16;
}

/// Rows and columns of the two tiles.
const LARGE: [u64; 2] = [64, 64];
const SMALL: [u64; 2] = [32, 16];
/// Steps of depth that a tile loads at once.
const STEP: u64 = 16;

fn params(words: &[u32]) -> LinearParams {
    params_of(words).unwrap_or_default()
}

fn tiles(rows: u64, columns: u64, tile: [u64; 2]) -> u64 {
    rows.div_ceil(tile[0]) * columns.div_ceil(tile[1])
}

/// Whether the large tile fits a result: not where it would be more than half empty.
fn is_large(rows: u64, columns: u64) -> bool {
    2 * rows * columns >= tiles(rows, columns, LARGE) * LARGE[0] * LARGE[1]
}

fn forward_groups(words: &[u32], tile: [u64; 2]) -> u64 {
    let p = params(words);
    u64::from(p.models) * tiles(p.rows.into(), p.outputs.into(), tile)
}

fn grad_x_groups(words: &[u32], tile: [u64; 2]) -> u64 {
    let p = params(words);
    u64::from(p.x_models) * tiles(p.rows.into(), p.inputs.into(), tile)
}

fn grad_weight_groups(words: &[u32], tile: [u64; 2]) -> u64 {
    let p = params(words);
    u64::from(p.models) * u64::from(p.splits) * tiles(p.outputs.into(), p.inputs.into(), tile)
}

fn products(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.models) * u64::from(p.rows) * u64::from(p.inputs) * u64::from(p.outputs)
}

/// The floor counts products; bytes depend on the shape and are far below for all but the smallest.
const COST: Cost = Cost { unit: "product", units: products, bytes: 0.5, flops: 2.0 };
const LARGE_TILE: &[(&str, u32)] = &[("ROW_QUADS", 16), ("COL_QUADS", 16), ("THREAD_QUADS", 2)];
const SMALL_TILE: &[(&str, u32)] = &[("ROW_QUADS", 8), ("COL_QUADS", 4), ("THREAD_QUADS", 1)];

/// Forward in large tiles.
pub static LINEAR_FORWARD: Kernel = Kernel {
    name: "linear_forward",
    about: "dense layers with bias and activation",
    args: &[reads("x"), reads("weight"), reads("bias"), writes("y")],
    params: layout::<LinearParams>(),
    workgroup: 128,
    constants: LARGE_TILE,
    groups: |words| forward_groups(words, LARGE),
    wgsl: wgsl!("linear"),
    cuda: cuda!("linear"),
    cpu: Some(Cpu { f32: forward_lanes, f64: linear_forward_cpu::<f64> }),
    cost: COST,
};

/// Forward in small tiles.
pub static LINEAR_FORWARD_SMALL: Kernel = Kernel {
    name: "linear_forward_small",
    about: "the same in tiles of a warp",
    workgroup: 32,
    constants: SMALL_TILE,
    groups: |words| forward_groups(words, SMALL),
    ..LINEAR_FORWARD
};

/// Forward that keeps the pre-activation, in large tiles.
pub static LINEAR_FORWARD_KEPT: Kernel = Kernel {
    name: "linear_forward_kept",
    about: "the same with the pre-activation kept for backward",
    args: &[reads("x"), reads("weight"), reads("bias"), writes("y"), writes("kept")],
    ..LINEAR_FORWARD
};

/// Forward that keeps the pre-activation, in small tiles.
pub static LINEAR_FORWARD_KEPT_SMALL: Kernel = Kernel {
    name: "linear_forward_kept_small",
    about: "the same with the pre-activation kept, in tiles of a warp",
    args: LINEAR_FORWARD_KEPT.args,
    ..LINEAR_FORWARD_SMALL
};

/// Gradient with respect to x in large tiles.
pub static LINEAR_GRAD_X: Kernel = Kernel {
    name: "linear_grad_x",
    about: "gradient of dense layers with respect to their input",
    args: &[reads("grad_y"), reads("kept"), reads("weight"), writes("grad_x")],
    groups: |words| grad_x_groups(words, LARGE),
    cpu: Some(Cpu { f32: grad_x_lanes, f64: linear_grad_x_cpu::<f64> }),
    ..LINEAR_FORWARD
};

/// Gradient with respect to x in small tiles.
pub static LINEAR_GRAD_X_SMALL: Kernel = Kernel {
    name: "linear_grad_x_small",
    about: "the same in tiles of a warp",
    workgroup: 32,
    constants: SMALL_TILE,
    groups: |words| grad_x_groups(words, SMALL),
    ..LINEAR_GRAD_X
};

/// Gradient with respect to weight and bias in large tiles.
pub static LINEAR_GRAD_WEIGHT: Kernel = Kernel {
    name: "linear_grad_weight",
    about: "gradient of dense layers with respect to weight and bias",
    args: &[reads("x"), reads("grad_y"), reads("kept"), writes("grad_weight"), writes("grad_bias")],
    groups: |words| grad_weight_groups(words, LARGE),
    cpu: Some(Cpu { f32: grad_weight_lanes, f64: linear_grad_weight_cpu::<f64> }),
    ..LINEAR_FORWARD
};

/// Gradient with respect to weight and bias in small tiles.
pub static LINEAR_GRAD_WEIGHT_SMALL: Kernel = Kernel {
    name: "linear_grad_weight_small",
    about: "the same in tiles of a warp",
    workgroup: 32,
    constants: SMALL_TILE,
    groups: |words| grad_weight_groups(words, SMALL),
    ..LINEAR_GRAD_WEIGHT
};

/// The kernels with arguments in 16 bits: sums, and what grad_weight writes, stay f32.
macro_rules! stored {
    ($elem:expr, $wgsl:expr, $($forward:ident $forward_name:literal, $kept:ident $kept_name:literal, $grad_x:ident $grad_x_name:literal,
     $grad_weight:ident $grad_weight_name:literal, from $of_forward:ident $of_kept:ident $of_grad_x:ident $of_grad_weight:ident;)*) => {$(
        #[doc = concat!("Forward: `", $forward_name, "`.")]
        pub static $forward: Kernel = Kernel {
            name: $forward_name,
            args: &[reads_as("x", $elem), reads_as("weight", $elem), reads_as("bias", $elem), writes_as("y", $elem)],
            wgsl: $wgsl,
            ..$of_forward
        };
        #[doc = concat!("Forward that keeps the pre-activation: `", $kept_name, "`.")]
        pub static $kept: Kernel = Kernel {
            name: $kept_name,
            args: &[reads_as("x", $elem), reads_as("weight", $elem), reads_as("bias", $elem), writes_as("y", $elem), writes_as("kept", $elem)],
            wgsl: $wgsl,
            ..$of_kept
        };
        #[doc = concat!("Gradient with respect to x: `", $grad_x_name, "`.")]
        pub static $grad_x: Kernel = Kernel {
            name: $grad_x_name,
            args: &[reads_as("grad_y", $elem), reads_as("kept", $elem), reads_as("weight", $elem), writes_as("grad_x", $elem)],
            wgsl: $wgsl,
            ..$of_grad_x
        };
        #[doc = concat!("Gradient with respect to weight and bias, to be rounded by split_sum: `", $grad_weight_name, "`.")]
        pub static $grad_weight: Kernel = Kernel {
            name: $grad_weight_name,
            args: &[reads_as("x", $elem), reads_as("grad_y", $elem), reads_as("kept", $elem), writes("grad_weight"), writes("grad_bias")],
            wgsl: $wgsl,
            ..$of_grad_weight
        };
    )*};
}
stored! {
    Elem::F16, wgsl!("linear"),
    LINEAR_FORWARD_F16 "linear_forward_f16",
    LINEAR_FORWARD_KEPT_F16 "linear_forward_kept_f16",
    LINEAR_GRAD_X_F16 "linear_grad_x_f16",
    LINEAR_GRAD_WEIGHT_F16 "linear_grad_weight_f16",
    from LINEAR_FORWARD LINEAR_FORWARD_KEPT LINEAR_GRAD_X LINEAR_GRAD_WEIGHT;
    LINEAR_FORWARD_SMALL_F16 "linear_forward_small_f16",
    LINEAR_FORWARD_KEPT_SMALL_F16 "linear_forward_kept_small_f16",
    LINEAR_GRAD_X_SMALL_F16 "linear_grad_x_small_f16",
    LINEAR_GRAD_WEIGHT_SMALL_F16 "linear_grad_weight_small_f16",
    from LINEAR_FORWARD_SMALL LINEAR_FORWARD_KEPT_SMALL LINEAR_GRAD_X_SMALL LINEAR_GRAD_WEIGHT_SMALL;
}

stored! {
    Elem::Bf16, None,
    LINEAR_FORWARD_BF16 "linear_forward_bf16",
    LINEAR_FORWARD_KEPT_BF16 "linear_forward_kept_bf16",
    LINEAR_GRAD_X_BF16 "linear_grad_x_bf16",
    LINEAR_GRAD_WEIGHT_BF16 "linear_grad_weight_bf16",
    from LINEAR_FORWARD LINEAR_FORWARD_KEPT LINEAR_GRAD_X LINEAR_GRAD_WEIGHT;
    LINEAR_FORWARD_SMALL_BF16 "linear_forward_small_bf16",
    LINEAR_FORWARD_KEPT_SMALL_BF16 "linear_forward_kept_small_bf16",
    LINEAR_GRAD_X_SMALL_BF16 "linear_grad_x_small_bf16",
    LINEAR_GRAD_WEIGHT_SMALL_BF16 "linear_grad_weight_small_bf16",
    from LINEAR_FORWARD_SMALL LINEAR_FORWARD_KEPT_SMALL LINEAR_GRAD_X_SMALL LINEAR_GRAD_WEIGHT_SMALL;
}

/// A kernel by what its arguments are stored in: f32, f16, bf16.
type ByStorage = [&'static Kernel; 3];
const FORWARD: [ByStorage; 2] =
    [[&LINEAR_FORWARD, &LINEAR_FORWARD_F16, &LINEAR_FORWARD_BF16], [&LINEAR_FORWARD_SMALL, &LINEAR_FORWARD_SMALL_F16, &LINEAR_FORWARD_SMALL_BF16]];
const FORWARD_KEPT: [ByStorage; 2] = [
    [&LINEAR_FORWARD_KEPT, &LINEAR_FORWARD_KEPT_F16, &LINEAR_FORWARD_KEPT_BF16],
    [&LINEAR_FORWARD_KEPT_SMALL, &LINEAR_FORWARD_KEPT_SMALL_F16, &LINEAR_FORWARD_KEPT_SMALL_BF16],
];
const GRAD_X: [ByStorage; 2] =
    [[&LINEAR_GRAD_X, &LINEAR_GRAD_X_F16, &LINEAR_GRAD_X_BF16], [&LINEAR_GRAD_X_SMALL, &LINEAR_GRAD_X_SMALL_F16, &LINEAR_GRAD_X_SMALL_BF16]];
const GRAD_WEIGHT: [ByStorage; 2] = [
    [&LINEAR_GRAD_WEIGHT, &LINEAR_GRAD_WEIGHT_F16, &LINEAR_GRAD_WEIGHT_BF16],
    [&LINEAR_GRAD_WEIGHT_SMALL, &LINEAR_GRAD_WEIGHT_SMALL_F16, &LINEAR_GRAD_WEIGHT_SMALL_BF16],
];

/// The kernel and its tile for a result of this size.
fn chosen(of: &[ByStorage; 2], stored: Elem, large: bool) -> (&'static Kernel, [u64; 2]) {
    let [in_f32, in_f16, in_bf16] = of[usize::from(!large)];
    let kernel = match stored {
        Elem::F16 => in_f16,
        Elem::Bf16 => in_bf16,
        _ => in_f32,
    };
    (kernel, if large { LARGE } else { SMALL })
}

// ---- the reference ------------------------------------------------------------------------------------------------------

fn linear_forward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LinearParams = launch.params()?;
    let (x, weight, bias, y) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let mut kept = launch.real_mut().ok();
    let (n, i, o) = (p.rows as usize, p.inputs as usize, p.outputs as usize);
    let activation = Activation::of_word(p.activation);
    for m in 0..p.models as usize {
        for row in 0..n {
            let x = &x[((if p.x_models == 1 { 0 } else { m }) * n + row) * i..][..i];
            for out in 0..o {
                let w = &weight[(m * o + out) * i..][..i];
                let start = if p.flags & flag::BIAS != 0 { bias[m * o + out] } else { R::ZERO };
                let sum = x.iter().zip(w).fold(start, |sum, (&x, &w)| sum + x * w);
                let at = (m * n + row) * o + out;
                y[at] = activation.apply(sum);
                if let Some(kept) = &mut kept {
                    kept[at] = sum;
                }
            }
        }
    }
    Ok(())
}

fn linear_grad_x_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LinearParams = launch.params()?;
    let (grad_y, kept, weight, grad_x) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let (n, i, o) = (p.rows as usize, p.inputs as usize, p.outputs as usize);
    let activation = Activation::of_word(p.activation);
    if p.flags & flag::CONTINUE == 0 {
        grad_x.fill(R::ZERO);
    }
    for m in 0..p.models as usize {
        for row in 0..n {
            let out = &mut grad_x[((if p.x_models == 1 { 0 } else { m }) * n + row) * i..][..i];
            for j in 0..o {
                let at = (m * n + row) * o + j;
                let g = grad_y[at] * activation.slope(kept[at]);
                out.iter_mut().zip(&weight[(m * o + j) * i..]).for_each(|(out, &w)| *out += g * w);
            }
        }
    }
    Ok(())
}

fn linear_grad_weight_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LinearParams = launch.params()?;
    let (x, grad_y, kept) = (launch.real()?, launch.real()?, launch.real()?);
    let (grad_weight, grad_bias) = (launch.real_mut()?, launch.real_mut()?);
    let activation = Activation::of_word(p.activation);
    each_split(&p, grad_weight, grad_bias, |m, rows, outputs, grad_weight, grad_bias| {
        let (n, i, o) = (p.rows as usize, p.inputs as usize, p.outputs as usize);
        let (mut grad_weight, mut grad_bias) = (grad_weight, grad_bias);
        grad_weight.iter_mut().chain(grad_bias.iter_mut()).for_each(|x| x.fill(R::ZERO));
        for row in rows {
            let x = &x[((if p.x_models == 1 { 0 } else { m }) * n + row) * i..][..i];
            for (j, out) in outputs.clone().enumerate() {
                let at = (m * n + row) * o + out;
                let g = grad_y[at] * activation.slope(kept[at]);
                if let Some(grad_weight) = &mut grad_weight {
                    grad_weight[j * i..(j + 1) * i].iter_mut().zip(x).for_each(|(sum, &x)| *sum += g * x);
                }
                if let Some(grad_bias) = &mut grad_bias {
                    grad_bias[j] += g;
                }
            }
        }
    });
    Ok(())
}

/// Outputs of a piece of grad_weight: a multiple of the micro-tile's rows.
const PIECE: usize = 96;

/// Runs `work(model, rows, outputs, grad_weight [outputs,I], grad_bias [outputs])` for every split and piece of outputs, in parallel.
fn each_split<R: Real>(
    p: &LinearParams,
    grad_weight: &mut [R],
    grad_bias: &mut [R],
    work: impl Fn(usize, Range<usize>, Range<usize>, Option<&mut [R]>, Option<&mut [R]>) + Sync,
) {
    let (n, i, o, splits) = (p.rows as usize, p.inputs as usize, p.outputs as usize, p.splits as usize);
    let wanted = |bit: u32| p.flags & bit != 0;
    let empty = |count: usize| (0..count).map(|_| None).collect::<Vec<Option<&mut [R]>>>();
    let count = p.models as usize * splits;
    type Parts<'a, R> = Vec<Option<&'a mut [R]>>;
    let (weights, biases): (Parts<'_, R>, Parts<'_, R>) = if wanted(flag::PARTIAL) {
        grad_weight.chunks_exact_mut(o * i + o).take(count).map(|partial| partial.split_at_mut(o * i)).map(|(w, b)| (Some(w), Some(b))).unzip()
    } else {
        let weights = if wanted(flag::GRAD_WEIGHT) { grad_weight.chunks_exact_mut(o * i).map(Some).collect() } else { empty(count) };
        let biases = if wanted(flag::GRAD_BIAS) { grad_bias.chunks_exact_mut(o).map(Some).collect() } else { empty(count) };
        (weights, biases)
    };
    weights.into_par_iter().zip(biases).take(count).enumerate().for_each(|(at, (weight, bias))| {
        let (m, s) = (at / splits, at % splits);
        let rows = s * p.split_rows as usize..((s + 1) * p.split_rows as usize).min(n);
        let pieces = o.div_ceil(PIECE);
        let weight: Vec<Option<&mut [R]>> =
            weight.filter(|_| wanted(flag::GRAD_WEIGHT)).map_or_else(|| empty(pieces), |w| w.chunks_mut(PIECE * i).map(Some).collect());
        let bias: Vec<Option<&mut [R]>> = bias.filter(|_| wanted(flag::GRAD_BIAS)).map_or_else(|| empty(pieces), |b| b.chunks_mut(PIECE).map(Some).collect());
        weight.into_par_iter().zip(bias).enumerate().for_each(|(piece, (weight, bias))| {
            work(m, rows.clone(), piece * PIECE..((piece + 1) * PIECE).min(o), weight, bias);
        });
    });
}

// ---- the fast f32 column --------------------------------------------------------------------------------------------------

/// Rows that a task of one model takes, and that stay in the second-level cache between product and activation.
const TASK_ROWS: usize = 96;
/// Models from which on a task is a whole model.
const MANY: usize = 8;

fn forward_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: LinearParams = launch.params()?;
    let (x, weight, bias, y) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let kept = launch.real_mut().ok();
    let (n, i, o, arch) = (p.rows as usize, p.inputs as usize, p.outputs as usize, Arch::new());
    let model = |m: usize| ForwardModel {
        x: if p.x_models == 1 { x } else { &x[m * n * i..(m + 1) * n * i] },
        weight: &weight[m * o * i..(m + 1) * o * i],
        bias: (p.flags & flag::BIAS != 0).then(|| &bias[m * o..(m + 1) * o]),
        inputs: i,
        outputs: o,
        activation: Activation::of_word(p.activation),
    };
    let kepts: Vec<Option<&mut [f32]>> = match kept {
        Some(kept) => kept.chunks_exact_mut(n * o).map(Some).collect(),
        None => (0..p.models).map(|_| None).collect(),
    };
    let models = y.chunks_exact_mut(n * o).zip(kepts).take(p.models as usize).enumerate();
    if p.models as usize >= MANY || n <= TASK_ROWS {
        let mut models: Vec<_> = models.collect();
        // A task of models, not of one: small ones take less than handing them out.
        let at_once = (16_384 / (n * o * (i + 16)).max(1)).clamp(1, 64);
        models.par_chunks_mut(at_once).for_each(|some| {
            arch.dispatch(ForwardModels { some, model: &model });
        });
    } else {
        for (m, (y, kept)) in models {
            let model = model(m);
            let mut memory = take_memory(arch.dispatch(PackedLen(i, o)));
            let memory = memory.reals();
            arch.dispatch(PackRight { right: Right { data: model.weight, stride: i, along_depth: true }, depth: i, columns: o, memory });
            let memory = &*memory;
            let kepts: Vec<Option<&mut [f32]>> = match kept {
                Some(kept) => kept.chunks_mut(TASK_ROWS * o).map(Some).collect(),
                None => (0..n.div_ceil(TASK_ROWS)).map(|_| None).collect(),
            };
            y.par_chunks_mut(TASK_ROWS * o).zip(kepts).enumerate().for_each(|(task, (y, kept))| {
                arch.dispatch(ForwardRows { model: &model, memory, row: task * TASK_ROWS, y, kept });
            });
        }
    }
    Ok(())
}

struct PackedLen(usize, usize);

impl WithSimd for PackedLen {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        gemm_lanes::packed_len::<S>(self.0, self.1)
    }
}

struct PackRight<'a> {
    right: Right<'a>,
    depth: usize,
    columns: usize,
    memory: &'a mut [f32],
}

impl WithSimd for PackRight<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        Packed::right(simd, self.right, self.depth, self.columns, self.memory);
    }
}

/// One model, and what its rows share.
struct ForwardModel<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    inputs: usize,
    outputs: usize,
    activation: Activation,
}

impl ForwardModel<'_> {
    #[inline(always)]
    fn rows<S: Simd>(&self, simd: S, packed: &Packed<'_>, row: usize, y: &mut [f32], kept: Option<&mut [f32]>) {
        let start = self.bias.map_or(Start::Zero, Start::Bias);
        let left = Left::Rows { data: &self.x[row * self.inputs..], stride: self.inputs };
        gemm_lanes::multiply(simd, left, packed, y.len() / self.outputs, start, y, self.outputs);
        activation::apply(simd, self.activation, y, kept);
    }
}

struct ForwardRows<'a, 'k> {
    model: &'a ForwardModel<'a>,
    memory: &'a [f32],
    row: usize,
    y: &'a mut [f32],
    kept: Option<&'k mut [f32]>,
}

impl WithSimd for ForwardRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let packed = Packed::again(simd, self.model.inputs, self.model.outputs, self.memory);
        self.model.rows(simd, &packed, self.row, self.y, self.kept);
    }
}

/// y and the kept pre-activation of a model, with its index.
type ModelOut<'a> = (usize, (&'a mut [f32], Option<&'a mut [f32]>));

struct ForwardModels<'a, 'o, F> {
    some: &'a mut [ModelOut<'o>],
    model: &'a F,
}

impl<'x, F: Fn(usize) -> ForwardModel<'x>> WithSimd for ForwardModels<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (m, (y, kept)) in self.some.iter_mut() {
            let model = (self.model)(*m);
            let mut memory = take_memory(gemm_lanes::packed_len::<S>(model.inputs, model.outputs));
            let right = Right { data: model.weight, stride: model.inputs, along_depth: true };
            let packed = Packed::right(simd, right, model.inputs, model.outputs, memory.reals());
            let rows = TASK_ROWS * model.outputs;
            for (task, y) in y.chunks_mut(rows).enumerate() {
                let kept = kept.as_mut().map(|kept| &mut kept[task * rows..][..y.len()]);
                model.rows(simd, &packed, task * TASK_ROWS, y, kept);
            }
        }
    }
}

fn grad_x_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: LinearParams = launch.params()?;
    let (grad_y, kept, weight, grad_x) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let (n, i, o, arch) = (p.rows as usize, p.inputs as usize, p.outputs as usize, Arch::new());
    // A shared x sums over models, so a task is rows of all models; else a model is its own.
    let summed = if p.x_models == 1 { p.models as usize } else { 1 };
    let many = p.x_models as usize >= MANY;
    let task_rows = if many || n <= TASK_ROWS { n } else { (4 * TASK_ROWS).min(n.div_ceil(16).next_multiple_of(TASK_ROWS)) };
    let tasks: Vec<(usize, usize, &mut [f32])> = grad_x
        .chunks_exact_mut(n * i)
        .take(p.x_models as usize)
        .enumerate()
        .flat_map(|(m, grad_x)| grad_x.chunks_mut(task_rows * i).enumerate().map(move |(task, rows)| (m, task * task_rows, rows)))
        .collect();
    let shared = GradX { grad_y, kept, weight, n, i, o, summed, keep: p.flags & flag::CONTINUE != 0, activation: Activation::of_word(p.activation) };
    let mut tasks = tasks;
    let at_once = (16_384 / (n * o * (i + 16)).max(1)).clamp(1, 64);
    tasks.par_chunks_mut(at_once).for_each(|some| arch.dispatch(GradXTasks { shared: &shared, some }));
    Ok(())
}

struct GradX<'a> {
    grad_y: &'a [f32],
    kept: &'a [f32],
    weight: &'a [f32],
    n: usize,
    i: usize,
    o: usize,
    /// Models that are summed into one grad_x.
    summed: usize,
    keep: bool,
    activation: Activation,
}

struct GradXTasks<'a, 'o> {
    shared: &'a GradX<'a>,
    some: &'a mut [(usize, usize, &'o mut [f32])],
}

impl WithSimd for GradXTasks<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let GradX { grad_y, kept, weight, n, i, o, summed, keep, activation } = *self.shared;
        let mut memory = take_memory(gemm_lanes::packed_len::<S>(o, i) + TASK_ROWS * o);
        let (slopes, panels) = memory.reals().split_at_mut(TASK_ROWS * o);
        for (first, row, grad_x) in self.some.iter_mut() {
            for (turn, m) in (*first * summed..(*first + 1) * summed).enumerate() {
                let right = Right { data: &weight[m * o * i..(m + 1) * o * i], stride: i, along_depth: false };
                let packed = Packed::right(simd, right, o, i, panels);
                for (task, out) in grad_x.chunks_mut(TASK_ROWS * i).enumerate() {
                    let rows = out.len() / i;
                    let at = (m * n + *row + task * TASK_ROWS) * o;
                    let range = at..at + rows * o;
                    let data = if activation == Activation::None {
                        &grad_y[range]
                    } else {
                        activation::pull_back(simd, activation, &grad_y[range.clone()], &kept[range], &mut slopes[..rows * o]);
                        &slopes[..rows * o]
                    };
                    let start = if turn == 0 && !keep { Start::Zero } else { Start::Kept };
                    gemm_lanes::multiply(simd, Left::Rows { data, stride: o }, &packed, rows, start, out, i);
                }
            }
        }
    }
}

fn grad_weight_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: LinearParams = launch.params()?;
    let (x, grad_y, kept) = (launch.real()?, launch.real()?, launch.real()?);
    let (grad_weight, grad_bias) = (launch.real_mut()?, launch.real_mut()?);
    let (n, i, o, arch) = (p.rows as usize, p.inputs as usize, p.outputs as usize, Arch::new());
    let activation = Activation::of_word(p.activation);
    each_split(&p, grad_weight, grad_bias, |m, rows, outputs, grad_weight, grad_bias| {
        let x = if p.x_models == 1 { x } else { &x[m * n * i..(m + 1) * n * i] };
        let at = m * n * o;
        arch.dispatch(GradWeight { x, grad_y: &grad_y[at..at + n * o], kept: &kept[at..at + n * o], i, o, activation, rows, outputs, grad_weight, grad_bias });
    });
    Ok(())
}

struct GradWeight<'a> {
    x: &'a [f32],
    grad_y: &'a [f32],
    kept: &'a [f32],
    i: usize,
    o: usize,
    activation: Activation,
    rows: Range<usize>,
    outputs: Range<usize>,
    grad_weight: Option<&'a mut [f32]>,
    grad_bias: Option<&'a mut [f32]>,
}

impl WithSimd for GradWeight<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let GradWeight { x, grad_y, kept, i, o, activation, rows, outputs, mut grad_weight, mut grad_bias } = self;
        let count = outputs.len();
        let deepest = DEPTH.min(rows.len());
        let (panels, strips) = (gemm_lanes::packed_len::<S>(deepest, i), gemm_lanes::strips_len(count, deepest));
        let mut memory = take_memory(panels + strips + count);
        let (panels, rest) = memory.reals().split_at_mut(panels);
        let (strips, slopes) = rest.split_at_mut(strips);
        if let Some(grad_bias) = &mut grad_bias {
            grad_bias.fill(0.0);
        }
        if let (true, Some(grad_weight)) = (rows.is_empty(), &mut grad_weight) {
            grad_weight.fill(0.0);
        }
        for k0 in rows.clone().step_by(DEPTH) {
            let deep = DEPTH.min(rows.end - k0);
            let strips = &mut strips[..gemm_lanes::strips_len(count, deep)];
            for k in 0..deep {
                let at = (k0 + k) * o + outputs.start;
                let row = if activation == Activation::None {
                    &grad_y[at..at + count]
                } else {
                    activation::pull_back(simd, activation, &grad_y[at..at + count], &kept[at..at + count], slopes);
                    &*slopes
                };
                gemm_lanes::pack_left(row, k, deep, strips);
                if let Some(grad_bias) = &mut grad_bias {
                    grad_bias.iter_mut().zip(row).for_each(|(sum, &g)| *sum += g);
                }
            }
            if let Some(grad_weight) = &mut grad_weight {
                let packed = Packed::right(simd, Right { data: &x[k0 * i..], stride: i, along_depth: false }, deep, i, panels);
                let start = if k0 == rows.start { Start::Zero } else { Start::Kept };
                gemm_lanes::multiply(simd, Left::Strips(strips), &packed, count, start, grad_weight, i);
            }
        }
    }
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// Sizes and options of a dense layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Linear {
    /// Independent weight sets M.
    pub models: u64,
    /// Models of x: M, or 1 where all share it.
    pub x_models: u64,
    /// Rows N.
    pub rows: u64,
    /// Values I of a row of x.
    pub inputs: u64,
    /// Values O of a row of y.
    pub outputs: u64,
    /// Whether there is a bias.
    pub bias: bool,
    /// What is applied to the result.
    pub activation: Activation,
    /// What x, weight, bias, y, what is kept, and their gradients are stored in: f32, f16 or bf16.
    pub stored: Elem,
}

const OP: &str = "linear";

/// Where scratch has a value that stands for an output that nobody wants: behind the partial results, at a start that any device binds.
fn unused_at(partials: u64) -> u64 {
    partials.next_multiple_of(64)
}

impl Linear {
    /// Refuses sizes that no device can take: zero models, inputs or outputs, an x of some but not all models, indices beyond 32 bits.
    /// # Errors
    /// `Parameter` naming the size.
    pub fn check(&self) -> Result<()> {
        let wrong = |name: &str, value: u64, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
        for (name, size) in [("models", self.models), ("inputs", self.inputs), ("outputs", self.outputs)] {
            if size == 0 || size > u64::from(u32::MAX) / 64 {
                return wrong(name, size, "must be between 1 and 67,108,863");
            }
        }
        if self.stored == Elem::U32 {
            let help = "must be f32, f16 or bf16".into();
            return Err(Error::Parameter { op: OP, name: "stored".into(), value: "u32".into(), help });
        }
        if self.x_models != 1 && self.x_models != self.models {
            return wrong("x_models", self.x_models, "must be 1 (shared by all models) or the number of models");
        }
        if self.rows > u64::from(u32::MAX) / 64 {
            return wrong("rows", self.rows, "must be at most 67,108,863");
        }
        let largest = self.models.saturating_mul(self.rows.max(self.outputs)).saturating_mul(self.inputs.max(self.outputs));
        if largest > u64::MAX / 1024 {
            return wrong("models", self.models, "with these sizes has more values than 64 bits count; use fewer");
        }
        Ok(())
    }

    /// Reals that forward keeps for backward besides y: the pre-activation for gelu and silu, else 0.
    pub fn saved(&self) -> u64 {
        if self.activation.keeps_input() { self.models * self.rows * self.outputs } else { 0 }
    }

    /// Reals of scratch that forward needs.
    pub fn scratch(&self) -> u64 {
        0
    }

    /// Reals of scratch that backward needs: at least one, to stand where a gradient is not wanted.
    pub fn scratch_backward(&self, device: &Device) -> u64 {
        let (splits, _) = self.splits(device);
        let partials = self.models * splits * self.outputs * (self.inputs + 1);
        if self.stored.is_half() {
            unused_at(partials) + 1
        } else if splits > 1 {
            partials
        } else {
            1
        }
    }

    /// Splits of the rows in grad_weight, and rows of a split: by the shape and the kind of device alone.
    fn splits(&self, device: &Device) -> (u64, u64) {
        let (unit, wanted) = match device.info().kind {
            DeviceKind::Reference => (u64::MAX, 1),
            // Work for some threads.
            DeviceKind::Cpu => (512, (16 / (self.models * self.outputs.div_ceil(PIECE as u64))).max(1)),
            // Two tiles for each processor of a large GPU, and no sum beyond 4,096 rows.
            _ => {
                let tile = if is_large(self.outputs, self.inputs) { LARGE } else { SMALL };
                (128, (256 / (self.models * tiles(self.outputs, self.inputs, tile))).max(self.rows.div_ceil(4096)).max(1))
            }
        };
        let rows = self.rows.div_ceil(wanted).max(1).div_ceil(unit).saturating_mul(unit).min(self.rows.max(1));
        (self.rows.div_ceil(rows).max(1), rows)
    }

    fn params(&self) -> LinearParams {
        LinearParams {
            models: self.models as u32,
            x_models: self.x_models as u32,
            rows: self.rows as u32,
            inputs: self.inputs as u32,
            outputs: self.outputs as u32,
            activation: self.activation.word(),
            flags: 0,
            splits: 1,
            split_rows: self.rows as u32,
        }
    }

    /// Runs of models with all their rows, or of rows of one model, that one launch can take. `rows` counts units of `unit` rows.
    fn parts(&self, device: &Device, groups: u64, unit: u64) -> Result<Vec<(Range<u64>, Range<u64>)>> {
        let (n, wide) = (self.rows, self.inputs.max(self.outputs));
        let work = 2 * self.inputs * self.outputs;
        let limits = device.limits();
        let fits = n * wide <= limits.binding_bytes / 4 && n.saturating_mul(work) <= limits.work_per_launch;
        if fits {
            let runs = device.plan(OP, self.models, (n * wide).max(self.inputs * self.outputs), groups, n * work)?;
            return Ok(runs.into_iter().map(|run| (run, 0..n)).collect());
        }
        let units = device.plan(OP, n.div_ceil(unit), unit * wide, groups.div_ceil(n.div_ceil(unit)), unit * work)?;
        let rows = move |run: &Range<u64>| run.start * unit..(run.end * unit).min(n);
        Ok((0..self.models).flat_map(|m| units.iter().map(move |run| (m..m + 1, rows(run))).collect::<Vec<_>>()).collect())
    }

    /// Range of x for some models and rows.
    fn x_range(&self, models: &Range<u64>, rows: &Range<u64>) -> Range<u64> {
        let models = if self.x_models == 1 { 0..1 } else { models.clone() };
        self.range(&models, rows, self.inputs)
    }

    /// Range of [M,N,width] for all rows of some models, or some rows of one.
    fn range(&self, models: &Range<u64>, rows: &Range<u64>, width: u64) -> Range<u64> {
        (models.start * self.rows + rows.start) * width..((models.end - 1) * self.rows + rows.end) * width
    }
}

fn expect(stored: Elem, arg: &str, view: &View, len: u64, shape: String) -> Result<()> {
    if view.len() == len && view.elem() == stored {
        return Ok(());
    }
    let (want, have) = (stored.wgsl(), view.elem().wgsl());
    Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{shape} = {len} values of {want}"), got: format!("{} values of {have}", view.len()) })
}

/// Inputs and outputs of [`linear`].
#[derive(Debug, Clone)]
pub struct LinearArgs {
    /// [M or 1,N,I].
    pub x: View,
    /// [M,O,I].
    pub weight: View,
    /// [M,O], exactly where [`Linear::bias`] says so.
    pub bias: Option<View>,
    /// Result [M,N,O].
    pub y: View,
    /// What backward needs, [`Linear::saved`] reals; `None` where there is no backward.
    pub saved: Option<View>,
}

/// Records y. Rows = 0 records nothing.
/// # Errors
/// `Parameter`, `Shape` and `TooLarge` as [`Linear::check`] and the lengths of the views say.
pub fn linear(pass: &mut Pass, op: &Linear, args: &LinearArgs) -> Result<()> {
    op.check()?;
    let Linear { models, x_models, rows, inputs, outputs, .. } = *op;
    expect(op.stored, "x", &args.x, x_models * rows * inputs, format!("[{x_models},{rows},{inputs}]"))?;
    expect(op.stored, "weight", &args.weight, models * outputs * inputs, format!("[{models},{outputs},{inputs}]"))?;
    expect(op.stored, "y", &args.y, models * rows * outputs, format!("[{models},{rows},{outputs}]"))?;
    match (&args.bias, op.bias) {
        (Some(bias), true) => expect(op.stored, "bias", bias, models * outputs, format!("[{models},{outputs}]"))?,
        (None, false) => {}
        (given, _) => {
            let said = |there: bool| if there { "a bias" } else { "none" };
            return Err(Error::Shape { op: OP, arg: "bias".into(), expected: said(op.bias).into(), got: said(given.is_some()).into() });
        }
    }
    let kept = args.saved.as_ref().filter(|_| op.saved() > 0);
    if let Some(kept) = &args.saved {
        expect(op.stored, "saved", kept, op.saved(), "the pre-activation where it is kept".into())?;
    }
    if rows == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    device.check_rounds(OP, inputs.div_ceil(STEP) * (STEP + 9), "rounds")?;
    let (kernel, tile) = chosen(if kept.is_some() { &FORWARD_KEPT } else { &FORWARD }, op.stored, is_large(rows, outputs));
    for (m, n) in op.parts(&device, tiles(rows, outputs, tile), 64)? {
        let x = pass.input(&args.x, op.x_range(&m, &n))?;
        let weight = pass.input(&args.weight, m.start * outputs * inputs..m.end * outputs * inputs)?;
        let bias = args.bias.as_ref().map(|bias| pass.input(bias, m.start * outputs..m.end * outputs)).transpose()?;
        let y = pass.output(&args.y, op.range(&m, &n, outputs))?;
        let count = (m.end - m.start) as u32;
        let params = LinearParams {
            models: count,
            x_models: if x_models == 1 { 1 } else { count },
            rows: (n.end - n.start) as u32,
            flags: if bias.is_some() { flag::BIAS } else { 0 },
            ..op.params()
        };
        let mut views = vec![x, weight.clone(), bias.unwrap_or(weight), y.view.clone()];
        let kept = kept.map(|kept| pass.output(kept, op.range(&m, &n, outputs))).transpose()?;
        views.extend(kept.iter().map(|kept| kept.view.clone()));
        pass.launch(kernel, &params, &views)?;
        pass.finish(y)?;
        if let Some(kept) = kept {
            pass.finish(kept)?;
        }
    }
    Ok(())
}

/// Inputs and outputs of [`linear_backward`]. A gradient that is `None` is not computed.
#[derive(Debug, Clone)]
pub struct LinearBackwardArgs {
    /// [M or 1,N,I].
    pub x: View,
    /// [M,O,I].
    pub weight: View,
    /// y of forward for relu, tanh and sigmoid; its `saved` for gelu and silu; not read without activation.
    pub kept: Option<View>,
    /// [M,N,O].
    pub grad_y: View,
    /// [M or 1,N,I], overwritten.
    pub grad_x: Option<View>,
    /// [M,O,I], overwritten.
    pub grad_weight: Option<View>,
    /// [M,O], overwritten.
    pub grad_bias: Option<View>,
    /// [`Linear::scratch_backward`] reals.
    pub scratch: View,
}

/// Records the gradients that are asked for. Without rows grad_weight and grad_bias are not written: the caller holds zeros.
/// # Errors
/// As [`linear`].
pub fn linear_backward(pass: &mut Pass, op: &Linear, args: &LinearBackwardArgs) -> Result<()> {
    op.check()?;
    let Linear { models, x_models, rows, inputs, outputs, .. } = *op;
    let device = pass.device().clone();
    expect(op.stored, "x", &args.x, x_models * rows * inputs, format!("[{x_models},{rows},{inputs}]"))?;
    expect(op.stored, "weight", &args.weight, models * outputs * inputs, format!("[{models},{outputs},{inputs}]"))?;
    expect(op.stored, "grad_y", &args.grad_y, models * rows * outputs, format!("[{models},{rows},{outputs}]"))?;
    for (name, view, like) in [("grad_x", &args.grad_x, &args.x), ("grad_weight", &args.grad_weight, &args.weight)] {
        if let Some(view) = view {
            expect(op.stored, name, view, like.len(), format!("as {}", name.trim_start_matches("grad_")))?;
        }
    }
    if let Some(bias) = &args.grad_bias {
        expect(op.stored, "grad_bias", bias, models * outputs, format!("[{models},{outputs}]"))?;
    }
    let needed = op.scratch_backward(&device);
    if args.scratch.len() < needed || args.scratch.elem() != Elem::F32 {
        let got = format!("{} values of {}", args.scratch.len(), args.scratch.elem().wgsl());
        return Err(Error::Shape { op: OP, arg: "scratch".into(), expected: format!("at least {needed} values of f32 (scratch_backward)"), got });
    }
    let kept = match (&args.kept, op.activation) {
        (_, Activation::None) => args.grad_y.clone(),
        (Some(kept), _) => kept.clone(),
        (None, activation) => {
            let expected = format!("what backward of {} needs", activation.name());
            return Err(Error::Shape { op: OP, arg: "kept".into(), expected, got: "none".into() });
        }
    };
    expect(op.stored, "kept", &kept, models * rows * outputs, format!("[{models},{rows},{outputs}]"))?;
    if rows == 0 {
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

fn record_grad_x(pass: &mut Pass, op: &Linear, args: &LinearBackwardArgs, kept: &View, grad_x: &View) -> Result<()> {
    let Linear { models, x_models, rows, inputs, outputs, .. } = *op;
    let device = pass.device().clone();
    let large = is_large(rows, inputs);
    let (kernel, tile) = chosen(&GRAD_X, op.stored, large);
    let rounds = outputs.div_ceil(STEP) * (STEP + 9);
    device.check_rounds(OP, rounds, "rounds")?;
    let shared = x_models == 1;
    // A thread of a shared x loops over the models of its launch.
    let most = if shared { (device.limits().loop_rounds / (rounds + 1)).max(1) } else { u64::MAX };
    let mut parts = Vec::new();
    for (m, n) in op.parts(&device, tiles(rows, inputs, tile), 64)? {
        let step = most.min(m.end - m.start);
        parts.extend((m.start..m.end).step_by(step as usize).map(|from| (from..(from + step).min(m.end), n.clone())));
    }
    if shared {
        // All models of some rows, then the next rows.
        parts.sort_by_key(|(m, n)| (n.start, m.start));
        let together = parts.iter().filter(|(_, n)| n.start == 0).count();
        if together > 1 && op.stored.is_half() {
            return Err(Error::TooLarge {
                what: format!("{OP}: grad_x of an x that {models} models share, summed in {}", op.stored.wgsl()),
                needed: models,
                limit: models.div_ceil(together as u64),
                unit: "models in a launch",
                help: "cast x to f32, or give each model its own x".into(),
            });
        }
    }
    let mut open: Option<crate::device::Output> = None;
    for (at, (m, n)) in parts.iter().enumerate() {
        let fresh = !shared || m.start == 0;
        if fresh {
            open = Some(pass.output(grad_x, op.x_range(m, n))?);
        }
        let Some(out) = &open else { return Err(Error::Internal("grad_x of a shared x starts without its first model".into())) };
        let view = out.view.clone();
        let count = (m.end - m.start) as u32;
        let params = LinearParams {
            models: count,
            x_models: if shared { 1 } else { count },
            rows: (n.end - n.start) as u32,
            flags: if fresh { 0 } else { flag::CONTINUE },
            ..op.params()
        };
        let grad_y = pass.input(&args.grad_y, op.range(m, n, outputs))?;
        let kept = pass.input(kept, op.range(m, n, outputs))?;
        let weight = pass.input(&args.weight, m.start * outputs * inputs..m.end * outputs * inputs)?;
        pass.launch(kernel, &params, &[grad_y, kept, weight, view])?;
        let last = parts.get(at + 1).is_none_or(|(next, _)| !shared || next.start == 0);
        if let (true, Some(out)) = (last, open.take_if(|_| last)) {
            pass.finish(out)?;
        }
    }
    Ok(())
}

fn record_grad_weight(pass: &mut Pass, op: &Linear, args: &LinearBackwardArgs, kept: &View) -> Result<()> {
    let Linear { models, x_models, inputs, outputs, .. } = *op;
    let device = pass.device().clone();
    let (splits, split_rows) = op.splits(&device);
    let large = is_large(outputs, inputs);
    let (kernel, tile) = chosen(&GRAD_WEIGHT, op.stored, large);
    let partial = splits > 1 || op.stored.is_half();
    device.check_rounds(OP, split_rows.div_ceil(STEP) * (2 * STEP + 9), "rounds")?;
    let wanted = |view: &Option<View>, bit: u32| if view.is_some() { bit } else { 0 };
    let flags = wanted(&args.grad_weight, flag::GRAD_WEIGHT) | wanted(&args.grad_bias, flag::GRAD_BIAS);
    let width = outputs * inputs + outputs;
    for (m, n) in op.parts(&device, splits * tiles(outputs, inputs, tile), split_rows)? {
        let count = (m.end - m.start) as u32;
        let first = n.start / split_rows;
        let here = (n.end - n.start).div_ceil(split_rows);
        let params = LinearParams {
            models: count,
            x_models: if x_models == 1 { 1 } else { count },
            rows: (n.end - n.start) as u32,
            splits: here as u32,
            split_rows: split_rows as u32,
            flags: flags | if partial { flag::PARTIAL } else { 0 },
            ..op.params()
        };
        let x = pass.input(&args.x, op.x_range(&m, &n))?;
        let grad_y = pass.input(&args.grad_y, op.range(&m, &n, outputs))?;
        let kept = pass.input(kept, op.range(&m, &n, outputs))?;
        let mut outs = Vec::new();
        let unused = if partial {
            outs.push(pass.output(&args.scratch, (m.start * splits + first) * width..((m.end - 1) * splits + first + here) * width)?);
            if op.stored.is_half() {
                let at = unused_at(models * splits * width);
                Some(pass.output(&args.scratch, at..at + 1)?.view)
            } else {
                args.grad_weight.as_ref().or(args.grad_bias.as_ref()).map(|view| view.part(0..1))
            }
        } else {
            for (view, each) in [(&args.grad_weight, outputs * inputs), (&args.grad_bias, outputs)] {
                if let Some(view) = view {
                    outs.push(pass.output(view, m.start * each..m.end * each)?);
                }
            }
            Some(args.scratch.part(0..1))
        };
        let mut views: Vec<View> = outs.iter().map(|out| out.view.clone()).collect();
        if let (1, Some(unused)) = (views.len(), unused) {
            let before = !partial && args.grad_weight.is_none();
            views.insert(if before { 0 } else { 1 }, unused);
        }
        pass.launch(kernel, &params, &[vec![x, grad_y, kept], views].concat())?;
        for out in outs {
            pass.finish(out)?;
        }
    }
    if partial {
        let sums = SplitSumParams { models: models as u32, splits: splits as u32, width: width as u32, first: 0, count: (outputs * inputs) as u32 };
        let partials = args.scratch.part(0..models * splits * width);
        if let Some(grad_weight) = &args.grad_weight {
            split_sum(pass, OP, sums, &partials, grad_weight)?;
        }
        if let Some(grad_bias) = &args.grad_bias {
            split_sum(pass, OP, SplitSumParams { first: (outputs * inputs) as u32, count: outputs as u32, ..sums }, &partials, grad_bias)?;
        }
    }
    Ok(())
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let shape = |name: &str| -> Result<[u64; 3]> {
        let dims: Vec<u64> = case.shape(name)?.iter().map(|&d| d as u64).collect();
        match dims[..] {
            [n, i] => Ok([1, n, i]),
            [m, n, i] => Ok([m, n, i]),
            _ => Err(Error::Shape { op: OP, arg: name.into(), expected: "[M,·,·] or [·,·]".into(), got: format!("{dims:?}") }),
        }
    };
    let ([x_models, rows, inputs], [models, outputs, _]) = (shape("x")?, shape("weight")?);
    let activation = if case.given("activation") { Activation::named(case.text("activation")?)? } else { Activation::None };
    let op = Linear { models, x_models, rows, inputs, outputs, bias: case.has("bias"), activation, stored: Elem::F32 };
    let upload = |name: &str| -> Result<View> { Ok(View::from(&device.upload(name, case.f32(name)?)?)) };
    let zeros = |name: &str, len: u64| -> Result<View> { Ok(View::from(&device.zeros(name, len)?)) };
    let (x, weight) = (upload("x")?, upload("weight")?);
    let bias = if op.bias { Some(upload("bias")?) } else { None };
    op.check()?;
    let y = zeros("y", models * rows * outputs)?;
    let saved = zeros("saved", op.saved())?;
    let mut pass = device.pass(OP);
    linear(&mut pass, &op, &LinearArgs { x: x.clone(), weight: weight.clone(), bias, y: y.clone(), saved: Some(saved.clone()) })?;
    let mut reads = vec![("y", pass.read(&y)?)];
    if case.has("grad_y") {
        let grad_x = zeros("grad_x", x.len())?;
        let grad_weight = zeros("grad_weight", weight.len())?;
        let grad_bias = if op.bias { Some(zeros("grad_bias", models * outputs)?) } else { None };
        let args = LinearBackwardArgs {
            x,
            weight,
            kept: Some(if activation.keeps_input() { saved } else { y }),
            grad_y: upload("grad_y")?,
            grad_x: Some(grad_x.clone()),
            grad_weight: Some(grad_weight.clone()),
            grad_bias: grad_bias.clone(),
            scratch: zeros("scratch", op.scratch_backward(device))?,
        };
        linear_backward(&mut pass, &op, &args)?;
        reads.extend([("grad_x", pass.read(&grad_x)?), ("grad_weight", pass.read(&grad_weight)?)]);
        if let Some(grad_bias) = &grad_bias {
            reads.push(("grad_bias", pass.read(grad_bias)?));
        }
    }
    let mut results = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        results.reals(name, done.f64(read)?);
    }
    Ok(results)
}
