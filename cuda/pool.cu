// Pooling over time. Maths, shapes and source: kernels/pool.rs.
//   pool                   grid ⌈B·H / WG⌉     thread = (sequence, column), over the valid steps: rows of h are read side by side
//   pool_backward          grid ⌈B·T·H / WG⌉   thread = element of grad_h
//   pool_weights           grid B              block = sequence; thread takes steps tid, tid + WG, …
//   pool_weights_backward  grid B              warp = step, its lanes the columns

struct PoolParams {
    uint32_t rows;
    uint32_t steps;
    uint32_t width;
    uint32_t kind;
    uint32_t period;
    uint32_t first;
    uint32_t h_at;
    uint32_t w_at;
    uint32_t y_at;
};

#define POOL_LAST 0u
#define POOL_MEAN 1u

// ---- helpers ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pool_valid(const PoolParams& p, const uint32_t* lengths, uint32_t b) {
    return min(lengths[(p.first + b) % p.period], p.steps);
}

// Maximum over the block, in every thread.
__device__ __forceinline__ float pool_max(float v) {
    __shared__ float sh_most[WG];
    sh_most[threadIdx.x] = v;
    __syncthreads();
    for (uint32_t half = WG / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            sh_most[threadIdx.x] = fmaxf(sh_most[threadIdx.x], sh_most[threadIdx.x + half]);
        }
        __syncthreads();
    }
    return sh_most[0];
}

// ---- forward ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) pool(const float* __restrict__ h, const float* __restrict__ weights,
                                                      const uint32_t* __restrict__ lengths, float* __restrict__ y, PoolParams params) {
    const uint32_t i = group_index() * WG + threadIdx.x;
    const uint32_t b = i / params.width;
    if (b >= params.rows) {
        return;
    }
    const uint32_t n = pool_valid(params, lengths, b);
    const float* own = h + params.h_at + b * params.steps * params.width + i % params.width;
    if (n == 0) {
        y[params.y_at + i] = 0.0f;
        return;
    }
    if (params.kind == POOL_LAST) {
        y[params.y_at + i] = own[(n - 1) * params.width];
        return;
    }
    const float* w = weights + params.w_at + b * params.steps;
    float total = 0.0f;
    uint32_t t = 0;
    while (t < n) {
        const uint32_t end = min(t + 32, n);
        float block = 0.0f;
#pragma unroll 4
        for (; t < end; t++) {
            block += (params.kind == POOL_MEAN ? 1.0f : w[t]) * own[t * params.width];
        }
        total += block;
    }
    y[params.y_at + i] = params.kind == POOL_MEAN ? total / (float)n : total;
}

// ---- backward ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    pool_backward(const float* __restrict__ grad_y, const float* __restrict__ weights, const uint32_t* __restrict__ lengths,
                  float* __restrict__ grad_h, PoolParams params) {
    const uint32_t i = group_index() * WG + threadIdx.x;
    const uint32_t step = i / params.width;
    const uint32_t b = step / params.steps;
    if (b >= params.rows) {
        return;
    }
    const uint32_t t = step % params.steps, n = pool_valid(params, lengths, b);
    float v = 0.0f;
    if (t < n) {
        const float g = grad_y[params.y_at + b * params.width + i % params.width];
        if (params.kind == POOL_LAST) {
            v = t + 1 == n ? g : 0.0f;
        } else if (params.kind == POOL_MEAN) {
            v = g / (float)n;
        } else {
            v = g * weights[params.w_at + step];
        }
    }
    grad_h[params.h_at + i] = v;
}

// ---- weights ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    pool_weights(const float* __restrict__ scores, const uint32_t* __restrict__ lengths, float* __restrict__ weights, PoolParams params) {
    const uint32_t b = group_index(), tid = threadIdx.x;
    if (b >= params.rows) {
        return;
    }
    const uint32_t n = pool_valid(params, lengths, b);
    const float* from = scores + params.h_at + b * params.steps;
    float* to = weights + params.w_at + b * params.steps;
    float most = -1e30f;
    for (uint32_t t = tid; t < n; t += WG) {
        most = fmaxf(most, from[t]);
    }
    most = pool_max(most);
    float sum[1] = {0.0f};
    for (uint32_t t = tid; t < n; t += WG) {
        const float e = expf(from[t] - most);
        to[t] = e;
        sum[0] += e;
    }
    block_sum(sum);
    for (uint32_t t = tid; t < params.steps; t += WG) {
        to[t] = t < n ? to[t] / sum[0] : 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    pool_weights_backward(const float* __restrict__ h, const float* __restrict__ weights, const float* __restrict__ grad_y,
                          const uint32_t* __restrict__ lengths, float* __restrict__ grad_scores, PoolParams params) {
    const uint32_t b = group_index(), tid = threadIdx.x;
    if (b >= params.rows) {
        return;
    }
    const uint32_t n = pool_valid(params, lengths, b), lane = tid % 32;
    const float* row = grad_y + params.y_at + b * params.width;
    const float* w = weights + params.w_at + b * params.steps;
    float* to = grad_scores + params.w_at + b * params.steps;
    // g_t: a warp per step
    float mean[1] = {0.0f};
    for (uint32_t t = tid / 32; t < n; t += WG / 32) {
        const float* own = h + params.h_at + (b * params.steps + t) * params.width;
        float g = 0.0f;
        for (uint32_t j = lane; j < params.width; j += 32) {
            g += own[j] * row[j];
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            g += __shfl_xor_sync(0xffffffffu, g, lanes);
        }
        if (lane == 0) {
            to[t] = g;
            mean[0] += w[t] * g;
        }
    }
    block_sum(mean);  // its barriers also show to[] to all threads
    for (uint32_t t = tid; t < params.steps; t += WG) {
        to[t] = t < n ? w[t] * (to[t] - mean[0]) : 0.0f;
    }
}
