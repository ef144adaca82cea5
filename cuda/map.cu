// Element-wise functions, fill and dropout. Maths, shapes and source: kernels/map.rs.
//   map, fill   grid ⌈count / (WG·PER)⌉   thread t of a block takes elements t, t + WG, …: PER loads in flight, all coalesced
//   dropout     grid ⌈count / (WG·4)⌉     thread = four neighbours, one Philox counter

struct MapParams {
    uint32_t code;
    uint32_t arity;
    uint32_t add;
    uint32_t count;
    uint32_t rank;
    float p;
    float q;
    uint32_t a_at;
    uint32_t b_at;
    uint32_t c_at;
    uint32_t y_at;
    uint32_t n0;
    uint32_t a0;
    uint32_t b0;
    uint32_t c0;
    uint32_t y0;
    uint32_t n1;
    uint32_t a1;
    uint32_t b1;
    uint32_t c1;
    uint32_t y1;
    uint32_t n2;
    uint32_t a2;
    uint32_t b2;
    uint32_t c2;
    uint32_t y2;
    uint32_t n3;
    uint32_t a3;
    uint32_t b3;
    uint32_t c3;
    uint32_t y3;
    uint32_t n4;
    uint32_t a4;
    uint32_t b4;
    uint32_t c4;
    uint32_t y4;
    uint32_t n5;
    uint32_t a5;
    uint32_t b5;
    uint32_t c5;
    uint32_t y5;
};

struct FillParams {
    uint32_t count;
    float value;
};

struct DropoutParams {
    uint32_t count;
    uint32_t block;
    uint32_t block_high;
    uint32_t stream;
    uint32_t seed;
    uint32_t seed_high;
    uint32_t threshold;
    float p;
};

enum MapFunction : uint32_t {
    MAP_COPY = 0,
    MAP_NEG = 1,
    MAP_EXP = 2,
    MAP_LOG = 3,
    MAP_LOG1P = 4,
    MAP_SQRT = 5,
    MAP_SQUARE = 6,
    MAP_ABS = 7,
    MAP_SIGN = 8,
    MAP_RECIPROCAL = 9,
    MAP_RELU = 10,
    MAP_GELU = 11,
    MAP_TANH = 12,
    MAP_SIGMOID = 13,
    MAP_SILU = 14,
    MAP_SOFTPLUS = 15,
    MAP_CLAMP = 16,
    MAP_AFFINE = 17,
    MAP_POWER = 18,
    MAP_STEP = 19,
    MAP_SHARE = 20,
    MAP_LOG_D = 32,
    MAP_LOG1P_D = 33,
    MAP_SQRT_D = 34,
    MAP_SQUARE_D = 35,
    MAP_ABS_D = 36,
    MAP_RECIPROCAL_D = 37,
    MAP_RELU_D = 38,
    MAP_GELU_D = 39,
    MAP_TANH_D = 40,
    MAP_SIGMOID_D = 41,
    MAP_SILU_D = 42,
    MAP_SOFTPLUS_D = 43,
    MAP_CLAMP_D = 44,
    MAP_POWER_D = 45,
    MAP_ADD = 64,
    MAP_SUB = 65,
    MAP_MUL = 66,
    MAP_DIV = 67,
    MAP_MIN = 68,
    MAP_MAX = 69,
    MAP_GLU = 70,
    MAP_REST = 71,
    MAP_DIV_B = 96,
    MAP_MIN_A = 97,
    MAP_MIN_B = 98,
    MAP_MAX_A = 99,
    MAP_MAX_B = 100,
    MAP_GLU_B = 101,
    MAP_MIX = 102,
    MAP_MIX_C = 103,
};

// ---- functions --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float map_sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// Normal distribution function.
__device__ __forceinline__ float map_phi(float x) {
    return 0.5f * erfcf(-0.70710677f * x);
}

__device__ __forceinline__ float map_sign(float x) {
    return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f);
}

// One copy of the switch for the PER elements of a thread.
__device__ __noinline__ float map_value_of(uint32_t code, float p, float q, float a, float b, float c) {
    switch (code) {
        case MAP_COPY: return a;
        case MAP_NEG: return -a;
        case MAP_EXP: return expf(a);
        case MAP_LOG: return logf(a);
        case MAP_LOG1P: return log1pf(a);
        case MAP_SQRT: return sqrtf(a);
        case MAP_SQUARE: return a * a;
        case MAP_ABS: return fabsf(a);
        case MAP_SIGN: return map_sign(a);
        case MAP_RECIPROCAL: return 1.0f / a;
        case MAP_RELU: return a > 0.0f ? a : 0.0f;
        case MAP_GELU: return a * map_phi(a);
        case MAP_TANH: return tanhf(a);
        case MAP_SIGMOID: return map_sigmoid(a);
        case MAP_SILU: return a * map_sigmoid(a);
        case MAP_SOFTPLUS: return (a > 0.0f ? a : 0.0f) + log1pf(expf(-fabsf(a)));
        case MAP_CLAMP: return a < p ? p : a > q ? q : a;
        case MAP_AFFINE: return p * a + q;
        case MAP_POWER: return powf(a, p);
        case MAP_STEP: return a > 0.0f ? 1.0f : 0.0f;
        case MAP_SHARE: return a / (p + q);
        case MAP_LOG_D: return b / a;
        case MAP_LOG1P_D: return b / (1.0f + a);
        case MAP_SQRT_D: return b / (2.0f * a);
        case MAP_SQUARE_D: return 2.0f * a * b;
        case MAP_ABS_D: return map_sign(a) * b;
        case MAP_RECIPROCAL_D: return -(b * a * a);
        case MAP_RELU_D: return a > 0.0f ? b : 0.0f;
        case MAP_GELU_D: return b * (map_phi(a) + a * 0.3989423f * expf(-0.5f * (a * a)));
        case MAP_TANH_D: return b * (1.0f - a * a);
        case MAP_SIGMOID_D: return b * a * (1.0f - a);
        case MAP_SILU_D: return b * map_sigmoid(a) * (1.0f + a * map_sigmoid(-a));
        case MAP_SOFTPLUS_D: return b * map_sigmoid(a);
        case MAP_CLAMP_D: return a >= p && a <= q ? b : 0.0f;
        case MAP_POWER_D: return p == 0.0f ? 0.0f : b * p * powf(a, p - 1.0f);
        case MAP_ADD: return a + b;
        case MAP_SUB: return a - b;
        case MAP_MUL: return a * b;
        case MAP_DIV: return a / b;
        case MAP_MIN: return b < a ? b : a;
        case MAP_MAX: return b > a ? b : a;
        case MAP_GLU: return a * map_sigmoid(b);
        case MAP_REST: return a * (1.0f - b);
        case MAP_DIV_B: return -(c * (a / b) / b);
        case MAP_MIN_A: return a <= b ? c : 0.0f;
        case MAP_MIN_B: return b < a ? c : 0.0f;
        case MAP_MAX_A: return a >= b ? c : 0.0f;
        case MAP_MAX_B: return b > a ? c : 0.0f;
        case MAP_GLU_B: return c * a * map_sigmoid(b) * map_sigmoid(-b);
        case MAP_MIX: return a * c + b * (1.0f - c);
        case MAP_MIX_C: return c * (a - b);
        default: return a;
    }
}

// ---- map --------------------------------------------------------------------------------------------------------------

struct MapPlace {
    uint32_t a, b, c, y;
};

__device__ __forceinline__ void map_step_by(MapPlace& at, uint32_t i, uint32_t a, uint32_t b, uint32_t c, uint32_t y) {
    at.a += i * a;
    at.b += i * b;
    at.c += i * c;
    at.y += i * y;
}

// Where element i lies in a, b, c and y.
__device__ __forceinline__ MapPlace map_place(const MapParams& p, uint32_t i) {
    MapPlace at = {p.a_at, p.b_at, p.c_at, p.y_at};
    if (p.rank == 1) {
        map_step_by(at, i, p.a0, p.b0, p.c0, p.y0);
        return at;
    }
    uint32_t rest = i / p.n0;
    map_step_by(at, i - rest * p.n0, p.a0, p.b0, p.c0, p.y0);
#define MAP_DIMENSION(d)                                                                      \
    if (p.rank > d) {                                                                     \
        const uint32_t next = rest / p.n##d;                                              \
        map_step_by(at, rest - next * p.n##d, p.a##d, p.b##d, p.c##d, p.y##d);                \
        rest = next;                                                                      \
    }
    MAP_DIMENSION(1)
    MAP_DIMENSION(2)
    MAP_DIMENSION(3)
    MAP_DIMENSION(4)
    MAP_DIMENSION(5)
#undef MAP_DIMENSION
    return at;
}

extern "C" __global__ void __launch_bounds__(WG)
    map(const float* __restrict__ a, const float* __restrict__ b, const float* __restrict__ c, float* __restrict__ y, MapParams params) {
    const uint32_t group = group_index();
    if (group >= (params.count + WG * PER - 1) / (WG * PER)) {
        return;
    }
    const uint32_t first = group * WG * PER + threadIdx.x;
    MapPlace at[PER];
    float va[PER], vb[PER], vc[PER];
#pragma unroll
    for (int k = 0; k < PER; k++) {
        const uint32_t i = first + k * WG;
        at[k] = map_place(params, i < params.count ? i : 0);
        va[k] = a[at[k].a];
        vb[k] = params.arity > 1 ? b[at[k].b] : va[k];
        vc[k] = params.arity > 2 ? c[at[k].c] : va[k];
    }
#pragma unroll
    for (int k = 0; k < PER; k++) {
        if (first + k * WG < params.count) {
            float v = map_value_of(params.code, params.p, params.q, va[k], vb[k], vc[k]);
            v = vc[k] != vc[k] ? vc[k] : v;
            v = vb[k] != vb[k] ? vb[k] : v;
            v = va[k] != va[k] ? va[k] : v;
            y[at[k].y] = params.add ? y[at[k].y] + v : v;
        }
    }
}

// ---- fill -------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) fill(float* __restrict__ y, FillParams params) {
    const uint32_t group = group_index();
    if (group >= (params.count + WG * PER - 1) / (WG * PER)) {
        return;
    }
    const uint32_t first = group * WG * PER + threadIdx.x;
#pragma unroll
    for (int k = 0; k < PER; k++) {
        if (first + k * WG < params.count) {
            y[first + k * WG] = params.value;
        }
    }
}

// ---- dropout ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    dropout(const float* __restrict__ x, const uint32_t* __restrict__ step, float* __restrict__ y, DropoutParams params) {
    const uint32_t own = group_index() * WG + threadIdx.x;
    if (own >= (params.count + PER - 1) / PER) {
        return;
    }
    const uint64_t block = (params.block | ((uint64_t)params.block_high << 32)) + own;
    uint32_t word[4] = {(uint32_t)block, (uint32_t)(block >> 32), params.stream, step[0]};
    philox4x32(word, params.seed, params.seed_high);
    const bool kept = params.p < 1.0f;
    const float scale = 1.0f / (kept ? 1.0f - params.p : 1.0f);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t i = 4 * own + k;
        if (i < params.count) {
            y[i] = kept && word[k] >= params.threshold ? x[i] * scale : 0.0f;
        }
    }
}
