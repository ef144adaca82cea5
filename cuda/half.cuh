// Reals stored in 16 bits, and products of tiles of them on tensor cores. Units whose arguments are f16 or bf16 have this after common.cuh;
// `Stored` is the element type of the unit, Half or Bfloat. Sums and everything else are f32.
//   f16   cvt by PTX; mma.sync m16n8k16 from sm_80, two m16n8k8 on sm_75
//   bf16  round to nearest even in integers on every architecture; mma.sync m16n8k16 from sm_80
//   older architectures take the same fragments through shuffles: right, not fast
// cuda-host has the conversions and mma.sync in simt.hpp, with the fragment layouts of the PTX ISA.

#ifdef __CUDACC_RTC__
typedef unsigned short uint16_t;

__device__ __forceinline__ float cvt_f32_f16(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ uint16_t cvt_rn_f16_f32(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

struct Half {
    uint16_t bits;

    __device__ __forceinline__ static float largest() {
        return 65504.0f;
    }
    __device__ __forceinline__ static uint16_t bits_of(float x) {
        return cvt_rn_f16_f32(x);
    }
    __device__ __forceinline__ static float value_of(uint32_t bits) {
        return cvt_f32_f16((uint16_t)bits);
    }
    __device__ __forceinline__ operator float() const {
        return value_of(bits);
    }
    __device__ __forceinline__ Half& operator=(float x) {
        bits = bits_of(x);
        return *this;
    }
};

struct Bfloat {
    uint16_t bits;

    __device__ __forceinline__ static float largest() {
        return 3.38953139e38f;
    }
    __device__ __forceinline__ static uint16_t bits_of(float x) {
        const uint32_t word = __float_as_uint(x);
        const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
        return (uint16_t)((nan ? word | 0x400000u : word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
    __device__ __forceinline__ static float value_of(uint32_t bits) {
        return __uint_as_float(bits << 16);
    }
    __device__ __forceinline__ operator float() const {
        return value_of(bits);
    }
    __device__ __forceinline__ Bfloat& operator=(float x) {
        bits = bits_of(x);
        return *this;
    }
};

// Two neighbours in a word, the first in the low bits.
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
    return Stored::bits_of(first) | (uint32_t)Stored::bits_of(second) << 16;
}

__device__ __forceinline__ float first_of(uint32_t pair) {
    return Stored::value_of(pair & 0xffffu);
}

__device__ __forceinline__ float second_of(uint32_t pair) {
    return Stored::value_of(pair >> 16);
}

// Four neighbours at a multiple of four.
__device__ __forceinline__ float4 quad_at(const Stored* __restrict__ x) {
    const uint2 quad = *reinterpret_cast<const uint2*>(x);
    return make_float4(first_of(quad.x), second_of(quad.x), first_of(quad.y), second_of(quad.y));
}

__device__ __forceinline__ void put_quad(Stored* __restrict__ x, float4 y) {
    *reinterpret_cast<uint2*>(x) = make_uint2(pair_of(y.x, y.y), pair_of(y.z, y.w));
}

// Four neighbours from `x + at`, of which `count` are there.
__device__ __forceinline__ float4 load_quad(const Stored* __restrict__ x, uint64_t at, uint32_t count) {
    if (count >= 4 && ((uint64_t)(x + at) & 7) == 0) {
        return quad_at(x + at);
    }
    return make_float4(count > 0 ? (float)x[at] : 0.0f, count > 1 ? (float)x[at + 1] : 0.0f, count > 2 ? (float)x[at + 2] : 0.0f,
                       count > 3 ? (float)x[at + 3] : 0.0f);
}

// ---- mma.sync: d [16,8] += a [16,16] · b [16,8] by a warp -------------------------------------------------------------------
//
// Lane l, g = l / 4, t = l % 4:  a = (g,2t…) (g+8,2t…) (g,2t+8…) (g+8,2t+8…), b = (2t…,g) (2t+8…,g), two neighbours of the depth in a word;
// d = (g,2t) (g,2t+1) (g+8,2t) (g+8,2t+1).

// The same through shuffles, products and sums in f32 in the order of the depth.
__device__ __forceinline__ void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (uint32_t k = 0; k < 8; k++) {
        const uint32_t high = k / 4, at = k % 4;
        const uint32_t top = __shfl_sync(0xffffffffu, a[2 * high], 4 * g + at), low = __shfl_sync(0xffffffffu, a[2 * high + 1], 4 * g + at);
        const uint32_t left = __shfl_sync(0xffffffffu, b[high], 8 * t + at), right = __shfl_sync(0xffffffffu, b[high], 8 * t + 4 + at);
        d[0] = fmaf(second_of(top), second_of(left), fmaf(first_of(top), first_of(left), d[0]));
        d[1] = fmaf(second_of(top), second_of(right), fmaf(first_of(top), first_of(right), d[1]));
        d[2] = fmaf(second_of(low), second_of(left), fmaf(first_of(low), first_of(left), d[2]));
        d[3] = fmaf(second_of(low), second_of(right), fmaf(first_of(low), first_of(right), d[3]));
    }
}

#ifdef __CUDACC_RTC__
__device__ __forceinline__ void mma_sync(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
#pragma unroll
    for (int h = 0; h < 2; h++) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(b[h]));
    }
#else
    mma_by_shuffles(d, a, b);
#endif
}

__device__ __forceinline__ void mma_sync(Bfloat, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_by_shuffles(d, a, b);
#endif
}
#else
__device__ __forceinline__ void mma_sync(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
    simt::mma(d, a, b, cvt_f32_f16, file, line);
}

__device__ __forceinline__ void mma_sync(Bfloat, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
    simt::mma(d, a, b, [](uint16_t bits) { return Bfloat::value_of(bits); }, file, line);
}
#endif

// ---- numbers of more bits as a rounded value and its rest ------------------------------------------------------------------

// x rounded, where finite to the largest finite number at most.
__device__ __forceinline__ float rounded_inside(float x) {
    const float y = Stored::value_of(Stored::bits_of(x));
    return fabsf(y) > Stored::largest() && fabsf(x) <= 3.40282347e38f ? copysignf(Stored::largest(), x) : y;
}

// What is left of x after rounding; nothing of infinities and NaN.
__device__ __forceinline__ float rest_of(float x, float rounded) {
    return fabsf(rounded) <= Stored::largest() ? x - rounded : 0.0f;
}

// ---- tiles of a product, as in common.cuh, by mma.sync ---------------------------------------------------------------------

#ifdef ROW_QUADS
// A warp has 2 × COLUMN_TILES products of 16 × 8; their sums go through shared memory to the threads' own rows and columns at the end.
#define ROW_TILES 2
#define COLUMN_TILES (2 * THREAD_QUADS)
// Words of a row of a step, 8 of them used: fragments of a warp then lie in different banks.
#define STEP_WORDS 12

// A step of left or of right as it lies in shared memory: pairs along the depth.
template <uint32_t QUADS>
struct HalfStep {
    uint32_t pair[4 * QUADS][STEP_WORDS];
};

struct Steps {
    HalfStep<ROW_QUADS> left[2], rest[2];
    HalfStep<COL_QUADS> right[2];
};

union TileMemory {
    Steps steps;
    float sums[4 * ROW_QUADS][4 * COL_QUADS + 4];
};

__device__ __forceinline__ float value_at(const HalfStep<ROW_QUADS>& step, uint32_t k, uint32_t row) {
    const uint32_t pair = step.pair[row][k / 2];
    return k % 2 == 0 ? first_of(pair) : second_of(pair);
}

// A step of left: rounded to 16 bits, and what that leaves where left is not exact.
struct LeftStep {
    const HalfStep<ROW_QUADS>&left, &rest;
    bool exact;
};

__device__ __forceinline__ float4 step_quad(const LeftStep& step, uint32_t k, uint32_t quad) {
    float x[4];
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        x[r] = value_at(step.left, k, 4 * quad + r);
        if (!step.exact) {
            x[r] += value_at(step.rest, k, 4 * quad + r);
        }
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}

// Two steps of depth of four rows.
struct QuadPair {
    float4 first, second;
};

template <uint32_t QUADS, bool ALONG_DEPTH, class Load>
__device__ __forceinline__ void load_pairs(QuadPair (&next)[(8 * QUADS + WG - 1) / WG], uint32_t depth, Load load) {
#pragma unroll
    for (uint32_t i = 0; i < (8 * QUADS + WG - 1) / WG; i++) {
        const uint32_t s = threadIdx.x + i * WG;
        if (s < 8 * QUADS) {
            const uint32_t k = depth + 2 * (ALONG_DEPTH ? s % 8 : s / QUADS), at = 4 * (ALONG_DEPTH ? s / 8 : s % QUADS);
            next[i].first = load(k, at);
            next[i].second = load(k + 1, at);
        }
    }
}

template <uint32_t QUADS, bool ALONG_DEPTH>
__device__ __forceinline__ void store_pairs(const QuadPair (&next)[(8 * QUADS + WG - 1) / WG], HalfStep<QUADS>& to, HalfStep<QUADS>* rest) {
#pragma unroll
    for (uint32_t i = 0; i < (8 * QUADS + WG - 1) / WG; i++) {
        const uint32_t s = threadIdx.x + i * WG;
        if (s < 8 * QUADS) {
            const uint32_t k = ALONG_DEPTH ? s % 8 : s / QUADS, at = 4 * (ALONG_DEPTH ? s / 8 : s % QUADS);
            const float first[4] = {next[i].first.x, next[i].first.y, next[i].first.z, next[i].first.w};
            const float second[4] = {next[i].second.x, next[i].second.y, next[i].second.z, next[i].second.w};
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                if (rest != nullptr) {
                    const float a = rounded_inside(first[r]), b = rounded_inside(second[r]);
                    to.pair[at + r][k] = pair_of(a, b);
                    rest->pair[at + r][k] = pair_of(rest_of(first[r], a), rest_of(second[r], b));
                } else {
                    to.pair[at + r][k] = pair_of(first[r], second[r]);
                }
            }
        }
    }
}

__device__ __forceinline__ void left_fragment(uint32_t (&a)[4], const HalfStep<ROW_QUADS>& step, uint32_t row, uint32_t t) {
    a[0] = step.pair[row][t];
    a[1] = step.pair[row + 8][t];
    a[2] = step.pair[row][t + 4];
    a[3] = step.pair[row + 8][t + 4];
}

__device__ __forceinline__ void add_step(float (&sums)[ROW_TILES][COLUMN_TILES][4], const HalfStep<ROW_QUADS>& left,
                                         const HalfStep<COL_QUADS>& right, uint32_t row, uint32_t col, uint32_t t) {
    uint32_t b[COLUMN_TILES][2];
#pragma unroll
    for (uint32_t n = 0; n < COLUMN_TILES; n++) {
        b[n][0] = right.pair[col + 8 * n][t];
        b[n][1] = right.pair[col + 8 * n][t + 4];
    }
#pragma unroll
    for (uint32_t m = 0; m < ROW_TILES; m++) {
        uint32_t a[4];
        left_fragment(a, left, row + 16 * m, t);
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
            mma_sync(Stored(), sums[m][n], a, b[n]);
        }
    }
}

// As tile_product of common.cuh. `exact`: left is what was stored; else it is computed, and multiplied as a rounded value and its rest, so that
// it counts with the bits of both.
template <bool LEFT_ALONG, bool RIGHT_ALONG, class Left, class Right, class Each>
__device__ __forceinline__ void stored_product(Tile& tile, TileMemory& sh, uint32_t first, uint32_t last, bool exact, Left left, Right right,
                                               Each each) {
    Steps& steps = sh.steps;
    QuadPair next_left[(8 * ROW_QUADS + WG - 1) / WG], next_right[(8 * COL_QUADS + WG - 1) / WG];
    load_pairs<ROW_QUADS, LEFT_ALONG>(next_left, first, left);
    load_pairs<COL_QUADS, RIGHT_ALONG>(next_right, first, right);
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t across = 4 * COL_QUADS / (8 * COLUMN_TILES), row = warp / across * 16 * ROW_TILES + g, col = warp % across * 8 * COLUMN_TILES;
    float sums[ROW_TILES][COLUMN_TILES][4] = {};
    uint32_t buffer = 0;
    __syncthreads();  // an earlier product may still read its sums
    for (uint32_t d = first; d < last; d += STEP) {
        store_pairs<ROW_QUADS, LEFT_ALONG>(next_left, steps.left[buffer], exact ? nullptr : &steps.rest[buffer]);
        store_pairs<COL_QUADS, RIGHT_ALONG>(next_right, steps.right[buffer], nullptr);
        __syncthreads();
        if (d + STEP < last) {
            load_pairs<ROW_QUADS, LEFT_ALONG>(next_left, d + STEP, left);
            load_pairs<COL_QUADS, RIGHT_ALONG>(next_right, d + STEP, right);
        }
        add_step(sums, steps.left[buffer], steps.right[buffer], row, col + g, t);
        if (!exact) {
            add_step(sums, steps.rest[buffer], steps.right[buffer], row, col + g, t);
        }
        each(LeftStep{steps.left[buffer], steps.rest[buffer], exact});
        buffer ^= 1;
    }
    __syncthreads();  // the sums overwrite the steps
#pragma unroll
    for (uint32_t m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
            float* top = &sh.sums[row + 16 * m][col + 8 * n + 2 * t];
            float* low = &sh.sums[row + 16 * m + 8][col + 8 * n + 2 * t];
            top[0] = sums[m][n][0];
            top[1] = sums[m][n][1];
            low[0] = sums[m][n][2];
            low[1] = sums[m][n][3];
        }
    }
    __syncthreads();
#pragma unroll
    for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            tile.at[r][j] += sh.sums[thread_row() + r][thread_col() + j];
        }
    }
}

struct NothingEach {
    __device__ __forceinline__ void operator()(const LeftStep&) const {}
};
#endif
