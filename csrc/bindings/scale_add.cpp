#include "scale_add/scale_add.h"

#include <pybind11/stl.h>

#include <optional>

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_scale_add(py::module_& m) {
    m.def("scale_add", [](py::handle x, float factor, py::handle residual, std::optional<float> cap,
                          py::handle out) {
        SPECRT_CHECK(!cap || *cap > 0.0f, "cap: expected a positive number, got ", *cap);
        submit_released(scale_add(device_view_of(x, "x"), factor,
                                  device_view_of(residual, "residual", true), cap.value_or(0.0f),
                                  device_view_of(out, "out")));
    });
}

}  // namespace specrt::bindings
