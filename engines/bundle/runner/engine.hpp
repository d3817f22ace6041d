// A TensorRT engine: loaded, run on items, and timed.
#pragma once

#include "arrays.hpp"
#include "cuda_driver.hpp"
#include "options.hpp"
#include "plugin_layers.hpp"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace runner
{

using nvinfer1::Dims;

// Prints warnings and errors, and keeps the last error for the one-line message.
class Logger : public nvinfer1::ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        if (severity <= Severity::kWARNING)
        {
            std::fprintf(stderr, "tensorrt: %s\n", message);
        }
        if (severity <= Severity::kERROR)
        {
            std::snprintf(mLast, sizeof mLast, "%s", message);
        }
    }

    std::string last() const
    {
        return mLast[0] == '\0' ? "no reason given" : mLast;
    }

private:
    char mLast[512]{};
};

inline std::vector<int64_t> sides(Dims const& dims)
{
    return {dims.d, dims.d + std::max<int32_t>(dims.nbDims, 0)};
}

inline Dims dimsOf(std::vector<int64_t> const& shape)
{
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

// What is copied from the recorded items into a batch: items wrap around, so that any batch can be filled.
inline std::vector<float> takeItems(Array const& array, int64_t first, int64_t count)
{
    int64_t const items = array.shape.front();
    int64_t const size = items == 0 ? 0 : static_cast<int64_t>(array.values.size()) / items;
    std::vector<float> batch;
    batch.reserve(static_cast<size_t>(count * size));
    for (int64_t i = 0; i < count; ++i)
    {
        auto const start = array.values.begin() + (first + i) % items * size;
        batch.insert(batch.end(), start, start + size);
    }
    return batch;
}

struct Buffer
{
    std::string name;
    DataType type{DataType::kFLOAT};
    bool isInput{false};
    std::vector<int64_t> shape;
    Pointer pointer{0};
    std::vector<char> host;
};

// What runs at the same time as others: a context, its tensors, and a stream.
struct Lane
{
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    std::vector<Buffer> buffers;
    Handle stream{nullptr};
};

struct Timing
{
    int64_t batch{0};
    int64_t runs{0};
    int64_t streams{1};
    bool graph{false};
    double median{0};
    double p99{0};
    double perSecond{0};
};

inline std::string tensorrtVersion()
{
    int32_t const version = getInferLibVersion();
    int32_t const scale = version >= 10000 ? 10000 : 1000; // 10.x counts 10000 a major version, 8.x and TensorRT-RTX 1000
    return std::to_string(version / scale) + "." + std::to_string(version % scale / 100) + "." + std::to_string(version % 100);
}

// The classes of another major version have their functions elsewhere: calling them would crash.
inline void requireTensorrtOfHeaders()
{
    if (tensorrtVersion().compare(0, tensorrtVersion().find('.'), std::to_string(NV_TENSORRT_MAJOR)) != 0)
    {
        throw Error(kMissing,
            "fna_runner was compiled with the headers of TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + "."
                + std::to_string(NV_TENSORRT_MINOR) + ", but this machine has " + tensorrtVersion() + "; compile it on this device");
    }
}

class Engine
{
public:
    Engine(Options const& options, Driver& driver)
        : mDriver(driver)
    {
        requireTensorrtOfHeaders();
        std::vector<char> const plan = readFile(options.engine);
        bytes = plan.size();
        size_t const before = driver.freeMemory();
        mRuntime.reset(nvinfer1::createInferRuntime(mLogger));
        if (!mRuntime)
        {
            throw Error(kMissing, "TensorRT does not start: " + mLogger.last());
        }
        if (!options.plugin.empty() && mRuntime->getPluginRegistry().loadLibrary(options.plugin.c_str()) == nullptr)
        {
            throw Error(kMissing, options.plugin + " does not load: " + mLogger.last() + "; compile it on this device");
        }
        mRuntime->setEngineHostCodeAllowed(options.allowHostCode);
        mEngine.reset(mRuntime->deserializeCudaEngine(plan.data(), plan.size()));
        if (!mEngine)
        {
            throw Error(kMissing,
                options.engine + " cannot be loaded here (" + mLogger.last()
                    + "); engines run on the TensorRT version and GPU that built them: build it again on this device");
        }
        mLanes.push_back(makeLane());
        size_t const after = driver.freeMemory();
        deviceMemory = before > after ? before - after : 0;
    }

    ~Engine()
    {
        for (Lane const& lane : mLanes)
        {
            for (Buffer const& buffer : lane.buffers)
            {
                mDriver.release(buffer.pointer);
            }
        }
    }

    Engine(Engine const&) = delete;
    Engine& operator=(Engine const&) = delete;

    std::vector<std::string> names(bool inputs) const
    {
        std::vector<std::string> matching;
        for (Buffer const& buffer : mLanes.front().buffers)
        {
            if (buffer.isInput == inputs)
            {
                matching.push_back(buffer.name);
            }
        }
        return matching;
    }

    // Gives a raw file the shape that the engine's input has.
    void shapeRaw(std::string const& name, Array& array) const
    {
        std::vector<int64_t> itemShape = sides(mEngine->getProfileShape(name.c_str(), 0, nvinfer1::OptProfileSelector::kOPT));
        itemShape.front() = 1;
        int64_t const size = product(itemShape);
        if (array.shape.empty())
        {
            int64_t const count = static_cast<int64_t>(array.values.size());
            if (size == 0 || count % size != 0)
            {
                throw Error(kBadInput,
                    "input " + name + " was given " + std::to_string(count) + " numbers, which is no multiple of the "
                        + std::to_string(size) + " that one item has");
            }
            itemShape.front() = count / size;
            array.shape = itemShape;
        }
        if (array.shape.size() != itemShape.size() || array.shape.front() < 1)
        {
            throw Error(kBadInput, "input " + name + " has shape " + shapeText(array.shape) + ", but the engine wants "
                    + std::to_string(itemShape.size()) + " dimensions and at least one item");
        }
    }

    // The batch for `items`: as asked, else the usual one, but no more than there are items, within what the engine takes.
    int64_t chooseBatch(std::string const& input, int64_t asked, int64_t items) const
    {
        auto const side = [&](nvinfer1::OptProfileSelector which) { return mEngine->getProfileShape(input.c_str(), 0, which).d[0]; };
        int64_t const smallest = side(nvinfer1::OptProfileSelector::kMIN);
        int64_t const largest = side(nvinfer1::OptProfileSelector::kMAX);
        if (asked != 0 && (asked < smallest || asked > largest))
        {
            throw Error(kBadInput,
                "--batch " + std::to_string(asked) + " was asked for, but the engine takes " + std::to_string(smallest) + " to "
                    + std::to_string(largest));
        }
        int64_t const usual = side(nvinfer1::OptProfileSelector::kOPT);
        return asked != 0 ? asked : std::max(smallest, std::min(usual, items));
    }

    // Binds inputs and buffers for a batch.
    void prepare(Lane& lane, std::map<std::string, Array> const& inputs, int64_t batch)
    {
        for (Buffer& buffer : lane.buffers)
        {
            if (buffer.isInput)
            {
                buffer.shape = inputs.at(buffer.name).shape;
                buffer.shape.front() = batch;
                if (!lane.context->setInputShape(buffer.name.c_str(), dimsOf(buffer.shape)))
                {
                    throw Error(kBadInput, "the engine does not take input " + buffer.name + " of shape " + shapeText(buffer.shape));
                }
            }
        }
        for (Buffer& buffer : lane.buffers)
        {
            if (!buffer.isInput)
            {
                buffer.shape = sides(lane.context->getTensorShape(buffer.name.c_str()));
            }
            buffer.host.assign(static_cast<size_t>(product(buffer.shape) * elementBytes(buffer.type)), '\0');
            mDriver.release(buffer.pointer);
            buffer.pointer = mDriver.allocate(buffer.host.size());
            if (!lane.context->setTensorAddress(buffer.name.c_str(), reinterpret_cast<void*>(buffer.pointer)))
            {
                throw Error(kBadInput, "TensorRT refuses the buffer of " + buffer.name + ": " + mLogger.last());
            }
        }
    }

    void fill(Lane& lane, std::map<std::string, Array> const& inputs, int64_t first)
    {
        for (Buffer& buffer : lane.buffers)
        {
            if (buffer.isInput)
            {
                std::vector<float> const batch = takeItems(inputs.at(buffer.name), first, buffer.shape.front());
                mDriver.toDevice(buffer.pointer, encode(batch, buffer.type), lane.stream);
            }
        }
    }

    static bool enqueue(Lane& lane)
    {
        return lane.context->enqueueV3(static_cast<cudaStream_t>(lane.stream));
    }

    void run(Lane& lane)
    {
        launch(lane, nullptr);
        mDriver.synchronize(lane.stream);
    }

    // Runs all items, a batch at a time, and returns the outputs of all.
    std::map<std::string, Array> runAll(std::map<std::string, Array> const& inputs, int64_t batch)
    {
        int64_t const items = inputs.begin()->second.shape.front();
        Lane& lane = mLanes.front();
        prepare(lane, inputs, batch);
        std::map<std::string, Array> outputs;
        for (int64_t first = 0; first < items; first += batch)
        {
            fill(lane, inputs, first);
            run(lane);
            int64_t const used = std::min(batch, items - first);
            for (Buffer& buffer : lane.buffers)
            {
                if (buffer.isInput)
                {
                    continue;
                }
                mDriver.toHost(buffer.host, buffer.pointer, lane.stream);
                std::vector<float> const values = decode(buffer.host, buffer.type);
                Array& all = outputs[buffer.name];
                all.shape = buffer.shape;
                all.shape.front() = items;
                auto const end = values.begin() + static_cast<int64_t>(values.size()) / batch * used;
                all.values.insert(all.values.end(), values.begin(), end);
            }
        }
        return outputs;
    }

    // Times runs on `options.streams` streams at once: latency is that of a run among the others, the rate is of all of them.
    Timing time(std::map<std::string, Array> const& inputs, Options const& options, int64_t batch)
    {
        while (static_cast<int64_t>(mLanes.size()) < options.streams)
        {
            mLanes.push_back(makeLane());
        }
        std::vector<Handle> graphs;
        for (Lane& lane : mLanes)
        {
            prepare(lane, inputs, batch);
            fill(lane, inputs, 0);
            run(lane);
            graphs.push_back(options.graph ? mDriver.capture(lane.stream, [&] { return enqueue(lane); }) : nullptr);
        }
        if (options.graph && graphs.front() == nullptr)
        {
            std::fprintf(stderr, "fna_runner: this engine cannot be captured as a CUDA graph; timing single launches\n");
        }
        auto const everyLane = [&](auto&& act)
        {
            for (size_t i = 0; i < mLanes.size(); ++i)
            {
                act(mLanes[i], graphs[i]);
            }
        };
        auto const wait = [&] { everyLane([&](Lane& lane, Handle) { mDriver.synchronize(lane.stream); }); };
        for (int64_t i = 0; i < options.warmUp; ++i)
        {
            everyLane([&](Lane& lane, Handle graph) { launch(lane, graph); });
        }
        wait();
        std::vector<std::pair<Handle, Handle>> events;
        for (int64_t i = 0; i < options.runs * options.streams; ++i)
        {
            events.emplace_back(mDriver.event(), mDriver.event());
        }
        auto const start = std::chrono::steady_clock::now();
        for (size_t next = 0; next < events.size();)
        {
            everyLane([&](Lane& lane, Handle graph)
                {
                    mDriver.record(events[next].first, lane.stream);
                    launch(lane, graph);
                    mDriver.record(events[next++].second, lane.stream);
                });
        }
        wait();
        std::chrono::duration<double> const elapsed = std::chrono::steady_clock::now() - start;
        return summarise(events, options, batch, graphs.front() != nullptr, elapsed.count());
    }

    // Gives the context the usual shapes first: without them the inspector reports no types of layers whose size is open.
    void findLayers(std::vector<Layer>& layers)
    {
        for (std::string const& name : names(true))
        {
            mLanes.front().context->setInputShape(name.c_str(), mEngine->getProfileShape(name.c_str(), 0, nvinfer1::OptProfileSelector::kOPT));
        }
        std::unique_ptr<nvinfer1::IEngineInspector> const inspector(mEngine->createEngineInspector());
        if (inspector)
        {
            inspector->setExecutionContext(mLanes.front().context.get());
        }
        for (int32_t i = 0; inspector && i < mEngine->getNbLayers(); ++i)
        {
            char const* const text = inspector->getLayerInformation(i, nvinfer1::LayerInformationFormat::kJSON);
            for (Layer& layer : layers)
            {
                findLayer(layer, text == nullptr ? "" : text);
            }
        }
    }

    size_t bytes{0};
    size_t deviceMemory{0};

private:
    Lane makeLane()
    {
        Lane lane;
        lane.context.reset(mEngine->createExecutionContext());
        if (!lane.context)
        {
            throw Error(kMissing, "the engine has no room to run: " + mLogger.last());
        }
        lane.stream = mDriver.stream();
        for (int32_t i = 0; i < mEngine->getNbIOTensors(); ++i)
        {
            Buffer buffer;
            buffer.name = mEngine->getIOTensorName(i);
            buffer.type = mEngine->getTensorDataType(buffer.name.c_str());
            buffer.isInput = mEngine->getTensorIOMode(buffer.name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
            lane.buffers.push_back(buffer);
        }
        return lane;
    }

    void launch(Lane& lane, Handle graph)
    {
        if (graph != nullptr)
        {
            mDriver.launchGraph(graph, lane.stream);
        }
        else if (!enqueue(lane))
        {
            throw Error(kCheckFailed, "the engine failed to run: " + mLogger.last());
        }
    }

    Timing summarise(std::vector<std::pair<Handle, Handle>> const& events, Options const& options, int64_t batch, bool graph, double seconds)
    {
        std::vector<double> times;
        for (auto const& [before, after] : events)
        {
            times.push_back(mDriver.milliseconds(before, after));
        }
        std::sort(times.begin(), times.end());
        size_t const count = times.size();
        Timing timing;
        timing.batch = batch;
        timing.runs = options.runs;
        timing.streams = options.streams;
        timing.graph = graph;
        timing.median = count % 2 == 1 ? times[count / 2] : (times[count / 2 - 1] + times[count / 2]) / 2;
        timing.p99 = times[(count * 99 + 99) / 100 - 1];
        timing.perSecond = static_cast<double>(batch * static_cast<int64_t>(count)) / seconds;
        return timing;
    }

    Driver& mDriver;
    Logger mLogger;
    std::unique_ptr<nvinfer1::IRuntime> mRuntime;
    std::unique_ptr<nvinfer1::ICudaEngine> mEngine;
    std::vector<Lane> mLanes; // the first is the one that outputs are taken from
};

} // namespace runner
