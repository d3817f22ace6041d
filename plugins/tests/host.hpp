// A small stand-in for TensorRT: it opens the plugin library and makes the calls that TensorRT makes, in its order.
// The functions in extern "C" are for Python (ctypes); the rest is for the test programs.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace host
{

// A tensor as Python passes it: TensorRT's DataType as a number, and sizes.
struct Tensor
{
    int32_t type;
    int32_t rank;
    int64_t dims[8];
    void* data;
};

class Logger final : public nvinfer1::ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override;
    std::string take();

private:
    std::string mMessages;
};

class Finder final : public nvinfer1::ILoggerFinder
{
public:
    explicit Finder(Logger& logger)
        : mLogger(logger)
    {
    }
    nvinfer1::ILogger* findLogger() override
    {
        return &mLogger;
    }

private:
    Logger& mLogger;
};

// An opened library. Plugins must not outlive it.
class Library
{
public:
    explicit Library(char const* path); // throws std::runtime_error
    ~Library();
    Library(Library const&) = delete;
    Library& operator=(Library const&) = delete;

    nvinfer1::IPluginCreatorV3One* creator(char const* name, char const* version = "1") const; // nullptr when there is none
    int32_t count() const;
    Logger& logger();
    void* find(char const* exported) const; // nullptr when there is none

private:
    void* mHandle{nullptr};
    std::unique_ptr<Logger> mLogger;
    std::unique_ptr<Finder> mFinder;
    std::vector<nvinfer1::IPluginCreatorInterface*> mCreators;
};

using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

template <typename Capability>
Capability* capability(nvinfer1::IPluginV3& plugin, nvinfer1::PluginCapabilityType type)
{
    return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

nvinfer1::IPluginV3OneCore* core(nvinfer1::IPluginV3& plugin);
nvinfer1::IPluginV3OneBuild* build(nvinfer1::IPluginV3& plugin);
nvinfer1::IPluginV3OneRuntime* runtime(nvinfer1::IPluginV3& plugin);

nvinfer1::DynamicPluginTensorDesc describe(Tensor const& tensor);

// Create, clone, serialize, create again at run time and attach to a context: what stands between fields and an execution.
PluginPointer deploy(
    Library& library, char const* name, std::vector<nvinfer1::PluginField> const& fields, char const* version = "1");

} // namespace host

extern "C"
{
    host::Library* fna_host_open(char const* path);
    char const* fna_host_messages(host::Library* library);
    nvinfer1::IPluginV3* fna_host_attention(host::Library* library, float scale, int32_t iterations, int32_t exactRows);
    nvinfer1::IPluginV3* fna_host_chebyshev_attention(
        host::Library* library, float scale, int32_t exactRows, int32_t sink, int32_t steps, float low);
    nvinfer1::IPluginV3* fna_host_masked_attention(
        host::Library* library, float scale, int32_t iterations, int32_t exactRows, int32_t sink);
    nvinfer1::IPluginV3* fna_host_focal(
        host::Library* library, float scale, int32_t prefixTokens, int32_t hot, int32_t masked);
    nvinfer1::IPluginV3* fna_host_sampling(host::Library* library, int32_t numLandmarks);
    void fna_host_free(nvinfer1::IPluginV3* plugin);
    size_t fna_host_workspace(nvinfer1::IPluginV3* plugin, host::Tensor const* inputs, int32_t count, host::Tensor const* output);
    int32_t fna_host_prepare(nvinfer1::IPluginV3* plugin, host::Tensor const* inputs, int32_t count, host::Tensor const* output);
    int32_t fna_host_enqueue(nvinfer1::IPluginV3* plugin, host::Tensor const* inputs, int32_t count, host::Tensor const* output,
        void* workspace, void* stream);
}
