#include "draft_control/round.h"

namespace specrt::SPECRT_ISA {

void draft_control_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const DraftControlParams*>(params);
    const int end = p.batch * (part + 1) / num_parts;
    for (int b = p.batch * part / num_parts; b < end; ++b) control_sequence(p, b);
}

void draft_control_update_part(const void* params, int, int) {
    const auto& p = *static_cast<const DraftControlUpdateParams*>(params);
    for (int b = 0; b < p.batch; ++b)
        if (has_slot(p.slots[b], p.slots_size)) learn_from(p, b);
}

}  // namespace specrt::SPECRT_ISA
