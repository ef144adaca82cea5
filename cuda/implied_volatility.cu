// Implied volatility of calls and puts. Maths, shapes and source: kernels/implied_volatility.rs.
//   grid  ceil(N / WG)      workgroup WG      thread = quote
//   reads quotes [N,6], kind [N]      writes volatility, status [N]

struct ImpliedVolatilityParams {
    uint32_t rows;
};

#define OK 0u
#define BELOW_INTRINSIC 1u
#define ABOVE_BOUND 2u
#define EXPIRED 3u
#define NOT_FINITE 4u
#define AT_INTRINSIC 5u

#define ROUNDS 8
#define DENSITY 0.39894228f
#define ROOT_HALF 0.70710678f
#define EPSILON 1.1920929e-7f
#define SMALLEST 1.17549435e-38f

__device__ __forceinline__ bool is_finite(float x) {
    return fabsf(x) <= 3.4028234e38f;
}

// (Y(t - h) - Y(-t - h)) / sqrt(2 pi) with Y = cdf/density: the time value over its bell. By a series in t where the difference cancels; else h >= t.
__device__ __forceinline__ float time_value(float h, float t) {
    if (t < 0.25f) {
        const float y = 1.2533141f * erfcx_f32(h * ROOT_HALF);
        const float y1 = 1.0f - h * y, y2 = y - h * y1, y3 = 2.0f * y1 - h * y2, y4 = 3.0f * y2 - h * y3, y5 = 4.0f * y3 - h * y4, q = t * t;
        return 2.0f * DENSITY * t * (y1 + q * (0.16666667f * y3 + q * 0.008333334f * y5));
    }
    return 0.5f * (erfcx_f32((h - t) * ROOT_HALF) - erfcx_f32((h + t) * ROOT_HALF));
}

// What is missing to the upper bound, over the bell; h <= t.
__device__ __forceinline__ float room(float h, float t) {
    return 0.5f * (erfcx_f32((t - h) * ROOT_HALF) + erfcx_f32((t + h) * ROOT_HALF));
}

// Volatility times the root of time of an out-of-the-money option: x = |ln F/X|, its price and the room above it over sqrt(F X).
__device__ __forceinline__ float total_volatility(float x, float beta, float missing, float log_beta) {
    const float centre = sqrtf(2.0f * x), bound = expf(-0.5f * x);
    const float at_centre = 0.5f * bound * (1.0f - erfcx_f32(centre * ROOT_HALF));
    float s = fmaxf(centre, 1e-5f);
    if (beta < at_centre) {
        // ln price is all but linear in 1/s^2.
        for (int round = 0; round < ROUNDS; round++) {
            const float h = x / s, t = 0.5f * s;
            const float d = fmaxf(time_value(h, t), SMALLEST);
            const float g = logf(d) - 0.5f * (h * h + t * t) - log_beta;
            s = 1.0f / sqrtf(fmaxf(1.0f / (s * s) + g * d / (0.5f * DENSITY * s * s * s), 1e-12f));
        }
        return s;
    }
    if (beta <= missing) {
        // The price is all but linear in s.
        for (int round = 0; round < ROUNDS; round++) {
            const float h = x / s, t = 0.5f * s;
            const float e = expf(-0.5f * (h * h + t * t));
            const float price = t < 0.25f ? e * time_value(h, t) : bound - e * room(h, t);
            s = fminf(fmaxf(s - (price - beta) / (e * DENSITY), 1e-9f), 100.0f);
        }
        return s;
    }
    // ln of the room is all but linear in s^2.
    s = fmaxf(centre, 1.0f);
    const float target = logf(missing);
    for (int round = 0; round < ROUNDS; round++) {
        const float h = x / s, t = 0.5f * s;
        const float q = room(h, t);
        const float g = logf(q) - 0.5f * (h * h + t * t) - target;
        s = sqrtf(fmaxf(s * s + g * q * s / (0.5f * DENSITY), 1e-12f));
    }
    return s;
}

// Status of a quote, and its volatility where that is OK.
__device__ __forceinline__ uint32_t solve(const float* quote, bool call, float& volatility) {
    const float s = quote[0], k = quote[1], t = quote[2], price = quote[3], r = quote[4], q = quote[5];
    const bool finite = is_finite(s) && is_finite(k) && is_finite(t) && is_finite(price) && is_finite(r) && is_finite(q);
    volatility = 0.0f;
    if (!finite || s < SMALLEST || k < SMALLEST) {
        return NOT_FINITE;
    }
    if (t <= 0.0f) {
        return EXPIRED;
    }
    const float growth = expm1f(-q * t), discount = expm1f(-r * t), forward = s + s * growth, strike = k + k * discount;
    const float over = (call ? 1.0f : -1.0f) * ((s - k) + (s * growth - k * discount));
    const float value = price - fmaxf(over, 0.0f), missing = (call ? forward : strike) - price, slack = EPSILON * fmaxf(s, k);
    if (price < 0.0f || value < -slack) {
        return BELOW_INTRINSIC;
    }
    if (missing < EPSILON * price) {
        return ABOVE_BOUND;
    }
    if (value < SMALLEST || (over > 0.0f && value <= slack)) {
        return AT_INTRINSIC;
    }
    const float scale = sqrtf(forward) * sqrtf(strike), x = fabsf(log_ratio(s, k) + (r - q) * t);
    volatility = total_volatility(x, value / scale, missing / scale, logf(value) - logf(scale)) / sqrtf(t);
    return OK;
}

extern "C" __global__ void __launch_bounds__(WG)
    implied_volatility(const float* __restrict__ quotes, const uint32_t* __restrict__ kind, float* __restrict__ volatility,
                       uint32_t* __restrict__ status, ImpliedVolatilityParams params) {
    const uint64_t row = (uint64_t)group_index() * WG + threadIdx.x;
    if (row < params.rows) {
        float found;
        status[row] = solve(quotes + 6 * row, (kind[row] & 1) == 1, found);
        volatility[row] = found;
    }
}
