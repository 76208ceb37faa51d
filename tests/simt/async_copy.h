// cp.async: 16 bytes from global to shared memory. They land when the thread passes the wait that
// covers them and not before; meanwhile the destination holds NaN.
#pragma once
#include <cstdint>
#include <vector>

namespace simt {

class AsyncCopies {
  public:
    void issue(void* shared, const void* global, bool is_read);
    void commit() { ++group_; }
    void wait(unsigned num_pending);
    void check_none_left() const;

  private:
    struct Copy {
        void* to;
        const void* from;  // nullptr: zeros
        unsigned group;
    };
    std::vector<Copy> copies_;  // in the order of issue
    unsigned group_ = 0;        // that the next commit closes
};

void cp_async_16(void* shared, const void* global, bool is_read = true);
void cp_async_commit();

// There is no cache whose lines could be given up.
inline uint64_t evict_first() {
    return 0;
}
inline uint64_t evict_normal() {
    return 0;
}
inline uint64_t evict_last() {
    return 0;
}
inline void cp_async_16(void* shared, const void* global, bool is_read, uint64_t) {
    cp_async_16(shared, global, is_read);
}

void wait_for_copies(unsigned num_pending);

template <int kPending>
inline void cp_async_wait() {
    wait_for_copies(kPending);
}

}  // namespace simt
