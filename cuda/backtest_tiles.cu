// Back-tests of long-or-flat sets, a tile of 512 per block and a span of bars. Maths, shapes and source: kernels/backtest_tiles.rs.
//   keys_by_row             grid  A·⌈T/32⌉·⌈rows/32⌉   block 256   a 32 × 32 block through shared memory
//   backtest_band_states    grid  A·spans·tiles        block WG    decide: lane = set of a word, one vote a bar; follow: thread = word
//   backtest_cross, _band   grid  A·spans·tiles        block WG    decide: lane = set of a word, one vote a bar; earn: thread = 8 sets
//   backtest_join           grid  A·⌈sets/WG⌉          block WG    thread = set, sequential over spans
// Net returns and their sums must have the bits of the CPU column, because they select: nothing is left to contract.
// Eight sets a thread hold 96 to 112 registers of sums; 6 blocks of 64 threads an SM leave 168 a thread (with 8 blocks, 128 each, NVRTC spilled
// 56 to 280 bytes).

struct TilesParams {
    uint32_t a;
    uint32_t t;
    uint32_t rows;
    uint32_t tiles;
    uint32_t edges;
    uint32_t spans;
    uint32_t lag;
    uint32_t start;
    uint32_t shift;
    uint32_t mask;
    float cost;
    float cost_low;
    uint32_t set_tiles;
    uint32_t row_stride;
    uint32_t bar_stride;
};

#define BARS 64
#define WORDS 16
#define HEAD 8
#define PARTS 11
#define STATS 5
#define SET_TILE 64
#define BLOCK 128
#define SETS 8
#define SCALE_BIAS 512
#define NONE 0xffffffffu
#define ALL 0xffffffffu

// ---- keys, bar after bar of each row ----------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) keys_by_row(const uint32_t* __restrict__ keys, uint32_t* __restrict__ by_row, TilesParams params) {
    __shared__ uint32_t sh_block[32 * 33];
    const uint32_t group = group_index(), lane = threadIdx.x % 32;
    const uint32_t across = (params.rows + 31) / 32, down = (params.t + 31) / 32;
    if (group >= params.a * down * across) {
        return;
    }
    const uint32_t row = group % across * 32, bar = group / across % down * 32;
    const uint32_t asset = group / (across * down) * params.t * params.rows;
    for (uint32_t i = threadIdx.x / 32; i < 32; i += WG / 32) {
        if (bar + i < params.t && row + lane < params.rows) {
            sh_block[i * 33 + lane] = keys[asset + (bar + i) * params.rows + row + lane];
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x / 32; i < 32; i += WG / 32) {
        if (row + i < params.rows && bar + lane < params.t) {
            by_row[asset + (row + i) * params.t + bar + lane] = sh_block[lane * 33 + i];
        }
    }
}

// ---- decide -----------------------------------------------------------------------------------------------------

// What a lane needs of its set: where its keys are, how they are compared, and from when on.
struct Lane {
    const uint32_t* __restrict__ a;
    const uint32_t* __restrict__ b;
    uint32_t threshold_a;
    uint32_t threshold_b;
    uint32_t first;
};

template <bool CROSSING>
__device__ __forceinline__ Lane lane_of(const TilesParams& params, const uint32_t* keys, const uint32_t* __restrict__ lattice, uint32_t word, uint32_t lane) {
    const uint32_t* __restrict__ head = lattice + word * HEAD;
    const uint32_t first = lattice[params.tiles * WORDS * HEAD + (word * 32 + lane) * 2 + 1];
    const uint32_t row = CROSSING ? min(head[1] + lane, head[6]) : head[6];
    const uint32_t threshold = CROSSING ? 0 : lattice[head[1] + lane];
    const bool list_is_b = head[0] == 1;
    const uint32_t row_a = list_is_b ? head[2] : row, row_b = list_is_b ? row : head[2];
    const uint32_t threshold_a = list_is_b ? head[3] : threshold, threshold_b = list_is_b ? threshold : head[3];
    return {keys + row_a * params.row_stride, keys + row_b * params.row_stride, threshold_a, threshold_b, first};
}

// Enter and leave bits of the bars base to end of a tile; warp w decides its half of the words, a vote a bar.
template <bool CROSSING>
__device__ __forceinline__ void decide(const TilesParams& params, const uint32_t* keys, const uint32_t* lattice, uint32_t tile, uint32_t base,
                                       uint32_t end, uint32_t (&enter)[BARS][WORDS], uint32_t (&leave)[CROSSING ? 1 : BARS][WORDS]) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t from = max(base, params.lag);
    for (uint32_t word = threadIdx.x / 32 * (WORDS / 2); word < (threadIdx.x / 32 + 1) * (WORDS / 2); word++) {
        const Lane s = lane_of<CROSSING>(params, keys, lattice, tile * WORDS + word, lane);
        for (uint32_t j = from; j < end; j++) {
            const uint32_t t = j - params.lag;
            const uint32_t a = __ldg(s.a + t * params.bar_stride), b = __ldg(s.b + t * params.bar_stride);
            const bool in = CROSSING ? a > b : (a ^ params.mask) > s.threshold_a;
            const uint32_t enters = __ballot_sync(ALL, in && t >= s.first);
            const uint32_t leaves = CROSSING ? 0 : __ballot_sync(ALL, b > s.threshold_b);
            if (lane == 0) {
                enter[j - base][word] = enters;
                if (!CROSSING) {
                    leave[j - base][word] = leaves;
                }
            }
        }
    }
}

struct Place {
    uint32_t a;
    uint32_t span;
    uint32_t tile;
};

__device__ __forceinline__ Place place_of(const TilesParams& params, uint32_t group) {
    return {group / (params.spans * params.tiles), group / params.tiles % params.spans, group % params.tiles};
}

__device__ __forceinline__ uint32_t cut(const TilesParams& params, const uint32_t* plan, uint32_t span) {
    return plan[params.edges + params.a + span];
}

// ---- states of the band machine over a span, from both starts ---------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    backtest_band_states(const uint32_t* __restrict__ keys, const uint32_t* __restrict__ lattice, const uint32_t* __restrict__ plan,
                         uint32_t* __restrict__ states, TilesParams params) {
    __shared__ uint32_t sh_enter[BARS][WORDS], sh_leave[BARS][WORDS];
    const uint32_t group = group_index(), tid = threadIdx.x;
    if (group >= params.a * params.spans * params.tiles) {
        return;
    }
    const Place place = place_of(params, group);
    const uint32_t to_bar = cut(params, plan, place.span + 1);
    uint32_t from_out = 0, from_in = ALL;
    for (uint32_t base = cut(params, plan, place.span); base < to_bar; base += BARS) {
        const uint32_t end = min(base + BARS, to_bar);
        __syncthreads();
        decide<false>(params, keys + place.a * params.t * params.rows, lattice, place.tile, base, end, sh_enter, sh_leave);
        __syncthreads();
        if (tid < WORDS) {
            for (uint32_t j = max(params.lag, base); j < end; j++) {
                const uint32_t enter = sh_enter[j - base][tid], leave = sh_leave[j - base][tid];
                from_out = (enter & ~from_out) | (from_out & ~leave);
                from_in = (enter & ~from_in) | (from_in & ~leave);
            }
        }
    }
    if (tid < WORDS) {
        states[(group * WORDS + tid) * 2] = from_out;
        states[(group * WORDS + tid) * 2 + 1] = from_in;
    }
}

// ---- earn ---------------------------------------------------------------------------------------------------------

// A thread's sets: plain sums of a block, then what lasts over the span.
struct Sets {
    float sum[SETS];
    float square[SETS];
    float growth[SETS];
    float level[SETS];
    float lowest[SETS];
    float path[SETS];
    float least[SETS];
    uint32_t trades[SETS];
    int64_t sums[SETS];
    uint64_t squares[SETS];
    float mantissa[SETS];
    int exponent[SETS];
};

// One bar. The span's path from its start and the least of it are kept only where spans are joined.
template <bool JOINED>
__device__ __forceinline__ void earn(Sets& x, float r, float cost, uint32_t held, uint32_t changed) {
#pragma unroll
    for (int k = 0; k < SETS; k++) {
        const bool trade = (changed >> k & 1) != 0;
        const float net = ((held >> k & 1) != 0 ? r : 0.0f) - (trade ? cost : 0.0f);
        x.trades[k] += trade ? 1 : 0;
        x.sum[k] += net;
        x.square[k] = fmaf(net, net, x.square[k]);
        x.growth[k] = fmaf(x.growth[k], net, x.growth[k]);
        x.level[k] = fminf(fmaf(x.level[k], net, x.level[k]), 1.0f);
        x.lowest[k] = fminf(x.lowest[k], x.level[k]);
        if (JOINED) {
            x.path[k] = fmaf(x.path[k], net, x.path[k]);
            x.least[k] = fminf(x.least[k], x.path[k]);
        }
    }
}

// Moves a block's plain sums into the exact ones.
__device__ __forceinline__ void flush(Sets& x, int shift, int scale) {
#pragma unroll
    for (int k = 0; k < SETS; k++) {
        x.sums[k] += to_fixed(x.sum[k], shift - scale);
        x.squares[k] += (uint64_t)to_fixed(x.square[k], shift - 2 * scale);
        int power = 0;
        x.mantissa[k] = frexpf(x.mantissa[k] * x.growth[k], &power);
        x.exponent[k] += power;
        x.sum[k] = x.square[k] = 0.0f;
        x.growth[k] = 1.0f;
    }
}

__device__ __forceinline__ void put_prefixes(const TilesParams& params, const uint32_t* __restrict__ slots, uint32_t* __restrict__ prefix, uint32_t a,
                                             uint32_t edge, const Sets& x) {
#pragma unroll
    for (int k = 0; k < SETS; k++) {
        const uint32_t set = slots[2 * k];
        if (set != NONE) {
            uint32_t* __restrict__ out = prefix + ((a * params.set_tiles + set / SET_TILE) * params.edges + edge) * 4 * SET_TILE + set % SET_TILE;
            out[0] = (uint32_t)x.sums[k];
            out[SET_TILE] = (uint32_t)((uint64_t)x.sums[k] >> 32);
            out[2 * SET_TILE] = (uint32_t)x.squares[k];
            out[3 * SET_TILE] = (uint32_t)(x.squares[k] >> 32);
        }
    }
}

__device__ __forceinline__ void put_parts(const TilesParams& params, const uint32_t* __restrict__ slots, uint32_t* __restrict__ parts, uint32_t a,
                                          uint32_t span, const Sets& x) {
    const uint32_t sets = params.set_tiles * SET_TILE;
#pragma unroll
    for (int k = 0; k < SETS; k++) {
        const uint32_t set = slots[2 * k];
        if (set != NONE) {
            uint32_t* __restrict__ out = parts + (a * params.spans + span) * PARTS * sets + set;
            out[0] = (uint32_t)x.sums[k];
            out[sets] = (uint32_t)((uint64_t)x.sums[k] >> 32);
            out[2 * sets] = (uint32_t)x.squares[k];
            out[3 * sets] = (uint32_t)(x.squares[k] >> 32);
            out[4 * sets] = x.trades[k];
            out[5 * sets] = __float_as_uint(x.mantissa[k]);
            out[6 * sets] = (uint32_t)x.exponent[k];
            out[7 * sets] = __float_as_uint(x.level[k]);
            out[8 * sets] = __float_as_uint(x.lowest[k]);
            out[9 * sets] = __float_as_uint(x.path[k]);
            out[10 * sets] = __float_as_uint(x.least[k]);
        }
    }
}

// A whole span.
template <bool CROSSING, bool JOINED>
__device__ __forceinline__ void simulate(const float* __restrict__ returns, const uint32_t* __restrict__ keys, const uint32_t* __restrict__ lattice,
                                         const uint32_t* __restrict__ plan, const uint32_t* __restrict__ states, uint32_t* __restrict__ parts,
                                         uint32_t* __restrict__ prefix, const TilesParams& params, uint32_t group) {
    __shared__ uint32_t sh_enter[BARS][WORDS], sh_leave[CROSSING ? 1 : BARS][WORDS];
    __shared__ float sh_return[BARS];
    const uint32_t tid = threadIdx.x;
    const Place place = place_of(params, group);
    const uint32_t a = place.a, word = tid / 4, turn = tid % 4 * 8;
    const uint32_t* __restrict__ asset = keys + a * params.t * params.rows;
    const float* __restrict__ earned = returns + a * (params.t - 1);
    const uint32_t* __restrict__ slots = lattice + params.tiles * WORDS * HEAD + (place.tile * WORDS * 32 + tid * SETS) * 2;
    const int scale = (int)plan[params.edges + a] - SCALE_BIAS, shift = (int)params.shift;
    const uint32_t from_bar = cut(params, plan, place.span), to_bar = cut(params, plan, place.span + 1);

    // inside: where the machine is; held: what of it counts
    uint32_t inside = 0;
    if (CROSSING) {
        // its state before the span is that of the bar before
        if (from_bar > params.lag) {
            decide<CROSSING>(params, asset, lattice, place.tile, from_bar - 1, from_bar, sh_enter, sh_leave);
        }
        __syncthreads();
        inside = from_bar > params.lag ? sh_enter[0][word] : 0;
    } else {
        for (uint32_t span = 0; span < place.span; span++) {
            const uint32_t* __restrict__ f = states + (((a * params.spans + span) * params.tiles + place.tile) * WORDS + word) * 2;
            inside = (f[0] & ~inside) | (f[1] & inside);
        }
    }
    inside >>= turn;
    uint32_t held = from_bar > params.start ? inside : 0;

    Sets x;
#pragma unroll
    for (int k = 0; k < SETS; k++) {
        x.sum[k] = x.square[k] = 0.0f;
        x.growth[k] = x.level[k] = x.lowest[k] = x.path[k] = x.least[k] = x.mantissa[k] = 1.0f;
        x.trades[k] = 0;
        x.sums[k] = 0;
        x.squares[k] = 0;
        x.exponent[k] = 0;
    }
    uint32_t edge = 0;
    while (edge < params.edges && plan[edge] <= from_bar && from_bar > 0) {
        edge++;
    }
    // an edge at bar 0 has nothing before it
    if (edge < params.edges && plan[edge] == from_bar) {
        put_prefixes(params, slots, prefix, a, edge, x);
        edge++;
    }
    uint32_t begun = from_bar;
    for (uint32_t base = from_bar; base < to_bar; base += BARS) {
        const uint32_t end = min(base + BARS, to_bar);
        __syncthreads();
        decide<CROSSING>(params, asset, lattice, place.tile, base, end, sh_enter, sh_leave);
        if (base + tid < end) {
            sh_return[tid] = earned[base + tid];
        }
        __syncthreads();
        for (uint32_t j = base; j < end;) {
            const uint32_t next = min(min(begun + BLOCK, to_bar), edge < params.edges ? plan[edge] : to_bar);
            const uint32_t stop = min(end, next);
            for (; j < stop; j++) {
                if (j >= params.lag) {
                    const uint32_t enter = sh_enter[j - base][word] >> turn;
                    inside = CROSSING ? enter : (enter & ~inside) | (inside & ~(sh_leave[CROSSING ? 0 : j - base][word] >> turn));
                }
                const uint32_t now = j >= params.start ? inside : 0;
                const uint32_t changed = now ^ held;
                held = now;
                earn<JOINED>(x, sh_return[j - base], params.cost, held, changed);
            }
            if (j == next) {
                flush(x, shift, scale);
                begun = j;
                if (edge < params.edges && plan[edge] == j) {
                    put_prefixes(params, slots, prefix, a, edge, x);
                    edge++;
                }
            }
        }
    }
    put_parts(params, slots, parts, a, place.span, x);
}

extern "C" __global__ void __launch_bounds__(WG, 6)
    backtest_cross(const uint32_t* __restrict__ keys, const uint32_t* __restrict__ lattice, const uint32_t* __restrict__ plan,
                   const float* __restrict__ returns, const uint32_t* __restrict__ states, uint32_t* __restrict__ parts, uint32_t* __restrict__ prefix,
                   TilesParams params) {
    const uint32_t group = group_index();
    if (group >= params.a * params.spans * params.tiles) {
        return;
    }
    if (params.spans > 1) {
        simulate<true, true>(returns, keys, lattice, plan, states, parts, prefix, params, group);
    } else {
        simulate<true, false>(returns, keys, lattice, plan, states, parts, prefix, params, group);
    }
}

extern "C" __global__ void __launch_bounds__(WG, 6)
    backtest_band(const uint32_t* __restrict__ keys, const uint32_t* __restrict__ lattice, const uint32_t* __restrict__ plan,
                  const float* __restrict__ returns, const uint32_t* __restrict__ states, uint32_t* __restrict__ parts, uint32_t* __restrict__ prefix,
                  TilesParams params) {
    const uint32_t group = group_index();
    if (group >= params.a * params.spans * params.tiles) {
        return;
    }
    if (params.spans > 1) {
        simulate<false, true>(returns, keys, lattice, plan, states, parts, prefix, params, group);
    } else {
        simulate<false, false>(returns, keys, lattice, plan, states, parts, prefix, params, group);
    }
}

// ---- join ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t word64(const uint32_t* __restrict__ at, uint32_t stride) {
    return at[0] | (uint64_t)at[stride] << 32;
}

// Adds what came before the span to its part of a prefix.
__device__ __forceinline__ void lift(uint32_t* __restrict__ at, uint64_t base) {
    const uint64_t x = word64(at, SET_TILE) + base;
    at[0] = (uint32_t)x;
    at[SET_TILE] = (uint32_t)(x >> 32);
}

extern "C" __global__ void __launch_bounds__(WG)
    backtest_join(const uint32_t* __restrict__ parts, const uint32_t* __restrict__ plan, float* __restrict__ stats, uint32_t* __restrict__ prefix,
                  TilesParams params) {
    const uint32_t group = group_index(), tid = threadIdx.x;
    if (group >= params.a * params.set_tiles) {
        return;
    }
    const uint32_t a = group / params.set_tiles, sets = params.set_tiles * SET_TILE;
    const uint32_t set = group % params.set_tiles * SET_TILE + tid;
    int64_t sums = 0;
    uint64_t squares = 0;
    uint32_t trades = 0, edge = 0;
    float mantissa = 1.0f, level = 1.0f, lowest = 1.0f;
    int exponent = 0;
    for (uint32_t span = 0; span < params.spans; span++) {
        const uint32_t to_bar = cut(params, plan, span + 1);
        for (; edge < params.edges && plan[edge] <= to_bar; edge++) {
            if (span > 0) {
                uint32_t* __restrict__ at = prefix + (group * params.edges + edge) * 4 * SET_TILE + tid;
                lift(at, (uint64_t)sums);
                lift(at + 2 * SET_TILE, squares);
            }
        }
        const uint32_t* __restrict__ part = parts + (a * params.spans + span) * PARTS * sets + set;
        sums += (int64_t)word64(part, sets);
        squares += word64(part + 2 * sets, sets);
        trades += part[4 * sets];
        int power = 0;
        mantissa = frexpf(mantissa * __uint_as_float(part[5 * sets]), &power);
        exponent += (int)part[6 * sets] + power;
        lowest = fminf(lowest, fminf(__uint_as_float(part[8 * sets]), level * __uint_as_float(part[10 * sets])));
        level = fminf(__uint_as_float(part[7 * sets]), level * __uint_as_float(part[9 * sets]));
    }
    const uint32_t bars = params.t - 1, counted = max(bars, params.start) - params.start;
    float* __restrict__ out = stats + group * STATS * SET_TILE + tid;
    out[0] = sharpe_of(counted, sums, scaled_variance(counted, sums, squares, params.shift));
    out[SET_TILE] = ldexpf(mantissa, exponent) - 1.0f;
    out[2 * SET_TILE] = 1.0f - lowest;
    out[3 * SET_TILE] = (float)trades;
    out[4 * SET_TILE] = (float)trades;
}
