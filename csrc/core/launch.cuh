// How a kernel is started, and what its source may use: CUDA under nvcc, and under a C++ compiler
// (SPECRT_SIMT) the shim in tests/simt, which runs the same source on the CPU.
//
// Kernel sources include this and core/ptx.cuh, never a CUDA header. They keep to: no <<<>>>, no
// PTX outside core/ptx.cuh, warp intrinsics with explicit masks, SPECRT_SHARED for static shared
// memory, dynamic_shared() for dynamic, no printf, no cub or thrust.
#pragma once

#if defined(SPECRT_SIMT)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/dispatch.h"
#include "core/tensor_view.h"

// SPECRT_SHARED(float[32], scratch): a static shared array (or struct) named `scratch`.
#if defined(SPECRT_SIMT)
#define SPECRT_SHARED(Type, name) \
    ::specrt::detail::identity_t<Type>& name = simt::shared_memory<Type>([] {})
#else
#define SPECRT_SHARED(Type, name) __shared__::specrt::detail::identity_t<Type> name
#endif

namespace specrt {

namespace detail {
template <typename T>
struct Identity {
    using type = T;
};
template <typename T>
using identity_t = typename Identity<T>::type;
}  // namespace detail

#if defined(SPECRT_SIMT)
using bf16_t = simt::bfloat16;
using f16_t = simt::half;
#else
using bf16_t = __nv_bfloat16;
using f16_t = __half;
#endif

// Launches that overlap (programmatic dependent launch). Blocks of one that does are started when
// every block of the launch before it in the stream has called ptx::let_next_start() or ended, so
// that launch may still run, and so may those before it, each of which was started early. Hence
//
// - every thread of the kernel calls ptx::wait_for_previous(), before it ends and before it touches
//   memory other than constants: before it reads what a launch writes, and before any write, as the
//   launches before may still read, and draw the same tickets;
// - that wait is for the launch before alone, until it has ended and its writes are seen. It ended
//   after its own threads had waited, so the wait covers all launches before. A grid in which nobody
//   waited might end while an older one still runs: that is why every thread does.
//
// The launch before may be others' (torch, cuBLAS): what never lets the next one start does so by
// ending, and the wait is until its writes are seen. What comes after ours without the attribute
// begins when ours has ended. Copies, fills and events are waited for before a launch starts.
//
// A constant is what nothing in the stream has written since something that all launches after it
// were ordered behind: a copy, an event, the beginning of a graph, the host's waiting.
constexpr bool kOverlaps = true;

struct LaunchShape {
    dim3 grid, block;
    size_t shared_bytes = 0;  // dynamic shared memory
    bool overlaps = false;    // kOverlaps: with the launch before it
};

// The launch's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(SPECRT_SIMT)
    return simt::dynamic_shared();
#else
    extern __shared__ __align__(16) unsigned char specrt_dynamic_shared[];
    return specrt_dynamic_shared;
#endif
}

struct DeviceLimits {
    int num_sms;
    size_t shared_bytes;  // a block's, at most
    int arch;             // 90: compute capability 9.0
};

// No kernel has more static shared memory; what the system takes of an SM's for each block is as
// much again.
constexpr size_t kStaticShared = 1024;

inline void cuda_check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::string text = std::string(what) + ": " + cudaGetErrorString(status);
#if defined(SPECRT_CUDA_ARCHS)
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
        text += " (built for sm " SPECRT_CUDA_ARCHS ")";
#endif
    throw std::runtime_error(text);
}

inline int current_device() {
    int device = 0;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

#if defined(SPECRT_SIMT)

inline DeviceLimits device_limits(int) {
    return {simt::num_sms(), simt::max_shared_bytes(), /*arch=*/0};
}

template <auto kKernel>
void allow_shared(size_t, const char*) {}  // the shim's launch looks at the size

template <auto kKernel>
LaunchShape possible_shape(const LaunchShape& shape, const char*) {
    return shape;
}

template <typename... Params, typename... Args>
void launch_kernel(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                   CudaStream stream, const Args&... args) {
    // By value: a launch that is captured runs later.
    simt::launch(name, shape.grid, shape.block, shape.shared_bytes, shape.overlaps, stream,
                 [kernel, values = std::make_tuple(static_cast<Params>(args)...)] {
                     std::apply(kernel, values);
                 });
}

#else

inline int device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

// Asks the driver, and makes no context.
inline DeviceLimits device_limits(int device) {
    return {device_attribute(cudaDevAttrMultiProcessorCount, device),
            static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
            10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                device_attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

// The GPUs on which something has been done, for any number of threads.
class DeviceSet {
  public:
    bool has(int device) const {
        return device < 64 && devices_.load(std::memory_order_acquire) >> device & 1;
    }
    void add(int device) {  // one past the 64th stays out, and what was to be done is done again
        if (device < 64) devices_.fetch_or(uint64_t{1} << device, std::memory_order_release);
    }

  private:
    std::atomic<uint64_t> devices_{0};
};

// Above 48 KiB a kernel must be allowed its shared memory first, once on each GPU. All there is,
// whatever this launch needs: another may need more, or be under way in another thread.
template <auto kKernel>
void allow_shared(size_t bytes, const char* name) {
    if (bytes + kStaticShared <= 48 * 1024) return;
    const int device = current_device();
    const size_t most = device_limits(device).shared_bytes - kStaticShared;
    if (bytes > most)
        throw std::runtime_error(std::string(name) + ": needs " + std::to_string(bytes) +
                                 " bytes of shared memory, and this GPU gives a block " +
                                 std::to_string(most));
    static DeviceSet allowed;
    if (allowed.has(device)) return;
    cuda_check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(most)),
               name);
    // Left to itself the driver may give the L1 cache what a second block on the SM would need.
    cuda_check(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               name);
    allowed.add(device);
}

// Whether the kernel's code for the current GPU waits for the launch before: that made for compute
// capability 9.0 or later. Code for 8.0 does not, and a newer GPU may run it, translated; so the
// code is asked, once on each GPU.
template <auto kKernel>
bool can_overlap(const char* name) {
    static DeviceSet able, unable;
    const int device = current_device();
    if (able.has(device)) return true;
    if (unable.has(device)) return false;
    cudaFuncAttributes attributes{};
    cuda_check(cudaFuncGetAttributes(&attributes, kKernel), name);
    const bool is_able = attributes.ptxVersion >= 90;
    (is_able ? able : unable).add(device);
    return is_able;
}

template <auto kKernel>
LaunchShape possible_shape(const LaunchShape& shape, const char* name) {
    LaunchShape possible = shape;
    possible.overlaps = shape.overlaps && can_overlap<kKernel>(name);
    return possible;
}

template <typename... Params, typename... Args>
void launch_kernel(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                   CudaStream stream, const Args&... args) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.attrs = &overlap;
    config.numAttrs = shape.overlaps ? 1 : 0;
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

#endif

inline unsigned ceil_div(int64_t a, int64_t b) {
    return static_cast<unsigned>((a + b - 1) / b);
}

}  // namespace specrt

// SPECRT_LAUNCH(kernel<T>, shape, stream, params): asynchronous; throws if it cannot be started.
#define SPECRT_LAUNCH(kernel, shape, stream, ...)                                               \
    (::specrt::allow_shared<kernel>((shape).shared_bytes, #kernel),                             \
     ::specrt::launch_kernel(#kernel, kernel, ::specrt::possible_shape<kernel>(shape, #kernel), \
                             stream, __VA_ARGS__))
