// One sum of a tensor core, as published models of the hardware have it (MMA-Sim, arXiv 2511.10909;
// independently arXiv 2512.07004): accumulator and products are aligned to the largest of their
// exponents, each is truncated towards zero to `bits` fractional bits of it, they are added
// exactly, and the total is truncated to float32. The order of the products cannot matter.
// mma.m16n8k16 is
//   sm_90: one sum of 16, 25 bits        sm_80: two sums of 8, 24 bits, in the order of k
// Plain C++ without any of the shim: host code of a CUDA compiler includes it too.
//
// - A product is not normalised before it is aligned: its exponent is the sum of its factors'.
// - A subnormal has its type's smallest exponent. A zero has exponent -126, so a product of zero
//   may be the largest: it takes bits from an accumulator 2^128 below its other factor.
// - A total of zero is +0, also after -0 or where truncation leaves nothing of it.
// - A total of 2^128 or more is infinite, although truncation towards zero could saturate.
// - With an infinity or a NaN among the values, the result is what their sum in float64 is: an
//   infinity, or the NaN 0x7fffffff.
#pragma once
#include <cstdint>
#include <cstring>

namespace simt {

// The smallest exponents of normal numbers: of float32 and bfloat16, and of half.
constexpr int kMinExponent = -126, kMinExponentHalf = -14;

// significand * 2^(exponent - 23), |significand| < 2^24. Of infinities and NaN the exponent is
// kNotFinite, which is more than any sum of two others, and the significand has no meaning.
struct Unpacked {
    int32_t significand, exponent;
    float value;
};

constexpr int32_t kNotFinite = 1 << 16;

// `value` is of the type whose smallest exponent is given: what has more bits would lose them.
inline Unpacked unpack(float value, int min_exponent = kMinExponent) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const int biased = static_cast<int>(word >> 23 & 255);
    int32_t magnitude = static_cast<int32_t>(word & 0x7fffff);
    int32_t exponent = kMinExponent;
    if (biased == 255) {
        exponent = kNotFinite;
    } else if (biased > 0) {
        magnitude |= 0x800000;
        exponent = biased - 127;
    }
    if (magnitude != 0 && exponent < min_exponent) {
        const int below = min_exponent - exponent;
        magnitude = below < 32 ? magnitude >> below : 0;
        exponent = min_exponent;
    }
    return {word >> 31 ? -magnitude : magnitude, exponent, value};
}

// x / 2^shift without its fraction; |x| < 2^61, any shift of 0 or more.
inline int64_t truncate(int64_t x, int shift) {
    const int by = shift < 62 ? shift : 62;
    const int64_t below = (x >> 63) & ((int64_t{1} << by) - 1);  // of a negative x: up, not down
    return (x + below) >> by;
}

// total * 2^unit, truncated.
inline float truncate_to_float32(int64_t total, int unit) {
    if (total == 0) return 0.0f;
    const int64_t magnitude = total < 0 ? -total : total;
    const int exponent = unit + 63 - __builtin_clzll(static_cast<uint64_t>(magnitude));
    const int kept = exponent < kMinExponent ? kMinExponent : exponent;
    const int shift = kept - 23 - unit;
    const int64_t significand = shift < 0 ? magnitude << -shift : truncate(magnitude, shift);
    if (significand == 0) return 0.0f;
    // A subnormal has biased exponent 0; else the leading one adds 1 to the exponent's field.
    uint32_t word = static_cast<uint32_t>(kept + 126) << 23;
    word = kept > 127 ? 0x7f800000u : word + static_cast<uint32_t>(significand);
    if (total < 0) word |= 0x80000000u;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline float sum_not_finite(const Unpacked* a, const Unpacked* b, int n, float c) {
    double total = c;
    for (int i = 0; i < n; ++i) total += static_cast<double>(a[i].value) * b[i].value;
    if (total == total) return static_cast<float>(total);
    const uint32_t word = 0x7fffffff;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// c + sum of a[i] b[i]. n at most 1024, bits 23 to 46.
inline float fused_sum(const Unpacked* a, const Unpacked* b, int n, float c, int bits) {
    const Unpacked accumulator = unpack(c);
    int largest = accumulator.exponent;
    for (int i = 0; i < n; ++i) {
        const int exponent = a[i].exponent + b[i].exponent;
        largest = exponent > largest ? exponent : largest;
    }
    if (largest >= kNotFinite / 2) return sum_not_finite(a, b, n, c);
    int64_t total = truncate(int64_t{accumulator.significand} * (int64_t{1} << (bits - 23)),
                             largest - accumulator.exponent);
    for (int i = 0; i < n; ++i) {
        const int64_t product = int64_t{a[i].significand} * b[i].significand;
        total += truncate(product, largest - a[i].exponent - b[i].exponent + 46 - bits);
    }
    return truncate_to_float32(total, largest - bits);
}

// The same, n at most 16. `min_exponent`: of the type of a and b.
inline float fused_sum(const float* a, const float* b, int n, float c, int bits,
                       int min_exponent = kMinExponent) {
    Unpacked left[16], right[16];
    for (int i = 0; i < n; ++i) {
        left[i] = unpack(a[i], min_exponent);
        right[i] = unpack(b[i], min_exponent);
    }
    return fused_sum(left, right, n, c, bits);
}

}  // namespace simt
