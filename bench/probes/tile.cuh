// A tile's product by each tensor-core instruction, from one layout in shared memory: rows of 64
// values of 16 bits (128 bytes), the 16-byte chunk c of row r at chunk c ^ (r & 7). That is what
// TMA and wgmma call the 128-byte swizzle; it wants the stage at a multiple of 1024 bytes.
#pragma once
#include "bench/probes/wgmma.cuh"

namespace probes {

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

// Rows of one operand in shared memory.
template <int kRows>
struct alignas(1024) Stage {
    unsigned char bytes[kRows * kRowBytes];
};

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
