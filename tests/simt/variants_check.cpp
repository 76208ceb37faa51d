// Which line of a kernel's variants.h holds for a shape: decided while compiling.
#include "linear/variants.h"
#include "tree_attention/variants.h"

namespace specrt::attention {
namespace {

constexpr std::initializer_list<Variant> kLines = {
    {90, 128, 64, 8, 4096, {4, 1}},
    {90, 128, 64, 8, kAny, {4, 2}},
    {90, 128, kAny, kAny, kAny, {8, 1}},
};

// One sequence of 8 KV heads, 16 nodes in groups of 4 and 4096 keys.
constexpr Shape kShape{1, 8, 4, 16, 128, 4096};

constexpr bool is_chosen(const Shape& shape, int arch, int num_warps, int blocks_per_sm) {
    const PlanChoice choice = measured_choice(kLines, shape, arch);
    return choice.num_warps == num_warps && choice.blocks_per_sm == blocks_per_sm;
}

static_assert(is_chosen(kShape, 90, 4, 1), "the first that holds");
static_assert(is_chosen({1, 8, 4, 16, 128, 4097}, 90, 4, 2), "too many keys for the first");
static_assert(is_chosen({1, 8, 4, 17, 128, 4096}, 90, 8, 1), "too many rows");
static_assert(is_chosen({2, 8, 4, 16, 128, 4096}, 90, 8, 1), "too many pairs");
static_assert(is_chosen(kShape, 80, 0, 0), "another GPU");
static_assert(is_chosen({1, 8, 4, 16, 64, 4096}, 90, 0, 0), "another head size");

static_assert(are_valid(kLines));
static_assert(!are_valid({{90, 128, 64, 8, kAny, {16, 2}}}), "more warps than a block may have");
static_assert(!are_valid({{90, 128, 64, 8, kAny, {4, 17}}}), "more blocks than may be asked for");

}  // namespace
}  // namespace specrt::attention

namespace specrt::product {
namespace {

constexpr std::initializer_list<Variant> kLines = {
    {90, 4096, 14336, 8, {64, 8}},
    {90, 4096, 14336, 64, {128, 4}},
    {90, 4096, 4096, kAny, {128, 0}},
};

constexpr bool is_chosen(int64_t outputs, int64_t depth, int64_t rows, int arch, int tile_rows,
                         int num_stages) {
    const LinearPlan choice = measured_choice(kLines, outputs, depth, rows, arch);
    return choice.tile_rows == tile_rows && choice.num_stages == num_stages;
}

static_assert(is_chosen(4096, 14336, 8, 90, 64, 8), "the first that holds");
static_assert(is_chosen(4096, 14336, 9, 90, 128, 4), "too many rows for the first");
static_assert(is_chosen(4096, 14336, 65, 90, 0, 0), "too many rows");
static_assert(is_chosen(4096, 4096, 5000, 90, 128, 0), "any number of rows");
static_assert(is_chosen(4096, 4096, 1, 80, 0, 0), "another GPU");
static_assert(is_chosen(4096, 4104, 1, 90, 0, 0), "another matrix");

static_assert(are_valid(kLines));
static_assert(!are_valid({{90, 4096, 4096, 8, {32, 4}}}), "no tile of so many rows");
static_assert(!are_valid({{90, 4096, 4096, 8, {64, 9}}}), "more stages than there are");

}  // namespace
}  // namespace specrt::product
