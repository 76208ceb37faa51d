// The random bits of the target's noise (Purpose::kTarget), many tokens at a time: the very bits of
// core/philox.h, which noise_bits spells out for AVX2.
#pragma once
#include "core/philox.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

#if defined(__AVX2__)
// Four counters' words, each in the low half of a 64-bit lane, where vpmuludq wants it (the
// compiler's version spends most of its time moving words between halves).
struct PhiloxLanes {
    __m256i word[4];
};

inline PhiloxLanes philox_lanes(__m256i c0, uint64_t seed, uint64_t position) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    __m256i c1 = _mm256_set1_epi64x(static_cast<uint32_t>(Purpose::kTarget));
    __m256i c2 = _mm256_set1_epi64x(static_cast<uint32_t>(position));
    __m256i c3 = _mm256_set1_epi64x(static_cast<uint32_t>(position >> 32));
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        // High halves hold rubbish; vpmuludq and low_words ignore them.
        const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
        c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1),
                              _mm256_set1_epi64x(key0));
        c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3),
                              _mm256_set1_epi64x(key1));
        c1 = p1;
        c3 = p0;
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

inline __m128i low_words(__m256i lanes) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(lanes, order));
}

#if defined(__AVX512F__)
inline __m512i xor_of(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

// Bits of indices 64 * block ... 64 * block + 63: philox_lanes, eight counters at a time.
inline void noise_bits(uint64_t seed, uint64_t position, uint32_t block, uint32_t* out) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    for (int group = 0; group < 2; ++group) {
        // 32-bit sum: the counter wraps as philox_block's does; what it carries out is ignored.
        const uint32_t first = block * 16u + static_cast<uint32_t>(8 * group);
        __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(first), lane);
        __m512i c1 = _mm512_set1_epi64(static_cast<uint32_t>(Purpose::kTarget));
        __m512i c2 = _mm512_set1_epi64(static_cast<uint32_t>(position));
        __m512i c3 = _mm512_set1_epi64(static_cast<uint32_t>(position >> 32));
        uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
            c0 = xor_of(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(key0));
            c2 = xor_of(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(key1));
            c1 = p1;
            c3 = p0;
            key0 += kPhiloxW0;
            key1 += kPhiloxW1;
        }
        const __m512i words[4] = {c0, c1, c2, c3};
        for (int r = 0; r < 4; ++r)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * r + 8 * group),
                                _mm512_cvtepi64_epi32(words[r]));
    }
}
#else
// Bits of indices 64 * block ... 64 * block + 63.
inline void noise_bits(uint64_t seed, uint64_t position, uint32_t block, uint32_t* out) {
    for (int group = 0; group < 4; ++group) {
        // 32-bit sum: the counter wraps as philox_block's does.
        const uint32_t first = block * 16u + static_cast<uint32_t>(4 * group);
        const __m256i c0 = _mm256_setr_epi64x(first, first + 1u, first + 2u, first + 3u);
        const PhiloxLanes lanes = philox_lanes(c0, seed, position);
        for (int r = 0; r < 4; ++r)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * r + 4 * group),
                             low_words(lanes.word[r]));
    }
}
#endif

// Bits of 64 given indices.
inline void noise_bits_at(uint64_t seed, uint64_t position, const uint32_t* index, uint32_t* out) {
    for (int i = 0; i < kPhiloxBlock; i += 4) {
        const uint32_t* x = index + i;
        const __m256i c0 =
            _mm256_setr_epi64x(x[0] / 64u * 16u + x[0] % 16u, x[1] / 64u * 16u + x[1] % 16u,
                               x[2] / 64u * 16u + x[2] % 16u, x[3] / 64u * 16u + x[3] % 16u);
        const PhiloxLanes lanes = philox_lanes(c0, seed, position);
        uint32_t words[4][4];
        for (int r = 0; r < 4; ++r)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(words[r]), low_words(lanes.word[r]));
        for (int j = 0; j < 4; ++j) out[i + j] = words[x[j] / 16u % 4u][j];
    }
}
#else
inline void noise_bits(uint64_t seed, uint64_t position, uint32_t block, uint32_t* out) {
    philox_block(seed, position, Purpose::kTarget, block, out);
}
inline void noise_bits_at(uint64_t seed, uint64_t position, const uint32_t* index, uint32_t* out) {
    for (int i = 0; i < kPhiloxBlock; ++i)
        out[i] = philox(seed, position, Purpose::kTarget, index[i]);
}
#endif

}  // namespace specrt::SPECRT_ISA
