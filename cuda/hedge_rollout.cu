// Neural hedging policies over price paths. Maths, shapes, rows of scratch and source: kernels/hedge_rollout.rs.
//   grid  M · ⌈paths / WG⌉      block WG, all of one model      thread = path, its rows of scratch coalesced over the block
//   hedge_rollout_weights  grid  tiles · ⌈paths / 128⌉ · M      block 64: 32 × 32 of a weight, 4 × 4 a thread
//   weights in shared memory (SHARED floats), read as broadcasts; with SHARED 1 through the cache
//   spill: up to 100 bytes a thread around the rows of a step, where ptxas stops at 48 to 64 registers for the sake of occupancy

struct HedgeRolloutParams {
    uint32_t models;
    uint32_t paths;
    uint32_t stride;
    uint32_t steps;
    uint32_t from_step;
    uint32_t to_step;
    uint32_t slots;
    uint32_t rows;
    uint32_t acts;
    uint32_t step_rows;
    uint32_t state;
    uint32_t inputs;
    uint32_t columns;
    uint32_t lstm;
    uint32_t layers;
    uint32_t width0;
    uint32_t width1;
    uint32_t width2;
    uint32_t width3;
    uint32_t activation;
    uint32_t weights;
    uint32_t head;
    uint32_t baseline;
    uint32_t claim;
    uint32_t unwind;
    uint32_t partials;
    uint32_t first_block;
    float strike;
    float maturity;
    float volatility;
    float rate;
    float range;
    float premium;
    uint32_t x_row;
    uint32_t x_rows;
    uint32_t d_row;
    uint32_t d_rows;
    uint32_t weight_at;
    uint32_t bias_at;
    uint32_t lookback;
    uint32_t ragged;
};

#define RESIDUAL 0u
#define BAND 1u
#define GIVEN 2u
#define LEAK 0.01f
#define BLOCK 128u

struct Prices {
    float spot, baseline, width, log_moneyness, root_left;
};

// A holding and its slopes by the previous one and by the two outputs.
struct Holding {
    float hold, by_previous, by_first, by_second;
};

__device__ __forceinline__ float sign_of(float x) {
    return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f);
}

// One model on one path. `column` is row 0 of the thread's scratch, `w` the model's weights.
struct Rollout {
    HedgeRolloutParams p;
    uint32_t model, path;
    const float* w;
    const float* __restrict__ risk;
    const float* __restrict__ spot;
    const float* __restrict__ extra;
    float* column;
    // Steps of the path.
    uint32_t length;

    __device__ __forceinline__ float& cell(uint32_t row) const {
        return column[(uint64_t)row * p.stride];
    }

    __device__ __forceinline__ uint32_t width_of(uint32_t layer) const {
        return layer == 0 ? p.width0 : (layer == 1 ? p.width1 : (layer == 2 ? p.width2 : p.width3));
    }

    __device__ __forceinline__ uint32_t slot_of(uint32_t t) const {
        return (p.slots == 2 ? (t & 1u) : t) * p.state;
    }

    // Rows within the activations of a step, as in kernels/hedge_rollout.rs.
    __device__ __forceinline__ uint32_t activations(uint32_t layer) const {
        return p.inputs + (layer > 0 ? p.width0 : 0) + (layer > 1 ? p.width1 : 0) + (layer > 2 ? p.width2 : 0) + (layer > 3 ? p.width3 : 0);
    }

    __device__ __forceinline__ uint32_t gradients(uint32_t layer) const {
        if (p.lstm > 0) {
            return p.inputs + (2 * p.layers + 4 * layer) * p.width0;
        }
        return activations(p.layers) + activations(layer) - p.inputs;
    }

    __device__ __forceinline__ uint32_t layer_input(uint32_t layer) const {
        return layer == 0 ? 0 : p.inputs + (2 * layer - 1) * p.width0;
    }

    __device__ __forceinline__ uint32_t outputs() const {
        return p.head == RESIDUAL ? 1 : 2;
    }

    // ---- market ----------------------------------------------------------------------------------------------------------

    __device__ __forceinline__ float spot_at(uint32_t t) const {
        return spot[(uint64_t)path * (p.steps + 1) + t];
    }

    __device__ __forceinline__ float left(uint32_t t) const {
        return p.maturity * ((float)(length - t) / (float)p.steps);
    }

    // To the last price above 0.
    __device__ __forceinline__ uint32_t length_of() const {
        uint32_t low = p.ragged > 0 ? 1 : p.steps, high = p.steps;
        while (low < high) {
            const uint32_t middle = (low + high + 1) / 2;
            if (spot_at(middle) > 0.0f) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }

    __device__ __forceinline__ float growth(uint32_t t) const {
        return expf(p.rate * left(t));
    }

    __device__ __forceinline__ float unit_cost(float price) const {
        return risk[4 * model] * price + risk[4 * model + 1];
    }

    __device__ __forceinline__ float charge(float trade, float price) const {
        return trade == 0.0f ? 0.0f : fabsf(trade) * unit_cost(price) + risk[4 * model + 2];
    }

    __device__ __forceinline__ Prices prices_at(uint32_t t) const {
        Prices q;
        const float years = left(t);
        q.spot = spot_at(t);
        // Near the strike S − K is exact, S / K is not.
        const float off = (q.spot - p.strike) / p.strike;
        q.log_moneyness = fabsf(off) < 0.4f ? log1pf(off) : logf(q.spot / p.strike);
        q.root_left = sqrtf(years);
        q.width = 0.0f;
        if (p.baseline == GIVEN) {
            const float* given = extra + ((uint64_t)path * p.steps + t) * p.columns;
            q.baseline = given[0];
            if (p.head > BAND) {
                q.width = given[1];
            }
            return q;
        }
        const float spread = p.volatility * q.root_left;
        const float2 normal = normal_cdf_and_bell((q.log_moneyness + p.rate * years) / spread + 0.5f * spread);
        q.baseline = normal.x - (float)p.baseline;
        if (p.head > BAND) {
            const float gamma = normal.y * 0.39894228f / (q.spot * spread);
            const float cube = 1.5f * expf(-p.rate * years) * unit_cost(q.spot) * gamma * gamma / risk[4 * model + 3];
            q.width = cube > 1e-37f ? expf(logf(cube) / 3.0f) : 0.0f;
        }
        return q;
    }

    // ---- network ---------------------------------------------------------------------------------------------------------

    // z = b + W·x, or z += W·x; eight rows at a time share the loads of x.
    __device__ __forceinline__ void dense(uint32_t x, uint32_t x_rows, uint32_t z, uint32_t z_rows, uint32_t at, uint32_t bias, bool adds) const {
        for (uint32_t j = 0; j < z_rows; j += 8) {
            float sum[8];
            uint32_t row[8];
#pragma unroll
            for (uint32_t r = 0; r < 8; r++) {
                const uint32_t own = min(j + r, z_rows - 1);
                row[r] = at + own * x_rows;
                sum[r] = adds ? cell(z + own) : w[bias + own];
            }
            for (uint32_t i = 0; i < x_rows; i++) {
                const float v = cell(x + i);
#pragma unroll
                for (uint32_t r = 0; r < 8; r++) {
                    sum[r] += v * w[row[r] + i];
                }
            }
#pragma unroll
            for (uint32_t r = 0; r < 8; r++) {
                if (j + r < z_rows) {
                    cell(z + j + r) = sum[r];
                }
            }
        }
    }

    // Wᵀ·d for four columns from i on, or the last one where they are past it.
    __device__ __forceinline__ void pulled(uint32_t d, uint32_t d_rows, uint32_t at, uint32_t x_rows, uint32_t i, float (&sum)[4]) const {
        uint32_t col[4];
#pragma unroll
        for (uint32_t k = 0; k < 4; k++) {
            col[k] = at + min(i + k, x_rows - 1);
            sum[k] = 0.0f;
        }
        for (uint32_t j = 0; j < d_rows; j++) {
            const float v = cell(d + j);
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
                sum[k] += v * w[col[k] + j * x_rows];
            }
        }
    }

    // Activations of a step from row `acts` on, and the state behind it but for the holding.
    __device__ __forceinline__ void network(uint32_t t, const Prices& q, uint32_t before, uint32_t after, uint32_t acts) const {
        cell(acts) = q.log_moneyness;
        cell(acts + 1) = q.root_left;
        cell(acts + 2) = q.baseline;
        cell(acts + 3) = cell(before);
        const uint64_t features = ((uint64_t)path * p.steps + t + 1) * p.columns + 4 - p.inputs;
        for (uint32_t i = 4; i < p.inputs; i++) {
            cell(acts + i) = extra[features + i - 4];
        }
        uint32_t at = 0, x = acts, x_rows = p.inputs;
        const uint32_t h = p.width0;
        for (uint32_t l = 0; l < p.layers; l++) {
            const uint32_t z = acts + gradients(l);
            if (p.lstm == 0) {
                const uint32_t width = width_of(l);
                dense(x, x_rows, z, width, at, at + width * x_rows, false);
                at += width * (x_rows + 1);
                x = acts + activations(l);
                x_rows = width;
                for (uint32_t j = 0; j < width; j++) {
                    cell(x + j) = activation(p.activation, cell(z + j));
                }
                continue;
            }
            const uint32_t state = 1 + 2 * l * h;
            for (uint32_t j = 0; j < h; j++) {
                cell(x + x_rows + j) = cell(before + state + j);
            }
            dense(x, x_rows, z, 4 * h, at, at + 4 * h * (x_rows + h), false);
            dense(x + x_rows, h, z, 4 * h, at + 4 * h * x_rows, 0, true);
            at += 4 * h * (x_rows + h + 1);
            x = acts + layer_input(l + 1);
            x_rows = h;
            for (uint32_t j = 0; j < h; j++) {
                const float i = sigmoid_f32(cell(z + j)), f = sigmoid_f32(cell(z + h + j));
                const float g = tanh_f32(cell(z + 2 * h + j)), o = sigmoid_f32(cell(z + 3 * h + j));
                const float c = f * cell(before + state + h + j) + i * g, y = o * tanh_f32(c);
                cell(z + j) = i;
                cell(z + h + j) = f;
                cell(z + 2 * h + j) = g;
                cell(z + 3 * h + j) = o;
                cell(after + state + h + j) = c;
                cell(after + state + j) = y;
                cell(x + j) = y;
            }
        }
        dense(x, x_rows, acts + gradients(p.layers), outputs(), at, at + outputs() * x_rows, false);
    }

    // Width of a band and its slope by the output.
    __device__ __forceinline__ float2 band_width(const Prices& q, float o) const {
        if (p.head == BAND) {
            const float slope = o < 0.0f ? LEAK : 1.0f;
            return make_float2(slope * o, slope);
        }
        const float bounded = tanh_f32(o), width = q.width * expf(p.range * bounded);
        return make_float2(width, width * p.range * (1.0f - bounded * bounded));
    }

    __device__ __forceinline__ Holding decide(const Prices& q, float previous, uint32_t out) const {
        if (p.head == RESIDUAL) {
            const float bounded = tanh_f32(cell(out));
            return {q.baseline + p.range * bounded, 0.0f, p.range * (1.0f - bounded * bounded), 0.0f};
        }
        const float2 below = band_width(q, cell(out)), above = band_width(q, cell(out + 1));
        const float low = q.baseline - below.x, high = q.baseline + above.x;
        if (low > high) {
            return {0.5f * (low + high), 0.0f, -0.5f * below.y, 0.5f * above.y};
        }
        if (previous <= low) {
            return {low, 0.0f, -below.y, 0.0f};
        }
        if (previous >= high) {
            return {high, 0.0f, 0.0f, above.y};
        }
        return {previous, 1.0f, 0.0f, 0.0f};
    }

    // Outputs' gradients become those of all layers; returns that of the previous holding as an input.
    __device__ __forceinline__ float network_backward(uint32_t before, uint32_t after, uint32_t acts, uint32_t adjoint) const {
        const uint32_t h = p.width0;
        // The product above a layer: where its gradient is, how many rows, and its weight.
        uint32_t d = acts + gradients(p.layers), d_rows = outputs();
        uint32_t at = p.weights - outputs() * ((p.lstm > 0 ? h : width_of(p.layers - 1)) + 1);
        float sum[4];
        for (uint32_t below = p.layers; below > 0; below--) {
            const uint32_t l = below - 1, z = acts + gradients(l);
            const uint32_t inputs = l == 0 ? p.inputs : (p.lstm > 0 ? h : width_of(l - 1));
            if (p.lstm == 0) {
                const uint32_t width = width_of(l), y = acts + activations(l);
                const uint32_t saved = p.activation == GELU || p.activation == SILU ? z : y;
                for (uint32_t i = 0; i < width; i += 4) {
                    pulled(d, d_rows, at, width, i, sum);
#pragma unroll
                    for (uint32_t k = 0; k < 4; k++) {
                        if (i + k < width) {
                            cell(z + i + k) = sum[k] * activation_slope(p.activation, cell(saved + i + k));
                        }
                    }
                }
                d = z;
                d_rows = width;
                at -= width * (inputs + 1);
                continue;
            }
            const uint32_t state = 1 + 2 * l * h;
            for (uint32_t j = 0; j < h; j += 4) {
                pulled(d, d_rows, at, h, j, sum);
#pragma unroll
                for (uint32_t k = 0; k < 4; k++) {
                    const uint32_t r = j + k;
                    if (r >= h) {
                        break;
                    }
                    const float grad_h = cell(adjoint + state + r) + sum[k];
                    const float i = cell(z + r), f = cell(z + h + r), g = cell(z + 2 * h + r), o = cell(z + 3 * h + r);
                    const float squashed = tanh_f32(cell(after + state + h + r));
                    const float grad_c = cell(adjoint + state + h + r) + grad_h * o * (1.0f - squashed * squashed);
                    cell(adjoint + state + h + r) = grad_c * f;
                    cell(z + r) = grad_c * g * i * (1.0f - i);
                    cell(z + h + r) = grad_c * cell(before + state + h + r) * f * (1.0f - f);
                    cell(z + 2 * h + r) = grad_c * i * (1.0f - g * g);
                    cell(z + 3 * h + r) = grad_h * squashed * o * (1.0f - o);
                }
            }
            d = z;
            d_rows = 4 * h;
            at -= 4 * h * (inputs + h + 1);
            for (uint32_t j = 0; j < h; j += 4) {
                pulled(d, d_rows, at + 4 * h * inputs, h, j, sum);
#pragma unroll
                for (uint32_t k = 0; k < 4; k++) {
                    if (j + k < h) {
                        cell(adjoint + state + j + k) = sum[k];
                    }
                }
            }
        }
        pulled(d, d_rows, 0, p.inputs, 3, sum);
        return sum[0];
    }

    // ---- rollout ---------------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void roll(const float* claim, float* pnl, float* costs) const {
        const uint64_t n = (uint64_t)model * p.paths + path;
        float total = p.premium * growth(0), cost = 0.0f, turnover = 0.0f;
        if (p.from_step == 0) {
            for (uint32_t i = 0; i < p.state; i++) {
                cell(i) = 0.0f;
            }
        } else {
            total = pnl[n];
            cost = costs[2 * n];
            turnover = costs[2 * n + 1];
        }
        for (uint32_t t = p.from_step; t < min(p.to_step, length); t++) {
            const uint32_t before = slot_of(t), after = slot_of(t + 1);
            const Prices q = prices_at(t);
            network(t, q, before, after, p.acts);
            const float previous = cell(before), hold = decide(q, previous, p.acts + gradients(p.layers)).hold;
            const float trade = hold - previous, paid = charge(trade, q.spot);
            total += hold * (spot_at(t + 1) * growth(t + 1) - q.spot * growth(t)) - paid * growth(t);
            cost += paid;
            turnover += fabsf(trade);
            cell(after) = hold;
        }
        if (p.from_step < length && length <= p.to_step) {
            const float last = cell(slot_of(length)), price = spot_at(length);
            if (p.unwind > 0) {
                const float paid = charge(last, price);
                total -= paid;
                cost += paid;
                turnover += fabsf(last);
            }
            total -= p.claim == GIVEN ? claim[path] : fmaxf(p.claim == 1 ? p.strike - price : price - p.strike, 0.0f);
        }
        for (uint32_t t = max(p.from_step, length); t < p.to_step; t++) {
            cell(slot_of(t + 1)) = cell(slot_of(t));
        }
        pnl[n] = total;
        costs[2 * n] = cost;
        costs[2 * n + 1] = turnover;
    }

    // What a unit traded at step t takes from the loss.
    __device__ __forceinline__ float per_unit(uint32_t t, float by_pnl, float by_cost, float by_turnover) const {
        return unit_cost(spot_at(t)) * (by_pnl * growth(t) - by_cost) - by_turnover;
    }

    __device__ __forceinline__ void unroll(const float* grad_pnl, const float* grad_costs) const {
        const uint64_t n = (uint64_t)model * p.paths + path;
        const float by_pnl = grad_pnl[n], by_cost = grad_costs[2 * n], by_turnover = grad_costs[2 * n + 1];
        const uint32_t adjoint = p.slots * p.state;
        if (p.to_step == p.steps) {
            for (uint32_t i = 0; i < p.state; i++) {
                cell(adjoint + i) = 0.0f;
            }
        }
        for (uint32_t later = p.to_step; later > p.from_step; later--) {
            const uint32_t t = later - 1, before = t * p.state, after = before + p.state;
            const uint32_t acts = p.acts + (t - p.from_step) * p.step_rows, out = acts + gradients(p.layers);
            if (t >= length) {
                for (uint32_t i = 0; i < p.step_rows; i++) {
                    cell(acts + i) = 0.0f;
                }
                continue;
            }
            const Prices q = prices_at(t);
            network(t, q, before, after, acts);
            const float previous = cell(before), held = cell(after);
            const Holding decision = decide(q, previous, out);
            float next_trade = 0.0f;
            if (later < length) {
                next_trade = cell(after + p.state) - held;
            } else if (p.unwind > 0) {
                next_trade = -held;
            }
            const float earned = by_pnl * (spot_at(later) * growth(later) - q.spot * growth(t));
            const float paid = sign_of(next_trade) * per_unit(later, by_pnl, by_cost, by_turnover) -
                               sign_of(held - previous) * per_unit(t, by_pnl, by_cost, by_turnover);
            const float by_hold = cell(adjoint) + earned + paid;
            cell(out) = by_hold * decision.by_first;
            if (p.head != RESIDUAL) {
                cell(out + 1) = by_hold * decision.by_second;
            }
            const float by_input = network_backward(before, after, acts, adjoint);
            cell(adjoint) = by_hold * decision.by_previous + by_input;
            if (t % p.lookback == 0) {
                for (uint32_t i = 1; i < p.state; i++) {
                    cell(adjoint + i) = 0.0f;
                }
            }
        }
    }
};

// Takes this thread's model and path and loads the weights; false where there is no path.
__device__ __forceinline__ bool begin(Rollout& r, float* sh_weights, const float* weights, float* scratch) {
    const HedgeRolloutParams& p = r.p;
    const uint32_t blocks = (p.paths + WG - 1) / WG, group = group_index();
    r.model = group / blocks;
    r.path = group % blocks * WG + threadIdx.x;
    r.column = scratch + ((uint64_t)r.model * p.rows * p.stride + r.path);
    r.w = weights + (uint64_t)r.model * p.weights;
    if (SHARED > 1) {
        if (r.model < p.models) {
            for (uint32_t i = threadIdx.x; i < p.weights; i += WG) {
                sh_weights[i] = r.w[i];
            }
        }
        __syncthreads();
        r.w = sh_weights;
    }
    const bool live = r.model < p.models && r.path < p.paths;
    r.length = live ? r.length_of() : 0;
    return live;
}

__device__ __forceinline__ void roll_paths(const float* weights, const float* risk, const float* spot, const float* extra, const float* claim,
                                           float* scratch, float* pnl, float* costs, const HedgeRolloutParams& params, float* sh_weights) {
    Rollout r = {params, 0, 0, nullptr, risk, spot, extra, nullptr, 0};
    if (begin(r, sh_weights, weights, scratch)) {
        r.roll(claim, pnl, costs);
    }
}

__device__ __forceinline__ void unroll_paths(const float* weights, const float* risk, const float* spot, const float* extra, const float* grad_pnl,
                                             float* scratch, const float* grad_costs, const HedgeRolloutParams& params, float* sh_weights) {
    Rollout r = {params, 0, 0, nullptr, risk, spot, extra, nullptr, 0};
    if (begin(r, sh_weights, weights, scratch)) {
        r.unroll(grad_pnl, grad_costs);
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_rollout(const float* weights, const float* risk, const float* spot, const float* extra, const float* claim, float* scratch, float* pnl,
                  float* costs, HedgeRolloutParams params) {
    __shared__ float sh_weights[SHARED];
    roll_paths(weights, risk, spot, extra, claim, scratch, pnl, costs, params, sh_weights);
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_rollout_cached(const float* weights, const float* risk, const float* spot, const float* extra, const float* claim, float* scratch,
                         float* pnl, float* costs, HedgeRolloutParams params) {
    __shared__ float sh_weights[SHARED];
    roll_paths(weights, risk, spot, extra, claim, scratch, pnl, costs, params, sh_weights);
}

extern "C" __global__ void __launch_bounds__(WG) hedge_rollout_holdings(const float* scratch, float* holdings, HedgeRolloutParams params) {
    const uint32_t blocks = (params.paths + WG - 1) / WG, group = group_index();
    const uint32_t m = group / blocks, n = group % blocks * WG + threadIdx.x;
    if (m >= params.models || n >= params.paths) {
        return;
    }
    for (uint32_t t = 0; t < params.steps; t++) {
        const uint64_t row = (uint64_t)m * params.rows + (t + 1) * params.state;
        holdings[((uint64_t)m * params.paths + n) * params.steps + t] = scratch[row * params.stride + n];
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_rollout_reverse(const float* weights, const float* risk, const float* spot, const float* extra, const float* grad_pnl, float* scratch,
                          const float* grad_costs, HedgeRolloutParams params) {
    __shared__ float sh_weights[SHARED];
    unroll_paths(weights, risk, spot, extra, grad_pnl, scratch, grad_costs, params, sh_weights);
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_rollout_reverse_cached(const float* weights, const float* risk, const float* spot, const float* extra, const float* grad_pnl,
                                 float* scratch, const float* grad_costs, HedgeRolloutParams params) {
    __shared__ float sh_weights[SHARED];
    unroll_paths(weights, risk, spot, extra, grad_pnl, scratch, grad_costs, params, sh_weights);
}

// ---- gradient of a weight -------------------------------------------------------------------------------------------------------

#define DEPTH 16u

// One row of activations at a path, 0 past the rows and the paths; row `ones` is 1.
__device__ __forceinline__ float kept_at(const float* __restrict__ kept, const HedgeRolloutParams& p, uint32_t m, uint32_t t, uint32_t row,
                                         uint32_t rows, uint32_t first, uint32_t n, uint32_t ones) {
    if (n >= p.paths) {
        return 0.0f;
    }
    if (row == ones) {
        return 1.0f;
    }
    if (row >= rows) {
        return 0.0f;
    }
    return kept[((uint64_t)m * p.rows + p.acts + (t - p.from_step) * p.step_rows + first + row) * p.stride + n];
}

extern "C" __global__ void __launch_bounds__(WG) hedge_rollout_weights(const float* kept, float* partials, HedgeRolloutParams params) {
    __shared__ float sh_d[32][DEPTH + 1], sh_x[32][DEPTH + 1];
    const uint32_t across = (params.x_rows + 32) / 32, tiles = (params.d_rows + 31) / 32 * across;
    const uint32_t blocks = (params.paths + BLOCK - 1) / BLOCK, group = group_index();
    const uint32_t m = group / (tiles * blocks), block = group / tiles % blocks, tile = group % tiles;
    if (m >= params.models) {
        return;
    }
    const uint32_t d0 = tile / across * 32, x0 = tile % across * 32;
    const uint32_t own_d = threadIdx.x / 8 * 4, own_x = threadIdx.x % 8 * 4;
    // The bias is the weight of an input of ones behind the others.
    const bool with_bias = params.bias_at < params.weights;
    float* own = partials + ((uint64_t)m * params.partials + (params.first_block + block) % params.partials) * params.weights;
    float sum[4][4];
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            const uint32_t j = d0 + own_d + r, i = x0 + own_x + c;
            sum[r][c] = 0.0f;
            if (j < params.d_rows && i < params.x_rows) {
                sum[r][c] = own[params.weight_at + j * params.x_rows + i];
            } else if (with_bias && j < params.d_rows && i == params.x_rows) {
                sum[r][c] = own[params.bias_at + j];
            }
        }
    }
    for (uint32_t later = params.to_step; later > params.from_step; later--) {
        for (uint32_t p0 = 0; p0 < BLOCK; p0 += DEPTH) {
            for (uint32_t e = threadIdx.x; e < 32 * DEPTH; e += WG) {
                const uint32_t row = e / DEPTH, k = e % DEPTH, n = block * BLOCK + p0 + k;
                sh_d[row][k] = kept_at(kept, params, m, later - 1, d0 + row, params.d_rows, params.d_row, n, 0xffffffffu);
                sh_x[row][k] = kept_at(kept, params, m, later - 1, x0 + row, params.x_rows, params.x_row, n, params.x_rows);
            }
            __syncthreads();
#pragma unroll 4
            for (uint32_t k = 0; k < DEPTH; k++) {
                float d[4], x[4];
#pragma unroll
                for (uint32_t r = 0; r < 4; r++) {
                    d[r] = sh_d[own_d + r][k];
                    x[r] = sh_x[own_x + r][k];
                }
#pragma unroll
                for (uint32_t r = 0; r < 4; r++) {
#pragma unroll
                    for (uint32_t c = 0; c < 4; c++) {
                        sum[r][c] += d[r] * x[c];
                    }
                }
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            const uint32_t j = d0 + own_d + r, i = x0 + own_x + c;
            if (j < params.d_rows && i < params.x_rows) {
                own[params.weight_at + j * params.x_rows + i] = sum[r][c];
            } else if (with_bias && j < params.d_rows && i == params.x_rows) {
                own[params.bias_at + j] = sum[r][c];
            }
        }
    }
}
