// Python tensors by duck type: anything with data_ptr(), shape, stride(), dtype and is_cpu.
#pragma once
#include <pybind11/pybind11.h>

#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt::bindings {

namespace py = pybind11;

// A CPU tensor, or (None) an empty view when `is_optional`. `name` must outlive the view.
TensorView view_of(py::handle tensor, const char* name, bool is_optional = false);

// The thread count torch has now: module.cpp is handed torch.get_num_threads once.
int num_threads();
void set_thread_source(py::object get_num_threads);

// Lets other Python threads run while the kernels do.
inline void submit_released(const Launch* launches, size_t count) {
    const int threads = num_threads();
    py::gil_scoped_release release;
    submit(launches, count, threads);
}
inline void submit_released(const Launch& launch) {
    submit_released(&launch, 1);
}

}  // namespace specrt::bindings
