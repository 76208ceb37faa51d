#include "bindings/tensor.h"

namespace specrt::bindings {

void register_kv_commit(py::module_&) {}

}  // namespace specrt::bindings
