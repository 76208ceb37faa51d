#include "device.h"

namespace {

thread_local int current = 0;
char streams[simt::kNumDevices];  // only their addresses count

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
    return status == cudaSuccess ? "no error" : "invalid device ordinal";
}

namespace simt {

void* stream_of(int device) {
    return &streams[device];
}

bool is_stream_of(void* stream, int device) {
    return !stream || stream == &streams[device];
}

}  // namespace simt
