// The work is cut into items: one sequence, one kv head, up to kRows rows (a row is one query head
// of one node; nodes and the heads of the group are flattened, so all rows of an item read the same
// prefix keys). For each leaf an item computes scores, softmax terms and weighted values, with the
// leaf's prefix keys shared by blocks of rows and the ancestors read node by node. Blocking decides
// only how often a key is loaded. Every score is one dot product (sixteen lanes over d, then the
// fixed tree); the values are accumulated key by key in order.
//
// Hazard: slots that are not visible hold garbage, NaN included, and 0 * NaN is NaN. So they are
// never read: short blocks repeat a visible key and drop its score.
#include "core/simd.h"
#include "tree_attention/tree_attention.h"

namespace specrt::SPECRT_ISA {
namespace {

constexpr int kLeaf = 64, kRows = 16, kKeys = 4, kMaxDim = 256;
constexpr int kMaxNodes = 64 * TreeAttentionParams::kMaxWords;
#if defined(__AVX512F__)
constexpr int kBlockRows = 4, kColumns = 4;  // 16 accumulators of one register each
#else
constexpr int kBlockRows = 2, kColumns = 2;  // V16 is two registers (or a loop) here
#endif

int clamp(int count, int most) {
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
          num_rows(0) {
        prefix -= hidden;
    }

    const TreeAttentionParams& p;
    const T *keys, *values;  // this kv head's
    int seq;
    int prefix, hidden, num_rows;  // keys seen of it, and not; active rows
    const float* q[kRows];
    float query[kRows][kMaxDim];         // queries of 16 bits, widened
    int64_t out[kRows];                  // offsets
    int node[kRows];                     // index into ancestor_*, rows of one node are neighbours
    int num_ancestors[kRows];            // by node
    int64_t ancestor[kRows][kMaxNodes];  // by node: offsets of the visible tree keys, in order
    float score[kRows][kLeaf];           // then the exponentials
    float leaf_max[kRows], leaf_sum[kRows], max[kRows], sum[kRows];
    alignas(64) float leaf_value[kRows][kMaxDim];
    alignas(64) float value[kRows][kMaxDim];
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

// Offsets of the prefix' keys begin..begin+count, a page at a time: one division a page.
template <typename T>
void prefix_offsets(const Item<T>& it, int begin, int count, int64_t* offsets) {
    const int64_t step = int64_t{it.p.num_kv_heads} * it.p.head_dim;
    for (int i = 0; i < count;) {
        const int in_page = slot_of(it, begin + i) % it.p.table.page_size;
        int end = begin + i + it.p.table.page_size - in_page;
        if (begin + i < it.p.num_sinks && end > it.p.num_sinks) end = it.p.num_sinks;
        int64_t offset = offset_of(it, begin + i);
        for (; i < count && begin + i < end; offset += step) offsets[i++] = offset;
    }
}

// Scores of R rows with up to four keys.
template <int R, typename T>
void score_block(Item<T>& it, int row, const int64_t* offsets, int count, int column) {
    const T* key[kKeys];
    for (int j = 0; j < kKeys; ++j) key[j] = it.keys + offsets[j < count ? j : count - 1];
    V16 acc[R][kKeys];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kKeys; ++j) acc[r][j] = zero();
    for (int i = 0; i < it.p.head_dim; i += 16) {
        V16 k[kKeys];
        for (int j = 0; j < kKeys; ++j) k[j] = load(key[j] + i);
        for (int r = 0; r < R; ++r) {
            const V16 q = load(it.q[row + r] + i);
            for (int j = 0; j < kKeys; ++j) acc[r][j] = fma(q, k[j], acc[r][j]);
        }
    }
    for (int r = 0; r < R; ++r) {
        float dot[kKeys];
        reduce_add4(acc[r], dot);
        for (int j = 0; j < kKeys && j < count; ++j)
            it.score[row + r][column + j] = dot[j] * it.p.scale;
    }
}

template <int R, typename T>
void score_keys(Item<T>& it, int row, const int64_t* offsets, int count, int column) {
    for (int j = 0; j < count; j += kKeys)
        score_block<R>(it, row, offsets + j, count - j, column + j);
}

// leaf_value += p * v over the keys in order, for R rows and C vectors of the head's columns.
template <int R, int C, typename T>
void value_block(Item<T>& it, int row, const int64_t* offsets, int count, int column, int at) {
    V16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = load(it.leaf_value[row + r] + at + 16 * c);
    for (int j = 0; j < count; ++j) {
        const T* value = it.values + offsets[j] + at;
        V16 v[C];
        for (int c = 0; c < C; ++c) v[c] = load(value + 16 * c);
        for (int r = 0; r < R; ++r) {
            const V16 weight = splat(it.score[row + r][column + j]);
            for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, v[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(acc[r][c], it.leaf_value[row + r] + at + 16 * c);
}

template <int R, typename T>
void value_keys(Item<T>& it, int row, const int64_t* offsets, int count, int column) {
    int at = 0;
    for (; at + 16 * kColumns <= it.p.head_dim; at += 16 * kColumns)
        value_block<R, kColumns>(it, row, offsets, count, column, at);
    for (; at < it.p.head_dim; at += 16) value_block<R, 1>(it, row, offsets, count, column, at);
}

// Calls body(integral constant R, row) over rows begin..end in blocks of kBlockRows, then single.
template <int R>
struct Size {
    static constexpr int value = R;
};
template <typename Body>
void in_blocks(int begin, int end, Body&& body) {
    int row = begin;
    for (; row + kBlockRows <= end; row += kBlockRows) body(Size<kBlockRows>{}, row);
    if constexpr (kBlockRows > 2)
        for (; row + 2 <= end; row += 2) body(Size<2>{}, row);
    for (; row < end; ++row) body(Size<1>{}, row);
}

// One leaf: the prefix keys all rows share, then each node's own.
struct Leaf {
    int begin, shared;       // first position; prefix keys in the leaf
    int64_t offsets[kLeaf];  // of the shared keys
};

template <typename T>
int own_count(const Item<T>& it, const Leaf& leaf, int row, int* first) {
    const int start = leaf.begin + leaf.shared - it.prefix;  // ancestors in earlier leaves
    *first = start > 0 ? start : 0;
    const int left = it.num_ancestors[it.node[row]] - *first, room = kLeaf - leaf.shared;
    // A full leaf of prefix keys has no room; then start is negative or zero.
    return left < 0 ? 0 : left < room ? left : room;
}

// Calls body(R, row, offsets, count, column): the shared keys by blocks of rows, then the own ones.
template <typename T, typename Body>
void over_keys(const Item<T>& it, const Leaf& leaf, Body&& body) {
    if (leaf.shared > 0)
        in_blocks(0, it.num_rows,
                  [&](auto size, int row) { body(size, row, leaf.offsets, leaf.shared, 0); });
    if (leaf.shared == kLeaf) return;
    for (int begin = 0, end; begin < it.num_rows; begin = end) {
        for (end = begin + 1; end < it.num_rows && it.node[end] == it.node[begin];) ++end;
        int first;
        const int count = own_count(it, leaf, begin, &first);
        const int64_t* offsets = it.ancestor[it.node[begin]] + first;
        if (count > 0)
            in_blocks(begin, end,
                      [&](auto size, int row) { body(size, row, offsets, count, leaf.shared); });
    }
}

// Scores to exponentials; lanes past the count become exp(-inf) = 0.
void soften(float* score, int count, float* max_out, float* sum_out) {
    for (int i = count; i < kLeaf; ++i) score[i] = -__builtin_inff();
    V16 s[4], best = load(score);
    for (int i = 0; i < 4; ++i) s[i] = load(score + 16 * i);
    for (int i = 1; i < 4; ++i) best = max(best, s[i]);
    *max_out = reduce_max(best);
    V16 total = zero();
    for (int i = 0; i < 4; ++i) {
        s[i] = exp(sub(s[i], splat(*max_out)));
        store(s[i], score + 16 * i);
        total = add(total, s[i]);
    }
    *sum_out = reduce_add(total);
}

// (max, sum, value) of the leaves so far joined with the next leaf's, both rescaled to their max.
template <typename T>
void merge(Item<T>& it, int row) {
    const float old_max = it.max[row], leaf_max = it.leaf_max[row];
    const float top = old_max > leaf_max ? old_max : leaf_max;
    const V16 keep = exp(splat(old_max - top)), take = exp(splat(leaf_max - top));
    float a[16], b[16];
    store(keep, a);
    store(take, b);
    it.max[row] = top;
    it.sum[row] = it.sum[row] * a[0] + it.leaf_sum[row] * b[0];
    for (int i = 0; i < it.p.head_dim; i += 16) {
        float* value = it.value[row] + i;
        store(fma(load(it.leaf_value[row] + i), take, mul(load(value), keep)), value);
    }
}

template <typename T>
void run_leaf(Item<T>& it, int index) {
    Leaf leaf;
    leaf.begin = index * kLeaf;
    const int left = it.prefix - leaf.begin;
    leaf.shared = left < 0 ? 0 : left < kLeaf ? left : kLeaf;
    prefix_offsets(it, leaf.begin, leaf.shared, leaf.offsets);
    over_keys(it, leaf, [&](auto size, int row, const int64_t* offsets, int count, int column) {
        score_keys<decltype(size)::value>(it, row, offsets, count, column);
    });
    int counts[kRows], first;
    const size_t row_bytes = sizeof(float) * static_cast<size_t>(it.p.head_dim);
    for (int r = 0; r < it.num_rows; ++r) {
        counts[r] = leaf.shared + own_count(it, leaf, r, &first);
        if (counts[r] > 0) soften(it.score[r], counts[r], &it.leaf_max[r], &it.leaf_sum[r]);
        std::memset(it.leaf_value[r], 0, row_bytes);
    }
    over_keys(it, leaf, [&](auto size, int row, const int64_t* offsets, int count, int column) {
        value_keys<decltype(size)::value>(it, row, offsets, count, column);
    });
    for (int r = 0; r < it.num_rows; ++r) {
        if (counts[r] == 0) continue;
        if (index > 0) {
            merge(it, r);
            continue;
        }
        it.max[r] = it.leaf_max[r];
        it.sum[r] = it.leaf_sum[r];
        std::memcpy(it.value[r], it.leaf_value[r], row_bytes);
    }
}

// Reads one node's ancestor bits; returns how many there are.
template <typename T>
int read_ancestors(const Item<T>& it, int node, int64_t* offsets) {
    const uint64_t* bits =
        it.p.ancestors + it.seq * it.p.ancestors_stride[0] + node * it.p.ancestors_stride[1];
    const int self = clamp(it.p.first_node[it.seq], kMaxNodes) + node;
    int count = 0;
    for (int w = 0; w < it.p.num_words; ++w)
        for (uint64_t rest = bits[w]; rest; rest &= rest - 1) {
            const int j = 64 * w + __builtin_ctzll(rest);
            // Nothing above a node has a greater index: a stray bit must not read an unwritten
            // slot.
            if (j <= self) offsets[count++] = offset_of(it, it.prefix + j);
        }
    return count;
}

// head_dim floats to `out` at an offset, in its type.
void write_row(const TreeAttentionParams& p, const float* row, int64_t at) {
    const auto write = [&](auto* out) {
        for (int i = 0; i < p.head_dim; ++i) from_float(row[i], out + at + i);
    };
    if (p.q_dtype == DType::kBFloat16) return write(static_cast<bf16*>(p.out));
    if (p.q_dtype == DType::kFloat16) return write(static_cast<f16*>(p.out));
    std::memcpy(static_cast<float*>(p.out) + at, row, sizeof(float) * size_t(p.head_dim));
}

// head_dim values of q at an offset: where they lie, or widened into `scratch`.
const float* read_row(const TreeAttentionParams& p, int64_t at, float* scratch) {
    const auto widen = [&](const auto* q) {
        for (int i = 0; i < p.head_dim; i += 16) store(load(q + at + i), scratch + i);
        return scratch;
    };
    if (p.q_dtype == DType::kBFloat16) return widen(static_cast<const bf16*>(p.q));
    if (p.q_dtype == DType::kFloat16) return widen(static_cast<const f16*>(p.q));
    return static_cast<const float*>(p.q) + at;
}

template <typename T>
void run_item(Item<T>& it) {
    int longest = it.prefix;
    for (int r = 0; r < it.num_rows; ++r) {
        const int length = it.prefix + it.num_ancestors[it.node[r]];
        longest = length > longest ? length : longest;
        it.sum[r] = 0.0f;  // stays so only if nothing at all is visible
    }
    for (int leaf = 0; leaf * kLeaf < longest; ++leaf) run_leaf(it, leaf);
    for (int r = 0; r < it.num_rows; ++r) {
        const V16 sum = splat(it.sum[r]);
        const bool is_blind = it.sum[r] == 0.0f;
        for (int i = 0; i < it.p.head_dim; i += 16)
            store(is_blind ? zero() : div(load(it.value[r] + i), sum), it.value[r] + i);
        write_row(it.p, it.value[r], it.out[r]);
    }
}

template <typename T>
void item(const TreeAttentionParams& p, int seq, int head, int first_row) {
    Item<T> it(p, seq, head);
    const int all_rows = p.num_nodes_max * p.group;
    const int end = first_row + kRows < all_rows ? first_row + kRows : all_rows;
    int nodes_seen = 0, last_node = -1;
    for (int row = first_row; row < end; ++row) {
        const int node = row / p.group, q_head = head * p.group + row % p.group;
        const int64_t out =
            seq * p.out_stride[0] + node * p.out_stride[1] + q_head * p.out_stride[2];
        if (node >= p.num_nodes[seq]) {
            const float zeros[kMaxDim] = {};
            write_row(p, zeros, out);
            continue;
        }
        if (node != last_node) {
            it.num_ancestors[nodes_seen] = read_ancestors(it, node, it.ancestor[nodes_seen]);
            ++nodes_seen;
            last_node = node;
        }
        const int r = it.num_rows++;
        it.node[r] = nodes_seen - 1;
        it.out[r] = out;
        const int64_t q = seq * p.q_stride[0] + node * p.q_stride[1] + q_head * p.q_stride[2];
        it.q[r] = read_row(p, q, it.query[r]);
    }
    if (it.num_rows > 0) run_item(it);
}

template <typename T>
void items_of_part(const TreeAttentionParams& p, int part, int num_parts) {
    const int64_t blocks = (int64_t{p.num_nodes_max} * p.group + kRows - 1) / kRows;
    const int64_t total = p.num_seqs * p.num_kv_heads * blocks;
    for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i) {
        const int64_t pair = i / blocks;
        item<T>(p, static_cast<int>(pair / p.num_kv_heads), static_cast<int>(pair % p.num_kv_heads),
                static_cast<int>(i % blocks) * kRows);
    }
}

}  // namespace

void tree_attention_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeAttentionParams*>(params);
    if (!is_any_open({p.is_open, p.num_seqs})) return;
    switch (p.cache_dtype) {
        case DType::kBFloat16:
            return items_of_part<bf16>(p, part, num_parts);
        case DType::kFloat16:
            return items_of_part<f16>(p, part, num_parts);
        default:
            return items_of_part<float>(p, part, num_parts);
    }
}

}  // namespace specrt::SPECRT_ISA
