// Weights of one byte: e4m3, four bits of exponent (bias 7), three of mantissa, no infinity; what
// would be NaN counts as 480. Their values are exact in either type of 16 bits.
#pragma once
#include <type_traits>

#include "core/launch.cuh"

namespace specrt::product {

struct e4m3_t {
    uint8_t bits;
};

// Both halves multiplied by 2^n, n being the difference of the types' biases: exact, and what was
// subnormal becomes normal.
template <typename T>
__device__ __forceinline__ uint32_t rebias(uint32_t pair) {
    constexpr bool kIsHalf = std::is_same_v<T, f16_t>;
    using Pair = std::conditional_t<kIsHalf, __half2, __nv_bfloat162>;
    constexpr uint32_t kFactor = kIsHalf ? 0x5c005c00 : 0x7b807b80;  // 2^8, 2^120
    Pair values, factor;
    memcpy(&values, &pair, sizeof(pair));
    memcpy(&factor, &kFactor, sizeof(kFactor));
    const Pair product = __hmul2(values, factor);
    memcpy(&pair, &product, sizeof(pair));
    return pair;
}

// Bytes 0 and 2 of a word as a pair of T, and bytes 1 and 3. A word holds k and k + 1, and k + 8
// and k + 9, by turns: what a thread multiplies of sixteen k, if their two eights lie by turns.
template <typename T>
__device__ __forceinline__ void widen(uint32_t word, uint32_t& even, uint32_t& odd) {
    constexpr uint32_t kSign = 0x80008000;
    if constexpr (std::is_same_v<T, f16_t>) {
        constexpr uint32_t kRest = 0x3f803f80;  // three bits of mantissa are the first of ten
        even = rebias<T>((word << 8 & kSign) | (word << 7 & kRest));
        odd = rebias<T>((word & kSign) | (word >> 1 & kRest));
    } else {
        constexpr uint32_t kRest = 0x07f007f0;  // of seven
        even = rebias<T>((word << 8 & kSign) | (word << 4 & kRest));
        odd = rebias<T>((word & kSign) | (word >> 4 & kRest));
    }
}

}  // namespace specrt::product
