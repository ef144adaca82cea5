// Prices of calls and puts under Heston's and Bates' models, and Merton's series. Maths, shapes and source: kernels/heston_price.rs.
//   heston_price   grid N               workgroup WG = 32      thread = node of a panel
//   merton_price   grid ceil(N / WG)    workgroup WG = 32      thread = option
//   reads terms [N,5], kind [N], model [M,8] or [M,4], model_of [N], nodes [2,32]      writes price [N]

struct HestonParams {
    uint32_t rows;
};

#define NODES 32
#define PANELS 512.0f
#define SMALL 1e-8f
#define TERMS_MOST 512u

// ---- complex numbers ------------------------------------------------------------------------------------------------

struct Complex {
    float x, y;
};

__device__ __forceinline__ Complex operator+(Complex a, Complex b) {
    return {a.x + b.x, a.y + b.y};
}

__device__ __forceinline__ Complex operator-(Complex a, Complex b) {
    return {a.x - b.x, a.y - b.y};
}

__device__ __forceinline__ Complex operator*(Complex a, Complex b) {
    return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x};
}

__device__ __forceinline__ Complex operator*(float a, Complex b) {
    return {a * b.x, a * b.y};
}

__device__ __forceinline__ float size2(Complex a) {
    return a.x * a.x + a.y * a.y;
}

__device__ __forceinline__ Complex operator/(Complex a, Complex b) {
    const float scale = 1.0f / size2(b);
    return {(a.x * b.x + a.y * b.y) * scale, (a.y * b.x - a.x * b.y) * scale};
}

// The root with a real part >= 0.
__device__ __forceinline__ Complex sqrt_c(Complex a) {
    const float m = sqrtf(0.5f * (sqrtf(size2(a)) + fabsf(a.x))), other = 0.5f * a.y / fmaxf(m, 1e-30f);
    return a.x >= 0.0f ? Complex{m, other} : Complex{fabsf(other), a.y < 0.0f ? -m : m};
}

__device__ __forceinline__ float2 cis(float x) {
    const float v = x * 0.15915494f;
    return turn(v - floorf(v));
}

__device__ __forceinline__ Complex exp_c(Complex a) {
    const float size = expf(fminf(a.x, 80.0f));
    const float2 wave = cis(a.y);
    return {size * wave.x, size * wave.y};
}

// -ln(1 - s y)/s for s >= 0: a series where that is y and little more.
__device__ __forceinline__ Complex log_over(Complex y, float s) {
    const Complex w = s * y;
    if (size2(w) < 0.0025f) {
        Complex p = {0.16666667f, 0.0f};
        p = Complex{0.2f, 0.0f} + p * w;
        p = Complex{0.25f, 0.0f} + p * w;
        p = Complex{0.33333333f, 0.0f} + p * w;
        p = Complex{0.5f, 0.0f} + p * w;
        return y * (Complex{1.0f, 0.0f} + p * w);
    }
    return (-1.0f / s) * Complex{0.5f * log1pf(fmaxf(size2(w) - 2.0f * w.x, -0.99999994f)), atan2f(-w.y, 1.0f - w.x)};
}

// ---- the models -----------------------------------------------------------------------------------------------------

// E e^((1/2 + iu) ln S_T/F) under a model: exp of what is returned.
__device__ __forceinline__ Complex exponent(float u, float t, const float (&model)[8]) {
    const float variance = model[0], kappa = model[1], theta = model[2], sigma = model[3], rho = model[4];
    const float p = u * u + 0.25f;
    const Complex one = {1.0f, 0.0f}, beta = {kappa - 0.5f * rho * sigma, -rho * sigma * u};
    const Complex d = sqrt_c(beta * beta + Complex{sigma * sigma * p, 0.0f}), sum = beta + d;
    const Complex psi = Complex{p, 0.0f} / sum, slope = psi / sum, e = exp_c(-t * d), g = (-sigma * sigma) * slope;
    const Complex y = slope * (one - e) / (one - g), level = 2.0f * log_over(y, sigma * sigma) - t * psi;
    Complex x = (kappa * theta) * level - variance * (psi * ((one - e) / (one - g * e)));
    if (model[5] > 0.0f) {
        const float mean = model[6], half = 0.5f * model[7] * model[7];
        const Complex jump = exp_c({0.5f * mean + half * (0.25f - u * u), u * (mean + half)});
        x = x + (model[5] * t) * (jump - one - expm1f(mean + half) * Complex{0.5f, u});
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(WG)
    heston_price(const float* __restrict__ terms, const uint32_t* __restrict__ kind, const float* __restrict__ model,
                 const uint32_t* __restrict__ model_of, const float* __restrict__ nodes, float* __restrict__ price, HestonParams params) {
    const uint32_t row = group_index(), tid = threadIdx.x;
    if (row >= params.rows) {
        return;
    }
    const float* term = terms + 5 * (uint64_t)row;
    float of[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        of[i] = model[8 * (uint64_t)model_of[row] + i];
    }
    const float s = term[0], k = term[1], t = term[2], r = term[3], q = term[4];
    const float moneyness = log_ratio(s, k) + (r - q) * t, decay = -expm1f(-of[1] * t) / of[1];
    const float w = of[2] * t + (of[0] - of[2]) * decay + of[5] * t * (of[6] * of[6] + of[7] * of[7]);
    const float narrow = 1.0f / sqrtf(fmaxf(w, 1e-24f));

    // Where the integrand has died away, by probes.
    const float probe = 0.5f * narrow * expf(0.30010459f * (float)tid);
    const float size = expf(fminf(exponent(probe, t, of).x, 0.0f)) * probe / (probe * probe + 0.25f);
    float end = 1.35f * (size > SMALL ? probe : 0.5f * narrow);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        end = fmaxf(end, __shfl_xor_sync(0xffffffffu, end, lanes));
    }
    const float reach = fabsf(moneyness) + (of[5] > 0.0f ? 3.0f * fabsf(of[6]) : 0.0f);
    const float panels = fminf(fmaxf(ceilf(end / fminf(6.0f * narrow, 36.0f / fmaxf(reach, 1e-9f))), 1.0f), PANELS);
    const float span = end / panels, node = nodes[tid];

    // What the model's integrand lacks to that of a normal law with the same variance.
    float total = 0.0f;
    for (uint32_t panel = 0; panel < (uint32_t)panels; panel++) {
        const float u = ((float)panel + 0.5f * (node + 1.0f)) * span, p = u * u + 0.25f;
        const Complex x = exponent(u, t, of);
        total += (expf(-0.5f * w * p) * cis(u * moneyness).x - exp_c({x.x, x.y + u * moneyness}).x) / p;
    }
    total *= nodes[NODES + tid] * 0.5f * span;
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, lanes);
    }
    if (tid > 0) {
        return;
    }
    const float forward = s * expf(-q * t), strike = k * expf(-r * t);
    const bool call = (kind[row] & 1) == 1;
    const float least = fmaxf((call ? 1.0f : -1.0f) * (forward - strike), 0.0f);
    const float found = option_price(forward, strike, moneyness, sqrtf(w), call) + sqrtf(forward) * sqrtf(strike) * 0.31830989f * total;
    price[row] = w <= 1e-24f ? least : fminf(fmaxf(found, least), call ? forward : strike);
}

extern "C" __global__ void __launch_bounds__(WG)
    merton_price(const float* __restrict__ terms, const uint32_t* __restrict__ kind, const float* __restrict__ model,
                 const uint32_t* __restrict__ model_of, float* __restrict__ price, HestonParams params) {
    const uint64_t row = (uint64_t)group_index() * WG + threadIdx.x;
    if (row >= params.rows) {
        return;
    }
    const float *term = terms + 5 * row, *of = model + 4 * (uint64_t)model_of[row];
    const float t = term[2], forward = term[0] * expf(-term[4] * t), strike = term[1] * expf(-term[3] * t);
    const float moneyness = log_ratio(term[0], term[1]) + (term[3] - term[4]) * t;
    const float variance = of[0] * of[0] * t, jumps = of[1] * t, jump_variance = of[3] * of[3];
    const float jump = of[2] + 0.5f * jump_variance, drift = -jumps * expm1f(jump);
    const bool call = (kind[row] & 1) == 1;
    const float many = jumps * fmaxf(1.0f, expf(jump));
    const uint32_t terms_of_series = (uint32_t)(many + 8.0f * sqrtf(many)) + 16u;
    const uint32_t count = terms_of_series < TERMS_MOST ? terms_of_series : TERMS_MOST;
    float chance = expf(-jumps), sum = 0.0f;
    for (uint32_t n = 0; n < count; n++) {
        const float shift = drift + (float)n * jump;
        sum += chance * option_price(forward * expf(shift), strike, moneyness + shift, sqrtf(variance + (float)n * jump_variance), call);
        chance = chance * jumps / (float)(n + 1);
    }
    price[row] = sum;
}
