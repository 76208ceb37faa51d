#include "core/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace specrt {
namespace {

Isa best_isa() {
    for (Isa isa : {Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2})
        if (cpu_has(isa)) return isa;
    return Isa::kPortable;
}

Isa parse_isa(const char* name) {
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni}) {
        if (std::strcmp(name, isa_name(isa)) != 0) continue;
        SPECRT_CHECK(cpu_has(isa), "isa: this CPU has no ", name);
        return isa;
    }
    fail("isa: expected portable, avx2, avx512 or avx512_vnni, got ", name);
}

// The one process-wide setting: which of several bit-identical implementations runs.
std::atomic<Isa>& chosen_isa() {
    static std::atomic<Isa> isa{[] {
        const char* wanted = std::getenv("SPECRT_ISA");
        return wanted ? parse_isa(wanted) : best_isa();
    }()};
    return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
    constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni"};
    return kNames[static_cast<int>(isa)];
}

bool cpu_has(Isa isa) {
#if defined(SPECRT_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::kAvx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (isa == Isa::kAvx512) return avx512;
    if (isa == Isa::kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
    return isa == Isa::kPortable;
}

Isa active_isa() {
    return chosen_isa().load(std::memory_order_relaxed);
}

void set_isa(const char* name) {
    chosen_isa().store(parse_isa(name));
}

}  // namespace specrt
