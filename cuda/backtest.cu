// Back-tests of many parameter sets, and the replay of chosen ones. Maths, shapes and source: kernels/backtest.rs.
//   backtest_sweep    grid  A·tiles                block TILE = WG          thread = set, sequential over bars
//   backtest_stitch   grid  ⌈A·windows / WG⌉       block WG                 thread = (asset, window)
// Net returns and their sums must have the bits of the CPU column, because they select: products are __fmul_rn or fmaf, so that there is
// nothing left to contract.
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
    uint32_t volatility_rows;
    uint32_t general;
    uint32_t piece;
    uint32_t pieces;
};

#define SET_WORDS 16
#define STATS 5
#define BLOCK 128
#define SCALE_BIAS 512
#define CROSS 0
#define BAND 1
#define MOMENTUM 2
#define OFF 0xffffffffu

struct ParameterSet {
    uint32_t a;
    uint32_t b;
    uint32_t threshold_a;
    uint32_t threshold_b;
    uint32_t first;
    float up;
    float down;
    float target;
    float leverage;
    uint32_t volatility_row;
    float stop_loss;
    float take_profit;
    float trailing_stop;
    uint32_t max_holding;
};

__device__ __forceinline__ ParameterSet load_set(const uint32_t* __restrict__ sets, uint32_t index) {
    const uint32_t* __restrict__ word = sets + index * SET_WORDS;
    return {word[0],
            word[1],
            word[2],
            word[3],
            word[4],
            word[5] == 2 ? 0.0f : 1.0f,
            word[5] == 0 ? 0.0f : -1.0f,
            __uint_as_float(word[6]),
            __uint_as_float(word[7]),
            word[8],
            __uint_as_float(word[9]),
            __uint_as_float(word[10]),
            __uint_as_float(word[11]),
            word[12]};
}

// One asset as the machines see it.
struct Market {
    const float* __restrict__ close;
    const float* __restrict__ fill;
    const float* __restrict__ returns;
    const uint32_t* __restrict__ keys;
    const float* __restrict__ inverse_volatility;
};

__device__ __forceinline__ Market market_of(const float* price, const float* returns, const uint32_t* keys, const float* inverse_volatility,
                                            const BacktestParams& params, uint32_t a) {
    return {price + a * params.t, price + (params.a + a) * params.t, returns + a * (params.t - 1), keys + a * params.t * params.rows,
            inverse_volatility + a * params.t * params.volatility_rows};
}

// A position: the machine's direction, the one held after stops, the one that was stopped, the fill of the entry, the best close since,
// bars held, and the weight.
struct Position {
    float signal;
    float held;
    float blocked;
    float entry;
    float best;
    uint32_t age;
    float weight;
};

// The machine's direction at bar t, from the one before. Callers that know the mode at compile time get its machine alone.
__device__ __forceinline__ float direction(uint32_t mode, const BacktestParams& params, const ParameterSet& s, const Market& m, uint32_t t, float before) {
    if (t < s.first) {
        return 0.0f;
    }
    const uint32_t row = t * params.rows;
    if (mode == CROSS) {
        return __ldg(m.keys + row + s.a) > __ldg(m.keys + row + s.b) ? s.up : s.down;
    }
    if (mode == BAND) {
        const bool enters = (__ldg(m.keys + row + s.a) ^ params.mask) > s.threshold_a;
        const bool leaves = __ldg(m.keys + row + s.b) > s.threshold_b;
        return enters && before <= 0.0f ? s.up : leaves ? s.down : before;
    }
    const float now = __ldg(m.close + t), then = __ldg(m.close + t - s.b);
    return now > then ? s.up : now < then ? s.down : 0.0f;
}

// The price level at a signed distance from another, for a position of this side.
__device__ __forceinline__ float side_level(float held, float from, float distance) {
    return held * __fmul_rn(from, 1.0f + held * distance);
}

// The direction after stops.
__device__ __forceinline__ void stop(Position& x, const ParameterSet& s, float close, float fill) {
    x.age++;
    x.best = x.held > 0.0f ? fmaxf(x.best, close) : fminf(x.best, close);
    const float side = x.held * close;
    const bool stopped = side <= side_level(x.held, x.entry, -s.stop_loss) || side >= side_level(x.held, x.entry, s.take_profit) ||
                         side <= side_level(x.held, x.best, -s.trailing_stop) || x.age >= s.max_holding;
    x.blocked = stopped && x.held != 0.0f ? x.held : x.blocked;
    x.blocked = x.signal != x.blocked ? 0.0f : x.blocked;
    const float wanted = x.blocked == 0.0f ? x.signal : 0.0f;
    if (wanted != x.held && wanted != 0.0f) {
        x.entry = x.best = fill;
        x.age = 0;
    }
    x.held = wanted;
}

// The position that is held over bar j, from the one before.
__device__ __forceinline__ void decide(uint32_t mode, Position& x, const BacktestParams& params, const ParameterSet& s, const Market& m, uint32_t j) {
    if (j < params.lag) {
        return;
    }
    const uint32_t t = j - params.lag;
    x.signal = direction(mode, params, s, m, t, x.signal);
    if (j >= params.start) {
        stop(x, s, __ldg(m.close + t), __ldg(m.fill + j));
        const float v = s.volatility_row == OFF ? 0.0f : __ldg(m.inverse_volatility + t * params.volatility_rows + s.volatility_row);
        x.weight = x.held * (s.volatility_row == OFF ? 1.0f : fminf(s.target * v, s.leverage));
    }
}

// ---- sweep --------------------------------------------------------------------------------------------------------

// Running state of one simulation: what lasts, then the plain sums of a block.
struct Run {
    Position position;
    float level;
    float lowest;
    uint32_t trades;
    float sum;
    float square;
    float growth;
    float turnover;
};

__device__ __forceinline__ void earn(Run& run, float net, float traded) {
    run.turnover += traded;
    run.trades += traded > 0.0f ? 1 : 0;
    run.sum += net;
    run.square = fmaf(net, net, run.square);
    run.growth = fmaf(run.growth, net, run.growth);
    run.level = fminf(fmaf(run.level, net, run.level), 1.0f);
    run.lowest = fminf(run.lowest, run.level);
}

// Bars j to stop. GENERAL: sides, sizes and stops; without them a set is long or flat.
template <uint32_t MODE, bool GENERAL>
__device__ __forceinline__ void simulate(Run& run, const BacktestParams& params, const ParameterSet& s, const Market& m, uint32_t j, uint32_t stop) {
    Position& x = run.position;
    for (; j < stop; j++) {
        const float before = x.weight;
        if (GENERAL) {
            decide(MODE, x, params, s, m, j);
        } else if (j >= params.lag) {
            x.signal = direction(MODE, params, s, m, j - params.lag, x.signal);
            x.weight = j >= params.start ? x.signal : 0.0f;
        }
        if (j >= params.start) {
            const float traded = fabsf(x.weight - before);
            earn(run, fmaf(x.weight, __ldg(m.returns + j), -__fmul_rn(params.cost, traded)), traded);
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

    Run run = {{0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0, 0.0f}, 1.0f, 1.0f, 0, 0.0f, 0.0f, 1.0f, 0.0f};
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
            switch (2 * params.mode + params.general) {
            case 2 * CROSS: simulate<CROSS, false>(run, params, s, m, j, stop); break;
            case 2 * CROSS + 1: simulate<CROSS, true>(run, params, s, m, j, stop); break;
            case 2 * BAND: simulate<BAND, false>(run, params, s, m, j, stop); break;
            case 2 * BAND + 1: simulate<BAND, true>(run, params, s, m, j, stop); break;
            default: simulate<MOMENTUM, true>(run, params, s, m, j, stop);
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
    if (slot >= params.a * params.tiles * params.pieces) {
        return;
    }
    const uint32_t a = slot / (params.tiles * params.pieces), window = slot / params.pieces % params.tiles;
    const ParameterSet s = load_set(sets, a * params.per_asset * params.tiles + window);
    const Market m = market_of(price, returns, keys, inverse_volatility, params, a);
    const uint32_t window_end = windows[3 * window + 1];
    const uint32_t skipped = min(slot % params.pieces * params.piece, window_end - windows[3 * window]);
    const uint32_t from_bar = windows[3 * window] + skipped;
    const uint32_t to_bar = params.piece ? min(window_end, from_bar + params.piece) : window_end;
    float* __restrict__ out = net + a * params.stitched + windows[3 * window + 2] + skipped;
    float* __restrict__ weights = out + params.a * params.stitched;
    Position x = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0, 0.0f};
    float turnover = 0.0f;
    uint32_t trades = 0;
    for (uint32_t j = params.piece ? max(from_bar, 1u) - 1 : 0; j < to_bar; j++) {
        const float before = x.weight;
        decide(params.mode, x, params, s, m, j);
        if (j >= from_bar) {
            const float traded = fabsf(x.weight - before);
            turnover += traded;
            trades += traded > 0.0f ? 1 : 0;
            out[j - from_bar] = fmaf(x.weight, __ldg(m.returns + j), -__fmul_rn(params.cost, traded));
            weights[j - from_bar] = x.weight;
        }
    }
    activity[2 * slot] = turnover;
    activity[2 * slot + 1] = (float)trades;
}
