// How long to draft: what is believed of one sequence, the decision after each drafted token, and
// what a verified round teaches. Scalar code for host and device, in doubles; see draws.h.
//
// EESD (arXiv 2406.03853) gives beta-ts and calibration-ts in outline; the formulas are our
// reading.
//
// HAZARD: cost-aware may drop the last drafted token after having seen its confidence. That is
// unbiased only for drafts checked by equality with the target's own token (deterministic ones, or
// ones coupled to its noise): they move what is verified, never what is said. A drafter that
// samples and hands over draft_probs must not use it.
#pragma once
#include "core/draws.h"

namespace specrt {

enum ControlKind : int32_t {
    kFixed,
    kThreshold,
    kAdaptiveThreshold,
    kBetaTs,
    kCalibrationTs,
    kCostAware,
    kNumControlKinds
};

constexpr int kNumBins = 8;  // of the confidence, equally wide

// The three records are rows of float64 tensors: doubles only, in this order (specrt/ops).
struct ControlSettings {
    double draft_len, threshold, adapt_rate, target_rejection;
    double alpha, beta, bias_mean, bias_var, noise_var, discount;
    double gain_mean, gain_weight, gain_var;  // prior of a drafted round's gain, and its noise
};

struct Posterior {
    double alpha, beta;                 // of one drafted token's acceptance
    double bias_precision, bias_shift;  // of accepted - confidence: 1 / variance, mean / variance
    double threshold;                   // adaptive-threshold
    double gain_weight, gain_sum;       // drafted rounds' gain in tokens: weight, weight * mean
    double tokens, time;                // of past rounds, discounted
    double idle;                        // rounds since one was drafted
    double next_alpha[kNumBins];        // by bin of s_j: d_j was accepted, was d_{j + 1}?
    double next_beta[kNumBins];
};

// Milliseconds. plain round = lower + verify.
struct DraftCosts {
    double fixed;   // what a drafted round has on top, however short
    double step;    // lower layers, exit and head for one node; the root is the first
    double lower;   // the lower layers of a node
    double verify;  // upper layers, head and acceptance of one row
    double row;     // of each further row
};

// What one sequence drafted in a round.
struct DraftedRound {
    int32_t limit;            // tokens it might have drafted
    int32_t drafted, kept;    // kept: those verified, `drafted` or one less
    int32_t accepted;         // -1: the sequence failed
    const float* confidence;  // [drafted]
};

SPECRT_HD double clip(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

SPECRT_HD double forget(double value, double prior, double discount) {
    return prior + discount * (value - prior);
}

SPECRT_HD int bin_of(double confidence) {
    const double bin = confidence * kNumBins;
    if (!(bin > 0.0)) return 0;  // NaN too
    return bin < kNumBins ? static_cast<int>(bin) : kNumBins - 1;
}

// (alpha, beta) = (1, 1) expects as much of the next token as of this one, with the weight of two.
SPECRT_HD double bin_alpha(const ControlSettings& s, int bin) {
    return s.alpha * (2 * bin + 1) / kNumBins;
}
SPECRT_HD double bin_beta(const ControlSettings& s, int bin) {
    return s.beta * (2 * (kNumBins - bin) - 1) / kNumBins;
}

SPECRT_HD void set_prior(const ControlSettings& s, Posterior* q) {
    q->alpha = s.alpha;
    q->beta = s.beta;
    q->bias_precision = 1.0 / s.bias_var;
    q->bias_shift = s.bias_mean / s.bias_var;
    q->threshold = s.threshold;
    q->gain_weight = s.gain_weight;
    q->gain_sum = s.gain_weight * s.gain_mean;
    q->tokens = q->time = q->idle = 0.0;
    for (int bin = 0; bin < kNumBins; ++bin) {
        q->next_alpha[bin] = bin_alpha(s, bin);
        q->next_beta[bin] = bin_beta(s, bin);
    }
}

// --- confidence

// score: ln of the drafted token's probability. With a calibration head (evidence and slope)
// sigmoid(evidence + slope * logit(exp(score))).
SPECRT_HD float confidence_of(float score, const float* evidence, const float* slope) {
    const float chance = exp_of(score);
    if (!evidence) return chance > 1.0f ? 1.0f : chance;
    const float c = chance < 1e-6f ? 1e-6f : chance > 1.0f - 1e-6f ? 1.0f - 1e-6f : chance;
    const float logit = log_of(c) - log_of(1.0f - c);
    return 1.0f / (1.0f + exp_of(-fused_mul_add(*slope, logit, *evidence)));
}

// --- time

SPECRT_HD double plain_time(const DraftCosts& c) {
    return c.lower + c.verify;
}

// A step runs the lower layers of the node it starts from, so those of the root and of all drafted
// tokens but the last are done when drafting ends; the last one's run only if it is kept.
SPECRT_HD double round_time(const DraftCosts& c, int drafted, int kept) {
    if (drafted == 0) return plain_time(c);
    const double last = kept == drafted ? c.lower : 0.0;
    return c.fixed + drafted * c.step + last + c.verify + kept * c.row;
}

// Tokens per millisecond: what time is worth. Plain decoding is always to be had.
SPECRT_HD double token_rate(const Posterior& q, const DraftCosts& c) {
    const double plain = 1.0 / plain_time(c);
    const double seen = q.time > 0.0 ? q.tokens / q.time : 0.0;
    return seen > plain ? seen : plain;
}

// --- decisions

// Uniform 0 of a step decides with a probability; variates begin at 1. The bias that a cost-aware
// round believes in is drawn once, from the second half of step 0.
constexpr uint32_t kStepDraws = 1024, kRoundBias = 512;

SPECRT_HD DrawStream stream_at(uint64_t seed, uint64_t position, int step, uint32_t offset) {
    return {seed, position, static_cast<uint32_t>(step) * kStepDraws + offset};
}

SPECRT_HD double draw_bias(const Posterior& q, DrawStream stream) {
    return q.bias_shift / q.bias_precision + draw_normal(&stream) / sqrt_of(q.bias_precision);
}

// Whether to draft this round at all: a draw of the gain that a drafted round brings.
SPECRT_HD bool starts(int32_t kind, const ControlSettings& s, const Posterior& q, uint64_t seed,
                      uint64_t position) {
    if (kind != kCostAware) return true;
    DrawStream stream = stream_at(seed, position, 0, 1);
    const double mean = q.gain_sum / q.gain_weight;
    return mean + sqrt_of(s.gain_var / q.gain_weight) * draw_normal(&stream) > 0.0;
}

// The drawn chance that all of `count` drafted tokens are accepted.
SPECRT_HD double path_chance(const Posterior& q, const float* confidence, int count, uint64_t seed,
                             uint64_t position) {
    const double bias = draw_bias(q, stream_at(seed, position, 0, kRoundBias));
    double chance = 1.0;
    for (int i = 0; i < count; ++i) chance *= clip(confidence[i] + bias, 0.0, 1.0);
    return chance;
}

// Whether to draft another token after `count`; the confidences of those are known.
SPECRT_HD bool goes_on(int32_t kind, const ControlSettings& s, const Posterior& q,
                       const DraftCosts& c, const float* confidence, int count, uint64_t seed,
                       uint64_t position) {
    const double last = confidence[count - 1];
    DrawStream coin = stream_at(seed, position, count, 0);
    DrawStream variate = stream_at(seed, position, count, 1);
    switch (kind) {
        case kFixed:
            return count < s.draft_len;
        case kThreshold:
        case kAdaptiveThreshold:
            return last >= q.threshold;
        case kBetaTs:
            return draw_uniform(&coin) < draw_beta(q.alpha, q.beta, &variate);
        case kCalibrationTs:
            return draw_uniform(&coin) < clip(last + draw_bias(q, variate), 0.0, 1.0);
        default: {
            const int bin = bin_of(last);
            const double next = draw_beta(q.next_alpha[bin], q.next_beta[bin], &variate);
            return path_chance(q, confidence, count, seed, position) * next >
                   token_rate(q, c) * (c.step + c.row);
        }
    }
}

// Whether the last of `count` drafted tokens is worth verifying. The first token after undrafted
// rounds always is: it was drafted to learn.
SPECRT_HD bool keeps_last(int32_t kind, const Posterior& q, const DraftCosts& c,
                          const float* confidence, int count, uint64_t seed, uint64_t position) {
    if (kind != kCostAware || (count == 1 && q.idle > 0.0)) return true;
    return path_chance(q, confidence, count, seed, position) >=
           token_rate(q, c) * (c.lower + c.row);
}

// --- learning

// Tokens behind the first rejection say nothing.
SPECRT_HD int num_judged(const DraftedRound& r) {
    return r.accepted < r.kept ? r.accepted + 1 : r.kept;
}

SPECRT_HD void learn_acceptance(const ControlSettings& s, const DraftedRound& r, Posterior* q) {
    q->alpha = forget(q->alpha, s.alpha, s.discount) + r.accepted;
    q->beta = forget(q->beta, s.beta, s.discount) + (r.accepted < r.kept ? 1.0 : 0.0);
}

// Stochastic approximation of the threshold under which a share target_rejection of the rounds has
// a drafted token rejected: there its expected move is 0.
SPECRT_HD void learn_threshold(const ControlSettings& s, const DraftedRound& r, Posterior* q) {
    const double missed = (r.accepted < r.kept ? 1.0 : 0.0) - s.target_rejection;
    q->threshold = clip(q->threshold + s.adapt_rate * missed, 0.02, 0.98);
}

// Gaussian conjugacy: each residual accepted - s of a judged token weighs 1 / noise_var.
SPECRT_HD void learn_bias(const ControlSettings& s, const DraftedRound& r, Posterior* q) {
    const double prior = 1.0 / s.bias_var, judged = num_judged(r);
    double residuals = r.accepted;
    for (int i = 0; i < num_judged(r); ++i) residuals -= r.confidence[i];
    q->bias_precision = forget(q->bias_precision, prior, s.discount) + judged / s.noise_var;
    q->bias_shift =
        forget(q->bias_shift, prior * s.bias_mean, s.discount) + residuals / s.noise_var;
}

SPECRT_HD void learn_next(const ControlSettings& s, const DraftedRound& r, Posterior* q) {
    for (int bin = 0; bin < kNumBins; ++bin) {
        q->next_alpha[bin] = forget(q->next_alpha[bin], bin_alpha(s, bin), s.discount);
        q->next_beta[bin] = forget(q->next_beta[bin], bin_beta(s, bin), s.discount);
    }
    for (int i = 1; i < num_judged(r); ++i) {
        const int bin = bin_of(r.confidence[i - 1]);
        (i < r.accepted ? q->next_alpha : q->next_beta)[bin] += 1.0;
    }
}

// The gain of a drafted round: its tokens less those of plain decoding in the same time. Forgotten
// in undrafted rounds too, so that drafting is tried again.
SPECRT_HD void learn_gain(const ControlSettings& s, const DraftCosts& c, const DraftedRound& r,
                          Posterior* q) {
    const double time = round_time(c, r.drafted, r.kept), tokens = r.accepted + 1.0;
    q->tokens = s.discount * q->tokens + tokens;
    q->time = s.discount * q->time + time;
    q->gain_weight = forget(q->gain_weight, s.gain_weight, s.discount);
    q->gain_sum = forget(q->gain_sum, s.gain_weight * s.gain_mean, s.discount);
    if (r.drafted > 0) {
        q->gain_weight += 1.0;
        q->gain_sum += tokens - time / plain_time(c);
        q->idle = 0.0;
    } else if (r.limit > 0) {
        q->idle += 1.0;
    }
}

SPECRT_HD void learn(int32_t kind, const ControlSettings& s, const DraftCosts& c,
                     const DraftedRound& r, Posterior* q) {
    if (r.accepted < 0) return;
    if (r.kept > 0) {
        if (kind == kBetaTs) learn_acceptance(s, r, q);
        if (kind == kAdaptiveThreshold) learn_threshold(s, r, q);
        if (kind == kCalibrationTs || kind == kCostAware) learn_bias(s, r, q);
        if (kind == kCostAware) learn_next(s, r, q);
    }
    if (kind == kCostAware) learn_gain(s, c, r, q);
}

}  // namespace specrt
