// The GPU that CUDA's calls of a thread are for.
#pragma once
#include "core/launch.cuh"

namespace specrt {

// Makes a GPU the calling thread's current one, until destroyed.
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

}  // namespace specrt
