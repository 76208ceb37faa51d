#include "draft_control/draft_control.h"

#include "draft_control/posterior.h"

namespace specrt {
namespace {

constexpr int64_t kNumSettings = sizeof(ControlSettings) / sizeof(double);
constexpr int64_t kNumCosts = sizeof(DraftCosts) / sizeof(double);
constexpr int64_t kNumBeliefs = sizeof(Posterior) / sizeof(double);

int32_t narrow(int64_t size) {
    return static_cast<int32_t>(size);
}

void check_kind(int64_t kind) {
    SPECRT_CHECK(0 <= kind && kind < kNumControlKinds, "kind: expected 0..", kNumControlKinds - 1,
                 ", got ", kind);
}

// Returns B.
int64_t check_round(const TensorView& confidence, const TensorView& settings,
                    const TensorView& costs, const TensorView& posterior) {
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

Launch draft_control(const DraftControlArgs& a) {
    check_kind(a.kind);
    const int64_t batch = check_round(a.confidence, a.settings, a.costs, a.posterior);
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
    const int device = common_device(a.posterior, a.settings, a.costs, a.slots, a.seed, a.position,
                                     a.limit, a.is_sampled, a.slope, a.score, a.evidence, a.is_open,
                                     a.drafted, a.length, a.confidence, a.num_nodes);
    if (device != kCpu) return make_cuda_launch(draft_control_cuda, p, device);
    return make_launch(draft_control_part_for(active_isa()), p, 1 + batch / 32);
}

Launch draft_control_update(const DraftControlUpdateArgs& a) {
    check_kind(a.kind);
    const int64_t batch = check_round(a.confidence, a.settings, a.costs, a.posterior);
    for (const TensorView* t : {&a.slots, &a.limit, &a.drafted, &a.length, &a.accept_length})
        expect(*t, DType::kInt32, "[B]", batch);

    DraftControlUpdateParams p{};
    p.settings = a.settings.as<ControlSettings>();
    p.costs = a.costs.as<DraftCosts>();
    p.slots = a.slots.as<int32_t>();
    p.limit = a.limit.as<int32_t>();
    p.drafted = a.drafted.as<int32_t>();
    p.length = a.length.as<int32_t>();
    p.accept_length = a.accept_length.as<int32_t>();
    p.confidence = a.confidence.as<float>();
    p.posterior = a.posterior.as<Posterior>();
    p.batch = narrow(batch);
    p.slots_size = narrow(a.posterior.shape[0]);
    p.max_draft = narrow(a.confidence.shape[1]);
    p.kind = narrow(a.kind);
    const int device = common_device(a.posterior, a.settings, a.costs, a.slots, a.limit, a.drafted,
                                     a.length, a.accept_length, a.confidence);
    if (device != kCpu) return make_cuda_launch(draft_control_update_cuda, p, device);
    // One part: sequences that share a row take turns in the order of the batch.
    return make_launch(draft_control_update_part_for(active_isa()), p, 1);
}

void draft_control_prior(const TensorView& settings, const TensorView& posterior) {
    expect(settings, DType::kFloat64, "[settings]", kNumSettings);
    expect(posterior, DType::kFloat64, "[beliefs]", kNumBeliefs);
    set_prior(*settings.as<ControlSettings>(), posterior.as<Posterior>());
}

namespace {

int64_t check_draws(const TensorView& seed, const TensorView& position, const TensorView& out) {
    expect(seed, DType::kInt64, "[n]", -1);
    expect(position, DType::kInt32, "[n]", seed.shape[0]);
    expect(out, DType::kFloat64, "[n]", seed.shape[0]);
    return seed.shape[0];
}

DrawStream stream_of(const TensorView& seed, const TensorView& position, int64_t i,
                     uint32_t index) {
    return {static_cast<uint64_t>(seed.as<int64_t>()[i]),
            static_cast<uint64_t>(position.as<int32_t>()[i]), index};
}

}  // namespace

void normal_draws(const TensorView& seed, const TensorView& position, uint32_t index, double mean,
                  double variance, const TensorView& out) {
    SPECRT_CHECK(variance >= 0.0, "variance: expected a number >= 0, got ", variance);
    const int64_t count = check_draws(seed, position, out);
    for (int64_t i = 0; i < count; ++i) {
        DrawStream stream = stream_of(seed, position, i, index);
        out.as<double>()[i] = mean + sqrt_of(variance) * draw_normal(&stream);
    }
}

void beta_draws(const TensorView& seed, const TensorView& position, uint32_t index, double alpha,
                double beta, const TensorView& out) {
    SPECRT_CHECK(alpha > 0.0, "alpha: expected a number > 0, got ", alpha);
    SPECRT_CHECK(beta > 0.0, "beta: expected a number > 0, got ", beta);
    const int64_t count = check_draws(seed, position, out);
    for (int64_t i = 0; i < count; ++i) {
        DrawStream stream = stream_of(seed, position, i, index);
        out.as<double>()[i] = draw_beta(alpha, beta, &stream);
    }
}

}  // namespace specrt
