// Performance statistics of return series. Maths, shapes and source: kernels/performance.rs.
//   grid  N      block WG      thread t takes values t, t+WG, …; for the drawdown a run of ⌈T/WG⌉ values
//   reads returns [N,T]      writes statistics [N,12]      shared memory: 258 words and 13 a warp

struct PerformanceParams {
    uint32_t n;
    uint32_t t;
    uint32_t tail;
};

#define STATISTICS 12
#define RUIN 1e-30f
#define WARPS (WG / 32)

// A stretch of equity: growth as mantissa·2^exponent, its end against its highest level, its lowest level against its start, its
// worst level against a running peak. The last three are at most 1, and exactly 1 where equity only rises.
struct Stretch {
    float mantissa;
    float exponent;
    float end_to_peak;
    float lowest;
    float worst;
};

__device__ __forceinline__ float growth_of(Stretch s) {
    return ldexpf(s.mantissa, (int)fminf(fmaxf(s.exponent, -120.0f), 120.0f));
}

__device__ __forceinline__ Stretch join(Stretch a, Stretch b) {
    const float product = a.mantissa * b.mantissa;
    const bool carry = product >= 2.0f;
    return {
        product * (carry ? 0.5f : 1.0f),
        a.exponent + b.exponent + (carry ? 1.0f : 0.0f),
        fminf(b.end_to_peak, a.end_to_peak * growth_of(b)),
        fminf(a.lowest, growth_of(a) * b.lowest),
        fminf(fminf(a.worst, b.worst), a.end_to_peak * b.lowest),
    };
}

// The stretch that the lane `step` further holds.
__device__ __forceinline__ Stretch from_lane_after(Stretch s, uint32_t step) {
    const uint32_t all = 0xffffffffu;
    return {
        __shfl_down_sync(all, s.mantissa, step), __shfl_down_sync(all, s.exponent, step), __shfl_down_sync(all, s.end_to_peak, step),
        __shfl_down_sync(all, s.lowest, step),   __shfl_down_sync(all, s.worst, step),
    };
}

// Monotone unsigned image of a float.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t raw = __float_as_uint(x);
    return raw >> 31 ? ~raw : raw | 0x80000000u;
}

__device__ __forceinline__ float unordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// One block of up to 64 values, compounded from 1.
__device__ __forceinline__ Stretch stretch_of(const float* __restrict__ x, uint32_t from_index, uint32_t to_index) {
    float level = 1.0f, lowest = 1.0f, end_to_peak = 1.0f, worst = 1.0f;
    for (uint32_t j = from_index; j < to_index; j++) {
        const float factor = fmaxf(1.0f + x[j], RUIN);
        level *= factor;
        lowest = fminf(lowest, level);
        end_to_peak = fminf(end_to_peak * factor, 1.0f);
        worst = fminf(worst, end_to_peak);
    }
    const uint32_t raw = __float_as_uint(fminf(fmaxf(level, 1e-37f), 1e37f));
    const float mantissa = __uint_as_float((raw & 0x7fffffu) | 0x3f800000u);
    return {mantissa, (float)((int)(raw >> 23) - 127), end_to_peak, lowest, worst};
}

extern "C" __global__ void __launch_bounds__(WG) performance(const float* __restrict__ returns, float* __restrict__ statistics, PerformanceParams params) {
    __shared__ Stretch sh_stretch[WARPS];
    __shared__ uint32_t sh_bins[256];
    __shared__ uint32_t sh_pick[2];
    const uint32_t row = group_index(), tid = threadIdx.x, lane = tid % 32;
    if (row >= params.n) {
        return;
    }
    const float* __restrict__ series = returns + row * params.t;
    float* __restrict__ out = statistics + row * STATISTICS;

    // mean, as the first return plus an offset
    const float first = series[0];
    float sum[1] = {0.0f};
    for (uint32_t j = tid; j < params.t; j += WG) {
        sum[0] += series[j] - first;
    }
    block_sum(sum);
    const float offset = sum[0] / (float)params.t;

    // central sums, downside, hits
    float acc[5] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (uint32_t j = tid; j < params.t; j += WG) {
        const float x = series[j];
        const float d = (x - first) - offset;
        const float low = fminf(x, 0.0f);
        acc[0] += d * d;
        acc[1] += d * d * d;
        acc[2] += d * d * d * d;
        acc[3] += low * low;
        acc[4] += x > 0.0f ? 1.0f : 0.0f;
    }
    block_sum(acc);
    if (tid == 0) {
        out[0] = first + offset;
        for (int i = 0; i < 5; i++) {
            out[1 + i] = acc[i];
        }
    }

    // growth and drawdown: runs in order, then an ordered tree
    const uint32_t run = (params.t + WG - 1) / WG;
    const uint32_t last = min((tid + 1) * run, params.t);
    Stretch mine = {1.0f, 0.0f, 1.0f, 1.0f, 1.0f};
    for (uint32_t j = tid * run; j < last; j += 64) {
        mine = join(mine, stretch_of(series, j, min(j + 64, last)));
    }
    for (uint32_t step = 1; step < 32; step *= 2) {
        mine = join(mine, from_lane_after(mine, step));  // of use in lanes that are multiples of 2·step
    }
    if (lane == 0) {
        sh_stretch[tid / 32] = mine;
    }
    __syncthreads();
    if (tid == 0) {
        for (int warp = 1; warp < WARPS; warp++) {
            mine = join(mine, sh_stretch[warp]);
        }
        out[6] = mine.mantissa;
        out[7] = mine.exponent;
        out[8] = 1.0f - mine.worst;
    }

    // the tail's order statistic, one byte of its ordered image at a time
    uint32_t prefix = 0, rank = min(params.tail, params.t - 1);
    for (uint32_t byte = 0; byte < 4; byte++) {
        const uint32_t shift = 24 - 8 * byte;
        for (uint32_t i = tid; i < 256; i += WG) {
            sh_bins[i] = 0;
        }
        __syncthreads();
        for (uint32_t j = tid; j < params.t; j += WG) {
            const uint32_t key = ordered(series[j]);
            if (byte == 0 || (key >> (shift + 8)) == prefix) {
                atomicAdd(&sh_bins[(key >> shift) & 0xffu], 1u);
            }
        }
        __syncthreads();
        // the first warp finds the bin, 8 bins a lane
        if (tid < 32) {
            uint32_t count = 0;
            for (uint32_t i = 0; i < 8; i++) {
                count += sh_bins[8 * lane + i];
            }
            uint32_t up_to = count;
            for (uint32_t step = 1; step < 32; step *= 2) {
                const uint32_t below = __shfl_up_sync(0xffffffffu, up_to, step);
                up_to += lane >= step ? below : 0;
            }
            uint32_t before = up_to - count;
            if (before <= rank && rank < up_to) {
                uint32_t bin = 8 * lane;
                for (; before + sh_bins[bin] <= rank; bin++) {
                    before += sh_bins[bin];
                }
                sh_pick[0] = (prefix << 8) | bin;
                sh_pick[1] = rank - before;
            }
        }
        __syncthreads();
        prefix = sh_pick[0];
        rank = sh_pick[1];
    }
    float tail[2] = {0.0f, 0.0f};
    for (uint32_t j = tid; j < params.t; j += WG) {
        const float x = series[j];
        if (ordered(x) < prefix) {
            tail[0] += x;
            tail[1] += 1.0f;
        }
    }
    block_sum(tail);
    if (tid == 0) {
        out[9] = tail[0];
        out[10] = tail[1];
        out[11] = unordered(prefix);
    }
}
