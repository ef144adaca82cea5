//! The path generator over the lanes of a vector, in f32: a path per lane.
//!
//! Philox   a word of a lane sits in the lower half of 64 bits, even and odd lanes apart, so that a product is one widening multiplication
//!          and its halves need no shuffle: 8 multiplications, shifts and three-way xors per round and vector. Rounds 1 and 2 hold
//!          little that changes from four steps to the next; what does not is kept ([`Counter`]).
//! Normals  both of a pair from one polynomial pair in half turns: the angle comes from the word's bits, exact; the sign goes to the radius.
//!          ln u is exact next to 1 as well, from 1 − u.
//! Speed    in kernels/paths.rs. A kernel that steps two vectors of paths in turn hides more latency.
//! No closures around vector instructions, as in kernels/lanes.rs.

use crate::kernel::CpuLaunch;
use crate::lanes::only;
use crate::paths::{BLOCK, FUTURES, Kind, PathMarket, PathsParams, Rows, STREAM, factor, field, runs, word};
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

// ---- words ------------------------------------------------------------------------------------------------------------------

/// The upper halves, shifted down.
#[inline(always)]
fn upper<S: Simd>(_: S, x: S::u64s) -> S::u64s {
    let mut x = [x];
    for lane in bytemuck::cast_slice_mut::<S::u64s, u64>(&mut x) {
        *lane >>= 32;
    }
    x[0]
}

/// Lower halves times a constant, 64 bits wide.
#[inline(always)]
fn product<S: Simd>(simd: S, x: S::u64s, by: u32) -> S::u64s {
    simd.mul_u64s(simd.and_u64s(x, simd.splat_u64s(0xffff_ffff)), simd.splat_u64s(u64::from(by)))
}

/// The lower halves of even and odd lanes, in their places.
#[inline(always)]
fn join<S: Simd>(_: S, even: S::u64s, odd: S::u64s) -> S::u32s {
    let (mut even, odd) = ([even], [odd]);
    for (e, o) in bytemuck::cast_slice_mut::<S::u64s, u64>(&mut even).iter_mut().zip(bytemuck::cast_slice::<S::u64s, u64>(&odd)) {
        *e = (*e & 0xffff_ffff) | (*o << 32);
    }
    bytemuck::cast(even[0])
}

#[inline(always)]
pub(crate) fn shift_right<S: Simd>(simd: S, x: S::u32s, by: u32) -> S::u32s {
    simd.wrapping_dyn_shr_u32s(x, simd.splat_u32s(by))
}

/// Whole numbers, as signed ones, as reals.
#[inline(always)]
pub(crate) fn reals_of<S: Simd>(_: S, x: S::u32s) -> S::f32s {
    let mut x = [x];
    for lane in bytemuck::cast_slice_mut::<S::u32s, u32>(&mut x) {
        *lane = (*lane as i32 as f32).to_bits();
    }
    bytemuck::cast(x[0])
}

/// Signed shift by 23.
#[inline(always)]
fn exponent<S: Simd>(_: S, x: S::u32s) -> S::u32s {
    let mut x = [x];
    for lane in bytemuck::cast_slice_mut::<S::u32s, u32>(&mut x) {
        *lane = (*lane as i32 >> 23) as u32;
    }
    x[0]
}

/// Whether any lane is set.
#[inline(always)]
fn any<S: Simd>(simd: S, mask: S::m32s) -> bool {
    simd.first_true_m32s(mask) < S::F32_LANES
}

/// What the first two rounds of Philox have that steps do not change, for one factor of a path per lane; for even and odd lanes.
#[derive(Clone, Copy)]
pub(crate) struct Counter<S: Simd> {
    halves: [[S::u64s; 4]; 2],
}

impl<S: Simd> Counter<S> {
    #[inline(always)]
    pub(crate) fn none(simd: S) -> Counter<S> {
        Counter { halves: [[simd.splat_u64s(0); 4]; 2] }
    }

    #[inline(always)]
    pub(crate) fn of(simd: S, [low, high]: [S::u32s; 2], factor: u32, key: [u32; 2]) -> Counter<S> {
        let (low, high): (S::u64s, S::u64s) = (bytemuck::cast(low), bytemuck::cast(high));
        let c3 = factor | STREAM << 16;
        Counter { halves: [Self::half(simd, low, high, c3, key), Self::half(simd, upper(simd, low), upper(simd, high), c3, key)] }
    }

    #[inline(always)]
    fn half(simd: S, low: S::u64s, high: S::u64s, c3: u32, key: [u32; 2]) -> [S::u64s; 4] {
        let a = product(simd, low, MULTIPLIER[0]);
        let c2 = simd.xor_u64s(upper(simd, a), simd.splat_u64s(u64::from(c3 ^ key[1])));
        let b = product(simd, c2, MULTIPLIER[1]);
        [simd.xor_u64s(high, simd.splat_u64s(u64::from(key[0]))), a, upper(simd, b), b]
    }

    /// The four words of steps 4·quad ….
    #[inline(always)]
    pub(crate) fn words(&self, simd: S, quad: u32, key: [u32; 2]) -> [S::u32s; 4] {
        let even = Self::rounds(simd, &self.halves[0], quad, key);
        let odd = Self::rounds(simd, &self.halves[1], quad, key);
        [join(simd, even[0], odd[0]), join(simd, even[1], odd[1]), join(simd, even[2], odd[2]), join(simd, even[3], odd[3])]
    }

    #[inline(always)]
    fn rounds(simd: S, half: &[S::u64s; 4], quad: u32, key: [u32; 2]) -> [S::u64s; 4] {
        let [high, a, b_high, b] = *half;
        let first = u64::from(quad) * u64::from(MULTIPLIER[1]);
        let (first_high, first_low) = ((first >> 32) as u32, first as u32);
        let (mut k0, mut k1) = (key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1]));
        let second = product(simd, simd.xor_u64s(high, simd.splat_u64s(u64::from(first_high))), MULTIPLIER[0]);
        let mut c0 = simd.xor_u64s(b_high, simd.splat_u64s(u64::from(first_low ^ k0)));
        let mut c1 = b;
        let mut c2 = simd.xor_u64s(simd.xor_u64s(upper(simd, second), a), simd.splat_u64s(u64::from(k1)));
        let mut c3 = second;
        for _ in 2..10 {
            (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
            let (a, b) = (product(simd, c0, MULTIPLIER[0]), product(simd, c2, MULTIPLIER[1]));
            c0 = simd.xor_u64s(simd.xor_u64s(upper(simd, b), c1), simd.splat_u64s(u64::from(k0)));
            c1 = b;
            c2 = simd.xor_u64s(simd.xor_u64s(upper(simd, a), c3), simd.splat_u64s(u64::from(k1)));
            c3 = a;
        }
        [c0, c1, c2, c3]
    }
}

// ---- functions --------------------------------------------------------------------------------------------------------------

#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, x: S::f32s, c: [f32; N]) -> S::f32s {
    let mut p = simd.splat_f32s(c[0]);
    for c in &c[1..] {
        p = simd.mul_add_f32s(p, x, simd.splat_f32s(*c));
    }
    p
}

/// e^x for −87 ≤ x ≤ 88, else its value there: as `lanes::exp`, with one multiple of ln 2 (exact enough for |x| < 20).
#[inline(always)]
pub(crate) fn exp_fast<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const P: [f32; 7] = [0.001_383_683_4, 0.008_374_822, 0.041_668_225, 0.166_664_2, 0.499_999_9, 1.0, 1.0];
    const ROUND: f32 = 12_582_912.0;
    let x = simd.max_f32s(simd.min_f32s(x, simd.splat_f32s(88.0)), simd.splat_f32s(-87.0));
    let shifted = simd.mul_add_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(ROUND));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
    let r = simd.mul_add_f32s(n, simd.splat_f32s(-std::f32::consts::LN_2), x);
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(power, simd.transmute_u32s_f32s(polynomial(simd, r, P))))
}

/// −2·ln(1 + f) for √½ ≤ 1 + f ≤ √2.
#[inline(always)]
fn minus_two_ln_1p<S: Simd>(simd: S, f: S::f32s) -> S::f32s {
    const P: [f32; 8] = [-0.179_588_69, 0.288_536_85, -0.297_674, 0.331_035_88, -0.399_269_52, 0.500_051_7, -0.666_678_67, 0.999_999_64];
    simd.mul_add_f32s(simd.mul_f32s(f, f), polynomial(simd, f, P), simd.mul_f32s(f, simd.splat_f32s(-2.0)))
}

/// ln x for normal x > 0.
#[inline(always)]
pub(crate) fn ln<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let raw = simd.sub_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(0x3f35_04f3));
    let e = reals_of(simd, exponent(simd, raw));
    let m = simd.transmute_f32s_u32s(simd.add_u32s(simd.and_u32s(raw, simd.splat_u32s(0x7f_ffff)), simd.splat_u32s(0x3f35_04f3)));
    let part = minus_two_ln_1p(simd, simd.sub_f32s(m, simd.splat_f32s(1.0)));
    simd.mul_add_f32s(part, simd.splat_f32s(-0.5), simd.mul_f32s(e, simd.splat_f32s(std::f32::consts::LN_2)))
}

/// ln(1 + y), to an ulp or so of itself also for small y; y > −1.
#[inline(always)]
fn ln_1p<S: Simd>(simd: S, y: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let x = simd.max_f32s(simd.add_f32s(one, y), simd.splat_f32s(f32::MIN_POSITIVE));
    let raw = simd.sub_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(0x3f35_04f3));
    let whole = exponent(simd, raw);
    let m = simd.transmute_f32s_u32s(simd.add_u32s(simd.and_u32s(raw, simd.splat_u32s(0x7f_ffff)), simd.splat_u32s(0x3f35_04f3)));
    let f = simd.select_f32s(simd.equal_u32s(whole, simd.splat_u32s(0)), y, simd.sub_f32s(m, one));
    let part = minus_two_ln_1p(simd, f);
    simd.mul_add_f32s(part, simd.splat_f32s(-0.5), simd.mul_f32s(reals_of(simd, whole), simd.splat_f32s(std::f32::consts::LN_2)))
}

/// −2·ln of the uniform (k + ½)·2⁻²⁴ of k, a whole number below 2²⁴.
#[inline(always)]
fn minus_two_ln_uniform<S: Simd>(simd: S, k: S::f32s) -> S::f32s {
    // 2²⁴·√½
    const NEAR: f32 = 11_863_283.0;
    let raw = simd.sub_u32s(simd.transmute_u32s_f32s(simd.add_f32s(k, simd.splat_f32s(0.5))), simd.splat_u32s(0x4b35_04f3));
    let e = reals_of(simd, exponent(simd, raw));
    let m = simd.transmute_f32s_u32s(simd.add_u32s(simd.and_u32s(raw, simd.splat_u32s(0x7f_ffff)), simd.splat_u32s(0x3f35_04f3)));
    let far = simd.sub_f32s(m, simd.splat_f32s(1.0));
    let near = simd.mul_add_f32s(simd.sub_f32s(k, simd.splat_f32s(16_777_216.0)), simd.splat_f32s(5.960_464_5e-8), simd.splat_f32s(2.980_232_2e-8));
    let f = simd.select_f32s(simd.greater_than_f32s(k, simd.splat_f32s(NEAR)), near, far);
    simd.mul_add_f32s(e, simd.splat_f32s(-2.0 * std::f32::consts::LN_2), minus_two_ln_1p(simd, f))
}

/// The two normals of a pair of words.
#[inline(always)]
fn normal_pair<S: Simd>(simd: S, a: S::u32s, b: S::u32s) -> [S::f32s; 2] {
    const SIN: [f32; 5] = [0.077_222_27, -0.598_046_5, 2.550_031_7, -5.167_707, 3.141_592_5];
    const COS: [f32; 5] = [0.219_698_19, -1.331_880_9, 4.058_412, -4.934_793, 0.999_999_94];
    let radius = simd.sqrt_f32s(minus_two_ln_uniform(simd, reals_of(simd, shift_right(simd, a, 8))));
    // b + 2³⁰: its top bit says whether the angle lies in the left half-plane, the rest is the offset from the middle of its half
    let turned = simd.add_u32s(b, simd.splat_u32s(1 << 30));
    let radius = simd.xor_f32s(radius, simd.transmute_f32s_u32s(simd.and_u32s(turned, simd.splat_u32s(1 << 31))));
    let whole = simd.or_u32s(simd.and_u32s(shift_right(simd, turned, 8), simd.splat_u32s(0x7f_ffff)), simd.splat_u32s(0x4b00_0000));
    let y = simd.sub_f32s(simd.transmute_f32s_u32s(whole), simd.splat_f32s(12_582_912.0));
    let y = simd.mul_add_f32s(y, simd.splat_f32s(1.192_092_9e-7), simd.splat_f32s(5.960_464_5e-8));
    let q = simd.mul_f32s(y, y);
    let sin = simd.mul_f32s(y, polynomial(simd, q, SIN));
    [simd.mul_f32s(radius, polynomial(simd, q, COS)), simd.mul_f32s(radius, sin)]
}

/// The four normals of four words.
#[inline(always)]
pub(crate) fn normals<S: Simd>(simd: S, w: [S::u32s; 4]) -> [S::f32s; 4] {
    let [n0, n1] = normal_pair(simd, w[0], w[1]);
    let [n2, n3] = normal_pair(simd, w[2], w[3]);
    [n0, n1, n2, n3]
}

/// Φ⁻¹ of a word's uniform, within 5e-7 relative: x·P(−ln 4p(1 − p)), x = 1 − 2p, p the smaller tail.
#[inline(always)]
fn normal_quantile<S: Simd>(simd: S, w: S::u32s) -> S::f32s {
    const MID: [f32; 9] = [4.035_428_7e-8, 4.861_035e-7, -4.990_561e-6, -6.217_988e-6, 3.091_502e-4, -1.773_010_1e-3, -5.908_171e-3, 0.348_802_66, 2.123_313_7];
    const TAIL: [f32; 9] =
        [-2.729_841_2e-4, 1.414_796_1e-4, 1.893_901_5e-3, -5.194_886e-3, 8.123_112e-3, -1.077_934e-2, 1.334_777_2e-2, 1.416_581, 4.006_434_4];
    let k = reals_of(simd, shift_right(simd, w, 8));
    let above = simd.greater_than_or_equal_f32s(k, simd.splat_f32s(8_388_608.0));
    let least = simd.select_f32s(above, simd.sub_f32s(simd.splat_f32s(16_777_215.0), k), k);
    let p = simd.mul_f32s(simd.add_f32s(least, simd.splat_f32s(0.5)), simd.splat_f32s(5.960_464_5e-8));
    let one = simd.splat_f32s(1.0);
    let x = simd.mul_add_f32s(p, simd.splat_f32s(-2.0), one);
    let y = ln(simd, simd.mul_f32s(simd.mul_f32s(p, simd.splat_f32s(4.0)), simd.sub_f32s(one, p)));
    let y = simd.max_f32s(simd.neg_f32s(y), simd.splat_f32s(0.0));
    let mut ratio = polynomial(simd, simd.sub_f32s(y, simd.splat_f32s(2.5)), MID);
    let far = simd.greater_than_or_equal_f32s(y, simd.splat_f32s(5.0));
    if any(simd, far) {
        let tail = polynomial(simd, simd.sub_f32s(simd.sqrt_f32s(y), simd.splat_f32s(3.0)), TAIL);
        ratio = simd.select_f32s(far, tail, ratio);
    }
    let z = simd.mul_f32s(x, ratio);
    simd.select_f32s(above, z, simd.neg_f32s(z))
}

// ---- the generator ------------------------------------------------------------------------------------------------------------

/// Indices and counters of a path per lane.
#[derive(Clone, Copy)]
pub(crate) struct LanePaths<S: Simd> {
    spot: Counter<S>,
    basis: Counter<S>,
    first: Counter<S>,
    second: Counter<S>,
    index: [S::u32s; 2],
    path: S::u32s,
    sign: S::u32s,
    flip: S::u32s,
}

/// What is known of the paths at a time; as `PathState`.
#[derive(Clone, Copy)]
pub(crate) struct LaneState<S: Simd> {
    pub(crate) x: S::f32s,
    pub(crate) v: S::f32s,
    pub(crate) basis: S::f32s,
    pub(crate) regime: S::u32s,
    pub(crate) at: S::u32s,
}

/// The draws of four steps.
#[derive(Clone, Copy)]
pub(crate) struct LaneDraws<S: Simd> {
    pub(crate) z: [S::f32s; 4],
    pub(crate) zb: [S::f32s; 4],
    pub(crate) w: [S::u32s; 4],
    pub(crate) w2: [S::u32s; 4],
}

/// A market for lanes. MODEL is its kind, plus FUTURES.
#[derive(Clone, Copy)]
pub(crate) struct LaneMarket<'a, const MODEL: u32> {
    m: PathMarket<'a, f32>,
}

const GBM: u32 = Kind::Gbm as u32;
const MERTON: u32 = Kind::Merton as u32;
const HESTON: u32 = Kind::Heston as u32;
const BATES: u32 = Kind::Bates as u32;
const REGIMES: u32 = Kind::Regimes as u32;
const BOOTSTRAP: u32 = Kind::Bootstrap as u32;
const REPLAY: u32 = Kind::Replay as u32;

impl<'a, const MODEL: u32> LaneMarket<'a, MODEL> {
    const KIND: u32 = MODEL % FUTURES;
    const FUTURE: bool = MODEL >= FUTURES;
    const JUMPS: bool = Self::KIND == MERTON || Self::KIND == BATES;
    const VARIANCE: bool = Self::KIND == HESTON || Self::KIND == BATES;
    const NORMALS: bool = Self::KIND != BOOTSTRAP && Self::KIND != REPLAY;

    #[inline(always)]
    pub(crate) fn of(m: PathMarket<'a, f32>) -> Self {
        LaneMarket { m }
    }

    #[inline(always)]
    fn splat<S: Simd>(&self, simd: S, column: usize) -> S::f32s {
        simd.splat_f32s(self.m.get(column))
    }

    /// Paths first, first + 1, … in the lanes.
    #[inline(always)]
    pub(crate) fn paths<S: Simd>(&self, simd: S, first: u64) -> LanePaths<S> {
        let mut rows = [simd.splat_u32s(0); 5];
        let lanes = S::U32_LANES;
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut rows);
        for i in 0..lanes {
            let path = first + i as u64;
            let index = if self.m.antithetic { path / 2 } else { path };
            let mirrored = self.m.antithetic && path % 2 == 1;
            words[i] = index as u32;
            words[lanes + i] = (index >> 32) as u32;
            words[2 * lanes + i] = if mirrored { 1 << 31 } else { 0 };
            words[3 * lanes + i] = if mirrored { u32::MAX } else { 0 };
            words[4 * lanes + i] = path as u32;
        }
        let index = [rows[0], rows[1]];
        let none = Counter::none(simd);
        let mut paths = LanePaths { spot: none, basis: none, first: none, second: none, index, path: rows[4], sign: rows[2], flip: rows[3] };
        if Self::NORMALS {
            paths.spot = Counter::of(simd, index, factor::SPOT, self.m.seed);
        }
        if Self::FUTURE {
            paths.basis = Counter::of(simd, index, factor::BASIS, self.m.seed);
        }
        if Self::JUMPS {
            paths.first = Counter::of(simd, index, factor::JUMPS, self.m.seed);
        }
        if Self::VARIANCE {
            paths.second = Counter::of(simd, index, factor::VARIANCE, self.m.seed);
        }
        if Self::KIND == REGIMES {
            paths.first = Counter::of(simd, index, factor::REGIME, self.m.seed);
        }
        if Self::KIND == BOOTSTRAP {
            paths.first = Counter::of(simd, index, factor::RESTART, self.m.seed);
            paths.second = Counter::of(simd, index, factor::BLOCK, self.m.seed);
        }
        paths
    }

    #[inline(always)]
    pub(crate) fn start<S: Simd>(&self, simd: S, paths: &LanePaths<S>) -> LaneState<S> {
        let zero = simd.splat_u32s(0);
        let (v, basis) = (self.splat(simd, field::V0), self.splat(simd, field::BASIS));
        let mut s = LaneState { x: simd.splat_f32s(0.0), v, basis, regime: zero, at: zero };
        if Self::KIND == REGIMES {
            let words = Counter::of(simd, paths.index, factor::FIRST_REGIME, self.m.seed).words(simd, 0, self.m.seed);
            s.regime = self.reached(simd, self.m.table, self.m.entries - 1, simd.xor_u32s(words[0], paths.flip));
        }
        if Self::KIND == REPLAY {
            let mut at = [paths.path];
            for at in bytemuck::cast_slice_mut::<S::u32s, u32>(&mut at) {
                *at = at.wrapping_sub(self.m.first).wrapping_mul(self.m.steps + 1).wrapping_add(self.m.tail as u32);
            }
            s.at = at[0];
            s.x = self.given_x(simd, s.at);
        }
        s
    }

    /// Draws of steps 4·quad ….
    #[inline(always)]
    pub(crate) fn draws<S: Simd>(&self, simd: S, paths: &LanePaths<S>, quad: u32) -> LaneDraws<S> {
        let (zero, none) = (simd.splat_f32s(0.0), simd.splat_u32s(0));
        let mut d = LaneDraws { z: [zero; 4], zb: [zero; 4], w: [none; 4], w2: [none; 4] };
        if Self::NORMALS {
            d.z = self.normals(simd, paths, &paths.spot, quad, 0);
        }
        if Self::FUTURE {
            d.zb = self.normals(simd, paths, &paths.basis, quad, 1);
        }
        if Self::JUMPS || Self::KIND == REGIMES || Self::KIND == BOOTSTRAP && self.m.block == 0 {
            d.w = self.words(simd, paths, &paths.first, quad);
        }
        if Self::VARIANCE || Self::KIND == BOOTSTRAP {
            d.w2 = self.words(simd, paths, &paths.second, quad);
        }
        d
    }

    #[inline(always)]
    fn words<S: Simd>(&self, simd: S, paths: &LanePaths<S>, counter: &Counter<S>, quad: u32) -> [S::u32s; 4] {
        let mut w = counter.words(simd, quad, self.m.seed);
        if self.m.antithetic {
            for w in &mut w {
                *w = simd.xor_u32s(*w, paths.flip);
            }
        }
        w
    }

    #[inline(always)]
    fn normals<S: Simd>(&self, simd: S, paths: &LanePaths<S>, counter: &Counter<S>, quad: u32, slot: u32) -> [S::f32s; 4] {
        let mut z = normals(simd, counter.words(simd, quad, self.m.seed));
        if self.m.antithetic {
            for z in &mut z {
                *z = simd.xor_f32s(*z, simd.transmute_f32s_u32s(paths.sign));
            }
        }
        if self.m.matched > 0 {
            for (i, z) in z.iter_mut().enumerate() {
                let t = (4 * quad + i as u32).min(self.m.steps - 1);
                let at = self.m.matched + 2 * (slot * self.m.steps + t) as usize;
                *z = simd.mul_add_f32s(*z, simd.splat_f32s(self.m.reals[at]), simd.splat_f32s(self.m.reals[at + 1]));
            }
        }
        z
    }

    /// How many of `count` thresholds from `at` on each word has reached.
    #[inline(always)]
    fn reached<S: Simd>(&self, simd: S, at: usize, count: usize, word: S::u32s) -> S::u32s {
        let (one, mut sum) = (simd.splat_u32s(1), simd.splat_u32s(0));
        for &threshold in &self.m.words[at..at + count] {
            let reached = simd.greater_than_or_equal_u32s(word, simd.splat_u32s(threshold));
            sum = simd.select_u32s(reached, simd.add_u32s(sum, one), sum);
        }
        sum
    }

    /// Step t: from t to t + 1.
    #[inline(always)]
    pub(crate) fn step<S: Simd>(&self, simd: S, s: &mut LaneState<S>, d: &LaneDraws<S>, t: u32) {
        let i = (t % 4) as usize;
        let z = d.z[i];
        let mut step = self.splat(simd, field::DRIFT);
        let mut jump_variance = simd.splat_f32s(0.0);
        if Self::JUMPS {
            s.regime = self.reached(simd, self.m.table, self.m.entries, d.w[i]);
            let n = reals_of(simd, s.regime);
            step = simd.mul_add_f32s(n, self.splat(simd, field::JUMP_MEAN), step);
            jump_variance = simd.mul_f32s(n, self.splat(simd, field::JUMP_VARIANCE));
        }
        if Self::KIND == GBM {
            step = simd.mul_add_f32s(z, self.splat(simd, field::SD), step);
        }
        if Self::KIND == MERTON {
            let sd = simd.sqrt_f32s(simd.add_f32s(self.splat(simd, field::VARIANCE), jump_variance));
            step = simd.mul_add_f32s(z, sd, step);
        }
        if Self::VARIANCE {
            let (v, rest) = self.variance_step(simd, s.v, d.w2[i]);
            let spread = simd.mul_add_f32s(self.splat(simd, field::K3), simd.add_f32s(s.v, v), jump_variance);
            step = simd.add_f32s(step, simd.mul_add_f32s(self.splat(simd, field::K2), v, rest));
            step = simd.mul_add_f32s(z, simd.sqrt_f32s(spread), step);
            s.v = v;
        }
        if Self::KIND == REGIMES {
            step = self.regime_step(simd, s, z, d.w[i], step);
        }
        if Self::KIND == BOOTSTRAP {
            step = simd.add_f32s(step, self.block_step(simd, s, d.w[i], d.w2[i], t));
        }
        s.x = simd.add_f32s(s.x, step);
        if Self::KIND == REPLAY {
            s.at = simd.add_u32s(s.at, simd.splat_u32s(1));
            s.x = self.given_x(simd, s.at);
        }
        if Self::FUTURE {
            let shock = simd.mul_add_f32s(z, self.splat(simd, field::BASIS_SPOT), self.splat(simd, field::BASIS_MEAN));
            let shock = simd.mul_add_f32s(d.zb[i], self.splat(simd, field::BASIS_OWN), shock);
            s.basis = simd.mul_add_f32s(s.basis, self.splat(simd, field::BASIS_DECAY), shock);
        }
    }

    /// The next variance, and what the log step holds besides K2·v' and the normal.
    #[inline(always)]
    fn variance_step<S: Simd>(&self, simd: S, v: S::f32s, w: S::u32s) -> (S::f32s, S::f32s) {
        let (zero, one, half) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0), simd.splat_f32s(0.5));
        let a = self.splat(simd, field::A);
        let m = simd.mul_add_f32s(self.splat(simd, field::DECAY), v, self.splat(simd, field::MEAN));
        let s2 = simd.mul_add_f32s(self.splat(simd, field::S1), v, self.splat(simd, field::S0));
        let psi = simd.div_f32s(s2, simd.max_f32s(simd.mul_f32s(m, m), simd.splat_f32s(1e-30)));
        let quadratic = simd.less_than_or_equal_f32s(psi, simd.splat_f32s(1.5));

        // quadratic
        let two = simd.max_f32s(simd.sub_f32s(simd.splat_f32s(2.0), psi), zero);
        let q2 = simd.div_f32s(psi, simd.add_f32s(two, simd.sqrt_f32s(simd.add_f32s(two, two))));
        let base = simd.div_f32s(m, simd.add_f32s(one, q2));
        let root = simd.mul_add_f32s(simd.sqrt_f32s(q2), normal_quantile(simd, w), one);
        let next_quadratic = simd.mul_f32s(base, simd.mul_f32s(root, root));
        let a_base = simd.mul_f32s(a, base);
        let less = simd.mul_f32s(simd.mul_f32s(a_base, q2), simd.splat_f32s(-2.0));

        let (mut next, mut room, mut part) = (next_quadratic, simd.add_f32s(one, less), a_base);

        // exponential, where a lane needs it
        if any(simd, simd.greater_than_f32s(psi, simd.splat_f32s(1.5))) {
            let over = simd.add_f32s(psi, one);
            let scale = simd.mul_f32s(simd.mul_f32s(half, m), over);
            let tail = simd.div_f32s(simd.splat_f32s(2.0), over);
            let k = simd.sub_f32s(simd.splat_f32s(16_777_215.0), reals_of(simd, shift_right(simd, w, 8)));
            let minus_ln = simd.mul_f32s(minus_two_ln_uniform(simd, k), half);
            let next_exponential = simd.max_f32s(simd.mul_f32s(scale, simd.add_f32s(minus_ln, ln(simd, tail))), zero);
            next = simd.select_f32s(quadratic, next, next_exponential);
            room = simd.select_f32s(quadratic, room, simd.sub_f32s(one, simd.mul_f32s(a, scale)));
            part = simd.select_f32s(quadratic, part, simd.mul_f32s(a, m));
        }

        // ln M = a·base/room − ½ ln room, or ln(1 + a·m/room)
        let share = simd.div_f32s(part, simd.max_f32s(room, simd.splat_f32s(1e-30)));
        let log = ln_1p(simd, simd.select_f32s(quadratic, less, share));
        let minus_log_m = simd.select_f32s(quadratic, simd.sub_f32s(simd.mul_f32s(half, log), share), simd.neg_f32s(log));
        let k3 = simd.mul_f32s(simd.mul_f32s(half, self.splat(simd, field::K3)), v);
        let plain = simd.mul_add_f32s(self.splat(simd, field::K1), v, self.splat(simd, field::K0));
        let corrected = simd.greater_than_f32s(room, zero);
        let rest = simd.select_f32s(corrected, simd.sub_f32s(minus_log_m, k3), plain);
        (next, rest)
    }

    /// The log step of the regime; then the regime moves on.
    #[inline(always)]
    fn regime_step<S: Simd>(&self, simd: S, s: &mut LaneState<S>, z: S::f32s, w: S::u32s, step: S::f32s) -> S::f32s {
        let (mut drift, mut sd) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
        for i in 0..self.m.entries {
            let here = simd.equal_u32s(s.regime, simd.splat_u32s(i as u32));
            drift = simd.select_f32s(here, simd.splat_f32s(self.m.reals[self.m.tail + 2 * i]), drift);
            sd = simd.select_f32s(here, simd.splat_f32s(self.m.reals[self.m.tail + 2 * i + 1]), sd);
        }
        s.regime = self.next_regime(simd, s.regime, w);
        simd.mul_add_f32s(z, sd, simd.add_f32s(step, drift))
    }

    #[inline(always)]
    fn next_regime<S: Simd>(&self, simd: S, regime: S::u32s, w: S::u32s) -> S::u32s {
        let (k, mut next) = (self.m.entries, simd.splat_u32s(0));
        for i in 0..k {
            let here = simd.equal_u32s(regime, simd.splat_u32s(i as u32));
            next = simd.select_u32s(here, self.reached(simd, self.m.table + (k - 1) * (1 + i), k - 1, w), next);
        }
        next
    }

    /// The historical return of a step.
    #[inline(always)]
    fn block_step<S: Simd>(&self, simd: S, s: &mut LaneState<S>, end: S::u32s, start: S::u32s, t: u32) -> S::f32s {
        s.at = self.next_bar(simd, s.at, end, start, t);
        self.gather(simd, self.m.tail, s.at)
    }

    #[inline(always)]
    fn next_bar<S: Simd>(&self, simd: S, at: S::u32s, end: S::u32s, start: S::u32s, t: u32) -> S::u32s {
        let bars = simd.splat_u32s(self.m.bars);
        let from = simd.widening_mul_u32s(start, bars).1;
        let next = simd.add_u32s(at, simd.splat_u32s(1));
        let next = simd.select_u32s(simd.equal_u32s(next, bars), simd.splat_u32s(0), next);
        if t == 0 || self.m.block > 0 && t.is_multiple_of(self.m.block) {
            from
        } else if self.m.block > 0 {
            next
        } else {
            simd.select_u32s(simd.less_than_u32s(end, simd.splat_u32s(self.m.restart)), from, next)
        }
    }

    #[inline(always)]
    fn gather<S: Simd>(&self, _: S, from: usize, at: S::u32s) -> S::f32s {
        let mut at = [at];
        for lane in bytemuck::cast_slice_mut::<S::u32s, u32>(&mut at) {
            *lane = self.m.reals.get(from + *lane as usize).copied().unwrap_or(0.0).to_bits();
        }
        bytemuck::cast(at[0])
    }

    /// ln of a given price over the market's spot.
    #[inline(always)]
    fn given_x<S: Simd>(&self, simd: S, at: S::u32s) -> S::f32s {
        let ratio = simd.div_f32s(self.gather(simd, 0, at), self.splat(simd, field::SPOT));
        ln(simd, simd.max_f32s(ratio, simd.splat_f32s(f32::MIN_POSITIVE)))
    }

    /// S(t).
    #[inline(always)]
    pub(crate) fn spot<S: Simd>(&self, simd: S, s: &LaneState<S>) -> S::f32s {
        if Self::KIND == REPLAY { self.gather(simd, 0, s.at) } else { simd.mul_f32s(self.splat(simd, field::SPOT), exp_fast(simd, s.x)) }
    }

    /// F(t).
    #[inline(always)]
    pub(crate) fn future<S: Simd>(&self, simd: S, s: &LaneState<S>) -> S::f32s {
        simd.mul_f32s(self.spot(simd, s), exp_fast(simd, s.basis))
    }

    /// What `events` holds.
    #[inline(always)]
    pub(crate) fn event<S: Simd>(&self, s: &LaneState<S>) -> S::u32s {
        if Self::KIND == BOOTSTRAP { s.at } else { s.regime }
    }
}

// ---- the kernels that store paths -----------------------------------------------------------------------------------------------

/// Paths of a task.
const RUN: usize = 64;

/// The fast f32 column of `paths_*`.
pub(crate) fn paths(launch: CpuLaunch<'_, f32>) -> Result<()> {
    paths_on(Arch::new(), launch)
}

fn paths_on(arch: Arch, mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: PathsParams = launch.params()?;
    let (reals, words) = (launch.real()?, launch.word()?);
    let (spot, variance, events, future) = (launch.real_mut()?, launch.real_mut()?, launch.word_mut()?, launch.real_mut()?);
    let market = PathMarket::of(reals, words, p.market as usize);
    let first = u64::from(p.first_high) << 32 | u64::from(p.first);
    runs(&p, [spot, variance, future], events, RUN)
        .into_par_iter()
        .enumerate()
        .try_for_each(|(i, mut rows)| arch.dispatch(Store { market, t: p.t, first: first + (i * RUN) as u64, rows: &mut rows }))
}

struct Store<'a, 'b> {
    market: PathMarket<'a, f32>,
    t: u32,
    first: u64,
    rows: &'b mut Rows<'a, f32>,
}

impl WithSimd for Store<'_, '_> {
    type Output = Result<()>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<()> {
        let model = self.market.kind as u32 | if self.market.futures { FUTURES } else { 0 };
        macro_rules! model {
            ($($model:literal)*) => {
                match model {
                    $($model => store::<S, $model>(simd, self),)*
                    _ => return Err(Error::Internal(format!("no paths of model {model}"))),
                }
            };
        }
        model!(0 1 2 3 4 5 6 16 17 18 19 20 21);
        Ok(())
    }
}

/// Writes a lane's values to time t of their rows.
#[inline(always)]
fn put<T: Copy>(rows: &mut [T], bars: usize, from: usize, t: usize, values: &[T]) {
    for (i, &x) in values.iter().enumerate() {
        if let Some(to) = rows.get_mut((from + i) * bars + t) {
            *to = x;
        }
    }
}

#[inline(always)]
fn store<S: Simd, const MODEL: u32>(simd: S, work: Store<'_, '_>) {
    let market = LaneMarket::<MODEL>::of(work.market);
    let bars = work.t as usize + 1;
    let rows = work.rows;
    let count = rows.spot.len() / bars;
    for from in (0..count).step_by(S::F32_LANES) {
        let paths = market.paths(simd, work.first + from as u64);
        let mut s = market.start(simd, &paths);
        for quad in 0..work.t / 4 + 1 {
            let d = market.draws(simd, &paths, quad);
            for t in 4 * quad..(4 * quad + 4).min(work.t + 1) {
                let at = t as usize;
                put(rows.spot, bars, from, at, bytemuck::cast_slice(&[market.spot(simd, &s)]));
                if !rows.variance.is_empty() {
                    put(rows.variance, bars, from, at, bytemuck::cast_slice(&[s.v]));
                }
                if !rows.events.is_empty() {
                    put(rows.events, bars, from, at, bytemuck::cast_slice(&[market.event::<S>(&s)]));
                }
                if !rows.future.is_empty() {
                    put(rows.future, bars, from, at, bytemuck::cast_slice(&[market.future(simd, &s)]));
                }
                if t < work.t {
                    market.step(simd, &mut s, &d, t);
                }
            }
        }
    }
}

// ---- several assets -----------------------------------------------------------------------------------------------------------

/// The fast f32 column of `paths_assets_*`.
pub(crate) fn paths_assets(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let arch = Arch::new();
    let p: PathsParams = launch.params()?;
    let (reals, words, spot, events) = (launch.real()?, launch.word()?, launch.real_mut()?, launch.word_mut()?);
    let market = PathMarket::of(reals, words, 0);
    let (count, bars, n) = (p.paths as usize, p.t as usize + 1, p.market as usize);
    let first = u64::from(p.first_high) << 32 | u64::from(p.first);
    let rows = spot[..count * bars * n].par_chunks_mut(RUN * bars * n).zip(events[..count * bars].par_chunks_mut(RUN * bars));
    rows.enumerate().for_each(|(i, (spot, events))| arch.dispatch(Assets { market, n, t: p.t, first: first + (i * RUN) as u64, spot, events }));
    Ok(())
}

struct Assets<'a, 'b> {
    market: PathMarket<'a, f32>,
    n: usize,
    t: u32,
    first: u64,
    spot: &'b mut [f32],
    events: &'b mut [u32],
}

impl WithSimd for Assets<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.market.kind == Kind::Regimes { assets::<S, REGIMES>(simd, self) } else { assets::<S, BOOTSTRAP>(simd, self) }
    }
}

#[inline(always)]
fn assets<S: Simd, const MODEL: u32>(simd: S, work: Assets<'_, '_>) {
    let market = LaneMarket::<MODEL>::of(work.market);
    let (n, bars, zero) = (work.n, work.t as usize + 1, simd.splat_f32s(0.0));
    let (mut x, mut z) = (vec![zero; n], vec![[zero; 4]; n]);
    for from in (0..work.events.len() / bars).step_by(S::F32_LANES) {
        let paths = market.paths(simd, work.first + from as u64);
        let mut s = market.start(simd, &paths);
        x.fill(zero);
        for quad in 0..work.t / 4 + 1 {
            let w = market.words(simd, &paths, &paths.first, quad);
            let mut w2 = [simd.splat_u32s(0); 4];
            if MODEL == REGIMES {
                for (j, z) in z.iter_mut().enumerate() {
                    let counter = Counter::of(simd, paths.index, factor::SPOT + j as u32, market.m.seed);
                    *z = market.normals(simd, &paths, &counter, quad, j as u32);
                }
            } else {
                w2 = market.words(simd, &paths, &paths.second, quad);
            }
            for t in 4 * quad..(4 * quad + 4).min(work.t + 1) {
                let (c, at) = ((t % 4) as usize, t as usize);
                for (i, x) in x.iter().enumerate() {
                    let spot = simd.mul_f32s(simd.splat_f32s(market.m.reals[market.m.tail + i]), exp_fast(simd, *x));
                    put(&mut work.spot[at * n + i..], bars * n, from, 0, bytemuck::cast_slice(&[spot]));
                }
                put(work.events, bars, from, at, bytemuck::cast_slice(&[market.event::<S>(&s)]));
                if t < work.t {
                    market.joint_step(simd, &mut s, &mut x, &z, (w[c], w2[c]), t);
                }
            }
        }
    }
}

impl<const MODEL: u32> LaneMarket<'_, MODEL> {
    /// Step t of all assets: their logs x, their normals z.
    #[inline(always)]
    fn joint_step<S: Simd>(&self, simd: S, s: &mut LaneState<S>, x: &mut [S::f32s], z: &[[S::f32s; 4]], (w, w2): (S::u32s, S::u32s), t: u32) {
        let (n, c) = (x.len(), (t % 4) as usize);
        let tail = &self.m.reals[self.m.tail + n..];
        if MODEL == BOOTSTRAP {
            s.at = self.next_bar(simd, s.at, w, w2, t);
            let mut at = [s.at];
            for (i, x) in x.iter_mut().enumerate() {
                let mut moves = [simd.splat_f32s(0.0)];
                let lanes = bytemuck::cast_slice_mut::<S::f32s, f32>(&mut moves).iter_mut().zip(bytemuck::cast_slice_mut::<S::u32s, u32>(&mut at));
                for (to, bar) in lanes {
                    *to = tail.get(n * (1 + *bar as usize) + i).copied().unwrap_or(0.0);
                }
                *x = simd.add_f32s(*x, simd.add_f32s(simd.splat_f32s(tail[i]), moves[0]));
            }
            return;
        }
        for (i, x) in x.iter_mut().enumerate() {
            let mut step = simd.splat_f32s(0.0);
            for (r, own) in tail.chunks_exact(n + n * (n + 1) / 2).take(self.m.entries).enumerate() {
                let mut sum = simd.splat_f32s(own[i]);
                for (l, z) in own[n + i * (i + 1) / 2..][..=i].iter().zip(z) {
                    sum = simd.mul_add_f32s(z[c], simd.splat_f32s(*l), sum);
                }
                step = if r == 0 { sum } else { simd.select_f32s(simd.equal_u32s(s.regime, simd.splat_u32s(r as u32)), sum, step) };
            }
            *x = simd.add_f32s(*x, step);
        }
        s.regime = self.next_regime(simd, s.regime, w);
    }
}

// ---- moments --------------------------------------------------------------------------------------------------------------------

/// The fast f32 column of `paths_moments`.
pub(crate) fn paths_moments(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let arch = Arch::new();
    let p: PathsParams = launch.params()?;
    let (reals, words, sums) = (launch.real()?, launch.word()?, launch.real_mut()?);
    let mut market = PathMarket::of(reals, words, 0);
    market.matched = 0;
    let (each, assets) = (2 * p.t as usize * p.store as usize, words[word::ASSETS] > 0);
    let first = u64::from(p.first_high) << 32 | u64::from(p.first);
    let blocks = u64::from(p.paths).div_ceil(BLOCK) as usize;
    sums[..blocks * each].par_chunks_exact_mut(each).enumerate().for_each(|(block, sums)| {
        let from = block as u64 * BLOCK;
        let count = (u64::from(p.paths) - from).min(BLOCK) as usize;
        arch.dispatch(Moments { market, t: p.t, assets, first: first + from, count, sums });
    });
    Ok(())
}

struct Moments<'a, 'b> {
    market: PathMarket<'a, f32>,
    t: u32,
    assets: bool,
    first: u64,
    count: usize,
    sums: &'b mut [f32],
}

impl WithSimd for Moments<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let market = LaneMarket::<REPLAY>::of(self.market);
        let zero = simd.splat_f32s(0.0);
        for (slot, sums) in self.sums.chunks_exact_mut(2 * self.t as usize).enumerate() {
            let factor = if slot == 0 || self.assets { factor::SPOT + slot as u32 } else { factor::BASIS };
            let mut total = vec![[zero; 2]; self.t.next_multiple_of(4) as usize];
            for from in (0..self.count).step_by(S::F32_LANES) {
                let paths = market.paths(simd, self.first + from as u64);
                let counter = Counter::of(simd, paths.index, factor, market.m.seed);
                let inside = (self.count - from).min(S::F32_LANES);
                for (quad, total) in total.chunks_exact_mut(4).enumerate() {
                    let z = market.normals(simd, &paths, &counter, quad as u32, 0);
                    for (sum, z) in total.iter_mut().zip(z) {
                        let z = only(simd, z, inside);
                        *sum = [simd.add_f32s(sum[0], z), simd.mul_add_f32s(z, z, sum[1])];
                    }
                }
            }
            for (out, sum) in sums.chunks_exact_mut(2).zip(total) {
                (out[0], out[1]) = (simd.reduce_sum_f32s(sum[0]), simd.reduce_sum_f32s(sum[1]));
            }
        }
    }
}
