#include "core/device.h"
#include "core/launch.cuh"

namespace specrt {
namespace {

#if defined(SPECRT_SIMT)

struct CurrentDevice {
    explicit CurrentDevice(int) {}
};

#else

class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) cuda_check(cudaSetDevice(device), "cudaSetDevice");
        is_changed_ = device != before_;
    }
    ~CurrentDevice() {
        if (is_changed_) (void)cudaSetDevice(before_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    int before_ = 0;
    bool is_changed_ = false;
};

#endif

}  // namespace

void run_on_gpu(const Launch& launch, CudaStream stream) {
    const CurrentDevice current(launch.device);
    launch.cuda(launch.params, stream);
}

}  // namespace specrt
