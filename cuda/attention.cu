// Fused attention. Maths, shapes and source: kernels/attention.rs.
//   attention_forward…      grid  B·NH·⌈Tq / rows⌉   thread = query          tiles of k, v
//   attention_rows          grid  ⌈B·NH·Tq / WG⌉     thread = query          lse, delta and lengths for the backward kernels
//   attention_backward_q…   grid  B·NH·⌈Tq / rows⌉   thread = query          tiles of k, v
//   attention_backward_kv…  grid  B·NH·⌈Tk / rows⌉   thread = key            tiles of q, grad_out
//   attention_grad_bias     grid  ⌈bias / WG⌉        thread = bias element
//   attention_weights       grid  ⌈B·NH·Tq·Tk / WG⌉  thread = weight
// spill: up to three words of attention_forward… and attention_backward_q around the tile loads, where ptxas stops at 128 or 168 registers;
// in 16 bits up to six words of attention_forward…, _backward_q_8 and _backward_kv_8 where it stops at 96 or 128, and on sm_75 twelve of
// _backward_kv_32 in bf16, whose products go through shuffles.
// rows = WG; with SPLIT, ⌈D/32⌉ neighbouring threads share a row, 32 numbers each. Shared memory: two tiles of 256 float4.

struct AttentionParams {
    uint32_t batch;
    uint32_t first;
    uint32_t heads;
    uint32_t queries;
    uint32_t keys;
    uint32_t width;
    uint32_t q_batch;
    uint32_t q_head;
    uint32_t q_row;
    uint32_t q_offset;
    uint32_t k_batch;
    uint32_t k_head;
    uint32_t k_row;
    uint32_t k_offset;
    uint32_t v_batch;
    uint32_t v_head;
    uint32_t v_row;
    uint32_t v_offset;
    uint32_t out_batch;
    uint32_t out_head;
    uint32_t out_row;
    uint32_t out_offset;
    uint32_t bias_batch;
    uint32_t bias_head;
    uint32_t record;
    uint32_t flags;
    uint32_t window;
    uint32_t threshold;
    uint32_t seed_low;
    uint32_t seed_high;
    uint32_t stream;
    float scale;
    float scale_low;
    float keep;
    float keep_low;
};

#define CAUSAL 1u
#define BIAS 2u
#define LENGTHS 4u
#define DROPOUT 8u
#define GRAD_K 16u
#define GRAD_V 32u
#define ADD 64u

#define NO_KEY (-1e30f)
#define EXCLUDED (-1e29f)
#define HEADER 4u
#define TILE 256u
#define LOG2_E 1.44269504f

// e^x to 2 ulp of x·log2 e: differences of scores come first, so that large ones lose nothing.
__device__ __forceinline__ float exp_of(float x) {
    return exp2f(x * LOG2_E);
}

// ---- rows in registers ------------------------------------------------------------------------------------------

// 4·VECS numbers of a row.
struct Row {
    float4 x[VECS];
};

__device__ __forceinline__ float4 add4(float4 sum, float factor, float4 x) {
    return make_float4(fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z), fmaf(factor, x.w, sum.w));
}

__device__ __forceinline__ float dot(const Row& row, const float4* tile) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int n = 0; n < VECS; n++) {
        const float4 x = row.x[n], y = tile[n];
        sum = make_float4(fmaf(x.x, y.x, sum.x), fmaf(x.y, y.y, sum.y), fmaf(x.z, y.z, sum.z), fmaf(x.w, y.w, sum.w));
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// sum += factor·row of the tile
__device__ __forceinline__ void add(Row& sum, float factor, const float4* tile) {
#pragma unroll
    for (int n = 0; n < VECS; n++) {
        sum.x[n] = add4(sum.x[n], factor, tile[n]);
    }
}

__device__ __forceinline__ void multiply(Row& row, float factor) {
#pragma unroll
    for (int n = 0; n < VECS; n++) {
        row.x[n] = make_float4(row.x[n].x * factor, row.x[n].y * factor, row.x[n].z * factor, row.x[n].w * factor);
    }
}

__device__ __forceinline__ Row zero_row() {
    Row row;
#pragma unroll
    for (int n = 0; n < VECS; n++) {
        row.x[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    return row;
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

// Whether a tensor's rows can be read as float4.
__device__ __forceinline__ bool by_four(uint32_t width, uint32_t batch, uint32_t head, uint32_t row, uint32_t offset) {
    return ((width | batch | head | row | offset) & 3u) == 0u;
}

// Numbers d … d+3 of the row at `at`; 0 beyond the width.
__device__ __forceinline__ float4 load4(const Stored* __restrict__ x, size_t at, uint32_t d, uint32_t width, bool aligned) {
    if (aligned) {
        return d < width ? quad_at(x + at + d) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    return make_float4(d < width ? (float)x[at + d] : 0.0f, d + 1 < width ? (float)x[at + d + 1] : 0.0f,
                       d + 2 < width ? (float)x[at + d + 2] : 0.0f, d + 3 < width ? (float)x[at + d + 3] : 0.0f);
}

__device__ __forceinline__ void store4(Stored* __restrict__ x, size_t at, uint32_t d, uint32_t width, bool aligned, float4 y) {
    if (aligned) {
        if (d < width) {
            put_quad(x + at + d, y);
        }
        return;
    }
    if (d < width) x[at + d] = y.x;
    if (d + 1 < width) x[at + d + 1] = y.y;
    if (d + 2 < width) x[at + d + 2] = y.z;
    if (d + 3 < width) x[at + d + 3] = y.w;
}

__device__ __forceinline__ Row load_row(const Stored* __restrict__ x, size_t at, uint32_t d, uint32_t width, bool aligned) {
    Row row;
#pragma unroll
    for (int n = 0; n < VECS; n++) {
        row.x[n] = load4(x, at, d + 4 * n, width, aligned);
    }
    return row;
}

__device__ __forceinline__ void store_row(Stored* __restrict__ x, size_t at, uint32_t d, uint32_t width, bool aligned, const Row& row) {
#pragma unroll
    for (int n = 0; n < VECS; n++) {
        store4(x, at, d + 4 * n, width, aligned, row.x[n]);
    }
}

// A tensor of heads.
struct Tensor {
    uint32_t batch, head, row, offset;
    bool aligned;
};

__device__ __forceinline__ size_t start(const Tensor& t, uint32_t b, uint32_t h) {
    return (size_t)b * t.batch + (size_t)h * t.head + t.offset;
}

__device__ __forceinline__ Tensor tensor_q(const AttentionParams& p) {
    return {p.q_batch, p.q_head, p.q_row, p.q_offset, by_four(p.width, p.q_batch, p.q_head, p.q_row, p.q_offset)};
}

__device__ __forceinline__ Tensor tensor_k(const AttentionParams& p) {
    return {p.k_batch, p.k_head, p.k_row, p.k_offset, by_four(p.width, p.k_batch, p.k_head, p.k_row, p.k_offset)};
}

__device__ __forceinline__ Tensor tensor_v(const AttentionParams& p) {
    return {p.v_batch, p.v_head, p.v_row, p.v_offset, by_four(p.width, p.v_batch, p.v_head, p.v_row, p.v_offset)};
}

__device__ __forceinline__ Tensor tensor_out(const AttentionParams& p) {
    return {p.out_batch, p.out_head, p.out_row, p.out_offset, by_four(p.width, p.out_batch, p.out_head, p.out_row, p.out_offset)};
}

// ---- who sees whom --------------------------------------------------------------------------------------------------

// Half open.
struct Interval {
    int from, to;
};

// Keys that query i may see.
__device__ __forceinline__ Interval keys_of(const AttentionParams& p, uint32_t i, uint32_t length) {
    const int center = (int)(i + p.keys) - (int)p.queries, window = (int)p.window;
    const int last = p.flags & CAUSAL ? center + 1 : center + window;
    const int to = max(min(last, (int)length), 0);
    return {min(max(center - window + 1, 0), to), to};
}

// Queries that may see key j.
__device__ __forceinline__ Interval queries_of(const AttentionParams& p, uint32_t j, uint32_t length) {
    if (j >= length) {
        return {0, 0};
    }
    const int center = (int)(j + p.queries) - (int)p.keys, window = (int)p.window;
    const int first = p.flags & CAUSAL ? center : center - window + 1;
    const int to = min(max(center + window, 0), (int)p.queries);
    return {min(max(first, 0), to), to};
}

// A thread's place: its item and head, its row, its part of the row.
struct Place {
    bool live;
    uint32_t item, b, h, from_row, to_row, row, parts, part;
};

__device__ __forceinline__ Place place_of(const AttentionParams& p, uint32_t steps) {
    const uint32_t group = group_index(), parts = SPLIT ? (p.width + 31) / 32 : 1, rows = WG / parts, tiles = (steps + rows - 1) / rows;
    const uint32_t item = group / tiles, first = (group % tiles) * rows, local = threadIdx.x / parts;
    return {local < rows && first + local < steps, item, item / p.heads, item % p.heads, first, min(first + rows, steps), first + local, parts,
            threadIdx.x % parts};
}

// Steps of a tile.
__device__ __forceinline__ uint32_t tile_steps(uint32_t parts) {
    return SPLIT ? min(TILE / (8 * parts), 8u) & ~3u : TILE / VECS;
}

// ---- dropout --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void words_of(const AttentionParams& p, uint32_t draw, uint32_t item, uint32_t i, uint32_t quad, uint32_t (&word)[4]) {
    word[0] = p.first * p.heads + item;
    word[1] = i;
    word[2] = quad;
    word[3] = p.stream;
    philox4x32(word, p.seed_low, p.seed_high + draw);
}

// Factor of the weight of query i for key j.
__device__ __forceinline__ float kept(const AttentionParams& p, uint32_t draw, uint32_t item, uint32_t i, uint32_t j) {
    uint32_t word[4];
    words_of(p, draw, item, i, j / 4, word);
    const uint32_t pick = (j & 3) == 0 ? word[0] : (j & 3) == 1 ? word[1] : (j & 3) == 2 ? word[2] : word[3];
    return pick >> 8 < p.threshold ? 0.0f : p.keep;
}

// Factors of the weights of query i for keys j … j+3, j a multiple of 4.
__device__ __forceinline__ void keep_keys(const AttentionParams& p, uint32_t draw, uint32_t item, uint32_t i, uint32_t j, float (&factor)[4]) {
    uint32_t word[4];
    words_of(p, draw, item, i, j / 4, word);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        factor[e] = word[e] >> 8 < p.threshold ? 0.0f : p.keep;
    }
}

// ---- forward ----------------------------------------------------------------------------------------------------------

#define PARTS (SPLIT ? 2 * WG : 1)

// Loads keys `first` … of the tile; 0 from `end` on.
__device__ __forceinline__ void load_keys(const AttentionParams& p, const Stored* __restrict__ k, const Stored* __restrict__ v, const Place& place,
                                          uint32_t first, uint32_t end, float4* sh_k, float4* sh_v) {
    const uint32_t vecs = VECS * place.parts;
    const Tensor tk = tensor_k(p), tv = tensor_v(p);
    const size_t k_at = start(tk, place.b, place.h), v_at = start(tv, place.b, place.h);
    for (uint32_t n = threadIdx.x; n < tile_steps(place.parts) * vecs; n += WG) {
        const uint32_t j = first + n / vecs, d = 4 * (n % vecs);
        const bool there = j < end;
        sh_k[n] = there ? load4(k, k_at + (size_t)j * tk.row, d, p.width, tk.aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        sh_v[n] = there ? load4(v, v_at + (size_t)j * tv.row, d, p.width, tv.aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

// Products of a row, or of a part of it, with four steps of a tile.
__device__ __forceinline__ void products(const Row& row, const float4* tile, uint32_t step, float (&s)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        s[e] = dot(row, tile + e * step);
    }
}

// Sums of the parts of a row's products.
__device__ __forceinline__ void joined(const float4* sh_part, const Place& place, uint32_t quad, float (&s)[4]) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (uint32_t part = 0; part < place.parts; part++) {
        sum = add4(sum, 1.0f, sh_part[min(2 * (threadIdx.x - place.part + part) + quad, (uint32_t)PARTS - 1)]);
    }
    s[0] = sum.x, s[1] = sum.y, s[2] = sum.z, s[3] = sum.w;
}

#if defined(STORED_16) && !SPLIT
// Heads up to 32 wide in 16 bits go through tensor cores: a warp has 32 queries, in two tiles of 16 rows; a thread has four of its rows and two
// neighbouring columns of each 8 of a product (cuda/half.cuh). Weights, which are not stored, count as a rounded value and its rest.
#define STAGE 64u
#define DEPTHS ((4 * VECS + 15) / 16)
#define WIDTHS (VECS / 2)

// A stage of the other side: pairs along the width, and pairs of neighbouring rows.
typedef uint32_t Along[STAGE][8 * DEPTHS + 4];
typedef uint32_t Across[4 * VECS][STAGE / 2 + 4];

// Rows `first` … of a stage; 0 from `end` on.
__device__ __forceinline__ void load_along(Along& to, const Stored* __restrict__ x, size_t at, const Tensor& tensor, uint32_t first, uint32_t end,
                                           uint32_t width) {
    for (uint32_t n = threadIdx.x; n < STAGE * 4 * DEPTHS; n += WG) {
        const uint32_t row = n / (4 * DEPTHS), c = n % (4 * DEPTHS), i = first + row;
        const float4 y = i < end ? load4(x, at + (size_t)i * tensor.row, 4 * c, width, tensor.aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        to[row][2 * c] = pair_of(y.x, y.y);
        to[row][2 * c + 1] = pair_of(y.z, y.w);
    }
}

__device__ __forceinline__ void load_across(Across& to, const Stored* __restrict__ x, size_t at, const Tensor& tensor, uint32_t first, uint32_t end,
                                            uint32_t width) {
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (uint32_t n = threadIdx.x; n < STAGE / 2 * VECS; n += WG) {
        const uint32_t pair = n / VECS, c = n % VECS, i = first + 2 * pair;
        const float4 y = i < end ? load4(x, at + (size_t)i * tensor.row, 4 * c, width, tensor.aligned) : zero;
        const float4 z = i + 1 < end ? load4(x, at + (size_t)(i + 1) * tensor.row, 4 * c, width, tensor.aligned) : zero;
        to[4 * c][pair] = pair_of(y.x, z.x);
        to[4 * c + 1][pair] = pair_of(y.y, z.y);
        to[4 * c + 2][pair] = pair_of(y.z, z.z);
        to[4 * c + 3][pair] = pair_of(y.w, z.w);
    }
}

// Rows `row` and `row + 8` of 16 columns from `d` on, as the left side of a product; 0 outside.
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const Stored* __restrict__ x, size_t at, uint32_t stride, uint32_t row, uint32_t end,
                                          uint32_t d, uint32_t width) {
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        const uint32_t i = row + 8 * (r % 2), c = d + 8 * (r / 2);
        const Stored* from = x + at + (size_t)i * stride + c;
        a[r] = pair_of(i < end && c < width ? (float)from[0] : 0.0f, i < end && c + 1 < width ? (float)from[1] : 0.0f);
    }
}

__device__ __forceinline__ void load_lefts(uint32_t (&a)[2][DEPTHS][4], const Stored* __restrict__ x, size_t at, uint32_t stride, uint32_t base,
                                           uint32_t end, uint32_t width) {
#pragma unroll
    for (uint32_t m = 0; m < 2; m++) {
#pragma unroll
        for (uint32_t d = 0; d < DEPTHS; d++) {
            load_left(a[m][d], x, at, stride, base + 16 * m, end, 16 * d + threadIdx.x % 4 * 2, width);
        }
    }
}

// Products of the warp's rows with 16 rows of a stage: s[m][n] are 16 × 8 of them.
__device__ __forceinline__ void multiply_along(float (&s)[2][2][4], const uint32_t (&a)[2][DEPTHS][4], const Along& stage, uint32_t at) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (uint32_t n = 0; n < 2; n++) {
#pragma unroll
        for (uint32_t d = 0; d < DEPTHS; d++) {
            const uint32_t* row = stage[at + 8 * n + g] + 8 * d + t;
            const uint32_t b[2] = {row[0], row[4]};
            mma_sync(Stored(), s[0][n], a[0][d], b);
            mma_sync(Stored(), s[1][n], a[1][d], b);
        }
    }
}

// A product of 16 × 16 that stays in registers as the left side of the next: x is (columns 8n …)[n][…].
__device__ __forceinline__ void as_left(uint32_t (&a)[4], uint32_t (&rest)[4], const float (&x)[2][4]) {
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        const float first = x[r / 2][2 * (r % 2)], second = x[r / 2][2 * (r % 2) + 1];
        const float f = rounded_inside(first), s = rounded_inside(second);
        a[r] = pair_of(f, s);
        rest[r] = pair_of(rest_of(first, f), rest_of(second, s));
    }
}

__device__ __forceinline__ void forward(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v,
                                        const Stored* __restrict__ bias, const uint32_t* __restrict__ kv_len, const uint32_t* __restrict__ step,
                                        Stored* __restrict__ out, float* __restrict__ lse, const AttentionParams& params) {
    __shared__ Along sh_k;
    __shared__ Across sh_v;
    const Place place = place_of(params, params.queries);
    if (place.item >= params.batch * params.heads) {
        return;
    }
    const uint32_t length = params.flags & LENGTHS ? min(params.keys, kv_len[place.b]) : params.keys;
    const uint32_t draw = step[0], g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, base = place.from_row + threadIdx.x / 32 * 32 + g;
    const Tensor tq = tensor_q(params), tk = tensor_k(params), tv = tensor_v(params), to = tensor_out(params);
    uint32_t x[2][DEPTHS][4];
    Interval keys[4];
    float most[4], total[4], sum[2][WIDTHS][4] = {};
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        const uint32_t i = base + 8 * r;
        keys[r] = i < place.to_row ? keys_of(params, i, length) : Interval{0, 0};
        most[r] = NO_KEY;
        total[r] = 0.0f;
    }
    load_lefts(x, q, start(tq, place.b, place.h), tq.row, base, place.to_row, params.width);
    const size_t bias_at = (size_t)place.b * params.bias_batch + (size_t)place.h * params.bias_head;
    const uint32_t end = (uint32_t)keys_of(params, place.to_row - 1, length).to;
    for (uint32_t first = (uint32_t)keys_of(params, place.from_row, length).from & ~3u; first < end; first += STAGE) {
        __syncthreads();
        load_along(sh_k, k, start(tk, place.b, place.h), tk, first, end, params.width);
        load_across(sh_v, v, start(tv, place.b, place.h), tv, first, end, params.width);
        __syncthreads();
        for (uint32_t at = 0; at < STAGE && first + at < end; at += 16) {
            float s[2][2][4] = {};
            multiply_along(s, x, sh_k, at);
            // row r = 2·m + c / 2 of the thread, key j
            uint32_t allowed = 0;
            float higher[4] = {most[0], most[1], most[2], most[3]};
#pragma unroll
            for (uint32_t e = 0; e < 16; e++) {
                const uint32_t m = e / 8, n = e / 4 % 2, c = e % 4, r = 2 * m + c / 2;
                const int j = (int)(first + at + 8 * n + 2 * t + c % 2);
                bool may = j >= keys[r].from && j < keys[r].to;
                float added = 0.0f;
                if (params.flags & BIAS) {
                    added = may ? (float)bias[bias_at + (size_t)(base + 8 * r) * params.keys + j] : 0.0f;
                    may = may && !(added <= EXCLUDED);
                }
                s[m][n][c] = may ? fmaf(s[m][n][c], params.scale, added) : NO_KEY;
                higher[r] = fmaxf(higher[r], s[m][n][c]);
                allowed |= may ? 1u << e : 0u;
            }
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                higher[r] = fmaxf(higher[r], __shfl_xor_sync(0xffffffffu, higher[r], 1));
                higher[r] = fmaxf(higher[r], __shfl_xor_sync(0xffffffffu, higher[r], 2));
                const float factor = exp_of(most[r] - higher[r]);
                most[r] = higher[r];
                total[r] *= factor;
#pragma unroll
                for (uint32_t w = 0; w < WIDTHS; w++) {
                    sum[r / 2][w][2 * (r % 2)] *= factor;
                    sum[r / 2][w][2 * (r % 2) + 1] *= factor;
                }
            }
#pragma unroll
            for (uint32_t e = 0; e < 16; e++) {
                const uint32_t m = e / 8, n = e / 4 % 2, c = e % 4, r = 2 * m + c / 2;
                const float p = allowed >> e & 1 ? exp_of(s[m][n][c] - most[r]) : 0.0f;
                total[r] += p;
                s[m][n][c] = params.flags & DROPOUT ? p * kept(params, draw, place.item, base + 8 * r, first + at + 8 * n + 2 * t + c % 2) : p;
            }
#pragma unroll
            for (uint32_t m = 0; m < 2; m++) {
                uint32_t a[4], rest[4];
                as_left(a, rest, s[m]);
#pragma unroll
                for (uint32_t w = 0; w < WIDTHS; w++) {
                    const uint32_t* pair = sh_v[8 * w + g] + at / 2 + t;
                    const uint32_t b[2] = {pair[0], pair[4]};
                    mma_sync(Stored(), sum[m][w], a, b);
                    mma_sync(Stored(), sum[m][w], rest, b);
                }
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        const uint32_t i = base + 8 * r;
        const bool found = total[r] != 0.0f;
        if (i < place.to_row) {
            Stored* row = out + start(to, place.b, place.h) + (size_t)i * to.row;
#pragma unroll
            for (uint32_t w = 0; w < WIDTHS; w++) {
#pragma unroll
                for (uint32_t c = 0; c < 2; c++) {
                    const uint32_t d = 8 * w + 2 * t + c;
                    if (d < params.width) {
                        row[d] = found ? sum[r / 2][w][2 * (r % 2) + c] * (1.0f / total[r]) : 0.0f;
                    }
                }
            }
            if (t == 0) {
                lse[(size_t)place.item * params.queries + i] = found ? most[r] + logf(total[r]) : NO_KEY;
            }
        }
    }
}
#else
__device__ __forceinline__ void forward(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v,
                                        const Stored* __restrict__ bias, const uint32_t* __restrict__ kv_len, const uint32_t* __restrict__ step,
                                        Stored* __restrict__ out, float* __restrict__ lse, const AttentionParams& params) {
    __shared__ float4 sh_k[TILE], sh_v[TILE], sh_part[PARTS];
    const Place place = place_of(params, params.queries);
    if (place.item >= params.batch * params.heads) {
        return;
    }
    const uint32_t length = params.flags & LENGTHS ? min(params.keys, kv_len[place.b]) : params.keys;
    const uint32_t draw = step[0];
    const uint32_t i = place.row, vecs = VECS * place.parts, tile = tile_steps(place.parts), mine = VECS * place.part;
    const Tensor tq = tensor_q(params), to = tensor_out(params);
    Interval keys = {0, 0};
    Row x = zero_row(), sum = zero_row();
    if (place.live) {
        keys = keys_of(params, i, length);
        x = load_row(q, start(tq, place.b, place.h) + (size_t)i * tq.row, 4 * mine, params.width, tq.aligned);
        multiply(x, params.scale);
    }
    const size_t bias_at = (size_t)place.b * params.bias_batch + (size_t)place.h * params.bias_head + (size_t)i * params.keys;
    const uint32_t end = (uint32_t)keys_of(params, place.to_row - 1, length).to;
    float total = 0.0f, most = NO_KEY;
    for (uint32_t first = (uint32_t)keys_of(params, place.from_row, length).from & ~3u; first < end; first += tile) {
        __syncthreads();
        load_keys(params, k, v, place, first, end, sh_k, sh_v);
        __syncthreads();
        if (SPLIT) {
            for (uint32_t g = 0; g < tile; g += 4) {
                float s[4];
                products(x, sh_k + g * vecs + mine, vecs, s);
                sh_part[2 * threadIdx.x + g / 4] = make_float4(s[0], s[1], s[2], s[3]);
            }
            __syncthreads();
        }
        for (uint32_t g = 0; g < tile && first + g < end; g += 4) {
            const uint32_t at = g * vecs + mine;
            float s[4], p[4];
            bool allowed[4];
            if (SPLIT) {
                joined(sh_part, place, g / 4, s);
            } else {
                products(x, sh_k + at, vecs, s);
            }
            float higher = most;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int j = (int)(first + g) + e;
                allowed[e] = j >= keys.from && j < keys.to;
                if (params.flags & BIAS) {
                    const float added = allowed[e] ? bias[bias_at + j] : 0.0f;
                    allowed[e] = allowed[e] && !(added <= EXCLUDED);
                    s[e] += added;
                }
                s[e] = allowed[e] ? s[e] : NO_KEY;
                higher = fmaxf(higher, s[e]);
            }
            if (higher > most) {
                const float factor = exp_of(most - higher);
                multiply(sum, factor);
                total *= factor;
                most = higher;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                p[e] = allowed[e] ? exp_of(s[e] - most) : 0.0f;
                total += p[e];
            }
            if (params.flags & DROPOUT) {
                float factor[4];
                keep_keys(params, draw, place.item, i, first + g, factor);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    p[e] *= factor[e];
                }
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                add(sum, p[e], sh_v + at + e * vecs);
            }
        }
    }
    if (!place.live) {
        return;
    }
    const bool found = total != 0.0f;
    multiply(sum, found ? 1.0f / total : 0.0f);
    store_row(out, start(to, place.b, place.h) + (size_t)i * to.row, 4 * mine, params.width, to.aligned, sum);
    if (place.part == 0) {
        lse[(size_t)place.item * params.queries + i] = found ? most + logf(total) : NO_KEY;
    }
}
#endif

#if VECS == 2
extern "C" __global__ void __launch_bounds__(WG)
    attention_forward_8(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias, const uint32_t* __restrict__ kv_len,
                      const uint32_t* __restrict__ step, Stored* __restrict__ out, float* __restrict__ lse, AttentionParams params) {
    forward(q, k, v, bias, kv_len, step, out, lse, params);
}
#elif VECS == 4
extern "C" __global__ void __launch_bounds__(WG)
    attention_forward_16(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias, const uint32_t* __restrict__ kv_len,
                      const uint32_t* __restrict__ step, Stored* __restrict__ out, float* __restrict__ lse, AttentionParams params) {
    forward(q, k, v, bias, kv_len, step, out, lse, params);
}
#elif !SPLIT
extern "C" __global__ void __launch_bounds__(WG)
    attention_forward_32(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias, const uint32_t* __restrict__ kv_len,
                      const uint32_t* __restrict__ step, Stored* __restrict__ out, float* __restrict__ lse, AttentionParams params) {
    forward(q, k, v, bias, kv_len, step, out, lse, params);
}
#else
extern "C" __global__ void __launch_bounds__(WG)
    attention_forward(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias, const uint32_t* __restrict__ kv_len,
                      const uint32_t* __restrict__ step, Stored* __restrict__ out, float* __restrict__ lse, AttentionParams params) {
    forward(q, k, v, bias, kv_len, step, out, lse, params);
}
#endif

// ---- lse and delta ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    attention_rows(const uint32_t* __restrict__ kv_len, const uint32_t* __restrict__ step, const Stored* __restrict__ out, const Stored* __restrict__ grad_out, const float* __restrict__ lse,
                   float* __restrict__ rows, AttentionParams params) {
    const uint64_t n = (uint64_t)group_index() * WG + threadIdx.x;
    if (n >= (uint64_t)params.batch * params.heads * params.queries) {
        return;
    }
    const uint32_t i = n % params.queries, h = n / params.queries % params.heads, b = n / params.queries / params.heads;
    const Tensor to = tensor_out(params);
    const size_t at = start(to, b, h) + (size_t)i * to.row;
    float sum = 0.0f;
    for (uint32_t d = 0; d < params.width; d += 4) {
        const float4 x = load4(out, at, d, params.width, to.aligned), y = load4(grad_out, at, d, params.width, to.aligned);
        sum = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
    }
    const size_t row = (size_t)b * params.record + HEADER + 2 * ((size_t)h * params.queries + i);
    rows[row] = lse[n];
    rows[row + 1] = sum;
    if (h == 0 && i == 0) {
        rows[(size_t)b * params.record] = (float)(params.flags & LENGTHS ? min(params.keys, kv_len[b]) : params.keys);
        rows[(size_t)b * params.record + 1] = (float)(step[0] & 0xffffu);
        rows[(size_t)b * params.record + 2] = (float)(step[0] >> 16);
        rows[(size_t)b * params.record + 3] = 0.0f;
    }
}

// ---- backward, queries --------------------------------------------------------------------------------------------------

// Step of dropout.
__device__ __forceinline__ uint32_t draw_of(const AttentionParams& p, const float* __restrict__ rows, uint32_t b) {
    const float* at = rows + (size_t)b * p.record + 1;
    return (uint32_t)at[0] | (uint32_t)at[1] << 16;
}

// (lse, delta) of query i.
__device__ __forceinline__ float2 own_row(const AttentionParams& p, const float* __restrict__ rows, const Place& place, uint32_t i) {
    const float* at = rows + (size_t)place.b * p.record + HEADER + 2 * ((size_t)place.h * p.queries + i);
    return make_float2(at[0], at[1]);
}

#if defined(STORED_16) && !SPLIT
// sum += x · 16 rows of a stage, for an x that is computed: each row of x goes by the power of two that takes its largest number near 2^8, so
// that small ones keep their bits in 16.
__device__ __forceinline__ void add_across(float (&sum)[WIDTHS][4], const float (&x)[2][4], const Across& stage, uint32_t at) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float inverse[2], scaled[2][4];
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) {
        float most = fmaxf(fmaxf(fabsf(x[0][2 * h]), fabsf(x[0][2 * h + 1])), fmaxf(fabsf(x[1][2 * h]), fabsf(x[1][2 * h + 1])));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const uint32_t power = (uint32_t)min(262 - (int)(__float_as_uint(most) >> 23), 253);
        const float factor = __uint_as_float(power << 23);
        inverse[h] = __uint_as_float((254 - power) << 23);
#pragma unroll
        for (uint32_t n = 0; n < 2; n++) {
            scaled[n][2 * h] = x[n][2 * h] * factor;
            scaled[n][2 * h + 1] = x[n][2 * h + 1] * factor;
        }
    }
    uint32_t a[4], rest[4];
    as_left(a, rest, scaled);
#pragma unroll
    for (uint32_t w = 0; w < WIDTHS; w++) {
        const uint32_t* pair = stage[8 * w + g] + at / 2 + t;
        const uint32_t b[2] = {pair[0], pair[4]};
        float part[4] = {};
        mma_sync(Stored(), part, a, b);
        mma_sync(Stored(), part, rest, b);
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            sum[w][c] = fmaf(part[c], inverse[c / 2], sum[w][c]);
        }
    }
}

// The thread's numbers of the rows from `base` on.
__device__ __forceinline__ void store_sums(Stored* __restrict__ x, size_t at, uint32_t stride, uint32_t base, uint32_t end, uint32_t width,
                                           const float (&sum)[2][WIDTHS][4], float factor) {
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        Stored* row = x + at + (size_t)(base + 8 * r) * stride;
#pragma unroll
        for (uint32_t e = 0; e < 2 * WIDTHS; e++) {
            const uint32_t d = 8 * (e / 2) + threadIdx.x % 4 * 2 + e % 2;
            if (base + 8 * r < end && d < width) {
                row[d] = sum[r / 2][e / 2][2 * (r % 2) + e % 2] * factor;
            }
        }
    }
}

__device__ __forceinline__ void backward_q(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v,
                                           const Stored* __restrict__ bias, const Stored* __restrict__ grad_out, const float* __restrict__ rows,
                                           Stored* __restrict__ grad_q, const AttentionParams& params) {
    __shared__ Along sh_k, sh_v;
    __shared__ Across sh_k_pairs;
    const Place place = place_of(params, params.queries);
    if (place.item >= params.batch * params.heads) {
        return;
    }
    const uint32_t length = (uint32_t)rows[(size_t)place.b * params.record];
    const uint32_t draw = draw_of(params, rows, place.b), t = threadIdx.x % 4;
    const uint32_t base = place.from_row + threadIdx.x / 32 * 32 + threadIdx.x % 32 / 4;
    const Tensor tq = tensor_q(params), tk = tensor_k(params), tv = tensor_v(params), to = tensor_out(params);
    const size_t q_at = start(tq, place.b, place.h), k_at = start(tk, place.b, place.h);
    uint32_t x[2][DEPTHS][4], y[2][DEPTHS][4];
    load_lefts(x, q, q_at, tq.row, base, place.to_row, params.width);
    load_lefts(y, grad_out, start(to, place.b, place.h), to.row, base, place.to_row, params.width);
    Interval keys[4];
    float2 own[4];
    float sum[2][WIDTHS][4] = {};
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        const uint32_t i = base + 8 * r;
        keys[r] = i < place.to_row ? keys_of(params, i, length) : Interval{0, 0};
        own[r] = i < place.to_row ? own_row(params, rows, place, i) : make_float2(0.0f, 0.0f);
    }
    const size_t bias_at = (size_t)place.b * params.bias_batch + (size_t)place.h * params.bias_head;
    const uint32_t end = (uint32_t)keys_of(params, place.to_row - 1, length).to;
    for (uint32_t first = (uint32_t)keys_of(params, place.from_row, length).from & ~3u; first < end; first += STAGE) {
        __syncthreads();
        load_along(sh_k, k, k_at, tk, first, end, params.width);
        load_along(sh_v, v, start(tv, place.b, place.h), tv, first, end, params.width);
        load_across(sh_k_pairs, k, k_at, tk, first, end, params.width);
        __syncthreads();
        for (uint32_t at = 0; at < STAGE && first + at < end; at += 16) {
            float s[2][2][4] = {}, dp[2][2][4] = {};
            multiply_along(s, x, sh_k, at);
            multiply_along(dp, y, sh_v, at);
#pragma unroll
            for (uint32_t e = 0; e < 16; e++) {
                const uint32_t m = e / 8, n = e / 4 % 2, c = e % 4, r = 2 * m + c / 2;
                const int j = (int)(first + at + 8 * n + 2 * t + c % 2);
                bool may = j >= keys[r].from && j < keys[r].to;
                float added = 0.0f;
                if (params.flags & BIAS) {
                    added = may ? (float)bias[bias_at + (size_t)(base + 8 * r) * params.keys + j] : 0.0f;
                    may = may && !(added <= EXCLUDED);
                }
                const float factor = params.flags & DROPOUT ? kept(params, draw, place.item, base + 8 * r, (uint32_t)j) : 1.0f;
                s[m][n][c] = may ? exp_of(fmaf(s[m][n][c], params.scale, added) - own[r].x) * fmaf(dp[m][n][c], factor, -own[r].y) : 0.0f;
            }
            add_across(sum[0], s[0], sh_k_pairs, at);
            add_across(sum[1], s[1], sh_k_pairs, at);
        }
    }
    store_sums(grad_q, q_at, tq.row, base, place.to_row, params.width, sum, params.scale);
}
#else
__device__ __forceinline__ void backward_q(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v,
                                           const Stored* __restrict__ bias, const Stored* __restrict__ grad_out, const float* __restrict__ rows,
                                           Stored* __restrict__ grad_q, const AttentionParams& params) {
    __shared__ float4 sh_k[TILE], sh_v[TILE], sh_part_k[PARTS], sh_part_v[PARTS];
    const Place place = place_of(params, params.queries);
    if (place.item >= params.batch * params.heads) {
        return;
    }
    const uint32_t length = (uint32_t)rows[(size_t)place.b * params.record];
    const uint32_t draw = draw_of(params, rows, place.b);
    const uint32_t i = place.row, vecs = VECS * place.parts, tile = tile_steps(place.parts), mine = VECS * place.part;
    const Tensor tq = tensor_q(params), to = tensor_out(params);
    Interval keys = {0, 0};
    Row x = zero_row(), y = zero_row(), sum = zero_row();
    float2 own = make_float2(0.0f, 0.0f);
    if (place.live) {
        keys = keys_of(params, i, length);
        x = load_row(q, start(tq, place.b, place.h) + (size_t)i * tq.row, 4 * mine, params.width, tq.aligned);
        y = load_row(grad_out, start(to, place.b, place.h) + (size_t)i * to.row, 4 * mine, params.width, to.aligned);
        multiply(x, params.scale);
        own = own_row(params, rows, place, i);
    }
    const size_t bias_at = (size_t)place.b * params.bias_batch + (size_t)place.h * params.bias_head + (size_t)i * params.keys;
    const uint32_t end = (uint32_t)keys_of(params, place.to_row - 1, length).to;
    for (uint32_t first = (uint32_t)keys_of(params, place.from_row, length).from & ~3u; first < end; first += tile) {
        __syncthreads();
        load_keys(params, k, v, place, first, end, sh_k, sh_v);
        __syncthreads();
        if (SPLIT) {
            for (uint32_t g = 0; g < tile; g += 4) {
                float s[4], dp[4];
                products(x, sh_k + g * vecs + mine, vecs, s);
                products(y, sh_v + g * vecs + mine, vecs, dp);
                sh_part_k[2 * threadIdx.x + g / 4] = make_float4(s[0], s[1], s[2], s[3]);
                sh_part_v[2 * threadIdx.x + g / 4] = make_float4(dp[0], dp[1], dp[2], dp[3]);
            }
            __syncthreads();
        }
        for (uint32_t g = 0; g < tile && first + g < end; g += 4) {
            const uint32_t at = g * vecs + mine;
            float s[4], dp[4];
            if (SPLIT) {
                joined(sh_part_k, place, g / 4, s);
                joined(sh_part_v, place, g / 4, dp);
            } else {
                products(x, sh_k + at, vecs, s);
                products(y, sh_v + at, vecs, dp);
            }
            if (params.flags & DROPOUT) {
                float factor[4];
                keep_keys(params, draw, place.item, i, first + g, factor);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    dp[e] *= factor[e];
                }
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int j = (int)(first + g) + e;
                bool allowed = j >= keys.from && j < keys.to;
                if (params.flags & BIAS) {
                    const float added = allowed ? bias[bias_at + j] : 0.0f;
                    allowed = allowed && !(added <= EXCLUDED);
                    s[e] += added;
                }
                const float ds = allowed ? exp_of(s[e] - own.x) * (dp[e] - own.y) : 0.0f;
                add(sum, ds, sh_k + at + e * vecs);
            }
        }
    }
    if (place.live) {
        multiply(sum, params.scale);
        store_row(grad_q, start(tq, place.b, place.h) + (size_t)i * tq.row, 4 * mine, params.width, tq.aligned, sum);
    }
}
#endif

#if VECS == 2
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_q_8(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_q, AttentionParams params) {
    backward_q(q, k, v, bias, grad_out, rows, grad_q, params);
}
#elif VECS == 4
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_q_16(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_q, AttentionParams params) {
    backward_q(q, k, v, bias, grad_out, rows, grad_q, params);
}
#elif !SPLIT
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_q_32(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_q, AttentionParams params) {
    backward_q(q, k, v, bias, grad_out, rows, grad_q, params);
}
#else
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_q(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_q, AttentionParams params) {
    backward_q(q, k, v, bias, grad_out, rows, grad_q, params);
}
#endif

// ---- backward, keys and values --------------------------------------------------------------------------------------------

#if defined(STORED_16) && !SPLIT
__device__ __forceinline__ void backward_kv(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v,
                                            const Stored* __restrict__ bias, const Stored* __restrict__ grad_out, const float* __restrict__ rows,
                                            Stored* __restrict__ grad_k, Stored* __restrict__ grad_v, uint32_t wanted, const AttentionParams& params) {
    __shared__ Along sh_q, sh_grad;
    __shared__ Across sh_q_pairs, sh_grad_pairs;
    __shared__ float2 sh_rows[STAGE];
    const Place place = place_of(params, params.keys);
    if (place.item >= params.batch * params.heads) {
        return;
    }
    const uint32_t length = (uint32_t)rows[(size_t)place.b * params.record];
    const uint32_t draw = draw_of(params, rows, place.b), t = threadIdx.x % 4;
    const uint32_t base = place.from_row + threadIdx.x / 32 * 32 + threadIdx.x % 32 / 4, last = min(place.to_row, length);
    const Tensor tq = tensor_q(params), tk = tensor_k(params), tv = tensor_v(params), to = tensor_out(params);
    const size_t q_at = start(tq, place.b, place.h), k_at = start(tk, place.b, place.h), v_at = start(tv, place.b, place.h);
    const size_t out_at = start(to, place.b, place.h);
    uint32_t x[2][DEPTHS][4], y[2][DEPTHS][4];
    load_lefts(x, k, k_at, tk.row, base, last, params.width);
    load_lefts(y, v, v_at, tv.row, base, last, params.width);
    Interval queries[4];
    float sum_k[2][WIDTHS][4] = {}, sum_v[2][WIDTHS][4] = {};
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        queries[r] = base + 8 * r < last ? queries_of(params, base + 8 * r, length) : Interval{0, 0};
    }
    const size_t bias_at = (size_t)place.b * params.bias_batch + (size_t)place.h * params.bias_head;
    // The last key of the block within the length decides where the queries end.
    const uint32_t end = place.from_row < length ? (uint32_t)queries_of(params, last - 1, length).to : 0;
    for (uint32_t first = (uint32_t)queries_of(params, place.from_row, length).from; first < end; first += STAGE) {
        __syncthreads();
        load_along(sh_q, q, q_at, tq, first, end, params.width);
        load_along(sh_grad, grad_out, out_at, to, first, end, params.width);
        load_across(sh_q_pairs, q, q_at, tq, first, end, params.width);
        load_across(sh_grad_pairs, grad_out, out_at, to, first, end, params.width);
        for (uint32_t n = threadIdx.x; n < STAGE; n += WG) {
            sh_rows[n] = first + n < end ? own_row(params, rows, place, first + n) : make_float2(0.0f, 0.0f);
        }
        __syncthreads();
        for (uint32_t at = 0; at < STAGE && first + at < end; at += 16) {
            float s[2][2][4] = {}, dp[2][2][4] = {};
            multiply_along(s, x, sh_q, at);
            multiply_along(dp, y, sh_grad, at);
#pragma unroll
            for (uint32_t e = 0; e < 16; e++) {
                const uint32_t m = e / 8, n = e / 4 % 2, c = e % 4, r = 2 * m + c / 2, column = at + 8 * n + 2 * t + c % 2;
                const int i = (int)(first + column);
                bool may = i >= queries[r].from && i < queries[r].to;
                float added = 0.0f;
                if (params.flags & BIAS) {
                    added = may ? (float)bias[bias_at + (size_t)i * params.keys + base + 8 * r] : 0.0f;
                    may = may && !(added <= EXCLUDED);
                }
                const float2 own = sh_rows[column];
                const float factor = params.flags & DROPOUT ? kept(params, draw, place.item, (uint32_t)i, base + 8 * r) : 1.0f;
                const float p = may ? exp_of(fmaf(s[m][n][c], params.scale, added) - own.x) : 0.0f;
                s[m][n][c] = may ? p * fmaf(dp[m][n][c], factor, -own.y) : 0.0f;
                dp[m][n][c] = p * factor;
            }
#pragma unroll
            for (uint32_t m = 0; m < 2; m++) {
                add_across(sum_k[m], s[m], sh_q_pairs, at);
                add_across(sum_v[m], dp[m], sh_grad_pairs, at);
            }
        }
    }
    if (wanted & GRAD_K) {
        store_sums(grad_k, k_at, tk.row, base, place.to_row, params.width, sum_k, params.scale);
    }
    if (wanted & GRAD_V) {
        store_sums(grad_v, v_at, tv.row, base, place.to_row, params.width, sum_v, 1.0f);
    }
}
#else
// Loads queries `first` … of the tile: scale·q, grad_out, (lse, delta); 0 from `end` on.
__device__ __forceinline__ void load_queries(const AttentionParams& p, const Stored* __restrict__ q, const Stored* __restrict__ grad_out,
                                             const float* __restrict__ rows, const Place& place, uint32_t first, uint32_t end, float4* sh_q,
                                             float4* sh_grad, float2* sh_rows) {
    const uint32_t vecs = VECS * place.parts, tile = tile_steps(place.parts);
    const Tensor tq = tensor_q(p), to = tensor_out(p);
    const size_t q_at = start(tq, place.b, place.h), out_at = start(to, place.b, place.h);
    for (uint32_t n = threadIdx.x; n < tile * vecs; n += WG) {
        const uint32_t i = first + n / vecs, d = 4 * (n % vecs);
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f), y = x;
        if (i < end) {
            x = load4(q, q_at + (size_t)i * tq.row, d, p.width, tq.aligned);
            y = load4(grad_out, out_at + (size_t)i * to.row, d, p.width, to.aligned);
        }
        sh_q[n] = make_float4(x.x * p.scale, x.y * p.scale, x.z * p.scale, x.w * p.scale);
        sh_grad[n] = y;
    }
    for (uint32_t n = threadIdx.x; n < tile; n += WG) {
        sh_rows[n] = first + n < end ? own_row(p, rows, place, first + n) : make_float2(0.0f, 0.0f);
    }
}

// Queries at once: four rows of 32 numbers beside a key's own four would not fit the registers.
constexpr int GROUP = VECS == 8 && !SPLIT ? 1 : 4;

__device__ __forceinline__ void backward_kv(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v,
                                            const Stored* __restrict__ bias, const Stored* __restrict__ grad_out, const float* __restrict__ rows,
                                            Stored* __restrict__ grad_k, Stored* __restrict__ grad_v, uint32_t wanted, const AttentionParams& params) {
    __shared__ float4 sh_q[TILE], sh_grad[TILE], sh_part_q[PARTS], sh_part_grad[PARTS];
    __shared__ float2 sh_rows[TILE / (SPLIT ? 8 : VECS)];
    const Place place = place_of(params, params.keys);
    if (place.item >= params.batch * params.heads) {
        return;
    }
    const uint32_t length = (uint32_t)rows[(size_t)place.b * params.record];
    const uint32_t draw = draw_of(params, rows, place.b);
    const uint32_t j = place.row, vecs = VECS * place.parts, tile = tile_steps(place.parts), mine = VECS * place.part;
    const Tensor tk = tensor_k(params), tv = tensor_v(params);
    Interval queries = {0, 0};
    Row x = zero_row(), y = zero_row(), sum_k = zero_row(), sum_v = zero_row();
    if (place.live) {
        queries = queries_of(params, j, length);
        if (queries.from < queries.to) {
            x = load_row(k, start(tk, place.b, place.h) + (size_t)j * tk.row, 4 * mine, params.width, tk.aligned);
            y = load_row(v, start(tv, place.b, place.h) + (size_t)j * tv.row, 4 * mine, params.width, tv.aligned);
        }
    }
    const size_t bias_at = (size_t)place.b * params.bias_batch + (size_t)place.h * params.bias_head + j;
    // The last key of the block within the length decides where the queries end.
    const uint32_t end = place.from_row < length ? (uint32_t)queries_of(params, min(place.to_row, length) - 1, length).to : 0;
    for (uint32_t first = (uint32_t)queries_of(params, place.from_row, length).from; first < end; first += tile) {
        __syncthreads();
        load_queries(params, q, grad_out, rows, place, first, end, sh_q, sh_grad, sh_rows);
        __syncthreads();
        if (SPLIT) {
            for (uint32_t g = 0; g < tile; g += 4) {
                float s[4], dp[4];
                products(x, sh_q + g * vecs + mine, vecs, s);
                products(y, sh_grad + g * vecs + mine, vecs, dp);
                sh_part_q[2 * threadIdx.x + g / 4] = make_float4(s[0], s[1], s[2], s[3]);
                sh_part_grad[2 * threadIdx.x + g / 4] = make_float4(dp[0], dp[1], dp[2], dp[3]);
            }
            __syncthreads();
        }
        for (uint32_t g = 0; g < tile && first + g < end; g += GROUP) {
            const uint32_t at = g * vecs + mine;
            float s[4], dp[4];
            if (SPLIT) {
                joined(sh_part_q, place, g / 4, s);
                joined(sh_part_grad, place, g / 4, dp);
            } else if (GROUP == 1) {
                s[0] = dot(x, sh_q + at);
                dp[0] = dot(y, sh_grad + at);
            } else {
                products(x, sh_q + at, vecs, s);
                products(y, sh_grad + at, vecs, dp);
            }
#pragma unroll
            for (int e = 0; e < GROUP; e++) {
                const int i = (int)(first + g) + e;
                bool allowed = i >= queries.from && i < queries.to;
                if (params.flags & BIAS) {
                    const float added = allowed ? bias[bias_at + (size_t)i * params.keys] : 0.0f;
                    allowed = allowed && !(added <= EXCLUDED);
                    s[e] += added;
                }
                const float2 own = sh_rows[g + e];
                const float factor = params.flags & DROPOUT ? kept(params, draw, place.item, (uint32_t)i, j) : 1.0f;
                const float p = allowed ? exp_of(s[e] - own.x) : 0.0f;
                add(sum_k, p * fmaf(dp[e], factor, -own.y), sh_q + at + e * vecs);
                add(sum_v, p * factor, sh_grad + at + e * vecs);
            }
        }
    }
    if (place.live) {
        if (wanted & GRAD_K) {
            store_row(grad_k, start(tk, place.b, place.h) + (size_t)j * tk.row, 4 * mine, params.width, tk.aligned, sum_k);
        }
        if (wanted & GRAD_V) {
            store_row(grad_v, start(tv, place.b, place.h) + (size_t)j * tv.row, 4 * mine, params.width, tv.aligned, sum_v);
        }
    }
}
#endif

#if VECS == 2
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv_8(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_k, Stored* __restrict__ grad_v, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_k, grad_v, GRAD_K | GRAD_V, params);
}
#elif VECS == 4
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv_16(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_k, Stored* __restrict__ grad_v, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_k, grad_v, GRAD_K | GRAD_V, params);
}
#elif !SPLIT
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv_32(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_k, Stored* __restrict__ grad_v, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_k, grad_v, GRAD_K | GRAD_V, params);
}
#else
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_k, Stored* __restrict__ grad_v, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_k, grad_v, GRAD_K | GRAD_V, params);
}
#endif

#if VECS == 2
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv_packed_8(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_kv, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_kv, grad_kv, params.flags, params);
}
#elif VECS == 4
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv_packed_16(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_kv, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_kv, grad_kv, params.flags, params);
}
#elif !SPLIT
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv_packed_32(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_kv, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_kv, grad_kv, params.flags, params);
}
#else
extern "C" __global__ void __launch_bounds__(WG)
    attention_backward_kv_packed(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                      const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_kv, AttentionParams params) {
    backward_kv(q, k, v, bias, grad_out, rows, grad_kv, grad_kv, params.flags, params);
}
#endif

// ---- the bias' gradient -----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    attention_grad_bias(const Stored* __restrict__ q, const Stored* __restrict__ k, const Stored* __restrict__ v, const Stored* __restrict__ bias,
                        const Stored* __restrict__ grad_out, const float* __restrict__ rows, Stored* __restrict__ grad_bias, AttentionParams params) {
    const uint64_t n = (uint64_t)group_index() * WG + threadIdx.x;
    const uint32_t items = params.bias_batch > 0 ? params.batch : 1, heads = params.bias_head > 0 ? params.heads : 1;
    if (n >= (uint64_t)items * heads * params.queries * params.keys) {
        return;
    }
    const uint32_t j = n % params.keys, row = n / params.keys, i = row % params.queries;
    const Tensor tq = tensor_q(params), tk = tensor_k(params), tv = tensor_v(params), to = tensor_out(params);
    float sum = params.flags & ADD ? grad_bias[n] : 0.0f;
    for (uint32_t b = row / params.queries / heads; b < params.batch; b += items) {
        for (uint32_t h = row / params.queries % heads; h < params.heads; h += heads) {
            const Interval keys = keys_of(params, i, (uint32_t)rows[(size_t)b * params.record]);
            const float added = bias[(size_t)b * params.bias_batch + (size_t)h * params.bias_head + (size_t)i * params.keys + j];
            if ((int)j < keys.from || (int)j >= keys.to || added <= EXCLUDED) {
                continue;
            }
            const size_t q_at = start(tq, b, h) + (size_t)i * tq.row, k_at = start(tk, b, h) + (size_t)j * tk.row;
            const size_t v_at = start(tv, b, h) + (size_t)j * tv.row, out_at = start(to, b, h) + (size_t)i * to.row;
            float s = 0.0f, dp = 0.0f;
            for (uint32_t d = 0; d < params.width; d += 4) {
                const float4 x = load4(q, q_at, d, params.width, tq.aligned), y = load4(k, k_at, d, params.width, tk.aligned);
                const float4 g = load4(grad_out, out_at, d, params.width, to.aligned), z = load4(v, v_at, d, params.width, tv.aligned);
                s = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, s))));
                dp = fmaf(g.w, z.w, fmaf(g.z, z.z, fmaf(g.y, z.y, fmaf(g.x, z.x, dp))));
            }
            const float* own = rows + (size_t)b * params.record + HEADER + 2 * ((size_t)h * params.queries + i);
            const float factor = params.flags & DROPOUT ? kept(params, draw_of(params, rows, b), b * params.heads + h, i, j) : 1.0f;
            sum += expf(fmaf(s, params.scale, added) - own[0]) * fmaf(dp, factor, -own[1]);
        }
    }
    grad_bias[n] = sum;
}

// ---- weights --------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    attention_weights(const Stored* __restrict__ q, const Stored* __restrict__ k, const float* __restrict__ lse, const Stored* __restrict__ bias,
                      const uint32_t* __restrict__ kv_len, Stored* __restrict__ weights, AttentionParams params) {
    const uint64_t n = (uint64_t)group_index() * WG + threadIdx.x;
    if (n >= (uint64_t)params.batch * params.heads * params.queries * params.keys) {
        return;
    }
    const uint32_t j = n % params.keys;
    const uint64_t row = n / params.keys;
    const uint32_t i = row % params.queries, h = row / params.queries % params.heads, b = row / params.queries / params.heads;
    const Interval keys = keys_of(params, i, params.flags & LENGTHS ? min(params.keys, kv_len[b]) : params.keys);
    const float added = params.flags & BIAS ? bias[(size_t)b * params.bias_batch + (size_t)h * params.bias_head + (size_t)i * params.keys + j] : 0.0f;
    float weight = 0.0f;
    if ((int)j >= keys.from && (int)j < keys.to && !(added <= EXCLUDED)) {
        const Tensor tq = tensor_q(params), tk = tensor_k(params);
        const size_t q_at = start(tq, b, h) + (size_t)i * tq.row, k_at = start(tk, b, h) + (size_t)j * tk.row;
        float s = 0.0f;
        for (uint32_t d = 0; d < params.width; d += 4) {
            const float4 x = load4(q, q_at, d, params.width, tq.aligned), y = load4(k, k_at, d, params.width, tk.aligned);
            s = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, s))));
        }
        weight = expf(fmaf(s, params.scale, added) - lse[row]);
    }
    weights[n] = weight;
}
