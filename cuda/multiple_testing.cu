// Combinatorially symmetric cross-validation. Maths, shapes and source: kernels/multiple_testing.rs.
//   cscv_blocks   grid  S     block WG      one block per trial, threads stride over the bars of each block of bars
//   cscv_best     grid  C     block WG      one block per combination, threads stride over trials, tree of (key, index)
//   cscv_rank     grid  C     block WG      the same, counts of trials out of sample below and level with the best

struct CscvParams {
    uint32_t n;
    uint32_t t;
    uint32_t splits;
    uint32_t shift;
    uint32_t combinations;
    uint32_t first;
};

#define NONE 0xffffffffu

// First bar of a block; the first t mod splits blocks have one bar more.
__device__ __forceinline__ uint32_t edge(CscvParams params, uint32_t block) {
    return block * (params.t / params.splits) + min(block, params.t % params.splits);
}

// ---- blocks -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG) cscv_blocks(const float* __restrict__ returns, uint32_t* __restrict__ sums, CscvParams params) {
    __shared__ uint32_t sh_largest[WG / 32];
    __shared__ uint64_t sh_sum[WG / 32], sh_squares[WG / 32];
    const uint32_t row = group_index(), tid = threadIdx.x, warp = tid / 32;
    if (row >= params.n) {
        return;
    }
    const float* __restrict__ series = returns + row * params.t;

    // largest exponent of the row
    uint32_t largest = 1;
    for (uint32_t j = tid; j < params.t; j += WG) {
        largest = max(largest, (__float_as_uint(series[j]) >> 23) & 0xffu);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    if (tid % 32 == 0) {
        sh_largest[warp] = largest;
    }
    __syncthreads();
    for (int i = 0; i < WG / 32; i++) {
        largest = max(largest, sh_largest[i]);
    }
    const int scale = (int)params.shift + 126 - (int)largest;

    // exact sum and sum of squares of each block
    for (uint32_t block = 0; block < params.splits; block++) {
        uint64_t sum = 0, squares = 0;
        const uint32_t to_bar = edge(params, block + 1);
        for (uint32_t j = edge(params, block) + tid; j < to_bar; j += WG) {
            const int64_t x = to_fixed(series[j], scale);
            const uint64_t size = magnitude64(x);
            sum += (uint64_t)x;
            squares += shr128(mul64(size, size), params.shift).lo;
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
            squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
        }
        if (tid % 32 == 0) {
            sh_sum[warp] = sum;
            sh_squares[warp] = squares;
        }
        __syncthreads();
        if (tid == 0) {
            for (int i = 1; i < WG / 32; i++) {
                sum += sh_sum[i];
                squares += sh_squares[i];
            }
            uint32_t* __restrict__ out = sums + 4 * block * params.n + row;
            out[0] = (uint32_t)sum;
            out[params.n] = (uint32_t)(sum >> 32);
            out[2 * params.n] = (uint32_t)squares;
            out[3 * params.n] = (uint32_t)(squares >> 32);
        }
        __syncthreads();  // the next block overwrites sh_sum
    }
}

// ---- combinations -------------------------------------------------------------------------------------------------

// Bars of the blocks in `mask`.
__device__ __forceinline__ uint32_t bars_of(CscvParams params, uint32_t mask) {
    uint32_t bars = 0;
    for (uint32_t block = 0; block < params.splits; block++) {
        bars += mask >> block & 1 ? edge(params, block + 1) - edge(params, block) : 0;
    }
    return bars;
}

// Key of a trial's Sharpe ratio over the `bars` bars of the blocks in `mask`; 0 where it is undefined.
__device__ __forceinline__ uint32_t score(const uint32_t* __restrict__ sums, CscvParams params, uint32_t trial, uint32_t mask, uint32_t bars) {
    uint64_t sum = 0, squares = 0;
    for (uint32_t block = 0; block < params.splits; block++) {
        if (mask >> block & 1) {
            const uint32_t* __restrict__ at = sums + 4 * block * params.n + trial;
            sum += at[0] | (uint64_t)at[params.n] << 32;
            squares += at[2 * params.n] | (uint64_t)at[3 * params.n] << 32;
        }
    }
    const uint128 variance = scaled_variance(bars, (int64_t)sum, squares, params.shift);
    if (bars < 2 || is_zero128(variance)) {
        return 0;
    }
    const uint64_t size = magnitude64((int64_t)sum);
    return ratio_key(mul64(size, size), variance, (int64_t)sum < 0);
}

__device__ __forceinline__ uint32_t complement(CscvParams params, uint32_t mask) {
    return ~mask & ((1u << params.splits) - 1);
}

extern "C" __global__ void __launch_bounds__(WG)
    cscv_best(const uint32_t* __restrict__ sums, const uint32_t* __restrict__ masks, uint32_t* __restrict__ best, CscvParams params) {
    __shared__ uint32_t sh_key[WG], sh_trial[WG];
    const uint32_t group = group_index(), tid = threadIdx.x;
    if (group >= params.combinations) {
        return;
    }
    const uint32_t mask = masks[group], bars = bars_of(params, mask);

    // each thread's best in sample; a later trial must be strictly better
    uint32_t key = 0, winner = NONE;
    for (uint32_t trial = tid; trial < params.n; trial += WG) {
        const uint32_t mine = score(sums, params, trial, mask, bars);
        if (winner == NONE || mine > key) {
            key = mine;
            winner = trial;
        }
    }
    sh_key[tid] = key;
    sh_trial[tid] = winner;
    __syncthreads();

    // tree: larger key, then lower index
    for (uint32_t half = WG / 2; half > 0; half /= 2) {
        if (tid < half) {
            const uint32_t other = sh_trial[tid + half];
            const bool better = sh_key[tid + half] > sh_key[tid] || (sh_key[tid + half] == sh_key[tid] && other < sh_trial[tid]);
            if (other != NONE && (sh_trial[tid] == NONE || better)) {
                sh_key[tid] = sh_key[tid + half];
                sh_trial[tid] = other;
            }
        }
        __syncthreads();
    }
    // against earlier runs of trials; the winner's key out of sample beside it
    if (tid == 0 && sh_trial[0] != NONE && (best[3 * group + 1] == NONE || sh_key[0] > best[3 * group])) {
        best[3 * group] = sh_key[0];
        best[3 * group + 1] = params.first + sh_trial[0];
        best[3 * group + 2] = score(sums, params, sh_trial[0], complement(params, mask), params.t - bars);
    }
}

// ---- ranks --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    cscv_rank(const uint32_t* __restrict__ sums, const uint32_t* __restrict__ masks, const uint32_t* __restrict__ best, uint32_t* __restrict__ counts,
              CscvParams params) {
    __shared__ uint32_t sh_below[WG / 32], sh_level[WG / 32];
    const uint32_t group = group_index(), tid = threadIdx.x;
    if (group >= params.combinations) {
        return;
    }
    const uint32_t mask = complement(params, masks[group]), bars = bars_of(params, mask);
    const uint32_t pivot = best[3 * group + 2];
    uint32_t below = 0, level = 0;
    for (uint32_t trial = tid; trial < params.n; trial += WG) {
        const uint32_t key = score(sums, params, trial, mask, bars);
        below += key < pivot ? 1 : 0;
        level += key == pivot ? 1 : 0;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        below += __shfl_xor_sync(0xffffffffu, below, lanes);
        level += __shfl_xor_sync(0xffffffffu, level, lanes);
    }
    if (tid % 32 == 0) {
        sh_below[tid / 32] = below;
        sh_level[tid / 32] = level;
    }
    __syncthreads();
    if (tid == 0) {
        for (int i = 1; i < WG / 32; i++) {
            below += sh_below[i];
            level += sh_level[i];
        }
        counts[2 * group] += below;
        counts[2 * group + 1] += level;
    }
}
