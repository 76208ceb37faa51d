// The kernels of tile registers over a model of these, called with given pieces.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings/tensor.h"
#include "core/matmul.h"

namespace specrt {
namespace tile_model_amx {
void matmul_tiles_split(const void*, int, int);
void matmul_tiles_part(const void*, int, int);
}  // namespace tile_model_amx

namespace bindings {
namespace {

// out = x W^T + bias + residual, in `num_pieces` pieces; arguments as of linear, which are trusted.
void tile_product(py::handle x, py::handle values, py::handle bias, py::handle residual,
                  py::handle out, py::handle workspace, const std::vector<int64_t>& layout,
                  int num_pieces) {
    const TensorView rows = device_view_of(x, "x"), y = device_view_of(out, "out");
    const TensorView added = device_view_of(residual, "residual", true);
    const MatrixView w = matrix_view(device_view_of(values, "weight"), {}, layout);
    const MatmulParams p = {rows.as<float>(),
                            w.values.data,
                            device_view_of(bias, "bias", true).as<float>(),
                            added.as<float>(),
                            y.as<float>(),
                            rows.stride[0],
                            added.stride[0],
                            y.stride[0],
                            rows.shape[0],
                            w.num_outputs,
                            w.depth,
                            w.values.dtype,
                            nullptr,
                            {},
                            w.format,
                            device_view_of(workspace, "workspace").data};
    for (const PartFn fn : {tile_model_amx::matmul_tiles_split, tile_model_amx::matmul_tiles_part})
        for (int i = 0; i < num_pieces; ++i) fn(&p, i, num_pieces);
}

}  // namespace

void register_tile_product(py::module_& m) {
    m.def("tile_product", &tile_product, py::arg("x"), py::arg("values"), py::arg("bias"),
          py::arg("residual"), py::arg("out"), py::arg("workspace"), py::arg("layout"),
          py::arg("num_pieces") = 1);
}

}  // namespace bindings
}  // namespace specrt
