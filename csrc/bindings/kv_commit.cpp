#include "kv_commit/kv_commit.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_kv_commit(py::module_& m) {
    m.def("kv_commit", [](py::handle kv, py::handle block_table, py::handle path,
                          py::handle num_path, py::handle kv_len) {
        const KvCommit launches =
            kv_commit(view_of(kv, "kv"), view_of(block_table, "block_table"), view_of(path, "path"),
                      view_of(num_path, "num_path"), view_of(kv_len, "kv_len"));
        submit_released(launches.move);
        submit_released(launches.advance);
    });
}

}  // namespace specrt::bindings
