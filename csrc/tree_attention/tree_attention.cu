// The host's side: how many rows and leaves a block takes, what workspace that wants, and which
// kernel (kernel_*.cu) is started.
#include "tree_attention/plan.cuh"

namespace specrt {
namespace attention {

struct Shape {
    int num_seqs, num_kv_heads, group, num_nodes, head_dim;
    int64_t max_len;  // keys of the longest sequence there may be
};

Plan make_plan(const Shape& shape, const DeviceLimits& limits) {
    Plan plan{};
    const int rows = shape.num_nodes * shape.group;
    const int64_t most = INT32_MAX - 2 * kLeaf;
    plan.max_prefix = static_cast<int>(shape.max_len < most ? shape.max_len : most);
    plan.num_warps = rows <= 64 ? 4 : 8;
    plan.num_tiles = static_cast<int>(ceil_div(rows, 16 * plan.num_warps));
    plan.slot_vectors = (shape.head_dim / 8 + 1) * 32 * plan.num_warps;
    const size_t pool = size_t{2} * 2 * kPoolRows * (shape.head_dim + 8);
    const size_t tail = size_t{16} * plan.num_warps * (kMaxNodes + sizeof(int));
    plan.shared_bytes = pool + tail;
    // Registers let two blocks of four warps run on an SM. Where shared memory does too, it is
    // better spent on that than on levels of merging; eight warps have the SM for themselves.
    const bool has_pairs =
        plan.num_warps == 4 && 2 * plan.shared_bytes + kStaticShared <= limits.shared_bytes;
    // A tree may begin where the pages end: its rows there count for nothing, but are gone through.
    const int64_t leaves = ceil_div(int64_t{plan.max_prefix} + kMaxNodes, kLeaf);
    const int64_t others = int64_t{shape.num_seqs} * shape.num_kv_heads * plan.num_tiles;
    if (others == 0) return plan;  // nothing to do
    // As many units as fill the GPU once: a second wave would wait, and partial results cost
    // traffic.
    const int64_t room = limits.num_sms * (has_pairs ? 2 : 1);
    const int64_t units = others >= room ? 1 : ceil_div(room, others);
    plan.num_units = static_cast<int>(units < leaves ? units : leaves);
    if (others * plan.num_units > kMaxTickets) plan.num_units = 1;
    while (int64_t{ceil_div(leaves, int64_t{1} << plan.num_levels)} > plan.num_units)
        ++plan.num_levels;
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

template <typename T>
void start(const KernelParams& k, CudaStream stream) {
    switch (k.p.head_dim) {
        case 64:
            return start<T, 64>(k, stream);
        case 80:
            return start<T, 80>(k, stream);
        case 96:
            return start<T, 96>(k, stream);
        default:
            return start<T, 128>(k, stream);
    }
}

}  // namespace attention

int64_t tree_attention_workspace(int device, int num_seqs, int num_kv_heads, int group,
                                 int num_nodes, int head_dim, int64_t max_len) {
    const attention::Plan plan =
        attention::make_plan({num_seqs, num_kv_heads, group, num_nodes, head_dim, max_len},
                             device_limits(device == kCpu ? current_device() : device));
    return attention::kMaxTickets +
           plan.num_blocks(num_seqs, num_kv_heads) * plan.block_slots() * plan.slot_vectors * 4;
}

void tree_attention_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const TreeAttentionParams*>(params);
    const attention::Plan plan =
        attention::make_plan({p.num_seqs, p.num_kv_heads, p.group, p.num_nodes_max, p.head_dim,
                              int64_t{p.table.max_pages} * p.table.page_size},
                             device_limits(current_device()));
    if (plan.num_blocks(p.num_seqs, p.num_kv_heads) == 0) return;
    const attention::KernelParams k{
        p, plan, attention::division_by(static_cast<uint32_t>(p.table.page_size))};
    if (p.q_dtype == DType::kBFloat16) return attention::start<bf16_t>(k, stream);
    attention::start<f16_t>(k, stream);
}

}  // namespace specrt
