// What the plugins share: identity, capabilities, checks, cloning, fields, planning and launching. A plugin adds
//   kName, kInputs, kOutput (its tensors), fewestInputs(), mostInputs(attributes),
//   readShape(dims, count, shape), getOutputShapes, and the functions of its plan: checkShape, planLaunches, workspaceBound.
#pragma once

#include "common/fields.hpp"
#include "common/launch_plan.hpp"
#include "common/logging.hpp"

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fna
{

constexpr char const* kPluginNamespace = "";

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = -1;

enum class ElementType
{
    kFloating,    // fp32, fp16 or bf16, which the first input decides; read in vectors, so its address is aligned
    kInt32,
    kFloat32,
};

struct TensorFacts
{
    char const* name;
    int32_t rank;
    ElementType type;
    Slot slot;
};

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

// The value of a dimension that is known at build time, or -1.
inline int64_t constantOr(nvinfer1::IDimensionExpr const* dimension) noexcept
{
    return dimension != nullptr && dimension->isConstant() ? dimension->getConstantValue() : -1;
}

template <typename Derived, typename Shape, typename Attributes_>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime
{
public:
    using Attributes = Attributes_;

    explicit PluginBase(Attributes const& attributes)
        : mAttributes(attributes)
        , mTimingCacheId(std::string(Derived::kName) + "-" + attributes.version() + ":" + printFields(attributes, ","))
        , mFields(describeFields(mAttributes))
        , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
        , mInputs(Derived::mostInputs(attributes))
    {
    }
    PluginBase(PluginBase const&) = delete;
    PluginBase& operator=(PluginBase const&) = delete;

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
        return guarded<nvinfer1::IPluginV3*>("clone", nullptr, [this] { return new Derived(mAttributes); });
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
        return mAttributes.version();
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kPluginNamespace;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override
    {
        if (!checkNumbers(nbInputs, nbOutputs))
        {
            return kFailed;
        }
        outputTypes[0] = Derived::kOutput.type == ElementType::kFloating ? inputTypes[0] : nvinfer1::DataType::kINT32;
        return kOk;
    }

    bool supportsFormatCombination(
        int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        if (!takes(nbInputs) || nbOutputs != 1 || pos < 0 || pos > nbInputs)
        {
            return false;
        }
        nvinfer1::PluginTensorDesc const& tensor = inOut[pos].desc;
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR)
        {
            return false;
        }
        Dtype dtype{};
        switch (pos < nbInputs ? Derived::kInputs[pos].type : Derived::kOutput.type)
        {
        case ElementType::kInt32: return tensor.type == nvinfer1::DataType::kINT32;
        case ElementType::kFloat32: return tensor.type == nvinfer1::DataType::kFLOAT;
        default: return pos == 0 ? floatType(tensor.type, dtype) : tensor.type == inOut[0].desc.type;
        }
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        return guarded("configurePlugin", kFailed, [&] {
            Shape shape;
            Device device;
            bool const good = checkNumbers(nbInputs, nbOutputs)
                && sizes(in[0].desc.type, nbInputs, shape, [&](int32_t i) { return in[i].min; })
                && sizes(in[0].desc.type, nbInputs, shape, [&](int32_t i) { return in[i].max; })
                && (!probeDevice(device) || checkDevice(device));
            return good ? kOk : kFailed;
        });
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        return guarded("getWorkspaceSize", size_t{0}, [&] {
            Shape shape;
            bool const good
                = takes(nbInputs) && sizes(inputs[0].desc.type, nbInputs, shape, [&](int32_t i) { return inputs[i].max; });
            return good ? workspaceBound(shape, mAttributes) : size_t{0};
        });
    }

    char const* getTimingCacheID() noexcept override
    {
        return mTimingCacheId.c_str();
    }

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const*,
        int32_t nbOutputs) noexcept override
    {
        if (!checkNumbers(nbInputs, nbOutputs))
        {
            return kFailed;
        }
        mInputs = nbInputs;
        return !hasContext() || prepare(in) ? kOk : kFailed; // without a context enqueue does it, which has a stream
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        // Nothing to do but launch, when onShapeChange saw these shapes; it is what TensorRT calls first.
        StreamContext const context(reinterpret_cast<CUstream>(stream));
        if (inputDesc == nullptr || inputs == nullptr || outputs == nullptr || !prepare(inputDesc))
        {
            return kFailed;
        }
        std::array<void const*, kSlots> tensors{};
        for (int32_t i = 0; i < mInputs; ++i)
        {
            if (!place(Derived::kInputs[i], inputs[i], tensors))
            {
                return kFailed;
            }
        }
        bool const good = place(Derived::kOutput, outputs[0], tensors)
            && runPlan(mPlan, tensors, workspace, reinterpret_cast<CUstream>(stream));
        return good ? kOk : kFailed;
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return &mCollection;
    }

protected:
    bool takes(int32_t nbInputs) const noexcept
    {
        return nbInputs == Derived::fewestInputs() || nbInputs == Derived::mostInputs(mAttributes);
    }

    bool checkNumbers(int32_t nbInputs, int32_t nbOutputs) const noexcept
    {
        if (!takes(nbInputs) || nbOutputs != 1)
        {
            logError(nbInputs, " inputs and ", nbOutputs, " outputs were given, but ",
                takes(nbInputs) ? nbInputs : Derived::mostInputs(mAttributes), " and 1 are needed");
            return false;
        }
        return true;
    }

    // `Dimensions` is Dims at run time, DimsExprs while building.
    template <typename Dimensions>
    static bool checkRanks(Dimensions const* dims, int32_t count) noexcept
    {
        for (int32_t i = 0; i < count; ++i)
        {
            TensorFacts const& facts = Derived::kInputs[i];
            if (dims[i].nbDims != facts.rank)
            {
                logError(facts.name, " has ", dims[i].nbDims, " dimensions, but ", facts.rank, " are needed");
                return false;
            }
        }
        return true;
    }

    Attributes const mAttributes;

private:
    // Sizes of one call, from dimensOf(i) of each input; false, and logged, where the inputs do not fit together.
    template <typename DimensionsOf>
    bool sizes(nvinfer1::DataType type, int32_t count, Shape& shape, DimensionsOf&& dimensionsOf) const noexcept
    {
        nvinfer1::Dims dims[std::size(Derived::kInputs)];
        for (int32_t i = 0; i < count; ++i)
        {
            dims[i] = dimensionsOf(i);
        }
        if (!checkRanks(dims, count))
        {
            return false;
        }
        if (!floatType(type, shape.dtype))
        {
            logError(Derived::kInputs[0].name, " has type ", static_cast<int32_t>(type), ", but fp32, fp16 or bf16 is needed");
            return false;
        }
        return static_cast<Derived const*>(this)->readShape(dims, count, shape) && checkShape(shape);
    }

    bool prepare(nvinfer1::PluginTensorDesc const* in) noexcept
    {
        return guarded("onShapeChange", false, [&] {
            Shape shape;
            Device device;
            bool const known = sizes(in[0].type, mInputs, shape, [&](int32_t i) { return in[i].dims; }) && currentDevice(device);
            bool const sameDevice = device.context == mDevice.context && device.contextId == mDevice.contextId;
            if (known && mReady && sameDevice && shape == mShape)
            {
                return true;
            }
            mReady = false;
            if (!known || !checkDevice(device))
            {
                return false;
            }
            mPlan = planLaunches(shape, mAttributes, device.multiprocessors);
            mShape = shape;
            mDevice = device;
            mReady = loadPlan(mPlan, device);
            return mReady;
        });
    }

    // Landmarks, biases and masks are read element by element; all others in vectors.
    static bool place(TensorFacts const& facts, void const* address, std::array<void const*, kSlots>& tensors) noexcept
    {
        uintptr_t const wanted = facts.type == ElementType::kFloating ? kPointerAlignment : sizeof(int32_t);
        if (address == nullptr || reinterpret_cast<uintptr_t>(address) % wanted != 0)
        {
            logError(facts.name, " lies at ", address, ", but an address that is a multiple of ", wanted, " is needed");
            return false;
        }
        tensors[facts.slot] = address;
        return true;
    }

    std::string mTimingCacheId;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection;
    int32_t mInputs; // onShapeChange says how many; until then as many as there can be
    Shape mShape{};
    Device mDevice{};
    Plan mPlan{};
    bool mReady{false};
};

// The creator of one version of a plugin: `defaults` are the attributes of a node that gives none.
template <typename Plugin>
class PluginCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    using Attributes = typename Plugin::Attributes;

    explicit PluginCreator(Attributes const& defaults)
        : mDefaults(defaults)
        , mFields(describeFields(mDefaults))
        , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
    {
        for (nvinfer1::PluginField& field : mFields)
        {
            field.data = nullptr;
        }
    }

    nvinfer1::IPluginV3* createPlugin(
        char const*, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase) noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
            Attributes attributes = mDefaults;
            if (!readFields(fields, Plugin::kName, attributes) || !attributes.check())
            {
                return nullptr;
            }
            logAt(nvinfer1::ILogger::Severity::kVERBOSE, Plugin::kName, " created: ", printFields(attributes, " "),
                " version=", attributes.version());
            return new Plugin(attributes);
        });
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    char const* getPluginName() const noexcept override
    {
        return Plugin::kName;
    }

    char const* getPluginVersion() const noexcept override
    {
        return mDefaults.version();
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kPluginNamespace;
    }

private:
    Attributes const mDefaults;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection;
};

} // namespace fna
