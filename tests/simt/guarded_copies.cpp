#include "guarded_copies.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "launch.h"
#include "shared_memory.h"

namespace simt {
namespace {

constexpr size_t kGuardBytes = 4 << 20;  // each side; address space, not memory

// Arguments that are constants of every op: no launch writes them, so a launch that overlaps may
// read them before its wait.
constexpr const char* kConstants[] = {"weight", "bias", "cos_sin"};

// Flags that may be looked at before the wait, and must not be believed until after it.
constexpr const char* kHints[] = {"is_open"};

template <size_t kCount>
bool is_among(const char* const (&names)[kCount], const std::string& name) {
    return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

thread_local GuardedCopies* current_copies = nullptr;

}  // namespace

GuardedCopies::GuardedCopies() : previous_(current_copies) {
    current_copies = this;
}

GuardedCopies::~GuardedCopies() {
    for (const Copy& copy : copies_) munmap(copy.mapping, copy.num_mapped);
    current_copies = previous_;
}

GuardedCopies& GuardedCopies::current() {
    if (!current_copies) throw std::logic_error("simt: a tensor outside of a call");
    return *current_copies;
}

// With an even seed the copy ends where the guard begins (bar the rest of its last 16 bytes), with
// an odd one it begins where the guard ends: the other side has up to a page of pattern.
GuardedCopies::Copy GuardedCopies::map(void* host, size_t bytes) {
    const auto page_size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t padded = (bytes + 15) / 16 * 16;
    Copy copy{};
    copy.host = host;
    copy.bytes = bytes;
    copy.num_paged = (padded + page_size - 1) / page_size * page_size;
    copy.num_mapped = copy.num_paged + 2 * kGuardBytes;
    void* memory = mmap(nullptr, copy.num_mapped, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for a tensor's copy");
    copy.mapping = static_cast<unsigned char*>(memory);
    copy.page = copy.mapping + kGuardBytes;
    copy.begin = settings().seed % 2 ? copy.page : copy.page + copy.num_paged - padded;
    if (copy.num_paged && mprotect(copy.page, copy.num_paged, PROT_READ | PROT_WRITE) != 0) {
        munmap(copy.mapping, copy.num_mapped);
        throw std::runtime_error("simt: no memory for a tensor's copy");
    }
    fill_canary(copy.page, copy.begin);
    if (bytes) std::memcpy(copy.begin, host, bytes);
    fill_canary(copy.begin + bytes, copy.page + copy.num_paged);
    return copy;
}

unsigned char* GuardedCopies::copy_of(void* host, size_t bytes, const char* name) {
    for (Copy& copy : copies_) {
        if (copy.host != host || copy.bytes != bytes) continue;
        copy.names += std::string(" = ") + name;
        if (copy.is_constant && !is_among(kConstants, name)) {
            copy.is_constant = false;
            copy.protect(PROT_READ | PROT_WRITE);
        }
        copy.is_hint = copy.is_hint && is_among(kHints, name);
        return copy.begin;
    }
    copies_.push_back(map(host, bytes));
    Copy& copy = copies_.back();
    copy.names = name;
    copy.is_constant = is_among(kConstants, name);
    copy.is_hint = is_among(kHints, name);
    if (copy.is_constant) copy.protect(PROT_READ);
    return copy.begin;
}

void GuardedCopies::Copy::protect(int protection) const {
    if (num_paged && mprotect(page, num_paged, protection) != 0)
        throw std::runtime_error("simt: cannot protect a tensor's copy");
}

void GuardedCopies::Copy::mislead() {
    auto* flags = reinterpret_cast<int32_t*>(begin);
    held.assign(flags, flags + bytes / sizeof(int32_t));
    for (size_t i = 0; i < held.size(); ++i) flags[i] = held[i] == 0;
}

void GuardedCopies::Copy::restore() {
    std::memcpy(begin, held.data(), held.size() * sizeof(int32_t));
    held.clear();
}

void GuardedCopies::withhold() {
    if (!current_copies) return;
    current_copies->misleads_ = !current_copies->misleads_;
    for (Copy& copy : current_copies->copies_) {
        if (copy.is_hint && current_copies->misleads_) copy.mislead();
        if (!copy.is_constant) copy.protect(copy.is_hint ? PROT_READ : PROT_NONE);
    }
}

void GuardedCopies::give_back() {
    if (!current_copies) return;
    for (Copy& copy : current_copies->copies_) {
        if (!copy.is_constant) copy.protect(PROT_READ | PROT_WRITE);
        copy.restore();
    }
}

void GuardedCopies::write_back() {
    for (size_t i = 0; i < copies_.size(); ++i) {
        const Copy& copy = copies_[i];
        const unsigned char* hit = first_overwritten(copy.page, copy.begin);
        if (!hit) hit = first_overwritten(copy.begin + copy.bytes, copy.page + copy.num_paged);
        if (hit)
            throw std::runtime_error("kernel " + last_kernel() + ": out-of-bounds write " +
                                     describe_here(hit));
    }
    // Memory that did not change may be read-only (a mapped file).
    for (const Copy& copy : copies_)
        if (copy.bytes && std::memcmp(copy.host, copy.begin, copy.bytes) != 0)
            std::memcpy(copy.host, copy.begin, copy.bytes);
}

bool GuardedCopies::contain(const void* begin, size_t bytes) {
    if (!current_copies) return true;
    const auto* byte = static_cast<const unsigned char*>(begin);
    for (const Copy& copy : current_copies->copies_)
        if (byte >= copy.begin && byte + bytes <= copy.begin + copy.bytes) return true;
    return false;
}

std::string GuardedCopies::describe(const void* address) {
    return current_copies ? current_copies->describe_here(address) : "at an unmapped address";
}

std::string GuardedCopies::text_of(const Copy& copy) const {
    return "buffer #" + std::to_string(&copy - copies_.data()) + " (" + copy.names + ", " +
           std::to_string(copy.bytes) + " bytes)";
}

std::string GuardedCopies::describe_forbidden(const void* address) {
    if (!current_copies) return "";
    const auto* byte = static_cast<const unsigned char*>(address);
    for (const Copy& copy : current_copies->copies_) {
        if (byte < copy.begin || byte >= copy.begin + copy.bytes) continue;
        const std::string where =
            "at byte " + std::to_string(byte - copy.begin) + " of " + current_copies->text_of(copy);
        return where + (copy.is_constant ? ", a constant" : " before wait_for_previous()");
    }
    return "";
}

std::string GuardedCopies::describe_here(const void* address) const {
    if (reinterpret_cast<uintptr_t>(address) < 4096) return "through a null pointer";
    const auto* byte = static_cast<const unsigned char*>(address);
    for (const Copy& copy : copies_) {
        if (byte < copy.mapping || byte >= copy.mapping + copy.num_mapped) continue;
        const std::string buffer = " of " + text_of(copy);
        if (byte < copy.begin)
            return std::to_string(copy.begin - byte) + " bytes before the start" + buffer;
        const std::ptrdiff_t past = byte - copy.begin - static_cast<std::ptrdiff_t>(copy.bytes);
        if (past < 0) return "at the last " + std::to_string(-past) + " bytes" + buffer;
        return std::to_string(past) + " bytes past the end" + buffer;
    }
    return "at an address in no buffer";
}

}  // namespace simt
