// Forward-backward by an associative scan over time. Maths, shapes and source: kernels/hmm_scan.rs.
//   hmm_scan_chunks    grid  ⌈B·C·K / WG⌉   thread = sequence, chunk and row of its matrix: `chunk` steps
//   hmm_scan_merge     grid  ⌈B·G·K / WG⌉   thread = sequence, group and row: RADIX children
//   hmm_scan_down      grid  ⌈B·G·2 / WG⌉   thread = sequence, group and direction: RADIX children
//   hmm_scan_forward   grid  ⌈B·C / WG⌉     thread = sequence and chunk: `chunk` steps
//   hmm_scan_sum       grid  ⌈B / WG⌉       thread = sequence: C records
//   hmm_scan_backward  grid  ⌈B·C / WG⌉     thread = sequence and chunk: `chunk` steps
//   spill: one to four words of addresses, where ptxas stops at 64, 96 or 128 registers for the sake of occupancy
//   Vectors, and transitions up to K = 4, lie in registers: templates on K rounded up to 2, 4, 8 or 16. One table for all steps and
//   sequences is made into probabilities once a block, in shared memory.

struct HmmScanParams {
    uint32_t b;
    uint32_t t;
    uint32_t k;
    uint32_t model_row;
    uint32_t trans_row;
    uint32_t trans_step;
    uint32_t words_row;
    uint32_t chunk;
    uint32_t chunks;
    uint32_t children;
    uint32_t groups;
    uint32_t child_at;
    uint32_t group_at;
    uint32_t element_at;
    uint32_t filtered;
    uint32_t predicted;
    uint32_t posterior;
    uint32_t park;
    uint32_t root;
    uint32_t record;
};

#define LOG_ZERO (-1e30f)
#define IMPOSSIBLE (-1e29f)
#define MOST 1e28f
#define NONE 0xffffffffu
#define DEAD (-0x1000000)
#define RETRY 8.6736174e-19f
#define LN2_HIGH 0.693359375f
#define LN2_LOW (-2.12194440e-4f)
#define LOG2_E 1.44269504f

// 2^n, at most 2^127; 0 below the normal numbers.
__device__ __forceinline__ float pow2(int n) {
    return n >= -126 ? __uint_as_float((uint32_t)(min(n, 127) + 127) << 23) : 0.0f;
}

// e with 2^e ≤ x < 2^(e+1), for normal x > 0.
__device__ __forceinline__ int exponent_of(float x) {
    return (int)(__float_as_uint(x) >> 23) - 127;
}

__device__ __forceinline__ float probability_of(float x) {
    return x <= IMPOSSIBLE ? 0.0f : expf(x);
}

// hi + lo ← hi + lo + x.
__device__ __forceinline__ void add_to(float& hi, float& lo, float x) {
    const float s = __fadd_rn(hi, x);
    const float part = __fsub_rn(s, hi);
    lo += __fadd_rn(__fsub_rn(hi, __fsub_rn(s, part)), __fsub_rn(x, part));
    hi = s;
}

__device__ __forceinline__ uint32_t length_of(const uint32_t* __restrict__ words, uint32_t b, const HmmScanParams& params) {
    return params.words_row == 0 ? params.t : min(words[b * params.words_row], params.t);
}

// States padded to K; entries from params.k on are 0.
template <int K>
struct Vector {
    // Products with a matrix take so many rows at once, then turn the vector: of 16 states the code is that of four.
    static constexpr uint32_t ROWS = K <= 8 ? K : 4;
    float x[K];

    __device__ __forceinline__ float sum() const {
        float s = 0.0f;
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            s += x[j];
        }
        return s;
    }

    __device__ __forceinline__ void scale(float by) {
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            x[j] *= by;
        }
    }

    __device__ __forceinline__ void load(const float* from, uint32_t k) {
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            x[j] = j < k ? from[j] : 0.0f;
        }
    }

    __device__ __forceinline__ void store(float* to, uint32_t k, float by) const {
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            if (j < k) {
                to[j] = x[j] * by;
            }
        }
    }

    // Moves every entry ROWS places to the front, and the first ones to the end.
    __device__ __forceinline__ void turn() {
        const Vector<K> before = *this;
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            x[j] = before.x[(j + ROWS) % K];
        }
    }

    __device__ __forceinline__ void unit(uint32_t row) {
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            x[j] = j == row ? 1.0f : 0.0f;
        }
    }
};

// One table for all steps and sequences as probabilities in shared memory; none where registers hold it or there are many. All threads
// of the block call it.
__device__ __forceinline__ const float* shared_table(float* sh_table, const float* __restrict__ log_trans, const HmmScanParams& params) {
    if (params.k <= 4 || params.trans_row != 0 || params.trans_step != 0) {
        return nullptr;
    }
    for (uint32_t i = threadIdx.x; i < params.k * params.k; i += WG) {
        sh_table[i] = probability_of(log_trans[i]);
    }
    __syncthreads();
    return sh_table;
}

// Transitions as probabilities: in registers where they are few, else from shared memory, else from their logarithms as they are read.
template <int K>
struct Matrix {
    float a[K <= 4 ? K * K : 1];
    const float* table;
    const float* __restrict__ from;
    uint32_t k;

    __device__ explicit Matrix(const float* table) : table(table) {}

    __device__ __forceinline__ void load(const float* __restrict__ log_trans, uint32_t b, uint32_t t, const HmmScanParams& params) {
        from = log_trans + b * params.trans_row + (t - 1) * params.trans_step;
        k = params.k;
        if (K <= 4) {
#pragma unroll
            for (uint32_t i = 0; i < K; i++) {
#pragma unroll
                for (uint32_t j = 0; j < K; j++) {
                    a[K <= 4 ? i * K + j : 0] = i < k && j < k ? probability_of(from[i * k + j]) : 0.0f;
                }
            }
        }
    }

    __device__ __forceinline__ float at(uint32_t i, uint32_t j) const {
        if (K <= 4) {
            return a[K <= 4 ? i * K + j : 0];
        }
        if (i >= k || j >= k) {
            return 0.0f;
        }
        return table ? table[i * k + j] : probability_of(from[i * k + j]);
    }

    // v·A.
    __device__ __forceinline__ Vector<K> times(const Vector<K>& v) const {
        Vector<K> out, turning = v;
        out.unit(K);
#pragma unroll 1
        for (uint32_t first = 0; first < K; first += Vector<K>::ROWS) {
#pragma unroll
            for (uint32_t i = 0; i < Vector<K>::ROWS; i++) {
#pragma unroll
                for (uint32_t j = 0; j < K; j++) {
                    out.x[j] += turning.x[i] * at(first + i, j);
                }
            }
            turning.turn();
        }
        return out;
    }
};

// v = pred·b / (2^e·exp(shift)) with a sum in [1, 2), and the shift; gives e, or DEAD where no state is possible.
template <int K>
__device__ __forceinline__ int observe(const float* __restrict__ obs, const uint32_t* __restrict__ words, uint32_t b, uint32_t t, const Vector<K>& pred,
                                       Vector<K>& v, float& shift, const HmmScanParams& params) {
    const bool seen = params.words_row <= 1 || words[b * params.words_row + 1 + t] != 0;
    const float* __restrict__ row = obs + (b * params.t + t) * params.k;
    float log_b[K];
    shift = LOG_ZERO;
#pragma unroll
    for (uint32_t j = 0; j < K; j++) {
        log_b[j] = j < params.k ? (seen ? fminf(row[j], MOST) : 0.0f) : LOG_ZERO;
        shift = fmaxf(shift, log_b[j]);
    }
    float sum = 0.0f;
#pragma unroll
    for (uint32_t j = 0; j < K; j++) {
        v.x[j] = pred.x[j] * (log_b[j] <= IMPOSSIBLE ? 0.0f : expf(log_b[j] - shift));
        sum += v.x[j];
    }
    int n = 0;
    if (sum < RETRY) {
        float top = LOG_ZERO;
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            v.x[j] = pred.x[j] > 0.0f && log_b[j] > IMPOSSIBLE ? (log_b[j] - shift) + logf(pred.x[j]) : LOG_ZERO;
            top = fmaxf(top, v.x[j]);
        }
        if (top <= IMPOSSIBLE) {
            v.unit(K);
            return DEAD;
        }
        const float whole = floorf(fmaxf(top, -1e6f) * LOG2_E);
        n = (int)whole;
        sum = 0.0f;
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            const float x = top < -1e6f ? v.x[j] - top : (v.x[j] - whole * LN2_HIGH) - whole * LN2_LOW;
            v.x[j] = x < -87.0f ? 0.0f : expf(x);
            sum += v.x[j];
        }
    }
    const int e = exponent_of(sum);
    v.scale(pow2(-e));
    return n + e;
}

template <int K>
__device__ __forceinline__ Vector<K> start(const float* __restrict__ model, uint32_t b, const HmmScanParams& params) {
    Vector<K> v;
#pragma unroll
    for (uint32_t j = 0; j < K; j++) {
        v.x[j] = j < params.k ? probability_of(model[b * params.model_row + j]) : 0.0f;
    }
    return v;
}

// Runs the template for K rounded up.
#define FOR_STATES(call) \
    if (params.k <= 2) { \
        call(2); \
    } else if (params.k <= 4) { \
        call(4); \
    } else if (params.k <= 8) { \
        call(8); \
    } else { \
        call(STATES); \
    }

// ---- up: the matrix of every chunk, row by row ----------------------------------------------------------------------------

template <int K>
__device__ void chunk_row(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words,
                          const float* __restrict__ log_trans, float* elements, const float* table, uint32_t at, const HmmScanParams& params) {
    const uint32_t k = params.k, row = at % k, c = (at / k) % params.chunks, b = at / (k * params.chunks);
    Vector<K> v;
    v.unit(row);
    Matrix<K> a(table);
    a.load(log_trans, b, 1, params);
    int e = 0;
    const uint32_t stop = min(length_of(words, b, params), (c + 1) * params.chunk);
    for (uint32_t t = c * params.chunk; t < stop && e != DEAD; t++) {
        Vector<K> pred;
        if (t == 0) {
            pred = start<K>(model, b, params);
        } else {
            if (params.trans_step != 0) {
                a.load(log_trans, b, t, params);
            }
            pred = a.times(v);
        }
        float shift;
        const int more = observe<K>(obs, words, b, t, pred, v, shift, params);
        e = more == DEAD ? DEAD : e + more;
    }
    v.store(elements + at * (k + 1), k, 1.0f);
    elements[at * (k + 1) + k] = (float)max(e, DEAD);
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_scan_chunks(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
                    float* elements, HmmScanParams params) {
    __shared__ float sh_table[STATES * STATES];
    const float* table = shared_table(sh_table, log_trans, params);
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.chunks * params.k) {
        return;
    }
#define CALL(K) chunk_row<K>(model, obs, words, log_trans, elements, table, at, params)
    FOR_STATES(CALL)
#undef CALL
}

// ---- up: matrices of groups -----------------------------------------------------------------------------------------------

// v ← v·element; gives the exponent taken out, relative to the largest of the element's rows.
template <int K>
__device__ __forceinline__ int times_element(const float* element, Vector<K>& v, uint32_t k) {
    int top = DEAD, largest = DEAD;
#pragma unroll
    for (uint32_t i = 0; i < K; i++) {
        if (i < k) {
            const int e = (int)element[i * (k + 1) + k];
            largest = max(largest, e);
            top = v.x[i] > 0.0f ? max(top, e) : top;
        }
    }
    Vector<K> out;
    out.unit(K);
#pragma unroll 1
    for (uint32_t first = 0; first < K; first += Vector<K>::ROWS) {
#pragma unroll
        for (uint32_t i = 0; i < Vector<K>::ROWS; i++) {
            const float* row = element + (first + i) * (k + 1);
            if (first + i < k && v.x[i] > 0.0f) {
                const float x = v.x[i] * pow2((int)row[k] - top);
#pragma unroll
                for (uint32_t j = 0; j < K; j++) {
                    out.x[j] += j < k ? x * row[j] : 0.0f;
                }
            }
        }
        v.turn();
    }
    const float sum = out.sum();
    if (sum <= 1e-37f) {
        v.unit(K);
        return DEAD;
    }
    const int e = exponent_of(sum);
    v = out;
    v.scale(pow2(-e));
    return e + top - largest;
}

template <int K>
__device__ void merge_row(float* elements, uint32_t at, const HmmScanParams& params) {
    const uint32_t k = params.k, row = at % k, g = (at / k) % params.groups, b = at / (k * params.groups);
    Vector<K> v;
    v.unit(row);
    int e = 0;
    const uint32_t last = min((g + 1) * RADIX, params.children);
    for (uint32_t c = g * RADIX; c < last && e != DEAD; c++) {
        const int more = times_element<K>(elements + params.child_at + (b * params.children + c) * k * (k + 1), v, k);
        e = more == DEAD ? DEAD : e + more;
    }
    float* out = elements + params.group_at + at * (k + 1);
    v.store(out, k, 1.0f);
    out[k] = (float)max(e, DEAD);
}

extern "C" __global__ void __launch_bounds__(WG) hmm_scan_merge(float* elements, HmmScanParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.groups * params.k) {
        return;
    }
#define CALL(K) merge_row<K>(elements, at, params)
    FOR_STATES(CALL)
#undef CALL
}

// ---- down: forward vector at the start of every child, backward vector at its end ------------------------------------------

// v ← element·v.
template <int K>
__device__ __forceinline__ void element_times(const float* element, Vector<K>& v, uint32_t k) {
    Vector<K> out;
    int top = DEAD;
    float most = 0.0f;
    out.unit(K);
#pragma unroll 1
    for (uint32_t first = 0; first < K; first += Vector<K>::ROWS) {
#pragma unroll
        for (uint32_t i = 0; i < Vector<K>::ROWS; i++) {
            const float* row = element + (first + i) * (k + 1);
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                out.x[i] += first + i < k && j < k ? row[j] * v.x[j] : 0.0f;
            }
            top = out.x[i] > 0.0f ? max(top, (int)row[k]) : top;
        }
        out.turn();
    }
#pragma unroll
    for (uint32_t i = 0; i < K; i++) {
        v.x[i] = out.x[i] > 0.0f ? out.x[i] * pow2((int)element[i * (k + 1) + k] - top) : 0.0f;
        most = fmaxf(most, v.x[i]);
    }
    if (most > 1e-37f) {
        v.scale(pow2(-exponent_of(most)));
    }
}

template <int K>
__device__ void down(const float* elements, float* vectors, uint32_t at, const HmmScanParams& params) {
    const uint32_t k = params.k, back = at % 2, g = (at / 2) % params.groups, b = at / (2 * params.groups);
    // At the root: the first element's rows are all init·b(0), so that any one of them is the start; nothing comes after the end.
    Vector<K> v;
    if (params.root == 0) {
        v.load(vectors + params.group_at + ((b * params.groups + g) * 2 + back) * k, k);
    } else {
        v.unit(0);
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            v.x[j] = back == 1 && j < k ? 1.0f : v.x[j];
        }
    }
    const uint32_t first = g * RADIX, last = min(first + RADIX, params.children);
    for (uint32_t n = 0; n < last - first; n++) {
        const uint32_t c = b * params.children + (back == 1 ? last - 1 - n : first + n);
        v.store(vectors + params.child_at + (c * 2 + back) * k, k, 1.0f);
        const float* element = elements + params.element_at + c * k * (k + 1);
        if (back == 1) {
            element_times<K>(element, v, k);
        } else {
            times_element<K>(element, v, k);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG) hmm_scan_down(float* elements, float* vectors, HmmScanParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.groups * 2) {
        return;
    }
#define CALL(K) down<K>(elements, vectors, at, params)
    FOR_STATES(CALL)
#undef CALL
}

// ---- add back: forward ----------------------------------------------------------------------------------------------------

template <int K>
__device__ void forward_chunk(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words,
                              const float* __restrict__ log_trans, const float* __restrict__ vectors, float* states, float* records, const float* table,
                              uint32_t at, const HmmScanParams& params) {
    const uint32_t k = params.k, c = at % params.chunks, b = at / params.chunks, section = params.b * params.t * k;
    const uint32_t stop = min(length_of(words, b, params), (c + 1) * params.chunk);
    Vector<K> v;
    v.load(vectors + 2 * at * k, k);
    float sum = v.sum(), hi = 0.0f, lo = 0.0f;
    bool alive = sum > 0.0f;
    v.scale(alive ? 1.0f / sum : 0.0f);
    sum = 1.0f;
    float failed = !alive && c * params.chunk < stop ? (float)(c * params.chunk) : -1.0f;
    Matrix<K> a(table);
    a.load(log_trans, b, 1, params);
    for (uint32_t t = c * params.chunk; t < stop && alive; t++) {
        Vector<K> pred;
        if (t == 0) {
            pred = start<K>(model, b, params);
        } else {
            if (params.trans_step != 0) {
                a.load(log_trans, b, t, params);
            }
            pred = a.times(v);
        }
        float* row = states + (b * params.t + t) * k;
        if (params.predicted != NONE) {
            pred.store(row + params.predicted * section, k, 1.0f / sum);
        }
        float shift;
        const int e = observe<K>(obs, words, b, t, pred, v, shift, params);
        if (e == DEAD) {
            failed = (float)t;
            alive = false;
        } else {
            sum = v.sum();
            add_to(hi, lo, shift);
            add_to(hi, lo, (float)e * LN2_HIGH);
            add_to(hi, lo, (float)e * LN2_LOW);
            if (params.filtered != NONE || params.posterior != NONE) {
                v.store(row + params.park * section, k, 1.0f / sum);
            }
        }
    }
    add_to(hi, lo, logf(sum));
    records[4 * at] = hi;
    records[4 * at + 1] = lo;
    records[4 * at + 2] = failed;
    records[4 * at + 3] = 0.0f;
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_scan_forward(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words,
                     const float* __restrict__ log_trans, const float* __restrict__ vectors, float* states, float* records, HmmScanParams params) {
    __shared__ float sh_table[STATES * STATES];
    const float* table = shared_table(sh_table, log_trans, params);
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.chunks) {
        return;
    }
#define CALL(K) forward_chunk<K>(model, obs, words, log_trans, vectors, states, records, table, at, params)
    FOR_STATES(CALL)
#undef CALL
}

// ---- likelihood of every sequence -----------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) hmm_scan_sum(const float* __restrict__ records, float* summary, HmmScanParams params) {
    const uint32_t b = group_index() * WG + threadIdx.x;
    if (b >= params.b) {
        return;
    }
    float hi = 0.0f, lo = 0.0f, failed = -1.0f;
    for (uint32_t c = 0; c < params.chunks; c++) {
        const float* record = records + 4 * (b * params.chunks + c);
        add_to(hi, lo, record[0]);
        add_to(hi, lo, record[1]);
        failed = failed < 0.0f ? record[2] : failed;
    }
    const float high = __fadd_rn(hi, lo);
    summary[b * params.record] = failed >= 0.0f ? LOG_ZERO : high;
    summary[b * params.record + 1] = failed >= 0.0f ? 0.0f : __fadd_rn(__fsub_rn(hi, high), lo);
    summary[b * params.record + 2] = failed;
    summary[b * params.record + 3] = 0.0f;
}

// ---- add back: backward ---------------------------------------------------------------------------------------------------

template <int K>
__device__ void backward_chunk(const uint32_t* __restrict__ words, const float* __restrict__ log_trans, const float* __restrict__ vectors,
                               const float* __restrict__ summary, float* states, const float* table, uint32_t at, const HmmScanParams& params) {
    const uint32_t k = params.k, c = at % params.chunks, b = at / params.chunks, section = params.b * params.t * k;
    const uint32_t stop = min(length_of(words, b, params), (c + 1) * params.chunk);
    const bool possible = summary[b * params.record + 2] < 0.0f;
    Vector<K> gamma;
    gamma.unit(K);
    Matrix<K> a(table);
    a.load(log_trans, b, 1, params);
    for (uint32_t t = stop; t > c * params.chunk;) {
        t--;
        float* row = states + (b * params.t + t) * k;
        Vector<K> v;
        v.load(row + params.park * section, possible ? k : 0);
        if (t + 1 == stop) {
            Vector<K> beta;
            beta.load(vectors + (2 * at + 1) * k, k);
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                v.x[j] *= beta.x[j];
            }
        } else {
            if (params.trans_step != 0) {
                a.load(log_trans, b, t + 1, params);
            }
            Vector<K> ratio = a.times(v);
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                ratio.x[j] = ratio.x[j] > 0.0f ? gamma.x[j] / ratio.x[j] : 0.0f;
            }
#pragma unroll 1
            for (uint32_t first = 0; first < K; first += Vector<K>::ROWS) {
#pragma unroll
                for (uint32_t i = 0; i < Vector<K>::ROWS; i++) {
                    float sum = 0.0f;
#pragma unroll
                    for (uint32_t j = 0; j < K; j++) {
                        sum += a.at(first + i, j) * ratio.x[j];
                    }
                    v.x[i] *= sum;
                }
                v.turn();
            }
        }
        const float sum = v.sum();
        gamma = v;
        gamma.scale(sum > 0.0f ? 1.0f / sum : 0.0f);
        gamma.store(row + params.posterior * section, k, 1.0f);
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_scan_backward(const uint32_t* __restrict__ words, const float* __restrict__ log_trans, const float* __restrict__ vectors,
                      const float* __restrict__ summary, float* states, HmmScanParams params) {
    __shared__ float sh_table[STATES * STATES];
    const float* table = shared_table(sh_table, log_trans, params);
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.b * params.chunks) {
        return;
    }
#define CALL(K) backward_chunk<K>(words, log_trans, vectors, summary, states, table, at, params)
    FOR_STATES(CALL)
#undef CALL
}
