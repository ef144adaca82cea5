//! The two reals of the CPU column: f32 on the `cpu` device, f64 on `reference`.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// f32 or f64, with the handful of functions that kernels use.
pub trait Real:
    Copy
    + Debug
    + Default
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Sum
    + 'static
{
    /// Bits of the mantissa.
    const DIGITS: u32;
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// From f64, rounded.
    fn of(x: f64) -> Self;
    /// To f64.
    fn f64(self) -> f64;
    /// To f32, rounded.
    fn f32(self) -> f32;
    /// Square root.
    fn sqrt(self) -> Self;
    /// e to the power of it.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// ln(1 + x).
    fn ln_1p(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Error function: 2/√π·∫ e^(−t²) dt from 0.
    fn erf(self) -> Self {
        Self::of(erf(self.f64()))
    }
    /// 1 − erf, which keeps its relative accuracy where erf is near 1.
    fn erfc(self) -> Self {
        Self::of(erfc(self.f64()))
    }
    /// Standard normal distribution function Φ, to full relative accuracy in both tails.
    fn normal_cdf(self) -> Self {
        Self::of(0.5 * erfc(-self.f64() * std::f64::consts::FRAC_1_SQRT_2))
    }
    /// Absolute value.
    fn abs(self) -> Self;
    /// self·b + c: rounded once in f32, so that all f32 columns agree; f64 may round twice.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// The smaller of two.
    fn min(self, other: Self) -> Self;
    /// The larger of two.
    fn max(self, other: Self) -> Self;
}

macro_rules! real {
    ($ty:ty, $mul_add:expr) => {
        impl Real for $ty {
            const DIGITS: u32 = <$ty>::MANTISSA_DIGITS;
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            fn of(x: f64) -> Self {
                x as $ty
            }
            fn f64(self) -> f64 {
                f64::from(self)
            }
            fn f32(self) -> f32 {
                self as f32
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln(self) -> Self {
                self.ln()
            }
            fn ln_1p(self) -> Self {
                self.ln_1p()
            }
            fn tanh(self) -> Self {
                self.tanh()
            }
            fn abs(self) -> Self {
                self.abs()
            }
            fn mul_add(self, b: Self, c: Self) -> Self {
                let mul_add: fn(Self, Self, Self) -> Self = $mul_add;
                mul_add(self, b, c)
            }
            fn min(self, other: Self) -> Self {
                self.min(other)
            }
            fn max(self, other: Self) -> Self {
                self.max(other)
            }
        }
    };
}
real!(f32, f32::mul_add);
// Without the instruction, f64's fused multiply-add is a slow call.
real!(f64, |a, b, c| a * b + c);

// ---- the error function ---------------------------------------------------------------------------------------------
//
// Rational Chebyshev forms of W. J. Cody, Math. Comp. 23 (1969) 631-637: erf = x·R(x²) for |x| ≤ 0.46875, erfc = e^(−x²)·R(x) up to 4,
// and e^(−x²)/x·(1/√π − R(1/x²)/x²) above; within a few 1e-16 relative. e^(−x²) is split, so that rounding x² does not show.

/// Evaluates c[0]·z^n + … by Horner.
fn horner(z: f64, c: &[f64]) -> f64 {
    c.iter().fold(0.0, |sum, &c| sum * z + c)
}

/// Below it erf is a series in x².
const ERF_SMALL: f64 = 0.46875;

fn erf_small(x: f64) -> f64 {
    const P: [f64; 5] = [1.857_777_061_846_031_5e-1, 3.161_123_743_870_565_6, 1.138_641_541_510_501_6e2, 3.774_852_376_853_02e2, 3.209_377_589_138_469_4e3];
    const Q: [f64; 5] = [1.0, 2.360_129_095_234_412_2e1, 2.440_246_379_344_441_7e2, 1.282_616_526_077_372_3e3, 2.844_236_833_439_171e3];
    let z = x * x;
    x * horner(z, &P) / horner(z, &Q)
}

/// erfc of y > 0.46875.
fn erfc_large(y: f64) -> f64 {
    const P: [f64; 9] = [
        2.153_115_354_744_038_3e-8,
        5.641_884_969_886_701e-1,
        8.883_149_794_388_377,
        6.611_919_063_714_163e1,
        2.986_351_381_974_001e2,
        8.819_522_212_417_69e2,
        1.712_047_612_634_070_7e3,
        2.051_078_377_826_071_6e3,
        1.230_339_354_797_997_2e3,
    ];
    const Q: [f64; 9] = [
        1.0,
        1.574_492_611_070_983_5e1,
        1.176_939_508_913_125e2,
        5.371_811_018_620_099e2,
        1.621_389_574_566_690_3e3,
        3.290_799_235_733_459_7e3,
        4.362_619_090_143_247e3,
        3.439_367_674_143_721_6e3,
        1.230_339_354_803_749_5e3,
    ];
    const FAR_P: [f64; 6] = [
        1.631_538_713_730_209_7e-2,
        3.053_266_349_612_323_6e-1,
        3.603_448_999_498_044_5e-1,
        1.257_817_261_112_292_6e-1,
        1.608_378_514_874_227_5e-2,
        6.587_491_615_298_378e-4,
    ];
    const FAR_Q: [f64; 6] =
        [1.0, 2.568_520_192_289_822, 1.872_952_849_923_467_3, 5.279_051_029_514_285e-1, 6.051_834_131_244_132e-2, 2.335_204_976_268_691_8e-3];
    const INVERSE_SQRT_PI: f64 = 0.564_189_583_547_756_3;
    let ratio = if y <= 4.0 {
        horner(y, &P) / horner(y, &Q)
    } else {
        let z = 1.0 / (y * y);
        (INVERSE_SQRT_PI - z * horner(z, &FAR_P) / horner(z, &FAR_Q)) / y
    };
    let head = (16.0 * y).trunc() / 16.0;
    (-head * head).exp() * (-(y - head) * (y + head)).exp() * ratio
}

/// Error function in f64.
pub fn erf(x: f64) -> f64 {
    match x.abs() {
        y if y <= ERF_SMALL => erf_small(x),
        y if y < 6.0 => (1.0 - erfc_large(y)).copysign(x),
        y if y >= 6.0 => 1f64.copysign(x),
        _ => x,
    }
}

/// Complement of the error function in f64; 0 from 27 on.
pub fn erfc(x: f64) -> f64 {
    match x.abs() {
        y if y <= ERF_SMALL => 1.0 - erf_small(x),
        y if y < 27.0 => {
            if x > 0.0 {
                erfc_large(y)
            } else {
                2.0 - erfc_large(y)
            }
        }
        y if y >= 27.0 => {
            if x > 0.0 {
                0.0
            } else {
                2.0
            }
        }
        _ => x,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of erf and erfc to 17 digits (Abramowitz & Stegun 7.1, mpmath).
    #[test]
    fn error_function_matches_known_values() {
        let known = [
            (1e-10, 1.128_379_167_095_512_6e-10, 0.999_999_999_887_162_1),
            (0.25, 0.276_326_390_168_236_93, 0.723_673_609_831_763_1),
            (0.5, 0.520_499_877_813_046_5, 0.479_500_122_186_953_5),
            (1.0, 0.842_700_792_949_714_9, 0.157_299_207_050_285_13),
            (2.0, 0.995_322_265_018_952_7, 4.677_734_981_047_266e-3),
            (4.5, 0.999_999_999_803_383_9, 1.966_160_441_542_887_4e-10),
            (10.0, 1.0, 2.088_487_583_762_545e-45),
        ];
        for (x, e, c) in known {
            assert!((erf(x) / e - 1.0).abs() < 1e-15 && (erf(-x) / -e - 1.0).abs() < 1e-15, "erf({x}) = {:e}", erf(x));
            assert!((erfc(x) / c - 1.0).abs() < 2e-15, "erfc({x}) = {:e}", erfc(x));
            assert!((erfc(-x) - (1.0 + e)).abs() < 1e-15);
        }
        assert!(erf(f64::NAN).is_nan() && erfc(f64::NAN).is_nan());
        assert_eq!((erf(f64::INFINITY), erfc(f64::NEG_INFINITY), Real::erf(0f64)), (1.0, 2.0, 0.0));
        assert!((1.959_963_984_540_054f64.normal_cdf() - 0.975).abs() < 1e-15);
        assert!(((-8f64).normal_cdf() / 6.220_960_574_271_786e-16 - 1.0).abs() < 1e-14);
    }
}
