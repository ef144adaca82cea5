// Random paths of hidden Markov models. Maths, shapes and the rule of the draws: kernels/hmm_sample.rs.
//   hmm_weights              grid  ⌈entries / WG⌉        thread = table entry
//   hmm_sample               grid  ⌈B / WG⌉              thread = path, steps from_step .. to_step
//   hmm_sample_observations  grid  ⌈B·⌈T/4⌉ / WG⌉        thread = path and four steps, which share their random words
//   hmm_sample_posterior     grid  ⌈B·draws / WG⌉        thread = path, steps to_step .. from_step
//   spill: some words of hmm_sample_observations around the sine and cosine, where ptxas stops at 56 or 64 registers

struct HmmSampleParams {
    uint32_t b;
    uint32_t t;
    uint32_t k;
    uint32_t d;
    uint32_t u;
    uint32_t draws;
    uint32_t model_row;
    uint32_t trans_row;
    uint32_t trans_step;
    uint32_t softmax;
    uint32_t words_row;
    uint32_t emission;
    uint32_t symbols;
    uint32_t from_step;
    uint32_t to_step;
    uint32_t first;
    uint32_t first_high;
    uint32_t seed;
    uint32_t seed_high;
};

#define ANCESTRAL 0x4853u
#define POSTERIOR 0x4850u
#define SECOND 0x8000u
#define REGRESSION 6
#define IMPOSSIBLE (-1e30f)
#define DEAD (-1e29f)
#define POISSON_ROUNDS 10000

// ---- draws --------------------------------------------------------------------------------------------------------------

// 2^31·e^x for x ≤ 0, by integers from the bits of x on.
__device__ __forceinline__ uint32_t weight(float x) {
    const uint32_t raw = __float_as_uint(x);
    if (raw >> 31 == 0) {
        return 0x80000000u;
    }
    const int exponent = (int)((raw >> 23) & 0xffu);
    if (exponent > 131) {
        return 0;
    }
    const uint32_t mantissa = (raw & 0x7fffffu) | 0x800000u;
    const uint32_t y = exponent >= 123 ? mantissa << (exponent - 123) : mantissa >> min(123 - exponent, 31);
    const uint32_t z = __umulhi(y, 0xB8AA3B29u);
    const uint32_t g = __umulhi(z << 6, 0xB17217F8u);
    uint32_t r = 0x80000000u;
#pragma unroll
    for (uint32_t n = 11; n > 0; n--) {
        r = 0x80000000u - __umulhi(g, r) / n;
    }
    return r >> (z >> 26);
}

// ⌊word·total / 2^32⌋.
__device__ __forceinline__ uint64_t target_of(uint32_t word, uint64_t total) {
    return __umul64hi((uint64_t)word << 32, total);
}

// The four words of a path at steps 4·(t/4) … for a factor.
__device__ __forceinline__ void words_of(uint32_t (&word)[4], uint32_t path, uint32_t t, uint32_t factor, uint32_t stream, const HmmSampleParams& params) {
    const uint64_t index = (((uint64_t)params.first_high << 32) | params.first) + path;
    word[0] = (uint32_t)index;
    word[1] = (uint32_t)(index >> 32);
    word[2] = t / 4;
    word[3] = factor | (stream << 16);
    philox4x32(word, params.seed, params.seed_high);
}

// One of four, without an array in memory.
__device__ __forceinline__ uint32_t one_of(const uint32_t (&word)[4], uint32_t c) {
    return c & 2 ? (c & 1 ? word[3] : word[2]) : (c & 1 ? word[1] : word[0]);
}

__device__ __forceinline__ uint32_t length_of(const uint32_t* __restrict__ words, uint32_t b, const HmmSampleParams& params) {
    return params.words_row == 0 ? params.t : min(words[b * params.words_row], params.t);
}

extern "C" __global__ void __launch_bounds__(WG) hmm_weights(const float* __restrict__ log_prob, uint32_t* weights, HmmSampleParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at < params.b) {
        weights[at] = weight(log_prob[at]);
    }
}

// Logit of the transition whose weights [U] and bias lie at `at`.
__device__ __forceinline__ float logit(const float* __restrict__ at, const float* __restrict__ input, uint32_t u) {
    float x = at[u];
    for (uint32_t c = 0; c < u; c++) {
        x += at[c] * input[c];
    }
    return x;
}

// ---- ancestral paths ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    hmm_sample(const uint32_t* __restrict__ init_weights, const uint32_t* __restrict__ weights, const uint32_t* __restrict__ words,
               const float* __restrict__ log_trans, const float* __restrict__ inputs, uint32_t* states, HmmSampleParams params) {
    const uint32_t b = group_index() * WG + threadIdx.x;
    if (b >= params.b) {
        return;
    }
    const uint32_t k = params.k, u = params.u, stop = min(length_of(words, b, params), params.to_step);
    uint32_t state = params.from_step > 0 && params.from_step < stop ? states[b * params.t + params.from_step - 1] : 0;
    uint32_t draw[4] = {0, 0, 0, 0};
    for (uint32_t t = params.from_step; t < stop; t++) {
        if (t % 4 == 0 || t == params.from_step) {
            words_of(draw, b, t, 0, ANCESTRAL, params);
        }
        const uint32_t word = one_of(draw, t % 4);
        if (t == 0 || params.softmax == 0) {
            const uint32_t* __restrict__ row =
                t == 0 ? init_weights + b * params.model_row : weights + b * params.trans_row + (t - 1) * params.trans_step + state * k;
            uint64_t total = 0, sum = 0;
            for (uint32_t j = 0; j < k; j++) {
                total += row[j];
            }
            const uint64_t goal = target_of(word, total);
            for (uint32_t j = 0; j < k; j++) {
                sum += row[j];
                if (goal < sum) {
                    state = j;
                    break;
                }
            }
        } else {
            const float* __restrict__ row = log_trans + b * params.trans_row + state * k * (u + 1);
            const float* __restrict__ input = inputs + (b * params.t + t) * u;
            float top = IMPOSSIBLE;
            for (uint32_t j = 0; j < k; j++) {
                top = fmaxf(top, logit(row + j * (u + 1), input, u));
            }
            uint64_t total = 0, sum = 0;
            for (uint32_t j = 0; j < k; j++) {
                total += weight(logit(row + j * (u + 1), input, u) - top);
            }
            const uint64_t goal = target_of(word, total);
            for (uint32_t j = 0; j < k; j++) {
                sum += weight(logit(row + j * (u + 1), input, u) - top);
                if (goal < sum) {
                    state = j;
                    break;
                }
            }
        }
        states[b * params.t + t] = state;
    }
}

// ---- observations ---------------------------------------------------------------------------------------------------------

// ln x! for x ≥ 0: Stirling's series from 8 on, the recursion below.
__device__ __forceinline__ float log_factorial(float x) {
    float z = x + 1.0f, product = 1.0f;
    for (; z < 8.0f; z += 1.0f) {
        product *= z;
    }
    const float w = 1.0f / z;
    const float series = w * (0.083333336f - w * w * (0.0027777778f - w * w * 0.0007936508f));
    return (z - 0.5f) * logf(z) - z + 0.9189385f + series - logf(product);
}

// Inversion outwards from the mode: mode, mode + 1, mode − 1, …
__device__ float poisson(float log_rate, float u) {
    const float rate = expf(log_rate), mode = floorf(fminf(rate, 1e9f));
    const float at_mode = expf(mode * log_rate - rate - log_factorial(mode));
    float left = u - at_mode, up = at_mode, down = at_mode;
    if (left < 0.0f) {
        return mode;
    }
    for (uint32_t i = 1; i < POISSON_ROUNDS; i++) {
        const float n = (float)i;
        up = up * rate / (mode + n);
        left -= up;
        if (left < 0.0f) {
            return mode + n;
        }
        if (n <= mode) {
            down = down * (mode - n + 1.0f) / rate;
            left -= down;
            if (left < 0.0f) {
                return mode - n;
            }
        }
        if (up <= 0.0f && down <= 0.0f) {
            break;
        }
    }
    return mode;
}

// The symbol of a row of log-probabilities.
__device__ float symbol(const float* __restrict__ row, uint32_t word, uint32_t symbols) {
    uint64_t total = 0, sum = 0;
    for (uint32_t s = 0; s < symbols; s++) {
        total += weight(row[s]);
    }
    const uint64_t goal = target_of(word, total);
    for (uint32_t s = 0; s < symbols; s++) {
        sum += weight(row[s]);
        if (goal < sum) {
            return (float)s;
        }
    }
    return 0.0f;
}

// Coordinate i of the state's emission; `x` is the observation, `m` the model's first parameter.
__device__ float observation(const float* __restrict__ m, uint32_t state, uint32_t i, const float* x, float normal, uint32_t first, uint32_t second,
                             const HmmSampleParams& params) {
    const uint32_t k = params.k, d = params.d;
    switch (params.emission) {
        case 1: return m[state * d + i] + normal / m[(k + state) * d + i];
        case 2: {
            const float* __restrict__ row = m + k * d + state * (d * (d + 1) / 2) + i * (i + 1) / 2;
            const float* __restrict__ mean = m + state * d;
            float known = 0.0f;
            for (uint32_t j = 0; j < i; j++) {
                known += row[j] * (x[j] - mean[j]);
            }
            return mean[i] + (normal - known) / row[i];
        }
        case 3: {
            const float* __restrict__ own = m + state * d + i;
            const float inverse_dof = own[3 * k * d];
            const float radius = sqrtf(expm1f(2.0f * neg_log_uniform(first >> 8) * inverse_dof) / inverse_dof);
            return own[0] + radius * turn(uniform_of(second)).x / own[k * d];
        }
        case 4: return poisson(m[state * d + i], uniform_of(first));
        case 5: return symbol(m + state * params.symbols, first, params.symbols);
        default: {
            const uint32_t r = d - 1;
            float fit = 0.0f;
            for (uint32_t j = 0; j < r; j++) {
                fit += x[1 + j] * m[state * r + j];
            }
            return fit + normal / m[k * r + state];
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_sample_observations(const float* __restrict__ model, const uint32_t* __restrict__ words, const uint32_t* __restrict__ states, float* obs,
                            HmmSampleParams params) {
    const uint32_t quads = (params.t + 3) / 4, at = group_index() * WG + threadIdx.x, b = at / quads;
    if (b >= params.b) {
        return;
    }
    const uint32_t t = 4 * (at % quads), length = length_of(words, b, params), count = params.emission == REGRESSION ? 1 : params.d;
    const float* __restrict__ own = model + b * params.model_row + params.k;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t first[4], second[4];
        words_of(first, b, t, 1 + i, ANCESTRAL, params);
        words_of(second, b, t, SECOND | (1 + i), ANCESTRAL, params);
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            if (t + c < length) {
                const float radius = sqrtf(2.0f * neg_log_uniform(first[c & 2] >> 8));
                const float2 z = turn(uniform_of(first[(c & 2) + 1]));
                const uint32_t row = b * params.t + t + c;
                float* x = obs + row * params.d;
                x[i] = observation(own, states[row], i, x, radius * (c & 1 ? z.y : z.x), first[c], second[c], params);
            }
        }
    }
}

// ---- posterior paths ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float probability(float x) {
    return x <= DEAD ? 0.0f : expf(x);
}

// p(state j at step t | state i one step before).
__device__ __forceinline__ float transition(const float* __restrict__ log_trans, const float* __restrict__ inputs, uint32_t b, uint32_t t, uint32_t i,
                                            uint32_t j, const HmmSampleParams& params) {
    const uint32_t k = params.k, u = params.u;
    const float* __restrict__ row = log_trans + b * params.trans_row + (t - 1) * params.trans_step + i * k * (u + 1);
    if (params.softmax == 0) {
        return probability(row[j]);
    }
    const float* __restrict__ input = inputs + (b * params.t + t) * u;
    float top = IMPOSSIBLE, sum = 0.0f;
    for (uint32_t c = 0; c < k; c++) {
        top = fmaxf(top, logit(row + c * (u + 1), input, u));
    }
    for (uint32_t c = 0; c < k; c++) {
        sum += probability(logit(row + c * (u + 1), input, u) - top);
    }
    return probability(logit(row + j * (u + 1), input, u) - top) / sum;
}

__device__ __forceinline__ uint32_t share(float x, float top) {
    return (uint32_t)(fminf(fmaxf(x / top, 0.0f), 1.0f) * 2147483648.0f);
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_sample_posterior(const float* __restrict__ filtered, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
                         const float* __restrict__ inputs, uint32_t* states, HmmSampleParams params) {
    const uint32_t path = group_index() * WG + threadIdx.x, b = path / params.draws;
    if (b >= params.b) {
        return;
    }
    const uint32_t k = params.k, length = length_of(words, b, params);
    uint32_t next = params.to_step < length ? states[path * params.t + params.to_step] : 0;
    for (uint32_t t = min(length, params.to_step); t > params.from_step;) {
        t--;
        const float* __restrict__ now = filtered + (b * params.t + t) * k;
        const bool last = t + 1 == length;
        const auto joint = [&](uint32_t i) { return last ? now[i] : now[i] * transition(log_trans, inputs, b, t + 1, i, next, params); };
        float top = 0.0f;
        for (uint32_t i = 0; i < k; i++) {
            top = fmaxf(top, joint(i));
        }
        uint32_t state = 0;
        if (top > 0.0f) {
            uint64_t total = 0, sum = 0;
            for (uint32_t i = 0; i < k; i++) {
                total += share(joint(i), top);
            }
            uint32_t draw[4];
            words_of(draw, path, t, 0, POSTERIOR, params);
            const uint64_t goal = target_of(one_of(draw, t % 4), total);
            for (uint32_t i = 0; i < k; i++) {
                sum += share(joint(i), top);
                if (goal < sum) {
                    state = i;
                    break;
                }
            }
        }
        states[path * params.t + t] = state;
        next = state;
    }
}
