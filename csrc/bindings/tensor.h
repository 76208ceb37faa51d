// Python tensors by duck type: anything with data_ptr(), shape, stride(), dtype and device.
#pragma once
#include <pybind11/pybind11.h>

#include "core/device.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt::bindings {

namespace py = pybind11;

// A tensor on the CPU or a CUDA GPU, or (None) an empty view when `is_optional`. `name` must
// outlive the view.
TensorView device_view_of(py::handle tensor, const char* name, bool is_optional = false);

// The same for kernels that have no CUDA source: a tensor on a GPU is refused.
inline TensorView view_of(py::handle tensor, const char* name, bool is_optional = false) {
    TensorView view = device_view_of(tensor, name, is_optional);
    SPECRT_CHECK(view.device == kCpu, name, ": expected a CPU tensor, got one on ",
                 name_of_device(view.device));
    return view;
}

// The thread count torch has now: module.cpp is handed torch.get_num_threads once.
int num_threads();
void set_thread_source(py::object get_num_threads);

// The stream torch works on: asked through DLPack where torch offers it, else of this function of
// the device's index.
CudaStream current_stream(int device);
void set_stream_source(py::object get_stream);

// Runs launches for the CPU, in order; other Python threads run meanwhile.
inline void submit_released(const Launch* launches, size_t count) {
    check_part_of_capture(kCpu);
    const int threads = num_threads();
    py::gil_scoped_release release;
    submit(launches, count, threads);
}

// Runs a launch for the CPU, or starts one for a GPU: on torch's stream, or on that which this
// thread captures.
inline void submit_released(const Launch& launch) {
    if (launch.device == kCpu) return submit_released(&launch, 1);
    check_part_of_capture(launch.device);
    const bool is_captured = capturing().device == launch.device;
    const CudaStream stream = is_captured ? capturing().stream : current_stream(launch.device);
    py::gil_scoped_release release;
    run_on_gpu(launch, stream);
}

// The launches of one op, all of one device.
inline void submit_released(const std::vector<Launch>& launches) {
    if (launches.empty()) return;
    if (launches.front().device == kCpu) return submit_released(launches.data(), launches.size());
    for (const Launch& launch : launches) submit_released(launch);
}

}  // namespace specrt::bindings
