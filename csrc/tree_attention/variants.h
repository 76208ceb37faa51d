// Layouts of tree_attention that were quickest where they were measured. All give the same bits, so
// a line here changes nothing but time.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "tree_attention/tree_attention.h"

namespace specrt::attention {

constexpr int kAny = INT32_MAX;

// Holds on GPUs of compute capability `arch` / 10 for shapes with exactly this head size, and with
// no more of the rest.
struct Variant {
    int arch, head_dim;
    int max_rows, max_pairs, max_keys;  // Shape's rows(), pairs() and max_seen()
    PlanChoice choice;
};

// What the first line that holds says; {0, 0} where none does.
constexpr PlanChoice measured_choice(std::initializer_list<Variant> lines, const Shape& shape,
                                     int arch) {
    for (const Variant& v : lines)
        if (v.arch == arch && v.head_dim == shape.head_dim && shape.rows() <= v.max_rows &&
            shape.pairs() <= v.max_pairs && shape.max_seen() <= v.max_keys)
            return v.choice;
    return {0, 0};
}

// Narrow lines before wide ones. `python -m bench.variants --record` writes what is between the
// markers, as {90, 128, 64, 32, kAny, {4, 2}},  // card, date
constexpr std::initializer_list<Variant> kVariants = {
    // clang-format off
    // BEGIN measured
    {90, 128, 1, 32, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 32, 2112, {4, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 32, 8256, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 32, 32832, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 128, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 128, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 128, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 128, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 512, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 512, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 512, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 1, 512, 32832, {8, 2}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 8, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 8, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 8, 8256, {4, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 8, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 32, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 32, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 32, 8256, {4, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 32, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 128, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 128, 2112, {4, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 128, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 4, 128, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 32, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 32, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 32, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 32, 32832, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 128, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 128, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 128, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 128, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 512, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 512, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 512, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 8, 512, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 8, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 8, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 8, 8256, {4, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 8, 32832, {4, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 32, 576, {8, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 32, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 32, 8256, {4, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 32, 32832, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 128, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 128, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 128, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 32, 128, 32832, {8, 2}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 32, 576, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 32, 2112, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 32, 8256, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 32, 32832, {8, 1}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 128, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 128, 2112, {4, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 128, 8256, {8, 2}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 128, 32832, {8, 2}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 512, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 512, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 512, 8256, {8, 2}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 60, 512, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 8, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 8, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 8, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 8, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 32, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 32, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 32, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 32, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 128, 576, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 128, 2112, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 128, 8256, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128, 240, 128, 32832, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    // END measured
    // clang-format on
};

// Each is a plan that a caller could have asked for; {0, 0} leaves it to the rules.
constexpr bool are_valid(std::initializer_list<Variant> lines) {
    for (const Variant& v : lines)
        if (!is_valid(v.choice)) return false;
    return true;
}
static_assert(are_valid(kVariants), "no such plan");

}  // namespace specrt::attention
