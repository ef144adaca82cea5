// Most probable state paths. Maths, shapes and source: kernels/hmm_viterbi.rs.
//   hmm_viterbi        grid  ⌈B / WG⌉           thread = sequence, K ≤ 4: states and transitions in registers (template on K), four
//                                               steps loaded ahead of the chain
//   hmm_viterbi_lanes  grid  ⌈B·lanes / WG⌉     `lanes` threads per sequence, each with states lane, lane + lanes, …; constant tables
//                                               up to K = 32 keep a lane's column in registers (template on its bound), and groups of
//                                               at most a warp wait for their warp alone
//   hmm_viterbi_path   grid  ⌈B / WG⌉           thread = sequence, back through the pointers
//   spill: three to eight words of hmm_viterbi_lanes, where ptxas stops at 64 or 96 registers on sm_75 for the sake of occupancy
//   All of them take steps from_step .. to_step.      shared memory: 3·STATES floats, 2·PACKED words

struct HmmViterbiParams {
    uint32_t b;
    uint32_t t;
    uint32_t k;
    uint32_t model_row;
    uint32_t trans_row;
    uint32_t trans_step;
    uint32_t softmax;
    uint32_t u;
    uint32_t words_row;
    uint32_t from_step;
    uint32_t to_step;
    uint32_t carry_in;
    uint32_t carry_out;
    uint32_t pointers_from;
    uint32_t pointer_words;
    uint32_t lanes;
};

#define IMPOSSIBLE (-1e30f)
#define DEAD (-1e29f)
#define LOWEST (-3e38f)
#define MOST 1e28f
#define NONE 0xffffffffu
#define PACKED 256

// The arguments that every step reads.
struct Given {
    const float* __restrict__ model;
    const float* __restrict__ obs;
    const uint32_t* __restrict__ words;
    const float* __restrict__ log_trans;
    const float* __restrict__ inputs;
    HmmViterbiParams params;

    __device__ __forceinline__ uint32_t length_of(uint32_t b) const {
        return params.words_row == 0 ? params.t : min(words[b * params.words_row], params.t);
    }

    __device__ __forceinline__ bool observed(uint32_t b, uint32_t t) const {
        return params.words_row <= 1 || words[b * params.words_row + 1 + t] != 0;
    }

    // First element of the transitions into step t ≥ 1.
    __device__ __forceinline__ uint32_t trans_at(uint32_t b, uint32_t t) const {
        return b * params.trans_row + (t - 1) * params.trans_step;
    }

    // Logit of one transition: weights [U] and bias at `at`, inputs at `from_input`.
    __device__ __forceinline__ float logit(uint32_t at, uint32_t from_input) const {
        float x = log_trans[at + params.u];
        for (uint32_t c = 0; c < params.u; c++) {
            x += log_trans[at + c] * inputs[from_input + c];
        }
        return fmaxf(x, IMPOSSIBLE);
    }
};

// hi + lo ← hi + lo + x.
__device__ __forceinline__ void add_to(float& hi, float& lo, float x) {
    const float s = __fadd_rn(hi, x);
    const float part = __fsub_rn(s, hi);
    lo += __fadd_rn(__fsub_rn(hi, __fsub_rn(s, part)), __fsub_rn(x, part));
    hi = s;
}

// ---- a thread per sequence ----------------------------------------------------------------------------------------------

template <int K>
struct Walk {
    float d[K], hi, lo;
    uint32_t failed, last;
    float a[K][K];

    __device__ __forceinline__ void load_rows(const Given& x, uint32_t b, uint32_t t) {
#pragma unroll
        for (uint32_t i = 0; i < K; i++) {
            if (x.params.softmax == 0) {
                const uint32_t at = x.trans_at(b, t) + i * K;
#pragma unroll
                for (uint32_t j = 0; j < K; j++) {
                    a[i][j] = x.log_trans[at + j];
                }
                continue;
            }
            // logits gather one input after the other
            const uint32_t u = x.params.u, from_input = (b * x.params.t + t) * u, at = b * x.params.trans_row + i * K * (u + 1);
            float top = IMPOSSIBLE, sum = 0.0f;
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                a[i][j] = x.log_trans[at + j * (u + 1) + u];
            }
#pragma unroll 1
            for (uint32_t c = 0; c < u; c++) {
                const float input = x.inputs[from_input + c];
#pragma unroll
                for (uint32_t j = 0; j < K; j++) {
                    a[i][j] += x.log_trans[at + j * (u + 1) + c] * input;
                }
            }
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                a[i][j] = fmaxf(a[i][j], IMPOSSIBLE);
                top = fmaxf(top, a[i][j]);
            }
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                sum += expf(a[i][j] - top);
            }
            const float norm = top + logf(sum);
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                a[i][j] = a[i][j] <= DEAD ? IMPOSSIBLE : a[i][j] - norm;
            }
        }
    }

    // Takes in the largest entry of d, or fails at step t.
    __device__ __forceinline__ float settle(uint32_t t) {
        float top = d[0];
        uint32_t state = 0;
#pragma unroll
        for (uint32_t j = 1; j < K; j++) {
            state = d[j] > top ? j : state;
            top = fmaxf(top, d[j]);
        }
        if (top <= DEAD) {
            failed = t;
            return 0.0f;
        }
        last = state;
        add_to(hi, lo, top);
        return top;
    }

    // One step; gives the pointers, two bits each.
    __device__ __forceinline__ uint32_t advance(const Given& x, uint32_t b, uint32_t t, uint32_t stop, const float (&o)[K]) {
        if (t >= stop || failed != NONE) {
            return 0;
        }
        if (t == 0) {
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                d[j] = fmaxf(x.model[b * x.params.model_row + j] + o[j], IMPOSSIBLE);
            }
            return 0;
        }
        const float top = settle(t - 1);
        if (failed != NONE) {
            return 0;
        }
        if (x.params.softmax != 0 || x.params.trans_step != 0) {
            load_rows(x, b, t);
        }
        float next[K];
        uint32_t word = 0;
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            float best = d[0] + a[0][j];
            uint32_t from_state = 0;
#pragma unroll
            for (uint32_t i = 1; i < K; i++) {
                const float candidate = d[i] + a[i][j];
                from_state = candidate > best ? i : from_state;
                best = fmaxf(best, candidate);
            }
            next[j] = fmaxf((best - top) + o[j], IMPOSSIBLE);
            word |= from_state << (2 * j);
        }
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            d[j] = next[j];
        }
        return word;
    }
};

template <int K>
__device__ __forceinline__ void load_obs(const Given& x, uint32_t b, uint32_t t, uint32_t stop, float (&o)[4][K]) {
#pragma unroll
    for (uint32_t c = 0; c < 4; c++) {
        const bool seen = t + c < stop && x.observed(b, t + c);
#pragma unroll
        for (uint32_t j = 0; j < K; j++) {
            o[c][j] = seen ? fminf(x.obs[(b * x.params.t + t + c) * K + j], MOST) : 0.0f;
        }
    }
}

template <int K>
__device__ void walk(const Given& x, uint32_t b, float* carry, uint32_t* ends, uint32_t* pointers) {
    const HmmViterbiParams& params = x.params;
    const uint32_t slot_in = (params.carry_in * params.b + b) * (K + 2), end_in = 2 * (params.carry_in * params.b + b);
    const uint32_t length = x.length_of(b), stop = min(params.to_step, length);
    Walk<K> w;
#pragma unroll
    for (uint32_t j = 0; j < K; j++) {
        w.d[j] = params.from_step > 0 ? carry[slot_in + j] : IMPOSSIBLE;
    }
    w.hi = params.from_step > 0 ? carry[slot_in + K] : 0.0f;
    w.lo = params.from_step > 0 ? carry[slot_in + K + 1] : 0.0f;
    w.failed = params.from_step > 0 ? ends[end_in] : NONE;
    w.last = params.from_step > 0 ? ends[end_in + 1] : 0;
    if (params.softmax == 0 && params.trans_step == 0) {
        w.load_rows(x, b, 1);
    }

    float o[4][K], ahead[4][K];
    load_obs(x, b, params.from_step, stop, o);
    for (uint32_t t = params.from_step; t < stop; t += 4) {
        load_obs(x, b, t + 4, stop, ahead);
        uint32_t word = 0;
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            word |= w.advance(x, b, t + c, stop, o[c]) << (8 * c);
        }
        pointers[b * params.pointer_words + (t - params.pointers_from) / 4] = word;
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
#pragma unroll
            for (uint32_t j = 0; j < K; j++) {
                o[c][j] = ahead[c][j];
            }
        }
    }

    if (w.failed == NONE && params.to_step >= length && params.from_step < length) {
        w.settle(length - 1);
    }
    const uint32_t slot_out = (params.carry_out * params.b + b) * (K + 2), end_out = 2 * (params.carry_out * params.b + b);
#pragma unroll
    for (uint32_t j = 0; j < K; j++) {
        carry[slot_out + j] = w.d[j];
    }
    carry[slot_out + K] = w.hi;
    carry[slot_out + K + 1] = w.lo;
    ends[end_out] = w.failed;
    ends[end_out + 1] = w.last;
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_viterbi(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
                const float* __restrict__ inputs, float* carry, uint32_t* ends, uint32_t* pointers, HmmViterbiParams params) {
    const uint32_t b = group_index() * WG + threadIdx.x;
    if (b >= params.b) {
        return;
    }
    const Given x = {model, obs, words, log_trans, inputs, params};
    switch (params.k) {
        case 1: walk<1>(x, b, carry, ends, pointers); break;
        case 2: walk<2>(x, b, carry, ends, pointers); break;
        case 3: walk<3>(x, b, carry, ends, pointers); break;
        default: walk<4>(x, b, carry, ends, pointers); break;
    }
}

// ---- lanes per sequence -------------------------------------------------------------------------------------------------

struct Group {
    float* sh_delta;
    float* sh_norm;
    uint32_t* sh_from;
    uint32_t b, lane, slot, lanes;

    __device__ __forceinline__ float& delta(uint32_t parity, uint32_t j) const {
        return sh_delta[parity * STATES + slot + j];
    }

    // Lanes of one sequence lie in one warp where they are 32 at most.
    __device__ __forceinline__ void sync() const {
        if (lanes <= 32) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
};

// ln of the sum of exponentials of row i's logits.
__device__ __forceinline__ float log_norm(const Given& x, uint32_t b, uint32_t t, uint32_t i) {
    const HmmViterbiParams& params = x.params;
    const uint32_t from_input = (b * x.params.t + t) * params.u, at = b * params.trans_row + i * params.k * (params.u + 1);
    float top = IMPOSSIBLE, sum = 0.0f;
    for (uint32_t j = 0; j < params.k; j++) {
        top = fmaxf(top, x.logit(at + j * (params.u + 1), from_input));
    }
    for (uint32_t j = 0; j < params.k; j++) {
        sum += expf(x.logit(at + j * (params.u + 1), from_input) - top);
    }
    return top + logf(sum);
}

// COLUMN > 0: a constant table with K ≤ COLUMN, a state per lane, its column in registers.
template <int COLUMN>
__device__ void walk_lanes(const Given& x, const Group& g, bool here, float* carry, uint32_t* ends, uint32_t* pointers) {
    const HmmViterbiParams& params = x.params;
    const uint32_t k = params.k, b = g.b, lane = g.lane, lanes = params.lanes, stride = k + 2;
    uint32_t length = 0, failed = NONE, last = 0;
    float hi = 0.0f, lo = 0.0f;
    float column[COLUMN > 0 ? COLUMN : 1];
    if (here) {
        length = x.length_of(b);
        if (params.from_step > 0) {
            const uint32_t slot_in = (params.carry_in * params.b + b) * stride, end_in = 2 * (params.carry_in * params.b + b);
            for (uint32_t j = lane; j < k; j += lanes) {
                g.delta(0, j) = carry[slot_in + j];
            }
            hi = carry[slot_in + k];
            lo = carry[slot_in + k + 1];
            failed = ends[end_in];
            last = ends[end_in + 1];
        }
#pragma unroll
        for (int i = 0; i < COLUMN; i++) {
            column[i] = (uint32_t)i < k ? x.log_trans[b * params.trans_row + i * k + lane] : IMPOSSIBLE;
        }
    }
    const uint32_t stop = min(params.to_step, length);
    g.sync();

    uint32_t parity = 0;
    for (uint32_t t = params.from_step; t < params.to_step; t++) {
        // row normalisers of input-driven transitions
        if (COLUMN == 0 && params.softmax != 0) {
            if (here && t > 0 && t < stop) {
                for (uint32_t i = lane; i < k; i += lanes) {
                    g.sh_norm[g.slot + i] = log_norm(x, b, t, i);
                }
            }
            g.sync();
        }

        // each lane's states
        bool active = here && t < stop && failed == NONE;
        if (active) {
            const bool seen = x.observed(b, t);
            float top = LOWEST;
            uint32_t top_state = 0;
            for (uint32_t j = lane; j < k; j += lanes) {
                const float o = seen ? fminf(x.obs[(b * x.params.t + t) * k + j], MOST) : 0.0f;
                float best = LOWEST;
                uint32_t from_state = 0;
                if (t == 0) {
                    best = x.model[b * params.model_row + j];
                    top = 0.0f;
                } else if (COLUMN > 0) {
#pragma unroll
                    for (int i = 0; i < COLUMN; i++) {
                        if ((uint32_t)i < k) {
                            const float d = g.delta(parity, i), candidate = d + column[i];
                            top_state = d > top ? (uint32_t)i : top_state;
                            top = fmaxf(top, d);
                            from_state = candidate > best ? (uint32_t)i : from_state;
                            best = fmaxf(best, candidate);
                        }
                    }
                } else {
                    const uint32_t at = x.trans_at(b, t) + j, logits = b * params.trans_row + j * (params.u + 1), from_input = (b * x.params.t + t) * params.u;
                    for (uint32_t i = 0; i < k; i++) {
                        const float d = g.delta(parity, i);
                        if (j == lane && d > top) {
                            top = d;
                            top_state = i;
                        }
                        float a;
                        if (params.softmax == 0) {
                            a = x.log_trans[at + i * k];
                        } else {
                            a = x.logit(logits + i * k * (params.u + 1), from_input);
                            a = a <= DEAD ? IMPOSSIBLE : a - g.sh_norm[g.slot + i];
                        }
                        const float candidate = d + a;
                        from_state = candidate > best ? i : from_state;
                        best = fmaxf(best, candidate);
                    }
                }
                if (top <= DEAD) {
                    failed = t - 1;
                    active = false;
                    break;
                }
                g.delta(1 - parity, j) = fmaxf((best - top) + o, IMPOSSIBLE);
                if (k <= PACKED) {
                    g.sh_from[(1 - parity) * PACKED + g.slot + j] = from_state;
                } else {
                    pointers[b * params.pointer_words + (t - params.pointers_from) * k + j] = from_state;
                }
            }
            if (active && t > 0) {
                last = top_state;
                add_to(hi, lo, top);
            }
        }
        g.sync();
        parity ^= active ? 1 : 0;

        // pointers: eight or four to a word
        if (active && k <= PACKED) {
            const uint32_t per_word = k <= 16 ? 8 : 4, bits = 32 / per_word, count = (k + per_word - 1) / per_word;
            for (uint32_t w = lane; w < count; w += lanes) {
                uint32_t word = 0;
                for (uint32_t c = 0; c < per_word && w * per_word + c < k; c++) {
                    word |= g.sh_from[parity * PACKED + g.slot + w * per_word + c] << (bits * c);
                }
                pointers[b * params.pointer_words + (t - params.pointers_from) * count + w] = word;
            }
        }
    }

    if (!here) {
        return;
    }
    if (failed == NONE && params.to_step >= length && params.from_step < length) {
        float top = LOWEST;
        uint32_t top_state = 0;
        for (uint32_t i = 0; i < k; i++) {
            const float d = g.delta(parity, i);
            top_state = d > top ? i : top_state;
            top = fmaxf(top, d);
        }
        if (top <= DEAD) {
            failed = length - 1;
        } else {
            last = top_state;
            add_to(hi, lo, top);
        }
    }
    const uint32_t slot_out = (params.carry_out * params.b + b) * stride, end_out = 2 * (params.carry_out * params.b + b);
    for (uint32_t j = lane; j < k; j += lanes) {
        carry[slot_out + j] = g.delta(parity, j);
    }
    if (lane == 0) {
        carry[slot_out + k] = hi;
        carry[slot_out + k + 1] = lo;
        ends[end_out] = failed;
        ends[end_out + 1] = last;
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_viterbi_lanes(const float* __restrict__ model, const float* __restrict__ obs, const uint32_t* __restrict__ words, const float* __restrict__ log_trans,
                      const float* __restrict__ inputs, float* carry, uint32_t* ends, uint32_t* pointers, HmmViterbiParams params) {
    __shared__ float sh_delta[2 * STATES], sh_norm[STATES];
    __shared__ uint32_t sh_from[2 * PACKED];
    const uint32_t lanes = params.lanes, lane = threadIdx.x % lanes, b = group_index() * (WG / lanes) + threadIdx.x / lanes;
    const bool here = b < params.b && lane < params.k;
    const Given x = {model, obs, words, log_trans, inputs, params};
    const Group g = {sh_delta, sh_norm, sh_from, b, lane, (threadIdx.x / lanes) * min(params.k, lanes), lanes};
    const bool constant = params.softmax == 0 && params.trans_step == 0;
    if (constant && params.k <= 8) {
        walk_lanes<8>(x, g, here, carry, ends, pointers);
    } else if (constant && params.k <= 16) {
        walk_lanes<16>(x, g, here, carry, ends, pointers);
    } else if (constant && params.k <= 32) {
        walk_lanes<32>(x, g, here, carry, ends, pointers);
    } else {
        walk_lanes<0>(x, g, here, carry, ends, pointers);
    }
}

// ---- back through the pointers ------------------------------------------------------------------------------------------

// Words do not depend on the state (K ≤ 8): eight are loaded at once.
template <int PER_WORD, int BITS>
__device__ __forceinline__ uint32_t trace(const uint32_t* __restrict__ pointers, uint32_t* path, uint32_t s, uint32_t t, const HmmViterbiParams& params) {
    uint32_t high = (t - 1 - params.pointers_from) / PER_WORD + 1;
    while (high > 0 && t > params.from_step) {
        uint32_t loaded[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            loaded[i] = i < high ? pointers[high - 1 - i] : 0;
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            if (i < high) {
                const uint32_t first = params.pointers_from + (high - 1 - i) * PER_WORD;
                while (t > first && t > params.from_step) {
                    t--;
                    path[t] = s;
                    s = (loaded[i] >> (8 * (t - first) + BITS * s)) & ((1u << BITS) - 1);
                }
            }
        }
        high -= min(high, 8u);
    }
    return s;
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_viterbi_path(const float* __restrict__ carry, const uint32_t* __restrict__ words, const uint32_t* __restrict__ ends,
                     const uint32_t* __restrict__ pointers, uint32_t* state, uint32_t* path, float* log_prob, uint32_t* failed, HmmViterbiParams params) {
    const uint32_t b = group_index() * WG + threadIdx.x;
    if (b >= params.b) {
        return;
    }
    const uint32_t length = params.words_row == 0 ? params.t : min(words[b * params.words_row], params.t), end_in = 2 * (params.carry_in * params.b + b);
    const uint32_t broken = ends[end_in], stop = min(length, broken);
    if ((params.from_step < length || params.from_step == 0) && length <= params.to_step) {
        const uint32_t sums = (params.carry_in * params.b + b) * (params.k + 2) + params.k;
        failed[b] = broken;
        log_prob[2 * b] = broken == NONE ? carry[sums] : IMPOSSIBLE;
        log_prob[2 * b + 1] = broken == NONE ? carry[sums + 1] : 0.0f;
    }
    if (stop <= params.from_step) {
        return;
    }
    uint32_t s = stop <= params.to_step ? ends[end_in + 1] : state[b];
    uint32_t t = min(stop, params.to_step);
    const uint32_t* own = pointers + b * params.pointer_words;
    uint32_t* own_path = path + b * params.t;
    if (params.k <= 4) {
        s = trace<4, 2>(own, own_path, s, t, params);
    } else if (params.k <= 8) {
        s = trace<1, 4>(own, own_path, s, t, params);
    } else {
        while (t > params.from_step) {
            t--;
            own_path[t] = s;
            const uint32_t step = t - params.pointers_from;
            if (params.k <= 16) {
                s = (own[step * ((params.k + 7) / 8) + s / 8] >> (4 * (s % 8))) & 15;
            } else if (params.k <= PACKED) {
                s = (own[step * ((params.k + 3) / 4) + s / 4] >> (8 * (s % 4))) & 255;
            } else {
                s = own[step * params.k + s];
            }
        }
    }
    state[b] = s;
}
