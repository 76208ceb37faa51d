// What a sequence's round teaches. The same source for host and device, so that both find the same
// bits.
#pragma once
#include "draft_control/draft_control.h"

namespace specrt {

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
