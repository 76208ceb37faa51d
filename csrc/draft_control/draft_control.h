// Draft control (core/posterior.h) for a batch: one launch decides after each drafted token, one
// learns from a verified round.
//
// Sequence b believes row slots[b] of `posterior`: rows of its own, or one shared by several.
#pragma once
#include "core/dispatch.h"
#include "core/draft_decision.h"
#include "core/thread_pool.h"

namespace specrt {

SPECRT_DECLARE_CPU(draft_control_part)
SPECRT_DECLARE_CUDA(draft_control_cuda)

Launch draft_control(const DraftControlArgs& args);

struct DraftControlUpdateParams {
    const ControlSettings* settings;
    const DraftCosts* costs;
    const int32_t* slots;
    const int32_t* limit;
    const int32_t* drafted;
    const int32_t* length;
    const int32_t* accept_length;  // [B]; -1: failed
    const float* confidence;
    Posterior* posterior;
    int32_t batch, slots_size, max_draft, kind;
};

SPECRT_DECLARE_CPU(draft_control_update_part)
SPECRT_DECLARE_CUDA(draft_control_update_cuda)

struct DraftControlUpdateArgs {
    TensorView settings, costs, slots, limit, drafted, length, confidence, accept_length, posterior;
    int64_t kind;
};
Launch draft_control_update(const DraftControlUpdateArgs& args);

// A row of `posterior` before anything is known; run at once, on the CPU's tensors.
void draft_control_prior(const TensorView& settings, const TensorView& posterior);

// Variates for tests: out[i] is drawn with seed[i] and position[i], from uniform `index` on.
void normal_draws(const TensorView& seed, const TensorView& position, uint32_t index, double mean,
                  double variance, const TensorView& out);
void beta_draws(const TensorView& seed, const TensorView& position, uint32_t index, double alpha,
                double beta, const TensorView& out);

}  // namespace specrt
