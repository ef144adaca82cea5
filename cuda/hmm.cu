// Hidden Markov models: densities and forward-backward. Maths, shapes and source: kernels/hmm.rs.
//   hmm_emission             grid ⌈B·T·K / WG⌉   thread = (sequence, step, state)
//   hmm_forward_backward_4   grid ⌈B / WG⌉       thread = sequence, K ≤ 4 a template argument: states and transitions in registers
//   hmm_forward_backward_8   grid ⌈B / WG⌉       the same, K = 5 … 8
//   …_table_4, …_table_8     the same for log-probabilities, all observed, under a fixed table
//   …_states_4, …_states_8   the same without predicted and pair probabilities
//   hmm_forward_backward     grid ⌈B / (WG / L)⌉ L threads per sequence, a state each (or every L-th), L = K rounded up to a power of two, at most WG
//   spill: some words outside the chain of products, where ptxas stops at 80 or 255 registers; the table variants spill nothing

struct HmmParams {
    uint32_t b;
    uint32_t t;
    uint32_t k;
    uint32_t d;
    uint32_t u;
    uint32_t emission;
    uint32_t symbols;
    uint32_t stride;
    uint32_t flags;
    uint32_t begin;
    uint32_t end;
    uint32_t park;
    uint32_t record;
};

#define MODELS 1u
#define TRANS_SEQUENCE 2u
#define TRANS_STEP 4u
#define SOFTMAX 8u
#define LENGTHS 16u
#define MASKED 32u
#define FILTERED 64u
#define PREDICTED 128u
#define POSTERIOR 256u
#define PAIR_SUM 512u
#define PAIR_STEPS 1024u
#define FORWARD 2048u
#define BACKWARD 4096u
#define PARK 8192u

#define LOG_ZERO (-1e30f)
#define IMPOSSIBLE (-1e29f)
#define LEAST (-1e28f)
#define MOST 1e28f
// A step whose sum is below 2^-60 is done again with the joint shift.
#define RETRY 8.67361738e-19f
// What is predicted below this is forgotten: its reciprocal must be finite.
#define TINY 1e-37f
#define FOLD 128u
#define PAIR_BLOCK 64u
#define LN2_HIGH 0.693359375f
#define LN2_LOW (-2.12194440e-4f)

// VARIANT 4, 8: up to so many states. 104, 108: with log-probabilities, all observed, under a fixed table, and nothing else compiled in.
// 204, 208: nor predicted and pair probabilities.
#define PLAIN (VARIANT > 100)
#define STATES (VARIANT > 200)

// The arguments of a launch.
struct Hmm {
    const float* __restrict__ model;
    const float* __restrict__ obs;
    const uint32_t* __restrict__ words;
    const float* __restrict__ log_trans;
    const float* __restrict__ inputs;
    float* states;
    float* pair;
    float* summary;
    HmmParams p;
    float* pairs_of_thread;  // shared memory for K·K sums of this thread, every WG-th element; K ≤ 4 has them in registers

    __device__ __forceinline__ bool has(uint32_t bits) const {
        const uint32_t possible = ~((PLAIN ? TRANS_STEP | SOFTMAX | MASKED : 0u) | (STATES ? PREDICTED | PAIR_SUM | PAIR_STEPS : 0u));
        return (p.flags & possible & bits) != 0;
    }
};

// ---- inputs -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t length_of(const Hmm& h, uint32_t b) {
    return h.has(LENGTHS) ? min(h.words[b * (h.has(MASKED) ? 1 + h.p.t : 1)], h.p.t) : h.p.t;
}

__device__ __forceinline__ bool observed(const Hmm& h, uint32_t b, uint32_t t) {
    return !h.has(MASKED) || h.words[b * (1 + h.p.t) + 1 + t] != 0;
}

__device__ __forceinline__ uint32_t model_at(const Hmm& h, uint32_t b) {
    return h.has(MODELS) ? b * h.p.stride : 0;
}

// e^x for a logarithm of a probability; 0 for log 0.
__device__ __forceinline__ float probability_of(float x) {
    return x < -87.0f ? 0.0f : expf(x);
}

// ln x! for x ≥ 0: Stirling's series from 8 on, the recursion below.
__device__ __forceinline__ float log_factorial(float x) {
    float z = x + 1.0f, product = 1.0f;
    while (z < 8.0f) {
        product *= z;
        z += 1.0f;
    }
    const float w = 1.0f / z;
    const float series = w * (0.083333333f - w * w * (0.0027777778f - w * w * 0.00079365079f));
    return (z - 0.5f) * logf(z) - z + 0.918938533f + series - logf(product);
}

__device__ __forceinline__ float capped(float x) {
    return fminf(fmaxf(x, -1e18f), 1e18f);
}

__device__ __forceinline__ float bounded(float z) {
    return fminf(fmaxf(z, -1e14f), 1e14f);
}

// Log-density of a state at observation x, with the parameters that lie behind log_init.
__device__ __forceinline__ float density(uint32_t emission, uint32_t k, uint32_t d, uint32_t symbols, const float* __restrict__ parameters,
                                         const float* __restrict__ x, uint32_t state) {
    float value = 0.0f;
    switch (emission) {
        case 1: {
            const float* mean = parameters + state * d;
            for (uint32_t i = 0; i < d; i++) {
                const float z = bounded(capped(x[i] - mean[i]) * mean[k * d + i]);
                value += z * z;
            }
            value = parameters[2 * k * d + state] - 0.5f * value;
            break;
        }
        case 2: {
            const uint32_t triangle = d * (d + 1) / 2;
            const float* mean = parameters + state * d;
            const float* row = parameters + k * d + state * triangle;
            for (uint32_t i = 0; i < d; i++) {
                float z = 0.0f;
                for (uint32_t j = 0; j <= i; j++) {
                    z += row[j] * capped(x[j] - mean[j]);
                }
                row += i + 1;
                z = bounded(z);
                value += z * z;
            }
            value = parameters[k * (d + triangle) + state] - 0.5f * value;
            break;
        }
        case 3: {
            const float* location = parameters + state * d;
            for (uint32_t i = 0; i < d; i++) {
                const float z = bounded(capped(x[i] - location[i]) * location[k * d + i]);
                value += location[2 * k * d + i] * log1pf(z * z * location[3 * k * d + i]);
            }
            value = parameters[4 * k * d + state] - value;
            break;
        }
        case 4: {
            value = parameters[k * d + state];
            for (uint32_t i = 0; i < d; i++) {
                value += capped(x[i]) * parameters[state * d + i] - log_factorial(capped(x[i]));
            }
            break;
        }
        case 5: return parameters[state * symbols + min((uint32_t)fmaxf(x[0], 0.0f), symbols - 1)];
        default: {
            const uint32_t r = d - 1;
            float fit = 0.0f;
            for (uint32_t i = 0; i < r; i++) {
                fit += capped(x[1 + i]) * parameters[state * r + i];
            }
            const float z = bounded((capped(x[0]) - fit) * parameters[k * r + state]);
            value = parameters[k * r + k + state] - 0.5f * z * z;
        }
    }
    return fmaxf(value, LEAST);
}

// log b of one state at step t of sequence b.
__device__ __forceinline__ float log_b(const Hmm& h, uint32_t b, uint32_t t, uint32_t state) {
    if (!observed(h, b, t)) {
        return 0.0f;
    }
    if (PLAIN || h.p.emission == 0) {
        return fminf(h.obs[(b * h.p.t + t) * h.p.k + state], MOST);
    }
    return density(h.p.emission, h.p.k, h.p.d, h.p.symbols, h.model + model_at(h, b) + h.p.k, h.obs + (b * h.p.t + t) * h.p.d, state);
}

// Transitions of slot t of sequence b: the table, or the weights.
__device__ __forceinline__ const float* table_of(const Hmm& h, uint32_t b, uint32_t slot) {
    const uint32_t b_trans = h.has(TRANS_SEQUENCE) ? b : 0;
    if (h.has(SOFTMAX)) {
        return h.log_trans + b_trans * h.p.k * h.p.k * (h.p.u + 1);
    }
    const uint32_t slots = h.has(TRANS_STEP) ? max(h.p.t, 2u) - 1 : 1;
    return h.log_trans + (b_trans * slots + (h.has(TRANS_STEP) ? slot : 0)) * h.p.k * h.p.k;
}

// Entry (i,j) of the table, or the logit: weights·(inputs(t+1), 1).
__device__ __forceinline__ float transition(const Hmm& h, const float* __restrict__ table, uint32_t b, uint32_t slot, uint32_t i, uint32_t j) {
    if (!h.has(SOFTMAX)) {
        return table[i * h.p.k + j];
    }
    const float* w = table + (i * h.p.k + j) * (h.p.u + 1);
    const float* input = h.inputs + (b * h.p.t + slot + 1) * h.p.u;
    float logit = w[h.p.u];
    for (uint32_t c = 0; c < h.p.u; c++) {
        logit += w[c] * capped(input[c]);
    }
    return logit;
}

// ---- the log-likelihood -------------------------------------------------------------------------------------------

struct Total {
    float high, low;
    int32_t exponents;

    __device__ __forceinline__ void add(float x) {
        const float sum = high + x, part = sum - high;
        low += (high - (sum - part)) + (x - part);
        high = sum;
    }

    __device__ __forceinline__ void fold() {
        add((float)exponents * LN2_HIGH);
        add((float)exponents * LN2_LOW);
        exponents = 0;
    }
};

__device__ __forceinline__ int32_t exponent_of(float x) {
    return (int32_t)(__float_as_uint(x) >> 23) - 127;
}

__device__ __forceinline__ float power_of_two(int32_t e) {
    return __uint_as_float((uint32_t)(e + 127) << 23);
}

__device__ __forceinline__ void finish(const Hmm& h, uint32_t b, Total total, float sum, float failed) {
    float* record = h.summary + b * h.p.record;
    total.fold();
    total.add(logf(sum));
    const float high = total.high + total.low;
    record[0] = failed >= 0.0f ? LOG_ZERO : high;
    record[1] = failed >= 0.0f ? 0.0f : (total.high - high) + total.low;
    record[2] = failed;
    record[3] = 0.0f;
}

// Where the section of a wanted output starts.
__device__ __forceinline__ uint32_t section(const Hmm& h, uint32_t bit) {
    const uint32_t before = (bit > FILTERED && h.has(FILTERED) ? 1 : 0) + (bit > PREDICTED && h.has(PREDICTED) ? 1 : 0);
    return before * h.p.b * h.p.t * h.p.k;
}

// ---- a thread per sequence ----------------------------------------------------------------------------------------

// Rows that are fetched before they are needed: the chain of one step is far shorter than a trip to memory. The time loop is unrolled so
// many times; the general kernels, whose steps are long, hold each path of a step once.
#define AHEAD (PLAIN ? 4 : 1)

template <int K>
__device__ __forceinline__ float sum_of(const float (&x)[K]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < K; j++) {
        sum += x[j];
    }
    return sum;
}

template <int K>
__device__ __forceinline__ void load(const float* from, float (&x)[K]) {
    if (K % 4 == 0 && ((size_t)from & 15) == 0) {
#pragma unroll
        for (int j = 0; j < K / 4; j++) {
            const float4 v = reinterpret_cast<const float4*>(from)[j];
            x[4 * j] = v.x;
            x[(4 * j + 1) % K] = v.y;
            x[(4 * j + 2) % K] = v.z;
            x[(4 * j + 3) % K] = v.w;
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < K; j++) {
        x[j] = from[j];
    }
}

template <int K>
__device__ __forceinline__ void store(float* to, const float (&x)[K], float factor) {
    if (K % 4 == 0 && ((size_t)to & 15) == 0) {
#pragma unroll
        for (int j = 0; j < K / 4; j++) {
            reinterpret_cast<float4*>(to)[j] =
                make_float4(x[4 * j] * factor, x[(4 * j + 1) % K] * factor, x[(4 * j + 2) % K] * factor, x[(4 * j + 3) % K] * factor);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < K; j++) {
        to[j] = x[j] * factor;
    }
}

// The matrix of a slot: the table, or a softmax of logits that gather one input after the other.
template <int K>
__device__ __forceinline__ void transitions_of(const Hmm& h, uint32_t b, uint32_t slot, float (&a)[K][K]) {
    const float* table = table_of(h, b, slot);
    const bool softmax = h.has(SOFTMAX);
    const uint32_t each = softmax ? h.p.u + 1 : 1, last = each - 1;
#pragma unroll
    for (int i = 0; i < K; i++) {
#pragma unroll
        for (int j = 0; j < K; j++) {
            a[i][j] = table[(i * K + j) * each + last];
        }
    }
    if (softmax) {
        const float* inputs = h.inputs + (b * h.p.t + slot + 1) * h.p.u;
#pragma unroll 1
        for (uint32_t c = 0; c < last; c++) {
            const float input = capped(inputs[c]);
#pragma unroll
            for (int i = 0; i < K; i++) {
#pragma unroll
                for (int j = 0; j < K; j++) {
                    a[i][j] += table[(i * K + j) * each + c] * input;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < K; i++) {
        float shift = 0.0f;
        if (softmax) {
            shift = LOG_ZERO;
#pragma unroll
            for (int j = 0; j < K; j++) {
                shift = fmaxf(shift, a[i][j]);
            }
        }
#pragma unroll
        for (int j = 0; j < K; j++) {
            a[i][j] = probability_of(a[i][j] - shift);
        }
        const float factor = softmax ? 1.0f / sum_of(a[i]) : 1.0f;
#pragma unroll
        for (int j = 0; j < K; j++) {
            a[i][j] *= factor;
        }
    }
}

// The row of log-probabilities of a step; zeros where nothing was observed.
template <int K>
__device__ __forceinline__ void load_log_b(const Hmm& h, uint32_t b, uint32_t t, float (&x)[K]) {
    load(h.obs + (b * h.p.t + t) * K, x);
    const bool seen = observed(h, b, t);
#pragma unroll
    for (int j = 0; j < K; j++) {
        x[j] = seen ? fminf(x[j], MOST) : 0.0f;
    }
}

// Densities of all states at a step: one copy of `density`, called state by state; x stays in registers.
template <int K>
__device__ __forceinline__ void densities(const Hmm& h, uint32_t b, uint32_t t, float (&x)[K]) {
    const float* parameters = h.model + model_at(h, b) + K;
    const float* observation = h.obs + (b * h.p.t + t) * h.p.d;
    const bool seen = observed(h, b, t);
#pragma unroll 1
    for (int state = 0; state < K; state++) {
        const float value = seen ? density(h.p.emission, K, h.p.d, h.p.symbols, parameters, observation, state) : 0.0f;
#pragma unroll
        for (int j = 0; j < K; j++) {
            x[j] = j == state ? value : x[j];
        }
    }
}

template <int K>
__device__ __forceinline__ void predict(const float (&a)[K][K], const float (&alpha)[K], float (&pred)[K]) {
#pragma unroll
    for (int j = 0; j < K; j++) {
        pred[j] = alpha[0] * a[0][j];
#pragma unroll
        for (int i = 1; i < K; i++) {
            pred[j] += alpha[i] * a[i][j];
        }
    }
}

// α = pred·b up to exp(shift); a sum of 0 or less: the step is impossible.
template <int K>
__device__ __forceinline__ void observe(const float (&pred)[K], float (&x)[K], float (&alpha)[K], float& shift, float& sum) {
    shift = LOG_ZERO;
#pragma unroll
    for (int j = 0; j < K; j++) {
        shift = fmaxf(shift, x[j]);
    }
#pragma unroll
    for (int j = 0; j < K; j++) {
        alpha[j] = pred[j] * probability_of(x[j] - shift);
    }
    sum = shift <= IMPOSSIBLE ? 0.0f : sum_of(alpha);
    if (sum >= RETRY) {
        return;
    }
    shift = LOG_ZERO;
#pragma unroll
    for (int j = 0; j < K; j++) {
        x[j] = pred[j] > TINY && x[j] > IMPOSSIBLE ? x[j] + logf(pred[j]) : LOG_ZERO;
        shift = fmaxf(shift, x[j]);
    }
#pragma unroll
    for (int j = 0; j < K; j++) {
        alpha[j] = shift <= IMPOSSIBLE ? 0.0f : probability_of(x[j] - shift);
    }
    sum = sum_of(alpha);
}

template <int K>
__device__ __forceinline__ void forward(const Hmm& h, uint32_t b, uint32_t length) {
    const uint32_t each = h.p.t * K;
    float* filtered = h.states + section(h, FILTERED) + b * each;
    float* predicted = h.states + section(h, PREDICTED) + b * each;
    float* posterior = h.states + section(h, POSTERIOR) + b * each;
    const bool keeps = h.has(FILTERED) || h.has(PARK);
    float* kept = h.has(FILTERED) ? filtered : h.states + h.p.park * h.p.b * each + b * each;
    float* record = h.summary + b * h.p.record;
    Total total = {0.0f, 0.0f, 0};
    float failed = -1.0f, sum = 1.0f, alpha[K] = {}, a[K][K];
    if (h.p.begin > 0 && h.p.begin < length) {
        total = {record[0], record[1], (int32_t)record[3]};
        failed = record[2];
        load(record + 4, alpha);
        sum = failed >= 0.0f ? 1.0f : sum_of(alpha);
    }
    const uint32_t end = min(h.p.end, length);
    float ahead[AHEAD][K];
#pragma unroll
    for (int q = 0; q < AHEAD; q++) {
        if ((PLAIN || h.p.emission == 0) && h.p.begin + q < end) {
            load_log_b(h, b, h.p.begin + q, ahead[q]);
        }
    }
    if (PLAIN) {
        transitions_of(h, b, 0, a);
    }
    for (uint32_t first = h.p.begin; first < end; first += AHEAD) {
#pragma unroll
        for (int q = 0; q < AHEAD; q++) {
            const uint32_t t = first + q;
            if (t >= end) {
                break;
            }
            float x[K] = {}, pred[K];
            if (PLAIN || h.p.emission == 0) {
#pragma unroll
                for (int j = 0; j < K; j++) {
                    x[j] = ahead[q][j];
                }
                if (t + AHEAD < end) {
                    load_log_b(h, b, t + AHEAD, ahead[q]);
                }
            } else {
                densities(h, b, t, x);
            }
            if (t == 0) {
                const float* init = h.model + model_at(h, b);
#pragma unroll
                for (int j = 0; j < K; j++) {
                    pred[j] = probability_of(init[j]);
                }
            } else {
                if (!PLAIN && (h.has(TRANS_STEP) || t == max(h.p.begin, 1u))) {
                    transitions_of(h, b, t - 1, a);
                }
                predict(a, alpha, pred);
            }
            if (h.has(PREDICTED)) {
                store(predicted + t * K, pred, 1.0f / sum);
            }
            const int32_t exponent = exponent_of(sum);
            const float scale = power_of_two(-exponent);
            total.exponents += exponent;
#pragma unroll
            for (int j = 0; j < K; j++) {
                pred[j] *= scale;
            }
            float shift;
            observe(pred, x, alpha, shift, sum);
            if (sum <= 0.0f) {
                failed = failed < 0.0f ? (float)t : failed;
                sum = 1.0f;
                shift = 0.0f;
            }
            total.add(shift);
            if (t % FOLD == FOLD - 1) {
                total.fold();
            }
            if (keeps) {
                store(kept + t * K, alpha, 1.0f / sum);
            }
        }
    }
    if (h.p.end < length) {
        record[0] = total.high;
        record[1] = total.low;
        record[2] = failed;
        record[3] = (float)total.exponents;
        store(record + 4, alpha, 1.0f);
    } else if (h.p.begin < length || h.p.begin == 0) {
        finish(h, b, total, sum, failed);
    }
    for (uint32_t i = max(h.p.begin, length) * K; i < h.p.end * K; i++) {
        if (h.has(FILTERED)) {
            filtered[i] = 0.0f;
        }
        if (h.has(PREDICTED)) {
            predicted[i] = 0.0f;
        }
        if (h.has(POSTERIOR)) {
            posterior[i] = 0.0f;
        }
    }
}

// Sums of pair posteriors over a block of steps.
template <int K>
struct Pairs {
    float x[K <= 4 ? K * K : 1];
    float* shared;

    __device__ __forceinline__ float& at(int i, int j) {
        if constexpr (K <= 4) {
            return x[i * K + j];
        } else {
            return shared[(i * K + j) * WG];
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < K; i++) {
#pragma unroll
            for (int j = 0; j < K; j++) {
                at(i, j) = 0.0f;
            }
        }
    }
};

// One step back: γ and the pair posterior of the step before from those of the step after.
template <int K>
__device__ __forceinline__ void smooth(const Hmm& h, const float (&a)[K][K], const float (&alpha)[K], float (&gamma)[K], Pairs<K>& block,
                                       float* posterior) {
    float pred[K], r[K];
    predict(a, alpha, pred);
#pragma unroll
    for (int j = 0; j < K; j++) {
        // the reciprocal does not wait for γ: a product is all that lies on the chain
        r[j] = gamma[j] * (pred[j] > TINY ? 1.0f / pred[j] : 0.0f);
    }
#pragma unroll
    for (int i = 0; i < K; i++) {
        float onto = a[i][0] * r[0];
#pragma unroll
        for (int j = 1; j < K; j++) {
            onto += a[i][j] * r[j];
        }
        gamma[i] = alpha[i] * onto;
    }
    const float sum = sum_of(gamma);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    if (h.has(POSTERIOR)) {
        store(posterior, gamma, inverse);
    }
    if (h.has(PAIR_SUM | PAIR_STEPS)) {
#pragma unroll
        for (int i = 0; i < K; i++) {
            const float scaled = alpha[i] * inverse;
#pragma unroll
            for (int j = 0; j < K; j++) {
                block.at(i, j) += scaled * a[i][j] * r[j];
            }
        }
    }
}

template <int K>
__device__ __forceinline__ void backward(const Hmm& h, uint32_t b, uint32_t length) {
    const uint32_t each = h.p.t * K;
    float* posterior = h.states + section(h, POSTERIOR) + b * each;
    const float* parked = h.states + h.p.park * h.p.b * each + b * each;
    float* record = h.summary + b * h.p.record;
    float gamma[K] = {}, a[K][K];
    Pairs<K> block = {{}, h.pairs_of_thread};
    if (h.has(PAIR_SUM | PAIR_STEPS)) {
        block.clear();
    }
    if (h.p.end < length) {
        load(record + 4, gamma);
    }
    if (PLAIN) {
        transitions_of(h, b, 0, a);
    }
    // α(end − 1 − q) waits in row q; steps past the length have none.
    float ahead[AHEAD][K];
    const uint32_t steps = h.p.end - h.p.begin;
#pragma unroll
    for (int q = 0; q < AHEAD; q++) {
        if (q < steps && h.p.end - 1 - q < length) {
            load(parked + (h.p.end - 1 - q) * K, ahead[q]);
        }
    }
    // The sum over time starts afresh in the launch that holds the last step.
    bool adds = h.p.end < h.p.t;
    for (uint32_t first = 0; first < steps; first += AHEAD) {
#pragma unroll
        for (int q = 0; q < AHEAD; q++) {
            if (first + q >= steps) {
                break;
            }
            const uint32_t after = h.p.end - first - q, t = after - 1;
            if (after <= length) {
                float alpha[K];
#pragma unroll
                for (int j = 0; j < K; j++) {
                    alpha[j] = ahead[q][j];
                }
                if (t >= h.p.begin + AHEAD) {
                    load(parked + (t - AHEAD) * K, ahead[q]);
                }
                if (after == length) {
#pragma unroll
                    for (int j = 0; j < K; j++) {
                        gamma[j] = alpha[j];
                    }
                    if (h.has(POSTERIOR)) {
                        store(posterior + t * K, gamma, 1.0f);
                    }
                } else {
                    if (!PLAIN && (h.has(TRANS_STEP) || after == min(h.p.end, length - 1))) {
                        transitions_of(h, b, t, a);
                    }
                    smooth(h, a, alpha, gamma, block, posterior + t * K);
                }
            } else if (t >= h.p.begin + AHEAD && t - AHEAD < length) {
                load(parked + (t - AHEAD) * K, ahead[q]);
            }
            const bool flush = h.has(PAIR_STEPS) ? after < h.p.t : h.has(PAIR_SUM) && (t % PAIR_BLOCK == 0 || t == h.p.begin);
            if (flush) {
                float* to = h.pair + (h.has(PAIR_STEPS) ? b * (h.p.t - 1) + t : b) * K * K;
                const bool overwrites = h.has(PAIR_STEPS) || !adds;
#pragma unroll
                for (int i = 0; i < K; i++) {
#pragma unroll
                    for (int j = 0; j < K; j++) {
                        to[i * K + j] = overwrites ? block.at(i, j) : to[i * K + j] + block.at(i, j);
                    }
                }
                block.clear();
                adds = true;
            }
        }
    }
    if (h.p.begin > 0 && h.p.begin < length) {
        store(record + 4, gamma, 1.0f);
    }
}

template <int K>
__device__ __forceinline__ void thread_per_sequence(const Hmm& h, uint32_t b) {
    const uint32_t length = length_of(h, b);
    if (h.has(FORWARD)) {
        forward<K>(h, b, length);
    }
    if (h.has(BACKWARD)) {
        backward<K>(h, b, length);
    }
}

#if VARIANT % 100 == 4

__device__ __forceinline__ void up_to_4(const Hmm& h) {
    const uint32_t b = group_index() * WG + threadIdx.x;
    if (b >= h.p.b) {
        return;
    }
    switch (h.p.k) {
        case 1: thread_per_sequence<1>(h, b); break;
        case 2: thread_per_sequence<2>(h, b); break;
        case 3: thread_per_sequence<3>(h, b); break;
        default: thread_per_sequence<4>(h, b);
    }
}

#if STATES
extern "C" __global__ void __launch_bounds__(WG)
    hmm_forward_backward_states_4(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
           const float* __restrict__ inputs, float* __restrict__ states, float* __restrict__ pair, float* __restrict__ summary, HmmParams params) {
    up_to_4({model, obs, words, log_trans, inputs, states, pair, summary, params, nullptr});
}

#elif PLAIN
extern "C" __global__ void __launch_bounds__(WG)
    hmm_forward_backward_table_4(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
           const float* __restrict__ inputs, float* __restrict__ states, float* __restrict__ pair, float* __restrict__ summary, HmmParams params) {
    up_to_4({model, obs, words, log_trans, inputs, states, pair, summary, params, nullptr});
}

#else
extern "C" __global__ void __launch_bounds__(WG)
    hmm_forward_backward_4(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
           const float* __restrict__ inputs, float* __restrict__ states, float* __restrict__ pair, float* __restrict__ summary, HmmParams params) {
    up_to_4({model, obs, words, log_trans, inputs, states, pair, summary, params, nullptr});
}

#endif
#elif VARIANT % 100 == 8

__device__ __forceinline__ void up_to_8(const Hmm& h) {
    const uint32_t b = group_index() * WG + threadIdx.x;
    if (b >= h.p.b) {
        return;
    }
    switch (h.p.k) {
        case 5: thread_per_sequence<5>(h, b); break;
        case 6: thread_per_sequence<6>(h, b); break;
        case 7: thread_per_sequence<7>(h, b); break;
        default: thread_per_sequence<8>(h, b);
    }
}

#if STATES
extern "C" __global__ void __launch_bounds__(WG)
    hmm_forward_backward_states_8(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
           const float* __restrict__ inputs, float* __restrict__ states, float* __restrict__ pair, float* __restrict__ summary, HmmParams params) {
    up_to_8({model, obs, words, log_trans, inputs, states, pair, summary, params, nullptr});
}

#elif PLAIN
extern "C" __global__ void __launch_bounds__(WG)
    hmm_forward_backward_table_8(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
           const float* __restrict__ inputs, float* __restrict__ states, float* __restrict__ pair, float* __restrict__ summary, HmmParams params) {
    __shared__ float sh_pairs[64 * WG];
    up_to_8({model, obs, words, log_trans, inputs, states, pair, summary, params, sh_pairs + threadIdx.x});
}

#else
extern "C" __global__ void __launch_bounds__(WG)
    hmm_forward_backward_8(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
           const float* __restrict__ inputs, float* __restrict__ states, float* __restrict__ pair, float* __restrict__ summary, HmmParams params) {
    __shared__ float sh_pairs[64 * WG];
    up_to_8({model, obs, words, log_trans, inputs, states, pair, summary, params, sh_pairs + threadIdx.x});
}

#endif
#else

// ---- several threads per sequence ---------------------------------------------------------------------------------

// Shared memory: four arrays over the states of all sequences of the block (log b or γ, α, predicted or ratio, row sums of a softmax), then,
// where they fit, the transitions and the pair posteriors of a block of steps.
#define POOL 4096

// One thread of a sequence: its states are lane, lane + lanes, …; the arrays are the sequence's part.
struct Lane {
    uint32_t b, length, lane, lanes;
    float *log_b, *alpha, *ratio, *row, *transitions, *pairs;
    bool keeps_transitions, keeps_pairs, valid;
};

// The threads of a sequence wait for each other.
__device__ __forceinline__ void lanes_sync(const Lane& l) {
    if (l.lanes <= 32) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

// Fills what transitions of a slot need: the matrix, or for many states under a softmax the logarithm of each row's sum. Barrier after.
__device__ __forceinline__ void fill_transitions(const Hmm& h, const Lane& l, uint32_t slot) {
    const float* table = table_of(h, l.b, slot);
    const uint32_t k = h.p.k;
    for (uint32_t i = l.lane; i < k; i += l.lanes) {
        float total = 0.0f;
        if (h.has(SOFTMAX)) {
            float most = LOG_ZERO;
            for (uint32_t j = 0; j < k; j++) {
                most = fmaxf(most, transition(h, table, l.b, slot, i, j));
            }
            for (uint32_t j = 0; j < k; j++) {
                total += probability_of(transition(h, table, l.b, slot, i, j) - most);
            }
            total = most + logf(total);
            l.row[i] = total;
        }
        if (l.keeps_transitions) {
            for (uint32_t j = 0; j < k; j++) {
                l.transitions[i * k + j] = probability_of(transition(h, table, l.b, slot, i, j) - total);
            }
        }
    }
}

__device__ __forceinline__ float probability(const Hmm& h, const Lane& l, uint32_t slot, const float* table, uint32_t i, uint32_t j) {
    if (l.keeps_transitions) {
        return l.transitions[i * h.p.k + j];
    }
    return probability_of(transition(h, table, l.b, slot, i, j) - (h.has(SOFTMAX) ? l.row[i] : 0.0f));
}

// Σ_i α(i)·A(i,j)
__device__ __forceinline__ float predict_state(const Hmm& h, const Lane& l, uint32_t slot, uint32_t j) {
    const float* table = table_of(h, l.b, slot);
    float pred = 0.0f;
    for (uint32_t i = 0; i < h.p.k; i++) {
        pred += l.alpha[i] * probability(h, l, slot, table, i, j);
    }
    return pred;
}

// α(j) of a step that is done again, from what was predicted and observed.
__device__ __forceinline__ float joint_state(const Lane& l, uint32_t j) {
    const float pred = l.ratio[j], x = l.log_b[j];
    return pred > TINY && x > IMPOSSIBLE ? x + logf(pred) : LOG_ZERO;
}

__device__ __forceinline__ void forward_lanes(const Hmm& h, const Lane& l) {
    const uint32_t k = h.p.k, each = h.p.t * k;
    float* filtered = h.states + section(h, FILTERED) + l.b * each;
    float* predicted = h.states + section(h, PREDICTED) + l.b * each;
    float* posterior = h.states + section(h, POSTERIOR) + l.b * each;
    const bool keeps = h.has(FILTERED) || h.has(PARK);
    float* kept = h.has(FILTERED) ? filtered : h.states + h.p.park * h.p.b * each + l.b * each;
    float* record = h.summary + l.b * h.p.record;
    Total total = {0.0f, 0.0f, 0};
    float failed = -1.0f, sum = 1.0f;
    if (l.valid && h.p.begin > 0 && h.p.begin < l.length) {
        total = {record[0], record[1], (int32_t)record[3]};
        failed = record[2];
        sum = 0.0f;
        for (uint32_t j = 0; j < k; j++) {
            sum += record[4 + j];
        }
        sum = failed >= 0.0f ? 1.0f : sum;
        for (uint32_t j = l.lane; j < k; j += l.lanes) {
            l.alpha[j] = record[4 + j];
        }
    }
    if (l.valid && !h.has(TRANS_STEP)) {
        fill_transitions(h, l, 0);
    }
    // A step that is done again has its shift here until α is written anew.
    float again = LOG_ZERO;
    for (uint32_t t = h.p.begin; t < h.p.end; t++) {
        const bool runs = l.valid && t < l.length;
        if (runs) {
            for (uint32_t j = l.lane; j < k; j += l.lanes) {
                if (again > IMPOSSIBLE) {
                    l.alpha[j] = probability_of(joint_state(l, j) - again);
                }
                l.log_b[j] = log_b(h, l.b, t, j);
            }
            if (t > 0 && h.has(TRANS_STEP)) {
                fill_transitions(h, l, t - 1);
            }
        }
        lanes_sync(l);  // α, log b and transitions are complete
        float shift = LOG_ZERO;
        const int32_t exponent = exponent_of(sum);
        if (runs) {
            for (uint32_t j = 0; j < k; j++) {
                shift = fmaxf(shift, l.log_b[j]);
            }
            for (uint32_t j = l.lane; j < k; j += l.lanes) {
                const float pred = t == 0 ? probability_of(h.model[model_at(h, l.b) + j]) : predict_state(h, l, t - 1, j);
                if (h.has(PREDICTED)) {
                    predicted[t * k + j] = pred / sum;
                }
                l.ratio[j] = pred * power_of_two(-exponent);
            }
            total.exponents += exponent;
        }
        lanes_sync(l);  // all have read α
        if (runs) {
            for (uint32_t j = l.lane; j < k; j += l.lanes) {
                l.alpha[j] = shift <= IMPOSSIBLE ? 0.0f : l.ratio[j] * probability_of(l.log_b[j] - shift);
            }
        }
        lanes_sync(l);  // α is complete
        if (runs) {
            sum = 0.0f;
            for (uint32_t j = 0; j < k; j++) {
                sum += l.alpha[j];
            }
            again = LOG_ZERO;
            if (sum < RETRY) {
                for (uint32_t j = 0; j < k; j++) {
                    again = fmaxf(again, joint_state(l, j));
                }
                sum = 0.0f;
                for (uint32_t j = 0; j < k; j++) {
                    sum += probability_of(joint_state(l, j) - again);
                }
                shift = again;
                if (again <= IMPOSSIBLE) {
                    failed = failed < 0.0f ? (float)t : failed;
                    sum = 1.0f;
                    shift = 0.0f;
                }
            }
            total.add(shift);
            if (t % FOLD == FOLD - 1) {
                total.fold();
            }
            for (uint32_t j = l.lane; keeps && j < k; j += l.lanes) {
                const float alpha = again > IMPOSSIBLE ? probability_of(joint_state(l, j) - again) : l.alpha[j];
                // an impossible step leaves no α
                kept[t * k + j] = failed >= 0.0f ? 0.0f : alpha / sum;
            }
        }
        lanes_sync(l);  // all have read α and what a step done again reads
    }
    if (!l.valid) {
        return;
    }
    if (h.p.end < l.length) {
        for (uint32_t j = l.lane; j < k; j += l.lanes) {
            record[4 + j] = again > IMPOSSIBLE ? probability_of(joint_state(l, j) - again) : l.alpha[j];
        }
    }
    if (l.lane == 0) {
        if (h.p.end < l.length) {
            record[0] = total.high;
            record[1] = total.low;
            record[2] = failed;
            record[3] = (float)total.exponents;
        } else if (h.p.begin < l.length || h.p.begin == 0) {
            finish(h, l.b, total, sum, failed);
        }
    }
    for (uint32_t i = max(h.p.begin, l.length) * k + l.lane; i < h.p.end * k; i += l.lanes) {
        if (h.has(FILTERED)) {
            filtered[i] = 0.0f;
        }
        if (h.has(PREDICTED)) {
            predicted[i] = 0.0f;
        }
        if (h.has(POSTERIOR)) {
            posterior[i] = 0.0f;
        }
    }
}

__device__ __forceinline__ void backward_lanes(const Hmm& h, const Lane& l) {
    const uint32_t k = h.p.k, each = h.p.t * k, end = min(h.p.end, l.length);
    float* posterior = h.states + section(h, POSTERIOR) + l.b * each;
    const float* parked = h.states + h.p.park * h.p.b * each + l.b * each;
    float* record = h.summary + l.b * h.p.record;
    float* gamma = l.log_b;
    if (l.valid && h.p.begin < l.length) {
        for (uint32_t j = l.lane; j < k; j += l.lanes) {
            gamma[j] = h.p.end < l.length ? record[4 + j] : parked[(end - 1) * k + j];
            if (h.p.end >= l.length && h.has(POSTERIOR)) {
                posterior[(end - 1) * k + j] = gamma[j];
            }
        }
        if (!h.has(TRANS_STEP)) {
            fill_transitions(h, l, 0);
        }
    }
    // The sum over time starts afresh in the launch that holds the last step, its blocks after each flush.
    bool adds = h.p.end < h.p.t, fresh = true;
    for (uint32_t after = h.p.end; after > h.p.begin; after--) {
        const uint32_t t = after - 1;
        const bool runs = l.valid && after < l.length;
        if (h.has(TRANS_STEP)) {
            lanes_sync(l);  // all have read the transitions of the step after
        }
        if (runs) {
            for (uint32_t j = l.lane; j < k; j += l.lanes) {
                l.alpha[j] = parked[t * k + j];
            }
            if (h.has(TRANS_STEP)) {
                fill_transitions(h, l, t);
            }
        }
        lanes_sync(l);  // α, γ and transitions are complete
        float inverse = 0.0f;
        if (runs) {
            float sum = 0.0f;
            for (uint32_t j = 0; j < k; j++) {
                sum += gamma[j];
            }
            inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
            for (uint32_t j = l.lane; j < k; j += l.lanes) {
                const float pred = predict_state(h, l, t, j);
                l.ratio[j] = pred > TINY ? gamma[j] / pred : 0.0f;
            }
        }
        lanes_sync(l);  // the ratios are complete, all have read γ
        const bool flush = h.has(PAIR_SUM) && (!l.keeps_pairs || t % PAIR_BLOCK == 0 || t == h.p.begin);
        if (l.valid) {
            const float* table = table_of(h, l.b, t);
            float* pairs = h.pair + (h.has(PAIR_STEPS) ? l.b * (h.p.t - 1) + t : l.b) * k * k;
            for (uint32_t i = l.lane; i < k; i += l.lanes) {
                const float alpha = l.alpha[i] * inverse;
                float onto = 0.0f;
                for (uint32_t j = 0; j < k; j++) {
                    float p = 0.0f;
                    if (runs) {
                        p = probability(h, l, t, table, i, j) * l.ratio[j];
                        onto += p;
                    }
                    if (h.has(PAIR_STEPS) && after < h.p.t) {
                        pairs[i * k + j] = runs ? alpha * p : 0.0f;
                    }
                    if (h.has(PAIR_SUM)) {
                        float total = runs ? alpha * p : 0.0f;
                        if (l.keeps_pairs) {
                            total += fresh ? 0.0f : l.pairs[i * k + j];
                            l.pairs[i * k + j] = total;
                        }
                        if (flush) {
                            pairs[i * k + j] = (adds ? pairs[i * k + j] : 0.0f) + total;
                        }
                    }
                }
                if (runs) {
                    gamma[i] = alpha * onto;
                    if (h.has(POSTERIOR)) {
                        posterior[t * k + i] = alpha * onto;
                    }
                }
            }
        }
        fresh = flush;
        adds = adds || flush;
    }
    if (l.valid && h.p.begin > 0 && h.p.begin < l.length) {
        for (uint32_t j = l.lane; j < k; j += l.lanes) {
            record[4 + j] = gamma[j];
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_forward_backward(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words,
                         const float* __restrict__ log_trans, const float* __restrict__ inputs, float* __restrict__ states, float* __restrict__ pair,
                         float* __restrict__ summary, HmmParams params) {
    __shared__ float sh[POOL];
    const Hmm h = {model, obs, words, log_trans, inputs, states, pair, summary, params, nullptr};
    uint32_t lanes = 1;
    while (lanes < WG && lanes < params.k) {
        lanes *= 2;
    }
    const uint32_t slot = threadIdx.x / lanes, k = params.k, all = WG / lanes * k;
    Lane l;
    l.b = group_index() * (WG / lanes) + slot;
    l.valid = l.b < params.b;
    l.length = l.valid ? length_of(h, l.b) : 0;
    l.lane = threadIdx.x % lanes;
    l.lanes = lanes;
    l.log_b = sh + slot * k;
    l.alpha = l.log_b + all;
    l.ratio = l.alpha + all;
    l.row = l.ratio + all;
    l.transitions = sh + 4 * all + slot * k * k;
    l.pairs = l.transitions + all * k;
    l.keeps_transitions = all * (4 + k) <= POOL;
    l.keeps_pairs = all * (4 + 2 * k) <= POOL;
    if (h.has(FORWARD)) {
        forward_lanes(h, l);
    }
    lanes_sync(l);
    if (h.has(BACKWARD)) {
        backward_lanes(h, l);
    }
}

// ---- densities ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    hmm_emission(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, float* __restrict__ log_obs,
                 HmmParams params) {
    const Hmm h = {model, obs, words, nullptr, nullptr, nullptr, nullptr, nullptr, params, nullptr};
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.t * params.k) {
        return;
    }
    const uint32_t step = at / params.k;
    log_obs[at] = log_b(h, step / params.t, step % params.t, at % params.k);
}

#endif
