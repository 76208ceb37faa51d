#include "feature_sample/feature_sample.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_feature_sample(py::module_& m) {
    m.def("feature_sample", [](const py::args& t) {
        SPECRT_CHECK(t.size() == 15, "feature_sample: expected 15 arguments, got ", t.size());
        const auto launches = feature_sample(
            {view_of(t[0], "tokens"), view_of(t[1], "source", true), view_of(t[2], "features"),
             view_of(t[3], "embed", true), view_of(t[4], "fc"), view_of(t[5], "fc_bias", true),
             view_of(t[6], "norm", true), view_of(t[7], "gate", true), view_of(t[8], "up", true),
             view_of(t[9], "down", true), view_of(t[10], "token_fc", true),
             view_of(t[11], "token_gate", true), view_of(t[13], "workspace"), view_of(t[14], "out"),
             t[12].cast<float>()});
        submit_released(launches.data(), launches.size());
    });
    m.def("feature_sample_workspace", &feature_sample_workspace);
}

}  // namespace specrt::bindings
