// Faults of a running fiber become errors of its launch; all others go where they went before.
#pragma once
#include <signal.h>

#include <memory>

namespace simt {

class FaultGuard {
  public:
    FaultGuard();
    ~FaultGuard();
    FaultGuard(const FaultGuard&) = delete;
    FaultGuard& operator=(const FaultGuard&) = delete;

  private:
    std::unique_ptr<unsigned char[]> stack_;
    stack_t previous_stack_{};
};

}  // namespace simt
