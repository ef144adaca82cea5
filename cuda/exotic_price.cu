// Barrier, Asian and European options along simulated paths: sums of payoffs and of their controls. Maths, shapes and source: kernels/exotic_price.rs.
//   grid  blocks of WG·PER samples      workgroup WG      thread takes samples tid, tid + WG, … of its block
//   reads market, market_words      writes sums [blocks,5]      12 blocks a multiprocessor: 80 registers, no spills

struct ExoticParams {
    uint32_t samples;
    uint32_t t;
    uint32_t market;
    uint32_t first;
    uint32_t first_high;
    uint32_t per;
    uint32_t kind;
    float strike;
    float barrier;
    float discount;
};

#define CALL 1u
#define UP 2u
#define KNOCK_IN 4u
#define BRIDGE 8u
#define BARRIER 1u
#define ARITHMETIC 2u
#define GEOMETRIC 3u

__device__ __forceinline__ float payoff(const ExoticParams& params, float x) {
    const float over = x - params.strike;
    return params.discount * fmaxf((params.kind & CALL) ? over : -over, 0.0f);
}

// Chance that a step from x to y, in log-spot, with this variance does not meet the barrier.
__device__ __forceinline__ float missed(uint32_t kind, float x, float y, float level, float variance) {
    const float side = (kind & UP) ? 1.0f : -1.0f, before = side * (level - x), after = side * (level - y);
    if (before <= 0.0f || after <= 0.0f) {
        return 0.0f;
    }
    return (kind & BRIDGE) ? 1.0f - expf(-2.0f * before * after / fmaxf(variance, 1e-30f)) : 1.0f;
}

// Payoff and control of one path.
__device__ __forceinline__ float2 sample(const PathMarket& m, const ExoticParams& params, uint64_t path) {
    const uint32_t style = params.kind >> 8;
    const float level = log_ratio(fmaxf(params.barrier, 1e-30f), m.spot);
    PathState s = path_start(m, path);
    // Of a barrier the chance to be alive, of an average the sum of spots.
    float kept = style == BARRIER ? missed(params.kind & ~BRIDGE, s.x, s.x, level, 0.0f) : 0.0f, logs = 0.0f;
    for (uint32_t quad = 0; 4 * quad < params.t; quad++) {
        const PathDraws d = path_draws(m, path, quad);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (4 * quad + i < params.t) {
                const PathState next = path_step(m, s, d, 4 * quad + i);
                if (style == BARRIER) {
#if PATH_KIND == HESTON || PATH_KIND == BATES
                    const float variance = 0.5f * (s.v + next.v) * m.row[FIELD_DT];
#else
                    const float variance = m.variance;
#endif
                    kept *= missed(params.kind, s.x, next.x, level, variance);
                }
                if (style == ARITHMETIC) {
                    kept += path_spot(m, next);
                }
                logs += next.x;
                s = next;
            }
        }
    }
    const float end = path_spot(m, s), european = payoff(params, end), geometric = payoff(params, m.spot * expf(logs / (float)params.t));
    switch (style) {
        case BARRIER: return make_float2(european * ((params.kind & KNOCK_IN) ? 1.0f - kept : kept), european);
        case ARITHMETIC: return make_float2(payoff(params, kept / (float)params.t), geometric);
        case GEOMETRIC: return make_float2(geometric, european);
        default: return make_float2(european, params.discount * end);
    }
}

extern "C" __global__ void __launch_bounds__(WG, 12)
    exotic_price(const float* __restrict__ market, const uint32_t* __restrict__ market_words, float* __restrict__ sums, ExoticParams params) {
    const uint32_t block = group_index();
    const PathMarket m = path_market(market, market_words, params.market);
    const uint32_t mirrors = m.antithetic ? 2 : 1;
    // Each thread's own sums, out of the registers that paths need.
    __shared__ float sh_own[5][WG];
    for (int c = 0; c < 5; c++) {
        sh_own[c][threadIdx.x] = 0.0f;
    }
    for (uint32_t i = 0; i < params.per; i++) {
        const uint64_t index = ((uint64_t)block * params.per + i) * WG + threadIdx.x;
        if (index >= params.samples) {
            break;
        }
        float x = 0.0f, y = 0.0f;
        for (uint32_t mirror = 0; mirror < mirrors; mirror++) {
            const float2 pair = sample(m, params, ((uint64_t)params.first_high << 32 | params.first) + index * mirrors + mirror);
            x += pair.x / (float)mirrors;
            y += pair.y / (float)mirrors;
        }
        sh_own[0][threadIdx.x] += x;
        sh_own[1][threadIdx.x] += x * x;
        sh_own[2][threadIdx.x] += y;
        sh_own[3][threadIdx.x] += y * y;
        sh_own[4][threadIdx.x] += x * y;
    }
    float total[5];
    for (int c = 0; c < 5; c++) {
        total[c] = sh_own[c][threadIdx.x];
    }
    block_sum(total);
    if (threadIdx.x < 5 && (uint64_t)block * params.per * WG < params.samples) {
        float mine = total[0];
        for (int c = 1; c < 5; c++) {
            mine = threadIdx.x == c ? total[c] : mine;
        }
        sums[5 * (uint64_t)block + threadIdx.x] = mine;
    }
}
