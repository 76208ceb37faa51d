// Which of a row's tokens are kept: top_k (ties kept), top_p over what it left, then min_p, as
// core/sampling_filter.h has it for the CPU.
//
// 1. The row's maximum is known. Counts and masses go to bins by the distance from it: 1024 bins of
//    1/32, the last of which takes all that weighs nothing.
// 2. The bin in which top_k ends, or else the one in which top_p does, is found by running sums.
//    Its tokens (for top_k also those of the bins before) become candidates, and are sorted.
// 3. Where they are too many, as in flat rows, the cut is found by radix: eight bits of the keys at
//    a time, as many passes over the row. That needs no memory, and is right for any row.
#pragma once
#include "core/best_keys.cuh"
#include "tree_accept/search.cuh"

namespace specrt {

// --- counts and masses by bin
// Shared memory adds 32 bits at a time: a carry is counted in the high half, which masses below
// 2^32 reach by carries alone. So the sum is exact in any order.
struct MassBins {
    uint32_t low[kMassBins], high[kMassBins], count[kMassBins];

    __device__ uint64_t mass(int bin) const {
        return static_cast<uint64_t>(high[bin]) << 32 | low[bin];
    }
    __device__ void clear() {
        __syncthreads();  // what was in them may still be read
        for (int i = threadIdx.x; i < kMassBins; i += blockDim.x) low[i] = high[i] = count[i] = 0;
        __syncthreads();
    }
    __device__ void add(int bin, uint64_t mass, uint32_t number) {
        const uint32_t part = static_cast<uint32_t>(mass);
        const uint32_t carry = atomicAdd(low + bin, part) > ~part;
        const uint32_t rest = static_cast<uint32_t>(mass >> 32) + carry;
        if (rest != 0) atomicAdd(high + bin, rest);
        atomicAdd(count + bin, number);
    }
};

// x is finite and at most the maximum.
__device__ __forceinline__ int bin_of(float x, float top) {
    const float distance = (top - x) * kBinsPerUnit;
    return distance < kMassBins - 1 ? static_cast<int>(distance) : kMassBins - 1;
}

// A warp whose values all lie in one bin adds them up first: in a flat row all threads would wait
// for one address. bin(tile, r, i): -1 where a value does not count. All lanes must call.
template <typename Bin, typename Weight>
__device__ __forceinline__ void add_tile(const Tile& tile, MassBins* bins, Bin bin, Weight weight) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        int at[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) at[i] = bin(tile, r, i);
        const int common = __shfl_sync(kFullWarp, at[0], 0);
        bool is_common = common >= 0;
        uint64_t sum = 0;
        uint32_t number = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) is_common = is_common && (at[i] == common || at[i] < 0);
        is_common = __all_sync(kFullWarp, is_common);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (at[i] < 0) continue;
            const uint64_t mass = weight(tile.x[r][i]);
            sum += mass;
            ++number;
            if (!is_common) bins->add(at[i], mass, 1);
        }
        if (!is_common) continue;
        sum = warp_total(sum);
        number = __reduce_add_sync(kFullWarp, number);
        if (threadIdx.x % 32 == 0) bins->add(common, sum, number);
    }
}

// --- the kept set
struct Kept {
    float cut = -kInf;
    int32_t cut_id = kAnyId;

    __device__ bool keeps(float x, int32_t id) const {
        return x > cut || (x == cut && id <= cut_id);
    }
};

__device__ __forceinline__ float min_p_cut(float top, float min_p) {
    return top + log_of(min_p < 1.2e-38f ? 1.2e-38f : min_p);
}

__device__ __forceinline__ Kept with_min_p(Kept kept, const Row& row, float top) {
    if (!has_min_p(row.s)) return kept;
    const float cut = min_p_cut(top, row.s.min_p);
    return cut > kept.cut ? Kept{cut, kAnyId} : kept;
}

struct KeptRoom {
    MassBins bins;
    PlaceRoom place;
    uint64_t found, target;  // of select_key
    int flag;
};

// --- by radix
// The first key at which the running sum of weights, largest key first, comes to `target`, as far
// as its bits above `last_shift`; the others are 0. (What top_k left comes first, so what it did
// not leave is never reached.) What is asked of every value lies in shared memory, for want of
// registers.
template <typename Weight>
__device__ __forceinline__ uint64_t select_key(const TreeAcceptParams& p, const Row& row,
                                               const Lineage& tree, uint64_t target, int last_shift,
                                               Chunk* chunk, KeptRoom* room, Weight weight) {
    const Span whole{0, split_rows(1, p.vocab).num_chunks};
    if (threadIdx.x == 0) {
        room->found = 0;
        room->target = target;
    }
    for (int shift = 56; shift >= last_shift; shift -= 8) {
        room->bins.clear();
        const auto bin = [&](const Tile& tile, int r, int i) {
            const uint64_t key = key_of(tile.x[r][i], tile.id(r, i));
            const uint64_t rest = key ^ room->found;  // no bits above those asked for
            const bool is_in = tile.x[r][i] > -kInf && rest >> shift < 256;
            return is_in ? 255 - static_cast<int>(rest >> shift) : -1;
        };
        for_tiles(p, row, tree, whole, false, chunk,
                  [&](const Tile& tile) { add_tile(tile, &room->bins, bin, weight); });
        __syncthreads();
        const int mine = static_cast<int>(threadIdx.x);
        const uint64_t weights[1] = {mine < 256 ? room->bins.mass(mine) : 0};
        const Place place = find_place(weights, room->target, &room->place);
        if (threadIdx.x != 0) continue;
        room->target -= place.before;
        room->found |= static_cast<uint64_t>(255 - place.at) << shift;
    }
    __syncthreads();
    return room->found;
}

__device__ __forceinline__ uint64_t total_of(const TreeAcceptParams& p, const Row& row,
                                             const Lineage& tree, const Kept& kept,
                                             const RowState& state, Chunk* chunk, KeptRoom* room) {
    uint64_t sum = 0;
    const Span whole{0, split_rows(1, p.vocab).num_chunks};
    for_tiles(p, row, tree, whole, false, chunk, [&](const Tile& tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (kept.keeps(tile.x[r][i], tile.id(r, i)))
                    sum += mass_of(tile.x[r][i] - state.top);
    });
    __syncthreads();
    return block_total(sum, room->place.words);
}

__device__ __forceinline__ Kept kept_by_radix(const TreeAcceptParams& p, const Row& row,
                                              const Lineage& tree, const RowState& state,
                                              Chunk* chunk, KeptRoom* room) {
    Kept kept;
    if (state.top_k > 0) {
        const uint64_t key = select_key(p, row, tree, static_cast<uint64_t>(state.top_k), 32, chunk,
                                        room, [](float) { return uint64_t{1}; });
        kept.cut = score_of(key);
    }
    if (!has_top_p(row.s)) return kept;
    const uint64_t total = total_of(p, row, tree, kept, state, chunk, room);
    const uint64_t key = select_key(p, row, tree, nucleus_mass(row.s.top_p, total), 0, chunk, room,
                                    [&](float x) { return mass_of(x - state.top); });
    return {score_of(key), index_of(key)};
}

// --- by candidates
// The bins of all slices, two a thread: what the last block of a row finds in the workspace.
struct BinPair {
    uint64_t masses[2], counts[2];
};

__device__ __forceinline__ BinPair sum_of_slices(const AcceptWorkspace& w, int64_t row,
                                                 int64_t num_slices) {
    BinPair pair = {};
    for (int64_t slice = row * num_slices; slice < (row + 1) * num_slices; ++slice)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t at = slice * kMassBins + 2 * threadIdx.x + i;
            pair.masses[i] += w.bin_masses[at];
            pair.counts[i] += w.bin_counts[at];
        }
    return pair;
}

// What is known from the bins: total, before, the bins of candidates, top_k if there are as many
// values. `state` is shared.
__device__ __forceinline__ void choose_bins(const BinPair& pair, const Row& row, int64_t vocab,
                                            PlaceRoom* room, RowState* state) {
    const uint64_t total = block_total(pair.masses[0] + pair.masses[1], room->words);
    Place place{-1, 0};
    int first_bin = 0;
    if (has_top_k(row.s, vocab))
        place = find_place(pair.counts, static_cast<uint64_t>(row.s.top_k), room);
    const int32_t top_k = place.at < 0 ? 0 : row.s.top_k;
    if (top_k > 0) {
        place.before = 0;
    } else if (has_top_p(row.s)) {
        place = find_place(pair.masses, nucleus_mass(row.s.top_p, total), room);
        first_bin = place.at;
    }
    if (threadIdx.x == 0) {
        state->total = total;
        state->before = place.before;
        state->first_bin = first_bin;
        state->last_bin = place.at;
        state->top_k = top_k;
    }
    __syncthreads();
}

// Whether candidates of these bins find room; if not, or if there are none, the cut is to be known.
__device__ __forceinline__ bool are_few(const BinPair& pair, const RowState& state,
                                        uint64_t* words) {
    uint64_t number = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int bin = 2 * static_cast<int>(threadIdx.x) + i;
        if (state.first_bin <= bin && bin <= state.last_bin) number += pair.counts[i];
    }
    __syncthreads();  // the words may still be read
    return block_total(number, words) <= kCandidates;
}

// Of all candidates, sorted. total: of the masses that top_p chooses from.
__device__ __forceinline__ Kept kept_by_candidates(const uint64_t* keys, const Row& row,
                                                   const RowState& state, PlaceRoom* room) {
    constexpr int kEach = kCandidates / kAcceptThreads;
    Kept kept;
    uint32_t least = 0;
    if (state.top_k > 0) {
        least = static_cast<uint32_t>(keys[state.top_k - 1] >> 32);
        kept.cut = from_ordered_bits(least);
    }
    if (!has_top_p(row.s)) return kept;
    uint64_t masses[kEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const uint64_t key = keys[threadIdx.x * kEach + i];
        const bool is_in = key != 0 && key >> 32 >= least;
        masses[i] = is_in ? mass_of(score_of(key) - state.top) : 0;
        sum += masses[i];
    }
    __syncthreads();  // the words may still be read
    sum = block_total(sum, room->words);
    const uint64_t total = state.top_k > 0 ? sum : state.total;
    const uint64_t mass = nucleus_mass(row.s.top_p, total) - state.before;
    const Place place = find_place(masses, mass, room);
    if (place.at < 0) return kept;
    return {score_of(keys[place.at]), index_of(keys[place.at])};
}

}  // namespace specrt
