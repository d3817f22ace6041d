// Messages through TensorRT's logger, which the host hands over with setLoggerFinder; while there is none, or one of
// another major version of TensorRT, warnings and errors go to stderr (with FNA_PLUGIN_VERBOSE set, everything).
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <sstream>
#include <string>

namespace fna
{

void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void log(nvinfer1::ILogger::Severity severity, char const* message) noexcept;

template <typename... Parts>
void logAt(nvinfer1::ILogger::Severity severity, Parts const&... parts) noexcept
{
    try
    {
        std::ostringstream text;
        text << "fna: ";
        (text << ... << parts);
        log(severity, text.str().c_str());
    }
    catch (...)
    {
        log(severity, "fna: a message could not be written for want of memory");
    }
}

// logError("head size D is ", d, ", but ..."): one line, prefixed with the library's name.
template <typename... Parts>
void logError(Parts const&... parts) noexcept
{
    logAt(nvinfer1::ILogger::Severity::kERROR, parts...);
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
