//! Exact arithmetic for decisions. A position must not depend on the device, so whatever decides one (is the fast average above
//! the slow one? is the RSI below 30?) is computed in integers, with the same bits in Rust, WGSL and CUDA. Profit and loss stay in
//! floating point.
//!
//! * A price becomes a fixed-point number below 2^bits; prices within a factor 2^(bits−24) of the asset's highest are exact.
//! * Sums over windows are differences of 128-bit prefix sums: no drift, no cancellation.
//! * A decision variable becomes a *key*, a u32 that orders as the variable does: 2^31 is zero, above it exponent (6 bits) and
//!   mantissa (25 bits, truncated). Two equal values always have equal keys, so ties stay ties.
//! * Sums of returns are accumulated as 64-bit fixed-point, so that a window is an exact difference of two prefixes, and two sets
//!   that held the same positions in a window have the same Sharpe ratio there, bit for bit.
//!
//! The same helpers stand in `shaders/common.wgsl` and `cuda/common.cuh`.

/// Key of zero.
pub const KEY_ZERO: u32 = 0x8000_0000;

/// Smallest exponent of a ratio's key: ratios below 2^RATIO_MIN share the smallest one.
pub const RATIO_MIN: i32 = -40;

/// The biased exponent of a positive f32.
pub fn exponent(x: f32) -> u32 {
    (x.to_bits() >> 23) & 0xff
}

/// A positive price as fixed-point below 2^bits, where `max_exponent` is the biased exponent of the asset's highest price.
pub fn fixed_price(price: f32, max_exponent: u32, bits: u32) -> u64 {
    let raw = price.to_bits();
    let x = exponent(price);
    let mantissa = u64::from((raw & 0x7f_ffff) | if x > 0 { 0x80_0000 } else { 0 });
    let down = max_exponent.saturating_sub(x.max(1));
    let up = bits - 24;
    if up >= down { mantissa << (up - down) } else { mantissa.checked_shr(down - up).unwrap_or(0) }
}

/// x·alpha / 2^63, rounded down; alpha ≤ 2^63.
pub fn mul_shift63(x: u64, alpha: u64) -> u64 {
    ((u128::from(x) * u128::from(alpha)) >> 63) as u64
}

/// One step of an exponential average: state + alpha·(x − state) / 2^63, the step rounded towards zero.
pub fn blend(state: u64, x: u64, alpha: u64) -> u64 {
    if x >= state { state + mul_shift63(x - state, alpha) } else { state - mul_shift63(state - x, alpha) }
}

/// Key of a magnitude in `exponent` and the 25 bits after the leading one of `leading` (non-zero).
fn key_from(leading: u64, exponent: i32, negative: bool) -> u32 {
    let mantissa = ((leading << leading.leading_zeros()) >> 38) as u32 & 0x1ff_ffff;
    let magnitude = if exponent < 0 { 1 } else { (((exponent.min(62) as u32) << 25) | mantissa) + 1 };
    if negative { KEY_ZERO - magnitude } else { KEY_ZERO + magnitude }
}

/// Key of a signed difference given as magnitude (< 2^63) and sign.
pub fn difference_key(magnitude: u64, negative: bool) -> u32 {
    if magnitude == 0 { KEY_ZERO } else { key_from(magnitude, 63 - magnitude.leading_zeros() as i32, negative) }
}

/// Key of (sum − n·x) / n: how far the mean of n values lies above x. n < 2^20.
pub fn mean_key(sum: u128, n: u32, x: u64) -> u32 {
    let level = u128::from(n) * u128::from(x);
    let (magnitude, negative) = if sum >= level { (sum - level, false) } else { (level - sum, true) };
    if magnitude == 0 {
        return KEY_ZERO;
    }
    let lead = magnitude.leading_zeros();
    let top = ((magnitude << lead) >> 72) as u64; // 56 bits
    let quotient = top / u64::from(n);
    key_from(quotient, 63 - quotient.leading_zeros() as i32 + 8 + (127 - lead as i32) - 63, negative)
}

/// Key of num / den, with sign; zero if either is.
pub fn ratio_key(num: u128, den: u128, negative: bool) -> u32 {
    if num == 0 || den == 0 {
        return KEY_ZERO;
    }
    let (lead_num, lead_den) = (num.leading_zeros(), den.leading_zeros());
    let top_num = ((num << lead_num) >> 65) as u64; // 63 bits
    let top_den = ((den << lead_den) >> 96) as u64; // 32 bits
    let quotient = top_num / top_den;
    let exponent = (63 - quotient.leading_zeros() as i32) + (127 - lead_num as i32) - (127 - lead_den as i32) - 31;
    key_from(quotient, (exponent - RATIO_MIN).min(62), negative)
}

/// The key that [`ratio_key`] gives a real number; for thresholds.
pub fn ratio_key_of(x: f64, negative: bool) -> u32 {
    if x.is_nan() || x <= 0.0 {
        return KEY_ZERO;
    }
    let bits = x.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i32 - 1023;
    key_from((bits & ((1 << 52) - 1)) | (1 << 52), (exponent - RATIO_MIN).min(62), negative)
}

/// Relative strength index / 100 as a fraction of 2^31: gain / (gain + loss); one half where both are zero.
pub fn rsi_key(gain: u64, loss: u64) -> u32 {
    let sum = gain + loss;
    if sum == 0 {
        return 1 << 30;
    }
    let lead = sum.leading_zeros();
    let den = (sum << lead) >> 32;
    (((gain << lead) >> 1) / den).min(1 << 31) as u32
}

/// 1/(√252·sd) of n log returns with `bits` fractional bits, as (root, exponent): root·2^exponent/√252, root of 31 to 32 bits. `variance` is
/// n²·(n−1)/n times the sample variance, n·Σx² − (Σx)², and not zero.
pub fn inverse_deviation(n: u32, variance: u128, bits: u32) -> (u32, i32) {
    let num = u64::from(n) * u64::from(n - 1);
    let (lead_num, lead_den) = (num.leading_zeros(), variance.leading_zeros());
    let den = ((variance << lead_den) >> 96) as u64;
    let quotient = ((num << lead_num) >> 1) / den; // ratio / 2^exponent, 31 to 32 bits
    let exponent = 2 * bits as i32 + lead_den as i32 - lead_num as i32 - 95;
    let up = if exponent % 2 == 0 { 32 } else { 31 };
    ((quotient << up).isqrt() as u32, (exponent - up) / 2)
}

/// Fixed-point of x with `shift` fractional bits, truncated towards zero.
pub fn to_fixed(x: f64, shift: i32) -> i64 {
    (x * 2f64.powi(shift)) as i64
}

/// n·squares·2^shift − sum²: n(n−1) times the variance, in units of 2^(−2·shift); zero below a relative 2^−20 of the mean square,
/// where f32 returns no longer tell a variance from rounding.
pub fn scaled_variance(n: u64, sum: i64, squares: u64, shift: u32) -> u128 {
    let total = (u128::from(n) * u128::from(squares)) << shift;
    let square = u128::from(sum.unsigned_abs()) * u128::from(sum.unsigned_abs());
    let variance = total.saturating_sub(square);
    if variance <= total >> 20 { 0 } else { variance }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_keep_every_bit_of_their_mantissa() {
        let max = exponent(35_304_000.0);
        for price in [35_304_000.0f32, 10.37, 0.0123] {
            let fixed = fixed_price(price, max, 62) as f64;
            assert_eq!(fixed / 2f64.powi(62 - (max as i32 - 126)), f64::from(price));
        }
    }

    #[test]
    fn keys_order_as_the_values_do() {
        let values = [-(1i64 << 62), -77, -76, -1, 0, 1, 2, 3, 1 << 40, (1 << 40) + (1 << 16), 1 << 62];
        let keys: Vec<u32> = values.iter().map(|v| difference_key(v.unsigned_abs(), *v < 0)).collect();
        assert!(keys.windows(2).all(|k| k[0] < k[1]), "{keys:?}");
    }

    #[test]
    fn equal_means_of_different_windows_have_equal_keys() {
        let x = 1u64 << 61;
        for (sum, n) in [(7u128, 3u32), (100, 7), (1 << 40, 1)] {
            let mean = |k: u32| mean_key(u128::from(n * k) * u128::from(x) + sum * u128::from(k), n * k, x);
            assert!([2, 5, 63, 1000].iter().all(|&k| mean(k) == mean(1)));
        }
        assert_eq!(mean_key(u128::from(x) * 9, 9, x), KEY_ZERO);
        assert!(mean_key(u128::from(x) * 9 - 1, 9, x) < KEY_ZERO);
    }

    #[test]
    fn ratio_keys_agree_with_those_of_reals() {
        for (num, den) in [(1u128, 4u128), (9, 4), (1 << 100, 1 << 101), (3, 1 << 60), (1 << 120, 1 << 101)] {
            assert_eq!(ratio_key(num, den, false), ratio_key_of(num as f64 / den as f64, false));
        }
        assert!(ratio_key(1, 1 << 60, true) < KEY_ZERO);
    }

    #[test]
    fn inverse_deviations_are_those_of_f64() {
        for (n, variance) in [(2u32, 1u128), (20, 12_345_678_901_234_567), (252, 1 << 100), (1 << 20, (1 << 126) - 1), (3, u128::MAX >> 2)] {
            let (root, exponent) = inverse_deviation(n, variance, 44);
            let want = (f64::from(n) * f64::from(n - 1) / variance as f64).sqrt() * 2f64.powi(44);
            let got = f64::from(root) * 2f64.powi(exponent);
            assert!(root >= 1 << 30 && (got / want - 1.0).abs() < 1e-9, "{n} {variance}: {got} {want}");
        }
    }

    #[test]
    fn rsi_is_100_without_losses_and_50_without_moves() {
        assert_eq!((rsi_key(5, 0), rsi_key(0, 5), rsi_key(0, 0), rsi_key(1 << 61, 1 << 61)), (1 << 31, 0, 1 << 30, 1 << 30));
    }
}
