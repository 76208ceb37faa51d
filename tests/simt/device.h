// The GPUs there are, and which of them a thread of the host talks to: CUDA's calls for it. Streams
// are names; what is launched runs at once.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorString(cudaError_t status);

namespace simt {

constexpr int kNumDevices = 2;

void* stream_of(int device);                  // the one that torch works on there
bool is_stream_of(void* stream, int device);  // nullptr is the current device's, whichever it is

}  // namespace simt
