#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace specrt {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// A microsecond of spinning covers a barrier between threads that run. Beyond it, give the core
// away: on a loaded machine the thread waited for may be queued on this very core, and spinning on
// would cost a tenth of a millisecond at every barrier.
constexpr int kSpins = 64;

template <typename Ready>
void spin_until(Ready&& ready) {
    for (int i = 0; !ready(); ++i) {
        if (i < kSpins) {
            relax();
        } else {
            sched_yield();
        }
    }
}

class Pool {
  public:
    explicit Pool(int num_threads) : num_threads_(num_threads) {
        for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            stopping_ = true;
            job_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int num_threads() const { return num_threads_; }

    void run(const Launch* launches, size_t count) {
        launches_ = launches;
        count_ = count;
        job_.fetch_add(1, std::memory_order_seq_cst);
        if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
            // Taking the mutex orders this notify after the sleeper's last look at job_.
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        share(0);
    }

  private:
    using Clock = std::chrono::steady_clock;

    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            seen = await_job(seen);
            if (stopping_) return;
            share(thread);
        }
    }

    uint64_t await_job(uint64_t seen) {
        const auto has_job = [&] { return job_.load(std::memory_order_seq_cst) != seen; };
        const auto give_up = Clock::now() + std::chrono::milliseconds(1);
        spin_until([&] { return has_job() || Clock::now() > give_up; });
        if (!has_job()) {
            std::unique_lock<std::mutex> lock(sleep_mutex_);
            num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, has_job);
            num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        }
        // One job at a time, and run() waits for all threads: exactly one new job.
        return seen + 1;
    }

    void share(int thread) {
        // arrived_ only grows. All threads meet after every launch, so its value here is the same
        // multiple of num_threads_ for all of them, bar those already in the first launch.
        const uint64_t start = base_;
        for (size_t i = 0; i < count_; ++i) {
            const Launch& launch = launches_[i];
            const int parts = launch.max_parts < num_threads_ ? launch.max_parts : num_threads_;
            if (thread < parts) launch.fn(launch.params, thread, parts);
            const uint64_t target = start + (i + 1) * num_threads_;
            arrived_.fetch_add(1, std::memory_order_acq_rel);
            const bool is_last = i + 1 == count_;
            if (is_last && thread != 0) return;  // nothing of this job may be read from here on
            spin_until([&] { return arrived_.load(std::memory_order_acquire) >= target; });
        }
        base_ = start + count_ * num_threads_;  // thread 0 alone, before the next job is published
    }

    const int num_threads_;
    std::vector<std::thread> workers_;
    const Launch* launches_ = nullptr;
    size_t count_ = 0;
    uint64_t base_ = 0;
    bool stopping_ = false;
    alignas(64) std::atomic<uint64_t> job_{0};
    alignas(64) std::atomic<uint64_t> arrived_{0};
    alignas(64) std::atomic<int> num_sleeping_{0};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
};

// Threads outlive a call, so the pool is the process's one piece of hidden state; it holds no data.
struct PoolOwner {
    std::mutex turn;
    std::unique_ptr<Pool> pool;
};

PoolOwner*& owner_slot() {
    static PoolOwner* owner = [] {
        // A forked child has none of the threads: it starts over with a pool of its own.
        pthread_atfork(nullptr, nullptr, [] { owner_slot() = new PoolOwner; });
        return new PoolOwner;
    }();
    return owner;
}

thread_local std::vector<Launch>* current_recorder = nullptr;

}  // namespace

void run_launches(const Launch* launches, size_t count, int num_threads) {
    if (count == 0) return;
    if (num_threads <= 1) {
        for (size_t i = 0; i < count; ++i) launches[i].fn(launches[i].params, 0, 1);
        return;
    }
    PoolOwner& owner = *owner_slot();
    std::lock_guard<std::mutex> lock(owner.turn);
    if (!owner.pool || owner.pool->num_threads() != num_threads) {
        owner.pool.reset();
        owner.pool = std::make_unique<Pool>(num_threads);
    }
    owner.pool->run(launches, count);
}

void set_recorder(std::vector<Launch>* recorder) {
    current_recorder = recorder;
}
std::vector<Launch>* recorder() {
    return current_recorder;
}

void submit(const Launch* launches, size_t count, int num_threads) {
    if (current_recorder)
        current_recorder->insert(current_recorder->end(), launches, launches + count);
    bool is_shared = false;
    for (size_t i = 0; i < count; ++i) is_shared = is_shared || launches[i].max_parts > 1;
    run_launches(launches, count, is_shared ? num_threads : 1);
}

}  // namespace specrt
