// Scores as integers of the same order, and a score with its index as one: best first, ties to the
// lower index, NaN after everything. So the largest of many is one comparison, and no two are
// equal.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace specrt {

constexpr uint32_t kOrderedInf = 0xff800000u, kOrderedMinusInf = 0x007fffffu;

// The float's bits made monotone; -0 becomes 0, for they tie; NaN is 0, below -inf.
SPECRT_HD uint32_t ordered_bits(float x) {
    const float sum = x + 0.0f;
    uint32_t u;
    memcpy(&u, &sum, 4);
    return x != x ? 0 : u >> 31 ? ~u : u | 0x80000000u;
}

SPECRT_HD float from_ordered_bits(uint32_t ordered) {
    const uint32_t u = ordered == 0    ? 0x7fc00000u
                       : ordered >> 31 ? ordered ^ 0x80000000u
                                       : ~ordered;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// Above 0, which is no key, for every index >= 0.
SPECRT_HD uint64_t key_of(float score, int32_t index) {
    return static_cast<uint64_t>(ordered_bits(score)) << 32 | ~static_cast<uint32_t>(index);
}

SPECRT_HD int32_t index_of(uint64_t key) {
    return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

SPECRT_HD float score_of(uint64_t key) {
    return from_ordered_bits(static_cast<uint32_t>(key >> 32));
}

}  // namespace specrt
