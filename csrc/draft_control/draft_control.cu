// Deciding: a thread is one sequence. What it does is one chain of dependent operations (Philox,
// logarithms, a few divisions in double), so more threads a sequence would wait for each other.
//
// Learning: a thread is one row of the posterior, and goes through the sequences that believe it in
// the order of the batch, as the CPU does. So a row that several share ends with the CPU's bits,
// and no two threads ever write one row.
#include "core/ptx.cuh"
#include "draft_control/round.h"

namespace specrt {
namespace {

constexpr int kBlock = 32;

__global__ void __launch_bounds__(kBlock) control_sequences(const DraftControlParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const int b = static_cast<int>(blockIdx.x * kBlock + threadIdx.x);
    if (b < p.batch) control_sequence(p, b);
}

__global__ void __launch_bounds__(kBlock) learn_rows(const DraftControlUpdateParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const int row = static_cast<int>(blockIdx.x * kBlock + threadIdx.x);
    if (row >= p.slots_size) return;
    for (int b = 0; b < p.batch; ++b)
        if (p.slots[b] == row) learn_from(p, b);
}

LaunchShape shape_of(int32_t num_threads) {
    return {dim3(ceil_div(num_threads, kBlock)), dim3(kBlock), 0, kOverlaps};
}

}  // namespace

void draft_control_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const DraftControlParams*>(params);
    if (p.batch == 0) return;
    SPECRT_LAUNCH(control_sequences, shape_of(p.batch), stream, p);
}

void draft_control_update_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const DraftControlUpdateParams*>(params);
    if (p.batch == 0 || p.slots_size == 0) return;
    SPECRT_LAUNCH(learn_rows, shape_of(p.slots_size), stream, p);
}

}  // namespace specrt
