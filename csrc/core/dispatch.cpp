#include "core/dispatch.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(SPECRT_X86)
#include <cpuid.h>
#endif
#if defined(SPECRT_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specrt {
#if defined(SPECRT_X86)
namespace avx512bf16 {
bool has_chained_pairs();
}
#endif
namespace {

#if defined(SPECRT_X86)

bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

// Its products of pairs are documented as two chained steps; the contract rests on it, so the CPU
// is asked.
bool has_avx512_bf16() {
    static const bool has = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        const bool is_told = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
        return is_told && has_avx512_vnni() && avx512bf16::has_chained_pairs();
    }();
    return has;
}

struct TileRegisters {
    bool is_granted = false;
    std::string refusal;  // empty if the CPU has none
};

// CPUID and XCR0 say that there are tile registers even where Linux has refused them, and then the
// first instruction ends the process: only the answer to the request counts.
TileRegisters ask_for_tile_registers() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTilesBf16Int8 = 1u << 24 | 1u << 22 | 1u << 25;
    const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
                     (d & kTilesBf16Int8) == kTilesBf16Int8 && has_avx512_vnni();
    if (!has) return {};
#if defined(__linux__)
    constexpr long kGetPermitted = 0x1022, kRequest = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0)
        return {false, std::string("amx: Linux refused tile registers: ") + std::strerror(errno)};
    unsigned long permitted = 0;
    if (syscall(SYS_arch_prctl, kGetPermitted, &permitted) == 0 && (permitted >> kTileData & 1))
        return {true, ""};
    return {false, "amx: Linux says that tile registers are not permitted"};
#else
    return {false, "amx: tile registers are asked for on Linux alone"};
#endif
}

const TileRegisters& tile_registers() {
    static const TileRegisters answer = ask_for_tile_registers();
    return answer;
}

#endif

Isa best_isa() {
    Isa best = Isa::kPortable;
    for (Isa isa : kAllIsas)
        if (cpu_has(isa)) best = isa;
    return best;
}

Isa parse_isa(const char* name) {
    for (Isa isa : kAllIsas) {
        if (std::strcmp(name, isa_name(isa)) != 0) continue;
        SPECRT_CHECK(cpu_has(isa), "isa: this CPU has no ", name);
        return isa;
    }
    fail("isa: expected portable, avx2, avx512, avx512vnni, avx512bf16 or amx, got ", name);
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
    constexpr const char* kNames[] = {"portable",   "avx2",       "avx512",
                                      "avx512vnni", "avx512bf16", "amx"};
    return kNames[static_cast<int>(isa)];
}

bool cpu_has(Isa isa) {
#if defined(SPECRT_X86)
    if (isa == Isa::kAvx2) return has_avx2();
    if (isa == Isa::kAvx512) return has_avx512();
    if (isa == Isa::kAvx512Vnni) return has_avx512_vnni();
    if (isa == Isa::kAvx512Bf16) return has_avx512_bf16();
    if (isa == Isa::kAmx) return tile_registers().is_granted;
#endif
    return isa == Isa::kPortable;
}

const char* refused_isa() {
#if defined(SPECRT_X86)
    const std::string& refusal = tile_registers().refusal;
    return refusal.empty() ? nullptr : refusal.c_str();
#else
    return nullptr;
#endif
}

Isa active_isa() {
    return chosen_isa().load(std::memory_order_relaxed);
}

void set_isa(const char* name) {
    chosen_isa().store(parse_isa(name));
}

}  // namespace specrt
