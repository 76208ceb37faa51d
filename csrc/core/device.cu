#include "core/device.h"
#include "core/launch.cuh"

namespace specrt {
namespace {

class CurrentDevice {
  public:
    explicit CurrentDevice(int device) : before_(current_device()) {
        if (device != before_) cuda_check(cudaSetDevice(device), "cudaSetDevice");
        is_changed_ = device != before_;
    }
    ~CurrentDevice() {
        if (is_changed_) (void)cudaSetDevice(before_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    int before_;
    bool is_changed_ = false;
};

}  // namespace

void run_on_gpu(const Launch& launch, CudaStream stream) {
    const CurrentDevice current(launch.device);
    launch.cuda(launch.params, stream);
}

}  // namespace specrt
