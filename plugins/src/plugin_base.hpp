// What the two plugins share: identity, capabilities, and cloning.
#pragma once

#include "launch_plan.hpp"
#include "logging.hpp"

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>

namespace fna
{

// Bump on any change of inputs, outputs or fields.
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = -1;

// True, with `dtype` set, for the types of query, key, value, features and outputs.
inline bool floatType(nvinfer1::DataType type, Dtype& dtype) noexcept
{
    switch (type)
    {
    case nvinfer1::DataType::kFLOAT: dtype = Dtype::kFp32; return true;
    case nvinfer1::DataType::kHALF: dtype = Dtype::kFp16; return true;
    case nvinfer1::DataType::kBF16: dtype = Dtype::kBf16; return true;
    default: return false;
    }
}

inline bool checkRank(char const* name, int32_t rank, int32_t needed) noexcept
{
    if (rank != needed)
    {
        logError(name, " has ", rank, " dimensions, but ", needed, " are needed");
    }
    return rank == needed;
}

inline bool checkCounts(int32_t inputs, int32_t neededInputs, int32_t outputs) noexcept
{
    if (inputs != neededInputs || outputs != 1)
    {
        logError(inputs, " inputs and ", outputs, " outputs were given, but ", neededInputs, " and 1 are needed");
        return false;
    }
    return true;
}

// The value of a dimension that is known at build time, or -1.
inline int64_t constantOr(nvinfer1::IDimensionExpr const* dimension) noexcept
{
    return dimension != nullptr && dimension->isConstant() ? dimension->getConstantValue() : -1;
}

template <typename Derived>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime
{
public:
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    // A clone has the attributes only: fields, identifiers and plans are made anew, never copied with their pointers.
    nvinfer1::IPluginV3* clone() noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(
            "clone", nullptr, [this] { return new Derived(static_cast<Derived const*>(this)->attributes()); });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    char const* getPluginName() const noexcept override
    {
        return Derived::kName;
    }

    char const* getPluginVersion() const noexcept override
    {
        return kPluginVersion;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kPluginNamespace;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }
};

} // namespace fna
