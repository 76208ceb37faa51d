#include "time_stamp/time_stamp.h"

namespace specrt {

Launch time_stamp(const TensorView& out) {
    expect(out, DType::kInt64, "[1]", 1);
    const TimeStampParams p{out.as<int64_t>()};
    const int device = common_device(out);
    if (device != kCpu) return make_cuda_launch(time_stamp_cuda, p, device);
    return make_launch(time_stamp_part_for(active_isa()), p, 1);
}

}  // namespace specrt
