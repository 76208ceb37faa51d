// A block has one sequence.
//
// 1. The history is gone through from its end backwards, a chunk at a time: a thread compares the
//    token before each of its kEach places with the last one, and where they are equal looks
//    further back. Loads are of neighbours by neighbours, and all of a chunk's are under way before
//    one is looked at. How long the best match is, and which its most recent places are, are the
//    largest of integers, so no order of threads can show. Once as many places as are wanted have
//    the longest match that may be, older ones are not read.
//
//        place      length - 1   length - 2   ...   length - threads   length - 1 - threads   ...
//        thread         0            1        ...     threads - 1               0
//
// 2. The first warp makes the tree: lane i % 32 has node i, and looks among its own for the child
//    that a path wants. It has the tokens of a path in the same way, so that they are read once.
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "prompt_lookup/prompt_lookup.h"

namespace specrt {
namespace {

constexpr int kMaxBlock = 1024;
constexpr int kEach = 16;                                   // places of a thread in a chunk
constexpr int kOwned = PromptLookupParams::kMaxNodes / 32;  // nodes of a lane

struct Found {
    int match, count;
};

// The largest of a block's numbers, none below 0. Every other call has the same half of `scratch`,
// so that one barrier a call keeps a fast warp from overwriting what a slow one still reads.
struct BlockMax {
    int* scratch;  // two for each of at most 32 warps
    unsigned turn;

    __device__ __forceinline__ int operator()(int x) {
        int* row = scratch + 32 * (turn++ % 2);
        const unsigned lane = threadIdx.x % 32;
        x = __reduce_max_sync(kFullWarp, x);
        if (lane == 0) row[threadIdx.x / 32] = x;
        __syncthreads();
        return __reduce_max_sync(kFullWarp, lane < blockDim.x / 32 ? row[lane] : 0);
    }
};

// A thread's places of one chunk, and how long a match ends before each; 0 if none does.
struct Places {
    int match[kEach];
    int first, step;

    __device__ __forceinline__ int place(int i) const { return first - i * step; }

    __device__ __forceinline__ void look(const Searched& s, int32_t last, int max_ngram) {
        int32_t tokens[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) tokens[i] = place(i) > 0 ? s.tokens[place(i) - 1] : ~last;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            match[i] = tokens[i] == last ? match_before(s, place(i), max_ngram) : 0;
    }

    __device__ __forceinline__ int best() const {
        int most = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) most = max(most, match[i]);
        return most;
    }

    // The latest place before `bound` with this match; 0 if there is none.
    __device__ __forceinline__ int latest(int wanted, int bound) const {
        int end = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (match[i] == wanted && place(i) < bound) end = max(end, place(i));
        return end;
    }
};

// All threads of the block must call, and find `ends` written after the next barrier.
__device__ __forceinline__ Found look_up(const PromptLookupParams& p, const Searched& s,
                                         BlockMax block_max, int* ends) {
    Found found{0, 0};
    const int32_t last = s.length > 0 ? s.tokens[s.length - 1] : 0;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    for (int top = s.length - 1; top > 0; top -= threads * kEach) {
        Places mine;
        mine.first = top - thread;
        mine.step = threads;
        mine.look(s, last, p.max_ngram);
        const int best = block_max(mine.best());
        if (best < p.min_ngram || best < found.match) continue;
        if (best > found.match) found = {best, 0};
        for (int bound = top + 1; found.count < p.continuations; ++found.count) {
            bound = block_max(mine.latest(best, bound));
            if (bound == 0) break;
            if (thread == 0) ends[found.count] = bound;
        }
        if (best == p.max_ngram && found.count == p.continuations) break;
    }
    return found;
}

// The tree as a warp has it; node lane + 32 * i is a lane's own. All lanes must call.
struct Tree {
    int32_t tokens[kOwned], parents[kOwned];
    int lane, size;

    __device__ __forceinline__ void put(int32_t token, int parent) {
#pragma unroll
        for (int i = 0; i < kOwned; ++i)
            if (lane + 32 * i == size) {
                tokens[i] = token;
                parents[i] = parent;
            }
        ++size;
    }

    // The child of a node, made if it is not there; -1 if there is no room.
    __device__ __forceinline__ int child(int node, int32_t token, int room) {
        int found = -1;
#pragma unroll
        for (int i = 0; i < kOwned; ++i)
            if (parents[i] == node && tokens[i] == token) found = lane + 32 * i;
        found = __reduce_max_sync(kFullWarp, found);
        if (found >= 0) return found;
        if (size >= room) return -1;
        put(token, node);
        return size - 1;
    }

    // How many tokens of the continuation from `end` on are in the tree.
    __device__ __forceinline__ int add_path(const Searched& s, int end, int room) {
        const int period = s.length - end;
        int32_t path[kOwned];
#pragma unroll
        for (int i = 0; i < kOwned; ++i) path[i] = s.tokens[end + (lane + 32 * i) % period];
        int node = 0, count = 0;
#pragma unroll
        for (int i = 0; i < kOwned; ++i)
            for (int source = 0; source < 32 && count < s.depth; ++source) {
                node = child(node, __shfl_sync(kFullWarp, path[i], source), room);
                if (node < 0) return count;
                ++count;
            }
        return count;
    }
};

// By one warp.
__device__ __forceinline__ void grow(const PromptLookupParams& p, int64_t seq, const Searched& s,
                                     const Found& found, const int* ends) {
    Tree tree;
    tree.lane = static_cast<int>(threadIdx.x);
    tree.size = 0;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) tree.tokens[i] = tree.parents[i] = -1;  // nobody's children
    tree.put(s.length > 0 ? s.tokens[s.length - 1] : 0, -1);
    int longest = 0;
    for (int i = 0; i < found.count; ++i)
        longest = max(longest, tree.add_path(s, ends[i], p.nodes));
    if (tree.lane == 0) {
        p.num_nodes[seq] = tree.size;
        p.match_len[seq] = found.match;
        p.longest[seq] = longest;
    }
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int node = tree.lane + 32 * i;
        if (node >= p.nodes) continue;
        p.draft_tokens[seq * p.tokens_stride + node] = node < tree.size ? tree.tokens[i] : 0;
        p.parents[seq * p.parents_stride + node] = node < tree.size ? tree.parents[i] : 0;
    }
}

__global__ void __launch_bounds__(kMaxBlock) prompt_lookup_sequence(const PromptLookupParams p) {
    ptx::let_next_start();
    SPECRT_SHARED(int[PromptLookupParams::kMaxContinuations], ends);
    SPECRT_SHARED(int[64], scratch);
    ptx::wait_for_previous();
    const int64_t seq = blockIdx.x;
    const Searched s = searched_of(p, seq);
    Found found{0, 0};
    if (s.depth > 0) found = look_up(p, s, {scratch, 0}, ends);
    __syncthreads();
    if (threadIdx.x < 32) grow(p, seq, s, found, ends);
}

}  // namespace

void prompt_lookup_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const PromptLookupParams*>(params);
    if (p.batch == 0) return;
    // One chunk, if the longest history fits.
    const unsigned warps = ceil_div(p.slots > 0 ? p.slots : 1, 32 * kEach);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.batch)),
                            dim3(warps < kMaxBlock / 32 ? 32 * warps : kMaxBlock), 0, kOverlaps};
    SPECRT_LAUNCH(prompt_lookup_sequence, shape, stream, p);
}

}  // namespace specrt
