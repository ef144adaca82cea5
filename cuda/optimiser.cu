// One step of an optimiser for all parameters of all models. Maths, shapes and source: kernels/optimiser.rs.
//   gradient_norm, adam_update, sgd_update, parameter_average   grid  blocks of each model     thread t takes values t, t+WG, …
//   optimiser_prepare                                           grid  models                   thread t takes block sums t, t+WG, …
//   table [B,4]: offset and size of the block's tensor, first value in a model's part, tensor
//   scratch [M, 3·blocks + SCALES]: sums of each block, then gradient factor, taken, step, root, decay, rate1, rate2, average

struct OptimiserParams {
    uint32_t blocks;
    uint32_t stride;
    uint32_t first_block;
    uint32_t block_count;
    uint32_t first_model;
    uint32_t count;
    uint32_t element;
    uint32_t row;
    uint32_t algorithm;
    uint32_t flags;
    uint32_t average_start;
    float learning_rate;
    float learning_rate_low;
    float rate1;
    float rate1_low;
    float rate2;
    float rate2_low;
    float log1;
    float log1_low;
    float log2;
    float log2_low;
    float eps;
    float eps_low;
    float weight_decay;
    float weight_decay_low;
    float max_grad_norm;
    float max_grad_norm_low;
    float average_rate;
    float average_rate_low;
};

#define SCALES 8
#define DECAY 1u
#define AVERAGE 2u
#define LOSS 4u
#define HYPER 8u
#define NESTEROV 16u
#define MOMENTUM 32u
#define POLYAK 64u
#define LARGE 1125899906842624.0f
#define SHRINK 8.271806e-25f
#define GROW 1.2089258e24f
#define LARGEST_NORM 1e18f
#define CLIP_EPS 1e-6f

__device__ __forceinline__ bool is_finite(float x) {
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

// A workgroup's share: model, block, scales in the scratch, first value, number of values, tensor.
struct Share {
    uint32_t model, block, scales, at, len, tensor;
};

__device__ __forceinline__ Share share_of(const uint32_t* __restrict__ table, uint32_t group, const OptimiserParams& p) {
    const uint32_t model = p.first_model + group / p.block_count, block = p.first_block + group % p.block_count;
    const uint32_t *entry = table + 4 * block, size = entry[1], begin = entry[2];
    const uint32_t scales = model * p.stride - p.row + 3 * p.blocks;
    return {model, block, scales, entry[0] + model * size + begin - p.element, min((uint32_t)BLOCK, size - begin), entry[3]};
}

// ---- norm -----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) 
    gradient_norm(const float* __restrict__ grads, const uint32_t* __restrict__ table, float* __restrict__ scratch, OptimiserParams params) {
    const uint32_t group = group_index(), tid = threadIdx.x;
    if (group >= params.count) {
        return;
    }
    const Share share = share_of(table, group, params);
    const float* __restrict__ x = grads + share.at;
    float sums[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (uint32_t i = tid; i < share.len; i += WG) {
        const float value = is_finite(x[i]) ? x[i] : 0.0f;
        const bool large = fabsf(value) > LARGE;
        const float normal = large ? 0.0f : value, scaled = large ? value * SHRINK : 0.0f;
        sums[0] += normal * normal;
        sums[1] += scaled * scaled;
        sums[2] += is_finite(x[i]) ? 0.0f : 1.0f;
    }
    block_sum(sums);
    if (tid == 0) {
        float* __restrict__ out = scratch + (share.model * params.stride - params.row + 3 * share.block);
        out[0] = sums[0];
        out[1] = sums[1];
        out[2] = sums[2];
    }
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// ln β, and for β = 0 something that e to its power is 0.
__device__ __forceinline__ float log_beta(float q) {
    return fmaxf(log1pf(-q), -1e4f);
}

extern "C" __global__ void __launch_bounds__(WG)
    optimiser_prepare(const float* __restrict__ rate, const float* __restrict__ loss, const float* __restrict__ hyper, float* __restrict__ scratch,
                      uint32_t* __restrict__ counters, float* __restrict__ norm, OptimiserParams params) {
    const uint32_t m = group_index(), tid = threadIdx.x;
    if (m >= params.count) {
        return;
    }
    float* __restrict__ row = scratch + (uint64_t)m * params.stride;
    float total[3] = {0.0f, 0.0f, 0.0f};
    for (uint32_t b = tid; b < params.blocks; b += WG) {
        total[0] += row[3 * b];
        total[1] += row[3 * b + 1];
        total[2] += row[3 * b + 2];
    }
    block_sum(total);
    if (tid > 0) {
        return;
    }
    const bool sgd = params.algorithm == 2;
    float rate1 = params.rate1, rate2 = params.rate2, log1 = params.log1, log2 = params.log2;
    float weight_decay = params.weight_decay, max_norm = params.max_grad_norm;
    if (params.flags & HYPER) {
        const float* __restrict__ h = hyper + 4 * m;
        rate1 = sgd ? h[0] : 1.0f - h[0];
        rate2 = 1.0f - h[1];
        log1 = log_beta(1.0f - h[0]);
        log2 = log_beta(rate2);
        weight_decay = h[2];
        max_norm = h[3];
    }
    // norm = unit · 2^80 where large values are among the gradients
    const bool large = total[1] > 0.0f;
    const float unit = sqrtf(large ? total[1] + total[0] * SHRINK * SHRINK : total[0]);
    const bool clips = max_norm > 0.0f;
    uint32_t status = 0;
    if (total[2] > 0.0f) {
        status = 1;
    } else if (!clips && unit > (large ? LARGEST_NORM * SHRINK : LARGEST_NORM)) {
        status = 4;
    }
    if ((params.flags & LOSS) && !is_finite(loss[m])) {
        status += 2;
    }
    counters[3 * m + 2] = status;
    float* __restrict__ scales = row + 3 * params.blocks;
    if (status != 0) {
        counters[3 * m + 1] += 1;
        norm[m] = UNDEFINED;
        scales[1] = 0.0f;
        return;
    }
    const uint32_t steps = counters[3 * m] + 1;
    counters[3 * m] = steps;
    // the largest f32 stands for a norm beyond it
    norm[m] = large ? fminf(unit, 2.8147496e14f) * GROW : unit;
    const float t = (float)steps, lr = params.learning_rate * rate[m];
    float average = steps == 1 ? 1.0f : params.average_rate;
    if (params.flags & POLYAK) {
        average = steps > params.average_start ? 1.0f / (float)(steps - params.average_start) : 1.0f;
    }
    scales[0] = clips ? fminf(large ? max_norm * SHRINK / unit : max_norm / (unit + CLIP_EPS), 1.0f) : 1.0f;
    scales[1] = 1.0f;
    scales[2] = sgd ? lr : lr / -expm1f(t * log1);
    scales[3] = sgd ? 1.0f : 1.0f / sqrtf(-expm1f(t * log2));
    scales[4] = params.algorithm == 0 ? lr * weight_decay : weight_decay;
    scales[5] = rate1;
    scales[6] = rate2;
    scales[7] = average;
}

// ---- updates --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float averaged(float old, float w, float weight) {
    return weight == 1.0f ? w : old + (w - old) * weight;
}

extern "C" __global__ void __launch_bounds__(WG)
    adam_update(const float* __restrict__ grads, const float* __restrict__ scratch, const float* __restrict__ decay, const uint32_t* __restrict__ table,
               float* __restrict__ parameters,
                float* __restrict__ moment1, float* __restrict__ moment2, float* __restrict__ average, OptimiserParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const Share share = share_of(table, group, params);
    const float* __restrict__ s = scratch + share.scales;
    if (s[1] == 0.0f) {
        return;
    }
    const float d = params.flags & DECAY ? s[4] * decay[share.tensor] : s[4];
    const float factor = s[0], step_size = s[2], root = s[3], rate1 = s[5], rate2 = s[6], weight = s[7];
    const bool coupled = params.algorithm == 1;
#pragma unroll
    for (uint32_t k = 0; k < BLOCK / WG; k++) {
        const uint32_t i = k * WG + threadIdx.x;
        if (i < share.len) {
            const uint32_t at = share.at + i;
            const float w = parameters[at];
            const float g = grads[at] * factor + (coupled ? d * w : 0.0f);
            const float kept = coupled ? w : w - w * d;
            const float m = (moment1[at] - moment1[at] * rate1) + g * rate1;
            const float v = (moment2[at] - moment2[at] * rate2) + g * g * rate2;
            const float next = kept - step_size * m / (sqrtf(v) * root + params.eps);
            moment1[at] = m;
            moment2[at] = v;
            parameters[at] = next;
            if (params.flags & AVERAGE) {
                average[at] = averaged(average[at], next, weight);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    sgd_update(const float* __restrict__ grads, const float* __restrict__ scratch, const float* __restrict__ decay, const uint32_t* __restrict__ table,
               float* __restrict__ parameters,
               float* __restrict__ momentum, OptimiserParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const Share share = share_of(table, group, params);
    const float* __restrict__ s = scratch + share.scales;
    if (s[1] == 0.0f) {
        return;
    }
    const float d = params.flags & DECAY ? s[4] * decay[share.tensor] : s[4];
    const float factor = s[0], step_size = s[2], keep = s[5];
#pragma unroll
    for (uint32_t k = 0; k < BLOCK / WG; k++) {
        const uint32_t i = k * WG + threadIdx.x;
        if (i < share.len) {
            const uint32_t at = share.at + i;
            const float w = parameters[at];
            float g = grads[at] * factor + d * w;
            if (params.flags & MOMENTUM) {
                const float b = momentum[at] * keep + g;
                momentum[at] = b;
                g = params.flags & NESTEROV ? g + keep * b : b;
            }
            parameters[at] = w - step_size * g;
        }
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    parameter_average(const float* __restrict__ parameters, const float* __restrict__ scratch, const uint32_t* __restrict__ table, float* __restrict__ average, OptimiserParams params) {
    const uint32_t group = group_index();
    if (group >= params.count) {
        return;
    }
    const Share share = share_of(table, group, params);
    if (scratch[share.scales + 1] == 0.0f) {
        return;
    }
    for (uint32_t i = threadIdx.x; i < share.len; i += WG) {
        average[share.at + i] = averaged(average[share.at + i], parameters[share.at + i], scratch[share.scales + 7]);
    }
}
