//! Losses of predictions, one value per model, and their gradients.
//!
//! value[m] = Σ w·ℓ / Σ w over the model's elements (rows for the losses of classes), w the weight of a row, 1 where there are none;
//! a model whose weights are all 0 has loss 0 and gradient 0.  grad_prediction = grad_value[m]·w/Σw · ∂ℓ/∂x.
//! mse            (x−y)²
//! huber          ½e² for |e| < δ, else δ(|e| − ½δ), e = x−y
//! bce            (1−y)x + (1 + (c−1)y)·(ln(1+e^−|x|) + max(−x, 0)), x a logit, c the weight of positives
//! pinball        max(τ_q·e, (τ_q−1)·e), e = y−x, one column per quantile τ_q; y is shared by the columns
//! cross_entropy  lse(x) − (1−ε)x_y − ε·mean_c x_c, x [C] logits, y the class, ε the smoothing; rows with y ≥ C do not count
//! kl             Σ_c y_c·(ln y_c − x_c + lse(x)), y [C] probabilities, 0·ln 0 = 0
//!
//! Shapes   prediction, grad_prediction [M,N,C]; target [M or 1,N,C], pinball [M or 1,N], classes [M or 1,N] words; weight [M or 1,N];
//!          quantiles [C]; value, grad_value, total [M]. N rows, C columns (1 for a scalar).
//! Launch   forward: one workgroup per (model, block of 4,096 elements or 256 rows), then one per model sums the blocks in order;
//!          backward: the same blocks.
//! Saved    total [M], the sum of weights.
//! Scratch  [M, blocks, 2].
//! Floor    4 bytes per prediction and target forward, 12 backward.
//! Numerics a value that is not finite makes its own model's loss NaN and no other's. Logits are shifted by their largest.
//! Source   definitions and reductions as torch.nn.functional's, weights as means; Koenker & Bassett 1978 for pinball.
//! Files    shaders/loss.wgsl · cuda/loss.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Arg, Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

const OP: &str = "loss";

params! {
    /// Params of the kernels; a real is the sum of a field and its `_low`, which only f64 feels.
    pub struct LossParams {
        /// N, rows of a model.
        rows: u32,
        /// C, columns of a row.
        columns: u32,
        /// Blocks of a model.
        blocks: u32,
        /// First block of the launch, counted over all models.
        first: u32,
        /// Blocks, or models, of the launch.
        count: u32,
        /// Values before the bound ranges of prediction, target, weight and blocks, modulo 2^32.
        prediction_base: u32,
        /// The same for the target …
        target_base: u32,
        /// … for the weights …
        weight_base: u32,
        /// … and for the sums of blocks.
        block_base: u32,
        /// Elements of target and weight from one model to the next; 0: all share them.
        target_stride: u32,
        /// The same for the weights.
        weight_stride: u32,
        /// Which loss: the order of the header.
        kind: u32,
        /// 1: rows are weighted.
        weighted: u32,
        /// δ, the weight of positives, or ε.
        option: f32,
        /// What its rounding took away.
        option_low: f32,
    }
}

const WG: u32 = 256;
/// Elements of a workgroup, and rows where a row is one loss.
const BLOCK: u32 = 4096;
const ROWS: u32 = 256;
const CONSTANTS: &[(&str, u32)] = &[("BLOCK", BLOCK)];

const MSE: u32 = 0;
const HUBER: u32 = 1;
const BCE: u32 = 2;
const PINBALL: u32 = 3;

fn params(words: &[u32]) -> LossParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn count(words: &[u32]) -> u64 {
    u64::from(params(words).count)
}

const fn kernel(name: &'static str, about: &'static str, args: &'static [Arg], cpu: Cpu, bytes: f64) -> Kernel {
    let cost = Cost { unit: "block", units: count, bytes, flops: 4.0 * bytes };
    Kernel {
        name,
        about,
        args,
        params: layout::<LossParams>(),
        workgroup: WG,
        constants: CONSTANTS,
        groups: count,
        wgsl: wgsl!("loss"),
        cuda: cuda!("loss"),
        cpu: Some(cpu),
        cost,
    }
}

/// Sums of element-wise losses.
pub static LOSS_ELEMENTS: Kernel = kernel(
    "loss_elements",
    "sums of element-wise losses, block by block",
    &[reads("prediction"), reads("target"), reads("weight"), reads("quantiles"), writes("sums")],
    Cpu { f32: loss_elements_cpu::<f32>, f64: loss_elements_cpu::<f64> },
    8.0 * BLOCK as f64,
);

/// Gradients of element-wise losses.
pub static LOSS_ELEMENTS_BACKWARD: Kernel = kernel(
    "loss_elements_backward",
    "gradients of element-wise losses",
    &[reads("prediction"), reads("target"), reads("weight"), reads("quantiles"), reads("total"), reads("grad_value"), writes("grad_prediction")],
    Cpu { f32: loss_elements_backward_cpu::<f32>, f64: loss_elements_backward_cpu::<f64> },
    12.0 * BLOCK as f64,
);

/// Sums of cross-entropies.
pub static LOSS_CROSS_ENTROPY: Kernel = kernel(
    "loss_cross_entropy",
    "sums of cross-entropies of logits, block by block",
    &[reads("prediction"), reads_u32("classes"), reads("weight"), writes("sums")],
    Cpu { f32: loss_cross_entropy_cpu::<f32>, f64: loss_cross_entropy_cpu::<f64> },
    16.0 * ROWS as f64,
);

/// Gradients of cross-entropies.
pub static LOSS_CROSS_ENTROPY_BACKWARD: Kernel = kernel(
    "loss_cross_entropy_backward",
    "gradients of cross-entropies of logits",
    &[reads("prediction"), reads_u32("classes"), reads("weight"), reads("total"), reads("grad_value"), writes("grad_prediction")],
    Cpu { f32: loss_cross_entropy_backward_cpu::<f32>, f64: loss_cross_entropy_backward_cpu::<f64> },
    28.0 * ROWS as f64,
);

/// Sums of divergences from target probabilities.
pub static LOSS_KL: Kernel = kernel(
    "loss_kl",
    "sums of Kullback-Leibler divergences of logits from probabilities, block by block",
    &[reads("prediction"), reads("target"), reads("weight"), writes("sums")],
    Cpu { f32: loss_kl_cpu::<f32>, f64: loss_kl_cpu::<f64> },
    28.0 * ROWS as f64,
);

/// Gradients of divergences.
pub static LOSS_KL_BACKWARD: Kernel = kernel(
    "loss_kl_backward",
    "gradients of Kullback-Leibler divergences of logits from probabilities",
    &[reads("prediction"), reads("target"), reads("weight"), reads("total"), reads("grad_value"), writes("grad_prediction")],
    Cpu { f32: loss_kl_backward_cpu::<f32>, f64: loss_kl_backward_cpu::<f64> },
    40.0 * ROWS as f64,
);

/// Means of the blocks' sums.
pub static LOSS_MEAN: Kernel = kernel(
    "loss_mean",
    "loss of each model from the sums of its blocks",
    &[reads("sums"), writes("value"), writes("total")],
    Cpu { f32: loss_mean_cpu::<f32>, f64: loss_mean_cpu::<f64> },
    16.0,
);

// ---- CPU column -----------------------------------------------------------------------------------------------------------

/// Lanes of a sum on the CPU.
const LANES: usize = 16;

fn whole<R: Real>(high: f32, low: f32) -> R {
    R::of(f64::from(high) + f64::from(low))
}

/// ln(1 + e^x) − max(x, 0), and σ(x).
#[inline(always)]
fn softplus_sigmoid<R: Real>(x: R) -> (R, R) {
    let e = (-x.abs()).exp();
    let s = R::ONE / (R::ONE + e);
    (e.ln_1p(), if x >= R::ZERO { s } else { e * s })
}

/// A loss of one element.
#[inline(always)]
fn element<R: Real>(kind: u32, option: R, tau: R, x: R, y: R) -> R {
    let (e, half) = (x - y, R::of(0.5));
    match kind {
        MSE => e * e,
        HUBER if e.abs() < option => half * e * e,
        HUBER => option * (e.abs() - half * option),
        BCE => {
            let negative = if x < R::ZERO { -x } else { R::ZERO };
            (R::ONE - y) * x + (R::ONE + (option - R::ONE) * y) * (softplus_sigmoid(x).0 + negative)
        }
        _ if e < R::ZERO => -(tau * e),
        _ => (R::ONE - tau) * e,
    }
}

/// Its derivative by x.
#[inline(always)]
fn slope<R: Real>(kind: u32, option: R, tau: R, x: R, y: R) -> R {
    let e = x - y;
    match kind {
        MSE => e + e,
        HUBER if e < -option => -option,
        HUBER if e > option => option,
        HUBER => e,
        BCE => (R::ONE - y) - (R::ONE + (option - R::ONE) * y) * (R::ONE - softplus_sigmoid(x).1),
        _ if e < R::ZERO => -tau,
        _ if e > R::ZERO => R::ONE - tau,
        // 0 at the kink, NaN for NaN
        _ => e,
    }
}

/// Where a block's values lie in the bound ranges.
struct Block {
    model: usize,
    prediction: Range<usize>,
    /// First element of the block within its model.
    inside: usize,
    /// First element of its model.
    target: u32,
    weight: u32,
    sums: usize,
}

impl LossParams {
    /// Block `i` of the launch, of `block` elements of `len` a model.
    fn block(&self, i: u32, block: u32, len: u32, width: u32) -> Block {
        let (model, at) = ((self.first + i) / self.blocks, (self.first + i) % self.blocks * block);
        let from = model.wrapping_mul(len.wrapping_mul(width)).wrapping_sub(self.prediction_base).wrapping_add(at * width);
        let count = block.min(len - at) * width;
        Block {
            model: model as usize,
            prediction: from as usize..(from + count) as usize,
            inside: at as usize,
            target: model.wrapping_mul(self.target_stride).wrapping_sub(self.target_base),
            weight: model.wrapping_mul(self.weight_stride).wrapping_sub(self.weight_base),
            sums: (self.first + i).wrapping_mul(2).wrapping_sub(self.block_base) as usize,
        }
    }

    fn elements(&self, i: u32) -> Block {
        self.block(i, BLOCK, self.rows * self.columns, 1)
    }

    fn rows_of(&self, i: u32) -> Block {
        self.block(i, ROWS, self.rows, self.columns)
    }

    /// Weight of row `row` of the block's model.
    #[inline(always)]
    fn weight<R: Real>(&self, weight: &[R], b: &Block, row: u32) -> R {
        if self.weighted == 1 { weight[b.weight.wrapping_add(row) as usize] } else { R::ONE }
    }
}

/// Elements of a model that share weights, and its target's index for an element.
#[inline(always)]
fn element_at<R: Real>(p: &LossParams, target: &[R], weight: &[R], quantiles: &[R], b: &Block, i: u32) -> (R, R, R) {
    let at = b.inside as u32 + i;
    let row = if p.columns == 1 { at } else { at / p.columns };
    let (y, tau) = match p.kind {
        PINBALL => (target[b.target.wrapping_add(row) as usize], quantiles[(at - row * p.columns) as usize]),
        _ => (target[b.target.wrapping_add(at) as usize], R::ZERO),
    };
    (y, tau, p.weight(weight, b, row))
}

/// Sums of `len` (loss, weight) pairs by lanes.
#[inline(always)]
fn sums<R: Real>(len: usize, pair: impl Fn(usize) -> (R, R)) -> [R; 2] {
    let mut lanes = [[R::ZERO; LANES]; 2];
    for i in 0..len {
        let (loss, weight) = pair(i);
        lanes[0][i % LANES] += loss;
        lanes[1][i % LANES] += weight;
    }
    lanes.map(|lanes| lanes.into_iter().sum())
}

/// Runs `block` on all blocks of a launch and stores their sums.
fn store<R: Real>(p: &LossParams, out: &mut [R], at: impl Fn(u32) -> Block + Sync, block: impl Fn(&Block) -> [R; 2] + Sync) {
    let all: Vec<[R; 2]> = (0..p.count).into_par_iter().map(|i| block(&at(i))).collect();
    for (i, sum) in (0..p.count).zip(all) {
        let at = at(i).sums;
        out[at..at + 2].copy_from_slice(&sum);
    }
}

fn loss_elements_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LossParams = launch.params()?;
    let (prediction, target, weight, quantiles, out) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let option: R = whole(p.option, p.option_low);
    store(
        &p,
        out,
        |i| p.elements(i),
        |b| {
            let x = &prediction[b.prediction.clone()];
            sums(x.len(), |i| {
                let (y, tau, w) = element_at(&p, target, weight, quantiles, b, i as u32);
                // What does not count may be anything.
                (if w == R::ZERO { R::ZERO } else { w * element(p.kind, option, tau, x[i], y) }, w)
            })
        },
    );
    Ok(())
}

/// Splits the launch's gradients into its blocks.
fn blocks_mut<'a, R: Real>(p: &LossParams, grad: &'a mut [R], at: impl Fn(u32) -> Block) -> Vec<(Block, &'a mut [R])> {
    let mut rest = grad;
    let mut done = 0;
    let mut out = Vec::with_capacity(p.count as usize);
    for i in 0..p.count {
        let block = at(i);
        let (_, after) = std::mem::take(&mut rest).split_at_mut(block.prediction.start - done);
        let (mine, after) = after.split_at_mut(block.prediction.len());
        done = block.prediction.end;
        rest = after;
        out.push((block, mine));
    }
    out
}

/// grad_value / total of a model.
fn scale<R: Real>(total: &[R], grad_value: &[R], model: usize) -> R {
    if total[model] == R::ZERO { R::ZERO } else { grad_value[model] / total[model] }
}

fn loss_elements_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LossParams = launch.params()?;
    let (prediction, target, weight, quantiles) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?);
    let (total, grad_value, grad) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let option: R = whole(p.option, p.option_low);
    blocks_mut(&p, grad, |i| p.elements(i)).into_par_iter().for_each(|(b, grad)| {
        let (x, scale) = (&prediction[b.prediction.clone()], scale(total, grad_value, b.model));
        for (i, grad) in grad.iter_mut().enumerate() {
            let (y, tau, w) = element_at(&p, target, weight, quantiles, &b, i as u32);
            *grad = if w == R::ZERO { R::ZERO } else { scale * w * slope(p.kind, option, tau, x[i], y) };
        }
    });
    Ok(())
}

/// Largest logit and ln Σ e^(x − largest).
#[inline(always)]
fn log_sum<R: Real>(x: &[R]) -> (R, R) {
    let top = x.iter().fold(x[0], |a, &b| if b > a { b } else { a });
    (top, x.iter().map(|&x| (x - top).exp()).sum::<R>().ln())
}

fn loss_cross_entropy_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LossParams = launch.params()?;
    let (prediction, classes, weight, out) = (launch.real()?, launch.word()?, launch.real()?, launch.real_mut()?);
    let (c, smoothing): (usize, R) = (p.columns as usize, whole(p.option, p.option_low));
    store(
        &p,
        out,
        |i| p.rows_of(i),
        |b| {
            let rows = &prediction[b.prediction.clone()];
            sums(rows.len() / c, |i| {
                let (x, row) = (&rows[i * c..(i + 1) * c], (b.inside + i) as u32);
                let (class, w) = (classes[b.target.wrapping_add(row) as usize], p.weight(weight, b, row));
                if class >= p.columns || w == R::ZERO {
                    return (R::ZERO, R::ZERO);
                }
                let (top, log) = log_sum(x);
                let mean = if smoothing > R::ZERO { x.iter().map(|&x| x - top).sum::<R>() / R::of(c as f64) } else { R::ZERO };
                (w * (log - (R::ONE - smoothing) * (x[class as usize] - top) - smoothing * mean), w)
            })
        },
    );
    Ok(())
}

fn loss_cross_entropy_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LossParams = launch.params()?;
    let (prediction, classes, weight) = (launch.real()?, launch.word()?, launch.real()?);
    let (total, grad_value, grad) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let (c, smoothing): (usize, R) = (p.columns as usize, whole(p.option, p.option_low));
    let share = smoothing / R::of(c as f64);
    blocks_mut(&p, grad, |i| p.rows_of(i)).into_par_iter().for_each(|(b, grad)| {
        let (rows, scale) = (&prediction[b.prediction.clone()], scale(total, grad_value, b.model));
        for (i, (x, grad)) in rows.chunks_exact(c).zip(grad.chunks_exact_mut(c)).enumerate() {
            let row = (b.inside + i) as u32;
            let (class, w) = (classes[b.target.wrapping_add(row) as usize], p.weight(weight, &b, row));
            if class >= p.columns || w == R::ZERO {
                grad.fill(R::ZERO);
                continue;
            }
            let (top, log) = log_sum(x);
            for (j, (grad, &x)) in grad.iter_mut().zip(x).enumerate() {
                let want = share + if j == class as usize { R::ONE - smoothing } else { R::ZERO };
                *grad = scale * w * ((x - top - log).exp() - want);
            }
        }
    });
    Ok(())
}

fn loss_kl_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LossParams = launch.params()?;
    let (prediction, target, weight, out) = (launch.real()?, launch.real()?, launch.real()?, launch.real_mut()?);
    let c = p.columns as usize;
    store(
        &p,
        out,
        |i| p.rows_of(i),
        |b| {
            let rows = &prediction[b.prediction.clone()];
            sums(rows.len() / c, |i| {
                let (x, row) = (&rows[i * c..(i + 1) * c], (b.inside + i) as u32);
                let w = p.weight(weight, b, row);
                if w == R::ZERO {
                    return (R::ZERO, R::ZERO);
                }
                let (top, log) = log_sum(x);
                let at = b.target.wrapping_add(row.wrapping_mul(p.columns)) as usize;
                let terms = x.iter().zip(&target[at..at + c]).map(|(&x, &y)| if y == R::ZERO { R::ZERO } else { y * (y.ln() - (x - top - log)) });
                (w * terms.sum::<R>(), w)
            })
        },
    );
    Ok(())
}

fn loss_kl_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LossParams = launch.params()?;
    let (prediction, target, weight) = (launch.real()?, launch.real()?, launch.real()?);
    let (total, grad_value, grad) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let c = p.columns as usize;
    blocks_mut(&p, grad, |i| p.rows_of(i)).into_par_iter().for_each(|(b, grad)| {
        let (rows, scale) = (&prediction[b.prediction.clone()], scale(total, grad_value, b.model));
        for (i, (x, grad)) in rows.chunks_exact(c).zip(grad.chunks_exact_mut(c)).enumerate() {
            let row = (b.inside + i) as u32;
            let w = p.weight(weight, &b, row);
            if w == R::ZERO {
                grad.fill(R::ZERO);
                continue;
            }
            let at = b.target.wrapping_add(row.wrapping_mul(p.columns)) as usize;
            let (top, log) = log_sum(x);
            let mass: R = target[at..at + c].iter().copied().sum();
            for ((grad, &x), &y) in grad.iter_mut().zip(x).zip(&target[at..at + c]) {
                *grad = scale * w * (mass * (x - top - log).exp() - y);
            }
        }
    });
    Ok(())
}

fn loss_mean_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: LossParams = launch.params()?;
    let (sums, value, total) = (launch.real()?, launch.real_mut()?, launch.real_mut()?);
    let width = 2 * p.blocks as usize;
    for m in 0..p.count as usize {
        let sums = &sums[m * width..(m + 1) * width];
        let (loss, weight) = sums.chunks_exact(2).fold((0.0, 0.0), |(a, b), s| (a + s[0].f64(), b + s[1].f64()));
        value[m] = R::of(if weight == 0.0 { 0.0 } else { loss / weight });
        total[m] = R::of(weight);
    }
    Ok(())
}

// ---- the op ---------------------------------------------------------------------------------------------------------------

/// Which loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Criterion {
    /// Squared error.
    Mse,
    /// Squared error up to δ, then linear.
    Huber {
        /// δ > 0.
        delta: f64,
    },
    /// Binary cross-entropy from logits.
    Bce {
        /// Weight of the positive class, 1 for none.
        positive_weight: f64,
    },
    /// Quantile loss: one column per quantile, all of one target.
    Pinball,
    /// Cross-entropy from logits and classes.
    CrossEntropy {
        /// ε in [0, 1): share of the target that all classes divide.
        smoothing: f64,
    },
    /// Kullback-Leibler divergence of softmax(logits) from target probabilities.
    Kl,
}

/// Sizes and options.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Which loss.
    pub criterion: Criterion,
    /// M.
    pub models: u64,
    /// Models that the target has: 1 (shared) or M.
    pub target_models: u64,
    /// Models that the weights have: 1 (shared) or M.
    pub weight_models: u64,
    /// N, rows of a model.
    pub rows: u64,
    /// C, columns of a row: classes, quantiles, outputs.
    pub columns: u64,
}

/// What forward and backward read.
#[derive(Debug, Clone, Copy)]
pub struct LossArgs<'a> {
    /// Predictions, or logits [M,N,C]; finite.
    pub prediction: &'a View,
    /// Targets [M or 1,N,C]; [M or 1,N] for pinball; words [M or 1,N] for cross-entropy.
    pub target: &'a View,
    /// Weight of each row [M or 1,N], not negative; a row of weight 0 does not count, whatever it holds.
    pub weight: Option<&'a View>,
    /// Quantiles [C] in (0, 1), for pinball.
    pub quantiles: Option<&'a View>,
}

fn view_of(name: &str, view: &View, len: u64, elem: Elem) -> Result<()> {
    if view.len() == len && view.elem() == elem {
        return Ok(());
    }
    let got = format!("{} of {}", view.len(), view.elem().wgsl());
    Err(Error::Shape { op: OP, arg: name.into(), expected: format!("{len} of {}", elem.wgsl()), got })
}

impl Loss {
    /// One target for all models, no option set.
    pub fn new(criterion: Criterion, models: u64, rows: u64, columns: u64) -> Loss {
        Loss { criterion, models, target_models: models, weight_models: models, rows, columns }
    }

    /// Refuses what has no meaning.
    /// # Errors
    /// `Parameter` that names the option, `Shape` for sizes that do not fit, `TooLarge` beyond 2^31 predictions of a model.
    pub fn check(&self) -> Result<()> {
        let refuse = |name: &str, value: f64, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
        match self.criterion {
            Criterion::Huber { delta } if !(delta.is_finite() && delta > 0.0) => return refuse("delta", delta, "give a positive number"),
            Criterion::Bce { positive_weight: c } if !(c.is_finite() && c > 0.0) => return refuse("positive_weight", c, "give a positive number"),
            Criterion::CrossEntropy { smoothing: s } if !(0.0..1.0).contains(&s) => return refuse("smoothing", s, "give a number in [0, 1)"),
            _ => {}
        }
        for (name, models) in [("target_models", self.target_models), ("weight_models", self.weight_models)] {
            if models != 1 && models != self.models {
                return Err(Error::Shape { op: OP, arg: name.into(), expected: format!("1 or {}", self.models), got: models.to_string() });
            }
        }
        if self.columns == 0 {
            return Err(Error::Shape { op: OP, arg: "columns".into(), expected: "at least 1".into(), got: "0".into() });
        }
        let limit = (1u64 << 31).min((u64::from(u32::MAX) * u64::from(ROWS)) / self.models.max(1));
        if self.rows.saturating_mul(self.columns) >= limit {
            let help = "use smaller batches or fewer models at once".into();
            return Err(Error::TooLarge { what: format!("{OP}: a model"), needed: self.rows.saturating_mul(self.columns), limit, unit: "predictions", help });
        }
        Ok(())
    }

    /// Elements that forward keeps for backward: the sums of weights.
    pub fn saved(&self) -> u64 {
        self.models
    }

    /// Temporary reals of forward.
    pub fn scratch(&self) -> u64 {
        2 * self.models * self.blocks().max(1)
    }

    /// Whether a row is one loss.
    fn by_row(&self) -> bool {
        matches!(self.criterion, Criterion::CrossEntropy { .. } | Criterion::Kl)
    }

    /// Units of a block, units of a model, predictions of a unit.
    fn units(&self) -> (u64, u64, u64) {
        if self.by_row() { (u64::from(ROWS), self.rows, self.columns) } else { (u64::from(BLOCK), self.rows * self.columns, 1) }
    }

    fn blocks(&self) -> u64 {
        let (block, len, _) = self.units();
        len.div_ceil(block)
    }

    /// Values of a row of the target.
    fn target_width(&self) -> u64 {
        if matches!(self.criterion, Criterion::Pinball | Criterion::CrossEntropy { .. }) { 1 } else { self.columns }
    }

    fn check_args(&self, args: &LossArgs<'_>) -> Result<()> {
        let elem = if matches!(self.criterion, Criterion::CrossEntropy { .. }) { Elem::U32 } else { Elem::F32 };
        view_of("prediction", args.prediction, self.models * self.rows * self.columns, Elem::F32)?;
        view_of("target", args.target, self.target_models * self.rows * self.target_width(), elem)?;
        args.weight.map_or(Ok(()), |w| view_of("weight", w, self.weight_models * self.rows, Elem::F32))?;
        match (self.criterion, args.quantiles) {
            (Criterion::Pinball, Some(q)) => view_of("quantiles", q, self.columns, Elem::F32),
            (Criterion::Pinball, None) => {
                Err(Error::Shape { op: OP, arg: "quantiles".into(), expected: format!("{} of f32", self.columns), got: "none".into() })
            }
            _ => Ok(()),
        }
    }

    fn params(&self, args: &LossArgs<'_>) -> LossParams {
        let mut p: LossParams = bytemuck::Zeroable::zeroed();
        (p.rows, p.columns, p.blocks) = (self.rows as u32, self.columns as u32, self.blocks() as u32);
        p.weighted = u32::from(args.weight.is_some());
        if self.target_models > 1 {
            p.target_stride = (self.rows * self.target_width()) as u32;
        }
        if self.weight_models > 1 {
            p.weight_stride = self.rows as u32;
        }
        let (kind, option) = match self.criterion {
            Criterion::Mse => (MSE, 0.0),
            Criterion::Huber { delta } => (HUBER, delta),
            Criterion::Bce { positive_weight } => (BCE, positive_weight),
            Criterion::Pinball => (PINBALL, 0.0),
            Criterion::CrossEntropy { smoothing } => (4, smoothing),
            Criterion::Kl => (5, 0.0),
        };
        p.kind = kind;
        p.option = option as f32;
        p.option_low = (option - f64::from(p.option)) as f32;
        p
    }
}

/// A launch over blocks of the models: params and what it binds.
struct Run {
    params: LossParams,
    prediction: Range<u64>,
    target: View,
    weight: View,
    quantiles: View,
    sums: Range<u64>,
}

/// Splits the blocks of all models into launches. Ranges start aligned, at or before the first value used.
fn runs(device: &Device, op: &Loss, args: &LossArgs<'_>) -> Result<Vec<Run>> {
    let ((block, len, width), blocks, align) = (op.units(), op.blocks(), device.limits().align);
    let p = op.params(args);
    let down = |i: u64| i / align * align;
    let mut out = Vec::new();
    let elements = block * width + align;
    for run in device.plan(OP, op.models * blocks, elements, 1, 16 * block * width)? {
        // Kernels count values of a launch in words.
        let most = ((1 << 30) / elements).max(1);
        for from in run.clone().step_by(most as usize) {
            let to = (from + most).min(run.end);
            let last = to - 1;
            let units = from / blocks * len + from % blocks * block..last / blocks * len + (last % blocks * block + block).min(len);
            let prediction = down(units.start * width)..units.end * width;
            let rows = units.start * width / op.columns..(units.end * width).div_ceil(op.columns);
            let (target_width, shared) = (op.target_width(), |models: u64| models == 1 && op.models > 1);
            let target = if shared(op.target_models) { 0..op.rows * target_width } else { down(rows.start * target_width)..rows.end * target_width };
            let weight = if shared(op.weight_models) { 0..op.rows } else { down(rows.start)..rows.end };
            let sums = down(2 * from)..2 * to;
            let params = LossParams {
                first: from as u32,
                count: (to - from) as u32,
                prediction_base: prediction.start as u32,
                target_base: target.start as u32,
                weight_base: weight.start as u32,
                block_base: sums.start as u32,
                ..p
            };
            // What the options leave out is bound to the predictions and not read.
            let other = || args.prediction.part(prediction.clone());
            out.push(Run {
                params,
                target: args.target.part(target),
                weight: args.weight.map_or_else(other, |w| w.part(weight)),
                quantiles: args.quantiles.filter(|_| op.criterion == Criterion::Pinball).map_or_else(other, View::clone),
                prediction,
                sums,
            });
        }
    }
    if op.by_row() {
        device.check_rounds(OP, 4 * op.columns + 64, "columns")?;
    }
    Ok(out)
}

/// Records value [M] and total [M], the sums of weights that [`loss_backward`] needs.
///
/// The loss of model m depends on its predictions alone. Two launches, more where a binding is too small.
/// # Errors
/// `Shape` for views of another length; as [`Loss::check`].
pub fn loss(pass: &mut Pass, op: &Loss, args: &LossArgs<'_>, value: &View, total: &View, scratch: &View) -> Result<()> {
    op.check()?;
    op.check_args(args)?;
    view_of("value", value, op.models, Elem::F32)?;
    view_of("total", total, op.saved(), Elem::F32)?;
    view_of("scratch", scratch, op.scratch(), Elem::F32)?;
    let device = pass.device().clone();
    for run in runs(&device, op, args)? {
        let (x, sums) = (args.prediction.part(run.prediction), scratch.part(run.sums));
        match op.criterion {
            Criterion::CrossEntropy { .. } => pass.launch(&LOSS_CROSS_ENTROPY, &run.params, &[x, run.target, run.weight, sums])?,
            Criterion::Kl => pass.launch(&LOSS_KL, &run.params, &[x, run.target, run.weight, sums])?,
            _ => pass.launch(&LOSS_ELEMENTS, &run.params, &[x, run.target, run.weight, run.quantiles, sums])?,
        }
    }
    mean(pass, op, args, value, total, scratch)
}

/// Launches over models, in runs whose ranges start aligned.
fn mean(pass: &mut Pass, op: &Loss, args: &LossArgs<'_>, value: &View, total: &View, scratch: &View) -> Result<()> {
    let device = pass.device().clone();
    let (blocks, align) = (op.blocks(), device.limits().align);
    device.check_rounds(OP, blocks.div_ceil(u64::from(WG)) + 8, "rounds")?;
    // Without rows there are no blocks, and the sums are not read.
    let width = 2 * blocks.max(1);
    let fits = device.plan(OP, op.models, width, 1, 8 + 2 * blocks)?.first().map_or(0, |run| run.end);
    let run = if fits == op.models { fits } else { fits / align * align };
    if run == 0 && op.models > 0 {
        let help = "use smaller batches, fewer models at once or another device".into();
        let (needed, limit) = (8 * blocks * align, device.limits().binding_bytes);
        return Err(Error::TooLarge { what: format!("{OP}: the blocks of {align} models"), needed, limit, unit: "B", help });
    }
    for from in (0..op.models).step_by(run.max(1) as usize) {
        let to = (from + run).min(op.models);
        let p = LossParams { count: (to - from) as u32, ..op.params(args) };
        pass.launch(&LOSS_MEAN, &p, &[scratch.part(width * from..width * to), value.part(from..to), total.part(from..to)])?;
    }
    Ok(())
}

/// Records grad_prediction [M,N,C] from grad_value [M] and forward's total [M]; overwrites it.
/// # Errors
/// As [`loss`].
pub fn loss_backward(pass: &mut Pass, op: &Loss, args: &LossArgs<'_>, total: &View, grad_value: &View, grad_prediction: &View) -> Result<()> {
    op.check()?;
    op.check_args(args)?;
    view_of("total", total, op.saved(), Elem::F32)?;
    view_of("grad_value", grad_value, op.models, Elem::F32)?;
    view_of("grad_prediction", grad_prediction, args.prediction.len(), Elem::F32)?;
    let device = pass.device().clone();
    for run in runs(&device, op, args)? {
        let (x, out) = (args.prediction.part(run.prediction.clone()), grad_prediction.part(run.prediction));
        let (total, grad_value) = (total.clone(), grad_value.clone());
        match op.criterion {
            Criterion::CrossEntropy { .. } => {
                pass.launch(&LOSS_CROSS_ENTROPY_BACKWARD, &run.params, &[x, run.target, run.weight, total, grad_value, out])?;
            }
            Criterion::Kl => pass.launch(&LOSS_KL_BACKWARD, &run.params, &[x, run.target, run.weight, total, grad_value, out])?,
            _ => {
                let args = [x, run.target, run.weight, run.quantiles, total, grad_value, out];
                pass.launch(&LOSS_ELEMENTS_BACKWARD, &run.params, &args)?;
            }
        }
    }
    Ok(())
}

/// Conformance binding: prediction, target or classes, weight?, quantiles?, grad_value?; `criterion` and its option among the params.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let option = |name: &str, usual: f64| case.number(name).unwrap_or(usual);
    let criterion = match case.text("criterion")? {
        "mse" => Criterion::Mse,
        "huber" => Criterion::Huber { delta: option("delta", 1.0) },
        "bce" => Criterion::Bce { positive_weight: option("positive_weight", 1.0) },
        "pinball" => Criterion::Pinball,
        "cross_entropy" => Criterion::CrossEntropy { smoothing: option("smoothing", 0.0) },
        "kl" => Criterion::Kl,
        other => {
            let known = ["mse", "huber", "bce", "pinball", "cross_entropy", "kl"].map(String::from).to_vec();
            return Err(Error::Unknown { kind: "criterion", given: other.into(), suggestion: None, known });
        }
    };
    let &[m, n, c] = case.shape("prediction")? else {
        return Err(Error::Shape { op: OP, arg: "prediction".into(), expected: "[M,N,C]".into(), got: format!("{:?}", case.shape("prediction")?) });
    };
    let classes = matches!(criterion, Criterion::CrossEntropy { .. });
    let models_of = |name: &str| Ok::<u64, Error>(case.shape(name)?.first().map_or(1, |&m| m as u64));
    let op = Loss {
        target_models: models_of(if classes { "classes" } else { "target" })?,
        weight_models: if case.has("weight") { models_of("weight")? } else { 1 },
        ..Loss::new(criterion, m as u64, n as u64, c as u64)
    };
    let up = |name: &str| Ok::<View, Error>(View::from(&device.upload(name, case.f32(name)?)?));
    let maybe = |name: &str| case.has(name).then(|| up(name)).transpose();
    let prediction = up("prediction")?;
    let target = if classes { View::from(&device.upload_u32("classes", case.u32("classes")?)?) } else { up("target")? };
    let (weight, quantiles, grad_value) = (maybe("weight")?, maybe("quantiles")?, maybe("grad_value")?);
    let args = LossArgs { prediction: &prediction, target: &target, weight: weight.as_ref(), quantiles: quantiles.as_ref() };
    let zeros = |label: &str, len: u64| Ok::<View, Error>(View::from(&device.zeros(label, len)?));
    let (value, total, scratch, grad) =
        (zeros("value", op.models)?, zeros("total", op.saved())?, zeros("scratch", op.scratch())?, zeros("grad", prediction.len())?);
    let mut pass = device.pass(OP);
    loss(&mut pass, &op, &args, &value, &total, &scratch)?;
    let value = pass.read(&value)?;
    let grad = match &grad_value {
        Some(grad_value) => {
            loss_backward(&mut pass, &op, &args, &total, grad_value, &grad)?;
            Some(pass.read(&grad)?)
        }
        None => None,
    };
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.reals("value", done.f64(value)?);
    if let Some(grad) = grad {
        outputs.reals("grad_prediction", done.f64(grad)?);
    }
    Ok(outputs)
}
