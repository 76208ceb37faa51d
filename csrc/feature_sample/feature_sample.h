// A draft model's input: h = W_fc [e ; f] + b_fc, and with feature sampling
// out = h + W_down (silu(W_gate e) * (W_up rmsnorm(h))). Several launches, run in order.
#pragma once
#include <vector>

#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

// One row's scratch, in floats: e, f (later rmsnorm(h)), h, gate, up. e and f touch, for they are
// the two halves of one operand.
struct FeatureSampleLayout {
    int64_t hidden, intermediate;
    static constexpr int64_t line(int64_t floats) { return (floats + 15) / 16 * 16; }
    int64_t e() const { return 0; }
    int64_t f() const { return hidden; }
    int64_t h() const { return line(2 * hidden); }
    int64_t gate() const { return h() + line(hidden); }
    int64_t up() const { return gate() + line(intermediate); }
    int64_t size() const { return up() + line(intermediate); }
};

// Rows to copy to offset `to` of the workspace's rows, as float32.
struct RowSource {
    const void* rows;
    int64_t stride, width, to;
    DType dtype;
};

struct GatherParams {
    const int32_t* tokens;  // [M], clamped to [0, vocab)
    const int32_t* source;  // [M], clamped to [0, num_features), or nullptr: row m
    float* workspace;
    int64_t workspace_stride, num_rows, vocab, num_features;
    RowSource feature;
    RowSource by_token[3];
    int num_by_token;
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
        token_gate, workspace, out;
    float eps;
};

std::vector<Launch> feature_sample(const FeatureSampleArgs& a);

// Floats of scratch a row.
int64_t feature_sample_workspace(int64_t hidden, int64_t intermediate);

}  // namespace specrt
