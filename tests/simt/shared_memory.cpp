#include "shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "scheduler.h"

namespace simt {
namespace {

constexpr size_t kZone = 128;            // bytes of pattern between two allocations
constexpr size_t kGuardBytes = 4 << 20;  // each side, faults; address space, not memory
constexpr size_t kMaxZones = 64 * 1024;
constexpr size_t kPage = 64 * 1024;  // of whatever machine
constexpr size_t kStaticLimit = 48 * 1024;

unsigned char canary_at(const unsigned char* address) {
    return reinterpret_cast<uintptr_t>(address) % 2 ? 0xff : 0xa5;
}

size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

}  // namespace

void fill_canary(unsigned char* begin, unsigned char* end) {
    for (unsigned char* byte = begin; byte < end; ++byte) *byte = canary_at(byte);
}

const unsigned char* first_overwritten(const unsigned char* begin, const unsigned char* end) {
    for (const unsigned char* byte = begin; byte < end; ++byte)
        if (*byte != canary_at(byte)) return byte;
    return nullptr;
}

SharedArena::SharedArena(size_t max_bytes)
    : max_bytes_(max_bytes), capacity_(round_up(max_bytes + kMaxZones, kPage)) {
    void* memory = mmap(nullptr, capacity_ + 2 * kGuardBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for shared memory");
    base_ = static_cast<unsigned char*>(memory) + kGuardBytes;
    if (mprotect(base_, capacity_, PROT_READ | PROT_WRITE) != 0)
        throw std::runtime_error("simt: no memory for shared memory");
}

SharedArena::~SharedArena() {
    munmap(base_ - kGuardBytes, capacity_ + 2 * kGuardBytes);
}

void SharedArena::begin_block(size_t dynamic_bytes) {
    top_ = num_allocated_ = 0;
    regions_.clear();
    std::fill(statics_.begin(), statics_.end(), nullptr);
    allocate(dynamic_bytes, 16);
}

unsigned char* SharedArena::allocate(size_t bytes, size_t alignment) {
    const size_t offset = round_up(top_ + kZone, alignment), end = offset + bytes;
    num_allocated_ += bytes;
    if (num_allocated_ > max_bytes_ || end + kZone > capacity_)
        fail("shared memory: " + std::to_string(num_allocated_) +
             " bytes in all, a block may have " + std::to_string(max_bytes_));
    fill_canary(base_ + top_, base_ + offset);
    std::memset(base_ + offset, 0xff, bytes);
    fill_canary(base_ + end, base_ + end + kZone);
    regions_.push_back({offset, bytes});
    top_ = end;
    return base_ + offset;
}

unsigned char* SharedArena::static_array(size_t site, size_t bytes, size_t alignment) {
    if (site >= statics_.size()) statics_.resize(site + 1, nullptr);
    unsigned char*& array = statics_[site];
    if (array) return array;
    if (num_allocated_ - regions_.front().bytes + bytes > kStaticLimit)
        fail("shared memory: static arrays of more than 48 KiB, which nvcc refuses");
    return array = allocate(bytes, std::max<size_t>(alignment, 16));
}

bool SharedArena::contains(const void* begin, size_t bytes) const {
    const auto* byte = static_cast<const unsigned char*>(begin);
    for (const Region& region : regions_)
        if (byte >= base_ + region.offset && byte + bytes <= base_ + region.offset + region.bytes)
            return true;
    return false;
}

bool SharedArena::is_near(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= base_ - kGuardBytes && byte < base_ + capacity_ + kGuardBytes;
}

std::string SharedArena::overwritten() const {
    size_t before = 0;
    for (size_t i = 0; i <= regions_.size(); ++i) {
        const size_t zone_end = i < regions_.size() ? regions_[i].offset : before + kZone;
        const unsigned char* hit = first_overwritten(base_ + before, base_ + zone_end);
        if (hit) {
            const size_t region = i == 0 ? 0 : i - 1;
            const std::string which =
                region == 0 ? "dynamic shared memory"
                            : "static shared array #" + std::to_string(region - 1) + " (" +
                                  std::to_string(regions_[region].bytes) + " bytes)";
            if (i == 0) return "out-of-bounds write before the start of " + which;
            return "out-of-bounds write " + std::to_string(hit - base_ - before) +
                   " bytes past the end of " + which;
        }
        if (i < regions_.size()) before = regions_[i].offset + regions_[i].bytes;
    }
    return "";
}

size_t next_shared_site() {
    static size_t next = 0;  // under the launch's lock, as every kernel is
    return next++;
}

void* static_shared(size_t site, size_t bytes, size_t alignment) {
    return running.thread->block->shared->static_array(site, bytes, alignment);
}

unsigned char* dynamic_shared() {
    return running.thread->block->shared->dynamic();
}

}  // namespace simt
