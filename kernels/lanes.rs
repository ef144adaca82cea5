//! Elementary functions and row operations over the lanes of a vector, for the fast f32 columns.
//!
//! Numerics: exp within 1 ulp or so; sigmoid, tanh and Φ within a few. A NaN stays one. The forms are those of common.wgsl.
//! No closures around vector instructions: a closure is a function without the caller's target features.

use pulp::Simd;
use std::cell::RefCell;

/// Reals that a thread keeps from one call to the next. Fresh pages cost more than the work on them.
const KEPT: usize = 1 << 21;
/// Widest vector in reals: rows of memory start at multiples of it.
pub(crate) const WIDEST: usize = 16;

thread_local! {
    static MEMORY: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Memory of the calling thread, aligned to a vector; its content is whatever was left there. It goes back when dropped.
pub(crate) struct Memory {
    reals: Vec<f32>,
    len: usize,
}

/// Takes the calling thread's memory, or new memory where it is taken already.
pub(crate) fn take_memory(len: usize) -> Memory {
    let mut reals = MEMORY.with_borrow_mut(std::mem::take);
    if reals.len() < len + WIDEST {
        reals.resize(len + WIDEST, 0.0);
    }
    Memory { reals, len }
}

impl Memory {
    /// The values.
    pub(crate) fn reals(&mut self) -> &mut [f32] {
        let skip = self.reals.as_ptr().align_offset(4 * WIDEST).min(WIDEST);
        &mut self.reals[skip..skip + self.len]
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.reals.len() <= KEPT {
            MEMORY.with_borrow_mut(|kept| std::mem::swap(kept, &mut self.reals));
        }
    }
}

/// e^x: x = n·ln 2 + r, 2^n·(1 + r + r²·p(r)); 0 below −87, its value at 88 above.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const P: [f32; 7] = [0.001_381_46, 0.008_368_717, 0.041_668_39, 0.166_665_22, 0.499_999_94, 1.0, 1.0];
    // Adding and taking away 1.5·2^23 rounds to a whole number, which lies in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let bounded = simd.min_f32s(simd.splat_f32s(88.0), x);
    let shifted = simd.mul_add_f32s(bounded, simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(ROUND));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
    let r = simd.mul_add_f32s(n, simd.splat_f32s(-0.693_359_4), bounded);
    let r = simd.mul_add_f32s(n, simd.splat_f32s(2.121_944_4e-4), r);
    let mut p = simd.splat_f32s(P[0]);
    for c in &P[1..] {
        p = simd.mul_add_f32s(p, r, simd.splat_f32s(*c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let y = simd.transmute_f32s_u32s(simd.add_u32s(power, simd.transmute_u32s_f32s(p)));
    simd.select_f32s(simd.less_than_f32s(x, simd.splat_f32s(-87.0)), simd.splat_f32s(0.0), y)
}

/// 1 / (1 + e^−x).
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(one, simd.add_f32s(one, exp(simd, simd.neg_f32s(x))))
}

/// tanh; by its series where 1 − e^−2x would cancel.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const SERIES: [f32; 5] = [0.021_869_488, -0.053_968_254, 0.133_333_34, -0.333_333_34, 1.0];
    let (one, zero) = (simd.splat_f32s(1.0), simd.splat_f32s(0.0));
    let q = simd.mul_f32s(x, x);
    let t = exp(simd, simd.mul_f32s(simd.abs_f32s(x), simd.splat_f32s(-2.0)));
    let large = simd.div_f32s(simd.sub_f32s(one, t), simd.add_f32s(one, t));
    let large = simd.select_f32s(simd.less_than_f32s(x, zero), simd.neg_f32s(large), large);
    let mut p = simd.splat_f32s(-0.008_863_235);
    for c in &SERIES {
        p = simd.mul_add_f32s(p, q, simd.splat_f32s(*c));
    }
    simd.select_f32s(simd.less_than_f32s(q, simd.splat_f32s(0.09)), simd.mul_f32s(x, p), large)
}

/// Φ(x) and e^(−x²/2), which need the same exponential; the tail is ½·e^(−x²/2)·erfcx(|x|/√2) with erfcx as in common.wgsl.
#[inline(always)]
pub(crate) fn normal_cdf_and_bell<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    const P: [f32; 8] = [0.285_187_5, -0.488_470_17, 0.279_522_66, -0.027_629_96, 0.203_112_48, 0.242_996_02, 0.282_390_15, 0.282_085_57];
    let (one, y) = (simd.splat_f32s(1.0), simd.abs_f32s(x));
    let bell = exp(simd, simd.mul_f32s(simd.mul_f32s(y, y), simd.splat_f32s(-0.5)));
    let u = simd.div_f32s(one, simd.mul_add_f32s(y, simd.splat_f32s(0.5 * std::f32::consts::FRAC_1_SQRT_2), one));
    let mut p = simd.splat_f32s(-0.059_194_33);
    for c in &P {
        p = simd.mul_add_f32s(p, u, simd.splat_f32s(*c));
    }
    let tail = simd.mul_f32s(simd.mul_f32s(bell, simd.splat_f32s(0.5)), simd.mul_f32s(u, p));
    (simd.select_f32s(simd.less_than_f32s(simd.splat_f32s(0.0), x), simd.sub_f32s(one, tail), tail), bell)
}

/// The values of `rest`, fewer than the lanes, with `fill` behind them.
#[inline(always)]
pub(crate) fn tail<S: Simd>(simd: S, rest: &[f32], fill: f32) -> S::f32s {
    let mut x = [simd.splat_f32s(fill)];
    if rest.is_empty() {
        return x[0];
    }
    let lanes: &mut [f32] = bytemuck::cast_slice_mut(&mut x);
    lanes[..rest.len()].copy_from_slice(rest);
    x[0]
}

/// x in the first `count` lanes, zero in the others.
#[inline(always)]
pub(crate) fn only<S: Simd>(simd: S, x: S::f32s, count: usize) -> S::f32s {
    if count == 0 {
        return simd.splat_f32s(0.0);
    }
    let mut x = [x];
    let lanes: &mut [f32] = bytemuck::cast_slice_mut(&mut x);
    lanes[count..].fill(0.0);
    x[0]
}
