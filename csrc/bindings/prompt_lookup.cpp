#include "prompt_lookup/prompt_lookup.h"

#include "bindings/tensor.h"

namespace specrt::bindings {

void register_prompt_lookup(py::module_& m) {
    m.def("prompt_lookup",
          [](py::handle history, py::handle history_len, py::handle max_len, int64_t max_ngram,
             int64_t min_ngram, int64_t num_continuations, int64_t depth, py::handle draft_tokens,
             py::handle parents, py::handle num_nodes, py::handle match_len, py::handle longest) {
              submit_released(prompt_lookup(
                  {device_view_of(history, "history"), device_view_of(history_len, "history_len"),
                   device_view_of(max_len, "max_len"), max_ngram, min_ngram, num_continuations,
                   depth, device_view_of(draft_tokens, "draft_tokens"),
                   device_view_of(parents, "parents"), device_view_of(num_nodes, "num_nodes"),
                   device_view_of(match_len, "match_len"), device_view_of(longest, "longest")}));
          });
}

}  // namespace specrt::bindings
