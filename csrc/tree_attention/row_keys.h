// An item of attention on the CPU: rows of one sequence and kv head, which keys each of them sees,
// and where those lie.
#pragma once
#include "tree_attention/leaf_tile.h"
#include "tree_attention/tree_attention.h"

namespace specrt::SPECRT_ISA {

constexpr int kMostRows = 64;                 // of an item
constexpr int kMostFloats = kMostRows * 128;  // of its rows
constexpr int kMaxNodes = 64 * TreeAttentionParams::kMaxWords;

inline int clamp(int count, int most) {
    return count < 0 ? 0 : count < most ? count : most;
}

template <typename T>
struct Item {
    // A constructor, since braces would clear all the scratch below.
    Item(const TreeAttentionParams& params, int seq, int head)
        : p(params),
          keys(static_cast<const T*>(params.k_cache) + int64_t{head} * params.head_dim),
          values(static_cast<const T*>(params.v_cache) + int64_t{head} * params.head_dim),
          seq(seq),
          prefix(clamp(params.kv_len[seq], params.table.num_slots)),
          hidden(prefix > params.max_seen ? prefix - params.max_seen : 0),
          num_rows(0),
          scale(params.cap > 0.0f ? params.scale / params.cap : params.scale) {
        prefix -= hidden;
        tile.head_dim = params.head_dim;
    }

    const TreeAttentionParams& p;
    const T *keys, *values;  // this kv head's
    int seq;
    int prefix, hidden, num_rows;  // keys seen of it, and not; active rows
    float scale;                   // of scores: with a cap they are first measured in its units
    bool is_tiled = false, slides = false;  // slides: some row does not see its first key
    const float* q[kMostRows];
    int64_t out[kMostRows];             // offsets
    int node[kMostRows];                // of those here; rows of one node are neighbours
    int range[kMostRows];               // by node: its keys that follow one another, from the first
    int num_own[kMostRows];             // by node
    int first[kMostRows];               // by node: of its keys the first one in its window
    int64_t own[kMostRows][kMaxNodes];  // by node: offsets of the visible keys behind, in order
    float score[kMostRows][kLeaf];      // then the exponentials
    float leaf_max[kMostRows], leaf_sum[kMostRows], max[kMostRows], sum[kMostRows];
    // Rows of head_dim: queries of 16 bits, widened; the leaf's values; those of all leaves.
    alignas(64) float query[kMostFloats], leaf_value[kMostFloats], value[kMostFloats];
    LeafTile tile;

    float* row_of(float* rows, int row) { return rows + row * p.head_dim; }
};

// Where the key numbered `key` among those of a row lies.
template <typename T>
int slot_of(const Item<T>& it, int key) {
    return key < it.p.num_sinks ? key : key + it.hidden;
}

template <typename T>
int64_t offset_of(const Item<T>& it, int key) {
    const uint32_t slot = static_cast<uint32_t>(slot_of(it, key));
    // A slot past the sequence's pages belongs to no node that counts, but is not read elsewhere.
    const uint32_t known = clamp_index(slot, it.p.table.num_slots);
    return row_of_slot(it.p.table, it.seq, known) * it.p.num_kv_heads * it.p.head_dim;
}

// Offsets of keys begin..begin+count of a range, a page at a time: one division a page.
template <typename T>
void range_offsets(const Item<T>& it, int begin, int count, int64_t* offsets) {
    const int64_t step = int64_t{it.p.num_kv_heads} * it.p.head_dim;
    for (int i = 0; i < count;) {
        const int in_page = slot_of(it, begin + i) % it.p.table.page_size;
        int end = begin + i + it.p.table.page_size - in_page;
        if (begin + i < it.p.num_sinks && end > it.p.num_sinks) end = it.p.num_sinks;
        int64_t offset = offset_of(it, begin + i);
        for (; i < count && begin + i < end; offset += step) offsets[i++] = offset;
    }
}

// The bits of a node's ancestors, itself among them. Nothing above a node has a greater index: a
// stray bit must not read an unwritten slot.
struct Ancestors {
    uint64_t bits[TreeAttentionParams::kMaxWords] = {};

    // How many there are before the first that is none.
    int num_first() const {
        if (~bits[0]) return __builtin_ctzll(~bits[0]);
        return 64 + (~bits[1] ? __builtin_ctzll(~bits[1]) : 64);
    }
};

template <typename T>
Ancestors ancestors_of(const Item<T>& it, int node) {
    const uint64_t* bits =
        it.p.ancestors + it.seq * it.p.ancestors_stride[0] + node * it.p.ancestors_stride[1];
    const int end = clamp(it.p.first_node[it.seq], kMaxNodes) + node + 1;
    Ancestors found;
    for (int w = 0; w < it.p.num_words; ++w) {
        const int left = end - 64 * w;
        found.bits[w] = left >= 64 ? bits[w] : left > 0 ? bits[w] & ((1ull << left) - 1) : 0;
    }
    return found;
}

// The range, the own keys and the window of all nodes.
template <typename T>
void divide_keys(Item<T>& it, const Ancestors* nodes, int num_nodes) {
    // Slots behind the table's last one are looked up one by one.
    const int room = it.p.table.num_slots - it.hidden - it.prefix;
    int least = room;
    for (int i = 0; i < num_nodes; ++i) {
        const int first = nodes[i].num_first();
        it.range[i] = first < room ? first : room;
        least = it.range[i] < least ? it.range[i] : least;
    }
    for (int i = 0; i < num_nodes; ++i) {
        if (!it.is_tiled) it.range[i] = least;
        it.num_own[i] = 0;
        for (int w = 0; w < it.p.num_words; ++w)
            for (uint64_t rest = nodes[i].bits[w]; rest; rest &= rest - 1) {
                const int j = 64 * w + __builtin_ctzll(rest);
                if (j >= it.range[i]) it.own[i][it.num_own[i]++] = offset_of(it, it.prefix + j);
            }
        it.range[i] += it.prefix;
        // A row that does not see itself is where the root is.
        const int length = it.range[i] + it.num_own[i], least_length = it.prefix + 1;
        const int end = length > least_length ? length : least_length;
        it.first[i] = end > it.p.sliding_window ? end - it.p.sliding_window : 0;
        it.slides |= it.first[i] > 0;
    }
}

}  // namespace specrt::SPECRT_ISA
