// Small kernels that test the shim itself, each found by its name.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "core/launch.cuh"

namespace probes {

using namespace specrt;

struct Probe {
    LaunchShape shape;
    std::map<std::string, void*> tensors;
    std::vector<int> numbers;

    template <typename T>
    T* tensor(const char* name) const {
        return static_cast<T*>(tensors.at(name));
    }
};

using ProbeFn = void (*)(const Probe& probe);

struct Registration {
    Registration(const char* name, ProbeFn run);
};
ProbeFn find(const std::string& name);

}  // namespace probes

// PROBE(kernel, p.tensor<float>("x"), ...): how `kernel` is launched for a Probe `p`.
#define PROBE(kernel, ...)                  \
    const Registration registered_##kernel( \
        #kernel, [](const Probe& p) { SPECRT_LAUNCH(kernel, p.shape, nullptr, __VA_ARGS__); });
