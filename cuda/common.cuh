// Helpers that every CUDA unit may use; placed before the kernel's own text, after `#define WG` and the tile constants.
// No includes: NVRTC has no headers. The same text compiles under NVRTC 12 and 13 and, for cuda-host, under a C++17 compiler.

#ifdef __CUDACC_RTC__
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif

// Linear index of this workgroup in a grid folded into three dimensions. It may pass the last group: kernels guard their tail.
__device__ __forceinline__ uint32_t group_index() {
    return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

// Whether two types are the same; pins the fields of params structs to those of Rust.
template <class A, class B>
struct SameType {
    enum { value = 0 };
};
template <class A>
struct SameType<A, A> {
    enum { value = 1 };
};

// Undefined statistics; the host turns them into NaN.
#define UNDEFINED (-1e30f)

// ---- sums over the block --------------------------------------------------------------------------------------------

// Sum of each of the N values over the block, in every thread: warps by butterflies, then the warps in order. All threads call it.
template <int N>
__device__ __forceinline__ void block_sum(float (&x)[N]) {
    static_assert(WG % 32 == 0, "whole warps");
    __shared__ float sh_warp_sum[N][WG / 32];
#pragma unroll
    for (int i = 0; i < N; i++) {
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            x[i] += __shfl_xor_sync(0xffffffffu, x[i], lanes);
        }
    }
    if (threadIdx.x % 32 == 0) {
        for (int i = 0; i < N; i++) {
            sh_warp_sum[i][threadIdx.x / 32] = x[i];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = 0.0f;
        for (int warp = 0; warp < WG / 32; warp++) {
            x[i] += sh_warp_sum[i][warp];
        }
    }
    __syncthreads();  // the next call overwrites sh_warp_sum
}

// ---- 128 bits -------------------------------------------------------------------------------------------------------

struct uint128 {
    uint64_t lo, hi;
};

__device__ __forceinline__ uint128 make128(uint64_t lo) {
    return {lo, 0};
}

__device__ __forceinline__ uint128 add128(uint128 a, uint128 b) {
    const uint64_t lo = a.lo + b.lo;
    return {lo, a.hi + b.hi + (lo < a.lo ? 1 : 0)};
}

__device__ __forceinline__ uint128 sub128(uint128 a, uint128 b) {
    return {a.lo - b.lo, a.hi - b.hi - (a.lo < b.lo ? 1 : 0)};
}

__device__ __forceinline__ bool less128(uint128 a, uint128 b) {
    return a.hi < b.hi || (a.hi == b.hi && a.lo < b.lo);
}

__device__ __forceinline__ bool is_zero128(uint128 a) {
    return (a.lo | a.hi) == 0;
}

__device__ __forceinline__ int leading_zeros64(uint64_t a) {
    return __clzll((long long)a);
}

__device__ __forceinline__ int leading_zeros128(uint128 a) {
    return a.hi != 0 ? leading_zeros64(a.hi) : 64 + leading_zeros64(a.lo);
}

// a · 2^s for s < 128.
__device__ __forceinline__ uint128 shl128(uint128 a, uint32_t s) {
    if (s >= 64) {
        return {0, a.lo << (s - 64)};
    }
    if (s == 0) {
        return a;
    }
    return {a.lo << s, (a.hi << s) | (a.lo >> (64 - s))};
}

// a / 2^s for s < 128.
__device__ __forceinline__ uint128 shr128(uint128 a, uint32_t s) {
    if (s >= 64) {
        return {a.hi >> (s - 64), 0};
    }
    if (s == 0) {
        return a;
    }
    return {(a.lo >> s) | (a.hi << (64 - s)), a.hi >> s};
}

// 64 × 64 → 128 bits.
__device__ __forceinline__ uint128 mul64(uint64_t a, uint64_t b) {
    return {a * b, __umul64hi(a, b)};
}

// a · b modulo 2^128.
__device__ __forceinline__ uint128 mul128_64(uint128 a, uint64_t b) {
    return {a.lo * b, __umul64hi(a.lo, b) + a.hi * b};
}

// a · a modulo 2^128.
__device__ __forceinline__ uint128 square128(uint128 a) {
    return {a.lo * a.lo, __umul64hi(a.lo, a.lo) + ((a.lo * a.hi) << 1)};
}

// a / n for n < 2^20, the quotient below 2^64.
__device__ __forceinline__ uint64_t div128_20(uint128 a, uint32_t n) {
    const uint64_t high = (a.hi << 44) | (a.lo >> 20);
    const uint64_t rest = high % n;
    return ((high / n) << 20) + ((rest << 20) | (a.lo & 0xfffffu)) / n;
}

// Element `at` of an array of 128-bit numbers that starts at a multiple of 16 bytes.
__device__ __forceinline__ uint128 get128(const uint32_t* __restrict__ words, uint32_t at) {
    const uint4 x = reinterpret_cast<const uint4*>(words)[at];
    return {x.x | ((uint64_t)x.y << 32), x.z | ((uint64_t)x.w << 32)};
}

__device__ __forceinline__ void put128(uint32_t* __restrict__ words, uint32_t at, uint128 x) {
    reinterpret_cast<uint4*>(words)[at] = make_uint4((uint32_t)x.lo, (uint32_t)(x.lo >> 32), (uint32_t)x.hi, (uint32_t)(x.hi >> 32));
}

__device__ __forceinline__ uint64_t get64(const uint32_t* __restrict__ words, uint32_t at) {
    return words[2 * at] | ((uint64_t)words[2 * at + 1] << 32);
}

// ---- fixed point and keys (kernels/fixed.rs) --------------------------------------------------------------------------

#define KEY_ZERO 0x80000000u
#define RATIO_MIN (-40)

__device__ __forceinline__ uint64_t fixed_price(float price, uint32_t max_exponent, uint32_t bits) {
    const uint32_t raw = __float_as_uint(price);
    const uint32_t x = (raw >> 23) & 0xffu;
    const uint64_t mantissa = (raw & 0x7fffffu) | (x > 0 ? 0x800000u : 0u);
    const uint32_t lowest = max(x, 1u);
    const uint32_t down = max_exponent > lowest ? max_exponent - lowest : 0;
    const uint32_t up = bits - 24;
    return up >= down ? mantissa << (up - down) : mantissa >> min(down - up, 63u);
}

// state + alpha·(x − state) / 2^63, the step rounded towards zero.
__device__ __forceinline__ uint64_t blend(uint64_t state, uint64_t x, uint64_t alpha) {
    const bool falls = x < state;
    const uint64_t distance = falls ? state - x : x - state;
    const uint64_t move_by = (__umul64hi(distance, alpha) << 1) | ((distance * alpha) >> 63);
    return falls ? state - move_by : state + move_by;
}

__device__ __forceinline__ uint32_t key_from(uint64_t leading, int exponent, bool negative) {
    const uint32_t mantissa = (uint32_t)((leading << leading_zeros64(leading)) >> 38) & 0x1ffffffu;
    const uint32_t magnitude = exponent < 0 ? 1u : (((uint32_t)min(exponent, 62) << 25) | mantissa) + 1u;
    return negative ? KEY_ZERO - magnitude : KEY_ZERO + magnitude;
}

__device__ __forceinline__ uint32_t difference_key(uint64_t magnitude, bool negative) {
    return magnitude == 0 ? KEY_ZERO : key_from(magnitude, 63 - leading_zeros64(magnitude), negative);
}

__device__ __forceinline__ uint32_t mean_key(uint128 sum, uint32_t n, uint64_t x) {
    const uint128 level = mul64(x, n);
    const bool negative = less128(sum, level);
    const uint128 magnitude = negative ? sub128(level, sum) : sub128(sum, level);
    if (is_zero128(magnitude)) {
        return KEY_ZERO;
    }
    const int lead = leading_zeros128(magnitude);
    const uint64_t top = shl128(magnitude, lead).hi;
    // Long division of the leading 56 bits: 32 + 12 + 12.
    const uint32_t high = (uint32_t)(top >> 32), low = (uint32_t)top;
    const uint32_t q0 = high / n;
    const uint32_t x1 = ((high - q0 * n) << 12) | (low >> 20);
    const uint32_t q1 = x1 / n;
    const uint32_t x2 = ((x1 - q1 * n) << 12) | ((low >> 8) & 0xfffu);
    const uint64_t quotient = ((uint64_t)q0 << 24) + ((q1 << 12) + x2 / n);
    return key_from(quotient, 63 - leading_zeros64(quotient) + 8 + (127 - lead) - 63, negative);
}

__device__ __forceinline__ uint32_t ratio_key(uint128 num, uint128 den, bool negative) {
    if (is_zero128(num) || is_zero128(den)) {
        return KEY_ZERO;
    }
    const int lead_num = leading_zeros128(num), lead_den = leading_zeros128(den);
    const uint64_t quotient = (shl128(num, lead_num).hi >> 1) / (shl128(den, lead_den).hi >> 32);
    const int exponent = (63 - leading_zeros64(quotient)) - lead_num + lead_den - 31;
    return key_from(quotient, min(exponent - RATIO_MIN, 62), negative);
}

__device__ __forceinline__ uint32_t rsi_key(uint64_t gain, uint64_t loss) {
    const uint64_t sum = gain + loss;
    if (sum == 0) {
        return 1u << 30;
    }
    const int lead = leading_zeros64(sum);
    const uint64_t quotient = ((gain << lead) >> 1) / ((sum << lead) >> 32);
    return quotient < (1u << 31) ? (uint32_t)quotient : 1u << 31;
}

// Signed fixed point of x with `shift` fractional bits, truncated towards zero.
__device__ __forceinline__ int64_t to_fixed(float x, int shift) {
    const uint32_t raw = __float_as_uint(x);
    const int biased = (int)((raw >> 23) & 0xffu);
    const int64_t mantissa = (raw & 0x7fffffu) | (biased > 0 ? 0x800000u : 0u);
    const int s = max(biased, 1) - 150 + shift;
    const int64_t magnitude = s < 0 ? mantissa >> min(-s, 63) : mantissa << min(s, 39);
    return raw >> 31 ? -magnitude : magnitude;
}

__device__ __forceinline__ uint64_t magnitude64(int64_t a) {
    return a < 0 ? 0 - (uint64_t)a : (uint64_t)a;
}

__device__ __forceinline__ uint128 scaled_variance(uint64_t n, int64_t sum, uint64_t squares, uint32_t shift) {
    const uint128 total = shl128(mul64(n, squares), shift);
    const uint64_t size = magnitude64(sum);
    const uint128 square = mul64(size, size);
    if (less128(total, square)) {
        return {0, 0};
    }
    const uint128 variance = sub128(total, square);
    return less128(shr128(total, 20), variance) ? variance : make128(0);
}

// ---- random numbers (kernels/philox.rs) ------------------------------------------------------------------------------

__device__ __forceinline__ void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        const uint32_t a_hi = __umulhi(0xD2511F53u, c[0]), a_lo = 0xD2511F53u * c[0];
        const uint32_t b_hi = __umulhi(0xCD9E8D57u, c[2]), b_lo = 0xCD9E8D57u * c[2];
        c[0] = b_hi ^ c[1] ^ k0;
        c[1] = b_lo;
        c[2] = a_hi ^ c[3] ^ k1;
        c[3] = a_lo;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// 2·atanh(s) for |s| ≤ 1/3.
__device__ __forceinline__ float two_atanh(float s) {
    const float q = s * s;
    const float tail =
        q * (0.33333334f + q * (0.2f + q * (0.14285715f + q * (0.11111111f + q * (0.09090909f + q * (0.07692308f + q * 0.06666667f))))));
    return 2.0f * (s + s * tail);
}

// -ln of the uniform (k + ½)·2⁻²⁴; through 1 - u, which is exact, where u ≥ ½.
__device__ __forceinline__ float neg_log_uniform(uint32_t k) {
    if (k >= 0x800000u) {
        const float t = ((float)(0xffffffu - k) + 0.5f) * 5.9604645e-8f;
        return two_atanh(t / (2.0f - t));
    }
    const uint32_t v = __float_as_uint((float)k + 0.5f);
    int e = (int)(v >> 23) - 127;
    float m = __uint_as_float((v & 0x7fffffu) | 0x3f800000u);
    if (m > 1.4142135f) {
        m *= 0.5f;
        e += 1;
    }
    return (float)(24 - e) * 0.6931472f - two_atanh((m - 1.0f) / (m + 1.0f));
}

// (cos, sin) of 2πv by quarter turns and series.
__device__ __forceinline__ float2 turn(float v) {
    const float quarter = floorf(4.0f * v + 0.5f);
    const float x = (v - 0.25f * quarter) * 6.2831855f;
    const float q = x * x;
    const float s = x * (1.0f + q * (-0.16666667f + q * (0.008333334f + q * (-0.0001984127f + q * 2.7557319e-6f))));
    const float c = 1.0f + q * (-0.5f + q * (0.041666668f + q * (-0.0013888889f + q * (2.4801587e-5f + q * -2.755732e-7f))));
    switch ((uint32_t)quarter & 3u) {
        case 0: return make_float2(c, s);
        case 1: return make_float2(-s, c);
        case 2: return make_float2(-c, -s);
        default: return make_float2(s, -c);
    }
}

__device__ __forceinline__ float uniform_of(uint32_t word) {
    return ((float)(word >> 8) + 0.5f) * 5.9604645e-8f;
}

// ---- reals ----------------------------------------------------------------------------------------------------------

// Per-bar Sharpe ratio of n bars from their fixed-point sum and scaled variance (kernels/fixed.rs): sum·√((n-1) / (n·variance)).
__device__ __forceinline__ float sharpe_of(uint64_t n, int64_t sum, uint128 variance) {
    if (n < 2 || is_zero128(variance)) {
        return UNDEFINED;
    }
    const uint64_t size = magnitude64(sum);
    if (size == 0) {
        return 0.0f;
    }
    const int lead = leading_zeros64(size), lead_variance = leading_zeros128(variance);
    const int odd = lead_variance & 1;
    const float v = (float)(uint32_t)(shl128(variance, lead_variance).hi >> 32) * (odd ? 2.0f : 1.0f);
    const float mantissa = (float)(uint32_t)((size << lead) >> 32) / sqrtf(v);
    // size = m·2^(32 - lead), variance = v·2^(96 - lead_variance)
    const int exponent = 32 - lead - (96 - lead_variance - odd) / 2;
    const float ratio = ldexpf(mantissa * sqrtf((float)(n - 1) / (float)n), exponent);
    return sum < 0 ? -ratio : ratio;
}

// ---- activations (kernels/activation.rs) ----------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid_f32(float x) {
    return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float tanh_f32(float x) {
    return tanhf(x);
}

// e^(x²)·erfc(x) for x ≥ 0, within 4e-7 relative: u·P(u), u = 1 / (1 + x/2), P fitted to the least largest relative error up to x = 10.
__device__ __forceinline__ float erfcx_f32(float x) {
    const float u = 1.0f / (1.0f + 0.5f * x);
    return u * (0.28208557f + u * (0.28239015f + u * (0.24299602f + u * (0.20311248f + u * (-0.02762996f +
           u * (0.27952266f + u * (-0.48847017f + u * (0.2851875f + u * -0.05919433f))))))));
}

__device__ __forceinline__ float erf_f32(float x) {
    const float q = x * x, y = fminf(fabsf(x), 9.0f);
    if (q < 0.25f) {
        return x * (1.1283792f + q * (-0.37612639f + q * (0.11283792f + q * (-0.026866170f + q * (0.0052239776f - q * 0.00085483270f)))));
    }
    return copysignf(1.0f - expf(-y * y) * erfcx_f32(y), x);
}

// (Φ(x), √(2π)·φ(x)): both need the same exponential.
__device__ __forceinline__ float2 normal_cdf_and_bell(float x) {
    const float y = fminf(fabsf(x), 13.0f);
    const float bell = expf(-0.5f * y * y);
    const float tail = 0.5f * bell * erfcx_f32(y * 0.70710678f);
    return make_float2(x > 0.0f ? 1.0f - tail : tail, bell);
}

__device__ __forceinline__ float normal_cdf_f32(float x) {
    return normal_cdf_and_bell(x).x;
}

// ln(a/b) for a, b > 0, also where a/b is next to 1: a - b is exact there.
__device__ __forceinline__ float log_ratio(float a, float b) {
    const float x = (a - b) / b;
    return fabsf(x) < 0.5f ? log1pf(x) : logf(a / b);
}

// Black-Scholes price of a call or a put from spot and strike, each already discounted, ln of their ratio, and volatility·√maturity.
__device__ __forceinline__ float option_price(float spot, float strike, float log_moneyness, float sd, bool call) {
    const float side = call ? 1.0f : -1.0f;
    if (sd <= 1e-12f) {
        return fmaxf(side * (spot - strike), 0.0f);
    }
    const float d = log_moneyness / sd;
    return fmaxf(side * (spot * normal_cdf_f32(side * (d + 0.5f * sd)) - strike * normal_cdf_f32(side * (d - 0.5f * sd))), 0.0f);
}

#define RELU 1u
#define GELU 2u
#define TANH 3u
#define SIGMOID 4u
#define SILU 5u

__device__ __forceinline__ float activation(uint32_t kind, float x) {
    switch (kind) {
        case RELU: return x < 0.0f ? 0.0f : x;
        case GELU: return x * normal_cdf_f32(x);
        case TANH: return tanh_f32(x);
        case SIGMOID: return sigmoid_f32(x);
        case SILU: return x * sigmoid_f32(x);
        default: return x;
    }
}

// Derivative from y where that suffices (relu, tanh, sigmoid), from the pre-activation for gelu and silu.
__device__ __forceinline__ float activation_slope(uint32_t kind, float saved) {
    switch (kind) {
        case RELU: return saved > 0.0f ? 1.0f : 0.0f;
        case GELU: {
            const float2 p = normal_cdf_and_bell(saved);
            return p.x + saved * p.y * 0.39894228f;
        }
        case TANH: return 1.0f - saved * saved;
        case SIGMOID: return saved * (1.0f - saved);
        case SILU: {
            const float s = sigmoid_f32(saved);
            return s * (1.0f + saved * (1.0f - s));
        }
        default: return 1.0f;
    }
}

// Four neighbours at a multiple of four.
__device__ __forceinline__ float4 quad_at(const float* __restrict__ x) {
    return *reinterpret_cast<const float4*>(x);
}

__device__ __forceinline__ void put_quad(float* __restrict__ x, float4 y) {
    *reinterpret_cast<float4*>(x) = y;
}

// ---- tiles of a product: left [rows, depth] × right [depth, columns], for units that name their tile ----------------------

#ifdef ROW_QUADS
#define STEP 16u

// A tile of ROW_QUADS·4 × COL_QUADS·4 results; a thread has THREAD_QUADS·4 rows of 4. The next step of depth is on its way from global
// memory while this one is multiplied; two buffers in shared memory, so one barrier a step. A quad more per k keeps quads of neighbouring k in
// different banks.
struct Tile {
    float at[4 * THREAD_QUADS][4];
};

__device__ __forceinline__ uint32_t thread_row() {
    return threadIdx.x / COL_QUADS * THREAD_QUADS * 4;
}

__device__ __forceinline__ uint32_t thread_col() {
    return threadIdx.x % COL_QUADS * 4;
}

// Four neighbours from `x + at`, of which `count` are there.
__device__ __forceinline__ float4 load_quad(const float* __restrict__ x, uint64_t at, uint32_t count) {
    if (count >= 4 && ((uint64_t)(x + at) & 15) == 0) {
        return *(const float4*)(x + at);
    }
    return make_float4(count > 0 ? x[at] : 0.0f, count > 1 ? x[at + 1] : 0.0f, count > 2 ? x[at + 2] : 0.0f, count > 3 ? x[at + 3] : 0.0f);
}

#ifndef STORED_16  // half.cuh has its own
struct TileMemory {
    float4 left[2][STEP][ROW_QUADS + 1];
    float4 right[2][STEP][COL_QUADS + 1];
};

typedef float4 LeftStep[STEP][ROW_QUADS + 1];

// The quads of a step that a thread loads: neighbouring threads take neighbouring k where those are neighbours in memory (ALONG_DEPTH),
// else neighbouring quads.
template <uint32_t QUADS, bool ALONG_DEPTH, class Load>
__device__ __forceinline__ void load_step(float4 (&next)[(STEP * QUADS + WG - 1) / WG], uint32_t depth, Load load) {
#pragma unroll
    for (uint32_t i = 0; i < (STEP * QUADS + WG - 1) / WG; i++) {
        const uint32_t s = threadIdx.x + i * WG;
        if (s < STEP * QUADS) {
            next[i] = ALONG_DEPTH ? load(depth + s % STEP, s / STEP * 4) : load(depth + s / QUADS, s % QUADS * 4);
        }
    }
}

template <uint32_t QUADS, bool ALONG_DEPTH>
__device__ __forceinline__ void store_step(const float4 (&next)[(STEP * QUADS + WG - 1) / WG], float4 (&to)[STEP][QUADS + 1]) {
#pragma unroll
    for (uint32_t i = 0; i < (STEP * QUADS + WG - 1) / WG; i++) {
        const uint32_t s = threadIdx.x + i * WG;
        if (s < STEP * QUADS) {
            if (ALONG_DEPTH) {
                to[s % STEP][s / STEP] = next[i];
            } else {
                to[s / QUADS][s % QUADS] = next[i];
            }
        }
    }
}

__device__ __forceinline__ void add_products(float (&row)[4], float a, float4 b) {
    row[0] = fmaf(a, b.x, row[0]);
    row[1] = fmaf(a, b.y, row[1]);
    row[2] = fmaf(a, b.z, row[2]);
    row[3] = fmaf(a, b.w, row[3]);
}

// Adds Σ left·right over depths first .. last. left(k, r) and right(k, c) give four rows or columns of the tile, zero outside;
// each(buffer) sees every step of left as it lies in shared memory. All threads call it, with the same depths.
template <bool LEFT_ALONG, bool RIGHT_ALONG, class Left, class Right, class Each>
__device__ __forceinline__ void tile_product(Tile& tile, TileMemory& sh, uint32_t first, uint32_t last, Left left, Right right, Each each) {
    float4 next_left[(STEP * ROW_QUADS + WG - 1) / WG], next_right[(STEP * COL_QUADS + WG - 1) / WG];
    load_step<ROW_QUADS, LEFT_ALONG>(next_left, first, left);
    load_step<COL_QUADS, RIGHT_ALONG>(next_right, first, right);
    const uint32_t row = threadIdx.x / COL_QUADS * THREAD_QUADS, col = threadIdx.x % COL_QUADS;
    uint32_t buffer = 0;
    __syncthreads();  // an earlier product may still read the first buffer
    for (uint32_t d = first; d < last; d += STEP) {
        store_step<ROW_QUADS, LEFT_ALONG>(next_left, sh.left[buffer]);
        store_step<COL_QUADS, RIGHT_ALONG>(next_right, sh.right[buffer]);
        __syncthreads();
        if (d + STEP < last) {
            load_step<ROW_QUADS, LEFT_ALONG>(next_left, d + STEP, left);
            load_step<COL_QUADS, RIGHT_ALONG>(next_right, d + STEP, right);
        }
#pragma unroll
        for (uint32_t k = 0; k < STEP; k++) {
            const float4 b = sh.right[buffer][k][col];
#pragma unroll
            for (uint32_t q = 0; q < THREAD_QUADS; q++) {
                const float4 a = sh.left[buffer][k][row + q];
                add_products(tile.at[4 * q], a.x, b);
                add_products(tile.at[4 * q + 1], a.y, b);
                add_products(tile.at[4 * q + 2], a.z, b);
                add_products(tile.at[4 * q + 3], a.w, b);
            }
        }
        each(sh.left[buffer]);
        buffer ^= 1;
    }
}

struct NothingEach {
    __device__ __forceinline__ void operator()(const float4 (&)[STEP][ROW_QUADS + 1]) const {}
};

__device__ __forceinline__ float4 step_quad(const LeftStep& step, uint32_t k, uint32_t quad) {
    return step[k][quad];
}

// tile_product, by the name that units have it under whatever their storage; whether left is exact matters where that is 16 bits.
template <bool LEFT_ALONG, bool RIGHT_ALONG, class Left, class Right, class Each>
__device__ __forceinline__ void stored_product(Tile& tile, TileMemory& sh, uint32_t first, uint32_t last, bool, Left left, Right right, Each each) {
    tile_product<LEFT_ALONG, RIGHT_ALONG>(tile, sh, first, last, left, right, each);
}
#endif
#endif
