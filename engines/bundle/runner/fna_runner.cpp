// Runs a TensorRT engine on recorded inputs, compares its outputs with recorded ones, and times it. Needs TensorRT and the CUDA
// driver, nothing else: no Python, no network. Arrays are .npy (fp32 or fp16) or raw fp32, items along the first dimension.
//
//   g++ -std=c++17 -O2 -I<TensorRT's headers> -I<CUDA's headers> fna_runner.cpp -o fna_runner -lnvinfer -ldl   (-ltensorrt_rtx for RTX)
//
// Exit codes: 0 done; 1 ran, but an output is out of tolerance or a plugin layer is missing; 2 bad arguments or files; 3 this machine
// lacks a GPU, a driver, or the TensorRT that the engine needs.
#include "report.hpp"

#include <algorithm>
#include <cstdio>
#include <dlfcn.h>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace runner
{

int compareFiles(Options const& options)
{
    std::map<std::string, Array> outputs;
    for (auto const& [name, path] : options.compare)
    {
        outputs[name] = readNpy(path);
    }
    Report report;
    compareOutputs(report, options, outputs);
    return finish(report, options, nullptr, nullptr);
}

int checkPlugin(Options const& options)
{
    // Opened first by itself: the dynamic linker says what is missing, TensorRT only that something is.
    std::string const path = options.checkPlugin.find('/') == std::string::npos ? "./" + options.checkPlugin : options.checkPlugin;
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        throw Error(kMissing, std::string("the plugin library does not load: ") + dlerror());
    }
    dlclose(library);
    requireTensorrtOfHeaders();
    if (getPluginRegistry() == nullptr || getPluginRegistry()->loadLibrary(path.c_str()) == nullptr)
    {
        throw Error(kMissing, path + " does not load into TensorRT " + tensorrtVersion());
    }
    std::printf("%s loads into TensorRT %s\n", path.c_str(), tensorrtVersion().c_str());
    return kDone;
}

std::map<std::string, Array> readInputs(Options const& options, Engine const& engine)
{
    std::vector<std::string> const names = engine.names(true);
    std::map<std::string, Array> inputs;
    for (auto const& [label, path] : options.inputs)
    {
        std::string const name = label.empty() && names.size() == 1 ? names.front() : label;
        if (std::find(names.begin(), names.end(), name) == names.end())
        {
            throw Error(kBadInput, "the engine has no input '" + name + "'; its first is '" + names.front() + "'");
        }
        inputs[name] = readArray(path);
        engine.shapeRaw(name, inputs[name]);
    }
    for (std::string const& name : names)
    {
        if (inputs.count(name) == 0)
        {
            throw Error(kBadInput, "input " + name + " is missing; give --input " + name + "=FILE");
        }
        if (inputs[name].shape.front() != inputs.begin()->second.shape.front())
        {
            throw Error(kBadInput, "input " + name + " has another number of items than " + inputs.begin()->first);
        }
    }
    return inputs;
}

int runEngine(Options const& options)
{
    if (!std::ifstream(options.engine))
    {
        throw Error(kBadInput, options.engine + " cannot be read; build it with build_engine.sh");
    }
    Driver driver;
    Engine engine(options, driver);
    std::printf("device: %s, compute capability %s, driver for CUDA %s; TensorRT %s\n", driver.deviceName.c_str(),
        driver.capability.c_str(), driver.cudaVersion.c_str(), tensorrtVersion().c_str());
    std::printf("engine: %s, %.1f MB; device memory once loaded: %.1f MB\n", options.engine.c_str(),
        static_cast<double>(engine.bytes) / 1e6, static_cast<double>(engine.deviceMemory) / 1e6);
    Report report;
    if (!options.pluginLayers.empty())
    {
        report.layers = readWantedLayers(options.pluginLayers);
        engine.findLayers(report.layers);
        report.failures = judgeLayers(report.layers);
        printLayers(report);
    }
    std::map<std::string, Array> const inputs = readInputs(options, engine);
    auto const& [input, first] = *inputs.begin();
    int64_t const batch = engine.chooseBatch(input, options.batch, first.shape.front());
    std::map<std::string, Array> const outputs = engine.runAll(inputs, batch);
    compareOutputs(report, options, outputs);
    for (auto const& [name, array] : outputs)
    {
        if (!options.output.empty())
        {
            std::string file = name;
            std::replace(file.begin(), file.end(), '/', '_');
            writeNpy(options.output + "/" + file + ".npy", array);
        }
    }
    if (options.runs > 0)
    {
        report.timed = true;
        report.timing = engine.time(inputs, options, engine.chooseBatch(input, options.batch, std::numeric_limits<int64_t>::max()));
        Timing const& timing = report.timing;
        std::printf("latency: batch %lld, median %.3f ms, p99 %.3f ms; %.1f items/s (%lld runs on each of %lld streams%s)\n",
            static_cast<long long>(timing.batch), timing.median, timing.p99, timing.perSecond, static_cast<long long>(timing.runs),
            static_cast<long long>(timing.streams), timing.graph ? ", CUDA graph" : "");
    }
    report.kernels = countKernels(options.plugin);
    printKernels(report.kernels);
    return finish(report, options, &driver, &engine);
}

} // namespace runner

int main(int argc, char** argv)
{
    using namespace runner;
    std::vector<std::string> const arguments(argv + 1, argv + argc);
    if (arguments.empty() || arguments.front() == "--help" || arguments.front() == "-h")
    {
        std::printf("%s", kUsage);
        return arguments.empty() ? kBadInput : kDone;
    }
    try
    {
        Options const options = parse(arguments);
        if (!options.compare.empty())
        {
            return compareFiles(options);
        }
        return options.checkPlugin.empty() ? runEngine(options) : checkPlugin(options);
    }
    catch (Error const& error)
    {
        std::fprintf(stderr, "fna_runner: %s\n", error.what());
        return error.code;
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "fna_runner: %s\n", error.what());
        return kBadInput;
    }
}
