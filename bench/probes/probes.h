// One function a probe, in the file of its name. Each prints its rows as it finds them, and throws
// if it cannot go on.
#pragma once
#include "bench/probes/probe.h"

namespace probes {

void probe_p1(const Device& device);
void probe_p2(const Device& device);
void probe_p3(const Device& device);
void probe_p4(const Device& device);
void probe_p5(const Device& device);
void probe_p6(const Device& device);
void probe_p7(const Device& device);

}  // namespace probes
