#include "tree_accept/tree_accept.h"

#include "bindings/tensor.h"

namespace specrt::bindings {
namespace {

Purpose purpose_of(uint32_t purpose) {
    SPECRT_CHECK(purpose <= 3, "purpose: expected 0..3, got ", purpose);
    return static_cast<Purpose>(purpose);
}

void bind_accept(py::handle draft_tokens, py::handle parents, py::handle num_nodes,
                 py::handle draft_probs, py::handle logits, py::handle sampling,
                 py::handle bias_ids, py::handle bias_values, py::handle history,
                 py::handle history_len, py::handle workspace, py::handle path,
                 py::handle accept_length, py::handle tokens, py::handle logprobs) {
    submit_released(tree_accept(
        {view_of(draft_tokens, "draft_tokens"), view_of(parents, "parents"),
         view_of(num_nodes, "num_nodes"), view_of(draft_probs, "draft_probs", true),
         view_of(logits, "logits"), view_of(sampling, "sampling"),
         view_of(bias_ids, "bias_ids", true), view_of(bias_values, "bias_values", true),
         view_of(history, "history"), view_of(history_len, "history_len"), view_of(path, "path"),
         view_of(accept_length, "accept_length"), view_of(tokens, "tokens"),
         view_of(logprobs, "logprobs", true), view_of(workspace, "workspace", true)}));
}

// noise: [n] float32, filled for indices 0..n-1.
void bind_gumbel(uint64_t seed, uint64_t position, uint32_t purpose, py::handle out) {
    const TensorView view = view_of(out, "out");
    expect(view, DType::kFloat32, "[V]", -1);
    const Purpose what = purpose_of(purpose);
    for (int64_t i = 0; i < view.shape[0]; ++i)
        view.as<float>()[i] = gumbel_from(philox(seed, position, what, static_cast<uint32_t>(i)));
}

py::tuple bind_philox4x32(py::tuple counter, py::tuple key) {
    PhiloxWords c;
    for (int i = 0; i < 4; ++i) c.word[i] = counter[i].cast<uint32_t>();
    const PhiloxWords out = philox4x32(c, key[0].cast<uint32_t>(), key[1].cast<uint32_t>());
    return py::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
}

}  // namespace

void register_tree_accept(py::module_& m) {
    m.def("tree_accept", &bind_accept);
    m.def("tree_accept_workspace", &tree_accept_workspace);
    m.def("gumbel_noise", &bind_gumbel);
    m.def("philox", [](uint64_t seed, uint64_t position, uint32_t purpose, uint32_t index) {
        return philox(seed, position, purpose_of(purpose), index);
    });
    m.def("philox4x32", &bind_philox4x32);
    m.def("uniform_from", &uniform_from);
    m.def("gumbel_from", &gumbel_from);
}

}  // namespace specrt::bindings
