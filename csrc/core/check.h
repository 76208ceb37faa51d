// Caller's mistakes become std::invalid_argument, which pybind11 turns into ValueError.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace specrt {

template <typename... Args>
[[noreturn]] inline void fail(const Args&... args) {
    std::ostringstream text;
    (text << ... << args);
    throw std::invalid_argument(text.str());
}

}  // namespace specrt

// SPECRT_CHECK(rows > 0, "x: expected at least one row, got ", rows)
#define SPECRT_CHECK(condition, ...)                   \
    do {                                               \
        if (!(condition)) ::specrt::fail(__VA_ARGS__); \
    } while (false)
