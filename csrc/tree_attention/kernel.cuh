// A block of threads takes one sequence, one key/value head, up to 128 rows (a row is one query
// head of one node; nodes and the heads of the group are flattened) and one *unit* of the sequence:
// 2^k aligned leaves of 256 keys. A leaf is gone through in blocks of 64 keys by online softmax;
// leaves, then units, are merged in an aligned binary tree. A row's bits follow from the order in
// which its own keys come, so they depend neither on k nor on the grid, and every choice below
// (rows a block, leaves a unit) is free.
//
// Positions are those among the keys that a row sees: of a prefix with a window, sinks and window
// stand side by side, so nothing else is read, masked or waited for. A sliding window is another
// thing: positions stay, and what is before the first window of the rows is passed over, leaves and
// units and all. Blocks of 64 keys that some rows see and others do not are gone through like the
// tail, row by row.
//
// The prefix is streamed through three stages of shared memory by cp.async. The last block of the
// prefix and the tree's own slots come last, in the same memory, and are looked up row by row.
//
//     position      0        64       128      150         170
//     prefix 150    | whole  | whole  | tail: 22 keys of the prefix, then 20 slots of the tree |
//     Span          begin             tail                 end
//
//     step i        0    1    2    3        stage i % 3 has block i
//     wait for      0    1    2    3        its group of cp.async
//     barrier                               all see it, and nobody reads block i - 1 any more
//     fetch         2    3    4    5        into the stage that held block i - 1
//     multiply      0    1    2    3
#pragma once
#include "core/launch.cuh"
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "tree_attention/append.cuh"
#include "tree_attention/block.cuh"
#include "tree_attention/plan.cuh"
#include "tree_attention/state.cuh"
#include "tree_attention/tree_attention.h"

namespace specrt::attention {

// What a block works on, and where it lies.
template <typename T>
struct Work {
    T *keys, *values;      // this head's, of all pages
    const int32_t* pages;  // this sequence's
    Division page;
    int seq, head, first_row;
    int prefix, num_nodes, tree_size;  // keys seen of it; rows that are nodes; slots of the tree
    int hidden;  // slots of the prefix between sinks and window, which are not seen
    int first;   // of the prefix's keys the first one in any row's sliding window

    // Where the key numbered `i` among those of a row lies.
    __device__ int slot(int num_sinks, int i) const { return i < num_sinks ? i : i + hidden; }
};

template <typename T, int D>
__device__ __forceinline__ int64_t offset_of(const TreeAttentionParams& p, const Work<T>& w,
                                             int slot) {
    const int page = w.page.quotient(slot), row = slot - page * p.table.page_size;
    // A slot past the sequence's pages belongs to no node that counts, but is not read elsewhere.
    const unsigned known = w.pages[min(page, p.table.max_pages - 1)];
    const int64_t at = int64_t{clamp_index(known, p.table.num_pages)} * p.table.page_size + row;
    return at * (p.num_kv_heads * D);
}

// Copies keys numbered `first` .. `first + count` to pool rows `row` and on.
template <typename T, int D>
__device__ __forceinline__ void fetch(const TreeAttentionParams& p, const Work<T>& w,
                                      const Pool<T, D>& pool, int row, int first, int count) {
    constexpr int kChunks = D / 8;  // of 16 bytes
    for (int i = threadIdx.x; i < count * kChunks; i += blockDim.x) {
        const int r = i / kChunks, column = i % kChunks * 8;
        const int64_t from = offset_of<T, D>(p, w, w.slot(p.num_sinks, first + r)) + column;
        const int to = (row + r) * kStride<D> + column;
        ptx::cp_async_16(pool.keys + to, w.keys + from);
        ptx::cp_async_16(pool.values + to, w.values + from);
    }
}

// Of keys `at` .. `at + count` of the prefix those that any row sees, to pool rows `row` and on.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void fetch_seen(const TreeAttentionParams& p, const Work<T>& w,
                                           const Pool<T, D>& pool, int row, int at, int count) {
    const int hidden = kPlain ? 0 : max(w.first - at, 0);
    fetch(p, w, pool, row + hidden, at + hidden, count - hidden);
}

// The rows of this call as keys and values of the tree: rotated and into the pool, and by the block
// that `is_writer` into the cache too. Others never read those slots of the cache.
template <typename T, int D>
__device__ __forceinline__ void append_rows(const TreeAttentionParams& p, const Work<T>& w,
                                            const Pool<T, D>& pool, bool is_writer) {
    constexpr int kPairs = D / 16;  // of eight columns and their partners
    const AppendParams& a = p.append;
    const int first = w.tree_size - w.num_nodes, committed = w.prefix + w.hidden;
    for (int i = threadIdx.x; i < w.num_nodes * kPairs; i += blockDim.x) {
        const int row = i / kPairs, column = i % kPairs * 8;
        const T* key = static_cast<const T*>(a.k) + w.seq * a.k_stride[0] + row * a.k_stride[1] +
                       w.head * a.k_stride[2] + column;
        const T* value = static_cast<const T*>(a.v) + w.seq * a.v_stride[0] + row * a.v_stride[1] +
                         w.head * a.v_stride[2] + column;
        Pack<T, 8> low = load_pack<8>(key), high = load_pack<8>(key + D / 2);
        const Pack<T, 8> value_low = load_pack<8>(value), value_high = load_pack<8>(value + D / 2);
        rotate_key<T, D>(low, high, angles(a, w.seq, row, committed, D) + column);
        const int to = (kBlock + first + row) * kStride<D> + column;
        store_shared_pack(pool.keys + to, low), store_shared_pack(pool.keys + to + D / 2, high);
        store_shared_pack(pool.values + to, value_low),
            store_shared_pack(pool.values + to + D / 2, value_high);
        const int slot = committed + first + row;
        if (!is_writer || w.page.quotient(slot) >= p.table.max_pages) continue;
        const int64_t at = offset_of<T, D>(p, w, slot) + column;
        store_pack(w.keys + at, low), store_pack(w.keys + at + D / 2, high);
        store_pack(w.values + at, value_low), store_pack(w.values + at + D / 2, value_high);
    }
}

// A thread's quarter of the queries of its warp's 16 rows; rows that are no node's are zero.
template <typename T, int D>
__device__ __forceinline__ void read_queries(const TreeAttentionParams& p, const Work<T>& w,
                                             int warp_row, bool appends, uint32_t (&q)[D / 16][4]) {
    const int lane = threadIdx.x % 32, active = w.num_nodes * p.group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = warp_row + lane / 4 + 8 * i, node = row / p.group;
        const T* from = static_cast<const T*>(p.q) + w.seq * p.q_stride[0] + node * p.q_stride[1] +
                        (w.head * p.group + row % p.group) * p.q_stride[2] + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t bits = 0;
                if (row < active) bits = load_word(from + 16 * k + 8 * half);
                q[k][2 * half + i] = bits;
            }
        if (appends && row < active)
            rotate_queries<T, D>(q, i, angles(p.append, w.seq, node, w.prefix + w.hidden, D));
    }
}

// Rows `from` and on of the block's rows, as far as there are any, from a state or as zeros.
template <typename T, int D>
__device__ __forceinline__ void write_rows(const TreeAttentionParams& p, const Work<T>& w,
                                           int warp_row, const State<D>& s) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = warp_row + lane / 4 + 8 * i, node = row / p.group;
        if (row >= p.num_nodes_max * p.group) continue;
        const bool is_blank = node >= w.num_nodes || s.sum[i] == 0.0f;
        T* to = static_cast<T*>(p.out) + w.seq * p.out_stride[0] + node * p.out_stride[1] +
                (w.head * p.group + row % p.group) * p.out_stride[2] + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; ++e)  // + 0: a zero has no sign
                x[e] = is_blank ? 0.0f : __fadd_rn(__fdiv_rn(s.acc[n][2 * i + e], s.sum[i]), 0.0f);
            const uint32_t bits = pack<T>(x[0], x[1]);
            store_word(to + 8 * n, bits);
        }
    }
}

// Bits 0 .. last, for any last >= 0.
__device__ __forceinline__ uint64_t up_to(int last) {
    return last >= 63 ? ~uint64_t{0} : (uint64_t{2} << last) - 1;
}

// Fills ancestors[node][rank] and counts[node] for the nodes of the block's rows.
template <typename T>
__device__ __forceinline__ void read_tree(const TreeAttentionParams& p, const Work<T>& w,
                                          uint8_t* ancestors, int* counts) {
    constexpr int kBits = 8, kParts = kMaxNodes / kBits;  // a thread takes eight bits of a node
    const int first = w.first_row / p.group, most = blockDim.x / 2;
    const int num_local = min(w.num_nodes - first, most);
    for (int i = threadIdx.x; i < num_local * kParts; i += blockDim.x) {
        const int local = i / kParts, begin = i % kParts * kBits, node = first + local;
        // Nothing above a node has a greater index: a stray bit must not show an unwritten slot.
        const int self = w.tree_size - w.num_nodes + node;
        const uint64_t* from =
            p.ancestors + w.seq * p.ancestors_stride[0] + node * p.ancestors_stride[1];
        const uint64_t low = from[0] & up_to(self);
        const uint64_t high = p.num_words > 1 && self >= 64 ? from[1] & up_to(self - 64) : 0;
        const uint64_t word = begin < 64 ? low : high;
        const uint64_t before = word & ((uint64_t{1} << begin % 64) - 1);
        uint8_t* to = ancestors + local * kMaxNodes;
        int rank = __popcll(before) + (begin < 64 ? 0 : __popcll(low));
        for (unsigned bits = word >> begin % 64 & 0xff; bits; bits &= bits - 1)
            to[rank++] = static_cast<uint8_t>(begin + __ffs(static_cast<int>(bits)) - 1);
        if (begin > 0) continue;
        counts[local] = __popcll(low) + __popcll(high);
        if (counts[local] == 0) to[0] = 0;
    }
}

// Shared memory, for R = 16 rows a warp:
//
//     keys       [192][D + 8] T      three stages of 64; then 64 of the prefix, 128 of the tree
//     values     [192][D + 8] T
//     counts     [R] int             ancestors of each node of the block's rows
//     ancestors  [R][128] uint8      and which: a node's, from the root down
//     levels     [L][threads] State  of merging within the unit, as many as fit
template <typename T, int D>
struct BlockMemory {
    Pool<T, D> pool;
    int* counts;
    uint8_t* ancestors;
    float4* levels;

    __device__ explicit BlockMemory(unsigned char* memory) {
        const int rows = blockDim.x / 2;  // 16 a warp
        pool.keys = reinterpret_cast<T*>(memory);
        pool.values = pool.keys + kPoolRows * kStride<D>;
        memory += size_t{2} * kPoolRows * kStride<D> * sizeof(T);
        levels = reinterpret_cast<float4*>(memory + rows * (kMaxNodes + sizeof(int)));
        counts = reinterpret_cast<int*>(memory);
        ancestors = memory + rows * sizeof(int);
    }
};

// The units of a sequence that hold what its rows see, and which of them a block has.
struct Units {
    int log_leaves, first, last, index;  // of a unit; numbers; of the block's, from `first` on
    int seen_leaf, num_leaves;           // of the sequence: the first that is seen, all
    bool is_all;                         // known while compiling: seen from the first leaf on

    __device__ int number() const { return first + index; }
    __device__ int begin() const { return number() << log_leaves; }  // its first leaf
    __device__ int size() const { return min(num_leaves - begin(), 1 << log_leaves); }
    // Its first leaf that is seen, as it counts them.
    __device__ int first_leaf() const { return is_all ? 0 : max(seen_leaf - begin(), 0); }
};

// The part of the workspace that is a block's or a row tile's. All of it:
//
//     tickets  [4096]                        at the same place whatever the shape: zeroed once
//     slots    [tiles][units] State          where units meet; none if there is one unit
//     levels   [tiles][units][deep] State    of merging within a unit, past those in shared memory
struct Workspace {
    Merge merge;
    Stack stack;

    __device__ Workspace(const KernelParams& k, int tile_index, const Units& units,
                         float4* levels) {
        auto* tickets = static_cast<unsigned*>(k.p.workspace);
        auto* slots = reinterpret_cast<float4*>(tickets + kMaxTickets);
        const int64_t tiles = int64_t{k.p.num_seqs} * k.p.num_kv_heads * k.plan.num_tiles,
                      size = k.plan.slot_vectors;
        const int64_t first = int64_t{tile_index} * k.plan.num_units;
        const bool has_merge = k.plan.num_units > 1;
        merge = {tickets + first, slots + first * size, units.first, units.last,
                 k.plan.slot_vectors};
        const int64_t deep = k.plan.num_levels - k.plan.shared_levels;
        const int64_t begin = has_merge ? tiles * k.plan.num_units : 0;
        stack = {levels,
                 slots + (begin + (first + units.index) * deep) * size,
                 k.plan.shared_levels,
                 k.plan.slot_vectors,
                 units.first_leaf(),
                 units.is_all ? INT32_MAX : k.plan.num_levels - 1};
    }
};

// The blocks of 64 keys of a unit, as positions: whole ones up to `tail`, then those of the tail.
struct Span {
    int begin;  // of the unit
    int first;  // block that any row sees
    int tail, end;

    __device__ int leaf(int at) const { return (at - begin) / kLeaf; }
    __device__ bool begins_leaf(int at) const { return at > first && (at - begin) % kLeaf == 0; }
};

template <typename T, int D, bool kPlain>
__device__ __forceinline__ void begin_stream(const TreeAttentionParams& p, const Work<T>& w,
                                             const Pool<T, D>& pool, const Span& span) {
    for (int i = 0; i < kStages - 1; ++i) {
        const int at = span.first + i * kBlock;
        if (at < span.tail) fetch_seen<T, D, kPlain>(p, w, pool, i * kBlock, at, kBlock);
        ptx::cp_async_commit();
    }
}

// What the warp's rows see behind `begin`, whose key is in a row of the pool. It has such rows.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ Tail<kPlain> tail_of(const TreeAttentionParams& p, const Work<T>& w,
                                                const BlockMemory<T, D>& memory, int warp_row,
                                                int begin) {
    const int lane = threadIdx.x % 32, last_row = min(warp_row + 15, w.num_nodes * p.group - 1);
    const int first_node = w.first_row / p.group;
    const auto local = [&](int row) { return min(row, last_row) / p.group - first_node; };
    Tail<kPlain> tail{memory.ancestors,
                      memory.counts,
                      begin,
                      w.prefix,
                      local(warp_row),
                      local(warp_row + 15),
                      {local(warp_row + lane / 4), local(warp_row + lane / 4 + 8)},
                      /*pool_row=*/0,
                      p.sliding_window,
                      INT32_MAX,
                      0};
    if constexpr (!kPlain)
        for (int node = tail.first_node; node <= tail.last_node; ++node) {
            const int first = tail.first(node);
            tail.least = min(tail.least, first), tail.most = max(tail.most, first);
        }
    return tail;
}

template <typename T, int D, bool kPlain>
__device__ __forceinline__ void stream_prefix(const TreeAttentionParams& p, const Work<T>& w,
                                              const BlockMemory<T, D>& memory, const Span& span,
                                              int warp_row, const uint32_t (&q)[D / 16][4],
                                              const Scaling& by, const Stack& stack, int num_leaves,
                                              State<D>& s) {
    const Pool<T, D>& pool = memory.pool;
    const int num_blocks = (span.tail - span.first) / kBlock;
    const bool has_rows = warp_row < w.num_nodes * p.group;
    Tail<kPlain> head{};
    if constexpr (!kPlain)
        if (has_rows) head = tail_of<T, D, kPlain>(p, w, memory, warp_row, 0);
    for (int i = 0; i < num_blocks; ++i) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // block i is there, and block i - 1 no longer read
        const int at = span.first + i * kBlock, row = i % kStages * kBlock;
        const int next = i + kStages - 1;
        if (next < num_blocks)
            fetch(p, w, pool, next % kStages * kBlock, span.first + next * kBlock, kBlock);
        ptx::cp_async_commit();
        if (!has_rows) continue;
        if (span.begins_leaf(at)) clear(s);
        if (kPlain || at >= head.most) {
            whole_block<T, D, kPlain>(q, pool, row, by, s);
        } else if (at + kBlock > head.least) {
            head.begin = at, head.pool_row = row;
            tail_block<T, D>(q, pool, head, at, w.prefix, by, s);
        }
        const bool ends_leaf = (at + kBlock - span.begin) % kLeaf == 0;
        if (ends_leaf) finish_leaf(s, stack, span.leaf(at), num_leaves);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
}

template <typename T, int D, bool kPlain>
__device__ __forceinline__ void run_tail(const TreeAttentionParams& p, const Work<T>& w,
                                         const BlockMemory<T, D>& memory, const Span& span,
                                         int warp_row, bool appends, const uint32_t (&q)[D / 16][4],
                                         const Scaling& by, const Stack& stack, int num_leaves,
                                         State<D>& s) {
    if (span.tail < w.prefix)
        fetch_seen<T, D, kPlain>(p, w, memory.pool, 0, span.tail, w.prefix - span.tail);
    fetch(p, w, memory.pool, kBlock, w.prefix, w.tree_size - (appends ? w.num_nodes : 0));
    ptx::cp_async_commit();
    if (appends) {
        const bool has_end = span.begin + num_leaves * kLeaf > w.prefix / kBlock * kBlock;
        const bool is_first = w.first_row == 0 && span.begin <= w.prefix / kBlock * kBlock;
        append_rows(p, w, memory.pool, is_first && has_end);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (warp_row >= w.num_nodes * p.group) return;
    const Tail<kPlain> tail = tail_of<T, D, kPlain>(p, w, memory, warp_row, span.tail);
    int end = 0;
    for (int node = tail.first_node; node <= tail.last_node; ++node) end = max(end, tail.end(node));
    for (int at = span.tail; at < span.end; at += kBlock) {
        if (span.begins_leaf(at)) clear(s);
        if (at < end && (kPlain || at + kBlock > tail.least))
            tail_block<T, D>(q, memory.pool, tail, at, end, by, s);
        const bool ends_leaf = (at + kBlock - span.begin) % kLeaf == 0 || at + kBlock >= span.end;
        if (ends_leaf) finish_leaf(s, stack, span.leaf(at), num_leaves);
    }
}

// With a sliding window or a cap one kernel does both: `kAppends` says that it can.
template <typename T, int D, bool kAppends, bool kPlain>
__global__ void __launch_bounds__(256, 1) tree_attention_kernel(const KernelParams k) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const TreeAttentionParams& p = k.p;
    if (!is_any_open({p.is_open, p.num_seqs})) return;
    // The last units, which have few keys or none, come last: what does not fit at once is short.
    const int index = blockIdx.y, tile = blockIdx.x % k.plan.num_tiles;
    Work<T> w;
    w.seq = blockIdx.z;
    w.head = blockIdx.x / k.plan.num_tiles;
    w.keys = static_cast<T*>(p.k_cache) + int64_t{w.head} * D;
    w.values = static_cast<T*>(p.v_cache) + int64_t{w.head} * D;
    w.pages = p.table.pages + w.seq * p.table.stride;
    w.page = k.page;
    // The host cannot check these, and shared memory and workspace are laid out for no more.
    const int committed = min(max(p.kv_len[w.seq], 0), p.table.num_slots);
    w.prefix = min(committed, k.plan.max_prefix);
    w.hidden = committed - w.prefix;
    w.first = kPlain ? 0 : max(w.prefix + 1 - p.sliding_window, 0);
    const int first_node = min(max(p.first_node[w.seq], 0), kMaxNodes);
    w.num_nodes = min(min(max(p.num_nodes[w.seq], 0), p.num_nodes_max), kMaxNodes - first_node);
    w.tree_size = first_node + w.num_nodes;
    w.first_row = tile * static_cast<int>(blockDim.x / 2);

    State<D> s;
    clear(s);
    const int warp_row = w.first_row + threadIdx.x / 32 * 16, active = w.num_nodes * p.group;
    if (w.first_row >= active) {  // nothing but rows to be zeroed
        if (index == 0) write_rows(p, w, warp_row, s);
        return;
    }
    const int length = w.prefix + w.tree_size, leaves = (length + kLeaf - 1) / kLeaf;
    Units units{0, 0, 0, index, w.first / kLeaf, leaves, kPlain};
    const auto unit_of = [&](int leaf) { return leaf >> units.log_leaves; };
    while (unit_of(leaves - 1) - unit_of(units.seen_leaf) >= k.plan.num_units) ++units.log_leaves;
    units.first = unit_of(units.seen_leaf), units.last = unit_of(leaves - 1);
    if (units.number() > units.last) return;
    const int num_leaves = units.size();

    Span span;
    span.begin = units.begin() * kLeaf;
    span.first = kPlain ? span.begin : max(span.begin, w.first / kBlock * kBlock);
    span.end = min(length, span.begin + num_leaves * kLeaf);
    span.tail = min(max(w.prefix / kBlock * kBlock, span.begin), span.begin + num_leaves * kLeaf);

    const BlockMemory<T, D> memory(dynamic_shared());
    const int tile_index = (w.seq * p.num_kv_heads + w.head) * k.plan.num_tiles + tile;
    const Workspace workspace(k, tile_index, units, memory.levels);
    const Scaling by = scaling_of<kPlain>(p);
    begin_stream<T, D, kPlain>(p, w, memory.pool, span);
    // Beside the first keys on their way.
    if (!kPlain || span.tail < span.end) read_tree(p, w, memory.ancestors, memory.counts);
    const bool appends = kAppends && (kPlain || p.append.k);
    uint32_t q[D / 16][4];
    read_queries<T, D>(p, w, warp_row, appends, q);
    if constexpr (!kPlain) __syncthreads();  // where windows begin follows from the tree
    stream_prefix<T, D, kPlain>(p, w, memory, span, warp_row, q, by, workspace.stack, num_leaves,
                                s);
    if (span.tail < span.end)
        run_tail<T, D, kPlain>(p, w, memory, span, warp_row, appends, q, by, workspace.stack,
                               num_leaves, s);
    SPECRT_SHARED(int, flag);
    if (merge_units(s, workspace.merge, units.number(), &flag)) write_rows(p, w, warp_row, s);
}

template <typename T, int D, bool kPlain>
void start(const KernelParams& k, CudaStream stream) {
    const TreeAttentionParams& p = k.p;
    const LaunchShape shape{dim3(p.num_kv_heads * k.plan.num_tiles, k.plan.num_units, p.num_seqs),
                            dim3(32 * k.plan.num_warps), k.plan.shared_bytes, kOverlaps};
    if constexpr (kPlain)
        if (!p.append.k) {
            SPECRT_LAUNCH((tree_attention_kernel<T, D, false, true>), shape, stream, k);
            return;
        }
    SPECRT_LAUNCH((tree_attention_kernel<T, D, true, kPlain>), shape, stream, k);
}

}  // namespace specrt::attention
