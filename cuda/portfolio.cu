// Portfolios with shared capital, and statistics of their bars. Maths, shapes and source: kernels/portfolio.rs.
//   portfolio_simulate   grid  ⌈P·lanes / WG⌉    block WG    WG / lanes books, thread = assets lane, lane + lanes, … of one
//   portfolio_score      grid  ⌈P·C / WG⌉        block WG    thread = (book, cost), sequential over bars
//   signal_score         grid  ⌈P·C·N / WG⌉      block WG    thread = (book, cost, asset), sequential over bars
//   shared memory of portfolio_simulate: six values a warp, of use where a book spans more than one

struct PortfolioParams {
    uint32_t p;
    uint32_t n;
    uint32_t bars;
    uint32_t first;
    uint32_t every;
    uint32_t lanes;
    uint32_t edge;
    uint32_t composed;
    uint32_t costs;
    uint32_t net;
    float band;
};

#define STATE 16
#define STATS 7
#define ACTIVITY 3
#define BLOCK 64
#define THERE (-1.5f)  // returns above it are there
#define ROUND (1.0f / 1048576.0f)
#define ORDERS 1048576.0f
#define WARPS (WG / 32)

// ---- simulation -----------------------------------------------------------------------------------------------------

// What a bar asks of every asset of a book.
struct Rule {
    float inverse;
    float band;
    float edge;
    bool rebalance;
};

// Gross return, turnover and orders.
struct Sums {
    float gross;
    float turnover;
    float orders;
};

// One asset's bar: adds to the sums and returns its weight after the return.
__device__ __forceinline__ float asset_step(const Rule& rule, float weight, float wanted, float before, float after, Sums& sums) {
    const float drifted = weight * rule.inverse;
    const float gap = wanted - drifted;
    const float size = fabsf(gap), near = ROUND * fabsf(wanted);
    const bool open = rule.rebalance && before > THERE;
    const bool trades = open && size > rule.band + (near + ROUND * rule.band);
    const float moved = trades ? wanted - (gap > 0.0f ? rule.edge : -rule.edge) : drifted;
    const float held = open && size <= near ? wanted : moved;
    const float r = after > THERE ? after : 0.0f;
    sums.gross += held * r;
    sums.turnover += trades ? size - rule.edge : 0.0f;
    sums.orders += trades ? 1.0f : 0.0f;
    return held * (1.0f + r);
}

__device__ __forceinline__ Sums plus(Sums a, Sums b) {
    return {a.gross + b.gross, a.turnover + b.turnover, a.orders + b.orders};
}

// Sum over the lanes of a book, in each of them: butterflies in the warp, then the book's warps in order. All threads call it; the
// halves of sh_warp alternate by bar, so that one barrier is enough.
__device__ __forceinline__ Sums sum_of_book(Sums x, uint32_t lanes, Sums* sh_warp) {
    const uint32_t all = 0xffffffffu;
    for (uint32_t step = min(lanes, 32u) / 2; step > 0; step /= 2) {
        x = plus(x, {__shfl_xor_sync(all, x.gross, step), __shfl_xor_sync(all, x.turnover, step), __shfl_xor_sync(all, x.orders, step)});
    }
    if (lanes <= 32) {
        return x;
    }
    const uint32_t warp = threadIdx.x / 32, of_book = lanes / 32;
    if (threadIdx.x % 32 == 0) {
        sh_warp[warp] = x;
    }
    __syncthreads();
    const uint32_t first = warp / of_book * of_book;
    x = sh_warp[first];
    for (uint32_t k = 1; k < of_book; k++) {
        x = plus(x, sh_warp[first + k]);
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(WG)
    portfolio_simulate(const float* __restrict__ returns, const float* __restrict__ positions, const float* __restrict__ allocation,
                       float* __restrict__ weights, float* __restrict__ carry, float* __restrict__ activity, PortfolioParams params) {
    __shared__ Sums sh_warp[2][WARPS];
    const uint32_t lanes = params.lanes, n = params.n, tid = threadIdx.x;
    const uint32_t first_book = group_index() * (WG / lanes);
    if (first_book >= params.p) {
        return;
    }
    const uint32_t lane = tid % lanes, book = first_book + tid / lanes;
    const bool live = book < params.p, fresh = params.first == 0;
    float* __restrict__ own = weights + (uint64_t)book * n;
    float* __restrict__ out = activity + (uint64_t)book * ACTIVITY * params.bars;
    const float* __restrict__ row = positions + (uint64_t)book * params.bars * n;

    float held = 0.0f, growth = 1.0f;
    if (live && !fresh) {
        growth = carry[book];
        held = lane < n ? own[lane] : 0.0f;
    }
    for (uint32_t j = 0; j < params.bars; j++) {
        const bool solvent = growth > 0.0f;
        const Rule rule = {solvent ? 1.0f / growth : 0.0f, params.band, params.edge == 1 ? params.band : 0.0f,
                           solvent && (params.first + j) % params.every == 0};
        // trade and earn
        Sums sums = {0.0f, 0.0f, 0.0f};
        if (live) {
            for (uint32_t i = lane; i < n; i += lanes) {
                const uint32_t at = j * n + i;
                const float weight = i == lane ? held : fresh && j == 0 ? 0.0f : own[i];
                const float share = params.composed == 1 ? __ldg(allocation + at) : 1.0f;
                const float next = asset_step(rule, weight, __ldg(row + at) * share, __ldg(returns + at), __ldg(returns + at + n), sums);
                if (i == lane) {
                    held = next;
                } else {
                    own[i] = next;
                }
            }
        }
        const Sums total = sum_of_book(sums, lanes, sh_warp[j % 2]);
        growth = solvent ? fmaxf(1.0f + total.gross, 0.0f) : 0.0f;
        if (live && lane == 0) {
            out[j] = fmaxf(total.gross, -1.0f);
            out[params.bars + j] = total.turnover;
            out[2 * params.bars + j] = total.orders;
        }
    }
    if (live && lane < n) {
        own[lane] = held;
    }
    if (live && lane == 0) {
        carry[book] = growth;
    }
}

// ---- statistics -----------------------------------------------------------------------------------------------------

// Running statistics of a series: sums over the block, then over all whole blocks.
struct Run {
    float shift;
    float sum;
    float square;
    float growth;
    float traded;
    float mean;
    float m2;
    float mantissa;
    float exponent;
    float turnover;
    float level;
    float lowest;
    float orders_high;
    float orders_low;
    float ruin;
    float weight;
};

__device__ __forceinline__ Run load_run(const float* __restrict__ s, uint32_t first) {
    if (first == 0) {
        return {0.0f, 0.0f, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f, 1.0f, 0.0f, 0.0f, 1.0f, 1.0f, 0.0f, 0.0f, -1.0f, 0.0f};
    }
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
}

__device__ __forceinline__ void store_run(float* __restrict__ s, const Run& run) {
    s[0] = run.shift;
    s[1] = run.sum;
    s[2] = run.square;
    s[3] = run.growth;
    s[4] = run.traded;
    s[5] = run.mean;
    s[6] = run.m2;
    s[7] = run.mantissa;
    s[8] = run.exponent;
    s[9] = run.turnover;
    s[10] = run.level;
    s[11] = run.lowest;
    s[12] = run.orders_high;
    s[13] = run.orders_low;
    s[14] = run.ruin;
    s[15] = run.weight;
}

// Merges a block of `count` bars into the whole of `total`.
__device__ __forceinline__ void merge_block(Run& run, uint32_t total, uint32_t count) {
    const float nb = (float)count, n = (float)total;
    const float mean = run.shift + run.sum / nb;
    const float m2 = fmaxf(run.square - run.sum * run.sum / nb, 0.0f);
    const float delta = mean - run.mean;
    run.mean += delta * (nb / n);
    run.m2 += m2 + delta * delta * ((n - nb) * nb / n);
    int power = 0;
    run.mantissa = frexpf(run.mantissa * run.growth, &power);
    run.exponent += (float)power;
    run.turnover += run.traded;
    run.sum = run.square = run.traded = 0.0f;
    run.growth = 1.0f;
}

// Adds bar j and returns what ruin leaves of its net return.
__device__ __forceinline__ float add_bar(Run& run, uint32_t j, float raw, float turnover, float orders) {
    const bool solvent = run.ruin < 0.0f;
    const float earned = solvent ? fmaxf(raw, -1.0f) : 0.0f;
    if (solvent && earned <= -1.0f) {
        run.ruin = (float)j;
    }
    if (j % BLOCK == 0) {
        run.shift = earned;
    }
    const float d = earned - run.shift, factor = 1.0f + earned;
    run.sum += d;
    run.square += d * d;
    run.growth *= factor;
    run.level = fminf(run.level * factor, 1.0f);
    run.lowest = fminf(run.lowest, run.level);
    if (solvent) {
        run.traded += turnover;
        run.orders_low += orders;
        if (run.orders_low >= ORDERS) {
            run.orders_low -= ORDERS;
            run.orders_high += 1.0f;
        }
    }
    if (j % BLOCK == BLOCK - 1) {
        merge_block(run, j + 1, BLOCK);
    }
    return earned;
}

// Statistics of the `total` bars so far.
__device__ __forceinline__ void finish_run(float* __restrict__ out, Run run, uint32_t total) {
    if (total % BLOCK != 0) {
        merge_block(run, total, total % BLOCK);
    }
    const float n = (float)total;
    const bool known = total > 1 && run.m2 > (run.m2 + n * run.mean * run.mean) * ROUND;
    out[0] = known ? run.mean / sqrtf(run.m2 / (n - 1.0f)) : UNDEFINED;
    out[1] = ldexpf(run.mantissa, (int)run.exponent) - 1.0f;
    out[2] = 1.0f - run.lowest;
    out[3] = run.turnover;
    out[4] = run.orders_high;
    out[5] = run.orders_low;
    out[6] = run.ruin;
}

extern "C" __global__ void __launch_bounds__(WG)
    portfolio_score(const float* __restrict__ activity, float* __restrict__ net, const float* __restrict__ costs, float* __restrict__ state,
                    float* __restrict__ stats, PortfolioParams params) {
    const uint32_t series = group_index() * WG + threadIdx.x;
    if (series >= params.p * params.costs) {
        return;
    }
    const uint32_t bars = params.bars;
    const float* __restrict__ book = activity + (uint64_t)(series / params.costs) * ACTIVITY * bars;
    const float cost = costs[2 * (series % params.costs)];
    float* __restrict__ own = state + (uint64_t)series * STATE;
    Run run = load_run(own, params.first);
    for (uint32_t j = 0; j < bars; j++) {
        const float gross = book[j], turnover = book[bars + j];
        const float earned = add_bar(run, params.first + j, gross - cost * turnover * (1.0f + gross), turnover, book[2 * bars + j]);
        if (params.net == 1) {
            net[(uint64_t)series * bars + j] = earned;
        }
    }
    store_run(own, run);
    finish_run(stats + (uint64_t)series * STATS, run, params.first + bars);
}

extern "C" __global__ void __launch_bounds__(WG)
    signal_score(const float* __restrict__ returns, const float* __restrict__ positions, const float* __restrict__ costs, float* __restrict__ state,
                 float* __restrict__ stats, PortfolioParams params) {
    const uint32_t series = group_index() * WG + threadIdx.x, n = params.n;
    if (series >= params.p * params.costs * n) {
        return;
    }
    const uint32_t i = series % n, book = series / n / params.costs;
    const float cost = costs[2 * (series / n % params.costs)];
    const float* __restrict__ mine = positions + (uint64_t)book * params.bars * n + i;
    float* __restrict__ own = state + (uint64_t)series * STATE;
    Run run = load_run(own, params.first);
    for (uint32_t j = 0; j < params.bars; j++) {
        const float weight = __ldg(mine + j * n), after = __ldg(returns + (j + 1) * n + i);
        const float traded = fabsf(weight - run.weight);
        run.weight = weight;
        add_bar(run, params.first + j, weight * (after > THERE ? after : 0.0f) - cost * traded, traded, traded > 0.0f ? 1.0f : 0.0f);
    }
    store_run(own, run);
    finish_run(stats + (uint64_t)series * STATS, run, params.first + params.bars);
}
