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

// Zeros before the first launch, and as large as this one needs.
float* expect_workspace(const LinearArgs& a, int64_t num_rows, int64_t num_outputs, int64_t depth) {
    const int64_t needed = linear_workspace(num_outputs, depth, num_rows);
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

void expect_gpu_weight(const LinearArgs& a) {
    expect_matrix(matrix_view(a.weight, a.scale, {}), "[N, K]", -1, -1);
    SPECRT_CHECK(a.x.dtype == DType::kBFloat16 || a.x.dtype == DType::kFloat16,
                 "x: expected bfloat16 or float16 on a GPU, got ", a.x.describe());
    if (!is_narrow(a)) expect_dtype_of(a.x, a.weight);
    const int64_t num_outputs = a.weight.shape[0], depth = a.weight.shape[1];
    const int64_t unit = is_narrow(a) ? 16 : 8;  // of 16 bytes
    SPECRT_CHECK(depth > 0 && depth % unit == 0 && depth <= INT32_MAX && num_outputs <= 64 * 65535,
                 "weight: expected K to be a multiple of ", unit,
                 " on a GPU, and N to be at most 4194240, got ", a.weight.describe());
    SPECRT_CHECK(!is_narrow(a) || a.plan.tile_rows != 64,
                 "plan: expected tile_rows of 128 with float8_e4m3fn weights, got 64");
    SPECRT_CHECK(!a.is_gated || num_outputs % 16 == 0,
                 "weight: expected a multiple of 16 rows, gate and up by turns of 8, got ",
                 a.weight.describe());
    expect_rows_of_16_bytes(a.weight);
}

// Of a drafter's logits: all rows are of one level.
TileMaxima draft_maxima_of(const LinearArgs& a) {
    const int64_t rows = a.out.shape[0], vocab = a.weight.shape[0];
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
    const int64_t rows = a.out.shape[0];
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
    const int64_t rows = a.out.shape[0], vocab = a.weight.shape[0];
    SPECRT_CHECK(a.out.dtype == DType::kFloat32 && !a.is_gated && !a.residual,
                 "maxima: expected float32 logits, neither gated nor with a residual");
    expect(a.maxima, DType::kInt64, "[M, ceil(N / 64)]", rows, num_token_tiles(vocab));
    expect_contiguous(a.maxima);
    return a.masses ? draft_maxima_of(a) : target_maxima_of(a);
}

// Rows of a tensor that has one for each row of the result, or of a table as `index` says.
RowOperand rows_of(const TensorView& t, const TensorView& index, DType dtype, const char* wanted,
                   int64_t num_rows, int64_t width) {
    SPECRT_CHECK(t || !index, index.name, ": expected None without rows to choose from");
    if (!t) return {};
    expect(t, dtype, wanted, index ? -1 : num_rows, width);
    if (index) expect(index, DType::kInt32, "[M]", num_rows);
    SPECRT_CHECK(t.shape[0] > 0 || num_rows == 0, t.name, ": expected at least one row");
    return {t.data, t.stride[0], index.as<int32_t>(), t.shape[0]};
}

// That writing `out` changes no row that is yet to be read. Both may be columns of one tensor.
void expect_unwritten(const TensorView& t, const TensorView& out) {
    if (!t) return;
    const int64_t stride = out.stride[0] * size_of(out.dtype);
    if (stride > 0 && stride == t.stride[0] * size_of(t.dtype)) {
        const int64_t behind =
            (static_cast<const char*>(out.data) - static_cast<const char*>(t.data)) % stride;
        const int64_t first = behind < 0 ? behind + stride : behind;
        if (first >= t.shape[1] * size_of(t.dtype) &&
            first + out.shape[1] * size_of(out.dtype) <= stride)
            return;
    }
    expect_apart(t, out);
}

// Of what is read where it is written, row by row: it may be `out` itself.
void expect_out_or_unwritten(const TensorView& t, const TensorView& out) {
    const bool is_out = t.data == out.data && t.dtype == out.dtype &&
                        (t.stride[0] == out.stride[0] || out.shape[0] <= 1);
    if (!is_out) expect_unwritten(t, out);
}

void expect_unwritten_operands(const LinearArgs& a) {
    expect_unwritten(a.x, a.out);
    expect_unwritten(a.second, a.out);
    (a.gate_rows ? expect_unwritten : expect_out_or_unwritten)(a.gate, a.out);
    (a.residual_rows ? expect_unwritten : expect_out_or_unwritten)(a.residual, a.out);
}

// What a row of x consists of: K values of one tensor, or of one the first and of another the rest.
void expect_depth(const LinearArgs& a, int64_t depth) {
    if (!a.second) return expect(a.x, a.x.dtype, "[M, K]", -1, depth);
    expect(a.x, a.x.dtype, "[M, K']", -1, -1);
    const int64_t first = a.x.shape[1];
    SPECRT_CHECK(first > 0 && first < depth && first % 8 == 0, a.x.name,
                 ": expected a multiple of 8 values a row, fewer than K = ", depth, ", got ",
                 a.x.describe());
    expect(a.second, a.x.dtype, "[M, K - K']", -1, depth - first);
    expect_rows_of_16_bytes(a.second);
}

void expect_result(const LinearArgs& a, DType dtype, int64_t num_rows) {
    const int64_t num_results = a.is_gated ? a.weight.shape[0] / 2 : a.weight.shape[0];
    expect(a.out, dtype, a.is_gated ? "[M, N / 2]" : "[M, N]", num_rows, num_results);
    if (a.bias) expect(a.bias, DType::kFloat32, "[N]", a.weight.shape[0]);
    SPECRT_CHECK(!a.is_gated || !a.residual, "residual: expected None with is_gated");
    SPECRT_CHECK(!a.gate || !(a.is_gated || a.maxima),
                 "gate: expected None with is_gated or maxima");
    expect_unwritten_operands(a);
}

LinearParams gpu_params(const LinearArgs& a) {
    expect_gpu_weight(a);
    const int64_t num_outputs = a.weight.shape[0], depth = a.weight.shape[1];
    expect_depth(a, depth);
    expect_rows_of_16_bytes(a.x);
    const int64_t num_rows = (a.x_rows ? a.x_rows : a.x).shape[0];
    SPECRT_CHECK(num_rows <= INT32_MAX, "x: expected fewer rows, got ", a.x.describe());
    const DType out_dtype = a.out.dtype == DType::kFloat32 ? a.out.dtype : a.x.dtype;
    expect_result(a, out_dtype, num_rows);
    LinearParams p{};
    p.x = rows_of(a.x, a.x_rows, a.x.dtype, "[M, K]", num_rows, a.x.shape[1]);
    p.second =
        rows_of(a.second, a.second_rows, a.x.dtype, "[M, K - K']", num_rows, depth - a.x.shape[1]);
    p.gate = rows_of(a.gate, a.gate_rows, a.x.dtype, "[M, N]", num_rows, num_outputs);
    p.residual = rows_of(a.residual, a.residual_rows, a.x.dtype, "[M, N]", num_rows, num_outputs);
    p.weight = a.weight.data;
    p.bias = a.bias.as<float>();
    p.out = a.out.data;
    p.workspace = expect_workspace(a, num_rows, num_outputs, depth);
    p.out_stride = a.out.stride[0];
    p.num_rows = num_rows;
    p.num_outputs = num_outputs;
    p.depth = depth;
    p.second_begin = a.x.shape[1];
    p.dtype = a.x.dtype;
    p.out_dtype = out_dtype;
    p.weight_dtype = a.weight.dtype;
    p.is_gated = a.is_gated;
    p.plan = a.plan;
    p.maxima = maxima_of(a);
    p.openness = openness_of(a.is_open);
    p.scale = a.scale.as<float>();
    return p;
}

// Scratch for rows of x, which packed weights are multiplied by in other forms.
float* expect_cpu_workspace(const LinearArgs& a, const MatrixView& weight, int64_t num_rows) {
    if (!weight.is_packed()) return nullptr;
    const int64_t needed = matmul_workspace(weight.depth, num_rows);
    SPECRT_CHECK(a.workspace, "workspace: expected a tensor with packed weights, got None");
    expect(a.workspace, DType::kFloat32, "[floats]", -1);
    SPECRT_CHECK(a.workspace.shape[0] >= needed, "workspace: expected at least ", needed,
                 " floats for ", num_rows, " rows, got ", a.workspace.describe());
    expect_aligned(a.workspace, 64);
    return a.workspace.as<float>();
}

std::vector<Launch> on_cpu(const LinearArgs& a) {
    SPECRT_CHECK(!a.is_gated, "is_gated: expected False on the CPU, where activate follows");
    SPECRT_CHECK(!a.maxima, "maxima: expected None on the CPU");
    for (const TensorView* t :
         {&a.x_rows, &a.second, &a.second_rows, &a.residual_rows, &a.gate, &a.gate_rows})
        SPECRT_CHECK(!*t, t->name, ": expected None on the CPU");
    const MatrixView weight = matrix_view(a.weight, a.scale, a.layout);
    expect_matrix(weight, "[N, K]", -1, -1);
    const int64_t num_outputs = weight.num_outputs, depth = weight.depth;
    expect(a.x, DType::kFloat32, "[M, K]", -1, depth);
    const int64_t num_rows = a.x.shape[0];
    expect(a.out, DType::kFloat32, "[M, N]", num_rows, num_outputs);
    if (a.bias) expect(a.bias, DType::kFloat32, "[N]", num_outputs);
    if (a.residual) expect(a.residual, DType::kFloat32, "[M, N]", num_rows, num_outputs);
    expect_unwritten_operands(a);
    std::vector<Launch> launches;
    matmul({a.x.as<float>(), a.weight.data, a.bias.as<float>(), a.residual.as<float>(),
            a.out.as<float>(), a.x.stride[0], a.residual.stride[0], a.out.stride[0], num_rows,
            num_outputs, depth, a.weight.dtype, a.scale.as<float>(), openness_of(a.is_open),
            weight.format, expect_cpu_workspace(a, weight, num_rows)},
           &launches);
    return launches;
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

std::vector<Launch> linear(const LinearArgs& a) {
    const int device =
        common_device(a.x, a.weight, a.bias, a.residual, a.out, a.workspace, a.maxima, a.sampling,
                      a.history_len, a.depth, a.masses, a.token_map, a.is_open, a.scale, a.x_rows,
                      a.second, a.second_rows, a.residual_rows, a.gate, a.gate_rows);
    expect_plan(a.plan);
    if (device == kCpu) return on_cpu(a);
    SPECRT_CHECK(a.layout.empty(), "weight: expected rows on a GPU, got a packed matrix");
    return {make_cuda_launch(linear_cuda, gpu_params(a), device)};
}

}  // namespace specrt
