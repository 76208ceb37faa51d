// Which CPUs the thread pool's workers had better run on. All of it is advice: where the system
// does not tell, there is none.
#pragma once
#include <string>
#include <vector>

namespace specrt {

using Cpus = std::vector<int>;  // numbers of CPUs, ascending

// Where a CPU is. CPUs of one core are its hyper-threads.
struct CpuPlace {
    int cpu = 0, core = 0, package = 0;  // a core's number is that of its first CPU
    bool is_slow = false;                // an efficiency core of a hybrid CPU
};

// The places of these CPUs, as told under `devices` (/sys/devices); none where one is not told.
std::vector<CpuPlace> read_places(const std::string& devices, const Cpus& cpus);

// Where `count` threads, one of which is on CPU `here`, should run: on one CPU of each core of its
// package, if that has so many cores, or of all; on fast ones if those suffice. Never fewer CPUs
// than threads, and room to avoid those that others keep busy. None: wherever the system likes, as
// there are not so many cores, or as that would be all `places`.
Cpus choose_cpus(const std::vector<CpuPlace>& places, int here, int count);

// What this thread may run on; none where the system does not tell.
Cpus allowed_cpus();
// From now on this thread runs on these. What the system refuses is done without.
void run_on(const Cpus& cpus);

// choose_cpus for this thread and its workers; none too where the environment variable
// SPECRT_AFFINITY is "off".
Cpus worker_cpus(int num_threads);

}  // namespace specrt
