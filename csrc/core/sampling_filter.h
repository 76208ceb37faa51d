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

// Candidates as they are found, a block's worth at a time to be weighed.
struct Found {
    float values[2 * kBlock];
    int32_t ids[2 * kBlock];
    int64_t count = 0;

    int64_t move_to(Candidates c, int64_t at, float top) {
        store_masses(values, count, top, c.masses + at);
        for (int64_t i = 0; i < count; ++i) c.keys[at + i] = key_of(values[i], ids[i]);
        at += count;
        count = 0;
        return at;
    }
};

// The tokens whose logit is `cut` at least and, less `top`, `light`; returns their number.
inline int64_t collect(const float* row, const float* block_max, int64_t vocab, float top,
                       float cut, float light, Candidates c) {
    int64_t n = 0;
    Found found;
    for (int64_t start = 0, block = 0; start < vocab; start += kBlock, ++block) {
        if (block_max[block] < cut || block_max[block] - top < light) continue;
        const int64_t end = start + kBlock < vocab ? start + kBlock : vocab;
        for (int64_t v = start; v < end; ++v) {
            found.values[found.count] = row[v];
            found.ids[found.count] = static_cast<int32_t>(v);
            found.count += (row[v] >= cut) & (row[v] - top >= light);
        }
        if (found.count >= kBlock) n = found.move_to(c, n, top);
    }
    return found.move_to(c, n, top);
}

inline Filter apply_top_p(const float* row, int64_t vocab, float top, double top_p, Filter filter,
                          const FilterScratch& w) {
    const Candidates c{w.keys, w.masses};
    uint64_t total = 0;
    float light = -kInf;  // behind top_k there are few enough
    const bool is_whole = filter.cut == -kInf;
    if (is_whole) {
        total = total_mass(row, w.block_max, vocab, top);
        light = logit_of_mass(light_mass(top_p, total, vocab));
    }
    const int64_t n = collect(row, w.block_max, vocab, top, filter.cut, light, c);
    for (int64_t i = 0; i < n && !is_whole; ++i) total += c.masses[i];
    return nucleus_cut(c, n, nucleus_mass(top_p, total));
}

inline Filter make_filter(const float* row, int64_t vocab, float top, const FilterParams& s,
                          const FilterScratch& w) {
    Filter filter;
    if (s.top_k > 0 && s.top_k < vocab)
        filter.cut =
            kth_largest(row, w.block_max, vocab, s.top_k, reinterpret_cast<float*>(w.keys));
    if (s.top_p < 1.0) filter = apply_top_p(row, vocab, top, s.top_p, filter, w);
    if (s.min_p > 0.0f) {
        const float cut = top + log_of(s.min_p < 1.2e-38f ? 1.2e-38f : s.min_p);
        if (cut > filter.cut) filter = {cut, INT32_MAX};
    }
    return filter;
}

}  // namespace specrt::SPECRT_ISA
