// LSTM and GRU over whole sequences. Maths, shapes and source: kernels/recurrent.rs.
//   recurrent_pack                  grid ⌈M·(I+H+1)·H / WG⌉   thread = (model, input, unit), its four gates
//   lstm_forward, gru_forward       grid ⌈M·⌈B/4⌉ / ⌊WG/H⌋⌉   block = ⌊WG/H⌋ (model, 4 sequences); thread = unit, four sequences
//   recurrent_gates                 grid M·⌈B·T/32⌉·⌈4H/32⌉    block = 32 × 32 tile of a product, thread = 2 × 4 of it
//   lstm_backward, gru_backward     as forward
//   recurrent_gradients             grid tiles of grad_x, then of the weights' gradients of each slice
//   recurrent_reduce                grid ⌈M·(weights + 2H) / WG⌉ thread = value
//   shared memory 16 KiB: h, or δ, of four sequences; two tiles of a product
//   spill: on tensor cores only: up to 290 bytes a thread from 129 units on, whose sums and states are 96 registers before any weight, and up to
//   60 from 65 units on (with more tiles of weights in registers than four the spills grow as fast as the loads shrink)

struct RecurrentParams {
    uint32_t models;
    uint32_t batch;
    uint32_t rows;
    uint32_t row0;
    uint32_t time;
    uint32_t inputs;
    uint32_t hidden;
    uint32_t from_step;
    uint32_t to_step;
    uint32_t y_stride;
    uint32_t y_offset;
    uint32_t slices;
    uint32_t slice0;
    uint32_t slice_count;
    uint32_t slice_rows;
    uint32_t time_parts;
    uint32_t flags;
};

#define GRU 1u
#define GATES 2u
#define STATES 4u
#define LENGTHS 8u
#define RESETS 16u
#define REVERSE 32u
#define H0 64u
#define C0 128u
#define LEARNED 256u
#define X_SHARED 512u
#define BIAS 1024u
#define GRAD_Y 2048u
#define GRAD_X 4096u
#define GRAD_HN 8192u
#define GRAD_CN 16384u
#define GRAD_W 32768u

// Gates of four sequences that fit shared memory.
#define SHARED 1024u

__device__ __forceinline__ bool has(const RecurrentParams& p, uint32_t bit) {
    return (p.flags & bit) != 0;
}

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-fminf(fmaxf(x, -80.0f), 80.0f)));
}

// NaN stays: fminf and fmaxf would drop it.
__device__ __forceinline__ float gate_sigmoid(float x) {
    return x == x ? sigmoid(x) : x;
}

__device__ __forceinline__ uint32_t kept_h(const RecurrentParams& p) {
    return has(p, GATES) ? 4 * p.hidden : 0;
}

__device__ __forceinline__ uint32_t width(const RecurrentParams& p) {
    return kept_h(p) + (has(p, GRU) ? 1 : 2) * p.hidden;
}

__device__ __forceinline__ uint32_t gate_rows(const RecurrentParams& p) {
    return (has(p, GRU) ? 3 : 4) * p.hidden;
}

// ---- which sequences --------------------------------------------------------------------------------------------

// The time index of processing step s.
__device__ __forceinline__ uint32_t step_of(const RecurrentParams& p, uint32_t s, uint32_t length) {
    return has(p, REVERSE) && s < length ? length - 1 - s : s;
}

// Whether the state goes back to its start before processing step s.
__device__ __forceinline__ bool resets_at(const RecurrentParams& p, const uint32_t* __restrict__ resets, uint32_t s, uint32_t b, uint32_t length) {
    return has(p, RESETS) && s < length && resets[b * p.time + step_of(p, s, length)] != 0;
}

// ---- forward ----------------------------------------------------------------------------------------------------

// h (which = 0) or c (1) that a sequence starts from.
__device__ __forceinline__ float start_of(const RecurrentParams& p, const float* state, uint32_t which, uint32_t model, uint32_t b, uint32_t j) {
    if (!has(p, which == 0 ? H0 : C0)) {
        return 0.0f;
    }
    const uint32_t of = has(p, LEARNED) ? model : model * p.batch + b;
    return state[(which * p.models * p.batch + of) * p.hidden + j];
}

#ifdef OCTETS
// ---- forward on tensor cores --------------------------------------------------------------------------------------
//
// A tile is 16 sequences of one model; its warps own octets, 8 units with their 32 gates: four products 16 × 8. Lane (g, t) = (lane / 4,
// lane % 4) has sequences g and g + 8 and units 2t and 2t + 1 of the octet: product 2p + 0 gives it gates 0 and 1 of unit 2t + p, product
// 2p + 1 gates 2 and 3, so that a cell needs no other lane. The depth is x(t), then h(t−1), each padded to 16. h counts as a value rounded
// to 16 bits and its rest (half.cuh), so that only the last bits of a sum differ from the columns that multiply in f32.
// Shared memory: two buffers of rows [x, h, rest of h] in pairs; a step reads one and writes the other, so that it needs one barrier. Rows
// are 4 words longer than a multiple of 8: the fragments of a warp lie in different banks.

#define WARPS (WG / 32)
// Words of x that a thread loads a step ahead; further ones are loaded where they are stored.
#define AHEAD 4

struct Fragments {
    uint32_t x_tiles, h_tiles, octets, warps, row_words, slots;
};

__device__ __forceinline__ Fragments fragments_of(const RecurrentParams& p) {
    Fragments f;
    f.x_tiles = (p.inputs + 15) / 16;
    f.h_tiles = (p.hidden + 15) / 16;
    f.octets = (p.hidden + 7) / 8;
    f.warps = min(f.octets, (uint32_t)WARPS);
    f.row_words = 8 * f.x_tiles + 16 * f.h_tiles + 4;
    f.slots = max(min(WARPS / f.warps, (uint32_t)WORDS / (32 * f.row_words)), 1u);
    return f;
}

// Weight of gate q of unit j for input k of [x, padding, h, padding].
__device__ __forceinline__ uint32_t weight_bits(const RecurrentParams& p, const Stored* __restrict__ w_ih, const Stored* __restrict__ w_hh, uint32_t model,
                                                uint32_t k, uint32_t q, uint32_t j) {
    const uint32_t h = p.hidden, n = p.inputs, padded = (n + 15) / 16 * 16, rows = gate_rows(p);
    const bool gru = has(p, GRU);
    if (j >= h) {
        return 0;
    }
    if (k < padded) {
        return k < n && !(gru && q == 3) ? w_ih[((size_t)model * rows + q * h + j) * n + k].bits : 0;
    }
    const uint32_t c = k - padded, row = gru && q == 3 ? 2 : q;
    return c < h && !(gru && q == 2) ? w_hh[((size_t)model * rows + row * h + j) * h + c].bits : 0;
}

// Of each model: fragments [tile of depth][octet][p][lane] of products 2p and 2p + 1 of the octet, then the four biases of each unit.
extern "C" __global__ void __launch_bounds__(WG)
    recurrent_pack_mma(const Stored* __restrict__ w_ih, const Stored* __restrict__ w_hh, const Stored* __restrict__ b_ih,
                       const Stored* __restrict__ b_hh, float* __restrict__ packed, RecurrentParams params) {
    const Fragments f = fragments_of(params);
    const uint32_t h = params.hidden, weights = (f.x_tiles + f.h_tiles) * f.octets * 64, each = weights + 8 * f.octets;
    const uint32_t at = group_index() * WG + threadIdx.x, model = at / each, i = at % each;
    if (model >= params.models) {
        return;
    }
    if (i < weights) {
        const uint32_t g = i % 32 / 4, t = i % 4, k = 16 * (i / (64 * f.octets)) + 2 * t, j = 8 * (i / 64 % f.octets) + 2 * (g / 2) + i / 32 % 2;
        uint32_t words[4];
#pragma unroll
        for (uint32_t w = 0; w < 4; w++) {
            const uint32_t gate = 2 * (w / 2) + g % 2, from = k + 8 * (w % 2);
            words[w] = weight_bits(params, w_ih, w_hh, model, from, gate, j) | weight_bits(params, w_ih, w_hh, model, from + 1, gate, j) << 16;
        }
        reinterpret_cast<uint4*>(packed)[at] = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
    const uint32_t j = i - weights, row = model * gate_rows(params) + j;
    float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (has(params, BIAS) && j < h) {
        const bool gru = has(params, GRU);
        bias = make_float4(b_ih[row], b_ih[row + h], b_ih[row + 2 * h], gru ? b_hh[row + 2 * h] : b_ih[row + 3 * h]);
        if (gru) {
            bias.x += b_hh[row];
            bias.y += b_hh[row + h];
        }
    }
    reinterpret_cast<float4*>(packed)[at] = bias;
}

// One sequence of a tile; the last again where there are no more.
struct Sequence {
    uint32_t q, b, length;
    bool there;
};

__device__ __forceinline__ Sequence sequence_of(const RecurrentParams& p, const uint32_t* __restrict__ lengths, uint32_t model, uint32_t at) {
    const uint32_t own = p.rows / p.models, inside = min(at, own - 1);
    Sequence one;
    one.there = at < own;
    one.q = model * own + inside;
    one.b = p.row0 + inside;
    one.length = has(p, LENGTHS) ? min(lengths[one.b], p.time) : p.time;
    return one;
}

// Values 2w and 2w + 1 of n, zero past them.
__device__ __forceinline__ uint32_t word_of(const Stored* __restrict__ row, uint32_t w, uint32_t n, bool whole) {
    if (whole && 2 * w < n) {
        return reinterpret_cast<const uint32_t*>(row)[w];
    }
    return (2 * w < n ? row[2 * w].bits : 0u) | (2 * w + 1 < n ? (uint32_t)row[2 * w + 1].bits : 0u) << 16;
}

// Writes the two values of units j and j + 1, of which `count` are there.
__device__ __forceinline__ void put_two(Stored* __restrict__ to, float a, float b, uint32_t count, bool whole) {
    if (whole && count > 1) {
        *reinterpret_cast<uint32_t*>(to) = pair_of(a, b);
        return;
    }
    if (count > 0) {
        to[0] = a;
    }
    if (count > 1) {
        to[1] = b;
    }
}

__device__ __forceinline__ void put_two(float* __restrict__ to, float a, float b, uint32_t count, bool whole) {
    if (whole && count > 1) {
        *reinterpret_cast<float2*>(to) = make_float2(a, b);
        return;
    }
    if (count > 0) {
        to[0] = a;
    }
    if (count > 1) {
        to[1] = b;
    }
}

// Fragment of rows g and g + 8 of 16 inputs.
__device__ __forceinline__ void input_fragment(uint32_t (&a)[4], const uint32_t* top, const uint32_t* low, uint32_t t) {
    a[0] = top[t];
    a[1] = low[t];
    a[2] = top[t + 4];
    a[3] = low[t + 4];
}

// Adds one tile of depth to the four products of an octet.
__device__ __forceinline__ void add_octet(float (&sums)[4][4], const uint32_t (&a)[4], uint4 even, uint4 odd) {
    const uint32_t b[4][2] = {{even.x, even.y}, {even.z, even.w}, {odd.x, odd.y}, {odd.z, odd.w}};
#pragma unroll
    for (uint32_t n = 0; n < 4; n++) {
        mma_sync(Stored(), sums[n], a, b[n]);
    }
}

// Adds tile k of depth to the octets of a warp; `weights_of` gives the fragments of octet number i of the warp.
template <class Weights>
__device__ __forceinline__ void add_depth(float (&sums)[OCTETS][4][4], const Fragments& f, const uint32_t* top, const uint32_t* low, uint32_t k,
                                          uint32_t first, uint32_t t, Weights weights_of) {
    uint32_t a[4], rest[4];
    input_fragment(a, top + 8 * k, low + 8 * k, t);
    const bool hidden = k >= f.x_tiles;
    if (hidden) {
        input_fragment(rest, top + 8 * (k + f.h_tiles), low + 8 * (k + f.h_tiles), t);
    }
#pragma unroll
    for (uint32_t i = 0; i < OCTETS; i++) {
        const uint32_t octet = first + i * WARPS;
        if (octet < f.octets) {
            const uint4 even = weights_of(i, octet, 0u), odd = weights_of(i, octet, 1u);
            add_octet(sums[i], a, even, odd);
            if (hidden) {
                add_octet(sums[i], rest, even, odd);
            }
        }
    }
}

template <bool IS_GRU>
__device__ __forceinline__ void forward_octets(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                                               const uint32_t* __restrict__ resets, float* state, Stored* __restrict__ y,
                                               float* __restrict__ saved, const RecurrentParams& params) {
    __shared__ uint32_t sh_words[WORDS];
    const Fragments f = fragments_of(params);
    const uint32_t h = params.hidden, n = params.inputs, all = params.models * params.batch;
    const uint32_t tiles = (params.rows / params.models + 15) / 16, depth = f.x_tiles + f.h_tiles;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t slot = warp / f.warps, first = warp % f.warps, item = group_index() * f.slots + slot;
    const bool live = slot < f.slots && item < params.models * tiles;
    const uint32_t model = live ? item / tiles : 0, row0 = live ? 16 * (item % tiles) : 0;
    uint32_t* sh_tile = sh_words + (live ? slot : 0) * 32 * f.row_words;
    const Sequence rows[2] = {sequence_of(params, lengths, model, row0 + g), sequence_of(params, lengths, model, row0 + g + 8)};
    const uint4* weights = reinterpret_cast<const uint4*>(packed) + (size_t)model * (depth * 64 + 8) * f.octets;
    const float4* biases = reinterpret_cast<const float4*>(weights) + depth * f.octets * 64;

    // x: a row has 2 · warps threads, each every so many words of it
    const uint32_t x_lane = 32 * first + lane, x_threads = 2 * f.warps, x_row = x_lane / x_threads, x_first = x_lane % x_threads, x_words = 8 * f.x_tiles;
    const Sequence x_sequence = sequence_of(params, lengths, model, row0 + x_row);
    const Stored* x_at = x + (size_t)(has(params, X_SHARED) ? x_sequence.b : x_sequence.q) * params.time * n;
    const bool whole_x = n % 2 == 0 && ((uint64_t)x & 3) == 0;
    const bool whole_y = (params.y_stride | params.y_offset) % 2 == 0 && ((uint64_t)y & 3) == 0;
    const bool whole_saved = h % 2 == 0 && ((uint64_t)saved & 7) == 0;

    uint4 kept_weights[OCTETS][DEPTH][2];
    float state_h[OCTETS][2][2], state_c[OCTETS][2][2];
    if (live) {
        // h is padded with zeros in both buffers
        for (uint32_t w = x_lane; w < 32 * (f.row_words - x_words); w += 32 * f.warps) {
            const uint32_t per = f.row_words - x_words;
            sh_tile[w / per * f.row_words + x_words + w % per] = 0;
        }
        const Stored* x_now = x_at + (size_t)step_of(params, params.from_step, x_sequence.length) * n;
        for (uint32_t w = x_first; w < x_words; w += x_threads) {
            sh_tile[x_row * f.row_words + w] = params.from_step < params.to_step ? word_of(x_now, w, n, whole_x) : 0;
        }
    }
    __syncthreads();  // the padding is written
#pragma unroll
    for (uint32_t i = 0; i < OCTETS; i++) {
        const uint32_t octet = first + i * WARPS;
        const bool mine = live && octet < f.octets;
#pragma unroll
        for (uint32_t p = 0; p < 2; p++) {
            const uint32_t j = 8 * octet + 2 * t + p;
#pragma unroll
            for (uint32_t k = 0; k < DEPTH; k++) {
                kept_weights[i][k][p] = mine && k < depth ? weights[((k * f.octets + octet) * 2 + p) * 32 + lane] : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (uint32_t r = 0; r < 2; r++) {
                state_h[i][p][r] = 0.0f;
                state_c[i][p][r] = 0.0f;
                if (mine && j < h) {
                    const uint32_t at = (2 * all + model * params.batch + rows[r].b) * h + j;
                    const bool fresh = params.from_step == 0 || resets_at(params, resets, params.from_step, rows[r].b, rows[r].length);
                    state_h[i][p][r] = fresh ? start_of(params, state, 0, model, rows[r].b, j) : state[at];
                    state_c[i][p][r] = fresh ? start_of(params, state, 1, model, rows[r].b, j) : state[at + all * h];
                }
            }
        }
        if (mine) {
#pragma unroll
            for (uint32_t r = 0; r < 2; r++) {
                const float a = rounded_inside(state_h[i][0][r]), b = rounded_inside(state_h[i][1][r]);
                uint32_t* to = sh_tile + (g + 8 * r) * f.row_words + x_words + 4 * octet + t;
                to[0] = pair_of(a, b);
                to[8 * f.h_tiles] = pair_of(rest_of(state_h[i][0][r], a), rest_of(state_h[i][1][r], b));
            }
        }
    }
    __syncthreads();  // x and h of the first step are written

    uint32_t buffer = 0;
    for (uint32_t s = params.from_step; s < params.to_step; s++) {
        const bool more = s + 1 < params.to_step;
        const uint32_t* now = sh_tile + buffer * 16 * f.row_words;
        uint32_t* next = sh_tile + (buffer ^ 1) * 16 * f.row_words;
        const Stored* x_next = x_at + (size_t)step_of(params, more ? s + 1 : s, x_sequence.length) * n;
        uint32_t ahead[AHEAD];
#pragma unroll
        for (uint32_t e = 0; e < AHEAD; e++) {
            const uint32_t w = x_first + e * x_threads;
            ahead[e] = live && more && w < x_words ? word_of(x_next, w, n, whole_x) : 0;
        }
        if (live) {
            bool fresh[2];
#pragma unroll
            for (uint32_t r = 0; r < 2; r++) {
                fresh[r] = more && resets_at(params, resets, s + 1, rows[r].b, rows[r].length);
            }
            float sums[OCTETS][4][4];
#pragma unroll
            for (uint32_t i = 0; i < OCTETS; i++) {
                const uint32_t octet = min(first + i * WARPS, f.octets - 1);
#pragma unroll
                for (uint32_t p = 0; p < 2; p++) {
                    const float4 b = biases[8 * octet + 2 * t + p];
                    sums[i][2 * p][0] = b.x, sums[i][2 * p][1] = b.y, sums[i][2 * p][2] = b.x, sums[i][2 * p][3] = b.y;
                    sums[i][2 * p + 1][0] = b.z, sums[i][2 * p + 1][1] = b.w, sums[i][2 * p + 1][2] = b.z, sums[i][2 * p + 1][3] = b.w;
                }
            }
            const uint32_t *top = now + g * f.row_words, *low = top + 8 * f.row_words;
#pragma unroll
            for (uint32_t k = 0; k < DEPTH; k++) {
                if (k < depth) {
                    add_depth(sums, f, top, low, k, first, t, [&](uint32_t i, uint32_t, uint32_t p) { return kept_weights[i][k][p]; });
                }
            }
#pragma unroll 1
            for (uint32_t k = DEPTH; k < depth; k++) {
                add_depth(sums, f, top, low, k, first, t, [&](uint32_t, uint32_t octet, uint32_t p) { return weights[((k * f.octets + octet) * 2 + p) * 32 + lane]; });
            }
#pragma unroll
            for (uint32_t i = 0; i < OCTETS; i++) {
                const uint32_t octet = first + i * WARPS, j = 8 * octet + 2 * t;
                if (octet < f.octets) {
                    const uint32_t count = j < h ? min(h - j, 2u) : 0;
#pragma unroll
                    for (uint32_t r = 0; r < 2; r++) {
                        const bool valid = s < rows[r].length;
                        float gate[4][2], h_last[2], c_last[2], h_next[2];
#pragma unroll
                        for (uint32_t p = 0; p < 2; p++) {
                            h_last[p] = state_h[i][p][r];
                            c_last[p] = state_c[i][p][r];
                            float c_next = c_last[p];
                            gate[0][p] = gate_sigmoid(sums[i][2 * p][2 * r]);
                            gate[1][p] = gate_sigmoid(sums[i][2 * p][2 * r + 1]);
                            const float a2 = sums[i][2 * p + 1][2 * r], a3 = sums[i][2 * p + 1][2 * r + 1];
                            if (IS_GRU) {
                                gate[2][p] = tanhf(a2 + gate[0][p] * a3);
                                gate[3][p] = a3;
                                h_next[p] = (1.0f - gate[1][p]) * gate[2][p] + gate[1][p] * h_last[p];
                            } else {
                                gate[2][p] = tanhf(a2);
                                gate[3][p] = gate_sigmoid(a3);
                                c_next = gate[1][p] * c_last[p] + gate[0][p] * gate[2][p];
                                h_next[p] = gate[3][p] * tanhf(c_next);
                            }
                            if (valid) {
                                state_h[i][p][r] = h_next[p];
                                state_c[i][p][r] = c_next;
                            }
                        }
                        if (rows[r].there) {
                            const size_t at = (size_t)rows[r].q * params.time + step_of(params, s, rows[r].length);
                            put_two(y + at * params.y_stride + params.y_offset + j, valid ? h_next[0] : 0.0f, valid ? h_next[1] : 0.0f, count, whole_y);
                            if (has(params, STATES) && valid) {
                                float* kept = saved + at * width(params) + j;
                                if (has(params, GATES)) {
#pragma unroll
                                    for (uint32_t q = 0; q < 4; q++) {
                                        put_two(kept + q * h, gate[q][0], gate[q][1], count, whole_saved);
                                    }
                                }
                                kept += kept_h(params);
                                put_two(kept, h_last[0], h_last[1], count, whole_saved);
                                if (!IS_GRU) {
                                    put_two(kept + h, c_last[0], c_last[1], count, whole_saved);
                                }
                            }
                        }
                        if (fresh[r]) {
#pragma unroll
                            for (uint32_t p = 0; p < 2; p++) {
                                state_h[i][p][r] = p < count ? start_of(params, state, 0, model, rows[r].b, j + p) : 0.0f;
                                state_c[i][p][r] = p < count ? start_of(params, state, 1, model, rows[r].b, j + p) : 0.0f;
                            }
                        }
                        const float a = rounded_inside(state_h[i][0][r]), b = rounded_inside(state_h[i][1][r]);
                        uint32_t* to = next + (g + 8 * r) * f.row_words + x_words + 4 * octet + t;
                        to[0] = pair_of(a, b);
                        to[8 * f.h_tiles] = pair_of(rest_of(state_h[i][0][r], a), rest_of(state_h[i][1][r], b));
                    }
                }
            }
            uint32_t* x_to = next + x_row * f.row_words;
#pragma unroll
            for (uint32_t e = 0; e < AHEAD; e++) {
                const uint32_t w = x_first + e * x_threads;
                if (w < x_words) {
                    x_to[w] = ahead[e];
                }
            }
            for (uint32_t w = x_first + AHEAD * x_threads; more && w < x_words; w += x_threads) {
                x_to[w] = word_of(x_next, w, n, whole_x);
            }
        }
        buffer ^= 1;
        __syncthreads();  // x and h of the next step are written
    }
#pragma unroll
    for (uint32_t i = 0; i < OCTETS; i++) {
#pragma unroll
        for (uint32_t p = 0; p < 2; p++) {
            const uint32_t j = 8 * (first + i * WARPS) + 2 * t + p;
#pragma unroll
            for (uint32_t r = 0; r < 2; r++) {
                if (live && j < h && rows[r].there) {
                    const uint32_t at = (2 * all + model * params.batch + rows[r].b) * h + j;
                    state[at] = state_h[i][p][r];
                    state[at + all * h] = state_c[i][p][r];
                }
            }
        }
    }
}

#if OCTETS == 1
extern "C" __global__ void __launch_bounds__(WG)
    lstm_forward_mma(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                     const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                     RecurrentParams params) {
    forward_octets<false>(x, packed, lengths, resets, state, y, saved, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    gru_forward_mma(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                    const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                    RecurrentParams params) {
    forward_octets<true>(x, packed, lengths, resets, state, y, saved, params);
}
#elif OCTETS == 2
extern "C" __global__ void __launch_bounds__(WG)
    lstm_forward_mma_wide(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                          const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                          RecurrentParams params) {
    forward_octets<false>(x, packed, lengths, resets, state, y, saved, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    gru_forward_mma_wide(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                         const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                         RecurrentParams params) {
    forward_octets<true>(x, packed, lengths, resets, state, y, saved, params);
}
#elif OCTETS == 4
extern "C" __global__ void __launch_bounds__(WG)
    lstm_forward_mma_large(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                           const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                           RecurrentParams params) {
    forward_octets<false>(x, packed, lengths, resets, state, y, saved, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    gru_forward_mma_large(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                          const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                          RecurrentParams params) {
    forward_octets<true>(x, packed, lengths, resets, state, y, saved, params);
}
#endif
#else
// ---- packing ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    recurrent_pack(const Stored* __restrict__ w_ih, const Stored* __restrict__ w_hh, const Stored* __restrict__ b_ih,
                   const Stored* __restrict__ b_hh, float* __restrict__ packed, RecurrentParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    const uint32_t h = params.hidden, n = params.inputs, inner = n + h + 1;
    const bool gru = has(params, GRU);
    if (at >= params.models * inner * h) {
        return;
    }
    const uint32_t j = at % h, k = at / h % inner, row = at / (h * inner) * gate_rows(params) + j;
    float4 w = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (k < n) {
        w = make_float4(w_ih[row * n + k], w_ih[(row + h) * n + k], w_ih[(row + 2 * h) * n + k], gru ? 0.0f : w_ih[(row + 3 * h) * n + k]);
    } else if (k < n + h) {
        const uint32_t c = k - n;
        const float third = w_hh[(row + 2 * h) * h + c];
        w = make_float4(w_hh[row * h + c], w_hh[(row + h) * h + c], gru ? 0.0f : third, gru ? third : w_hh[(row + 3 * h) * h + c]);
    } else if (has(params, BIAS)) {
        w = make_float4(b_ih[row], b_ih[row + h], b_ih[row + 2 * h], gru ? b_hh[row + 2 * h] : b_ih[row + 3 * h]);
        if (gru) {
            w.x += b_hh[row];
            w.y += b_hh[row + h];
        }
    }
    reinterpret_cast<float4*>(packed)[at] = w;
}

// ---- forward, four sequences a thread ------------------------------------------------------------------------------

// The four sequences of a thread.
struct Tile {
    uint32_t slot, lane, width, model;
    bool live;
    uint32_t q[4], b[4], length[4];
    bool there[4];
};

__device__ __forceinline__ Tile tile_of(const RecurrentParams& p, const uint32_t* __restrict__ lengths) {
    const uint32_t own = p.rows / p.models, tiles = (own + 3) / 4, per = max(WG / p.hidden, 1u);
    Tile tile;
    tile.width = min(p.hidden, (uint32_t)WG);
    tile.slot = threadIdx.x / tile.width;
    tile.lane = threadIdx.x % tile.width;
    const uint32_t item = group_index() * per + tile.slot;
    tile.live = tile.slot < per && item < p.models * tiles;
    tile.model = tile.live ? item / tiles : 0;
    const uint32_t first = tile.live ? 4 * (item % tiles) : 0;
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        tile.there[r] = first + r < own;
        const uint32_t inside = min(first + r, own - 1);
        tile.q[r] = tile.model * own + inside;
        tile.b[r] = p.row0 + inside;
        tile.length[r] = has(p, LENGTHS) ? min(lengths[tile.b[r]], p.time) : p.time;
    }
    return tile;
}

__device__ __forceinline__ void add_input(float (&a)[4][4], float4 w, float4 v) {
    const float ws[4] = {w.x, w.y, w.z, w.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int g = 0; g < 4; g++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            a[g][r] += ws[g] * vs[r];
        }
    }
}

// UNITS: units of a thread, WG apart; where they are many their states lie in local memory.
template <bool IS_GRU, uint32_t UNITS>
__device__ __forceinline__ void forward_steps(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                                              const uint32_t* __restrict__ resets, float* state, Stored* __restrict__ y,
                                              float* __restrict__ saved, float4* sh_rows, const RecurrentParams& params) {
    const uint32_t h = params.hidden, n = params.inputs;
    const Tile tile = tile_of(params, lengths);
    const uint32_t all = params.models * params.batch;
    const float4* weights = reinterpret_cast<const float4*>(packed) + (size_t)tile.model * (n + h + 1) * h;
    float4* rows = sh_rows + tile.slot * h;
    float state_h[UNITS][4], state_c[UNITS][4];

    // states at the start of the launch
#pragma unroll 1
    for (uint32_t u = 0; u < UNITS; u++) {
        const uint32_t j = tile.lane + u * WG;
        if (tile.live && j < h) {
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                const uint32_t at = (2 * all + tile.model * params.batch + tile.b[r]) * h + j;
                const bool fresh = params.from_step == 0 || resets_at(params, resets, params.from_step, tile.b[r], tile.length[r]);
                state_h[u][r] = fresh ? start_of(params, state, 0, tile.model, tile.b[r], j) : state[at];
                state_c[u][r] = fresh ? start_of(params, state, 1, tile.model, tile.b[r], j) : state[at + all * h];
            }
            rows[j] = make_float4(state_h[u][0], state_h[u][1], state_h[u][2], state_h[u][3]);
        }
    }
    for (uint32_t s = params.from_step; s < params.to_step; s++) {
        const Stored* x_at[4];
        uint32_t slot[4];
#pragma unroll
        for (uint32_t r = 0; r < 4; r++) {
            const uint32_t step = step_of(params, s, tile.length[r]);
            x_at[r] = x + ((size_t)(has(params, X_SHARED) ? tile.b[r] : tile.q[r]) * params.time + step) * n;
            slot[r] = tile.q[r] * params.time + step;
        }
        __syncthreads();  // h of this step is written
#pragma unroll 1
        for (uint32_t u = 0; u < UNITS; u++) {
            const uint32_t j = tile.lane + u * WG;
            if (tile.live && j < h) {
                float a[4][4] = {};
                add_input(a, weights[(n + h) * h + j], make_float4(1.0f, 1.0f, 1.0f, 1.0f));
#pragma unroll 4
                for (uint32_t k = 0; k < n; k++) {
                    add_input(a, weights[k * h + j], make_float4(x_at[0][k], x_at[1][k], x_at[2][k], x_at[3][k]));
                }
#pragma unroll 8
                for (uint32_t k = 0; k < h; k++) {
                    add_input(a, weights[(n + k) * h + j], rows[k]);
                }
#pragma unroll
                for (uint32_t r = 0; r < 4; r++) {
                    const bool valid = s < tile.length[r];
                    const float h_last = state_h[u][r], c_last = state_c[u][r];
                    float h_next, c_next = c_last, g0, g1, g2, g3;
                    if (IS_GRU) {
                        g0 = gate_sigmoid(a[0][r]), g1 = gate_sigmoid(a[1][r]), g3 = a[3][r];
                        g2 = tanhf(a[2][r] + g0 * g3);
                        h_next = (1.0f - g1) * g2 + g1 * h_last;
                    } else {
                        g0 = gate_sigmoid(a[0][r]), g1 = gate_sigmoid(a[1][r]), g2 = tanhf(a[2][r]), g3 = gate_sigmoid(a[3][r]);
                        c_next = g1 * c_last + g0 * g2;
                        h_next = g3 * tanhf(c_next);
                    }
                    if (tile.there[r]) {
                        y[(size_t)slot[r] * params.y_stride + params.y_offset + j] = valid ? h_next : 0.0f;
                        if (has(params, STATES) && valid) {
                            float* kept = saved + (size_t)slot[r] * width(params) + j;
                            if (has(params, GATES)) {
                                kept[0] = g0, kept[h] = g1, kept[2 * h] = g2, kept[3 * h] = g3;
                            }
                            kept[kept_h(params)] = h_last;
                            if (!IS_GRU) {
                                kept[kept_h(params) + h] = c_last;
                            }
                        }
                    }
                    if (valid) {
                        state_h[u][r] = h_next;
                        state_c[u][r] = c_next;
                    }
                }
            }
        }
        __syncthreads();  // h of this step is read
#pragma unroll 1
        for (uint32_t u = 0; u < UNITS; u++) {
            const uint32_t j = tile.lane + u * WG;
            if (tile.live && j < h) {
#pragma unroll
                for (uint32_t r = 0; r < 4; r++) {
                    if (s + 1 < params.to_step && resets_at(params, resets, s + 1, tile.b[r], tile.length[r])) {
                        state_h[u][r] = start_of(params, state, 0, tile.model, tile.b[r], j);
                        state_c[u][r] = start_of(params, state, 1, tile.model, tile.b[r], j);
                    }
                }
                rows[j] = make_float4(state_h[u][0], state_h[u][1], state_h[u][2], state_h[u][3]);
            }
        }
    }
#pragma unroll 1
    for (uint32_t u = 0; u < UNITS; u++) {
        const uint32_t j = tile.lane + u * WG;
        if (tile.live && j < h) {
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                if (tile.there[r]) {
                    const uint32_t at = (2 * all + tile.model * params.batch + tile.b[r]) * h + j;
                    state[at] = state_h[u][r];
                    state[at + all * h] = state_c[u][r];
                }
            }
        }
    }
}

template <bool IS_GRU>
__device__ __forceinline__ void forward(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                                        const uint32_t* __restrict__ resets, float* state, Stored* __restrict__ y,
                                        float* __restrict__ saved, const RecurrentParams& params) {
    __shared__ float4 sh_rows[SHARED];
    if (params.hidden <= WG) {
        forward_steps<IS_GRU, 1>(x, packed, lengths, resets, state, y, saved, sh_rows, params);
    } else {
        forward_steps<IS_GRU, 8>(x, packed, lengths, resets, state, y, saved, sh_rows, params);
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    lstm_forward(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                 const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                 RecurrentParams params) {
    forward<false>(x, packed, lengths, resets, state, y, saved, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    gru_forward(const Stored* __restrict__ x, const float* __restrict__ packed, const uint32_t* __restrict__ lengths,
                const uint32_t* __restrict__ resets, float* __restrict__ state, Stored* __restrict__ y, float* __restrict__ saved,
                RecurrentParams params) {
    forward<true>(x, packed, lengths, resets, state, y, saved, params);
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <bool IS_GRU, uint32_t UNITS>
__device__ __forceinline__ void backward_steps(const float* __restrict__ saved, const Stored* __restrict__ w_hh, const uint32_t* __restrict__ lengths,
                                               const uint32_t* __restrict__ resets, const Stored* __restrict__ grad_y, float* gates,
                                               float* sums, float4* sh_rows, const RecurrentParams& params) {
    const uint32_t h = params.hidden;
    const Tile tile = tile_of(params, lengths);
    const uint32_t all = params.models * params.batch * h;
    const uint32_t count = IS_GRU ? 3 : 4;
    const Stored* weights = w_hh + (size_t)tile.model * gate_rows(params) * h;
    const bool fits = max(WG / h, 1u) * count * h <= SHARED;
    float4* deltas = sh_rows + tile.slot * count * h;
    float grad_h[UNITS][4], grad_c[UNITS][4], start_h[UNITS][4], start_c[UNITS][4];

    const bool first = params.to_step == params.time;
#pragma unroll 1
    for (uint32_t u = 0; u < UNITS; u++) {
        const uint32_t j = tile.lane + u * WG;
        if (tile.live && j < h) {
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                const uint32_t at = (tile.model * params.batch + tile.b[r]) * h + j;
                grad_h[u][r] = !first || has(params, GRAD_HN) ? sums[at] : 0.0f;
                grad_c[u][r] = !first || has(params, GRAD_CN) ? sums[all + at] : 0.0f;
                start_h[u][r] = first ? 0.0f : sums[2 * all + at];
                start_c[u][r] = first ? 0.0f : sums[3 * all + at];
            }
        }
    }
    for (uint32_t s = params.to_step; s-- > params.from_step;) {
        uint32_t slot[4];
#pragma unroll
        for (uint32_t r = 0; r < 4; r++) {
            slot[r] = tile.q[r] * params.time + step_of(params, s, tile.length[r]);
        }
#pragma unroll 1
        for (uint32_t u = 0; u < UNITS; u++) {
            const uint32_t j = tile.lane + u * WG;
            if (tile.live && j < h) {
                float delta[4][4];
#pragma unroll
                for (uint32_t r = 0; r < 4; r++) {
                    const bool valid = s < tile.length[r];
                    const float* kept = saved + (size_t)slot[r] * width(params) + j;
                    float* own = gates + (size_t)slot[r] * 4 * h + j;
                    float g[4], d[4] = {};
                    if (valid) {
#pragma unroll
                        for (uint32_t i = 0; i < 4; i++) {
                            g[i] = has(params, GATES) ? kept[i * h] : own[i * h];
                        }
                        if (!has(params, GATES)) {
                            g[0] = gate_sigmoid(g[0]), g[1] = gate_sigmoid(g[1]);
                            g[2] = tanhf(IS_GRU ? g[2] + g[0] * g[3] : g[2]);
                            g[3] = IS_GRU ? g[3] : gate_sigmoid(g[3]);
                        }
                        float up = grad_h[u][r];
                        if (has(params, GRAD_Y)) {
                            up += grad_y[(size_t)slot[r] * params.y_stride + params.y_offset + j];
                        }
                        if (IS_GRU) {
                            const float last = kept[kept_h(params)];
                            const float dn = up * (1.0f - g[1]) * (1.0f - g[2] * g[2]);
                            d[0] = dn * g[3] * g[0] * (1.0f - g[0]);
                            d[1] = up * (last - g[2]) * g[1] * (1.0f - g[1]);
                            d[2] = dn;
                            d[3] = dn * g[0];
                            grad_h[u][r] = up * g[1];
                        } else {
                            const float last = kept[kept_h(params) + h];
                            const float t = tanhf(g[1] * last + g[0] * g[2]);
                            const float e = grad_c[u][r] + up * g[3] * (1.0f - t * t);
                            d[0] = e * g[2] * g[0] * (1.0f - g[0]);
                            d[1] = e * last * g[1] * (1.0f - g[1]);
                            d[2] = e * g[0] * (1.0f - g[2] * g[2]);
                            d[3] = up * t * g[3] * (1.0f - g[3]);
                            grad_c[u][r] = e * g[1];
                            grad_h[u][r] = 0.0f;
                        }
                    }
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++) {
                        delta[i][r] = d[i];
                        if (tile.there[r]) {
                            own[i * h] = d[i];
                        }
                    }
                }
                if (fits) {
#pragma unroll
                    for (uint32_t i = 0; i < count; i++) {
                        const uint32_t g = IS_GRU && i == 2 ? 3 : i;
                        deltas[i * h + j] = make_float4(delta[g][0], delta[g][1], delta[g][2], delta[g][3]);
                    }
                }
            }
        }
        __syncthreads();  // δ of this step is written
#pragma unroll 1
        for (uint32_t u = 0; u < UNITS; u++) {
            const uint32_t k = tile.lane + u * WG;
            if (tile.live && k < h) {
                float sum[4] = {};
                if (fits) {
#pragma unroll 8
                    for (uint32_t c = 0; c < count * h; c++) {
                        const float w = weights[c * h + k];
                        const float4 d = deltas[c];
                        sum[0] += w * d.x, sum[1] += w * d.y, sum[2] += w * d.z, sum[3] += w * d.w;
                    }
                } else {
#pragma unroll 4
                    for (uint32_t c = 0; c < count * h; c++) {
                        const float w = weights[c * h + k];
                        const uint32_t at = IS_GRU && c >= 2 * h ? c + h : c;
#pragma unroll
                        for (uint32_t r = 0; r < 4; r++) {
                            sum[r] += w * gates[(size_t)slot[r] * 4 * h + at];
                        }
                    }
                }
#pragma unroll
                for (uint32_t r = 0; r < 4; r++) {
                    if (s < tile.length[r]) {
                        grad_h[u][r] += sum[r];
                    }
                    if (resets_at(params, resets, s, tile.b[r], tile.length[r])) {
                        start_h[u][r] += grad_h[u][r];
                        start_c[u][r] += grad_c[u][r];
                        grad_h[u][r] = 0.0f;
                        grad_c[u][r] = 0.0f;
                    }
                }
            }
        }
        __syncthreads();  // δ of this step is read
    }
#pragma unroll 1
    for (uint32_t u = 0; u < UNITS; u++) {
        const uint32_t j = tile.lane + u * WG;
        if (tile.live && j < h) {
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                if (tile.there[r]) {
                    const uint32_t at = (tile.model * params.batch + tile.b[r]) * h + j;
                    sums[at] = grad_h[u][r];
                    sums[all + at] = grad_c[u][r];
                    sums[2 * all + at] = start_h[u][r] + (params.from_step == 0 ? grad_h[u][r] : 0.0f);
                    sums[3 * all + at] = start_c[u][r] + (params.from_step == 0 ? grad_c[u][r] : 0.0f);
                }
            }
        }
    }
}

template <bool IS_GRU>
__device__ __forceinline__ void backward(const float* __restrict__ saved, const Stored* __restrict__ w_hh, const uint32_t* __restrict__ lengths,
                                         const uint32_t* __restrict__ resets, const Stored* __restrict__ grad_y, float* gates, float* sums,
                                         const RecurrentParams& params) {
    __shared__ float4 sh_rows[SHARED];
    if (params.hidden <= WG) {
        backward_steps<IS_GRU, 1>(saved, w_hh, lengths, resets, grad_y, gates, sums, sh_rows, params);
    } else {
        backward_steps<IS_GRU, 8>(saved, w_hh, lengths, resets, grad_y, gates, sums, sh_rows, params);
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    lstm_backward(const float* __restrict__ saved, const Stored* __restrict__ w_hh, const uint32_t* __restrict__ lengths,
                  const uint32_t* __restrict__ resets, const Stored* __restrict__ grad_y, float* __restrict__ gates, float* __restrict__ sums,
                  RecurrentParams params) {
    backward<false>(saved, w_hh, lengths, resets, grad_y, gates, sums, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    gru_backward(const float* __restrict__ saved, const Stored* __restrict__ w_hh, const uint32_t* __restrict__ lengths,
                 const uint32_t* __restrict__ resets, const Stored* __restrict__ grad_y, float* __restrict__ gates, float* __restrict__ sums,
                 RecurrentParams params) {
    backward<true>(saved, w_hh, lengths, resets, grad_y, gates, sums, params);
}

// ---- products ---------------------------------------------------------------------------------------------------

// Tiles of the two factors: 16 inner values of 32 rows, and of 32 columns. Thread (tid / 8, tid % 8) owns rows 2·(tid / 8) and the
// next, columns 4·(tid % 8) .. + 4.
struct Factors {
    float left[16][32];
    float right[16][32];
};

__device__ __forceinline__ void add_tiles(const Factors& tile, float (&out)[2][4]) {
    const uint32_t r = 2 * (threadIdx.x / 8), c = 4 * (threadIdx.x % 8);
#pragma unroll
    for (uint32_t k = 0; k < 16; k++) {
#pragma unroll
        for (uint32_t e = 0; e < 4; e++) {
            out[0][e] += tile.left[k][r] * tile.right[k][c + e];
            out[1][e] += tile.left[k][r + 1] * tile.right[k][c + e];
        }
    }
}

// Input k (x, h(t−1), 1) of sequence q (b of the model) at a step.
__device__ __forceinline__ float input_at(const RecurrentParams& p, const Stored* __restrict__ x, const float* __restrict__ saved, uint32_t q, uint32_t b,
                                          uint32_t step, uint32_t k) {
    if (k < p.inputs) {
        return x[((size_t)(has(p, X_SHARED) ? b : q) * p.time + step) * p.inputs + k];
    }
    if (k < p.inputs + p.hidden) {
        return saved[((size_t)q * p.time + step) * width(p) + kept_h(p) + k - p.inputs];
    }
    return 1.0f;
}

extern "C" __global__ void __launch_bounds__(WG)
    recurrent_gates(const Stored* __restrict__ x, const float* __restrict__ saved, const Stored* __restrict__ w_ih, const Stored* __restrict__ w_hh,
                    const Stored* __restrict__ b_ih, const Stored* __restrict__ b_hh, float* __restrict__ gates, RecurrentParams params) {
    __shared__ Factors sh_tile;
    const uint32_t own = params.rows / params.models, steps = own * params.time, h = params.hidden, columns = 4 * h;
    const uint32_t inner = params.inputs + h + 1, step_tiles = (steps + 31) / 32, column_tiles = (columns + 31) / 32;
    const uint32_t group = group_index(), model = group / (step_tiles * column_tiles);
    if (model >= params.models) {
        return;
    }
    const uint32_t n0 = 32 * (group / column_tiles % step_tiles), c0 = 32 * (group % column_tiles);
    const bool gru = has(params, GRU);
    float out[2][4] = {};
    for (uint32_t k0 = 0; k0 < inner; k0 += 16) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 512; i += WG) {
            const uint32_t k = k0 + i % 16, n = n0 + i / 16, c = c0 + i / 16;
            float left = 0.0f, right = 0.0f;
            if (k < inner && n < steps) {
                left = input_at(params, x, saved, model * own + n / params.time, params.row0 + n / params.time, n % params.time, k);
            }
            if (k < inner && c < columns) {
                const uint32_t row = model * gate_rows(params) + c, hidden_row = row - (gru && c >= 3 * h ? h : 0);
                const bool no_input = gru && c >= 3 * h, no_hidden = gru && c >= 2 * h && c < 3 * h;
                if (k < params.inputs) {
                    right = no_input ? 0.0f : w_ih[row * params.inputs + k];
                } else if (k < params.inputs + h) {
                    right = no_hidden ? 0.0f : w_hh[hidden_row * h + k - params.inputs];
                } else if (has(params, BIAS)) {
                    right = (no_input ? 0.0f : b_ih[row]) + (gru && !no_hidden ? b_hh[hidden_row] : 0.0f);
                }
            }
            sh_tile.left[i % 16][i / 16] = left;
            sh_tile.right[i % 16][i / 16] = right;
        }
        __syncthreads();
        add_tiles(sh_tile, out);
    }
    for (uint32_t e = 0; e < 8; e++) {
        const uint32_t n = n0 + 2 * (threadIdx.x / 8) + e / 4, c = c0 + 4 * (threadIdx.x % 8) + e % 4;
        if (n < steps && c < columns) {
            gates[((size_t)model * steps + n) * columns + c] = out[e / 4][e % 4];
        }
    }
}

__device__ __forceinline__ void grad_x_tile(const RecurrentParams& params, const Stored* __restrict__ w_ih, const float* __restrict__ gates,
                                            Stored* __restrict__ grad_x, Factors& sh_tile, uint32_t group) {
    const uint32_t own = params.rows / params.models, steps = own * params.time, columns = params.inputs, inner = gate_rows(params);
    const uint32_t step_tiles = (steps + 31) / 32, column_tiles = (columns + 31) / 32;
    const uint32_t model = group / (step_tiles * column_tiles), n0 = 32 * (group / column_tiles % step_tiles), c0 = 32 * (group % column_tiles);
    float out[2][4] = {};
    for (uint32_t k0 = 0; k0 < inner; k0 += 16) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 512; i += WG) {
            const uint32_t n = n0 + i / 16, c = c0 + i % 32;
            sh_tile.left[i % 16][i / 16] =
                k0 + i % 16 < inner && n < steps ? gates[((size_t)model * steps + n) * 4 * params.hidden + k0 + i % 16] : 0.0f;
            sh_tile.right[i / 32][i % 32] = k0 + i / 32 < inner && c < columns ? w_ih[(model * inner + k0 + i / 32) * columns + c] : 0.0f;
        }
        __syncthreads();
        add_tiles(sh_tile, out);
    }
    for (uint32_t e = 0; e < 8; e++) {
        const uint32_t n = n0 + 2 * (threadIdx.x / 8) + e / 4, c = c0 + 4 * (threadIdx.x % 8) + e % 4;
        if (n < steps && c < columns) {
            grad_x[((size_t)model * steps + n) * columns + c] = out[e / 4][e % 4];
        }
    }
}

// Writes the gradient of the weight of input k in column c of the four gates.
__device__ __forceinline__ void put_weight(const RecurrentParams& params, float* __restrict__ sums, uint32_t slice, uint32_t model, uint32_t c,
                                           uint32_t k, float v) {
    const uint32_t h = params.hidden, n = params.inputs, rows = gate_rows(params);
    const bool gru = has(params, GRU), no_input = gru && c >= 3 * h, no_hidden = gru && c >= 2 * h && c < 3 * h;
    const uint32_t each = params.models * rows * (n + h + (gru ? 2 : 1));
    float* base = sums + (size_t)params.models * h * (4 * params.batch + 2) + (size_t)slice * each;
    const uint32_t input_row = model * rows + c, hidden_row = input_row - (no_input ? h : 0);
    if (k < n) {
        if (!no_input) {
            base[input_row * n + k] = v;
        }
    } else if (k < n + h) {
        if (!no_hidden) {
            base[params.models * rows * n + hidden_row * h + k - n] = v;
        }
    } else {
        float* biases = base + params.models * rows * (n + h);
        if (!no_input) {
            biases[input_row] = v;
        }
        if (gru && !no_hidden) {
            biases[params.models * rows + hidden_row] = v;
        }
    }
}

__device__ __forceinline__ void weight_tile(const RecurrentParams& params, const Stored* __restrict__ x, const float* __restrict__ saved,
                                            const uint32_t* __restrict__ lengths, const float* __restrict__ gates, float* __restrict__ sums,
                                            Factors& sh_tile, uint32_t group) {
    const uint32_t own = params.rows / params.models, t = params.time, rows = 4 * params.hidden, columns = params.inputs + params.hidden + 1;
    const uint32_t row_tiles = (rows + 31) / 32, column_tiles = (columns + 31) / 32;
    const uint32_t slice = params.slice0 + group / (row_tiles * column_tiles) % params.slice_count;
    const uint32_t model = group / (row_tiles * column_tiles * params.slice_count);
    const uint32_t r0 = 32 * (group / column_tiles % row_tiles), c0 = 32 * (group % column_tiles);
    // steps of the slice, counted over the model's B·T
    uint32_t first = slice * params.slice_rows * t, last = first + params.slice_rows * t;
    if (params.time_parts > 1) {
        const uint32_t part = (t + params.time_parts - 1) / params.time_parts, p = slice % params.time_parts;
        first = slice / params.time_parts * t + min(p * part, t);
        last = slice / params.time_parts * t + min((p + 1) * part, t);
    }
    last = min(last, params.batch * t);
    float out[2][4] = {};
    for (uint32_t n0 = first; n0 < last; n0 += 16) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 512; i += WG) {
            const uint32_t n = n0 + i / 32, c = r0 + i % 32, k = c0 + i % 32;
            float left = 0.0f, right = 0.0f;
            if (n < last) {
                const uint32_t b = n / t, step = n % t, q = model * own + b - params.row0;
                if (!has(params, LENGTHS) || step < lengths[b]) {
                    left = c < rows ? gates[((size_t)q * t + step) * rows + c] : 0.0f;
                    right = k < columns ? input_at(params, x, saved, q, b, step, k) : 0.0f;
                }
            }
            sh_tile.left[i / 32][i % 32] = left;
            sh_tile.right[i / 32][i % 32] = right;
        }
        __syncthreads();
        add_tiles(sh_tile, out);
    }
    for (uint32_t e = 0; e < 8; e++) {
        const uint32_t c = r0 + 2 * (threadIdx.x / 8) + e / 4, k = c0 + 4 * (threadIdx.x % 8) + e % 4;
        if (c < rows && k < columns) {
            put_weight(params, sums, slice, model, c, k, out[e / 4][e % 4]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    recurrent_gradients(const Stored* __restrict__ x, const float* __restrict__ saved, const uint32_t* __restrict__ lengths,
                        const Stored* __restrict__ w_ih, const float* __restrict__ gates, Stored* __restrict__ grad_x, float* __restrict__ sums,
                        RecurrentParams params) {
    __shared__ Factors sh_tile;
    const uint32_t steps = params.rows / params.models * params.time, inner = params.inputs + params.hidden + 1, group = group_index();
    const uint32_t x_tiles = has(params, GRAD_X) ? params.models * ((steps + 31) / 32) * ((params.inputs + 31) / 32) : 0;
    const uint32_t w_tiles =
        has(params, GRAD_W) ? params.models * params.slice_count * ((4 * params.hidden + 31) / 32) * ((inner + 31) / 32) : 0;
    if (group < x_tiles) {
        grad_x_tile(params, w_ih, gates, grad_x, sh_tile, group);
    } else if (group < x_tiles + w_tiles) {
        weight_tile(params, x, saved, lengths, gates, sums, sh_tile, group - x_tiles);
    }
}

// ---- sums -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) recurrent_reduce(float* __restrict__ sums, RecurrentParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x, h = params.hidden;
    const uint32_t all = params.models * params.batch * h, starts = 2 * params.models * h;
    const uint32_t each = params.models * gate_rows(params) * (params.inputs + h + (has(params, GRU) ? 2 : 1));
    if (at < starts) {
        if (has(params, LEARNED)) {
            const uint32_t from_value = (2 + at / (params.models * h)) * all + at / h % params.models * params.batch * h + at % h;
            float sum = 0.0f;
            for (uint32_t b = 0; b < params.batch; b++) {
                sum += sums[from_value + b * h];
            }
            sums[4 * all + at] = sum;
        }
        return;
    }
    if (at < starts + each && has(params, GRAD_W)) {
        float sum = sums[4 * all + at];
        for (uint32_t slice = 1; slice < params.slices; slice++) {
            sum += sums[4 * all + at + (size_t)slice * each];
        }
        sums[4 * all + at] = sum;
    }
}
#endif
