#include "embed/embed.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_embed(py::module_& m) {
    m.def("embed", [](py::handle tokens, py::handle table, py::handle out) {
        submit_released(embed(device_view_of(tokens, "tokens"), device_view_of(table, "table"),
                              device_view_of(out, "out")));
    });
}

}  // namespace specrt::bindings
