// The mass of a logit: its exponential relative to the row's maximum, in fixed point. Sums of
// masses are sums of integers, so they are the same however a row is split and whoever adds them:
// lanes, threads, or the blocks of a GPU.
#pragma once
#include "core/philox.h"

namespace specrt {

// Of 2^23 tokens the total is below 2^63; a token 2^-40 as likely as the best has mass 1, and less
// likely ones have none.
constexpr int kMassBits = 40;
constexpr float kMassOne = 1099511627776.0f;  // 2^40

// x: logit - row maximum. What is not below 0, NaN too, counts as the maximum itself, so that no
// total overflows. Of two logits the larger may have less mass, by one part in 2^23 and only above
// 0.7 of the maximum's, so the kept set is ordered by logits.
SPECRT_HD uint64_t mass_of(float x) {
    return static_cast<uint64_t>(static_cast<int64_t>(exp_of(x < 0.0f ? x : 0.0f) * kMassOne));
}

// ln of a sum of masses, total >= 1.
SPECRT_HD float log_of_mass(uint64_t total) {
    return log_of(static_cast<float>(total) * (1.0f / kMassOne));
}

// top_p keeps the tokens whose predecessors (larger logit, or equal and smaller id) hold less than
// this: ceil(top_p * total), within 1..total.
SPECRT_HD uint64_t nucleus_mass(double top_p, uint64_t total) {
    const double mass = top_p * static_cast<double>(total);
    if (!(mass > 1.0)) return 1;
    if (mass >= static_cast<double>(total)) return total;
    const uint64_t whole = static_cast<uint64_t>(mass);
    return whole + (static_cast<double>(whole) < mass);
}

// No token of this mass or less is kept by top_p: it and all behind it weigh too little together.
// The factor covers the rounding of nucleus_mass: where 1 - top_p is small enough for that to
// matter, this is 0.
SPECRT_HD uint64_t light_mass(double top_p, uint64_t total, int64_t vocab) {
    const double rest = top_p > 0.0 ? 1.0 - top_p : 1.0;
    return static_cast<uint64_t>(rest * static_cast<double>(total) / static_cast<double>(vocab) *
                                 0.999);
}

// Below it no x has a mass above `mass`; the slack covers rounding.
SPECRT_HD float logit_of_mass(uint64_t mass) {
    return (mass < 1 ? -27.726f : log_of_mass(mass)) - 0.001f;
}

// floor(u * total), 0 < u < 1: a token is drawn as the first whose inclusive prefix sum is above.
SPECRT_HD uint64_t drawn_mass(float u, uint64_t total) {
    return static_cast<uint64_t>(static_cast<double>(u) * static_cast<double>(total));
}

// --- rejection with residuals
constexpr double kResidualOne = 0x1p56;

// Conversions go by way of signed integers, which every instruction set has.
SPECRT_HD double ratio_of(uint64_t mass, uint64_t total) {
    return static_cast<double>(static_cast<int64_t>(mass)) /
           static_cast<double>(static_cast<int64_t>(total));
}

// A draft law's probability as it may be reported: NaN and negatives are 0, rounding above 1 is
// cut.
SPECRT_HD double clean_prob(float q) {
    return static_cast<double>(q > 0.0f ? (q < 1.0f ? q : 1.0f) : 0.0f);
}

// Whether a child of draft probability q is accepted under u. Strict: mass 0 never is.
SPECRT_HD bool accepts(float u, float q, uint64_t mass, uint64_t total) {
    return static_cast<double>(u) * clean_prob(q) < ratio_of(mass, total);
}

// relu(mass / total - q) in units of 2^-56: what a token weighs once a child was rejected.
SPECRT_HD uint64_t residual_mass(uint64_t mass, uint64_t total, float q) {
    const double r = ratio_of(mass, total) - clean_prob(q);
    return static_cast<uint64_t>(static_cast<int64_t>((r > 0.0 ? r : 0.0) * kResidualOne));
}

}  // namespace specrt
