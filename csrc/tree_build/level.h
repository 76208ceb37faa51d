// What a level's launches know of it, on the CPU and on a GPU.
#pragma once
#include "core/host_device.h"
#include "core/score_key.h"
#include "tree_build/tree_build.h"

namespace specrt {

// A closed sequence's children score -inf, and the first K are its frontier: nothing of it is read
// but what names them.
SPECRT_HD bool is_closed(const TreeExpandParams& p, int64_t seq) {
    return p.is_open && p.is_open[seq] == 0;
}

// In the pool: where the level's children begin.
SPECRT_HD int64_t level_base(const TreeExpandParams& p) {
    const int64_t k = p.top_k;
    return p.level == 0 ? 0 : k + (p.level - 1) * k * k;
}

// Of the sums over the frontier and over what it grew from, as logarithms: NaN if either is, or if
// there was nothing to grow from.
SPECRT_HD float score_of_level(float below, float above) {
    const float score = below - above;
    return score < 0.0f ? score : score >= 0.0f ? 0.0f : from_ordered_bits(0);
}

}  // namespace specrt
