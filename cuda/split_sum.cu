// Sums of partial results in the order of the splits. Maths and shapes: kernels/split_sum.rs.
//   grid  ⌈M·C / WG⌉      thread = output

struct SplitSumParams {
    uint32_t models;
    uint32_t splits;
    uint32_t width;
    uint32_t first;
    uint32_t count;
};

extern "C" __global__ void __launch_bounds__(WG) split_sum(const float* __restrict__ partials, Stored* __restrict__ total, SplitSumParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at >= params.models * params.count) {
        return;
    }
    const float* x = partials + (at / params.count * params.splits * params.width + params.first + at % params.count);
    float sum = 0.0f;
    for (uint32_t s = 0; s < params.splits; s++) {
        sum += x[s * params.width];
    }
    total[at] = sum;
}
