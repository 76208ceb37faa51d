// Rows of weights into a packed matrix (core/matrix.h), as they are read from a file. CPU only.
#pragma once
#include "core/dispatch.h"
#include "core/matrix.h"
#include "core/thread_pool.h"

namespace specrt {

struct MatrixPackParams {
    const void* source;     // [R, K] of a float type, or bytes
    void* values;           // the packed matrix
    int32_t* is_bad;        // set where a value is not finite
    int64_t source_stride;  // in the source's values
    int64_t num_rows, first_row, num_outputs, depth;
    DType source_dtype;
    MatrixFormat format;
};

SPECRT_DECLARE_CPU(matrix_pack_part)

struct MatrixPackArgs {
    TensorView source, values, is_bad;
    std::vector<int64_t> layout;
    int64_t first_row;
};
Launch matrix_pack(const MatrixPackArgs& a);

}  // namespace specrt
