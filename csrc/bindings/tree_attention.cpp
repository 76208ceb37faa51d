#include "tree_attention/tree_attention.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_tree_attention(py::module_& m) {
    m.def("tree_attention",
          [](py::handle q, py::handle k_cache, py::handle v_cache, py::handle block_table,
             py::handle kv_len, py::handle first_node, py::handle num_nodes, py::handle ancestors,
             float scale, py::handle out) {
              submit_released(tree_attention(
                  {view_of(q, "q"), view_of(k_cache, "k_cache"), view_of(v_cache, "v_cache"),
                   view_of(block_table, "block_table"), view_of(kv_len, "kv_len"),
                   view_of(first_node, "first_node"), view_of(num_nodes, "num_nodes"),
                   view_of(ancestors, "ancestors"), view_of(out, "out"), scale}));
          });
}

}  // namespace specrt::bindings
