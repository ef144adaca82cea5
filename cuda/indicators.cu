// Decision variables that many sets share, as keys. Maths, shapes and source: kernels/indicators.rs.
//   price_sums                                   grid  A                    one block per asset: scan of ⌈T/WG⌉ bars a thread
//   indicator_sma, _bollinger, _volatility       grid  ⌈A·T·rows / WG⌉      thread = (asset, bar, row)
//   indicator_donchian                           grid  ⌈A·T / WG⌉           thread = (asset, bar)
//   indicator_ema, _rsi                          grid  A·⌈rows / WG⌉        thread = (asset, row), sequential over bars

struct IndicatorParams {
    uint32_t a;
    uint32_t t;
    uint32_t rows;
    uint32_t bits;
    uint32_t extra;
};

#define NEUTRAL 0x40000000u

// ---- returns and prefix sums --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    price_sums(const float* __restrict__ price, const uint32_t* __restrict__ exponents, float* __restrict__ returns, uint32_t* __restrict__ sums,
               uint32_t* __restrict__ squares, IndicatorParams params) {
    __shared__ uint128 sh_sum[WG];
    __shared__ uint128 sh_square[WG];
    const uint32_t a = group_index(), tid = threadIdx.x;
    if (a >= params.a) {
        return;
    }
    const float* __restrict__ x = price + a * params.t;
    const uint32_t max_exponent = exponents[a];
    const bool want_sum = (params.extra & 1) != 0, want_square = (params.extra & 2) != 0;
    const uint32_t run = (params.t + WG - 1) / WG;
    const uint32_t first = min(tid * run, params.t);
    const uint32_t last = min(first + run, params.t);

    // totals of each thread's run, and its returns
    uint128 sum = make128(0), square = make128(0);
    for (uint32_t j = first; j < last; j++) {
        const float p = x[j];
        if (j + 1 < params.t) {
            const float* __restrict__ fill = price + (params.a + a) * params.t + j;
            returns[a * (params.t - 1) + j] = (fill[1] - fill[0]) / fill[0];
        }
        const uint64_t f = fixed_price(p, max_exponent, params.bits);
        sum = add128(sum, make128(f));
        square = add128(square, mul64(f, f));
    }
    sh_sum[tid] = sum;
    sh_square[tid] = square;
    __syncthreads();

    // what the threads before hold
    sum = make128(0);
    square = make128(0);
    for (uint32_t i = 0; i < tid; i++) {
        sum = add128(sum, sh_sum[i]);
        square = add128(square, sh_square[i]);
    }

    // prefix sums; the one before bar 0 is zero
    const uint32_t base = a * (params.t + 1);
    if (tid == 0 && want_sum) {
        put128(sums, base, sum);
    }
    if (tid == 0 && want_square) {
        put128(squares, base, square);
    }
    for (uint32_t j = first; j < last; j++) {
        const uint64_t f = fixed_price(x[j], max_exponent, params.bits);
        if (want_sum) {
            sum = add128(sum, make128(f));
            put128(sums, base + j + 1, sum);
        }
        if (want_square) {
            square = add128(square, mul64(f, f));
            put128(squares, base + j + 1, square);
        }
    }
}

// ---- simple moving averages ---------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    indicator_sma(const float* __restrict__ price, const uint32_t* __restrict__ exponents, const uint32_t* __restrict__ sums,
                  const uint32_t* __restrict__ periods, uint32_t* __restrict__ keys, IndicatorParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.a * params.t * params.rows) {
        return;
    }
    const uint32_t bar = at / params.rows;
    const uint32_t a = bar / params.t, j = bar % params.t;
    const uint32_t n = periods[at % params.rows];
    uint32_t key = 0;
    if (j + 1 >= n) {
        const uint32_t end = a * (params.t + 1) + j + 1;
        const uint128 total = sub128(get128(sums, end), get128(sums, end - n));
        key = mean_key(total, n, fixed_price(price[bar], exponents[a], params.bits));
    }
    keys[at] = key;
}

// ---- exponential moving averages ----------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    indicator_ema(const float* __restrict__ price, const uint32_t* __restrict__ exponents, const uint32_t* __restrict__ alphas,
                  uint32_t* __restrict__ keys, IndicatorParams params) {
    const uint32_t blocks = (params.rows + WG - 1) / WG, group = group_index();
    const uint32_t a = group / blocks;
    const uint32_t row = (group % blocks) * WG + threadIdx.x;
    if (a >= params.a || row >= params.rows) {
        return;
    }
    const float* __restrict__ x_of = price + a * params.t;
    uint32_t* __restrict__ key = keys + a * params.t * params.rows + row;
    const uint32_t max_exponent = exponents[a];
    const uint64_t alpha = get64(alphas, 2 * row), signal_alpha = get64(alphas, 2 * row + 1);
    const bool plain = signal_alpha == 0;
    uint64_t average = fixed_price(x_of[0], max_exponent, params.bits);
    uint64_t smoothed = average;
    for (uint32_t j = 0; j < params.t; j++) {
        const uint64_t x = fixed_price(x_of[j], max_exponent, params.bits);
        average = blend(average, x, alpha);
        uint64_t against = x;
        if (!plain) {
            smoothed = blend(smoothed, average, signal_alpha);
            against = smoothed;
        }
        const bool negative = average < against;
        key[j * params.rows] = difference_key(negative ? against - average : average - against, negative);
    }
}

// ---- relative strength index --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    indicator_rsi(const float* __restrict__ price, const uint32_t* __restrict__ exponents, const uint32_t* __restrict__ periods,
                  const uint32_t* __restrict__ alphas, uint32_t* __restrict__ keys, IndicatorParams params) {
    const uint32_t blocks = (params.rows + WG - 1) / WG, group = group_index();
    const uint32_t a = group / blocks;
    const uint32_t row = (group % blocks) * WG + threadIdx.x;
    if (a >= params.a || row >= params.rows) {
        return;
    }
    const float* __restrict__ x_of = price + a * params.t;
    uint32_t* __restrict__ key = keys + a * params.t * params.rows + row;
    const uint32_t max_exponent = exponents[a], n = periods[row];
    const uint64_t alpha = get64(alphas, row);
    uint128 gains = make128(0), losses = make128(0);
    uint64_t gain = 0, loss = 0;
    uint64_t before = fixed_price(x_of[0], max_exponent, params.bits);
    key[0] = NEUTRAL;
    for (uint32_t j = 1; j < params.t; j++) {
        const uint64_t x = fixed_price(x_of[j], max_exponent, params.bits);
        const uint64_t up = x > before ? x - before : 0, down = before > x ? before - x : 0;
        before = x;
        if (j <= n) {
            gains = add128(gains, make128(up));
            losses = add128(losses, make128(down));
            if (j == n) {
                gain = div128_20(gains, n);
                loss = div128_20(losses, n);
            }
        } else {
            gain = blend(gain, up, alpha);
            loss = blend(loss, down, alpha);
        }
        key[j * params.rows] = j >= n ? rsi_key(gain, loss) : NEUTRAL;
    }
}

// ---- distance from the mean in deviations -------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    indicator_bollinger(const float* __restrict__ price, const uint32_t* __restrict__ exponents, const uint32_t* __restrict__ sums,
                        const uint32_t* __restrict__ squares, const uint32_t* __restrict__ periods, uint32_t* __restrict__ keys, IndicatorParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.a * params.t * params.rows) {
        return;
    }
    const uint32_t bar = at / params.rows;
    const uint32_t a = bar / params.t, j = bar % params.t;
    const uint32_t n = periods[at % params.rows];
    uint32_t key = 0;
    if (j + 1 >= n) {
        const uint32_t end = a * (params.t + 1) + j + 1;
        const uint128 total = sub128(get128(sums, end), get128(sums, end - n));
        const uint128 total_squares = sub128(get128(squares, end), get128(squares, end - n));
        const uint128 level = mul64(fixed_price(price[bar], exponents[a], params.bits), n);
        const bool negative = less128(level, total);
        const uint128 distance = negative ? sub128(total, level) : sub128(level, total);
        key = ratio_key(square128(distance), sub128(mul128_64(total_squares, n), square128(total)), negative);
    }
    keys[at] = key;
}

// ---- runs of lower and higher closes ------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    indicator_donchian(const float* __restrict__ price, uint32_t* __restrict__ keys, IndicatorParams params) {
    const uint32_t bar = group_index() * WG + threadIdx.x;
    if (bar >= params.a * params.t) {
        return;
    }
    const float p = price[bar];
    const uint32_t most = min(bar % params.t, params.extra);
    uint32_t above = 0;
    while (above < most && price[bar - 1 - above] < p) {
        above++;
    }
    uint32_t below = 0;
    while (below < most && price[bar - 1 - below] > p) {
        below++;
    }
    keys[2 * bar] = above;
    keys[2 * bar + 1] = below;
}

// ---- inverse volatility of log returns ------------------------------------------------------------------------------

#define INVERSE_YEAR 0.06299408f  // 1/√252
#define NO_VOLATILITY 1e30f

__device__ __forceinline__ uint64_t log_distance(const uint32_t* __restrict__ logs, uint32_t i, uint32_t j) {
    const uint64_t a = logs[2 * i] | ((uint64_t)logs[2 * i + 1] << 32);
    const uint64_t b = logs[2 * j] | ((uint64_t)logs[2 * j + 1] << 32);
    const int64_t distance = (int64_t)(a - b);
    return distance < 0 ? 0 - (uint64_t)distance : (uint64_t)distance;
}

// Integer square root.
__device__ __forceinline__ uint32_t root64(uint64_t x) {
    uint32_t root = 0;
    for (uint32_t bit = 0x80000000u; bit > 0; bit >>= 1) {
        const uint64_t more = root | bit;
        if (more * more <= x) {
            root = (uint32_t)more;
        }
    }
    return root;
}

// The root of kernels/fixed.rs::inverse_deviation as a real, rounded once by hand.
__device__ __forceinline__ float inverse_of(uint32_t n, uint128 variance, uint32_t bits) {
    if (variance.hi == 0 && variance.lo == 0) {
        return NO_VOLATILITY;
    }
    const uint64_t num = (uint64_t)n * (n - 1);
    const int lead_num = leading_zeros64(num), lead_den = leading_zeros128(variance);
    const uint64_t den = shl128(variance, lead_den).hi >> 32;
    const uint64_t quotient = ((num << lead_num) >> 1) / den;
    const int exponent = 2 * (int)bits + lead_den - lead_num - 95;
    const int up = (exponent & 1) == 0 ? 32 : 31;
    const uint32_t root = root64(quotient << up);
    const uint32_t rounded = (root >> 8) + ((root >> 7) & 1);
    return ldexpf(__fmul_rn((float)rounded, INVERSE_YEAR), (exponent - up) / 2 + 8);
}

extern "C" __global__ void __launch_bounds__(WG)
    indicator_volatility(const uint32_t* __restrict__ logs, const uint32_t* __restrict__ periods, float* __restrict__ inverse_volatility, IndicatorParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.a * params.t * params.rows) {
        return;
    }
    const uint32_t bar = at / params.rows;
    const uint32_t n = periods[at % params.rows];
    float value = 0.0f;
    if (bar % params.t >= n) {
        uint128 squares = {0, 0};
        for (uint32_t i = bar - n; i < bar; i++) {
            const uint64_t x = log_distance(logs, i + 1, i);
            squares = add128(squares, mul64(x, x));
        }
        const uint64_t sum = log_distance(logs, bar, bar - n);
        value = inverse_of(n, sub128(mul128_64(squares, n), mul64(sum, sum)), params.bits);
    }
    inverse_volatility[at] = value;
}
