#include "core/draft_decision.h"

namespace specrt {
namespace {

int32_t narrow(int64_t size) {
    return static_cast<int32_t>(size);
}

// `score` may be a column.
void check_score(const DraftControlArgs& a, int64_t batch) {
    const TensorView& t = a.score;
    SPECRT_CHECK(t.ndim == 1 && t.dtype == DType::kFloat32 && t.shape[0] == batch,
                 "score: expected [B] = [", batch, "] float32, got ", t.describe());
    if (!a.evidence) return;
    expect(a.evidence, DType::kFloat32, "[B, 2]", batch, 2);
    SPECRT_CHECK(a.slope, "slope: expected a tensor, as evidence is given");
    expect(a.slope, DType::kFloat32, "[2]", 2);
}

void check_step(const DraftControlArgs& a, int64_t batch) {
    const int64_t cap = a.confidence.shape[1];
    SPECRT_CHECK(0 <= a.step && a.step <= cap, "step: expected 0..", cap, ", got ", a.step);
    if (a.step > 0) {
        SPECRT_CHECK(a.score, "score: expected a tensor at step ", a.step);
        return check_score(a, batch);
    }
    for (const TensorView* t : {&a.score, &a.evidence})
        SPECRT_CHECK(!*t, t->name, ": expected None at step 0");
}

}  // namespace

int64_t check_control(int64_t kind, const TensorView& confidence, const TensorView& settings,
                      const TensorView& costs, const TensorView& posterior) {
    SPECRT_CHECK(0 <= kind && kind < kNumControlKinds, "kind: expected 0..", kNumControlKinds - 1,
                 ", got ", kind);
    expect(confidence, DType::kFloat32, "[B, K]", -1, -1);
    const int64_t cap = confidence.shape[1];
    SPECRT_CHECK(1 <= cap && cap <= kMaxDraft, "confidence: expected 1 <= K <= ", kMaxDraft,
                 ", got ", confidence.describe());
    expect(settings, DType::kFloat64, "[settings]", kNumSettings);
    expect(costs, DType::kFloat64, "[costs]", kNumCosts);
    expect(posterior, DType::kFloat64, "[P, beliefs]", -1, kNumBeliefs);
    expect_contiguous(confidence);
    expect_contiguous(posterior);
    return confidence.shape[0];
}

DraftControlParams draft_control_params(const DraftControlArgs& a) {
    const int64_t batch = check_control(a.kind, a.confidence, a.settings, a.costs, a.posterior);
    expect(a.seed, DType::kInt64, "[B]", batch);
    for (const TensorView* t :
         {&a.slots, &a.position, &a.limit, &a.is_sampled, &a.is_open, &a.drafted, &a.length})
        expect(*t, DType::kInt32, "[B]", batch);
    if (a.num_nodes) expect(a.num_nodes, DType::kInt32, "[B]", batch);
    check_step(a, batch);

    DraftControlParams p{};
    p.settings = a.settings.as<ControlSettings>();
    p.costs = a.costs.as<DraftCosts>();
    p.posterior = a.posterior.as<Posterior>();
    p.slots = a.slots.as<int32_t>();
    p.seed = a.seed.as<int64_t>();
    p.position = a.position.as<int32_t>();
    p.limit = a.limit.as<int32_t>();
    p.is_sampled = a.is_sampled.as<int32_t>();
    p.slope = a.slope.as<float>();
    p.score = a.score.as<float>();
    p.evidence = a.evidence.as<float>();
    p.is_open = a.is_open.as<int32_t>();
    p.drafted = a.drafted.as<int32_t>();
    p.length = a.length.as<int32_t>();
    p.num_nodes = a.num_nodes.as<int32_t>();
    p.confidence = a.confidence.as<float>();
    p.score_stride = a.score.stride[0];
    p.evidence_stride = a.evidence.stride[0];
    p.batch = narrow(batch);
    p.slots_size = narrow(a.posterior.shape[0]);
    p.max_draft = narrow(a.confidence.shape[1]);
    p.kind = narrow(a.kind);
    p.step = narrow(a.step);
    return p;
}

}  // namespace specrt
