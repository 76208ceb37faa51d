// Masses of core/mass.h, sixteen at a time: the very numbers of mass_of.
#pragma once
#include "core/mass.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

// mass = high * 2^16 + low, low < 2^16: both fit 32 bits, of which there are twice as many lanes.
struct MassLanes {
    I16 high, low;
};

inline MassLanes split_mass(V16 exponential) {
    const V16 scaled = mul(exponential, splat(0x1p24f));
    const I16 high = truncate(scaled);
    return {high, truncate(mul(sub(scaled, to_float(high)), splat(0x1p16f)))};
}

// The exponential that mass_of scales. Below -28 there is no mass, so exp's low end does not show.
inline V16 mass_exp(V16 x) {
    return exp_within(max(min(x, zero()), splat(-80.0f)));
}

// A sum of masses. `high` grows by 2^24 a step at most, so it holds 128 steps.
struct MassSum {
    I16 high = zero_ints(), low = zero_ints();
    uint64_t total = 0;

    void add(MassLanes m) {
        high = SPECRT_ISA::add(high, m.high);
        low = SPECRT_ISA::add(low, m.low);
    }
    void flush() {
        uint32_t h[16], l[16];
        store(high, h);
        store(low, l);
        for (int i = 0; i < 16; ++i) total += (static_cast<uint64_t>(h[i]) << 16) + l[i];
        high = low = zero_ints();
    }
};

// masses[v] = mass_of(row[v] - top).
inline void store_masses(const float* row, int64_t count, float top, uint64_t* masses) {
    const V16 t = splat(top);
    int64_t v = 0;
    for (; v + 16 <= count; v += 16) {
        const MassLanes m = split_mass(mass_exp(sub(load(row + v), t)));
        uint32_t high[16], low[16];
        store(m.high, high);
        store(m.low, low);
        for (int i = 0; i < 16; ++i)
            masses[v + i] = (static_cast<uint64_t>(high[i]) << 16) + low[i];
    }
    for (; v < count; ++v) masses[v] = mass_of(row[v] - top);
}

}  // namespace specrt::SPECRT_ISA
