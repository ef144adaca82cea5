//! One step of an optimiser for all parameters of all models: AdamW, Adam, SGD; clipping by global norm; a model whose gradient or
//! loss is not finite skips its step.
//!
//! norm   n[m] = √Σ_p grads[m,p]²;  c = min(1, max_grad_norm / (n + 1e-6));  g = c·grads;  lr = learning_rate·rate[m].
//! adamw  w −= lr·λ·d[k]·w;  m += (1−β₁)(g − m);  v += (1−β₂)(g² − v);  w −= lr/(1−β₁ᵗ)·m / (√v/√(1−β₂ᵗ) + ε), t the model's own steps.
//! adam   the same with g + λ·d[k]·w for g and no decay of its own.
//! sgd    g += λ·d[k]·w;  b = μ·b + g;  w −= lr·b, or lr·(g + μ·b) with Nesterov's correction.
//! average a += (w − a)·s after the step: s = 1−decay (EMA), 1/(t − start) (Polyak); the first average is a copy.
//!
//! Shapes   parameters, grads, moment1, moment2, momentum, average: one flat buffer each of K tensors [M,size_k] at their offsets; what
//!          lies between tensors is not touched. rate, loss, norm [M]; decay [K] multiplies λ (0 for biases and norms);
//!          hyper [M,4] is β₁ or μ, β₂, λ, max_grad_norm (0: no clipping) per model; table [B,4] words names the B blocks of a model;
//!          counters [M,3] words: steps taken, steps skipped, status of this step (sum of 1: gradient not finite, 2: loss not finite,
//!          4: gradient beyond 1e18 and not clipped, its square would not fit).
//! Launch   `gradient_norm`: one workgroup per (model, block of at most 2,048 values of a tensor). `optimiser_prepare`: one workgroup per model sums the
//!          blocks in order and turns step count and rates into eight scales. `adam_update` or `sgd_update`: one workgroup per (model,
//!          block). Plain SGD with an average adds `parameter_average`.
//! Replay   step counts live on the device, rates are a view: a recorded step serves every step of a training.
//! Scratch  [M, 3·B + 8].
//! Floor    32 bytes a parameter (4 for the norm), 40 with an average; 12 to 24 for SGD.
//! Numerics squares of values beyond 2^50 are summed apart, scaled by 2^-160: a norm overflows only where it is beyond f32 itself.
//!          1−βᵗ by expm1(t·ln β); moments as (m − (1−β)m) + (1−β)g, exact at β = 0 and without the rounding of β. A skipped model changes no bit of parameters, moments and averages; its norm is −1e30.
//! Source   Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101; Polyak & Juditsky 1992. Numbers as torch.optim.
//! Files    shaders/optimiser.wgsl · cuda/optimiser.cu · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs, UNDEFINED};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use crate::{Error, Result};
use pulp::Arch;
use rayon::prelude::*;
use std::ops::Range;

const OP: &str = "adamw";

params! {
    /// Params of the kernels; a real is the sum of a field and its `_low`, which only f64 feels.
    pub struct OptimiserParams {
        /// B, blocks of a model.
        blocks: u32,
        /// Values of a model in the scratch.
        stride: u32,
        /// First block of the launch, and blocks of a model in it.
        first_block: u32,
        /// How many of them.
        block_count: u32,
        /// First model of the launch.
        first_model: u32,
        /// Workgroups of the launch.
        count: u32,
        /// Values before the bound range of the flat buffers.
        element: u32,
        /// Values before the bound range of the scratch, modulo 2^32.
        row: u32,
        /// 0 adamw, 1 adam, 2 sgd.
        algorithm: u32,
        /// Bits of `flag`.
        flags: u32,
        /// Polyak averages start after this step.
        average_start: u32,
        /// Learning rate.
        learning_rate: f32,
        /// What its rounding took away.
        learning_rate_low: f32,
        /// 1 − β₁, or SGD's momentum.
        rate1: f32,
        /// What its rounding took away.
        rate1_low: f32,
        /// 1 − β₂.
        rate2: f32,
        /// What its rounding took away.
        rate2_low: f32,
        /// ln β₁.
        log1: f32,
        /// What its rounding took away.
        log1_low: f32,
        /// ln β₂.
        log2: f32,
        /// What its rounding took away.
        log2_low: f32,
        /// ε.
        eps: f32,
        /// What its rounding took away.
        eps_low: f32,
        /// λ.
        weight_decay: f32,
        /// What its rounding took away.
        weight_decay_low: f32,
        /// Largest norm of the gradient; 0: no clipping.
        max_grad_norm: f32,
        /// What its rounding took away.
        max_grad_norm_low: f32,
        /// 1 − decay of the exponential average.
        average_rate: f32,
        /// What its rounding took away.
        average_rate_low: f32,
    }
}

/// Bits of `flags`.
mod flag {
    pub(super) const DECAY: u32 = 1;
    pub(super) const AVERAGE: u32 = 2;
    pub(super) const LOSS: u32 = 4;
    pub(super) const HYPER: u32 = 8;
    pub(super) const NESTEROV: u32 = 16;
    pub(super) const MOMENTUM: u32 = 32;
    pub(super) const POLYAK: u32 = 64;
}

const WG: u32 = 256;
/// Values of a block at most.
const BLOCK: u32 = 2048;
const CONSTANTS: &[(&str, u32)] = &[("BLOCK", BLOCK)];
/// Words of a block in the table: offset and size of its tensor, its first value in a model's part, number of its tensor.
const ENTRY: usize = 4;
/// Scales of a model: gradient factor, 1 if the step is taken, step size, 1/√(1−β₂ᵗ), decay, 1−β₁ or μ, 1−β₂, weight of the average.
const SCALES: u32 = 8;
/// A value, or a running square, beyond which squares are scaled; the scale and its square.
const LARGE: f64 = 1_125_899_906_842_624.0; // 2^50
const SHRINK: f64 = 8.271_806_125_530_277e-25; // 2^-80
/// Largest norm of a gradient that is not clipped.
const LARGEST_NORM: f64 = 1e18;
/// As in torch.nn.utils.clip_grad_norm_.
const CLIP_EPS: f64 = 1e-6;

/// Values that a thread of the CPU column takes at a time.
const CPU_CHUNK: usize = 8192;

fn params(words: &[u32]) -> OptimiserParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn count(words: &[u32]) -> u64 {
    u64::from(params(words).count)
}

/// Sums of squares of every block of the gradients.
pub static GRADIENT_NORM: Kernel = Kernel {
    name: "gradient_norm",
    about: "sums of squares of the gradients, block by block",
    args: &[reads("grads"), reads_u32("table"), writes("scratch")],
    params: layout::<OptimiserParams>(),
    workgroup: WG,
    constants: CONSTANTS,
    groups: count,
    wgsl: wgsl!("optimiser"),
    cuda: cuda!("optimiser"),
    cpu: Some(Cpu { f32: gradient_norm_cpu::<f32>, f64: gradient_norm_cpu::<f64> }),
    cost: Cost { unit: "block", units: count, bytes: 4.0 * BLOCK as f64, flops: 2.0 * BLOCK as f64 },
};

/// Norms, checks, step counts and scales of every model.
pub static OPTIMISER_PREPARE: Kernel = Kernel {
    name: "optimiser_prepare",
    about: "norm, finite check, step count and step sizes of each model",
    args: &[reads("rate"), reads("loss"), reads("hyper"), writes("scratch"), writes_u32("counters"), writes("norm")],
    params: layout::<OptimiserParams>(),
    workgroup: 64,
    constants: CONSTANTS,
    groups: count,
    wgsl: wgsl!("optimiser"),
    cuda: cuda!("optimiser"),
    cpu: Some(Cpu { f32: optimiser_prepare_cpu::<f32>, f64: optimiser_prepare_cpu::<f64> }),
    cost: Cost { unit: "model", units: count, bytes: 80.0, flops: 200.0 },
};

/// AdamW and Adam.
pub static ADAM_UPDATE: Kernel = Kernel {
    name: "adam_update",
    about: "AdamW or Adam over all parameters of all models",
    args: &[
        reads("grads"),
        reads("scratch"),
        reads("decay"),
        reads_u32("table"),
        writes("parameters"),
        writes("moment1"),
        writes("moment2"),
        writes("average"),
    ],
    params: layout::<OptimiserParams>(),
    workgroup: WG,
    constants: CONSTANTS,
    groups: count,
    wgsl: wgsl!("optimiser"),
    cuda: cuda!("optimiser"),
    cpu: Some(Cpu { f32: adam_update_f32, f64: adam_update_cpu::<f64> }),
    cost: Cost { unit: "block", units: count, bytes: 28.0 * BLOCK as f64, flops: 16.0 * BLOCK as f64 },
};

/// Stochastic gradient descent with momentum.
pub static SGD_UPDATE: Kernel = Kernel {
    name: "sgd_update",
    about: "gradient descent with momentum over all parameters of all models",
    args: &[reads("grads"), reads("scratch"), reads("decay"), reads_u32("table"), writes("parameters"), writes("momentum")],
    params: layout::<OptimiserParams>(),
    workgroup: WG,
    constants: CONSTANTS,
    groups: count,
    wgsl: wgsl!("optimiser"),
    cuda: cuda!("optimiser"),
    cpu: Some(Cpu { f32: sgd_update_f32, f64: sgd_update_cpu::<f64> }),
    cost: Cost { unit: "block", units: count, bytes: 20.0 * BLOCK as f64, flops: 6.0 * BLOCK as f64 },
};

/// Running averages of the parameters.
pub static PARAMETER_AVERAGE: Kernel = Kernel {
    name: "parameter_average",
    about: "EMA or Polyak averages of the parameters",
    args: &[reads("parameters"), reads("scratch"), reads_u32("table"), writes("average")],
    params: layout::<OptimiserParams>(),
    workgroup: WG,
    constants: CONSTANTS,
    groups: count,
    wgsl: wgsl!("optimiser"),
    cuda: cuda!("optimiser"),
    cpu: Some(Cpu { f32: parameter_average_cpu::<f32>, f64: parameter_average_cpu::<f64> }),
    cost: Cost { unit: "block", units: count, bytes: 12.0 * BLOCK as f64, flops: 3.0 * BLOCK as f64 },
};

// ---- CPU column -----------------------------------------------------------------------------------------------------------

/// A block, as the table has it.
#[derive(Clone, Copy)]
struct Entry {
    offset: u32,
    size: u32,
    begin: u32,
    tensor: u32,
}

impl Entry {
    fn of(table: &[u32], block: u32) -> Entry {
        let at = block as usize * ENTRY;
        Entry { offset: table[at], size: table[at + 1], begin: table[at + 2], tensor: table[at + 3] }
    }

    fn len(&self) -> u32 {
        BLOCK.min(self.size - self.begin)
    }
}

/// Lanes of a sum on the CPU.
const LANES: usize = 16;

/// Sum of squares, sum of scaled squares of large values, number of values that are not finite.
#[inline(always)]
fn squares<R: Real>(x: &[R]) -> [R; 3] {
    let (large, shrink) = (R::of(LARGE), R::of(SHRINK));
    let mut lanes = [[R::ZERO; LANES]; 3];
    let mut chunks = x.chunks_exact(LANES);
    let mut add = |x: &[R; LANES]| {
        for l in 0..LANES {
            // 0·x is 0 for a finite x alone; a call would keep the loop from becoming vectors.
            let finite = x[l] * R::ZERO == R::ZERO;
            let value = if finite { x[l] } else { R::ZERO };
            let beyond = value.abs() > large;
            let (normal, scaled) = (if beyond { R::ZERO } else { value }, if beyond { value * shrink } else { R::ZERO });
            lanes[0][l] += normal * normal;
            lanes[1][l] += scaled * scaled;
            lanes[2][l] += if finite { R::ZERO } else { R::ONE };
        }
    };
    for chunk in &mut chunks {
        if let Ok(chunk) = chunk.try_into() {
            add(chunk);
        }
    }
    let mut last = [R::ZERO; LANES];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    add(&last);
    lanes.map(|lanes| lanes.into_iter().sum())
}

fn gradient_norm_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: OptimiserParams = launch.params()?;
    let (grads, table, scratch) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let arch = Arch::new();
    let place = |i: u32| (p.first_model + i / p.block_count, p.first_block + i % p.block_count);
    let blocks = (0..p.count).into_par_iter().with_min_len(4).map(|i| {
        let (model, block) = place(i);
        let entry = Entry::of(table, block);
        let at = (entry.offset + model * entry.size + entry.begin - p.element) as usize;
        arch.dispatch(|| squares(&grads[at..at + entry.len() as usize]))
    });
    let sums: Vec<[R; 3]> = blocks.collect();
    for (i, sum) in (0..p.count).zip(sums) {
        let (model, block) = place(i);
        let at = model.wrapping_mul(p.stride).wrapping_sub(p.row).wrapping_add(3 * block) as usize;
        scratch[at..at + 3].copy_from_slice(&sum);
    }
    Ok(())
}

fn whole(high: f32, low: f32) -> f64 {
    f64::from(high) + f64::from(low)
}

/// A model's hyper-parameters.
struct Hyper {
    rate1: f64,
    rate2: f64,
    log1: f64,
    log2: f64,
    weight_decay: f64,
    max_grad_norm: f64,
}

impl Hyper {
    fn shared(p: &OptimiserParams) -> Hyper {
        Hyper {
            rate1: whole(p.rate1, p.rate1_low),
            rate2: whole(p.rate2, p.rate2_low),
            log1: whole(p.log1, p.log1_low),
            log2: whole(p.log2, p.log2_low),
            weight_decay: whole(p.weight_decay, p.weight_decay_low),
            max_grad_norm: whole(p.max_grad_norm, p.max_grad_norm_low),
        }
    }

    fn own(p: &OptimiserParams, h: [f64; 4]) -> Hyper {
        let sgd = p.algorithm == 2;
        Hyper {
            rate1: if sgd { h[0] } else { 1.0 - h[0] },
            rate2: 1.0 - h[1],
            log1: log_beta(h[0]),
            log2: log_beta(h[1]),
            weight_decay: h[2],
            max_grad_norm: h[3],
        }
    }
}

/// ln β, and for β = 0 something that e to its power is 0.
fn log_beta(beta: f64) -> f64 {
    beta.ln().max(-1e4)
}

/// Norms go through f64 on the CPU: there is one of them a model.
fn optimiser_prepare_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: OptimiserParams = launch.params()?;
    let (rate, loss, hyper) = (launch.real()?, launch.real()?, launch.real()?);
    let (scratch, counters, norm) = (launch.real_mut()?, launch.word_mut()?, launch.real_mut()?);
    let models = scratch.par_chunks_exact_mut(p.stride as usize).zip(counters.par_chunks_exact_mut(3)).zip(norm.par_iter_mut()).enumerate();
    models.with_min_len(64).take(p.count as usize).for_each(|(m, ((scratch, counters), norm))| {
        let (sums, scales) = scratch.split_at_mut(3 * p.blocks as usize);
        let mut total = [0.0f64; 3];
        for sum in sums.chunks_exact(3) {
            for (total, sum) in total.iter_mut().zip(sum) {
                *total += sum.f64();
            }
        }
        let h = if p.flags & flag::HYPER != 0 { Hyper::own(&p, std::array::from_fn(|i| hyper[4 * m + i].f64())) } else { Hyper::shared(&p) };
        let length = (total[0] + total[1] / (SHRINK * SHRINK)).sqrt();
        let clips = h.max_grad_norm > 0.0;
        let bad_loss = p.flags & flag::LOSS != 0 && !loss[m].f64().is_finite();
        let status = u32::from(total[2] > 0.0) + 2 * u32::from(bad_loss) + 4 * u32::from(!clips && total[2] == 0.0 && length > LARGEST_NORM);
        counters[2] = status;
        if status != 0 {
            counters[1] += 1;
            *norm = R::of(UNDEFINED);
            scales.fill(R::ZERO);
            return;
        }
        counters[0] += 1;
        *norm = R::of(length);
        let t = f64::from(counters[0]);
        let lr = whole(p.learning_rate, p.learning_rate_low) * rate[m].f64();
        let bias = |log: f64| -(t * log).exp_m1();
        let average = match p.flags & flag::POLYAK != 0 {
            true => 1.0 / f64::from(counters[0].saturating_sub(p.average_start).max(1)),
            false if counters[0] == 1 => 1.0,
            false => whole(p.average_rate, p.average_rate_low),
        };
        let adam = p.algorithm != 2;
        let values = [
            if clips { (h.max_grad_norm / (length + CLIP_EPS)).min(1.0) } else { 1.0 },
            1.0,
            if adam { lr / bias(h.log1) } else { lr },
            if adam { 1.0 / bias(h.log2).sqrt() } else { 1.0 },
            if p.algorithm == 0 { lr * h.weight_decay } else { h.weight_decay },
            h.rate1,
            h.rate2,
            average,
        ];
        scales.copy_from_slice(&values.map(R::of));
    });
    Ok(())
}

/// Neighbouring values of one tensor, of one model or several.
struct Chunk {
    /// Within the bound range.
    range: Range<usize>,
    /// First value within the tensor.
    at: usize,
    size: usize,
    tensor: usize,
}

/// The values of a launch in the order of memory, in pieces for the threads.
fn chunks_of(p: &OptimiserParams, table: &[u32]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let models = p.count / p.block_count;
    let mut block = p.first_block;
    let end = p.first_block + p.block_count;
    while block < end {
        let first = Entry::of(table, block);
        let mut last = first;
        while block < end && Entry::of(table, block).tensor == first.tensor {
            last = Entry::of(table, block);
            block += 1;
        }
        let (from, to) = (first.begin as usize, (last.begin + last.len()) as usize);
        let size = first.size as usize;
        let start = p.first_model as usize * size;
        // Whole tensors of several models lie side by side.
        let joined = to - from == size;
        let runs = if joined { 1 } else { models as usize };
        for run in 0..runs {
            let from = start + run * size + from;
            let to = if joined { start + models as usize * size } else { start + run * size + to };
            for at in (from..to).step_by(CPU_CHUNK) {
                let begin = first.offset as usize + at - p.element as usize;
                chunks.push(Chunk { range: begin..begin + CPU_CHUNK.min(to - at), at, size, tensor: first.tensor as usize });
            }
        }
    }
    chunks
}

/// The chunks' slices of a buffer.
fn slices<'a, R>(chunks: &[Chunk], values: &'a mut [R]) -> Vec<&'a mut [R]> {
    let (mut rest, mut done) = (values, 0);
    let mut out = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let (_, after) = std::mem::take(&mut rest).split_at_mut(chunk.range.start - done);
        let (mine, after) = after.split_at_mut(chunk.range.len());
        (rest, done) = (after, chunk.range.end);
        out.push(mine);
    }
    out
}

/// What an update reads beside the gradients.
struct Shared<'a, R> {
    p: OptimiserParams,
    scratch: &'a [R],
    decay: &'a [R],
}

impl<R: Real> Shared<'_, R> {
    /// Runs `step` on each model's stretch of a chunk, with its scales; not on models that skip the step.
    #[inline(always)]
    fn each(&self, chunk: &Chunk, mut step: impl FnMut(&[R; SCALES as usize], Range<usize>)) {
        let mut from = 0;
        while from < chunk.range.len() {
            let (model, inside) = ((chunk.at + from) / chunk.size, (chunk.at + from) % chunk.size);
            let to = (from + chunk.size - inside).min(chunk.range.len());
            let row = (model as u32).wrapping_mul(self.p.stride).wrapping_sub(self.p.row).wrapping_add(3 * self.p.blocks) as usize;
            let mut scales = [R::ZERO; SCALES as usize];
            scales.copy_from_slice(&self.scratch[row..row + SCALES as usize]);
            if self.p.flags & flag::DECAY != 0 {
                scales[4] *= self.decay[chunk.tensor];
            }
            if scales[1] > R::ZERO {
                step(&scales, from..to);
            }
            from = to;
        }
    }
}

#[inline(always)]
fn adam_values<R: Real, const COUPLED: bool>(s: &[R; 8], eps: R, g: &[R], [w, m, v]: [&mut [R]; 3]) {
    let n = g.len();
    let (w, m, v) = (&mut w[..n], &mut m[..n], &mut v[..n]);
    let [factor, _, step, root, decay, rate1, rate2, _] = *s;
    for i in 0..n {
        let gradient = g[i] * factor + if COUPLED { decay * w[i] } else { R::ZERO };
        let kept = if COUPLED { w[i] } else { w[i] - w[i] * decay };
        m[i] = (m[i] - m[i] * rate1) + gradient * rate1;
        v[i] = (v[i] - v[i] * rate2) + gradient * gradient * rate2;
        w[i] = kept - step * m[i] / (v[i].sqrt() * root + eps);
    }
}

#[inline(always)]
fn average_values<R: Real>(weight: R, w: &[R], average: &mut [R]) {
    for (a, &w) in average.iter_mut().zip(w) {
        *a = if weight == R::ONE { w } else { *a + (w - *a) * weight };
    }
}

#[inline(always)]
fn adam_chunk<R: Real>(shared: &Shared<'_, R>, chunk: &Chunk, g: &[R], [w, m, v]: [&mut [R]; 3], mut average: Option<&mut [R]>) {
    let eps = R::of(whole(shared.p.eps, shared.p.eps_low));
    shared.each(chunk, |scales, at| {
        let values = [&mut w[at.clone()], &mut m[at.clone()], &mut v[at.clone()]];
        match shared.p.algorithm {
            0 => adam_values::<R, false>(scales, eps, &g[at.clone()], values),
            _ => adam_values::<R, true>(scales, eps, &g[at.clone()], values),
        }
        if let Some(average) = &mut average {
            average_values(scales[7], &w[at.clone()], &mut average[at]);
        }
    });
}

fn adam_update_with<R: Real>(mut launch: CpuLaunch<'_, R>, arch: Option<Arch>) -> Result<()> {
    let p: OptimiserParams = launch.params()?;
    let (grads, scratch, decay, table) = (launch.real()?, launch.real()?, launch.real()?, launch.word()?);
    let (w, m, v, average) = (launch.real_mut()?, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (shared, chunks) = (Shared { p, scratch, decay }, chunks_of(&p, table));
    let values = slices(&chunks, w).into_par_iter().zip(slices(&chunks, m)).zip(slices(&chunks, v)).zip(&chunks);
    let run = |chunk: &Chunk, values: [&mut [R]; 3], average: Option<&mut [R]>| match arch {
        Some(arch) => arch.dispatch(|| adam_chunk(&shared, chunk, &grads[chunk.range.clone()], values, average)),
        None => adam_chunk(&shared, chunk, &grads[chunk.range.clone()], values, average),
    };
    if p.flags & flag::AVERAGE != 0 {
        values.zip(slices(&chunks, average)).for_each(|((((w, m), v), chunk), a)| run(chunk, [w, m, v], Some(a)));
    } else {
        values.for_each(|(((w, m), v), chunk)| run(chunk, [w, m, v], None));
    }
    Ok(())
}

fn adam_update_cpu<R: Real>(launch: CpuLaunch<'_, R>) -> Result<()> {
    adam_update_with(launch, None)
}

fn adam_update_f32(launch: CpuLaunch<'_, f32>) -> Result<()> {
    adam_update_with(launch, Some(Arch::new()))
}

#[inline(always)]
fn sgd_chunk<R: Real>(shared: &Shared<'_, R>, chunk: &Chunk, g: &[R], w: &mut [R], mut b: Option<&mut [R]>) {
    let nesterov = shared.p.flags & flag::NESTEROV != 0;
    shared.each(chunk, |scales, at| {
        let [factor, _, step, _, decay, keep, ..] = *scales;
        let (g, w) = (&g[at.clone()], &mut w[at.clone()]);
        match &mut b {
            None => w.iter_mut().zip(g).for_each(|(w, &g)| *w = *w - step * (g * factor + decay * *w)),
            Some(b) => {
                for ((w, b), &g) in w.iter_mut().zip(&mut b[at]).zip(g) {
                    let gradient = g * factor + decay * *w;
                    *b = *b * keep + gradient;
                    *w -= step * if nesterov { gradient + keep * *b } else { *b };
                }
            }
        }
    });
}

fn sgd_update_with<R: Real>(mut launch: CpuLaunch<'_, R>, arch: Option<Arch>) -> Result<()> {
    let p: OptimiserParams = launch.params()?;
    let (grads, scratch, decay, table) = (launch.real()?, launch.real()?, launch.real()?, launch.word()?);
    let (w, b) = (launch.real_mut()?, launch.real_mut()?);
    let (shared, chunks) = (Shared { p, scratch, decay }, chunks_of(&p, table));
    let values = slices(&chunks, w).into_par_iter().zip(&chunks);
    let run = |chunk: &Chunk, w: &mut [R], b: Option<&mut [R]>| match arch {
        Some(arch) => arch.dispatch(|| sgd_chunk(&shared, chunk, &grads[chunk.range.clone()], w, b)),
        None => sgd_chunk(&shared, chunk, &grads[chunk.range.clone()], w, b),
    };
    if p.flags & flag::MOMENTUM != 0 {
        values.zip(slices(&chunks, b)).for_each(|((w, chunk), b)| run(chunk, w, Some(b)));
    } else {
        values.for_each(|(w, chunk)| run(chunk, w, None));
    }
    Ok(())
}

fn sgd_update_cpu<R: Real>(launch: CpuLaunch<'_, R>) -> Result<()> {
    sgd_update_with(launch, None)
}

fn sgd_update_f32(launch: CpuLaunch<'_, f32>) -> Result<()> {
    sgd_update_with(launch, Some(Arch::new()))
}

fn parameter_average_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: OptimiserParams = launch.params()?;
    let (parameters, scratch, table, average) = (launch.real()?, launch.real()?, launch.word()?, launch.real_mut()?);
    let p = OptimiserParams { flags: p.flags & !flag::DECAY, ..p };
    let (shared, chunks) = (Shared { p, scratch, decay: &[] }, chunks_of(&p, table));
    slices(&chunks, average).into_par_iter().zip(&chunks).for_each(|(average, chunk)| {
        let w = &parameters[chunk.range.clone()];
        shared.each(chunk, |scales, at| average_values(scales[7], &w[at.clone()], &mut average[at]));
    });
    Ok(())
}

// ---- the op ---------------------------------------------------------------------------------------------------------------

/// Rule of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Algorithm {
    /// Adam with decoupled weight decay.
    Adamw {
        /// Decay of the mean of the gradient, 0.9.
        beta1: f64,
        /// Decay of the mean of its square, 0.999.
        beta2: f64,
        /// Added to the root, 1e-8.
        eps: f64,
    },
    /// Adam; weight decay is part of the gradient.
    Adam {
        /// As for AdamW.
        beta1: f64,
        /// As for AdamW.
        beta2: f64,
        /// As for AdamW.
        eps: f64,
    },
    /// Gradient descent.
    Sgd {
        /// Decay of the running sum of gradients; 0 needs no buffer.
        momentum: f64,
        /// Nesterov's look ahead.
        nesterov: bool,
    },
}

/// Average of the parameters over the steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Average {
    /// None.
    None,
    /// Exponential: average ← decay·average + (1−decay)·parameters.
    Exponential {
        /// In [0, 1).
        decay: f64,
    },
    /// Mean of the parameters after each step later than `start`.
    Polyak {
        /// Steps that are left out.
        start: u32,
    },
}

/// A tensor [M,size] inside the flat buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Its first value.
    pub offset: u64,
    /// Values of a model.
    pub size: u64,
}

impl Tensor {
    /// Tensors one after the other, each at a multiple of 64.
    pub fn pack(models: u64, sizes: &[u64]) -> Vec<Tensor> {
        let mut end = 0u64;
        let next = |&size: &u64| {
            let offset = end.next_multiple_of(64);
            end = offset + models * size;
            Tensor { offset, size }
        };
        sizes.iter().map(next).collect()
    }
}

/// Sizes and options of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimiser {
    /// M.
    pub models: u64,
    /// The parameters, in the order of their offsets.
    pub tensors: Vec<Tensor>,
    /// Rule of the step.
    pub algorithm: Algorithm,
    /// Learning rate; the view `rate` multiplies it.
    pub learning_rate: f64,
    /// λ.
    pub weight_decay: f64,
    /// Largest norm of a model's gradient.
    pub max_grad_norm: Option<f64>,
    /// Average of the parameters.
    pub average: Average,
}

/// What a step reads and writes. Gradients, parameters, moments and averages are flat buffers of at least [`Optimiser::len`] reals.
/// Buffers that are written must differ from all others.
#[derive(Debug, Clone, Copy)]
pub struct OptimiserArgs<'a> {
    /// [`Optimiser::table`], uploaded once.
    pub table: &'a View,
    /// Gradients, read.
    pub grads: &'a View,
    /// Factor of the learning rate [M], read: the schedule, and each model's own rate.
    pub rate: &'a View,
    /// Loss [M], read for the finite check.
    pub loss: Option<&'a View>,
    /// Factor of each tensor's weight decay [K], read.
    pub decay: Option<&'a View>,
    /// β₁ or momentum, β₂, weight decay, max_grad_norm [M,4], read: instead of the op's.
    pub hyper: Option<&'a View>,
    /// Parameters, updated.
    pub parameters: &'a View,
    /// First moments or momentum, updated; zero at first. Not read by SGD without momentum.
    pub moment1: Option<&'a View>,
    /// Second moments, updated; zero at first. For AdamW and Adam.
    pub moment2: Option<&'a View>,
    /// Average of the parameters, updated.
    pub average: Option<&'a View>,
    /// Steps taken, steps skipped, status [M,3] words, updated; zero at first.
    pub counters: &'a View,
    /// Norm of the gradient before clipping [M], written; −1e30 where the step was skipped.
    pub norm: &'a View,
    /// [`Optimiser::scratch`] reals.
    pub scratch: &'a View,
}

fn split(x: f64) -> (f32, f32) {
    let high = x as f32;
    (high, (x - f64::from(high)) as f32)
}

fn parameter(name: &str, value: f64, help: &str) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() }
}

fn view_of(name: &str, view: Option<&View>, len: u64, elem: Elem) -> Result<()> {
    match view {
        Some(view) if view.len() == len && view.elem() == elem => Ok(()),
        other => {
            let got = other.map_or("none".to_string(), |v| format!("{} of {}", v.len(), v.elem().wgsl()));
            Err(Error::Shape { op: OP, arg: name.into(), expected: format!("{len} of {}", elem.wgsl()), got })
        }
    }
}

impl Optimiser {
    /// AdamW of one tensor with the usual constants: β 0.9 and 0.999, ε 1e-8, weight decay 0.01.
    pub fn adamw(models: u64, size: u64, learning_rate: f64) -> Optimiser {
        let algorithm = Algorithm::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        let tensors = vec![Tensor { offset: 0, size }];
        Optimiser { models, tensors, algorithm, learning_rate, weight_decay: 0.01, max_grad_norm: None, average: Average::None }
    }

    /// Refuses what has no meaning.
    /// # Errors
    /// `Parameter` that names the option; `TooLarge` for models beyond 2^31 values.
    pub fn check(&self) -> Result<()> {
        let unit = |name: &str, x: f64| if (0.0..1.0).contains(&x) { Ok(()) } else { Err(parameter(name, x, "give a number in [0, 1)")) };
        let at_least_zero = |name: &str, x: f64| if x.is_finite() && x >= 0.0 { Ok(()) } else { Err(parameter(name, x, "give a finite number, at least 0")) };
        at_least_zero("learning_rate", self.learning_rate)?;
        at_least_zero("weight_decay", self.weight_decay)?;
        if let Some(norm) = self.max_grad_norm {
            at_least_zero("max_grad_norm", norm)?;
            if norm == 0.0 {
                return Err(parameter("max_grad_norm", norm, "give a positive number, or none"));
            }
        }
        match self.algorithm {
            Algorithm::Adamw { beta1, beta2, eps } | Algorithm::Adam { beta1, beta2, eps } => {
                unit("beta1", beta1)?;
                unit("beta2", beta2)?;
                at_least_zero("eps", eps)?;
            }
            Algorithm::Sgd { momentum, nesterov } => {
                unit("momentum", momentum)?;
                if nesterov && momentum == 0.0 {
                    return Err(parameter("momentum", momentum, "Nesterov's correction needs momentum"));
                }
            }
        }
        if let Average::Exponential { decay } = self.average {
            unit("average decay", decay)?;
        }
        let mut end = 0;
        for (k, tensor) in self.tensors.iter().enumerate() {
            if tensor.offset < end {
                let (expected, got) = (format!("an offset of at least {end}, in order"), tensor.offset.to_string());
                return Err(Error::Shape { op: OP, arg: format!("tensors[{k}]"), expected, got });
            }
            end = tensor.offset.saturating_add(self.models.saturating_mul(tensor.size));
        }
        let needed = end.max(self.models.saturating_mul(self.stride()));
        let limit = 1 << 32;
        if needed >= limit {
            let help = "train fewer or smaller models at once".into();
            return Err(Error::TooLarge { what: format!("{OP}: all models together"), needed, limit, unit: "parameters", help });
        }
        Ok(())
    }

    /// Whether moments of the gradient, and of its square, are kept.
    fn keeps(&self) -> (bool, bool) {
        match self.algorithm {
            Algorithm::Sgd { momentum, .. } => (momentum > 0.0, false),
            _ => (true, true),
        }
    }

    /// Values of the flat buffers: the end of the last tensor.
    #[allow(clippy::len_without_is_empty, reason = "a length of buffers; emptiness is not a question that callers ask")]
    pub fn len(&self) -> u64 {
        self.tensors.last().map_or(0, |t| t.offset + self.models * t.size)
    }

    /// Words of the blocks that every model has: to be uploaded once for all steps.
    pub fn table(&self) -> Vec<u32> {
        let mut words = Vec::new();
        for (k, tensor) in self.tensors.iter().enumerate() {
            for begin in (0..tensor.size).step_by(BLOCK as usize) {
                words.extend([tensor.offset as u32, tensor.size as u32, begin as u32, k as u32]);
            }
        }
        words
    }

    /// B.
    fn blocks(&self) -> u64 {
        self.tensors.iter().map(|t| t.size.div_ceil(u64::from(BLOCK))).sum()
    }

    fn stride(&self) -> u64 {
        3 * self.blocks() + u64::from(SCALES)
    }

    /// Reals of scratch.
    pub fn scratch(&self) -> u64 {
        self.models * self.stride()
    }

    fn check_args(&self, args: &OptimiserArgs<'_>) -> Result<()> {
        let (m, all) = (self.models, self.len());
        let optional = |name: &str, view: Option<&View>, len: u64| view.map_or(Ok(()), |v| view_of(name, Some(v), len, Elem::F32));
        let flat = |name: &str, view: Option<&View>| match view {
            Some(view) if view.len() >= all && view.elem() == Elem::F32 => Ok(()),
            other => view_of(name, other, all, Elem::F32),
        };
        flat("grads", Some(args.grads))?;
        view_of("table", Some(args.table), ENTRY as u64 * self.blocks(), Elem::U32)?;
        view_of("rate", Some(args.rate), m, Elem::F32)?;
        optional("loss", args.loss, m)?;
        optional("decay", args.decay, self.tensors.len() as u64)?;
        optional("hyper", args.hyper, 4 * m)?;
        flat("parameters", Some(args.parameters))?;
        let (first, second) = self.keeps();
        if first {
            flat("moment1", args.moment1)?;
        }
        if second {
            flat("moment2", args.moment2)?;
        }
        if self.average != Average::None {
            flat("average", args.average)?;
        }
        view_of("counters", Some(args.counters), 3 * m, Elem::U32)?;
        view_of("norm", Some(args.norm), m, Elem::F32)?;
        view_of("scratch", Some(args.scratch), self.scratch(), Elem::F32)
    }

    fn params(&self, args: &OptimiserArgs<'_>) -> OptimiserParams {
        let mut p: OptimiserParams = bytemuck::Zeroable::zeroed();
        (p.blocks, p.stride) = (self.blocks() as u32, self.stride() as u32);
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        p.flags = bit(args.decay.is_some(), flag::DECAY) | bit(args.loss.is_some(), flag::LOSS) | bit(args.hyper.is_some(), flag::HYPER);
        (p.learning_rate, p.learning_rate_low) = split(self.learning_rate);
        (p.weight_decay, p.weight_decay_low) = split(self.weight_decay);
        (p.max_grad_norm, p.max_grad_norm_low) = split(self.max_grad_norm.unwrap_or(0.0));
        match self.algorithm {
            Algorithm::Adamw { beta1, beta2, eps } | Algorithm::Adam { beta1, beta2, eps } => {
                p.algorithm = u32::from(matches!(self.algorithm, Algorithm::Adam { .. }));
                (p.rate1, p.rate1_low) = split(1.0 - beta1);
                (p.rate2, p.rate2_low) = split(1.0 - beta2);
                (p.log1, p.log1_low) = split(log_beta(beta1));
                (p.log2, p.log2_low) = split(log_beta(beta2));
                (p.eps, p.eps_low) = split(eps);
            }
            Algorithm::Sgd { momentum, nesterov } => {
                p.algorithm = 2;
                p.flags |= bit(nesterov, flag::NESTEROV) | bit(momentum > 0.0, flag::MOMENTUM);
                (p.rate1, p.rate1_low) = split(momentum);
            }
        }
        match self.average {
            Average::None => {}
            Average::Exponential { decay } => {
                p.flags |= flag::AVERAGE;
                (p.average_rate, p.average_rate_low) = split(1.0 - decay);
            }
            Average::Polyak { start } => {
                p.flags |= flag::AVERAGE | flag::POLYAK;
                p.average_start = start;
            }
        }
        p
    }
}

/// A launch over blocks of some models: params, and the ranges of the flat buffers and of the scratch to bind.
struct Run {
    params: OptimiserParams,
    elements: Range<u64>,
    rows: Range<u64>,
}

/// Splits the blocks of all models into launches: as many whole tensors as fit, else models of a tensor, else blocks of a model.
fn runs(device: &Device, op: &Optimiser, params: OptimiserParams) -> Vec<Run> {
    let limits = device.limits();
    let align = limits.align;
    let down = |i: u64| i / align * align;
    let values = (limits.binding_bytes / 4).saturating_sub(align).max(1);
    let groups = limits.groups().min(limits.work_per_launch / (16 * u64::from(BLOCK))).max(1);
    let rows_fit = |models: u64| models * op.stride() <= values;
    let mut out = Vec::new();
    let mut push = |blocks: Range<u64>, models: Range<u64>, elements: Range<u64>| {
        let elements = down(elements.start)..elements.end;
        let rows = down(models.start * op.stride())..models.end * op.stride();
        let of_run = OptimiserParams {
            first_block: blocks.start as u32,
            block_count: (blocks.end - blocks.start) as u32,
            first_model: models.start as u32,
            count: ((blocks.end - blocks.start) * (models.end - models.start)) as u32,
            element: elements.start as u32,
            row: rows.start as u32,
            ..params
        };
        out.push(Run { params: of_run, elements, rows });
    };
    let tensors: Vec<(Tensor, Range<u64>)> = op
        .tensors
        .iter()
        .scan(0, |end, &t| {
            let start = *end;
            *end += t.size.div_ceil(u64::from(BLOCK));
            Some((t, start..*end))
        })
        .filter(|(t, _)| t.size > 0)
        .collect();
    let mut k = 0;
    while k < tensors.len() {
        let (first, blocks) = tensors[k].clone();
        let fits = |(last, to): &&(Tensor, Range<u64>)| {
            last.offset + op.models * last.size - first.offset <= values && op.models * (to.end - blocks.start) <= groups && rows_fit(op.models)
        };
        let together = tensors[k..].iter().take_while(fits).count();
        if together > 0 {
            let (last, to) = &tensors[k + together - 1];
            push(blocks.start..to.end, 0..op.models, first.offset..last.offset + op.models * last.size);
            k += together;
            continue;
        }
        let own = blocks.end - blocks.start;
        let models = (values / first.size).min(groups / own).min(values / op.stride());
        for from in (0..op.models).step_by(models.max(1) as usize) {
            let to = (from + models.max(1)).min(op.models);
            if models > 0 {
                push(blocks.clone(), from..to, first.offset + from * first.size..first.offset + to * first.size);
                continue;
            }
            let most = (values / u64::from(BLOCK)).min(groups).max(1);
            for block in (0..own).step_by(most as usize) {
                let end = (block + most).min(own);
                let at = |i: u64| first.offset + from * first.size + (i * u64::from(BLOCK)).min(first.size);
                push(blocks.start + block..blocks.start + end, from..to, at(block)..at(end));
            }
        }
        k += 1;
    }
    out
}

/// Records one step of every model: parameters, moments, averages and counters are updated in place.
///
/// The step of model m depends on model m alone. Three launches (four for SGD with an average), more where a binding is too small.
/// # Errors
/// `Shape` for a view of another length or a missing one; `Parameter` as [`Optimiser::check`].
pub fn optimiser_step(pass: &mut Pass, op: &Optimiser, args: &OptimiserArgs<'_>) -> Result<()> {
    op.check()?;
    op.check_args(args)?;
    if op.models == 0 || op.blocks() == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    let params = op.params(args);
    let runs = runs(&device, op, params);
    for run in &runs {
        let args = [args.grads.part(run.elements.clone()), args.table.clone(), args.scratch.part(run.rows.clone())];
        pass.launch(&GRADIENT_NORM, &run.params, &args)?;
    }
    prepare(pass, op, &params, args)?;
    for Run { params, elements, rows } in runs {
        let flat = |view: &View| view.part(elements.clone());
        let (g, scratch, w, table) = (flat(args.grads), args.scratch.part(rows), flat(args.parameters), args.table.clone());
        let decay = args.decay.map_or_else(|| g.clone(), View::clone);
        // What the options leave out is bound to something else and not touched.
        let other = |view: Option<&View>| view.map_or_else(|| args.norm.clone(), flat);
        match (op.algorithm, args.moment1, args.moment2) {
            (Algorithm::Sgd { .. }, momentum, _) => {
                let momentum = other(momentum.filter(|_| op.keeps().0));
                pass.launch(&SGD_UPDATE, &params, &[g, scratch.clone(), decay, table.clone(), w.clone(), momentum])?;
                if op.average != Average::None {
                    pass.launch(&PARAMETER_AVERAGE, &params, &[w, scratch, table, other(args.average)])?;
                }
            }
            (_, Some(m), Some(v)) => {
                let average = other(args.average.filter(|_| op.average != Average::None));
                pass.launch(&ADAM_UPDATE, &params, &[g, scratch, decay, table, w, flat(m), flat(v), average])?;
            }
            _ => return Err(Error::Internal("moments were checked".into())),
        }
    }
    Ok(())
}

/// Launches over models, in runs whose ranges start aligned.
fn prepare(pass: &mut Pass, op: &Optimiser, params: &OptimiserParams, args: &OptimiserArgs<'_>) -> Result<()> {
    let device = pass.device().clone();
    let (stride, blocks, align) = (op.stride(), op.blocks(), device.limits().align);
    device.check_rounds(OP, blocks.div_ceil(64) + 8, "rounds")?;
    let fits = device.plan(OP, op.models, stride, 1, 200 + 3 * blocks)?.first().map_or(0, |run| run.end);
    let run = if fits == op.models { fits } else { fits / align * align };
    if run == 0 {
        // Fewer models in a binding than values in an aligned step: one by one through aligned copies would be slower than any limit.
        let help = "train fewer or smaller models, or use another device".into();
        let (needed, limit) = (4 * stride * align, device.limits().binding_bytes);
        return Err(Error::TooLarge { what: format!("{OP}: the scratch of {align} models"), needed, limit, unit: "B", help });
    }
    for from in (0..op.models).step_by(run as usize) {
        let to = (from + run).min(op.models);
        let of = |view: &View, width: u64| view.part(width * from..width * to);
        let rate = of(args.rate, 1);
        let p = OptimiserParams { count: (to - from) as u32, ..*params };
        let loss = args.loss.map_or_else(|| rate.clone(), |v| of(v, 1));
        let hyper = args.hyper.map_or_else(|| rate.clone(), |v| of(v, 4));
        pass.launch(&OPTIMISER_PREPARE, &p, &[rate, loss, hyper, of(args.scratch, stride), of(args.counters, 3), of(args.norm, 1)])?;
    }
    Ok(())
}

/// Conformance binding: `grads` [steps,P] applied one after the other to `param` [P].
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let (start, grads) = (case.f32("param")?, case.f32("grads")?);
    let size = start.len() as u64;
    let (beta1, beta2, eps) = (case.number("beta1")?, case.number("beta2")?, case.number("eps")?);
    let op = Optimiser {
        weight_decay: case.number("weight_decay")?,
        max_grad_norm: case.number("max_grad_norm").ok(),
        algorithm: Algorithm::Adamw { beta1, beta2, eps },
        ..Optimiser::adamw(1, size, case.number("lr")?)
    };
    let parameters = View::from(&device.upload("parameters", start)?);
    let zeros = |label: &str, len: u64| Ok::<View, Error>(View::from(&device.zeros(label, len)?));
    let (moment1, moment2, norm, scratch) = (zeros("moment1", size)?, zeros("moment2", size)?, zeros("norm", 1)?, zeros("scratch", op.scratch())?);
    let table = View::from(&device.upload_words("table", op.table())?);
    let (rate, counters) = (View::from(&device.upload("rate", &[1.0])?), View::from(&device.zeros_u32("counters", 3)?));
    let mut pass = device.pass(OP);
    for grads in grads.chunks_exact(start.len().max(1)) {
        let grads = View::from(&device.upload("grads", grads)?);
        let args = OptimiserArgs {
            table: &table,
            grads: &grads,
            rate: &rate,
            loss: None,
            decay: None,
            hyper: None,
            parameters: &parameters,
            moment1: Some(&moment1),
            moment2: Some(&moment2),
            average: None,
            counters: &counters,
            norm: &norm,
            scratch: &scratch,
        };
        optimiser_step(&mut pass, &op, &args)?;
    }
    let read = pass.read(&parameters)?;
    let mut outputs = Outputs::launched(pass.launches());
    outputs.reals("param", pass.submit()?.f64(read)?);
    Ok(outputs)
}
