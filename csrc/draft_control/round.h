// One sequence's part of both launches (draft_control.h): its decision, and what its round teaches.
// The same source for host and device, so that both find the same bits.
#pragma once
#include "draft_control/draft_control.h"
#include "draft_control/posterior.h"

namespace specrt {

// One NaN for all machines, whose arithmetic makes NaN of different bits.
SPECRT_HD float quiet_nan() {
    const uint32_t bits = 0x7fc00000u;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

SPECRT_HD bool has_slot(int32_t slot, int32_t size) {
    return 0 <= slot && slot < size;
}

// `length` of the drafted tokens are to be verified.
SPECRT_HD void keep(const DraftControlParams& p, int b, int length) {
    p.length[b] = length;
    if (p.num_nodes) p.num_nodes[b] = 1 + length;
}

SPECRT_HD void begin_round(const DraftControlParams& p, int b) {
    const Posterior& q = p.posterior[p.slots[b]];
    const bool is_wanted = starts(p.kind, *p.settings, q, static_cast<uint64_t>(p.seed[b]),
                                  static_cast<uint64_t>(p.position[b]));
    p.is_open[b] = p.limit[b] > 0 && is_wanted;
    p.drafted[b] = 0;
    keep(p, b, 0);
    float* confidence = p.confidence + int64_t{b} * p.max_draft;
    for (int i = 0; i < p.max_draft; ++i) confidence[i] = quiet_nan();
}

SPECRT_HD float last_confidence(const DraftControlParams& p, int b) {
    const int row = p.is_sampled[b] != 0;
    const float* evidence = p.evidence ? p.evidence + b * p.evidence_stride + row : nullptr;
    const float* slope = p.evidence ? p.slope + row : nullptr;
    const float last = confidence_of(p.score[b * p.score_stride], evidence, slope);
    return last == last ? last : quiet_nan();
}

SPECRT_HD void decide(const DraftControlParams& p, int b) {
    if (!p.is_open[b]) return;
    const uint64_t seed = static_cast<uint64_t>(p.seed[b]);
    const uint64_t position = static_cast<uint64_t>(p.position[b]);
    float* confidence = p.confidence + int64_t{b} * p.max_draft;
    const float last = last_confidence(p, b);
    confidence[p.step - 1] = last;
    p.drafted[b] = p.step;
    if (last != last) {  // broken logits: nothing more of them
        keep(p, b, p.step - 1);
        p.is_open[b] = 0;
        return;
    }
    const Posterior& q = p.posterior[p.slots[b]];
    keep(p, b, p.step);
    const bool has_room = p.step < p.limit[b] && p.step < p.max_draft;
    if (has_room && goes_on(p.kind, *p.settings, q, *p.costs, confidence, p.step, seed, position))
        return;
    p.is_open[b] = 0;
    if (!keeps_last(p.kind, q, *p.costs, confidence, p.step, seed, position))
        keep(p, b, p.step - 1);
}

SPECRT_HD void control_sequence(const DraftControlParams& p, int b) {
    if (!has_slot(p.slots[b], p.slots_size)) {
        p.is_open[b] = p.drafted[b] = 0;
        keep(p, b, 0);
    } else if (p.step == 0) {
        begin_round(p, b);
    } else {
        decide(p, b);
    }
}

// Sequence b's slot must be a row of the posterior.
SPECRT_HD void learn_from(const DraftControlUpdateParams& p, int b) {
    const int32_t kept = p.length[b], accepted = p.accept_length[b];
    const bool is_round = 0 <= kept && kept <= p.drafted[b] && p.drafted[b] <= p.max_draft;
    if (!is_round) return;
    const DraftedRound round{p.limit[b], p.drafted[b], kept, accepted < kept ? accepted : kept,
                             p.confidence + int64_t{b} * p.max_draft};
    learn(p.kind, *p.settings, *p.costs, round, p.posterior + p.slots[b]);
}

}  // namespace specrt
