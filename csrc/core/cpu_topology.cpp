#include "core/cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string_view>

namespace specrt {
namespace {

// A list such as "0-3,8,10-11"; what cannot be read ends it.
Cpus read_list(const std::string& path) {
    Cpus cpus;
    std::ifstream file(path);
    for (int first = 0; file >> first;) {
        int last = first;
        if (file.peek() == '-') file.ignore() >> last;
        for (int cpu = first; file && cpu <= last; ++cpu) cpus.push_back(cpu);
        if (file.peek() == ',') file.ignore();
    }
    return cpus;
}

bool has(const Cpus& cpus, int cpu) {
    return std::find(cpus.begin(), cpus.end(), cpu) != cpus.end();
}

// One CPU of each core: the one that has the thread, as a worker must not sit on its sibling.
Cpus one_a_core(const std::vector<CpuPlace>& places, int here) {
    Cpus cpus, cores;
    for (const CpuPlace& place : places) {
        const auto known = std::find(cores.begin(), cores.end(), place.core);
        if (known == cores.end()) {
            cores.push_back(place.core);
            cpus.push_back(place.cpu);
        } else if (place.cpu == here) {
            cpus[static_cast<size_t>(known - cores.begin())] = here;
        }
    }
    std::sort(cpus.begin(), cpus.end());
    return cpus;
}

template <typename Keep>
std::vector<CpuPlace> only(std::vector<CpuPlace> places, Keep&& keep) {
    const auto is_out = [&](const CpuPlace& place) { return !keep(place); };
    places.erase(std::remove_if(places.begin(), places.end(), is_out), places.end());
    return places;
}

}  // namespace

std::vector<CpuPlace> read_places(const std::string& devices, const Cpus& cpus) {
    std::vector<CpuPlace> places;
    const Cpus slow = read_list(devices + "/cpu_atom/cpus");
    for (const int cpu : cpus) {
        const std::string at = devices + "/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
        const Cpus siblings = read_list(at + "thread_siblings_list");
        CpuPlace place{cpu, cpu, 0, has(slow, cpu)};
        if (!has(siblings, cpu) || !(std::ifstream(at + "physical_package_id") >> place.package))
            return {};
        place.core = siblings[0];
        places.push_back(place);
    }
    return places;
}

Cpus choose_cpus(const std::vector<CpuPlace>& places, int here, int count) {
    const auto at = std::find_if(places.begin(), places.end(),
                                 [&](const CpuPlace& place) { return place.cpu == here; });
    if (at == places.end()) return {};
    const auto is_near = [&](const CpuPlace& place) { return place.package == at->package; };
    const auto is_fast = [](const CpuPlace& place) { return !place.is_slow; };
    const std::vector<CpuPlace> near = only(places, is_near);
    for (const auto& group : {only(near, is_fast), near, only(places, is_fast), places}) {
        const Cpus cpus = one_a_core(group, here);
        if (cpus.size() < static_cast<size_t>(count)) continue;
        return cpus.size() < places.size() ? cpus : Cpus{};
    }
    return {};
}

#if defined(__linux__)
Cpus allowed_cpus() {
    Cpus cpus;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    return cpus;
}

void run_on(const Cpus& cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int cpu : cpus) CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

Cpus worker_cpus(int num_threads) {
    const char* wanted = std::getenv("SPECRT_AFFINITY");
    if (wanted && std::string_view(wanted) == "off") return {};
    return choose_cpus(read_places("/sys/devices", allowed_cpus()), sched_getcpu(), num_threads);
}
#else
Cpus allowed_cpus() {
    return {};
}
void run_on(const Cpus&) {}
Cpus worker_cpus(int) {
    return {};
}
#endif

}  // namespace specrt
