#include "linear/linear.h"

#include "linear/slices.h"

namespace specrt {
namespace product {

int padded(int64_t num_rows) {
    int columns = 8;
    while (columns < kMaxColumns && columns < num_rows) columns *= 2;
    return columns;
}

// Fewer kernels to compile for a drafter's matrices: more rows are several pieces.
int padded(int64_t num_rows, DType weights) {
    if (weights == DType::kE4M3) return num_rows <= 16 ? 16 : 64;
    return padded(num_rows);
}

}  // namespace product

namespace {

void expect_plan(const LinearPlan& plan) {
    SPECRT_CHECK(is_valid(plan), "plan: expected tile_rows of 64 or 128 and num_stages from 2 to 8",
                 ", got ", plan.tile_rows, " and ", plan.num_stages);
}

void expect_rows_of_16_bytes(const TensorView& t) {
    expect_aligned(t, 16);
    SPECRT_CHECK(t.stride[0] * size_of(t.dtype) % 16 == 0 || t.shape[0] <= 1, t.name,
                 ": expected rows at multiples of 16 bytes on a GPU");
}

// Zeros before the first launch, and as large as this one needs.
float* expect_workspace(const LinearArgs& a, int64_t num_outputs, int64_t depth) {
    const int64_t needed = linear_workspace(num_outputs, depth, a.x.shape[0]);
    if (needed == 0) return nullptr;
    SPECRT_CHECK(a.workspace, "workspace: expected a tensor for this shape on a GPU, got None");
    expect(a.workspace, DType::kFloat32, "[floats]", -1);
    SPECRT_CHECK(a.workspace.shape[0] >= needed, "workspace: expected at least ", needed,
                 " floats for this shape, got ", a.workspace.describe());
    expect_aligned(a.workspace, 16);
    return a.workspace.as<float>();
}

bool is_narrow(const LinearArgs& a) {
    return a.weight.dtype == DType::kE4M3;
}

void expect_scale(const LinearArgs& a) {
    const int64_t num_outputs = a.weight.shape[0];
    SPECRT_CHECK(is_narrow(a) || !a.scale, "scale: expected None, as weight is ",
                 name_of(a.weight.dtype), ", got ", a.scale.describe());
    SPECRT_CHECK(!is_narrow(a) || a.scale, "scale: expected [N] = [", num_outputs,
                 "] float32, as weight is float8_e4m3fn, got None");
    if (a.scale) expect(a.scale, DType::kFloat32, "[N]", num_outputs);
}

void expect_gpu_weight(const LinearArgs& a) {
    if (!is_narrow(a)) expect_dtype_of(a.x, a.weight);
    expect(a.weight, a.weight.dtype, "[N, K]", -1, -1);
    expect_contiguous(a.weight);
    const int64_t num_outputs = a.weight.shape[0], depth = a.weight.shape[1];
    const int64_t unit = is_narrow(a) ? 16 : 8;  // of 16 bytes
    SPECRT_CHECK(depth > 0 && depth % unit == 0 && depth <= INT32_MAX && num_outputs <= 64 * 65535,
                 "weight: expected K to be a multiple of ", unit,
                 " on a GPU, and N to be at most 4194240, got ", a.weight.describe());
    SPECRT_CHECK(!is_narrow(a) || a.plan.tile_rows != 64,
                 "plan: expected tile_rows of 128 with float8_e4m3fn weights, got 64");
    expect_rows_of_16_bytes(a.weight);
}

// Of a drafter's logits: all rows are of one level.
TileMaxima draft_maxima_of(const LinearArgs& a) {
    const int64_t rows = a.x.shape[0], vocab = a.weight.shape[0];
    expect(a.masses, DType::kFloat32, "[M, ceil(N / 64)]", rows, num_token_tiles(vocab));
    expect_contiguous(a.masses);
    if (a.token_map) expect(a.token_map, DType::kInt32, "[N]", vocab);
    SPECRT_CHECK(0 <= a.level && a.level < 65536, "level: expected 0..65535, got ", a.level);
    int64_t nodes = rows > 0 ? rows : 1;
    if (a.sampling) {
        expect(a.sampling, DType::kInt64, "[B, 8]", -1, kSamplingWords);
        expect_contiguous(a.sampling);
        const int64_t batch = a.sampling.shape[0];
        TensorView position = a.history_len;
        position.name = "position";
        SPECRT_CHECK(position, "position: expected a tensor, as sampling is given");
        expect(position, DType::kInt32, "[B]", batch);
        SPECRT_CHECK(batch > 0 && rows % batch == 0, "sampling: expected a row for each of B ",
                     "sequences, of which each has as many of ", rows, " rows, got ",
                     a.sampling.describe());
        nodes = rows / batch;
    }
    return {a.maxima.as<uint64_t>(),
            a.sampling.as<SamplingRow>(),
            a.history_len.as<int32_t>(),
            nullptr,
            nodes,
            0,
            a.masses.as<float>(),
            a.token_map.as<int32_t>(),
            static_cast<int32_t>(a.level)};
}

TileMaxima target_maxima_of(const LinearArgs& a) {
    const int64_t rows = a.x.shape[0];
    expect(a.sampling, DType::kInt64, "[B, 8]", -1, kSamplingWords);
    const int64_t batch = a.sampling.shape[0];
    expect(a.history_len, DType::kInt32, "[B]", batch);
    expect(a.depth, DType::kInt32, "[B, M / B]", batch, -1);
    const int64_t nodes = a.depth.shape[1];
    SPECRT_CHECK(batch * nodes == rows, "depth: expected one for each of ", rows, " rows, got ",
                 a.depth.describe());
    for (const TensorView* t : {&a.sampling, &a.history_len, &a.depth}) expect_contiguous(*t);
    TileMaxima maxima{};
    maxima.keys = a.maxima.as<uint64_t>();
    maxima.sampling = a.sampling.as<SamplingRow>();
    maxima.history_len = a.history_len.as<int32_t>();
    maxima.depth = a.depth.as<int32_t>();
    maxima.nodes = nodes;
    return maxima;
}

TileMaxima maxima_of(const LinearArgs& a) {
    if (!a.maxima) return {};
    const int64_t rows = a.x.shape[0], vocab = a.weight.shape[0];
    SPECRT_CHECK(a.out.dtype == DType::kFloat32 && !a.is_gated && !a.residual,
                 "maxima: expected float32 logits, neither gated nor with a residual");
    expect(a.maxima, DType::kInt64, "[M, ceil(N / 64)]", rows, num_token_tiles(vocab));
    expect_contiguous(a.maxima);
    return a.masses ? draft_maxima_of(a) : target_maxima_of(a);
}

LinearParams gpu_params(const LinearArgs& a) {
    SPECRT_CHECK(a.x.dtype == DType::kBFloat16 || a.x.dtype == DType::kFloat16,
                 "x: expected bfloat16 or float16 on a GPU, got ", a.x.describe());
    expect_gpu_weight(a);
    const int64_t num_outputs = a.weight.shape[0], depth = a.weight.shape[1];
    SPECRT_CHECK(!a.is_gated || num_outputs % 16 == 0,
                 "weight: expected a multiple of 16 rows, gate and up by turns of 8, got ",
                 a.weight.describe());
    SPECRT_CHECK(!a.is_gated || !a.residual, "residual: expected None with is_gated");
    expect(a.x, a.x.dtype, "[M, K]", -1, depth);
    SPECRT_CHECK(a.x.shape[0] <= INT32_MAX, "x: expected fewer rows, got ", a.x.describe());
    expect_rows_of_16_bytes(a.x);
    const int64_t num_results = a.is_gated ? num_outputs / 2 : num_outputs;
    const char* wanted = a.is_gated ? "[M, N / 2]" : "[M, N]";
    const DType out_dtype = a.out.dtype == DType::kFloat32 ? a.out.dtype : a.x.dtype;
    expect(a.out, out_dtype, wanted, a.x.shape[0], num_results);
    if (a.bias) expect(a.bias, DType::kFloat32, "[N]", num_outputs);
    if (a.residual) expect(a.residual, a.x.dtype, "[M, N]", a.x.shape[0], num_outputs);
    return {a.x.data,
            a.weight.data,
            a.bias.as<float>(),
            a.residual.data,
            a.out.data,
            expect_workspace(a, num_outputs, depth),
            a.x.stride[0],
            a.residual.stride[0],
            a.out.stride[0],
            a.x.shape[0],
            num_outputs,
            depth,
            a.x.dtype,
            out_dtype,
            a.weight.dtype,
            a.is_gated,
            a.plan,
            maxima_of(a),
            openness_of(a.is_open),
            a.scale.as<float>()};
}

Launch on_cpu(const LinearArgs& a) {
    SPECRT_CHECK(!a.is_gated, "is_gated: expected False on the CPU, where silu_mul follows");
    SPECRT_CHECK(!a.maxima, "maxima: expected None on the CPU");
    expect_weight(a.weight, "[N, K]", -1, -1);
    const int64_t num_outputs = a.weight.shape[0], depth = a.weight.shape[1];
    expect(a.x, DType::kFloat32, "[M, K]", -1, depth);
    expect(a.out, DType::kFloat32, "[M, N]", a.x.shape[0], num_outputs);
    if (a.bias) expect(a.bias, DType::kFloat32, "[N]", num_outputs);
    if (a.residual) expect(a.residual, DType::kFloat32, "[M, N]", a.x.shape[0], num_outputs);
    return matmul({a.x.as<float>(), a.weight.data, a.bias.as<float>(), a.residual.as<float>(),
                   a.out.as<float>(), a.x.stride[0], a.residual.stride[0], a.out.stride[0],
                   a.x.shape[0], num_outputs, depth, a.weight.dtype, a.scale.as<float>(),
                   openness_of(a.is_open)});
}

}  // namespace

int64_t linear_workspace(int64_t num_outputs, int64_t depth, int64_t num_rows) {
    SPECRT_CHECK(num_outputs >= 0 && depth > 0, "num_inputs: expected a matrix, got [", num_outputs,
                 ", ", depth, "]");
    const int64_t slices = product::slices_of(num_outputs, depth).count;
    if (slices == 1 || num_rows <= 0) return 0;
    const bool is_most = num_rows >= product::kMostSplitRows;
    const int64_t rows = is_most ? product::kMostSplitRows : num_rows;
    const int64_t columns = rows <= 16 ? 16 : rows <= 64 ? 64 : 128;  // whatever the weights
    const int64_t pieces = (rows + columns - 1) / columns, tiles = (num_outputs + 127) / 128;
    return product::kMaxTickets + slices * tiles * 128 * pieces * columns;
}

Launch linear(const LinearArgs& a) {
    const int device =
        common_device(a.x, a.weight, a.bias, a.residual, a.out, a.workspace, a.maxima, a.sampling,
                      a.history_len, a.depth, a.masses, a.token_map, a.is_open, a.scale);
    expect_plan(a.plan);
    expect_scale(a);
    if (device == kCpu) return on_cpu(a);
    return make_cuda_launch(linear_cuda, gpu_params(a), device);
}

}  // namespace specrt
