// The host's side: how many rows and leaves a block takes, what workspace that wants, and which
// kernel (kernel_*.cu) is started.
#include "tree_attention/plan.cuh"
#include "tree_attention/variants.h"

namespace specrt {
namespace attention {

// What was asked for, else measured; what neither says stays 0.
PlanChoice choose(const Shape& shape, const PlanChoice& asked, int arch) {
    const bool is_free = asked.num_warps == 0 && asked.blocks_per_sm == 0;
    return is_free ? measured_choice(kVariants, shape, arch) : asked;
}

// The least power of two that is no less.
int ceil_log2(int64_t n) {
    int log = 0;
    while (int64_t{1} << log < n) ++log;
    return log;
}

// Units and the levels of merging within one, for `room` blocks of threads on the whole GPU.
void split_sequences(const Shape& shape, int64_t room, Plan& plan) {
    // A tree may begin where the pages end: its rows there count for nothing, but are gone through.
    const int64_t all = ceil_div(int64_t{plan.max_prefix} + kMaxNodes, kLeaf);
    // A sliding window may begin anywhere in a leaf, and another one with each node.
    const int64_t seen = ceil_div(int64_t{shape.sliding_window} + kMaxNodes - 2, kLeaf) + 1;
    const int64_t leaves = all < seen ? all : seen;
    const int64_t others = shape.pairs() * plan.num_tiles;
    const int64_t units = others >= room ? 1 : ceil_div(room, others);
    plan.num_units = static_cast<int>(units < leaves ? units : leaves);
    if (others * plan.num_units > kMaxTickets) plan.num_units = 1;
    // How many units of 2^log aligned leaves so many leaves may be of.
    const auto num_touched = [&](int log) {
        const int64_t of_all = ceil_div(all, int64_t{1} << log);
        const int64_t anywhere = ceil_div(leaves - 1, int64_t{1} << log) + 1;
        return of_all < anywhere ? of_all : anywhere;
    };
    // What is of two units however large they are needs but one level more (Stack).
    while (num_touched(plan.num_levels) > plan.num_units && plan.num_levels <= ceil_log2(leaves))
        ++plan.num_levels;
}

Plan make_plan(const Shape& shape, const PlanChoice& asked, const DeviceLimits& limits) {
    const PlanChoice choice = choose(shape, asked, limits.arch);
    Plan plan{};
    const int64_t most = INT32_MAX - 2 * kLeaf;
    plan.max_prefix = static_cast<int>(shape.max_len < most ? shape.max_len : most);
    plan.num_warps = choice.num_warps > 0 ? choice.num_warps : shape.rows() <= 64 ? 4 : 8;
    plan.num_tiles = static_cast<int>(ceil_div(shape.rows(), 16 * plan.num_warps));
    plan.slot_vectors = (shape.head_dim / 8 + 1) * 32 * plan.num_warps;
    const size_t pool = size_t{2} * 2 * kPoolRows * (shape.head_dim + 8);
    const size_t tail = size_t{16} * plan.num_warps * (kMaxNodes + sizeof(int));
    plan.shared_bytes = pool + tail;
    if (shape.pairs() * plan.num_tiles == 0) return plan;  // nothing to do
    // Registers let two blocks of four warps run on an SM. Where shared memory does too, it is
    // better spent on that than on levels of merging; eight warps have the SM for themselves.
    const bool has_pairs = plan.num_warps == 4 && choice.blocks_per_sm != 1 &&
                           2 * plan.shared_bytes + kStaticShared <= limits.shared_bytes;
    // By rule, as many units as fill the GPU once: a second wave would wait, and partial results
    // cost traffic.
    const int by_rule = has_pairs ? 2 : 1;
    const int per_sm = choice.blocks_per_sm > 0 ? choice.blocks_per_sm : by_rule;
    split_sequences(shape, int64_t{limits.num_sms} * per_sm, plan);
    if (has_pairs) return plan;
    const size_t level = sizeof(float4) * plan.slot_vectors;
    const size_t used = plan.shared_bytes + kStaticShared;
    while (plan.shared_levels < plan.num_levels &&
           used + level * (plan.shared_levels + 1) <= limits.shared_bytes)
        ++plan.shared_levels;
    plan.shared_bytes += level * plan.shared_levels;
    return plan;
}

Division division_by(uint32_t divisor) {
    int shift = 31;
    while (uint64_t{1} << (shift - 31) < divisor) ++shift;
    return {static_cast<uint32_t>((uint64_t{1} << shift) / divisor + 1), shift};
}

template <typename T, bool kPlain>
void start(const KernelParams& k, CudaStream stream) {
    switch (k.p.head_dim) {
        case 64:
            return start<T, 64, kPlain>(k, stream);
        case 80:
            return start<T, 80, kPlain>(k, stream);
        case 96:
            return start<T, 96, kPlain>(k, stream);
        default:
            return start<T, 128, kPlain>(k, stream);
    }
}

template <typename T>
void start(const KernelParams& k, CudaStream stream) {
    const bool is_plain = k.p.sliding_window == kMaxSlots && k.p.cap == 0.0f;
    is_plain ? start<T, true>(k, stream) : start<T, false>(k, stream);
}

}  // namespace attention

int64_t tree_attention_workspace(int device, const attention::Shape& shape,
                                 const PlanChoice& choice) {
    const attention::Plan plan = attention::make_plan(
        shape, choice, device_limits(device == kCpu ? current_device() : device));
    return attention::kMaxTickets +
           plan.num_blocks(shape.pairs()) * plan.block_slots() * plan.slot_vectors * 4;
}

void tree_attention_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const TreeAttentionParams*>(params);
    const attention::Shape shape = attention::shape_of(p);
    const attention::Plan plan =
        attention::make_plan(shape, p.plan, device_limits(current_device()));
    if (plan.num_blocks(shape.pairs()) == 0) return;
    const attention::KernelParams k{
        p, plan, attention::division_by(static_cast<uint32_t>(p.table.page_size))};
    if (p.q_dtype == DType::kBFloat16) return attention::start<bf16_t>(k, stream);
    attention::start<f16_t>(k, stream);
}

}  // namespace specrt
