// Rows of unit length. Maths, shapes and source: kernels/normalise.rs.
//   normalise, normalise_backward   grid ⌈R / (WG/lanes)⌉   `lanes` neighbouring threads share a row

struct NormaliseParams {
    uint32_t rows;
    uint32_t width;
    uint32_t lanes;
    float eps;
    uint32_t x_at;
    uint32_t g_at;
    uint32_t y_at;
};

// ---- helpers ----------------------------------------------------------------------------------------------------------

// Sum over the threads of a row, in each of them.
__device__ __forceinline__ float row_sum(float* sh, uint32_t lanes, uint32_t lane, float v) {
    const uint32_t tid = threadIdx.x;
    sh[tid] = v;
    __syncthreads();
    for (uint32_t half = lanes / 2; half > 0; half /= 2) {
        if (lane < half) {
            sh[tid] += sh[tid + half];
        }
        __syncthreads();
    }
    const float total = sh[tid - lane];
    __syncthreads();
    return total;
}

// Maximum over the threads of a row, in each of them.
__device__ __forceinline__ float row_max(float* sh, uint32_t lanes, uint32_t lane, float v) {
    const uint32_t tid = threadIdx.x;
    sh[tid] = v;
    __syncthreads();
    for (uint32_t half = lanes / 2; half > 0; half /= 2) {
        if (lane < half) {
            sh[tid] = fmaxf(sh[tid], sh[tid + half]);
        }
        __syncthreads();
    }
    const float most = sh[tid - lane];
    __syncthreads();
    return most;
}

// Sum of f(j) over the lane's elements, 32 in a row.
template <class F>
__device__ __forceinline__ float lane_sum(uint32_t lanes, uint32_t lane, uint32_t width, F f) {
    float total = 0.0f;
    uint32_t j = lane;
    while (j < width) {
        const uint32_t end = min(j + 32 * lanes, width);
        float block = 0.0f;
        for (; j < end; j += lanes) {
            block += f(j);
        }
        total += block;
    }
    return total;
}

// Norm of a row; a thread without a row has width 0.
__device__ __forceinline__ float row_norm(float* sh, uint32_t lanes, uint32_t lane, const float* x, uint32_t width) {
    float most = 0.0f;
    for (uint32_t j = lane; j < width; j += lanes) {
        most = fmaxf(most, fabsf(x[j]));
    }
    most = row_max(sh, lanes, lane, most);
    const float scale = most > 0.0f ? most : 1.0f;
    const float total = lane_sum(lanes, lane, width, [&](uint32_t j) {
        const float u = x[j] / scale;
        return u * u;
    });
    return scale * sqrtf(row_sum(sh, lanes, lane, total));
}

// ---- forward ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) normalise(const float* __restrict__ x, float* __restrict__ y, NormaliseParams params) {
    __shared__ float sh_value[WG];
    const uint32_t rows = WG / params.lanes, group = group_index();
    if (group >= (params.rows + rows - 1) / rows) {
        return;
    }
    const uint32_t row = group * rows + threadIdx.x / params.lanes, lane = threadIdx.x % params.lanes;
    const uint32_t width = row < params.rows ? params.width : 0;
    const float* from = x + params.x_at + row * params.width;
    float* to = y + params.y_at + row * params.width;
    const float norm = row_norm(sh_value, params.lanes, lane, from, width);
    const float divisor = norm < params.eps ? params.eps : norm;
    for (uint32_t j = lane; j < width; j += params.lanes) {
        to[j] = from[j] / divisor;
    }
}

// ---- backward ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    normalise_backward(const float* __restrict__ x, const float* __restrict__ grad_y, float* __restrict__ grad_x, NormaliseParams params) {
    __shared__ float sh_value[WG];
    const uint32_t rows = WG / params.lanes, group = group_index();
    if (group >= (params.rows + rows - 1) / rows) {
        return;
    }
    const uint32_t row = group * rows + threadIdx.x / params.lanes, lane = threadIdx.x % params.lanes;
    const uint32_t width = row < params.rows ? params.width : 0;
    const float* from = x + params.x_at + row * params.width;
    const float* g = grad_y + params.g_at + row * params.width;
    float* to = grad_x + params.y_at + row * params.width;
    const float norm = row_norm(sh_value, params.lanes, lane, from, width);
    const bool small = norm <= params.eps;
    const float divisor = small ? params.eps : norm;
    float dot = lane_sum(params.lanes, lane, width, [&](uint32_t j) { return (from[j] / divisor) * g[j]; });
    dot = row_sum(sh_value, params.lanes, lane, dot);
    dot = small ? 0.0f : dot;
    for (uint32_t j = lane; j < width; j += params.lanes) {
        to[j] = (g[j] - from[j] / divisor * dot) / divisor;
    }
}
