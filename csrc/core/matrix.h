// A matrix of weights [N, K] as the CPU's kernels stream it: row by row, or packed.
//
// Packed, sixteen outputs make a strip, whose bytes lie in the order they are read in: along K, for
// all sixteen outputs side by side. N is padded to whole strips and K to whole steps, with zeros.
//
//     strip 0: | k 0..31 of outputs 0..15 | k 32..63 of outputs 0..15 | ...
//     strip 1: | k 0..31 of outputs 16..31 | ...
//
// bfloat16 has a tile of 1 KB a step of 32 k: row p (of 16) holds w[n][2p], w[n][2p + 1] for the
// sixteen n, which is the second operand of a matrix unit (AMX) and just as well a vector.
#pragma once
#include <cstdint>
#include <vector>

#include "core/tensor_view.h"

namespace specrt {

enum class MatrixFormat : uint8_t {
    kRows,         // [N, K] of a float type, or e4m3 and a scale a row
    kBf16Split,    // packed bfloat16; rows of x are split in two parts of bfloat16
    kBf16Rounded,  // packed bfloat16; rows of x are rounded to bfloat16
    kCount,
};

constexpr int64_t kStripOutputs = 16, kTileDepth = 32, kTileBytes = 1024;

constexpr int64_t divide_up(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

// Bytes of a strip, a multiple of 64.
constexpr int64_t strip_bytes(MatrixFormat format, int64_t depth) {
    return format == MatrixFormat::kRows ? 0 : divide_up(depth, kTileDepth) * kTileBytes;
}

// Where row n of a packed matrix begins: its strip, in which it is output n % 16.
inline const char* strip_of(const void* values, MatrixFormat format, int64_t depth, int64_t n) {
    return static_cast<const char*>(values) + n / kStripOutputs * strip_bytes(format, depth);
}

// A matrix as an argument: of packed ones `values` are bytes [ceil(N / 16), strip_bytes].
struct MatrixView {
    TensorView values, scale;
    MatrixFormat format = MatrixFormat::kRows;
    int64_t num_outputs = 0, depth = 0;

    explicit operator bool() const { return static_cast<bool>(values); }
    bool is_packed() const { return format != MatrixFormat::kRows; }
};

// `layout` is empty for rows, otherwise the format, N and K.
MatrixView matrix_view(const TensorView& values, const TensorView& scale,
                       const std::vector<int64_t>& layout);

// [N, K] (-1: any) on the CPU: float32, bfloat16 or float16 rows, e4m3 ones with a scale, or
// packed.
void expect_matrix(const MatrixView& m, const char* wanted, int64_t num_outputs, int64_t depth);

}  // namespace specrt
