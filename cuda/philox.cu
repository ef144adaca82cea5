// Philox4x32-10: bits, uniforms and normals. Maths, shapes and source: kernels/philox.rs.
//   grid  ceil(N / WG)      workgroup WG      thread = row
//   reads counter [N,4], key [N,2]      writes bits, uniforms, normal [N,4]

struct PhiloxParams {
    uint32_t n;
};

extern "C" __global__ void __launch_bounds__(WG)
    philox(const uint32_t* counter, const uint32_t* key, uint32_t* bits, float* uniforms, float* normal, PhiloxParams params) {
    const uint32_t row = group_index() * WG + threadIdx.x;
    if (row >= params.n) {
        return;
    }
    const uint32_t at = 4 * row;
    uint32_t word[4] = {counter[at], counter[at + 1], counter[at + 2], counter[at + 3]};
    philox4x32(word, key[2 * row], key[2 * row + 1]);
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
        const float u = uniform_of(word[pair]), v = uniform_of(word[pair + 1]);
        const float radius = sqrtf(2.0f * neg_log_uniform(word[pair] >> 8));
        const float2 z = turn(v);
        bits[at + pair] = word[pair];
        bits[at + pair + 1] = word[pair + 1];
        uniforms[at + pair] = u;
        uniforms[at + pair + 1] = v;
        normal[at + pair] = radius * z.x;
        normal[at + pair + 1] = radius * z.y;
    }
}
