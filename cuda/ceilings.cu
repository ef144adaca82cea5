// The arithmetic ceiling: multiply-adds in registers. What and why: kernels/ceilings.rs.
//   grid  n      block WG      every thread keeps CHAINS chains      writes out [n·WG]

struct CeilingParams {
    uint32_t n;
    uint32_t rounds;
    float a;
    float b;
};

extern "C" __global__ void __launch_bounds__(WG) ceiling_multiply_add(float* __restrict__ out, CeilingParams params) {
    const uint32_t group = group_index();
    const uint32_t tid = threadIdx.x;
    if (group >= params.n) {
        return;
    }
    float x[CHAINS];
#pragma unroll
    for (uint32_t i = 0; i < CHAINS; i++) {
        x[i] = (float)(tid + i);
    }
    for (uint32_t round = 0; round < params.rounds; round++) {
#pragma unroll
        for (uint32_t i = 0; i < CHAINS; i++) {
            x[i] = x[i] * params.a + params.b;
        }
    }
    float all = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < CHAINS; i++) {
        all += x[i];
    }
    out[group * WG + tid] = all;
}
