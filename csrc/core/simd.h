// Sixteen float lanes, three ways (AVX-512, two AVX2 halves, plain loops), one result.
//
// Invariant: every operation here is lane-wise IEEE arithmetic, or a reduction in one fixed tree
// (lane i + lane i+8, then +4, +2, +1). So a kernel written with V16 gives the same bits under
// every instruction set, whatever the compiler does; -ffp-contract=off keeps it from fusing on its
// own.
//
// Hazard: this header is compiled with different -m flags in different objects. Everything lives in
// a namespace of the instruction set's name, and kernels must not instantiate std:: templates:
// the linker would keep one copy of those, perhaps the AVX-512 one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(SPECRT_ISA)
#error "core/simd.h is for *_cpu.cpp files, which the build compiles once per instruction set"
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/philox.h"

namespace specrt {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
// Four bits of exponent, three of mantissa, no infinity; what would be NaN counts as 480.
struct e4m3 {
    uint8_t bits;
};
// What is loaded of an e4m3 is its value / 256: its bits among those of a half, exponent to
// exponent. Who multiplies by it owes the factor.
constexpr float kUnitOfE4M3 = 256.0f;

namespace SPECRT_ISA {

inline float from_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline uint32_t to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

// --- scalar conversions ---
inline float to_float(float x) {
    return x;
}
inline float to_float(bf16 x) {
    return from_bits(static_cast<uint32_t>(x.bits) << 16);
}
inline float to_float(f16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // Scaling by 2^112 moves half's exponent bias to float's and normalises subnormals exactly.
    return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

inline float to_float(e4m3 x) {
    const int bits = (x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7;
    return to_float(f16{static_cast<uint16_t>(bits)});
}

inline void from_float(float x, float* out) {
    *out = x;
}
inline void from_float(float x, bf16* out) {  // round to nearest, ties to even
    uint32_t u = to_bits(x);
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    u += 0x7fffu + ((u >> 16) & 1u);
    out->bits = is_nan ? 0x7fc0 : static_cast<uint16_t>(u >> 16);
}
inline void from_float(float x, f16* out) {
    const uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {  // a quiet NaN, as the conversion instructions give
        half = 0x7e00u | ((rest >> 13) & 0x3ffu);
    } else if (rest >= 0x477ff000u) {  // rounds past 65504
        half = 0x7c00u;
    } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 aligns and rounds the mantissa
        half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000u;
    } else {
        half = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

// --- vectors ---
// Of a signed byte times 128, the bits of an e4m3 in a half: its sign comes twice, once too often.
constexpr int16_t kHalfOfE4M3 = static_cast<int16_t>(0xbf80);
#if defined(__AVX512F__)

struct V16 {
    __m512 v;
};
inline V16 zero() {
    return {_mm512_setzero_ps()};
}
inline V16 splat(float x) {
    return {_mm512_set1_ps(x)};
}
inline V16 load(const float* p) {
    return {_mm512_loadu_ps(p)};
}
inline V16 load(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline V16 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline V16 load(const e4m3* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return {_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(kHalfOfE4M3)))};
}
inline void store(V16 a, float* p) {
    _mm512_storeu_ps(p, a.v);
}
inline void store(V16 a, bf16* p) {
    const __m512i u = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i bits =
        _mm512_mask_blend_epi32(is_nan, _mm512_srli_epi32(sum, 16), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}
inline void store(V16 a, f16* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline V16 add(V16 a, V16 b) {
    return {_mm512_add_ps(a.v, b.v)};
}
inline V16 sub(V16 a, V16 b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
inline V16 mul(V16 a, V16 b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
inline V16 div(V16 a, V16 b) {
    return {_mm512_div_ps(a.v, b.v)};
}
inline V16 fma(V16 a, V16 b, V16 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// a > b ? a : b, lane by lane: a NaN in b passes through.
inline V16 max(V16 a, V16 b) {
    return {_mm512_max_ps(a.v, b.v)};
}
inline V16 min(V16 a, V16 b) {
    return {_mm512_min_ps(a.v, b.v)};
}
inline V16 zero_where_less(V16 value, V16 x, V16 bound) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ), value.v,
                                 _mm512_setzero_ps())};
}
// x < bound ? yes : no
inline V16 choose_less(V16 x, V16 bound, V16 yes, V16 no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ), no.v, yes.v)};
}
// +inf where x > bound > 1, NaN where x is NaN.
inline V16 overflow_where_above(V16 value, V16 x, V16 bound) {
    const __mmask16 is_above = _mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLE_UQ);
    return {_mm512_mask_mul_ps(value.v, is_above, x.v, _mm512_set1_ps(3.4028235e38f))};
}
// value * 2^n, n the integer held in the low mantissa bits of `magic` (see exp_of).
inline V16 scale_pow2(V16 value, V16 magic) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(magic.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value.v), n))};
}
// Sixteen 32-bit integers, whose sums wrap.
struct I16 {
    __m512i v;
};
inline I16 zero_ints() {
    return {_mm512_setzero_si512()};
}
inline V16 to_float(I16 a) {
    return {_mm512_cvtepi32_ps(a.v)};
}
inline I16 add(I16 a, I16 b) {
    return {_mm512_add_epi32(a.v, b.v)};
}
inline void store(I16 a, uint32_t* p) {
    _mm512_storeu_si512(p, a.v);
}
// a0 b0 a1 b1 .. a7 b7, and a8 b8 .. a15 b15.
inline V16 interleave_lo(V16 a, V16 b) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return {_mm512_permutex2var_ps(a.v, order, b.v)};
}
inline V16 interleave_hi(V16 a, V16 b) {
    const __m512i order =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {_mm512_permutex2var_ps(a.v, order, b.v)};
}
// Packs the lanes that are not below `least` to the front, and their indices, the first lane's
// being `first`; returns how many. All sixteen of both outputs may be written.
inline int pack_not_less(V16 x, V16 least, int32_t first, float* values, int32_t* indices) {
    const __mmask16 taken = _mm512_cmp_ps_mask(x.v, least.v, _CMP_GE_OQ);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(taken, x.v));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(taken, index));
    return __builtin_popcount(taken);
}
inline __m128 fold_to_4(V16 a) {
    const __m256 hi = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(a.v), 1));
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), hi);
    return _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
}
inline void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
// Four vectors, each folded to four lanes: 4 i .. 4 i + 3 are what `fold_to_4` makes of the i-th.
inline V16 fold4(const V16 a[4]) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a[0].v, a[1].v, 0x44),
                                    _mm512_shuffle_f32x4(a[0].v, a[1].v, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(a[2].v, a[3].v, 0x44),
                                    _mm512_shuffle_f32x4(a[2].v, a[3].v, 0xee));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd))};
}
// The sums of the sixteen vectors of which `fold4` made these four, in their order.
inline V16 reduce_folded(V16 a, V16 b, V16 c, V16 d) {
    const auto halved = [](__m512 x, __m512 y) {
        return _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))));
    };
    const __m512 ab = halved(a.v, b.v), cd = halved(c.v, d.v);
    const __m512 sums =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
    // Of lane i of each quarter q: the sum of vector i of the q-th four.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_permutexvar_ps(order, sums)};
}

#elif defined(__AVX2__)

struct V16 {
    __m256 lo, hi;
};
inline V16 zero() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
inline V16 splat(float x) {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline V16 load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline __m256 load8(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline __m256 load8(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load8(const e4m3* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
    return _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(kHalfOfE4M3)));
}
inline V16 load(const bf16* p) {
    return {load8(p), load8(p + 8)};
}
inline V16 load(const f16* p) {
    return {load8(p), load8(p + 8)};
}
inline V16 load(const e4m3* p) {
    return {load8(p), load8(p + 8)};
}
inline void store(V16 a, float* p) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline __m256i bf16_bits(__m256 v) {  // in the low half of each lane
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
}
inline void store(V16 a, bf16* p) {
    const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
    // Packing works within 128-bit halves: lo 0-3, hi 0-3, lo 4-7, hi 4-7.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(V16 a, f16* p) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kNearest));
}
inline V16 add(V16 a, V16 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline V16 sub(V16 a, V16 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline V16 mul(V16 a, V16 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline V16 div(V16 a, V16 b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline V16 fma(V16 a, V16 b, V16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V16 max(V16 a, V16 b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline V16 min(V16 a, V16 b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline V16 zero_where_less(V16 value, V16 x, V16 bound) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, bound.lo, _CMP_LT_OQ), value.lo),
            _mm256_andnot_ps(_mm256_cmp_ps(x.hi, bound.hi, _CMP_LT_OQ), value.hi)};
}
inline V16 choose_less(V16 x, V16 bound, V16 yes, V16 no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(x.lo, bound.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(x.hi, bound.hi, _CMP_LT_OQ))};
}
inline __m256 overflow_where_above(__m256 value, __m256 x, __m256 bound) {
    const __m256 is_above = _mm256_cmp_ps(x, bound, _CMP_NLE_UQ);
    return _mm256_blendv_ps(value, _mm256_mul_ps(x, _mm256_set1_ps(3.4028235e38f)), is_above);
}
inline V16 overflow_where_above(V16 value, V16 x, V16 bound) {
    return {overflow_where_above(value.lo, x.lo, bound.lo),
            overflow_where_above(value.hi, x.hi, bound.hi)};
}
inline __m256 scale_pow2(__m256 value, __m256 magic) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(magic), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), n));
}
inline V16 scale_pow2(V16 value, V16 magic) {
    return {scale_pow2(value.lo, magic.lo), scale_pow2(value.hi, magic.hi)};
}
inline V16 interleave(__m256 a, __m256 b) {
    const __m256 lo = _mm256_unpacklo_ps(a, b), hi = _mm256_unpackhi_ps(a, b);
    return {_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31)};
}
inline V16 interleave_lo(V16 a, V16 b) {
    return interleave(a.lo, b.lo);
}
inline V16 interleave_hi(V16 a, V16 b) {
    return interleave(a.hi, b.hi);
}
// Sixteen 32-bit integers, whose sums wrap; AVX-512 truncates to 64-bit ones where it needs them.
struct I16 {
    __m256i lo, hi;
};
inline I16 zero_ints() {
    return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
inline I16 truncate(V16 a) {
    return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)};
}
inline V16 to_float(I16 a) {
    return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
inline I16 add(I16 a, I16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline void store(I16 a, uint32_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
inline __m128 fold_to_4(V16 a) {
    const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
    return _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
}
inline void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

#else

struct V16 {
    float v[16];
};
template <typename F>
inline V16 lanes(F&& f) {
    V16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
}
inline V16 zero() {
    return lanes([](int) { return 0.0f; });
}
inline V16 splat(float x) {
    return lanes([&](int) { return x; });
}
template <typename T>
inline V16 load(const T* p) {
    return lanes([&](int i) { return to_float(p[i]); });
}
inline void store(V16 a, float* p) {
    std::memcpy(p, a.v, sizeof a.v);
}
template <typename T>
inline void store(V16 a, T* p) {
    for (int i = 0; i < 16; ++i) from_float(a.v[i], p + i);
}
inline V16 add(V16 a, V16 b) {
    return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline V16 sub(V16 a, V16 b) {
    return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline V16 mul(V16 a, V16 b) {
    return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline V16 div(V16 a, V16 b) {
    return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline V16 fma(V16 a, V16 b, V16 c) {
    return lanes([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline V16 max(V16 a, V16 b) {
    return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline V16 min(V16 a, V16 b) {
    return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline V16 zero_where_less(V16 value, V16 x, V16 bound) {
    return lanes([&](int i) { return x.v[i] < bound.v[i] ? 0.0f : value.v[i]; });
}
inline V16 choose_less(V16 x, V16 bound, V16 yes, V16 no) {
    return lanes([&](int i) { return x.v[i] < bound.v[i] ? yes.v[i] : no.v[i]; });
}
inline V16 overflow_where_above(V16 value, V16 x, V16 bound) {
    return lanes([&](int i) { return x.v[i] <= bound.v[i] ? value.v[i] : x.v[i] * 3.4028235e38f; });
}
inline V16 scale_pow2(V16 value, V16 magic) {
    return lanes(
        [&](int i) { return from_bits(to_bits(value.v[i]) + (to_bits(magic.v[i]) << 23)); });
}
inline V16 interleave_lo(V16 a, V16 b) {
    return lanes([&](int i) { return (i % 2 ? b : a).v[i / 2]; });
}
inline V16 interleave_hi(V16 a, V16 b) {
    return lanes([&](int i) { return (i % 2 ? b : a).v[8 + i / 2]; });
}
struct I16 {
    uint32_t v[16];
};
inline I16 zero_ints() {
    return {};
}
inline I16 truncate(V16 a) {
    I16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<uint32_t>(static_cast<int32_t>(a.v[i]));
    return r;
}
inline V16 to_float(I16 a) {
    return lanes([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}
inline I16 add(I16 a, I16 b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
}
inline void store(I16 a, uint32_t* p) {
    std::memcpy(p, a.v, sizeof a.v);
}
inline void prefetch(const void* p) {
    __builtin_prefetch(p);
}

#endif

// Lane j of vector i becomes lane i of vector j: four perfect shuffles of all 256.
inline void transpose(V16 (&square)[16]) {
    for (int round = 0; round < 4; ++round) {
        V16 next[16];
        for (int i = 0; i < 8; ++i) {
            next[2 * i] = interleave_lo(square[i], square[i + 8]);
            next[2 * i + 1] = interleave_hi(square[i], square[i + 8]);
        }
        for (int i = 0; i < 16; ++i) square[i] = next[i];
    }
}

// --- accumulators ---
// A dot product may keep its sixteen lanes in one V16, or go over its operands once per Part, a
// piece of V16 that fits one register: larger blocks then fit the registers, and no bit changes.
#if defined(__AVX2__) && !defined(__AVX512F__)
struct Part {
    __m256 v;
};
inline void clear(Part& a) {
    a.v = _mm256_setzero_ps();
}
inline void load_piece(Part& a, const float* p, int piece) {
    a.v = _mm256_loadu_ps(p + 8 * piece);
}
template <typename T>
inline void load_piece(Part& a, const T* p, int piece) {
    a.v = load8(p + 8 * piece);
}
inline void take_piece(Part& a, V16 whole, int piece) {
    a.v = piece == 0 ? whole.lo : whole.hi;
}
inline Part fma(Part a, Part b, Part c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline void put_piece(V16& whole, Part a, int piece) {
    (piece == 0 ? whole.lo : whole.hi) = a.v;
}
#else
using Part = V16;  // nothing to gain: a V16 is one register, or not a register at all
#endif
inline void clear(V16& a) {
    a = zero();
}
template <typename T>
inline void load_piece(V16& a, const T* p, int) {
    a = load(p);
}
inline void take_piece(V16& a, V16 whole, int) {
    a = whole;
}
inline void put_piece(V16& whole, V16 a, int) {
    whole = a;
}

// --- sums and maxima in the fixed tree ---
#if defined(__AVX2__)
inline void reduce_add4(const V16 a[4], float* out) {
    const __m128 a0 = fold_to_4(a[0]), a1 = fold_to_4(a[1]);
    const __m128 a2 = fold_to_4(a[2]), a3 = fold_to_4(a[3]);
    const __m128 x = _mm_add_ps(_mm_movelh_ps(a0, a1), _mm_movehl_ps(a1, a0));
    const __m128 y = _mm_add_ps(_mm_movelh_ps(a2, a3), _mm_movehl_ps(a3, a2));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(x, y, 0x88), _mm_shuffle_ps(x, y, 0xdd)));
}
inline float reduce_add(V16 a) {
    const __m128 s4 = fold_to_4(a);
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
// A NaN may be lost.
inline float reduce_max(V16 a) {
#if defined(__AVX512F__)
    const __m256i upper = _mm512_extracti64x4_epi64(_mm512_castps_si512(a.v), 1);
    const __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm256_castsi256_ps(upper));
#else
    const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
#endif
    const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
#else
inline float reduce_add(V16 a) {
    for (int width = 8; width >= 1; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
    return a.v[0];
}
inline float reduce_max(V16 a) {
    for (int width = 8; width >= 1; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
    return a.v[0];
}
inline void reduce_add4(const V16 a[4], float* out) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_add(a[i]);
}
#endif

#if !defined(__AVX512F__)
inline int pack_not_less(V16 x, V16 least, int32_t first, float* values, int32_t* indices) {
    float lane[16], bound[16];
    store(x, lane);
    store(least, bound);
    int count = 0;
    for (int i = 0; i < 16; ++i) {
        values[count] = lane[i];
        indices[count] = first + i;
        count += lane[i] >= bound[i];
    }
    return count;
}
#endif

// --- tails: n < 16 lanes, the rest zero ---
template <typename T>
inline V16 load_first(const T* p, int n) {
    float lane[16] = {};
    for (int i = 0; i < n; ++i) lane[i] = to_float(p[i]);
    return load(lane);
}
template <typename T>
inline void store_first(V16 a, T* p, int n) {
    float lane[16];
    store(a, lane);
    for (int i = 0; i < n; ++i) from_float(lane[i], p + i);
}

// exp_of (core/philox.h) times 2^kShift where that is a normal number, anything elsewhere. kShift
// is even, so ties round as in exp_of.
template <int kShift = 0>
inline V16 exp_within(V16 x) {
    static_assert(kShift % 2 == 0);
    const V16 round = splat(12582912.0f + kShift);
    const V16 magic = fma(x, splat(1.44269504f), round);
    const V16 n = sub(magic, round);
    V16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    V16 y = splat(1.9875691500e-4f);
    y = fma(y, r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(y, mul(r, r), add(r, splat(1.0f)));
    return scale_pow2(y, magic);
}

// exp_of, lane by lane.
inline V16 exp(V16 x) {
    const V16 value = zero_where_less(exp_within(x), x, splat(kExpLow));
    return overflow_where_above(value, x, splat(kExpHigh));
}

}  // namespace SPECRT_ISA
}  // namespace specrt
