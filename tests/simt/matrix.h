// ldmatrix and mma.sync, in the fragment layouts of the PTX ISA.
#pragma once
#include <cstdint>

#include "float16.h"

namespace simt {

void load_matrices(uint32_t* r, unsigned count, const void* row, bool is_transposed);

inline void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
    load_matrices(r, 1, row, false);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    load_matrices(r, 2, row, false);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    load_matrices(r, 4, row, false);
}
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
    load_matrices(r, 1, row, true);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    load_matrices(r, 2, row, true);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    load_matrices(r, 4, row, true);
}

// c (16 x 8) += a (16 x 16) b (16 x 8), in the arithmetic of the settings. "ieee": each element's
// 16 products are summed in float32 in index order, then added to c. No element depends on another
// row or column, whatever the arithmetic.
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16);
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half);

}  // namespace simt
