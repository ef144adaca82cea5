// Risk figures of P&L. Maths, shapes and source: kernels/hedge_risk.rs.
//   hedge_moments     grid  rows · ⌈P / 2048⌉        block WG, 8 pairs of neighbours a thread      reads values      writes partial
//   hedge_count       grid  queries · slabs          block WG per slab      shared memory: 2048 counts      reads values, queries, edges      writes counts
//   hedge_sum_counts  grid  ⌈queries · 2048 / WG⌉    thread = bin      reads counts      writes sums
//   hedge_tail        grid  queries · ⌈P / 2048⌉     block WG      reads values, queries, edges      writes tails

struct HedgeRiskParams {
    uint32_t rows;
    uint32_t count;
    uint32_t period;
    uint32_t slabs;
    uint32_t known;
    uint32_t bins;
    float risk_aversion;
};

#define BLOCK 2048u
#define PAIRS 8
#define PARTIAL 10
#define BINS 2048u
#define TAIL 4

extern "C" __global__ void __launch_bounds__(WG) hedge_moments(const float* values, float* partial, HedgeRiskParams params) {
    __shared__ float sh_ends[2][WG];
    const uint32_t group = group_index(), tid = threadIdx.x;
    const uint32_t blocks = (params.count + BLOCK - 1) / BLOCK, row = group / blocks;
    if (row >= params.rows) {
        return;
    }
    const uint32_t first = (group % blocks) * BLOCK, size = min(BLOCK, params.count - first);
    const float* x = values + (uint64_t)row * params.count + first;
    const float pivot = x[0];

    // mean and extremes
    float v[2 * PAIRS], total[1] = {0.0f}, least = pivot, most = pivot;
#pragma unroll
    for (uint32_t i = 0; i < 2 * PAIRS; i++) {
        const uint32_t at = 2 * (tid + (i / 2) * WG) + i % 2;
        v[i] = at < size ? x[at] : 0.0f;
        if (at < size) {
            total[0] += v[i] - pivot;
            least = fminf(least, v[i]);
            most = fmaxf(most, v[i]);
        }
    }
    block_sum<1>(total);
    const float mean = pivot + total[0] / (float)size;
    sh_ends[0][tid] = least;
    sh_ends[1][tid] = most;
    for (uint32_t lanes = WG / 2; lanes > 0; lanes /= 2) {
        __syncthreads();
        if (tid < lanes) {
            sh_ends[0][tid] = fminf(sh_ends[0][tid], sh_ends[0][tid + lanes]);
            sh_ends[1][tid] = fmaxf(sh_ends[1][tid], sh_ends[1][tid + lanes]);
        }
    }
    __syncthreads();
    least = sh_ends[0][0];

    // central sums and exponential sums; a lone last value has no neighbour
    float sums[7] = {};
    const bool weighted = row % max(params.period, 1u) == 0;
#pragma unroll
    for (uint32_t i = 0; i < PAIRS; i++) {
        const uint32_t at = 2 * (tid + i * WG);
        const float a = at < size ? v[2 * i] - mean : 0.0f, b = at + 1 < size ? v[2 * i + 1] - mean : 0.0f;
        sums[0] += a * a + b * b;
        sums[1] += a * a * a + b * b * b;
        sums[2] += a * a * (a * a) + b * b * (b * b);
        sums[3] += a * b;
        if (weighted) {
            const float wa = at < size ? expf(params.risk_aversion * (least - v[2 * i])) : 0.0f;
            const float wb = at + 1 < size ? expf(params.risk_aversion * (least - v[2 * i + 1])) : 0.0f;
            sums[4] += wa + wb;
            sums[5] += wa * wa + wb * wb;
            sums[6] += wa * wb;
        }
    }
    block_sum<7>(sums);
    if (tid == 0) {
        float* out = partial + (uint64_t)group * PARTIAL;
        out[0] = mean;
        for (int i = 0; i < 4; i++) {
            out[1 + i] = sums[i];
        }
        out[5] = sh_ends[0][0];
        out[6] = sh_ends[1][0];
        for (int i = 4; i < 7; i++) {
            out[3 + i] = sums[i];
        }
    }
}

// Image of a real whose order as a whole number is the real's.
__device__ __forceinline__ uint32_t image(float x) {
    const uint32_t raw = __float_as_uint(x);
    return raw >> 31 ? ~raw : raw | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_count(const float* values, const uint32_t* queries, const float* edges, uint32_t* counts, HedgeRiskParams params) {
    __shared__ uint32_t sh_counts[BINS];
    const uint32_t group = group_index(), tid = threadIdx.x, query = group / params.slabs;
    if (query >= params.rows) {
        return;
    }
    for (uint32_t bin = tid; bin < BINS; bin += WG) {
        sh_counts[bin] = 0;
    }
    __syncthreads();
    const uint32_t slab = (params.count + params.slabs - 1) / params.slabs;
    const uint32_t first = min((group % params.slabs) * slab, params.count), end = min(first + slab, params.count);
    const float* x = values + (uint64_t)queries[2 * query] * params.count;
    const uint32_t prefix = queries[2 * query + 1];
    if (params.known >= 32) {
        const float low = edges[2 * query], scale = edges[2 * query + 1];
        for (uint32_t i = first + tid; i < end; i += WG) {
            atomicAdd(&sh_counts[min((uint32_t)fmaxf((x[i] - low) * scale, 0.0f), min(max(params.bins, 1u), BINS) - 1)], 1u);
        }
    } else {
        const uint32_t shift = params.known == 0 ? 21 : params.known == 11 ? 10 : 0, digits = params.known < 22 ? 2048 : 1024;
        for (uint32_t i = first + tid; i < end; i += WG) {
            const uint32_t whole = image(x[i]);
            if (params.known == 0 || whole >> (32 - params.known) == prefix) {
                atomicAdd(&sh_counts[whole >> shift & (digits - 1)], 1u);
            }
        }
    }
    __syncthreads();
    for (uint32_t bin = tid; bin < BINS; bin += WG) {
        counts[(uint64_t)group * BINS + bin] = sh_counts[bin];
    }
}

extern "C" __global__ void __launch_bounds__(WG) hedge_sum_counts(const uint32_t* counts, uint32_t* sums, HedgeRiskParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.rows * BINS) {
        return;
    }
    const uint32_t* part = counts + (uint64_t)(at / BINS) * params.slabs * BINS + at % BINS;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < params.slabs; i++) {
        sum += part[(uint64_t)i * BINS];
    }
    sums[at] = sum;
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_tail(const float* values, const uint32_t* queries, const float* edges, float* tails, HedgeRiskParams params) {
    const uint32_t group = group_index(), tid = threadIdx.x;
    const uint32_t blocks = (params.count + BLOCK - 1) / BLOCK, query = group / blocks;
    if (query >= params.rows) {
        return;
    }
    const uint32_t first = (group % blocks) * BLOCK, size = min(BLOCK, params.count - first);
    const float* x = values + (uint64_t)queries[2 * query] * params.count + first;
    const float level = edges[2 * query];
    float sums[TAIL] = {};
#pragma unroll
    for (uint32_t i = 0; i < PAIRS; i++) {
        const uint32_t at = 2 * (tid + i * WG);
        const float a = at < size ? fmaxf(level - x[at], 0.0f) : 0.0f, b = at + 1 < size ? fmaxf(level - x[at + 1], 0.0f) : 0.0f;
        sums[0] += a + b;
        sums[1] += a * a + b * b;
        sums[2] += a * b;
        sums[3] += (a > 0.0f ? 1.0f : 0.0f) + (b > 0.0f ? 1.0f : 0.0f);
    }
    block_sum<TAIL>(sums);
    if (tid == 0) {
        for (int i = 0; i < TAIL; i++) {
            tails[(uint64_t)group * TAIL + i] = sums[i];
        }
    }
}
