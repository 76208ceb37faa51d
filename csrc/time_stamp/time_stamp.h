// When a device comes to a point of its work, by its own clock: what tells a captured round's
// stages apart, as nobody may look in its midst.
#pragma once
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct TimeStampParams {
    int64_t* out;  // nanoseconds since some moment of the device's own
};

SPECRT_DECLARE_CPU(time_stamp_part)
SPECRT_DECLARE_CUDA(time_stamp_cuda)

Launch time_stamp(const TensorView& out);

}  // namespace specrt
