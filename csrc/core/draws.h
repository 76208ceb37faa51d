// Normal, Gamma and Beta variates as pure functions of (seed, position, index): the uniforms are
// Philox's of Purpose::kControl, read in order from `index` on. IEEE operations and core/philox.h's
// functions only, so every machine draws the same bits. (A compiler may not contract: build device
// code with -fmad=false.)
#pragma once
#include "core/philox.h"

namespace specrt {

// Where the next uniform comes from. A draw of the furthest kind, Beta, reads at most 530.
struct DrawStream {
    uint64_t seed, position;
    uint32_t index;
};

SPECRT_HD float draw_uniform(DrawStream* stream) {
    return uniform_from(philox(stream->seed, stream->position, Purpose::kControl, stream->index++));
}

// Standard normal, by Marsaglia's polar method. All tries are outside the disc once in 10^10.
SPECRT_HD double draw_normal(DrawStream* stream) {
    for (int tries = 0; tries < 16; ++tries) {
        const float x = 2.0f * draw_uniform(stream) - 1.0f;
        const float y = 2.0f * draw_uniform(stream) - 1.0f;
        const float square = fused_mul_add(x, x, y * y);
        if (square > 0.0f && square < 1.0f) return x * sqrt_of(-2.0 * log_of(square) / square);
    }
    return 0.0;
}

// The logarithm of a Gamma(shape, 1) variate: Marsaglia and Tsang, "A simple method for generating
// gamma variables", ACM TOMS 2000. Below shape 1 a variate of shape + 1 times U^(1/shape), which as
// a number would vanish for small shapes. A try fails at most once in 20.
SPECRT_HD double draw_log_gamma(double shape, DrawStream* stream) {
    const double raised = shape < 1.0 ? shape + 1.0 : shape;
    const double d = raised - 1.0 / 3.0, c = 1.0 / sqrt_of(9.0 * d);
    double log_cube = 0.0;
    for (int tries = 0; tries < 8; ++tries) {
        const double x = draw_normal(stream), root = 1.0 + c * x;
        const float u = draw_uniform(stream);
        if (root < 1e-30) continue;
        const double log_v = 3.0 * log_of(static_cast<float>(root));
        if (log_of(u) < 0.5 * x * x + d * (1.0 - root * root * root + log_v)) {
            log_cube = log_v;
            break;
        }
    }
    double drawn = log_of(static_cast<float>(d)) + log_cube;
    if (shape < 1.0) drawn += log_of(draw_uniform(stream)) / shape;
    return drawn;
}

// Beta(alpha, beta) as X / (X + Y) of two Gammas, in log space.
SPECRT_HD double draw_beta(double alpha, double beta, DrawStream* stream) {
    const double log_x = draw_log_gamma(alpha, stream), log_y = draw_log_gamma(beta, stream);
    const bool is_high = log_x > log_y;
    const double ratio = exp_of(static_cast<float>(is_high ? log_y - log_x : log_x - log_y));
    return is_high ? 1.0 / (1.0 + ratio) : ratio / (1.0 + ratio);
}

}  // namespace specrt
