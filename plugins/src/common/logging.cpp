#include "common/logging.hpp"

#include "common/host_version.hpp"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace fna
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

} // namespace

void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder.store(hostMatchesHeaders() ? finder : nullptr);
}

void log(nvinfer1::ILogger::Severity severity, char const* message) noexcept
{
    try
    {
        nvinfer1::ILoggerFinder* const finder = gFinder.load();
        nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger != nullptr)
        {
            logger->log(severity, message);
            return;
        }
    }
    catch (...)
    {
    }
    static bool const verbose = std::getenv("FNA_PLUGIN_VERBOSE") != nullptr;
    if (verbose || severity <= nvinfer1::ILogger::Severity::kWARNING)
    {
        std::fprintf(stderr, "%s\n", message);
    }
}

} // namespace fna
