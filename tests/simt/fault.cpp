#include "fault.h"

#include <pthread.h>
#include <ucontext.h>

#include <cstddef>
#include <stdexcept>

#include "scheduler.h"

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

pthread_t launching_thread;
struct sigaction previous_action;

bool is_write(const void* context) {
#if defined(__x86_64__)
    const auto* machine = &static_cast<const ucontext_t*>(context)->uc_mcontext;
    return (machine->gregs[REG_ERR] & 2) != 0;
#else
    (void)context;
    return false;
#endif
}

void pass_on(int signal_number, siginfo_t* info, void* context) {
    if (previous_action.sa_flags & SA_SIGINFO)
        return previous_action.sa_sigaction(signal_number, info, context);
    if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN)
        return previous_action.sa_handler(signal_number);
    signal(signal_number, SIG_DFL);  // the instruction is tried again, and then ends the process
}

void on_fault(int signal_number, siginfo_t* info, void* context) {
    const bool is_ours = pthread_equal(pthread_self(), launching_thread) && running.thread;
    // Never returns: the kernel's record of this signal is its mask (SA_NODEFER: unchanged) and the
    // stack in use, which changes with the context.
    if (is_ours) scheduler->abandon_fiber(info->si_addr, is_write(context));
    pass_on(signal_number, info, context);
}

}  // namespace

FaultGuard::FaultGuard() : stack_(new unsigned char[kStackBytes]) {
    stack_t stack{};
    stack.ss_sp = stack_.get();
    stack.ss_size = kStackBytes;
    launching_thread = pthread_self();
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    if (sigaltstack(&stack, &previous_stack_) != 0 ||
        sigaction(SIGSEGV, &action, &previous_action) != 0)
        throw std::runtime_error("simt: cannot catch faults");
}

FaultGuard::~FaultGuard() {
    sigaction(SIGSEGV, &previous_action, nullptr);
    sigaltstack(&previous_stack_, nullptr);
}

}  // namespace simt
