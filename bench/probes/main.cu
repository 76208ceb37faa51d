// probes device | p1 ... p7: one probe, on the first GPU. Rows go to stdout as lines of JSON, the
// last of which says that it is done; the reason why it is not to stderr, with exit code 1 (2:
// misused).
#include <cstdlib>
#include <cstring>
#include <exception>

#include "bench/probes/probe.h"
#include "bench/probes/probes.h"

namespace probes {
namespace {

void describe(const Device& device) {
    cudaDeviceProp properties{};
    PROBES_CHECK(cudaGetDeviceProperties(&properties, 0));
    int driver = 0, runtime = 0;
    PROBES_CHECK(cudaDriverGetVersion(&driver));
    PROBES_CHECK(cudaRuntimeGetVersion(&runtime));
    std::string uuid;
    for (unsigned char byte : properties.uuid.bytes) {
        char digits[4];
        std::snprintf(digits, sizeof digits, "%02x", byte);
        const bool has_dash =
            uuid.size() == 8 || uuid.size() == 13 || uuid.size() == 18 || uuid.size() == 23;
        uuid += (has_dash ? "-" : "") + std::string(digits);
    }
    Row("device")
        .add("device", properties.name)
        .add("uuid", "GPU-" + uuid)
        .add("capability",
             std::to_string(properties.major) + "." + std::to_string(properties.minor))
        .add("num_sms", properties.multiProcessorCount)
        .add("l2_bytes", properties.l2CacheSize)
        .add("memory_bytes", properties.totalGlobalMem)
        .add("shared_bytes", device.shared_bytes)
        .add("driver", driver)
        .add("runtime", runtime)
        .add("has_hopper", device.has_hopper)
        .add("sources", PROBES_SOURCES)
        .print();
}

struct Probe {
    const char* name;
    void (*run)(const Device&);
};
constexpr Probe kProbes[] = {{"device", describe}, {"p1", probe_p1}, {"p2", probe_p2},
                             {"p3", probe_p3},     {"p4", probe_p4}, {"p5", probe_p5},
                             {"p6", probe_p6},     {"p7", probe_p7}};

const Probe* find(const char* name) {
    for (const Probe& probe : kProbes)
        if (std::strcmp(probe.name, name) == 0) return &probe;
    return nullptr;
}

int run(const Probe& probe) {
    const double begin = now();
    try {
        probe.run(find_device());
        PROBES_CHECK(cudaDeviceSynchronize());
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", probe.name, error.what());
        return 1;
    }
    Row(probe.name).add("done", true).add("seconds", now() - begin).print();
    return 0;
}

}  // namespace
}  // namespace probes

int main(int argc, char** argv) {
    // Or kernels are loaded at their first launch, which may be within a capture.
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    const probes::Probe* probe = argc == 2 ? probes::find(argv[1]) : nullptr;
    if (probe != nullptr) return probes::run(*probe);
    std::fprintf(stderr, "usage: %s device | p1 ... p7\n", argv[0]);
    return 2;
}
