// The best score of every 64 tokens of a row of logits, as a key (core/score_key.h): what the
// product that makes the logits leaves, so that who chooses among them need not read all.
//
// For acceptance a score is the logit as it is; in a row that draws without a filter, logit /
// temperature + the target's noise, by the very steps that acceptance takes. Whole numbers of which
// the largest counts: however rows are split, the token is the same.
//
// For a drafter (tree_build) a score is the logit, in a row that samples logit / temperature, and
// in one that samples without a filter the noise is added. Where nothing samples a tile also has
// its mass, the sum of e^(logit - its best logit): of four tokens 16 apart first, then of sixteen
// in the tree of core/simd.h. Integers are what tiles come to (mass_in_row), in any order the same.
#pragma once
#include "core/mass.h"
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

// By what a row's tokens are scored.
struct Scoring {
    uint64_t seed, position;
    float temperature;  // 1: by the logits as they are
    bool draws;         // with noise
};

SPECRT_HD Scoring target_scoring(const SamplingRow& s, int64_t vocab, uint64_t position) {
    const bool draws = draws_unfiltered(s, vocab);
    return {s.seed, position, draws ? s.temperature : 1.0f, draws};
}

// s: nullptr where nobody samples.
SPECRT_HD Scoring draft_scoring(const SamplingRow* s, int64_t vocab, uint64_t position) {
    if (!s || !(s->temperature > 0.0f)) return {0, 0, 1.0f, false};
    return {s->seed, position, s->temperature, !is_filtered(*s, vocab)};
}

// A tile's mass as part of the row's, in units of core/mass.h; `below`: the tile's best logit - the
// row's. Below kNoTileMass 64 tokens have none.
constexpr float kNoTileMass = -32.0f;
SPECRT_HD uint64_t mass_in_row(float mass, float below) {
    if (!(below >= kNoTileMass)) return 0;
    return static_cast<uint64_t>(static_cast<int64_t>(mass * exp_of(below) * kMassOne));
}

// Keys, and what they are made by: row m of the logits is node m % nodes of sequence m / nodes.
struct TileMaxima {
    uint64_t* keys;               // [M, num_token_tiles(V)], or nullptr
    const SamplingRow* sampling;  // [B]; of a draft head perhaps nullptr
    const int32_t* history_len;   // [B]
    const int32_t* depth;         // [B, nodes]; of a draft head nullptr: all have `level`
    int64_t nodes;
    int64_t first_row;         // of a launch that does not begin with the first one
    float* masses;             // of a draft head: [M, num_token_tiles(V)], rows that do not sample
    const int32_t* token_map;  // of a draft head: [V], the token of each row, or nullptr
    int32_t level;
};

}  // namespace specrt
