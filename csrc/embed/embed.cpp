#include "embed/embed.h"

namespace specrt {

Launch embed(const TensorView& tokens, const TensorView& table, const TensorView& out) {
    expect(tokens, DType::kInt32, "[M]", -1);
    expect_float(table);
    expect(table, table.dtype, "[V, H]", -1, -1);
    const int64_t rows = tokens.shape[0], vocab = table.shape[0], width = table.shape[1];
    SPECRT_CHECK(vocab <= INT32_MAX && (vocab > 0 || rows == 0),
                 "table: expected 1 to 2^31 - 1 rows, got ", table.describe());
    expect_float(out);
    expect(out, out.dtype, "[M, H]", rows, width);
    SPECRT_CHECK(rows <= INT32_MAX && width <= INT32_MAX,
                 "out: expected at most 2^31 - 1 rows of as many elements, got ", out.describe());
    const int device = common_device(tokens, table, out);
    expect_apart(tokens, out);
    expect_apart(table, out);
    const EmbedParams p{tokens.as<int32_t>(), table.data, out.data, table.stride[0],
                        out.stride[0],        rows,       width,    static_cast<int32_t>(vocab),
                        table.dtype,          out.dtype};
    if (device != kCpu) return make_cuda_launch(embed_cuda, p, device);
    // Below ~32k elements one thread is done before a second could have started.
    return make_launch(embed_part_for(active_isa()), p, 1 + rows * width / 32768);
}

}  // namespace specrt
