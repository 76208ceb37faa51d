// A few values side by side, moved in as few instructions as their bytes allow.
#pragma once
#include "core/vector.cuh"

namespace specrt {

constexpr int pack_alignment(size_t bytes) {
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}

template <typename T, int kSize>
struct alignas(pack_alignment(sizeof(T) * kSize)) Pack {
    T at[kSize];
};

// A GPU faults where a pack is not at a multiple of its alignment; a CPU would not.
template <typename P, typename T>
__device__ __forceinline__ P* as_pack(T* p) {
#if defined(SPECRT_SIMT)
    simt::require_aligned(p, alignof(P));
#endif
    return reinterpret_cast<P*>(p);
}

template <int kSize, typename T>
__device__ __forceinline__ Pack<T, kSize> load_pack(const T* p) {
    return *as_pack<const Pack<T, kSize>>(p);
}
template <int kSize, typename T>
__device__ __forceinline__ void store_shared_pack(T* p, const Pack<T, kSize>& pack) {
    *as_pack<Pack<T, kSize>>(p) = pack;
}
// To global memory.
template <int kSize, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kSize>& pack) {
#if !defined(SPECRT_SIMT)
    // Asked for by name: nvcc 13.0 may make one store for each value of an assignment.
    if constexpr (sizeof(pack) % 16 == 0) {
        uint4 words[sizeof(pack) / 16];
        memcpy(words, &pack, sizeof(pack));
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i)
            __stwb(reinterpret_cast<uint4*>(p) + i, words[i]);
        return;
    }
#endif
    *as_pack<Pack<T, kSize>>(p) = pack;
}

// Elements first .. first + kSize - 1 of a row, zeros from `width` on. `is_whole`: 16-byte loads
// are possible and no vector is cut by the row's end.
template <int kSize, typename T>
__device__ __forceinline__ Pack<T, kSize> load_piece(const T* row, int first, int width,
                                                     bool is_whole) {
    if (is_whole && first < width) return load_pack<kSize>(row + first);
    Pack<T, kSize> piece;
#pragma unroll
    for (int e = 0; e < kSize; ++e)
        piece.at[e] = first + e < width ? row[first + e] : from_float<T>(0.0f);
    return piece;
}

template <int kSize, typename T>
__device__ __forceinline__ void store_piece(T* row, int first, int width, bool is_whole,
                                            const Pack<T, kSize>& piece) {
    if (is_whole) {
        if (first < width) store_pack(row + first, piece);
        return;
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e)
        if (first + e < width) row[first + e] = piece.at[e];
}

// Two values of 16 bits as one word, at a multiple of 4 bytes. (memcpy knows nothing of the
// alignment and moves bytes.)
template <typename T>
__device__ __forceinline__ uint32_t load_word(const T* p) {
    return *as_pack<const uint32_t>(p);
}
template <typename T>
__device__ __forceinline__ void store_word(T* p, uint32_t bits) {
    *as_pack<uint32_t>(p) = bits;
}

// For choosing a kernel that moves 16 bytes at a time: what addresses and byte strides must be
// multiples of.
inline bool is_multiple_of_16(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
inline bool is_multiple_of_16(int64_t bytes) {
    return bytes % 16 == 0;
}

}  // namespace specrt
