#include "tree_accept/draw.h"
#include "tree_accept/tree_accept.h"

namespace specrt::SPECRT_ISA {
namespace {

// What is to be done next for the node that a walk stands at. At kTotal, kBins and kNoise all of
// its row is gone through first, in slices (RowSlice) that any thread may do.
enum class Next : int32_t { kProcess, kTotal, kBins, kNoise, kDescend, kEnd };

// What was found in a slice of a row, for the step that wants it.
struct RowSlice {
    uint64_t mass;
    Draw best;
    MassBins bins;
};

// Where a walk stands: all that it needs besides its scratch to go on in another launch.
struct WalkState {
    Next next;
    int32_t node, depth, token, child;
    int64_t num_seen;
    const float* row;  // processed logits
    RowMax top;
    Nucleus nucleus;
    Filter filter;
    Draw best;
};

// One walk's scratch, in pieces of S floats (V rounded up to whole blocks of 64), then a WalkState
// and the slices; what is not touched costs no memory:
//
//     0           1        2        3      4      5           6        7      8 S
//     | processed |      masses     |     keys    | block_max | counts | seen | state | slices |
struct Workspace {
    float *processed, *block_max;
    uint64_t *masses, *keys;
    int32_t *counts, *seen;
    WalkState* state;
    RowSlice* slices;

    Workspace(float* base, int64_t vocab) {
        const int64_t size = (vocab + 63) / 64 * 64;
        processed = base;
        masses = reinterpret_cast<uint64_t*>(base + size);
        keys = reinterpret_cast<uint64_t*>(base + 3 * size);
        block_max = base + 5 * size;
        counts = reinterpret_cast<int32_t*>(base + 6 * size);
        seen = reinterpret_cast<int32_t*>(base + 7 * size);
        state = reinterpret_cast<WalkState*>(base + 8 * size);
        slices = reinterpret_cast<RowSlice*>(state + 1);
    }
    FilterScratch filter_scratch() const { return {masses, keys, block_max}; }
};
static_assert(sizeof(WalkState) + kMostRowSlices * sizeof(RowSlice) <=
              kWalkStateFloats * sizeof(float));

// --- one sequence --------------------------------------------------------------------------------
// What a sequence gets that cannot be drawn from.
void write_nothing(const TreeAcceptParams& p, int64_t b) {
    for (int64_t i = b * p.path_size; i < (b + 1) * p.path_size; ++i) {
        p.path[i] = p.tokens[i] = -1;
        if (p.logprobs) p.logprobs[i] = no_logprob();
    }
    p.accept_length[b] = -1;
    if (p.next_node) p.next_node[b] = -1;
}

struct Walk {
    const TreeAcceptParams& p;
    int64_t b;
    Workspace w;
    const SamplingRow& s;
    WalkState at;
    TokenCounts counts;
    bool is_greedy, edits_row, counts_tokens;
    int64_t num_nodes;

    // `state`: of the walk that goes on; nullptr: one that begins.
    Walk(const TreeAcceptParams& params, int64_t sequence, float* scratch, const WalkState* state)
        : p(params),
          b(sequence),
          w(scratch, params.vocab),
          s(params.sampling[sequence]),
          at{},
          counts{w.counts, w.seen, 0, params.vocab},
          is_greedy(s.temperature == 0.0f) {
        counts_tokens = has_penalty(s);
        edits_row = counts_tokens || s.bias_end > s.bias_begin;
        num_nodes = p.num_nodes[b] < 1 ? 1 : p.num_nodes[b] > p.nodes ? p.nodes : p.num_nodes[b];
        if (state) {
            at = *state;
            counts.num_seen = at.num_seen;
        } else {
            begin();
        }
    }

    const int32_t* parents() const { return p.parents + b * p.nodes; }
    const int32_t* draft_tokens() const { return p.draft_tokens + b * p.nodes; }
    // nullptr: the node's logits are not there yet.
    const float* logits(int64_t node) const {
        if (!p.logit_rows) return p.logits + b * p.logits_stride[0] + node * p.logits_stride[1];
        const int64_t row = p.logit_rows[b * p.nodes + node];
        return 0 <= row && row < p.num_logit_rows ? p.logits + row * p.logits_stride[1] : nullptr;
    }
    uint64_t position() const {
        return static_cast<uint64_t>(p.history_len[b]) + static_cast<uint64_t>(at.depth);
    }

    // At the root, or where the walk before this one lacked logits.
    void begin() {
        if (p.next_node) at.node = p.next_node[b];
        if (at.node > 0) at.depth = p.accept_length[b] + 1;
        // No walk says other numbers; contents are not trusted.
        const bool is_sane = 0 <= at.depth && at.depth <= at.node && at.node < num_nodes;
        at.next = at.node < 0 ? Next::kEnd : Next::kProcess;
        if (at.node >= 0 && (at.node == 0 || !is_sane)) write_nothing(p, b);
        if (at.node >= 0 && !is_sane) at.next = Next::kEnd;
        if (counts_tokens && at.next != Next::kEnd) count_history();
    }

    void count_history() {
        std::memset(w.counts, 0, static_cast<size_t>(p.vocab) * sizeof(int32_t));
        const int32_t* tokens = p.history + b * p.history_stride;
        const int64_t n = p.history_len[b] < p.history_size ? p.history_len[b] : p.history_size;
        for (int64_t i = 0; i < n; ++i) counts.add(tokens[i], i >= s.prompt_len);
        for (int64_t i = 0; i < at.depth; ++i) counts.add(p.tokens[b * p.path_size + i], true);
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
    const float* process(const float* row, RowMax* top) {
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

    int64_t child_holding(int32_t token) const {
        for (int64_t j = at.node + 1; j < num_nodes; ++j)
            if (parents()[j] == at.node && draft_tokens()[j] == token) return j;
        return -1;
    }

    bool has_children() const {
        for (int64_t j = at.node + 1; j < num_nodes; ++j)
            if (parents()[j] == at.node) return true;
        return false;
    }

    // Rejection over the children in order; the token, and the child that holds it or -1.
    void draw_by_rejection() {
        Law law{w.masses, w.keys, fill_masses(at.row, p.vocab, at.top.value, at.filter, w.masses)};
        const float* q = p.draft_probs + b * p.probs_stride[0] + at.node * p.probs_stride[1];
        uint32_t sibling = 0;
        at.child = -1;
        for (int64_t j = at.node + 1; j < num_nodes; ++j) {
            if (parents()[j] != at.node) continue;
            const int32_t x = draft_tokens()[j];
            const float u = uniform_from(philox(s.seed, position(), Purpose::kAccept, sibling++));
            // A child its own law excludes was not drawn from it: subtracting would bias.
            if (x < 0 || x >= p.vocab || !(q[x] > 0.0f)) continue;
            if (accepts(u, q[x], law.masses[x], law.total)) {
                at.child = static_cast<int32_t>(j);
                at.token = x;
                return;
            }
            law.subtract(q, p.vocab);
        }
        at.token = draw_by_mass(law.masses, p.vocab, law.total,
                                uniform_from(philox(s.seed, position(), Purpose::kResidual, 0)));
    }

    // --- steps: each gives the next one -------------------------------------------------------
    Next end_without() {
        write_nothing(p, b);
        return Next::kEnd;
    }

    Next found(int32_t token) {
        at.token = token;
        at.child = static_cast<int32_t>(child_holding(token));
        return Next::kDescend;
    }

    Next processed() {
        const float* row = logits(at.node);
        if (!row) {
            if (p.next_node) p.next_node[b] = at.node;
            return Next::kEnd;
        }
        at.row = process(row, &at.top);
        if (at.top.is_bad || at.top.value == -kInf) return end_without();
        if (is_greedy) return found(first_equal(at.row, at.top.block * kBlock, at.top.value));
        at.filter = {};
        if (has_top_k(s, p.vocab))
            at.filter.cut = kth_largest(at.row, w.block_max, p.vocab, s.top_k,
                                        reinterpret_cast<float*>(w.keys));
        if (!has_top_p(s)) return filtered();
        at.nucleus = {0, at.filter.cut, s.top_p};
        return is_whole() ? Next::kTotal : Next::kBins;
    }

    bool is_whole() const { return at.filter.cut == -kInf; }

    Next weighed(int num_slices) {
        uint64_t total = 0;
        for (int i = 0; i < num_slices; ++i) total += w.slices[i].mass;
        at.nucleus = Nucleus::of_row(s.top_p, total, p.vocab, at.top.value);
        return Next::kBins;
    }

    Next binned(int num_slices) {
        MassBins& bins = w.slices[0].bins;
        for (int i = 1; i < num_slices; ++i) bins.add(w.slices[i].bins);
        if (!is_whole()) at.nucleus.total = bins.total();
        at.filter = at.nucleus.cut(at.row, p.vocab, at.top.value, bins, w.filter_scratch());
        return filtered();
    }

    Next filtered() {
        at.filter = apply_min_p(at.top.value, s.min_p, at.filter);
        if (p.draft_probs && has_children()) {
            draw_by_rejection();
            return at.token == kBadRow ? end_without() : Next::kDescend;
        }
        GumbelSearch search{at.row, p.vocab, at.filter, s.seed, position(), {}};
        search.visit(at.top.block, at.top.value);  // a good first bound
        at.best = search.best;
        return Next::kNoise;
    }

    Next drawn(int num_slices) {
        for (int i = 0; i < num_slices; ++i) at.best.offer(w.slices[i].best);
        return at.best.token < 0 ? end_without() : found(at.best.token);
    }

    Next descended() {
        const int64_t i = b * p.path_size + at.depth;
        p.path[i] = at.node;
        p.tokens[i] = at.token;
        if (p.logprobs) p.logprobs[i] = logprob_of(logits(at.node), p.vocab, at.token);
        p.accept_length[b] = at.depth;
        if (at.child < 0) {
            if (p.next_node) p.next_node[b] = -1;
            return Next::kEnd;
        }
        if (counts_tokens) counts.add(at.token, true);
        at.node = at.child;
        ++at.depth;
        return Next::kProcess;
    }

    Next after(int num_slices) {
        switch (at.next) {
            case Next::kProcess:
                return processed();
            case Next::kTotal:
                return weighed(num_slices);
            case Next::kBins:
                return binned(num_slices);
            case Next::kNoise:
                return drawn(num_slices);
            case Next::kDescend:
                return descended();
            default:
                return Next::kEnd;
        }
    }

    bool reads_row() const {
        return at.next == Next::kTotal || at.next == Next::kBins || at.next == Next::kNoise;
    }

    // Whether all threads are to read the row: few blocks have tokens that top_k or min_p keep.
    bool shares_row() const {
        return reads_row() && !has_top_k(s, p.vocab) && !(has_min_p(s) && at.next == Next::kNoise);
    }

    void read_slice(RowSlice* slice, Blocks blocks) const {
        const float top = at.top.value;
        if (at.next == Next::kTotal) {
            slice->mass = total_mass(at.row, w.block_max, p.vocab, top, blocks);
        } else if (at.next == Next::kBins) {
            slice->bins = {};
            add_to_bins(at.row, w.block_max, p.vocab, top, at.nucleus.least, blocks, &slice->bins);
        } else {
            GumbelSearch search{at.row, p.vocab, at.filter, s.seed, position(), at.best};
            for (int64_t i = blocks.begin; i < blocks.end; ++i)
                if (i != at.top.block) search.visit(i, w.block_max[i]);
            slice->best = search.best;
        }
    }

    // From a state whose slices, if any, were read; until the end, or with `may_share` until there
    // is a row for all threads.
    void run(int num_slices, bool may_share) {
        while (at.next != Next::kEnd) {
            at.next = after(num_slices);
            if (!reads_row()) continue;
            if (may_share && shares_row()) break;
            read_slice(&w.slices[0], all_blocks(p.vocab));
            num_slices = 1;
        }
        at.num_seen = counts.num_seen;
    }

    void write_processed(float* out) {
        RowMax top;
        const float* row = process(logits(0), &top);
        Filter filter;
        if (!is_greedy)
            filter = make_filter(row, p.vocab, top.value, {s.top_k, s.top_p, s.min_p},
                                 w.filter_scratch());
        for (int64_t v = 0; v < p.vocab; ++v) out[v] = filter.keeps(row[v], v) ? row[v] : -kInf;
    }
};

float* scratch_of(const TreeAcceptParams& p, int64_t index) {
    return p.workspace ? p.workspace + index * tree_accept_workspace(p.vocab) : nullptr;
}

}  // namespace

void tree_accept_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeAcceptParams*>(params);
    float* scratch = scratch_of(p, part);
    for (int64_t b = p.batch * part / num_parts; b < p.batch * (part + 1) / num_parts; ++b) {
        // The host saw to it, but rows may have changed since the launch was recorded.
        if (!scratch && !is_plain_greedy(p.sampling[b])) {
            write_nothing(p, b);
        } else {
            Walk(p, b, scratch, nullptr).run(0, false);
        }
    }
}

// Of a walk with shared rows: a sequence has the scratch of its own number.
void tree_accept_step_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeAcceptParams*>(params);
    for (int64_t b = p.batch * part / num_parts; b < p.batch * (part + 1) / num_parts; ++b) {
        float* scratch = scratch_of(p, b);
        WalkState* state = Workspace(scratch, p.vocab).state;
        const bool begins = p.stage == WalkStage::kBegin;
        if (!begins && state->next == Next::kEnd) continue;
        Walk walk(p, b, scratch, begins ? nullptr : state);
        walk.run(begins ? 0 : num_row_slices(p.vocab), p.stage != WalkStage::kEnd);
        *state = walk.at;
    }
}

void tree_accept_slice_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeAcceptParams*>(params);
    const int64_t num_slices = num_row_slices(p.vocab), count = p.batch * num_slices;
    const int64_t num_blocks = all_blocks(p.vocab).end;
    for (int64_t i = count * part / num_parts; i < count * (part + 1) / num_parts; ++i) {
        const int64_t b = i / num_slices, slice = i % num_slices;
        float* scratch = scratch_of(p, b);
        const Workspace w(scratch, p.vocab);
        if (w.state->next == Next::kEnd) continue;
        Walk(p, b, scratch, w.state)
            .read_slice(w.slices + slice,
                        {num_blocks * slice / num_slices, num_blocks * (slice + 1) / num_slices});
    }
}

void processed_logits_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeAcceptParams*>(params);
    for (int64_t b = p.batch * part / num_parts; b < p.batch * (part + 1) / num_parts; ++b)
        Walk(p, b, scratch_of(p, part), nullptr).write_processed(p.logprobs + b * p.vocab);
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
