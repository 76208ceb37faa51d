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
    {90, 2560, 8192, 8, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 2560, 8192, 16, {64, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 2560, 8192, 32, {64, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 2560, 8192, 64, {64, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 2560, 8192, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 4096, 8, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 4096, 16, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 4096, 32, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 4096, 64, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 4096, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 11008, 8, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 11008, 16, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 11008, 32, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 11008, 64, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 11008, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 14336, 8, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 14336, 16, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 14336, 32, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 14336, 64, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 4096, 14336, 128, {128, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 6144, 4096, 8, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 6144, 4096, 16, {64, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 6144, 4096, 32, {64, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 6144, 4096, 64, {64, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 6144, 4096, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 2048, 8, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 2048, 16, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 2048, 32, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 2048, 64, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 2048, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 7168, 8, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 7168, 16, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 7168, 32, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 7168, 64, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 8192, 7168, 128, {128, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 12288, 4096, 8, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 12288, 4096, 16, {64, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 12288, 4096, 32, {64, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 12288, 4096, 64, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 12288, 4096, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 14336, 8192, 8, {128, 8}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 14336, 8192, 16, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 14336, 8192, 32, {128, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 14336, 8192, 64, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 14336, 8192, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 22016, 4096, 8, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 22016, 4096, 16, {64, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 22016, 4096, 32, {64, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 22016, 4096, 64, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 22016, 4096, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 28672, 4096, 8, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 28672, 4096, 16, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 28672, 4096, 32, {128, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 28672, 4096, 64, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 28672, 4096, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 32000, 4096, 8, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 32000, 4096, 16, {128, 6}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 32000, 4096, 32, {128, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 32000, 4096, 64, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 32000, 4096, 128, {128, 4}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128256, 4096, 8, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128256, 4096, 16, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128256, 4096, 32, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128256, 4096, 64, {0, 0}},  // NVIDIA H100 80GB HBM3, 2026-11-27
    {90, 128256, 4096, 128, {128, 3}},  // NVIDIA H100 80GB HBM3, 2026-11-27
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
