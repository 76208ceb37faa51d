#include "embed/embed.h"

namespace specrt {
namespace {

// May be a column. Returns M.
int64_t expect_ids(TensorView t, int64_t rows) {
    t.stride[0] = 1;
    expect(t, DType::kInt32, "[M]", rows);
    return t.shape[0];
}

// Rows of a float type, which may be strided, or a packed matrix.
void expect_table(const MatrixView& m) {
    if (m.is_packed()) return expect_matrix(m, "[V, H]", -1, -1);
    expect_float(m.values);
    expect(m.values, m.values.dtype, "[V, H]", -1, -1);
}

void expect_all_apart(const EmbedArgs& a) {
    for (const TensorView* read :
         {&a.tokens, &a.table, &a.is_open, &a.positions, &a.depth, &a.kv_len})
        for (const TensorView* written : {&a.out, &a.ids})
            if (*read && *written) expect_apart(*read, *written);
    if (a.ids) expect_apart(a.ids, a.out);
}

PositionRows position_rows(const EmbedArgs& a, int64_t rows, int64_t width) {
    if (!a.positions) return {};
    expect_float(a.positions);
    expect(a.positions, a.positions.dtype, "[P, H]", -1, width);
    expect(a.depth, DType::kInt32, "[B, N]", -1, -1);
    const int64_t batch = a.depth.shape[0], num_nodes = a.depth.shape[1];
    SPECRT_CHECK(batch * num_nodes == rows, "depth: expected [B, N] of ", rows,
                 " as tokens has, got ", a.depth.describe());
    expect(a.kv_len, DType::kInt32, "[B]", batch);
    SPECRT_CHECK(a.positions.shape[0] > 0 || rows == 0,
                 "positions: expected at least one row, got ", a.positions.describe());
    SPECRT_CHECK(a.offset >= INT32_MIN && a.offset <= INT32_MAX,
                 "offset: expected a number of 32 bits, got ", a.offset);
    return {a.positions.data,
            a.depth.as<int32_t>(),
            a.kv_len.as<int32_t>(),
            a.positions.stride[0],
            a.depth.stride[0],
            a.offset,
            num_nodes,
            a.positions.shape[0],
            a.positions.dtype};
}

}  // namespace

Launch embed(const EmbedArgs& a) {
    const TensorView &table = a.table, &out = a.out;
    const int64_t rows = expect_ids(a.tokens, -1);
    const MatrixView matrix = matrix_view(table, {}, a.layout);
    expect_table(matrix);
    const int64_t vocab = matrix.num_outputs, width = matrix.depth;
    SPECRT_CHECK(vocab <= INT32_MAX && (vocab > 0 || rows == 0),
                 "table: expected 1 to 2^31 - 1 rows, got ", table.describe());
    expect_float(out);
    expect(out, matrix.is_packed() ? DType::kFloat32 : out.dtype, "[M, H]", rows, width);
    SPECRT_CHECK(rows <= INT32_MAX && width <= INT32_MAX,
                 "out: expected at most 2^31 - 1 rows of as many elements, got ", out.describe());
    if (a.ids) expect_ids(a.ids, rows);
    const Openness open = openness_of(a.is_open);
    const int device =
        common_device(a.tokens, table, out, a.ids, a.is_open, a.positions, a.depth, a.kv_len);
    expect_all_apart(a);
    const EmbedParams p{a.tokens.as<int32_t>(),
                        table.data,
                        out.data,
                        a.ids.as<int32_t>(),
                        open,
                        a.tokens.stride[0],
                        table.stride[0],
                        out.stride[0],
                        a.ids.stride[0],
                        rows,
                        width,
                        static_cast<int32_t>(vocab),
                        table.dtype,
                        out.dtype,
                        matrix.format,
                        a.scale,
                        position_rows(a, rows, width)};
    SPECRT_CHECK(device == kCpu || !matrix.is_packed(),
                 "table: expected rows on a GPU, got a packed matrix");
    if (device != kCpu) return make_cuda_launch(embed_cuda, p, device);
    // Below ~32k elements one thread is done before a second could have started.
    return make_launch(embed_part_for(active_isa()), p, 1 + rows * width / 32768);
}

}  // namespace specrt
