// top_k (ties kept), top_p over what it left, then min_p: transformers' order. The one definition
// of the kept set, for whoever draws from a row and for whoever guesses what will be drawn.
#pragma once
#include "core/row_scan.h"
#include "core/score_key.h"

namespace specrt::SPECRT_ISA {

struct FilterParams {
    int32_t top_k;  // 0 is off
    double top_p;
    float min_p;
};

struct FilterScratch {
    uint64_t* masses;  // [V]
    uint64_t* keys;    // [V]; as floats, for top-k: it needs a buffer of twice k
    float* block_max;  // [blocks], as scan_row left it
};

// The kept set: tokens above `cut`, and of those equal to it the ids up to `cut_id`.
struct Filter {
    float cut = -kInf;
    int32_t cut_id = INT32_MAX;

    bool keeps(float value, int64_t id) const {
        return value > cut || (value == cut && id <= cut_id);
    }
};

inline void swap_floats(float* a, float* b) {
    const float t = *a;
    *a = *b;
    *b = t;
}

// Reorders so that values[0..k) are the k largest.
inline void partition_top(float* values, int64_t n, int64_t k) {
    int64_t lo = 0, hi = n - 1;
    while (lo < hi) {
        const float pivot = values[lo + (hi - lo) / 2];
        int64_t i = lo, j = hi;
        while (i <= j) {
            while (values[i] > pivot) ++i;
            while (values[j] < pivot) --j;
            if (i <= j) swap_floats(&values[i++], &values[j--]);
        }
        if (k - 1 <= j) {
            hi = j;
        } else if (k - 1 >= i) {
            lo = i;
        } else {
            return;
        }
    }
}

inline float smallest(const float* values, int64_t n) {
    float low = values[0];
    for (int64_t i = 1; i < n; ++i) low = values[i] < low ? values[i] : low;
    return low;
}

// The k-th largest value, 1 <= k < vocab. Blocks that cannot raise it are skipped.
inline float kth_largest(const float* row, const float* block_max, int64_t vocab, int64_t k,
                         float* buffer) {
    const int64_t capacity = 2 * k < 256 ? (256 < 2 * vocab ? 256 : 2 * vocab) : 2 * k;
    float bound = -kInf;
    int64_t n = 0;
    for (int64_t start = 0, block = 0; start < vocab; start += kBlock, ++block) {
        if (n >= k && !(block_max[block] > bound)) continue;
        const int64_t end = start + kBlock < vocab ? start + kBlock : vocab;
        for (int64_t i = start; i < end; ++i) {
            if (n >= k && !(row[i] > bound)) continue;
            buffer[n++] = row[i];
            if (n < capacity && n != k) continue;
            partition_top(buffer, n, k);
            bound = smallest(buffer, k);
            n = k;
        }
    }
    partition_top(buffer, n, k);
    return smallest(buffer, k);
}

// Masses over the kept set, 0 elsewhere; returns the sum.
inline uint64_t fill_masses(const float* row, int64_t vocab, float top, const Filter& filter,
                            uint64_t* masses) {
    store_masses(row, vocab, top, masses);
    uint64_t total = 0;
    for (int64_t v = 0; v < vocab; ++v) {
        masses[v] = filter.keeps(row[v], v) ? masses[v] : 0;
        total += masses[v];
    }
    return total;
}

// By logits: by masses those would tie that exp did not keep apart.
struct Candidates {
    uint64_t *keys, *masses;

    void swap(int64_t a, int64_t b) {
        const uint64_t key = keys[a], mass = masses[a];
        keys[a] = keys[b];
        masses[a] = masses[b];
        keys[b] = key;
        masses[b] = mass;
    }

    // Moves what is before the pivot, the last of lo..hi, to the front and the pivot behind it;
    // returns the pivot's place and, in `left`, the mass before it. No branch: none of them could
    // be predicted.
    int64_t partition(int64_t lo, int64_t hi, uint64_t* left) {
        const uint64_t pivot = keys[hi - 1];
        int64_t split = lo;
        uint64_t sum = 0;
        for (int64_t i = lo; i < hi - 1; ++i) {
            const uint64_t is_before = keys[i] > pivot;
            sum += masses[i] & (0 - is_before);
            swap(i, split);
            split += static_cast<int64_t>(is_before);
        }
        swap(split, hi - 1);
        *left = sum;
        return split;
    }
};

// The last token whose predecessors (larger logit, or equal and smaller id) hold less than `mass`.
inline Filter nucleus_cut(Candidates c, int64_t n, uint64_t mass) {
    // The answer's rank is in [lo, hi); `before` is the mass ranked below lo. A quickselect, whose
    // sides of the pivot are weighed and not counted.
    int64_t lo = 0, hi = n;
    uint64_t before = 0;
    while (hi - lo > 1) {
        c.swap(lo + (hi - lo) / 2, hi - 1);
        uint64_t left;
        const int64_t split = c.partition(lo, hi, &left);
        if (before + left >= mass) {
            hi = split;  // the pivot is out
        } else {
            before += left;
            if (split > lo) {
                lo = split;
            } else if (before + c.masses[split] < mass) {
                // The pivot ranks first: the next is in.
                before += c.masses[split];
                lo = split + 1;
            } else {
                hi = split + 1;
            }
        }
    }
    return {score_of(c.keys[lo]), index_of(c.keys[lo])};
}

// The masses of tokens by their distance from the row's maximum, nearest first: only the tokens of
// one bin have to be put in order. Sums of integers, so slices of a row have bins that add up.
struct MassBins {
    static constexpr int kCount = 1024;
    static constexpr float kPerUnit = 32.0f;  // no mass is below the last
    uint64_t masses[kCount] = {};

    static int bin_of(float value, float top) {
        const float bin = (top - value) * kPerUnit;
        return bin < kCount - 1 ? static_cast<int>(bin) : kCount - 1;
    }
    // No token of the bin is below it; the slack covers rounding.
    static float least_of(int bin, float top) {
        return bin == kCount - 1 ? -kInf : top - (static_cast<float>(bin + 1) / kPerUnit + 0.001f);
    }
    void add(const MassBins& other) {
        for (int i = 0; i < kCount; ++i) masses[i] += other.masses[i];
    }
    uint64_t total() const {
        uint64_t sum = 0;
        for (int i = 0; i < kCount; ++i) sum += masses[i];
        return sum;
    }
    // The bin in which `mass` is reached; `before` gets that of the bins before it.
    int reaching(uint64_t mass, uint64_t* before) const {
        int bin = 0;
        for (*before = 0; bin < kCount - 1 && *before + masses[bin] < mass; ++bin)
            *before += masses[bin];
        return bin;
    }
};

// Tokens as they are found, a block's worth at a time to be weighed.
struct Found {
    float values[2 * kBlock + 16];
    int32_t ids[2 * kBlock + 16];
    uint64_t masses[2 * kBlock];
    int64_t count = 0;

    void take(V16 x, V16 least, int64_t first) {
        count += pack_not_less(x, least, static_cast<int32_t>(first), values + count, ids + count);
    }
    void take(float x, float least, int64_t id) {
        values[count] = x;
        ids[count] = static_cast<int32_t>(id);
        count += x >= least;
    }
};

// Calls visit(values, ids, masses, count) for the tokens whose logit is `least` at least.
template <typename Visit>
inline void weigh_from(const float* row, const float* block_max, int64_t vocab, float top,
                       float least, Blocks blocks, Visit&& visit) {
    Found found;
    const auto flush = [&] {
        store_masses(found.values, found.count, top, found.masses);
        visit(found.values, found.ids, found.masses, found.count);
        found.count = 0;
    };
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        if (block_max[block] < least) continue;
        const int64_t start = block * kBlock;
        const int64_t end = start + kBlock < vocab ? start + kBlock : vocab;
        int64_t v = start;
        for (; v + 16 <= end; v += 16) found.take(load(row + v), splat(least), v);
        for (; v < end; ++v) found.take(row[v], least, v);
        if (found.count >= kBlock) flush();
    }
    flush();
}

inline void add_to_bins(const float* row, const float* block_max, int64_t vocab, float top,
                        float least, Blocks blocks, MassBins* bins) {
    weigh_from(row, block_max, vocab, top, least, blocks,
               [&](const float* values, const int32_t*, const uint64_t* masses, int64_t count) {
                   for (int64_t i = 0; i < count; ++i)
                       bins->masses[MassBins::bin_of(values[i], top)] += masses[i];
               });
}

// The tokens of a bin whose logit is `least` at least; returns their number.
inline int64_t collect_bin(const float* row, const float* block_max, int64_t vocab, float top,
                           float least, int bin, Candidates c) {
    const float lowest = MassBins::least_of(bin, top);
    int64_t n = 0;
    weigh_from(row, block_max, vocab, top, lowest > least ? lowest : least, all_blocks(vocab),
               [&](const float* values, const int32_t* ids, const uint64_t* masses, int64_t count) {
                   for (int64_t i = 0; i < count; ++i) {
                       c.keys[n] = key_of(values[i], ids[i]);
                       c.masses[n] = masses[i];
                       n += MassBins::bin_of(values[i], top) == bin;
                   }
               });
    return n;
}

// top_p's choice, which begins with the bins of the tokens from `least` on.
struct Nucleus {
    uint64_t total;  // mass of what is chosen from
    float least;     // nothing below it can be kept
    double top_p;

    // Of a whole row. No token of light_mass is kept.
    static Nucleus of_row(double top_p, uint64_t total, int64_t vocab, float top) {
        return {total, top + logit_of_mass(light_mass(top_p, total, vocab)), top_p};
    }

    Filter cut(const float* row, int64_t vocab, float top, const MassBins& bins,
               const FilterScratch& w) const {
        const Candidates c{w.keys, w.masses};
        const uint64_t mass = nucleus_mass(top_p, total);
        uint64_t before;
        const int bin = bins.reaching(mass, &before);
        return nucleus_cut(c, collect_bin(row, w.block_max, vocab, top, least, bin, c),
                           mass - before);
    }
};

inline Filter apply_top_p(const float* row, int64_t vocab, float top, double top_p, Filter filter,
                          const FilterScratch& w) {
    const bool is_whole = filter.cut == -kInf;
    const uint64_t total = is_whole ? total_mass(row, w.block_max, vocab, top) : 0;
    Nucleus nucleus{total, filter.cut, top_p};  // behind top_k there are few enough
    if (is_whole) nucleus = Nucleus::of_row(top_p, total, vocab, top);
    MassBins bins;
    add_to_bins(row, w.block_max, vocab, top, nucleus.least, all_blocks(vocab), &bins);
    if (!is_whole) nucleus.total = bins.total();
    return nucleus.cut(row, vocab, top, bins, w);
}

inline Filter apply_min_p(float top, float min_p, Filter filter) {
    if (!(min_p > 0.0f)) return filter;
    const float cut = top + log_of(min_p < 1.2e-38f ? 1.2e-38f : min_p);
    return cut > filter.cut ? Filter{cut, INT32_MAX} : filter;
}

inline Filter make_filter(const float* row, int64_t vocab, float top, const FilterParams& s,
                          const FilterScratch& w) {
    Filter filter;
    if (s.top_k > 0 && s.top_k < vocab)
        filter.cut =
            kth_largest(row, w.block_max, vocab, s.top_k, reinterpret_cast<float*>(w.keys));
    if (s.top_p < 1.0) filter = apply_top_p(row, vocab, top, s.top_p, filter, w);
    return apply_min_p(top, s.min_p, filter);
}

}  // namespace specrt::SPECRT_ISA
