#include "silu_mul/silu_mul.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_silu_mul(py::module_& m) {
    m.def("silu_mul", [](py::handle gate_up, py::handle out) {
        submit_released(silu_mul(device_view_of(gate_up, "gate_up"), device_view_of(out, "out")));
    });
}

}  // namespace specrt::bindings
