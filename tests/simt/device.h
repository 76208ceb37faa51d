// The GPUs there are, and which of them a thread of the host talks to: CUDA's calls for it. What is
// launched on a stream runs at once, or is captured (graph.h).
#pragma once
#include <cstdint>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidDevice = 101,
    cudaErrorIllegalState = 401,
    cudaErrorStreamCaptureInvalidated = 901,
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorString(cudaError_t status);

namespace simt {

constexpr int kNumDevices = 2;

struct Graph;

struct Stream {
    int device;
    Graph* captured = nullptr;  // what is launched here becomes part of it
};

void* stream_of(int device);                  // the one that torch works on there
uint64_t global_timer();                      // nanoseconds
bool is_stream_of(void* stream, int device);  // nullptr is the current device's, whichever it is

}  // namespace simt
