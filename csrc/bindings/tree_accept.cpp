#include "tree_accept/tree_accept.h"

#include "bindings/tensor.h"
#include "core/mass.h"

namespace specrt::bindings {
namespace {

Purpose purpose_of(uint32_t purpose) {
    SPECRT_CHECK(purpose <= 4, "purpose: expected 0..4, got ", purpose);
    return static_cast<Purpose>(purpose);
}

TreeAcceptArgs args_of(const py::args& t) {
    SPECRT_CHECK(t.size() == 18, "tree_accept: expected 18 arguments, got ", t.size());
    return {device_view_of(t[0], "draft_tokens"),
            device_view_of(t[1], "parents"),
            device_view_of(t[2], "num_nodes"),
            device_view_of(t[3], "draft_probs", true),
            device_view_of(t[4], "logits"),
            device_view_of(t[5], "sampling"),
            device_view_of(t[6], "bias_ids", true),
            device_view_of(t[7], "bias_values", true),
            device_view_of(t[8], "history"),
            device_view_of(t[9], "history_len"),
            device_view_of(t[11], "path"),
            device_view_of(t[12], "accept_length"),
            device_view_of(t[13], "tokens"),
            device_view_of(t[14], "logprobs", true),
            device_view_of(t[10], "workspace", true),
            device_view_of(t[15], "maxima", true),
            device_view_of(t[16], "logit_rows", true),
            device_view_of(t[17], "next_node", true)};
}

// noise: [n] float32, filled for indices 0..n-1.
void bind_gumbel(uint64_t seed, uint64_t position, uint32_t purpose, py::handle out) {
    const TensorView view = view_of(out, "out");
    expect(view, DType::kFloat32, "[V]", -1);
    const Purpose what = purpose_of(purpose);
    for (int64_t i = 0; i < view.shape[0]; ++i)
        view.as<float>()[i] = gumbel_from(philox(seed, position, what, static_cast<uint32_t>(i)));
}

// x: [n] float32, exps: [n] float32, masses: [n] int64.
void bind_exponentials(py::handle x, py::handle exps, py::handle masses) {
    submit_released(
        exponentials(view_of(x, "x"), view_of(exps, "exps"), view_of(masses, "masses")));
}

// The same by core/philox.h and core/mass.h, one by one.
void bind_scalar_exponentials(py::handle x, py::handle exps, py::handle masses) {
    const TensorView from = view_of(x, "x"), to = view_of(exps, "exps");
    const TensorView mass = view_of(masses, "masses");
    expect(from, DType::kFloat32, "[n]", -1);
    expect(to, DType::kFloat32, "[n]", from.shape[0]);
    expect(mass, DType::kInt64, "[n]", from.shape[0]);
    for (int64_t i = 0; i < from.shape[0]; ++i) {
        to.as<float>()[i] = exp_of(from.as<float>()[i]);
        mass.as<uint64_t>()[i] = mass_of(from.as<float>()[i]);
    }
}

py::tuple bind_philox4x32(py::tuple counter, py::tuple key) {
    PhiloxWords c;
    for (int i = 0; i < 4; ++i) c.word[i] = counter[i].cast<uint32_t>();
    const PhiloxWords out = philox4x32(c, key[0].cast<uint32_t>(), key[1].cast<uint32_t>());
    return py::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
}

}  // namespace

void register_tree_accept(py::module_& m) {
    m.def("tree_accept", [](const py::args& t) {
        const std::vector<Launch> launches = tree_accept(args_of(t));
        if (launches.size() == 1) return submit_released(launches[0]);
        submit_released(launches.data(), launches.size());
    });
    m.def("processed_logits", [](py::handle out, const py::args& t) {
        submit_released(processed_logits(args_of(t), view_of(out, "out")));
    });
    m.def("tree_accept_workspace", &tree_accept_workspace);
    m.def("tree_accept_parts", &tree_accept_parts);
    m.def("tree_accept_gpu_workspace", &tree_accept_gpu_workspace);
    m.def("gumbel_noise", &bind_gumbel);
    m.def("philox", [](uint64_t seed, uint64_t position, uint32_t purpose, uint32_t index) {
        return philox(seed, position, purpose_of(purpose), index);
    });
    m.def("philox4x32", &bind_philox4x32);
    m.def("uniform_from", &uniform_from);
    m.def("gumbel_from", &gumbel_from);
    m.def("exp_of", &exp_of);
    m.def("mass_of", &mass_of);
    m.def("log_of_mass", &log_of_mass);
    m.def("nucleus_mass", &nucleus_mass);
    m.def("light_mass", &light_mass);
    m.def("exponentials", &bind_exponentials);
    m.def("scalar_exponentials", &bind_scalar_exponentials);
}

}  // namespace specrt::bindings
