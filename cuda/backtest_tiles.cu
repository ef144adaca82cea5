// Back-tests of sets without stops, a tile of 512 or 256 per block and a span of bars. Maths, shapes and source: kernels/backtest_tiles.rs.
//   keys_by_row             grid  A·⌈T/32⌉·⌈rows/32⌉   block 256   a 32 × 32 block through shared memory
//   backtest_band_states    grid  A·spans·tiles        block WG    decide: lane = set of a word, one vote a bar; follow: thread = word
//   backtest_cross, _band   grid  A·spans·tiles        block WG    decide: lane = set of a word, one vote a bar; earn: thread = 8 sets
//   backtest_sized          grid  A·spans·tiles        block WG    decide: lane = set of a word, one vote a bar; earn: thread = 4 sets
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
    uint32_t words;
    uint32_t mode;
    uint32_t volatility_rows;
    uint32_t details;
};

#define BARS 64
#define WORDS 16
#define HEAD 8
#define PARTS 12
#define STATS 5
#define SET_TILE 64
#define BLOCK 128
#define SETS 8
#define SIZED_SETS 4
#define SIZED_WORDS 8
#define DETAILS 4
#define CROSS 0
#define BAND 1
#define MOMENTUM 2
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

template <int MODE>
__device__ __forceinline__ Lane lane_of(const TilesParams& params, const uint32_t* keys, const uint32_t* __restrict__ lattice, uint32_t word, uint32_t lane) {
    const uint32_t* __restrict__ head = lattice + word * HEAD;
    const uint32_t first = lattice[params.words * HEAD + (word * 32 + lane) * 2 + 1];
    const uint32_t row = MODE == CROSS ? min(head[1] + lane, head[6]) : head[6];
    const uint32_t threshold = MODE == BAND ? lattice[head[1] + lane] : 0;
    const bool list_is_b = head[0] == 1;
    const uint32_t row_a = list_is_b ? head[2] : row, row_b = list_is_b ? row : head[2];
    const uint32_t threshold_a = list_is_b ? head[3] : threshold, threshold_b = list_is_b ? threshold : head[3];
    return {keys + row_a * params.row_stride, keys + row_b * params.row_stride, threshold_a, threshold_b, first};
}

// Enter bits, and leave bits if BOTH, of the bars base to end of a tile of WORDS_ words; each warp decides its half, a vote a bar.
template <int MODE, bool BOTH, int WORDS_>
__device__ __forceinline__ void decide(const TilesParams& params, const uint32_t* keys, const float* __restrict__ close, const uint32_t* lattice,
                                       uint32_t tile, uint32_t base, uint32_t end, uint32_t (&enter)[BARS][WORDS_],
                                       uint32_t (&leave)[BOTH ? BARS : 1][WORDS_]) {
    const uint32_t lane = threadIdx.x % 32, half = threadIdx.x / 32 * (WORDS_ / 2);
    const uint32_t from = max(base, params.lag);
    for (uint32_t word = half; word < half + WORDS_ / 2; word++) {
        const Lane s = lane_of<MODE>(params, keys, lattice, tile * WORDS_ + word, lane);
        const uint32_t lookback = lattice[(tile * WORDS_ + word) * HEAD + 2];
        for (uint32_t j = from; j < end; j++) {
            const uint32_t t = j - params.lag;
            const bool legal = t >= s.first;
            bool in, out;
            if (MODE == MOMENTUM) {
                const float now = __ldg(close + t), then = __ldg(close + t - min(t, lookback));
                in = now > then;
                out = now < then;
            } else {
                const uint32_t a = __ldg(s.a + t * params.bar_stride), b = __ldg(s.b + t * params.bar_stride);
                in = MODE == CROSS ? a > b : (a ^ params.mask) > s.threshold_a;
                out = MODE == CROSS ? !in : b > s.threshold_b;
            }
            const uint32_t enters = __ballot_sync(ALL, in && legal);
            const uint32_t leaves = BOTH ? __ballot_sync(ALL, out && legal) : 0;
            if (lane == 0) {
                enter[j - base][word] = enters;
                if (BOTH) {
                    leave[BOTH ? j - base : 0][word] = leaves;
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
        decide<BAND, true, WORDS>(params, keys + place.a * params.t * params.rows, nullptr, lattice, place.tile, base, end, sh_enter, sh_leave);
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

// N sets of a thread: plain sums of a block, then what lasts over the span.
template <int N>
struct Sets {
    float sum[N];
    float square[N];
    float growth[N];
    float level[N];
    float lowest[N];
    float path[N];
    float least[N];
    uint32_t trades[N];
    int64_t sums[N];
    uint64_t squares[N];
    float mantissa[N];
    int exponent[N];

    __device__ __forceinline__ Sets() {
#pragma unroll
        for (int k = 0; k < N; k++) {
            sum[k] = square[k] = 0.0f;
            growth[k] = level[k] = lowest[k] = path[k] = least[k] = mantissa[k] = 1.0f;
            trades[k] = 0;
            sums[k] = 0;
            squares[k] = 0;
            exponent[k] = 0;
        }
    }
};

// One bar's net return of a set. The span's path from its start and the least of it are kept only where spans are joined.
template <bool JOINED, int N>
__device__ __forceinline__ void add(Sets<N>& x, int k, float net, bool traded) {
    x.trades[k] += traded ? 1 : 0;
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

// Moves a block's plain sums into the exact ones.
template <int N>
__device__ __forceinline__ void flush(Sets<N>& x, int shift, int scale) {
#pragma unroll
    for (int k = 0; k < N; k++) {
        x.sums[k] += to_fixed(x.sum[k], shift - scale);
        x.squares[k] += (uint64_t)to_fixed(x.square[k], shift - 2 * scale);
        int power = 0;
        x.mantissa[k] = frexpf(x.mantissa[k] * x.growth[k], &power);
        x.exponent[k] += power;
        x.sum[k] = x.square[k] = 0.0f;
        x.growth[k] = 1.0f;
    }
}

template <int N>
__device__ __forceinline__ void put_prefixes(const TilesParams& params, const uint32_t* __restrict__ slots, uint32_t* __restrict__ prefix, uint32_t a,
                                             uint32_t edge, const Sets<N>& x) {
#pragma unroll
    for (int k = 0; k < N; k++) {
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

template <int N>
__device__ __forceinline__ void put_parts(const TilesParams& params, const uint32_t* __restrict__ slots, uint32_t* __restrict__ parts, uint32_t a,
                                          uint32_t span, const Sets<N>& x, const float (&turnover)[N]) {
    const uint32_t sets = params.set_tiles * SET_TILE;
#pragma unroll
    for (int k = 0; k < N; k++) {
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
            out[11 * sets] = __float_as_uint(turnover[k]);
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
    const uint32_t* __restrict__ slots = lattice + params.words * HEAD + (place.tile * WORDS * 32 + tid * SETS) * 2;
    const int scale = (int)plan[params.edges + a] - SCALE_BIAS, shift = (int)params.shift;
    const uint32_t from_bar = cut(params, plan, place.span), to_bar = cut(params, plan, place.span + 1);

    // inside: where the machine is; held: what of it counts
    uint32_t inside = 0;
    if (CROSSING) {
        // its state before the span is that of the bar before
        if (from_bar > params.lag) {
            decide<CROSSING ? CROSS : BAND, !CROSSING, WORDS>(params, asset, nullptr, lattice, place.tile, from_bar - 1, from_bar, sh_enter, sh_leave);
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

    Sets<SETS> x;
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
        decide<CROSSING ? CROSS : BAND, !CROSSING, WORDS>(params, asset, nullptr, lattice, place.tile, base, end, sh_enter, sh_leave);
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
                const float r = sh_return[j - base];
#pragma unroll
                for (int k = 0; k < SETS; k++) {
                    const bool trade = (changed >> k & 1) != 0;
                    add<JOINED>(x, k, ((held >> k & 1) != 0 ? r : 0.0f) - (trade ? params.cost : 0.0f), trade);
                }
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
    float turnover[SETS];
#pragma unroll
    for (int k = 0; k < SETS; k++) {
        turnover[k] = (float)x.trades[k];
    }
    put_parts(params, slots, parts, a, place.span, x, turnover);
}

extern "C" __global__ void __launch_bounds__(WG, 6)
    backtest_cross(const uint32_t* __restrict__ keys, const uint32_t* __restrict__ lattice, const uint32_t* __restrict__ plan,
                   const float* __restrict__ returns, uint32_t* __restrict__ parts, uint32_t* __restrict__ prefix, const uint32_t* __restrict__ states,
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
                  const float* __restrict__ returns, uint32_t* __restrict__ parts, uint32_t* __restrict__ prefix, const uint32_t* __restrict__ states,
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

// ---- sizes and sides ----------------------------------------------------------------------------------------------

// What a set makes of a direction: weights up and down, size = min(target·inverse volatility, leverage).
struct Size {
    float up;
    float down;
    float target;
    float leverage;
    uint32_t row;
};

template <int MODE, bool JOINED>
__device__ __forceinline__ void simulate_sized(const uint32_t* __restrict__ keys, const uint32_t* __restrict__ lattice, const uint32_t* __restrict__ plan,
                                               const float* __restrict__ returns, uint32_t* __restrict__ parts, uint32_t* __restrict__ prefix,
                                               const float* __restrict__ price, const float* __restrict__ inverse_volatility,
                                               const TilesParams& params, uint32_t group, uint32_t (&enter)[BARS][SIZED_WORDS],
                                               uint32_t (&leave)[BARS][SIZED_WORDS], float (&earned)[BARS]) {
    const uint32_t tid = threadIdx.x, word = tid / 8, turn = tid % 8 * SIZED_SETS;
    const Place place = place_of(params, group);
    const uint32_t a = place.a, own = place.tile * SIZED_WORDS * 32 + tid * SIZED_SETS;
    const uint32_t* __restrict__ asset = keys + a * params.t * params.rows;
    const uint32_t* __restrict__ slots = lattice + params.words * HEAD + own * 2;
    const float* __restrict__ close = price + a * params.t;
    const float* __restrict__ calm = inverse_volatility + a * params.t * params.volatility_rows;
    const int scale = (int)plan[params.edges + a] - SCALE_BIAS, shift = (int)params.shift;
    const uint32_t from_bar = cut(params, plan, place.span), to_bar = cut(params, plan, place.span + 1);
    Size s[SIZED_SETS];
#pragma unroll
    for (int k = 0; k < SIZED_SETS; k++) {
        const uint32_t* __restrict__ detail = lattice + params.details + (own + k) * DETAILS;
        s[k] = {detail[0] == 2 ? 0.0f : 1.0f, detail[0] == 0 ? 0.0f : -1.0f, __uint_as_float(detail[1]), __uint_as_float(detail[2]), detail[3]};
    }
    uint32_t inside = 0, below = 0;
    float weight[SIZED_SETS] = {}, turnover[SIZED_SETS] = {}, total[SIZED_SETS] = {};
    const auto follow = [&](uint32_t at) {
        const uint32_t enters = enter[at][word] >> turn, leaves = leave[at][word] >> turn;
        inside = MODE == BAND ? (enters & ~inside) | (inside & ~leaves) : enters;
        below = MODE == BAND ? ~inside & (below | leaves) : leaves;
    };
    const auto wanted = [&](int k, uint32_t t) {
        const float direction = inside >> k & 1 ? s[k].up : below >> k & 1 ? s[k].down : 0.0f;
        return s[k].row == NONE ? direction : direction * fminf(s[k].target * __ldg(calm + t * params.volatility_rows + s[k].row), s[k].leverage);
    };
    // the weight before the span is that of the bar before
    if (from_bar > 0) {
        decide<MODE, true, SIZED_WORDS>(params, asset, close, lattice, place.tile, from_bar - 1, from_bar, enter, leave);
    }
    __syncthreads();
    if (from_bar > max(params.lag, params.start)) {
        follow(0);
#pragma unroll
        for (int k = 0; k < SIZED_SETS; k++) {
            weight[k] = wanted(k, from_bar - 1 - params.lag);
        }
    }

    Sets<SIZED_SETS> x;
    uint32_t edge = 0;
    while (edge < params.edges && plan[edge] <= from_bar && from_bar > 0) {
        edge++;
    }
    if (edge < params.edges && plan[edge] == from_bar) {
        put_prefixes(params, slots, prefix, a, edge, x);
        edge++;
    }
    uint32_t begun = from_bar;
    for (uint32_t base = from_bar; base < to_bar; base += BARS) {
        const uint32_t end = min(base + BARS, to_bar);
        __syncthreads();
        decide<MODE, true, SIZED_WORDS>(params, asset, close, lattice, place.tile, base, end, enter, leave);
        if (base + tid < end) {
            earned[tid] = returns[a * (params.t - 1) + base + tid];
        }
        __syncthreads();
        for (uint32_t j = base; j < end;) {
            const uint32_t next = min(min(begun + BLOCK, to_bar), edge < params.edges ? plan[edge] : to_bar);
            const uint32_t stop = min(end, next);
            for (; j < stop; j++) {
                if (j >= params.lag) {
                    follow(j - base);
                }
                const bool counts = j >= params.lag && j >= params.start;
#pragma unroll
                for (int k = 0; k < SIZED_SETS; k++) {
                    const float now = counts ? wanted(k, j - params.lag) : 0.0f;
                    const float traded = fabsf(now - weight[k]);
                    weight[k] = now;
                    turnover[k] += traded;
                    add<JOINED>(x, k, fmaf(now, earned[j - base], -__fmul_rn(params.cost, traded)), traded > 0.0f);
                }
            }
            if (j == next) {
                flush(x, shift, scale);
#pragma unroll
                for (int k = 0; k < SIZED_SETS; k++) {
                    total[k] += turnover[k];
                    turnover[k] = 0.0f;
                }
                begun = j;
                if (edge < params.edges && plan[edge] == j) {
                    put_prefixes(params, slots, prefix, a, edge, x);
                    edge++;
                }
            }
        }
    }
    put_parts(params, slots, parts, a, place.span, x, total);
}

extern "C" __global__ void __launch_bounds__(WG, 6)
    backtest_sized(const uint32_t* __restrict__ keys, const uint32_t* __restrict__ lattice, const uint32_t* __restrict__ plan,
                   const float* __restrict__ returns, uint32_t* __restrict__ parts, uint32_t* __restrict__ prefix, const float* __restrict__ close,
                   const float* __restrict__ inverse_volatility, TilesParams params) {
    __shared__ uint32_t sh_enter[BARS][SIZED_WORDS], sh_leave[BARS][SIZED_WORDS];
    __shared__ float sh_return[BARS];
    const uint32_t group = group_index();
    if (group >= params.a * params.spans * params.tiles) {
        return;
    }
    const bool joined = params.spans > 1;
#define SIMULATE(MODE, JOINED) \
    simulate_sized<MODE, JOINED>(keys, lattice, plan, returns, parts, prefix, close, inverse_volatility, params, group, sh_enter, sh_leave, sh_return)
    switch (params.mode) {
    case CROSS: joined ? SIMULATE(CROSS, true) : SIMULATE(CROSS, false); break;
    case BAND: SIMULATE(BAND, false); break;
    default: joined ? SIMULATE(MOMENTUM, true) : SIMULATE(MOMENTUM, false);
    }
#undef SIMULATE
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
    float turnover = 0.0f, mantissa = 1.0f, level = 1.0f, lowest = 1.0f;
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
        turnover += __uint_as_float(part[11 * sets]);
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
    out[3 * SET_TILE] = turnover;
    out[4 * SET_TILE] = (float)trades;
}
