// What attention over some keys leaves behind, for the two rows of 16 that a thread holds a quarter
// of, and how two such states become one.
#pragma once
#include "core/launch.cuh"
#include "core/ptx.cuh"
#include "core/reduce.cuh"

namespace specrt::attention {

constexpr float kNone = -INFINITY;  // the maximum over no key

// Row 0 of a thread is lane / 4 of its warp's sixteen, row 1 is eight further on.
template <int D>
struct State {
    float max[2];         // of scores in units of log2(e)
    float sum[2];         // of exp2(score - max)
    float acc[D / 8][4];  // of exp2(score - max) * value; columns 8 n + 2 (lane % 4) + {0, 1}
};

template <int D>
__device__ __forceinline__ void clear(State<D>& s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) s.max[i] = kNone, s.sum[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s.acc[n][e] = 0.0f;
}

// What scores are measured from: any number will do where there are none.
__device__ __forceinline__ float base_of(float max) {
    return max == kNone ? 0.0f : max;
}

// Where a state lies in memory: float4 number i of all threads side by side.
struct Slot {
    float4* data;
    __device__ float4& at(int i) const { return data[i * blockDim.x + threadIdx.x]; }
};

template <int D>
constexpr int kSlotVectors = D / 8 + 1;  // float4 of a thread

template <int D>
__device__ __forceinline__ void save(const State<D>& s, const Slot& slot) {
    slot.at(0) = float4{s.max[0], s.max[1], s.sum[0], s.sum[1]};
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
        slot.at(n + 1) = float4{s.acc[n][0], s.acc[n][1], s.acc[n][2], s.acc[n][3]};
}

template <int D>
__device__ __forceinline__ void load(State<D>& s, const Slot& slot) {
    const float4 head = slot.at(0);
    s.max[0] = head.x, s.max[1] = head.y, s.sum[0] = head.z, s.sum[1] = head.w;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        const float4 v = slot.at(n + 1);
        s.acc[n][0] = v.x, s.acc[n][1] = v.y, s.acc[n][2] = v.z, s.acc[n][3] = v.w;
    }
}

// `s` joined with another state, which is of earlier keys (is_left) or of later ones; `vector(i)`
// is what save() puts at i. Joining with the state of no key changes no bit, and so it cannot be
// seen how many leaves there were.
template <int D, typename Vector>
__device__ __forceinline__ void merge_with(State<D>& s, bool is_left, Vector&& vector) {
    const float4 head = vector(0);
    const float their_max[2] = {head.x, head.y}, their_sum[2] = {head.z, head.w};
    float left[2], right[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float top = fmaxf(s.max[i], their_max[i]), base = base_of(top);
        const float mine = ptx::exp2_approx(s.max[i] - base);
        const float theirs = ptx::exp2_approx(their_max[i] - base);
        left[i] = is_left ? theirs : mine, right[i] = is_left ? mine : theirs;
        const float a = is_left ? their_sum[i] : s.sum[i], b = is_left ? s.sum[i] : their_sum[i];
        s.sum[i] = __fmaf_rn(a, left[i], __fmul_rn(b, right[i]));
        s.max[i] = top;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        const float4 v = vector(n + 1);
        const float other[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float a = is_left ? other[e] : s.acc[n][e], b = is_left ? s.acc[n][e] : other[e];
            s.acc[n][e] = __fmaf_rn(a, left[e / 2], __fmul_rn(b, right[e / 2]));
        }
    }
}

template <int D>
__device__ __forceinline__ void merge(State<D>& s, const Slot& slot, bool is_left) {
    merge_with(s, is_left, [&](int i) { return slot.at(i); });
}

template <int D>
__device__ __forceinline__ void merge(State<D>& s, const State<D>& t, bool is_left) {
    merge_with(s, is_left, [&](int i) {
        if (i == 0) return float4{t.max[0], t.max[1], t.sum[0], t.sum[1]};
        return float4{t.acc[i - 1][0], t.acc[i - 1][1], t.acc[i - 1][2], t.acc[i - 1][3]};
    });
}

// A binary counter of leaves: after leaf i its aligned subtrees are merged, lower levels first.
// Levels lie in shared memory while there is room, then in the block's part of the workspace.
//
//     leaf        0     1      2       3        4 (the last of five)
//     level 0     0            2
//     level 1           0-1    0-1
//     level 2                          0-3
//     `s`                                       0-4: with every level that holds something
//
// The first leaves may be missing, which leaves those after them as they are. Of so many leaves as
// 2^top at most, no two trees of more than `top` levels are held at a time: they share a place.
struct Stack {
    float4 *shared, *global;
    int num_shared, slot_vectors;  // levels; float4 of a whole block's state
    int first_leaf, top;

    __device__ Slot level(int level) const {
        const int i = min(level, top);
        return {i < num_shared ? shared + int64_t{i} * slot_vectors
                               : global + int64_t{i - num_shared} * slot_vectors};
    }
};

// Leaf `leaf` of the block's `num_leaves` is in `s`, but for its sums, of which each of four lanes
// has a part. Afterwards `s` is to be used only if it was the last one, and holds all of them.
template <int D>
__device__ __forceinline__ void finish_leaf(State<D>& s, const Stack& stack, int leaf,
                                            int num_leaves) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int step = 1; step < 4; step *= 2)
            s.sum[i] = __fadd_rn(s.sum[i], __shfl_xor_sync(kFullWarp, s.sum[i], step));
    const bool is_last = leaf + 1 == num_leaves;
    int level = 0;
    for (; leaf >> level; ++level) {
        if (leaf >> level & 1) {
            const bool is_there = leaf >> level << level > stack.first_leaf;
            if (is_there) merge(s, stack.level(level), /*is_left=*/true);
        } else if (!is_last) {
            break;
        }
    }
    if (!is_last) save(s, stack.level(level));
}

// States of the units (blocks of 2^k aligned leaves) of one row tile, merged up an aligned binary
// tree, two of its levels at a time: to meet costs more than to merge. Of four siblings the last
// one goes on with all; the order in which they come is not seen.
//
//     unit          0  1  2  3   4  5  6  7   8
//     level 0       `--+--+--'   `--+--+--'   |     tickets 1 and 5; unit 8 has no sibling
//     level 2             `------------+------'     ticket 4
//
// With a sliding window the first units are missing, and their siblings go on without them.
//
// Hazard: a unit's slot must be whole in memory before its ticket is drawn, and is read only once
// the count says that everybody has come (core/reduce.cuh has the fences).
struct Merge {
    unsigned* tickets;  // one for four siblings, by their second's first unit; 0 between launches
    float4* slots;      // one for each unit
    int first_unit, last_unit, slot_vectors;

    // The place of what is of the units from this one on, as far as they are there.
    __device__ int place(int unit) const { return max(unit - first_unit, 0); }
};

// `s`, the state of sibling `me`, joined with those of the others of `first` .. `last` in the
// pairs' order.
template <int D, typename SlotOf>
__device__ __forceinline__ void merge_siblings(State<D>& s, int me, int first, int last,
                                               SlotOf&& slot_of) {
    const int beside = me ^ 1, other = (me & 2) ^ 2;  // the other one of my pair, the other pair
    if (beside >= first && beside <= last) merge(s, slot_of(beside), beside < me);
    const int low = max(other, first), high = min(other + 1, last);
    if (low > high) return;
    State<D> pair;
    load(pair, slot_of(low));
    if (low < high) merge(pair, slot_of(high), /*is_left=*/false);
    merge(s, pair, other < me);
}

// True in the block that ends up with the whole. All threads of the block call it.
template <int D>
__device__ __forceinline__ bool merge_units(State<D>& s, const Merge& m, int unit, int* flag) {
    for (int level = 0; m.last_unit >> level > m.first_unit >> level; level += 2) {
        const int me = unit >> level, four = me & ~3;
        const int first = max((m.first_unit >> level) - four, 0);
        const int last = min((m.last_unit >> level) - four, 3), count = last - first + 1;
        if (count == 1) continue;
        const auto slot_of = [&](int i) -> Slot {
            return {m.slots + int64_t{m.place((four + i) << level)} * m.slot_vectors};
        };
        unsigned* ticket = m.tickets + m.place((four + first + 1) << level);
        if (!have_others_come(ticket, count, flag)) {
            save(s, slot_of(me - four));
            if (!is_last_block(ticket, count, flag)) return false;
        }
        merge_siblings(s, me - four, first, last, slot_of);
    }
    return true;
}

}  // namespace specrt::attention
