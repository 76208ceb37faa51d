// In which order linear on a GPU sums: a row's products with a row of weights.
//
// K is cut into slices. Within one, groups of 16 neighbouring k follow one another, each a sum of
// a tensor core with what came before (what is missing at K's end counts as zeros); slices are
// merged in an aligned binary tree, (0 + 1) + (2 + 3). By the models of docs/kernels.md that is all
// a result's bits depend on, so how rows and weights are shared out is free.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace specrt::product {

constexpr int kMaxSlices = 16;

struct Slices {
    int count;
    int64_t depth;  // of each but the last, a multiple of 64
};

// As many as give matrices with few outputs work for a whole GPU: a function of the matrix' shape
// alone. `depth` is K, above 0.
SPECRT_HD Slices slices_of(int64_t num_outputs, int64_t depth) {
    const int64_t tiles = (num_outputs + 63) / 64;
    int64_t count = 1;
    while (count < kMaxSlices && tiles * count < 256 && depth / (2 * count) >= 512) count *= 2;
    const int64_t each = ((depth + count - 1) / count + 63) / 64 * 64;
    return {static_cast<int>((depth + each - 1) / each), each};
}

}  // namespace specrt::product
