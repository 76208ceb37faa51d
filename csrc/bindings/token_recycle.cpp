#include "token_recycle/token_recycle.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_token_recycle(py::module_& m) {
    m.def("recycle_propose", [](py::handle tables, py::handle slots, py::handle roots,
                                py::handle parents, py::handle ranks, py::handle draft_tokens) {
        submit_released(recycle_propose(
            {device_view_of(tables, "tables"), device_view_of(slots, "slots"),
             device_view_of(roots, "roots"), device_view_of(parents, "parents"),
             device_view_of(ranks, "ranks"), device_view_of(draft_tokens, "draft_tokens")}));
    });
    m.def("recycle_learn", [](py::handle logits, py::handle draft_tokens, py::handle num_nodes,
                              py::handle path, py::handle accept_length, py::handle slots,
                              py::handle tables, py::handle is_own, py::handle workspace) {
        submit_released(recycle_learn(
            {device_view_of(logits, "logits"), device_view_of(draft_tokens, "draft_tokens"),
             device_view_of(num_nodes, "num_nodes"), device_view_of(path, "path"),
             device_view_of(accept_length, "accept_length"), device_view_of(slots, "slots"),
             device_view_of(tables, "tables"), device_view_of(is_own, "is_own"),
             device_view_of(workspace, "workspace", true)}));
    });
    m.def("recycle_learn_workspace", &recycle_learn_workspace);
}

}  // namespace specrt::bindings
