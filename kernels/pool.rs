//! Pooling over time: one row per sequence from its valid steps.
//!
//! last   y[b,:] = h[b, n_b − 1, :];   mean  y[b,:] = Σ_{t<n_b} h[b,t,:]/n_b;
//! attention  w[b,:] = softmax of scores[b, t<n_b],  y[b,:] = Σ_{t<n_b} w[b,t]·h[b,t,:].
//!
//! Shapes   h [B,T,H]; scores, weights [B,T]; lengths words [B'], B a multiple of B' (models share them: sequence b has length b mod
//!          B'), longer than T counts as T; y [B,H]. A sequence of length 0 gives 0 and no gradient.
//! Backward grad_h[b,t,:] = w·grad_y[b,:], 0 from n_b on, w being 1 at the last step, 1/n_b, or the weights;
//!          grad_scores[b,t] = w_t·(g_t − Σ_s w_s·g_s), g_t = grad_y[b,:]·h[b,t,:]. Forward keeps the weights.
//! Launch   `pool`: thread = (b, column), over t. `pool_backward`: thread = element of grad_h. `pool_weights` and their gradient: one
//!          group per sequence.
//! Scratch  none.     Floor 4 bytes per element of h; of grad_h (and of h for grad_scores) backward.
//! Numerics sums of 32 in a row, then their sum; softmax shifted by its maximum. Padding is not read.
//! Source   Ilse, Tomczak, Welling 2018, arXiv:1802.04712 (attention pooling; its gated scores are made of linear and map).
//! Files    shaders/pool.wgsl · cuda/pool.cu · reference: the `_cpu` functions

use crate::device::{Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::map::{bind, check_len};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of the four kernels.
    pub struct PoolParams {
        /// Sequences of this launch.
        rows: u32,
        /// Steps.
        steps: u32,
        /// Columns.
        width: u32,
        /// 0 last, 1 mean, 2 weighted.
        kind: u32,
        /// Sequences after which the lengths repeat.
        period: u32,
        /// First sequence modulo the period.
        first: u32,
        /// First element of h or grad_h …
        h_at: u32,
        /// … of the weights and scores …
        w_at: u32,
        /// … and of y or grad_y.
        y_at: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 128;

fn params(words: &[u32]) -> PoolParams {
    params_of(words).unwrap_or_else(bytemuck::Zeroable::zeroed)
}

fn elements(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.rows) * u64::from(p.steps) * u64::from(p.width)
}

fn steps(words: &[u32]) -> u64 {
    u64::from(params(words).rows) * u64::from(params(words).steps)
}

/// Weighted sum over the valid steps.
pub static POOL: Kernel = Kernel {
    name: "pool",
    about: "last valid step, mean or weighted sum over time",
    args: &[reads("h"), reads("weights"), reads_u32("lengths"), writes("y")],
    params: layout::<PoolParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| (u64::from(params(words).rows) * u64::from(params(words).width)).div_ceil(u64::from(WG)),
    wgsl: wgsl!("pool"),
    cuda: cuda!("pool"),
    cpu: Some(Cpu { f32: pool_cpu::<f32>, f64: pool_cpu::<f64> }),
    cost: Cost { unit: "element", units: elements, bytes: 4.0, flops: 2.0 },
};

/// Gradient of the pooled steps.
pub static POOL_BACKWARD: Kernel = Kernel {
    name: "pool_backward",
    about: "gradient of pooled steps",
    args: &[reads("grad_y"), reads("weights"), reads_u32("lengths"), writes("grad_h")],
    params: layout::<PoolParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| elements(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("pool"),
    cuda: cuda!("pool"),
    cpu: Some(Cpu { f32: pool_backward_cpu::<f32>, f64: pool_backward_cpu::<f64> }),
    cost: Cost { unit: "element", units: elements, bytes: 4.0, flops: 1.0 },
};

/// Softmax of the scores over the valid steps.
pub static POOL_WEIGHTS: Kernel = Kernel {
    name: "pool_weights",
    about: "softmax of scores over the valid steps",
    args: &[reads("scores"), reads_u32("lengths"), writes("weights")],
    params: layout::<PoolParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| params(words).rows.into(),
    wgsl: wgsl!("pool"),
    cuda: cuda!("pool"),
    cpu: Some(Cpu { f32: pool_weights_cpu::<f32>, f64: pool_weights_cpu::<f64> }),
    cost: Cost { unit: "step", units: steps, bytes: 8.0, flops: 12.0 },
};

/// Gradient of the scores.
pub static POOL_WEIGHTS_BACKWARD: Kernel = Kernel {
    name: "pool_weights_backward",
    about: "gradient of the scores of attention pooling",
    args: &[reads("h"), reads("weights"), reads("grad_y"), reads_u32("lengths"), writes("grad_scores")],
    params: layout::<PoolParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| params(words).rows.into(),
    wgsl: wgsl!("pool"),
    cuda: cuda!("pool"),
    cpu: Some(Cpu { f32: pool_weights_backward_cpu::<f32>, f64: pool_weights_backward_cpu::<f64> }),
    cost: Cost { unit: "element", units: elements, bytes: 4.0, flops: 2.0 },
};

const LAST: u32 = 0;
const MEAN: u32 = 1;
const WEIGHTED: u32 = 2;

/// Sizes of a pooling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Sequences B, of all models.
    pub rows: u64,
    /// Lengths B': B is a multiple of it.
    pub lengths: u64,
    /// Steps T.
    pub steps: u64,
    /// Columns H.
    pub width: u64,
}

impl Pool {
    /// # Errors
    /// `Shape` if the sequences are no multiple of the lengths; `TooLarge` for sizes that no index holds.
    pub fn check(&self) -> Result<()> {
        if self.rows > 0 && (self.lengths == 0 || !self.rows.is_multiple_of(self.lengths)) {
            let (expected, got) = (format!("a divisor of the {} sequences", self.rows), self.lengths.to_string());
            return Err(Error::Shape { op: "pool", arg: "lengths".into(), expected, got });
        }
        let (needed, limit) = (self.steps.saturating_mul(self.width).max(self.rows), (1u64 << 31) - 1);
        if needed <= limit {
            return Ok(());
        }
        let help = "pool fewer or shorter sequences at once".into();
        Err(Error::TooLarge { what: "pool: steps × columns, or sequences".into(), needed, limit, unit: "elements", help })
    }

    fn inner(&self) -> u64 {
        self.steps * self.width
    }

    fn check_views(
        &self,
        op: &'static str,
        h: Option<(&'static str, &View)>,
        w: &[(&'static str, &View)],
        lengths: &View,
        y: Option<(&'static str, &View)>,
    ) -> Result<()> {
        self.check()?;
        check_len(op, "lengths", lengths, self.lengths)?;
        if let Some((arg, view)) = h {
            check_len(op, arg, view, self.rows.saturating_mul(self.inner()))?;
        }
        for (arg, view) in w {
            check_len(op, arg, view, self.rows.saturating_mul(self.steps))?;
        }
        if let Some((arg, view)) = y {
            check_len(op, arg, view, self.rows.saturating_mul(self.width))?;
        }
        Ok(())
    }

    /// Sequences of each launch, with their params.
    fn runs(&self, pass: &Pass, op: &'static str, kind: u32, groups: u64, work: u64) -> Result<Vec<(u64, PoolParams)>> {
        let device = pass.device();
        let runs = device.plan(op, self.rows, self.inner().max(1) + device.limits().align, groups, work)?;
        let most = ((1 << 31) / self.inner().max(1)).max(1);
        let params = |start: u64, rows: u64| PoolParams {
            rows: rows as u32,
            steps: self.steps as u32,
            width: self.width as u32,
            kind,
            period: self.lengths as u32,
            first: (start % self.lengths) as u32,
            h_at: 0,
            w_at: 0,
            y_at: 0,
        };
        let pieces = |run: std::ops::Range<u64>| (run.start..run.end).step_by(most as usize).map(move |start| (start, most.min(run.end - start)));
        Ok(runs.into_iter().flat_map(pieces).map(|(start, rows)| (start, params(start, rows))).collect())
    }

    fn forward(&self, pass: &mut Pass, op: &'static str, kind: u32, h: &View, weights: Option<&View>, lengths: &View, y: &View) -> Result<()> {
        let device = pass.device().clone();
        device.check_rounds(op, 2 * self.steps + 64, "rounds")?;
        for (start, params) in self.runs(pass, op, kind, self.width.div_ceil(u64::from(WG)) + 1, 4 * self.inner())? {
            let rows = u64::from(params.rows);
            let (h, h_at) = bind(&device, h, start * self.inner(), rows * self.inner());
            let (w, w_at) = weights.map_or((h.clone(), 0), |w| bind(&device, w, start * self.steps, rows * self.steps));
            let (y, y_at) = bind(&device, y, start * self.width, rows * self.width);
            pass.launch(&POOL, &PoolParams { h_at, w_at, y_at, ..params }, &[h, w, lengths.clone(), y])?;
        }
        Ok(())
    }

    fn backward(&self, pass: &mut Pass, op: &'static str, kind: u32, weights: Option<&View>, lengths: &View, grad_y: &View, grad_h: &View) -> Result<()> {
        let device = pass.device().clone();
        for (start, params) in self.runs(pass, op, kind, self.inner().div_ceil(u64::from(WG)) + 1, 4 * self.inner())? {
            let rows = u64::from(params.rows);
            let (grad_h, h_at) = bind(&device, grad_h, start * self.inner(), rows * self.inner());
            let (grad_y, y_at) = bind(&device, grad_y, start * self.width, rows * self.width);
            let (w, w_at) = weights.map_or((grad_y.clone(), 0), |w| bind(&device, w, start * self.steps, rows * self.steps));
            pass.launch(&POOL_BACKWARD, &PoolParams { h_at, w_at, y_at, ..params }, &[grad_y, w, lengths.clone(), grad_h])?;
        }
        Ok(())
    }
}

/// Records y [B,H]: the last valid step of h [B,T,H].
/// # Errors
/// `Shape` for other lengths; `TooLarge` if one sequence does not fit a launch.
pub fn last_valid(pass: &mut Pass, op: &Pool, h: &View, lengths: &View, y: &View) -> Result<()> {
    op.check_views("last_valid", Some(("h", h)), &[], lengths, Some(("y", y)))?;
    op.forward(pass, "last_valid", LAST, h, None, lengths, y)
}

/// Records grad_h [B,T,H] of [`last_valid`].
/// # Errors
/// As [`last_valid`].
pub fn last_valid_backward(pass: &mut Pass, op: &Pool, lengths: &View, grad_y: &View, grad_h: &View) -> Result<()> {
    op.check_views("last_valid_backward", Some(("grad_h", grad_h)), &[], lengths, Some(("grad_y", grad_y)))?;
    op.backward(pass, "last_valid_backward", LAST, None, lengths, grad_y, grad_h)
}

/// Records y [B,H]: the mean of the valid steps of h [B,T,H].
/// # Errors
/// As [`last_valid`].
pub fn mean_pool(pass: &mut Pass, op: &Pool, h: &View, lengths: &View, y: &View) -> Result<()> {
    op.check_views("mean_pool", Some(("h", h)), &[], lengths, Some(("y", y)))?;
    op.forward(pass, "mean_pool", MEAN, h, None, lengths, y)
}

/// Records grad_h [B,T,H] of [`mean_pool`].
/// # Errors
/// As [`last_valid`].
pub fn mean_pool_backward(pass: &mut Pass, op: &Pool, lengths: &View, grad_y: &View, grad_h: &View) -> Result<()> {
    op.check_views("mean_pool_backward", Some(("grad_h", grad_h)), &[], lengths, Some(("grad_y", grad_y)))?;
    op.backward(pass, "mean_pool_backward", MEAN, None, lengths, grad_y, grad_h)
}

/// Records weights [B,T] = softmax of scores [B,T] over the valid steps (0 after them), and y [B,H] = Σ weights·h.
/// # Errors
/// As [`last_valid`].
pub fn attention_pool(pass: &mut Pass, op: &Pool, scores: &View, h: &View, lengths: &View, weights: &View, y: &View) -> Result<()> {
    op.check_views("attention_pool", Some(("h", h)), &[("scores", scores), ("weights", weights)], lengths, Some(("y", y)))?;
    let device = pass.device().clone();
    device.check_rounds("attention_pool", 3 * op.steps.div_ceil(u64::from(WG)) + 64, "rounds")?;
    for (start, params) in op.runs(pass, "attention_pool", WEIGHTED, 1, 16 * op.steps)? {
        let rows = u64::from(params.rows);
        let ((s, h_at), (w, w_at)) = (bind(&device, scores, start * op.steps, rows * op.steps), bind(&device, weights, start * op.steps, rows * op.steps));
        pass.launch(&POOL_WEIGHTS, &PoolParams { h_at, w_at, ..params }, &[s, lengths.clone(), w])?;
    }
    op.forward(pass, "attention_pool", WEIGHTED, h, Some(weights), lengths, y)
}

/// Records the gradients of [`attention_pool`] that are given, from the weights that it kept.
/// # Errors
/// As [`last_valid`].
pub fn attention_pool_backward(
    pass: &mut Pass,
    op: &Pool,
    h: &View,
    lengths: &View,
    weights: &View,
    grad_y: &View,
    grad_scores: Option<&View>,
    grad_h: Option<&View>,
) -> Result<()> {
    op.check_views("attention_pool_backward", Some(("h", h)), &[("weights", weights)], lengths, Some(("grad_y", grad_y)))?;
    if let Some(grad_h) = grad_h {
        op.check_views("attention_pool_backward", Some(("grad_h", grad_h)), &[], lengths, None)?;
        op.backward(pass, "attention_pool_backward", WEIGHTED, Some(weights), lengths, grad_y, grad_h)?;
    }
    let Some(grad_scores) = grad_scores else { return Ok(()) };
    op.check_views("attention_pool_backward", None, &[("grad_scores", grad_scores)], lengths, None)?;
    let device = pass.device().clone();
    device.check_rounds("attention_pool_backward", (op.width + 2) * op.steps.div_ceil(u64::from(WG)) + 64, "rounds")?;
    for (start, params) in op.runs(pass, "attention_pool_backward", WEIGHTED, 1, 4 * op.inner())? {
        let rows = u64::from(params.rows);
        let (h, h_at) = bind(&device, h, start * op.inner(), rows * op.inner());
        let (w, w_at) = bind(&device, weights, start * op.steps, rows * op.steps);
        // grad_scores lies as the weights do.
        let (gs, _) = bind(&device, grad_scores, start * op.steps, rows * op.steps);
        let (gy, y_at) = bind(&device, grad_y, start * op.width, rows * op.width);
        pass.launch(&POOL_WEIGHTS_BACKWARD, &PoolParams { h_at, w_at, y_at, ..params }, &[h, w, gy, lengths.clone(), gs])?;
    }
    Ok(())
}

// ---- CPU --------------------------------------------------------------------------------------------------------------

impl PoolParams {
    fn valid(&self, lengths: &[u32], b: usize) -> usize {
        lengths[(self.first as usize + b) % self.period as usize].min(self.steps) as usize
    }

    /// Weight of step t of n.
    fn weight<R: Real>(&self, weights: &[R], b: usize, t: usize, n: usize) -> R {
        match self.kind {
            LAST => R::of(if t + 1 == n { 1.0 } else { 0.0 }),
            MEAN => R::ONE / R::of(n as f64),
            _ => weights[self.w_at as usize + b * self.steps as usize + t],
        }
    }
}

fn pool_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PoolParams = launch.params()?;
    let (h, weights, lengths, y) = (&launch.real()?[p.h_at as usize..], launch.real()?, launch.word()?, launch.real_mut()?);
    let (steps, width) = (p.steps as usize, p.width as usize);
    if width == 0 {
        return Ok(());
    }
    let y = &mut y[p.y_at as usize..][..p.rows as usize * width];
    let least = (16384 / (steps * width).max(1)).max(1);
    y.par_chunks_exact_mut(width).enumerate().with_min_len(least).for_each_init(
        || vec![R::ZERO; width],
        |block, (b, y)| {
            let n = p.valid(lengths, b);
            y.fill(R::ZERO);
            if p.kind == LAST {
                if n > 0 {
                    y.copy_from_slice(&h[(b * steps + n - 1) * width..][..width]);
                }
                return;
            }
            for start in (0..n).step_by(32) {
                block.fill(R::ZERO);
                for t in start..(start + 32).min(n) {
                    let w = if p.kind == MEAN { R::ONE } else { p.weight(weights, b, t, n) };
                    block.iter_mut().zip(&h[(b * steps + t) * width..][..width]).for_each(|(sum, &h)| *sum += w * h);
                }
                y.iter_mut().zip(block.iter()).for_each(|(y, &sum)| *y += sum);
            }
            if p.kind == MEAN && n > 0 {
                y.iter_mut().for_each(|y| *y = *y / R::of(n as f64));
            }
        },
    );
    Ok(())
}

fn pool_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PoolParams = launch.params()?;
    let (grad_y, weights, lengths, grad_h) = (&launch.real()?[p.y_at as usize..], launch.real()?, launch.word()?, launch.real_mut()?);
    let (steps, width) = (p.steps as usize, p.width as usize);
    if width * steps == 0 {
        return Ok(());
    }
    let grad_h = &mut grad_h[p.h_at as usize..][..p.rows as usize * steps * width];
    grad_h.par_chunks_exact_mut(width).enumerate().with_min_len((16384 / width).max(1)).for_each(|(i, out)| {
        let (b, t) = (i / steps, i % steps);
        let n = p.valid(lengths, b);
        if t >= n || (p.kind == LAST && t + 1 < n) {
            return out.fill(R::ZERO);
        }
        let w = p.weight(weights, b, t, n);
        out.iter_mut().zip(&grad_y[b * width..][..width]).for_each(|(out, &g)| *out = w * g);
    });
    Ok(())
}

fn pool_weights_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PoolParams = launch.params()?;
    let (scores, lengths, weights) = (&launch.real()?[p.h_at as usize..], launch.word()?, launch.real_mut()?);
    let steps = p.steps as usize;
    if steps == 0 {
        return Ok(());
    }
    let weights = &mut weights[p.w_at as usize..][..p.rows as usize * steps];
    weights.par_chunks_exact_mut(steps).enumerate().with_min_len((4096 / steps).max(1)).for_each(|(b, weights)| {
        let n = p.valid(lengths, b);
        let scores = &scores[b * steps..][..n];
        let most = scores.iter().fold(R::of(-1e30), |most, &s| most.max(s));
        weights.fill(R::ZERO);
        weights.iter_mut().zip(scores).for_each(|(w, &s)| *w = (s - most).exp());
        let sum: R = weights[..n].iter().copied().sum();
        weights[..n].iter_mut().for_each(|w| *w = *w / sum);
    });
    Ok(())
}

fn pool_weights_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PoolParams = launch.params()?;
    let (h, weights, grad_y) = (&launch.real()?[p.h_at as usize..], &launch.real()?[p.w_at as usize..], &launch.real()?[p.y_at as usize..]);
    let (lengths, grad_scores) = (launch.word()?, launch.real_mut()?);
    let (steps, width) = (p.steps as usize, p.width as usize);
    if steps == 0 {
        return Ok(());
    }
    let grad_scores = &mut grad_scores[p.w_at as usize..][..p.rows as usize * steps];
    grad_scores.par_chunks_exact_mut(steps).enumerate().with_min_len((16384 / (steps * width).max(1)).max(1)).for_each(|(b, out)| {
        let n = p.valid(lengths, b);
        let (g, w) = (&grad_y[b * width..][..width], &weights[b * steps..][..steps]);
        out.fill(R::ZERO);
        let mut mean = R::ZERO;
        for t in 0..n {
            out[t] = h[(b * steps + t) * width..][..width].iter().zip(g).map(|(&h, &g)| h * g).sum();
            mean += w[t] * out[t];
        }
        for t in 0..n {
            out[t] = w[t] * (out[t] - mean);
        }
    });
    Ok(())
}
