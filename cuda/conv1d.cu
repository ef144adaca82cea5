// Convolution over time of many models and its gradients. Maths, shapes and padding: kernels/conv1d.rs.
//   conv1d_forward[_ragged]      grid  M·tiles [O, B·U]          depth (c,k)
//   conv1d_activate              grid  ⌈M·B·O·U / WG⌉            thread = value
//   conv1d_grad_x[_ragged]       grid  (M or 1)·tiles [C, B·T]   depth (o,k), of every model where x is shared
//   conv1d_grad_weight[_ragged]  grid  M·S·tiles [O, C·K]        depth (b,t) of a split
//   shared memory: 13 KB; tiles as in common.cuh
//   spill: two words of conv1d_forward outside its products, where ptxas stops at 64 registers for the sake of occupancy

struct Conv1dParams {
    uint32_t models;
    uint32_t x_models;
    uint32_t batch;
    uint32_t inputs;
    uint32_t outputs;
    uint32_t taps;
    uint32_t time;
    uint32_t out_time;
    uint32_t left;
    uint32_t dilation;
    uint32_t activation;
    uint32_t flags;
    uint32_t splits;
    uint32_t split_batch;
    uint32_t split_time;
};

#define BIAS 1u
#define CONTINUE 2u

// Where a block's tile lies: model (or model and split), first row, first column.
__device__ __forceinline__ uint3 place(uint32_t rows, uint32_t columns) {
    const uint32_t across = (columns + 4 * COL_QUADS - 1) / (4 * COL_QUADS), down = (rows + 4 * ROW_QUADS - 1) / (4 * ROW_QUADS);
    const uint32_t group = group_index(), at = group % (across * down);
    return make_uint3(group / (across * down), at / across * 4 * ROW_QUADS, at % across * 4 * COL_QUADS);
}

template <bool RAGGED>
__device__ __forceinline__ uint32_t valid_length(const uint32_t* __restrict__ lengths, uint32_t b, const Conv1dParams& params) {
    return RAGGED ? min(lengths[b], params.time) : params.time;
}

// Valid steps of y for a sequence of valid length.
__device__ __forceinline__ uint32_t out_length(uint32_t length, const Conv1dParams& params) {
    return length == 0 || length + params.out_time < params.time ? 0 : length + params.out_time - params.time;
}

// Four columns of a row of depth, by a function of the column.
template <class At>
__device__ __forceinline__ float4 quad(uint32_t column, At at) {
    return make_float4(at(column), at(column + 1), at(column + 2), at(column + 3));
}

// ---- forward ------------------------------------------------------------------------------------------------------------

// x that tap (c,k) of output (b,t) sees; the sequence's valid length is given.
__device__ __forceinline__ float window_at(const float* __restrict__ x, uint32_t b, uint32_t t, uint32_t d, uint32_t length, const Conv1dParams& params) {
    const uint32_t c = d / params.taps, s = t + (d - c * params.taps) * params.dilation - params.left;  // wraps below zero
    return s < length ? x[((uint64_t)b * params.inputs + c) * params.time + s] : 0.0f;
}

template <bool RAGGED>
__device__ __forceinline__ void forward(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                                        const uint32_t* __restrict__ lengths, float* __restrict__ y, const Conv1dParams& params) {
    __shared__ TileMemory sh;
    const uint32_t columns = params.batch * params.out_time, depth = params.inputs * params.taps;
    const uint3 at = place(params.outputs, columns);
    if (at.x >= params.models) {
        return;
    }
    const float* w = weight + (uint64_t)at.x * params.outputs * depth;
    const float* x_model = x + (uint64_t)(params.x_models == 1 ? 0 : at.x) * params.batch * params.inputs * params.time;
    const auto left = [&](uint32_t d, uint32_t r) {
        return quad(at.y + r, [&](uint32_t o) { return o < params.outputs && d < depth ? w[(uint64_t)o * depth + d] : 0.0f; });
    };
    const auto right = [&](uint32_t d, uint32_t c) {
        return quad(at.z + c, [&](uint32_t column) {
            if (column >= columns || d >= depth) {
                return 0.0f;
            }
            const uint32_t b = column / params.out_time;
            return window_at(x_model, b, column - b * params.out_time, d, valid_length<RAGGED>(lengths, b, params), params);
        });
    };
    Tile tile = {};
    tile_product<true, false>(tile, sh, 0, depth, left, right, NothingEach());
    const uint32_t o = at.y + thread_row();
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
        const uint32_t column = at.z + thread_col() + j;
        if (column < columns) {
            const uint32_t b = column / params.out_time, t = column - b * params.out_time;
            const bool valid = t < out_length(valid_length<RAGGED>(lengths, b, params), params);
#pragma unroll
            for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
                if (o + r < params.outputs) {
                    const float sum = tile.at[r][j] + (params.flags & BIAS ? bias[at.x * params.outputs + o + r] : 0.0f);
                    y[(((uint64_t)at.x * params.batch + b) * params.outputs + o + r) * params.out_time + t] =
                        valid ? activation(params.activation, sum) : 0.0f;
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    conv1d_forward(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
                   Conv1dParams params) {
    forward<false>(x, weight, bias, nullptr, y, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    conv1d_forward_ragged(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                          const uint32_t* __restrict__ lengths, float* __restrict__ y, Conv1dParams params) {
    forward<true>(x, weight, bias, lengths, y, params);
}

// ---- activation of a kept pre-activation --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) conv1d_activate(const float* __restrict__ kept, float* __restrict__ y, Conv1dParams params) {
    const uint64_t at = (uint64_t)group_index() * WG + threadIdx.x;
    if (at < (uint64_t)params.models * params.batch * params.outputs * params.out_time) {
        y[at] = activation(params.activation, kept[at]);
    }
}

// ---- gradient with respect to x --------------------------------------------------------------------------------------------

__device__ __forceinline__ float pulled_back(const float* __restrict__ grad_y, const float* __restrict__ kept, uint64_t at, const Conv1dParams& params) {
    return params.activation == 0 ? grad_y[at] : grad_y[at] * activation_slope(params.activation, kept[at]);
}

template <bool RAGGED>
__device__ __forceinline__ void grad_x_tile(const float* __restrict__ grad_y, const float* __restrict__ kept, const float* __restrict__ weight,
                                            const uint32_t* __restrict__ lengths, float* __restrict__ grad_x, const Conv1dParams& params) {
    __shared__ TileMemory sh;
    const uint32_t columns = params.batch * params.time, depth = params.outputs * params.taps;
    const uint3 at = place(params.inputs, columns);
    if (at.x >= params.x_models) {
        return;
    }
    const uint32_t c = at.y + thread_row();
    float* out = grad_x + (uint64_t)at.x * params.batch * params.inputs * params.time;
    const auto index = [&](uint32_t row, uint32_t column) {
        const uint32_t b = column / params.time;
        return ((uint64_t)b * params.inputs + row) * params.time + (column - b * params.time);
    };
    Tile tile = {};
    if (params.flags & CONTINUE) {
        for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t column = at.z + thread_col() + j;
                if (c + r < params.inputs && column < columns) {
                    tile.at[r][j] = out[index(c + r, column)];
                }
            }
        }
    }
    // every model where x is shared, else its own
    const uint32_t last = params.x_models == 1 ? params.models : at.x + 1;
    for (uint32_t m = at.x; m < last; m++) {
        const float* w = weight + (uint64_t)m * params.outputs * params.inputs * params.taps;
        const auto left = [&](uint32_t d, uint32_t r) {
            const uint32_t o = d / params.taps, k = d - o * params.taps;
            return quad(at.y + r, [&](uint32_t row) {
                return row < params.inputs && d < depth ? w[((uint64_t)o * params.inputs + row) * params.taps + k] : 0.0f;
            });
        };
        const auto right = [&](uint32_t d, uint32_t first) {
            const uint32_t o = d / params.taps, k = d - o * params.taps;
            return quad(at.z + first, [&](uint32_t column) {
                if (column >= columns || d >= depth) {
                    return 0.0f;
                }
                const uint32_t b = column / params.time;
                const uint32_t t = column - b * params.time + params.left - k * params.dilation;  // wraps below zero
                if (t >= out_length(valid_length<RAGGED>(lengths, b, params), params)) {
                    return 0.0f;
                }
                return pulled_back(grad_y, kept, (((uint64_t)m * params.batch + b) * params.outputs + o) * params.out_time + t, params);
            });
        };
        tile_product<true, false>(tile, sh, 0, depth, left, right, NothingEach());
    }
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
        const uint32_t column = at.z + thread_col() + j;
        if (column < columns) {
            const uint32_t b = column / params.time;
            const bool valid = column - b * params.time < valid_length<RAGGED>(lengths, b, params);
#pragma unroll
            for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
                if (c + r < params.inputs) {
                    out[index(c + r, column)] = valid ? tile.at[r][j] : 0.0f;
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    conv1d_grad_x(const float* __restrict__ grad_y, const float* __restrict__ kept, const float* __restrict__ weight, float* __restrict__ grad_x,
                  Conv1dParams params) {
    grad_x_tile<false>(grad_y, kept, weight, nullptr, grad_x, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    conv1d_grad_x_ragged(const float* __restrict__ grad_y, const float* __restrict__ kept, const float* __restrict__ weight,
                         const uint32_t* __restrict__ lengths, float* __restrict__ grad_x, Conv1dParams params) {
    grad_x_tile<true>(grad_y, kept, weight, lengths, grad_x, params);
}

// ---- gradient with respect to weight and bias --------------------------------------------------------------------------------

template <bool RAGGED>
__device__ __forceinline__ void grad_weight_tile(const float* __restrict__ x, const float* __restrict__ grad_y, const float* __restrict__ kept,
                                                 const uint32_t* __restrict__ lengths, float* __restrict__ partials, const Conv1dParams& params) {
    __shared__ TileMemory sh;
    const uint32_t columns = params.inputs * params.taps;
    const uint3 at = place(params.outputs, columns);
    const uint32_t model = at.x / params.splits, split = at.x - model * params.splits;
    if (model >= params.models) {
        return;
    }
    const uint32_t pieces = (params.out_time + params.split_time - 1) / params.split_time;
    const uint32_t first = split / pieces * params.split_batch, last = min(first + params.split_batch, params.batch);
    const uint32_t from = split % pieces * params.split_time, steps = min(params.split_time, params.out_time - from);
    const float* x_model = x + (uint64_t)(params.x_models == 1 ? 0 : model) * params.batch * params.inputs * params.time;
    const auto left = [&](uint32_t d, uint32_t r) {
        const uint32_t b = first + d / steps, t = from + d % steps;
        const bool valid = b < last && t < out_length(valid_length<RAGGED>(lengths, min(b, last - 1), params), params);
        return quad(at.y + r, [&](uint32_t o) {
            return valid && o < params.outputs ? pulled_back(grad_y, kept, (((uint64_t)model * params.batch + b) * params.outputs + o) * params.out_time + t, params)
                                               : 0.0f;
        });
    };
    const auto right = [&](uint32_t d, uint32_t c) {
        const uint32_t b = first + d / steps, t = from + d % steps;
        const uint32_t length = valid_length<RAGGED>(lengths, min(b, last - 1), params);
        const bool valid = b < last && t < out_length(length, params);
        return quad(at.z + c, [&](uint32_t column) { return valid && column < columns ? window_at(x_model, b, t, column, length, params) : 0.0f; });
    };
    // the tiles of the first columns also sum the bias, a thread per quad of outputs
    const bool sums_bias = at.z == 0 && threadIdx.x < ROW_QUADS;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto each = [&](const float4(&step)[STEP][ROW_QUADS + 1]) {
        if (sums_bias) {
            for (uint32_t k = 0; k < STEP; k++) {
                const float4 g = step[k][threadIdx.x];
                sum[0] += g.x;
                sum[1] += g.y;
                sum[2] += g.z;
                sum[3] += g.w;
            }
        }
    };
    Tile tile = {};
    tile_product<true, true>(tile, sh, 0, (last - first) * steps, left, right, each);
    float* out = partials + (uint64_t)at.x * params.outputs * (columns + 1);
    const uint32_t o = at.y + thread_row(), col = at.z + thread_col();
#pragma unroll
    for (uint32_t r = 0; r < 4 * THREAD_QUADS; r++) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (o + r < params.outputs && col + j < columns) {
                out[(uint64_t)(o + r) * columns + col + j] = tile.at[r][j];
            }
        }
    }
    if (sums_bias) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (at.y + 4 * threadIdx.x + j < params.outputs) {
                out[(uint64_t)params.outputs * columns + at.y + 4 * threadIdx.x + j] = sum[j];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    conv1d_grad_weight(const float* __restrict__ x, const float* __restrict__ grad_y, const float* __restrict__ kept, float* __restrict__ partials,
                       Conv1dParams params) {
    grad_weight_tile<false>(x, grad_y, kept, nullptr, partials, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    conv1d_grad_weight_ragged(const float* __restrict__ x, const float* __restrict__ grad_y, const float* __restrict__ kept,
                              const uint32_t* __restrict__ lengths, float* __restrict__ partials, Conv1dParams params) {
    grad_weight_tile<true>(x, grad_y, kept, lengths, partials, params);
}
