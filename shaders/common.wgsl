// Helpers of every WGSL unit: the linear workgroup index, undefined values, Philox, and the wide integers of kernels/fixed.rs.
// 64-bit numbers are vec2<u32>, 128-bit numbers vec4<u32>, least significant word first.

// Undefined statistics; the host turns them into NaN.
const UNDEFINED: f32 = -1e30;

// Linear index of a workgroup in a grid folded into three dimensions.
fn group_index(wid: vec3<u32>, nwg: vec3<u32>) -> u32 {
    return wid.x + nwg.x * (wid.y + nwg.y * wid.z);
}

// ---- 64 bits ----------------------------------------------------------------------------------------------------

fn add64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let lo = a.x + b.x;
    return vec2<u32>(lo, a.y + b.y + select(0u, 1u, lo < a.x));
}

fn sub64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn less64(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn is_zero64(a: vec2<u32>) -> bool {
    return (a.x | a.y) == 0u;
}

fn negate64(a: vec2<u32>) -> vec2<u32> {
    return sub64(vec2<u32>(0u, 0u), a);
}

fn shl64(a: vec2<u32>, s: u32) -> vec2<u32> {
    if s == 0u {
        return a;
    }
    if s >= 32u {
        return vec2<u32>(0u, a.x << (s & 31u));
    }
    return vec2<u32>(a.x << s, (a.y << s) | (a.x >> (32u - s)));
}

fn shr64(a: vec2<u32>, s: u32) -> vec2<u32> {
    if s == 0u {
        return a;
    }
    if s >= 64u {
        return vec2<u32>(0u, 0u);
    }
    if s >= 32u {
        return vec2<u32>(a.y >> (s & 31u), 0u);
    }
    return vec2<u32>((a.x >> s) | (a.y << (32u - s)), a.y >> s);
}

fn leading_zeros64(a: vec2<u32>) -> u32 {
    return select(32u + countLeadingZeros(a.x), countLeadingZeros(a.y), a.y != 0u);
}

// 32 × 32 → 64 bits by 16-bit halves.
fn mul32(a: u32, b: u32) -> vec2<u32> {
    let a0 = a & 0xffffu;
    let a1 = a >> 16u;
    let b0 = b & 0xffffu;
    let b1 = b >> 16u;
    let low = a0 * b0;
    let mid = a1 * b0 + (low >> 16u);
    let mid2 = a0 * b1 + (mid & 0xffffu);
    return vec2<u32>((mid2 << 16u) | (low & 0xffffu), a1 * b1 + (mid >> 16u) + (mid2 >> 16u));
}

// 64 × 64 → 128 bits.
fn mul64(a: vec2<u32>, b: vec2<u32>) -> vec4<u32> {
    let p00 = mul32(a.x, b.x);
    let p01 = mul32(a.x, b.y);
    let p10 = mul32(a.y, b.x);
    let p11 = mul32(a.y, b.y);
    let mid = add64(vec2<u32>(p00.y, 0u), vec2<u32>(p01.x, 0u));
    let mid2 = add64(mid, vec2<u32>(p10.x, 0u));
    let high = add64(add64(p11, vec2<u32>(p01.y, 0u)), add64(vec2<u32>(p10.y, 0u), vec2<u32>(mid2.y, 0u)));
    return vec4<u32>(p00.x, mid2.x, high.x, high.y);
}

// numerator / denominator for numerator < denominator · 2^32 and denominator ≥ 2^31.
fn div64_32(numerator: vec2<u32>, denominator: u32) -> u32 {
    var rest = numerator.y;
    var low = numerator.x;
    var quotient = 0u;
    for (var i = 0u; i < 32u; i++) {
        let carry = rest >> 31u;
        rest = (rest << 1u) | (low >> 31u);
        low = low << 1u;
        quotient = quotient << 1u;
        if carry == 1u || rest >= denominator {
            rest -= denominator;
            quotient |= 1u;
        }
    }
    return quotient;
}

// ---- 128 bits ---------------------------------------------------------------------------------------------------

fn add128(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    let low = add64(a.xy, b.xy);
    let carry = select(0u, 1u, less64(low, a.xy));
    return vec4<u32>(low, add64(add64(a.zw, b.zw), vec2<u32>(carry, 0u)));
}

fn sub128(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    let borrow = select(0u, 1u, less64(a.xy, b.xy));
    return vec4<u32>(sub64(a.xy, b.xy), sub64(sub64(a.zw, b.zw), vec2<u32>(borrow, 0u)));
}

fn less128(a: vec4<u32>, b: vec4<u32>) -> bool {
    return less64(a.zw, b.zw) || (all(a.zw == b.zw) && less64(a.xy, b.xy));
}

fn is_zero128(a: vec4<u32>) -> bool {
    return (a.x | a.y | a.z | a.w) == 0u;
}

fn leading_zeros128(a: vec4<u32>) -> u32 {
    return select(64u + leading_zeros64(a.xy), leading_zeros64(a.zw), !is_zero64(a.zw));
}

fn shl128(a: vec4<u32>, s: u32) -> vec4<u32> {
    if s >= 64u {
        return vec4<u32>(0u, 0u, shl64(a.xy, s - 64u));
    }
    if s == 0u {
        return a;
    }
    return vec4<u32>(shl64(a.xy, s), shl64(a.zw, s) | shr64(a.xy, 64u - s));
}

fn shr128(a: vec4<u32>, s: u32) -> vec4<u32> {
    if s >= 64u {
        return vec4<u32>(shr64(a.zw, s - 64u), 0u, 0u);
    }
    if s == 0u {
        return a;
    }
    return vec4<u32>(shr64(a.xy, s) | shl64(a.zw, 64u - s), shr64(a.zw, s));
}

// a · b modulo 2^128.
fn mul128_32(a: vec4<u32>, b: u32) -> vec4<u32> {
    let p0 = mul32(a.x, b);
    let p1 = mul32(a.y, b);
    let p2 = mul32(a.z, b);
    let low = vec4<u32>(p0, p2);
    return add128(low, vec4<u32>(0u, p1, a.w * b));
}

// a · a modulo 2^128.
fn square128(a: vec4<u32>) -> vec4<u32> {
    let low = mul64(a.xy, a.xy);
    let cross = mul64(a.xy, a.zw);
    return add128(low, vec4<u32>(0u, 0u, shl64(cross.xy, 1u)));
}

// ---- fixed point and keys (kernels/fixed.rs) ----------------------------------------------------------------------

const KEY_ZERO: u32 = 0x80000000u;
const RATIO_MIN: i32 = -40;

fn fixed_price(price: f32, max_exponent: u32, bits: u32) -> vec2<u32> {
    let raw = bitcast<u32>(price);
    let x = (raw >> 23u) & 0xffu;
    let mantissa = vec2<u32>((raw & 0x7fffffu) | select(0u, 0x800000u, x > 0u), 0u);
    let lowest = max(x, 1u);
    let down = select(0u, max_exponent - lowest, max_exponent > lowest);
    let up = bits - 24u;
    if up >= down {
        return shl64(mantissa, up - down);
    }
    return shr64(mantissa, down - up);
}

fn blend(state: vec2<u32>, x: vec2<u32>, alpha: vec2<u32>) -> vec2<u32> {
    let falls = less64(x, state);
    let distance = select(sub64(x, state), sub64(state, x), falls);
    let move_by = shr128(mul64(distance, alpha), 63u).xy;
    return select(add64(state, move_by), sub64(state, move_by), falls);
}

fn key_from(leading: vec2<u32>, exponent: i32, negative: bool) -> u32 {
    let mantissa = (shl64(leading, leading_zeros64(leading)).y >> 6u) & 0x1ffffffu;
    let magnitude = select(((u32(min(exponent, 62)) << 25u) | mantissa) + 1u, 1u, exponent < 0);
    return select(KEY_ZERO + magnitude, KEY_ZERO - magnitude, negative);
}

fn difference_key(magnitude: vec2<u32>, negative: bool) -> u32 {
    if is_zero64(magnitude) {
        return KEY_ZERO;
    }
    return key_from(magnitude, 63 - i32(leading_zeros64(magnitude)), negative);
}

fn mean_key(sum: vec4<u32>, n: u32, x: vec2<u32>) -> u32 {
    let level = mul128_32(vec4<u32>(x, 0u, 0u), n);
    let negative = less128(sum, level);
    let magnitude = select(sub128(sum, level), sub128(level, sum), negative);
    if is_zero128(magnitude) {
        return KEY_ZERO;
    }
    let lead = leading_zeros128(magnitude);
    let top = shl128(magnitude, lead).zw;
    // Long division of the leading 56 bits: 32 + 12 + 12.
    let q0 = top.y / n;
    let x1 = ((top.y - q0 * n) << 12u) | (top.x >> 20u);
    let q1 = x1 / n;
    let x2 = ((x1 - q1 * n) << 12u) | ((top.x >> 8u) & 0xfffu);
    let q2 = x2 / n;
    let quotient = add64(shl64(vec2<u32>(q0, 0u), 24u), vec2<u32>((q1 << 12u) + q2, 0u));
    let exponent = 63 - i32(leading_zeros64(quotient)) + 8 + (127 - i32(lead)) - 63;
    return key_from(quotient, exponent, negative);
}

fn ratio_key(num: vec4<u32>, den: vec4<u32>, negative: bool) -> u32 {
    if is_zero128(num) || is_zero128(den) {
        return KEY_ZERO;
    }
    let lead_num = leading_zeros128(num);
    let lead_den = leading_zeros128(den);
    let quotient = div64_32(shr64(shl128(num, lead_num).zw, 1u), shl128(den, lead_den).w);
    let exponent = (31 - i32(countLeadingZeros(quotient))) - i32(lead_num) + i32(lead_den) - 31;
    return key_from(vec2<u32>(quotient, 0u), min(exponent - RATIO_MIN, 62), negative);
}

fn rsi_key(gain: vec2<u32>, loss: vec2<u32>) -> u32 {
    let sum = add64(gain, loss);
    if is_zero64(sum) {
        return 1u << 30u;
    }
    let lead = leading_zeros64(sum);
    let numerator = shr64(shl64(gain, lead), 1u);
    return min(div64_32(numerator, shl64(sum, lead).y), 1u << 31u);
}

// Signed fixed point of x with `shift` fractional bits, truncated towards zero.
fn to_fixed(x: f32, shift: i32) -> vec2<u32> {
    let raw = bitcast<u32>(x);
    let biased = (raw >> 23u) & 0xffu;
    let mantissa = vec2<u32>((raw & 0x7fffffu) | select(0u, 0x800000u, biased > 0u), 0u);
    let s = max(i32(biased), 1) - 150 + shift;
    let magnitude = select(shl64(mantissa, u32(clamp(s, 0, 40))), shr64(mantissa, u32(clamp(-s, 0, 64))), s < 0);
    return select(magnitude, negate64(magnitude), (raw >> 31u) == 1u);
}

fn magnitude64(a: vec2<u32>) -> vec2<u32> {
    return select(a, negate64(a), (a.y >> 31u) == 1u);
}

fn scaled_variance(n: u32, sum: vec2<u32>, squares: vec2<u32>, shift: u32) -> vec4<u32> {
    let total = shl128(mul128_32(vec4<u32>(squares, 0u, 0u), n), shift);
    let size = magnitude64(sum);
    let square = mul64(size, size);
    if less128(total, square) {
        return vec4<u32>(0u, 0u, 0u, 0u);
    }
    let variance = sub128(total, square);
    if !less128(shr128(total, 20u), variance) {
        return vec4<u32>(0u, 0u, 0u, 0u);
    }
    return variance;
}

// ---- random numbers (kernels/philox.rs) ----------------------------------------------------------------------------

fn philox4x32(counter_in: vec4<u32>, key_in: vec2<u32>) -> vec4<u32> {
    var c = counter_in;
    var k = key_in;
    for (var round = 0; round < 10; round++) {
        let a = mul32(0xD2511F53u, c.x);
        let b = mul32(0xCD9E8D57u, c.z);
        c = vec4<u32>(b.y ^ c.y ^ k.x, b.x, a.y ^ c.w ^ k.y, a.x);
        k += vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
    }
    return c;
}

// 2·atanh(s) for |s| ≤ 1/3.
fn two_atanh(s: f32) -> f32 {
    let q = s * s;
    let tail = q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * (0.11111111 + q * (0.09090909 + q * (0.07692308 + q * 0.06666667))))));
    return 2.0 * (s + s * tail);
}

// -ln of the uniform (k + ½)·2⁻²⁴; through 1 - u, which is exact, where u ≥ ½.
fn neg_log_uniform(k: u32) -> f32 {
    if k >= 0x800000u {
        let t = (f32(0xffffffu - k) + 0.5) * 5.9604645e-8;
        return two_atanh(t / (2.0 - t));
    }
    let v = bitcast<u32>(f32(k) + 0.5);
    var e = i32(v >> 23u) - 127;
    var m = bitcast<f32>((v & 0x7fffffu) | 0x3f800000u);
    if m > 1.4142135 {
        m = m * 0.5;
        e += 1;
    }
    return f32(24 - e) * 0.6931472 - two_atanh((m - 1.0) / (m + 1.0));
}

// (cos, sin) of 2πv by quarter turns and series.
fn turn(v: f32) -> vec2<f32> {
    let quarter = floor(4.0 * v + 0.5);
    let x = (v - 0.25 * quarter) * 6.2831855;
    let q = x * x;
    let s = x * (1.0 + q * (-0.16666667 + q * (0.008333334 + q * (-0.0001984127 + q * 2.7557319e-6))));
    let c = 1.0 + q * (-0.5 + q * (0.041666668 + q * (-0.0013888889 + q * (2.4801587e-5 + q * -2.755732e-7))));
    switch u32(quarter) & 3u {
        case 0u: { return vec2<f32>(c, s); }
        case 1u: { return vec2<f32>(-s, c); }
        case 2u: { return vec2<f32>(-c, -s); }
        default: { return vec2<f32>(s, -c); }
    }
}

fn uniform_of(word: u32) -> f32 {
    return (f32(word >> 8u) + 0.5) * 5.9604645e-8;
}

// ---- reals --------------------------------------------------------------------------------------------------------

// Per-bar Sharpe ratio of n bars from their fixed-point sum and scaled variance (kernels/fixed.rs): sum·√((n-1) / (n·variance)).
fn sharpe_of(n: u32, sum: vec2<u32>, variance: vec4<u32>) -> f32 {
    if n < 2u || is_zero128(variance) {
        return UNDEFINED;
    }
    let size = magnitude64(sum);
    if is_zero64(size) {
        return 0.0;
    }
    let lead = leading_zeros64(size);
    let lead_variance = leading_zeros128(variance);
    let odd = lead_variance & 1u;
    let mantissa = f32(shl64(size, lead).y) / sqrt(f32(shl128(variance, lead_variance).w) * select(1.0, 2.0, odd == 1u));
    // size = m·2^(32 - lead), variance = v·2^(96 - lead_variance)
    let exponent = 32 - i32(lead) - (96 - i32(lead_variance) - i32(odd)) / 2;
    let ratio = ldexp(mantissa * sqrt(f32(n - 1u) / f32(n)), exponent);
    return select(ratio, -ratio, (sum.y >> 31u) == 1u);
}

// e^x to an ulp or so, for x ≤ 88; 0 below −87. The built-in may be off by 3 + 2·|x| ulp.
fn exp_f32(x: f32) -> f32 {
    let y = max(x, -88.0);
    let n = floor(y * 1.44269504 + 0.5);
    let r = (y - n * 0.693359375) + n * 2.12194440e-4;
    let p = ((((r * 0.0001984127 + 0.0013888889) * r + 0.008333333) * r + 0.041666667) * r + 0.16666667) * r + 0.5;
    return select((1.0 + (r + r * r * p)) * bitcast<f32>((i32(n) + 127) << 23u), 0.0, x < -87.0);
}

fn exp_vec4(x: vec4<f32>) -> vec4<f32> {
    let y = max(x, vec4<f32>(-88.0));
    let n = floor(y * 1.44269504 + 0.5);
    let r = (y - n * 0.693359375) + n * 2.12194440e-4;
    let p = ((((r * 0.0001984127 + 0.0013888889) * r + 0.008333333) * r + 0.041666667) * r + 0.16666667) * r + 0.5;
    let scale = bitcast<vec4<f32>>((vec4<i32>(n) + 127) << vec4<u32>(23u));
    return select((1.0 + (r + r * r * p)) * scale, vec4<f32>(0.0), x < vec4<f32>(-87.0));
}

// 2·artanh(s) for |s| < 0.34.
fn twice_artanh(s: f32) -> f32 {
    let q = s * s;
    return 2.0 * s * (1.0 + q * (0.33333333 + q * (0.2 + q * (0.14285714 + q * (0.11111111 + q * (0.09090909 + q * 0.07692308))))));
}

// ln x for normal x > 0, to an ulp or so: the built-in is off by 2^-21 around 1.
fn log_f32(x: f32) -> f32 {
    let raw = bitcast<u32>(x) + 0x4afb0du;
    let e = f32(i32(raw >> 23u) - 127);
    let m = bitcast<f32>((raw & 0x7fffffu) + 0x3f3504f3u);
    return e * 0.693359375 + (twice_artanh((m - 1.0) / (m + 1.0)) - e * 2.12194440e-4);
}

// ln(1 + x) for x ≥ 0.
fn log_1p(x: f32) -> f32 {
    if x < 0.7 {
        return twice_artanh(x / (2.0 + x));
    }
    return log_f32(1.0 + x);
}

// e^x − 1 without cancellation.
fn exp_minus_one(x: f32) -> f32 {
    let small = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666667 + x * (0.008333334 + x * (0.0013888889 + x * 0.0001984127))))));
    return select(exp_f32(x) - 1.0, small, abs(x) < 0.5);
}

// ln(a/b) for normal a, b > 0, also where a/b is next to 1: a − b is exact there.
fn log_ratio(a: f32, b: f32) -> f32 {
    let raw = bitcast<u32>(a / b) + 0x4afb0du;
    let e = f32(i32(raw >> 23u) - 127);
    let m = bitcast<f32>((raw & 0x7fffffu) + 0x3f3504f3u);
    let s = select((m - 1.0) / (m + 1.0), (a - b) / (a + b), e == 0.0);
    return e * 0.693359375 + (twice_artanh(s) - e * 2.12194440e-4);
}

// Black-Scholes price of a call or a put from spot and strike, each already discounted, ln of their ratio, and volatility·√maturity.
fn option_price(spot: f32, strike: f32, log_moneyness: f32, sd: f32, call: bool) -> f32 {
    let side = select(-1.0, 1.0, call);
    if sd <= 1e-12 {
        return max(side * (spot - strike), 0.0);
    }
    let d = log_moneyness / sd;
    return max(side * (spot * normal_cdf_f32(side * (d + 0.5 * sd)) - strike * normal_cdf_f32(side * (d - 0.5 * sd))), 0.0);
}

// ---- activations (kernels/activation.rs) ------------------------------------------------------------------------------

fn sigmoid_f32(x: f32) -> f32 {
    return 1.0 / (1.0 + exp_f32(clamp(-x, -87.0, 87.0)));
}

// By its series where 1 - e^(-2x) would cancel.
fn tanh_f32(x: f32) -> f32 {
    let q = x * x;
    let t = exp_f32(-2.0 * min(abs(x), 20.0));
    let large = sign(x) * ((1.0 - t) / (1.0 + t));
    let small = x * (1.0 + q * (-0.33333334 + q * (0.13333334 + q * (-0.053968254 + q * (0.021869488 - q * 0.008863235)))));
    return select(large, small, q < 0.09);
}

// e^(x²)·erfc(x) for x ≥ 0, within 4e-7 relative: u·P(u), u = 1 / (1 + x/2), P fitted to the least largest relative error up to x = 10.
fn erfcx_f32(x: f32) -> f32 {
    let u = 1.0 / (1.0 + 0.5 * x);
    return u * (0.28208557 + u * (0.28239015 + u * (0.24299602 + u * (0.20311248 + u * (-0.02762996
        + u * (0.27952266 + u * (-0.48847017 + u * (0.2851875 + u * -0.05919433))))))));
}

fn erf_f32(x: f32) -> f32 {
    let q = x * x;
    let small = x * (1.1283792 + q * (-0.37612639 + q * (0.11283792 + q * (-0.026866170 + q * (0.0052239776 - q * 0.00085483270)))));
    let y = min(abs(x), 9.0);
    let large = sign(x) * (1.0 - exp_f32(-y * y) * erfcx_f32(y));
    return select(large, small, q < 0.25);
}

// (Φ(x), √(2π)·φ(x)): both need the same exponential.
fn normal_cdf_and_bell(x: f32) -> vec2<f32> {
    let y = min(abs(x), 13.0);
    let bell = exp_f32(-0.5 * y * y);
    let tail = 0.5 * bell * erfcx_f32(y * 0.70710678);
    return vec2<f32>(select(tail, 1.0 - tail, x > 0.0), bell);
}

fn normal_cdf_f32(x: f32) -> f32 {
    return normal_cdf_and_bell(x).x;
}

const RELU: u32 = 1u;
const GELU: u32 = 2u;
const TANH: u32 = 3u;
const SIGMOID: u32 = 4u;
const SILU: u32 = 5u;

fn activation(kind: u32, x: f32) -> f32 {
    switch kind {
        case RELU: { return select(x, 0.0, x < 0.0); }
        case GELU: { return x * normal_cdf_f32(x); }
        case TANH: { return tanh_f32(x); }
        case SIGMOID: { return sigmoid_f32(x); }
        case SILU: { return x * sigmoid_f32(x); }
        default: { return x; }
    }
}

// Derivative from y where that suffices (relu, tanh, sigmoid), from the pre-activation for gelu and silu.
fn activation_slope(kind: u32, saved: f32) -> f32 {
    switch kind {
        case RELU: { return select(0.0, 1.0, saved > 0.0); }
        case GELU: {
            let p = normal_cdf_and_bell(saved);
            return p.x + saved * p.y * 0.39894228;
        }
        case TANH: { return 1.0 - saved * saved; }
        case SIGMOID: { return saved * (1.0 - saved); }
        case SILU: {
            let s = sigmoid_f32(saved);
            return s * (1.0 + saved * (1.0 - s));
        }
        default: { return 1.0; }
    }
}
