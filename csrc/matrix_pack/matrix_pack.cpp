#include "matrix_pack/matrix_pack.h"

namespace specrt {

Launch matrix_pack(const MatrixPackArgs& a) {
    const MatrixView m = matrix_view(a.values, {}, a.layout);
    SPECRT_CHECK(m.is_packed(), "matrix: expected a packed one");
    expect_matrix(m, "[N, K]", -1, -1);
    expect_float(a.source);
    expect(a.source, a.source.dtype, "[R, K]", -1, m.depth);
    const int64_t num_rows = a.source.shape[0];
    SPECRT_CHECK(0 <= a.first_row && a.first_row + num_rows <= m.num_outputs,
                 "first_row: expected rows within [0, ", m.num_outputs, "), got ", a.first_row,
                 " and ", num_rows, " rows");
    expect(a.is_bad, DType::kInt32, "[1]", 1);
    expect_apart(a.source, a.values);
    const MatrixPackParams p{
        a.source.data,  a.values.data, a.is_bad.as<int32_t>(), a.source.stride[0],
        num_rows,       a.first_row,   m.num_outputs,          m.depth,
        a.source.dtype, m.format};
    return make_launch(matrix_pack_part_for(active_isa()), p, 1 + num_rows * m.depth / 65536);
}

}  // namespace specrt
