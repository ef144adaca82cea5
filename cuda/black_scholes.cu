// Black-Scholes price and greeks of calls, puts and digitals. Maths, shapes and source: kernels/black_scholes.rs.
//   grid  ceil(N / WG)      workgroup WG      thread = option
//   reads terms [N,6], kind [N]      writes price, delta, gamma, vega, theta, rho [N]; backward: grad_terms [N,6]

struct BlackScholesParams {
    uint32_t rows;
};

#define TINY 1e-12f
#define DENSITY 0.39894228f

// Price, its derivatives by each of the terms, and the second by spot.
struct Sensitivities {
    float price, spot, strike, maturity, volatility, rate, dividend, gamma;
};

// The limits where no time is left or there is no volatility.
__device__ __forceinline__ Sensitivities limits(float forward, float strike, float t, float r, float q, uint32_t kind, float growth, float discount) {
    const float side = (kind & 1) ? 1.0f : -1.0f;
    const float n = forward == strike ? 0.5f : (side * (forward - strike) > 0.0f ? 1.0f : 0.0f);
    if (kind > 1) {
        const float price = discount * n;
        return {price, 0.0f, 0.0f, -r * price, 0.0f, -t * price, 0.0f, 0.0f};
    }
    const float vega = forward == strike ? forward * sqrtf(t) * DENSITY : 0.0f;
    const float by_time = side * n * (r * strike - q * forward);
    return {fmaxf(side * (forward - strike), 0.0f), side * growth * n, -side * discount * n, by_time, vega,
            side * t * strike * n, -side * t * forward * n, 0.0f};
}

__device__ __forceinline__ Sensitivities sensitivities(const float* terms, uint32_t kind) {
    const float s = terms[0], k = terms[1], t = terms[2], sigma = terms[3], r = terms[4], q = terms[5];
    const float growth = expf(-q * t), discount = expf(-r * t);
    const float forward = s * growth, strike = k * discount, root = sqrtf(t), sd = sigma * root;
    if (sd <= TINY) {
        return limits(forward, strike, t, r, q, kind, growth, discount);
    }
    const float side = (kind & 1) ? 1.0f : -1.0f;
    const float d = (log_ratio(s, k) + (r - q) * t) / sd, d1 = d + 0.5f * sd, d2 = d - 0.5f * sd;
    const float2 p2 = normal_cdf_and_bell(side * d2);
    if (kind > 1) {
        const float price = discount * p2.x, a = side * discount * p2.y * DENSITY, slope = a / sd;
        const float by_time = a * ((r - q - 0.5f * sigma * sigma) / sd - d2 / (2.0f * t)) - r * price;
        return {price, slope / s, -slope / k, by_time, -a * d1 / sigma, slope * t - t * price, -slope * t, -slope * d1 / (s * s * sd)};
    }
    const float2 p1 = normal_cdf_and_bell(side * d1);
    const float n1 = p1.y * DENSITY;
    const float price = fmaxf(side * (forward * p1.x - strike * p2.x), 0.0f);
    const float by_time = 0.5f * forward * n1 * sigma / root + side * (r * strike * p2.x - q * forward * p1.x);
    return {price, side * growth * p1.x, -side * discount * p2.x, by_time, forward * n1 * root,
            side * t * strike * p2.x, -side * t * forward * p1.x, growth * n1 / (s * sd)};
}

extern "C" __global__ void __launch_bounds__(WG)
    black_scholes(const float* __restrict__ terms, const uint32_t* __restrict__ kind, float* __restrict__ price, float* __restrict__ delta,
                  float* __restrict__ gamma, float* __restrict__ vega, float* __restrict__ theta, float* __restrict__ rho, BlackScholesParams params) {
    const uint64_t row = (uint64_t)group_index() * WG + threadIdx.x;
    if (row >= params.rows) {
        return;
    }
    const Sensitivities x = sensitivities(terms + 6 * row, kind[row]);
    price[row] = x.price;
    delta[row] = x.spot;
    gamma[row] = x.gamma;
    vega[row] = x.volatility;
    theta[row] = -x.maturity;
    rho[row] = x.rate;
}

extern "C" __global__ void __launch_bounds__(WG)
    black_scholes_price(const float* __restrict__ terms, const uint32_t* __restrict__ kind, float* __restrict__ price, BlackScholesParams params) {
    const uint64_t row = (uint64_t)group_index() * WG + threadIdx.x;
    if (row < params.rows) {
        price[row] = sensitivities(terms + 6 * row, kind[row]).price;
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    black_scholes_backward(const float* __restrict__ terms, const uint32_t* __restrict__ kind, const float* __restrict__ grad_price,
                           float* __restrict__ grad_terms, BlackScholesParams params) {
    const uint64_t row = (uint64_t)group_index() * WG + threadIdx.x;
    if (row >= params.rows) {
        return;
    }
    const Sensitivities x = sensitivities(terms + 6 * row, kind[row]);
    const float grad = grad_price[row];
    float* to = grad_terms + 6 * row;
    to[0] = grad * x.spot;
    to[1] = grad * x.strike;
    to[2] = grad * x.maturity;
    to[3] = grad * x.volatility;
    to[4] = grad * x.rate;
    to[5] = grad * x.dividend;
}
