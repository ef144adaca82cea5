// Losses of predictions, one value per model, and their gradients. Maths, shapes and source: kernels/loss.rs.
//   loss_elements, …_backward                        grid  blocks of BLOCK elements of each model     thread t takes elements t, t+WG, …
//   loss_cross_entropy, loss_kl, …_backward          grid  blocks of WG rows of each model            thread = row
//   loss_mean                                        grid  models                                     thread t takes blocks t, t+WG, …

struct LossParams {
    uint32_t rows;
    uint32_t columns;
    uint32_t blocks;
    uint32_t first;
    uint32_t count;
    uint32_t prediction_base;
    uint32_t target_base;
    uint32_t weight_base;
    uint32_t block_base;
    uint32_t target_stride;
    uint32_t weight_stride;
    uint32_t kind;
    uint32_t weighted;
    float option;
    float option_low;
};

#define MSE 0
#define HUBER 1
#define BCE 2
#define PINBALL 3

// ---- elements -------------------------------------------------------------------------------------------------------

// An element: its prediction's index, target, quantile and weight.
struct Element {
    uint32_t at;
    float y, tau, w;
};

__device__ __forceinline__ Element element_at(const float* __restrict__ target, const float* __restrict__ weight, const float* __restrict__ quantiles,
                                              uint32_t model, uint32_t i, const LossParams& p) {
    Element e = {model * p.rows * p.columns - p.prediction_base + i, 0.0f, 0.0f, 1.0f};
    const uint32_t row = p.columns == 1 ? i : i / p.columns;
    const uint32_t target_at = model * p.target_stride - p.target_base;
    if (p.kind == PINBALL) {
        e.y = target[target_at + row];
        e.tau = quantiles[i - row * p.columns];
    } else {
        e.y = target[target_at + i];
    }
    if (p.weighted) {
        e.w = weight[model * p.weight_stride - p.weight_base + row];
    }
    return e;
}

__device__ __forceinline__ float element_loss(float x, float y, float tau, const LossParams& p) {
    const float e = x - y, o = p.option;
    switch (p.kind) {
        case MSE: return e * e;
        case HUBER: return fabsf(e) < o ? 0.5f * e * e : o * (fabsf(e) - 0.5f * o);
        case BCE: return (1.0f - y) * x + (1.0f + (o - 1.0f) * y) * (log1pf(expf(-fabsf(x))) + (x < 0.0f ? -x : 0.0f));
        default: return e < 0.0f ? -tau * e : (1.0f - tau) * e;
    }
}

__device__ __forceinline__ float element_slope(float x, float y, float tau, const LossParams& p) {
    const float e = x - y, o = p.option;
    switch (p.kind) {
        case MSE: return e + e;
        case HUBER: return e < -o ? -o : e > o ? o : e;
        case BCE: {
            const float z = expf(-fabsf(x));
            return (1.0f - y) - (1.0f + (o - 1.0f) * y) * ((x < 0.0f ? 1.0f : z) / (1.0f + z));
        }
        default: return e < 0.0f ? -tau : e > 0.0f ? 1.0f - tau : e;  // 0 at the kink, NaN for NaN
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    loss_elements(const float* __restrict__ prediction, const float* __restrict__ target, const float* __restrict__ weight,
                  const float* __restrict__ quantiles, float* __restrict__ sums, LossParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const uint32_t block = params.first + group, model = block / params.blocks, inside = block % params.blocks * BLOCK;
    const uint32_t last = min(inside + BLOCK, params.rows * params.columns);
    float mine[2] = {0.0f, 0.0f};
#pragma unroll 4
    for (uint32_t i = inside + threadIdx.x; i < last; i += WG) {
        const Element e = element_at(target, weight, quantiles, model, i, params);
        if (e.w != 0.0f) {
            mine[0] += e.w * element_loss(prediction[e.at], e.y, e.tau, params);
            mine[1] += e.w;
        }
    }
    block_sum(mine);
    if (threadIdx.x == 0) {
        sums[2 * block - params.block_base] = mine[0];
        sums[2 * block - params.block_base + 1] = mine[1];
    }
}

__device__ __forceinline__ float scale_of(const float* __restrict__ total, const float* __restrict__ grad_value, uint32_t model) {
    return total[model] == 0.0f ? 0.0f : grad_value[model] / total[model];
}

extern "C" __global__ void __launch_bounds__(WG)
    loss_elements_backward(const float* __restrict__ prediction, const float* __restrict__ target, const float* __restrict__ weight,
                           const float* __restrict__ quantiles, const float* __restrict__ total, const float* __restrict__ grad_value,
                           float* __restrict__ grad_prediction, LossParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const uint32_t block = params.first + group, model = block / params.blocks, inside = block % params.blocks * BLOCK;
    const uint32_t last = min(inside + BLOCK, params.rows * params.columns);
    const float scale = scale_of(total, grad_value, model);
#pragma unroll 4
    for (uint32_t i = inside + threadIdx.x; i < last; i += WG) {
        const Element e = element_at(target, weight, quantiles, model, i, params);
        grad_prediction[e.at] = e.w == 0.0f ? 0.0f : scale * e.w * element_slope(prediction[e.at], e.y, e.tau, params);
    }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// A thread's row: its model, index in the model, first logit, weight (0: does not count).
struct Row {
    uint32_t model, row, at;
    float w;
};

__device__ __forceinline__ Row row_of(const float* __restrict__ weight, uint32_t block, const LossParams& p) {
    const uint32_t model = block / p.blocks, row = block % p.blocks * WG + threadIdx.x;
    const float w = row >= p.rows ? 0.0f : p.weighted ? weight[model * p.weight_stride - p.weight_base + row] : 1.0f;
    return {model, row, (model * p.rows + row) * p.columns - p.prediction_base, w};
}

// Largest logit and ln Σ e^(x − largest).
struct LogSum {
    float top, log;
};

__device__ __forceinline__ LogSum log_sum(const float* __restrict__ x, uint32_t columns) {
    float top = x[0], sum = 0.0f;
    for (uint32_t j = 1; j < columns; j++) {
        top = x[j] > top ? x[j] : top;
    }
    for (uint32_t j = 0; j < columns; j++) {
        sum += expf(x[j] - top);
    }
    return {top, logf(sum)};
}

extern "C" __global__ void __launch_bounds__(WG)
    loss_cross_entropy(const float* __restrict__ prediction, const uint32_t* __restrict__ classes, const float* __restrict__ weight,
                       float* __restrict__ sums, LossParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const uint32_t block = params.first + group;
    const Row r = row_of(weight, block, params);
    float mine[2] = {0.0f, 0.0f};
    if (r.w != 0.0f) {
        const uint32_t class_id = classes[r.model * params.target_stride - params.target_base + r.row];
        if (class_id < params.columns) {
            const float* __restrict__ x = prediction + r.at;
            const LogSum s = log_sum(x, params.columns);
            float value = s.log - (1.0f - params.option) * (x[class_id] - s.top);
            if (params.option > 0.0f) {
                float sum = 0.0f;
                for (uint32_t j = 0; j < params.columns; j++) {
                    sum += x[j] - s.top;
                }
                value -= params.option * (sum / (float)params.columns);
            }
            mine[0] = r.w * value;
            mine[1] = r.w;
        }
    }
    block_sum(mine);
    if (threadIdx.x == 0) {
        sums[2 * block - params.block_base] = mine[0];
        sums[2 * block - params.block_base + 1] = mine[1];
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    loss_cross_entropy_backward(const float* __restrict__ prediction, const uint32_t* __restrict__ classes, const float* __restrict__ weight,
                                const float* __restrict__ total, const float* __restrict__ grad_value, float* __restrict__ grad_prediction,
                                LossParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const Row r = row_of(weight, params.first + group, params);
    if (r.row >= params.rows) {
        return;
    }
    const float* __restrict__ x = prediction + r.at;
    float* __restrict__ out = grad_prediction + r.at;
    const uint32_t class_id = classes[r.model * params.target_stride - params.target_base + r.row];
    if (r.w == 0.0f || class_id >= params.columns) {
        for (uint32_t j = 0; j < params.columns; j++) {
            out[j] = 0.0f;
        }
        return;
    }
    const LogSum s = log_sum(x, params.columns);
    const float scale = scale_of(total, grad_value, r.model) * r.w, share = params.option / (float)params.columns;
    for (uint32_t j = 0; j < params.columns; j++) {
        out[j] = scale * (expf(x[j] - s.top - s.log) - (share + (j == class_id ? 1.0f - params.option : 0.0f)));
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    loss_kl(const float* __restrict__ prediction, const float* __restrict__ target, const float* __restrict__ weight, float* __restrict__ sums,
            LossParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const uint32_t block = params.first + group;
    const Row r = row_of(weight, block, params);
    float mine[2] = {0.0f, 0.0f};
    if (r.w != 0.0f) {
        const float* __restrict__ x = prediction + r.at;
        const float* __restrict__ y = target + (r.model * params.target_stride - params.target_base + r.row * params.columns);
        const LogSum s = log_sum(x, params.columns);
        float value = 0.0f;
        for (uint32_t j = 0; j < params.columns; j++) {
            value += y[j] == 0.0f ? 0.0f : y[j] * (logf(y[j]) - (x[j] - s.top - s.log));
        }
        mine[0] = r.w * value;
        mine[1] = r.w;
    }
    block_sum(mine);
    if (threadIdx.x == 0) {
        sums[2 * block - params.block_base] = mine[0];
        sums[2 * block - params.block_base + 1] = mine[1];
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    loss_kl_backward(const float* __restrict__ prediction, const float* __restrict__ target, const float* __restrict__ weight,
                     const float* __restrict__ total, const float* __restrict__ grad_value, float* __restrict__ grad_prediction, LossParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const Row r = row_of(weight, params.first + group, params);
    if (r.row >= params.rows) {
        return;
    }
    const float* __restrict__ x = prediction + r.at;
    const float* __restrict__ y = target + (r.model * params.target_stride - params.target_base + r.row * params.columns);
    float* __restrict__ out = grad_prediction + r.at;
    if (r.w == 0.0f) {
        for (uint32_t j = 0; j < params.columns; j++) {
            out[j] = 0.0f;
        }
        return;
    }
    const LogSum s = log_sum(x, params.columns);
    const float scale = scale_of(total, grad_value, r.model) * r.w;
    float mass = 0.0f;
    for (uint32_t j = 0; j < params.columns; j++) {
        mass += y[j];
    }
    for (uint32_t j = 0; j < params.columns; j++) {
        out[j] = scale * (mass * expf(x[j] - s.top - s.log) - y[j]);
    }
}

// ---- means ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    loss_mean(const float* __restrict__ sums, float* __restrict__ value, float* __restrict__ total, LossParams params) {
    const uint32_t m = group_index();
    if (m >= params.count) {
        return;
    }
    float mine[2] = {0.0f, 0.0f};
    for (uint32_t b = threadIdx.x; b < params.blocks; b += WG) {
        mine[0] += sums[2 * (m * params.blocks + b)];
        mine[1] += sums[2 * (m * params.blocks + b) + 1];
    }
    block_sum(mine);
    if (threadIdx.x == 0) {
        value[m] = mine[1] == 0.0f ? 0.0f : mine[0] / mine[1];
        total[m] = mine[1];
    }
}
