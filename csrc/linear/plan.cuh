// What the host lays out for a launch and the kernel is told.
#pragma once
#include "core/launch.cuh"
#include "linear/linear.h"
#include "linear/slices.h"

namespace specrt::product {

constexpr int kDepth = 64;  // k of a stage: 128 bytes of a row
constexpr int kMinStages = 2, kMaxStages = 8;

struct Plan {
    int tile_rows, columns;     // of weights and of x that a block takes, the last padded
    int num_tiles, num_pieces;  // blocks over the weights and over the rows of x
    int num_stages;
    int weight_bytes;  // of one
    Slices slices;
    size_t shared_bytes;
    bool is_whole;  // rows of out and residual can be moved by 16 bytes
};

struct KernelParams {
    LinearParams p;
    Plan plan;
};

// Launches the kernel for T (bf16_t or f16_t), with keys of logits or without: which the others
// have no registers for. Each is instantiated in a source of its own, kernel_T.cu and maxima_T.cu:
// together they would take nvcc too long.
template <typename T, bool kHasMaxima>
void start(const KernelParams& k, CudaStream stream);

// The same for e4m3 weights, with keys or without, in narrow_T.cu.
template <typename T>
void start_narrow(const KernelParams& k, CudaStream stream);

}  // namespace specrt::product
