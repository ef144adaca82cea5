// Helpers that every CUDA unit may use; placed before the kernel's own text, after `#define WG` and the tile constants.
// No includes: NVRTC has no headers. The same text compiles under NVRTC 12 and 13 and, for cuda-host, under a C++17 compiler.

#ifdef __CUDACC_RTC__
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif

// Linear index of this workgroup in a grid folded into three dimensions. It may pass the last group: kernels guard their tail.
__device__ __forceinline__ uint32_t group_index() {
    return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

// Whether two types are the same; pins the fields of params structs to those of Rust.
template <class A, class B>
struct SameType {
    enum { value = 0 };
};
template <class A>
struct SameType<A, A> {
    enum { value = 1 };
};
