// The thread pool alone, for a sanitizer: random jobs of dependent launches from several threads at
// once. Each unit of a launch is done once and reads all of the launch before; some delay theirs.
// CPUs are made up: workers ask for the preferred ones, those that delay later for any; callers for
// none.
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <random>
#include <thread>

#include "core/cpu_topology.h"
#include "core/thread_pool.h"

namespace {

using namespace specrt;

const Cpus kPreferred{7}, kAllowed{0, 7};
std::atomic<int> num_settled{0}, num_let_go{0}, num_misplaced{0};
thread_local bool is_caller = false, is_settled = false;

}  // namespace

namespace specrt {

Cpus worker_cpus(int) {
    return kPreferred;
}
Cpus allowed_cpus() {
    return kAllowed;
}
void run_on(const Cpus& cpus) {
    if (is_caller || cpus != (is_settled ? kAllowed : kPreferred)) ++num_misplaced;
    ++(is_settled ? num_let_go : num_settled);
    is_settled = true;
}

}  // namespace specrt

namespace {

constexpr int kUnits = 48;
using Values = std::vector<uint64_t>;

struct Step {
    const uint64_t* in;
    uint64_t* out;   // [kUnits]
    int* num_done;   // [kUnits]
    uint64_t delay;  // one part in so many; 0: none
};

void step_part(const void* params, int part, int num_parts) {
    const Step& p = *static_cast<const Step*>(params);
    uint64_t sum = 0;
    for (int i = 0; i < kUnits; ++i) sum = sum * 31 + p.in[i];
    for (int u = kUnits * part / num_parts; u < kUnits * (part + 1) / num_parts; ++u) {
        p.out[u] = sum ^ (static_cast<uint64_t>(u) * 0x9E3779B97F4A7C15u);
        ++p.num_done[u];
    }
    const uint64_t lot = sum + static_cast<uint64_t>(part);
    if (p.delay && lot % p.delay == 0) usleep(300);
    if (p.delay && lot % 7 == 0) sched_yield();
}

// Whether `length` launches gave what they give on one thread, each unit done once.
bool job_is_right(std::mt19937& random, int length, int num_threads) {
    const auto size = static_cast<size_t>(length);
    std::vector<Values> values(size + 1, Values(kUnits)), expected = values;
    std::vector<std::vector<int>> num_done(size, std::vector<int>(kUnits));
    std::vector<Launch> launches;
    for (uint64_t& x : values[0]) x = random();
    expected[0] = values[0];
    for (size_t k = 0; k < size; ++k) {
        const uint64_t delay = random() % 4 == 0 ? 3 + random() % 200 : 0;
        const Step step{values[k].data(), values[k + 1].data(), num_done[k].data(), delay};
        const int64_t parts = random() % 3 == 0 ? 1 : 1 + random() % 300;
        launches.push_back(make_launch(step_part, step, Split{parts, 1 + int64_t(random() % 40)}));
        std::vector<int> ignored(kUnits);
        const Step alone{expected[k].data(), expected[k + 1].data(), ignored.data(), 0};
        step_part(&alone, 0, 1);
    }
    run_launches(launches.data(), launches.size(), num_threads);
    bool is_right = values == expected;
    for (const auto& counts : num_done)
        for (int count : counts) is_right = is_right && count == 1;
    return is_right;
}

void call(unsigned seed, int num_jobs, std::atomic<int>* num_wrong) {
    is_caller = true;
    std::mt19937 random(seed);
    int num_threads = 2;
    for (int job = 0; job < num_jobs; ++job) {
        if (job % 60 == 59) num_threads = 1 + static_cast<int>(random() % 8);
        if (random() % 20 == 0) rest_workers(random() % 2 ? 0.002 : 0.0);
        const int length = 1 + static_cast<int>(random() % 200);
        if (!job_is_right(random, length, num_threads)) ++*num_wrong;
    }
}

}  // namespace

int main() {
    std::atomic<int> num_wrong{0};
    call(1, 400, &num_wrong);
    std::vector<std::thread> callers;
    for (unsigned seed = 2; seed < 5; ++seed) callers.emplace_back(call, seed, 200, &num_wrong);
    for (std::thread& caller : callers) caller.join();
    std::printf("%d jobs of 1000 wrong; %d workers settled, %d times let go, %d misplaced\n",
                num_wrong.load(), num_settled.load(), num_let_go.load(), num_misplaced.load());
    return num_wrong != 0 || num_settled == 0 || num_let_go == 0 || num_misplaced != 0;
}
