// CUDA's arithmetic functions. Those that CUDA rounds correctly are correctly rounded here too; the
// fast ones are more exact here than on a GPU, so their bits differ.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "float16.h"

inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __fsqrt_rn(float x) {
    return std::sqrt(x);
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __frsqrt_rn(float x) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}

namespace simt {

// Subnormals count as zero, coming and going, as in ex2.approx.ftz.f32.
inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline float exp_approx(float x) {
    return exp2_approx(x * 1.4426950408889634f);
}

}  // namespace simt

// Macros, since the C library declares functions of these names.
#define rsqrtf(x) __frsqrt_rn(x)
#define __expf(x) ::simt::exp_approx(x)
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __clzll(long long x) {
    return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline unsigned __float_as_uint(float x) {
    return simt::bit_cast<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
    return simt::bit_cast<float>(x);
}
inline int __float_as_int(float x) {
    return simt::bit_cast<int>(x);
}
inline float __int_as_float(int x) {
    return simt::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
    return simt::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return simt::bit_cast<double>(x);
}

template <typename T>
inline T __ldg(const T* p) {
    return *p;
}

// CUDA's min and max, which take two types where the usual conversions are clear.
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) {
        return std::fmin(static_cast<T>(a), static_cast<T>(b));
    } else {
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
    }
}
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) {
        return std::fmax(static_cast<T>(a), static_cast<T>(b));
    } else {
        return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
    }
}
