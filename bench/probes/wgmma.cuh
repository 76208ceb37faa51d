// wgmma: m64nNk16 of bf16 and f16, B from shared memory, A too or from registers.
#pragma once
#include "bench/probes/hopper.cuh"

namespace probes {

using specrt::bf16_t;
using specrt::f16_t;

// Sums of A [64, k] times B [N, k]: element e of [j] is row (lane / 4) + 8 (e / 2) of the warp's
// 16, column 8 j + 2 (lane % 4) + e % 2. The layout of mma.sync too.
template <int N>
using Sums = float[N / 8][4];

// Of rows of 128 bytes, swizzled: address and stride between groups of 8 rows (1024 bytes) in units
// of 16 bytes, the leading offset has no meaning, layout 1 is the 128-byte swizzle.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
    return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
           uint64_t{1} << 62;
}

#define PROBES_D4 "%0, %1, %2, %3"
#define PROBES_D8 PROBES_D4 ", %4, %5, %6, %7"
#define PROBES_D16 PROBES_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PROBES_D32 \
    PROBES_D16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PROBES_D64                                                                               \
    PROBES_D32                                                                                   \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49" \
    ", %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PROBES_F4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define PROBES_F8(j) PROBES_F4(j), PROBES_F4(j + 1)
#define PROBES_F16(j) PROBES_F8(j), PROBES_F8(j + 2)
#define PROBES_F32(j) PROBES_F16(j), PROBES_F16(j + 4)
#define PROBES_F64(j) PROBES_F32(j), PROBES_F32(j + 8)

#if PROBES_HOPPER
#define PROBES_ASM(...) asm volatile(__VA_ARGS__)
#else
#define PROBES_ASM(...)
#endif

// d += A B: no operand is negated, both are K-major.
#define PROBES_WGMMA(T, type, n, digits, floats, a_operand, b_operand)                         \
    __device__ __forceinline__ void wgmma(Sums<n>& d, uint64_t a, uint64_t b, T) {             \
        PROBES_ASM("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" digits \
                   "}, " a_operand ", " b_operand ", 1, 1, 1, 0, 0;" : floats : "l"(a),        \
                   "l"(b));                                                                    \
    }
#define PROBES_WGMMA_ALL(T, type)                                                              \
    PROBES_WGMMA(T, type, 8, PROBES_D4, PROBES_F4(0), "%4", "%5")                              \
    PROBES_WGMMA(T, type, 16, PROBES_D8, PROBES_F8(0), "%8", "%9")                             \
    PROBES_WGMMA(T, type, 32, PROBES_D16, PROBES_F16(0), "%16", "%17")                         \
    PROBES_WGMMA(T, type, 64, PROBES_D32, PROBES_F32(0), "%32", "%33")                         \
    PROBES_WGMMA(T, type, 128, PROBES_D64, PROBES_F64(0), "%64", "%65")                        \
    __device__ __forceinline__ void wgmma(Sums<8>& d, const uint32_t (&a)[4], uint64_t b, T) { \
        PROBES_ASM("wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type " {" PROBES_D4   \
                   "}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;" : PROBES_F4(0) : "r"(a[0]),          \
                   "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
    }
PROBES_WGMMA_ALL(bf16_t, "bf16")
PROBES_WGMMA_ALL(f16_t, "f16")

__device__ __forceinline__ void wgmma_fence() {
    PROBES_ASM("wgmma.fence.sync.aligned;" :: : "memory");
}
__device__ __forceinline__ void wgmma_commit_and_wait() {
    PROBES_ASM("wgmma.commit_group.sync.aligned;" :: : "memory");
    PROBES_ASM("wgmma.wait_group.sync.aligned 0;" :: : "memory");
}

}  // namespace probes
