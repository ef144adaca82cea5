//! Rows of unit length: y[r,:] = x[r,:]/max(‖x[r,:]‖₂, ε).
//!
//! Shapes   x, y [R,W].
//! Backward with n = ‖x‖, u = x/n:  grad_x = (grad_y − u·(u·grad_y))/n where n > ε, else grad_y/ε. Needs x alone.
//! Launch   `lanes` threads per row, a power of two by W alone; WG/lanes rows per group. Rows are read three times, from cache.
//! Scratch  none.     Floor 8 bytes per element forward, 12 backward.
//! Numerics the norm is m·√Σ(x/m)², m the largest |x|: no square overflows or vanishes. Sums as in kernels/reduce.rs.
//! Source   the definition; Higham 2002, "Accuracy and Stability of Numerical Algorithms", 27.8 for the scaled norm.
//! Files    shaders/normalise.wgsl · cuda/normalise.cu · reference: the `_cpu` functions

use crate::device::{Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, writes};
use crate::map::{bind, check_len};
use crate::real::Real;
use crate::{Error, Result};
use pulp::Arch;
use rayon::prelude::*;

params! {
    /// Params of the two kernels.
    pub struct NormaliseParams {
        /// Rows.
        rows: u32,
        /// Elements of a row.
        width: u32,
        /// Threads per row.
        lanes: u32,
        /// Least norm.
        eps: f32,
        /// First element of x …
        x_at: u32,
        /// … of grad_y …
        g_at: u32,
        /// … and of the output.
        y_at: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 256;

fn params(words: &[u32]) -> NormaliseParams {
    params_of(words).unwrap_or_else(bytemuck::Zeroable::zeroed)
}

fn groups(words: &[u32]) -> u64 {
    u64::from(params(words).rows).div_ceil(u64::from(WG / params(words).lanes.max(1)))
}

fn elements(words: &[u32]) -> u64 {
    u64::from(params(words).rows) * u64::from(params(words).width)
}

/// Rows over their norms.
pub static NORMALISE: Kernel = Kernel {
    name: "normalise",
    about: "rows of unit Euclidean length",
    args: &[reads("x"), writes("y")],
    params: layout::<NormaliseParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("normalise"),
    cuda: cuda!("normalise"),
    cpu: Some(Cpu { f32: normalise_cpu::<f32>, f64: normalise_cpu::<f64> }),
    cost: Cost { unit: "element", units: elements, bytes: 8.0, flops: 4.0 },
};

/// Their gradient.
pub static NORMALISE_BACKWARD: Kernel = Kernel {
    name: "normalise_backward",
    about: "gradient of rows of unit length",
    args: &[reads("x"), reads("grad_y"), writes("grad_x")],
    params: layout::<NormaliseParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("normalise"),
    cuda: cuda!("normalise"),
    cpu: Some(Cpu { f32: normalise_backward_cpu::<f32>, f64: normalise_backward_cpu::<f64> }),
    cost: Cost { unit: "element", units: elements, bytes: 12.0, flops: 8.0 },
};

/// Sizes of a normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalise {
    /// Rows R.
    pub rows: u64,
    /// Elements of a row W.
    pub width: u64,
    /// Least norm, above 0; 1e-12 is usual.
    pub eps: f32,
}

impl Normalise {
    /// # Errors
    /// `Parameter` for an ε that is not a positive number; `TooLarge` for a row that no index holds.
    pub fn check(&self) -> Result<()> {
        if !(self.eps.is_finite() && self.eps > 0.0) {
            let help = "give a small positive number, such as 1e-12".into();
            return Err(Error::Parameter { op: "normalise", name: "eps".into(), value: self.eps.to_string(), help });
        }
        let limit = (1u64 << 31) - 1;
        if self.width > limit {
            let help = "use shorter rows".into();
            return Err(Error::TooLarge { what: "normalise: a row".into(), needed: self.width, limit, unit: "elements", help });
        }
        Ok(())
    }

    /// Rows of each launch.
    fn runs(&self, pass: &Pass, op: &'static str) -> Result<Vec<(u64, NormaliseParams)>> {
        let device = pass.device();
        let lanes = (self.width.div_ceil(4).max(1).next_power_of_two() as u32).min(WG);
        device.check_rounds(op, 3 * self.width.div_ceil(u64::from(lanes)) + 64, "rounds")?;
        let most = ((1 << 31) / self.width.max(1)).max(1);
        let runs = device.plan(op, self.rows, self.width.max(1) + device.limits().align, 1, 8 * self.width)?;
        let pieces = runs.into_iter().flat_map(|run| (run.start..run.end).step_by(most as usize).map(move |start| (start, most.min(run.end - start))));
        let params = |rows: u64| NormaliseParams { rows: rows as u32, width: self.width as u32, lanes, eps: self.eps, x_at: 0, g_at: 0, y_at: 0 };
        Ok(pieces.map(|(start, rows)| (start * self.width, params(rows))).collect())
    }
}

/// Records y [R,W] from x [R,W].
/// # Errors
/// `Shape` for other lengths; `TooLarge` if a row does not fit a launch; see [`Normalise::check`].
pub fn normalise(pass: &mut Pass, op: &Normalise, x: &View, y: &View) -> Result<()> {
    op.check()?;
    for (arg, view) in [("x", x), ("y", y)] {
        check_len("normalise", arg, view, op.rows.saturating_mul(op.width))?;
    }
    let device = pass.device().clone();
    for (start, params) in op.runs(pass, "normalise")? {
        let n = u64::from(params.rows) * op.width;
        let ((x, x_at), (y, y_at)) = (bind(&device, x, start, n), bind(&device, y, start, n));
        pass.launch(&NORMALISE, &NormaliseParams { x_at, y_at, ..params }, &[x, y])?;
    }
    Ok(())
}

/// Records grad_x [R,W] from x and grad_y [R,W].
/// # Errors
/// As [`normalise`].
pub fn normalise_backward(pass: &mut Pass, op: &Normalise, x: &View, grad_y: &View, grad_x: &View) -> Result<()> {
    op.check()?;
    for (arg, view) in [("x", x), ("grad_y", grad_y), ("grad_x", grad_x)] {
        check_len("normalise_backward", arg, view, op.rows.saturating_mul(op.width))?;
    }
    let device = pass.device().clone();
    for (start, params) in op.runs(pass, "normalise_backward")? {
        let n = u64::from(params.rows) * op.width;
        let ((x, x_at), (g, g_at), (y, y_at)) = (bind(&device, x, start, n), bind(&device, grad_y, start, n), bind(&device, grad_x, start, n));
        pass.launch(&NORMALISE_BACKWARD, &NormaliseParams { x_at, g_at, y_at, ..params }, &[x, g, y])?;
    }
    Ok(())
}

// ---- CPU --------------------------------------------------------------------------------------------------------------

/// Sums side by side, so that the compiler can use vectors.
const SUMS: usize = 16;

/// Σ f(i), in blocks.
#[inline(always)]
fn blocked<R: Real>(n: usize, f: impl Fn(usize) -> R) -> R {
    let mut total = R::ZERO;
    for start in (0..n).step_by(32 * SUMS) {
        let end = (start + 32 * SUMS).min(n);
        let mut sums = [R::ZERO; SUMS];
        let whole = start + (end - start) / SUMS * SUMS;
        for first in (start..whole).step_by(SUMS) {
            for i in 0..SUMS {
                sums[i] += f(first + i);
            }
        }
        for i in whole..end {
            sums[i - whole] += f(i);
        }
        total += sums.into_iter().sum::<R>();
    }
    total
}

/// ‖x‖.
#[inline(always)]
fn norm<R: Real>(x: &[R]) -> R {
    let mut tops = [R::ZERO; SUMS];
    for x in x.chunks(SUMS) {
        for (top, &x) in tops.iter_mut().zip(x) {
            let size = x.abs();
            *top = if size > *top { size } else { *top };
        }
    }
    let most = tops.into_iter().fold(R::ZERO, |most, top| if top > most { top } else { most });
    if most == R::ZERO {
        // Zeros, or nothing but NaN.
        return x.iter().copied().sum::<R>() * R::ZERO;
    }
    most * blocked(
        x.len(),
        #[inline(always)]
        |i| (x[i] / most) * (x[i] / most),
    )
    .sqrt()
}

fn normalise_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: NormaliseParams = launch.params()?;
    let (x, y) = (&launch.real()?[p.x_at as usize..], &mut launch.real_mut()?[p.y_at as usize..]);
    let width = (p.width as usize).max(1);
    let (eps, arch, run) = (R::of(f64::from(p.eps)), Arch::new(), (8192 / width).max(1) * width);
    let n = p.rows as usize * p.width as usize;
    y[..n].par_chunks_mut(run).zip(x[..n].par_chunks(run)).for_each(|(y, x)| {
        arch.dispatch(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let n = norm(x);
                    let n = if n < eps { eps } else { n };
                    y.iter_mut().zip(x).for_each(|(y, &x)| *y = x / n);
                }
            },
        );
    });
    Ok(())
}

fn normalise_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: NormaliseParams = launch.params()?;
    let (x, g) = (&launch.real()?[p.x_at as usize..], &launch.real()?[p.g_at as usize..]);
    let y = &mut launch.real_mut()?[p.y_at as usize..];
    let width = (p.width as usize).max(1);
    let (eps, arch, run) = (R::of(f64::from(p.eps)), Arch::new(), (8192 / width).max(1) * width);
    let n = p.rows as usize * p.width as usize;
    y[..n].par_chunks_mut(run).zip(x[..n].par_chunks(run)).zip(g[..n].par_chunks(run)).for_each(|((y, x), g)| {
        arch.dispatch(
            #[inline(always)]
            || {
                for ((y, x), g) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(g.chunks_exact(width)) {
                    let n = norm(x);
                    let small = n <= eps;
                    let (dot, n) = if small {
                        (R::ZERO, eps)
                    } else {
                        (
                            blocked(
                                width,
                                #[inline(always)]
                                |i| (x[i] / n) * g[i],
                            ),
                            n,
                        )
                    };
                    y.iter_mut().zip(x).zip(g).for_each(|((y, &x), &g)| *y = (g - x / n * dot) / n);
                }
            },
        );
    });
    Ok(())
}
