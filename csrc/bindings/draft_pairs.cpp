#include "draft_pairs/draft_pairs.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_draft_pairs(py::module_& m) {
    m.def("draft_pairs", [](py::handle taps, py::handle path, py::handle num_path,
                            py::handle history, py::handle history_len, py::handle features,
                            py::handle tokens, py::handle source, py::handle kv_len,
                            py::handle kv_len_after, py::handle num_earlier, py::handle bits,
                            bool are_kept) {
        submit_released(draft_pairs(
            {device_view_of(taps, "taps"), device_view_of(path, "path"),
             device_view_of(num_path, "num_path"), device_view_of(history, "history"),
             device_view_of(history_len, "history_len"), device_view_of(features, "features"),
             device_view_of(tokens, "tokens"), device_view_of(source, "source"),
             device_view_of(kv_len, "kv_len"), device_view_of(kv_len_after, "kv_len_after"),
             device_view_of(num_earlier, "num_earlier"), device_view_of(bits, "bits"), are_kept}));
    });
}

}  // namespace specrt::bindings
