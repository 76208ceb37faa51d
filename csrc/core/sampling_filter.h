// top_k (ties kept), top_p over what it left, then min_p: transformers' order. The one definition
// of the kept set, for whoever draws from a row and for whoever guesses what will be drawn.
#pragma once
#include "core/row_scan.h"

namespace specrt::SPECRT_ISA {

struct FilterParams {
    int32_t top_k;  // 0 is off
    double top_p;
    float min_p;
};

struct FilterScratch {
    uint64_t* masses;  // [V]
    float* values;     // [2 V]: a top-k buffer needs twice k
    float* block_max;  // [blocks], as scan_row left it
    int32_t* ids;      // [V]
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

struct Candidates {
    float* values;  // logits: by masses those would tie that exp did not keep apart
    int32_t* ids;
    uint64_t* masses;

    bool before(int64_t a, float value, int32_t id) const {
        return values[a] > value || (values[a] == value && ids[a] < id);
    }
    void swap(int64_t a, int64_t b) {
        const float value = values[a];
        const int32_t id = ids[a];
        const uint64_t mass = masses[a];
        values[a] = values[b];
        ids[a] = ids[b];
        masses[a] = masses[b];
        values[b] = value;
        ids[b] = id;
        masses[b] = mass;
    }
};

// The last token whose predecessors (larger logit, or equal and smaller id) hold less than `mass`.
inline Filter nucleus_cut(Candidates c, int64_t n, uint64_t mass) {
    // The answer's rank is in [lo, hi); `before` is the mass ranked below lo. A quickselect, whose
    // sides of the pivot are weighed and not counted.
    int64_t lo = 0, hi = n;
    uint64_t before = 0;
    while (hi - lo > 1) {
        const int64_t mid = lo + (hi - lo) / 2;
        c.swap(mid, hi - 1);
        const float value = c.values[hi - 1];
        const int32_t id = c.ids[hi - 1];
        int64_t split = lo;
        uint64_t left = 0;
        for (int64_t i = lo; i < hi - 1; ++i) {
            if (!c.before(i, value, id)) continue;
            left += c.masses[i];
            c.swap(i, split++);
        }
        c.swap(split, hi - 1);  // the pivot, at its rank
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
    return {c.values[lo], c.ids[lo]};
}

inline Filter apply_top_p(const float* row, int64_t vocab, float top, double top_p, Filter filter,
                          const FilterScratch& w) {
    const uint64_t total = total_mass(row, w.block_max, vocab, top, filter.cut);
    const float light = logit_of_mass(light_mass(top_p, total, vocab));
    int64_t n = 0;
    for (int64_t start = 0, block = 0; start < vocab; start += kBlock, ++block) {
        if (w.block_max[block] < filter.cut || w.block_max[block] - top < light) continue;
        const int64_t end = start + kBlock < vocab ? start + kBlock : vocab;
        for (int64_t v = start; v < end; ++v) {
            if (row[v] < filter.cut || row[v] - top < light) continue;
            w.values[n] = row[v];
            w.ids[n++] = static_cast<int32_t>(v);
        }
    }
    store_masses(w.values, n, top, w.masses);
    return nucleus_cut({w.values, w.ids, w.masses}, n, nucleus_mass(top_p, total));
}

inline Filter make_filter(const float* row, int64_t vocab, float top, const FilterParams& s,
                          const FilterScratch& w) {
    Filter filter;
    if (s.top_k > 0 && s.top_k < vocab)
        filter.cut = kth_largest(row, w.block_max, vocab, s.top_k, w.values);
    if (s.top_p < 1.0) filter = apply_top_p(row, vocab, top, s.top_p, filter, w);
    if (s.min_p > 0.0f) {
        const float cut = top + log_of(s.min_p < 1.2e-38f ? 1.2e-38f : s.min_p);
        if (cut > filter.cut) filter = {cut, INT32_MAX};
    }
    return filter;
}

}  // namespace specrt::SPECRT_ISA
