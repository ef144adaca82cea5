// Gradients of the log-likelihood of hidden Markov models, and through their posteriors. Maths, shapes and source:
// kernels/hmm_gradient.rs.
//   hmm_gradient_chain      grid  ⌈B·T·K / WG⌉             thread = (sequence, step, state)
//   hmm_gradient_emission   grid  ⌈B·C·P / WG⌉             thread = (sequence, block of steps, parameter)
//   hmm_gradient_table      grid  ⌈B·C·K² / WG⌉            thread = (sequence, block of steps, pair of states)
//   hmm_gradient_steps      grid  ⌈(B or 1)·(T−1)·K² / WG⌉ thread = (sequence or all, slot, pair of states)
//   hmm_gradient_softmax    grid  B·C·K                    block = (sequence, block of steps, row)
//   hmm_gradient_reduce     grid  ⌈⌈rows / block⌉·P / WG⌉  thread = (block of rows, column)
//   hmm_tangent             grid  ⌈B / (WG / lanes)⌉       `lanes` threads per sequence, states over them
//   hmm_tangent_posterior   grid  ⌈B·T·K / WG⌉             thread = (sequence, step, state)

struct HmmGradientParams {
    uint32_t b;
    uint32_t t;
    uint32_t k;
    uint32_t d;
    uint32_t u;
    uint32_t p;
    uint32_t blocks;
    uint32_t lanes;
    uint32_t emission;
    uint32_t symbols;
    uint32_t flags;
    uint32_t begin;
    uint32_t end;
    uint32_t model_stride;
    uint32_t trans_stride;
    uint32_t trans_step;
    uint32_t start_stride;
    uint32_t start_offset;
    uint32_t init_stride;
    uint32_t direction_stride;
    uint32_t direction_step;
};

struct HmmReduceParams {
    uint32_t rows;
    uint32_t p;
    uint32_t block;
};

// Steps of one partial sum.
#define BLOCK 256u
// Most states of hmm_tangent, and floats of a tile of hmm_gradient_softmax.
#define STATES 1024u
#define LARGEST 1e36f
#define IMPOSSIBLE (-1e29f)

// Bits of flags: those of kernels/hmm.rs, then our own.
#define SOFTMAX 8u
#define LENGTHS 16u
#define MASKED 32u
#define FORWARD 2048u
#define BACKWARD 4096u
#define UPSTREAM 65536u
#define TANGENT 131072u
#define MOVES_INIT 262144u
#define MOVES_TRANS 524288u
#define MOVES_OBS 1048576u

__device__ __forceinline__ bool has(const HmmGradientParams& params, uint32_t flag) {
    return (params.flags & flag) != 0;
}

// Words of one sequence: its length, then its mask.
__device__ __forceinline__ uint32_t words_stride(const HmmGradientParams& params) {
    return has(params, MASKED) ? 1 + params.t : 1;
}

// ---- chain: what the steps of a sequence need of each other ---------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    hmm_gradient_chain(const float* __restrict__ filtered, const float* __restrict__ predicted, const float* __restrict__ posterior,
                       const float* __restrict__ grad_log_likelihood, const uint32_t* __restrict__ words, float* __restrict__ grad_log_obs,
                       float* __restrict__ chain, HmmGradientParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.t * params.k) {
        return;
    }
    const uint32_t row = at / params.k, k = at % params.k;
    const uint32_t b = row / params.t, t = row % params.t;
    const float g = has(params, UPSTREAM) ? grad_log_likelihood[b] : 1.0f;
    const float share = posterior[at];
    float ratio = share;
    if (t > 0) {
        const float p = predicted[at];
        ratio = p > 0.0f && share > 0.0f ? fminf(share / p, LARGEST) : 0.0f;
    }
    const bool observed = !has(params, MASKED) || words[b * (1 + params.t) + 1 + t] != 0;
    chain[2 * row * params.k + k] = filtered[at];
    chain[(2 * row + 1) * params.k + k] = g * ratio;
    grad_log_obs[at] = observed ? share * g : 0.0f;
}

// ---- emissions ------------------------------------------------------------------------------------------------------

#define GAUSSIAN_DIAGONAL 1u
#define GAUSSIAN_FULL 2u
#define STUDENT_T 3u
#define POISSON 4u
#define CATEGORICAL 5u
#define REGRESSION 6u

// A parameter of one state: its block (location, scale, …), its state, and its place within both.
struct Parameter {
    uint32_t kind, k, i, j;
};

__device__ __forceinline__ Parameter parameter_of(const HmmGradientParams& params, uint32_t at) {
    const uint32_t kd = params.k * params.d;
    if (params.emission == CATEGORICAL) {
        return {0, at / params.symbols, at % params.symbols, 0};
    }
    if (params.emission == REGRESSION) {
        const uint32_t width = params.d - 1;
        if (at < params.k * width) {
            return {0, at / width, at % width, 0};
        }
        return {1, at - params.k * width, 0, 0};
    }
    if (params.emission == GAUSSIAN_FULL && at >= kd) {
        const uint32_t size = params.d * (params.d + 1) / 2;
        uint32_t row = 0, rest = (at - kd) % size;
        while (rest > row) {
            row++;
            rest -= row;
        }
        return {1, (at - kd) / size, row, rest};
    }
    return {at / kd, (at % kd) / params.d, at % params.d, 0};
}

// ψ(x + ½) − ψ(x) − 1/2x by recurrence and the asymptotic series.
__device__ __forceinline__ float digamma_step(float x) {
    float y = x, sum = 0.0f;
    if (x < 8.0f) {
        for (int n = 0; n < 8; n++) {
            sum += 0.5f / (y * (y + 0.5f));
            y += 1.0f;
        }
        sum -= 4.0f / (x * y);
    }
    const float inverse = 1.0f / (y * y);
    return sum + inverse * (0.125f - inverse * (0.015625f - inverse * 0.0078125f));
}

// An observation, or its distance from a mean: products stay finite.
__device__ __forceinline__ float capped(float x) {
    return fminf(fmaxf(x, -1e18f), 1e18f);
}

// A distance in deviations, whose square stays finite.
__device__ __forceinline__ float bounded(float z) {
    return fminf(fmaxf(z, -1e14f), 1e14f);
}

// Row `row` of the inverse Cholesky factor, times x − mean.
__device__ __forceinline__ float whitened(const float* __restrict__ factor, const float* __restrict__ mean, const float* __restrict__ x, uint32_t row) {
    float sum = 0.0f;
    for (uint32_t c = 0; c <= row; c++) {
        sum += factor[row * (row + 1) / 2 + c] * capped(x[c] - mean[c]);
    }
    return bounded(sum);
}

// Derivative of log b_k(x) with respect to one parameter of the sequence's model.
__device__ __forceinline__ float score(const HmmGradientParams& params, Parameter q, const float* __restrict__ model, const float* __restrict__ x) {
    const uint32_t kd = params.k * params.d;
    const float* own = model + params.k + q.k * params.d + q.i;
    if (params.emission == GAUSSIAN_DIAGONAL) {
        const float z = bounded(capped(x[q.i] - own[0]) * own[kd]);
        return q.kind == 0 ? z * own[kd] : 0.5f * (z * z - 1.0f);
    }
    if (params.emission == GAUSSIAN_FULL) {
        const float* mean = model + params.k + q.k * params.d;
        const float* factor = model + params.k + kd + q.k * (params.d * (params.d + 1) / 2);
        if (q.kind == 1) {
            const float diagonal = q.i == q.j ? 1.0f / factor[q.i * (q.i + 3) / 2] : 0.0f;
            return diagonal - whitened(factor, mean, x, q.i) * capped(x[q.j] - mean[q.j]);
        }
        float sum = 0.0f;
        for (uint32_t row = q.i; row < params.d; row++) {
            sum += factor[row * (row + 1) / 2 + q.i] * whitened(factor, mean, x, row);
        }
        return sum;
    }
    if (params.emission == STUDENT_T) {
        const float scale = own[kd], inverse = own[3 * kd];
        const float z = bounded(capped(x[q.i] - own[0]) * scale);
        const float tail = z * z * inverse;
        const float w = 2.0f * own[2 * kd] / (1.0f + tail);
        if (q.kind == 0) {
            return w * inverse * z * scale;
        }
        if (q.kind == 1) {
            return w * tail - 1.0f;
        }
        return 0.5f * (digamma_step(0.5f / inverse) - log1pf(tail) + w * tail * inverse);
    }
    if (params.emission == POISSON) {
        return capped(x[q.i]) - expf(own[0]);
    }
    if (params.emission == CATEGORICAL) {
        return (uint32_t)x[0] == q.i ? 1.0f : 0.0f;
    }
    const uint32_t width = params.d - 1;
    const float* beta = model + params.k + q.k * width;
    float residual = capped(x[0]);
    for (uint32_t r = 0; r < width; r++) {
        residual -= beta[r] * capped(x[1 + r]);
    }
    const float inverse = model[params.k + params.k * width + q.k];
    const float z = bounded(residual * inverse);
    return q.kind == 0 ? z * inverse * capped(x[1 + q.i]) : 0.5f * (z * z - 1.0f);
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_gradient_emission(const float* __restrict__ start, const float* __restrict__ grad_log_obs, const float* __restrict__ obs,
                          const float* __restrict__ model, float* __restrict__ partials, HmmGradientParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.blocks * params.p) {
        return;
    }
    const uint32_t p = at % params.p, block = (at / params.p) % params.blocks, b = at / params.p / params.blocks;
    float sum = 0.0f;
    if (p < params.k) {
        if (block == 0) {
            sum = start[b * params.start_stride + params.start_offset + p];
        }
    } else {
        const Parameter q = parameter_of(params, p - params.k);
        const uint32_t end = min((block + 1) * BLOCK, params.t);
        for (uint32_t t = block * BLOCK; t < end; t++) {
            const uint32_t row = b * params.t + t;
            const float weight = grad_log_obs[row * params.k + q.k];
            if (weight != 0.0f) {
                sum += weight * score(params, q, model + b * params.model_stride, obs + row * params.d);
            }
        }
    }
    partials[at] = sum;
}

// ---- transitions ----------------------------------------------------------------------------------------------------

// Posterior of the pair (i, j) at slot t without its transition probability; in a tangent pass times the slope of its logarithm.
__device__ __forceinline__ float pair(const HmmGradientParams& params, const float* __restrict__ chain, const float* __restrict__ tangent,
                                      const float* __restrict__ direction, uint32_t b, uint32_t t, uint32_t i, uint32_t j) {
    const uint32_t k = params.k, row = b * params.t + t;
    const float x = chain[2 * row * k + i] * chain[(2 * row + 3) * k + j];
    if (!has(params, TANGENT)) {
        return x;
    }
    float slope = tangent[3 * row * k + i] + tangent[(3 * row + 4) * k + j];
    if (has(params, MOVES_TRANS)) {
        slope += direction[b * params.direction_stride + t * params.direction_step + i * k + j];
    }
    return x * slope;
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_gradient_table(const float* __restrict__ chain, const float* __restrict__ transitions, const float* __restrict__ tangent,
                       const float* __restrict__ direction, float* __restrict__ partials, HmmGradientParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    const uint32_t k = params.k;
    if (at >= params.b * params.blocks * k * k) {
        return;
    }
    const uint32_t i = (at / k) % k, j = at % k;
    const uint32_t block = (at / (k * k)) % params.blocks, b = at / (k * k) / params.blocks;
    const float a = expf(transitions[b * params.trans_stride + i * k + j]);
    const uint32_t end = min((block + 1) * BLOCK, params.t - 1);
    float sum = 0.0f;
    for (uint32_t t = block * BLOCK; t < end; t++) {
        sum += a * pair(params, chain, tangent, direction, b, t, i, j);
    }
    partials[at] = sum;
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_gradient_steps(const float* __restrict__ chain, const float* __restrict__ transitions, const float* __restrict__ tangent,
                       const float* __restrict__ direction, float* __restrict__ grad_log_trans, HmmGradientParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    const uint32_t k = params.k, slots = params.t - 1;
    // `p` sequences have a gradient of their own: all, or one that gathers them.
    if (at >= params.p * slots * k * k) {
        return;
    }
    const uint32_t i = (at / k) % k, j = at % k, t = (at / (k * k)) % slots, first = at / (k * k) / slots;
    const uint32_t last = params.p > 1 ? first + 1 : params.b;
    float sum = grad_log_trans[at];
    for (uint32_t b = first; b < last; b++) {
        const float a = expf(transitions[b * params.trans_stride + t * params.trans_step + i * k + j]);
        sum += a * pair(params, chain, tangent, direction, b, t, i, j);
    }
    grad_log_trans[at] = sum;
}

// ---- input-driven transitions ---------------------------------------------------------------------------------------

// Row i, column j of the transition logits of slot t: the inputs of step t + 1.
__device__ __forceinline__ float logit(const HmmGradientParams& params, const float* __restrict__ weights, const float* __restrict__ inputs, uint32_t b,
                                       uint32_t t, uint32_t i, uint32_t j) {
    const float* w = weights + b * params.trans_stride + (i * params.k + j) * (params.u + 1);
    const float* x = inputs + (b * params.t + t + 1) * params.u;
    float sum = w[params.u];
    for (uint32_t q = 0; q < params.u; q++) {
        sum += w[q] * capped(x[q]);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_gradient_softmax(const float* __restrict__ chain, const float* __restrict__ transitions, const float* __restrict__ tangent,
                         const float* __restrict__ direction, const float* __restrict__ inputs, float* __restrict__ partials, HmmGradientParams params) {
    __shared__ float sh_tile[STATES];
    const uint32_t group = group_index();
    const uint32_t k = params.k;
    if (group >= params.b * params.blocks * k) {
        return;
    }
    const uint32_t i = group % k, block = (group / k) % params.blocks, b = group / k / params.blocks;
    const uint32_t begin = block * BLOCK, end = min(begin + BLOCK, params.t - 1);
    const uint32_t tile = min(STATES / k, (uint32_t)WG), width = k * (params.u + 1);
    for (uint32_t from = begin; from < max(end, begin + 1); from += tile) {
        // Logits of the tile's rows.
        for (uint32_t e = threadIdx.x; e < tile * k; e += WG) {
            const uint32_t t = from + e / k;
            if (t < end) {
                sh_tile[e] = logit(params, transitions, inputs, b, t, i, e % k);
            }
        }
        __syncthreads();
        // Pair posterior less its expectation, one thread per step.
        const uint32_t t = from + threadIdx.x;
        if (threadIdx.x < tile && t < end) {
            float* row = sh_tile + threadIdx.x * k;
            float top = row[0];
            for (uint32_t j = 1; j < k; j++) {
                top = fmaxf(top, row[j]);
            }
            // A row of hard zeros leads nowhere.
            float mass = top <= IMPOSSIBLE ? LARGEST : 0.0f;
            for (uint32_t j = 0; j < k; j++) {
                row[j] = expf(row[j] - top);
                mass += row[j];
            }
            float total = 0.0f;
            for (uint32_t j = 0; j < k; j++) {
                row[j] /= mass;
                total += row[j] * pair(params, chain, tangent, direction, b, t, i, j);
            }
            for (uint32_t j = 0; j < k; j++) {
                row[j] *= pair(params, chain, tangent, direction, b, t, i, j) - total;
            }
        }
        __syncthreads();
        // Outer product with the inputs.
        const uint32_t steps = end > from ? min(tile, end - from) : 0;
        for (uint32_t p = threadIdx.x; p < width; p += WG) {
            const uint32_t j = p / (params.u + 1), q = p % (params.u + 1);
            float sum = 0.0f;
            for (uint32_t s = 0; s < steps; s++) {
                const float x = q < params.u ? capped(inputs[(b * params.t + from + s + 1) * params.u + q]) : 1.0f;
                sum += sh_tile[s * k + j] * x;
            }
            float* own = partials + group * width + p;
            *own = from == begin ? sum : *own + sum;
        }
        __syncthreads();
    }
}

// ---- reduction ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) hmm_gradient_reduce(const float* __restrict__ partials, float* __restrict__ sums, HmmReduceParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    const uint32_t first = at / params.p * params.block;
    if (first >= params.rows) {
        return;
    }
    const uint32_t last = min(first + params.block, params.rows);
    float sum = 0.0f;
    for (uint32_t row = first; row < last; row++) {
        sum += partials[row * params.p + at % params.p];
    }
    sums[at] = sum;
}

// ---- tangent --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float log_normaliser(const HmmGradientParams& params, const float* __restrict__ weights, const float* __restrict__ inputs,
                                                uint32_t b, uint32_t t, uint32_t i) {
    float top = logit(params, weights, inputs, b, t, i, 0);
    for (uint32_t j = 1; j < params.k; j++) {
        top = fmaxf(top, logit(params, weights, inputs, b, t, i, j));
    }
    float mass = 0.0f;
    for (uint32_t j = 0; j < params.k; j++) {
        mass += expf(logit(params, weights, inputs, b, t, i, j) - top);
    }
    // A row of hard zeros leads nowhere.
    return top <= IMPOSSIBLE ? -IMPOSSIBLE : top + logf(mass);
}

// Transition probability; `row` is the logarithm of the row's normaliser where logits are given.
__device__ __forceinline__ float transition(const HmmGradientParams& params, const float* __restrict__ transitions, const float* __restrict__ inputs,
                                            uint32_t b, uint32_t t, uint32_t i, uint32_t j, float row) {
    if (has(params, SOFTMAX)) {
        // Large logits are rounded more coarsely than 1.
        return expf(fminf(logit(params, transitions, inputs, b, t, i, j) - row, 0.0f));
    }
    return expf(transitions[b * params.trans_stride + t * params.trans_step + i * params.k + j]);
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_tangent(const float* __restrict__ chain, const float* __restrict__ transitions, const float* __restrict__ inputs,
                const uint32_t* __restrict__ words, const float* __restrict__ direction_init, const float* __restrict__ direction_trans,
                const float* __restrict__ direction_obs, float* __restrict__ tangent, HmmGradientParams params) {
    __shared__ float sh_now[STATES];
    __shared__ float sh_other[STATES];
    __shared__ float sh_row[STATES];
    const uint32_t per_group = WG / params.lanes, group = group_index();
    if (group * per_group >= params.b) {
        return;
    }
    const uint32_t k = params.k, lanes = params.lanes, lane = threadIdx.x % lanes, slot = threadIdx.x / lanes, own = slot * k;
    const uint32_t b = group * per_group + slot;
    uint32_t length = b < params.b ? params.t : 0;
    if (b < params.b && has(params, LENGTHS)) {
        length = min(words[b * words_stride(params)], params.t);
    }
    const auto moves_trans = [&](uint32_t t, uint32_t i, uint32_t j) {
        return has(params, MOVES_TRANS) ? direction_trans[b * params.direction_stride + t * params.direction_step + i * k + j] : 0.0f;
    };
    const auto moves_obs = [&](uint32_t t, uint32_t j) {
        const bool observed = has(params, MOVES_OBS) && (!has(params, MASKED) || words[b * (1 + params.t) + 1 + t] != 0);
        return observed ? direction_obs[(b * params.t + t) * k + j] : 0.0f;
    };
    // Slopes of the filtered logarithms, centred at every step; a later launch goes on from the step before.
    if (has(params, FORWARD)) {
        if (params.begin > 0 && params.begin < length) {
            for (uint32_t j = lane; j < k; j += lanes) {
                sh_other[own + j] = tangent[3 * (b * params.t + params.begin - 1) * k + j];
            }
        }
        __syncthreads();
        for (uint32_t t = params.begin; t < params.end; t++) {
            if (has(params, SOFTMAX)) {
                if (t > 0 && t < length) {
                    for (uint32_t i = lane; i < k; i += lanes) {
                        sh_row[own + i] = log_normaliser(params, transitions, inputs, b, t - 1, i);
                    }
                }
                __syncthreads();
            }
            const uint32_t row = b * params.t + t;
            if (t < length) {
                for (uint32_t j = lane; j < k; j += lanes) {
                    float slope = t == 0 && has(params, MOVES_INIT) ? direction_init[b * params.init_stride + j] : 0.0f;
                    if (t > 0) {
                        float mass = 0.0f, sum = 0.0f;
                        for (uint32_t i = 0; i < k; i++) {
                            const float share = chain[2 * (row - 1) * k + i] * transition(params, transitions, inputs, b, t - 1, i, j, sh_row[own + i]);
                            mass += share;
                            sum += share * (sh_other[own + i] + moves_trans(t - 1, i, j));
                        }
                        slope = mass > 0.0f ? sum / mass : 0.0f;
                    }
                    sh_now[own + j] = slope + moves_obs(t, j);
                }
            }
            __syncthreads();
            if (t < length) {
                float centre = 0.0f;
                for (uint32_t j = 0; j < k; j++) {
                    centre += chain[2 * row * k + j] * sh_now[own + j];
                }
                for (uint32_t j = lane; j < k; j += lanes) {
                    sh_other[own + j] = sh_now[own + j] - centre;
                    tangent[3 * row * k + j] = sh_now[own + j] - centre;
                }
            }
            __syncthreads();
        }
    }
    // Slopes of the smoothed logarithms; sh_other holds what step t + 1 hands back.
    if (has(params, BACKWARD)) {
        if (params.end < length) {
            for (uint32_t i = lane; i < k; i += lanes) {
                sh_other[own + i] = tangent[(3 * (b * params.t + params.end) + 1) * k + i];
            }
        }
        __syncthreads();
        for (uint32_t back = params.begin; back < params.end; back++) {
            const uint32_t t = params.begin + params.end - 1 - back, row = b * params.t + t;
            if (has(params, SOFTMAX)) {
                if (t + 1 < length) {
                    for (uint32_t i = lane; i < k; i += lanes) {
                        sh_row[own + i] = log_normaliser(params, transitions, inputs, b, t, i);
                    }
                }
                __syncthreads();
            }
            if (t < length) {
                for (uint32_t i = lane; i < k; i += lanes) {
                    float mass = 1.0f, slope = 0.0f;
                    if (t + 1 < length) {
                        mass = 0.0f;
                        float sum = 0.0f;
                        for (uint32_t j = 0; j < k; j++) {
                            const float share = transition(params, transitions, inputs, b, t, i, j, sh_row[own + i]) * chain[(2 * row + 3) * k + j];
                            mass += share;
                            sum += share * (moves_trans(t, i, j) + sh_other[own + j]);
                        }
                        slope = mass > 0.0f ? sum / mass : 0.0f;
                    }
                    const float share = chain[2 * row * k + i] * mass;
                    sh_now[own + i] = share * (tangent[3 * row * k + i] + slope);
                    tangent[(3 * row + 1) * k + i] = slope;
                    tangent[(3 * row + 2) * k + i] = share;
                }
            }
            __syncthreads();
            if (t < length) {
                float centre = 0.0f;
                for (uint32_t i = 0; i < k; i++) {
                    centre += sh_now[own + i];
                }
                for (uint32_t i = lane; i < k; i += lanes) {
                    if (t + 1 < length) {
                        tangent[(3 * row + 4) * k + i] = sh_other[own + i] - centre;
                    }
                    const float slope = tangent[(3 * row + 1) * k + i] - centre;
                    tangent[(3 * row + 2) * k + i] *= tangent[3 * row * k + i] + slope;
                    sh_other[own + i] = moves_obs(t, i) + slope;
                    tangent[(3 * row + 1) * k + i] = sh_other[own + i];
                }
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_tangent_posterior(const float* __restrict__ tangent, const uint32_t* __restrict__ words, float* __restrict__ tangent_posterior,
                          float* __restrict__ grad_log_obs, HmmGradientParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.t * params.k) {
        return;
    }
    const uint32_t row = at / params.k, b = row / params.t, t = row % params.t;
    const uint32_t length = has(params, LENGTHS) ? words[b * words_stride(params)] : params.t;
    const bool observed = !has(params, MASKED) || words[b * (1 + params.t) + 1 + t] != 0;
    const float slope = t < length ? tangent[(3 * row + 2) * params.k + at % params.k] : 0.0f;
    tangent_posterior[at] = slope;
    grad_log_obs[at] = observed ? slope : 0.0f;
}
