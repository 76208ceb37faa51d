// What acceptance on a CPU makes of a row of logits: penalties, and draws from what is kept.
#pragma once
#include "core/noise_bits.h"
#include "core/sampling_filter.h"
#include "tree_accept/tree_accept.h"

namespace specrt::SPECRT_ISA {

constexpr int32_t kBadRow = -1;  // NaN, +inf, or every token masked

inline bool has_penalty(const SamplingRow& s) {
    return s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f ||
           s.frequency_penalty != 0.0f;
}

// counts[v] is 1 + the number of output tokens v once v was seen at all, else 0.
struct TokenCounts {
    int32_t *counts, *seen;
    int64_t num_seen = 0, vocab;

    void add(int64_t token, bool is_output) {
        if (token < 0 || token >= vocab) return;
        if (counts[token] == 0) {
            counts[token] = 1;
            seen[num_seen++] = static_cast<int32_t>(token);
        }
        counts[token] += is_output;
    }
};

// In transformers' order.
inline void penalise(float* row, const SamplingRow& s, const TokenCounts& tokens) {
    for (int64_t i = 0; i < tokens.num_seen; ++i) {
        const int32_t v = tokens.seen[i];
        const int32_t num_output = tokens.counts[v] - 1;
        float x = row[v];
        x = x < 0.0f ? x * s.repetition_penalty : x / s.repetition_penalty;
        x -= s.frequency_penalty * static_cast<float>(num_output);
        if (num_output > 0) x -= s.presence_penalty;
        row[v] = x;
    }
}

inline int32_t first_equal(const float* row, int64_t start, float value) {
    while (row[start] != value) ++start;
    return static_cast<int32_t>(start);
}

// The token of the best logit + noise among the kept ones, or of those it has been shown.
struct Draw {
    float score = -kInf;
    int32_t token = -1;

    void offer(Draw other) {
        if (other.token < 0) return;
        if (other.score > score || (other.score == score && other.token < token)) *this = other;
    }
};

struct GumbelSearch {
    const float* row;
    int64_t vocab;
    Filter filter;
    uint64_t seed, position;
    Draw best;

    // Skipping never changes the winner: float addition is monotone, so a value below the best
    // under an upper bound of its noise is below it under the noise itself.
    void visit(int64_t block, float top) {
        if (top < filter.cut || top == -kInf || top + kMaxGumbel < best.score) return;
        uint32_t bits[kBlock];
        noise_bits(seed, position, static_cast<uint32_t>(block), bits);
        const int64_t start = block * kBlock;
        const int n = static_cast<int>(start + kBlock < vocab ? kBlock : vocab - start);
        uint32_t lowest = bits[0];
        for (int i = 1; i < kBlock; ++i) lowest = bits[i] < lowest ? bits[i] : lowest;
        if (top + coarse_gumbel_bound(lowest) < best.score) return;
        const float bound = gumbel_bound(lowest);
        if (top + bound < best.score) return;
        for (int i = 0; i < n; ++i) {
            const float x = row[start + i];
            if (x == -kInf || x + bound < best.score || !filter.keeps(x, start + i)) continue;
            best.offer({x + gumbel_from(bits[i]), static_cast<int32_t>(start + i)});
        }
    }
};

// The first token whose inclusive prefix sum is above floor(u * total), which is below the total.
inline int32_t draw_by_mass(const uint64_t* masses, int64_t vocab, uint64_t total, float u) {
    const uint64_t drawn = drawn_mass(u, total);
    uint64_t sum = 0;
    for (int64_t v = 0; v < vocab; ++v) {
        sum += masses[v];
        if (sum > drawn) return static_cast<int32_t>(v);
    }
    return kBadRow;
}

// A law's masses, and room for those of its residual.
struct Law {
    uint64_t *masses, *spare, total;

    // The law becomes relu(law - q), normalised; nothing changes if that is empty (then the two are
    // equal up to rounding, and the masses as they are serve as well).
    void subtract(const float* q, int64_t vocab) {
        uint64_t rest = 0;
        for (int64_t v = 0; v < vocab; ++v) {
            spare[v] = residual_mass(masses[v], total, q[v]);
            rest += spare[v];
        }
        if (rest == 0) return;
        uint64_t* former = masses;
        masses = spare;
        spare = former;
        total = rest;
    }
};

// -1 would be a plausible log-probability.
inline float no_logprob() {
    return __builtin_nanf("");
}

inline float logprob_of(const float* row, int64_t vocab, int32_t token) {
    const RowMax top = scan_row(row, nullptr, 1.0f, vocab, nullptr);
    if (top.is_bad || top.value == -kInf) return no_logprob();  // edits may have mended the row
    return row[token] - top.value - log_of_mass(total_mass(row, nullptr, vocab, top.value));
}

}  // namespace specrt::SPECRT_ISA
