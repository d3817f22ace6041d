// What ends the program with a line on stderr and an exit code.
#pragma once

#include <stdexcept>
#include <string>

namespace runner
{

constexpr int kDone = 0;
constexpr int kCheckFailed = 1;
constexpr int kBadInput = 2;
constexpr int kMissing = 3;

struct Error : std::runtime_error
{
    Error(int exitCode, std::string const& message)
        : std::runtime_error(message)
        , code(exitCode)
    {
    }
    int code;
};

} // namespace runner
