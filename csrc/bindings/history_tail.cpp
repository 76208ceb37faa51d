#include "history_tail/history_tail.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_history_tail(py::module_& m) {
    m.def("history_tail",
          [](py::handle history, py::handle history_len, py::handle tokens, py::handle start) {
              submit_released(history_tail(
                  {device_view_of(history, "history"), device_view_of(history_len, "history_len"),
                   device_view_of(tokens, "tokens"), device_view_of(start, "start")}));
          });
}

}  // namespace specrt::bindings
