// y = x W^T (+ bias) (+ residual), weights streamed once, each row's bits its own. On the CPU it is
// core's multiplication; on a GPU a kernel for tensor cores, which can also take gate and up
// together and write silu(gate) * up, or multiply by silu(gate) of a gate that there is, and takes
// rows out of tables as it needs them.
#pragma once
#include "core/matmul.h"
#include "core/row_operand.h"
#include "core/tile_maxima.h"

namespace specrt {

// How a launch on a GPU is laid out; 0: as was measured (variants.h), else by make_plan's rules.
// Every choice gives the same bits.
struct LinearPlan {
    int32_t tile_rows;   // rows of weights that a block of threads takes: 64 or 128
    int32_t num_stages;  // of 64 k, under way to shared memory: 2 to 8
};

constexpr bool is_valid(const LinearPlan& plan) {
    const int rows = plan.tile_rows, stages = plan.num_stages;
    return (rows == 0 || rows == 64 || rows == 128) &&
           (stages == 0 || (stages >= 2 && stages <= 8));
}

struct LinearArgs {
    TensorView x, weight, bias, residual, out;
    TensorView
        workspace;  // on a GPU: tickets, zero between launches, and scratch; on the CPU: scratch
    bool is_gated;  // on a GPU: rows of weights by turns 8 of gate and 8 of up
    LinearPlan plan;
    TensorView maxima, sampling, history_len, depth;  // on a GPU: keys of logits, or none of these
    TensorView masses, token_map;                     // of a drafter's logits
    int64_t level;
    TensorView is_open;
    TensorView scale;  // of e4m3 weights
    // On a GPU: which rows of tables these are, what stands behind x in a row, and the gate.
    TensorView x_rows, second, second_rows, residual_rows, gate, gate_rows;
    std::vector<int64_t> layout;  // on the CPU: of packed weights (core/matrix.h), or empty
};

struct LinearParams {
    RowOperand x, second;       // [M, K'] and [M, K - K'], together a row of x, of `dtype`
    RowOperand gate, residual;  // [M, N] of `dtype`; the residual may be out
    const void* weight;         // [N, K] contiguous, of `weight_dtype`
    const float* bias;          // [N] or nullptr
    void* out;                  // [M, N], or [M, N / 2] if gated
    float* workspace;
    int64_t out_stride;
    int64_t num_rows, num_outputs, depth;
    int64_t second_begin;  // K', a multiple of 8; K if there is no second
    DType dtype, out_dtype, weight_dtype;
    bool is_gated;
    LinearPlan plan;
    TileMaxima maxima;  // of float32 results that are logits
    Openness openness;
    const float* scale;  // [N] of e4m3 weights, before the bias; otherwise nullptr
};

SPECRT_DECLARE_CUDA(linear_cuda)

namespace product {
constexpr int kMaxColumns = 128;     // rows of x that a block of threads takes
constexpr int kMostSplitRows = 256;  // of a launch with slices of K: it bounds the workspace
// A ticket for each tile of 64 weight rows and piece of 128 rows of x, as fewer than 256 tiles are
// split; at the workspace's beginning, whatever the shape.
constexpr int kMaxTickets = 256 * kMostSplitRows / kMaxColumns;

int padded(int64_t num_rows);                 // to 8, 16, 32, 64 or 128
int padded(int64_t num_rows, DType weights);  // e4m3: to 16 or 64
}  // namespace product

// Floats of workspace that launches of up to `num_rows` rows need on a GPU, 256 rows as many as
// more. Tickets at its beginning are to be zeroed once.
int64_t linear_workspace(int64_t num_outputs, int64_t depth, int64_t num_rows);

// One launch on a GPU; on the CPU one or more, in order.
std::vector<Launch> linear(const LinearArgs& args);

}  // namespace specrt
