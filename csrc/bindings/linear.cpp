#include "linear/linear.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_linear(py::module_& m) {
    m.def("linear", [](py::handle x, py::handle weight, py::handle bias, py::handle residual,
                       py::handle out) {
        submit_released(linear(view_of(x, "x"), view_of(weight, "weight"),
                               view_of(bias, "bias", true), view_of(residual, "residual", true),
                               view_of(out, "out")));
    });
}

}  // namespace specrt::bindings
