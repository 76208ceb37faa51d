#include "history_append/history_append.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_history_append(py::module_& m) {
    m.def("history_append",
          [](py::handle num_nodes, py::handle depth, py::handle path, py::handle accept_length,
             py::handle tokens, py::handle logprobs, py::handle stop_ids, py::handle max_len,
             py::handle history, py::handle history_len, py::handle roots, py::handle num_path,
             py::handle report) {
              submit_released(history_append(
                  {device_view_of(num_nodes, "num_nodes"), device_view_of(depth, "depth"),
                   device_view_of(path, "path"), device_view_of(accept_length, "accept_length"),
                   device_view_of(tokens, "tokens"), device_view_of(logprobs, "logprobs", true),
                   device_view_of(stop_ids, "stop_ids"), device_view_of(max_len, "max_len"),
                   device_view_of(history, "history"), device_view_of(history_len, "history_len"),
                   device_view_of(roots, "roots"), device_view_of(num_path, "num_path"),
                   device_view_of(report, "report")}));
          });
}

}  // namespace specrt::bindings
