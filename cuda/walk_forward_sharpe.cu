// Sharpe ratio of every series in every window, and its gradient. Maths, shapes and source: kernels/walk_forward_sharpe.rs.
//   segment_moments               grid  N·G             one block per (series, segment)
//   walk_forward_sharpe           grid  ⌈N·W / WG⌉      thread = (series, window)
//   walk_forward_sharpe_backward  grid  ⌈N·T / WG⌉      thread = (series, bar)

struct WalkForwardParams {
    uint32_t n;
    uint32_t t;
    uint32_t w;
    uint32_t g;
    float periods;
    float periods_low;
};

#define OUTSIDE 0xffffffffu

// ---- segments ---------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    segment_moments(const float* __restrict__ returns, const uint32_t* __restrict__ edges, float* __restrict__ segments, WalkForwardParams params) {
    const uint32_t group = group_index();
    if (group >= params.n * params.g) {
        return;
    }
    const uint32_t row = group / params.g, g = group % params.g;
    const uint32_t from_bar = row * params.t + edges[g], to_bar = row * params.t + edges[g + 1];
    const float first = returns[from_bar];
    float sum[1] = {0.0f};
    for (uint32_t j = from_bar + threadIdx.x; j < to_bar; j += WG) {
        sum[0] += returns[j] - first;
    }
    block_sum(sum);
    const float offset = sum[0] / (float)(to_bar - from_bar);
    float squares[1] = {0.0f};
    for (uint32_t j = from_bar + threadIdx.x; j < to_bar; j += WG) {
        const float d = (returns[j] - first) - offset;
        squares[0] += d * d;
    }
    block_sum(squares);
    if (threadIdx.x == 0) {
        segments[2 * group] = first + offset;
        segments[2 * group + 1] = squares[0];
    }
}

// ---- windows ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    walk_forward_sharpe(const float* __restrict__ segments, const uint32_t* __restrict__ edges, const uint32_t* __restrict__ spans,
                        float* __restrict__ sharpe, float* __restrict__ moments, WalkForwardParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.n * params.w) {
        return;
    }
    const uint32_t row = at / params.w, window = at % params.w;
    float count = 0.0f, mean = 0.0f, m2 = 0.0f;
    for (uint32_t g = spans[2 * window]; g < spans[2 * window + 1]; g++) {
        const float more = (float)(edges[g + 1] - edges[g]);
        const float total = count + more;
        const float delta = segments[2 * (row * params.g + g)] - mean;
        mean += delta * (more / total);
        m2 += segments[2 * (row * params.g + g) + 1] + delta * delta * (count * more / total);
        count = total;
    }
    const bool valid = count > 1.0f && m2 > 0.0f;
    const float deviation = valid ? sqrtf(m2 / (count - 1.0f)) : 0.0f;
    sharpe[at] = valid ? mean / deviation * sqrtf(params.periods) : UNDEFINED;
    moments[2 * at] = mean;
    moments[2 * at + 1] = deviation;
}

// ---- backward ---------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    walk_forward_sharpe_backward(const float* __restrict__ returns, const float* __restrict__ moments, const float* __restrict__ grad_sharpe,
                                 const uint32_t* __restrict__ edges, const uint32_t* __restrict__ spans, const uint32_t* __restrict__ segment_of,
                                 const uint32_t* __restrict__ covers, float* __restrict__ grad_returns, WalkForwardParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.n * params.t) {
        return;
    }
    const uint32_t row = at / params.t, g = segment_of[at % params.t];
    float sum = 0.0f;
    if (g != OUTSIDE) {
        for (uint32_t c = covers[g]; c < covers[g + 1]; c++) {
            const uint32_t window = covers[c];
            const uint32_t i = row * params.w + window;
            const float mean = moments[2 * i], deviation = moments[2 * i + 1];
            if (deviation > 0.0f) {
                const float count = (float)(edges[spans[2 * window + 1]] - edges[spans[2 * window]]);
                const float slope = mean / ((count - 1.0f) * deviation * deviation);
                sum += grad_sharpe[i] * sqrtf(params.periods) / deviation * (1.0f / count - slope * (returns[at] - mean));
            }
        }
    }
    grad_returns[at] = sum;
}
