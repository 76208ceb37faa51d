#include "core/noise_bits.h"
#include "core/sampling_filter.h"
#include "tree_accept/tree_accept.h"

namespace specrt::SPECRT_ISA {
namespace {

constexpr int32_t kBadRow = -1;               // NaN, +inf, or every token masked
const float kNoLogprob = __builtin_nanf("");  // -1 would be a plausible log-probability

// One part's scratch, in pieces of S floats (V rounded up to whole blocks of 64); what is not
// touched costs no memory:
//
//     0           1        2        3      4      5           6        7      8 S
//     | processed |      masses     |     keys    | block_max | counts | seen |
struct Workspace {
    float *processed, *block_max;
    uint64_t *masses, *keys;
    int32_t *counts, *seen;

    Workspace(float* base, int64_t vocab) {
        const int64_t size = (vocab + 63) / 64 * 64;
        processed = base;
        masses = reinterpret_cast<uint64_t*>(base + size);
        keys = reinterpret_cast<uint64_t*>(base + 3 * size);
        block_max = base + 5 * size;
        counts = reinterpret_cast<int32_t*>(base + 6 * size);
        seen = reinterpret_cast<int32_t*>(base + 7 * size);
    }
    FilterScratch filter_scratch() const { return {masses, keys, block_max}; }
};

// --- processing: transformers' order -------------------------------------------------------------
bool has_penalty(const SamplingRow& s) {
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

void penalise(float* row, const SamplingRow& s, const TokenCounts& tokens) {
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

// --- draws ---------------------------------------------------------------------------------------
int32_t first_equal(const float* row, int64_t start, float value) {
    while (row[start] != value) ++start;
    return static_cast<int32_t>(start);
}

struct GumbelSearch {
    const float* row;
    int64_t vocab;
    Filter filter;
    uint64_t seed, position;
    float best = -kInf;
    int32_t token = -1;

    // Skipping never changes the winner: float addition is monotone, so a value below `best` under
    // an upper bound of its noise is below it under the noise itself.
    void visit(int64_t block, float top) {
        if (top < filter.cut || top == -kInf || top + kMaxGumbel < best) return;
        uint32_t bits[kBlock];
        noise_bits(seed, position, static_cast<uint32_t>(block), bits);
        const int64_t start = block * kBlock;
        const int n = static_cast<int>(start + kBlock < vocab ? kBlock : vocab - start);
        uint32_t lowest = bits[0];
        for (int i = 1; i < kBlock; ++i) lowest = bits[i] < lowest ? bits[i] : lowest;
        const float bound = gumbel_bound(lowest);
        if (top + bound < best) return;
        for (int i = 0; i < n; ++i) {
            const float x = row[start + i];
            if (x == -kInf || x + bound < best || !filter.keeps(x, start + i)) continue;
            const float score = x + gumbel_from(bits[i]);
            const int32_t id = static_cast<int32_t>(start + i);
            if (score > best || (score == best && id < token)) {
                best = score;
                token = id;
            }
        }
    }
};

int32_t draw_seeded(const float* row, int64_t vocab, const RowMax& top, const Filter& filter,
                    uint64_t seed, uint64_t position, const float* block_max) {
    GumbelSearch search{row, vocab, filter, seed, position};
    search.visit(top.block, top.value);  // a good first bound
    for (int64_t block = 0; block * kBlock < vocab; ++block)
        if (block != top.block) search.visit(block, block_max[block]);
    return search.token;
}

// The first token whose inclusive prefix sum is above floor(u * total), which is below the total.
int32_t draw_by_mass(const uint64_t* masses, int64_t vocab, uint64_t total, float u) {
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

float logprob_of(const float* row, int64_t vocab, int32_t token) {
    const RowMax top = scan_row(row, nullptr, 1.0f, vocab, nullptr);
    if (top.is_bad || top.value == -kInf) return kNoLogprob;  // edits may have mended the row
    return row[token] - top.value - log_of_mass(total_mass(row, nullptr, vocab, top.value));
}

// --- one sequence --------------------------------------------------------------------------------
// What a sequence gets that cannot be drawn from.
void write_nothing(const TreeAcceptParams& p, int64_t b) {
    for (int64_t i = b * p.path_size; i < (b + 1) * p.path_size; ++i) {
        p.path[i] = p.tokens[i] = -1;
        if (p.logprobs) p.logprobs[i] = kNoLogprob;
    }
    p.accept_length[b] = -1;
}

struct Walk {
    const TreeAcceptParams& p;
    int64_t b;
    Workspace w;
    const SamplingRow& s;
    TokenCounts counts;
    bool is_greedy, edits_row, counts_tokens;
    int64_t num_nodes;

    Walk(const TreeAcceptParams& params, int64_t sequence, float* scratch)
        : p(params),
          b(sequence),
          w(scratch, params.vocab),
          s(params.sampling[sequence]),
          counts{w.counts, w.seen, 0, params.vocab},
          is_greedy(s.temperature == 0.0f) {
        counts_tokens = has_penalty(s);
        edits_row = counts_tokens || s.bias_end > s.bias_begin;
        num_nodes = p.num_nodes[b] < 1 ? 1 : p.num_nodes[b] > p.nodes ? p.nodes : p.num_nodes[b];
        if (counts_tokens) count_history();
    }

    const int32_t* parents() const { return p.parents + b * p.nodes; }
    const int32_t* draft_tokens() const { return p.draft_tokens + b * p.nodes; }
    const float* logits(int64_t node) const {
        return p.logits + b * p.logits_stride[0] + node * p.logits_stride[1];
    }
    uint64_t position(int64_t depth) const {
        return static_cast<uint64_t>(p.history_len[b]) + static_cast<uint64_t>(depth);
    }

    void count_history() {
        std::memset(w.counts, 0, static_cast<size_t>(p.vocab) * sizeof(int32_t));
        const int32_t* tokens = p.history + b * p.history_stride;
        const int64_t n = p.history_len[b] < p.history_size ? p.history_len[b] : p.history_size;
        for (int64_t i = 0; i < n; ++i) counts.add(tokens[i], i >= s.prompt_len);
    }

    // Ids outside of the vocabulary have no logit to add to.
    void add_bias() {
        const int64_t end = s.bias_end < p.num_bias ? s.bias_end : p.num_bias;
        for (int64_t i = s.bias_begin < 0 ? 0 : s.bias_begin; i < end; ++i) {
            const int32_t v = p.bias_ids[i];
            if (0 <= v && v < p.vocab) w.processed[v] += p.bias_values[i];
        }
    }

    // The node's logits after bias, penalties and temperature, and their maximum.
    const float* process(int64_t node, RowMax* top) {
        const float* row = logits(node);
        const bool scales = !is_greedy && s.temperature != 1.0f;
        if (edits_row) {
            std::memcpy(w.processed, row, static_cast<size_t>(p.vocab) * sizeof(float));
            add_bias();
            if (counts_tokens) penalise(w.processed, s, counts);
            row = w.processed;
        }
        float* dst = scales ? w.processed : nullptr;
        *top = scan_row(row, dst, s.temperature, p.vocab, is_greedy ? nullptr : w.block_max);
        return dst ? dst : row;
    }

    Filter kept_set(const float* row, float top) const {
        return make_filter(row, p.vocab, top, {s.top_k, s.top_p, s.min_p}, w.filter_scratch());
    }

    int64_t child_holding(int64_t node, int32_t token) const {
        for (int64_t j = node + 1; j < num_nodes; ++j)
            if (parents()[j] == node && draft_tokens()[j] == token) return j;
        return -1;
    }

    bool has_children(int64_t node) const {
        for (int64_t j = node + 1; j < num_nodes; ++j)
            if (parents()[j] == node) return true;
        return false;
    }

    // Rejection over the children in order; returns the token, and the child that holds it or -1.
    int32_t draw_by_rejection(int64_t node, int64_t depth, const float* row, float top,
                              const Filter& filter, int64_t* child) {
        Law law{w.masses, w.keys, fill_masses(row, p.vocab, top, filter, w.masses)};
        const float* q = p.draft_probs + b * p.probs_stride[0] + node * p.probs_stride[1];
        uint32_t sibling = 0;
        for (int64_t j = node + 1; j < num_nodes; ++j) {
            if (parents()[j] != node) continue;
            const int32_t x = draft_tokens()[j];
            const float u =
                uniform_from(philox(s.seed, position(depth), Purpose::kAccept, sibling++));
            // A child its own law excludes was not drawn from it: subtracting would bias.
            if (x < 0 || x >= p.vocab || !(q[x] > 0.0f)) continue;
            if (accepts(u, q[x], law.masses[x], law.total)) {
                *child = j;
                return x;
            }
            law.subtract(q, p.vocab);
        }
        return draw_by_mass(law.masses, p.vocab, law.total,
                            uniform_from(philox(s.seed, position(depth), Purpose::kResidual, 0)));
    }

    // The target's token at `node`, and the child to descend into or -1.
    int32_t draw(int64_t node, int64_t depth, int64_t* child) {
        RowMax top;
        *child = -1;
        const float* row = process(node, &top);
        if (top.is_bad || top.value == -kInf) return kBadRow;
        int32_t token;
        if (is_greedy) {
            token = first_equal(row, top.block * kBlock, top.value);
        } else {
            const Filter filter = kept_set(row, top.value);
            if (p.draft_probs && has_children(node))
                return draw_by_rejection(node, depth, row, top.value, filter, child);
            token = draw_seeded(row, p.vocab, top, filter, s.seed, position(depth), w.block_max);
        }
        *child = child_holding(node, token);
        return token;
    }

    void run() {
        int32_t* path = p.path + b * p.path_size;
        int32_t* tokens = p.tokens + b * p.path_size;
        float* logprobs = p.logprobs ? p.logprobs + b * p.path_size : nullptr;
        write_nothing(p, b);
        int64_t node = 0, child = -1;
        for (int64_t depth = 0;; ++depth) {
            const int32_t token = draw(node, depth, &child);
            if (token == kBadRow) return write_nothing(p, b);
            path[depth] = static_cast<int32_t>(node);
            tokens[depth] = token;
            if (logprobs) logprobs[depth] = logprob_of(logits(node), p.vocab, token);
            p.accept_length[b] = static_cast<int32_t>(depth);
            if (child < 0) return;
            if (counts_tokens) counts.add(token, true);
            node = child;
        }
    }

    void write_processed(float* out) {
        RowMax top;
        const float* row = process(0, &top);
        Filter filter;
        if (!is_greedy) filter = kept_set(row, top.value);
        for (int64_t v = 0; v < p.vocab; ++v) out[v] = filter.keeps(row[v], v) ? row[v] : -kInf;
    }
};

}  // namespace

void tree_accept_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeAcceptParams*>(params);
    float* scratch = p.workspace ? p.workspace + part * tree_accept_workspace(p.vocab) : nullptr;
    for (int64_t b = p.batch * part / num_parts; b < p.batch * (part + 1) / num_parts; ++b) {
        // The host saw to it, but rows may have changed since the launch was recorded.
        if (!scratch && !is_plain_greedy(p.sampling[b])) {
            write_nothing(p, b);
        } else {
            Walk(p, b, scratch).run();
        }
    }
}

void processed_logits_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeAcceptParams*>(params);
    float* scratch = p.workspace + part * tree_accept_workspace(p.vocab);
    for (int64_t b = p.batch * part / num_parts; b < p.batch * (part + 1) / num_parts; ++b)
        Walk(p, b, scratch).write_processed(p.logprobs + b * p.vocab);
}

void exponentials_part(const void* params, int, int) {
    const auto& p = *static_cast<const ExponentialsParams*>(params);
    for (int64_t j = 0; j < p.count; ++j) p.exps[j] = p.x[j] < 0.0f ? p.x[j] : 0.0f;
    store_masses(p.exps, p.count, 0.0f, p.masses);
    int64_t i = 0;
    for (; i + 16 <= p.count; i += 16) store(exp(load(p.x + i)), p.exps + i);
    const int rest = static_cast<int>(p.count - i);
    if (rest > 0) store_first(exp(load_first(p.x + i, rest)), p.exps + i, rest);
}

}  // namespace specrt::SPECRT_ISA
