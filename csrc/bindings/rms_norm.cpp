#include "rms_norm/rms_norm.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_rms_norm(py::module_& m) {
    m.def("rms_norm",
          [](py::handle x, py::handle weight, float eps, py::handle residual, py::handle out) {
              submit_released(rms_norm(device_view_of(x, "x"), device_view_of(weight, "weight"),
                                       device_view_of(residual, "residual", true),
                                       device_view_of(out, "out"), eps));
          });
}

}  // namespace specrt::bindings
