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
    int max_rows, max_pairs, max_keys;  // Shape's rows(), pairs() and max_len
    PlanChoice choice;
};

// What the first line that holds says; {0, 0} where none does.
constexpr PlanChoice measured_choice(std::initializer_list<Variant> lines, const Shape& shape,
                                     int arch) {
    for (const Variant& v : lines)
        if (v.arch == arch && v.head_dim == shape.head_dim && shape.rows() <= v.max_rows &&
            shape.pairs() <= v.max_pairs && shape.max_len <= v.max_keys)
            return v.choice;
    return {0, 0};
}

// Narrow lines before wide ones. `python -m bench.variants --record` writes what is between the
// markers, as {90, 128, 64, 32, kAny, {4, 2}},  // card, date
constexpr std::initializer_list<Variant> kVariants = {
    // clang-format off
    // BEGIN measured
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
