#include "core/device.h"

#include <stdexcept>
#include <string>

namespace specrt {

Capturing& capturing() {
    static thread_local Capturing here;
    return here;
}

void check_part_of_capture(int device) {
    const int captured = capturing().device;
    if (captured == kCpu || captured == device) return;
    throw std::runtime_error("graph: " + name_of_device(captured) +
                             " is being captured, and a launch for " + name_of_device(device) +
                             " would be no part of it");
}

}  // namespace specrt
