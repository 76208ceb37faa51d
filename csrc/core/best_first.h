// Best first, ties by index: the order in which tokens are kept, ranked and drawn.
#pragma once
#include "core/philox.h"

namespace specrt {

// Score and index as one number whose order is the order wanted: the float's bits made monotone
// (NaN lowest), then the complement of the index.
SPECRT_HD uint64_t key_of(float score, int32_t index) {
    score += 0.0f;  // -0 becomes 0: they tie
    uint32_t u;
    memcpy(&u, &score, 4);
    const uint32_t high = score != score ? 0 : u >> 31 ? ~u : u | 0x80000000u;
    return static_cast<uint64_t>(high) << 32 | ~static_cast<uint32_t>(index);
}

SPECRT_HD int32_t index_of(uint64_t key) {
    return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

SPECRT_HD float score_of(uint64_t key) {
    const uint32_t high = static_cast<uint32_t>(key >> 32);
    const uint32_t u = high == 0 ? 0x7fc00000u : high >> 31 ? high ^ 0x80000000u : ~high;
    float score;
    memcpy(&score, &u, 4);
    return score;
}

}  // namespace specrt
