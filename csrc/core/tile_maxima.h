// The best score of every 64 tokens of a row of logits, as a key (core/score_key.h): what the
// product that makes the logits leaves, so that acceptance need not read all of them.
//
// A score is the logit as it is; in a row that draws without a filter, logit / temperature + the
// target's noise, by the very steps that acceptance takes. Whole numbers of which the largest
// counts: however rows are split, the token is the same.
#pragma once
#include "core/philox.h"
#include "core/sampling_row.h"
#include "core/score_key.h"

namespace specrt {

constexpr int kTileTokens = kPhiloxBlock;

// Of tokens of which one is NaN or +inf; above all keys of scores.
constexpr uint64_t kBadKey = ~uint64_t{0};

SPECRT_HD int64_t num_token_tiles(int64_t vocab) {
    return (vocab + kTileTokens - 1) / kTileTokens;
}

// Whether a row's keys are those of scores with noise.
SPECRT_HD bool draws_unfiltered(const SamplingRow& s, int64_t vocab) {
    return s.temperature != 0.0f && !is_filtered(s, vocab);
}

// Keys, and what they are made by: row m of the logits is node m % nodes of sequence m / nodes.
struct TileMaxima {
    uint64_t* keys;               // [M, num_token_tiles(V)], or nullptr
    const SamplingRow* sampling;  // [B]
    const int32_t* history_len;   // [B]
    const int32_t* depth;         // [B, nodes]
    int64_t nodes;
    int64_t first_row;  // of a launch that does not begin with the first one
};

}  // namespace specrt
