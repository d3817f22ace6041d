// What is printed, and written as JSON.
#pragma once

#include "difference.hpp"
#include "engine.hpp"

#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace runner
{

struct Report
{
    std::vector<std::pair<std::string, Difference>> differences;
    std::vector<Layer> layers;
    std::vector<std::string> failures;
    KernelCounts kernels;
    bool timed{false};
    Timing timing;
};

inline std::string jsonText(std::string const& text)
{
    std::string quoted = "\"";
    for (char const letter : text)
    {
        if (letter == '"' || letter == '\\')
        {
            quoted += '\\';
        }
        quoted += static_cast<unsigned char>(letter) < 0x20 ? ' ' : letter;
    }
    return quoted + '"';
}

inline std::string jsonNumber(double value)
{
    return std::isfinite(value) ? number("%.9g", value) : "null";
}

inline std::string toJson(Report const& report, Options const& options, Driver const* driver, Engine const* engine)
{
    std::string json = "{";
    if (driver != nullptr && engine != nullptr)
    {
        json += "\"device\": " + jsonText(driver->deviceName) + ", \"compute_capability\": " + jsonText(driver->capability)
            + ", \"cuda_driver\": " + jsonText(driver->cudaVersion) + ", \"tensorrt\": " + jsonText(tensorrtVersion())
            + ", \"engine\": " + jsonText(options.engine) + ", \"engine_bytes\": " + std::to_string(engine->bytes)
            + ", \"device_memory_bytes\": " + std::to_string(engine->deviceMemory) + ", ";
    }
    json += "\"relative_l2_tolerance\": " + jsonNumber(options.relativeL2) + ", \"cosine_tolerance\": " + jsonNumber(options.cosine)
        + ", \"outputs\": {";
    for (size_t i = 0; i < report.differences.size(); ++i)
    {
        auto const& [name, difference] = report.differences[i];
        json += (i == 0 ? "" : ", ") + jsonText(name) + ": {\"cosine\": " + jsonNumber(difference.cosine) + ", \"max_abs\": " + jsonNumber(difference.maxAbs)
            + ", \"not_finite\": " + std::to_string(difference.notFinite);
        for (Measure const& each : kMeasures)
        {
            json += ", " + jsonText(each.name) + ": " + jsonNumber(difference.*each.value);
        }
        json += "}";
    }
    json += "}, \"plugin_layers\": {";
    for (size_t i = 0; i < report.layers.size(); ++i)
    {
        Layer const& layer = report.layers[i];
        json += (i == 0 ? "" : ", ") + jsonText(layer.name) + ": " + (layer.isPlugin ? jsonText(layer.typeText()) : "null");
    }
    json += "}";
    if (report.kernels.known)
    {
        json += ", \"kernels\": {\"compiled\": " + std::to_string(report.kernels.compiled)
            + ", \"from_ptx\": " + std::to_string(report.kernels.fromPtx) + "}";
    }
    if (report.timed)
    {
        Timing const& timing = report.timing;
        json += ", \"batch\": " + std::to_string(timing.batch) + ", \"runs\": " + std::to_string(timing.runs)
            + ", \"streams\": " + std::to_string(timing.streams) + ", \"cuda_graph\": " + (timing.graph ? "true" : "false") + ", \"median_ms\": " + jsonNumber(timing.median)
            + ", \"p99_ms\": " + jsonNumber(timing.p99) + ", \"items_per_second\": " + jsonNumber(timing.perSecond);
    }
    json += ", \"failures\": [";
    for (size_t i = 0; i < report.failures.size(); ++i)
    {
        json += (i == 0 ? "" : ", ") + jsonText(report.failures[i]);
    }
    return json + "]}\n";
}

inline void printLayers(Report const& report)
{
    if (report.layers.empty())
    {
        return;
    }
    std::map<std::string, int> types;
    int plugins = 0;
    for (Layer const& layer : report.layers)
    {
        plugins += layer.isPlugin ? 1 : 0;
        if (layer.isPlugin)
        {
            ++types[layer.typeText()];
        }
    }
    std::printf("plugin layers: %d of %zu", plugins, report.layers.size());
    for (auto const& [type, count] : types)
    {
        std::printf("; %d in %s", count, type.c_str());
    }
    std::printf("\n");
}

inline void printKernels(KernelCounts const& kernels)
{
    if (kernels.known)
    {
        std::printf("kernels: %d compiled for this chip, %d by the driver from PTX%s\n", kernels.compiled, kernels.fromPtx,
            kernels.fromPtx > 0 ? ": make the bundle again for this chip, or update the driver" : "");
    }
}

inline void compareOutputs(Report& report, Options const& options, std::map<std::string, Array> const& outputs)
{
    for (auto const& [label, path] : options.expected)
    {
        std::string const name = label.empty() && outputs.size() == 1 ? outputs.begin()->first : label;
        auto const output = outputs.find(name);
        if (output == outputs.end())
        {
            throw Error(kBadInput, "output " + name + " is expected, but there is none of that name");
        }
        Difference const difference = measure(name, readNpy(path), output->second);
        std::string const failure = verdict(name, difference, options.relativeL2, options.cosine, options.tasks);
        if (report.differences.empty())
        {
            std::printf("%-24s %10s %10s %10s\n", "output", "rel L2", "cosine", "max abs");
        }
        std::printf("%-24s %10.2e %10.6f %10.2e  %s\n", name.c_str(), difference.relativeL2, difference.cosine, difference.maxAbs,
            failure.empty() ? "ok" : "FAILED");
        for (TaskTolerance const& task : options.tasks)
        {
            if (task.output == name)
            {
                std::printf("  %s %.6g (%s %g)\n", task.measure->title, difference.*task.measure->value,
                    task.measure->largest ? "at most" : "at least", task.limit);
            }
        }
        report.differences.emplace_back(name, difference);
        if (!failure.empty())
        {
            report.failures.push_back(failure);
        }
    }
}

inline int finish(Report const& report, Options const& options, Driver const* driver, Engine const* engine)
{
    if (!options.json.empty())
    {
        writeFile(options.json, toJson(report, options, driver, engine));
    }
    for (std::string const& failure : report.failures)
    {
        std::fprintf(stderr, "fna_runner: %s\n", failure.c_str());
    }
    return report.failures.empty() ? kDone : kCheckFailed;
}

} // namespace runner
