#include "async_copy.h"

#include <cstdint>
#include <cstring>
#include <string>

#include "guarded_copies.h"
#include "scheduler.h"

namespace simt {

void AsyncCopies::issue(void* shared, const void* global, bool is_read) {
    const SharedArena& arena = *running.thread->block->shared;
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0)
        fail("cp.async: misaligned destination, must be a multiple of 16 bytes");
    if (!arena.contains(shared, 16))
        fail("cp.async: out-of-bounds write, the destination is not in the block's shared memory");
    if (is_read) {
        if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
            fail("cp.async: misaligned source, must be a multiple of 16 bytes");
        if (!GuardedCopies::contain(global, 16))
            fail("cp.async: out-of-bounds read " + GuardedCopies::describe(global));
        // It may be read as soon as now, and so must be there.
        (void)*static_cast<const volatile unsigned char*>(global);
    }
    std::memset(shared, 0xff, 16);
    copies_.push_back({shared, is_read ? global : nullptr, group_});
}

void AsyncCopies::wait(unsigned num_pending) {
    size_t num_landed = 0;
    for (const Copy& copy : copies_) {
        if (copy.group + num_pending >= group_) break;
        if (copy.from) {
            std::memcpy(copy.to, copy.from, 16);
        } else {
            std::memset(copy.to, 0, 16);
        }
        ++num_landed;
    }
    copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(num_landed));
}

void AsyncCopies::check_none_left() const {
    if (!copies_.empty())
        fail("this thread exited with " + std::to_string(copies_.size()) +
             " cp.async never waited for");
}

void cp_async_16(void* shared, const void* global, bool is_read) {
    running.thread->copies.issue(shared, global, is_read);
}

void cp_async_commit() {
    running.thread->copies.commit();
}

void wait_for_copies(unsigned num_pending) {
    running.thread->copies.wait(num_pending);
}

}  // namespace simt
