// What the host lays out for a launch and the kernel is told: the parts that planning
// (tree_attention.cu) and the kernel (kernel.cuh) share.
#pragma once
#include "core/launch.cuh"
#include "tree_attention/tree_attention.h"

namespace specrt::attention {

constexpr int kBlock = 64;         // keys
constexpr int kLeaf = 4 * kBlock;  // keys that are always gone through one after another
constexpr int kStages = 3, kPoolRows = kStages * kBlock;  // a tail: 64 of the prefix + 128 nodes
constexpr int kMaxNodes = 64 * TreeAttentionParams::kMaxWords;

constexpr int kMaxTickets = 4096;  // at the workspace's beginning, whatever the shape

// How the launch is laid out; what workspace there is follows from it.
struct Plan {
    int num_warps, num_tiles;   // of 16 rows in a block; blocks over the rows
    int num_units, num_levels;  // at most, a sequence; of merging within a unit
    int shared_levels, slot_vectors;
    int max_prefix;  // keys of it that are seen: more would leave the plan
    size_t shared_bytes;

    int64_t num_blocks(int64_t pairs) const { return pairs * num_tiles * num_units; }
    int64_t block_slots() const {  // a block's, in the workspace
        return (num_units > 1 ? 1 : 0) + num_levels - shared_levels;
    }
};

// Division by a constant: n / divisor is n * factor >> shift for all n of 31 bits.
struct Division {
    uint32_t factor;
    int shift;

    __device__ int quotient(int n) const {
        return static_cast<int>(uint64_t{factor} * static_cast<uint32_t>(n) >> shift);
    }
};

struct KernelParams {
    TreeAttentionParams p;
    Plan plan;
    Division page;
};

// Launches the kernel for T (bf16_t or f16_t) and head size D, plain: without a sliding window and
// a cap of scores, which take registers. Each is instantiated in a source of its own, kernel_T_D.cu
// and kernel_T_D_sliding.cu: together they would be most of what there is to compile.
template <typename T, int D, bool kPlain>
void start(const KernelParams& k, CudaStream stream);

}  // namespace specrt::attention
