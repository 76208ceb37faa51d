// A draft model's input: h = W_fc [e ; f] + b_fc, and with feature sampling
// out = h + W_down (silu(W_gate e) * (W_up rmsnorm(h))). Several launches, run in order. Rows of 16
// bits are a GPU's, where all launches are other kernels' (specrt/ops/feature_sample.py).
#pragma once
#include <vector>

#include "core/dispatch.h"
#include "core/matrix.h"
#include "core/row_operand.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

// One row's scratch, in values: e, f (later rmsnorm(h)), h, gate, up. e and f touch, for they are
// the two halves of one operand, and so do gate and up.
struct FeatureSampleLayout {
    int64_t hidden, intermediate;
    static constexpr int64_t line(int64_t values) { return (values + 15) / 16 * 16; }
    int64_t e() const { return 0; }
    int64_t f() const { return hidden; }
    int64_t h() const { return line(2 * hidden); }
    int64_t gate() const { return h() + line(hidden); }
    int64_t up() const { return gate() + intermediate; }
    int64_t size() const { return gate() + line(2 * intermediate); }
};

// Rows to copy to offset `to` of the workspace's rows.
struct RowSource {
    RowOperand chosen;
    int64_t width, to;
    DType dtype;
    MatrixFormat format;
};

struct GatherParams {
    float* workspace;
    int64_t workspace_stride, num_rows;
    RowSource from[4];  // the feature's, then those that a token chooses
    int num_sources;
};

struct NormParams {
    const float* x;  // [M, H]
    const float* weight;
    float* out;
    int64_t stride, num_rows, width;  // x and out are columns of one workspace
    float eps;
};

struct GateParams {
    float* gate;  // [M, I], becomes silu(gate) * up
    const float* up;
    int64_t stride, num_rows, width;
};

SPECRT_DECLARE_CPU(feature_gather_part)
SPECRT_DECLARE_CPU(feature_norm_part)
SPECRT_DECLARE_CPU(feature_gate_part)

// Views may be empty where specrt/ops/feature_sample.py allows None.
struct FeatureSampleArgs {
    TensorView tokens, source, features, embed, fc, fc_bias, norm, gate, up, down, token_fc,
        token_gate, workspace, out, is_open, fc_scale, gate_scale, up_scale, down_scale;
    float eps;
    // On the CPU: scratch of the products, and how packed matrices lie (core/matrix.h).
    TensorView linear_workspace;
    std::vector<int64_t> embed_layout, fc_layout, gate_layout, up_layout, down_layout;
};

// Of float32 rows, on the CPU.
std::vector<Launch> feature_sample(const FeatureSampleArgs& a);

// Of rows of 16 bits, on either device: that all arguments fit.
void feature_check(const FeatureSampleArgs& a);

}  // namespace specrt
