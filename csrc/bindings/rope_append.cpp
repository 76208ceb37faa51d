#include "rope_append/rope_append.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_rope_append(py::module_& m) {
    m.def("rope_append",
          [](py::handle q, py::handle k, py::handle v, py::handle depth, py::handle kv_len,
             py::handle first_node, py::handle num_nodes, py::handle block_table,
             py::handle cos_sin, py::handle k_cache, py::handle v_cache) {
              submit_released(rope_append(
                  {device_view_of(q, "q"), device_view_of(k, "k"), device_view_of(v, "v"),
                   device_view_of(depth, "depth"), device_view_of(kv_len, "kv_len"),
                   device_view_of(first_node, "first_node"), device_view_of(num_nodes, "num_nodes"),
                   device_view_of(block_table, "block_table"), device_view_of(cos_sin, "cos_sin"),
                   device_view_of(k_cache, "k_cache"), device_view_of(v_cache, "v_cache")}));
          });
}

}  // namespace specrt::bindings
