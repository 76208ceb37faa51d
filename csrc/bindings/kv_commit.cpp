#include "kv_commit/kv_commit.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_kv_commit(py::module_& m) {
    m.def("kv_commit", [](py::handle kv, py::handle block_table, py::handle path,
                          py::handle num_path, py::handle kv_len, py::handle tickets,
                          bool is_last) {
        const KvCommit commit = kv_commit(
            device_view_of(kv, "kv"), device_view_of(block_table, "block_table"),
            device_view_of(path, "path"), device_view_of(num_path, "num_path"),
            device_view_of(kv_len, "kv_len"), device_view_of(tickets, "tickets", true), is_last);
        for (int i = 0; i < commit.count; ++i) submit_released(commit.launches[i]);
    });
}

}  // namespace specrt::bindings
