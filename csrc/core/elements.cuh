// Kernels that go element by element: a thread takes kSize neighbouring elements of a row, 16 bytes
// where rows and their strides allow it.
#pragma once
#include "core/launch.cuh"

namespace specrt {

constexpr int kElementThreads = 256;  // of a block

struct Elements {
    int64_t row, first;  // of the thread's, which may lie past the row's end
};

template <int kSize>
__device__ __forceinline__ Elements elements_of_thread(unsigned blocks_per_row) {
    const unsigned block = blockIdx.x % blocks_per_row;
    return {blockIdx.x / blocks_per_row, (int64_t{block} * kElementThreads + threadIdx.x) * kSize};
}

inline unsigned element_blocks(int64_t width, int size) {
    return static_cast<unsigned>(ceil_div(width, int64_t{kElementThreads} * size));
}

inline LaunchShape element_shape(int64_t num_rows, unsigned blocks_per_row) {
    return {dim3(static_cast<unsigned>(num_rows) * blocks_per_row), dim3(kElementThreads), 0,
            kOverlaps};
}

}  // namespace specrt
