// The 16-bit floats: bits and conversions, which round to nearest, ties to even. NaN becomes the
// one that CUDA's conversions give.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda_types.h"

namespace simt {

template <typename To, typename From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// In a namespace without functions, lest argument-dependent look-up finds ours beside a kernel's.
namespace types {

struct bfloat16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};
struct alignas(4) bfloat162 {
    bfloat16 x, y;
};
struct alignas(4) half2 {
    half x, y;
};

}  // namespace types

using types::bfloat16;
using types::bfloat162;
using types::half;
using types::half2;

// `value` without its lowest `shift` bits, rounded.
inline uint32_t shift_rounded(uint32_t value, int shift) {
    const uint32_t odd = value >> shift & 1;
    return (value + (1u << (shift - 1)) - 1 + odd) >> shift;
}

inline bfloat16 to_bfloat16(float x) {
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>(shift_rounded(bit_cast<uint32_t>(x), 16))};
}

inline float widen(bfloat16 x) {
    return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline half to_half(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (x != x) return {0x7fff};
    uint32_t rounded;
    if (magnitude >= 0x38800000) {                       // 2^-14, the least normal half
        const bool overflows = magnitude >= 0x477ff000;  // 65520, half way to 65536
        rounded = overflows ? 0x7c00 : shift_rounded(magnitude - (112u << 23), 13);
    } else if (magnitude >= 0x33000000) {  // 2^-25, half the least subnormal half
        const int shift = 126 - static_cast<int>(magnitude >> 23);
        rounded = shift_rounded((magnitude & 0x7fffff) | 0x800000, shift);
    } else {
        rounded = 0;
    }
    return {static_cast<uint16_t>(sign | rounded)};
}

inline float widen(half x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude < 0x400) {  // zero or subnormal: a multiple of 2^-24
        const float value = static_cast<float>(magnitude) * 0x1p-24f;
        return bit_cast<float>(sign | bit_cast<uint32_t>(value));
    }
    const uint32_t bias = magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;
    return bit_cast<float>(sign | ((magnitude << 13) + bias));
}

}  // namespace simt

using __nv_bfloat16 = simt::bfloat16;
using __nv_bfloat162 = simt::bfloat162;
using __half = simt::half;
using __half2 = simt::half2;

inline simt::bfloat16 __float2bfloat16(float x) {
    return simt::to_bfloat16(x);
}
inline simt::bfloat16 __float2bfloat16_rn(float x) {
    return simt::to_bfloat16(x);
}
inline float __bfloat162float(simt::bfloat16 x) {
    return simt::widen(x);
}
inline simt::half __float2half(float x) {
    return simt::to_half(x);
}
inline simt::half __float2half_rn(float x) {
    return simt::to_half(x);
}
inline float __half2float(simt::half x) {
    return simt::widen(x);
}

inline simt::bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {simt::to_bfloat16(x), simt::to_bfloat16(y)};
}
inline float2 __bfloat1622float2(simt::bfloat162 v) {
    return {simt::widen(v.x), simt::widen(v.y)};
}
inline simt::bfloat162 __halves2bfloat162(simt::bfloat16 x, simt::bfloat16 y) {
    return {x, y};
}
inline simt::half2 __floats2half2_rn(float x, float y) {
    return {simt::to_half(x), simt::to_half(y)};
}
inline float2 __half22float2(simt::half2 v) {
    return {simt::widen(v.x), simt::widen(v.y)};
}
inline simt::half2 __halves2half2(simt::half x, simt::half y) {
    return {x, y};
}

inline simt::bfloat162 __hmul2(simt::bfloat162 a, simt::bfloat162 b) {
    return __floats2bfloat162_rn(simt::widen(a.x) * simt::widen(b.x),
                                 simt::widen(a.y) * simt::widen(b.y));
}
inline simt::half2 __hmul2(simt::half2 a, simt::half2 b) {
    return __floats2half2_rn(simt::widen(a.x) * simt::widen(b.x),
                             simt::widen(a.y) * simt::widen(b.y));
}

inline unsigned short __bfloat16_as_ushort(simt::bfloat16 x) {
    return x.bits;
}
inline simt::bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return {bits};
}
inline unsigned short __half_as_ushort(simt::half x) {
    return x.bits;
}
inline simt::half __ushort_as_half(unsigned short bits) {
    return {bits};
}
