// Sharpe ratios of block-bootstrap replicates. Maths, shapes and source: kernels/block_bootstrap.rs.
//   grid  N·R      block WG      one block of threads per (replicate, series): WG blocks of bars are drawn at once, one a thread; their
//                                lengths are summed up, then threads stride over the bars that they cover
//   reads returns [N,T], statistics [N,12], lengths [N,K]      writes sharpe [R,N]      shared memory: 2·WG words and 3 a warp

struct BootstrapParams {
    uint32_t n;
    uint32_t t;
    uint32_t table;
    uint32_t replicates;
    uint32_t first;
    uint32_t seed;
    uint32_t seed_high;
};

#define STATISTICS 12
#define STREAM 0x4242u
#define FLAT 1e-5f

// Length of a block: one more than the entries of the series' table that do not exceed u.
__device__ __forceinline__ uint32_t length_of(const uint32_t* __restrict__ table, uint32_t entries, uint32_t u) {
    uint32_t low = 0, high = entries;
    while (low < high) {
        const uint32_t mid = (low + high) / 2;
        if (table[mid] <= u) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low + 1;
}

extern "C" __global__ void __launch_bounds__(WG)
    block_bootstrap(const float* __restrict__ returns, const float* __restrict__ statistics, const uint32_t* __restrict__ lengths, float* __restrict__ sharpe,
                    BootstrapParams params) {
    __shared__ uint32_t sh_start[WG], sh_end[WG], sh_warp[WG / 32];
    const uint32_t group = group_index(), tid = threadIdx.x, lane = tid % 32;
    if (group >= params.n * params.replicates) {
        return;
    }
    const uint32_t row = group % params.n, replicate = params.first + group / params.n;
    const float* __restrict__ series = returns + row * params.t;
    const float mean = statistics[row * STATISTICS];
    float sums[2] = {0.0f, 0.0f};
    uint32_t base = 0;
    for (uint32_t batch = 0; base < params.t; batch++) {
        // each thread's block: where it starts, how long it is
        const uint32_t block = batch * WG + tid;
        uint32_t word[4] = {replicate, 0, block / 2, STREAM << 16};
        philox4x32(word, params.seed, params.seed_high);
        sh_start[tid] = __umulhi(block & 1 ? word[2] : word[0], params.t);
        uint32_t end = length_of(lengths + row * params.table, params.table, (block & 1 ? word[3] : word[1]) >> 1);

        // where each block ends in the replicate
        for (uint32_t step = 1; step < 32; step *= 2) {
            const uint32_t before = __shfl_up_sync(0xffffffffu, end, step);
            end += lane >= step ? before : 0;
        }
        if (lane == 31) {
            sh_warp[tid / 32] = end;
        }
        __syncthreads();
        for (uint32_t warp = 0; warp < tid / 32; warp++) {
            end += sh_warp[warp];
        }
        sh_end[tid] = end;
        __syncthreads();

        // the bars that these blocks cover
        const uint32_t total = sh_end[WG - 1], covered = min(total, params.t - base);
        for (uint32_t j = tid; j < covered; j += WG) {
            uint32_t low = 0, high = WG - 1;
            while (low < high) {
                const uint32_t mid = (low + high) / 2;
                if (sh_end[mid] <= j) {
                    low = mid + 1;
                } else {
                    high = mid;
                }
            }
            uint32_t bar = sh_start[low] + j - (low > 0 ? sh_end[low - 1] : 0);
            bar -= bar >= params.t ? params.t : 0;
            const float d = series[bar] - mean;
            sums[0] += d;
            sums[1] += d * d;
        }
        __syncthreads();  // the next batch overwrites sh_start
        base += total;
    }

    block_sum(sums);
    if (tid == 0) {
        const float count = (float)params.t;
        const float offset = sums[0] / count;
        const float central = sums[1] - sums[0] * offset;
        const bool valid = params.t > 1 && central > FLAT * sums[1];
        sharpe[group] = valid ? (mean + offset) / sqrtf(central / (count - 1.0f)) : UNDEFINED;
    }
}
