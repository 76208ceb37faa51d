// out[i] = table[tokens[i]]: rows of a table by token, in the table's type or converted to out's.
// An id that is no token's counts as the nearest one.
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct EmbedParams {
    const int32_t* tokens;  // [M]
    const void* table;      // [V, H]
    void* out;              // [M, H]
    int64_t table_stride, out_stride;
    int64_t num_rows, width;
    int32_t vocab;  // V, at least 1 where there is a row
    DType table_dtype, out_dtype;
};

// Which row of the table row `row` of `out` is.
SPECRT_HD int64_t source_row(const EmbedParams& p, int64_t row) {
    const int32_t token = p.tokens[row];
    return token < 0 ? 0 : token < p.vocab ? token : p.vocab - 1;
}

SPECRT_DECLARE_CPU(embed_part)
SPECRT_DECLARE_CUDA(embed_cuda)

Launch embed(const TensorView& tokens, const TensorView& table, const TensorView& out);

}  // namespace specrt
