// Down one tree, when all its rows are known: a block of threads, in which every thread takes the
// same steps. Children are looked for by ballot, a node a lane.
#pragma once
#include "tree_accept/kept.cuh"

namespace specrt {

struct WalkRoom {
    int32_t path[kMostAcceptNodes], tokens[kMostAcceptNodes];
};

// The first child of `node` for which `is_wanted`, after node `after`; -1 if there is none.
template <typename Wanted>
__device__ __forceinline__ int next_child(const Lineage& tree, int num_nodes, int node, int after,
                                          Wanted is_wanted) {
    const int lane = threadIdx.x % 32;
    for (int base = after + 1; base < num_nodes; base += 32) {
        const int j = base + lane;
        const bool is_hit = j < num_nodes && tree.parents[j] == node && is_wanted(j);
        const unsigned hits = __ballot_sync(kFullWarp, is_hit);
        if (hits != 0) return base + __ffs(static_cast<int>(hits)) - 1;
    }
    return -1;
}

struct Step {
    int32_t token;  // -1: none can be drawn
    int child;      // -1: the walk ends
};

// --- rejection with residuals
struct Residual {
    uint64_t* masses;  // [V]
    uint64_t total;
};

__device__ __forceinline__ Residual target_masses(const TreeAcceptParams& p, const Row& row,
                                                  const Lineage& tree, const RowState& state,
                                                  uint64_t* masses, Chunk* chunk, KeptRoom* room) {
    const Kept kept{state.cut, state.cut_id};
    const Span whole{0, split_rows(1, p.vocab).num_chunks};
    uint64_t sum = 0;
    for_tiles(p, row, tree, whole, false, chunk, [&](const Tile& tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (tile.first + 16 * r + i >= p.vocab) continue;
                const float x = tile.x[r][i];
                const uint64_t mass = kept.keeps(x, tile.id(r, i)) ? mass_of(x - state.top) : 0;
                masses[tile.first + 16 * r + i] = mass;
                sum += mass;
            }
    });
    __syncthreads();
    return {masses, block_total(sum, room->place.words)};
}

// normalize(relu(target - q)); nothing changes where that is empty (then the laws are equal up to
// rounding, and the masses as they are serve as well). Writes nothing before a barrier.
__device__ __forceinline__ void subtract_draft(Residual* residual, const float* q, int64_t vocab,
                                               KeptRoom* room) {
    uint64_t sum = 0;
    for (int64_t v = threadIdx.x; v < vocab; v += blockDim.x)
        sum += residual_mass(residual->masses[v], residual->total, q[v]);
    __syncthreads();
    const uint64_t total = block_total(sum, room->place.words);
    if (total == 0) return;
    for (int64_t v = threadIdx.x; v < vocab; v += blockDim.x)
        residual->masses[v] = residual_mass(residual->masses[v], residual->total, q[v]);
    residual->total = total;
    __syncthreads();
}

// The first token whose running sum is above floor(u * total). A thread has a run of tokens.
__device__ __forceinline__ int32_t draw_by_mass(const Residual& residual, int64_t vocab, float u,
                                                KeptRoom* room, int32_t* drawn) {
    const int64_t each = (vocab + kAcceptThreads - 1) / kAcceptThreads;
    const int64_t begin = each * threadIdx.x, end = begin + each < vocab ? begin + each : vocab;
    uint64_t sums[1] = {0};
    for (int64_t v = begin; v < end; ++v) sums[0] += residual.masses[v];
    const uint64_t target = drawn_mass(u, residual.total) + 1;
    const Place place = find_place(sums, target, &room->place);
    if (place.at < 0) return -1;
    if (place.at == static_cast<int>(threadIdx.x)) {
        uint64_t sum = place.before;
        int64_t v = begin;
        while (v < end - 1 && sum + residual.masses[v] < target) sum += residual.masses[v++];
        *drawn = static_cast<int32_t>(v);
    }
    __syncthreads();
    return *drawn;
}

// The children in their order; all threads of the block must call.
__device__ __forceinline__ Step draw_by_rejection(const TreeAcceptParams& p, const Row& row,
                                                  const Lineage& tree, const RowState& state,
                                                  uint64_t* masses, Chunk* chunk, KeptRoom* room) {
    const float* q = p.draft_probs + row.seq * p.probs_stride[0] + row.node * p.probs_stride[1];
    const uint64_t position = row.position(p);
    Residual residual = target_masses(p, row, tree, state, masses, chunk, room);
    const auto any = [](int) { return true; };
    uint32_t sibling = 0;
    for (int j = next_child(tree, row.num_nodes, row.node, row.node, any); j >= 0;
         j = next_child(tree, row.num_nodes, row.node, j, any)) {
        const int32_t x = tree.tokens[j];
        const float u = uniform_from(bits_at(row.s.seed, position, Purpose::kAccept, sibling++));
        // A child its own law excludes was not drawn from it: subtracting would bias.
        if (x < 0 || x >= p.vocab || !(q[x] > 0.0f)) continue;
        if (accepts(u, q[x], residual.masses[x], residual.total)) return {x, j};
        subtract_draft(&residual, q, p.vocab, room);
    }
    const float u = uniform_from(bits_at(row.s.seed, position, Purpose::kResidual, 0));
    return {draw_by_mass(residual, p.vocab, u, room, &room->flag), -1};
}

// --- the walk
__device__ __forceinline__ float logprob_of(const TreeAcceptParams& p, const RowState& state,
                                            int64_t seq, int node, int32_t token) {
    const float* logits = p.logits + seq * p.logits_stride[0] + node * p.logits_stride[1];
    return logits[token] - state.raw_top - log_of_mass(state.raw_total);
}

// `length` accepted tokens and the bonus token; none if it is -1.
__device__ __forceinline__ void write_path(const TreeAcceptParams& p, int64_t seq, int length,
                                           const RowState* states, const WalkRoom& walk) {
    if (threadIdx.x == 0) p.accept_length[seq] = length;
    for (int64_t i = threadIdx.x; i < p.path_size; i += blockDim.x) {
        const int64_t at = seq * p.path_size + i;
        const bool is_there = i <= length;
        const int node = is_there ? walk.path[i] : -1;
        p.path[at] = node;
        p.tokens[at] = is_there ? walk.tokens[i] : -1;
        if (!p.logprobs) continue;
        p.logprobs[at] =
            is_there ? logprob_of(p, states[node], seq, node, walk.tokens[i]) : __builtin_nanf("");
    }
}

// states: of the sequence's rows. All threads of the block must call.
__device__ __forceinline__ void walk_tree(const TreeAcceptParams& p, int64_t seq,
                                          const AcceptWorkspace& w, Row* row, Lineage* tree,
                                          Chunk* chunk, KeptRoom* room, WalkRoom* walk) {
    const RowState* states = w.states + seq * p.nodes;
    const bool may_reject = p.draft_probs != nullptr && p.sampling[seq].temperature != 0.0f;
    const int num_nodes = num_nodes_of(p, seq);
    int node = 0, length = 0;
    for (;; ++length) {
        Step step{states[node].token, -1};
        const bool has_children =
            next_child(*tree, num_nodes, node, node, [](int) { return true; }) >= 0;
        if (may_reject && has_children && step.token >= 0) {
            read_row(p, seq * p.nodes + node, row, tree);
            uint64_t* masses = w.residual + seq * p.vocab;
            step = draw_by_rejection(p, *row, *tree, states[node], masses, chunk, room);
        } else if (step.token >= 0) {
            step.child = next_child(*tree, num_nodes, node, node,
                                    [&](int j) { return tree->tokens[j] == step.token; });
        }
        if (threadIdx.x == 0) {
            walk->path[length] = node;
            walk->tokens[length] = step.token;
        }
        if (step.token < 0) length = -1;
        if (step.child < 0) break;
        node = step.child;
    }
    __syncthreads();
    write_path(p, seq, length, states, *walk);
}

}  // namespace specrt
