// The CPU's twin of a CUDA graph: launches recorded once, with their pointers, replayed as one
// call. Like a CUDA graph it holds addresses, not tensors: the caller keeps the buffers alive.
#pragma once
#include <vector>

#include "core/thread_pool.h"

namespace specrt {

class CpuGraph {
  public:
    // Launches submitted by this thread between begin() and end() are recorded (and run).
    void begin();
    void end();
    void replay(int num_threads) const;
    size_t num_launches() const { return launches_.size(); }

  private:
    std::vector<Launch> launches_;
    bool is_recording_ = false;
};

}  // namespace specrt
