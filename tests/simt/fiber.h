// Fibers: a stack each, and a switch between them by hand. All belong to one OS thread.
#pragma once
#include <cstddef>
#include <vector>

namespace simt {

// Saves the caller's context at *save, goes on with the one at `load`.
extern "C" __attribute__((visibility("hidden"))) void simt_switch_context(void** save, void* load);

// A context that begins `entry` on an empty stack, which it must never return from.
void* make_context(void* stack_top, void (*entry)());

// Stacks, mapped once and used again by every launch; below each lies a page that faults.
class StackPool {
  public:
    static constexpr size_t kStackBytes = 64 * 1024;

    StackPool() = default;
    ~StackPool();
    StackPool(const StackPool&) = delete;
    StackPool& operator=(const StackPool&) = delete;

    void reserve(size_t count);
    void* top(size_t index) const;
    bool is_guard(const void* address) const;

  private:
    static constexpr size_t kPerChunk = 256;
    std::vector<unsigned char*> chunks_;
};

}  // namespace simt
