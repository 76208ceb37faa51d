// Products by packed bfloat16 on tile registers: weights are the second operand as they lie, rows
// of x the first, sixteen a block, up to four blocks by one strip. Rows that fill up the last block
// are whatever the workspace held: a row's sums depend on no other row. The order of sums is the
// instruction's own, which matmul_tiles_cpu.cpp keeps to.
#include "core/matmul_tiles.h"
#include "core/tile_unit.h"

namespace specrt::SPECRT_ISA {
namespace {

// Tiles 0 to 3 hold sums, 4 weights, and rows go round 5, 6, 7: the longer before one is loaded
// again, the less its product is waited for.
constexpr int kMostBlocks = 4, kWeights = 4, kFirstX = 5, kNumX = 3;
constexpr int64_t kLine = 64, kLinesOfTile = kTileBytes / kLine;
constexpr int64_t kAhead = 8192;  // fetch at least so far ahead

// Groups of blocks of rows, evenly; as tiles [group][step][part][block of the group].
struct Groups {
    int64_t num_blocks, num_groups, num_steps;
    int num_parts;

    explicit Groups(const MatmulParams& p)
        : num_blocks(divide_up(p.num_rows, kTileRows)),
          num_groups(divide_up(num_blocks, kMostBlocks)),
          num_steps(divide_up(p.depth, kTileDepth)),
          num_parts(num_parts_of(p.format)) {}

    int64_t begin(int64_t group) const { return num_blocks * group / num_groups; }
    int64_t size(int64_t group) const { return begin(group + 1) - begin(group); }
    int64_t group_of(int64_t block) const { return ((block + 1) * num_groups - 1) / num_blocks; }
    // Of the first tile of a group's step.
    int64_t tile(int64_t group, int64_t step) const {
        return (begin(group) * num_steps + step * size(group)) * num_parts;
    }
};

// Lines of the weights to come, `count` a step: the groups share them out, so that memory is busy
// while the later ones multiply.
struct Fetch {
    const char* next;
    int64_t count;
};

// B blocks by one strip, to [block][row][output].
template <int B, int P>
void accumulate(TileUnit& unit, const char* weights, const char* x, int64_t num_steps, Fetch fetch,
                float* sums) {
    each<B>([&](auto b) { unit.template zero<b>(); });
    for (int64_t k = 0; k < num_steps; ++k, weights += kTileBytes) {
        for (int64_t i = 0; i < fetch.count; ++i, fetch.next += kLine) prefetch(fetch.next);
        unit.template load<kWeights>(weights);
        each<P * B>([&](auto i) {
            constexpr int kX = kFirstX + i % kNumX;
            unit.template load<kX>(x + i * kTileBytes);
            unit.template multiply_bf16<i % B, kX, kWeights>();
        });
        x += P * B * kTileBytes;
    }
    each<B>([&](auto b) { unit.template store<b>(sums + b * kTileRows * kStripOutputs); });
}

template <int P, int B = kMostBlocks>
void accumulate_blocks(TileUnit& unit, int64_t num_blocks, const char* weights, const char* x,
                       int64_t num_steps, Fetch fetch, float* sums) {
    if constexpr (B > 1) {
        if (num_blocks < B)
            return accumulate_blocks<P, B - 1>(unit, num_blocks, weights, x, num_steps, fetch,
                                               sums);
    }
    accumulate<B, P>(unit, weights, x, num_steps, fetch, sums);
}

template <int P>
void strip(const MatmulParams& p, const Groups& groups, TileUnit& unit, int64_t index) {
    const int64_t bytes = strip_bytes(p.format, p.depth);
    const char* weights = static_cast<const char*>(p.weight) + index * bytes;
    const int64_t lines = divide_up(kLinesOfTile, groups.num_groups);
    const char* ahead = weights + (groups.num_groups > 1 && bytes > kAhead ? bytes : kAhead);
    for (int64_t g = 0; g < groups.num_groups; ++g) {
        alignas(64) float sums[kMostBlocks * kTileRows * kStripOutputs];
        const char* x = static_cast<const char*>(p.workspace) + groups.tile(g, 0) * kTileBytes;
        const Fetch fetch = {ahead + g * groups.num_steps * lines * kLine, lines};
        accumulate_blocks<P>(unit, groups.size(g), weights, x, groups.num_steps, fetch, sums);
        const int64_t first = groups.begin(g) * kTileRows, end = groups.begin(g + 1) * kTileRows;
        for (int64_t row = first; row < end && row < p.num_rows; ++row)
            finish_outputs(p, row, index * kStripOutputs, sums + (row - first) * kStripOutputs);
    }
}

}  // namespace

void matmul_tiles_split(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (p.num_rows == 0 || !is_any_open(p.openness)) return;
    const FlushDenormals guard;
    const Groups groups(p);
    const int64_t total = p.num_rows * groups.num_steps;
    for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i) {
        const int64_t row = i / groups.num_steps, step = i % groups.num_steps;
        const int64_t block = row / kTileRows, group = groups.group_of(block);
        bf16 parts[2][kTileDepth];
        const int64_t k = step * kTileDepth;
        split_step(p.x + row * p.x_stride + k, p.depth - k, parts[0], parts[1]);
        const int64_t tile = groups.tile(group, step) + block - groups.begin(group);
        for (int q = 0; q < groups.num_parts; ++q)
            std::memcpy(static_cast<char*>(p.workspace) +
                            (tile + q * groups.size(group)) * kTileBytes +
                            row % kTileRows * kTileRowBytes,
                        parts[q], sizeof parts[q]);
    }
}

void matmul_tiles_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (p.num_rows == 0 || !is_any_open(p.openness)) return;
    const FlushDenormals guard;
    TileUnit unit;
    const Groups groups(p);
    const int64_t strips = divide_up(p.num_outputs, kStripOutputs);
    for (int64_t s = strips * part / num_parts; s < strips * (part + 1) / num_parts; ++s)
        groups.num_parts == 2 ? strip<2>(p, groups, unit, s) : strip<1>(p, groups, unit, s);
}

}  // namespace specrt::SPECRT_ISA
