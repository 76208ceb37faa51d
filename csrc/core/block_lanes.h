// Dot products of 8-bit weights and 16-bit values in sixteen lanes, and the planes of
// core/block_format.h as their operands. Everything is exact, so that how it is done is speed
// alone: vpdpbusd multiplies bytes, the weights by both bytes of a value; the rest multiplies
// words.
#pragma once
#include "core/block_format.h"
#include "core/each.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

// 32 values of a row of x as operands, dword by dword for planes 0 to 7: with bytes `first` is of
// upper bytes a, `second` of lower ones b, value = 256 a + b, both signed; with words of values
// 4i and 4i + 2, and 4i + 1 and 4i + 3.
struct XGroup {
    uint32_t first[8], second[8];
};

// kTileRows: rows that a group is multiplied by together.
#if defined(__AVX512VNNI__)
constexpr bool kMultipliesBytes = true;
constexpr int kTileRows = 8;
#else
constexpr bool kMultipliesBytes = false;
constexpr int kTileRows = 1;
#endif

#if defined(__AVX512F__)

struct Plane {
    __m512i v;
};
inline Plane load_plane(const uint8_t* p) {
    return {_mm512_load_si512(p)};
}
inline Plane low_nibbles(Plane a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))};
}
inline Plane high_nibbles(Plane a) {
    return low_nibbles({_mm512_srli_epi16(a.v, 4)});
}
// Bits 2 f and 2 f + 1 of `upper` above the four of `nibbles`.
template <int f>
inline Plane with_upper(Plane nibbles, Plane upper) {
    const __m512i at_4 =
        f < 2 ? _mm512_slli_epi16(upper.v, 4 - 2 * (f & 1)) : _mm512_srli_epi16(upper.v, 2 * f - 4);
    return {_mm512_or_si512(nibbles.v, _mm512_and_si512(at_4, _mm512_set1_epi8(0x30)))};
}
inline V16 load_bytes(const uint8_t* p) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
inline V16 load_bytes(const int8_t* p) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}

#if defined(__AVX512VNNI__)
using Operand = Plane;
inline Operand operand_of(Plane a) {
    return a;
}
constexpr int kFewRows = 4;  // of a tile, to which two chains a row are worth the sum of the two

// Written out: the compiler loads what is broadcast by an instruction of its own.
inline void multiply(__m512i& sum, const Operand& w, const uint32_t& x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w.v), "m"(x));
}
// The dot products of R rows of x with planes kBegin .. kEnd - 1 of a group, and what they start
// from. The rows take turns, so that no sum is waited for.
template <int kBegin, int kEnd, bool kFromZero, int R>
inline __attribute__((always_inline)) void dots(const Operand (&w)[8], const XGroup* x,
                                                const uint32_t* from, I16 (&sum)[R]) {
    __m512i first[R], second[R];
    const auto start = [&](auto r) {
        if constexpr (kFromZero) return _mm512_setzero_si512();
        return _mm512_set1_epi32(static_cast<int>(from[r]));
    };
    const auto shifted = [&](auto r) { return _mm512_slli_epi32(first[r], 8); };
    each<R>([&](auto r) { first[r] = _mm512_setzero_si512(); });
    if constexpr (R <= kFewRows) {
        each<R>([&](auto r) { second[r] = start(r); });
        each<kEnd - kBegin>([&](auto i) {
            constexpr int k = kBegin + i;
            each<R>([&](auto r) {
                multiply(first[r], w[k], x[r].first[k]);
                multiply(second[r], w[k], x[r].second[k]);
            });
        });
        each<R>([&](auto r) { sum[r] = {_mm512_add_epi32(shifted(r), second[r])}; });
    } else {
        each<kEnd - kBegin>([&](auto i) {
            constexpr int k = kBegin + i;
            each<R>([&](auto r) { multiply(first[r], w[k], x[r].first[k]); });
        });
        each<R>([&](auto r) {
            second[r] = shifted(r);
            if constexpr (!kFromZero) second[r] = _mm512_add_epi32(second[r], start(r));
        });
        each<kEnd - kBegin>([&](auto i) {
            constexpr int k = kBegin + i;
            each<R>([&](auto r) { multiply(second[r], w[k], x[r].second[k]); });
        });
        each<R>([&](auto r) { sum[r] = {second[r]}; });
    }
}
#else
struct Operand {
    __m512i first, second;
};
inline Operand operand_of(Plane a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(a.v, 8)};
}
struct Dot {
    __m512i first, second;
};
inline Dot start_dot(int32_t from) {
    return {_mm512_setzero_si512(), _mm512_set1_epi32(from)};
}
inline __m512i madd(__m512i w, uint32_t x) {
    return _mm512_madd_epi16(w, _mm512_set1_epi32(static_cast<int>(x)));
}
inline void multiply(Dot& dot, const Operand& w, uint32_t first, uint32_t second) {
    dot.first = _mm512_add_epi32(dot.first, madd(w.first, first));
    dot.second = _mm512_add_epi32(dot.second, madd(w.second, second));
}
inline I16 total(const Dot& dot) {
    return {_mm512_add_epi32(dot.first, dot.second)};
}
#endif

#elif defined(__AVX2__)

struct Plane {
    __m256i lo, hi;
};
inline Plane load_plane(const uint8_t* p) {
    const auto* at = reinterpret_cast<const __m256i*>(p);
    return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
}
inline Plane low_nibbles(Plane a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline Plane high_nibbles(Plane a) {
    return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
template <int f>
inline __m256i with_upper(__m256i nibbles, __m256i upper) {
    const __m256i at_4 =
        f < 2 ? _mm256_slli_epi16(upper, 4 - 2 * (f & 1)) : _mm256_srli_epi16(upper, 2 * f - 4);
    return _mm256_or_si256(nibbles, _mm256_and_si256(at_4, _mm256_set1_epi8(0x30)));
}
template <int f>
inline Plane with_upper(Plane nibbles, Plane upper) {
    return {with_upper<f>(nibbles.lo, upper.lo), with_upper<f>(nibbles.hi, upper.hi)};
}
inline V16 load_bytes(const uint8_t* p) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline V16 load_bytes(const int8_t* p) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
struct Operand {
    Plane first, second;
};
inline Operand operand_of(Plane a) {
    const __m256i mask = _mm256_set1_epi16(0xff);
    return {{_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)},
            {_mm256_srli_epi16(a.lo, 8), _mm256_srli_epi16(a.hi, 8)}};
}
struct Dot {
    I16 sum;
};
inline Dot start_dot(int32_t from) {
    return {{_mm256_set1_epi32(from), _mm256_set1_epi32(from)}};
}
inline I16 madd(const Plane& w, uint32_t x) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    return {_mm256_madd_epi16(w.lo, all), _mm256_madd_epi16(w.hi, all)};
}
inline void multiply(Dot& dot, const Operand& w, uint32_t first, uint32_t second) {
    dot.sum = add(dot.sum, madd(w.first, first));
    dot.sum = add(dot.sum, madd(w.second, second));
}
inline I16 total(const Dot& dot) {
    return dot.sum;
}

#else

struct Plane {
    uint8_t v[kPlaneBytes];
};
template <typename F>
inline Plane bytes_of(F&& f) {
    Plane r;
    for (int i = 0; i < kPlaneBytes; ++i) r.v[i] = static_cast<uint8_t>(f(i));
    return r;
}
inline Plane load_plane(const uint8_t* p) {
    return bytes_of([&](int i) { return p[i]; });
}
inline Plane low_nibbles(const Plane& a) {
    return bytes_of([&](int i) { return a.v[i] & 15; });
}
inline Plane high_nibbles(const Plane& a) {
    return bytes_of([&](int i) { return a.v[i] >> 4; });
}
template <int f>
inline Plane with_upper(const Plane& nibbles, const Plane& upper) {
    return bytes_of([&](int i) { return nibbles.v[i] | (upper.v[i] >> 2 * f & 3) << 4; });
}
template <typename T>
inline V16 load_bytes(const T* p) {
    return lanes([&](int i) { return static_cast<float>(p[i]); });
}
using Operand = Plane;
inline Operand operand_of(const Plane& a) {
    return a;
}
struct Dot {
    I16 sum;
};
inline Dot start_dot(int32_t from) {
    Dot dot;
    for (uint32_t& lane : dot.sum.v) lane = static_cast<uint32_t>(from);
    return dot;
}
inline void multiply(Dot& dot, const Operand& w, uint32_t first, uint32_t second) {
    const int32_t x[4] = {static_cast<int16_t>(first), static_cast<int16_t>(second),
                          static_cast<int16_t>(first >> 16), static_cast<int16_t>(second >> 16)};
    for (int n = 0; n < 16; ++n) {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += w.v[4 * n + i] * x[i];
        dot.sum.v[n] += static_cast<uint32_t>(sum);
    }
}
inline I16 total(const Dot& dot) {
    return dot.sum;
}

#endif

#if !defined(__AVX512VNNI__)

// The dot product of a row of x with planes kBegin .. kEnd - 1 of a group, and what it starts from.
template <int kBegin, int kEnd, bool kFromZero>
inline void dots(const Operand (&w)[8], const XGroup* x, const uint32_t* from, I16 (&sum)[1]) {
    Dot dot = start_dot(kFromZero ? 0 : static_cast<int32_t>(*from));
#pragma GCC unroll 8
    for (int i = kBegin; i < kEnd; ++i) multiply(dot, w[i], x->first[i], x->second[i]);
    sum[0] = total(dot);
}

#endif

// The eight operands of a group.
template <int kBits>
inline void load_group(const uint8_t* group, Operand (&w)[8]) {
    const auto plane = [&](int i) { return load_plane(group + i * kPlaneBytes); };
    if constexpr (kBits == 8) {
        each<8>([&](auto i) { w[i] = operand_of(plane(i)); });
    } else if constexpr (kBits == 4) {
        each<4>([&](auto i) {
            const Plane both = plane(i);
            w[i] = operand_of(low_nibbles(both));
            w[4 + i] = operand_of(high_nibbles(both));
        });
    } else {
        each<2>([&](auto i) {
            const Plane even = plane(i), odd = plane(2 + i), upper = plane(4 + i);
            w[i] = operand_of(with_upper<0>(low_nibbles(even), upper));
            w[2 + i] = operand_of(with_upper<1>(low_nibbles(odd), upper));
            w[4 + i] = operand_of(with_upper<2>(high_nibbles(even), upper));
            w[6 + i] = operand_of(with_upper<3>(high_nibbles(odd), upper));
        });
    }
}

}  // namespace specrt::SPECRT_ISA
