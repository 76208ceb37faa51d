#include "activate/activate.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_activate(py::module_& m) {
    m.def(
        "activate", [](py::handle x, py::handle out, const std::string& activation, bool is_gated) {
            submit_released(
                activate(device_view_of(x, "x"), device_view_of(out, "out"), activation, is_gated));
        });
}

}  // namespace specrt::bindings
