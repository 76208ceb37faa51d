// CUDA's calls for graphs: lists of launches, with their parameters by value.
#pragma once
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "device.h"

namespace simt {

struct CapturedLaunch {
    const char* name;
    dim3 grid, block;
    size_t shared_bytes;
    bool overlaps;
    std::function<void()> body;
};

struct Graph {
    std::vector<CapturedLaunch> launches;
    bool is_valid = true;
};

struct Executable {
    int device;
    std::vector<CapturedLaunch> launches;
    size_t num_bytes = 0;  // once it is uploaded
};

// Whether the stream is being captured, and the launch is part of that. Throws if the capture has
// been ended by an error.
bool is_captured(void* stream, const CapturedLaunch& launch);

void fail_next(const std::string& call);  // as for want of memory; of CUDA's calls below
// Waits, as a call that torch makes now and then; no capture of the thread's survives it.
void synchronize();
int num_graph_objects();  // graphs, executables and streams that have not been destroyed

}  // namespace simt

using cudaStream_t = simt::Stream*;
using cudaGraph_t = simt::Graph*;
using cudaGraphExec_t = simt::Executable*;
using cudaGraphNode_t = const simt::CapturedLaunch*;
enum cudaGraphNodeType { cudaGraphNodeTypeKernel };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
constexpr unsigned cudaStreamNonBlocking = 1;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num_nodes);
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long flags);
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
