// Which of a row's tokens are kept: top_k (ties kept), top_p over what it left, then min_p, as
// core/sampling_filter.h has it for the CPU.
//
// 1. The row's maximum is known. Counts and masses go to bins by the distance from it: 1024 bins of
//    1/32, the last of which takes all that weighs nothing.
// 2. The bin in which top_k ends, or else the one in which top_p does, is found by running sums.
// Its
//    tokens (for top_k also those of the bins before) become candidates, and are sorted.
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
// for one address. All lanes must call.
template <typename Bin, typename Weight>
__device__ __forceinline__ void add_tile(const Tile& tile, MassBins* bins, Bin bin, Weight weight) {
    int low = kMassBins, high = -1;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int b = bin(tile, r, i);
            if (b < 0) continue;
            low = min(low, b);
            high = max(high, b);
        }
    low = __reduce_min_sync(kFullWarp, low);
    high = __reduce_max_sync(kFullWarp, high);
    uint64_t sum = 0;
    uint32_t number = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int b = bin(tile, r, i);
            if (b < 0) continue;
            const uint64_t w = weight(tile.x[r][i]);
            sum += w;
            ++number;
            if (low != high) bins->add(b, w, 1);
        }
    if (low != high) return;
    sum = warp_total(sum);
    number = __reduce_add_sync(kFullWarp, number);
    if (threadIdx.x % 32 == 0) bins->add(low, sum, number);
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
    if (!row.has_min_p()) return kept;
    const float cut = min_p_cut(top, row.s.min_p);
    return cut > kept.cut ? Kept{cut, kAnyId} : kept;
}

struct KeptRoom {
    MassBins bins;
    PlaceRoom place;
    int flag;
};

// --- by radix
// The first key at which the running sum of weights, largest key first, comes to `target`, as far
// as its bits above `last_shift`; the others are 0. Only keys of at least `least` count.
template <typename Weight>
__device__ __forceinline__ uint64_t select_key(const TreeAcceptParams& p, const Row& row,
                                               const Lineage& tree, uint64_t least, uint64_t target,
                                               int last_shift, Chunk* chunk, KeptRoom* room,
                                               Weight weight) {
    const Span whole{0, split_rows(1, p.vocab).num_chunks};
    uint64_t found = 0;
    for (int shift = 56; shift >= last_shift; shift -= 8) {
        room->bins.clear();
        const auto bin = [&](const Tile& tile, int r, int i) {
            const float x = tile.x[r][i];
            const uint64_t key = key_of(x, tile.id(r, i));
            const bool is_in = x > -kInf && key >= least &&
                               (shift == 56 || key >> (shift + 8) == found >> (shift + 8));
            return is_in ? 255 - static_cast<int>(key >> shift & 255) : -1;
        };
        for_tiles(p, row, tree, whole, false, chunk,
                  [&](const Tile& tile) { add_tile(tile, &room->bins, bin, weight); });
        __syncthreads();
        const int mine = static_cast<int>(threadIdx.x);
        const uint64_t weights[1] = {mine < 256 ? room->bins.mass(mine) : 0};
        const Place place = find_place(weights, target, &room->place);
        target -= place.before;
        found |= static_cast<uint64_t>(255 - place.at) << shift;
    }
    return found;
}

__device__ __forceinline__ uint64_t total_of(const TreeAcceptParams& p, const Row& row,
                                             const Lineage& tree, const Kept& kept, float top,
                                             Chunk* chunk, KeptRoom* room) {
    uint64_t sum = 0;
    const Span whole{0, split_rows(1, p.vocab).num_chunks};
    for_tiles(p, row, tree, whole, false, chunk, [&](const Tile& tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (kept.keeps(tile.x[r][i], tile.id(r, i))) sum += mass_of(tile.x[r][i] - top);
    });
    __syncthreads();
    return block_total(sum, room->place.words);
}

// top_k is that of a row with as many values, or 0.
__device__ __forceinline__ Kept kept_by_radix(const TreeAcceptParams& p, const Row& row,
                                              const Lineage& tree, int32_t top_k, float top,
                                              Chunk* chunk, KeptRoom* room) {
    Kept kept;
    uint64_t least = 0;
    if (top_k > 0) {
        least = select_key(p, row, tree, 0, static_cast<uint64_t>(top_k), 32, chunk, room,
                           [](float) { return uint64_t{1}; });
        kept.cut = score_of(least);
    }
    if (!row.has_top_p()) return kept;
    const uint64_t total = total_of(p, row, tree, kept, top, chunk, room);
    const uint64_t key = select_key(p, row, tree, least, nucleus_mass(row.s.top_p, total), 0, chunk,
                                    room, [&](float x) { return mass_of(x - top); });
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
    if (row.has_top_k(vocab))
        place = find_place(pair.counts, static_cast<uint64_t>(row.s.top_k), room);
    const int32_t top_k = place.at < 0 ? 0 : row.s.top_k;
    if (top_k > 0) {
        place.before = 0;
    } else if (row.has_top_p()) {
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
    if (!row.has_top_p()) return kept;
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
