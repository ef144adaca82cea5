// Hedges with costs. Maths, shapes and source: kernels/hedge.rs.
//   grid  ⌈paths / (WG·PATHS)⌉      block WG      thread = PATHS paths one after the other, at most TILE set-ups in registers, sorted by greek
//   hedge_given  stored paths      reads setups, reals, table, spot [P,T+1]      writes results [U,3,P]
//   hedge_delta, hedge_single, hedge_band, hedge_gamma  paths of the generator (cuda/paths.cuh)      reads setups, reals, table, market,
//                market_words      writes results
//   hedge_futures  with futures      also writes history [2·window,P], the last changes of spot and futures
//   spill: up to 60 bytes a thread at the start of a path, where ptxas stops at 64 to 128 registers for the sake of occupancy

struct HedgeParams {
    uint32_t paths;
    uint32_t first;
    uint32_t columns;
    uint32_t steps;
    uint32_t setups;
    uint32_t greeks;
    uint32_t market;
    uint32_t path;
    uint32_t path_high;
    uint32_t window;
};

#define SETUP_WORDS 9u
#define SETUP_REALS 16u
#define GREEK_WORDS 4u
#define GREEK_ROW 8u

#define CALL 0u
#define PUT 1u
#define DIGITAL 2u
#define SPOT 3u

#define NONE 0u
#define STATIC 1u
#define BAND 3u
#define WHALLEY_WILMOTT 4u
#define MOVE 5u
#define DELTA_GAMMA 6u
#define MINIMUM_VARIANCE 7u
#define MOST_REGIMES 8u

#define UNWIND 1u
#define PREMIUM_AT_SPOT 2u

// ---- greeks -------------------------------------------------------------------------------------------------------------

struct Greek {
    float delta, gamma;
};

// Delta and gamma of log-spot x and spot s.
__device__ __forceinline__ Greek greeks_of(const float* __restrict__ row, uint32_t kind, float x, float s) {
    const float d = row[0] * x + row[1];
    const float2 p = normal_cdf_and_bell(d);
    Greek g;
    g.gamma = 0.0f;
    if (kind == SPOT) {
        g.delta = row[2];
        return g;
    }
    if (kind == DIGITAL) {
        g.delta = row[2] * p.y / s;
        if (LEVEL > 0) {
            g.gamma = -(g.delta * (1.0f + row[3] * d)) / s;
        }
        return g;
    }
    g.delta = row[2] * (kind == PUT ? p.x - 1.0f : p.x);
    if (LEVEL > 0) {
        g.gamma = row[3] * p.y / s;
    }
    return g;
}

// Black-Scholes price.
__device__ __forceinline__ float price_of(const float* __restrict__ row, uint32_t kind, float x, float s) {
    const float d = row[0] * x + row[1];
    if (kind == SPOT) {
        return s * row[2];
    }
    if (kind == DIGITAL) {
        return row[4] * normal_cdf_f32(d);
    }
    const float side = kind == PUT ? -1.0f : 1.0f;
    return side * (s * row[2] * normal_cdf_f32(side * d) - row[7] * normal_cdf_f32(side * (d - row[5])));
}

__device__ __forceinline__ float payoff_of(uint32_t kind, float s, float strike) {
    if (kind == SPOT) {
        return s;
    }
    if (kind == DIGITAL) {
        return s > strike ? 1.0f : 0.0f;
    }
    return fmaxf(kind == PUT ? strike - s : s - strike, 0.0f);
}

// ---- set-ups of a tile --------------------------------------------------------------------------------------------------

// What a launch reads, and what its set-ups carry: arrays that unrolled loops keep in registers.
struct Tile {
    const uint32_t* __restrict__ setups;
    const float* __restrict__ reals;
    const float* __restrict__ table;
    HedgeParams p;
    float holding[TILE], wealth[TILE], turnover[TILE], fees[TILE], last[TILE], options[TILE], option_turnover[TILE];

    __device__ __forceinline__ const uint32_t* setup(uint32_t u) const {
        return setups + u * SETUP_WORDS;
    }
    __device__ __forceinline__ const float* real(uint32_t u) const {
        return reals + (1 + u) * SETUP_REALS;
    }
    __device__ __forceinline__ const float* row(uint32_t greek, uint32_t t) const {
        return table + ((uint64_t)greek * (p.steps + 1) + t) * GREEK_ROW;
    }

    __device__ __forceinline__ void start(float x, float s) {
#pragma unroll
        for (uint32_t u = 0; u < TILE; u++) {
            holding[u] = turnover[u] = fees[u] = last[u] = options[u] = option_turnover[u] = wealth[u] = 0.0f;
            if (u < p.setups) {
                const uint32_t* word = setup(u);
                const bool at_spot = (word[4] & PREMIUM_AT_SPOT) != 0;
                wealth[u] = at_spot ? real(u)[5] * price_of(row(word[7], 0), word[3], x, s) : real(u)[4];
            }
        }
    }

    // Trades the second option; returns the delta that it brings.
    __device__ __forceinline__ float trade_options(uint32_t u, uint32_t t, float gamma, float x, float s) {
        const float* r = real(u);
        const float* at = row(setup(u)[5], t);
        const Greek second = greeks_of(at, CALL, x, s);
        const float wanted = r[5] * gamma * second.gamma / (second.gamma * second.gamma + 1e-12f / (s * s));
        const float to = fminf(fmaxf(wanted, -r[7]), r[7]), trade = to - options[u], price = price_of(at, CALL, x, s);
        const float notional = fabsf(trade) * price, paid = r[6] * notional + (trade == 0.0f ? 0.0f : r[1]);
        wealth[u] -= trade * price + paid;
        fees[u] += paid;
        option_turnover[u] += notional;
        options[u] = to;
        return to * second.delta;
    }

    // The holding that the policy wants.
    __device__ __forceinline__ float wanted(uint32_t u, uint32_t t, float discount, Greek g, float x, float s) {
        const uint32_t policy = setup(u)[0];
        const float now = holding[u];
        if (policy == NONE) {
            return 0.0f;
        }
        if (policy == STATIC && t > 0) {
            return now;
        }
        float to = real(u)[5] * g.delta;
        if (LEVEL == 2 && policy == DELTA_GAMMA) {
            return to - trade_options(u, t, g.gamma, x, s);
        }
        if (LEVEL >= 1 && t > 0) {
            const float parameter = real(u)[2];
            if (policy == BAND || policy == WHALLEY_WILMOTT) {
                const float width = policy == BAND ? parameter : cbrtf(parameter * discount * s * g.gamma * g.gamma);
                to = fminf(fmaxf(now, to - width), to + width);
            }
            if (policy == MOVE && !(fabsf(s - last[u]) > parameter * last[u])) {
                to = now;
            }
        }
        return to;
    }

    // Step t of all set-ups, from spot s to `next`.
    __device__ __forceinline__ void step(uint32_t t, float x, float s, float next) {
        const float earned = (next - s) + (next * reals[2] - s * reals[1]);
        const uint32_t* uses = setups + p.setups * SETUP_WORDS;
        uint32_t shared = 0xffffffffu;
        Greek g = {0.0f, 0.0f};
        float discount = 1.0f;
#pragma unroll
        for (uint32_t u = 0; u < TILE; u++) {
            if (u < p.setups) {
                const uint32_t greek = setup(u)[2];
                if (t % setup(u)[1] == 0) {
                    if (greek != shared) {
                        const float* at = row(greek, t);
                        g = greeks_of(at, uses[greek * GREEK_WORDS], x, s);
                        discount = at[4];
                        shared = greek;
                    }
                    trade(u, wanted(u, t, discount, g, x, s), s);
                }
                wealth[u] += wealth[u] * reals[1] + holding[u] * earned;
            }
        }
    }

    // Trades set-up u to a holding of what costs `price`.
    __device__ __forceinline__ void trade(uint32_t u, float to, float price) {
        const float change = to - holding[u], notional = fabsf(change) * price, fixed = change == 0.0f ? 0.0f : real(u)[1];
        wealth[u] -= real(u)[0] * notional + fixed;
        turnover[u] += notional;
        fees[u] += fixed;
        if (LEVEL >= 1 && change != 0.0f) {
            last[u] = price;
        }
        holding[u] = to;
    }

    // `traded` is the price of what is held.
    __device__ __forceinline__ void finish(float* __restrict__ results, uint32_t path, float x, float s, float traded) {
#pragma unroll
        for (uint32_t u = 0; u < TILE; u++) {
            if (u < p.setups) {
                const uint32_t* word = setup(u);
                const float* r = real(u);
                const bool unwinds = (word[4] & UNWIND) != 0;
                if (LEVEL == 2 && word[0] == DELTA_GAMMA) {
                    const float worth = price_of(row(word[5], p.steps), CALL, x, s);
                    wealth[u] += options[u] * worth;
                    if (unwinds && options[u] != 0.0f) {
                        const float notional = fabsf(options[u]) * worth, paid = r[6] * notional + r[1];
                        wealth[u] -= paid;
                        fees[u] += paid;
                        option_turnover[u] += notional;
                    }
                }
                if (unwinds && holding[u] != 0.0f) {
                    const float notional = fabsf(holding[u]) * traded;
                    wealth[u] -= r[0] * notional + r[1];
                    turnover[u] += notional;
                    fees[u] += r[1];
                }
                const uint64_t at = (uint64_t)3 * word[8] * p.columns + p.first + path;
                results[at] = wealth[u] - r[5] * payoff_of(word[3], s, r[3]);
                results[at + p.columns] = r[0] * turnover[u] + fees[u];
                results[at + 2 * (uint64_t)p.columns] = turnover[u] + option_turnover[u];
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(WG)
    hedge_given(const uint32_t* setups, const float* reals, const float* table, float* results, const float* spot, HedgeParams params) {
    const uint32_t path = group_index() * WG + threadIdx.x;
    if (path >= params.paths) {
        return;
    }
    const float* at = spot + (uint64_t)path * (params.steps + 1);
    Tile tile = {setups, reals, table, params};
    float s = at[0], x = logf(s / reals[0]);
    tile.start(x, s);
    for (uint32_t t = 0; t < params.steps; t++) {
        const float next = at[t + 1];
        tile.step(t, x, s, next);
        s = next;
        x = logf(s / reals[0]);
    }
    tile.finish(results, path, x, s, s);
}

// ---- simulated paths ------------------------------------------------------------------------------------------------------

#define SIMULATED \
    const uint32_t *__restrict__ setups, const float *__restrict__ reals, const float *__restrict__ table, float *__restrict__ results, \
        const float *__restrict__ market, const uint32_t *__restrict__ market_words

__device__ __forceinline__ void simulate_path(SIMULATED, const HedgeParams& params, uint32_t row) {
    const PathMarket m = path_market(market, market_words, params.market);
    const uint64_t path = ((uint64_t)params.path_high << 32 | params.path) + row;
    PathState state = path_start(m, path);
    Tile tile = {setups, reals, table, params};
    float x = state.x, s = path_spot(m, state);
    tile.start(x, s);
    for (uint32_t quad = 0; 4 * quad < params.steps; quad++) {
        const PathDraws d = path_draws(m, path, quad);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t t = 4 * quad + i;
            if (t < params.steps) {
                state = path_step(m, state, d, t);
                const float next = path_spot(m, state);
                tile.step(t, x, s, next);
                x = state.x;
                s = next;
            }
        }
    }
    tile.finish(results, row, x, s, s);
}

__device__ __forceinline__ void simulate(SIMULATED, const HedgeParams& params) {
    const uint32_t first = (group_index() * WG + threadIdx.x) * PATHS;
    for (uint32_t row = first; row < min(first + PATHS, params.paths); row++) {
        simulate_path(setups, reals, table, results, market, market_words, params, row);
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_delta(const uint32_t* setups, const float* reals, const float* table, float* results, const float* market, const uint32_t* market_words,
                HedgeParams params) {
    simulate(setups, reals, table, results, market, market_words, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_single(const uint32_t* setups, const float* reals, const float* table, float* results, const float* market, const uint32_t* market_words,
                 HedgeParams params) {
    simulate(setups, reals, table, results, market, market_words, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_band(const uint32_t* setups, const float* reals, const float* table, float* results, const float* market, const uint32_t* market_words,
               HedgeParams params) {
    simulate(setups, reals, table, results, market, market_words, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_gamma(const uint32_t* setups, const float* reals, const float* table, float* results, const float* market, const uint32_t* market_words,
                HedgeParams params) {
    simulate(setups, reals, table, results, market, market_words, params);
}

// ---- futures --------------------------------------------------------------------------------------------------------------

// Futures per unit of delta: given by regime, or of least variance over the last `window` changes, 1 while there are fewer.
__device__ __forceinline__ float ratio_of(const Tile& tile, const float* __restrict__ history, uint32_t u, uint32_t t, uint32_t row, uint32_t regime) {
    const uint32_t* word = tile.setup(u);
    if (word[0] != MINIMUM_VARIANCE) {
        return tile.real(u)[8 + min(regime, MOST_REGIMES - 1)];
    }
    const uint32_t window = word[6];
    if (t < window) {
        return 1.0f;
    }
    const HedgeParams& p = tile.p;
    const auto change = [&](uint32_t i) { return history + (uint64_t)2 * (i % p.window) * p.paths + row; };
    float mean_spot = 0.0f, mean_future = 0.0f, both = 0.0f, own = 0.0f;
    for (uint32_t i = t - window; i < t; i++) {
        mean_spot += change(i)[0];
        mean_future += change(i)[p.paths];
    }
    mean_spot /= (float)window;
    mean_future /= (float)window;
    for (uint32_t i = t - window; i < t; i++) {
        const float a = change(i)[0] - mean_spot, b = change(i)[p.paths] - mean_future;
        both += a * b;
        own += b * b;
    }
    return own > 0.0f ? both / own : 1.0f;
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_futures(const uint32_t* setups, const float* reals, const float* table, float* results, const float* market, const uint32_t* market_words,
                  float* history, HedgeParams params) {
    const uint32_t row = group_index() * WG + threadIdx.x;
    if (row >= params.paths) {
        return;
    }
    const PathMarket m = path_market(market, market_words, params.market);
    const uint64_t path = ((uint64_t)params.path_high << 32 | params.path) + row;
    PathState state = path_start(m, path);
    Tile tile = {setups, reals, table, params};
    float s = path_spot(m, state), f = path_future(m, state);
    tile.start(state.x, s);
    for (uint32_t quad = 0; 4 * quad < params.steps; quad++) {
        const PathDraws d = path_draws(m, path, quad);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t t = 4 * quad + i;
            if (t >= params.steps) {
                break;
            }
            const PathState before = state;
            state = path_step(m, state, d, t);
            const float next = path_future(m, state), next_spot = path_spot(m, state);
#pragma unroll
            for (uint32_t u = 0; u < TILE; u++) {
                if (u < params.setups) {
                    const uint32_t* word = tile.setup(u);
                    if (t % word[1] == 0) {
                        const Greek g = greeks_of(tile.row(word[2], t), word[3], before.x, s);
                        tile.trade(u, tile.real(u)[5] * g.delta * ratio_of(tile, history, u, t, row, before.regime), f);
                    }
                    tile.wealth[u] += tile.wealth[u] * reals[1] + tile.holding[u] * (next - f);
                }
            }
            float* change = history + (uint64_t)2 * (t % params.window) * params.paths + row;
            change[0] = next_spot - s;
            change[params.paths] = next - f;
            s = next_spot;
            f = next;
        }
    }
    tile.finish(results, row, state.x, s, f);
}
