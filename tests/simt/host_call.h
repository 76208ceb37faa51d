// What stands in for a kernel: a call of the host's in the order of a stream, as
// cudaLaunchHostFunc.
#pragma once
#include <functional>
#include <utility>

#include "graph.h"

namespace simt {

// At once, or as part of a graph where `stream` is captured. There it is a launch without a name.
inline void call_host(void* stream, std::function<void()> call) {
    const CapturedLaunch launch{nullptr, {}, {}, 0, false, std::move(call)};
    if (!is_captured(stream, launch)) launch.body();
}

}  // namespace simt
