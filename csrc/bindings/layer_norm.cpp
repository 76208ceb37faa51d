#include "layer_norm/layer_norm.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_layer_norm(py::module_& m) {
    m.def("layer_norm", [](py::handle x, py::handle weight, py::handle bias, float eps,
                           py::handle residual, py::handle out) {
        submit_released(layer_norm({device_view_of(x, "x"), device_view_of(weight, "weight"),
                                    device_view_of(bias, "bias", true),
                                    device_view_of(residual, "residual", true),
                                    device_view_of(out, "out"), eps}));
    });
}

}  // namespace specrt::bindings
