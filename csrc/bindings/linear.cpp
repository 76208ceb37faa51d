#include "linear/linear.h"

#include <pybind11/stl.h>

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_linear(py::module_& m) {
    m.def("linear_workspace", &linear_workspace);
    m.def("matmul_workspace", &matmul_workspace);
    m.def("linear",
          [](py::handle x, py::handle weight, py::handle bias, py::handle residual, py::handle out,
             py::handle workspace, bool is_gated, int tile_rows, int num_stages, py::handle maxima,
             py::handle sampling, py::handle history_len, py::handle depth, py::handle masses,
             py::handle token_map, int64_t level, py::handle is_open, py::handle scale,
             py::handle x_rows, py::handle second, py::handle second_rows, py::handle residual_rows,
             py::handle gate, py::handle gate_rows, const std::vector<int64_t>& layout) {
              const auto launches = linear({device_view_of(x, "x"),
                                            device_view_of(weight, "weight"),
                                            device_view_of(bias, "bias", true),
                                            device_view_of(residual, "residual", true),
                                            device_view_of(out, "out"),
                                            device_view_of(workspace, "workspace", true),
                                            is_gated,
                                            {tile_rows, num_stages},
                                            device_view_of(maxima, "keys", true),
                                            device_view_of(sampling, "sampling", true),
                                            device_view_of(history_len, "history_len", true),
                                            device_view_of(depth, "depth", true),
                                            device_view_of(masses, "masses", true),
                                            device_view_of(token_map, "token_map", true),
                                            level,
                                            device_view_of(is_open, "is_open", true),
                                            device_view_of(scale, "scale", true),
                                            device_view_of(x_rows, "x_rows", true),
                                            device_view_of(second, "second", true),
                                            device_view_of(second_rows, "second_rows", true),
                                            device_view_of(residual_rows, "residual_rows", true),
                                            device_view_of(gate, "gate", true),
                                            device_view_of(gate_rows, "gate_rows", true),
                                            layout});
              submit_released(launches);
          });
}

}  // namespace specrt::bindings
