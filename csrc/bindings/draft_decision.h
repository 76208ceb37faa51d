// The arguments of a decision on drafting, as draft_control and tree_expand are given them.
#pragma once
#include "bindings/tensor.h"
#include "core/draft_decision.h"

namespace specrt::bindings {

constexpr size_t kDecisionArgs = 18;

// Those from number `first` on.
inline DraftControlArgs decision_args(const py::args& t, size_t first) {
    const auto view = [&](size_t i, const char* name, bool is_optional = false) {
        return device_view_of(t[first + i], name, is_optional);
    };
    return {view(2, "settings"),
            view(3, "costs"),
            view(4, "posterior"),
            view(5, "slots"),
            view(6, "seed"),
            view(7, "position"),
            view(8, "limit"),
            view(9, "is_sampled"),
            view(10, "slope", true),
            view(11, "score", true),
            view(12, "evidence", true),
            view(13, "is_open"),
            view(14, "drafted"),
            view(15, "length"),
            view(16, "confidence"),
            view(17, "num_nodes", true),
            t[first].cast<int64_t>(),
            t[first + 1].cast<int64_t>()};
}

}  // namespace specrt::bindings
