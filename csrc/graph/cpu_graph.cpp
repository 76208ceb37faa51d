#include "graph/cpu_graph.h"

#include "core/check.h"

namespace specrt {

void CpuGraph::begin() {
    SPECRT_CHECK(recorder() == nullptr, "graph: this thread is already recording");
    launches_.clear();
    set_recorder(&launches_);
    is_recording_ = true;
}

void CpuGraph::end() {
    SPECRT_CHECK(is_recording_ && recorder() == &launches_, "graph: end() without begin()");
    set_recorder(nullptr);
    is_recording_ = false;
}

void CpuGraph::replay(int num_threads) const {
    SPECRT_CHECK(!is_recording_, "graph: replay() while recording");
    run_launches(launches_.data(), launches_.size(), num_threads);
}

}  // namespace specrt
