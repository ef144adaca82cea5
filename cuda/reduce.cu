// Sums, means and maxima over axes. Maths, shapes and source: kernels/reduce.rs.
//   reduce               grid ⌈kept / (WG/lanes)⌉·parts   `lanes` threads share an output; loads of a warp lie side by side
//   reduce_max           grid ⌈kept / (WG/lanes)⌉         the same
//   reduce_max_backward  grid ⌈count / WG⌉                thread = element of grad_x

struct ReduceParams {
    uint32_t kept;
    uint32_t reduced;
    uint32_t parts;
    uint32_t part;
    uint32_t lanes;
    uint32_t along;
    uint32_t divisor;
    float factor;
    uint32_t x_at;
    uint32_t y_at;
    uint32_t kn0;
    uint32_t ks0;
    uint32_t kn1;
    uint32_t ks1;
    uint32_t ks2;
    uint32_t rn0;
    uint32_t rs0;
    uint32_t rn1;
    uint32_t rs1;
    uint32_t rs2;
};

struct ReduceSpreadParams {
    uint32_t count;
    uint32_t k_at;
    uint32_t r_at;
    uint32_t x_at;
    uint32_t n0;
    uint32_t k0;
    uint32_t r0;
    uint32_t n1;
    uint32_t k1;
    uint32_t r1;
    uint32_t n2;
    uint32_t k2;
    uint32_t r2;
    uint32_t n3;
    uint32_t k3;
    uint32_t r3;
    uint32_t n4;
    uint32_t k4;
    uint32_t r4;
    uint32_t n5;
    uint32_t k5;
    uint32_t r5;
};

// ---- helpers ----------------------------------------------------------------------------------------------------------

// Place of a thread: its output within the block, its lane, and how far its partner's memory is per lane.
struct ReducePlace {
    uint32_t output, lane, step;
};

__device__ __forceinline__ ReducePlace reduce_place(const ReduceParams& p) {
    const uint32_t outputs = WG / p.lanes;
    if (p.along) {
        return {threadIdx.x / p.lanes, threadIdx.x % p.lanes, 1};
    }
    return {threadIdx.x % outputs, threadIdx.x / outputs, outputs};
}

// First element of output k.
__device__ __forceinline__ uint32_t reduce_kept_at(const ReduceParams& p, uint32_t k) {
    const uint32_t rest = k / p.kn0, next = rest / p.kn1;
    return p.x_at + (k - rest * p.kn0) * p.ks0 + (rest - next * p.kn1) * p.ks1 + next * p.ks2;
}

// Where reduced index r lies from there.
__device__ __forceinline__ uint32_t reduce_reduced_at(const ReduceParams& p, uint32_t r) {
    if (r < p.rn0) {
        return r * p.rs0;
    }
    const uint32_t rest = r / p.rn0, next = rest / p.rn1;
    return (r - rest * p.rn0) * p.rs0 + (rest - next * p.rn1) * p.rs1 + next * p.rs2;
}

// ---- sums -------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) reduce(const float* __restrict__ x, float* __restrict__ y, ReduceParams params) {
    __shared__ float sh_value[WG];
    const uint32_t outputs = WG / params.lanes, tiles = (params.kept + outputs - 1) / outputs;
    const uint32_t group = group_index();
    if (group >= tiles * params.parts) {
        return;
    }
    const uint32_t part = group / tiles;
    const ReducePlace place = reduce_place(params);
    const uint32_t k = (group % tiles) * outputs + place.output;
    // sum of this lane, 32 at a time
    float total = 0.0f;
    if (k < params.kept) {
        const uint32_t at = reduce_kept_at(params, k);
        const uint32_t end = min((part + 1) * params.part, params.reduced);
        uint32_t r = part * params.part + place.lane;
        while (r < end) {
            const uint32_t block_end = min(r + 32 * params.lanes, end);
            float block = 0.0f;
#pragma unroll 4
            for (; r < block_end; r += params.lanes) {
                block += x[at + reduce_reduced_at(params, r)];
            }
            total += block;
        }
    }
    // tree over the lanes
    sh_value[threadIdx.x] = total;
    __syncthreads();
    for (uint32_t half = params.lanes / 2; half > 0; half /= 2) {
        if (place.lane < half) {
            sh_value[threadIdx.x] += sh_value[threadIdx.x + half * place.step];
        }
        __syncthreads();
    }
    if (place.lane == 0 && k < params.kept) {
        y[params.y_at + part * params.kept + k] = sh_value[threadIdx.x] * params.factor / (float)params.divisor;
    }
}

// ---- maxima -----------------------------------------------------------------------------------------------------------

// A key that orders numbers as they are: NaN above all, -0 and 0 the same.
__device__ __forceinline__ uint32_t reduce_key(float v) {
    const uint32_t bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0xffffffffu;
    }
    if ((bits & 0x7fffffffu) == 0) {
        return 0x80000000u;
    }
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(WG)
    reduce_max(const float* __restrict__ x, float* __restrict__ y, uint32_t* __restrict__ index, ReduceParams params) {
    __shared__ uint32_t sh_key[WG];
    __shared__ uint32_t sh_index[WG];
    const uint32_t outputs = WG / params.lanes;
    const uint32_t group = group_index();
    if (group >= (params.kept + outputs - 1) / outputs) {
        return;
    }
    const ReducePlace place = reduce_place(params);
    const uint32_t k = group * outputs + place.output;
    // the lane's best; no number has key 0
    uint32_t best = 0, best_at = 0xffffffffu;
    if (k < params.kept) {
        const uint32_t at = reduce_kept_at(params, k);
        for (uint32_t r = place.lane; r < params.reduced; r += params.lanes) {
            const uint32_t key = reduce_key(x[at + reduce_reduced_at(params, r)]);
            if (key > best) {
                best = key;
                best_at = r;
            }
        }
    }
    const uint32_t tid = threadIdx.x;
    sh_key[tid] = best;
    sh_index[tid] = best_at;
    __syncthreads();
    for (uint32_t half = params.lanes / 2; half > 0; half /= 2) {
        if (place.lane < half) {
            const uint32_t other = tid + half * place.step;
            if (sh_key[other] > sh_key[tid] || (sh_key[other] == sh_key[tid] && sh_index[other] < sh_index[tid])) {
                sh_key[tid] = sh_key[other];
                sh_index[tid] = sh_index[other];
            }
        }
        __syncthreads();
    }
    if (place.lane == 0 && k < params.kept) {
        y[params.y_at + k] = x[reduce_kept_at(params, k) + reduce_reduced_at(params, sh_index[tid])];
        index[params.y_at + k] = sh_index[tid];
    }
}

// ---- backward ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    reduce_max_backward(const float* __restrict__ grad_y, const uint32_t* __restrict__ index, float* __restrict__ grad_x, ReduceSpreadParams params) {
    const uint32_t i = group_index() * WG + threadIdx.x;
    if (i >= params.count) {
        return;
    }
    uint32_t rest = i, k = params.k_at, r = params.r_at;
#define REDUCE_AXIS(d)                                        \
    {                                                         \
        const uint32_t next = rest / params.n##d;             \
        const uint32_t own = rest - next * params.n##d;       \
        k += own * params.k##d;                               \
        r += own * params.r##d;                               \
        rest = next;                                          \
    }
    REDUCE_AXIS(0)
    REDUCE_AXIS(1)
    REDUCE_AXIS(2)
    REDUCE_AXIS(3)
    REDUCE_AXIS(4)
    REDUCE_AXIS(5)
#undef REDUCE_AXIS
    grad_x[params.x_at + i] = index[k] == r ? grad_y[k] : 0.0f;
}
