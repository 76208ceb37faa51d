#include "core/norm.cuh"
#include "layer_norm/layer_norm.h"

namespace specrt {

void layer_norm_cuda(const void* params, CudaStream stream) {
    launch_norm<Centred>(*static_cast<const NormRows*>(params), stream);
}

}  // namespace specrt
