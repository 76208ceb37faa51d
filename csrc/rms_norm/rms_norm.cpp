#include "rms_norm/rms_norm.h"

namespace specrt {

Launch rms_norm(const TensorView& x, const TensorView& weight, const TensorView& residual,
                const TensorView& out, float eps) {
    return norm_launch({x, weight, {}, residual, out, eps}, rms_norm_part_for(active_isa()),
                       rms_norm_cuda);
}

}  // namespace specrt
