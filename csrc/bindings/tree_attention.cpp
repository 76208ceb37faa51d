#include "tree_attention/tree_attention.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_tree_attention(py::module_& m) {
    m.def("tree_attention_workspace",
          [](int device, int num_seqs, int num_kv_heads, int group, int num_nodes, int head_dim,
             int64_t max_len, int num_warps, int blocks_per_sm, int64_t sliding_window) {
              const PlanChoice plan{num_warps, blocks_per_sm};
              expect_plan(plan);
              return tree_attention_workspace(device,
                                              {num_seqs, num_kv_heads, group, num_nodes, head_dim,
                                               max_len, clamped_window(sliding_window)},
                                              plan);
          });
    m.def("tree_attention",
          [](py::handle q, py::handle k_cache, py::handle v_cache, py::handle block_table,
             py::handle kv_len, py::handle first_node, py::handle num_nodes, py::handle ancestors,
             float scale, py::handle out, py::handle workspace, py::handle k, py::handle v,
             py::handle depth, py::handle cos_sin, int num_warps, int blocks_per_sm, int64_t window,
             int64_t num_sinks, py::handle is_open, int64_t sliding_window, float cap) {
              submit_released(tree_attention({device_view_of(q, "q"),
                                              device_view_of(k_cache, "k_cache"),
                                              device_view_of(v_cache, "v_cache"),
                                              device_view_of(block_table, "block_table"),
                                              device_view_of(kv_len, "kv_len"),
                                              device_view_of(first_node, "first_node"),
                                              device_view_of(num_nodes, "num_nodes"),
                                              device_view_of(ancestors, "ancestors"),
                                              device_view_of(out, "out"),
                                              device_view_of(workspace, "workspace", true),
                                              device_view_of(k, "k", true),
                                              device_view_of(v, "v", true),
                                              device_view_of(depth, "depth", true),
                                              device_view_of(cos_sin, "cos_sin", true),
                                              scale,
                                              {num_warps, blocks_per_sm},
                                              window,
                                              num_sinks,
                                              device_view_of(is_open, "is_open", true),
                                              sliding_window,
                                              cap}));
          });
}

}  // namespace specrt::bindings
