#include "graph.h"

#include <atomic>
#include <mutex>
#include <stdexcept>

#include "launch.h"

namespace {

constexpr size_t kTotalBytes = size_t{1} << 40;
constexpr size_t kLaunchBytes = 1024;  // that an uploaded graph takes for each

std::mutex failing_lock;
std::string failing;  // the call that fails next
std::atomic<int> num_objects{0};
std::atomic<size_t> used_bytes{0};
thread_local simt::Graph* captured_here = nullptr;  // by the calling thread

bool fails(const char* call) {
    const std::lock_guard<std::mutex> lock(failing_lock);
    if (failing != call) return false;
    failing.clear();
    return true;
}

template <typename T>
T* made(T value) {
    ++num_objects;
    return new T(std::move(value));
}

template <typename T>
cudaError_t destroyed(T* object) {
    --num_objects;
    delete object;
    return cudaSuccess;
}

}  // namespace

namespace simt {

bool is_captured(void* stream, const CapturedLaunch& launch) {
    Graph* graph = stream ? static_cast<Stream*>(stream)->captured : nullptr;
    if (!graph) return false;
    if (!graph->is_valid)
        throw std::runtime_error("kernel " + std::string(launch.name ? launch.name : "") + ": " +
                                 cudaGetErrorString(cudaErrorStreamCaptureInvalidated));
    graph->launches.push_back(launch);
    return true;
}

void fail_next(const std::string& call) {
    const std::lock_guard<std::mutex> lock(failing_lock);
    failing = call;
}

void synchronize() {
    if (captured_here) captured_here->is_valid = false;
}

int num_graph_objects() {
    return num_objects;
}

}  // namespace simt

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    if (fails("cudaStreamCreate")) return cudaErrorMemoryAllocation;
    int device = 0;
    (void)cudaGetDevice(&device);
    *stream = made(simt::Stream{device});
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return destroyed(stream);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (fails("cudaStreamBeginCapture")) return cudaErrorMemoryAllocation;
    if (stream->captured || captured_here) return cudaErrorIllegalState;
    captured_here = stream->captured = made(simt::Graph{});
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    if (!stream->captured || stream->captured != captured_here) return cudaErrorIllegalState;
    *graph = stream->captured;
    captured_here = stream->captured = nullptr;
    if ((*graph)->is_valid) return cudaSuccess;
    (void)destroyed(*graph);
    *graph = nullptr;
    return cudaErrorStreamCaptureInvalidated;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num_nodes) {
    *num_nodes = graph->launches.size();
    for (size_t i = 0; nodes && i < *num_nodes; ++i) nodes[i] = &graph->launches[i];
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t, cudaGraphNodeType* type) {
    *type = cudaGraphNodeTypeKernel;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return destroyed(graph);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
    if (fails("cudaGraphInstantiate")) return cudaErrorMemoryAllocation;
    int device = 0;
    (void)cudaGetDevice(&device);
    *executable = made(simt::Executable{device, graph->launches});
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
    if (fails("cudaGraphUpload")) return cudaErrorMemoryAllocation;
    executable->num_bytes = kLaunchBytes * executable->launches.size();
    used_bytes += executable->num_bytes;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    if (!simt::is_stream_of(stream, executable->device)) return cudaErrorInvalidDevice;
    for (const simt::CapturedLaunch& one : executable->launches) {
        if (one.name)
            simt::launch(one.name, one.grid, one.block, one.shared_bytes, one.overlaps, stream,
                         one.body);
        else
            one.body();  // a call of the host's (host_call.h)
    }
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    used_bytes -= executable->num_bytes;
    return destroyed(executable);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    if (fails("cudaMemGetInfo")) return cudaErrorIllegalState;
    *total = kTotalBytes;
    *free = kTotalBytes - used_bytes;
    return cudaSuccess;
}
