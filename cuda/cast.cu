// Reals between storages, sums in 16 bits, and copies that start or end inside a word. Maths and shapes: kernels/cast.rs.
//   cast_to, cast_from, cast_add, cast_copy   grid ⌈count / WG⌉   thread = element

struct CastParams {
    uint32_t count;
    uint32_t from_at;
    uint32_t to_at;
    float scale;
};

extern "C" __global__ void __launch_bounds__(WG) cast_to(const float* __restrict__ from, Stored* __restrict__ to, CastParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at < params.count) {
        to[at] = from[at] * params.scale;
    }
}

extern "C" __global__ void __launch_bounds__(WG) cast_from(const Stored* __restrict__ from, float* __restrict__ to, CastParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at < params.count) {
        to[at] = (float)from[at] * params.scale;
    }
}

extern "C" __global__ void __launch_bounds__(WG)
    cast_add(const Stored* __restrict__ from, const Stored* __restrict__ other, Stored* __restrict__ to, CastParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at < params.count) {
        to[at] = (float)from[at] + (float)other[at];
    }
}

extern "C" __global__ void __launch_bounds__(WG) cast_copy(const Stored* __restrict__ from, Stored* __restrict__ to, CastParams params) {
    const uint32_t at = group_index() * WG + threadIdx.x;
    if (at < params.count) {
        to[params.to_at + at] = from[params.from_at + at];
    }
}
