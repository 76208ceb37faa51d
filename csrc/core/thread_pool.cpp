#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "core/cpu_topology.h"

namespace specrt {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

// A microsecond or a few, which covers the end of a launch whose threads all run.
constexpr int kSpins = 64;
// How long a thread leaves others' pieces to them: looking at a seat takes its line from the owner,
// and a piece taken from one that was about to begin it finds nothing fetched.
constexpr int kSpinsForOthers = 4 * kSpins;
// How long the caller spins for a piece that another thread has begun: longer than most pieces
// take. Yielding would cost a scheduler's quantum wherever another process waits for the core.
constexpr nanoseconds kPatience = std::chrono::microseconds(100);
// How long a worker keeps its core warm (by yielding) before it sleeps.
constexpr nanoseconds kIdle = std::chrono::milliseconds(1);
// A worker that lost its core with a piece in hand rests for so many times the caller's wait, so
// such waits cost an eighth of the time at most, however busy the machine is.
constexpr int kRestFactor = 8;
// A thread claims so much of what is left of a range: more at once would bind the pieces to a
// thread that is slow or has lost its core, less would be claims without end. Half leaves a launch
// waiting 1.5 times as long for one thread of half the speed, an eighth 1.1 (simulated).
constexpr int kClaimsOfRest = 8;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

template <typename Ready>
bool spin(int count, Ready&& ready) {
    for (int i = 0; i < count; ++i) {
        if (ready()) return true;
        relax();
    }
    return false;
}

nanoseconds cpu_time_of_thread() {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return std::chrono::seconds(t.tv_sec) + nanoseconds(t.tv_nsec);
}

// Threads asleep until something becomes true. What makes it true is a seq_cst store, and `ready`
// reads by seq_cst loads: either the sleeper sees the store, or wake() sees the sleeper.
class Sleepers {
  public:
    template <typename Ready>
    void sleep(Ready&& ready) {
        sleep(ready, [&](auto& lock) { woken_.wait(lock); });
    }

    template <typename Ready>
    void sleep_until(Clock::time_point end, Ready&& ready) {
        sleep(ready, [&](auto& lock) { woken_.wait_until(lock, end); });
    }

    // One sleep is woken once: those that come after find nobody to wake and take no lock.
    void wake() {
        if (!has_any_.load(std::memory_order_seq_cst)) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            has_any_.store(false, std::memory_order_seq_cst);
        }
        woken_.notify_all();
    }

  private:
    template <typename Ready, typename Wait>
    void sleep(Ready&& ready, Wait&& wait) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            has_any_.store(true, std::memory_order_seq_cst);
            if (ready()) return;
            wait(lock);
        }
    }

    alignas(64) std::atomic<bool> has_any_{false};
    std::mutex mutex_;
    std::condition_variable woken_;
};

// A launch's number and a count in one word. Numbers only grow, so a claim by a thread that still
// believes in an old launch fails.
using Word = uint64_t;
constexpr int kCountBits = 16;
static_assert(Launch::kMostParts < 1 << kCountBits);

inline Word word_of(uint64_t number, uint64_t count) {
    return number << kCountBits | count;
}
inline uint64_t number_of(Word word) {
    return word >> kCountBits;
}
inline int count_of(Word word) {
    return static_cast<int>(word & ((1 << kCountBits) - 1));
}

// One thread's place. The pieces of a launch fall into one range a seat, in order: a thread begins
// with its own range, where its weights are in its caches, and goes on with what others have not
// begun.
struct alignas(64) Seat {
    // The launch that pieces of this seat's range were last begun of, and how many of them. Only a
    // claim moves it on to the next launch, so opening a launch touches no seat.
    std::atomic<Word> begun{0};
    std::atomic<int64_t> num_done{0};
    std::atomic<int64_t> rest_until{0};  // of Clock, in ns; 0: no rest
    bool has_others_absent = false;      // this thread did all of a launch; its own
    // The worker's own: when it was last looked at, and its CPU time then.
    Clock::time_point seen_at;
    nanoseconds cpu_then{0};

    // How long the worker has been without a core since the last call.
    nanoseconds time_off() {
        const Clock::time_point now = Clock::now();
        const nanoseconds cpu = cpu_time_of_thread();
        const nanoseconds off = (now - seen_at) - (cpu - cpu_then);
        seen_at = now;
        cpu_then = cpu;
        return off;
    }
};

int64_t nanoseconds_of(Clock::time_point time) {
    return std::chrono::duration_cast<nanoseconds>(time.time_since_epoch()).count();
}

struct Pieces {
    int begin = 0, end = 0;
};

// Some of a range's pieces that nobody has begun, of `size`: few claims, and the last are small.
// None: all are begun, or the launch is over. An ended launch has every piece begun, so its number
// and size can claim nothing.
Pieces claim(Seat& seat, uint64_t number, int size) {
    Word begun = seat.begun.load(std::memory_order_relaxed);
    for (;;) {
        const int begin = number_of(begun) == number ? count_of(begun) : 0;
        if (number_of(begun) > number || begin >= size) return {};
        const int end = begin + (size - begin + kClaimsOfRest - 1) / kClaimsOfRest;
        const Word more = word_of(number, static_cast<uint64_t>(end));
        if (seat.begun.compare_exchange_weak(begun, more, std::memory_order_relaxed))
            return {begin, end};
    }
}

class Pool {
  public:
    explicit Pool(int num_threads)
        : num_wanted_(num_threads),
          preferred_(worker_cpus(num_threads)),
          allowed_(allowed_cpus()),
          seats_(new Seat[static_cast<size_t>(num_threads)]) {
        workers_.reserve(static_cast<size_t>(num_threads) - 1);
        try {
            for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
        } catch (const std::exception&) {
            // No more threads can be had: fewer do the same pieces.
        }
        num_threads_ = 1 + static_cast<int>(workers_.size());
    }

    ~Pool() {
        stopping_.store(true, std::memory_order_seq_cst);
        idle_.wake();
        resting_.wake();
        for (auto& worker : workers_) worker.join();
    }

    int num_wanted() const { return num_wanted_; }

    void run(const Launch* launches, size_t count) {
        launches_ = launches;
        count_ = count;
        first_number_ = number_of(open_.load(std::memory_order_relaxed));
        open(first_number_, std::memory_order_seq_cst);
        Word now = open_.load(std::memory_order_acquire);
        for (; count_of(now) > 0; now = await_end(now)) take_part(0, now);
    }

    std::vector<int64_t> pieces_by_thread() const {
        std::vector<int64_t> counts;
        for (int i = 0; i < num_threads_; ++i)
            counts.push_back(seats_[i].num_done.load(std::memory_order_relaxed));
        return counts;
    }

    void rest_workers(double seconds) {
        const auto rest =
            std::chrono::duration_cast<nanoseconds>(std::chrono::duration<double>(seconds));
        const int64_t end = seconds > 0.0 ? nanoseconds_of(Clock::now() + rest) : 0;
        for (int i = 1; i < num_threads_; ++i) seats_[i].rest_until.store(end);
        resting_.wake();
    }

  private:
    static constexpr int kIsAwaited = 1 << kCountBits;

    int pieces_of(const Launch& launch) const {
        if (launch.max_parts < num_threads_) return launch.max_parts;
        const int each = launch.max_parts / launch.parts_a_piece / num_threads_;
        return num_threads_ * (each < 1 ? 1 : each);
    }

    // By the caller for the first launch, which wakes whoever sleeps; then by whoever ended the
    // launch before, who may overlook one that is just falling asleep (the next launch wakes it)
    // and pays for no fence.
    void open(uint64_t number, std::memory_order order) {
        const size_t i = number - first_number_;
        const int count = i < count_ ? pieces_of(launches_[i]) : 0;
        remaining_.store(count, std::memory_order_relaxed);
        // From here on the caller may return: nothing of the job may be read.
        open_.store(word_of(number, static_cast<uint64_t>(count)), order);
        if (count > 1) idle_.wake();
    }

    void take_part(int thread, Word now) {
        const int count = count_of(now);
        const int size = count < num_threads_ ? 1 : count / num_threads_;
        const int own = take_range(thread, size, now);
        const auto has_ended = [&] { return open_.load(std::memory_order_acquire) != now; };
        if (own > 0 && report(thread, own, now)) return;
        if (!seats_[thread].has_others_absent && spin(kSpinsForOthers, has_ended)) return;
        int num_done = own;
        for (int i = 1, range = thread; i < num_threads_ && !has_ended(); ++i) {
            if (++range == num_threads_) range = 0;
            const int taken = take_range(range, size, now);
            num_done += taken;
            if (taken > 0 && report(thread, taken, now)) break;
        }
        seats_[thread].has_others_absent = num_done == count;
    }

    int take_range(int range, int size, Word now) {
        const int first = range * size, count = count_of(now);
        if (first >= count) return 0;
        int num_done = 0;
        for (;;) {
            const Pieces taken = claim(seats_[range], number_of(now), size);
            if (taken.begin == taken.end) return num_done;
            // A piece in hand keeps the launch open, and so the caller's list alive.
            const Launch& launch = launches_[number_of(now) - first_number_];
            for (int i = taken.begin; i < taken.end; ++i)
                launch.fn(launch.params, first + i, count);
            num_done += taken.end - taken.begin;
        }
    }

    // Returns whether these were the launch's last pieces; then the next one is open.
    bool report(int thread, int num_done, Word now) {
        Seat& seat = seats_[thread];
        seat.num_done.store(seat.num_done.load(std::memory_order_relaxed) + num_done,
                            std::memory_order_relaxed);
        const int before = remaining_.fetch_sub(num_done, std::memory_order_acq_rel);
        const bool is_awaited = (before & kIsAwaited) != 0;
        const int64_t since = is_awaited ? awaited_since_.load(std::memory_order_relaxed) : 0;
        const bool is_last = (before & ~kIsAwaited) == num_done;
        if (is_last)
            open(number_of(now) + 1,
                 is_awaited ? std::memory_order_seq_cst : std::memory_order_release);
        if (is_last && is_awaited) caller_.wake();
        if (is_awaited && thread != 0) rest_if_off(seat, since);
        return is_last;
    }

    // The caller waited in vain for long. If that is because this worker had no core, it rests, and
    // does without its preference: others, maybe a pool as this one, keep those CPUs busy.
    void rest_if_off(Seat& seat, int64_t awaited_since) {
        const int64_t now = nanoseconds_of(Clock::now()), wait = now - awaited_since;
        if (seat.time_off().count() <= wait / 2) return;
        if (!preferred_.empty()) run_on(allowed_);
        int64_t none = 0;  // a rest that was asked for stays
        seat.rest_until.compare_exchange_strong(none, now + kRestFactor * wait);
    }

    Word await_end(Word now) {
        Word next = now;
        const auto has_ended = [&] {
            next = open_.load(std::memory_order_seq_cst);
            return next != now;
        };
        if (spin(kSpins, has_ended)) return next;
        const Clock::time_point start = Clock::now();
        while (!spin(kSpins, has_ended)) {
            if (Clock::now() - start < kPatience) continue;
            awaited_since_.store(nanoseconds_of(start), std::memory_order_relaxed);
            if (ask_to_be_woken()) {
                caller_.sleep(has_ended);
            } else {
                sched_yield();
            }
        }
        return next;
    }

    // Whoever does the last pieces will see it. False: they are done, the next launch is opening.
    bool ask_to_be_woken() {
        int left = remaining_.load(std::memory_order_relaxed);
        while (left != 0)
            if (remaining_.compare_exchange_weak(left, left | kIsAwaited)) return true;
        return false;
    }

    void work(int thread) {
        Seat& seat = seats_[thread];
        if (!preferred_.empty()) run_on(preferred_);
        seat.time_off();
        for (Word seen = 0; !stopping_.load(std::memory_order_seq_cst);) {
            if (seat.rest_until.load(std::memory_order_relaxed) != 0) rest(seat);
            const Word now = await_open(seat, seen);
            if (seat.rest_until.load(std::memory_order_relaxed) != 0) continue;
            if (count_of(now) > 0) take_part(thread, now);
            seen = now;
        }
    }

    void rest(Seat& seat) {
        int64_t end = seat.rest_until.load(std::memory_order_seq_cst);
        const auto is_over = [&] {
            end = seat.rest_until.load(std::memory_order_seq_cst);
            return stopping_.load(std::memory_order_seq_cst) || end <= nanoseconds_of(Clock::now());
        };
        while (!is_over()) resting_.sleep_until(Clock::time_point(nanoseconds(end)), is_over);
        seat.rest_until.compare_exchange_strong(end, 0);
        seat.time_off();
    }

    // A launch that is open and is not `seen`, or whatever there is when the pool ends.
    Word await_open(Seat& seat, Word seen) {
        Word now = seen;
        const auto has_opened = [&] {
            now = open_.load(std::memory_order_seq_cst);
            return (now != seen && count_of(now) > 0) || stopping_.load(std::memory_order_seq_cst);
        };
        if (spin(kSpins, has_opened)) return now;
        const Clock::time_point give_up = Clock::now() + kIdle;
        while (Clock::now() < give_up) {
            if (has_opened()) return now;
            sched_yield();
        }
        idle_.sleep(has_opened);
        seat.time_off();
        return now;
    }

    const int num_wanted_;
    const Cpus preferred_, allowed_;  // the workers'; the caller's thread is its owner's to place
    int num_threads_ = 1;             // read by workers once a launch is open
    std::unique_ptr<Seat[]> seats_;
    std::vector<std::thread> workers_;
    // The job: read only by who holds a piece of it, or opens its next launch.
    const Launch* launches_ = nullptr;
    size_t count_ = 0;
    uint64_t first_number_ = 0;
    // The open launch's number and pieces (0: none is open); those not yet done, with kIsAwaited
    // where the caller sleeps until they are; and since when it waited, in ns of Clock.
    alignas(64) std::atomic<Word> open_{0};
    std::atomic<int> remaining_{0};
    std::atomic<int64_t> awaited_since_{0};
    alignas(64) std::atomic<bool> stopping_{false};
    Sleepers caller_, idle_, resting_;
};

// Threads outlive a call, so the pool is the process's one piece of hidden state; it holds no data.
struct PoolOwner {
    std::atomic_flag is_taken = ATOMIC_FLAG_INIT;
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

// The pool for one job; `owner` stays null where another thread, or an outer call, has it.
class Turn {
  public:
    Turn() : owner_(owner_slot()) {
        if (owner_->is_taken.test_and_set(std::memory_order_acquire)) owner_ = nullptr;
    }
    ~Turn() {
        if (owner_) owner_->is_taken.clear(std::memory_order_release);
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    PoolOwner* owner() const { return owner_; }

  private:
    PoolOwner* owner_;
};

thread_local std::vector<Launch>* current_recorder = nullptr;

}  // namespace

void run_launches(const Launch* launches, size_t count, int num_threads) {
    if (count == 0) return;
    if (num_threads > 1) {
        const Turn turn;
        if (PoolOwner* owner = turn.owner()) {
            if (!owner->pool || owner->pool->num_wanted() != num_threads) {
                owner->pool.reset();
                owner->pool = std::make_unique<Pool>(num_threads);
            }
            return owner->pool->run(launches, count);
        }
    }
    for (size_t i = 0; i < count; ++i) launches[i].fn(launches[i].params, 0, 1);
}

std::vector<int64_t> pieces_by_thread() {
    const Turn turn;
    const PoolOwner* owner = turn.owner();
    return owner && owner->pool ? owner->pool->pieces_by_thread() : std::vector<int64_t>{};
}

void rest_workers(double seconds) {
    const Turn turn;
    PoolOwner* owner = turn.owner();
    if (owner && owner->pool) owner->pool->rest_workers(seconds);
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
