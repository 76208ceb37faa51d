#include "draft_control/draft_control.h"

#include "bindings/tensor.h"

namespace specrt::bindings {
namespace {

DraftControlArgs decide_args(const py::args& t) {
    SPECRT_CHECK(t.size() == 18, "draft_control: expected 18 arguments, got ", t.size());
    return {device_view_of(t[2], "settings"),
            device_view_of(t[3], "costs"),
            device_view_of(t[4], "posterior"),
            device_view_of(t[5], "slots"),
            device_view_of(t[6], "seed"),
            device_view_of(t[7], "position"),
            device_view_of(t[8], "limit"),
            device_view_of(t[9], "is_sampled"),
            device_view_of(t[10], "slope", true),
            device_view_of(t[11], "score", true),
            device_view_of(t[12], "evidence", true),
            device_view_of(t[13], "is_open"),
            device_view_of(t[14], "drafted"),
            device_view_of(t[15], "length"),
            device_view_of(t[16], "confidence"),
            device_view_of(t[17], "num_nodes", true),
            t[0].cast<int64_t>(),
            t[1].cast<int64_t>()};
}

DraftControlUpdateArgs update_args(const py::args& t) {
    SPECRT_CHECK(t.size() == 10, "draft_control_update: expected 10 arguments, got ", t.size());
    return {device_view_of(t[1], "settings"),   device_view_of(t[2], "costs"),
            device_view_of(t[3], "slots"),      device_view_of(t[4], "limit"),
            device_view_of(t[5], "drafted"),    device_view_of(t[6], "length"),
            device_view_of(t[7], "confidence"), device_view_of(t[8], "accept_length"),
            device_view_of(t[9], "posterior"),  t[0].cast<int64_t>()};
}

}  // namespace

void register_draft_control(py::module_& m) {
    m.def("draft_control",
          [](const py::args& t) { submit_released(draft_control(decide_args(t))); });
    m.def("draft_control_update",
          [](const py::args& t) { submit_released(draft_control_update(update_args(t))); });
    m.def("draft_control_prior", [](py::handle settings, py::handle posterior) {
        draft_control_prior(view_of(settings, "settings"), view_of(posterior, "posterior"));
    });
    m.def("normal_draws", [](py::handle seed, py::handle position, uint32_t index, double mean,
                             double variance, py::handle out) {
        normal_draws(view_of(seed, "seed"), view_of(position, "position"), index, mean, variance,
                     view_of(out, "out"));
    });
    m.def("beta_draws", [](py::handle seed, py::handle position, uint32_t index, double alpha,
                           double beta, py::handle out) {
        beta_draws(view_of(seed, "seed"), view_of(position, "position"), index, alpha, beta,
                   view_of(out, "out"));
    });
}

}  // namespace specrt::bindings
