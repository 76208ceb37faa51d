#include "tree_settle/tree_settle.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_tree_settle(py::module_& m) {
    m.def("tree_settle", [](py::handle draft_tokens, py::handle parents, py::handle num_nodes,
                            py::handle roots, py::handle max_nodes, int64_t vocab_size,
                            py::handle settled_tokens, py::handle settled_parents, py::handle depth,
                            py::handle ancestors, py::handle num_settled) {
        submit_released(
            tree_settle({device_view_of(draft_tokens, "draft_tokens"),
                         device_view_of(parents, "parents"), device_view_of(num_nodes, "num_nodes"),
                         device_view_of(roots, "roots"), device_view_of(max_nodes, "max_nodes"),
                         device_view_of(settled_tokens, "settled_tokens"),
                         device_view_of(settled_parents, "settled_parents"),
                         device_view_of(depth, "depth"), device_view_of(ancestors, "ancestors"),
                         device_view_of(num_settled, "num_settled"), vocab_size}));
    });
}

}  // namespace specrt::bindings
