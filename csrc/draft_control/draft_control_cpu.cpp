#include "draft_control/draft_control.h"
#include "draft_control/posterior.h"

namespace specrt::SPECRT_ISA {
namespace {

const float kNaN = __builtin_nanf("");

void begin_round(const DraftControlParams& p, int b) {
    const Posterior& q = p.posterior[p.slots[b]];
    const bool is_wanted = starts(p.kind, *p.settings, q, static_cast<uint64_t>(p.seed[b]),
                                  static_cast<uint64_t>(p.position[b]));
    p.is_open[b] = p.limit[b] > 0 && is_wanted;
    p.drafted[b] = p.length[b] = 0;
    for (int i = 0; i < p.max_draft; ++i) p.confidence[b * p.max_draft + i] = kNaN;
}

void decide(const DraftControlParams& p, int b) {
    if (!p.is_open[b]) return;
    const uint64_t seed = static_cast<uint64_t>(p.seed[b]);
    const uint64_t position = static_cast<uint64_t>(p.position[b]);
    const int row = p.is_sampled[b] != 0;
    const float* evidence = p.evidence ? p.evidence + b * p.evidence_stride + row : nullptr;
    float* confidence = p.confidence + b * p.max_draft;
    const float* slope = p.evidence ? p.slope + row : nullptr;
    const float last = confidence_of(p.score[b * p.score_stride], evidence, slope);
    confidence[p.step - 1] = last;
    p.drafted[b] = p.step;
    if (last != last) {  // broken logits: nothing more of them
        p.length[b] = p.step - 1;
        p.is_open[b] = 0;
        return;
    }
    const Posterior& q = p.posterior[p.slots[b]];
    p.length[b] = p.step;
    const bool has_room = p.step < p.limit[b] && p.step < p.max_draft;
    if (has_room && goes_on(p.kind, *p.settings, q, *p.costs, confidence, p.step, seed, position))
        return;
    p.is_open[b] = 0;
    if (!keeps_last(p.kind, q, *p.costs, confidence, p.step, seed, position))
        p.length[b] = p.step - 1;
}

bool has_slot(int32_t slot, int32_t size) {
    return 0 <= slot && slot < size;
}

}  // namespace

void draft_control_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const DraftControlParams*>(params);
    const int end = p.batch * (part + 1) / num_parts;
    for (int b = p.batch * part / num_parts; b < end; ++b) {
        if (!has_slot(p.slots[b], p.slots_size)) {
            p.is_open[b] = p.drafted[b] = p.length[b] = 0;
        } else if (p.step == 0) {
            begin_round(p, b);
        } else {
            decide(p, b);
        }
    }
}

void draft_control_update_part(const void* params, int, int) {
    const auto& p = *static_cast<const DraftControlUpdateParams*>(params);
    for (int b = 0; b < p.batch; ++b) {
        const int32_t kept = p.length[b], accepted = p.accept_length[b];
        const bool is_round = 0 <= kept && kept <= p.drafted[b] && p.drafted[b] <= p.max_draft;
        if (!has_slot(p.slots[b], p.slots_size) || !is_round) continue;
        const DraftedRound round{p.limit[b], p.drafted[b], kept, accepted < kept ? accepted : kept,
                                 p.confidence + b * p.max_draft};
        learn(p.kind, *p.settings, *p.costs, round, p.posterior + p.slots[b]);
    }
}

}  // namespace specrt::SPECRT_ISA
