#include "feature_sample/feature_sample.h"

#include <pybind11/stl.h>

#include "bindings/tensor.h"

namespace specrt::bindings {
namespace {

using ViewOf = TensorView (*)(py::handle, const char*, bool);

std::vector<int64_t> sizes_of(const py::handle& t) {
    return t.cast<std::vector<int64_t>>();
}

FeatureSampleArgs args_of(const py::args& t, ViewOf view) {
    SPECRT_CHECK(t.size() == 26, "feature_sample: expected 26 arguments, got ", t.size());
    return {view(t[0], "tokens", false),
            view(t[1], "source", true),
            view(t[2], "features", false),
            view(t[3], "embed", true),
            view(t[4], "fc", false),
            view(t[5], "fc_bias", true),
            view(t[6], "norm", true),
            view(t[7], "gate", true),
            view(t[8], "up", true),
            view(t[9], "down", true),
            view(t[10], "token_fc", true),
            view(t[11], "token_gate", true),
            view(t[13], "workspace", false),
            view(t[14], "out", false),
            view(t[15], "is_open", true),
            view(t[16], "fc_scale", true),
            view(t[17], "gate_scale", true),
            view(t[18], "up_scale", true),
            view(t[19], "down_scale", true),
            t[12].cast<float>(),
            view(t[20], "linear_workspace", true),
            sizes_of(t[21]),
            sizes_of(t[22]),
            sizes_of(t[23]),
            sizes_of(t[24]),
            sizes_of(t[25])};
}

// Where h and gate begin in a row of the workspace, and its size.
py::tuple layout(int64_t hidden, int64_t intermediate) {
    const FeatureSampleLayout at{hidden, intermediate};
    return py::make_tuple(at.h(), at.gate(), at.size());
}

}  // namespace

void register_feature_sample(py::module_& m) {
    m.def("feature_sample",
          [](const py::args& t) { submit_released(feature_sample(args_of(t, &view_of))); });
    m.def("feature_check", [](const py::args& t) { feature_check(args_of(t, &device_view_of)); });
    m.def("feature_sample_layout", &layout);
}

}  // namespace specrt::bindings
