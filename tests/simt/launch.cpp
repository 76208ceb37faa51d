#include "launch.h"

#include <cfenv>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "fault.h"
#include "graph.h"
#include "scheduler.h"

namespace simt {
namespace {

// The machine: its settings, and memory that launches use again.
struct Machine {
    std::mutex turn;
    Settings settings;
    uint64_t num_launches = 0, num_overlapping = 0;
    std::string last_kernel;
    int last_device = 0;
    StackPool stacks;
    std::vector<std::unique_ptr<SharedArena>> arenas;
};

Machine& machine() {
    static Machine the_machine;
    return the_machine;
}

// A device that is broken answers nothing; a stream is of one device, and only there.
void check_device(const std::string& name, Machine& m, void* stream) {
    const auto require = [&](bool holds, const std::string& text) {
        if (!holds) throw std::runtime_error("kernel " + name + ": " + text);
    };
    require(is_stream_of(stream, m.last_device), "launched on another device's stream while " +
                                                     std::to_string(m.last_device) + " is current");
    require(m.settings.num_good > 0, m.settings.fault);
    --m.settings.num_good;
}

void check_limits(const std::string& name, const dim3& grid, const dim3& block,
                  size_t shared_bytes) {
    const auto require = [&](bool holds, const std::string& text) {
        if (!holds) throw std::runtime_error("kernel " + name + ": " + text);
    };
    const auto sizes = [](const dim3& d) {
        return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
    };
    require(uint64_t{grid.x} * grid.y * grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                grid.z <= 65535,
            "a grid of " + sizes(grid) + " blocks, must be 1 to 2^31 - 1, 65535 and 65535");
    require(block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                uint64_t{block.x} * block.y * block.z - 1 < 1024,
            "a block of " + sizes(block) + " threads, must be 1 to 1024 in all, at most 64 in z");
    const size_t most = max_shared_bytes();
    require(shared_bytes <= most, "a block of " + std::to_string(shared_bytes) +
                                      " bytes of shared memory, may have " + std::to_string(most));
}

// What the fibers of a launch see is undone at its end, however it ends.
class Session {
  public:
    explicit Session(Scheduler& current) {
        scheduler = &current;
        std::fegetenv(&environment_);
    }
    ~Session() {
        running = Running{};
        scheduler = nullptr;
        // A fiber left by a signal leaves the signal handler's rounding modes behind.
        std::fesetenv(&environment_);
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

  private:
    std::fenv_t environment_;
    FaultGuard guard_;
};

}  // namespace

Settings settings() {
    return machine().settings;
}

void set_settings(const Settings& settings) {
    std::lock_guard<std::mutex> lock(machine().turn);
    machine().settings = settings;
}

uint64_t num_launches() {
    return machine().num_launches;
}

uint64_t num_overlapping() {
    return machine().num_overlapping;
}

std::string last_kernel() {
    return machine().last_kernel;
}

int last_device() {
    return machine().last_device;
}

void launch(const char* name, const dim3& grid, const dim3& block, size_t shared_bytes,
            bool overlaps, void* stream, std::function<void()> body) {
    if (is_captured(stream, {name, grid, block, shared_bytes, overlaps, body})) return;
    Machine& m = machine();
    std::lock_guard<std::mutex> lock(m.turn);
    m.last_kernel = name;
    (void)cudaGetDevice(&m.last_device);
    check_device(name, m, stream);
    check_limits(name, grid, block, shared_bytes);
    Scheduler current({name, grid, block, shared_bytes, overlaps, &body}, m.settings, m.stacks,
                      m.arenas);
    const Session session(current);
    current.run();
    ++m.num_launches;
    m.num_overlapping += overlaps;
}

}  // namespace simt
