// Randomness without state: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) as a pure function of (seed, position, purpose, index).
//
// Everything is integer arithmetic, or IEEE operations in a written order, so host, device and
// every instruction set give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace specrt {

// Draws of different purposes are independent. The numbers are part of what a seed means: never
// renumber them.
enum class Purpose : uint32_t { kTarget = 0, kAccept = 1, kResidual = 2, kDraft = 3, kControl = 4 };

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct PhiloxWords {
    uint32_t word[4];
};

SPECRT_HD PhiloxWords philox4x32(PhiloxWords c, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.word[0];
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.word[2];
        c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(p1),
              static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(p0)}};
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    return c;
}

// Sixty-four indices share sixteen counters: index 64 b + 16 r + j is word r of counter 16 b + j,
// so sixteen vector lanes fill a block of 64 without a transpose.
constexpr int kPhiloxBlock = 64;

// Fills out[0..63] with the bits of indices 64 * block ... 64 * block + 63.
SPECRT_HD void philox_block(uint64_t seed, uint64_t position, Purpose purpose, uint32_t block,
                            uint32_t* out) {
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (int j = 0; j < 16; ++j) {
        c0[j] = block * 16u + static_cast<uint32_t>(j);
        c1[j] = static_cast<uint32_t>(purpose);
        c2[j] = static_cast<uint32_t>(position);
        c3[j] = static_cast<uint32_t>(position >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int j = 0; j < 16; ++j) {
            const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0[j];
            const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2[j];
            c0[j] = static_cast<uint32_t>(p1 >> 32) ^ c1[j] ^ key0;
            c1[j] = static_cast<uint32_t>(p1);
            c2[j] = static_cast<uint32_t>(p0 >> 32) ^ c3[j] ^ key1;
            c3[j] = static_cast<uint32_t>(p0);
        }
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    for (int j = 0; j < 16; ++j) {
        out[j] = c0[j];
        out[16 + j] = c1[j];
        out[32 + j] = c2[j];
        out[48 + j] = c3[j];
    }
}

// The bits of four indices 16 apart, of the same block of 64 as `index`.
SPECRT_HD PhiloxWords bits_around(uint64_t seed, uint64_t position, Purpose purpose,
                                  uint32_t index) {
    const PhiloxWords counter = {{index / 64u * 16u + index % 16u, static_cast<uint32_t>(purpose),
                                  static_cast<uint32_t>(position),
                                  static_cast<uint32_t>(position >> 32)}};
    return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

SPECRT_HD uint32_t philox(uint64_t seed, uint64_t position, Purpose purpose, uint32_t index) {
    const PhiloxWords out = bits_around(seed, position, purpose, index);
    // Not by number: an array that is indexed has to lie in memory.
    const uint32_t low = index & 16u ? out.word[1] : out.word[0];
    const uint32_t high = index & 16u ? out.word[3] : out.word[2];
    return index & 32u ? high : low;
}

// Strictly inside (0, 1): 23 bits and a half, so neither end is ever rounded to.
SPECRT_HD float uniform_from(uint32_t bits) {
    return (static_cast<float>(bits >> 9) + 0.5f) * 0x1p-23f;
}

SPECRT_HD float fused_mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return fmaf(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

// Correctly rounded everywhere.
SPECRT_HD double sqrt_of(double x) {
#if defined(__CUDA_ARCH__)
    return __dsqrt_rn(x);
#else
    return __builtin_sqrt(x);
#endif
}

// ln(x) for normal positive x, within 2 ulp. Not libm's, whose bits differ between machines.
SPECRT_HD float log_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    // The mantissa goes to [sqrt(1/2), sqrt(2)), where (m - 1) / (m + 1) is small.
    const uint32_t shifted = u - 0x3f3504f3u;
    const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
    u = (shifted & 0x7fffffu) + 0x3f3504f3u;
    float m;
    memcpy(&m, &u, 4);
    const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s, n = static_cast<float>(exponent);
    float series = fused_mul_add(s2, 1.0f / 9.0f, 1.0f / 7.0f);
    series = fused_mul_add(series, s2, 0.2f);
    series = fused_mul_add(series, s2, 1.0f / 3.0f);
    const float tail = fused_mul_add(2.0f * s * s2, series, n * -2.12194440e-4f);
    return fused_mul_add(n, 0.693359375f, 2.0f * s + tail);
}

// Where e^x is a normal number.
constexpr float kExpLow = -87.33654f, kExpHigh = 88.72283f;

// e^x within 2 ulp where it is a normal number; 0 below, +inf above, NaN for NaN. The lanes' exp of
// core/simd.h takes the same steps: the same bits for every float.
SPECRT_HD float exp_of(float x) {
    if (x < kExpLow) return 0.0f;
    if (!(x <= kExpHigh)) return x * 3.4028235e38f;  // +inf, or a quiet NaN
    // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const float magic = fused_mul_add(x, 1.44269504f, 12582912.0f), n = magic - 12582912.0f;
    const float r = fused_mul_add(n, 2.12194440e-4f, fused_mul_add(n, -0.693359375f, x));
    float series = fused_mul_add(r, 1.9875691500e-4f, 1.3981999507e-3f);
    series = fused_mul_add(series, r, 8.3334519073e-3f);
    series = fused_mul_add(series, r, 4.1665795894e-2f);
    series = fused_mul_add(series, r, 1.6666665459e-1f);
    series = fused_mul_add(series, r, 5.0000001201e-1f);
    const float mantissa = fused_mul_add(series, r * r, r + 1.0f);
    // Times 2^n, in the exponent's bits: n is 128 only where the mantissa is below 1.
    uint32_t bits, shift;
    memcpy(&bits, &mantissa, 4);
    memcpy(&shift, &magic, 4);
    bits += shift << 23;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// No Gumbel noise is above 33 ln 2 = 22.874, for the smallest tail is 2^-33.
constexpr float kMaxGumbel = 23.0f;

// -ln(-ln(1 - w)), w = (bits + 1/2) / 2^32. Large noise comes from small w, which keeps its
// relative resolution, so tokens of probability 1e-6 are still drawn with the right frequency.
SPECRT_HD float gumbel_from(uint32_t bits) {
    const bool is_upper = bits >> 31;
    const float t =
        (static_cast<float>(static_cast<int32_t>(is_upper ? ~bits : bits)) + 0.5f) * 0x1p-32f;
    float exponential;
    if (is_upper) {
        exponential = -log_of(t);  // 1 - w = t, no cancellation
    } else {
        // -ln(1 - t) = 2 artanh(t / (2 - t)), exact where t is tiny.
        const float s = t / (2.0f - t), s2 = s * s;
        float series = fused_mul_add(s2, 1.0f / 13.0f, 1.0f / 11.0f);
        series = fused_mul_add(series, s2, 1.0f / 9.0f);
        series = fused_mul_add(series, s2, 1.0f / 7.0f);
        series = fused_mul_add(series, s2, 0.2f);
        series = fused_mul_add(series, s2, 1.0f / 3.0f);
        exponential = 2.0f * fused_mul_add(s * s2, series, s);
    }
    return -log_of(exponential);
}

// No noise of bits >= min_bits is above this (w <= -ln(1 - w); the slack covers rounding).
SPECRT_HD float gumbel_bound(uint32_t min_bits) {
    return 0.01f - log_of((static_cast<float>(min_bits) + 0.25f) * 0x1p-32f);
}

// The same by the place of the highest bit alone: up to 0.7 more, without a logarithm.
inline float coarse_gumbel_bound(uint32_t min_bits) {
    const int num_zeros = min_bits ? __builtin_clz(min_bits) : 33;
    return 0.02f + 0.6931472f * static_cast<float>(1 + num_zeros);
}

}  // namespace specrt
