// Philox4x32-10: bits, uniforms and normals. Maths, shapes and source: kernels/philox.rs.
//   grid  ceil(N / WG)      workgroup WG      thread = row
//   reads counter [N,4], key [N,2]      writes bits, uniforms, normal [N,4]

struct PhiloxParams {
    uint32_t n;
};

// 2·atanh(s) for |s| ≤ 1/3.
__device__ __forceinline__ float two_atanh(float s) {
    const float q = s * s;
    const float tail =
        q * (0.33333334f + q * (0.2f + q * (0.14285715f + q * (0.11111111f + q * (0.09090909f + q * (0.07692308f + q * 0.06666667f))))));
    return 2.0f * (s + s * tail);
}

// -ln of the uniform (k + ½)·2⁻²⁴; through 1 - u, which is exact, where u ≥ ½.
__device__ __forceinline__ float neg_log_uniform(uint32_t k) {
    if (k >= 0x800000u) {
        const float t = ((float)(0xffffffu - k) + 0.5f) * 5.9604645e-8f;
        return two_atanh(t / (2.0f - t));
    }
    const uint32_t v = __float_as_uint((float)k + 0.5f);
    int e = (int)(v >> 23) - 127;
    float m = __uint_as_float((v & 0x7fffffu) | 0x3f800000u);
    if (m > 1.4142135f) {
        m *= 0.5f;
        e += 1;
    }
    return (float)(24 - e) * 0.6931472f - two_atanh((m - 1.0f) / (m + 1.0f));
}

// (cos, sin) of 2πv by quarter turns and series.
__device__ __forceinline__ float2 turn(float v) {
    const float quarter = floorf(4.0f * v + 0.5f);
    const float x = (v - 0.25f * quarter) * 6.2831855f;
    const float q = x * x;
    const float s = x * (1.0f + q * (-0.16666667f + q * (0.008333334f + q * (-0.0001984127f + q * 2.7557319e-6f))));
    const float c = 1.0f + q * (-0.5f + q * (0.041666668f + q * (-0.0013888889f + q * (2.4801587e-5f + q * -2.755732e-7f))));
    switch ((uint32_t)quarter & 3u) {
        case 0: return make_float2(c, s);
        case 1: return make_float2(-s, c);
        case 2: return make_float2(-c, -s);
        default: return make_float2(s, -c);
    }
}

__device__ __forceinline__ float uniform_of(uint32_t word) {
    return ((float)(word >> 8) + 0.5f) * 5.9604645e-8f;
}

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
