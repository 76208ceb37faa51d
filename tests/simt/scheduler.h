// Threads, warps and blocks of a launch, and who runs next. All blocks that are resident run as
// fibers of one OS thread. A fiber is switched out where it waits (barriers, warp operations) and,
// as the seed will have it, at atomics and fences.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "async_copy.h"
#include "cuda_types.h"
#include "fiber.h"
#include "launch.h"
#include "shared_memory.h"

namespace simt {

struct Warp;
struct Block;

struct Site {
    const char* file = "";
    int line = 0;
};

struct Thread {
    void* stack_pointer = nullptr;
    uint3 index{};
    unsigned lane = 0;
    Warp* warp = nullptr;
    Block* block = nullptr;
    Site site;                // of the barrier it came to last
    bool has_waited = false;  // for the launch before
    AsyncCopies copies;
};

// What a lane brings to an operation of its warp. The lane that comes last runs `combine` for all:
// it reads each lane's `in` and writes each lane's `out`, which lie on the waiting fibers' stacks.
struct Meeting {
    using Combine = void (*)(Warp& warp, uint32_t lanes);
    const char* what;  // the operation's name
    uint32_t mask;
    Combine combine;
    const void* in;
    void* out;
};

struct Warp {
    Thread* threads = nullptr;  // of lane 0
    unsigned slot = 0;          // in the scheduler's set of ready warps
    uint32_t alive = 0, ready = 0, at_barrier = 0, at_wait = 0, meeting = 0, exited = 0;
    uint32_t priority = 0;
    unsigned last_lane = 31;
    Meeting at[32];

    template <typename In>
    const In& in(unsigned lane) const {
        return *static_cast<const In*>(at[lane].in);
    }
    template <typename Out>
    Out& out(unsigned lane) {
        return *static_cast<Out*>(at[lane].out);
    }
};

struct BarrierResult {
    unsigned num_true = 0, num_threads = 0;
};

struct Block {
    uint3 index{};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    SharedArena* shared = nullptr;
    unsigned num_arrived = 0, num_true = 0, num_exited = 0;
    const Thread* first_arrived = nullptr;  // at the barrier some wait at now
    const Thread* first_exited = nullptr;
    BarrierResult result;  // of the barrier that opened last
};

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
    uint32_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1du >> 32);
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>(uint64_t{next()} * n >> 32); }

  private:
    uint64_t state_;
};

// How a seed schedules. Between "any warp at any time" and "one warp as far as it gets".
struct Policy {
    bool is_in_order = true;
    unsigned stay = 0;        // of 64: go on with the same warp
    unsigned contenders = 1;  // the one of highest priority, of so many drawn, runs
    unsigned preempt = 0;     // of 64: switch out where that is possible, not needed
    bool is_by_block = false;
};

class ReadySet {
  public:
    void resize(size_t count) { words_.assign((count + 63) / 64, 0); }
    void insert(unsigned i) { words_[i / 64] |= uint64_t{1} << i % 64; }
    void erase(unsigned i) { words_[i / 64] &= ~(uint64_t{1} << i % 64); }
    void insert(const ReadySet& others) {
        for (size_t i = 0; i < words_.size(); ++i) words_[i] |= others.words_[i];
    }
    ReadySet take() {  // leaves none
        ReadySet taken = *this;
        resize(words_.size() * 64);
        return taken;
    }
    int next(unsigned from) const;  // the first at or after `from`, going around; -1: empty

  private:
    std::vector<uint64_t> words_;
};

struct LaunchSpec {
    const char* name;
    dim3 grid, block;
    size_t shared_bytes;
    bool overlaps;
    const std::function<void()>* body;
};

class Scheduler {
  public:
    Scheduler(const LaunchSpec& spec, const Settings& settings, StackPool& stacks,
              std::vector<std::unique_ptr<SharedArena>>& arenas);
    void run();

    // By the running fiber:
    BarrierResult barrier(bool vote, Site site);
    void meet(const char* what, uint32_t mask, Meeting::Combine combine, const void* in, void* out);
    void preempt();
    void wait_for_previous();
    [[noreturn]] void finish_fiber();

    Arithmetic arithmetic() const { return arithmetic_; }

    [[noreturn]] void fail(const Thread& thread, const std::string& text) const;
    // By the signal handler: the running fiber is abandoned.
    void abandon_fiber(void* address, bool is_write);

  private:
    void run_ready();
    void run_to_wait();
    Thread* pick();
    Warp* choose_warp();
    void make_ready(Warp& warp, uint32_t lanes);
    void switch_out(Thread& me);
    void maybe_switch_out(Thread& me);
    void admit(Block& block);
    void retire(Block& block);
    void exit_thread(Thread& me);
    void open_barrier(Block& block);
    void check_barrier(const Thread& me) const;
    void check_meeting(const Thread& me, const char* what, uint32_t mask) const;
    void finish_meeting(Warp& warp, uint32_t lanes);
    void finish_meetings_after_exit(Warp& warp);
    void check_after_switch();
    [[noreturn]] void fail_deadlock() const;
    std::string describe_fault() const;

    LaunchSpec spec_;
    bool is_strict_;
    Arithmetic arithmetic_;
    Policy policy_;
    Random random_;
    StackPool& stacks_;
    std::vector<Block> blocks_;
    std::vector<uint32_t> order_;  // of the grid's blocks
    size_t num_admitted_ = 0;
    unsigned warps_per_block_;
    ReadySet ready_;
    unsigned slot_ = 0;  // of the warp that runs
    uint64_t num_preempted_ = 0;
    bool is_early_ = false;  // the launch before may still run
    void* main_ = nullptr;
    Block* finished_ = nullptr;
    std::string failure_;
    struct Fault {
        bool has_come = false, is_write = false;
        void* address = nullptr;
        const Thread* thread = nullptr;
    } fault_;
};

extern __attribute__((visibility("hidden"))) Scheduler* scheduler;  // of the launch that runs

// An error of the running thread: names kernel, block and thread.
[[noreturn]] void fail(const std::string& text);
std::string text_of(const uint3& index);

inline void preempt() {
    scheduler->preempt();
}
inline void wait_for_previous() {
    scheduler->wait_for_previous();
}
inline void let_next_start() {}  // when the next launch starts is run_to_wait's choice
inline void barrier(const char* file, int line) {
    scheduler->barrier(false, {file, line});
}
inline int barrier_count(int vote, const char* file, int line) {
    return static_cast<int>(scheduler->barrier(vote != 0, {file, line}).num_true);
}
inline int barrier_or(int vote, const char* file, int line) {
    return scheduler->barrier(vote != 0, {file, line}).num_true > 0;
}
inline int barrier_and(int vote, const char* file, int line) {
    const BarrierResult result = scheduler->barrier(vote != 0, {file, line});
    return result.num_true == result.num_threads;
}

}  // namespace simt

#define __syncthreads() ::simt::barrier(__FILE__, __LINE__)
#define __syncthreads_count(vote) ::simt::barrier_count(vote, __FILE__, __LINE__)
#define __syncthreads_or(vote) ::simt::barrier_or(vote, __FILE__, __LINE__)
#define __syncthreads_and(vote) ::simt::barrier_and(vote, __FILE__, __LINE__)
