// Dense layers of many models and their gradients. Maths, shapes and splits: kernels/linear.rs.
//   linear_forward[_kept][_small]  grid  M·tiles of [N,O]      tile of rows × outputs, depth I
//   linear_grad_x[_small]          grid  (M or 1)·tiles [N,I]  tile of rows × inputs, depth O (of every model where x is shared)
//   linear_grad_weight[_small]     grid  M·S·tiles [O,I]       tile of outputs × inputs, depth the rows of a split
//   shared memory: 17 KB large, 7 KB small; tiles as in common.cuh, of values in 16 bits by tensor cores as in half.cuh
// spill: NVRTC 12 keeps 64 bytes of linear_forward around the activations of the last step, once per tile; the products spill nothing.
// In bf16 NVRTC keeps up to 28 bytes of linear_grad_weight on sm_75 (products through shuffles), up to 8 on sm_90.

struct LinearParams {
    uint32_t models;
    uint32_t x_models;
    uint32_t rows;
    uint32_t inputs;
    uint32_t outputs;
    uint32_t activation;
    uint32_t flags;
    uint32_t splits;
    uint32_t split_rows;
};

#define BIAS 1u
#define CONTINUE 2u
#define GRAD_WEIGHT 4u
#define GRAD_BIAS 8u
#define PARTIAL 16u

// Where a block's tile lies: model (or model and split), first row, first column.
__device__ __forceinline__ uint3 place(uint32_t rows, uint32_t columns) {
    const uint32_t across = (columns + 4 * COL_QUADS - 1) / (4 * COL_QUADS), down = (rows + 4 * ROW_QUADS - 1) / (4 * ROW_QUADS);
    const uint32_t group = group_index(), at = group % (across * down);
    return make_uint3(group / (across * down), at / across * 4 * ROW_QUADS, at % across * 4 * COL_QUADS);
}

__device__ __forceinline__ uint32_t left_of(uint32_t at, uint32_t limit) {
    return at < limit ? limit - at : 0;
}

// Element [row, k] of four rows, each `stride` long.
__device__ __forceinline__ float4 column_quad(const Stored* __restrict__ x, uint32_t row, uint32_t rows, uint32_t k, uint32_t stride) {
    const Stored* at = x + (uint64_t)row * stride + k;
    const uint32_t count = k < stride ? left_of(row, rows) : 0;
    return make_float4(count > 0 ? at[0] : 0.0f, count > 1 ? at[stride] : 0.0f, count > 2 ? at[2 * (uint64_t)stride] : 0.0f,
                       count > 3 ? at[3 * (uint64_t)stride] : 0.0f);
}

// Element [row, c .. c + 4].
__device__ __forceinline__ float4 row_quad(const Stored* __restrict__ x, uint32_t row, uint32_t rows, uint32_t c, uint32_t stride) {
    return load_quad(x, (uint64_t)row * stride + c, row < rows ? left_of(c, stride) : 0);
}

__device__ __forceinline__ float4 times_slope(uint32_t kind, float4 g, float4 kept) {
    return make_float4(g.x * activation_slope(kind, kept.x), g.y * activation_slope(kind, kept.y), g.z * activation_slope(kind, kept.z),
                       g.w * activation_slope(kind, kept.w));
}

// ---- forward ------------------------------------------------------------------------------------------------------------

template <bool KEPT>
__device__ __forceinline__ void forward(const Stored* __restrict__ x, const Stored* __restrict__ weight, const Stored* __restrict__ bias,
                                        Stored* __restrict__ y, Stored* __restrict__ kept, const LinearParams& params) {
    __shared__ TileMemory sh;
    const uint3 at = place(params.rows, params.outputs);
    if (at.x >= params.models) {
        return;
    }
    const Stored* x_model = x + (uint64_t)(params.x_models == 1 ? 0 : at.x) * params.rows * params.inputs;
    const Stored* w = weight + (uint64_t)at.x * params.outputs * params.inputs;
    Tile tile = {};
    stored_product<true, true>(
        tile, sh, 0, params.inputs, true, [&](uint32_t k, uint32_t r) { return column_quad(x_model, at.y + r, params.rows, k, params.inputs); },
        [&](uint32_t k, uint32_t c) { return column_quad(w, at.z + c, params.outputs, k, params.inputs); }, NothingEach());
    const uint32_t row = at.y + thread_row(), col = at.z + thread_col();
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
        if (col + j < params.outputs) {
            const float b = params.flags & BIAS ? bias[at.x * params.outputs + col + j] : 0.0f;
#pragma unroll
            for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
                tile.at[r][j] += b;
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
        if (row + r < params.rows) {
            const uint64_t to = ((uint64_t)at.x * params.rows + row + r) * params.outputs + col;
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                if (col + j < params.outputs) {
                    y[to + j] = activation(params.activation, tile.at[r][j]);
                    if (KEPT) {
                        kept[to + j] = tile.at[r][j];
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG) linear_forward(const Stored* __restrict__ x, const Stored* __restrict__ weight,
                                                               const Stored* __restrict__ bias, Stored* __restrict__ y, LinearParams params) {
    forward<false>(x, weight, bias, y, y, params);
}

extern "C" __global__ void __launch_bounds__(WG) linear_forward_small(const Stored* __restrict__ x, const Stored* __restrict__ weight,
                                                                     const Stored* __restrict__ bias, Stored* __restrict__ y, LinearParams params) {
    forward<false>(x, weight, bias, y, y, params);
}

extern "C" __global__ void __launch_bounds__(WG) linear_forward_kept(const Stored* __restrict__ x, const Stored* __restrict__ weight,
                                                                    const Stored* __restrict__ bias, Stored* __restrict__ y, Stored* __restrict__ kept,
                                                                    LinearParams params) {
    forward<true>(x, weight, bias, y, kept, params);
}

extern "C" __global__ void __launch_bounds__(WG) linear_forward_kept_small(const Stored* __restrict__ x, const Stored* __restrict__ weight,
                                                                          const Stored* __restrict__ bias, Stored* __restrict__ y,
                                                                          Stored* __restrict__ kept, LinearParams params) {
    forward<true>(x, weight, bias, y, kept, params);
}

// ---- gradient with respect to x --------------------------------------------------------------------------------------------

__device__ __forceinline__ void grad_x_tile(const Stored* __restrict__ grad_y, const Stored* __restrict__ kept, const Stored* __restrict__ weight,
                                            Stored* __restrict__ grad_x, const LinearParams& params) {
    __shared__ TileMemory sh;
    const uint3 at = place(params.rows, params.inputs);
    if (at.x >= params.x_models) {
        return;
    }
    const uint32_t row = at.y + thread_row(), col = at.z + thread_col();
    Stored* out = grad_x + (uint64_t)at.x * params.rows * params.inputs;
    Tile tile = {};
    if (params.flags & CONTINUE) {
        for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
            for (uint32_t j = 0; j < 4; j++) {
                if (row + r < params.rows && col + j < params.inputs) {
                    tile.at[r][j] = out[(uint64_t)(row + r) * params.inputs + col + j];
                }
            }
        }
    }
    // every model where x is shared, else its own
    const uint32_t last = params.x_models == 1 ? params.models : at.x + 1;
    for (uint32_t m = at.x; m < last; m++) {
        const Stored* g = grad_y + (uint64_t)m * params.rows * params.outputs;
        const Stored* s = kept + (uint64_t)m * params.rows * params.outputs;
        const Stored* w = weight + (uint64_t)m * params.outputs * params.inputs;
        const auto left = [&](uint32_t k, uint32_t r) {
            const float4 quad = column_quad(g, at.y + r, params.rows, k, params.outputs);
            return params.activation == 0 ? quad : times_slope(params.activation, quad, column_quad(s, at.y + r, params.rows, k, params.outputs));
        };
        const auto right = [&](uint32_t k, uint32_t c) { return row_quad(w, k, params.outputs, at.z + c, params.inputs); };
        stored_product<true, false>(tile, sh, 0, params.outputs, params.activation == 0, left, right, NothingEach());
    }
#pragma unroll
    for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (row + r < params.rows && col + j < params.inputs) {
                out[(uint64_t)(row + r) * params.inputs + col + j] = tile.at[r][j];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG) linear_grad_x(const Stored* __restrict__ grad_y, const Stored* __restrict__ kept,
                                                              const Stored* __restrict__ weight, Stored* __restrict__ grad_x, LinearParams params) {
    grad_x_tile(grad_y, kept, weight, grad_x, params);
}

extern "C" __global__ void __launch_bounds__(WG) linear_grad_x_small(const Stored* __restrict__ grad_y, const Stored* __restrict__ kept,
                                                                    const Stored* __restrict__ weight, Stored* __restrict__ grad_x,
                                                                    LinearParams params) {
    grad_x_tile(grad_y, kept, weight, grad_x, params);
}

// ---- gradient with respect to weight and bias --------------------------------------------------------------------------------

__device__ __forceinline__ void grad_weight_tile(const Stored* __restrict__ x, const Stored* __restrict__ grad_y, const Stored* __restrict__ kept,
                                                 float* __restrict__ grad_weight, float* __restrict__ grad_bias, const LinearParams& params) {
    __shared__ TileMemory sh;
    const uint3 at = place(params.outputs, params.inputs);
    const uint32_t model = at.x / params.splits;
    if (model >= params.models) {
        return;
    }
    const uint32_t first = at.x % params.splits * params.split_rows, last = min(first + params.split_rows, params.rows);
    const Stored* x_model = x + (uint64_t)(params.x_models == 1 ? 0 : model) * params.rows * params.inputs;
    const Stored* g = grad_y + (uint64_t)model * params.rows * params.outputs;
    const Stored* s = kept + (uint64_t)model * params.rows * params.outputs;
    const auto left = [&](uint32_t n, uint32_t o) {
        const float4 quad = row_quad(g, n, last, at.y + o, params.outputs);
        return params.activation == 0 ? quad : times_slope(params.activation, quad, row_quad(s, n, last, at.y + o, params.outputs));
    };
    const auto right = [&](uint32_t n, uint32_t i) { return row_quad(x_model, n, last, at.z + i, params.inputs); };
    // the tiles of the first inputs also sum the bias, a thread per quad of outputs
    const bool sums_bias = at.z == 0 && (params.flags & GRAD_BIAS) && threadIdx.x < ROW_QUADS;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto each = [&](const LeftStep& step) {
        if (sums_bias) {
            for (uint32_t k = 0; k < STEP; k++) {
                const float4 quad = step_quad(step, k, threadIdx.x);
                sum[0] += quad.x;
                sum[1] += quad.y;
                sum[2] += quad.z;
                sum[3] += quad.w;
            }
        }
    };
    Tile tile = {};
    stored_product<false, false>(tile, sh, first, last, params.activation == 0, left, right, each);
    const uint32_t row = at.y + thread_row(), col = at.z + thread_col();
    const bool partial = params.flags & PARTIAL;
    float* out = grad_weight + (uint64_t)at.x * params.outputs * (params.inputs + (partial ? 1 : 0));
    if (params.flags & GRAD_WEIGHT) {
#pragma unroll
        for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                if (row + r < params.outputs && col + j < params.inputs) {
                    out[(uint64_t)(row + r) * params.inputs + col + j] = tile.at[r][j];
                }
            }
        }
    }
    if (sums_bias) {
        float* to = partial ? out + (uint64_t)params.outputs * params.inputs : grad_bias + (uint64_t)at.x * params.outputs;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (at.y + 4 * threadIdx.x + j < params.outputs) {
                to[at.y + 4 * threadIdx.x + j] = sum[j];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    linear_grad_weight(const Stored* __restrict__ x, const Stored* __restrict__ grad_y, const Stored* __restrict__ kept,
                       float* __restrict__ grad_weight, float* __restrict__ grad_bias, LinearParams params) {
    grad_weight_tile(x, grad_y, kept, grad_weight, grad_bias, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    linear_grad_weight_small(const Stored* __restrict__ x, const Stored* __restrict__ grad_y, const Stored* __restrict__ kept,
                             float* __restrict__ grad_weight, float* __restrict__ grad_bias, LinearParams params) {
    grad_weight_tile(x, grad_y, kept, grad_weight, grad_bias, params);
}
