// Shared memory: an arena for each resident block. What is allocated is filled with NaN bytes, and
// what lies between allocations with a pattern (NaN too) that is looked at when the block ends.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_types.h"

namespace simt {

// Fills or looks at bytes that no kernel may write. As float, half or bfloat16 they read as NaN.
void fill_canary(unsigned char* begin, unsigned char* end);
const unsigned char* first_overwritten(const unsigned char* begin, const unsigned char* end);

class SharedArena {
  public:
    explicit SharedArena(size_t max_bytes);
    ~SharedArena();
    SharedArena(const SharedArena&) = delete;
    SharedArena& operator=(const SharedArena&) = delete;

    size_t max_bytes() const { return max_bytes_; }
    void begin_block(size_t dynamic_bytes);
    unsigned char* dynamic() const { return base_ + regions_.front().offset; }
    // The array of a call site, allocated at its first touch in this block.
    unsigned char* static_array(size_t site, size_t bytes, size_t alignment);
    bool contains(const void* begin, size_t bytes) const;
    bool is_near(const void* address) const;  // in the arena, or in the guard pages around it
    // What was overwritten outside of any allocation, in words; empty if nothing was.
    std::string overwritten() const;

  private:
    struct Region {
        size_t offset, bytes;
    };
    unsigned char* allocate(size_t bytes, size_t alignment);

    size_t max_bytes_, capacity_;
    unsigned char* base_;
    size_t top_ = 0, num_allocated_ = 0;
    std::vector<Region> regions_;  // the first is the dynamic one
    std::vector<unsigned char*> statics_;
};

size_t next_shared_site();
// The running block's array of a call site.
void* static_shared(size_t site, size_t bytes, size_t alignment);
unsigned char* dynamic_shared();

// Each call site has a lambda, and so a type, of its own.
template <typename T, typename Site>
T& shared_memory(Site) {
    static const size_t site = next_shared_site();
    return *static_cast<T*>(static_shared(site, sizeof(T), alignof(T)));
}

}  // namespace simt
