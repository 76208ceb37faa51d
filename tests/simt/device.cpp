#include "device.h"

#include <chrono>

namespace {

thread_local int current = 0;
simt::Stream streams[simt::kNumDevices] = {{0}, {1}};

}  // namespace

cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= simt::kNumDevices) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t status) {
    switch (status) {
        case cudaSuccess:
            return "no error";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorIllegalState:
            return "the operation cannot be performed in the present state";
        case cudaErrorStreamCaptureInvalidated:
            return "operation failed due to a previous error during capture";
    }
    return "unknown error";
}

namespace simt {

void* stream_of(int device) {
    return &streams[device];
}

uint64_t global_timer() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    const auto count = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
    return static_cast<uint64_t>(count);
}

bool is_stream_of(void* stream, int device) {
    return !stream || static_cast<Stream*>(stream)->device == device;
}

}  // namespace simt
