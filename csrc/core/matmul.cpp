#include "core/matmul.h"

namespace specrt {

Launch matmul(const MatmulParams& p) {
    // A part of less than ~8k multiply-adds is not worth another thread.
    const int64_t parts = 1 + p.num_rows * p.num_outputs * p.depth / 8192;
    return make_launch(matmul_part_for(active_isa()), p, parts);
}

}  // namespace specrt
