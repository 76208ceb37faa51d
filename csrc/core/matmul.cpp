#include "core/matmul.h"

namespace specrt {

int64_t matmul_workspace(int64_t depth, int64_t num_rows) {
    // Two floats a value, and some words a row and a group of values, in whole tiles of rows.
    const int64_t padded = divide_up(depth, kTileDepth) * kTileDepth;
    return divide_up(num_rows, kStripOutputs) * kStripOutputs * (2 * padded + padded / 8 + 32);
}

namespace {

// Splitting fewer values is not worth another thread.
constexpr int64_t kPartValues = 2048;
constexpr int64_t kPanelStrips = 2;  // of the widest kernels, which halve none

// What is made of the rows of x first, and what multiplies them.
struct Product {
    PartFn prepare, multiply;
};

Product tile_product(Isa isa) {
#if defined(SPECRT_X86)
    if (isa == Isa::kAmx) return {amx::matmul_tiles_split, amx::matmul_tiles_part};
    if (isa == Isa::kAvx512Bf16)
        return {avx512bf16::matmul_tiles_split, avx512bf16::matmul_tiles_part};
#endif
    return {matmul_tiles_split_for(isa), matmul_tiles_part_for(isa)};
}

Product block_product(Isa isa) {
#if defined(SPECRT_X86)
    if (isa >= Isa::kAvx512Vnni)
        return {avx512vnni::round_rows_part, avx512vnni::matmul_blocks_part};
#endif
    return {round_rows_part_for(isa), matmul_blocks_part_for(isa)};
}

// A lone row waits for memory whatever multiplies, and vectors need no launch to split it first.
Isa isa_of_lone_row() {
    const Isa isa = active_isa();
    if (isa != Isa::kAmx) return isa;
    return cpu_has(Isa::kAvx512Bf16) ? Isa::kAvx512Bf16 : Isa::kAvx512;
}

void matmul_tiles(const MatmulParams& p, std::vector<Launch>* launches) {
    const bool is_lone = p.num_rows == 1;
    const Product product = tile_product(is_lone ? isa_of_lone_row() : active_isa());
    if (!is_lone)
        launches->push_back(
            make_launch(product.prepare, p, 1 + p.num_rows * p.depth / kPartValues));
    const int64_t panels = divide_up(p.num_outputs, kPanelStrips * kStripOutputs);
    const int64_t bytes = kPanelStrips * strip_bytes(p.format, p.depth);
    launches->push_back(make_launch(product.multiply, p, split_strips(panels, bytes, p.num_rows)));
}

void matmul_blocks(const MatmulParams& p, std::vector<Launch>* launches) {
    const Product product = block_product(active_isa());
    launches->push_back(make_launch(product.prepare, p, 1 + p.num_rows * p.depth / kPartValues));
    const int64_t strips = divide_up(p.num_outputs, kStripOutputs);
    const Split split = split_strips(strips, strip_bytes(p.format, p.depth), p.num_rows);
    launches->push_back(make_launch(product.multiply, p, split));
}

}  // namespace

void matmul(const MatmulParams& p, std::vector<Launch>* launches) {
    if (is_in_blocks(p.format)) return matmul_blocks(p, launches);
    if (p.format != MatrixFormat::kRows) return matmul_tiles(p, launches);
    // A part of less than ~8k multiply-adds is not worth another thread.
    const int64_t parts = 1 + p.num_rows * p.num_outputs * p.depth / 8192;
    launches->push_back(make_launch(matmul_part_for(active_isa()), p, parts));
}

}  // namespace specrt
