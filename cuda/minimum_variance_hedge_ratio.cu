// Minimum-variance hedge ratios. Maths, shapes and source: kernels/minimum_variance_hedge_ratio.rs.
//   hedge_covariances  grid B·(K+1)·E            workgroup WG      group = one entry of one covariance, threads over time
//   hedge_mixture      grid ceil(B·E / WG)       workgroup WG      thread = one entry of the mixture's covariance
//   hedge_solve        grid ceil(B·(K+1) / WG)   workgroup WG      thread = one system; the last of a series is the mixture
//   reads spot [B,T,n], futures [B,T,m], probs [B,T,K], lengths [B]
//   writes moments: K regimes, all steps; mixture; then per_regime, ratio, effectiveness, flags

struct HedgeRatioParams {
    uint32_t batch;
    uint32_t steps;
    uint32_t regimes;
    uint32_t spots;
    uint32_t futures_count;
    uint32_t spot_stride;
    uint32_t futures_stride;
    uint32_t probs_stride;
    uint32_t average;
    float ridge;
};

#define MOST 8
#define NO_WEIGHT 1e-6f
#define FLAT 1e-12f
#define DEPENDENT 1e-6f
#define FLAT_FUTURES 1u
#define POOLED 2u
#define COLLINEAR 4u

// Entries of a covariance: futures by futures, futures by spots, variances of the spots.
__device__ __forceinline__ uint32_t entries(const HedgeRatioParams& p) {
    return p.futures_count * (p.futures_count + p.spots) + p.spots;
}

// Reals of a regime: its covariance, the means of futures and spots, its weight.
__device__ __forceinline__ uint32_t record(const HedgeRatioParams& p) {
    return entries(p) + p.futures_count + p.spots + 1;
}

struct Pair {
    uint32_t x, y;
};

// Columns of entry e: the futures, then the spots.
__device__ __forceinline__ Pair columns(const HedgeRatioParams& p, uint32_t e) {
    const uint32_t m = p.futures_count;
    if (e < m * m) {
        return {e / m, e % m};
    }
    const uint32_t cross = e - m * m;
    if (cross < m * p.spots) {
        return {cross / p.spots, m + cross % p.spots};
    }
    return {m + cross - m * p.spots, m + cross - m * p.spots};
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_covariances(const float* __restrict__ spot, const float* __restrict__ futures, const float* __restrict__ probs,
                  const uint32_t* __restrict__ lengths, float* __restrict__ moments, HedgeRatioParams params) {
    const uint32_t count = entries(params), kinds = params.regimes + 1, index = group_index();
    if (index >= params.batch * kinds * count) {
        return;
    }
    const uint32_t e = index % count, k = (index / count) % kinds, b = index / (count * kinds);
    const Pair pair = columns(params, e);
    const uint32_t steps = lengths[b] < params.steps ? lengths[b] : params.steps;
    const bool pooled = k == params.regimes;
    const uint32_t m = params.futures_count;
    const float* own_futures = futures + (uint64_t)b * params.futures_stride;
    const float* own_spot = spot + (uint64_t)b * params.spot_stride;
    const float* own_probs = probs + (uint64_t)b * params.probs_stride + k;
    const float* first = pair.x < m ? own_futures + pair.x : own_spot + pair.x - m;
    const float* second = pair.y < m ? own_futures + pair.y : own_spot + pair.y - m;
    const uint32_t first_step = pair.x < m ? m : params.spots, second_step = pair.y < m ? m : params.spots;
    float sum[3] = {0.0f, 0.0f, 0.0f};
    for (uint32_t t = threadIdx.x; t < steps; t += WG) {
        const float p = pooled ? 1.0f : own_probs[(uint64_t)t * params.regimes];
        sum[0] += p;
        sum[1] += p * first[(uint64_t)t * first_step];
        sum[2] += p * second[(uint64_t)t * second_step];
    }
    block_sum(sum);
    const float weight = sum[0], scale = 1.0f / fmaxf(weight, 1e-30f), mean_a = sum[1] * scale, mean_b = sum[2] * scale;
    float square[1] = {0.0f};
    for (uint32_t t = threadIdx.x; t < steps; t += WG) {
        const float p = pooled ? 1.0f : own_probs[(uint64_t)t * params.regimes];
        square[0] += p * (first[(uint64_t)t * first_step] - mean_a) * (second[(uint64_t)t * second_step] - mean_b);
    }
    block_sum(square);
    if (threadIdx.x > 0) {
        return;
    }
    float* to = moments + (uint64_t)(b * kinds + k) * record(params);
    to[e] = square[0] * scale;
    if (pair.x == pair.y) {
        to[count + pair.x] = mean_a;
    }
    if (e == 0) {
        to[record(params) - 1] = weight;
    }
}

// One series as a thread of hedge_solve sees it.
struct Series {
    const HedgeRatioParams& p;
    const float* moments;  // of all its regimes
    const float* last;     // probabilities of its last step
    float norm;            // 1 over their sum

    // A regime's own moments, or those of all times where it has no weight.
    __device__ __forceinline__ const float* of(uint32_t k) const {
        const float* own = moments + (uint64_t)k * record(p);
        return own[record(p) - 1] <= NO_WEIGHT ? moments + (uint64_t)p.regimes * record(p) : own;
    }
};

__device__ __forceinline__ Series series_of(const HedgeRatioParams& p, const float* moments, const float* probs, const uint32_t* lengths, uint32_t b) {
    uint32_t steps = lengths[b] < p.steps ? lengths[b] : p.steps;
    steps = steps > 0 ? steps : 1;
    Series series = {p, moments + (uint64_t)b * (p.regimes + 1) * record(p), probs + (uint64_t)b * p.probs_stride + (uint64_t)(steps - 1) * p.regimes, 0.0f};
    float weight = 0.0f;
    for (uint32_t k = 0; k < p.regimes; k++) {
        weight += series.last[k];
    }
    series.norm = 1.0f / fmaxf(weight, 1e-30f);
    return series;
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_mixture(const float* __restrict__ moments, const float* __restrict__ probs, const uint32_t* __restrict__ lengths, float* __restrict__ mixture,
                  HedgeRatioParams params) {
    const uint32_t index = group_index() * WG + threadIdx.x, count = entries(params);
    if (index >= params.batch * count) {
        return;
    }
    const uint32_t b = index / count, e = index % count;
    const Pair pair = columns(params, e);
    const Series series = series_of(params, moments, probs, lengths, b);
    float mean_a = 0.0f, mean_b = 0.0f, sum = 0.0f;
    for (uint32_t k = 0; k < params.regimes; k++) {
        const float share = series.last[k] * series.norm, *mean = series.of(k) + count;
        mean_a += share * mean[pair.x];
        mean_b += share * mean[pair.y];
    }
    for (uint32_t k = 0; k < params.regimes; k++) {
        const float *at = series.of(k), *mean = at + count;
        sum += series.last[k] * series.norm * (at[e] + (mean[pair.x] - mean_a) * (mean[pair.y] - mean_b));
    }
    float* to = mixture + (uint64_t)b * record(params);
    to[e] = sum;
    if (pair.x == pair.y) {
        to[count + pair.x] = mean_a;
    }
    if (e == 0) {
        to[record(params) - 1] = 1.0f;
    }
}

// Cholesky of `left` in place; the flags of what it had to leave out.
__device__ __forceinline__ uint32_t factor(float (&left)[MOST][MOST], uint32_t m, float ridge) {
    uint32_t found = 0;
    float trace = 0.0f;
    for (uint32_t i = 0; i < m; i++) {
        trace += left[i][i];
    }
    for (uint32_t i = 0; i < m; i++) {
        const float own = left[i][i];
        float pivot = own + (m > 1 ? ridge * trace : 0.0f);
        for (uint32_t j = 0; j < i; j++) {
            pivot -= left[i][j] * left[i][j];
        }
        const bool none = own <= 1e-30f, bad = none || pivot <= DEPENDENT * own;
        found |= bad ? (none ? FLAT_FUTURES : COLLINEAR) : 0u;
        const float inverse = bad ? 0.0f : 1.0f / sqrtf(fmaxf(pivot, 1e-37f));
        left[i][i] = inverse;
        for (uint32_t r = i + 1; r < m; r++) {
            float x = left[r][i];
            for (uint32_t j = 0; j < i; j++) {
                x -= left[r][j] * left[i][j];
            }
            left[r][i] = x * inverse;
        }
    }
    return found;
}

__device__ __forceinline__ void back_substitute(const float (&left)[MOST][MOST], float (&right)[MOST], uint32_t m) {
    for (uint32_t i = 0; i < m; i++) {
        float x = right[i];
        for (uint32_t j = 0; j < i; j++) {
            x -= left[i][j] * right[j];
        }
        right[i] = x * left[i][i];
    }
    for (uint32_t i = m; i-- > 0;) {
        float x = right[i];
        for (uint32_t j = i + 1; j < m; j++) {
            x -= left[j][i] * right[j];
        }
        right[i] = x * left[i][i];
    }
}

// Sets the left side from a regime's moments; a variance that is rounding of its mean counts as none.
__device__ __forceinline__ void set_left(float (&left)[MOST][MOST], const float* at, const HedgeRatioParams& p) {
    const uint32_t m = p.futures_count;
    for (uint32_t i = 0; i < m; i++) {
        for (uint32_t j = 0; j < m; j++) {
            left[i][j] = at[i * m + j];
        }
        const float mean = at[entries(p) + i];
        left[i][i] = left[i][i] <= FLAT * mean * mean ? 0.0f : left[i][i];
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hedge_solve(const float* __restrict__ moments, const float* __restrict__ probs, const uint32_t* __restrict__ lengths, const float* __restrict__ mixture,
                float* __restrict__ per_regime, float* __restrict__ ratio, float* __restrict__ effectiveness, uint32_t* __restrict__ flags,
                HedgeRatioParams params) {
    const uint32_t index = group_index() * WG + threadIdx.x, kinds = params.regimes + 1;
    if (index >= params.batch * kinds) {
        return;
    }
    const uint32_t b = index / kinds, k = index % kinds, m = params.futures_count, n = params.spots;
    const Series series = series_of(params, moments, probs, lengths, b);
    const float* mixed = mixture + (uint64_t)b * record(params);
    const bool whole = k == params.regimes, averaged = whole && params.average == 1;
    float left[MOST][MOST], right[MOST];
    float* to = whole ? ratio + (uint64_t)b * m * n : per_regime + ((uint64_t)b * params.regimes + k) * m * n;
    uint32_t found = 0;
    // A regime, the mixture, or all regimes to average.
    const uint32_t first = averaged ? 0 : k, last = averaged ? params.regimes : k + 1;
    for (uint32_t r = first; r < last; r++) {
        const float* at = whole && !averaged ? mixed : series.of(r);
        set_left(left, at, params);
        found |= factor(left, m, params.ridge);
        if (!whole && at != series.moments + (uint64_t)k * record(params)) {
            found |= POOLED;
        }
        const float share = averaged ? series.last[r] * series.norm : 1.0f;
        for (uint32_t s = 0; s < n; s++) {
            for (uint32_t i = 0; i < m; i++) {
                right[i] = at[m * m + i * n + s];
            }
            back_substitute(left, right, m);
            for (uint32_t i = 0; i < m; i++) {
                to[i * n + s] = (r == first ? 0.0f : to[i * n + s]) + share * right[i];
            }
        }
    }
    flags[index] = found;
    if (!whole) {
        return;
    }
    for (uint32_t s = 0; s < n; s++) {
        const float before = mixed[m * (m + n) + s];
        float gain = 0.0f;
        for (uint32_t i = 0; i < m; i++) {
            float other = 2.0f * mixed[m * m + i * n + s];
            for (uint32_t j = 0; j < m; j++) {
                other -= mixed[i * m + j] * to[j * n + s];
            }
            gain += to[i * n + s] * other;
        }
        effectiveness[(uint64_t)b * n + s] = before <= 1e-30f ? 0.0f : gain / before;
    }
}
