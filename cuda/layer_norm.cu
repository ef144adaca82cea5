// Layer normalisation and its gradients. Maths, shapes and source: kernels/layer_norm.rs.
//   layer_norm_forward[_small], layer_norm_grad_x[_small]  grid  ⌈N / (WG/LANES)⌉          LANES threads of a warp per row, no barrier
//   layer_norm_grad_weight[_small]                         grid  splits·⌈D / COLUMNS⌉      thread = (row of the split, column)

struct LayerNormParams {
    uint32_t rows;
    uint32_t width;
    uint32_t first_row;
    uint32_t model_rows;
    uint32_t flags;
    float eps;
    float eps_low;
    uint32_t splits;
    uint32_t split_rows;
    uint32_t first_split;
    uint32_t count;
};

#define WEIGHT 1u
#define BIAS 2u

// Sum over the LANES threads of a row, in each. Whole warps call it.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    return x;
}

// ---- forward ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void forward(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                                        float* __restrict__ y, float* __restrict__ saved, const LayerNormParams& params) {
    const uint32_t row = group_index() * (WG / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    // a row past the end repeats the last: whole warps meet in row_sum
    const uint32_t near = min(row, params.rows - 1), d = params.width;
    const float* at = x + (uint64_t)near * d;
    const float first = at[0], divisor = 1.0f / (float)d;
    float sum = 0.0f;
    for (uint32_t j = lane; j < d; j += LANES) {
        sum += at[j] - first;
    }
    const float shift = row_sum(sum) * divisor;
    float squares = 0.0f;
    for (uint32_t j = lane; j < d; j += LANES) {
        const float c = (at[j] - first) - shift;
        squares += c * c;
    }
    const float r = 1.0f / sqrtf(row_sum(squares) * divisor + params.eps);
    if (row >= params.rows) {
        return;
    }
    const uint64_t own = (uint64_t)((params.first_row + row) / params.model_rows) * d;
    float* to = y + (uint64_t)row * d;
    for (uint32_t j = lane; j < d; j += LANES) {
        float h = ((at[j] - first) - shift) * r;
        if (params.flags & WEIGHT) {
            h *= weight[own + j];
        }
        if (params.flags & BIAS) {
            h += bias[own + j];
        }
        to[j] = h;
    }
    if (lane == 0) {
        saved[2 * row] = shift;
        saved[2 * row + 1] = r;
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    layer_norm_forward(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
                       float* __restrict__ saved, LayerNormParams params) {
    forward(x, weight, bias, y, saved, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    layer_norm_forward_small(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
                             float* __restrict__ saved, LayerNormParams params) {
    forward(x, weight, bias, y, saved, params);
}

// ---- gradient with respect to x --------------------------------------------------------------------------------------------

__device__ __forceinline__ void backward(const float* __restrict__ x, const float* __restrict__ saved, const float* __restrict__ weight,
                                         const float* __restrict__ grad_y, float* __restrict__ grad_x, const LayerNormParams& params) {
    const uint32_t row = group_index() * (WG / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const uint32_t near = min(row, params.rows - 1), d = params.width;
    const float *at = x + (uint64_t)near * d, *g = grad_y + (uint64_t)near * d;
    const float* w = weight + (uint64_t)((params.first_row + near) / params.model_rows) * d;
    const bool weighted = params.flags & WEIGHT;
    const float first = at[0], shift = saved[2 * near], r = saved[2 * near + 1], divisor = 1.0f / (float)d;
    float sum = 0.0f, product = 0.0f;
    for (uint32_t j = lane; j < d; j += LANES) {
        const float a = weighted ? g[j] * w[j] : g[j];
        sum += a;
        product += a * (((at[j] - first) - shift) * r);
    }
    const float mean = row_sum(sum) * divisor, slope = row_sum(product) * divisor;
    if (row >= params.rows) {
        return;
    }
    float* to = grad_x + (uint64_t)row * d;
    for (uint32_t j = lane; j < d; j += LANES) {
        const float a = weighted ? g[j] * w[j] : g[j];
        to[j] = r * (a - mean - ((at[j] - first) - shift) * r * slope);
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    layer_norm_grad_x(const float* __restrict__ x, const float* __restrict__ saved, const float* __restrict__ weight,
                      const float* __restrict__ grad_y, float* __restrict__ grad_x, LayerNormParams params) {
    backward(x, saved, weight, grad_y, grad_x, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    layer_norm_grad_x_small(const float* __restrict__ x, const float* __restrict__ saved, const float* __restrict__ weight,
                            const float* __restrict__ grad_y, float* __restrict__ grad_x, LayerNormParams params) {
    backward(x, saved, weight, grad_y, grad_x, params);
}

// ---- gradient with respect to weight and bias --------------------------------------------------------------------------------

__device__ __forceinline__ void weight_sums(const float* __restrict__ x, const float* __restrict__ saved, const float* __restrict__ grad_y,
                                            float* __restrict__ partials, const LayerNormParams& params) {
    __shared__ float2 sh_sum[WG];
    const uint32_t tid = threadIdx.x, d = params.width, across = (d + COLUMNS - 1) / COLUMNS, group = group_index();
    if (group >= params.count * across) {
        return;
    }
    const uint32_t local = group / across, split = params.first_split + local, column = group % across * COLUMNS + tid % COLUMNS;
    const uint32_t before = split / params.splits * params.model_rows - params.first_row;
    const uint32_t from_row = split % params.splits * params.split_rows, to_row = min(from_row + params.split_rows, params.model_rows);
    float2 sums = make_float2(0.0f, 0.0f);
    if (column < d) {
        for (uint32_t n = from_row + tid / COLUMNS; n < to_row; n += WG / COLUMNS) {
            const uint32_t row = before + n;
            const float g = grad_y[(uint64_t)row * d + column];
            sums.x += g * (((x[(uint64_t)row * d + column] - x[(uint64_t)row * d]) - saved[2 * row]) * saved[2 * row + 1]);
            sums.y += g;
        }
    }
    sh_sum[tid] = sums;
    __syncthreads();
    for (uint32_t half = WG / 2; half >= COLUMNS; half /= 2) {
        if (tid < half) {
            sh_sum[tid].x += sh_sum[tid + half].x;
            sh_sum[tid].y += sh_sum[tid + half].y;
        }
        __syncthreads();
    }
    if (tid < COLUMNS && column < d) {
        partials[2 * (uint64_t)local * d + column] = sh_sum[tid].x;
        partials[(2 * (uint64_t)local + 1) * d + column] = sh_sum[tid].y;
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    layer_norm_grad_weight(const float* __restrict__ x, const float* __restrict__ saved, const float* __restrict__ grad_y,
                           float* __restrict__ partials, LayerNormParams params) {
    weight_sums(x, saved, grad_y, partials, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    layer_norm_grad_weight_small(const float* __restrict__ x, const float* __restrict__ saved, const float* __restrict__ grad_y,
                                 float* __restrict__ partials, LayerNormParams params) {
    weight_sums(x, saved, grad_y, partials, params);
}
