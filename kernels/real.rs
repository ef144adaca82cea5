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
