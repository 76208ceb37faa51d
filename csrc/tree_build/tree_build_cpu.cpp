#include "core/noise_bits.h"
#include "core/sampling_filter.h"
#include "core/score_key.h"
#include "tree_build/level.h"

namespace specrt::SPECRT_ISA {
namespace {

const float kNaN = __builtin_nanf("");

// --- best first, ties by index
// The best `capacity` of what was offered, best first.
struct Best {
    static constexpr int kMax = kMaxTopK > kMaxNodes ? kMaxTopK : kMaxNodes;
    int capacity, count = 0;
    float bound = -kInf;  // a score below it is out
    uint64_t keys[kMax];

    explicit Best(int64_t size) : capacity(static_cast<int>(size)) {}
    bool is_full() const { return count == capacity; }

    void offer(float score, int64_t index) {
        if (score < bound) return;
        const uint64_t key = key_of(score, static_cast<int32_t>(index));
        if (is_full() && key < keys[count - 1]) return;
        int at = is_full() ? count - 1 : count++;
        for (; at > 0 && keys[at - 1] < key; --at) keys[at] = keys[at - 1];
        keys[at] = key;
        const float last = score_of(keys[count - 1]);
        if (is_full() && last == last) bound = last;
    }

    // Rows too short of usable values: the first indices not taken, all with the same score.
    void fill(float score) {
        const int taken = count;
        for (int32_t index = 0; count < capacity; ++index) {
            bool is_taken = false;
            for (int j = 0; j < taken; ++j) is_taken = is_taken || index_of(keys[j]) == index;
            if (!is_taken) keys[count++] = key_of(score, index);
        }
    }
};

// --- children
// One part's scratch, in pieces of S floats (R rounded up to whole blocks of 64):
//
//     0           1        2        3      4      5           6 S
//     | processed |      masses     |     keys    | block_max |
struct Scratch {
    float *processed, *block_max;
    uint64_t *masses, *keys;

    Scratch(float* base, int64_t rows) {
        const int64_t size = (rows + 63) / 64 * 64;
        processed = base;
        masses = reinterpret_cast<uint64_t*>(base + size);
        keys = reinterpret_cast<uint64_t*>(base + 3 * size);
        block_max = base + 5 * size;
    }
};

struct Expansion {
    const TreeExpandParams& p;
    int64_t b, f;
    const SamplingRow* s;  // nullptr: ranked plainly
    Scratch w;

    Expansion(const TreeExpandParams& params, int64_t row, float* scratch)
        : p(params),
          b(row / params.width),
          f(row % params.width),
          s(params.sampling && params.sampling[b].temperature > 0.0f ? params.sampling + b
                                                                     : nullptr),
          w(scratch, params.rows) {}

    // The K-th best block maximum: K values at least are no less, so no smaller one is chosen.
    float least_chosen() const {
        Best maxima(p.top_k);
        const int64_t blocks = (int64_t{p.rows} + kBlock - 1) / kBlock;
        for (int64_t block = 0; block < blocks; ++block) maxima.offer(w.block_max[block], block);
        return maxima.bound;
    }

    // Scores relative to the parent's, best first.
    void rank_plain(const float* row, const RowMax& top, Best* best, float* increments) const {
        best->bound = least_chosen();
        for (int64_t start = 0, block = 0; start < p.rows; start += kBlock, ++block) {
            if (w.block_max[block] < best->bound) continue;
            const int64_t end = start + kBlock < p.rows ? start + kBlock : p.rows;
            for (int64_t i = start; i < end; ++i)
                if (row[i] >= best->bound && row[i] > -kInf) best->offer(row[i], i);
        }
        const float log_sum =
            log_of_mass(mass_of_tiles(row, w.block_max, p.rows, top.value, w.processed));
        for (int j = 0; j < best->count; ++j) {
            const float x = row[index_of(best->keys[j])] - top.value - log_sum;
            increments[j] = x < 0.0f ? x : 0.0f;
        }
    }

    void block_noise(int64_t block, uint64_t position, uint32_t* bits) const {
        const uint64_t seed = s->seed;
        if (!p.token_map) return noise_bits(seed, position, static_cast<uint32_t>(block), bits);
        uint32_t tokens[kBlock] = {};
        const int64_t start = block * kBlock;
        const int64_t n = start + kBlock < p.rows ? kBlock : p.rows - start;
        std::memcpy(tokens, p.token_map + start, static_cast<size_t>(n) * sizeof(int32_t));
        noise_bits_at(seed, position, tokens, bits);
    }

    // As tree_accept's search for the best, whose bounds hold for the K best as well.
    void visit(const float* row, int64_t block, float top, const Filter& filter, uint64_t position,
               Best* best) const {
        if (top < filter.cut || top == -kInf || top + kMaxGumbel < best->bound) return;
        uint32_t bits[kBlock];
        block_noise(block, position, bits);
        const int64_t start = block * kBlock;
        const int n = static_cast<int>(start + kBlock < p.rows ? kBlock : p.rows - start);
        uint32_t lowest = bits[0];
        for (int i = 1; i < kBlock; ++i) lowest = bits[i] < lowest ? bits[i] : lowest;
        const float bound = gumbel_bound(lowest);
        for (int i = 0; i < n; ++i) {
            const float x = row[start + i];
            if (x == -kInf || x + bound < best->bound || !filter.keeps(x, start + i)) continue;
            best->offer(x + gumbel_from(bits[i]), start + i);
        }
    }

    void rank_coupled(const float* row, const RowMax& top, Best* best, float* increments) const {
        const FilterParams params{s->top_k, s->top_p < 0.0 ? 0.0 : s->top_p, s->min_p};
        const Filter filter =
            make_filter(row, p.rows, top.value, params, {w.masses, w.keys, w.block_max});
        const uint64_t position = static_cast<uint64_t>(p.position[b] + int64_t{p.level});
        visit(row, top.block, top.value, filter, position, best);  // a good first bound
        for (int64_t block = 0; block * kBlock < p.rows; ++block)
            if (block != top.block) visit(row, block, w.block_max[block], filter, position, best);
        normalize(*best, increments);
    }

    // log-softmax of w / tau over the children; w relative to the best, so no tau overflows it.
    void normalize(const Best& best, float* increments) const {
        if (best.count == 0) return;
        const float first = score_of(best.keys[0]);
        for (int j = 0; j < best.count; ++j)
            increments[j] = (score_of(best.keys[j]) - first) / p.noise_scale_temperature;
        uint64_t total = 0;
        for (int j = 0; j < best.count; ++j) total += mass_of(increments[j]);
        const float log_sum = log_of_mass(total);
        for (int j = 0; j < best.count; ++j) {
            const float x = increments[j] - log_sum;
            increments[j] = x < 0.0f ? x : 0.0f;
        }
    }

    void run() {
        if (is_closed(p, b)) return close();
        const float* logits = p.logits + b * p.logits_stride[0] + f * p.logits_stride[1];
        const float temperature = s ? s->temperature : 1.0f;
        float* dst = temperature != 1.0f ? w.processed : nullptr;
        const RowMax top = scan_row(logits, dst, temperature, p.rows, w.block_max);
        const float* row = dst ? dst : logits;
        const bool is_bad = top.is_bad || top.value == -kInf;
        Best best(p.top_k);
        float increments[Best::kMax];
        if (!is_bad && s) rank_coupled(row, top, &best, increments);
        if (!is_bad && !s) rank_plain(row, top, &best, increments);
        const int ranked = best.count;
        best.fill(-kInf);
        for (int j = ranked; j < p.top_k; ++j) increments[j] = is_bad ? kNaN : -kInf;
        write(best, increments);
    }

    void close() const {
        Best best(p.top_k);
        float increments[Best::kMax];
        best.fill(-kInf);
        for (int j = 0; j < p.top_k; ++j) increments[j] = -kInf;
        write(best, increments);
    }

    void write(const Best& best, const float* increments) const {
        const int64_t k = p.top_k;
        const int64_t at = b * p.pool_size + level_base(p) + f * k, parent = b * p.width + f;
        const float score = is_closed(p, b) ? 0.0f : p.scores[parent];
        for (int64_t j = 0; j < k; ++j) {
            const int32_t i = index_of(best.keys[j]);
            p.pool_tokens[at + j] = p.token_map ? p.token_map[i] : i;
            p.pool_parents[at + j] = p.candidates[parent];
            p.pool_scores[at + j] = score + increments[j];
        }
    }
};

// --- frontier
// ln of a sum of e^score; NaN if a score is.
float log_sum(const float* scores, int64_t count) {
    float top = -kInf;
    for (int64_t i = 0; i < count; ++i) {
        if (scores[i] != scores[i]) return kNaN;
        top = scores[i] > top ? scores[i] : top;
    }
    if (top == -kInf) return top;
    uint64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += mass_of(scores[i] - top);
    return top + log_of_mass(total);
}

void score_level(const TreeExpandParams& p, int64_t b) {
    const float below = log_sum(p.frontier_scores + b * p.top_k, p.top_k);
    const float above = log_sum(p.scores + b * p.width, p.width);
    p.level_score[b] = is_closed(p, b) ? -kInf : score_of_level(below, above);
}

void pick_frontier(const TreeExpandParams& p, int64_t b) {
    const int64_t k = p.top_k, base = level_base(p);
    const float* scores = p.pool_scores + b * p.pool_size;
    Best best(k);
    for (int64_t i = base; i < base + p.width * k; ++i) best.offer(scores[i], i);
    for (int64_t j = 0; j < k; ++j) {
        const int32_t i = index_of(best.keys[j]);
        const int64_t out = b * k + j, parent = b * p.width + (i - base) / k;
        p.frontier_tokens[out] = p.pool_tokens[b * p.pool_size + i];
        p.frontier_scores[out] = scores[i];
        p.frontier_candidates[out] = i;
        p.frontier_source[out] = static_cast<int32_t>(parent);
        int64_t* bits = p.frontier_ancestors + out * p.words;
        for (int64_t word = 0; word < p.words; ++word)
            bits[word] = p.ancestors[parent * p.words + word];
        const int64_t node = p.level * k + j;
        if (node < 64 * int64_t{p.words})
            bits[node / 64] |= static_cast<int64_t>(uint64_t{1} << (node % 64));
    }
}

// --- rerank
struct Rerank {
    const TreeRerankParams& p;
    int64_t b;
    Best best;
    int32_t node_of_rank[Best::kMax] = {};  // 0: dropped, as its parent is not in the tree

    Rerank(const TreeRerankParams& params, int64_t sequence)
        : p(params), b(sequence), best(params.nodes - 1) {
        const float* scores = p.pool_scores + b * p.pool_size;
        for (int64_t i = 0; i < p.num_candidates && best.capacity > 0; ++i)
            if (scores[i] > -kInf) best.offer(scores[i], i);
    }

    // The node of a pool entry among the ranks below `end`, 0 for the root, or -1.
    int32_t node_of(int32_t candidate, int end) const {
        if (candidate < 0) return 0;
        for (int j = 0; j < end; ++j)
            if (index_of(best.keys[j]) == candidate) return node_of_rank[j] ? node_of_rank[j] : -1;
        return -1;
    }

    void write(int64_t node, int32_t token, int32_t parent, float score) const {
        const int64_t at = b * p.nodes + node;
        p.draft_tokens[at] = token;
        p.parents[at] = parent;
        p.node_scores[at] = score;
    }

    void run() {
        int64_t count = 1;
        write(0, p.roots[b], -1, 0.0f);
        for (int j = 0; j < best.count; ++j) {
            const int32_t candidate = index_of(best.keys[j]);
            const int64_t at = b * p.pool_size + candidate;
            const int32_t parent = node_of(p.pool_parents[at], j);
            if (parent < 0) continue;
            node_of_rank[j] = static_cast<int32_t>(count);
            write(count++, p.pool_tokens[at], parent, p.pool_scores[at]);
        }
        p.num_nodes[b] = static_cast<int32_t>(count);
        for (int64_t node = count; node < p.nodes; ++node) write(node, 0, 0, -kInf);
    }
};

}  // namespace

void tree_expand_children_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeExpandParams*>(params);
    float* scratch = p.workspace + part * tree_expand_workspace(p.rows);
    const int64_t total = int64_t{p.batch} * p.width;
    for (int64_t row = total * part / num_parts; row < total * (part + 1) / num_parts; ++row)
        Expansion(p, row, scratch).run();
}

void tree_expand_frontier_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeExpandParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t b = batch * part / num_parts; b < batch * (part + 1) / num_parts; ++b) {
        pick_frontier(p, b);
        if (p.level_score) score_level(p, b);
    }
}

void tree_rerank_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeRerankParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t b = batch * part / num_parts; b < batch * (part + 1) / num_parts; ++b)
        Rerank(p, b).run();
}

}  // namespace specrt::SPECRT_ISA
