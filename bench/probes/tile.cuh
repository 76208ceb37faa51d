// A tile's product by each tensor-core instruction, from one layout in shared memory: rows of 64
// values of 16 bits (128 bytes), the 16-byte chunk c of row r at chunk c ^ (r & 7). That is what
// TMA and wgmma call the 128-byte swizzle; it wants the stage at a multiple of 1024 bytes.
#pragma once
#include "bench/probes/hopper.cuh"
#include "core/ptx.cuh"

namespace probes {

using specrt::bf16_t;
using specrt::f16_t;

enum class Unit {
    kMma,             // mma.sync m16n8k16, a warp's 16 rows
    kWgmma,           // wgmma m64nNk16, both operands from shared memory
    kWgmmaRegisters,  // the same with A in registers
};

inline const char* name_of(Unit unit) {
    constexpr const char* kNames[] = {"mma", "wgmma", "wgmma, A in registers"};
    return kNames[static_cast<int>(unit)];
}

constexpr int kTileRows = 64;      // of A
constexpr int kTileThreads = 128;  // warp w: rows 16 w to 16 w + 15
constexpr int kStageK = 64;
constexpr int kRowBytes = 2 * kStageK;

// Sums of A [64, k] times B [N, k]: element e of [j] is row (lane / 4) + 8 (e / 2) of the warp's
// 16, column 8 j + 2 (lane % 4) + e % 2. The layout of both instructions.
template <int N>
using Sums = float[N / 8][4];

__device__ __forceinline__ int row_of_sum(int e) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
}
__device__ __forceinline__ int column_of_sum(int j, int e) {
    return 8 * j + threadIdx.x % 4 * 2 + e % 2;
}

// Where 8 values of a row are in a stage, in bytes.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Values k and k + 1 (k even) of a row.
__device__ __forceinline__ uint32_t pair_at(const unsigned char* stage, int row, int k) {
    return *reinterpret_cast<const uint32_t*>(stage + chunk_at(row, k / 8) + k % 8 * 2);
}

// A warp's 16 x 16 values from column k on, as mma.sync and wgmma take them.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* stage, int k) {
    const int row = row_of_sum(0), column = k + threadIdx.x % 4 * 2;
    a[0] = pair_at(stage, row, column);
    a[1] = pair_at(stage, row + 8, column);
    a[2] = pair_at(stage, row, column + 8);
    a[3] = pair_at(stage, row + 8, column + 8);
}

// --- wgmma -----------------------------------------------------------------------------------

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

// --- a stage ---------------------------------------------------------------------------------

// sums += A B over the first 16 kSteps columns of a stage. All 128 threads; what is in shared
// memory was made visible by fence_for_async() and a barrier.
template <Unit kUnit, int kSteps, int N, typename T>
__device__ __forceinline__ void multiply(Sums<N>& sums, const unsigned char* a,
                                         const unsigned char* b, T type) {
    if constexpr (kUnit == Unit::kMma) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t left[4];
            load_a(left, a, 16 * step);
            const int row = threadIdx.x % 32 / 4, k = 16 * step + threadIdx.x % 4 * 2;
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                const uint32_t right[2] = {pair_at(b, 8 * j + row, k),
                                           pair_at(b, 8 * j + row, k + 8)};
                specrt::ptx::mma_m16n8k16(sums[j], left, right, type);
            }
        }
    } else {
        const uint64_t right = matrix_descriptor(shared_address(b));
        if constexpr (kUnit == Unit::kWgmma) {
            const uint64_t left = matrix_descriptor(shared_address(a));
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kSteps; ++step)  // 16 values further: 32 bytes
                wgmma(sums, left + 2 * step, right + 2 * step, type);
        } else {
            static_assert(kSteps == 1, "registers of A stay untouched until the wait");
            uint32_t left[4];
            load_a(left, a, 0);
            wgmma_fence();
            wgmma(sums, left, right, type);
        }
        wgmma_commit_and_wait();
        // Until here the sums are the tensor core's: the compiler must not read them any earlier.
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
            asm volatile(""
                         : "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
                         :
                         : "memory");
    }
}

}  // namespace probes
