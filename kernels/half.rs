//! Reals stored in 16 bits: IEEE 754 binary16 (f16) and bfloat16, to and from f32 and f64.
//!
//! To 16 bits rounds once, to nearest, ties to even: too large gives infinity, too small a subnormal or zero, NaN a quiet NaN. From 16 bits
//! is exact. f64 goes through an f32 whose last bit is odd where bits were lost, which keeps the second rounding the right one (Boldo,
//! Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").

use crate::kernel::Elem;
use crate::real::Real;

/// f16 to f32.
pub fn f16_to_f32(bits: u16) -> f32 {
    // The exponent moves by a product with 2^112, which also normalises subnormals.
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | u32::from(bits & 0x8000) << 16)
}

/// f32 to f16.
pub fn f32_to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16) as u16 & 0x8000;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    let rounded = if magnitude > 0x7f80_0000 {
        0x7e00
    } else if magnitude >= 0x477f_f000 {
        0x7c00
    } else if magnitude < 0x3880_0000 {
        // Below 2^-14 the last place of f32 beside 0.5 is that of f16's subnormals.
        (f32::from_bits(magnitude) + 0.5).to_bits() - 0x3f00_0000
    } else {
        (magnitude - 0x3800_0000 + 0xfff + (magnitude >> 13 & 1)) >> 13
    };
    rounded as u16 | sign
}

/// bf16 to f32.
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 to bf16.
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { bits + 0x7fff + (bits >> 16 & 1) };
    (rounded >> 16) as u16
}

/// f64 to f32, the last bit odd where bits were lost.
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    if back == x || !nearest.is_finite() {
        return nearest;
    }
    let below = if back.abs() > x.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    f32::from_bits(below | 1)
}

/// A real in the storage type, `elem` one of the two.
pub(crate) fn narrow<R: Real>(elem: Elem, x: R) -> u16 {
    // Exact for f32.
    let x = round_to_odd(x.f64());
    if elem == Elem::Bf16 { f32_to_bf16(x) } else { f32_to_f16(x) }
}

/// Reals in the storage type, `elem` one of the two.
pub(crate) fn narrowed<R: Real>(elem: Elem, from: &[R], to: &mut [u16]) {
    to.iter_mut().zip(from).for_each(|(to, &x)| *to = narrow(elem, x));
}

/// Stored values as reals.
pub(crate) fn widened<R: Real>(elem: Elem, from: &[u16]) -> Vec<R> {
    let widen = if elem == Elem::Bf16 { bf16_to_f32 } else { f16_to_f32 };
    from.iter().map(|&bits| R::of(f64::from(widen(bits)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value of a pattern by its definition.
    fn defined(bits: u16, exponent_bits: i32) -> f64 {
        let fraction_bits = 15 - exponent_bits;
        let (exponent, fraction) = (i32::from(bits & 0x7fff) >> fraction_bits, i32::from(bits & ((1 << fraction_bits) - 1)));
        let bias = (1 << (exponent_bits - 1)) - 1;
        let magnitude = if exponent == (1 << exponent_bits) - 1 {
            if fraction == 0 { f64::INFINITY } else { f64::NAN }
        } else {
            f64::from(fraction + if exponent > 0 { 1 << fraction_bits } else { 0 }) * 2f64.powi(exponent.max(1) - bias - fraction_bits)
        };
        if bits & 0x8000 != 0 { -magnitude } else { magnitude }
    }

    /// Every pattern is exact; halfway between two neighbours goes to the even one, a little beside it to the nearer one.
    #[test]
    fn every_value_is_exact_and_every_tie_goes_to_even() {
        for (elem, exponent_bits) in [(Elem::F16, 5), (Elem::Bf16, 8)] {
            let widen = |bits: u16| f64::from(widened::<f32>(elem, &[bits])[0]);
            for bits in 0..=u16::MAX {
                let (got, want) = (widen(bits), defined(bits, exponent_bits));
                assert!(got == want && got.is_sign_negative() == want.is_sign_negative() || got.is_nan() && want.is_nan(), "{elem:?} {bits:04x}");
                if want.is_nan() {
                    assert!(widen(narrow(elem, want)).is_nan() && widen(narrow(elem, want as f32)).is_nan());
                    continue;
                }
                assert_eq!((narrow(elem, want), narrow(elem, want as f32)), (bits, bits), "{elem:?} {want:e}");
                let largest = (1u16 << 15) - (1 << (15 - exponent_bits)) - 1;
                if bits & 0x7fff > largest {
                    continue;
                }
                // The neighbour away from zero; beyond the largest it is what the next exponent would start with.
                let step = want - if bits & 0x7fff == 0 { want } else { defined(bits - 1, exponent_bits) };
                let up = if bits & 0x7fff == largest { want + step } else { defined(bits + 1, exponent_bits) };
                let tie = want + (up - want) / 2.0;
                assert_eq!(narrow(elem, tie), bits + (bits & 1), "tie above {want:e}");
                let near = |x: f64, toward: f64| x + (toward - x) * 2f64.powi(-24);
                assert_eq!(narrow(elem, near(tie, want)), bits, "below the tie above {want:e}");
                assert_eq!(narrow(elem, near(tie, up)), bits + 1, "above the tie above {want:e}");
                if (tie as f32) as f64 == tie {
                    assert_eq!(narrow(elem, tie as f32), bits + (bits & 1), "f32 tie above {want:e}");
                }
            }
        }
        assert_eq!([65519.0f32, 65520.0, -1e9, 1e-9, 6e-8].map(f32_to_f16), [0x7bff, 0x7c00, 0xfc00, 0, 1]);
        assert_eq!([3.4e38f32, f32::MAX, f32::MIN_POSITIVE].map(f32_to_bf16), [0x7f80, 0x7f80, 0x0080]);
        assert_eq!((narrow(Elem::F16, 1e300), narrow(Elem::Bf16, -1e300)), (0x7c00, 0xff80));
    }
}
