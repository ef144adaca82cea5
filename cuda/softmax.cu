// Softmax of rows, its logarithm, masks, and the gradient. Maths and shapes: kernels/softmax.rs.
//   all entries  grid  ⌈N / (WG/LANES)⌉   LANES threads of a warp per row, no barrier

struct SoftmaxParams {
    uint32_t rows;
    uint32_t width;
    uint32_t log;
    uint32_t words;
};

#define LOG_ZERO (-1e30f)
#define MASKED (-1e29f)

// Sum over the LANES threads of a row, in each. Whole warps call it, and row_max.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    return x;
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    }
    return x;
}

// ---- forward ------------------------------------------------------------------------------------------------------------

// Values of a row, all allowed.
struct Whole {
    const float* __restrict__ x;
    __device__ __forceinline__ float operator()(uint32_t j) const { return x[j]; }
};

// Values of a row under its words or its length.
struct Allowed {
    const float* __restrict__ x;
    const uint32_t* __restrict__ words;
    uint32_t length;
    __device__ __forceinline__ float operator()(uint32_t j) const { return j < length && (!words || words[j] != 0) ? x[j] : LOG_ZERO; }
};

template <class Row>
__device__ __forceinline__ void softmax_row(Row x, float* __restrict__ y, bool own, const SoftmaxParams& params) {
    const uint32_t lane = threadIdx.x % LANES;
    float most = LOG_ZERO;
    for (uint32_t j = lane; j < params.width; j += LANES) {
        most = fmaxf(most, x(j));
    }
    most = row_max(most);
    float sum = 0.0f;
    for (uint32_t j = lane; j < params.width; j += LANES) {
        const float v = x(j);
        sum += v <= MASKED ? 0.0f : expf(v - most);
    }
    sum = row_sum(sum);
    if (!own) {
        return;
    }
    // a sum of nothing is 0; a NaN stays one
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum, log_sum = logf(sum);
    for (uint32_t j = lane; j < params.width; j += LANES) {
        const float v = x(j);
        if (params.log) {
            y[j] = v <= MASKED ? LOG_ZERO : (v - most) - log_sum;
        } else {
            y[j] = v <= MASKED ? 0.0f : expf(v - most) * inverse;
        }
    }
}

// Row of a thread; whole warps go on past the last row, with the last row's values.
__device__ __forceinline__ uint32_t row_index() {
    return group_index() * (WG / LANES) + threadIdx.x / LANES;
}

__device__ __forceinline__ void forward(const float* __restrict__ x, float* __restrict__ y, const SoftmaxParams& params) {
    const uint32_t row = row_index(), near = min(row, params.rows - 1);
    const uint64_t at = (uint64_t)near * params.width;
    softmax_row(Whole{x + at}, y + at, row < params.rows, params);
}

extern "C" __global__ void __launch_bounds__(WG) softmax_forward(const float* __restrict__ x, float* __restrict__ y, SoftmaxParams params) {
    forward(x, y, params);
}

extern "C" __global__ void __launch_bounds__(WG) softmax_forward_small(const float* __restrict__ x, float* __restrict__ y, SoftmaxParams params) {
    forward(x, y, params);
}

// ---- forward under a mask ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void masked(const float* __restrict__ x, const uint32_t* __restrict__ mask, float* __restrict__ y,
                                       const SoftmaxParams& params) {
    const uint32_t row = row_index(), near = min(row, params.rows - 1);
    const uint64_t at = (uint64_t)near * params.width;
    const Allowed values = {x + at, params.words ? mask + at : nullptr, params.words ? params.width : mask[near]};
    softmax_row(values, y + at, row < params.rows, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    softmax_masked(const float* __restrict__ x, const uint32_t* __restrict__ mask, float* __restrict__ y, SoftmaxParams params) {
    masked(x, mask, y, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    softmax_masked_small(const float* __restrict__ x, const uint32_t* __restrict__ mask, float* __restrict__ y, SoftmaxParams params) {
    masked(x, mask, y, params);
}

// ---- backward ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void backward(const float* __restrict__ y, const float* __restrict__ grad_y, float* __restrict__ grad_x,
                                         const SoftmaxParams& params) {
    const uint32_t row = row_index(), lane = threadIdx.x % LANES;
    const uint64_t at = (uint64_t)min(row, params.rows - 1) * params.width;
    const float *v = y + at, *g = grad_y + at;
    float sum = 0.0f;
    for (uint32_t j = lane; j < params.width; j += LANES) {
        if (params.log) {
            sum += v[j] <= MASKED ? 0.0f : g[j];
        } else {
            sum += v[j] * g[j];
        }
    }
    sum = row_sum(sum);
    if (row >= params.rows) {
        return;
    }
    float* to = grad_x + at;
    for (uint32_t j = lane; j < params.width; j += LANES) {
        if (params.log) {
            to[j] = v[j] <= MASKED ? 0.0f : g[j] - expf(v[j]) * sum;
        } else {
            to[j] = v[j] * (g[j] - sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    softmax_backward(const float* __restrict__ y, const float* __restrict__ grad_y, float* __restrict__ grad_x, SoftmaxParams params) {
    backward(y, grad_y, grad_x, params);
}

extern "C" __global__ void __launch_bounds__(WG)
    softmax_backward_small(const float* __restrict__ y, const float* __restrict__ grad_y, float* __restrict__ grad_x, SoftmaxParams params) {
    backward(y, grad_y, grad_x, params);
}
