#include "feature_sample/feature_sample.h"

#include "core/matmul.h"

namespace specrt {
namespace {

struct Sizes {
    int64_t rows, hidden, intermediate, vocab;
    bool has_feature_sampling;
};

void expect_table(const TensorView& t, const char* wanted, int64_t vocab, int64_t width) {
    expect_float(t);
    expect(t, t.dtype, wanted, vocab, width);
}

void expect_absent(const TensorView& t, const char* why) {
    SPECRT_CHECK(!t, t.name, ": expected None, ", why, ", got ", t.describe());
}

void expect_given(const TensorView& t, const char* wanted, const char* why) {
    SPECRT_CHECK(static_cast<bool>(t), t.name, ": expected ", wanted, ", ", why, ", got None");
}

// What rows are multiplied by.
struct Matrices {
    MatrixView fc, gate, up, down;
};

Matrices matrices(const FeatureSampleArgs& a) {
    return {matrix_view(a.fc, a.fc_scale, a.fc_layout),
            matrix_view(a.gate, a.gate_scale, a.gate_layout),
            matrix_view(a.up, a.up_scale, a.up_layout),
            matrix_view(a.down, a.down_scale, a.down_layout)};
}

void check_fc(const FeatureSampleArgs& a, const Matrices& m, int64_t hidden) {
    if (a.token_fc) {
        expect_absent(a.fc_bias, "token_fc holds it");
        expect_matrix(m.fc, "[H, H]", hidden, hidden);
    } else {
        if (a.fc_bias) expect(a.fc_bias, DType::kFloat32, "[H]", hidden);
        expect_matrix(m.fc, "[H, 2 H]", hidden, 2 * hidden);
    }
}

// Returns I, or 0 without feature sampling.
int64_t check_mlp(const FeatureSampleArgs& a, const Matrices& m, int64_t hidden) {
    if (!a.norm && !a.gate && !a.up && !a.down && !a.token_gate) return 0;
    constexpr const char* kTogether = "for norm, gate, up and down come together";
    expect_given(a.norm, "[H]", kTogether);
    expect_given(a.up, "[I, H]", kTogether);
    expect_given(a.down, "[H, I]", kTogether);
    expect(a.norm, DType::kFloat32, "[H]", hidden);
    expect_matrix(m.up, "[I, H]", -1, hidden);
    const int64_t intermediate = m.up.num_outputs;
    expect_matrix(m.down, "[H, I]", hidden, intermediate);
    if (a.token_gate) {
        expect_absent(a.gate, "token_gate replaces it");
    } else {
        expect_given(a.gate, "[I, H]", "or token_gate");
        expect_matrix(m.gate, "[I, H]", intermediate, hidden);
    }
    return intermediate;
}

// Returns V. Every table that is given has it, and those that are needed are given.
int64_t check_tables(const FeatureSampleArgs& a, int64_t hidden, int64_t intermediate) {
    if (!a.token_fc) expect_given(a.embed, "[V, H]", "unless token_fc is given");
    if (a.gate) expect_given(a.embed, "[V, H]", "unless token_gate is given");
    const MatrixView embed = matrix_view(a.embed, {}, a.embed_layout);
    const int64_t vocab = a.token_fc ? a.token_fc.shape[0] : embed.num_outputs;
    if (a.token_fc) expect_table(a.token_fc, "[V, H]", -1, hidden);
    if (embed.is_packed()) {
        expect_matrix(embed, "[V, H]", vocab, hidden);
    } else if (embed) {
        expect_table(a.embed, "[V, H]", vocab, hidden);
    }
    if (a.token_gate) expect_table(a.token_gate, "[V, I]", vocab, intermediate);
    return vocab;
}

Sizes check(const FeatureSampleArgs& a) {
    expect(a.tokens, DType::kInt32, "[M]", -1);
    const int64_t rows = a.tokens.shape[0];
    if (a.source) expect(a.source, DType::kInt32, "[M]", rows);
    expect(a.features, a.features.dtype, "[S, H]", -1, -1);
    const int64_t hidden = a.features.shape[1], enough = a.source ? (rows > 0) : rows;
    SPECRT_CHECK(a.features.shape[0] >= enough, a.features.name, ": expected at least ", enough,
                 " rows, got ", a.features.describe());
    const Matrices m = matrices(a);
    check_fc(a, m, hidden);
    for (const MatrixView* one : {&m.fc, &m.gate, &m.up, &m.down})
        SPECRT_CHECK(*one || !one->scale, one->scale.name, ": expected None without a matrix");
    const int64_t intermediate = check_mlp(a, m, hidden);
    const int64_t vocab = check_tables(a, hidden, intermediate);
    SPECRT_CHECK(vocab > 0 || rows == 0, (a.token_fc ? a.token_fc : a.embed).name,
                 ": expected at least one token's row");
    expect(a.out, a.features.dtype, "[M, H]", rows, hidden);
    const int64_t scratch = FeatureSampleLayout{hidden, intermediate}.size();
    expect(a.workspace, a.features.dtype, "[M, feature_sample_workspace(H, I)]", -1, -1);
    SPECRT_CHECK(a.workspace.shape[0] >= rows && a.workspace.shape[1] >= scratch, a.workspace.name,
                 ": expected at least [", rows, ", ", scratch, "], got ", a.workspace.describe());
    return {rows, hidden, intermediate, vocab, static_cast<bool>(a.down)};
}

RowSource row_source(const MatrixView& m, const TensorView& index, int64_t to) {
    const TensorView& t = m.values;
    return {
        {t.data, t.stride[0], index.as<int32_t>(), m.num_outputs}, m.depth, to, t.dtype, m.format};
}

Launch gather(const FeatureSampleArgs& a, const Sizes& n) {
    const FeatureSampleLayout at{n.hidden, n.intermediate};
    GatherParams p{};
    p.workspace = a.workspace.as<float>();
    p.workspace_stride = a.workspace.stride[0];
    p.num_rows = n.rows;
    const auto add = [&](const TensorView& t, const TensorView& index, int64_t to,
                         const std::vector<int64_t>& layout = {}) {
        p.from[p.num_sources++] = row_source(matrix_view(t, {}, layout), index, to);
    };
    add(a.features, a.source, at.f());
    if (!a.token_fc || a.gate) add(a.embed, a.tokens, at.e(), a.embed_layout);
    if (a.token_fc) add(a.token_fc, a.tokens, at.h());
    if (a.token_gate) add(a.token_gate, a.tokens, at.gate());
    return make_launch(feature_gather_part_for(active_isa()), p, 1 + n.rows * at.size() / 16384);
}

// Scratch for rows of x, which packed matrices are multiplied by in other forms.
float* expect_linear_workspace(const FeatureSampleArgs& a, const MatrixView& m, int64_t rows) {
    if (!m.is_packed()) return nullptr;
    const TensorView& scratch = a.linear_workspace;
    const int64_t needed = matmul_workspace(m.depth, rows);
    SPECRT_CHECK(scratch, scratch.name, ": expected a tensor with packed matrices, got None");
    expect(scratch, DType::kFloat32, "[floats]", -1);
    SPECRT_CHECK(scratch.shape[0] >= needed, scratch.name, ": expected at least ", needed,
                 " floats, got ", scratch.describe());
    expect_aligned(scratch, 64);
    return scratch.as<float>();
}

}  // namespace

void feature_check(const FeatureSampleArgs& a) {
    const DType type = a.features.dtype;
    SPECRT_CHECK(type == DType::kBFloat16 || type == DType::kFloat16,
                 "features: expected bfloat16 or float16, got ", a.features.describe());
    for (const TensorView* t : {&a.embed, &a.token_fc, &a.token_gate})
        if (*t) expect_dtype_of(a.features, *t);
    for (const TensorView* t : {&a.fc, &a.gate, &a.up, &a.down})
        if (*t && t->dtype != DType::kE4M3) expect_dtype_of(a.features, *t);
    const Sizes n = check(a);
    SPECRT_CHECK(n.hidden % 8 == 0 && n.intermediate % 8 == 0,
                 (n.intermediate ? a.down : a.fc).name,
                 ": expected H and I to be multiples of 8 in 16 bits, got ", n.hidden, " and ",
                 n.intermediate);
    for (const TensorView* t : {&a.features, &a.embed, &a.workspace})
        if (*t) expect_rows_of_16_bytes(*t);
    common_device(a.features, a.tokens, a.source, a.embed, a.fc, a.fc_bias, a.norm, a.gate, a.up,
                  a.down, a.token_fc, a.token_gate, a.workspace, a.out, a.is_open, a.fc_scale,
                  a.gate_scale, a.up_scale, a.down_scale);
}

std::vector<Launch> feature_sample(const FeatureSampleArgs& a) {
    expect(a.features, DType::kFloat32, "[S, H]", -1, -1);
    const Sizes n = check(a);
    const FeatureSampleLayout at{n.hidden, n.intermediate};
    float* const ws = a.workspace.as<float>();
    const int64_t stride = a.workspace.stride[0], out_stride = a.out.stride[0];
    float* const out = a.out.as<float>();
    const Isa isa = active_isa();
    const Openness openness = openness_of(a.is_open);  // the rest is in scratch
    const auto [fc, gate_of, up, down] = matrices(a);
    std::vector<Launch> launches;
    launches.reserve(11);
    const auto multiply = [&](int64_t x, const MatrixView& w, const float* bias, int64_t residual,
                              float* y, int64_t y_stride) {
        matmul({ws + x, w.values.data, bias, residual < 0 ? nullptr : ws + residual, y, stride,
                stride, y_stride, n.rows, w.num_outputs, w.depth, w.values.dtype,
                w.scale.as<float>(), openness, w.format, expect_linear_workspace(a, w, n.rows)},
               &launches);
    };
    launches.push_back(gather(a, n));
    float* const h = n.has_feature_sampling ? ws + at.h() : out;
    multiply(a.token_fc ? at.f() : at.e(), fc, a.fc_bias.as<float>(), a.token_fc ? at.h() : -1, h,
             n.has_feature_sampling ? stride : out_stride);
    if (!n.has_feature_sampling) return launches;
    const NormParams norm{h, a.norm.as<float>(), ws + at.f(), stride, n.rows, n.hidden, a.eps};
    launches.push_back(
        make_launch(feature_norm_part_for(isa), norm, 1 + n.rows * n.hidden / 16384));
    if (a.gate) multiply(at.e(), gate_of, nullptr, -1, ws + at.gate(), stride);
    multiply(at.f(), up, nullptr, -1, ws + at.up(), stride);
    const GateParams gate{ws + at.gate(), ws + at.up(), stride, n.rows, n.intermediate};
    launches.push_back(
        make_launch(feature_gate_part_for(isa), gate, 1 + n.rows * n.intermediate / 4096));
    multiply(at.gate(), down, nullptr, at.h(), out, out_stride);
    return launches;
}

}  // namespace specrt
