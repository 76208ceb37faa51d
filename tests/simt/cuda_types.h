// CUDA's keywords, vector types and built-in variables.
#pragma once
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SIMT_VECTOR_TYPES(Type, name)                                       \
    struct alignas(2 * sizeof(Type)) name##2 {                              \
        Type x, y;                                                          \
    };                                                                      \
    struct name##3 {                                                        \
        Type x, y, z;                                                       \
    };                                                                      \
    struct alignas(4 * sizeof(Type) < 16 ? 4 * sizeof(Type) : 16) name##4 { \
        Type x, y, z, w;                                                    \
    };                                                                      \
    inline name##2 make_##name##2(Type x, Type y) {                         \
        return {x, y};                                                      \
    }                                                                       \
    inline name##3 make_##name##3(Type x, Type y, Type z) {                 \
        return {x, y, z};                                                   \
    }                                                                       \
    inline name##4 make_##name##4(Type x, Type y, Type z, Type w) {         \
        return {x, y, z, w};                                                \
    }

SIMT_VECTOR_TYPES(float, float)
SIMT_VECTOR_TYPES(double, double)
SIMT_VECTOR_TYPES(int, int)
SIMT_VECTOR_TYPES(short, short)
SIMT_VECTOR_TYPES(unsigned short, ushort)
SIMT_VECTOR_TYPES(signed char, char)
SIMT_VECTOR_TYPES(unsigned char, uchar)
SIMT_VECTOR_TYPES(long long, longlong)
SIMT_VECTOR_TYPES(unsigned long long, ulonglong)
#undef SIMT_VECTOR_TYPES

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
    return {x, y, z};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

namespace simt {

struct Thread;

// The thread whose fiber runs now (nullptr: none does), and its built-in variables.
struct Running {
    Thread* thread = nullptr;
    uint3 thread_index{}, block_index{};
    dim3 block_dim, grid_dim;
};
extern __attribute__((visibility("hidden"))) Running running;

}  // namespace simt

#define threadIdx (::simt::running.thread_index)
#define blockIdx (::simt::running.block_index)
#define blockDim (::simt::running.block_dim)
#define gridDim (::simt::running.grid_dim)
#define warpSize 32
