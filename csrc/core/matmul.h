// y = x W^T (+ bias) (+ residual), weights streamed once, each row's bits its own: the one
// multiplication of all kernels that multiply by weights.
#pragma once
#include <vector>

#include "core/dispatch.h"
#include "core/matrix.h"
#include "core/open.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct MatmulParams {
    const float* x;         // [M, K]
    const void* weight;     // [N, K], as `format` says; rows are of `weight_dtype`
    const float* bias;      // [N] or nullptr
    const float* residual;  // [M, N] or nullptr; may be out
    float* out;             // [M, N]
    int64_t x_stride, residual_stride, out_stride;
    int64_t num_rows, num_outputs, depth;
    DType weight_dtype;
    const float* scale;  // [N], of e4m3 weights: before the bias; otherwise nullptr
    Openness openness = {};
    MatrixFormat format = MatrixFormat::kRows;
    void* workspace = nullptr;  // of matmul_workspace(K, M) floats, where the format is packed
};

SPECRT_DECLARE_CPU(matmul_part)
// Products by packed bfloat16, and what they need of the rows of x first: both of one set.
SPECRT_DECLARE_CPU(matmul_tiles_split)
SPECRT_DECLARE_CPU(matmul_tiles_part)
// The same of blocks.
SPECRT_DECLARE_CPU(round_rows_part)
SPECRT_DECLARE_CPU(matmul_blocks_part)
#if defined(SPECRT_X86)
namespace avx512vnni {
void round_rows_part(const void*, int, int);
void matmul_blocks_part(const void*, int, int);
}  // namespace avx512vnni
namespace avx512bf16 {
void matmul_tiles_split(const void*, int, int);
void matmul_tiles_part(const void*, int, int);
}  // namespace avx512bf16
namespace amx {
void matmul_tiles_split(const void*, int, int);
void matmul_tiles_part(const void*, int, int);
}  // namespace amx
#endif

// Floats of scratch in which a product by a packed matrix keeps rows of x as it multiplies them.
int64_t matmul_workspace(int64_t depth, int64_t num_rows);

// Appends the launches of one product.
void matmul(const MatmulParams& p, std::vector<Launch>* launches);

}  // namespace specrt
