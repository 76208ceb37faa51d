// The work is cut into items: one sequence, one kv head, some rows (a row is one query head of one
// node; nodes and the heads of the group are flattened, so all rows of an item read the same prefix
// keys). For each leaf an item computes scores, softmax terms and weighted values. Of a row's keys
// those that follow one another from the first, its range, are shared by blocks of rows: the prefix
// and the first nodes of the tree, so in a chain all. The other ancestors, its own keys, are read
// node by node. With many rows the keys of a leaf are brought to float32 once (leaf_tile.h).
// Blocking decides only how often a key is loaded. Every score is one dot product (sixteen lanes
// over d, then the fixed tree); the values are accumulated key by key in order.
//
// Hazard: slots that are not visible hold garbage, NaN included, and 0 * NaN is NaN. So slots that
// no row sees are never read, and a row's values begin with its window's first key and end with its
// own last one: short blocks repeat a visible key and drop its score, as scores are dropped of keys
// before a row's window and of a tile's keys beyond its range.
#include "core/tanh_lanes.h"
#include "tree_attention/row_keys.h"

namespace specrt::SPECRT_ISA {
namespace {

constexpr int kKeys = 4, kFewRows = 16;
constexpr int kTileRows = 12;  // for so many a leaf becomes a tile
#if defined(__AVX512F__)
constexpr int kBlockRows = 4, kColumns = 4;  // 16 accumulators of one register each
#else
constexpr int kBlockRows = 2, kColumns = 2;  // V16 is two registers (or a loop) here
#endif

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
            it.score[row + r][column + j] = dot[j] * it.scale;
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
        for (int c = 0; c < C; ++c)
            acc[r][c] = load(it.row_of(it.leaf_value, row + r) + at + 16 * c);
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
        for (int c = 0; c < C; ++c)
            store(acc[r][c], it.row_of(it.leaf_value, row + r) + at + 16 * c);
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

// The same for blocks of up to R rows, as even as can be.
template <int R, typename Body>
void sized(int num_rows, int row, Body&& body) {
    if constexpr (R > 1)
        if (num_rows < R) return sized<R - 1>(num_rows, row, body);
    body(Size<R>{}, row);
}
template <int R, typename Body>
void in_even_blocks(int num_rows, Body&& body) {
    const int num_blocks = (num_rows + R - 1) / R;
    for (int i = 0, row = 0, end; i < num_blocks; ++i, row = end) {
        end = num_rows * (i + 1) / num_blocks;
        sized<R>(end - row, row, body);
    }
}

// One leaf.
struct Leaf {
    int begin;              // its first key
    int least, most;        // of ranges in it: the first key that a row sees, the longest one's end
    bool slides;            // some row does not see it from its first key on
    int count[kMostRows];   // where a row's keys in it end; 0 if it has none
    int from[kMostRows];    // where they begin,
    int ranged[kMostRows];  // and where those of its range end
    int64_t offsets[kLeaf];

    // Where the range of a row begins.
    int range_from(int row) const { return from[row] < ranged[row] ? from[row] : ranged[row]; }
};

// Takes away what is before the rows' windows.
template <typename T>
void slide(const Item<T>& it, Leaf& leaf) {
    leaf.least = kLeaf;
    leaf.most = 0;
    for (int r = 0; r < it.num_rows; ++r) {
        leaf.from[r] = clamp(it.first[it.node[r]] - leaf.begin, kLeaf);
        leaf.slides |= leaf.from[r] > 0;
        if (leaf.count[r] <= leaf.from[r]) leaf.count[r] = leaf.ranged[r] = leaf.from[r] = 0;
        if (leaf.range_from(r) == leaf.ranged[r]) continue;
        leaf.least = leaf.from[r] < leaf.least ? leaf.from[r] : leaf.least;
        leaf.most = leaf.ranged[r] > leaf.most ? leaf.ranged[r] : leaf.most;
    }
    if (leaf.most == 0) leaf.least = 0;
}

template <typename T>
void find_keys(const Item<T>& it, Leaf& leaf) {
    leaf.least = leaf.most = 0;
    leaf.slides = false;
    for (int r = 0; r < it.num_rows; ++r) {
        const int node = it.node[r], range = it.range[node] - leaf.begin;
        leaf.from[r] = 0;
        leaf.ranged[r] = clamp(range, kLeaf);
        leaf.count[r] = clamp(range + it.num_own[node], kLeaf);
        leaf.most = leaf.ranged[r] > leaf.most ? leaf.ranged[r] : leaf.most;
    }
    if (it.slides) slide(it, leaf);
    const int count = leaf.most - leaf.least;
    range_offsets(it, leaf.begin + leaf.least, count, leaf.offsets + leaf.least);
}

// Calls body(R, row, offsets, count, column) for the rows' own keys, node by node.
template <typename T, typename Body>
void over_own_keys(const Item<T>& it, const Leaf& leaf, Body&& body) {
    for (int begin = 0, end; begin < it.num_rows; begin = end) {
        const int node = it.node[begin], ranged = leaf.ranged[begin];
        const int column = leaf.from[begin] > ranged ? leaf.from[begin] : ranged;
        for (end = begin + 1; end < it.num_rows && it.node[end] == node;) ++end;
        const int count = leaf.count[begin] - column;
        if (count == 0) continue;
        const int64_t* offsets = it.own[node] + (leaf.begin + column - it.range[node]);
        in_blocks(begin, end, [&](auto size, int row) { body(size, row, offsets, count, column); });
    }
}

// Calls body(R, row, begin, end) over the ranges of rows row..row+R in order: for all of them
// where all see the keys, row by row before and behind.
template <int R, typename Body>
void over_ranges(const Leaf& leaf, int row, Body&& body) {
    int begin = 0, end = kLeaf;
    for (int r = row; r < row + R; ++r) end = leaf.ranged[r] < end ? leaf.ranged[r] : end;
    if (leaf.slides) {
        for (int r = row; r < row + R; ++r)
            begin = leaf.range_from(r) > begin ? leaf.range_from(r) : begin;
        if (begin >= end) begin = end = kLeaf;
        for (int r = row; r < row + R; ++r) {
            const int before = leaf.ranged[r] < begin ? leaf.ranged[r] : begin;
            if (leaf.range_from(r) < before) body(Size<1>{}, r, leaf.range_from(r), before);
        }
        body(Size<R>{}, row, begin, end);
    } else {
        body(Size<R>{}, row, 0, end);  // what begins with 0 is compiled for that
    }
    for (int r = row; r < row + R; ++r)
        if (leaf.ranged[r] > end) body(Size<1>{}, r, end, leaf.ranged[r]);
}

template <typename T>
void score_leaf(Item<T>& it, const Leaf& leaf) {
    const auto keys = [&](auto size, int row, const int64_t* offsets, int count, int column) {
        score_keys<decltype(size)::value>(it, row, offsets, count, column);
    };
    const int least = leaf.least, most = leaf.most;
    if (it.is_tiled) {
        read_keys(it.tile, it.keys, leaf.offsets, least, most);
        in_even_blocks<kScoreRows>(it.num_rows, [&](auto size, int row) {
            constexpr int R = decltype(size)::value;
            const float* q[R];
            float* score[R];
            for (int r = 0; r < R; ++r) q[r] = it.q[row + r], score[r] = it.score[row + r];
            score_tile<R>(it.tile, q, least, most, it.scale, score);
        });
    } else if (least < most) {
        in_blocks(0, it.num_rows, [&](auto size, int row) {
            keys(size, row, leaf.offsets + least, most - least, least);
        });
    }
    over_own_keys(it, leaf, keys);
}

// Values of the tile.
template <typename T>
void value_ranges(Item<T>& it, const Leaf& leaf) {
    read_values(it.tile, it.values, leaf.offsets, leaf.least, leaf.most);
    in_even_blocks<kValueRows>(it.num_rows, [&](auto size, int row) {
        over_ranges<decltype(size)::value>(leaf, row,
                                           [&](auto part, int first, int begin, int end) {
                                               constexpr int R = decltype(part)::value;
                                               const float* weight[R];
                                               float* out[R];
                                               for (int r = 0; r < R; ++r) {
                                                   weight[r] = it.score[first + r];
                                                   out[r] = it.row_of(it.leaf_value, first + r);
                                               }
                                               value_tile<R>(it.tile, weight, begin, end, out);
                                           });
    });
}

template <typename T>
void value_leaf(Item<T>& it, const Leaf& leaf) {
    const auto keys = [&](auto size, int row, const int64_t* offsets, int count, int column) {
        value_keys<decltype(size)::value>(it, row, offsets, count, column);
    };
    if (!it.is_tiled || leaf.slides) {  // what begins with a tile's first key needs no zeros
        const int64_t floats = int64_t{it.num_rows} * it.p.head_dim;
        std::memset(it.leaf_value, 0, sizeof(float) * static_cast<size_t>(floats));
    }
    if (it.is_tiled) {
        value_ranges(it, leaf);
    } else {
        in_blocks(0, it.num_rows, [&](auto size, int row) {
            over_ranges<decltype(size)::value>(
                leaf, row, [&](auto part, int first, int begin, int end) {
                    keys(part, first, leaf.offsets + begin, end - begin, begin);
                });
        });
    }
    over_own_keys(it, leaf, keys);
}

// Scores in units of the cap to capped ones.
void cap_scores(float* score, float cap) {
    for (int i = 0; i < kLeaf; i += 16) store(mul(tanh(load(score + i)), splat(cap)), score + i);
}

// Scores to exponentials; lanes that are not of begin..end become exp(-inf) = 0.
void soften(float* score, int begin, int end, float* max_out, float* sum_out) {
    for (int i = 0; i < begin; ++i) score[i] = -__builtin_inff();
    for (int i = end; i < kLeaf; ++i) score[i] = -__builtin_inff();
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

// (max, sum, value) of the leaves so far: the first one's,
template <typename T>
void begin_row(Item<T>& it, int row) {
    it.max[row] = it.leaf_max[row];
    it.sum[row] = it.leaf_sum[row];
    std::memcpy(it.row_of(it.value, row), it.row_of(it.leaf_value, row),
                sizeof(float) * static_cast<size_t>(it.p.head_dim));
}

// then joined with the next leaf's, both rescaled to their max.
template <typename T>
void merge(Item<T>& it, int row, float top, float keep, float take) {
    it.max[row] = top;
    it.sum[row] = it.sum[row] * keep + it.leaf_sum[row] * take;
    const float* leaf_value = it.row_of(it.leaf_value, row);
    float* value = it.row_of(it.value, row);
    for (int i = 0; i < it.p.head_dim; i += 16) {
        const V16 kept = mul(load(value + i), splat(keep));
        store(fma(load(leaf_value + i), splat(take), kept), value + i);
    }
}

template <typename T>
void merge_leaf(Item<T>& it, const Leaf& leaf) {
    const auto is_first = [&](int r) { return it.first[it.node[r]] >= leaf.begin; };
    if (leaf.begin == 0 || it.slides)
        for (int r = 0; r < it.num_rows; ++r)
            if (leaf.count[r] > 0 && is_first(r)) begin_row(it, r);
    if (leaf.begin == 0) return;
    for (int begin = 0; begin < it.num_rows; begin += 16) {
        // Lanes of no row, or of one that has no key here or before, come to nothing.
        const V16 old_max = load(it.max + begin), leaf_max = load(it.leaf_max + begin);
        const V16 most = max(old_max, leaf_max);
        float top[16], keep[16], take[16];
        store(most, top);
        store(exp(sub(old_max, most)), keep);
        store(exp(sub(leaf_max, most)), take);
        for (int r = 0; r < 16 && begin + r < it.num_rows; ++r) {
            const int row = begin + r;
            const bool joins = leaf.count[row] > 0 && !(it.slides && is_first(row));
            if (joins) merge(it, row, top[r], keep[r], take[r]);
        }
    }
}

template <typename T>
void run_leaf(Item<T>& it, int index) {
    Leaf leaf;
    leaf.begin = index * kLeaf;
    find_keys(it, leaf);
    score_leaf(it, leaf);
    if (it.p.cap > 0.0f)
        for (int r = 0; r < it.num_rows; ++r) cap_scores(it.score[r], it.p.cap);
    for (int r = 0; r < it.num_rows; ++r) {
        const int begin = leaf.from[r], end = leaf.count[r];
        if (end > 0) soften(it.score[r], begin, end, &it.leaf_max[r], &it.leaf_sum[r]);
    }
    value_leaf(it, leaf);
    merge_leaf(it, leaf);
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
    int longest = 0, first = INT32_MAX;
    for (int r = 0; r < it.num_rows; ++r) {
        const int node = it.node[r], length = it.range[node] + it.num_own[node];
        longest = length > longest ? length : longest;
        first = it.first[node] < first ? it.first[node] : first;
        it.sum[r] = 0.0f;  // stays so only if nothing at all is visible
    }
    for (int leaf = first / kLeaf; leaf * kLeaf < longest; ++leaf) run_leaf(it, leaf);
    for (int r = 0; r < it.num_rows; ++r) {
        const V16 sum = splat(it.sum[r]);
        const bool is_blind = it.sum[r] == 0.0f;
        float* value = it.row_of(it.value, r);
        for (int i = 0; i < it.p.head_dim; i += 16)
            store(is_blind ? zero() : div(load(value + i), sum), value + i);
        write_row(it.p, value, it.out[r]);
    }
}

template <typename T>
void item(const TreeAttentionParams& p, int seq, int head, int first_row, int end) {
    Item<T> it(p, seq, head);
    Ancestors nodes[kMostRows];
    int num_nodes = 0, last_node = -1;
    for (int row = first_row; row < end; ++row) {
        const int node = row / p.group, q_head = head * p.group + row % p.group;
        const int64_t out =
            seq * p.out_stride[0] + node * p.out_stride[1] + q_head * p.out_stride[2];
        if (node >= p.num_nodes[seq]) {
            const float zeros[kMaxDim] = {};
            write_row(p, zeros, out);
            continue;
        }
        if (node != last_node) nodes[num_nodes++] = ancestors_of(it, node);
        last_node = node;
        const int r = it.num_rows++;
        it.node[r] = num_nodes - 1;
        it.out[r] = out;
        const int64_t q = seq * p.q_stride[0] + node * p.q_stride[1] + q_head * p.q_stride[2];
        it.q[r] = read_row(p, q, it.row_of(it.query, r));
    }
    if (it.num_rows == 0) return;
    it.is_tiled = it.num_rows >= kTileRows;
    divide_keys(it, nodes, num_nodes);
    run_item(it);
}

// Items of a pair of sequence and kv head: of many rows, unless threads would go without.
int64_t items_of_pair(const TreeAttentionParams& p, int num_parts) {
    const int64_t rows = int64_t{p.num_nodes_max} * p.group;
    const int64_t pairs = int64_t{p.num_seqs} * p.num_kv_heads;
    int most = kMostFloats / p.head_dim < kMostRows ? kMostFloats / p.head_dim : kMostRows;
    while (most > kFewRows && (rows + most - 1) / most * pairs < num_parts) most /= 2;
    return (rows + most - 1) / most;
}

template <typename T>
void items_of_part(const TreeAttentionParams& p, int part, int num_parts) {
    const int64_t rows = int64_t{p.num_nodes_max} * p.group, items = items_of_pair(p, num_parts);
    const int64_t total = p.num_seqs * p.num_kv_heads * items;
    for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i) {
        const int64_t pair = i / items, index = i % items;
        item<T>(p, static_cast<int>(pair / p.num_kv_heads), static_cast<int>(pair % p.num_kv_heads),
                static_cast<int>(rows * index / items),
                static_cast<int>(rows * (index + 1) / items));
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
