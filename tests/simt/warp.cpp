#include "warp.h"

#include <string>

namespace simt {

void check_source(const Warp& warp, uint32_t lanes, unsigned lane, unsigned source) {
    if (lanes >> source & 1) return;
    scheduler->fail(warp.threads[lane], std::string(warp.at[lane].what) + " reads from lane " +
                                            std::to_string(source) +
                                            ", which does not take part in it");
}

void check_width(const char* what, int width) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
        fail(std::string(what) + ": width must be a power of two up to 32, got " +
             std::to_string(width));
}

uint32_t ballot(const char* what, uint32_t mask, bool vote) {
    const auto combine = [](Warp& warp, uint32_t lanes) {
        uint32_t votes = 0;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (lanes >> lane & 1) votes |= uint32_t{warp.in<bool>(lane)} << lane;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (lanes >> lane & 1) warp.out<uint32_t>(lane) = votes;
    };
    uint32_t votes = 0;
    scheduler->meet(what, mask, combine, &vote, &votes);
    return votes;
}

}  // namespace simt
