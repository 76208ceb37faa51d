#include "history_append/history_append.h"

namespace specrt {
namespace {

void check_shapes(const HistoryAppendArgs& a) {
    expect(a.tokens, DType::kInt32, "[B, N]", -1, -1);
    const int64_t batch = a.tokens.shape[0], nodes = a.tokens.shape[1];
    SPECRT_CHECK(1 <= nodes && nodes <= HistoryAppendParams::kMaxNodes,
                 "tokens: expected 1 <= N <= ", HistoryAppendParams::kMaxNodes, ", got ",
                 a.tokens.describe());
    for (const TensorView* t : {&a.depth, &a.path})
        expect(*t, DType::kInt32, "[B, N]", batch, nodes);
    if (a.logprobs) expect(a.logprobs, DType::kFloat32, "[B, N]", batch, nodes);
    for (const TensorView* t :
         {&a.num_nodes, &a.accept_length, &a.max_len, &a.history_len, &a.roots, &a.num_path})
        expect(*t, DType::kInt32, "[B]", batch);
    expect(a.stop_ids, DType::kInt32, "[B, S]", batch, -1);
    expect(a.history, DType::kInt32, "[B, T]", batch, -1);
    for (const TensorView* t : {&a.stop_ids, &a.history})
        SPECRT_CHECK(t->shape[1] <= INT32_MAX, t->name, ": expected less than 2^31 columns, got ",
                     t->describe());
    const char* wanted = a.logprobs ? "[B, 8 + 3 N]" : "[B, 8 + 2 N]";
    expect(a.report, DType::kInt32, wanted, batch,
           kReportHeaderSize + (a.logprobs ? 3 : 2) * nodes);
}

void check_apart(const HistoryAppendArgs& a) {
    for (const TensorView* in :
         {&a.num_nodes, &a.depth, &a.path, &a.accept_length, &a.tokens, &a.logprobs, &a.stop_ids})
        for (const TensorView* out :
             {&a.max_len, &a.history, &a.history_len, &a.roots, &a.num_path, &a.report})
            if (*in) expect_apart(*in, *out);
}

HistoryAppendParams params_of(const HistoryAppendArgs& a) {
    HistoryAppendParams p{};
    p.num_nodes = a.num_nodes.as<int32_t>();
    p.depth = a.depth.as<int32_t>();
    p.path = a.path.as<int32_t>();
    p.accept_length = a.accept_length.as<int32_t>();
    p.tokens = a.tokens.as<int32_t>();
    p.logprobs = a.logprobs.as<int32_t>();
    p.stop_ids = a.stop_ids.as<int32_t>();
    p.max_len = a.max_len.as<int32_t>();
    p.history = a.history.as<int32_t>();
    p.history_len = a.history_len.as<int32_t>();
    p.roots = a.roots.as<int32_t>();
    p.num_path = a.num_path.as<int32_t>();
    p.report = a.report.as<int32_t>();
    p.depth_stride = a.depth.stride[0];
    p.path_stride = a.path.stride[0];
    p.tokens_stride = a.tokens.stride[0];
    p.logprobs_stride = a.logprobs.stride[0];
    p.stop_ids_stride = a.stop_ids.stride[0];
    p.history_stride = a.history.stride[0];
    p.report_stride = a.report.stride[0];
    p.batch = static_cast<int32_t>(a.tokens.shape[0]);
    p.nodes = static_cast<int32_t>(a.tokens.shape[1]);
    p.stops = static_cast<int32_t>(a.stop_ids.shape[1]);
    p.slots = static_cast<int32_t>(a.history.shape[1]);
    return p;
}

}  // namespace

Launch history_append(const HistoryAppendArgs& a) {
    check_shapes(a);
    const int device = common_device(a.tokens, a.num_nodes, a.depth, a.path, a.accept_length,
                                     a.logprobs, a.stop_ids, a.max_len, a.history, a.history_len,
                                     a.roots, a.num_path, a.report);
    check_apart(a);
    const HistoryAppendParams p = params_of(a);
    if (device != kCpu) return make_cuda_launch(history_append_cuda, p, device);
    // A thread has looked at 8192 nodes before another one could have started.
    const int64_t parts = 1 + int64_t{p.batch} * p.nodes / 8192;
    return make_launch(history_append_part_for(active_isa()), p, parts < p.batch ? parts : p.batch);
}

}  // namespace specrt
