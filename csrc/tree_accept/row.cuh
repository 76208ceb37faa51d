// A row of logits as a block of threads sees it: whose it is, what its sampling asks for, and its
// values after bias, penalties and temperature, sixteen a thread.
#pragma once
#include "core/mass.h"
#include "core/reduce.cuh"
#include "core/tile_maxima.h"
#include "tree_accept/workspace.h"

namespace specrt {

constexpr float kInf = __builtin_huge_valf();
constexpr int32_t kAnyId = 0x7fffffff;

// One tree, and the way from one of its nodes up to the root.
struct Lineage {
    int32_t parents[kMostAcceptNodes], tokens[kMostAcceptNodes];
    int32_t above[kMostAcceptNodes];  // the node's and its ancestors' tokens, without the root's
    int32_t has_children;
};

// A chunk whose logits are edited.
struct Chunk {
    float values[kChunk];
    unsigned counts[kChunk];  // bit 0: seen at all; above it the number of output tokens
};

struct Row {
    SamplingRow s;
    const float* logits;
    int64_t index, seq;
    int node, depth, num_nodes;
    bool is_live;  // the walk may come here: a node whose ancestors are nodes up to the root
    bool is_greedy, counts_tokens, is_edited, rejects;

    // Whether the first launch draws the token, and not only finds the maximum.
    __device__ bool is_drawn_at_once(int64_t vocab) const {
        return !rejects && draws_unfiltered(s, vocab);
    }
    // Whether the keys of core/tile_maxima.h tell what the first launch is to find: the token, or
    // with a filter the maximum, which division leaves where it is.
    __device__ bool has_maxima(const TreeAcceptParams& p) const {
        if (!p.maxima || is_edited) return false;
        if (draws_unfiltered(s, p.vocab)) return !rejects;
        return is_greedy || (s.temperature > 0.0f && s.temperature < kInf);
    }
    __device__ uint64_t position(const TreeAcceptParams& p) const {
        return static_cast<uint64_t>(p.history_len[seq]) + static_cast<uint64_t>(depth);
    }
};

__device__ __forceinline__ int num_nodes_of(const TreeAcceptParams& p, int64_t seq) {
    const int32_t count = p.num_nodes[seq], most = static_cast<int32_t>(p.nodes);
    return count < 1 ? 1 : count < most ? count : most;
}

__device__ __forceinline__ void read_tree(const TreeAcceptParams& p, int64_t seq, Lineage* tree) {
    __syncthreads();  // one from before may still be read
    for (int64_t i = threadIdx.x; i < p.nodes; i += blockDim.x) {
        tree->parents[i] = p.parents[seq * p.nodes + i];
        tree->tokens[i] = p.draft_tokens[seq * p.nodes + i];
    }
    if (threadIdx.x == 0) tree->has_children = 0;
    __syncthreads();
}

// Up from the row's node, as far as parents stand before their children. By one thread.
__device__ __forceinline__ void find_ancestors(Row* row, Lineage* tree) {
    int at = row->node;
    row->depth = 0;
    row->is_live = at < row->num_nodes;
    while (row->is_live && at > 0) {
        const int up = tree->parents[at];
        row->is_live = 0 <= up && up < at;
        tree->above[row->depth++] = tree->tokens[at];
        at = up;
    }
}

__device__ __forceinline__ void find_children(const Row& row, Lineage* tree) {
    for (int j = row.node + 1 + threadIdx.x; j < row.num_nodes; j += blockDim.x)
        if (tree->parents[j] == row.node) tree->has_children = 1;
    __syncthreads();
}

// By one thread.
__device__ __forceinline__ void read_sampling(const TreeAcceptParams& p, Row* row) {
    SamplingRow& s = row->s;
    s = p.sampling[row->seq];
    if (s.bias_begin < 0) s.bias_begin = 0;
    if (s.bias_end > p.num_bias) s.bias_end = p.num_bias;
    row->is_greedy = s.temperature == 0.0f;
    row->counts_tokens =
        s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f;
    row->is_edited = row->counts_tokens || s.bias_begin < s.bias_end;
}

// What is the same for all threads lies in shared memory: `row` and `tree` too. All threads of the
// block must call.
__device__ __forceinline__ void read_row(const TreeAcceptParams& p, int64_t index, Row* row,
                                         Lineage* tree) {
    const int64_t seq = index / p.nodes, node = index - seq * p.nodes;
    read_tree(p, seq, tree);
    if (threadIdx.x == 0) {
        row->index = index;
        row->seq = seq;
        row->node = static_cast<int>(node);
        row->logits = p.logits + seq * p.logits_stride[0] + node * p.logits_stride[1];
        row->num_nodes = num_nodes_of(p, seq);
        read_sampling(p, row);
        find_ancestors(row, tree);
    }
    __syncthreads();
    find_children(*row, tree);
    if (threadIdx.x == 0)
        row->rejects = !row->is_greedy && p.draft_probs != nullptr && tree->has_children != 0;
    __syncthreads();
}

// --- edits
__device__ __forceinline__ void count_token(int64_t at, int size, bool is_output,
                                            unsigned* counts) {
    if (at < 0 || at >= size) return;
    if (is_output) {
        atomicAdd(counts + at, 2u);
    } else {
        atomicOr(counts + at, 1u);
    }
}

__device__ __forceinline__ void count_tokens(const TreeAcceptParams& p, const Row& row,
                                             const Lineage& tree, int64_t begin, int size,
                                             unsigned* counts) {
    const int32_t* history = p.history + row.seq * p.history_stride;
    const int64_t len = p.history_len[row.seq];
    const int64_t most = len < p.history_size ? len : p.history_size;
    for (int64_t i = threadIdx.x; i < most; i += blockDim.x)
        count_token(history[i] - begin, size, i >= row.s.prompt_len, counts);
    for (int i = threadIdx.x; i < row.depth; i += blockDim.x)
        count_token(tree.above[i] - begin, size, true, counts);
    __syncthreads();
}

__device__ __forceinline__ float penalised(float x, unsigned count, const SamplingRow& s) {
    if (count == 0) return x;
    const int num_output = static_cast<int>(count >> 1);
    x = x < 0.0f ? x * s.repetition_penalty : x / s.repetition_penalty;
    x -= s.frequency_penalty * static_cast<float>(num_output);
    if (num_output > 0) x -= s.presence_penalty;
    return x;
}

// The chunk's logits after bias and penalties. A thread owns the tokens that its number's distance
// apart, so several biases of one token are added in their order. All threads must call.
__device__ __forceinline__ void edit_chunk(const TreeAcceptParams& p, const Row& row,
                                           const Lineage& tree, int64_t begin, int size,
                                           Chunk* chunk) {
    __syncthreads();  // the chunk before may still be read
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        chunk->values[i] = row.logits[begin + i];
        chunk->counts[i] = 0;
    }
    for (int64_t i = row.s.bias_begin; i < row.s.bias_end; ++i) {
        const int64_t at = p.bias_ids[i] - begin;
        if (0 <= at && at < size && at % blockDim.x == threadIdx.x)
            chunk->values[at] += p.bias_values[i];
    }
    __syncthreads();
    if (!row.counts_tokens) return;
    count_tokens(p, row, tree, begin, size, chunk->counts);
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        chunk->values[i] = penalised(chunk->values[i], chunk->counts[i], row.s);
    __syncthreads();
}

// --- sixteen values a thread
// x[r][i] is of token first + 16 r + i: four tokens of one word each of four counters of noise
// (core/philox.h), and four loads of 16 bytes. -inf past the row's end.
struct Tile {
    float x[4][4];
    int64_t first;

    __device__ int32_t id(int r, int i) const { return static_cast<int32_t>(first) + 16 * r + i; }
};

__device__ __forceinline__ void load_tile(const float* values, int size, int at, bool is_scaled,
                                          float temperature, float (&x)[4][4]) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int start = at + 16 * r;
        if (is_aligned && start + 4 <= size) {
            const float4 v = *reinterpret_cast<const float4*>(values + start);
            x[r][0] = v.x, x[r][1] = v.y, x[r][2] = v.z, x[r][3] = v.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[r][i] = start + i < size ? values[start + i] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (is_scaled) x[r][i] /= temperature;
            if (start + i >= size) x[r][i] = -kInf;
        }
    }
}

struct Span {
    int64_t first_chunk, last_chunk;  // the last one excluded
};

// f(tile) for all of a span's tokens, as they are or processed. All threads of the block must call.
template <typename F>
__device__ __forceinline__ void for_tiles(const TreeAcceptParams& p, const Row& row,
                                          const Lineage& tree, const Span& span, bool is_raw,
                                          Chunk* room, F&& f) {
    const bool is_edited = !is_raw && row.is_edited;
    const bool is_scaled = !is_raw && !row.is_greedy && row.s.temperature != 1.0f;
    const int at = static_cast<int>(threadIdx.x / 4 * kPhiloxBlock + threadIdx.x % 4 * 4);
    for (int64_t chunk = span.first_chunk; chunk < span.last_chunk; ++chunk) {
        const int64_t begin = chunk * kChunk;
        const int64_t left = p.vocab - begin;
        const int size = left < kChunk ? static_cast<int>(left) : kChunk;
        if (is_edited) edit_chunk(p, row, tree, begin, size, room);
        Tile tile;
        load_tile(is_edited ? room->values : row.logits + begin, size, at, is_scaled,
                  row.s.temperature, tile.x);
        tile.first = begin + at;
        f(tile);
    }
}

}  // namespace specrt
