#include "core/matmul.h"

namespace specrt {

int64_t matmul_workspace(int64_t depth, int64_t num_rows) {
    // Two floats a value, and some words a row and a group of values, in whole tiles of rows.
    const int64_t padded = divide_up(depth, kTileDepth) * kTileDepth;
    return divide_up(num_rows, kStripOutputs) * kStripOutputs * (2 * padded + padded / 8 + 32);
}

void matmul(const MatmulParams& p, std::vector<Launch>* launches) {
    // A part of less than ~8k multiply-adds is not worth another thread.
    const int64_t parts = 1 + p.num_rows * p.num_outputs * p.depth / 8192;
    const Isa isa = active_isa();
    const bool is_packed = p.format != MatrixFormat::kRows;
    launches->push_back(
        make_launch(is_packed ? matmul_tiles_part_for(isa) : matmul_part_for(isa), p, parts));
}

}  // namespace specrt
