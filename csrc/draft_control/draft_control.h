// Draft control (posterior.h) for a batch: one launch decides after each drafted token, one learns
// from a verified round.
//
// Sequence b believes row slots[b] of `posterior`: rows of its own, or one shared by several.
#pragma once
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct ControlSettings;
struct Posterior;
struct DraftCosts;

constexpr int kMaxDraft = 62;

struct DraftControlParams {
    const ControlSettings* settings;
    const DraftCosts* costs;
    const Posterior* posterior;  // [P]
    const int32_t* slots;        // [B]
    const int64_t* seed;         // [B], unsigned bits
    const int32_t* position;     // [B]
    const int32_t* limit;        // [B] tokens that may be drafted
    const int32_t* is_sampled;   // [B] row of the calibration head
    const float* slope;          // [2] or nullptr
    const float* score;          // [B]; nullptr at step 0
    const float* evidence;       // [B, 2] or nullptr
    int32_t* is_open;            // [B] 1: draft another token
    int32_t* drafted;            // [B] tokens drafted
    int32_t* length;             // [B] of them to verify
    int32_t* num_nodes;          // [B] or nullptr: with the root
    float* confidence;           // [B, K], NaN where nothing was drafted
    int64_t score_stride, evidence_stride;
    int32_t batch, slots_size, max_draft, kind, step;
};

SPECRT_DECLARE_CPU(draft_control_part)
SPECRT_DECLARE_CUDA(draft_control_cuda)

struct DraftControlArgs {
    TensorView settings, costs, posterior, slots, seed, position, limit, is_sampled, slope, score,
        evidence, is_open, drafted, length, confidence, num_nodes;
    int64_t kind, step;
};
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
