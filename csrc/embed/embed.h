// out[i] = table[tokens[i]]: rows of a table by token, in the table's type or converted to out's.
// An id that is no token's counts as the nearest one.
//
// Who has to know which rows were taken gets their numbers besides, as `ids`. Of a level that is
// closed (core/open.h) no row is taken, and they are -1: no token's.
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/matrix.h"
#include "core/open.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct EmbedParams {
    const int32_t* tokens;  // [M]
    const void* table;      // [V, H]
    void* out;              // [M, H]
    int32_t* ids;           // [M] or nullptr
    Openness open;
    int64_t tokens_stride, table_stride, out_stride, ids_stride;
    int64_t num_rows, width;
    int32_t vocab;  // V, at least 1 where there is a row
    DType table_dtype, out_dtype;
    MatrixFormat format;  // of the table; packed on the CPU only, and to float32
};

// Which row of the table row `row` of `out` is.
SPECRT_HD int64_t source_row(const EmbedParams& p, int64_t row) {
    const int32_t token = p.tokens[row * p.tokens_stride];
    return token < 0 ? 0 : token < p.vocab ? token : p.vocab - 1;
}

SPECRT_HD void write_id(const EmbedParams& p, int64_t row, bool is_open) {
    if (p.ids) p.ids[row * p.ids_stride] = is_open ? static_cast<int32_t>(source_row(p, row)) : -1;
}

SPECRT_DECLARE_CPU(embed_part)
SPECRT_DECLARE_CUDA(embed_cuda)

struct EmbedArgs {
    TensorView tokens, table, out, ids, is_open;
    std::vector<int64_t> layout;  // of a packed table (core/matrix.h), or empty
};
Launch embed(const EmbedArgs& args);

}  // namespace specrt
