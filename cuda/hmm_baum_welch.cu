// Baum-Welch of hidden Markov models. Maths, shapes and source: kernels/hmm_baum_welch.rs.
//   hmm_expectation        grid  ⌈jobs / WG⌉             thread = (model, sequence), K ≤ 4, all state in registers
//   hmm_expectation_lanes  grid  ⌈jobs / (WG / lanes)⌉   8 to 64 threads = (model, sequence), a state each
//   hmm_sums               grid  ⌈jobs·sums / WG⌉        thread = one sum over time of one (model, sequence); none where K ≤ 4, D = 1, normal
//   hmm_reduce             grid  ⌈M·statistics / WG⌉     thread = (model, sum)
//   hmm_maximisation       grid  ⌈M·K / WG⌉              thread = (model, state)
//   spill: some words of hmm_expectation_lanes outside its loops over states, where ptxas stops at 56 registers for the sake of occupancy
// states: γ over α [T,K,jobs] where K ≤ 4; else γ, α and γ/predicted, each [jobs,T,K].

struct BaumWelchParams {
    uint32_t jobs;
    uint32_t models;
    uint32_t restarts;
    uint32_t per_model;
    uint32_t t;
    uint32_t k;
    uint32_t d;
    uint32_t emission;
    uint32_t symbols;
    uint32_t masked;
    uint32_t begin;
    uint32_t end;
    uint32_t phase;
    uint32_t iteration;
    uint32_t action;
    float tolerance;
    float rounding;
    float init_prior;
    float transition_prior;
    float sticky;
    float mean_weight;
};

#define SLOTS 1024
#define BLOCK 64u
#define LOG_ZERO (-1e30f)
#define IMPOSSIBLE (-1e29f)
#define LEAST (-1e28f)
#define TINY 1e-37f
#define HALF_LOG_TAU 0.9189385f
#define EMPTY_STATE 1e-3f
#define EMPTY_ROW 1e-6f
#define LEAST_RATE 1e-6f
#define COLLINEAR 1e-6f

// ---- widths -----------------------------------------------------------------------------------------------------

// Sums of one state, its weight included.
__device__ __forceinline__ uint32_t each_state(const BaumWelchParams& p) {
    const uint32_t d = p.d;
    switch (p.emission) {
        case 0: return 1;
        case 1: return 1 + 2 * d;
        case 2: return 1 + d + d * (d + 1) / 2;
        case 3: return 1 + 4 * d;
        case 4: return 1 + d;
        case 5: return 1 + p.symbols;
        default: return 2 + (d - 1) + (d - 1) * d / 2;
    }
}

__device__ __forceinline__ uint32_t statistics_width(const BaumWelchParams& p) {
    return p.k + p.k * p.k + p.k * each_state(p) + 3;
}

__device__ __forceinline__ uint32_t parameters_width(const BaumWelchParams& p) {
    const uint32_t k = p.k, d = p.d, head = k + k * k;
    switch (p.emission) {
        case 0: return head;
        case 1: return head + 2 * k * d;
        case 2: return head + k * d + k * (d * (d + 1) / 2);
        case 3: return head + 4 * k * d;
        case 5: return head + k * p.symbols;
        default: return head + k * d;
    }
}

__device__ __forceinline__ uint32_t model_width(const BaumWelchParams& p) {
    const uint32_t k = p.k, d = p.d;
    switch (p.emission) {
        case 0: return k;
        case 1: return k + 2 * k * d + k;
        case 2: return k + k * d + k * (d * (d + 1) / 2) + k;
        case 3: return k + 4 * k * d + k;
        case 4: return k + k * d + k;
        case 5: return k + k * p.symbols;
        default: return k + k * (d - 1) + 2 * k;
    }
}

__device__ __forceinline__ uint32_t observed_width(const BaumWelchParams& p) {
    return p.emission == 0 ? p.k : p.d;
}

// ---- functions --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float log_probability(float x) {
    return x >= TINY ? logf(x) : LOG_ZERO;
}

// Adds z to the sum of two.
__device__ __forceinline__ void compensated(float& sum, float& low, float z) {
    const float next = sum + z;
    low += fabsf(sum) >= fabsf(z) ? (sum - next) + z : (z - next) + sum;
    sum = next;
}

// Splits a positive number into a mantissa in [1, 2) and the natural logarithm of its power of two.
__device__ __forceinline__ float mantissa_of(float x, float& level) {
    const uint32_t bits = __float_as_uint(x);
    level = (float)((int)(bits >> 23) - 127) * 0.6931472f;
    return __uint_as_float((bits & 0x7fffffu) | 0x3f800000u);
}

__device__ __forceinline__ float bounded(float z) {
    return fminf(fmaxf(z, -1e14f), 1e14f);
}

__device__ __forceinline__ uint32_t symbol_of(float x, const BaumWelchParams& p) {
    return min((uint32_t)fmaxf(x, 0.0f), p.symbols - 1);
}

// ---- expectation ------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t sequence_of(uint32_t job, const BaumWelchParams& p) {
    return job / p.per_model / p.restarts * p.per_model + job % p.per_model;
}

__device__ __forceinline__ uint32_t words_each(const BaumWelchParams& p) {
    return p.masked != 0 ? 1 + p.t : 1;
}

__device__ __forceinline__ bool is_observed(const uint32_t* __restrict__ words, uint32_t n, uint32_t t, const BaumWelchParams& p) {
    return p.masked == 0 || words[n * words_each(p) + 1 + t] != 0;
}

// Log-density of state s; `e` is the packed emission, `x` the observation.
__device__ __forceinline__ float log_density(const float* __restrict__ e, const float* __restrict__ x, uint32_t s, const BaumWelchParams& p) {
    const uint32_t k = p.k, d = p.d;
    float value;
    switch (p.emission) {
        case 0: return fmaxf(x[s], LOG_ZERO);
        case 1: {
            float squares = 0.0f;
            for (uint32_t i = 0; i < d; i++) {
                const float z = bounded((x[i] - e[s * d + i]) * e[(k + s) * d + i]);
                squares += z * z;
            }
            value = e[2 * k * d + s] - 0.5f * squares;
            break;
        }
        case 2: {
            const uint32_t triangle = d * (d + 1) / 2;
            const float* factor = e + k * d + s * triangle;
            float squares = 0.0f;
            for (uint32_t i = 0; i < d; i++) {
                float z = 0.0f;
                for (uint32_t j = 0; j <= i; j++) {
                    z += factor[i * (i + 1) / 2 + j] * (x[j] - e[s * d + j]);
                }
                z = bounded(z);
                squares += z * z;
            }
            value = e[k * (d + triangle) + s] - 0.5f * squares;
            break;
        }
        case 3: {
            value = e[4 * k * d + s];
            for (uint32_t i = 0; i < d; i++) {
                const float z = bounded((x[i] - e[s * d + i]) * e[(k + s) * d + i]);
                value -= e[(2 * k + s) * d + i] * log1pf(z * z * e[(3 * k + s) * d + i]);
            }
            break;
        }
        case 4: {
            value = e[k * d + s];
            for (uint32_t i = 0; i < d; i++) {
                value += x[i] * e[s * d + i] - lgammaf(x[i] + 1.0f);
            }
            break;
        }
        case 5: return e[s * p.symbols + symbol_of(x[0], p)];
        default: {
            const uint32_t r = d - 1;
            float fit = 0.0f;
            for (uint32_t i = 0; i < r; i++) {
                fit += x[1 + i] * e[s * r + i];
            }
            const float z = bounded((x[0] - fit) * e[k * r + s]);
            value = e[k * r + k + s] - 0.5f * z * z;
            break;
        }
    }
    return fmaxf(value, LEAST);
}

template <int K>
__device__ __forceinline__ float sum_of(const float (&x)[K]) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < K; s++) {
        sum += x[s];
    }
    return sum;
}

// out(j) = Σ_i x(i)·A(i,j).
template <int K>
__device__ __forceinline__ void predict(const float (&x)[K], const float (&a)[K][K], float (&out)[K]) {
#pragma unroll
    for (int j = 0; j < K; j++) {
        out[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < K; i++) {
            out[j] += x[i] * a[i][j];
        }
    }
}

// Adds γ, γ·dev and γ·dev² of every state.
template <int K>
__device__ __forceinline__ void add_moments(const float (&gamma)[K], float x, const float (&mean)[K], float (&out)[3][K]) {
#pragma unroll
    for (int s = 0; s < K; s++) {
        const float dev = x - mean[s];
        out[0][s] += gamma[s];
        out[1][s] += gamma[s] * dev;
        out[2][s] += gamma[s] * dev * dev;
    }
}

// One sequence under one model: α forward, γ over it backward, pairs in registers. SCALAR: one number a step and normal states, the
// states' sums in registers too.
template <int K, bool SCALAR>
__device__ __forceinline__ void expectation(const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ natural,
                                            const float* __restrict__ packed, float* __restrict__ states, float* __restrict__ sums, uint32_t job,
                                            const BaumWelchParams& p) {
    const uint32_t n = sequence_of(job, p);
    const uint32_t length = min(words[n * words_each(p)], p.t), top = min(p.end, length);
    float* summary = sums + statistics_width(p) - 3;
    float a[K][K], alpha[K], predicted[K];
#pragma unroll
    for (int i = 0; i < K; i++) {
        alpha[i] = natural[i];
#pragma unroll
        for (int j = 0; j < K; j++) {
            a[i][j] = natural[K + i * K + j];
        }
    }
    const size_t step = (size_t)K * p.jobs;
    const float* series = obs + (size_t)n * p.t;
    float mean[K], inverse[K], constant[K];
#pragma unroll
    for (int s = 0; s < K; s++) {
        mean[s] = SCALAR ? packed[s] : 0.0f;
        inverse[s] = SCALAR ? packed[K + s] : 0.0f;
        constant[s] = SCALAR ? packed[2 * K + s] : 0.0f;
    }

    // forward: α, scaled by the sum one step before
    if (p.phase & 1) {
        float total = 1.0f, sum = 0.0f, low = 0.0f, failed = -1.0f;
        if (p.begin > 0) {
            sum = summary[0];
            low = summary[1];
            failed = summary[2];
            if (top > p.begin) {
#pragma unroll
                for (int s = 0; s < K; s++) {
                    alpha[s] = states[(p.begin - 1) * step + s * p.jobs + job];
                }
                total = sum_of(alpha);
            }
        }
        const uint32_t width = observed_width(p);
        for (uint32_t t = p.begin; t < top && failed < 0.0f; t++) {
            if (t == 0) {
#pragma unroll
                for (int s = 0; s < K; s++) {
                    predicted[s] = alpha[s];
                }
            } else {
                predict(alpha, a, predicted);
                const float scale = 1.0f / total;
#pragma unroll
                for (int s = 0; s < K; s++) {
                    predicted[s] *= scale;
                }
            }
            const bool seen = is_observed(words, n, t, p);
            const float* x = obs + ((size_t)n * p.t + t) * width;
            const float value = SCALAR ? x[0] : 0.0f;
            float level[K], mantissa[K], shift = LOG_ZERO;
#pragma unroll
            for (int s = 0; s < K; s++) {
                float power;
                mantissa[s] = mantissa_of(predicted[s], power);
                float log_b = 0.0f;
                if (SCALAR && seen) {
                    const float z = bounded((value - mean[s]) * inverse[s]);
                    log_b = fmaxf(constant[s] - 0.5f * z * z, LEAST);
                } else if (seen) {
                    log_b = log_density(packed, x, s, p);
                }
                level[s] = predicted[s] >= TINY ? log_b + power : LOG_ZERO;
                shift = fmaxf(shift, level[s]);
            }
            if (shift <= IMPOSSIBLE) {
                failed = (float)t;
                break;
            }
#pragma unroll
            for (int s = 0; s < K; s++) {
                alpha[s] = predicted[s] >= TINY ? mantissa[s] * expf(level[s] - shift) : 0.0f;
                states[t * step + s * p.jobs + job] = alpha[s];
            }
            total = sum_of(alpha);
            compensated(sum, low, shift);
            compensated(sum, low, logf(total));
        }
        summary[0] = failed >= 0.0f ? LOG_ZERO : sum;
        summary[1] = failed >= 0.0f ? 0.0f : low;
        summary[2] = failed;
    }

    if (!(p.phase & 2) || summary[2] >= 0.0f) {
        return;
    }
    if (p.end >= p.t) {
        for (int e = 0; e < K + K * K + (SCALAR ? 3 * K : 0); e++) {
            sums[e] = 0.0f;
        }
    }
    if (top <= p.begin) {
        return;
    }
    float gamma[K], pairs[K][K], total[3][K];
    uint32_t t = top == length ? length - 1 : top;
#pragma unroll
    for (int s = 0; s < K; s++) {
        gamma[s] = states[t * step + s * p.jobs + job];
    }
    if (top == length) {
        const float scale = 1.0f / sum_of(gamma);
#pragma unroll
        for (int s = 0; s < K; s++) {
            gamma[s] *= scale;
            states[t * step + s * p.jobs + job] = gamma[s];
        }
    }
#pragma unroll
    for (int i = 0; i < K; i++) {
        total[0][i] = total[1][i] = total[2][i] = 0.0f;
#pragma unroll
        for (int j = 0; j < K; j++) {
            pairs[i][j] = 0.0f;
        }
    }
    while (t > p.begin) {
        const uint32_t stop = max(p.begin, t - min(t, BLOCK));
        float block[K][K], part[3][K];
#pragma unroll
        for (int i = 0; i < K; i++) {
            part[0][i] = part[1][i] = part[2][i] = 0.0f;
#pragma unroll
            for (int j = 0; j < K; j++) {
                block[i][j] = 0.0f;
            }
        }
        for (; t > stop; t--) {
            float ratio[K];
            if (SCALAR && t < top && is_observed(words, n, t, p)) {
                add_moments(gamma, series[t], mean, part);
            }
#pragma unroll
            for (int s = 0; s < K; s++) {
                alpha[s] = states[(t - 1) * step + s * p.jobs + job];
            }
            predict(alpha, a, predicted);
#pragma unroll
            for (int s = 0; s < K; s++) {
                ratio[s] = predicted[s] >= TINY ? gamma[s] / predicted[s] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < K; i++) {
                float inner = 0.0f;
#pragma unroll
                for (int j = 0; j < K; j++) {
                    block[i][j] += alpha[i] * ratio[j];
                    inner += a[i][j] * ratio[j];
                }
                gamma[i] = alpha[i] * inner;
            }
            const float scale = 1.0f / fmaxf(sum_of(gamma), TINY);
#pragma unroll
            for (int s = 0; s < K; s++) {
                gamma[s] *= scale;
                if (!SCALAR) {
                    states[(t - 1) * step + s * p.jobs + job] = gamma[s];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < K; i++) {
#pragma unroll
            for (int q = 0; q < 3; q++) {
                total[q][i] += part[q][i];
            }
#pragma unroll
            for (int j = 0; j < K; j++) {
                pairs[i][j] += block[i][j];
            }
        }
    }
    if (SCALAR) {
        // The next launch goes on from here.
        if (is_observed(words, n, t, p)) {
            add_moments(gamma, series[t], mean, total);
        }
#pragma unroll
        for (int s = 0; s < K; s++) {
            states[t * step + s * p.jobs + job] = gamma[s];
#pragma unroll
            for (int q = 0; q < 3; q++) {
                sums[K + K * K + 3 * s + q] += total[q][s];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < K; i++) {
#pragma unroll
        for (int j = 0; j < K; j++) {
            sums[K + i * K + j] += pairs[i][j] * a[i][j];
        }
        if (p.begin == 0) {
            sums[i] += gamma[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_expectation(const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ parameters,
                    const float* __restrict__ model, const uint32_t* __restrict__ status, float* __restrict__ states, float* __restrict__ statistics,
                    BaumWelchParams params) {
    const uint32_t job = group_index() * WG + threadIdx.x;
    if (job >= params.jobs) {
        return;
    }
    const uint32_t m = job / params.per_model;
    if (status[params.iteration * params.models + m] != 0) {
        return;
    }
    const float* natural = parameters + (size_t)m * parameters_width(params);
    const float* packed = model + (size_t)m * model_width(params) + params.k;
    float* sums = statistics + (size_t)job * statistics_width(params);
    const bool scalar = params.emission == 1 && params.d == 1;
#define RUN(K)                                                                                   \
    if (scalar) {                                                                                \
        expectation<K, true>(obs, words, natural, packed, states, sums, job, params);            \
    } else {                                                                                     \
        expectation<K, false>(obs, words, natural, packed, states, sums, job, params);           \
    }
    switch (params.k) {
        case 1: RUN(1) break;
        case 2: RUN(2) break;
        case 3: RUN(3) break;
        default: RUN(4) break;
    }
#undef RUN
}

// ---- expectation, a thread per state ------------------------------------------------------------------------------

// The threads of a sequence lie in one warp up to 32 of them.
__device__ __forceinline__ void sequence_sync(uint32_t lanes) {
    if (lanes <= 32) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_expectation_lanes(const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ parameters,
                          const float* __restrict__ model, const uint32_t* __restrict__ status, float* __restrict__ states,
                          float* __restrict__ statistics, BaumWelchParams params) {
    __shared__ float sh_alpha[SLOTS], sh_level[SLOTS], sh_other[SLOTS];
    const uint32_t k = params.k, tid = threadIdx.x;
    uint32_t lanes = 8;
    while (lanes < k && lanes < WG) {
        lanes *= 2;
    }
    const uint32_t lane = tid % lanes, base = tid / lanes * k;
    const uint32_t job = group_index() * (WG / lanes) + tid / lanes, here = min(job, params.jobs - 1);
    const uint32_t m = here / params.per_model, n = sequence_of(here, params);
    const uint32_t length = min(words[n * words_each(params)], params.t), top = min(params.end, length);
    const float* natural = parameters + (size_t)m * parameters_width(params);
    const float* trans = natural + k;
    const float* packed = model + (size_t)m * model_width(params) + k;
    float* sums = statistics + (size_t)here * statistics_width(params);
    float* summary = sums + statistics_width(params) - 3;
    const size_t section = (size_t)params.jobs * params.t * k;
    float* own = states + (size_t)here * params.t * k;
    bool alive = job < params.jobs && status[params.iteration * params.models + m] == 0;

    if (params.phase & 1) {
        float sum = 0.0f, low = 0.0f, failed = -1.0f;
        if (params.begin > 0) {
            sum = summary[0];
            low = summary[1];
            failed = summary[2];
            if (top > params.begin) {
                for (uint32_t j = lane; j < k; j += lanes) {
                    sh_alpha[base + j] = own[section + (size_t)(params.begin - 1) * k + j];
                }
            }
        }
        sequence_sync(lanes);
        const uint32_t width = observed_width(params);
        for (uint32_t t = params.begin; t < params.end; t++) {
            const bool run = alive && t < length && failed < 0.0f;
            // predicted, its exponent moved to the level
            if (run) {
                float total = 0.0f;
                if (t > 0) {
                    for (uint32_t i = 0; i < k; i++) {
                        total += sh_alpha[base + i];
                    }
                    if (t > params.begin) {
                        compensated(sum, low, logf(total));
                    }
                }
                const bool seen = is_observed(words, n, t, params);
                const float* x = obs + ((size_t)n * params.t + t) * width;
                for (uint32_t j = lane; j < k; j += lanes) {
                    float predicted = 0.0f;
                    if (t == 0) {
                        predicted = natural[j];
                    } else {
                        for (uint32_t i = 0; i < k; i++) {
                            predicted += sh_alpha[base + i] * trans[i * k + j];
                        }
                        predicted = predicted / total;
                    }
                    float power;
                    const float mantissa = mantissa_of(predicted, power);
                    const bool possible = predicted >= TINY;
                    sh_level[base + j] = possible ? (seen ? log_density(packed, x, j, params) : 0.0f) + power : LOG_ZERO;
                    sh_other[base + j] = possible ? mantissa : 0.0f;
                }
            }
            sequence_sync(lanes);
            if (run) {
                float shift = LOG_ZERO;
                for (uint32_t i = 0; i < k; i++) {
                    shift = fmaxf(shift, sh_level[base + i]);
                }
                if (shift <= IMPOSSIBLE) {
                    failed = (float)t;
                } else {
                    compensated(sum, low, shift);
                    for (uint32_t j = lane; j < k; j += lanes) {
                        const float alpha = sh_other[base + j] * expf(sh_level[base + j] - shift);
                        sh_alpha[base + j] = alpha;
                        own[section + (size_t)t * k + j] = alpha;
                    }
                }
            }
            sequence_sync(lanes);
        }
        if (alive && lane == 0) {
            if (top > params.begin && failed < 0.0f) {
                float total = 0.0f;
                for (uint32_t i = 0; i < k; i++) {
                    total += sh_alpha[base + i];
                }
                compensated(sum, low, logf(total));
            }
            summary[0] = failed >= 0.0f ? LOG_ZERO : sum;
            summary[1] = failed >= 0.0f ? 0.0f : low;
            summary[2] = failed;
        }
        __syncthreads();
    }

    if (params.phase & 2) {
        alive = alive && summary[2] < 0.0f;
        const uint32_t first = top == length ? length - min(length, 1u) : top;
        if (alive && params.end >= params.t) {
            for (uint32_t j = lane; j < k; j += lanes) {
                sums[j] = 0.0f;
            }
        }
        if (alive && top > params.begin) {
            // The last step's γ is its α; a later launch has left γ of the step behind this one's.
            const float* from = own + (top == length ? section : 0);
            for (uint32_t j = lane; j < k; j += lanes) {
                sh_other[base + j] = from[(size_t)first * k + j];
            }
        }
        sequence_sync(lanes);
        for (uint32_t t = params.end; t > params.begin; t--) {
            const bool run = alive && top > params.begin && t <= first;
            if (run) {
                for (uint32_t j = lane; j < k; j += lanes) {
                    sh_alpha[base + j] = own[section + (size_t)(t - 1) * k + j];
                }
            }
            sequence_sync(lanes);
            if (run) {
                float total = 0.0f;
                for (uint32_t i = 0; i < k; i++) {
                    total += sh_other[base + i];
                }
                for (uint32_t j = lane; j < k; j += lanes) {
                    float predicted = 0.0f;
                    for (uint32_t i = 0; i < k; i++) {
                        predicted += sh_alpha[base + i] * trans[i * k + j];
                    }
                    const float gamma = sh_other[base + j] / fmaxf(total, TINY);
                    const float ratio = predicted >= TINY ? gamma / predicted : 0.0f;
                    sh_level[base + j] = ratio;
                    own[(size_t)t * k + j] = gamma;
                    own[2 * section + (size_t)t * k + j] = ratio;
                }
            }
            sequence_sync(lanes);
            if (run) {
                for (uint32_t i = lane; i < k; i += lanes) {
                    float inner = 0.0f;
                    for (uint32_t j = 0; j < k; j++) {
                        inner += trans[i * k + j] * sh_level[base + j];
                    }
                    sh_other[base + i] = sh_alpha[base + i] * inner;
                }
            }
        }
        sequence_sync(lanes);
        if (alive && top > params.begin) {
            float total = 0.0f;
            for (uint32_t i = 0; i < k; i++) {
                total += sh_other[base + i];
            }
            for (uint32_t j = lane; j < k; j += lanes) {
                const float gamma = sh_other[base + j] / fmaxf(total, TINY);
                own[(size_t)params.begin * k + j] = gamma;
                if (params.begin == 0) {
                    sums[j] = gamma;
                }
            }
        }
    }
}

// ---- sums over time -----------------------------------------------------------------------------------------------

// Row of entry e of a triangle: the largest i with i(i+1)/2 ≤ e.
__device__ __forceinline__ uint32_t triangle_row(uint32_t e) {
    uint32_t i = (uint32_t)((sqrtf(8.0f * (float)e + 1.0f) - 1.0f) * 0.5f);
    i -= i * (i + 1) / 2 > e ? 1 : 0;
    i += (i + 1) * (i + 2) / 2 <= e ? 1 : 0;
    return i;
}

// f(x) of sum q of state s; `natural` is the natural emission.
__device__ __forceinline__ float moment(const float* __restrict__ natural, const float* __restrict__ x, uint32_t s, uint32_t q,
                                        const BaumWelchParams& p) {
    const uint32_t k = p.k, d = p.d;
    if (q == 0) {
        return 1.0f;
    }
    const uint32_t e = q - 1;
    switch (p.emission) {
        case 1: {
            const float dev = x[e % d] - natural[s * d + e % d];
            return e < d ? dev : dev * dev;
        }
        case 2: {
            if (e < d) {
                return x[e] - natural[s * d + e];
            }
            const uint32_t i = triangle_row(e - d), j = e - d - i * (i + 1) / 2;
            return (x[i] - natural[s * d + i]) * (x[j] - natural[s * d + j]);
        }
        case 3: {
            const uint32_t i = e % d;
            const float dev = x[i] - natural[s * d + i], scale = natural[(k + s) * d + i], freedom = natural[(2 * k + s) * d + i];
            const float square = (dev / scale) * (dev / scale), weight = (freedom + 1.0f) / (freedom + square);
            switch (e / d) {
                case 0: return weight;
                case 1: return weight * dev;
                case 2: return weight * dev * dev;
                default: return log1pf(square / freedom);
            }
        }
        case 4: return x[e];
        case 5: return symbol_of(x[0], p) == e ? 1.0f : 0.0f;
        default: {
            const uint32_t r = d - 1, products = r * (r + 1) / 2;
            if (e < products) {
                const uint32_t i = triangle_row(e);
                return x[1 + i] * x[1 + e - i * (i + 1) / 2];
            }
            float error = x[0];
            for (uint32_t i = 0; i < r; i++) {
                error -= x[1 + i] * natural[s * r + i];
            }
            return e < products + r ? x[1 + e - products] * error : error * error;
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_sums(const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ parameters,
             const uint32_t* __restrict__ status, const float* __restrict__ states, float* __restrict__ statistics, BaumWelchParams params) {
    const uint32_t k = params.k, each = each_state(params), width = statistics_width(params);
    const bool small = k <= 4;
    const uint32_t first = small ? k + k * k : k, loose = k + k * k + k * each - first;
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.jobs * loose) {
        return;
    }
    // Neighbouring threads read neighbouring states.
    const uint32_t job = small ? at % params.jobs : at / loose, e = first + (small ? at / params.jobs : at % loose);
    const uint32_t m = job / params.per_model, n = sequence_of(job, params);
    float* out = statistics + (size_t)job * width;
    if (status[params.iteration * params.models + m] != 0 || out[width - 1] >= 0.0f) {
        return;
    }
    const uint32_t top = min(params.end, min(words[n * words_each(params)], params.t));
    const float* natural = parameters + (size_t)m * parameters_width(params);
    const uint32_t values = observed_width(params);
    const size_t section = (size_t)params.jobs * params.t * k;
    // Step t of state s lies at t·step + s·stride.
    const size_t step = small ? (size_t)k * params.jobs : k, stride = small ? params.jobs : 1;
    const float* own = states + (small ? job : (size_t)job * params.t * k);
    float sum = 0.0f;
    if (e < k + k * k) {
        const uint32_t i = (e - k) / k, j = (e - k) % k;
        for (uint32_t t = max(params.begin, 1u); t < top;) {
            const uint32_t stop = min(top, t + BLOCK);
            float block = 0.0f;
            for (; t < stop; t++) {
                block += own[section + (t - 1) * step + i * stride] * own[2 * section + t * step + j * stride];
            }
            sum += block;
        }
        sum *= natural[e];
    } else {
        const uint32_t s = (e - k - k * k) / each, q = (e - k - k * k) % each;
        for (uint32_t t = params.begin; t < top;) {
            const uint32_t stop = min(top, t + BLOCK);
            float block = 0.0f;
            for (; t < stop; t++) {
                if (is_observed(words, n, t, params)) {
                    block += own[t * step + s * stride] * moment(natural + k + k * k, obs + ((size_t)n * params.t + t) * values, s, q, params);
                }
            }
            sum += block;
        }
    }
    out[e] = (params.begin == 0 ? 0.0f : out[e]) + sum;
}

// ---- reduce -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) hmm_reduce(const float* __restrict__ statistics, float* __restrict__ totals, BaumWelchParams params) {
    const uint32_t width = statistics_width(params);
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.models * width) {
        return;
    }
    const uint32_t m = at / width, e = at % width;
    // The log-likelihood stays a sum of two.
    const bool is_high = e == width - 3;
    if (e == width - 2) {
        return;
    }
    float sum = 0.0f, low = 0.0f;
    for (uint32_t s = 0; s < params.per_model; s++) {
        const float* row = statistics + ((size_t)m * params.per_model + s) * width;
        compensated(sum, low, row[e]);
        if (is_high) {
            low += row[width - 2];
        }
    }
    totals[at] = is_high ? sum : sum + low;
    if (is_high) {
        totals[at + 1] = low;
    }
}

// ---- maximisation -------------------------------------------------------------------------------------------------

// How the model stands after this expectation: 0 goes on, 1 converged, 2 fell, 3 impossible.
__device__ uint32_t judge(const uint32_t* status, const float* path, uint32_t m, float high, float low, const BaumWelchParams& p) {
    const uint32_t before = status[p.iteration * p.models + m];
    if (before != 0) {
        return before;
    }
    if (high <= IMPOSSIBLE) {
        return 3;
    }
    if (p.iteration == 0 || p.tolerance < 0.0f) {
        return 0;
    }
    const float* past = path + 2 * ((p.iteration - 1) * p.models + m);
    const float gain = (high - past[0]) + (low - past[1]), noise = p.rounding * fabsf(high);
    const bool free = p.init_prior == 0.0f && p.transition_prior == 0.0f && p.sticky == 0.0f && p.mean_weight == 0.0f;
    if (free && gain < -8.0f * noise - 1e-9f) {
        return 2;
    }
    return gain < fmaxf(noise, p.tolerance) ? 1 : 0;
}

// A row of probabilities from its expected counts; what was a hard zero stays one.
__device__ void maximise_row(float* old, const float* counts, float prior, uint32_t stay, const BaumWelchParams& p) {
    float plain = 0.0f, total = 0.0f;
    for (uint32_t j = 0; j < p.k; j++) {
        plain += counts[j];
        total += old[j] > 0.0f ? counts[j] + prior + (j == stay ? p.sticky : 0.0f) : 0.0f;
    }
    if (plain < EMPTY_ROW || total <= 0.0f) {
        return;
    }
    for (uint32_t j = 0; j < p.k; j++) {
        old[j] = old[j] > 0.0f ? (counts[j] + prior + (j == stay ? p.sticky : 0.0f)) / total : 0.0f;
    }
}

// How far a mean moves, towards the prior mean where there is one.
__device__ __forceinline__ float step_of(float weight, float sum, float mean, float first, const BaumWelchParams& p) {
    return (sum + p.mean_weight * (first - mean)) / (weight + p.mean_weight);
}

__device__ __forceinline__ uint32_t triangle_at(uint32_t i, uint32_t j) {
    return i * (i + 1) / 2 + j;
}

// Solves A·x = b for a lower-packed A, in place; collinear columns get 0. Returns bᵀ·x.
__device__ float solve(float* a, float* b, uint32_t n) {
    float explained = 0.0f;
    for (uint32_t j = 0; j < n; j++) {
        const float diagonal = a[triangle_at(j, j)];
        float pivot = diagonal;
        for (uint32_t c = 0; c < j; c++) {
            pivot -= a[triangle_at(j, c)] * a[triangle_at(j, c)];
        }
        const float inverse = pivot > COLLINEAR * diagonal ? 1.0f / sqrtf(pivot) : 0.0f;
        for (uint32_t i = j + 1; i < n; i++) {
            float sum = a[triangle_at(i, j)];
            for (uint32_t c = 0; c < j; c++) {
                sum -= a[triangle_at(i, c)] * a[triangle_at(j, c)];
            }
            a[triangle_at(i, j)] = inverse * sum;
        }
        a[triangle_at(j, j)] = inverse;
        float right = b[j];
        for (uint32_t c = 0; c < j; c++) {
            right -= a[triangle_at(j, c)] * b[c];
        }
        b[j] = right * inverse;
        explained += b[j] * b[j];
    }
    for (uint32_t j = n; j-- > 0;) {
        float right = b[j];
        for (uint32_t i = j + 1; i < n; i++) {
            right -= a[triangle_at(i, j)] * b[i];
        }
        b[j] = right * a[triangle_at(j, j)];
    }
    return explained;
}

// The emission of state s from its sums; `first` are the prior means, `floor` the least variances.
__device__ void maximise_state(uint32_t s, float* sums, float* natural, const float* __restrict__ floor, const BaumWelchParams& p) {
    const uint32_t k = p.k, d = p.d;
    const float weight = sums[0], prior = p.mean_weight;
    const float* first = floor + d;
    float* f = sums + 1;
    switch (p.emission) {
        case 0: break;
        case 1: {
            for (uint32_t i = 0; i < d; i++) {
                float &mean = natural[s * d + i], &variance = natural[(k + s) * d + i];
                const float step = step_of(weight, f[i], mean, first[i], p), off = mean + step - first[i];
                const float squares = f[d + i] - 2.0f * f[i] * step + step * step * weight + prior * off * off;
                mean += step;
                variance = fmaxf(squares / weight, floor[i]);
            }
            break;
        }
        case 2: {
            float* mean = natural + s * d;
            float* covariance = natural + k * d + s * (d * (d + 1) / 2);
            for (uint32_t i = 0; i < d; i++) {
                const float step_i = step_of(weight, f[i], mean[i], first[i], p);
                for (uint32_t j = 0; j <= i; j++) {
                    const float step_j = step_of(weight, f[j], mean[j], first[j], p);
                    const float off = (mean[i] + step_i - first[i]) * (mean[j] + step_j - first[j]);
                    const uint32_t e = triangle_at(i, j);
                    const float products = f[d + e] - f[i] * step_j - f[j] * step_i + step_i * step_j * weight + prior * off;
                    covariance[e] = products / weight;
                }
            }
            for (uint32_t i = 0; i < d; i++) {
                mean[i] += step_of(weight, f[i], mean[i], first[i], p);
            }
            break;
        }
        case 3: {
            for (uint32_t i = 0; i < d; i++) {
                float &location = natural[s * d + i], &scale = natural[(k + s) * d + i];
                const float u = f[i], sum = f[d + i];
                const float step = step_of(u, sum, location, first[i], p), off = location + step - first[i];
                const float squares = f[2 * d + i] - 2.0f * sum * step + step * step * u + prior * off * off;
                location += step;
                scale = sqrtf(fmaxf(squares / weight, floor[i]));
            }
            break;
        }
        case 4: {
            for (uint32_t i = 0; i < d; i++) {
                natural[s * d + i] = fmaxf(f[i] / weight, LEAST_RATE);
            }
            break;
        }
        case 5: {
            for (uint32_t i = 0; i < p.symbols; i++) {
                natural[s * p.symbols + i] = f[i] / weight;
            }
            break;
        }
        default: {
            const uint32_t r = d - 1;
            float* right = f + r * (r + 1) / 2;
            const float explained = solve(f, right, r);
            for (uint32_t i = 0; i < r; i++) {
                natural[s * r + i] += right[i];
            }
            natural[k * r + s] = fmaxf((right[r] - explained) / weight, floor[0]);
            break;
        }
    }
}

// Inverse of the lower Cholesky factor; pivots below the floor are raised, in the covariance too. Returns the sum of the logarithms of
// its diagonal.
__device__ float inverse_factor(float* covariance, float* factor, const float* __restrict__ floor, uint32_t d) {
    for (uint32_t i = 0; i < d; i++) {
        for (uint32_t j = 0; j < i; j++) {
            float sum = covariance[triangle_at(i, j)];
            for (uint32_t c = 0; c < j; c++) {
                sum -= factor[triangle_at(i, c)] * factor[triangle_at(j, c)];
            }
            factor[triangle_at(i, j)] = sum / factor[triangle_at(j, j)];
        }
        float pivot = covariance[triangle_at(i, i)];
        for (uint32_t c = 0; c < i; c++) {
            pivot -= factor[triangle_at(i, c)] * factor[triangle_at(i, c)];
        }
        if (pivot < floor[i]) {
            covariance[triangle_at(i, i)] += floor[i] - pivot;
        }
        factor[triangle_at(i, i)] = sqrtf(fmaxf(pivot, floor[i]));
    }
    float logs = 0.0f;
    for (uint32_t i = 0; i < d; i++) {
        const float inverse = 1.0f / factor[triangle_at(i, i)];
        for (uint32_t j = 0; j < i; j++) {
            float sum = 0.0f;
            for (uint32_t c = j; c < i; c++) {
                sum += factor[triangle_at(i, c)] * factor[triangle_at(c, j)];
            }
            factor[triangle_at(i, j)] = -sum * inverse;
        }
        factor[triangle_at(i, i)] = inverse;
        logs += logf(inverse);
    }
    return logs;
}

// Packs the emission of state s.
__device__ void pack_state(uint32_t s, float* natural, float* packed, const float* __restrict__ floor, const BaumWelchParams& p) {
    const uint32_t k = p.k, d = p.d;
    switch (p.emission) {
        case 0: break;
        case 1: {
            float logs = 0.0f;
            for (uint32_t i = 0; i < d; i++) {
                const float inverse = 1.0f / sqrtf(fmaxf(natural[(k + s) * d + i], floor[i]));
                packed[s * d + i] = natural[s * d + i];
                packed[(k + s) * d + i] = inverse;
                logs += logf(inverse);
            }
            packed[2 * k * d + s] = logs - (float)d * HALF_LOG_TAU;
            break;
        }
        case 2: {
            const uint32_t triangle = d * (d + 1) / 2;
            const float logs = inverse_factor(natural + k * d + s * triangle, packed + k * d + s * triangle, floor, d);
            for (uint32_t i = 0; i < d; i++) {
                packed[s * d + i] = natural[s * d + i];
            }
            packed[k * (d + triangle) + s] = logs - (float)d * HALF_LOG_TAU;
            break;
        }
        case 3: {
            float constant = 0.0f;
            for (uint32_t i = 0; i < d; i++) {
                const float scale = natural[(k + s) * d + i], freedom = natural[(2 * k + s) * d + i];
                packed[s * d + i] = natural[s * d + i];
                packed[(k + s) * d + i] = 1.0f / scale;
                packed[(2 * k + s) * d + i] = 0.5f * (freedom + 1.0f);
                packed[(3 * k + s) * d + i] = 1.0f / freedom;
                constant += natural[(3 * k + s) * d + i] - logf(scale);
            }
            packed[4 * k * d + s] = constant;
            break;
        }
        case 4: {
            float total = 0.0f;
            for (uint32_t i = 0; i < d; i++) {
                packed[s * d + i] = logf(natural[s * d + i]);
                total += natural[s * d + i];
            }
            packed[k * d + s] = -total;
            break;
        }
        case 5: {
            for (uint32_t i = 0; i < p.symbols; i++) {
                packed[s * p.symbols + i] = log_probability(natural[s * p.symbols + i]);
            }
            break;
        }
        default: {
            const uint32_t r = d - 1;
            const float inverse = 1.0f / sqrtf(fmaxf(natural[k * r + s], floor[0]));
            for (uint32_t i = 0; i < r; i++) {
                packed[s * r + i] = natural[s * r + i];
            }
            packed[k * r + s] = inverse;
            packed[k * r + k + s] = logf(inverse) - HALF_LOG_TAU;
            break;
        }
    }
}

// Divides a row of a start by its sum.
__device__ void normalise_row(float* row, uint32_t k) {
    float total = 0.0f;
    for (uint32_t j = 0; j < k; j++) {
        total += row[j];
    }
    for (uint32_t j = 0; j < k; j++) {
        row[j] /= total;
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_maximisation(const float* __restrict__ guards, float* __restrict__ totals, float* __restrict__ parameters, float* __restrict__ model,
                     float* __restrict__ log_trans, uint32_t* __restrict__ status, float* __restrict__ path, BaumWelchParams params) {
    const uint32_t k = params.k;
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.models * k) {
        return;
    }
    const uint32_t m = at / k, s = at % k;
    float* sums = totals + (size_t)m * statistics_width(params);
    float* natural = parameters + (size_t)m * parameters_width(params);
    float* packed = model + (size_t)m * model_width(params);
    const float* floor = guards + (size_t)(m / params.restarts) * 2 * max(params.d, 1u);

    if (params.action != 0) {
        const float* summary = sums + statistics_width(params) - 3;
        const uint32_t verdict = judge(status, path, m, summary[0], summary[1], params);
        if (s == 0) {
            const uint32_t line = 2 * (params.iteration * params.models + m);
            const bool stopped = params.iteration > 0 && status[params.iteration * params.models + m] != 0;
            path[line] = stopped ? path[line - 2 * params.models] : summary[0];
            path[line + 1] = stopped ? path[line - 2 * params.models + 1] : summary[1];
            status[(params.iteration + 1) * params.models + m] = verdict;
        }
        if (verdict != 0 || params.action == 2) {
            return;
        }
        // init by the first thread of the model, transitions each its row
        if (s == 0) {
            maximise_row(natural, sums, params.init_prior, k, params);
        }
        maximise_row(natural + k + s * k, sums + k + s * k, params.transition_prior, s, params);
        float* own = sums + k + k * k + s * each_state(params);
        if (own[0] >= EMPTY_STATE) {
            maximise_state(s, own, natural + k + k * k, floor, params);
        }
    } else {
        if (s == 0) {
            normalise_row(natural, k);
        }
        normalise_row(natural + k + s * k, k);
    }

    // pack
    if (s == 0) {
        for (uint32_t j = 0; j < k; j++) {
            packed[j] = log_probability(natural[j]);
        }
    }
    for (uint32_t j = 0; j < k; j++) {
        log_trans[(size_t)m * k * k + s * k + j] = log_probability(natural[k + s * k + j]);
    }
    pack_state(s, natural + k + k * k, packed + k, floor, params);
}
