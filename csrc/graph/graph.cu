#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/current_device.cuh"
#include "graph/cuda_graph.h"

namespace specrt {
namespace {

struct DestroyGraph {
    void operator()(cudaGraph_t graph) const { (void)cudaGraphDestroy(graph); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

// A stream of the current device that nobody else has, and that waits for none.
class Stream {
  public:
    Stream() {
        cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    }
    ~Stream() { (void)cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    cudaStream_t get() const { return stream_; }

  private:
    cudaStream_t stream_ = nullptr;
};

// From its making on the calling thread's launches for `device` are captured: until end(), or
// until it is destroyed, which throws what was captured away. Calls of other threads are let alone.
class Capture {
  public:
    Capture(int device, const Stream& stream) : stream_(stream) {
        if (capturing().device != kCpu)
            throw std::runtime_error("graph: this thread is already capturing");
        cuda_check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal),
                   "cudaStreamBeginCapture");
        capturing() = {device, stream_.get()};
    }
    ~Capture() {
        if (is_open_) (void)close();
    }
    Capture(const Capture&) = delete;
    Capture& operator=(const Capture&) = delete;

    Graph end() {
        cuda_check(close(), "cudaStreamEndCapture");
        return std::move(graph_);
    }

  private:
    cudaError_t close() {
        is_open_ = false;
        capturing() = {};
        cudaGraph_t graph = nullptr;
        const cudaError_t status = cudaStreamEndCapture(stream_.get(), &graph);
        graph_.reset(graph);
        return status;
    }

    const Stream& stream_;
    Graph graph_;
    bool is_open_ = true;
};

size_t count_kernels(cudaGraph_t graph) {
    size_t num_nodes = 0;
    cuda_check(cudaGraphGetNodes(graph, nullptr, &num_nodes), "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> nodes(num_nodes);
    cuda_check(cudaGraphGetNodes(graph, nodes.data(), &num_nodes), "cudaGraphGetNodes");
    size_t count = 0;
    for (const cudaGraphNode_t node : nodes) {
        cudaGraphNodeType type;
        cuda_check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
        count += type == cudaGraphNodeTypeKernel;
    }
    return count;
}

size_t free_bytes() {
    size_t free = 0, total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}

}  // namespace

CudaGraph::CudaGraph(int device, const std::function<void()>& launch) : CudaGraph(device) {
    const CurrentDevice current(device);
    const Stream stream;
    Capture capture(device, stream);
    launch();
    const Graph graph = capture.end();
    num_launches_ = count_kernels(graph.get());
    const size_t before = free_bytes();
    cudaGraphExec_t executable = nullptr;
    cuda_check(cudaGraphInstantiateWithFlags(&executable, graph.get(), 0), "cudaGraphInstantiate");
    executable_ = executable;
    cuda_check(cudaGraphUpload(executable, stream.get()), "cudaGraphUpload");
    const size_t after = free_bytes();
    num_bytes_ = after < before ? before - after : 0;  // others free memory meanwhile
}

CudaGraph::~CudaGraph() {
    if (!executable_) return;
    try {
        const CurrentDevice current(device_);
        (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
    } catch (const std::exception&) {
        // CUDA does not even name the current device: there is nothing left to free.
    }
}

void CudaGraph::replay(CudaStream stream) const {
    if (capturing().device != kCpu)
        throw std::runtime_error("graph: launched while this thread is capturing another");
    const CurrentDevice current(device_);
    cuda_check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_),
                               static_cast<cudaStream_t>(stream)),
               "cudaGraphLaunch");
}

}  // namespace specrt
