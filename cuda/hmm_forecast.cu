// Steps ahead of a hidden Markov chain. Maths, shapes and source: kernels/hmm_forecast.rs.
//   hmm_forecast         grid  ⌈B·lanes / WG⌉   `lanes` threads per sequence, each with states lane, lane + lanes, …; groups of at most a
//                                               warp wait for their warp alone
//   hmm_sojourn          grid  ⌈B·K / WG⌉       thread = sequence and state
//   hmm_sojourn_average  grid  ⌈B / WG⌉         thread = sequence
//   shared memory: 3·STATES floats

struct HmmForecastParams {
    uint32_t b;
    uint32_t h;
    uint32_t k;
    uint32_t u;
    uint32_t trans_row;
    uint32_t trans_step;
    uint32_t softmax;
    uint32_t from_step;
    uint32_t to_step;
    uint32_t lanes;
    float cap;
    float log_left;
};

#define IMPOSSIBLE (-1e30f)
#define DEAD (-1e29f)

__device__ __forceinline__ float probability_of(float x) {
    return x <= DEAD ? 0.0f : expf(x);
}

__device__ __forceinline__ float logit(const float* __restrict__ at, const float* __restrict__ input, uint32_t u) {
    float x = at[u];
    for (uint32_t c = 0; c < u; c++) {
        x += at[c] * input[c];
    }
    return fmaxf(x, IMPOSSIBLE);
}

// ln of the sum of exponentials of a row of logits.
__device__ __forceinline__ float log_norm(const float* __restrict__ row, const float* __restrict__ input, const HmmForecastParams& params) {
    float top = IMPOSSIBLE, sum = 0.0f;
    for (uint32_t j = 0; j < params.k; j++) {
        top = fmaxf(top, logit(row + j * (params.u + 1), input, params.u));
    }
    for (uint32_t j = 0; j < params.k; j++) {
        sum += expf(logit(row + j * (params.u + 1), input, params.u) - top);
    }
    return top + logf(sum);
}

// ---- distribution ahead ---------------------------------------------------------------------------------------------------

// Lanes of one sequence lie in one warp where they are 32 at most.
__device__ __forceinline__ void sync_lanes(uint32_t lanes) {
    if (lanes <= 32) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    hmm_forecast(const float* __restrict__ probability, const float* __restrict__ log_trans, const float* __restrict__ inputs, float* forecast,
                 HmmForecastParams params) {
    __shared__ float sh_now[2 * STATES], sh_norm[STATES];
    const uint32_t lanes = params.lanes, lane = threadIdx.x % lanes, b = group_index() * (WG / lanes) + threadIdx.x / lanes, k = params.k, u = params.u;
    const bool here = b < params.b && lane < k;
    const uint32_t slot = (threadIdx.x / lanes) * min(k, lanes);
    if (here) {
        for (uint32_t j = lane; j < k; j += lanes) {
            sh_now[slot + j] = params.from_step == 0 ? probability[b * k + j] : forecast[(b * params.h + params.from_step - 1) * k + j];
        }
    }
    sync_lanes(lanes);
    const float* __restrict__ table = log_trans + b * params.trans_row;
    uint32_t parity = 0;
    for (uint32_t s = params.from_step; s < params.to_step; s++) {
        const float* __restrict__ input = inputs + (b * params.h + s) * u;
        if (params.softmax != 0) {
            if (here) {
                for (uint32_t i = lane; i < k; i += lanes) {
                    sh_norm[slot + i] = log_norm(table + i * k * (u + 1), input, params);
                }
            }
            sync_lanes(lanes);
        }
        if (here) {
            for (uint32_t j = lane; j < k; j += lanes) {
                float sum = 0.0f, next = 0.0f;
                for (uint32_t i = 0; i < k; i++) {
                    float x;
                    if (params.softmax == 0) {
                        x = probability_of(table[s * params.trans_step + i * k + j]);
                    } else {
                        x = logit(table + (i * k + j) * (u + 1), input, u);
                        x = x <= DEAD ? 0.0f : expf(x - sh_norm[slot + i]);
                    }
                    const float p = sh_now[parity * STATES + slot + i];
                    sum += p;
                    next += p * x;
                }
                next = sum > 0.0f ? next / sum : 0.0f;
                sh_now[(1 - parity) * STATES + slot + j] = next;
                forecast[(b * params.h + s) * k + j] = next;
            }
        }
        sync_lanes(lanes);
        parity = 1 - parity;
    }
}

// ---- durations ------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    hmm_sojourn(const float* __restrict__ log_trans, const float* __restrict__ inputs, float* survival, float* sojourn, uint32_t* capped,
                HmmForecastParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x, k = params.k, b = at / k, i = at % k, u = params.u;
    if (b >= params.b) {
        return;
    }
    // log-probability to stay over slot s
    const auto log_stay_of = [&](uint32_t s) {
        const float* __restrict__ row = log_trans + b * params.trans_row + s * params.trans_step + i * k * (u + 1);
        if (params.softmax == 0) {
            return fminf(row[i], 0.0f);
        }
        const float* __restrict__ input = inputs + (b * params.h + s) * u;
        const float own = logit(row + i * (u + 1), input, u);
        return own <= DEAD ? IMPOSSIBLE : fminf(own - log_norm(row, input, params), 0.0f);
    };
    const bool moves = params.softmax != 0 || params.trans_step != 0;
    float log_stay = log_stay_of(0), log_survival = 0.0f, alive = 1.0f, first = 0.0f, second = 0.0f, quantile = -1.0f;
    for (uint32_t s = 0; s < params.h; s++) {
        if (s > 0 && moves) {
            log_stay = log_stay_of(s);
        }
        first += alive;
        second += (float)(2 * s + 1) * alive;
        const float after = log_survival + log_stay;
        if (quantile < 0.0f && after <= params.log_left) {
            quantile = (float)s + (params.log_left - log_survival) / log_stay;
        }
        log_survival = after;
        alive = probability_of(after);
        survival[(b * params.h + s) * k + i] = alive;
    }

    // beyond the last slot
    const float leave = -expm1f(fmaxf(log_stay, -80.0f)), steps = (float)params.h;
    const bool absorbing = leave <= 0.0f && alive > 0.0f;
    if (!absorbing && alive > 0.0f) {
        first += alive / leave;
        second += alive * ((2.0f * steps + 1.0f) + 2.0f * (1.0f - leave) / leave) / leave;
    }
    if (quantile < 0.0f) {
        quantile = absorbing ? params.cap : steps + (params.log_left - log_survival) / log_stay;
    }
    sojourn[3 * at] = absorbing ? params.cap : fminf(first, params.cap);
    sojourn[3 * at + 1] = absorbing ? UNDEFINED : fmaxf(second - first * first, 0.0f);
    sojourn[3 * at + 2] = fminf(quantile, params.cap);
    capped[at] = absorbing || first > params.cap || quantile > params.cap;
}

// ---- average --------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    hmm_sojourn_average(const float* __restrict__ probability, const float* __restrict__ sojourn, float* expected, HmmForecastParams params) {
    const uint32_t b = group_index() * WG + threadIdx.x;
    if (b >= params.b) {
        return;
    }
    float sum = 0.0f;
    for (uint32_t i = 0; i < params.k; i++) {
        sum += probability[b * params.k + i] * sojourn[3 * (b * params.k + i)];
    }
    expected[b] = sum;
}
