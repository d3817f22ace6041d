// Messages through TensorRT's logger, which the host hands over with setLoggerFinder; to stderr while there is none.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <sstream>
#include <string>

namespace fna
{

void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void log(nvinfer1::ILogger::Severity severity, char const* message) noexcept;

// logError("head size D is ", d, ", but ..."): one line, prefixed with the library's name.
template <typename... Parts>
void logError(Parts const&... parts) noexcept
{
    try
    {
        std::ostringstream text;
        text << "fna: ";
        (text << ... << parts);
        log(nvinfer1::ILogger::Severity::kERROR, text.str().c_str());
    }
    catch (...)
    {
        log(nvinfer1::ILogger::Severity::kERROR, "fna: an error could not be reported for want of memory");
    }
}

// Run `body`, and turn anything it throws into a logged error and `failure`: nothing may leave a noexcept function.
template <typename Result, typename Body>
Result guarded(char const* where, Result failure, Body&& body) noexcept
{
    try
    {
        return body();
    }
    catch (std::exception const& error)
    {
        logError(where, ": ", error.what());
    }
    catch (...)
    {
        logError(where, ": unknown exception");
    }
    return failure;
}

} // namespace fna
