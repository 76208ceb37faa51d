#include "time_stamp/time_stamp.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_time_stamp(py::module_& m) {
    m.def("time_stamp",
          [](py::handle out) { submit_released(time_stamp(device_view_of(out, "out"))); });
}

}  // namespace specrt::bindings
