// Layouts of linear that were quickest where they were measured. All give the same bits, so a line
// here changes nothing but time.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "linear/linear.h"

namespace specrt::product {

constexpr int kAny = INT32_MAX;

// Holds on GPUs of compute capability `arch` / 10 for exactly this matrix, and for no more rows.
struct Variant {
    int arch;
    int64_t num_outputs, depth;
    int max_rows;
    LinearPlan choice;
};

// What the first line that holds says; {0, 0} where none does.
constexpr LinearPlan measured_choice(std::initializer_list<Variant> lines, int64_t num_outputs,
                                     int64_t depth, int64_t num_rows, int arch) {
    for (const Variant& v : lines)
        if (v.arch == arch && v.num_outputs == num_outputs && v.depth == depth &&
            num_rows <= v.max_rows)
            return v.choice;
    return {0, 0};
}

// Narrow lines before wide ones. `python -m bench.variants --record` writes what is between the
// markers, as {90, 4096, 14336, 64, {128, 4}},  // card, date
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

}  // namespace specrt::product
