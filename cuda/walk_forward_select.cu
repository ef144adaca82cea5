// Walk-forward selection from exact prefix sums. Maths, shapes and source: kernels/walk_forward_select.rs.
//   walk_forward_select   grid  slots·W                  block WG      threads stride over sets, tree of (key, index)
//   walk_forward_scores   grid  ⌈A·W·tiles·TILE / WG⌉    block WG      thread = (asset, window, set)

struct SelectParams {
    uint32_t a;
    uint32_t pooled;
    uint32_t w;
    uint32_t tiles;
    uint32_t edges;
    uint32_t sets;
    uint32_t first;
    uint32_t shift;
};

#define TILE 64
#define SET_WORDS 16
#define NONE 0xffffffffu

struct Sums {
    int64_t sum;
    uint64_t square;
};

// Exact sum and sum of squares between two edges of one asset and set.
__device__ __forceinline__ Sums between(const uint32_t* __restrict__ prefix, const SelectParams& params, uint32_t a, uint32_t index, uint32_t from_edge,
                                        uint32_t to_edge) {
    const uint32_t tile = (a * params.tiles + index / TILE) * params.edges;
    const uint32_t lane = index % TILE;
    const uint32_t* __restrict__ from = prefix + (tile + from_edge) * 4 * TILE + lane;
    const uint32_t* __restrict__ to = prefix + (tile + to_edge) * 4 * TILE + lane;
    const auto pair = [](const uint32_t* at) { return __ldg(at) | ((uint64_t)__ldg(at + TILE) << 32); };
    return {(int64_t)(pair(to) - pair(from)), pair(to + 2 * TILE) - pair(from + 2 * TILE)};
}

// ---- selection ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    walk_forward_select(const uint32_t* __restrict__ prefix, const uint32_t* __restrict__ spans, const uint32_t* __restrict__ sets,
                        uint32_t* __restrict__ best, uint32_t* __restrict__ chosen, SelectParams params) {
    __shared__ uint64_t sh_best[WG / 32];
    const uint32_t group = group_index(), tid = threadIdx.x;
    if (group >= params.a / params.pooled * params.w) {
        return;
    }
    const uint32_t window = group % params.w;
    const uint32_t from_asset = group / params.w * params.pooled;
    const uint32_t from_edge = spans[4 * window], to_edge = spans[4 * window + 1];
    const uint64_t n = (uint64_t)spans[4 * window + 2] * params.pooled;

    // each thread's best, as key above complement of index: the largest has the largest key, then the lowest index; 0 is none
    uint64_t winner = 0;
    for (uint32_t index = tid; index < params.sets; index += WG) {
        Sums total = {0, 0};
        for (uint32_t a = from_asset; a < from_asset + params.pooled; a++) {
            const Sums part = between(prefix, params, a, index, from_edge, to_edge);
            total.sum += part.sum;
            total.square += part.square;
        }
        uint32_t key = 0;
        if (n >= 2) {
            const uint128 variance = scaled_variance(n, total.sum, total.square, params.shift);
            if (!is_zero128(variance)) {
                const uint64_t size = magnitude64(total.sum);
                key = ratio_key(mul64(size, size), variance, total.sum < 0);
            }
        }
        winner = max(winner, ((uint64_t)key << 32) | ~index);
    }

    // tree: larger key, then lower index
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        winner = max(winner, __shfl_xor_sync(0xffffffffu, winner, lanes));
    }
    if (tid % 32 == 0) {
        sh_best[tid / 32] = winner;
    }
    __syncthreads();
    // against earlier chunks
    if (tid == 0) {
        for (int warp = 1; warp < WG / 32; warp++) {
            winner = max(winner, sh_best[warp]);
        }
        const uint32_t key = (uint32_t)(winner >> 32), index = ~(uint32_t)winner;
        if (index != NONE && (best[2 * group + 1] == NONE || key > best[2 * group])) {
            best[2 * group] = key;
            best[2 * group + 1] = params.first + index;
            for (uint32_t i = 0; i < SET_WORDS; i++) {
                chosen[group * SET_WORDS + i] = sets[index * SET_WORDS + i];
            }
        }
    }
}

// ---- scores -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    walk_forward_scores(const uint32_t* __restrict__ prefix, const uint32_t* __restrict__ spans, float* __restrict__ scores, SelectParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    const uint32_t lanes = params.tiles * TILE;
    if (at >= params.a * params.w * lanes) {
        return;
    }
    const uint32_t index = at % lanes, row = at / lanes;
    const uint32_t window = row % params.w;
    for (uint32_t part = 0; part < 2; part++) {
        const uint32_t span = 4 * (2 * window + part);
        const Sums total = between(prefix, params, row / params.w, index, spans[span], spans[span + 1]);
        const uint32_t n = spans[span + 2];
        scores[(row * 2 + part) * lanes + index] = sharpe_of(n, total.sum, scaled_variance(n, total.sum, total.square, params.shift));
    }
}
