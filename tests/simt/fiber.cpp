#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch_context
.hidden simt_switch_context
.type simt_switch_context, @function
simt_switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch_context, .-simt_switch_context
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch_context
.hidden simt_switch_context
.type simt_switch_context, %function
simt_switch_context:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size simt_switch_context, .-simt_switch_context
)");
#else
#error "no context switch for this processor"
#endif

namespace simt {
namespace {

constexpr size_t kGuardBytes = 64 * 1024;  // a page, of whatever size
constexpr size_t kSlotBytes = kGuardBytes + StackPool::kStackBytes;

}  // namespace

void* make_context(void* stack_top, void (*entry)()) {
    auto** word = static_cast<void**>(stack_top);
#if defined(__x86_64__)
    *--word = nullptr;  // where a return address would lie: debuggers stop here
    *--word = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--word = nullptr;
#else
    for (int i = 0; i < 20; ++i) *--word = nullptr;
    word[11] = reinterpret_cast<void*>(entry);  // x30, the link register
#endif
    return word;
}

StackPool::~StackPool() {
    for (unsigned char* chunk : chunks_) munmap(chunk, kPerChunk * kSlotBytes);
}

void StackPool::reserve(size_t count) {
    while (chunks_.size() * kPerChunk < count) {
        void* memory = mmap(nullptr, kPerChunk * kSlotBytes, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for fibers' stacks");
        auto* chunk = static_cast<unsigned char*>(memory);
        chunks_.push_back(chunk);
        for (size_t i = 0; i < kPerChunk; ++i) {
            unsigned char* stack = chunk + i * kSlotBytes + kGuardBytes;
            if (mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE) != 0)
                throw std::runtime_error("simt: no memory for fibers' stacks");
        }
    }
}

void* StackPool::top(size_t index) const {
    unsigned char* slot = chunks_[index / kPerChunk] + index % kPerChunk * kSlotBytes;
    // Tops at different offsets within a page, lest all stacks fight for the same cache lines.
    return slot + kSlotBytes - index % 31 * 128;
}

bool StackPool::is_guard(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    for (const unsigned char* chunk : chunks_) {
        if (byte < chunk || byte >= chunk + kPerChunk * kSlotBytes) continue;
        return static_cast<size_t>(byte - chunk) % kSlotBytes < kGuardBytes;
    }
    return false;
}

}  // namespace simt
