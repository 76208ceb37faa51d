#include "embed/embed.h"

#include <pybind11/stl.h>

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_embed(py::module_& m) {
    m.def("embed", [](py::handle tokens, py::handle table, py::handle out, py::handle ids,
                      py::handle is_open, const std::vector<int64_t>& layout, float scale,
                      py::handle positions, py::handle depth, py::handle kv_len, int64_t offset) {
        const bool is_plain = positions.is_none();
        submit_released(embed({device_view_of(tokens, "tokens"), device_view_of(table, "table"),
                               device_view_of(out, "out"), device_view_of(ids, "ids", true),
                               device_view_of(is_open, "is_open", true), layout, scale,
                               device_view_of(positions, "positions", true),
                               device_view_of(depth, "depth", is_plain),
                               device_view_of(kv_len, "kv_len", is_plain), offset}));
    });
}

}  // namespace specrt::bindings
