#include "bindings/tensor.h"

namespace specrt::bindings {

void register_tree_accept(py::module_&) {}

}  // namespace specrt::bindings
