//! Softmax of rows, or its logarithm, with masks: y[n,d] = e^(x[n,d] − m[n]) / s[n],  m = max, s = Σ e^(x − m), over the allowed d.
//!
//! log: y = x − m − ln s.  Backward: grad_x = y·(grad_y − Σ y·grad_y);  log: grad_x = grad_y − e^y·Σ grad_y. It needs y alone.
//!
//! Shapes   x, y, grad_y, grad_x [N,D]; mask u32: lengths [N] (d < length is allowed) or words [N,D] (not 0 is allowed).
//! Masked   an entry that is not allowed, and one with x ≤ −1e29, gives 0 (log: −1e30) and has gradient 0; a row without any other gives
//!          0 (log: −1e30) everywhere.
//! Launch   LANES threads a row (8 up to D = 64, else 32: one warp), 128 threads a workgroup; the row stays in the cache between passes.
//! Floor    8·N·D bytes forward, 12·N·D backward.
//! Numerics shifted by the maximum; sums in f32 over D/LANES values per thread, then a tree.
//! Files    shaders/softmax.wgsl · cuda/softmax.cu · reference: the `_cpu` functions; f32: the lane-wise ones below

use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::lanes;
use crate::real::Real;
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the kernels.
    #[derive(Default)]
    pub struct SoftmaxParams {
        /// Rows of this launch.
        rows: u32,
        /// Values of a row.
        width: u32,
        /// 1 for the logarithm.
        log: u32,
        /// 1 where the mask has a word per value, 0 where it has a length per row.
        words: u32,
    }
}

const WG: u32 = 128;
const LANES: u64 = 32;
const FEW_LANES: u64 = 8;
/// Width up to which a row has few lanes.
const NARROW: u64 = 64;
/// What the logarithm of nothing is written as.
const LOG_ZERO: f64 = -1e30;
/// From here down a value counts as masked.
const MASKED: f64 = -1e29;

fn params(words: &[u32]) -> SoftmaxParams {
    params_of(words).unwrap_or_default()
}

fn groups(words: &[u32], lanes: u64) -> u64 {
    u64::from(params(words).rows).div_ceil(u64::from(WG) / lanes)
}

fn elements(words: &[u32]) -> u64 {
    u64::from(params(words).rows) * u64::from(params(words).width)
}

/// Forward, a warp per row.
pub static SOFTMAX_FORWARD: Kernel = Kernel {
    name: "softmax_forward",
    about: "softmax or log-softmax of rows",
    args: &[reads("x"), writes("y")],
    params: layout::<SoftmaxParams>(),
    workgroup: WG,
    constants: &[("LANES", LANES as u32)],
    groups: |words| groups(words, LANES),
    wgsl: wgsl!("softmax"),
    cuda: cuda!("softmax"),
    cpu: Some(Cpu { f32: forward_lanes, f64: softmax_forward_cpu::<f64> }),
    cost: Cost { unit: "value", units: elements, bytes: 8.0, flops: 12.0 },
};

/// Forward of narrow rows.
pub static SOFTMAX_FORWARD_SMALL: Kernel = Kernel {
    name: "softmax_forward_small",
    about: "the same for narrow rows",
    constants: &[("LANES", FEW_LANES as u32)],
    groups: |words| groups(words, FEW_LANES),
    ..SOFTMAX_FORWARD
};

/// Forward under a mask, a warp per row.
pub static SOFTMAX_MASKED: Kernel = Kernel {
    name: "softmax_masked",
    about: "softmax or log-softmax of the allowed values of rows",
    args: &[reads("x"), reads_u32("mask"), writes("y")],
    cpu: Some(Cpu { f32: masked_lanes, f64: softmax_masked_cpu::<f64> }),
    ..SOFTMAX_FORWARD
};

/// Forward of narrow rows under a mask.
pub static SOFTMAX_MASKED_SMALL: Kernel = Kernel {
    name: "softmax_masked_small",
    about: "the same for narrow rows under a mask",
    constants: &[("LANES", FEW_LANES as u32)],
    groups: |words| groups(words, FEW_LANES),
    ..SOFTMAX_MASKED
};

/// Backward, a warp per row.
pub static SOFTMAX_BACKWARD: Kernel = Kernel {
    name: "softmax_backward",
    about: "gradient of softmax or log-softmax",
    args: &[reads("y"), reads("grad_y"), writes("grad_x")],
    cpu: Some(Cpu { f32: backward_lanes, f64: softmax_backward_cpu::<f64> }),
    cost: Cost { unit: "value", units: elements, bytes: 12.0, flops: 5.0 },
    ..SOFTMAX_FORWARD
};

/// Backward of narrow rows.
pub static SOFTMAX_BACKWARD_SMALL: Kernel = Kernel {
    name: "softmax_backward_small",
    about: "the same for narrow rows",
    constants: &[("LANES", FEW_LANES as u32)],
    groups: |words| groups(words, FEW_LANES),
    ..SOFTMAX_BACKWARD
};

// ---- the reference ------------------------------------------------------------------------------------------------------

impl SoftmaxParams {
    fn allows(&self, mask: &[u32], row: usize, d: usize) -> bool {
        if self.words == 1 { mask[row * self.width as usize + d] != 0 } else { d < mask[row] as usize }
    }
}

/// Softmax of a row in place.
fn softmax_row<R: Real>(y: &mut [R], log: bool) {
    let (masked, zero) = (R::of(MASKED), R::of(if log { LOG_ZERO } else { 0.0 }));
    let allowed = |x: R| x > masked || x.f64().is_nan();
    // A NaN is kept, by the sum.
    let most = y.iter().fold(R::of(LOG_ZERO), |m, &x| m.max(x));
    let sum = y.iter().filter(|x| allowed(**x)).map(|&x| (x - most).exp()).sum::<R>();
    for x in y {
        *x = match (allowed(*x), log) {
            (false, _) => zero,
            (true, true) => (*x - most) - sum.ln(),
            (true, false) => (*x - most).exp() / sum,
        };
    }
}

fn softmax_forward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: SoftmaxParams = launch.params()?;
    let (x, y) = (launch.real()?, launch.real_mut()?);
    y.copy_from_slice(x);
    y.chunks_exact_mut(p.width as usize).for_each(|y| softmax_row(y, p.log == 1));
    Ok(())
}

fn softmax_masked_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: SoftmaxParams = launch.params()?;
    let (x, mask, y) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let d = p.width as usize;
    for (row, (x, y)) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).enumerate() {
        for j in 0..d {
            y[j] = if p.allows(mask, row, j) { x[j] } else { R::of(LOG_ZERO) };
        }
        softmax_row(y, p.log == 1);
    }
    Ok(())
}

fn softmax_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: SoftmaxParams = launch.params()?;
    let (y, grad_y, grad_x) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let (d, log, masked) = (p.width as usize, p.log == 1, R::of(MASKED));
    for ((y, g), out) in y.chunks_exact(d).zip(grad_y.chunks_exact(d)).zip(grad_x.chunks_exact_mut(d)) {
        let allowed = |j: usize| !(log && y[j] <= masked);
        let sum = (0..d).filter(|&j| allowed(j)).map(|j| if log { g[j] } else { y[j] * g[j] }).sum::<R>();
        for j in 0..d {
            out[j] = match (allowed(j), log) {
                (false, _) => R::ZERO,
                (true, true) => g[j] - y[j].exp() * sum,
                (true, false) => y[j] * (g[j] - sum),
            };
        }
    }
    Ok(())
}

// ---- the fast f32 column --------------------------------------------------------------------------------------------------

/// Values that a task takes.
const TASK: usize = 16_384;

fn forward_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: SoftmaxParams = launch.params()?;
    let (x, y) = (launch.real()?, launch.real_mut()?);
    let (values, arch) = ((TASK / p.width as usize).max(1) * p.width as usize, Arch::new());
    y.par_chunks_mut(values).zip(x.par_chunks(values)).for_each(|(y, x)| {
        arch.dispatch(Rows { d: p.width as usize, log: p.log == 1, x: Some(x), y });
    });
    Ok(())
}

fn masked_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: SoftmaxParams = launch.params()?;
    let (x, mask, y) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let (d, arch) = (p.width as usize, Arch::new());
    let rows = (TASK / d).max(1);
    y.par_chunks_mut(rows * d).enumerate().for_each(|(task, y)| {
        for (i, y) in y.chunks_exact_mut(d).enumerate() {
            let row = task * rows + i;
            for (j, (y, &x)) in y.iter_mut().zip(&x[row * d..]).enumerate() {
                *y = if p.allows(mask, row, j) { x } else { LOG_ZERO as f32 };
            }
        }
        arch.dispatch(Rows { d, log: p.log == 1, x: None, y });
    });
    Ok(())
}

/// Softmax of rows, of x or in place.
struct Rows<'a> {
    d: usize,
    log: bool,
    x: Option<&'a [f32]>,
    y: &'a mut [f32],
}

impl WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if let Some(x) = self.x {
            self.y.copy_from_slice(x);
        }
        let (masked, none) = (simd.splat_f32s(MASKED as f32), LOG_ZERO as f32);
        let zero = simd.splat_f32s(if self.log { none } else { 0.0 });
        for y in self.y.chunks_exact_mut(self.d) {
            let (whole, rest) = S::as_mut_simd_f32s(y);
            let tail = lanes::tail(simd, rest, none);
            let mut most = simd.max_f32s(tail, simd.splat_f32s(none));
            for &x in whole.iter() {
                most = simd.max_f32s(x, most);
            }
            let most = simd.splat_f32s(simd.reduce_max_f32s(most));
            let mut sum = simd.splat_f32s(0.0);
            for x in whole.iter_mut() {
                let e = lanes::exp(simd, simd.sub_f32s(*x, most));
                let e = simd.select_f32s(simd.less_than_or_equal_f32s(*x, masked), simd.splat_f32s(0.0), e);
                sum = simd.add_f32s(sum, e);
                if !self.log {
                    *x = e;
                }
            }
            let e = lanes::exp(simd, simd.sub_f32s(tail, most));
            let e = simd.select_f32s(simd.less_than_or_equal_f32s(tail, masked), simd.splat_f32s(0.0), e);
            let total = simd.reduce_sum_f32s(simd.add_f32s(sum, e));
            if self.log {
                // Two subtractions: the maximum may be large, the logarithm small.
                let ln = simd.splat_f32s(total.ln());
                for x in whole.iter_mut() {
                    let log = simd.sub_f32s(simd.sub_f32s(*x, most), ln);
                    *x = simd.select_f32s(simd.less_than_or_equal_f32s(*x, masked), zero, log);
                }
                let log = simd.sub_f32s(simd.sub_f32s(tail, most), ln);
                simd.partial_store_f32s(rest, simd.select_f32s(simd.less_than_or_equal_f32s(tail, masked), zero, log));
            } else {
                let inverse = simd.splat_f32s(if total == 0.0 { 0.0 } else { 1.0 / total });
                for x in whole.iter_mut() {
                    *x = simd.mul_f32s(*x, inverse);
                }
                simd.partial_store_f32s(rest, simd.mul_f32s(e, inverse));
            }
        }
    }
}

fn backward_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: SoftmaxParams = launch.params()?;
    let (y, grad_y, grad_x) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let (values, arch) = ((TASK / p.width as usize).max(1) * p.width as usize, Arch::new());
    grad_x.par_chunks_mut(values).zip(y.par_chunks(values)).zip(grad_y.par_chunks(values)).for_each(|((grad_x, y), grad_y)| {
        arch.dispatch(Backward { d: p.width as usize, log: p.log == 1, y, grad_y, grad_x });
    });
    Ok(())
}

struct Backward<'a> {
    d: usize,
    log: bool,
    y: &'a [f32],
    grad_y: &'a [f32],
    grad_x: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (zero, masked) = (simd.splat_f32s(0.0), simd.splat_f32s(MASKED as f32));
        for ((y, g), out) in self.y.chunks_exact(self.d).zip(self.grad_y.chunks_exact(self.d)).zip(self.grad_x.chunks_exact_mut(self.d)) {
            let ((ys, y_rest), (gs, g_rest), (outs, out_rest)) = (S::as_simd_f32s(y), S::as_simd_f32s(g), S::as_mut_simd_f32s(out));
            let (y_tail, g_tail) = (simd.partial_load_f32s(y_rest), simd.partial_load_f32s(g_rest));
            let mut sum = zero;
            if self.log {
                for (&y, &g) in ys.iter().zip(gs) {
                    sum = simd.add_f32s(sum, simd.select_f32s(simd.less_than_or_equal_f32s(y, masked), zero, g));
                }
                sum = simd.add_f32s(sum, simd.select_f32s(simd.less_than_or_equal_f32s(y_tail, masked), zero, g_tail));
                let total = simd.splat_f32s(simd.reduce_sum_f32s(sum));
                for ((&y, &g), out) in ys.iter().zip(gs).zip(outs) {
                    let d = simd.sub_f32s(g, simd.mul_f32s(lanes::exp(simd, y), total));
                    *out = simd.select_f32s(simd.less_than_or_equal_f32s(y, masked), zero, d);
                }
                let d = simd.sub_f32s(g_tail, simd.mul_f32s(lanes::exp(simd, y_tail), total));
                simd.partial_store_f32s(out_rest, simd.select_f32s(simd.less_than_or_equal_f32s(y_tail, masked), zero, d));
            } else {
                for (&y, &g) in ys.iter().zip(gs) {
                    sum = simd.mul_add_f32s(y, g, sum);
                }
                let total = simd.splat_f32s(simd.reduce_sum_f32s(simd.mul_add_f32s(y_tail, g_tail, sum)));
                for ((&y, &g), out) in ys.iter().zip(gs).zip(outs) {
                    *out = simd.mul_f32s(y, simd.sub_f32s(g, total));
                }
                simd.partial_store_f32s(out_rest, simd.mul_f32s(y_tail, simd.sub_f32s(g_tail, total)));
            }
        }
    }
}

// ---- the op -------------------------------------------------------------------------------------------------------------

/// What restricts a softmax.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftmaxMask {
    /// Nothing.
    None,
    /// A u32 length per row: d < length is allowed.
    Lengths,
    /// A u32 word per value: not 0 is allowed.
    Words,
}

/// Sizes and options of a softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Softmax {
    /// Rows N.
    pub rows: u64,
    /// Values D of a row.
    pub width: u64,
    /// Whether the logarithm is wanted.
    pub log: bool,
    /// What restricts it.
    pub mask: SoftmaxMask,
}

const OP: &str = "softmax";

impl Softmax {
    /// # Errors
    /// `Parameter` for a width of zero and sizes beyond 32 bits.
    pub fn check(&self) -> Result<()> {
        for (name, size, least) in [("width", self.width, 1), ("rows", self.rows, 0)] {
            if size < least || size > u64::from(u32::MAX) / 4 {
                let help = format!("must be between {least} and 1,073,741,823");
                return Err(Error::Parameter { op: OP, name: name.into(), value: size.to_string(), help });
            }
        }
        Ok(())
    }

    /// Reals that forward keeps for backward besides y: none.
    pub fn saved(&self) -> u64 {
        0
    }

    /// Reals of scratch that forward needs: none.
    pub fn scratch(&self) -> u64 {
        0
    }

    /// Reals of scratch that backward needs: none.
    pub fn scratch_backward(&self, _: &Device) -> u64 {
        0
    }

    fn params(&self, run: &Range<u64>) -> SoftmaxParams {
        SoftmaxParams {
            rows: (run.end - run.start) as u32,
            width: self.width as u32,
            log: u32::from(self.log),
            words: u32::from(self.mask == SoftmaxMask::Words),
        }
    }

    /// Runs of rows that one launch can take.
    fn runs(&self, device: &Device) -> Result<Vec<Range<u64>>> {
        let lanes = if self.width <= NARROW { FEW_LANES } else { LANES };
        device.check_rounds(OP, 3 * self.width.div_ceil(lanes) + 32, "rounds")?;
        device.plan(OP, self.rows, self.width, 1, 12 * self.width)
    }
}

fn expect(op: &Softmax, arg: &str, view: &View) -> Result<()> {
    if view.len() == op.rows * op.width {
        return Ok(());
    }
    let expected = format!("[{},{}]", op.rows, op.width);
    Err(Error::Shape { op: OP, arg: arg.into(), expected, got: format!("{} values", view.len()) })
}

/// Records y [N,D] of x [N,D]; `mask` is there exactly where [`Softmax::mask`] says so. No rows record nothing.
/// # Errors
/// `Parameter`, `Shape`, `TooLarge`.
pub fn softmax(pass: &mut Pass, op: &Softmax, x: &View, mask: Option<&View>, y: &View) -> Result<()> {
    op.check()?;
    expect(op, "x", x)?;
    expect(op, "y", y)?;
    let each = match op.mask {
        SoftmaxMask::None => 0,
        SoftmaxMask::Lengths => 1,
        SoftmaxMask::Words => op.width,
    };
    let given = mask.map_or(0, View::len);
    if given != op.rows * each || mask.is_some() != (each > 0) || mask.is_some_and(|mask| mask.elem() != Elem::U32) {
        let expected = format!("{} words for {:?}", op.rows * each, op.mask);
        return Err(Error::Shape { op: OP, arg: "mask".into(), expected, got: format!("{mask:?}") });
    }
    if op.rows == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    for run in op.runs(&device)? {
        let input = pass.input(x, run.start * op.width..run.end * op.width)?;
        let out = pass.output(y, run.start * op.width..run.end * op.width)?;
        match mask {
            Some(mask) => {
                let mask = pass.input(mask, run.start * each..run.end * each)?;
                let kernel = if op.width <= NARROW { &SOFTMAX_MASKED_SMALL } else { &SOFTMAX_MASKED };
                pass.launch(kernel, &op.params(&run), &[input, mask, out.view.clone()])?;
            }
            None => {
                let kernel = if op.width <= NARROW { &SOFTMAX_FORWARD_SMALL } else { &SOFTMAX_FORWARD };
                pass.launch(kernel, &op.params(&run), &[input, out.view.clone()])?;
            }
        }
        pass.finish(out)?;
    }
    Ok(())
}

/// Records grad_x [N,D] from forward's y and grad_y; the mask is in y.
/// # Errors
/// `Parameter`, `Shape`, `TooLarge`.
pub fn softmax_backward(pass: &mut Pass, op: &Softmax, y: &View, grad_y: &View, grad_x: &View) -> Result<()> {
    op.check()?;
    for (arg, view) in [("y", y), ("grad_y", grad_y), ("grad_x", grad_x)] {
        expect(op, arg, view)?;
    }
    if op.rows == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    let kernel = if op.width <= NARROW { &SOFTMAX_BACKWARD_SMALL } else { &SOFTMAX_BACKWARD };
    for run in op.runs(&device)? {
        let range = run.start * op.width..run.end * op.width;
        let (y, grad_y) = (pass.input(y, range.clone())?, pass.input(grad_y, range.clone())?);
        let out = pass.output(grad_x, range)?;
        pass.launch(kernel, &op.params(&run), &[y, grad_y, out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(())
}

/// Conformance binding. The last dimension is softmaxed; `mask` has a word per value, `lengths` one per row.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let shape = case.shape("x")?;
    let width = shape.last().copied().unwrap_or(1) as u64;
    let rows = shape.iter().rev().skip(1).product::<usize>() as u64;
    let upload = |name: &str| -> Result<View> { Ok(View::from(&device.upload(name, case.f32(name)?)?)) };
    let words = |name: &str| -> Result<View> { Ok(View::from(&device.upload_u32(name, case.u32(name)?)?)) };
    let (kind, mask) = match (case.has("mask"), case.has("lengths")) {
        (true, _) => (SoftmaxMask::Words, Some(words("mask")?)),
        (_, true) => (SoftmaxMask::Lengths, Some(words("lengths")?)),
        _ => (SoftmaxMask::None, None),
    };
    let op = Softmax { rows, width, log: case.truth("log")?, mask: kind };
    let (x, y, grad_x) = (upload("x")?, View::from(&device.zeros("y", rows * width)?), View::from(&device.zeros("grad_x", rows * width)?));
    let mut pass = device.pass(OP);
    softmax(&mut pass, &op, &x, mask.as_ref(), &y)?;
    let mut reads = vec![("y", pass.read(&y)?)];
    if case.has("grad_y") {
        softmax_backward(&mut pass, &op, &y, &upload("grad_y")?, &grad_x)?;
        reads.push(("grad_x", pass.read(&grad_x)?));
    }
    let mut results = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        results.reals(name, done.f64(read)?);
    }
    Ok(results)
}
