// Device memory: copies of a call's tensors, each between pages that fault, so that an access out
// of bounds is an error that names the argument.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace simt {

// The copies of one call, the calling thread's current one until destroyed. They are written back
// by write_back() only: a call that fails leaves the tensors as they were.
class GuardedCopies {
  public:
    GuardedCopies();
    ~GuardedCopies();
    GuardedCopies(const GuardedCopies&) = delete;
    GuardedCopies& operator=(const GuardedCopies&) = delete;

    static GuardedCopies& current();  // throws if there is none

    // The copy of the `bytes` at `host`, made at the first call. `name`, of an argument, must live
    // as long as this.
    unsigned char* copy_of(void* host, size_t bytes, const char* name);
    // Throws std::runtime_error if something was written around a copy.
    void write_back();

    // Until given back the current copies cannot be touched, but constants can be read, and hints,
    // which every other time say the opposite.
    static void withhold();
    static void give_back();

    // Of the current copies; where a thread has none, everything is contained.
    static bool contain(const void* begin, size_t bytes);
    static std::string describe(const void* address);
    // Of an address in a copy, why it cannot be touched; else empty.
    static std::string describe_forbidden(const void* address);

  private:
    struct Copy {
        void* host;
        size_t bytes;
        std::string names;
        unsigned char *mapping, *page, *begin;
        size_t num_mapped, num_paged;
        bool is_constant;  // as its arguments' names say: read-only
        bool is_hint;      // likewise: read early, it may be what it will not stay

        std::vector<int32_t> held;  // by a hint that misleads

        void protect(int protection) const;
        void mislead();
        void restore();
    };
    static Copy map(void* host, size_t bytes);
    std::string describe_here(const void* address) const;
    std::string text_of(const Copy& copy) const;

    std::vector<Copy> copies_;
    bool misleads_ = false;
    GuardedCopies* previous_;
};

// As long as it lives.
class WithheldCopies {
  public:
    WithheldCopies() { GuardedCopies::withhold(); }
    ~WithheldCopies() { GuardedCopies::give_back(); }
    WithheldCopies(const WithheldCopies&) = delete;
    WithheldCopies& operator=(const WithheldCopies&) = delete;
};

}  // namespace simt
