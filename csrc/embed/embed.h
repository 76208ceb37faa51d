// out[i] = table[tokens[i]]: rows of a table by token, in the table's type or converted to out's.
// An id that is no token's counts as the nearest one. Values may be scaled, and a row of a table of
// positions added: by where the token stands in its sequence, or the nearest row that there is.
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

struct PositionRows {
    const void* table;      // [P, H] or nullptr: nothing is added
    const int32_t* depth;   // [B, N]
    const int32_t* kv_len;  // [B]
    int64_t table_stride, depth_stride;
    int64_t offset, num_nodes;  // N, at least 1 where there is a row
    int64_t size;               // P, at least 1 where there is a row
    DType dtype;
};

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
    float scale;
    PositionRows positions;
};

SPECRT_HD bool is_adjusted(const EmbedParams& p) {
    return p.scale != 1.0f || p.positions.table;
}

// Which row of the table row `row` of `out` is.
SPECRT_HD int64_t source_row(const EmbedParams& p, int64_t row) {
    const int32_t token = p.tokens[row * p.tokens_stride];
    return token < 0 ? 0 : token < p.vocab ? token : p.vocab - 1;
}

// Where in the table of positions row `row` of `out` has its own.
SPECRT_HD int64_t position_start(const PositionRows& p, int64_t row) {
    const int64_t b = row / p.num_nodes, i = row % p.num_nodes;
    const int64_t position = int64_t{p.kv_len[b]} + p.depth[b * p.depth_stride + i] + p.offset;
    return (position < 0 ? 0 : position < p.size ? position : p.size - 1) * p.table_stride;
}

SPECRT_HD void write_id(const EmbedParams& p, int64_t row, bool is_open) {
    if (p.ids) p.ids[row * p.ids_stride] = is_open ? static_cast<int32_t>(source_row(p, row)) : -1;
}

SPECRT_DECLARE_CPU(embed_part)
SPECRT_DECLARE_CUDA(embed_cuda)

struct EmbedArgs {
    TensorView tokens, table, out, ids, is_open;
    std::vector<int64_t> layout;  // of a packed table (core/matrix.h), or empty
    float scale;
    TensorView positions, depth, kv_len;  // all or none
    int64_t offset;
};
Launch embed(const EmbedArgs& args);

}  // namespace specrt
