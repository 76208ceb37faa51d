// Launches on a GPU, for code that no CUDA compiler sees.
#pragma once
#include "core/thread_pool.h"

namespace specrt {

#if defined(SPECRT_CUDA_KERNELS)
// Starts a launch on its device, which is the calling thread's current one meanwhile. Throws
// std::runtime_error with CUDA's reason.
void run_on_gpu(const Launch& launch, CudaStream stream);
#else
inline void run_on_gpu(const Launch& launch, CudaStream stream) {
    launch.cuda(launch.params, stream);  // explains itself
}
#endif

// What the calling thread captures: its launches for the GPU `device` go to `stream`. Each thread
// has its own.
struct Capturing {
    int device = kCpu;  // which is never captured so
    CudaStream stream = nullptr;
};
Capturing& capturing();
// Throws std::runtime_error where the calling thread captures another device: a launch would run
// once, and be missing in the graph.
void check_part_of_capture(int device);

}  // namespace specrt
