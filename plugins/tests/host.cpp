#include "host.hpp"

#include <cstring>
#include <dlfcn.h>
#include <stdexcept>

using namespace nvinfer1;

namespace host
{
namespace
{

template <typename Function>
Function symbol(void* handle, char const* name)
{
    void* const address = dlsym(handle, name);
    if (address == nullptr)
    {
        throw std::runtime_error(std::string("the library does not export ") + name);
    }
    Function function = nullptr;
    std::memcpy(&function, &address, sizeof address);
    return function;
}

std::vector<PluginTensorDesc> fixed(Tensor const* tensors, int32_t count)
{
    std::vector<PluginTensorDesc> descriptions;
    for (int32_t i = 0; i < count; ++i)
    {
        descriptions.push_back(describe(tensors[i]).desc);
    }
    return descriptions;
}

} // namespace

void Logger::log(Severity severity, char const* message) noexcept
{
    if (severity > Severity::kWARNING)
    {
        return;
    }
    mMessages += message;
    mMessages += '\n';
}

std::string Logger::take()
{
    std::string taken;
    taken.swap(mMessages);
    return taken;
}

Library::Library(char const* path)
    : mLogger(std::make_unique<Logger>())
    , mFinder(std::make_unique<Finder>(*mLogger))
{
    mHandle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (mHandle == nullptr)
    {
        throw std::runtime_error(dlerror());
    }
    symbol<void (*)(ILoggerFinder*)>(mHandle, "setLoggerFinder")(mFinder.get());
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators
        = symbol<IPluginCreatorInterface* const* (*) (int32_t&)>(mHandle, "getCreators")(count);
    mCreators.assign(creators, creators + count);
}

Library::~Library()
{
    symbol<void (*)(ILoggerFinder*)>(mHandle, "setLoggerFinder")(nullptr);
    dlclose(mHandle);
}

IPluginCreatorV3One* Library::creator(char const* name, char const* version) const
{
    for (IPluginCreatorInterface* const each : mCreators)
    {
        if (std::strcmp(each->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0)
        {
            auto* const found = static_cast<IPluginCreatorV3One*>(each);
            if (std::strcmp(found->getPluginName(), name) == 0 && std::strcmp(found->getPluginVersion(), version) == 0)
            {
                return found;
            }
        }
    }
    return nullptr;
}

void* Library::find(char const* exported) const
{
    return dlsym(mHandle, exported);
}

int32_t Library::count() const
{
    return static_cast<int32_t>(mCreators.size());
}

Logger& Library::logger()
{
    return *mLogger;
}

IPluginV3OneCore* core(IPluginV3& plugin)
{
    return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
}

IPluginV3OneBuild* build(IPluginV3& plugin)
{
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime* runtime(IPluginV3& plugin)
{
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

DynamicPluginTensorDesc describe(Tensor const& tensor)
{
    DynamicPluginTensorDesc description{};
    description.desc.type = static_cast<DataType>(tensor.type);
    description.desc.format = TensorFormat::kLINEAR;
    description.desc.dims.nbDims = tensor.rank;
    for (int32_t axis = 0; axis < tensor.rank && axis < Dims::MAX_DIMS; ++axis)
    {
        description.desc.dims.d[axis] = tensor.dims[axis];
    }
    description.min = description.desc.dims;
    description.opt = description.desc.dims;
    description.max = description.desc.dims;
    return description;
}

PluginPointer deploy(Library& library, char const* name, std::vector<PluginField> const& fields, char const* version)
{
    IPluginCreatorV3One* const creator = library.creator(name, version);
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    PluginPointer const created(creator == nullptr ? nullptr : creator->createPlugin(name, &collection, TensorRTPhase::kBUILD));
    if (created == nullptr)
    {
        return nullptr;
    }
    PluginPointer const cloned(created->clone());
    PluginFieldCollection const* const serialized = runtime(*cloned)->getFieldsToSerialize();
    PluginPointer const again(creator->createPlugin(name, serialized, TensorRTPhase::kRUNTIME));
    return again == nullptr ? nullptr : PluginPointer(runtime(*again)->attachToContext(nullptr));
}

} // namespace host

extern "C"
{

    host::Library* fna_host_open(char const* path)
    {
        try
        {
            return new host::Library(path);
        }
        catch (std::exception const&)
        {
            return nullptr;
        }
    }

    char const* fna_host_messages(host::Library* library)
    {
        static thread_local std::string text;
        text = library->logger().take();
        return text.c_str();
    }

    IPluginV3* fna_host_attention(host::Library* library, float scale, int32_t iterations, int32_t exactRows)
    {
        std::vector<PluginField> const fields{{"scale", &scale, PluginFieldType::kFLOAT32, 1},
            {"iterations", &iterations, PluginFieldType::kINT32, 1}, {"exact_rows", &exactRows, PluginFieldType::kINT32, 1}};
        return host::deploy(*library, "FastNystromAttention", fields).release();
    }

    IPluginV3* fna_host_masked_attention(
        host::Library* library, float scale, int32_t iterations, int32_t exactRows, int32_t sink)
    {
        std::vector<PluginField> const fields{{"scale", &scale, PluginFieldType::kFLOAT32, 1},
            {"iterations", &iterations, PluginFieldType::kINT32, 1}, {"exact_rows", &exactRows, PluginFieldType::kINT32, 1},
            {"sink", &sink, PluginFieldType::kINT32, 1}};
        return host::deploy(*library, "FastNystromAttention", fields, "2").release();
    }

    IPluginV3* fna_host_chebyshev_attention(
        host::Library* library, float scale, int32_t exactRows, int32_t sink, int32_t steps, float low)
    {
        std::string const core = "chebyshev";
        std::vector<PluginField> const fields{{"scale", &scale, PluginFieldType::kFLOAT32, 1},
            {"exact_rows", &exactRows, PluginFieldType::kINT32, 1}, {"sink", &sink, PluginFieldType::kINT32, 1},
            {"core", core.data(), PluginFieldType::kCHAR, static_cast<int32_t>(core.size())},
            {"steps", &steps, PluginFieldType::kINT32, 1}, {"low", &low, PluginFieldType::kFLOAT32, 1}};
        return host::deploy(*library, "FastNystromAttention", fields, "3").release();
    }

    IPluginV3* fna_host_focal(
        host::Library* library, float scale, int32_t prefixTokens, int32_t hot, int32_t masked)
    {
        std::vector<PluginField> const fields{{"scale", &scale, PluginFieldType::kFLOAT32, 1},
            {"prefix_tokens", &prefixTokens, PluginFieldType::kINT32, 1}, {"hot", &hot, PluginFieldType::kINT32, 1}};
        return host::deploy(*library, "FocalAttention", fields, masked != 0 ? "2" : "1").release();
    }

    IPluginV3* fna_host_sampling(host::Library* library, int32_t numLandmarks)
    {
        std::vector<PluginField> const fields{{"num_landmarks", &numLandmarks, PluginFieldType::kINT32, 1}};
        return host::deploy(*library, "FarthestPointSampling", fields).release();
    }

    void fna_host_free(IPluginV3* plugin)
    {
        delete plugin;
    }

    size_t fna_host_workspace(IPluginV3* plugin, host::Tensor const* inputs, int32_t count, host::Tensor const* output)
    {
        std::vector<DynamicPluginTensorDesc> in;
        for (int32_t i = 0; i < count; ++i)
        {
            in.push_back(host::describe(inputs[i]));
        }
        DynamicPluginTensorDesc const out = host::describe(*output);
        return host::build(*plugin)->getWorkspaceSize(in.data(), count, &out, 1);
    }

    int32_t fna_host_prepare(IPluginV3* plugin, host::Tensor const* inputs, int32_t count, host::Tensor const* output)
    {
        std::vector<PluginTensorDesc> const in = host::fixed(inputs, count);
        PluginTensorDesc const out = host::describe(*output).desc;
        return host::runtime(*plugin)->onShapeChange(in.data(), count, &out, 1);
    }

    int32_t fna_host_enqueue(IPluginV3* plugin, host::Tensor const* inputs, int32_t count, host::Tensor const* output,
        void* workspace, void* stream)
    {
        std::vector<PluginTensorDesc> const in = host::fixed(inputs, count);
        PluginTensorDesc const out = host::describe(*output).desc;
        std::vector<void const*> addresses;
        for (int32_t i = 0; i < count; ++i)
        {
            addresses.push_back(inputs[i].data);
        }
        void* results[] = {output->data};
        return host::runtime(*plugin)->enqueue(
            in.data(), &out, addresses.data(), results, workspace, static_cast<cudaStream_t>(stream));
    }
}
