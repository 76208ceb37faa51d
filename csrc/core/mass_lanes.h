// Masses of core/mass.h, sixteen at a time: the very numbers of mass_of.
#pragma once
#include "core/mass.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

// e^x * 2^kShift for x <= 0, no NaN. Below -28 there is no mass, so what is wrong below -80 does
// not show.
template <int kShift>
inline V16 scaled_exp(V16 x) {
    return exp_within<kShift>(max(x, splat(-80.0f)));
}

#if defined(__AVX512F__)
inline __m512i low_masses(V16 scaled) {
    return _mm512_cvttps_epi64(_mm512_castps512_ps256(scaled.v));
}
inline __m512i high_masses(V16 scaled) {
    return _mm512_cvttps_epi64(_mm512_extractf32x8_ps(scaled.v, 1));
}

// A sum of masses, kept in lanes for up to kMassSteps vectors.
constexpr int kMassSteps = 128;
struct MassSum {
    __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
    uint64_t total = 0;

    void add(V16 x) {
        const V16 scaled = scaled_exp<kMassBits>(x);
        low = _mm512_add_epi64(low, low_masses(scaled));
        high = _mm512_add_epi64(high, high_masses(scaled));
    }
    void flush() {
        total += static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
        low = high = _mm512_setzero_si512();
    }
};

inline void store_masses(V16 x, uint64_t* out) {
    const V16 scaled = scaled_exp<kMassBits>(x);
    _mm512_storeu_si512(out, low_masses(scaled));
    _mm512_storeu_si512(out + 8, high_masses(scaled));
}

#else

// mass = high * 2^16 + low, low < 2^16: both fit 32 bits, of which there are twice as many lanes.
struct MassLanes {
    I16 high, low;
};

inline MassLanes masses_of(V16 x) {
    const V16 scaled = scaled_exp<24>(x);
    const I16 high = truncate(scaled);
    return {high, truncate(mul(sub(scaled, to_float(high)), splat(0x1p16f)))};
}

inline void store_masses(MassLanes m, uint64_t* out) {
    uint32_t high[16], low[16];
    store(m.high, high);
    store(m.low, low);
    for (int i = 0; i < 16; ++i) out[i] = (static_cast<uint64_t>(high[i]) << 16) + low[i];
}
inline void store_masses(V16 x, uint64_t* out) {
    store_masses(masses_of(x), out);
}

// A sum of masses, kept in lanes for up to kMassSteps vectors: each adds 2^24 to `high` at most.
constexpr int kMassSteps = 128;
struct MassSum {
    MassLanes sums{zero_ints(), zero_ints()};
    uint64_t total = 0;

    void add(V16 x) {
        const MassLanes m = masses_of(x);
        sums.high = SPECRT_ISA::add(sums.high, m.high);
        sums.low = SPECRT_ISA::add(sums.low, m.low);
    }
    void flush() {
        uint64_t lanes[16];
        store_masses(sums, lanes);
        for (int i = 0; i < 16; ++i) total += lanes[i];
        sums = {zero_ints(), zero_ints()};
    }
};

#endif

// masses[v] = mass_of(row[v] - top); top is the row's maximum.
inline void store_masses(const float* row, int64_t count, float top, uint64_t* masses) {
    const V16 t = splat(top);
    int64_t v = 0;
    for (; v + 16 <= count; v += 16) store_masses(sub(load(row + v), t), masses + v);
    for (; v < count; ++v) masses[v] = mass_of(row[v] - top);
}

}  // namespace specrt::SPECRT_ISA
