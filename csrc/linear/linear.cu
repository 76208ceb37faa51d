// The host's side: how a launch is laid out, and which kernel (kernel_*.cu) is started.
#include "core/pack.cuh"
#include "linear/plan.cuh"
#include "linear/variants.h"

namespace specrt {
namespace product {

size_t stage_bytes(const Plan& plan) {
    return size_t{kDepth} *
           static_cast<size_t>(plan.tile_rows * plan.weight_bytes + plan.columns * 2);
}

// Stages for `per_sm` blocks on an SM. What the system takes of an SM's shared memory for a block
// is as much as the most that one may ask for leaves out.
int most_stages(const Plan& plan, size_t per_sm, const DeviceLimits& limits) {
    const size_t all = (limits.shared_bytes + kStaticShared) / per_sm, lost = 2 * kStaticShared;
    const size_t stages = all > lost ? (all - lost) / stage_bytes(plan) : 0;
    return static_cast<int>(stages < kMaxStages ? stages : kMaxStages);
}

// Rows are read by each tile, from the L2 cache: large tiles halve that, where they leave enough
// blocks; few kernels are compiled of narrow weights and of logits that leave keys, and all of them
// are of large ones. As many stages as fit beside the blocks that there are for an SM.
void lay_out(Plan& plan, const LinearPlan& choice, const DeviceLimits& limits, int64_t outputs,
             bool leaves_keys) {
    const int64_t others = int64_t{plan.slices.count} * plan.num_pieces;
    const int64_t large = ceil_div(outputs, 128) * others;
    const bool is_small =
        plan.columns <= 32 ? large < 2 * limits.num_sms : 2 * large < limits.num_sms;
    plan.tile_rows = choice.tile_rows > 0 ? choice.tile_rows : is_small ? 64 : 128;
    if (plan.weight_bytes == 1 || leaves_keys) plan.tile_rows = 128;
    plan.num_tiles = static_cast<int>(ceil_div(outputs, plan.tile_rows));
    const bool has_pairs = plan.columns <= 64 && plan.num_tiles * others > limits.num_sms;
    const int alone = most_stages(plan, 1, limits);
    int stages = has_pairs ? most_stages(plan, 2, limits) : alone;
    if (choice.num_stages > 0) stages = choice.num_stages < alone ? choice.num_stages : alone;
    plan.num_stages = stages < kMinStages ? kMinStages : stages;
    const size_t ring = stage_bytes(plan) * static_cast<size_t>(plan.num_stages);
    const size_t staged = sizeof(float) * static_cast<size_t>(plan.columns * (plan.tile_rows + 4));
    plan.shared_bytes = ring > staged ? ring : staged;
}

bool can_move_16_bytes(const LinearParams& p) {
    const int64_t results = p.is_gated ? p.num_outputs / 2 : p.num_outputs;
    const auto fits = [&](const void* rows, int64_t stride, DType dtype) {
        return is_multiple_of_16(rows) && is_multiple_of_16(stride * size_of(dtype));
    };
    return results % 8 == 0 && fits(p.out, p.out_stride, p.out_dtype) &&
           fits(p.residual.rows, p.residual.stride, p.dtype) &&
           fits(p.gate.rows, p.gate.stride, p.dtype);
}

Plan make_plan(const LinearParams& p, const DeviceLimits& limits) {
    const bool is_narrow = p.weight_dtype == DType::kE4M3;
    const bool is_free = p.plan.tile_rows == 0 && p.plan.num_stages == 0 && !is_narrow;
    const LinearPlan choice =
        is_free ? measured_choice(kVariants, p.num_outputs, p.depth, p.num_rows, limits.arch)
                : p.plan;
    Plan plan{};
    plan.columns = padded(p.num_rows, p.weight_dtype);
    plan.weight_bytes = static_cast<int>(size_of(p.weight_dtype));
    plan.num_pieces = static_cast<int>(ceil_div(p.num_rows, plan.columns));
    plan.slices = slices_of(p.num_outputs, p.depth);
    plan.is_whole = can_move_16_bytes(p);
    lay_out(plan, choice, limits, p.num_outputs, p.maxima.keys != nullptr);
    return plan;
}

// The rows from `first` on, at most `count`.
LinearParams rows_from(const LinearParams& p, int64_t first, int64_t count) {
    LinearParams part = p;
    for (RowOperand* o : {&part.x, &part.second, &part.gate, &part.residual})
        *o = rows_behind(*o, first, size_of(p.dtype));
    part.out = static_cast<char*>(p.out) + first * p.out_stride * size_of(p.out_dtype);
    part.num_rows = p.num_rows - first < count ? p.num_rows - first : count;
    part.maxima.first_row = first;
    return part;
}

template <typename T>
void start_one(const KernelParams& k, CudaStream stream) {
    if (k.p.weight_dtype == DType::kE4M3) return start_narrow<T>(k, stream);
    if (k.p.maxima.keys) return start<T, true>(k, stream);
    start<T, false>(k, stream);
}

}  // namespace product

void linear_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const LinearParams*>(params);
    if (p.num_rows * p.num_outputs == 0) return;
    const DeviceLimits limits = device_limits(current_device());
    const bool is_split = product::slices_of(p.num_outputs, p.depth).count > 1;
    const int64_t step = is_split ? int64_t{product::kMostSplitRows} : p.num_rows;
    for (int64_t first = 0; first < p.num_rows; first += step) {
        const LinearParams part = product::rows_from(p, first, step);
        const product::KernelParams k{part, product::make_plan(part, limits)};
        if (p.dtype == DType::kBFloat16) {
            product::start_one<bf16_t>(k, stream);
        } else {
            product::start_one<f16_t>(k, stream);
        }
    }
}

}  // namespace specrt
