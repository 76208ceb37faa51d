// A GPU's launches captured once, started again as one call. It holds addresses, not tensors: the
// caller keeps the buffers alive.
#pragma once
#include <cstddef>
#include <functional>
#include <stdexcept>

#include "core/device.h"

namespace specrt {

class CudaGraph {
  public:
    // Captures what `launch` starts on the GPU `device` in the calling thread, on a stream of its
    // own; nothing of it runs. What `launch` throws is passed on, and nothing is left behind.
    // Throws std::runtime_error with CUDA's reason, or where this thread is capturing already.
    CudaGraph(int device, const std::function<void()>& launch);
    // One that runs ends first, and is freed then (as cudaGraphExecDestroy says); of a GPU that is
    // lost, nothing is done.
    ~CudaGraph();
    CudaGraph(const CudaGraph&) = delete;
    CudaGraph& operator=(const CudaGraph&) = delete;

    void replay(CudaStream stream) const;
    int device() const { return device_; }
    size_t num_launches() const { return num_launches_; }
    // Of the GPU's memory, by what was free there before and after; 0 where nobody can say.
    size_t num_bytes() const { return num_bytes_; }

  private:
    explicit CudaGraph(int device) : device_(device) {}

    int device_;
    void* executable_ = nullptr;  // a cudaGraphExec_t
    size_t num_launches_ = 0;
    size_t num_bytes_ = 0;
};

#if !defined(SPECRT_CUDA_KERNELS)
inline CudaGraph::CudaGraph(int device, const std::function<void()>&) : CudaGraph(device) {
    throw std::runtime_error("graph: this build of specrt has no CUDA kernels: see `specrt info`");
}
inline CudaGraph::~CudaGraph() = default;
inline void CudaGraph::replay(CudaStream) const {}
#endif

}  // namespace specrt
