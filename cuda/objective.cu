// Objectives of series of returns and their gradients. Maths, shapes and source: kernels/objective.rs.
//   objective_moments, objective_tail, …_tail_sweep    grid  N             thread t takes values t, t+WG, …; for drawdowns a run of ⌈T/WG⌉
//   objective_finish                                   grid  ⌈N / WG⌉      thread = row
//   objective_gradient, net_returns, …_backward        grid  ⌈N·T / WG⌉    thread = value
//   state [N,16], coefficients [N,12], bins [N,260]

struct ObjectiveParams {
    uint32_t n;
    uint32_t first;
    uint32_t t;
    uint32_t start;
    uint32_t kind;
    float periods;
    float periods_low;
    float floor;
    float floor_low;
    float option;
    float option_low;
    uint32_t period;
    uint32_t sweep;
};

#define STATE 16
#define COEFFICIENTS 12
#define STRETCH 4
#define TAIL 12
#define SHARPE 0
#define SORTINO 1
#define CALMAR 2
#define DRAWDOWN 3
#define DRAWDOWN_ADDITIVE 4
#define CVAR 5
#define MEAN_VARIANCE 6
#define BINS 260
#define PREFIX 256
#define RANK 258
#define DIGITS 4
#define RUIN 1e-6f
#define MOST_GROWTH 40.0f

// Bars of the batch that belong to a row.
__device__ __forceinline__ uint32_t bars_of(const uint32_t* __restrict__ lengths, const ObjectiveParams& params, uint32_t row) {
    return params.period == 0 ? params.t : min(max(lengths[(params.first + row) % params.period], params.start) - params.start, params.t);
}

// Levels of a stretch of bars, counted from its start: total, highest and lowest with their bars, and the deepest fall.
struct Stretch {
    float total, high;
    uint32_t high_at;
    float low;
    uint32_t low_at;
    float fall;
    uint32_t peak, trough;
};

__device__ __forceinline__ Stretch empty(uint32_t at) {
    return {0.0f, 0.0f, at, 0.0f, at, 0.0f, at, at};
}

__device__ __forceinline__ Stretch join(Stretch a, Stretch b) {
    Stretch s = a;
    const float across = a.high - (a.total + b.low);
    if (across > s.fall) {
        s.fall = across;
        s.peak = a.high_at;
        s.trough = b.low_at;
    }
    if (b.fall > s.fall) {
        s.fall = b.fall;
        s.peak = b.peak;
        s.trough = b.trough;
    }
    if (a.total + b.high > s.high) {
        s.high = a.total + b.high;
        s.high_at = b.high_at;
    }
    if (a.total + b.low < s.low) {
        s.low = a.total + b.low;
        s.low_at = b.low_at;
    }
    s.total = a.total + b.total;
    return s;
}

// Up to 64 bars from value `from_index`, bar `bar`.
__device__ __forceinline__ Stretch stretch_of(const float* __restrict__ x, uint32_t len, uint32_t bar, bool additive) {
    Stretch s = empty(bar);
    for (uint32_t j = 0; j < len; j++) {
        s.total += additive ? x[j] : log1pf(fmaxf(x[j], RUIN - 1.0f));
        const uint32_t at = bar + j + 1;
        if (s.total > s.high) {
            s.high = s.total;
            s.high_at = at;
        }
        if (s.total < s.low) {
            s.low = s.total;
            s.low_at = at;
        }
        if (s.high - s.total > s.fall) {
            s.fall = s.high - s.total;
            s.peak = s.high_at;
            s.trough = at;
        }
    }
    return s;
}

// ---- moments --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    objective_moments(const float* __restrict__ returns, const uint32_t* __restrict__ lengths, float* __restrict__ state, ObjectiveParams params) {
    __shared__ Stretch sh_stretch[WG];
    const uint32_t row = group_index(), tid = threadIdx.x;
    if (row >= params.n) {
        return;
    }
    const uint32_t t = bars_of(lengths, params, row);
    const float* __restrict__ x = returns + row * params.t;
    float* __restrict__ out = state + (params.first + row) * STATE;
    if (t == 0) {
        if (params.start == 0 && tid < STATE) {
            out[tid] = 0.0f;
        }
        return;
    }

    // mean, as the first return plus an offset
    const float first = x[0];
    float sum[1] = {0.0f};
#pragma unroll 4
    for (uint32_t j = tid; j < t; j += WG) {
        sum[0] += x[j] - first;
    }
    block_sum(sum);
    float count = (float)t;
    const float offset = sum[0] / count;

    // central and downside squares
    const float target = params.kind == SORTINO ? params.option : 0.0f;
    float squares[2] = {0.0f, 0.0f};
#pragma unroll 4
    for (uint32_t j = tid; j < t; j += WG) {
        const float d = (x[j] - first) - offset, low = x[j] < target ? x[j] - target : 0.0f;
        squares[0] += d * d;
        squares[1] += low * low;
    }
    block_sum(squares);

    // drawdown: runs in order, then an ordered tree
    Stretch s = empty(params.start);
    if (params.kind == CALMAR || params.kind == DRAWDOWN || params.kind == DRAWDOWN_ADDITIVE) {
        const uint32_t run = (t + WG - 1) / WG, from = min(tid * run, t), last = min(from + run, t);
        s = empty(params.start + from);
        for (uint32_t j = from; j < last; j += 64) {
            s = join(s, stretch_of(x + j, min(64u, last - j), params.start + j, params.kind == DRAWDOWN_ADDITIVE));
        }
        sh_stretch[tid] = s;
        __syncthreads();
        for (uint32_t step = 1; step < WG; step *= 2) {
            if (tid % (2 * step) == 0) {
                sh_stretch[tid] = join(sh_stretch[tid], sh_stretch[tid + step]);
            }
            __syncthreads();
        }
        s = sh_stretch[0];
    }
    if (tid > 0) {
        return;
    }
    float mean = first + offset;
    if (params.start > 0) {
        const float before = out[0], total = before + count, delta = mean - out[1];
        squares[0] += out[2] + delta * delta * (before * count / total);
        mean = out[1] + delta * (count / total);
        squares[1] += out[3];
        count = total;
        const float* o = out + STRETCH;
        const Stretch old = {o[0], o[1], (uint32_t)o[2], o[3], (uint32_t)o[4], o[5], (uint32_t)o[6], (uint32_t)o[7]};
        s = join(old, s);
    }
    out[0] = count;
    out[1] = mean;
    out[2] = squares[0];
    out[3] = squares[1];
    out[STRETCH] = s.total;
    out[STRETCH + 1] = s.high;
    out[STRETCH + 2] = (float)s.high_at;
    out[STRETCH + 3] = s.low;
    out[STRETCH + 4] = (float)s.low_at;
    out[STRETCH + 5] = s.fall;
    out[STRETCH + 6] = (float)s.peak;
    out[STRETCH + 7] = (float)s.trough;
}

// ---- tail -----------------------------------------------------------------------------------------------------------

// Monotone unsigned image of a float; both zeros are one.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t raw = x == 0.0f ? 0u : __float_as_uint(x);
    return raw >> 31 ? ~raw : raw | 0x80000000u;
}

__device__ __forceinline__ float unordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

extern "C" __global__ void __launch_bounds__(WG)
    objective_tail(const float* __restrict__ returns, const uint32_t* __restrict__ lengths, float* __restrict__ state, ObjectiveParams params) {
    __shared__ uint32_t sh_bins[256];
    __shared__ uint32_t sh_pick[2];
    const uint32_t row = group_index(), tid = threadIdx.x;
    if (row >= params.n) {
        return;
    }
    const uint32_t t = bars_of(lengths, params, row);
    const float* __restrict__ x = returns + row * params.t;
    if (t == 0) {
        return;
    }
    // the order statistic, one byte of its ordered image at a time
    uint32_t prefix = 0, rank = min((uint32_t)(params.option * (float)t + params.option_low * (float)t), t - 1);
    for (uint32_t byte = 0; byte < 4; byte++) {
        const uint32_t shift = 24 - 8 * byte;
        for (uint32_t i = tid; i < 256; i += WG) {
            sh_bins[i] = 0;
        }
        __syncthreads();
        for (uint32_t j = tid; j < t; j += WG) {
            const uint32_t key = ordered(x[j]);
            if (byte == 0 || (key >> (shift + 8)) == prefix) {
                atomicAdd(&sh_bins[(key >> shift) & 0xffu], 1u);
            }
        }
        __syncthreads();
        if (tid == 0) {
            uint32_t bin = 0, before = 0;
            for (; bin < 255 && before + sh_bins[bin] <= rank; bin++) {
                before += sh_bins[bin];
            }
            sh_pick[0] = (prefix << 8) | bin;
            sh_pick[1] = rank - before;
        }
        __syncthreads();
        prefix = sh_pick[0];
        rank = sh_pick[1];
        __syncthreads();
    }
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (uint32_t j = tid; j < t; j += WG) {
        const uint32_t key = ordered(x[j]);
        sums[0] += key < prefix ? 1.0f : 0.0f;
        sums[1] += key < prefix ? x[j] : 0.0f;
        sums[2] += key == prefix ? 1.0f : 0.0f;
    }
    block_sum(sums);
    if (tid == 0) {
        float* __restrict__ out = state + (params.first + row) * STATE + TAIL;
        out[0] = unordered(prefix);
        out[1] = sums[0];
        out[2] = sums[1];
        out[3] = sums[2];
    }
}

// ---- tail of an epoch in batches ------------------------------------------------------------------------------------

// The image so far of a row's threshold, and its rank among the values that have it, from what the last sweep counted.
__device__ __forceinline__ void pick(float* __restrict__ own, float* __restrict__ state, const ObjectiveParams& params) {
    uint32_t prefix = (uint32_t)own[PREFIX + 1], rank = (uint32_t)own[RANK];
    if (params.sweep == 1) {
        const float n = state[0];
        prefix = 0;
        rank = min((uint32_t)(params.option * n + params.option_low * n), max((uint32_t)n, 1u) - 1);
    }
    uint32_t bin = 0;
    for (; bin < 255 && (uint32_t)own[bin] <= rank; bin++) {
        rank -= (uint32_t)own[bin];
    }
    prefix = (prefix << 8) | bin;
    if (params.sweep < DIGITS) {
        own[PREFIX + 1] = (float)prefix;
        own[RANK] = (float)rank;
    } else {
        state[TAIL] = unordered(prefix);
        state[TAIL + 1] = 0.0f;
        state[TAIL + 2] = 0.0f;
        state[TAIL + 3] = 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(WG) objective_tail_sweep(const float* __restrict__ returns, const uint32_t* __restrict__ lengths,
                                                                      float* __restrict__ state, float* __restrict__ bins, ObjectiveParams params) {
    __shared__ uint32_t sh_bins[256];
    __shared__ uint32_t sh_prefix;
    const uint32_t row = group_index(), tid = threadIdx.x;
    if (row >= params.n) {
        return;
    }
    const uint32_t t = bars_of(lengths, params, row);
    const float* __restrict__ x = returns + row * params.t;
    float* __restrict__ out = state + (params.first + row) * STATE;
    float* __restrict__ own = bins + (params.first + row) * BINS;
    if (tid == 0) {
        if (params.start == 0 && params.sweep > 0) {
            pick(own, out, params);
        }
        sh_prefix = params.sweep == DIGITS ? ordered(out[TAIL]) : params.sweep > 0 ? (uint32_t)own[PREFIX + 1] : 0;
    }
    for (uint32_t i = tid; i < 256; i += WG) {
        sh_bins[i] = 0;
    }
    __syncthreads();
    const uint32_t prefix = sh_prefix;
    if (params.sweep < DIGITS) {
        // one more byte of the images that begin as the threshold's
        const uint32_t shift = 24 - 8 * params.sweep;
        for (uint32_t j = tid; j < t; j += WG) {
            const uint32_t key = ordered(x[j]);
            if (params.sweep == 0 || (key >> (shift + 8)) == prefix) {
                atomicAdd(&sh_bins[(key >> shift) & 0xffu], 1u);
            }
        }
        __syncthreads();
        for (uint32_t i = tid; i < 256; i += WG) {
            own[i] = (params.start == 0 ? 0.0f : own[i]) + (float)sh_bins[i];
        }
        return;
    }
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (uint32_t j = tid; j < t; j += WG) {
        const uint32_t key = ordered(x[j]);
        sums[0] += key < prefix ? 1.0f : 0.0f;
        sums[1] += key < prefix ? x[j] : 0.0f;
        sums[2] += key == prefix ? 1.0f : 0.0f;
    }
    block_sum(sums);
    if (tid == 0) {
        out[TAIL + 1] += sums[0];
        out[TAIL + 2] += sums[1];
        out[TAIL + 3] += sums[2];
    }
}

// ---- values and coefficients ----------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    objective_finish(const float* __restrict__ state, float* __restrict__ value, float* __restrict__ coefficients, ObjectiveParams params) {
    const uint32_t i = group_index() * WG + threadIdx.x;
    if (i >= params.n) {
        return;
    }
    const uint32_t row = params.first + i;
    const float* __restrict__ s = state + row * STATE;
    const float n = s[0], mean = s[1], fall = s[STRETCH + 5];
    const float year = sqrtf(params.periods), floor_square = params.floor * params.floor, drawdown = -expm1f(-fall);
    float c0 = 0.0f, c1 = 0.0f, c3 = 0.0f, c4 = 0.0f, c5 = 0.0f, c6 = 0.0f, c9 = 0.0f, c10 = 0.0f, c11 = 0.0f, result = UNDEFINED;
    switch (params.kind) {
        case SHARPE: {
            const float below = sqrtf(s[2] / fmaxf(n - 1.0f, 1.0f) + floor_square);
            if (n > 1.0f && below > 0.0f) {
                result = year * (mean - params.option) / below;
                c0 = year / (n * below);
                c1 = -(result / ((n - 1.0f) * below * below));
            }
            break;
        }
        case MEAN_VARIANCE:
            if (n > 1.0f) {
                result = params.periods * (mean - 0.5f * params.option * s[2] / (n - 1.0f));
                c0 = params.periods / n;
                c1 = -(params.periods * params.option / (n - 1.0f));
            }
            break;
        case SORTINO: {
            const float below = sqrtf(s[3] / fmaxf(n, 1.0f) + floor_square);
            if (n > 0.0f && below > 0.0f) {
                result = year * (mean - params.option) / below;
                c0 = year / (n * below);
                c3 = -(result / (n * below * below));
            }
            break;
        }
        case CALMAR: {
            const float below = sqrtf(drawdown * drawdown + floor_square);
            if (n > 0.0f && below > 0.0f) {
                const float growth = expm1f(fminf(params.periods / n * s[STRETCH], MOST_GROWTH));
                result = growth / below;
                c4 = (1.0f + growth) * params.periods / (n * below);
                c5 = growth / below * (drawdown / below) * ((1.0f - drawdown) / below);
            }
            break;
        }
        case DRAWDOWN:
            result = n > 0.0f ? drawdown : UNDEFINED;
            c5 = -(1.0f - drawdown);
            break;
        case DRAWDOWN_ADDITIVE:
            result = n > 0.0f ? fall : UNDEFINED;
            c6 = -1.0f;
            break;
        default: {
            if (n <= 0.0f) {
                break;
            }
            const float tail = fminf(params.option * n + params.option_low * n, n), rest = tail - s[TAIL + 1];
            result = -((s[TAIL + 2] + rest * s[TAIL]) / tail);
            c9 = s[TAIL];
            c10 = -(1.0f / tail);
            c11 = -(rest / (tail * s[TAIL + 3]));
        }
    }
    value[row] = result;
    float* __restrict__ c = coefficients + row * COEFFICIENTS;
    c[0] = c0;
    c[1] = c1;
    c[2] = mean;
    c[3] = c3;
    c[4] = c4;
    c[5] = c5;
    c[6] = c6;
    c[7] = s[STRETCH + 6];
    c[8] = s[STRETCH + 7];
    c[9] = c9;
    c[10] = c10;
    c[11] = c11;
}

// ---- gradient -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    objective_gradient(const float* __restrict__ returns, const uint32_t* __restrict__ lengths, const float* __restrict__ coefficients,
                       const float* __restrict__ grad_value, float* __restrict__ grad_returns, ObjectiveParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.n * params.t) {
        return;
    }
    if (at % params.t >= bars_of(lengths, params, at / params.t)) {
        grad_returns[at] = 0.0f;
        return;
    }
    const uint32_t row = params.first + at / params.t;
    const float bar = (float)(params.start + at % params.t), r = returns[at];
    const float* __restrict__ c = coefficients + row * COEFFICIENTS;
    const bool falls = bar >= c[7] && bar < c[8];
    const float target = params.kind == SORTINO ? params.option : 0.0f;
    float g = c[0] + c[1] * (r - c[2]);
    g += r < target ? c[3] * (r - target) : 0.0f;
    g += 1.0f + r >= RUIN ? (c[4] + (falls ? c[5] : 0.0f)) / (1.0f + r) : 0.0f;
    g += falls ? c[6] : 0.0f;
    g += r < c[9] ? c[10] : r == c[9] ? c[11] : 0.0f;
    grad_returns[at] = grad_value[row] * g;
}

// ---- positions ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sign(float x) {
    return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f;
}

// Where the return of position `at` lies: series of asset returns repeat.
__device__ __forceinline__ uint32_t asset_at(uint32_t at, const ObjectiveParams& params) {
    return params.period == 0 ? at : (params.first + at / params.t) % params.period * params.t + at % params.t;
}

extern "C" __global__ void __launch_bounds__(WG)
    net_returns(const float* __restrict__ positions, const float* __restrict__ asset_returns, float* __restrict__ returns, ObjectiveParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.n * params.t) {
        return;
    }
    const float before = at % params.t == 0 ? 0.0f : positions[at - 1];
    returns[at] = positions[at] * asset_returns[asset_at(at, params)] - params.option * fabsf(positions[at] - before);
}

extern "C" __global__ void __launch_bounds__(WG)
    net_returns_backward(const float* __restrict__ positions, const float* __restrict__ asset_returns, const float* __restrict__ grad_returns,
                         float* __restrict__ grad_positions, ObjectiveParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.n * params.t) {
        return;
    }
    const uint32_t bar = at % params.t;
    const float x = positions[at], before = bar == 0 ? 0.0f : positions[at - 1];
    const float after = bar + 1 < params.t ? grad_returns[at + 1] * params.option * sign(positions[at + 1] - x) : 0.0f;
    grad_positions[at] = grad_returns[at] * (asset_returns[asset_at(at, params)] - params.option * sign(x - before)) + after;
}
