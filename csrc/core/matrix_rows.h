// Single rows of packed matrices: written from rows as files have them, and read as float32.
#pragma once
#include "core/matrix.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

// Row n of a packed matrix: K floats.
inline void unpack_row(const void* values, MatrixFormat format, int64_t depth, int64_t n,
                       float* out) {
    const auto* lane =
        reinterpret_cast<const bf16*>(strip_of(values, format, depth, n)) + n % kStripOutputs * 2;
    for (int64_t k = 0; k < depth; ++k) out[k] = to_float(lane[k / 2 * 32 + k % 2]);
}

}  // namespace specrt::SPECRT_ISA
