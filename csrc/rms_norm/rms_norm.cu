#include "core/norm.cuh"
#include "rms_norm/rms_norm.h"

namespace specrt {

void rms_norm_cuda(const void* params, CudaStream stream) {
    launch_norm<RootMeanSquare>(*static_cast<const NormRows*>(params), stream);
}

}  // namespace specrt
