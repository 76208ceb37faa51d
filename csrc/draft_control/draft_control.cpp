#include "draft_control/draft_control.h"

namespace specrt {
namespace {

int32_t narrow(int64_t size) {
    return static_cast<int32_t>(size);
}

}  // namespace

Launch draft_control(const DraftControlArgs& a) {
    const DraftControlParams p = draft_control_params(a);
    const int device = common_device(a.posterior, a.settings, a.costs, a.slots, a.seed, a.position,
                                     a.limit, a.is_sampled, a.slope, a.score, a.evidence, a.is_open,
                                     a.drafted, a.length, a.confidence, a.num_nodes);
    if (device != kCpu) return make_cuda_launch(draft_control_cuda, p, device);
    return make_launch(draft_control_part_for(active_isa()), p, 1 + p.batch / 32);
}

Launch draft_control_update(const DraftControlUpdateArgs& a) {
    const int64_t batch = check_control(a.kind, a.confidence, a.settings, a.costs, a.posterior);
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
