#include "core/matrix.h"

namespace specrt {
namespace {

void expect_rows(const MatrixView& m, const char* wanted, int64_t num_outputs, int64_t depth) {
    const TensorView &values = m.values, &scale = m.scale;
    const bool is_narrow = values.dtype == DType::kE4M3;
    if (!is_narrow) expect_float(values);
    expect(values, values.dtype, wanted, num_outputs, depth);
    expect_contiguous(values);
    SPECRT_CHECK(is_narrow || !scale, scale.name, ": expected None, as ", values.name, " is ",
                 name_of(values.dtype), ", got ", scale.describe());
    if (!is_narrow) return;
    SPECRT_CHECK(scale, scale.name, ": expected [N] = [", m.num_outputs, "] float32, as ",
                 values.name, " is float8_e4m3fn, got None");
    expect(scale, DType::kFloat32, "[N]", m.num_outputs);
}

void expect_packed(const MatrixView& m, const char* wanted, int64_t num_outputs, int64_t depth) {
    const bool fits =
        (num_outputs < 0 || num_outputs == m.num_outputs) && (depth < 0 || depth == m.depth);
    SPECRT_CHECK(fits, m.values.name, ": expected ", wanted, " = [", num_outputs, ", ", depth,
                 "] (-1: any), got a packed matrix [", m.num_outputs, ", ", m.depth, "]");
    SPECRT_CHECK(!m.scale, m.scale.name, ": expected None with a packed matrix");
    expect(m.values, DType::kUInt8, "[ceil(N / 16), bytes]",
           divide_up(m.num_outputs, kStripOutputs), strip_bytes(m.format, m.depth));
    expect_contiguous(m.values);
    expect_aligned(m.values, 64);
}

}  // namespace

MatrixView matrix_view(const TensorView& values, const TensorView& scale,
                       const std::vector<int64_t>& layout) {
    if (layout.empty())
        return {values, scale, MatrixFormat::kRows, values.shape[0], values.shape[1]};
    const bool is_known = layout.size() == 3 && layout[0] > 0 &&
                          layout[0] < static_cast<int64_t>(MatrixFormat::kCount) &&
                          layout[1] >= 0 && layout[2] > 0;
    SPECRT_CHECK(is_known, values.name, ": expected a packed matrix of a known layout");
    return {values, scale, static_cast<MatrixFormat>(layout[0]), layout[1], layout[2]};
}

void expect_matrix(const MatrixView& m, const char* wanted, int64_t num_outputs, int64_t depth) {
    if (m.is_packed()) {
        expect_packed(m, wanted, num_outputs, depth);
    } else {
        expect_rows(m, wanted, num_outputs, depth);
    }
}

}  // namespace specrt
