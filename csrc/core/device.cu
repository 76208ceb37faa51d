#include "core/current_device.cuh"
#include "core/device.h"

namespace specrt {

void run_on_gpu(const Launch& launch, CudaStream stream) {
    const CurrentDevice current(launch.device);
    launch.cuda(launch.params, stream);
}

}  // namespace specrt
