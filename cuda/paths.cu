// Stores paths. Models, tables and source: kernels/paths.rs; the generator: cuda/paths.cuh.
//   paths          grid  ⌈P / WG⌉                       thread = path
//                  writes spot, and what `store` names of variance, events, future [P,T+1], TIMES times of WG paths at once
//   paths_assets   grid  ⌈P·N / WG⌉, N in `market`      thread = path and asset, which draws the normals of the assets before it, too
//                  writes spot [P,T+1,N], events [P,T+1]
//   paths_moments  grid  blocks·⌈T/4⌉·factors           block = BLOCK paths, four steps, a factor of `store`
//                  writes sums [blocks,factors,T,2] of z and z²

struct PathsParams {
    uint32_t paths;
    uint32_t t;
    uint32_t market;
    uint32_t first;
    uint32_t first_high;
    uint32_t store;
};

// Times that a block holds before it writes them, so that neighbouring threads write neighbouring times of a path.
#define TIMES 16u

// Writes times `from` … of the block's paths; `first` is its first path.
template <class T>
__device__ __forceinline__ void write_times(T* __restrict__ out, const T (&tile)[WG][TIMES + 1], uint32_t first, uint32_t from, const PathsParams& params) {
    const uint32_t bars = params.t + 1, column = threadIdx.x % TIMES;
    for (uint32_t r = threadIdx.x / TIMES; r < WG && first + r < params.paths; r += WG / TIMES) {
        if (from + column < bars) {
            out[(uint64_t)(first + r) * bars + from + column] = tile[r][column];
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    paths(const float* __restrict__ market, const uint32_t* __restrict__ market_words, float* __restrict__ spot, float* __restrict__ variance,
          uint32_t* __restrict__ events, float* __restrict__ future, PathsParams params) {
    __shared__ float sh_spot[WG][TIMES + 1], sh_variance[WG][TIMES + 1], sh_future[WG][TIMES + 1];
    __shared__ uint32_t sh_events[WG][TIMES + 1];
    const uint32_t tid = threadIdx.x, first = group_index() * WG;
    const bool active = first + tid < params.paths;
    const PathMarket m = path_market(market, market_words, params.market);
    const uint64_t path = ((uint64_t)params.first_high << 32 | params.first) + (active ? first + tid : 0);
    PathState s = path_start(m, path);
    PathDraws d;
    for (uint32_t from = 0; from <= params.t; from += TIMES) {
        for (uint32_t quad = from / 4; quad < from / 4 + TIMES / 4 && 4 * quad <= params.t; quad++) {
            d = path_draws(m, path, quad);
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t t = 4 * quad + i, column = t - from;
                if (t <= params.t) {
                    sh_spot[tid][column] = path_spot(m, s);
                    if (params.store & 1) {
                        sh_variance[tid][column] = s.v;
                    }
                    if (params.store & 2) {
                        sh_events[tid][column] = path_event(s);
                    }
                    if (params.store & 4) {
                        sh_future[tid][column] = path_future(m, s);
                    }
                }
                if (t < params.t) {
                    s = path_step(m, s, d, t);
                }
            }
        }
        __syncthreads();
        write_times(spot, sh_spot, first, from, params);
        if (params.store & 1) {
            write_times(variance, sh_variance, first, from, params);
        }
        if (params.store & 2) {
            write_times(events, sh_events, first, from, params);
        }
        if (params.store & 4) {
            write_times(future, sh_future, first, from, params);
        }
        __syncthreads();
    }
}

// ---- several assets -------------------------------------------------------------------------------------------------------

#if PATH_KIND == REGIMES || PATH_KIND == BOOTSTRAP
extern "C" __global__ void __launch_bounds__(WG)
    paths_assets(const float* __restrict__ market, const uint32_t* __restrict__ market_words, float* __restrict__ spot,
                 uint32_t* __restrict__ events, PathsParams params) {
    const uint32_t n = params.market;
    const uint64_t index = (uint64_t)group_index() * WG + threadIdx.x;
    const uint32_t row = (uint32_t)(index / n), asset = (uint32_t)(index % n);
    if (row >= params.paths) {
        return;
    }
    PathMarket m = path_market(market, market_words, 0);
    m.spot = market[m.tail + asset];
    const float* __restrict__ tail = market + m.tail + n;
    const uint64_t path = ((uint64_t)params.first_high << 32 | params.first) + row;
    const bool stored = asset == 0 && (params.store & 2) != 0;
    PathState s = path_start(m, path);
    uint64_t at = (uint64_t)row * (params.t + 1);
    spot[at * n + asset] = path_spot(m, s);
    if (stored) {
        events[at] = path_event(s);
    }
    for (uint32_t quad = 0; 4 * quad < params.t; quad++) {
        float moves[4];
        uint32_t next[4];
        if (PATH_KIND == REGIMES) {
            uint32_t w[4];
            path_words(m, path, quad, FACTOR_REGIME, w);
            const float* own[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* regime = tail + (uint64_t)s.regime * (n + n * (n + 1) / 2);
                moves[i] = regime[asset];
                own[i] = regime + n + asset * (asset + 1) / 2;
                s.regime = path_reached(m, m.table + (m.entries - 1) * (1 + s.regime), m.entries - 1, w[i]);
                next[i] = s.regime;
            }
            for (uint32_t j = 0; j <= asset; j++) {
                float z[4];
                path_normals(m, path, quad, FACTOR_SPOT + j, j, z);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    moves[i] = fmaf(z[i], own[i][j], moves[i]);
                }
            }
        } else {
            uint32_t ends[4], starts[4];
            path_words(m, path, quad, FACTOR_RESTART, ends);
            path_words(m, path, quad, FACTOR_BLOCK, starts);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s.at = path_bar(m, s.at, ends[i], starts[i], 4 * quad + i);
                next[i] = s.at;
                moves[i] = tail[asset] + tail[(uint64_t)n * (1 + s.at) + asset];
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (4 * quad + i < params.t) {
                s.x += moves[i];
                at++;
                spot[at * n + asset] = path_spot(m, s);
                if (stored) {
                    events[at] = next[i];
                }
            }
        }
    }
}
#endif

// ---- moments --------------------------------------------------------------------------------------------------------------

#if MODEL == 0
#define BLOCK 2048u

extern "C" __global__ void __launch_bounds__(WG)
    paths_moments(const float* __restrict__ market, const uint32_t* __restrict__ market_words, float* __restrict__ sums, PathsParams params) {
    const uint32_t group = group_index(), quads = (params.t + 3) / 4;
    const uint32_t quad = group % quads, slot = group / quads % params.store, block = group / (quads * params.store);
    PathMarket m = path_market(market, market_words, 0);
    m.matched = 0;
    const uint32_t factor = slot == 0 || market_words[13] != 0 ? FACTOR_SPOT + slot : FACTOR_BASIS;
    float total[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    const uint64_t last = min((uint64_t)params.paths, (uint64_t)(block + 1) * BLOCK);
    for (uint64_t row = (uint64_t)block * BLOCK + threadIdx.x; row < last; row += WG) {
        float z[4];
        path_normals(m, ((uint64_t)params.first_high << 32 | params.first) + row, quad, factor, 0, z);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            total[2 * i] += z[i];
            total[2 * i + 1] = fmaf(z[i], z[i], total[2 * i + 1]);
        }
    }
    block_sum(total);
    if (threadIdx.x == 0 && (uint64_t)block * BLOCK < params.paths) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (4 * quad + i < params.t) {
                const uint64_t at = 2 * (((uint64_t)block * params.store + slot) * params.t + 4 * quad + i);
                sums[at] = total[2 * i];
                sums[at + 1] = total[2 * i + 1];
            }
        }
    }
}
#endif
