#include "matrix_pack/matrix_pack.h"

#include <pybind11/stl.h>

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_matrix_pack(py::module_& m) {
    m.def("matrix_pack", [](py::handle source, py::handle values, py::handle is_bad,
                            const std::vector<int64_t>& layout, int64_t first_row) {
        submit_released(matrix_pack({view_of(source, "source"), view_of(values, "matrix"),
                                     view_of(is_bad, "is_bad"), layout, first_row}));
    });
    m.def("matrix_strip_bytes", [](int64_t format, int64_t depth) {
        return strip_bytes(static_cast<MatrixFormat>(format), depth);
    });
}

}  // namespace specrt::bindings
