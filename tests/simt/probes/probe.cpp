#include "probes/probe.h"

#include <stdexcept>

namespace probes {
namespace {

std::map<std::string, ProbeFn>& registry() {
    static std::map<std::string, ProbeFn> known;
    return known;
}

}  // namespace

Registration::Registration(const char* name, ProbeFn run) {
    registry()[name] = run;
}

ProbeFn find(const std::string& name) {
    const auto found = registry().find(name);
    if (found == registry().end()) throw std::invalid_argument("no probe " + name);
    return found->second;
}

}  // namespace probes
