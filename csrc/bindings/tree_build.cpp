#include "tree_build/tree_build.h"

#include "bindings/tensor.h"

namespace specrt::bindings {
namespace {

TreeExpandArgs expand_args(const py::args& t) {
    SPECRT_CHECK(t.size() == 22, "tree_expand: expected 22 arguments, got ", t.size());
    TreeExpandArgs a{};
    a.logits = device_view_of(t[0], "logits");
    a.scores = device_view_of(t[1], "scores");
    a.candidates = device_view_of(t[2], "candidates");
    a.ancestors = device_view_of(t[3], "ancestors");
    a.token_map = device_view_of(t[4], "token_map", true);
    a.sampling = device_view_of(t[5], "sampling", true);
    a.position = device_view_of(t[6], "position", true);
    a.noise_scale_temperature = t[7].cast<float>();
    a.level = t[8].cast<int64_t>();
    a.workspace = device_view_of(t[9], "workspace");
    a.pool_tokens = device_view_of(t[10], "pool_tokens");
    a.pool_parents = device_view_of(t[11], "pool_parents");
    a.pool_scores = device_view_of(t[12], "pool_scores");
    a.frontier_tokens = device_view_of(t[13], "frontier_tokens");
    a.frontier_scores = device_view_of(t[14], "frontier_scores");
    a.frontier_candidates = device_view_of(t[15], "frontier_candidates");
    a.frontier_source = device_view_of(t[16], "frontier_source");
    a.frontier_ancestors = device_view_of(t[17], "frontier_ancestors");
    a.is_open = device_view_of(t[18], "is_open", true);
    a.level_score = device_view_of(t[19], "level_score", true);
    a.keys = device_view_of(t[20], "keys", true);
    a.masses = device_view_of(t[21], "masses", true);
    return a;
}

TreeRerankArgs rerank_args(const py::args& t) {
    SPECRT_CHECK(t.size() == 9, "tree_rerank: expected 9 arguments, got ", t.size());
    return {device_view_of(t[0], "pool_tokens"),
            device_view_of(t[1], "pool_parents"),
            device_view_of(t[2], "pool_scores"),
            device_view_of(t[4], "roots"),
            device_view_of(t[5], "draft_tokens"),
            device_view_of(t[6], "parents"),
            device_view_of(t[7], "num_nodes"),
            device_view_of(t[8], "node_scores"),
            t[3].cast<int64_t>()};
}

}  // namespace

void register_tree_build(py::module_& m) {
    m.def("tree_expand", [](const py::args& t) {
        const TreeExpand launches = tree_expand(expand_args(t));
        submit_released(launches.children);
        if (launches.frontier.fn) submit_released(launches.frontier);
    });
    m.def("tree_rerank", [](const py::args& t) { submit_released(tree_rerank(rerank_args(t))); });
    m.def("tree_expand_workspace", &tree_expand_workspace);
    m.def("tree_expand_gpu_workspace", &tree_expand_gpu_workspace);
}

}  // namespace specrt::bindings
