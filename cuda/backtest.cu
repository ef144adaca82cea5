// Back-tests of many parameter sets, and the replay of chosen ones. Maths, shapes and source: kernels/backtest.rs.
//   backtest_sweep    grid  A·tiles                block TILE = WG          thread = set, sequential over bars
//   backtest_stitch   grid  ⌈A·windows / WG⌉       block WG                 thread = (asset, window)
// Net returns and their sums must have the bits of the CPU column, because they select: products are __fmul_rn, never contracted.
// backtest_sweep is bounded for 8 blocks an SM: 55 to 64 registers, no spill (unbounded, NVRTC 12.4 took 48 and spilled 4 bytes on sm_80).

struct BacktestParams {
    uint32_t a;
    uint32_t t;
    uint32_t rows;
    uint32_t tiles;
    uint32_t edges;
    uint32_t mode;
    uint32_t lag;
    uint32_t start;
    uint32_t shift;
    uint32_t mask;
    float cost;
    float cost_low;
    uint32_t per_asset;
    uint32_t stitched;
};

#define SET_WORDS 8
#define STATS 5
#define BLOCK 64
#define SCALE_BIAS 512
#define CROSS 0
#define BAND 1
#define MOMENTUM 2

struct ParameterSet {
    uint32_t a;
    uint32_t b;
    uint32_t threshold_a;
    uint32_t threshold_b;
    uint32_t first;
    float short_position;
    float target;
    float leverage;
};

__device__ __forceinline__ ParameterSet load_set(const uint32_t* __restrict__ sets, uint32_t index) {
    const uint32_t* __restrict__ word = sets + index * SET_WORDS;
    return {word[0], word[1], word[2], word[3], word[4], word[5] == 1 ? -1.0f : 0.0f, __uint_as_float(word[6]), __uint_as_float(word[7])};
}

// One asset as the machines see it.
struct Market {
    const float* __restrict__ price;
    const float* __restrict__ returns;
    const uint32_t* __restrict__ keys;
    const float* __restrict__ inverse_volatility;
};

__device__ __forceinline__ Market market_of(const float* price, const float* returns, const uint32_t* keys, const float* inverse_volatility,
                                            const BacktestParams& params, uint32_t a) {
    const uint32_t table = a * params.t * params.rows;
    return {price + a * params.t, returns + a * (params.t - 1), keys + table, inverse_volatility + table};
}

// The position decided at bar t, from the one before. Callers that know the mode at compile time get its machine alone.
__device__ __forceinline__ float decide(uint32_t mode, const BacktestParams& params, const ParameterSet& s, const Market& m, uint32_t t, float before) {
    const bool legal = t >= s.first;
    const uint32_t row = t * params.rows;
    if (mode == CROSS) {
        const float position = __ldg(m.keys + row + s.a) > __ldg(m.keys + row + s.b) ? 1.0f : s.short_position;
        return legal ? position : 0.0f;
    }
    if (mode == BAND) {
        const bool enters = legal && (__ldg(m.keys + row + s.a) ^ params.mask) > s.threshold_a;
        const bool stays = __ldg(m.keys + row + s.b) <= s.threshold_b;
        return (before == 0.0f ? enters : stays) ? 1.0f : 0.0f;
    }
    if (!legal) {
        return 0.0f;
    }
    const float now = __ldg(m.price + t), then = __ldg(m.price + t - s.b);
    const float v = __ldg(m.inverse_volatility + row + s.a);
    const float size = fminf(s.target * v, s.leverage);
    return now > then ? size : now < then ? -size : 0.0f;
}

// ---- sweep --------------------------------------------------------------------------------------------------------

// Running state of one simulation: what lasts, then the plain sums of a block.
struct Run {
    float position;
    float weight;
    float level;
    float lowest;
    uint32_t trades;
    float sum;
    float square;
    float growth;
    float turnover;
};

// Bars j to stop: decide, pay, earn.
template <uint32_t MODE>
__device__ __forceinline__ void simulate(Run& run, const BacktestParams& params, const ParameterSet& s, const Market& m, uint32_t j, uint32_t stop) {
    for (; j < stop; j++) {
        if (j >= params.lag) {
            run.position = decide(MODE, params, s, m, j - params.lag, run.position);
        }
        if (j >= params.start) {
            const float traded = fabsf(run.position - run.weight);
            const float net = __fmul_rn(run.position, __ldg(m.returns + j)) - __fmul_rn(params.cost, traded);
            run.weight = run.position;
            run.turnover += traded;
            run.trades += traded > 0.0f ? 1 : 0;
            run.sum += net;
            run.square += __fmul_rn(net, net);
            run.growth *= 1.0f + net;
            run.level = fminf(run.level * (1.0f + net), 1.0f);
            run.lowest = fminf(run.lowest, run.level);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG, 8)
    backtest_sweep(const float* __restrict__ price, const float* __restrict__ returns, const uint32_t* __restrict__ keys,
                   const float* __restrict__ inverse_volatility, const uint32_t* __restrict__ sets, const uint32_t* __restrict__ plan,
                   float* __restrict__ stats, uint32_t* __restrict__ prefix, BacktestParams params) {
    const uint32_t group = group_index(), tid = threadIdx.x;
    if (group >= params.a * params.tiles) {
        return;
    }
    const uint32_t a = group / params.tiles;
    const ParameterSet s = load_set(sets, (group % params.tiles) * WG + tid);
    const Market m = market_of(price, returns, keys, inverse_volatility, params, a);
    const uint32_t bars = params.t - 1;
    const int scale = (int)plan[params.edges + a] - SCALE_BIAS;
    const int shift = (int)params.shift;

    Run run = {0.0f, 0.0f, 1.0f, 1.0f, 0, 0.0f, 0.0f, 1.0f, 0.0f};
    float turnover = 0.0f, mantissa = 1.0f;
    int exponent = 0;
    int64_t sums = 0;
    uint64_t squares = 0;
    uint32_t j = 0;
    for (uint32_t e = 0; e <= params.edges; e++) {
        const uint32_t end = e < params.edges ? plan[e] : bars;
        while (j < end) {
            // a block of plain sums
            const uint32_t stop = min(end, j + BLOCK);
            run.sum = run.square = run.turnover = 0.0f;
            run.growth = 1.0f;
            if (params.mode == CROSS) {
                simulate<CROSS>(run, params, s, m, j, stop);
            } else if (params.mode == BAND) {
                simulate<BAND>(run, params, s, m, j, stop);
            } else {
                simulate<MOMENTUM>(run, params, s, m, j, stop);
            }
            j = stop;
            // into the exact sums
            sums += to_fixed(run.sum, shift - scale);
            squares += (uint64_t)to_fixed(run.square, shift - 2 * scale);
            turnover += run.turnover;
            int power = 0;
            mantissa = frexpf(mantissa * run.growth, &power);
            exponent += power;
        }
        // prefix before the edge
        if (e < params.edges) {
            uint32_t* __restrict__ out = prefix + (group * params.edges + e) * 4 * WG + tid;
            out[0] = (uint32_t)sums;
            out[WG] = (uint32_t)((uint64_t)sums >> 32);
            out[2 * WG] = (uint32_t)squares;
            out[3 * WG] = (uint32_t)(squares >> 32);
        }
    }
    const uint32_t counted = max(bars, params.start) - params.start;
    float* __restrict__ out = stats + group * STATS * WG + tid;
    out[0] = sharpe_of(counted, sums, scaled_variance(counted, sums, squares, params.shift));
    out[WG] = ldexpf(mantissa, exponent) - 1.0f;
    out[2 * WG] = 1.0f - run.lowest;
    out[3 * WG] = turnover;
    out[4 * WG] = (float)run.trades;
}

// ---- stitch -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    backtest_stitch(const float* __restrict__ price, const float* __restrict__ returns, const uint32_t* __restrict__ keys,
                    const float* __restrict__ inverse_volatility, const uint32_t* __restrict__ sets, const uint32_t* __restrict__ windows,
                    float* __restrict__ net, float* __restrict__ activity, BacktestParams params) {
    const uint32_t slot = group_index() * WG + threadIdx.x;
    if (slot >= params.a * params.tiles) {
        return;
    }
    const uint32_t a = slot / params.tiles, window = slot % params.tiles;
    const ParameterSet s = load_set(sets, a * params.per_asset * params.tiles + window);
    const Market m = market_of(price, returns, keys, inverse_volatility, params, a);
    const uint32_t from_bar = windows[3 * window], to_bar = windows[3 * window + 1];
    float* __restrict__ out = net + a * params.stitched + windows[3 * window + 2];
    float position = 0.0f, weight = 0.0f, turnover = 0.0f;
    uint32_t trades = 0;
    for (uint32_t j = 0; j < to_bar; j++) {
        if (j >= params.lag) {
            position = decide(params.mode, params, s, m, j - params.lag, position);
        }
        float earned = 0.0f;
        if (j >= params.start) {
            const float traded = fabsf(position - weight);
            earned = __fmul_rn(position, __ldg(m.returns + j)) - __fmul_rn(params.cost, traded);
            weight = position;
            if (j >= from_bar) {
                turnover += traded;
                trades += traded > 0.0f ? 1 : 0;
            }
        }
        if (j >= from_bar) {
            out[j - from_bar] = earned;
            out[(size_t)params.a * params.stitched + j - from_bar] = weight;
        }
    }
    activity[2 * slot] = turnover;
    activity[2 * slot + 1] = (float)trades;
}
