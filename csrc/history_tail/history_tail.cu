// A warp has one sequence, a lane every 32nd token.
#include "core/ptx.cuh"
#include "history_tail/history_tail.h"

namespace specrt {
namespace {

__global__ void __launch_bounds__(32) history_tail_sequence(const HistoryTailParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const int64_t seq = blockIdx.x;
    const int32_t start = tail_start(p, seq);
    if (threadIdx.x == 0) p.start[seq] = start;
    for (auto place = static_cast<int32_t>(threadIdx.x); place < p.width; place += 32)
        p.tokens[seq * p.tokens_stride + place] = tail_token(p, seq, start, place);
}

}  // namespace

void history_tail_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const HistoryTailParams*>(params);
    if (p.batch == 0) return;
    const LaunchShape shape{dim3(static_cast<unsigned>(p.batch)), dim3(32), 0, kOverlaps};
    SPECRT_LAUNCH(history_tail_sequence, shape, stream, p);
}

}  // namespace specrt
